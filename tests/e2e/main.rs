//! End to end: the program as people run it, in network namespaces.
//!
//! One binary with a module per subject. Every test makes its own namespaces,
//! interfaces and files and takes them away again, also when it fails; none
//! depends on another. What a test needs of the machine it says through
//! `lab::require`; with AOEDE_TESTS_COMPLETE=1 nothing may be left out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod address_conflict;
mod admin;
mod arena;
mod backup;
mod cli;
mod devices;
mod extensions;
mod faults;
mod floors;
mod frames;
mod freeze;
mod hostile;
mod identity;
mod kills;
mod late_nics;
mod life;
mod nics;
mod rig;
mod serve;
mod slow;
mod static_build;
mod support;
mod tools;
mod upgrade;
mod vm;
mod workshop;
