//! A target in its loop, a slow disk and its hosts, in virtual time.

use std::collections::{BTreeSet, HashMap};

use super::*;

/// A disk that does one thing after the other, in the order in which it was told
/// so: what it has been given stands before what comes. As with the kernel's page
/// cache, to look for what is not there begins to read it.
pub(super) struct Slow {
    pub(super) line: Rc<RefCell<Line>>,
}

pub(super) struct Line {
    pub(super) engine: Inline,
    pub(super) now: Instant,
    pub(super) free_at: Instant,
    pub(super) jobs: VecDeque<(Instant, JobId, Job)>,
    /// What an operation takes.
    pub(super) each: Duration,
    /// Whether reads are answered from the page cache.
    pub(super) warm: bool,
    /// Without a page cache.
    pub(super) direct: bool,
    /// Pages of the page cache: when each is there, or was begun to be read for
    /// longer than this.
    pub(super) pages: HashMap<u64, Instant>,
    /// Where the page cache has something that the disk has not.
    pub(super) dirty: BTreeSet<u64>,
    /// When the sync in flight began, and when the last one that has ended did.
    pub(super) sync_began: Option<Instant>,
    pub(super) synced: Option<Instant>,
}

impl Line {
    pub(super) fn takes(&mut self, job: &Job) -> Duration {
        let operations = match job {
            Job::Write(segments) if self.direct => segments.len(),
            Job::Push { at, len } => {
                let before = self.dirty.len();
                self.dirty.retain(|place| !(*at..at + len).contains(place));
                before - self.dirty.len()
            }
            Job::Sync => std::mem::take(&mut self.dirty).len() + 1,
            Job::Prefetch { .. } | Job::Save { .. } => 0,
            _ => 1,
        };
        let operations = operations as u32;
        self.each * operations
    }
}

impl Line {
    /// Has the disk work for so long after all that it was told; returns when that
    /// ends.
    pub(super) fn takes_until(&mut self, takes: Duration) -> Instant {
        self.free_at = self.free_at.max(self.now) + takes;
        self.free_at
    }
}

impl Disk for Slow {
    fn submit(&mut self, id: JobId, job: Job) {
        let mut line = self.line.borrow_mut();
        if matches!(job, Job::Sync) {
            line.sync_began = Some(line.now);
        }
        let mut is_copied = false;
        if let (Job::Write(segments), false) = (&job, line.direct) {
            line.dirty.extend(segments.iter().map(|segment| segment.at));
            is_copied = true;
        }
        let begun = match &job {
            Job::Read { at, .. } => line.pages.get(&(at / 4096)).copied(),
            _ => None,
        };
        let ends = match begun {
            Some(there) => there.max(line.now),
            None if is_copied => line.now,
            None => {
                let takes = line.takes(&job);
                line.takes_until(takes)
            }
        };
        let at = line.jobs.partition_point(|(before, ..)| *before <= ends);
        line.jobs.insert(at, (ends, id, job));
    }

    fn reap(&mut self) -> Option<Done> {
        let mut line = self.line.borrow_mut();
        let next = line.jobs.front();
        next.filter(|(ends, ..)| *ends <= line.now)?;
        let (_, id, job) = line.jobs.pop_front()?;
        if matches!(job, Job::Sync) {
            line.synced = line.sync_began;
        }
        line.engine.submit(id, job);
        line.engine.reap()
    }

    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        let mut line = self.line.borrow_mut();
        if line.direct {
            return false;
        }
        let page = offset / 4096;
        if !line.warm && !line.pages.contains_key(&page) {
            let each = line.each;
            let there = line.takes_until(each);
            line.pages.insert(page, there);
        }
        let there = line.pages.get(&page).is_none_or(|there| *there <= line.now);
        there && line.engine.try_now(buf, offset)
    }

    fn is_cached(&self, offset: u64, _: u64) -> bool {
        let line = self.line.borrow();
        line.warm || line.pages.contains_key(&(offset / 4096))
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn has_done(&mut self) -> bool {
        let line = self.line.borrow();
        line.jobs
            .front()
            .is_some_and(|(ends, ..)| *ends <= line.now)
    }
}

