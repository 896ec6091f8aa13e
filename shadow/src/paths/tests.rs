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
        },
    }
}

#[test]
fn the_names_are_appended() {
    let paths = Paths::of(Path::new("/a/b.img"));
    assert_eq!(paths.new, Path::new("/a/b.img.new"));
    assert_eq!(paths.shadow, Path::new("/a/b.img"));
    assert_eq!(paths.cut, Path::new("/a/b.img.cut"));
    for name in [Found::New, Found::Plain, Found::Cut] {
        let path = name.path(&paths);
        assert_eq!(Found::of(path), name);
        assert_eq!(Found::plain(path), paths.shadow);
    }
}

#[test]
fn a_shadow_goes_through_its_names() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(&dir.path().join("s"));
    assert_eq!(find(&paths).unwrap(), []);
    let shadow = create(&paths, &spec()).unwrap();
    assert_eq!(find(&paths).unwrap(), [Found::New]);
    assert!(shadow.file().allocated().unwrap() < 64 << 10);
    let mode = fs::metadata(&paths.new).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    rename(&paths.new, &paths.shadow).unwrap();
    rename(&paths.shadow, &paths.cut).unwrap();
    assert_eq!(find(&paths).unwrap(), [Found::Cut]);
    // Held by us, so nobody else has it.
    let locked = open(&paths.cut).unwrap_err();
    assert!(matches!(locked.why, Trouble::Locked), "{locked}");
    drop(shadow);
    let shadow = open(&paths.cut).unwrap();
    assert_eq!(*shadow.spec(), spec());
    remove(&paths.cut).unwrap();
    assert_eq!(find(&paths).unwrap(), []);
}

#[test]
fn nothing_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::of(&dir.path().join("s"));
    fs::write(&paths.new, "mine").unwrap();
    let error = create(&paths, &spec()).unwrap_err();
    assert!(matches!(error.why, Trouble::Exists), "{error}");
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
