//! Several reads in one frame: an answer to each, and to nothing that is none.

use super::tags::OK;
use super::*;
use initiator::frame::{Ata, opcode};
use proptest::prelude::*;

/// A frame with several reads: tag, LBA, count of each.
fn coalesced(reads: &[(u32, u64, u8)]) -> Ask {
    let [(tag, lba, count), further @ ..] = reads else {
        panic!()
    };
    let first = Ata {
        aflags: 0x40,
        count: *count,
        opcode: opcode::READ_EXT,
        lba: *lba,
        ..Ata::default()
    };
    let further: Vec<_> = further
        .iter()
        .map(|(tag, lba, count)| (tag.to_be_bytes(), *lba, *count))
        .collect();
    Ask::coalesced_read(first, further.len() as u8, &further).tag(*tag)
}

impl Bench {
    /// Hands over a frame with several reads; all that comes of it, by tag.
    fn several(&mut self, nic: NicId, from: u8, ask: &Ask, reads: &[(u32, u64, u8)]) -> Vec<Reply> {
        let mut replies = Vec::new();
        for (tag, lba, count) in &reads[1..] {
            let alone = self.encode(nic, from, &Ask::read(*lba, *count).tag(*tag));
            self.asked.push((nic, alone));
        }
        let bytes = self.encode(nic, from, ask);
        match self.hand(nic, &bytes) {
            Got::Reply(reply) => replies.push(reply),
            Got::Parked | Got::Dropped(_) => {}
            other => panic!("{other:?}"),
        }
        replies.extend(self.pump().into_iter().map(|(_, reply)| reply));
        self.asked.clear();
        replies.sort_by_key(Reply::tag);
        replies
    }
}

#[test]
fn each_read_of_a_frame_has_its_own_answer() {
    let mut bench = Bench::new();
    for lba in 0..8 {
        bench.write(lba, &sectors(lba as u8 + 1, 1));
    }
    let reads = [
        (10, 0, 2),
        (11, 7, 1),
        (12, SECTORS, 1),
        (13, 3, 3),
        (14, 2, 0),
        (15, 5, 2),
    ];
    let ask = coalesced(&reads);
    // Who did not ask for it gets the first alone, as from a frame with padding.
    let plain = bench.several(SMALL, ALICE, &ask, &reads);
    assert_eq!(plain.len(), 1);
    for wishes in [&["coalesced_read"][..], &["crc8x4"]] {
        bench.extend(SMALL, ALICE, wishes);
        let replies = bench.several(SMALL, ALICE, &ask, &reads);
        let tags: Vec<u32> = replies.iter().map(Reply::tag).collect();
        assert_eq!(tags, [10, 11, 12, 13, 14, 15]);
        same(
            replies[0].sectors(2).unwrap(),
            &[sectors(1, 1), sectors(2, 1)].concat(),
        );
        same(replies[1].sectors(1).unwrap(), &sectors(8, 1));
        assert_eq!(registers(&replies[2]), (0x41, 0x10, 1));
        assert_eq!(replies[3].error(), Some(2));
        assert_eq!((registers(&replies[4]), replies[4].bytes().len()), (OK, 60));
        same(
            replies[5].sectors(2).unwrap(),
            &[sectors(6, 1), sectors(7, 1)].concat(),
        );
        assert!(
            replies
                .iter()
                .all(|reply| reply.ata().unwrap().aflags == 0x40)
        );
    }
    assert_eq!(bench.several(SMALL, BOB, &ask, &reads).len(), 1);
}

#[test]
fn reads_of_one_frame_wait_for_the_disk_each_on_its_own() {
    let mut bench = Bench::new();
    bench.extend(SMALL, ALICE, &["coalesced_read", "crc8x4", "tag_inc_be"]);
    bench.shut();
    let reads = [(10, 0, 2), (11, 20, 1), (12, 40, 1)];
    let ask = coalesced(&reads);
    assert_eq!(bench.several(SMALL, ALICE, &ask, &reads).len(), 0);
    // All of them are in hand.
    let drops = |bench: &Bench| bench.target.counters().drops(Dropped::InHand);
    assert_eq!(bench.several(SMALL, ALICE, &ask, &reads).len(), 0);
    assert_eq!(drops(&bench), 3);
    for (tag, lba, count) in reads {
        bench.twin(tag, &Ask::read(lba, count));
    }
    let first = bench.encode(SMALL, ALICE, &Ask::read(0, 2).tag(10));
    bench.asked.push((SMALL, first));
    for (tag, lba, count) in &reads[1..] {
        let bytes = bench.encode(SMALL, ALICE, &Ask::read(*lba, *count).tag(*tag));
        bench.asked.push((SMALL, bytes));
    }
    bench.open();
    assert_eq!(bench.wait().len(), 3);
    assert_eq!(bench.several(SMALL, ALICE, &ask, &reads).len(), 3);
}

