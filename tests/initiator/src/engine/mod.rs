//! Many requests at once: load, latency, and whether every sector holds what it
//! must.
//!
//! An [`Engine`] takes a connected [`Client`] and runs [`Plan`]s over it. What
//! it knows of the sectors ([`Model`]) outlives a run, so a target can be
//! killed, started again and asked what it still knows.

pub mod faults;
mod flight;
pub mod histogram;
pub mod model;
pub mod pattern;
pub mod rng;
mod run;

use std::fmt;
use std::time::Duration;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::frame::SECTOR;
use faults::{Happened, Rates};
use histogram::Histogram;
use model::{Initial, Model};

/// The most reads in one frame: as many as one of 1514 bytes holds.
pub const COALESCE_MAX: usize = 92;
/// Reads in one frame when everything is read again.
const COALESCE: usize = 4;

/// What operations do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads alone.
    Read,
    /// Writes alone.
    Write,
    /// Reads, so many of a hundred, and writes.
    Mixed(u32),
}

/// Where operations go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Any block of the region.
    Random,
    /// One block after the other, and again from the first.
    Sequential,
}

/// What tags are to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tags {
    /// Nothing.
    Plain,
    /// Big endian numbers that count up: copies of a write are recognised.
    CountBe,
    /// Little endian ones.
    CountLe,
    /// Unique: copies of a request under way are recognised.
    Unique,
}

/// What the target is asked for besides AoE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wants {
    tags: Tags,
    crc: bool,
    coalesce: bool,
}

impl Wants {
    fn of(plan: &Plan) -> Wants {
        Wants {
            tags: plan.tags,
            crc: plan.crc,
            coalesce: plan.coalesce > 1,
        }
    }
}

/// Bytes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// So many, whole sectors; split into as many frames as it takes.
    Bytes(usize),
    /// As many as one frame carries, by what the target's Config reply said.
    Jumbo,
}

/// A run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What operations do.
    pub op: Op,
    /// Where they go.
    pub order: Order,
    /// How large they are.
    pub block: Block,
    /// How many are on their way at once.
    pub depth: usize,
    /// The first sector of the region.
    pub first: u64,
    /// Sectors of the region; 0 is all up to the end of the disk.
    pub sectors: u64,
    /// When to begin no further operation.
    pub duration: Option<Duration>,
    /// How many operations to begin.
    pub operations: Option<u64>,
    /// The random source's seed.
    pub seed: u64,
    /// Whether to check what is read; what is written carries a pattern then.
    pub verify: Option<Initial>,
    /// Requests that get lost and so on.
    pub outgoing: Rates,
    /// Replies that do.
    pub incoming: Rates,
    /// When a request is sent again.
    pub resend: Duration,
    /// Whether it is sent under a new tag.
    pub new_tag: bool,
    /// When a request without an answer ends the run.
    pub give_up: Duration,
    /// How long answers may take once the run was stopped from outside.
    pub last_answers: Duration,
    /// What tags are to the target.
    pub tags: Tags,
    /// Whether data has checksums.
    pub crc: bool,
    /// So many reads in one frame, if so many are to be sent; 0 and 1 are one.
    pub coalesce: usize,
    /// So many operations begin together, as those of an initiator that plugs
    /// its queue; those of one frame do in any case.
    pub batch: usize,
    /// A FLUSH in place of every so manieth operation.
    pub flush_every: Option<u64>,
    /// Whether to look for replies without pause instead of sleeping.
    pub spin: bool,
}

impl Default for Plan {
    /// Random reads of 4 KiB, 32 at once, for one second.
    fn default() -> Plan {
        Plan {
            op: Op::Read,
            order: Order::Random,
            block: Block::Bytes(4096),
            depth: 32,
            first: 0,
            sectors: 0,
            duration: Some(Duration::from_secs(1)),
            operations: None,
            seed: 1,
            verify: None,
            outgoing: Rates::default(),
            incoming: Rates::default(),
            resend: Duration::from_millis(100),
            new_tag: false,
            give_up: Duration::from_secs(10),
            last_answers: Duration::from_secs(1),
            tags: Tags::Plain,
            crc: false,
            coalesce: 1,
            batch: 1,
            flush_every: None,
            spin: false,
        }
    }
}

/// How a run went.
#[derive(Clone, Default)]
pub struct Report {
    /// Operations that ended, the failed ones too.
    pub operations: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// From an operation's first request to its last answer.
    pub latency: Histogram,
    /// Requests sent again.
    pub resent: u64,
    /// Writes, in frames.
    pub write_frames: u64,
    /// Frames of writes that were put on the wire: one that is doubled or sent
    /// again counts for each time, one that is lost for none.
    pub write_copies: u64,
    /// Replies that nobody waited for any more.
    pub late: u64,
    /// Replies with an AoE or ATA error.
    pub errors: u64,
    /// The first of them, in words.
    pub first_error: Option<String>,
    /// What happened to requests.
    pub outgoing: Happened,
    /// What happened to replies.
    pub incoming: Happened,
}

