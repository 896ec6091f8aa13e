//! Bringing the arenas of an image to it, after all of them were checked.

use std::io;
use std::path::{Path, PathBuf};

use shadow::stamp::Clocks;
use shadow::{BlockFile, SECTOR, Verdict};
use shadow::{Paths, paths};

use super::super::arena::{ArenaTrouble, ImageId, OldArena, content};
use super::super::image::{Image, SideLock};
use super::super::shadow::{FoundShadow, Place, Unaligned};
use super::changed::{Change, Seen};
use super::error::Discarded;
use super::record::{Left, tell_all};
use super::removal::{discard, discard_aside, remove, remove_replayed, set_aside};
use super::runs::{Piece, Writer, is_bad_sector};
use super::{Doubtful, RecoverError, RecoverTrouble};
use crate::sys::lock::patiently;
use crate::text::count;

/// Acknowledged sectors that the image does not take. They go on as dirty blocks
/// of the new cache.
#[derive(Debug, Default)]
pub struct Unreplayed {
    /// Offset in the image, and the bytes; no two share a sector.
    pub pieces: Vec<Piece>,
    /// The arenas that hold them until then.
    pub(super) arenas: Vec<(OldArena, Left)>,
}

impl Unreplayed {
    /// Takes the old arenas away: the new one has what they held.
    pub fn settle(self) -> Result<(), RecoverError> {
        for (mut old, left) in self.arenas {
            remove_replayed(&mut old, &left)?;
        }
        Ok(())
    }
}

/// What a start finds of its own image.
pub(super) struct Recovery<'a> {
    pub export: &'a str,
    pub image: &'a Image,
    pub shadow: Option<&'a mut FoundShadow>,
    pub id: ImageId,
    pub boot: [u64; 2],
    pub doubt: &'a Doubtful,
    /// The operator gives the shadow up.
    pub discard_shadow: bool,
    pub seen: Seen,
    /// The arenas of the image, of all exported ranges.
    pub peers: Vec<PathBuf>,
    /// Bytes that may be carried into the new cache.
    pub room: u64,
}

/// An arena that can be replayed.
struct Checked<'a> {
    left: Left,
    old: OldArena,
    /// What of its range is not ours.
    _lock: SideLock<'a>,
}

impl<'a> Recovery<'a> {
    /// Brings what the arenas of our range hold to the image, and takes them
    /// away.
    pub fn recover(&mut self, ours: Vec<Left>) -> Result<Unreplayed, RecoverError> {
        let (mut checked, mut given_up) = (Vec::new(), Vec::new());
        for left in ours {
            let fail = |why| RecoverError {
                path: left.arena.clone(),
                why,
            };
            match self.check(left.clone()) {
                Ok(found) => checked.extend(found),
                Err(why)
                    if self.doubt.discards(&left.arena) && why.discarded() != Discarded::Not =>
                {
                    given_up.push((why.discarded(), left));
                }
                Err(why) => return Err(fail(why)),
            }
        }
        for (how, left) in given_up {
            match how {
                Discarded::SetAside => discard_aside(self.export, &left)?,
                _ => discard(self.export, &left)?,
            }
        }
        let mut unreplayed = Unreplayed::default();
        for Checked { left, old, _lock } in checked {
            let fail = |why| RecoverError {
                path: left.arena.clone(),
                why,
            };
            let before = unreplayed.pieces.clone();
            match self.replay(&old, &left.arena, &mut unreplayed.pieces) {
                Ok(()) => {}
                Err(why)
                    if self.doubt.discards(&left.arena)
                        && why.discarded() == Discarded::SetAside =>
                {
                    unreplayed.pieces = before;
                    discard_aside(self.export, &left)?;
                    continue;
                }
                Err(why) => return Err(fail(why)),
            }
            unreplayed.arenas.push((old, left));
            if unreplayed.pieces.is_empty() {
                std::mem::take(&mut unreplayed).settle()?;
            }
        }
        for (at, bytes) in &unreplayed.pieces {
            log::error!(
                "{}: image {}: {} from image sector {} on cannot be written; acknowledged, they stay in \
                 the cache, are tried again, and a host may write them anew",
                self.export,
                self.image.path().display(),
                count(bytes.len() as u64 / SECTOR, "sector"),
                at / SECTOR
            );
        }
        Ok(unreplayed)
    }

