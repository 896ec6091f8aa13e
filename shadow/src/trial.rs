//! Disks that fail, for tests of this crate and of those above it.
//!
//! A [`Disk`] has several files, each a [`BlockFile`], and counts what is done
//! to all of them. It can refuse one operation, or lose power at one; what was
//! not synced by then is kept, lost or torn, sector by sector. Files may have
//! names: of the changes of names in a directory since its last sync, a cut of
//! the power keeps the first few.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::extent::SECTOR;
use crate::file::BlockFile;
use crate::files::Files;

/// The most bytes of a text file.
const TEXT_MAX: u64 = 64 << 10;

type Sector = [u8; SECTOR as usize];

/// What becomes of writes that were not synced when the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All are gone.
    Lost,
    /// All are there.
    Kept,
    /// Of each sector one of the contents it had since the last sync, by this
    /// seed.
    Torn(u64),
}

/// Numbers that look random and are the same for the same seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice that fall the same way for the same seed.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// A number below `sides`; 0 for no sides.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)).checked_rem(sides).unwrap_or(0)
    }
}

/// A file by its sectors; those that are not there are zeros.
#[derive(Clone, Debug, Default)]
struct Content {
    len: u64,
    /// What a read shows.
    now: BTreeMap<u64, Sector>,
    /// What is there when the power comes back.
    stable: BTreeMap<u64, Sector>,
    /// What each sector was since the last sync, in order.
    unsynced: BTreeMap<u64, Vec<Sector>>,
}

impl Content {
    /// The whole file, where its sectors are these.
    fn bytes_of(&self, sectors: &BTreeMap<u64, Sector>) -> Vec<u8> {
        let mut bytes = vec![0; self.len.next_multiple_of(SECTOR) as usize];
        for (sector, content) in sectors {
            let at = (sector * SECTOR) as usize;
            if let Some(place) = bytes.get_mut(at..at + content.len()) {
                place.copy_from_slice(content);
            }
        }
        bytes.truncate(self.len as usize);
        bytes
    }

    /// Lets each sector that was not synced become what fate says.
    fn settle(&mut self, fate: Fate) {
        let mut dice = Dice::new(if let Fate::Torn(seed) = fate { seed } else { 0 });
        for (sector, versions) in std::mem::take(&mut self.unsynced) {
            let pick = match fate {
                Fate::Lost => 0,
                Fate::Kept => versions.len(),
                Fate::Torn(_) => dice.roll(versions.len() as u64 + 1) as usize,
            };
            if let Some(version) = pick.checked_sub(1).and_then(|i| versions.get(i)) {
                self.stable.insert(sector, *version);
            }
        }
    }

    fn put(&mut self, sector: u64, content: Sector) {
        self.now.insert(sector, content);
        self.unsynced.entry(sector).or_default().push(content);
    }
}

/// The names in a directory, and the file that each stands for.
#[derive(Clone, Debug, Default)]
struct Directory {
    now: BTreeMap<PathBuf, usize>,
    stable: BTreeMap<PathBuf, usize>,
    /// All names after each change since the last sync, in order.
    unsynced: Vec<BTreeMap<PathBuf, usize>>,
}

impl Directory {
    /// Lets the changes that were not synced become what fate says: a journal
    /// keeps their order.
    fn settle(&mut self, fate: Fate) {
        let versions = std::mem::take(&mut self.unsynced);
        let kept = match fate {
            Fate::Lost => 0,
            Fate::Kept => versions.len(),
            Fate::Torn(seed) => Dice::new(seed).roll(versions.len() as u64 + 1) as usize,
        };
        if let Some(version) = kept
            .checked_sub(1)
            .and_then(|i| versions.into_iter().nth(i))
        {
            self.stable = version;
        }
    }
}

#[derive(Debug, Default)]
struct World {
    files: Vec<Content>,
    directories: BTreeMap<PathBuf, Directory>,
    operations: u64,
    fail_at: Option<u64>,
    cut_at: Option<u64>,
    dead: bool,
    fork_at: Option<u64>,
    fork: Option<Box<World>>,
}

/// What becomes of an operation.
enum Turn {
    Done,
    Failed,
    Cut,
}

impl World {
    fn turn(&mut self) -> Turn {
        let number = self.operations;
        if self.fork_at == Some(number) {
            self.fork_at = None;
            self.fork = Some(Box::new(self.copy()));
        }
        self.operations += 1;
        if self.dead {
            return Turn::Cut;
        }
        if self.cut_at == Some(number) {
            self.dead = true;
            return Turn::Cut;
        }
        if self.fail_at == Some(number) {
            return Turn::Failed;
        }
        Turn::Done
    }

