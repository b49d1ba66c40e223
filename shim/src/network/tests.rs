//! With the kernel's own network, in namespaces of the tests' own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use bulkhead_agent::netlink::{NLM_F_CREATE, NLM_F_EXCL, attributes};
use bulkhead_agent::network::apply;
use bulkhead_agent::protocol::sandbox::{self, SetNetworkRequest};
use libc::{IFA_CACHEINFO, NDA_CACHEINFO, NDA_PROBES, RTA_CACHEINFO};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use super::*;
use crate::testing::alone;

mod changes;

const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;
const UP: u32 = libc::IFF_UP as u32;
/// Length of the header before each frame of a tap, as the kernel has it at first.
const HEADER: usize = 10;

/// Moves the calling thread, which is the test's own, into a new network namespace.
fn new_namespace() -> Socket {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let mut socket = Socket::new().unwrap();
    socket.request(link(1, UP)).unwrap();
    socket
}

fn here() -> OwnedFd {
    File::open("/proc/thread-self/ns/net").unwrap().into()
}

fn number_of(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
}

fn ifinfomsg(index: u32, flags: u32) -> [u8; 16] {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..].copy_from_slice(&flags.to_ne_bytes());
    body
}

fn link(index: u32, flags: u32) -> Message {
    Message::new(16, 0, &ifinfomsg(index, flags))
}

/// A pair of interfaces.
fn add_veth_down(socket: &mut Socket, name: &str, peer: &str) {
    let message = Message::new(16, NEW, &ifinfomsg(0, 0))
        .with_text(3, name)
        .with_nested(18, |message| {
            message.with_text(1, "veth").with_nested(2, |message| {
                let peer = Message::new(0, 0, &ifinfomsg(0, 0)).with_text(3, peer);
                message.with(1, peer.body())
            })
        });
    socket.request(message).unwrap();
}

/// A pair of interfaces, both up, without the addresses that the kernel gives when it comes to it.
fn add_veth(socket: &mut Socket, name: &str, peer: &str) {
    add_veth_down(socket, name, peer);
    for end in [name, peer] {
        let index = number_of(end);
        let no_addresses = link(index, 0).with_nested(26, |message| {
            message.with_nested(libc::AF_INET6 as u16, |message| message.with(8, &[1]))
        });
        socket.request(no_addresses).unwrap();
        socket.request(link(index, UP)).unwrap();
    }
}

fn add_address(socket: &mut Socket, index: u32, address: IpAddr, bits: u8) {
    let (family, bytes) = octets(address);
    let mut body = vec![family, bits, 0, 0];
    body.extend(index.to_ne_bytes());
    let message = Message::new(20, NEW, &body).with(2, &bytes).with(1, &bytes);
    socket.request(message).unwrap();
}

fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (libc::AF_INET as u8, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6 as u8, address.octets().to_vec()),
    }
}

/// A static route with its attributes.
fn add_route(
    socket: &mut Socket,
    to: &str,
    kind: u8,
    flags: u32,
    attributes: impl FnOnce(Message) -> Message,
) {
    let (address, bits) = to.split_once('/').unwrap();
    let (family, bytes) = octets(address.parse().unwrap());
    let mut body = vec![family, bits.parse().unwrap(), 0, 0, 254, 4, 0, kind];
    body.extend(flags.to_ne_bytes());
    let mut message = Message::new(24, NEW, &body);
    if bits != "0" {
        message = message.with(1, &bytes);
    }
    socket.request(attributes(message)).unwrap();
}

fn gateway(address: &str) -> Vec<u8> {
    octets(address.parse().unwrap()).1
}

/// Everything that the kernel says, without what only time has to do with.
fn said(messages: &[Message]) -> Vec<String> {
    let mut said: Vec<_> = messages
        .iter()
        .map(|message| {
            let (length, skip): (_, &[u16]) = match message.kind() {
                20 => (8, &[IFA_CACHEINFO]),
                24 => (12, &[RTA_CACHEINFO]),
                _ => (12, &[NDA_CACHEINFO, NDA_PROBES]),
            };
            let body = message.body();
            let rest = &body[length..];
            let rest: Vec<_> = attributes(rest)
                .filter(|(kind, _)| !skip.contains(kind))
                .map(|(kind, value)| (kind, &rest[value]))
                .collect();
            format!("{} {:?} {rest:?}", message.kind(), &body[..length])
        })
        .collect();
    said.sort();
    said
}

fn request(interfaces: &[Interface], messages: &[Message]) -> SetNetworkRequest {
    SetNetworkRequest {
        interfaces: interfaces
            .iter()
            .map(|interface| sandbox::Interface {
                index: interface.index,
                name: interface.name.clone(),
                mtu: interface.mtu,
                up: interface.up,
                arp: interface.arp,
                ..Default::default()
            })
            .collect(),
        messages: messages.iter().map(|m| m.clone().into_bytes()).collect(),
        ..Default::default()
    }
}

