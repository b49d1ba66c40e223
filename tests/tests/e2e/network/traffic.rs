//! Much, many and long: streams, connections, datagrams and packets of all lengths.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::LazyLock;
use std::thread;
use std::time::Duration;

use bulkhead_tests::cni::Pod;
use bulkhead_tests::ctr::World;
use bulkhead_tests::images::noise;
use serde_json::{Value, json};

use super::{BOTH, each_of, exec, ip, start_in};

/// A bridge with addresses of both families, on which the host has the first of each.
pub fn bridge(name: &str, network: u8, mtu: u16) -> Value {
    json!({
        "type": "bridge", "bridge": name, "isGateway": true, "mtu": mtu,
        "ipam": {
            "type": "host-local",
            "ranges": [
                [{"subnet": format!("10.{network}.0.0/24")}],
                [{"subnet": format!("fd{network}::/64")}],
            ],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    })
}

/// A pod with one interface, at a bridge of its own.
pub fn bridged(name: &str, network: u8, mtu: u16) -> Pod {
    let mut pod = Pod::new().unwrap();
    let bridge = bridge(&format!("{name}0"), network, mtu);
    pod.attach("eth0", name, &[bridge]).unwrap();
    pod
}

/// What goes over each stream again and again, and how often: more than 1 GiB in each direction alone, and in both at once. Its length is no
/// multiple of anything on the way, so what is lost, or comes twice, shows.
static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| noise((16 << 20) + 1));
const BLOCKS: usize = 64;

/// Short connections.
const CONNECTIONS: usize = 1000;

/// Lengths of datagrams: the shortest, the longest that is whole on a link of 9,000 bytes, the first that is not, the longest.
const DATAGRAMS: [usize; 5] = [1, 1400, 8972, 8973, 65_507];

/// Datagrams of each length; of them are on their way at once so many, and so many bytes, as fit into a socket's buffer for certain.
const OF_EACH: usize = 40;
const BURST: usize = 10;
const BURST_BYTES: usize = 65_536;

