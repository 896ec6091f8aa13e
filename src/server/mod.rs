//! One export's loop: wait for frames, finished disk work, signals, links;
//! let the target decide; carry it out.
//!
//! The loop never waits for anything but the next event. A turn takes frames in
//! the order the kernel stamped them, a bounded number at a time, then what the
//! disk has finished, then sends all replies.

mod claim;
mod error;
mod open;
mod report;
mod wait;

use std::sync::Arc;
use std::time::{Duration, Instant};

use shadow::SECTOR;
use shadow::stamp::real_time;

use crate::config::{Options, Tuneup};
use crate::freeze::{OnStop, Order, Phase};
use crate::net::{self, Change, Flushed, Nic, NicId, PortOptions};
use crate::store::{Image, ImageError, Record};
use crate::sys::link::LinkWatch;
use crate::sys::packet::BATCH;
use crate::sys::signals::{Event, Signals};
use crate::target::{Action, Target};
use crate::text::count;
use crate::wire::{Address, MacAddr};

use claim::Claim;
pub use error::ServeError;
use report::{Report, describe_nic};
use wait::Wait;

/// Turns with work before the loop looks at signals and links.
const TURNS_MAX: usize = 16;
/// Frames taken in one turn before the disk and the signals are looked at.
const TURN: usize = 4 * BATCH;
/// The same while reads wait for the disk, which is to have the next ones soon.
const TURN_READING: usize = 8;
/// Frames in one turn up to which the next is looked for without sleeping. Where
/// more come at once a nap gathers them, and each costs less.
const SPIN_FRAMES: usize = 3;
/// The least time that sleeping is worth.
const SHORT_SLEEP: Duration = Duration::from_micros(500);
/// How often a NIC that could not be opened is tried again.
const NIC_RETRY: Duration = Duration::from_secs(1);
/// How often it is noted that we live while the image is being changed: at
/// half of what a start allows for.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often a stop that takes long says what is left.
const STOP_LOG_INTERVAL: Duration = Duration::from_secs(5);
/// How often an address conflict is logged.
const CONFLICT_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// An export that is ready to serve.
pub struct Export {
    address: Address,
    tuneup: Tuneup,
    image: Arc<Image>,
    read_only: bool,
    nics: Vec<Nic>,
    port_options: PortOptions,
    target: Target,
    /// Speaks of the arena as long as it is there.
    record: Option<Record>,
    watch: LinkWatch,
    wait: Wait,
    /// Kept as long as the address is ours on this machine.
    _claims: Vec<Claim>,
    conflict_logged: Option<Instant>,
    report: Report,
}

/// A stop that was ordered and goes on.
#[derive(Clone, Copy, Debug)]
struct Stopping {
    since: Instant,
    /// When the log last said what is left.
    told: Instant,
}

impl Export {
    /// Opens everything an export needs, and refuses with a reason while
    /// nothing has been made or changed.
    pub fn open(options: &Options) -> Result<Export, ServeError> {
        open::open(options)
    }

    /// A line for each NIC and one for the export, as vblade tells them.
    pub fn describe(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.nics.iter().map(describe_nic).collect();
        let mode = if self.read_only { "ro" } else { "rw" };
        let (pid, sectors) = (std::process::id(), count(self.target.sectors(), "sector"));
        lines.push(format!("pid {pid}: {}, {sectors}, {mode}", self.address));
        lines
    }

    /// The line of the log with which it begins.
    pub fn introduce(&self, options: &Options) -> String {
        let path = self.image.path().display();
        let sectors = self.target.sectors();
        let bytes = sectors * SECTOR;
        let mut mode = String::from(if self.read_only {
            "read-only"
        } else {
            "read-write"
        });
        for (is_so, word) in [
            (options.durable, "durable"),
            (self.image.is_direct(), "direct"),
        ] {
            if is_so {
                mode = mode + ", " + word;
            }
        }
        format!(
            "{}: {path}: {} ({bytes} bytes), {mode}, on {}; aoede {}, pid {}",
            self.address,
            count(sectors, "sector"),
            options.nics.join(", "),
            env!("CARGO_PKG_VERSION"),
            std::process::id()
        )
    }