/// How a host asks.
pub(super) enum Pace {
    /// So many requests at a time, each sent again until it is answered.
    Closed(usize),
    /// One after each such time, whatever comes of it.
    Open(Duration),
}

pub(super) struct Host {
    pub(super) mac: u8,
    pub(super) shelf: u16,
    pub(super) pace: Pace,
    pub(super) load: Box<dyn FnMut(u64) -> Ask>,
    pub(super) asked: u64,
    pub(super) next: Instant,
    /// Tags that are not answered, and when they were sent.
    pub(super) open: VecDeque<(u32, Instant, Ask)>,
    pub(super) answered: u64,
    pub(super) failed: u64,
}

impl Host {
    pub(super) fn new(mac: u8, pace: Pace, load: impl FnMut(u64) -> Ask + 'static) -> Host {
        Host {
            mac,
            shelf: SHELF,
            pace,
            load: Box::new(load),
            asked: 0,
            next: Instant::now(),
            open: VecDeque::new(),
            answered: 0,
            failed: 0,
        }
    }
}

/// A target in its loop, and its hosts.
pub(super) struct Hall {
    pub(super) target: Target,
    pub(super) line: Rc<RefCell<Line>>,
    pub(super) hosts: Vec<Host>,
    pub(super) ring: VecDeque<Vec<u8>>,
    pub(super) now: Instant,
    pub(super) tag: u32,
    pub(super) _dir: TempDir,
}

/// How the hall's export is made.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) direct: bool,
    pub(super) align: usize,
    pub(super) durable: bool,
    pub(super) slots: u32,
    pub(super) each: Duration,
    pub(super) warm: bool,
}

pub(super) const PLAN: Plan = Plan {
    direct: false,
    align: 512,
    durable: false,
    slots: 4096,
    each: DISK,
    warm: false,
};

impl Hall {
    pub(super) fn new(plan: Plan) -> Hall {
        let now = Instant::now();
        let line = Rc::new(RefCell::new(Line {
            engine: Inline::new(Arc::new(MemoryFile::new(vec![0; LARGE as usize * 512]))),
            now,
            free_at: now,
            jobs: VecDeque::new(),
            each: plan.each,
            warm: plan.warm,
            direct: plan.direct,
            pages: HashMap::new(),
            dirty: BTreeSet::new(),
            sync_began: None,
            synced: None,
        }));
        let disk = Box::new(Slow {
            line: Rc::clone(&line),
        });
        let arena = Arena::anonymous(4096, plan.slots).unwrap();
        let cache = Cache::new(arena, plan.align, plan.slots / 4 * 3);
        let bounds = Bounds {
            start: 0,
            sectors: LARGE,
        };
        let options = VolumeOptions {
            export: "e1.1".into(),
            image: "disk.img".into(),
            align: plan.align,
            direct: plan.direct,
            write_through: false,
            request_max: 9014,
            parked_max: 4 << 20,
            max_dirty_age: MAX_DIRTY_AGE,
            idle_flush: IDLE_FLUSH,
            io_patience: IO_PATIENCE,
            read_ahead: 0,
            write_depth: 32,
            merge_share: 25,
            shadow_full: crate::freeze::WhenFull::Thaw,
            hold_max: Duration::from_secs(120),
            freeze_max: Duration::ZERO,
        };
        let volume = Volume::new(now, disk, cache, bounds, options);
        let dir = tempfile::tempdir().unwrap();
        let address = Address::new(SHELF, SLOT).unwrap().to_string();
        let state = StateFile::new(dir.path(), &address, &dir.path().join("disk"));
        let settings = Settings {
            durable: plan.durable,
            ..settings()
        };
        let wire = WireState::default();
        let mut target = Target::new(now, settings, volume, wire, Arc::new(state));
        target.set_nic(SMALL, Some(nic(SMALL)));
        Hall {
            target,
            line,
            hosts: Vec::new(),
            ring: VecDeque::new(),
            now,
            tag: 0,
            _dir: dir,
        }
    }

