//! Frames without end, right and wrong, from several hosts on two NICs, with a
//! disk that ends its jobs in any order: a read returns of each sector what was
//! acknowledged last when it was asked, or something newer; whatever is refused
//! has no effect; what is acknowledged is where the mode promises it; and every
//! reply keeps the rules. Of hosts whose tags count, frames come again: what was
//! done is not done again, and what was not is not acknowledged.
//!
//! What a frame must do is said here a second time, by a model that knows
//! nothing but the history of each sector and the table of opcodes.

use std::collections::{HashMap, HashSet, VecDeque};

use super::*;
use crate::access::admits;
use crate::session::Tags;
use initiator::frame::{Ata, Directive};
use initiator::hostile;

const STEPS: usize = 400;
const SEEDS: u64 = 60;
/// Frames that may come again.
const RECENT: usize = 40;

/// What the model says of an ATA request that is heard.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Must {
    /// The reply carries sectors from this one on, each as it was then or
    /// later: for each the place in its history.
    Read(usize, Vec<usize>),
    /// It succeeds, and these places in the histories of sectors are
    /// acknowledged.
    Write(Vec<(usize, usize)>),
    /// It succeeds, and what was acknowledged then is on stable storage.
    Flush(Vec<usize>),
    /// It succeeds and carries nothing.
    Nothing,
    /// It succeeds; what it carries is not the disk's.
    Succeed,
    /// An ATA error.
    Fail(u8),
    /// An error of AoE.
    Refuse(u8),
    /// No answer.
    Silence,
}

struct Model {
    /// What each sector was made, in order; shared by those made the same.
    history: Vec<Vec<Vec<u8>>>,
    /// How far each history is acknowledged.
    acked: Vec<usize>,
    /// Who acknowledges writes before they are on stable storage.
    durable: bool,
    write_through: bool,
    /// What those who asked must get, and their frames, in order, by NIC, host
    /// and tag.
    waiting: HashMap<Key, VecDeque<(Must, Vec<u8>)>>,
    /// Writes that were carried out, without their headers.
    done: HashSet<(Key, Vec<u8>)>,
}

/// NIC; host and tag.
type Key = (u16, Vec<u8>);

impl Model {
    /// What a request must get, and what becomes of the disk.
    fn order(&mut self, bench: &Bench, nic: NicId, frame: &[u8]) -> Must {
        let state = &bench.target.state;
        let from: MacAddr = MacAddr(frame[6..12].try_into().unwrap());
        let to_all = frame[16..18] == [0xFF, 0xFF] || frame[18] == 0xFF;
        let (op, count) = (frame[27], frame[26]);
        let writes = [0x30, 0x34, 0xCA, 0x35].contains(&op);
        if to_all && (writes || op == 0x06 || op == 0xEF) {
            return Must::Silence;
        }
        if op != 0xEC && !state.reserved.is_empty() && !state.reserved.contains(&from) {
            return Must::Refuse(6);
        }
        if bench.target.settings.read_only && (writes || op == 0x06) {
            return Must::Fail(4);
        }
        let mut lba = [0; 8];
        lba[..6].copy_from_slice(&frame[28..34]);
        let mut lba = u64::from_le_bytes(lba);
        if [0x20, 0xC8, 0x30, 0xCA, 0x40].contains(&op) {
            lba &= 0x0FFF_FFFF;
        }
        // Of no sector none lies past the end.
        let lba = if count == 0 { 0 } else { lba };
        let most = if nic == SMALL { 2 } else { 17 };
        let fits = lba + u64::from(count) <= SECTORS;
        let range = || lba as usize..lba as usize + usize::from(count);
        match op {
            0x20 | 0x24 | 0xC8 | 0x25 if count > most => Must::Refuse(2),
            0x20 | 0x24 | 0xC8 | 0x25 if fits => {
                Must::Read(range().start, self.acked[range()].to_vec())
            }
            _ if writes && (count > most || frame.len() < 36 + 512 * usize::from(count)) => {
                Must::Refuse(2)
            }
            _ if writes && fits => {
                let data = frame[36..].chunks(512);
                Must::Write(self.write(range().zip(data)))
            }
            0x40 | 0x42 if fits => Must::Nothing,
            0x20 | 0x24 | 0xC8 | 0x25 | 0x40 | 0x42 => Must::Fail(0x10),
            _ if writes => Must::Fail(0x10),
            0x06 if frame[25] & 1 == 0 || count != 1 => Must::Fail(4),
            0x06 if frame.len() < 36 + 512 => Must::Refuse(2),
            0x06 => self.trim(&frame[36..36 + 512]),
            0xEC if count != 1 => Must::Refuse(2),
            0xEC => Must::Succeed,
            0xE7 | 0xEA => Must::Flush(self.acked.clone()),
            0xE5 => Must::Succeed,
            0xEF if frame[25] == 0x82 => Must::Flush(self.acked.clone()),
            0xEF if frame[25] == 0x02 && !self.durable => Must::Nothing,
            0xB0 if frame[29..31] == [0x4F, 0xC2] => match frame[25] {
                0xD8 => Must::Nothing,
                0xD0 | 0xDA if !state.smart_off.contains(from) => Must::Succeed,
                0xD9 if !state.smart_off.contains(from) => Must::Nothing,
                _ => Must::Fail(4),
            },
            _ => Must::Fail(4),
        }
    }

