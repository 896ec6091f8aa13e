//! Packet sockets: opened deaf, told what to hear, then bound.

use std::io;
use std::mem::{MaybeUninit, size_of, size_of_val};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

pub use libc::sock_filter;

/// The most frames one system call sends or receives.
pub const BATCH: usize = 64;
/// The pieces a frame is sent from: head, data, checksum.
pub const PIECES: usize = 3;

/// A raw packet socket of one network interface.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// A socket that hears nothing yet: its protocol is 0 until [`bind`].
    ///
    /// [`bind`]: PacketSocket::bind
    pub fn open() -> io::Result<PacketSocket> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket(2) takes no pointer; a result of 0 or more is a new
        // descriptor that nobody else owns.
        let fd = unsafe {
            let fd = check(libc::socket(libc::AF_PACKET, kind, 0))?;
            OwnedFd::from_raw_fd(fd)
        };
        Ok(PacketSocket(fd))
    }

    /// Lets only those frames in that the classic BPF program accepts.
    pub fn attach_filter(&self, program: &[sock_filter]) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            filter: program.as_ptr().cast_mut(),
        };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
    }

    /// Does not hear what this machine sends.
    pub fn ignore_outgoing(&self) -> io::Result<()> {
        self.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1i32)
    }

    /// Sends past the queueing discipline of the interface.
    pub fn bypass_qdisc(&self) -> io::Result<()> {
        self.set(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, &1i32)
    }

    /// Asks for buffers of so many bytes, past the system's limit where we may.
    pub fn set_buffers(&self, bytes: usize) {
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        let options = [
            (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
            (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
        ];
        for (force, ask) in options {
            if self.set(libc::SOL_SOCKET, force, &bytes).is_err() {
                // Without CAP_NET_ADMIN the kernel gives what its limit allows.
                let _ = self.set(libc::SOL_SOCKET, ask, &bytes);
            }
        }
    }

    /// Hears `ethertype` on the interface with this index from now on.
    pub fn bind(&self, index: u32, ethertype: u16) -> io::Result<()> {
        // SAFETY: sockaddr_ll is plain numbers, for which zeros are a value.
        let mut address: libc::sockaddr_ll = unsafe { MaybeUninit::zeroed().assume_init() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ethertype.to_be();
        address.sll_ifindex = index as i32;
        let len = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the pointer is to a live sockaddr_ll of `len` bytes.
        let result = unsafe { libc::bind(self.raw(), (&raw const address).cast(), len) };
        check(result).map(drop)
    }

    /// Whether it still belongs to this interface: the kernel detaches it when
    /// an interface goes, for good, even if the same number comes back.
    pub fn is_bound_to(&self, index: u32) -> bool {
        let mut address = MaybeUninit::<libc::sockaddr_ll>::zeroed();
        let mut len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the pointers are to a sockaddr_ll and to its length.
        let result =
            unsafe { libc::getsockname(self.raw(), address.as_mut_ptr().cast(), &mut len) };
        // SAFETY: zeroed, then at most written by the kernel; plain numbers.
        let address = unsafe { address.assume_init() };
        // The kernel's answer ends where the MAC does, short of the whole.
        check(result).is_ok() && u32::try_from(address.sll_ifindex) == Ok(index)
    }

    /// Takes the error that waits on the socket (ENETDOWN after a link went
    /// down), so that polling does not report it again.
    pub fn take_error(&self) -> Option<io::Error> {
        match nix::sys::socket::getsockopt(self, nix::sys::socket::sockopt::SocketError) {
            Ok(0) => None,
            Ok(errno) => Some(io::Error::from_raw_os_error(errno)),
            Err(errno) => Some(errno.into()),
        }
    }

    /// Sends frames, each from its pieces in turn up to the first empty one, at
    /// most [`BATCH`] of them; says how many the kernel took. An error is that of
    /// the first frame.
    pub fn send<'a>(&self, frames: impl Iterator<Item = [&'a [u8]; PIECES]>) -> io::Result<usize> {
        let mut pieces = [const { MaybeUninit::<[libc::iovec; PIECES]>::uninit() }; BATCH];
        let mut messages = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; BATCH];
        let mut count = 0;
        for ((frame, piece), message) in frames.zip(&mut pieces).zip(&mut messages) {
            let vector = piece.write(frame.map(|bytes| libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            }));
            let used = vector.iter().take_while(|v| v.iov_len > 0).count();
            // SAFETY: mmsghdr is pointers and numbers, for which zeros are a
            // value.
            let header = message.write(unsafe { MaybeUninit::zeroed().assume_init() });
            header.msg_hdr.msg_iov = vector.as_mut_ptr();
            header.msg_hdr.msg_iovlen = used as _;
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        // SAFETY: the first `count` headers are written, each points to its own
        // iovecs in `pieces`, and those to slices that live for 'a; sendmmsg
        // only reads through them.
        let sent = unsafe {
            libc::sendmmsg(
                self.raw(),
                messages.as_mut_ptr().cast(),
                count as _,
                libc::MSG_DONTWAIT as _,
            )
        };
        check(sent).map(|sent| sent as usize)
    }

    /// Sets a socket option.
    pub(super) fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        // SAFETY: the pointer is to a live value of the length given.
        let result = unsafe {
            libc::setsockopt(
                self.raw(),
                level,
                option,
                (&raw const *value).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        };
        check(result).map(drop)
    }

    pub(super) fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The result of a system call, or its error.
pub(super) fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
