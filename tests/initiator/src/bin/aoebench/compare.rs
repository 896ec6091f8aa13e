//! `aoebench compare`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use initiator::client::Client;
use initiator::engine::{Block, Engine, Op, Order, Plan, Tags};
use initiator::error::{Error, Result};
use initiator::lab::{Deadline, Namespace, Need, Process, Spawn, Veth, missing, pin};
use initiator::port::Receive;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::Pid;

use crate::answer::EngineName;
use crate::load::{OpName, coalesce};
use crate::table::{Sample, Table};

/// The target works here.
const TARGET_CORE: usize = 0;
/// And what loads it there.
const OUR_CORE: usize = 1;
/// How long a target may take to write back and end.
const STOP: u64 = 60;
/// The longest time for reading everything through a target once.
const WARM: Duration = Duration::from_secs(3);
/// How long a case runs before it is measured.
const LEAD: Duration = Duration::from_millis(100);

const CASES: [&str; 5] = [
    "randread:4096:32",
    "randread:4096:1",
    "randread:512:64",
    "read:8192:8",
    "randwrite:4096:32",
];

#[derive(Args)]
pub(crate) struct Arguments {
    /// The aoede to measure; may be left out
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
    /// A second one, to compare two builds or two settings
    #[arg(long, value_name = "PATH")]
    other: Option<PathBuf>,
    /// Arguments for the second one
    #[arg(
        long,
        value_name = "ARGUMENTS",
        default_value = "",
        allow_hyphen_values = true
    )]
    other_args: String,
    /// The vblade to measure
    #[arg(long, value_name = "PATH", default_value = "vblade")]
    vblade: String,
    /// Without vblade
    #[arg(long)]
    no_vblade: bool,
    /// Without the target of bare memory
    #[arg(long)]
    no_memory: bool,
    /// The image that is exported. WRITE CASES OVERWRITE IT
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// MTU of the wire
    #[arg(long, default_value_t = 9000)]
    mtu: u32,
    /// How often each case is measured
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each time
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// How our side receives
    #[arg(long, value_enum, default_value_t)]
    engine: EngineName,
    /// How the target of bare memory receives
    #[arg(long, value_enum, default_value_t)]
    memory_engine: EngineName,
    /// Look for replies without sleeping
    #[arg(long)]
    spin: bool,
    /// Let the target of bare memory spin
    #[arg(long)]
    memory_spin: bool,
    /// Begin with an image that is not in the page cache
    #[arg(long)]
    cold: bool,
    /// Give each target all processors instead of one
    #[arg(long)]
    no_pin: bool,
    /// OPERATION:BYTES:DEPTH, as many as wanted; without any, five usual ones.
    /// Extensions that aoede has may follow, as in randread:512:64:coalesce=16
    /// or randwrite:4096:32:crc:tags; batch=16 begins so many at once
    #[arg(value_parser = case)]
    cases: Vec<Case>,
}

#[derive(Clone)]
struct Case {
    name: String,
    op: Op,
    order: Order,
    block: Block,
    depth: usize,
    tags: Tags,
    crc: bool,
    coalesce: usize,
    batch: usize,
}

fn case(text: &str) -> std::result::Result<Case, String> {
    use clap::ValueEnum;
    let parts: Vec<&str> = text.split(':').collect();
    let [op, block, depth, ref extensions @ ..] = parts[..] else {
        return Err(format!("'{text}' is no case: give it as randread:4096:32"));
    };
    let (op, order) = OpName::from_str(op, true)?.op();
    let mut case = Case {
        name: text.to_owned(),
        op,
        order,
        block: match block {
            "jumbo" => Block::Jumbo,
            _ => Block::Bytes(crate::size(block)?),
        },
        depth: depth
            .parse()
            .map_err(|_| format!("'{depth}' is no depth"))?,
        tags: Tags::Plain,
        crc: false,
        coalesce: 1,
        batch: 1,
    };
    for extension in extensions {
        match extension.split_once('=').unwrap_or((extension, "")) {
            ("crc", "") => case.crc = true,
            ("tags", "") => case.tags = Tags::CountBe,
            ("coalesce", number) => case.coalesce = coalesce(number)?,
            ("batch", number) => case.batch = coalesce(number)?,
            _ => {
                let known = "crc, tags, coalesce=16, batch=16";
                return Err(format!("'{extension}' is none of {known}"));
            }
        }
    }
    Ok(case)
}

