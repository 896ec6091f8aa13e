//! What lies below: files, loop devices, and disks that fail, fill up or are
//! slow.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use initiator::client::Client;
use initiator::frame::{Ata, AtaReply, Frame, Identify, Reply, SECTOR, opcode};
use initiator::lab::{self, Deadline, Namespace, Need, Process, Spawn, wait_until};
use nix::sys::signal::Signal;

use crate::support::{AOEDE, Store, serve, stop};
use crate::workshop::{
    Lab, Loop, advertisement, ata_replies, run, sector, sh, soon, timed, traced, trouble,
};

const IMAGE: u64 = 4096;

/// Serves something else than the image of `store`.
fn serve_path(namespace: &Namespace, store: &Store, image: &Path, options: &[&str]) -> Process {
    let mut target = on_path(namespace, store, image, options).start().unwrap();
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    target
}

fn on_path(namespace: &Namespace, store: &Store, image: &Path, options: &[&str]) -> Spawn {
    Spawn::new(AOEDE)
        .inside(namespace)
        .args(options.iter().copied())
        .args(["1", "1", "tgt0"])
        .arg(image)
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
}

/// An image in which every sector says which it is.
fn numbered(sectors: u64) -> Store {
    let store = Store::new(sectors);
    let bytes: Vec<u8> = (0..sectors).flat_map(|lba| sector(lba, 1)).collect();
    fs::write(store.image(), bytes).unwrap();
    store
}

fn registers(reply: &Reply) -> AtaReply<'_> {
    assert_eq!(reply.error(), None, "{reply:?}");
    reply.ata().unwrap()
}

/// Status, error register and sectors left.
fn outcome(client: &mut Client, frame: &Frame) -> (u8, u8, u8) {
    let reply = client.call(frame).unwrap();
    let ata = registers(&reply);
    (ata.status, ata.error, ata.count)
}

pub fn trim(ranges: &[(u64, u64)]) -> Frame {
    let mut payload = Vec::new();
    for (lba, count) in ranges {
        payload.extend((lba | count << 48).to_le_bytes());
    }
    payload.resize(SECTOR, 0);
    let registers = Ata {
        aflags: 0x41,
        feature: 1,
        count: 1,
        opcode: opcode::DATA_SET_MANAGEMENT,
        ..Ata::default()
    };
    Frame::ata(registers, &payload)
}

fn announces_trim(identify: &Identify) -> bool {
    let words = [69, 105, 169].map(|word| identify.word(word));
    match words {
        [0, 0, 0] => false,
        [_, 1, dsm] if words[0] & 0x4020 == 0x4020 && dsm & 1 == 1 => true,
        _ => panic!("words 69, 105, 169 are {words:x?}"),
    }
}

/// SMART RETURN STATUS: whether all is well.
fn is_healthy(client: &mut Client) -> bool {
    let frame = Frame::ata(
        Ata {
            feature: 0xDA,
            opcode: opcode::SMART,
            lba: 0xC2_4F00,
            ..Ata::default()
        },
        &[],
    );
    let reply = client.call(&frame).unwrap();
    match registers(&reply).lba >> 8 & 0xFFFF {
        0xC24F => true,
        0x2CF4 => false,
        other => panic!("SMART says {other:#x}"),
    }
}

/// The raw value of SMART's attribute 187, uncorrectable errors.
fn reads_failed(client: &mut Client) -> u16 {
    let frame = Frame::ata(
        Ata {
            feature: 0xD0,
            count: 1,
            opcode: opcode::SMART,
            lba: 0xC2_4F00,
            ..Ata::default()
        },
        &[],
    );
    let reply = client.call(&frame).unwrap();
    let page = reply.sectors(1).unwrap();
    assert_eq!(page[2], 187);
    u16::from_le_bytes([page[7], page[8]])
}

