//! The disk under the model: image and shadow on one disk that loses its power,
//! and an engine that ends jobs in an order drawn by lot.

use super::*;
use crate::store::shadow::{Place, ShadowError, ShadowedImage};
use shadow::paths::{Names, Trouble};
use shadow::trial::TrialFile;
use shadow::{Facts, Files, Found, Identity, Kind, PathError, Paths, Shadow, Spec};

/// The image, which takes only whole blocks.
#[derive(Clone, Debug)]
pub struct Medium {
    pub disk: trial::Disk,
    pub file: TrialFile,
    pub align: usize,
    pub bad: Arc<Mutex<Bad>>,
}

/// Sectors, by their numbers in the file, that cannot be read or written.
#[derive(Debug, Default)]
pub struct Bad {
    /// Whatever is written.
    pub hard: Vec<u64>,
    /// Until the whole block of 4096 bytes is written, as one that the disk
    /// cannot read to change a part of it.
    pub soft: Vec<u64>,
}

impl Bad {
    /// Whether these bytes can be read.
    fn reads(&self, offset: u64, len: usize) -> bool {
        let range = offset / 512..(offset + len as u64).div_ceil(512);
        !self
            .hard
            .iter()
            .chain(&self.soft)
            .any(|bad| range.contains(bad))
    }

    /// Whether these bytes can be written; a soft sector is well afterwards.
    fn writes(&mut self, offset: u64, len: usize) -> bool {
        let range = offset / 512..(offset + len as u64) / 512;
        let whole =
            |bad: &u64| range.contains(&(bad / 8 * 8)) && range.contains(&(bad / 8 * 8 + 7));
        self.soft.retain(|bad| !whole(bad));
        let mut bad = self.hard.iter().chain(&self.soft);
        !bad.any(|bad| range.contains(bad))
    }
}

impl Medium {
    pub fn new(align: usize) -> Medium {
        let disk = trial::Disk::new(&[BYTES as u64]);
        Medium {
            file: disk.file(0),
            disk,
            align,
            bad: Arc::default(),
        }
    }

    /// The same image on a copy of the disk.
    pub fn on(&self, disk: &trial::Disk) -> Medium {
        Medium {
            disk: disk.clone(),
            file: disk.on(&self.file),
            align: self.align,
            bad: Arc::default(),
        }
    }

    pub fn live(&self) -> Vec<u8> {
        self.file.bytes()
    }

    fn check(&self, offset: u64, len: usize) {
        let align = self.align;
        assert!(
            offset as usize % align == 0 && len % align == 0,
            "{len} at {offset}"
        );
    }
}

impl BlockFile for Medium {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, buf.len());
        if !self.bad.lock().unwrap().reads(offset, buf.len()) {
            return Err(io::Error::other("a bad sector"));
        }
        self.file.read_at(buf, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, data.len());
        if !self.bad.lock().unwrap().writes(offset, data.len()) {
            return Err(io::Error::other("a bad sector"));
        }
        self.file.write_at(data, offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

impl Backing for Medium {
    fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.read_at(buf, offset).is_ok()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bad.lock().unwrap().soft.clear();
        self.write_at(&vec![0; len as usize], offset)
    }
    fn align(&self) -> usize {
        self.align
    }
}

impl ShadowedImage for Medium {
    fn identity(&self) -> io::Result<Identity> {
        Ok(Identity {
            kind: Kind::File,
            a: 1,
            b: 2,
            bytes: BYTES as u64,
            facts: Facts::default(),
            boot: [0; 2],
        })
    }
    fn window(&self) -> (u64, u64) {
        (window_start(self.align), SECTORS * 512)
    }
    fn bounds(&self) -> Result<Bounds, String> {
        Ok(Bounds {
            start: window_start(self.align),
            sectors: SECTORS,
        })
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn path(&self) -> &Path {
        Path::new("disk.img")
    }
}

/// What a marker begins with.
const MARKER: &[u8; 8] = b"a marker";
/// Bytes of a marker's file.
const MARKER_LEN: u64 = 512;

/// The names of a shadow on the same disk.
#[derive(Clone, Debug)]
pub struct TrialPlace(pub trial::Disk);

impl TrialPlace {
    /// The uuid of a marker.
    fn marker(&self, path: &Path) -> io::Result<Option<[u8; 16]>> {
        let mut bytes = [0; 24];
        self.0.open(path)?.read_at(&mut bytes, 0)?;
        let uuid = bytes.strip_prefix(MARKER);
        Ok(uuid.map(|uuid| uuid.try_into().unwrap()))
    }

    fn is_at(&self, file: &TrialFile, path: &Path) -> bool {
        self.0.open(path).is_ok_and(|other| other.is_same(file))
    }

