//! Settings that few need: the built-in `tuneup.toml`, a file, single values.
//!
//! Each key stands once, in `KEYS`, with its type and range; the defaults
//! stand in the file at the top level of the project, which is compiled in.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::size;
use crate::freeze::{OnStop, WhenFull};
use crate::net::EngineChoice;

/// The file of defaults.
pub const DEFAULTS: &str = include_str!("../../tuneup.toml");

/// The settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuneup {
    /// How frames are received.
    pub receive: EngineChoice,
    /// Bytes of a receive ring.
    pub ring_size: usize,
    /// Bytes asked for a socket's own buffers.
    pub socket_buffer: usize,
    /// Send past the queueing discipline.
    pub qdisc_bypass: bool,
    /// How long to look for the next frame before sleeping.
    pub spin: Duration,
    /// Threads for disk work.
    pub disk_threads: usize,
    /// Bytes of data that may wait for the disk.
    pub parked_size: usize,
    /// How long to ask for other targets at the start.
    pub address_probe: Duration,
    /// Bytes of cache.
    pub cache_size: u64,
    /// Percent of it that may be dirty.
    pub dirty_ratio: u32,
    /// By then a write is on stable storage.
    pub max_dirty_age: Duration,
    /// After so long without a request all is written back.
    pub idle_flush: Duration,
    /// How long a disk that fails is waited for.
    pub io_patience: Duration,
    /// Bytes read ahead.
    pub read_ahead: u64,
    /// Writes to the image at the same time.
    pub write_depth: usize,
    /// Who does disk work.
    pub disk_engine: DiskEngine,
    /// Percent of what may be dirty that a merge has while hosts are asking.
    pub merge_share: u32,
    /// What happens when a shadow can take no more.
    pub shadow_full: WhenFull,
    /// What a stop does with a shadow.
    pub on_stop: OnStop,
    /// How long writes are left unanswered at most.
    pub hold_max: Duration,
    /// How long a freeze may last before it thaws by itself; zero for ever.
    pub freeze_max: Duration,
    /// Serial number; empty: made from address and host name.
    pub serial: String,
    /// Model.
    pub model: String,
}

/// A value as it is read, before its key's type is known.
enum Value {
    Text(String),
    Number(u64),
    Flag(bool),
    Other,
}

/// What a key takes, and where it goes.
enum Kind {
    Size(RangeInclusive<u64>, fn(&mut Tuneup, usize)),
    Number(RangeInclusive<u64>, &'static str, fn(&mut Tuneup, u64)),
    Flag(fn(&mut Tuneup, bool)),
    Text(usize, fn(&mut Tuneup, String)),
    Engine(fn(&mut Tuneup, EngineChoice)),
    Disk(fn(&mut Tuneup, DiskEngine)),
    Full(fn(&mut Tuneup, WhenFull)),
    Stop(fn(&mut Tuneup, OnStop)),
}

/// Who does disk work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskEngine {
    /// io_uring where the kernel gives it, else threads.
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// Threads.
    Threads,
}