#[test]
fn a_sector_written_on_any_device_leaves_its_neighbours() {
    if !lab::require("loop devices of 512 and 4096", &Loop::NEEDS) {
        return;
    }
    for (size, direct) in [(512, false), (512, true), (4096, false), (4096, true)] {
        let what = format!("{size}, direct {direct}");
        let (lab, store) = (Lab::new(1, 9000), numbered(IMAGE));
        let device = Loop::attach(&store.image(), size).unwrap();
        let options: &[&str] = if direct { &["-d"] } else { &[] };
        let target = serve_path(&lab.host, &store, &device.path, options);
        let mut client = lab.client(0);
        let identify = client.identify().unwrap();
        assert_eq!(identify.sectors(), IMAGE);
        let expected = if size == 4096 { 0x6003 } else { 0x4000 };
        assert_eq!(identify.word(106), expected, "{what}");
        assert_eq!(identify.word(209), 0x4000, "{what}");
        assert_eq!((identify.word(117), identify.word(118)), (0, 0));

        let mut model: Vec<Vec<u8>> = (0..IMAGE).map(|lba| sector(lba, 1)).collect();
        // Inside a block, across two, a whole one, over several, first and last.
        let extents = [(9, 1), (15, 2), (24, 8), (35, 17), (0, 1), (IMAGE - 1, 1)];
        for (lba, count) in extents {
            let data: Vec<u8> = (lba..lba + count).flat_map(|lba| sector(lba, 2)).collect();
            client.write(lba, &data).unwrap();
            for lba in lba..lba + count {
                model[lba as usize] = sector(lba, 2);
            }
        }
        // Eight that share a block, all at once.
        let frames: Vec<Frame> = (80..88)
            .map(|lba| Frame::write(lba, &sector(lba, 3)))
            .collect();
        for frame in &frames {
            client.send(frame).unwrap();
        }
        for reply in ata_replies(&mut client, frames.len()) {
            assert!(registers(&reply).is_success(), "{what}: {reply:?}");
        }
        for lba in 80..88 {
            model[lba as usize] = sector(lba, 3);
        }
        let read = client.read_many(0, IMAGE as usize).unwrap();
        let wrong = (0..IMAGE as usize).find(|n| read[n * SECTOR..][..SECTOR] != model[*n]);
        assert_eq!(wrong, None, "{what}: over the wire");
        client.flush().unwrap();
        stop(target);
        let path = device.path.clone();
        let bytes = fs::read(&path).unwrap();
        assert!(bytes == model.concat(), "{what}: on the device");
        drop(device);
        assert!(
            fs::read(store.image()).unwrap() == model.concat(),
            "{what}: in the file"
        );
    }
}

#[test]
fn a_window_says_how_it_lies_and_direct_io_refuses_what_does_not_fit() {
    if !lab::require("windows of a 4096-byte device", &Loop::NEEDS) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), numbered(IMAGE));
    let device = Loop::attach(&store.image(), 4096).unwrap();
    let target = serve_path(&lab.host, &store, &device.path, &["-o", "3", "-l", "100"]);
    let mut client = lab.client(0);
    let identify = client.identify().unwrap();
    assert_eq!((identify.word(106), identify.word(209)), (0x6003, 0x4003));
    assert_eq!(identify.sectors(), 100);
    assert_eq!(client.read(0, 2).unwrap()[SECTOR..], sector(4, 1));
    client.write(99, &sector(102, 2)).unwrap();
    stop(target);
    let fitting = ["-d", "-o", "8", "-l", "16"];
    let target = serve_path(&lab.host, &store, &device.path, &fitting);
    let mut client = lab.client(0);
    client.write(15, &sector(23, 2)).unwrap();
    assert_eq!(client.read(14, 2).unwrap()[..SECTOR], sector(22, 1));
    stop(target);
    for window in [["-o", "3"], ["-l", "9"]] {
        let mut command = std::process::Command::new(AOEDE);
        command
            .args(["1", "1", "tgt0", "-d"])
            .arg(&device.path)
            .args(window)
            .arg("--state-dir")
            .arg(store.state())
            .arg("--run-dir")
            .arg(store.run());
        let ended = run(Some(&lab.host), command, soon());
        assert_eq!(ended.code, Some(1), "{ended:?}");
        for part in ["multiples of 4096", "-d", device.path.to_str().unwrap()] {
            assert!(ended.line().contains(part), "{ended:?}");
        }
    }
    drop(device);
    let bytes = fs::read(store.image()).unwrap();
    let at = |lba: usize| &bytes[lba * SECTOR..][..SECTOR];
    assert_eq!(
        (at(102), at(103)),
        (&sector(102, 2)[..], &sector(103, 1)[..])
    );
    assert_eq!((at(23), at(24)), (&sector(23, 2)[..], &sector(24, 1)[..]));
}

/// A filesystem mounted from a device, in the mount namespace of all.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(device: &Path) -> Mounted {
        let place = tempfile::tempdir().unwrap();
        let (device, path) = (device.display(), place.path().display());
        sh(&format!("mkfs.ext4 -q {device} && mount {device} {path}"));
        Mounted(place)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let ended = std::process::Command::new("umount")
            .arg(self.0.path())
            .status();
        assert!(ended.is_ok_and(|e| e.success()) || thread::panicking());
    }
}

