//! Command 2, MAC Mask: who may speak with us.
//!
//! ```text
//! 24  reserved                     27  directive count
//! 25  MCmd: 0 read, 1 edit         28  directives of 8 bytes:
//! 26  reply: MError                      0 reserved, 1 DCmd, 2 MAC (6)
//! ```
//!
//! DCmd 1 adds a MAC and 2 deletes one. 3 and 4 are ours: they switch an
//! extension of the asker on and off, whose name stands in place of the MAC.

use super::extensions::{SHORT_NAME, Wish, by_short_name};
use super::{HEADER, MacAddr};

/// The command byte.
pub const COMMAND: u8 = 2;
/// Where the directives begin.
pub const DIRECTIVES: usize = 28;
/// Bytes of a directive.
pub const DIRECTIVE: usize = 8;
/// The longest list: its count is one byte.
pub const LIST_MAX: usize = 255;

/// What a mask request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit<'a> {
    /// The list.
    Read,
    /// Changes, in order.
    Edit(Directives<'a>),
    /// An unknown MCmd, or a count past the end of the frame.
    Bad,
}

/// One change of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directive {
    /// DCmd 0.
    Nothing,
    /// DCmd 1.
    Add(MacAddr),
    /// DCmd 2.
    Delete(MacAddr),
    /// DCmd 3 or 4; `None` if we do not know the name.
    Extension(Option<Wish>),
    /// Any other.
    Unknown,
}

/// Why a directive was not carried out (AoEr11 MError).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MaskError {
    /// The address cannot be put on the list.
    Unspecified = 1,
    /// No such DCmd.
    BadDirective = 2,
    /// No room.
    ListFull = 3,
}

/// The directives of a frame, all of them within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directives<'a>(&'a [u8]);

impl<'a> Directives<'a> {
    /// The directives in their order.
    pub fn iter(self) -> impl Iterator<Item = Directive> + 'a {
        self.0.chunks_exact(DIRECTIVE).map(|d| match d[1] {
            0 => Directive::Nothing,
            1 => Directive::Add(MacAddr::at(d, 2)),
            2 => Directive::Delete(MacAddr::at(d, 2)),
            3 | 4 => Directive::Extension(by_short_name(&d[2..2 + SHORT_NAME], d[1] == 3)),
            _ => Directive::Unknown,
        })
    }

    /// Whether they are about extensions, and touch no list.
    pub fn are_extensions(self) -> bool {
        let about = |d| matches!(d, Directive::Extension(_));
        self.iter().any(about) && self.iter().all(|d| about(d) || d == Directive::Nothing)
    }
}

impl<'a> Edit<'a> {
    pub(super) fn parse(frame: &'a [u8]) -> Option<Edit<'a>> {
        let rest = frame.get(DIRECTIVES..)?;
        let directives = rest.get(..usize::from(frame[27]) * DIRECTIVE);
        Some(match (frame[25], directives) {
            (0, Some(_)) => Edit::Read,
            (1, Some(bytes)) => Edit::Edit(Directives(bytes)),
            _ => Edit::Bad,
        })
    }
}

/// Writes an answer with a list behind its header; returns its length.
///
/// At most [`LIST_MAX`] entries; `head` holds them all.
pub fn emit_list(head: &mut [u8], mcmd: u8, list: &[MacAddr]) -> usize {
    fixed(head, mcmd, 0, list.len() as u8);
    for (slot, mac) in head[DIRECTIVES..].chunks_exact_mut(DIRECTIVE).zip(list) {
        slot[..2].fill(0);
        slot[2..].copy_from_slice(&mac.0);
    }
    DIRECTIVES + DIRECTIVE * list.len()
}

/// Writes an answer that says which directive was refused; returns its length.
pub fn emit_error(head: &mut [u8], mcmd: u8, error: MaskError, index: u8) -> usize {
    fixed(head, mcmd, error as u8, index);
    DIRECTIVES
}

/// Writes an answer without list or error, for a frame that has E set.
pub fn emit_nothing(head: &mut [u8], mcmd: u8) -> usize {
    fixed(head, mcmd, 0, 0);
    DIRECTIVES
}

fn fixed(head: &mut [u8], mcmd: u8, error: u8, count: u8) {
    head[HEADER..DIRECTIVES].copy_from_slice(&[0, mcmd, error, count]);
}

/// The MCmd of a Mask request's frame, for the answer to echo.
pub fn mcmd(frame: &[u8]) -> u8 {
    frame.get(25).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::extensions::Extension;
    use super::*;

    #[test]
    fn a_count_is_believed_only_within_the_frame() {
        // AoEde believed it, and one delete took the process with it.
        let mut frame = vec![0; DIRECTIVES];
        frame[25] = 1;
        frame[27] = 2;
        frame.extend_from_slice(&[9, 1, 1, 2, 3, 4, 5, 6, 9, 2, 6, 5, 4, 3, 2, 1]);
        let Some(Edit::Edit(directives)) = Edit::parse(&frame) else {
            panic!()
        };
        let add = Directive::Add(MacAddr([1, 2, 3, 4, 5, 6]));
        let delete = Directive::Delete(MacAddr([6, 5, 4, 3, 2, 1]));
        assert_eq!(directives.iter().collect::<Vec<_>>(), [add, delete]);
        for len in DIRECTIVES..frame.len() {
            assert_eq!(Edit::parse(&frame[..len]), Some(Edit::Bad));
        }
        frame[25] = 2;
        assert_eq!(Edit::parse(&frame), Some(Edit::Bad));
        frame[25] = 0;
        assert_eq!(Edit::parse(&frame), Some(Edit::Read));
    }

    #[test]
    fn extensions_have_directives_of_their_own() {
        let mut frame = vec![0; DIRECTIVES];
        frame[25] = 1;
        frame[27] = 4;
        frame.extend_from_slice(b"\0\x03crc8x4\0\x04coalrd\0\0......\0\x03nobody");
        let list = |frame: &[u8]| match Edit::parse(frame) {
            Some(Edit::Edit(directives)) => (
                directives.iter().collect::<Vec<_>>(),
                directives.are_extensions(),
            ),
            other => panic!("{other:?}"),
        };
        let expected = [
            Directive::Extension(Some(Wish::On(Extension::Crc8x4))),
            Directive::Extension(Some(Wish::Off(Extension::CoalescedRead))),
            Directive::Nothing,
            Directive::Extension(None),
        ];
        assert_eq!(list(&frame), (expected.to_vec(), true));
        for dcmd in [1, 2, 5, 255] {
            frame[45] = dcmd;
            assert!(!list(&frame).1, "{dcmd}");
        }
        // Of nothing at all one cannot say so.
        frame[27] = 0;
        assert_eq!(list(&frame), (vec![], false));
    }

    #[test]
    fn lists_and_errors_are_laid_out() {
        let mut head = [0xA5; 60];
        let list = [MacAddr([1; 6]), MacAddr([2; 6])];
        assert_eq!(emit_list(&mut head, 1, &list), 44);
        let expected = [0, 1, 0, 2, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2];
        assert_eq!(head[24..44], expected);
        assert_eq!(emit_error(&mut head, 1, MaskError::ListFull, 7), 28);
        assert_eq!(head[24..28], [0, 1, 3, 7]);
    }
}
