//! `aoede`: serves one export in the foreground.

use std::process::ExitCode;

use aoede::program::{Command, main as run};

fn main() -> ExitCode {
    run(Command::Aoede, std::env::args_os())
}