/// What a start says that is refused.
fn refused_path(lab: &Lab, store: &Store, image: &Path, options: &[&str]) -> String {
    let mut target = on_path(&lab.host, store, image, options).start().unwrap();
    let status = target.wait(soon()).unwrap();
    let output = target.output();
    assert_eq!(status.code(), Some(1), "{options:?}: {output:?}");
    output.join("\n")
}

/// What a start says that succeeds.
fn served_path(lab: &Lab, store: &Store, image: &Path, options: &[&str]) -> Vec<String> {
    stop(serve_path(&lab.host, store, image, options))
}

#[test]
fn a_device_that_someone_uses_is_refused_by_name_unless_forced() {
    let needs = [&Loop::NEEDS[..], &[Need::Program("mkfs.ext4")]].concat();
    if !lab::require("devices in use", &needs) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(16384));
    let device = Loop::attach(&store.image(), 512).unwrap();
    {
        let mounted = Mounted::new(&device.path);
        let place = mounted.0.path().display().to_string();
        for options in [&[][..], &["-r"], &["-d"]] {
            let said = refused_path(&lab, &store, &device.path, options);
            for part in [&*place, "mounted", "--force", device.path.to_str().unwrap()] {
                assert!(said.contains(part), "no '{part}' in {said}");
            }
        }
        for options in [&["--force"][..], &["--force", "-r"]] {
            let said = served_path(&lab, &store, &device.path, options);
            let told = |l: &String| l.contains("warning") && l.contains(&place);
            assert!(said.iter().any(told), "{said:?}");
        }
    }
    // Attached twice: as the same bytes of one file, and as a device on it.
    let twice = |other: &Loop| {
        for options in [&[][..], &["-r"]] {
            let said = refused_path(&lab, &store, &device.path, options);
            for part in [other.path.to_str().unwrap(), "attached", "--force"] {
                assert!(said.contains(part), "no '{part}' in {said}");
            }
        }
    };
    twice(&Loop::attach(&store.image(), 512).unwrap());
    twice(&Loop::attach(&device.path, 512).unwrap());
    // Two readers of a device are no harm to each other.
    let reader = serve_path(&lab.host, &store, &device.path, &["-r"]);
    let second = Store::new(8);
    served_path(&lab, &second, &device.path, &["-r", "--shared-address"]);
    let said = refused_path(&lab, &second, &device.path, &["--shared-address"]);
    assert!(
        said.contains(&format!("process {} (aoede)", reader.pid())),
        "{said}"
    );
    stop(reader);
    served_path(&lab, &store, &device.path, &[]);
}

#[test]
fn a_file_behind_a_loop_device_is_served_with_a_warning() {
    if !lab::require("a file behind a loop device", &Loop::NEEDS) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let device = Loop::attach(&store.image(), 512).unwrap();
    let said = served_path(&lab, &store, &store.image(), &[]);
    let name = device.path.to_str().unwrap();
    let told = |l: &String| l.contains("warning") && l.contains(name) && l.contains("losetup -d");
    assert!(said.iter().any(told), "{said:?}");
    drop(device);
    let said = served_path(&lab, &store, &store.image(), &[]);
    assert!(!said.iter().any(|l| l.contains("warning")), "{said:?}");
}

#[test]
fn direct_io_on_a_file_is_direct_and_right() {
    if !lab::require("-d on a file", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), numbered(IMAGE));
    for (options, direct) in [(&["-d"][..], true), (&[], false)] {
        let target = serve(&lab.host, &store, &["tgt0"], options);
        let proc = format!("/proc/{}", target.pid());
        let fd = fs::read_dir(format!("{proc}/fd"))
            .unwrap()
            .flatten()
            .find(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == store.image()))
            .unwrap();
        let name = fd.file_name();
        let info = fs::read_to_string(format!("{proc}/fdinfo/{}", name.to_str().unwrap()));
        let info = info.unwrap();
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
        let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
        assert_eq!(flags & nix::libc::O_DIRECT != 0, direct, "{flags:o}");
        let mut client = lab.client(0);
        for lba in [0, 13, IMAGE - 1] {
            client.write(lba, &sector(lba, 5)).unwrap();
            assert_eq!(client.read(lba, 1).unwrap(), sector(lba, 5));
        }
        assert_eq!(client.read(12, 2).unwrap()[..SECTOR], sector(12, 1));
        stop(target);
        assert_eq!(
            store.sectors(12, 3),
            [sector(12, 1), sector(13, 5), sector(14, 1)].concat()
        );
    }
}

