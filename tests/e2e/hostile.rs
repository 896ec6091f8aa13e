//! Frames by the ten thousand that no honest initiator sends.

use std::time::{Duration, Instant};

use aoede::wire::MacAddr;
use initiator::client::Patience;
use initiator::frame::{Ata, Frame, opcode};
use initiator::hostile::{self, Chance};
use initiator::lab::{self, Need};

use crate::rig::{Rig, each_engine};
use crate::workshop::trouble;

/// Frames between two looks whether the target still answers; fewer than its
/// receive buffers hold, so that none of them is lost.
const BATCH: usize = 200;

/// Sends frames drawn from a seed, and looks after each batch that the target
/// still serves.
fn storm(rig: &mut Rig, frames: usize, seed: u64, draw: impl Fn(&mut Chance, &Rig) -> Vec<u8>) {
    println!("seed {seed}");
    let mut chance = Chance::new(seed);
    for sent in 0..frames {
        let frame = draw(&mut chance, rig);
        // What the kernel does not send (too short, too long) is no test.
        let _ = rig.client.send_raw(&frame);
        if sent % BATCH == BATCH - 1 {
            rig.client.config_read().unwrap();
            assert_eq!(rig.target.exit_status().unwrap(), None, "frame {sent}");
        }
    }
    rig.client.config_read().unwrap();
}

/// The 24 bytes of a frame that reaches the target, with this command.
fn header(rig: &Rig, command: u8) -> Vec<u8> {
    let mut bytes = Frame::command(command, vec![]).encode(&rig.client.defaults());
    bytes.truncate(24);
    bytes
}

#[test]
fn noise_does_not_end_the_process() {
    // The masks stay as they are: else noise could lock us out, and rightly so.
    each_engine("noise", &["--deny", "mask"], |rig| {
        storm(rig, 4_000, 1, |chance, rig| {
            let len = chance.below(1500);
            let mut frame = header(rig, *chance.pick(&[0, 0, 0, 1, 2, 3, 0x23, 0xF0]));
            frame.extend(chance.bytes(len));
            if chance.one_in(8) {
                // Not the tag: it could be that of the question which follows.
                let at = 14 + chance.below(6);
                frame[at] = chance.draw() as u8;
            }
            frame
        });
        rig.client.reserve(2, &[]).unwrap();
    });
}

#[test]
fn captured_frames_gone_wrong_do_not_end_the_process() {
    let captured = hostile::captured();
    each_engine("mutated captures", &["--deny", "mask"], |rig| {
        storm(rig, 3_000, 2, |chance, rig| {
            let mut frame = chance.pick(&captured).clone();
            let own = header(rig, 0);
            frame[..12].copy_from_slice(&own[..12]);
            chance.spoil(&mut frame, 14, 1514);
            frame
        });
        rig.client.reserve(2, &[]).unwrap();
    });
}

#[test]
fn every_command_at_every_length_is_borne() {
    each_engine("commands and lengths", &["--deny", "mask"], |rig| {
        storm(rig, 3_000, 3, |chance, rig| {
            let mut frame = header(rig, chance.draw() as u8);
            if chance.one_in(2) {
                frame[19] = chance.below(4) as u8;
            }
            let len = 14 + chance.below(1501);
            frame.resize(len.max(24), *chance.pick(&[0, 1, 0xFF]));
            frame.truncate(len);
            frame
        });
        rig.client.reserve(2, &[]).unwrap();
    });
}

