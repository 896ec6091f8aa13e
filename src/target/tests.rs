//! The target without a network: frames in, replies out, a disk in memory that
//! ends its jobs when it is told to. Requests are built, and replies read, by
//! the initiator of the tests, which knows the wire on its own account.

mod admin;
mod admission;
mod ata;
mod cache;
mod doors;
mod fairness;
mod links;
mod pace;
mod saves;
mod several;
mod simulation;
mod sums;
mod tags;
mod tangle;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use initiator::frame::{Defaults, Frame as Ask, Reply};
use initiator::hostile::Chance;
use shadow::{BlockFile, MemoryFile};
use tempfile::TempDir;

use super::*;
use crate::store::{Arena, Backing, Cache, Disk, Done, Inline, Job, JobId, VolumeOptions};
use crate::wire::HEAD_MAX;

const SHELF: u16 = 7;
const SLOT: u8 = 3;
const SECTORS: u64 = 64;
/// Where the export begins in its backing; what lies below must stay as it is.
const START: usize = 1024;
/// The NIC with ordinary frames, and the one with large ones.
const SMALL: NicId = NicId(0);
const JUMBO: NicId = NicId(1);
/// Hosts, by the last byte of their address.
const ALICE: u8 = 0xA;
const BOB: u8 = 0xB;
const CAROL: u8 = 0xC;
/// How long what is dirty, and who waits for stable storage, may wait.
const MAX_DIRTY_AGE: Duration = Duration::from_secs(5);
const IDLE_FLUSH: Duration = Duration::from_millis(500);
const IO_PATIENCE: Duration = Duration::from_secs(10);

/// The address of a host. Any type of address will do, since the initiator is
/// linked with another build of this crate than the one under test.
fn host<M: FromStr>(last: u8) -> M
where
    M::Err: Debug,
{
    format!("02:00:00:00:00:{last:02x}").parse().unwrap()
}

fn broadcast<M: FromStr>() -> M
where
    M::Err: Debug,
{
    "ff:ff:ff:ff:ff:ff".parse().unwrap()
}

/// A file in memory that can fail, counts its syncs, and knows what would be
/// left after a loss of power: what stood in it when it was synced last.
struct Medium {
    file: MemoryFile,
    stable: Mutex<Vec<u8>>,
    syncs: AtomicUsize,
    read_fails: AtomicBool,
    write_fails: AtomicBool,
    sync_fails: AtomicBool,
}

fn unless(broken: &AtomicBool) -> io::Result<()> {
    match broken.load(Ordering::Relaxed) {
        true => Err(io::Error::other("broken")),
        false => Ok(()),
    }
}

impl BlockFile for Medium {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        unless(&self.read_fails)?;
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        unless(&self.write_fails)?;
        self.file.write_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        unless(&self.sync_fails)?;
        self.syncs.fetch_add(1, Ordering::Relaxed);
        *self.stable.lock().unwrap() = self.file.bytes();
        Ok(())
    }
}

impl Backing for Medium {
    fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.read_at(buf, offset).is_ok()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(&vec![0; len as usize], offset)
    }
}

/// Jobs that a [`Gate`] keeps, and those it has let pass.
#[derive(Default)]
struct Desk {
    shut: bool,
    /// How many saves were begun.
    saves: u32,
    kept: Vec<(JobId, Job)>,
    passed: VecDeque<(JobId, Job)>,
}

impl Desk {
    /// Lets the first kept job that is wanted pass; says whether there was one.
    fn pass(&mut self, wanted: impl Fn(&Job) -> bool) -> bool {
        let Some(at) = self.kept.iter().position(|(_, job)| wanted(job)) else {
            return false;
        };
        let job = self.kept.remove(at);
        self.passed.push_back(job);
        true
    }
}

/// An engine whose jobs end when the test says so, in the order it says.
struct Gate {
    engine: Inline,
    desk: Rc<RefCell<Desk>>,
}

impl Disk for Gate {
    fn submit(&mut self, id: JobId, job: Job) {
        let mut desk = self.desk.borrow_mut();
        desk.saves += u32::from(matches!(job, Job::Save { .. }));
        match desk.shut {
            true => desk.kept.push((id, job)),
            false => desk.passed.push_back((id, job)),
        }
    }

