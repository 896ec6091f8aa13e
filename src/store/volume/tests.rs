//! The volume against a model that keeps the history of every sector: under
//! disks that end jobs in any order and fail, processes that are killed, and
//! power that is cut.

use super::*;
use crate::freeze::Order;
use crate::store::arena::{Arena, ImageId};
use crate::store::disk::{Backing, Segment};
use crate::store::fair::Initiator;
use proptest::prelude::*;
use shadow::BlockFile;
use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Mutex;

mod bad_sectors;
mod freezing;
mod limits;
mod slow;

const SECTORS: u64 = 96;
const BYTES: usize = 4096 + (SECTORS * 512) as usize;

/// Where the window begins: where the disk takes any sector, not on a block's
/// boundary, so that blocks reach over both ends.
fn window_start(align: usize) -> u64 {
    if align == 1 { 3 * 512 } else { 4096 }
}

fn initiator(last: u8) -> Initiator {
    Initiator::new(0, [2, 0, 0, 0, 0, last])
}

fn options(direct: bool, align: usize) -> VolumeOptions {
    VolumeOptions {
        export: "e1.1".into(),
        image: "disk.img".into(),
        align,
        direct,
        write_through: false,
        request_max: 20 * 512,
        parked_max: 64 * 512,
        max_dirty_age: Duration::from_secs(5),
        idle_flush: Duration::from_secs(1),
        io_patience: Duration::from_secs(10),
        read_ahead: 0,
        write_depth: 4,
        merge_share: 25,
        shadow_full: WhenFull::Thaw,
        hold_max: Duration::from_secs(120),
        freeze_max: Duration::ZERO,
    }
}

/// A file whose writes are only safe after a sync.
#[derive(Debug)]
struct PowerFile {
    power: Mutex<Power>,
    /// Takes only whole blocks of so many bytes.
    align: usize,
    bad: Mutex<Bad>,
}

/// Sectors, by their numbers in the file, that cannot be read or written.
#[derive(Debug, Default)]
struct Bad {
    /// Whatever is written.
    hard: Vec<u64>,
    /// Until the whole block of 4096 bytes is written, as one that the disk
    /// cannot read to change a part of it.
    soft: Vec<u64>,
}

impl Bad {
    /// Whether these bytes can be read.
    fn reads(&self, offset: u64, len: usize) -> bool {
        let range = offset / 512..(offset + len as u64).div_ceil(512);
        !self
            .hard
            .iter()
            .chain(&self.soft)
            .any(|bad| range.contains(bad))
    }

    /// Whether these bytes can be written; a soft sector is well afterwards.
    fn writes(&mut self, offset: u64, len: usize) -> bool {
        let range = offset / 512..(offset + len as u64) / 512;
        let whole =
            |bad: &u64| range.contains(&(bad / 8 * 8)) && range.contains(&(bad / 8 * 8 + 7));
        self.soft.retain(|bad| !whole(bad));
        let mut bad = self.hard.iter().chain(&self.soft);
        !bad.any(|bad| range.contains(bad))
    }
}

#[derive(Debug)]
struct Power {
    /// What a process sees.
    live: Vec<u8>,
    /// What is on stable storage for certain.
    durable: Vec<u8>,
    /// Sectors written since, each of which a cut may have kept or not.
    pending: Vec<(usize, Vec<u8>)>,
}

impl PowerFile {
    fn new(align: usize) -> PowerFile {
        PowerFile::holding(vec![0; BYTES], align)
    }

    /// One that holds this, on stable storage.
    fn holding(bytes: Vec<u8>, align: usize) -> PowerFile {
        let power = Power {
            live: bytes.clone(),
            durable: bytes,
            pending: Vec::new(),
        };
        PowerFile {
            power: Mutex::new(power),
            align,
            bad: Mutex::default(),
        }
    }

    fn check(&self, offset: u64, len: usize) {
        let align = self.align;
        assert!(
            offset as usize % align == 0 && len % align == 0,
            "{len} at {offset}"
        );
    }

    /// What a process sees.
    fn live(&self) -> Vec<u8> {
        self.power.lock().unwrap().live.clone()
    }

    /// What a cut of the power may leave.
    fn after_cut(&self, fate: &mut Fate) -> Vec<u8> {
        let power = self.power.lock().unwrap();
        let mut bytes = power.durable.clone();
        for (at, sector) in &power.pending {
            if fate.draw() % 2 == 0 {
                bytes[*at..*at + 512].copy_from_slice(sector);
            }
        }
        bytes
    }

