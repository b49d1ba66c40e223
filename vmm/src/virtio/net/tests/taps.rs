//! The device on taps of the kernel's, in a network namespace of their own.

use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_UP, IFF_VNET_HDR, c_short, ifreq};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::testing::own_descriptors;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const PORT: u16 = 777;

const USUAL: i32 = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;

/// Puts the calling thread, which is the test's own, into a network namespace of its own. Its taps go away as soon as it closes them.
fn leave_network() {
    own_descriptors();
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
}

fn request(name: &str) -> ifreq {
    // SAFETY: an all-zero request is a valid one.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(file: &impl AsRawFd, number: libc::Ioctl, request: &mut ifreq) {
    // SAFETY: the tests' requests take this argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number, &raw mut *request) };
    Errno::result(result).unwrap();
}

/// A queue of a tap, which is made if there is none of that name.
fn tap(name: &str, flags: i32) -> OwnedFd {
    let mut options = OpenOptions::new();
    let file: File = options.read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = flags as c_short;
    ioctl(&file, libc::TUNSETIFF, &mut request);
    file.into()
}

/// Gives an interface the host's address and brings it up.
fn bring_up(name: &str) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut request = request(name);
    request.ifr_ifru.ifru_addr = address(HOST);
    ioctl(&socket, libc::SIOCSIFADDR, &mut request);
    request.ifr_ifru.ifru_addr = address(Ipv4Addr::new(255, 255, 255, 0));
    ioctl(&socket, libc::SIOCSIFNETMASK, &mut request);
    request.ifr_ifru.ifru_flags = IFF_UP as c_short;
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut request);
}