    fn reap(&mut self) -> Option<Done> {
        let (id, job) = self.desk.borrow_mut().passed.pop_front()?;
        self.engine.submit(id, job);
        self.engine.reap()
    }

    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        !self.desk.borrow().shut && self.engine.try_now(buf, offset)
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn has_done(&mut self) -> bool {
        !self.desk.borrow().passed.is_empty()
    }
}

/// What came of a frame.
#[derive(Debug)]
enum Got {
    Reply(Reply),
    Parked,
    Dropped(Dropped),
    AddressConflict(MacAddr),
}

/// A target on a bench.
struct Bench {
    target: Target,
    medium: Arc<Medium>,
    desk: Rc<RefCell<Desk>>,
    dir: TempDir,
    state_file: Arc<StateFile>,
    now: Instant,
    tag: u32,
    /// What was asked and not answered yet: replies are held against it.
    asked: Vec<(NicId, Vec<u8>)>,
}

/// How much fits into a bench.
#[derive(Clone, Copy)]
struct Room {
    /// Blocks of the cache, and how many of them may be dirty.
    slots: u32,
    dirty_max: u32,
    /// Bytes that may wait for a slot.
    parked_max: usize,
    /// Whether the memory does not survive us.
    write_through: bool,
}

impl Default for Room {
    fn default() -> Room {
        Room {
            slots: 24,
            dirty_max: 18,
            parked_max: 1 << 20,
            write_through: false,
        }
    }
}

fn settings() -> Settings {
    Settings {
        address: Address::new(SHELF, SLOT).unwrap(),
        buffers: 64,
        read_only: false,
        durable: false,
        policy: Policy::default(),
        identity: Identity {
            serial: "7.3:bench".into(),
            model: "AoEde virtual blade".into(),
            firmware: "1".into(),
            wwn: 0x3000_0000_0000_0001,
            physical_exponent: 0,
            alignment: 0,
            trim: true,
        },
    }
}

impl Bench {
    fn new() -> Bench {
        Bench::with(settings())
    }

    fn with(settings: Settings) -> Bench {
        Bench::with_room(settings, Room::default())
    }

    /// A bench whose memory does not survive it: writes go through.
    fn writing_through() -> Bench {
        let room = Room {
            write_through: true,
            ..Room::default()
        };
        Bench::with_room(settings(), room)
    }

