//! The image: a file or block device, opened, locked and measured.

mod error;
mod in_use;

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::fcntl::{
    FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise,
};
use nix::sys::uio::pwritev;
use shadow::paths::sync_directory;
use shadow::stamp::Stamp;
use shadow::{BlockFile, Facts, Identity, SECTOR};

use super::align;
use super::arena::{ImageId, V1Id};
use super::disk::Backing;
use super::run_dir::PRIVATE_FILE;
use super::volume::Bounds;
use crate::sys::buffer::{Body, Buf};
use crate::sys::file::{block_device, direct_align, is_cached, push, read_now};
use crate::sys::lock::{self, Holder, Lock, patiently};

pub use error::{ImageError, ImageTrouble};
pub use in_use::User;

/// Alignment of direct I/O where the kernel does not tell it.
const DIRECT_DEFAULT: u32 = 4096;
/// The most bytes of a file that one call discards. A process that is killed ends only
/// when the call does, and the call may change the times of the file last. That must
/// be within the two seconds after the last heartbeat in which a start takes it for
/// ours.
const DISCARD_MAX: u64 = 64 << 20;
/// The largest block: 64 sectors, a bit for each in a word.
const ALIGN_MAX: u32 = 64 * SECTOR as u32;

/// Which sectors of the image are exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// The first, in sectors of 512 bytes (`-o`).
    pub offset: u64,
    /// How many (`-l`); otherwise all to the end.
    pub length: Option<u64>,
}

impl Window {
    /// How many sectors it shows of an image of so many.
    fn of(self, sectors: u64) -> Result<u64, ImageTrouble> {
        let rest = sectors.checked_sub(self.offset);
        let rest = rest.filter(|rest| *rest > 0);
        let rest = rest.ok_or(ImageTrouble::StartPastEnd(sectors))?;
        match self.length.unwrap_or(rest) {
            length if (1..=rest).contains(&length) => Ok(length),
            _ => Err(ImageTrouble::WindowPastEnd(sectors)),
        }
    }
}

/// An image to be made where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Create {
    /// Its size in bytes, a multiple of 512.
    pub bytes: u64,
    /// Whether its room is allocated at once; otherwise it is sparse.
    pub prealloc: bool,
}

/// What is to be opened, and how.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// Where it is.
    pub path: PathBuf,
    /// Makes it if it is not there.
    pub create: Option<Create>,
    /// Past the page cache.
    pub direct: bool,
    /// Never written.
    pub read_only: bool,
    /// What part of it.
    pub window: Window,
    /// Also a device that someone else uses.
    pub force: bool,
}

/// An open image. One open file description carries its lock and its I/O.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    window: Window,
    is_device: bool,
    align: u32,
    discard_align: u32,
    direct: bool,
    physical: u64,
    read_only: bool,
    identity: u64,
    id: ImageId,
}

impl Image {
    /// Opens, locks and looks at an image; makes it first if it is not there
    /// and that was asked for.
    pub fn open(options: &ImageOptions) -> Result<Image, ImageError> {
        let path = options.path.clone();
        let fail = |why| ImageError {
            path: path.clone(),
            why,
        };
        Image::try_open(options).map_err(fail)
    }

