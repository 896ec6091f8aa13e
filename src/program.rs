//! Arguments to exit code, for both commands.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use crate::config::{LogChoice, Options};
use crate::sys::signals::Signals;
use crate::{daemon, logging};

/// Which command was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `aoede`: stays in the foreground.
    Aoede,
    /// `aoeded`: detaches and logs to syslog.
    Aoeded,
}

/// Runs the command; 0 after an orderly end, 2 for what was typed, 1 for the
/// rest.
pub fn main(command: Command, args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut options = match Options::from_args(args) {
        Ok(options) => options,
        Err(e) if e.exit_code() == 0 => {
            // The reader may have gone, as in `aoede --help | head`.
            let _ = write!(std::io::stdout(), "{e}");
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            complain(&e.to_string());
            return ExitCode::from(e.exit_code());
        }
    };
    options.wait_for_interfaces |= is_service();
    // Before any thread exists, so that all of them have it.
    if let Err(e) = Signals::block() {
        complain(&format!("blocking signals: {e}"));
        return ExitCode::FAILURE;
    }
    let mut terminal = None;
    let mut name = "aoede";
    if command == Command::Aoeded {
        name = "aoeded";
        options.log = options.log.or(Some(LogChoice::Syslog));
        terminal = match daemon::leave_terminal() {
            Ok(Some(terminal)) => Some(terminal),
            Ok(None) => return ExitCode::SUCCESS,
            Err(e) => {
                complain(&e.to_string());
                return ExitCode::FAILURE;
            }
        };
    }
    let logging = match logging::start(options.log, options.level, name) {
        Ok(logging) => logging,
        Err(e) => {
            complain(&format!("starting the logger: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let result = daemon::run(&options, terminal);
    if let Err(e) = &result {
        log::error!("{e}");
    }
    logging.finish();
    ExitCode::from(u8::from(result.is_err()))
}

/// `true` if systemd started this process, which at boot does not wait for
/// interfaces. INVOCATION_ID proves nothing: each shell in a service has it.
fn is_service() -> bool {
    let is_us = |pid: OsString| pid.to_str() == Some(&std::process::id().to_string());
    std::env::var_os("NOTIFY_SOCKET").is_some()
        || std::env::var_os("SYSTEMD_EXEC_PID").is_some_and(is_us)
}

/// Writes a line to standard error, when there is no logger yet.
fn complain(text: &str) {
    let text = logging::one_line(text);
    // If nobody listens, the exit code has to do.
    let _ = writeln!(std::io::stderr(), "aoede: error: {text}");
}
