//! The names a shadow has in its life, and the steps from one to the next.
//!
//! `PATH.new` while the image is brought to the instant of the freeze; `PATH`
//! once the image is quiesced, which is what a backup waits for; `PATH.thaw` from
//! the moment any thaw may change the image. PATH is a small
//! file then, the marker, until all is merged: "PATH is there" means "not merged
//! yet", and "the same inode before and after" proves a copy of the image.
//! `PATH.cut` is what 0.1.0 called a shadow whose thaw nobody had ordered.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::libc;
use nix::unistd::linkat;

use crate::file::BlockFile;
use crate::format::{Spec, State};
use crate::lock::{Lock, lock_now, lock_patiently};
use crate::open::OpenError;
use crate::overlay::Shadow;

mod marker;
mod steps;

pub use marker::{make_marker, read_marker, remove_marker};
pub use steps::{abandon, appear, begin_thaw, vanish};

/// The length of a file of holes that a filesystem is tried with.
const PROBE: u64 = 4 << 20;
/// The most bytes that such a file may take.
const PROBE_MAX: u64 = 256 << 10;

/// The names of a shadow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Before the image is quiesced.
    pub new: PathBuf,
    /// While it is; the marker's afterwards.
    pub shadow: PathBuf,
    /// From the moment the image may change; the marker's before.
    pub thaw: PathBuf,
    /// The same as 0.1.0 called it, for a thaw that nobody had ordered.
    pub cut: PathBuf,
}

impl Paths {
    /// The names of the shadow that an operator calls `path`.
    pub fn of(path: &Path) -> Paths {
        let with = |end: &str| {
            let mut name = OsString::from(path);
            name.push(end);
            PathBuf::from(name)
        };
        Paths {
            new: with(".new"),
            shadow: path.to_owned(),
            thaw: with(".thaw"),
            cut: with(".cut"),
        }
    }
}

/// A name of a shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// `PATH.new`
    New,
    /// `PATH`
    Plain,
    /// `PATH.thaw`
    Thaw,
    /// `PATH.cut`
    Cut,
}

impl Found {
    /// All, the one that stays first where two are links to one file.
    const ALL: [Found; 4] = [Found::Plain, Found::Thaw, Found::Cut, Found::New];

    /// Returns which of the names a path is, by its ending.
    pub fn of(path: &Path) -> Found {
        match path.extension().and_then(OsStr::to_str) {
            Some("new") => Found::New,
            Some("thaw") => Found::Thaw,
            Some("cut") => Found::Cut,
            _ => Found::Plain,
        }
    }

    /// What the operator calls the shadow that has this path now.
    pub fn plain(path: &Path) -> PathBuf {
        match Found::of(path) {
            Found::Plain => path.to_owned(),
            Found::New | Found::Thaw | Found::Cut => path.with_extension(""),
        }
    }

    /// The path of that name.
    pub fn path(self, paths: &Paths) -> &Path {
        match self {
            Found::New => &paths.new,
            Found::Plain => &paths.shadow,
            Found::Thaw => &paths.thaw,
            Found::Cut => &paths.cut,
        }
    }

    /// Returns the state of a freeze whose shadow has this name and this state in
    /// its header, where a change of the name comes first.
    pub fn state(self, header: State) -> State {
        match (self, header) {
            (_, State::Thawing) | (Found::Thaw | Found::Cut, _) => State::Thawing,
            (Found::New, State::Freezing) => State::Freezing,
            _ => State::Frozen,
        }
    }
}

/// What has the names of a shadow.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Names of what may be a shadow, one for each file.
    pub files: Vec<Found>,
    /// Names of markers, with the uuid of the shadow that each stands for.
    pub markers: Vec<(Found, [u8; 16])>,
}

/// Looks which of the names are there, whatever they are.
pub fn find(paths: &Paths) -> io::Result<Names> {
    let mut names = Names::default();
    let mut seen = Vec::new();
    for name in Found::ALL {
        let path = name.path(paths);
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let inode = (metadata.dev(), metadata.ino());
        if let Some(uuid) = read_marker(path)? {
            names.markers.push((name, uuid));
        } else if !seen.contains(&inode) {
            seen.push(inode);
            names.files.push(name);
        }
    }
    Ok(names)
}

