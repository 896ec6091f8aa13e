//! Loop devices, and one whose disk is slow.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::requirements::Need;
use crate::error::{Error, Result};

/// A loop device on a file. Dropping it detaches it.
#[derive(Debug)]
pub struct Loop {
    /// Its path.
    pub path: PathBuf,
}

impl Loop {
    /// What loop devices need.
    pub const NEEDS: [Need<'static>; 3] = [
        Need::Network,
        Need::Program("losetup"),
        Need::Path("/dev/loop-control"),
    ];

    /// Attaches a file to a free device with sectors of so many bytes.
    pub fn attach(file: &Path, sector: usize) -> Result<Loop> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(file)
            .output()
            .map_err(Error::system("losetup"))?;
        if !output.status.success() {
            return Err(Error::Program(format!(
                "losetup of {}: {}: {}",
                file.display(),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        let name = String::from_utf8_lossy(&output.stdout);
        Ok(Loop {
            path: name.trim().into(),
        })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.path).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("{} is left behind", self.path.display());
        }
    }
}

/// A block device that does one thing at a time: a read, a write, a flush or a
/// discard, each in the same time. It is a loop device on a file of a file system
/// (FUSE) that a thread of this process serves.
#[derive(Debug)]
pub struct SlowDisk {
    device: Loop,
    nanoseconds: Arc<AtomicU64>,
}

impl SlowDisk {
    /// What it needs besides a loop device.
    pub const NEED: Need<'static> = Need::Path("/dev/fuse");

    /// Makes a device of an image, with sectors of so many bytes. The file system is
    /// mounted, for a moment, at a new directory `mount_point`.
    pub fn new(image: File, mount_point: &Path, sector: usize) -> Result<SlowDisk> {
        let what = || mount_point.display().to_string();
        let size = image.metadata().map_err(Error::system("image"))?.len();
        let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        let fuse = fuse.map_err(Error::system("/dev/fuse"))?;
        fs::create_dir(mount_point).map_err(Error::system(what()))?;
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            fuse.as_raw_fd()
        );
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        let mounted = mount(
            Some("slow"),
            mount_point,
            Some("fuse"),
            flags,
            Some(&data[..]),
        );
        let nanoseconds = Arc::new(AtomicU64::new(0));
        let device = mounted.map_err(Error::system(what())).and_then(|()| {
            let server = Server {
                fuse,
                image,
                size,
                nanoseconds: Arc::clone(&nanoseconds),
                free_at: Instant::now(),
            };
            thread::spawn(move || server.serve());
            let device = Loop::attach(&mount_point.join(NAME), sector);
            // The device keeps the file system; it ends with the device.
            let _ = umount2(mount_point, MntFlags::MNT_DETACH);
            device
        });
        let _ = fs::remove_dir(mount_point);
        Ok(SlowDisk {
            device: device?,
            nanoseconds,
        })
    }

    /// Path of the device.
    pub fn path(&self) -> &Path {
        &self.device.path
    }

    /// Sets how long the disk takes for one thing. At first it takes no time.
    pub fn set_pace(&self, each: Duration) {
        let nanoseconds = each.as_nanos() as u64;
        self.nanoseconds.store(nanoseconds, Ordering::Relaxed);
    }
}

/// Name of the one file.
const NAME: &str = "disk";
/// Numbers of the two nodes.
const ROOT: u64 = 1;
const FILE: u64 = 2;
/// The flag of an answer to an open.
const DIRECT: u64 = 1;
/// Bytes of a write at most, and of what stands before its data.
const WRITE_MAX: usize = 1 << 20;
const HEAD: usize = 40 + 40;

/// Operations of FUSE.
mod operation {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// The file system of one file, on /dev/fuse.
struct Server {
    fuse: File,
    image: File,
    size: u64,
    nanoseconds: Arc<AtomicU64>,
    /// When the disk has done all that it was told.
    free_at: Instant,
}

/// An answer's bytes behind its header, or an errno.
type Answer = std::result::Result<Vec<u8>, i32>;

impl Server {
    fn serve(mut self) {
        let mut buffer = vec![0; WRITE_MAX + HEAD + 4096];
        loop {
            let len = match (&self.fuse).read(&mut buffer) {
                Ok(len) => len,
                Err(e) => match e.raw_os_error() {
                    // Interrupted before it was read.
                    Some(nix::libc::ENOENT | nix::libc::EINTR | nix::libc::EAGAIN) => continue,
                    // It is unmounted.
                    _ => return,
                },
            };
            let request = &buffer[..len];
            let (Some(code), Some(unique)) = (u32_at(request, 4), u64_at(request, 8)) else {
                continue;
            };
            use operation::{BATCH_FORGET, FORGET, INTERRUPT};
            if matches!(code, FORGET | BATCH_FORGET | INTERRUPT) {
                continue;
            }
            let (error, body) = match self.answer(code, request) {
                Some(Ok(body)) => (0, body),
                Some(Err(error)) => (-error, Vec::new()),
                None => (-nix::libc::EINVAL, Vec::new()),
            };
            let mut reply = (16 + body.len() as u32).to_ne_bytes().to_vec();
            reply.extend(error.to_ne_bytes());
            reply.extend(unique.to_ne_bytes());
            reply.extend(body);
            // Who asked may be gone.
            let _ = (&self.fuse).write(&reply);
        }
    }

