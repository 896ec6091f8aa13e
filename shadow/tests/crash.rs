//! A crash at every operation of a shadow's life, and in the recovery from it:
//! every sector is old or new, and what was synced is there.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io;

use shadow::trial::{Dice, Disk, Fate, TrialFile};
use shadow::{BlockFile, Facts, Geometry, Identity, Kind, OpenError, SECTOR, Shadow, Spec, State};

/// The window begins and ends within chunks, and its middle lies where the
/// bitmap goes from its first page to the second.
const PAGE_CHUNKS: u64 = 16320;
const SECTORS: u64 = PAGE_CHUNKS * 8 + 8 * 6 + 3;
const START: u64 = 5 * SECTOR;
const IMAGE: u64 = START + SECTORS * SECTOR + 700;
/// The sectors that are written and looked at: both ends and the page boundary.
/// The page begins 5 sectors into the window's first chunk.
const EDGE: u64 = PAGE_CHUNKS * 8 - 5;

fn watched() -> impl Iterator<Item = u64> {
    (0..30)
        .chain(EDGE - 20..EDGE + 20)
        .chain(SECTORS - 20..SECTORS)
}

fn spec() -> Spec {
    Spec {
        uuid: *b"crash test uuid.",
        generation: 3,
        geometry: Geometry::new(4096, START, SECTORS * SECTOR).unwrap(),
        identity: Identity {
            kind: Kind::File,
            a: 5,
            b: 6,
            bytes: IMAGE,
            facts: Facts::default(),
            boot: [0; 2],
        },
    }
}

/// What each sector may show: a number for each write, 0 for zeros.
#[derive(Clone)]
struct Model {
    allowed: std::collections::BTreeMap<u64, Vec<u32>>,
    /// Written since the last sync, by this process.
    fresh: std::collections::BTreeMap<u64, u32>,
    next: u32,
}

impl Model {
    fn new() -> Model {
        Model {
            allowed: watched().map(|s| (s, vec![original(s)])).collect(),
            fresh: Default::default(),
            next: 1,
        }
    }

    fn wrote(&mut self, sector: u64, number: u32) {
        // Zeros too are written in whole sectors; only what is watched counts.
        if let Some(allowed) = self.allowed.get_mut(&sector) {
            allowed.push(number);
            self.fresh.insert(sector, number);
        }
    }

    fn synced(&mut self) {
        for (sector, number) in std::mem::take(&mut self.fresh) {
            self.allowed.insert(sector, vec![number]);
        }
    }
}

fn original(sector: u64) -> u32 {
    0x8000_0000 | sector as u32
}

fn fill(number: u32) -> Vec<u8> {
    number.to_le_bytes().repeat(SECTOR as usize / 4)
}

/// A disk with the image, whose watched sectors have their numbers, and room
/// for the shadow.
fn disk() -> Disk {
    let disk = Disk::new(&[IMAGE, spec().geometry.data_end()]);
    for sector in watched() {
        let at = START + sector * SECTOR;
        disk.file(0).write_at(&fill(original(sector)), at).unwrap();
    }
    disk.file(0).write_at(&[0xEE; 5 * 512], 0).unwrap();
    disk.file(0).write_at(&[0xEE; 700], IMAGE - 700).unwrap();
    disk.file(0).sync().unwrap();
    // Begins to count anew.
    disk.restart(Fate::Kept)
}

fn write(
    model: &mut Model,
    sector: u64,
    count: u64,
    mut f: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let number = model.next;
    model.next += 1;
    let mut data = Vec::new();
    for sector in sector..sector + count {
        model.wrote(sector, number);
        data.extend(fill(number));
    }
    f(START + sector * SECTOR, &data)
}

/// How far a life came, for what is to be expected after it.
#[derive(Clone, Copy, Default)]
struct Came {
    created: bool,
    thaw_begun: bool,
}

/// Some places to write to, among those that are watched.
fn place(dice: &mut Dice) -> (u64, u64) {
    let (from, end) =
        [(0, 30), (EDGE - 20, EDGE + 20), (SECTORS - 20, SECTORS)][dice.roll(3) as usize];
    let sector = from + dice.roll(end - from);
    let count = (1 + dice.roll(12)).min(end - sector);
    (sector, count)
}

