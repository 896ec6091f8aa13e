use super::*;

fn parse(line: &str) -> Result<Options, ConfigError> {
    let words = std::iter::once("aoede").chain(line.split_whitespace());
    Options::from_args(words.map(OsString::from))
}

fn refused(line: &str) -> (u8, String) {
    let error = parse(line).unwrap_err();
    (error.exit_code(), error.to_string())
}

#[test]
fn the_owners_command_lines_parse() {
    let dir = tempfile::tempdir().unwrap();
    let shadow = dir.path().join("shadow.img");
    let options = parse(&format!("-b 64 1 1 eth0 disk.img -f {}", shadow.display())).unwrap();
    assert_eq!(options.address.to_string(), "e1.1");
    assert_eq!(
        (options.nics, options.buffers),
        (vec!["eth0".to_owned()], 64)
    );
    assert_eq!(
        options.image.path,
        std::env::current_dir().unwrap().join("disk.img")
    );
    assert_eq!(
        options.shadow,
        Some(ShadowOption {
            path: shadow,
            limit_mib: None
        })
    );
    let options = parse("1 4 eth0 eth1 img").unwrap();
    assert_eq!(options.address.to_string(), "e1.4");
    assert_eq!(options.nics, ["eth0", "eth1"]);
}

#[test]
fn an_arena_may_be_named() {
    let arenas = |line: &str| {
        let doubt = parse(&format!("1 1 eth0 img {line}"))
            .unwrap()
            .doubtful_arena;
        let of = |list: Vec<PathBuf>| {
            let text = list.iter().map(|path| path.display().to_string());
            text.collect::<Vec<_>>().join(" ")
        };
        (of(doubt.replay), of(doubt.discard))
    };
    let both = |replay: &str, discard: &str| (replay.to_owned(), discard.to_owned());
    assert_eq!(arenas(""), both("", ""));
    let doubt = |line: &str| parse(line).unwrap().doubtful_arena;
    let unnamed = doubt("--replay-arena 1 1 eth0 img");
    assert!(unnamed.replay == [PathBuf::new()] && unnamed.discard.is_empty());
    let unnamed = doubt("1 1 eth0 img --discard-arena");
    assert!(unnamed.discard == [PathBuf::new()] && unnamed.replay.is_empty());
    assert_eq!(
        arenas("--replay-arena=/a --discard-arena=/b --discard-arena=/c"),
        both("/a", "/b /c")
    );
    for wrong in [
        "--replay-arena --discard-arena",
        "--replay-arena=/a --discard-arena",
        "--replay-arena=/a --discard-arena=/a",
    ] {
        let (code, said) = refused(&format!("1 1 eth0 img {wrong}"));
        assert!(code == 2 && said.contains("different arenas"), "{said}");
    }
}

#[test]
fn shelf_and_slot_may_be_one_word_as_linux_writes_it() {
    for line in [
        "e3.7 lo img",
        "3.7 lo img",
        "-r e3.7 -b 16 lo -d img",
        "3 7 lo img",
    ] {
        let options = parse(line).unwrap();
        assert_eq!(options.address, Address::new(3, 7).unwrap(), "{line}");
        assert_eq!(options.nics, ["lo"], "{line}");
        assert!(options.image.path.ends_with("img"), "{line}");
    }
    // What follows is as before, dots or not.
    let options = parse("3 7 eth0.5 lo disk.img").unwrap();
    assert_eq!(options.nics, ["eth0.5", "lo"]);
    for (line, part) in [
        ("e70000.1 lo img", "shelf 70000"),
        ("e1.255 lo img", "slot 255"),
        ("e1. lo img", "slot"),
        ("ee1.1 lo img", "shelf e1"),
        ("1.1.1 lo img", "slot 1.1"),
        ("e1.1", "no network interface"),
        ("e1.1 img", "no network interface"),
        ("1 1 img", "no network interface"),
        ("1 1", "SHELF SLOT"),
        ("e1 1 lo img", "shelf e1"),
    ] {
        let (code, text) = refused(line);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(part), "'{line}': {text}");
    }
}

#[test]
fn options_stand_anywhere() {
    for line in [
        "-r -d 3 7 lo img -o 8 -l 16",
        "3 -r 7 -o 8 lo -d -l 16 img",
        "3 7 lo img -rd -o8 -l16",
    ] {
        let options = parse(line).unwrap();
        assert_eq!(options.address, Address::new(3, 7).unwrap());
        assert!(options.image.read_only && options.image.direct);
        assert_eq!(
            options.image.window,
            Window {
                offset: 8,
                length: Some(16)
            }
        );
    }
}

#[test]
fn shelf_and_slot_are_checked_and_not_folded() {
    // AoEde served "70000 300" as 4464.44.
    for line in [
        "70000 300 lo img",
        "65535 1 lo img",
        "1 255 lo img",
        "-- -1 1 lo img",
        "0x10 1 lo img",
        "1 +1 lo img",
        "a b lo img",
    ] {
        let (code, text) = refused(line);
        assert_eq!(code, 2, "{line}");
        assert!(text.contains("shelf") || text.contains("slot"), "{text}");
    }
    for line in [
        "",
        "1",
        "1 1",
        "1 1 lo",
        "1 1 lo lo img",
        "1 1 lo img --frobnicate",
    ] {
        assert_eq!(refused(line).0, 2, "{line}");
    }
}

