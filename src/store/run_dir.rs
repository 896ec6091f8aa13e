//! The run directory: memory that lives until the next boot, for what outlives
//! the process but not the machine.
//!
//! ```text
//! DIR         0755, owned by the user we run as, or by root
//! DIR/arena   0700, owned by the user we run as: the caches' arenas, files of 0600
//! DIR/claims  0700, owned by the user we run as: the addresses that are served
//! ```
//!
//! What hosts write lies in there, so nobody else may read it, and nobody else
//! may have put anything there for us to find.

use std::fmt;
use std::fs::{self, DirBuilder, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::geteuid;

/// Where the run directory is unless told: the second where `/run` is not in memory.
pub const RUN_DIRS: [&str; 2] = ["/run/aoede", "/dev/shm/aoede"];
/// The directory of the arenas in it.
pub const ARENAS: &str = "arena";
/// The directory of the addresses that are served.
pub const CLAIMS: &str = "claims";
/// Permissions of the run directory, and of a private one in it.
const SHARED: u32 = 0o755;
const PRIVATE: u32 = 0o700;
/// Permissions of a file in a private directory.
pub(super) const PRIVATE_FILE: u32 = 0o600;
/// Those who are neither owner nor root.
const OTHERS: u32 = 0o077;
const OTHERS_WRITE: u32 = 0o022;
/// In such a directory only its owner removes or renames a file.
const STICKY: u32 = 0o1000;

/// Why a run directory cannot be used.
#[derive(Debug)]
pub struct RunDirError {
    path: PathBuf,
    why: RunDirTrouble,
}

/// What is wrong with a run directory.
#[derive(Debug)]
pub enum RunDirTrouble {
    /// A file, or a link to somewhere, is in its place.
    NotADirectory,
    /// It belongs to another user, who could read or change what is in it.
    OtherOwner(u32),
    /// Others may write in it, and its permissions are not ours to change.
    Open,
    /// A system call.
    System(io::Error),
}

impl RunDirError {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether another place could be used without asking anyone: the directory
    /// cannot be made, as opposed to one that must not be trusted.
    pub fn is_unavailable(&self) -> bool {
        matches!(self.why, RunDirTrouble::System(_))
    }
}

impl fmt::Display for RunDirError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "run directory {}: ", self.path.display())?;
        match &self.why {
            RunDirTrouble::NotADirectory => f.write_str("it is no directory; move it away")?,
            RunDirTrouble::OtherOwner(uid) => write!(
                f,
                "it belongs to user {uid}, who could read and change what hosts write; correct its \
                 owner"
            )?,
            RunDirTrouble::Open => {
                f.write_str("everyone may write in it; correct its permissions")?
            }
            RunDirTrouble::System(e) => return write!(f, "{e}; name another --run-dir"),
        }
        f.write_str(", or name another --run-dir")
    }
}

impl std::error::Error for RunDirError {}

/// A run directory that was checked.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Makes or checks the run directory: the one that is given, or
    /// `/run/aoede`, or `/dev/shm/aoede` where `/run` is not in memory.
    pub fn open(given: Option<&Path>) -> Result<RunDir, RunDirError> {
        let path = given.map_or_else(default_path, Path::to_owned);
        let fail = |why| RunDirError {
            path: path.clone(),
            why,
        };
        let metadata = make(&path, SHARED).map_err(fail)?;
        let mode = metadata.permissions().mode();
        let is_ours = metadata.uid() == geteuid().as_raw();
        if !is_ours && metadata.uid() != 0 {
            return Err(fail(RunDirTrouble::OtherOwner(metadata.uid())));
        }
        if mode & OTHERS_WRITE != 0 && mode & STICKY == 0 {
            if !is_ours {
                return Err(fail(RunDirTrouble::Open));
            }
            narrow(&path, mode, mode & !OTHERS_WRITE)
                .map_err(|e| fail(RunDirTrouble::System(e)))?;
        }
        Ok(RunDir { path })
    }

    /// Makes or checks a directory in it that only we can look into.
    pub fn private(&self, name: &str) -> Result<PathBuf, RunDirError> {
        let path = self.path.join(name);
        let fail = |why| RunDirError {
            path: path.clone(),
            why,
        };
        let metadata = make(&path, PRIVATE).map_err(fail)?;
        if metadata.uid() != geteuid().as_raw() {
            return Err(fail(RunDirTrouble::OtherOwner(metadata.uid())));
        }
        let mode = metadata.permissions().mode();
        if mode & OTHERS != 0 {
            narrow(&path, mode, PRIVATE).map_err(|e| fail(RunDirTrouble::System(e)))?;
        }
        Ok(path)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Takes the permissions of others away from a file of ours; `false` of a file
/// that is not ours, or no file at all, which must not be believed.
pub(super) fn secure_file(path: &Path) -> io::Result<bool> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_file() || metadata.uid() != geteuid().as_raw() {
        return Ok(false);
    }
    let mode = metadata.permissions().mode();
    if mode & OTHERS != 0 {
        narrow(path, mode, PRIVATE_FILE)?;
    }
    Ok(true)
}

