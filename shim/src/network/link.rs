//! The tap beside an interface.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};

use bulkhead_agent::netlink::{self, Message, Socket};
use libc::{
    IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN_EXCL, IFF_VNET_HDR, IFLA_AF_SPEC, IFLA_IFNAME,
    IFLA_MTU, RTM_DELLINK, RTM_NEWLINK, ifreq,
};
use nix::errno::Errno;

use super::{Error, Interface, TAP_PREFIX};

/// Length of the structure of a message about an interface, `ifinfomsg`.
const IFINFOMSG: usize = 16;

/// An attribute of an interface, of its IPv6 (linux/if_link.h).
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// The kernel makes no address of its own.
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// Makes a tap with `pairs` queues, as long in its packets as the interface, gives the interface its queues, and returns its number.
pub fn add_tap(socket: &mut Socket, interface: &mut Interface, pairs: u16) -> Result<u32, Error> {
    let tap = name(interface.index);
    let failed = |operation| {
        let name = interface.name.clone();
        move |source| Error::Tap {
            name,
            operation,
            source,
        }
    };
    let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    if pairs > 1 {
        flags |= IFF_MULTI_QUEUE;
    }
    let mut taps = Vec::new();
    for pair in 0..pairs {
        // The first queue makes the tap: one that is there is another machine's, of which no queue may be had.
        let flags = if pair == 0 {
            flags | IFF_TUN_EXCL
        } else {
            flags
        };
        let queue = open_queue(&tap, flags).map_err(|errno| match errno {
            Errno::EBUSY => Error::Taken(interface.name.clone()),
            errno => failed("TUNSETIFF")(errno),
        })?;
        taps.push(queue);
    }
    let index = nix::net::if_::if_nametoindex(tap.as_str()).map_err(failed("if_nametoindex"))?;
    // It is a piece of wire: nobody speaks through it for itself.
    let up = libc::IFF_UP as u32;
    let mut body = [0; IFINFOMSG];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&up.to_ne_bytes());
    body[12..].copy_from_slice(&up.to_ne_bytes());
    let message = Message::new(RTM_NEWLINK, 0, &body)
        .with(IFLA_MTU, &interface.mtu.to_ne_bytes())
        .with_nested(IFLA_AF_SPEC, |message| {
            message.with_nested(libc::AF_INET6 as u16, |message| {
                message.with(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
            })
        });
    socket.request(message).map_err(|source| Error::Interface {
        name: interface.name.clone(),
        operation: "set up the tap beside it",
        source,
    })?;
    interface.taps = taps;
    Ok(index)
}

/// Lets packets that are as long as the interface's through the tap beside it.
pub fn set_mtu(socket: &mut Socket, interface: &Interface) -> Result<(), Error> {
    let message = Message::new(RTM_NEWLINK, 0, &[0; IFINFOMSG])
        .with_text(IFLA_IFNAME, &name(interface.index))
        .with(IFLA_MTU, &interface.mtu.to_ne_bytes());
    socket.request(message).map_err(|source| Error::Interface {
        name: interface.name.clone(),
        operation: "set the MTU of the tap beside it",
        source,
    })
}

/// Takes the tap beside an interface away, though it may be open.
pub fn remove_tap(socket: &mut Socket, index: u32) -> Result<(), netlink::Error> {
    let message = Message::new(RTM_DELLINK, 0, &[0; IFINFOMSG]);
    socket.request(message.with_text(IFLA_IFNAME, &name(index)))
}

/// What the tap beside an interface is called.
fn name(index: u32) -> String {
    format!("{TAP_PREFIX}{index}")
}

/// Opens a queue of a tap, which is made if there is none of that name.
fn open_queue(name: &str, flags: i32) -> Result<OwnedFd, Errno> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    // SAFETY: an all-zero request is a valid one.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request takes this structure, which outlives it.
    let made = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(made)?;
    Ok(tun.into())
}
