use super::*;
use crate::file::MemoryFile;
use crate::format::PAGE_CHUNKS;
use crate::identity::{Facts, Identity, Kind};
use proptest::prelude::*;

fn spec(start: u64, len: u64, image: u64) -> Spec {
    Spec {
        uuid: [3; 16],
        generation: 1,
        geometry: Geometry::new(4096, start, len).unwrap(),
        identity: Identity {
            kind: Kind::File,
            a: 1,
            b: 2,
            bytes: image,
            facts: Facts::default(),
            boot: [0; 2],
        },
    }
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i / 512 * 7 + i) as u8 | 1).collect()
}

fn shadow_of(spec: &Spec) -> Shadow<MemoryFile> {
    let file = MemoryFile::new(vec![0; spec.geometry.data_end() as usize]);
    Shadow::create(file, spec).unwrap()
}

fn reopen(shadow: Shadow<MemoryFile>) -> Shadow<MemoryFile> {
    let len = shadow.spec().geometry.data_end();
    Shadow::open(shadow.into_parts().0, len).unwrap()
}

fn show(shadow: &Shadow<MemoryFile>, image: &MemoryFile) -> Vec<u8> {
    let mut buf = vec![0; shadow.geometry().len() as usize];
    shadow
        .read(image, shadow.geometry().start(), &mut buf)
        .unwrap();
    buf
}

#[test]
fn a_partial_write_leaves_the_rest_of_its_chunk() {
    let image = MemoryFile::new(pattern(40_000));
    let mut shadow = shadow_of(&spec(0, 39_936, 40_000));
    shadow.write(&image, 5000, b"new").unwrap();
    let mut expected = pattern(39_936);
    expected[5000..5003].copy_from_slice(b"new");
    assert_eq!(show(&shadow, &image), expected);
    shadow.sync().unwrap();
    assert_eq!(
        (shadow.map().data_chunks(), shadow.map().get(1)),
        (1, Chunk::Data)
    );
    assert_eq!(show(&reopen(shadow), &image), expected);
    assert_eq!(image.bytes(), pattern(40_000));
}

#[test]
fn what_lies_outside_of_the_window_is_neither_read_nor_written() {
    // The window begins and ends within chunks; the image ends there.
    let image = MemoryFile::new(pattern(4608 + 8192));
    let mut shadow = shadow_of(&spec(4608, 8192, 4608 + 8192));
    for (at, len) in [(4607, 1), (4608, 8193), (4608 + 8192, 1), (u64::MAX, 2)] {
        assert!(shadow.write(&image, at, &vec![0; len]).is_err(), "{at}");
        assert!(shadow.read(&image, at, &mut vec![0; len]).is_err(), "{at}");
        assert!(shadow.forget(&image, at, len as u64).is_err(), "{at}");
    }
    shadow.write(&image, 4700, &[0; 1]).unwrap();
    shadow.write(&image, 4608 + 8191, &[0; 1]).unwrap();
    shadow.forget(&image, 8192, 4096).unwrap();
    shadow.set_state(State::Thawing).unwrap();
    while shadow.merge(&image, 1).unwrap().left_chunks > 0 {}
    let mut expected = pattern(4608 + 8192);
    expected[4700] = 0;
    expected[4608 + 8191] = 0;
    expected[8192..8192 + 4096].fill(0);
    assert_eq!(image.bytes(), expected);
}

#[test]
fn each_state_takes_only_its_own_changes() {
    let image = MemoryFile::new(pattern(8192));
    let mut shadow = shadow_of(&spec(0, 8192, 8192));
    assert!(shadow.merge(&image, 1).is_err());
    assert!(shadow.write_thawing(&image, 0, b"x").is_err());
    shadow.set_state(State::Thawing).unwrap();
    assert!(shadow.write(&image, 0, b"x").is_err());
    assert!(shadow.forget(&image, 0, 1).is_err());
    assert_eq!(image.bytes(), pattern(8192));
    let mut past = spec(0, 8192, 8191);
    past.identity.bytes = 8191;
    assert!(Shadow::create(MemoryFile::new(vec![0; 2 << 20]), &past).is_err());
}

