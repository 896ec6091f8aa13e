//! Files below what `std` knows: reads that do not wait, alignment of direct
//! I/O, sizes of block devices.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use super::packet::check;

/// What direct I/O on a file must be aligned to, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlign {
    /// Offsets and lengths.
    pub offset: u32,
    /// Memory.
    pub memory: u32,
}

/// What the kernel says of direct I/O on this file (statx, Linux 6.1); `None`
/// if it does not say, or says that there is none.
pub fn direct_align(file: &File) -> Option<DirectAlign> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    let empty: &CStr = c"";
    // SAFETY: the path is a C string, the buffer a whole statx of ours.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    };
    check(result).ok()?;
    // SAFETY: zeroed, then written by the kernel; all of it is numbers.
    let answer = unsafe { answer.assume_init() };
    let known = answer.stx_mask & libc::STATX_DIOALIGN != 0 && answer.stx_dio_offset_align > 0;
    known.then_some(DirectAlign {
        offset: answer.stx_dio_offset_align,
        memory: answer.stx_dio_mem_align,
    })
}

/// Fills `buf` from `offset` if all of it is in the page cache.
///
/// `Ok(false)`: it is not, or the end of the file comes first. An error of kind
/// `Unsupported`: this file cannot be read so.
pub fn read_now(file: &File, buf: &mut [u8], offset: u64) -> io::Result<bool> {
    let piece = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let Ok(offset) = libc::off_t::try_from(offset) else {
        return Ok(false);
    };
    // SAFETY: the iovec describes `buf`, alive and ours alone for the call.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &piece, 1, offset, libc::RWF_NOWAIT) };
    match usize::try_from(read) {
        Ok(read) => Ok(read == buf.len()),
        Err(_) => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Unsupported => Err(e),
            _ => Ok(false),
        },
    }
}

/// The call of Linux 6.5 that counts the pages of a range; the same number for
/// all processors that we know. libc has no name for it on some of them.
const CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// `true` if the page cache has all of these bytes, or has begun to read them.
///
/// To ask reads nothing. [`read_now`] does not wait, but since some version the
/// kernel begins to read what it has not found. Before Linux 6.5 the kernel does
/// not tell, and the answer is `true`; it is `false` if the kernel refuses it.
pub fn is_cached(file: &File, offset: u64, len: u64) -> bool {
    let range = CachestatRange { offset, len };
    let mut answer = Cachestat::default();
    let no_flags: libc::c_uint = 0;
    // SAFETY: the call reads one and writes the other structure, both ours and laid
    // out as it wants them.
    let result = unsafe {
        let (range, answer) = (&raw const range, &raw mut answer);
        libc::syscall(CACHESTAT, file.as_raw_fd(), range, answer, no_flags)
    };
    if result != 0 {
        return io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS);
    }
    // SAFETY: takes and returns a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as u64;
    let pages = (offset + len).div_ceil(page) - offset / page;
    answer.cached >= pages
}

/// Brings these bytes from the page cache to the disk, and waits for that. It
/// makes nothing durable, but leaves little to do for the sync behind it. An
/// error is that of a write, and is reported by no later sync.
pub fn push(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: takes numbers and a descriptor that is open for the call.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, flags) };
    match check(result) {
        // The kernel or the file has no such call: the sync does all of it. All
        // else may be the error of a write, which nobody reports again.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::ESPIPE)) => Ok(()),
        result => result.map(drop),
    }
}

mod ioctl {
    nix::ioctl_read!(blkgetsize64, 0x12, 114, u64);
    nix::ioctl_read_bad!(blkpbszget, libc::BLKPBSZGET, u32);
    nix::ioctl_read_bad!(blksszget, libc::BLKSSZGET, i32);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), i32);
}

/// The numbers of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Its size in bytes.
    pub bytes: u64,
    /// The smallest unit it can address, in bytes.
    pub logical: u32,
    /// The smallest unit it writes without reading, in bytes.
    pub physical: u32,
    /// Whether it takes no writes. Opening it for them works all the same.
    pub read_only: bool,
}

/// Asks a block device for its numbers.
pub fn block_device(file: &File) -> io::Result<BlockDevice> {
    let (mut bytes, mut physical, mut logical, mut read_only) = (0u64, 0u32, 0i32, 0i32);
    let fd = file.as_raw_fd();
    // SAFETY: each request writes one number of the type given.
    unsafe {
        ioctl::blkgetsize64(fd, &mut bytes)?;
        ioctl::blkpbszget(fd, &mut physical)?;
        ioctl::blksszget(fd, &mut logical)?;
        ioctl::blkroget(fd, &mut read_only)?;
    }
    Ok(BlockDevice {
        bytes,
        logical: logical.max(512) as u32,
        physical: physical.max(512),
        read_only: read_only != 0,
    })
}
