//! Which of the last tags have been used: the tag window of one initiator whose
//! tags count up (AoEde; protocol rule 6.1).
//!
//! A tag has one of two states, marked or not. The window reaches from the
//! highest tag seen [`WINDOW`] - 1 tags back; counting goes on past 2^32 as past
//! any other number. A tag far from the window means that counting began anew,
//! as after a reboot. Tag 0 is never tracked.

/// Tags in the window.
pub const WINDOW: u32 = 32768;
/// A tag further ahead than this of the highest begins the window anew.
const AHEAD_MAX: u32 = 65536;
const BITS: u32 = u64::BITS;
const WORDS: usize = (WINDOW / BITS) as usize;

/// The window: 4 KiB of bits, the place of a tag being its value modulo
/// [`WINDOW`]. A bit outside of the window does not exist, so those that come
/// into it are cleared when it moves.
#[derive(Debug)]
pub struct Window {
    bits: Box<[u64; WORDS]>,
    /// The highest tag seen; `None` before the first.
    highest: Option<u32>,
}

/// How a tag stands to the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// In it, or ahead of it so that it has moved.
    Counting,
    /// Far from it: it has begun anew there, with nothing marked.
    Restarted,
}

impl Default for Window {
    fn default() -> Window {
        Window::new()
    }
}

