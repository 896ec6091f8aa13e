//! Starts that must not be, and the tool that works where no target does.

use std::process::Command;

use shadow::{Identity, MemoryFile, Shadow, State, header_page, paths};

use super::*;
use crate::support::AOEDE;
use crate::workshop::{Ended, run};

/// Everything in the image's folder, but for what a run makes anew.
fn contents(bed: &Bed) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all: Vec<_> = files(bed.store.path(), "")
        .into_iter()
        .filter(|path| path.is_file())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    all.sort();
    all
}

/// A target that refuses to start, and changes nothing by that.
#[track_caller]
fn untouched(bed: &Bed, options: &[&str]) -> String {
    let before = contents(bed);
    let said = bed.refused(options);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(contents(bed) == before, "something was changed: {said}");
    said
}

/// The shadow of a small image, as a kill has left it; with a write.
fn leave(bed: &Bed, extra: &[&str]) {
    let mut target = bed.start(extra);
    bed.freeze(&target);
    let mut client = bed.client();
    client.write_many(16, &data(1, 8)).unwrap();
    client.flush().unwrap();
    client.write_many(20, &data(2, 8)).unwrap();
    target.kill().unwrap();
}

#[test]
fn a_path_that_is_something_else_is_refused_and_left_alone() {
    if !lab::require("paths that are no shadow", &[Need::Network]) {
        return;
    }
    let bed = Bed::with(1500, 64);
    let path = bed.shadow();
    let shadow = path.display().to_string();
    let image = bed.store.image().display().to_string();
    let given = ["-f", &shadow];
    for name in ["", ".new", ".thaw", ".cut"] {
        let place = PathBuf::from(format!("{shadow}{name}"));
        for text in ["", "a letter to my aunt\n", &"x".repeat(100_000)] {
            fs::write(&place, text).unwrap();
            let said = untouched(&bed, &given);
            assert!(said.contains(&*place.to_string_lossy()), "{said}");
            // Nor is it given up as if it were one.
            untouched(&bed, &["-f", &shadow, "--discard-shadow"]);
        }
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        untouched(&bed, &given);
        untouched(&bed, &["-f", &shadow, "--discard-shadow"]);
        fs::remove_dir(&place).unwrap();
        std::os::unix::fs::symlink("/dev/null", &place).unwrap();
        untouched(&bed, &given);
        fs::remove_file(&place).unwrap();
    }
    let nowhere = bed.store.path().join("no/where").display().to_string();
    for (path, says) in [
        (image.as_str(), "the image itself"),
        (&nowhere, "directory"),
        ("/proc/shadow.img", "/proc/shadow.img"),
        ("", "empty"),
    ] {
        let options = [&QUICK[..], &["-f", path]].concat();
        let mut process = command(&bed.wire.host, &bed.store, &["tgt0"], &options)
            .start()
            .unwrap();
        let status = process.wait(Deadline::seconds(20)).unwrap();
        let said = process.output().join("\n");
        assert!(!status.success() && said.contains(says), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
    let link = bed.store.path().join("link");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    untouched(&bed, &["-f", &link.display().to_string()]);
    stop(bed.start(&[]));
    bed.nothing_left();
}

#[test]
fn the_shadow_of_another_image_is_refused_and_left_alone() {
    if !lab::require("another image's shadow", &[Need::Network]) {
        return;
    }
    let (bed, other) = (Bed::with(1500, 64), Bed::with(1500, 64));
    leave(&other, &[]);
    let copy = |from: PathBuf, to: PathBuf| fs::copy(from, to).unwrap();
    let shadow = bed.shadow().display().to_string();
    for name in ["", ".new", ".thaw", ".cut"] {
        let place = PathBuf::from(format!("{shadow}{name}"));
        copy(other.shadow(), place.clone());
        let said = untouched(&bed, &["-f", &shadow]);
        assert!(said.contains("none of this image"), "{said}");
        fs::remove_file(place).unwrap();
    }
    // Its own, twice.
    let target = other.start(&[]);
    other.thaw(&target);
    stop(target);
    leave(&other, &[]);
    let shadow = other.shadow().display().to_string();
    let cut = PathBuf::from(format!("{shadow}.cut"));
    copy(other.shadow(), cut.clone());
    let said = untouched(&other, &["-f", &shadow]);
    assert!(said.contains(".cut"), "{said}");
    fs::remove_file(cut).unwrap();
    let target = other.start(&[]);
    assert_eq!(other.client().read_many(20, 8).unwrap(), data(2, 8));
    other.thaw(&target);
    stop(target);
}

#[test]
fn another_window_of_a_frozen_image_is_refused() {
    if !lab::require("windows of a frozen image", &[Need::Network]) {
        return;
    }
    let bed = Bed::with(1500, 64);
    leave(&bed, &["-o", "8", "-l", "40"]);
    let shadow = bed.shadow().display().to_string();
    let elsewhere = bed.store.path().join("another").display().to_string();
    let windows = [
        &["-o", "8", "-l", "41"][..],
        &["-o", "8"],
        &["-o", "9", "-l", "39"],
        &["-o", "47", "-l", "4"],
        &["-o", "0", "-l", "9"],
        &[],
    ];
    for window in windows {
        for path in [&["-f", &shadow][..], &["-f", &elsewhere], &[]] {
            let said = untouched(&bed, &[window, path].concat());
            assert!(said.contains(&shadow), "{window:?} {path:?}: {said}");
        }
    }
    // What shares nothing with it is free.
    for window in [["-o", "0", "-l", "8"], ["-o", "48", "-l", "16"]] {
        let options = [&window[..], &["-f", &elsewhere]].concat();
        stop(bed.start_with(&options));
    }
    let target = bed.start(&["-o", "8", "-l", "40"]);
    assert_eq!(bed.client().read_many(20, 8).unwrap(), data(2, 8));
    bed.thaw(&target);
    stop(target);
    assert!(bed.image()[24 * 512..28 * 512] == data(1, 8)[..2048]);
    assert!(bed.image()[28 * 512..36 * 512] == data(2, 8));
    stop(bed.start(&[]));
}

#[test]
fn two_windows_by_two_processes_have_a_shadow_each() {
    if !lab::require("two windows with a shadow each", &[Need::Network]) {
        return;
    }
    let (bed, other) = (Bed::with(1500, 64), Wire::new(1500));
    let second = bed.store.path().join("second.img");
    let start = |second: &Path| {
        let path = second.display().to_string();
        let options = [&QUICK[..], &["-f", &path, "-o", "32"]].concat();
        serve(&other.host, &bed.store, &["tgt0"], &options)
    };
    let mut one = bed.start(&["-l", "32"]);
    let mut two = start(&second);
    let (mut a, mut b) = (bed.client(), other.client());
    // The same file for both will not do.
    order(&two, 1);
    until("the second shadow", || second.exists());
    bed.freeze(&one);
    let still = bed.image();
    a.write_many(3, &data(1, 20)).unwrap();
    b.write_many(3, &data(2, 20)).unwrap();
    one.kill().unwrap();
    two.kill().unwrap();
    assert!(bed.image() == still);
    let one = bed.start(&["-l", "32"]);
    let two = start(&second);
    let (mut a, mut b) = (bed.client(), other.client());
    assert_eq!(a.read_many(3, 20).unwrap(), data(1, 20));
    assert_eq!(b.read_many(3, 20).unwrap(), data(2, 20));
    assert!(bed.image() == still);
    order(&two, 2);
    until("the second one vanishes", || !second.exists());
    let image = bed.image();
    assert!(image[..32 * 512] == still[..32 * 512]);
    assert!(image[35 * 512..55 * 512] == data(2, 20));
    assert!(bed.shadow().exists());
    bed.thaw(&one);
    assert!(bed.image()[3 * 512..23 * 512] == data(1, 20));
    stop(one);
    stop(two);
}

#[test]
fn what_a_shadow_holds_can_be_given_up() {
    if !lab::require("--discard-shadow", &[Need::Network]) {
        return;
    }
    let bed = Bed::with(1500, 64);
    // Harmless where there is none.
    stop(bed.start(&["--discard-shadow"]));
    leave(&bed, &[]);
    // The cache's part is one thing, the shadow another.
    stop(bed.start(&["--set", "on_stop=keep"]));
    let shadow = bed.shadow();
    let still = bed.image();
    let away = bed.store.path().join("away");
    fs::copy(&shadow, &away).unwrap();
    let said = stop(bed.start(&["--discard-shadow"])).join("\n");
    assert!(said.contains("set aside (--discard-shadow)"), "{said}");
    assert!(said.contains(".discarded"), "{said}");
    let discarded = PathBuf::from(format!("{}.discarded", shadow.display()));
    assert!(fs::read(&discarded).unwrap() == fs::read(&away).unwrap());
    assert!(bed.image() == still);
    fs::remove_file(&discarded).unwrap();
    bed.nothing_left();
    // What was given up before stays.
    let target = bed.start(&["--set", "on_stop=keep"]);
    bed.freeze(&target);
    stop(target);
    fs::write(&discarded, "mine").unwrap();
    let path = shadow.display().to_string();
    let said = bed.refused(&["-f", &path, "--discard-shadow"]);
    assert!(said.contains(".discarded: File exists"), "{said}");
    assert_eq!(fs::read(&discarded).unwrap(), b"mine");
    assert!(shadow.exists());
    fs::remove_file(&discarded).unwrap();
    stop(bed.start(&["--discard-shadow"]));
    fs::remove_file(&discarded).unwrap();
    bed.nothing_left();
    stop(bed.start_with(&[]));
}

const TOOL: &str = "aoede-shadow";

fn tool(args: &[&str]) -> Ended {
    let mut command = Command::new(Path::new(AOEDE).with_file_name(TOOL));
    command.args(args);
    run(None, command, Deadline::seconds(20))
}

#[test]
fn the_tool_keeps_away_from_a_running_target_and_merges_after_it() {
    let path = Path::new(AOEDE).with_file_name(TOOL);
    // Built with the workspace.
    let needs = [Need::Network, Need::Path(path.to_str().unwrap())];
    if !lab::require("aoede-shadow beside a target", &needs) {
        return;
    }
    let bed = Bed::with(1500, 64);
    let (shadow, image) = (bed.shadow(), bed.store.image());
    let (shadow, image) = (shadow.to_str().unwrap(), image.to_str().unwrap());
    let state = bed.store.state();
    let merge = |extra: &[&str]| {
        let state = ["--state-dir", state.to_str().unwrap()];
        tool(&[&["merge"], extra, &state, &[shadow, image]].concat())
    };
    let mut target = bed.start(&[]);
    bed.freeze(&target);
    let mut client = bed.client();
    client.write_many(16, &data(1, 8)).unwrap();
    client.flush().unwrap();
    let still = bed.image();
    let ended = tool(&["inspect", shadow]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let user = format!("in use:     by process {}; ", target.pid());
    assert!(ended.out.contains(&user), "{ended:?}");
    assert!(ended.out.contains("state:      frozen\n"), "{ended:?}");
    assert!(ended.out.contains("4.0 KiB (4096 bytes)\n"), "{ended:?}");
    for extra in [&[][..], &["--dry-run"]] {
        let ended = merge(extra);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.line().contains("another process"), "{ended:?}");
    }
    client.write_many(20, &data(2, 8)).unwrap();
    target.kill().unwrap();
    // What the dead target's cache holds belongs over the shadow.
    let ended = merge(&[]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.line().contains("arena"), "{ended:?}");
    assert!(bed.image() == still && bed.shadow().exists());
    let target = bed.start(&["--set", "on_stop=keep"]);
    stop(target);
    assert!(bed.image() == still && bed.shadow().exists());
    let ended = tool(&["inspect", shadow]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let ended = tool(&["check", shadow, image]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let ended = merge(&["--dry-run"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(bed.image() == still && bed.shadow().exists());
    let ended = merge(&[]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    bed.nothing_left();
    assert!(bed.image()[16 * 512..20 * 512] == data(1, 8)[..2048]);
    assert!(bed.image()[20 * 512..28 * 512] == data(2, 8));
    let target = bed.start(&[]);
    assert_eq!(bed.client().read_many(20, 8).unwrap(), data(2, 8));
    stop(target);
}

/// Lays the shadow of the crate's test vector, which 0.1.0 made, beside the
/// image of a bed, as one of that image; the image's sector i is full of i + 1.
fn left_by_0_1_0(bed: &Bed, name: &str, state: State) -> Vec<u8> {
    let vector = include_str!("../../../shadow/tests/vectors/version-1.hex");
    let lines = vector.lines().filter(|line| !line.starts_with('#'));
    let (mut image, mut file) = (0, Vec::new());
    for line in lines {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |word: &str| word.parse::<usize>().unwrap();
        match words[..] {
            ["image", n] => image = number(n),
            ["length", n] => file.resize(number(n), 0),
            [at, hex] | [at, hex, "*", _] => {
                let count = words.get(3).map_or(1, |n| number(n));
                let digits = |i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
                let piece: Vec<u8> = (0..hex.len() / 2).map(digits).collect();
                let piece = piece.repeat(count);
                file[number(at)..][..piece.len()].copy_from_slice(&piece);
            }
            _ => panic!("line '{line}'"),
        }
    }
    let bytes: Vec<u8> = (0..image).map(|i| (i / 512 + 1) as u8).collect();
    fs::write(bed.store.image(), &bytes).unwrap();
    let mut spec = *Shadow::open(MemoryFile::new(file.clone()), file.len() as u64)
        .unwrap()
        .spec();
    spec.identity = Identity::of(&fs::File::open(bed.store.image()).unwrap()).unwrap();
    for (sequence, state) in [(1, State::Freezing), (2, state)] {
        let page = header_page(&spec, state, sequence);
        file[page.offset as usize..][..page.bytes.len()].copy_from_slice(&page.bytes);
    }
    fs::write(bed.place().join(name), file).unwrap();
    // What the window shows with the shadow over the image.
    let mut expected = bytes;
    expected[2048..2560].fill(0xA1);
    expected[8192..12288].fill(0xA2);
    expected[12288..24576].fill(0);
    expected[32000..32768].fill(0xA3);
    expected
}

#[test]
fn a_shadow_that_0_1_0_left_is_taken_up_in_each_phase() {
    if !lab::require("shadows of 0.1.0", &[Need::Network]) {
        return;
    }
    for (name, state, frozen) in [
        ("shadow.img.new", State::Freezing, true),
        ("shadow.img", State::Freezing, true),
        ("shadow.img", State::Thawing, false),
        ("shadow.img.cut", State::Freezing, false),
        ("shadow.img.cut", State::Thawing, false),
    ] {
        println!("{name}, {state:?}");
        let bed = Bed::with(1500, 64);
        let expected = left_by_0_1_0(&bed, name, state);
        let image = bed.image();
        let window = ["-o", "3", "-l", "61", "--set", "idle_flush=600000"];
        let mut target = bed.start(&window);
        let says = if frozen {
            "frozen by an earlier process, until a thaw: 0 MiB to merge"
        } else {
            "the interrupted thaw goes on: 0 MiB to merge"
        };
        let line = format!("e1.1: {}: {says}", bed.shadow().display());
        // The log is a thread of its own.
        until("it is said", || {
            target.output().iter().any(|said| said.ends_with(&line))
        });
        let seen = |bed: &Bed| bed.client().read_many(0, 61).unwrap();
        assert!(seen(&bed) == expected[1536..1536 + 61 * 512]);
        if frozen {
            assert!(bed.image() == image, "it moves while it is frozen");
            let inode = bed.inode();
            bed.client().write_many(60, &data(1, 1)).unwrap();
            // The names are what this version makes of them.
            target.kill().unwrap();
            target = bed.start(&window);
            assert_eq!(bed.inode(), inode);
            assert!(bed.image() == image, "it moves while it is frozen");
            bed.client()
                .write_many(60, &expected[32256..32768])
                .unwrap();
            bed.thaw(&target);
        } else {
            until("the shadow vanishes", || bed.shadows().is_empty());
        }
        assert!(seen(&bed) == expected[1536..1536 + 61 * 512]);
        bed.nothing_left();
        stop(target);
        assert!(bed.image() == expected);
    }
}

#[test]
fn a_marker_without_its_shadow_is_refused_and_can_be_given_up() {
    if !lab::require("a marker without its shadow", &[Need::Network]) {
        return;
    }
    let bed = Bed::with(1500, 64);
    let path = bed.shadow().display().to_string();
    for name in ["shadow.img", "shadow.img.thaw"] {
        let place = bed.place().join(name);
        paths::make_marker(&place, &[1; 16]).unwrap();
        let said = untouched(&bed, &["-f", &path]);
        assert!(said.contains("is the marker of shadow"), "{said}");
        assert!(said.contains("--discard-shadow"), "{said}");
        stop(bed.start(&["--discard-shadow"]));
        bed.nothing_left();
    }
    // The marker of another shadow, beside ours.
    leave(&bed, &[]);
    let thaw = bed.place().join("shadow.img.thaw");
    let uuid = paths::read_marker(&thaw).unwrap().unwrap();
    fs::remove_file(&thaw).unwrap();
    paths::make_marker(&thaw, &[1; 16]).unwrap();
    let said = untouched(&bed, &["-f", &path]);
    assert!(said.contains("shadow.img.thaw"), "{said}");
    paths::remove_marker(&thaw, &[1; 16]).unwrap();
    paths::make_marker(&thaw, &uuid).unwrap();
    let target = bed.start(&[]);
    bed.thaw(&target);
    stop(target);
    assert!(bed.image()[20 * 512..28 * 512] == data(2, 8));
}