#[test]
fn a_device_that_is_mounted_is_refused_and_a_read_only_one_explained() {
    let needs = [
        &Loop::NEEDS[..],
        &[Need::Program("mkfs.ext4"), Need::Program("unshare")],
    ]
    .concat();
    if !lab::require("a mounted device", &needs) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(16_384));
    sh(&format!("mkfs.ext4 -q {}", store.image().display()));
    let device = Loop::attach(&store.image(), 512).unwrap();
    let before = fs::read(store.image()).unwrap();
    let mount = format!(
        "mount -o ro {} /mnt && echo mounted && exec sleep 1000",
        device.path.display()
    );
    let mut mounted = Spawn::new("unshare")
        .args(["-m", "sh", "-ec", &mount])
        .start()
        .unwrap();
    mounted.wait_for_line("mounted", soon()).unwrap();
    let refuse = |options: &[&str], image: &Path| {
        let mut command = std::process::Command::new(AOEDE);
        command
            .args(["1", "1", "tgt0"])
            .arg(image)
            .args(options)
            .arg("--state-dir")
            .arg(store.state())
            .arg("--run-dir")
            .arg(store.run());
        run(Some(&lab.host), command, soon())
    };
    // In another mount namespace, where nobody can be named.
    for options in [&[][..], &["-r"]] {
        let ended = refuse(options, &device.path);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        for part in [device.path.to_str().unwrap(), "in use", "free it"] {
            assert!(ended.line().contains(part), "{ended:?}");
        }
    }
    stop(serve_path(
        &lab.host,
        &store,
        &device.path,
        &["-r", "--force"],
    ));
    drop(mounted);
    let target = serve_path(&lab.host, &store, &device.path, &[]);
    assert_eq!(lab.client(0).identify().unwrap().sectors(), 16_384);
    stop(target);
    drop(device);
    assert!(fs::read(store.image()).unwrap() == before);

    let name = sh(&format!(
        "losetup --find --show --read-only {}",
        store.image().display()
    ));
    let device = Loop { path: name.into() };
    let ended = refuse(&[], &device.path);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.line().contains("-r"), "{ended:?}");
    stop(serve_path(&lab.host, &store, &device.path, &["-r"]));
}

#[test]
fn a_device_that_grew_is_measured_again() {
    if !lab::require("a loop device that grows", &Loop::NEEDS) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let device = Loop::attach(&store.image(), 512).unwrap();
    let target = serve_path(&lab.host, &store, &device.path, &[]);
    let mut client = lab.listener(0);
    sh(&format!(
        "truncate -s {} {} && losetup -c {}",
        2 * IMAGE * SECTOR as u64,
        store.image().display(),
        device.path.display()
    ));
    target.signal(Signal::SIGHUP).unwrap();
    advertisement(&mut client, soon());
    assert_eq!(client.identify().unwrap().sectors(), 2 * IMAGE);
    client.write(2 * IMAGE - 1, &[6; SECTOR]).unwrap();
    stop(target);
    assert_eq!(store.sectors(2 * IMAGE as usize - 1, 1), [6; SECTOR]);
}

#[test]
fn what_lies_behind_the_new_end_of_an_image_is_dropped() {
    if !lab::require("an image that becomes smaller", &Loop::NEEDS) {
        return;
    }
    // Written back only when it is asked for.
    let late = [
        "--set",
        "max_dirty_age=600000",
        "--set",
        "idle_flush=600000",
    ];
    let truncate = |store: &Store, sectors: u64| {
        let file = fs::OpenOptions::new().write(true).open(store.image());
        file.unwrap().set_len(sectors * SECTOR as u64).unwrap();
    };
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = serve(&lab.host, &store, &["tgt0"], &late);
    let mut client = lab.listener(0);
    client.write(8, &[1; SECTOR]).unwrap();
    // Across the new end, and behind it.
    client.write(999, &[2; 2 * SECTOR]).unwrap();
    client.write(2000, &[3; SECTOR]).unwrap();
    truncate(&store, 1000);
    target.signal(Signal::SIGHUP).unwrap();
    let line = target.wait_for_line("dropped", soon()).unwrap();
    for part in ["e1.1: ", "disk.img: ", " 2 sectors "] {
        assert!(line.contains(part), "{line}");
    }
    stop(target);
    let bytes = fs::read(store.image()).unwrap();
    assert_eq!(bytes.len(), 1000 * SECTOR);
    assert_eq!(store.sectors(8, 1), [1; SECTOR]);
    assert_eq!(store.sectors(999, 1), [2; SECTOR]);

    // A device refuses what lies behind its end, and is well when that is gone.
    let store = Store::new(IMAGE);
    let device = Loop::attach(&store.image(), 512).unwrap();
    let options = ["--set", "idle_flush=1"];
    let mut target = serve_path(&lab.host, &store, &device.path, &options);
    let mut client = lab.listener(0);
    truncate(&store, 1000);
    sh(&format!("losetup -c {}", device.path.display()));
    client.write(2000, &[3; SECTOR]).unwrap();
    target
        .wait_for_line("write failed at LBA 2000: ", soon())
        .unwrap();
    target.signal(Signal::SIGHUP).unwrap();
    target.wait_for_line("takes writes again", soon()).unwrap();
    client.write(999, &[4; SECTOR]).unwrap();
    stop(target);
    assert_eq!(store.sectors(999, 1), [4; SECTOR]);
}

