//! What aoede 0.1.0 has left when it was killed: arena, record, shadow and state,
//! as it wrote them, recovered by its own rules. `fixtures/0.1.0` holds them; a
//! test makes them of its own image and of this boot.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use initiator::lab::{self, Deadline, Need};

use crate::rig::QUICK;
use crate::support::{Store, Wire, files, serve, stop};

/// Sectors 1000 to 1039, as a host wrote them.
fn data() -> Vec<u8> {
    (0..40 * 512).map(|i| (i / 3) as u8 | 1).collect()
}

fn sum(bytes: &[u8]) -> [u8; 8] {
    let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
    crc.checksum(bytes).to_le_bytes()
}

/// Makes a file of its pieces: its length, then offset and 512 bytes each.
fn unpack(from: &Path, to: &Path) {
    let packed = fs::read(from).unwrap();
    let number = |at: usize| u64::from_le_bytes(packed[at..at + 8].try_into().unwrap());
    let file = File::create(to).unwrap();
    file.set_len(number(0)).unwrap();
    for at in (8..packed.len()).step_by(520) {
        file.write_all_at(&packed[at + 8..at + 520], number(at))
            .unwrap();
    }
}

/// What is put in the place of the machine that wrote the fixtures.
struct Here {
    store: Store,
    device: u64,
    inode: u64,
    birth: u64,
    boot: [u64; 2],
}

impl Here {
    /// A new image of 4096 sectors, with the leftovers of this fixture.
    fn new(fixture: &str) -> Here {
        let store = Store::new(4096);
        let metadata = fs::metadata(store.image()).unwrap();
        let born = metadata.created().unwrap();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let boot = u128::from_str_radix(&boot.trim().replace('-', ""), 16).unwrap();
        let here = Here {
            device: metadata.dev(),
            inode: metadata.ino(),
            birth: born.duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
            boot: [(boot >> 64) as u64, boot as u64],
            store,
        };
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/fixtures/0.1.0");
        let from = from.join(fixture);
        fs::create_dir_all(here.store.state()).unwrap();
        here.arena(&from);
        here.text(&from.join("arena.toml"), "0123456789abcdef-0.arena.toml");
        if from.join("shadow.toml").exists() {
            here.shadow_file(&from);
            here.text(&from.join("shadow.toml"), "0123456789abcdef.shadow.toml");
        }
        let image = here.store.image();
        let name = sum(image.as_os_str().as_encoded_bytes());
        let name = format!("e1.1-disk.img-{:016x}.toml", u64::from_le_bytes(name));
        here.text(&from.join("state.toml"), &name);
        here
    }

    fn arena_path(&self) -> PathBuf {
        self.store.run().join("0123456789abcdef-0.arena")
    }

    fn shadow(&self) -> PathBuf {
        self.store.path().join("shadow.img")
    }

    fn arena(&self, from: &Path) {
        unpack(&from.join("arena.pieces"), &self.arena_path());
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.arena_path())
            .unwrap();
        let [high, low] = self.boot;
        let words = [high, low, self.device, self.inode, self.birth];
        for (index, word) in words.into_iter().enumerate() {
            file.write_all_at(&word.to_le_bytes(), (3 + index as u64) * 8)
                .unwrap();
        }
        let mut head = [0; 80];
        file.read_exact_at(&mut head, 0).unwrap();
        file.write_all_at(&sum(&head), 80).unwrap();
        let now = UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
        file.write_all_at(&now.to_le_bytes(), 88).unwrap();
    }

    fn shadow_file(&self, from: &Path) {
        unpack(&from.join("shadow.pieces"), &self.shadow());
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.shadow())
            .unwrap();
        for copy in [0, 4096] {
            let mut header = [0; 504];
            file.read_exact_at(&mut header, copy).unwrap();
            if !header.starts_with(b"AOEDESHD") {
                continue;
            }
            header[72..80].copy_from_slice(&self.inode.to_le_bytes());
            header[80..88].copy_from_slice(&self.birth.to_le_bytes());
            file.write_all_at(&header, copy).unwrap();
            file.write_all_at(&sum(&header), copy + 504).unwrap();
        }
    }

    fn text(&self, from: &Path, name: &str) {
        let mut text = fs::read_to_string(from).unwrap();
        let hex = |number: u64| format!("{number:016x}");
        for (place, value) in [
            ("@ARENA@", self.arena_path().display().to_string()),
            ("@SHADOW@", self.shadow().display().to_string()),
            ("@DEVICE@", hex(self.device)),
            ("@INODE@", hex(self.inode)),
            ("@BIRTH@", hex(self.birth)),
            ("@BOOT_HIGH@", hex(self.boot[0])),
            ("@BOOT_LOW@", hex(self.boot[1])),
        ] {
            text = text.replace(place, &value);
        }
        fs::write(self.store.state().join(name), text).unwrap();
    }

    #[track_caller]
    fn nothing_left(&self) {
        assert!(!self.arena_path().exists() && !self.shadow().exists());
        for end in [".arena.toml", ".shadow.toml"] {
            assert_eq!(files(&self.store.state(), end), [] as [PathBuf; 0]);
        }
    }
}

#[test]
fn a_dirty_arena_of_0_1_0_is_replayed_and_its_state_is_kept() {
    if !lab::require("leftovers of 0.1.0", &[Need::Network]) {
        return;
    }
    let (here, wire) = (Here::new("dirty"), Wire::new(1500));
    let target = serve(&wire.host, &here.store, &["tgt0"], &QUICK);
    assert!(here.store.sectors(1000, 40) == data(), "writes are lost");
    let config = wire.client().config_read().unwrap();
    assert_eq!(config.string, b"kept by 0.1.0");
    stop(target);
    here.nothing_left();
    // By its own rule: changed after the last heartbeat by someone else.
    let here = Here::new("dirty");
    let image = File::options()
        .write(true)
        .open(here.store.image())
        .unwrap();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
    image.set_modified(later).unwrap();
    let command = crate::support::command(&wire.host, &here.store, &["tgt0"], &QUICK);
    let mut refused = command.start().unwrap();
    let status = refused.wait(Deadline::seconds(20)).unwrap();
    let said = refused.output().join("\n");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("changed by someone else"), "{said}");
}

#[test]
fn a_frozen_image_of_0_1_0_goes_on_frozen_and_is_merged() {
    if !lab::require("a shadow of 0.1.0", &[Need::Network]) {
        return;
    }
    let (here, wire) = (Here::new("frozen"), Wire::new(1500));
    let command = crate::support::command(&wire.host, &here.store, &["tgt0"], &QUICK);
    let mut refused = command.start().unwrap();
    let status = refused.wait(Deadline::seconds(20)).unwrap();
    let said = refused.output().join("\n");
    // Not without its shadow.
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("shadow.img"), "{said}");
    let shadow = here.shadow().display().to_string();
    let options = [&QUICK[..], &["-f", &shadow]].concat();
    let target = serve(&wire.host, &here.store, &["tgt0"], &options);
    let image = fs::read(here.store.image()).unwrap();
    assert!(image.iter().all(|byte| *byte == 0), "the image has moved");
    assert!(wire.client().read_many(1000, 40).unwrap() == data());
    // A stop merges.
    stop(target);
    assert!(here.store.sectors(1000, 40) == data(), "writes are lost");
    here.nothing_left();
}
