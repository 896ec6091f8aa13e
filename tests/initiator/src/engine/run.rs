//! One run: operations become frames, answers become numbers.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use aoede::sys::packet::{BATCH, PIECES};
use aoede::wire::crc;

use super::faults::Injector;
use super::flight::{Flight, Kind, TAGS, coalesced, judge, pieces, tag_bytes, tag_of, take};
use super::model::Model;
use super::rng::{Rng, mix};
use super::{Block, COALESCE_MAX, Engine, Op, Order, Plan, Report, Tags};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::frame::{Ata, BODY, DATA, Frame, SECTOR, opcode};
use crate::port::Port;

/// The most frames on their way.
const FRAMES_MAX: usize = 8192;
/// How long replies to copies that nobody needs may take to come.
const LAST_COPIES: Duration = Duration::from_millis(100);
/// How often at least and at most to look whether a frame is to be sent again.
const TICK: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(50));
/// How far tags may run ahead of the oldest frame on its way: less than half a
/// target's tag window, so that a frame sent again is never outside.
const AHEAD: u32 = 12 << 10;
/// How many frames pass between two looks at that.
const LOOK_AHEAD: u32 = 1 << 10;

struct Operation {
    kind: Kind,
    start: Instant,
    frames_left: usize,
    bytes: usize,
}

pub(super) struct Run<'a> {
    client: &'a mut Client,
    model: &'a mut Option<Model>,
    next_tag: &'a mut u32,
    plan: Plan,
    first: u64,
    blocks: u64,
    sectors: u64,
    block: u64,
    frame_sectors: u64,
    rng: Rng,
    next_block: u64,
    begun: u64,
    flights: Vec<Flight>,
    free_flights: Vec<usize>,
    operations: Vec<Operation>,
    free_operations: Vec<usize>,
    by_tag: Vec<u32>,
    /// While verifying: which write a tag stands for, until no copy of that
    /// write is on its way.
    writes_by_tag: HashMap<u32, u64>,
    looked_ahead: u32,
    to_send: Vec<usize>,
    faulty: Option<Box<Faulty>>,
    report: Report,
}

struct Faulty {
    outgoing: Injector<Vec<u8>>,
    incoming: Injector<Vec<u8>>,
}