/// What a guest's kernel says in the end is what the host's said.
#[test]
fn one_kernel_says_what_another_one_said() {
    let mut host = new_namespace();
    add_veth(&mut host, "eth0", "out0");
    add_veth(&mut host, "net1", "out1");
    let (eth0, net1) = (number_of("eth0"), number_of("net1"));
    host.request(link(eth0, 0).with(4, &1400u32.to_ne_bytes()))
        .unwrap();
    for (index, address, bits) in [
        (1, "10.99.0.1", 32),
        (eth0, "10.1.0.2", 24),
        (eth0, "10.1.0.3", 32),
        (eth0, "fd00::2", 64),
        (eth0, "fe80::2", 64),
        (net1, "10.2.0.2", 16),
        (net1, "fd01::2", 128),
    ] {
        add_address(&mut host, index, address.parse().unwrap(), bits);
    }
    let oif = |index: u32| index.to_ne_bytes();
    // In an order in which they cannot be added again.
    add_route(&mut host, "172.16.0.0/12", 1, 0, |m| {
        m.with(5, &gateway("10.2.3.4"))
    });
    add_route(&mut host, "0.0.0.0/0", 1, 0, |m| {
        m.with(5, &gateway("10.1.0.1"))
            .with(4, &oif(eth0))
            .with(6, &7u32.to_ne_bytes())
            .with_nested(8, |m| m.with(2, &1300u32.to_ne_bytes()))
    });
    add_route(&mut host, "192.168.0.0/16", 1, 4, |m| {
        m.with(5, &gateway("203.0.113.1")).with(4, &oif(eth0))
    });
    add_route(&mut host, "198.51.100.0/24", 6, 0, |m| m);
    add_route(&mut host, "10.77.0.0/16", 1, 0, |m| {
        let hop = |index: u32, via| {
            let hop = [&[0, 0, 0, 0][..], &oif(index)].concat();
            let hop = Message::new(0, 0, &hop).with(5, &gateway(via));
            let mut bytes = hop.body().to_vec();
            bytes[0] = bytes.len() as u8;
            bytes
        };
        m.with(9, &[hop(eth0, "10.1.0.1"), hop(net1, "10.2.0.1")].concat())
    });
    add_route(&mut host, "::/0", 1, 0, |m| m.with(5, &gateway("fd00::1")));
    add_route(&mut host, "fd77::/32", 1, 0, |m| m.with(4, &oif(net1)));
    add_route(&mut host, "10.88.0.0/16", 1, 0, |m| {
        m.with(4, &oif(eth0)).with(15, &1000u32.to_ne_bytes())
    });
    let mut neighbour = vec![libc::AF_INET as u8, 0, 0, 0];
    neighbour.extend(oif(eth0));
    neighbour.extend([0x80, 0, 0, 0]);
    let neighbour = Message::new(28, NEW, &neighbour)
        .with(1, &gateway("10.1.0.1"))
        .with(2, &[2, 0, 0, 0, 0, 9]);
    host.request(neighbour).unwrap();

    let contents = Contents::read(&mut host).unwrap();
    let names: Vec<_> = contents
        .interfaces
        .iter()
        .map(|i| i.name.as_str())
        .collect();
    assert_eq!(names, ["out0", "eth0", "out1", "net1"]);
    let own = &contents.interfaces[1];
    assert_eq!((own.mtu, own.up, own.arp), (1400, true, true));
    assert!(own.addresses.contains(&"10.1.0.2".parse().unwrap()));
    assert_eq!(own.addresses.len(), 4, "{:?}", own.addresses);
    assert!(contents.qdiscs.is_empty());
    let request = request(&contents.interfaces, &all_messages(&contents));

    // Interfaces in another order, two of which have each other's name; and the same numbers, so that the messages are.
    let mut guest = new_namespace();
    add_veth_down(&mut guest, "out0", "net1");
    add_veth_down(&mut guest, "eth0", "out1");
    let indices: Vec<_> = contents.interfaces.iter().map(|i| i.index).collect();
    apply(&request, &indices).unwrap();
    let copied = Contents::read(&mut guest).unwrap();
    let names: Vec<_> = copied.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["out0", "eth0", "out1", "net1"]);
    assert_eq!(copied.interfaces[1].mtu, 1400);
    let (first, second) = (said(&all_messages(&contents)), said(&all_messages(&copied)));
    let without = |these: &[String], those: &[String]| -> Vec<String> {
        let missing = these.iter().filter(|this| !those.contains(this));
        missing.cloned().collect()
    };
    let (lost, added) = (without(&first, &second), without(&second, &first));
    assert_eq!((lost, added), (vec![], vec![]));
    assert!(first.len() > 20, "{first:#?}");
    // Once more is no harm.
    apply(&request, &indices).unwrap();
}

