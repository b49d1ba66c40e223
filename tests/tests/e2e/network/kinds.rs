//! Interfaces that no plugin of Debian's makes: the tap of a program, and an ipvlan that only routes.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};
use std::thread::{self, JoinHandle};

use bulkhead_tests::cni::Pod;
use bulkhead_tests::ctr::World;
use rustix::ioctl::{Setter, ioctl};
use serde_json::json;

use super::plugins::{addresses, neighbours, wire};
use super::{BOTH, each_of, exec, fetch, ip, serve, start_in, tell_address};

// linux/if_tun.h
const TUNSETIFF: rustix::ioctl::Opcode = 0x4004_54ca;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;

/// Longer than any frame on links of 1,500 bytes.
const FRAME: usize = 2048;

/// `struct ifreq`: an interface's name, and here its flags.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Makes a tap in the network that the calling thread is in. It is there as long as it is open.
fn tap(name: &str) -> File {
    let mut options = OpenOptions::new();
    let tun = options.read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = Request {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the opcode is that of the request that takes this structure.
    unsafe { ioctl(&tun, Setter::<TUNSETIFF, Request>::new(request)) }.unwrap();
    tun
}

/// Carries frames from one tap to another until one of them is removed.
fn carry(from: &File, to: &File) -> JoinHandle<()> {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    thread::spawn(move || {
        let mut frame = [0; FRAME];
        while let Ok(length) = from.read(&mut frame) {
            // One that is down takes nothing.
            let _ = to.write(&frame[..length]);
        }
    })
}

/// The networks: the host is at the other end of the tap; by the ipvlan, whose addresses are in a network of their own, one gets to another machine.
const TAP: u8 = 77;
const ROUTED: u8 = 78;
const WIRE: u8 = 79;

#[test]
fn taps_and_routing_ipvlans_reach_what_they_do_under_runc() {
    let world = World::new().unwrap();
    let far = Pod::new().unwrap();
    let mut pod = Pod::new().unwrap();
    let inside = |pod: &Pod, arguments: &str| {
        let all: Vec<_> = ["ip"].into_iter().chain(arguments.split(' ')).collect();
        pod.run(&all).unwrap();
    };

    // A program is at the other end of the tap, as slirp4netns and passt are. It has a tap for the host.
    let (own, other) = (pod.within(|| tap("eth0")).unwrap(), tap("wire77"));
    let carried = [carry(&own, &other), carry(&other, &own)];
    drop((own, other));
    ip(&format!("address add 10.{TAP}.0.1/24 dev wire77"));
    ip(&format!("address add fd{TAP}::1/64 dev wire77 nodad"));
    ip("link set wire77 up");
    inside(&pod, &format!("address add 10.{TAP}.0.2/24 dev eth0"));
    inside(&pod, &format!("address add fd{TAP}::2/64 dev eth0 nodad"));
    inside(&pod, "link set eth0 up");

    // The other machine finds the ipvlan by a route.
    wire("wire79", &far, WIRE);
    let plugin = json!({
        "type": "ipvlan", "master": "wire79", "mode": "l3", "mtu": 1400,
        "ipam": addresses(ROUTED, &[&format!("10.{WIRE}.0.0/24"), &format!("fd{WIRE}::/64")]),
    });
    let made = pod.attach("net1", "routed", &[plugin]).unwrap();
    let routed = neighbours(ROUTED, &made).map(|(_, _, own)| own);
    inside(
        &far,
        &format!("route add 10.{ROUTED}.0.0/24 via 10.{WIRE}.0.254"),
    );
    inside(
        &far,
        &format!("route add fd{ROUTED}::/64 via fd{WIRE}::254"),
    );

    let bind = || TcpListener::bind("[::]:7003").unwrap();
    let (near, far_off) = (bind(), far.within(bind).unwrap());
    let script = format!(
        "cd /sys/class/net; for i in *; do echo $i $(cat $i/address $i/mtu); done; \
         for host in 10.{TAP}.0.1 fd{TAP}::1 10.{WIRE}.0.1 fd{WIRE}::1; do \
         case $host in *:*) ping=ping6;; *) ping=ping;; esac; \
         $ping -c 1 -s 3000 -W 60 $host >/dev/null && nc $host 7003 </dev/null; done"
    );
    let outcomes = BOTH.map(|runtime| {
        let container = start_in(&world, runtime, &pod, &[]);
        serve(&container);
        each_of(&near, 2, tell_address);
        each_of(&far_off, 2, tell_address);
        let mut said = exec(&container, &script);
        for address in [format!("10.{TAP}.0.2"), format!("fd{TAP}::2")] {
            let address: IpAddr = address.parse().unwrap();
            said += &format!("{address} says {}", fetch((address, 80)));
        }
        for address in routed {
            let page = far.within(|| fetch((address, 80))).unwrap();
            said += &format!("{address} says {page}");
        }
        container.delete().unwrap();
        said
    });
    let [runc, bulkhead] = outcomes;
    let own = [format!("10.{TAP}.0.2"), format!("fd{TAP}::2")];
    for own in own.into_iter().chain(routed.map(|own| own.to_string())) {
        for line in [format!("from {own}\n"), format!("{own} says hello\n")] {
            assert!(runc.contains(&line), "{line:?} is not in {runc}");
        }
    }
    assert_eq!(runc, bulkhead);
    // Whoever reads from a tap hears of its end.
    inside(&pod, "link delete eth0");
    pod.remove().unwrap();
    for wire in ["wire77", "wire79"] {
        ip(&format!("link delete {wire}"));
    }
    for thread in carried {
        thread.join().unwrap();
    }
    far.remove().unwrap();
    world.finish().unwrap();
}
