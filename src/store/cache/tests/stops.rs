//! A process that stops anywhere: its arena is looked at after every store, and
//! while it is stopped.

use super::*;
use crate::store::arena::OldArena;
use crate::sys::slots::{Slots, file_len, watch};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// What a process that is killed between any two stores leaves: all that was
/// acknowledged, in the arena or on the disk.
#[test]
fn a_look_after_every_store_finds_all_that_was_acknowledged() {
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.arena");
        let id = ImageId {
            start: 0,
            len: SECTORS * 512,
            ..ImageId::default()
        };
        let arena = Arena::create(&path, [0; 2], &id, BLOCK, 12).unwrap();
        let medium = Rc::new(RefCell::new(vec![0; SECTORS as usize * 512]));
        let disk = |data: &mut Vec<u8>, at: u64, write: bool| {
            let (mut medium, at) = (medium.borrow_mut(), at as usize);
            if write {
                medium[at..at + data.len()].copy_from_slice(data);
            } else {
                let len = data.len();
                data.copy_from_slice(&medium[at..at + len]);
            }
        };
        let align = [1, 1024][seed as usize % 2];
        let mut bench = Bench::new(cache(arena, align, 9), &disk);
        // Of each sector what was acknowledged, and what a write in flight brings.
        let sectors = Rc::new(RefCell::new(vec![(0, 0); SECTORS as usize]));
        let (seen, under) = (Rc::clone(&sectors), Rc::clone(&medium));
        let look = move || {
            let mut bytes = under.borrow().clone();
            let old = OldArena::look(&path).unwrap();
            old.replay(|_, at, data| {
                bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
                Ok::<(), ()>(())
            })
            .unwrap();
            for (bytes, (acked, coming)) in bytes.chunks(512).zip(seen.borrow().iter()) {
                let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                assert!(bytes == value.to_le_bytes().repeat(64), "a torn sector");
                assert!([*acked, *coming].contains(&value), "{value}, not {acked}");
            }
        };
        watch::each_store(look, || {
            for n in 1..60 {
                let extent = nth(seed, n);
                let range = extent.start().0 as usize..extent.end().0 as usize;
                for sector in &mut sectors.borrow_mut()[range.clone()] {
                    sector.1 = n;
                }
                bench.write(extent, &fill(n, extent));
                for sector in &mut sectors.borrow_mut()[range] {
                    sector.0 = n;
                }
                for step in 0..draw(seed, n) >> 8 & 7 {
                    bench.step(draw(seed ^ 2, n << 3 | step));
                }
            }
        });
    }
}

/// Names the writer's folder.
const FOLDER: &str = "AOEDE_TEST_WRITER";
/// Words of the writer's progress: the write it has begun last, and the one it
/// has acknowledged last.
const BEGUN: usize = 0;
const ACKED: usize = 1;

fn progress(folder: &Path) -> Slots {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(folder.join("progress"))
        .unwrap();
    file.set_len(file_len(2, 4096, 0) as u64).unwrap();
    Slots::map(&file, 2, 4096, 0).unwrap()
}

/// The process that the test below stops again and again; alone it has nothing
/// to do.
#[test]
fn writer() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let folder = Path::new(&folder);
    let image = File::options()
        .read(true)
        .write(true)
        .open(folder.join("image"))
        .unwrap();
    let seed = std::process::id().into();
    let id = ImageId {
        start: 0,
        len: SECTORS * 512,
        ..ImageId::default()
    };
    let arena = Arena::create(&folder.join("a.arena"), [seed, 0], &id, BLOCK, 12).unwrap();
    let disk = |data: &mut Vec<u8>, at: u64, write: bool| {
        if write {
            image.write_all_at(data, at).unwrap();
        } else {
            image.read_exact_at(data, at).unwrap();
        }
    };
    let align = [1, 1024][seed as usize % 2];
    let mut bench = Bench::new(cache(arena, align, 9), &disk);
    let mut progress = progress(folder);
    for n in 1.. {
        let (extent, data) = (nth(seed, n), fill(n, nth(seed, n)));
        progress.set_word(BEGUN, n);
        bench.write(extent, &data);
        progress.set_word(ACKED, n);
        for step in 0..draw(seed, n) >> 8 & 7 {
            bench.step(draw(seed ^ 2, n << 3 | step));
        }
    }
}

/// Kills the writer, whatever becomes of the test.
struct Writer(std::process::Child);

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_writer_that_stops_anywhere_has_lost_nothing() {
    for _ in 0..2 {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create(folder.path().join("image")).unwrap();
        file.set_len(SECTORS * 512).unwrap();
        let progress = progress(folder.path());
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::cache::tests::stops::writer"])
            .env(FOLDER, folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let writer = Writer(child);
        watch(&writer, folder.path(), &progress);
    }
}

fn watch(writer: &Writer, folder: &Path, progress: &Slots) {
    let pid = Pid::from_raw(writer.0.id() as i32);
    let seed = u64::from(writer.0.id());
    let (mut expected, mut counted) = ([0; SECTORS as usize], 0);
    let (mut looks, mut between) = (0u64, 0);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1500) || looks < 200 {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{looks} looks only"
        );
        // Stopped wherever it is: what a later process would find if it had
        // been killed there.
        kill(pid, Signal::SIGSTOP).unwrap();
        match waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap() {
            WaitStatus::Stopped(..) => {}
            other => panic!("the writer ended: {other:?}"),
        }
        let (begun, acked) = (progress.word(BEGUN), progress.word(ACKED));
        if acked > 0 {
            looks += 1;
            between += u32::from(begun > acked);
            for n in counted + 1..=acked {
                let extent = nth(seed, n);
                expected[extent.start().0 as usize..extent.end().0 as usize].fill(n);
            }
            counted = acked;
            let mut bytes = std::fs::read(folder.join("image")).unwrap();
            let old = OldArena::look(&folder.join("a.arena")).unwrap();
            old.replay(|_, at, data| {
                bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
                Ok::<(), ()>(())
            })
            .unwrap();
            let open = nth(seed, begun);
            for (sector, bytes) in bytes.chunks(512).enumerate() {
                let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                assert!(
                    bytes == value.to_le_bytes().repeat(64),
                    "sector {sector} is torn"
                );
                let is_open = begun > acked && open.overlaps(extent(sector as u64, 1));
                assert!(
                    value == expected[sector] || (is_open && value == begun),
                    "seed {seed}: sector {sector} is {value} after {acked} and in {begun}, not {}",
                    expected[sector]
                );
            }
        }
        kill(pid, Signal::SIGCONT).unwrap();
        // It runs for a time that is not always the same.
        for _ in 0..draw(seed, looks) % 2000 {
            std::hint::spin_loop();
        }
    }
    println!("{looks} looks, {between} of them within a write, {counted} writes");
    assert!(between > 0);
}
