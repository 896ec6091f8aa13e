//! The state as text, as it stands in its file.
//!
//! ```toml
//! version = 2
//! config = "6469736b"          # the config string, in hexadecimal
//! masks = ["52:54:00:12:34:56"]
//! reserved = []
//! write_cache = true           # false: off for every host
//! write_cache_off = []         # hosts that have switched it off for themselves
//! smart_off = []               # hosts that have disabled SMART for themselves
//! ```
//!
//! Version 1, of aoede 0.1.0, has `smart` in place of the last two keys, and
//! its two switches were every host's. A write cache that was off stays off for
//! every host, so that no write becomes less safe than it was. SMART that was
//! disabled is enabled: it only hid the health of the disk, from everyone.

use std::fmt;

use toml::{Table, Value};

use super::{MacSet, WireState};
use crate::wire::MacAddr;
use crate::wire::config::STRING_MAX;
use crate::wire::mask::LIST_MAX;

const VERSION: i64 = 2;
/// The version that aoede 0.1.0 wrote.
const FIRST_VERSION: i64 = 1;

/// Why a text is no state. A state that cannot be read is never taken for an
/// empty one: that would open a masked disk to everyone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadState(String);

impl fmt::Display for BadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadState {}

impl WireState {
    /// The text of it.
    pub fn to_text(&self) -> String {
        let hex: String = self
            .config
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let macs = |list: &[MacAddr]| {
            Value::Array(
                list.iter()
                    .map(|mac| Value::String(mac.to_string()))
                    .collect(),
            )
        };
        let mut table = Table::new();
        table.insert("version".into(), VERSION.into());
        table.insert("config".into(), hex.into());
        table.insert("masks".into(), macs(&self.masks));
        table.insert("reserved".into(), macs(&self.reserved));
        table.insert("write_cache".into(), self.write_cache.into());
        let off = self.write_cache_off.as_slice();
        table.insert("write_cache_off".into(), macs(off));
        table.insert("smart_off".into(), macs(self.smart_off.as_slice()));
        table.to_string()
    }

    /// Reads it back. Every key must be there and no other.
    pub fn from_text(text: &str) -> Result<WireState, BadState> {
        let mut table: Table = text
            .parse()
            .map_err(|e: toml::de::Error| BadState(e.message().to_owned()))?;
        let mut take = |key: &str| {
            table
                .remove(key)
                .ok_or_else(|| BadState(format!("'{key}' is missing")))
        };
        let is_first = match take("version")? {
            Value::Integer(VERSION) => false,
            Value::Integer(FIRST_VERSION) => true,
            other => return Err(BadState(format!("version {other} is not known here"))),
        };
        let mut state = WireState {
            config: hex(&take("config")?)?,
            masks: macs("masks", take("masks")?, LIST_MAX)?,
            reserved: macs("reserved", take("reserved")?, LIST_MAX)?,
            write_cache: flag("write_cache", &take("write_cache")?)?,
            ..WireState::default()
        };
        if is_first {
            flag("smart", &take("smart")?)?;
        } else {
            state.write_cache_off = set("write_cache_off", take("write_cache_off")?)?;
            state.smart_off = set("smart_off", take("smart_off")?)?;
        }
        match table.keys().next() {
            Some(key) => Err(BadState(format!("'{key}' is not known here"))),
            None => Ok(state),
        }
    }
}

fn hex(value: &Value) -> Result<Vec<u8>, BadState> {
    let bad = || BadState("'config' is no hexadecimal string of at most 1024 bytes".into());
    let text = value
        .as_str()
        .filter(|t| t.is_ascii() && t.len() % 2 == 0)
        .ok_or_else(bad)?;
    let bytes: Result<Vec<u8>, _> = (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16))
        .collect();
    bytes.ok().filter(|b| b.len() <= STRING_MAX).ok_or_else(bad)
}

fn set(key: &str, value: Value) -> Result<MacSet, BadState> {
    let mut set = MacSet::default();
    for mac in macs(key, value, MacSet::MAX)? {
        // There is room: the list is no longer than a set may be.
        let _ = set.insert(mac);
    }
    Ok(set)
}

