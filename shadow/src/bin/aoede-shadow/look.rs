//! `inspect` and `check`.

use std::fmt::Write;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use shadow::paths::{self, Access, PathError, Peek, Trouble as PathTrouble};
use shadow::{Chunk, Found, Identity, Kind, Map, Shadow, ShadowFile, VERSION};

use crate::image::Image;
use crate::{Trouble, human, say};

/// How often a shadow is read that its target is writing, before what looks
/// damaged is taken for damaged.
const TRIES: usize = 5;
const RETRY: Duration = Duration::from_millis(20);

/// Opens a shadow to look at it, also while a target has it.
fn open(path: &Path) -> Result<Opened, Trouble> {
    let mut tries = TRIES;
    loop {
        let (file, len, user) = match paths::peek(path)? {
            Peek::Ours(file, len) => (file, len, None),
            Peek::InUse(file, len) => {
                let pid = file.metadata().ok().and_then(|of| user_of(&of));
                (file, len, Some(User { pid }))
            }
        };
        match Shadow::open(file, len) {
            Ok(shadow) => return Ok(Opened { shadow, len, user }),
            Err(e) => {
                tries -= 1;
                if user.is_none() || tries == 0 {
                    return Err(damaged(path, e));
                }
            }
        }
        std::thread::sleep(RETRY);
    }
}

/// A shadow that is open to be read.
struct Opened {
    shadow: Shadow<ShadowFile>,
    len: u64,
    /// Who has it locked.
    user: Option<User>,
}

/// A process that has a shadow locked.
struct User {
    /// Its process id, if /proc tells.
    pid: Option<u32>,
}

/// Returns the process that has this file open and a lock on it: one that makes a
/// copy has it open as well.
fn user_of(of: &Metadata) -> Option<u32> {
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let open = fs::read_dir(process.path().join("fd")).into_iter();
        for fd in open.flatten().flatten() {
            let there = fs::metadata(fd.path());
            let is_it = there.is_ok_and(|t| (t.dev(), t.ino()) == (of.dev(), of.ino()));
            let info = process.path().join("fdinfo").join(fd.file_name());
            let has_lock = |info: String| info.lines().any(|line| line.starts_with("lock:"));
            if is_it && fs::read_to_string(info).is_ok_and(has_lock) {
                return Some(pid);
            }
        }
    }
    None
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
    let path = &paths::behind_marker(path)?;
    let Opened { shadow, len, user } = open(path)?;
    let allocated = shadow.file().allocated().map_err(|e| PathError {
        path: path.to_owned(),
        why: PathTrouble::System("measuring it", e),
    })?;
    let facts = Facts {
        path,
        shadow: &shadow,
        len,
        allocated,
        user,
    };
    say(&if json { facts.json() } else { facts.text() });
    Ok(ExitCode::SUCCESS)
}

struct Facts<'a> {
    path: &'a Path,
    shadow: &'a Shadow<ShadowFile>,
    len: u64,
    allocated: u64,
    user: Option<User>,
}

impl Facts<'_> {
    /// The state of the freeze: the name changes before the header does.
    fn state(&self) -> &'static str {
        Found::of(self.path).state(self.shadow.state()).name()
    }

    fn text(&self) -> String {
        let (spec, map) = (self.shadow.spec(), self.shadow.map());
        let geometry = spec.geometry;
        let amount = |state| {
            let bytes = bytes(map, state);
            format!("{} ({bytes} bytes)", human(bytes))
        };
        let lines = [
            ("shadow", self.path.display().to_string()),
            ("state", self.state().to_owned()),
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
        let mut lines = Vec::from(lines);
        if let Some(User { pid }) = self.user {
            let by = pid.map_or("a process".to_owned(), |pid| format!("process {pid}"));
            let value = format!("by {by}; the figures may be a moment old");
            lines.insert(2, ("in use", value));
        }
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
        let pid = self.user.as_ref().and_then(|user| user.pid);
        // Numbers that may pass 2^53 are text, so that no reader rounds them.
        let lines = [
            ("shadow", string(&self.path.to_string_lossy())),
            ("state", string(self.state())),
            ("in_use", self.user.is_some().to_string()),
            (
                "in_use_by",
                pid.map_or("null".to_owned(), |pid| pid.to_string()),
            ),
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
    let path = &paths::behind_marker(path)?;
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
            "shadow {}: header and all bitmap pages ({}) are whole, {}",
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

    #[test]
    fn the_user_of_a_shadow_is_the_process_with_a_lock_on_it() {
        let file = tempfile::tempfile().unwrap();
        let of = file.metadata().unwrap();
        assert_eq!(user_of(&of), None);
        shadow::lock::set(&file, shadow::lock::Lock::Exclusive, 0, 0).unwrap();
        assert_eq!(user_of(&of), Some(std::process::id()));
    }
}
