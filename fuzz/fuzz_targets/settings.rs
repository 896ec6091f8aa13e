//! Reads what an operator or a file may say: a tuneup file, a state file, or a
//! command line.
//!
//! The first byte says which. The words of a command line end with a NUL.

#![no_main]

use std::ffi::OsString;
use std::io::{Seek, Write};
use std::os::unix::ffi::OsStringExt;

use aoede::access::WireState;
use aoede::config::{Options, Tuneup};
use libfuzzer_sys::fuzz_target;

/// A tuneup file, which is read from a file as the program does.
fn tuneup(input: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(input).expect("room");
    file.rewind().expect("a regular file");
    let mut values = Tuneup::default();
    if let Err(e) = values.load(file.path()) {
        assert!(!e.to_string().is_empty());
    }
}

/// A state: what is taken for one is written and read back the same.
fn state(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if let Ok(state) = WireState::from_text(text) {
        let again = WireState::from_text(&state.to_text());
        assert!(again.is_ok_and(|again| again == state));
    }
}

fn command_line(input: &[u8]) {
    let words = input.split(|byte| *byte == 0).take(32);
    let words = words.map(|word| OsString::from_vec(word.to_vec()));
    let args = [OsString::from("aoede")].into_iter().chain(words);
    if let Err(e) = Options::from_args(args) {
        assert!(e.exit_code() < 128);
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((which, rest)) = input.split_first() else {
        return;
    };
    match which % 3 {
        0 => tuneup(rest),
        1 => state(rest),
        _ => command_line(rest),
    }
});