    fn trim(&mut self, entries: &[u8]) -> Must {
        let ranges: Vec<(u64, u64)> = entries
            .chunks(8)
            .map(|e| {
                let word = u64::from_le_bytes(e.try_into().unwrap());
                (word & 0xFFFF_FFFF_FFFF, word >> 48)
            })
            .filter(|(_, count)| *count > 0)
            .collect();
        if ranges.iter().any(|(lba, count)| lba + count > SECTORS) {
            return Must::Fail(0x10);
        }
        let zeros = vec![0; 512];
        let sectors = ranges
            .into_iter()
            .flat_map(|(lba, count)| lba as usize..(lba + count) as usize);
        Must::Write(self.write(sectors.map(|lba| (lba, &zeros[..]))))
    }

    fn write<'a>(
        &mut self,
        sectors: impl Iterator<Item = (usize, &'a [u8])>,
    ) -> Vec<(usize, usize)> {
        sectors
            .map(|(lba, data)| {
                self.history[lba].push(data.to_vec());
                (lba, self.history[lba].len() - 1)
            })
            .collect()
    }

    /// A write that was dropped never was.
    fn unwrite(&mut self, must: Must) {
        let Must::Write(places) = must else { return };
        for (lba, place) in places.into_iter().rev() {
            assert_eq!(self.history[lba].len(), place + 1);
            self.history[lba].pop();
        }
    }

    /// What each sector was made last.
    fn newest(&self) -> Vec<u8> {
        let last = self.history.iter().filter_map(|history| history.last());
        last.flatten().copied().collect()
    }

    /// Holds a sector against its history from a place on.
    #[track_caller]
    fn sector(&self, what: &str, lba: usize, bytes: &[u8], from: usize) {
        let history = &self.history[lba];
        assert!(
            history[from..].iter().any(|version| version == bytes),
            "{what}: sector {lba} begins {:02x?}, of its {} versions that is {:?}, not {from} or later",
            &bytes[..8],
            history.len(),
            history.iter().rposition(|version| version == bytes),
        );
    }

