use super::*;
use proptest::prelude::*;

const FILE: FileFacts = FileFacts {
    inode: 12,
    birth: 1_700_000_000_123_456_789,
    device: 0xFFFF_FF00,
    uuid: [1, 2],
    fsid: 3,
    kind: 0xEF53,
    bytes: 4096,
};
const DISK: DeviceFacts = DeviceFacts {
    name: 0,
    partition: 1,
    first: 2048,
    partition_uuid: 9,
    diskseq: u64::MAX,
    number: 0x0810,
    bytes: 1 << 30,
};

fn over(file: FileFacts) -> Facts {
    Facts::Loop {
        file: FileFacts { bytes: 0, ..file },
        offset: 512,
        limit: 0,
        bytes: 1 << 20,
    }
}

fn same_boot(then: Facts, now: Facts) -> Verdict {
    then.compare(&now, true)
}

fn is_doubt(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::Doubt(_))
}

#[test]
fn words_and_facts_are_one() {
    for facts in [
        Facts::Unknown,
        Facts::File(FILE),
        over(FILE),
        Facts::Device(DISK),
    ] {
        assert_eq!(Facts::from_words(facts.to_words()), Some(facts));
        assert_eq!(Facts::from_text(&facts.to_text()), Some(facts));
    }
    assert_eq!(Facts::from_words([4; WORDS]), None);
    let long = format!("{} 1", Facts::File(FILE).to_text());
    for bad in ["", "1 2", "x", &long] {
        assert_eq!(Facts::from_text(bad), None, "{bad:?}");
    }
}

#[test]
fn a_file_is_known_by_inode_birth_and_filesystem() {
    let file = Facts::File;
    let grown = FileFacts {
        bytes: 8192,
        ..FILE
    };
    assert_eq!(same_boot(file(FILE), file(grown)), Verdict::Same);
    // Remounted under another number.
    let remounted = FileFacts {
        device: 0xFFFF_FF01,
        ..FILE
    };
    assert_eq!(same_boot(file(FILE), file(remounted)), Verdict::Same);
    for other in [
        FileFacts { inode: 13, ..FILE },
        FileFacts { birth: 7, ..FILE },
        FileFacts {
            uuid: [1, 3],
            device: 5,
            ..FILE
        },
    ] {
        assert_eq!(same_boot(file(FILE), file(other)), Verdict::Other);
    }
    // Without a UUID, f_fsid speaks for it, if it is not the device number.
    let plain = FileFacts {
        uuid: [0; 2],
        ..FILE
    };
    let moved = FileFacts {
        device: 0xFFFF_FF01,
        ..plain
    };
    assert_eq!(same_boot(file(plain), file(moved)), Verdict::Same);
    let doubtful = FileFacts { fsid: 4, ..moved };
    assert!(is_doubt(same_boot(file(plain), file(doubtful))));
    // Without a birth time the inode may have been used again.
    let unborn = FileFacts { birth: 0, ..FILE };
    assert_eq!(same_boot(file(unborn), file(unborn)), Verdict::Same);
    assert!(is_doubt(file(unborn).compare(&file(unborn), false)));
}

#[test]
fn a_copy_of_a_mounted_filesystem_is_a_doubt() {
    let root = std::fs::metadata("/proc/self").unwrap().dev();
    let mounted = FileFacts {
        device: root,
        ..FILE
    };
    let copy = FileFacts {
        device: 0xFFFF_FF01,
        ..FILE
    };
    assert!(is_doubt(same_boot(Facts::File(mounted), Facts::File(copy))));
    assert_eq!(
        Facts::File(mounted).compare(&Facts::File(copy), false),
        Verdict::Same
    );
}

#[test]
fn a_snapshot_of_btrfs_is_another_image() {
    let kind = BTRFS_SUPER_MAGIC.0 as u64;
    let then = FileFacts { kind, ..FILE };
    let snapshot = FileFacts { fsid: 4, ..then };
    assert_eq!(
        same_boot(Facts::File(then), Facts::File(snapshot)),
        Verdict::Other
    );
}

