use super::*;
use crate::extent::Lba;
use proptest::prelude::*;

fn spec() -> Spec {
    Spec {
        uuid: *b"0123456789abcdef",
        generation: 7,
        geometry: Geometry::new(4096, 512 * 3, 512 * 100_000).unwrap(),
        identity: Identity {
            kind: Kind::File,
            a: 11,
            b: 12,
            bytes: 512 * 100_003 + 17,
            facts: Facts::default(),
            boot: [3, 4],
        },
    }
}

fn page_of(page: &Page) -> [u8; PAGE] {
    page.bytes[..].try_into().unwrap()
}

#[test]
fn a_geometry_that_cannot_be_is_refused() {
    assert!(Geometry::new(4096, 0, 512).is_some());
    assert!(Geometry::new(32768, 512, SECTOR << 48).is_some());
    for (chunk, start, len) in [
        (0, 0, 512),
        (2048, 0, 512),
        (65536, 0, 512),
        (5000, 0, 512),
        (4096, 1, 512),
        (4096, 0, 513),
        (4096, 0, 0),
        (4096, 0, (SECTOR << 48) + 512),
        (4096, u64::MAX - 511, 512),
        (4096, i64::MAX as u64 - 511, 512),
        (4096, u64::MAX - 1023, 1024),
    ] {
        assert_eq!(
            Geometry::new(chunk, start, len),
            None,
            "{chunk} {start} {len}"
        );
    }
}

#[test]
fn chunks_are_counted_from_the_image_and_cut_by_the_window() {
    let geometry = Geometry::new(4096, 4096 + 512, 4096 * 2).unwrap();
    assert_eq!((geometry.first_chunk(), geometry.chunks()), (1, 3));
    assert_eq!(geometry.within(1), (4608, 3584));
    assert_eq!(geometry.within(2), (8192, 4096));
    assert_eq!(geometry.within(3), (12288, 512));
    assert_eq!(geometry.within(0).1, 0);
    assert_eq!(geometry.within(4).1, 0);
    assert_eq!(geometry.within(u64::MAX).1, 0);
    assert_eq!(geometry.data_start(), 1 << 20);
    assert_eq!(geometry.data_offset(4608), (1 << 20) + 512);
    assert_eq!(geometry.data_end(), (1 << 20) + 3 * 4096);
    let sectors = geometry.sectors_of_page(0);
    assert_eq!((sectors.start(), sectors.count()), (Lba(9), 16));
}

#[test]
fn pages_end_where_the_map_says() {
    let full = |chunks| Geometry::new(4096, 0, chunks * 4096).unwrap();
    assert_eq!(full(PAGE_CHUNKS).pages(), 1);
    assert_eq!(full(PAGE_CHUNKS + 1).pages(), 2);
    assert_eq!(full(127 * PAGE_CHUNKS).data_start(), 1 << 20);
    assert_eq!(full(127 * PAGE_CHUNKS + 1).data_start(), 2 << 20);
    let tib = Geometry::new(4096, 0, 1 << 40).unwrap();
    assert_eq!((tib.chunks(), tib.pages()), (1 << 28, 16449));
}

#[test]
fn a_header_is_drawn_as_the_byte_map_says() {
    let page = header_page(&spec(), State::Frozen, 5);
    assert_eq!((page.offset, page.bytes.len()), (4096, 4096));
    let hex: String = page.bytes[..96]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(
        hex,
        "414f454445534844010000000010000005000000000000003031323334353637383961626364656602000000\
         010000000700000000000000000600000000000000400d03000000000b000000000000000c00000000000000\
         11460d0300000000"
    );
    assert!(is_zero(&page.bytes[96..184]));
    assert_eq!(page.bytes[184..192], 3u64.to_le_bytes());
    assert_eq!(page.bytes[192..200], 4u64.to_le_bytes());
    assert!(is_zero(&page.bytes[200..504]) && is_zero(&page.bytes[512..]));
    let header = Header::read(&page_of(&page), 1);
    let expected = Header {
        spec: spec(),
        state: State::Frozen,
        sequence: 5,
    };
    assert_eq!(header, Copied::Valid(expected));
    // In the other copy's place it does not count.
    assert!(matches!(
        Header::read(&page_of(&page), 0),
        Copied::Damaged(_)
    ));
}

#[test]
fn every_flipped_bit_of_a_header_is_seen() {
    let page = page_of(&header_page(&spec(), State::Thawing, 4));
    for bit in 0..PAGE * 8 {
        let mut bytes = page;
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(
            matches!(Header::read(&bytes, 0), Copied::Damaged(_)),
            "bit {bit}"
        );
    }
    assert_eq!(Header::read(&[0; PAGE], 0), Copied::Never);
}

