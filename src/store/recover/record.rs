//! The record of an arena in the state directory: where it is, and of which
//! image. It outlives the machine, so that writes which a crash of that took
//! with it are not passed over in silence.
//!
//! TOML. Numbers are text in hexadecimal.
//!
//! ```text
//! version = 2            of aoede 0.1.0: 1
//! arena = "/run/aoede/arena/0123456789abcdef-0.arena"
//! image = "/srv/disk.img"
//! facts = "1 2a .."      the 11 words of shadow::Facts; version 1: device, inode, birth
//! boot_high, boot_low    the boot in which the arena was made
//! start, len             the exported range in bytes
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use shadow::paths::sync_directory;
use shadow::stamp::{Stamp, tell};
use shadow::{Facts, RealFiles, SECTOR, Verdict, replace_text};
use toml::{Table, Value};

use super::super::arena::{Head, ImageId, Origin, V1Id};
use super::super::image::Image;
use super::{RecoverError, RecoverTrouble};

/// What the name of a record ends with.
const RECORD: &str = ".arena.toml";
/// What the name of an arena ends with.
pub(super) const ARENA: &str = ".arena";

/// An arena that a record speaks of, or that was found without one.
#[derive(Clone, Debug)]
pub(super) struct Left {
    /// The record.
    pub record: Option<PathBuf>,
    /// The arena, which may be gone.
    pub arena: PathBuf,
    /// The path of the image then, if the record tells.
    pub image: Option<PathBuf>,
    pub boot: [u64; 2],
    pub origin: Origin,
    /// The exported range: first byte, bytes.
    pub start: u64,
    pub len: u64,
}

impl Left {
    /// Whether the exported ranges share a byte.
    pub fn overlaps(&self, id: &ImageId) -> bool {
        let facts = match self.origin {
            Origin::Facts(facts) => facts,
            Origin::V1(_) => Facts::Unknown,
        };
        facts.shares_bytes((self.start, self.len), &id.facts, (id.start, id.len))
    }

    /// An arena without a record: of a state directory that is gone, perhaps.
    pub fn orphan(path: PathBuf, head: &Head) -> Left {
        Left {
            record: None,
            arena: path,
            image: None,
            boot: head.boot,
            origin: head.origin,
            start: head.start,
            len: head.len,
        }
    }

    /// Believes the arena where it is of another boot than its record says: it was
    /// made under the same name when the record could not be seen.
    pub fn correct(&mut self) {
        if let Some(head) = Head::read(&self.arena).ok().filter(|h| h.boot != self.boot) {
            *self = Left {
                record: self.record.take(),
                ..Left::orphan(self.arena.clone(), &head)
            };
        }
    }

    fn parse(text: &str) -> Option<Left> {
        let table: Table = text.parse().ok()?;
        let string = |key: &str| table.get(key)?.as_str();
        let number = |key: &str| u64::from_str_radix(string(key)?, 16).ok();
        let origin = match table.get("version")?.as_integer()? {
            1 => Origin::V1(V1Id {
                device: number("device")?,
                inode: number("inode")?,
                birth: number("birth")?,
            }),
            2 => Origin::Facts(Facts::from_text(string("facts")?)?),
            _ => return None,
        };
        Some(Left {
            record: None,
            arena: PathBuf::from(string("arena")?),
            image: string("image").map(PathBuf::from),
            boot: [number("boot_high")?, number("boot_low")?],
            origin,
            start: number("start")?,
            len: number("len")?,
        })
    }
}

/// What the names of all arenas and records of an image begin with.
fn stem(id: &ImageId) -> String {
    format!("{:016x}-", id.facts.key())
}

/// The same, as aoede 0.1.0 named them.
fn v1_stem(id: &ImageId) -> String {
    let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
    let mut digest = crc.digest();
    for number in [id.v1.device, id.v1.inode, id.v1.birth] {
        digest.update(&number.to_le_bytes());
    }
    format!("{:016x}-", digest.finalize())
}

/// Paths for a new arena and its record that no file has.
pub(super) fn free_paths(id: &ImageId, arenas: &Path, records: &Path) -> (PathBuf, PathBuf) {
    let mut name = format!("{}{}", stem(id), id.start / SECTOR);
    loop {
        let arena = arenas.join(format!("{name}{ARENA}"));
        let record = records.join(format!("{name}{RECORD}"));
        if !arena.exists() && !record.exists() {
            return (arena, record);
        }
        // One that is kept: of sectors that the disk does not take.
        name.push('a');
    }
}

/// All records, those of the image `id` and of others. One that cannot be read
/// is passed over with a warning, unless its name says that it is of this image.
pub(super) fn all(export: &str, directory: &Path, id: &ImageId) -> Result<Vec<Left>, RecoverError> {
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
        if !path.to_string_lossy().ends_with(RECORD) {
            continue;
        }
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // Its process ended in order just now.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(fail(&path, e.to_string())),
        };
        if let Some(left) = Left::parse(&text) {
            records.push(Left {
                record: Some(path),
                ..left
            });
            continue;
        }
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        if file.starts_with(&stem(id)) || file.starts_with(&v1_stem(id)) {
            return Err(fail(
                &path,
                "it cannot be read; remove it to pass it over".into(),
            ));
        }
        log::warn!(
            "{export}: arena record {}: it cannot be read, and is passed over, being of another image",
            path.display()
        );
    }
    Ok(records)
}

