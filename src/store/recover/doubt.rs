//! What the operator says of arenas that cannot be replayed as they are, and which
//! of those in doubt that concerns.

use std::fs;
use std::path::{Path, PathBuf};

use super::record::Left;

/// What the operator says of arenas that cannot be replayed as they are. Without
/// that the start is refused. An empty path stands for an option without one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Doubtful {
    /// The image is the right one for these (`--replay-arena`).
    pub replay: Vec<PathBuf>,
    /// The writes in these are discarded (`--discard-arena`).
    pub discard: Vec<PathBuf>,
}

impl Doubtful {
    /// `true` if the operator says that the image is the right one for this arena,
    /// which is certainly of the image.
    pub fn replays(&self, arena: &Path) -> bool {
        is_unnamed(&self.replay) || is_named(&self.replay, arena)
    }

    /// The same of giving it up.
    pub fn discards(&self, arena: &Path) -> bool {
        is_unnamed(&self.discard) || is_named(&self.discard, arena)
    }
}

impl Doubtful {
    /// The paths that the operator names and that are none of these arenas.
    pub(super) fn unmatched<'a>(&'a self, arenas: &[Left]) -> Vec<&'a Path> {
        let named = self
            .replay
            .iter()
            .chain(&self.discard)
            .map(PathBuf::as_path);
        let named = named.filter(|path| !path.as_os_str().is_empty());
        let is_there = |path: &Path| arenas.iter().any(|left| is_same(path, &left.arena));
        named.filter(|path| !is_there(path)).collect()
    }
}

fn is_unnamed(list: &[PathBuf]) -> bool {
    list.iter().any(|path| path.as_os_str().is_empty())
}

fn is_named(list: &[PathBuf], arena: &Path) -> bool {
    list.iter().any(|path| is_same(path, arena))
}

fn is_same(path: &Path, arena: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(path) == real(arena)
}

/// An arena that may be of the image, and why that is not certain.
pub(super) type InDoubt = (Left, &'static str);

/// What becomes of the arenas in doubt.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// To be replayed.
    pub replayed: Vec<Left>,
    /// To be set aside.
    pub discarded: Vec<Left>,
    /// To stay as they are: another one was named.
    pub left_alone: Vec<Left>,
    /// The start is refused because of these.
    pub refused: Vec<InDoubt>,
}

impl Doubtful {
    /// Settles what becomes of the arenas in doubt. An option without a path concerns
    /// the only arena that there is; with `others`, which are certainly of the image,
    /// it does not say which one is meant.
    pub(super) fn settle(&self, in_doubt: Vec<InDoubt>, others: usize) -> Settled {
        let mut settled = Settled::default();
        let is_only = in_doubt.len() == 1 && others == 0;
        for (left, why) in in_doubt {
            if is_named(&self.discard, &left.arena) || is_only && is_unnamed(&self.discard) {
                settled.discarded.push(left);
            } else if is_named(&self.replay, &left.arena) || is_only && is_unnamed(&self.replay) {
                settled.replayed.push(left);
            } else {
                settled.refused.push((left, why));
            }
        }
        // One of them is this image's; so the others are not.
        if !settled.replayed.is_empty() {
            let others = settled.refused.drain(..).map(|(left, _)| left);
            settled.left_alone = others.collect();
        }
        settled
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::arena::{Origin, V1Id};
    use super::*;

    fn in_doubt(names: &[&str]) -> Vec<InDoubt> {
        let left = |name: &&str| Left {
            record: None,
            arena: PathBuf::from(name),
            image: None,
            boot: [1, 2],
            origin: Origin::V1(V1Id::default()),
            start: 0,
            len: 512,
        };
        names.iter().map(|name| (left(name), "why")).collect()
    }

    fn says(replay: &[&str], discard: &[&str]) -> Doubtful {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect();
        Doubtful {
            replay: paths(replay),
            discard: paths(discard),
        }
    }

    #[test]
    fn an_option_concerns_the_only_arena_in_doubt_or_the_one_that_it_names() {
        // What is said of replaying and discarding, the arenas in doubt, and what
        // becomes of them: replayed, discarded, left alone, refused.
        type Case = (
            &'static [&'static str],
            &'static [&'static str],
            [&'static [&'static str]; 4],
        );
        let one: [Case; 5] = [
            (&[], &[], [&[], &[], &[], &["/a"]]),
            (&[""], &[], [&["/a"], &[], &[], &[]]),
            (&[], &[""], [&[], &["/a"], &[], &[]]),
            (&["/a"], &[], [&["/a"], &[], &[], &[]]),
            (&["/b"], &["/c"], [&[], &[], &[], &["/a"]]),
        ];
        let two: [Case; 7] = [
            (&[], &[], [&[], &[], &[], &["/a", "/b"]]),
            (&[""], &[], [&[], &[], &[], &["/a", "/b"]]),
            (&[], &[""], [&[], &[], &[], &["/a", "/b"]]),
            (&["/b"], &[], [&["/b"], &[], &["/a"], &[]]),
            (&[], &["/b"], [&[], &["/b"], &[], &["/a"]]),
            (&["/a"], &["/b"], [&["/a"], &["/b"], &[], &[]]),
            (&[], &["/a", "/b"], [&[], &["/a", "/b"], &[], &[]]),
        ];
        let one = one.iter().map(|case| (&["/a"][..], case));
        let two = two.iter().map(|case| (&["/a", "/b"][..], case));
        for (names, (replay, discard, expected)) in one.chain(two) {
            let settled = says(replay, discard).settle(in_doubt(names), 0);
            let of = |list: &[Left]| -> Vec<String> {
                list.iter().map(|l| l.arena.display().to_string()).collect()
            };
            let refused: Vec<Left> = settled.refused.into_iter().map(|(left, _)| left).collect();
            let found = [
                of(&settled.replayed),
                of(&settled.discarded),
                of(&settled.left_alone),
                of(&refused),
            ];
            assert_eq!(found, *expected, "{replay:?} {discard:?}");
        }
        // With one that is certainly of the image it has to be named.
        let settled = says(&[""], &[]).settle(in_doubt(&["/a"]), 1);
        assert_eq!(settled.refused.len(), 1);
        let settled = says(&["/a"], &[]).settle(in_doubt(&["/a"]), 1);
        assert_eq!(settled.replayed.len(), 1);
    }

    #[test]
    fn what_is_certainly_of_the_image_is_meant_by_no_name_and_by_its_own() {
        let arena = Path::new("/a");
        assert!(says(&[""], &[]).replays(arena) && says(&["/a"], &[]).replays(arena));
        assert!(!says(&["/b"], &[""]).replays(arena) && says(&["/b"], &[""]).discards(arena));
        assert!(!says(&[""], &["/b"]).discards(arena) && says(&[], &["/a"]).discards(arena));
    }

    #[test]
    fn a_path_that_names_no_arena_is_told() {
        let left: Vec<Left> = in_doubt(&["/a", "/b"])
            .into_iter()
            .map(|(l, _)| l)
            .collect();
        let said = says(&["/a", "/c"], &["", "/d"]);
        assert_eq!(said.unmatched(&left), [Path::new("/c"), Path::new("/d")]);
        assert!(says(&["/b"], &["/a"]).unmatched(&left).is_empty());
    }
}