#[test]
fn the_first_and_the_last_chunk_of_a_page_are_merged() {
    let len = (PAGE_CHUNKS + 3) * 4096 - 512;
    let image = MemoryFile::new(vec![1; len as usize]);
    let mut shadow = shadow_of(&spec(0, len, len));
    let edge = PAGE_CHUNKS * 4096;
    let mut expected = image.bytes();
    for at in [0, edge - 5000, edge - 1, edge, edge + 4095, len - 1] {
        shadow.write(&image, at, &[2]).unwrap();
        expected[at as usize] = 2;
    }
    shadow.sync().unwrap();
    let mut shadow = reopen(shadow);
    assert!(show(&shadow, &image) == expected);
    shadow.set_state(State::Thawing).unwrap();
    let progress = shadow.merge(&image, u64::MAX).unwrap();
    assert_eq!(progress.left_chunks, 0);
    assert_eq!(progress.merged, 4 * 4096 + 4096 - 512);
    assert!(image.bytes() == expected);
    assert_eq!(reopen(shadow).map().present(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Forget(u64, u64),
    Sync,
    Reopen,
    Thaw,
    Merge(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (any::<u64>(), 1u64..9000, any::<u8>()).prop_map(|(a, n, b)| Step::Write(a, n, b)),
        2 => (any::<u64>(), 1u64..20_000).prop_map(|(a, n)| Step::Forget(a, n)),
        1 => Just(Step::Sync),
        1 => Just(Step::Reopen),
        1 => Just(Step::Thaw),
        2 => (1u64..30_000).prop_map(Step::Merge),
    ]
}

proptest! {
    #[test]
    fn it_agrees_with_an_array(
        start in 0u64..20,
        sectors in 1u64..120,
        tail in 0u64..1500,
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let (start, len) = (start * 512, sectors * 512);
        let bytes = pattern(start + len + tail);
        let image = MemoryFile::new(bytes.clone());
        let mut shadow = shadow_of(&spec(start, len, start + len + tail));
        let mut model = bytes.clone();
        let range = |at: u64, n: u64| {
            let from = start + at % len;
            (from, n.min(start + len - from))
        };
        for step in steps {
            let thawing = shadow.state() == State::Thawing;
            match step {
                Step::Write(at, n, byte) => {
                    let (at, n) = range(at, n);
                    let data = vec![byte; n as usize];
                    if thawing {
                        shadow.write_thawing(&image, at, &data).unwrap();
                    } else {
                        shadow.write(&image, at, &data).unwrap();
                    }
                    model[at as usize..(at + n) as usize].fill(byte);
                }
                Step::Forget(at, n) if !thawing => {
                    let (at, n) = range(at, n);
                    shadow.forget(&image, at, n).unwrap();
                    model[at as usize..(at + n) as usize].fill(0);
                }
                Step::Sync => shadow.sync().unwrap(),
                Step::Reopen => {
                    shadow.sync().unwrap();
                    shadow = reopen(shadow);
                }
                Step::Thaw => shadow.set_state(State::Thawing).unwrap(),
                Step::Merge(budget) if thawing => {
                    let progress = shadow.merge(&image, budget).unwrap();
                    prop_assert!(progress.merged <= budget.max(4096));
                    prop_assert_eq!(progress.left_chunks, shadow.map().present());
                    prop_assert!(progress.merged > 0 || progress.left_chunks == 0);
                }
                _ => {}
            }
            let shown = show(&shadow, &image);
            prop_assert!(shown[..] == model[start as usize..(start + len) as usize]);
            if shadow.state() != State::Thawing {
                prop_assert!(image.bytes() == bytes);
            }
        }
        shadow.set_state(State::Thawing).unwrap();
        while shadow.merge(&image, 10_000).unwrap().left_chunks > 0 {}
        prop_assert!(image.bytes() == model);
    }
}
