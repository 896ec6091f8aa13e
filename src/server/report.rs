//! What is told of an export: its interfaces, and the counters in the log, as often
//! as -v asks for.

use std::time::{Duration, Instant};

use crate::net::Nic;
use crate::target::Counters;
use crate::text::count;
use crate::wire::{Address, MacAddr, sectors_per_frame};

/// How often with -v.
const SELDOM: Duration = Duration::from_secs(60);
/// How often with -vv.
const OFTEN: Duration = Duration::from_secs(1);

/// What was told, and when the next line is due.
#[derive(Debug)]
pub(super) struct Report {
    every: Option<Duration>,
    due: Instant,
    told: Counters,
}

impl Report {
    /// Begins at `now`, as often as this level of messages says.
    pub fn new(now: Instant, level: log::LevelFilter) -> Report {
        Report {
            every: match level {
                log::LevelFilter::Trace => Some(OFTEN),
                log::LevelFilter::Debug => Some(SELDOM),
                _ => None,
            },
            due: now,
            told: Counters::default(),
        }
    }

    /// When the loop is to look here again; `None` if never.
    pub fn due(&self) -> Option<Instant> {
        self.every.map(|_| self.due)
    }

    /// Returns the line that is due; none where nothing has changed.
    pub fn line(&mut self, now: Instant, address: Address, counters: &Counters) -> Option<String> {
        let every = self.every.filter(|_| now >= self.due)?;
        self.due = now + every;
        if self.told == *counters {
            return None;
        }
        self.told = counters.clone();
        Some(format!("{address}: {counters}"))
    }
}

/// The line of an interface.
pub(super) fn describe_nic(nic: &Nic) -> String {
    match nic.link {
        Some(link) => {
            let (mac, mtu) = (MacAddr(link.mac), link.mtu);
            let sectors = count(u64::from(sectors_per_frame(mtu)), "sector");
            let down = if link.running { "" } else { ", link down" };
            format!("{}: {mac}, MTU {mtu}, {sectors} per frame{down}", nic.name)
        }
        None => format!("{}: not there", nic.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::LevelFilter;

    #[test]
    fn the_counters_are_told_when_they_changed_and_not_more_often_than_asked() {
        let (now, address) = (Instant::now(), Address::new(1, 2).unwrap());
        let mut quiet = Report::new(now, LevelFilter::Info);
        assert_eq!(quiet.due(), None);
        for (level, every) in [(LevelFilter::Debug, SELDOM), (LevelFilter::Trace, OFTEN)] {
            let mut report = Report::new(now, level);
            let mut counters = Counters::default();
            assert_eq!(report.line(now, address, &counters), None);
            counters.requests += 7;
            let early = now + every / 2;
            assert_eq!(report.line(early, address, &counters), None);
            assert_eq!(report.due(), Some(now + every));
            let line = report.line(now + every, address, &counters).unwrap();
            assert!(line.starts_with("e1.2: ") && line.contains("requests"));
            assert_eq!(report.line(now + 2 * every, address, &counters), None);
            assert_eq!(quiet.line(now + every, address, &counters), None);
        }
    }
}
