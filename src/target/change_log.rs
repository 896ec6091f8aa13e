//! What the operator is told of changes that hosts make: what is different since
//! it was told last, shortened, in one line a second at most.

use std::fmt::Write;
use std::time::{Duration, Instant};

use crate::access::{MacSet, WireState};
use crate::text::count;
use crate::wire::MacAddr;

/// How often there is a line.
const INTERVAL: Duration = Duration::from_secs(1);
/// The most characters of a config string in it.
const STRING_SHOWN: usize = 32;
/// The most addresses of a list in it.
const MACS_SHOWN: usize = 3;

/// Changes that were saved and not written about yet.
#[derive(Debug)]
pub(super) struct ChangeLog {
    /// The state that the last line left.
    said: WireState,
    said_at: Option<Instant>,
    /// Number of changes since then, time of the first, source of the last.
    count: u64,
    first: Option<Instant>,
    last_by: MacAddr,
}

impl ChangeLog {
    /// A log that begins with this state.
    pub fn new(state: WireState) -> ChangeLog {
        ChangeLog {
            said: state,
            said_at: None,
            count: 0,
            first: None,
            last_by: MacAddr::BROADCAST,
        }
    }

    /// Takes note of changes that are saved; the last was made by `by`.
    pub fn saved(&mut self, now: Instant, count: u64, by: MacAddr) {
        self.count += count;
        self.last_by = by;
        self.first.get_or_insert(now);
    }

    /// When there is to be a line; `None` if nothing has changed.
    pub fn due(&self) -> Option<Instant> {
        let again = self.said_at.map(|at| at + INTERVAL);
        self.first
            .map(|first| again.map_or(first, |again| again.max(first)))
    }

    /// The line, about the state as it is now.
    pub fn line(&mut self, now: Instant, state: &WireState) -> String {
        let mut parts = differences(&self.said, state);
        if parts.is_empty() {
            parts.push("no difference is left".to_owned());
        }
        let mut line = parts.join("; ");
        // Writing to a string does not fail.
        let _ = match self.count {
            1 => write!(line, "; changed by {}", self.last_by),
            count => write!(line, "; {count} changes, the last by {}", self.last_by),
        };
        *self = ChangeLog {
            said_at: Some(now),
            ..ChangeLog::new(state.clone())
        };
        line
    }
}

/// What is different, each in some words.
fn differences(before: &WireState, now: &WireState) -> Vec<String> {
    let mut parts = Vec::new();
    if before.config != now.config {
        parts.push(format!("config string is now {}", text(&now.config)));
    }
    if before.masks != now.masks {
        let hosts = count(now.masks.len() as u64, "host");
        let lists = moves(&before.masks, &now.masks);
        parts.push(format!("mask list has {hosts} now{lists}"));
    }
    if before.reserved != now.reserved {
        parts.push(match &now.reserved[..] {
            [] => "not reserved any more".to_owned(),
            hosts => format!("reserved now by {}", shortened(hosts.iter())),
        });
    }
    for (what, before, now) in [
        ("write cache", &before.write_cache_off, &now.write_cache_off),
        ("SMART", &before.smart_off, &now.smart_off),
    ] {
        if before != now {
            parts.push(format!("{what} is {}", switched(before, now)));
        }
    }
    parts
}

/// A config string, shortened and printable, and how long it is.
fn text(string: &[u8]) -> String {
    let all = String::from_utf8_lossy(string);
    let shown: String = all.chars().take(STRING_SHOWN).collect();
    let more = if shown.len() < all.len() { ".." } else { "" };
    format!(
        "\"{}\"{more} ({})",
        shown.escape_debug(),
        count(string.len() as u64, "byte")
    )
}

/// Which addresses came into a list, and which left it.
fn moves(before: &[MacAddr], now: &[MacAddr]) -> String {
    let added = now.iter().filter(|mac| !before.contains(mac));
    let gone = before.iter().filter(|mac| !now.contains(mac));
    let mut text = String::new();
    for (what, list) in [("added", shortened(added)), ("removed", shortened(gone))] {
        if !list.is_empty() {
            // Writing to a string does not fail.
            let _ = write!(text, ", {what} {list}");
        }
    }
    text
}

/// Hosts that have something switched off now, and hosts that have it on.
fn switched(before: &MacSet, now: &MacSet) -> String {
    let (before, now) = (before.as_slice(), now.as_slice());
    let off = shortened(now.iter().filter(|mac| !before.contains(mac)));
    let on = shortened(before.iter().filter(|mac| !now.contains(mac)));
    let lists = [("off", off), ("on", on)];
    let lists = lists.iter().filter(|(_, list)| !list.is_empty());
    let lists: Vec<String> = lists.map(|(to, list)| format!("{to} for {list}")).collect();
    lists.join(", ")
}

