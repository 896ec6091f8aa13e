//! The facts by which an image is known again: by its arena, its shadow and the
//! records of both.
//!
//! Kept as eleven words of 64 bits, in the order of this table; all zero where
//! nothing is known (written by aoede 0.1.0).
//!
//! ```text
//! word  file, and the backing file of a loop device   other block device
//!    0  kind: 1 file, 3 loop device                   kind: 2
//!    1  inode                                         CRC-64/XZ of its name, 0 for none
//!    2  birth, ns since 1970, 0 for unknown           partition number, 0 for a whole disk
//!    3  device number of the filesystem               first sector of the partition
//!    4  UUID of the filesystem, first half            CRC-64/XZ of the partition's UUID, 0 for none
//!    5  second half; both 0 for unknown               diskseq of the disk, 0 for unknown
//!    6  f_fsid                                        device number
//!    7  f_type                                        0
//!    8  loop device: first byte shown                 0
//!    9  loop device: bytes shown at most, 0 for all   0
//!   10  bytes of the image                            bytes of the image
//! ```
//!
//! An answer that is not certain is a [`Verdict::Doubt`]: nothing is replayed
//! then, and nothing discarded.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::sys::stat::{major, minor};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;

use crate::format::CRC;
use crate::sys;

/// Words that [`Facts`] take.
pub const WORDS: usize = 11;