/// Sends all blocks.
fn send(stream: &mut TcpStream) {
    for _ in 0..BLOCKS {
        stream.write_all(&BLOCK).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Receives what [`send`] sends, and nothing else.
fn receive(stream: &mut TcpStream) {
    let mut received = vec![0; BLOCK.len()];
    for number in 0..BLOCKS {
        stream.read_exact(&mut received).unwrap();
        // Not assert_eq!: nobody wants to read the difference.
        assert!(received == *BLOCK, "block {number} differs");
    }
    assert_eq!(stream.read(&mut received).unwrap(), 0);
}

/// Sends datagrams to whoever sent one first and sends them back, and returns how many that were and how many did not
/// come back.
fn exchange(socket: &UdpSocket) -> (usize, usize) {
    let mut buffer = vec![0; 65_536];
    let (_, peer) = socket.recv_from(&mut buffer).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let bytes = noise(65_536);
    let (mut sent, mut lost) = (0, 0);
    for length in DATAGRAMS {
        let burst = (BURST_BYTES / length).min(BURST);
        for _ in 0..OF_EACH / burst {
            sent += burst;
            for _ in 0..burst {
                socket.send_to(&bytes[..length], peer).unwrap();
            }
            for arrived in 0..burst {
                let Ok(received) = socket.recv(&mut buffer) else {
                    lost += burst - arrived;
                    break;
                };
                assert!(buffer[..received] == bytes[..length], "{received} bytes");
            }
        }
    }
    // Which is the end for what sends them back.
    socket.send_to(&[], peer).unwrap();
    socket.set_read_timeout(None).unwrap();
    (sent, lost)
}

#[test]
fn streams_connections_and_datagrams_arrive() {
    let world = World::new().unwrap();
    let pod = bridged("jumbo", 80, 9000);
    let listener = |port: u16| TcpListener::bind(("::", port)).unwrap();
    let (short, there, back, echo) = (
        listener(7010),
        listener(7011),
        listener(7012),
        listener(7013),
    );
    let datagrams = UdpSocket::bind("10.80.0.1:7014").unwrap();
    let mut sums = Vec::new();
    for runtime in BOTH {
        let image = world.container(runtime, "debian").unwrap();
        let container = image
            .options(pod.options())
            .start(&["tail", "-f", "/dev/null"])
            .unwrap();
        let shell = |script: &str| {
            let call = container.exec(&["bash", "-c", script]);
            call.output().unwrap().success().unwrap()
        };
        assert_eq!(
            shell("cat /sys/class/net/eth0/mtu"),
            "9000\n",
            "{runtime:?}"
        );
        let mut number = 0;
        each_of(&short, CONNECTIONS, move |mut stream, _| {
            writeln!(stream, "{number}").unwrap();
            number += 1;
        });
        let sum = shell(&format!(
            "for ((i = 0; i < {CONNECTIONS}; i++)); do \
             read -r number </dev/tcp/10.80.0.1/7010; ((sum += number)); done; echo $sum"
        ));
        let expected = CONNECTIONS * (CONNECTIONS - 1) / 2;
        assert_eq!(sum, format!("{expected}\n"), "{runtime:?}");

        each_of(&there, 1, |mut stream, _| {
            stream.write_all(&BLOCK).unwrap();
        });
        shell("cat </dev/tcp/10.80.0.1/7011 >/tmp/block");
        each_of(&there, 1, |mut stream, _| send(&mut stream));
        sums.push(shell("cksum </dev/tcp/10.80.0.1/7011"));
        let back = each_of(&back, 1, |mut stream, _| receive(&mut stream));
        shell(&format!(
            "for ((i = 0; i < {BLOCKS}; i++)); do cat /tmp/block; done >/dev/tcp/fd80::1/7012"
        ));
        back.join().unwrap();
        let echoed = each_of(&echo, 1, |mut stream, _| {
            let mut sender = stream.try_clone().unwrap();
            thread::spawn(move || send(&mut sender));
            receive(&mut stream);
        });
        shell("exec 3<>/dev/tcp/fd80::1/7013; cat <&3 >&3");
        echoed.join().unwrap();

        let socket = datagrams.try_clone().unwrap();
        let exchanged = thread::spawn(move || exchange(&socket));
        shell("exec 3<>/dev/udp/10.80.0.1/7014; echo >&3; dd bs=65536 status=none <&3 >&3");
        let (sent, lost) = exchanged.join().unwrap();
        println!("{runtime:?}: {lost} of {sent} datagrams lost");
        assert!(
            lost * 100 <= sent,
            "{runtime:?}: {lost} of {sent} datagrams"
        );
        container.delete().unwrap();
    }
    // Of the same bytes: each container has the sum of what it received.
    assert!(
        sums[0].ends_with(&format!(" {}\n", BLOCKS * BLOCK.len())),
        "{sums:?}"
    );
    assert_eq!(sums[0], sums[1]);
    pod.remove().unwrap();
    world.finish().unwrap();
}

/// Lengths of echoes' data around those at which a packet of 1,500 bytes, and a fragment more, is full.
fn payloads(first: u32) -> String {
    let fragment = first / 8 * 8 + 8;
    let mut lengths = vec![0, 1, 8];
    for full in [first, first + fragment, first + 2 * fragment] {
        lengths.extend(full - 2..=full + 2);
    }
    lengths.extend([65_499, 65_500, 65_506, 65_507]);
    let lengths: Vec<_> = lengths.iter().map(u32::to_string).collect();
    lengths.join(" ")
}

/// Packets of many lengths, and a link that is down for a while.
#[test]
fn packets_of_all_lengths_pass_and_a_link_comes_back() {
    let world = World::new().unwrap();
    let mut pod = Pod::new().unwrap();
    let made = pod
        .attach("eth0", "lengths", &[bridge("lengths0", 82, 1500)])
        .unwrap();
    // The bridge, the host's end of the pair, the pod's.
    let port = made["interfaces"][1]["name"].as_str().unwrap();
    let listener = TcpListener::bind("10.82.0.1:7020").unwrap();
    let pings = format!(
        "for s in {}; do ping -c 1 -W 60 -s $s 10.82.0.1 >/dev/null || echo $s is lost; done; \
         for s in {}; do ping6 -c 1 -W 60 -s $s fd82::1 >/dev/null || echo $s of IPv6 is lost; done; echo done",
        payloads(1472),
        payloads(1452),
    );
    for runtime in BOTH {
        let container = start_in(&world, runtime, &pod, &[]);
        assert_eq!(exec(&container, &pings), "done\n", "{runtime:?}");
        let port = port.to_owned();
        each_of(&listener, 1, move |mut stream, _| {
            stream.write_all(b"before\n").unwrap();
            ip(&format!("link set {port} down"));
            stream.write_all(b"between\n").unwrap();
            ip(&format!("link set {port} up"));
            stream.write_all(b"after\n").unwrap();
        });
        let said = exec(&container, "nc 10.82.0.1 7020 </dev/null");
        assert_eq!(said, "before\nbetween\nafter\n", "{runtime:?}");
        container.delete().unwrap();
    }
    pod.remove().unwrap();
    world.finish().unwrap();
}