    pub(super) fn encode(&mut self, mac: u8, shelf: u16, ask: &Ask) -> (u32, Vec<u8>) {
        self.tag += 1;
        let bytes = ask.encode(&Defaults {
            destination: host(1),
            source: host(mac),
            shelf,
            slot: SLOT,
            tag: self.tag.to_be_bytes(),
        });
        (self.tag, bytes)
    }

    /// Has the hosts send what they may now.
    pub(super) fn send(&mut self) {
        let mut hosts = std::mem::take(&mut self.hosts);
        for host in &mut hosts {
            loop {
                let late = host.open.front();
                let late = late.filter(|(_, sent, _)| self.now - *sent >= RESEND);
                let ask = match &host.pace {
                    Pace::Open(every) if host.next <= self.now => {
                        host.next += *every;
                        (host.load)(host.asked)
                    }
                    Pace::Closed(_) if late.is_some() => host.open.pop_front().unwrap().2,
                    Pace::Closed(depth) if host.open.len() < *depth => (host.load)(host.asked),
                    _ => break,
                };
                host.asked += 1;
                let (tag, bytes) = self.encode(host.mac, host.shelf, &ask);
                if let Pace::Closed(_) = host.pace {
                    host.open.push_back((tag, self.now, ask));
                }
                if self.ring.len() < RING {
                    self.ring.push_back(bytes);
                }
            }
        }
        self.hosts = hosts;
    }

    /// A reply reaches its host.
    pub(super) fn arrive(&mut self, reply: &[u8]) {
        self.now += PER_REPLY;
        let tag = u32::from_be_bytes(reply[20..24].try_into().unwrap());
        for host in self.hosts.iter_mut().filter(|host| host.mac == reply[5]) {
            host.answered += 1;
            host.failed += u64::from(reply[14] & 4 != 0 || reply[27] & 1 != 0);
            host.open.retain(|(open, ..)| *open != tag);
        }
    }

    pub(super) fn reply(&mut self, action: Action, head: &[u8]) {
        if let Action::Reply { len, body, .. } = action {
            self.target.recycle(body);
            self.arrive(&head[..len.min(60)]);
        }
    }

    /// A turn of the loop.
    pub(super) fn turn(&mut self) {
        let began = self.now;
        self.send();
        let most = if self.target.is_reading() {
            TURN_READING
        } else {
            TURN
        };
        let mut head = vec![0; HEAD_MAX];
        for _ in 0..most {
            let Some(bytes) = self.ring.pop_front() else {
                break;
            };
            let frame = Frame {
                bytes: &bytes,
                stamp: 0,
                whole: true,
                other_host: false,
            };
            self.now += PER_FRAME;
            let action = self.target.handle(began, SMALL, frame, &mut head);
            self.reply(action, &head);
            self.send_ready(&mut head);
        }
        self.line.borrow_mut().now = self.now;
        self.target.advance(self.now);
        self.send_ready(&mut head);
        self.now = self.now.max(began + PER_TURN);
    }

    pub(super) fn send_ready(&mut self, head: &mut [u8]) {
        while self.target.next_ready().is_some() {
            let action = self.target.emit(head);
            self.reply(action, head);
        }
    }

    /// Lets the hosts do their worst for so long; says how many requests of the
    /// first one were answered.
    pub(super) fn run(&mut self, time: Duration) -> u64 {
        for host in &mut self.hosts {
            host.next = self.now;
        }
        let (until, before) = (self.now + time, self.hosts[0].answered);
        while self.now < until {
            self.turn();
        }
        assert_eq!(self.hosts[0].failed, 0);
        self.hosts[0].answered - before
    }
}
