//! Equal shares for initiators of what is bounded: request slots, places in
//! queues, memory, and the disk.
//!
//! An initiator belongs to one of [`QUEUES`] queues by a hash of its MAC
//! address, so the state is bounded. Two parts:
//!
//! - [`Shares`] counts who has how much of a resource, and refuses more to the
//!   queue that has its share already while others are short.
//! - [`FairQueue`] holds what waits, and says whose turn it is: deficit round
//!   robin, where an item costs what the disk has to do for it.
//!
//! A queue that is alone may use everything. Two that always want more get half
//! each, whatever the size and number of their requests. Nothing here allocates
//! after its creation, and nothing asks for the time.

/// Queues that are told apart.
pub const QUEUES: usize = 64;
/// What a queue may spend in one round.
const QUANTUM: u64 = 64 << 10;
/// What an operation costs besides its bytes: a disk that seeks reads about so
/// much in the time of one seek, and a small request may not be nearly free.
const OPERATION: u64 = 32 << 10;

/// The queue of an initiator, or [`OURS`](Queue::OURS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue(u8);

impl Queue {
    /// What the target does of its own accord. It is refused nothing for others'
    /// sake, and waits in no [`FairQueue`].
    pub const OURS: Queue = Queue(QUEUES as u8);

    /// Returns the queue of the initiator with this MAC address.
    pub fn of(mac: [u8; 6]) -> Queue {
        let [a, b, c, d, e, f] = mac;
        let number = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        Queue((number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - QUEUES.ilog2())) as u8)
    }

    /// Its number; the last one is ours.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Who asks: an initiator, on one of the NICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initiator {
    /// Tells its sequential reads on this NIC from others'.
    pub stream: u64,
    /// Its queue, whatever the NIC.
    pub queue: Queue,
}

impl Initiator {
    /// The initiator with this MAC address, heard on the NIC of this number.
    pub fn new(nic: u16, mac: [u8; 6]) -> Initiator {
        let [a, b, c, d, e, f] = mac;
        let [high, low] = nic.to_be_bytes();
        Initiator {
            stream: u64::from_be_bytes([high, low, a, b, c, d, e, f]),
            queue: Queue::of(mac),
        }
    }
}

/// Returns what a request of so many bytes costs.
pub fn cost(bytes: u64) -> u64 {
    OPERATION + bytes
}

/// Who has how much of a resource.
///
/// Up to the capacity less its headroom everyone may take what he wants. The
/// headroom is for queues below an equal share: one that comes new finds a place
/// although another has taken all the rest, and what becomes free is its until
/// both have as much.
#[derive(Debug)]
pub struct Shares {
    capacity: u64,
    headroom: u64,
    used: [u64; QUEUES + 1],
    total: u64,
    /// Queues that have any.
    active: u64,
}

impl Shares {
    /// Nobody has any of `capacity`, of which `headroom` is kept for queues
    /// below their share.
    pub fn new(capacity: u64, headroom: u64) -> Shares {
        Shares {
            capacity,
            headroom: headroom.min(capacity / 2),
            used: [0; QUEUES + 1],
            total: 0,
            active: 0,
        }
    }

    /// How much is taken by all together.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// `true` if no other queue has any.
    pub fn is_alone(&self, queue: Queue) -> bool {
        self.total == self.used[queue.index()]
    }

    /// `true` if more than one queue has any.
    pub fn is_shared(&self) -> bool {
        self.active > 1
    }

    /// `true` if a queue may take so much more. The first may take any amount
    /// while nothing is taken.
    pub fn admits(&self, queue: Queue, amount: u64) -> bool {
        self.total == 0 || self.admits_of(self.capacity, self.headroom, queue, amount)
    }

    /// The same of another capacity.
    pub fn admits_of(&self, capacity: u64, headroom: u64, queue: Queue, amount: u64) -> bool {
        let total = self.total + amount;
        let open = capacity - headroom;
        if total <= open {
            return true;
        }
        let used = self.used[queue.index()];
        let active = self.active + u64::from(used == 0);
        let share = queue == Queue::OURS || used + amount <= open / active.max(2);
        total <= capacity && share
    }

    /// Takes so much for a queue.
    pub fn take(&mut self, queue: Queue, amount: u64) {
        let used = &mut self.used[queue.index()];
        self.active += u64::from(*used == 0 && amount > 0);
        *used += amount;
        self.total += amount;
    }

