//! What the tests of a target's life need beyond [`support`](crate::support).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use aoede::wire::MacAddr;
use initiator::client::{Client, Patience};
use initiator::frame::{ATA, CONFIG, Reply, SECTOR};
use initiator::lab::{Deadline, Namespace, Need, Process, Spawn, Veth, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub use initiator::lab::Loop;

use crate::support::{AOEDE, Store};

/// How long to wait for what is due at once, on a machine that is busy.
pub fn soon() -> Deadline {
    Deadline::seconds(10)
}

/// Two hosts with any number of wires between them: wire N joins `tgtN` of
/// `host`, where the target runs, with `iniN` of `peer`.
pub struct Lab {
    /// Where the target runs.
    pub host: Namespace,
    /// Where initiators and other targets run.
    pub peer: Namespace,
}

impl Lab {
    /// Two hosts with so many wires.
    pub fn new(wires: usize, mtu: u32) -> Lab {
        let lab = Lab {
            host: Namespace::new().unwrap(),
            peer: Namespace::new().unwrap(),
        };
        for number in 0..wires {
            lab.wire(number, mtu);
        }
        lab
    }

    /// Makes a wire, or makes it anew after it was cut.
    pub fn wire(&self, number: usize, mtu: u32) {
        let (tgt, ini) = (format!("tgt{number}"), format!("ini{number}"));
        // It goes when it is cut, or with the namespaces.
        let _ = Veth::new((&tgt, &self.host), (&ini, &self.peer), mtu).unwrap();
    }

    /// Takes a wire away, both ends.
    pub fn cut(&self, number: usize) {
        self.host
            .ip(&["link", "del", &format!("tgt{number}")])
            .unwrap();
    }

    /// An initiator that has found e1.1 on this wire.
    pub fn client(&self, number: usize) -> Client {
        let nic = format!("ini{number}");
        let client = self.peer.enter(|| Client::connected(&nic, 1, 1));
        client.unwrap().unwrap()
    }

    /// One that has found it, and has heard nothing else yet.
    pub fn listener(&self, number: usize) -> Client {
        let mut client = self.client(number);
        // What is sent at the start goes out before the first answer.
        client.drain().unwrap();
        client
    }
}

/// The MAC of an interface.
pub fn mac_of(namespace: &Namespace, nic: &str) -> MacAddr {
    let link = namespace.enter(|| aoede::sys::link::query(nic)).unwrap();
    MacAddr(link.unwrap().unwrap().mac)
}

/// Waits for an advertisement of e1.1 and looks at all of it but what changes:
/// an answer that nobody asked for, to everyone.
pub fn advertisement(client: &mut Client, deadline: Deadline) -> Reply {
    let reply = find_advertisement(client, deadline);
    reply.unwrap_or_else(|| panic!("no advertisement came"))
}

/// The same, if one comes at all.
pub fn find_advertisement(client: &mut Client, deadline: Deadline) -> Option<Reply> {
    while let Some(reply) = client.recv(deadline.instant()).unwrap() {
        if reply.destination() != MacAddr::BROADCAST {
            continue;
        }
        assert_eq!(reply.bytes()[14], 0x18, "{reply:?}");
        assert_eq!((reply.command(), reply.tag()), (CONFIG, 0), "{reply:?}");
        assert_eq!((reply.shelf(), reply.slot()), (1, 1), "{reply:?}");
        assert!(reply.bytes().len() >= 60, "{reply:?}");
        assert!(reply.config().is_some(), "{reply:?}");
        return Some(reply);
    }
    None
}

/// The next `count` answers to ATA requests that nobody waited for.
pub fn ata_replies(client: &mut Client, count: usize) -> Vec<Reply> {
    let deadline = soon();
    let mut replies = Vec::new();
    while replies.len() < count {
        let Some(reply) = client.recv(deadline.instant()).unwrap() else {
            panic!("{} of {count} answers came", replies.len());
        };
        // Answers to questions asked while it was starting come too.
        if reply.command() == ATA {
            assert_eq!(reply.error(), None, "{reply:?}");
            replies.push(reply);
        }
    }
    replies
}

/// Sectors per frame that an advertisement tells.
pub fn sectors_told(reply: &Reply) -> u8 {
    reply.config().unwrap().sectors
}

/// A program's end.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub out: String,
    /// What it wrote to standard error.
    pub err: String,
}

impl Ended {
    /// The one line on standard error.
    pub fn line(&self) -> &str {
        let line = self.err.trim_end_matches('\n');
        assert!(!line.is_empty(), "nothing on stderr: {self:?}");
        assert!(!line.contains('\n'), "more than one line: {self:?}");
        line
    }
}

