//! A target's life: how it starts, what it outlives, how it ends, and whom it
//! tells.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use aoede::wire::MacAddr;
use initiator::client::Client;
use initiator::frame::{Directive, Frame, SECTOR};
use initiator::lab::{self, Deadline, Need, Process, Spawn, wait_until};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::support::{AOEDE, AOEDED, Store, command, serve, stop};
use crate::workshop::{
    Frozen, Killed, Lab, Load, PrivateDev, Stray, Temper, advertisement, ata_replies,
    find_advertisement, logged, run, sector, soon, state_of, timed, trouble,
};

const IMAGE: u64 = 2048;
/// A second, as promised, and one more for a busy machine.
const A_SECOND: Duration = Duration::from_secs(2);

/// What makes a target write a line: another target's answer.
fn claim(client: &mut Client) {
    let frame = Frame::config(0, b"")
        .to(MacAddr::BROADCAST)
        .version_flags(0x18)
        .tag(0)
        .at(1, 1);
    client.send(&frame).unwrap();
}

#[test]
fn a_signal_to_stop_ends_an_idle_target_within_a_second() {
    if !lab::require("stopping an idle target", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    for (signal, engine) in [
        (Signal::SIGTERM, "receive=ring"),
        (Signal::SIGINT, "receive=recvmmsg"),
        (Signal::SIGQUIT, "receive=ring"),
        (Signal::SIGTERM, "receive=recvmmsg"),
    ] {
        // One link that is up and one that is not.
        lab.host.set_up("tgt1", false).unwrap();
        let mut target = serve(&lab.host, &store, &["tgt0", "tgt1"], &["--set", engine]);
        lab.client(0).write(1, &[1; SECTOR]).unwrap();
        target.signal(signal).unwrap();
        let (status, time) = timed(|| target.wait(soon()).unwrap());
        assert_eq!(status.code(), Some(0), "{signal}: {:?}", target.output());
        assert!(time < A_SECOND, "{signal}: {time:?}");
        assert!(
            target.output().iter().any(|l| l.contains("stopped")),
            "{:?}",
            target.output()
        );
    }
}

#[test]
fn a_signal_that_comes_while_it_starts_is_not_lost() {
    if !lab::require("a signal during the start", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = command(
        &lab.host,
        &store,
        &["tgt0"],
        &["--set", "address_probe=1000"],
    )
    .start()
    .unwrap();
    // It asks for other targets now, with its signals blocked.
    let status = format!("/proc/{}/status", target.pid());
    wait_until("its signals to be blocked", soon(), || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let blocked = text.lines().find_map(|l| l.strip_prefix("SigBlk:"));
        let mask = blocked.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
        mask.is_some_and(|mask| mask & (1 << (Signal::SIGTERM as u64 - 1)) != 0)
    })
    .unwrap();
    target.signal(Signal::SIGTERM).unwrap();
    let end = target.wait(soon()).unwrap();
    assert_eq!(end.code(), Some(0), "{:?}", target.output());
}

#[test]
fn what_was_acknowledged_before_term_is_in_the_image() {
    if !lab::require("TERM in the middle of a load", &[Need::Network]) {
        return;
    }
    for options in [&[][..], &["-s"], &["-d"]] {
        let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
        let target = serve(&lab.host, &store, &["tgt0", "tgt1"], options);
        let written = thread::scope(|scope| {
            let loads = [("ini0", 0), ("ini1", 100), ("ini1", 200)]
                .map(|(nic, lba)| Load::start(scope, &lab.peer, nic, lba, Temper::Resigned));
            loads.iter().for_each(Load::goes_on);
            stop(target);
            loads.map(Load::end)
        });
        let image = fs::read(store.image()).unwrap();
        for written in written {
            assert!(!written.acknowledged.is_empty());
            written.check(&image);
        }
    }
}

#[test]
fn what_was_acknowledged_before_kill_9_is_there_after_it() {
    if !lab::require("kill -9 in the middle of a load", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    let written = thread::scope(|scope| {
        let loads = [("ini0", 0), ("ini1", 100), ("ini1", 200)]
            .map(|(nic, lba)| Load::start(scope, &lab.peer, nic, lba, Temper::Patient));
        for _ in 0..4 {
            loads.iter().for_each(Load::goes_on);
            target.kill().unwrap();
            // Lock and address are free at once, or as good as.
            let (again, time) = timed(|| serve(&lab.host, &store, &["tgt0", "tgt1"], &[]));
            assert!(time < Duration::from_secs(5), "{time:?}");
            target = again;
        }
        loads.iter().for_each(Load::goes_on);
        loads.map(Load::end)
    });
    stop(target);
    let image = fs::read(store.image()).unwrap();
    written.iter().for_each(|written| written.check(&image));
}

#[test]
fn what_the_wire_changed_is_there_after_kill_9() {
    if !lab::require("state after kill -9", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    let mut client = lab.client(0);
    let mut other = lab.client(1);
    client.config_force(b"who we are").unwrap();
    let directives = [Directive::add(client.mac()), Directive::add(other.mac())];
    client.mask_edit(&directives).unwrap();
    client.reserve(1, &[client.mac()]).unwrap();
    target.kill().unwrap();
    let target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    assert_eq!(client.config_read().unwrap().string, b"who we are");
    assert_eq!(client.mask_read().unwrap().list.len(), 2);
    assert_eq!(other.reserve(0, &[]).unwrap().list, [client.mac()]);
    let refused = other.call(&Frame::read(0, 1)).unwrap();
    assert_eq!(refused.error(), Some(6), "{refused:?}");
    client.read(0, 1).unwrap();
    stop(target);
}

#[test]
fn a_string_that_was_acknowledged_is_there_whenever_the_kill_comes() {
    if !lab::require("kill -9 while saving", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let acknowledged = AtomicU64::new(0);
    let mut target = serve(&lab.host, &store, &["tgt0"], &[]);
    for round in 0..6 {
        let mut client = lab.client(0);
        thread::scope(|scope| {
            let setter = scope.spawn(|| {
                let mut client = lab.client(0);
                client.patience.deadline = Duration::from_millis(500);
                loop {
                    let next = acknowledged.load(Ordering::Relaxed) + 1;
                    if client.config_force(next.to_string().as_bytes()).is_err() {
                        return;
                    }
                    acknowledged.store(next, Ordering::Relaxed);
                }
            });
            let from = acknowledged.load(Ordering::Relaxed);
            wait_until("some saves", soon(), || {
                acknowledged.load(Ordering::Relaxed) > from + 3 + round
            })
            .unwrap();
            target.kill().unwrap();
            setter.join().unwrap();
        });
        target = serve(&lab.host, &store, &["tgt0"], &[]);
        let string = client.config_read().unwrap().string;
        let found: u64 = String::from_utf8(string).unwrap().parse().unwrap();
        let last = acknowledged.load(Ordering::Relaxed);
        assert!((last..=last + 1).contains(&found), "{found}, not {last}");
        acknowledged.store(found, Ordering::Relaxed);
    }
    stop(target);
}

#[test]
fn hup_measures_again_and_everyone_is_told() {
    if !lab::require("HUP", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    let (mut client, mut other) = (lab.listener(0), lab.listener(1));
    let file = fs::OpenOptions::new()
        .write(true)
        .open(store.image())
        .unwrap();
    for sectors in [4096, 1000, 1, 2048] {
        file.set_len(sectors * SECTOR as u64).unwrap();
        target.signal(Signal::SIGHUP).unwrap();
        advertisement(&mut client, soon());
        advertisement(&mut other, soon());
        assert_eq!(client.identify().unwrap().sectors(), sectors);
        client
            .write(sectors - 1, &sector(sectors - 1, sectors))
            .unwrap();
        let beyond = client.call(&Frame::read(sectors, 1)).unwrap();
        let ata = beyond.ata().unwrap();
        assert_eq!((ata.status, ata.error, ata.count), (0x41, 0x10, 1));
    }
    // Nothing new is no reason to be silent.
    target.signal(Signal::SIGHUP).unwrap();
    advertisement(&mut client, soon());
    // An image that lost everything: the size stays, reads say what is wrong.
    file.set_len(0).unwrap();
    target.signal(Signal::SIGHUP).unwrap();
    let line = target.wait_for_line("size kept", soon()).unwrap();
    assert!(line.contains("disk.img"), "{line}");
    assert_eq!(client.identify().unwrap().sectors(), 2048);
    let gone = client.call(&Frame::read(5, 1)).unwrap();
    let ata = gone.ata().unwrap();
    assert_eq!((ata.status, ata.error), (0x41, 0x40), "{gone:?}");
    // Not told: the file is what it is, and HUP is the way to say so.
    file.set_len(IMAGE * SECTOR as u64).unwrap();
    assert_eq!(client.read(5, 1).unwrap(), [0; SECTOR]);
    stop(target);
}

#[test]
fn usr_signals_in_any_number_end_nothing() {
    if !lab::require("USR1 and USR2", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let target = serve(&lab.host, &store, &["tgt0"], &[]);
    let mut client = lab.client(0);
    for count in [0, 3, 7] {
        for _ in 0..count {
            target.signal(Signal::SIGUSR1).unwrap();
            all_counted(&target);
        }
        target.signal(Signal::SIGUSR2).unwrap();
        all_counted(&target);
        client.write(1, &[count; SECTOR]).unwrap();
        assert_eq!(client.read(1, 1).unwrap(), [count; SECTOR]);
    }
    for signal in [Signal::SIGPIPE, Signal::SIGUSR1, Signal::SIGCONT] {
        target.signal(signal).unwrap();
    }
    client.read(1, 1).unwrap();
    stop(target);
}

#[test]
fn usr1_and_usr2_back_to_back_are_always_one_and_one() {
    if !lab::require("USR1 and USR2 back to back", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0"], &[]);
    thread::scope(|scope| {
        let load = Load::start(scope, &lab.peer, "ini0", 0, Temper::Strict);
        for round in 0..200 {
            let count = 1 + round % 2;
            for n in 0..count {
                if n > 0 {
                    all_counted(&target);
                }
                target.signal(Signal::SIGUSR1).unwrap();
            }
            target.signal(Signal::SIGUSR2).unwrap();
            // One holds writes, two let them through.
            let says = ["no write is answered", "answered again"][count - 1];
            target.wait_for_line(says, soon()).unwrap();
        }
        load.goes_on();
        load.end();
    });
    stop(target);
}

/// Waits as senders must: two of a kind that are pending would be one.
fn all_counted(target: &Process) {
    wait_until("the signal to be counted", soon(), || {
        is_nothing_pending(target)
    })
    .unwrap();
}

/// Whether every signal that was sent to a process has reached its handler.
fn is_nothing_pending(target: &Process) -> bool {
    let text = fs::read_to_string(format!("/proc/{}/status", target.pid())).unwrap();
    let pending = text.lines().find(|l| l.starts_with("ShdPnd:"));
    pending.is_some_and(|l| l.ends_with("0000000000000000"))
}

/// Starts a target whose standard output or error is this descriptor.
fn with_streams(lab: &Lab, store: &Store, out: impl AsFd, err: impl AsFd) -> Killed {
    let mut command = Command::new(AOEDE);
    command
        .args(["1", "1", "tgt0"])
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
        .args(["-vv"])
        .stdout(out.as_fd().try_clone_to_owned().unwrap())
        .stderr(err.as_fd().try_clone_to_owned().unwrap());
    Killed(lab.host.enter(|| command.spawn()).unwrap().unwrap())
}

fn signal_child(child: &Killed, signal: Signal) {
    nix::sys::signal::kill(Pid::from_raw(child.0.id() as i32), signal).unwrap();
}

fn ends_well(mut child: Killed, within: Duration) {
    signal_child(&child, Signal::SIGTERM);
    let mut status = None;
    wait_until("the end", Deadline::after(within), || {
        status = child.0.try_wait().unwrap();
        status.is_some()
    })
    .unwrap();
    assert_eq!(status.unwrap().code(), Some(0));
}

#[test]
fn streams_that_nobody_reads_any_more_are_no_reason_to_end() {
    if !lab::require("broken pipes", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let (read, write) = nix::unistd::pipe().unwrap();
    drop(read);
    let target = with_streams(&lab, &store, &write, &write);
    drop(write);
    let mut client = lab.client(0);
    for _ in 0..3 {
        claim(&mut client);
        signal_child(&target, Signal::SIGHUP);
        client.write(1, &[1; SECTOR]).unwrap();
    }
    ends_well(target, Duration::from_secs(5));
}

#[test]
fn streams_that_were_closed_from_the_start_are_not_mistaken_for_the_image() {
    if !lab::require("closed streams", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = Spawn::new("sh")
        .inside(&lab.host)
        .args(["-c", "exec \"$@\" <&- >&- 2>&-", "sh", AOEDE])
        .args(["1", "1", "tgt0"])
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
        .start()
        .unwrap();
    let mut client = lab.client(0);
    claim(&mut client);
    client.identify().unwrap();
    assert_eq!(target.stop(soon()).unwrap().code(), Some(0));
    assert!(fs::read(store.image()).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn a_reader_of_messages_that_stalls_does_not_stall_us() {
    if !lab::require("a stalled standard error", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let (read, write) = nix::unistd::pipe().unwrap();
    // Full to the last byte before it begins.
    nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    fs::File::from(write.try_clone().unwrap())
        .write_all(&[b'x'; 4096])
        .unwrap();
    let nowhere = fs::File::create("/dev/null").unwrap();
    let target = with_streams(&lab, &store, &nowhere, &write);
    let mut client = lab.client(0);
    // While it was starting it did not answer.
    client.drain().unwrap();
    client.resent = 0;
    claim(&mut client);
    // More lines than wait for their turn.
    for round in 0..1300u32 {
        signal_child(&target, Signal::SIGHUP);
        advertisement(&mut client, soon());
        let data = [round as u8; SECTOR];
        client.write(1, &data).unwrap();
        assert_eq!(client.read(1, 1).unwrap(), data);
    }
    assert_eq!(client.resent, 0, "something waited");
    // It waits a moment for its last words to be taken, and no longer.
    ends_well(target, Duration::from_secs(6));
    drop(read);
}

#[test]
fn aoeded_returns_when_it_serves_and_leaves_nothing_behind_at_the_end() {
    if !lab::require("aoeded", &PrivateDev::NEEDS) {
        return;
    }
    let (lab, store, dev) = (Lab::new(1, 1500), Store::new(IMAGE), PrivateDev::new());
    let log = dev.log();
    let pid_file = store.path().join("pid");
    let stray = Stray::new(&pid_file);
    let words = dev.inside();
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .arg(AOEDED)
        .args(["1", "1", "tgt0", "disk.img", "--state-dir", "state"])
        .args(["--pid-file", "pid"])
        .current_dir(store.path());
    let ended = run(Some(&lab.host), command, soon());
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{ended:?}");
    assert!(ended.out.contains(": e1.1, 2048 sectors, rw"), "{ended:?}");
    let pid = stray.pid().unwrap();
    assert!(ended.out.contains(&format!("pid {pid}: ")), "{ended:?}");

    // Export, image, size, mode, version and process, for who reads the log later.
    let line = logged(&log, "disk.img");
    let version = concat!("aoede ", env!("CARGO_PKG_VERSION"));
    let process = format!("pid {pid}");
    for part in [
        "<30>",
        "e1.1",
        "2048 sectors (1048576 bytes)",
        "read-write",
        version,
        &process,
    ] {
        assert!(line.contains(part), "no '{part}' in {line}");
    }
    // It serves already: one question, and no patience.
    let mut client = lab.peer.enter(|| Client::open("ini0")).unwrap().unwrap();
    client.patience.resend = None;
    client.aim(MacAddr::BROADCAST, 1, 1);
    client.config_read().unwrap();
    client.connect(1, 1).unwrap();
    client.config_force(b"kept").unwrap();
    claim(&mut client);
    let line = logged(&log, "another target");
    assert!(line.starts_with("<27>"), "{line}");
    assert!(line.contains(&format!("aoeded[{pid}]: ")), "{line}");
    // It holds nothing of whoever started it.
    for fd in 0..3 {
        let to = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert_eq!(to.to_str(), Some("/dev/null"), "descriptor {fd}");
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    assert_eq!(fields[3], pid.to_string(), "not a session of its own");
    let folder = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(folder.to_str(), Some("/"), "it holds a directory");

    stray.signal(Signal::SIGTERM);
    logged(&log, "stopped");
    wait_until("the pid file to go", soon(), || !pid_file.exists()).unwrap();
    wait_until("the process to go", soon(), || {
        !fs::exists(format!("/proc/{pid}")).unwrap()
    })
    .unwrap();
}

#[test]
fn aoeded_that_may_not_begin_says_so_where_it_was_started_and_in_the_log() {
    if !lab::require("aoeded refusing", &PrivateDev::NEEDS) {
        return;
    }
    let (lab, store, dev) = (Lab::new(1, 1500), Store::new(IMAGE), PrivateDev::new());
    let log = dev.log();
    let first = serve(&lab.host, &store, &["tgt0"], &[]);
    for (arguments, part) in [
        (&["lo", "no.img"][..], "no.img"),
        (&["nope0", "disk.img"], "nope0"),
        (&["tgt0", "disk.img"], "(aoede) serves it"),
    ] {
        let words = dev.inside();
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .arg(AOEDED)
            .args(["1", "1"])
            .args(arguments)
            .args(["--state-dir", "state", "--pid-file", "pid"])
            .current_dir(store.path());
        let ended = run(Some(&lab.host), command, soon());
        assert_eq!((ended.code, ended.out.as_str()), (Some(1), ""), "{ended:?}");
        assert!(ended.line().contains(part), "{ended:?}");
        assert!(!store.path().join("pid").exists());
        logged(&log, part);
    }
    stop(first);
}

#[test]
fn a_pid_file_is_refused_to_a_second_process_as_long_as_the_first_lives() {
    if !lab::require("one pid file for two", &[Need::Network]) {
        return;
    }
    let (lab, a, b) = (Lab::new(2, 1500), Store::new(IMAGE), Store::new(IMAGE));
    let pid_file = a.path().join("pid");
    let option = pid_file.to_str().unwrap();
    let mut first = serve(&lab.host, &a, &["tgt0"], &["--pid-file", option]);
    let read = || fs::read_to_string(&pid_file).unwrap();
    assert_eq!(read(), format!("{}\n", first.pid()));
    let mut refused = command(&lab.host, &b, &["tgt1"], &["--pid-file", option])
        .start()
        .unwrap();
    assert_eq!(refused.wait(soon()).unwrap().code(), Some(1));
    let pid = format!("process {} (aoede)", first.pid());
    let named = |l: &String| l.contains(&pid) && l.contains(option);
    assert!(refused.output().iter().any(named), "{:?}", refused.output());
    assert_eq!(read(), format!("{}\n", first.pid()));
    // What a process that was killed leaves is replaced.
    first.kill().unwrap();
    assert!(pid_file.exists());
    let second = serve(&lab.host, &b, &["tgt1"], &["--pid-file", option]);
    assert_eq!(read(), format!("{}\n", second.pid()));
    stop(second);
    assert!(!pid_file.exists());
}

#[test]
fn v_tells_what_is_used_and_vv_the_counters_of_each_second() {
    if !lab::require("-v", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let used = ["receives with", "disk engine", "cache of", "state file"];
    let told = |output: &[String], word: &str| output.iter().any(|l| l.contains(word));
    let quiet = stop(serve(&lab.host, &store, &["tgt0"], &["-q"]));
    assert!(!quiet.iter().any(|l| l.starts_with("aoede: ")), "{quiet:?}");
    let plain = stop(serve(&lab.host, &store, &["tgt0"], &[]));
    assert!(told(&plain, "disk.img: 2048 sectors"), "{plain:?}");
    let more = stop(serve(&lab.host, &store, &["tgt0"], &["-v"]));
    for word in used {
        assert!(
            !told(&plain, word) && told(&more, word),
            "{word}: {plain:?} {more:?}"
        );
    }
    let mut most = serve(&lab.host, &store, &["tgt0"], &["-vv"]);
    let mut client = lab.client(0);
    for lba in 1..3 {
        client.write(lba, &[1; SECTOR]).unwrap();
        let written = format!("{lba} written");
        let line = most.wait_for_line(&written, soon()).unwrap();
        assert!(
            line.contains("e1.1: ") && line.contains("requests"),
            "{line}"
        );
    }
    stop(most);
}

#[test]
fn journal_lines_carry_their_level() {
    if !lab::require("--log journal", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0"], &["--log", "journal"]);
    let mut client = lab.client(0);
    claim(&mut client);
    let line = target.wait_for_line("another target", soon()).unwrap();
    assert!(line.starts_with("<3>e1.1: another target"), "{line}");
    target.signal(Signal::SIGHUP).unwrap();
    let line = target
        .wait_for_line("2048 sectors, as before", soon())
        .unwrap();
    assert!(line.starts_with("<6>"), "{line}");
    lab.host.set_up("tgt0", false).unwrap();
    let line = target.wait_for_line("link down", soon()).unwrap();
    assert!(line.starts_with("<4>"), "{line}");
    stop(target);
}

#[test]
fn the_journal_is_recognised_by_its_stream() {
    if !lab::require("JOURNAL_STREAM", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let path = store.path().join("stderr");
    for (ours, option, lead) in [
        (true, None, "<6>"),
        (false, None, "aoede: "),
        (true, Some("stderr"), "aoede: "),
    ] {
        let file = fs::File::create(&path).unwrap();
        let metadata = file.metadata().unwrap();
        let inode = metadata.ino() + u64::from(!ours);
        let mut command = Command::new(AOEDE);
        command
            .args(["1", "1", "tgt0"])
            .arg(store.image())
            .arg("--state-dir")
            .arg(store.state())
            .arg("--run-dir")
            .arg(store.run())
            .args(option.map(|to| format!("--log={to}")))
            .env("JOURNAL_STREAM", format!("{}:{inode}", metadata.dev()))
            .stdout(std::process::Stdio::null())
            .stderr(file);
        let target = Killed(lab.host.enter(|| command.spawn()).unwrap().unwrap());
        lab.client(0).identify().unwrap();
        ends_well(target, Duration::from_secs(5));
        let text = fs::read_to_string(&path).unwrap();
        let last = text.lines().last().unwrap();
        assert!(last.starts_with(lead) && last.contains("stopped"), "{text}");
    }
}

fn with_syslog(lab: &Lab, store: &Store, dev: &PrivateDev) -> Process {
    let words = dev.inside();
    let mut target = Spawn::new(&words[0])
        .inside(&lab.host)
        .args(words[1..].iter())
        .arg(AOEDE)
        .args(["1", "1", "tgt0", "--log", "syslog"])
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
        .start()
        .unwrap();
    target.wait_for_line(": e1.1, ", soon()).unwrap();
    target
}

#[test]
fn a_log_daemon_may_be_away_come_and_be_started_again() {
    if !lab::require("a log daemon that comes and goes", &PrivateDev::NEEDS) {
        return;
    }
    let (lab, store, dev) = (Lab::new(1, 1500), Store::new(IMAGE), PrivateDev::new());
    let target = with_syslog(&lab, &store, &dev);
    let mut client = lab.client(0);
    let hup = |client: &mut Client| {
        target.signal(Signal::SIGHUP).unwrap();
        advertisement(client, soon());
    };
    client.drain().unwrap();
    hup(&mut client);
    let first = dev.log();
    hup(&mut client);
    let line = logged(&first, "2048 sectors, as before");
    assert!(line.starts_with("<30>"), "{line}");
    drop(first);
    dev.unlink();
    hup(&mut client);
    let second = dev.log();
    hup(&mut client);
    logged(&second, "2048 sectors, as before");
    stop(target);
    logged(&second, "stopped");
}

#[test]
fn a_log_daemon_that_stalls_does_not_stall_us() {
    if !lab::require("a log daemon that stalls", &PrivateDev::NEEDS) {
        return;
    }
    let (lab, store, dev) = (Lab::new(1, 1500), Store::new(IMAGE), PrivateDev::new());
    // It listens and reads nothing: soon its queue is full.
    let log = dev.log();
    let target = with_syslog(&lab, &store, &dev);
    let mut client = lab.listener(0);
    for round in 0..300u32 {
        target.signal(Signal::SIGHUP).unwrap();
        advertisement(&mut client, soon());
        let data = [round as u8; SECTOR];
        client.write(1, &data).unwrap();
        assert_eq!(client.read(1, 1).unwrap(), data);
    }
    assert_eq!(client.resent, 0, "something waited");
    // Once it reads again it hears of what it missed.
    let reader = thread::spawn(move || logged(&log, "messages lost"));
    lab::wait_until("the log to go on", soon(), || {
        target.signal(Signal::SIGHUP).unwrap();
        advertisement(&mut client, soon());
        reader.is_finished()
    })
    .unwrap();
    reader.join().unwrap();
    stop(target);
}

#[test]
fn a_disk_that_hangs_does_not_keep_the_process() {
    let needs = [Need::Network, Need::Program("strace")];
    if !lab::require("a disk that hangs at the end", &needs) {
        return;
    }
    for twice in [false, true] {
        let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
        let patience = if twice { 60 } else { 1 };
        let setting = format!("io_patience={patience}");
        let options = ["--set", &setting, "--set", "disk_engine=threads"];
        let mut target = serve(&lab.host, &store, &["tgt0"], &options);
        let mut client = lab.client(0);
        client.write(1, &[1; SECTOR]).unwrap();
        let hang = trouble(
            &target,
            &["trace=fdatasync", "inject=fdatasync:delay_enter=20000000"],
        );
        let (status, time) = timed(|| {
            target.signal(Signal::SIGTERM).unwrap();
            if twice {
                // Two that are pending together would be one.
                wait_until("the first to be taken in", soon(), || {
                    is_nothing_pending(&target)
                })
                .unwrap();
                target.signal(Signal::SIGTERM).unwrap();
            }
            let what = if twice {
                "e1.1: stopped at once by a second signal"
            } else {
                "e1.1: stopped before the disk had everything: it made no progress for 1 s"
            };
            target.wait_for_line(what, soon()).unwrap();
            // Of a thread that is to be late strace notices the death late, and
            // the process stays until it has.
            let pid = target.pid();
            wait_until("its end", soon(), || state_of(pid) == Some('Z')).unwrap();
            drop(hang);
            target.wait(soon()).unwrap()
        });
        assert_eq!(status.code(), Some(1), "{:?}", target.output());
        assert!(time < Duration::from_secs(8), "{time:?}");
    }
}

#[test]
fn a_target_that_stood_still_goes_on_where_it_was() {
    if !lab::require("STOP and CONT", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let target = serve(&lab.host, &store, &["tgt0"], &[]);
    let mut client = lab.client(0);
    let frozen = Frozen::new(&target);
    for lba in 0..50 {
        client.send(&Frame::write(lba, &sector(lba, 1))).unwrap();
    }
    drop(frozen);
    for reply in ata_replies(&mut client, 50) {
        assert!(reply.ata().unwrap().is_success(), "{reply:?}");
    }
    stop(target);
    let image = fs::read(store.image()).unwrap();
    for lba in 0..50 {
        let at = lba as usize * SECTOR;
        assert_eq!(image[at..at + SECTOR], sector(lba, 1));
    }
}

#[test]
fn a_flood_of_requests_keeps_no_signal_waiting() {
    if !lab::require("TERM in a flood", &[Need::Network]) {
        return;
    }
    for engine in ["receive=ring", "receive=recvmmsg"] {
        let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
        let mut target = serve(&lab.host, &store, &["tgt0", "tgt1"], &["--set", engine]);
        let mut client = lab.client(0);
        let mut other = lab.listener(1);
        let flooding = AtomicBool::new(true);
        thread::scope(|scope| {
            scope.spawn(|| {
                let read = Frame::read(1, 2).encode(&client.defaults());
                while flooding.load(Ordering::Relaxed) {
                    // It may be lost, as frames are; there are others.
                    let _ = client.send_raw(&read);
                }
            });
            target.signal(Signal::SIGHUP).unwrap();
            let heard = find_advertisement(&mut other, soon());
            target.signal(Signal::SIGTERM).unwrap();
            let (status, time) = timed(|| target.wait(soon()));
            flooding.store(false, Ordering::Relaxed);
            assert!(heard.is_some(), "HUP was not heard");
            assert_eq!(status.unwrap().code(), Some(0));
            assert!(time < A_SECOND, "{time:?}");
        });
    }
}

#[test]
fn a_state_that_cannot_be_saved_refuses_the_change_and_nothing_else() {
    if !lab::require("a state directory that is gone", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0"], &[]);
    let mut client = lab.client(0);
    client.config_force(b"old").unwrap();
    fs::remove_dir_all(store.state()).unwrap();
    fs::write(store.state(), "in the way").unwrap();
    for frame in [
        Frame::config(4, b"new"),
        Frame::mask_edit(&[Directive::add(client.mac())]),
        Frame::reserve(1, &[client.mac()]),
    ] {
        let refused = client.call(&frame).unwrap();
        assert_eq!(refused.error(), Some(2), "{refused:?}");
    }
    let line = target.wait_for_line("save failed", soon()).unwrap();
    assert!(line.contains("error") && line.contains("state"), "{line}");
    assert_eq!(client.config_read().unwrap().string, b"old");
    assert!(client.mask_read().unwrap().list.is_empty());
    assert!(client.reserve(0, &[]).unwrap().list.is_empty());
    client.write(1, &[1; SECTOR]).unwrap();
    fs::remove_file(store.state()).unwrap();
    client.config_force(b"new").unwrap();
    stop(target);
    let target = serve(&lab.host, &store, &["tgt0"], &[]);
    assert_eq!(client.config_read().unwrap().string, b"new");
    stop(target);
}

#[test]
fn a_save_that_takes_its_time_keeps_nobody_waiting() {
    let needs = [Need::Network, Need::Program("strace")];
    if !lab::require("a slow save", &needs) {
        return;
    }
    const DELAY: Duration = Duration::from_secs(2);
    let (lab, store) = (Lab::new(2, 1500), Store::new(IMAGE));
    let target = serve(&lab.host, &store, &["tgt0", "tgt1"], &[]);
    let (mut client, mut other) = (lab.client(0), lab.client(1));
    client.config_force(b"old").unwrap();
    let _slow = trouble(
        &target,
        &["trace=fsync", "inject=fsync:delay_enter=2000000"],
    );
    let ((), time) = timed(|| {
        client.patience.resend = None;
        let request = client.send(&Frame::config(4, b"new")).unwrap();
        let ((), time) = timed(|| {
            // Nobody sees what is not saved.
            assert_eq!(other.config_read().unwrap().string, b"old");
            other.write(1, &[1; SECTOR]).unwrap();
            assert_eq!(other.read(1, 1).unwrap(), [1; SECTOR]);
            other.identify().unwrap();
        });
        assert!(time < DELAY / 2, "{time:?}");
        let deadline = soon();
        while client
            .recv(deadline.instant())
            .unwrap()
            .unwrap()
            .tag_bytes()
            != request[20..24]
        {}
    });
    assert!(time >= DELAY, "acknowledged before it was saved: {time:?}");
    assert_eq!(other.config_read().unwrap().string, b"new");
}

#[test]
fn an_image_that_loses_its_name_is_served_to_the_end() {
    if !lab::require("an image removed", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let target = serve(&lab.host, &store, &["tgt0"], &[]);
    let mut client = lab.client(0);
    client.write(1, &[1; SECTOR]).unwrap();
    fs::remove_file(store.image()).unwrap();
    target.signal(Signal::SIGHUP).unwrap();
    client.config_force(b"still here").unwrap();
    assert_eq!(client.identify().unwrap().sectors(), IMAGE);
    assert_eq!(client.read(1, 1).unwrap(), [1; SECTOR]);
    client.flush().unwrap();
    stop(target);
}

#[test]
fn an_ordinary_user_serves_with_cap_net_raw_alone() {
    let needs = [Need::Network, Need::Program("setpriv")];
    if !lab::require("serving without root", &needs) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    // Where the build is may be nobody else's business.
    let program = store.path().join("aoede");
    fs::copy(AOEDE, &program).unwrap();
    let nobody = Some(65_534);
    for path in [store.path(), &store.image(), &program] {
        std::os::unix::fs::chown(path, nobody, nobody).unwrap();
    }
    let mut target = Spawn::new("setpriv")
        .inside(&lab.host)
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["--inh-caps=+net_raw", "--ambient-caps=+net_raw"])
        .arg("--bounding-set=-all,+net_raw")
        .arg(&program)
        .args(["1", "1", "tgt0"])
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
        .start()
        .unwrap();
    target.wait_for_line(": e1.1, ", soon()).unwrap();
    let mut client = lab.client(0);
    client.write(1, &[1; SECTOR]).unwrap();
    client.config_force(b"mine").unwrap();
    // Links are followed without the right to change them.
    client.drain().unwrap();
    lab.host.set_mtu("tgt0", 1200).unwrap();
    advertisement(&mut client, soon());
    assert_eq!(client.read(1, 1).unwrap(), [1; SECTOR]);
    stop(target);
}

#[test]
fn aoeded_whose_process_dies_in_the_start_says_so() {
    if !lab::require("aoeded killed in the start", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let _child = Stray::new(&store.path().join("pid"));
    let mut parent = Spawn::new(AOEDED)
        .inside(&lab.host)
        .args(["1", "1", "tgt0", "--set", "address_probe=5000"])
        .arg("--pid-file")
        .arg(store.path().join("pid"))
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
        .start()
        .unwrap();
    let pid = parent.pid();
    let children = format!("/proc/{pid}/task/{pid}/children");
    let mut child = None;
    wait_until("its child", soon(), || {
        let text = fs::read_to_string(&children).unwrap_or_default();
        child = text.trim().parse().ok().map(Pid::from_raw);
        child.is_some()
    })
    .unwrap();
    nix::sys::signal::kill(child.unwrap(), Signal::SIGKILL).unwrap();
    let status = parent.wait(soon()).unwrap();
    assert_eq!(status.code(), Some(1), "{:?}", parent.output());
    assert!(
        parent.output().iter().any(|l| l.contains("died")),
        "{:?}",
        parent.output()
    );
    stop(serve(&lab.host, &store, &["tgt0"], &[]));
}
