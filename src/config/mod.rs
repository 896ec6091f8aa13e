//! From what was typed to what it means: command line and settings files,
//! checked. Nothing is opened, made or changed here.
//!
//! [`cli`] defines each option once, for parsing and help; [`Options`] is the
//! checked meaning; [`tuneup`] the settings that few need.

pub mod cli;
pub mod tuneup;

mod options;
mod size;

pub use options::{ConfigError, LogChoice, Options, ShadowOption};
pub use tuneup::{DiskEngine, Tuneup};
