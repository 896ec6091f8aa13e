//! A still image for backups: the shadow file comes and goes with the signals,
//! the image stays as it was, and nothing acknowledged is lost whatever dies.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use initiator::client::Client;
use initiator::lab::{self, Deadline, Need, Process};
use nix::sys::signal::Signal;

use crate::rig::QUICK;
use crate::support::{Store, Wire, command, files, serve, stop};
use crate::workshop::soon;

mod devices;
mod faults;
mod full;
mod orders;
mod starts;
mod sweeps;
mod trims;

const SECTORS: u64 = 4096;

/// A wire, an image, a place for a shadow.
struct Bed {
    wire: Wire,
    store: Store,
    /// Where the shadow goes, if not beside the image.
    place: Option<PathBuf>,
}

impl Bed {
    fn new() -> Bed {
        Bed::with(1500, SECTORS)
    }

    fn with(mtu: u32, sectors: u64) -> Bed {
        Bed {
            wire: Wire::new(mtu),
            store: Store::new(sectors),
            place: None,
        }
    }

    fn place(&self) -> &Path {
        self.place.as_deref().unwrap_or(self.store.path())
    }

    fn shadow(&self) -> PathBuf {
        self.place().join("shadow.img")
    }

    /// The shadow under all of its names that are there.
    fn shadows(&self) -> Vec<PathBuf> {
        let all = files(self.place(), "");
        let is = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with("shadow.img") && !name.ends_with(".lock")
        };
        all.into_iter().filter(is).collect()
    }

    /// The inode that PATH is now.
    fn inode(&self) -> Option<u64> {
        fs::symlink_metadata(self.shadow())
            .map(|path| path.ino())
            .ok()
    }

    fn options(&self, extra: &[&str]) -> Vec<String> {
        let shadow = self.shadow().display().to_string();
        let all = [&QUICK[..], &["-f", &shadow], extra].concat();
        all.into_iter().map(str::to_owned).collect()
    }

    fn start(&self, extra: &[&str]) -> Process {
        let options = self.options(extra);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        serve(&self.wire.host, &self.store, &["tgt0"], &options)
    }

    /// One that is told itself what to do with a shadow.
    fn start_with(&self, extra: &[&str]) -> Process {
        let options = [&QUICK[..], extra].concat();
        serve(&self.wire.host, &self.store, &["tgt0"], &options)
    }

    fn client(&self) -> Client {
        self.wire.client()
    }

    fn image(&self) -> Vec<u8> {
        fs::read(self.store.image()).unwrap()
    }

    /// The sectors as a host reads them.
    fn seen(&self) -> Vec<u8> {
        self.client().read_many(0, SECTORS as usize).unwrap()
    }

    /// Starts a target that must refuse with status 1; what it said.
    #[track_caller]
    fn refused(&self, options: &[&str]) -> String {
        let options = [&QUICK[..], options].concat();
        let mut process = command(&self.wire.host, &self.store, &["tgt0"], &options)
            .start()
            .unwrap();
        let status = process.wait(Deadline::seconds(20)).unwrap();
        let said = process.output().join("\n");
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        said
    }

    #[track_caller]
    fn freeze(&self, target: &Process) {
        let too_early = || {
            let lines = target.output();
            let is_told = |line: &&String| line.contains("still being merged");
            lines.iter().filter(is_told).count()
        };
        let mut known = too_early();
        order(target, 1);
        let _says = Says(target);
        until("the shadow appears", || {
            // The name of the last one goes a moment before its end.
            if too_early() > known {
                known = too_early();
                order(target, 1);
            }
            self.shadow().exists()
        });
    }

    #[track_caller]
    fn thaw(&self, target: &Process) {
        order(target, 2);
        let _says = Says(target);
        until("the shadow vanishes", || self.shadows().is_empty());
    }

    /// Nothing is left of a freeze.
    #[track_caller]
    fn nothing_left(&self) {
        assert_eq!(self.shadows(), [] as [PathBuf; 0]);
        let records = files(&self.store.state(), ".shadow.toml");
        assert_eq!(records, [] as [PathBuf; 0]);
    }
}

/// What a target has said is told when a test fails.
struct Says<'a>(&'a Process);

impl Drop for Says<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{:#?}", self.0.output());
        }
    }
}

/// USR1 so often, then USR2, with the pause that senders owe, also to the order
/// before.
pub fn order(target: &Process, count: usize) {
    try_order(target, count).unwrap();
}

