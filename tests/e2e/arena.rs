//! What a process that was killed has left: brought to the image before anyone
//! is answered, or refused with a remedy, and never silently passed over.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use initiator::client::Client;
use initiator::lab::{self, Deadline, Namespace, Need, Process, Spawn};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::rig::QUICK;
use crate::support::{AOEDE, Store, Wire, command, files, in_memory, serve, stop};
use crate::workshop::{Loop, attach, detach, sh};

/// What is dirty stays so until someone asks or the process ends.
const HELD: [&str; 4] = [
    "--set",
    "idle_flush=600000",
    "--set",
    "max_dirty_age=600000",
];
/// A cache that is quickly made.
const LITTLE: [&str; 2] = ["--set", "cache_size=1M"];

/// A wire and an image of 4096 sectors, with a target now and then.
struct Bed {
    wire: Wire,
    store: Store,
}

impl Bed {
    fn new() -> Bed {
        Bed {
            wire: Wire::new(1500),
            store: Store::new(4096),
        }
    }

    fn options<'a>(extra: &[&'a str]) -> Vec<&'a str> {
        [&QUICK[..], &HELD, &LITTLE, extra].concat()
    }

    fn start(&self, extra: &[&str]) -> Process {
        serve(
            &self.wire.host,
            &self.store,
            &["tgt0"],
            &Bed::options(extra),
        )
    }

    /// A start that must be refused; what it said.
    #[track_caller]
    fn refused(&self, extra: &[&str]) -> String {
        let command = command(
            &self.wire.host,
            &self.store,
            &["tgt0"],
            &Bed::options(extra),
        );
        refused(command)
    }

    /// Writes 40 sectors at 1000, and is killed before the image has them.
    fn die(&self, extra: &[&str]) {
        let mut target = self.start(extra);
        self.wire.client().write_many(1000, &data(40)).unwrap();
        target.kill().unwrap();
        assert!(self.untouched(), "written back already");
    }

    fn untouched(&self) -> bool {
        let bytes = fs::read(self.store.image()).unwrap();
        bytes.iter().all(|byte| *byte == 0)
    }

    /// Asserts that the image has what was acknowledged, before anyone asks.
    #[track_caller]
    fn whole(&self) {
        assert!(self.store.sectors(1000, 40) == data(40), "writes are lost");
        assert!(self.store.sectors(0, 1000).iter().all(|byte| *byte == 0));
        assert!(self.store.sectors(1040, 1000).iter().all(|byte| *byte == 0));
    }

    /// A start that brings the 40 sectors to the image, and an orderly stop.
    #[track_caller]
    fn replays(&self, extra: &[&str]) {
        let mut target = self.start(extra);
        self.whole();
        assert_eq!(self.wire.client().read_many(1000, 40).unwrap(), data(40));
        let output = said(&mut target, "40 acknowledged sectors (20 KiB)");
        assert!(output.contains("brought to the image"), "{output}");
        assert!(output.contains("e1.1: a target of this"), "{output}");
        stop(target);
        self.whole();
        self.nothing_left();
    }

    /// A start that is refused, changes nothing, and goes on when told to give
    /// up.
    #[track_caller]
    fn is_given_up_only_when_told(&self, why: &str) {
        let before = fs::read(self.store.image()).unwrap();
        for _ in 0..2 {
            let said = self.refused(&[]);
            assert!(said.contains(why), "no '{why}' in: {said}");
            assert!(said.contains("--discard-arena"), "no remedy in: {said}");
            assert!(said.contains(": e1.1: arena "), "no export in: {said}");
        }
        let said = stop(self.start(&["--discard-arena"])).join("\n");
        assert!(
            fs::read(self.store.image()).unwrap() == before,
            "the image was written"
        );
        assert!(said.contains("discarded (--discard-arena)"), "{said}");
        assert!(said.contains("e1.1: arena "), "{said}");
        crate::support::remove(files(&self.store.arenas(), ".arena.discarded"));
        self.nothing_left();
    }

    #[track_caller]
    fn nothing_left(&self) {
        assert_eq!(files(&self.store.arenas(), ""), [] as [PathBuf; 0]);
        assert_eq!(
            files(&self.store.state(), ".arena.toml"),
            [] as [PathBuf; 0]
        );
    }
}

fn data(sectors: usize) -> Vec<u8> {
    (0..sectors * 512).map(|i| (i / 3) as u8 | 1).collect()
}

#[track_caller]
fn refused(command: Spawn) -> String {
    let mut process = command.start().unwrap();
    let status = process.wait(Deadline::seconds(20)).unwrap();
    let said = process.output().join("\n");
    assert_eq!(status.code(), Some(1), "{said}");
    said
}