/// What the kernel tells of an image, as far as it tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Facts {
    /// Nothing is known.
    #[default]
    Unknown,
    /// A regular file.
    File(FileFacts),
    /// A loop device.
    Loop {
        /// Its backing file.
        file: FileFacts,
        /// First byte of it that the device shows.
        offset: u64,
        /// Bytes that it shows at most, 0 for all.
        limit: u64,
        /// Bytes of the device.
        bytes: u64,
    },
    /// Another block device.
    Device(DeviceFacts),
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileFacts {
    /// Its inode.
    pub inode: u64,
    /// Its birth in nanoseconds since 1970, 0 for unknown.
    pub birth: u64,
    /// The device number of its filesystem, which holds until that is unmounted.
    pub device: u64,
    /// The UUID of its filesystem, zeros for unknown.
    pub uuid: [u64; 2],
    /// The filesystem's own number (`f_fsid`), 0 for none. Of btrfs it names the
    /// subvolume as well.
    pub fsid: u64,
    /// The kind of its filesystem (`f_type`).
    pub kind: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// What is known of a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceFacts {
    /// CRC-64/XZ of its wwid, device-mapper or md UUID, or serial; 0 for none.
    pub name: u64,
    /// The number of the partition, 0 for a whole disk.
    pub partition: u64,
    /// The first sector of the partition.
    pub first: u64,
    /// CRC-64/XZ of the partition's UUID, 0 for none.
    pub partition_uuid: u64,
    /// The kernel's count of the disk among all that appeared in this boot; 0 for
    /// unknown.
    pub diskseq: u64,
    /// Its device number.
    pub number: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// Two sets of facts, compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One image.
    Same,
    /// Two images.
    Other,
    /// They may be one; why that is not certain.
    Doubt(&'static str),
}

impl Facts {
    /// Asks the kernel about an open image. The position of `file` is moved.
    ///
    /// Fails where the file is neither a regular one nor a block device
    /// (`InvalidInput`), or cannot be asked.
    pub fn of(file: &File) -> io::Result<Facts> {
        let metadata = file.metadata()?;
        if metadata.is_file() {
            return Ok(Facts::File(FileFacts::of(file, &metadata)));
        }
        if !metadata.file_type().is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        let mut end = file;
        let bytes = end.seek(SeekFrom::End(0))?;
        let node = Node::of(metadata.rdev());
        if node.is_loop() {
            let backing = sys::loop_backing(file)?;
            return Ok(Facts::Loop {
                file: FileFacts::behind_loop(&node, &backing),
                offset: backing.offset,
                limit: backing.size_limit,
                bytes,
            });
        }
        Ok(Facts::Device(DeviceFacts {
            name: node.name().map_or(0, |name| sum(&name)),
            partition: node.number("partition").unwrap_or(0),
            first: match node.is_partition() {
                true => node.number("start").unwrap_or(0),
                false => 0,
            },
            partition_uuid: node.partition_uuid().map_or(0, |uuid| sum(&uuid)),
            diskseq: node.of_disk("diskseq").unwrap_or(0),
            number: metadata.rdev(),
            bytes,
        }))
    }

    /// The words of the table above.
    pub fn to_words(self) -> [u64; WORDS] {
        let of_file = |kind, file: FileFacts, offset, limit, bytes| {
            let FileFacts {
                inode,
                birth,
                device,
                uuid: [high, low],
                fsid,
                kind: fs,
                ..
            } = file;
            [
                kind, inode, birth, device, high, low, fsid, fs, offset, limit, bytes,
            ]
        };
        match self {
            Facts::Unknown => [0; WORDS],
            Facts::File(file) => of_file(1, file, 0, 0, file.bytes),
            Facts::Loop {
                file,
                offset,
                limit,
                bytes,
            } => of_file(3, file, offset, limit, bytes),
            Facts::Device(d) => [
                2,
                d.name,
                d.partition,
                d.first,
                d.partition_uuid,
                d.diskseq,
                d.number,
                0,
                0,
                0,
                d.bytes,
            ],
        }
    }

    /// The facts that [`to_words`](Facts::to_words) gave; `None` of words that
    /// are of no known kind.
    pub fn from_words(words: [u64; WORDS]) -> Option<Facts> {
        let [kind, a, b, c, d, e, f, g, offset, limit, bytes] = words;
        let file = |bytes| FileFacts {
            inode: a,
            birth: b,
            device: c,
            uuid: [d, e],
            fsid: f,
            kind: g,
            bytes,
        };
        match kind {
            0 => Some(Facts::Unknown),
            1 => Some(Facts::File(file(bytes))),
            // The size of the backing file is not kept: the device has its own.
            3 => Some(Facts::Loop {
                file: file(0),
                offset,
                limit,
                bytes,
            }),
            2 => Some(Facts::Device(DeviceFacts {
                name: a,
                partition: b,
                first: c,
                partition_uuid: d,
                diskseq: e,
                number: f,
                bytes,
            })),
            _ => None,
        }
    }

    /// The words in hexadecimal, with spaces between, as records keep them.
    pub fn to_text(&self) -> String {
        self.to_words().map(|word| format!("{word:x}")).join(" ")
    }

    /// The facts that [`to_text`](Facts::to_text) wrote.
    pub fn from_text(text: &str) -> Option<Facts> {
        let words: Option<Vec<u64>> = text
            .split(' ')
            .map(|word| u64::from_str_radix(word, 16).ok())
            .collect();
        Facts::from_words(<[u64; WORDS]>::try_from(words?).ok()?)
    }

    /// Whether the image that these facts were noted of is the one that has the
    /// facts `now`. `same_boot` says that they were noted in this boot, so that
    /// device numbers of then still mean something.
    ///
    /// Parts of one backing file that share no byte are two images.
    pub fn compare(&self, other: &Facts, same_boot: bool) -> Verdict {
        match (self, other) {
            (Facts::File(then), Facts::File(now)) => then.compare(now, same_boot),
            (
                Facts::Loop {
                    file: then,
                    offset,
                    limit,
                    ..
                },
                Facts::Loop {
                    file: now,
                    offset: offset_now,
                    limit: limit_now,
                    ..
                },
            ) => match then.compare(now, same_boot) {
                _ if !self.shares_bytes((0, u64::MAX), other, (0, u64::MAX)) => Verdict::Other,
                Verdict::Same if (offset, limit) != (offset_now, limit_now) => Verdict::Doubt(
                    "the loop device shows another part of the same backing file now",
                ),
                verdict => verdict,
            },
            (Facts::Loop { file, .. }, Facts::File(now)) => file.compare(now, same_boot).or_doubt(
                "it was the file behind a loop device, and is to be served without that now",
            ),
            (Facts::File(file), Facts::Loop { file: now, .. }) => file
                .compare(now, same_boot)
                .or_doubt("it was a file, and is to be served through a loop device now"),
            (Facts::Device(then), Facts::Device(now)) => then.compare(now, same_boot),
            (Facts::Unknown, _) | (_, Facts::Unknown) => {
                Verdict::Doubt("nothing is known of one of them")
            }
            _ => Verdict::Other,
        }
    }

    /// `true` if two ranges (first byte, bytes) of two images share a byte, provided
    /// that both images are one, or lie in one file.
    pub fn shares_bytes(&self, range: (u64, u64), other: &Facts, of_other: (u64, u64)) -> bool {
        let [(first, end), (other_first, other_end)] =
            [self.in_file(range), other.in_file(of_other)];
        first < other_end && other_first < end
    }

    /// A range of the image in the coordinates of its file, and of what a loop device
    /// shows at most: first byte, and the one behind the last.
    fn in_file(&self, (start, len): (u64, u64)) -> (u64, u64) {
        let (offset, limit) = match self {
            Facts::Loop { offset, limit, .. } => (*offset, *limit),
            _ => (0, 0),
        };
        let last = match limit {
            0 => u64::MAX,
            limit => offset.saturating_add(limit),
        };
        let first = offset.saturating_add(start);
        (first, first.saturating_add(len).min(last))
    }

    /// Bytes of the image, 0 for unknown.
    pub fn bytes(&self) -> u64 {
        match self {
            Facts::Unknown => 0,
            Facts::File(file) => file.bytes,
            Facts::Loop { bytes, .. } => *bytes,
            Facts::Device(device) => device.bytes,
        }
    }

    /// A number for file names: the same as long as the image is the same and
    /// the machine is up.
    pub fn key(&self) -> u64 {
        let mut digest = CRC.digest();
        let mut words = self.to_words();
        // These two may change under an image that stays.
        words[WORDS - 1] = 0;
        match self {
            Facts::Device(device) if device.name != 0 => {
                (words[5], words[6]) = (0, 0);
            }
            Facts::Device(_) | Facts::Unknown => {}
            Facts::File(_) | Facts::Loop { .. } => words[3] = 0,
        }
        for word in words {
            digest.update(&word.to_le_bytes());
        }
        digest.finalize()
    }
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Facts::Unknown => f.write_str("an image of which nothing is known"),
            Facts::File(file) => write!(f, "a file of {} bytes, {file}", file.bytes),
            Facts::Loop {
                file,
                offset,
                limit,
                bytes,
            } => {
                write!(
                    f,
                    "a loop device of {bytes} bytes over the file with {file}"
                )?;
                if (*offset, *limit) != (0, 0) {
                    write!(f, ", offset {offset}, size limit {limit}")?;
                }
                Ok(())
            }
            Facts::Device(device) => write!(f, "{device}"),
        }
    }
}

