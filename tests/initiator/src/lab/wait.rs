//! Waiting for something that will be so.

use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How long to pause between two looks.
const PAUSE: Duration = Duration::from_millis(2);

/// A moment at which waiting ends.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    start: Instant,
    after: Duration,
}

impl Deadline {
    /// So long from now.
    pub fn after(after: Duration) -> Deadline {
        Deadline {
            start: Instant::now(),
            after,
        }
    }

    /// So many seconds from now.
    pub fn seconds(seconds: u64) -> Deadline {
        Deadline::after(Duration::from_secs(seconds))
    }

    /// The moment.
    pub fn instant(self) -> Instant {
        self.start + self.after
    }

    /// What is left; zero once it has passed.
    pub fn left(self) -> Duration {
        self.instant().saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }

    /// The error of what did not come in time.
    pub fn error(self, what: impl Into<String>) -> Error {
        Error::Timeout(what.into(), self.after)
    }
}

/// Looks until the condition holds. It is looked at once more after the
/// deadline, so that a late waker does not fail what is so.
pub fn wait_until(
    what: &str,
    deadline: Deadline,
    mut condition: impl FnMut() -> bool,
) -> Result<()> {
    loop {
        let last = deadline.passed();
        if condition() {
            return Ok(());
        }
        if last {
            return Err(deadline.error(what));
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_until_it_is_so_or_the_deadline() {
        let mut looks = 0;
        wait_until("three looks", Deadline::seconds(5), || {
            looks += 1;
            looks == 3
        })
        .unwrap();
        let gone = Deadline::after(Duration::from_millis(5));
        let error = wait_until("never", gone, || false).unwrap_err();
        assert!(error.to_string().starts_with("never: nothing after"));
    }
}
