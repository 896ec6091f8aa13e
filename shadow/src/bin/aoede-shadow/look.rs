//! `inspect` and `check`.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use shadow::paths::{self, Access, PathError, Trouble as PathTrouble};
use shadow::{Chunk, Identity, Kind, Map, Shadow, ShadowFile, VERSION};

use crate::image::Image;
use crate::{Trouble, human, say};

/// Opens a shadow to look at it.
fn open(path: &Path) -> Result<(Shadow<ShadowFile>, u64), Trouble> {
    let (file, len) = paths::lock(path, Access::Look)?;
    let shadow = Shadow::open(file, len).map_err(|e| damaged(path, e))?;
    Ok((shadow, len))
}

fn damaged(path: &Path, e: shadow::OpenError) -> Trouble {
    PathError {
        path: path.to_owned(),
        why: PathTrouble::Open(e),
    }
    .into()
}

/// Bytes of the window in chunks of this state.
pub fn bytes(map: &Map, state: Chunk) -> u64 {
    let geometry = map.geometry();
    let chunks = match state {
        Chunk::Absent => geometry.chunks() - map.present(),
        Chunk::Data => map.data_chunks(),
        Chunk::Zero => map.present() - map.data_chunks(),
    };
    let first = geometry.first_chunk();
    let last = first + geometry.chunks() - 1;
    let outside = |chunk| match map.get(chunk) == state {
        true => geometry.chunk() - geometry.within(chunk).1,
        false => 0,
    };
    let ends = outside(first) + if last == first { 0 } else { outside(last) };
    chunks * geometry.chunk() - ends
}

/// Says what a shadow is.
pub fn inspect(path: &Path, json: bool) -> Result<ExitCode, Trouble> {
    let (shadow, len) = open(path)?;
    let allocated = shadow.file().allocated().map_err(|e| PathError {
        path: path.to_owned(),
        why: PathTrouble::System("measuring it", e),
    })?;
    let facts = Facts {
        path,
        shadow: &shadow,
        len,
        allocated,
    };
    say(&if json { facts.json() } else { facts.text() });
    Ok(ExitCode::SUCCESS)
}

struct Facts<'a> {
    path: &'a Path,
    shadow: &'a Shadow<ShadowFile>,
    len: u64,
    allocated: u64,
}

impl Facts<'_> {
    fn text(&self) -> String {
        let (spec, map) = (self.shadow.spec(), self.shadow.map());
        let geometry = spec.geometry;
        let amount = |state| {
            let bytes = bytes(map, state);
            format!("{} ({bytes} bytes)", human(bytes))
        };
        let lines = [
            ("shadow", self.path.display().to_string()),
            ("state", self.shadow.state().name().to_owned()),
            ("format", VERSION.to_string()),
            ("generation", spec.generation.to_string()),
            ("uuid", uuid(&spec.uuid)),
            ("image", identity(&spec.identity)),
            (
                "window",
                format!(
                    "{} bytes from byte {} of the image",
                    geometry.len(),
                    geometry.start()
                ),
            ),
            ("chunk", format!("{} bytes", geometry.chunk())),
            ("data", amount(Chunk::Data)),
            ("zeros", amount(Chunk::Zero)),
            (
                "file",
                format!("{} bytes, {} of them on the disk", self.len, self.allocated),
            ),
        ];
        let lines: Vec<_> = lines
            .iter()
            .map(|(name, value)| format!("{:<12}{value}", format!("{name}:")))
            .collect();
        lines.join("\n")
    }

    fn json(&self) -> String {
        let (spec, map) = (self.shadow.spec(), self.shadow.map());
        let geometry = spec.geometry;
        let kind = match spec.identity.kind {
            Kind::File => "file",
            Kind::Device => "device",
        };
        // Numbers that may pass 2^53 are text, so that no reader rounds them.
        let lines = [
            ("shadow", string(&self.path.to_string_lossy())),
            ("state", string(self.shadow.state().name())),
            ("format", VERSION.to_string()),
            ("generation", string(&spec.generation.to_string())),
            ("uuid", string(&uuid(&spec.uuid))),
            ("image_kind", string(kind)),
            ("image_a", string(&format!("{:016x}", spec.identity.a))),
            ("image_b", string(&format!("{:016x}", spec.identity.b))),
            ("image_bytes", spec.identity.bytes.to_string()),
            ("window_start", geometry.start().to_string()),
            ("window_bytes", geometry.len().to_string()),
            ("chunk_bytes", geometry.chunk().to_string()),
            ("data_chunks", map.data_chunks().to_string()),
            (
                "zero_chunks",
                (map.present() - map.data_chunks()).to_string(),
            ),
            ("data_bytes", bytes(map, Chunk::Data).to_string()),
            ("zero_bytes", bytes(map, Chunk::Zero).to_string()),
            ("file_bytes", self.len.to_string()),
            ("allocated_bytes", self.allocated.to_string()),
        ];
        let fields: Vec<_> = lines
            .iter()
            .map(|(name, value)| format!("  \"{name}\": {value}"))
            .collect();
        format!("{{\n{}\n}}", fields.join(",\n"))
    }
}

