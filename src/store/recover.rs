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
mod error;
mod record;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;
use shadow::stamp::real_time;
use shadow::{BlockFile, Facts, SECTOR, Verdict};

pub use error::{RecoverError, RecoverTrouble};
pub use record::Record;

use super::arena::{Arena, ArenaTrouble, Head, ImageId, OldArena, content};
use super::disk::Backing;
use super::image::{Image, SideLock};
use super::run_dir::{RunDir, RunDirError, is_memory};
use super::shadow::{FoundShadow, Place, Unaligned};

use changed::{Change, Seen};
use error::Discarded;
use record::{ARENA, Left, tell_all};

/// Bytes of a cache's block, unless the disk wants larger ones.
const BLOCK: usize = 4096;
/// The least cache that is of any use, in blocks.
const SLOTS_MIN: u64 = 64;
/// The part of the new cache that sectors may take which the image does not
/// take, and in how many pieces.
const UNREPLAYED_SHARE: u64 = 8;
const UNREPLAYED_MAX: usize = 1024;
/// How long an arena that someone holds is asked for again.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// The directory of the arenas in the run directory.
const ARENAS: &str = "arena";

/// Where an arena is kept, and how large.
#[derive(Clone, Debug)]
pub struct ArenaOptions {
    /// Where the records are.
    pub state_dir: PathBuf,
    /// Where the arena goes; otherwise memory that lives until the next boot.
    pub run_dir: Option<PathBuf>,
    /// Bytes of cache.
    pub cache_size: u64,
    /// What the operator says of arenas that cannot be replayed as they are.
    pub doubt: Doubtful,
}

/// What becomes of an arena that is not certain to belong to the image as it is
/// now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doubtful {
    /// The start is refused.
    #[default]
    Refuse,
    /// The writes in it are discarded (`--discard-arena`).
    Discard,
    /// The image is the right one (`--replay-arena`).
    Replay,
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

/// Acknowledged sectors that the image does not take. They go on as dirty blocks
/// of the new cache.
#[derive(Debug, Default)]
pub struct Unreplayed {
    /// Offset in the image, and the bytes, in the order in which they count.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// The arenas that hold them until then.
    arenas: Vec<(OldArena, Left)>,
}

