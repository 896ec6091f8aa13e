//! `aoebench run`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use initiator::client::Client;
use initiator::engine::faults::Rates;
use initiator::engine::model::{Initial, Model};
use initiator::engine::rng::mix;
use initiator::engine::{Block, COALESCE_MAX, Engine, Op, Order, Plan, Tags};
use initiator::error::Result;
use initiator::port::Receive;

use crate::answer::EngineName;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Interface
    #[arg(long)]
    interface: String,
    /// Shelf and slot of the target
    #[arg(long, value_parser = crate::address)]
    target: (u16, u8),
    /// What to do
    #[arg(long, value_enum, default_value_t)]
    op: OpName,
    /// Bytes of an operation, or "jumbo" for what one frame carries
    #[arg(long, value_parser = block, default_value = "4096")]
    block: Block,
    /// Operations at once
    #[arg(long, default_value_t = 32)]
    depth: usize,
    /// How long
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How many operations, instead of how long
    #[arg(long)]
    operations: Option<u64>,
    /// First sector of the region
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Size of the region; without it all of the disk
    #[arg(long, value_parser = crate::size)]
    size: Option<usize>,
    /// Write patterns, check all that is read, and in the end everything
    #[arg(long)]
    verify: bool,
    /// Lose so many frames of a thousand, each way
    #[arg(long, value_name = "PERMILLE", default_value_t = 0)]
    lose: u32,
    /// Double so many
    #[arg(long, value_name = "PERMILLE", default_value_t = 0)]
    duplicate: u32,
    /// Delay so many behind later ones
    #[arg(long, value_name = "PERMILLE", default_value_t = 0)]
    reorder: u32,
    /// Seed of all that is random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Milliseconds before a frame is sent again
    #[arg(long, value_name = "MS", default_value_t = 100)]
    resend: u64,
    /// Send again under a new tag, as Linux does
    #[arg(long)]
    new_tag: bool,
    /// Seconds until a frame without answer ends the run
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    give_up: u64,
    /// Let the target recognise copies by their tags
    #[arg(long, value_enum, default_value_t)]
    tags: TagsName,
    /// Checksums of data (CRC8x4)
    #[arg(long)]
    crc: bool,
    /// So many reads in one frame
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = coalesce)]
    coalesce: usize,
    /// A FLUSH in place of every so manieth operation
    #[arg(long, value_name = "N")]
    flush_every: Option<u64>,
    /// How to receive
    #[arg(long, value_enum, default_value_t)]
    engine: EngineName,
    /// Look for replies without sleeping
    #[arg(long)]
    spin: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OpName {
    /// Reads anywhere
    #[default]
    Randread,
    /// Writes anywhere
    Randwrite,
    /// Reads in order
    Read,
    /// Writes in order
    Write,
    /// Reads and writes anywhere, as many of each
    Mixed,
}

impl OpName {
    pub(crate) fn op(self) -> (Op, Order) {
        match self {
            OpName::Randread => (Op::Read, Order::Random),
            OpName::Randwrite => (Op::Write, Order::Random),
            OpName::Read => (Op::Read, Order::Sequential),
            OpName::Write => (Op::Write, Order::Sequential),
            OpName::Mixed => (Op::Mixed(50), Order::Random),
        }
    }
}

/// What tags are to the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum TagsName {
    /// Nothing
    #[default]
    Plain,
    /// Big endian numbers that count up
    IncBe,
    /// Little endian ones
    IncLe,
    /// Unique
    Random,
}

impl From<TagsName> for Tags {
    fn from(name: TagsName) -> Tags {
        match name {
            TagsName::Plain => Tags::Plain,
            TagsName::IncBe => Tags::CountBe,
            TagsName::IncLe => Tags::CountLe,
            TagsName::Random => Tags::Unique,
        }
    }
}

/// Reads in one frame.
pub(crate) fn coalesce(text: &str) -> std::result::Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=COALESCE_MAX).contains(n))
        .ok_or_else(|| format!("'{text}': give a number of reads, 1 to {COALESCE_MAX}"))
}

fn block(text: &str) -> std::result::Result<Block, String> {
    match text {
        "jumbo" => Ok(Block::Jumbo),
        _ => crate::size(text).map(Block::Bytes),
    }
}

pub(crate) fn run(arguments: &Arguments, stop: &AtomicBool) -> Result<()> {
    let a = arguments;
    let mut client = Client::open_receiving(&a.interface, Receive::from(a.engine))?;
    let config = client.connect(a.target.0, a.target.1)?;
    let mut engine = Engine::new(client)?;
    eprintln!(
        "e{}.{}: {} sectors, {} a frame, {} frames at once",
        a.target.0,
        a.target.1,
        engine.disk_sectors(),
        config.sectors,
        config.buffers
    );
    let (op, order) = a.op.op();
    let rates = Rates {
        lose: a.lose,
        duplicate: a.duplicate,
        reorder: a.reorder,
    };
    let plan = Plan {
        op,
        order,
        block: a.block,
        depth: a.depth,
        first: a.first,
        sectors: a.size.map_or(0, |bytes| bytes as u64 / 512),
        duration: match a.operations {
            Some(_) => None,
            None => Some(Duration::try_from_secs_f64(a.seconds).unwrap_or(Duration::MAX)),
        },
        operations: a.operations,
        seed: a.seed,
        verify: a.verify.then_some(Initial::Any),
        outgoing: rates,
        incoming: rates,
        resend: Duration::from_millis(a.resend.max(1)),
        new_tag: a.new_tag,
        give_up: Duration::from_secs(a.give_up),
        last_answers: Plan::default().last_answers,
        tags: a.tags.into(),
        crc: a.crc,
        coalesce: a.coalesce,
        batch: Plan::default().batch,
        flush_every: a.flush_every,
        spin: a.spin,
    };
    if a.verify {
        // What an earlier run with this seed left on the disk shall not look
        // like what this one writes.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let salt = now.map_or(0, |now| now.as_nanos() as u64);
        let sectors = match plan.sectors {
            0 => engine.disk_sectors().saturating_sub(plan.first),
            n => n,
        };
        let seed = mix(plan.seed ^ salt);
        engine.set_model(Model::new(plan.first, sectors, seed, Initial::Any));
    }
    let report = engine.run_until(&plan, || stop.load(Ordering::Relaxed))?;
    println!("{report}");
    report.clean()?;
    if a.verify && !stop.load(Ordering::Relaxed) {
        println!("all read again: {}", engine.verify_all()?);
    }
    Ok(())
}
