//! The network that CNI makes for a container, the same under runc and under Bulkhead.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;

use bulkhead_tests::ctr::{Running, Runtime, World};

/// Where containerd looks for networks and their plugins, and where Debian puts the plugins.
const NETWORKS: &str = "/etc/cni/net.d";
const PLUGINS: &str = "/opt/cni/bin";
const DEBIAN_PLUGINS: &str = "/usr/lib/cni";

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
        symlink(DEBIAN_PLUGINS, PLUGINS).unwrap();
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
    thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(move || {
                for _ in BOTH {
                    let (mut stream, from) = listener.accept().unwrap();
                    let mut all = Vec::new();
                    stream.read_to_end(&mut all).unwrap();
                    writeln!(stream, "{} from {}", all.len(), from.is_ipv6()).unwrap();
                }
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
    });
    world.finish().unwrap();
}

#[test]
fn the_host_and_other_containers_reach_a_container() {
    let world = world();
    for runtime in BOTH {
        let server = start(&world, runtime, "exec tail -f /dev/null");
        // It listens before it goes into the background.
        let serve = server.exec(&["sh", "-c", "echo hello >/index.html; httpd -p 80 -h /"]);
        serve.output().unwrap().success().unwrap();
        for address in addresses(&server) {
            let mut stream = TcpStream::connect((address, 80)).unwrap();
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(text.ends_with("\nhello\n"), "{runtime:?} {address}: {text}");
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

/// Whoever takes another's address is heard by nobody.
#[test]
fn a_container_sends_from_its_own_addresses_only() {
    let world = world();
    let script = format!(
        "ping -c 1 -W 5 {host} >/dev/null && echo own; ip addr add 10.89.0.99/24 dev eth0; \
         ping -c 1 -W 2 -I 10.89.0.99 {host} >/dev/null || echo other",
        host = HOST[0],
    );
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let container = container.options(["--cni", "--cap-add", "CAP_NET_ADMIN"]);
    let call = container.run(&["sh", "-c", &script]);
    assert_eq!(call.output().unwrap().success().unwrap(), "own\nother\n");
    world.finish().unwrap();
}
