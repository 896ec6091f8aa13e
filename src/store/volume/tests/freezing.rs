//! The world's shadow: its file and name, what a freeze keeps still, and what a
//! start makes of what a process or the power has left.

use super::*;
use crate::store::arena::OldArena;
use crate::store::disk::{Origin, Part, Step};
use crate::store::shadow::{replay, seal};
use shadow::{Geometry, Identity, Kind, MemoryFile, Shadow, Spec, State, header_page};

/// Which name the shadow has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name {
    None,
    New,
    Plain,
    Thaw,
}

/// Image and shadow.
#[derive(Debug)]
pub struct Pair {
    image: Arc<PowerFile>,
    pub file: Arc<PowerFile>,
    geometry: Geometry,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    name: Name,
    spec: Option<Spec>,
    state: State,
    sequence: u64,
}

impl Pair {
    pub fn new(image: Arc<PowerFile>, start: u64) -> Pair {
        let geometry = Geometry::new(4096, start, SECTORS * 512).unwrap();
        let empty = vec![0; geometry.data_end() as usize];
        Pair {
            image,
            file: Arc::new(PowerFile::holding(empty, 1)),
            geometry,
            held: Mutex::new(Held {
                name: Name::None,
                spec: None,
                state: State::Freezing,
                sequence: 0,
            }),
        }
    }

    pub fn name(&self) -> Name {
        self.held.lock().unwrap().name
    }

    fn header(&self, held: &mut Held, state: State) {
        held.sequence += 1;
        held.state = state;
        let page = header_page(&held.spec.unwrap(), state, held.sequence);
        self.file.write_at(&page.bytes, page.offset).unwrap();
        self.file.sync().unwrap();
    }
}