    fn try_open(options: &ImageOptions) -> Result<Image, ImageTrouble> {
        let step = |what| move |e| ImageTrouble::System(what, e);
        let kind = match std::fs::metadata(&options.path) {
            Ok(metadata) => metadata.file_type(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if let Ok(to) = std::fs::read_link(&options.path) {
                    return Err(ImageTrouble::Dangling(to));
                }
                let create = options.create.ok_or(ImageTrouble::Missing)?;
                // What is refused is refused before anything is made.
                options.window.of(create.bytes / SECTOR)?;
                make(&options.path, create).map_err(step("making it"))?;
                std::fs::metadata(&options.path)
                    .map_err(step("looking at it"))?
                    .file_type()
            }
            Err(e) => return Err(ImageTrouble::System("looking at it", e)),
        };
        let is_device = kind.is_block_device();
        if !is_device && !kind.is_file() {
            return Err(ImageTrouble::NotADisk);
        }
        if is_device && !options.force {
            let number = std::fs::metadata(&options.path).map_err(step("looking at it"))?;
            if let Some(user) = in_use::user_of(number.rdev()) {
                return Err(ImageTrouble::Busy(Some(user)));
            }
        }
        let file = patiently(|| open(options, is_device), is_held)?;
        patiently(|| lock(&file, options), is_held).map_err(|why| match why {
            ImageTrouble::Locked(_) => ImageTrouble::Locked(holder(&file, options)),
            other => other,
        })?;

        let metadata = file.metadata().map_err(step("looking at it"))?;
        let device = is_device.then(|| block_device(&file)).transpose();
        let device = device.map_err(step("asking the device"))?;
        if device.is_some_and(|d| d.read_only) && !options.read_only {
            return Err(ImageTrouble::ReadOnlyDevice);
        }
        let physical = match device {
            Some(device) => u64::from(device.physical),
            None => metadata.blksize(),
        };
        let told = direct_align(&file).map(|align| align.offset);
        let align = match (options.direct, device) {
            (false, _) => 1,
            (true, Some(device)) => told.unwrap_or(device.logical),
            (true, None) => told.unwrap_or(DIRECT_DEFAULT),
        };
        if align > ALIGN_MAX {
            return Err(ImageTrouble::LargeBlocks(align));
        }
        let mut image = Image {
            file,
            path: options.path.clone(),
            window: options.window,
            is_device,
            align,
            // Past the page cache or not, a device discards whole sectors.
            discard_align: align.max(device.map_or(1, |d| d.logical)),
            direct: options.direct,
            physical: if physical.is_power_of_two() {
                physical.clamp(512, 1 << 20)
            } else {
                512
            },
            read_only: options.read_only,
            identity: identity(&metadata, is_device, options.window),
            id: ImageId::default(),
        };
        image.id.facts = Facts::of(&image.file).map_err(step("asking what it is"))?;
        image.id.v1 = v1_id(&metadata, is_device);
        let bounds = image.bounds()?;
        image.id.start = bounds.start;
        // A window that reaches to the end grows with the image.
        image.id.len = match options.window.length {
            Some(_) => bounds.sectors * SECTOR,
            None => i64::MAX as u64 - bounds.start,
        };
        Ok(image)
    }

    /// What the export is now: where it begins and how many sectors it has. The
    /// file may have grown or shrunk since the last look.
    pub fn bounds(&self) -> Result<Bounds, ImageTrouble> {
        let sectors = self
            .bytes()
            .map_err(|e| ImageTrouble::System("measuring it", e))?
            / SECTOR;
        if sectors == 0 {
            return Err(ImageTrouble::Empty);
        }
        let length = self.window.of(sectors)?;
        let bounds = Bounds {
            start: self.window.offset * SECTOR,
            sectors: length,
        };
        let align = u64::from(self.align);
        if bounds.start % align != 0 || (length * SECTOR) % align != 0 {
            return Err(ImageTrouble::Unaligned(align));
        }
        Ok(bounds)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes at the end that make no whole sector, and are not served.
    pub fn cut_off(&self) -> u64 {
        self.bytes().map_or(0, |bytes| bytes % SECTOR)
    }

    /// Returns who else uses it, if it is a device, and the loop devices on it, if
    /// it is a file.
    pub fn users(&self) -> (Option<User>, Vec<String>) {
        match self.file.metadata() {
            Ok(metadata) if self.is_device => (in_use::user_of(metadata.rdev()), Vec::new()),
            _ => (None, in_use::loops_on(&self.file)),
        }
    }

    /// The size of the backing's physical block as a power of two of sectors,
    /// and at which sector of one the export begins.
    pub fn physical_block(&self) -> (u8, u16) {
        let sectors = self.physical / SECTOR;
        (
            sectors.trailing_zeros() as u8,
            (self.window.offset % sectors) as u16,
        )
    }

    /// Whether discarding works. Asking may change the time of the last change,
    /// so what a dead process has left is to be looked at before.
    pub fn can_discard(&self) -> bool {
        !self.read_only && self.probe_discard()
    }

    /// A number that this image and window have and hardly any other, the same
    /// at every start as long as the file is the same one.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Which image and window this is, for what is kept about it elsewhere.
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// Whether it is read and written past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether it is never written.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// How the file looks to the kernel now; `None` of a device.
    pub fn stamp(&self) -> io::Result<Option<Stamp>> {
        Stamp::of(&self.file)
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// Bytes of the exported range now, 0 where that cannot be told.
    pub fn exported_bytes(&self) -> u64 {
        self.bounds().map_or(0, |bounds| bounds.sectors * SECTOR)
    }

    /// Writes bytes anywhere, aligned or not, before anything else is served.
    pub fn write_unaligned(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::other(
                "it is open read-only; start it once without -r",
            ));
        }
        align::put(self, bytes, at)
    }

