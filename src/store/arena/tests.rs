use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::sys::slots::watch;
use proptest::prelude::*;

const IMAGE: ImageId = ImageId {
    facts: Facts::File(shadow::FileFacts {
        inode: 2,
        birth: 3,
        device: 1,
        uuid: [4, 5],
        fsid: 6,
        kind: 7,
        bytes: 1 << 21,
    }),
    v1: V1Id {
        device: 1,
        inode: 2,
        birth: 3,
    },
    start: 4096,
    len: 1 << 20,
};

fn arena(dir: &Path) -> (PathBuf, Arena) {
    let path = dir.join("arena");
    let arena = Arena::create(&path, [7, 8], &IMAGE, 4096, 4).unwrap();
    (path, arena)
}

fn replayed(path: &Path) -> Vec<(u64, Vec<u8>)> {
    let mut list = Vec::new();
    let old = OldArena::look(path).unwrap();
    let take = |_, at, bytes: &[u8]| {
        list.push((at, bytes.to_vec()));
        Ok::<(), ()>(())
    };
    old.replay(take).unwrap();
    list
}

#[test]
fn what_counts_is_found_again_and_the_newest_wins() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut arena) = arena(dir.path());
    arena.write(0, 512, &[1; 1024]);
    arena.publish(0, 5, 3, 0b110, 0);
    arena.write(1, 0, &[2; 512]);
    arena.publish(1, 4, 3, 0b1, 0);
    arena.write(2, 3584, &[3; 512]);
    arena.publish(2, 6, 2, 0x80, 0);
    arena.publish(3, 9, 8, 0xFF, 0);
    arena.retire(3);
    arena.set_clocks(clocks(77, 1));
    drop(arena);
    let expected = [
        (2 * 4096 + 3584, vec![3; 512]),
        (3 * 4096 + 512, vec![1; 1024]),
    ];
    assert_eq!(replayed(&path), expected);
    let old = OldArena::open(&path).unwrap();
    let head = old.head;
    assert_eq!((head.boot, head.heartbeat), ([7, 8], 77));
    assert_eq!((head.start, head.len), (IMAGE.start, IMAGE.len));
    assert_eq!(head.origin, Origin::Facts(IMAGE.facts));
    assert_eq!((old.sectors(), old.end()), (3, 3 * 4096 + 1536));
}

#[test]
fn the_shadow_of_a_frozen_image_is_noted_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _arena) = arena(dir.path());
    let shadow = || Head::read(&path).unwrap().shadow;
    assert_eq!(shadow(), None);
    let place = NotePlace::open(&path).unwrap();
    let long = format!("/{}", "x".repeat(240));
    let longest = &long[..240];
    for (shadow_path, known) in [
        ("/a b", true),
        (longest, true),
        (&long, false),
        ("/c", true),
    ] {
        let note = ShadowNote::new([7; 16], Path::new(shadow_path));
        place.set(&note).unwrap();
        assert_eq!(shadow(), Some(note));
        let path = known.then(|| PathBuf::from(shadow_path));
        assert_eq!(shadow().unwrap().path(), path);
    }
    place.clear().unwrap();
    assert_eq!(shadow(), None);
}

#[test]
fn what_was_replayed_does_not_count_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut arena) = arena(dir.path());
    for (slot, sequence) in [(0, 7), (1, 5), (2, 6)] {
        arena.write(slot, 0, &[sequence; 512]);
        arena.publish(slot, sequence.into(), 3, 1, 0);
    }
    drop(arena);
    let mut old = OldArena::open(&path).unwrap();
    // Killed between any two stores: the newest version or none.
    let newest = [(3 * 4096, vec![7; 512])];
    let look = move || {
        let found = replayed(&path);
        assert!(found.is_empty() || found == newest, "{found:?}");
    };
    watch::each_store(look, || old.retire());
    assert_eq!(replayed(&dir.path().join("arena")), []);
}

#[test]
fn each_generation_has_a_version_of_its_own_and_the_older_comes_first() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut arena) = arena(dir.path());
    for (slot, generation, fill) in [(0, 8, 1), (1, 7, 2), (2, 7, 3)] {
        arena.write(slot, 0, &[fill; 512]);
        let sequence = [6, 4, 5][slot as usize];
        arena.publish(slot, sequence, 3, 1, generation);
    }
    drop(arena);
    let expected = [(3 * 4096, vec![3; 512]), (3 * 4096, vec![1; 512])];
    assert_eq!(replayed(&path), expected);
}

fn clocks(real: u64, offset: u64) -> Clocks {
    Clocks { real, offset }
}