/// Trims ranges that begin and end inside blocks, and sees zeros there and
/// nowhere else.
fn trims(client: &mut Client, what: &str) {
    assert!(announces_trim(&client.identify().unwrap()), "{what}");
    let ranges = [(9, 1), (20, 30), (64, 8), (100, 1000), (IMAGE - 1, 1)];
    assert_eq!(outcome(client, &trim(&ranges)).0, 0x40, "{what}");
    // What leads past the end is refused whole.
    let past = trim(&[(2000, 1), (IMAGE - 1, 2)]);
    assert_eq!(outcome(client, &past).0, 0x41, "{what}");
    let read = client.read_many(0, IMAGE as usize).unwrap();
    for (lba, bytes) in (0u64..).zip(read.chunks(SECTOR)) {
        let gone = ranges
            .iter()
            .any(|(from, count)| (*from..from + count).contains(&lba));
        let expected = if gone {
            vec![0; SECTOR]
        } else {
            sector(lba, 1)
        };
        assert!(bytes == expected, "{what}: sector {lba}");
    }
    // What was trimmed can be written.
    client.write(25, &sector(25, 4)).unwrap();
    assert_eq!(client.read(24, 3).unwrap_or_default().len(), 3 * SECTOR);
    assert_eq!(client.read(25, 1).unwrap(), sector(25, 4));
}

#[test]
fn trim_makes_zeros_on_files_and_devices_and_gives_the_room_back() {
    if !lab::require("TRIM", &Loop::NEEDS) {
        return;
    }
    for options in [&[][..], &["-d"], &["-s"]] {
        let (lab, store) = (Lab::new(1, 9000), numbered(IMAGE));
        let target = serve(&lab.host, &store, &["tgt0"], options);
        let before = fs::metadata(store.image()).unwrap().blocks();
        trims(&mut lab.client(0), &format!("file {options:?}"));
        stop(target);
        let after = fs::metadata(store.image()).unwrap();
        assert_eq!(after.len(), IMAGE * SECTOR as u64);
        assert!(
            after.blocks() + 500 < before,
            "{before}, {}",
            after.blocks()
        );
    }
    for (size, options) in [(512, &[][..]), (4096, &[]), (4096, &["-d"])] {
        let (lab, store) = (Lab::new(1, 9000), numbered(IMAGE));
        let device = Loop::attach(&store.image(), size).unwrap();
        let target = serve_path(&lab.host, &store, &device.path, options);
        trims(&mut lab.client(0), &format!("loop {size} {options:?}"));
        stop(target);
    }
}

#[test]
fn trim_is_announced_only_where_it_works() {
    let needs = [Need::Network, Need::Program("unshare")];
    if !lab::require("TRIM where it does not work", &needs) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), numbered(IMAGE));
    let target = serve(&lab.host, &store, &["tgt0"], &["-r"]);
    let mut client = lab.client(0);
    assert!(!announces_trim(&client.identify().unwrap()));
    assert_eq!(outcome(&mut client, &trim(&[(1, 1)])), (0x41, 0x04, 1));
    assert_eq!(
        outcome(&mut client, &Frame::write(1, &[0; SECTOR])),
        (0x41, 0x04, 1)
    );
    assert_eq!(client.read(1, 1).unwrap(), sector(1, 1));
    stop(target);
    // ramfs cannot punch holes.
    let script = format!(
        "mount -t ramfs none /mnt; cp {} /mnt/i; exec {AOEDE} 1 1 tgt0 /mnt/i --state-dir {}",
        store.image().display(),
        store.state().display()
    );
    let mut target = Spawn::new("unshare")
        .inside(&lab.host)
        .args(["-m", "sh", "-ec", &script])
        .start()
        .unwrap();
    target.wait_for_line(": e1.1, ", soon()).unwrap();
    let mut client = lab.client(0);
    assert!(!announces_trim(&client.identify().unwrap()));
    assert_eq!(outcome(&mut client, &trim(&[(1, 1)])), (0x41, 0x04, 1));
    assert_eq!(client.read(1, 1).unwrap(), sector(1, 1));
    stop(target);
}

