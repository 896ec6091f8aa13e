//! What a freeze keeps still, and what a start makes of what a process or the
//! power has left: the real code of store and recovery, on the disk of the model.

use super::*;
use crate::store::arena::OldArena;
use crate::store::disk::Step;
use crate::store::recover::bring;
use crate::store::shadow::{Place, ShadowOptions, ShadowStore, find};
use shadow::trial::Fate as Kept;
use shadow::{Chunk, Found, Geometry, Map, Paths, State};

/// What a freeze must leave in the image.
#[derive(Clone, Debug)]
pub struct Still {
    /// Of which freeze.
    generation: u64,
    /// Of each sector the part of its history that may be there: what was
    /// acknowledged before the cut is, what was asked for after it is not.
    from: Vec<usize>,
    to: Vec<usize>,
    /// The image once it is still.
    bytes: Option<Vec<u8>>,
}

/// What a start has made of a disk.
pub struct Recovered {
    pub store: ShadowStore<TrialPlace>,
    pub left: Option<LeftShadow>,
}

fn options() -> ShadowOptions {
    ShadowOptions {
        path: Some(shadow_path().to_owned()),
        state_dir: "/state".into(),
        discard: false,
        accept: false,
        export: "e1.1".into(),
    }
}

/// A start: the order of `server::open`, but that the arena stays as it is.
pub fn start(medium: &Medium, arena: Option<&Path>) -> Result<Recovered, String> {
    let place = TrialPlace(medium.disk.clone());
    let options = options();
    let mut found = find(place.clone(), medium, &options).map_err(|e| e.to_string())?;
    if let Some(path) = arena {
        let old = OldArena::look(path).map_err(|e| e.to_string())?;
        let image = Medium {
            // Where any sectors may be written.
            align: 1,
            ..medium.on(&medium.disk)
        };
        let plain = |at, bytes: &[u8]| image.write_at(bytes, at);
        bring(&old, &image, found.as_mut(), || Ok(()), plain).map_err(|e| e.to_string())?;
    }
    let image = Arc::new(medium.clone());
    let (store, left) = ShadowStore::with(place, image, shadow_path(), &options, found)
        .map_err(|e| e.to_string())?;
    Ok(Recovered { store, left })
}

/// What is read of the export.
fn seen(medium: &Medium) -> Vec<u8> {
    let place = TrialPlace(medium.disk.clone());
    let paths = Paths::of(shadow_path());
    let image = &medium.file;
    let start = window_start(medium.align);
    let mut seen = vec![0; (SECTORS * 512) as usize];
    match place.find(&paths).unwrap().files.first() {
        Some(name) => {
            let shadow = place.open(name.path(&paths)).unwrap();
            shadow.read(image, start, &mut seen).unwrap();
        }
        None => image.read_at(&mut seen, start).unwrap(),
    }
    seen
}

impl World {
    /// Holds the image against what a freeze promises; `acked` is what was
    /// acknowledged before the last step.
    pub fn watch_freeze(&mut self, acked: Vec<usize>) {
        let generation = self.volume.cache.generation();
        let known = self.still.as_ref().map_or(0, |still| still.generation);
        if generation != known {
            // The cut was in this step.
            let to = self.model.history.iter().map(Vec::len).collect();
            self.still = Some(Still {
                generation,
                from: acked,
                to,
                bytes: None,
            });
        }
        let names = TrialPlace(self.medium.disk.clone())
            .find(&Paths::of(shadow_path()))
            .unwrap();
        if !names.files.contains(&Found::Plain) {
            return;
        }
        let image = self.medium.live();
        if self
            .still
            .as_ref()
            .is_some_and(|still| still.bytes.is_none())
        {
            self.check_still(&image, true);
        }
        let Some(still) = &mut self.still else { return };
        let bytes = still.bytes.get_or_insert_with(|| image.clone());
        assert!(*bytes == image, "the image moves while it is frozen");
    }

    /// The image of a freeze has nothing that was asked for after it, and `whole`
    /// all that was acknowledged before it.
    fn check_still(&self, image: &[u8], whole: bool) {
        let Some(still) = &self.still else { return };
        for sector in 0..SECTORS as usize {
            let at = self.start as usize + sector * 512;
            let value = value_of(&image[at..at + 512]);
            let from = if whole { still.from[sector] } else { 0 };
            let may = &self.model.history[sector][from..still.to[sector]];
            assert!(
                may.contains(&value),
                "sector {sector} is {value}, not of {may:?}"
            );
        }
    }

    pub fn left_in_arena(&self) -> u64 {
        match &self.arena {
            Some(path) => OldArena::look(path).unwrap().sectors(),
            None => 0,
        }
    }

    /// What a start after a kill at this instant would find.
    pub fn check_kill(&self) {
        let disk = self.medium.disk.copy();
        self.check_kill_of(&disk, self.arena.as_deref(), &self.model.acked);
    }

