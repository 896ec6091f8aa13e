//! The backup script that is shipped: against a target that goes on being
//! written, and with everything that an administrator may give it wrongly.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use initiator::lab::{self, Deadline, Need, Process, Spawn};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::freeze::{data, order, until};
use crate::rig::QUICK;
use crate::support::{AOEDED, Store, Wire, serve, stop};
use crate::workshop::{Lab, Load, Loop, Stray, Temper, run, state_of};

const SECTORS: u64 = 4096;

/// The script, for a target of this process id and these files beside the
/// image; the last is the copy.
fn script_for(store: &Store, options: &[&str], pid: u32, files: &[&str]) -> Spawn {
    let path = |name: &&str| store.path().join(name).into_os_string();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("shadow/aoede-backup");
    Spawn::new(script)
        .args(options.iter().copied())
        .arg(pid.to_string())
        .args(files.iter().map(path))
}

const FILES: [&str; 3] = ["disk.img", "shadow.img", "copy.img"];

/// A target with a shadow, and the script.
struct Scene {
    wire: Wire,
    store: Store,
    target: Process,
}

impl Scene {
    fn new() -> Scene {
        let (wire, store) = (Wire::new(1500), Store::new(SECTORS));
        let shadow = store.path().join("shadow.img");
        let options = [&QUICK[..], &["-f", shadow.to_str().unwrap()]].concat();
        let target = serve(&wire.host, &store, &["tgt0"], &options);
        Scene {
            wire,
            store,
            target,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.store.path().join(name)
    }

    fn start(&self, options: &[&str], files: &[&str]) -> Process {
        let script = script_for(&self.store, options, self.target.pid(), files);
        let tools = self.path("tools");
        let path = std::env::var("PATH").unwrap();
        let script = script.env("PATH", format!("{}:{path}", tools.display()));
        script.start().unwrap()
    }

    /// Waits for the end of a script; what it said.
    #[track_caller]
    fn ended(mut script: Process, code: i32) -> String {
        let status = script.wait(Deadline::seconds(60)).unwrap();
        let said = script.output().join("\n");
        assert_eq!(status.code(), Some(code), "{said}");
        said
    }

    #[track_caller]
    fn run(&self, code: i32, options: &[&str], files: &[&str]) -> String {
        Scene::ended(self.start(options, files), code)
    }

    /// How often the target was told to freeze.
    fn freezes(&self) -> usize {
        let lines = self.target.output();
        let is_freeze = |line: &&String| line.contains("freeze");
        lines.iter().filter(is_freeze).count()
    }

    fn is_frozen(&self) -> bool {
        ["shadow.img", "shadow.img.new", "shadow.img.thaw"]
            .iter()
            .any(|name| self.path(name).exists())
    }

    #[track_caller]
    fn no_copy(&self) {
        assert!(!self.path("copy.img").exists());
        assert!(!self.path("copy.img.part").exists());
    }

    /// Has a `cp` that copies, and then waits until it is let go.
    fn slow_copies(&self) {
        let tools = self.path("tools");
        fs::create_dir(&tools).unwrap();
        let go = self.path("go");
        let pid = self.path("cp.pid");
        let text = format!(
            "#!/bin/sh\n/bin/cp \"$@\" || exit 1\necho $$ > {pid}.part && mv {pid}.part {pid}\n\
             while [ ! -e {go} ] && [ -d {tools} ]; do sleep 0.05; done\n",
            pid = pid.display(),
            go = go.display(),
            tools = tools.display()
        );
        fs::write(tools.join("cp"), text).unwrap();
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(tools.join("cp"), mode).unwrap();
    }

    /// Waits until such a `cp` has copied.
    fn copied(&self) {
        until("the copy", || self.path("cp.pid").exists());
    }

    fn let_go(&self) {
        fs::write(self.path("go"), "").unwrap();
    }

    fn frozen(&self) {
        order(&self.target, 1);
        until("the shadow appears", || self.path("shadow.img").exists());
    }
}

#[test]
fn the_backup_script_makes_a_good_copy_under_load() {
    if !lab::require("the backup script", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(SECTORS));
    let shadow = store.path().join("shadow.img");
    let options = [&QUICK[..], &["-f", shadow.to_str().unwrap()]].concat();
    let target = serve(&lab.host, &store, &["tgt0"], &options);
    let written = thread::scope(|scope| {
        let load = Load::start(scope, &lab.peer, "ini0", 100, Temper::Strict);
        for _ in 0..2 {
            load.goes_on();
            let backup = script_for(&store, &[], target.pid(), &FILES);
            Scene::ended(backup.start().unwrap(), 0);
            assert!(!shadow.exists());
        }
        load.goes_on();
        load.end()
    });
    // Every sector of the copy is whole, and from some time before.
    let copy = fs::read(store.path().join("copy.img")).unwrap();
    assert_eq!(copy.len() as u64, SECTORS * 512);
    for (lba, sent) in &written.sent {
        let at = *lba as usize * 512;
        let found = crate::workshop::generation(*lba, &copy[at..at + 512]);
        assert!(
            (1..=*sent).contains(&found),
            "sector {lba}: {found} of {sent}"
        );
    }
    stop(target);
    written.check(&fs::read(store.image()).unwrap());
}

#[test]
fn the_backup_script_finds_out_what_was_given_wrongly_before_it_freezes() {
    if !lab::require("wrong arguments of the backup script", &[Need::Network]) {
        return;
    }
    let mut scene = Scene::new();
    let (shadow, image) = (scene.path("shadow.img"), scene.path("disk.img"));
    // Another disk, another shadow, and no such files.
    fs::copy(&image, scene.path("other.img")).unwrap();
    fs::write(scene.path("other.lock"), "").unwrap();
    for (files, says) in [
        (["other.img", "shadow.img", "copy.img"], "does not serve"),
        (["none.img", "shadow.img", "copy.img"], "there is no image"),
        (["disk.img", "other", "copy.img"], "was not started with -f"),
        (["disk.img", "none", "copy.img"], "was not started with -f"),
        (["disk.img", "shadow.img", "disk.img"], "the image itself"),
        (["disk.img", "shadow.img", "state"], "or a directory"),
    ] {
        let said = scene.run(1, &[], &files);
        assert!(said.contains(says), "{said}");
        assert!(!scene.is_frozen());
    }
    assert_eq!(scene.freezes(), 0);
    assert!(!scene.path("none.lock").exists());
    // Something that has the shadow's name.
    fs::write(&shadow, "mine").unwrap();
    for options in [&[][..], &["-t"]] {
        let said = scene.run(1, options, &FILES);
        assert!(said.contains("is no shadow of process"), "{said}");
        assert_eq!(fs::read(&shadow).unwrap(), b"mine");
    }
    fs::remove_file(&shadow).unwrap();
    assert_eq!(scene.freezes(), 0);
    for arguments in [&[][..], &["1", "a", "b"], &["-1", "a", "b", "c"], &["-x"]] {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("shadow/aoede-backup");
        let script = Spawn::new(script).args(arguments.iter().copied());
        let said = Scene::ended(script.start().unwrap(), 2);
        assert!(said.contains("usage: "), "{said}");
    }
    scene.no_copy();
    // A number that someone else has by now.
    let mut other = Spawn::new("sleep").arg("600").start().unwrap();
    let script = script_for(&scene.store, &[], other.pid(), &FILES);
    let said = Scene::ended(script.start().unwrap(), 1);
    assert!(said.contains("is not aoede"), "{said}");
    assert!(other.exit_status().unwrap().is_none(), "it got a signal");
    other.kill().unwrap();
    // And nobody.
    let pid = scene.target.pid();
    scene.target.stop(Deadline::seconds(20)).unwrap();
    let script = script_for(&scene.store, &[], pid, &FILES);
    let said = Scene::ended(script.start().unwrap(), 1);
    assert!(said.contains("there is no process"), "{said}");
    scene.no_copy();
}

#[test]
fn a_second_backup_at_the_same_time_ends_at_once() {
    if !lab::require("two backups at once", &[Need::Network]) {
        return;
    }
    let scene = Scene::new();
    scene.slow_copies();
    let first = scene.start(&[], &FILES);
    scene.copied();
    let freezes = scene.freezes();
    for options in [&[][..], &["-t"]] {
        let said = scene.run(75, options, &["disk.img", "shadow.img", "second.img"]);
        assert!(said.contains("another aoede-backup is at work"), "{said}");
    }
    assert_eq!(scene.freezes(), freezes);
    scene.let_go();
    Scene::ended(first, 0);
    assert!(scene.path("copy.img").exists() && !scene.path("second.img").exists());
    // Another program that takes the lock.
    let file = File::open(scene.path("shadow.img.lock")).unwrap();
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
    scene.run(75, &[], &FILES);
    drop(lock);
    scene.run(0, &[], &FILES);
    stop(scene.target);
}

#[test]
fn a_backup_whose_name_may_not_last_is_no_success() {
    if !lab::require("a directory that cannot be synced", &[Need::Network]) {
        return;
    }
    let scene = Scene::new();
    let sync = scene.path("tools").join("sync");
    fs::create_dir(scene.path("tools")).unwrap();
    let text = "#!/bin/sh\n[ ! -d \"$2\" ] || exit 1\nexec /bin/sync \"$@\"\n";
    fs::write(&sync, text).unwrap();
    fs::set_permissions(&sync, fs::Permissions::from_mode(0o755)).unwrap();
    let said = scene.run(1, &[], &FILES);
    assert!(said.contains("its directory cannot be synced"), "{said}");
    assert!(scene.path("copy.img").exists() && !scene.is_frozen());
    stop(scene.target);
}

#[test]
fn a_backup_that_was_killed_keeps_no_later_one_from_its_work() {
    if !lab::require("a killed backup", &[Need::Network]) {
        return;
    }
    let scene = Scene::new();
    scene.slow_copies();
    let mut first = scene.start(&[], &FILES);
    scene.copied();
    let cp = fs::read_to_string(scene.path("cp.pid")).unwrap();
    first.kill().unwrap();
    scene.wire.client().write_many(0, &data(1, 8)).unwrap();
    let said = scene.run(3, &[], &FILES);
    assert!(
        said.contains("to thaw it first: aoede-backup -t "),
        "{said}"
    );
    assert!(scene.path("shadow.img").exists());
    // As it says, while the first one copies on.
    scene.let_go();
    scene.run(0, &["-t"], &FILES);
    assert!(!scene.is_frozen());
    let copy = fs::read(scene.path("copy.img")).unwrap();
    assert!(copy == fs::read(scene.path("disk.img")).unwrap());
    assert!(copy[..4096] == data(1, 8));
    // Or no more than that.
    scene.frozen();
    scene.run(0, &["-t"], &FILES[..2]);
    assert!(!scene.is_frozen());
    scene.run(0, &["-t"], &FILES[..2]);
    let cp = Pid::from_raw(cp.trim().parse().unwrap());
    until("the end of its cp", || kill(cp, None).is_err());
    stop(scene.target);
}

#[test]
fn a_backup_that_is_told_to_stop_thaws_and_leaves_no_copy() {
    if !lab::require("a backup that is told to stop", &[Need::Network]) {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let scene = Scene::new();
        scene.slow_copies();
        let backup = scene.start(&[], &FILES);
        scene.copied();
        assert!(scene.path("shadow.img").exists());
        backup.signal(signal).unwrap();
        Scene::ended(backup, 1);
        assert!(!scene.is_frozen());
        scene.no_copy();
        stop(scene.target);
    }
}

#[test]
fn a_copy_of_an_image_that_someone_thawed_is_no_good() {
    if !lab::require("a thaw during a backup", &[Need::Network]) {
        return;
    }
    for again in [false, true] {
        let scene = Scene::new();
        scene.slow_copies();
        let mut client = scene.wire.client();
        let backup = scene.start(&[], &FILES);
        scene.copied();
        client.write_many(0, &data(1, 100)).unwrap();
        client.flush().unwrap();
        order(&scene.target, 2);
        until("the shadow vanishes", || !scene.is_frozen());
        if again {
            // Another freeze: PATH is there again, with an inode number that
            // may have become free.
            scene.frozen();
        }
        scene.let_go();
        let said = Scene::ended(backup, 1);
        assert!(said.contains("thawed while it was copied"), "{said}");
        scene.no_copy();
        until("the shadow vanishes", || !scene.is_frozen());
        stop(scene.target);
    }
}

#[test]
fn a_copy_is_good_though_the_target_dies_before_the_thaw() {
    if !lab::require("a target that dies during a backup", &[Need::Network]) {
        return;
    }
    let mut scene = Scene::new();
    scene.slow_copies();
    scene.wire.client().write_many(0, &data(1, 8)).unwrap();
    let backup = scene.start(&[], &FILES);
    scene.copied();
    scene.target.kill().unwrap();
    scene.let_go();
    let said = Scene::ended(backup, 4);
    assert!(said.contains("is gone"), "{said}");
    let copy = fs::read(scene.path("copy.img")).unwrap();
    assert!(copy[..4096] == data(1, 8));
    assert!(scene.path("shadow.img").exists());
}

#[test]
fn a_freeze_that_does_not_come_in_time_is_told_with_what_to_do() {
    if !lab::require("a freeze that takes too long", &[Need::Network]) {
        return;
    }
    let scene = Scene::new();
    let with = |value: &str| {
        let script = script_for(&scene.store, &[], scene.target.pid(), &FILES);
        script.env("AOEDE_FREEZE_WAIT", value).start().unwrap()
    };
    for value in ["", "1.5", "long"] {
        let said = Scene::ended(with(value), if value.is_empty() { 0 } else { 2 });
        assert!(value.is_empty() || said.contains(value), "{said}");
    }
    fs::remove_file(scene.path("copy.img")).unwrap();
    scene.target.signal(Signal::SIGSTOP).unwrap();
    let said = Scene::ended(with("1"), 1);
    assert!(said.contains("did not appear within 1 s"), "{said}");
    assert!(said.contains("this thaws it: aoede-backup -t "), "{said}");
    scene.no_copy();
    // It heard the order all the same.
    scene.target.signal(Signal::SIGCONT).unwrap();
    until("the shadow appears", || scene.path("shadow.img").exists());
    scene.run(0, &["-t"], &FILES[..2]);
    assert!(!scene.is_frozen());
    stop(scene.target);
}

#[test]
fn a_user_who_may_not_look_at_the_process_is_told_so() {
    if !lab::require("a backup by another user", &[Need::Network]) {
        return;
    }
    const NOBODY: u32 = 65534;
    let scene = Scene::new();
    let place = scene.store.path();
    fs::set_permissions(place, fs::Permissions::from_mode(0o755)).unwrap();
    // Where that user can read it.
    let script = place.join("aoede-backup");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("shadow/aoede-backup");
    fs::copy(source, &script).unwrap();
    let mut command = Command::new(&script);
    command.uid(NOBODY).gid(NOBODY).current_dir(place);
    command.arg(scene.target.pid().to_string()).args(FILES);
    let ended = run(None, command, Deadline::seconds(20));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let line = ended.line();
    assert!(line.contains("may not look at the open files of process"));
    assert!(line.contains("as root"), "{line}");
    assert_eq!(scene.freezes(), 0);
    stop(scene.target);
}

#[test]
fn of_an_export_of_a_part_the_rest_of_the_copy_is_warned_about() {
    if !lab::require("a backup of a part", &[Need::Network]) {
        return;
    }
    let all = SECTORS.to_string();
    let bytes = SECTORS * 512;
    let whole = (&["-l", &all][..], None);
    for (options, says) in [
        whole,
        (
            &["-o", "8"],
            Some(format!("bytes 4096 to {} of", bytes + 99)),
        ),
        (&["-l", "100"], Some("bytes 0 to 51199 of".into())),
        (
            &["-o", "8", "-l", "2"],
            Some("bytes 4096 to 5119 of".into()),
        ),
    ] {
        let (wire, store) = (Wire::new(1500), Store::new(SECTORS));
        // What is less than a sector belongs to no export.
        let image = File::options().write(true).open(store.image()).unwrap();
        image.set_len(bytes + 100).unwrap();
        let shadow = store.path().join("shadow.img");
        let options = [&QUICK[..], &["-f", shadow.to_str().unwrap()], options].concat();
        let target = serve(&wire.host, &store, &["tgt0"], &options);
        wire.client().write_many(0, &data(1, 2)).unwrap();
        let script = script_for(&store, &[], target.pid(), &FILES);
        let said = Scene::ended(script.start().unwrap(), 0);
        match says {
            Some(at) => assert!(said.contains("warning") && said.contains(&at), "{said}"),
            None => assert!(!said.contains("warning"), "{said}"),
        }
        let copy = fs::read(store.path().join("copy.img")).unwrap();
        assert!(copy == fs::read(store.image()).unwrap());
        stop(target);
    }
}

/// What is at PATH.lock already is neither emptied nor followed.
#[test]
fn the_lock_file_is_made_beside_what_is_there() {
    if !lab::require("the lock of the backups", &[Need::Network]) {
        return;
    }
    let (wire, store) = (Wire::new(1500), Store::new(64));
    let shadow = store.path().join("shadow.img");
    let lock = store.path().join("shadow.img.lock");
    let options = [&QUICK[..], &["-f", shadow.to_str().unwrap()]].concat();
    fs::write(&lock, "mine").unwrap();
    let target = serve(&wire.host, &store, &["tgt0"], &options);
    let script = script_for(&store, &[], target.pid(), &FILES);
    Scene::ended(script.start().unwrap(), 0);
    stop(target);
    assert_eq!(fs::read(&lock).unwrap(), b"mine");
    fs::remove_file(&lock).unwrap();
    let away = store.path().join("away");
    std::os::unix::fs::symlink(&away, &lock).unwrap();
    let said = stop(serve(&wire.host, &store, &["tgt0"], &options));
    assert!(said.iter().any(|line| line.contains("shadow.img.lock: ")));
    assert!(!away.exists());
    fs::remove_file(&lock).unwrap();
    let target = serve(&wire.host, &store, &["tgt0"], &options);
    let mode = fs::metadata(&lock).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    stop(target);
}

/// As an administrator starts it, with all paths as they were typed.
#[test]
fn a_device_that_a_daemon_serves_is_copied_and_no_other() {
    if !lab::require("a backup of a block device", &Loop::NEEDS) {
        return;
    }
    let (wire, store) = (Wire::new(1500), Store::new(SECTORS));
    fs::copy(store.image(), store.path().join("other.img")).unwrap();
    let device = Loop::attach(&store.image(), 512).unwrap();
    let other = Loop::attach(&store.path().join("other.img"), 512).unwrap();
    let stray = Stray::new(&store.path().join("pid"));
    let mut command = Command::new(AOEDED);
    command
        .args(["1", "1", "tgt0", device.path.to_str().unwrap()])
        .args([
            "-f",
            "shadow.img",
            "--pid-file",
            "pid",
            "--state-dir",
            "state",
        ])
        .args(["--run-dir", store.run().to_str().unwrap(), "-s", "-q"])
        .args(QUICK)
        .current_dir(store.path());
    let ended = run(Some(&wire.host), command, Deadline::seconds(20));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    wire.client().write_many(5, &data(1, 40)).unwrap();
    let script = |image: &Loop| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("shadow/aoede-backup");
        let pid = fs::read_to_string(store.path().join("pid")).unwrap();
        let script = Spawn::new(script).dir(store.path()).arg(pid.trim());
        let script = script.arg(&image.path).args(["shadow.img", "copy.img"]);
        script.start().unwrap()
    };
    let said = Scene::ended(script(&other), 1);
    assert!(said.contains("does not serve"), "{said}");
    Scene::ended(script(&device), 0);
    let copy = fs::read(store.path().join("copy.img")).unwrap();
    assert_eq!(copy.len() as u64, SECTORS * 512);
    assert!(copy[5 * 512..45 * 512] == data(1, 40));
    let pid = stray.pid().unwrap().as_raw() as u32;
    stray.signal(Signal::SIGTERM);
    until("its end", || state_of(pid).is_none());
}
