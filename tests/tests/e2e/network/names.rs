//! Names: what the files of the network say that container engines mount, and what a server says of the others.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::thread;

use bulkhead_tests::cni::Pod;
use bulkhead_tests::ctr::World;
use serde_json::json;

use super::{BOTH, each_of, exec, start_in};

/// The host in the container's network, which is called `server.test`.
const HOST: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(10, 81, 0, 1),
    Ipv6Addr::new(0xfd81, 0, 0, 0, 0, 0, 0, 1),
);

/// What a question's name is in a message of DNS (RFC 1035, section 3.1).
const NAME: &[u8] = b"\x06server\x04test\x00";

/// Answers questions for the addresses of `server.test`, and knows nothing else, until it is sent something that is no question.
fn answer(socket: &UdpSocket) {
    let mut message = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut message).unwrap();
        let Some((id, rest)) = message[..length].split_at_checked(12) else {
            return;
        };
        let address = match rest.strip_prefix(NAME) {
            Some([0, 1, 0, 1, ..]) => HOST.0.octets().to_vec(),
            Some([0, 28, 0, 1, ..]) => HOST.1.octets().to_vec(),
            _ => Vec::new(),
        };
        let (answers, code) = match address.len() {
            0 => (0, 3),
            _ => (1, 0),
        };
        let end = rest.iter().position(|byte| *byte == 0).unwrap() + 5;
        let mut reply = id[..2].to_vec();
        reply.extend([0x81, 0x80 | code, 0, 1, 0, answers, 0, 0, 0, 0]);
        reply.extend(&rest[..end]);
        if answers > 0 {
            // The question's name, type and class; a time to live, the length.
            reply.extend([0xc0, 12]);
            reply.extend(&rest[end - 4..end]);
            reply.extend([0, 0, 0, 60, 0, address.len() as u8]);
            reply.extend(address);
        }
        socket.send_to(&reply, from).unwrap();
    }
}

#[test]
fn names_lead_to_addresses() {
    let world = World::new().unwrap();
    let mut pod = Pod::new().unwrap();
    let bridge = json!({
        "type": "bridge", "bridge": "names0", "isGateway": true,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": "10.81.0.0/24"}], [{"subnet": "fd81::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    });
    pod.attach("eth0", "names", &[bridge]).unwrap();
    let server = UdpSocket::bind((HOST.0, 53)).unwrap();
    let pages = TcpListener::bind((HOST.0, 80)).unwrap();
    let script = "cat /etc/resolv.conf /etc/hosts /etc/hostname; nslookup server.test; nslookup nobody.test; \
                  ping -c 1 -W 60 neighbour | head -n 1; nc server.test 80 </dev/null; \
                  echo more >>/etc/hosts && tail -n 1 /etc/hosts; echo more >>/etc/resolv.conf || ls -l /etc/hosts | cut -c 1-10";
    let asked = server.try_clone().unwrap();
    thread::spawn(move || answer(&asked));
    each_of(&pages, BOTH.len(), |_, _| ());
    let [runc, bulkhead] = BOTH.map(|runtime| {
        let directory = tempfile::tempdir().unwrap();
        let mounts = [
            ("resolv.conf", format!("nameserver {}\n", HOST.0), "ro"),
            ("hosts", format!("{} neighbour\n", HOST.0), "rw"),
            ("hostname", "inside\n".into(), "ro"),
        ];
        let options = mounts.map(|(name, content, option)| {
            let path = directory.path().join(name);
            fs::write(&path, content).unwrap();
            let path = path.display();
            [
                "--mount".into(),
                format!("type=bind,src={path},dst=/etc/{name},options=rbind:{option}"),
            ]
        });
        let container = start_in(&world, runtime, &pod, &options.concat());
        let said = exec(&container, script);
        container.delete().unwrap();
        said
    });
    server.send_to(&[], server.local_addr().unwrap()).unwrap();
    for line in [
        "nameserver 10.81.0.1",
        "inside",
        "Address: 10.81.0.1",
        "Address: fd81::1",
        "PING neighbour (10.81.0.1): 56 data bytes",
        "more",
        "-rw-r--r--",
    ] {
        assert!(
            runc.lines().any(|found| found == line),
            "{line:?} is not in {runc}"
        );
    }
    assert_eq!(runc, bulkhead);
    pod.remove().unwrap();
    world.finish().unwrap();
}