    /// Gives back what was taken.
    pub fn release(&mut self, queue: Queue, amount: u64) {
        let used = &mut self.used[queue.index()];
        debug_assert!(*used >= amount, "more is given back than was taken");
        *used = used.saturating_sub(amount);
        self.active -= u64::from(*used == 0 && amount > 0);
        self.total = self.total.saturating_sub(amount);
    }
}

/// Queues that are passed over, since what they wait for is not there.
#[derive(Clone, Copy, Debug, Default)]
pub struct Passed(u64);

impl Passed {
    /// Passes this queue over, too.
    pub fn add(&mut self, queue: Queue) {
        self.0 |= 1 << queue.0;
    }
}

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Node<T> {
    item: Option<T>,
    cost: u64,
    next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Line {
    head: u32,
    tail: u32,
    /// What it may still spend in this round.
    deficit: u64,
}

/// What waits, in the order of its arrival within a queue, and by deficit round
/// robin among queues.
#[derive(Debug)]
pub struct FairQueue<T> {
    lines: [Line; QUEUES],
    nodes: Vec<Node<T>>,
    free: u32,
    len: usize,
    /// Queues in which something waits.
    waiting: u64,
    /// The queue whose turn it is, and whether its turn has just begun.
    turn: u8,
    begins: bool,
}

impl<T> FairQueue<T> {
    /// An empty queue with places for so many items.
    pub fn new(capacity: usize) -> FairQueue<T> {
        let nodes = (0..capacity).map(|n| Node {
            item: None,
            cost: 0,
            next: if n + 1 < capacity { n as u32 + 1 } else { NONE },
        });
        let empty = Line {
            head: NONE,
            tail: NONE,
            deficit: 0,
        };
        FairQueue {
            lines: [empty; QUEUES],
            nodes: nodes.collect(),
            free: if capacity > 0 { 0 } else { NONE },
            len: 0,
            waiting: 0,
            turn: 0,
            begins: true,
        }
    }

    /// How many items wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// `true` if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `true` if there is no place left.
    pub fn is_full(&self) -> bool {
        self.free == NONE
    }

    /// Puts an item behind the others of its queue; gives it back if there is no
    /// place.
    pub fn push(&mut self, queue: Queue, cost: u64, item: T) -> Result<(), T> {
        let at = self.free;
        let Some(node) = self.nodes.get_mut(at as usize) else {
            return Err(item);
        };
        self.free = node.next;
        *node = Node {
            item: Some(item),
            cost,
            next: NONE,
        };
        let line = &mut self.lines[queue.index()];
        match self.nodes.get_mut(line.tail as usize) {
            Some(last) => last.next = at,
            None => line.head = at,
        }
        line.tail = at;
        self.len += 1;
        self.waiting |= 1 << queue.0;
        Ok(())
    }

    /// Says whose turn it is among those that are not passed over. The turn
    /// lasts until [`pop`](FairQueue::pop) has taken the queue's first item, and
    /// further ones while it may spend.
    pub fn turn(&mut self, passed: Passed) -> Option<Queue> {
        let able = self.waiting & !passed.0;
        if able == 0 {
            return None;
        }
        loop {
            let queue = Queue(self.turn);
            if able & 1 << queue.0 != 0 {
                let line = &mut self.lines[queue.index()];
                let cost = self.nodes.get(line.head as usize)?.cost;
                // Once a turn; and no more than it can spend, or one that was
                // passed over for long would have all the next turns.
                if self.begins && line.deficit < cost {
                    line.deficit += QUANTUM;
                }
                self.begins = false;
                if line.deficit >= cost {
                    return Some(queue);
                }
            }
            // The next one that can have a turn, from here round.
            let from = u32::from(queue.0) + 1;
            let ahead = able.checked_shr(from).unwrap_or(0);
            self.turn = match ahead {
                0 => able.trailing_zeros() as u8,
                _ => (from + ahead.trailing_zeros()) as u8,
            };
            self.begins = true;
        }
    }

    /// The first item of a queue.
    pub fn head(&self, queue: Queue) -> Option<&T> {
        let head = self.lines[queue.index()].head;
        self.nodes.get(head as usize)?.item.as_ref()
    }

    /// Takes the first item of a queue, which pays for it.
    pub fn pop(&mut self, queue: Queue) -> Option<T> {
        let line = &mut self.lines[queue.index()];
        let at = line.head;
        let node = self.nodes.get_mut(at as usize)?;
        let item = node.item.take();
        line.deficit = line.deficit.saturating_sub(node.cost);
        line.head = node.next;
        node.next = self.free;
        self.free = at;
        self.len -= 1;
        if line.head == NONE {
            line.tail = NONE;
            // What was not spent is lost: nobody saves up while he asks nothing.
            line.deficit = 0;
            self.waiting &= !(1 << queue.0);
        }
        item
    }

    /// Takes out all items that are to go, of every queue.
    pub fn remove_if(&mut self, mut goes: impl FnMut(&T) -> bool) -> Vec<(Queue, T)> {
        let mut gone = Vec::new();
        for queue in self.queues() {
            let (mut before, mut at) = (NONE, self.lines[queue.index()].head);
            while let Some(node) = self.nodes.get_mut(at as usize) {
                let next = node.next;
                if node.item.as_ref().is_some_and(&mut goes) {
                    gone.extend(node.item.take().map(|item| (queue, item)));
                    node.next = self.free;
                    self.free = at;
                    self.len -= 1;
                    match self.nodes.get_mut(before as usize) {
                        Some(before) => before.next = next,
                        None => self.lines[queue.index()].head = next,
                    }
                } else {
                    before = at;
                }
                at = next;
            }
            let line = &mut self.lines[queue.index()];
            line.tail = before;
            if before == NONE {
                line.deficit = 0;
                self.waiting &= !(1 << queue.0);
            }
        }
        gone
    }

    /// The queues in which something waits.
    pub fn queues(&self) -> impl Iterator<Item = Queue> + use<T> {
        let waiting = self.waiting;
        (0..QUEUES as u8)
            .filter(move |n| waiting & 1 << n != 0)
            .map(Queue)
    }

    /// What waits, each queue's in its order.
    pub fn iter(&self) -> impl Iterator<Item = (Queue, &T)> {
        self.queues().flat_map(move |queue| {
            let mut at = self.lines[queue.index()].head;
            std::iter::from_fn(move || {
                let node = self.nodes.get(at as usize)?;
                at = node.next;
                Some((queue, node.item.as_ref()?))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const ALL: Passed = Passed(0);

    fn queue(n: u8) -> Queue {
        Queue(n)
    }

    #[test]
    fn addresses_that_differ_in_the_last_byte_share_no_queue() {
        let of = |last| Queue::of([2, 0, 0, 0, 0, last]).0;
        for last in 0..30 {
            assert!((last + 1..30).all(|other| of(other) != of(last)));
        }
    }

    #[test]
    fn the_only_one_may_have_all_but_the_headroom_and_a_second_one_finds_a_place() {
        let mut shares = Shares::new(1088, 64);
        let (greedy, polite) = (queue(1), queue(2));
        while shares.admits(greedy, 1) {
            shares.take(greedy, 1);
        }
        assert_eq!(shares.total(), 1024);
        for _ in 0..64 {
            assert!(shares.admits(polite, 1));
            shares.take(polite, 1);
        }
        assert!(!shares.admits(polite, 1), "all of it is taken");
        // What the greedy one gives back the other may have, until it is half.
        for polite_has in 64..512 {
            shares.release(greedy, 1);
            assert!(!shares.admits(greedy, 1), "{polite_has}");
            assert!(shares.admits(polite, 1), "{polite_has}");
            shares.take(polite, 1);
        }
        shares.release(greedy, 1);
        assert!(!shares.admits(greedy, 1) && !shares.admits(polite, 1));
        // A third one finds a place again.
        assert!(shares.admits(queue(3), 1));
    }

    #[test]
    fn one_larger_than_everything_is_taken_when_it_is_alone() {
        let mut shares = Shares::new(100, 10);
        assert!(shares.admits(queue(1), 1000));
        shares.take(queue(1), 1000);
        assert!(!shares.admits(queue(2), 1));
        shares.release(queue(1), 1000);
        assert!(shares.admits(queue(2), 1000));
    }

    #[test]
    fn a_queue_that_is_passed_over_saves_up_no_more_than_its_turn() {
        let mut fair = FairQueue::new(200);
        for n in 0..100 {
            fair.push(queue(5), QUANTUM / 4, n).unwrap();
            fair.push(queue(9), QUANTUM / 4, n).unwrap();
        }
        let mut passed = Passed::default();
        passed.add(queue(5));
        for _ in 0..40 {
            assert_eq!(fair.turn(passed), Some(queue(9)));
            fair.pop(queue(9));
        }
        let mut run = 0;
        while fair.turn(ALL) == Some(queue(5)) {
            fair.pop(queue(5));
            run += 1;
        }
        assert!(run <= 8, "{run} in a row");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Each item comes out once, in its queue's order, and nothing else.
        #[test]
        fn all_that_goes_in_comes_out_in_its_order(
            ops in proptest::collection::vec((0u8..6, 0u64..200_000, any::<u64>()), 1..300)
        ) {
            let capacity = 20;
            let mut fair = FairQueue::new(capacity);
            let mut model: Vec<VecDeque<usize>> = vec![VecDeque::new(); 64];
            let mut len = 0;
            for (n, (q, cost, mask)) in ops.into_iter().enumerate() {
                let of = |q: u8| queue(q * 12 + 3);
                if mask % 41 == 0 {
                    let gone = fair.remove_if(|n| n % 3 == 0);
                    let mut expected = Vec::new();
                    for (q, line) in model.iter_mut().enumerate() {
                        let of_three = line.iter().filter(|n| **n % 3 == 0);
                        expected.extend(of_three.map(|n| (queue(q as u8), *n)));
                        line.retain(|n| n % 3 != 0);
                    }
                    len -= gone.len();
                    prop_assert_eq!(gone, expected);
                } else if mask % 3 != 0 {
                    let pushed = fair.push(of(q), cost, n).is_ok();
                    prop_assert_eq!(pushed, len < capacity);
                    if pushed {
                        model[of(q).index()].push_back(n);
                        len += 1;
                    }
                } else {
                    let passed = Passed(mask & mask >> 7);
                    let able = (0..64).any(|q| passed.0 & 1 << q == 0 && !model[q].is_empty());
                    let turn = fair.turn(passed);
                    prop_assert_eq!(turn.is_some(), able);
                    if let Some(turn) = turn {
                        prop_assert!(passed.0 & 1 << turn.0 == 0);
                        prop_assert_eq!(fair.head(turn), model[turn.index()].front());
                        prop_assert_eq!(fair.pop(turn), model[turn.index()].pop_front());
                        len -= 1;
                    }
                }
                prop_assert_eq!((fair.len(), fair.is_full()), (len, len == capacity));
                let all: Vec<usize> = fair.iter().map(|(_, n)| *n).collect();
                let expected: Vec<usize> = model.iter().flatten().copied().collect();
                prop_assert_eq!(all, expected);
            }
        }

        /// Of queues that always have something waiting each gets the same, but
        /// for what one round and one item are worth.
        #[test]
        fn whoever_always_waits_gets_an_equal_share(
            costs in proptest::collection::vec(1u64..300_000, 2..8), rounds in 50usize..500
        ) {
            let mut fair = FairQueue::new(64);
            let of = |n: usize| queue(n as u8 * 8 + 1);
            let mut spent = vec![0u64; costs.len()];
            for (n, cost) in costs.iter().enumerate() {
                for _ in 0..2 {
                    fair.push(of(n), *cost, n).unwrap();
                }
            }
            for _ in 0..rounds {
                let turn = fair.turn(ALL).unwrap();
                let n = fair.pop(turn).unwrap();
                spent[n] += costs[n];
                fair.push(of(n), costs[n], n).unwrap();
            }
            let (least, most) = (spent.iter().min().unwrap(), spent.iter().max().unwrap());
            let bound = QUANTUM + 2 * costs.iter().max().unwrap();
            prop_assert!(most - least <= bound, "{spent:?} of items of {costs:?}");
        }

        /// Whatever is taken and given back, the books are right, nothing beyond
        /// the capacity is given, and no queue is refused while it has less than
        /// its share and there is any left.
        #[test]
        fn a_share_is_there_for_whoever_has_less(
            ops in proptest::collection::vec((0u8..5, 1u64..20, any::<bool>()), 1..400)
        ) {
            let (capacity, headroom) = (400, 50);
            let mut shares = Shares::new(capacity, headroom);
            let mut used = [0u64; 5];
            for (q, amount, take) in ops {
                let has = &mut used[usize::from(q)];
                if take {
                    if shares.admits(queue(q), amount) {
                        shares.take(queue(q), amount);
                        *has += amount;
                    } else {
                        let has = *has;
                        let others = used.iter().filter(|u| **u > 0).count() as u64;
                        let active = (others + u64::from(has == 0)).max(2);
                        let total: u64 = used.iter().sum();
                        prop_assert!(total + amount > capacity - headroom);
                        prop_assert!(
                            total + amount > capacity
                                || has + amount > (capacity - headroom) / active
                        );
                    }
                } else {
                    let back = amount.min(*has);
                    shares.release(queue(q), back);
                    *has -= back;
                }
                prop_assert_eq!(shares.total(), used.iter().sum::<u64>());
                prop_assert!(shares.total() <= capacity);
            }
        }
    }
}