#[test]
fn a_refusal_names_what_was_refused() {
    let mut host = new_namespace();
    add_veth(&mut host, "eth0", "out0");
    add_address(
        &mut host,
        number_of("eth0"),
        Ipv4Addr::new(10, 1, 0, 2).into(),
        24,
    );
    add_route(&mut host, "172.16.0.0/12", 1, 0, |m| {
        m.with(5, &gateway("10.1.0.1"))
    });
    let mut contents = Contents::read(&mut host).unwrap();
    let refused = |interfaces: &[Interface], messages: &[Message], words: &str| {
        new_namespace();
        let indices = vec![9999; interfaces.len()];
        let error = apply(&request(interfaces, messages), &indices).unwrap_err();
        assert!(
            error.to_string().contains(words),
            "{words:?} is not in {error}"
        );
    };
    refused(&[], &all_messages(&contents), "no interface has the number");
    let route = Message::new(24, 0, &[2, 12, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0]);
    let route = route
        .with(1, &[172, 16, 0, 0])
        .with(5, &gateway("10.1.0.1"));
    refused(&[], &[route], "adding the route to 172.16.0.0/12: ");
    refused(
        &[],
        &[Message::new(16, 0, &[0; 16])],
        "a message of type 16",
    );
    contents.interfaces.truncate(1);
    refused(&contents.interfaces, &[], "interface \"out0\"");
}

/// Sees and sends frames at an interface of the calling thread's namespace.
fn wire(index: u32) -> OwnedFd {
    let all = SockProtocol::EthAll;
    let wire = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        all,
    )
    .unwrap();
    // SAFETY: an all-zero address is a valid one.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address is of its family's type, and as long as is said.
    let bound = unsafe { libc::bind(wire.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(bound, 0);
    wire
}

/// A frame that no kernel sends.
fn frame(seed: u8) -> Vec<u8> {
    [
        &[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5][..],
        &[seed; 80],
    ]
    .concat()
}

/// What a guest that has all interfaces is told.
fn all_messages(contents: &Contents) -> Vec<Message> {
    contents.messages(|index| contents.interfaces.iter().any(|i| i.index == index))
}

fn connect_here(path: Option<PathBuf>, bundle: &Path, pairs: u16) -> Result<Network, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(connect(here(), wiring(path, bundle, pairs)))
}

fn wiring(path: Option<PathBuf>, bundle: &Path, pairs: u16) -> Wiring {
    Wiring {
        path,
        bundle: bundle.to_owned(),
        pairs,
    }
}

fn own_path() -> PathBuf {
    let thread = nix::unistd::gettid();
    format!("/proc/self/task/{thread}/ns/net").into()
}

/// Frames go from the outside to the tap and back, and nobody else sees them.
#[test]
fn an_interface_and_its_tap_are_joined_and_parted() {
    if !alone() {
        return;
    }
    let bundle = tempfile::tempdir().unwrap();
    let mut outside = new_namespace();
    let elsewhere = here();
    let mut host = new_namespace();
    add_veth(&mut host, "eth0", "out0");
    let (eth0, out0) = (number_of("eth0"), number_of("out0"));
    let moved = link(out0, 0).with(28, &elsewhere.as_raw_fd().to_ne_bytes());
    host.request(moved).unwrap();
    outside.request(link(out0, UP)).unwrap();
    let namespace = here();
    enter(&elsewhere).unwrap();
    let wire = wire(out0);
    enter(&namespace).unwrap();

    for had_qdisc in [false, true] {
        if had_qdisc {
            let mut body = [0; 20];
            body[4..8].copy_from_slice(&eth0.to_ne_bytes());
            body[8..12].copy_from_slice(&0xffff_0000_u32.to_ne_bytes());
            body[12..16].copy_from_slice(&0xffff_fff1_u32.to_ne_bytes());
            let clsact = Message::new(36, NEW, &body).with_text(1, "clsact");
            host.request(clsact).unwrap();
        }
        let mut network = connect_here(Some(own_path()), bundle.path(), 1).unwrap();
        let [interface] = &mut network.interfaces[..] else {
            panic!("{network:?}");
        };
        assert_eq!((interface.index, interface.name.as_str()), (eth0, "eth0"));
        let mut tap = File::from(interface.taps.pop().unwrap());
        for seed in 0..10 {
            send(wire.as_raw_fd(), &frame(seed), MsgFlags::empty()).unwrap();
            let mut received = [0; 200];
            while {
                let length = tap.read(&mut received).unwrap();
                received[HEADER..length] != frame(seed)
            } {}
            let sent = frame(100 + seed);
            tap.write_all(&[&[0; HEADER][..], &sent].concat()).unwrap();
            while {
                let length = recv(wire.as_raw_fd(), &mut received, MsgFlags::empty()).unwrap();
                received[..length] != sent
            } {}
        }
        assert_eq!(Contents::read(&mut host).unwrap().interfaces.len(), 1);
        assert_eq!(Contents::read(&mut host).unwrap().qdiscs.len(), 2);
        drop(tap);
        // What was ours is gone, whether it is taken away once or twice.
        for _ in 0..2 {
            disconnect(bundle.path()).unwrap();
            let qdiscs = Contents::read(&mut host).unwrap().qdiscs;
            assert_eq!(qdiscs, if had_qdisc { vec![eth0] } else { vec![] });
        }
        assert!(nix::net::if_::if_nametoindex(format!("bulkhead{eth0}").as_str()).is_err());
        // Without the filter, the host's kernel has its interface back.
        assert_eq!(std::fs::read_dir(bundle.path()).unwrap().count(), 0);
    }
    let mut body = [0; 20];
    body[4..8].copy_from_slice(&eth0.to_ne_bytes());
    body[12..16].copy_from_slice(&0xffff_fff2_u32.to_ne_bytes());
    let filters = host.dump(&Message::new(46, 0, &body)).unwrap();
    assert!(filters.is_empty(), "{filters:?}");
}

