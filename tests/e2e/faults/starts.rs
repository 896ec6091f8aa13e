//! Starts after a death on a disk that fails or is slow.

use std::os::unix::fs::FileExt;

use super::disks::{Loop, Memory};
use super::*;

#[test]
fn who_dies_while_a_slow_disk_writes_was_no_stranger() {
    if !lab::require("kill -9 during a long write-back", &TRACED) {
        return;
    }
    let bed = Bed::new();
    let mut target = bed.faulty(&["pwritev:delay_enter=1500000"], &[]);
    let mut client = bed.wire.client();
    let block = vec![7; 512];
    for n in 0..8 {
        client.write_many(n * 64, &block).unwrap();
    }
    // Nobody asks for anything while one job writes one block after the other.
    let changed = || {
        let bytes = fs::read(bed.store.image()).unwrap();
        bytes[3 * 64 * 512] == 7
    };
    wait_until("the fourth block", Deadline::seconds(20), changed).unwrap();
    target.kill().unwrap();
    stop(bed.start(&[]));
    for n in 0..8 {
        assert_eq!(bed.store.sectors(n * 64, 1), block);
    }
}

/// What is dirty stays so until someone asks.
const HELD: [&str; 4] = [
    "--set",
    "idle_flush=600000",
    "--set",
    "max_dirty_age=600000",
];

/// A file and a loop device over it, of which only the first 256 KiB can be written
/// while its filesystem is full.
fn half_a_disk(disk: &Memory) -> (PathBuf, Loop) {
    let file = disk.path().join("disk.img");
    fs::write(&file, vec![0; 256 << 10]).unwrap();
    let sparse = File::options().write(true).open(&file).unwrap();
    sparse.set_len(8 << 20).unwrap();
    let device = Loop::new(&file, "512");
    (file, device)
}

#[test]
fn what_a_target_without_an_arena_left_is_synced_before_anything_is_served() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("losetup"),
        Need::Path("/dev/loop-control"),
    ];
    if !lab::require("unsynced writes at a start", &needs) {
        return;
    }
    let (good, bad) = (100, 8000);
    let nowhere = Path::new("/proc/aoede");
    for with_arena in [false, true] {
        let (bed, disk) = (Bed::new(), Memory::new("2M"));
        let (_, device) = half_a_disk(&disk);
        // So that the kernel keeps what it has of the device.
        let _open = File::open(&device.0).unwrap();
        let _filler = disk.fill();
        let mut target = bed.start_on(&device.0, nowhere, &HELD);
        target
            .wait_for_line(": e1.1, ", Deadline::seconds(20))
            .unwrap();
        let mut client = bed.wire.client();
        client.write(good, &[1; 512]).unwrap();
        client.write(bad, &[2; 512]).unwrap();
        target.kill().unwrap();
        let run = bed.store.run();
        let run_dir = if with_arena { run } else { nowhere };
        // The kernel says once that it could not write something.
        let mut refused = bed.start_on(&device.0, run_dir, &HELD);
        let status = refused.wait(Deadline::seconds(20)).unwrap();
        let said = refused.output().join("\n");
        assert_eq!(status.code(), Some(1), "{said}");
        let why = format!("image {}: what was written to it before", device.0);
        assert!(said.contains(&why), "{said}");
        let mut target = bed.start_on(&device.0, run_dir, &HELD);
        target
            .wait_for_line(": e1.1, ", Deadline::seconds(20))
            .unwrap();
        assert_eq!(bed.wire.client().read(good, 1).unwrap(), [1; 512]);
        target.kill().unwrap();
    }
}