/// Every key there is.
const KEYS: [(&str, Kind); 23] = [
    ("receive", Kind::Engine(|t, v| t.receive = v)),
    (
        "ring_size",
        Kind::Size(256 << 10..=1 << 30, |t, v| t.ring_size = v),
    ),
    (
        "socket_buffer",
        Kind::Size(64 << 10..=1 << 30, |t, v| t.socket_buffer = v),
    ),
    ("qdisc_bypass", Kind::Flag(|t, v| t.qdisc_bypass = v)),
    (
        "spin",
        Kind::Number(0..=10_000, "microseconds", |t, v| {
            t.spin = Duration::from_micros(v)
        }),
    ),
    (
        "disk_threads",
        Kind::Number(1..=256, "threads", |t, v| t.disk_threads = v as usize),
    ),
    (
        "parked_size",
        Kind::Size(256 << 10..=1 << 30, |t, v| t.parked_size = v),
    ),
    (
        "address_probe",
        Kind::Number(10..=10_000, "milliseconds", |t, v| {
            t.address_probe = Duration::from_millis(v);
        }),
    ),
    (
        "cache_size",
        Kind::Size(256 << 10..=64 << 30, |t, v| t.cache_size = v as u64),
    ),
    (
        "dirty_ratio",
        Kind::Number(10..=90, "percent", |t, v| t.dirty_ratio = v as u32),
    ),
    (
        "max_dirty_age",
        Kind::Number(100..=600_000, "milliseconds", |t, v| {
            t.max_dirty_age = Duration::from_millis(v);
        }),
    ),
    (
        "idle_flush",
        Kind::Number(1..=600_000, "milliseconds", |t, v| {
            t.idle_flush = Duration::from_millis(v)
        }),
    ),
    (
        "io_patience",
        Kind::Number(1..=3600, "seconds", |t, v| {
            t.io_patience = Duration::from_secs(v)
        }),
    ),
    (
        "read_ahead",
        Kind::Size(0..=64 << 20, |t, v| t.read_ahead = v as u64),
    ),
    (
        "write_depth",
        Kind::Number(1..=256, "writes", |t, v| t.write_depth = v as usize),
    ),
    ("disk_engine", Kind::Disk(|t, v| t.disk_engine = v)),
    (
        "merge_share",
        Kind::Number(1..=75, "percent", |t, v| t.merge_share = v as u32),
    ),
    ("shadow_full", Kind::Full(|t, v| t.shadow_full = v)),
    ("on_stop", Kind::Stop(|t, v| t.on_stop = v)),
    (
        "hold_max",
        Kind::Number(1..=170, "seconds", |t, v| {
            t.hold_max = Duration::from_secs(v)
        }),
    ),
    (
        "freeze_max",
        Kind::Number(0..=604_800, "seconds", |t, v| {
            t.freeze_max = Duration::from_secs(v)
        }),
    ),
    ("serial", Kind::Text(20, |t, v| t.serial = v)),
    ("model", Kind::Text(40, |t, v| t.model = v)),
];

/// Where a bad setting stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    CommandLine,
    /// A file that cannot be read.
    Path(PathBuf),
    /// A line of a file.
    File(PathBuf, usize),
}

/// What is wrong with a setting: where, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TuneupError {
    place: Place,
    what: String,
}

impl TuneupError {
    /// Whether it was typed on the command line.
    pub fn is_usage(&self) -> bool {
        self.place == Place::CommandLine
    }
}

impl fmt::Display for TuneupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::CommandLine => write!(f, "--set: {}", self.what),
            Place::File(path, line) => write!(f, "{}:{line}: {}", path.display(), self.what),
            Place::Path(path) => write!(f, "--tuneup {}: {}", path.display(), self.what),
        }
    }
}

impl std::error::Error for TuneupError {}

impl Default for Tuneup {
    /// What the file of defaults says.
    fn default() -> Tuneup {
        let mut tuneup = Tuneup {
            receive: EngineChoice::Auto,
            ring_size: 0,
            socket_buffer: 0,
            qdisc_bypass: false,
            spin: Duration::ZERO,
            disk_threads: 0,
            parked_size: 0,
            address_probe: Duration::ZERO,
            cache_size: 0,
            dirty_ratio: 0,
            max_dirty_age: Duration::ZERO,
            idle_flush: Duration::ZERO,
            io_patience: Duration::ZERO,
            read_ahead: 0,
            write_depth: 0,
            disk_engine: DiskEngine::Auto,
            merge_share: 0,
            shadow_full: WhenFull::Thaw,
            on_stop: OnStop::Merge,
            hold_max: Duration::ZERO,
            freeze_max: Duration::ZERO,
            serial: String::new(),
            model: String::new(),
        };
        let read = tuneup.read(DEFAULTS, Path::new("tuneup.toml"));
        // A test reads the file; what it accepts does not change later.
        debug_assert_eq!(read, Ok(()));
        tuneup
    }
}

impl Tuneup {
    /// Takes the values that a file names.
    pub fn load(&mut self, path: &Path) -> Result<(), TuneupError> {
        let text = std::fs::read_to_string(path).map_err(|e| TuneupError {
            place: Place::Path(path.to_owned()),
            what: format!("cannot be read: {e}"),
        })?;
        self.read(&text, path)
    }

    /// Takes one value, given as `key=value`.
    pub fn set(&mut self, setting: &str) -> Result<(), TuneupError> {
        let fail = |what| TuneupError {
            place: Place::CommandLine,
            what,
        };
        let Some((key, text)) = setting.split_once('=') else {
            return Err(fail(format!("'{setting}' is no key=value")));
        };
        let (key, text) = (key.trim(), text.trim());
        let value = match text {
            "true" => Value::Flag(true),
            "false" => Value::Flag(false),
            _ => match text.parse() {
                Ok(number) => Value::Number(number),
                Err(_) => Value::Text(text.trim_matches('"').to_owned()),
            },
        };
        self.take(key, value).map_err(fail)
    }

