//! The tool from outside: real files, its exit codes, its lines.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::UNIX_EPOCH;

use shadow::paths::{self, Paths};
use shadow::{Chunk, Geometry, Identity, Kind, SECTOR, Shadow, ShadowFile, Spec, State};

const START: u64 = 3 * SECTOR;
const LEN: u64 = 2_000 * SECTOR;
const IMAGE: u64 = START + LEN + 333;

/// A directory with an image, and what it should be after a merge.
struct Scene {
    dir: tempfile::TempDir,
    expected: Vec<u8>,
}

fn pattern() -> Vec<u8> {
    (0..IMAGE).map(|i| (i / 512 + i) as u8 | 1).collect()
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("image"), pattern()).unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        Scene {
            dir,
            expected: pattern(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self) -> File {
        File::open(self.path("image")).unwrap()
    }

    /// Makes a shadow with data and zeros, under PATH.new.
    fn freeze(&mut self) -> Shadow<ShadowFile> {
        let spec = Spec {
            uuid: [0x42; 16],
            generation: 9,
            geometry: Geometry::new(4096, START, LEN).unwrap(),
            identity: Identity::of(&self.image()).unwrap(),
        };
        let image = self.image();
        let mut shadow = paths::create(&Paths::of(&self.path("s")), &spec).unwrap();
        for (at, len, byte) in [
            (START, 1000, 2),
            (100_000, 300_000, 3),
            (START + LEN - 10, 10, 4),
        ] {
            shadow.write(&image, at, &vec![byte; len as usize]).unwrap();
            self.expected[at as usize..(at + len) as usize].fill(byte);
        }
        shadow.forget(&image, 500_000, 100_000).unwrap();
        self.expected[500_000..600_000].fill(0);
        shadow.sync().unwrap();
        shadow
    }

    /// Makes a shadow, frozen, under PATH.
    fn frozen(&mut self) {
        let mut shadow = self.freeze();
        paths::rename(&self.path("s.new"), &self.path("s")).unwrap();
        shadow.set_state(State::Frozen).unwrap();
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aoede-shadow"));
        command.current_dir(self.dir.path()).args(args);
        if args.first() == Some(&"merge") {
            command.args(["--state-dir", "state"]);
        }
        command.output().unwrap()
    }

    fn good(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(text(&output.stderr), "");
        text(&output.stdout)
    }

    /// The line of an error, with exit code 1.
    fn bad(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let line = text(&output.stderr);
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(line.starts_with("aoede-shadow: error: "), "{line}");
        line
    }

    fn assert_merged(&self) {
        assert!(fs::read(self.path("image")).unwrap() == self.expected);
        for name in ["s", "s.new", "s.thaw", "s.cut"] {
            assert!(!self.path(name).exists(), "{name}");
        }
    }

    fn assert_untouched(&self) {
        assert!(fs::read(self.path("image")).unwrap() == pattern());
    }

    fn record(&self, name: &str, lines: &[(&str, String)]) {
        let mut text = String::from("version = 1\n");
        for (key, value) in lines {
            text += &format!("{key} = \"{value}\"\n");
        }
        fs::write(self.path("state").join(name), text).unwrap();
    }
}

/// Locks bytes as a target does; to the end for 0 of them.
fn lock(file: &File, start: u64, len: u64) {
    let lock = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: start as i64,
        l_len: len as i64,
        l_pid: 0,
    };
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_merge_brings_all_and_leaves_nothing() {
    let mut scene = Scene::new();
    scene.frozen();
    let shadow = scene.path("s").to_str().unwrap().to_owned();
    scene.record("this.shadow.toml", &[("shadow", shadow.clone())]);
    scene.record("other.shadow.toml", &[("shadow", shadow + "2")]);
    let line = scene.good(&["merge", "--dry-run", "s", "image"]);
    assert!(line.starts_with("would merge ") && line.contains(" of zeros from s into image"));
    assert!(scene.path("s").exists());
    scene.assert_untouched();
    let line = scene.good(&["merge", "s", "image"]);
    assert!(line.ends_with("the shadow is removed\n"), "{line}");
    scene.assert_merged();
    let left: Vec<_> = fs::read_dir(scene.path("state")).unwrap().collect();
    assert_eq!(left.len(), 1);
    assert!(scene.path("state/other.shadow.toml").exists());
}

