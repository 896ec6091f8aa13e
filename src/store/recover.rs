//! Finding the arena again: what a process that died has left is brought to
//! the image before anyone is answered, and never silently passed over.
//!
//! The state directory keeps a record of each arena, made before the first
//! write that depends on it: which file, of which image and window, in which
//! boot. A start reads the records of its image; whose window overlaps ours
//! belongs to a process that is dead, since we hold the lock.

mod error;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;
use shadow::paths::sync_directory;
use shadow::{BlockFile, RealFiles, SECTOR, replace_text};
use toml::{Table, Value};

pub use error::{RecoverError, RecoverTrouble};

use super::arena::{Arena, ArenaTrouble, ImageId, OldArena, Pulse};
use super::disk::Backing;
use super::image::Image;
use super::shadow::FoundShadow;

/// Bytes of a cache's block, unless the disk wants larger ones.
const BLOCK: usize = 4096;
/// The least cache that is of any use, in blocks.
const SLOTS_MIN: u64 = 64;
/// How much later than its process was last seen alive an image may have been
/// changed by it: writes under way when it died.
const ALIVE_SLACK: u64 = 2_000_000_000;

/// Where an arena is kept, and how large.
#[derive(Clone, Debug)]
pub struct ArenaOptions {
    /// Where the records are.
    pub state_dir: PathBuf,
    /// Where the arena goes; otherwise memory that lives until the next boot.
    pub run_dir: Option<PathBuf>,
    /// Bytes of cache.
    pub cache_size: u64,
    /// Gives up what an arena holds that cannot be used.
    pub discard: bool,
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
}

/// The record of an arena.
#[derive(Debug)]
pub struct Record {
    path: PathBuf,
    id: ImageId,
    boot: [u64; 2],
}

impl Record {
    /// Takes the record away; only when nothing in the arena is needed.
    pub fn remove(self) -> io::Result<()> {
        // What other windows of the image have left must not take our changes
        // for those of a stranger.
        for other in self.others() {
            if let Ok(mut pulse) = Pulse::open(&other) {
                pulse.set_alive(pulse.alive().max(real_time()));
            }
        }
        remove_record(&self.path)
    }

    /// The arenas of other windows of the same image.
    fn others(&self) -> Vec<PathBuf> {
        let directory = self.path.parent().unwrap_or(&self.path);
        let Ok(list) = records_of(directory, &self.id) else {
            return Vec::new();
        };
        list.into_iter()
            .filter(|(_, left)| left.boot == self.boot && !left.id.overlaps(&self.id))
            .map(|(_, left)| left.path)
            .collect()
    }
}

fn remove_record(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync_directory(path)
}

