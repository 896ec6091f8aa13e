use super::*;
use crate::wire::{Command, Request};
use proptest::prelude::*;

const LIMITS: Limits = Limits {
    sectors: 1000,
    frame_sectors: 2,
    read_only: false,
    always_durable: false,
    deny_features: false,
    trim: true,
    smart: true,
};

/// An ATA frame with these registers and `data` behind them.
fn frame(aflags: u8, opcode: u8, lba: u64, count: u8, data: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 36];
    frame[12..15].copy_from_slice(&[0x88, 0xA2, 0x10]);
    frame[24] = aflags;
    frame[26] = count;
    frame[27] = opcode;
    frame[28..34].copy_from_slice(&lba.to_le_bytes()[..6]);
    frame.extend_from_slice(data);
    frame
}

fn go(frame: &[u8], limits: &Limits) -> Result<Order<'static>, Refusal> {
    let Command::Ata(taskfile, payload) = Request::parse(frame).unwrap().command else {
        panic!()
    };
    decode(&taskfile, payload, limits).map(|order| match order {
        Order::Write(extent, data) => Order::Write(extent, data.to_vec().leak()),
        Order::Read(e) => Order::Read(e),
        Order::Verify(e) => Order::Verify(e),
        Order::Trim(list) => Order::Trim(list),
        Order::Flush => Order::Flush,
        Order::Identify => Order::Identify,
        Order::CheckPower => Order::CheckPower,
        Order::WriteCache(on) => Order::WriteCache(on),
        Order::Smart(s) => Order::Smart(s),
    })
}

fn extent(start: u64, count: u64) -> Extent {
    Extent::new(Lba(start), count).unwrap()
}

const BAD: Refusal = Refusal::Aoe(ErrorCode::BadArgument);

fn ata(error: u8, left: u8) -> Refusal {
    Refusal::Ata(Outcome {
        status: 0x41,
        error,
        left,
    })
}

#[test]
fn the_opcode_decides_and_the_flags_never() {
    for aflags in [0, 0x01, 0x40, 0x41, 0xFF] {
        for opcode in [0x20, 0xC8] {
            // Linux puts 0xE0 into the top of LBA3, and 32, 33 may be junk.
            let got = go(&frame(aflags, opcode, 0x5566_E000_0064, 1, &[]), &LIMITS);
            assert_eq!(
                got,
                Ok(Order::Read(extent(100, 1))),
                "{opcode:#x} {aflags:#x}"
            );
        }
        for opcode in [0x24, 0x25] {
            let got = go(&frame(aflags, opcode, 0xE000_0064, 1, &[]), &LIMITS);
            assert_eq!(got, Err(ata(0x10, 1)), "{opcode:#x} {aflags:#x}");
        }
        for opcode in [0x30, 0xCA, 0x34, 0x35] {
            let got = go(&frame(aflags, opcode, 7, 1, &[9; 512]), &LIMITS);
            assert_eq!(
                got,
                Ok(Order::Write(extent(7, 1), &[9; 512])),
                "{opcode:#x} {aflags:#x}"
            );
        }
    }
}

#[test]
fn bounds_are_exact_and_do_not_wrap() {
    for (lba, count, ok) in [
        (999, 1, true),
        (998, 2, true),
        (999, 2, false),
        (1000, 0, true),
        (1001, 0, true),
        ((1 << 48) - 1, 2, false),
    ] {
        let got = go(&frame(0x40, 0x24, lba, count, &[]), &LIMITS);
        assert_eq!(got.is_ok(), ok, "{lba}+{count}");
        if !ok {
            assert_eq!(got, Err(ata(0x10, count)));
        }
    }
}

#[test]
fn a_count_above_the_frame_is_an_argument_out_of_range() {
    assert_eq!(go(&frame(0x40, 0x24, 0, 3, &[]), &LIMITS), Err(BAD));
    assert_eq!(go(&frame(0x41, 0x34, 0, 3, &[0; 1536]), &LIMITS), Err(BAD));
    let verify = go(&frame(0, 0x42, 0, 255, &[]), &LIMITS);
    assert_eq!(verify, Ok(Order::Verify(extent(0, 255))));
    assert_eq!(
        go(&frame(0, 0x40, 900, 101, &[]), &LIMITS),
        Err(ata(0x10, 101))
    );
}

#[test]
fn a_write_shorter_than_its_count_writes_nothing() {
    for len in [0, 1, 511, 1023] {
        assert_eq!(
            go(&frame(0x41, 0x34, 0, 2, &vec![1; len]), &LIMITS),
            Err(BAD),
            "{len}"
        );
    }
    let long = frame(0x41, 0x34, 0, 1, &[1; 700]);
    assert_eq!(
        go(&long, &LIMITS),
        Ok(Order::Write(extent(0, 1), &[1; 512]))
    );
}

#[test]
fn a_read_only_export_refuses_before_anything_else() {
    let limits = Limits {
        read_only: true,
        ..LIMITS
    };
    for opcode in [0x30, 0x34, 0xCA, 0x35, 0x06] {
        assert_eq!(
            go(&frame(0x41, opcode, 5000, 9, &[]), &limits),
            Err(ata(4, 9))
        );
    }
    assert!(go(&frame(0x40, 0x24, 0, 1, &[]), &limits).is_ok());
}

