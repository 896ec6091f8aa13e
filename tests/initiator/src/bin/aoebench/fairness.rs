//! `aoebench fairness`: what a polite initiator gets beside a hostile one, of what
//! it gets while the same hostile frames go to another shelf.

mod cases;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aoede::wire::MacAddr;
use clap::Args;
use initiator::client::Client;
use initiator::engine::{Engine, Plan};
use initiator::error::{Error, Result};
use initiator::frame::Defaults;
use initiator::lab::{
    Deadline, Loop, Namespace, Need, Process, SlowDisk, Spawn, Veth, missing, pin,
};
use initiator::port::{Hear, Port, Receive};
use nix::unistd::Pid;

use crate::table::median;
use cases::{CASES, Case, SECTORS, warm_up};

const MTU: u32 = 9000;
const SHELF: u16 = 1;
const SLOT: u8 = 1;
/// The addresses of both initiators. The target has a queue for each, since they
/// differ in the last byte alone; of addresses drawn at random one pair in 64 would
/// share one.
const POLITE: &str = "02:00:00:00:00:01";
const HOSTILE: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
/// The target works here, both initiators on the other processor.
const TARGET_CORE: usize = 0;
const OUR_CORE: usize = 1;
/// The time between two looks how many hostile frames are due.
const STEP: Duration = Duration::from_micros(500);
/// The most hostile frames sent at a time: what was missed by more is left out.
const BURST: u64 = 64;
const START: u64 = 20;
const STOP: u64 = 60;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The aoede to measure; without it, the one beside this program
    #[arg(long, value_name = "PATH")]
    aoede: Option<PathBuf>,
    /// Arguments for it, before shelf and slot
    #[arg(
        long,
        value_name = "ARGUMENTS",
        default_value = "",
        allow_hyphen_values = true
    )]
    aoede_args: String,
    /// Reads, writes and flushes that the slow disk does in a second, all together
    #[arg(long, default_value_t = 500)]
    iops: u32,
    /// How often each case is measured
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How long each time
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Fail if the median ratio of a case is less
    #[arg(long)]
    min_ratio: Option<f64>,
    /// Cases, as many as wanted; all without any
    #[arg(value_parser = case)]
    cases: Vec<&'static Case>,
}

fn case(text: &str) -> std::result::Result<&'static Case, String> {
    CASES.iter().find(|case| case.name == text).ok_or_else(|| {
        let names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        format!("'{text}' is none of {}", names.join(", "))
    })
}

/// Operations a second of the polite initiator in one round.
#[derive(Clone, Copy)]
struct Round {
    control: f64,
    beside: f64,
}

impl Round {
    fn ratio(&self) -> f64 {
        self.beside / self.control.max(1e-9)
    }
}

pub(crate) fn run(a: &Arguments, stop: &AtomicBool) -> Result<()> {
    let needs = [&Loop::NEEDS[..], &[SlowDisk::NEED, Need::Processors(2)]].concat();
    if let Some(missing) = missing(&needs) {
        return Err(Error::Unexpected(format!("fairness needs {missing}")));
    }
    let cases: Vec<&Case> = match a.cases[..] {
        [] => CASES.iter().collect(),
        ref some => some.to_vec(),
    };
    let aoede = program(a)?;
    let bench = Bench {
        arguments: a,
        aoede: &aoede,
        stop,
        folder: Folder::new()?,
        host: Namespace::new()?,
    };
    let peer = Namespace::new()?;
    let _wire = Veth::new(("i0", &peer), ("t0", &bench.host), MTU)?;
    peer.ip(&["link", "set", "i0", "address", POLITE])?;
    let mut rounds: Vec<Vec<Round>> = cases.iter().map(|_| Vec::new()).collect();
    let result = peer.enter(|| -> Result<()> {
        pin(Pid::from_raw(0), OUR_CORE)?;
        for round in 0..a.rounds {
            for (case, rounds) in cases.iter().zip(&mut rounds) {
                let measure = |shelf| bench.measure(case, shelf);
                // In turns, since the second of two may find a busier machine.
                let (control, beside) = if round % 2 == 0 {
                    let control = measure(SHELF + 1)?;
                    (control, measure(SHELF)?)
                } else {
                    let beside = measure(SHELF)?;
                    (measure(SHELF + 1)?, beside)
                };
                let measured = Round { control, beside };
                eprintln!(
                    "round {} of {}, {}: {beside:.0}/s beside, {control:.0}/s control: {:.2}",
                    round + 1,
                    a.rounds,
                    case.name,
                    measured.ratio()
                );
                rounds.push(measured);
            }
        }
        Ok(())
    });
    // What was measured before it went wrong is worth seeing too.
    let ratios = print(&cases, &rounds);
    result??;
    let least = a.min_ratio.unwrap_or(0.0);
    let low: Vec<&str> = cases
        .iter()
        .zip(ratios)
        .filter(|(_, ratio)| ratio.is_none_or(|ratio| ratio < least))
        .map(|(case, _)| case.name)
        .collect();
    if low.is_empty() {
        return Ok(());
    }
    let low = low.join(", ");
    Err(Error::Unexpected(format!("ratio below {least}: {low}")))
}