    /// Serves until a signal says to stop, then ends in order.
    pub fn run(&mut self, signals: &Signals) -> Result<(), ServeError> {
        let system = |what| move |e| ServeError::System(what, e);
        self.wait
            .watch_signals(signals)
            .map_err(system("waiting for signals"))?;
        for index in 0..self.nics.len() {
            self.attach(index)?;
        }
        self.advertise_everywhere();
        let mut stopping: Option<Stopping> = None;
        let mut turns = 0;
        let mut looked = Instant::now();
        let mut shallow = true;
        loop {
            let taken = if stopping.is_none() {
                self.take_frames()
            } else {
                0
            };
            if taken > 0 {
                shallow = taken <= SPIN_FRAMES || self.target.is_reading();
            }
            let advanced = self.target.has_work();
            self.target.volume().set_alive(real_time());
            self.target.advance(Instant::now());
            self.send_ready();
            let blocked = self.flush();
            if let Some(stop) = &mut stopping {
                if let Some(result) = self.end(stop, blocked) {
                    return result;
                }
            }
            let may_spin = turns > 0 && stopping.is_none();
            if taken > 0 || advanced || (may_spin && self.spin(shallow)) {
                turns += 1;
                if turns < TURNS_MAX {
                    continue;
                }
            }
            let timeout = if turns >= TURNS_MAX {
                Some(Duration::ZERO)
            } else {
                self.sleep(stopping)
            };
            turns = 0;
            let woken = self
                .wait
                .wait(timeout)
                .map_err(system("waiting for events"))?;
            if woken.signals {
                self.obey(signals, &mut stopping)?;
            }
            // The others may leave no moment in which nothing happens.
            let missing = self.nics.iter().any(|nic| nic.port.is_none());
            let retry = missing && looked.elapsed() >= NIC_RETRY;
            let counters = self.target.counters();
            if let Some(line) = self.report.line(Instant::now(), self.address, counters) {
                log::debug!("{line}");
            }
            if woken.links || retry {
                self.look_at_links();
                looked = Instant::now();
            }
        }
    }

    /// Takes frames in their order and answers them; says how many.
    fn take_frames(&mut self) -> usize {
        let now = Instant::now();
        let horizon = (self.nics.len() > 1).then(real_time);
        for port in self.nics.iter_mut().filter_map(|nic| nic.port.as_mut()) {
            port.refill();
        }
        let mut conflict = None;
        let mut taken = 0;
        let most = if self.target.is_reading() {
            TURN_READING
        } else {
            TURN
        };
        while taken < most {
            let limit = if taken == 0 { None } else { horizon };
            let Some(id) = net::earliest(&mut self.nics, limit) else {
                break;
            };
            let Some(port) = self.nics[usize::from(id.0)].port.as_mut() else {
                break;
            };
            taken += 1;
            if let (Some(frame), Some(head)) = (port.receiver.peek(), port.queue.head()) {
                match self.target.handle(now, id, frame, head) {
                    Action::Reply { len, body, sum } => {
                        if let Err(body) = port.queue.push(len, body, sum) {
                            self.target.recycle(body);
                        }
                    }
                    Action::AddressConflict(mac) => conflict = Some((mac, id)),
                    Action::Drop(_) | Action::Parked => {}
                }
            }
            port.receiver.release();
            if port.queue.waiting() >= BATCH {
                port.flush(|body| self.target.recycle(body));
            }
            // Several reads of one frame: what they borrow goes back before the
            // next frame wants as much.
            if self.target.next_ready().is_some() {
                self.send_ready();
            }
        }
        if let Some((mac, id)) = conflict {
            self.warn_of_conflict(now, mac, id);
        }
        taken
    }

    /// Queues the replies whose time has come.
    fn send_ready(&mut self) {
        while let Some(id) = self.target.next_ready() {
            let port = self
                .nics
                .get_mut(usize::from(id.0))
                .and_then(|nic| nic.port.as_mut());
            let Some(port) = port else {
                self.target.skip();
                continue;
            };
            if port.queue.waiting() >= BATCH {
                port.flush(|body| self.target.recycle(body));
            }
            let Some(head) = port.queue.head() else {
                self.target.skip();
                continue;
            };
            if let Action::Reply { len, body, sum } = self.target.emit(head) {
                if let Err(body) = port.queue.push(len, body, sum) {
                    self.target.recycle(body);
                }
            }
        }
    }

    /// Sends all replies; says whether some must wait for a socket.
    fn flush(&mut self) -> bool {
        let mut any_blocked = false;
        for (index, nic) in self.nics.iter_mut().enumerate() {
            let Some(port) = nic.port.as_mut() else {
                continue;
            };
            let blocked = port.queue.waiting() > 0
                && port.flush(|body| self.target.recycle(body)) == Flushed::Blocked;
            any_blocked |= blocked;
            self.wait.want_writable(index, port, blocked);
        }
        any_blocked
    }

