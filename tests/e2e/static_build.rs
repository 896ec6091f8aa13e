//! The statically linked program in a machine that has nothing else: no /proc,
//! /sys, /run, /var, no device node but the console.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use initiator::client::Client;
use initiator::lab::{self, Deadline, Namespace, Need};

use crate::vm;
use crate::workshop::{sector, sh};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Software emulation on a busy machine.
const PATIENCE: u64 = 120;

const NEEDS: [Need; 8] = [
    Need::Network,
    Need::Path("/dev/net/tun"),
    Need::Program(vm::QEMU),
    Need::Program("apt-get"),
    Need::Program("busybox"),
    Need::Program("mkfs.ext4"),
    Need::Program("fio"),
    Need::Program("cpio"),
];

/// What the machine does first and last. One of the two programs becomes its
/// first process, the other leaves it.
const INIT: &str = "#!/bin/busybox sh
for module in $(/bin/busybox cat /modules/order); do
    case $module in
    aoe.ko | ext4.ko | jbd2.ko | mbcache.ko | crc* | libcrc* ) ;;
    *) /bin/busybox insmod /modules/$module ;;
    esac
done
/bin/busybox ip link set lo up
/bin/busybox ip link set eth0 up
/aoeded 1 2 eth0 /two.img --create 64K --pid-file /pid
echo \"aoeded said $?\"
exec /aoede 1 1 eth0 /one.img --create 1M
";

/// Builds both programs without a shared library; returns where they are.
fn build() -> PathBuf {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("static");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["build", "--quiet", "--bin", "aoede", "--bin", "aoeded"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&out)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    out.join(TARGET).join("debug")
}

/// Whether an executable asks for a loader (PT_INTERP), as those do that need
/// shared libraries.
fn wants_a_loader(file: &Path) -> bool {
    const PT_INTERP: u32 = 3;
    let bytes = fs::read(file).unwrap();
    let number = |at: usize, len: usize| {
        let bytes = bytes[at..at + len].iter().rev();
        bytes.fold(0usize, |n, byte| n << 8 | usize::from(*byte))
    };
    assert_eq!(bytes[..5], *b"\x7fELF\x02", "not a 64-bit ELF file");
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    (0..count).any(|n| number(table + n * size, 4) == PT_INTERP as usize)
}

/// An initramfs with the two programs, busybox and the modules of a NIC.
fn initramfs(programs: &Path, guest: &Path, dir: &Path) -> PathBuf {
    let root = dir.join("root");
    fs::create_dir_all(root.join("dev")).unwrap();
    sh(&format!(
        "cd {root} && cpio -idm --quiet 'modules/*' bin/busybox < {guest}/initrd.img && \
         mknod dev/console c 5 1",
        root = root.display(),
        guest = guest.display()
    ));
    for program in ["aoede", "aoeded"] {
        // Without what only a debugger wants; unpacking it costs seconds here.
        let copied = root.join(program);
        fs::copy(programs.join(program), &copied).unwrap();
        let _ = Command::new("strip").arg(&copied).output();
    }
    fs::write(root.join("script"), INIT).unwrap();
    symlink("script", root.join("init")).unwrap();
    sh(&format!(
        "cd {root} && chmod 755 script && find . | cpio -o -H newc --quiet > ../static.img",
        root = root.display()
    ));
    dir.join("static.img")
}

#[test]
fn the_static_program_serves_from_an_initramfs_without_anything_else() {
    if !lab::require("the static build in an initramfs", &NEEDS) {
        return;
    }
    let programs = build();
    assert!(!wants_a_loader(&programs.join("aoede")));
    assert!(wants_a_loader(Path::new(env!("CARGO_BIN_EXE_aoede"))));
    let guest = vm::guest();
    let dir = tempfile::tempdir().unwrap();
    let image = initramfs(&programs, &guest, dir.path());

    let namespace = Namespace::new().unwrap();
    let (_taps, names) = vm::taps(&namespace, 1, 1500);
    let mut machine = vm::machine(&namespace, &names, "256")
        .arg("-kernel")
        .arg(guest.join("vmlinuz"))
        .arg("-initrd")
        .arg(image)
        .args(["-append", "console=ttyS0 quiet ipv6.disable=1 panic=-1"])
        .start()
        .unwrap();
    for line in ["aoeded said 0", ": e1.1, 2048 sectors, rw"] {
        let said = machine.wait_for_line(line, Deadline::seconds(PATIENCE));
        said.unwrap_or_else(|e| panic!("{e}: {:#?}", machine.output()));
    }
    for (slot, sectors) in [(1, 2048), (2, 128)] {
        let client = namespace.enter(|| Client::connected("tap0", 1, slot));
        let mut client = client.unwrap().unwrap();
        assert_eq!(client.identify().unwrap().sectors(), sectors);
        let last = sectors - 1;
        client.write(last, &sector(last, u64::from(slot))).unwrap();
        client.flush().unwrap();
        assert_eq!(client.read(last, 1).unwrap(), sector(last, u64::from(slot)));
        // The state directory is made where there is not even a /var.
        client.config_force(b"kept in memory").unwrap();
        assert_eq!(client.config_read().unwrap().string, b"kept in memory");
        let serial = client.identify().unwrap().serial();
        assert!(serial.starts_with(&format!("1.{slot}:")), "{serial}");
    }
}
