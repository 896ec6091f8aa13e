//! The shadow of an export: its file, under the name of its phase, and the
//! record of it in the state directory.
//!
//! The record is made before the first write that depends on the shadow, and
//! taken away when all is in the image: a start that does not find what a
//! record speaks of must not serve an image that is out of date.

mod error;
mod lock;
mod place;
mod record;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use shadow::{
    BlockFile, Difference, Found, Identity, Paths, RealFiles, Shadow, Spec, State, header_page,
    paths,
};

use super::arena::{NotePlace, ShadowNote};
use super::disk::{Backing, Origin, Part, Step};
use super::image::Image;
use super::volume::LeftShadow;
use crate::sys::buffer::Body;

pub use error::ShadowError;

use lock::open_lock;
use place::RealPlace;
pub use place::{Place, ShadowedImage};
use record::Record;

/// What is asked for of a shadow at a start.
#[derive(Clone, Debug)]
pub struct ShadowOptions {
    /// Its path, if one was given.
    pub path: Option<PathBuf>,
    /// Where records are.
    pub state_dir: PathBuf,
    /// Gives up what a shadow holds.
    pub discard: bool,
    /// The image is the right one for the shadow, also where that is not certain.
    pub accept: bool,
    /// Name of the export in log lines, such as `e1.1`.
    pub export: String,
}

/// A shadow that was found at a start.
pub struct FoundShadow<P: Place = RealPlace> {
    place: P,
    shadow: Shadow<P::File>,
    paths: Paths,
    name: Found,
    export: String,
    /// The image, where it was accepted in doubt.
    accepted: Option<Identity>,
    /// Records in doubt that speak of this shadow.
    in_doubt: Vec<PathBuf>,
}

impl<P: Place> FoundShadow<P> {
    /// Bytes of its chunks.
    pub fn chunk(&self) -> u64 {
        self.shadow.geometry().chunk()
    }

    /// Its own number.
    pub fn uuid(&self) -> [u8; 16] {
        self.shadow.spec().uuid
    }

    /// Takes over what a dead process's cache held, generation by generation,
    /// the older ones first. On stable storage after [`sync`](Self::sync).
    pub fn replay(
        &mut self,
        image: &dyn BlockFile,
        generation: u64,
        at: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        if self.is_thawing() {
            self.begin_thaw()?;
        }
        match replay(&mut self.shadow, image, generation, at, bytes) {
            Err(e) if e.kind() == io::ErrorKind::StorageFull => {
                // For this, room was taken; the volume takes it again.
                let end = self.shadow.geometry().data_end();
                self.place.give_back(self.shadow.file(), end)?;
                replay(&mut self.shadow, image, generation, at, bytes)
            }
            done => done,
        }
    }

    /// `true` if the image may have changed since the shadow was made.
    fn is_thawing(&self) -> bool {
        self.name.state(self.shadow.state()) == State::Thawing
    }

    /// Makes PATH another inode and says in the header what the name does. Before
    /// both are on the disk, the image is not touched.
    fn begin_thaw(&mut self) -> io::Result<()> {
        if self.name != Found::New {
            let uuid = self.shadow.spec().uuid;
            let file = self.shadow.file();
            let unmarked = self.place.begin_thaw(&self.paths, file, &uuid)?;
            warn_unmarked(&self.export, &self.paths, unmarked);
            self.name = Found::Thaw;
        }
        seal(&mut self.shadow)
    }

    /// Brings what was replayed to stable storage; the image is synced already.
    pub fn sync(&mut self) -> io::Result<()> {
        self.shadow.sync()
    }
}

/// What a dead process's cache held belongs to the image, if it is older than
/// the freeze; to the shadow, if it is not; to both as one, if they are being
/// merged.
fn replay<F: BlockFile>(
    shadow: &mut Shadow<F>,
    image: &dyn BlockFile,
    generation: u64,
    at: u64,
    bytes: &[u8],
) -> io::Result<()> {
    if shadow.state() == State::Thawing {
        shadow.write_thawing(image, at, bytes)
    } else if generation >= shadow.spec().generation {
        shadow.write(image, at, bytes)
    } else {
        image.write_at(bytes, at)
    }
}

