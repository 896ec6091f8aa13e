use super::*;
use crate::format::Geometry;
use crate::identity::{Facts, Identity, Kind};

fn spec() -> Spec {
    Spec {
        uuid: [1; 16],
        generation: 1,
        geometry: Geometry::new(4096, 0, 64 << 20).unwrap(),
        identity: Identity {
            kind: Kind::File,
            a: 1,
            b: 1,
            bytes: 64 << 20,
            facts: Facts::default(),
            boot: [0; 2],
        },
    }
}

#[test]
fn the_names_are_appended() {
    let paths = Paths::of(Path::new("/a/b.img"));
    assert_eq!(paths.new, Path::new("/a/b.img.new"));
    assert_eq!(paths.shadow, Path::new("/a/b.img"));
    assert_eq!(paths.thaw, Path::new("/a/b.img.thaw"));
    assert_eq!(paths.cut, Path::new("/a/b.img.cut"));
    for name in Found::ALL {
        let path = name.path(&paths);
        assert_eq!(Found::of(path), name);
        assert_eq!(Found::plain(path), paths.shadow);
    }
}

#[test]
fn the_name_tells_more_than_the_header() {
    use State::{Freezing, Frozen, Thawing};
    for (name, header, state) in [
        (Found::New, Freezing, Freezing),
        (Found::New, Thawing, Thawing),
        (Found::Plain, Freezing, Frozen),
        (Found::Plain, Frozen, Frozen),
        (Found::Plain, Thawing, Thawing),
        (Found::Thaw, Freezing, Thawing),
        (Found::Cut, Frozen, Thawing),
    ] {
        assert_eq!(name.state(header), state, "{name:?} {header:?}");
    }
}

fn found(paths: &Paths) -> (Vec<Found>, Vec<Found>) {
    let names = find(paths).unwrap();
    assert!(names.markers.iter().all(|(_, uuid)| *uuid == spec().uuid));
    let markers = names.markers.iter().map(|(name, _)| *name);
    (names.files, markers.collect())
}

const FROZEN: ([Found; 1], [Found; 1]) = ([Found::Plain], [Found::Thaw]);
const THAWING: ([Found; 1], [Found; 1]) = ([Found::Thaw], [Found::Plain]);

#[track_caller]
fn is(paths: &Paths, (files, markers): ([Found; 1], [Found; 1])) {
    assert_eq!(found(paths), (files.to_vec(), markers.to_vec()));
}

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

#[test]
fn a_shadow_goes_through_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(&dir.path().join("s"));
    assert_eq!(find(&paths).unwrap(), Names::default());
    let shadow = create(&paths, &spec()).unwrap();
    let file = shadow.file();
    is(&paths, ([Found::New], [Found::Thaw]));
    assert!(shadow.file().allocated().unwrap() < 64 << 10);
    let mode = fs::metadata(&paths.new).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    for _ in 0..2 {
        appear(&paths, file).unwrap();
        is(&paths, FROZEN);
    }
    let frozen = inode(&paths.shadow);
    for _ in 0..2 {
        assert!(begin_thaw(&paths, file, &[1; 16]).unwrap().is_none());
        is(&paths, THAWING);
        assert_eq!(inode(&paths.thaw), frozen);
        assert_ne!(inode(&paths.shadow), frozen);
    }
    // Held by us, so nobody else has it.
    let locked = open(&paths.thaw).unwrap_err();
    assert!(matches!(locked.why, Trouble::Locked), "{locked}");
    drop(shadow);
    let shadow = open(&behind_marker(&paths.shadow).unwrap()).unwrap();
    assert_eq!(*shadow.spec(), spec());
    for _ in 0..2 {
        vanish(&paths, shadow.file(), &[1; 16]).unwrap();
        assert_eq!(find(&paths).unwrap(), Names::default());
    }
}

#[test]
fn a_withdrawn_freeze_never_was_path() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(&dir.path().join("s"));
    let shadow = create(&paths, &spec()).unwrap();
    assert!(
        begin_thaw(&paths, shadow.file(), &[1; 16])
            .unwrap()
            .is_none()
    );
    is(&paths, ([Found::New], [Found::Thaw]));
    vanish(&paths, shadow.file(), &[1; 16]).unwrap();
    assert_eq!(find(&paths).unwrap(), Names::default());
}

