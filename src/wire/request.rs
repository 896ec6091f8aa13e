//! The header of a request, and which command follows it.

use super::ata::Taskfile;
use super::{
    ADMIN_MAX, Address, ETHERTYPE, ErrorCode, FLAG_ERROR, FLAG_RESPONSE, HEADER, MacAddr, Shelf,
    Slot, VERSION, ata, be16, config, extensions, mask, reserve,
};

/// Why bytes are no request. None of these gets an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Shorter than the header of its command.
    Short,
    /// The EtherType is another protocol's.
    NotAoe,
}

/// What a request asks, each with the fixed part of its command checked to be
/// there.
#[derive(Clone, Copy, Debug)]
pub enum Command<'a> {
    /// Command 0.
    Ata(Taskfile, ata::Payload<'a>),
    /// Command 1.
    Config(config::Query<'a>),
    /// Command 2.
    Mask(mask::Edit<'a>),
    /// Command 3.
    Reserve(reserve::Order<'a>),
    /// Command 0x23; `None` if its length or its end is wrong.
    Extensions(Option<extensions::Strings<'a>>),
    /// Any other command, answered with an error.
    Unknown,
    /// Any command of another protocol version, answered with an error.
    OtherVersion,
}

/// What an answer takes from the request: enough to answer much later, when the
/// frame is long gone.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Who asked, and so whom the answer is for.
    pub source: MacAddr,
    /// The command byte.
    pub command: u8,
    /// The tag, opaque.
    pub tag: [u8; 4],
}

/// A frame that passed every length check, borrowing its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The whole frame.
    pub frame: &'a [u8],
    /// Who sent it, and what the answer echoes.
    pub origin: Origin,
    /// Whom it is for.
    pub destination: MacAddr,
    /// The shelf it addresses, perhaps [`Shelf::EVERY`].
    pub shelf: Shelf,
    /// The slot it addresses, perhaps [`Slot::EVERY`].
    pub slot: Slot,
    /// Whether R is set: it is an answer, and no business of a target.
    pub is_response: bool,
    /// What it asks.
    pub command: Command<'a>,
}

impl<'a> Request<'a> {
    /// Reads a frame.
    pub fn parse(frame: &'a [u8]) -> Result<Request<'a>, Malformed> {
        if frame.len() < HEADER {
            return Err(Malformed::Short);
        }
        if be16(frame, 12) != ETHERTYPE {
            return Err(Malformed::NotAoe);
        }
        let command = if frame[14] & 0xF0 != VERSION {
            Command::OtherVersion
        } else {
            Command::parse(frame).ok_or(Malformed::Short)?
        };
        Ok(Request {
            frame,
            destination: MacAddr::at(frame, 0),
            origin: Origin {
                source: MacAddr::at(frame, 6),
                command: frame[19],
                tag: [frame[20], frame[21], frame[22], frame[23]],
            },
            shelf: Shelf(be16(frame, 16)),
            slot: Slot(frame[18]),
            is_response: frame[14] & FLAG_RESPONSE != 0,
            command,
        })
    }

    /// Whether shelf and slot name `address`; each may be broadcast on its own.
    pub fn addresses(&self, address: Address) -> bool {
        (self.shelf == address.shelf || self.shelf == Shelf::EVERY)
            && (self.slot == address.slot || self.slot == Slot::EVERY)
    }

    /// As much of a Config, Mask or Reserve request as means something, and no
    /// more than [`ADMIN_MAX`] bytes: read again it asks the same.
    pub fn admin_bytes(&self) -> &'a [u8] {
        &self.frame[..self.frame.len().min(ADMIN_MAX)]
    }

    /// Whether it goes to more exports than one.
    pub fn is_broadcast(&self) -> bool {
        self.shelf == Shelf::EVERY || self.slot == Slot::EVERY
    }
}

impl Origin {
    /// Writes the 24 bytes of the answer: to the asker, from `from`, with our
    /// own address, flags made from nothing, command and tag echoed.
    ///
    /// `head` holds at least [`HEADER`] bytes.
    pub fn reply_header(
        &self,
        head: &mut [u8],
        from: MacAddr,
        address: Address,
        error: Option<ErrorCode>,
    ) {
        header(head, self.source, from, address, self.command, self.tag);
        if let Some(code) = error {
            head[14] |= FLAG_ERROR;
            head[15] = code as u8;
        }
    }
}

/// Gives a frame that is written already another sender; it holds at least
/// [`HEADER`] bytes.
pub fn set_source(head: &mut [u8], from: MacAddr) {
    head[6..12].copy_from_slice(&from.0);
}

/// Writes the header of a frame with R set and no error.
pub(super) fn header(
    head: &mut [u8],
    to: MacAddr,
    from: MacAddr,
    address: Address,
    command: u8,
    tag: [u8; 4],
) {
    head[0..6].copy_from_slice(&to.0);
    head[6..12].copy_from_slice(&from.0);
    head[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
    head[14] = VERSION | FLAG_RESPONSE;
    head[15] = 0;
    head[16..18].copy_from_slice(&address.shelf.0.to_be_bytes());
    head[18] = address.slot.0;
    head[19] = command;
    head[20..24].copy_from_slice(&tag);
}

impl<'a> Command<'a> {
    /// The command of a frame that holds a header; `None` if its own fixed part
    /// is not all there.
    fn parse(frame: &'a [u8]) -> Option<Command<'a>> {
        Some(match frame[19] {
            ata::COMMAND => {
                let (taskfile, payload) = Taskfile::parse(frame)?;
                Command::Ata(taskfile, payload)
            }
            config::COMMAND => Command::Config(config::Query::parse(frame)?),
            mask::COMMAND => Command::Mask(mask::Edit::parse(frame)?),
            reserve::COMMAND => Command::Reserve(reserve::Order::parse(frame)?),
            extensions::COMMAND => Command::Extensions(extensions::Strings::parse(frame)?),
            _ => Command::Unknown,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A Config read as the Linux driver sends it: 32 bytes, all shelves.
    const LINUX_DISCOVERY: [u8; 32] = [
        0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x88, 0xA2, 0x10,
        0, 0xFF, 0xFF, 0xFF, 0x01, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];

    #[test]
    fn linux_discovery_is_read() {
        let request = Request::parse(&LINUX_DISCOVERY).unwrap();
        assert_eq!(request.origin.source.to_string(), "52:54:00:12:34:56");
        assert_eq!(request.destination, MacAddr::BROADCAST);
        assert!(request.is_broadcast() && !request.is_response);
        assert!(matches!(request.command, Command::Config(_)));
        assert!(request.addresses(Address::new(3, 7).unwrap()));
    }

    #[test]
    fn shelf_and_slot_may_be_broadcast_each_alone() {
        let ours = Address::new(1, 2).unwrap();
        let table = [
            (1, 2, true),
            (0xFFFF, 2, true),
            (1, 0xFF, true),
            (0xFFFF, 0xFF, true),
            (1, 3, false),
            (2, 2, false),
            (0xFFFF, 3, false),
            (2, 0xFF, false),
        ];
        for (shelf, slot, expected) in table {
            let mut frame = LINUX_DISCOVERY;
            frame[16..18].copy_from_slice(&u16::to_be_bytes(shelf));
            frame[18] = slot;
            assert_eq!(Request::parse(&frame).unwrap().addresses(ours), expected);
        }
    }

    #[test]
    fn every_command_needs_its_own_header() {
        for (command, need) in [(0u8, 36), (1, 32), (2, 28), (3, 26), (0x23, 26), (0xF0, 24)] {
            let mut frame = [0u8; 64];
            frame[..24].copy_from_slice(&LINUX_DISCOVERY[..24]);
            frame[19] = command;
            for len in 0..64 {
                let parsed = Request::parse(&frame[..len]);
                assert_eq!(
                    parsed.is_ok(),
                    len >= need,
                    "command {command}, {len} bytes"
                );
            }
        }
    }

    #[test]
    fn reply_flags_come_from_nothing_but_the_answer() {
        let mut frame = LINUX_DISCOVERY;
        frame[14] = 0x17; // E and both reserved bits
        frame[15] = 0x55;
        frame[20..24].copy_from_slice(&[0x80, 1, 2, 3]);
        let request = Request::parse(&frame).unwrap();
        let mut head = [0xA5; HEADER];
        let mac = MacAddr([2; 6]);
        request
            .origin
            .reply_header(&mut head, mac, Address::new(5, 6).unwrap(), None);
        let expected = [
            0x52, 0x54, 0, 0x12, 0x34, 0x56, 2, 2, 2, 2, 2, 2, 0x88, 0xA2, 0x18, 0, 0, 5, 6, 1,
            0x80, 1, 2, 3,
        ];
        assert_eq!(head, expected);
        let code = Some(ErrorCode::TargetReserved);
        request
            .origin
            .reply_header(&mut head, mac, Address::new(5, 6).unwrap(), code);
        assert_eq!(head[14..16], [0x1C, 6]);
    }

    #[test]
    fn another_version_needs_only_the_header() {
        let mut frame = LINUX_DISCOVERY;
        frame[14] = 0x20;
        let request = Request::parse(&frame[..24]).unwrap();
        assert!(matches!(request.command, Command::OtherVersion));
    }

    proptest! {
        #[test]
        fn what_is_kept_of_a_change_asks_the_same(command in 1u8..4, sub in 0u8..7, count: u8,
                                                  old in 1010u16..1030, new in 1010u16..1030,
                                                  len in 1900usize..3000) {
            let mut frame = vec![7; len];
            frame[12..15].copy_from_slice(&[0x88, 0xA2, 0x10]);
            frame[19] = command;
            frame[24..28].copy_from_slice(&[sub % 4, sub % 3, 0, count]);
            if command == 3 {
                frame[25] = count;
            }
            if command == 1 {
                frame[29] = sub;
                frame[30..32].copy_from_slice(&old.to_be_bytes());
                let at = 32 + usize::from(old);
                frame[at..at + 2].copy_from_slice(&new.to_be_bytes());
            }
            let whole = Request::parse(&frame).unwrap();
            let kept = whole.admin_bytes();
            prop_assert!(kept.len() <= ADMIN_MAX);
            let again = Request::parse(kept).unwrap();
            prop_assert_eq!(format!("{:?}", again.command), format!("{:?}", whole.command));
        }

        #[test]
        fn no_bytes_can_harm(bytes in proptest::collection::vec(any::<u8>(), 0..1600), command in prop_oneof![0u8..5, Just(0x23)]) {
            let _ = Request::parse(&bytes);
            let mut frame = bytes;
            if frame.len() >= 20 {
                frame[12..15].copy_from_slice(&[0x88, 0xA2, 0x10]);
                frame[19] = command;
                let _ = Request::parse(&frame);
            }
        }
    }
}
