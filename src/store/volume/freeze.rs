//! The phases of a freeze, and the steps between them. Each step's order is why
//! a crash at any point loses nothing:
//!
//! ```text
//! Creating   PATH.new is made, "freezing", and synced
//!            the cut: what was written is of the old generation, what comes of the new
//! Freezing   the old generation goes to the image, which is synced
//! Appearing  PATH.new becomes PATH: the image is still and whole
//! Frozen     the new generation goes to the shadow: data, sync, bits, sync
//! Sealing    nothing more goes there; PATH becomes PATH.thaw, and its marker PATH;
//!            the directory is synced; then "thawing", synced
//! Thawing    everything goes to the image: data, sync, bits cleared, sync
//! Vanishing  all is in the image, and synced: record, marker and shadow are removed
//! ```
//!
//! Until "thawing" is on the disk the image is not touched; from then on a dead
//! process's cache is the image's. Before, what the cache holds of the new
//! generation is the shadow's.
//!
//! PATH is another inode on the disk before the image is touched, whoever wants
//! the thaw: who finds the same inode before and after has a copy of one instant.
//! The marker is made with the shadow, as PATH.thaw, so that a thaw needs no room
//! on a filesystem that is full. One exchange moves both names, so that PATH is
//! never absent before all is merged. Where the filesystem cannot exchange, the
//! marker is removed, the shadow renamed, the marker made again: killed between,
//! the shadow is PATH, and frozen, or PATH.thaw, and to be merged.
//!
//! At the end the record goes first, since a record without a shadow refuses every
//! start; then the marker, for the same reason; then the shadow, which is empty.

use std::time::{Duration, Instant};

use shadow::{Commit, Geometry, Map, SECTOR, State};

use super::super::cache::{DIRTY_MIN, Epoch};
use super::super::disk::{Disk, DiskError, Job, JobId, Step};
use super::Volume;
use super::frozen::{Frozen, Thaw};
use super::merge::Merge;
use super::view::View;
use crate::freeze::{Begin, InvalidTransition, OnStop, Order, Phase, decide};

pub(super) const STEP: JobId = JobId(u64::MAX - 3);
pub(super) const COMMIT: JobId = JobId(u64::MAX - 4);
pub(super) const FORGET: JobId = JobId(u64::MAX - 5);
/// How long after a step failed it is tried again.
const STEP_RETRY: Duration = Duration::from_secs(1);

/// What a volume is told of its shadow.
pub struct ShadowSide {
    /// Does what must be done in it. The engine's backing knows both files, and
    /// wakes as the image's does.
    pub disk: Box<dyn Disk>,
    /// The most bytes it may have.
    pub limit: Option<u64>,
    /// What it is called.
    pub name: String,
    /// One that a process before us has left, brought up to date.
    pub left: Option<LeftShadow>,
}

/// A shadow that is there already.
#[derive(Debug)]
pub struct LeftShadow {
    /// Frozen or thawing.
    pub state: State,
    /// What it covers.
    pub geometry: Geometry,
    /// What is in it.
    pub map: Map,
    /// That of the writes that it takes.
    pub generation: u64,
}

/// Where a volume stands between two freezes.
#[derive(Debug)]
pub(super) enum Stage {
    Running,
    /// The shadow is being made.
    Creating {
        made: bool,
        uuid: [u8; 16],
        geometry: Geometry,
        slots: u32,
    },
    /// Everything up to an epoch goes to the image.
    Freezing {
        cut: Epoch,
    },
    Appearing,
    Frozen,
    Sealing,
    Thawing,
    Vanishing,
    /// No shadow: writes are not answered, until this time at the latest.
    Held {
        until: Instant,
        /// What is to be on stable storage, once nothing waits any more.
        drain: Option<Epoch>,
        still: bool,
    },
}

/// A freeze, and what is asked of it besides.
pub(super) struct Freezing {
    pub stage: Stage,
    pub side: Option<ShadowSide>,
    /// What the next chance is used for.
    pub thaw: Option<Thaw>,
    /// A freeze that was ordered when the shadow was gone, and its removal not yet
    /// on stable storage.
    again: Option<[u8; 16]>,
    /// Whether a step is under way, and when one that failed is tried again.
    pub step: bool,
    retry_at: Option<Instant>,
    /// The shadow takes no more: until when writes are not answered.
    pub full: Option<Instant>,
    /// Since when the image does not take some sectors while the shadow is made.
    unwell: Option<Instant>,
    /// How long the image is quiesced, while it is.
    pub frozen: Option<Frozen>,
    /// What a stop does with a shadow.
    pub on_stop: OnStop,
    /// How many slots may be dirty when nothing is frozen.
    pub dirty_max: u32,
    /// A change of the bitmap for a discard that is under way.
    pub forgetting: Option<Commit>,
}

