use super::*;
use crate::store::shadow::ShadowedImage;
use std::time::Duration;

fn options(path: &Path) -> ImageOptions {
    ImageOptions {
        path: path.to_owned(),
        create: None,
        direct: false,
        read_only: false,
        window: Window::default(),
        force: false,
    }
}

fn image_of(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

#[test]
fn a_shadow_is_told_in_words_that_the_image_is_too_short() {
    let file = image_of(10 * 512);
    let window = Window {
        offset: 4,
        length: Some(6),
    };
    let options = ImageOptions {
        window,
        ..options(file.path())
    };
    let image = Image::open(&options).unwrap();
    file.as_file().set_len(8 * 512).unwrap();
    let told = ShadowedImage::bounds(&image).unwrap_err();
    assert!(
        told.contains("lead past its end, it has 8 sectors"),
        "{told}"
    );
}

#[test]
fn pieces_are_bounded_and_are_the_whole() {
    let all = |offset, len, most| pieces(offset, len, most).collect::<Vec<_>>();
    assert_eq!(all(5, 0, 8), []);
    assert_eq!(all(5, 3, 8), [(5, 3)]);
    assert_eq!(all(5, 14, 8), [(5, 3), (8, 8), (16, 3)]);
    assert_eq!(all(8, 8, 8), [(8, 8)]);
    assert_eq!(all(5, 1 << 60, u64::MAX), [(5, 1 << 60)]);
}

#[test]
fn a_window_is_held_to_the_image() {
    let file = image_of(10 * 512 + 100);
    let open = |offset, length| {
        let window = Window { offset, length };
        Image::open(&ImageOptions {
            window,
            ..options(file.path())
        })
    };
    let image = open(0, None).unwrap();
    assert_eq!(
        image.bounds().unwrap(),
        Bounds {
            start: 0,
            sectors: 10
        }
    );
    assert_eq!(image.cut_off(), 100);
    drop(image);
    let bounds = open(4, Some(6)).unwrap().bounds().unwrap();
    assert_eq!(
        bounds,
        Bounds {
            start: 2048,
            sectors: 6
        }
    );
    for (offset, length, says) in [
        (
            4,
            Some(7),
            "-o and -l lead past its end, it has 10 sectors; lower",
        ),
        (9, Some(2), "-o and -l lead past its end"),
        (0, Some(u64::MAX), "-o and -l lead past its end"),
        (u64::MAX, Some(1), "-o and -l lead past its end"),
        (
            10,
            None,
            "-o begins at or behind its end, it has 10 sectors; lower -o",
        ),
        (10, Some(1), "-o begins at or behind its end"),
        (11, None, "-o begins at or behind its end"),
        (
            i64::MAX as u64 / 512,
            None,
            "-o begins at or behind its end",
        ),
    ] {
        let error = open(offset, length).unwrap_err().to_string();
        assert!(error.contains(says), "{offset} {length:?}: {error}");
    }
    let one = image_of(512);
    let window = Window {
        offset: 1,
        length: None,
    };
    let error = Image::open(&ImageOptions {
        window,
        ..options(one.path())
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("it has 1 sector;"), "{error}");
}

#[test]
fn windows_that_overlap_exclude_each_other_and_others_do_not() {
    let file = image_of(100 * 512);
    let open = |offset, length, read_only| {
        let window = Window { offset, length };
        Image::open(&ImageOptions {
            window,
            read_only,
            ..options(file.path())
        })
    };
    let _low = open(0, Some(50), false).unwrap();
    let _high = open(50, None, true).unwrap();
    let _shared = open(60, Some(1), true).unwrap();
    let error = open(49, Some(2), false).unwrap_err();
    let us = format!("process {} (", std::process::id());
    assert!(error.to_string().contains(&us), "{error}");
}

#[test]
fn an_image_is_made_only_when_asked_and_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.img");
    let error = Image::open(&options(&path)).unwrap_err();
    assert!(matches!(error.why, ImageTrouble::Missing));
    let create = Some(Create {
        bytes: 1 << 20,
        prealloc: false,
    });
    let made = Image::open(&ImageOptions {
        create,
        ..options(&path)
    })
    .unwrap();
    assert_eq!(made.bounds().unwrap().sectors, 2048);
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.blocks(), 0);
    // Data of hosts: for nobody else to read.
    assert_eq!(metadata.mode() & 0o7777, 0o600);
    drop(made);
    let other = Some(Create {
        bytes: 512,
        prealloc: true,
    });
    let kept = Image::open(&ImageOptions {
        create: other,
        ..options(&path)
    })
    .unwrap();
    assert_eq!(kept.bounds().unwrap().sectors, 2048);
    let path = dir.path().join("full.img");
    drop(
        Image::open(&ImageOptions {
            create: other,
            ..options(&path)
        })
        .unwrap(),
    );
    assert!(std::fs::metadata(&path).unwrap().blocks() > 0);
}