/// Runs a program to its end, which must come before the deadline.
pub fn run(namespace: Option<&Namespace>, mut command: Command, deadline: Deadline) -> Ended {
    let (mut out, mut err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command
        .stdin(Stdio::null())
        .stdout(out.try_clone().unwrap())
        .stderr(err.try_clone().unwrap())
        // With it a missing interface would be waited for.
        .env_remove("NOTIFY_SOCKET");
    let mut child = Killed(match namespace {
        Some(namespace) => namespace.enter(|| command.spawn()).unwrap().unwrap(),
        None => command.spawn().unwrap(),
    });
    let mut status = None;
    let ended = wait_until("the end of the program", deadline, || {
        status = child.0.try_wait().unwrap();
        status.is_some()
    });
    let (out, err) = (text(&mut out), text(&mut err));
    if let Err(e) = ended {
        panic!("{e}: {command:?} said\n{out}\n{err}");
    }
    Ended {
        code: status.unwrap().code(),
        out,
        err,
    }
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A child that does not outlive its test.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// A process that left its parent; it does not outlive its test either.
pub struct Stray {
    pid_file: PathBuf,
}

impl Stray {
    /// The one whose process id will be in this file.
    pub fn new(pid_file: &Path) -> Stray {
        Stray {
            pid_file: pid_file.to_owned(),
        }
    }

    /// Its process id, once it is there.
    pub fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(&self.pid_file).ok()?;
        text.trim().parse().ok().map(Pid::from_raw)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid().unwrap(), signal).unwrap();
    }
}

impl Drop for Stray {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// The third field of /proc/PID/stat: R, S, T, Z, ..; `None` once it is gone.
pub fn state_of(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Stops a process in its tracks; it goes on when this is dropped.
pub struct Frozen<'a>(&'a Process);

impl<'a> Frozen<'a> {
    /// Returns once it stands still.
    pub fn new(process: &'a Process) -> Frozen<'a> {
        process.signal(Signal::SIGSTOP).unwrap();
        let frozen = Frozen(process);
        let pid = process.pid();
        wait_until("the process to stop", soon(), || state_of(pid) == Some('T')).unwrap();
        frozen
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::SIGCONT);
    }
}

/// Whether a process lives and its threads use next to no processor time.
pub fn assert_idle(process: &Process) {
    const LOOK: Duration = Duration::from_millis(400);
    let before = process.cpu_time().unwrap();
    thread::sleep(LOOK);
    let used = process.cpu_time().unwrap() - before;
    assert!(used < LOOK / 8, "{used:?} of processor time in {LOOK:?}");
}

/// Sectors whose content says which they are and which write they are from.
pub fn sector(lba: u64, generation: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SECTOR);
    while bytes.len() < SECTOR {
        bytes.extend(lba.to_le_bytes());
        bytes.extend(generation.to_le_bytes());
    }
    bytes
}

/// The generation of a sector's content; 0 if it was never written.
pub fn generation(lba: u64, bytes: &[u8]) -> u64 {
    let generation = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    if generation > 0 || bytes.iter().any(|b| *b != 0) {
        assert_eq!(bytes, sector(lba, generation), "sector {lba} is torn");
    }
    generation
}

/// What a [`Load`] knows of its sectors.
#[derive(Clone, Default)]
pub struct Written {
    /// By sector: the generation acknowledged last.
    pub acknowledged: BTreeMap<u64, u64>,
    /// By sector: the generation sent last, acknowledged or not.
    pub sent: BTreeMap<u64, u64>,
    /// All writes in their order, the first of generation 1: place and length.
    pub history: Vec<(u64, u64)>,
}

impl Written {
    /// Holds sectors of an image against what was acknowledged.
    pub fn check(&self, image: &[u8]) {
        for (lba, acknowledged) in &self.acknowledged {
            let at = *lba as usize * SECTOR;
            let found = generation(*lba, &image[at..at + SECTOR]);
            let sent = self.sent[lba];
            assert!(
                (*acknowledged..=sent).contains(&found),
                "sector {lba}: {found} is there, {acknowledged} was acknowledged, {sent} sent"
            );
        }
    }
}

/// An initiator in a thread that writes and reads back without a pause, and
/// panics at the first byte that is not as it was written.
pub struct Load<'scope> {
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    written: Arc<Mutex<Written>>,
    thread: Option<thread::ScopedJoinHandle<'scope, ()>>,
}

/// How a [`Load`] takes it that no answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temper {
    /// As an error.
    Strict,
    /// By looking for the target again, as long as it lasts.
    Patient,
    /// As the end, which is expected.
    Resigned,
}

