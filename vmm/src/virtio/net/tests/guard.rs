//! What a guest may send.

use std::net::IpAddr;

use crate::virtio::net::guard::{Guard, LOOKED_AT};

use super::*;

const IPV4: &str = "10.1.2.3";
const IPV6: &str = "fd00::12";
const LINK_LOCAL: &str = "fe80::ff:fe00:7";
const ROUTER: &str = "fe80::1";

fn guard() -> Guard {
    let addresses = [IPV4, IPV6].map(|address| address.parse().unwrap());
    Guard::new(MAC, &Sources::Addresses(addresses.to_vec()))
}

fn ethernet(source: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [[0xff; 6], source].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

fn bytes(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn ipv4(source: &str) -> Vec<u8> {
    let mut packet = vec![0x45; 12];
    packet.extend(bytes(source));
    packet.extend([8; 24]);
    ethernet(MAC, 0x0800, &packet)
}

fn ipv6(source: &str, hop_limit: u8, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, hop_limit];
    packet.extend(bytes(source));
    packet.extend([1; 16]);
    packet.extend(payload);
    let mut frame = ethernet(MAC, 0x86dd, &packet);
    frame.truncate(LOOKED_AT);
    frame
}

fn arp(sender_mac: [u8; 6], sender: &str) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 2];
    packet.extend(sender_mac);
    packet.extend(bytes(sender));
    packet.extend([9; 10]);
    ethernet(MAC, 0x0806, &packet)
}

fn icmp(kind: u8, target: &str) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(bytes(target));
    message
}

/// An extension header of `units` times 8 bytes before something else.
fn extended(next: u8, units: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![next, units - 1];
    bytes.resize(usize::from(units) * 8, 0);
    bytes.extend(payload);
    bytes
}

#[test]
fn a_guest_speaks_for_itself() {
    let guard = guard();
    for frame in [
        ipv4(IPV4),
        ipv4("0.0.0.0"),
        arp(MAC, IPV4),
        arp(MAC, "0.0.0.0"),
        ipv6(IPV6, 64, 6, &[]),
        ipv6(LINK_LOCAL, 1, 58, &icmp(128, ROUTER)),
        ipv6("::", 255, 58, &icmp(135, IPV6)),
        ipv6(IPV6, 255, 58, &icmp(136, IPV6)),
        ipv6(IPV6, 255, 58, &icmp(136, LINK_LOCAL)),
        ipv6(LINK_LOCAL, 255, 58, &icmp(133, "::")),
        ipv6(LINK_LOCAL, 1, 0, &extended(58, 1, &icmp(143, "::"))),
        ipv6(LINK_LOCAL, 255, 17, &[]),
        ipv6(IPV6, 255, 44, &extended(17, 1, &[])),
        ipv6(IPV6, 255, 0, &extended(58, 1, &icmp(136, IPV6))),
    ] {
        assert!(guard.permits(&frame), "{frame:x?}");
    }
}

#[test]
fn a_guest_speaks_for_nobody_else() {
    let guard = guard();
    let mut other_mac = ipv4(IPV4);
    other_mac[6..12].copy_from_slice(&OTHER_MAC);
    let mut other_arp = arp(MAC, IPV4);
    other_arp[14] = 1;
    for frame in [
        other_mac,
        ipv4("10.1.2.4"),
        ipv4("255.255.255.255"),
        arp(MAC, "10.1.2.1"),
        arp(OTHER_MAC, IPV4),
        other_arp,
        ipv6("fd00::13", 64, 6, &[]),
        ipv6(ROUTER, 64, 6, &[]),
        // Advertisements for others, plainly and behind other headers.
        ipv6(LINK_LOCAL, 255, 58, &icmp(134, "::")),
        ipv6(LINK_LOCAL, 255, 58, &icmp(137, IPV6)),
        ipv6(IPV6, 255, 58, &icmp(136, ROUTER)),
        ipv6(IPV6, 255, 58, &icmp(136, "fd00::13")[..23]),
        ipv6(IPV6, 255, 58, &[]),
        ipv6(IPV6, 255, 60, &extended(58, 1, &icmp(136, ROUTER))),
        ipv6(
            IPV6,
            255,
            0,
            &extended(43, 2, &extended(58, 1, &icmp(134, "::"))),
        ),
        // Where it cannot be seen.
        ipv6(IPV6, 255, 60, &extended(58, 10, &icmp(136, IPV6))),
        ipv6(IPV6, 255, 60, &[]),
        ipv6(IPV6, 255, 44, &extended(58, 1, &icmp(136, IPV6))),
        ipv6(IPV6, 255, 44, &extended(60, 1, &[])),
        ipv6(IPV6, 255, 44, &[]),
        // Neither IP nor ARP: VLAN tags, spanning tree, reverse ARP.
        ethernet(MAC, 0x8100, &[0, 1, 8, 0]),
        ethernet(MAC, 0x0026, &[0x42, 0x42, 3]),
        ethernet(MAC, 0x8035, &arp(MAC, IPV4)[14..]),
    ] {
        assert!(!guard.permits(&frame), "{frame:x?}");
    }
    // Nothing that is cut off before its source.
    for whole in [ipv4(IPV4), arp(MAC, IPV4), ipv6(IPV6, 64, 6, &[])] {
        let end = if whole[12] == 0x86 { 38 } else { 30 };
        for length in 0..end {
            let permitted = guard.permits(&whole[..length]);
            assert!(!permitted || whole[13] == 6 && length >= 32, "{length}");
        }
    }
}

#[test]
fn less_is_looked_at_when_less_is_asked() {
    let mac = Guard::new(MAC, &Sources::Mac);
    assert!(mac.permits(&ipv4("10.1.2.4")));
    assert!(mac.permits(&ethernet(MAC, 0x8100, &[])));
    assert!(!mac.permits(&ethernet(OTHER_MAC, 0x0800, &[0; 40])));
    assert!(!mac.permits(&[0; 11]));
    let any = Guard::new(MAC, &Sources::Any);
    assert!(any.permits(&ethernet(OTHER_MAC, 0x0800, &[0; 40])));
    assert!(any.permits(&[]));
}

#[test]
fn the_device_drops_and_counts_what_is_not_permitted() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    let with_header = |frame: Vec<u8>| [vec![0; HEADER], frame].concat();
    let (own, other) = (with_header(ipv4(IPV4)), with_header(ipv4("10.1.2.4")));
    rig.send(&frame(OTHER_MAC, 60, 1), &[HEADER]);
    assert_eq!((sent(&host), net.dropped().spoofed), (None, 1));
    rig.send(&other, &[]);
    assert_eq!(sent(&host).unwrap(), other);

    net.update(true, &Sources::Addresses(vec![IPV4.parse().unwrap()]));
    rig.send(&other, &[3, 20, 9]);
    assert_eq!((sent(&host), net.dropped().spoofed), (None, 2));
    rig.send(&own, &[3, 20, 9]);
    assert_eq!(sent(&host).unwrap(), own);

    net.update(true, &Sources::Any);
    let bytes = frame(OTHER_MAC, 60, 1);
    rig.send(&bytes, &[]);
    assert_eq!(sent(&host).unwrap(), bytes);
    assert_eq!(net.dropped().spoofed, 2);
}