/// Returns the path of the shadow, where the path that was given is its marker.
pub fn behind_marker(path: &Path) -> Result<PathBuf, PathError> {
    let look = |e| at(path)(Trouble::System("looking at it", e));
    let Some(uuid) = read_marker(path).map_err(look)? else {
        return Ok(path.to_owned());
    };
    let paths = Paths::of(&Found::plain(path));
    let other = match Found::of(path) {
        Found::Plain => paths.thaw,
        _ => paths.shadow,
    };
    let there = fs::symlink_metadata(&other).is_ok();
    if there && read_marker(&other).map_err(look)? != Some(uuid) {
        Ok(other)
    } else {
        Err(at(path)(Trouble::Marker(other)))
    }
}

/// What a shadow is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be read; others may read it as well.
    Look,
    /// To be read and written, by us alone.
    Change,
}

/// A shadow's file: a regular one, locked as a whole as long as this is open,
/// unless [`peek`] found it in use.
#[derive(Debug)]
pub struct ShadowFile(File);

impl ShadowFile {
    /// Bytes of the disk that it takes.
    pub fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.blocks() * 512)
    }

    /// What the kernel says of it.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.0.metadata()
    }

    /// The file, for what only the kernel's own calls can do.
    pub fn as_file(&self) -> &File {
        &self.0
    }

    /// The file itself, with the lock.
    pub fn into_file(self) -> File {
        self.0
    }

    /// Locks a file as a whole.
    fn lock(file: File, access: Access) -> Result<ShadowFile, Trouble> {
        let kind = match access {
            Access::Look => Lock::Shared,
            Access::Change => Lock::Exclusive,
        };
        match lock_patiently(&file, kind) {
            Ok(true) => Ok(ShadowFile(file)),
            Ok(false) => Err(Trouble::Locked),
            Err(e) => Err(Trouble::System("locking it", e)),
        }
    }
}

impl AsFd for ShadowFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl BlockFile for ShadowFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero(offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }
}

/// Why a shadow cannot be made, opened or moved; the message names the file and
/// the remedy.
#[derive(Debug)]
pub struct PathError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub why: Trouble,
}

