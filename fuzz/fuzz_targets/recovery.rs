//! A start that finds an arena and a record, both of which are partly what the
//! input says.
//!
//! The input is a list of edits: a byte that says of which file, two of place,
//! one of content. Its first byte says what the operator wants of a doubtful
//! arena.

#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use aoede::store::{ArenaOptions, Doubtful, Image, ImageOptions, Window, prepare};
use libfuzzer_sys::fuzz_target;

const LEN: usize = 64 << 10;

/// A folder with an image, and what a process that died has left of it.
struct Scene {
    folder: PathBuf,
    image: Image,
    /// Arena and record, with their contents.
    files: Vec<(PathBuf, Vec<u8>)>,
}

fn options(folder: &Path, doubt: Doubtful) -> ArenaOptions {
    ArenaOptions {
        export: "e1.1".into(),
        state_dir: folder.join("state"),
        run_dir: Some(folder.join("run")),
        cache_size: 256 << 10,
        doubt,
        discard_shadow: false,
    }
}

/// All files below a folder.
fn files(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => files(&path, into),
            path => into.push(path),
        }
    }
}

fn left(folder: &Path) -> Vec<PathBuf> {
    let mut list = Vec::new();
    files(&folder.join("state"), &mut list);
    files(&folder.join("run"), &mut list);
    list.sort();
    list
}

fn scene() -> &'static Scene {
    static SCENE: OnceLock<Scene> = OnceLock::new();
    SCENE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder").keep();
        let path = folder.join("image");
        fs::write(&path, [1; LEN]).expect("room");
        let image = Image::open(&ImageOptions {
            path,
            create: None,
            direct: false,
            read_only: false,
            window: Window::default(),
            force: false,
        });
        let image = image.expect("an image");
        let made = prepare(&image, &options(&folder, Doubtful::default()), None);
        let mut arena = made.expect("an arena").arena;
        for (slot, block) in [(0, 3), (1, 5), (2, 3)] {
            arena.write(slot, 0, &[slot as u8 + 7; 4096]);
            arena.publish(slot, u64::from(slot) + 1, block, 0xF3, 0);
        }
        drop(arena);
        let read = |path: PathBuf| {
            let bytes = fs::read(&path).expect("it is there");
            (path, bytes)
        };
        Scene {
            files: left(&folder).into_iter().map(read).collect(),
            image,
            folder,
        }
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((doubt, edits)) = input.split_first() else {
        return;
    };
    let scene = scene();
    for path in left(&scene.folder) {
        fs::remove_file(path).expect("ours");
    }
    let mut contents: Vec<Vec<u8>> = scene.files.iter().map(|(_, bytes)| bytes.clone()).collect();
    for edit in edits.chunks_exact(4) {
        let count = contents.len();
        let bytes = &mut contents[usize::from(edit[0]) % count];
        let at = usize::from(u16::from_le_bytes([edit[1], edit[2]]));
        if let Some(byte) = bytes.get_mut(at) {
            *byte = edit[3];
        }
    }
    for ((path, _), bytes) in scene.files.iter().zip(&contents) {
        fs::write(path, bytes).expect("room");
    }
    let said = |is_said: bool| -> Vec<PathBuf> { is_said.then(PathBuf::new).into_iter().collect() };
    let doubt = Doubtful {
        discard: said(doubt % 3 == 1),
        replay: said(doubt % 3 == 2),
    };
    // A refusal has a reason; nothing is written behind the end of the image.
    if let Err(e) = prepare(&scene.image, &options(&scene.folder, doubt), None) {
        assert!(!e.to_string().is_empty());
    }
    let len = fs::metadata(scene.folder.join("image")).expect("an image").len();
    assert_eq!(len, LEN as u64);
});