    /// Holds a reply against what it must be, and the disk against what it
    /// acknowledges.
    fn hold(&mut self, bench: &Bench, nic: NicId, reply: &Reply, at_once: bool) {
        if reply.command() != 0 || reply.error() == Some(5) {
            return;
        }
        let key = (
            nic.0,
            [&reply.bytes()[..6], &reply.bytes()[20..24]].concat(),
        );
        // A frame that came again may have an answer while its first copy, of an
        // earlier life of its host, has none yet and never will.
        let list = self.waiting.get_mut(&key);
        let next = match at_once {
            true => list.and_then(VecDeque::pop_back),
            false => list.and_then(VecDeque::pop_front),
        };
        let (must, frame) = next.unwrap_or_else(|| panic!("unexpected: {reply:?}"));
        let ata = reply.ata().unwrap();
        let asker = MacAddr(reply.bytes()[..6].try_into().unwrap());
        let got = match (reply.error(), ata.status) {
            (Some(code), _) => Err(Must::Refuse(code)),
            (None, 0x40) => Ok(ata.data),
            (None, _) => Err(Must::Fail(ata.error)),
        };
        let data = match (got, &must) {
            // A durable write whose disk took too long: it may have happened.
            (Err(Must::Fail(4)), Must::Write(_)) if bench.target.is_durable(asker) => return,
            (Err(got), _) => return assert_eq!(got, must, "{reply:?}"),
            (Ok(_), Must::Refuse(_) | Must::Fail(_) | Must::Silence) => {
                panic!("{reply:?} instead of {must:?}")
            }
            (Ok(data), _) => data,
        };
        match must {
            Must::Read(first, floors) => {
                assert!(data.len() >= floors.len() * 512, "{reply:?}");
                for ((at, bytes), floor) in data.chunks(512).enumerate().zip(floors) {
                    self.sector("read", first + at, bytes, floor);
                }
            }
            Must::Write(places) => {
                self.done.insert((key, frame[24..].to_vec()));
                let (disk, stable) = (bench.on_disk(), bench.stable());
                let target = &bench.target;
                let off = target.state.write_cache_off.contains(asker);
                let off = off || target.changes.is_closing(asker);
                let durable = self.durable || off;
                for (lba, place) in places {
                    self.acked[lba] = self.acked[lba].max(place);
                    let bytes = lba * 512..(lba + 1) * 512;
                    if self.write_through {
                        self.sector("on the disk", lba, &disk[bytes.clone()], place);
                    }
                    if durable {
                        self.sector("on stable storage", lba, &stable[bytes], place);
                    }
                }
            }
            Must::Flush(floors) => {
                let stable = bench.stable();
                for (lba, floor) in floors.into_iter().enumerate() {
                    let bytes = &stable[lba * 512..(lba + 1) * 512];
                    self.sector("after a flush", lba, bytes, floor);
                }
            }
            Must::Nothing => assert!(data.len() == 24 || data.iter().all(|b| *b == 0)),
            _ => {}
        }
    }
}

/// Whether a frame is of a host whose tags count, so that it may come again.
fn counts(bench: &Bench, nic: NicId, bytes: &[u8]) -> bool {
    let from = MacAddr(bytes[6..12].try_into().unwrap());
    bench.target.sessions.extensions(nic, from).tags == Tags::CountBe
}

/// A frame that may be right, or nearly.
fn frame(
    chance: &mut Chance,
    bench: &mut Bench,
    captured: &[Vec<u8>],
    recent: &VecDeque<(NicId, Vec<u8>)>,
) -> (NicId, Vec<u8>) {
    if chance.one_in(5) && !recent.is_empty() {
        let (nic, bytes) = &recent[chance.below(recent.len())];
        if counts(bench, *nic, bytes) {
            return (*nic, bytes.clone());
        }
    }
    let nic = *chance.pick(&[SMALL, SMALL, JUMBO]);
    let from = *chance.pick(&[ALICE, ALICE, BOB, CAROL]);
    if chance.one_in(if bench.target.sessions.is_empty() {
        12
    } else {
        60
    }) {
        let mut bytes = chance.pick(captured).clone();
        bytes[..6].copy_from_slice(&host::<MacAddr>(1 + nic.0 as u8).0);
        bytes[6..12].copy_from_slice(&host::<MacAddr>(from).0);
        bytes[16..19].copy_from_slice(&[0, SHELF as u8, SLOT]);
        chance.spoil(&mut bytes, 12, 1514);
        return (nic, bytes);
    }
    let ask = ask(chance, if nic == SMALL { 2 } else { 17 });
    let mut bytes = bench.encode(nic, from, &ask);
    if chance.one_in(10) {
        chance.spoil(
            &mut bytes,
            24,
            frame_max(if nic == SMALL { 1500 } else { 9000 }),
        );
    }
    (nic, bytes)
}