    /// Looks for the next frame for a moment; says whether there is work.
    ///
    /// Only a ring can be looked at without asking the kernel.
    fn spin(&mut self, shallow: bool) -> bool {
        let now = Instant::now();
        // What is due sooner than a sleep could end is waited for here.
        let due = self.target.deadline().filter(|at| *at <= now + SHORT_SLEEP);
        let spin = if shallow {
            self.tuneup.spin
        } else {
            Duration::ZERO
        };
        let until = due.unwrap_or(now).max(now + spin);
        if until <= now {
            return due.is_some();
        }
        let nics = &self.nics;
        let ports = || nics.iter().filter_map(|nic| nic.port.as_ref());
        if !ports().any(|port| port.receiver.is_ring()) {
            return false;
        }
        loop {
            if self.target.has_work() || ports().any(|port| port.receiver.peek().is_some()) {
                return true;
            }
            if Instant::now() >= until {
                return due.is_some();
            }
            std::hint::spin_loop();
        }
    }

    /// How long nothing has to be done, unless something happens.
    fn sleep(&mut self, stopping: Option<Stopping>) -> Option<Duration> {
        let now = Instant::now();
        let disk = self
            .target
            .deadline()
            .map(|at| at.saturating_duration_since(now));
        let progress = self.target.volume().progress_at();
        let stop = stopping.map(|stop| {
            let end = stop.since.max(progress) + self.tuneup.io_patience;
            let due = end.min(stop.told + STOP_LOG_INTERVAL);
            due.saturating_duration_since(now)
        });
        let nic = self
            .nics
            .iter()
            .any(|nic| nic.port.is_none())
            .then_some(NIC_RETRY);
        let heartbeat = self.target.is_writing().then_some(HEARTBEAT);
        let report = self.report.due();
        let report = report.map(|at| at.saturating_duration_since(now));
        [disk, stop, nic, heartbeat, report]
            .into_iter()
            .flatten()
            .min()
    }

    /// How a stop goes on: `None` while the disk has not finished.
    fn end(&mut self, stop: &mut Stopping, blocked: bool) -> Option<Result<(), ServeError>> {
        let patience = self.tuneup.io_patience;
        if self.target.is_idle() && !blocked {
            log::info!("{}: stopped: {}", self.address, self.target.counters());
            if let Some(record) = self.record.take() {
                let volume = self.target.volume();
                let removed = record.remove_with(&self.image, || volume.remove_arena());
                if let Err(e) = removed {
                    log::warn!(
                        "{}: removing the arena and its record: {e}; the next start does it",
                        self.address
                    );
                }
            }
            return Some(Ok(()));
        }
        if stop.told.elapsed() >= STOP_LOG_INTERVAL {
            stop.told = Instant::now();
            self.tell_what_is_left();
        }
        let volume = self.target.volume();
        // As long as less and less is left, the disk does finish.
        let silent = stop.since.max(volume.progress_at()).elapsed();
        let arena = volume.arena_path();
        (silent >= patience).then_some(Err(ServeError::StopTimeout(self.address, patience, arena)))
    }

    /// Says what a stop waits for.
    fn tell_what_is_left(&mut self) {
        let volume = self.target.volume();
        let (left, unmerged) = (volume.left_bytes(), volume.unmerged_bytes());
        let (address, image) = (self.address, self.image.path().display());
        if unmerged > 0 {
            log::info!(
                "{address}: stopping: {} left to merge into {image}",
                amount(unmerged)
            );
        } else {
            log::info!(
                "{address}: stopping: {} left to write to {image}",
                amount(left)
            );
        }
    }

    fn obey(
        &mut self,
        signals: &Signals,
        stopping: &mut Option<Stopping>,
    ) -> Result<(), ServeError> {
        while let Some(event) = signals.next() {
            match event {
                Event::Stop if stopping.is_some() && !self.keep_shadow() => {
                    return Err(ServeError::StoppedTwice(self.address));
                }
                Event::Stop if stopping.is_some() => {}
                Event::Stop => {
                    let now = Instant::now();
                    *stopping = Some(Stopping {
                        since: now,
                        told: now,
                    });
                    self.target.drain();
                    let ports = self.nics.iter().map(|nic| nic.port.as_ref()).enumerate();
                    let ports = ports.filter_map(|(index, port)| Some((index, port?)));
                    self.wait.ignore_frames(ports);
                }
                Event::Measure => self.measure(),
                Event::Order(count) => match Order::after(count) {
                    Some(order) => self.order(order),
                    None => log::warn!(
                        "{}: USR2 after {count} USR1: one is a freeze, two are a thaw; nothing done",
                        self.address
                    ),
                },
            }
        }
        Ok(())
    }

    /// Carries out an order to freeze or thaw, and reports one that makes no
    /// sense now.
    fn order(&mut self, order: Order) {
        if self.read_only {
            let order = match order {
                Order::Freeze => "freeze",
                Order::Thaw => "thaw",
            };
            log::warn!(
                "{}: {order}: the image is read-only and does not change; nothing done",
                self.address
            );
            return;
        }
        let now = Instant::now();
        if let Err(senseless) = self.target.volume().order(now, order, uuid()) {
            log::warn!("{}: {senseless}", self.address);
        }
    }

