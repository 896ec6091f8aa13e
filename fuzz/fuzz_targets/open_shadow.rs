//! Opens a shadow that is partly what the input says, reads it, and merges it.
//!
//! The input is a list of edits to a whole shadow: two bytes of place, one of
//! content. Its first byte says which headers and pages are given the right
//! checksum again afterwards, since no fuzzer finds those.

#![no_main]

use std::sync::OnceLock;

use crc::{CRC_64_XZ, Crc};
use libfuzzer_sys::fuzz_target;
use shadow::{Facts, Geometry, Identity, Kind, MemoryFile, Shadow, Spec, State};

static CRC: Crc<u64> = Crc::<u64>::new(&CRC_64_XZ);
const LEN: u64 = 40_000;

/// A shadow with data and zeros, both copies of everything written.
fn whole() -> &'static [u8] {
    static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let spec = Spec {
            uuid: [7; 16],
            generation: 1,
            geometry: Geometry::new(4096, 1024, 512 * 70).expect("a window"),
            identity: Identity {
                kind: Kind::File,
                a: 1,
                b: 2,
                bytes: LEN,
                facts: Facts::default(),
                boot: [0; 2],
            },
        };
        let image = MemoryFile::new(vec![1; LEN as usize]);
        let file = MemoryFile::new(vec![0; spec.geometry.data_end() as usize + 8192]);
        let mut shadow = Shadow::create(file, &spec).expect("memory");
        for at in [2000, 20_000] {
            shadow.write(&image, at, &[2; 3000]).expect("memory");
            shadow.forget(&image, at + 4000, 9000).expect("memory");
            shadow.sync().expect("memory");
        }
        shadow.set_state(State::Frozen).expect("memory");
        shadow.into_parts().0.bytes()
    })
}

/// Gives the headers and pages whose bit is set the checksum they should have.
fn seal(file: &mut [u8], which: u8) {
    for copy in 0..2 {
        if which & 1 << copy != 0 {
            let header = &mut file[copy * 4096..][..512];
            let sum = CRC.checksum(&header[..504]);
            header[504..].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let uuid: [u8; 16] = file[24..40].try_into().expect("16 bytes");
    for copy in 0..2 {
        if which & 4 << copy != 0 {
            let page = &mut file[8192 + copy * 4096..][..4096];
            let mut digest = CRC.digest();
            digest.update(&uuid);
            digest.update(&0u64.to_le_bytes());
            digest.update(&page[..8]);
            digest.update(&page[16..]);
            let sum = digest.finalize();
            page[8..16].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((which, edits)) = input.split_first() else {
        return;
    };
    let mut file = whole().to_vec();
    for edit in edits.chunks_exact(3) {
        // The first 16 KiB: headers and the page.
        let at = u16::from_le_bytes([edit[0], edit[1]]) & 0x3FFF;
        file[usize::from(at)] = edit[2];
    }
    seal(&mut file, *which);
    let len = file.len() as u64;
    let Ok(mut shadow) = Shadow::open(MemoryFile::new(file), len) else {
        return;
    };
    let geometry = shadow.geometry();
    let image = MemoryFile::new(vec![1; LEN as usize]);
    let mut buf = vec![0; geometry.len().min(LEN) as usize];
    let read = shadow.read(&image, geometry.start(), &mut buf);
    let before = image.bytes();
    let _ = shadow.set_state(State::Thawing);
    while let Ok(progress) = shadow.merge(&image, 10_000) {
        if progress.left_chunks == 0 {
            // What it showed before is what the image has now, and nothing
            // outside of the window has changed.
            let (start, after) = (geometry.start() as usize, image.bytes());
            if read.is_ok() {
                assert!(after[start..start + buf.len()] == buf[..]);
                assert!(after[..start] == before[..start]);
            }
            return;
        }
    }
});