fn ask(chance: &mut Chance, most: usize) -> Ask {
    const OPCODES: [u8; 18] = [
        0x20, 0x24, 0xC8, 0x25, 0x30, 0x34, 0xCA, 0x35, 0xEC, 0xE7, 0xEA, 0xE5, 0x40, 0x42, 0xEF,
        0x06, 0xB0, 0x99,
    ];
    let lba = chance.below(SECTORS as usize + 2) as u64;
    let count = chance.below(most + 1);
    let fill = chance.draw() as u8;
    let some = |chance: &mut Chance| -> Vec<_> {
        let hosts = [ALICE, BOB, CAROL];
        // Nobody is left out, so that the run goes on.
        let all = chance.one_in(2);
        let picked = hosts.iter().filter(|_| all);
        picked.map(|h| host(*h)).collect()
    };
    match chance.below(31) {
        0..9 => Ask::read(lba, count as u8),
        9..18 => Ask::write(lba, &sectors(fill, count)),
        18 => Ask::flush(),
        19 => Ask::identify(),
        20 => Ask::config(chance.below(7) as u8, &[b'a' + fill % 3]),
        21 => Ask::config_replace(&[b'a' + fill % 3], b"b"),
        22 => Ask::reserve(*chance.pick(&[0, 1, 2, 2, 3]), &some(chance)),
        23 => {
            let list: Vec<_> = some(chance);
            let edits: Vec<_> = list.into_iter().map(Directive::add).collect();
            Ask::mask_edit(&edits)
        }
        24 => Ask::write(lba, &sectors(fill, count)).shelf(0xFFFF),
        30 => Ask::extensions(&[*chance.pick(&["reset", "tag_inc_be", "tag_inc_be"])]),
        25 => {
            let mut ranges = sectors(0, 1);
            let entry = (lba | (count as u64) << 48).to_le_bytes();
            ranges[8..16].copy_from_slice(&entry);
            let trim = Ata {
                feature: 1,
                count: 1,
                opcode: 0x06,
                ..Ata::default()
            };
            Ask::ata(trim, &ranges)
        }
        _ => {
            let anywhere = chance.draw();
            let registers = Ata {
                aflags: chance.draw() as u8,
                feature: *chance.pick(&[0, 1, 2, 0x82, 0xD0, 0xD8, 0xD9, 0xDA]),
                count: *chance.pick(&[0, 1, 2, count as u8, 255]),
                opcode: *chance.pick(&OPCODES),
                lba: *chance.pick(&[lba, lba | 0xE000_0000, 0xC2_4F00, anywhere]),
                reserved: [fill, 0],
            };
            let len = *chance.pick(&[0, 512, 511, count * 512]);
            Ask::ata(registers, &vec![fill; len])
        }
    }
}