/// Threads do the disk work: strace does not see what io_uring does.
const THREADS: [&str; 2] = ["--set", "disk_engine=threads"];

/// How many times strace saw a sync so far.
fn syncs(lines: &Path) -> usize {
    let text = fs::read_to_string(lines).unwrap_or_default();
    text.lines().filter(|l| l.contains("fdatasync(")).count()
}

#[test]
fn one_sync_serves_all_writes_that_wait_for_it() {
    let needs = [Need::Network, Need::Program("strace")];
    if !lab::require("counting syncs", &needs) {
        return;
    }
    const WRITES: u64 = 64;
    const DELAY: Duration = Duration::from_millis(200);
    let slow = "inject=fdatasync:delay_enter=200000";
    for (option, durable) in [("-s", true), ("-b64", false)] {
        let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
        let expressions = ["trace=fdatasync", slow];
        // Threads, whose calls strace sees, and nothing written back unasked.
        let options = [option, THREADS[0], THREADS[1], "--set=idle_flush=600000"];
        let (target, lines) = traced(&lab.host, &store, &["tgt0"], &options, &expressions);
        let mut client = lab.client(0);
        // That of the arena's record.
        let before = syncs(&lines);
        assert_eq!(client.identify().unwrap().word(85) & 0x20 == 0, durable);
        let ((), time) = timed(|| {
            for lba in 0..WRITES {
                let frame = Frame::write(lba * 8, &sector(lba, 1));
                client.send(&frame).unwrap();
            }
            for reply in ata_replies(&mut client, WRITES as usize) {
                assert!(registers(&reply).is_success(), "{reply:?}");
            }
        });
        let count = syncs(&lines) - before;
        if durable {
            assert!(time >= DELAY, "acknowledged before it was synced: {time:?}");
            assert!((1..=8).contains(&count), "{count} syncs");
        } else {
            assert_eq!(count, 0);
        }
        // A flush is answered after a sync, if anything is left to be synced.
        let ((), time) = timed(|| client.flush().unwrap());
        if !durable {
            assert!(time >= DELAY, "{time:?}");
            assert!(syncs(&lines) - before > count);
        }
        stop(target);
    }
}

#[test]
fn a_disk_that_fails_is_told_of_and_outlived() {
    let needs = [Need::Network, Need::Program("strace")];
    if !lab::require("failing reads, writes and syncs", &needs) {
        return;
    }
    // Past the page cache, whose hits ask no disk.
    let (lab, store) = (Lab::new(2, 1500), numbered(IMAGE));
    let options = ["-d", THREADS[0], THREADS[1]];
    let mut target = serve(&lab.host, &store, &["tgt0", "tgt1"], &options);
    let (mut client, mut other) = (lab.client(0), lab.client(1));
    assert!(is_healthy(&mut client));
    let fail = |call: &str| {
        let expressions = [format!("trace={call}"), format!("inject={call}:error=EIO")];
        trouble(&target, &expressions.each_ref().map(String::as_str))
    };

    let failing = fail("pread64");
    assert_eq!(outcome(&mut client, &Frame::read(7, 2)), (0x41, 0x40, 2));
    // Writes and everything else go on, also on the other NIC.
    other.write(100, &sector(100, 2)).unwrap();
    other.write(1000, &sector(1000, 2)).unwrap();
    other.config_read().unwrap();
    drop(failing);
    assert_eq!(client.read(7, 1).unwrap(), sector(7, 1));
    // A sector that cannot be read is counted, and makes no failing drive.
    assert!(is_healthy(&mut other));
    assert_eq!(reads_failed(&mut other), 1);

    // What cannot be written stays in the cache, and a flush says so.
    for call in ["pwritev,pwrite64", "fdatasync"] {
        let failing = fail(call);
        client.write(7, &sector(7, 3)).unwrap();
        let (status, error, _) = outcome(&mut client, &Frame::flush());
        assert_eq!((status, error), (0x61, 0x04), "{call}");
        assert_eq!(
            client.read(7, 2).unwrap(),
            [sector(7, 3), sector(8, 1)].concat()
        );
        assert!(!is_healthy(&mut other), "SMART forgot {call}");
        drop(failing);
        wait_until("the disk to be tried again", soon(), || {
            client.flush().is_ok()
        })
        .unwrap();
        assert_eq!(store.sectors(7, 2), [sector(7, 3), sector(8, 1)].concat());
    }

    // The log names the file, the place and the reason.
    let line = target.wait_for_line(": read failed", soon()).unwrap();
    for part in ["error", "disk.img", "image ", "at sector 0:", "os error 5"] {
        assert!(line.contains(part), "{line}");
    }
    stop(target);
    assert_eq!(store.sectors(100, 1), sector(100, 2));
}

