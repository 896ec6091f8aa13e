//! Which image is which, and who is believed about it: parts of one file behind
//! loop devices, disks without a serial, clocks that were set, locks of strangers.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use initiator::client::Client;
use initiator::lab::{self, Deadline, Need, Process, Spawn};
use nix::fcntl::{Flock, FlockArg};
use shadow::stamp::{Clocks, since_boot};

use crate::rig::QUICK;
use crate::support::{AOEDE, Store, Wire, files, stop};

const SECTORS: u64 = 4096;
/// So that only a stop writes anything to the image.
const LATE: [&str; 4] = [
    "--set",
    "idle_flush=600000",
    "--set",
    "max_dirty_age=600000",
];

/// A wire, a state and a run directory, and a file.
struct Bed {
    wire: Wire,
    store: Store,
}

impl Bed {
    fn new(sectors: u64) -> Bed {
        Bed {
            wire: Wire::new(1500),
            store: Store::new(sectors),
        }
    }

    /// A target of this image as e1.SLOT.
    fn spawn(&self, slot: u8, image: &Path, options: &[&str]) -> Process {
        Spawn::new(AOEDE)
            .inside(&self.wire.host)
            .args(QUICK)
            .args(options.iter().copied())
            .arg("--state-dir")
            .arg(self.store.state())
            .arg("--run-dir")
            .arg(self.store.run())
            .args(["1", &slot.to_string(), "tgt0"])
            .arg(image)
            .start()
            .unwrap()
    }

    fn serve(&self, slot: u8, image: &Path, options: &[&str]) -> Process {
        let mut target = self.spawn(slot, image, options);
        let served = format!(": e1.{slot}, ");
        target
            .wait_for_line(&served, Deadline::seconds(20))
            .unwrap();
        target
    }

    /// What a target says that must refuse with status 1.
    #[track_caller]
    fn refused(&self, slot: u8, image: &Path, options: &[&str]) -> String {
        let mut target = self.spawn(slot, image, options);
        let status = target.wait(Deadline::seconds(20)).unwrap();
        let said = target.output().join("\n");
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        said
    }

    fn client(&self, slot: u8) -> Client {
        let connect = || Client::connected("ini0", 1, slot);
        self.wire.peer.enter(connect).unwrap().unwrap()
    }
}

fn filled(byte: u8) -> Vec<u8> {
    vec![byte; 512]
}

#[test]
fn nobody_who_locks_the_state_directory_delays_a_stop() {
    if !lab::require("a lock on the state directory", &[Need::Network]) {
        return;
    }
    let bed = Bed::new(SECTORS);
    fs::create_dir(bed.store.state()).unwrap();
    let directory = File::open(bed.store.state()).unwrap();
    let _lock = Flock::lock(directory, FlockArg::LockExclusive).unwrap();
    let target = bed.serve(1, &bed.store.image(), &[]);
    bed.client(1).write_many(3, &filled(1)).unwrap();
    stop(target);
    assert_eq!(bed.store.sectors(3, 1), filled(1));
    assert!(files(&bed.store.state(), ".arena.toml").is_empty());
}

#[test]
fn a_restored_image_is_refused_though_the_clock_was_ahead_when_the_target_died() {
    if !lab::require("a clock that was ahead", &[Need::Network]) {
        return;
    }
    let bed = Bed::new(SECTORS);
    let image = bed.store.image();
    let mut target = bed.serve(1, &image, &LATE);
    bed.client(1).write_many(3, &filled(1)).unwrap();
    target.kill().unwrap();
    // As it is left by one that died with writes in flight while the clock was an
    // hour ahead: words 19, 20 and 31.
    const HOUR: u64 = 3600 * 1_000_000_000;
    let arena = OpenOptions::new().write(true).open(bed.store.arena());
    let arena = arena.unwrap();
    let real = Clocks::now().real + HOUR;
    for (word, value) in [
        (19, 1),
        (20, real),
        (31, real.wrapping_sub(since_boot().unwrap())),
    ] {
        arena
            .write_all_at(&u64::to_le_bytes(value), word * 8)
            .unwrap();
    }
    fs::write(&image, vec![b'R'; SECTORS as usize * 512]).unwrap();
    let said = bed.refused(1, &image, &[]);
    assert!(said.contains("changed by someone else"), "{said}");
    assert!(said.contains("clock"), "{said}");
    assert_eq!(bed.store.sectors(3, 1), filled(b'R'));
    // Which writes count is for the operator to say.
    stop(bed.serve(1, &image, &["--replay-arena"]));
    assert_eq!(bed.store.sectors(3, 1), filled(1));
}

#[test]
fn an_image_that_is_made_is_for_our_user_alone() {
    if !lab::require("--create", &[Need::Network]) {
        return;
    }
    let bed = Bed::new(SECTORS);
    let image = bed.store.path().join("new.img");
    stop(bed.serve(1, &image, &["--create", "1M"]));
    let mode = fs::metadata(&image).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}