impl Report {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// The report, unless a reply had an error.
    pub fn clean(self) -> Result<Report> {
        match &self.first_error {
            Some(first) => Err(Error::Unexpected(format!(
                "{} replies with an error, the first: {first}",
                self.errors
            ))),
            None => Ok(self),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / self.elapsed.as_secs_f64().max(1e-9) / 1048576.0;
        write!(
            f,
            "{} operations in {:.2} s: {:.1} k/s, {:.0} MiB/s read, {:.0} MiB/s written; {}; \
             {} sent again, {} late",
            self.operations,
            self.elapsed.as_secs_f64(),
            self.rate() / 1000.0,
            mib(self.bytes_read),
            mib(self.bytes_written),
            self.latency,
            self.resent,
            self.late
        )?;
        for (name, h) in [("requests", self.outgoing), ("replies", self.incoming)] {
            if h != Happened::default() {
                write!(
                    f,
                    "; {name}: {} lost, {} doubled, {} reordered",
                    h.lost, h.duplicated, h.reordered
                )?;
            }
        }
        if let Some(first) = &self.first_error {
            write!(f, "; {} ERRORS, the first: {first}", self.errors)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The load generator.
pub struct Engine {
    /// The initiator whose interface and address it uses.
    pub client: Client,
    disk_sectors: u64,
    model: Option<Model>,
    wants: Wants,
    next_tag: u32,
}

impl Engine {
    /// Works over a client that is connected; asks how large the disk is.
    pub fn new(mut client: Client) -> Result<Engine> {
        let disk_sectors = client.identify()?.sectors();
        let next_tag = u32::from_be_bytes(crate::client::next_tag());
        Ok(Engine {
            client,
            disk_sectors,
            model: None,
            wants: Wants::of(&Plan::default()),
            // Far from those of an engine that had this address before, whose
            // answers may come yet.
            next_tag: next_tag.wrapping_mul(0x9E37_79B1),
        })
    }

    /// Sectors of the disk.
    pub fn disk_sectors(&self) -> u64 {
        self.disk_sectors
    }

    /// What it knows of the sectors, once a run verified.
    pub fn model(&self) -> Option<&Model> {
        self.model.as_ref()
    }

    /// The same, to be told more.
    pub fn model_mut(&mut self) -> Option<&mut Model> {
        self.model.as_mut()
    }

    /// Takes over what another engine knew.
    pub fn set_model(&mut self, model: Model) {
        self.model = Some(model);
    }

    /// Forgets it.
    pub fn take_model(&mut self) -> Option<Model> {
        self.model.take()
    }

    /// Asks for what a plan wants, and for nothing else. A target that was
    /// started anew has forgotten, and is to be asked again.
    pub fn negotiate(&mut self, plan: &Plan) -> Result<()> {
        let wants = Wants::of(plan);
        let mut wishes = vec!["reset"];
        match wants.tags {
            Tags::Plain => {}
            Tags::CountBe => wishes.push("tag_inc_be"),
            Tags::CountLe => wishes.push("tag_inc_le"),
            Tags::Unique => wishes.push("tag_random"),
        }
        if wants.crc {
            wishes.push("crc8x4");
        }
        if wants.coalesce {
            wishes.push("coalesced_read");
        }
        let said = self.client.extensions(&wishes)?;
        if said
            .iter()
            .zip(&wishes)
            .any(|(s, w)| *s != w.to_uppercase())
        {
            return Err(Error::Unexpected(format!(
                "the target does not have all of {wishes:?}: it said {said:?}"
            )));
        }
        self.wants = wants;
        // A checksum takes room in each frame.
        self.client.ask_sectors_per_frame()
    }

    /// Runs a plan to its end.
    pub fn run(&mut self, plan: &Plan) -> Result<Report> {
        self.run_until(plan, || false)
    }

    /// Runs a plan to its end or until `stop` says so; then no further
    /// operation begins.
    pub fn run_until(&mut self, plan: &Plan, stop: impl FnMut() -> bool) -> Result<Report> {
        if Wants::of(plan) != self.wants {
            self.negotiate(plan)?;
        }
        run::Run::new(self, plan)?.execute(stop)
    }

    /// Reads all that the model knows and checks it.
    pub fn verify_all(&mut self) -> Result<Report> {
        let Some(model) = &self.model else {
            return Err(Error::Unexpected("nothing was verified yet".into()));
        };
        let (first, sectors) = (model.first(), model.count());
        let step = u64::from(self.client.sectors_per_frame().max(1));
        let plan = Plan {
            order: Order::Sequential,
            block: Block::Bytes(step as usize * SECTOR),
            first,
            sectors,
            duration: None,
            operations: Some(sectors.div_ceil(step)),
            verify: Some(Initial::Any),
            tags: self.wants.tags,
            crc: self.wants.crc,
            coalesce: if self.wants.coalesce { COALESCE } else { 1 },
            ..Plan::default()
        };
        self.run(&plan)?.clean()
    }
}
