//! How initiators ask for extensions: a command, and MAC Mask; what is granted,
//! to whom, and until when.

use super::*;
use crate::session::{Extensions, SESSIONS_MAX, SILENCE_MAX, Tags};
use initiator::frame::Directive;
use proptest::prelude::*;

const ALL: [&str; 6] = [
    "reset",
    "tag_inc_le",
    "tag_inc_be",
    "tag_random",
    "coalesced_read",
    "crc8x4",
];

impl Bench {
    /// What a host has on.
    fn has(&self, nic: NicId, from: u8) -> Extensions {
        self.target.sessions.extensions(nic, host(from))
    }

    /// Asks for extensions through their command; what the answer says.
    pub(super) fn extend(&mut self, nic: NicId, from: u8, names: &[&str]) -> Vec<String> {
        let reply = self.ask_from(nic, from, &Ask::extensions(names));
        assert_eq!(reply.error(), None, "{reply:?}");
        reply.extensions().unwrap()
    }

    /// Asks through MAC Mask; MError and count of the answer.
    fn direct(&mut self, from: u8, directives: &[Directive]) -> (u8, u8) {
        let reply = self.ask_from(SMALL, from, &Ask::mask_edit(directives));
        let mask = reply.mask().unwrap();
        assert_eq!(reply.error(), None, "{reply:?}");
        (mask.error, mask.count)
    }

    fn sectors_told(&mut self, nic: NicId, from: u8) -> u8 {
        let reply = self.ask_from(nic, from, &Ask::config(0, b""));
        reply.config().unwrap().sectors
    }
}

fn on(name: &str) -> Directive {
    Directive::extension_on(name)
}

fn off(name: &str) -> Directive {
    Directive::extension_off(name)
}

#[test]
fn the_answer_says_what_is_on() {
    let mut bench = Bench::new();
    let said = bench.extend(
        SMALL,
        ALICE,
        &["reset", "crc8x4", "turbo", "CRC8X4", "Reset"],
    );
    assert_eq!(said, ["RESET", "CRC8X4", "turbo", "CRC8X4", "Reset"]);
    let crc = Extensions {
        crc8x4: true,
        ..Extensions::default()
    };
    assert_eq!(bench.has(SMALL, ALICE), crc);
    assert_eq!(bench.has(JUMBO, ALICE), Extensions::default());
    assert_eq!(bench.has(SMALL, BOB), Extensions::default());
    // Each of them alone, in order; the last way to count is the one.
    let upper: Vec<String> = ALL.map(str::to_uppercase).into();
    assert_eq!(bench.extend(SMALL, BOB, &ALL), upper);
    let everything = Extensions {
        tags: Tags::Unique,
        coalesced_read: true,
        crc8x4: true,
        congestion: false,
    };
    assert_eq!(bench.has(SMALL, BOB), everything);
    assert_eq!(
        bench.extend(SMALL, BOB, &["congestion", "17"]),
        ["CONGESTION", "17"]
    );
    assert!(bench.has(SMALL, BOB).congestion);
    assert_eq!(bench.extend(SMALL, BOB, &["reset"]), ["RESET"]);
    assert_eq!(bench.has(SMALL, BOB), Extensions::default());
    assert_eq!(bench.has(SMALL, ALICE), crc);
    assert_eq!(bench.extend(SMALL, ALICE, &[]), Vec::<String>::new());
    // Nobody is asked to save it.
    assert_eq!(bench.saved(), None);
}

#[test]
fn the_whole_frame_comes_back() {
    let mut bench = Bench::new();
    let ask = Ask::extensions(&["crc8x4", "what"]).trailing(&[0xEE; 900]);
    let request = bench.encode(SMALL, ALICE, &ask);
    let Got::Reply(reply) = bench.hand(SMALL, &request) else {
        panic!()
    };
    let mut expected = request[24..].to_vec();
    expected[2..8].copy_from_slice(b"CRC8X4");
    same(reply.body(), &expected);
    // Longer than the room for heads.
    let names = vec!["tag_inc_le"; 800];
    let request = bench.encode(JUMBO, ALICE, &Ask::extensions(&names));
    let Got::Reply(reply) = bench.hand(JUMBO, &request) else {
        panic!()
    };
    same(&reply.body()[..2], &request[24..26]);
    same(&reply.body()[2..], &request[26..].to_ascii_uppercase());
    assert_eq!(bench.has(JUMBO, ALICE).tags, Tags::CountLe);
    // A request to all exports is answered by each.
    let everywhere = Ask::extensions(&["reset"]).shelf(0xFFFF).slot(0xFF);
    assert_eq!(bench.ask(&everywhere).extensions().unwrap(), ["RESET"]);
}

