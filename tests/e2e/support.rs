//! A target with its image and its wire, for tests.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use initiator::client::Client;
use initiator::lab::{Deadline, Namespace, Process, Spawn, Veth};
use tempfile::TempDir;

/// The `aoede` that cargo built for these tests.
pub const AOEDE: &str = env!("CARGO_BIN_EXE_aoede");
/// The `aoeded` that cargo built for these tests.
pub const AOEDED: &str = env!("CARGO_BIN_EXE_aoeded");

/// A folder with an image and a state directory, and one in memory for the
/// cache.
pub struct Store {
    dir: TempDir,
    run: TempDir,
}

impl Store {
    /// An image of `sectors` zeros.
    pub fn new(sectors: u64) -> Store {
        let store = Store {
            dir: tempfile::tempdir().unwrap(),
            run: in_memory(),
        };
        let image = std::fs::File::create(store.image()).unwrap();
        image.set_len(sectors * 512).unwrap();
        store
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }

    /// The state directory; the target makes it when it needs it.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The files in it that keep what hosts have set.
    pub fn saved_states(&self) -> Vec<PathBuf> {
        let list = std::fs::read_dir(self.state()).into_iter().flatten();
        let paths = list.map(|entry| entry.unwrap().path());
        paths
            .filter(|path| !path.to_string_lossy().ends_with(".arena.toml"))
            .collect()
    }

    /// The run directory, where the cache's memory is.
    pub fn run(&self) -> &Path {
        self.run.path()
    }

    /// The directory of the arenas in it.
    pub fn arenas(&self) -> PathBuf {
        self.run().join("arena")
    }

    /// The arena that is in the run directory, the only one.
    pub fn arena(&self) -> PathBuf {
        only(&self.arenas(), ".arena")
    }

    /// The record of it.
    pub fn record(&self) -> PathBuf {
        only(&self.state(), ".arena.toml")
    }

    /// The bytes of `count` sectors of the image file.
    pub fn sectors(&self, lba: usize, count: usize) -> Vec<u8> {
        let bytes = std::fs::read(self.image()).unwrap();
        bytes[lba * 512..(lba + count) * 512].to_vec()
    }
}

/// How many times as much a sweep tries, as `tests/run --long` says.
pub fn test_factor() -> u32 {
    let factor = std::env::var("AOEDE_TEST_FACTOR").ok();
    factor.map_or(1, |factor| factor.parse().expect("a number"))
}

/// A folder in memory, where there is a place for one.
pub fn in_memory() -> TempDir {
    let shared = Path::new("/dev/shm");
    if shared.is_dir() {
        tempfile::tempdir_in(shared).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// The files of a folder whose names end so; none if there is no folder.
pub fn files(dir: &Path, end: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.to_string_lossy().ends_with(end))
        .collect()
}

/// Removes these files.
pub fn remove(files: Vec<PathBuf>) {
    for file in files {
        std::fs::remove_file(file).unwrap();
    }
}

fn only(dir: &Path, end: &str) -> PathBuf {
    match &files(dir, end)[..] {
        [path] => path.clone(),
        other => panic!("{other:?} instead of one '{end}'"),
    }
}

/// A command line for `aoede` as e1.1 on these interfaces: options, positions,
/// image, state and run directory.
pub fn command(namespace: &Namespace, store: &Store, nics: &[&str], options: &[&str]) -> Spawn {
    let run = [OsStr::new("--run-dir"), store.run().as_os_str()];
    // A test may have its own.
    let run = if options.contains(&"--run-dir") {
        &[][..]
    } else {
        &run
    };
    Spawn::new(AOEDE)
        .inside(namespace)
        .dir(store.path())
        .args(run)
        .args(options.iter().copied())
        .args(["1", "1"])
        .args(nics.iter().copied())
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
}

/// Starts a target as e1.1 and waits until it serves.
pub fn serve(namespace: &Namespace, store: &Store, nics: &[&str], options: &[&str]) -> Process {
    let mut process = command(namespace, store, nics, options).start().unwrap();
    process
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    process
}

/// Ends a target in order and expects that it calls it one.
pub fn stop(mut process: Process) -> Vec<String> {
    let status = process.stop(Deadline::seconds(20)).unwrap();
    assert!(status.success(), "{status}: {:?}", process.output());
    process.output()
}

/// Two hosts on one wire: `host` with `tgt0` for the target, `peer` with `ini0`
/// for an initiator.
pub struct Wire {
    /// Where the target runs.
    pub host: Namespace,
    /// Where the initiator runs.
    pub peer: Namespace,
}

impl Wire {
    /// A wire whose frames carry `mtu` bytes.
    pub fn new(mtu: u32) -> Wire {
        let (host, peer) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        // The pair goes with the namespaces.
        Veth::new(("tgt0", &host), ("ini0", &peer), mtu).unwrap();
        Wire { host, peer }
    }

    /// An initiator that has found e1.1.
    pub fn client(&self) -> Client {
        self.peer
            .enter(|| Client::connected("ini0", 1, 1))
            .unwrap()
            .unwrap()
    }
}