#[test]
fn each_of_its_names_is_merged() {
    // The last two are of 0.1.0.
    for (name, called, state) in [
        ("s.new", "s.new", State::Freezing),
        ("s", "s", State::Freezing),
        ("s", "s.thaw", State::Freezing),
        ("s.thaw", "s.thaw", State::Freezing),
        ("s.thaw", "s", State::Freezing),
        ("s.thaw", "s", State::Thawing),
        ("s.thaw", "s.thaw", State::Thawing),
        ("s.cut", "s.cut", State::Frozen),
        ("s", "s", State::Thawing),
    ] {
        let mut scene = Scene::new();
        let mut shadow = scene.freeze();
        shadow.set_state(state).unwrap();
        drop(shadow);
        if name == "s.thaw" {
            fs::rename(scene.path("s.thaw"), scene.path("s")).unwrap();
        }
        if name != "s.new" {
            fs::rename(scene.path("s.new"), scene.path(name)).unwrap();
        }
        if name == "s.cut" || (name, state) == ("s", State::Thawing) {
            fs::remove_file(scene.path("s.thaw")).unwrap();
        }
        // A record names PATH whatever the file is called.
        let path = scene.path("s").to_str().unwrap().to_owned();
        scene.record("this.shadow.toml", &[("shadow", path)]);
        scene.good(&["merge", called, "image"]);
        scene.assert_merged();
        assert!(!scene.path("state/this.shadow.toml").exists(), "{name}");
    }
}

#[test]
fn path_is_another_inode_before_the_image_is_touched() {
    // What would be the new name is taken, so that it stops there.
    let mut scene = Scene::new();
    scene.frozen();
    fs::write(scene.path("s.thaw"), "mine").unwrap();
    let line = scene.bad(&["merge", "s", "image"]);
    assert!(line.contains("shadow s: renaming it to .thaw"), "{line}");
    scene.assert_untouched();
    assert_eq!(fs::read(scene.path("s.thaw")).unwrap(), b"mine");
    assert_eq!(
        paths::open(&scene.path("s")).unwrap().state(),
        State::Frozen
    );
}

#[test]
fn a_merge_that_was_cut_off_is_taken_up() {
    let mut scene = Scene::new();
    scene.frozen();
    let mut shadow = paths::open(&scene.path("s")).unwrap();
    let image = File::options()
        .read(true)
        .write(true)
        .open(scene.path("image"))
        .unwrap();
    shadow.set_state(State::Thawing).unwrap();
    assert!(shadow.merge(&image, 50_000).unwrap().left_chunks > 0);
    drop(shadow);
    scene.good(&["merge", "s", "image"]);
    scene.assert_merged();
}

#[test]
fn another_image_is_taken_only_when_told() {
    let mut scene = Scene::new();
    scene.frozen();
    fs::copy(scene.path("image"), scene.path("copy")).unwrap();
    let line = scene.bad(&["merge", "s", "copy"]);
    assert!(line.contains("image copy: is not the one") && line.contains("--other-image"));
    assert!(scene.path("s").exists());
    let short = File::create(scene.path("short")).unwrap();
    short.set_len(START + LEN - 1).unwrap();
    let line = scene.bad(&["merge", "--other-image", "s", "short"]);
    assert!(line.contains("ends before the shadow's window"), "{line}");
    scene.good(&["merge", "--other-image", "s", "copy"]);
    scene.assert_untouched();
    assert!(fs::read(scene.path("copy")).unwrap() == scene.expected);
    // One that has grown is another one too.
    let mut scene = Scene::new();
    scene.frozen();
    let image = File::options()
        .write(true)
        .open(scene.path("image"))
        .unwrap();
    image.set_len(IMAGE + 1).unwrap();
    let line = scene.bad(&["merge", "s", "image"]);
    assert!(
        line.contains(&format!("had {IMAGE} bytes and has {}", IMAGE + 1)),
        "{line}"
    );
}

#[test]
fn what_a_target_has_locked_is_left_alone() {
    let mut scene = Scene::new();
    let shadow = scene.freeze();
    for args in [
        &["merge", "s.new", "image"][..],
        &["check", "s.new", "image"],
    ] {
        let line = scene.bad(args);
        assert!(line.contains("another process has it open"), "{line}");
    }
    // A look is free.
    let lines = scene.good(&["inspect", "s.new"]);
    let user = format!(
        "in use:     by process {}; the figures may be a moment old",
        std::process::id()
    );
    for line in [&user, "state:      freezing"] {
        assert!(lines.lines().any(|l| l == line), "{line} in {lines}");
    }
    let json = scene.good(&["inspect", "--json", "s.new"]);
    let user = format!("\"in_use_by\": {}", std::process::id());
    for field in ["\"in_use\": true", &user, "\"state\": \"freezing\""] {
        assert!(json.contains(field), "{field} in {json}");
    }
    drop(shadow);
    // As a target locks the window of an export without -l.
    let image = File::options()
        .read(true)
        .write(true)
        .open(scene.path("image"))
        .unwrap();
    lock(&image, START, 0);
    let line = scene.bad(&["merge", "s.new", "image"]);
    assert!(line.contains("image image: a target serves it"), "{line}");
    scene.assert_untouched();
}