#[track_caller]
fn said(process: &mut Process, what: &str) -> String {
    // Messages have a thread of their own, and come when they come.
    let deadline = Deadline::seconds(10);
    loop {
        let late = deadline.passed();
        let output = process.output().join("\n");
        if output.contains(what) {
            return output;
        }
        assert!(!late, "no '{what}' in: {output}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Words of an arena: its checksum, the heartbeat, and mtime and ctime of the
/// image as they were seen last.
const SUM: u64 = 18;
const HEARTBEAT: u64 = 20;
const SEEN: [u64; 2] = [22, 23];

/// Words of an arena's file.
struct Words(File);

impl Words {
    fn of(path: &Path) -> Words {
        let file = File::options().read(true).write(true).open(path).unwrap();
        Words(file)
    }

    fn get(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, index * 8).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn set(&self, index: u64, value: u64) {
        self.0
            .write_all_at(&value.to_le_bytes(), index * 8)
            .unwrap();
    }

    /// Makes the header's checksum right for what stands there.
    fn seal(&self) {
        let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
        let mut digest = crc.digest();
        for index in 0..SUM {
            digest.update(&self.get(index).to_le_bytes());
        }
        self.set(SUM, digest.finalize());
    }
}

#[test]
fn what_was_acknowledged_is_on_the_image_before_the_first_answer() {
    if !lab::require("replay after kill -9", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    // Killed again right after it has begun to serve: once is enough, and more
    // does no harm.
    let mut target = bed.start(&[]);
    bed.whole();
    target.kill().unwrap();
    let mut target = bed.start(&[]);
    bed.whole();
    assert!(!target.output().join("\n").contains("acknowledged sectors"));
    // A version over a version, in part.
    let mut client = bed.wire.client();
    client.write_many(1000, &vec![9; 40 * 512]).unwrap();
    client.flush().unwrap();
    client.write_many(1000, &data(40)[..39 * 512]).unwrap();
    client.write_many(1039, &data(40)[39 * 512..]).unwrap();
    target.kill().unwrap();
    bed.replays(&[]);
}

#[test]
fn an_orderly_stop_leaves_no_arena_and_no_record() {
    if !lab::require("orderly stop", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let target = bed.start(&[]);
    let _both = (bed.store.arena(), bed.store.record());
    bed.wire.client().write_many(1000, &data(40)).unwrap();
    stop(target);
    bed.whole();
    bed.nothing_left();
    // Nor does one that only reads, which needs none.
    let target = bed.start(&["-r"]);
    bed.nothing_left();
    stop(target);
    // Giving up where there is nothing is harmless.
    stop(bed.start(&["--discard-arena"]));
    bed.whole();
    bed.nothing_left();
}

#[test]
fn giving_up_does_not_touch_an_arena_that_is_good() {
    if !lab::require("--discard-arena with a good arena", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    bed.replays(&["--discard-arena"]);
}

#[test]
fn an_arena_of_another_image_is_refused() {
    if !lab::require("arena of another image", &[Need::Network]) {
        return;
    }
    let (bed, other) = (Bed::new(), Bed::new());
    bed.die(&[]);
    other.die(&[]);
    fs::copy(other.store.arena(), bed.store.arena()).unwrap();
    bed.is_given_up_only_when_told("belongs to another image");
    assert!(bed.untouched() && other.untouched());
    other.replays(&[]);
}

#[test]
fn a_damaged_arena_is_refused() {
    if !lab::require("damaged arena", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 5] = [
        ("no arena at all", |path| Words::of(path).set(0, 1)),
        ("fails its checksum", |path| Words::of(path).set(8, 7)),
        ("its length", |path| {
            Words::of(path).0.set_len(8192).unwrap()
        }),
        ("shorter than its header", |path| {
            Words::of(path).0.set_len(5).unwrap()
        }),
        // A slot that counts, and for nothing.
        ("means nothing", |path| {
            let words = Words::of(path);
            let slot = (0..256).map(|n| 64 + 8 * n).find(|at| words.get(*at) > 0);
            words.set(slot.unwrap() + 2, 0);
        }),
    ];
    for (why, damage) in damages {
        bed.die(&[]);
        damage(&bed.store.arena());
        bed.is_given_up_only_when_told(why);
        assert!(bed.untouched());
    }
}

#[test]
fn an_arena_of_an_unknown_version_is_refused() {
    if !lab::require("arena of an unknown version", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let words = Words::of(&bed.store.arena());
    words.set(1, words.get(1) + 97);
    bed.is_given_up_only_when_told("format 99 is not known here");
    assert!(bed.untouched());
}

/// Makes arena and record those of another boot.
fn reboot(bed: &Bed) {
    let words = Words::of(&bed.store.arena());
    let boot = words.get(3);
    words.set(3, boot ^ 1);
    words.seal();
    let record = fs::read_to_string(bed.store.record()).unwrap();
    let forged = record.replace(&format!("{boot:016x}"), &format!("{:016x}", boot ^ 1));
    assert_ne!(record, forged);
    fs::write(bed.store.record(), forged).unwrap();
}

#[test]
fn an_arena_of_another_boot_is_set_aside_and_never_replayed() {
    if !lab::require("arena of another boot", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    reboot(&bed);
    let mut target = bed.start(&[]);
    let output = said(&mut target, "40 sectors");
    assert_eq!(
        output.matches("the machine went down").count(),
        1,
        "{output}"
    );
    assert!(bed.untouched());
    assert_eq!(files(&bed.store.arenas(), ".arena.old").len(), 1);
    stop(target);
    assert!(bed.untouched());
    // The memory is gone, as it is after a real one.
    fs::remove_file(&files(&bed.store.arenas(), ".arena.old")[0]).unwrap();
    bed.die(&[]);
    reboot(&bed);
    fs::remove_file(bed.store.arena()).unwrap();
    let mut target = bed.start(&[]);
    let output = said(&mut target, "may be missing");
    assert_eq!(
        output.matches("the machine went down").count(),
        1,
        "{output}"
    );
    stop(target);
    assert!(bed.untouched());
    bed.nothing_left();
}

#[test]
fn an_image_that_someone_else_changed_is_not_written_over() {
    if !lab::require("image changed meanwhile", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let image = File::options().write(true).open(bed.store.image()).unwrap();
    image.write_all_at(b"newer", 1000 * 512).unwrap();
    // As if it had been some time later.
    let later = SystemTime::now() + Duration::from_secs(5);
    image.set_modified(later).unwrap();
    bed.is_given_up_only_when_told("changed by someone else");
    assert!(bed.store.sectors(1000, 1).starts_with(b"newer"));
}

#[test]
fn an_image_that_shrank_is_refused_until_its_size_is_back() {
    if !lab::require("image shrunk meanwhile", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let image = File::options().write(true).open(bed.store.image()).unwrap();
    let modified = image.metadata().unwrap().modified().unwrap();
    image.set_len(1039 * 512).unwrap();
    image.set_modified(modified).unwrap();
    let said = bed.refused(&[]);
    assert!(said.contains("past the end of the image"), "{said}");
    image.set_len(4096 * 512).unwrap();
    image.set_modified(modified).unwrap();
    bed.replays(&[]);
    // What is within it is not in the way.
    image.set_len(4096 * 512).unwrap();
    image.write_all_at(&[0; 40 * 512], 1000 * 512).unwrap();
    bed.die(&[]);
    let modified = image.metadata().unwrap().modified().unwrap();
    image.set_len(2040 * 512).unwrap();
    image.set_modified(modified).unwrap();
    let said = bed.refused(&[]);
    assert!(said.contains("changed by someone else"), "{said}");
    bed.replays(&["--replay-arena"]);
}

#[test]
fn an_arena_that_is_gone_is_refused() {
    if !lab::require("arena removed by hand", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let (arena, kept) = (bed.store.arena(), bed.store.path().join("kept"));
    fs::copy(&arena, &kept).unwrap();
    fs::remove_file(&arena).unwrap();
    let said = bed.refused(&[]);
    assert!(said.contains(&*arena.to_string_lossy()), "{said}");
    // Brought back it is as good as before.
    fs::copy(&kept, &arena).unwrap();
    bed.replays(&[]);
    fs::write(bed.store.image(), vec![0; 4096 * 512]).unwrap();
    bed.die(&[]);
    fs::remove_file(bed.store.arena()).unwrap();
    bed.is_given_up_only_when_told("is not there");
    assert!(bed.untouched());
}

#[test]
fn a_record_that_cannot_be_read_is_refused() {
    if !lab::require("unreadable arena record", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let record = fs::read(bed.store.record()).unwrap();
    for bad in [&b""[..], b"version = 2\n", &record[..record.len() / 2]] {
        fs::write(bed.store.record(), bad).unwrap();
        let said = bed.refused(&[]);
        assert!(
            said.contains(&*bed.store.record().to_string_lossy()),
            "{said}"
        );
    }
    fs::write(bed.store.record(), &record).unwrap();
    // That of another image stops nobody but that one.
    let strange = bed.store.state().join("0123456789abcdef-0.arena.toml");
    fs::write(&strange, "version = 2\n").unwrap();
    let mut target = bed.start(&[]);
    said(&mut target, "it cannot be read, and is passed over");
    stop(target);
    fs::remove_file(&strange).unwrap();
    bed.whole();
    bed.nothing_left();
}

#[test]
fn a_record_that_is_gone_does_not_hide_its_arena() {
    if !lab::require("arena without a record", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    fs::remove_file(bed.store.record()).unwrap();
    bed.replays(&[]);
}

#[test]
fn another_run_dir_or_another_size_of_the_cache_changes_nothing() {
    if !lab::require("other --run-dir and cache_size", &[Need::Network]) {
        return;
    }
    for size in ["cache_size=256K", "cache_size=8M"] {
        let bed = Bed::new();
        bed.die(&[]);
        bed.replays(&["--set", size]);
    }
    let bed = Bed::new();
    bed.die(&[]);
    let other = in_memory();
    let other = other.path().to_str().unwrap();
    bed.replays(&["--run-dir", other]);
    // And the way back, with a new one in both places meanwhile.
    fs::write(bed.store.image(), vec![0; 4096 * 512]).unwrap();
    bed.die(&["--run-dir", other]);
    assert_eq!(files(&bed.store.arenas(), ""), [] as [PathBuf; 0]);
    bed.replays(&[]);
    assert_eq!(
        files(&Path::new(other).join("arena"), ""),
        [] as [PathBuf; 0]
    );
}

#[test]
fn other_windows_take_what_is_theirs_and_leave_the_rest() {
    if !lab::require("other windows at restart", &[Need::Network]) {
        return;
    }
    // The whole died; parts of it are served.
    for window in [
        &["-o", "1000", "-l", "40"][..],
        &["-o", "1010"],
        &["-l", "1001"],
        &["-o", "3000"],
    ] {
        let bed = Bed::new();
        bed.die(&[]);
        let target = bed.start(window);
        bed.whole();
        stop(target);
        bed.whole();
        bed.nothing_left();
    }
    // A part died; another part knows nothing of it, the whole does.
    let bed = Bed::new();
    let mut target = bed.start(&["-o", "900", "-l", "1000"]);
    bed.wire.client().write_many(100, &data(40)).unwrap();
    target.kill().unwrap();
    let target = bed.start(&["-o", "3000"]);
    assert!(bed.untouched());
    bed.wire.client().write(0, &[0; 512]).unwrap();
    stop(target);
    assert!(bed.untouched());
    bed.replays(&[]);
}

#[test]
fn what_was_written_behind_the_old_end_of_a_grown_image_is_kept() {
    if !lab::require("an image that grew", &[Need::Network]) {
        return;
    }
    for restart in [&[][..], &["-o", "4090"]] {
        let bed = Bed::new();
        let mut target = bed.start(&[]);
        let image = File::options().write(true).open(bed.store.image()).unwrap();
        image.set_len(8192 * 512).unwrap();
        target.signal(Signal::SIGHUP).unwrap();
        target
            .wait_for_line("8192 sectors, 4096 before", Deadline::seconds(20))
            .unwrap();
        bed.wire.client().write_many(5000, &data(40)).unwrap();
        target.kill().unwrap();
        assert!(bed.untouched());
        let target = bed.start(restart);
        assert!(bed.store.sectors(5000, 40) == data(40), "writes are lost");
        stop(target);
        bed.nothing_left();
    }
}

#[test]
fn a_restart_long_after_a_death_and_after_refusals_is_no_stranger() {
    if !lab::require("a late restart", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    // As if it had been an hour ago.
    let hour = Duration::from_secs(3600);
    let words = Words::of(&bed.store.arena());
    for word in [HEARTBEAT, SEEN[0]] {
        words.set(word, words.get(word) - hour.as_nanos() as u64);
    }
    let image = File::options().write(true).open(bed.store.image()).unwrap();
    let modified = image.metadata().unwrap().modified().unwrap();
    image.set_modified(modified - hour).unwrap();
    // A start that changes nothing is no change.
    bed.refused(&["-r"]);
    assert_eq!(
        image.metadata().unwrap().modified().unwrap(),
        modified - hour
    );
    bed.replays(&[]);
}

#[test]
fn a_replay_that_was_killed_is_done_again() {
    const KILL: [&str; 5] = ["-D", "-f", "-qq", "-e", "trace=pwrite64,fdatasync,unlink"];
    let needs = [Need::Network, Need::Program("strace")];
    if !lab::require("kill during a replay", &needs) {
        return;
    }
    let bed = Bed::new();
    let hour = Duration::from_secs(3600);
    let image = File::options().write(true).open(bed.store.image()).unwrap();
    // At the second write to the image, at its sync, before the record goes,
    // before the arena goes.
    for inject in [
        "pwrite64:signal=KILL:when=2",
        "fdatasync:signal=KILL:when=1",
        "unlink:signal=KILL:when=1",
        "unlink:signal=KILL:when=2",
    ] {
        image.write_all_at(&[0; 40 * 512], 1000 * 512).unwrap();
        let mut target = bed.start(&[]);
        let mut client = bed.wire.client();
        client.write_many(1000, &data(40)[..16 * 512]).unwrap();
        client.write_many(1020, &data(40)[20 * 512..]).unwrap();
        target.kill().unwrap();
        let words = Words::of(&bed.store.arena());
        for word in [HEARTBEAT, SEEN[0]] {
            words.set(word, words.get(word) - hour.as_nanos() as u64);
        }
        let modified = image.metadata().unwrap().modified().unwrap();
        image.set_modified(modified - hour).unwrap();
        let mut killed = Spawn::new("strace")
            .inside(&bed.wire.host)
            .args(KILL)
            .args(["-e", &format!("inject={inject}"), AOEDE])
            .args(Bed::options(&[]))
            .args(["1", "1", "tgt0"])
            .arg(bed.store.image())
            .arg("--state-dir")
            .arg(bed.store.state())
            .arg("--run-dir")
            .arg(bed.store.run())
            .start()
            .unwrap();
        let status = killed.wait(Deadline::seconds(20)).unwrap();
        let said = killed.output().join("\n");
        assert!(!status.success() && !said.contains("e1.1, "), "{said}");
        let target = bed.start(&[]);
        let expected = data(40);
        assert!(
            bed.store.sectors(1000, 16) == expected[..16 * 512],
            "{inject}"
        );
        assert!(
            bed.store.sectors(1020, 20) == expected[20 * 512..],
            "{inject}"
        );
        stop(target);
        bed.nothing_left();
    }
}

#[test]
fn a_read_only_start_does_not_pass_over_what_waits() {
    if !lab::require("-r after a kill", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let said = bed.refused(&["-r"]);
    assert!(said.contains("without -r"), "{said}");
    assert!(bed.untouched());
    let mut target = bed.start(&[]);
    bed.whole();
    // Nothing waits now, so it may be read.
    target.kill().unwrap();
    stop(bed.start(&["-r"]));
    bed.whole();
    bed.nothing_left();
}

/// An export of a window of this image as e1.`slot`.
fn window(bed: &Bed, slot: &str, window: &[&str]) -> Process {
    let mut process = Spawn::new(AOEDE)
        .inside(&bed.wire.host)
        .args(Bed::options(window))
        .args(["1", slot, "tgt0"])
        .arg(bed.store.image())
        .arg("--state-dir")
        .arg(bed.store.state())
        .arg("--run-dir")
        .arg(bed.store.run())
        .start()
        .unwrap();
    process
        .wait_for_line(&format!(": e1.{slot}, "), Deadline::seconds(20))
        .unwrap();
    process
}

fn client(peer: &Namespace, slot: u8) -> Client {
    peer.enter(|| Client::connected("ini0", 1, slot))
        .unwrap()
        .unwrap()
}

#[test]
fn two_windows_of_an_image_do_not_hinder_each_other() {
    if !lab::require("two exports of one image", &[Need::Network]) {
        return;
    }
    const LOW: [&str; 2] = ["-l", "2048"];
    const HIGH: [&str; 2] = ["-o", "2048"];
    let high_data = data(10);
    for orderly in [false, true] {
        let bed = Bed::new();
        let mut low = window(&bed, "1", &LOW);
        let high = window(&bed, "2", &HIGH);
        client(&bed.wire.peer, 1)
            .write_many(1000, &data(40))
            .unwrap();
        low.kill().unwrap();
        // That was an hour ago. The other goes on.
        let arenas = files(&bed.store.arenas(), "-0.arena");
        let words = Words::of(&arenas[0]);
        for word in [HEARTBEAT, SEEN[0]] {
            words.set(word, words.get(word) - 3_600_000_000_000);
        }
        let mut other = client(&bed.wire.peer, 2);
        other.write_many(0, &high_data).unwrap();
        other.flush().unwrap();
        assert!(bed.store.sectors(2048, 10) == high_data);
        let high = if orderly {
            stop(high);
            None
        } else {
            Some(high)
        };
        let low = window(&bed, "1", &LOW);
        assert!(bed.store.sectors(1000, 40) == data(40), "writes are lost");
        assert!(bed.store.sectors(2048, 10) == high_data);
        stop(low);
        if let Some(mut high) = high {
            // Both die, and the whole is served.
            other.write_many(20, &high_data).unwrap();
            high.kill().unwrap();
            let mut low = window(&bed, "1", &LOW);
            let mut client = client(&bed.wire.peer, 1);
            client.write_many(20, &high_data).unwrap();
            low.kill().unwrap();
            stop(window(&bed, "1", &[]));
            assert!(bed.store.sectors(20, 10) == high_data);
            assert!(bed.store.sectors(2068, 10) == high_data);
        }
        bed.nothing_left();
    }
}

/// A tmpfs of its own; goes with this.
struct Memory(TempDir);

impl Memory {
    fn new(size: &str) -> Memory {
        let dir = tempfile::tempdir().unwrap();
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "aoede-test"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        Memory(dir)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// Leaves no room in it.
    fn fill(&self) {
        use std::io::Write;
        let mut file = File::create(self.0.path().join("full")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let umount = std::process::Command::new("umount")
            .arg("-l")
            .arg(self.0.path())
            .status();
        if !umount.is_ok_and(|status| status.success()) {
            eprintln!("{} is left mounted", self.0.path().display());
        }
    }
}

const MOUNTS: [Need; 3] = [
    Need::Network,
    Need::Program("mount"),
    Need::Program("umount"),
];

#[test]
fn without_a_place_for_the_arena_writes_go_through() {
    if !lab::require("no place for the arena", &MOUNTS) {
        return;
    }
    let (bed, full) = (Bed::new(), Memory::new("256K"));
    full.fill();
    // Nothing can be made in /proc.
    for (n, place) in ["/proc/aoede", full.path()].into_iter().enumerate() {
        let mut target = bed.start(&["--run-dir", place]);
        let output = said(&mut target, "writes go through");
        assert!(
            output.contains(place) && output.contains("--run-dir"),
            "{output}"
        );
        let mut client = bed.wire.client();
        for n in 0..40 {
            let sector = [n as u8 + 1; 512];
            client.write(n, &sector).unwrap();
            assert!(bed.store.sectors(n as usize, 1) == sector);
        }
        client.write_many(1000, &data(40)).unwrap();
        target.kill().unwrap();
        bed.store.sectors(1000, 40);
        assert!(
            bed.store.sectors(1000, 40) == data(40),
            "{n}: a write is lost"
        );
        assert_eq!(files(&bed.store.state(), ".arena.toml"), [] as [PathBuf; 0]);
        fs::write(bed.store.image(), vec![0; 4096 * 512]).unwrap();
    }
}

#[test]
fn in_little_memory_the_cache_is_smaller_and_there_is_no_sigbus() {
    if !lab::require("a small run directory", &MOUNTS) {
        return;
    }
    let (bed, memory) = (Bed::new(), Memory::new("2M"));
    let options = ["--run-dir", memory.path(), "--set", "cache_size=64M"];
    let mut target = bed.start(&options);
    said(&mut target, "instead of 64");
    // Whatever others do to it, what was allocated is ours.
    memory.fill();
    let mut client = bed.wire.client();
    let all: Vec<u8> = (0..4096 * 512).map(|i| (i / 512 % 251) as u8).collect();
    client.write_many(0, &all).unwrap();
    assert!(client.read_many(0, 4096).unwrap() == all);
    target.kill().unwrap();
    // Nor does a restart need more than what is there.
    fs::remove_file(Path::new(memory.path()).join("full")).unwrap();
    let target = bed.start(&options);
    assert!(fs::read(bed.store.image()).unwrap() == all);
    stop(target);
    assert_eq!(
        files(&Path::new(memory.path()).join("arena"), ""),
        [] as [PathBuf; 0]
    );
}

#[test]
fn a_run_directory_that_is_a_file_or_of_another_user_is_refused() {
    if !lab::require("run directories that are refused", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let file = bed.store.path().join("file");
    fs::write(&file, "in the way").unwrap();
    let (other, link) = (in_memory(), bed.store.path().join("link"));
    std::os::unix::fs::symlink(other.path(), &link).unwrap();
    for (place, why) in [
        (file.clone(), "no directory"),
        (file.join("run"), "no directory"),
        (link, "no directory"),
    ] {
        let said = bed.refused(&["--run-dir", place.to_str().unwrap()]);
        assert!(said.contains(why) && said.contains("--run-dir"), "{said}");
    }
    chown(other.path(), Some(65534), None).unwrap();
    let said = bed.refused(&["--run-dir", other.path().to_str().unwrap()]);
    assert!(said.contains("belongs to user 65534"), "{said}");
    chown(other.path(), Some(0), None).unwrap();
    let below = other.path().join("arena");
    fs::create_dir(&below).unwrap();
    chown(&below, Some(65534), None).unwrap();
    let said = bed.refused(&["--run-dir", other.path().to_str().unwrap()]);
    assert!(said.contains("belongs to user 65534"), "{said}");
    assert_eq!(fs::read(&file).unwrap(), b"in the way");
}

#[test]
fn nobody_else_reads_what_hosts_write() {
    if !lab::require("permissions of arenas", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    bed.die(&[]);
    assert_eq!(mode(&bed.store.arenas()), 0o700);
    assert_eq!(mode(&bed.store.arena()), 0o600);
    // As another program may have left them.
    fs::set_permissions(bed.store.arenas(), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(bed.store.arena(), Permissions::from_mode(0o644)).unwrap();
    let mut target = bed.start(&[]);
    said(&mut target, "0755 narrowed to 0700");
    said(&mut target, "0644 narrowed to 0600");
    bed.whole();
    assert_eq!(mode(&bed.store.arenas()), 0o700);
    stop(target);
}

#[test]
fn an_image_that_was_restored_is_not_written_over() {
    if !lab::require("image restored with its old times", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let backup = bed.store.path().join("backup.img");
    fs::write(&backup, vec![7; 4096 * 512]).unwrap();
    let old = SystemTime::now() - Duration::from_secs(86_400);
    let file = File::options().write(true).open(&backup).unwrap();
    file.set_modified(old).unwrap();
    bed.die(&[]);
    // The inode stays, and the time of the last change goes back.
    sh(&format!(
        "cp -p {} {}",
        backup.display(),
        bed.store.image().display()
    ));
    let restored = fs::read(&backup).unwrap();
    for _ in 0..2 {
        let said = bed.refused(&[]);
        assert!(said.contains("changed by someone else"), "{said}");
        assert!(said.contains("--replay-arena") && said.contains("--discard-arena"));
        assert!(fs::read(bed.store.image()).unwrap() == restored);
    }
    let target = bed.start(&["--replay-arena"]);
    assert!(bed.store.sectors(1000, 40) == data(40));
    assert!(bed.store.sectors(0, 1000) == restored[..1000 * 512]);
    stop(target);
    bed.nothing_left();
}

#[test]
fn other_permissions_are_no_other_content() {
    if !lab::require("permissions changed meanwhile", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    fs::set_permissions(bed.store.image(), Permissions::from_mode(0o640)).unwrap();
    let mut target = bed.start(&[]);
    said(&mut target, "permissions of the image were changed");
    bed.whole();
    stop(target);
}

#[test]
fn another_file_under_the_path_is_a_doubt() {
    if !lab::require("another file under the path of the image", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let moved = bed.store.path().join("moved.img");
    fs::rename(bed.store.image(), &moved).unwrap();
    fs::write(bed.store.image(), vec![0; 4096 * 512]).unwrap();
    let said = bed.refused(&[]);
    assert!(said.contains("another file was put in its place"), "{said}");
    let inode = |path: &Path| format!("inode {}", fs::metadata(path).unwrap().ino());
    // Both sides are named.
    assert!(
        said.contains(&inode(&moved)) && said.contains(&inode(&bed.store.image())),
        "{said}"
    );
    assert!(said.contains("--replay-arena") && said.contains("--discard-arena"));
    assert!(bed.untouched());
    // The right one under its new name.
    fs::remove_file(bed.store.image()).unwrap();
    fs::rename(&moved, bed.store.image()).unwrap();
    bed.replays(&[]);
}

#[test]
fn an_arena_whose_image_is_nowhere_is_named() {
    if !lab::require("an arena of an image that is gone", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let (arena, gone) = (bed.store.arena(), bed.store.path().join("gone.img"));
    fs::rename(bed.store.image(), &gone).unwrap();
    let other = bed.store.path().join("other.img");
    fs::write(&other, vec![0; 4096 * 512]).unwrap();
    let serve_other = || {
        let mut process = Spawn::new(AOEDE)
            .inside(&bed.wire.host)
            .args(Bed::options(&[]))
            .args(["1", "1", "tgt0"])
            .arg(&other)
            .arg("--state-dir")
            .arg(bed.store.state())
            .arg("--run-dir")
            .arg(bed.store.run())
            .start()
            .unwrap();
        let up = process.wait_for_line(": e1.1, ", Deadline::seconds(20));
        up.unwrap();
        process
    };
    let mut target = serve_other();
    let output = said(
        &mut target,
        "40 acknowledged sectors of an image that is not there now",
    );
    assert!(output.contains(arena.to_str().unwrap()), "{output}");
    assert!(
        output.contains(bed.store.image().to_str().unwrap()),
        "{output}"
    );
    stop(target);
    // In sight again, it is nobody else's business.
    fs::rename(&gone, bed.store.image()).unwrap();
    let output = stop(serve_other()).join("\n");
    assert!(!output.contains("not there now"), "{output}");
    bed.replays(&[]);
}

#[test]
fn two_windows_that_died_are_both_replayed() {
    if !lab::require("two dead windows of an image", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let mut low = window(&bed, "1", &["-l", "2048"]);
    let mut high = window(&bed, "2", &["-o", "2048"]);
    client(&bed.wire.peer, 1)
        .write_many(1000, &data(40))
        .unwrap();
    client(&bed.wire.peer, 2).write_many(5, &data(10)).unwrap();
    low.kill().unwrap();
    high.kill().unwrap();
    assert!(bed.untouched());
    // Long ago: what one replays must not be a stranger's change to the other.
    for arena in files(&bed.store.arenas(), ".arena") {
        let words = Words::of(&arena);
        words.set(HEARTBEAT, words.get(HEARTBEAT) - 3_600_000_000_000);
    }
    let low = window(&bed, "1", &["-l", "2048"]);
    assert!(bed.store.sectors(1000, 40) == data(40));
    let high = window(&bed, "2", &["-o", "2048"]);
    assert!(bed.store.sectors(2053, 10) == data(10));
    stop(low);
    stop(high);
    bed.nothing_left();
}

#[test]
fn a_device_is_known_by_what_is_behind_it_and_not_by_its_number() {
    if !lab::require("loop devices that change their numbers", &Loop::NEEDS) {
        return;
    }
    let bed = Bed::new();
    let (first, second) = (bed.store.image(), bed.store.path().join("second.img"));
    fs::write(&second, vec![7; 4096 * 512]).unwrap();
    let command = |device: &Path| {
        Spawn::new(AOEDE)
            .inside(&bed.wire.host)
            .args(Bed::options(&[]))
            .args(["1", "1", "tgt0"])
            .arg(device)
            .arg("--state-dir")
            .arg(bed.store.state())
            .arg("--run-dir")
            .arg(bed.store.run())
    };
    let serve = |device: &Path| {
        let mut process = command(device).start().unwrap();
        let up = process.wait_for_line(": e1.1, ", Deadline::seconds(20));
        up.unwrap();
        process
    };
    let device = attach(&first, None);
    let mut target = serve(&device);
    bed.wire.client().write_many(1000, &data(40)).unwrap();
    target.kill().unwrap();
    detach(&device);
    assert!(bed.untouched());
    // Another disk under that number: not a byte of it changes, and what waits is
    // named.
    attach(&second, Some(&device));
    let mut target = serve(&device);
    let output = said(
        &mut target,
        "40 acknowledged sectors of an image that is not there now",
    );
    assert!(output.contains("loop device"), "{output}");
    stop(target);
    detach(&device);
    assert!(fs::read(&second).unwrap() == vec![7; 4096 * 512]);
    // The first one under another number.
    attach(&second, Some(&device));
    let other = attach(&first, None);
    assert_ne!(other, device);
    let target = serve(&other);
    bed.whole();
    stop(target);
    detach(&other);
    detach(&device);
    bed.whole();
    bed.nothing_left();
}

#[test]
fn a_device_with_another_content_at_its_ends_is_refused() {
    if !lab::require("a device that someone else wrote", &Loop::NEEDS) {
        return;
    }
    let bed = Bed::new();
    let device = Loop::attach(&bed.store.image(), 512).unwrap();
    let command = |extra: &[&str]| {
        Spawn::new(AOEDE)
            .inside(&bed.wire.host)
            .args(Bed::options(extra))
            .args(["1", "1", "tgt0"])
            .arg(&device.path)
            .arg("--state-dir")
            .arg(bed.store.state())
            .arg("--run-dir")
            .arg(bed.store.run())
    };
    let serve = |extra: &[&str]| {
        let mut process = command(extra).start().unwrap();
        let up = process.wait_for_line(": e1.1, ", Deadline::seconds(20));
        up.unwrap();
        process
    };
    let mut target = serve(&[]);
    let mut client = bed.wire.client();
    client.write_many(1000, &data(40)).unwrap();
    // What it writes itself is no stranger's.
    client.flush().unwrap();
    client.write_many(2000, &data(40)).unwrap();
    target.kill().unwrap();
    let sectors = |lba: u64| {
        let mut bytes = vec![0; 512];
        let file = File::open(&device.path).unwrap();
        file.read_exact_at(&mut bytes, lba * 512).unwrap();
        bytes
    };
    let written = File::options().write(true).open(&device.path).unwrap();
    written.write_all_at(&[5; 512], 3 * 512).unwrap();
    drop(written);
    let said = refused(command(&[]));
    assert!(said.contains("changed by someone else"), "{said}");
    assert_eq!(sectors(2000), [0; 512]);
    let target = serve(&["--replay-arena"]);
    assert_eq!((sectors(3), sectors(2000)), (vec![5; 512], data(1)));
    stop(target);
}

#[test]
fn a_step_that_cannot_be_had_makes_the_cache_smaller_and_says_so_once() {
    if !lab::require("a run directory that fills up", &MOUNTS) {
        return;
    }
    let (wire, memory) = (Wire::new(9000), Memory::new("24M"));
    let store = Store::new(32768);
    let options = [
        &QUICK[..],
        &["--run-dir", memory.path(), "--set", "cache_size=12M"],
    ]
    .concat();
    let target = serve(&wire.host, &store, &["tgt0"], &options);
    // The first of three steps is there.
    memory.fill();
    let all: Vec<u8> = (0..32768 * 512).map(|i| (i / 512 % 251) as u8).collect();
    let mut client = wire.client();
    client.write_many(0, &all).unwrap();
    assert!(client.read_many(0, 32768).unwrap() == all);
    let output = stop(target).join("\n");
    assert_eq!(output.matches("no more room in").count(), 1, "{output}");
    assert!(
        output.contains("e1.1: cache of 4 MiB instead of 12"),
        "{output}"
    );
    assert!(fs::read(store.image()).unwrap() == all);
}

#[test]
fn the_arena_of_a_living_target_is_nobodys_leftover() {
    if !lab::require(
        "another file under the path of a served image",
        &[Need::Network],
    ) {
        return;
    }
    let bed = Bed::new();
    let mut first = window(&bed, "1", &[]);
    bed.wire.client().write_many(1000, &data(40)).unwrap();
    let moved = bed.store.path().join("moved.img");
    fs::rename(bed.store.image(), &moved).unwrap();
    fs::write(bed.store.image(), vec![0; 4096 * 512]).unwrap();
    stop(window(&bed, "2", &[]));
    stop(window(&bed, "2", &["--discard-arena"]));
    assert!(bed.untouched());
    // Its arena is still there, with its record.
    first.kill().unwrap();
    fs::rename(&moved, bed.store.image()).unwrap();
    bed.replays(&[]);
}

#[test]
fn a_record_of_another_boot_does_not_hide_an_arena_of_this_one() {
    if !lab::require("an old record of the same name", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let record = fs::read_to_string(bed.store.record()).unwrap();
    let boot = Words::of(&bed.store.arena()).get(3);
    let forged = record.replace(&format!("{boot:016x}"), &format!("{:016x}", boot ^ 1));
    assert_ne!(record, forged);
    fs::write(bed.store.record(), forged).unwrap();
    bed.replays(&[]);
}

#[test]
fn a_run_directory_has_one_arena_however_its_path_is_written() {
    if !lab::require("two spellings of a run directory", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    let (memory, link) = (in_memory(), bed.store.path().join("link"));
    std::os::unix::fs::symlink(memory.path(), &link).unwrap();
    let (one, other) = (memory.path().join("run"), link.join("run"));
    bed.die(&["--run-dir", one.to_str().unwrap()]);
    let target = bed.start(&["--run-dir", other.to_str().unwrap()]);
    bed.whole();
    stop(target);
    assert_eq!(files(&one.join("arena"), ""), [] as [PathBuf; 0]);
}

#[test]
fn an_image_that_takes_no_writes_is_served_without_those_that_wait_when_told() {
    if !lab::require("--discard-arena with -r", &[Need::Network]) {
        return;
    }
    let bed = Bed::new();
    bed.die(&[]);
    let said = bed.refused(&["-r"]);
    assert!(said.contains("sets it aside"), "{said}");
    stop(bed.start(&["-r", "--discard-arena"]));
    assert!(bed.untouched());
    let aside = files(&bed.store.arenas(), ".arena.discarded");
    assert_eq!(aside.len(), 1, "nothing is lost for good");
    assert_eq!(files(&bed.store.state(), ".arena.toml"), [] as [PathBuf; 0]);
}