    /// The same files and names, with nothing told to fail.
    fn copy(&self) -> World {
        World {
            files: self.files.clone(),
            directories: self.directories.clone(),
            ..World::default()
        }
    }
}

/// The directory that a name is in.
fn directory_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_owned()
}

/// A disk of files in memory, which can fail and lose its power.
#[derive(Clone, Debug)]
pub struct Disk(Arc<Mutex<World>>);

/// A file of a [`Disk`].
#[derive(Clone, Debug)]
pub struct TrialFile {
    disk: Disk,
    index: usize,
}

impl Disk {
    /// A disk with files of zeros of these lengths in bytes.
    pub fn new(lens: &[u64]) -> Disk {
        let file = |len: &u64| Content {
            len: *len,
            ..Content::default()
        };
        Disk(Arc::new(Mutex::new(World {
            files: lens.iter().map(file).collect(),
            ..World::default()
        })))
    }

    /// One of its files, by its place in the list it was made with.
    pub fn file(&self, index: usize) -> TrialFile {
        TrialFile {
            disk: self.clone(),
            index,
        }
    }

    /// How many reads, writes and syncs it has seen.
    pub fn operations(&self) -> u64 {
        self.world().operations
    }

    /// Refuses the operation of this number, counted from 0: a write is done in
    /// part; of a sync it is not known what it did, and a later one does not
    /// make up for it.
    pub fn fail_at(&self, number: u64) {
        self.world().fail_at = Some(number);
    }

    /// Loses power in the operation of this number; all after it fail as well.
    pub fn cut_at(&self, number: u64) {
        self.world().cut_at = Some(number);
    }

    /// Another disk that is the same in all, with nothing told to fail: what the
    /// next process finds when one ends and the power stays.
    pub fn copy(&self) -> Disk {
        let copy = self.world().copy();
        Disk(Arc::new(Mutex::new(copy)))
    }

    /// Refuses no operation any more that was told to fail and has not.
    pub fn fail_none(&self) {
        self.world().fail_at = None;
    }

    /// Keeps a copy of the disk as it is before the operation of this number.
    pub fn fork_at(&self, number: u64) {
        self.world().fork_at = Some(number);
    }

    /// The copy, if that operation has come; in any case none is kept any more.
    pub fn take_fork(&self) -> Option<Disk> {
        let mut world = self.world();
        world.fork_at = None;
        let fork = world.fork.take()?;
        Some(Disk(Arc::new(Mutex::new(*fork))))
    }

    /// Whether the power went.
    pub fn is_dead(&self) -> bool {
        self.world().dead
    }

    /// The disk when the power is back: another one, with what this one has on
    /// stable storage. Cuts the power now if it is still there.
    pub fn restart(&self, fate: Fate) -> Disk {
        let mut world = self.world().copy();
        let nth = |i: usize| match fate {
            Fate::Torn(seed) => Fate::Torn(seed.wrapping_add(i as u64)),
            other => other,
        };
        for (i, content) in world.files.iter_mut().enumerate() {
            content.settle(nth(i));
            content.now = content.stable.clone();
        }
        for (i, directory) in world.directories.values_mut().enumerate() {
            directory.settle(nth(i));
            directory.now = directory.stable.clone();
        }
        Disk(Arc::new(Mutex::new(world)))
    }

    /// Makes a file of zeros that has no name yet.
    pub fn new_file(&self, len: u64) -> TrialFile {
        let mut world = self.world();
        world.files.push(Content {
            len,
            ..Content::default()
        });
        TrialFile {
            disk: self.clone(),
            index: world.files.len() - 1,
        }
    }

    /// Gives a file a name that nothing has.
    pub fn name(&self, file: &TrialFile, path: &Path) -> io::Result<()> {
        let index = file.index;
        self.change_names(path, |names| match names.get(path) {
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            None => {
                names.insert(path.to_owned(), index);
                Ok(())
            }
        })
    }

    /// The same file of another disk, such as a copy.
    pub fn on(&self, file: &TrialFile) -> TrialFile {
        TrialFile {
            disk: self.clone(),
            index: file.index,
        }
    }