#[test]
fn an_arena_of_this_boot_goes_first() {
    let mut scene = Scene::new();
    scene.frozen();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let boot: String = boot.chars().filter(char::is_ascii_hexdigit).collect();
    let metadata = scene.image().metadata().unwrap();
    let birth = metadata
        .created()
        .map_or(0, |t| t.duration_since(UNIX_EPOCH).unwrap().as_nanos());
    let hex = |n: u64| format!("{n:016x}");
    let record = |boot: &str, start: u64, len: u64| {
        let lines = [
            ("arena", "/run/aoede/x.arena".to_owned()),
            ("boot_high", boot[..16].to_owned()),
            ("boot_low", boot[16..].to_owned()),
            ("device", hex(metadata.dev())),
            ("inode", hex(metadata.ino())),
            ("birth", hex(birth as u64)),
            ("start", hex(start)),
            ("len", hex(len)),
        ];
        scene.record("x.arena.toml", &lines);
    };
    record(&boot, START, i64::MAX as u64 - START);
    let line = scene.bad(&["merge", "s", "image"]);
    assert!(
        line.contains("/run/aoede/x.arena") && line.contains("start aoede once"),
        "{line}"
    );
    // Nor is it forgotten over a copy: what the arena holds belongs to the
    // shadow.
    fs::copy(scene.path("image"), scene.path("copy")).unwrap();
    scene.bad(&["merge", "--other-image", "s", "copy"]);
    scene.bad(&["merge", "--dry-run", "s", "image"]);
    fs::write(scene.path("state/x.arena.toml"), "version = 1\nnonsense").unwrap();
    let line = scene.bad(&["merge", "s", "image"]);
    assert!(line.contains("x.arena.toml: it cannot be read"), "{line}");
    scene.assert_untouched();
    // One of another window counts as well, unless its target lives.
    record(&boot, START + LEN, 4096);
    let line = scene.bad(&["merge", "s", "image"]);
    assert!(line.contains("/run/aoede/x.arena"), "{line}");
    let target = File::options()
        .read(true)
        .write(true)
        .open(scene.path("image"))
        .unwrap();
    lock(&target, START + LEN, 4096);
    scene.good(&["merge", "--dry-run", "s", "image"]);
    drop(target);
    // Another boot's is lost.
    record(&"0".repeat(32), START, LEN);
    scene.good(&["merge", "s", "image"]);
    scene.assert_merged();
}

/// The header of a shadow says "freezing" until it is merged.
#[test]
fn inspect_calls_the_state_by_its_name() {
    let mut scene = Scene::new();
    let shadow = scene.freeze();
    let paths = Paths::of(&scene.path("s"));
    let is = |state: &str, names: &[&str]| {
        for name in names {
            let lines = scene.good(&["inspect", name]);
            let line = format!("state:      {state}");
            assert!(lines.lines().any(|l| l == line), "{line} in {lines}");
            let json = scene.good(&["inspect", "--json", name]);
            assert!(json.contains(&format!("\"state\": \"{state}\"")), "{json}");
        }
    };
    is("freezing", &["s.new"]);
    paths::appear(&paths, shadow.file()).unwrap();
    is("frozen", &["s", "s.thaw"]);
    paths::begin_thaw(&paths, shadow.file(), &[0x42; 16]).unwrap();
    is("thawing", &["s", "s.thaw"]);
    drop(shadow);
    is("thawing", &["s", "s.thaw"]);
    assert!(
        scene
            .good(&["inspect", "--json", "s"])
            .contains("\"in_use\": false")
    );
    assert!(!scene.good(&["inspect", "s"]).contains("in use"));
    fs::remove_file(scene.path("s.thaw")).unwrap();
    for args in [
        &["inspect", "s"][..],
        &["check", "s"],
        &["merge", "s", "image"],
    ] {
        let line = scene.bad(args);
        assert!(line.contains("is the marker of s.thaw"), "{line}");
    }
}