impl Unreplayed {
    /// Takes the old arenas away: the new one has what they held.
    pub fn settle(self) -> Result<(), RecoverError> {
        for (mut old, left) in self.arenas {
            // The record first: what cannot be removed goes on counting.
            remove_record(&left)?;
            old.retire();
            remove_arena(&left)?;
        }
        Ok(())
    }
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
    let mut found = record::all(&options.state_dir, &id)?;
    for left in &mut found {
        left.correct();
    }
    orphans(&[run_dir, &run_dir.join(ARENAS)], &mut found);
    let block = block_bytes(image, shadow.as_deref());
    let (ours, peers) = sort(found, image, &id, boot, options.doubt)?;
    let heads: Vec<Head> = ours
        .iter()
        .chain(&peers)
        .filter(|left| left.boot == boot)
        .filter_map(|left| Head::read(&left.arena).ok())
        .collect();
    let mut recovery = Recovery {
        image,
        shadow,
        id,
        boot,
        doubt: options.doubt,
        seen: Seen::of(heads.iter()),
        peers: ours.iter().chain(&peers).map(|l| l.arena.clone()).collect(),
        room: options.cache_size / UNREPLAYED_SHARE,
    };
    let unreplayed = recovery.recover(ours)?;
    if image.is_read_only() {
        let arena = anonymous(&options.state_dir, block, options.cache_size)?;
        return Ok(Prepared {
            arena,
            write_through: false,
            record: None,
            unreplayed,
        });
    }
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
                "{why}: writes go through to the image before they are acknowledged, which is \
                 slower; --run-dir and --state-dir name other places"
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

type ArenaDirectory = Result<(RunDir, PathBuf), (PathBuf, RunDirError)>;

/// The directory for our arena, and the run directory that it lies in.
fn arena_directory(options: &ArenaOptions) -> ArenaDirectory {
    let fail = |e: RunDirError| (e.path().to_owned(), e);
    let run_dir = RunDir::open(options.run_dir.as_deref()).map_err(fail)?;
    let arenas = run_dir.private(ARENAS).map_err(fail)?;
    Ok((run_dir, arenas))
}

/// Adds the arenas in these directories that no record speaks of.
fn orphans(directories: &[&Path], found: &mut Vec<Left>) {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    for directory in directories {
        let files = fs::read_dir(directory).into_iter().flatten().flatten();
        for path in files.map(|entry| entry.path()) {
            let is_arena = path.to_string_lossy().ends_with(ARENA);
            let is_known = |left: &Left| real(&left.arena) == real(&path);
            if !is_arena || found.iter().any(is_known) {
                continue;
            }
            match Head::read(&path) {
                Ok(head) => found.push(Left::orphan(path, &head)),
                // Nobody has told of it, and it is nothing that we know.
                Err(e) => log::warn!("arena {}: {e}; it is passed over", path.display()),
            }
        }
    }
}

/// The arenas of our image: those of our exported range, and others. Names those
/// whose image is nowhere, and refuses those in doubt.
fn sort(
    found: Vec<Left>,
    image: &Image,
    id: &ImageId,
    boot: [u64; 2],
    doubt: Doubtful,
) -> Result<(Vec<Left>, Vec<Left>), RecoverError> {
    let (mut ours, mut peers) = (Vec::new(), Vec::new());
    let path = fs::canonicalize(image.path()).unwrap_or_else(|_| image.path().to_owned());
    for left in found {
        let same_boot = left.boot == boot;
        let mut verdict = left.origin.compare(id, same_boot);
        let has_our_path = left.image.as_deref() == Some(&path) && !image.is_device();
        if verdict == Verdict::Other && has_our_path && same_boot {
            verdict = Verdict::Doubt("another file was put in its place");
        }
        match verdict {
            Verdict::Same if left.overlaps(id) => ours.push(left),
            Verdict::Same => peers.push(left),
            // Not left by anyone: its process serves another image.
            Verdict::Doubt(_) if Head::is_live(&left.arena) => {}
            Verdict::Doubt(why) if same_boot && left.overlaps(id) && sectors(&left) != Some(0) => {
                match doubt {
                    Doubtful::Refuse => {
                        return Err(RecoverError {
                            path: left.arena.clone(),
                            why: RecoverTrouble::Doubt {
                                why,
                                then: describe(&left),
                                now: format!("{}: {}", path.display(), id.facts),
                            },
                        });
                    }
                    Doubtful::Discard => discard(&left)?,
                    Doubtful::Replay => ours.push(left),
                }
            }
            Verdict::Other | Verdict::Doubt(_) => tell_if_lost(&left, same_boot),
        }
    }
    // A newer one may hold what one before it could not bring to the disk.
    ours.sort_by_key(|left| Head::read(&left.arena).map_or(0, |head| head.created));
    Ok((ours, peers))
}

/// How many sectors an arena holds; `None` if it cannot be used.
fn sectors(left: &Left) -> Option<u64> {
    OldArena::look(&left.arena).ok().map(|old| old.sectors())
}

/// What an arena belongs to, in words.
fn describe(left: &Left) -> String {
    match &left.image {
        Some(path) => format!("{}: {}", path.display(), left.origin),
        None => left.origin.to_string(),
    }
}

/// Names an arena of a process that died, whose image is not there any more.
fn tell_if_lost(left: &Left, same_boot: bool) {
    let Some(image) = left.image.as_deref().filter(|_| same_boot) else {
        return;
    };
    if Head::is_live(&left.arena) || is_in_sight(image, left) {
        return;
    }
    let Some(sectors) = sectors(left).filter(|sectors| *sectors > 0) else {
        return;
    };
    log::warn!(
        "arena {}: {sectors} acknowledged sectors of an image that is not there now ({}); start \
         with that image to bring them there, or remove arena and record to discard them",
        left.arena.display(),
        describe(left)
    );
}

/// Whether the image of an arena is where it was.
fn is_in_sight(path: &Path, left: &Left) -> bool {
    let is_disk = fs::metadata(path).is_ok_and(|metadata| {
        use std::os::unix::fs::FileTypeExt;
        metadata.is_file() || metadata.file_type().is_block_device()
    });
    // Opening anything else may wait, or do something.
    let facts = || Facts::of(&fs::File::open(path).ok()?).ok();
    let Some(facts) = is_disk.then(facts).flatten() else {
        return false;
    };
    let id = ImageId {
        facts,
        ..ImageId::default()
    };
    left.origin.compare(&id, true) == Verdict::Same
}

/// Discards what an arena holds, as the operator said.
fn discard(left: &Left) -> Result<(), RecoverError> {
    log::warn!("arena {} given up, as told", left.arena.display());
    remove(left)
}

/// Sets an arena aside that the operator gives up, though nothing is wrong with
/// it: the image does not take what it holds.
fn discard_aside(left: &Left) -> Result<(), RecoverError> {
    let aside = left.arena.with_extension("arena.discarded");
    remove_record(left)?;
    fs::rename(&left.arena, &aside).map_err(cannot_remove(left))?;
    log::warn!(
        "arena {} given up, as told; it is {} now",
        left.arena.display(),
        aside.display()
    );
    Ok(())
}

/// Takes an arena and its record away.
fn remove(left: &Left) -> Result<(), RecoverError> {
    // The record first: one whose arena is gone stands for writes that are lost.
    remove_record(left)?;
    remove_arena(left)
}

fn remove_record(left: &Left) -> Result<(), RecoverError> {
    let removed = left.record.as_deref().map_or(Ok(()), record::remove);
    removed.map_err(cannot_remove(left))
}

fn remove_arena(left: &Left) -> Result<(), RecoverError> {
    match fs::remove_file(&left.arena) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(cannot_remove(left)),
    }
}

