//! What is typed, and how it is refused: one line that names the thing and what
//! to do, the right exit status, and nothing made or changed.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime};

use initiator::client::Client;
use initiator::frame::SECTOR;
use initiator::lab::{self, Deadline, Namespace, Need, Process, Spawn, wait_until};
use nix::fcntl::{FcntlArg, fcntl};

use crate::support::{AOEDE, AOEDED, Store, command, serve, stop};
use crate::workshop::{Ended, Lab, run, sector, soon, timed, traced};

const IMAGE: u64 = 2048;

/// What is in a folder, by name: size, time of change, a sum of the content.
fn snapshot(dir: &Path) -> BTreeMap<PathBuf, (u64, SystemTime, u64)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        let content = match metadata.is_dir() {
            true => {
                found.extend(snapshot(&path));
                Vec::new()
            }
            false => fs::read(&path).unwrap_or_default(),
        };
        let time = metadata.modified().unwrap();
        let mut sum = DefaultHasher::new();
        content.hash(&mut sum);
        found.insert(path, (metadata.len(), time, sum.finish()));
    }
    found
}

/// A host with an Ethernet interface `tgt0` and a `tun0` that is none, and a
/// folder with an image of 2048 sectors.
struct Bench {
    lab: Lab,
    store: Store,
}

impl Bench {
    fn new() -> Bench {
        let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
        fs::write(store.path().join("empty.img"), b"").unwrap();
        fs::write(store.path().join("stub.img"), [1; 511]).unwrap();
        fs::create_dir(store.path().join("folder")).unwrap();
        fs::write(store.path().join("bad.toml"), "spin = 1\nring_sise = 5\n").unwrap();
        Bench { lab, store }
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.store.path())
            .args(arguments)
            .args(["--state-dir", "state", "--set", "address_probe=10"]);
        command
    }

    /// Runs it to the end and sees that the folder is as before.
    fn refused(&self, program: &str, arguments: &[&str]) -> Ended {
        let before = snapshot(self.store.path());
        let command = self.command(program, arguments);
        let ended = run(Some(&self.lab.host), command, Deadline::seconds(20));
        assert_eq!(snapshot(self.store.path()), before, "{arguments:?}");
        assert_eq!(ended.out, "", "{arguments:?}");
        ended
    }
}

