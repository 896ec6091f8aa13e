//! Disks of another kind: large sectors, a burst that is larger than the cache, and
//! filesystems that are full.

use std::io::Write;

use tempfile::TempDir;

use super::*;

/// A loop device; goes with this.
pub(super) struct Loop(pub String);

impl Loop {
    pub fn new(file: &Path, sector: &str) -> Loop {
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show", "--sector-size", sector])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Loop(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detach = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
        if !detach.is_ok_and(|status| status.success()) {
            eprintln!("{} is left behind", self.0);
        }
    }
}

#[test]
fn a_device_of_4096_byte_sectors_takes_any_of_ours() {
    let needs = [
        Need::Network,
        Need::Program("losetup"),
        Need::Path("/dev/loop-control"),
    ];
    if !lab::require("4Kn loop device with -d", &needs) {
        return;
    }
    for engine in ["disk_engine=threads", "disk_engine=auto"] {
        let bed = Bed::new();
        let device = Loop::new(&bed.store.image(), "4096");
        let start = || {
            let mut target = Spawn::new(AOEDE)
                .inside(&bed.wire.host)
                .args(Bed::options(&["-d"]))
                .args(["--set", engine, "1", "1", "tgt0", &device.0])
                .arg("--state-dir")
                .arg(bed.store.state())
                .arg("--run-dir")
                .arg(bed.store.run())
                .start()
                .unwrap();
            target
                .wait_for_line(": e1.1, ", Deadline::seconds(20))
                .unwrap();
            target
        };
        let mut target = start();
        let mut engine = Engine::new(bed.wire.client()).unwrap();
        bed.load(&mut engine, 1500).clean().unwrap();
        // Parts of blocks that nobody has read.
        engine.client.write(2001, &[1; 512]).unwrap();
        target.kill().unwrap();
        engine.model_mut().unwrap().settle();
        let target = start();
        engine.client.connect(1, 1).unwrap();
        assert_eq!(engine.client.read(2001, 1).unwrap(), [1; 512]);
        engine.client.write(2003, &[2; 512]).unwrap();
        engine.client.flush().unwrap();
        bed.load(&mut engine, 500).clean().unwrap();
        engine.verify_all().unwrap();
        stop(target);
        drop(device);
        let bytes = fs::read(bed.store.image()).unwrap();
        engine.model().unwrap().check_now(0, &bytes).unwrap();
        assert!(
            bed.store.sectors(2000, 5)[512..] == [[1; 512], [0; 512], [2; 512], [0; 512]].concat()
        );
    }
}

#[test]
fn a_burst_larger_than_the_cache_is_taken_all_the_same() {
    if !lab::require("cache smaller than a burst", &[Need::Network]) {
        return;
    }
    for engine in ["disk_engine=threads", "disk_engine=auto"] {
        let bed = Bed::new();
        let small = [
            "--set",
            "cache_size=256K",
            "--set",
            "parked_size=256K",
            "--set",
            engine,
        ];
        let target = bed.start(&small);
        let mut engine = Engine::new(bed.wire.client()).unwrap();
        let plan = Plan {
            op: Op::Mixed(20),
            block: Block::Bytes(64 << 10),
            depth: 64,
            duration: None,
            operations: Some(1500),
            verify: Some(Initial::Zeros),
            give_up: Duration::from_secs(30),
            new_tag: true,
            ..Plan::default()
        };
        engine.run(&plan).unwrap().clean().unwrap();
        engine.verify_all().unwrap();
        stop(target);
        let bytes = fs::read(bed.store.image()).unwrap();
        engine.model().unwrap().check_now(0, &bytes).unwrap();
    }
}

/// A tmpfs of its own; goes with this.
pub struct Memory(TempDir);

impl Memory {
    pub fn new(size: &str) -> Memory {
        let dir = tempfile::tempdir().unwrap();
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "aoede-test"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        Memory(dir)
    }

    /// Leaves no room in it until the file `filler` is removed and closed.
    pub fn fill(&self) -> File {
        let mut filler = File::create(self.path().join("filler")).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
        filler
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
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

#[test]
fn a_full_filesystem_under_a_sparse_image_costs_no_acknowledged_write() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("umount"),
    ];
    if !lab::require("a full filesystem under the image", &needs) {
        return;
    }
    let (bed, disk) = (Bed::new(), Memory::new("1M"));
    let image = disk.0.path().join("disk.img");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let mut filler = File::create(disk.0.path().join("filler")).unwrap();
    filler.write_all(&[1; 512 << 10]).unwrap();
    let spawn = || {
        Spawn::new(AOEDE)
            .inside(&bed.wire.host)
            .args(Bed::options(&["--set", "max_dirty_age=200"]))
            .args(["1", "1", "tgt0"])
            .arg(&image)
            .arg("--state-dir")
            .arg(bed.store.state())
            .arg("--run-dir")
            .arg(bed.store.run())
            .start()
            .unwrap()
    };
    let mut target = spawn();
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    let mut engine = Engine::new(bed.wire.client()).unwrap();
    let plan = Plan {
        op: Op::Write,
        block: Block::Bytes(8192),
        depth: 4,
        sectors: 1800,
        duration: Some(Duration::from_secs(20)),
        verify: Some(Initial::Zeros),
        give_up: Duration::from_secs(30),
        new_tag: true,
        ..Plan::default()
    };
    // Until it is given up.
    let degraded = std::cell::Cell::new(false);
    let report = engine
        .run_until(&plan, || {
            let said = target.output().join("\n");
            degraded.set(said.contains("does not take writes"));
            degraded.get()
        })
        .unwrap();
    println!("{report}");
    assert!(degraded.get(), "never given up: {:?}", target.output());
    // Reads go on, and what was acknowledged is there.
    engine.verify_all().unwrap();
    let refused = ask(&mut engine.client, &Frame::write(2000, &[8; 512]));
    assert_eq!(outcome(&refused), FAULT);
    // There is room again.
    fs::remove_file(disk.0.path().join("filler")).unwrap();
    drop(filler);
    target
        .wait_for_line("the disk takes writes again", Deadline::seconds(20))
        .unwrap();
    wait_until("a write that is taken", Deadline::seconds(20), || {
        engine.client.write(2000, &[9; 512]).is_ok()
    })
    .unwrap();
    // What is kept for single sectors follows.
    flush_at_last(&mut engine.client);
    engine.verify_all().unwrap();

