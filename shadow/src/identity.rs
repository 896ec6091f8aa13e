//! Which image an arena, a shadow or a record belongs to.

mod facts;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::sys::stat::{major, minor};

use crate::format::CRC;

pub use facts::{DeviceFacts, Facts, FileFacts, Verdict, WORDS};

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A block device.
    Device,
}

/// What is known of an image wherever and whenever it is opened again.
///
/// There is no device number in it: those change from one boot to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// A file or a device.
    pub kind: Kind,
    /// Of a file: its inode. Of a device: CRC-64/XZ of the name the kernel has
    /// for it (wwid, uuid or serial, with the number of a partition), 0 for
    /// none.
    pub a: u64,
    /// Of a file: its birth in nanoseconds since 1970, or 0 where the filesystem
    /// does not keep it. Of a device: 0.
    pub b: u64,
    /// Bytes of the whole image, not of the window that is exported.
    pub bytes: u64,
    /// All that the kernel tells; nothing in shadows of aoede 0.1.0, for which
    /// `kind`, `a` and `b` decide.
    pub facts: Facts,
    /// The boot in which this was asked, zeros for unknown: some of the facts hold
    /// only until the next one.
    pub boot: [u64; 2],
}

/// What tells two images apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// One is a file and the other a device.
    Kind,
    /// They are two files, or two devices.
    Other,
    /// They are one, and its size has changed; the sizes in bytes, before and
    /// now.
    Size(u64, u64),
    /// They may be one.
    Doubt {
        /// Why that is not certain.
        why: &'static str,
        /// The image of before.
        then: Facts,
        /// The one that is there.
        now: Facts,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::Kind => f.write_str("one is a file and the other a block device"),
            Difference::Other => f.write_str("it is of another image"),
            Difference::Size(then, now) => {
                write!(f, "the image had {then} bytes and has {now} now")
            }
            Difference::Doubt { why, then, now } => write!(
                f,
                "it is not certain that it is of this image: {why}; it is of {then}; this is {now}"
            ),
        }
    }
}

impl Identity {
    /// Asks the kernel. The file's own position is moved; whoever reads and
    /// writes at places does not notice.
    ///
    /// Fails where the file is neither a regular one nor a block device
    /// (`InvalidInput`), or cannot be asked.
    pub fn of(file: &File) -> io::Result<Identity> {
        let metadata = file.metadata()?;
        if metadata.is_file() {
            return Ok(Identity {
                kind: Kind::File,
                a: metadata.ino(),
                b: facts::birth(&metadata),
                bytes: metadata.len(),
                facts: Facts::of(file)?,
                boot: boot_id(),
            });
        }
        if !metadata.file_type().is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        let facts = Facts::of(file)?;
        Ok(Identity {
            kind: Kind::Device,
            a: device_name(metadata.rdev()),
            b: 0,
            bytes: facts.bytes(),
            facts,
            boot: boot_id(),
        })
    }

    /// Whether this is the image that is there `now`, of whatever size.
    pub fn is_same_image(&self, now: &Identity) -> bool {
        matches!(self.difference(now), None | Some(Difference::Size(..)))
    }

    /// What tells the image of a shadow (`self`) from the one that is there
    /// `now`; `None` if they are the same.
    ///
    /// Shadows and records of aoede 0.1.0 know only `kind`, `a` and `b`, which decide
    /// then.
    pub fn difference(&self, now: &Identity) -> Option<Difference> {
        // A shadow outlives the boot in which it was made.
        let same_boot = self.boot != [0; 2] && self.boot == now.boot;
        match self.facts.compare(&now.facts, same_boot) {
            Verdict::Same => {}
            Verdict::Other => return Some(Difference::Other),
            Verdict::Doubt(why) if self.facts != Facts::Unknown => {
                let (then, now) = (self.facts, now.facts);
                return Some(Difference::Doubt { why, then, now });
            }
            Verdict::Doubt(_) if self.kind != now.kind => return Some(Difference::Kind),
            Verdict::Doubt(_) if (self.a, self.b) != (now.a, now.b) => {
                return Some(Difference::Other);
            }
            Verdict::Doubt(_) => {}
        }
        self.size_difference(now)
    }

    /// The difference in size alone.
    pub fn size_difference(&self, now: &Identity) -> Option<Difference> {
        (self.bytes != now.bytes).then_some(Difference::Size(self.bytes, now.bytes))
    }
}

