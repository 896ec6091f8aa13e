//! The backup script that is shipped, against a target that goes on being
//! written.

use std::fs;
use std::path::Path;
use std::thread;

use initiator::lab::{self, Deadline, Need, Spawn};

use crate::rig::QUICK;
use crate::support::{Store, serve, stop};
use crate::workshop::{Lab, Load, Temper};

const SECTORS: u64 = 4096;

/// The script, for a target of this process id.
fn script(store: &Store, pid: u32) -> Spawn {
    let path = |name: &str| store.path().join(name).into_os_string();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("shadow/aoede-backup");
    Spawn::new(script)
        .arg(pid.to_string())
        .args(["disk.img", "shadow.img", "copy.img"].map(path))
}

#[test]
fn the_backup_script_makes_a_good_copy_under_load() {
    if !lab::require("the backup script", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(SECTORS));
    let shadow = store.path().join("shadow.img");
    let options = [&QUICK[..], &["-f", shadow.to_str().unwrap()]].concat();
    let target = serve(&lab.host, &store, &["tgt0"], &options);
    let written = thread::scope(|scope| {
        let load = Load::start(scope, &lab.peer, "ini0", 100, Temper::Strict);
        for _ in 0..2 {
            load.goes_on();
            let mut backup = script(&store, target.pid()).start().unwrap();
            let status = backup.wait(Deadline::seconds(60)).unwrap();
            assert!(status.success(), "{:?}", backup.output());
            assert!(!shadow.exists());
        }
        load.goes_on();
        load.end()
    });
    // Every sector of the copy is whole, and from some time before.
    let copy = fs::read(store.path().join("copy.img")).unwrap();
    assert_eq!(copy.len() as u64, SECTORS * 512);
    for (lba, sent) in &written.sent {
        let at = *lba as usize * 512;
        let found = crate::workshop::generation(*lba, &copy[at..at + 512]);
        assert!(
            (1..=*sent).contains(&found),
            "sector {lba}: {found} of {sent}"
        );
    }
    stop(target);
    written.check(&fs::read(store.image()).unwrap());
}

#[test]
fn the_backup_script_says_what_is_wrong_and_leaves_nothing() {
    if !lab::require("the backup script in trouble", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(SECTORS));
    let fails = |says: &str, pid: u32| {
        let mut backup = script(&store, pid).start().unwrap();
        let status = backup.wait(Deadline::seconds(60)).unwrap();
        let said = backup.output().join("\n");
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains(says), "{said}");
        assert!(!store.path().join("copy.img").exists());
        assert!(!store.path().join("copy.img.part").exists());
    };
    let shadow = store.path().join("shadow.img");
    let options = [&QUICK[..], &["-f", shadow.to_str().unwrap()]].concat();
    let target = serve(&lab.host, &store, &["tgt0"], &options);
    let pid = target.pid();
    fs::write(&shadow, "mine").unwrap();
    fails("is there already", pid);
    assert_eq!(fs::read(&shadow).unwrap(), b"mine");
    fs::remove_file(&shadow).unwrap();
    stop(target);
    fails("there is no process", pid);
}