impl fmt::Display for FileFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {}", self.inode)?;
        if self.birth != 0 {
            let (seconds, rest) = (self.birth / 1_000_000_000, self.birth % 1_000_000_000);
            write!(f, ", born {seconds}.{rest:09}")?;
        }
        let (major, minor) = (major(self.device), minor(self.device));
        write!(f, ", on filesystem {major}:{minor}")?;
        if self.uuid != [0; 2] {
            write!(f, " ({:016x}{:016x})", self.uuid[0], self.uuid[1])?;
        }
        Ok(())
    }
}

impl fmt::Display for DeviceFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (major(self.number), minor(self.number));
        write!(f, "block device {major}:{minor} of {} bytes", self.bytes)?;
        if self.partition != 0 {
            write!(f, ", partition {}", self.partition)?;
        }
        match self.name {
            0 => f.write_str(", without a serial")?,
            name => write!(f, ", sum of its serial {name:016x}")?,
        }
        if self.diskseq != 0 {
            write!(f, ", diskseq {}", self.diskseq)?;
        }
        Ok(())
    }
}

impl Verdict {
    /// A doubt where it would be one image.
    fn or_doubt(self, why: &'static str) -> Verdict {
        match self {
            Verdict::Same => Verdict::Doubt(why),
            verdict => verdict,
        }
    }
}

