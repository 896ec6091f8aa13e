//! Who is remembered, for how long, and what of it concerns others: nothing.

use super::*;

const SMALL: NicId = NicId(0);
const OTHER: NicId = NicId(1);
const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xA]);
const B: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xB]);

const COUNTING: Wish = Wish::On(Extension::TagIncBe);
const CRC: Wish = Wish::On(Extension::Crc8x4);

fn many(n: usize) -> MacAddr {
    let [.., high, low] = n.to_be_bytes();
    MacAddr([2, 1, 0, 0, high, low])
}

fn tag(n: u32) -> [u8; 4] {
    n.to_be_bytes()
}

/// Sessions in which A has this on.
fn with(now: Instant, wish: Wish) -> (Sessions, SessionId) {
    let mut sessions = Sessions::default();
    assert!(sessions.grant(now, SMALL, A, wish));
    let id = sessions.hear(now, SMALL, A).unwrap();
    (sessions, id)
}

#[test]
fn what_one_has_on_is_its_own_on_that_nic() {
    let now = Instant::now();
    let (mut sessions, _) = with(now, CRC);
    assert!(sessions.extensions(SMALL, A).crc8x4);
    for (nic, mac) in [(SMALL, B), (OTHER, A)] {
        assert_eq!(sessions.extensions(nic, mac), Extensions::default());
        assert_eq!(sessions.hear(now, nic, mac), None);
    }
    // On two NICs it is two.
    assert!(sessions.grant(now, OTHER, A, COUNTING));
    assert_eq!(sessions.len(), 2);
    assert_eq!(sessions.extensions(SMALL, A).tags, Tags::Opaque);
    assert!(sessions.grant(now, OTHER, A, Wish::Reset));
    assert!(sessions.extensions(SMALL, A).crc8x4);
}

#[test]
fn only_those_with_something_on_are_remembered() {
    let now = Instant::now();
    let mut sessions = Sessions::default();
    for wish in [
        Wish::Reset,
        Wish::Off(Extension::Crc8x4),
        Wish::Off(Extension::TagIncLe),
    ] {
        assert!(sessions.grant(now, SMALL, A, wish));
        assert!(sessions.is_empty());
    }
    let all = [
        Extension::TagIncLe,
        Extension::TagIncBe,
        Extension::TagRandom,
        Extension::CoalescedRead,
        Extension::Crc8x4,
    ];
    for extension in all {
        assert!(sessions.grant(now, SMALL, A, Wish::On(extension)));
        assert_eq!(sessions.len(), 1);
        assert!(sessions.grant(now, SMALL, A, Wish::Off(extension)));
        assert!(sessions.is_empty(), "{extension:?}");
    }
    assert!(sessions.grant(now, SMALL, A, Wish::Congestion(1)));
    assert_eq!(sessions.len(), 1);
    assert!(sessions.grant(now, SMALL, A, Wish::Reset));
    assert!(sessions.is_empty());
    // Off is of the one that is on.
    assert!(sessions.grant(now, SMALL, A, COUNTING));
    let other = Wish::Off(Extension::TagIncLe);
    assert!(sessions.grant(now, SMALL, A, other));
    assert_eq!(sessions.extensions(SMALL, A).tags, Tags::CountBe);
}

#[test]
fn more_than_can_be_remembered_are_not() {
    let start = Instant::now();
    let mut sessions = Sessions::default();
    for n in 0..SESSIONS_MAX {
        assert!(sessions.grant(start, SMALL, many(n), CRC));
        let id = sessions.hear(start, SMALL, many(n)).unwrap();
        sessions.uses(id);
    }
    let now = start + SILENCE_MAX - Duration::from_millis(1);
    assert!(!sessions.has_room(now, SMALL, A));
    assert!(!sessions.grant(now, SMALL, A, CRC));
    assert_eq!(sessions.extensions(SMALL, A), Extensions::default());
    // Nothing on is no matter of room, and who is remembered may have more.
    assert!(sessions.grant(now, SMALL, A, Wish::Reset));
    assert!(sessions.has_room(now, SMALL, many(7)));
    assert!(sessions.grant(now, SMALL, many(7), COUNTING));
    // Half of them are heard; an hour later the others are gone.
    for n in 0..SESSIONS_MAX / 2 {
        assert!(sessions.hear(now, SMALL, many(n)).is_some());
    }
    let now = start + SILENCE_MAX;
    assert!(sessions.has_room(now, SMALL, A));
    assert!(sessions.grant(now, SMALL, A, CRC));
    assert!(sessions.extensions(SMALL, A).crc8x4);
    for n in 0..SESSIONS_MAX / 2 {
        assert!(sessions.extensions(SMALL, many(n)).crc8x4, "{n}");
    }
    // Places are used again.
    for n in 0..10 * SESSIONS_MAX {
        sessions.grant(now, OTHER, many(n), CRC);
        sessions.grant(now, OTHER, many(n), Wish::Reset);
    }
    assert!(sessions.slots.len() <= SESSIONS_MAX);
}