#[test]
fn a_bad_sector_that_only_a_sync_shows_keeps_no_other_from_being_recovered() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("losetup"),
        Need::Path("/dev/loop-control"),
    ];
    if !lab::require("bad sectors behind the page cache", &needs) {
        return;
    }
    let (good, bad) = (100, 8000);
    let data = |fill: u8, sectors: usize| vec![fill; sectors * 512];
    let (bed, disk) = (Bed::new(), Memory::new("2M"));
    let (file, device) = half_a_disk(&disk);
    let mut target = bed.serve_on(&device.0, &HELD);
    let mut client = bed.wire.client();
    client.write_many(good, &data(1, 40)).unwrap();
    client.write_many(bad, &data(2, 8)).unwrap();
    client.write_many(good + 60, &data(3, 8)).unwrap();
    target.kill().unwrap();
    let filler = disk.fill();
    let mut target = bed.serve_on(&device.0, &HELD);
    let said = target.output().join("\n");
    for part in [
        "48 acknowledged sectors (24 KiB)",
        "8 sectors from image sector 8000 on",
    ] {
        assert!(said.contains(part), "{said}");
    }
    let image = |first: u64, sectors: usize| {
        let mut bytes = vec![0; sectors * 512];
        let file = File::open(&file).unwrap();
        file.read_exact_at(&mut bytes, first * 512).unwrap();
        bytes
    };
    assert!(image(good, 40) == data(1, 40) && image(good + 60, 8) == data(3, 8));
    assert!(image(bad, 8) == data(0, 8));
    // They are dirty in the new cache, whatever the page cache says of them, and
    // are tried again once more.
    let mut client = bed.wire.client();
    assert!(client.read_many(bad, 8).unwrap() == data(2, 8));
    assert!(client.read_many(good, 40).unwrap() == data(1, 40));
    target.kill().unwrap();
    fs::remove_file(disk.path().join("filler")).unwrap();
    drop(filler);
    stop(bed.serve_on(&device.0, &[]));
    assert!(image(bad, 8) == data(2, 8));
    assert!(image(good, 40) == data(1, 40) && image(good + 60, 8) == data(3, 8));
    assert_eq!(files(&bed.store.arenas(), ""), [] as [PathBuf; 0]);
}

#[test]
fn a_bad_sector_keeps_no_other_from_being_recovered() {
    if !lab::require("bad sectors at a recovery", &TRACED) {
        return;
    }
    let data = |n: usize| -> Vec<u8> { (0..n * 512).map(|i| (i / 3) as u8 | 1).collect() };
    let bed = Bed::new();
    let mut target = bed.start(&HELD);
    bed.wire.client().write_many(1000, &data(40)).unwrap();
    target.kill().unwrap();
    // The first block of 8 sectors cannot be written, nor any of its sectors.
    let bad = ["pwrite64:error=EIO:when=1..9"];
    // Without an arena there is no place for them, and the old one stays.
    let nowhere = [&HELD[..], &["--run-dir", "/proc/aoede"]].concat();
    let said = bed.faulty_refused(&bad, &nowhere);
    assert!(said.contains("which only an arena can keep"), "{said}");
    assert_eq!(files(&bed.store.arenas(), ".arena").len(), 1);
    for round in 0..2 {
        let mut target = if round == 0 {
            bed.faulty(&bad, &HELD)
        } else {
            // It dies with them in its cache; the disk is well again.
            bed.start(&HELD)
        };
        let image = bed.store.sectors(1008, 32);
        assert!(
            image == data(40)[8 * 512..],
            "round {round}: not brought over"
        );
        let first = bed.store.sectors(1000, 8);
        if round == 0 {
            assert!(first.iter().all(|byte| *byte == 0));
            let said = target.output().join("\n");
            assert!(
                said.contains("8 sectors from image sector 1000 on"),
                "{said}"
            );
            assert!(said.contains("32 acknowledged sectors"), "{said}");
        } else {
            assert!(first == data(8), "lost on the way");
        }
        let seen = bed.wire.client().read_many(1000, 40).unwrap();
        assert!(
            seen == data(40),
            "round {round}: a host sees something else"
        );
        target.kill().unwrap();
    }
    stop(bed.start(&[]));
    assert_eq!(files(&bed.store.arenas(), ""), [] as [PathBuf; 0]);
}