#[test]
fn fifteen_hundred_bytes_of_strings_are_borne() {
    let mut bench = Bench::new();
    let room = 1514 - 26;
    for text in [
        &b"crc8x4\0"[..],
        b"reset\0crc8x4\0",
        b"x\0",
        b"congestion\x001\0",
    ] {
        let mut strings: Vec<u8> = text.iter().copied().cycle().take(room - 2).collect();
        strings.extend([0, 0]);
        let length = strings.len() as u16;
        let reply = bench.ask(&Ask::extensions_raw(length, &strings));
        assert_eq!(reply.bytes().len(), 1514);
    }
    // No end at all.
    for strings in [vec![b'x'; room], vec![1; room]] {
        let ask = Ask::extensions_raw(room as u16, &strings);
        assert_eq!(bench.dropped(SMALL, ALICE, &ask), Dropped::Silence);
    }
    // Nothing but ends is an empty list.
    let reply = bench.ask(&Ask::extensions_raw(room as u16, &vec![0; room]));
    assert_eq!(reply.extensions().unwrap(), Vec::<String>::new());
}

#[test]
fn wrong_lengths_and_ends_are_met_with_silence() {
    let mut bench = Bench::new();
    let strings = b"crc8x4\0\0";
    for length in [0, 1, 2, 6, 7, 9, 0x0800, 0xFFFF] {
        let ask = Ask::extensions_raw(length, strings);
        let why = bench.dropped(SMALL, ALICE, &ask);
        assert_eq!(why, Dropped::Silence, "{length}");
    }
    for bad in [&b"crc8x4\0"[..], b"crc8x4", b"crc8x4\0x", b"\0", b""] {
        let ask = Ask::extensions_raw(bad.len() as u16, bad);
        assert_eq!(bench.dropped(SMALL, ALICE, &ask), Dropped::Silence);
    }
    for len in 24..26 {
        let ask = Ask::extensions(&["crc8x4"]).length(len);
        assert_eq!(bench.dropped(SMALL, ALICE, &ask), Dropped::Short);
    }
    assert_eq!(bench.has(SMALL, ALICE), Extensions::default());
    assert_eq!(
        bench
            .ask(&Ask::extensions_raw(8, strings))
            .extensions()
            .unwrap(),
        ["CRC8X4"]
    );
}

#[test]
fn masks_are_the_other_door() {
    let mut bench = Bench::new();
    let all = ["crc8x4", "coalrd", "tag-le", "tag-be"].map(on);
    assert_eq!(bench.direct(ALICE, &all), (0, 0));
    let expected = Extensions {
        tags: Tags::CountBe,
        coalesced_read: true,
        crc8x4: true,
        congestion: false,
    };
    assert_eq!(bench.has(SMALL, ALICE), expected);
    assert_eq!(bench.direct(ALICE, &[off("coalrd"), off("tag-le")]), (0, 0));
    assert_eq!(bench.has(SMALL, ALICE).tags, Tags::CountBe);
    assert!(!bench.has(SMALL, ALICE).coalesced_read);
    // In order, up to the first that is bad; those before it stay.
    let some = [on("reset"), on("tag-rn"), on("nobody"), on("crc8x4")];
    assert_eq!(bench.direct(ALICE, &some), (2, 2));
    let expected = Extensions {
        tags: Tags::Unique,
        ..Extensions::default()
    };
    assert_eq!(bench.has(SMALL, ALICE), expected);
    for bad in ["", "CRC8X4", "crc8x", "tag_le", "conges"] {
        assert_eq!(bench.direct(ALICE, &[on(bad)]), (2, 0), "{bad}");
    }
    assert_eq!(bench.direct(ALICE, &[off("reset")]), (0, 0));
    assert_eq!(bench.has(SMALL, ALICE), Extensions::default());
    // The MAC lists are no part of it.
    assert_eq!((bench.saved(), bench.target.state.masks.len()), (None, 0));
}

