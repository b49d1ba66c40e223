//! The network that CNI makes for a container, the same under runc and under Bulkhead.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};

use bulkhead_tests::cni::{self, Pod};
use bulkhead_tests::ctr::{Running, Runtime, World};
use bulkhead_tests::process;

mod changes;
mod kinds;
mod names;
mod plugins;
mod queues;
mod remains;
pub mod traffic;

/// Where containerd looks for networks and their plugins.
const NETWORKS: &str = "/etc/cni/net.d";
const PLUGINS: &str = "/opt/cni/bin";

/// A bridge with addresses of both families, on which the host has the first of each.
const BRIDGE: &str = r#"{
  "cniVersion": "0.4.0",
  "name": "test",
  "plugins": [{
    "type": "bridge",
    "bridge": "cni0",
    "isGateway": true,
    "mtu": 1400,
    "ipam": {
      "type": "host-local",
      "ranges": [[{"subnet": "10.89.0.0/24"}], [{"subnet": "fd89::/64"}]],
      "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    }
  }]
}"#;

const HOST: [&str; 2] = ["10.89.0.1", "fd89::1"];
const BOTH: [Runtime; 2] = [Runtime::Runc, Runtime::Bulkhead];

/// The site with a network for those who ask for one.
fn world() -> World {
    let world = World::new().unwrap();
    fs::create_dir_all(NETWORKS).unwrap();
    fs::write(Path::new(NETWORKS).join("10-test.conflist"), BRIDGE).unwrap();
    if !Path::new(PLUGINS).exists() {
        fs::create_dir_all(Path::new(PLUGINS).parent().unwrap()).unwrap();
        symlink(cni::PLUGINS, PLUGINS).unwrap();
    }
    world
}

/// What a shell in a container with a network says.
fn say(world: &World, runtime: Runtime, script: &str) -> String {
    let container = world.container(runtime, "busybox").unwrap();
    let call = container.options(["--cni"]).run(&["sh", "-c", script]);
    call.output().unwrap().success().unwrap()
}

/// A container with a network in which a shell runs.
fn start<'a>(world: &'a World, runtime: Runtime, script: &str) -> Running<'a> {
    let container = world.container(runtime, "busybox").unwrap();
    let container = container.options(["--cni"]);
    container.start(&["sh", "-c", script]).unwrap()
}

/// A container in a pod's network that does nothing by itself.
fn start_in<'a>(world: &'a World, runtime: Runtime, pod: &Pod, options: &[String]) -> Running<'a> {
    let container = world.container(runtime, "busybox").unwrap();
    let container = container.options(pod.options()).options(options);
    container.start(&["tail", "-f", "/dev/null"]).unwrap()
}

/// What a shell says that is run in a container.
fn exec(container: &Running<'_>, script: &str) -> String {
    let call = container.exec(&["sh", "-c", script]);
    call.output().unwrap().success().unwrap()
}

/// Runs `ip`, on the host.
fn ip(arguments: &str) {
    let mut command = Command::new("ip");
    process::output(command.args(arguments.split(' '))).unwrap();
}

/// Serves so many connections, one after the other, in a thread that nobody has to wait for: a test that fails does not.
fn each_of(
    listener: &TcpListener,
    count: usize,
    mut act: impl FnMut(TcpStream, IpAddr) + Send + 'static,
) -> JoinHandle<()> {
    let listener = listener.try_clone().unwrap();
    thread::spawn(move || {
        for _ in 0..count {
            let (stream, from) = listener.accept().unwrap();
            act(stream, from.ip());
        }
    })
}

/// Tells its client's address.
fn tell_address(mut stream: TcpStream, from: IpAddr) {
    writeln!(stream, "from {}", from.to_canonical()).unwrap();
}

/// Has a container serve a page.
fn serve(container: &Running<'_>) {
    // It listens before it goes into the background.
    exec(container, "echo hello >/index.html; httpd -p 80 -h /");
}

/// The page that is served at an address.
fn fetch(address: impl ToSocketAddrs) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (_, page) = text.split_once("\r\n\r\n").unwrap();
    page.into()
}