#[test]
fn a_loop_device_is_its_backing_file() {
    assert_eq!(same_boot(over(FILE), over(FILE)), Verdict::Same);
    let other = FileFacts { inode: 13, ..FILE };
    assert_eq!(same_boot(over(FILE), over(other)), Verdict::Other);
    let Facts::Loop {
        file, limit, bytes, ..
    } = over(FILE)
    else {
        unreachable!()
    };
    let part = Facts::Loop {
        file,
        offset: 1024,
        limit,
        bytes,
    };
    assert!(is_doubt(same_boot(over(FILE), part)));
    // Parts that share no byte are two images, in this boot and after it.
    let of = |offset, limit| Facts::Loop {
        file,
        offset,
        limit,
        bytes,
    };
    let mib = 1 << 20;
    for same in [true, false] {
        let compare = |a: Facts, b: Facts| a.compare(&b, same);
        assert_eq!(compare(of(mib, mib), of(mib, mib)), Verdict::Same);
        assert_eq!(compare(of(mib, mib), of(2 * mib, mib)), Verdict::Other);
        assert_eq!(compare(of(2 * mib, 0), of(mib, mib)), Verdict::Other);
        assert!(is_doubt(compare(of(mib, mib + 512), of(2 * mib, mib))));
        assert!(is_doubt(compare(of(mib, 0), of(2 * mib, mib))));
    }
    // Of the exported ranges as well, in the coordinates of the file.
    let all = (0, u64::MAX);
    assert!(of(mib, mib).shares_bytes(all, &Facts::File(FILE), all));
    assert!(!of(mib, mib).shares_bytes(all, &Facts::File(FILE), (0, mib)));
    assert!(Facts::File(FILE).shares_bytes((0, mib + 1), &of(mib, mib), all));
    assert!(!Facts::File(FILE).shares_bytes((2 * mib, mib), &of(mib, mib), all));
    assert!(!of(0, 0).shares_bytes((0, 512), &of(512, 0), (0, 512)));
    assert!(of(0, 0).shares_bytes((512, 512), &of(512, 0), (0, 512)));
    assert!(is_doubt(same_boot(over(FILE), Facts::File(FILE))));
    assert!(is_doubt(same_boot(Facts::File(FILE), over(FILE))));
    assert_eq!(same_boot(over(FILE), Facts::Device(DISK)), Verdict::Other);
}

#[test]
fn a_disk_is_known_by_its_serial_or_by_its_diskseq() {
    let disk = Facts::Device;
    let named = DeviceFacts { name: 5, ..DISK };
    let renumbered = DeviceFacts {
        number: 1,
        diskseq: 1,
        ..named
    };
    assert_eq!(disk(named).compare(&disk(renumbered), false), Verdict::Same);
    assert_eq!(same_boot(disk(named), disk(renumbered)), Verdict::Same);
    let others = [
        DeviceFacts { name: 6, ..named },
        DeviceFacts { name: 0, ..named },
        DeviceFacts {
            first: 4096,
            ..named
        },
        DeviceFacts {
            partition_uuid: 8,
            ..named
        },
    ];
    for other in others {
        assert_eq!(same_boot(disk(named), disk(other)), Verdict::Other);
    }
    assert_eq!(same_boot(disk(DISK), disk(DISK)), Verdict::Same);
    let next = DeviceFacts { diskseq: 1, ..DISK };
    assert!(is_doubt(same_boot(disk(DISK), disk(next))));
    assert!(is_doubt(disk(DISK).compare(&disk(DISK), false)));
    let larger = DeviceFacts { bytes: 1, ..next };
    assert_eq!(same_boot(disk(DISK), disk(larger)), Verdict::Other);
}

#[test]
fn a_disk_without_a_serial_that_is_still_there_is_not_this_one() {
    let present = std::fs::read_dir("/sys/block").into_iter().flatten();
    let present = present.flatten().find_map(|disk| {
        let text = std::fs::read_to_string(disk.path().join("diskseq")).ok()?;
        text.trim().parse().ok()
    });
    // A machine without disks has nothing to tell.
    let Some(diskseq) = present else { return };
    let then = DeviceFacts { diskseq, ..DISK };
    assert_eq!(
        same_boot(Facts::Device(then), Facts::Device(DISK)),
        Verdict::Other
    );
}

proptest! {
    #[test]
    fn any_words_are_facts_or_none(mut words: [u64; WORDS]) {
        words[0] %= 5;
        if let Some(facts) = Facts::from_words(words) {
            prop_assert_eq!(Facts::from_words(facts.to_words()), Some(facts));
        }
    }
}

#[test]
fn a_fifo_at_the_path_of_a_backing_file_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (file, fifo) = (dir.path().join("file"), dir.path().join("fifo"));
    std::fs::write(&file, "x").unwrap();
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let id = |path: &Path| {
        let found = std::fs::metadata(path).unwrap();
        (found.dev(), found.ino())
    };
    let ((device, inode), other) = (id(&file), id(&fifo).1);
    assert!(open_if(&file, device, inode).is_some());
    assert!(open_if(&file, device, inode + 1).is_none());
    let (tell, told) = std::sync::mpsc::channel();
    // Not waited for: where it is opened, that does not return.
    std::thread::spawn(move || {
        for inode in [inode, other] {
            let _ = tell.send(open_if(&fifo, device, inode).is_none());
        }
    });
    for _ in 0..2 {
        let is_none = told.recv_timeout(std::time::Duration::from_secs(10));
        assert_eq!(is_none, Ok(true));
    }
}
