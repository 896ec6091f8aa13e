//! What was measured, as a table.

use std::fmt::Write as _;
use std::time::Duration;

/// One case on one target in one round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Operations a second.
    pub(crate) rate: f64,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    /// Processor time of the target for one operation, in microseconds.
    pub(crate) cpu: f64,
}

/// All that was measured: by round, target, case.
pub(crate) struct Table {
    cases: Vec<String>,
    targets: Vec<String>,
    samples: Vec<(usize, usize, usize, Sample)>,
}

impl Table {
    pub(crate) fn new(cases: Vec<String>, targets: Vec<String>) -> Table {
        Table {
            cases,
            targets,
            samples: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, round: usize, target: usize, case: usize, sample: Sample) {
        self.samples.push((round, target, case, sample));
    }

    pub(crate) fn print(&self) -> String {
        let mut out = String::new();
        let width = self.cases.iter().map(String::len).max().unwrap_or(0);
        let _ = write!(
            out,
            "{:width$}  {:9} {:>8} {:>7} {:>9} {:>9} {:>8}",
            "case", "target", "kop/s", "spread", "p50 us", "p99 us", "CPU us"
        );
        for target in &self.targets {
            let _ = write!(out, " {:>11}", format!("x {target}"));
        }
        out.push('\n');
        for (c, case) in self.cases.iter().enumerate() {
            for (t, target) in self.targets.iter().enumerate() {
                let of = |what: fn(&Sample) -> f64| -> Vec<f64> {
                    self.of(t, c).map(|(_, s)| what(&s)).collect()
                };
                let rates = of(|s| s.rate);
                let Some(rate) = median(&rates) else {
                    continue;
                };
                let least = rates.iter().copied().fold(f64::MAX, f64::min);
                let most = rates.iter().copied().fold(0.0, f64::max);
                let number = |what| median(&of(what)).unwrap_or(0.0);
                let _ = write!(
                    out,
                    "{case:width$}  {target:9} {:8.1} {:6.0}% {:9.1} {:9.1} {:8.2}",
                    rate / 1e3,
                    100.0 * (most - least) / rate,
                    number(|s| s.p50.as_secs_f64() * 1e6),
                    number(|s| s.p99.as_secs_f64() * 1e6),
                    number(|s| s.cpu),
                );
                for other in 0..self.targets.len() {
                    let _ = match self.ratio(t, other, c) {
                        Some(ratio) => write!(out, " {ratio:>11.2}"),
                        None => write!(out, " {:>11}", "-"),
                    };
                }
                out.push('\n');
            }
        }
        out
    }

    fn of(&self, target: usize, case: usize) -> impl Iterator<Item = (usize, Sample)> {
        self.samples
            .iter()
            .filter(move |(_, t, c, _)| (*t, *c) == (target, case))
            .map(|(round, _, _, sample)| (*round, *sample))
    }

    /// The median of the ratios within each round: the machine's mood changes
    /// from round to round, and is the same for both within one.
    fn ratio(&self, target: usize, other: usize, case: usize) -> Option<f64> {
        let ratios: Vec<f64> = self
            .of(target, case)
            .filter_map(|(round, sample)| {
                let (_, beside) = self.of(other, case).find(|(r, _)| *r == round)?;
                Some(sample.rate / beside.rate)
            })
            .collect();
        median(&ratios)
    }
}

/// Returns the median, of at least one value.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_of_rounds() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        let mut table = Table::new(vec!["read".into()], vec!["a".into(), "b".into()]);
        // The machine slows down fourfold, and a stays twice as fast as b.
        for (round, mood) in [(0, 4.0), (1, 2.0), (2, 1.0)] {
            for (target, speed) in [(0, 2000.0), (1, 1000.0)] {
                let sample = Sample {
                    rate: mood * speed,
                    p50: Duration::from_micros(10),
                    p99: Duration::from_micros(20),
                    cpu: 1.5,
                };
                table.add(round, target, 0, sample);
            }
        }
        let text = table.print();
        let row: Vec<&str> = text
            .lines()
            .nth(1)
            .unwrap_or("")
            .split_whitespace()
            .collect();
        assert_eq!(
            row,
            [
                "read", "a", "4.0", "150%", "10.0", "20.0", "1.50", "1.00", "2.00"
            ]
        );
        assert_eq!(text.lines().count(), 3);
    }
}