/// The names of this machine, on a filesystem that may not exchange two.
struct Exchanging<'a>(steps::Real<'a>, bool);

impl steps::Names for Exchanging<'_> {
    fn is_shadow(&self, path: &Path) -> io::Result<bool> {
        self.0.is_shadow(path)
    }
    fn marker(&self, path: &Path) -> io::Result<Option<[u8; 16]>> {
        self.0.marker(path)
    }
    fn make_marker(&self, path: &Path, uuid: &[u8; 16]) -> io::Result<()> {
        self.0.make_marker(path, uuid)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<bool> {
        if self.1 {
            self.0.exchange(one, other)
        } else {
            Ok(false)
        }
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }
    fn sync(&self, path: &Path) -> io::Result<()> {
        self.0.sync(path)
    }
}

/// What a crash, or 0.1.0, may have left when a thaw is to begin.
#[test]
fn a_thaw_begins_from_whatever_was_left() {
    type Make = fn(&Paths);
    let cases: [(&str, Make); 8] = [
        ("frozen", |_| {}),
        ("frozen by 0.1.0", |p| fs::remove_file(&p.thaw).unwrap()),
        ("cut by 0.1.0", |p| {
            fs::remove_file(&p.thaw).unwrap();
            fs::rename(&p.shadow, &p.cut).unwrap();
        }),
        ("cut by 0.1.0, between two links", |p| {
            fs::remove_file(&p.thaw).unwrap();
            fs::hard_link(&p.shadow, &p.cut).unwrap();
        }),
        ("between two links", |p| {
            fs::remove_file(&p.thaw).unwrap();
            fs::hard_link(&p.shadow, &p.thaw).unwrap();
        }),
        ("renamed, without its marker", |p| {
            fs::rename(&p.shadow, &p.thaw).unwrap();
        }),
        ("renamed from cut, between two links", |p| {
            fs::rename(&p.shadow, &p.thaw).unwrap();
            fs::hard_link(&p.thaw, &p.cut).unwrap();
        }),
        ("appeared, between two links", |p| {
            fs::hard_link(&p.shadow, &p.new).unwrap();
        }),
    ];
    for (what, make) in cases {
        for can_exchange in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let paths = Paths::of(&dir.path().join("s"));
            let shadow = create(&paths, &spec()).unwrap();
            appear(&paths, shadow.file()).unwrap();
            make(&paths);
            let (files, _) = found(&paths);
            assert_eq!(files.len(), 1, "{what}");
            let names = Exchanging(steps::Real(shadow.file()), can_exchange);
            let begun = steps::begin_thaw_among(&names, &paths, &[1; 16]);
            assert!(begun.unwrap().is_none(), "{what}");
            is(&paths, THAWING);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "{what}");
            vanish(&paths, shadow.file(), &[1; 16]).unwrap();
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{what}");
        }
    }
}

