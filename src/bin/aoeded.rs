//! `aoeded`: serves one export in the background.

use std::process::ExitCode;

use aoede::program::{Command, main as run};

fn main() -> ExitCode {
    run(Command::Aoeded, std::env::args_os())
}