    /// Reads bytes anywhere, aligned or not, before anything is served.
    pub fn read_unaligned(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let mut buf = Buf::new(bytes.len() + 2 * self.align as usize)?;
        let range = align::read(self, at, bytes.len(), &mut buf)?;
        bytes.copy_from_slice(&buf[range]);
        Ok(())
    }

    /// What a shadow of it knows it by.
    pub fn shadow_identity(&self) -> io::Result<Identity> {
        Identity::of(&self.file)
    }

    /// Locks what of these bytes is outside of our window, until the guard
    /// goes.
    pub fn lock_besides(&self, start: u64, len: u64) -> io::Result<SideLock<'_>> {
        let ours = (self.id.start, self.id.start + self.id.len);
        let end = start.saturating_add(len);
        let mut guard = SideLock {
            file: &self.file,
            ranges: Vec::new(),
        };
        for (from, to) in [(start, end.min(ours.0)), (start.max(ours.1), end)] {
            // Without -l our own lock has no end.
            let beyond = self.window.length.is_none() && from >= ours.1;
            if from < to && !beyond {
                lock::set(&self.file, Lock::Exclusive, from as i64, (to - from) as i64)?;
                guard.ranges.push((from as i64, (to - from) as i64));
            }
        }
        Ok(guard)
    }

    /// Bytes of the whole image now.
    pub fn bytes(&self) -> io::Result<u64> {
        if self.is_device {
            Ok(block_device(&self.file)?.bytes)
        } else {
            Ok(self.file.metadata()?.len())
        }
    }

    /// Brings all that was written to it so far to stable storage, also what other
    /// processes wrote.
    pub fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Tries a discard where it changes nothing: behind the end of a file. A
    /// device says in sysfs whether it can.
    fn probe_discard(&self) -> bool {
        let Ok(metadata) = self.file.metadata() else {
            return false;
        };
        if self.is_device {
            let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
            let node = format!("/sys/dev/block/{major}:{minor}");
            return ["queue", "../queue"].iter().any(|queue| {
                std::fs::read_to_string(format!("{node}/{queue}/discard_max_bytes"))
                    .is_ok_and(|text| text.trim().parse::<u64>().is_ok_and(|max| max > 0))
            });
        }
        const BLOCK: u64 = 1 << 20;
        let behind = metadata.len().next_multiple_of(BLOCK);
        self.punch(behind, BLOCK, FallocateFlags::FALLOC_FL_PUNCH_HOLE)
            .is_ok()
    }

    /// Discards what one call may.
    fn discard_piece(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.punch(offset, len, FallocateFlags::FALLOC_FL_PUNCH_HOLE) {
            // What was announced is zeros; a device that cannot unmap this
            // range can still write them.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                match self.punch(offset, len, FallocateFlags::FALLOC_FL_ZERO_RANGE) {
                    // Only what a shadow brings from another time or filesystem
                    // comes here.
                    Err(e) if e.kind() == io::ErrorKind::Unsupported => self.zero(offset, len),
                    result => result,
                }
            }
            result => result,
        }
    }

    fn punch(&self, offset: u64, len: u64, how: FallocateFlags) -> io::Result<()> {
        let flags = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, flags, offset as i64, len as i64)?)
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl BlockFile for Image {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl Backing for Image {
    fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        !self.direct && read_now(&self.file, buf, offset).unwrap_or(false)
    }

    fn is_cached(&self, offset: u64, len: u64) -> bool {
        !self.direct && is_cached(&self.file, offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // A device keeps no times.
        let most = if self.is_device {
            u64::MAX
        } else {
            DISCARD_MAX
        };
        pieces(offset, len, most).try_for_each(|(at, len)| self.discard_piece(at, len))
    }

    fn write_pieces(&self, pieces: &[Body], offset: u64) -> io::Result<()> {
        write_pieces(&self.file, pieces, offset)
    }

    fn push(&self, offset: u64, len: u64) -> io::Result<()> {
        push(&self.file, offset, len)
    }

    fn prefetch(&self, offset: u64, len: u64) {
        let advice = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
        // Only a hint.
        let _ = posix_fadvise(&self.file, offset as i64, len as i64, advice);
    }

    fn align(&self) -> usize {
        self.align as usize
    }

    fn discard_align(&self) -> usize {
        self.discard_align as usize
    }

    fn stamp(&self) -> Option<Stamp> {
        Image::stamp(self).ok().flatten()
    }

    fn name(&self) -> String {
        format!("image {}", self.path.display())
    }
}

/// `true` if a process holds what we need.
fn is_held(why: &ImageTrouble) -> bool {
    matches!(why, ImageTrouble::Locked(_) | ImageTrouble::Busy(_))
}

fn open(options: &ImageOptions, is_device: bool) -> Result<File, ImageTrouble> {
    let direct = if options.direct { libc::O_DIRECT } else { 0 };
    let mut how = OpenOptions::new();
    how.read(true).write(!options.read_only);
    let mut open = |flags| {
        how.custom_flags(direct | flags);
        how.open(&options.path).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) if is_device => ImageTrouble::Busy(None),
            Some(libc::EINVAL) if options.direct => ImageTrouble::NoDirect,
            _ => ImageTrouble::System("opening it", e),
        })
    };
    // For a block device, without O_CREAT: fails while it is in use, also where
    // /proc and /sys do not show us the user.
    let file = match is_device && !options.force {
        true => open(libc::O_EXCL)?,
        false => open(0)?,
    };
    // Several may read; only what is written is nobody else's.
    let file = match is_device && !options.force && options.read_only {
        true => {
            drop(file);
            open(0)?
        }
        false => file,
    };
    keep_no_access_time(&file);
    Ok(file)
}

