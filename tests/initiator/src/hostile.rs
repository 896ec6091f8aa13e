//! Frames as they really came, and what chance makes of them.
//!
//! Everything is drawn from a seed: the same seed makes the same frames.

use crate::engine::rng::Rng;

/// Requests of real initiators; see the head of the file.
const CAPTURED: &str = include_str!("../../vectors/requests.hex");

/// The frames of `tests/vectors/requests.hex`.
#[allow(clippy::panic)]
pub fn captured() -> Vec<Vec<u8>> {
    let lines = CAPTURED.lines();
    lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| bytes(line).unwrap_or_else(|| panic!("no frame: {line}")))
        .collect()
}

/// The bytes of a line: hexadecimal, and `xx*N` for one that comes N times.
fn bytes(line: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for word in line.split(' ') {
        let (digits, times) = match word.split_once('*') {
            Some((digits, times)) => (digits, times.parse().ok()?),
            None => (word, 1),
        };
        if digits.len() % 2 != 0 {
            return None;
        }
        let some: Option<Vec<u8>> = (0..digits.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok())
            .collect();
        bytes.extend(some?.repeat(times));
    }
    Some(bytes)
}

/// What is drawn from a seed.
#[derive(Clone, Debug)]
pub struct Chance(Rng);

impl Chance {
    /// The draws of this seed.
    pub fn new(seed: u64) -> Chance {
        Chance(Rng::new(seed))
    }

    /// A number.
    pub fn draw(&mut self) -> u64 {
        self.0.draw()
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        self.0.below(end as u64) as usize
    }

    /// Whether it is one case in `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of these, of which there is at least one.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.draw() as u8).collect()
    }

    /// Does one or several bad things to a frame; what lies before `from`
    /// stays, so that it can still reach its target.
    pub fn spoil(&mut self, frame: &mut Vec<u8>, from: usize, longest: usize) {
        // Values at which lengths and counts break.
        const EDGES: [u8; 10] = [0, 1, 2, 3, 4, 0x7F, 0x80, 0xEC, 0xFE, 0xFF];
        for _ in 0..=self.below(3) {
            let len = frame.len();
            match self.below(6) {
                0 => frame.truncate(from.max(self.below(len + 1))),
                1 => {
                    let more = self.below(longest.saturating_sub(len) + 1);
                    let more = self.bytes(more);
                    frame.extend(more);
                }
                2 if len > from => {
                    let at = from + self.below(len - from);
                    frame[at] ^= 1 << self.below(8);
                }
                // Where the fields are.
                3 | 4 if len > from => {
                    let at = from + self.below((len - from).min(24));
                    frame[at] = *self.pick(&EDGES);
                }
                _ if len > from => {
                    let at = from + self.below(len - from);
                    let run = self.below(16).min(len - at);
                    let noise = self.bytes(run);
                    frame[at..at + run].copy_from_slice(&noise);
                }
                _ => {}
            }
        }
        frame.truncate(longest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_captured_frames_are_requests() {
        let frames = captured();
        assert!(frames.len() > 10);
        for frame in &frames {
            assert_eq!(frame[12..15], [0x88, 0xA2, 0x10]);
            assert!((32..=1514).contains(&frame.len()));
        }
        assert_eq!(bytes("01ff 00*3 02"), Some(vec![1, 0xFF, 0, 0, 0, 2]));
        assert_eq!(bytes("1"), None);
    }

    #[test]
    fn spoiling_keeps_what_it_must_and_repeats_itself() {
        let run = |seed| {
            let mut chance = Chance::new(seed);
            let mut frame = vec![7; 60];
            chance.spoil(&mut frame, 20, 100);
            frame
        };
        let mut changed = 0;
        for seed in 0..200 {
            let frame = run(seed);
            assert_eq!(frame, run(seed));
            assert!((20..=100).contains(&frame.len()));
            assert_eq!(frame[..20], [7; 20]);
            changed += usize::from(frame != [7; 60]);
        }
        assert!(changed > 150, "{changed}");
    }
}