#[test]
fn hosts_that_never_sent_an_ata_request_give_way_to_newcomers() {
    let now = Instant::now();
    let (mut sessions, id) = with(now, CRC);
    sessions.uses(id);
    for n in 0..5 * SESSIONS_MAX {
        assert!(sessions.has_room(now, SMALL, many(n)));
        assert!(sessions.grant(now, SMALL, many(n), CRC), "{n}");
        assert!(sessions.len() <= SESSIONS_MAX);
    }
    // One that negotiates now has its place until it has sent its first request,
    // since those before it go first.
    assert!(sessions.grant(now, SMALL, B, COUNTING));
    for n in 0..SESSIONS_MAX - 2 {
        assert!(sessions.grant(now, OTHER, many(n), CRC), "{n}");
    }
    let id = sessions.hear(now, SMALL, B).unwrap();
    sessions.uses(id);
    for n in 0..2 * SESSIONS_MAX {
        assert!(sessions.grant(now, SMALL, many(n), CRC), "{n}");
    }
    assert_eq!(sessions.extensions(SMALL, B).tags, Tags::CountBe);
    assert!(sessions.extensions(SMALL, A).crc8x4);
    // More of the same initiator is no matter of places.
    assert!(sessions.grant(now, SMALL, B, CRC));
    assert_eq!(sessions.extensions(SMALL, B).tags, Tags::CountBe);
}

#[test]
fn who_is_silent_for_an_hour_is_a_stranger() {
    let mut now = Instant::now();
    let (mut sessions, _) = with(now, CRC);
    for _ in 0..3 {
        now += SILENCE_MAX - Duration::from_millis(1);
        assert!(sessions.hear(now, SMALL, A).is_some());
    }
    now += SILENCE_MAX;
    assert_eq!(sessions.hear(now, SMALL, A), None);
    assert!(sessions.is_empty());
}

#[test]
fn a_write_is_done_once() {
    let now = Instant::now();
    let (mut sessions, id) = with(now, COUNTING);
    let fresh = sessions.begin(id, tag(5), true);
    assert!(matches!(fresh, Begun::Fresh(_)));
    // Refused or failed, it was not marked, and is as new.
    assert_eq!(sessions.begin(id, tag(5), true), fresh);
    sessions.mark(id, tag(5));
    assert_eq!(sessions.begin(id, tag(5), true), Begun::Done);
    // A read with its tag is another matter.
    assert_eq!(sessions.begin(id, tag(5), false), fresh);
    assert_eq!(sessions.begin(id, [0; 4], true), Begun::Untracked);
}

#[test]
fn what_is_in_hand_is_not_begun_again() {
    let now = Instant::now();
    for wish in [
        COUNTING,
        Wish::On(Extension::TagIncLe),
        Wish::On(Extension::TagRandom),
    ] {
        let (mut sessions, id) = with(now, wish);
        let [five, six] = match wish {
            Wish::On(Extension::TagIncLe) => [5u32, 6].map(u32::to_le_bytes),
            _ => [5, 6].map(tag),
        };
        let Begun::Fresh(life) = sessions.begin(id, five, true) else {
            panic!("{wish:?}")
        };
        sessions.hold(id, five);
        assert_eq!(sessions.begin(id, five, true), Begun::InHand);
        assert_eq!(sessions.begin(id, five, false), Begun::InHand);
        assert_eq!(sessions.begin(id, six, true), Begun::Fresh(life));
        assert!(sessions.end(SMALL, A, life, five, false));
        assert_eq!(sessions.begin(id, five, true), Begun::Fresh(life));
        sessions.hold(id, five);
        assert!(sessions.end(SMALL, A, life, five, true));
        let after = sessions.begin(id, five, true);
        // Unique tags are known only as long as they are in hand.
        let expected = match wish {
            Wish::On(Extension::TagRandom) => Begun::Fresh(life),
            _ => Begun::Done,
        };
        assert_eq!(after, expected);
    }
}