#[test]
fn small_commands_follow_the_table() {
    assert_eq!(go(&frame(0, 0xEC, 0, 1, &[]), &LIMITS), Ok(Order::Identify));
    assert_eq!(go(&frame(0, 0xEC, 0, 0, &[]), &LIMITS), Err(BAD));
    assert_eq!(go(&frame(0, 0xE7, 0, 0, &[]), &LIMITS), Ok(Order::Flush));
    assert_eq!(go(&frame(0, 0xEA, 0, 9, &[]), &LIMITS), Ok(Order::Flush));
    assert_eq!(
        go(&frame(1, 0xE5, 0, 1, &[]), &LIMITS),
        Ok(Order::CheckPower)
    );
    // An unknown command with count 255 made AoEde build 130 KB and die.
    assert_eq!(go(&frame(0, 0x99, 0, 255, &[]), &LIMITS), Err(ata(4, 255)));
}

#[test]
fn set_features_knows_the_write_cache_only() {
    let feature = |feature: u8, limits: &Limits| {
        let mut frame = frame(0, 0xEF, 0, 0, &[]);
        frame[25] = feature;
        go(&frame, limits)
    };
    assert_eq!(feature(0x82, &LIMITS), Ok(Order::WriteCache(false)));
    assert_eq!(feature(0x02, &LIMITS), Ok(Order::WriteCache(true)));
    assert_eq!(feature(0x03, &LIMITS), Err(ata(4, 0)));
    let durable = Limits {
        always_durable: true,
        ..LIMITS
    };
    assert_eq!(feature(0x02, &durable), Err(ata(4, 0)));
    assert_eq!(feature(0x82, &durable), Ok(Order::WriteCache(false)));
}

#[test]
fn smart_needs_its_signature_and_to_be_enabled() {
    let smart = |feature: u8, lba: u64, limits: &Limits| {
        let mut frame = frame(0, 0xB0, lba, 1, &[]);
        frame[25] = feature;
        go(&frame, limits)
    };
    let off = Limits {
        smart: false,
        ..LIMITS
    };
    for (feature, order) in [
        (0xD0, Smart::ReadData),
        (0xD8, Smart::Enable(true)),
        (0xD9, Smart::Enable(false)),
        (0xDA, Smart::ReturnStatus),
    ] {
        assert_eq!(smart(feature, 0xC2_4F00, &LIMITS), Ok(Order::Smart(order)));
        assert_eq!(smart(feature, 0, &LIMITS), Err(ata(4, 1)));
        assert_eq!(smart(feature, 0xC2_4F00, &off).is_ok(), feature == 0xD8);
    }
    assert_eq!(smart(0xD5, 0xC2_4F00, &LIMITS), Err(ata(4, 1)));
}

#[test]
fn what_the_operator_denies_is_aborted_and_the_rest_is_not() {
    let deny = Limits {
        deny_features: true,
        ..LIMITS
    };
    let with = |opcode: u8, feature: u8| {
        let mut frame = frame(0, opcode, 0xC2_4F00, 1, &[]);
        frame[25] = feature;
        go(&frame, &deny)
    };
    for feature in 0..=255 {
        assert_eq!(with(0xEF, feature), Err(ata(4, 1)), "{feature:#x}");
    }
    for feature in [0xD8, 0xD9] {
        assert_eq!(with(0xB0, feature), Err(ata(4, 1)), "{feature:#x}");
    }
    assert_eq!(with(0xB0, 0xD0), Ok(Order::Smart(Smart::ReadData)));
    assert_eq!(with(0xB0, 0xDA), Ok(Order::Smart(Smart::ReturnStatus)));
}

#[test]
fn trim_checks_all_ranges_before_any() {
    let trim = |ranges: &[(u64, u16)], limits: &Limits| {
        let mut data = vec![0; 512];
        for (slot, (lba, count)) in data.chunks_exact_mut(8).zip(ranges) {
            slot[..6].copy_from_slice(&lba.to_le_bytes()[..6]);
            slot[6..].copy_from_slice(&count.to_le_bytes());
        }
        let mut frame = frame(0x41, 0x06, 0, 1, &data);
        frame[25] = 1;
        go(&frame, limits)
    };
    let ok = trim(&[(0, 10), (5000, 0), (990, 10)], &LIMITS);
    assert_eq!(ok, Ok(Order::Trim(vec![extent(0, 10), extent(990, 10)])));
    assert_eq!(trim(&[(0, 10), (991, 10)], &LIMITS), Err(ata(0x10, 1)));
    let cannot = Limits {
        trim: false,
        ..LIMITS
    };
    assert_eq!(trim(&[(0, 10)], &cannot), Err(ata(4, 1)));
    let mut short = frame(0x41, 0x06, 0, 1, &[0; 511]);
    short[25] = 1;
    assert_eq!(go(&short, &LIMITS), Err(BAD));
}

proptest! {
    #[test]
    fn whatever_is_ordered_lies_on_the_disk(registers: [u8; 12], data in proptest::collection::vec(any::<u8>(), 0..1400)) {
        let mut frame = frame(0, 0, 0, 0, &data);
        frame[24..36].copy_from_slice(&registers);
        let extents = match go(&frame, &LIMITS) {
            Ok(Order::Read(e) | Order::Verify(e)) => vec![e],
            Ok(Order::Write(e, bytes)) => {
                prop_assert_eq!(e.byte_len(), bytes.len() as u64);
                vec![e]
            }
            Ok(Order::Trim(list)) => list,
            _ => vec![],
        };
        for extent in extents {
            prop_assert!(extent.is_empty() || extent.fits(LIMITS.sectors));
        }
    }
}
