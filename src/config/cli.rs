//! The command line as it is typed.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;

/// Exports a disk image or block device over ATA over Ethernet.
#[derive(Debug, Parser)]
#[command(
    name = "aoede",
    version,
    override_usage = "aoede [OPTIONS] SHELF SLOT NETIF [NETIF..] IMAGE\n       \
                      aoede [OPTIONS] eSHELF.SLOT NETIF [NETIF..] IMAGE",
    after_help = "Options may stand before, between or after the positions. \
                  Settings for --set and --tuneup: see tuneup.toml(5). More: aoede(8)."
)]
pub struct Cli {
    /// SHELF (0..65534) and SLOT (0..254), or both as e1.1, one or more network
    /// interfaces, and the image: a regular file or block device
    #[arg(value_name = "SHELF SLOT NETIF.. IMAGE")]
    pub positions: Vec<String>,

    /// Frames an initiator may have outstanding, 2..65535
    #[arg(short = 'b', value_name = "COUNT", default_value = "64")]
    pub buffers: String,

    /// Shadow file for freezes, with a size limit in MiB
    #[arg(short = 'f', value_name = "PATH[,MiB]")]
    pub shadow: Option<String>,

    /// Past the page cache (O_DIRECT)
    #[arg(short = 'd')]
    pub direct: bool,

    /// Durable: acknowledge a write only when it is on stable storage
    #[arg(short = 's')]
    pub durable: bool,

    /// Read-only
    #[arg(short = 'r')]
    pub read_only: bool,

    /// Answer these hosts only
    #[arg(short = 'm', value_name = "MAC[,MAC..]")]
    pub masks: Vec<String>,

    /// First sector of the image to export
    #[arg(short = 'o', value_name = "SECTORS")]
    pub offset: Option<String>,

    /// Number of sectors to export
    #[arg(short = 'l', value_name = "SECTORS")]
    pub length: Option<String>,

    /// Make the image if there is none; suffixes K, M, G, T
    #[arg(long, value_name = "SIZE[,prealloc]")]
    pub create: Option<String>,

    /// Refuse these changes from the network: config, mask, reserve, features
    #[arg(long, value_name = "WHAT[,WHAT..]")]
    pub deny: Vec<String>,

    /// Start without the interfaces that are not there yet, and take them when
    /// they appear; the default where systemd starts it
    #[arg(long)]
    pub wait_for_interfaces: bool,

    /// Serve even if another target answers under this address
    #[arg(long)]
    pub shared_address: bool,

    /// Where config string, masks and reservation are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/aoede")]
    pub state_dir: PathBuf,

    /// Where the cache's memory is kept: /run/aoede, or /dev/shm/aoede where
    /// /run is no memory
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,

    /// Serve a block device that is mounted, part of another device, or attached
    /// twice
    #[arg(long)]
    pub force: bool,

    /// Discard acknowledged writes that a dead target has left and that cannot
    /// be used: all of this image, the only one that may be of this image, or this
    /// one
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "")]
    pub discard_arena: Vec<OsString>,

    /// Bring the writes that a dead target has left to this image, though it was
    /// changed since or may be another one; in the same way
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "")]
    pub replay_arena: Vec<OsString>,

    /// Discard what was written during a freeze whose shadow cannot be used
    #[arg(long)]
    pub discard_shadow: bool,

    /// Take the shadow for this image's, though it may be another one's
    #[arg(long, requires = "shadow", conflicts_with = "discard_shadow")]
    pub accept_shadow: bool,

    /// Settings from a file
    #[arg(long, value_name = "FILE")]
    pub tuneup: Option<PathBuf>,

    /// One setting
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Where messages go: stderr, syslog or journal
    #[arg(long, value_name = "WHERE")]
    pub log: Option<String>,

    /// Write the process id to a file while serving
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,

    /// Say which engines and files are used, and the counters every minute; twice,
    /// every second
    #[arg(short = 'v', long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Say only what is wrong
    #[arg(short = 'q', long, conflicts_with = "verbose")]
    pub quiet: bool,
}
