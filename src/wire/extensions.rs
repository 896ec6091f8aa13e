//! Command 0x23, Extensions (AoEde): what an initiator wants besides AoE.
//!
//! ```text
//! 24  length (2, LITTLE endian) of what follows
//! 26  strings, each ended by NUL, and an empty one; so the last two are NUL
//! ```
//!
//! The answer is the request's frame, with those strings in upper case that were
//! carried out. The same wishes come through directives of MAC Mask, where each
//! has a name of at most six bytes, padded with NUL:
//!
//! ```text
//! reset           reset     all off
//! tag_inc_le      tag-le    tags count up, little endian
//! tag_inc_be      tag-be    tags count up, big endian
//! tag_random      tag-rn    tags are unique
//! coalesced_read  coalrd    several reads in one frame
//! crc8x4          crc8x4    checksums of data
//! congestion, and a decimal number: slower for a while
//! ```

use std::ops::Range;

use super::be16;

/// The command byte.
pub const COMMAND: u8 = 0x23;
/// Where the strings begin.
const STRINGS: usize = 26;
/// Bytes of a name in a Mask directive.
pub const SHORT_NAME: usize = 6;

/// Something an initiator switches on for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Its tags count up, and are little endian.
    TagIncLe,
    /// Its tags count up, and are big endian.
    TagIncBe,
    /// Its tags are unique among those under way.
    TagRandom,
    /// It puts several reads into one frame.
    CoalescedRead,
    /// Its frames carry checksums, and so do ours to it.
    Crc8x4,
}

/// What an initiator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// All off.
    Reset,
    /// One on.
    On(Extension),
    /// One off.
    Off(Extension),
    /// Fewer replies for a while, if it is another number than the last.
    Congestion(u64),
}

/// The names of both doors.
const NAMES: [(&[u8], &[u8], Wish); 6] = [
    (b"reset", b"reset", Wish::Reset),
    (b"tag_inc_le", b"tag-le", Wish::On(Extension::TagIncLe)),
    (b"tag_inc_be", b"tag-be", Wish::On(Extension::TagIncBe)),
    (b"tag_random", b"tag-rn", Wish::On(Extension::TagRandom)),
    (
        b"coalesced_read",
        b"coalrd",
        Wish::On(Extension::CoalescedRead),
    ),
    (b"crc8x4", b"crc8x4", Wish::On(Extension::Crc8x4)),
];
const CONGESTION: &[u8] = b"congestion";

/// The strings of a request: its frame up to where its length says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strings<'a>(&'a [u8]);

impl<'a> Strings<'a> {
    /// The strings of a frame that is long enough for a length; `None` inside
    /// if the length or the end is wrong.
    pub(super) fn parse(frame: &'a [u8]) -> Option<Option<Strings<'a>>> {
        let strings = frame.get(STRINGS..)?;
        let length = usize::from(be16(frame, 24).swap_bytes());
        let ends = strings
            .get(..length)
            .is_some_and(|strings| strings.ends_with(&[0, 0]));
        Some(ends.then(|| Strings(&frame[..STRINGS + length])))
    }

    /// What each string wishes, `None` where we do not know it, and at which
    /// bytes of the frame it stands.
    pub fn iter(self) -> impl Iterator<Item = (Range<usize>, Option<Wish>)> + 'a {
        let mut at = STRINGS;
        std::iter::from_fn(move || {
            let mut place = self.string(at)?;
            let name = &self.0[place.clone()];
            let mut wish = NAMES
                .iter()
                .find(|(long, _, _)| *long == name)
                .map(|(_, _, wish)| *wish);
            if name == CONGESTION {
                // Its number is a string of its own.
                let number = self.string(place.end + 1);
                let value = number.clone().and_then(|n| decimal(&self.0[n]));
                wish = value.map(Wish::Congestion);
                if let (Some(number), Some(_)) = (number, wish) {
                    place.end = number.end;
                }
            }
            at = place.end + 1;
            Some((place, wish))
        })
    }

    /// The string that begins here, unless the list ends.
    fn string(self, at: usize) -> Option<Range<usize>> {
        let rest = self.0.get(at..)?;
        let len = rest.iter().position(|byte| *byte == 0)?;
        (len > 0).then_some(at..at + len)
    }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    // The parser of numbers would take a sign as well.
    let plain = digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits)
        .ok()
        .filter(|_| plain)?
        .parse()
        .ok()
}

