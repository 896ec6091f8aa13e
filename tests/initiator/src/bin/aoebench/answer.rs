//! `aoebench answer`.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::{Args, ValueEnum};
use initiator::answerer::{Answerer, Options};
use initiator::error::Result;
use initiator::port::Receive;

/// How long `--spin` looks for the next frame before it sleeps after all.
const SPIN: Duration = Duration::from_millis(10);

#[derive(Args)]
pub(crate) struct Arguments {
    /// Shelf
    shelf: u16,
    /// Slot
    slot: u8,
    /// Interface
    interface: String,
    /// Size of the disk
    #[arg(long, value_parser = crate::size, default_value = "64M")]
    size: usize,
    /// How to receive
    #[arg(long, value_enum, default_value_t)]
    engine: EngineName,
    /// Look for frames without sleeping while some come in
    #[arg(long)]
    spin: bool,
}

#[derive(Clone, Copy, Default, ValueEnum)]
pub(crate) enum EngineName {
    /// A TPACKET_V2 ring
    #[default]
    Ring,
    /// recvmmsg
    Recvmmsg,
}

impl From<EngineName> for Receive {
    fn from(name: EngineName) -> Receive {
        match name {
            EngineName::Ring => Receive::Ring,
            EngineName::Recvmmsg => Receive::Recvmmsg,
        }
    }
}

pub(crate) fn run(arguments: &Arguments, stop: &AtomicBool) -> Result<()> {
    let options = Options {
        shelf: arguments.shelf,
        slot: arguments.slot,
        size: arguments.size,
        receive: arguments.engine.into(),
        spin: if arguments.spin { SPIN } else { Duration::ZERO },
    };
    let mut answerer = Answerer::open(&arguments.interface, &options)?;
    eprintln!(
        "e{}.{} on {}: {} sectors",
        options.shelf,
        options.slot,
        arguments.interface,
        options.size / 512
    );
    let answered = answerer.run(stop)?;
    eprintln!("{answered} frames answered");
    Ok(())
}
