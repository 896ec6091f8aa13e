//! The record of where an image's shadow is, so that a start that was not given
//! it does not serve an image that is out of date.

use std::io;
use std::path::{Path, PathBuf};

use shadow::{Difference, Facts, Files, Identity, replace_text};
use toml::{Table, Value};

use super::ShadowError;

/// What the record's name ends with.
const RECORD: &str = ".shadow.toml";

/// The record of where an image's shadow is.
#[derive(Clone, Debug)]
pub(super) struct Record {
    path: PathBuf,
    shadow: PathBuf,
    identity: Identity,
    start: u64,
    len: u64,
}

impl Record {
    /// The record of this image and exported range: the one that is there, if the
    /// image has another number now, else the one to be made.
    pub fn of<F: Files>(
        files: &F,
        state_dir: &Path,
        shadow: &Path,
        identity: Identity,
        window: (u64, u64),
    ) -> Record {
        let (start, len) = window;
        let crc = crc::Crc::<u64>::new(&crc::CRC_64_XZ);
        let mut digest = crc.digest();
        // By what the image is: under its device number another one may have been
        // frozen, whose record is still there.
        for number in [identity.facts.key(), start] {
            digest.update(&number.to_le_bytes());
        }
        let record = Record {
            path: state_dir.join(format!("{:016x}{RECORD}", digest.finalize())),
            shadow: shadow.to_owned(),
            identity,
            start,
            len,
        };
        let is_ours = |path: &PathBuf| {
            let stored = files.read_text(path).ok();
            let stored = stored.and_then(|text| Stored::parse(&text, &identity));
            stored.is_some_and(|s| s.start == start && s.identity.is_same_image(&identity))
        };
        let there = record.all(files).unwrap_or_default();
        match there.into_iter().find(is_ours) {
            Some(path) => Record { path, ..record },
            None => record,
        }
    }

