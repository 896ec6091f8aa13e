//! An export's address among the processes of this machine, which do not hear
//! each other's questions.
//!
//! A claim is a lock on a file of a directory that only we can look into, so
//! that no other user can keep an export from starting. The kernel frees it when
//! the process ends, however that comes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::store::{CLAIMS, RunDir};
use crate::sys::lock::{self, Holder, Lock, patiently};
use crate::wire::Address;

/// An address on one interface, ours as long as this lives.
#[derive(Debug)]
pub(super) struct Claim {
    path: PathBuf,
    file: File,
}

/// Why an address cannot be claimed.
#[derive(Debug)]
pub(super) enum ClaimError {
    /// A process has it, and which, if that can be told.
    Taken(Option<Holder>),
    System(io::Error),
}

/// Returns the directory of claims: in the default run directory, where all
/// processes look whatever run directory they use; where that cannot be, in the
/// one that is given. `None`, with a warning, if there is no place.
pub(super) fn directory(address: Address, given: Option<&Path>) -> Option<PathBuf> {
    let places = [Some(None), given.map(Some)];
    let mut why = None;
    for place in places.into_iter().flatten() {
        match RunDir::open(place).and_then(|dir| dir.private(CLAIMS)) {
            Ok(path) => return Some(path),
            Err(e) => why = why.or(Some(e)),
        }
    }
    if let Some(e) = why {
        log::warn!(
            "{address}: {e}; without it another process of this machine that serves {address} is \
             not seen"
        );
    }
    None
}

/// Takes the address on this interface of our network namespace; what a process
/// has is asked for again for two seconds.
pub(super) fn take(dir: &Path, address: Address, nic: &str) -> Result<Claim, ClaimError> {
    // Interfaces of other namespaces may have the same name.
    let namespace = fs::metadata("/proc/self/ns/net").map_or(0, |m| m.ino());
    let path = dir.join(format!("{namespace}-{nic}-{address}"));
    let is_taken = |e: &ClaimError| matches!(e, ClaimError::Taken(_));
    patiently(|| Claim::try_take(&path), is_taken).map_err(|e| match e {
        ClaimError::Taken(_) => ClaimError::Taken(holder(&path)),
        e => e,
    })
}

impl Claim {
    /// `Taken` by nobody in particular while another has it.
    fn try_take(path: &Path) -> Result<Claim, ClaimError> {
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(false);
        how.mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = how.open(path).map_err(ClaimError::System)?;
        lock::set(&file, Lock::Exclusive, 0, 0).map_err(|e| match lock::is_held(&e) {
            true => ClaimError::Taken(None),
            false => ClaimError::System(e),
        })?;
        // The last holder may have removed the file before we had the lock.
        match is_at(path, &file) {
            true => Ok(Claim {
                path: path.to_owned(),
                file,
            }),
            false => Err(ClaimError::Taken(None)),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if is_at(&self.path, &self.file) {
            // One that stays takes nothing but its name.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// `true` if the path names this file.
fn is_at(path: &Path, file: &File) -> bool {
    let of = |m: fs::Metadata| (m.dev(), m.ino());
    let there = fs::symlink_metadata(path).map(of);
    there.is_ok_and(|there| file.metadata().map(of).is_ok_and(|ours| ours == there))
}

fn holder(path: &Path) -> Option<Holder> {
    let file = File::open(path).ok()?;
    lock::holder(&file, Lock::Exclusive, 0, 0).ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_holders_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let address = |slot| Address::new(1, slot).unwrap();
        let first = take(dir.path(), address(1), "eth0").unwrap();
        let other = take(dir.path(), address(2), "eth0").unwrap();
        let third = take(dir.path(), address(1), "eth1").unwrap();
        match take(dir.path(), address(1), "eth0") {
            Err(ClaimError::Taken(Some(holder))) => {
                assert_eq!(holder.pid, Some(std::process::id() as i32));
            }
            result => panic!("{result:?}"),
        }
        // One that lets go while another asks is followed by that one.
        let path = dir.path().to_owned();
        let waits = std::thread::spawn(move || take(&path, address(1), "eth0"));
        drop(first);
        let second = waits.join().unwrap().unwrap();
        assert!(matches!(
            Claim::try_take(&second.path),
            Err(ClaimError::Taken(None))
        ));
        drop((second, other, third));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_dead_process_left_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let claim = take(dir.path(), Address::new(1, 1).unwrap(), "eth0").unwrap();
        let path = claim.path.clone();
        drop(claim);
        fs::write(&path, "").unwrap();
        let claim = take(dir.path(), Address::new(1, 1).unwrap(), "eth0").unwrap();
        assert_eq!(claim.path, path);
    }
}