    fn read(&mut self, text: &str, path: &Path) -> Result<(), TuneupError> {
        let fail = |at: usize, what: String| {
            let line = text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
            TuneupError {
                place: Place::File(path.to_owned(), line),
                what,
            }
        };
        let table = DeTable::parse(text).map_err(|e| {
            fail(
                e.span().map_or(0, |span| span.start),
                e.message().to_owned(),
            )
        })?;
        for (key, value) in table.into_inner() {
            let at = key.span().start;
            let value = match value.into_inner() {
                DeValue::String(text) => Value::Text(text.into_owned()),
                DeValue::Boolean(flag) => Value::Flag(flag),
                DeValue::Integer(number) => {
                    match u64::from_str_radix(number.as_str(), number.radix()) {
                        Ok(number) => Value::Number(number),
                        Err(_) => Value::Other,
                    }
                }
                _ => Value::Other,
            };
            self.take(key.get_ref(), value)
                .map_err(|what| fail(at, what))?;
        }
        Ok(())
    }

    fn take(&mut self, key: &str, value: Value) -> Result<(), String> {
        let Some((_, kind)) = KEYS.iter().find(|(name, _)| *name == key) else {
            return Err(match nearest(key) {
                Some(near) => format!("there is no key '{key}'; did you mean '{near}'?"),
                None => format!("there is no key '{key}'; tuneup.toml(5) lists them"),
            });
        };
        match (kind, value) {
            (Kind::Size(range, set), value) => {
                let bytes = match value {
                    Value::Number(bytes) => Some(bytes),
                    Value::Text(text) => size::parse(&text),
                    _ => None,
                };
                let bytes = bytes.filter(|bytes| range.contains(bytes)).ok_or_else(|| {
                    let (min, max) = (size::text(*range.start()), size::text(*range.end()));
                    format!("{key} takes a size from {min} to {max}, such as \"4M\"")
                })?;
                set(self, bytes as usize);
            }
            (Kind::Number(range, _, set), Value::Number(number)) if range.contains(&number) => {
                set(self, number);
            }
            (Kind::Number(range, unit, _), _) => {
                let (min, max) = (range.start(), range.end());
                return Err(format!(
                    "{key} takes a whole number of {unit} from {min} to {max}"
                ));
            }
            (Kind::Flag(set), Value::Flag(flag)) => set(self, flag),
            (Kind::Flag(_), _) => return Err(format!("{key} takes true or false")),
            (Kind::Text(max, set), value) => {
                let takes = format!("{key} takes a text of at most {max} characters");
                let text = match value {
                    Value::Text(text) => text,
                    Value::Number(number) => number.to_string(),
                    _ => return Err(takes),
                };
                // IDENTIFY has a byte for each character, '?' for one outside ASCII.
                match text.chars().count() {
                    count if count <= *max => set(self, text),
                    count => return Err(format!("{takes}; this one has {count}")),
                }
            }
            (Kind::Engine(set), Value::Text(text)) => match text.parse() {
                Ok(engine) => set(self, engine),
                Err(()) => return Err(format!("{key} takes auto, ring or recvmmsg")),
            },
            (Kind::Disk(set), Value::Text(text)) => match text.as_str() {
                "auto" => set(self, DiskEngine::Auto),
                "io_uring" => set(self, DiskEngine::IoUring),
                "threads" => set(self, DiskEngine::Threads),
                _ => return Err(format!("{key} takes auto, io_uring or threads")),
            },
            (Kind::Full(set), Value::Text(text)) if text == "thaw" => set(self, WhenFull::Thaw),
            (Kind::Full(set), Value::Text(text)) if text == "hold" => set(self, WhenFull::Hold),
            (Kind::Full(_), _) => return Err(format!("{key} takes thaw or hold")),
            (Kind::Stop(set), Value::Text(text)) if text == "merge" => set(self, OnStop::Merge),
            (Kind::Stop(set), Value::Text(text)) if text == "keep" => set(self, OnStop::Keep),
            (Kind::Stop(_), _) => return Err(format!("{key} takes merge or keep")),
            (Kind::Disk(_), _) => return Err(format!("{key} takes auto, io_uring or threads")),
            (Kind::Engine(_), _) => return Err(format!("{key} takes auto, ring or recvmmsg")),
        }
        Ok(())
    }
}

