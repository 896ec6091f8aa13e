//! A frame on its way, and whether a reply is its answer.

use std::time::Instant;

use aoede::sys::packet::PIECES;
use aoede::wire::crc::{self, Sum};

use super::Tags;
use super::model::ReadTicket;
use crate::frame::{ATA, BODY, DATA, FLAG_ERROR, SECTOR};

/// Answers are found by the low bits of their tag.
pub(super) const TAGS: usize = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
}

/// A frame on its way, or a place for one.
pub(super) struct Flight {
    pub(super) busy: bool,
    pub(super) kind: Kind,
    pub(super) operation: usize,
    pub(super) tag: u32,
    pub(super) lba: u64,
    pub(super) count: u8,
    pub(super) head: [u8; DATA],
    /// What a write carries; kept from one write to the next.
    pub(super) data: Vec<u8>,
    /// What stands behind the data, if the target wants a checksum.
    pub(super) sum: Option<Sum>,
    pub(super) first: Instant,
    pub(super) last: Instant,
    pub(super) generation: u64,
    pub(super) ticket: Option<ReadTicket>,
}

/// The bytes of its frame.
pub(super) fn pieces(flight: &Flight) -> [&[u8]; PIECES] {
    match flight.kind {
        Kind::Write => {
            let sum = flight.sum.as_ref().map_or(&[][..], |sum| &sum[..]);
            [&flight.head, &flight.data, sum]
        }
        Kind::Read | Kind::Flush => [&flight.head, &[], &[]],
    }
}

/// One frame for several reads (extension `coalesced_read`).
pub(super) fn coalesced<'a>(reads: impl Iterator<Item = &'a Flight>) -> Vec<u8> {
    let mut frame = Vec::new();
    for (index, read) in reads.enumerate() {
        if index == 0 {
            frame.extend(read.head);
            frame.push(0);
            continue;
        }
        frame[DATA] += 1;
        frame.extend(&read.head[20..BODY]);
        frame.extend(&read.head[28..34]);
        frame.extend([0; 5]);
        frame.push(read.count);
    }
    frame
}

/// A tag as it is sent.
pub(super) fn tag_bytes(tags: Tags, tag: u32) -> [u8; 4] {
    match tags {
        Tags::CountLe => tag.to_le_bytes(),
        _ => tag.to_be_bytes(),
    }
}

/// The tag of an ATA reply.
pub(super) fn tag_of(bytes: &[u8], tags: Tags) -> Option<u32> {
    let tag = bytes.get(20..BODY).filter(|_| bytes[19] == ATA)?;
    let tag = [tag[0], tag[1], tag[2], tag[3]];
    Some(match tags {
        Tags::CountLe => u32::from_le_bytes(tag),
        _ => u32::from_be_bytes(tag),
    })
}

/// The flight that a reply answers; it waits for no other one.
pub(super) fn take(
    bytes: &[u8],
    tags: Tags,
    by_tag: &[u32],
    flights: &mut [Flight],
) -> Option<usize> {
    let tag = tag_of(bytes, tags)?;
    let index = by_tag[tag as usize % TAGS] as usize;
    let flight = flights.get_mut(index)?;
    // An AoE error may come without registers.
    let is_whole = bytes.len() >= DATA || bytes[14] & FLAG_ERROR != 0;
    if !flight.busy || flight.tag != tag || !is_whole {
        return None;
    }
    flight.busy = false;
    Some(index)
}

/// What is wrong with a reply to this flight, if anything is; `summed` says
/// whether data must carry a checksum.
pub(super) fn judge(bytes: &[u8], flight: &Flight, summed: bool) -> Option<String> {
    let what = || format!("{:?} of {} at {}", flight.kind, flight.count, flight.lba);
    if bytes[14] & FLAG_ERROR != 0 {
        return Some(format!("{}: AoE error {}", what(), bytes[15]));
    }
    if bytes[27] & 0x01 != 0 {
        return Some(format!(
            "{}: ATA status {:#04x}, error {:#04x}",
            what(),
            bytes[27],
            bytes[25]
        ));
    }
    let need = match flight.kind {
        Kind::Read => DATA + usize::from(flight.count) * SECTOR,
        Kind::Write | Kind::Flush => DATA,
    };
    if bytes.len() < need
        || bytes[24..25] != flight.head[24..25]
        || bytes[28..34] != flight.head[28..34]
    {
        return Some(format!(
            "{}: {} bytes, {:02x?}",
            what(),
            bytes.len(),
            &bytes[..DATA]
        ));
    }
    if summed && flight.kind == Kind::Read {
        // The fast one, which was held against ours (tests of the frames):
        // this is the hot path.
        let sum = crc::of_reply(bytes, &bytes[DATA..need]);
        if bytes.get(need..need + sum.len()) != Some(&sum[..]) {
            return Some(format!("{}: a wrong checksum, or none", what()));
        }
    }
    None
}
