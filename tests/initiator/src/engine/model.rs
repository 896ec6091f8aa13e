//! What each sector may hold, by what was asked and answered.
//!
//! Every write has a generation, counted up when it is first sent; the count is
//! the clock as well. A write is *over* once it was acknowledged and no copy of
//! it is still on its way: a copy that arrives late is carried out late, for AoE
//! without tags cannot tell. A generation may be seen by a read unless a write
//! that began after it was over had been acknowledged when the read began.

use std::collections::HashMap;
use std::fmt;

use super::pattern::{self, Seen};
use crate::frame::SECTOR;

/// What the sectors held before the first write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// Anything but patterns of this seed: after an earlier run, take another.
    Any,
    /// Zeros.
    Zeros,
    /// The pattern of generation 0; see [`Model::initial`].
    Pattern,
}

/// A sector that holds what it must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// The sector.
    pub lba: u64,
    /// What it holds and what it may hold.
    pub why: String,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}: {}", self.lba, self.why)
    }
}

/// Not over yet.
const OPEN: u64 = u64::MAX;

#[derive(Clone, Copy, Debug)]
struct Version {
    generation: u64,
    /// The clock when it was over.
    end: u64,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    /// The last generation acknowledged; 0 is none.
    floor: u64,
    /// Reads on their way, for which no version may be forgotten.
    readers: u32,
    versions: Vec<Version>,
}

#[derive(Clone, Copy, Debug)]
struct Write {
    lba: u64,
    count: usize,
    /// Acknowledged or refused.
    decided: bool,
    copies: u64,
    answers: u64,
}

/// A read on its way, with what its sectors held for sure when it began. To be
/// given back to the model.
#[derive(Debug)]
#[must_use = "a read that never ends keeps versions from being forgotten"]
pub struct ReadTicket {
    lba: u64,
    floors: Vec<u64>,
}

/// What each sector of a range may hold.
#[derive(Clone, Debug)]
pub struct Model {
    first: u64,
    sectors: Vec<Sector>,
    seed: u64,
    initial: Initial,
    clock: u64,
    writes: HashMap<u64, Write>,
    /// Whether the target carries out only the first copy of a write.
    deduplicated: bool,
}

impl Model {
    /// Knows `count` sectors from `first` on.
    pub fn new(first: u64, count: u64, seed: u64, initial: Initial) -> Model {
        Model {
            first,
            sectors: vec![Sector::default(); count as usize],
            seed,
            initial,
            clock: 0,
            writes: HashMap::new(),
            deduplicated: false,
        }
    }

    /// Trusts the target to recognise copies of a write (tags count up), so
    /// that a write is over once acknowledged.
    pub fn deduplicated(&mut self, trust: bool) {
        self.deduplicated = trust;
    }