#[test]
fn a_link_to_nothing_is_told_as_one_with_and_without_create() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("link.img");
    std::os::unix::fs::symlink("gone.img", &path).unwrap();
    let new = Some(Create {
        bytes: 512,
        prealloc: false,
    });
    for create in [None, new] {
        let error = Image::open(&ImageOptions {
            create,
            ..options(&path)
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("link to gone.img"), "{error}");
        assert!(!error.contains("--create"), "{error}");
    }
    assert!(!dir.path().join("gone.img").exists());
}

#[test]
fn what_is_no_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = Image::open(&options(dir.path())).unwrap_err();
    assert!(matches!(error.why, ImageTrouble::NotADisk));
    let empty = image_of(511);
    let error = Image::open(&options(empty.path())).unwrap_err();
    assert!(matches!(error.why, ImageTrouble::Empty));
    assert!(error.to_string().contains("truncate"), "{error}");
}

#[test]
fn a_discard_reads_back_as_zeros() {
    let file = image_of(64 * 1024);
    let image = Image::open(&options(file.path())).unwrap();
    image.write_at(&[7; 65536], 0).unwrap();
    if !image.can_discard() {
        return; // The filesystem of the temporary directory decides.
    }
    image.discard(1024, 8192).unwrap();
    let mut buf = [1; 10240];
    image.read_at(&mut buf, 0).unwrap();
    assert!(buf[..1024].iter().all(|b| *b == 7));
    assert!(buf[1024..9216].iter().all(|b| *b == 0));
    assert!(buf[9216..].iter().all(|b| *b == 7));
}

#[test]
fn reads_leave_the_access_time_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, [1; 4096]).unwrap();
    // Older than the last change, so that any filesystem would note a read.
    let old = UNIX_EPOCH + Duration::from_secs(1_000_000);
    let times = std::fs::FileTimes::new().set_accessed(old);
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_times(times)
        .unwrap();
    let image = Image::open(&options(&path)).unwrap();
    image.read_at(&mut [0; 4096], 0).unwrap();
    assert!(image.read_now(&mut [0; 512], 512));
    assert_eq!(std::fs::metadata(&path).unwrap().accessed().unwrap(), old);
}

#[test]
fn a_short_pwritev_is_completed() {
    // More pieces than one call takes.
    let pieces: Vec<Body> = (0..1500u32)
        .map(|n| Body::Bytes(n.to_le_bytes().repeat(1 + n as usize % 3)))
        .collect();
    let bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.to_vec()).collect();
    for short in [0, 1, 4, 7, 1000, 8000, usize::MAX] {
        let file = tempfile::tempfile().unwrap();
        let together = |vectors: &[IoSlice], at: u64| {
            let all: Vec<u8> = vectors.iter().flat_map(|v| v.to_vec()).collect();
            let done = short.min(all.len());
            file.write_all_at(&all[..done], at).unwrap();
            Ok(done)
        };
        let alone = |bytes: &[u8], at| file.write_all_at(bytes, at);
        write_all(&pieces, 77, together, alone).unwrap();
        let mut found = vec![0; bytes.len()];
        file.read_exact_at(&mut found, 77).unwrap();
        assert!(found == bytes, "{short} bytes at once");
        assert_eq!(file.metadata().unwrap().len(), 77 + bytes.len() as u64);
    }
    let interrupted = |_: &[IoSlice], _| Err(nix::Error::EINTR);
    let file = tempfile::tempfile().unwrap();
    let alone = |bytes: &[u8], at| file.write_all_at(bytes, at);
    write_all(&pieces, 0, interrupted, alone).unwrap();
    assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
    let failed = |_: &[IoSlice], _| Err(nix::Error::EIO);
    assert!(write_all(&pieces, 0, failed, alone).is_err());
}
