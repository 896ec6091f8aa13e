//! A small random source: the same seed, the same run.

/// xorshift64 with a multiplication at the end (Marsaglia, Vigna).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A source; every seed gives another sequence.
    pub fn new(seed: u64) -> Rng {
        // The state must not be 0, and near seeds must not look alike.
        Rng(mix(seed).max(1))
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`; 0 if that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(bound)) >> 64) as u64
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&mut self, per_mille: u32) -> bool {
        per_mille > 0 && self.below(1000) < u64::from(per_mille)
    }
}

/// Spreads a number over all 64 bits (splitmix64).
pub fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_repeatable_and_stays_below() {
        let (mut a, mut b) = (Rng::new(0), Rng::new(0));
        let mut seen = [0; 10];
        for _ in 0..10_000 {
            let n = a.below(10);
            assert_eq!(n, b.below(10));
            seen[n as usize] += 1;
        }
        assert!(seen.iter().all(|n| (800..1200).contains(n)), "{seen:?}");
        assert_eq!(a.below(0), 0);
        let hits = (0..100_000).filter(|_| a.chance(50)).count();
        assert!((4_500..5_500).contains(&hits), "{hits}");
        assert!(!a.chance(0) && a.chance(1000));
    }
}
