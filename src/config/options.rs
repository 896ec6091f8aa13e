//! The command line as it is meant.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Parser;
use log::LevelFilter;

use super::cli::Cli;
use super::size;
use super::tuneup::{Tuneup, TuneupError};
use crate::access::Policy;
use crate::store::{ARENAS, CLAIMS, Create, Doubtful, ImageOptions, RUN_DIRS, Window};
use crate::wire::{Address, MacAddr, mask};

/// Where messages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogChoice {
    /// Plain lines to standard error.
    Stderr,
    /// The system's log daemon.
    Syslog,
    /// Lines to standard error with the level in front, as systemd reads them.
    Journal,
}

impl FromStr for LogChoice {
    type Err = ();

    fn from_str(text: &str) -> Result<LogChoice, ()> {
        match text {
            "stderr" => Ok(LogChoice::Stderr),
            "syslog" => Ok(LogChoice::Syslog),
            "journal" => Ok(LogChoice::Journal),
            _ => Err(()),
        }
    }
}

/// Where writes go during a freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowOption {
    /// The shadow file, an absolute path.
    pub path: PathBuf,
    /// The most it may allocate, in MiB.
    pub limit_mib: Option<u64>,
}

/// Everything an export is told, checked as far as that goes without opening
/// anything.
#[derive(Clone, Debug)]
pub struct Options {
    /// Shelf and slot.
    pub address: Address,
    /// Interface names, at least one, none twice.
    pub nics: Vec<String>,
    /// The image, with an absolute path.
    pub image: ImageOptions,
    /// Advertised buffer count.
    pub buffers: u16,
    /// Acknowledge after the sync.
    pub durable: bool,
    /// Masks, and what the network may not change.
    pub policy: Policy,
    /// The shadow file.
    pub shadow: Option<ShadowOption>,
    /// Start without the interfaces that are not there yet.
    pub wait_for_interfaces: bool,
    /// Serve beside another target of this address.
    pub shared_address: bool,
    /// Where the wire's state is kept.
    pub state_dir: PathBuf,
    /// Where the cache's memory is kept, if that was said.
    pub run_dir: Option<PathBuf>,
    /// Arenas that are discarded, and arenas in doubt that are replayed.
    pub doubtful_arena: Doubtful,
    /// Discards what a shadow holds.
    pub discard_shadow: bool,
    /// Takes the shadow for this image's where that is not certain.
    pub accept_shadow: bool,
    /// The settings.
    pub tuneup: Tuneup,
    /// Where messages go, if that was said.
    pub log: Option<LogChoice>,
    /// Which messages.
    pub level: LevelFilter,
    /// Where to write the process id.
    pub pid_file: Option<PathBuf>,
}

/// What is wrong with a command line.
#[derive(Debug)]
pub enum ConfigError {
    /// As clap says it; help and version are among these.
    Clap(clap::Error),
    /// An argument means nothing.
    Usage(String),
    /// A setting means nothing.
    Tuneup(TuneupError),
    /// A path cannot be used for what it is to be.
    Path(String),
}

