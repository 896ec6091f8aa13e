//! What a test needs of the machine, said in words.

use std::env;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

/// One thing that a test cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need<'a> {
    /// To be root.
    Root,
    /// A program that PATH finds, or this path itself.
    Program(&'a str),
    /// A file, directory or device.
    Path(&'a str),
    /// So many processors.
    Processors(usize),
    /// Namespaces and veth pairs: root, and `ip`.
    Network,
}

impl Need<'_> {
    /// What is missing; `None` if nothing is.
    pub fn missing(&self) -> Option<String> {
        match self {
            Need::Root => (!geteuid().is_root()).then(|| "root".to_owned()),
            Need::Program(name) => find(name)
                .is_none()
                .then(|| format!("the program {name} in PATH")),
            Need::Path(path) => (!Path::new(path).exists()).then(|| (*path).to_owned()),
            Need::Processors(n) => {
                let here = std::thread::available_parallelism().map_or(1, usize::from);
                (here < *n).then(|| format!("{n} processors (here: {here})"))
            }
            Need::Network => missing(&[Need::Root, Need::Program("ip")]),
        }
    }
}

/// All that is missing, in one line; `None` if nothing is.
pub fn missing(needs: &[Need<'_>]) -> Option<String> {
    let all: Vec<String> = needs.iter().filter_map(Need::missing).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// Whether a test can run here. If not it says what is missing, and the test is
/// to return; with AOEDE_TESTS_COMPLETE=1 in the environment it panics instead,
/// so that a run meant to be complete cannot leave anything out unseen.
///
/// ```no_run
/// use initiator::lab::{self, Need};
/// if !lab::require("answers on veth", &[Need::Network]) {
///     return;
/// }
/// ```
#[must_use = "a test that cannot run is to return"]
#[allow(clippy::panic)]
pub fn require(test: &str, needs: &[Need<'_>]) -> bool {
    let Some(missing) = missing(needs) else {
        return true;
    };
    if env::var_os("AOEDE_TESTS_COMPLETE").is_some_and(|v| v == "1") {
        panic!("{test} needs {missing}, and AOEDE_TESTS_COMPLETE=1 allows no test to be left out");
    }
    // Past the test runner's capture, which would swallow it.
    let _ = writeln!(io::stderr(), "left out: {test}: needs {missing}");
    false
}

/// Where PATH finds a program; the sbin directories are looked at in any case.
fn find(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.is_file());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(&[Need::Program("sh"), Need::Path("/")]), None);
        let absent = [Need::Program("no-such-program"), Need::Path("/no/such")];
        assert_eq!(
            missing(&absent).as_deref(),
            Some("the program no-such-program in PATH, /no/such")
        );
        assert!(Need::Processors(100_000).missing().is_some());
    }
}