#[test]
fn masks_that_may_not_be_edited_leave_extensions_open() {
    let mut settings = settings();
    settings.policy.deny_mask = true;
    let mut bench = Bench::with(settings);
    assert_eq!(bench.direct(ALICE, &[on("crc8x4")]), (0, 0));
    assert!(bench.has(SMALL, ALICE).crc8x4);
    assert_eq!(bench.direct(ALICE, &[on("nobody")]), (2, 0));
    // With a change of the list the frame is refused, all of it.
    let mixed = [on("coalrd"), Directive::add(host(ALICE))];
    let reply = bench.ask(&Ask::mask_edit(&mixed));
    assert_eq!(reply.error(), Some(2));
    assert!(!bench.has(SMALL, ALICE).coalesced_read);
    assert_eq!(bench.ask(&Ask::mask_edit(&[])).error(), Some(2));
}

#[test]
fn with_a_change_of_the_list_they_wait_for_it() {
    let mut bench = Bench::new();
    bench.shut();
    let mixed = [on("crc8x4"), Directive::add(host(ALICE))];
    let got = bench.send(SMALL, ALICE, &Ask::mask_edit(&mixed));
    assert!(matches!(got, Got::Parked), "{got:?}");
    assert!(!bench.has(SMALL, ALICE).crc8x4);
    // Those alone do not.
    let got = bench.send(SMALL, ALICE, &Ask::mask_edit(&[on("coalrd")]));
    assert!(matches!(got, Got::Reply(_)), "{got:?}");
    assert!(bench.has(SMALL, ALICE).coalesced_read);
    assert_eq!(bench.extend(SMALL, BOB, &["crc8x4"]), ["CRC8X4"]);
    bench.open();
    let replies = bench.pump();
    assert_eq!(replies[0].1.mask().unwrap().list, [host(ALICE)]);
    let both = bench.has(SMALL, ALICE);
    assert!(both.crc8x4 && both.coalesced_read);
}

#[test]
fn what_cannot_be_saved_has_no_effect() {
    let mut bench = Bench::forgetful(settings());
    let mixed = [on("crc8x4"), Directive::add(host(ALICE))];
    assert_eq!(bench.ask(&Ask::mask_edit(&mixed)).error(), Some(2));
    assert_eq!(bench.has(SMALL, ALICE), Extensions::default());
    bench.extend(SMALL, ALICE, &["crc8x4"]);
    assert_eq!(bench.ask(&Ask::config(4, b"x")).error(), Some(2));
    assert!(bench.has(SMALL, ALICE).crc8x4);
}

#[test]
fn a_list_that_cannot_be_told_refuses_the_frame() {
    let mut bench = Bench::new();
    let many: Vec<Directive> = (1..=200).map(|n| Directive::add(host(n))).collect();
    let reply = bench.ask_from(JUMBO, ALICE, &Ask::mask_edit(&many));
    assert_eq!(reply.mask().unwrap().count, 200);
    let reply = bench.ask(&Ask::mask_edit(&[on("crc8x4")]));
    assert_eq!(reply.error(), Some(2));
    assert_eq!(bench.has(SMALL, ALICE), Extensions::default());
}