#[test]
fn a_file_of_someone_else_stays_whatever_its_name_is() {
    let mine = |path: &Path| assert_eq!(fs::read(path).unwrap(), b"mine");
    // In the way of a freeze.
    for name in Found::ALL {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::of(&dir.path().join("s"));
        fs::write(name.path(&paths), "mine").unwrap();
        let error = create(&paths, &spec()).unwrap_err();
        assert!(matches!(error.why, Trouble::Exists), "{error}");
        mine(name.path(&paths));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    // In the place of the marker, while frozen.
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(&dir.path().join("s"));
    let shadow = create(&paths, &spec()).unwrap();
    appear(&paths, shadow.file()).unwrap();
    fs::write(&paths.thaw, "mine").unwrap();
    let error = begin_thaw(&paths, shadow.file(), &[1; 16]).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("s.thaw: ") && text.contains("move away"),
        "{text}"
    );
    mine(&paths.thaw);
    fs::remove_file(&paths.thaw).unwrap();
    // In the place of the shadow, while frozen.
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(&paths.shadow, &elsewhere).unwrap();
    fs::write(&paths.shadow, "mine").unwrap();
    begin_thaw(&paths, shadow.file(), &[1; 16]).unwrap();
    mine(&paths.shadow);
    // And while it is merged.
    fs::rename(&elsewhere, &paths.thaw).unwrap();
    let unmarked = begin_thaw(&paths, shadow.file(), &[1; 16]).unwrap();
    assert!(unmarked.is_some());
    mine(&paths.shadow);
    vanish(&paths, shadow.file(), &[1; 16]).unwrap();
    mine(&paths.shadow);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_marker_is_known_by_all_of_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    assert_eq!(read_marker(&path).unwrap(), None);
    for _ in 0..2 {
        make_marker(&path, &[7; 16]).unwrap();
        assert_eq!(read_marker(&path).unwrap(), Some([7; 16]));
    }
    let error = make_marker(&path, &[8; 16]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    remove_marker(&path, &[8; 16]).unwrap();
    let good = fs::read(&path).unwrap();
    assert_eq!(good[..12], *b"AOEDETHW\x01\0\0\0");
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        assert_eq!(read_marker(&path).unwrap(), None, "byte {at}");
        assert!(make_marker(&path, &[7; 16]).is_err());
        remove_marker(&path, &[7; 16]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bad);
    }
    for len in [0, 63] {
        fs::write(&path, &good[..len]).unwrap();
        assert_eq!(read_marker(&path).unwrap(), None);
    }
    fs::write(&path, [&good[..], b"x"].concat()).unwrap();
    assert_eq!(read_marker(&path).unwrap(), None);
    // Nor through a link.
    fs::remove_file(&path).unwrap();
    make_marker(&dir.path().join("t"), &[7; 16]).unwrap();
    std::os::unix::fs::symlink("t", &path).unwrap();
    assert_eq!(read_marker(&path).unwrap(), None);
    assert_eq!(read_marker(dir.path()).unwrap(), None);
}

#[test]
fn a_marker_leads_to_its_shadow() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(&dir.path().join("s"));
    let shadow = create(&paths, &spec()).unwrap();
    let alone = behind_marker(&paths.thaw).unwrap_err();
    assert!(alone.to_string().contains("is not there"), "{alone}");
    appear(&paths, shadow.file()).unwrap();
    for path in [&paths.shadow, &paths.thaw] {
        assert_eq!(behind_marker(path).unwrap(), paths.shadow);
    }
    begin_thaw(&paths, shadow.file(), &[1; 16]).unwrap();
    for path in [&paths.shadow, &paths.thaw] {
        assert_eq!(behind_marker(path).unwrap(), paths.thaw);
    }
}

#[test]
fn nothing_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(&dir.path().join("s"));
    fs::write(&paths.new, "mine").unwrap();
    fs::write(&paths.shadow, "his").unwrap();
    let error = rename(&paths.new, &paths.shadow).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&paths.new).unwrap(), b"mine");
    assert_eq!(fs::read(&paths.shadow).unwrap(), b"his");
}

#[test]
fn what_is_no_shadow_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let why = |path: &Path| open(path).unwrap_err().why;
    assert!(matches!(why(&path), Trouble::Missing));
    assert!(matches!(why(dir.path()), Trouble::NotAFile));
    assert!(matches!(why(Path::new("/dev/null")), Trouble::NotAFile));
    for content in [&b"x"[..], &[b'x'; 5000], &[b'x'; 3 << 20]] {
        fs::write(&path, content).unwrap();
        assert!(matches!(why(&path), Trouble::Open(OpenError::NotAShadow)));
        assert_eq!(fs::read(&path).unwrap(), content);
    }
    for content in [&b""[..], &[0; 5000], &[0; 3 << 20]] {
        fs::write(&path, content).unwrap();
        assert!(matches!(why(&path), Trouble::Open(OpenError::Blank)));
    }
    fs::remove_file(&path).unwrap();
    let made = create(&Paths::of(&path), &spec()).unwrap();
    let len = made.geometry().data_end();
    drop(made);
    let new = Paths::of(&path).new;
    let file = File::options().write(true).open(&new).unwrap();
    file.set_len(len - 1).unwrap();
    assert!(matches!(why(&new), Trouble::Open(OpenError::Short(n, h)) if n == h + 1));
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(&dir.path().join("none/s"));
    let error = create(&paths, &spec()).unwrap_err().to_string();
    assert!(
        error.contains("none/s.new") && error.ends_with("make its directory"),
        "{error}"
    );
}
