//! Receiving by recvmmsg: the engine where a ring cannot be had or is not
//! wanted.

use std::io;
use std::mem::{MaybeUninit, size_of};

use super::Frame;
use super::packet::{BATCH, PacketSocket, check};

/// Room for the kernel's time stamp behind a message, aligned as it must be.
const CONTROL: usize = 8;

/// What is known of a frame in the batch.
#[derive(Clone, Copy, Debug, Default)]
struct Meta {
    len: usize,
    stamp: u64,
    whole: bool,
    other_host: bool,
}

/// A batch of frames in memory of ours.
#[derive(Debug)]
pub struct BatchReceiver {
    memory: Vec<u8>,
    stride: usize,
    metas: Vec<Meta>,
    head: usize,
    filled: usize,
}

impl BatchReceiver {
    /// Buffers for frames of this MTU.
    pub fn new(socket: &PacketSocket, mtu: u32) -> io::Result<BatchReceiver> {
        socket.set(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1i32)?;
        // A little more than a frame, so that one too long is seen to be.
        let stride = (mtu as usize + 64).next_multiple_of(64);
        let memory = vec![0; stride * BATCH];
        let metas = vec![Meta::default(); BATCH];
        Ok(BatchReceiver {
            memory,
            stride,
            metas,
            head: 0,
            filled: 0,
        })
    }

    /// Takes what the socket holds if the batch is used up; `false` if that is
    /// nothing.
    pub fn refill(&mut self, socket: &PacketSocket) -> io::Result<bool> {
        if self.head < self.filled {
            return Ok(true);
        }
        (self.head, self.filled) = (0, 0);
        let mut names = [const { MaybeUninit::<libc::sockaddr_ll>::zeroed() }; BATCH];
        let mut controls = [[0u64; CONTROL]; BATCH];
        let mut pieces = [const { MaybeUninit::<libc::iovec>::uninit() }; BATCH];
        let mut messages = [const { MaybeUninit::<libc::mmsghdr>::zeroed() }; BATCH];
        let buffers = self.memory.chunks_exact_mut(self.stride);
        for (index, buffer) in buffers.enumerate().take(BATCH) {
            let piece = pieces[index].write(libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            });
            // SAFETY: zeros are a value of mmsghdr, and it was zeroed.
            let header = unsafe { &mut messages[index].assume_init_mut().msg_hdr };
            header.msg_iov = piece;
            header.msg_iovlen = 1;
            header.msg_name = names[index].as_mut_ptr().cast();
            header.msg_namelen = size_of::<libc::sockaddr_ll>() as u32;
            header.msg_control = controls[index].as_mut_ptr().cast();
            header.msg_controllen = size_of::<[u64; CONTROL]>() as _;
        }
        // SAFETY: each header points to buffers of its own with their true
        // lengths, all alive until the call returns.
        let received = unsafe {
            libc::recvmmsg(
                socket.raw(),
                messages.as_mut_ptr().cast(),
                BATCH as _,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let received = match check(received) {
            Ok(count) => count as usize,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e),
        };
        for index in 0..received {
            // SAFETY: zeroed before the call and at most written by it.
            let message = unsafe { messages[index].assume_init_ref() };
            // SAFETY: as above; sockaddr_ll is plain numbers.
            let name = unsafe { names[index].assume_init_ref() };
            self.metas[index] = Meta {
                len: (message.msg_len as usize).min(self.stride),
                stamp: stamp(&message.msg_hdr),
                whole: message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0,
                other_host: name.sll_pkttype == libc::PACKET_OTHERHOST,
            };
        }
        self.filled = received;
        Ok(received > 0)
    }

    /// The next frame of the batch.
    pub fn peek(&self) -> Option<Frame<'_>> {
        let meta = self.metas[..self.filled].get(self.head)?;
        let start = self.head * self.stride;
        Some(Frame {
            bytes: &self.memory[start..start + meta.len],
            stamp: meta.stamp,
            whole: meta.whole,
            other_host: meta.other_host,
        })
    }

    /// Whether the last batch is used up and was as large as one can be, so
    /// that the socket may hold more.
    pub fn was_full_and_is_empty(&self) -> bool {
        self.filled == BATCH && self.head == BATCH
    }

    /// Done with the frame at the head.
    pub fn release(&mut self) {
        self.head = (self.head + 1).min(self.filled);
    }
}

/// The time stamp among the control messages; 0 if there is none.
fn stamp(header: &libc::msghdr) -> u64 {
    // SAFETY: the header is as recvmmsg left it, its control buffer still
    // alive; the CMSG macros stay within msg_controllen.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !control.is_null() {
        // SAFETY: not null, so it points to a whole cmsghdr in the buffer.
        let (level, kind) = unsafe { ((*control).cmsg_level, (*control).cmsg_type) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_TIMESTAMPNS {
            // SAFETY: a message of this type carries a timespec.
            let time: libc::timespec = unsafe {
                libc::CMSG_DATA(control)
                    .cast::<libc::timespec>()
                    .read_unaligned()
            };
            return time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
        }
        // SAFETY: both pointers are of the buffer that header describes.
        control = unsafe { libc::CMSG_NXTHDR(header, control) };
    }
    0
}
