//! What is done to a pod's network namespace while its containers run is done to them, under runc by itself.

use std::fs;
use std::net::TcpListener;

use bulkhead_tests::cni::Pod;
use bulkhead_tests::ctr::{Running, Runtime, World};
use bulkhead_tests::process;
use rustix::process::Signal;

use super::remains::{SHIM, VMM, only};
use super::{BOTH, each_of, exec, fetch, ip, serve, start_in, tell_address};

/// All that a container sees of its network, but for what only a veth or only a guest has.
const STATE: &str = "cd /sys/class/net; \
    for i in *; do echo $i $(cat $i/address $i/mtu $i/flags) $(cat $i/carrier 2>/dev/null); done; \
    (ip route; ip -6 route; ip neigh show nud permanent) | sort; \
    ip -o address | sed -E 's/^[0-9]*: //; s/ noprefixroute| flags 02//g; s/ *valid_lft.*//' | sort";

/// Whether there is somebody at the other end.
const CARRIER: &str = "echo eth0 carrier $(cat /sys/class/net/eth0/carrier)";

/// A container, and the pod that it is in.
struct Scene<'a> {
    pod: &'a Pod,
    container: Running<'a>,
    marks: u8,
    said: String,
}

impl Scene<'_> {
    /// Has the container say what it sees once it has what was done until now: then it can be reached at one more address, in the
    /// network of a number. Changes are carried over in their order, and whoever connects tries for as long as it takes.
    fn say(&mut self, interface: &str, network: u8, script: &str) {
        self.marks += 1;
        let address = format!("10.73.0.{}", self.marks);
        let (near, hardware) = (near(network), hardware_of(self.pod, interface));
        ip(&format!("route add {address}/32 dev {near}"));
        ip(&format!(
            "neighbour add {address} lladdr {hardware} dev {near} nud permanent"
        ));
        inside(
            self.pod,
            &format!("address add {address}/32 dev {interface}"),
        );
        assert_eq!(fetch((address.as_str(), 80)), "hello\n");
        self.said += &format!("{}:\n{}", self.marks, exec(&self.container, script));
        inside(
            self.pod,
            &format!("address del {address}/32 dev {interface}"),
        );
        ip(&format!("neighbour del {address} dev {near}"));
        ip(&format!("route del {address}/32 dev {near}"));
    }
}

/// Runs `ip` in a pod.
fn inside(pod: &Pod, arguments: &str) {
    let words: Vec<_> = ["ip"].into_iter().chain(arguments.split(' ')).collect();
    pod.run(&words).unwrap();
}

/// The host's end of a network, and the hardware address of the other end.
fn near(network: u8) -> String {
    format!("changes{network}")
}

fn hardware(network: u8) -> String {
    format!("02:00:00:00:00:{network}")
}

/// An interface's hardware address.
fn hardware_of(pod: &Pod, interface: &str) -> String {
    let words = ["ip", "-o", "link", "show", "dev", interface];
    let line = pod.run(&words).unwrap();
    let (_, address) = line.split_once("link/ether ").unwrap();
    address.split(' ').next().unwrap().to_owned()
}

/// An end of a pair of interfaces: how `ip` is run there, its name, and the last number of its addresses.
type End<'a> = (&'a dyn Fn(&str), &'a str, u8);

/// Makes an interface in a pod, with addresses of both families in the network of a number, in which the host has the first of each.
fn attach(pod: &Pod, interface: &str, network: u8) {
    let near = near(network);
    ip(&format!(
        "link add {near} type veth peer name {interface} address {} netns {}",
        hardware(network),
        pod.path().display()
    ));
    let ends: [End<'_>; 2] = [
        (&ip, &near, 1),
        (&|arguments| inside(pod, arguments), interface, 2),
    ];
    for (ip, name, number) in ends {
        ip(&format!(
            "address add 10.{network}.0.{number}/24 dev {name}"
        ));
        ip(&format!(
            "address add fd{network}::{number}/64 dev {name} nodad"
        ));
        ip(&format!("link set {name} up"));
    }
}