/// A whole life: create, write, forget, sync, freeze, write, thaw with writes,
/// merge. Ends at the first error.
fn live(disk: &Disk, seed: u64, model: &mut Model, came: &mut Came) -> io::Result<()> {
    let image = disk.file(0);
    let mut dice = Dice::new(seed);
    let mut shadow = Shadow::create(disk.file(1), &spec())?;
    came.created = true;
    for round in 0..3 {
        for _ in 0..3 {
            let (sector, count) = place(&mut dice);
            write(model, sector, count, |at, data| {
                shadow.write(&image, at, data)
            })?;
        }
        let (sector, count) = place(&mut dice);
        for sector in sector..sector + count {
            model.wrote(sector, 0);
        }
        shadow.forget(&image, START + sector * SECTOR, count * SECTOR)?;
        shadow.sync()?;
        model.synced();
        if round == 1 {
            shadow.set_state(State::Frozen)?;
        }
    }
    // Not synced when the thaw begins.
    write(model, 0, 3, |at, data| shadow.write(&image, at, data))?;
    came.thaw_begun = true;
    shadow.set_state(State::Thawing)?;
    thaw(&mut shadow, &image, model, &mut dice)
}

fn thaw(
    shadow: &mut Shadow<TrialFile>,
    image: &TrialFile,
    model: &mut Model,
    dice: &mut Dice,
) -> io::Result<()> {
    loop {
        for _ in 0..2 {
            let (sector, count) = place(dice);
            write(model, sector, count, |at, data| {
                shadow.write_thawing(image, at, data)
            })?;
        }
        if dice.roll(2) == 0 {
            image.sync()?;
            shadow.sync()?;
            model.synced();
        }
        if shadow.merge(image, 9000)?.left_chunks == 0 {
            image.sync()?;
            model.synced();
            return Ok(());
        }
    }
}

/// Sectors, and the number of the write that each shows.
type Shown = Vec<(u64, u32)>;

/// What the watched sectors show.
fn shown(shadow: &Shadow<TrialFile>, image: &TrialFile, context: &str) -> Shown {
    let number = |sector: u64| {
        let mut bytes = vec![0; SECTOR as usize];
        shadow
            .read(image, START + sector * SECTOR, &mut bytes)
            .unwrap();
        let number = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        assert!(
            bytes == fill(number),
            "{context}: sector {sector} is a mixture"
        );
        (sector, number)
    };
    watched().map(number).collect()
}

fn open(disk: &Disk) -> Result<Shadow<TrialFile>, OpenError> {
    Shadow::open(disk.file(1), spec().geometry.data_end())
}

/// Opens what a crash has left and looks at every sector.
fn recover(
    disk: &Disk,
    model: &Model,
    came: Came,
    context: &str,
) -> Option<(Shadow<TrialFile>, Shown)> {
    let shadow = match open(disk) {
        Ok(shadow) => shadow,
        Err(OpenError::Blank) if !came.created => return None,
        Err(e) => panic!("{context}: {e}"),
    };
    let shown = shown(&shadow, &disk.file(0), context);
    for (sector, number) in &shown {
        let allowed = &model.allowed[sector];
        assert!(
            allowed.contains(number),
            "{context}: sector {sector} is {number:x}, not of {allowed:x?}"
        );
    }
    if !came.thaw_begun {
        // The image is still as it was.
        for sector in watched() {
            let mut bytes = vec![0; SECTOR as usize];
            disk.file(0)
                .read_at(&mut bytes, START + sector * SECTOR)
                .unwrap();
            assert!(bytes == fill(original(sector)), "{context}: image changed");
        }
    }
    Some((shadow, shown))
}

/// The recovery: goes on merging until all is in the image.
fn merge_all(shadow: &mut Shadow<TrialFile>, image: &TrialFile) -> io::Result<()> {
    shadow.confirm()?;
    shadow.set_state(State::Thawing)?;
    while shadow.merge(image, 20_000)?.left_chunks > 0 {}
    Ok(())
}

