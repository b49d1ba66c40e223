//! What happens after the start: it is heard of, wired, and told another kernel.

use bulkhead_agent::netlink::{attribute, text};
use bulkhead_agent::network::retract;

use super::*;
use crate::network::difference::Difference;
use crate::network::subscription;
use crate::network::wiring::{Look, Wired};

/// A message that undoes what another one has done.
fn undo(socket: &mut Socket, kind: u16, body: &[u8], attributes: impl FnOnce(Message) -> Message) {
    socket
        .request(attributes(Message::new(kind + 1, 0, body)))
        .unwrap();
}

fn bytes(messages: &[Message]) -> Vec<Vec<u8>> {
    messages.iter().map(|m| m.clone().into_bytes()).collect()
}

/// The host, as a guest was told of it, and the guest.
struct Pair {
    host: Socket,
    guest: Socket,
    namespaces: [OwnedFd; 2],
    told: Vec<Message>,
    interfaces: Vec<(u32, u32)>,
}

impl Pair {
    /// Two namespaces with interfaces of the same names, not of the same numbers.
    fn new() -> Self {
        let mut host = new_namespace();
        add_veth(&mut host, "net7", "net8");
        add_veth(&mut host, "eth0", "out0");
        let names = ["eth0", "out0"];
        let numbers = names.map(number_of);
        let of_host = here();
        let mut guest = new_namespace();
        add_veth(&mut guest, "eth0", "out0");
        let interfaces = numbers.into_iter().zip(names.map(number_of)).collect();
        let namespaces = [of_host, here()];
        Self {
            host,
            guest,
            namespaces,
            told: Vec::new(),
            interfaces,
        }
    }

    fn messages(&self, socket: &mut Socket) -> Vec<Message> {
        let contents = Contents::read(socket).unwrap();
        contents.messages(|index| self.interfaces.iter().any(|known| known.0 == index))
    }

    /// Changes the host, tells the guest, and returns how many were removed and added. Then both kernels say the same.
    fn change(&mut self, act: impl FnOnce(&mut Socket, u32)) -> (usize, usize) {
        let eth0 = self.interfaces[0].0;
        enter(&self.namespaces[0]).unwrap();
        act(&mut self.host, eth0);
        let mut host = Socket::new().unwrap();
        let messages = self.messages(&mut host);
        let difference = Difference::new(&self.told, &messages);
        enter(&self.namespaces[1]).unwrap();
        let mut known = self.interfaces.clone();
        known.push((1, 1));
        retract(&bytes(&difference.removed), &known).unwrap();
        let contents = Contents::read(&mut self.guest).unwrap();
        let indices: Vec<_> = contents.interfaces.iter().map(|i| i.index).collect();
        let interfaces: Vec<_> = contents
            .interfaces
            .iter()
            .map(|i| {
                let known = self.interfaces.iter().find(|known| known.1 == i.index);
                let index = known.unwrap().0;
                sandbox::Interface {
                    index,
                    name: i.name.clone(),
                    mtu: i.mtu,
                    up: i.up,
                    arp: i.arp,
                    ..Default::default()
                }
            })
            .collect();
        let request = SetNetworkRequest {
            interfaces,
            messages: bytes(&difference.added),
            ..Default::default()
        };
        apply(&request, &indices).unwrap();
        let guest = Contents::read(&mut self.guest).unwrap();
        let guest = guest.messages(|_| true);
        assert_eq!(self.renumbered(&messages), said(&guest));
        self.told = messages;
        (difference.removed.len(), difference.added.len())
    }

    /// What the host says, in the guest's numbers.
    fn renumbered(&self, messages: &[Message]) -> Vec<String> {
        let mut all = Vec::new();
        for message in messages {
            let mut message = message.clone();
            let number = |bytes: &mut [u8]| {
                let found = self.interfaces.iter();
                let mut found = found.filter(|known| known.0.to_ne_bytes() == *bytes);
                if let Some(known) = found.next() {
                    bytes.copy_from_slice(&known.1.to_ne_bytes());
                }
            };
            if message.kind() == 24 {
                let body = message.body_mut();
                let oif = attributes(&body[12..]).find(|(kind, _)| *kind == 4);
                if let Some((_, value)) = oif {
                    number(&mut body[12 + value.start..12 + value.end]);
                }
            } else {
                number(&mut message.body_mut()[4..8]);
            }
            all.push(message);
        }
        said(&all)
    }
}

fn address(index: u32, bits: u8) -> Vec<u8> {
    [&[libc::AF_INET as u8, bits, 0, 0][..], &index.to_ne_bytes()].concat()
}

fn lifetime(socket: &mut Socket, index: u32, of: [u8; 4], seconds: u32) {
    let seconds = seconds.to_ne_bytes();
    let info = [seconds, seconds, [0; 4], [0; 4]].concat();
    let message = Message::new(20, NLM_F_CREATE | 0x100, &address(index, 32));
    let message = message.with(2, &of).with(1, &of).with(6, &info);
    socket.request(message).unwrap();
}