/// The kernel's real-time clock, in nanoseconds, by which files are stamped.
fn real_time() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
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
    let (ours, others): (Vec<_>, Vec<_>) = records_of(&options.state_dir, &id)?
        .into_iter()
        .partition(|(_, left)| left.id.overlaps(&id));
    // When any export of the image was last known to live.
    let alive = ours.iter().chain(&others);
    let alive = alive.filter(|(_, left)| left.boot == boot);
    let alive = alive.filter_map(|(_, left)| Pulse::open(&left.path).ok());
    let block = block_bytes(image, shadow.as_deref());
    let mut scene = Scene {
        shadow,
        image,
        id,
        boot,
        alive: alive.map(|pulse| pulse.alive()).max().unwrap_or(0),
        discard: options.discard,
    };
    for (path, left) in ours {
        scene.recover(&path, &left)?;
    }
    if image.is_read_only() {
        let arena = anonymous(&options.state_dir, block, options.cache_size)?;
        return Ok(Prepared {
            arena,
            write_through: false,
            record: None,
        });
    }
    let directory = options.run_dir.clone().unwrap_or_else(default_run_dir);
    let path = directory.join(format!("{}.arena", name(&id)));
    if path.exists() {
        // No record speaks of it, but it is here: of a state directory that is
        // gone, perhaps.
        let orphan = Left {
            path: path.clone(),
            boot,
            id,
        };
        scene.recover_arena(&orphan, None)?;
    }
    match make(&directory, &path, boot, &id, block, options) {
        Ok((mut arena, record)) => {
            // Its last change may bear a time to come, and is no stranger's
            // who came after us.
            if let Ok((Some(changed), _)) = image.changed_and_size() {
                arena.set_alive(changed);
            }
            Ok(Prepared {
                arena,
                write_through: false,
                record: Some(record),
            })
        }
        Err(e) => {
            log::warn!(
                "no arena in {} ({e}): writes go through to the image before they are \
                 acknowledged, which is slower; --run-dir and --state-dir name other places",
                directory.display()
            );
            let arena = anonymous(&path, block, options.cache_size)?;
            Ok(Prepared {
                arena,
                write_through: true,
                record: None,
            })
        }
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
    path: &Path,
    boot: [u64; 2],
    id: &ImageId,
    block: usize,
    options: &ArenaOptions,
) -> io::Result<(Arena, Record)> {
    fs::create_dir_all(directory)?;
    if statfs(directory)?.filesystem_type() != TMPFS_MAGIC {
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
    let arena = Arena::create(path, boot, id, block, slots)?;
    let written = write_record(options, path, boot, id).map_err(|e| {
        // Without its record it must not be used; the error is told.
        let _ = fs::remove_file(path);
        let kept = options.state_dir.display();
        io::Error::new(
            e.kind(),
            format!("its record cannot be kept in {kept}: {e}"),
        )
    });
    Ok((arena, written?))
}

fn write_record(
    options: &ArenaOptions,
    arena: &Path,
    boot: [u64; 2],
    id: &ImageId,
) -> io::Result<Record> {
    let mut table = Table::new();
    let number = |n: u64| Value::String(format!("{n:016x}"));
    table.insert("version".into(), Value::Integer(1));
    let text = arena.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    table.insert("arena".into(), Value::String(text.to_owned()));
    let numbers = [
        ("boot_high", boot[0]),
        ("boot_low", boot[1]),
        ("device", id.device),
        ("inode", id.inode),
        ("birth", id.birth),
        ("start", id.start),
        ("len", id.len),
    ];
    for (key, value) in numbers {
        table.insert(key.into(), number(value));
    }
    fs::create_dir_all(&options.state_dir)?;
    let path = options.state_dir.join(format!("{}.arena.toml", name(id)));
    replace_text(&RealFiles, &path, &table.to_string())?;
    Ok(Record {
        path,
        id: *id,
        boot,
    })
}

/// What a record says.
struct Left {
    path: PathBuf,
    boot: [u64; 2],
    id: ImageId,
}

impl Left {
    fn parse(text: &str) -> Option<Left> {
        let table: Table = text.parse().ok()?;
        let number = |key: &str| u64::from_str_radix(table.get(key)?.as_str()?, 16).ok();
        if table.get("version")?.as_integer()? != 1 {
            return None;
        }
        Some(Left {
            path: PathBuf::from(table.get("arena")?.as_str()?),
            boot: [number("boot_high")?, number("boot_low")?],
            id: ImageId {
                device: number("device")?,
                inode: number("inode")?,
                birth: number("birth")?,
                start: number("start")?,
                len: number("len")?,
            },
        })
    }
}

/// The records of an image, of all its windows.
fn records_of(directory: &Path, id: &ImageId) -> Result<Vec<(PathBuf, Left)>, RecoverError> {
    let fail = |path: &Path, what: String| RecoverError {
        path: path.to_owned(),
        why: RecoverTrouble::Record(what),
    };
    let list = match fs::read_dir(directory) {
        Ok(list) => list,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(directory, e.to_string())),
    };
    let mut records = Vec::new();
    for entry in list {
        let path = entry.map_err(|e| fail(directory, e.to_string()))?.path();
        if !path.to_string_lossy().ends_with(".arena.toml") {
            continue;
        }
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // Its process ended in order just now.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(fail(&path, e.to_string())),
        };
        let Some(left) = Left::parse(&text) else {
            // Its name says of which image it is, as far as a name can.
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            if file.starts_with(&image_name(id)) {
                return Err(fail(
                    &path,
                    "it cannot be read; remove it to pass it over".into(),
                ));
            }
            log::warn!(
                "arena record {}: it cannot be read, and is passed over, being of another image",
                path.display()
            );
            continue;
        };
        if left.id.is_same_image(id) {
            records.push((path, left));
        }
    }
    Ok(records)
}

/// What a start finds.
struct Scene<'a> {
    image: &'a Image,
    shadow: Option<&'a mut FoundShadow>,
    id: ImageId,
    boot: [u64; 2],
    /// When an export of the image was last known to live.
    alive: u64,
    discard: bool,
}

