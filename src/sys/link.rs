//! Network interfaces by name: what they are now, and word of changes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::packet::check;

/// The longest interface name.
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// What kind of link an interface is, as far as AoE cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// Ethernet, or what looks like it (veth, tap, bridge, VLAN).
    Ethernet,
    /// The loopback interface.
    Loopback,
    /// Anything else, with the kernel's number for it (ARPHRD_*).
    Other(u16),
}

/// An interface as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it; another one after it was made anew.
    pub index: u32,
    /// The largest payload of a frame, in bytes.
    pub mtu: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// What it is.
    pub kind: LinkKind,
    /// Whether it is up and has a carrier.
    pub running: bool,
}

/// `true` if an interface can have this name.
pub fn is_name(name: &str) -> bool {
    // The kernel cuts what old tools call an alias, "eth0:1", at the colon.
    let is_odd = |b| matches!(b, 0 | b'/' | b':');
    (1..=NAME_MAX).contains(&name.len()) && !name.bytes().any(is_odd)
}

/// Looks an interface up. `Ok(None)` if there is none of that name.
pub fn query(name: &str) -> io::Result<Option<Link>> {
    if !is_name(name) {
        return Ok(None);
    }
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
    // SAFETY: ifreq is numbers and a union of numbers and an address.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let mut ask = |what: libc::c_ulong| {
        // SAFETY: these four requests read the name and write into the union
        // of a live ifreq, no more.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), what as _, &raw mut request) })?;
        io::Result::Ok(request.ifr_ifru)
    };
    let index = match ask(libc::SIOCGIFINDEX) {
        // SAFETY: SIOCGIFINDEX sets this member.
        Ok(answer) => unsafe { answer.ifru_ifindex },
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
        Err(e) => return Err(e),
    };
    // SAFETY: SIOCGIFMTU sets this member.
    let mtu = unsafe { ask(libc::SIOCGIFMTU)?.ifru_mtu };
    // SAFETY: SIOCGIFFLAGS sets this member.
    let flags = unsafe { ask(libc::SIOCGIFFLAGS)?.ifru_flags };
    // SAFETY: SIOCGIFHWADDR sets this member.
    let hardware = unsafe { ask(libc::SIOCGIFHWADDR)?.ifru_hwaddr };
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(hardware.sa_data) {
        *to = from as u8;
    }
    let kind = match hardware.sa_family {
        libc::ARPHRD_ETHER => LinkKind::Ethernet,
        libc::ARPHRD_LOOPBACK => LinkKind::Loopback,
        other => LinkKind::Other(other),
    };
    let ready = libc::IFF_UP | libc::IFF_RUNNING;
    Ok(Some(Link {
        index: index as u32,
        mtu: u32::try_from(mtu).unwrap_or(0),
        mac,
        kind,
        running: i32::from(flags) & ready == ready,
    }))
}

/// A netlink socket that becomes readable when any link changed.
#[derive(Debug)]
pub struct LinkWatch(OwnedFd);

impl LinkWatch {
    /// Hears of link changes of this network namespace from now on.
    pub fn new() -> io::Result<LinkWatch> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let route = SockProtocol::NetlinkRoute;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, route)?;
        bind(
            fd.as_raw_fd(),
            &NetlinkAddr::new(0, libc::RTMGRP_LINK as u32),
        )?;
        Ok(LinkWatch(fd))
    }

    /// Empties the socket. What the messages say is not read: the caller looks
    /// at its links again, which is right too where messages were lost.
    pub fn drain(&self) {
        let mut buffer = [0; 8192];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_known_and_nonsense_is_not() {
        let lo = query("lo").unwrap().unwrap();
        assert_eq!((lo.kind, lo.mac), (LinkKind::Loopback, [0; 6]));
        for name in [
            "",
            "no-such-nic",
            "a-name-longer-than-fifteen",
            "a/b",
            "lo:1",
            "a\0b",
        ] {
            assert_eq!(query(name).unwrap(), None, "{name}");
            assert_eq!(is_name(name), name == "no-such-nic", "{name}");
        }
    }
}
