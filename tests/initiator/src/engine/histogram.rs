//! Latencies in fixed memory.
//!
//! Buckets are linear within each power of two, 32 to each, so a value is known
//! to 3 percent, from one nanosecond to centuries, in 15 KiB.

use std::time::Duration;

const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;
const BUCKETS: usize = SUB * (64 - SUB_BITS as usize + 1);

/// Counts of durations.
#[derive(Clone)]
pub struct Histogram {
    buckets: Box<[u64; BUCKETS]>,
    count: u64,
    sum: u128,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            buckets: Box::new([0; BUCKETS]),
            count: 0,
            sum: 0,
            max: 0,
        }
    }
}

impl Histogram {
    /// Counts one.
    pub fn record(&mut self, value: Duration) {
        self.record_nanos(u64::try_from(value.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Counts one, in nanoseconds.
    pub fn record_nanos(&mut self, nanos: u64) {
        self.buckets[bucket(nanos)] += 1;
        self.count += 1;
        self.sum += u128::from(nanos);
        self.max = self.max.max(nanos);
    }

    /// Adds the counts of another.
    pub fn merge(&mut self, other: &Histogram) {
        for (to, from) in self.buckets.iter_mut().zip(other.buckets.iter()) {
            *to += from;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest, exactly.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// The mean, exactly; zero of none.
    pub fn mean(&self) -> Duration {
        let mean = self.sum.checked_div(u128::from(self.count)).unwrap_or(0);
        Duration::from_nanos(mean as u64)
    }

    /// The least value that so many of a thousand do not exceed, rounded up to
    /// the end of its bucket; zero of none.
    pub fn per_mille(&self, per_mille: u64) -> Duration {
        let rank = (u128::from(self.count) * u128::from(per_mille)).div_ceil(1000);
        let mut passed = 0;
        for (index, n) in self.buckets.iter().enumerate() {
            passed += u128::from(*n);
            if *n > 0 && passed >= rank {
                return Duration::from_nanos(end(index).min(self.max));
            }
        }
        self.max()
    }
}

/// Which bucket a value is counted in.
fn bucket(value: u64) -> usize {
    let bits = 64 - value.leading_zeros();
    match bits.checked_sub(SUB_BITS + 1) {
        None => value as usize,
        // The leading bit says which row, the next ones the place in it.
        Some(row) => (row as usize) * SUB + (value >> row) as usize,
    }
}

/// The largest value of a bucket.
fn end(index: usize) -> u64 {
    if index < 2 * SUB {
        return index as u64;
    }
    let row = (index / SUB - 1) as u32;
    let place = (index % SUB + SUB) as u128;
    u64::try_from(((place + 1) << row) - 1).unwrap_or(u64::MAX)
}

impl std::fmt::Display for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "p50 {:.1?} p90 {:.1?} p99 {:.1?} p99.9 {:.1?} max {:.1?}",
            self.per_mille(500),
            self.per_mille(900),
            self.per_mille(990),
            self.per_mille(999),
            self.max()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::rng::Rng;

    #[test]
    fn buckets_are_in_order_and_three_percent_wide() {
        let mut last = 0;
        for index in 1..BUCKETS {
            assert_eq!(bucket(end(index)), index);
            assert_eq!(bucket(end(index - 1) + 1), index, "first of {index}");
            let width = end(index) - end(index - 1);
            assert!(width == 1 || width <= end(index) / SUB as u64);
            assert!(end(index) > last);
            last = end(index);
        }
        assert_eq!(last, u64::MAX);
    }

    #[test]
    fn percentiles_are_those_of_a_sorted_list() {
        let mut rng = Rng::new(7);
        let mut list: Vec<u64> = (0..20_000)
            .map(|_| {
                let bits = rng.below(40);
                rng.below(1 << bits)
            })
            .collect();
        let (mut a, mut b) = (Histogram::default(), Histogram::default());
        for (index, value) in list.iter().enumerate() {
            let half = if index % 2 == 0 { &mut a } else { &mut b };
            half.record(Duration::from_nanos(*value));
        }
        a.merge(&b);
        list.sort_unstable();
        for p in [1, 500, 900, 990, 999, 1000] {
            let exact = list[(list.len() * p / 1000).max(1) - 1];
            let got = a.per_mille(p as u64).as_nanos() as u64;
            assert!(
                got >= exact && got <= exact + exact / 31 + 1,
                "{p}: {got} for {exact}"
            );
        }
        assert_eq!(a.count(), 20_000);
        assert_eq!(a.max().as_nanos() as u64, list[19_999]);
        let mean = list.iter().sum::<u64>() / 20_000;
        assert_eq!(a.mean().as_nanos() as u64, mean);
    }

    #[test]
    fn of_none_all_is_zero() {
        let none = Histogram::default();
        assert_eq!((none.per_mille(500), none.mean()), Default::default());
    }
}
