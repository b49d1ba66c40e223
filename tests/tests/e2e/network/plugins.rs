//! Networks by all of Debian's plugins that a pod can have, in the pod's own network namespace as in Kubernetes.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};
use std::time::Instant;

use bulkhead_tests::cni::Pod;
use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::images::noise;
use bulkhead_tests::process;
use serde_json::{Value, json};

use super::{BOTH, each_of, exec, fetch, ip, serve, start_in, tell_address};

/// Lays a wire from the host to another machine. They have the addresses 254 and 1 of `10.NETWORK.0.0/24` and `fdNETWORK::/64`.
pub fn wire(near: &str, far: &Pod, network: u8) {
    let path = far.path();
    ip(&format!(
        "link add {near} type veth peer name {near} netns {}",
        path.display()
    ));
    let inside = |arguments: &str| {
        let all: Vec<_> = ["ip"].into_iter().chain(arguments.split(' ')).collect();
        far.run(&all).unwrap();
    };
    let set_up = |ip: &dyn Fn(&str), number: u8| {
        ip(&format!(
            "address add 10.{network}.0.{number}/24 dev {near}"
        ));
        ip(&format!(
            "address add fd{network}::{number}/64 dev {near} nodad"
        ));
        ip(&format!("link set {near} up"));
    };
    set_up(&ip, 254);
    set_up(&inside, 1);
}

/// The addresses of both families from ranges of their own.
pub fn addresses(network: u8, routes: &[&str]) -> Value {
    let routes: Vec<_> = routes.iter().map(|dst| json!({"dst": dst})).collect();
    json!({
        "type": "host-local",
        "ranges": [
            [{"subnet": format!("10.{network}.0.0/24"), "rangeStart": format!("10.{network}.0.10")}],
            [{"subnet": format!("fd{network}::/64"), "rangeStart": format!("fd{network}::10")}],
        ],
        "routes": routes,
    })
}

/// Limits of the bandwidth, in bits a second, and of what may pass at once, in bits.
const RATE: u32 = 8_000_000;
const BURST: u32 = 500_000;

/// What is sent in each direction, in bytes, and how many seconds that takes at least.
const LIMITED: usize = 1_000_000;
const LEAST: f64 = (8.0 * LIMITED as f64 - BURST as f64) / RATE as f64;

/// What clusters have: a bridge behind the host's addresses, ports of the host, a firewall, limits.
fn chain() -> [Value; 4] {
    [
        json!({
            "type": "bridge", "bridge": "chain0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
            "ipam": addresses(88, &["0.0.0.0/0", "::/0"]),
        }),
        json!({
            "type": "portmap", "snat": true, "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": [{"hostPort": 8088, "containerPort": 80, "protocol": "tcp"}]},
        }),
        json!({"type": "firewall", "backend": "iptables"}),
        json!({
            "type": "bandwidth",
            "ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST,
        }),
    ]
}

/// Has an iptables-like program do the same for both families.
fn filter(arguments: &str) {
    for program in ["iptables", "ip6tables"] {
        let mut command = std::process::Command::new(program);
        process::output(command.args(arguments.split(' '))).unwrap();
    }
}

/// How many of the host's interfaces have a token bucket.
fn limited() -> usize {
    let text = process::output(std::process::Command::new("tc").arg("qdisc")).unwrap();
    let is_bucket = |line: &&str| line.starts_with("qdisc tbf");
    text.lines().filter(is_bucket).count()
}

/// A second microVM cannot be in the network of the first, which goes on.
fn refuse_another(world: &World, pod: &Pod) {
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let name = container.name().to_owned();
    let started = container.options(pod.options()).start(&["true"]);
    let error = started.unwrap_err().to_string();
    assert!(error.contains("\"eth0\" is another microVM's"), "{error}");
    // ctr leaves what does not start.
    for arguments in [
        &["task", "delete", "--force", &name][..],
        &["container", "delete", &name],
    ] {
        world.ctr(arguments).output().unwrap().success().unwrap();
    }
}