fn image_shows(disk: &Disk, shown: &[(u64, u32)], context: &str) {
    let image = disk.file(0);
    let mut bytes = vec![0; SECTOR as usize];
    for (sector, number) in shown {
        image.read_at(&mut bytes, START + sector * SECTOR).unwrap();
        assert!(
            bytes == fill(*number),
            "{context}: sector {sector} of the image"
        );
    }
    for (at, len) in [(0, 5 * 512), (IMAGE - 700, 700)] {
        let mut bytes = vec![0; len];
        image.read_at(&mut bytes, at).unwrap();
        assert!(
            bytes.iter().all(|b| *b == 0xEE),
            "{context}: outside of the window"
        );
    }
}

fn fates(seed: u64) -> [Fate; 4] {
    [
        Fate::Lost,
        Fate::Kept,
        Fate::Torn(seed),
        Fate::Torn(seed + 1000),
    ]
}

#[test]
fn a_crash_at_every_operation_loses_nothing() {
    for seed in 0..4 {
        let whole = disk();
        let mut came = Came::default();
        live(&whole, seed, &mut Model::new(), &mut came).unwrap();
        let operations = whole.operations();
        assert!(operations > 50, "{operations}");
        for cut in 0..operations {
            let disk = disk();
            disk.cut_at(cut);
            let (mut model, mut came) = (Model::new(), Came::default());
            assert!(live(&disk, seed, &mut model, &mut came).is_err());
            for fate in fates(seed * 7919 + cut) {
                let context = format!("seed {seed}, cut at {cut}, {fate:?}");
                let after = disk.restart(fate);
                let Some((mut shadow, shown)) = recover(&after, &model, came, &context) else {
                    continue;
                };
                merge_all(&mut shadow, &after.file(0)).unwrap();
                image_shows(&after.restart(Fate::Lost), &shown, &context);
            }
        }
    }
}

#[test]
fn a_crash_in_the_recovery_loses_nothing_either() {
    let seed = 11;
    let whole = disk();
    live(&whole, seed, &mut Model::new(), &mut Came::default()).unwrap();
    for cut in 0..whole.operations() {
        let disk = disk();
        disk.cut_at(cut);
        let (mut model, mut came) = (Model::new(), Came::default());
        let _ = live(&disk, seed, &mut model, &mut came);
        let left = disk.restart(Fate::Torn(cut));
        // Each time later in the recovery, until it comes to its end.
        for again in 0.. {
            let context = format!("cut at {cut}, again at {again}");
            let disk = left.restart(Fate::Lost);
            let Some((mut shadow, shown)) = recover(&disk, &model, came, &context) else {
                break;
            };
            disk.cut_at(disk.operations() + again);
            let merged = merge_all(&mut shadow, &disk.file(0));
            let disk = disk.restart(Fate::Torn(cut * 31 + again));
            let mut shadow = open(&disk).unwrap();
            assert!(
                self::shown(&shadow, &disk.file(0), &context) == shown,
                "{context}"
            );
            merge_all(&mut shadow, &disk.file(0)).unwrap();
            image_shows(&disk.restart(Fate::Lost), &shown, &context);
            if merged.is_ok() {
                break;
            }
        }
    }
}

/// After each error the shadow is opened anew, as a process does that ends and
/// is started again; then the power goes at some later time.
#[test]
fn an_error_at_every_operation_loses_nothing_that_was_synced() {
    let seed = 23;
    let whole = disk();
    live(&whole, seed, &mut Model::new(), &mut Came::default()).unwrap();
    for fail in 0..whole.operations() {
        let (mut model, mut came) = (Model::new(), Came::default());
        let disk = disk();
        disk.fail_at(fail);
        let failed = live(&disk, seed, &mut model, &mut came);
        assert!(failed.is_err(), "fail at {fail}");
        // What was written and not synced is promised by nobody.
        model.fresh.clear();
        for later in (0..60).step_by(3) {
            let disk = disk.copy();
            let (mut model, mut came) = (model.clone(), came);
            let context = format!("failed at {fail}, then cut {later} later");
            let Some((mut shadow, _)) = recover(&disk, &model, came, &context) else {
                break;
            };
            disk.cut_at(disk.operations() + later);
            let went = go_on(&mut shadow, &disk.file(0), &mut model, &mut came, fail);
            let after = disk.restart(Fate::Torn(fail * 61 + later));
            let recovered = recover(&after, &model, came, &context);
            assert!(recovered.is_some() || !came.created, "{context}");
            if went.is_ok() {
                break;
            }
        }
    }
}