#[test]
fn setting_the_config_string_resets_its_asker() {
    let mut bench = Bench::new();
    let sets = [
        Ask::config(3, b"one"),
        // Nothing changes, and it succeeds all the same.
        Ask::config(3, b"one"),
        Ask::config(4, b"one"),
        Ask::config(4, b"two"),
    ];
    for set in sets {
        for from in [ALICE, BOB] {
            bench.extend(SMALL, from, &["crc8x4", "tag_inc_be"]);
        }
        bench.extend(JUMBO, ALICE, &["crc8x4"]);
        let reply = bench.ask(&set);
        assert_eq!(reply.error(), None);
        // The answer itself is to one who has nothing on.
        assert_eq!(reply.config().unwrap().sectors, 2);
        assert_eq!(bench.has(SMALL, ALICE), Extensions::default());
        assert!(bench.has(SMALL, BOB).crc8x4 && bench.has(JUMBO, ALICE).crc8x4);
    }
    let others = [
        Ask::config(0, b""),
        Ask::config(1, b"two"),
        Ask::config(2, b"t"),
        Ask::config_replace(b"two", b"three"),
        Ask::config(3, b"taken already"),
        Ask::config(9, b""),
        Ask::config_raw(4, 999, b"short"),
    ];
    bench.extend(SMALL, ALICE, &["crc8x4"]);
    for ask in others {
        bench.ask(&ask);
        assert!(bench.has(SMALL, ALICE).crc8x4, "{ask:?}");
    }
}

#[test]
fn each_asker_is_told_its_own_sectors() {
    let mut bench = Bench::new();
    // With 4 bytes less two sectors do not fit.
    let info = NicInfo {
        mtu: 1060,
        ..nic(SMALL)
    };
    bench.target.set_nic(SMALL, Some(info));
    assert_eq!(bench.sectors_told(SMALL, ALICE), 2);
    bench.extend(SMALL, ALICE, &["crc8x4"]);
    assert_eq!(bench.sectors_told(SMALL, ALICE), 1);
    assert_eq!(bench.sectors_told(SMALL, BOB), 2);
    assert_eq!(bench.sectors_told(JUMBO, ALICE), 17);
    // More than it was told is refused to it, and to no one else.
    for ask in [Ask::read(0, 2), Ask::write(0, &sectors(1, 2))] {
        assert_eq!(bench.ask(&ask).error(), Some(2));
        assert_eq!(bench.ask_from(SMALL, BOB, &ask).error(), None);
    }
    assert_eq!(bench.ask(&Ask::read(0, 1)).error(), None);
    // Where one sector is all there is it stays one.
    let info = NicInfo { mtu: 548, ..info };
    bench.target.set_nic(SMALL, Some(info));
    assert_eq!(bench.sectors_told(SMALL, ALICE), 1);
    bench.ask(&Ask::read(0, 1));
    bench.ask(&Ask::identify());
}

#[test]
fn when_no_more_can_be_remembered_wishes_stay_small() {
    let mut bench = Bench::new();
    let now = bench.now;
    for n in 0..SESSIONS_MAX {
        let mac = MacAddr([2, 7, 0, 0, (n >> 8) as u8, n as u8]);
        let wish = crate::wire::extensions::Wish::On(crate::wire::extensions::Extension::Crc8x4);
        assert!(bench.target.sessions.grant(now, SMALL, mac, wish));
        let id = bench.target.sessions.hear(now, SMALL, mac).unwrap();
        bench.target.sessions.uses(id);
    }
    let said = bench.extend(SMALL, ALICE, &["reset", "crc8x4", "congestion", "1"]);
    assert_eq!(said, ["RESET", "crc8x4", "congestion", "1"]);
    assert_eq!(bench.direct(ALICE, &[on("reset"), on("crc8x4")]), (3, 1));
    assert_eq!(bench.has(SMALL, ALICE), Extensions::default());
    bench.now += SILENCE_MAX;
    assert_eq!(bench.extend(SMALL, ALICE, &["crc8x4"]), ["CRC8X4"]);
    assert_eq!(bench.direct(BOB, &[on("crc8x4")]), (0, 0));
}