/// A target that can be started.
struct Target {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
}

fn targets(a: &Arguments, size: u64) -> Result<Vec<Target>> {
    let image = a.image.display().to_string();
    let aoede = |name, path: &Path, extra: &str| {
        let extra = extra.split_whitespace().map(str::to_owned);
        let address = ["1", "1", "t0", &image].map(str::to_owned);
        Target {
            name,
            program: path.to_owned(),
            arguments: extra.chain(address).collect(),
        }
    };
    let mut all = Vec::new();
    if let Some(path) = &a.aoede {
        all.push(aoede("aoede", path, &a.aoede_args));
    }
    if let Some(path) = &a.other {
        all.push(aoede("other", path, &a.other_args));
    }
    if !a.no_vblade {
        all.push(aoede("vblade", Path::new(&a.vblade), ""));
    }
    if !a.no_memory {
        let engine = match a.memory_engine {
            EngineName::Ring => "ring",
            EngineName::Recvmmsg => "recvmmsg",
        };
        let size = size.to_string();
        let mut arguments: Vec<String> = [
            "answer", "1", "1", "t0", "--size", &size, "--engine", engine,
        ]
        .map(str::to_owned)
        .into();
        if a.memory_spin {
            arguments.push("--spin".into());
        }
        all.push(Target {
            name: "memory",
            program: std::env::current_exe().map_err(Error::system("own path"))?,
            arguments,
        });
    }
    Ok(all)
}

pub(crate) fn run(a: &Arguments, stop: &AtomicBool) -> Result<()> {
    let mut needs = vec![Need::Network];
    if !a.no_pin {
        needs.push(Need::Processors(2));
    }
    if !a.no_vblade {
        needs.push(Need::Program(&a.vblade));
    }
    if let Some(missing) = missing(&needs) {
        return Err(Error::Unexpected(format!("a comparison needs {missing}")));
    }
    let size = std::fs::metadata(&a.image)
        .map_err(Error::system(a.image.display().to_string()))?
        .len();
    let cases = if a.cases.is_empty() {
        CASES
            .iter()
            .map(|text| case(text).map_err(Error::Unexpected))
            .collect::<Result<Vec<Case>>>()?
    } else {
        a.cases.clone()
    };
    let targets = targets(a, size)?;
    let mut table = Table::new(
        cases.iter().map(|c| c.name.clone()).collect(),
        targets.iter().map(|t| t.name.to_owned()).collect(),
    );
    let (ours, theirs) = (Namespace::new()?, Namespace::new()?);
    let _wire = Veth::new(("i0", &ours), ("t0", &theirs), a.mtu)?;
    let result = ours.enter(|| -> Result<()> {
        if !a.no_pin {
            pin(Pid::from_raw(0), OUR_CORE)?;
        }
        for round in 0..a.rounds {
            for (index, target) in targets.iter().enumerate() {
                let label = format!("round {} of {}, {}", round + 1, a.rounds, target.name);
                let measured = measure(a, target, &theirs, &cases, &label, stop)?;
                for (case, sample) in measured {
                    table.add(round, index, case, sample);
                }
                if stop.load(Ordering::Relaxed) {
                    return Err(Error::Unexpected("interrupted".into()));
                }
            }
        }
        Ok(())
    });
    // What was measured before it went wrong is worth seeing too.
    print!("{}", table.print());
    result?
}

