//! Freeze orders and phases: what an order means in which phase. No I/O, no
//! clock; what is done about it is the volume's.
//!
//! ```text
//!             freeze               image still             thaw, stop, full        all merged
//! Running ------------> Freezing -------------> Frozen ---------------------> Thawing ----> Running
//!    |                     |          thaw (withdrawn; the image never was still)  ^
//!    |                     +-------------------------------------------------------+
//!    |  freeze, no shadow file          thaw, or after hold_max
//!    +-----------------------> Held -------------------------> Running
//! ```

use std::fmt;

/// What an operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Keep the image still.
    Freeze,
    /// Bring what was written since to the image.
    Thaw,
}

impl Order {
    /// What USR2 means after so many USR1 (AoEde): one freezes, two thaw.
    pub fn after(count: u8) -> Option<Order> {
        match count {
            1 => Some(Order::Freeze),
            2 => Some(Order::Thaw),
            _ => None,
        }
    }
}

/// How far a freeze has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// There is none.
    Running,
    /// What was written before is on its way to the image.
    Freezing,
    /// The image is still, and writes go to the shadow.
    Frozen,
    /// The shadow is being merged.
    Thawing,
    /// Without a shadow: writes are not answered.
    Held,
}

/// What an order sets off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// A freeze with a shadow.
    Freeze,
    /// A freeze without one.
    Hold,
    /// The end of a freeze before it was one.
    Withdraw,
    /// The merge.
    Thaw,
    /// The end of a freeze without a shadow.
    Release,
}

/// Why an order makes no sense now. It is reported, and changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidTransition {
    /// To freeze what is frozen, or about to be.
    Frozen,
    /// To freeze while the last freeze is merged.
    Thawing,
    /// To thaw what is not frozen.
    Running,
    /// To thaw what is thawing.
    ThawingAlready,
}

impl fmt::Display for InvalidTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InvalidTransition::Frozen => "freeze: it is frozen already; nothing done",
            InvalidTransition::Thawing => {
                "freeze: the last one is still being merged; send it again when that is done"
            }
            InvalidTransition::Running => "thaw: nothing is frozen; nothing done",
            InvalidTransition::ThawingAlready => "thaw: it is thawing already; nothing done",
        })
    }
}

/// What an order sets off in a phase.
pub fn decide(phase: Phase, order: Order, has_shadow: bool) -> Result<Begin, InvalidTransition> {
    match (order, phase) {
        (Order::Freeze, Phase::Running) if has_shadow => Ok(Begin::Freeze),
        (Order::Freeze, Phase::Running) => Ok(Begin::Hold),
        (Order::Freeze, Phase::Thawing) => Err(InvalidTransition::Thawing),
        (Order::Freeze, _) => Err(InvalidTransition::Frozen),
        (Order::Thaw, Phase::Running) => Err(InvalidTransition::Running),
        (Order::Thaw, Phase::Freezing) => Ok(Begin::Withdraw),
        (Order::Thaw, Phase::Frozen) => Ok(Begin::Thaw),
        (Order::Thaw, Phase::Thawing) => Err(InvalidTransition::ThawingAlready),
        (Order::Thaw, Phase::Held) => Ok(Begin::Release),
    }
}

/// What to do when the shadow can take no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// Thaw, unasked.
    Thaw,
    /// Answer no writes until an order comes, or `hold_max` is over.
    Hold,
}

/// What to do with a shadow when the process is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnStop {
    /// Merge it first.
    Merge,
    /// Leave it for the next start.
    Keep,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_freezes_two_thaw_and_nothing_else_means_anything() {
        assert_eq!(Order::after(1), Some(Order::Freeze));
        assert_eq!(Order::after(2), Some(Order::Thaw));
        for count in [0, 3, 4, 127] {
            assert_eq!(Order::after(count), None);
        }
    }

    #[test]
    fn each_order_means_one_thing_in_each_phase() {
        use Order::{Freeze, Thaw};
        use Phase::{Freezing, Frozen, Held, Running, Thawing};
        let all = [
            (Running, Freeze, Ok(Begin::Freeze)),
            (Running, Thaw, Err(InvalidTransition::Running)),
            (Freezing, Freeze, Err(InvalidTransition::Frozen)),
            (Freezing, Thaw, Ok(Begin::Withdraw)),
            (Frozen, Freeze, Err(InvalidTransition::Frozen)),
            (Frozen, Thaw, Ok(Begin::Thaw)),
            (Thawing, Freeze, Err(InvalidTransition::Thawing)),
            (Thawing, Thaw, Err(InvalidTransition::ThawingAlready)),
            (Held, Freeze, Err(InvalidTransition::Frozen)),
            (Held, Thaw, Ok(Begin::Release)),
        ];
        for (phase, order, meaning) in all {
            assert_eq!(decide(phase, order, true), meaning);
        }
        assert_eq!(decide(Running, Freeze, false), Ok(Begin::Hold));
    }
}
