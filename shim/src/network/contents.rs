//! What a network namespace holds, in the kernel's own words, made ready for another kernel.

use std::net::IpAddr;

use bulkhead_agent::netlink::{Message, Socket, attribute, attributes, number, text};
use libc::{
    IFA_ADDRESS, IFA_F_DADFAILED, IFA_F_NODAD, IFA_F_NOPREFIXROUTE, IFA_F_TENTATIVE, IFA_FLAGS,
    IFA_LOCAL, IFLA_ADDRESS, IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MTU,
    IFLA_TXQLEN, RT_TABLE_LOCAL, RTA_MULTIPATH, RTA_OIF, RTM_F_CLONED, RTM_GETADDR, RTM_GETLINK,
    RTM_GETNEIGH, RTM_GETQDISC, RTM_GETROUTE, RTM_NEWADDR, RTM_NEWNEIGH, RTM_NEWROUTE,
};

use super::{Error, Hook, Interface, TAP_PREFIX};

/// Lengths of the structures that the messages begin with: `ifinfomsg`, `ifaddrmsg`, `rtmsg`, `ndmsg`, `tcmsg`.
const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;
const RTMSG: usize = 12;
const NDMSG: usize = 12;
const TCMSG: usize = 20;

/// Where `ifinfomsg`, `ifaddrmsg`, `ndmsg` and `tcmsg` have the number of the interface.
const INDEX: usize = 4;

/// An attribute of an ipvlan (linux/if_link.h): how it gets at its packets, as a number of 16 bits.
const IFLA_IPVLAN_MODE: u16 = 1;
/// Above the interface on which it sits, so that nothing ever comes in at the ipvlan itself.
const IPVLAN_MODE_L3S: [u8; 2] = 2u16.to_ne_bytes();

/// The number of the loopback interface, in every namespace.
const LOOPBACK: u32 = 1;

/// The kinds of interfaces that a guest can have.
const KINDS: [&str; 4] = ["veth", "macvlan", "ipvlan", "tun"];

/// A neighbour that somebody has entered, in the eight bits of `ndmsg`.
const NUD_PERMANENT: u8 = libc::NUD_PERMANENT as u8;

/// An attribute of a route (linux/rtnetlink.h): the next hop, as a thing of its own.
const RTA_NH_ID: u16 = 30;
/// The kinds of routes that do not come with addresses: unicast, blackhole, unreachable, prohibit, throw.
const ROUTE_KINDS: [u8; 5] = [1, 6, 7, 8, 9];
/// What of a route's flags is its own and not what has become of it.
const RTNH_F_ONLINK: u32 = 4;
/// Length of one of several next hops (`struct rtnexthop`), and where its flags and its interface are.
const NEXT_HOP: usize = 8;
const NEXT_HOP_FLAGS: usize = 2;

/// The parent of an ingress queueing discipline.
const TC_H_INGRESS: u32 = 0xffff_fff1;

const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;

/// What is there.
#[derive(Debug)]
pub struct Contents {
    pub interfaces: Vec<Interface>,
    /// Why others that take part in the network are not among them.
    pub refused: Vec<Error>,
    /// All addresses, neighbours and routes.
    said: Vec<Message>,
    /// The interfaces that have an ingress queueing discipline.
    pub qdiscs: Vec<u32>,
}

impl Contents {
    /// Reads everything.
    pub fn read(socket: &mut Socket) -> Result<Self, Error> {
        let mut dump = |what, kind, length: usize| {
            socket
                .dump(&Message::new(kind, 0, &[0; IFINFOMSG + TCMSG][..length]))
                .map_err(|source| Error::Read { what, source })
        };
        let links = dump("the interfaces", RTM_GETLINK, IFINFOMSG)?;
        let mut said = dump("the addresses", RTM_GETADDR, IFADDRMSG)?;
        let (mut interfaces, mut refused) = (Vec::new(), Vec::new());
        for link in &links {
            match interface(link.body(), &said) {
                Ok(found) => interfaces.extend(found),
                Err(error @ Error::Kind { .. }) => refused.push(error),
                Err(error) => return Err(error),
            }
        }
        let mut qdiscs = Vec::new();
        if !interfaces.is_empty() {
            said.extend(dump("the neighbours", RTM_GETNEIGH, NDMSG)?);
            said.extend(dump("the routes", RTM_GETROUTE, RTMSG)?);
            let all = dump("the queueing disciplines", RTM_GETQDISC, TCMSG)?;
            let is_ingress = |message: &&Message| number(message.body(), 12) == Some(TC_H_INGRESS);
            qdiscs.extend(all.iter().filter(is_ingress).map(index));
        }
        Ok(Self {
            interfaces,
            refused,
            said,
            qdiscs,
        })
    }

