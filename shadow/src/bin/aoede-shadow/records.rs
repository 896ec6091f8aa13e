//! The records in a state directory: arenas that are not yet brought to their
//! image, and shadows.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use shadow::paths::remove;
use shadow::stamp::{Stamp, tell};
use shadow::{Facts, Found, Geometry, Identity, Kind, Verdict, boot_id};

use crate::Trouble;
use crate::image::Image;

/// Why a record stands in the way.
#[derive(Debug)]
pub struct RecordError {
    path: PathBuf,
    why: Why,
}

#[derive(Debug)]
enum Why {
    System(io::Error),
    Unreadable,
    Arena(String),
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.why {
            Why::System(e) => write!(f, "record {path}: {e}; name the directory with --state-dir"),
            Why::Unreadable => write!(
                f,
                "record {path}: it cannot be read; remove it to pass it over"
            ),
            Why::Arena(arena) => write!(
                f,
                "arena {arena} holds writes of a target of this image that died, which belong over \
                 what is merged; start aoede once as it was, or discard them with its \
                 --discard-arena"
            ),
        }
    }
}

impl std::error::Error for RecordError {}

fn at(path: &Path) -> impl Fn(io::Error) -> RecordError + '_ {
    |e| RecordError {
        path: path.to_owned(),
        why: Why::System(e),
    }
}

/// The records whose names end so, with their text.
fn records(directory: &Path, end: &str) -> Result<Vec<(PathBuf, String)>, RecordError> {
    let list = match fs::read_dir(directory) {
        Ok(list) => list,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(at(directory)(e)),
    };
    let mut found = Vec::new();
    for entry in list {
        let path = entry.map_err(at(directory))?.path();
        if !path.to_string_lossy().ends_with(end) {
            continue;
        }
        match fs::read_to_string(&path) {
            Ok(text) => found.push((path, text)),
            // Gone just now, with what it spoke of.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(at(&path)(e)),
        }
    }
    Ok(found)
}

/// The lines `key = value` of a record, values without their quotes.
fn parse(text: &str) -> Option<HashMap<&str, String>> {
    let mut values = HashMap::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (key, value) = line.split_once('=')?;
        values.insert(key.trim(), unquote(value.trim())?);
    }
    let version = values.get("version").map(String::as_str);
    matches!(version, Some("1" | "2")).then_some(values)
}

/// A TOML value of one line: a number, 'as it is' or "with escapes".
fn unquote(value: &str) -> Option<String> {
    if let Some(inner) = value.strip_prefix('\'') {
        return Some(inner.strip_suffix('\'')?.to_owned());
    }
    let Some(inner) = value.strip_prefix('"') else {
        return Some(value.to_owned());
    };
    let mut out = String::new();
    let mut rest = inner.strip_suffix('"')?.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        out.push(match rest.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'e' => '\u{1b}',
            c @ ('u' | 'U' | 'x') => {
                let count = match c {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                let digits: String = rest.by_ref().take(count).collect();
                if digits.len() != count {
                    return None;
                }
                char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?
            }
            c => c,
        });
    }
    Some(out)
}

/// Refuses where a target of this boot has left an arena: of the image that is
/// there, or of the one that the shadow was made for.
///
/// Also one of another window: a target brings an arena to no image that someone
/// else has changed since, and that would be us. Who lives has its window locked,
/// and knows what it has in its arena.
pub fn no_arena(
    directory: &Path,
    image: &Image,
    made_for: &Identity,
    window: &Geometry,
) -> Result<(), Trouble> {
    let boot = boot_id();
    for (path, text) in records(directory, ".arena.toml")? {
        let unreadable = || RecordError {
            path: path.clone(),
            why: Why::Unreadable,
        };
        let values = parse(&text).ok_or_else(unreadable)?;
        let number = |key: &str| u64::from_str_radix(values.get(key)?, 16).ok();
        let read = || {
            let origin = match values.get("facts") {
                Some(facts) => Origin::Facts(Facts::from_text(facts)?),
                None => Origin::V1 {
                    device: number("device")?,
                    inode: number("inode")?,
                    birth: number("birth")?,
                },
            };
            let of = Arena {
                origin,
                start: number("start")?,
                len: number("len")?,
            };
            Some(([number("boot_high")?, number("boot_low")?], of))
        };
        let (its_boot, arena) = read().ok_or_else(unreadable)?;
        // The memory of another boot is gone, and is never replayed.
        if its_boot != boot {
            continue;
        }
        let waits = if arena.overlaps(image, window) {
            // We have its window, so its target is dead.
            arena.is_of(image) || arena.was_of(made_for)
        } else {
            arena.is_of(image) && !image.is_served(arena.start, arena.len)?
        };
        if waits {
            let name = values.get("arena").cloned();
            let name = name.unwrap_or_else(|| path.display().to_string());
            return Err(RecordError {
                path: path.clone(),
                why: Why::Arena(name),
            }
            .into());
        }
    }
    Ok(())
}

