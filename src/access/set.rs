//! A small set of MAC addresses.

use crate::wire::MacAddr;

/// A set of at most [`MacSet::MAX`] addresses.
///
/// It is asked for each write: an empty one answers at once, a full one after
/// six comparisons, and none allocates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MacSet {
    /// In ascending order.
    macs: Vec<MacAddr>,
}

/// The set has as many addresses as it may have, and this is none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl MacSet {
    /// The most addresses of a set.
    pub const MAX: usize = 64;

    /// `true` if this address is in the set.
    pub fn contains(&self, mac: MacAddr) -> bool {
        self.macs.binary_search(&mac).is_ok()
    }

    /// Puts an address into the set.
    pub fn insert(&mut self, mac: MacAddr) -> Result<(), Full> {
        match self.macs.binary_search(&mac) {
            Ok(_) => Ok(()),
            Err(_) if self.macs.len() >= MacSet::MAX => Err(Full),
            Err(at) => {
                self.macs.insert(at, mac);
                Ok(())
            }
        }
    }

    /// Takes an address out of the set.
    pub fn remove(&mut self, mac: MacAddr) {
        if let Ok(at) = self.macs.binary_search(&mac) {
            self.macs.remove(at);
        }
    }

    /// `true` if [`insert`](MacSet::insert) would take this address.
    pub fn has_room_for(&self, mac: MacAddr) -> bool {
        self.macs.len() < MacSet::MAX || self.contains(mac)
    }

    /// The addresses, in ascending order.
    pub fn as_slice(&self) -> &[MacAddr] {
        &self.macs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set_with_an_end(steps in proptest::collection::vec((0u8..90, 0u8..4), 0..400)) {
            let (mut set, mut model) = (MacSet::default(), BTreeSet::new());
            for (last, step) in steps {
                let mac = MacAddr([2, 0, 0, 0, 0, last]);
                let room = model.len() < 64 || model.contains(&mac);
                prop_assert_eq!(set.has_room_for(mac), room);
                if step == 0 {
                    set.remove(mac);
                    model.remove(&mac);
                } else {
                    prop_assert_eq!(set.insert(mac), if room { Ok(()) } else { Err(Full) });
                    if room {
                        model.insert(mac);
                    }
                }
                prop_assert_eq!(set.contains(mac), model.contains(&mac));
                prop_assert!(set.as_slice().iter().eq(model.iter()));
            }
        }
    }
}
