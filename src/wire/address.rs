//! Who is meant: MAC, shelf, slot.

use std::fmt;
use std::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Every station.
    pub const BROADCAST: MacAddr = MacAddr([0xFF; 6]);

    /// Whether it names a group (broadcast among them) and so cannot be a
    /// sender.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// The address in six bytes of a frame; the caller has checked the length.
    pub(super) fn at(bytes: &[u8], at: usize) -> MacAddr {
        let mut mac = [0; 6];
        mac.copy_from_slice(&bytes[at..at + 6]);
        MacAddr(mac)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = String;

    /// Twelve hexadecimal digits of either case, with colons between the bytes
    /// or none at all.
    fn from_str(text: &str) -> Result<MacAddr, String> {
        let bad =
            || format!("'{text}' is no MAC address: give it as 00:11:22:aa:bb:cc or 001122aabbcc");
        let digits: String = match text.len() {
            17 if text.bytes().skip(2).step_by(3).all(|c| c == b':') => text.split(':').collect(),
            12 => text.to_owned(),
            _ => return Err(bad()),
        };
        if digits.len() != 12 || !digits.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let value = u64::from_str_radix(&digits, 16).map_err(|_| bad())?;
        let [_, _, mac @ ..] = value.to_be_bytes();
        Ok(MacAddr(mac))
    }
}

/// A shelf (AoE major address): 0..=65534; 65535 means every shelf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shelf(pub u16);

/// A slot (AoE minor address): 0..=254; 255 means every slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u8);

/// The shelf and slot of an export, neither of them the broadcast one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The shelf.
    pub shelf: Shelf,
    /// The slot on it.
    pub slot: Slot,
}

impl Address {
    /// The address, or `None` if shelf or slot is the broadcast one.
    pub fn new(shelf: u16, slot: u8) -> Option<Address> {
        (shelf != Shelf::EVERY.0 && slot != Slot::EVERY.0).then_some(Address {
            shelf: Shelf(shelf),
            slot: Slot(slot),
        })
    }
}

impl Shelf {
    /// Every shelf.
    pub const EVERY: Shelf = Shelf(0xFFFF);
}

impl Slot {
    /// Every slot of the shelf.
    pub const EVERY: Slot = Slot(0xFF);
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "e{}.{}", self.shelf.0, self.slot.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_read_in_both_spellings_and_refused_otherwise() {
        let mac = MacAddr([0, 0x11, 0x22, 0xAA, 0xBB, 0xCC]);
        for text in [
            "00:11:22:aa:bb:cc",
            "00:11:22:AA:BB:CC",
            "001122aabbcc",
            "001122AABBCC",
        ] {
            assert_eq!(text.parse(), Ok(mac));
        }
        let bad = [
            "",
            "0011:22aabbcc",
            "00:11:22:aa:bb:cg",
            "00:11:22:aa:bb",
            "001122aabbccd",
            "+01122aabbcc",
            "00:11:22:aa:b:bcc",
            "::::::::::::::::-",
            "00-11-22-aa-bb-cc",
        ];
        for text in bad {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
        assert_eq!(mac.to_string(), "00:11:22:aa:bb:cc");
    }

    #[test]
    fn an_export_has_no_broadcast_address() {
        assert_eq!(Address::new(65535, 0), None);
        assert_eq!(Address::new(0, 255), None);
        assert_eq!(Address::new(65534, 254).unwrap().to_string(), "e65534.254");
    }
}