/// The key that differs from this one in the fewest letters, if few do.
fn nearest(key: &str) -> Option<&'static str> {
    KEYS.iter()
        .map(|(name, _)| (distance(key, name), *name))
        .min()
        .filter(|(distance, name)| *distance <= name.len().div_ceil(3))
        .map(|(_, name)| name)
}

/// How many letters must be put in, left out or changed to get from one to the
/// other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_read_is_named_without_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.toml");
        let error = Tuneup::default().load(&path).unwrap_err();
        let start = format!("--tuneup {}: cannot be read: ", path.display());
        assert!(error.to_string().starts_with(&start), "{error}");
        assert!(!error.is_usage());
    }

    #[test]
    fn the_file_of_defaults_names_every_key_and_says_why() {
        let table: toml::Table = DEFAULTS.parse().unwrap();
        for (name, _) in &KEYS {
            assert!(table.contains_key(*name), "{name} is not in tuneup.toml");
            let lines: Vec<&str> = DEFAULTS.lines().collect();
            let at = lines
                .iter()
                .position(|l| l.starts_with(&format!("{name} =")))
                .unwrap();
            assert!(lines[at - 1].starts_with('#'), "{name} has no explanation");
        }
        assert_eq!(table.len(), KEYS.len());
        let mut tuneup = Tuneup::default();
        tuneup.read(DEFAULTS, Path::new("tuneup.toml")).unwrap();
        assert_eq!(tuneup.ring_size, 4 << 20);
        assert_eq!(tuneup.spin, Duration::from_micros(30));
        assert_eq!(tuneup.model, "AoEde virtual blade");
    }

    #[test]
    fn the_manual_page_names_every_key_with_its_default() {
        let page = include_str!("../../man/tuneup.toml.5");
        let table: toml::Table = DEFAULTS.parse().unwrap();
        for (name, value) in table {
            let value = match value {
                toml::Value::String(text) if text.is_empty() => "Qq \"\"".to_owned(),
                toml::Value::String(text) => format!("Qq {text}"),
                other => format!("Li {other}"),
            };
            let entry = format!(".It Ic {name} No = {value}\n");
            assert!(page.contains(&entry), "{entry}");
        }
    }

    #[test]
    fn an_error_names_file_line_and_the_nearest_key() {
        let mut tuneup = Tuneup::default();
        let mut read = |text| {
            tuneup
                .read(text, Path::new("my.toml"))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            read("spin = 1\n\nring_sise = 5\n"),
            "my.toml:3: there is no key 'ring_sise'; did you mean 'ring_size'?"
        );
        assert_eq!(
            read("\nspin = 99999"),
            "my.toml:2: spin takes a whole number of microseconds from 0 to 10000"
        );
        assert_eq!(
            read("qdisc_bypass = 1"),
            "my.toml:1: qdisc_bypass takes true or false"
        );
        assert!(read("spin = -1").starts_with("my.toml:1: spin takes"));
        assert_eq!(
            read("ring_size = \"4X\""),
            "my.toml:1: ring_size takes a size from 256K to 1G, such as \"4M\""
        );
        assert!(read("cache_size = 1").contains("from 256K to 64G,"));
        assert!(read("read_ahead = \"1G\"").contains("from 0 to 64M,"));
        assert!(read("a = 1\nb = = 2").starts_with("my.toml:2: "));
        let long = read("serial = \"123456789012345678901\"");
        assert!(long.contains("at most 20 characters; this one has 21"));
        assert!(read("whatever = 1").contains("lists them"));
    }

    #[test]
    fn single_settings_are_taken() {
        let mut tuneup = Tuneup::default();
        for setting in [
            "receive=recvmmsg",
            "ring_size=1M",
            "qdisc_bypass=true",
            "spin=0",
            "serial=42",
            "model = \"A disk\"",
        ] {
            tuneup.set(setting).unwrap();
        }
        // 20 characters, not 20 bytes.
        let serial = "k\u{fc}chen-\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}\u{fc}";
        assert_eq!((serial.chars().count(), serial.len()), (20, 34));
        Tuneup::default().set(&format!("serial={serial}")).unwrap();
        assert_eq!(tuneup.receive, EngineChoice::Recvmmsg);
        assert_eq!((tuneup.ring_size, tuneup.spin), (1 << 20, Duration::ZERO));
        assert_eq!(
            (tuneup.serial.as_str(), tuneup.model.as_str()),
            ("42", "A disk")
        );
        assert!(tuneup.qdisc_bypass);
        assert!(
            tuneup
                .set("spin")
                .unwrap_err()
                .to_string()
                .contains("no key=value")
        );
    }
}