/// What a container says after each of many changes.
fn tell(world: &World, runtime: Runtime, pod: &Pod) -> String {
    attach(pod, "eth0", 76);
    inside(pod, "route add default via 10.76.0.1");
    let container = start_in(world, runtime, pod, &[]);
    serve(&container);
    let mut scene = Scene {
        pod,
        container,
        marks: 0,
        said: String::new(),
    };
    let things = [
        "address SET 10.76.0.77/24 dev eth0",
        "address SET fd76::77/64 dev eth0 nodad",
        "route SET 10.123.0.0/16 via 10.76.0.1",
        "route SET fd99::/64 via fd76::1",
        "neighbour SET 10.76.0.50 lladdr 02:00:00:00:00:50 dev eth0",
    ];
    let set = |what: &str| things.map(|thing| inside(pod, &thing.replace("SET", what)));
    set("add");
    inside(pod, "link set eth0 mtu 1300");
    scene.say("eth0", 76, STATE);
    scene.said += &exec(
        &scene.container,
        "ping -c 1 -W 60 -I 10.76.0.77 10.76.0.1 >/dev/null && echo heard",
    );
    set("del");
    inside(pod, "link set eth0 mtu 9000");
    scene.say("eth0", 76, STATE);

    attach(pod, "net1", 75);
    scene.say("net1", 75, STATE);
    let listener = TcpListener::bind("10.75.0.1:7075").unwrap();
    each_of(&listener, 1, tell_address);
    scene.said += &exec(&scene.container, "nc 10.75.0.1 7075 </dev/null");

    inside(pod, "link set eth0 down");
    scene.say("net1", 75, STATE);
    inside(pod, "link set eth0 up");
    inside(pod, "route add default via 10.76.0.1");
    scene.say("eth0", 76, STATE);
    ip("link set changes76 down");
    scene.say("net1", 75, CARRIER);
    ip("link set changes76 up");
    scene.say("eth0", 76, CARRIER);

    ip("link delete changes75");
    // One that a guest cannot have, which disturbs nothing.
    inside(pod, "link add br9 type bridge");
    inside(pod, "link set br9 up");
    scene.say("eth0", 76, "cd /sys/class/net; ls | grep -v -e lo -e br9");
    inside(pod, "link delete br9");
    attach(pod, "net1", 75);
    scene.say("net1", 75, STATE);
    for step in ["down", "name net2", "up"] {
        let name = if step == "up" { "net2" } else { "net1" };
        inside(pod, &format!("link set {name} {step}"));
    }
    scene.say("net2", 75, STATE);
    inside(pod, "link set net2 address 02:00:00:00:00:99");
    scene.say("net2", 75, STATE);
    let Scene {
        container, said, ..
    } = scene;
    end(container, runtime, pod);
    for network in [75, 76] {
        ip(&format!("link delete {}", near(network)));
    }
    said
}

/// Ends a container, a guest by the end of its shim: what is left then belongs to interfaces that came after its start, too.
fn end(container: Running<'_>, runtime: Runtime, pod: &Pod) {
    if runtime == Runtime::Runc {
        return container.delete().unwrap();
    }
    let hooks = || {
        pod.run(&["tc", "qdisc"])
            .unwrap()
            .matches("ingress")
            .count()
    };
    // Two interfaces, and a tap beside each.
    assert_eq!(hooks(), 4);
    let vmm = only(VMM);
    process::kill(only(SHIM), Signal::KILL).unwrap();
    process::wait(vmm).unwrap();
    container.forget().unwrap();
    assert_eq!(hooks(), 0);
}

#[test]
fn a_containers_network_follows_its_pods() {
    let mut world = World::new().unwrap();
    let [runc, bulkhead] = BOTH.map(|runtime| {
        let pod = Pod::new().unwrap();
        world.keep().unwrap();
        let said = tell(&world, runtime, &pod);
        pod.remove().unwrap();
        said
    });
    for line in [
        "heard",
        "from 10.75.0.2",
        "eth0 02:00:00:00:00:76 9000 0x1003 1",
        "eth0 carrier 0",
        "net2 02:00:00:00:00:99 1500 0x1003 1",
        "\neth0\n",
    ] {
        assert!(runc.contains(line), "{line:?} is not in {runc}");
    }
    assert_eq!(runc, bulkhead);
    let log = fs::read_to_string(world.site().log()).unwrap();
    let refused = |line: &str| line.contains("br9") && line.contains("is of kind");
    assert!(log.lines().any(refused), "{log}");
    world.finish().unwrap();
}