    /// Returns the answer to a request; `None` if it is too short.
    fn answer(&mut self, code: u32, request: &[u8]) -> Option<Answer> {
        let node = u64_at(request, 16)?;
        let body = &request[40..];
        Some(match code {
            operation::INIT => Ok(init(u32_at(body, 8)?)),
            operation::LOOKUP if body.strip_suffix(b"\0") == Some(NAME.as_bytes()) => {
                // Node, generation, and for how many seconds both are good.
                let mut entry = words(&[FILE, 0, 3600, 3600, 0]);
                entry.extend(self.attributes(FILE));
                Ok(entry)
            }
            operation::LOOKUP => Err(nix::libc::ENOENT),
            operation::GETATTR | operation::SETATTR => {
                let mut answer = words(&[3600, 0]);
                answer.extend(self.attributes(node));
                Ok(answer)
            }
            // Past the page cache: a request for each of the device.
            operation::OPEN => Ok(words(&[0, DIRECT])),
            operation::READ => {
                let (at, len) = (u64_at(body, 8)?, u32_at(body, 16)?);
                let len = u64::from(len).min(self.size.saturating_sub(at)) as usize;
                let mut data = vec![0; len];
                let read = self.image.read_exact_at(&mut data, at);
                self.work();
                read.map(|()| data).map_err(errno)
            }
            operation::WRITE => {
                let (at, len) = (u64_at(body, 8)?, u32_at(body, 16)?);
                let data = body.get(40..40 + len as usize)?;
                let written = self.image.write_all_at(data, at);
                self.work();
                written.map(|()| words(&[u64::from(len)])).map_err(errno)
            }
            operation::FSYNC => {
                self.work();
                Ok(Vec::new())
            }
            operation::FALLOCATE => {
                let (at, len) = (u64_at(body, 8)?, u64_at(body, 16)?);
                self.work();
                let mode = nix::fcntl::FallocateFlags::from_bits_truncate(u32_at(body, 24)? as i32);
                let done = nix::fcntl::fallocate(&self.image, mode, at as i64, len as i64);
                done.map(|()| Vec::new()).map_err(|e| e as i32)
            }
            operation::FLUSH | operation::RELEASE => Ok(Vec::new()),
            _ => Err(nix::libc::ENOSYS),
        })
    }

    /// Lets the time of one thing pass.
    fn work(&mut self) {
        let each = Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed));
        let now = Instant::now();
        self.free_at = self.free_at.max(now) + each;
        thread::sleep(self.free_at - now);
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, size) = match node {
            ROOT => (0o040_755, 0),
            _ => (0o100_600, self.size),
        };
        // Number, size, blocks, and three times in seconds.
        let mut bytes = words(&[node, size, size / 512, 0, 0, 0]);
        // Three times in nanoseconds, mode, links, owner and group, device, size of a
        // block, flags.
        for number in [0u32, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes
    }
}

/// Says version 7.31, with large writes and without reading ahead.
fn init(flags: u32) -> Vec<u8> {
    const BIG_WRITES: u32 = 1 << 5;
    const MAX_PAGES: u32 = 1 << 22;
    let mut bytes = Vec::new();
    for number in [7, 31, 0, flags & (BIG_WRITES | MAX_PAGES)] {
        bytes.extend(number.to_ne_bytes());
    }
    // Requests in the background.
    bytes.extend([64u16, 48].iter().flat_map(|n| n.to_ne_bytes()));
    for number in [WRITE_MAX as u32, 1] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes.extend(((WRITE_MAX / 4096) as u16).to_ne_bytes());
    bytes.resize(64, 0);
    bytes
}

fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_ne_bytes()).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}

fn errno(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(nix::libc::EIO)
}
