//! How far a merge has come, on a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::human;

/// How often the line is drawn again.
const EVERY: Duration = Duration::from_millis(100);
/// Characters of the bar.
const WIDTH: u64 = 30;

/// A line on standard error that is drawn over and over; nothing where that is
/// no terminal.
#[derive(Debug)]
pub struct Bar {
    total: u64,
    begun: Instant,
    drawn: Option<Instant>,
    shown: bool,
}

impl Bar {
    /// A bar for so many bytes.
    pub fn new(total: u64) -> Bar {
        Bar {
            total,
            begun: Instant::now(),
            drawn: None,
            shown: io::stderr().is_terminal(),
        }
    }

    /// So many are done.
    pub fn at(&mut self, done: u64) {
        if !self.shown || self.drawn.is_some_and(|at| at.elapsed() < EVERY) {
            return;
        }
        self.drawn = Some(Instant::now());
        let line = line(done, self.total, self.begun.elapsed());
        // A terminal that is gone does not stop a merge.
        let _ = write!(io::stderr(), "\r{line}\x1b[K");
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn line(done: u64, total: u64, time: Duration) -> String {
    let part = |of: u64| {
        let part = u128::from(done.min(total)) * u128::from(of) / u128::from(total.max(1));
        part as usize
    };
    let full = part(WIDTH);
    let rate = (done as f64 / time.as_secs_f64().max(0.001)) as u64;
    format!(
        "[{}{}] {:3} %  {} of {}, {}/s",
        "#".repeat(full),
        "-".repeat(WIDTH as usize - full),
        part(100),
        human(done),
        human(total),
        human(rate)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_part_and_rate() {
        assert_eq!(
            line(1 << 30, 2 << 30, Duration::from_secs(4)),
            "[###############---------------]  50 %  1.0 GiB of 2.0 GiB, 256.0 MiB/s"
        );
        for (done, total) in [(0, 0), (5, 0), (u64::MAX, u64::MAX), (9, 3)] {
            assert!(line(done, total, Duration::ZERO).starts_with('['));
        }
    }
}