/// What is wrong with the file of a shadow.
#[derive(Debug)]
pub enum Trouble {
    /// Something has this name already.
    Exists,
    /// There is none.
    Missing,
    /// It is no regular file.
    NotAFile,
    /// Another process has it locked.
    Locked,
    /// Its filesystem keeps no holes, so it would take the whole window.
    NoHoles,
    /// Its filesystem does not take a file of so many bytes.
    TooLarge(u64),
    /// It is the marker of a shadow, which should be there and is not.
    Marker(PathBuf),
    /// It cannot be used as a shadow.
    Open(OpenError),
    /// A system call failed, and which.
    System(&'static str, io::Error),
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shadow {}: ", self.path.display())?;
        match &self.why {
            Trouble::Exists => f.write_str("there is a file of this name; move it away"),
            Trouble::Missing => f.write_str("there is none; correct the path"),
            Trouble::NotAFile => f.write_str("is no regular file; give another path"),
            Trouble::Locked => f.write_str("another process has it open; stop that one first"),
            Trouble::NoHoles => f.write_str(
                "its filesystem cannot keep holes in a file; give a path on one that can, such as \
                 ext4, xfs or btrfs",
            ),
            Trouble::TooLarge(bytes) => write!(
                f,
                "its filesystem does not take a file of {bytes} bytes, holes as they are; give a \
                 path on another"
            ),
            Trouble::Marker(shadow) => write!(
                f,
                "is the marker of {}, which is not there; bring that file back",
                shadow.display()
            ),
            Trouble::Open(e) => write!(f, "{e}"),
            Trouble::System(what, e) => {
                write!(f, "{what}: {e}")?;
                match e.kind() {
                    io::ErrorKind::PermissionDenied => f.write_str("; run as who may write it"),
                    io::ErrorKind::ReadOnlyFilesystem => {
                        f.write_str("; give a path on a filesystem that takes writes")
                    }
                    io::ErrorKind::StorageFull => f.write_str("; make room there"),
                    io::ErrorKind::NotFound => f.write_str("; make its directory"),
                    io::ErrorKind::AlreadyExists => {
                        f.write_str("; see what has that name, and move it away")
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

impl std::error::Error for PathError {}

fn at(path: &Path) -> impl Fn(Trouble) -> PathError + '_ {
    |why| PathError {
        path: path.to_owned(),
        why,
    }
}

/// Makes `PATH.new`: locked, of its full length and all holes, with its header
/// and its name on stable storage. Its marker, `PATH.thaw`, is made behind it, so
/// that a thaw needs no room. What has one of the names already is left alone.
///
/// What was made is taken away again if a step fails. The name is given last
/// where the filesystem can: who dies before leaves nothing, rather than a file
/// that the next start does not know.
pub fn create(paths: &Paths, spec: &Spec) -> Result<Shadow<ShadowFile>, PathError> {
    let path = paths.new.as_path();
    for taken in [&paths.shadow, &paths.thaw, &paths.cut] {
        if fs::symlink_metadata(taken).is_ok() {
            return Err(at(taken)(Trouble::Exists));
        }
    }
    let shadow = match unnamed(path) {
        Some(file) => Some(fill(file, spec).map_err(at(path))?),
        None => None,
    };
    let shadow = match shadow.map(|shadow| (name(shadow.file().as_file(), path), shadow)) {
        Some((Ok(()), shadow)) => shadow,
        Some((Err(e), _)) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(at(path)(Trouble::Exists));
        }
        // It cannot be named later: then at once.
        Some((Err(_), _)) | None => named(path, spec).map_err(at(path))?,
    };
    let marked = sync_directory(path)
        .and_then(|()| make_marker(&paths.thaw, &spec.uuid))
        .and_then(|()| sync_directory(path));
    marked.map_err(|e| {
        // The first error is the one to tell.
        abandon(paths, &spec.uuid);
        at(path)(Trouble::System("giving it and its marker a name", e))
    })?;
    Ok(shadow)
}

fn for_making() -> OpenOptions {
    let mut how = OpenOptions::new();
    how.read(true).write(true).mode(0o600);
    how
}

/// A file without a name in the directory of `path`, where there can be one.
fn unnamed(path: &Path) -> Option<File> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let mut how = for_making();
    how.custom_flags(libc::O_TMPFILE);
    how.open(parent.unwrap_or(Path::new("."))).ok()
}

/// Gives such a file its name.
fn name(file: &File, path: &Path) -> io::Result<()> {
    let number = file.as_raw_fd();
    let open = format!("/proc/self/fd/{number}");
    let follow = AtFlags::AT_SYMLINK_FOLLOW;
    Ok(linkat(AT_FDCWD, open.as_str(), AT_FDCWD, path, follow)?)
}

/// A shadow under its name from the beginning.
fn named(path: &Path, spec: &Spec) -> Result<Shadow<ShadowFile>, Trouble> {
    let file = for_making().create_new(true).open(path);
    let file = file.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => Trouble::Exists,
        _ => Trouble::System("making it", e),
    })?;
    fill(file, spec).inspect_err(|_| {
        // The first error is the one to tell.
        let _ = fs::remove_file(path);
    })
}

/// `true` if the filesystem of this empty file keeps holes: the file gets a length.
pub fn keeps_holes(file: &File) -> io::Result<bool> {
    file.set_len(PROBE)?;
    Ok(file.metadata()?.blocks() * 512 <= PROBE_MAX)
}

fn fill(file: File, spec: &Spec) -> Result<Shadow<ShadowFile>, Trouble> {
    let step = |what| move |e| Trouble::System(what, e);
    let ShadowFile(file) = ShadowFile::lock(file, Access::Change)?;
    // A small file first: a filesystem without holes would fill the large one.
    if !keeps_holes(&file).map_err(step("giving it a length"))? {
        return Err(Trouble::NoHoles);
    }
    let len = spec.geometry.data_end();
    file.set_len(len).map_err(|e| match e.raw_os_error() {
        Some(libc::EFBIG | libc::EINVAL) => Trouble::TooLarge(len),
        _ => Trouble::System("giving it a length", e),
    })?;
    Shadow::create(ShadowFile(file), spec).map_err(step("writing its header"))
}

/// Opens a shadow to change it, and locks it. Nothing is written, whatever it
/// is. A lock that someone holds is asked for again for two seconds.
pub fn open(path: &Path) -> Result<Shadow<ShadowFile>, PathError> {
    let (file, len) = lock(path, Access::Change)?;
    Shadow::open(file, len).map_err(|e| at(path)(Trouble::Open(e)))
}

/// Opens the file of a shadow and locks it, without looking at what it holds;
/// its length in bytes comes with it.
pub fn lock(path: &Path, access: Access) -> Result<(ShadowFile, u64), PathError> {
    let file = open_file(path, access)?;
    let file = ShadowFile::lock(file, access).map_err(at(path))?;
    // Only with the lock is the length what it will be.
    let metadata = file.0.metadata();
    let metadata = metadata.map_err(|e| at(path)(Trouble::System("looking at it", e)))?;
    Ok((file, metadata.len()))
}

fn open_file(path: &Path, access: Access) -> Result<File, PathError> {
    let step = |what| move |e| at(path)(Trouble::System(what, e));
    // Looked at before it is opened: opening a device or a pipe may do
    // something, or wait.
    let metadata = fs::metadata(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => at(path)(Trouble::Missing),
        _ => step("looking at it")(e),
    })?;
    let mut how = OpenOptions::new();
    how.read(true).write(access == Access::Change);
    if !metadata.is_file() {
        return Err(at(path)(Trouble::NotAFile));
    }
    let file = how.open(path).map_err(step("opening it"))?;
    let metadata = file.metadata().map_err(step("looking at it"))?;
    match metadata.is_file() {
        true => Ok(file),
        false => Err(at(path)(Trouble::NotAFile)),
    }
}

