//! ATA: what each command does and answers, and what is refused has no effect.

use super::*;
use initiator::frame::{Ata, Identify, opcode};

fn registers_of(opcode: u8, lba: u64, count: u8) -> Ata {
    Ata {
        opcode,
        lba,
        count,
        ..Ata::default()
    }
}

/// The disk with each sector filled with its number and some.
fn numbered(bench: &mut Bench) -> Vec<u8> {
    let disk: Vec<u8> = (0..SECTORS as usize * 512)
        .map(|i| (i / 512 + 1) as u8)
        .collect();
    for (index, pair) in disk.chunks(1024).enumerate() {
        bench.write(index as u64 * 2, pair);
    }
    same(&bench.bytes(), &disk);
    disk
}

#[test]
fn the_opcode_decides_and_the_flags_do_not() {
    // With AoEde a READ with the write flag returned nothing, and a WRITE
    // without it returned memory.
    let mut bench = Bench::new();
    let mut disk = numbered(&mut bench);
    for aflags in [0, 0x01, 0x02, 0x10, 0x40, 0x41, 0x53, 0xFF] {
        for (op, lba) in [
            (opcode::READ, 0xDEAD_E000_0005),
            (opcode::READ_DMA, 0xDEAD_E000_0005),
            (opcode::READ_EXT, 5),
            (opcode::READ_DMA_EXT, 5),
        ] {
            let registers = Ata {
                aflags,
                ..registers_of(op, lba, 2)
            };
            // What follows the registers of a READ is no business of ours.
            let reply = bench.ask(&Ask::ata(registers, &sectors(0xEE, 2)));
            assert_eq!(reply.sectors(2).unwrap(), &disk[5 * 512..7 * 512]);
        }
        for (n, (op, lba)) in [
            (opcode::WRITE, 0xDEAD_E000_0005),
            (opcode::WRITE_DMA, 0xDEAD_E000_0007),
            (opcode::WRITE_EXT, 9),
            (opcode::WRITE_DMA_EXT, 11),
        ]
        .into_iter()
        .enumerate()
        {
            let registers = Ata {
                aflags,
                ..registers_of(op, lba, 2)
            };
            let data = sectors(aflags ^ n as u8, 2);
            let reply = bench.ask(&Ask::ata(registers, &data));
            assert_eq!((registers_of_reply(&reply), reply.bytes().len()), (OK, 60));
            let at = (5 + 2 * n) * 512;
            disk[at..at + 1024].copy_from_slice(&data);
            same(&bench.bytes(), &disk);
        }
    }
}

const OK: (u8, u8, u8) = (0x40, 0, 0);

fn registers_of_reply(reply: &Reply) -> (u8, u8, u8) {
    registers(reply)
}

#[test]
fn nothing_past_the_end_is_read_or_written() {
    let mut bench = Bench::new();
    let disk = numbered(&mut bench);
    for (lba, count) in [
        (SECTORS, 1),
        (SECTORS - 1, 2),
        (1 << 28, 1),
        ((1 << 48) - 1, 1),
        ((1 << 48) - 1, 2),
        ((1 << 48) - 2, 2),
        (u64::MAX >> 23, 2),
    ] {
        for op in [opcode::READ_EXT, opcode::READ_DMA_EXT] {
            let reply = bench.ask(&Ask::ata(registers_of(op, lba, count), &[]));
            assert_eq!(registers(&reply), (0x41, 0x10, count), "{op:#x} {lba}");
        }
        for op in [opcode::WRITE_EXT, opcode::WRITE_DMA_EXT] {
            let ask = Ask::ata(registers_of(op, lba, count), &sectors(0xEE, 2));
            let reply = bench.ask(&ask);
            assert_eq!(registers(&reply), (0x41, 0x10, count), "{op:#x} {lba}");
        }
        let reply = bench.ask(&Ask::ata(
            registers_of(opcode::READ_VERIFY_EXT, lba, count),
            &[],
        ));
        assert_eq!(registers(&reply), (0x41, 0x10, count), "verify {lba}");
    }
    for op in [opcode::READ, opcode::READ_DMA, opcode::READ_VERIFY] {
        let reply = bench.ask(&Ask::ata(registers_of(op, 0x0FFF_FFFF, 1), &[]));
        assert_eq!(registers(&reply), (0x41, 0x10, 1));
    }
    same(&bench.bytes(), &disk);
    let last = bench.ask(&Ask::read(SECTORS - 2, 2));
    assert_eq!(last.sectors(2).unwrap(), &disk[62 * 512..]);
    // The window of the backing is not the whole of it.
    assert_eq!(bench.medium.file.bytes().len(), START + 64 * 512);
}