    fn with_room(settings: Settings, room: Room) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        Bench::saving_in(settings, room, dir.path().join("state"), dir)
    }

    /// A bench whose state cannot be saved: where its directory should be there
    /// is a file.
    fn forgetful(settings: Settings) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        std::fs::write(&path, "in the way").unwrap();
        Bench::saving_in(settings, Room::default(), path, dir)
    }

    fn saving_in(settings: Settings, room: Room, state: PathBuf, dir: TempDir) -> Bench {
        let mut bytes = vec![0x5A; START];
        bytes.resize(START + SECTORS as usize * 512, 0);
        let medium = Arc::new(Medium {
            file: MemoryFile::new(bytes.clone()),
            stable: Mutex::new(bytes),
            syncs: AtomicUsize::new(0),
            read_fails: AtomicBool::new(false),
            write_fails: AtomicBool::new(false),
            sync_fails: AtomicBool::new(false),
        });
        let desk = Rc::new(RefCell::new(Desk::default()));
        let gate = Gate {
            engine: Inline::new(Arc::<Medium>::clone(&medium)),
            desk: Rc::clone(&desk),
        };
        let bounds = Bounds {
            start: START as u64,
            sectors: SECTORS,
        };
        let arena = Arena::anonymous(4096, room.slots).unwrap();
        let cache = Cache::new(arena, 1, room.dirty_max);
        let options = VolumeOptions {
            export: "e1.1".into(),
            image: "disk.img".into(),
            align: 1,
            direct: false,
            write_through: room.write_through,
            request_max: 9014,
            parked_max: room.parked_max,
            max_dirty_age: MAX_DIRTY_AGE,
            idle_flush: IDLE_FLUSH,
            io_patience: IO_PATIENCE,
            read_ahead: 0,
            write_depth: 4,
            merge_share: 25,
            shadow_full: crate::freeze::WhenFull::Thaw,
            hold_max: Duration::from_secs(120),
            freeze_max: Duration::ZERO,
        };
        let now = Instant::now();
        let volume = Volume::new(now, Box::new(gate), cache, bounds, options);
        let address = settings.address.to_string();
        let state_file = StateFile::new(&state, &address, &dir.path().join("disk"));
        let state_file = Arc::new(state_file);
        let target = Target::new(
            now,
            settings,
            volume,
            WireState::default(),
            Arc::clone(&state_file),
        );
        let mut bench = Bench {
            target,
            medium,
            desk,
            dir,
            state_file,
            now,
            tag: 0x8000_0000,
            asked: Vec::new(),
        };
        bench.target.set_nic(SMALL, Some(nic(SMALL)));
        bench.target.set_nic(JUMBO, Some(nic(JUMBO)));
        bench
    }

    /// The bytes of a request from a host, with a tag of its own.
    fn encode(&mut self, nic: NicId, from: u8, ask: &Ask) -> Vec<u8> {
        self.tag += 1;
        ask.encode(&Defaults {
            destination: host(1 + nic.0 as u8),
            source: host(from),
            shelf: SHELF,
            slot: SLOT,
            tag: self.tag.to_be_bytes(),
        })
    }

    /// Hands a frame to the target as the kernel would.
    fn hand(&mut self, nic: NicId, bytes: &[u8]) -> Got {
        let frame = Frame {
            bytes,
            stamp: 0,
            whole: true,
            other_host: false,
        };
        self.hand_frame(nic, frame)
    }

    fn hand_frame(&mut self, nic: NicId, frame: Frame) -> Got {
        // What the target does not write must not go out.
        let mut head = vec![0xA5; HEAD_MAX];
        let action = self.target.handle(self.now, nic, frame, &mut head);
        let got = match action {
            Action::Reply { len, body, sum } => Got::Reply(self.whole(&head[..len], body, sum)),
            Action::Parked => Got::Parked,
            Action::Drop(why) => Got::Dropped(why),
            Action::AddressConflict(mac) => Got::AddressConflict(mac),
        };
        match &got {
            Got::Reply(reply) => self.check(nic, frame.bytes, reply),
            Got::Parked => self.asked.push((nic, frame.bytes.to_vec())),
            _ => {}
        }
        got
    }

    fn whole(&mut self, head: &[u8], body: Option<Body>, sum: Option<Sum>) -> Reply {
        let mut bytes = head.to_vec();
        bytes.extend_from_slice(body.as_deref().unwrap_or_default());
        bytes.extend(sum.into_iter().flatten());
        self.target.recycle(body);
        Reply::parse(bytes).unwrap()
    }

    /// Takes in what the disk has done, and the replies that were waiting for
    /// it.
    fn pump(&mut self) -> Vec<(NicId, Reply)> {
        let mut replies = Vec::new();
        self.target.advance(self.now);
        while self.target.has_work() {
            self.target.advance(self.now);
        }
        while let Some(nic) = self.target.next_ready() {
            let mut head = vec![0xA5; HEAD_MAX];
            if let Action::Reply { len, body, sum } = self.target.emit(&mut head) {
                let reply = self.whole(&head[..len], body, sum);
                let answered = |(on, request): &(NicId, Vec<u8>)| {
                    *on == nic
                        && request[19..24] == reply.bytes()[19..24]
                        && request[6..12] == reply.bytes()[..6]
                };
                let at = self.asked.iter().position(answered);
                let at = at.unwrap_or_else(|| panic!("nobody asked for {reply:?}"));
                let (nic, request) = self.asked.remove(at);
                self.check(nic, &request, &reply);
                replies.push((nic, reply));
            }
        }
        replies
    }

    /// Sends a request and takes what comes of it at once.
    fn send(&mut self, nic: NicId, from: u8, ask: &Ask) -> Got {
        let bytes = self.encode(nic, from, ask);
        self.hand(nic, &bytes)
    }

    /// Sends a request and waits for its reply.
    fn ask_from(&mut self, nic: NicId, from: u8, ask: &Ask) -> Reply {
        let bytes = self.encode(nic, from, ask);
        match self.hand(nic, &bytes) {
            Got::Reply(reply) => reply,
            Got::Parked => {
                let mut replies = self.pump();
                if replies.is_empty() && self.target.changes.are_waiting() {
                    // There were saves enough in this second.
                    replies = self.wait();
                }
                let (_, reply) = replies.pop().expect("no reply came");
                assert!(replies.is_empty(), "more replies than one: {replies:?}");
                reply
            }
            other => panic!("{other:?} instead of a reply to {bytes:02x?}"),
        }
    }

    fn ask(&mut self, ask: &Ask) -> Reply {
        self.ask_from(SMALL, ALICE, ask)
    }

    /// Waits for the next replies, as long as it takes.
    fn wait(&mut self) -> Vec<(NicId, Reply)> {
        for _ in 0..100 {
            let replies = self.pump();
            if !replies.is_empty() {
                return replies;
            }
            let deadline = self.target.deadline().expect("nothing would ever happen");
            self.now = self.now.max(deadline);
        }
        panic!("no reply came");
    }

    /// Sends a request and waits for its reply, as long as it takes.
    fn ask_patiently(&mut self, ask: &Ask) -> Reply {
        match self.send(SMALL, ALICE, ask) {
            Got::Reply(reply) => reply,
            Got::Parked => {
                let mut replies = self.wait();
                let (_, reply) = replies.pop().unwrap();
                assert!(replies.is_empty(), "more replies than one: {replies:?}");
                reply
            }
            other => panic!("{other:?} instead of a reply"),
        }
    }

    fn dropped(&mut self, nic: NicId, from: u8, ask: &Ask) -> Dropped {
        match self.send(nic, from, ask) {
            Got::Dropped(why) => why,
            other => panic!("{other:?} instead of a drop"),
        }
    }

    fn write(&mut self, lba: u64, data: &[u8]) {
        let reply = self.ask(&Ask::write(lba, data));
        assert_eq!(registers(&reply), (0x40, 0, 0));
    }

    /// Lets time pass, and what is due be done; replies stay where they are.
    fn pass_time(&mut self, time: Duration) {
        self.now += time;
        self.target.advance(self.now);
        while self.target.has_work() {
            self.target.advance(self.now);
        }
    }

    /// Lets time pass until nothing is left to be done.
    fn settle(&mut self) {
        for _ in 0..1000 {
            self.target.advance(self.now);
            match self.target.deadline() {
                Some(at) => self.now = self.now.max(at),
                None if self.target.has_work() => {}
                None => return,
            }
        }
        panic!("the disk never has it all");
    }

    /// What the export is: its bytes on the disk when all that was acknowledged
    /// is there.
    fn bytes(&mut self) -> Vec<u8> {
        self.settle();
        self.on_disk()
    }

    /// The export's bytes on the disk now.
    fn on_disk(&self) -> Vec<u8> {
        let bytes = self.medium.file.bytes();
        assert!(
            bytes[..START].iter().all(|b| *b == 0x5A),
            "below the window"
        );
        bytes[START..].to_vec()
    }

    /// The export's bytes that a loss of power would leave.
    fn stable(&self) -> Vec<u8> {
        self.medium.stable.lock().unwrap()[START..].to_vec()
    }

    fn state_directory(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// Jobs are kept until they are let pass.
    fn shut(&self) {
        self.desk.borrow_mut().shut = true;
    }

    /// Jobs end at once again, and those that were kept do now.
    fn open(&self) {
        let mut desk = self.desk.borrow_mut();
        desk.shut = false;
        while desk.pass(|_| true) {}
    }

    /// Lets the first job of a kind end; there must be one.
    fn pass(&self, wanted: impl Fn(&Job) -> bool) {
        let kept = self.desk.borrow_mut().pass(wanted);
        assert!(kept, "no such job waits");
    }

    /// What is in the state's file.
    fn saved(&self) -> Option<WireState> {
        let text = self.state_file.load().unwrap();
        text.map(|text| WireState::from_text(&text).unwrap())
    }

    /// Holds a reply against the rules for every reply, and every byte of it
    /// against what it may be made of.
    fn check(&self, nic: NicId, request: &[u8], reply: &Reply) {
        let breaches = reply.breaches(request, SHELF, SLOT);
        assert!(breaches.is_empty(), "{}", breaches.join("\n"));
        let Some(Some(info)) = self.target.nics.get(usize::from(nic.0)) else {
            panic!("a reply through a NIC that is gone");
        };
        let bytes = reply.bytes();
        assert_eq!(bytes[6..12], info.mac.0, "not from its NIC: {reply:?}");
        assert!(bytes.len() <= frame_max(info.mtu), "too long: {reply:?}");
        let mut end = meaningful(request, reply);
        let asker = MacAddr(request[6..12].try_into().unwrap());
        let data = request[14] >> 4 == 1 && request[19] == 0 && end > 60;
        if data && request[27] != 0xB0 && self.target.sessions.extensions(nic, asker).crc8x4 {
            let count = ((end - 36) / 512) as u8;
            assert!(reply.crc_matches(count), "wrong or no sum: {reply:?}");
            end += 4;
        }
        // aoeping wants room for a sector in every answer to SMART.
        let smart = request[14] >> 4 == 1 && request[19] == 0 && request[27] == 0xB0;
        let least = if smart { 36 + 512 } else { 60 };
        assert_eq!(bytes.len(), end.max(least), "{reply:?}");
        let padding = &bytes[end..];
        assert!(padding.iter().all(|b| *b == 0), "stale bytes: {bytes:02x?}");
        if reply.command() == 0 && reply.version() == 1 && request[14] >> 4 == 1 {
            assert_eq!(bytes[24], request[24], "aflags");
            let smart_status = request[27] == 0xB0 && request[25] == 0xDA;
            if !smart_status {
                assert_eq!(bytes[28..36], request[28..36], "LBA or reserved bytes");
            }
        }
    }
}

