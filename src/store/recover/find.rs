//! Arenas that are there: of our image, of another one, or in doubt.

use std::fs;
use std::path::Path;

use shadow::{Facts, Verdict};

use super::super::arena::{Head, ImageId, OldArena};
use super::super::image::Image;
use super::doubt::InDoubt;
use super::record::{ARENA, Left};
use super::{ArenaOptions, RecoverError, RecoverTrouble};
use crate::text::count;

/// Adds the arenas in these directories that no record speaks of.
pub(super) fn orphans(export: &str, directories: &[&Path], found: &mut Vec<Left>) {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    for directory in directories {
        let files = fs::read_dir(directory).into_iter().flatten().flatten();
        for path in files.map(|entry| entry.path()) {
            let is_arena = path.to_string_lossy().ends_with(ARENA);
            let is_known = |left: &Left| real(&left.arena) == real(&path);
            if !is_arena || found.iter().any(is_known) {
                continue;
            }
            match Head::read(&path) {
                Ok(head) => found.push(Left::orphan(path, &head)),
                // Nobody has told of it, and it is nothing that we know.
                Err(e) => log::warn!("{export}: arena {}: {e}; it is passed over", path.display()),
            }
        }
    }
}

/// The arenas that concern a start.
pub(super) struct Sorted {
    /// Of our image and exported range.
    pub ours: Vec<Left>,
    /// Of other ranges of our image.
    pub peers: Vec<Left>,
    /// In doubt, to be set aside as the operator said.
    pub given_up: Vec<Left>,
}

/// Finds the arenas of our image. Names those whose image is nowhere, and refuses
/// those in doubt.
pub(super) fn sort(
    found: Vec<Left>,
    image: &Image,
    id: &ImageId,
    boot: [u64; 2],
    options: &ArenaOptions,
) -> Result<Sorted, RecoverError> {
    let (mut ours, mut peers, mut in_doubt) = (Vec::new(), Vec::new(), Vec::new());
    let path = fs::canonicalize(image.path()).unwrap_or_else(|_| image.path().to_owned());
    for path in options.doubt.unmatched(&found) {
        log::warn!(
            "{}: {} was named for --replay-arena or --discard-arena, and is none of the arenas \
             that there are; check the path, or leave the option out",
            options.export,
            path.display()
        );
    }
    for left in found {
        let same_boot = left.boot == boot;
        let mut verdict = left.origin.compare(id, same_boot);
        let has_our_path = left.image.as_deref() == Some(&path) && !image.is_device();
        if verdict == Verdict::Other && has_our_path && same_boot {
            verdict = Verdict::Doubt("another file was put in its place");
        }
        match verdict {
            Verdict::Same if left.overlaps(id) => ours.push(left),
            Verdict::Same => peers.push(left),
            // Not left by anyone: its process serves another image.
            Verdict::Doubt(_) if Head::is_live(&left.arena) => {}
            Verdict::Doubt(why) if same_boot && left.overlaps(id) && sectors(&left) != Some(0) => {
                in_doubt.push((left, why));
            }
            Verdict::Other | Verdict::Doubt(_) => tell_if_lost(&options.export, &left, same_boot),
        }
    }
    let settled = options.doubt.settle(in_doubt, ours.len());
    if let Some((first, _)) = settled.refused.first() {
        let then = |(left, why): &InDoubt| {
            let arena = left.arena.display();
            format!("{arena}: {why}; they are of {}", describe(left))
        };
        return Err(RecoverError {
            path: first.arena.clone(),
            why: RecoverTrouble::Doubt {
                then: settled.refused.iter().map(then).collect(),
                others: ours.iter().map(|left| left.arena.clone()).collect(),
                now: format!("{}: {}", path.display(), id.facts),
            },
        });
    }
    for left in &settled.left_alone {
        log::warn!(
            "{}: arena {} stays as it is: another one was named for this image; its writes are of \
             {}; the next start is refused until it is set aside with --discard-arena={1} or \
             brought to its image",
            options.export,
            left.arena.display(),
            describe(left)
        );
    }
    ours.extend(settled.replayed);
    // A newer one may hold what one before it could not bring to the disk.
    ours.sort_by_key(|left| Head::read(&left.arena).map_or(0, |head| head.created));
    Ok(Sorted {
        ours,
        peers,
        given_up: settled.discarded,
    })
}

/// How many sectors an arena holds; `None` if it cannot be used.
fn sectors(left: &Left) -> Option<u64> {
    OldArena::look(&left.arena).ok().map(|old| old.sectors())
}

/// What an arena belongs to, in words.
fn describe(left: &Left) -> String {
    match &left.image {
        Some(path) => format!("{}: {}", path.display(), left.origin),
        None => left.origin.to_string(),
    }
}

/// Names an arena of a process that died, whose image is not there any more.
fn tell_if_lost(export: &str, left: &Left, same_boot: bool) {
    let Some(image) = left.image.as_deref().filter(|_| same_boot) else {
        return;
    };
    if Head::is_live(&left.arena) || is_in_sight(image, left) {
        return;
    }
    let Some(sectors) = sectors(left).filter(|sectors| *sectors > 0) else {
        return;
    };
    log::warn!(
        "{export}: arena {}: {} of an image that is not there now ({}); start with that image to \
         bring them there, or remove arena and record to discard them",
        left.arena.display(),
        count(sectors, "acknowledged sector"),
        describe(left)
    );
}

/// Whether the image of an arena is where it was.
fn is_in_sight(path: &Path, left: &Left) -> bool {
    let is_disk = fs::metadata(path).is_ok_and(|metadata| {
        use std::os::unix::fs::FileTypeExt;
        metadata.is_file() || metadata.file_type().is_block_device()
    });
    // Opening anything else may wait, or do something.
    let facts = || Facts::of(&fs::File::open(path).ok()?).ok();
    let Some(facts) = is_disk.then(facts).flatten() else {
        return false;
    };
    let id = ImageId {
        facts,
        ..ImageId::default()
    };
    left.origin.compare(&id, true) == Verdict::Same
}