#[test]
fn little_endian_tags_count_as_such() {
    let now = Instant::now();
    let (mut sessions, id) = with(now, Wish::On(Extension::TagIncLe));
    // Big endian, each of these would be far from the one before.
    for n in 1..300u32 {
        let tag = n.to_le_bytes();
        assert!(matches!(sessions.begin(id, tag, true), Begun::Fresh(_)));
        sessions.mark(id, tag);
    }
    for n in 1..300u32 {
        assert_eq!(sessions.begin(id, n.to_le_bytes(), true), Begun::Done);
    }
}

#[test]
fn an_initiator_that_counts_anew_has_no_past() {
    let now = Instant::now();
    let (mut sessions, id) = with(now, COUNTING);
    let Begun::Fresh(before) = sessions.begin(id, tag(0x4000_0005), true) else {
        panic!()
    };
    sessions.mark(id, tag(0x4000_0005));
    sessions.hold(id, tag(0x4000_0005));
    // It was started again: its tags begin far away, and later come to where
    // they were.
    assert!(matches!(sessions.begin(id, tag(7), true), Begun::Fresh(_)));
    let again = sessions.begin(id, tag(0x4000_0005), true);
    assert!(matches!(again, Begun::Fresh(_)), "{again:?}");
    // Or it negotiates.
    for anew in [tag(7), tag(8)] {
        if anew == tag(8) {
            assert!(sessions.grant(now, SMALL, A, COUNTING));
        }
        let Begun::Fresh(life) = sessions.begin(id, anew, true) else {
            panic!()
        };
        assert_ne!(life, before);
        // What was in hand may not be answered, or marked, any more.
        assert!(!sessions.end(SMALL, A, before, tag(0x4000_0005), true));
        assert_eq!(sessions.begin(id, anew, true), Begun::Fresh(life));
    }
    // Who does not want its tags watched any more gets its answers.
    assert!(sessions.grant(now, SMALL, A, CRC));
    assert!(sessions.grant(now, SMALL, A, Wish::Off(Extension::TagIncBe)));
    assert!(sessions.end(SMALL, A, before, tag(0x4000_0005), true));
    assert!(sessions.grant(now, SMALL, A, Wish::Reset));
    assert!(sessions.end(SMALL, A, before, tag(0x4000_0005), true));
    // Equal tags of one who takes its place are another's.
    assert!(sessions.grant(now, SMALL, B, COUNTING));
    assert!(sessions.end(SMALL, A, before, tag(7), true));
    let id = sessions.hear(now, SMALL, B).unwrap();
    assert!(matches!(sessions.begin(id, tag(7), true), Begun::Fresh(_)));
}

#[test]
fn damage_is_told_once_a_second() {
    let start = Instant::now();
    let (mut sessions, id) = with(start, CRC);
    assert_eq!(sessions.damaged(start, id), Some(1));
    for n in 1..1000 {
        let now = start + Duration::from_millis(n);
        assert_eq!(sessions.damaged(now, id), None);
    }
    let later = start + Duration::from_secs(1);
    assert_eq!(sessions.damaged(later, id), Some(1000));
}

#[test]
fn who_negotiates_again_and_again_does_not_fill_the_log() {
    let start = Instant::now();
    let mut sessions = Sessions::default();
    for second in 0..3 {
        let now = start + Duration::from_secs(second);
        let told = (0..100).filter(|n| {
            assert!(sessions.grant(now, SMALL, many(*n), CRC));
            let id = sessions.hear(now, SMALL, many(*n)).unwrap();
            let told = sessions.damaged(now, id);
            assert!(sessions.grant(now, SMALL, many(*n), Wish::Reset));
            told.is_some()
        });
        assert_eq!(told.count(), DAMAGE_LINES_MAX as usize);
    }
}

#[test]
fn congestion_slows_its_sender_alone() {
    let now = Instant::now();
    let (mut sessions, id) = with(now, CRC);
    assert!(sessions.grant(now, SMALL, B, CRC));
    for number in 0..20 {
        assert!(sessions.grant(now, SMALL, A, Wish::Congestion(number)));
    }
    let waits = (0..100).filter_map(|_| sessions.due(now, id, 1000)).count();
    assert!(waits > 90, "{waits}");
    for _ in 0..1000 {
        assert_eq!(sessions.due_to(now, SMALL, B, 1000), None);
        assert_eq!(sessions.due_to(now, OTHER, A, 1000), None);
    }
    // All off is without a limit, too.
    assert!(sessions.grant(now, SMALL, A, Wish::Reset));
    assert_eq!(sessions.due_to(now, SMALL, A, 1000), None);
}
