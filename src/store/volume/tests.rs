//! The volume against a model that keeps the history of every sector: under
//! disks that end jobs in any order and fail, processes that are killed, and
//! power that is cut.

use super::*;
use crate::freeze::Order;
use crate::store::arena::{Arena, ImageId};
use crate::store::disk::Backing;
use crate::store::fair::Initiator;
use proptest::prelude::*;
use shadow::{BlockFile, trial};
use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Mutex;

mod again;
mod bad_sectors;
mod freezing;
mod limits;
mod medium;
mod meetings;
mod slow;

use freezing::Recovered;
use medium::{Bad, Fate, Look, Lots, Medium, TrialPlace, records, shadow_path};

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

/// A request that has not ended.
#[derive(Debug)]
enum Asked {
    /// Which sectors, and of each how far its history had been acknowledged.
    Read(Extent, Vec<usize>),
    /// The place of this write in the histories of its sectors, and `true` if it
    /// ends on stable storage.
    Write(Vec<(u64, usize)>, bool),
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
    fn write(&mut self, extents: &[Extent], zero: bool, durable: bool) -> (Token, Vec<u8>) {
        let (mut data, mut places) = (Vec::new(), Vec::new());
        for sector in extents.iter().flat_map(|e| Model::sectors(*e)) {
            let value = if zero { 0 } else { self.next };
            self.next += 1;
            let history = &mut self.history[sector as usize];
            history.push(value);
            places.push((sector, history.len() - 1));
            data.extend(fill(value));
        }
        (self.token(Asked::Write(places, durable)), data)
    }