/// The first addresses, and how many more there are; empty if there are none.
fn shortened<'a>(macs: impl Iterator<Item = &'a MacAddr>) -> String {
    let macs: Vec<String> = macs.map(MacAddr::to_string).collect();
    let (shown, more) = macs.split_at(macs.len().min(MACS_SHOWN));
    let shown = shown.join(" ");
    match more.len() {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xA]);

    fn many(count: u8) -> Vec<MacAddr> {
        (0..count).map(|n| MacAddr([2, 1, 0, 0, 0, n])).collect()
    }

    #[test]
    fn a_line_says_what_is_different_and_no_more() {
        let now = Instant::now();
        let mut log = ChangeLog::new(WireState::default());
        let mut state = WireState::default();
        let mut line = |count, change: &dyn Fn(&mut WireState)| {
            change(&mut state);
            log.saved(now, count, A);
            log.line(now, &state)
        };
        assert_eq!(
            line(1, &|state| state.config = b"di\"sk\n".to_vec()),
            "config string is now \"di\\\"sk\\n\" (6 bytes); changed by 02:00:00:00:00:0a"
        );
        assert_eq!(
            line(1, &|state| state.config = b"d".to_vec()),
            "config string is now \"d\" (1 byte); changed by 02:00:00:00:00:0a"
        );
        assert_eq!(
            line(1, &|state| state.masks = many(1)),
            "mask list has 1 host now, added 02:01:00:00:00:00; changed by 02:00:00:00:00:0a"
        );
        assert_eq!(
            line(3, &|state| state.masks = many(2)),
            "mask list has 2 hosts now, added 02:01:00:00:00:01; 3 changes, the last by 02:00:00:00:00:0a"
        );
        let by = "; changed by 02:00:00:00:00:0a";
        assert_eq!(
            line(1, &|state| state.masks = vec![state.masks[0], A]),
            format!(
                "mask list has 2 hosts now, added 02:00:00:00:00:0a, removed 02:01:00:00:00:01{by}"
            )
        );
        assert_eq!(
            line(1, &|state| state.reserved = many(5)),
            format!(
                "reserved now by 02:01:00:00:00:00 02:01:00:00:00:01 02:01:00:00:00:02 and 2 more{by}"
            )
        );
        assert_eq!(
            line(1, &|state| state.reserved.clear()),
            format!("not reserved any more{by}")
        );
        assert_eq!(
            line(1, &|state| {
                state.write_cache_off.insert(A).unwrap();
                state.smart_off.insert(many(1)[0]).unwrap();
            }),
            format!(
                "write cache is off for 02:00:00:00:00:0a; SMART is off for 02:01:00:00:00:00{by}"
            )
        );
        assert_eq!(
            line(1, &|state| {
                state.write_cache_off.remove(A);
                state.write_cache_off.insert(many(1)[0]).unwrap();
            }),
            format!("write cache is off for 02:01:00:00:00:00, on for 02:00:00:00:00:0a{by}")
        );
        assert_eq!(
            line(2, &|_| {}),
            "no difference is left; 2 changes, the last by 02:00:00:00:00:0a"
        );
    }

    #[test]
    fn a_line_is_short_whatever_is_set() {
        let now = Instant::now();
        let mut log = ChangeLog::new(WireState::default());
        let mut state = WireState {
            config: vec![0xFF; 1024],
            masks: many(255),
            reserved: many(255),
            ..WireState::default()
        };
        for mac in many(64) {
            state.write_cache_off.insert(mac).unwrap();
            state.smart_off.insert(mac).unwrap();
        }
        log.saved(now, u64::MAX, A);
        let line = log.line(now, &state);
        assert!(line.len() < 1000, "{} bytes: {line}", line.len());
    }

    #[test]
    fn there_is_one_line_a_second() {
        let start = Instant::now();
        let mut log = ChangeLog::new(WireState::default());
        assert_eq!(log.due(), None);
        log.saved(start, 1, A);
        assert_eq!(log.due(), Some(start));
        log.line(start, &WireState::default());
        assert_eq!(log.due(), None);
        let soon = start + INTERVAL / 10;
        log.saved(soon, 1, A);
        assert_eq!(log.due(), Some(start + INTERVAL));
        log.line(start + INTERVAL, &WireState::default());
        let late = start + 5 * INTERVAL;
        log.saved(late, 1, A);
        assert_eq!(log.due(), Some(late));
    }
}