impl<'scope> Load<'scope> {
    /// Begins, on interface `nic` of `peer`, in 64 sectors from `lba` on.
    pub fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        peer: &'env Namespace,
        nic: &str,
        lba: u64,
        temper: Temper,
    ) -> Load<'scope> {
        let (count, stop, written) = <(Arc<AtomicU64>, Arc<AtomicBool>, Arc<_>)>::default();
        let mut worker = Worker {
            nic: nic.to_owned(),
            lba,
            temper,
            count: Arc::clone(&count),
            stop: Arc::clone(&stop),
            written: Arc::clone(&written),
        };
        let thread = scope.spawn(move || peer.enter(|| worker.work()).unwrap());
        Load {
            count,
            stop,
            written,
            thread: Some(thread),
        }
    }

    /// Waits until it has got something done from now on.
    pub fn goes_on(&self) {
        let from = self.count.load(Ordering::Relaxed);
        wait_until("the load to go on", Deadline::seconds(20), || {
            self.is_over() || self.count.load(Ordering::Relaxed) >= from + 20
        })
        .unwrap();
        assert!(!self.is_over(), "the load has ended: see its panic");
    }

    /// What it has written up to now.
    pub fn written(&self) -> Written {
        self.written.lock().unwrap().clone()
    }

    fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(|t| t.is_finished())
    }

    /// Ends it; what it has written.
    pub fn end(mut self) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take().unwrap().join();
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        std::mem::take(&mut *self.written.lock().unwrap())
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Worker {
    nic: String,
    lba: u64,
    temper: Temper,
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    written: Arc<Mutex<Written>>,
}

impl Worker {
    const SECTORS: u64 = 64;

    fn client(&self) -> initiator::error::Result<Client> {
        let mut client = Client::open(&self.nic)?;
        client.patience = match self.temper {
            Temper::Strict => Patience::default(),
            Temper::Patient | Temper::Resigned => Patience {
                deadline: Duration::from_millis(600),
                resend: Some(Duration::from_millis(100)),
                new_tag: true,
            },
        };
        client.connect(1, 1)?;
        Ok(client)
    }

