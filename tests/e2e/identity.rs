//! Which image is which, and who is believed about it: parts of one file behind
//! loop devices, disks without a serial, clocks that were set, locks of strangers.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use initiator::client::Client;
use initiator::lab::{self, Deadline, Need, Process, Spawn, wait_until};
use nix::fcntl::{Flock, FlockArg};
use shadow::stamp::{Clocks, since_boot};

use crate::freeze::order;
use crate::rig::QUICK;
use crate::support::{AOEDE, Store, Wire, files, stop};
use crate::workshop::{Loop, detach, sh, soon};

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

    fn shadow(&self) -> PathBuf {
        self.store.path().join("shadow.img")
    }

    /// Freezes an image, writes a sector of `byte` to its shadow, and dies.
    fn freeze_and_die(&self, image: &Path, byte: u8) {
        let shadow = self.shadow().display().to_string();
        let mut target = self.serve(1, image, &["-f", &shadow]);
        order(&target, 1);
        let frozen = || self.shadow().exists();
        wait_until("the shadow appears", soon(), frozen).unwrap();
        let mut client = self.client(1);
        client.write_many(3, &filled(byte)).unwrap();
        client.flush().unwrap();
        target.kill().unwrap();
    }

    /// Thaws what a target serves, and stops it.
    fn thaw_and_stop(&self, target: Process) {
        order(&target, 2);
        let gone = || !self.shadow().exists();
        wait_until("the shadow vanishes", soon(), gone).unwrap();
        stop(target);
    }

    fn client(&self, slot: u8) -> Client {
        let connect = || Client::connected("ini0", 1, slot);
        self.wire.peer.enter(connect).unwrap().unwrap()
    }
}

/// A part of a file behind a loop device, from MiB `first` on.
struct Part {
    path: PathBuf,
}

impl Part {
    fn new(file: &Path, first: u64, mib: u64) -> Part {
        let (offset, limit) = (first << 20, mib << 20);
        let path = sh(&format!(
            "losetup --find --show --offset {offset} --sizelimit {limit} {}",
            file.display()
        ));
        Part {
            path: path.trim().into(),
        }
    }

    /// Shows another part under the same number.
    fn show(&self, file: &Path, first: u64, mib: u64) {
        detach(&self.path);
        let (offset, limit) = (first << 20, mib << 20);
        sh(&format!(
            "losetup --offset {offset} --sizelimit {limit} {} {}",
            self.path.display(),
            file.display()
        ));
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.path).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("{} is left behind", self.path.display());
        }
    }
}