/// The boot we are in; zeros where /proc does not tell.
pub fn boot_id() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |range| u64::from_str_radix(digits.get(range).unwrap_or("0"), 16).unwrap_or(0);
    [half(0..16), half(16..32)]
}

/// A number made of what sysfs calls a device by, whatever number it has in
/// this boot.
fn device_name(device: u64) -> u64 {
    let node = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let text = |name: &str| {
        let text = std::fs::read_to_string(format!("{node}/{name}")).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    // NVMe, SCSI, device mapper, RAID, virtio; and the same of the disk that
    // a partition lies on.
    let names = ["wwid", "device/wwid", "dm/uuid", "md/uuid", "serial"];
    let own = names.iter().find_map(|name| text(name));
    let name = own.or_else(|| names.iter().find_map(|name| text(&format!("../{name}"))));
    // Without a name of its own: where it is plugged in, and what file is behind
    // a loop device. Two disks must never be one because neither has a name.
    let place = || {
        let link = std::fs::read_link(&node).ok()?.display().to_string();
        let file = text("loop/backing_file").or_else(|| text("../loop/backing_file"));
        Some(link + "\0" + &file.unwrap_or_default())
    };
    let Some(name) = name.or_else(place) else {
        return 0;
    };
    let partition = text("partition").unwrap_or_default();
    let mut digest = CRC.digest();
    digest.update(name.as_bytes());
    digest.update(&[0]);
    digest.update(partition.as_bytes());
    digest.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_its_identity_and_another_has_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let make = |name: &str, len| {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_len(len).unwrap();
            file
        };
        let first = Identity::of(&make("a", 1000)).unwrap();
        assert_eq!((first.kind, first.bytes), (Kind::File, 1000));
        let again = Identity::of(&File::open(&path).unwrap()).unwrap();
        assert_eq!(first.difference(&again), None);
        let other = Identity::of(&make("b", 1000)).unwrap();
        assert_eq!(first.difference(&other), Some(Difference::Other));
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(1024)
            .unwrap();
        let grown = Identity::of(&File::open(&path).unwrap()).unwrap();
        assert_eq!(first.difference(&grown), Some(Difference::Size(1000, 1024)));
        assert!(Identity::of(&File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn a_doubt_is_told_with_both_sides_and_0_1_0_has_a_rule_of_its_own() {
        let disk = |diskseq, boot| Identity {
            kind: Kind::Device,
            a: 5,
            b: 0,
            bytes: 4096,
            facts: Facts::Device(DeviceFacts {
                diskseq,
                bytes: 4096,
                ..DeviceFacts::default()
            }),
            boot,
        };
        let then = disk(u64::MAX, [1, 2]);
        assert_eq!(then.difference(&disk(u64::MAX, [1, 2])), None);
        // Plugged in again, another boot, a boot that nobody noted.
        for (then, now) in [
            (then, disk(u64::MAX - 1, [1, 2])),
            (then, disk(u64::MAX, [1, 3])),
            (disk(7, [0; 2]), disk(7, [0; 2])),
        ] {
            let sides = match then.difference(&now) {
                Some(Difference::Doubt { then, now, .. }) => Some((then, now)),
                _ => None,
            };
            assert_eq!(sides, Some((then.facts, now.facts)));
            assert!(!then.is_same_image(&now));
        }
        let said = then.difference(&disk(3, [1, 2])).unwrap().to_string();
        assert!(said.contains("diskseq 18446744073709551615"), "{said}");
        assert!(said.contains("diskseq 3"), "{said}");
        let v1 = Identity {
            facts: Facts::Unknown,
            boot: [0; 2],
            ..then
        };
        assert_eq!(v1.difference(&then), None);
        let renamed = Identity { a: 6, ..v1 };
        assert_eq!(renamed.difference(&then), Some(Difference::Other));
    }

    #[test]
    fn disks_without_a_name_are_not_one() {
        let devices = std::fs::read_dir("/sys/dev/block").into_iter().flatten();
        let mut seen = std::collections::HashMap::new();
        for device in devices.flatten() {
            let name = device.file_name().into_string().unwrap();
            let (major, minor) = name.split_once(':').unwrap();
            let number = nix::libc::makedev(major.parse().unwrap(), minor.parse().unwrap());
            let other = seen.insert(device_name(number), name.clone());
            assert_eq!(other, None, "{name} has the identity of another");
        }
    }
}