#[test]
fn a_count_above_what_the_nic_was_told_is_a_bad_argument() {
    let mut bench = Bench::new();
    let disk = numbered(&mut bench);
    for (nic, most) in [(SMALL, 2), (JUMBO, 17)] {
        let told = bench.ask_from(nic, ALICE, &Ask::config(0, b""));
        assert_eq!(told.config().unwrap().sectors, most);
        for op in [
            opcode::READ,
            opcode::READ_DMA,
            opcode::READ_EXT,
            opcode::READ_DMA_EXT,
        ] {
            let reply = bench.ask_from(nic, ALICE, &Ask::ata(registers_of(op, 1, most), &[]));
            let end = 512 + usize::from(most) * 512;
            assert_eq!(reply.sectors(most).unwrap(), &disk[512..end]);
            for count in [most + 1, 128, 255] {
                let ask = Ask::ata(registers_of(op, 1, count), &[]);
                assert_eq!(bench.ask_from(nic, ALICE, &ask).error(), Some(2));
            }
        }
        for op in [
            opcode::WRITE,
            opcode::WRITE_DMA,
            opcode::WRITE_EXT,
            opcode::WRITE_DMA_EXT,
        ] {
            let most = usize::from(most);
            for count in [most + 1, 128, 255] {
                let registers = registers_of(op, 1, count as u8);
                // All that the frame can hold, which is too little.
                let ask = Ask::ata(registers, &sectors(0xEE, most));
                assert_eq!(bench.ask_from(nic, ALICE, &ask).error(), Some(2));
            }
        }
    }
    same(&bench.bytes(), &disk);
}

#[test]
fn a_write_with_fewer_bytes_than_its_count_writes_nothing() {
    // Heap or kernel memory went to the disk instead.
    let mut bench = Bench::new();
    let disk = numbered(&mut bench);
    for op in [
        opcode::WRITE,
        opcode::WRITE_DMA,
        opcode::WRITE_EXT,
        opcode::WRITE_DMA_EXT,
    ] {
        for len in [0, 1, 24, 511, 512, 1000, 1023] {
            let ask = Ask::ata(registers_of(op, 3, 2), &vec![0xEE; len]);
            assert_eq!(bench.ask(&ask).error(), Some(2), "{op:#x} {len}");
        }
    }
    let trim = Ata {
        feature: 1,
        ..registers_of(opcode::DATA_SET_MANAGEMENT, 0, 1)
    };
    let all = [0, 0, 0, 0, 0, 0, 64, 0].repeat(64);
    let reply = bench.ask(&Ask::ata(trim, &all[..511]));
    assert_eq!(reply.error(), Some(2));
    same(&bench.bytes(), &disk);
    // More than its count is ignored.
    let mut long = sectors(0x77, 1);
    long.extend([0xEE; 300]);
    bench.ask(&Ask::ata(registers_of(opcode::WRITE_EXT, 3, 1), &long));
    same(&bench.bytes()[3 * 512..4 * 512], &sectors(0x77, 1));
    same(&bench.bytes()[4 * 512..], &disk[4 * 512..]);
}

#[test]
fn a_count_of_zero_transfers_nothing_and_succeeds() {
    let mut bench = Bench::new();
    let disk = numbered(&mut bench);
    for op in [0x20, 0x24, 0xC8, 0x25, 0x30, 0x34, 0xCA, 0x35, 0x40, 0x42] {
        let ask = Ask::ata(registers_of(op, 3, 0), &sectors(0xEE, 1));
        let reply = bench.ask(&ask);
        assert_eq!(
            (registers(&reply), reply.bytes().len()),
            (OK, 60),
            "{op:#x}"
        );
    }
    same(&bench.bytes(), &disk);
}

