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
mod arena;
mod cache;
mod disk;
mod fair;
mod image;
mod inline;
mod pool;
mod recover;
mod run_dir;
mod shadow;
mod split;
mod state;
mod uring;
mod volume;

pub use arena::{Arena, ArenaTrouble, ImageId, OldArena};
pub use cache::{Cache, DIRTY_MIN};
pub use disk::{Backing, Disk, DiskError, Done, Job, JobId, JobKind, Origin, Part, Segment, Step};
pub use fair::{FairQueue, Initiator, Passed, Queue, Shares, cost};
pub use image::{Create, Image, ImageError, ImageOptions, ImageTrouble, Window};
pub use inline::Inline;
pub use pool::Pool;
pub use recover::{
    ArenaOptions, Doubtful, Prepared, Record, RecoverError, RecoverTrouble, Unreplayed,
    block_bytes, prepare,
};
pub use run_dir::{ARENAS, CLAIMS, RUN_DIRS, RunDir, RunDirError, RunDirTrouble};
pub use shadow::{FoundShadow, ShadowError, ShadowOptions, ShadowStore, find_shadow};
pub use state::{StateError, StateFile};
pub use uring::UringDisk;
pub use volume::{
    Bounds, Completed, Failures, LeftShadow, PARKED_HEADROOM, PARKED_MAX, Read, Refused,
    ShadowSide, Token, Volume, VolumeOptions, Write, shadow_limit_min,
};