/// Makes a directory unless it is there; what is there then.
fn make(path: &Path, mode: u32) -> Result<Metadata, RunDirTrouble> {
    let made = DirBuilder::new().mode(mode).create(path);
    let made = match made {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(mode).create(path)
        }
        made => made,
    };
    match made {
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(RunDirTrouble::NotADirectory);
        }
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(RunDirTrouble::System(e));
        }
        _ => {}
    }
    // Not what a link leads to: that is for who made the link to choose.
    let metadata = fs::symlink_metadata(path).map_err(RunDirTrouble::System)?;
    if metadata.is_dir() {
        Ok(metadata)
    } else {
        Err(RunDirTrouble::NotADirectory)
    }
}

fn narrow(path: &Path, from: u32, to: u32) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(to))?;
    log::warn!(
        "{}: others had access to what hosts write; permissions {:04o} narrowed to {:04o}",
        path.display(),
        from & 0o7777,
        to & 0o7777
    );
    Ok(())
}

/// Whether files in this directory are memory.
pub(super) fn is_memory(path: &Path) -> bool {
    statfs(path).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC)
}

fn default_path() -> PathBuf {
    let [run, shm] = RUN_DIRS;
    let has_memory = |path: &str| Path::new(path).parent().is_some_and(is_memory);
    PathBuf::from(if has_memory(run) || !has_memory(shm) {
        run
    } else {
        shm
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{Gid, Uid, chown};
    use std::os::unix::fs::symlink;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn refused(path: &Path) -> String {
        let error = match RunDir::open(Some(path)) {
            Ok(run_dir) => run_dir.private("arena").unwrap_err(),
            Err(error) => error,
        };
        assert!(!error.is_unavailable(), "{error}");
        error.to_string()
    }

    #[test]
    fn it_is_made_so_that_only_we_look_into_the_arenas() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/run");
        for _ in 0..2 {
            let run_dir = RunDir::open(Some(&path)).unwrap();
            let arena = run_dir.private("arena").unwrap();
            assert_eq!((mode(&path) & 0o700, mode(&arena)), (0o700, 0o700));
            // Whatever others made of it.
            fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
            fs::set_permissions(&arena, Permissions::from_mode(0o755)).unwrap();
            let run_dir = RunDir::open(Some(&path)).unwrap();
            assert_eq!(run_dir.private("arena").unwrap(), arena);
            assert_eq!((mode(&path), mode(&arena)), (0o755, 0o700));
        }
    }

    #[test]
    fn what_is_no_directory_or_leads_elsewhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let link = dir.path().join("link");
        symlink(dir.path(), &link).unwrap();
        for path in [&file, &file.join("below"), &link] {
            let said = refused(path);
            assert!(said.contains("is no directory; move it away"), "{said}");
        }
        let run = dir.path().join("run");
        fs::create_dir(&run).unwrap();
        symlink(dir.path(), run.join("arena")).unwrap();
        assert!(refused(&run).contains("no directory"));
    }

    #[test]
    fn what_belongs_to_another_user_is_refused() {
        if !geteuid().is_root() {
            eprintln!("left out: needs root to give a directory away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (run, below) = (dir.path().join("run"), dir.path().join("other"));
        fs::create_dir_all(&run).unwrap();
        fs::create_dir_all(below.join("arena")).unwrap();
        let nobody = (Some(Uid::from_raw(65534)), Some(Gid::from_raw(65534)));
        chown(&run, nobody.0, nobody.1).unwrap();
        chown(&below.join("arena"), nobody.0, nobody.1).unwrap();
        for path in [&run, &below] {
            let said = refused(path);
            assert!(said.contains("user 65534"), "{said}");
        }
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(secure_file(&file).unwrap());
        assert_eq!(mode(&file), 0o600);
        chown(&file, nobody.0, nobody.1).unwrap();
        assert!(!secure_file(&file).unwrap());
    }

    #[test]
    fn a_place_where_nothing_can_be_made_is_only_unavailable() {
        let error = RunDir::open(Some(Path::new("/proc/aoede"))).unwrap_err();
        assert!(error.is_unavailable(), "{error}");
        assert!(error.to_string().contains("--run-dir"), "{error}");
    }
}
