//! `aoede-shadow`: looks at the shadow of a frozen image, and merges it where no
//! target runs that would.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod image;
mod look;
mod merge;
mod progress;
mod records;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Looks at the shadow of a frozen image, and merges it into the image where no
/// aoede runs that would.
#[derive(Debug, Parser)]
#[command(name = "aoede-shadow", version, arg_required_else_help = false)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says what a shadow is and how much it holds
    Inspect {
        /// The shadow
        shadow: PathBuf,
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Reads both copies of everything, and compares the image if it is given
    Check {
        /// The shadow
        shadow: PathBuf,
        /// The image that it should belong to
        image: Option<PathBuf>,
    },
    /// Brings all that a shadow holds to its image, and removes it
    Merge(merge::Args),
}

/// What went wrong, in a line that names the thing and the remedy.
type Trouble = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) if e.exit_code() == 0 => {
            // Whoever asked may have gone, as in `aoede-shadow --help | head`.
            let _ = write!(std::io::stdout(), "{e}");
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            complain(&usage(&e));
            return ExitCode::from(2);
        }
    };
    let result = match args.command {
        Command::Inspect { shadow, json } => look::inspect(&shadow, json),
        Command::Check { shadow, image } => look::check(&shadow, image.as_deref()),
        Command::Merge(args) => merge::merge(&args),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            complain(&e.to_string());
            ExitCode::FAILURE
        }
    }
}

/// What was typed wrongly, in a line.
fn usage(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let lines = text.split("\n\n").next().unwrap_or(text).lines();
    let line: Vec<_> = lines.map(str::trim).collect();
    format!("{}; see aoede-shadow --help", line.join(" "))
}

/// An error, as one line whatever a path in it is called.
fn complain(text: &str) {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect();
    // If nobody listens, the exit code has to do.
    let _ = writeln!(std::io::stderr(), "aoede-shadow: error: {line}");
}

/// Prints lines; whoever asked may have gone.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// A number of bytes for people.
fn human(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = "bytes";
    let mut number = bytes as f64;
    for next in units {
        if number < 1024.0 {
            break;
        }
        (unit, number) = (next, number / 1024.0);
    }
    if unit == "bytes" {
        format!("{bytes} {unit}")
    } else {
        format!("{number:.1} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(human(0), "0 bytes");
        assert_eq!(human(1023), "1023 bytes");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(3 << 40), "3.0 TiB");
        assert_eq!(human(u64::MAX), "16384.0 PiB");
    }

    #[test]
    fn what_was_typed_wrongly_is_one_line() {
        for args in [
            &["aoede-shadow"][..],
            &["aoede-shadow", "merge"],
            &["aoede-shadow", "wat"],
        ] {
            let line = usage(&Args::try_parse_from(args).unwrap_err());
            assert!(!line.contains('\n') && line.ends_with("--help"), "{line}");
        }
    }
}
