//! The guest's network: the host's, told to the guest's kernel.

use std::fs;
use std::io;
use std::path::Path;

use libc::{
    IFLA_AF_SPEC, IFLA_IFNAME, IFLA_MTU, RTA_IIF, RTA_MULTIPATH, RTA_OIF, RTM_NEWADDR, RTM_NEWLINK,
    RTM_NEWNEIGH, RTM_NEWROUTE,
};
use rustix::io::Errno;

use crate::disk;
use crate::error::{Context, Error};
use crate::netlink::{
    self, Message, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, Socket, attributes, number,
};
use crate::protocol::sandbox::{ChangeNetworkRequest, Interface, SetNetworkRequest};

/// An attribute of an interface, of its IPv6 (linux/if_link.h).
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// The kernel makes no address of its own.
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

/// The number of the loopback interface, on every side.
const LOOPBACK: u32 = 1;

/// Where an address and a neighbour have the number of their interface (`struct ifaddrmsg`, `struct ndmsg`).
const INDEX: usize = 4;

/// Length of `struct rtmsg`.
const RTMSG: usize = 12;
/// Where one of a route's several next hops (`struct rtnexthop`) has its interface, and how long it is at least.
const NEXT_HOP_INDEX: usize = 4;
const NEXT_HOP: usize = 8;

const AF_INET6: u16 = libc::AF_INET6 as u16;

/// The host's number of an interface, and the guest's.
pub type Numbers = (u32, u32);

/// Makes the guest's network what the request says.
///
/// # Errors
///
/// What the guest's kernel refuses is named.
pub fn set(request: &SetNetworkRequest) -> Result<(), Error> {
    let indices: Vec<u32> = request
        .interfaces
        .iter()
        .map(wait_for)
        .collect::<Result<_, _>>()?;
    apply(request, &indices)
}

/// Makes the network of the calling thread's namespace what the request says, whose interfaces have these numbers there.
///
/// # Errors
///
/// What the kernel refuses is named.
pub fn apply(request: &SetNetworkRequest, indices: &[u32]) -> Result<(), Error> {
    let interfaces: Vec<_> = request
        .interfaces
        .iter()
        .zip(indices.iter().copied())
        .collect();
    let known: Vec<_> = numbers(&interfaces).chain([(LOOPBACK, LOOPBACK)]).collect();
    tell(&mut new_socket()?, &interfaces, &request.messages, &known)
}

/// Carries a change of the host's network over.
///
/// # Errors
///
/// The first thing that cannot be done is named, and everything else is done.
pub fn change(request: &ChangeNetworkRequest) -> Result<(), Error> {
    let is_known = |interface: &&Interface| disk::slot(interface.slot).is_ok_and(disk::is_known);
    let (old, fresh): (Vec<_>, Vec<_>) = request.changed.iter().partition(is_known);
    // What is not there any more, a container has put elsewhere.
    let look = |interface| Some((interface, look_for(interface).ok()?));
    let gone: Vec<_> = request.gone.iter().filter_map(look).collect();
    let kept: Vec<_> = request.kept.iter().filter_map(look).collect();
    let mut changed: Vec<_> = old.into_iter().filter_map(look).collect();
    let all = numbers(&gone)
        .chain(numbers(&kept))
        .chain(numbers(&changed));
    let before: Vec<_> = all.chain([(LOOPBACK, LOOPBACK)]).collect();
    let mut result = retract(&request.removed, &before);
    for interface in fresh {
        match wait_for(interface) {
            Ok(index) => changed.push((interface, index)),
            Err(error) => result = result.and(Err(error)),
        }
    }
    let all = numbers(&kept).chain(numbers(&changed));
    let after: Vec<_> = all.chain([(LOOPBACK, LOOPBACK)]).collect();
    let mut socket = new_socket()?;
    result.and(tell(&mut socket, &changed, &request.messages, &after))
}

fn numbers(interfaces: &[(&Interface, u32)]) -> impl Iterator<Item = Numbers> {
    interfaces
        .iter()
        .map(|(interface, index)| (interface.index, *index))
}

fn new_socket() -> Result<Socket, Error> {
    Socket::new().context(|| "setting the network up".into())
}