#[test]
fn impossible_numbers_under_a_right_checksum_are_refused() {
    let sealed = |at: usize, number: u64, four: bool| {
        let mut bytes = page_of(&header_page(&spec(), State::Frozen, 2));
        if four {
            put32(&mut bytes, at, number as u32);
        } else {
            put64(&mut bytes, at, number);
        }
        let sum = CRC.checksum(&bytes[..SUMMED]);
        put64(&mut bytes, SUMMED, sum);
        Header::read(&bytes, 0)
    };
    assert_eq!(sealed(8, 2, true), Copied::Version(2));
    for (at, number, four) in [
        (12, 4095, true),
        (12, 0, true),
        (16, 0, false),
        (16, 3, false),
        (16, u64::MAX - 1, false),
        (40, 0, true),
        (40, 4, true),
        (44, 3, true),
        (56, 1, false),
        (56, u64::MAX - 511, false),
        (64, 0, false),
        (64, 1 << 62, false),
        (88, 0, false),
    ] {
        let read = sealed(at, number, four);
        assert!(
            matches!(read, Copied::Damaged(_)),
            "{at} {number}: {read:?}"
        );
    }
}

#[test]
fn every_flipped_byte_of_a_page_is_seen() {
    let spec = spec();
    let mut planes = Planes {
        data: [0; WORDS],
        zero: [0; WORDS],
    };
    (planes.data[0], planes.zero[1]) = (0b101, 1 << 63);
    let page = BitmapPage {
        sequence: 3,
        planes,
    };
    let bytes = page_of(&page.write(&spec.uuid, 0));
    // Chunk 0: data, chunk 2: data, chunk 127: zeros.
    assert_eq!((bytes[16], bytes[16 + 31]), (0b01_00_01, 0b10 << 6));
    let read =
        |bytes: &[u8; PAGE], number| BitmapPage::read(bytes, 1, &spec.uuid, &spec.geometry, number);
    assert_eq!(read(&bytes, 0), Copied::Valid(Box::new(page)));
    for at in 0..PAGE {
        let mut bytes = bytes;
        bytes[at] ^= 0x11;
        assert!(matches!(read(&bytes, 0), Copied::Damaged(_)), "byte {at}");
    }
}

#[test]
fn impossible_bits_under_a_right_checksum_are_refused() {
    let mut spec = spec();
    spec.geometry = Geometry::new(4096, 0, 4096 * 70).unwrap();
    let write = |data: (usize, u64), zero: (usize, u64), number| {
        let mut planes = Planes {
            data: [0; WORDS],
            zero: [0; WORDS],
        };
        planes.data[data.0] = data.1;
        planes.zero[zero.0] = zero.1;
        let bytes = page_of(
            &BitmapPage {
                sequence: 1,
                planes,
            }
            .write(&spec.uuid, number),
        );
        BitmapPage::read(&bytes, 1, &spec.uuid, &spec.geometry, 0)
    };
    assert!(matches!(write((1, 0b10_0000), (1, 1), 0), Copied::Valid(_)));
    assert!(matches!(
        write((1, 0b100_0000), (1, 1), 0),
        Copied::Damaged(_)
    ));
    assert!(matches!(write((0, 1), (0, 1), 0), Copied::Damaged(_)));
    assert!(matches!(write((0, 1), (200, 1), 0), Copied::Damaged(_)));
    // A page of another place.
    assert!(matches!(write((0, 1), (0, 2), 1), Copied::Damaged(_)));
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_a_panic(seed in prop::collection::vec(any::<u8>(), 0..600), sealed: bool) {
        let mut bytes = [0; PAGE];
        bytes[..seed.len()].copy_from_slice(&seed);
        if sealed {
            bytes[0..8].copy_from_slice(MAGIC);
            put32(&mut bytes, 8, VERSION);
            let sum = CRC.checksum(&bytes[..SUMMED]);
            put64(&mut bytes, SUMMED, sum);
        }
        let _ = Header::read(&bytes, 0);
        let spec = spec();
        let sum = page_sum(&spec.uuid, 1, &bytes);
        if sealed {
            put64(&mut bytes, 8, sum);
        }
        let _ = BitmapPage::read(&bytes, 1, &spec.uuid, &spec.geometry, 1);
    }

    #[test]
    fn spreading_and_gathering_agree(word: u32) {
        let wide = spread(word);
        for i in 0..32 {
            prop_assert_eq!(wide >> (2 * i) & 1, u64::from(word >> i & 1));
        }
        prop_assert_eq!(gather(wide), word);
        prop_assert_eq!(gather(wide << 1 | wide), word);
    }
}
