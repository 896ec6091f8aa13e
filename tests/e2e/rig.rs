//! A target that is asked and asked, under each receive engine.

use std::time::Duration;

use initiator::client::{Client, Patience};
use initiator::frame::{CONFIG, Frame, Reply};
use initiator::lab::{self, Need, Process};

use crate::support::{Store, Wire, serve, stop};

/// How long a frame may stay without an answer that is due.
pub const SOON: Duration = Duration::from_secs(10);

/// A target as e1.1 with one initiator. What is dropped first stands first.
pub struct Rig {
    pub target: Process,
    pub client: Client,
    pub wire: Wire,
    pub store: Store,
}

/// Options that a test wants in any case: no waiting for other targets that are not
/// there.
pub const QUICK: [&str; 2] = ["--set", "address_probe=10"];

impl Rig {
    /// A target of 64 zeroed sectors on a wire of this MTU.
    pub fn new(mtu: u32, options: &[&str]) -> Rig {
        let (wire, store) = (Wire::new(mtu), Store::new(64));
        let options = [&QUICK[..], options].concat();
        let target = serve(&wire.host, &store, &["tgt0"], &options);
        let mut client = wire.client();
        client.strict(true);
        Rig {
            target,
            client,
            wire,
            store,
        }
    }

    /// Asks once, under a tag of its own, and takes the answer.
    pub fn ask(&mut self, frame: &Frame) -> Reply {
        self.client
            .call_with(frame, Patience::once(SOON))
            .unwrap_or_else(|e| panic!("{e}: {frame:?}"))
    }

    /// Asserts that a frame is met with silence.
    #[track_caller]
    pub fn silence(&mut self, frame: &Frame) {
        if let Err(e) = self.client.expect_silence(frame, SOON) {
            panic!("{e}: {frame:?}");
        }
        self.nothing_else(None);
    }

    /// The same for bytes as they are, whose tag is this.
    #[track_caller]
    pub fn silence_raw(&mut self, bytes: &[u8], tag: [u8; 4]) {
        self.client.expect_silence_raw(bytes, SOON).unwrap();
        self.nothing_else(Some(tag));
    }

    /// Asserts that nothing has come in that nobody waited for. A question for
    /// Config may have been answered twice if it was asked twice; nothing else,
    /// and nothing that has this tag.
    #[track_caller]
    pub fn nothing_else(&mut self, tag: Option<[u8; 4]>) {
        let mut strays = self.client.drain().unwrap();
        strays.retain(|reply| reply.command() != CONFIG || Some(reply.tag_bytes()) == tag);
        assert_eq!(strays, [], "answers that nobody asked for");
    }

    /// The whole image.
    pub fn image(&self) -> Vec<u8> {
        std::fs::read(self.store.image()).unwrap()
    }

    /// Kills the target without a warning and starts it again.
    pub fn restart(&mut self, options: &[&str]) {
        self.target.kill().unwrap();
        let options = [&QUICK[..], options].concat();
        self.target = serve(&self.wire.host, &self.store, &["tgt0"], &options);
    }

    /// The target is still the one that was started, serves, and ends in
    /// order.
    pub fn finish(mut self) -> Store {
        assert_eq!(self.target.exit_status().unwrap(), None, "it ended");
        let data = vec![0xC3; 1024];
        self.client.write_many(62, &data).unwrap();
        assert_eq!(self.client.read_many(62, 2).unwrap(), data);
        self.client.flush().unwrap();
        stop(self.target);
        assert_eq!(self.store.sectors(62, 2), data);
        self.store
    }
}

/// Runs a test on a target with each receive engine; these are the options
/// besides.
pub fn each_engine(test: &str, options: &[&str], run: impl Fn(&mut Rig)) {
    if !lab::require(test, &[Need::Network]) {
        return;
    }
    for engine in ["receive=ring", "receive=recvmmsg"] {
        println!("with {engine}");
        let mut rig = Rig::new(1500, &[&["--set", engine][..], options].concat());
        run(&mut rig);
        rig.finish();
    }
}
