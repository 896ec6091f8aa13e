//! Opening what is damaged, hostile, old or large.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io;
use std::sync::Mutex;
use std::time::Instant;

use proptest::prelude::*;
use shadow::{
    BlockFile, Chunk, Extent, Facts, Geometry, Identity, Kind, Lba, MemoryFile, OpenError, Other,
    SECTOR, Shadow, Spec, State,
};

const PAGE_CHUNKS: u64 = 16320;

/// A file of pieces: everything else is zeros.
#[derive(Debug)]
struct Pieces {
    pieces: Mutex<Vec<(u64, Vec<u8>)>>,
    len: u64,
}

impl Pieces {
    fn new(len: u64) -> Pieces {
        Pieces {
            pieces: Mutex::new(Vec::new()),
            len,
        }
    }

    fn flip(&self, at: u64, bits: u8) {
        let mut byte = [0];
        self.read_at(&mut byte, at).unwrap();
        self.write_at(&[byte[0] ^ bits], at).unwrap();
    }
}

impl BlockFile for Pieces {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + buf.len() as u64 > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.fill(0);
        for (at, bytes) in self.pieces.lock().unwrap().iter() {
            let from = offset.max(*at);
            let to = (offset + buf.len() as u64).min(at + bytes.len() as u64);
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            }
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.pieces.lock().unwrap().push((offset, data.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let pieces = self.pieces.lock().unwrap();
        let next = pieces
            .iter()
            .filter(|(at, bytes)| at + bytes.len() as u64 > offset)
            .map(|(at, _)| (*at).max(offset));
        Ok(next.min())
    }
}

/// A window of three pages that begins in the middle of a chunk.
fn spec() -> Spec {
    Spec {
        uuid: [0x55; 16],
        generation: 2,
        geometry: Geometry::new(4096, 1024, 3 * PAGE_CHUNKS * 4096 - 4096).unwrap(),
        identity: Identity {
            kind: Kind::Device,
            a: 77,
            b: 0,
            bytes: 3 * PAGE_CHUNKS * 4096,
            facts: Facts::default(),
            boot: [0; 2],
        },
    }
}

/// A shadow with a chunk of data in each page, and both copies of the second
/// page written.
fn shadow() -> Shadow<Pieces> {
    let image = Pieces::new(3 * PAGE_CHUNKS * 4096);
    let spec = spec();
    let mut shadow = Shadow::create(Pieces::new(spec.geometry.data_end()), &spec).unwrap();
    for page in 0..3 {
        let at = 4096 * (page * PAGE_CHUNKS + 7);
        shadow.write(&image, at, &[2; 4096]).unwrap();
        shadow.sync().unwrap();
    }
    shadow
        .write(&image, 4096 * PAGE_CHUNKS, &[3; 4096])
        .unwrap();
    shadow.sync().unwrap();
    shadow.set_state(State::Frozen).unwrap();
    shadow
}

fn open(file: Pieces) -> Result<Shadow<Pieces>, OpenError> {
    let len = file.len;
    Shadow::open(file, len)
}

fn with(flips: &[(u64, u8)]) -> Result<Shadow<Pieces>, OpenError> {
    let file = shadow().into_parts().0;
    for (at, bits) in flips {
        file.flip(*at, *bits);
    }
    open(file)
}

#[test]
fn every_flipped_byte_of_one_copy_is_borne() {
    let whole = shadow();
    for copy in [0, 4096, 8192, 8192 + 4096, 2 * 8192, 2 * 8192 + 4096] {
        for at in copy..copy + 4096 {
            let opened = with(&[(at, 0x40)]).unwrap_or_else(|e| panic!("byte {at}: {e}"));
            assert_eq!(opened.spec(), whole.spec());
        }
    }
}

#[test]
fn the_older_copy_stands_for_a_damaged_one() {
    // The second header says frozen, the first that the freeze has begun.
    assert_eq!(with(&[]).unwrap().state(), State::Frozen);
    assert_eq!(with(&[(4096, 1)]).unwrap().state(), State::Frozen);
    assert_eq!(with(&[(0, 1)]).unwrap().state(), State::Freezing);
    // The second write to page 1 went to its first copy.
    assert_eq!(with(&[]).unwrap().map().data_chunks(), 4);
    assert_eq!(with(&[(2 * 8192, 1)]).unwrap().map().data_chunks(), 3);
    assert_eq!(
        with(&[(2 * 8192 + 4096, 1)]).unwrap().map().data_chunks(),
        4
    );
    // The only copy of page 0, as a crash in its first write tears it.
    assert_eq!(
        with(&[(8192 + 4096, 1)]).unwrap().map().get(7),
        Chunk::Absent
    );
}

#[test]
fn every_byte_flipped_in_both_copies_is_refused() {
    for at in 0..4096 {
        match with(&[(at, 0x10), (at + 4096, 0x10)]) {
            Err(OpenError::Header(_)) => assert!(at >= 8),
            Err(OpenError::NotAShadow) => assert!(at < 8),
            other => panic!("byte {at}: {:?}", other.map(|s| s.state())),
        }
        match with(&[(2 * 8192 + at, 0x10), (2 * 8192 + 4096 + at, 0x10)]) {
            Err(OpenError::Pages(lost)) => {
                let first = PAGE_CHUNKS * 8;
                assert_eq!(lost, [Extent::new(Lba(first), first).unwrap()]);
            }
            other => panic!("byte {at}: {:?}", other.map(|s| s.state())),
        }
    }
}

#[test]
fn the_message_names_the_sectors() {
    let all = [
        8192,
        8192 + 4096,
        2 * 8192,
        2 * 8192 + 4096,
        3 * 8192,
        3 * 8192 + 4096,
    ];
    let error = with(&all.map(|at| (at + 100, 1))).unwrap_err().to_string();
    // The window, from its first sector to its last.
    let sectors = 3 * PAGE_CHUNKS * 8 - 8;
    assert!(
        error.contains(&format!("image sectors 2 to {}", sectors + 1)),
        "{error}"
    );
    let error = with(&[8192, 8192 + 4096, 3 * 8192, 3 * 8192 + 4096].map(|at| (at, 1)));
    let OpenError::Pages(lost) = error.unwrap_err() else {
        panic!("not the pages");
    };
    assert_eq!(lost.len(), 2);
    assert_eq!(lost[1].start(), Lba(2 * PAGE_CHUNKS * 8));
    assert_eq!(lost[1].end().0 * SECTOR, spec().geometry.end());
}

#[test]
fn a_page_of_another_shadow_is_not_believed() {
    let file = shadow().into_parts().0;
    let mut other = spec();
    other.uuid[3] ^= 1;
    let page = shadow::header_page(&other, State::Frozen, 6);
    file.write_at(&page.bytes, page.offset).unwrap();
    assert!(matches!(open(file), Err(OpenError::Pages(lost)) if lost.len() == 1));
}

#[test]
fn a_header_of_a_huge_disk_takes_no_memory() {
    let mut spec = spec();
    spec.geometry = Geometry::new(4096, 0, 512 << 48).unwrap();
    spec.identity.bytes = u64::MAX;
    let page = shadow::header_page(&spec, State::Frozen, 2);
    // Cut off: refused before the map is made.
    let file = Pieces::new(1 << 20);
    file.write_at(&page.bytes, page.offset).unwrap();
    assert!(matches!(open(file), Err(OpenError::Short(..))));
    // As long as it says, and all of it a hole: nothing to read.
    let file = Pieces::new(spec.geometry.data_end());
    file.write_at(&page.bytes, page.offset).unwrap();
    let opened = open(file).unwrap();
    assert_eq!(opened.map().present(), 0);
}

#[test]
fn a_check_sees_what_opening_passes_over() {
    let report = |flips: &[u64]| {
        let file = shadow().into_parts().0;
        for at in flips {
            file.flip(*at, 1);
        }
        shadow::check(&file, file.len)
    };
    let whole = report(&[]).unwrap();
    assert_eq!((whole.pages, whole.findings.len()), (3, 0));
    let found = report(&[0, 8192, 2 * 8192, 2 * 8192 + 4096])
        .unwrap()
        .findings;
    let places: Vec<_> = found.iter().map(|f| (f.page, f.copy, f.other)).collect();
    let lost = |copy| (Some(1), copy, Other::Damaged);
    let whole = |page| (page, 0, Other::Whole);
    assert_eq!(places, [whole(None), whole(Some(0)), lost(0), lost(1)]);
    let torn = report(&[8192 + 4096]).unwrap().findings;
    assert_eq!(torn[0].other, Other::Never);
    let sectors = PAGE_CHUNKS * 8;
    let line = found[2].to_string();
    let last = 2 * sectors - 1;
    let name = format!("bitmap page 1 (image sectors {sectors} to {last}), copy 0");
    assert!(line.starts_with(&name), "{line}");
    assert!(matches!(report(&[0, 4096]), Err(OpenError::NotAShadow)));
    assert!(matches!(report(&[0, 4196]), Err(OpenError::Header(_))));
    assert!(matches!(report(&[100, 4096]), Err(OpenError::Header(_))));
}

proptest! {
    #[test]
    fn any_bytes_are_opened_or_refused(
        pieces in prop::collection::vec((0u64..40_000, prop::collection::vec(any::<u8>(), 1..600)), 0..5),
        len in prop_oneof![0u64..50_000, Just(300 << 20)],
        real: bool,
    ) {
        let file = if real { shadow().into_parts().0 } else { Pieces::new(300 << 20) };
        for (at, bytes) in pieces {
            file.write_at(&bytes, at).unwrap();
        }
        let len = len.min(file.len);
        if let Ok(shadow) = Shadow::open(Pieces { len, ..file }, len) {
            // What opens can be read, all of it.
            let image = MemoryFile::new(vec![1; 8192]);
            let mut buf = vec![0; 4096];
            let _ = shadow.read(&image, shadow.geometry().start(), &mut buf);
            let mut at = 0;
            while let Some(next) = shadow.map().next_present(at) {
                at = next + 1;
            }
        }
    }
}

/// A line of the file /proc/self/status, in KiB.
fn memory(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(what));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Measured rather than asserted: machines differ. The memory is that of the
/// whole process, so run it alone (`--ignored --nocapture`, in a release build).
#[test]
fn opening_the_shadow_of_a_tebibyte() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec();
    spec.geometry = Geometry::new(4096, 0, 1 << 40).unwrap();
    spec.identity.bytes = 1 << 40;
    let len = spec.geometry.data_end();
    // Every page with AOEDE_MEASURE; otherwise a few, which takes a second.
    let measure = std::env::var_os("AOEDE_MEASURE").is_some();
    let step = if measure { 1 } else { 64 };
    for (name, every) in [
        ("empty", u64::MAX),
        ("every second chunk", 2),
        ("all data", 1),
    ] {
        let path = dir.path().join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_len(len).unwrap();
        let mut shadow = Shadow::create(file, &spec).unwrap();
        shadow.set_state(State::Frozen).unwrap();
        let (file, spec, _, _, mut map) = shadow.into_parts();
        for page in (0..spec.geometry.pages()).step_by(step) {
            let first = page * PAGE_CHUNKS;
            let end = (first + PAGE_CHUNKS).min(spec.geometry.chunks());
            let changes = (first..end).filter(|c| (c + 1) % every == 0);
            let commit = map.plan(changes.map(|c| (c, Chunk::Data)));
            for page in &commit.pages {
                file.write_at(&page.bytes, page.offset).unwrap();
            }
            map.settle(commit, true);
        }
        file.sync_all().unwrap();
        let present = map.present();
        drop(map);
        // From the disk, not from the page cache.
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
        let before = memory("VmRSS");
        let begin = Instant::now();
        let opened = Shadow::open(file, len).unwrap();
        println!(
            "{name}: {present} chunks, opened in {:?}, {} KiB more memory",
            begin.elapsed(),
            memory("VmRSS").saturating_sub(before),
        );
        assert_eq!(opened.map().present(), present);
    }
    println!("peak of the process: {} KiB", memory("VmHWM"));
}