impl FileFacts {
    fn of(file: &File, metadata: &Metadata) -> FileFacts {
        let uuid = sys::filesystem_uuid(file).map(|bytes| {
            let number = u128::from_be_bytes(bytes);
            [(number >> 64) as u64, number as u64]
        });
        FileFacts {
            inode: metadata.ino(),
            birth: birth(metadata),
            device: metadata.dev(),
            uuid: uuid.unwrap_or_default(),
            fsid: fstatvfs(file).map_or(0, |answer| answer.filesystem_id()),
            kind: fstatfs(file).map_or(0, |answer| answer.filesystem_type().0 as u64),
            bytes: metadata.len(),
        }
    }

    /// The backing file of a loop device: all facts if its path still leads to
    /// it, else what the device tells.
    fn behind_loop(node: &Node, backing: &sys::LoopBacking) -> FileFacts {
        let found = || {
            let path = node.text_of_disk("loop/backing_file")?;
            let (file, metadata) = open_if(Path::new(&path), backing.device, backing.inode)?;
            let facts = FileFacts::of(&file, &metadata);
            Some(FileFacts { bytes: 0, ..facts })
        };
        found().unwrap_or(FileFacts {
            inode: backing.inode,
            device: backing.device,
            ..FileFacts::default()
        })
    }

    fn compare(&self, now: &FileFacts, same_boot: bool) -> Verdict {
        let differ = |a: u64, b: u64| a != 0 && b != 0 && a != b;
        if self.inode != now.inode || differ(self.birth, now.birth) {
            return Verdict::Other;
        }
        let is_btrfs = self.kind == BTRFS_SUPER_MAGIC.0 as u64 && self.kind == now.kind;
        if is_btrfs && differ(self.fsid, now.fsid) {
            // A snapshot shares inode, times and UUID; only the subvolume differs.
            return Verdict::Other;
        }
        let same_device = same_boot && self.device == now.device;
        if self.birth == 0 || now.birth == 0 {
            // The inode may have been used again.
            return match same_device {
                true => Verdict::Same,
                false => Verdict::Doubt("its filesystem keeps no birth times"),
            };
        }
        let known = self.uuid != [0; 2] && now.uuid != [0; 2];
        if known && self.uuid != now.uuid {
            return Verdict::Other;
        }
        if same_device {
            return Verdict::Same;
        }
        if same_boot && is_mounted(self.device) {
            return Verdict::Doubt(
                "the filesystem that it was on is still mounted, so this one may be a copy",
            );
        }
        if known || (self.fsid != 0 && (self.fsid, self.kind) == (now.fsid, now.kind)) {
            Verdict::Same
        } else {
            Verdict::Doubt("its filesystem has no UUID that the kernel tells")
        }
    }
}

impl DeviceFacts {
    fn compare(&self, now: &DeviceFacts, same_boot: bool) -> Verdict {
        let part = |d: &DeviceFacts| (d.partition, d.first);
        let uuids = [self.partition_uuid, now.partition_uuid];
        if part(self) != part(now) || (!uuids.contains(&0) && uuids[0] != uuids[1]) {
            return Verdict::Other;
        }
        if self.name != 0 || now.name != 0 {
            return match self.name == now.name {
                true => Verdict::Same,
                false => Verdict::Other,
            };
        }
        if !same_boot || self.diskseq == 0 || now.diskseq == 0 {
            return Verdict::Doubt("it has no serial by which it could be known again");
        }
        if self.diskseq == now.diskseq {
            Verdict::Same
        } else if self.bytes != now.bytes || is_present(self.diskseq) {
            Verdict::Other
        } else {
            Verdict::Doubt("it has no serial, and is not the disk that was plugged in then")
        }
    }
}