impl Freezing {
    pub fn new(dirty_max: u32) -> Freezing {
        Freezing {
            stage: Stage::Running,
            side: None,
            thaw: None,
            again: None,
            step: false,
            retry_at: None,
            full: None,
            unwell: None,
            frozen: None,
            on_stop: OnStop::Merge,
            dirty_max,
            forgetting: None,
        }
    }

    /// Whether a discard is changing the bitmap.
    pub fn is_forgetting(&self) -> bool {
        self.forgetting.is_some()
    }

    fn name(&self) -> &str {
        self.side.as_ref().map_or("", |side| &side.name)
    }
}

impl Volume {
    /// A volume that can be frozen with a shadow, or is since before.
    pub fn with_shadow(mut self, mut side: ShadowSide) -> Volume {
        let mut reserve = None;
        if let Some(left) = side.left.take() {
            self.cache.set_generation(left.generation);
            let mib = (left.map.present() * left.geometry.chunk()) >> 20;
            let goes_on = match left.state {
                State::Freezing | State::Frozen => "frozen by an earlier process, until a thaw",
                State::Thawing => "the interrupted thaw goes on",
            };
            log::warn!(
                "{}: {}: {goes_on}: {mib} MiB to merge",
                self.export(),
                side.name
            );
            match left.state {
                State::Freezing | State::Frozen => {
                    self.freezing.stage = Stage::Frozen;
                    let slots = self.reserve(side.limit);
                    self.cache.limit_dirty(slots);
                    reserve = Some(u64::from(slots) * self.cache.block_bytes());
                }
                State::Thawing => self.begin_thawing(),
            }
            self.view = Some(View {
                geometry: left.geometry,
                map: left.map,
            });
        }
        self.freezing.side = Some(side);
        if let Some(reserve) = reserve {
            // It may be another one now, or have been given back.
            self.submit_step(Step::Reserve(reserve));
        }
        self
    }

    /// How far a freeze has come.
    pub fn phase(&self) -> Phase {
        match self.freezing.stage {
            Stage::Running => Phase::Running,
            Stage::Creating { .. } | Stage::Freezing { .. } | Stage::Appearing => Phase::Freezing,
            Stage::Frozen if self.freezing.thaw.is_none() => Phase::Frozen,
            Stage::Frozen | Stage::Sealing | Stage::Thawing | Stage::Vanishing => Phase::Thawing,
            Stage::Held { .. } => Phase::Held,
        }
    }

    /// Whether there is a shadow, or will be, so that the image must keep its
    /// size.
    pub fn is_bound(&self) -> bool {
        !matches!(self.freezing.stage, Stage::Running | Stage::Held { .. })
    }

    /// Chunks that are yet to be merged.
    pub(super) fn unmerged(&self) -> u64 {
        self.view.as_ref().map_or(0, |view| view.map.present())
    }

    /// Takes an order; `uuid` names the shadow of a freeze.
    pub fn order(
        &mut self,
        now: Instant,
        order: Order,
        uuid: [u8; 16],
    ) -> Result<(), InvalidTransition> {
        // With its name gone it is over for whoever looks on.
        let vanishing = matches!(self.freezing.stage, Stage::Vanishing);
        if vanishing && order == Order::Freeze && !self.draining {
            self.freezing.again = Some(uuid);
            return Ok(());
        }
        match decide(self.phase(), order, self.freezing.side.is_some())? {
            Begin::Freeze => self.begin_freeze(uuid),
            Begin::Hold => {
                log::info!(
                    "{}: freeze: no write is answered from now on (there is no -f)",
                    self.export()
                );
                self.freezing.stage = Stage::Held {
                    until: now + self.options.hold_max,
                    drain: None,
                    still: false,
                };
            }
            Begin::Withdraw => {
                log::info!("{}: thaw: the freeze is withdrawn", self.export());
                self.freezing.thaw = Some(Thaw::Ordered);
            }
            Begin::Thaw => self.freezing.thaw = Some(Thaw::Ordered),
            Begin::Release => self.release("thaw"),
        }
        Ok(())
    }