    /// Leaves a shadow to the next start rather than merge it, at a second signal
    /// to stop; `false` if there is none, or that was so already.
    fn keep_shadow(&mut self) -> bool {
        let volume = self.target.volume();
        let merges = volume.phase() != Phase::Running && volume.on_stop() == OnStop::Merge;
        if merges {
            log::warn!("{}: the shadow is kept for the next start", self.address);
            volume.set_on_stop(OnStop::Keep);
        }
        merges
    }

    /// Measures the image again and tells everyone.
    fn measure(&mut self) {
        if self.target.volume().is_bound() {
            log::warn!(
                "{}: size kept while there is a shadow; send HUP again after the thaw",
                self.address
            );
            return;
        }
        match self.image.bounds() {
            Ok(bounds) => {
                let before = self.target.sectors();
                let sectors = count(bounds.sectors, "sector");
                if self.target.resize(Instant::now(), bounds) {
                    log::info!("{}: {sectors}, {before} before", self.address);
                } else {
                    log::info!("{}: {sectors}, as before", self.address);
                }
            }
            Err(why) => {
                let path = self.image.path().to_owned();
                log::error!("{}: size kept: {}", self.address, ImageError { path, why });
            }
        }
        self.advertise_everywhere();
    }

    /// Follows what became of the interfaces.
    fn look_at_links(&mut self) {
        self.watch.drain();
        for index in 0..self.nics.len() {
            if let Some(port) = &self.nics[index].port {
                port.clear_error();
            }
            let id = NicId(index as u16);
            match self.nics[index].refresh(&self.port_options) {
                Change::None => {}
                Change::Lost(e) => {
                    log::warn!("{}: {e}; waiting for it", self.address);
                    self.target.set_nic(id, None);
                }
                Change::Down => {
                    log::warn!("{}: {}: link down", self.address, self.nics[index].name);
                }
                Change::Up => {
                    log::info!("{}: {}: link up", self.address, self.nics[index].name);
                    self.advertise(id);
                }
                Change::Reopened => {
                    log::info!("{}: {}", self.address, describe_nic(&self.nics[index]));
                    match self.attach(index) {
                        Ok(()) => self.advertise(id),
                        Err(e) => log::error!("{}: {e}", self.address),
                    }
                }
            }
        }
    }

    /// Lets the target know a NIC, and the loop hear it.
    fn attach(&mut self, index: usize) -> Result<(), ServeError> {
        let nic = &self.nics[index];
        self.target.set_nic(NicId(index as u16), nic.info());
        if let Some(port) = &nic.port {
            let how = if port.receiver.is_ring() {
                "a ring"
            } else {
                "recvmmsg"
            };
            log::debug!("{}: {}: receives with {how}", self.address, nic.name);
        }
        match &nic.port {
            Some(port) => self
                .wait
                .watch_port(index, port)
                .map_err(|e| ServeError::System("waiting for frames", e)),
            None => Ok(()),
        }
    }

    fn advertise_everywhere(&mut self) {
        for index in 0..self.nics.len() {
            self.advertise(NicId(index as u16));
        }
    }

    /// Tells those who may know on one NIC that we are here.
    fn advertise(&mut self, id: NicId) {
        let Some(port) = self.nics[usize::from(id.0)].port.as_mut() else {
            return;
        };
        for mac in self.target.audience() {
            if port.queue.waiting() >= BATCH {
                port.flush(|body| self.target.recycle(body));
            }
            let Some(head) = port.queue.head() else {
                return;
            };
            if let Some(len) = self.target.advertise(id, mac, head) {
                // There is no body to give back.
                let _ = port.queue.push(len, None, None);
            }
        }
    }

    fn warn_of_conflict(&mut self, now: Instant, mac: MacAddr, id: NicId) {
        if self
            .conflict_logged
            .is_none_or(|last| now - last >= CONFLICT_LOG_INTERVAL)
        {
            self.conflict_logged = Some(now);
            let nic = &self.nics[usize::from(id.0)].name;
            log::error!(
                "{}: another target at {mac} (on {nic}) says that it has this address too: \
                 initiators will mix the two disks; stop one of them now",
                self.address
            );
        }
    }
}

/// A number of bytes, in words.
fn amount(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        mib => format!("{mib} MiB"),
    }
}

/// A number that no other has: the name of a shadow, the tag of a question.
fn uuid() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16);
    // Without /proc: no two freezes of an image are at the same time.
    let number =
        number.unwrap_or_else(|_| u128::from(real_time()) << 64 | u128::from(std::process::id()));
    number.to_be_bytes()
}