    /// The first sector it knows.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// How many sectors it knows.
    pub fn count(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// What [`Initial::Pattern`] means, for the maker of an image: sectors from
    /// `lba` on, as many as `bytes` holds.
    pub fn initial(seed: u64, lba: u64, bytes: &mut [u8]) {
        for (lba, sector) in (lba..).zip(bytes.chunks_exact_mut(SECTOR)) {
            pattern::fill(sector, seed, lba, 0);
        }
    }

    /// A write begins; its generation.
    pub fn begin_write(&mut self, lba: u64, count: usize) -> u64 {
        self.clock += 1;
        let generation = self.clock;
        for sector in self.range(lba, count) {
            sector.versions.push(Version {
                generation,
                end: OPEN,
            });
        }
        let write = Write {
            lba,
            count,
            decided: false,
            copies: 0,
            answers: 0,
        };
        self.writes.insert(generation, write);
        generation
    }

    /// What a write is to carry.
    pub fn fill(&self, generation: u64, lba: u64, data: &mut [u8]) {
        for (lba, sector) in (lba..).zip(data.chunks_exact_mut(SECTOR)) {
            pattern::fill(sector, self.seed, lba, generation);
        }
    }

    /// So many copies of a write went out.
    pub fn sent(&mut self, generation: u64, copies: u64) {
        if let Some(write) = self.writes.get_mut(&generation) {
            write.copies += copies;
        }
    }

    /// One copy of a write was answered, whatever the answer and whether or not
    /// it was the first. Says whether that was the last one on its way.
    pub fn answered(&mut self, generation: u64) -> bool {
        match self.writes.get_mut(&generation) {
            Some(write) => {
                write.answers += 1;
                self.close_if_over(generation)
            }
            None => true,
        }
    }

    /// A write was acknowledged. Says whether no copy of it is on its way.
    pub fn acknowledged(&mut self, generation: u64) -> bool {
        let Some(write) = self.writes.get_mut(&generation) else {
            return true;
        };
        write.decided = true;
        let Write { lba, count, .. } = *write;
        for sector in self.range(lba, count) {
            sector.floor = sector.floor.max(generation);
            sector.forget();
        }
        self.close_if_over(generation)
    }

    /// A write was refused with an error: each of its sectors is old or new.
    /// Says whether no copy of it is on its way.
    pub fn failed(&mut self, generation: u64) -> bool {
        if let Some(write) = self.writes.get_mut(&generation) {
            write.decided = true;
        }
        self.close_if_over(generation)
    }

    /// Whether it is over now.
    fn close_if_over(&mut self, generation: u64) -> bool {
        let Some(write) = self.writes.get(&generation) else {
            return true;
        };
        let arrived = self.deduplicated || write.answers >= write.copies;
        if write.decided && arrived {
            self.close(generation);
        }
        !self.writes.contains_key(&generation)
    }

    /// Nothing of the past is on its way any more: the target is dead, or has
    /// answered everything.
    pub fn settle(&mut self) {
        let generations: Vec<u64> = self.writes.keys().copied().collect();
        for generation in generations {
            self.close(generation);
        }
    }

    /// Writes of which a copy may still be on its way.
    pub fn open_writes(&self) -> usize {
        self.writes.len()
    }

    fn close(&mut self, generation: u64) {
        let Some(write) = self.writes.remove(&generation) else {
            return;
        };
        let clock = self.clock;
        for sector in self.range(write.lba, write.count) {
            let version = sector
                .versions
                .iter_mut()
                .find(|v| v.generation == generation);
            if let Some(version) = version {
                version.end = clock;
            }
            sector.forget();
        }
    }

    /// A read begins.
    pub fn begin_read(&mut self, lba: u64, count: usize) -> ReadTicket {
        let floors = self
            .range(lba, count)
            .iter_mut()
            .map(|sector| {
                sector.readers += 1;
                sector.floor
            })
            .collect();
        ReadTicket { lba, floors }
    }

    /// A read ends with this data, or with none.
    pub fn end_read(
        &mut self,
        ticket: ReadTicket,
        data: Option<&[u8]>,
    ) -> std::result::Result<(), Wrong> {
        let result = data.map_or(Ok(()), |data| {
            let sectors = data.chunks(SECTOR).map(Some).chain(std::iter::repeat(None));
            (ticket.lba..)
                .zip(&ticket.floors)
                .zip(sectors)
                .try_for_each(|((lba, floor), sector)| self.check(lba, *floor, sector))
        });
        for sector in self.range(ticket.lba, ticket.floors.len()) {
            sector.readers -= 1;
            sector.forget();
        }
        result
    }

    /// Checks bytes that were just read by another way, as from the image of a
    /// stopped target: sectors from `lba` on.
    pub fn check_now(&self, lba: u64, data: &[u8]) -> std::result::Result<(), Wrong> {
        (lba..)
            .zip(data.chunks(SECTOR))
            .filter(|(lba, _)| (self.first..self.first + self.count()).contains(lba))
            .try_for_each(|(lba, sector)| {
                let floor = self.sectors[(lba - self.first) as usize].floor;
                self.check(lba, floor, Some(sector))
            })
    }

    fn check(&self, lba: u64, floor: u64, data: Option<&[u8]>) -> std::result::Result<(), Wrong> {
        let state = &self.sectors[(lba - self.first) as usize];
        let seen = data.map(|data| pattern::look(data, self.seed));
        let untouched = floor == 0;
        let right = match seen {
            Some(Seen::Pattern { lba: of, .. }) if of != lba => false,
            Some(Seen::Pattern { generation: 0, .. }) => {
                untouched && self.initial != Initial::Zeros
            }
            Some(Seen::Pattern { generation, .. }) => state
                .versions
                .iter()
                .any(|v| v.generation == generation && v.end >= floor),
            Some(Seen::Zeros) => untouched && self.initial != Initial::Pattern,
            Some(Seen::Other) => untouched && self.initial == Initial::Any,
            Some(Seen::Torn { .. }) | None => false,
        };
        if right {
            return Ok(());
        }
        let holds = match (seen, data) {
            (Some(Seen::Pattern { lba, generation }), _) => {
                format!("holds generation {generation} of sector {lba}")
            }
            (
                Some(Seen::Torn {
                    lba,
                    generation,
                    offset,
                }),
                _,
            ) => format!(
                "begins as generation {generation} of sector {lba} and is something else from byte {offset} on"
            ),
            (Some(Seen::Zeros), _) => "holds zeros".to_owned(),
            (Some(Seen::Other), Some(data)) => {
                format!("holds foreign bytes {:02x?}..", &data[..data.len().min(16)])
            }
            _ => "is missing from the answer".to_owned(),
        };
        let mut allowed: Vec<String> = state
            .versions
            .iter()
            .filter(|v| v.end >= floor)
            .map(|v| {
                let open = if v.end == OPEN { " (open)" } else { "" };
                format!("{}{open}", v.generation)
            })
            .collect();
        if untouched {
            allowed.insert(0, format!("what was there at first ({:?})", self.initial));
        }
        Err(Wrong {
            lba,
            why: format!(
                "{holds}; allowed: {}; last acknowledged when asked: {floor}, now: {}; seed {}",
                allowed.join(", "),
                state.floor,
                self.seed
            ),
        })
    }

    fn range(&mut self, lba: u64, count: usize) -> &mut [Sector] {
        let from = (lba - self.first) as usize;
        &mut self.sectors[from..from + count]
    }
}

impl Sector {
    /// Forgets versions that no read can see any more.
    fn forget(&mut self) {
        if self.readers == 0 {
            let floor = self.floor;
            self.versions.retain(|v| v.end >= floor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Disk {
        model: Model,
        data: Vec<u8>,
    }

    impl Disk {
        fn new(initial: Initial) -> Disk {
            Disk {
                model: Model::new(10, 4, 99, initial),
                data: vec![0; 4 * SECTOR],
            }
        }

        fn begin(&mut self, lba: u64, count: usize) -> u64 {
            let generation = self.model.begin_write(lba, count);
            self.model.sent(generation, 1);
            generation
        }

        fn carry_out(&mut self, generation: u64, lba: u64, count: usize) {
            let from = (lba - 10) as usize * SECTOR;
            let to = from + count * SECTOR;
            self.model.fill(generation, lba, &mut self.data[from..to]);
        }

        fn finish(&mut self, generation: u64) {
            self.model.answered(generation);
            self.model.acknowledged(generation);
        }

        fn read(&mut self) -> std::result::Result<(), Wrong> {
            let ticket = self.model.begin_read(10, 4);
            let data = self.data.clone();
            self.model.end_read(ticket, Some(&data))
        }
    }

    #[test]
    fn an_acknowledged_write_must_be_there() {
        let mut disk = Disk::new(Initial::Zeros);
        disk.read().unwrap();
        let g = disk.begin(11, 2);
        disk.read().unwrap();
        disk.finish(g);
        assert_eq!(disk.read().unwrap_err().lba, 11);
        disk.carry_out(g, 11, 1);
        assert_eq!(disk.read().unwrap_err().lba, 12);
        disk.carry_out(g, 11, 2);
        disk.read().unwrap();
        disk.model.check_now(10, &disk.data.clone()).unwrap();
        // The right bytes in the wrong place.
        let sector = disk.data[SECTOR..2 * SECTOR].to_vec();
        disk.data[..SECTOR].copy_from_slice(&sector);
        let wrong = disk.read().unwrap_err();
        assert!(
            wrong
                .to_string()
                .starts_with("sector 10: holds generation 1 of sector 11;")
        );
    }

    #[test]
    fn of_two_at_once_either_may_win_and_of_two_in_turn_the_later() {
        let mut disk = Disk::new(Initial::Any);
        let (a, b) = (disk.begin(10, 4), disk.begin(10, 4));
        disk.finish(b);
        disk.finish(a);
        disk.carry_out(a, 10, 4);
        disk.read().unwrap();
        disk.carry_out(b, 10, 4);
        disk.read().unwrap();
        let c = disk.begin(10, 4);
        disk.read().unwrap();
        disk.finish(c);
        assert!(disk.read().is_err());
        disk.carry_out(a, 10, 4);
        assert!(disk.read().is_err());
        disk.carry_out(c, 10, 4);
        disk.read().unwrap();
    }

    #[test]
    fn a_read_under_way_may_see_what_was_there_when_it_began() {
        let mut disk = Disk::new(Initial::Zeros);
        let a = disk.begin(10, 4);
        disk.carry_out(a, 10, 4);
        disk.finish(a);
        let old = disk.data.clone();
        let (early, late);
        early = disk.model.begin_read(10, 4);
        let b = disk.begin(10, 4);
        disk.carry_out(b, 10, 4);
        disk.finish(b);
        late = disk.model.begin_read(10, 4);
        disk.model.end_read(early, Some(&old)).unwrap();
        assert!(disk.model.end_read(late, Some(&old)).is_err());
        disk.read().unwrap();
    }

    #[test]
    fn a_copy_still_on_its_way_may_land_later_and_none_after_it_arrived() {
        let mut disk = Disk::new(Initial::Zeros);
        let a = disk.begin(10, 4);
        disk.model.sent(a, 1);
        disk.finish(a);
        let b = disk.begin(10, 4);
        disk.finish(b);
        disk.carry_out(a, 10, 4);
        disk.read().unwrap();
        assert_eq!(disk.model.open_writes(), 1);
        assert!(disk.model.answered(a));
        disk.read().unwrap();
        // Over by now, so what begins now is later.
        let c = disk.begin(10, 4);
        disk.finish(c);
        assert!(disk.read().is_err());
    }

    #[test]
    fn where_copies_are_recognised_they_do_not_land() {
        let mut disk = Disk::new(Initial::Zeros);
        disk.model.deduplicated(true);
        let a = disk.begin(10, 4);
        disk.model.sent(a, 5);
        disk.finish(a);
        let b = disk.begin(10, 4);
        disk.finish(b);
        disk.carry_out(a, 10, 4);
        assert!(disk.read().is_err());
    }

    #[test]
    fn a_failed_write_may_be_there_or_not_until_overwritten() {
        let mut disk = Disk::new(Initial::Zeros);
        let a = disk.begin(10, 4);
        disk.model.answered(a);
        disk.model.failed(a);
        assert_eq!(disk.model.open_writes(), 0);
        disk.read().unwrap();
        disk.carry_out(a, 10, 4);
        disk.read().unwrap();
        let b = disk.begin(10, 4);
        disk.finish(b);
        assert!(disk.read().is_err());
    }

    #[test]
    fn torn_and_foreign_sectors_are_described() {
        let mut disk = Disk::new(Initial::Pattern);
        assert!(disk.read().unwrap_err().why.starts_with("holds zeros"));
        Model::initial(99, 10, &mut disk.data);
        disk.read().unwrap();
        let g = disk.begin(12, 1);
        disk.carry_out(g, 12, 1);
        let old = disk.data[2 * SECTOR..].to_vec();
        disk.data[2 * SECTOR + 300] ^= 0xFF;
        let why = disk.read().unwrap_err().why;
        assert!(why.contains("is something else from byte 296 on"), "{why}");
        disk.data[2 * SECTOR..].copy_from_slice(&old);
        disk.data[3 * SECTOR] = b'x';
        let wrong = disk.read().unwrap_err();
        assert_eq!(wrong.lba, 13);
        assert!(wrong.why.starts_with("holds foreign bytes [78, 6f"));
        let short = disk.model.begin_read(10, 4);
        let data = &disk.data[..3 * SECTOR].to_vec();
        let wrong = disk.model.end_read(short, Some(data)).unwrap_err();
        assert!(wrong.why.starts_with("is missing"));
    }
}
