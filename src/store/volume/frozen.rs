//! How long a freeze lasts, and why it ends.

use std::fmt;
use std::time::{Duration, Instant};

use super::Volume;

const MINUTE: Duration = Duration::from_secs(60);
/// From this minute of a freeze on the log reminds of it, every minute.
const REMIND_FROM: u32 = 10;

/// Why a thaw waits for its moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thaw {
    /// The operator ordered it.
    Ordered,
    /// The process is to stop, and merges first.
    Stop,
    /// The shadow can take no more.
    Full,
    /// The freeze lasted for `freeze_max`.
    Late,
}

impl fmt::Display for Thaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Thaw::Ordered => "thaw",
            Thaw::Stop => "thaw before the stop",
            Thaw::Full => "thaw: the shadow is full",
            Thaw::Late => "thaw: freeze_max is over",
        })
    }
}

/// The time since the image is quiesced, or since the start that found it so.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frozen {
    since: Instant,
    /// The next minute of which the log tells.
    minute: u32,
}

impl Frozen {
    pub fn new(now: Instant) -> Frozen {
        Frozen {
            since: now,
            minute: REMIND_FROM,
        }
    }

    /// Returns the minutes that it lasts, where the log is to tell them now.
    pub fn remind(&mut self, now: Instant) -> Option<u32> {
        let minutes = (now.saturating_duration_since(self.since).as_secs() / 60) as u32;
        let due = minutes >= self.minute;
        if due {
            self.minute = minutes + 1;
        }
        due.then_some(minutes)
    }

    /// Returns when it is to end by itself; `max` is zero for never.
    pub fn end(&self, max: Duration) -> Option<Instant> {
        (!max.is_zero()).then(|| self.since + max)
    }

    /// Returns when there is something to do.
    pub fn deadline(&self, max: Duration) -> Instant {
        let reminder = self.since + MINUTE * self.minute;
        self.end(max).map_or(reminder, |end| end.min(reminder))
    }
}

impl Volume {
    /// Reminds of a freeze that lasts, and ends one that lasts too long.
    pub(super) fn look_at_time(&mut self, now: Instant) {
        let max = self.options.freeze_max;
        let frozen = self.freezing.frozen.get_or_insert(Frozen::new(now));
        let minutes = frozen.remind(now);
        let end = frozen.end(max);
        if self.freezing.thaw.is_some() || self.draining {
            return;
        }
        if let Some(minutes) = minutes {
            let end = end.map_or("USR1 USR1 USR2 thaw it".to_owned(), |end| {
                let seconds = end.saturating_duration_since(now).as_secs();
                format!("it thaws by itself in {seconds} s (freeze_max)")
            });
            log::warn!(
                "{}: frozen for {minutes} min, {} MiB to merge; {end}",
                self.shadow(),
                self.unmerged_mib()
            );
        }
        if end.is_some_and(|end| end <= now) {
            log::warn!(
                "{}: frozen for {} s (freeze_max)",
                self.shadow(),
                max.as_secs()
            );
            self.freezing.thaw = Some(Thaw::Late);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_reminds_every_minute_from_the_tenth_on() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut frozen = Frozen::new(start);
        let mut told = Vec::new();
        for second in 0..=900 {
            // Busy with something else for a while.
            if (770..850).contains(&second) {
                continue;
            }
            let due = frozen.deadline(Duration::ZERO) <= at(second);
            let minutes = frozen.remind(at(second));
            assert_eq!(minutes.is_some(), due, "second {second}");
            told.extend(minutes.map(|minutes| (second, minutes)));
        }
        let expected = [(600, 10), (660, 11), (720, 12), (850, 14), (900, 15)];
        assert_eq!(told, expected);
    }

    #[test]
    fn it_ends_by_itself_only_when_told() {
        let start = Instant::now();
        let frozen = Frozen::new(start);
        let max = Duration::from_secs(700);
        assert_eq!(frozen.end(Duration::ZERO), None);
        assert_eq!(frozen.end(max), Some(start + max));
        assert_eq!(frozen.deadline(max), start + Duration::from_secs(600));
        let max = Duration::from_secs(5);
        assert_eq!(frozen.deadline(max), start + max);
    }
}
