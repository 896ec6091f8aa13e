//! The socket filters: what cannot be for us never reaches the process.
//!
//! A request passes if its EtherType is AoE, it came in on our very interface
//! and not on one on top of it (a VLAN's: the kernel hands us its frames as well,
//! and no longer marks them), the kernel does not think it is another host's
//! (another MAC, or a VLAN we are not in), and it is to our shelf or every shelf
//! and our slot or every slot. An answer passes only if it is
//! broadcast and carries exactly our address: then another target claims to be
//! us. While we ask for other targets, answers under our tag pass, and nothing else.

use crate::sys::packet::sock_filter;
use crate::wire::{Address, ETHERTYPE, Shelf, Slot};

const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_SET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Where the packet type is loaded from.
const PACKET_TYPE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE) as u32;
/// Where the index of the interface is loaded from that a frame came in on.
const INTERFACE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_IFINDEX) as u32;

const ACCEPT: u32 = u32::MAX;
const DROP: u32 = 0;

const fn op(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// An instruction at place `at` that goes on at place `yes` or `no`; the kernel
/// wants to know how many instructions to skip.
const fn branch(at: u8, code: u16, k: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter {
        code,
        jt: yes - at - 1,
        jf: no - at - 1,
        k,
    }
}

/// What an export hears on the interface with this index.
pub(super) fn requests(address: Address, index: u32) -> [sock_filter; 22] {
    const OK: u8 = 20;
    const NO: u8 = 21;
    let shelf = u32::from(address.shelf.0);
    let slot = u32::from(address.slot.0);
    [
        /*  0 */ op(LOAD_HALF, 12),
        /*  1 */ branch(1, IF_EQUAL, u32::from(ETHERTYPE), 2, NO),
        /*  2 */ op(LOAD_WORD, INTERFACE),
        /*  3 */ branch(3, IF_EQUAL, index, 4, NO),
        /*  4 */ op(LOAD_BYTE, PACKET_TYPE),
        /*  5 */ branch(5, IF_EQUAL, u32::from(libc::PACKET_OTHERHOST), NO, 6),
        /*  6 */ op(LOAD_BYTE, 14),
        /*  7 */ branch(7, IF_SET, 0x08, 14, 8),
        /*  8 */ op(LOAD_HALF, 16),
        /*  9 */ branch(9, IF_EQUAL, shelf, 11, 10),
        /* 10 */ branch(10, IF_EQUAL, u32::from(Shelf::EVERY.0), 11, NO),
        /* 11 */ op(LOAD_BYTE, 18),
        /* 12 */ branch(12, IF_EQUAL, slot, OK, 13),
        /* 13 */ branch(13, IF_EQUAL, u32::from(Slot::EVERY.0), OK, NO),
        /* 14 */ op(LOAD_BYTE, PACKET_TYPE),
        /* 15 */ branch(15, IF_EQUAL, u32::from(libc::PACKET_BROADCAST), 16, NO),
        /* 16 */ op(LOAD_HALF, 16),
        /* 17 */ branch(17, IF_EQUAL, shelf, 18, NO),
        /* 18 */ op(LOAD_BYTE, 18),
        /* 19 */ branch(19, IF_EQUAL, slot, OK, NO),
        /* 20 */ op(RETURN, ACCEPT),
        /* 21 */ op(RETURN, DROP),
    ]
}

/// What is heard while we ask whether the address is taken: answers under our tag.
pub(super) fn answers(tag: [u8; 4]) -> [sock_filter; 8] {
    const OK: u8 = 6;
    const NO: u8 = 7;
    [
        /*  0 */ op(LOAD_HALF, 12),
        /*  1 */ branch(1, IF_EQUAL, u32::from(ETHERTYPE), 2, NO),
        /*  2 */ op(LOAD_BYTE, 14),
        /*  3 */ branch(3, IF_SET, 0x08, 4, NO),
        /*  4 */ op(LOAD_WORD, 20),
        /*  5 */ branch(5, IF_EQUAL, u32::from_be_bytes(tag), OK, NO),
        /*  6 */ op(RETURN, ACCEPT),
        /*  7 */ op(RETURN, DROP),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The interface that frames come in on.
    const INDEX: u32 = 0x0001_0007;

    /// Runs the program as the kernel does; a load past the end drops.
    fn accepts(program: &[sock_filter], frame: &[u8], packet_type: u8) -> bool {
        let (mut at, mut a) = (0, 0u32);
        loop {
            let i = program[at];
            at += 1;
            let byte = |n: u32| frame.get(n as usize).copied().map(u32::from);
            match i.code {
                LOAD_WORD if i.k >= (libc::SKF_AD_OFF as u32) => a = INDEX,
                LOAD_WORD => match frame.get(i.k as usize..i.k as usize + 4) {
                    Some(bytes) => a = u32::from_be_bytes(bytes.try_into().unwrap()),
                    None => return false,
                },
                LOAD_BYTE if i.k >= (libc::SKF_AD_OFF as u32) => a = u32::from(packet_type),
                LOAD_BYTE => match byte(i.k) {
                    Some(b) => a = b,
                    None => return false,
                },
                LOAD_HALF => match (byte(i.k), byte(i.k + 1)) {
                    (Some(high), Some(low)) => a = high << 8 | low,
                    _ => return false,
                },
                IF_EQUAL => at += usize::from(if a == i.k { i.jt } else { i.jf }),
                IF_SET => at += usize::from(if a & i.k != 0 { i.jt } else { i.jf }),
                RETURN => return i.k == ACCEPT,
                _ => panic!("unknown instruction {:#x}", i.code),
            }
        }
    }

    fn frame(shelf: u16, slot: u8, flags: u8) -> Vec<u8> {
        let mut frame = vec![0; 32];
        frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
        frame[14] = 0x10 | flags;
        frame[16..18].copy_from_slice(&shelf.to_be_bytes());
        frame[18] = slot;
        frame
    }

    #[test]
    fn requests_to_us_pass_and_nothing_else() {
        let ours = Address::new(1, 4).unwrap();
        let program = requests(ours, INDEX);
        for (shelf, slot, passes) in [
            (1, 4, true),
            (0xFFFF, 4, true),
            (1, 0xFF, true),
            (0xFFFF, 0xFF, true),
            (1, 5, false),
            (2, 4, false),
            (0xFFFF, 5, false),
            (2, 0xFF, false),
        ] {
            let request = frame(shelf, slot, 0);
            assert_eq!(accepts(&program, &request, 0), passes, "{shelf}.{slot}");
            let other_host = libc::PACKET_OTHERHOST;
            assert!(!accepts(&program, &request, other_host));
            let answer = frame(shelf, slot, 0x08);
            let broadcast = libc::PACKET_BROADCAST;
            assert_eq!(
                accepts(&program, &answer, broadcast),
                (shelf, slot) == (1, 4)
            );
            assert!(!accepts(&program, &answer, libc::PACKET_HOST));
            assert!(accepts(&answers([0; 4]), &answer, 0));
            assert!(!accepts(&answers([0, 0, 0, 1]), &answer, 0));
            assert!(!accepts(&answers([0; 4]), &request, 0));
        }
        let mut other = frame(1, 4, 0);
        other[12] = 8;
        assert!(!accepts(&program, &other, 0));
        assert!(!accepts(&program, &frame(1, 4, 0)[..18], 0));
        let elsewhere = requests(ours, INDEX + 1);
        assert!(!accepts(&elsewhere, &frame(1, 4, 0), 0));
    }
}
