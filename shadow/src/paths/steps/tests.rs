//! Every operation of a thaw on the names, with a cut of the power before it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;

const UUID: [u8; 16] = [5; 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Shadow,
    Marker,
}

type Listing = BTreeMap<PathBuf, Node>;
/// What the names are after an operation: those it changed.
type Change = Vec<(PathBuf, Option<Node>)>;

fn apply(listing: &mut Listing, change: &Change) {
    for (path, node) in change {
        match node {
            Some(node) => listing.insert(path.clone(), *node),
            None => listing.remove(path),
        };
    }
}

/// A directory whose power is cut before one of its operations. What was changed
/// since the last sync is there after that, or is not, each change for itself.
struct Directory {
    live: RefCell<Listing>,
    durable: RefCell<Listing>,
    pending: RefCell<Vec<Change>>,
    left: Cell<usize>,
    can_exchange: bool,
}

impl Directory {
    fn new(listing: &Listing, can_exchange: bool, operations: usize) -> Directory {
        Directory {
            live: RefCell::new(listing.clone()),
            durable: RefCell::new(listing.clone()),
            pending: RefCell::default(),
            left: Cell::new(operations),
            can_exchange,
        }
    }

    fn operate(&self, change: Change) -> io::Result<()> {
        let left = self.left.get().checked_sub(1);
        self.left.set(left.ok_or(io::ErrorKind::BrokenPipe)?);
        apply(&mut self.live.borrow_mut(), &change);
        self.pending.borrow_mut().push(change);
        Ok(())
    }

    /// What may be there after the cut.
    fn after(&self) -> Vec<Listing> {
        let pending = self.pending.borrow();
        let fates = 0..1 << pending.len();
        let after = fates.map(|fate: u32| {
            let mut listing = self.durable.borrow().clone();
            for (n, change) in pending.iter().enumerate() {
                if fate >> n & 1 == 1 {
                    apply(&mut listing, change);
                }
            }
            listing
        });
        after.collect()
    }
}

impl Names for Directory {
    fn is_shadow(&self, path: &Path) -> io::Result<bool> {
        Ok(self.live.borrow().get(path) == Some(&Node::Shadow))
    }

    fn marker(&self, path: &Path) -> io::Result<Option<[u8; 16]>> {
        let marker = self.live.borrow().get(path) == Some(&Node::Marker);
        Ok(marker.then_some(UUID))
    }

    fn make_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
        assert_eq!(*uuid, UUID);
        match self.live.borrow().get(path) {
            Some(Node::Marker) => return Ok(()),
            Some(Node::Shadow) => return Err(io::ErrorKind::AlreadyExists.into()),
            None => {}
        }
        self.operate(vec![(path.to_owned(), Some(Node::Marker))])
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<bool> {
        let node = |path| self.live.borrow().get(path).copied();
        let change = vec![(one.to_owned(), node(other)), (other.to_owned(), node(one))];
        if self.can_exchange {
            self.operate(change)?;
        }
        Ok(self.can_exchange)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let node = |path| self.live.borrow().get(path).copied();
        assert_eq!(node(to), None, "{} is replaced", to.display());
        self.operate(vec![(from.to_owned(), None), (to.to_owned(), node(from))])?;
        self.sync(to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        assert!(self.live.borrow().contains_key(path));
        self.operate(vec![(path.to_owned(), None)])
    }

    fn sync(&self, _: &Path) -> io::Result<()> {
        self.operate(Vec::new())?;
        self.pending.borrow_mut().clear();
        *self.durable.borrow_mut() = self.live.borrow().clone();
        Ok(())
    }
}

fn paths() -> Paths {
    Paths::of(Path::new("/d/s"))
}

/// What a thaw may begin with: frozen, frozen by 0.1.0, thawing by 0.1.0.
fn beginnings() -> [Listing; 3] {
    let Paths {
        shadow, thaw, cut, ..
    } = paths();
    [
        Listing::from([(shadow.clone(), Node::Shadow), (thaw, Node::Marker)]),
        Listing::from([(shadow, Node::Shadow)]),
        Listing::from([(cut, Node::Shadow)]),
    ]
}

fn thawing() -> Listing {
    let Paths { shadow, thaw, .. } = paths();
    Listing::from([(shadow, Node::Marker), (thaw, Node::Shadow)])
}

#[test]
fn a_thaw_begins_again_after_a_cut_at_every_operation() {
    for can_exchange in [true, false] {
        for listing in beginnings() {
            for cut in 0.. {
                let directory = Directory::new(&listing, can_exchange, cut);
                let begun = begin_thaw_among(&directory, &paths(), &UUID).is_ok();
                for after in directory.after() {
                    let shadows = after.values().filter(|node| **node == Node::Shadow);
                    assert_eq!(shadows.count(), 1, "cut at {cut}: {after:?}");
                    // The image may change from then on.
                    assert!(!begun || after == thawing(), "cut at {cut}: {after:?}");
                    let again = Directory::new(&after, can_exchange, usize::MAX);
                    let unmarked = begin_thaw_among(&again, &paths(), &UUID).unwrap();
                    assert!(unmarked.is_none());
                    assert_eq!(*again.durable.borrow(), thawing());
                }
                if begun {
                    break;
                }
            }
        }
    }
}

#[test]
fn a_marker_never_outlives_its_shadow() {
    let Paths { new, thaw, .. } = paths();
    let withdrawn = Listing::from([(new, Node::Shadow), (thaw, Node::Marker)]);
    for listing in [thawing(), withdrawn] {
        for cut in 0.. {
            let directory = Directory::new(&listing, true, cut);
            let gone = vanish_among(&directory, &paths(), &UUID).is_ok();
            for after in directory.after() {
                let has = |node: Node| after.values().any(|other| *other == node);
                let alone = has(Node::Marker) && !has(Node::Shadow);
                assert!(!alone, "cut at {cut}: {after:?}");
                assert!(!gone || after.is_empty(), "{after:?}");
            }
            if gone {
                break;
            }
        }
    }
}