fn identity(identity: &Identity) -> String {
    let bytes = identity.bytes;
    match identity.kind {
        Kind::File if identity.b == 0 => format!("file of {bytes} bytes, inode {}", identity.a),
        Kind::File => {
            let (seconds, rest) = (identity.b / 1_000_000_000, identity.b % 1_000_000_000);
            let inode = identity.a;
            format!("file of {bytes} bytes, inode {inode}, born {seconds}.{rest:09}")
        }
        Kind::Device => format!(
            "device of {bytes} bytes, sum of its name {:016x}",
            identity.a
        ),
    }
}

fn uuid(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        // Into a string nothing fails.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// A JSON string.
fn string(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Looks at both copies of everything.
pub fn check(path: &Path, image: Option<&Path>) -> Result<ExitCode, Trouble> {
    let (file, len) = paths::lock(path, Access::Look)?;
    let report = shadow::check(&file, len).map_err(|e| damaged(path, e))?;
    for finding in &report.findings {
        say(&format!("shadow {}: {finding}", path.display()));
    }
    let mut fine = report.findings.is_empty();
    if let Some(image) = image {
        let belongs = Image::look(image)?;
        let metadata = file.metadata().map_err(|e| PathError {
            path: path.to_owned(),
            why: PathTrouble::System("looking at it", e),
        })?;
        let spec = report.spec;
        let belongs = belongs
            .is_not(&metadata)
            .and_then(|()| belongs.belongs(&spec.identity, &spec.geometry, false));
        if let Err(e) = belongs {
            say(&e.to_string());
            fine = false;
        }
    }
    if fine {
        say(&format!(
            "shadow {}: header and {} bitmap pages are whole, {}",
            path.display(),
            report.pages,
            match image {
                Some(image) => format!("and it belongs to {}", image.display()),
                None => "the image was not compared".to_owned(),
            }
        ));
    }
    Ok(if fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shadow::Geometry;

    #[test]
    fn bytes_are_counted_in_the_window() {
        let geometry = Geometry::new(4096, 1024, 4096 * 2).unwrap();
        let mut map = Map::new(geometry, [0; 16]);
        assert_eq!(bytes(&map, Chunk::Absent), 8192);
        let commit = map.plan([(0, Chunk::Data), (1, Chunk::Data), (2, Chunk::Zero)]);
        map.settle(commit, true);
        assert_eq!(bytes(&map, Chunk::Data), 3072 + 4096);
        assert_eq!(bytes(&map, Chunk::Zero), 1024);
        let one = Geometry::new(4096, 512, 512).unwrap();
        assert_eq!(bytes(&Map::new(one, [0; 16]), Chunk::Absent), 512);
    }

    #[test]
    fn text_is_quoted() {
        assert_eq!(string("a\"b\\c\n\u{e9}"), "\"a\\\"b\\\\c\\u000a\u{e9}\"");
        assert_eq!(uuid(&[0xAB; 16]), "abababab-abab-abab-abab-abababababab");
    }
}
