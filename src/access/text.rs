//! The state as text, as it stands in its file.
//!
//! ```toml
//! version = 1
//! config = "6469736b"          # the config string, in hexadecimal
//! masks = ["52:54:00:12:34:56"]
//! reserved = []
//! write_cache = true
//! smart = true
//! ```

use std::fmt;

use toml::{Table, Value};

use super::WireState;
use crate::wire::MacAddr;
use crate::wire::config::STRING_MAX;
use crate::wire::mask::LIST_MAX;

const VERSION: i64 = 1;

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
        table.insert("smart".into(), self.smart.into());
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
        match take("version")? {
            Value::Integer(VERSION) => {}
            other => return Err(BadState(format!("version {other} is not known here"))),
        }
        let state = WireState {
            config: hex(&take("config")?)?,
            masks: macs("masks", take("masks")?)?,
            reserved: macs("reserved", take("reserved")?)?,
            write_cache: flag("write_cache", &take("write_cache")?)?,
            smart: flag("smart", &take("smart")?)?,
        };
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

fn macs(key: &str, value: Value) -> Result<Vec<MacAddr>, BadState> {
    let bad = || BadState(format!("'{key}' is no list of at most 255 MAC addresses"));
    let Value::Array(list) = value else {
        return Err(bad());
    };
    if list.len() > LIST_MAX {
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
                                   write_cache: bool, smart: bool) {
            let list = |l: Vec<[u8; 6]>| l.into_iter().map(MacAddr).collect();
            let state = WireState { config, masks: list(masks), reserved: list(reserved),
                                    write_cache, smart };
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

    #[test]
    fn a_state_cut_short_is_refused() {
        let text = WireState::default().to_text();
        for len in 0..text.len() - 1 {
            assert!(WireState::from_text(&text[..len]).is_err(), "{len}");
        }
        assert!(WireState::from_text(&format!("{text}\nmore = 1")).is_err());
    }
}
