//! The real initiators: Debian's kernel with its aoe driver, and iPXE, each in a
//! small virtual machine whose wire is a tap device that we serve on.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use initiator::lab::{self, Deadline, Namespace, Need, Process, Spawn, Tap};

use crate::freeze::order;
use crate::support::{Store, serve, stop};

pub const QEMU: &str = "qemu-system-x86_64";
const IPXE: &str = "/usr/lib/ipxe/ipxe.lkrn";
/// Software emulation on a busy machine; the slowest scenario takes ten seconds
/// on an idle one.
const PATIENCE: u64 = 240;

const NEEDS: [Need; 8] = [
    Need::Network,
    Need::Path("/dev/net/tun"),
    Need::Program(QEMU),
    Need::Program("apt-get"),
    Need::Program("busybox"),
    Need::Program("mkfs.ext4"),
    Need::Program("fio"),
    Need::Program("cpio"),
];

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/vm")
        .join(name)
}

/// The guest's kernel and initramfs, made at most once at a time.
pub fn guest() -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm");
    let status = Command::new(here("prepare")).arg(&out).status().unwrap();
    assert!(status.success(), "tests/vm/prepare: {status}");
    out
}

/// Taps `tap0`, `tap1`, .. in a namespace.
pub fn taps(namespace: &Namespace, count: usize, mtu: u32) -> (Vec<Tap>, Vec<String>) {
    let names: Vec<String> = (0..count).map(|n| format!("tap{n}")).collect();
    let taps = names
        .iter()
        .map(|name| Tap::new(name, namespace, mtu).unwrap())
        .collect();
    (taps, names)
}

/// A machine whose NICs are these taps and whose console is its output.
pub fn machine(namespace: &Namespace, taps: &[String], memory: &str) -> Spawn {
    let mut spawn = Spawn::new(QEMU)
        .inside(namespace)
        .args([
            "-accel",
            "tcg",
            "-cpu",
            "qemu64,+rdrand",
            "-m",
            memory,
            "-smp",
            "1",
        ])
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
    for (n, tap) in taps.iter().enumerate() {
        spawn = spawn
            .arg("-netdev")
            .arg(format!("tap,id=n{n},ifname={tap},script=no,downscript=no"))
            .arg("-device")
            .arg(format!(
                "virtio-net-pci,netdev=n{n},mac=52:54:00:00:0{n}:01,romfile="
            ));
    }
    spawn
}

/// Boots the guest with a scenario and expects that it calls the result ok.
fn run_scenario(namespace: &Namespace, taps: &[String], parameters: &str) -> Vec<String> {
    let out = guest();
    let mut guest = machine(namespace, taps, "512")
        .arg("-kernel")
        .arg(out.join("vmlinuz"))
        .arg("-initrd")
        .arg(out.join("initrd.img"))
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet ipv6.disable=1 aoede.dev=e1.1 {parameters}"
        ))
        .start()
        .unwrap();
    let result = guest.wait_for_line("AOEDE-VM-RESULT:", Deadline::seconds(PATIENCE));
    let result = result.unwrap_or_else(|e| panic!("{e}: {:#?}", guest.output()));
    assert!(
        result.contains("AOEDE-VM-RESULT: ok"),
        "{:#?}",
        guest.output()
    );
    guest.wait(Deadline::seconds(30)).unwrap();
    guest.output()
}

fn fsck(image: &Path) {
    let check = Command::new("e2fsck")
        .args(["-f", "-n"])
        .arg(image)
        .output()
        .unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stdout)
    );
}

#[test]
fn linux_makes_a_filesystem_on_us_over_two_nics_and_it_is_clean() {
    if !lab::require("the Linux driver over two NICs", &NEEDS) {
        return;
    }
    let (namespace, store) = (Namespace::new().unwrap(), Store::new(131_072));
    let (_taps, names) = taps(&namespace, 2, 1500);
    let nics: Vec<&str> = names.iter().map(String::as_str).collect();
    let target = serve(&namespace, &store, &nics, &[]);
    let proof = format!("written-by-guest-of-{}", std::process::id());
    run_scenario(
        &namespace,
        &names,
        &format!("aoede.scenario=smoke aoede.paths=2 aoede.sectors=131072 aoede.proof={proof}"),
    );
    stop(target);
    fsck(&store.image());
    let cat = Command::new("debugfs")
        .args(["-R", "cat proof.txt"])
        .arg(store.image())
        .output();
    assert_eq!(String::from_utf8_lossy(&cat.unwrap().stdout).trim(), proof);
}