/// Whether a filesystem of this device number is mounted where we are.
fn is_mounted(device: u64) -> bool {
    let wanted = format!("{}:{}", major(device), minor(device));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts
        .lines()
        .any(|line| line.split_whitespace().nth(2) == Some(&wanted))
}

/// Opens a file or block device if its path leads to this inode. Nothing else is
/// opened: that of a FIFO would not return.
fn open_if(path: &Path, device: u64, inode: u64) -> Option<(File, Metadata)> {
    let is_it = |found: &Metadata| {
        let kind = found.file_type();
        let is_storage = kind.is_file() || kind.is_block_device();
        is_storage && (found.dev(), found.ino()) == (device, inode)
    };
    std::fs::metadata(path).ok().filter(is_it)?;
    let file = File::open(path).ok()?;
    let metadata = file.metadata().ok().filter(is_it)?;
    Some((file, metadata))
}

/// Whether the disk with this diskseq is still there.
fn is_present(diskseq: u64) -> bool {
    let disks = std::fs::read_dir("/sys/block").into_iter().flatten();
    disks.flatten().any(|disk| {
        let text = std::fs::read_to_string(disk.path().join("diskseq"));
        text.is_ok_and(|text| text.trim().parse() == Ok(diskseq))
    })
}

pub(super) fn birth(metadata: &Metadata) -> u64 {
    let born = metadata.created().ok();
    let since = born.and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |t| u64::try_from(t.as_nanos()).unwrap_or(0))
}

fn sum(text: &str) -> u64 {
    CRC.checksum(text.as_bytes())
}

/// A block device in sysfs.
struct Node(PathBuf);

impl Node {
    fn of(device: u64) -> Node {
        Node(PathBuf::from(format!(
            "/sys/dev/block/{}:{}",
            major(device),
            minor(device)
        )))
    }

    fn text(&self, name: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.0.join(name)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// What the node says, or that of the disk which the partition lies on.
    fn text_of_disk(&self, name: &str) -> Option<String> {
        self.text(name).or_else(|| self.text(&format!("../{name}")))
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    fn of_disk(&self, name: &str) -> Option<u64> {
        self.text_of_disk(name)?.parse().ok()
    }

    fn is_partition(&self) -> bool {
        self.0.join("partition").exists()
    }

    /// Whether it is a loop device, whole: a partition of one is told by its
    /// own start, which the device does not know.
    fn is_loop(&self) -> bool {
        self.0.join("loop").is_dir()
    }

    fn partition_uuid(&self) -> Option<String> {
        let text = self.text("uevent")?;
        let uuid = text.lines().find_map(|line| line.strip_prefix("PARTUUID="));
        uuid.map(str::to_owned)
    }

    /// NVMe, SCSI, device mapper, RAID, virtio: what a device is called wherever
    /// it is plugged in. Of a partition on a loop device the file behind that.
    fn name(&self) -> Option<String> {
        let names = ["wwid", "device/wwid", "dm/uuid", "md/uuid", "serial"];
        let own = names.iter().find_map(|name| self.text(name));
        let disk = || {
            names
                .iter()
                .find_map(|name| self.text(&format!("../{name}")))
        };
        own.or_else(disk).or_else(|| {
            let path = self.text("../loop/backing_file")?;
            let metadata = std::fs::metadata(Path::new(&path)).ok()?;
            let (inode, birth) = (metadata.ino(), birth(&metadata));
            Some(format!("loop {inode} {birth}"))
        })
    }
}

#[cfg(test)]
mod tests;