#[test]
fn ports_masquerades_firewalls_and_limits_hold_for_a_container() {
    let world = World::new().unwrap();
    let far = Pod::new().unwrap();
    wire("wire87", &far, 87);
    let listeners = ["10.87.0.1", "fd87::1"].map(|address| {
        far.within(|| TcpListener::bind((address, 7000)).unwrap())
            .unwrap()
    });
    for runtime in BOTH {
        let mut pod = Pod::new().unwrap();
        pod.attach("eth0", "chain", &chain()).unwrap();
        let container = start_in(&world, runtime, &pod, &[]);
        serve(&container);
        if runtime == Runtime::Bulkhead {
            refuse_another(&world, &pod);
        }
        for address in ["10.88.0.1:8088", "127.0.0.1:8088"] {
            assert_eq!(fetch(address), "hello\n", "{runtime:?} {address}");
        }
        for address in ["10.87.0.254:8088", "[fd87::254]:8088"] {
            let text = far.within(|| fetch(address)).unwrap();
            assert_eq!(text, "hello\n", "{runtime:?} {address} from afar");
        }
        // What is let through now is what the plugin lets through, whose rules come before.
        filter("--append FORWARD --in-interface chain0 --jump DROP");
        for listener in &listeners {
            each_of(listener, 1, tell_address);
        }
        let script = "for host in 10.87.0.1 fd87::1; do nc $host 7000 </dev/null; done";
        let said = exec(&container, script);
        filter("--delete FORWARD --in-interface chain0 --jump DROP");
        assert_eq!(said, "from 10.87.0.254\nfrom fd87::254\n", "{runtime:?}");

        // One direction after the other. A node that is slow itself takes longer, but none takes less.
        assert_eq!(limited(), 2, "{runtime:?}");
        let listener = TcpListener::bind("10.88.0.1:7001").unwrap();
        let received = each_of(&listener, 1, |mut stream, _| {
            let begun = Instant::now();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            let took = begun.elapsed().as_secs_f64();
            assert_eq!(all.len(), LIMITED);
            assert!(took >= 0.9 * LEAST, "{took} s");
        });
        exec(
            &container,
            &format!("head -c {LIMITED} /dev/zero | nc 10.88.0.1 7001"),
        );
        received.join().unwrap();
        each_of(&listener, 1, |mut stream, _| {
            stream.write_all(&noise(LIMITED)).unwrap();
        });
        let begun = Instant::now();
        let said = exec(&container, "nc 10.88.0.1 7001 </dev/null | wc -c");
        let took = begun.elapsed().as_secs_f64();
        assert_eq!(said, format!("{LIMITED}\n"), "{runtime:?}");
        assert!(took >= 0.9 * LEAST, "{took} s");
        container.delete().unwrap();
        pod.remove().unwrap();
    }
    ip("link delete wire87");
    far.remove().unwrap();
    world.finish().unwrap();
}

/// The networks of a pod's interfaces. The host is at the other end of the first; from the others one gets to another machine.
const NETWORKS: [(&str, &str, u8); 3] = [
    ("eth0", "ptp", 85),
    ("net1", "macvlan", 84),
    ("net2", "ipvlan", 83),
];

/// Whom a pod can speak with in a network, and the address that it was given there itself, in both families.
pub fn neighbours(network: u8, made: &Value) -> [(u8, IpAddr, IpAddr); 2] {
    let hosts = [
        IpAddr::from([10, network, 0, 1]),
        format!("fd{network}::1").parse().unwrap(),
    ];
    std::array::from_fn(|family| {
        let own = made["ips"][family]["address"].as_str().unwrap();
        let (own, _) = own.split_once('/').unwrap();
        (network, hosts[family], own.parse().unwrap())
    })
}

/// Interfaces of all kinds in one pod.
#[test]
fn a_pod_has_interfaces_of_every_kind() {
    let world = World::new().unwrap();
    let far = Pod::new().unwrap();
    let mut pod = Pod::new().unwrap();
    let mut all = Vec::new();
    for (interface, kind, network) in NETWORKS {
        let (master, routes): (_, &[_]) = match kind {
            "ptp" => (String::new(), &["0.0.0.0/0", "::/0"]),
            _ => (format!("wire{network}"), &[]),
        };
        if !master.is_empty() {
            wire(&master, &far, network);
        }
        let plugin = json!({
            "type": kind, "master": master, "mtu": 1400, "ipam": addresses(network, routes),
        });
        let made = pod.attach(interface, kind, &[plugin]).unwrap();
        all.extend(neighbours(network, &made));
    }
    let neighbours = all;
    // Wherever they are asked: not all of the host's addresses need be in use yet.
    let bind = || TcpListener::bind("[::]:7002").unwrap();
    let (near, far_off) = (bind(), far.within(bind).unwrap());
    let hosts: Vec<_> = neighbours.iter().map(|(_, n, _)| n.to_string()).collect();
    let reach = format!(
        "for host in {}; do case $host in *:*) ping=ping6;; *) ping=ping;; esac; \
         $ping -c 1 -s 3000 -W 60 $host >/dev/null && nc $host 7002 </dev/null; done",
        hosts.join(" ")
    );
    let outcomes = BOTH.map(|runtime| {
        let container = start_in(&world, runtime, &pod, &[]);
        serve(&container);
        // That its addresses bring no routes by themselves, and are looked for nowhere else, only the guest says.
        let mut said = exec(
            &container,
            "cd /sys/class/net; for i in *; do echo $i $(cat $i/address $i/mtu); done; ip route; ip -6 route; \
             ip -o address | sed -E 's/^[0-9]*: //; s/ noprefixroute| flags 02//g; s/ *valid_lft.*//' | sort",
        );
        each_of(&near, 2, tell_address);
        each_of(&far_off, 4, tell_address);
        said += &exec(&container, &reach);
        for (network, _, own) in &neighbours {
            let page = match network {
                85 => fetch((*own, 80)),
                _ => far.within(|| fetch((*own, 80))).unwrap(),
            };
            said += &format!("{own} says {page}");
        }
        container.delete().unwrap();
        said
    });
    let [runc, bulkhead] = outcomes;
    for (_, _, own) in &neighbours {
        for line in [format!("from {own}\n"), format!("{own} says hello\n")] {
            assert!(runc.contains(&line), "{line:?} is not in {runc}");
        }
    }
    assert_eq!(runc, bulkhead);
    pod.remove().unwrap();
    for wire in ["wire84", "wire83"] {
        ip(&format!("link delete {wire}"));
    }
    far.remove().unwrap();
    world.finish().unwrap();
}