#[test]
fn the_heartbeat_follows_the_clock_and_killed_within_it_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut arena) = arena(dir.path());
    let second = 1_000_000_000;
    let head = move || {
        let head = Head::read(&path).unwrap();
        (head.heartbeat, head.clock)
    };
    assert_eq!(head(), (0, Some(0)));
    let hour = 3600 * second;
    let mut last = (10 * second, 5 * second);
    arena.set_clocks(clocks(last.0, last.1));
    // Set forward, set back, far back; and not set, with the noise of two reads.
    for (real, offset) in [
        (hour + 11 * second, hour + 5 * second),
        (12 * second, 5 * second),
        (second, u64::MAX - 6 * second),
        (2 * second, u64::MAX - 6 * second + 70),
    ] {
        let (old, head) = (last, head.clone());
        let look = move || {
            let now = clocks(0, offset);
            match head() {
                (heartbeat, Some(clock)) if now.is_as_at(clock) => assert_eq!(heartbeat, real),
                (heartbeat, Some(clock)) if clocks(0, old.1).is_as_at(clock) => {
                    assert_eq!(heartbeat, old.0);
                }
                (_, clock) => assert_eq!(clock, Some(0)),
            }
        };
        if offset.abs_diff(old.1) > second {
            watch::each_store(look, || arena.set_clocks(clocks(real, offset)));
        } else {
            arena.set_clocks(clocks(real, offset));
        }
        last = (real, offset);
    }
    // Small drift is kept as well, so that it does not add up.
    assert_eq!(head(), (2 * second, Some(u64::MAX - 6 * second + 70)));
}

fn stamp(mtime: u64, looked: u64) -> Stamp {
    Stamp {
        mtime,
        ctime: mtime + 1,
        size: 512,
        looked,
    }
}

#[test]
fn writes_in_flight_and_stamps_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut arena) = arena(dir.path());
    let head = || Head::read(&path).unwrap();
    assert!(!head().in_flight && head().stamp.is_none() && head().created > 0);
    arena.set_stamp(Some(stamp(10, 1)));
    assert_eq!(head().stamp, Some(stamp(10, 1)));
    arena.write_begins(0, 512);
    assert!(head().in_flight && arena.is_writing());
    arena.writes_ended(Some(stamp(11, 2)));
    assert!(!head().in_flight && !arena.is_writing());
    // A device has none: what is known stays.
    arena.set_stamp(None);
    assert_eq!(head().stamp, Some(stamp(11, 2)));
    // The later look counts, of either process.
    shadow::stamp::tell(&path, &stamp(9, 3)).unwrap();
    assert_eq!(head().stamp, Some(stamp(9, 3)));
    arena.set_stamp(Some(stamp(12, 4)));
    assert_eq!(head().stamp, Some(stamp(12, 4)));
}

#[test]
fn killed_between_any_two_stores_the_times_are_old_or_a_write_is_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut arena) = arena(dir.path());
    arena.set_stamp(Some(stamp(10, 1)));
    let look = move || {
        let head = Head::read(&path).unwrap();
        let settled = [Some(stamp(10, 1)), Some(stamp(20, 2))];
        assert!(head.in_flight || settled.contains(&head.stamp), "{head:?}");
    };
    watch::each_store(look, || {
        arena.write_begins(0, 512);
        arena.writes_ended(Some(stamp(20, 2)));
    });
}

#[test]
fn a_living_process_keeps_its_arena() {
    let dir = tempfile::tempdir().unwrap();
    let (path, arena) = arena(dir.path());
    assert!(Head::is_live(&path));
    assert!(matches!(OldArena::open(&path), Err(ArenaTrouble::InUse)));
    drop(arena);
    assert!(!Head::is_live(&path));
    let _old = OldArena::open(&path).unwrap();
    assert!(matches!(OldArena::open(&path), Err(ArenaTrouble::InUse)));
}

#[test]
fn an_arena_is_for_the_eyes_of_its_user_and_no_link() {
    let dir = tempfile::tempdir().unwrap();
    let (path, arena) = arena(dir.path());
    drop(arena);
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    OldArena::open(&path).unwrap();
    assert_eq!(mode(), 0o600);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(
        OldArena::open(&link),
        Err(ArenaTrouble::OtherOwner)
    ));
}