/// Sets interfaces up, and adds what the host's kernel says of them. All of it is tried.
fn tell(
    socket: &mut Socket,
    interfaces: &[(&Interface, u32)],
    messages: &[Vec<u8>],
    known: &[Numbers],
) -> Result<(), Error> {
    let mut result = Ok(());
    // One may have the name that another one is to get.
    if interfaces.len() > 1 {
        for &(interface, index) in interfaces {
            if socket.name_of(index).as_ref() != Some(&interface.name) {
                let message = link(index, 0, 0).with_text(IFLA_IFNAME, &format!("renamed{index}"));
                let renamed = socket.request(message);
                result = result.and(
                    renamed.context(|| format!("renaming the network interface number {index}")),
                );
            }
        }
    }
    for &(interface, index) in interfaces {
        let set = set_link(socket, interface, index);
        result = result
            .and(set.context(|| format!("setting the network interface {:?} up", interface.name)));
    }
    let mut routes = Vec::new();
    for bytes in messages {
        match for_guest(bytes, known) {
            Ok(route) if route.kind() == RTM_NEWROUTE => routes.push(route),
            Ok(message) => {
                let what = describe(&message);
                let added = unless_exists(socket.request(message));
                result = result.and(added.context(|| format!("adding {what}")));
            }
            Err(error) => result = result.and(Err(error)),
        }
    }
    result.and(add_routes(socket, routes))
}

/// Removes what was added, from the network of the calling thread's namespace, whose interfaces have numbers of their own. What is
/// not there any more is as good as removed.
///
/// # Errors
///
/// The first thing that the kernel refuses is named, and everything else is done.
pub fn retract(messages: &[Vec<u8>], known: &[Numbers]) -> Result<(), Error> {
    let mut socket = new_socket()?;
    let mut result = Ok(());
    for bytes in messages {
        let removed = for_guest(bytes, known).and_then(|mut message| {
            let what = describe(&message);
            // Each type that deletes follows the one that adds.
            message.set_kind(message.kind() + 1);
            message.set_flags(0);
            unless_gone(socket.request(message)).context(|| format!("removing {what}"))
        });
        result = result.and(removed);
    }
    result
}

/// The guest's number of an interface, once its driver is ready.
fn wait_for(interface: &Interface) -> Result<u32, Error> {
    let name = || format!("the network interface {:?}", interface.name);
    disk::wait_for(disk::slot(interface.slot)?, name, read_index)
}

/// The guest's number of an interface that was there before.
fn look_for(interface: &Interface) -> Result<u32, Error> {
    let name = || format!("the network interface {:?}", interface.name);
    let found = disk::look_for(disk::slot(interface.slot)?, read_index).context(name)?;
    found.ok_or_else(|| Error::NotFound(format!("{}: it is not there any more", name())))
}

/// The number of a virtio device's interface.
fn read_index(virtio: &Path) -> io::Result<Option<u32>> {
    let Some(net) = disk::child(&virtio.join("net"), |_| true)? else {
        return Ok(None);
    };
    let text = fs::read_to_string(net.join("ifindex"))?;
    text.trim().parse().map(Some).map_err(io::Error::other)
}

/// Names an interface, sets it up and switches it on or off. Its addresses are those that it is given, and no others.
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
    socket.request(link(index, if interface.up { up } else { 0 }, up))
}

/// A change of an interface: its number (`struct ifinfomsg`), and those of its flags that `mask` has.
fn link(index: u32, flags: u32, mask: u32) -> Message {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..].copy_from_slice(&mask.to_ne_bytes());
    Message::new(RTM_NEWLINK, 0, &body)
}

/// What the host's kernel says, as one says it to the guest's: with the guest's numbers of interfaces, and what is to be done.
fn for_guest(bytes: &[u8], indices: &[Numbers]) -> Result<Message, Error> {
    let mut message = Message::from_bytes(bytes.to_vec()).map_err(invalid)?;
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
        // Beside others to the same destination, which differ in something else.
        RTM_NEWROUTE => NLM_F_CREATE | NLM_F_APPEND,
        // An address that is there already may get a longer life.
        _ => NLM_F_CREATE | NLM_F_REPLACE,
    });
    Ok(message)
}

fn replace_hops(mut hops: &mut [u8], indices: &[Numbers]) -> Result<(), Error> {
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
fn replace(bytes: &mut [u8], offset: usize, indices: &[Numbers]) -> Result<(), Error> {
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

fn unless_gone(result: Result<(), netlink::Error>) -> Result<(), netlink::Error> {
    let gone = [
        Errno::SRCH,
        Errno::NOENT,
        Errno::ADDRNOTAVAIL,
        Errno::NODEV,
        Errno::NETUNREACH,
    ];
    match result {
        Err(error) if error.errno().is_some_and(|errno| gone.contains(&errno)) => Ok(()),
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