    /// A sync that fails forgets what it could not write, as Linux does: the
    /// pages are clean afterwards.
    fn fail_sync(&self) {
        self.power.lock().unwrap().pending.clear();
    }
}

impl BlockFile for PowerFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let at = offset as usize;
        self.check(offset, buf.len());
        if !self.bad.lock().unwrap().reads(offset, buf.len()) {
            return Err(io::Error::other("a bad sector"));
        }
        buf.copy_from_slice(&self.power.lock().unwrap().live[at..at + buf.len()]);
        Ok(())
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, data.len());
        if !self.bad.lock().unwrap().writes(offset, data.len()) {
            return Err(io::Error::other("a bad sector"));
        }
        let mut power = self.power.lock().unwrap();
        let at = offset as usize;
        power.live[at..at + data.len()].copy_from_slice(data);
        for (n, sector) in data.chunks(512).enumerate() {
            power.pending.push((at + n * 512, sector.to_vec()));
        }
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        let mut power = self.power.lock().unwrap();
        for (at, sector) in std::mem::take(&mut power.pending) {
            power.durable[at..at + 512].copy_from_slice(&sector);
        }
        Ok(())
    }
}

impl Backing for PowerFile {
    fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.read_at(buf, offset).is_ok()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bad.lock().unwrap().soft.clear();
        self.write_at(&vec![0; len as usize], offset)
    }
    fn align(&self) -> usize {
        self.align
    }
}

/// What the disk is told to do next, from outside.
#[derive(Debug)]
struct Fate {
    seed: u64,
    /// Of 256 jobs so many fail.
    failing: u8,
    /// Whether reads are answered from memory.
    now: bool,
}

impl Fate {
    fn draw(&mut self) -> usize {
        self.seed = self
            .seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.seed >> 33) as usize
    }
}

/// A disk that ends the jobs under way in an order drawn by lot.
struct Lots {
    file: Arc<PowerFile>,
    /// Does what is done, instead of the file.
    pair: Option<Arc<freezing::Pair>>,
    jobs: Vec<(JobId, Job)>,
    fate: Rc<RefCell<Fate>>,
}

impl Disk for Lots {
    fn submit(&mut self, id: JobId, job: Job) {
        self.jobs.push((id, job));
    }
    fn reap(&mut self) -> Option<Done> {
        let mut fate = self.fate.borrow_mut();
        if self.jobs.is_empty() || fate.draw() % 4 == 0 {
            return None;
        }
        let (id, job) = self.jobs.swap_remove(fate.draw() % self.jobs.len());
        let fails = fate.draw() % 256 < usize::from(fate.failing);
        if !fails {
            return Some(match &self.pair {
                Some(pair) => job.run(id, &**pair),
                None => job.run(id, &*self.file),
            });
        }
        let kind = match &job {
            Job::Write(segments) => {
                // A part of it may have got there.
                if let Some(Segment { at, pieces }) = segments.first() {
                    let part = self.file.align.max(512).min(pieces[0].len());
                    let _ = self.file.write_at(&pieces[0][..part], *at);
                }
                JobKind::Write
            }
            Job::Sync => {
                self.file.fail_sync();
                JobKind::Sync
            }
            Job::Commit { data_first, pages } => {
                if *data_first && fate.draw() % 2 == 0 {
                    self.file.fail_sync();
                } else {
                    if *data_first {
                        self.file.sync().unwrap();
                    }
                    for page in pages {
                        let part = &page.bytes[..fate.draw() % 9 * 512];
                        self.file.write_at(part, page.offset).unwrap();
                    }
                    if fate.draw() % 2 == 0 {
                        self.file.fail_sync();
                    }
                }
                JobKind::Sync
            }
            Job::Step(_) => JobKind::Step,
            Job::Discard(_) | Job::Try { .. } => JobKind::Write,
            _ => JobKind::Read,
        };
        let source = io::Error::other("by lot");
        let error = DiskError {
            kind,
            name: "lots".into(),
            offset: None,
            parts: Vec::new(),
            source,
        };
        Some(Done {
            id,
            data: None,
            result: Err(error),
        })
    }
    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.fate.borrow().now && self.file.read_now(buf, offset)
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn has_done(&mut self) -> bool {
        false
    }
}

/// A request that has not ended.
#[derive(Debug)]
enum Asked {
    /// Which sectors, and of each how far its history had been acknowledged.
    Read(Extent, Vec<usize>),
    /// The place of this write in the histories of its sectors.
    Write(Vec<(u64, usize)>),
    /// How far each sector's history had been acknowledged.
    Flush(Vec<usize>),
}