    /// What is done with the shadow at the end.
    pub fn set_on_stop(&mut self, on_stop: OnStop) {
        self.freezing.on_stop = on_stop;
    }

    /// What is done with the shadow at the end.
    pub fn on_stop(&self) -> OnStop {
        self.freezing.on_stop
    }

    /// Export and shadow, as log lines begin.
    pub(super) fn shadow(&self) -> String {
        format!("{}: {}", self.export(), self.freezing.name())
    }

    fn release(&mut self, why: &str) {
        log::info!("{}: {why}: writes are answered again", self.export());
        self.freezing.stage = Stage::Running;
    }

    fn begin_freeze(&mut self, uuid: [u8; 16]) {
        if !self.is_well() {
            log::error!(
                "{}: freeze refused: {} does not take some sectors, which are kept in the \
                 cache; write them again or discard them first",
                self.export(),
                self.image()
            );
            return;
        }
        let limit = self.freezing.side.as_ref().and_then(|side| side.limit);
        let slots = self.reserve(limit);
        let block = self.cache.block_bytes();
        let Some(geometry) = Geometry::new(
            block as u32,
            self.bounds.start,
            self.bounds.sectors * SECTOR,
        ) else {
            log::error!(
                "{}: {}: freeze: too large for a shadow; nothing done",
                self.export(),
                self.image()
            );
            return;
        };
        log::info!(
            "{}: freeze: making {}.new",
            self.export(),
            self.freezing.name()
        );
        self.freezing.stage = Stage::Creating {
            made: false,
            uuid,
            geometry,
            slots,
        };
        let step = Step::Create {
            uuid,
            generation: self.cache.generation() + 1,
            geometry,
            reserve: u64::from(slots) * block,
        };
        self.submit_step(step);
    }

    pub(super) fn submit_step(&mut self, step: Step) {
        if let Some(side) = &mut self.freezing.side {
            self.freezing.step = true;
            side.disk.submit(STEP, Job::Step(step));
        }
    }

    pub(super) fn step_ended(&mut self, result: Result<(), DiskError>, now: Instant) {
        self.freezing.step = false;
        self.freezing.retry_at = None;
        let export = self.export();
        let failed = result.inspect_err(|e| log::error!("{export}: {e}"));
        let failed = failed.is_err();
        let shadow = self.shadow();
        match &mut self.freezing.stage {
            Stage::Creating { made, .. } if !failed => *made = true,
            Stage::Creating { .. } => {
                log::error!("{shadow}: freeze not done, and nothing is changed");
                self.freezing.stage = Stage::Running;
                self.freezing.thaw = None;
            }
            Stage::Appearing if !failed => {
                log::info!("{shadow}: frozen: the shadow is there, and the image is quiesced");
                self.freezing.stage = Stage::Frozen;
            }
            Stage::Appearing => {
                log::error!("{shadow}: the freeze is withdrawn, since the shadow cannot appear");
                // It may have the name all the same.
                self.freezing.stage = Stage::Sealing;
            }
            Stage::Sealing if !failed => {
                // What went to the shadow and is not there for certain is the
                // image's now, like all else.
                self.cache.write_again(now);
                self.begin_thawing();
                self.freezing.thaw = None;
                self.freezing.full = None;
            }
            Stage::Vanishing if !failed => {
                match self.view {
                    Some(_) => {
                        log::info!("{shadow}: thawed: all is in the image, and the shadow is gone")
                    }
                    None => log::info!("{shadow}: the freeze is withdrawn, and the shadow is gone"),
                }
                self.view = None;
                self.merge = Merge::default();
                self.cache.limit_dirty(self.freezing.dirty_max);
                self.freezing.stage = Stage::Running;
                self.freezing.thaw = None;
                if let Some(uuid) = self.freezing.again.take() {
                    self.begin_freeze(uuid);
                }
            }
            // The reserve cannot be had any more; to give it back cannot fail so
            // that it matters.
            Stage::Frozen if failed => self.shadow_is_full(now, true),
            Stage::Frozen => {}
            Stage::Sealing => {
                self.freezing.retry_at = Some(now + STEP_RETRY);
                // Until then nothing is written back anywhere: hosts are told, as
                // of any disk that fails, and a sync shows that it is over.
                self.cache.record_outside(now);
                self.failed(now);
            }
            _ => self.freezing.retry_at = Some(now + STEP_RETRY),
        }
    }

