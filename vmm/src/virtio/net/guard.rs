//! What a guest may send: frames from its own addresses, and nobody else's.
//!
//! What is looked at must be what is sent, so it is a copy of the frame's first bytes that the guest cannot change any more.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::control::Sources;

/// How many of a frame's first bytes decide. They hold the Ethernet header, an IPv6 header, and in all but strange cases what
/// is before a neighbour advertisement, and its target.
pub const LOOKED_AT: usize = 128;

/// The Ethernet header: destination, source, type.
const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// What an ARP packet for IPv4 over Ethernet starts with: hardware and protocol type, and the lengths of their addresses.
const ARP_FOR_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// Length of the IPv6 header.
const IPV6: usize = 40;
/// Extension headers with a length, which may come before what counts (RFC 8200, section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
const ICMPV6: u8 = 58;
/// What RFC 4861 has all receivers of these messages check: no router has forwarded them.
const NEIGHBOUR_HOP_LIMIT: u8 = 255;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// The addresses of a guest.
#[derive(Debug)]
pub struct Guard {
    mac: Option<[u8; 6]>,
    addresses: Option<Addresses>,
}

#[derive(Debug)]
struct Addresses {
    ipv4: Vec<Ipv4Addr>,
    ipv6: Vec<Ipv6Addr>,
}

impl Guard {
    /// What a guest with this hardware address may send.
    pub fn new(mac: [u8; 6], sources: &Sources) -> Self {
        let addresses = match sources {
            Sources::Any => {
                return Self {
                    mac: None,
                    addresses: None,
                };
            }
            Sources::Mac => None,
            Sources::Addresses(addresses) => {
                let mut ipv4 = vec![Ipv4Addr::UNSPECIFIED];
                let mut ipv6 = vec![Ipv6Addr::UNSPECIFIED, link_local(mac)];
                for address in addresses {
                    match address {
                        IpAddr::V4(address) => ipv4.push(*address),
                        IpAddr::V6(address) => ipv6.push(*address),
                    }
                }
                Some(Addresses { ipv4, ipv6 })
            }
        };
        Self {
            mac: Some(mac),
            addresses,
        }
    }

    /// Whether a frame may be sent that starts with these bytes: the first [`LOOKED_AT`] of them, or all.
    pub fn permits(&self, frame: &[u8]) -> bool {
        let Some(mac) = self.mac else { return true };
        if array(frame, 6) != Some(mac) {
            return false;
        }
        let Some(addresses) = &self.addresses else {
            return true;
        };
        let Some(payload) = frame.get(ETHERNET..) else {
            return false;
        };
        match array(frame, 12).map(u16::from_be_bytes) {
            Some(ETHERTYPE_IPV4) => {
                array(payload, 12).is_some_and(|source| addresses.has_ipv4(source))
            }
            Some(ETHERTYPE_IPV6) => addresses.permit_ipv6(payload),
            Some(ETHERTYPE_ARP) => {
                payload.starts_with(&ARP_FOR_IPV4)
                    && array(payload, 8) == Some(mac)
                    && array(payload, 14).is_some_and(|sender| addresses.has_ipv4(sender))
            }
            _ => false,
        }
    }
}

impl Addresses {
    fn has_ipv4(&self, address: [u8; 4]) -> bool {
        self.ipv4.contains(&address.into())
    }

    fn has_ipv6(&self, address: [u8; 16]) -> bool {
        self.ipv6.contains(&address.into())
    }

    fn permit_ipv6(&self, packet: &[u8]) -> bool {
        array(packet, 8).is_some_and(|source| self.has_ipv6(source))
            && match packet.get(7) {
                Some(&NEIGHBOUR_HOP_LIMIT) => self.permit_neighbour_message(packet),
                hop_limit => hop_limit.is_some(),
            }
    }

    /// An IPv6 packet that its receivers would believe as a message of neighbour discovery, if it is one. Where that cannot
    /// be seen, it is taken for one that tells lies.
    fn permit_neighbour_message(&self, packet: &[u8]) -> bool {
        let Some(&(mut next)) = packet.get(6) else {
            return false;
        };
        let mut offset = IPV6;
        while matches!(next, HOP_BY_HOP | ROUTING | DESTINATION) {
            let Some([following, length]) = array(packet, offset) else {
                return false;
            };
            next = following;
            offset += (usize::from(length) + 1) * 8;
        }
        match (next, packet.get(offset)) {
            (ICMPV6, Some(&NEIGHBOUR_ADVERTISEMENT)) => {
                array(packet, offset + 8).is_some_and(|target| self.has_ipv6(target))
            }
            (ICMPV6, Some(&(ROUTER_ADVERTISEMENT | REDIRECT))) => false,
            // RFC 6980 has receivers ignore such messages in fragments. Not all do.
            (FRAGMENT, Some(&(ICMPV6 | HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION))) => false,
            (ICMPV6 | FRAGMENT, None) => false,
            _ => true,
        }
    }
}

/// The link-local address that a host makes of its hardware address (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

/// `N` bytes at an offset, if there are as many.
fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}