fn address(address: Ipv4Addr) -> libc::sockaddr {
    let [a, b, c, d] = address.octets().map(|byte| byte as libc::c_char);
    let mut data = [0; 14];
    data[2..6].copy_from_slice(&[a, b, c, d]);
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

/// The tap's own hardware address.
fn tap_mac(name: &str) -> [u8; 6] {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut request = request(name);
    ioctl(&socket, libc::SIOCGIFHWADDR, &mut request);
    // SAFETY: the kernel has filled the address in.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    std::array::from_fn(|index| data[index] as u8)
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| match word {
        [a, b] => u32::from(u16::from_be_bytes([*a, *b])),
        rest => u32::from(rest[0]) << 8,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A UDP packet from the guest to the host, whose checksum is the host's to complete, with its header.
fn udp(to: [u8; 6], payload: &[u8], segment: Option<u16>) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut header = [0; HEADER];
    header[0] = 1;
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&6u16.to_le_bytes());
    if let Some(segment) = segment {
        header[1] = 5;
        header[2..4].copy_from_slice(&42u16.to_le_bytes());
        header[4..6].copy_from_slice(&segment.to_le_bytes());
    }
    let mut packet = vec![0x45, 0];
    packet.extend((20 + length).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(GUEST.octets());
    packet.extend(HOST.octets());
    let checksum = !sum(&packet);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut pseudo = packet[12..20].to_vec();
    pseudo.extend([0, 17]);
    pseudo.extend(length.to_be_bytes());
    let mut udp = PORT.to_be_bytes().to_vec();
    udp.extend(PORT.to_be_bytes());
    udp.extend(length.to_be_bytes());
    udp.extend(sum(&pseudo).to_be_bytes());
    [&header[..], &to, &MAC, &[8, 0], &packet, &udp, payload].concat()
}

/// The answer to the host's question who the guest is.
fn arp_reply(to: [u8; 6]) -> Vec<u8> {
    let packet = [
        &[0, 1, 8, 0, 6, 4, 0, 2][..],
        &MAC,
        &GUEST.octets(),
        &to,
        &HOST.octets(),
    ];
    [&[0; HEADER][..], &to, &MAC, &[8, 6], &packet.concat()].concat()
}

/// The next frame that is UDP over IPv4, with its header. The kernel has other things to say, too.
fn receive_udp(rig: &mut Rig<'_>, to: [u8; 6]) -> Vec<u8> {
    loop {
        let bytes = rig.receive();
        rig.give(1, 4096);
        match (&bytes[HEADER + 12..HEADER + 14], bytes[HEADER + 23]) {
            ([8, 6], _) => rig.send(&arp_reply(to), &[]),
            ([8, 0], 17) => return bytes,
            _ => {}
        }
    }
}

#[test]
fn the_kernel_and_the_guest_leave_work_to_each_other() {
    leave_network();
    let machine = Machine::default();
    let net = Net::new(&nic(1), vec![tap("t0", USUAL)]).unwrap();
    bring_up("t0");
    let to = tap_mac("t0");
    let socket = UdpSocket::bind((HOST, PORT)).unwrap();
    let payload = Random(3).bytes(4000);
    for features in [ALL, !(1 << VIRTIO_NET_F_GUEST_CSUM)] {
        let mut rig = Rig::new(&machine, &net, features);
        rig.give(200, 4096);
        let mut received = vec![0; 5000];

        // The guest's checksum and segments are the kernel's to make.
        rig.send(&udp(to, &payload[..1000], None), &[]);
        let (length, from) = socket.recv_from(&mut received).unwrap();
        assert!(received[..length] == payload[..1000]);
        assert_eq!(from, (GUEST, PORT).into());
        if rig.driver.offered() & 1 << VIRTIO_NET_F_HOST_USO != 0 {
            rig.send(&udp(to, &payload, Some(1000)), &[]);
            for part in payload.chunks(1000) {
                let length = socket.recv(&mut received).unwrap();
                assert!(received[..length] == *part);
            }
        }
        // A segment of nothing is the kernel's to refuse.
        let refused = net.dropped().refused;
        rig.send(&udp(to, &payload, Some(0)), &[]);
        assert_eq!(net.dropped().refused, refused + 1);

        // The kernel's checksum is the guest's to make, if the guest has agreed to that.
        socket.send_to(&payload[..900], (GUEST, PORT)).unwrap();
        let bytes = receive_udp(&mut rig, to);
        let udp = &bytes[HEADER + 34..];
        assert!(udp[8..] == payload[..900]);
        let mut whole = bytes[HEADER + 26..HEADER + 34].to_vec();
        whole.extend([0, 17]);
        whole.extend(&udp[4..6]);
        let pseudo = sum(&whole);
        whole.extend(udp);
        if features == ALL {
            assert_eq!(bytes[0], 1);
            assert_eq!(udp[6..8], pseudo.to_be_bytes());
        } else {
            assert_eq!(bytes[..HEADER], [0; HEADER]);
            assert_eq!(sum(&whole), 0xffff);
        }
        rig.driver.set_status(0);
        machine.bus.detach(rig.driver.slot).unwrap();
    }
    assert_eq!(net.dropped().spoofed, 0);
}

#[test]
fn an_interface_that_goes_away_takes_nothing_with_it() {
    leave_network();
    let machine = Machine::default();
    let net = Net::new(&nic(1), vec![tap("t0", USUAL)]).unwrap();
    let mut rig = Rig::new(&machine, &net, ALL);
    rig.give(200, 4096);
    // It is down.
    rig.send(&frame(MAC, 100, 1), &[]);
    assert_eq!(net.dropped().refused, 1);
    bring_up("t0");
    let to = tap_mac("t0");
    rig.send(&udp(to, &[1], None), &[]);
    assert_eq!(net.dropped().refused, 1);
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut down = request("t0");
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut down);
    rig.send(&udp(to, &[1], None), &[]);
    assert_eq!(net.dropped().refused, 2);
    bring_up("t0");
    let socket = UdpSocket::bind((HOST, PORT)).unwrap();
    rig.send(&udp(to, &[7], None), &[]);
    assert_eq!(socket.recv(&mut [0; 10]).unwrap(), 1);
    socket.send_to(&[9], (GUEST, PORT)).unwrap();
    assert_eq!(receive_udp(&mut rig, to).last(), Some(&9));
}

/// The control queue of a device with two pairs.
struct Commands<'a> {
    queue: DriverQueue<'a>,
}

impl Commands<'_> {
    fn run(&mut self, driver: &Driver<'_>, bytes: &[u8]) -> u8 {
        let ram = &driver.machine.ram;
        ram.write_slice(bytes, GuestAddress(COMMAND)).unwrap();
        let length = bytes.len() as u32;
        self.queue
            .add(&[(COMMAND, length, 0), (COMMAND + 64, 1, WRITE)]);
        driver.kick(4);
        while self.queue.take_used().is_none() {
            driver.wait(5);
        }
        ram.read_obj(GuestAddress(COMMAND + 64)).unwrap()
    }
}