struct Model {
    /// The values each sector was given, in order; a value is a number that
    /// fills it.
    history: Vec<Vec<u64>>,
    /// How far each history is acknowledged.
    acked: Vec<usize>,
    /// How far each history must be on stable storage.
    flushed: Vec<usize>,
    asked: Vec<Option<Asked>>,
    next: u64,
}

fn fill(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(64)
}

fn value_of(sector: &[u8]) -> u64 {
    let value = u64::from_le_bytes(sector[..8].try_into().unwrap());
    assert_eq!(sector, fill(value), "a torn sector");
    value
}

impl Model {
    fn new() -> Model {
        let n = SECTORS as usize;
        Model {
            history: vec![vec![0]; n],
            acked: vec![0; n],
            flushed: vec![0; n],
            asked: Vec::new(),
            next: 1,
        }
    }

    fn token(&mut self, asked: Asked) -> Token {
        self.asked.push(Some(asked));
        Token(self.asked.len() as u32 - 1)
    }

    fn sectors(extent: Extent) -> std::ops::Range<u64> {
        extent.start().0..extent.end().0
    }

    /// A write of a new value (or zeros) to these sectors: its data.
    fn write(&mut self, extents: &[Extent], zero: bool) -> (Token, Vec<u8>) {
        let (mut data, mut places) = (Vec::new(), Vec::new());
        for sector in extents.iter().flat_map(|e| Model::sectors(*e)) {
            let value = if zero { 0 } else { self.next };
            self.next += 1;
            let history = &mut self.history[sector as usize];
            history.push(value);
            places.push((sector, history.len() - 1));
            data.extend(fill(value));
        }
        (self.token(Asked::Write(places)), data)
    }

    /// A refused write never happened.
    fn unwrite(&mut self, token: Token) {
        let Some(Asked::Write(places)) = self.asked[token.0 as usize].take() else {
            panic!()
        };
        for (sector, place) in places {
            assert_eq!(self.history[sector as usize].len() - 1, place);
            self.history[sector as usize].pop();
        }
    }

    fn check(&self, what: &str, sector: u64, bytes: &[u8], from: usize) {
        let value = value_of(bytes);
        let history = &self.history[sector as usize];
        assert!(
            history[from..].contains(&value),
            "{what}: sector {sector} is {value}, not one of {:?}",
            &history[from..]
        );
    }

    fn ended(&mut self, token: Token, data: Option<&[u8]>, ok: bool) {
        match self.asked[token.0 as usize].take().expect("ended twice") {
            Asked::Read(extent, from) => {
                let Some(data) = data else {
                    assert!(!ok);
                    return;
                };
                assert_eq!(data.len() as u64, extent.byte_len());
                for ((sector, bytes), from) in
                    Model::sectors(extent).zip(data.chunks(512)).zip(from)
                {
                    self.check("read", sector, bytes, from);
                }
            }
            Asked::Write(places) => {
                for (sector, place) in places {
                    let acked = &mut self.acked[sector as usize];
                    // A failed write may have happened or not.
                    *acked = if ok { (*acked).max(place) } else { *acked };
                }
            }
            Asked::Flush(acked) if ok => {
                for (flushed, acked) in self.flushed.iter_mut().zip(acked) {
                    *flushed = (*flushed).max(acked);
                }
            }
            Asked::Flush(_) => {}
        }
    }
}

fn arena(path: &Path, slots: u32, start: u64) -> Arena {
    let image = ImageId {
        start,
        len: SECTORS * 512,
        ..ImageId::default()
    };
    Arena::create(path, [1, 1], &image, 4096, slots).unwrap()
}

struct World {
    volume: Volume,
    file: Arc<PowerFile>,
    pair: Arc<freezing::Pair>,
    /// What the freeze keeps still.
    still: Option<freezing::Still>,
    direct: bool,
    align: usize,
    slots: u32,
    fate: Rc<RefCell<Fate>>,
    model: Model,
    now: Instant,
    dir: tempfile::TempDir,
    start: u64,
}

impl World {
    fn new(seed: u64, slots: u32, direct: bool, align: usize, failing: u8) -> World {
        let start = window_start(align);
        let dir = tempfile::tempdir().unwrap();
        let file = Arc::new(PowerFile::new(align));
        let fate = Rc::new(RefCell::new(Fate {
            seed,
            failing,
            now: !direct,
        }));
        let pair = Arc::new(freezing::Pair::new(Arc::clone(&file), start));
        let now = Instant::now();
        let parts = (&file, &pair, &fate);
        let volume = World::volume(parts, now, dir.path(), start, (slots, direct, align), None);
        World {
            volume,
            file,
            pair,
            still: None,
            direct,
            align,
            slots,
            fate,
            model: Model::new(),
            now,
            dir,
            start,
        }
    }

