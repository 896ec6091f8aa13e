//! Frames by the ten thousand that no honest initiator sends.

use aoede::wire::MacAddr;
use initiator::frame::{Ata, Frame};
use initiator::hostile::{self, Chance};

use crate::rig::{Rig, each_engine};

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
                let at = 14 + chance.below(10);
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