#[test]
fn every_other_opcode_is_aborted_with_its_count_and_no_data() {
    // An unknown command with count 255 made AoEde build 130 KB and exit; CHECK
    // POWER MODE with count 1 made a negative length.
    const KNOWN: [u8; 17] = [
        0x20, 0x24, 0xC8, 0x25, 0x30, 0x34, 0xCA, 0x35, 0xEC, 0xE7, 0xEA, 0xE5, 0x40, 0x42, 0xEF,
        0x06, 0xB0,
    ];
    let mut bench = Bench::new();
    for op in (0..=255).filter(|op| !KNOWN.contains(op)) {
        for count in [0, 1, 2, 255] {
            for payload in [0, 512, 1024] {
                let registers = Ata {
                    aflags: 0x41,
                    feature: 0x82,
                    ..registers_of(op, 0, count)
                };
                let reply = bench.ask(&Ask::ata(registers, &vec![0xEE; payload]));
                assert_eq!(registers_of_reply(&reply), (0x41, 4, count), "{op:#x}");
                assert_eq!(reply.bytes().len(), 60);
            }
        }
    }
    for aflags in [0, 1, 0x41] {
        for count in [0, 1, 255] {
            let registers = Ata {
                aflags,
                ..registers_of(opcode::CHECK_POWER_MODE, 0, count)
            };
            let reply = bench.ask(&Ask::ata(registers, &[]));
            assert_eq!(registers_of_reply(&reply), (0x40, 0, 0xFF));
        }
    }
    same(&bench.bytes(), &sectors(0, 64));
}

#[test]
fn verify_reads_any_number_of_sectors_and_returns_none() {
    let mut bench = Bench::new();
    for op in [opcode::READ_VERIFY, opcode::READ_VERIFY_EXT] {
        let reply = bench.ask(&Ask::ata(registers_of(op, 0, 64), &[]));
        assert_eq!((registers(&reply), reply.bytes().len()), (OK, 60));
        let reply = bench.ask(&Ask::ata(registers_of(op, 0, 65), &[]));
        assert_eq!(registers(&reply), (0x41, 0x10, 65));
    }
    bench.medium.read_fails.store(true, Ordering::Relaxed);
    for op in [opcode::READ_VERIFY, opcode::READ_VERIFY_EXT] {
        let reply = bench.ask(&Ask::ata(registers_of(op, 1, 3), &[]));
        assert_eq!(registers(&reply), (0x41, 0x40, 3));
    }
}

#[test]
fn failures_of_the_disk_are_in_the_ata_status() {
    // Memory that does not survive, so that the reply to a write knows of them.
    let mut bench = Bench::writing_through();
    bench.medium.read_fails.store(true, Ordering::Relaxed);
    for op in [0x20, 0x24, 0xC8, 0x25] {
        let reply = bench.ask(&Ask::ata(registers_of(op, 0, 2), &[]));
        assert_eq!(
            (registers(&reply), reply.bytes().len()),
            ((0x41, 0x40, 2), 60)
        );
    }
    assert_eq!(bench.target.failures().reads, 4);
    bench.medium.read_fails.store(false, Ordering::Relaxed);
    bench.medium.write_fails.store(true, Ordering::Relaxed);
    for op in [0x30, 0x34, 0xCA, 0x35] {
        let ask = Ask::ata(registers_of(op, 0, 2), &sectors(9, 2));
        let reply = bench.ask_patiently(&ask);
        assert_eq!(registers(&reply), (0x61, 4, 2));
    }
    assert!(bench.target.failures().writes >= 3);
    bench.medium.write_fails.store(false, Ordering::Relaxed);
    bench.settle();
    bench.medium.sync_fails.store(true, Ordering::Relaxed);
    for op in [0xE7, 0xEA] {
        bench.ask_patiently(&Ask::write(8, &sectors(op, 1)));
        let reply = bench.ask_patiently(&Ask::ata(registers_of(op, 0, 0), &[]));
        assert_eq!(registers(&reply), (0x61, 4, 0));
    }
    assert!(bench.target.failures().syncs >= 2);
    bench.medium.sync_fails.store(false, Ordering::Relaxed);
    // None of that ended anything.
    assert_eq!(registers(&bench.ask_patiently(&Ask::flush())), OK);
    let read = bench.ask(&Ask::read(0, 2)).sectors(2).unwrap().to_vec();
    assert!([sectors(0, 2), sectors(9, 2)].contains(&read));
    assert_eq!(bench.target.failures().reads, 4);
}