    /// Does it, again where patience is due; `None` at the end.
    fn insist<T>(
        &self,
        client: &mut Client,
        mut f: impl FnMut(&mut Client) -> initiator::error::Result<T>,
    ) -> Option<T> {
        loop {
            match f(client) {
                Ok(value) => return Some(value),
                Err(e) => match self.temper {
                    Temper::Strict => panic!("load on {}: {e}", self.nic),
                    Temper::Resigned => return None,
                    Temper::Patient => {}
                },
            }
            // The interface may be another one by now.
            loop {
                if self.stop.load(Ordering::Relaxed) {
                    return None;
                }
                if let Ok(again) = self.client() {
                    *client = again;
                    break;
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn work(&mut self) {
        let mut client = self.client().unwrap();
        let mut random = self.lba ^ 0x9E37_79B9_7F4A_7C15;
        let mut next = move |below: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % below
        };
        let mut generation = 0;
        while !self.stop.load(Ordering::Relaxed) {
            generation += 1;
            let extent = |client: &Client, a: u64, b: u64| {
                let most = u64::from(client.sectors_per_frame()).min(8);
                let first = a % (Self::SECTORS - most);
                (self.lba + first, 1 + b % most)
            };
            let (lba, count) = extent(&client, next(1 << 20), next(1 << 20));
            let data: Vec<u8> = (lba..lba + count)
                .flat_map(|lba| sector(lba, generation))
                .collect();
            {
                let mut written = self.written.lock().unwrap();
                written
                    .sent
                    .extend((lba..lba + count).map(|lba| (lba, generation)));
                written.history.push((lba, count));
            }
            // One frame may have become too small for it: then in several.
            if self
                .insist(&mut client, |c| c.write_many(lba, &data))
                .is_none()
            {
                return;
            }
            {
                let mut written = self.written.lock().unwrap();
                let all = (lba..lba + count).map(|lba| (lba, generation));
                written.acknowledged.extend(all);
            }
            let (lba, count) = extent(&client, next(1 << 20), next(1 << 20));
            let read = self.insist(&mut client, |c| c.read_many(lba, count as usize));
            let Some(read) = read else {
                return;
            };
            let written = self.written.lock().unwrap();
            for (lba, bytes) in (lba..).zip(read.chunks(SECTOR)) {
                let expected = written.acknowledged.get(&lba).copied().unwrap_or(0);
                let found = self::generation(lba, bytes);
                assert_eq!(found, expected, "sector {lba} on {}", self.nic);
            }
            drop(written);
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Runs a command and expects success; what it printed.
pub fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// How long something takes.
pub fn timed<T>(f: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let value = f();
    (value, start.elapsed())
}

/// A /dev of a test's own, with `null` and room for `log`, for programs that
/// are started through [`inside`](PrivateDev::inside).
pub struct PrivateDev {
    dir: tempfile::TempDir,
}

impl PrivateDev {
    /// What [`inside`](PrivateDev::inside) needs.
    pub const NEEDS: [Need<'static>; 3] = [
        Need::Network,
        Need::Program("unshare"),
        Need::Program("mknod"),
    ];

    /// With nothing at /dev/log.
    pub fn new() -> PrivateDev {
        let dir = tempfile::tempdir().unwrap();
        sh(&format!("mknod -m 666 {}/null c 1 3", dir.path().display()));
        PrivateDev { dir }
    }

    /// A log daemon's socket at /dev/log.
    pub fn log(&self) -> UnixDatagram {
        let socket = UnixDatagram::bind(self.path()).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        socket
    }

    /// Takes the name away from such a socket.
    pub fn unlink(&self) {
        fs::remove_file(self.path()).unwrap();
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Arguments by which a program runs with this /dev: they, then the
    /// program's own. The process keeps its id.
    pub fn inside(&self) -> Vec<OsString> {
        let script = "mount --bind \"$0\" /dev; exec \"$@\"";
        let words = ["unshare", "-m", "sh", "-ec", script];
        let mut all: Vec<OsString> = words.map(OsString::from).to_vec();
        all.push(self.dir.path().into());
        all
    }
}

/// The next message of a log daemon's socket that contains `pattern`.
pub fn logged(log: &UnixDatagram, pattern: &str) -> String {
    let mut buf = [0; 4096];
    let mut seen = Vec::new();
    loop {
        let len = match log.recv(&mut buf) {
            Ok(len) => len,
            Err(e) => panic!("'{pattern}' was not logged ({e}): {seen:?}"),
        };
        let text = String::from_utf8_lossy(&buf[..len]).into_owned();
        if text.contains(pattern) {
            return text;
        }
        seen.push(text);
    }
}

/// Starts a target as e1.1 below strace, which injects what these expressions
/// say; returns it and the file of strace's lines. It is the target that has
/// the process id and gets the signals.
pub fn traced(
    namespace: &Namespace,
    store: &Store,
    nics: &[&str],
    options: &[&str],
    expressions: &[&str],
) -> (Process, PathBuf) {
    let lines = store.path().join("strace.out");
    let mut spawn = Spawn::new("strace")
        .inside(namespace)
        .args(["-D", "-f", "-qq", "--seccomp-bpf", "-o"])
        .arg(&lines);
    for expression in expressions {
        spawn = spawn.args(["-e", expression]);
    }
    let mut process = spawn
        .arg(AOEDE)
        .args(options.iter().copied())
        .args(["1", "1"])
        .args(nics.iter().copied())
        .arg(store.image())
        .arg("--state-dir")
        .arg(store.state())
        .start()
        .unwrap();
    process
        .wait_for_line(": e1.1, ", Deadline::seconds(20))
        .unwrap();
    (process, lines)
}

/// Attaches strace to a running target; what these expressions inject lasts
/// until this is dropped.
pub fn trouble(target: &Process, expressions: &[&str]) -> Process {
    let mut spawn = Spawn::new("strace")
        .args(["-f", "-o", "/dev/null", "-p"])
        .arg(target.pid().to_string());
    for expression in expressions {
        spawn = spawn.args(["-e", expression]);
    }
    let mut strace = spawn.start().unwrap();
    strace.wait_for_line("attached", soon()).unwrap();
    strace
}

/// A loop device over a file, under a number of our choice or the next free.
pub fn attach(path: &Path, device: Option<&Path>) -> PathBuf {
    let name = device.map_or("--find".to_owned(), |d| d.display().to_string());
    let show = if device.is_some() { "" } else { "--show" };
    let shown = sh(&format!("losetup {show} {name} {}", path.display()));
    device.map_or_else(|| PathBuf::from(shown.trim()), Path::to_owned)
}

/// Detaches it, and waits until the kernel has let go of it.
pub fn detach(device: &Path) {
    sh(&format!("losetup -d {}", device.display()));
    let file = format!(
        "/sys/block/{}/loop/backing_file",
        device.file_name().unwrap().to_str().unwrap()
    );
    let free = || !Path::new(&file).exists();
    wait_until("the loop device is free", Deadline::seconds(10), free).unwrap();
}
