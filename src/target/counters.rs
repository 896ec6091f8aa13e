//! What an export counts.

use std::fmt;

use crate::text::count;

/// Why a frame got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// Its NIC cannot be served just now.
    NoLink,
    /// Longer than the NIC's frames, so cut.
    Cut,
    /// For another MAC, or in a VLAN.
    OtherHost,
    /// Shorter than the header of its command.
    Short,
    /// Not AoE.
    NotAoe,
    /// It is an answer itself.
    Response,
    /// From a broadcast or multicast address.
    GroupSource,
    /// From our own address.
    OwnSource,
    /// For another shelf or slot.
    OtherAddress,
    /// From someone a mask keeps out.
    Masked,
    /// A change addressed to more exports than this.
    BroadcastChange,
    /// A question whose answer is silence.
    Silence,
    /// Too much is under way.
    NoRoom,
    /// A request with its tag is in hand and will be answered.
    InHand,
    /// Its checksum is wrong.
    Damaged,
    /// More replies wait for their sender's pace than may.
    Paced,
}

const REASONS: [(Dropped, &str); 16] = [
    (Dropped::NoLink, "without link"),
    (Dropped::Cut, "cut short"),
    (Dropped::OtherHost, "for other hosts"),
    (Dropped::Short, "too short"),
    (Dropped::NotAoe, "not AoE"),
    (Dropped::Response, "answers"),
    (Dropped::GroupSource, "from group addresses"),
    (Dropped::OwnSource, "from our own address"),
    (Dropped::OtherAddress, "for other shelves or slots"),
    (Dropped::Masked, "masked"),
    (Dropped::BroadcastChange, "changes to all"),
    (Dropped::Silence, "no reply"),
    (Dropped::NoRoom, "busy"),
    (Dropped::InHand, "in flight already"),
    (Dropped::Damaged, "damaged"),
    (Dropped::Paced, "throttled"),
];

/// Counts since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests that were answered or will be; of several reads in one frame
    /// each.
    pub requests: u64,
    /// Sectors read for initiators.
    pub sectors_read: u64,
    /// Sectors written by them.
    pub sectors_written: u64,
    /// Writes that came again, known by their tags, and were not carried out a
    /// second time.
    pub duplicate_writes: u64,
    drops: [u64; REASONS.len()],
}

impl Counters {
    pub(super) fn dropped(&mut self, why: Dropped) {
        self.drops[why as usize] += 1;
    }

    /// How many frames were dropped for this reason.
    pub fn drops(&self, why: Dropped) -> u64 {
        self.drops[why as usize]
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (read, written) = (self.sectors_read, self.sectors_written);
        write!(
            f,
            "{}, {} read, {written} written",
            count(self.requests, "request"),
            count(read, "sector")
        )?;
        if self.duplicate_writes > 0 {
            write!(f, ", {}", count(self.duplicate_writes, "duplicate write"))?;
        }
        let mut lead = "; dropped: ";
        for (why, name) in REASONS {
            if self.drops(why) > 0 {
                write!(f, "{lead}{} {name}", self.drops(why))?;
                lead = ", ";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_name_and_place() {
        for (place, (why, _)) in REASONS.into_iter().enumerate() {
            assert_eq!(why as usize, place);
        }
        let mut counters = Counters::default();
        counters.dropped(Dropped::Masked);
        let text = counters.to_string();
        assert_eq!(
            text,
            "0 requests, 0 sectors read, 0 written; dropped: 1 masked"
        );
        counters.duplicate_writes = 3;
        (counters.requests, counters.sectors_read) = (1, 1);
        let text = counters.to_string();
        assert!(text.contains(" written, 3 duplicate writes; dropped: "));
        assert!(text.starts_with("1 request, 1 sector read, 0 written"));
    }
}