/// Starts a target, runs all cases on it, stops it.
fn measure(
    a: &Arguments,
    target: &Target,
    namespace: &Namespace,
    cases: &[Case],
    label: &str,
    stop: &AtomicBool,
) -> Result<Vec<(usize, Sample)>> {
    if a.cold {
        chill(&a.image)?;
    } else {
        warm(&a.image)?;
    }
    let mut spawn = Spawn::new(&target.program)
        .args(&target.arguments)
        .inside(namespace);
    if !a.no_pin {
        spawn = spawn.on_core(TARGET_CORE);
    }
    let mut process = spawn.start()?;
    let mut client = Client::open_receiving("i0", Receive::from(a.engine))?;
    client.connect(1, 1).map_err(|e| {
        Error::Program(format!(
            "{label}: {e}; it said:\n  {}",
            process.output().join("\n  ")
        ))
    })?;
    let mut engine = Engine::new(client)?;
    let whole = Plan {
        order: Order::Sequential,
        block: Block::Jumbo,
        duration: Some(WARM),
        operations: Some(
            engine.disk_sectors() / u64::from(engine.client.sectors_per_frame().max(1)),
        ),
        ..Plan::default()
    };
    let stopped = || stop.load(Ordering::Relaxed);
    if !a.cold {
        engine.run_until(&whole, stopped)?;
    }
    let mut samples = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let sample = one(a, case, &mut engine, &process, &stopped)?;
        if stopped() {
            break;
        }
        eprintln!("{label}: {} {:.1} k/s", case.name, sample.rate / 1e3);
        samples.push((index, sample));
    }
    // vblade ends by the signal itself, others with code 0.
    process.stop(Deadline::seconds(STOP))?;
    settle(&a.image)?;
    Ok(samples)
}

fn one(
    a: &Arguments,
    case: &Case,
    engine: &mut Engine,
    process: &Process,
    stopped: &impl Fn() -> bool,
) -> Result<Sample> {
    let lead = Plan {
        op: case.op,
        order: case.order,
        block: case.block,
        depth: case.depth,
        duration: Some(LEAD),
        spin: a.spin,
        tags: case.tags,
        crc: case.crc,
        coalesce: case.coalesce,
        batch: case.batch,
        ..Plan::default()
    };
    engine.run_until(&lead, stopped)?;
    let plan = Plan {
        duration: Some(Duration::try_from_secs_f64(a.seconds).unwrap_or(Duration::from_secs(1))),
        seed: 2,
        ..lead
    };
    let before = process.cpu_time()?;
    let report = engine.run_until(&plan, stopped)?.clean()?;
    let used = process.cpu_time()?.saturating_sub(before);
    if report.resent > 0 {
        eprintln!("{}: {} frames sent again", case.name, report.resent);
    }
    Ok(Sample {
        rate: report.rate(),
        p50: report.latency.per_mille(500),
        p99: report.latency.per_mille(990),
        cpu: used.as_secs_f64() * 1e6 / report.operations.max(1) as f64,
    })
}

/// Reads the image, so that it is in the page cache whoever comes first.
fn warm(image: &Path) -> Result<()> {
    let name = image.display().to_string();
    let mut file = File::open(image).map_err(Error::system(&name))?;
    let mut buffer = vec![0; 1 << 20];
    let end = Instant::now() + 10 * WARM;
    while Instant::now() < end && file.read(&mut buffer).map_err(Error::system(&name))? > 0 {}
    Ok(())
}

/// Has the kernel forget the image.
fn chill(image: &Path) -> Result<()> {
    let name = image.display().to_string();
    let file = File::open(image).map_err(Error::system(&name))?;
    file.sync_data().map_err(Error::system(&name))?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(Error::system(name))
}

/// Has the kernel write back what one target left, so that the next is not
/// measured with it.
fn settle(image: &Path) -> Result<()> {
    let name = image.display().to_string();
    File::open(image)
        .and_then(|file| file.sync_data())
        .map_err(Error::system(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_read() {
        for text in CASES {
            assert_eq!(case(text).map(|c| c.name), Ok(text.to_owned()));
        }
        let jumbo = case("mixed:jumbo:3").map(|c| (c.op, c.block, c.depth));
        assert_eq!(jumbo, Ok((Op::Mixed(50), Block::Jumbo, 3)));
        let all = case("read:512:64:tags:coalesce=16:crc").map(|c| (c.tags, c.coalesce, c.crc));
        assert_eq!(all, Ok((Tags::CountBe, 16, true)));
        for bad in [
            "",
            "read:1",
            "read:x:1",
            "read:512:x",
            "erase:512:1",
            "read:512:1:sum",
            "read:512:1:coalesce=0",
            "read:512:1:coalesce=93",
            "read:512:1:1",
        ] {
            assert!(case(bad).is_err(), "{bad}");
        }
    }
}