#[test]
fn a_durable_write_whose_sync_fails_is_not_acknowledged() {
    let needs = [Need::Network, Need::Program("strace")];
    if !lab::require("failing syncs below -s", &needs) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let options = ["-s", THREADS[0], THREADS[1], "--set=io_patience=1"];
    let mut target = serve(&lab.host, &store, &["tgt0"], &options);
    let mut client = lab.client(0);
    let expressions = ["trace=fdatasync", "inject=fdatasync:error=EIO"];
    let failing = trouble(&target, &expressions);
    let frame = Frame::write(7, &sector(7, 2));
    assert_eq!(outcome(&mut client, &frame), (0x61, 0x04, 1));
    assert!(!is_healthy(&mut client));
    drop(failing);
    wait_until("the disk to be tried again", soon(), || {
        client.write(7, &sector(7, 3)).is_ok()
    })
    .unwrap();
    // An end whose last sync fails is no good end, and keeps what it owes.
    let failing = trouble(&target, &expressions);
    client.send(&Frame::write(7, &sector(7, 4))).unwrap();
    // A frame that is not taken before the signal is never taken.
    wait_until("the write to be taken", soon(), || {
        client.read(7, 1).is_ok_and(|data| data == sector(7, 4))
    })
    .unwrap();
    let status = target.stop(soon()).unwrap();
    assert_eq!(status.code(), Some(1), "{:?}", target.output());
    let output = target.output();
    assert!(output.iter().any(|l| l.contains(".arena")), "{output:?}");
    drop(failing);
    stop(serve(&lab.host, &store, &["tgt0"], &options));
    let kept = store.sectors(7, 1);
    assert!(kept == sector(7, 3) || kept == sector(7, 4));
}

#[test]
fn a_full_filesystem_below_a_sparse_image_fails_writes_and_nothing_else() {
    let needs = [Need::Network, Need::Program("unshare")];
    if !lab::require("a full filesystem", &needs) {
        return;
    }
    let (lab, store) = (Lab::new(1, 9000), Store::new(1));
    let script = format!(
        "mount -t tmpfs -o size=1m none /mnt; truncate -s 8M /mnt/i; \
         exec {AOEDE} 1 1 tgt0 /mnt/i --state-dir {}",
        store.state().display()
    );
    let mut target = Spawn::new("unshare")
        .inside(&lab.host)
        .args(["-m", "sh", "-ec", &script])
        .start()
        .unwrap();
    target.wait_for_line(": e1.1, ", soon()).unwrap();
    let mut client = lab.client(0);
    let block = |lba: u64, generation| -> Vec<u8> {
        (lba..lba + 16)
            .flat_map(|lba| sector(lba, generation))
            .collect()
    };
    // The cache takes more than the disk has room for; then the disk is given
    // up, and says so.
    let mut written = 0;
    let refused = loop {
        let reply = client
            .call(&Frame::write(written, &block(written, 1)))
            .unwrap();
        let ata = registers(&reply);
        if !ata.is_success() {
            break (ata.status, ata.error, ata.count);
        }
        written = (written + 16) % 8192;
    };
    assert_eq!(refused, (0x61, 0x04, 16));
    // Everything that was acknowledged is there, on the disk or in the cache.
    for lba in (0..8192).step_by(16) {
        assert_eq!(client.read(lba, 16).unwrap(), block(lba, 1));
    }
    let line = target.wait_for_line("write failed at LBA", soon()).unwrap();
    assert!(
        line.contains("/mnt/i") && line.contains("No space"),
        "{line}"
    );
    // With room the disk comes back by itself, and gets it all.
    let mount = format!("/proc/{}/root/mnt", target.pid());
    let remount = format!(
        "nsenter -t {} -m mount -o remount,size=16m /mnt",
        target.pid()
    );
    sh(&remount);
    target.wait_for_line("takes writes again", soon()).unwrap();
    wait_until("room", soon(), || client.flush().is_ok()).unwrap();
    let bytes = fs::read(format!("{mount}/i")).unwrap();
    for lba in (0..8192u64).step_by(16) {
        assert_eq!(bytes[lba as usize * SECTOR..][..16 * SECTOR], block(lba, 1));
    }
    stop(target);
}