impl Scene<'_> {
    /// Brings what a record speaks of to the image, and takes both away.
    fn recover(&mut self, record: &Path, left: &Left) -> Result<(), RecoverError> {
        let gone = |e: io::Error| RecoverError {
            path: record.to_owned(),
            why: RecoverTrouble::Record(e.to_string()),
        };
        if left.boot != self.boot {
            set_aside(left);
            return remove_record(record).map_err(gone);
        }
        if left.path.exists() {
            return self.recover_arena(left, Some(record));
        }
        if self.discard {
            log::warn!("arena {} given up, as told", left.path.display());
            return remove_record(record).map_err(gone);
        }
        Err(RecoverError {
            path: left.path.clone(),
            why: RecoverTrouble::Gone,
        })
    }

    fn recover_arena(&mut self, left: &Left, record: Option<&Path>) -> Result<(), RecoverError> {
        let fail = |why| RecoverError {
            path: left.path.clone(),
            why,
        };
        let done = match OldArena::open(&left.path) {
            Ok(old) if old.boot != self.boot => {
                log::warn!(
                    "arena {} is of another boot and passed over; it held {} sectors",
                    left.path.display(),
                    old.sectors()
                );
                Ok(())
            }
            Ok(old) if !old.image.is_same_image(&self.id) => Err(RecoverTrouble::OtherImage),
            Ok(old) => self.replay(old, &left.path),
            Err(e) => Err(RecoverTrouble::Arena(e)),
        };
        match done {
            Ok(()) => {}
            Err(
                why @ (RecoverTrouble::Replay(_)
                | RecoverTrouble::ReplayFrozen(_)
                | RecoverTrouble::InUse),
            ) => {
                return Err(fail(why));
            }
            Err(_) if self.discard => {
                log::warn!("arena {} given up, as told", left.path.display());
            }
            Err(why) => return Err(fail(why)),
        }
        // The record first: one whose arena is gone stands for writes that are
        // lost.
        let removed = record.map_or(Ok(()), remove_record);
        removed
            .and_then(|()| fs::remove_file(&left.path))
            .map_err(|e| fail(RecoverTrouble::Replay(e)))
    }

    /// Writes all that counts to the image, and syncs it. May be killed anywhere
    /// and done again: the arena stays as it is until then.
    fn replay(&mut self, mut old: OldArena, path: &Path) -> Result<(), RecoverTrouble> {
        let sectors = old.sectors();
        if sectors == 0 {
            return Ok(());
        }
        let image = self.image;
        let (changed, size) = image.changed_and_size().map_err(RecoverTrouble::Replay)?;
        if old.end() > size {
            return Err(RecoverTrouble::Shrunk);
        }
        let alive = old.alive.max(self.alive);
        if changed.is_some_and(|at| at > alive.saturating_add(ALIVE_SLACK)) {
            return Err(RecoverTrouble::Changed);
        }
        // Nobody else may serve a part of what we write.
        let _lock = image
            .lock_besides(old.image.start, old.image.len)
            .map_err(|_| RecoverTrouble::InUse)?;
        // What we change now is no stranger's change to who comes after us.
        let mut pulse = Pulse::open(path).map_err(RecoverTrouble::Arena)?;
        let shadow = &mut self.shadow;
        let (place, fail) = match shadow {
            Some(_) => (
                "the image and its shadow",
                RecoverTrouble::ReplayFrozen as fn(io::Error) -> _,
            ),
            None => ("the image", RecoverTrouble::Replay as fn(io::Error) -> _),
        };
        old.replay(|generation, at, bytes| {
            pulse.set_alive(real_time());
            match shadow {
                Some(shadow) => shadow.replay(image, generation, at, bytes),
                None => image.write_unaligned(bytes, at),
            }
        })
        .map_err(fail)?;
        // What a merge has brought to the image is there before its bits go.
        if !shadow::fault!("replay-not-synced") {
            image.sync().map_err(fail)?;
        }
        if let Some(shadow) = shadow {
            shadow.sync().map_err(fail)?;
        }
        old.retire();
        log::warn!(
            "a target of this image died: {sectors} acknowledged sectors ({} KiB) brought to {place} \
             from {}",
            sectors * SECTOR / 1024,
            path.display()
        );
        Ok(())
    }
}

/// Memory of another boot is gone, or on a disk and out of date: the kernel had
/// written some of it back, and not the rest.
fn set_aside(left: &Left) {
    let held = OldArena::open(&left.path).map(|arena| arena.sectors());
    let aside = left.path.with_extension("arena.old");
    let moved = fs::rename(&left.path, &aside).is_ok();
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

/// What the names of all windows of an image begin with.
fn image_name(id: &ImageId) -> String {
    let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
    let mut digest = crc.digest();
    for number in [id.device, id.inode, id.birth] {
        digest.update(&number.to_le_bytes());
    }
    format!("{:016x}-", digest.finalize())
}

fn name(id: &ImageId) -> String {
    format!("{}{}", image_name(id), id.start / SECTOR)
}

/// The boot we are in; zeros where /proc does not tell.
fn boot_id() -> [u64; 2] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |range| u64::from_str_radix(digits.get(range).unwrap_or("0"), 16).unwrap_or(0);
    [half(0..16), half(16..32)]
}

/// Memory that lives until the next boot: /run where that is memory, else
/// /dev/shm.
fn default_run_dir() -> PathBuf {
    let run = Path::new("/run");
    let is_memory = |path: &Path| statfs(path).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC);
    if is_memory(run) || !is_memory(Path::new("/dev/shm")) {
        PathBuf::from("/run/aoede")
    } else {
        PathBuf::from("/dev/shm/aoede")
    }
}
