//! The kernel's word that something in a network namespace has changed. What it is, one looks up.

use std::io;
use std::os::fd::OwnedFd;

use bulkhead_agent::netlink::{attribute, text};
use libc::{IFLA_IFNAME, RT_TABLE_LOCAL, RTM_DELLINK, RTM_DELROUTE, RTM_NEWLINK, RTM_NEWROUTE};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::TAP_PREFIX;
use crate::readiness::register;

/// Those who hear of links, neighbours, and of the addresses and routes of IPv4 and IPv6 (`RTMGRP_*` of linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

/// Length of a message's header, and where it has the message's type.
const HEADER: usize = 16;
const TYPE: usize = 4;

/// Length of `ifinfomsg`.
const IFINFOMSG: usize = 16;

/// Where `rtmsg` has the table.
const RTM_TABLE: usize = 4;

/// Room for a message with all that is looked at.
const BUFFER: usize = 4096;

/// A socket to which the kernel writes of changes in the network namespace of the calling thread.
pub fn open() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    // NETLINK_ROUTE is number 0.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    Ok(socket)
}

/// Such a socket under the eyes of the reactor.
#[derive(Debug)]
pub struct Subscription(AsyncFd<OwnedFd>);

impl Subscription {
    /// Takes a socket over that [`open`] has made. Needs the runtime of tokio.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        register(socket, Interest::READABLE).map(Self)
    }

    /// Waits until something has changed since the last time; many changes at once are one. Dropping the future loses nothing.
    pub async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            if drain(self.0.get_ref())? {
                return Ok(());
            }
            ready.clear_ready();
        }
    }
}

/// Reads all that is there. Tells whether any of it is of interest.
pub fn drain(socket: &OwnedFd) -> io::Result<bool> {
    let mut buffer = [0; BUFFER];
    let mut is_of_interest = false;
    loop {
        match rustix::net::recv(socket, &mut buffer, RecvFlags::empty()) {
            Ok((length, _)) => is_of_interest |= matters(&buffer[..length]),
            // Some was lost, because there was so much.
            Err(Errno::NOBUFS) => is_of_interest = true,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(is_of_interest),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a message is of something that a guest is told of. Of its own taps the shim knows.
pub fn matters(message: &[u8]) -> bool {
    let kind = message.get(TYPE..).and_then(|bytes| bytes.first_chunk());
    let (Some(kind), Some(body)) = (kind, message.get(HEADER..)) else {
        return true;
    };
    match u16::from_ne_bytes(*kind) {
        RTM_NEWLINK | RTM_DELLINK => {
            let name = body
                .get(IFINFOMSG..)
                .and_then(|rest| attribute(rest, IFLA_IFNAME));
            !name.is_some_and(|name| text(name).starts_with(TAP_PREFIX))
        }
        RTM_NEWROUTE | RTM_DELROUTE => body.get(RTM_TABLE) != Some(&RT_TABLE_LOCAL),
        _ => true,
    }
}
