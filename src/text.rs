//! Numbers as messages write them.

use std::fmt;

/// A number with its noun, as in "1 sector" or "2 sectors".
pub fn count(number: u64, noun: &'static str) -> impl fmt::Display {
    Count(number, noun)
}

struct Count(u64, &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Count(number, noun) = self;
        let ending = if *number == 1 { "" } else { "s" };
        write!(f, "{number} {noun}{ending}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_is_singular() {
        let text = |number| count(number, "sector").to_string();
        assert_eq!(
            [text(0), text(1), text(2)],
            ["0 sectors", "1 sector", "2 sectors"]
        );
    }
}