/// What a name in a Mask directive wishes, on or off; `None` if we do not know
/// it.
pub(super) fn by_short_name(name: &[u8], on: bool) -> Option<Wish> {
    let len = name.iter().position(|byte| *byte == 0);
    let (name, padding) = name.split_at(len.unwrap_or(name.len()));
    if padding.iter().any(|byte| *byte != 0) {
        return None;
    }
    let (_, _, wish) = NAMES.iter().find(|(_, short, _)| *short == name)?;
    Some(match *wish {
        Wish::On(extension) if !on => Wish::Off(extension),
        // All off is the same whichever way it is said.
        wish => wish,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(length: u16, strings: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 24];
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(strings);
        frame
    }

    fn wishes(strings: &[u8]) -> Vec<(Vec<u8>, Option<Wish>)> {
        let frame = frame(strings.len() as u16, strings);
        let list = Strings::parse(&frame).unwrap().unwrap();
        list.iter()
            .map(|(at, wish)| (frame[at].to_vec(), wish))
            .collect()
    }

    #[test]
    fn strings_are_wishes_where_they_are_exact() {
        let known = b"reset\0tag_inc_le\0tag_inc_be\0tag_random\0coalesced_read\0crc8x4\0\0";
        let expected = [
            Wish::Reset,
            Wish::On(Extension::TagIncLe),
            Wish::On(Extension::TagIncBe),
            Wish::On(Extension::TagRandom),
            Wish::On(Extension::CoalescedRead),
            Wish::On(Extension::Crc8x4),
        ];
        let got: Vec<_> = wishes(known).into_iter().map(|(_, w)| w.unwrap()).collect();
        assert_eq!(got, expected);
        for (text, wish) in wishes(b"RESET\0crc8x\0crc8x44\0reset \0tag-le\0\0") {
            assert_eq!(wish, None, "{text:?}");
        }
        // What follows the empty string is not of the list.
        assert_eq!(wishes(b"foo\0\0reset\0\0"), [(b"foo".to_vec(), None)]);
        assert_eq!(wishes(b"\0\0"), []);
    }

    #[test]
    fn congestion_has_a_number_or_is_unknown() {
        let number = |text: &[u8]| {
            let list = wishes(&[b"congestion\0", text, b"\0\0"].concat());
            (list[0].1, list.len())
        };
        assert_eq!(number(b"0"), (Some(Wish::Congestion(0)), 1));
        let most = Some(Wish::Congestion(u64::MAX));
        assert_eq!(number(b"18446744073709551615"), (most, 1));
        assert_eq!(number(b"18446744073709551616"), (None, 2));
        for bad in [&b"+1"[..], b"-1", b"1x", b" 1", b"0x1"] {
            assert_eq!(number(bad), (None, 2), "{bad:?}");
        }
        assert_eq!(wishes(b"congestion\0\0")[0].1, None);
        let list = wishes(b"congestion\0crc8x4\0\0");
        assert_eq!((list[0].1, list[1].1.is_some()), (None, true));
        assert_eq!(wishes(b"congestion\x007\0\0")[0].0, b"congestion\x007");
    }

    #[test]
    fn a_wrong_length_or_end_is_no_list() {
        let strings = b"reset\0\0";
        for length in 0..20 {
            let whole = frame(length, strings);
            let list = Strings::parse(&whole).unwrap();
            assert_eq!(list.is_some(), length == 7, "{length}");
        }
        // One byte of a single NUL has no two; big endian is another length.
        assert_eq!(Strings::parse(&frame(1, b"\0")), Some(None));
        assert_eq!(Strings::parse(&frame(0x0700, strings)), Some(None));
        assert_eq!(Strings::parse(&frame(7, b"reset\0x")), Some(None));
        assert_eq!(Strings::parse(&frame(7, b"resetx\0")), Some(None));
        for len in 0..26 {
            assert_eq!(Strings::parse(&frame(7, strings)[..len]), None);
        }
    }

    #[test]
    fn short_names_are_padded_with_zeros() {
        let on = |name| by_short_name(name, true);
        assert_eq!(on(b"crc8x4"), Some(Wish::On(Extension::Crc8x4)));
        assert_eq!(on(b"tag-rn"), Some(Wish::On(Extension::TagRandom)));
        assert_eq!(on(b"reset\0"), Some(Wish::Reset));
        let off = by_short_name(b"coalrd", false);
        assert_eq!(off, Some(Wish::Off(Extension::CoalescedRead)));
        assert_eq!(by_short_name(b"reset\0", false), Some(Wish::Reset));
        for bad in [
            b"reset\x01",
            b"rese\0t",
            b"\0\0\0\0\0\0",
            b"CRC8x4",
            b"tag_le",
        ] {
            assert_eq!(on(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_strings_can_harm(length: u16, bytes in proptest::collection::vec(0u8..4, 0..1600)) {
            // Few values, so that there are many ends.
            for length in [length, bytes.len() as u16, length % 1600] {
                let frame = frame(length, &bytes);
                let Some(Some(list)) = Strings::parse(&frame) else { continue };
                let mut last = STRINGS;
                for (place, _) in list.iter() {
                    prop_assert!(place.start >= last && place.end < STRINGS + usize::from(length));
                    last = place.end + 1;
                }
            }
        }
    }
}