    /// What a guest that has certain interfaces is to be told: addresses, neighbours and routes.
    pub fn messages(&self, has: impl Fn(u32) -> bool) -> Vec<Message> {
        let known = |index: u32| index == LOOPBACK || has(index);
        let of_known = |message: &Message| known(index(message));
        let for_guest = |message: &Message| match message.kind() {
            RTM_NEWADDR => address_for_guest(message.clone()).filter(of_known),
            RTM_NEWNEIGH => Some(message.clone()).filter(|m| is_permanent(m) && of_known(m)),
            _ => route_for_guest(message, known),
        };
        self.said.iter().filter_map(for_guest).collect()
    }

    /// What will be changed at one of the interfaces.
    pub fn hook(&self, interface: &Interface) -> Hook {
        Hook {
            index: interface.index,
            had_qdisc: self.qdiscs.contains(&interface.index),
            queue_length: interface.queue_length,
        }
    }
}

fn index(message: &Message) -> u32 {
    number(message.body(), INDEX).unwrap_or_default()
}

/// An interface that is to go into the guest; `None` for one that is there by itself and takes no part.
fn interface(body: &[u8], addresses: &[Message]) -> Result<Option<Interface>, Error> {
    let (Some(hardware), Some(index), Some(flags), Some(rest)) = (
        body.get(2..4),
        number(body, INDEX),
        number(body, 8),
        body.get(IFINFOMSG..),
    ) else {
        return Err(Error::Description("an interface"));
    };
    let name = attribute(rest, IFLA_IFNAME).map(text).unwrap_or_default();
    if index == LOOPBACK || name.starts_with(TAP_PREFIX) {
        return Ok(None);
    }
    let info = attribute(rest, IFLA_LINKINFO).unwrap_or_default();
    let kind = attribute(info, IFLA_INFO_KIND);
    let mut kind = kind.map(text).unwrap_or_else(|| "physical".into());
    let mode = attribute(info, IFLA_INFO_DATA).and_then(|data| attribute(data, IFLA_IPVLAN_MODE));
    if kind == "ipvlan" && mode == Some(&IPVLAN_MODE_L3S) {
        kind += " in mode l3s";
    }
    let up = flags & libc::IFF_UP as u32 != 0;
    let own: Vec<IpAddr> = addresses
        .iter()
        .filter(|message| self::index(message) == index)
        .filter_map(address)
        .collect();
    let hardware = u16::from_ne_bytes([hardware[0], hardware[1]]);
    let mac = attribute(rest, IFLA_ADDRESS).and_then(|mac| <[u8; 6]>::try_from(mac).ok());
    let ethernet = mac.filter(|_| hardware == libc::ARPHRD_ETHER);
    let Some(mac) = ethernet.filter(|_| KINDS.contains(&kind.as_str())) else {
        // Tunnels' modules put one of theirs into each namespace, which nobody uses.
        if !up && own.is_empty() {
            return Ok(None);
        }
        return Err(Error::Kind { name, kind });
    };
    let mtu = attribute(rest, IFLA_MTU).and_then(|mtu| number(mtu, 0));
    let queue_length = attribute(rest, IFLA_TXQLEN).and_then(|length| number(length, 0));
    Ok(Some(Interface {
        index,
        name,
        mac,
        mtu: mtu.ok_or(Error::Description("an interface's MTU"))?,
        queue_length: queue_length.ok_or(Error::Description("an interface's queue"))?,
        up,
        carrier: !up || flags & libc::IFF_LOWER_UP as u32 != 0,
        arp: flags & libc::IFF_NOARP as u32 == 0,
        addresses: own,
        taps: Vec::new(),
    }))
}

/// The address that a message is about: the own one, not a peer's.
fn address(message: &Message) -> Option<IpAddr> {
    let rest = message.body().get(IFADDRMSG..)?;
    let value = attribute(rest, IFA_LOCAL).or_else(|| attribute(rest, IFA_ADDRESS))?;
    match value.len() {
        4 => Some(<[u8; 4]>::try_from(value).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(value).ok()?.into()),
        _ => None,
    }
}