/// Step by step, one kernel's network becomes another one's.
#[test]
fn changes_are_carried_over() {
    let mut pair = Pair::new();
    let v4 = |last| IpAddr::from([10, 1, 0, last]);
    let routes = pair.change(|_, _| ()).1;
    assert!(routes < 10, "{routes}");
    assert_eq!(pair.change(|_, _| ()), (0, 0));
    // With the route to its network.
    let added = pair.change(|host, eth0| add_address(host, eth0, v4(2), 24));
    assert_eq!(added, (0, 2));
    pair.change(|host, eth0| {
        add_address(host, eth0, v4(3), 24);
        add_address(host, eth0, "fd00::2".parse().unwrap(), 64);
    });
    let added = pair.change(|host, _| {
        add_route(host, "172.16.0.0/12", 1, 0, |m| {
            m.with(5, &gateway("10.1.0.1"))
        });
        add_route(host, "fd77::/32", 1, 0, |m| m.with(5, &gateway("fd00::1")));
    });
    assert_eq!(added, (0, 2));
    let neighbour = |index: u32| {
        let mut body = vec![libc::AF_INET as u8, 0, 0, 0];
        body.extend(index.to_ne_bytes());
        body.extend([0x80, 0, 0, 0]);
        body
    };
    let attributes = |m: Message| m.with(1, &gateway("10.1.0.1"));
    let added = pair.change(|host, eth0| {
        let message = attributes(Message::new(28, NEW, &neighbour(eth0)));
        host.request(message.with(2, &[2, 0, 0, 0, 0, 9])).unwrap();
    });
    assert_eq!(added, (0, 1));
    let removed = pair.change(|host, eth0| undo(host, 28, &neighbour(eth0), attributes));
    assert_eq!(removed, (1, 0));
    let removed = pair.change(|host, _| {
        let body = [2, 12, 0, 0, 254, 0, 0, 0, 0, 0, 0, 0];
        undo(host, 24, &body, |m| m.with(1, &[172, 16, 0, 0]));
    });
    assert_eq!(removed, (1, 0));
    // The first address of a network goes, with the second one or without it, and so does the route.
    pair.change(|host, eth0| {
        undo(host, 20, &address(eth0, 24), |m| {
            m.with(2, &[10, 1, 0, 2]).with(1, &[10, 1, 0, 2])
        });
    });
    pair.change(|host, eth0| {
        host.request(link(eth0, 0).with(4, &1400u32.to_ne_bytes()))
            .unwrap();
        add_address(host, eth0, v4(9), 32);
    });
    // Time alone changes nothing, more time does.
    let own = [10, 1, 0, 8];
    let lives = pair.change(|host, eth0| lifetime(host, eth0, own, 1000));
    assert_eq!(lives, (0, 1));
    assert_eq!(
        pair.change(|host, eth0| lifetime(host, eth0, own, 900)),
        (0, 0)
    );
    assert_eq!(
        pair.change(|host, eth0| lifetime(host, eth0, own, 5000)),
        (0, 1)
    );
    let none = Difference::new(&pair.told, &[]);
    assert_eq!((none.removed.len(), none.added.len()), (pair.told.len(), 0));
}

fn wired(contents: &Contents) -> Vec<Wired> {
    contents.interfaces.iter().map(Wired::from).collect()
}

fn names(look: &Look) -> Vec<(&str, usize)> {
    let interfaces = look.contents.interfaces.iter();
    interfaces
        .map(|i| (i.name.as_str(), i.taps.len()))
        .collect()
}

fn hooked(bundle: &Path) -> Vec<u32> {
    let trace = Trace::read(bundle).unwrap().unwrap_or_default();
    trace.hooks.iter().map(|hook| hook.index).collect()
}

fn mtu_of(socket: &mut Socket, name: &str) -> u32 {
    let links = socket.dump(&Message::new(18, 0, &[0; 16])).unwrap();
    let mut attributes = links.iter().map(|link| &link.body()[16..]);
    let found = attributes.find(|rest| attribute(rest, 3).map(text).as_deref() == Some(name));
    let mtu = found.and_then(|rest| attribute(rest, 4)).unwrap();
    u32::from_ne_bytes(mtu.try_into().unwrap())
}

