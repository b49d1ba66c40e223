//! The guest's network: the host's, told to the guest's kernel.

use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use crate::disk;
use crate::error::{Context, Error};
use crate::netlink::{
    self, Message, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Socket, attributes,
    number,
};
use crate::protocol::sandbox::{Interface, SetNetworkRequest};

// Types of messages (linux/rtnetlink.h).
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;

// Attributes of an interface (linux/if_link.h).
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// The kernel makes no address of its own.
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// The number of the loopback interface, on every side.
const LOOPBACK: u32 = 1;

/// Where an address and a neighbour have the number of their interface (`struct ifaddrmsg`, `struct ndmsg`).
const INDEX: usize = 4;

/// Length of `struct rtmsg`, and the attributes of a route that hold numbers of interfaces.
const RTMSG: usize = 12;
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
/// Where one of a route's several next hops (`struct rtnexthop`) has its interface, and how long it is at least.
const NEXT_HOP_INDEX: usize = 4;
const NEXT_HOP: usize = 8;

const AF_INET6: u16 = libc::AF_INET6 as u16;

/// Makes the guest's network what the request says.
///
/// # Errors
///
/// What the guest's kernel refuses is named.
pub fn set(request: &SetNetworkRequest) -> Result<(), Error> {
    let indices: Vec<u32> = request
        .interfaces
        .iter()
        .map(find)
        .collect::<Result<_, _>>()?;
    apply(request, &indices)
}

/// Makes the network of the calling thread's namespace what the request says, whose interfaces have these numbers there.
///
/// # Errors
///
/// What the kernel refuses is named.
pub fn apply(request: &SetNetworkRequest, indices: &[u32]) -> Result<(), Error> {
    let mut socket = Socket::new().context(|| "setting the network up".into())?;
    let known: Vec<(u32, u32)> = request
        .interfaces
        .iter()
        .map(|interface| interface.index)
        .zip(indices.iter().copied())
        .chain([(LOOPBACK, LOOPBACK)])
        .collect();
    // One may have the name that another one is to get.
    if indices.len() > 1 {
        for &index in indices {
            let message = link(index, 0, 0).with_text(IFLA_IFNAME, &format!("renamed{index}"));
            socket
                .request(message)
                .context(|| format!("renaming the network interface number {index}"))?;
        }
    }
    for (interface, &index) in request.interfaces.iter().zip(indices) {
        set_link(&mut socket, interface, index)
            .context(|| format!("setting the network interface {:?} up", interface.name))?;
    }
    let mut routes = Vec::new();
    for bytes in &request.messages {
        let mut message = Message::from_bytes(bytes.clone()).map_err(invalid)?;
        renumber(&mut message, &known)?;
        if message.kind() == RTM_NEWROUTE {
            routes.push(message);
            continue;
        }
        let what = describe(&message);
        unless_exists(socket.request(message)).context(|| format!("adding {what}"))?;
    }
    add_routes(&mut socket, routes)
}

/// The guest's number of an interface, once its driver is ready.
fn find(interface: &Interface) -> Result<u32, Error> {
    let name = || format!("the network interface {:?}", interface.name);
    let slot = u8::try_from(interface.slot).ok().filter(|&slot| slot < 32);
    let slot = slot.ok_or_else(|| invalid(format!("no PCI slot {}", interface.slot)))?;
    disk::wait_for(slot, name, |virtio| {
        match disk::child(&virtio.join("net"), |_| true)? {
            Some(net) => read_index(&net).map(Some),
            None => Ok(None),
        }
    })
}