#[test]
fn identify_is_for_everyone_and_its_count_is_one() {
    let mut bench = Bench::new();
    bench.ask(&Ask::reserve(1, &[host(BOB)]));
    for payload in [0, 1, 512, 1464] {
        let registers = registers_of(opcode::IDENTIFY, 0, 1);
        let reply = bench.ask(&Ask::ata(registers, &vec![0xEE; payload]));
        let id = Identify::parse(reply.sectors(1).unwrap()).unwrap();
        assert!(id.is_intact());
        assert_eq!((id.sectors(), id.sectors28()), (SECTORS, SECTORS as u32));
        assert_eq!(id.model(), "AoEde virtual blade");
    }
    for count in [0, 2, 255] {
        let ask = Ask::ata(registers_of(opcode::IDENTIFY, 0, count), &[]);
        assert_eq!(bench.ask(&ask).error(), Some(2));
    }
}

#[test]
fn a_reservation_leaves_the_disk_to_its_holders() {
    // AoEde died of the first ATA frame from anyone else.
    let mut bench = Bench::new();
    let disk = numbered(&mut bench);
    bench.ask_from(SMALL, BOB, &Ask::reserve(1, &[host(BOB), host(CAROL)]));
    for opcode in (0..=255).filter(|op| *op != opcode::IDENTIFY) {
        for count in [0, 1, 2, 255] {
            let registers = Ata {
                feature: 0x82,
                ..registers_of(opcode, 0, count)
            };
            let reply = bench.ask(&Ask::ata(registers, &sectors(0xEE, 2)));
            assert_eq!(reply.error(), Some(6), "{opcode:#x}");
        }
    }
    same(&bench.bytes(), &disk);
    for holder in [BOB, CAROL] {
        for nic in [SMALL, JUMBO] {
            let reply = bench.ask_from(nic, holder, &Ask::read(0, 2));
            assert_eq!(reply.sectors(2).unwrap(), &disk[..1024]);
        }
    }
    // The rest stays open.
    bench.ask(&Ask::identify());
    assert_eq!(bench.ask(&Ask::config(0, b"")).error(), None);
    assert_eq!(bench.ask(&Ask::mask_read()).error(), None);
    let list = bench.ask(&Ask::reserve(0, &[])).reserve().unwrap().list;
    assert_eq!(list, [host(BOB), host(CAROL)]);
}

#[test]
fn a_read_only_export_refuses_writes_before_anything_else() {
    let mut bench = Bench::with(Settings {
        read_only: true,
        ..settings()
    });
    for op in [0x30, 0x34, 0xCA, 0x35, 0x06] {
        for (lba, count) in [(0, 1), (0, 0), (0, 255), (1 << 40, 1)] {
            for len in [0, 512] {
                let registers = Ata {
                    feature: 1,
                    ..registers_of(op, lba, count)
                };
                let reply = bench.ask(&Ask::ata(registers, &vec![0xEE; len]));
                assert_eq!(registers_of_reply(&reply), (0x41, 4, count), "{op:#x}");
            }
        }
    }
    assert!(bench.ask(&Ask::read(0, 2)).sectors(2).is_some());
    assert_eq!(registers(&bench.ask(&Ask::flush())), OK);
    same(&bench.bytes(), &sectors(0, 64));
}

#[test]
fn trim_makes_zeros_of_all_its_ranges_or_of_none() {
    let mut bench = Bench::new();
    let mut disk = numbered(&mut bench);
    let mut trim = |ranges: &[(u64, u16)], feature, count| {
        let mut data = sectors(0, 1);
        for (entry, (lba, sectors)) in data.chunks_exact_mut(8).zip(ranges) {
            entry[..6].copy_from_slice(&lba.to_le_bytes()[..6]);
            entry[6..].copy_from_slice(&sectors.to_le_bytes());
        }
        let registers = Ata {
            feature,
            ..registers_of(opcode::DATA_SET_MANAGEMENT, 0x0505, count)
        };
        let reply = bench.ask(&Ask::ata(registers, &data));
        (registers_of_reply(&reply), bench.bytes())
    };
    assert_eq!(
        trim(&[(0, 4), (60, 5)], 1, 1),
        ((0x41, 0x10, 1), disk.clone())
    );
    let wraps = [(0, 4), ((1 << 48) - 1, 0xFFFF)];
    assert_eq!(trim(&wraps, 1, 1), ((0x41, 0x10, 1), disk.clone()));
    assert_eq!(trim(&[(0, 4)], 0, 1), ((0x41, 4, 1), disk.clone()));
    assert_eq!(trim(&[], 1, 1), (OK, disk.clone()));
    disk[..4 * 512].fill(0);
    disk[60 * 512..].fill(0);
    assert_eq!(trim(&[(0, 4), (9, 0), (60, 4)], 1, 1), (OK, disk));
}