/// Interfaces come, go, and come back as others.
#[test]
fn taps_follow_the_interfaces() {
    let directory = tempfile::tempdir().unwrap();
    let bundle = directory.path();
    let mut host = new_namespace();
    let wiring = wiring(Some(own_path()), bundle, 1);
    let network = connect_here(Some(own_path()), bundle, 1).unwrap();
    assert!(network.interfaces.is_empty());

    add_veth(&mut host, "eth0", "net1");
    let (eth0, net1) = (number_of("eth0"), number_of("net1"));
    let first = wiring.look(&[], &[]).unwrap();
    assert_eq!(names(&first), [("net1", 1), ("eth0", 1)]);
    assert_eq!((first.gone.len(), first.failed.len()), (0, 0));
    assert_eq!(hooked(bundle), [net1, eth0]);
    let known = wired(&first.contents);

    // Nothing is new, and what has longer packets lets them through.
    host.request(link(eth0, 0).with(4, &9000u32.to_ne_bytes()))
        .unwrap();
    let second = wiring.look(&known, &[]).unwrap();
    assert_eq!(names(&second), [("net1", 0), ("eth0", 0)]);
    assert_eq!(mtu_of(&mut host, &format!("{TAP_PREFIX}{eth0}")), 9000);

    // Another hardware address, and somebody has taken our queueing discipline away.
    let known = wired(&second.contents);
    host.request(link(eth0, 0).with(1, &[2, 0, 0, 0, 0, 5]))
        .unwrap();
    let mut body = [0; 20];
    body[4..8].copy_from_slice(&net1.to_ne_bytes());
    body[8..12].copy_from_slice(&0xffff_0000_u32.to_ne_bytes());
    body[12..16].copy_from_slice(&0xffff_fff1_u32.to_ne_bytes());
    host.request(Message::new(37, 0, &body).with_text(1, "ingress"))
        .unwrap();
    let third = wiring.look(&known, &[]).unwrap();
    assert_eq!(names(&third), [("net1", 1), ("eth0", 1)]);
    assert_eq!(third.gone, [net1, eth0]);
    assert_eq!(hooked(bundle), [net1, eth0]);
    assert_eq!(third.contents.qdiscs.len(), 0);
    // The old taps are not there any more, though they are open.
    let old = File::from(
        first
            .contents
            .interfaces
            .into_iter()
            .next()
            .unwrap()
            .taps
            .remove(0),
    );
    assert!((&old).read(&mut [0; 64]).is_err());

    // They are gone, with all that was theirs; one that cannot have a tap is not asked for it twice.
    let known = wired(&third.contents);
    host.request(Message::new(17, 0, &ifinfomsg(eth0, 0)))
        .unwrap();
    add_veth(&mut host, "net2", "net3");
    let net2 = number_of("net2");
    let taken = format!("{TAP_PREFIX}{net2}");
    let bridge = Message::new(16, NEW, &ifinfomsg(0, 0))
        .with_text(3, &taken)
        .with_nested(18, |message| message.with_text(1, "bridge"));
    host.request(bridge).unwrap();
    let last = wiring.look(&known, &[]).unwrap();
    assert_eq!(last.gone, [net1, eth0]);
    assert_eq!(last.failed, [net2]);
    assert_eq!(names(&last), [("net3", 1)]);
    assert_eq!(hooked(bundle), [number_of("net3")]);
    number_of(&taken);
    let again = wiring.look(&wired(&last.contents), &last.failed).unwrap();
    assert_eq!(names(&again), [("net3", 0)]);
    assert_eq!(again.failed, [net2]);

    // One of a kind that no guest can have is named, and the others are there.
    let other = Message::new(16, NEW, &ifinfomsg(0, 0))
        .with_text(3, "br9")
        .with_nested(18, |message| message.with_text(1, "bridge"));
    host.request(other).unwrap();
    host.request(link(number_of("br9"), UP)).unwrap();
    let refused = wiring.look(&wired(&last.contents), &last.failed).unwrap();
    assert_eq!(names(&refused), [("net3", 0)]);
    let error = refused.contents.refused[0].to_string();
    assert!(error.contains("\"br9\" is of kind \"bridge\""), "{error}");

    disconnect(bundle).unwrap();
    assert!(
        Contents::read(&mut host)
            .unwrap()
            .qdiscs
            .iter()
            .all(|i| *i != number_of("net3"))
    );
}

/// Of what concerns a guest, and only of that.
#[test]
fn changes_are_heard_of() {
    let mut host = new_namespace();
    let changes = subscription::open().unwrap();
    let heard = || subscription::drain(&changes).unwrap();
    assert!(!heard());
    add_veth(&mut host, "eth0", "out0");
    assert!(heard());
    let eth0 = number_of("eth0");
    add_address(&mut host, eth0, [10, 1, 0, 2].into(), 24);
    assert!(heard());
    add_route(&mut host, "172.16.0.0/12", 1, 0, |m| {
        m.with(5, &gateway("10.1.0.1"))
    });
    assert!(heard());
    let mut down = ifinfomsg(number_of("out0"), 0);
    down[12..].copy_from_slice(&UP.to_ne_bytes());
    host.request(Message::new(16, 0, &down)).unwrap();
    assert!(heard());
    // More than the kernel keeps.
    for round in 0..1000u32 {
        let [_, _, c, d] = round.to_be_bytes();
        add_address(&mut host, eth0, [10, 2, c, d].into(), 32);
    }
    assert!(heard());

    let link = |name| link(7, UP).with_text(3, name);
    let route = |table| Message::new(24, 0, &[10, 8, 0, 0, table, 2, 0, 1, 0, 0, 0, 0]);
    for (message, expected) in [
        (link("eth0"), true),
        (link("bulkhead7"), false),
        (route(254), true),
        (route(255), false),
        (Message::new(21, 0, &address(7, 24)), true),
    ] {
        let bytes = message.into_bytes();
        assert_eq!(subscription::matters(&bytes), expected, "{bytes:?}");
    }
    assert!(subscription::matters(&[]));
}