    /// The file of a name.
    pub fn open(&self, path: &Path) -> io::Result<TrialFile> {
        let world = self.world();
        let names = world.directories.get(&directory_of(path));
        match names.and_then(|directory| directory.now.get(path)) {
            Some(index) => Ok(TrialFile {
                disk: self.clone(),
                index: *index,
            }),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The names in a directory.
    pub fn names(&self, directory: &Path) -> Vec<PathBuf> {
        let world = self.world();
        let directory = world.directories.get(directory);
        directory.map_or(Vec::new(), |d| d.now.keys().cloned().collect())
    }

    /// Renames a file within its directory; what had the new name is gone.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change_names(from, |names| {
            let index = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            names.insert(to.to_owned(), index);
            Ok(())
        })
    }

    /// Exchanges two names of one directory.
    pub fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.change_names(one, |names| {
            let first = *names.get(one).ok_or(io::ErrorKind::NotFound)?;
            let second = names.get_mut(other).ok_or(io::ErrorKind::NotFound)?;
            let second = std::mem::replace(second, first);
            names.insert(one.to_owned(), second);
            Ok(())
        })
    }

    /// Removes a name.
    pub fn unname(&self, path: &Path) -> io::Result<()> {
        self.change_names(path, |names| match names.remove(path) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        })
    }

    /// Brings the names in the directory of `path` to stable storage.
    pub fn sync_names(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world();
        let turn = world.turn();
        let directory = world.directories.entry(directory_of(path)).or_default();
        match turn {
            Turn::Done => {
                directory.settle(Fate::Kept);
                Ok(())
            }
            _ => Err(broken()),
        }
    }

    fn change_names(
        &self,
        path: &Path,
        change: impl FnOnce(&mut BTreeMap<PathBuf, usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut world = self.world();
        match world.turn() {
            Turn::Done => {
                let directory = world.directories.entry(directory_of(path)).or_default();
                change(&mut directory.now)?;
                directory.unsynced.push(directory.now.clone());
                Ok(())
            }
            _ => Err(broken()),
        }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn broken() -> io::Error {
    io::Error::other("the disk failed, as it was told to")
}

impl Files for Disk {
    type File = TrialFile;

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.names(directory))
    }

    fn make_directory(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<TrialFile> {
        let file = self.new_file(TEXT_MAX);
        self.name(&file, path)?;
        Ok(file)
    }

    fn read_text(&self, path: &Path) -> io::Result<String> {
        // Files keep their length here: what is not written is zeros.
        let mut bytes = self.open(path)?.bytes();
        bytes.truncate(bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1));
        String::from_utf8(bytes).map_err(io::Error::other)
    }

    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.unname(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.sync_names(path)
    }
}

impl TrialFile {
    /// `true` if both are the same file.
    pub fn is_same(&self, other: &TrialFile) -> bool {
        self.index == other.index
    }

    /// All that a read shows now.
    pub fn bytes(&self) -> Vec<u8> {
        let world = self.disk.world();
        let Some(content) = world.files.get(self.index) else {
            return Vec::new();
        };
        content.bytes_of(&content.now)
    }

    /// All of it that is on stable storage for certain.
    pub fn stable_bytes(&self) -> Vec<u8> {
        let world = self.disk.world();
        let Some(content) = world.files.get(self.index) else {
            return Vec::new();
        };
        content.bytes_of(&content.stable)
    }

