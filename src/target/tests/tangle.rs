//! Extensions, freezes, NICs, a slow or broken disk and long silences in any
//! order: nothing harms, and when all is quiet nothing is left in hand.

use super::*;
use crate::freeze::Order;
use initiator::frame::{Ata, opcode};
use proptest::prelude::*;

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// A request of a host, of this kind, under this tag.
    Ask(u8, u32, u64, u8, usize),
    Extend(u8, usize),
    Pass(u64),
    Pump,
    Shut(bool),
    Break(usize, bool),
    Mtu(u32),
    Link(bool),
    Order(bool),
}

const WISHES: [&[&str]; 10] = [
    &["tag_inc_be"],
    &["tag_inc_le"],
    &["tag_random"],
    &["tag_inc_be", "coalesced_read", "crc8x4"],
    &["coalesced_read", "tag_inc_be"],
    &["congestion", "1", "congestion", "2", "congestion", "3"],
    &["congestion", "4", "congestion", "5", "congestion", "6"],
    &["reset"],
    &["crc8x4"],
    &["reset", "tag_inc_be", "coalesced_read"],
];

fn step() -> impl Strategy<Value = Step> {
    let tag = prop_oneof![
        8 => 1u32..40,
        1 => Just(0),
        1 => 32_760u32..32_780,
        1 => Just(1_000_000),
        1 => any::<u32>(),
    ];
    let ask = (0u8..2, tag, 0u64..66, 0u8..4, 0usize..13)
        .prop_map(|(from, tag, lba, count, kind)| Step::Ask(from, tag, lba, count, kind));
    prop_oneof![
        20 => ask,
        3 => (0u8..2, 0..WISHES.len()).prop_map(|(from, which)| Step::Extend(from, which)),
        3 => prop_oneof![1u64..20, 400u64..12_000, Just(3_600_000)].prop_map(Step::Pass),
        4 => Just(Step::Pump),
        3 => any::<bool>().prop_map(Step::Shut),
        1 => (0usize..3, any::<bool>()).prop_map(|(what, broken)| Step::Break(what, broken)),
        1 => prop_oneof![Just(1500), Just(1060), Just(548)].prop_map(Step::Mtu),
        1 => any::<bool>().prop_map(Step::Link),
        1 => any::<bool>().prop_map(Step::Order),
    ]
}

fn ask(kind: usize, lba: u64, count: u8) -> Ask {
    let first = Ata {
        aflags: 0x40,
        count,
        opcode: opcode::READ_EXT,
        lba,
        ..Ata::default()
    };
    match kind {
        0..3 => Ask::write(lba, &vec![kind as u8; 512 * usize::from(count)]),
        3 => Ask::write(lba, &vec![3; 512 * usize::from(count)]).with_crc(),
        4 => Ask::write(lba, &[4; 1024]).padded(1070),
        5 => Ask::read(lba, count),
        6 => Ask::flush(),
        7 => Ask::identify(),
        8 => Ask::config(3, b""),
        9 => Ask::reserve(count & 3, &[host(ALICE)]),
        10 => Ask::ata(
            Ata {
                opcode: 0xEF,
                feature: [2, 0x82][usize::from(count & 1)],
                ..first
            },
            &[],
        ),
        _ => {
            let entries: Vec<_> = (1..30u32)
                .map(|n| ((n % 9).to_be_bytes(), lba + u64::from(n), count))
                .collect();
            Ask::coalesced_read(first, 29, &entries)
        }
    }
}

impl Bench {
    /// Hands a request over and forgets its answer; says what came of it.
    fn offer(&mut self, bytes: &[u8]) -> Option<Dropped> {
        let mut head = vec![0xA5; HEAD_MAX];
        let frame = Frame {
            bytes,
            stamp: 0,
            whole: true,
            other_host: false,
        };
        match self.target.handle(self.now, SMALL, frame, &mut head) {
            Action::Reply { body, .. } => self.target.recycle(body),
            Action::Drop(why) => return Some(why),
            Action::Parked | Action::AddressConflict(_) => {}
        }
        None
    }

    fn carry_on(&mut self) {
        self.target.advance(self.now);
        while self.target.next_ready().is_some() {
            let mut head = vec![0xA5; HEAD_MAX];
            if let Action::Reply { body, .. } = self.target.emit(&mut head) {
                self.target.recycle(body);
            }
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Ask(from, tag, lba, count, kind) => {
                let ask = ask(kind, lba, count).tag(tag);
                let bytes = self.encode(SMALL, ALICE + from, &ask);
                self.offer(&bytes);
            }
            Step::Extend(from, which) => {
                let bytes = self.encode(SMALL, ALICE + from, &Ask::extensions(WISHES[which]));
                self.offer(&bytes);
            }
            Step::Pass(time) => {
                self.now += Duration::from_millis(time);
                self.carry_on();
            }
            Step::Pump => self.carry_on(),
            Step::Shut(true) => self.shut(),
            Step::Shut(false) => self.open(),
            Step::Break(what, broken) => {
                let medium = &self.medium;
                [&medium.read_fails, &medium.write_fails, &medium.sync_fails][what]
                    .store(broken, Ordering::Relaxed);
            }
            Step::Mtu(mtu) => self
                .target
                .set_nic(SMALL, Some(NicInfo { mtu, ..nic(SMALL) })),
            Step::Link(there) => self.target.set_nic(SMALL, there.then(|| nic(SMALL))),
            Step::Order(freeze) => {
                let order = if freeze { Order::Freeze } else { Order::Thaw };
                let _ = self.target.volume().order(self.now, order, [1; 16]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn nothing_is_left_in_hand(steps in proptest::collection::vec(step(), 1..120)) {
        let mut bench = Bench::new();
        let mut tags = Vec::new();
        for step in steps {
            if let Step::Ask(_, tag, ..) = step {
                tags.push(tag);
            }
            bench.take(step);
        }
        for broken in 0..3 {
            bench.take(Step::Break(broken, false));
        }
        bench.take(Step::Order(false));
        bench.take(Step::Link(true));
        bench.open();
        for _ in 0..200 {
            bench.take(Step::Pass(100));
        }
        prop_assert!(bench.target.is_idle());
        prop_assert!(bench.target.changes.is_empty());
        for from in [ALICE, BOB] {
            for tag in &tags {
                let bytes = bench.encode(SMALL, from, &Ask::identify().tag(*tag));
                let why = bench.offer(&bytes);
                prop_assert!(why.is_none(), "{tag}: {why:?}");
            }
        }
    }
}