impl ConfigError {
    /// The exit status: 2 for what was typed, 1 for what was found, 0 for help.
    pub fn exit_code(&self) -> u8 {
        match self {
            ConfigError::Clap(e) => e.exit_code() as u8,
            ConfigError::Usage(_) => 2,
            ConfigError::Tuneup(e) if e.is_usage() => 2,
            ConfigError::Tuneup(_) | ConfigError::Path(_) => 1,
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::Clap(e) if e.use_stderr() => {
                // What is wrong stands before the first empty line; the rest is in
                // --help.
                let text = e.to_string();
                let lines = text.lines().map(str::trim);
                let lines: Vec<&str> = lines.take_while(|line| !line.is_empty()).collect();
                let line = lines.join(" ");
                write!(f, "{}; see --help", line.trim_start_matches("error: "))
            }
            ConfigError::Clap(e) => write!(f, "{e}"),
            ConfigError::Usage(text) | ConfigError::Path(text) => f.write_str(text),
            ConfigError::Tuneup(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for ConfigError {}

impl Options {
    /// Reads and checks a command line, program name first.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Options, ConfigError> {
        Options::try_from(Cli::try_parse_from(args).map_err(ConfigError::Clap)?)
    }
}

fn usage(text: impl Into<String>) -> ConfigError {
    ConfigError::Usage(text.into())
}

impl TryFrom<Cli> for Options {
    type Error = ConfigError;

    fn try_from(cli: Cli) -> Result<Options, ConfigError> {
        let (address, rest) = match cli.positions.as_slice() {
            [one, rest @ ..] if one.contains('.') => {
                let (shelf, slot) = one.split_once('.').unwrap_or_default();
                (
                    address(shelf.strip_prefix('e').unwrap_or(shelf), slot)?,
                    rest,
                )
            }
            [shelf, slot, rest @ ..] if !rest.is_empty() => (address(shelf, slot)?, rest),
            _ => {
                return Err(usage(
                    "expected SHELF SLOT NETIF [NETIF..] IMAGE, or e1.1 for 1 1; see --help",
                ));
            }
        };
        let (nics, image) = match rest {
            [nics @ .., image] if !nics.is_empty() => (nics, image),
            _ => {
                return Err(usage(
                    "no network interface is named: SHELF SLOT NETIF [NETIF..] IMAGE",
                ));
            }
        };
        let mut seen = HashSet::new();
        if let Some(twice) = nics.iter().find(|nic| !seen.insert(*nic)) {
            return Err(usage(format!(
                "interface {twice} is named twice; name each once"
            )));
        }
        let image = absolute(Path::new(image))?;
        let shadow = cli.shadow.as_deref().map(shadow_option).transpose()?;
        if cli.read_only && shadow.is_some() {
            return Err(usage(
                "-r and -f: a read-only image takes no writes that could go to a shadow; leave \
                 -f out, or -r if a shadow is to be merged",
            ));
        }
        let shadow = shadow
            .map(|shadow| check_shadow(shadow, &image))
            .transpose()?;
        let (state_dir, run_dir) = (absolute(&cli.state_dir)?, cli.run_dir.as_deref());
        let run_dir = run_dir.map(absolute).transpose()?;
        let pid_file = cli.pid_file.as_deref().map(absolute).transpose()?;
        if let Some(path) = &pid_file {
            check_pid_file(
                path,
                &image,
                shadow.as_ref(),
                &state_dir,
                run_dir.as_deref(),
            )?;
        }
        let mut tuneup = Tuneup::default();
        if let Some(path) = &cli.tuneup {
            tuneup.load(path).map_err(ConfigError::Tuneup)?;
        }
        for setting in &cli.set {
            tuneup.set(setting).map_err(ConfigError::Tuneup)?;
        }
        let log = cli.log.as_deref().map(|text| {
            text.parse()
                .map_err(|()| usage(format!("--log {text}: is none of stderr, syslog, journal")))
        });
        Ok(Options {
            address,
            nics: nics.to_vec(),
            image: ImageOptions {
                path: image,
                create: cli.create.as_deref().map(create).transpose()?,
                direct: cli.direct,
                read_only: cli.read_only,
                window: window(cli.offset.as_deref(), cli.length.as_deref())?,
                force: cli.force,
            },
            buffers: number("-b", &cli.buffers, 2, u64::from(u16::MAX))? as u16,
            durable: cli.durable,
            policy: policy(&cli.masks, &cli.deny)?,
            shadow,
            wait_for_interfaces: cli.wait_for_interfaces,
            shared_address: cli.shared_address,
            state_dir,
            run_dir,
            doubtful_arena: doubtful(cli.replay_arena, cli.discard_arena)?,
            discard_shadow: cli.discard_shadow,
            accept_shadow: cli.accept_shadow,
            tuneup,
            log: log.transpose()?,
            level: match (cli.quiet, cli.verbose) {
                (true, _) => LevelFilter::Warn,
                (false, 0) => LevelFilter::Info,
                (false, 1) => LevelFilter::Debug,
                (false, _) => LevelFilter::Trace,
            },
            pid_file,
        })
    }
}

/// A decimal number within bounds, and nothing that merely looks like one.
fn number(what: &str, text: &str, min: u64, max: u64) -> Result<u64, ConfigError> {
    let digits = !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    let value = if digits { text.parse().ok() } else { None };
    value
        .filter(|value| (min..=max).contains(value))
        .ok_or_else(|| {
            usage(format!(
                "{what} {text}: give a whole number from {min} to {max}"
            ))
        })
}

fn address(shelf: &str, slot: &str) -> Result<Address, ConfigError> {
    let shelf = number("shelf", shelf, 0, 65534)? as u16;
    let slot = number("slot", slot, 0, 254)? as u8;
    Address::new(shelf, slot).ok_or_else(|| usage("shelf 65535 and slot 255 mean 'every'"))
}

fn window(offset: Option<&str>, length: Option<&str>) -> Result<Window, ConfigError> {
    let max = i64::MAX as u64 / shadow::SECTOR;
    Ok(Window {
        offset: offset.map_or(Ok(0), |text| number("-o", text, 0, max))?,
        length: length.map(|text| number("-l", text, 1, max)).transpose()?,
    })
}

/// What is said of arenas that cannot be replayed as they are. No path is an empty
/// one.
fn doubtful(replay: Vec<OsString>, discard: Vec<OsString>) -> Result<Doubtful, ConfigError> {
    let is_both = !replay.is_empty() && !discard.is_empty();
    let has_no_path = replay.iter().chain(&discard).any(|path| path.is_empty());
    if is_both && (has_no_path || replay.iter().any(|path| discard.contains(path))) {
        return Err(usage(
            "--replay-arena and --discard-arena together need the paths of different arenas",
        ));
    }
    let path = |path: OsString| std::path::absolute(&path).unwrap_or_else(|_| path.into());
    let paths = |list: Vec<OsString>| list.into_iter().map(path).collect();
    Ok(Doubtful {
        replay: paths(replay),
        discard: paths(discard),
    })
}

fn create(text: &str) -> Result<Create, ConfigError> {
    let (size, prealloc) = match text.split_once(',') {
        Some((size, "prealloc")) => (size, true),
        Some((_, other)) => {
            return Err(usage(format!(
                "--create {text}: '{other}' is not 'prealloc'"
            )));
        }
        None => (text, false),
    };
    match size::parse(size) {
        Some(bytes) if bytes >= 512 && bytes % 512 == 0 && i64::try_from(bytes).is_ok() => {
            Ok(Create { bytes, prealloc })
        }
        Some(0) => Err(usage(format!(
            "--create {text}: a disk has 512 bytes at least; give a size such as 64M or 10G"
        ))),
        Some(_) => Err(usage(format!(
            "--create {text}: the size is no multiple of 512 bytes"
        ))),
        None => Err(usage(format!(
            "--create {text}: give a size such as 64M or 10G"
        ))),
    }
}

fn policy(masks: &[String], deny: &[String]) -> Result<Policy, ConfigError> {
    let mut policy = Policy::default();
    for mac in masks.iter().flat_map(|list| list.split(',')) {
        let mac: MacAddr = mac.parse().map_err(|e| usage(format!("-m: {e}")))?;
        if mac.is_group() {
            return Err(usage(format!(
                "-m: {mac} is a group address; no host sends from it"
            )));
        }
        if !policy.masks.contains(&mac) {
            policy.masks.push(mac);
        }
    }
    if policy.masks.len() > mask::LIST_MAX {
        return Err(usage(
            "-m: more than 255 addresses; mask by VLAN or switch instead",
        ));
    }
    for what in deny.iter().flat_map(|list| list.split(',')) {
        match what {
            "config" => policy.deny_config = true,
            "mask" => policy.deny_mask = true,
            "reserve" => policy.deny_reserve = true,
            "features" => policy.deny_features = true,
            other => {
                return Err(usage(format!(
                    "--deny {other}: is none of config, mask, reserve, features"
                )));
            }
        }
    }
    Ok(policy)
}

fn shadow_option(text: &str) -> Result<ShadowOption, ConfigError> {
    let (path, limit) = match text.rsplit_once(',') {
        Some((path, limit)) => (path, Some(number("-f limit", limit, 1, u64::MAX >> 20)?)),
        None => (text, None),
    };
    Ok(ShadowOption {
        path: absolute(Path::new(path))?,
        limit_mib: limit,
    })
}

/// Refuses a shadow path that could not serve, before anything is opened. The
/// path it returns has no links on the way, so that a later start knows it again.
fn check_shadow(mut shadow: ShadowOption, image: &Path) -> Result<ShadowOption, ConfigError> {
    let path = shadow.path.clone();
    let bad = |why: &str| Err(ConfigError::Path(format!("-f {}: {why}", path.display())));
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if real(&path) == real(image) {
        return bad("is the image itself; name another file");
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return bad("is no name of a file; give one");
    };
    if !parent.is_dir() {
        return bad("its directory does not exist; make it first");
    }
    if [".new", ".thaw", ".cut", ".lock"]
        .iter()
        .any(|end| name.as_encoded_bytes().ends_with(end.as_bytes()))
    {
        return bad(
            "ends in .new, .thaw, .cut or .lock, which a freeze or a backup adds to it; choose \
             another name",
        );
    }
    shadow.path = real(parent).join(name);
    Ok(shadow)
}

/// Refuses a pid file in the place of a file that the export has or may yet make.
fn check_pid_file(
    path: &Path,
    image: &Path,
    shadow: Option<&ShadowOption>,
    state_dir: &Path,
    run_dir: Option<&Path>,
) -> Result<(), ConfigError> {
    let real = |path: &Path| match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = std::fs::canonicalize(parent);
            parent.map_or_else(|_| path.to_owned(), |parent| parent.join(name))
        }
        _ => path.to_owned(),
    };
    let path = real(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A freeze adds endings to the shadow's name.
    let is_of_shadow = |shadow: &ShadowOption| {
        let rest = shadow
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy();
        let rest = name.strip_prefix(&*rest);
        path.parent() == shadow.path.parent()
            && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let is_in = |dir: &Path| path.parent() == Some(&real(dir));
    let defaults = RUN_DIRS.map(Path::new);
    let run_dirs = || run_dir.into_iter().chain(defaults);
    let what = if path == real(image) || std::fs::canonicalize(image).is_ok_and(|i| i == path) {
        "is the image itself"
    } else if shadow.is_some_and(is_of_shadow) {
        "is a name of the shadow's"
    } else if name.ends_with(".toml") && is_in(state_dir) {
        "is a name of the state directory's"
    } else if run_dirs().any(|dir| is_in(dir) && name.ends_with(".arena"))
        || run_dirs().any(|dir| [ARENAS, CLAIMS].iter().any(|sub| is_in(&dir.join(sub))))
    {
        "is a name of the run directory's"
    } else {
        return Ok(());
    };
    let path = path.display();
    Err(ConfigError::Path(format!(
        "--pid-file {path}: {what}; name another file"
    )))
}

fn absolute(path: &Path) -> Result<PathBuf, ConfigError> {
    if path.as_os_str().is_empty() {
        return Err(usage("an empty path means nothing; name a file"));
    }
    std::path::absolute(path).map_err(|e| usage(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests;