/// Prints what was measured; returns the median ratio of each case.
fn print(cases: &[&Case], rounds: &[Vec<Round>]) -> Vec<Option<f64>> {
    let width = cases.iter().map(|case| case.name.len()).max().unwrap_or(0);
    let three = "min median max";
    println!(
        "{:width$}  {:>24}  {:>24}  {:>17}  what",
        "case",
        format!("control/s {three}"),
        format!("beside/s {three}"),
        "ratio",
    );
    let mut ratios = Vec::new();
    for (case, rounds) in cases.iter().zip(rounds) {
        let of = |what: fn(&Round) -> f64| rounds.iter().map(what).collect::<Vec<f64>>();
        let control = of(|round| round.control);
        let beside = of(|round| round.beside);
        let ratio = of(Round::ratio);
        println!(
            "{:width$}  {:>24}  {:>24}  {:>17}  {}",
            case.name,
            spread(&control, 0),
            spread(&beside, 0),
            spread(&ratio, 2),
            case.what
        );
        ratios.push(median(&ratio));
    }
    ratios
}

/// Least, median and greatest of some values.
fn spread(values: &[f64], digits: usize) -> String {
    let Some(median) = median(values) else {
        return "-".to_owned();
    };
    let least = values.iter().copied().fold(f64::MAX, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    format!("{least:.digits$} {median:.digits$} {most:.digits$}")
}

/// The program to measure.
fn program(a: &Arguments) -> Result<PathBuf> {
    if let Some(path) = &a.aoede {
        return Ok(path.clone());
    }
    let own = std::env::current_exe().map_err(Error::system("own path"))?;
    let path = own.with_file_name("aoede");
    if path.is_file() {
        return Ok(path);
    }
    let path = path.display();
    Err(Error::Unexpected(format!(
        "{path} is not there: build it (cargo build --release --workspace), or give --aoede"
    )))
}

/// A directory in memory for image, state and arena. Dropping it removes it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder> {
        let shared = Path::new("/dev/shm");
        let memory = if shared.is_dir() {
            shared.to_owned()
        } else {
            std::env::temp_dir()
        };
        let path = memory.join(format!("aoebench-{}", std::process::id()));
        fs::create_dir(&path).map_err(Error::system(path.display().to_string()))?;
        Ok(Folder(path))
    }

    /// An image of zeros without a name.
    fn image(&self) -> Result<File> {
        let path = self.join("disk.img");
        let image = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        let image = image.map_err(Error::system(path.display().to_string()))?;
        fs::remove_file(&path).map_err(Error::system(path.display().to_string()))?;
        image
            .set_len(SECTORS * 512)
            .map_err(Error::system(path.display().to_string()))?;
        Ok(image)
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            eprintln!("{} is left behind: {e}", self.0.display());
        }
    }
}

/// What all measurements have in common.
struct Bench<'a> {
    arguments: &'a Arguments,
    aoede: &'a Path,
    stop: &'a AtomicBool,
    folder: Folder,
    host: Namespace,
}