    /// A refused write never happened.
    fn unwrite(&mut self, token: Token) {
        let Some(Asked::Write(places, _)) = self.asked[token.0 as usize].take() else {
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
            // A failed write may have happened or not.
            Asked::Write(places, durable) => {
                for (sector, place) in places.into_iter().filter(|_| ok) {
                    let acked = &mut self.acked[sector as usize];
                    *acked = (*acked).max(place);
                    if durable {
                        let flushed = &mut self.flushed[sector as usize];
                        *flushed = (*flushed).max(place);
                    }
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

/// What a volume is made of.
#[derive(Clone, Copy, Debug)]
struct Build {
    slots: u32,
    direct: bool,
    align: usize,
    write_through: bool,
}

struct World {
    volume: Volume,
    medium: Medium,
    /// What the freeze keeps still.
    still: Option<freezing::Still>,
    build: Build,
    /// The arena's file, where the cache survives the process.
    arena: Option<PathBuf>,
    fate: Rc<RefCell<Fate>>,
    model: Model,
    now: Instant,
    dir: tempfile::TempDir,
    start: u64,
}

impl World {
    fn new(seed: u64, slots: u32, direct: bool, align: usize, failing: u8) -> World {
        let build = Build {
            slots,
            direct,
            align,
            write_through: false,
        };
        World::of(build, seed, failing)
    }

    fn of(build: Build, seed: u64, failing: u8) -> World {
        let dir = tempfile::tempdir().unwrap();
        let arena = (!build.write_through).then(|| dir.path().join("arena"));
        let medium = Medium::new(build.align);
        let fate = Rc::new(RefCell::new(Fate {
            seed,
            failing,
            sync_fails: false,
            held: |_| false,
            now: !build.direct,
            hold_reads: false,
            looks: true,
            look: None,
        }));
        let now = Instant::now();
        let recovered = freezing::start(&medium, None).unwrap();
        let volume = World::volume(&medium, recovered, &fate, now, arena.as_deref(), build);
        World {
            volume,
            medium,
            still: None,
            build,
            arena,
            fate,
            model: Model::new(),
            now,
            dir,
            start: window_start(build.align),
        }
    }

    fn volume(
        medium: &Medium,
        recovered: Recovered,
        fate: &Rc<RefCell<Fate>>,
        now: Instant,
        arena: Option<&Path>,
        build: Build,
    ) -> Volume {
        let Build { slots, align, .. } = build;
        let start = window_start(align);
        let lots = |backing: Arc<dyn Backing>| {
            Box::new(Lots {
                disk: medium.disk.clone(),
                backing,
                jobs: Vec::new(),
                ended: Vec::new(),
                fate: Rc::clone(fate),
                arena: arena.map(Path::to_owned),
            })
        };
        let memory = match arena {
            Some(path) => self::arena(path, slots, start),
            None => Arena::anonymous(4096, slots).unwrap(),
        };
        let cache = Cache::new(memory, align, slots * 3 / 4);
        let bounds = Bounds {
            start,
            sectors: SECTORS,
        };
        let side = ShadowSide {
            disk: lots(Arc::new(recovered.store)),
            limit: None,
            name: "shadow".into(),
            left: recovered.left,
        };
        let disk = lots(Arc::new(medium.clone()));
        let options = VolumeOptions {
            write_through: build.write_through,
            ..options(build.direct, align)
        };
        Volume::new(now, disk, cache, bounds, options).with_shadow(side)
    }

    fn advance(&mut self) {
        let (acked, flushed) = (self.model.acked.clone(), self.model.flushed.clone());
        self.volume.advance(self.now);
        self.check_look(&acked, &flushed);
        self.watch_freeze(acked);
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
                let durable = op > 9;
                let (token, data) = self.model.write(&[extent], false, durable);
                match self.volume.write(
                    self.now,
                    || Some(token),
                    initiator(2),
                    extent,
                    &data,
                    durable,
                ) {
                    Ok(Write::Done) => self.model.ended(token, None, true),
                    Ok(Write::Parked) => {}
                    Err(_) => self.model.unwrite(token),
                }
            }
            12 => {
                let durable = count % 4 == 0;
                // Some have a second range, which may be next to the first.
                let at = extent.end().0 + count % 3;
                let more = Extent::new(Lba(at), count).filter(|e| e.end().0 <= SECTORS);
                let more = more.filter(|_| start % 2 == 0);
                let extents: Vec<_> = more.into_iter().chain([extent]).collect();
                let (token, _) = self.model.write(&extents, true, durable);
                if self
                    .volume
                    .discard(self.now, || Some(token), host, &extents, durable)
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
                let _ = {
                    let uuid = self.model.next.to_le_bytes();
                    let uuid = [uuid, uuid].concat().try_into().unwrap();
                    self.volume.order(self.now, Order::Freeze, uuid)
                };
            }
            18 => {
                let _ = self.volume.order(self.now, Order::Thaw, [7; 16]);
            }
            19 if count <= 3 => self.kill(),
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
        let mut bad = self.medium.bad.lock().unwrap();
        let list = if hard { &mut bad.hard } else { &mut bad.soft };
        list.extend(first..end);
    }

    /// Makes all sectors good.
    fn repair(&mut self) {
        *self.medium.bad.lock().unwrap() = Bad::default();
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

/// A seed, and what happens. Some places are used more than others, so that
/// requests meet.
fn operations() -> impl Strategy<Value = Vec<(u8, u64, u64)>> {
    let place = prop_oneof![0u64..24, 0u64..SECTORS];
    proptest::collection::vec((0u8..22, place, 1u64..21), 1..250)
}

/// Few slots, so that blocks are driven out, and direct I/O, so that reads fill
/// the cache, are the rule.
fn builds() -> impl Strategy<Value = Build> {
    let slots = prop_oneof![2 => 6u32..10, 1 => 10u32..40];
    let kind = prop_oneof![1 => Just((false, 1)), 2 => Just((true, 1)), 1 => Just((true, 1024)), 1 => Just((true, 4096))];
    let write_through = prop::bool::weighted(0.3);
    (slots, kind, write_through).prop_map(|(slots, (direct, align), write_through)| Build {
        slots,
        direct,
        align,
        write_through,
    })
}

/// So many cases, times what the environment says.
fn cases(cases: u32) -> ProptestConfig {
    let factor = std::env::var("AOEDE_TEST_FACTOR").ok();
    let factor = factor.map_or(1, |factor| factor.parse().expect("a number"));
    ProptestConfig {
        cases: cases * factor,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn nothing_acknowledged_is_ever_lost(ops in operations(), seed: u64, build in builds(),
                                         failing in 0u8..3) {
        let failing = [0, 12, 80][usize::from(failing)];
        let mut world = World::of(build, seed, failing);
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
        // Nobody knows of what a failed sync has lost once the process is dead
        // that had it in its memory.
        let in_memory = world.build.write_through || world.volume.may_miss_discards();
        let lost = failing > 0 && in_memory;
        let op = if lost && op == 19 { 13 } else { op };
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
    assert!(world.is_thawed());
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
    world.medium.bad.lock().unwrap().hard.extend(behind);
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
    let bytes = world.medium.live();
    let sector = |n: u64| value_of(&bytes[(world.start + n * 512) as usize..][..512]);
    assert_eq!(sector(10), world.model.history[10][1]);
    assert_eq!([60, 61, 62].map(sector), [0, 0, 0]);
    assert_eq!(world.left_in_arena(), 0);
}
