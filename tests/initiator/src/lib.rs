//! An AoE initiator for tests and measurements.
//!
//! - [`frame`] builds requests, right ones and wrong ones, and reads replies.
//!   It knows the wire on its own account: what the target's encoding gets
//!   wrong is seen here.
//! - [`client`] speaks with one target, one request at a time.
//! - [`engine`] keeps many requests in flight, measures, and knows what every
//!   sector must hold.
//! - [`answerer`] answers from memory: the limit of what a target could do.
//! - [`hostile`] has frames of real initiators, and spoils frames from a seed.
//! - [`lab`] makes network namespaces, veth pairs and processes, and takes them
//!   away again.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod answerer;
pub mod client;
pub mod engine;
pub mod error;
pub mod frame;
pub mod hostile;
pub mod lab;
pub mod port;

pub use error::{Error, Result};
