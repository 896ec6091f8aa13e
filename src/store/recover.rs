//! Finding arenas again: what a process that died has left is brought to the
//! image before anyone is answered, and never silently passed over.
//!
//! The state directory keeps a record of each arena, made before the first
//! write that depends on it. A start reads all records, and looks for arenas in
//! the run directory that have none. Each is of our image, of another one, or in
//! doubt; in doubt the start is refused, and nothing is replayed or discarded.
//! All arenas of our exported range are checked before the first is replayed.
//! Their processes are dead, since we hold the lock on that range.

mod changed;
mod doubt;
mod error;
mod find;
mod record;
mod removal;
mod replay;
mod runs;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use shadow::boot_id;
use shadow::stamp::{Clocks, real_time};

pub use doubt::Doubtful;
pub use error::{RecoverError, RecoverTrouble};
pub use record::Record;
pub use replay::Unreplayed;
#[cfg(test)]
pub(super) use replay::bring;

use super::arena::{Arena, ArenaTrouble, Head, content};
use super::disk::Backing;
use super::image::Image;
use super::run_dir::{ARENAS, RunDir, RunDirError, is_memory};
use super::shadow::FoundShadow;

use changed::Seen;
use find::{Sorted, orphans, sort};
use removal::discard_aside;
use replay::Recovery;

/// Bytes of a cache's block, unless the disk wants larger ones.
const BLOCK: usize = 4096;
/// The least cache that is of any use, in blocks.
const SLOTS_MIN: u64 = 64;
/// The part of the new cache that sectors may take which the image does not take.
const UNREPLAYED_SHARE: u64 = 8;

/// Where an arena is kept, and how large.
#[derive(Clone, Debug)]
pub struct ArenaOptions {
    /// Name of the export in log lines, such as `e1.1`.
    pub export: String,
    /// Where the records are.
    pub state_dir: PathBuf,
    /// Where the arena goes; otherwise memory that lives until the next boot.
    pub run_dir: Option<PathBuf>,
    /// Bytes of cache.
    pub cache_size: u64,
    /// What the operator says of arenas that cannot be replayed as they are.
    pub doubt: Doubtful,
    /// The operator gives the shadow up (`--discard-shadow`).
    pub discard_shadow: bool,
}

/// What a start has to work with.
#[derive(Debug)]
pub struct Prepared {
    /// The cache's memory.
    pub arena: Arena,
    /// It does not survive us, so writes go through.
    pub write_through: bool,
    /// To be taken away with it.
    pub record: Option<Record>,
    /// What the image did not take.
    pub unreplayed: Unreplayed,
}

/// Bytes of the cache's blocks: whole ones of the disk's, and whole chunks of the
/// shadow that is there.
pub fn block_bytes(image: &Image, shadow: Option<&FoundShadow>) -> usize {
    let chunk = shadow.map_or(0, |shadow| shadow.chunk() as usize);
    image.align().max(BLOCK).max(chunk)
}

/// Recovers what was left, and makes a new arena. What belongs to a shadow goes
/// there.
pub fn prepare(
    image: &Image,
    options: &ArenaOptions,
    shadow: Option<&mut FoundShadow>,
) -> Result<Prepared, RecoverError> {
    let id = image.id();
    let boot = boot_id();
    let arenas = match arena_directory(options) {
        Err((_, e)) if !e.is_unavailable() => {
            return Err(RecoverError {
                path: PathBuf::new(),
                why: RecoverTrouble::RunDir(e),
            });
        }
        arenas => arenas,
    };
    let run_dir = match &arenas {
        Ok((run_dir, _)) => run_dir.path(),
        Err((path, _)) => path,
    };
    let mut found = record::all(&options.export, &options.state_dir, &id)?;
    for left in &mut found {
        left.correct();
    }
    orphans(
        &options.export,
        &[run_dir, &run_dir.join(ARENAS)],
        &mut found,
    );
    let block = block_bytes(image, shadow.as_deref());
    let Sorted {
        ours,
        peers,
        given_up,
    } = sort(found, image, &id, boot, options)?;
    let heads: Vec<Head> = ours
        .iter()
        .chain(&peers)
        .filter(|left| left.boot == boot)
        .filter_map(|left| Head::read(&left.arena).ok())
        .collect();
    let mut recovery = Recovery {
        export: &options.export,
        image,
        shadow,
        id,
        boot,
        doubt: &options.doubt,
        discard_shadow: options.discard_shadow,
        seen: Seen::of(heads.iter(), Clocks::now()),
        peers: ours.iter().chain(&peers).map(|l| l.arena.clone()).collect(),
        room: options.cache_size / UNREPLAYED_SHARE,
    };
    let unreplayed = recovery.recover(ours)?;
    for left in &given_up {
        discard_aside(&options.export, left)?;
    }
    if image.is_read_only() {
        let arena = anonymous(&options.state_dir, block, options.cache_size)?;
        return Ok(Prepared {
            arena,
            write_through: false,
            record: None,
            unreplayed,
        });
    }
    sync_before_serving(image)?;
    let made = match arenas {
        Ok((_, arenas)) => make(&arenas, boot, image, block, options).map_err(|e| {
            let place = arenas.display();
            format!("no arena in {place} ({e})")
        }),
        Err((_, e)) => Err(e.to_string()),
    };
    match made {
        Ok((arena, record)) => Ok(Prepared {
            arena,
            write_through: false,
            record: Some(record),
            unreplayed,
        }),
        // Memory that nobody finds again is no place for the only copy.
        Err(why) if !unreplayed.arenas.is_empty() => Err(RecoverError {
            path: unreplayed.arenas[0].1.arena.clone(),
            why: RecoverTrouble::NoArena(why),
        }),
        Err(why) => {
            log::warn!(
                "{}: {why}: writes go through to the image before they are acknowledged, which is \
                 slower; --run-dir and --state-dir name other places",
                options.export
            );
            let arena = anonymous(&options.state_dir, block, options.cache_size)?;
            Ok(Prepared {
                arena,
                write_through: true,
                record: None,
                unreplayed,
            })
        }
    }
}

