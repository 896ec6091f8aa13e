//! Where messages end up.

use std::io::Write;
use std::os::unix::net::UnixDatagram;

use log::Level;
use nix::sys::stat::fstat;
use syslog::{Facility, Formatter3164, LogFormat, Severity};

use crate::config::LogChoice;

const SYSLOG: &str = "/dev/log";

/// One place for messages.
pub(super) enum Sink {
    /// Plain lines.
    Stderr,
    /// Lines with the level in front, `<6>like this`, as systemd reads them.
    Journal,
    /// The log daemon.
    Syslog(Syslog),
}

impl Sink {
    pub fn new(choice: LogChoice, name: &str) -> Sink {
        match choice {
            LogChoice::Stderr => Sink::Stderr,
            LogChoice::Journal => Sink::Journal,
            LogChoice::Syslog => Sink::Syslog(Syslog::new(SYSLOG, name)),
        }
    }

    /// Writes a line; says whether it got there.
    pub fn write(&mut self, level: Level, text: &str) -> bool {
        match self {
            Sink::Stderr => writeln!(std::io::stderr(), "aoede: {}{text}", word(level)).is_ok(),
            Sink::Journal => {
                writeln!(std::io::stderr(), "<{}>{text}", severity(level) as u8).is_ok()
            }
            Sink::Syslog(syslog) => syslog.write(level, text),
        }
    }
}

/// A socket to the log daemon, made again when the daemon was restarted, and
/// never waited for.
pub(super) struct Syslog {
    path: String,
    formatter: Formatter3164,
    socket: Option<UnixDatagram>,
}

impl Syslog {
    fn new(path: &str, name: &str) -> Syslog {
        let formatter = Formatter3164 {
            facility: Facility::LOG_DAEMON,
            hostname: None,
            process: name.to_owned(),
            pid: std::process::id(),
        };
        Syslog {
            path: path.to_owned(),
            formatter,
            socket: None,
        }
    }

    fn write(&mut self, level: Level, text: &str) -> bool {
        let mut line = Vec::new();
        let formatted = match severity(level) {
            Severity::LOG_ERR => self.formatter.err(&mut line, text),
            Severity::LOG_WARNING => self.formatter.warning(&mut line, text),
            Severity::LOG_INFO => self.formatter.info(&mut line, text),
            _ => self.formatter.debug(&mut line, text),
        };
        // Twice: the first failure may be that of a daemon that is gone, whose
        // successor listens at the same path.
        formatted.is_ok() && (self.send(&line) || self.send(&line))
    }

    fn send(&mut self, line: &[u8]) -> bool {
        if self.socket.is_none() {
            self.socket = connect(&self.path).ok();
        }
        match self.socket.as_ref().map(|socket| socket.send(line)) {
            Some(Ok(_)) => true,
            Some(Err(e)) if e.kind() == std::io::ErrorKind::WouldBlock => false,
            _ => {
                self.socket = None;
                false
            }
        }
    }
}

fn connect(path: &str) -> std::io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn severity(level: Level) -> Severity {
    match level {
        Level::Error => Severity::LOG_ERR,
        Level::Warn => Severity::LOG_WARNING,
        Level::Info => Severity::LOG_INFO,
        Level::Debug | Level::Trace => Severity::LOG_DEBUG,
    }
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Error => "error: ",
        Level::Warn => "warning: ",
        _ => "",
    }
}

/// Whether systemd reads our standard error: it says so by its device and inode
/// in the environment.
pub(super) fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    let Ok(stat) = fstat(std::io::stderr()) else {
        return false;
    };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_daemon_may_come_go_and_stall() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut syslog = Syslog::new(path.to_str().unwrap(), "aoede");
        assert!(!syslog.write(Level::Info, "nobody there"));

        let daemon = UnixDatagram::bind(&path).unwrap();
        assert!(syslog.write(Level::Warn, "hello"));
        let mut buf = [0; 256];
        let len = daemon.recv(&mut buf).unwrap();
        let text = String::from_utf8_lossy(&buf[..len]).into_owned();
        assert!(
            text.starts_with("<28>") && text.ends_with("hello"),
            "{text}"
        );

        drop(daemon);
        std::fs::remove_file(&path).unwrap();
        assert!(!syslog.write(Level::Info, "gone"));
        let daemon = UnixDatagram::bind(&path).unwrap();
        assert!(syslog.write(Level::Error, "back"));

        // One that reads nothing fills up and is not waited for.
        let mut written = 0;
        while syslog.write(Level::Info, "stalled") {
            written += 1;
            assert!(written < 100_000, "never full");
        }
        let _ = daemon.recv(&mut buf).unwrap();
    }
}
