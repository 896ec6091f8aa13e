//! Who else uses a block device or a file, as /proc and /sys tell it.
//!
//! A device that is written by two, or changes under a filesystem that is
//! mounted, is destroyed. Opening it exclusively keeps most of that away; what
//! it does not know, and who it is, is found here.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use shadow::{LoopBacking, loop_backing};

/// A user of a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A filesystem on it; where it is mounted.
    Mount(String),
    /// Swap.
    Swap,
    /// A device that is made of it (device mapper, RAID).
    Holder(String),
    /// A loop device on it.
    Loop(String),
    /// Another loop device on the same bytes of the same file.
    Twin(String),
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            User::Mount(place) => write!(f, "is mounted on {place}"),
            User::Swap => f.write_str("is used for swap"),
            User::Holder(name) => write!(f, "is part of {name}"),
            User::Loop(name) => write!(f, "is attached to {name}"),
            User::Twin(name) => write!(f, "shows a file that is attached to {name} as well"),
        }
    }
}

/// Returns the first user that is found of the device with this number, of its
/// partitions, or of the disk that it is a partition of.
pub(super) fn user_of(device: u64) -> Option<User> {
    user_below(Path::new("/"), device)
}

/// The same with /proc and /sys below `root`.
fn user_below(root: &Path, device: u64) -> Option<User> {
    let sys = root.join("sys");
    let number = format!("{}:{}", libc::major(device), libc::minor(device));
    let node = fs::canonicalize(sys.join("dev/block").join(&number)).ok();
    let nodes = node.as_deref().map(family).unwrap_or_default();
    let numbers = nodes.iter().map(|node| text(&node.join("dev")));
    let numbers: Vec<String> = numbers.chain([number]).collect();
    mount(root, &numbers)
        .or_else(|| swap(root, &numbers))
        .or_else(|| {
            let mut holders = nodes.iter().flat_map(|node| names(&node.join("holders")));
            holders.next().map(User::Holder)
        })
        .or_else(|| {
            let mut loops = loops(&sys).into_iter();
            let on_it = loops.find(|(_, on)| numbers.contains(&numbered(on.rdevice)));
            on_it.map(|(name, _)| User::Loop(format!("/dev/{name}")))
        })
        .or_else(|| twin(&sys, &nodes))
}

/// Returns the loop devices on a file.
pub(super) fn loops_on(file: &File) -> Vec<String> {
    let Ok(metadata) = file.metadata() else {
        return Vec::new();
    };
    let same = |on: &LoopBacking| (on.device, on.inode) == (metadata.dev(), metadata.ino());
    let loops = loops(Path::new("/sys")).into_iter();
    let loops = loops.filter(|(_, on)| same(on));
    loops.map(|(name, _)| format!("/dev/{name}")).collect()
}

/// A device, its partitions, and the disk that it is a partition of, in sysfs.
fn family(node: &Path) -> Vec<PathBuf> {
    let is_partition = |node: &Path| node.join("partition").exists();
    let parts = names(node).into_iter().map(|name| node.join(name));
    let mut nodes = vec![node.to_owned()];
    nodes.extend(parts.filter(|part| is_partition(part)));
    nodes.extend(
        node.parent()
            .filter(|_| is_partition(node))
            .map(Path::to_owned),
    );
    nodes
}

fn mount(root: &Path, numbers: &[String]) -> Option<User> {
    let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
    mounts.lines().find_map(|line| {
        // 36 35 98:0 /root /mount options - type /dev/name options: proc(5)
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut words = mount.split(' ').skip(2);
        let (number, place) = (words.next()?, words.nth(1)?);
        // Some filesystems have a number of their own there.
        let source = filesystem.split(' ').nth(1)?;
        let is_it = numbers.iter().any(|n| n == number) || numbers.contains(&number_of(source)?);
        is_it.then(|| User::Mount(place.to_owned()))
    })
}

fn swap(root: &Path, numbers: &[String]) -> Option<User> {
    let swaps = fs::read_to_string(root.join("proc/swaps")).ok()?;
    let mut paths = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split(' ').next());
    let is_it = |path: &str| number_of(path).is_some_and(|n| numbers.contains(&n));
    paths.any(is_it).then_some(User::Swap)
}