/// How a NIC of the bench is.
fn nic(id: NicId) -> NicInfo {
    NicInfo {
        mac: host(1 + id.0 as u8),
        mtu: if id == SMALL { 1500 } else { 9000 },
        loopback: false,
    }
}

/// How long a reply is before it is padded.
fn meaningful(request: &[u8], reply: &Reply) -> usize {
    let bytes = reply.bytes();
    if request[14] >> 4 != 1 {
        return 24;
    }
    match request[19] {
        0 => {
            let good = reply.error().is_none() && bytes[27] & 1 == 0;
            match request[27] {
                0x20 | 0x24 | 0x25 | 0xC8 if good => 36 + 512 * usize::from(request[26]),
                0xEC if good => 36 + 512,
                0xB0 if good && request[25] == 0xD0 => 36 + 512,
                _ => 36,
            }
        }
        1 => 32 + usize::from(u16::from_be_bytes([bytes[30], bytes[31]])),
        2 if bytes[26] == 0 => 28 + 8 * usize::from(bytes[27]),
        2 => 28,
        3 => 26 + 6 * usize::from(bytes[25]),
        _ => request.len().min(bytes.len()),
    }
}

/// Status, error and sectors left of an ATA reply that is no AoE error.
fn registers(reply: &Reply) -> (u8, u8, u8) {
    assert_eq!(reply.error(), None, "{reply:?}");
    let ata = reply.ata().unwrap();
    (ata.status, ata.error, ata.count)
}

/// Asserts that bytes are as they should be, and names the first that is not.
#[track_caller]
fn same(got: &[u8], expected: &[u8]) {
    let at = got.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(at) = at {
        let (got, expected) = (got[at], expected[at]);
        panic!("byte {at} is {got:#04x} instead of {expected:#04x}");
    }
    assert_eq!(got.len(), expected.len(), "bytes in all");
}

/// A sector's worth of a byte, so many times.
fn sectors(fill: u8, count: usize) -> Vec<u8> {
    vec![fill; count * 512]
}