impl BlockFile for Pair {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(data, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

impl Backing for Pair {
    fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.read_at(buf, offset).is_ok()
    }
    fn gather(&self, parts: &[Part], buf: &mut [u8]) -> io::Result<()> {
        assert_ne!(self.name(), Name::None, "a read of a shadow that is gone");
        let mut rest = buf;
        for Part { origin, len } in parts {
            let (piece, behind) = rest.split_at_mut(*len);
            match origin {
                Origin::Image(at) => self.image.read_at(piece, *at)?,
                Origin::Shadow(at) => self.file.read_at(piece, *at)?,
                Origin::Zeros => piece.fill(0),
            }
            rest = behind;
        }
        Ok(())
    }
    fn step(&self, step: &Step) -> io::Result<()> {
        let mut held = self.held.lock().unwrap();
        match step {
            Step::Create {
                uuid,
                generation,
                geometry,
                ..
            } => {
                assert_eq!((held.name, *geometry), (Name::None, self.geometry));
                let empty = vec![0; geometry.data_end() as usize];
                *self.file.power.lock().unwrap() = Power {
                    live: empty.clone(),
                    durable: empty,
                    pending: Vec::new(),
                };
                held.spec = Some(Spec {
                    uuid: *uuid,
                    generation: *generation,
                    geometry: *geometry,
                    identity: Identity {
                        kind: Kind::File,
                        a: 1,
                        b: 2,
                        bytes: BYTES as u64,
                        facts: shadow::Facts::default(),
                    },
                });
                held.sequence = 0;
                self.header(&mut held, State::Freezing);
                held.name = Name::New;
            }
            Step::Appear => {
                assert_eq!(held.name, Name::New);
                held.name = Name::Plain;
            }
            Step::Seal => {
                if held.name == Name::Plain {
                    held.name = Name::Thaw;
                }
                self.header(&mut held, State::Thawing);
            }
            Step::Reserve(_) | Step::Release => {}
            Step::Vanish => held.name = Name::None,
        }
        Ok(())
    }
}

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
        let held = self.pair.held.lock().unwrap();
        if held.name != Name::Plain || held.state == State::Thawing {
            return;
        }
        let image = self.file.live();
        let Some(still) = &mut self.still else { return };
        let first = still.bytes.is_none();
        let bytes = still.bytes.get_or_insert_with(|| image.clone());
        assert!(*bytes == image, "the image moves while it is frozen");
        for sector in (0..SECTORS as usize).filter(|_| first) {
            let at = self.start as usize + sector * 512;
            let value = value_of(&image[at..at + 512]);
            let range = still.from[sector]..still.to[sector];
            let may = &self.model.history[sector][range];
            assert!(
                may.contains(&value),
                "sector {sector} is {value}, not of {may:?}"
            );
        }
    }

    pub fn left_in_arena(&self) -> u64 {
        OldArena::look(&self.dir.path().join("arena"))
            .unwrap()
            .sectors()
    }

    /// What a start makes of an image and a shadow: what is read then, and the
    /// shadow. With `arena`, what the cache held is there still.
    fn recovered(
        &self,
        image: Vec<u8>,
        file: Vec<u8>,
        arena: bool,
    ) -> (Vec<u8>, Vec<u8>, Option<Shadow<MemoryFile>>) {
        let image = MemoryFile::new(image);
        let held = self.pair.held.lock().unwrap();
        let len = file.len() as u64;
        let mut shadow = (held.name != Name::None)
            .then(|| Shadow::open(MemoryFile::new(file), len).expect("the shadow opens"));
        if arena {
            let old = OldArena::look(&self.dir.path().join("arena")).unwrap();
            if let Some(shadow) = shadow.as_mut().filter(|_| held.name == Name::Thaw) {
                seal(shadow).unwrap();
            }
            old.replay(|generation, at, bytes| match &mut shadow {
                Some(shadow) => replay(shadow, &image, generation, at, bytes),
                None => image.write_at(bytes, at),
            })
            .unwrap();
            if let Some(shadow) = &mut shadow {
                shadow.sync().unwrap();
            }
        }
        let mut seen = vec![0; (SECTORS * 512) as usize];
        match &shadow {
            Some(shadow) => shadow.read(&image, self.start, &mut seen).unwrap(),
            None => image.read_at(&mut seen, self.start).unwrap(),
        }
        (seen, image.bytes(), shadow)
    }

    /// What a start after a kill at this instant would find.
    pub fn check_kill(&self) {
        let (seen, image, _) = self.recovered(self.file.live(), self.pair.file.live(), true);
        for (sector, bytes) in seen.chunks(512).enumerate() {
            let from = self.model.acked[sector];
            self.model.check("after a kill", sector as u64, bytes, from);
        }
        let below = &image[..self.start as usize];
        assert!(below.iter().all(|b| *b == 0), "below the window");
    }

    /// What may be found after the power is cut at this instant.
    pub fn check_cut(&self) {
        let fate = &mut *self.fate.borrow_mut();
        let (image, file) = (self.file.after_cut(fate), self.pair.file.after_cut(fate));
        let (seen, ..) = self.recovered(image, file, false);
        for (sector, bytes) in seen.chunks(512).enumerate() {
            let from = self.model.flushed[sector];
            self.model.check("after a cut", sector as u64, bytes, from);
        }
    }

    /// Dies here, and starts again.
    pub fn kill(&mut self) {
        let (_, image, shadow) = self.recovered(self.file.live(), self.pair.file.live(), true);
        // All of it is synced before the arena goes.
        *self.file.power.lock().unwrap() = Power {
            live: image.clone(),
            durable: image,
            pending: Vec::new(),
        };
        let mut left = None;
        if let Some(shadow) = shadow {
            let (file, spec, state, sequence, map) = shadow.into_parts();
            let mut held = self.pair.held.lock().unwrap();
            *self.pair.file.power.lock().unwrap() = Power {
                live: file.bytes(),
                durable: file.bytes(),
                pending: Vec::new(),
            };
            (held.state, held.sequence) = (state, sequence);
            if held.name == Name::Thaw {
                self.pair.header(&mut held, State::Thawing);
            }
            if held.name == Name::New && held.state != State::Thawing {
                held.name = Name::Plain;
            }
            left = Some(LeftShadow {
                state: held.state,
                geometry: spec.geometry,
                map,
                generation: spec.generation,
            });
        }
        // Nobody is told of what was under way, which was done or not.
        for asked in &mut self.model.asked {
            *asked = None;
        }
        std::fs::remove_file(self.dir.path().join("arena")).unwrap();
        let parts = (&self.file, &self.pair, &self.fate);
        let kind = (self.slots, self.direct, self.align);
        self.volume = World::volume(parts, self.now, self.dir.path(), self.start, kind, left);
        self.watch_freeze(self.model.acked.clone());
    }
}