    fn with<R>(&self, f: impl FnOnce(&mut Content, Turn, u64) -> io::Result<R>) -> io::Result<R> {
        let mut world = self.disk.world();
        let turn = world.turn();
        let number = world.operations;
        match world.files.get_mut(self.index) {
            Some(content) => f(content, turn, number),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// The sectors of a range, and for each where it begins in the sector, where in
/// the range, and how many bytes.
fn sectors(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let inside = (at % SECTOR) as usize;
        let count = (SECTOR as usize - inside).min(len - done);
        let item = (at / SECTOR, inside, done, count);
        done += count;
        Some(item)
    })
}

impl BlockFile for TrialFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|content, turn, _| {
            if !matches!(turn, Turn::Done) {
                return Err(broken());
            }
            let end = offset.checked_add(buf.len() as u64);
            if end.is_none_or(|end| end > content.len) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for (sector, inside, at, count) in sectors(offset, buf.len()) {
                match content.now.get(&sector) {
                    Some(s) => buf[at..at + count].copy_from_slice(&s[inside..inside + count]),
                    None => buf[at..at + count].fill(0),
                }
            }
            Ok(())
        })
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.with(|content, turn, number| {
            let end = offset.checked_add(data.len() as u64);
            if end.is_none_or(|end| end > content.len) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let mut dice = Dice::new(number);
            for (sector, inside, at, count) in sectors(offset, data.len()) {
                if matches!(turn, Turn::Failed) && dice.roll(2) == 0 {
                    continue;
                }
                let now = content.now.get(&sector).copied();
                let mut bytes = now.unwrap_or([0; SECTOR as usize]);
                bytes[inside..inside + count].copy_from_slice(&data[at..at + count]);
                content.put(sector, bytes);
            }
            match turn {
                Turn::Done => Ok(()),
                _ => Err(broken()),
            }
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|content, turn, number| match turn {
            Turn::Done => {
                content.settle(Fate::Kept);
                Ok(())
            }
            Turn::Failed => {
                // As Linux does it: reads go on showing it, and it is not
                // dirty any more.
                content.settle(Fate::Torn(number));
                Err(broken())
            }
            Turn::Cut => Err(broken()),
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.with(|content, turn, _| match turn {
            Turn::Done => {
                let next = content.now.range(offset / SECTOR..).next();
                Ok(next.map(|(sector, _)| (sector * SECTOR).max(offset)))
            }
            _ => Err(broken()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_survives_and_the_rest_has_its_fate() {
        let disk = Disk::new(&[4096, 512]);
        let file = disk.file(0);
        file.write_at(&[1; 2048], 0).unwrap();
        file.sync().unwrap();
        file.write_at(&[2; 1024], 512).unwrap();
        file.write_at(&[3; 100], 600).unwrap();
        assert_eq!(disk.operations(), 4);
        let sector = |fate, at: usize| disk.restart(fate).file(0).bytes()[at];
        assert_eq!((sector(Fate::Lost, 512), sector(Fate::Lost, 600)), (1, 1));
        assert_eq!((sector(Fate::Kept, 512), sector(Fate::Kept, 600)), (2, 3));
        let mut seen = [false; 3];
        for seed in 0..64 {
            let bytes = disk.restart(Fate::Torn(seed)).file(0).bytes();
            let first = (bytes[512], bytes[600]);
            seen[[(1, 1), (2, 2), (2, 3)]
                .iter()
                .position(|s| *s == first)
                .unwrap()] = true;
            assert!(bytes[..512].iter().all(|b| *b == 1));
        }
        assert_eq!(seen, [true; 3]);
    }

    #[test]
    fn names_survive_once_their_directory_is_synced() {
        let [a, b, c] = ["d/a", "d/b", "e/c"].map(Path::new);
        let disk = Disk::new(&[]);
        disk.name(&disk.new_file(512), a).unwrap();
        disk.sync_names(a).unwrap();
        disk.rename(a, b).unwrap();
        disk.name(&disk.new_file(512), c).unwrap();
        disk.sync_names(c).unwrap();
        disk.unname(b).unwrap();
        assert!(disk.names(Path::new("d")).is_empty());
        let after = |fate| disk.restart(fate).names(Path::new("d"));
        assert_eq!(after(Fate::Lost), [a]);
        assert!(after(Fate::Kept).is_empty());
        let mut seen = [false; 3];
        for seed in 0..64 {
            let names = after(Fate::Torn(seed));
            seen[match names.as_slice() {
                [] => 0,
                [name] if name == a => 1,
                [name] if name == b => 2,
                _ => unreachable!("{names:?}"),
            }] = true;
            assert!(disk.restart(Fate::Torn(seed)).open(c).is_ok());
        }
        assert_eq!(seen, [true; 3]);
        let (x, y) = (disk.new_file(1), disk.new_file(2));
        disk.name(&x, a).unwrap();
        disk.name(&y, b).unwrap();
        assert!(disk.name(&y, b).is_err());
        disk.exchange(a, b).unwrap();
        assert_eq!(disk.open(a).unwrap().bytes().len(), 2);
    }

    #[test]
    fn it_fails_once_or_dies_for_good() {
        let disk = Disk::new(&[4096]);
        let file = disk.file(0);
        disk.fail_at(1);
        file.write_at(&[1; 4096], 0).unwrap();
        assert!(file.sync().is_err());
        // The sync after one that failed does not bring it back.
        file.sync().unwrap();
        assert_eq!(file.bytes(), [1; 4096]);
        assert_ne!(disk.restart(Fate::Kept).file(0).bytes(), [1; 4096]);
        disk.cut_at(3);
        assert!(file.write_at(&[2; 512], 0).is_err());
        assert!(disk.is_dead() && file.read_at(&mut [0], 0).is_err());
        assert_eq!(disk.restart(Fate::Kept).file(0).bytes()[0], 2);
    }
}
