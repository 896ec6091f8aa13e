//! Asking by broadcast whether our address is taken.
//!
//! Two targets with one address destroy a disk, since an initiator takes them
//! for two paths to it. So before anything is served, sockets of their own ask
//! for our shelf and slot, and each that answers is another target: we do not yet.
//!
//! A host that answers for every address is no target. So each round asks for a
//! random address as well; a host that answers for all of those is ignored. A real
//! target does not have all of them, whichever it has.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Nic, NicError, NicTrouble, filter};
use crate::sys::link::{Link, LinkKind};
use crate::sys::mmsg::BatchReceiver;
use crate::sys::packet::PacketSocket;
use crate::wire::{Address, ETHERTYPE, MacAddr, Request, config};

/// The question is asked so often in the time there is, since one may be lost.
const ROUNDS: u32 = 3;
/// Hosts whose answers are told apart; of more, each that answers is a target.
const ANSWERERS_MAX: usize = 64;
/// Frames that are taken from one NIC before the time and the others are looked at.
const FRAMES_MAX: usize = 1024;

/// Another target that answers under our address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressConflict {
    /// Its MAC.
    pub mac: MacAddr,
    /// The interface it was heard on.
    pub nic: String,
}

/// What is asked, and recognised again in the answers.
#[derive(Debug)]
struct Questions {
    tag: [u8; 4],
    address: Address,
    /// One for each round.
    random: [Address; ROUNDS as usize],
}

impl Questions {
    /// The questions for `address`, with random addresses and a tag from `seed`.
    fn new(address: Address, seed: [u8; 16]) -> Questions {
        let number = u128::from_be_bytes(seed);
        let random = |round: usize| {
            // Three bytes each, and neither ours nor a broadcast one.
            let bits = (number >> (32 + 24 * round)) as u32;
            let (mut shelf, slot) = ((bits >> 8) as u16 % 0xFFFF, bits as u8 % 0xFF);
            if shelf == address.shelf.0 {
                shelf = (shelf + 1) % 0xFFFF;
            }
            Address::new(shelf, slot).unwrap_or(address)
        };
        Questions {
            tag: (number as u32).to_be_bytes(),
            address,
            random: [random(0), random(1), random(2)],
        }
    }
}

/// A host that has answered, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answerer {
    who: AddressConflict,
    ours: bool,
    /// A bit for each random address.
    random: u32,
}

/// All that have answered.
#[derive(Debug, Default)]
struct Answerers(Vec<Answerer>);

impl Answerers {
    /// Notes that a host answers for an address.
    fn note(&mut self, questions: &Questions, who: AddressConflict, address: Address) {
        let ours = address == questions.address;
        let random = questions.random.iter().enumerate();
        let random = random.filter(|(_, a)| **a == address);
        let random = random.fold(0, |bits, (round, _)| bits | 1 << round);
        if let Some(known) = self.0.iter_mut().find(|a| a.who == who) {
            known.ours |= ours;
            known.random |= random;
        } else if self.0.len() < ANSWERERS_MAX || (ours && self.0.len() == ANSWERERS_MAX) {
            self.0.push(Answerer { who, ours, random });
        }
    }

    /// The first that answers for our address alone, and all that answer for
    /// every address.
    fn verdict(self) -> (Option<AddressConflict>, Vec<AddressConflict>) {
        const EVERY: u32 = (1 << ROUNDS) - 1;
        let ours = self.0.into_iter().filter(|a| a.ours);
        let (liars, targets): (Vec<_>, Vec<_>) = ours.partition(|a| a.random == EVERY);
        let conflict = targets.into_iter().next().map(|a| a.who);
        (conflict, liars.into_iter().map(|a| a.who).collect())
    }
}

/// A socket that asks.
struct Prober<'a> {
    nic: &'a str,
    link: Link,
    socket: PacketSocket,
    receiver: BatchReceiver,
}

