//! Block devices under a freeze: past the page cache, with large sectors, and
//! with a window that begins within a chunk.

use std::os::unix::fs::FileExt;
use std::path::Path;

use initiator::lab::{self, Deadline, Process, Spawn};

use super::{Bed, data, order, until};
use crate::support::{AOEDE, stop};
use crate::workshop::{Loop, attach, detach};

/// Serves a device with these options.
fn serve(bed: &Bed, device: &Loop, options: &[&str]) -> Process {
    let mut target = Spawn::new(AOEDE)
        .inside(&bed.wire.host)
        .args(["--set", "address_probe=10", "1", "1", "tgt0"])
        .arg(&device.path)
        .arg("-f")
        .arg(bed.shadow())
        .arg("--state-dir")
        .arg(bed.store.state())
        .arg("--run-dir")
        .arg(bed.store.run())
        .args(options.iter().copied())
        .start()
        .unwrap();
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    target
}

#[test]
fn a_device_is_frozen_and_thawed_whatever_its_blocks_are() {
    if !lab::require("freezes of block devices", &Loop::NEEDS) {
        return;
    }
    let cases: [(usize, &[&str], usize); 4] = [
        (512, &["-d", "-o", "3"], 3),
        (4096, &["-d"], 0),
        (4096, &["-d", "-s", "-o", "8", "-l", "2000"], 8),
        (4096, &["-o", "1", "-l", "1999"], 1),
    ];
    for (sector, options, offset) in cases {
        println!("sectors of {sector}, {options:?}");
        let bed = Bed::new();
        let device = Loop::attach(&bed.store.image(), sector).unwrap();
        let raw = std::fs::File::open(&device.path).unwrap();
        let on_device = |lba: usize, sectors: usize| {
            let mut bytes = vec![0; sectors * 512];
            raw.read_exact_at(&mut bytes, ((offset + lba) * 512) as u64)
                .unwrap();
            bytes
        };
        let mut target = serve(&bed, &device, options);
        let mut client = bed.client();
        client.write_many(0, &data(1, 100)).unwrap();
        bed.freeze(&target);
        assert!(on_device(0, 100) == data(1, 100), "not whole");
        client.write_many(3, &data(2, 1)).unwrap();
        client.write_many(50, &data(3, 100)).unwrap();
        client.write_many(1990, &data(4, 9)).unwrap();
        // Killed with all of it in the cache, and in the shadow.
        target.kill().unwrap();
        target = serve(&bed, &device, options);
        let mut client = bed.client();
        client.flush().unwrap();
        let seen = client.read_many(0, 1999).unwrap();
        assert!(seen[..3 * 512] == data(1, 100)[..3 * 512]);
        assert!(seen[3 * 512..4 * 512] == data(2, 1));
        assert!(seen[50 * 512..150 * 512] == data(3, 100));
        assert!(seen[1990 * 512..] == data(4, 9));
        assert!(on_device(0, 100) == data(1, 100), "it moves while frozen");
        order(&target, 2);
        until("the shadow vanishes", || bed.shadows().is_empty());
        assert!(client.read_many(0, 1999).unwrap() == seen);
        stop(target);
        assert!(on_device(0, 1999) == seen, "not merged");
        let before = std::fs::read(bed.store.image()).unwrap();
        assert!(before[..offset * 512].iter().all(|b| *b == 0));
        bed.nothing_left();
    }
}

#[test]
fn a_frozen_device_is_not_served_without_its_shadow_under_another_number() {
    if !lab::require("a frozen device under another number", &Loop::NEEDS) {
        return;
    }
    let bed = Bed::new();
    let start = |device: &Path, shadow: bool| {
        let with = ["-f".to_owned(), bed.shadow().display().to_string()];
        Spawn::new(AOEDE)
            .inside(&bed.wire.host)
            .args(["--set", "address_probe=10", "1", "1", "tgt0"])
            .arg(device)
            .args(with.into_iter().filter(|_| shadow))
            .arg("--state-dir")
            .arg(bed.store.state())
            .arg("--run-dir")
            .arg(bed.store.run())
            .start()
            .unwrap()
    };
    let device = attach(&bed.store.image(), None);
    let mut target = start(&device, true);
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    bed.freeze(&target);
    bed.client().write_many(3, &data(2, 10)).unwrap();
    target.kill().unwrap();
    detach(&device);
    // Its number is taken by another disk, and it comes back under the next.
    let second = bed.store.path().join("second.img");
    std::fs::write(&second, vec![7; 4096 * 512]).unwrap();
    attach(&second, Some(&device));
    let other = attach(&bed.store.image(), None);
    assert_ne!(device, other);
    let mut refused = start(&other, false);
    let status = refused.wait(Deadline::seconds(20)).unwrap();
    let said = refused.output().join("\n");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("is frozen") && said.contains("-f"), "{said}");
    // The other disk was never frozen.
    let mut target = start(&device, false);
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    stop(target);
    let mut target = start(&other, true);
    target
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    assert!(bed.client().read_many(3, 10).unwrap() == data(2, 10));
    stop(target);
    detach(&other);
    detach(&device);
    assert!(bed.store.sectors(3, 10) == data(2, 10), "not merged");
    bed.nothing_left();
}