#[test]
fn linux_reads_back_every_sector_it_wrote_in_jumbo_frames() {
    if !lab::require("the Linux driver in jumbo frames", &NEEDS) {
        return;
    }
    // An odd number of sectors: the last frame of the device is a short one.
    let (namespace, store) = (Namespace::new().unwrap(), Store::new(65_537));
    let (_taps, names) = taps(&namespace, 1, 9000);
    let target = serve(
        &namespace,
        &store,
        &["tap0"],
        &["--set", "receive=recvmmsg"],
    );
    run_scenario(
        &namespace,
        &names,
        "aoede.scenario=raw aoede.mtu=9000 aoede.payload=8704 aoede.sectors=65537",
    );
    stop(target);
}

#[test]
fn linux_goes_on_when_the_target_is_killed_and_started_again() {
    if !lab::require("the Linux driver while the target is killed", &NEEDS) {
        return;
    }
    let (namespace, store) = (Namespace::new().unwrap(), Store::new(131_072));
    let (_taps, names) = taps(&namespace, 2, 1500);
    let nics = ["tap0", "tap1"];
    let mut target = serve(&namespace, &store, &nics, &[]);
    let out = guest();
    let mut guest = machine(&namespace, &names, "512")
        .arg("-kernel")
        .arg(out.join("vmlinuz"))
        .arg("-initrd")
        .arg(out.join("initrd.img"))
        .args([
            "-append",
            "console=ttyS0 quiet ipv6.disable=1 aoede.dev=e1.1 aoede.paths=2 \
                           aoede.scenario=load aoede.seconds=8",
        ])
        .start()
        .unwrap();
    let begun = guest.wait_for_line("AOEDE-VM-LOAD: started", Deadline::seconds(PATIENCE));
    begun.unwrap_or_else(|e| panic!("{e}: {:#?}", guest.output()));
    for _ in 0..2 {
        target.kill().unwrap();
        target = serve(&namespace, &store, &nics, &[]);
        let synced = guest.wait_for_line("AOEDE-VM-LOAD: synced", Deadline::seconds(PATIENCE));
        synced.unwrap_or_else(|e| panic!("{e}: {:#?}", guest.output()));
    }
    let result = guest
        .wait_for_line("AOEDE-VM-RESULT:", Deadline::seconds(PATIENCE))
        .unwrap();
    assert!(
        result.contains("AOEDE-VM-RESULT: ok"),
        "{:#?}",
        guest.output()
    );
    guest.wait(Deadline::seconds(30)).unwrap();
    stop(target);
    fsck(&store.image());
}

/// A copy of a mounted filesystem: its journal is replayed, and then it must be
/// clean; the last line of the file `ticks`.
fn check_copy(copy: &Path) -> u64 {
    let replay = Command::new("e2fsck")
        .args(["-y", "-E", "journal_only"])
        .arg(copy)
        .output()
        .unwrap();
    // 1: something was replayed.
    assert!(
        matches!(replay.status.code(), Some(0 | 1)),
        "{}",
        String::from_utf8_lossy(&replay.stdout)
    );
    fsck(copy);
    let ticks = Command::new("debugfs")
        .args(["-R", "cat ticks"])
        .arg(copy)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&ticks.stdout).into_owned();
    text.lines().last().map_or(0, |last| last.parse().unwrap())
}