impl<'a> Prober<'a> {
    fn open(nic: &'a str, link: &Link, questions: &Questions) -> io::Result<Prober<'a>> {
        let socket = PacketSocket::open()?;
        socket.attach_filter(&filter::answers(questions.tag))?;
        socket.ignore_outgoing()?;
        let receiver = BatchReceiver::new(&socket, link.mtu)?;
        socket.bind(link.index, ETHERTYPE)?;
        Ok(Prober {
            nic,
            link: *link,
            socket,
            receiver,
        })
    }

    fn ask(&self, address: Address, tag: [u8; 4]) {
        let question = config::question(MacAddr(self.link.mac), address, tag);
        // A link that is down takes no question, and has no target either.
        let _ = self.socket.send(std::iter::once([&question[..], &[], &[]]));
    }

    /// Takes answers that have come, not without end.
    fn hear(&mut self, questions: &Questions, answerers: &mut Answerers) {
        for _ in 0..FRAMES_MAX {
            if !self.receiver.refill(&self.socket).unwrap_or(false) {
                return;
            }
            let Some(frame) = self.receiver.peek() else {
                return;
            };
            let answer = Request::parse(frame.bytes).ok();
            let answer = answer.filter(|a| a.is_response && a.origin.tag == questions.tag);
            let answer = answer.and_then(|a| {
                let address = Address::new(a.shelf.0, a.slot.0)?;
                Some((a.origin.source, address))
            });
            self.receiver.release();
            if let Some((mac, address)) = answer {
                let nic = self.nic.to_owned();
                answerers.note(questions, AddressConflict { mac, nic }, address);
            }
        }
    }
}

/// Asks on all NICs that have a link, for `time` in all. Returns the first who
/// has our address; who answers for every address is warned about.
pub fn find_conflict(
    nics: &[Nic],
    address: Address,
    seed: [u8; 16],
    time: Duration,
) -> Result<Option<AddressConflict>, NicError> {
    let questions = Questions::new(address, seed);
    let mut probers = Vec::new();
    for nic in nics {
        let Some(link) = nic.link.filter(|link| link.running) else {
            continue;
        };
        let prober = Prober::open(&nic.name, &link, &questions).map_err(|e| NicError {
            name: nic.name.clone(),
            why: NicTrouble::System("asking for our address", e),
        })?;
        probers.push(prober);
    }
    if probers.is_empty() {
        return Ok(None);
    }
    let mut answerers = Answerers::default();
    let start = Instant::now();
    for (round, random) in (1..).zip(questions.random) {
        for prober in &probers {
            // All on the loopback interface have one MAC: there nobody is told
            // apart, and so nobody is ignored.
            if prober.link.kind != LinkKind::Loopback {
                prober.ask(random, questions.tag);
            }
            prober.ask(address, questions.tag);
        }
        loop {
            let left = (time * round / ROUNDS).saturating_sub(start.elapsed());
            for prober in &mut probers {
                prober.hear(&questions, &mut answerers);
            }
            if left.is_zero() {
                break;
            }
            let mut fds: Vec<PollFd> = probers
                .iter()
                .map(|a| PollFd::new(a.socket.as_fd(), PollFlags::POLLIN))
                .collect();
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1));
            // Interrupted or not: the sockets are looked at again.
            let _ = poll(&mut fds, timeout.unwrap_or(PollTimeout::MAX));
        }
    }
    let (conflict, liars) = answerers.verdict();
    for AddressConflict { mac, nic } in liars {
        log::warn!(
            "{address}: {mac} on {nic} answers for every address, and is not taken for another \
             target; find out what that host does"
        );
    }
    Ok(conflict)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn questions() -> Questions {
        Questions::new(
            Address::new(1, 1).unwrap(),
            std::array::from_fn(|n| n as u8 * 3),
        )
    }

    fn host(number: u8) -> AddressConflict {
        AddressConflict {
            mac: MacAddr([2, 0, 0, 0, 0, number]),
            nic: "eth0".into(),
        }
    }

    #[test]
    fn a_host_that_answers_for_every_address_is_ignored_and_no_other() {
        let questions = questions();
        let every = questions.random.into_iter().chain([questions.address]);
        let every: Vec<Address> = every.collect();
        for left_out in 0..3 {
            let mut answerers = Answerers::default();
            for address in &every {
                answerers.note(&questions, host(1), *address);
            }
            for (n, address) in every.iter().enumerate() {
                if n != left_out {
                    answerers.note(&questions, host(2), *address);
                }
            }
            assert_eq!(answerers.verdict(), (Some(host(2)), vec![host(1)]));
        }
        // Answers for others than ours concern nobody.
        let mut answerers = Answerers::default();
        for address in &every[..3] {
            answerers.note(&questions, host(1), *address);
        }
        assert_eq!(answerers.verdict(), (None, vec![]));
    }

    #[test]
    fn many_that_answer_hide_no_target_and_take_no_memory() {
        let questions = questions();
        let mut answerers = Answerers::default();
        for number in 0..=255 {
            answerers.note(&questions, host(number), questions.random[0]);
        }
        for number in (0..=255).rev() {
            answerers.note(&questions, host(number), questions.address);
        }
        assert_eq!(answerers.0.len(), ANSWERERS_MAX + 1);
        assert!(answerers.verdict().0.is_some());
    }

    #[test]
    fn the_random_addresses_are_none_of_ours() {
        for byte in 0..=255 {
            let ours = Address::new(u16::from_be_bytes([byte, byte]) % 0xFFFF, 3).unwrap();
            let questions = Questions::new(ours, [byte; 16]);
            assert!(!questions.random.contains(&ours), "{questions:?}");
        }
    }
}
