//! The disk under an export: image, jobs, their order, and what is saved beside
//! it.
//!
//! ```text
//! target -> volume (order of jobs, buffers, syncs) -> Disk (threads) -> image
//! ```
//!
//! Nothing here blocks the caller: [`Volume`] answers at once from the page
//! cache or hands a [`Job`] to a [`Disk`], whose results are reaped later.

mod align;
mod disk;
mod image;
mod inline;
mod pool;
mod state;
mod volume;

pub use disk::{Backing, Disk, DiskError, Done, Job, JobId, JobKind};
pub use image::{Create, Image, ImageError, ImageOptions, ImageTrouble, Window};
pub use inline::Inline;
pub use pool::Pool;
pub use state::{StateError, StateFile};
pub use volume::{Bounds, Completed, Failures, JOBS_MAX, NoRoom, Read, Token, Volume};
