//! `aoebench inner`.

use std::hint::black_box;
use std::time::Instant;

use aoede::dedup::Window;
use aoede::wire::crc::crc8x4;
use clap::Args;

/// Bytes that checksums are taken of in one round.
const BYTES: usize = 64 << 20;
/// Tags in one round.
const TAGS: u32 = 10_000_000;
/// The memory they lie in: more than a processor's first cache.
const MEMORY: usize = 256 << 10;

#[derive(Args)]
pub(crate) struct Arguments {
    /// How often each is measured; the best counts
    #[arg(long, default_value_t = 9)]
    rounds: usize,
}

/// Measures, without a network, what extensions cost a target for each frame.
pub(crate) fn run(arguments: &Arguments) {
    let memory: Vec<u8> = (0..MEMORY).map(|n| ((n * n) >> 5) as u8).collect();
    for size in [512, 1024, 4096, 8704] {
        let places = (MEMORY - size) / size;
        let times = BYTES / size;
        let seconds = best(arguments.rounds, || {
            for n in 0..times {
                let at = n % places * size;
                black_box(crc8x4(&[1; 12], black_box(&memory[at..at + size])));
            }
        }) / times as f64;
        println!(
            "CRC8x4 of {size} bytes: {:.0} ns, {:.1} GB/s",
            seconds * 1e9,
            size as f64 / seconds / 1e9
        );
    }
    let mut window = Window::new();
    let mut next = 0u32;
    let seconds = best(arguments.rounds, || {
        for _ in 0..TAGS {
            next = next.wrapping_add(1);
            let tag = black_box(next);
            window.see(tag);
            if !window.is_marked(tag) {
                window.mark(tag);
            }
        }
    });
    let each = seconds * 1e9 / f64::from(TAGS);
    println!("tag window: {each:.1} ns for a write");
}

/// The shortest time of so many rounds, in seconds.
fn best(rounds: usize, mut work: impl FnMut()) -> f64 {
    let once = |_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..rounds.max(1)).map(once).fold(f64::MAX, f64::min)
}