    /// Goes on with the freeze as far as it goes now.
    pub(super) fn advance_freeze(&mut self, now: Instant) {
        if self.draining {
            self.stop_freeze();
        }
        // Nothing else may happen that would bring us here again.
        loop {
            let stage = std::mem::discriminant(&self.freezing.stage);
            self.next_stage(now);
            if stage == std::mem::discriminant(&self.freezing.stage) {
                return;
            }
        }
    }

    fn next_stage(&mut self, now: Instant) {
        self.freezing.retry_at.take_if(|at| *at <= now);
        let idle = !self.freezing.step && self.freezing.retry_at.is_none();
        match self.freezing.stage {
            Stage::Running => {}
            Stage::Creating {
                made,
                uuid,
                geometry,
                slots,
            } => {
                let unwell = made && !self.is_well();
                let since = unwell.then(|| self.freezing.unwell.unwrap_or(now));
                self.freezing.unwell = since;
                let patience = self.options.io_patience;
                let late = since.is_some_and(|since| now - since >= patience);
                if unwell && (late || self.freezing.thaw.is_some()) {
                    // What the cache keeps would not be in the image that is
                    // frozen.
                    log::error!(
                        "{}: the freeze is withdrawn: {} does not take some sectors, which \
                         are kept in the cache; write them again or discard them first",
                        self.shadow(),
                        self.image()
                    );
                    self.freezing.stage = Stage::Vanishing;
                    self.submit_step(Step::Vanish);
                } else if made && !unwell && !self.is_discarding() {
                    // A discard that the disk has is of the generation before.
                    self.view = Some(View {
                        geometry,
                        map: Map::new(geometry, uuid),
                    });
                    self.wait_for_bits();
                    self.cache.limit_dirty(slots);
                    let cut = self.cache.begin_generation();
                    self.freezing.stage = Stage::Freezing { cut };
                }
            }
            Stage::Freezing { cut } => {
                if self.cache.is_synced(cut) || shadow::fault!("frozen-before-synced") {
                    self.cache.end_drain();
                    if self.freezing.thaw.is_some() {
                        self.freezing.stage = Stage::Sealing;
                    } else {
                        self.freezing.stage = Stage::Appearing;
                        self.submit_step(Step::Appear);
                    }
                }
            }
            Stage::Appearing => {}
            Stage::Frozen => {
                self.look_at_time(now);
                if self.freezing.full.is_some_and(|until| until <= now) {
                    let hold_max = self.options.hold_max.as_secs();
                    log::warn!(
                        "{}: full for too long (hold_max, {hold_max} s)",
                        self.shadow()
                    );
                    self.freezing.thaw.get_or_insert(Thaw::Full);
                }
                // A step under way is none of the next stage's.
                if let Some(thaw) = self.freezing.thaw.filter(|_| idle) {
                    log::info!(
                        "{}: {thaw}: {} MiB to merge",
                        self.shadow(),
                        self.unmerged_mib()
                    );
                    self.freezing.frozen = None;
                    self.freezing.stage = Stage::Sealing;
                }
            }
            Stage::Sealing => {
                // What is under way to the shadow ends first.
                let quiet = self.writing == 0 && self.syncing.is_none() && !self.is_discarding();
                if quiet && idle {
                    self.submit_step(Step::Seal);
                }
            }
            Stage::Thawing => {
                self.merge(now);
                let plain = self.unmerged() == 0 && self.syncing.is_none();
                let view = self.view.as_ref();
                let doubtful = view.is_some_and(|view| view.map.is_doubtful());
                if plain && doubtful && self.flushing.is_none() {
                    self.cache.record_outside(now);
                    self.flushing = Some(self.cache.close_epoch());
                }
                let done = plain && !doubtful && self.merge.is_idle();
                // Nothing that reads the shadow is under way any more.
                if done && self.gathers == 0 && !self.discards.is_submitted() {
                    self.freezing.stage = Stage::Vanishing;
                    self.submit_step(Step::Vanish);
                }
            }
            Stage::Vanishing => {
                if idle {
                    self.submit_step(Step::Vanish);
                }
            }
            Stage::Held {
                until,
                drain,
                still,
            } => {
                // What waits for a slot was taken before the order, and comes first.
                let drain = match drain {
                    None if self.has_no_waiting_writes() => Some(self.cache.close_epoch()),
                    drain => drain,
                };
                let synced = drain.is_some_and(|epoch| self.cache.is_synced(epoch));
                let synced = synced && self.is_well();
                if synced && !still {
                    log::info!("{}: frozen: {} is quiesced", self.export(), self.image());
                }
                self.freezing.stage = Stage::Held {
                    until,
                    drain,
                    still: synced,
                };
                if until <= now {
                    self.release("thaw, since hold_max is over");
                }
            }
        }
    }