    /// Checks one arena, and changes nothing but what is certainly over: `None`
    /// if there is nothing to replay in it.
    fn check(&self, left: Left) -> Result<Option<Checked<'a>>, RecoverTrouble> {
        if left.boot != self.boot {
            set_aside(self.export, &left).map_err(|e| e.why)?;
            return Ok(None);
        }
        if !left.arena.exists() {
            return Err(RecoverTrouble::Gone);
        }
        // Another start may hold it for a moment to look at it.
        let is_held = |e: &ArenaTrouble| matches!(e, ArenaTrouble::InUse);
        let old = patiently(|| OldArena::open(&left.arena), is_held).map_err(|e| match e {
            ArenaTrouble::InUse => RecoverTrouble::InUse,
            e => RecoverTrouble::Arena(e),
        })?;
        let is_replayed = self.doubt.replays(&left.arena);
        if old.head.origin.compare(&self.id, true) != Verdict::Same && !is_replayed {
            return Err(RecoverTrouble::OtherImage);
        }
        if old.head.boot != self.boot {
            log::warn!(
                "{}: arena {} is of another boot and passed over; it held {}",
                self.export,
                left.arena.display(),
                count(old.sectors(), "sector")
            );
        }
        if old.head.boot == self.boot {
            self.has_its_shadow(&old)?;
        }
        if old.head.boot != self.boot || old.sectors() == 0 {
            remove(&left).map_err(|e| e.why)?;
            return Ok(None);
        }
        let size = self.image.bytes().map_err(RecoverTrouble::Replay)?;
        if old.end() > size {
            return Err(RecoverTrouble::Shrunk);
        }
        if !is_replayed {
            self.judge(&old, &left.arena)?;
        }
        if self.image.is_read_only() {
            return Err(RecoverTrouble::ReadOnly);
        }
        // Nobody else may serve a part of what we write.
        let lock = self
            .image
            .lock_besides(old.head.start, old.head.len)
            .map_err(|_| RecoverTrouble::InUse)?;
        Ok(Some(Checked {
            left,
            old,
            _lock: lock,
        }))
    }

    /// Refuses an image that is frozen without its shadow, which has what was written
    /// since: some of it may be in the arena, and belongs there.
    fn has_its_shadow(&self, old: &OldArena) -> Result<(), RecoverTrouble> {
        let Some(note) = old.head.shadow else {
            return Ok(());
        };
        if self.shadow.as_ref().map(|shadow| shadow.uuid()) == Some(note.uuid) {
            return Ok(());
        }
        let path = note.path();
        let is_there = |path: &PathBuf| {
            let found = paths::find(&Paths::of(path));
            found.is_ok_and(|names| !names.files.is_empty())
        };
        match self.discard_shadow && !path.as_ref().is_some_and(is_there) {
            true => Ok(()),
            false => Err(RecoverTrouble::Frozen(path)),
        }
    }

    /// Refuses an image that someone else has changed.
    fn judge(&self, old: &OldArena, path: &Path) -> Result<(), RecoverTrouble> {
        match self.image.stamp().map_err(RecoverTrouble::Replay)? {
            Some(now) => match self.seen.judge(&now) {
                Change::None => {}
                Change::Touched => log::warn!(
                    "{}: arena {}: name, owner or permissions of the image were changed after the \
                     target died, but not its content; replayed",
                    self.export,
                    path.display()
                ),
                Change::Foreign => return Err(RecoverTrouble::Changed),
            },
            // A device: what was not written must be as it was.
            None => {
                let mut bytes = vec![0; content::PIECE as usize];
                for (at, _, sum) in old.content() {
                    let read = self.image.read_unaligned(&mut bytes, at);
                    if read.is_ok() && content::sum(&bytes) != sum {
                        return Err(RecoverTrouble::Changed);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes all that counts to the image, and syncs it. May be killed anywhere
    /// and done again: the arena stays as it is until then. What single sectors
    /// do not take is added to `unreplayed`.
    fn replay(
        &mut self,
        old: &OldArena,
        path: &Path,
        unreplayed: &mut Vec<Piece>,
    ) -> Result<(), RecoverTrouble> {
        let (image, shadow) = (self.image, &mut self.shadow);
        let (place, fail) = match shadow {
            Some(_) => (
                "the image and its shadow",
                RecoverTrouble::ReplayFrozen as fn(io::Error) -> _,
            ),
            None => ("the image", RecoverTrouble::Replay as fn(io::Error) -> _),
        };
        // A change of the image is ours from here on.
        let note = || old.note_replay(Clocks::now());
        let mut writer = Writer::new(image, unreplayed, self.room);
        let plain = |at, bytes: &[u8]| writer.write(at, bytes);
        let below = Unaligned(image);
        let mut brought = bring(old, &below, shadow.as_deref_mut(), note, plain);
        if shadow.is_none() && matches!(&brought, Err(e) if is_bad_sector(e)) {
            let runs: Vec<_> = old.runs().map(|(_, at, bytes)| (at, bytes)).collect();
            brought = writer.write_apart(&runs, note).and_then(|()| image.sync());
        }
        if let Some(sectors) = writer.too_many() {
            return Err(RecoverTrouble::TooManyBad(sectors));
        }
        brought.map_err(fail)?;
        let done = old.sectors() - writer.bad();
        if let Some(stamp) = image.stamp().map_err(fail)? {
            tell_all(self.export, self.peers.iter().map(PathBuf::as_path), &stamp);
        }
        log::warn!(
            "{}: a target of this image died: {} ({} KiB) brought to {place} from {}",
            self.export,
            count(done, "acknowledged sector"),
            done * SECTOR / 1024,
            path.display()
        );
        Ok(())
    }
}

/// Brings all that counts in an arena to image and shadow, on stable storage.
/// `note` is called before each write; without a shadow `plain` writes.
pub(in crate::store) fn bring<P: Place>(
    old: &OldArena,
    image: &dyn BlockFile,
    mut shadow: Option<&mut FoundShadow<P>>,
    mut note: impl FnMut() -> io::Result<()>,
    mut plain: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    old.replay(|generation, at, bytes| {
        note()?;
        match &mut shadow {
            Some(shadow) => shadow.replay(image, generation, at, bytes),
            None => plain(at, bytes),
        }
    })?;
    // What a merge has brought to the image is there before its bits go.
    if !shadow::fault!("replay-not-synced") {
        image.sync()?;
    }
    match shadow {
        Some(shadow) => shadow.sync(),
        None => Ok(()),
    }
}