#[test]
fn padding_is_no_read_and_a_count_is_not_believed() {
    let mut bench = Bench::new();
    bench.extend(SMALL, ALICE, &["coalesced_read"]);
    let one = [(10, 0, 1)];
    // Linux may add a full frame of zeros to a READ.
    for ask in [
        Ask::read(0, 1).tag(10).padded(60),
        Ask::read(0, 1).tag(10).padded(1060),
        coalesced(&one).edit(36, &[255]).padded(1514),
        coalesced(&one).edit(36, &[255]),
    ] {
        assert_eq!(bench.several(SMALL, ALICE, &ask, &one).len(), 1, "{ask:?}");
    }
    let three = [(10, 0, 1), (11, 1, 1), (12, 2, 1)];
    for cut in 0..16 {
        let ask = coalesced(&three).edit(36, &[200]).length(36 + 1 + 32 - cut);
        let expected = if cut == 0 { 3 } else { 2 };
        let replies = bench.several(SMALL, ALICE, &ask, &three);
        assert_eq!(replies.len(), expected, "{cut}");
    }
    let ask = coalesced(&three).edit(36, &[1]);
    assert_eq!(bench.several(SMALL, ALICE, &ask, &three).len(), 2);
    // Behind a write there is none.
    let write = Ask::write(0, &[1; 512]);
    assert_eq!(bench.several(SMALL, ALICE, &write, &one).len(), 1);
}

#[test]
fn more_reads_than_there_is_room_for_are_left_out() {
    let mut bench = Bench::new();
    bench.extend(JUMBO, ALICE, &["coalesced_read"]);
    let reads: Vec<_> = (0..256).map(|n| (1000 + n, u64::from(n) % 60, 1)).collect();
    let ask = coalesced(&reads);
    let drops = |bench: &Bench| bench.target.counters().drops(Dropped::NoRoom);
    let bytes = bench.encode(JUMBO, ALICE, &ask);
    bench.hand(JUMBO, &bytes);
    // What one frame asks for leaves by and by, so that others are heard.
    assert!((1..20).contains(&bench.target.ready.len()));
    for _ in 0..8 {
        bench.hand(JUMBO, &bytes);
    }
    assert!((1..20).contains(&bench.target.ready.len()));
    assert!(drops(&bench) > 255, "all that is asked for waits");
    // Another host's frame has its place.
    bench.extend(JUMBO, BOB, &["coalesced_read"]);
    let dropped = drops(&bench);
    let bytes = bench.encode(JUMBO, BOB, &ask);
    bench.hand(JUMBO, &bytes);
    assert_eq!(drops(&bench), dropped);
    let bobs = |bench: &Bench| {
        let ready = bench.target.ready.iter();
        let bob: MacAddr = host(BOB);
        ready
            .filter(|ready| matches!(&ready.what, What::Ata(answer) if answer.asker() == bob))
            .count()
    };
    while bench.target.next_ready().is_some() {
        bench.target.skip();
    }
    let (mut turns, mut answered) = (0, 0);
    while bench.target.has_work() {
        bench.target.advance(bench.now);
        turns += 1;
        answered += bobs(&bench);
        assert!(bench.target.ready.len() < 20);
        while bench.target.next_ready().is_some() {
            bench.target.skip();
        }
        // He has every other turn, though so much was asked for before.
        assert!(
            answered == 255 || turns < 60,
            "{answered} replies in {turns} turns"
        );
    }
    assert_eq!(answered, 255);
    assert_eq!(bench.several(JUMBO, ALICE, &ask, &reads).len(), 256);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Frames with several reads, true and false: as many answers as there are
    /// reads in the frame, each by the rules (the bench holds them against
    /// them).
    #[test]
    fn no_frame_with_several_reads_can_harm(
        reads in proptest::collection::vec((0u64..70, 0u8..4), 1..40),
        count in prop_oneof![2 => Just(None), 1 => any::<u8>().prop_map(Some)],
        cut in 36usize..700,
        shut: bool,
    ) {
        let mut bench = Bench::new();
        bench.extend(SMALL, ALICE, &["coalesced_read", "crc8x4"]);
        if shut {
            bench.shut();
        }
        let reads: Vec<_> = (1..).zip(reads).map(|(tag, (lba, count))| (tag, lba, count)).collect();
        let mut ask = coalesced(&reads);
        if let Some(count) = count {
            ask = ask.edit(36, &[count]);
        }
        let whole = 37 + 16 * (reads.len() - 1);
        let len = whole.min(cut);
        let n = usize::from(count.unwrap_or(reads.len() as u8 - 1));
        let expected = 1 + n.min(len.saturating_sub(37) / 16);
        for (tag, lba, count) in &reads {
            let alone = bench.encode(SMALL, ALICE, &Ask::read(*lba, *count).tag(*tag));
            bench.asked.push((SMALL, alone));
        }
        let bytes = bench.encode(SMALL, ALICE, &ask.length(len));
        let mut head = vec![0xA5; HEAD_MAX];
        let frame = Frame { bytes: &bytes, stamp: 0, whole: true, other_host: false };
        let mut answers = 0;
        match bench.target.handle(bench.now, SMALL, frame, &mut head) {
            Action::Reply { body, .. } => {
                bench.target.recycle(body);
                answers += 1;
            }
            other => prop_assert!(matches!(other, Action::Parked)),
        }
        bench.open();
        answers += bench.pump().len();
        prop_assert_eq!(answers, expected);
    }
}