    fn volume(
        (file, pair, fate): (&Arc<PowerFile>, &Arc<freezing::Pair>, &Rc<RefCell<Fate>>),
        now: Instant,
        dir: &Path,
        start: u64,
        (slots, direct, align): (u32, bool, usize),
        left: Option<LeftShadow>,
    ) -> Volume {
        let lots = |file: &Arc<PowerFile>, pair| {
            Box::new(Lots {
                file: Arc::clone(file),
                pair,
                jobs: Vec::new(),
                fate: Rc::clone(fate),
            })
        };
        let cache = Cache::new(
            arena(&dir.join("arena"), slots, start),
            align,
            slots * 3 / 4,
        );
        let bounds = Bounds {
            start,
            sectors: SECTORS,
        };
        let side = ShadowSide {
            disk: lots(&pair.file, Some(Arc::clone(pair))),
            limit: None,
            name: "shadow".into(),
            left,
        };
        let disk = lots(file, None);
        Volume::new(now, disk, cache, bounds, options(direct, align)).with_shadow(side)
    }

    fn advance(&mut self) {
        let before = self.model.acked.clone();
        self.volume.advance(self.now);
        self.watch_freeze(before);
        while let Some(done) = self.volume.next_completed() {
            self.model.ended(done.token, done.data.as_deref(), done.ok);
            if let Some(Body::Buf(slice)) = done.data {
                self.volume.recycle(slice.buf);
            }
        }
    }

    fn step(&mut self, op: u8, start: u64, count: u64) {
        let extent = Extent::new(Lba(start), count.min(SECTORS - start)).unwrap();
        let host = initiator((start + count) as u8 % 3);
        match op {
            0..=4 => {
                let from = Model::sectors(extent)
                    .map(|s| self.model.acked[s as usize])
                    .collect();
                let token = self.model.token(Asked::Read(extent, from));
                match self
                    .volume
                    .read(self.now, || Some(token), initiator(1), extent)
                {
                    Ok(Read::Ready(body)) => self.model.ended(token, Some(&body), true),
                    Ok(Read::Parked) => {}
                    Err(_) => self.model.asked[token.0 as usize] = None,
                }
            }
            5..=11 => {
                let (token, data) = self.model.write(&[extent], false);
                match self.volume.write(
                    self.now,
                    || Some(token),
                    initiator(2),
                    extent,
                    &data,
                    op > 9,
                ) {
                    Ok(Write::Done) => self.model.ended(token, None, true),
                    Ok(Write::Parked) => {}
                    Err(_) => self.model.unwrite(token),
                }
            }
            12 => {
                // Some have a second range, which may be next to the first.
                let at = extent.end().0 + count % 3;
                let more = Extent::new(Lba(at), count).filter(|e| e.end().0 <= SECTORS);
                let more = more.filter(|_| start % 2 == 0);
                let extents: Vec<_> = more.into_iter().chain([extent]).collect();
                let (token, _) = self.model.write(&extents, true);
                if self
                    .volume
                    .discard(self.now, || Some(token), host, &extents, false)
                    .is_err()
                {
                    self.model.unwrite(token);
                }
            }
            13 => {
                let acked = self.model.acked.clone();
                let token = self.model.token(Asked::Flush(acked));
                self.volume.flush(self.now, || Some(token)).unwrap();
            }
            17 => {
                let _ = self.volume.order(self.now, Order::Freeze, [7; 16]);
            }
            18 => {
                let _ = self.volume.order(self.now, Order::Thaw, [7; 16]);
            }
            19 if count == 1 => self.kill(),
            20 => self.damage(start, count, false),
            21 if count < 8 => self.damage(start, count, true),
            21 => self.repair(),
            14 => self.now += Duration::from_millis(count * 150),
            _ => {
                for _ in 0..count {
                    self.advance();
                }
            }
        }
        if op % 3 == 0 {
            self.advance();
        }
    }

    /// Makes sectors bad.
    fn damage(&mut self, start: u64, count: u64, hard: bool) {
        let first = self.start / 512 + start;
        let end = first + count.min(SECTORS - start).min(3);
        let mut bad = self.file.bad.lock().unwrap();
        let list = if hard { &mut bad.hard } else { &mut bad.soft };
        list.extend(first..end);
    }

    /// Makes all sectors good.
    fn repair(&mut self) {
        *self.file.bad.lock().unwrap() = Bad::default();
    }

