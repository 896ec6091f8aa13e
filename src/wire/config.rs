//! Command 1, Query/Config: who is there, and a string to remember.
//!
//! ```text
//! 24  buffer count (2)     29  version (high nibble 1) | subcommand
//! 26  firmware (2)         30  string length (2)
//! 28  sectors per frame    32  string, at most 1024 bytes
//! ```
//!
//! Subcommand 5 (Coraid) has a second string behind the first: length (2, big
//! endian), bytes.

use super::request::header;
use super::{Address, FLAG_RESPONSE, HEADER, MIN_FRAME, MacAddr, be16};

/// The command byte.
pub const COMMAND: u8 = 1;
/// The longest string.
pub const STRING_MAX: usize = 1024;
/// Where the string begins.
pub const STRING: usize = 32;
/// The firmware version we report: AoEde's lineage marks it with 0x4000.
const FIRMWARE: u16 = 0x4000 + 23;

/// A request's subcommand with its string; `None` where the length is above
/// [`STRING_MAX`] or above what the frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query<'a> {
    /// 0: what is the string? Its own length means nothing.
    Read,
    /// 1: answer if the string is exactly this.
    Test(Option<&'a [u8]>),
    /// 2: answer if the string begins with this.
    Prefix(Option<&'a [u8]>),
    /// 3: set it unless another is there.
    Set(Option<&'a [u8]>),
    /// 4: set it whatever is there.
    ForceSet(Option<&'a [u8]>),
    /// 5: if it is exactly the first, set the second.
    Replace(Option<(&'a [u8], &'a [u8])>),
    /// Any other.
    Other,
}

impl<'a> Query<'a> {
    pub(super) fn parse(frame: &'a [u8]) -> Option<Query<'a>> {
        let rest = frame.get(STRING..)?;
        let string = take(rest, be16(frame, 30));
        Some(match frame[29] & 0x0F {
            0 => Query::Read,
            1 => Query::Test(string),
            2 => Query::Prefix(string),
            3 => Query::Set(string),
            4 => Query::ForceSet(string),
            5 => Query::Replace(string.and_then(|old| {
                let rest = &rest[old.len()..];
                let length = rest.get(..2)?;
                Some((old, take(&rest[2..], be16(length, 0))?))
            })),
            _ => Query::Other,
        })
    }
}

/// The first `length` bytes, if there are so many and a string may be so long.
fn take(bytes: &[u8], length: u16) -> Option<&[u8]> {
    let length = usize::from(length);
    if length > STRING_MAX {
        return None;
    }
    bytes.get(..length)
}

/// What we say of ourselves.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// How many frames an initiator may have outstanding.
    pub buffers: u16,
    /// Sectors per frame on the NIC of the answer.
    pub sectors: u8,
    /// The subcommand answered.
    pub sub: u8,
    /// The string, at most [`STRING_MAX`] bytes.
    pub string: &'a [u8],
}

impl Report<'_> {
    /// Writes what follows the header; returns the length of the frame.
    ///
    /// `head` holds at least [`STRING`] bytes more than the string.
    pub fn emit(&self, head: &mut [u8]) -> usize {
        let end = STRING + self.string.len();
        head[HEADER..26].copy_from_slice(&self.buffers.to_be_bytes());
        head[26..28].copy_from_slice(&FIRMWARE.to_be_bytes());
        head[28] = self.sectors;
        head[29] = 0x10 | self.sub;
        head[30..32].copy_from_slice(&(self.string.len() as u16).to_be_bytes());
        head[STRING..end].copy_from_slice(self.string);
        end
    }

    /// Writes the whole of an answer nobody asked for; returns its length.
    pub fn advertise(
        &self,
        head: &mut [u8],
        to: MacAddr,
        from: MacAddr,
        address: Address,
    ) -> usize {
        header(head, to, from, address, COMMAND, [0; 4]);
        self.emit(head)
    }
}

/// The frame that asks by broadcast who has `address`: a Config read.
pub fn question(from: MacAddr, address: Address, tag: [u8; 4]) -> [u8; MIN_FRAME] {
    let mut frame = [0; MIN_FRAME];
    header(&mut frame, MacAddr::BROADCAST, from, address, COMMAND, tag);
    frame[14] &= !FLAG_RESPONSE;
    frame[29] = 0x10;
    frame
}

/// The subcommand of a Config request's frame, for the answer to echo.
pub fn subcommand(frame: &[u8]) -> u8 {
    frame.get(29).map_or(0, |byte| byte & 0x0F)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(sub: u8, length: u16, body: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; STRING];
        frame[29] = 0x10 | sub;
        frame[30..32].copy_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(body);
        frame
    }

    #[test]
    fn a_length_is_believed_only_within_the_frame() {
        // A length that counts the header made AoEde store 32 foreign bytes.
        assert_eq!(Query::parse(&frame(3, 5, b"disk")), Some(Query::Set(None)));
        assert_eq!(
            Query::parse(&frame(3, 4, b"disk")),
            Some(Query::Set(Some(b"disk")))
        );
        assert_eq!(
            Query::parse(&frame(4, 4, b"disk+")),
            Some(Query::ForceSet(Some(b"disk")))
        );
        let long = [b'x'; 1400];
        assert_eq!(
            Query::parse(&frame(1, 1025, &long)),
            Some(Query::Test(None))
        );
        assert_eq!(
            Query::parse(&frame(2, 1024, &long)),
            Some(Query::Prefix(Some(&long[..1024])))
        );
        assert_eq!(Query::parse(&frame(0, 0xFFFF, b"")), Some(Query::Read));
        assert_eq!(Query::parse(&frame(6, 0, b"")), Some(Query::Other));
    }

    #[test]
    fn replace_has_two_strings_or_none() {
        let whole = frame(5, 3, b"old\0\x03new");
        assert_eq!(
            Query::parse(&whole),
            Some(Query::Replace(Some((b"old", b"new"))))
        );
        for len in STRING..whole.len() {
            assert_eq!(
                Query::parse(&whole[..len]),
                Some(Query::Replace(None)),
                "{len}"
            );
        }
    }

    #[test]
    fn a_report_is_laid_out() {
        let mut head = [0xA5; 60];
        let report = Report {
            buffers: 64,
            sectors: 2,
            sub: 3,
            string: b"disk",
        };
        assert_eq!(report.emit(&mut head), 36);
        assert_eq!(head[24..36], *b"\0\x40\x40\x17\x02\x13\0\x04disk");
        let us = Address::new(1, 1).unwrap();
        report.advertise(&mut head, MacAddr::BROADCAST, MacAddr([2; 6]), us);
        assert_eq!(head[12..24], [0x88, 0xA2, 0x18, 0, 0, 1, 1, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn our_question_is_a_config_read_to_everyone() {
        let us = Address::new(7, 3).unwrap();
        let frame = question(MacAddr([2; 6]), us, [9; 4]);
        let request = crate::wire::Request::parse(&frame).unwrap();
        assert!(!request.is_response && request.addresses(us));
        assert_eq!(request.destination, MacAddr::BROADCAST);
        assert!(matches!(
            request.command,
            crate::wire::Command::Config(Query::Read)
        ));
    }

    proptest! {
        #[test]
        fn no_string_is_longer_than_the_frame(body in proptest::collection::vec(any::<u8>(), 0..1500),
                                              sub in 0u8..16, length: u16) {
            let frame = frame(sub, length, &body);
            let (Some(Query::Test(s) | Query::Prefix(s) | Query::Set(s) | Query::ForceSet(s)), _)
                = (Query::parse(&frame), ()) else { return Ok(()) };
            let fits = usize::from(length) <= body.len().min(STRING_MAX);
            prop_assert_eq!(s.map(<[u8]>::len), fits.then_some(usize::from(length)));
        }
    }
}