#[test]
fn linux_goes_on_while_it_is_frozen_copied_and_thawed_and_each_copy_is_clean() {
    const COPIES: usize = 10;
    if !lab::require("the Linux driver while the image is frozen", &NEEDS) {
        return;
    }
    let (namespace, store) = (Namespace::new().unwrap(), Store::new(131_072));
    let (_taps, names) = taps(&namespace, 2, 1500);
    let shadow = store.path().join("shadow.img");
    let options = ["-f", shadow.to_str().unwrap()];
    let mut target = serve(&namespace, &store, &["tap0", "tap1"], &options);
    let out = guest();
    let mut guest = machine(&namespace, &names, "512")
        .arg("-kernel")
        .arg(out.join("vmlinuz"))
        .arg("-initrd")
        .arg(out.join("initrd.img"))
        .args([
            "-append",
            "console=ttyS0 quiet ipv6.disable=1 aoede.dev=e1.1 aoede.paths=2 \
                           aoede.scenario=load aoede.seconds=14",
        ])
        .start()
        .unwrap();
    let begun = guest.wait_for_line("AOEDE-VM-LOAD: started", Deadline::seconds(PATIENCE));
    begun.unwrap_or_else(|e| panic!("{e}: {:#?}", guest.output()));
    let copy = store.path().join("copy.img");
    let synced = |guest: &Process| {
        let lines = guest.output();
        let ticks = lines.iter().filter_map(|line| {
            let (_, tick) = line.split_once("AOEDE-VM-LOAD: synced ")?;
            tick.trim().parse::<u64>().ok()
        });
        ticks.max().unwrap_or(0)
    };
    let mut ticks = Vec::new();
    for _ in 0..COPIES {
        let before = synced(&guest);
        order(&target, 1);
        target
            .wait_for_line("frozen: ", Deadline::seconds(60))
            .unwrap();
        let inode = std::fs::metadata(&shadow).unwrap().ino();
        let status = Command::new("cp")
            .arg("--sparse=always")
            .args([&store.image(), &copy])
            .status();
        assert!(status.unwrap().success());
        let after = std::fs::metadata(&shadow).unwrap().ino();
        assert_eq!(inode, after, "the copy may be none of one instant");
        order(&target, 2);
        target
            .wait_for_line("thawed: ", Deadline::seconds(60))
            .unwrap();
        assert!(!shadow.exists());
        let tick = check_copy(&copy);
        assert!(tick >= before, "{tick} in the copy, {before} before it");
        ticks.push(tick);
    }
    assert!(ticks.is_sorted(), "{ticks:?}");
    let ended = guest.output().join("\n").contains("AOEDE-VM-LOAD: ended");
    println!("ticks of the copies {ticks:?}; load ended before: {ended}");
    let result = guest.wait_for_line("AOEDE-VM-RESULT:", Deadline::seconds(PATIENCE));
    let result = result.unwrap_or_else(|e| panic!("{e}: {:#?}", guest.output()));
    assert!(
        result.contains("AOEDE-VM-RESULT: ok"),
        "{:#?}",
        guest.output()
    );
    guest.wait(Deadline::seconds(30)).unwrap();
    stop(target);
    fsck(&store.image());
}

/// The boot sector of tests/vm/bootsector.hex.
fn boot_sector() -> Vec<u8> {
    let text = std::fs::read_to_string(here("bootsector.hex")).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let bytes = lines.flat_map(str::split_whitespace);
    bytes
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect()
}

#[test]
fn ipxe_finds_us_and_boots_a_sector_that_proves_itself() {
    let needs = [
        Need::Network,
        Need::Path("/dev/net/tun"),
        Need::Program(QEMU),
        Need::Path(IPXE),
    ];
    if !lab::require("iPXE", &needs) {
        return;
    }
    let (namespace, store) = (Namespace::new().unwrap(), Store::new(32_768));
    let text = |lba: usize| format!("sector {lba} of {}", std::process::id());
    let mut image = std::fs::read(store.image()).unwrap();
    image[..512].copy_from_slice(&boot_sector());
    for lba in [1, 2047] {
        let line = format!("{}\n", text(lba));
        image[lba * 512..lba * 512 + line.len()].copy_from_slice(line.as_bytes());
    }
    std::fs::write(store.image(), &image).unwrap();

    let (_taps, names) = taps(&namespace, 1, 1500);
    let target = serve(&namespace, &store, &["tap0"], &[]);
    let mut guest: Process = machine(&namespace, &names, "128")
        .args([
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=4",
            "-kernel",
            IPXE,
            "-initrd",
        ])
        .arg(here("ipxe.ipxe"))
        .start()
        .unwrap();
    let status = guest.wait(Deadline::seconds(PATIENCE)).unwrap();
    let said: Vec<String> = guest.output().iter().map(|l| l.trim().to_owned()).collect();
    // isa-debug-exit: (16 << 1) | 1.
    assert_eq!(status.code(), Some(33), "{said:#?}");
    for line in [
        "AOEDE-BOOT: sector 0 runs".to_owned(),
        format!("AOEDE-BOOT: lba 1 says {}", text(1)),
        format!("AOEDE-BOOT: lba 2047 says {}", text(2047)),
        "AOEDE-BOOT: lba 2046 written".to_owned(),
        "AOEDE-BOOT: done".to_owned(),
    ] {
        assert!(said.contains(&line), "{line:?} is not in {said:#?}");
    }
    stop(target);
    assert_eq!(store.sectors(2046, 1), store.sectors(2047, 1));
}