/// The record of our own arena.
#[derive(Debug)]
pub struct Record {
    export: String,
    path: PathBuf,
    id: ImageId,
    boot: [u64; 2],
}

impl Record {
    /// Puts it on stable storage.
    pub(super) fn write(
        export: &str,
        path: &Path,
        arena: &Path,
        image: &Path,
        boot: [u64; 2],
        id: &ImageId,
    ) -> io::Result<Record> {
        let mut table = Table::new();
        let text = |path: &Path| -> io::Result<Value> {
            let text = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
            Ok(Value::String(text.to_owned()))
        };
        table.insert("version".into(), Value::Integer(2));
        table.insert("arena".into(), text(arena)?);
        // Only told to people; one that is no text is left out.
        if let Ok(image) = text(image) {
            table.insert("image".into(), image);
        }
        table.insert("facts".into(), Value::String(id.facts.to_text()));
        for (key, number) in [
            ("boot_high", boot[0]),
            ("boot_low", boot[1]),
            ("start", id.start),
            ("len", id.len),
        ] {
            table.insert(key.into(), Value::String(format!("{number:016x}")));
        }
        let directory = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(directory)?;
        replace_text(&RealFiles, path, &table.to_string())?;
        Ok(Record {
            export: export.to_owned(),
            path: path.to_owned(),
            id: *id,
            boot,
        })
    }

    /// Takes the record away, and then its arena with `remove_arena`; only when
    /// nothing in that is needed. An arena whose record cannot be removed stays: a
    /// record without one stands for writes that are lost.
    pub fn remove_with(
        self,
        image: &Image,
        remove_arena: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        if let Ok(Some(stamp)) = image.stamp() {
            let others = all(&self.export, directory, &self.id).unwrap_or_default();
            let others = others.iter().filter(|left| {
                left.boot == self.boot
                    && left.record.as_deref() != Some(&self.path)
                    && left.origin.compare(&self.id, true) == Verdict::Same
            });
            tell_all(
                &self.export,
                others.map(|left| left.arena.as_path()),
                &stamp,
            );
        }
        remove(&self.path)?;
        remove_arena()
    }
}

/// Tells arenas that the change of the image is none of a stranger.
pub(super) fn tell_all<'a>(export: &str, arenas: impl Iterator<Item = &'a Path>, stamp: &Stamp) {
    for arena in arenas {
        match tell(arena, stamp) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => log::warn!(
                "{export}: arena {}: it cannot be told that the image was changed ({e}), and may be refused \
                 for that; --replay-arena says that the image is the right one",
                arena.display()
            ),
            _ => {}
        }
    }
}

/// Takes a record away for good.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync_directory(path)
}

#[cfg(test)]
mod tests {
    use super::super::super::image::{ImageOptions, Window};
    use super::*;

    #[test]
    fn records_of_both_versions_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let id = ImageId {
            start: 512,
            len: 1024,
            ..ImageId::default()
        };
        let path = dir.path().join("state/x.arena.toml");
        let arena = Path::new("/run/a.arena");
        Record::write("e1.1", &path, arena, Path::new("/disk \"1\""), [1, 2], &id).unwrap();
        let records = all("e1.1", path.parent().unwrap(), &id).unwrap();
        let [left] = &records[..] else {
            panic!("{records:?}")
        };
        assert_eq!(left.record.as_deref(), Some(&*path));
        assert_eq!((left.boot, left.start, left.len), ([1, 2], 512, 1024));
        assert_eq!(left.image.as_deref(), Some(Path::new("/disk \"1\"")));
        assert_eq!(left.origin, Origin::Facts(Facts::Unknown));
        let v1 = "version = 1\narena = \"/a\"\nboot_high = \"1\"\nboot_low = \"2\"\n\
                  device = \"801\"\ninode = \"c\"\nbirth = \"0\"\nstart = \"0\"\nlen = \"ff\"\n";
        let left = Left::parse(v1).unwrap();
        let v1_id = V1Id {
            device: 0x801,
            inode: 12,
            birth: 0,
        };
        assert_eq!((left.origin, left.len), (Origin::V1(v1_id), 255));
        for bad in ["", "version = 3", "version = 2", &v1.replace("801", "x")] {
            assert!(Left::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn an_arena_whose_record_cannot_be_removed_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.img");
        fs::write(&file, [0; 512]).unwrap();
        let image = Image::open(&ImageOptions {
            path: file.clone(),
            create: None,
            direct: false,
            read_only: false,
            window: Window::default(),
            force: false,
        });
        let image = image.unwrap();
        let path = dir.path().join("x.arena.toml");
        let make = || Record::write("e1.1", &path, &file, &file, [1, 2], &image.id()).unwrap();
        let mut removed = 0;
        let record = make();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let mut remove = || {
            removed += 1;
            Ok(())
        };
        record.remove_with(&image, &mut remove).unwrap_err();
        fs::remove_dir(&path).unwrap();
        make().remove_with(&image, &mut remove).unwrap();
        assert_eq!(removed, 1);
    }

    #[test]
    fn a_name_that_is_taken_is_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let id = ImageId::default();
        let free = || free_paths(&id, dir.path(), dir.path());
        let (arena, record) = free();
        fs::write(&arena, "").unwrap();
        let (next, next_record) = free();
        assert!(next != arena && next_record != record);
        fs::write(&next_record, "").unwrap();
        assert_ne!(free().0, next);
    }
}
