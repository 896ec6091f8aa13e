//! Why an export cannot begin or must end.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::net::{NicError, probe::AddressConflict};
use crate::store::{ImageError, RecoverError, ShadowError, StateError};
use crate::sys::lock::Holder;
use crate::wire::Address;

/// Why an export cannot begin or must end.
#[derive(Debug)]
pub enum ServeError {
    /// An interface.
    Nic(NicError),
    /// The image.
    Image(ImageError),
    /// The file with the wire's state.
    State(StateError),
    /// The wire's state itself; the file, and what is wrong.
    BadState(std::path::PathBuf, crate::access::BadState),
    /// Another target answers under our address.
    AddressConflict(Address, AddressConflict),
    /// Another process of this machine has our address on this interface.
    Claimed(Address, String, Option<Holder>),
    /// What a target that died has left.
    Recover(Address, RecoverError),
    /// The cache has no room for acknowledged sectors that the image does not
    /// take.
    CacheTooSmall,
    /// The shadow of a freeze.
    Shadow(ShadowError),
    /// Its limit is too low for blocks of so many bytes; the least, in MiB.
    ShadowLimit(u64, u64),
    /// The disk made no progress for so long at the end; the file that holds
    /// what is not on it.
    StopTimeout(Address, Duration, Option<PathBuf>),
    /// A second signal to stop came before the first was carried out.
    StoppedTwice(Address),
    /// A system call, and which.
    System(&'static str, io::Error),
}

impl fmt::Display for ServeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServeError::Nic(e) if e.may_come() => {
                write!(f, "{e}; --wait-for-interfaces starts without it")
            }
            ServeError::Nic(e) => write!(f, "{e}"),
            ServeError::Image(e) => write!(f, "{e}"),
            ServeError::State(e) => write!(f, "{e}; repair it or name another --state-dir"),
            ServeError::BadState(path, e) => write!(
                f,
                "state file {}: {e}; repair it, or remove it to start without config string, \
                 masks and reservation",
                path.display()
            ),
            ServeError::AddressConflict(address, AddressConflict { mac, nic }) => write!(
                f,
                "{address} is taken: {mac} answers under it on {nic}, and initiators would take \
                 both for one disk; choose another shelf or slot (--shared-address serves anyway)"
            ),
            ServeError::Claimed(address, nic, holder) => {
                write!(f, "{address} is taken: ")?;
                match holder {
                    Some(holder) => write!(f, "{holder}")?,
                    None => f.write_str("another process")?,
                }
                write!(
                    f,
                    " of this machine serves it on {nic}; choose another shelf or slot \
                     (--shared-address serves anyway)"
                )
            }
            ServeError::Recover(address, e) => write!(f, "{address}: {e}"),
            ServeError::CacheTooSmall => f.write_str(
                "cache_size is too small for the acknowledged sectors that the image does not \
                 take; raise it; they are kept",
            ),
            ServeError::Shadow(e) => write!(f, "{e}"),
            ServeError::ShadowLimit(block, least) => write!(
                f,
                "-f: the limit is too low for a disk with blocks of {block} bytes; give {least} MiB \
                 or more"
            ),
            ServeError::StopTimeout(address, after, arena) => {
                write!(
                    f,
                    "{address}: stopped before the disk had everything: it made no progress for {} s",
                    after.as_secs()
                )?;
                match arena {
                    Some(path) => write!(
                        f,
                        "; what is not on it is kept in {}, and the next start brings it there",
                        path.display()
                    ),
                    None => f.write_str("; writes that were not acknowledged may be missing"),
                }
            }
            ServeError::StoppedTwice(address) => {
                write!(f, "{address}: stopped at once by a second signal")
            }
            ServeError::System(what, e) => write!(f, "{what}: {e}"),
        }
    }
}

impl std::error::Error for ServeError {}
