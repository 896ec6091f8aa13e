//! A disk that is slow by itself: a loop device whose writes the kernel throttles.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use initiator::frame::SECTOR;
use initiator::lab::{self, Deadline, Need, Process, Spawn};

use crate::support::{AOEDE, Store, files};
use crate::workshop::{Lab, Loop};

const BLKIO: &str = "/sys/fs/cgroup/blkio";
const MIB: usize = 1 << 20;

/// A control group whose writes to one device are slow.
struct Throttle(PathBuf);

impl Throttle {
    /// So many bytes a second.
    fn new(device: &Loop, rate: usize) -> Throttle {
        let name = device.path.file_name().unwrap().to_str().unwrap();
        let number = fs::read_to_string(format!("/sys/block/{name}/dev")).unwrap();
        let group = PathBuf::from(format!("{BLKIO}/aoede-test-{}-{name}", std::process::id()));
        fs::create_dir(&group).unwrap();
        let throttle = Throttle(group);
        let limit = format!("{} {rate}", number.trim());
        fs::write(throttle.0.join("blkio.throttle.write_bps_device"), limit).unwrap();
        throttle
    }

    fn add(&self, process: &Process) {
        fs::write(self.0.join("cgroup.procs"), process.pid().to_string()).unwrap();
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // What is still in it goes back to the root first.
        let list = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in list.lines() {
            let _ = fs::write(format!("{BLKIO}/cgroup.procs"), pid);
        }
        if let Err(e) = fs::remove_dir(&self.0) {
            eprintln!("{} is left behind: {e}", self.0.display());
        }
    }
}

#[test]
fn a_stop_on_a_slow_device_brings_everything_to_it() {
    let throttle = Need::Path("/sys/fs/cgroup/blkio/cgroup.procs");
    let needs = [&Loop::NEEDS[..], &[throttle]].concat();
    if !lab::require("a throttled device", &needs) {
        return;
    }
    const AMOUNT: usize = 28;
    for direct in [false, true] {
        let (lab, store) = (Lab::new(1, 9000), Store::new(32 * MIB as u64 / 512));
        let device = Loop::attach(&store.image(), 512).unwrap();
        let throttle = Throttle::new(&device, 4 * MIB);
        // All of it takes longer than that.
        let mut options = vec![
            "--set",
            "io_patience=3",
            "--set",
            "cache_size=64M",
            "--set",
            "idle_flush=600000",
            "--set",
            "max_dirty_age=600000",
        ];
        options.extend(direct.then_some("-d"));
        let mut target = Spawn::new(AOEDE)
            .inside(&lab.host)
            .args(options)
            .args(["1", "1", "tgt0"])
            .arg(&device.path)
            .arg("--state-dir")
            .arg(store.state())
            .arg("--run-dir")
            .arg(store.run())
            .start()
            .unwrap();
        target
            .wait_for_line(": e1.1, ", Deadline::seconds(20))
            .unwrap();
        throttle.add(&target);
        let mut client = lab.client(0);
        for n in 0..AMOUNT {
            let lba = (n * MIB / SECTOR) as u64;
            client.write_many(lba, &vec![n as u8 + 1; MIB]).unwrap();
        }
        let start = Instant::now();
        let status = target.stop(Deadline::seconds(60)).unwrap();
        let said = target.output().join("\n");
        assert!(status.success(), "direct {direct}: {said}");
        assert!(start.elapsed() > Duration::from_secs(5), "not slow at all");
        assert!(said.contains("MiB left to write to "), "{said}");
        drop(throttle);
        drop(device);
        let bytes = fs::read(store.image()).unwrap();
        for n in 0..AMOUNT {
            let piece = &bytes[n * MIB..][..MIB];
            assert!(piece.iter().all(|byte| *byte == n as u8 + 1), "MiB {n}");
        }
        assert_eq!(files(&store.arenas(), ".arena"), [] as [PathBuf; 0]);
    }
}
