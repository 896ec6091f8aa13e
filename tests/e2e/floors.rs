//! The floors of the house: imports go down only, and rooms on one floor do not
//! know each other. Read from the sources, so that it cannot drift.

use std::fs;
use std::path::{Path, PathBuf};

/// Every room and its floor. `shadow`, on floor 0, is a crate of its own and so
/// cannot import any of these.
const ROOMS: [(&str, u8); 17] = [
    ("wire", 1),
    ("sys", 1),
    ("text", 1),
    ("access", 2),
    ("dedup", 2),
    ("drive", 2),
    ("freeze", 2),
    ("net", 2),
    ("session", 3),
    ("store", 3),
    ("target", 4),
    ("config", 4),
    ("server", 5),
    ("daemon", 6),
    ("logging", 6),
    ("program", 7),
    ("main", 8),
];

fn floor(room: &str) -> Option<u8> {
    ROOMS
        .iter()
        .find(|(name, _)| *name == room)
        .map(|(_, floor)| *floor)
}

/// All Rust files below a folder.
fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// The rooms that a source names behind `crate::` or `aoede::`, with the groups
/// of `use crate::{a::b, c}` taken apart. What tests inside it import does not
/// count: they may look anywhere.
fn imports(source: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]").next().unwrap();
    let code: String = code
        .lines()
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n");
    let name = |text: &str| -> String {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let mut rooms = Vec::new();
    for lead in ["crate::", "aoede::"] {
        for (at, _) in code.match_indices(lead) {
            let rest = &code[at + lead.len()..];
            match rest.strip_prefix('{') {
                None => rooms.push(name(rest)),
                Some(group) => {
                    let mut depth = 0;
                    let mut start = true;
                    for (at, c) in group.char_indices() {
                        match c {
                            '{' => depth += 1,
                            '}' if depth == 0 => break,
                            '}' => depth -= 1,
                            ',' if depth == 0 => start = true,
                            c if start && !c.is_whitespace() => {
                                rooms.push(name(&group[at..]));
                                start = false;
                            }
                            _ => {}
                        }
                    }
                }
            }
        }
    }
    rooms
}

#[test]
fn imports_go_down_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in files {
        let inside = file.strip_prefix(&root).unwrap();
        let mut parts = inside.iter().map(|part| part.to_str().unwrap());
        let room = parts.next().unwrap().trim_end_matches(".rs");
        let is_test = inside.ends_with("tests.rs");
        // The list of rooms itself, and the two programs at the top.
        let room = match room {
            "lib" => continue,
            "bin" => "main",
            room => room,
        };
        let Some(own) = floor(room) else {
            wrong.push(format!("{}: room '{room}' has no floor", inside.display()));
            continue;
        };
        if is_test {
            continue;
        }
        for import in imports(&fs::read_to_string(&file).unwrap()) {
            if import == room {
                continue;
            }
            seen += 1;
            match floor(&import) {
                Some(other) if other < own => {}
                Some(other) => wrong.push(format!(
                    "{}: {room} (floor {own}) imports {import} (floor {other})",
                    inside.display()
                )),
                None => wrong.push(format!("{}: imports '{import}'", inside.display())),
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "imports that do not go down:\n{}",
        wrong.join("\n")
    );
    assert!(
        seen > 40,
        "only {seen} imports found: does this test still read them?"
    );
}

#[test]
fn the_reader_of_imports_sees_groups_and_paths() {
    let source = "use crate::{net::{self, Nic}, store};\nuse crate::wire::ata;\n\
                  // crate::config\nfn f() { crate::target::g() }\n#[cfg(test)] use crate::daemon;";
    let mut rooms = imports(source);
    rooms.sort();
    assert_eq!(rooms, ["net", "store", "target", "wire"]);
}

#[test]
fn unsafe_stands_in_one_room() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["src", "shadow/src", "tests"] {
        sources(&root.join(dir), &mut files);
    }
    for file in files {
        // Each of the two crates has its own.
        let is_sys =
            file.starts_with(root.join("src/sys")) || file == root.join("shadow/src/sys.rs");
        if is_sys || file.ends_with("e2e/floors.rs") {
            continue;
        }
        let source = fs::read_to_string(&file).unwrap();
        for (number, line) in source.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let unsafe_code = ["unsafe {", "unsafe fn", "unsafe impl"]
                .iter()
                .any(|u| code.contains(u));
            assert!(!unsafe_code, "{}:{}: {line}", file.display(), number + 1);
        }
    }
}

/// The names of the deliberate faults in a source, in order.
fn faults(source: &str) -> Vec<String> {
    let calls = source.split("fault!(").skip(1);
    let name = |call: &str| {
        Some(
            call.trim_start()
                .strip_prefix('"')?
                .split_once('"')?
                .0
                .into(),
        )
    };
    calls.filter_map(name).collect()
}

#[test]
fn each_deliberate_fault_is_in_one_place_and_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["src", "shadow/src"] {
        sources(&root.join(dir), &mut files);
    }
    let read = |file: &PathBuf| faults(&fs::read_to_string(file).unwrap());
    let mut used: Vec<String> = files.iter().flat_map(read).collect();
    used.sort();
    let list = fs::read_to_string(root.join("tests/faults.list")).unwrap();
    let lines = list.lines().filter(|line| !line.starts_with('#'));
    let mut listed: Vec<String> = Vec::new();
    for line in lines {
        let mut words = line.split_whitespace();
        listed.push(words.next().expect("no empty line").into());
        let place = words.next().expect("a test binary");
        assert!(["aoede", "shadow", "crash"].contains(&place), "{line}");
        assert!(words.next().is_some(), "{line}: no test");
    }
    listed.sort();
    // As lists: a name that is used twice would be here twice.
    assert_eq!(used, listed, "in the sources (left), in tests/faults.list");
    let mut once = used.clone();
    once.dedup();
    assert_eq!(used, once);
    assert!(used.len() >= 29, "only {} faults", used.len());
}

#[test]
fn the_reader_of_faults_sees_names_on_the_next_line() {
    let source = "if fault!(\"a-b\") || shadow::fault!(\n    \"c\"\n) { macro_fault!(name) }";
    assert_eq!(faults(source), ["a-b", "c"]);
}
