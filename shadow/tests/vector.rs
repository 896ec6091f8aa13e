//! Shadows of older versions, which open and merge for ever.
//!
//! A vector is a text: `image BYTES`, `length BYTES`, then pieces of the file
//! as `OFFSET HEX`, where `HEX * COUNT` says it so many times. What is not there
//! is a hole. The image's sector i is full of i + 1.

#![allow(clippy::unwrap_used, clippy::panic)]

use shadow::{BlockFile, Chunk, Kind, MemoryFile, Shadow, State};

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2)
        .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

/// The image's size in bytes, and the shadow's file.
fn load(text: &str) -> (u64, Vec<u8>) {
    let (mut image, mut file) = (0, Vec::new());
    for line in text
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
    {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            ["image", n] => image = n.parse().unwrap(),
            ["length", n] => file.resize(n.parse().unwrap(), 0),
            [at, hex] | [at, hex, "*", _] => {
                let count = words.get(3).map_or(1, |n| n.parse().unwrap());
                let piece = bytes(hex).repeat(count);
                let at: usize = at.parse().unwrap();
                file[at..at + piece.len()].copy_from_slice(&piece);
            }
            _ => panic!("line '{line}'"),
        }
    }
    (image, file)
}

fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|i| (i / 512 + 1) as u8).collect()
}

#[test]
fn version_1() {
    let (image, file) = load(include_str!("vectors/version-1.hex"));
    let len = file.len() as u64;
    let mut shadow = Shadow::open(MemoryFile::new(file), len).unwrap();
    let spec = shadow.spec();
    assert_eq!(&spec.uuid, b"version 1 shadow");
    assert_eq!((spec.generation, shadow.state()), (6, State::Frozen));
    let geometry = spec.geometry;
    assert_eq!(
        (geometry.chunk(), geometry.start(), geometry.len()),
        (4096, 1536, 31232)
    );
    let identity = spec.identity;
    assert_eq!(
        (identity.kind, identity.a, identity.b),
        (Kind::File, 0x1234, 0x1122_3344_5566_7788)
    );
    assert_eq!(identity.bytes, image);
    // Chunk 0 in part, chunk 2, 3 to 5 of zeros, 7 of data that ends there.
    let states: Vec<_> = (0..8).map(|c| shadow.map().get(c)).collect();
    use Chunk::{Absent, Data, Zero};
    assert_eq!(states, [Data, Absent, Data, Zero, Zero, Zero, Absent, Data]);

    let mut expected = pattern(image);
    expected[2048..2560].fill(0xA1);
    expected[8192..12288].fill(0xA2);
    expected[12288..24576].fill(0);
    expected[32000..32768].fill(0xA3);
    let mut shown = vec![0; 31232];
    let file = MemoryFile::new(pattern(image));
    shadow.read(&file, 1536, &mut shown).unwrap();
    assert!(shown[..] == expected[1536..32768]);
    shadow.confirm().unwrap();
    shadow.set_state(State::Thawing).unwrap();
    let progress = shadow.merge(&file, u64::MAX).unwrap();
    assert_eq!(progress.left_chunks, 0);
    assert!(file.bytes() == expected);
    file.sync().unwrap();
}