#[test]
fn a_driver_says_how_many_pairs_it_uses() {
    leave_network();
    let machine = Machine::default();
    let flags = USUAL | IFF_MULTI_QUEUE;
    let taps = vec![tap("t0", flags), tap("t0", flags)];
    let net = Net::new(&nic(2), taps).unwrap();
    bring_up("t0");
    let to = tap_mac("t0");
    let driver = machine.attach(net.clone());
    assert_eq!(driver.read_u16(driver.device + 8), 2);
    assert_eq!(driver.read_u16(driver.common + 0x12), 5);

    let features = driver.negotiate(ALL);
    assert_ne!(features & MQ, 0);
    let mut rx: Vec<_> = [0, 2]
        .map(|index| driver.set_up_queue(index, QUEUES + u64::from(index) * 0x1_0000, features))
        .into();
    let mut tx: Vec<_> = [1, 3]
        .map(|index| driver.set_up_queue(index, QUEUES + u64::from(index) * 0x1_0000, features))
        .into();
    let queue = driver.set_up_queue(4, QUEUES + 0x4_0000, features);
    let mut commands = Commands { queue };
    driver.set_status(15);

    for (bytes, expected) in [
        (&[4, 0, 2, 0][..], 0),
        (&[4, 0, 1, 0], 0),
        (&[4, 0, 1, 0], 0),
        (&[4, 0, 2, 0], 0),
        (&[4, 0, 0, 0], 1),
        (&[4, 0, 3, 0], 1),
        (&[4, 0, 0, 128], 1),
        (&[4, 0, 2], 1),
        (&[4, 1, 2, 0], 1),
        (&[0, 0, 1], 1),
        (&[1, 1, 2, 2, 2, 2, 2, 2], 1),
        (&[4], 1),
        (&[], 1),
    ] {
        assert_eq!(commands.run(&driver, bytes), expected, "{bytes:?}");
    }

    // What a pair sends, the kernel answers on that pair.
    let socket = UdpSocket::bind((HOST, PORT)).unwrap();
    let mut rigs = Vec::new();
    let mut driver = Some(driver);
    for index in [1u16, 0] {
        let mut rig = Rig {
            driver: driver.take().unwrap(),
            rx: rx.pop().unwrap(),
            tx: tx.pop().unwrap(),
            index: index * 2,
        };
        rig.give(60, 4096);
        rig.send(&arp_reply(to), &[]);
        for seed in 0..20 {
            rig.send(&udp(to, &[index as u8, seed], None), &[]);
            let mut received = [0; 10];
            let (length, from) = socket.recv_from(&mut received).unwrap();
            assert_eq!(received[..length], [index as u8, seed]);
            socket.send_to(&received[..length], from).unwrap();
        }
        let Rig {
            driver: d, rx, tx, ..
        } = rig;
        driver = Some(d);
        rigs.push((rx, tx));
    }
    drop(rigs);

    // Without the control queue, there is one pair; with it alone, nothing works.
    let driver = driver.unwrap();
    driver.set_status(0);
    let mut rig = Rig::start(driver, ALL & !MQ & !(1 << VIRTIO_NET_F_CTRL_VQ));
    rig.give(100, 4096);
    // Until its thread runs, the kernel may still choose the pair that nobody reads.
    rig.send(&udp(to, &[2], None), &[]);
    let mut received = [0; 10];
    socket.recv_from(&mut received).unwrap();
    for port in 1000..1040 {
        socket.send_to(&[3], (GUEST, port)).unwrap();
        receive_udp(&mut rig, to);
    }
    let rig = rig.restart(ALL & !MQ);
    assert_eq!(rig.driver.status(), 15 | 0x40);
}

#[test]
fn other_taps_are_refused() {
    leave_network();
    let refused = |pairs, files: Vec<OwnedFd>, words: &[&str]| {
        let error = Net::new(&nic(pairs), files).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    };
    let plain = OpenOptions::new().read(true).open("/dev/net/tun").unwrap();
    refused(1, vec![plain.into()], &["no tap"]);
    for flags in [
        IFF_TAP | IFF_NO_PI,
        libc::IFF_TUN | IFF_NO_PI | IFF_VNET_HDR,
    ] {
        refused(1, vec![tap("t1", flags)], &["flags are", "IFF_VNET_HDR"]);
    }
    let other = tap("t3", USUAL | IFF_MULTI_QUEUE);
    let files = vec![tap("t2", USUAL | IFF_MULTI_QUEUE), other];
    refused(2, files, &["descriptor 1", "\"t3\"", "same tap"]);
    let files = vec![tap("t4", USUAL), tap("t5", USUAL)];
    refused(2, files, &["IFF_MULTI_QUEUE"]);
}