#[test]
fn smart_tells_its_health_and_is_switched_for_who_asks() {
    let mut bench = Bench::new();
    let smart = |feature| {
        let registers = Ata {
            feature,
            ..registers_of(opcode::SMART, 0xC2_4F00, 1)
        };
        Ask::ata(registers, &[])
    };
    let word85 = |bench: &mut Bench| {
        let reply = bench.ask(&Ask::identify());
        Identify::parse(reply.sectors(1).unwrap()).unwrap().word(85)
    };
    let page = bench.ask(&smart(0xD0)).sectors(1).unwrap().to_vec();
    assert_eq!(page.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
    let status = bench.ask(&smart(0xDA));
    assert_eq!(
        (registers(&status), status.ata().unwrap().lba),
        (OK, 0xC2_4F00)
    );
    assert_eq!(word85(&mut bench) & 1, 1);
    // No data, but room for it, and zeros in it: `check` looks.
    assert_eq!(status.bytes().len(), 36 + 512);
    assert_eq!(registers(&bench.ask(&smart(0xD9))), OK);
    let off = |bench: &Bench| bench.saved().unwrap().smart_off.as_slice().to_vec();
    assert_eq!(off(&bench), [host(ALICE)]);
    assert_eq!(word85(&mut bench) & 1, 0);
    // It is the business of who asked, on every NIC, and of nobody else.
    let reply = bench.ask_from(JUMBO, ALICE, &smart(0xDA));
    assert_eq!(registers(&reply), (0x41, 4, 1));
    for feature in [0xD0, 0xDA, 0xD8] {
        let reply = bench.ask_from(SMALL, BOB, &smart(feature));
        assert_eq!(registers(&reply), OK, "{feature:#x}");
    }
    let reply = bench.ask_from(SMALL, BOB, &Ask::identify());
    let page = Identify::parse(reply.sectors(1).unwrap()).unwrap();
    assert_eq!(page.word(85) & 1, 1);
    for feature in [0xD0, 0xDA, 0xD9] {
        assert_eq!(registers(&bench.ask(&smart(feature))), (0x41, 4, 1));
    }
    assert_eq!(registers(&bench.ask(&smart(0xD8))), OK);
    assert_eq!(off(&bench), []);
    // The rest of SMART, and SMART without its signature.
    for feature in (0..=255).filter(|f| !(0xD8..=0xDA).contains(f) && *f != 0xD0) {
        assert_eq!(registers(&bench.ask(&smart(feature))), (0x41, 4, 1));
    }
    for feature in [0xD0, 0xD8, 0xD9, 0xDA] {
        let registers = Ata {
            feature,
            ..registers_of(opcode::SMART, 0, 1)
        };
        let reply = bench.ask(&Ask::ata(registers, &[]));
        assert_eq!(registers_of_reply(&reply), (0x41, 4, 1));
    }
    bench.target.settings.policy.deny_features = true;
    for feature in [0xD8, 0xD9] {
        assert_eq!(registers(&bench.ask(&smart(feature))), (0x41, 4, 1));
    }
    for feature in [0xD0, 0xDA] {
        assert_eq!(registers(&bench.ask(&smart(feature))), OK);
    }
    bench.medium.write_fails.store(true, Ordering::Relaxed);
    bench.ask(&Ask::write(0, &sectors(1, 1)));
    bench.ask(&Ask::flush());
    let failing = bench.ask(&smart(0xDA)).ata().unwrap().lba;
    assert_eq!(failing, 0x2C_F400);
}