    // The same, and it is killed before there is: a start cannot bring to the
    // image what waits, and keeps it.
    let mut filler = File::create(disk.0.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
    let hole = Plan {
        first: 4096,
        operations: Some(8),
        ..plan
    };
    let known = engine.take_model();
    engine.run(&hole).unwrap();
    target.kill().unwrap();
    engine.model_mut().unwrap().settle();
    let mut refused = spawn();
    let status = refused.wait(Deadline::seconds(20)).unwrap();
    let said = refused.output().join("\n");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("does not take what it holds"), "{said}");
    assert!(
        said.contains(&*bed.store.arena().to_string_lossy()),
        "{said}"
    );
    fs::remove_file(disk.0.path().join("filler")).unwrap();
    drop(filler);
    let mut target = spawn();
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    engine.client.connect(1, 1).unwrap();
    engine.verify_all().unwrap();
    stop(target);
    let bytes = fs::read(&image).unwrap();
    engine.model().unwrap().check_now(0, &bytes).unwrap();
    known.unwrap().check_now(0, &bytes).unwrap();
    assert!(bytes[2000 * 512..][..512] == [9; 512]);
}

#[test]
fn what_the_disk_does_not_take_concerns_its_own_sectors_alone() {
    let needs = [
        Need::Network,
        Need::Program("mount"),
        Need::Program("umount"),
    ];
    if !lab::require("sectors that cannot be written", &needs) {
        return;
    }
    // Of a sparse image on a full filesystem the holes cannot be written.
    let (bed, disk) = (Bed::new(), Memory::new("1M"));
    let image = disk.0.path().join("disk.img");
    fs::write(&image, vec![0; 256 << 10]).unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(8 << 20).unwrap();
    let mut filler = File::create(disk.0.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
    let (good, hole) = (100, 8000);
    let mut target = Spawn::new(AOEDE)
        .inside(&bed.wire.host)
        .args(Bed::options(&["--set", "max_dirty_age=200"]))
        .args(["1", "1", "tgt0"])
        .arg(&image)
        .arg("--state-dir")
        .arg(bed.store.state())
        .arg("--run-dir")
        .arg(bed.store.run())
        .start()
        .unwrap();
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    let mut client = bed.wire.client();
    client.write(hole, &[2; 512]).unwrap();
    let line = target
        .wait_for_line("write failed at LBA 8000: ", Deadline::seconds(20))
        .unwrap();
    for part in [
        "e1.1: ",
        "disk.img: ",
        "No space",
        "; 1 sector kept in the cache",
    ] {
        assert!(line.contains(part), "{line}");
    }
    // It is read, and a flush does not claim it.
    assert_eq!(client.read(hole, 1).unwrap(), [2; 512]);
    assert_eq!(outcome(&ask(&mut client, &Frame::flush())), FAULT);
    // Others are written as ever.
    client.write(good, &[1; 512]).unwrap();
    let at = good as usize * 512;
    wait_until("the write-back of others", Deadline::seconds(20), || {
        fs::read(&image).unwrap()[at..at + 512] == [1; 512]
    })
    .unwrap();
    // A write to it is tried at once, and told.
    let write = Frame::write(hole, &[3; 512]);
    assert_eq!(outcome(&ask(&mut client, &write)), FAULT);
    assert_eq!(client.read(hole, 1).unwrap(), [2; 512]);
    fs::remove_file(disk.0.path().join("filler")).unwrap();
    drop(filler);
    assert_eq!(outcome(&ask(&mut client, &write)), GOOD);
    assert_eq!(outcome(&ask(&mut client, &Frame::flush())), GOOD);
    target
        .wait_for_line("takes writes again", Deadline::seconds(20))
        .unwrap();
    stop(target);
    let bytes = fs::read(&image).unwrap();
    assert!(bytes[hole as usize * 512..][..512] == [3; 512]);
    assert!(bytes[at..at + 512] == [1; 512]);
}