    fn check_kill_of(&self, disk: &trial::Disk, arena: Option<&Path>, acked: &[usize]) {
        let medium = self.medium.on(disk);
        // A start that is killed as well, and the next one.
        let lot = self.fate.borrow_mut().draw();
        if lot % 4 == 0 {
            disk.cut_at(disk.operations() + (lot / 4) as u64 % 40);
            let _ = start(&medium, arena);
        }
        let medium = self.medium.on(&disk.copy());
        let recovered = start(&medium, arena).expect("a start after a kill");
        self.check_frozen(&medium, recovered.left, true);
        for (sector, bytes) in seen(&medium).chunks(512).enumerate() {
            let from = acked[sector];
            self.model.check("after a kill", sector as u64, bytes, from);
        }
        let below = &medium.live()[..self.start as usize];
        assert!(below.iter().all(|b| *b == 0), "below the window");
    }

    /// What may be found after the power is cut at this instant.
    pub fn check_cut(&self) {
        self.check_cut_of(&self.medium.disk, &self.model.flushed);
    }

    fn check_cut_of(&self, disk: &trial::Disk, flushed: &[usize]) {
        let (lot, seed) = {
            let mut fate = self.fate.borrow_mut();
            (fate.draw(), fate.draw() as u64)
        };
        let kept = match lot % 8 {
            0 => Kept::Lost,
            1 => Kept::Kept,
            _ => Kept::Torn(seed),
        };
        let mut disk = disk.restart(kept);
        if lot / 8 % 4 == 0 {
            // And again in the start.
            disk.cut_at((lot / 32) as u64 % 20);
            let _ = start(&self.medium.on(&disk), None);
            disk = disk.restart(Kept::Torn(seed + 1));
        }
        let medium = self.medium.on(&disk);
        let recovered = start(&medium, None).expect("a start after a cut");
        for (sector, bytes) in seen(&medium).chunks(512).enumerate() {
            let from = flushed[sector];
            self.model.check("after a cut", sector as u64, bytes, from);
        }
        self.check_frozen(&medium, recovered.left, false);
    }

    /// What says that it is frozen has the image of that freeze.
    fn check_frozen(&self, medium: &Medium, left: Option<LeftShadow>, whole: bool) {
        let left = left.filter(|left| left.state != State::Thawing);
        let still = self.still.as_ref();
        if left.is_some_and(|left| still.is_some_and(|s| s.generation == left.generation)) {
            self.check_still(&medium.live(), whole);
        }
    }

    /// Looks at what a job has left in its middle; `acked` and `flushed` are of
    /// before the step.
    pub fn check_look(&mut self, acked: &[usize], flushed: &[usize]) {
        let Some(Look { disk, arena }) = self.fate.borrow_mut().look.take() else {
            return;
        };
        let path = self.dir.path().join("look");
        if let Some(bytes) = &arena {
            std::fs::write(&path, bytes).unwrap();
        }
        self.check_cut_of(&disk, flushed);
        self.check_kill_of(&disk, arena.map(|_| path.as_path()), acked);
    }

    /// Dies here, and starts again.
    pub fn kill(&mut self) {
        self.medium.disk.fail_none();
        // A start syncs the image before it is served.
        self.medium.file.sync().unwrap();
        let recovered = start(&self.medium, self.arena.as_deref()).expect("a start");
        // Nobody is told of what was under way, which was done or not.
        for asked in &mut self.model.asked {
            *asked = None;
        }
        if let Some(path) = &self.arena {
            std::fs::remove_file(path).unwrap();
        }
        self.volume = World::volume(
            &self.medium,
            recovered,
            &self.fate,
            self.now,
            self.arena.as_deref(),
            self.build,
        );
        self.watch_freeze(self.model.acked.clone());
    }

    /// `true` if nothing is left of any freeze.
    pub fn is_thawed(&self) -> bool {
        let place = TrialPlace(self.medium.disk.clone());
        let names = place.find(&Paths::of(shadow_path())).unwrap();
        names.files.is_empty() && names.markers.is_empty() && records(&self.medium.disk).is_empty()
    }
}

/// A process that saw a sync fail has left bits that reads show and the disk does
/// not have.
#[test]
fn a_start_brings_the_bits_that_it_reads_to_stable_storage() {
    let medium = Medium::new(1);
    let geometry = Geometry::new(4096, window_start(1), SECTORS * 512).unwrap();
    let store = start(&medium, None).unwrap().store;
    let create = Step::Create {
        uuid: [7; 16],
        generation: 1,
        geometry,
        reserve: 0,
    };
    for step in [create, Step::Appear] {
        store.step(&step).unwrap();
    }
    let chunks = [(geometry.first_chunk(), Chunk::Zero)];
    for page in Map::new(geometry, [7; 16]).plan(chunks).pages {
        store.write_at(&page.bytes, page.offset).unwrap();
    }
    drop(store);
    let present = |disk: &trial::Disk| {
        let left = start(&medium.on(disk), None).unwrap().left.unwrap();
        left.map.present()
    };
    assert_eq!(present(&medium.disk), 1);
    assert_eq!(present(&medium.disk.restart(Kept::Lost)), 1);
}
