//! Deliberate faults, for showing that the tests notice them.
//!
//! In a build with `RUSTFLAGS='--cfg faults'` the environment variable
//! `AOEDE_FAULT` chooses one by its name. In any other build there are none.
//! `tests/faults.list` has the names and the tests that notice each.

/// `true` if the fault of this name was chosen; a constant `false` in an
/// ordinary build.
#[macro_export]
macro_rules! fault {
    ($name:literal) => {
        $crate::faults::is_chosen($name)
    };
}

/// The variable that names a fault.
#[cfg(faults)]
const VARIABLE: &str = "AOEDE_FAULT";

/// `true` if the fault of this name was chosen. Use [`fault!`](crate::fault).
#[cfg(faults)]
pub fn is_chosen(name: &str) -> bool {
    use std::sync::LazyLock;
    static CHOSEN: LazyLock<Option<String>> = LazyLock::new(|| std::env::var(VARIABLE).ok());
    CHOSEN.as_deref() == Some(name)
}

/// `true` if the fault of this name was chosen: never, in this build.
#[cfg(not(faults))]
#[inline(always)]
pub const fn is_chosen(_name: &str) -> bool {
    false
}