    fn remove_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
        let ours = self.0.open(path).is_ok() && self.marker(path)?.as_ref() == Some(uuid);
        if ours { self.0.unname(path) } else { Ok(()) }
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> PathError + '_ {
    |e| PathError {
        path: path.to_owned(),
        why: Trouble::System("trying it", e),
    }
}

impl Place for TrialPlace {
    type File = TrialFile;
    type Records = trial::Disk;

    fn records(&self) -> &trial::Disk {
        &self.0
    }

    fn probe(&self, _: &Path) -> Result<(), ShadowError> {
        Ok(())
    }

    fn find(&self, paths: &Paths) -> io::Result<Names> {
        let mut names = Names::default();
        for name in [Found::Plain, Found::Thaw, Found::Cut, Found::New] {
            let path = name.path(paths);
            if self.0.open(path).is_ok() {
                match self.marker(path)? {
                    Some(uuid) => names.markers.push((name, uuid)),
                    None => names.files.push(name),
                }
            }
        }
        Ok(names)
    }

    fn create(&self, paths: &Paths, spec: &Spec) -> Result<Shadow<TrialFile>, PathError> {
        let fail = failed(&paths.new);
        let names = self.find(paths).map_err(&fail)?;
        assert_eq!(names, Names::default(), "made over another one");
        let file = self.0.new_file(spec.geometry.data_end());
        let shadow = Shadow::create(file, spec).map_err(&fail)?;
        let named = self.0.name(shadow.file(), &paths.new);
        let named = named
            .and_then(|()| self.0.sync_names(&paths.new))
            .and_then(|()| self.make_marker(&paths.thaw, &spec.uuid))
            .and_then(|()| self.0.sync_names(&paths.thaw));
        named.map_err(|e| {
            self.abandon(paths, &spec.uuid);
            fail(e)
        })?;
        Ok(shadow)
    }

    fn open(&self, path: &Path) -> Result<Shadow<TrialFile>, PathError> {
        let file = self.0.open(path).map_err(failed(path))?;
        let len = file.bytes().len() as u64;
        Shadow::open(file, len).map_err(|e| PathError {
            path: path.to_owned(),
            why: Trouble::Open(e),
        })
    }

    fn appear(&self, paths: &Paths, file: &TrialFile) -> io::Result<()> {
        if self.is_at(file, &paths.new) {
            self.0.rename(&paths.new, &paths.shadow)?;
        }
        self.0.sync_names(&paths.shadow)
    }

    fn begin_thaw(
        &self,
        paths: &Paths,
        file: &TrialFile,
        uuid: &[u8; 16],
    ) -> io::Result<Option<io::Error>> {
        if self.is_at(file, &paths.shadow) {
            self.make_marker(&paths.thaw, uuid)?;
            self.0.exchange(&paths.shadow, &paths.thaw)?;
        } else if self.is_at(file, &paths.thaw) {
            self.make_marker(&paths.shadow, uuid)?;
        }
        self.0.sync_names(&paths.shadow)?;
        Ok(None)
    }

    fn make_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
        if self.0.open(path).is_ok() && self.marker(path)?.as_ref() == Some(uuid) {
            return Ok(());
        }
        let file = self.0.new_file(MARKER_LEN);
        file.write_at(&[&MARKER[..], uuid].concat(), 0)?;
        file.sync()?;
        self.0.name(&file, path)
    }

    fn abandon(&self, paths: &Paths, uuid: &[u8; 16]) {
        let _ = self.remove_marker(&paths.thaw, uuid);
        let _ = self.0.unname(&paths.new);
        let _ = self.0.sync_names(&paths.new);
    }

    fn vanish(&self, paths: &Paths, file: &TrialFile, uuid: &[u8; 16]) -> io::Result<()> {
        for path in [&paths.shadow, &paths.thaw] {
            self.remove_marker(path, uuid)?;
        }
        self.0.sync_names(&paths.shadow)?;
        for path in [&paths.shadow, &paths.new, &paths.thaw] {
            if self.is_at(file, path) {
                self.0.unname(path)?;
            }
        }
        self.0.sync_names(&paths.shadow)
    }

    fn len(&self, file: &TrialFile) -> io::Result<u64> {
        Ok(file.bytes().len() as u64)
    }