/// The same, of a target that may be dead.
fn try_order(target: &Process, count: usize) -> initiator::error::Result<()> {
    for _ in 0..count {
        target.signal(Signal::SIGUSR1)?;
        all_taken(target);
    }
    target.signal(Signal::SIGUSR2)?;
    all_taken(target);
    Ok(())
}

/// Waits until no signal of a process is pending any more: equal ones that are
/// pending together are one, however long a pause the sender makes.
fn all_taken(target: &Process) {
    let status = format!("/proc/{}/status", target.pid());
    until("the signal to be taken", || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let mut pending = text.lines().filter(|line| line.starts_with("ShdPnd:"));
        pending.all(|line| line.ends_with("\t0000000000000000")) || text.contains("State:\tZ")
    });
}

#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = soon();
    while !done() {
        assert!(!deadline.passed(), "waited for too long: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn data(seed: u8, sectors: usize) -> Vec<u8> {
    (0..sectors * 512)
        .map(|i| (i / 7) as u8 ^ seed | 1)
        .collect()
}

#[test]
fn a_freeze_keeps_the_image_still_and_a_thaw_brings_everything_to_it() {
    if !lab::require("freeze and thaw", &[Need::Network]) {
        return;
    }
    for extra in [&[][..], &["-s"], &["-d"], &["--set", "disk_engine=threads"]] {
        println!("with {extra:?}");
        let bed = Bed::new();
        let target = bed.start(extra);
        let mut client = bed.client();
        client.write_many(0, &data(1, 1000)).unwrap();
        client.write_many(2001, &data(2, 3)).unwrap();
        bed.freeze(&target);
        let still = bed.image();
        assert!(still[..512_000] == data(1, 1000), "the image is not whole");
        assert!(still[2001 * 512..2004 * 512] == data(2, 3));
        // Over old data, beside it, and in parts of a block.
        client.write_many(500, &data(3, 1000)).unwrap();
        client.write_many(2002, &data(4, 1)).unwrap();
        client.write_many(4095, &data(5, 1)).unwrap();
        client.flush().unwrap();
        let seen = bed.seen();
        assert!(seen[500 * 512..1500 * 512] == data(3, 1000));
        assert!(seen[..500 * 512] == data(1, 1000)[..500 * 512]);
        assert!(seen[2001 * 512..2002 * 512] == data(2, 3)[..512]);
        assert!(seen[2002 * 512..2003 * 512] == data(4, 1));
        assert!(seen[4095 * 512..] == data(5, 1));
        assert!(bed.image() == still, "the image moves while it is frozen");
        bed.thaw(&target);
        assert!(bed.seen() == seen);
        let image = bed.image();
        for (n, (a, b)) in image.chunks(512).zip(seen.chunks(512)).enumerate() {
            assert!(a == b, "sector {n} was not merged");
        }
        bed.nothing_left();
        stop(target);
        assert!(bed.image() == seen);
    }
}

#[test]
fn killed_in_any_phase_nothing_acknowledged_is_lost() {
    if !lab::require("kills in each phase of a freeze", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let held = ["--set", "idle_flush=600000"];
    let mut target = bed.start(&held);
    let mut client = bed.client();
    client.write_many(0, &data(1, 600)).unwrap();
    bed.freeze(&target);
    let still = bed.image();
    client.write_many(100, &data(2, 600)).unwrap();
    // Frozen, with all of it in the cache.
    target.kill().unwrap();
    assert!(bed.image() == still);
    for extra in [&[][..], &held] {
        let mut target = bed.start(extra);
        assert!(bed.seen()[100 * 512..700 * 512] == data(2, 600));
        assert!(bed.image() == still, "the image moves while it is frozen");
        bed.client().write_many(3000, &data(3, 10)).unwrap();
        target.kill().unwrap();
    }
    // Thawing.
    let mut target = bed.start(&[]);
    order(&target, 2);
    target.kill().unwrap();
    let target = bed.start(&[]);
    order(&target, 2);
    until("the shadow vanishes", || bed.shadows().is_empty());
    let seen = bed.seen();
    assert!(seen[..100 * 512] == data(1, 600)[..100 * 512]);
    assert!(seen[100 * 512..700 * 512] == data(2, 600));
    assert!(seen[3000 * 512..3010 * 512] == data(3, 10));
    bed.nothing_left();
    stop(target);
    assert!(bed.image() == seen);
}

#[test]
fn killed_without_an_arena_nothing_acknowledged_is_lost() {
    if !lab::require("kills in a freeze without an arena", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    // Nothing can be made in /proc, so writes go through.
    let through = [
        "--run-dir",
        "/proc/aoede",
        "--set",
        "idle_flush=600000",
        "--set",
        "max_dirty_age=600000",
    ];
    let mut target = bed.start(&through);
    bed.client().write_many(0, &data(1, 600)).unwrap();
    bed.freeze(&target);
    let still = bed.image();
    let mut expected = bed.seen();
    let write = |expected: &mut Vec<u8>, at: usize, new: Vec<u8>| {
        bed.client().write_many(at as u64, &new).unwrap();
        expected[at * 512..at * 512 + new.len()].copy_from_slice(&new);
    };
    for n in 0..5 {
        write(&mut expected, 100 + 50 * n, data(n as u8 + 2, 3));
        target.kill().unwrap();
        target = bed.start(&through);
        assert!(bed.seen() == expected, "frozen, kill {n}");
        assert!(bed.image() == still, "the image moves while it is frozen");
    }
    // Writes of the thaw: over what is to be merged, and beside it.
    order(&target, 2);
    for n in 0..5 {
        write(&mut expected, 101 + 50 * n, data(n as u8 + 20, 1));
        write(&mut expected, 2000 + n, data(n as u8 + 30, 1));
        target.kill().unwrap();
        target = bed.start(&through);
        assert!(bed.seen() == expected, "thawing, kill {n}");
        if !bed.shadows().is_empty() {
            try_order(&target, 2).ok();
        }
    }
    until("the shadow vanishes", || bed.shadows().is_empty());
    stop(target);
    assert!(bed.image() == expected);
}

#[test]
fn a_start_without_the_shadow_is_refused() {
    if !lab::require("a start that forgets the shadow", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let mut target = bed.start(&[]);
    bed.freeze(&target);
    bed.client().write_many(0, &data(1, 8)).unwrap();
    target.kill().unwrap();
    let path = bed.shadow().display().to_string();
    for options in [&[][..], &["-f", "/nowhere-else"]] {
        let said = bed.refused(options);
        assert!(said.contains(&format!("start with -f {path}")), "{said}");
        assert!(said.contains("--discard-shadow"), "{said}");
    }
    let said = bed.refused(&["-r"]);
    let remedy = format!("start once without -r and with -f {path}");
    assert!(said.contains(&remedy), "{said}");
    let away = bed.store.path().join("away");
    fs::rename(bed.shadow(), &away).unwrap();
    let said = bed.refused(&["-f", &path]);
    let marker = format!("{path}.thaw is the marker of shadow {path}, which is not there");
    assert!(said.contains(&marker), "{said}");
    let thaw = bed.store.path().join("shadow.img.thaw");
    let marker = fs::read(&thaw).unwrap();
    fs::remove_file(&thaw).unwrap();
    let said = bed.refused(&["-f", &path]);
    assert!(said.contains("is not there, and holds writes"), "{said}");
    fs::write(&thaw, marker).unwrap();
    fs::rename(&away, bed.shadow()).unwrap();
    let target = bed.start(&[]);
    assert!(bed.seen()[..4096] == data(1, 8));
    bed.thaw(&target);
    stop(target);
    assert!(bed.image()[..4096] == data(1, 8));
}

#[test]
fn a_stop_merges_or_keeps_as_told() {
    if !lab::require("stops while frozen", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let target = bed.start(&["--set", "on_stop=keep"]);
    bed.freeze(&target);
    let still = bed.image();
    bed.client().write_many(7, &data(1, 300)).unwrap();
    stop(target);
    assert!(bed.shadow().exists() && bed.image() == still);
    let target = bed.start(&[]);
    assert!(bed.seen()[7 * 512..307 * 512] == data(1, 300));
    assert!(bed.image() == still);
    stop(target);
    bed.nothing_left();
    assert!(bed.image()[7 * 512..307 * 512] == data(1, 300));
}

#[test]
fn without_a_shadow_writes_wait_and_everything_else_goes_on() {
    if !lab::require("a freeze without a shadow", &[Need::Network]) {
        return;
    }
    let (wire, store) = (Wire::new(1500), Store::new(SECTORS));
    let mut target = serve(&wire.host, &store, &["tgt0"], &QUICK);
    let mut client = wire.client();
    client.write_many(0, &data(1, 64)).unwrap();
    order(&target, 1);
    target.wait_for_line("is quiesced", soon()).unwrap();
    assert!(store.sectors(0, 64) == data(1, 64));
    assert_eq!(client.read_many(0, 64).unwrap(), data(1, 64));
    client.flush().unwrap();
    client.identify().unwrap();
    order(&target, 2);
    target.wait_for_line("answered again", soon()).unwrap();
    client.write_many(0, &data(2, 64)).unwrap();
    stop(target);
    assert!(store.sectors(0, 64) == data(2, 64));
}