/// Reads of this file leave its access time alone. To note one, a filesystem may
/// wait for its journal, also in a read that is not to wait for anything.
pub(super) fn keep_no_access_time(file: &File) {
    let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    // Only owners may; for others it is as it always was.
    let _ = flags.and_then(|flags| fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NOATIME)));
}

/// Kind, start and length in bytes of the lock on the exported range: shared if
/// it is only read.
fn range(options: &ImageOptions) -> Result<(Lock, i64, i64), ImageTrouble> {
    let byte = |sectors: u64| {
        let bytes = sectors
            .checked_mul(SECTOR)
            .and_then(|b| i64::try_from(b).ok());
        bytes.ok_or(ImageTrouble::WindowPastEnd(i64::MAX as u64 / SECTOR))
    };
    let kind = if options.read_only {
        Lock::Shared
    } else {
        Lock::Exclusive
    };
    // 0 is to the end, wherever that will be.
    let len = byte(options.window.length.unwrap_or(0))?;
    Ok((kind, byte(options.window.offset)?, len))
}

/// Locks the exported range. The lock belongs to the open file description: it
/// goes with it, and only with it.
fn lock(file: &File, options: &ImageOptions) -> Result<(), ImageTrouble> {
    let (kind, start, len) = range(options)?;
    lock::set(file, kind, start, len).map_err(|e| match lock::is_held(&e) {
        true => ImageTrouble::Locked(None),
        false => ImageTrouble::System("locking it", e),
    })
}