#[test]
fn a_tap_has_as_many_queues_as_are_asked_for() {
    let bundle = tempfile::tempdir().unwrap();
    let mut host = new_namespace();
    add_veth(&mut host, "eth0", "net1");
    let network = connect_here(None, bundle.path(), 3).unwrap();
    let queues: Vec<_> = network.interfaces.iter().map(|i| i.taps.len()).collect();
    assert_eq!(queues, [3, 3]);
    // The namespace has no name to be found by.
    disconnect(bundle.path()).unwrap();
}

#[test]
fn what_takes_no_part_is_left_out_and_what_cannot_is_named() {
    if !alone() {
        return;
    }
    let bundle = tempfile::tempdir().unwrap();
    let mut host = new_namespace();
    let network = connect_here(None, bundle.path(), 1).unwrap();
    assert!(network.interfaces.is_empty() && network.messages.is_empty());
    assert_eq!(std::fs::read_dir(bundle.path()).unwrap().count(), 0);

    let bridge = Message::new(16, NEW, &ifinfomsg(0, 0))
        .with_text(3, "br0")
        .with_nested(18, |message| message.with_text(1, "bridge"));
    host.request(bridge).unwrap();
    assert!(
        connect_here(None, bundle.path(), 1)
            .unwrap()
            .interfaces
            .is_empty()
    );
    host.request(link(number_of("br0"), UP)).unwrap();
    let error = connect_here(None, bundle.path(), 1)
        .unwrap_err()
        .to_string();
    assert!(error.contains("\"br0\" is of kind \"bridge\""), "{error}");

    // Half of it made, none of it left.
    let mut host = new_namespace();
    add_veth(&mut host, "eth0", "net1");
    let taken = format!("{TAP_PREFIX}{}", number_of("net1"));
    let dummy = Message::new(16, NEW, &ifinfomsg(0, 0))
        .with_text(3, &taken)
        .with_nested(18, |message| message.with_text(1, "bridge"));
    host.request(dummy).unwrap();
    let error = connect_here(None, bundle.path(), 1)
        .unwrap_err()
        .to_string();
    assert!(error.contains("\"net1\" is another microVM's"), "{error}");
    assert!(Contents::read(&mut host).unwrap().qdiscs.is_empty());
}

/// Whoever comes second gets nothing, and takes nothing away.
#[test]
fn an_interface_belongs_to_one_machine() {
    for pairs in [1, 2] {
        let (bundle, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut host = new_namespace();
        add_veth(&mut host, "eth0", "net1");
        let network = connect_here(Some(own_path()), bundle.path(), pairs).unwrap();
        let hooks = |host: &mut Socket| {
            let mut body = [0; 20];
            body[4..8].copy_from_slice(&number_of("eth0").to_ne_bytes());
            body[12..16].copy_from_slice(&0xffff_fff2_u32.to_ne_bytes());
            host.dump(&Message::new(46, 0, &body)).unwrap().len()
        };
        let before = hooks(&mut host);
        assert_ne!(before, 0);
        let error = connect_here(Some(own_path()), other.path(), pairs).unwrap_err();
        assert!(error.to_string().contains("another microVM's"), "{error}");
        disconnect(other.path()).unwrap();
        assert_eq!(hooks(&mut host), before);
        drop(network);
        disconnect(bundle.path()).unwrap();
        assert_eq!(hooks(&mut host), 0);
    }
}