    /// The records of all images.
    fn all<F: Files>(&self, files: &F) -> io::Result<Vec<PathBuf>> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let list = match files.list(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            list => list?,
        };
        let is_record = |path: &PathBuf| path.to_string_lossy().ends_with(RECORD);
        Ok(list.into_iter().filter(is_record).collect())
    }

    /// Puts it on stable storage; the window may have another length by now.
    pub fn write<F: Files>(&self, files: &F, len: u64) -> io::Result<()> {
        let mut table = Table::new();
        table.insert("version".into(), Value::Integer(2));
        let shadow = self
            .shadow
            .to_str()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "its path is not UTF-8"))?;
        table.insert("shadow".into(), Value::String(shadow.to_owned()));
        let facts = self.identity.facts.to_text();
        table.insert("facts".into(), Value::String(facts));
        for (key, number) in [
            ("identity_a", self.identity.a),
            ("identity_b", self.identity.b),
            ("boot_high", self.identity.boot[0]),
            ("boot_low", self.identity.boot[1]),
            ("start", self.start),
            ("len", len),
        ] {
            table.insert(key.into(), Value::String(format!("{number:016x}")));
        }
        let directory = self.path.parent().unwrap_or(Path::new("."));
        files.make_directory(directory)?;
        replace_text(files, &self.path, &table.to_string())
    }

    /// Puts it on stable storage in the place of these.
    pub fn replace<F: Files>(&self, files: &F, len: u64, others: &[PathBuf]) -> io::Result<()> {
        self.write(files, len)?;
        if others.is_empty() {
            return Ok(());
        }
        for path in others.iter().filter(|path| **path != self.path) {
            files.remove(path)?;
        }
        files.sync_directory(&self.path)
    }

    pub fn remove<F: Files>(&self, files: &F) -> io::Result<()> {
        self.remove_all(files, &[])
    }

    /// The same, and these records of other names.
    pub fn remove_all<F: Files>(&self, files: &F, others: &[PathBuf]) -> io::Result<()> {
        for path in others.iter().chain([&self.path]) {
            match files.remove(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        match files.sync_directory(&self.path) {
            // There never was one, nor a place for it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            synced => synced,
        }
    }

    /// Refuses a window that shares sectors with another one that is frozen:
    /// what was written to them is in that one's shadow. So is a record that may be of
    /// this image, unless it is of the shadow that the operator speaks of: returns
    /// those.
    pub fn none_beside<F: Files>(
        &self,
        files: &F,
        told: Option<&Path>,
    ) -> Result<Vec<PathBuf>, ShadowError> {
        let mut in_doubt = Vec::new();
        let bad = |path: &Path, what: &str| ShadowError::Record(path.to_owned(), what.to_owned());
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let list = self
            .all(files)
            .map_err(|e| bad(directory, &e.to_string()))?;
        for path in list {
            let text = match files.read_text(&path) {
                // Thawed just now.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                text => text.map_err(|e| bad(&path, &e.to_string()))?,
            };
            let stored = Stored::parse(&text, &self.identity);
            // Our own is looked at by `read`, which knows another remedy.
            if stored.is_none() && path == self.path {
                continue;
            }
            let Stored {
                shadow,
                identity,
                start,
                len,
            } = stored.ok_or_else(|| bad(&path, "it cannot be read; remove it to pass it over"))?;
            let (facts, range) = (self.identity.facts, (self.start, self.len));
            if !identity.facts.shares_bytes((start, len), &facts, range) {
                continue;
            }
            match identity.difference(&self.identity) {
                Some(Difference::Doubt { .. }) if told == Some(&shadow) => in_doubt.push(path),
                Some(doubt @ Difference::Doubt { .. }) => {
                    return Err(ShadowError::RecordInDoubt(path, shadow, doubt.to_string()));
                }
                None | Some(Difference::Size(..)) if path != self.path => {
                    let (first, sectors) = (start / shadow::SECTOR, len / shadow::SECTOR);
                    return Err(ShadowError::OtherWindow(shadow, first, sectors));
                }
                _ => {}
            }
        }
        Ok(in_doubt)
    }

    /// The shadow that a record speaks of, if there is a record.
    pub fn read<F: Files>(&self, files: &F) -> Result<Option<PathBuf>, ShadowError> {
        let bad = |what: String| ShadowError::Record(self.path.clone(), what);
        let text = match files.read_text(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(bad(e.to_string())),
        };
        let stored = Stored::parse(&text, &self.identity);
        stored.map(|stored| Some(stored.shadow)).ok_or_else(|| {
            bad("it cannot be read; repair it, or --discard-shadow discards the shadow".into())
        })
    }
}

/// What a record says.
struct Stored {
    shadow: PathBuf,
    /// Of its image; a record does not keep its size and, in version 1, only `a`
    /// and `b`.
    identity: Identity,
    /// The exported range.
    start: u64,
    len: u64,
}

impl Stored {
    /// Reads a record of version 1 (aoede 0.1.0) or 2, to be compared with the
    /// image `now`.
    fn parse(text: &str, now: &Identity) -> Option<Stored> {
        let table = text.parse::<Table>().ok()?;
        let string = |key: &str| table.get(key)?.as_str();
        let number = |key: &str| u64::from_str_radix(string(key)?, 16).ok();
        let facts = match table.get("version")?.as_integer()? {
            1 => Facts::Unknown,
            2 => Facts::from_text(string("facts")?)?,
            _ => return None,
        };
        Some(Stored {
            shadow: PathBuf::from(string("shadow")?),
            identity: Identity {
                a: number("identity_a")?,
                b: number("identity_b")?,
                facts,
                // What was written before this was kept tells nothing.
                boot: [
                    number("boot_high").unwrap_or(0),
                    number("boot_low").unwrap_or(0),
                ],
                ..*now
            },
            start: number("start")?,
            len: number("len")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow::{DeviceFacts, FileFacts, Kind, RealFiles};

    /// A loop device over a file: its number is in `a`, as 0.1.0 knew it.
    fn identity(a: u64, inode: u64) -> Identity {
        let file = FileFacts {
            inode,
            birth: 7,
            uuid: [1, 2],
            ..FileFacts::default()
        };
        Identity {
            kind: Kind::Device,
            a,
            b: 0,
            bytes: 1 << 20,
            facts: Facts::Loop {
                file,
                offset: 0,
                limit: 0,
                bytes: 1 << 20,
            },
            boot: [8, 9],
        }
    }

    #[test]
    fn a_record_that_may_be_of_this_image_is_a_refusal_and_one_of_another_part_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (files, shadow) = (&RealFiles, Path::new("/s"));
        let of = |identity| Record::of(files, dir.path(), shadow, identity, (0, 512));
        let whole = identity(1, 12);
        let Facts::Loop { file, bytes, .. } = whole.facts else {
            unreachable!()
        };
        let part = |offset, limit| Identity {
            facts: Facts::Loop {
                file,
                offset,
                limit,
                bytes,
            },
            ..whole
        };
        let then = of(part(4096, 8192));
        then.write(files, 512).unwrap();
        // Under the old number of `a`, and in the same place of the exported range.
        for (now, is_refused) in [
            (part(4096, 8192), false),
            (part(12288, 8192), false),
            (part(0, 4096), false),
            // The first 512 bytes of them are others.
            (whole, false),
            (part(4096, 4096), true),
            (part(4096, 0), true),
        ] {
            let record = of(now);
            let refused = record.none_beside(files, None);
            match &refused {
                Err(ShadowError::RecordInDoubt(path, of, doubt)) if is_refused => {
                    assert_eq!((path, &**of), (&then.path, shadow));
                    let said = refused.as_ref().unwrap_err().to_string();
                    assert!(said.contains("size limit 8192"), "{said}");
                    assert!(doubt.contains(&now.facts.to_string()), "{doubt}");
                    let other = record.none_beside(files, Some(Path::new("/other")));
                    assert!(matches!(other, Err(ShadowError::RecordInDoubt(..))));
                    // Told of it, it is in the operator's hands.
                    let told = record.none_beside(files, Some(shadow)).unwrap();
                    assert_eq!(told, std::slice::from_ref(&then.path));
                }
                Ok(none) if !is_refused => assert!(none.is_empty()),
                other => panic!("{now:?}: {other:?}"),
            }
        }
        let now = of(part(4096, 4096));
        now.replace(files, 512, std::slice::from_ref(&then.path))
            .unwrap();
        assert!(now.path.exists() && !then.path.exists());
    }

    #[test]
    fn a_disk_without_a_serial_is_known_by_its_record_only_while_it_is_plugged_in() {
        let dir = tempfile::tempdir().unwrap();
        let files = &RealFiles;
        let disk = |diskseq, boot| Identity {
            facts: Facts::Device(DeviceFacts {
                diskseq,
                bytes: 1 << 20,
                ..DeviceFacts::default()
            }),
            boot,
            ..identity(1, 12)
        };
        let of = |identity| Record::of(files, dir.path(), Path::new("/s"), identity, (0, 512));
        let boot = [1, 2];
        of(disk(u64::MAX, boot)).write(files, 512).unwrap();
        assert!(of(disk(u64::MAX, boot)).none_beside(files, None).is_ok());
        let found = of(disk(u64::MAX, boot)).read(files).unwrap();
        assert_eq!(found, Some(PathBuf::from("/s")));
        for other in [disk(u64::MAX - 1, boot), disk(u64::MAX, [1, 3])] {
            let refused = of(other).none_beside(files, None);
            assert!(
                matches!(refused, Err(ShadowError::RecordInDoubt(..))),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn the_record_of_a_device_is_found_under_another_number() {
        let dir = tempfile::tempdir().unwrap();
        let (files, shadow) = (&RealFiles, Path::new("/s"));
        let of = |identity, start| Record::of(files, dir.path(), shadow, identity, (start, 512));
        of(identity(1, 12), 0).write(files, 512).unwrap();
        for (identity, start, found) in [
            (identity(1, 12), 0, true),
            (identity(2, 12), 0, true),
            (identity(1, 13), 0, false),
            (identity(2, 12), 512, false),
        ] {
            let record = of(identity, start);
            let is_there = record.read(files).unwrap().is_some();
            assert_eq!(is_there, found, "{identity:?} {start}");
            assert_eq!(record.path.exists(), found);
        }
        // Written again it is the same file, and removed it is gone.
        of(identity(2, 12), 0).write(files, 512).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        of(identity(3, 12), 0).remove(files).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_record_of_0_1_0_is_known_by_its_two_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let of = |a| {
            Record::of(
                &RealFiles,
                dir.path(),
                Path::new(""),
                identity(a, 12),
                (0, 512),
            )
        };
        let text = "version = 1\nshadow = \"/s\"\nidentity_a = \"5\"\nidentity_b = \"0\"\n\
                    start = \"0\"\nlen = \"200\"\n";
        std::fs::write(dir.path().join("x.shadow.toml"), text).unwrap();
        assert_eq!(of(5).read(&RealFiles).unwrap(), Some(PathBuf::from("/s")));
        assert_eq!(of(6).read(&RealFiles).unwrap(), None);
    }
}