    /// Goes on without failures until nothing is under way.
    fn settle(&mut self) {
        self.fate.borrow_mut().failing = 0;
        self.repair();
        self.volume.drain();
        for _ in 0..100_000 {
            self.advance();
            if self.volume.is_idle() {
                return;
            }
            if let Some(deadline) = self.volume.deadline() {
                self.now = self.now.max(deadline);
            }
        }
        panic!("never idle: {:?}", self.volume.freezing.stage);
    }
}

fn operations() -> impl Strategy<Value = Vec<(u8, u64, u64)>> {
    proptest::collection::vec((0u8..22, 0u64..SECTORS, 1u64..21), 1..250)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn nothing_acknowledged_is_ever_lost(ops in operations(), seed: u64, slots in 6u32..40,
                                         direct: bool, align in 0usize..3, failing in 0u8..3) {
        let failing = [0, 12, 80][usize::from(failing)];
        let mut world = World::new(seed, slots, direct || align > 0, [1, 1024, 4096][align], failing);
        live(&mut world, ops);
    }

    /// The same where every other request is a discard, of few sectors, so that
    /// discards, writes and reads of several hosts overlap and pass each other.
    #[test]
    fn discards_keep_their_order_with_what_overlaps_them(
        ops in proptest::collection::vec((0usize..24, 0u64..SECTORS, 1u64..21), 1..200),
        seed: u64, slots in 6u32..40, direct: bool, align in 0usize..3
    ) {
        let align = [1, 1024, 4096][align];
        let mut world = World::new(seed, slots, direct || align > 1, align, 0);
        const OPS: [u8; 24] = [
            0, 1, 5, 5, 6, 8, 8, 10, 12, 12, 12, 12, 12, 12, 12, 12, 13, 15, 15, 15, 14, 17, 18, 19,
        ];
        let ops = ops.into_iter().map(|(op, start, count)| (OPS[op], start, count));
        live(&mut world, ops.collect());
    }
}

/// Lets hosts do all this, with a look after every few steps at what a kill and a
/// power cut would leave, until everything has ended and is on stable storage.
fn live(world: &mut World, ops: Vec<(u8, u64, u64)>) {
    let failing = world.fate.borrow().failing;
    for (n, (op, start, count)) in ops.into_iter().enumerate() {
        // A discard that a failed sync took back is not done again: what
        // it may bring back was there before it.
        let op = if failing > 0 && op == 12 { 13 } else { op };
        world.step(op, start, count);
        if n % 8 == 0 {
            world.check_kill();
            world.check_cut();
        }
    }
    world.check_kill();
    world.check_cut();
    world.settle();
    world.check_kill();
    let open: Vec<_> = world.model.asked.iter().flatten().collect();
    assert!(open.is_empty(), "never answered: {open:?}");
    world.model.flushed.clone_from(&world.model.acked);
    world.check_cut();
    assert_eq!(world.pair.name(), freezing::Name::None);
    assert_eq!(world.left_in_arena(), 0);
}

#[test]
fn a_large_buffer_comes_back_to_the_large_ones() {
    let mut volume = World::new(0, 8, true, 1, 0).volume;
    let buf = volume.big_bufs.take().unwrap();
    volume.recycle(buf);
    assert_eq!((volume.bufs.free.len(), volume.big_bufs.free.len()), (0, 1));
}

#[test]
fn what_lies_behind_the_new_end_of_an_image_is_dropped_and_degrades_nothing() {
    let mut world = World::new(7, 40, true, 1, 0);
    // The disk became smaller already, and takes nothing behind sector 50.
    let first = world.start / 512;
    let behind = first + 50..first + SECTORS;
    world.file.bad.lock().unwrap().hard.extend(behind);
    world.step(5, 10, 1);
    world.step(5, 60, 3);
    let began = world.now;
    while world.now - began < world.volume.options.max_dirty_age {
        for _ in 0..50 {
            world.advance();
        }
        world.now += Duration::from_millis(100);
    }
    assert!(!world.volume.is_well());
    let bounds = Bounds {
        start: world.start,
        sectors: 50,
    };
    world.volume.resize(world.now, bounds);
    world.volume.drain();
    for _ in 0..1000 {
        world.advance();
    }
    assert!(world.volume.is_idle() && world.volume.is_well());
    let bytes = world.file.live();
    let sector = |n: u64| value_of(&bytes[(world.start + n * 512) as usize..][..512]);
    assert_eq!(sector(10), world.model.history[10][1]);
    assert_eq!([60, 61, 62].map(sector), [0, 0, 0]);
    assert_eq!(world.left_in_arena(), 0);
}
