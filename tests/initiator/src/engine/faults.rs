//! A wire that loses, doubles and reorders, the same way for the same seed.

use super::rng::Rng;

/// Frames that a reordered one lets pass by at most.
const LATE_MAX: u64 = 16;

/// How often what happens, of a thousand frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// A frame never arrives.
    pub lose: u32,
    /// A frame arrives twice.
    pub duplicate: u32,
    /// A frame arrives behind up to 16 later ones.
    pub reorder: u32,
}

impl Rates {
    /// Whether anything happens at all.
    pub fn any(&self) -> bool {
        *self != Rates::default()
    }
}

/// What has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Happened {
    /// Frames lost.
    pub lost: u64,
    /// Frames doubled.
    pub duplicated: u64,
    /// Frames held back.
    pub reordered: u64,
}

/// One direction of the wire.
#[derive(Debug)]
pub struct Injector<T> {
    rates: Rates,
    rng: Rng,
    held: Vec<(u64, T)>,
    /// What has happened so far.
    pub happened: Happened,
}

impl<T: Clone> Injector<T> {
    /// A wire.
    pub fn new(rates: Rates, seed: u64) -> Injector<T> {
        Injector {
            rates,
            rng: Rng::new(seed),
            held: Vec::new(),
            happened: Happened::default(),
        }
    }

    /// Sends a frame into the wire; what comes out of it now goes to `out`.
    /// Says how many copies of this frame come out now or later.
    pub fn pass(&mut self, frame: T, out: &mut Vec<T>) -> usize {
        if self.rng.chance(self.rates.lose) {
            self.happened.lost += 1;
            self.advance(out);
            return 0;
        }
        let mut copies = 1;
        if self.rng.chance(self.rates.duplicate) {
            self.happened.duplicated += 1;
            copies = 2;
            self.place(frame.clone(), out);
        }
        self.place(frame, out);
        self.advance(out);
        copies
    }

    /// Lets out what is held back, as when nothing follows.
    pub fn release(&mut self, out: &mut Vec<T>) {
        out.extend(self.held.drain(..).map(|(_, frame)| frame));
    }

    /// Whether something is held back.
    pub fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    fn place(&mut self, frame: T, out: &mut Vec<T>) {
        if self.rng.chance(self.rates.reorder) {
            self.happened.reordered += 1;
            // One more, for the frame itself counts as passing.
            self.held.push((2 + self.rng.below(LATE_MAX), frame));
        } else {
            out.push(frame);
        }
    }

    fn advance(&mut self, out: &mut Vec<T>) {
        if self.held.is_empty() {
            return;
        }
        for (left, _) in &mut self.held {
            *left -= 1;
        }
        let (now, later) = self.held.drain(..).partition(|(left, _)| *left == 0);
        self.held = later;
        let now: Vec<(u64, T)> = now;
        out.extend(now.into_iter().map(|(_, frame)| frame));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(rates: Rates, seed: u64) -> (Vec<u32>, Happened, usize) {
        let mut wire = Injector::new(rates, seed);
        let mut out = Vec::new();
        let copies = (0..10_000).map(|n| wire.pass(n, &mut out)).sum();
        wire.release(&mut out);
        (out, wire.happened, copies)
    }

    #[test]
    fn a_good_wire_changes_nothing() {
        let (out, happened, copies) = run(Rates::default(), 1);
        assert_eq!(out, (0..10_000).collect::<Vec<_>>());
        assert_eq!((happened, copies), (Happened::default(), 10_000));
    }

    #[test]
    fn a_bad_wire_is_bad_to_the_degree_asked_and_the_same_each_time() {
        let rates = Rates {
            lose: 30,
            duplicate: 20,
            reorder: 50,
        };
        let (out, happened, copies) = run(rates, 5);
        assert_eq!(run(rates, 5).0, out);
        assert_ne!(run(rates, 6).0, out);
        assert_eq!(out.len(), copies);
        let expected = 10_000 - happened.lost + happened.duplicated;
        assert_eq!(out.len() as u64, expected);
        assert!((200..400).contains(&happened.lost), "{happened:?}");
        assert!((100..300).contains(&happened.duplicated), "{happened:?}");
        assert!((350..650).contains(&happened.reordered), "{happened:?}");
        let swapped = out.windows(2).filter(|w| w[0] > w[1]).count();
        assert!(swapped > 300, "{swapped}");
        // Nothing is later than it may be.
        let mut highest = 0;
        for n in out {
            assert!(n + 2 * LATE_MAX as u32 + 2 > highest);
            highest = highest.max(n);
        }
    }
}