/// Arguments, and what the line must contain.
type Case<'a> = (&'a [&'a str], &'a [&'a str]);

fn check(bench: &Bench, code: i32, cases: &[Case]) {
    let mut wrong = Vec::new();
    for (arguments, parts) in cases {
        let ended = bench.refused(AOEDE, arguments);
        let line = ended.err.trim_end_matches('\n');
        let one = !line.is_empty() && line.chars().all(|c| !c.is_control());
        let named = parts.iter().all(|part| line.contains(part));
        let error = line.starts_with("aoede: error: ") || line.starts_with("aoede: warning: ");
        if !(one && named && error && ended.code == Some(code)) {
            wrong.push(format!("{arguments:?} wants {parts:?}: {ended:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_means_nothing_is_refused_with_2() {
    if !lab::require("a bad command line", &[Need::Network]) {
        return;
    }
    let long = "1".repeat(40);
    let cases: &[Case] = &[
        (&[], &["SHELF", "--help"]),
        (&["1"], &["SHELF SLOT NETIF"]),
        (&["1", "1"], &["SHELF SLOT NETIF"]),
        (&["1", "1", "disk.img"], &["interface", "NETIF"]),
        (
            &["65535", "1", "tgt0", "disk.img"],
            &["shelf 65535", "0 to 65534"],
        ),
        (
            &["70000", "1", "tgt0", "disk.img"],
            &["shelf 70000", "0 to 65534"],
        ),
        (&["x", "1", "tgt0", "disk.img"], &["shelf x", "0 to 65534"]),
        (&["", "1", "tgt0", "disk.img"], &["shelf", "0 to 65534"]),
        (
            &["0x10", "1", "tgt0", "disk.img"],
            &["shelf 0x10", "0 to 65534"],
        ),
        (
            &["+1", "1", "tgt0", "disk.img"],
            &["shelf +1", "0 to 65534"],
        ),
        (
            &[" 1", "1", "tgt0", "disk.img"],
            &["shelf  1", "0 to 65534"],
        ),
        (&[&long, "1", "tgt0", "disk.img"], &[&long, "0 to 65534"]),
        (&["1", "255", "tgt0", "disk.img"], &["slot 255", "0 to 254"]),
        (&["1", "300", "tgt0", "disk.img"], &["slot 300", "0 to 254"]),
        (&["1", "-1", "tgt0", "disk.img"], &["-1", "--help"]),
        (&["1", "1", "tgt0", "tgt0", "disk.img"], &["tgt0", "twice"]),
        (&["1", "1", "tgt0", ""], &["empty"]),
        (
            &["1", "1", "tgt0", "disk.img", "-b", "1"],
            &["-b 1", "2 to 65535"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-b", "65536"],
            &["-b 65536", "2 to"],
        ),
        (&["1", "1", "tgt0", "disk.img", "-m", "zz"], &["-m", "zz"]),
        (
            &["1", "1", "tgt0", "disk.img", "-m", "00:11:22:33:44"],
            &["-m", "00:11:22:33:44"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-m", "00:11:22:33:44:55,"],
            &["-m"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-m", "ff:ff:ff:ff:ff:ff"],
            &["ff:ff:ff:ff:ff:ff"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-m", "01:00:5e:00:00:01"],
            &["01:00:5e:00:00:01"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-o", "1k"],
            &["-o 1k", "whole number"],
        ),
        (&["1", "1", "tgt0", "disk.img", "-o", "-1"], &["-1"]),
        (
            &["1", "1", "tgt0", "disk.img", "-l", "0"],
            &["-l 0", "from 1"],
        ),
        (&["1", "1", "tgt0", "disk.img", "-l", &long], &[&long]),
        (
            &["1", "1", "tgt0", "no.img", "--create", "1000"],
            &["1000", "512"],
        ),
        (
            &["1", "1", "tgt0", "no.img", "--create", "0"],
            &["--create 0", "512 bytes at least"],
        ),
        (
            &["1", "1", "tgt0", "no.img", "--create", "1Q"],
            &["1Q", "64M"],
        ),
        (
            &["1", "1", "tgt0", "no.img", "--create", "1M,now"],
            &["now", "prealloc"],
        ),
        (&["1", "1", "tgt0", "no.img", "--create", ""], &["--create"]),
        (
            &["1", "1", "tgt0", "disk.img", "--deny", "all"],
            &["all", "config, mask, reserve"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--log", "file"],
            &["file", "syslog"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--set", "spin"],
            &["spin", "key=value"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--set", "spinn=1"],
            &["spinn", "'spin'"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--set", "spin=99999"],
            &["spin", "10000"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--set", "receive=dma"],
            &["receive", "recvmmsg"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--wat"],
            &["--wat", "--help"],
        ),
        (&["1", "1", "tgt0", "disk.img", "-q", "-v"], &["--help"]),
        (&["1", "1", "tgt0", "disk.img", "-b"], &["-b", "--help"]),
        // What is typed cannot put a second line into the first.
        (
            &["1\n2", "1", "tgt0", "disk.img"],
            &["shelf 1", "0 to 65534"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--log", "a\nb"],
            &["--log a"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--set", "a\x1b[2J\nb=1"],
            &["--set"],
        ),
    ];
    check(&Bench::new(), 2, cases);
}

#[test]
fn what_cannot_be_served_is_refused_with_1() {
    if !lab::require("what cannot be served", &[Need::Network]) {
        return;
    }
    let bench = Bench::new();
    bench
        .lab
        .host
        .ip(&["tuntap", "add", "dev", "tun0", "mode", "tun"])
        .unwrap();
    let alias = ["link", "property", "add", "dev", "tgt0", "altname", "alt0"];
    bench.lab.host.ip(&alias).unwrap();
    let cases: &[Case] = &[
        (&["1", "1", "tgt0", "no.img"], &["no.img", "--create"]),
        (&["1", "1", "tgt0", "no/no.img"], &["no/no.img"]),
        (
            &["1", "1", "tgt0", "no/no.img", "--create", "1M"],
            &["no/no.img", "making it"],
        ),
        (&["1", "1", "tgt0", "disk.img/x"], &["disk.img/x"]),
        (&["1", "1", "tgt0", "empty.img"], &["empty.img", "truncate"]),
        (&["1", "1", "tgt0", "stub.img"], &["stub.img", "truncate"]),
        (&["1", "1", "tgt0", "folder"], &["folder", "regular file"]),
        (
            &["1", "1", "tgt0", "/dev/null"],
            &["/dev/null", "regular file"],
        ),
        (
            &["1", "1", "nope0", "disk.img"],
            &["nope0", "ip link", "--wait-for-interfaces"],
        ),
        // What old tools call an alias is the same interface once more.
        (&["1", "1", "tgt0:1", "disk.img"], &["tgt0:1", "ip link"]),
        (
            &["1", "1", "tgt0", "alt0", "disk.img"],
            &["alt0", "tgt0", "once"],
        ),
        (
            &["1", "1", "tgt0", "nope0", "disk.img"],
            &["nope0", "ip link"],
        ),
        (
            &["1", "1", "a-name-much-too-long", "disk.img"],
            &["a-name-much-too-long", "ip link"],
        ),
        (
            &["1", "1", "nope0", "no.img", "--create", "1M"],
            &["nope0", "ip link"],
        ),
        (&["1", "1", "tun0", "disk.img"], &["tun0", "not Ethernet"]),
        (
            &["1", "1", "tgt0", "disk.img", "-o", "2049"],
            &["disk.img", "2048 sectors", "lower -o"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-l", "2049"],
            &["disk.img", "2048 sectors", "-l"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-o", "2000", "-l", "49"],
            &["2048 sectors", "lower"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-o", "2048"],
            &["disk.img", "2048 sectors", "lower -o"],
        ),
        (
            &["e1.1", "tgt0", "link.img"],
            &["link.img", "link to gone.img"],
        ),
        (
            &["1.1", "tgt0", "link.img", "--create", "1M"],
            &["link.img", "link to gone.img"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "-o", "18014398509481983"],
            &["2048 sectors"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--tuneup", "no.toml"],
            &["no.toml"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--tuneup", "bad.toml"],
            &["bad.toml:2", "ring_size"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--pid-file", "no/pid"],
            &["no/pid", "--pid-file"],
        ),
        (
            &[
                "1",
                "1",
                "tgt0",
                "no.img",
                "--create",
                "1M",
                "--pid-file",
                "no/pid",
            ],
            &["no/pid", "--pid-file"],
        ),
        // What stands there is somebody's data.
        (
            &["1", "1", "tgt0", "disk.img", "--pid-file", "disk.img"],
            &["disk.img", "the image itself"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--pid-file", "hard.img"],
            &["hard.img", "something else", "--pid-file"],
        ),
        (
            &["1", "1", "tgt0", "disk.img", "--pid-file", "/dev/null"],
            &["/dev/null", "no regular file"],
        ),
        (&["1", "1", "tgt0", "a\nb.img"], &["b.img"]),
    ];
    std::os::unix::fs::symlink("gone.img", bench.store.path().join("link.img")).unwrap();
    fs::hard_link(bench.store.image(), bench.store.path().join("hard.img")).unwrap();
    check(&bench, 1, cases);
    bench.lab.host.set_mtu("tgt0", 500).unwrap();
    let small: Case = (
        &["1", "1", "tgt0", "no.img", "--create", "1M"],
        &["tgt0", "500", "548"],
    );
    check(&bench, 1, &[small]);
}

#[test]
fn a_state_file_that_means_nothing_is_refused_before_an_image_is_made() {
    if !lab::require("a damaged state file", &[Need::Network]) {
        return;
    }
    let bench = Bench::new();
    let new = bench.store.path().join("new.img");
    let create = ["1", "1", "tgt0", "new.img", "--create", "1M"];
    let mut process = Spawn::new(AOEDE)
        .inside(&bench.lab.host)
        .dir(bench.store.path())
        .args(create)
        .args(["--state-dir", "state"])
        .start()
        .unwrap();
    process.wait_for_line(": e1.1, ", soon()).unwrap();
    bench.lab.client(0).config_force(b"mine").unwrap();
    stop(process);
    let files: Vec<_> = fs::read_dir(bench.store.state()).unwrap().collect();
    let [Ok(state)] = &files[..] else {
        panic!("{files:?}");
    };
    fs::write(state.path(), "masks = [3").unwrap();
    fs::remove_file(&new).unwrap();
    let name = state.file_name();
    let name = name.to_str().unwrap();
    check(&bench, 1, &[(&create, &[name, "remove it"])]);
    fs::write(state.path(), "").unwrap();
    fs::create_dir(bench.store.path().join("sub")).unwrap();
    fs::remove_file(state.path()).unwrap();
    // A state directory that is a file cannot be read either.
    fs::remove_dir(bench.store.state()).unwrap();
    fs::write(bench.store.state(), "").unwrap();
    check(&bench, 1, &[(&create, &["state", "--state-dir"])]);
}

#[test]
fn aoeded_refuses_in_the_same_words() {
    if !lab::require("aoeded refusing", &[Need::Network]) {
        return;
    }
    let bench = Bench::new();
    for (arguments, code, part) in [
        (&["1", "1", "tgt0", "no.img"][..], 1, "no.img"),
        (&["1", "1", "nope0", "disk.img"], 1, "nope0"),
        (&["1", "300", "tgt0", "disk.img"], 2, "slot 300"),
        (
            &["1", "1", "tgt0", "no.img", "--log", "stderr"],
            1,
            "no.img",
        ),
        (&["1", "1", "tgt0", "a\nb.img"], 1, "b.img"),
    ] {
        let ended = bench.refused(AOEDED, arguments);
        assert_eq!(ended.code, Some(code), "{arguments:?} {ended:?}");
        assert!(ended.line().contains(part), "{ended:?}");
    }
}

#[test]
fn what_may_not_be_opened_says_what_would_help() {
    let needs = [
        Need::Network,
        Need::Program("unshare"),
        Need::Program("setpriv"),
    ];
    if !lab::require("missing rights", &needs) {
        return;
    }
    let bench = Bench::new();
    let aoede = format!("{AOEDE} 1 1 tgt0 disk.img --state-dir state");
    let run_script = |script: &str| {
        let mut command = Command::new("unshare");
        command
            .args(["-m", "sh", "-ec", script])
            .current_dir(bench.store.path());
        run(Some(&bench.lab.host), command, Deadline::seconds(20))
    };
    let no_raw = run_script(&format!(
        "exec setpriv --bounding-set=-net_raw --inh-caps=-net_raw {aoede}"
    ));
    assert_eq!(no_raw.code, Some(1), "{no_raw:?}");
    for part in ["tgt0", "root", "CAP_NET_RAW"] {
        assert!(no_raw.line().contains(part), "{no_raw:?}");
    }
    let read_only = run_script(&format!(
        "mount --bind . . && mount -o remount,ro,bind . && cd \"$PWD\" && exec {aoede}"
    ));
    assert_eq!(read_only.code, Some(1), "{read_only:?}");
    for part in ["disk.img", "-r"] {
        assert!(read_only.line().contains(part), "{read_only:?}");
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    for (program, arguments, part) in [
        (AOEDE, ["--help"], "--shared-address"),
        (AOEDE, ["-h"], "SHELF SLOT NETIF [NETIF..] IMAGE"),
        (AOEDED, ["--help"], "--pid-file"),
        (AOEDE, ["--version"], env!("CARGO_PKG_VERSION")),
        (AOEDED, ["-V"], env!("CARGO_PKG_VERSION")),
    ] {
        let mut command = Command::new(program);
        command.args(arguments);
        let ended = run(None, command, soon());
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{ended:?}");
        assert!(ended.out.contains(part), "{ended:?}");
        assert!(ended.out.ends_with('\n'), "{ended:?}");
    }
}

/// As of `aoede --help | head -1`.
#[test]
fn help_for_a_reader_that_is_gone_is_no_panic() {
    let (read, write) = nix::unistd::pipe().unwrap();
    drop(read);
    let output = Command::new(AOEDE)
        .arg("--help")
        .stdout(write)
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(!err.contains("panic"), "{err}");
    assert_ne!(output.status.code(), Some(101));
}

#[test]
fn bytes_that_make_no_sector_are_cut_off_and_said_so() {
    if !lab::require("an odd image", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(100));
    let mut image = fs::OpenOptions::new()
        .append(true)
        .open(store.image())
        .unwrap();
    image.write_all(&[0xEE; 300]).unwrap();
    let mut target = serve(&lab.host, &store, &["tgt0"], &[]);
    target
        .wait_for_line("disk.img", Deadline::after(Duration::ZERO))
        .ok();
    let mut client = lab.client(0);
    assert_eq!(client.identify().unwrap().sectors(), 100);
    client.write(99, &[1; SECTOR]).unwrap();
    assert!(client.write(100, &[1; SECTOR]).is_err());
    let output = stop(target);
    assert!(
        output
            .iter()
            .any(|l| l.contains("warning") && l.contains("300 bytes") && l.contains("disk.img")),
        "{output:?}"
    );
    let bytes = fs::read(store.image()).unwrap();
    assert_eq!(bytes.len(), 100 * SECTOR + 300);
    assert_eq!(bytes[100 * SECTOR..], [0xEE; 300]);
}

/// A target of slot `slot`.
fn in_slot(lab: &Lab, store: &Store, slot: &str, options: &[&str]) -> Spawn {
    Spawn::new(AOEDE)
        .inside(&lab.host)
        .args(["1", slot, "tgt0"])
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
        .args(options.iter().copied())
}

fn serve_slot(lab: &Lab, store: &Store, slot: &str, options: &[&str]) -> Process {
    let mut process = in_slot(lab, store, slot, options).start().unwrap();
    process
        .wait_for_line(&format!(": e1.{slot}, "), soon())
        .unwrap();
    process
}

fn client_of(lab: &Lab, slot: u8) -> Client {
    let client = lab.peer.enter(|| Client::connected("ini0", 1, slot));
    client.unwrap().unwrap()
}

#[test]
fn windows_of_one_file_are_disks_of_their_own() {
    if !lab::require("windows of one file", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(1000));
    let first = serve_slot(&lab, &store, "1", &["-l", "300"]);
    let second = serve_slot(&lab, &store, "2", &["-o", "300", "-l", "301"]);
    let third = serve_slot(&lab, &store, "3", &["-o", "601"]);
    for (slot, sectors) in [(1, 300), (2, 301), (3, 399)] {
        let mut client = client_of(&lab, slot);
        assert_eq!(client.identify().unwrap().sectors(), sectors);
        for lba in [0, sectors - 1] {
            client.write(lba, &sector(lba, u64::from(slot))).unwrap();
            assert_eq!(client.read(lba, 1).unwrap(), sector(lba, u64::from(slot)));
        }
        assert!(client.write(sectors, &[0; SECTOR]).is_err());
        assert!(client.read(sectors - 1, 2).is_err());
    }
    for process in [first, second, third] {
        stop(process);
    }
    for (at, slot, lba) in [
        (0, 1, 0),
        (299, 1, 299),
        (300, 2, 0),
        (600, 2, 300),
        (601, 3, 0),
        (999, 3, 398),
    ] {
        assert_eq!(store.sectors(at, 1), sector(lba, slot), "sector {at}");
    }
}

#[test]
fn windows_that_overlap_are_refused() {
    if !lab::require("windows that overlap", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(1000));
    let first = serve_slot(&lab, &store, "1", &["-o", "100", "-l", "300"]);
    let pid = format!("process {} (aoede)", first.pid());
    let refuse = |options: &[&str]| {
        let mut command = Command::new(AOEDE);
        command
            .args(["1", "2", "tgt0", "--shared-address"])
            .arg(store.image())
            .args(["--set", "address_probe=10", "--state-dir"])
            .arg(store.state())
            .args(options);
        let (ended, time) = timed(|| run(Some(&lab.host), command, Deadline::seconds(20)));
        assert_eq!(ended.code, Some(1), "{ended:?}");
        for part in ["disk.img", "-o", "-l", &pid] {
            assert!(ended.line().contains(part), "{ended:?}");
        }
        assert!(time >= Duration::from_secs(2), "{time:?}");
    };
    // Side by side, since each is patient for two seconds.
    thread::scope(|scope| {
        for options in [
            &[][..],
            &["-o", "399", "-l", "1"],
            &["-l", "101"],
            &["-r", "-o", "150", "-l", "1"],
        ] {
            let refuse = &refuse;
            scope.spawn(move || refuse(options));
        }
    });
    // Readers share.
    let second = Store::new(1000);
    let readers = [
        serve_slot(&lab, &second, "3", &["-r"]),
        serve_slot(&lab, &second, "4", &["-r", "-o", "10"]),
    ];
    readers.into_iter().for_each(|reader| drop(stop(reader)));
}

#[test]
fn a_lock_given_up_while_we_wait_is_taken() {
    if !lab::require("a lock given up", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(1000));
    let holder = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(store.image())
        .unwrap();
    let lock = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&holder, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    let mut target = command(&lab.host, &store, &["tgt0"], &[]).start().unwrap();
    let fds = format!("/proc/{}/fd", target.pid());
    wait_until("it to open the image", soon(), || {
        let links = fs::read_dir(&fds).into_iter().flatten().flatten();
        let mut links = links.filter_map(|fd| fs::read_link(fd.path()).ok());
        links.any(|to| to == store.image())
    })
    .unwrap();
    assert!(!target.output().iter().any(|l| l.contains("e1.1, ")));
    drop(holder);
    target.wait_for_line(": e1.1, ", soon()).unwrap();
    stop(target);
}

#[test]
fn an_image_that_was_made_has_its_name_on_stable_storage() {
    if !lab::require("--create", &[Need::Network, Need::Program("strace")]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(8));
    let folder = fs::canonicalize(store.path()).unwrap();
    fs::remove_file(store.image()).unwrap();
    let expressions = ["decode-fds=path", "trace=fsync"];
    let options = ["--create", "4M"];
    let (target, lines) = traced(&lab.host, &store, &["tgt0"], &options, &expressions);
    let text = fs::read_to_string(lines).unwrap();
    let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what}: {text}"));
    let image = at(&format!("<{}/disk.img>)", folder.display()));
    let name = at(&format!("<{}>)", folder.display()));
    assert!(image < name, "{text}");
    stop(target);
}

#[test]
fn an_image_is_made_sparse_or_with_its_room_and_never_made_twice() {
    if !lab::require("--create", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(8));
    for (create, blocks) in [("4M", 0), ("4M,prealloc", 8192)] {
        fs::remove_file(store.image()).unwrap();
        let target = serve(&lab.host, &store, &["tgt0"], &["--create", create]);
        let metadata = fs::metadata(store.image()).unwrap();
        assert_eq!(metadata.len(), 4 << 20);
        assert!(
            metadata.blocks() >= blocks,
            "{create}: {}",
            metadata.blocks()
        );
        assert!(blocks > 0 || metadata.blocks() < 100, "{create}");
        let mut client = lab.client(0);
        assert_eq!(client.identify().unwrap().sectors(), 8192);
        client.write(8191, &[7; SECTOR]).unwrap();
        stop(target);
    }
    // What is there is left as it is, whatever size is asked for.
    let target = serve(&lab.host, &store, &["tgt0"], &["--create", "1M"]);
    let mut client = lab.client(0);
    assert_eq!(client.identify().unwrap().sectors(), 8192);
    assert_eq!(client.read(8191, 1).unwrap(), [7; SECTOR]);
    let output = stop(target);
    let told = |l: &&String| l.contains("warning") && l.contains("4194304 bytes");
    let line = output.iter().find(told);
    let line = line.unwrap_or_else(|| panic!("{output:?}"));
    for part in ["e1.1", "disk.img", "1048576", "--create"] {
        assert!(line.contains(part), "{line}");
    }
    let same = stop(serve(&lab.host, &store, &["tgt0"], &["--create", "4M"]));
    assert!(!same.iter().any(|l| l.contains("warning")), "{same:?}");
}

#[test]
fn an_image_that_finds_no_room_is_not_left_half_made() {
    let needs = [Need::Network, Need::Program("unshare")];
    if !lab::require("--create without room", &needs) {
        return;
    }
    let host = Namespace::new().unwrap();
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c"]).arg(format!(
        "mount -t tmpfs -o size=1m none /mnt && cd /mnt && \
         {AOEDE} 1 1 lo new.img --create 4M,prealloc --state-dir state; echo $? $(ls -A)"
    ));
    let ended = run(Some(&host), command, Deadline::seconds(20));
    assert_eq!(ended.out.trim(), "1", "{ended:?}");
    assert!(ended.line().contains("/mnt/new.img"), "{ended:?}");
}