fn run(seed: u64) {
    let mut chance = Chance::new(seed);
    let captured = hostile::captured();
    let settings = Settings {
        durable: chance.one_in(4),
        read_only: chance.one_in(8),
        ..settings()
    };
    let dirty_max = 1 + chance.below(20) as u32;
    let room = Room {
        slots: dirty_max + 4 + chance.below(20) as u32,
        dirty_max: dirty_max.max(4),
        parked_max: *chance.pick(&[4 << 10, 64 << 10, 1 << 20]),
        write_through: chance.one_in(4),
    };
    let mut model = Model {
        history: vec![vec![vec![0; 512]]; SECTORS as usize],
        acked: vec![0; SECTORS as usize],
        durable: settings.durable,
        write_through: room.write_through,
        waiting: HashMap::new(),
        done: HashSet::new(),
    };
    let mut bench = Bench::with_room(settings, room);
    let mut watched = HashSet::new();
    let mut recent = VecDeque::new();
    for (nic, from) in [(SMALL, ALICE), (SMALL, BOB), (JUMBO, ALICE)] {
        if chance.one_in(2) {
            bench.extend(nic, from, &["tag_inc_be"]);
        }
    }
    for _ in 0..STEPS {
        if chance.one_in(15) {
            let shut = bench.desk.borrow().shut;
            if shut { bench.open() } else { bench.shut() }
        }
        // Some jobs that were kept end, whichever.
        for _ in 0..chance.below(4) {
            let mut desk = bench.desk.borrow_mut();
            let kept = desk.kept.len();
            if kept > 0 {
                let job = desk.kept.remove(chance.below(kept));
                desk.passed.push_back(job);
            }
        }
        if chance.one_in(6) {
            bench.now += Duration::from_millis(chance.below(900) as u64);
        }
        if chance.one_in(3) {
            take_in(&mut bench, &mut model);
        }
        let (nic, bytes) = frame(&mut chance, &mut bench, &captured, &recent);
        let Some(from) = heard(&bench, &bytes) else {
            let got = bench.hand(nic, &bytes);
            assert!(
                matches!(got, Got::Dropped(_) | Got::AddressConflict(_)),
                "{got:?}"
            );
            continue;
        };
        let ata = bytes[19] == 0 && bytes[14] >> 4 == 1;
        if !ata {
            if let Got::Reply(reply) = bench.hand(nic, &bytes) {
                model.hold(&bench, nic, &reply, true);
            }
            continue;
        }
        if counts(&bench, nic, &bytes) {
            watched.insert((nic.0, from));
            recent.push_back((nic, bytes.clone()));
            recent.drain(..recent.len().saturating_sub(RECENT));
        }
        let must = model.order(&bench, nic, &bytes);
        let key = (nic.0, [&from.0[..], &bytes[20..24]].concat());
        let duplicates = bench.target.counters().duplicate_writes;
        let got = bench.hand(nic, &bytes);
        let is_duplicate = bench.target.counters().duplicate_writes > duplicates;
        let expect = |model: &mut Model, must: &Must| {
            let list = model.waiting.entry(key.clone()).or_default();
            list.push_back((must.clone(), bytes.clone()));
        };
        match got {
            Got::Reply(reply) if is_duplicate => {
                assert_eq!(registers(&reply), (0x40, 0, 0));
                let known = model.done.contains(&(key, bytes[24..].to_vec()));
                assert!(known, "acknowledged, never done: {reply:?}");
                model.unwrite(must);
            }
            Got::Reply(reply) => {
                expect(&mut model, &must);
                model.hold(&bench, nic, &reply, true);
            }
            Got::Parked => {
                assert_ne!(must, Must::Silence);
                expect(&mut model, &must);
            }
            Got::Dropped(Dropped::InHand) => {
                let waiting = model.waiting.get(&key);
                assert!(waiting.is_some_and(|list| !list.is_empty()), "{bytes:02x?}");
                model.unwrite(must);
            }
            Got::Dropped(Dropped::NoRoom) => {
                assert!(matches!(must, Must::Write(_)), "{must:?}");
                model.unwrite(must);
            }
            Got::Dropped(why) => assert_eq!((why, must), (Dropped::BroadcastChange, Must::Silence)),
            Got::AddressConflict(mac) => panic!("address conflict: {mac}"),
        }
    }
    bench.open();
    bench.target.drain();
    bench.settle();
    take_in(&mut bench, &mut model);
    assert!(bench.target.is_idle());
    // Those whose tags began anew get no answer to what was in hand then.
    for ((nic, who), list) in &model.waiting {
        let from = MacAddr(who[..6].try_into().unwrap());
        let left = !list.is_empty() && !watched.contains(&(*nic, from));
        assert!(!left, "no answer: {list:?}");
    }
    same(&bench.stable(), &model.newest());
    assert!(bench.target.changes.is_empty());
    let saved = bench.saved().unwrap_or_default();
    assert_eq!(saved, bench.target.state);
}

/// Whose request a frame is, if it is one that must get past admission.
fn heard(bench: &Bench, bytes: &[u8]) -> Option<MacAddr> {
    let need = match *bytes.get(19)? {
        _ if bytes.len() < 24 => return None,
        _ if bytes[14] >> 4 != 1 => 24,
        0 => 36,
        1 => 32,
        2 => 28,
        3 => 26,
        _ => 24,
    };
    let from = MacAddr(bytes[6..12].try_into().unwrap());
    let target = &bench.target;
    let ours = (bytes[16..18] == [0, SHELF as u8] || bytes[16..18] == [0xFF, 0xFF])
        && (bytes[18] == SLOT || bytes[18] == 0xFF);
    let heard = bytes.len() >= need
        && bytes[12..14] == [0x88, 0xA2]
        && bytes[14] & 8 == 0
        && ours
        && admits(&target.settings.policy, &target.state, from);
    heard.then_some(from)
}

fn take_in(bench: &mut Bench, model: &mut Model) {
    for (nic, reply) in bench.pump() {
        model.hold(bench, nic, &reply, false);
    }
}

#[test]
fn whatever_comes_reads_return_what_was_written() {
    for seed in 0..SEEDS {
        println!("seed {seed}");
        run(seed);
    }
}