/// Returns who has locked a part of the exported range.
fn holder(file: &File, options: &ImageOptions) -> Option<Holder> {
    let (kind, start, len) = range(options).ok()?;
    lock::holder(file, kind, start, len).ok()?
}

/// Locks besides our own, as long as this lives.
#[derive(Debug)]
pub struct SideLock<'a> {
    file: &'a File,
    ranges: Vec<(i64, i64)>,
}

impl Drop for SideLock<'_> {
    fn drop(&mut self) {
        for (start, len) in &self.ranges {
            // What cannot be unlocked goes with the file.
            let _ = lock::set(self.file, Lock::None, *start, *len);
        }
    }
}

/// What aoede 0.1.0 knew the image by.
fn v1_id(metadata: &std::fs::Metadata, is_device: bool) -> V1Id {
    let birth = metadata
        .created()
        .ok()
        .and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let birth = birth.map_or(0, |t| t.as_nanos() as u64);
    let (device, inode, birth) = if is_device {
        (metadata.rdev(), 0, 0)
    } else {
        (metadata.dev(), metadata.ino(), birth)
    };
    V1Id {
        device,
        inode,
        birth,
    }
}

/// Makes an image that only our user can read; leaves nothing behind if that fails.
fn make(path: &Path, create: Create) -> io::Result<()> {
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(PRIVATE_FILE)
        .open(path)?;
    let filled = if create.prealloc {
        fallocate(&file, FallocateFlags::empty(), 0, create.bytes as i64).map_err(io::Error::from)
    } else {
        file.set_len(create.bytes)
    };
    // Without its directory on stable storage the file may be gone after a power
    // loss, and with it all that was acknowledged.
    let synced = filled
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_directory(path));
    synced.inspect_err(|_| {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(path);
    })
}

fn identity(metadata: &std::fs::Metadata, is_device: bool, window: Window) -> u64 {
    let (a, b) = if is_device {
        (metadata.rdev(), 0)
    } else {
        (metadata.dev(), metadata.ino())
    };
    let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
    let mut digest = crc.digest();
    for number in [a, b, window.offset] {
        digest.update(&number.to_le_bytes());
    }
    digest.finalize()
}

/// The pieces of `len` bytes from `offset` on that end at multiples of `most`: offset,
/// bytes.
fn pieces(offset: u64, len: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let (mut at, end) = (offset, offset.saturating_add(len));
    std::iter::from_fn(move || {
        let next = (at / most + 1).saturating_mul(most).min(end);
        let piece = (at, next - at);
        at = next;
        (piece.1 > 0).then_some(piece)
    })
}

/// Writes all of the pieces, one behind the other.
pub(super) fn write_pieces(file: &File, pieces: &[Body], offset: u64) -> io::Result<()> {
    let together = |vectors: &[IoSlice], at| pwritev(file, vectors, at as i64);
    let alone = |bytes: &[u8], at| file.write_all_at(bytes, at);
    write_all(pieces, offset, together, alone)
}

/// The same with these system calls: the first may write only a part.
fn write_all(
    pieces: &[Body],
    mut offset: u64,
    together: impl Fn(&[IoSlice], u64) -> nix::Result<usize>,
    alone: impl Fn(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    for pieces in pieces.chunks(libc::UIO_MAXIOV as usize) {
        let vectors: Vec<IoSlice> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let len: usize = pieces.iter().map(|piece| piece.len()).sum();
        let mut done = match together(&vectors, offset) {
            Ok(done) if shadow::fault!("short-pwritev") => done.max(len),
            Ok(done) => done,
            Err(nix::Error::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        // The rest of a short write, which is rare, piece by piece.
        let mut at = 0;
        for piece in pieces {
            let end = at + piece.len();
            if done < end {
                alone(&piece[done - at..], offset + done as u64)?;
                done = end;
            }
            at = end;
        }
        offset += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
