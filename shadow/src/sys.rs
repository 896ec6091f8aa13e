//! The two questions about an image that need a system call which `nix` and
//! `std` do not have; the only `unsafe` of this crate.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;

/// The kernel's `struct fsuuid2`.
#[repr(C)]
struct FsUuid {
    len: u8,
    uuid: [u8; 16],
}

/// The kernel's `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;

mod ioctl {
    nix::ioctl_read!(fs_get_uuid, 0x15, 0, super::FsUuid);
    nix::ioctl_read_bad!(loop_status, super::LOOP_GET_STATUS64, super::LoopInfo);
}

/// The UUID of the filesystem that a file lies on (FS_IOC_GETFSUUID, Linux
/// 6.9); `None` where the kernel or the filesystem tells none.
pub fn filesystem_uuid(file: &File) -> Option<[u8; 16]> {
    let mut answer = FsUuid {
        len: 0,
        uuid: [0; 16],
    };
    // SAFETY: the request writes one `fsuuid2`, which `answer` is.
    unsafe { ioctl::fs_get_uuid(file.as_raw_fd(), &mut answer) }.ok()?;
    (answer.len > 0 && answer.uuid != [0; 16]).then_some(answer.uuid)
}

/// What is behind a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopBacking {
    /// Device number of the filesystem with the backing file.
    pub device: u64,
    /// Inode of the backing file.
    pub inode: u64,
    /// Device number of the backing file, if that is a block device itself.
    pub rdevice: u64,
    /// First byte of the file that the device shows.
    pub offset: u64,
    /// The most bytes that it shows, 0 for all.
    pub size_limit: u64,
}

/// Asks a loop device for its backing file (LOOP_GET_STATUS64); an error of
/// another kind of device.
pub fn loop_backing(file: &File) -> io::Result<LoopBacking> {
    let mut info = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    // SAFETY: the request writes one `loop_info64`, which `info` is. Callers
    // have seen that this is a loop device, for which the number means this.
    unsafe { ioctl::loop_status(file.as_raw_fd(), &mut info) }?;
    Ok(LoopBacking {
        device: info.device,
        inode: info.inode,
        rdevice: info.rdevice,
        offset: info.offset,
        size_limit: info.size_limit,
    })
}