/// Another loop device on the same bytes as one of these.
fn twin(sys: &Path, nodes: &[PathBuf]) -> Option<User> {
    let end = |on: &LoopBacking| match on.size_limit {
        0 => u64::MAX,
        limit => on.offset.saturating_add(limit),
    };
    let loops = loops(sys);
    let is_ours = |name: &str| {
        nodes
            .iter()
            .any(|node| node.file_name() == Some(name.as_ref()))
    };
    let (ours, others): (Vec<_>, Vec<_>) = loops.into_iter().partition(|(name, _)| is_ours(name));
    let (_, ours) = ours.first()?;
    let same = |on: &LoopBacking| {
        (on.device, on.inode) == (ours.device, ours.inode)
            && on.offset < end(ours)
            && ours.offset < end(on)
    };
    let (name, _) = others.into_iter().find(|(_, on)| same(on))?;
    Some(User::Twin(format!("/dev/{name}")))
}

/// The loop devices that are in use, by name.
fn loops(sys: &Path) -> Vec<(String, LoopBacking)> {
    let names = names(&sys.join("block")).into_iter();
    let used = names.filter(|name| sys.join("block").join(name).join("loop").is_dir());
    let asked = used.filter_map(|name| {
        let device = File::open(Path::new("/dev").join(&name)).ok()?;
        Some((name, loop_backing(&device).ok()?))
    });
    asked.collect()
}

/// The number of a device node, as sysfs writes it.
fn number_of(path: &str) -> Option<String> {
    // Others lead to filesystems, which may hang.
    let path = path.starts_with("/dev/").then_some(path)?;
    Some(numbered(fs::metadata(path).ok()?.rdev()))
}

fn numbered(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

fn text(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim_end().to_owned()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A machine with the disk 8:0, its partitions 8:1 and 8:2, and 9:0, which
    /// is made of the second.
    fn machine() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (node, number) in [
            ("sda", "8:0"),
            ("sda/sda1", "8:1"),
            ("sda/sda2", "8:2"),
            ("md0", "9:0"),
        ] {
            put(&format!("sys/devices/{node}/dev"), &format!("{number}\n"));
            fs::create_dir_all(root.path().join(format!("sys/devices/{node}/holders"))).unwrap();
            if node.contains('/') {
                put(&format!("sys/devices/{node}/partition"), "1\n");
            }
            fs::create_dir_all(root.path().join("sys/dev/block")).unwrap();
            let link = root.path().join("sys/dev/block").join(number);
            symlink(format!("../../devices/{node}"), link).unwrap();
        }
        symlink(
            "../../../md0",
            root.path().join("sys/devices/sda/sda2/holders/md0"),
        )
        .unwrap();
        put(
            "proc/self/mountinfo",
            "22 27 0:21 / /proc rw - proc proc rw\n30 1 8:1 / /home rw,relatime shared:1 - ext4 /dev/x rw\n",
        );
        put(
            "proc/swaps",
            "Filename Type Size Used Priority\n/swap.img file 1 0 -2\n",
        );
        root
    }

    #[test]
    fn a_disk_is_used_where_a_partition_of_it_is_and_the_other_way_round() {
        let root = machine();
        let user = |major, minor| user_below(root.path(), libc::makedev(major, minor));
        let home = User::Mount("/home".into());
        assert_eq!(user(8, 0), Some(home.clone()));
        assert_eq!(user(8, 1), Some(home));
        assert_eq!(user(8, 2), Some(User::Holder("md0".into())));
        assert_eq!(user(9, 0), None);
        assert_eq!(user(10, 0), None);
        fs::write(root.path().join("proc/self/mountinfo"), "").unwrap();
        assert_eq!(user(8, 0), Some(User::Holder("md0".into())));
        assert_eq!(user(8, 1), None);
        // The whole disk is part of something.
        fs::write(root.path().join("sys/devices/sda/holders/dm-0"), "").unwrap();
        assert_eq!(user(8, 1), Some(User::Holder("dm-0".into())));
    }
}