#[test]
fn a_slow_read_keeps_nobody_else_waiting() {
    let needs = [&Loop::NEEDS[..], &[Need::Program("strace")]].concat();
    if !lab::require("a slow read", &needs) {
        return;
    }
    const DELAY: Duration = Duration::from_secs(3);
    const AT_ONCE: Duration = Duration::from_millis(1500);
    // A block device always has a page cache, and an empty one at first.
    let (lab, store) = (Lab::new(2, 1500), numbered(65_536));
    let device = Loop::attach(&store.image(), 512).unwrap();
    let mut target = Spawn::new(AOEDE)
        .inside(&lab.host)
        .args(["1", "1", "tgt0", "tgt1", "--set", "disk_threads=1"])
        .args(THREADS)
        .arg(&device.path)
        .arg("--state-dir")
        .arg(store.state())
        .arg("--run-dir")
        .arg(store.run())
        .start()
        .unwrap();
    target.wait_for_line(": e1.1, ", soon()).unwrap();
    let (mut client, mut other) = (lab.client(0), lab.client(1));
    client.read(0, 1).unwrap();
    wait_until("the read to be cached", soon(), || {
        client.read(0, 1).is_ok()
    })
    .unwrap();
    let slow = trouble(
        &target,
        &["trace=pread64", "inject=pread64:delay_enter=3000000"],
    );
    let (request, waited) = timed(|| {
        let request = client.send(&Frame::read(40_000, 1)).unwrap();
        // The one thread of the disk is busy for three seconds now.
        let ((), time) = timed(|| {
            for client in [&mut client, &mut other] {
                client.config_read().unwrap();
                client.identify().unwrap();
                assert_eq!(client.read(0, 1).unwrap(), sector(0, 1));
                assert!(client.reserve(0, &[]).unwrap().list.is_empty());
            }
        });
        assert!(time < AT_ONCE, "{time:?}");
        let deadline = soon();
        loop {
            let reply = client.recv(deadline.instant()).unwrap().unwrap();
            if reply.tag_bytes() == request[20..24] {
                assert_eq!(reply.sectors(1).unwrap(), sector(40_000, 1));
                break;
            }
        }
        request
    });
    assert!(
        waited >= DELAY,
        "nothing was slow: {waited:?} for {request:?}"
    );
    // More than can wait: what is too much is dropped, and memory is bounded.
    for n in 0..3000 {
        client.send(&Frame::read(20_000 + 8 * n, 1)).unwrap();
    }
    let ((), time) = timed(|| {
        other.config_read().unwrap();
        assert_eq!(other.read(0, 1).unwrap(), sector(0, 1));
    });
    assert!(time < AT_ONCE, "{time:?}");
    drop(slow);
    stop(target);
}

#[test]
fn direct_io_on_a_filesystem_of_large_sectors_keeps_neighbours() {
    let needs = [
        &Loop::NEEDS[..],
        &[Need::Program("mkfs.ext4"), Need::Program("unshare")],
    ]
    .concat();
    if !lab::require("-d on a file on 4096-byte sectors", &needs) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(65_536));
    let device = Loop::attach(&store.image(), 4096).unwrap();
    let source = numbered(1024);
    sh(&format!("mkfs.ext4 -q {}", device.path.display()));
    let start = |size: u64| {
        let script = format!(
            "mount {} /mnt; cp {} /mnt/i; truncate -s {size} /mnt/i; sync /mnt/i; \
             exec {AOEDE} 1 1 tgt0 -d /mnt/i --state-dir {}",
            device.path.display(),
            source.image().display(),
            store.state().display()
        );
        Spawn::new("unshare")
            .inside(&lab.host)
            .args(["-m", "sh", "-ec", &script])
            .start()
            .unwrap()
    };
    let mut target = start(1024 * SECTOR as u64);
    target.wait_for_line(": e1.1, 1024", soon()).unwrap();
    let mut client = lab.client(0);
    for lba in [0, 9, 1023] {
        client.write(lba, &sector(lba, 2)).unwrap();
    }
    let read = client.read_many(0, 1024).unwrap();
    for (lba, bytes) in (0u64..).zip(read.chunks(SECTOR)) {
        let generation = if [0, 9, 1023].contains(&lba) { 2 } else { 1 };
        assert_eq!(bytes, sector(lba, generation), "sector {lba}");
    }
    stop(target);
    // The last block would reach past the end.
    let mut target = start(1001 * SECTOR as u64);
    let status = target.wait(soon()).unwrap();
    assert_eq!(status.code(), Some(1));
    let output = target.output();
    assert!(
        output.iter().any(|l| l.contains("multiples of 4096")),
        "{output:?}"
    );
}