/// By what a record names the image of its arena.
enum Origin {
    Facts(Facts),
    /// As aoede 0.1.0 did.
    V1 {
        device: u64,
        inode: u64,
        birth: u64,
    },
}

/// Which image and window an arena is of.
struct Arena {
    origin: Origin,
    start: u64,
    len: u64,
}

impl Arena {
    /// Whether it is of this image, or may be.
    fn is_of(&self, image: &Image) -> bool {
        let (device, inode, birth) = match &self.origin {
            Origin::Facts(facts) => {
                return facts.compare(&image.identity.facts, true) != Verdict::Other;
            }
            Origin::V1 {
                device,
                inode,
                birth,
            } => (*device, *inode, *birth),
        };
        let metadata = &image.metadata;
        if metadata.file_type().is_block_device() {
            return (device, inode, birth) == (metadata.rdev(), 0, 0);
        }
        let born = metadata.created().ok();
        let since = born.and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let now = since.map_or(0, |t| t.as_nanos() as u64);
        (device, inode, birth) == (metadata.dev(), metadata.ino(), now)
    }

    /// Whether it is of the image that the shadow was made for, which may not be
    /// there; a file is known by less then.
    fn was_of(&self, made_for: &Identity) -> bool {
        match &self.origin {
            Origin::Facts(facts) if made_for.facts != Facts::Unknown => {
                let same_boot = made_for.boot == boot_id();
                facts.compare(&made_for.facts, same_boot) != Verdict::Other
            }
            Origin::Facts(Facts::File(file)) => {
                made_for.kind == Kind::File && (file.inode, file.birth) == (made_for.a, made_for.b)
            }
            Origin::Facts(_) => false,
            Origin::V1 { inode, birth, .. } => {
                made_for.kind == Kind::File && (*inode, *birth) == (made_for.a, made_for.b)
            }
        }
    }

    fn overlaps(&self, image: &Image, window: &Geometry) -> bool {
        let facts = match self.origin {
            Origin::Facts(facts) => facts,
            Origin::V1 { .. } => Facts::Unknown,
        };
        let window = (window.start(), window.len());
        facts.shares_bytes((self.start, self.len), &image.identity.facts, window)
    }
}

/// Tells the arenas of the image, those of its other exported ranges, that we have
/// changed it: their targets must not take that for a foreign change.
pub fn tell_arenas(directory: &Path, image: &Image) {
    let stamp = Stamp::of(&image.file).ok().flatten();
    let (Some(stamp), Ok(records)) = (stamp, records(directory, ".arena.toml")) else {
        return;
    };
    for (_, text) in records {
        let Some(values) = parse(&text) else { continue };
        let facts = values.get("facts").and_then(|text| Facts::from_text(text));
        let is_ours =
            facts.is_some_and(|facts| facts.compare(&image.identity.facts, true) == Verdict::Same);
        if let Some(arena) = values.get("arena").filter(|_| is_ours) {
            // One that ends just now needs it no more.
            let _ = tell(Path::new(arena), &stamp);
        }
    }
}

/// Takes away the records that speak of the shadow of this path, whichever of
/// its three names that is.
pub fn forget_shadow(directory: &Path, shadow: &Path) -> Result<(), RecordError> {
    let named = Found::plain(shadow);
    for (path, text) in records(directory, ".shadow.toml")? {
        let of = parse(&text).and_then(|values| values.get("shadow").map(PathBuf::from));
        // One that cannot be read may be of any shadow, and is not ours to
        // remove.
        let Some(of) = of else { continue };
        if same(&of, &named) || same(&of, shadow) {
            remove(&path).map_err(at(&path))?;
        }
    }
    Ok(())
}

/// Whether two paths are one place; the file itself need not be there.
fn same(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| {
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        let parent = fs::canonicalize(parent.unwrap_or(Path::new("."))).ok()?;
        Some(parent.join(path.file_name()?))
    };
    a == b || real(a).is_some_and(|a| Some(a) == real(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_they_are_written() {
        let values = parse("version = 1\n\n# x\nshadow = \"/a \\\"b\\\" \\u00e9\\\\\"\nx='a\\b'\n");
        let values = values.unwrap();
        assert_eq!(values["shadow"], "/a \"b\" \u{e9}\\");
        assert_eq!(values["x"], "a\\b");
        for bad in [
            "",
            "version = 3",
            "version = 1\nx",
            "version = 1\nx = \"a",
            "version = 1\nx = \"\\u12\"",
        ] {
            assert!(parse(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_path_is_known_however_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let here = dir.path().join("s");
        assert!(same(&here, &dir.path().join(".").join("s")));
        assert!(!same(&here, &dir.path().join("t")));
    }
}