#[test]
fn room_is_taken_in_steps_and_given_back() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().with_extension("steps");
    let blocks = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let slots = (3 * STEP / 4096) as u32 - 5;
    let mut arena = Arena::create(&path, [7, 8], &IMAGE, 4096, slots).unwrap();
    let step = STEP as u32 / 4096;
    assert!(arena.with_room().eq(std::iter::once(0..step)));
    assert!(blocks() < 2 * STEP as u64);
    assert_eq!(arena.grow(), Some(step..2 * step));
    assert_eq!(arena.grow(), Some(2 * step..slots));
    assert_eq!((arena.grow(), arena.usable()), (None, slots));
    assert!(blocks() > 2 * STEP as u64);
    arena.write(step, 0, &[1; 512]);
    assert!(arena.give_back(1) && !arena.give_back(1) && !arena.give_back(0));
    assert!(blocks() < 3 * STEP as u64);
    assert_eq!(arena.grow(), Some(step..2 * step));
    assert_eq!(arena.bytes(step, 0, 512), [0; 512]);
    // As after a step for which the filesystem had no space.
    arena.is_full = true;
    assert!(arena.grow().is_none() && !arena.give_back(0));
    assert!(arena.grow().is_none() && arena.give_back(1));
    assert_eq!(arena.usable(), slots);
    assert_eq!(arena.grow(), Some(step..2 * step));
    arena.remove().unwrap();
    // Sparse as it is, it can be opened.
    let mut arena = Arena::create(&path, [7, 8], &IMAGE, 4096, slots).unwrap();
    arena.write(1, 0, &[5; 512]);
    arena.publish(1, 1, 3, 1, 0);
    drop(arena);
    assert_eq!(replayed(&path), [(3 * 4096, vec![5; 512])]);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn what_a_device_held_is_known_until_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut arena) = arena(dir.path());
    let len = IMAGE.len;
    arena.set_content(len, content::pieces(IMAGE.start, len).map(|(n, _)| (n, 7)));
    // Written; dirty in the arena; nothing known.
    arena.write_begins(IMAGE.start + 8192 + 512, 512);
    arena.publish(0, 1, 2, 1, 0);
    drop(arena);
    let old = OldArena::open(&path).unwrap();
    let known: Vec<_> = old.content().collect();
    assert_eq!(known.len() as u64, len / 4096 - 2);
    assert!(
        known
            .iter()
            .all(|(_, bytes, sum)| (*bytes, *sum) == (4096, 7))
    );
    let has = |at| known.iter().any(|(offset, ..)| *offset == at);
    assert!(has(IMAGE.start) && !has(IMAGE.start + 8192) && !has(2 * 4096));
}

/// An arena as aoede 0.1.0 wrote it, of this image, with one dirty sector.
fn v1_arena(path: &Path) {
    let mut words = vec![0u64; V1_WORDS];
    words[..10].copy_from_slice(&[ARENA_MAGIC, 1 | 4096 << 32, 2, 7, 8, 1, 2, 3, 4096, 1 << 20]);
    words[10] = checksum(&words[..10]);
    words[11] = 99;
    words[64..68].copy_from_slice(&[5, 3, 0b10, 0]);
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(file_len(V1_WORDS, 4096, 2), 0);
    let slots = file_len(V1_WORDS, 4096, 0);
    bytes[slots + 512..slots + 1024].fill(9);
    std::fs::write(path, bytes).unwrap();
}

const V1_WORDS: usize = 64 + 8 * 2;

#[test]
fn an_arena_of_0_1_0_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v1.arena");
    v1_arena(&path);
    let old = OldArena::open(&path).unwrap();
    let head = old.head;
    assert_eq!((head.boot, head.heartbeat, head.created), ([7, 8], 99, 0));
    assert!(head.in_flight && head.stamp.is_none() && old.content().next().is_none());
    assert_eq!(head.origin.compare(&IMAGE, true), shadow::Verdict::Same);
    old.note_replay(clocks(100, 7)).unwrap();
    drop(old);
    assert_eq!(replayed(&path), [(3 * 4096 + 512, vec![9; 512])]);
    assert_eq!(Head::read(&path).unwrap().heartbeat, 100);
    OldArena::open(&path).unwrap().retire();
    assert_eq!(OldArena::open(&path).unwrap().sectors(), 0);
}

#[test]
fn one_cannot_be_made_where_a_file_is() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _arena) = arena(dir.path());
    assert!(Arena::create(&path, [7, 8], &IMAGE, 4096, 4).is_err());
    assert!(path.exists());
}

#[test]
fn damage_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut arena) = arena(dir.path());
    arena.publish(0, 1, 3, 1, 0);
    drop(arena);
    let good = std::fs::read(&path).unwrap();
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        OldArena::open(&path).map(drop).map_err(|e| e.to_string())
    };
    assert_eq!(open(&good), Ok(()));
    for at in 0..19 * 8 {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(open(&bad).is_err(), "byte {at}");
    }
    for len in [0, 100, 4096, good.len() - 1] {
        assert!(open(&good[..len]).is_err(), "{len} bytes");
    }
    let header = HEADERS * 8;
    for (word, value) in [
        (1, u64::MAX),
        (1, 0),
        (1, 5000),
        (1, u64::MAX / 4096),
        (2, 0),
        (2, 0x100),
    ] {
        let mut bad = good.clone();
        bad[header + word * 8..][..8].copy_from_slice(&u64::to_le_bytes(value));
        assert!(open(&bad).is_err(), "word {word} {value}");
    }
    let mut bad = good;
    bad[8] = 3;
    assert_eq!(open(&bad).unwrap_err(), "format 3 is not known here");
}

proptest! {
    #[test]
    fn runs_are_the_bits(bits: u64) {
        let mut again = 0u64;
        for (first, count) in runs(bits) {
            for bit in first..first + count {
                again |= 1 << bit;
            }
        }
        prop_assert_eq!(again, bits);
    }
}