    /// From here on everything goes to the image; hosts leave the merge its share
    /// of the slots that may be dirty.
    fn begin_thawing(&mut self) {
        let all = u64::from(self.freezing.dirty_max);
        let share = u64::from(self.options.merge_share);
        let hosts = (all * (100 - share) / 100).max(DIRTY_MIN).min(all);
        self.cache.limit_dirty(hosts as u32);
        self.freezing.stage = Stage::Thawing;
    }

    pub(super) fn unmerged_mib(&self) -> u64 {
        self.unmerged_bytes() >> 20
    }

    /// Bytes of the chunks that are yet to be merged.
    pub fn unmerged_bytes(&self) -> u64 {
        let view = self.view.as_ref();
        view.map_or(0, |view| view.map.present() * view.geometry.chunk())
    }

    /// Brings the freeze to where a stop may find it.
    fn stop_freeze(&mut self) {
        if matches!(self.freezing.stage, Stage::Held { .. }) {
            self.release("stop");
        } else if self.freezing.on_stop == OnStop::Merge && self.phase() != Phase::Running {
            self.freezing.thaw.get_or_insert(Thaw::Stop);
        }
    }

    /// Whether a stop may leave the freeze as it is.
    pub(super) fn may_stop(&self) -> bool {
        let keep = self.freezing.on_stop == OnStop::Keep && self.freezing.thaw.is_none();
        match self.freezing.stage {
            Stage::Running => true,
            Stage::Frozen => keep,
            Stage::Thawing => self.freezing.on_stop == OnStop::Keep,
            _ => false,
        }
    }

    /// When the freeze goes on by itself.
    pub(super) fn freeze_deadline(&self) -> Option<Instant> {
        let held = match self.freezing.stage {
            Stage::Held { until, .. } => Some(until),
            Stage::Frozen => self.freezing.full,
            Stage::Creating { .. } => self.freezing.unwell.map(|t| t + self.options.io_patience),
            _ => None,
        };
        let waits = matches!(self.freezing.stage, Stage::Frozen)
            && self.freezing.thaw.is_none()
            && !self.draining;
        let frozen = self.freezing.frozen.filter(|_| waits);
        let frozen = frozen.map(|frozen| frozen.deadline(self.options.freeze_max));
        let merge = match self.freezing.stage {
            Stage::Thawing => self.merge.retry_at(),
            _ => None,
        };
        let all = [held, frozen, merge, self.freezing.retry_at];
        all.into_iter().flatten().min()
    }

    /// Up to which epoch the freeze wants the cache written back.
    pub(super) fn freeze_wants(&self) -> Option<Epoch> {
        match self.freezing.stage {
            Stage::Freezing { cut } => Some(cut),
            Stage::Held { drain, .. } => drain.or(Some(self.cache.epoch())),
            _ => None,
        }
    }

    /// Whether a write of so many sectors that had to wait must wait on.
    pub(super) fn is_shadow_full_for(&mut self, now: Instant, sectors: u64) -> bool {
        let frozen = matches!(self.freezing.stage, Stage::Frozen);
        frozen && (self.holds_writes(now, sectors) || self.is_thaw_due())
    }

    /// Whether the shadow takes no more, for what it has is to be merged.
    pub(super) fn is_thaw_due(&self) -> bool {
        matches!(self.freezing.stage, Stage::Frozen) && self.freezing.thaw.is_some()
    }

    /// Whether a stop need not wait for writes that wait: a full shadow that is
    /// kept takes them as little as any that come.
    pub(super) fn leaves_parked(&self) -> bool {
        self.draining && self.may_stop() && self.freezing.full.is_some()
    }

    /// Where what is dirty is written back to now.
    pub(super) fn destination(&self) -> Option<Destination> {
        match self.freezing.stage {
            Stage::Frozen => Some(Destination::Shadow),
            Stage::Appearing | Stage::Sealing => None,
            _ => Some(Destination::Image),
        }
    }
}

/// A file that takes what is dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    Image,
    Shadow,
}