#[test]
fn inspect_says_what_it_is() {
    let mut scene = Scene::new();
    scene.frozen();
    let shadow = paths::open(&scene.path("s")).unwrap();
    let data = shadow.map().data_chunks();
    let zeros = shadow.map().present() - data;
    drop(shadow);
    let lines = scene.good(&["inspect", "s"]);
    for line in [
        "state:      frozen",
        "generation: 9",
        "uuid:       42424242-4242-4242-4242-424242424242",
        "window:     1024000 bytes from byte 1536 of the image",
        "chunk:      4096 bytes",
    ] {
        assert!(lines.lines().any(|l| l == line), "{line} in {lines}");
    }
    let json = scene.good(&["inspect", "--json", "s"]);
    for field in [
        "\"shadow\": \"s\"".to_owned(),
        "\"state\": \"frozen\"".to_owned(),
        format!("\"data_chunks\": {data}"),
        format!("\"zero_chunks\": {zeros}"),
        format!("\"image_bytes\": {IMAGE}"),
    ] {
        assert!(json.contains(&field), "{field} in {json}");
    }
    // Frozen, so the first and the last chunk count only as far as they lie in
    // the window.
    let cut = (START % 4096) + 4096 - (START + LEN) % 4096;
    assert!(
        json.contains(&format!("\"data_bytes\": {}", data * 4096 - cut)),
        "{json}"
    );
    assert!(json.starts_with("{\n") && json.ends_with("\n}\n"));
}

#[test]
fn check_names_what_is_damaged() {
    let mut scene = Scene::new();
    scene.frozen();
    let line = scene.good(&["check", "s", "image"]);
    assert!(line.contains("whole, and it belongs to image"), "{line}");
    let found = |args: &[&str]| {
        let output = scene.run(args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        text(&output.stdout)
    };
    fs::copy(scene.path("image"), scene.path("copy")).unwrap();
    assert!(found(&["check", "s", "copy"]).contains("image copy: is not the one"));
    assert!(found(&["check", "s", "s"]).contains("image s: is the shadow itself"));
    let shadow = File::options().write(true).open(scene.path("s")).unwrap();
    shadow.write_all_at(b"?", 100).unwrap();
    assert!(found(&["check", "s"]).starts_with("shadow s: header, copy 0: its checksum is wrong"));
    for at in [8192, 8192 + 4096] {
        shadow.write_all_at(b"?", at + 1000).unwrap();
    }
    let lines = found(&["check", "s"]);
    assert_eq!(lines.lines().count(), 3);
    assert!(
        lines.contains("bitmap page 0 (image sectors 3 to 2002), copy 1"),
        "{lines}"
    );
    let line = scene.bad(&["merge", "s", "image"]);
    assert!(line.contains("image sectors 3 to 2002"), "{line}");
    scene.assert_untouched();
}

#[test]
fn what_cannot_be_is_refused_in_a_line() {
    let mut scene = Scene::new();
    scene.frozen();
    fs::write(scene.path("text"), "no shadow").unwrap();
    for (args, part) in [
        (&["inspect", "none"][..], "shadow none: there is none"),
        (&["inspect", "."], "shadow .: is no regular file"),
        (
            &["inspect", "text"],
            "shadow text: is no shadow of a frozen image",
        ),
        (
            &["check", "text"],
            "shadow text: is no shadow of a frozen image",
        ),
        (
            &["merge", "text", "image"],
            "shadow text: is no shadow of a frozen image",
        ),
        (&["merge", "s", "none"], "image none: looking at it"),
        (&["merge", "s", "/dev/null"], "image /dev/null: is neither"),
        (&["merge", "s", "s"], "image s: is the shadow itself"),
    ] {
        let line = scene.bad(args);
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(fs::read(scene.path("text")).unwrap(), b"no shadow");
    assert!(paths::open(&scene.path("s")).unwrap().map().get(0) == Chunk::Data);
    for args in [
        &[][..],
        &["merge"],
        &["merge", "a"],
        &["wat"],
        &["inspect", "--wat", "s"],
    ] {
        let output = scene.run(args);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert_eq!(text(&output.stderr).lines().count(), 1);
    }
    assert!(scene.good(&["--help"]).contains("merge"));
    assert!(scene.good(&["--version"]).starts_with("aoede-shadow "));
}

/// A bar is drawn on terminals alone: none here.
#[test]
fn the_page_of_the_manual_has_every_option() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../man/aoede-shadow.8");
    let page = fs::read_to_string(page).unwrap();
    let scene = Scene::new();
    for command in ["inspect", "check", "merge"] {
        assert!(page.contains(&format!(".It Cm {command}")), "{command}");
        let help = scene.good(&[command, "--help"]);
        let options = help
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("--"));
        for option in options.filter(|option| *option != "help") {
            let option = option.trim_end_matches(|c: char| !c.is_alphanumeric());
            assert!(
                page.contains(&format!("Fl -{option}")),
                "{command} --{option}"
            );
        }
    }
}