fn read_index(net: &Path) -> io::Result<u32> {
    let text = fs::read_to_string(net.join("ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}

/// Names an interface, sets it up and switches it on. Its addresses are those that it is given, and no others.
fn set_link(socket: &mut Socket, interface: &Interface, index: u32) -> Result<(), netlink::Error> {
    let (up, no_arp) = (libc::IFF_UP as u32, libc::IFF_NOARP as u32);
    let flags = if interface.arp { 0 } else { no_arp };
    let message = link(index, flags, no_arp)
        .with_text(IFLA_IFNAME, &interface.name)
        .with(IFLA_MTU, &interface.mtu.to_ne_bytes())
        .with_nested(IFLA_AF_SPEC, |message| {
            message.with_nested(AF_INET6, |message| {
                message.with(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
            })
        });
    socket.request(message)?;
    if interface.up {
        socket.request(link(index, up, up))?;
    }
    Ok(())
}

/// A change of an interface: its number (`struct ifinfomsg`), and those of its flags that `mask` has.
fn link(index: u32, flags: u32, mask: u32) -> Message {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..].copy_from_slice(&mask.to_ne_bytes());
    Message::new(RTM_NEWLINK, 0, &body)
}

/// Makes a message one for the guest's kernel: with the guest's numbers of interfaces, and what is to be done.
fn renumber(message: &mut Message, indices: &[(u32, u32)]) -> Result<(), Error> {
    let kind = message.kind();
    let body = message.body_mut();
    match kind {
        RTM_NEWADDR | RTM_NEWNEIGH => replace(body, INDEX, indices)?,
        RTM_NEWROUTE => {
            let found: Vec<_> = body.get(RTMSG..).map_or(Vec::new(), |bytes| {
                attributes(bytes)
                    .map(|(kind, value)| (kind, value.start + RTMSG..value.end + RTMSG))
                    .collect()
            });
            for (kind, value) in found {
                match kind {
                    RTA_IIF | RTA_OIF => replace(body, value.start, indices)?,
                    RTA_MULTIPATH => replace_hops(&mut body[value], indices)?,
                    _ => {}
                }
            }
        }
        kind => return Err(invalid(format!("a message of type {kind}"))),
    }
    message.set_flags(match kind {
        RTM_NEWNEIGH => NLM_F_CREATE | NLM_F_REPLACE,
        // Beside others to the same destination, which differ in something else.
        RTM_NEWROUTE => NLM_F_CREATE | NLM_F_APPEND,
        _ => NLM_F_CREATE | NLM_F_EXCL,
    });
    Ok(())
}

fn replace_hops(mut hops: &mut [u8], indices: &[(u32, u32)]) -> Result<(), Error> {
    while hops.len() >= NEXT_HOP {
        let length = usize::from(u16::from_ne_bytes([hops[0], hops[1]])).max(NEXT_HOP);
        replace(hops, NEXT_HOP_INDEX, indices)?;
        hops = hops
            .get_mut(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Ok(())
}

/// Puts the guest's number of an interface in place of the host's.
fn replace(bytes: &mut [u8], offset: usize, indices: &[(u32, u32)]) -> Result<(), Error> {
    let host = number(bytes, offset).ok_or_else(|| invalid("a message that is cut off"))?;
    let guest = indices.iter().find(|(known, _)| *known == host);
    let (_, guest) = guest.ok_or_else(|| invalid(format!("no interface has the number {host}")))?;
    bytes[offset..offset + 4].copy_from_slice(&guest.to_ne_bytes());
    Ok(())
}

/// Adds routes in any order: one may be needed before another's gateway can be reached.
fn add_routes(socket: &mut Socket, mut routes: Vec<Message>) -> Result<(), Error> {
    while !routes.is_empty() {
        let before = routes.len();
        let mut failed = Vec::new();
        let mut first = None;
        for route in routes {
            if let Err(error) = unless_exists(socket.request(route.clone())) {
                first.get_or_insert((describe(&route), error));
                failed.push(route);
            }
        }
        match first {
            Some((what, error)) if failed.len() == before => {
                return Err(error).context(|| format!("adding {what}"));
            }
            _ => routes = failed,
        }
    }
    Ok(())
}

fn unless_exists(result: Result<(), netlink::Error>) -> Result<(), netlink::Error> {
    match result {
        Err(error) if error.errno() == Some(Errno::EXIST) => Ok(()),
        result => result,
    }
}

/// What a message is about, for people: kind and address.
fn describe(message: &Message) -> String {
    let (kind, length, at) = match message.kind() {
        RTM_NEWADDR => ("the address", 8, 1),
        RTM_NEWNEIGH => ("the neighbour", 12, 1),
        _ => ("the route to", RTMSG, 1),
    };
    let body = message.body();
    let prefix = match message.kind() {
        RTM_NEWNEIGH => String::new(),
        _ => body.get(1).map_or(String::new(), |bits| format!("/{bits}")),
    };
    // Address, destination and destination are all attribute 1 of theirs.
    let value = body
        .get(length..)
        .and_then(|bytes| netlink::attribute(bytes, at));
    let address = match value {
        Some([a, b, c, d]) => format!("{a}.{b}.{c}.{d}"),
        Some(value) => <[u8; 16]>::try_from(value).map_or("?".into(), |octets| {
            std::net::Ipv6Addr::from(octets).to_string()
        }),
        None => "everything".into(),
    };
    format!("{kind} {address}{prefix}")
}

fn invalid(problem: impl std::fmt::Display) -> Error {
    Error::InvalidArgument(format!("setting the network up: {problem}"))
}