#[test]
fn no_refused_write_reaches_the_disk() {
    each_engine("refused writes", &[], |rig| {
        let own = rig.client.target_mac();
        storm(rig, 5_000, 4, |chance, rig| {
            let opcode = *chance.pick(&[0x30, 0x34, 0xCA, 0x35]);
            let mut registers = Ata {
                aflags: chance.draw() as u8,
                feature: chance.draw() as u8,
                count: 1 + chance.below(2) as u8,
                opcode,
                lba: chance.below(62) as u64,
                ..Ata::default()
            };
            let mut data = vec![0xEE; 512 * usize::from(registers.count)];
            let frame = |registers, data: &[u8]| Frame::ata(registers, data);
            let bad = match chance.below(9) {
                0 => {
                    data.truncate(chance.below(data.len()));
                    frame(registers, &data)
                }
                1 => {
                    registers.lba = 63 + registers.count as u64 + (chance.draw() >> 40);
                    frame(registers, &data)
                }
                2 => {
                    registers.count = 3 + chance.below(253) as u8;
                    data.resize(chance.below(1470), 0xEE);
                    frame(registers, &data)
                }
                3 => frame(registers, &data).at(0xFFFF, *chance.pick(&[1, 0xFF])),
                4 => frame(registers, &data).shelf(2 + chance.below(100) as u16),
                5 => {
                    let mac = [2, 1, 2, 3, 4, chance.draw() as u8];
                    frame(registers, &data).to(MacAddr(mac))
                }
                6 => {
                    let mac = [1 | chance.draw() as u8, 1, 2, 3, 4, 5];
                    frame(registers, &data).from(MacAddr(mac))
                }
                7 => frame(registers, &data).version_flags(0x20 | chance.below(16) as u8),
                _ => frame(registers, &data).from(own),
            };
            bad.encode(&rig.client.defaults())
        });
        let image = rig.image();
        let at = image.iter().position(|b| *b != 0);
        assert_eq!(at, None, "a refused write was executed");
    });
}

/// Bytes of memory that the target has for itself, without its cache.
fn memory(rig: &Rig) -> u64 {
    let path = format!("/proc/{}/status", rig.target.pid());
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

/// A frame that switches the write cache of a host off.
fn cache_off(from: MacAddr) -> Frame {
    let registers = Ata {
        feature: 0x82,
        opcode: opcode::SET_FEATURES,
        ..Ata::default()
    };
    Frame::ata(registers, &[]).from(from)
}

#[test]
fn while_the_state_directory_hangs_memory_is_flat() {
    // 348 MB were seen.
    let needs = [Need::Network, Need::Program("strace")];
    if !lab::require("a state directory that hangs", &needs) {
        return;
    }
    let mut rig = Rig::new(1500, &["--set", "disk_engine=threads"]);
    let before = memory(&rig);
    // Of all that is written only the state is synced by this call.
    let hang = "inject=fsync:delay_enter=60000000";
    let hanging = trouble(&rig.target, &["trace=fsync", hang]);
    storm(&mut rig, 40_000, 5, |chance, rig| {
        let mac = MacAddr([2, 9, 0, chance.draw() as u8, 0, chance.draw() as u8]);
        let frame = match chance.below(4) {
            0 => Frame::config(4, &chance.bytes(1000)).from(mac),
            _ => cache_off(mac),
        };
        frame.encode(&rig.client.defaults())
    });
    // It does hang: there is no answer to a change.
    let change = Frame::config(4, b"y");
    let brief = Patience::once(Duration::from_millis(300));
    assert!(rig.client.call_with(&change, brief).is_err());
    let more = memory(&rig).saturating_sub(before);
    assert!(more < 512 << 10, "{more} bytes more");
    // Data and questions go on.
    rig.client.write(0, &[1; 512]).unwrap();
    assert_eq!(rig.client.read(0, 1).unwrap(), [1; 512]);
    rig.client.mask_read().unwrap();
    rig.client.reserve(0, &[]).unwrap();
    drop(hanging);
    rig.client.config_force(b"x").unwrap();
    rig.finish();
}

#[test]
fn changes_without_end_fill_neither_log_nor_disk() {
    each_engine("changes without end", &[], |rig| {
        let began = Instant::now();
        storm(rig, 4_000, 6, |chance, rig| {
            let string = [&[b'y'; 1000], &chance.bytes(8)[..]].concat();
            Frame::config(4, &string).encode(&rig.client.defaults())
        });
        // The answers to those that were taken.
        rig.client.config_force(b"end").unwrap();
        rig.client.drain().unwrap();
        let seconds = began.elapsed().as_secs() as usize;
        let end = Instant::now() + Duration::from_secs(30);
        let told = loop {
            let lines = rig.target.output();
            let told = lines.into_iter().filter(|l| l.contains("config string"));
            let told: Vec<String> = told.collect();
            if told.last().is_some_and(|line| line.contains("\"end\"")) {
                break told;
            }
            assert!(Instant::now() < end, "{told:?}");
            rig.client.config_read().unwrap();
        };
        assert!(told.len() <= seconds + 3, "{} lines", told.len());
        let count = told
            .iter()
            .any(|line| line.contains(" changes, the last by "));
        assert!(count, "{told:?}");
        assert!(told.iter().all(|line| line.len() < 300), "{told:?}");
    });
}
