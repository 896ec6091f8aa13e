//! aoebench.
fn main() {}