/// Brings to stable storage what was written before this start: a target without an
/// arena may have died. Of what then cannot be written no copy is left, and a later
/// sync would not name it any more.
fn sync_before_serving(image: &Image) -> Result<(), RecoverError> {
    image.sync_all().map_err(|e| RecoverError {
        path: image.path().to_owned(),
        why: RecoverTrouble::Unsynced(e),
    })
}

type ArenaDirectory = Result<(RunDir, PathBuf), (PathBuf, RunDirError)>;

/// The directory for our arena, and the run directory that it lies in.
fn arena_directory(options: &ArenaOptions) -> ArenaDirectory {
    let fail = |e: RunDirError| (e.path().to_owned(), e);
    let run_dir = RunDir::open(options.run_dir.as_deref()).map_err(fail)?;
    let arenas = run_dir.private(ARENAS).map_err(fail)?;
    Ok((run_dir, arenas))
}

fn anonymous(path: &Path, block: usize, bytes: u64) -> Result<Arena, RecoverError> {
    let slots = (bytes / block as u64).clamp(SLOTS_MIN, u64::from(u32::MAX - 1)) as u32;
    Arena::anonymous(block, slots).map_err(|e| RecoverError {
        path: path.to_owned(),
        why: RecoverTrouble::Arena(ArenaTrouble::System(e)),
    })
}

/// Makes the arena, and its record on stable storage.
fn make(
    directory: &Path,
    boot: [u64; 2],
    image: &Image,
    block: usize,
    options: &ArenaOptions,
) -> io::Result<(Arena, Record)> {
    if !is_memory(directory) {
        log::warn!(
            "{}: {} is no memory filesystem: every write goes to its disk as well; --run-dir names \
             another place",
            options.export,
            directory.display()
        );
    }
    let space = statvfs(directory)?;
    let free = space.blocks_available() * space.fragment_size();
    let mut bytes = options.cache_size;
    if bytes > free / 2 {
        bytes = free / 2;
        log::warn!(
            "{}: cache of {} MiB instead of {}: half of what {} has free; make room there and \
             start again, or lower cache_size",
            options.export,
            bytes >> 20,
            options.cache_size >> 20,
            directory.display()
        );
    }
    let slots = bytes / block as u64;
    if slots < SLOTS_MIN {
        return Err(io::ErrorKind::StorageFull.into());
    }
    let slots = slots.min(u64::from(u32::MAX - 1)) as u32;
    let id = image.id();
    let (path, record) = record::free_paths(&id, directory, &options.state_dir);
    let mut arena = Arena::create(&path, boot, &id, block, slots)?;
    arena.set_heartbeat(real_time());
    arena.set_stamp(image.stamp()?);
    if image.is_device() {
        let len = image.exported_bytes();
        arena.set_content(len, content_of(image, id.start, len));
    }
    let image = fs::canonicalize(image.path()).unwrap_or_else(|_| image.path().to_owned());
    let written = Record::write(&options.export, &record, &path, &image, boot, &id).map_err(|e| {
        // Without its record it must not be used; the error is told.
        let _ = fs::remove_file(&path);
        let kept = options.state_dir.display();
        io::Error::new(
            e.kind(),
            format!("its record cannot be kept in {kept}: {e}"),
        )
    });
    Ok((arena, written?))
}

/// What a device holds at both ends of a range, as far as it can be read.
fn content_of(image: &Image, start: u64, len: u64) -> impl Iterator<Item = (usize, u64)> {
    let mut bytes = vec![0; content::PIECE as usize];
    content::pieces(start, len).filter_map(move |(number, at)| {
        image.read_unaligned(&mut bytes, at).ok()?;
        Some((number, content::sum(&bytes)))
    })
}