fn cannot_remove(left: &Left) -> impl Fn(io::Error) -> RecoverError + '_ {
    |e| RecoverError {
        path: left.arena.clone(),
        why: RecoverTrouble::Remove(e),
    }
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
            "{} is no memory filesystem: every write goes to its disk as well; --run-dir names \
             another place",
            directory.display()
        );
    }
    let space = statvfs(directory)?;
    let free = space.blocks_available() * space.fragment_size();
    let mut bytes = options.cache_size;
    if bytes > free / 2 {
        bytes = free / 2;
        log::warn!(
            "cache of {} MiB instead of {}: {} has no more room",
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
    let written = Record::write(&record, &path, &image, boot, &id).map_err(|e| {
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

/// What a start finds of its own image.
struct Recovery<'a> {
    image: &'a Image,
    shadow: Option<&'a mut FoundShadow>,
    id: ImageId,
    boot: [u64; 2],
    doubt: Doubtful,
    seen: Seen,
    /// The arenas of the image, of all exported ranges.
    peers: Vec<PathBuf>,
    /// Bytes that may be carried into the new cache.
    room: u64,
}

/// An arena that can be replayed.
struct Checked<'a> {
    left: Left,
    old: OldArena,
    /// What of its range is not ours.
    _lock: SideLock<'a>,
}

impl<'a> Recovery<'a> {
    /// Brings what the arenas of our range hold to the image, and takes them
    /// away.
    fn recover(&mut self, ours: Vec<Left>) -> Result<Unreplayed, RecoverError> {
        let mut checked = Vec::new();
        for left in ours {
            let fail = |why| RecoverError {
                path: left.arena.clone(),
                why,
            };
            match self.check(left.clone()) {
                Ok(found) => checked.extend(found),
                Err(why) if self.doubt == Doubtful::Discard => match why.discarded() {
                    Discarded::Removed => discard(&left)?,
                    Discarded::SetAside => discard_aside(&left)?,
                    Discarded::Not => return Err(fail(why)),
                },
                Err(why) => return Err(fail(why)),
            }
        }
        let mut unreplayed = Unreplayed::default();
        for Checked { left, old, _lock } in checked {
            let fail = |why| RecoverError {
                path: left.arena.clone(),
                why,
            };
            let before = unreplayed.pieces.len();
            match self.replay(&old, &left.arena, &mut unreplayed.pieces) {
                Ok(()) => {}
                Err(why)
                    if self.doubt == Doubtful::Discard
                        && why.discarded() == Discarded::SetAside =>
                {
                    unreplayed.pieces.truncate(before);
                    discard_aside(&left)?;
                    continue;
                }
                Err(why) => return Err(fail(why)),
            }
            unreplayed.arenas.push((old, left));
            if unreplayed.pieces.len() == before && before == 0 {
                std::mem::take(&mut unreplayed).settle()?;
            }
        }
        Ok(unreplayed)
    }

    /// Checks one arena, and changes nothing but what is certainly over: `None`
    /// if there is nothing to replay in it.
    fn check(&self, left: Left) -> Result<Option<Checked<'a>>, RecoverTrouble> {
        if left.boot != self.boot {
            set_aside(&left);
            if let Some(record) = &left.record {
                record::remove(record).map_err(|e| RecoverTrouble::Record(e.to_string()))?;
            }
            return Ok(None);
        }
        if !left.arena.exists() {
            return Err(RecoverTrouble::Gone);
        }
        let old = open_patiently(&left.arena).map_err(|e| match e {
            ArenaTrouble::InUse => RecoverTrouble::InUse,
            e => RecoverTrouble::Arena(e),
        })?;
        let is_replayed = self.doubt == Doubtful::Replay;
        if old.head.origin.compare(&self.id, true) != Verdict::Same && !is_replayed {
            return Err(RecoverTrouble::OtherImage);
        }
        if old.head.boot != self.boot {
            log::warn!(
                "arena {} is of another boot and passed over; it held {} sectors",
                left.arena.display(),
                old.sectors()
            );
        }
        if old.head.boot != self.boot || old.sectors() == 0 {
            remove(&left).map_err(|e| e.why)?;
            return Ok(None);
        }
        let size = self.image.bytes().map_err(RecoverTrouble::Replay)?;
        if old.end() > size {
            return Err(RecoverTrouble::Shrunk);
        }
        if !is_replayed {
            self.judge(&old, &left.arena)?;
        }
        if self.image.is_read_only() {
            return Err(RecoverTrouble::ReadOnly);
        }
        // Nobody else may serve a part of what we write.
        let lock = self
            .image
            .lock_besides(old.head.start, old.head.len)
            .map_err(|_| RecoverTrouble::InUse)?;
        Ok(Some(Checked {
            left,
            old,
            _lock: lock,
        }))
    }

    /// Refuses an image that someone else has changed.
    fn judge(&self, old: &OldArena, path: &Path) -> Result<(), RecoverTrouble> {
        match self.image.stamp().map_err(RecoverTrouble::Replay)? {
            Some(now) => match self.seen.judge(&now) {
                Change::None => {}
                Change::Touched => log::warn!(
                    "arena {}: name, owner or permissions of the image were changed after the \
                     target died, but not its content; replayed",
                    path.display()
                ),
                Change::Foreign => return Err(RecoverTrouble::Changed),
            },
            // A device: what was not written must be as it was.
            None => {
                let mut bytes = vec![0; content::PIECE as usize];
                for (at, _, sum) in old.content() {
                    let read = self.image.read_unaligned(&mut bytes, at);
                    if read.is_ok() && content::sum(&bytes) != sum {
                        return Err(RecoverTrouble::Changed);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes all that counts to the image, and syncs it. May be killed anywhere
    /// and done again: the arena stays as it is until then. What single sectors
    /// do not take is added to `unreplayed`.
    fn replay(
        &mut self,
        old: &OldArena,
        path: &Path,
        unreplayed: &mut Vec<(u64, Vec<u8>)>,
    ) -> Result<(), RecoverTrouble> {
        let (image, shadow) = (self.image, &mut self.shadow);
        let (place, fail) = match shadow {
            Some(_) => (
                "the image and its shadow",
                RecoverTrouble::ReplayFrozen as fn(io::Error) -> _,
            ),
            None => ("the image", RecoverTrouble::Replay as fn(io::Error) -> _),
        };
        let before = unreplayed.len();
        // A change of the image is ours from here on.
        let note = || old.note_replay(real_time());
        let room = self.room;
        let plain = |at, bytes: &[u8]| write_or_keep(image, at, bytes, unreplayed, room);
        let below = Unaligned(image);
        let brought = bring(old, &below, shadow.as_deref_mut(), note, plain);
        let kept = bytes_of(unreplayed);
        if is_too_much(unreplayed, room) {
            return Err(RecoverTrouble::TooManyBad(kept / SECTOR));
        }
        brought.map_err(fail)?;
        if let Some(stamp) = image.stamp().map_err(fail)? {
            tell_all(self.peers.iter().map(PathBuf::as_path), &stamp);
        }
        let sectors = old.sectors();
        let bad = bytes_of(&unreplayed[before..]) / SECTOR;
        let done = sectors - bad;
        log::warn!(
            "a target of this image died: {done} acknowledged sectors ({} KiB) brought to {place} \
             from {}",
            done * SECTOR / 1024,
            path.display()
        );
        for (at, bytes) in &unreplayed[before..] {
            log::error!(
                "image {}: {} acknowledged sectors from its sector {} on cannot be written; they stay \
                 in the cache, are tried again, and a host may write them anew",
                image.path().display(),
                bytes.len() as u64 / SECTOR,
                at / SECTOR
            );
        }
        Ok(())
    }
}

/// Brings all that counts in an arena to image and shadow, on stable storage.
/// `note` is called before each write; without a shadow `plain` writes.
pub(super) fn bring<P: Place>(
    old: &OldArena,
    image: &dyn BlockFile,
    mut shadow: Option<&mut FoundShadow<P>>,
    mut note: impl FnMut() -> io::Result<()>,
    mut plain: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    old.replay(|generation, at, bytes| {
        note()?;
        match &mut shadow {
            Some(shadow) => shadow.replay(image, generation, at, bytes),
            None => plain(at, bytes),
        }
    })?;
    // What a merge has brought to the image is there before its bits go.
    if !shadow::fault!("replay-not-synced") {
        image.sync()?;
    }
    match shadow {
        Some(shadow) => shadow.sync(),
        None => Ok(()),
    }
}

/// Opens an arena, which another start may hold for a moment to look at it.
fn open_patiently(path: &Path) -> Result<OldArena, ArenaTrouble> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match OldArena::open(path) {
            Err(ArenaTrouble::InUse) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_RETRY);
            }
            opened => return opened,
        }
    }
}

fn bytes_of(pieces: &[(u64, Vec<u8>)]) -> u64 {
    pieces.iter().map(|(_, bytes)| bytes.len() as u64).sum()
}

/// Whether these pieces are more than the new cache may keep in `room` bytes.
fn is_too_much(pieces: &[(u64, Vec<u8>)], room: u64) -> bool {
    pieces.len() > UNREPLAYED_MAX || bytes_of(pieces) > room
}

/// Writes a run of sectors; those that the disk does not take are kept. Fails
/// when too many are, so that a dead disk is not asked for each of its sectors.
fn write_or_keep(
    image: &Image,
    at: u64,
    bytes: &[u8],
    kept: &mut Vec<(u64, Vec<u8>)>,
    room: u64,
) -> io::Result<()> {
    match image.write_unaligned(bytes, at) {
        Err(e) if is_bad_sector(&e) => {}
        written => return written,
    }
    for (n, sector) in bytes.chunks(SECTOR as usize).enumerate() {
        let at = at + n as u64 * SECTOR;
        match image.write_unaligned(sector, at) {
            Err(e) if is_bad_sector(&e) => match kept.last_mut() {
                Some((first, run)) if *first + run.len() as u64 == at => {
                    run.extend_from_slice(sector);
                }
                _ => kept.push((at, sector.to_vec())),
            },
            written => written?,
        }
    }
    match is_too_much(kept, room) {
        true => Err(io::ErrorKind::Other.into()),
        false => Ok(()),
    }
}

/// Whether an error concerns a place of the disk, and not all of it.
fn is_bad_sector(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EIO | libc::ENODATA | libc::EILSEQ | libc::EREMOTEIO)
    )
}

/// Memory of another boot is gone, or on a disk and out of date: the kernel had
/// written some of it back, and not the rest.
fn set_aside(left: &Left) {
    let held = OldArena::open(&left.arena).map(|arena| arena.sectors());
    let aside = left.arena.with_extension("arena.old");
    let moved = fs::rename(&left.arena, &aside).is_ok();
    match held {
        Ok(sectors) if moved => log::warn!(
            "the machine went down while this image was served: {sectors} sectors that may \
             not be on it are set aside in {}",
            aside.display()
        ),
        _ => log::warn!(
            "the machine went down while this image was served: writes of the last seconds \
             before may be missing"
        ),
    }
}

/// The boot we are in; zeros where /proc does not tell.
fn boot_id() -> [u64; 2] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |range| u64::from_str_radix(digits.get(range).unwrap_or("0"), 16).unwrap_or(0);
    [half(0..16), half(16..32)]
}