/// A shadow's file that was opened to be read, and its length in bytes.
#[derive(Debug)]
pub enum Peek {
    /// It is locked by us; nobody changes it.
    Ours(ShadowFile, u64),
    /// Another process has it locked, and may change it any moment.
    InUse(ShadowFile, u64),
}

/// Opens the file of a shadow to be read, also where another process has it.
pub fn peek(path: &Path) -> Result<Peek, PathError> {
    let file = open_file(path, Access::Look)?;
    let ours = lock_now(&file, Lock::Shared);
    let ours = ours.map_err(|e| at(path)(Trouble::System("locking it", e)))?;
    let len = file.metadata();
    let len = len.map_err(|e| at(path)(Trouble::System("looking at it", e)))?;
    let (file, len) = (ShadowFile(file), len.len());
    Ok(match ours {
        true => Peek::Ours(file, len),
        false => Peek::InUse(file, len),
    })
}

/// Renames a file, and syncs the directory. Something that has that name already
/// is never replaced: `AlreadyExists`.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let flags = RenameFlags::RENAME_NOREPLACE;
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, flags) {
        Ok(()) => {}
        // The filesystem does not know how. A link does not replace either; a
        // crash between the two leaves both names on one file.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            fs::hard_link(from, to)?;
            // Not the second of the two names may be kept by a power cut alone.
            sync_directory(to)?;
            fs::remove_file(from)?;
        }
        Err(e) => return Err(e.into()),
    }
    sync_directory(to)
}

/// Removes a file, and syncs the directory.
pub fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync_directory(path)
}

/// Brings the names in the directory of `path` to stable storage.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests;
