//! Command 3, Reserve/Release: who may use the disk.
//!
//! ```text
//! 24  RCmd: 0 read, 1 set, 2 force set
//! 25  count
//! 26  MACs (6 each)
//! ```

use super::{HEADER, MacAddr};

/// The command byte.
pub const COMMAND: u8 = 3;
const MACS: usize = 26;
const MAC: usize = 6;

/// What a reservation request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order<'a> {
    /// The list.
    Read,
    /// This list, if ours is empty or the asker on it.
    Set(Macs<'a>),
    /// This list, whatever ours is.
    ForceSet(Macs<'a>),
    /// An unknown RCmd, or a count past the end of the frame.
    Bad,
}

/// The addresses of a frame, all of them within it; at most 255.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Macs<'a>(&'a [u8]);

impl<'a> Macs<'a> {
    /// The addresses in their order.
    pub fn iter(self) -> impl Iterator<Item = MacAddr> + 'a {
        self.0.chunks_exact(MAC).map(|m| MacAddr::at(m, 0))
    }
}

impl<'a> Order<'a> {
    pub(super) fn parse(frame: &'a [u8]) -> Option<Order<'a>> {
        let rest = frame.get(MACS..)?;
        let macs = rest.get(..usize::from(frame[25]) * MAC).map(Macs);
        Some(match (frame[24], macs) {
            (0, Some(_)) => Order::Read,
            (1, Some(macs)) => Order::Set(macs),
            (2, Some(macs)) => Order::ForceSet(macs),
            _ => Order::Bad,
        })
    }
}

/// The length of an answer that lists so many addresses.
pub fn length(entries: usize) -> usize {
    MACS + MAC * entries
}

/// Writes an answer with a list behind its header; returns its length.
///
/// At most 255 entries; `head` holds them all.
pub fn emit(head: &mut [u8], rcmd: u8, list: &[MacAddr]) -> usize {
    head[HEADER] = rcmd;
    head[25] = list.len() as u8;
    for (slot, mac) in head[MACS..].chunks_exact_mut(MAC).zip(list) {
        slot.copy_from_slice(&mac.0);
    }
    length(list.len())
}

/// The RCmd of a Reserve request's frame, for the answer to echo.
pub fn rcmd(frame: &[u8]) -> u8 {
    frame.get(HEADER).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_and_answers_laid_out() {
        let mut frame = vec![0; MACS];
        frame[24] = 1;
        frame[25] = 2;
        frame.extend_from_slice(&[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]);
        let Some(Order::Set(macs)) = Order::parse(&frame) else {
            panic!()
        };
        let list: Vec<_> = macs.iter().collect();
        assert_eq!(list, [MacAddr([1; 6]), MacAddr([2; 6])]);
        for len in MACS..frame.len() {
            assert_eq!(Order::parse(&frame[..len]), Some(Order::Bad));
        }
        let mut head = [0xA5; 60];
        assert_eq!(emit(&mut head, 1, &list), 38);
        assert_eq!(head[24..38], frame[24..38]);
        frame[24] = 3;
        assert_eq!(Order::parse(&frame), Some(Order::Bad));
    }
}