fn macs(key: &str, value: Value, most: usize) -> Result<Vec<MacAddr>, BadState> {
    let bad = || {
        BadState(format!(
            "'{key}' is no list of at most {most} MAC addresses"
        ))
    };
    let Value::Array(list) = value else {
        return Err(bad());
    };
    if list.len() > most {
        return Err(bad());
    }
    list.iter()
        .map(|mac| mac.as_str().and_then(|m| m.parse().ok()).ok_or_else(bad))
        .collect()
}

fn flag(key: &str, value: &Value) -> Result<bool, BadState> {
    value
        .as_bool()
        .ok_or_else(|| BadState(format!("'{key}' is neither true nor false")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(config in proptest::collection::vec(any::<u8>(), 0..1024),
                                   masks in proptest::collection::vec(any::<[u8; 6]>(), 0..255),
                                   reserved in proptest::collection::vec(any::<[u8; 6]>(), 0..5),
                                   off in proptest::collection::vec(any::<[u8; 6]>(), 0..64),
                                   smart in proptest::collection::vec(any::<[u8; 6]>(), 0..64),
                                   write_cache: bool) {
            let list = |l: Vec<[u8; 6]>| l.into_iter().map(MacAddr).collect();
            let set = |l: Vec<[u8; 6]>| {
                let mut set = MacSet::default();
                l.into_iter().for_each(|mac| set.insert(MacAddr(mac)).unwrap());
                set
            };
            let state = WireState { config, masks: list(masks), reserved: list(reserved),
                                    write_cache, write_cache_off: set(off), smart_off: set(smart) };
            prop_assert_eq!(WireState::from_text(&state.to_text()), Ok(state));
        }

        #[test]
        fn damage_is_never_taken_for_a_state_without_masks(at in 0usize..200, byte: u8) {
            let state = WireState { masks: vec![MacAddr([2; 6])], ..WireState::default() };
            let mut text = state.to_text().into_bytes();
            let at = at % text.len();
            text[at] = byte;
            if let Ok(read) = WireState::from_text(&String::from_utf8_lossy(&text)) {
                prop_assert!(!read.masks.is_empty());
            }
        }
    }

    /// As aoede 0.1.0 wrote it.
    const FIRST: &str = "\
config = \"6469736b\"
masks = [\"52:54:00:12:34:56\"]
reserved = [\"52:54:00:12:34:57\"]
smart = false
version = 1
write_cache = false
";

    #[test]
    fn a_state_of_0_1_0_keeps_the_write_cache_off_for_everyone() {
        let state = WireState::from_text(FIRST).unwrap();
        let expected = WireState {
            config: b"disk".to_vec(),
            masks: vec!["52:54:00:12:34:56".parse().unwrap()],
            reserved: vec!["52:54:00:12:34:57".parse().unwrap()],
            write_cache: false,
            ..WireState::default()
        };
        assert_eq!(state, expected);
        // It is written as the new version, which says the same.
        assert_eq!(WireState::from_text(&state.to_text()), Ok(state));
        let on = FIRST.replace("write_cache = false", "write_cache = true");
        assert!(WireState::from_text(&on).unwrap().write_cache);
        for gone in ["smart", "write_cache", "masks", "version"] {
            let lines = FIRST.lines().filter(|line| !line.starts_with(gone));
            let text: Vec<&str> = lines.collect();
            assert!(WireState::from_text(&text.join("\n")).is_err(), "{gone}");
        }
        let mixed = format!("{FIRST}smart_off = []");
        assert!(WireState::from_text(&mixed).is_err());
    }

    #[test]
    fn more_hosts_than_a_set_holds_are_refused() {
        let list = |count| {
            let mac = |n| format!("\"02:00:00:00:00:{n:02x}\"");
            let macs: Vec<String> = (0..count).map(mac).collect();
            let text = WireState::default().to_text();
            text.replace(
                "smart_off = []",
                &format!("smart_off = [{}]", macs.join(",")),
            )
        };
        let state = WireState::from_text(&list(64)).unwrap();
        assert_eq!(state.smart_off.as_slice().len(), 64);
        let error = WireState::from_text(&list(65)).unwrap_err().to_string();
        assert!(error.contains("at most 64 MAC"), "{error}");
    }

    #[test]
    fn a_state_cut_short_is_refused() {
        let text = WireState::default().to_text();
        for len in 0..text.len() - 1 {
            assert!(WireState::from_text(&text[..len]).is_err(), "{len}");
        }
        assert!(WireState::from_text(&format!("{text}\nmore = 1")).is_err());
    }
}