fn go_on(
    shadow: &mut Shadow<TrialFile>,
    image: &TrialFile,
    model: &mut Model,
    came: &mut Came,
    seed: u64,
) -> io::Result<()> {
    shadow.confirm()?;
    let mut dice = Dice::new(seed);
    if shadow.state() != State::Thawing {
        for _ in 0..3 {
            let (sector, count) = place(&mut dice);
            write(model, sector, count, |at, data| {
                shadow.write(image, at, data)
            })?;
            shadow.sync()?;
            model.synced();
        }
        came.thaw_begun = true;
        shadow.set_state(State::Thawing)?;
    }
    // A merge in the process before may have left the image not synced.
    image.sync()?;
    thaw(shadow, image, model, &mut dice)
}

/// A process that does not give up: it does again what failed, and opens the
/// shadow anew only where it has to.
struct Stubborn {
    disk: Disk,
    shadow: Shadow<TrialFile>,
    model: Model,
    came: Came,
    dice: Dice,
}

impl Stubborn {
    /// Does something until it succeeds or the power goes.
    fn until_done(
        &mut self,
        mut f: impl FnMut(&mut Shadow<TrialFile>, &TrialFile) -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            let Err(e) = f(&mut self.shadow, &self.disk.file(0)) else {
                return Ok(());
            };
            if self.disk.is_dead() {
                return Err(e);
            }
            if e.to_string().contains("open the shadow anew") {
                self.shadow = open(&self.disk).map_err(io::Error::other)?;
                self.model.fresh.clear();
                self.shadow.confirm()?;
            }
        }
    }

    fn write(&mut self) -> io::Result<()> {
        let (sector, count) = place(&mut self.dice);
        let (mut at, mut data) = (0, Vec::new());
        write(&mut self.model, sector, count, |a, d| {
            (at, data) = (a, d.to_vec());
            Ok(())
        })?;
        self.until_done(|shadow, image| match shadow.state() {
            State::Thawing => shadow.write_thawing(image, at, &data),
            _ => shadow.write(image, at, &data),
        })
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut image_failed = false;
        self.until_done(|shadow, image| {
            if shadow.state() == State::Thawing {
                // What a failed sync of the image has lost, nobody writes again
                // here, so nothing may be promised.
                image_failed |= image.sync().is_err();
            }
            shadow.sync()
        })?;
        if image_failed {
            self.model.fresh.clear();
        }
        self.model.synced();
        Ok(())
    }

    fn live(&mut self) -> io::Result<()> {
        for _ in 0..3 {
            for _ in 0..3 {
                self.write()?;
            }
            self.sync()?;
        }
        self.came.thaw_begun = true;
        self.until_done(|shadow, _| shadow.set_state(State::Thawing))?;
        loop {
            let merged = self.shadow.merge(&self.disk.file(0), 9000);
            if merged
                .as_ref()
                .is_ok_and(|progress| progress.left_chunks == 0)
            {
                return Ok(());
            }
            for _ in 0..3 {
                self.write()?;
            }
            self.sync()?;
        }
    }
}

#[test]
fn who_goes_on_after_an_error_loses_nothing() {
    let begin = |seed| {
        let disk = disk();
        let shadow = Shadow::create(disk.file(1), &spec()).unwrap();
        Stubborn {
            disk,
            shadow,
            model: Model::new(),
            came: Came {
                created: true,
                thaw_begun: false,
            },
            dice: Dice::new(seed),
        }
    };
    for seed in 0..6 {
        let mut whole = begin(seed);
        whole.live().unwrap();
        for fail in 2..whole.disk.operations() {
            for later in [1, 2, 3, 4, 6, 9, 15, 30] {
                let mut life = begin(seed);
                life.disk.fail_at(fail);
                life.disk.cut_at(fail + later);
                let _ = life.live();
                let context = format!("seed {seed}, failed at {fail}, cut {later} later");
                let after = life.disk.restart(Fate::Torn(fail * 61 + later));
                recover(&after, &life.model, life.came, &context).unwrap();
            }
        }
    }
}