    fn take(&self, _: &TrialFile, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn give_back(&self, _: &TrialFile, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn read_now(&self, file: &TrialFile, buf: &mut [u8], offset: u64) -> bool {
        file.read_at(buf, offset).is_ok()
    }

    fn write_pieces(&self, file: &TrialFile, pieces: &[Body], offset: u64) -> io::Result<()> {
        file.write_at(
            &pieces.iter().flat_map(|p| p.to_vec()).collect::<Vec<_>>(),
            offset,
        )
    }
}

/// What the disk is told to do next, from outside.
#[derive(Debug)]
pub struct Fate {
    pub seed: u64,
    /// Of 256 jobs so many fail, each in one of its operations.
    pub failing: u8,
    /// The next sync fails, alone or at the end of a commit.
    pub sync_fails: bool,
    /// Jobs that are not done for now.
    pub held: fn(&Job) -> bool,
    /// Whether reads are answered from memory.
    pub now: bool,
    /// What reads have seen does not come back for now.
    pub hold_reads: bool,
    /// Looks into jobs are taken.
    pub looks: bool,
    /// The disk as it was in the middle of a job.
    pub look: Option<Look>,
}

/// What a process leaves that dies in the middle of a job, and what was
/// acknowledged then.
#[derive(Debug)]
pub struct Look {
    pub disk: trial::Disk,
    /// A copy of the arena.
    pub arena: Option<Vec<u8>>,
}

impl Fate {
    pub fn draw(&mut self) -> usize {
        self.seed = self
            .seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.seed >> 33) as usize
    }
}

/// A disk that does the jobs in flight in an order drawn by lot, and tells of
/// their ends in another: what a read has seen may be old when it comes back.
pub struct Lots {
    pub disk: trial::Disk,
    pub backing: Arc<dyn Backing>,
    pub jobs: Vec<(JobId, Job)>,
    pub ended: Vec<Done>,
    pub fate: Rc<RefCell<Fate>>,
    /// The arena's file.
    pub arena: Option<PathBuf>,
}

impl Disk for Lots {
    fn submit(&mut self, id: JobId, job: Job) {
        self.jobs.push((id, job));
    }
    fn reap(&mut self) -> Option<Done> {
        let lot = self.fate.borrow_mut().draw();
        if lot % 4 == 0 {
            return None;
        }
        if lot / 4 % 2 == 0 || self.ended.is_empty() {
            self.do_one();
        }
        if self.fate.borrow().hold_reads {
            let other = self.ended.iter().position(|done| done.data.is_none());
            return other.map(|at| self.ended.swap_remove(at));
        }
        if self.ended.is_empty() || lot / 8 % 2 == 0 {
            return None;
        }
        // The last one as a rule, so that some wait for long.
        let last = self.ended.len() - 1;
        let which = if lot / 16 % 16 == 0 {
            lot / 256 % (last + 1)
        } else {
            last
        };
        Some(self.ended.swap_remove(which))
    }
    fn try_now(&self, buf: &mut [u8], offset: u64) -> bool {
        self.fate.borrow().now && self.backing.read_now(buf, offset)
    }
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn has_done(&mut self) -> bool {
        false
    }
}

impl Lots {
    /// Does one of the jobs.
    fn do_one(&mut self) {
        if self.jobs.is_empty() {
            return;
        }
        let mut fate = self.fate.borrow_mut();
        let at = fate.draw() % self.jobs.len();
        if (fate.held)(&self.jobs[at].1) {
            return;
        }
        let (id, job) = self.jobs.swap_remove(at);
        let next = self.disk.operations();
        let several = matches!(
            job,
            Job::Commit { .. } | Job::Step(_) | Job::Discard(_) | Job::Write(_)
        );
        let spread = if several { 6 } else { 1 };
        if fate.draw() % 256 < usize::from(fate.failing) {
            self.disk.fail_at(next + fate.draw() as u64 % spread);
        }
        let sync = match &job {
            Job::Sync => Some(0),
            Job::Commit { data_first, pages } => Some(u64::from(*data_first) + pages.len() as u64),
            _ => None,
        };
        if let Some(sync) = sync.filter(|_| std::mem::take(&mut fate.sync_fails)) {
            self.disk.fail_at(next + sync);
        }
        if fate.looks && fate.look.is_none() && several && fate.draw() % 4 == 0 {
            self.disk.fork_at(next + fate.draw() as u64 % spread);
        }
        let done = job.run(id, &*self.backing);
        self.disk.fail_none();
        if let Some(disk) = self.disk.take_fork() {
            // Jobs leave the arena alone.
            let arena = self.arena.as_ref().map(|path| std::fs::read(path).unwrap());
            fate.look = Some(Look { disk, arena });
        }
        self.ended.push(done);
    }
}

/// The path of the shadow.
pub fn shadow_path() -> &'static Path {
    Path::new("/shadows/s")
}

/// The files in the state directory.
pub fn records(disk: &trial::Disk) -> Vec<PathBuf> {
    Files::list(disk, Path::new("/state")).unwrap()
}