/// An address as the guest is to have it; none that every loopback interface has.
fn address_for_guest(mut message: Message) -> Option<Message> {
    let family = *message.body().first()?;
    if message.kind() != RTM_NEWADDR || ![AF_INET, AF_INET6].contains(&family) {
        return None;
    }
    if index(&message) == LOOPBACK && address(&message)?.is_loopback() {
        return None;
    }
    let body = message.body_mut();
    let (_, value) = attributes(&body[IFADDRMSG..]).find(|(kind, _)| *kind == IFA_FLAGS)?;
    let flags = &mut body[IFADDRMSG + value.start..IFADDRMSG + value.end];
    let mut all = number(flags, 0)?;
    all &= !(IFA_F_TENTATIVE | IFA_F_DADFAILED);
    // Nobody else is looked for who has it, as whoever gave it out has; and its network's route comes by itself.
    all |= IFA_F_NODAD | IFA_F_NOPREFIXROUTE;
    flags.copy_from_slice(&all.to_ne_bytes());
    // The first eight of them are here, too.
    body[2] = all as u8;
    Some(message)
}

fn is_permanent(message: &Message) -> bool {
    let body = message.body();
    message.kind() == RTM_NEWNEIGH
        && matches!(body.first(), Some(&(AF_INET | AF_INET6)))
        && body.get(8).is_some_and(|state| state & NUD_PERMANENT != 0)
}

/// A route as the guest is to have it; none that comes with an address, that the kernel only remembers, or that leads to an interface that the guest does not have.
fn route_for_guest(message: &Message, known: impl Fn(u32) -> bool) -> Option<Message> {
    let mut head: [u8; RTMSG] = *message.body().first_chunk()?;
    let flags = number(&head, 8)?;
    if message.kind() != RTM_NEWROUTE
        || ![AF_INET, AF_INET6].contains(&head[0])
        || head[4] == RT_TABLE_LOCAL
        || !ROUTE_KINDS.contains(&head[7])
        || flags & RTM_F_CLONED != 0
    {
        return None;
    }
    head[8..].copy_from_slice(&(flags & RTNH_F_ONLINK).to_ne_bytes());
    let rest = &message.body()[RTMSG..];
    let mut route = Message::new(RTM_NEWROUTE, 0, &head);
    for (kind, value) in attributes(rest) {
        let value = &rest[value];
        match kind {
            // What it names is a thing of the host's, but all that it says stands beside it.
            RTA_NH_ID => {}
            RTA_OIF if !known(number(value, 0)?) => return None,
            RTA_MULTIPATH => route = route.with(kind, &next_hops(value, &known)?),
            _ => route = route.with(kind, value),
        }
    }
    Some(route)
}

/// Several next hops, with their own flags only.
fn next_hops(hops: &[u8], known: impl Fn(u32) -> bool) -> Option<Vec<u8>> {
    let mut all = hops.to_vec();
    let mut rest = &mut all[..];
    while rest.len() >= NEXT_HOP {
        if !known(number(rest, INDEX)?) {
            return None;
        }
        rest[NEXT_HOP_FLAGS] &= RTNH_F_ONLINK as u8;
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]])).max(NEXT_HOP);
        rest = rest
            .get_mut(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says of an ipvlan.
    fn ipvlan(mode: u16) -> Message {
        let mut body = [0; IFINFOMSG];
        body[2..4].copy_from_slice(&libc::ARPHRD_ETHER.to_ne_bytes());
        body[INDEX..8].copy_from_slice(&7u32.to_ne_bytes());
        body[8..12].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
        Message::new(16, 0, &body)
            .with_text(IFLA_IFNAME, "net1")
            .with(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1])
            .with(IFLA_MTU, &1500u32.to_ne_bytes())
            .with(IFLA_TXQLEN, &1000u32.to_ne_bytes())
            .with_nested(IFLA_LINKINFO, |message| {
                message
                    .with_text(IFLA_INFO_KIND, "ipvlan")
                    .with_nested(IFLA_INFO_DATA, |message| {
                        message.with(IFLA_IPVLAN_MODE, &mode.to_ne_bytes())
                    })
            })
    }

    #[test]
    fn an_ipvlan_must_see_its_packets() {
        for mode in [0, 1] {
            let found = interface(ipvlan(mode).body(), &[]).unwrap().unwrap();
            assert_eq!((found.index, found.queue_length), (7, 1000));
        }
        let error = interface(ipvlan(2).body(), &[]).unwrap_err().to_string();
        assert!(error.contains("\"ipvlan in mode l3s\""), "{error}");
    }
}