const ZRAM: &str = "/sys/class/zram-control";
const ZRAM_NEEDS: [Need<'static>; 2] = [Need::Network, Need::Path(ZRAM)];

/// A disk of memory, which has no serial.
struct Zram {
    number: u32,
}

impl Zram {
    fn new() -> Zram {
        let number = fs::read_to_string(format!("{ZRAM}/hot_add")).unwrap();
        let zram = Zram {
            number: number.trim().parse().unwrap(),
        };
        fs::write(format!("/sys/block/zram{}/disksize", zram.number), "8M").unwrap();
        zram
    }

    fn path(&self) -> PathBuf {
        format!("/dev/zram{}", self.number).into()
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        // A process that looked at it when it came may have it open for a moment.
        let remove = || fs::write(format!("{ZRAM}/hot_remove"), self.number.to_string()).is_ok();
        if wait_until("the disk is free", Deadline::seconds(10), remove).is_err() {
            eprintln!("{} is left behind", self.path().display());
        }
    }
}

/// The first sectors of a disk or file, past the page cache of others.
fn sector_of(image: &Path, lba: u64) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    let file = File::open(image).unwrap();
    file.read_exact_at(&mut bytes, lba * 512).unwrap();
    bytes
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

/// What `aoede-shadow` answers: its status and its lines.
fn tool(arguments: &[&Path]) -> (bool, String) {
    let tool = Path::new(AOEDE).with_file_name("aoede-shadow");
    let answer = Command::new(tool).args(arguments).output().unwrap();
    let lines = [answer.stdout, answer.stderr].concat();
    let lines = String::from_utf8(lines).unwrap();
    (answer.status.success(), lines)
}

#[test]
fn the_shadow_of_one_part_of_a_file_is_never_that_of_another_part() {
    if !lab::require("two parts of a frozen file", &Loop::NEEDS) {
        return;
    }
    let bed = Bed::new(64 << 11);
    let file = bed.store.image();
    let device = Part::new(&file, 1, 8);
    bed.freeze_and_die(&device.path, 1);
    // The arena's writes are in the shadow: only that is left.
    let shadow = bed.shadow().display().to_string();
    let with = ["-f", &shadow, "--set", "on_stop=keep"];
    stop(bed.serve(1, &device.path, &with));
    // Another part, under the number of the first.
    device.show(&file, 32, 8);
    let said = bed.refused(1, &device.path, &with);
    assert!(said.contains("another image"), "{said}");
    let (merge, check) = (Path::new("merge"), Path::new("check"));
    let state = bed.store.state();
    let merged = [
        merge,
        Path::new("--state-dir"),
        &state,
        &bed.shadow(),
        &device.path,
    ];
    for arguments in [&merged[..], &[check, &bed.shadow(), &device.path]] {
        let (is_done, said) = tool(arguments);
        assert!(!is_done && said.contains("another image"), "{said}");
    }
    assert_eq!(sector_of(&device.path, 3), filled(0));
    // Without a shadow it is served: nothing of it is frozen.
    stop(bed.serve(1, &device.path, &[]));
    // A part that shares bytes with the first may be meant.
    device.show(&file, 1, 9);
    let said = bed.refused(1, &device.path, &with);
    assert!(said.contains("not certain"), "{said}");
    assert!(said.contains("size limit 8388608"), "{said}");
    assert!(said.contains("size limit 9437184"), "{said}");
    let (is_done, said) = tool(&merged);
    assert!(!is_done && said.contains("not certain"), "{said}");
    let said = bed.refused(1, &device.path, &[]);
    assert!(
        said.contains("not certain") && said.contains(&shadow),
        "{said}"
    );
    // And the right one is as it was.
    device.show(&file, 1, 8);
    let target = bed.serve(1, &device.path, &["-f", &shadow]);
    assert_eq!(bed.client(1).read_many(3, 1).unwrap(), filled(1));
    bed.thaw_and_stop(target);
    assert_eq!(sector_of(&device.path, 3), filled(1));
}

#[test]
fn a_file_frozen_behind_a_loop_device_is_not_served_without_it() {
    if !lab::require("a file frozen behind a loop device", &Loop::NEEDS) {
        return;
    }
    let bed = Bed::new(SECTORS);
    let file = bed.store.image();
    let device = Loop::attach(&file, 512).unwrap();
    bed.freeze_and_die(&device.path, 1);
    let shadow = bed.shadow().display().to_string();
    stop(bed.serve(1, &device.path, &["-f", &shadow, "--set", "on_stop=keep"]));
    drop(device);
    for options in [&[][..], &["-f", &shadow], &["--discard-shadow"]] {
        let said = bed.refused(1, &file, options);
        assert!(said.contains("behind a loop device"), "{said}");
        assert!(said.contains("--accept-shadow"), "{said}");
    }
    // The operator knows that it is the right one, and the shadow knows from then on.
    let accept = ["-f", &shadow, "--accept-shadow", "--set", "on_stop=keep"];
    stop(bed.serve(1, &file, &accept));
    let target = bed.serve(1, &file, &["-f", &shadow]);
    assert_eq!(bed.client(1).read_many(3, 1).unwrap(), filled(1));
    bed.thaw_and_stop(target);
    assert_eq!(bed.store.sectors(3, 1), filled(1));
    assert!(files(&bed.store.state(), ".shadow.toml").is_empty());
}

#[test]
fn the_shadow_of_a_disk_without_a_serial_is_not_taken_for_that_of_the_next_disk() {
    if !lab::require("disks without a serial", &ZRAM_NEEDS) {
        return;
    }
    let bed = Bed::new(8);
    let shadow = bed.shadow().display().to_string();
    let mut disk = Zram::new();
    bed.freeze_and_die(&disk.path(), 1);
    let with = ["-f", &shadow, "--set", "on_stop=keep"];
    stop(bed.serve(1, &disk.path(), &with));
    // Under the same number, if nobody else takes it, and of the same size.
    drop(disk);
    disk = Zram::new();
    for options in [&with[..], &[]] {
        let said = bed.refused(1, &disk.path(), options);
        assert!(said.contains("not the disk that was plugged in"), "{said}");
        assert!(said.matches("diskseq").count() == 2, "{said}");
    }
    let (is_done, said) = tool(&[Path::new("check"), &bed.shadow(), &disk.path()]);
    assert!(!is_done && said.contains("not certain"), "{said}");
    assert_eq!(sector_of(&disk.path(), 3), filled(0));
    // Given up on this disk, it is set aside.
    stop(bed.serve(1, &disk.path(), &["-f", &shadow, "--discard-shadow"]));
    assert!(bed.store.path().join("shadow.img.discarded").exists());
    stop(bed.serve(1, &disk.path(), &[]));
    assert_eq!(sector_of(&disk.path(), 3), filled(0));
}

/// The arena of a served image in which hosts have written this sector.
fn arena_with(bed: &Bed, sector: &[u8]) -> PathBuf {
    let arenas = files(&bed.store.arenas(), ".arena");
    let has = |path: &PathBuf| {
        let bytes = fs::read(path).unwrap();
        bytes.chunks_exact(512).any(|found| found == sector)
    };
    let found: Vec<_> = arenas.into_iter().filter(has).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

#[test]
fn parts_of_a_file_that_share_no_byte_do_not_stand_in_each_others_way() {
    if !lab::require("two served parts of a file", &Loop::NEEDS) {
        return;
    }
    let bed = Bed::new(64 << 11);
    let file = bed.store.image();
    let parts = [Part::new(&file, 1, 8), Part::new(&file, 32, 8)];
    let die = || {
        let mut targets: Vec<_> = (1..=2)
            .map(|slot| bed.serve(slot, &parts[slot as usize - 1].path, &LATE))
            .collect();
        for slot in 1..=2 {
            bed.client(slot).write_many(3, &filled(slot)).unwrap();
        }
        for target in &mut targets {
            target.kill().unwrap();
        }
    };
    // Whatever is said at the start of one, nothing becomes of the other's.
    for options in [&[][..], &["--replay-arena"], &["--discard-arena"]] {
        die();
        stop(bed.serve(1, &parts[0].path, options));
        let sectors = || [0, 1].map(|n| sector_of(&parts[n].path, 3));
        assert_eq!(sectors(), [filled(1), filled(0)], "{options:?}");
        // Nor does the file itself, of which other sectors are served.
        stop(bed.serve(3, &file, &["-o", &(50 << 11).to_string()]));
        stop(bed.serve(2, &parts[1].path, &[]));
        assert_eq!(sectors(), [filled(1), filled(2)], "{options:?}");
        fs::write(&file, vec![0; 64 << 20]).unwrap();
    }
    // With the file as a whole it is not certain.
    die();
    let said = bed.refused(3, &file, &["-o", &(1 << 11).to_string(), "-l", "2048"]);
    assert!(said.contains("behind a loop device"), "{said}");
    let said = bed.refused(3, &file, &["--replay-arena"]);
    for slot in 1..=2 {
        let arena = arena_with(&bed, &filled(slot)).display().to_string();
        assert!(said.contains(&arena), "{said}");
    }
    for slot in 1..=2 {
        stop(bed.serve(slot, &parts[slot as usize - 1].path, &[]));
    }
}

#[test]
fn of_several_arenas_in_doubt_the_operator_names_the_one() {
    if !lab::require("two disks without a serial", &ZRAM_NEEDS) {
        return;
    }
    let bed = Bed::new(8);
    let mut disks = [Zram::new(), Zram::new()];
    let die = |disks: &[Zram; 2]| {
        let mut targets: Vec<_> = (1..=2)
            .map(|slot| bed.serve(slot, &disks[slot as usize - 1].path(), &LATE))
            .collect();
        for slot in 1..=2 {
            bed.client(slot).write_many(3, &filled(slot)).unwrap();
        }
        for target in &mut targets {
            target.kill().unwrap();
        }
    };
    die(&disks);
    drop(disks);
    // Both are plugged in again.
    disks = [Zram::new(), Zram::new()];
    let paths = [1, 2].map(|slot| arena_with(&bed, &filled(slot)).display().to_string());
    for options in [&[][..], &["--replay-arena"], &["--discard-arena"]] {
        let said = bed.refused(1, &disks[0].path(), options);
        assert!(
            said.contains(&paths[0]) && said.contains(&paths[1]),
            "{said}"
        );
        assert!(said.contains("--replay-arena=PATH"), "{said}");
        assert!(said.matches("diskseq").count() == 3, "{said}");
    }
    // Giving one up says nothing of the other.
    let discard = format!("--discard-arena={}", paths[1]);
    let said = bed.refused(1, &disks[0].path(), &[&discard]);
    assert!(
        said.contains(&paths[0]) && !said.contains(&paths[1]),
        "{said}"
    );
    assert_eq!(
        disks.each_ref().map(|disk| sector_of(&disk.path(), 3)),
        [filled(0), filled(0)]
    );
    // The one that is named, and the other stays for its disk.
    let replay = format!("--replay-arena={}", paths[0]);
    let said = stop(bed.serve(1, &disks[0].path(), &[&replay])).join("\n");
    assert!(
        said.contains(&format!(
            "refused until it is set aside with --discard-arena={}",
            paths[1]
        )),
        "{said}"
    );
    assert_eq!(sector_of(&disks[0].path(), 3), filled(1));
    assert!(Path::new(&paths[1]).exists());
    stop(bed.serve(2, &disks[1].path(), &["--replay-arena"]));
    assert_eq!(sector_of(&disks[1].path(), 3), filled(2));
    // One that is given up is not gone.
    die(&disks);
    drop(disks);
    disks = [Zram::new(), Zram::new()];
    let both = [1, 2].map(|slot| {
        let arena = arena_with(&bed, &filled(slot));
        format!("--discard-arena={}", arena.display())
    });
    stop(bed.serve(1, &disks[0].path(), &[&both[0], &both[1]]));
    assert_eq!(sector_of(&disks[0].path(), 3), filled(0));
    assert_eq!(files(&bed.store.arenas(), ".arena.discarded").len(), 2);
    assert!(files(&bed.store.state(), ".arena.toml").is_empty());
}

#[test]
fn a_frozen_image_whose_record_is_lost_is_not_served_without_its_shadow() {
    if !lab::require("a frozen image without its record", &[Need::Network]) {
        return;
    }
    // With writes of the freeze in the arena, and with all of them in the shadow.
    for options in [&LATE[..], &[]] {
        let bed = Bed::new(SECTORS);
        let image = bed.store.image();
        let shadow = bed.shadow().display().to_string();
        let with = [&["-f", &shadow][..], options].concat();
        let mut target = bed.serve(1, &image, &with);
        order(&target, 1);
        let frozen = || bed.shadow().exists();
        wait_until("the shadow appears", soon(), frozen).unwrap();
        let mut client = bed.client(1);
        client.write_many(3, &filled(1)).unwrap();
        if options.is_empty() {
            client.flush().unwrap();
        }
        target.kill().unwrap();
        fs::remove_dir_all(bed.store.state()).unwrap();
        let other = bed.store.path().join("other.img").display().to_string();
        for options in [
            &[][..],
            &["-f", &other],
            &["--discard-shadow"],
            &["--discard-arena"],
        ] {
            let said = bed.refused(1, &image, options);
            assert!(said.contains(&format!("start with -f {shadow}")), "{said}");
        }
        assert_eq!(bed.store.sectors(3, 1), filled(0));
        let target = bed.serve(1, &image, &["-f", &shadow]);
        assert_eq!(bed.client(1).read_many(3, 1).unwrap(), filled(1));
        bed.thaw_and_stop(target);
        assert_eq!(bed.store.sectors(3, 1), filled(1));
        // Once it is merged, nothing is noted any more.
        let mut target = bed.serve(1, &image, &["-f", &shadow]);
        order(&target, 1);
        wait_until("the shadow appears", soon(), || bed.shadow().exists()).unwrap();
        order(&target, 2);
        wait_until("the shadow vanishes", soon(), || !bed.shadow().exists()).unwrap();
        bed.client(1).write_many(3, &filled(2)).unwrap();
        target.kill().unwrap();
        stop(bed.serve(1, &image, &[]));
        assert_eq!(bed.store.sectors(3, 1), filled(2));
    }
}

#[test]
fn the_shadow_of_a_frozen_image_whose_record_is_lost_can_be_given_up() {
    if !lab::require("a frozen image that is given up", &[Need::Network]) {
        return;
    }
    let bed = Bed::new(SECTORS);
    let image = bed.store.image();
    bed.freeze_and_die(&image, 1);
    fs::remove_dir_all(bed.store.state()).unwrap();
    let shadow = bed.shadow().display().to_string();
    stop(bed.serve(1, &image, &["-f", &shadow, "--discard-shadow"]));
    assert!(bed.store.path().join("shadow.img.discarded").exists());
    stop(bed.serve(1, &image, &[]));
}
