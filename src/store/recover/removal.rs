//! What becomes of an arena and its record that are not replayed, or not any
//! more.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use shadow::paths::rename;

use super::super::arena::OldArena;
use super::record::{self, Left};
use super::{RecoverError, RecoverTrouble};
use crate::text::count;

/// Discards what an arena holds, as the operator said.
pub(super) fn discard(export: &str, left: &Left) -> Result<(), RecoverError> {
    log::warn!(
        "{export}: arena {} discarded (--discard-arena)",
        left.arena.display()
    );
    remove(left)
}

/// Sets an arena aside that the operator discards, though nothing is wrong with
/// it: the image does not take what it holds, or may not be the right one.
pub(super) fn discard_aside(export: &str, left: &Left) -> Result<(), RecoverError> {
    let aside = free_name(&left.arena, "arena.discarded");
    remove_record(left)?;
    rename(&left.arena, &aside).map_err(cannot_remove(left))?;
    log::warn!(
        "{export}: arena {} discarded (--discard-arena); it is {} now",
        left.arena.display(),
        aside.display()
    );
    Ok(())
}

/// Returns a name that no arena has which was set aside before.
fn free_name(arena: &Path, extension: &str) -> PathBuf {
    let mut name = arena.with_extension(extension);
    while fs::symlink_metadata(&name).is_ok() {
        name.as_mut_os_string().push("a");
    }
    name
}

/// Takes an arena and its record away.
pub(super) fn remove(left: &Left) -> Result<(), RecoverError> {
    remove_record(left)?;
    remove_arena(left)
}

/// Takes an arena and its record away, when all that counts in it is elsewhere.
pub(super) fn remove_replayed(old: &mut OldArena, left: &Left) -> Result<(), RecoverError> {
    // What cannot be removed goes on counting.
    remove_record(left)?;
    old.retire();
    remove_arena(left)
}

/// Comes before the removal of the arena: a record without one stands for writes
/// that are lost.
fn remove_record(left: &Left) -> Result<(), RecoverError> {
    let removed = left.record.as_deref().map_or(Ok(()), record::remove);
    removed.map_err(cannot_remove(left))
}

fn remove_arena(left: &Left) -> Result<(), RecoverError> {
    match fs::remove_file(&left.arena) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(cannot_remove(left)),
    }
}

fn cannot_remove(left: &Left) -> impl Fn(io::Error) -> RecoverError + '_ {
    |e| RecoverError {
        path: left.arena.clone(),
        why: RecoverTrouble::Remove(e),
    }
}

/// Sets an arena of another boot aside, and takes its record away. The memory is
/// gone, or on a disk and out of date: the kernel had written some of it back, and
/// not the rest.
pub(super) fn set_aside(export: &str, left: &Left) -> Result<(), RecoverError> {
    let held = OldArena::open(&left.arena).map(|arena| arena.sectors());
    let aside = free_name(&left.arena, "arena.old");
    let moved = rename(&left.arena, &aside).is_ok();
    match held {
        Ok(sectors) if moved => log::warn!(
            "{export}: the machine went down while this image was served: {} that may not be on \
             it are set aside in {}",
            count(sectors, "sector"),
            aside.display()
        ),
        _ => log::warn!(
            "{export}: the machine went down while this image was served: writes of the last \
             seconds before may be missing"
        ),
    }
    remove_record(left)
}

#[cfg(test)]
mod tests {
    use super::super::super::arena::{Origin, V1Id};
    use super::*;

    #[test]
    fn an_arena_that_was_set_aside_is_not_replaced_by_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let left = Left {
            record: None,
            arena: dir.path().join("disk.img-0.arena"),
            image: None,
            boot: [1, 2],
            origin: Origin::V1(V1Id::default()),
            start: 0,
            len: 512,
        };
        for content in ["first", "second"] {
            fs::write(&left.arena, content).unwrap();
            set_aside("e1.1", &left).unwrap();
        }
        let names = ["disk.img-0.arena.old", "disk.img-0.arena.olda"];
        let found = names.map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
        assert_eq!(found, ["first", "second"]);
    }
}