#[test]
fn random_addresses_keep_no_newcomer_out() {
    let mut bench = Bench::new();
    let negotiate = |bench: &mut Bench| {
        for n in 0..SESSIONS_MAX as u32 + 10 {
            let [_, _, high, low] = n.to_be_bytes();
            let bytes = bench.encode(SMALL, ALICE, &Ask::extensions(&["crc8x4"]));
            let source = [2, 7, 0, 0, high, low];
            let bytes = [&bytes[..6], &source, &bytes[12..]].concat();
            assert!(matches!(bench.hand(SMALL, &bytes), Got::Reply(_)));
        }
    };
    negotiate(&mut bench);
    // Through both doors.
    assert_eq!(bench.extend(SMALL, ALICE, &["crc8x4"]), ["CRC8X4"]);
    assert_eq!(bench.direct(BOB, &[on("crc8x4")]), (0, 0));
    // They are in use now, and keep their places; Config is no use.
    bench.ask(&Ask::read(0, 1));
    bench.ask_from(SMALL, BOB, &Ask::identify());
    bench.extend(SMALL, CAROL, &["crc8x4"]);
    bench.ask_from(SMALL, CAROL, &Ask::config(0, b""));
    negotiate(&mut bench);
    assert!(bench.has(SMALL, ALICE).crc8x4 && bench.has(SMALL, BOB).crc8x4);
    assert!(!bench.has(SMALL, CAROL).crc8x4);
}

#[test]
fn an_hour_of_silence_ends_it() {
    let mut bench = Bench::new();
    bench.extend(SMALL, ALICE, &["crc8x4"]);
    for _ in 0..3 {
        bench.now += SILENCE_MAX - Duration::from_secs(1);
        // Any frame is a sign of life.
        assert_eq!(bench.ask(&Ask::read(0, 1)).bytes().len(), 36 + 512 + 4);
    }
    bench.now += SILENCE_MAX;
    assert_eq!(bench.ask(&Ask::read(0, 1)).bytes().len(), 36 + 512);
}

#[test]
fn advertisements_to_one_host_tell_its_own_sectors() {
    let mut bench = Bench::new();
    let info = NicInfo {
        mtu: 1060,
        ..nic(SMALL)
    };
    bench.target.set_nic(SMALL, Some(info));
    bench.extend(SMALL, ALICE, &["crc8x4"]);
    let told = |bench: &Bench, to| {
        let mut head = vec![0; HEAD_MAX];
        bench.target.advertise(SMALL, to, &mut head).unwrap();
        head[28]
    };
    assert_eq!(told(&bench, MacAddr::BROADCAST), 2);
    assert_eq!(told(&bench, host(ALICE)), 1);
    assert_eq!(told(&bench, host(BOB)), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever comes through either door, only what it names is changed, and
    /// the answer keeps the rules (the bench holds it against them).
    #[test]
    fn no_frame_at_the_doors_can_harm(
        words in proptest::collection::vec((0usize..12, proptest::collection::vec(any::<u8>(), 0..9)), 0..40),
        length in prop_oneof![3 => Just(None), 1 => any::<u16>().prop_map(Some)],
        cut in prop_oneof![3 => Just(usize::MAX), 1 => 24usize..1514],
        jumbo: bool,
        count: u8,
    ) {
        let mut bench = Bench::new();
        bench.extend(SMALL, BOB, &["crc8x4"]);
        let mut strings = Vec::new();
        let mut directives = Vec::new();
        for (which, noise) in &words {
            let name = ALL.get(*which).map_or(&noise[..], |name| name.as_bytes());
            strings.extend_from_slice(name);
            strings.push(0);
            let short = noise.iter().copied().chain([0; 6]).take(6);
            directives.extend([0, *which as u8 % 6]);
            match ["crc8x4", "coalrd", "tag-le", "reset\0"].get(*which % 7) {
                Some(name) => directives.extend(name.bytes()),
                None => directives.extend(short),
            }
        }
        strings.push(0);
        let nic = if jumbo { JUMBO } else { SMALL };
        let length = length.unwrap_or(strings.len() as u16);
        for ask in [
            Ask::extensions_raw(length, &strings),
            Ask::mask_raw(1, words.len() as u8, &directives),
            Ask::mask_raw(1, count, &directives),
        ] {
            let mut bytes = bench.encode(nic, ALICE, &ask);
            bytes.truncate(cut.max(24));
            bench.hand(nic, &bytes);
            bench.pump();
            // Nobody is let in that cannot get out again.
            bench.target.state.masks.clear();
            bench.has(nic, ALICE);
            prop_assert_eq!(bench.has(SMALL, BOB).crc8x4, true);
            prop_assert!(bench.target.sessions.len() <= 2);
        }
    }
}
