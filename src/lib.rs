//! aoede: an ATA over Ethernet storage target.
//!
//! The rooms of the house, by floors; imports go down only, and rooms on one
//! floor do not know each other (a test reads the sources):
//!
//! ```text
//! 7  program                     arguments to exit code
//! 6  daemon, logging             the process, its terminal, its messages
//! 5  server                      one export's loop
//! 4  target, config              what to do with a frame; what was asked for
//! 3  session, store              initiators; volume, jobs, image, saved state
//! 2  access, dedup, drive,       who may; tag window; ATA; freeze orders;
//!    freeze, net                 interfaces
//! 1  wire, sys, text             bytes and types; the kernel (all `unsafe`); words
//! 0  shadow (a crate)            extents, the shadow file
//! ```
//!
//! A frame's way: `net` -> `target` -> `store` -> `target` -> `net`.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod access;
pub mod config;
pub mod daemon;
pub mod dedup;
pub mod drive;
pub mod freeze;
pub mod logging;
pub mod net;
pub mod program;
pub mod server;
pub mod session;
pub mod store;
#[allow(unsafe_code)]
pub mod sys;
pub mod target;
pub mod text;
pub mod wire;