#[test]
fn killed_anywhere_it_is_taken_up_again() {
    let mut scene = Scene::new();
    let big: u64 = 96 << 20;
    let image = File::options()
        .write(true)
        .open(scene.path("image"))
        .unwrap();
    image.set_len(big).unwrap();
    let spec = Spec {
        uuid: [0x43; 16],
        generation: 1,
        geometry: Geometry::new(4096, 0, big).unwrap(),
        identity: Identity::of(&image).unwrap(),
    };
    scene.expected.resize(big as usize, 0);
    let mut shadow = paths::create(&Paths::of(&scene.path("s")), &spec).unwrap();
    paths::appear(&Paths::of(&scene.path("s")), shadow.file()).unwrap();
    for at in (0..big - (1 << 20)).step_by(1 << 20) {
        let data = vec![(at >> 20) as u8 | 1; 700_000];
        shadow.write(&scene.image(), at + 5000, &data).unwrap();
        scene.expected[at as usize + 5000..at as usize + 705_000].copy_from_slice(&data);
    }
    shadow.sync().unwrap();
    drop(shadow);
    let mut kills = 0;
    for wait in 1.. {
        let name = ["s.new", "s", "s.thaw"]
            .into_iter()
            .find(|name| scene.path(name).exists());
        let Some(name) = name else { break };
        // A marker has its shadow.
        paths::behind_marker(&scene.path(name)).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_aoede-shadow"))
            .current_dir(scene.dir.path())
            .args(["merge", "--state-dir", "state", name, "image"])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(wait * 3));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        if ended.is_none() {
            kills += 1;
        }
        assert!(ended.is_none_or(|status| status.success()));
    }
    assert!(kills > 0);
    scene.assert_merged();
}

/// A loop device over the image, gone with this.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A loop device with large sectors, or `None` where there can be none.
fn loop_device(image: &Path) -> Option<Loop> {
    let complete = std::env::var_os("AOEDE_TESTS_COMPLETE").is_some_and(|v| v == "1");
    let mut losetup = Command::new("losetup");
    let losetup = losetup
        .args(["--find", "--show", "--sector-size", "4096"])
        .arg(image);
    match losetup.output() {
        Ok(output) if output.status.success() => Some(Loop(text(&output.stdout).trim().to_owned())),
        other => {
            assert!(
                !complete,
                "a merge into a device needs root and losetup: {other:?}"
            );
            eprintln!("left out: a merge into a device: needs root and losetup");
            None
        }
    }
}

#[test]
fn a_device_is_merged_into_while_nobody_has_it() {
    let mut scene = Scene::new();
    // Whole blocks, which is what a device has.
    let bytes = IMAGE.next_multiple_of(4096);
    let file = File::options()
        .write(true)
        .open(scene.path("image"))
        .unwrap();
    file.set_len(bytes).unwrap();
    scene.expected.resize(bytes as usize, 0);
    let Some(device) = loop_device(&scene.path("image")) else {
        return;
    };
    let spec = Spec {
        uuid: [0x44; 16],
        generation: 1,
        geometry: Geometry::new(4096, START, LEN).unwrap(),
        identity: Identity::of(&File::open(&device.0).unwrap()).unwrap(),
    };
    assert_eq!(
        (spec.identity.kind, spec.identity.bytes),
        (Kind::Device, bytes)
    );
    let image = File::open(&device.0).unwrap();
    let mut shadow = paths::create(&Paths::of(&scene.path("s")), &spec).unwrap();
    shadow.write(&image, START, &[2; 700]).unwrap();
    scene.expected[START as usize..START as usize + 700].fill(2);
    shadow.forget(&image, 90_000, 123_456).unwrap();
    scene.expected[90_000..90_000 + 123_456].fill(0);
    shadow.sync().unwrap();
    drop((shadow, image));
    // As a target has it.
    let mut how = File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut how, nix::libc::O_EXCL);
    let held = how.read(true).write(true).open(&device.0).unwrap();
    let line = scene.bad(&["merge", "s.new", &device.0]);
    assert!(line.contains("the device is in use"), "{line}");
    drop(held);
    scene.good(&["check", "s.new", &device.0]);
    scene.good(&["merge", "s.new", &device.0]);
    drop(device);
    scene.assert_merged();
}