#[test]
fn a_bad_mask_opens_nothing() {
    for mask in [
        "001122aabbcg",
        "00:11",
        "ff:ff:ff:ff:ff:ff",
        "01:00:5e:00:00:01",
        "001122aabbcc,",
        ",",
    ] {
        let (code, text) = refused(&format!("-m {mask} 1 1 lo img"));
        assert_eq!(code, 2);
        assert!(text.starts_with("-m: "), "{text}");
    }
    let options = parse("-m 001122AABBCC,00:11:22:aa:bb:cc 1 1 lo img -m 020000000001").unwrap();
    assert_eq!(options.policy.masks.len(), 2);
}

#[test]
fn other_arguments_are_checked() {
    for (line, says) in [
        ("-b 1", "-b 1: give a whole number from 2 to 65535"),
        ("-b 65536", "-b 65536:"),
        ("-l 0", "-l 0:"),
        ("-o -1", "unexpected argument '-1' found; see --help"),
        ("--create 1000", "multiple of 512"),
        ("--create 64M,sparse", "'sparse' is not 'prealloc'"),
        ("--create big", "64M or 10G"),
        ("--deny masks", "--deny masks: is none of"),
        ("--log paper", "--log paper: is none of"),
        ("--set spn=1", "did you mean 'spin'"),
        ("-f x,0", "-f limit 0"),
        ("-r -f x", "-r and -f: a read-only image"),
    ] {
        let (code, text) = refused(&format!("{line} 1 1 lo img"));
        assert_eq!(code, 2, "{line}");
        assert!(text.contains(says), "{line}: {text}");
    }
    let options =
        parse("1 1 lo img --create 10G,prealloc --deny config,mask --deny features -s -q").unwrap();
    assert_eq!(
        options.image.create,
        Some(Create {
            bytes: 10 << 30,
            prealloc: true
        })
    );
    assert!(options.policy.deny_config && options.policy.deny_mask);
    assert!(options.policy.deny_features && !options.policy.deny_reserve && options.durable);
    assert_eq!(options.level, LevelFilter::Warn);
}

#[test]
fn a_shadow_path_that_could_not_serve_is_refused_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    std::fs::write(&image, [0; 512]).unwrap();
    let image = image.display();
    for (shadow, says) in [
        (
            dir.path().join("backup.new"),
            "ends in .new, .thaw, .cut or .lock",
        ),
        (dir.path().join("none/shadow"), "directory does not exist"),
        (dir.path().join("./disk.img"), "the image itself"),
    ] {
        let (code, text) = refused(&format!("1 1 lo {image} -f {}", shadow.display()));
        assert_eq!(code, 1);
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn what_is_missing_is_named_in_one_line() {
    let (code, text) = refused("--accept-shadow 1 1 lo disk.img");
    assert_eq!(code, 2);
    assert!(text.contains("required") && text.contains("-f <"), "{text}");
    assert!(!text.contains('\n'), "{text}");
}

#[test]
fn help_and_version_are_no_errors() {
    assert_eq!(refused("--help").0, 0);
    assert_eq!(refused("--version").0, 0);
}

#[test]
fn a_pid_file_is_no_file_of_the_export() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("disk.img"), "").unwrap();
    std::os::unix::fs::symlink("disk.img", at("link.img")).unwrap();
    std::os::unix::fs::symlink(".", at("here")).unwrap();
    std::fs::create_dir(at("state")).unwrap();
    std::fs::create_dir_all(at("run/arena")).unwrap();
    let line = |image: &str, pid_file: &str| {
        format!(
            "1 1 lo {} -f {} --state-dir {} --run-dir {} --pid-file {}",
            at(image),
            at("cow"),
            at("state"),
            at("run"),
            if pid_file.starts_with('/') {
                pid_file.into()
            } else {
                at(pid_file)
            },
        )
    };
    for (image, pid_file, what) in [
        ("disk.img", "disk.img", "the image"),
        ("disk.img", "here/disk.img", "the image"),
        ("link.img", "disk.img", "the image"),
        ("link.img", "link.img", "the image"),
        ("new.img", "new.img", "the image"),
        ("disk.img", "cow", "the shadow"),
        ("disk.img", "here/cow.new", "the shadow"),
        ("disk.img", "cow.lock", "the shadow"),
        ("disk.img", "state/e1.1-disk.img-0.toml", "the state"),
        ("disk.img", "run/0-0.arena", "the run"),
        ("disk.img", "run/arena/pid", "the run"),
        ("disk.img", "/run/aoede/claims/pid", "the run"),
    ] {
        let (code, text) = refused(&line(image, pid_file));
        assert_eq!(code, 1, "{text}");
        assert!(
            text.contains(what) && text.contains("name another"),
            "{text}"
        );
    }
    for pid_file in [
        "pid",
        "cows",
        "state/pid",
        "run/e1.1.pid",
        "my.toml",
        "/run/aoede/e1.1.pid",
    ] {
        parse(&line("disk.img", pid_file)).unwrap();
    }
}
