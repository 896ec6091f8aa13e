//! TRIM among writes in all phases, against a plain array: what is trimmed is
//! zeros whatever dies, and a thaw that nobody disturbs comes to its end.

use std::time::Instant;

use initiator::engine::rng::Rng;

use super::*;
use crate::devices::trim;
use crate::rig::SOON;

/// How long it goes on, unless AOEDE_KILLS says how often.
const SWEEP: Duration = Duration::from_secs(5);
const SECTORS: usize = 3000;

struct Trims {
    bed: Bed,
    target: Process,
    client: Client,
    model: Vec<u8>,
    rng: Rng,
    /// What the image was when PATH appeared, until a thaw is ordered.
    still: Option<Vec<u8>>,
    log: Vec<String>,
}

impl Trims {
    fn range(&mut self, most: u64) -> (usize, usize) {
        let first = self.rng.below(SECTORS as u64 - most);
        (first as usize, 1 + self.rng.below(most) as usize)
    }

    fn write(&mut self) {
        let (first, count) = self.range(60);
        let bytes = data(self.rng.below(256) as u8, count);
        self.client.write_many(first as u64, &bytes).unwrap();
        self.model[first * 512..][..bytes.len()].copy_from_slice(&bytes);
        self.log.push(format!("write {first} {count}"));
    }

    fn trim(&mut self) {
        let ranges: Vec<(usize, usize)> = (0..1 + self.rng.below(3))
            .map(|_| self.range(300))
            .collect();
        let asked: Vec<(u64, u64)> = ranges.iter().map(|(a, b)| (*a as u64, *b as u64)).collect();
        let patience = initiator::client::Patience::once(SOON);
        let reply = self.client.call_with(&trim(&asked), patience).unwrap();
        assert_eq!(reply.error(), None);
        assert_eq!(reply.ata().unwrap().status & 0x41, 0x40, "{reply:?}");
        for (first, count) in &ranges {
            self.model[first * 512..(first + count) * 512].fill(0);
        }
        self.log.push(format!("trim {ranges:?}"));
    }

    fn check(&mut self) {
        let seen = self.client.read_many(0, SECTORS).unwrap();
        for (n, (a, b)) in seen.chunks(512).zip(self.model.chunks(512)).enumerate() {
            assert!(a == b, "sector {n} after {:#?}", self.log);
        }
        if let Some(still) = &self.still {
            assert!(self.bed.shadow().exists() && self.bed.image() == *still);
        }
    }

    fn kill(&mut self) {
        self.log.push("kill".into());
        self.target.kill().unwrap();
        self.target = self.bed.start(&[]);
        self.client.connect(1, 1).unwrap();
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..50 => self.write(),
            50..68 => self.trim(),
            68..75 => self.client.flush().unwrap(),
            75..82 => self.check(),
            82..86 => self.kill(),
            86..92 if self.bed.shadows().is_empty() => {
                self.log.push("freeze".into());
                self.bed.freeze(&self.target);
                self.still = Some(self.bed.image());
            }
            92.. if self.still.is_some() => {
                self.log.push("thaw".into());
                self.still = None;
                order(&self.target, 2);
                match self.rng.below(3) {
                    0 => self.kill(),
                    1 => {
                        self.trim();
                        self.write();
                    }
                    _ => {}
                }
                // A kill may have come before the order was heard.
                let bed = &self.bed;
                let target = &self.target;
                let _says = Says(target);
                let heard = |line: &String| {
                    line.contains(": thaw: ") || line.contains("the interrupted thaw goes on")
                };
                if bed.shadow().exists() && !target.output().iter().any(heard) {
                    order(target, 2);
                }
                until("the shadow vanishes", || bed.shadows().is_empty());
                self.log.clear();
            }
            _ => {}
        }
    }
}

#[test]
fn what_is_trimmed_is_zeros_in_every_phase() {
    if !lab::require("TRIM in every phase", &[Need::Network]) {
        return;
    }
    let seed = std::env::var("AOEDE_SEED").map_or(1, |n| n.parse().unwrap());
    let rounds: Option<u64> = std::env::var("AOEDE_KILLS")
        .ok()
        .map(|n| n.parse().unwrap());
    let bed = Bed::with(9000, SECTORS as u64);
    let mut trims = Trims {
        target: bed.start(&[]),
        client: bed.client(),
        bed,
        model: vec![0; SECTORS * 512],
        rng: Rng::new(seed),
        still: None,
        log: Vec::new(),
    };
    let start = Instant::now();
    let mut steps = 0;
    while rounds.map_or(start.elapsed() < SWEEP, |rounds| steps < 20 * rounds) {
        trims.step();
        steps += 1;
    }
    println!("{steps} steps");
    trims.check();
    if trims.still.take().is_some() {
        trims.bed.thaw(&trims.target);
    }
    trims.check();
    stop(trims.target);
    trims.bed.nothing_left();
    assert!(trims.bed.image() == trims.model);
}