/// The addresses of a container's interface, IPv4 first.
fn addresses(container: &Running<'_>) -> Vec<IpAddr> {
    let text = container.exec(&["ip", "-o", "addr", "show", "dev", "eth0", "scope", "global"]);
    let text = text.output().unwrap().success().unwrap();
    let words: Vec<_> = text.split_whitespace().collect();
    let addresses = words.iter().filter_map(|word| word.split_once('/'));
    let mut addresses: Vec<IpAddr> = addresses.filter_map(|(a, _)| a.parse().ok()).collect();
    addresses.sort();
    assert_eq!(addresses.len(), 2, "{text}");
    addresses
}

/// Interfaces and routes are the same, but for numbers that are given out anew each time.
#[test]
fn a_container_has_the_interface_that_cni_made() {
    let world = world();
    let script = "cat /sys/class/net/eth0/mtu; ls /sys/class/net; ip route | grep -v src; \
                  ip -o addr show dev eth0 | wc -l; ip -6 route | grep -c fd89; ip -6 route | grep default";
    let [runc, bulkhead] = BOTH.map(|runtime| say(&world, runtime, script));
    assert!(runc.starts_with("1400\n"), "{runc}");
    assert_eq!(runc, bulkhead);
    world.finish().unwrap();
}

#[test]
fn a_container_reaches_the_host() {
    let world = world();
    // The bridge, and its addresses, are there from the first container on.
    say(&world, Runtime::Runc, "true");
    let listeners =
        [("0.0.0.0", 8080), ("::", 8081)].map(|place| TcpListener::bind(place).unwrap());
    for listener in &listeners {
        each_of(listener, BOTH.len(), |mut stream, from| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            writeln!(stream, "{} from {}", all.len(), from.is_ipv6()).unwrap();
        });
    }
    let script = format!(
        "ping -c 2 -s 3000 {v4} >/dev/null && ping -6 -c 2 -s 3000 {v6} >/dev/null && echo pings; \
         head -c 1000000 /dev/zero | nc {v4} 8080; head -c 1000000 /dev/zero | nc {v6} 8081",
        v4 = HOST[0],
        v6 = HOST[1],
    );
    let [runc, bulkhead] = BOTH.map(|runtime| say(&world, runtime, &script));
    assert_eq!(runc, "pings\n1000000 from false\n1000000 from true\n");
    assert_eq!(runc, bulkhead);
    world.finish().unwrap();
}

#[test]
fn the_host_and_other_containers_reach_a_container() {
    let world = world();
    for runtime in BOTH {
        let server = start(&world, runtime, "exec tail -f /dev/null");
        serve(&server);
        for address in addresses(&server) {
            assert_eq!(fetch((address, 80)), "hello\n", "{runtime:?} {address}");
            let url = match address {
                IpAddr::V4(address) => format!("http://{address}/"),
                IpAddr::V6(address) => format!("http://[{address}]/"),
            };
            for client in BOTH {
                let script = format!("wget -q -O - {url}");
                assert_eq!(say(&world, client, &script), "hello\n", "{client:?} {url}");
            }
        }
        server.delete().unwrap();
    }
    world.finish().unwrap();
}

/// Whoever takes another's address is heard by nobody, unless the administrator wants it so.
#[test]
fn a_container_sends_from_its_own_addresses_only() {
    let world = world();
    let directory = tempfile::tempdir().unwrap();
    let changes = [("allow_foreign_sources", "true")];
    let allowing = world.configure(directory.path(), &changes).unwrap();
    // Who is not heard waits in vain; who is waits for as long as a slow node takes.
    let silent = "own\nno other address\nno other hardware\n";
    let heard = "own\nother address\nother hardware\n";
    for (options, patience, expected) in [(&[][..], 2, silent), (&allowing[..], 60, heard)] {
        let script = format!(
            "ping -c 1 -W 60 {host} >/dev/null && echo own; ip addr add 10.89.0.99/24 dev eth0; \
             other() {{ ping -c 1 -W {patience} -I 10.89.0.99 {host} >/dev/null || echo -n 'no '; echo other $1; }}; \
             other address; ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; \
             ip route add 10.89.0.0/24 dev eth0; other hardware",
            host = HOST[0],
        );
        let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
        let container = container.options(["--cni", "--cap-add", "CAP_NET_ADMIN"]);
        let call = container.options(options).run(&["sh", "-c", &script]);
        assert_eq!(call.output().unwrap().success().unwrap(), expected);
    }
    drop(directory);
    world.finish().unwrap();
}
