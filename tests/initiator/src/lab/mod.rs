//! A network of one's own for a test, and the processes in it.
//!
//! Everything here is taken away when its value is dropped, while panicking
//! too. Nothing waits by sleeping for luck: [`wait_until`] asks again and again
//! until a deadline.

mod disk;
mod namespace;
mod process;
mod requirements;
mod wait;

pub use disk::{Loop, SlowDisk};
pub use namespace::{Namespace, Tap, Veth};
pub use process::{Process, Spawn, ended_by, pin};
pub use requirements::{Need, missing, require};
pub use wait::{Deadline, wait_until};