impl<'a> Run<'a> {
    pub(super) fn new(engine: &'a mut Engine, plan: &Plan) -> Result<Run<'a>> {
        let wrong = |what: String| Err(Error::Unexpected(what));
        let end = engine.disk_sectors;
        let sectors = match plan.sectors {
            0 => end.saturating_sub(plan.first),
            n => n,
        };
        let frame_sectors = u64::from(engine.client.sectors_per_frame().max(1));
        let block = match plan.block {
            Block::Jumbo => frame_sectors,
            Block::Bytes(bytes) if bytes % SECTOR == 0 && bytes > 0 => (bytes / SECTOR) as u64,
            Block::Bytes(bytes) => return wrong(format!("{bytes} bytes are no whole sectors")),
        };
        if plan.first.checked_add(sectors).is_none_or(|to| to > end) || sectors == 0 {
            return wrong(format!(
                "{sectors} sectors from {} on: the disk has {end}",
                plan.first
            ));
        }
        let frames = plan.depth * block.div_ceil(frame_sectors) as usize;
        if plan.depth == 0 || frames > FRAMES_MAX {
            return wrong(format!(
                "{frames} frames at once: at least 1, at most {FRAMES_MAX}"
            ));
        }
        if plan.coalesce > COALESCE_MAX {
            let many = plan.coalesce;
            return wrong(format!("{many} reads in one frame: at most {COALESCE_MAX}"));
        }
        if let Some(initial) = plan.verify {
            let fits = |m: &Model| {
                m.first() <= plan.first && plan.first + sectors <= m.first() + m.count()
            };
            if !engine.model.as_ref().is_some_and(fits) {
                engine.model = Some(Model::new(plan.first, sectors, plan.seed, initial));
            }
            if let Some(model) = &mut engine.model {
                model.deduplicated(matches!(plan.tags, Tags::CountBe | Tags::CountLe));
            }
        } else if plan.op != Op::Read {
            // What is written unverified makes what was known untrue.
            engine.model = None;
        }
        let looked_ahead = engine.next_tag;
        let template = Frame::ata(Ata::default(), &[]).encode(&engine.client.defaults());
        let mut head = [0; DATA];
        head.copy_from_slice(&template);
        let now = Instant::now();
        let flight = || Flight {
            busy: false,
            kind: Kind::Read,
            operation: 0,
            tag: 0,
            lba: 0,
            count: 0,
            head,
            data: Vec::new(),
            sum: None,
            first: now,
            last: now,
            generation: 0,
            ticket: None,
        };
        let operation = || Operation {
            kind: Kind::Read,
            start: now,
            frames_left: 0,
            bytes: 0,
        };
        let faulty = (plan.outgoing.any() || plan.incoming.any()).then(|| {
            Box::new(Faulty {
                outgoing: Injector::new(plan.outgoing, mix(plan.seed) ^ 1),
                incoming: Injector::new(plan.incoming, mix(plan.seed) ^ 2),
            })
        });
        Ok(Run {
            client: &mut engine.client,
            model: &mut engine.model,
            next_tag: &mut engine.next_tag,
            plan: *plan,
            first: plan.first,
            blocks: (sectors / block).max(1),
            sectors,
            block,
            frame_sectors,
            rng: Rng::new(plan.seed),
            next_block: 0,
            begun: 0,
            flights: std::iter::repeat_with(flight).take(frames).collect(),
            free_flights: (0..frames).rev().collect(),
            operations: std::iter::repeat_with(operation).take(plan.depth).collect(),
            free_operations: (0..plan.depth).rev().collect(),
            by_tag: vec![u32::MAX; TAGS],
            writes_by_tag: HashMap::new(),
            looked_ahead,
            to_send: Vec::with_capacity(frames),
            faulty,
            report: Report::default(),
        })
    }

    pub(super) fn execute(mut self, mut stop: impl FnMut() -> bool) -> Result<Report> {
        let result = self.work(&mut stop);
        // Reads that get no answer any more must not be waited for either.
        for flight in &mut self.flights {
            if let (Some(ticket), Some(model)) = (flight.ticket.take(), self.model.as_mut()) {
                let _ = model.end_read(ticket, None);
            }
        }
        if let Some(faulty) = &self.faulty {
            self.report.outgoing = faulty.outgoing.happened;
            self.report.incoming = faulty.incoming.happened;
        }
        result.map(|()| self.report)
    }

    fn work(&mut self, stop: &mut impl FnMut() -> bool) -> Result<()> {
        let start = Instant::now();
        let mut now = start;
        let tick = (self.plan.resend / 8).clamp(TICK.0, TICK.1);
        let mut next_tick = start + tick;
        let (mut begin, mut passes, mut until) = (true, 0u32, None);
        loop {
            passes = passes.wrapping_add(1);
            begin &= self.plan.operations.is_none_or(|n| self.begun < n)
                && self.plan.duration.is_none_or(|d| now - start < d);
            if (passes % 64 == 0 || now >= next_tick) && until.is_none() && stop() {
                until = Some(now + self.plan.last_answers);
            }
            begin &= until.is_none();
            let together = self.plan.batch.max(self.plan.coalesce);
            let ready = self.free_operations.len() >= together.min(self.plan.depth);
            while begin && ready && !self.free_operations.is_empty() && !self.is_ahead() {
                self.begin(now);
                begin &= self.plan.operations.is_none_or(|n| self.begun < n);
            }
            self.send(now)?;
            if until.is_some_and(|until| now >= until) {
                self.report.elapsed = now - start;
                return Ok(());
            }
            if self.free_flights.len() == self.flights.len() && !begin {
                self.report.elapsed = now - start;
                return self.last_copies();
            }
            if now >= next_tick {
                self.send_again(now)?;
                next_tick = now + tick;
            }
            let here = if self.plan.spin {
                self.client.port.refill()
            } else {
                self.client
                    .port
                    .wait(next_tick.saturating_duration_since(now))?
            };
            now = Instant::now();
            if here {
                self.receive(now)?;
            } else {
                self.release_held(now)?;
            }
        }
    }

    /// Begins an operation: its frames are made and wait to be sent.
    fn begin(&mut self, now: Instant) {
        let Some(operation) = self.free_operations.pop() else {
            return;
        };
        self.begun += 1;
        let kind = match (self.plan.flush_every, self.plan.op) {
            (Some(n), _) if n > 0 && self.begun % n == 0 => Kind::Flush,
            (_, Op::Read) => Kind::Read,
            (_, Op::Write) => Kind::Write,
            (_, Op::Mixed(reads)) if self.rng.below(100) < u64::from(reads) => Kind::Read,
            (_, Op::Mixed(_)) => Kind::Write,
        };
        if kind == Kind::Flush {
            self.operations[operation] = Operation {
                kind,
                start: now,
                frames_left: 1,
                bytes: 0,
            };
            self.prepare(kind, operation, 0, 0, now);
            return;
        }
        let block = match self.plan.order {
            Order::Random => self.rng.below(self.blocks),
            Order::Sequential => {
                let block = self.next_block;
                // Sequential runs reach the end of a region that is no whole
                // number of blocks; random ones stay in whole blocks.
                self.next_block = (block + 1) % self.sectors.div_ceil(self.block);
                block
            }
        };
        let from = block * self.block;
        let sectors = self.block.min(self.sectors - from);
        self.operations[operation] = Operation {
            kind,
            start: now,
            frames_left: sectors.div_ceil(self.frame_sectors) as usize,
            bytes: sectors as usize * SECTOR,
        };
        let mut done = 0;
        while done < sectors {
            let count = self.frame_sectors.min(sectors - done);
            self.prepare(kind, operation, self.first + from + done, count as u8, now);
            done += count;
        }
    }

    fn prepare(&mut self, kind: Kind, operation: usize, lba: u64, count: u8, now: Instant) {
        let Some(index) = self.free_flights.pop() else {
            return;
        };
        let tag = self.take_tag();
        let sectors = usize::from(count);
        let flight = &mut self.flights[index];
        (flight.busy, flight.kind, flight.operation) = (true, kind, operation);
        (flight.tag, flight.lba, flight.count) = (tag, lba, count);
        flight.generation = 0;
        let (aflags, code) = match kind {
            Kind::Read => (0x40, opcode::READ_EXT),
            Kind::Write => (0x41, opcode::WRITE_EXT),
            Kind::Flush => (0x40, opcode::FLUSH_EXT),
        };
        // Made once with `Frame`, then only changed: this is the hot path.
        flight.head[20..BODY].copy_from_slice(&tag_bytes(self.plan.tags, tag));
        flight.head[24] = aflags;
        flight.head[26..28].copy_from_slice(&[count, code]);
        flight.head[28..34].copy_from_slice(&lba.to_le_bytes()[..6]);
        if kind == Kind::Write && flight.data.len() != sectors * SECTOR {
            flight.data = vec![0xA5; sectors * SECTOR];
        }
        if let (Some(model), true) = (self.model.as_mut(), self.plan.verify.is_some()) {
            match kind {
                Kind::Read => flight.ticket = Some(model.begin_read(lba, sectors)),
                Kind::Write => {
                    flight.generation = model.begin_write(lba, sectors);
                    model.fill(flight.generation, lba, &mut flight.data);
                }
                Kind::Flush => {}
            }
        }
        if kind == Kind::Write {
            self.report.write_frames += 1;
            let sum = || crc::of_reply(&flight.head, &flight.data);
            flight.sum = self.plan.crc.then(sum);
        }
        flight.first = now;
        self.to_send.push(index);
        self.by_tag[tag as usize % TAGS] = index as u32;
    }

    /// Whether a frame that got lost holds up the rest.
    fn is_ahead(&mut self) -> bool {
        let next = *self.next_tag;
        if next.wrapping_sub(self.looked_ahead) < LOOK_AHEAD {
            return false;
        }
        let busy = self.flights.iter().filter(|f| f.busy);
        let oldest = busy.map(|f| next.wrapping_sub(f.tag)).max();
        let ahead = oldest.is_some_and(|age| age > AHEAD);
        if !ahead {
            self.looked_ahead = next;
        }
        ahead
    }

    fn take_tag(&mut self) -> u32 {
        // 0 is never tracked by a target that watches tags.
        let tag = (*self.next_tag).max(1);
        *self.next_tag = tag.wrapping_add(1);
        tag
    }

    /// Sends what waits.
    fn send(&mut self, now: Instant) -> Result<()> {
        if self.to_send.is_empty() {
            return Ok(());
        }
        let mut to_send = std::mem::take(&mut self.to_send);
        for index in &to_send {
            self.flights[*index].last = now;
        }
        if self.faulty.is_some() || self.plan.coalesce > 1 {
            self.send_copied(&to_send)?;
        } else {
            for index in &to_send {
                self.count_sent(*index, 1);
            }
            for some in to_send.chunks(BATCH) {
                let mut frames = [[&[][..]; PIECES]; BATCH];
                for (frame, index) in frames.iter_mut().zip(some) {
                    *frame = pieces(&self.flights[*index]);
                }
                self.client.port.send(&frames[..some.len()])?;
            }
        }
        to_send.clear();
        self.to_send = to_send;
        Ok(())
    }

    /// So many copies of a frame went out.
    fn count_sent(&mut self, index: usize, copies: usize) {
        let flight = &self.flights[index];
        if flight.kind != Kind::Write {
            return;
        }
        self.report.write_copies += copies as u64;
        if let (Some(model), true) = (self.model.as_mut(), self.plan.verify.is_some()) {
            model.sent(flight.generation, copies as u64);
            self.writes_by_tag.insert(flight.tag, flight.generation);
        }
    }

    /// Sends frames that are put together first: with faults, or several reads
    /// in one.
    fn send_copied(&mut self, to_send: &[usize]) -> Result<()> {
        let mut out = Vec::new();
        let mut rest = to_send;
        while let Some(first) = rest.first() {
            let is_read = |index: &&usize| self.flights[**index].kind == Kind::Read;
            let reads = rest.iter().take_while(is_read);
            let together = reads.take(self.plan.coalesce).count().max(1);
            let (now, later) = rest.split_at(together);
            let frame = match together {
                1 => pieces(&self.flights[*first]).concat(),
                _ => coalesced(now.iter().map(|index| &self.flights[*index])),
            };
            let copies = match &mut self.faulty {
                Some(faulty) => faulty.outgoing.pass(frame, &mut out),
                None => {
                    out.push(frame);
                    1
                }
            };
            self.count_sent(*first, copies);
            rest = later;
        }
        send_all(&self.client.port, &out)
    }

    /// Sends again what has waited too long for its answer.
    fn send_again(&mut self, now: Instant) -> Result<()> {
        for index in 0..self.flights.len() {
            let flight = &self.flights[index];
            if !flight.busy || now - flight.last < self.plan.resend {
                continue;
            }
            if now - flight.first >= self.plan.give_up {
                let what = format!(
                    "no answer to {:?} of {} at {}, sent again and again",
                    flight.kind, flight.count, flight.lba
                );
                return Err(Error::Timeout(what, self.plan.give_up));
            }
            if self.plan.new_tag {
                let tag = self.take_tag();
                let flight = &mut self.flights[index];
                flight.tag = tag;
                flight.head[20..BODY].copy_from_slice(&tag_bytes(self.plan.tags, tag));
                self.by_tag[tag as usize % TAGS] = index as u32;
            }
            self.report.resent += 1;
            self.to_send.push(index);
        }
        self.send(now)
    }

    /// Takes all replies that are here.
    fn receive(&mut self, now: Instant) -> Result<()> {
        // One batch, so that what it makes room for is sent soon.
        for _ in 0..BATCH {
            let Some(frame) = self.client.port.peek() else {
                return Ok(());
            };
            if !frame.whole {
                self.client.port.release();
                continue;
            }
            if self.faulty.is_none() && self.plan.verify.is_none() {
                let reply = take(frame.bytes, self.plan.tags, &self.by_tag, &mut self.flights);
                let crc = self.plan.crc;
                let outcome =
                    reply.map(|index| (index, judge(frame.bytes, &self.flights[index], crc)));
                self.client.port.release();
                match outcome {
                    Some((index, outcome)) => self.finish(index, outcome, now),
                    None => self.report.late += 1,
                }
                continue;
            }
            let bytes = frame.bytes.to_vec();
            self.client.port.release();
            self.count_answer(&bytes);
            let mut arrived = Vec::new();
            match &mut self.faulty {
                Some(faulty) => drop(faulty.incoming.pass(bytes, &mut arrived)),
                None => arrived.push(bytes),
            }
            for bytes in arrived {
                self.arrive(&bytes, now)?;
            }
        }
        Ok(())
    }

    /// A reply has come off the wire, so one copy less is on its way.
    fn count_answer(&mut self, bytes: &[u8]) {
        let Some(tag) = tag_of(bytes, self.plan.tags) else {
            return;
        };
        if let (Some(generation), Some(model)) = (self.writes_by_tag.get(&tag), self.model.as_mut())
        {
            // Kept while the write itself still waits for an answer that the
            // injector lost.
            let last = model.answered(*generation);
            let waited_for = self.by_tag[tag as usize % TAGS] as usize;
            let waiting = self
                .flights
                .get(waited_for)
                .is_some_and(|f| f.busy && f.tag == tag);
            if last && !waiting {
                self.writes_by_tag.remove(&tag);
            }
        }
    }

    /// A reply has passed the injector.
    fn arrive(&mut self, bytes: &[u8], now: Instant) -> Result<()> {
        let Some(index) = take(bytes, self.plan.tags, &self.by_tag, &mut self.flights) else {
            self.report.late += 1;
            return Ok(());
        };
        let flight = &mut self.flights[index];
        let outcome = judge(bytes, flight, self.plan.crc);
        if let Some(model) = self.model.as_mut() {
            match (flight.kind, flight.ticket.take()) {
                (Kind::Read, Some(ticket)) => {
                    let end = DATA + usize::from(flight.count) * SECTOR;
                    let data = outcome.is_none().then(|| &bytes[DATA..end]);
                    model
                        .end_read(ticket, data)
                        .map_err(|wrong| Error::Unexpected(wrong.to_string()))?;
                }
                (Kind::Write, _) if flight.generation > 0 => {
                    let over = match outcome {
                        None => model.acknowledged(flight.generation),
                        Some(_) => model.failed(flight.generation),
                    };
                    if over {
                        self.writes_by_tag.remove(&flight.tag);
                    }
                    if model.open_writes() == 0 {
                        self.writes_by_tag.clear();
                    }
                }
                _ => {}
            }
        }
        self.finish(index, outcome, now);
        Ok(())
    }

    fn finish(&mut self, index: usize, error: Option<String>, now: Instant) {
        let operation = self.flights[index].operation;
        self.free_flights.push(index);
        if let Some(error) = error {
            self.report.errors += 1;
            self.report.first_error.get_or_insert(error);
        }
        let op = &mut self.operations[operation];
        op.frames_left -= 1;
        if op.frames_left > 0 {
            return;
        }
        self.report.operations += 1;
        match op.kind {
            Kind::Read => self.report.bytes_read += op.bytes as u64,
            Kind::Write => self.report.bytes_written += op.bytes as u64,
            Kind::Flush => {}
        }
        self.report.latency.record(now - op.start);
        self.free_operations.push(operation);
    }

    /// Nothing came: what the injectors hold back goes on.
    fn release_held(&mut self, now: Instant) -> Result<()> {
        let Some(faulty) = &mut self.faulty else {
            return Ok(());
        };
        let (mut out, mut arrived) = (Vec::new(), Vec::new());
        faulty.outgoing.release(&mut out);
        faulty.incoming.release(&mut arrived);
        send_all(&self.client.port, &out)?;
        arrived.iter().try_for_each(|bytes| self.arrive(bytes, now))
    }

    /// Waits a little for the answers to copies, so that the model knows that
    /// they are over.
    fn last_copies(&mut self) -> Result<()> {
        self.release_held(Instant::now())?;
        let until = Instant::now() + LAST_COPIES;
        while self.faulty.is_some() && self.model.as_ref().is_some_and(|m| m.open_writes() > 0) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if self.client.port.wait(left)? {
                self.receive(Instant::now())?;
            }
        }
        Ok(())
    }
}

fn send_all(port: &Port, frames: &[Vec<u8>]) -> Result<()> {
    let frames: Vec<[&[u8]; PIECES]> = frames.iter().map(|f| [&f[..], &[], &[]]).collect();
    port.send(&frames).map(drop)
}