impl Window {
    /// A window that has seen nothing.
    pub fn new() -> Window {
        Window {
            bits: Box::new([0; WORDS]),
            highest: None,
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        // What has seen nothing has nothing marked.
        if self.highest.take().is_some() {
            self.bits.fill(0);
        }
    }

    /// Takes note of a tag, of whatever command: the window follows it.
    pub fn see(&mut self, tag: u32) -> Seen {
        if tag == 0 {
            return Seen::Counting;
        }
        let Some(highest) = self.highest else {
            self.highest = Some(tag);
            return Seen::Counting;
        };
        let ahead = tag.wrapping_sub(highest);
        let behind = highest.wrapping_sub(tag);
        if behind <= WINDOW {
            return Seen::Counting;
        }
        self.highest = Some(tag);
        if ahead > AHEAD_MAX {
            self.bits.fill(0);
            return Seen::Restarted;
        }
        if !shadow::fault!("old-tags-stay-marked") {
            self.clear_behind(highest, ahead);
        }
        Seen::Counting
    }

    /// Whether this tag was marked and is still in the window.
    pub fn is_marked(&self, tag: u32) -> bool {
        self.contains(tag) && self.bits[word(tag)] & bit(tag) != 0
    }

    /// Marks a tag; one outside of the window, and 0, stay unmarked.
    pub fn mark(&mut self, tag: u32) {
        if self.contains(tag) {
            self.bits[word(tag)] |= bit(tag);
        }
    }

    fn contains(&self, tag: u32) -> bool {
        tag != 0
            && self
                .highest
                .is_some_and(|highest| highest.wrapping_sub(tag) < WINDOW)
    }

    /// Clears the places of the `count` tags behind `last` in counting, which
    /// come into the window.
    fn clear_behind(&mut self, last: u32, count: u32) {
        if count >= WINDOW {
            self.bits.fill(0);
            return;
        }
        let mut tag = last.wrapping_add(1);
        let mut left = count;
        while left > 0 {
            // To the end of the word, or of what is to be cleared.
            let from = tag % BITS;
            let take = left.min(BITS - from);
            let ones = u64::MAX >> (BITS - take);
            self.bits[word(tag)] &= !(ones << from);
            tag = tag.wrapping_add(take);
            left -= take;
        }
    }
}

fn word(tag: u32) -> usize {
    (tag % WINDOW / BITS) as usize
}

fn bit(tag: u32) -> u64 {
    1 << (tag % BITS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// The same, said plainly.
    #[derive(Default)]
    struct Model {
        highest: Option<u32>,
        marked: HashSet<u32>,
    }

    impl Model {
        fn see(&mut self, tag: u32) -> Seen {
            let Some(highest) = self.highest else {
                self.highest = Some(tag).filter(|tag| *tag != 0);
                return Seen::Counting;
            };
            // The distance in counting, ahead or behind, whichever is shorter.
            let distance = i64::from(tag.wrapping_sub(highest) as i32);
            if tag == 0 || (-32768..=0).contains(&distance) {
                return Seen::Counting;
            }
            self.highest = Some(tag);
            if !(-32768..=65536).contains(&distance) {
                self.marked.clear();
                return Seen::Restarted;
            }
            self.marked
                .retain(|old| i64::from(tag.wrapping_sub(*old)) < 32768);
            Seen::Counting
        }

        fn mark(&mut self, tag: u32) {
            let highest = self.highest;
            if tag != 0 && highest.is_some_and(|h| h.wrapping_sub(tag) <= 32767) {
                self.marked.insert(tag);
            }
        }
    }

    #[test]
    fn four_kibibytes_hold_the_window() {
        assert_eq!(size_of::<[u64; WORDS]>(), 4096);
    }

    #[test]
    fn the_edges_of_the_window() {
        let base = 1_000_000;
        let mut window = Window::new();
        window.see(base);
        for tag in [base, base - 1, base - 32767] {
            assert_eq!(window.see(tag), Seen::Counting);
            window.mark(tag);
            assert!(window.is_marked(tag), "{tag}");
        }
        // Just outside: it is not tracked, and it is not far either.
        assert_eq!(window.see(base - 32768), Seen::Counting);
        window.mark(base - 32768);
        assert!(!window.is_marked(base - 32768) && window.is_marked(base));
        // The oldest leaves it when it moves by one.
        assert_eq!(window.see(base + 1), Seen::Counting);
        assert!(!window.is_marked(base - 32767) && window.is_marked(base - 1));
        assert!(!window.is_marked(base + 1));
        // 65536 ahead it moves, one more and it begins anew.
        assert_eq!(window.see(base + 1 + 65536), Seen::Counting);
        assert_eq!(window.see(base + 1 + 65536 + 65537), Seen::Restarted);
        let highest = base + 1 + 65536 + 65537;
        window.mark(highest);
        assert_eq!(window.see(highest - 32768), Seen::Counting);
        assert!(window.is_marked(highest));
        assert_eq!(window.see(highest - 32769), Seen::Restarted);
        assert!(!window.is_marked(highest));
    }

    #[test]
    fn counting_goes_on_past_the_last_number() {
        let mut window = Window::new();
        for tag in (0..200u32).map(|n| (u32::MAX - 99).wrapping_add(n)) {
            assert_eq!(window.see(tag), Seen::Counting);
            assert!(!window.is_marked(tag));
            window.mark(tag);
        }
        for tag in (0..200u32).map(|n| (u32::MAX - 99).wrapping_add(n)) {
            // Zero is never tracked.
            assert_eq!(window.is_marked(tag), tag != 0);
        }
    }

    #[test]
    fn zero_neither_moves_nor_begins_the_window() {
        let mut window = Window::new();
        window.see(0);
        window.mark(0);
        assert!(!window.is_marked(0));
        window.see(0x8000_0000);
        window.mark(0x8000_0000);
        assert_eq!(window.see(0), Seen::Counting);
        assert!(window.is_marked(0x8000_0000));
    }

    #[test]
    fn clearing_forgets_all() {
        let mut window = Window::new();
        window.see(7);
        window.mark(7);
        window.clear();
        assert!(!window.is_marked(7));
        // Anywhere is the beginning.
        assert_eq!(window.see(0x7000_0000), Seen::Counting);
        assert!(!window.is_marked(7));
    }

    /// Tags that count with gaps, come late, jump, and begin anew.
    fn tags() -> impl Strategy<Value = Vec<(u32, bool)>> {
        let start = prop_oneof![
            Just(1u32),
            Just(u32::MAX - 500),
            Just(0x7FFF_FF00),
            any::<u32>()
        ];
        let step = prop_oneof![
            8 => (1i64..4).boxed(),
            8 => (-40i64..=0).boxed(),
            2 => (-33000i64..33000).boxed(),
            1 => prop_oneof![
                Just(-32767i64), Just(-32768), Just(-32769), Just(32767), Just(32768), Just(65535), Just(65536), Just(65537)
            ].boxed(),
            1 => (-5_000_000_000i64..5_000_000_000).boxed(),
        ];
        let steps = proptest::collection::vec((step, any::<bool>()), 1..400);
        (start, steps).prop_map(|(start, steps)| {
            let mut highest = i64::from(start);
            let tag = |(step, mark): (i64, bool)| {
                let tag = highest + step;
                highest = highest.max(tag);
                if step < -40000 {
                    highest = tag;
                }
                (tag as u32, mark)
            };
            steps.into_iter().map(tag).collect()
        })
    }

    proptest! {
        #[test]
        fn the_window_is_a_set(tags in tags(), zeros in proptest::collection::vec(0usize..400, 0..5)) {
            let (mut window, mut model) = (Window::new(), Model::default());
            let mut all = Vec::new();
            for (index, (tag, mark)) in tags.into_iter().enumerate() {
                let tag = if zeros.contains(&index) { 0 } else { tag };
                prop_assert_eq!(window.see(tag), model.see(tag));
                prop_assert_eq!(window.is_marked(tag), model.marked.contains(&tag));
                if mark {
                    window.mark(tag);
                    model.mark(tag);
                }
                all.push(tag);
                for near in [tag, tag.wrapping_sub(1), tag.wrapping_add(1), tag.wrapping_sub(WINDOW), tag.wrapping_add(WINDOW)] {
                    prop_assert_eq!(window.is_marked(near), model.marked.contains(&near));
                }
            }
            for tag in all {
                prop_assert_eq!(window.is_marked(tag), model.marked.contains(&tag));
            }
        }
    }
}