/// Tells why PATH is not the marker while a shadow is merged.
fn warn_unmarked(export: &str, paths: &Paths, unmarked: Option<io::Error>) {
    if let Some(e) = unmarked {
        log::warn!(
            "{export}: shadow {}: PATH cannot be the marker while it is merged ({e}); do not take \
             its absence for the end of the thaw",
            paths.shadow.display()
        );
    }
}

/// The header says what the name does: it is to be merged.
fn seal<F: BlockFile>(shadow: &mut Shadow<F>) -> io::Result<()> {
    if shadow.state() == State::Thawing {
        return Ok(());
    }
    shadow.set_state(State::Thawing)
}

/// The image for who writes any sectors of it.
pub(super) struct Unaligned<'a>(pub &'a Image);

impl BlockFile for Unaligned<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_unaligned(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_unaligned(data, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// The files of a freeze.
pub struct ShadowStore<P: Place = RealPlace> {
    place: P,
    image: Arc<dyn ShadowedImage>,
    export: String,
    paths: Paths,
    record: Record,
    /// The shadow, while there is one.
    open: RwLock<Option<Arc<P::File>>>,
    /// What is needed to give it its next name and state; steps come one at a
    /// time.
    state: Mutex<Option<Held>>,
    /// Where the arena notes which shadow there is.
    note: Option<NotePlace>,
    /// Held for backups.
    _lock: Option<File>,
}

/// What is known of the shadow's file.
struct Held {
    spec: Spec,
    state: State,
    sequence: u64,
}

/// What a start finds of an image's shadow, before anything is changed. Refuses
/// what it must not pass over.
pub fn find_shadow(
    image: &Image,
    options: &ShadowOptions,
) -> Result<Option<FoundShadow>, ShadowError> {
    find(RealPlace, image, options)
}

pub(super) fn find<P: Place>(
    place: P,
    image: &dyn ShadowedImage,
    options: &ShadowOptions,
) -> Result<Option<FoundShadow<P>>, ShadowError> {
    let given = options.path.as_deref();
    let identity = image.identity();
    let identity = identity.map_err(|e| {
        ShadowError::Record(
            image.path().to_owned(),
            format!("asking what image it is: {e}"),
        )
    })?;
    let record = Record::of(
        place.records(),
        &options.state_dir,
        Path::new(""),
        identity,
        image.window(),
    );
    let told = given.filter(|_| options.discard || options.accept);
    let in_doubt = record.none_beside(place.records(), told)?;
    let recorded = match record.read(place.records()) {
        Err(_) if options.discard => None,
        recorded => recorded?,
    };
    if options.discard {
        if let Some(path) = recorded.as_deref().or(given) {
            let is_recorded = recorded.is_some() || !in_doubt.is_empty();
            discard(&record, path, is_recorded, &in_doubt, &options.export)?;
        }
        return match given {
            Some(path) => place.probe(path).map(|()| None),
            None => Ok(None),
        };
    }
    if let Some(recorded) = &recorded {
        if image.is_read_only() {
            return Err(ShadowError::ReadOnly(recorded.clone()));
        }
        if given != Some(recorded) {
            return Err(ShadowError::NotGiven(recorded.clone()));
        }
    }
    let Some(path) = given else { return Ok(None) };
    let paths = Paths::of(path);
    let found = place
        .find(&paths)
        .map_err(|e| ShadowError::Io(path.to_owned(), "looking for it", e))?;
    let name = match found.files.as_slice() {
        // The marker says under which name the shadow was.
        [] => match found.markers.first() {
            Some((marker, _)) => {
                let other = match marker {
                    Found::Plain => &paths.thaw,
                    _ => &paths.shadow,
                };
                let marker = marker.path(&paths).to_owned();
                return Err(ShadowError::MarkerAlone(marker, other.clone()));
            }
            None if recorded.is_some() || !in_doubt.is_empty() => {
                return Err(ShadowError::Gone(path.to_owned()));
            }
            None => return place.probe(path).map(|()| None),
        },
        [name] => *name,
        [one, other, ..] => {
            return Err(ShadowError::Twice(
                one.path(&paths).to_owned(),
                other.path(&paths).to_owned(),
            ));
        }
    };
    let real = name.path(&paths);
    let mut shadow = place.open(real)?;
    let uuid = shadow.spec().uuid;
    if let Some((marker, _)) = found.markers.iter().find(|(_, of)| *of != uuid) {
        let marker = marker.path(&paths).to_owned();
        return Err(ShadowError::Twice(real.to_owned(), marker));
    }
    let other = |how: String| ShadowError::OtherImage(real.to_owned(), how);
    let made_for = shadow.spec().identity;
    let accepted = match made_for.difference(&identity) {
        Some(doubt @ Difference::Doubt { .. }) => {
            if let Some(size) = made_for.size_difference(&identity) {
                return Err(other(size.to_string()));
            }
            if !options.accept {
                return Err(ShadowError::InDoubt(real.to_owned(), doubt.to_string()));
            }
            log::warn!(
                "{}: shadow {}: accepted (--accept-shadow); {doubt}",
                options.export,
                real.display()
            );
            Some(identity)
        }
        Some(difference) => return Err(other(difference.to_string())),
        None => None,
    };
    let bounds = image.bounds().map_err(other)?;
    let geometry = shadow.geometry();
    if (geometry.start(), geometry.len()) != (bounds.start, bounds.sectors * shadow::SECTOR) {
        return Err(other(format!(
            "it is of {} sectors from sector {}; -o and -l must be as they were",
            geometry.len() / shadow::SECTOR,
            geometry.start() / shadow::SECTOR
        )));
    }
    // Whoever left it may have seen a sync fail.
    let confirmed = match shadow::fault!("shadow-not-confirmed") {
        true => Ok(()),
        false => shadow.confirm(),
    };
    confirmed.map_err(|e| ShadowError::Io(real.to_owned(), "syncing it", e))?;
    Ok(Some(FoundShadow {
        place,
        shadow,
        name,
        export: options.export.clone(),
        paths,
        accepted,
        in_doubt,
    }))
}

/// Sets a shadow aside and removes its record.
fn discard(
    record: &Record,
    path: &Path,
    recorded: bool,
    in_doubt: &[PathBuf],
    export: &str,
) -> Result<(), ShadowError> {
    let paths = Paths::of(path);
    let fail = |what| move |e| ShadowError::Io(path.to_owned(), what, e);
    let found = paths::find(&paths).map_err(fail("looking for it"))?;
    for name in found.files {
        let real = name.path(&paths);
        let held = match paths::open(real) {
            Ok(shadow) => {
                let bytes = shadow.map().present() * shadow.geometry().chunk();
                format!("{} KiB", bytes >> 10)
            }
            // Only what is a shadow, or was: anything may have this name.
            Err(e) if !recorded || !matches!(e.why, paths::Trouble::Open(_)) => {
                return Err(e.into());
            }
            Err(_) => "what cannot be read".into(),
        };
        let mut aside = real.as_os_str().to_owned();
        aside.push(".discarded");
        let aside = Path::new(&aside);
        // Not over what was discarded before.
        paths::rename(real, aside).map_err(fail("moving it aside, to a name with .discarded"))?;
        log::warn!(
            "{export}: shadow {}: {held} set aside (--discard-shadow); it is {} now",
            real.display(),
            aside.display()
        );
    }
    for (name, uuid) in found.markers {
        let removed = paths::remove_marker(name.path(&paths), &uuid);
        removed.map_err(fail("removing its marker"))?;
    }
    record
        .remove_all(&RealFiles, in_doubt)
        .map_err(fail("removing its record"))
}

impl ShadowStore {
    /// What works on image and shadow, and what of it is there already: that
    /// which [`find_shadow`] found, with all replayed that belongs to it.
    pub fn new(
        image: Arc<Image>,
        path: &Path,
        options: &ShadowOptions,
        found: Option<FoundShadow>,
        arena: Option<&Path>,
    ) -> Result<(ShadowStore, Option<LeftShadow>), ShadowError> {
        let (mut store, left) = ShadowStore::with(RealPlace, image, path, options, found)?;
        let fail = |e| ShadowError::Io(path.to_owned(), "noting it in the arena", e);
        store.note = arena.map(NotePlace::open).transpose().map_err(fail)?;
        if let Some(held) = &*store.state.lock() {
            store.note(&held.spec).map_err(fail)?;
        }
        store._lock = open_lock(&options.export, path);
        Ok((store, left))
    }
}

impl<P: Place> ShadowStore<P> {
    pub(super) fn with(
        place: P,
        image: Arc<dyn ShadowedImage>,
        path: &Path,
        options: &ShadowOptions,
        found: Option<FoundShadow<P>>,
    ) -> Result<(ShadowStore<P>, Option<LeftShadow>), ShadowError> {
        let fail = |what| move |e| ShadowError::Io(path.to_owned(), what, e);
        let identity = image.identity();
        let identity = identity.map_err(fail("asking what image it is of"))?;
        let window = image.window();
        let record = Record::of(place.records(), &options.state_dir, path, identity, window);
        let export = options.export.clone();
        let Some(mut found) = found else {
            let store = ShadowStore {
                place,
                image,
                export,
                paths: Paths::of(path),
                record,
                open: RwLock::new(None),
                state: Mutex::new(None),
                note: None,
                _lock: None,
            };
            return Ok((store, None));
        };
        // A shadow that was moved here has no record yet.
        let recorded = record.replace(place.records(), window.1, &found.in_doubt);
        recorded.map_err(fail("recording it"))?;
        if let Some(identity) = found.accepted {
            let noted = found.shadow.set_identity(identity);
            noted.map_err(fail("noting its image"))?;
        }
        if found.is_thawing() {
            found.begin_thaw().map_err(fail("marking it"))?;
        } else {
            if found.name == Found::New {
                // What was written before the freeze is in the image.
                image.sync().map_err(fail("syncing the image"))?;
            }
            let file = found.shadow.file();
            let named = place.appear(&found.paths, file);
            named.map_err(fail("renaming it"))?;
            // 0.1.0 made none. Where it cannot be made, the thaw tries again.
            let uuid = &found.shadow.spec().uuid;
            if let Err(e) = place.make_marker(&found.paths.thaw, uuid) {
                let thaw = found.paths.thaw.display();
                log::warn!("{export}: {thaw}: no marker for the thaw can be made: {e}");
            }
        }
        let paths = found.paths;
        let (file, spec, state, sequence, map) = found.shadow.into_parts();
        let left = LeftShadow {
            state,
            geometry: spec.geometry,
            map,
            generation: spec.generation,
        };
        let held = Held {
            spec,
            state,
            sequence,
        };
        let store = ShadowStore {
            place,
            image,
            export,
            paths,
            record,
            open: RwLock::new(Some(Arc::new(file))),
            state: Mutex::new(Some(held)),
            note: None,
            _lock: None,
        };
        Ok((store, Some(left)))
    }

    /// Notes in the arena which shadow has writes to the image from now on.
    fn note(&self, spec: &Spec) -> io::Result<()> {
        match &self.note {
            Some(place) => place.set(&ShadowNote::new(spec.uuid, &self.paths.shadow)),
            None => Ok(()),
        }
    }

    fn forget_note(&self) -> io::Result<()> {
        self.note.as_ref().map_or(Ok(()), NotePlace::clear)
    }

    fn file(&self) -> io::Result<Arc<P::File>> {
        let open = self.open.read();
        open.clone()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no shadow now"))
    }

    fn create(&self, spec: &Spec, reserve: u64) -> io::Result<()> {
        let shadow = self.place.create(&self.paths, spec);
        let (file, spec, state, sequence, _) = shadow.map_err(io::Error::other)?.into_parts();
        let records = self.place.records();
        let made = self
            .place
            .take(&file, spec.geometry.data_end(), reserve)
            .and_then(|()| file.sync())
            .and_then(|()| self.record.write(records, spec.geometry.len()))
            .and_then(|()| self.note(&spec));
        if let Err(e) = made {
            // The first error is the one to tell.
            let _ = self.record.remove(records);
            let _ = self.forget_note();
            self.place.abandon(&self.paths, &spec.uuid);
            return Err(e);
        }
        *self.open.write() = Some(Arc::new(file));
        *self.state.lock() = Some(Held {
            spec,
            state,
            sequence,
        });
        Ok(())
    }

    /// Makes PATH another inode, and marks the shadow as one to be merged. Before
    /// both are on the disk, the image is not touched.
    fn seal(&self, held: &mut Held) -> io::Result<()> {
        let file = self.file()?;
        let end = held.spec.geometry.data_end();
        self.place.give_back(&file, end)?;
        let unmarked = self.place.begin_thaw(&self.paths, &file, &held.spec.uuid)?;
        warn_unmarked(&self.export, &self.paths, unmarked);
        if held.state != State::Thawing {
            let page = header_page(&held.spec, State::Thawing, held.sequence + 1);
            file.write_at(&page.bytes, page.offset)?;
            if !shadow::fault!("seal-not-synced") {
                file.sync()?;
            }
            held.sequence += 1;
            held.state = State::Thawing;
        }
        Ok(())
    }

    /// Has so much room taken at once as is wanted now.
    fn reserve(&self, held: &Held, bytes: u64) -> io::Result<()> {
        let file = self.file()?;
        let end = held.spec.geometry.data_end();
        if self.place.len(&file)? > end + bytes {
            self.place.give_back(&file, end)?;
        }
        self.place.take(&file, end, bytes)
    }

    fn vanish(&self, slot: &mut Option<Held>) -> io::Result<()> {
        let Some(held) = slot else { return Ok(()) };
        // The record first: a shadow without one is merged to its end, and is
        // empty; a record without a shadow would stop every start.
        self.record.remove(self.place.records())?;
        self.forget_note()?;
        let file = self.file()?;
        self.place.vanish(&self.paths, &file, &held.spec.uuid)?;
        *self.open.write() = None;
        *slot = None;
        Ok(())
    }
}

impl<P: Place> BlockFile for ShadowStore<P> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file()?.read_at(buf, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.file()?.write_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file()?.sync()
    }
}

impl<P: Place> Backing for ShadowStore<P> {
    fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        let open = self.open.read();
        let file = open.as_ref();
        file.is_some_and(|file| self.place.read_now(file, buf, offset))
    }

    fn is_cached(&self, offset: u64, len: u64) -> bool {
        let open = self.open.read();
        let file = open.as_ref();
        file.is_some_and(|file| self.place.is_cached(file, offset, len))
    }

    fn write_pieces(&self, pieces: &[Body], offset: u64) -> io::Result<()> {
        self.place
            .write_pieces(self.file()?.as_ref(), pieces, offset)
    }

    fn push(&self, offset: u64, len: u64) -> io::Result<()> {
        self.place.push(self.file()?.as_ref(), offset, len)
    }

    fn gather(&self, parts: &[Part], buf: &mut [u8]) -> io::Result<()> {
        let mut rest = buf;
        for Part { origin, len } in parts {
            let (piece, behind) = rest.split_at_mut(*len);
            match origin {
                Origin::Image(at) => self.image.read_at(piece, *at)?,
                Origin::Shadow(at) => self.file()?.read_at(piece, *at)?,
                Origin::Zeros => piece.fill(0),
            }
            rest = behind;
        }
        Ok(())
    }

    fn step(&self, step: &Step) -> io::Result<()> {
        let mut state = self.state.lock();
        if let Step::Create {
            uuid,
            generation,
            geometry,
            reserve,
        } = step
        {
            drop(state);
            let spec = Spec {
                uuid: *uuid,
                generation: *generation,
                geometry: *geometry,
                identity: self.image.identity()?,
            };
            return self.create(&spec, *reserve);
        }
        if let Step::Vanish = step {
            return self.vanish(&mut state);
        }
        let Some(held) = state.as_mut() else {
            return Err(io::Error::other("there is no shadow"));
        };
        match step {
            Step::Appear => self.place.appear(&self.paths, self.file()?.as_ref()),
            Step::Seal => self.seal(held),
            Step::Reserve(bytes) => self.reserve(held, *bytes),
            Step::Release => {
                let end = held.spec.geometry.data_end();
                self.place.give_back(self.file()?.as_ref(), end)
            }
            Step::Create { .. } | Step::Vanish => Ok(()),
        }
    }

    fn name(&self) -> String {
        self.paths.shadow.display().to_string()
    }
}