impl Bench<'_> {
    /// Starts a target on an empty disk; returns what the polite initiator gets
    /// while hostile frames go to a shelf, in operations a second.
    fn measure(&self, case: &Case, shelf: u16) -> Result<f64> {
        let image = self.folder.image()?;
        let device = SlowDisk::new(image, &self.folder.join("slow"), case.sector)?;
        let mut target = self.start(case, &device)?;
        let mut client = Client::open_receiving("i0", Receive::Ring)?;
        client.connect(SHELF, SLOT)?;
        let to = client.target_mac();
        let mut engine = Engine::new(client)?;
        if case.warm {
            self.run(&mut engine, &warm_up())?;
        }
        if case.slow {
            device.set_pace(Duration::from_secs(1) / self.arguments.iops.max(1));
        }
        // Nothing that is sent to it gets through its filter.
        let port = Port::open("i0", &Hear::Requests, Receive::Recvmmsg)?;
        let defaults = Defaults {
            destination: to,
            source: HOSTILE,
            shelf,
            slot: SLOT,
            tag: [0; 4],
        };
        let ended = AtomicBool::new(false);
        let measured = thread::scope(|scope| {
            let hostile = scope.spawn(|| attack(case, &port, defaults, &ended));
            let time = Duration::try_from_secs_f64(self.arguments.seconds).unwrap_or_default();
            let mut plan = (case.polite)();
            // Until the hostile initiator has filled what it can fill.
            plan.seed = 1;
            let lead = self.run_for(&mut engine, &plan, time / 2);
            plan.seed = 2;
            let measured = lead.and_then(|_| self.run_for(&mut engine, &plan, time));
            ended.store(true, Ordering::Relaxed);
            let hostile = hostile.join();
            hostile.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            measured
        });
        device.set_pace(Duration::ZERO);
        let status = target.stop(Deadline::seconds(STOP))?;
        let measured = measured?;
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Unexpected("interrupted".into()));
        }
        if !status.success() {
            let said = target.output().join("\n  ");
            return Err(Error::Program(format!("{status}; it said:\n  {said}")));
        }
        Ok(measured)
    }

    fn start(&self, case: &Case, device: &SlowDisk) -> Result<Process> {
        let mut process = Spawn::new(self.aoede)
            .inside(&self.host)
            .on_core(TARGET_CORE)
            .args(["--set", "address_probe=10"])
            .args(case.options.iter().copied())
            .args(self.arguments.aoede_args.split_whitespace())
            .args([&SHELF.to_string(), &SLOT.to_string(), "t0"])
            .arg(device.path())
            .arg("--state-dir")
            .arg(self.folder.join("state"))
            .arg("--run-dir")
            .arg(self.folder.join("run"))
            .start()?;
        process.wait_for_line(": e1.1, ", Deadline::seconds(START))?;
        Ok(process)
    }

    fn run(&self, engine: &mut Engine, plan: &Plan) -> Result<f64> {
        let stopped = || self.stop.load(Ordering::Relaxed);
        Ok(engine.run_until(plan, stopped)?.clean()?.rate())
    }

    /// Runs a plan for so long. Requests without an answer do not end it.
    fn run_for(&self, engine: &mut Engine, plan: &Plan, time: Duration) -> Result<f64> {
        let end = Instant::now() + time;
        let stopped = || self.stop.load(Ordering::Relaxed) || Instant::now() >= end;
        Ok(engine.run_until(plan, stopped)?.clean()?.rate())
    }
}

/// Sends the hostile frames of a case in their rhythm until the measurement has
/// ended.
fn attack(case: &Case, port: &Port, defaults: Defaults, ended: &AtomicBool) -> Result<()> {
    let (start, mut sent) = (Instant::now(), 0);
    while !ended.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_secs_f64() * f64::from(case.rate)) as u64;
        sent = sent.max(due.saturating_sub(BURST));
        while sent <= due {
            let tag = (sent as u32 | 0x4000_0000).to_be_bytes();
            let frame = (case.hostile)(sent).encode(&Defaults { tag, ..defaults });
            port.send_one(&frame)?;
            sent += 1;
        }
        thread::sleep(STEP);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_found_by_their_names() {
        for known in &CASES {
            assert_eq!(case(known.name).map(|found| found.name), Ok(known.name));
        }
        assert!(case("none").is_err());
    }

    #[test]
    fn hostile_frames_fit_the_wire_and_stay_in_their_half() {
        let defaults = Defaults {
            destination: HOSTILE,
            source: HOSTILE,
            shelf: SHELF,
            slot: SLOT,
            tag: [0; 4],
        };
        for case in &CASES {
            for n in 0..10_000 {
                let bytes = (case.hostile)(n).encode(&defaults);
                assert!(bytes.len() <= MTU as usize + 14, "{}", case.name);
            }
        }
    }

    #[test]
    fn three_numbers_of_a_spread() {
        assert_eq!(spread(&[3.0, 1.0, 2.0], 1), "1.0 2.0 3.0");
        assert_eq!(spread(&[], 1), "-");
    }
}
