//! Load for an AoE target, and a comparison of targets.

mod answer;
mod compare;
mod fairness;
mod inner;
mod load;
mod table;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Parser, Subcommand};
use initiator::error::{Error, Result};

/// Measures AoE targets and checks that they keep what they are given.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a load against a target that is there
    Run(load::Arguments),
    /// Is a target of nothing but memory
    Answer(answer::Arguments),
    /// Compares aoede, vblade and bare memory on one image
    Compare(compare::Arguments),
    /// Measures what a polite initiator gets beside a hostile one
    Fairness(fairness::Arguments),
    /// Measures checksums and the tag window, without a network
    Inner(inner::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = stop_flag().and_then(|stop| match arguments.command {
        Command::Run(arguments) => load::run(&arguments, &stop),
        Command::Answer(arguments) => answer::run(&arguments, &stop),
        Command::Compare(arguments) => compare::run(&arguments, &stop),
        Command::Fairness(arguments) => fairness::run(&arguments, &stop),
        Command::Inner(arguments) => {
            inner::run(&arguments);
            Ok(())
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("aoebench: {e}");
            ExitCode::FAILURE
        }
    }
}

/// A flag that INT and TERM set, so that what was made is taken away again.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [nix::libc::SIGINT, nix::libc::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(Error::system("signal handler"))?;
    }
    Ok(stop)
}

/// Bytes, with K, M or G for powers of 1024.
fn size(text: &str) -> std::result::Result<usize, String> {
    let (digits, shift) = match text.trim_end_matches(['k', 'K', 'm', 'M', 'g', 'G']) {
        digits if digits.len() == text.len() => (digits, 0),
        digits if digits.len() + 1 == text.len() => {
            let shift = match text.as_bytes()[digits.len()] | 0x20 {
                b'k' => 10,
                b'm' => 20,
                _ => 30,
            };
            (digits, shift)
        }
        _ => return Err(format!("'{text}' is no size")),
    };
    let number: usize = digits
        .parse()
        .map_err(|_| format!("'{text}' is no size: give it as 4096, 64K, 16M or 1G"))?;
    number
        .checked_shl(shift)
        .filter(|n| n >> shift == number)
        .ok_or_else(|| format!("'{text}' is too large"))
}

/// SHELF.SLOT
fn address(text: &str) -> std::result::Result<(u16, u8), String> {
    let parts = text
        .strip_prefix('e')
        .unwrap_or(text)
        .split_once('.')
        .and_then(|(shelf, slot)| Some((shelf.parse().ok()?, slot.parse().ok()?)));
    parts.ok_or_else(|| format!("'{text}' is no address: give it as 1.1"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_addresses_are_read() {
        let read = |text| size(text).ok();
        assert_eq!(read("512"), Some(512));
        assert_eq!((read("4k"), read("4K")), (Some(4096), Some(4096)));
        assert_eq!((read("64M"), read("2G")), (Some(64 << 20), Some(2 << 30)));
        for bad in [
            "",
            "k",
            "4kk",
            "-1",
            "4T",
            "99999999999999999999",
            "99999999999999G",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(address("1.2"), Ok((1, 2)));
        assert_eq!(address("e65534.254"), Ok((65534, 254)));
        assert!(address("1").is_err() && address("1.300").is_err());
    }

    #[test]
    fn the_arguments_are_sound() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }
}
