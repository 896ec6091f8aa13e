//! aoede: an ATA over Ethernet storage target.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod access;
pub mod config;
pub mod drive;
pub mod net;
pub mod store;
#[allow(unsafe_code)]
pub mod sys;
pub mod target;
pub mod wire;
