//! The device between a guest's driver, which sees it through the PCI bus, and sockets.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vm_memory::{Bytes, GuestAddress};

use super::hub::MAX_FROM_GUEST;
use super::packet::{HEADER, HOST_CID, Header, Operation, TYPE_STREAM};
use super::stream::BUFFER;
use super::*;
use crate::virtio::testing::*;

const CID: u64 = 3;
/// The host's port that the guest may connect to.
const PORT: u32 = 1024;

// Where the driver has its things in guest memory.
const QUEUES: u64 = 0x10_0000;
const RX_BUFFERS: u64 = 0x40_0000;
const TX_BUFFERS: u64 = 0x80_0000;
/// Size of a receive buffer; Linux's are nearly a page.
const RX_BUFFER: u32 = 3776;
/// Room for a packet in the transmit buffers.
const TX_BUFFER: u64 = 0x2_0000;

const SEND: u32 = 2;
const RECEIVE: u32 = 1;

/// A guest with its driver, and the host that drives the device.
struct Rig<'a> {
    driver: Driver<'a>,
    vsock: Vsock,
    rx: DriverQueue<'a>,
    tx: DriverQueue<'a>,
    opened: Vec<Opened>,
}

impl<'a> Rig<'a> {
    /// A guest whose receive queue has `buffers` buffers.
    fn new(machine: &'a Machine, buffers: u16) -> Self {
        let vsock = Vsock::new(CID, vec![PORT, 7]).unwrap();
        let driver = machine.attach(vsock.clone());
        Self::start(driver, vsock, buffers)
    }

    fn start(driver: Driver<'a>, vsock: Vsock, buffers: u16) -> Self {
        let features = driver.negotiate(u64::MAX);
        let rx = driver.set_up_queue(0, QUEUES, features);
        let tx = driver.set_up_queue(1, QUEUES + 0x1_0000, features);
        driver.set_up_queue(2, QUEUES + 0x2_0000, features);
        driver.set_status(15);
        let mut rig = Self {
            driver,
            vsock,
            rx,
            tx,
            opened: Vec::new(),
        };
        rig.give(buffers);
        rig.driver.kick(2);
        rig
    }

    /// Gives the device receive buffers.
    fn give(&mut self, buffers: u16) {
        for _ in 0..buffers {
            let at = RX_BUFFERS + u64::from(self.rx.next_descriptor()) * 4096;
            self.rx.add(&[(at, RX_BUFFER, WRITE)]);
        }
        self.driver.kick(0);
    }

    /// Whether the device has something to do.
    fn is_busy(&self) -> bool {
        let mut descriptors = [PollFd::new(self.vsock.descriptor(), PollFlags::POLLIN)];
        poll(&mut descriptors, PollTimeout::ZERO).unwrap() == 1
    }

    /// Lets the device do what it has to do, which must come to an end.
    fn pump(&mut self) {
        for _ in 0..10_000 {
            if !self.is_busy() {
                return;
            }
            self.opened.extend(self.vsock.process().unwrap());
        }
        panic!("the device does not come to rest");
    }

    /// Sends a packet, in pieces of the given lengths (the last one as long as the rest).
    fn send_pieces(&mut self, header: &Header, payload: &[u8], pieces: &[usize]) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(payload);
        let at = TX_BUFFERS + u64::from(self.tx.next_descriptor()) * TX_BUFFER;
        let ram = &self.driver.machine.ram;
        ram.write_slice(&bytes, GuestAddress(at)).unwrap();
        let mut buffers = Vec::new();
        let mut start = 0;
        for &piece in pieces.iter().chain([&usize::MAX]) {
            let length = piece.min(bytes.len() - start);
            if length > 0 {
                buffers.push((at + start as u64, length as u32, 0));
            }
            start += length;
        }
        self.tx.add(&buffers);
        self.driver.kick(1);
    }

    fn send(&mut self, header: &Header, payload: &[u8]) {
        self.send_pieces(header, payload, &[]);
        self.pump();
        while self.tx.take_used().is_some() {}
    }

    /// The next packet from the device; its buffer is given back.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let packet = self.receive_and_keep()?;
        self.give(1);
        Some(packet)
    }

    fn receive_and_keep(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, length) = self.rx.take_used()?;
        let at = RX_BUFFERS + u64::from(head) * 4096;
        let ram = &self.driver.machine.ram;
        let mut bytes = [0; HEADER];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let header = Header::from_bytes(&bytes);
        assert_eq!(length, HEADER as u32 + header.length);
        let mut payload = vec![0; header.length as usize];
        let at = GuestAddress(at + HEADER as u64);
        ram.read_slice(&mut payload, at).unwrap();
        assert_eq!((header.source_cid, header.destination_cid), (HOST_CID, CID));
        Some((header, payload))
    }

    /// The next packet, which must be this one.
    #[track_caller]
    fn expect(&mut self, operation: Operation) -> Header {
        self.pump();
        let (header, _) = self.receive().expect("a packet");
        assert_eq!(header.operation, operation, "{header:?}");
        header
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        self.pump();
        let packet = self.receive();
        assert!(packet.is_none(), "{packet:?}");
    }

    /// Opens a stream from the guest's port to the host's.
    fn open(&mut self, guest: u32) -> (Peer, UnixStream) {
        let mut peer = Peer::new(PORT, guest);
        self.send(&peer.header(Operation::Request), &[]);
        let response = self.expect(Operation::Response);
        assert_eq!(
            (response.source_port, response.destination_port),
            (PORT, guest)
        );
        peer.note(&response);
        let opened = self.opened.pop().unwrap();
        assert_eq!(opened.port, PORT);
        let stream = UnixStream::from(opened.stream);
        stream.set_nonblocking(true).unwrap();
        (peer, stream)
    }

    /// Number of streams that the device knows.
    fn streams(&self) -> usize {
        self.vsock.0.lock().hub.count()
    }
}

/// The guest's end of a stream: its ports and its account of the credit.
#[derive(Debug)]
struct Peer {
    host: u32,
    guest: u32,
    /// What the guest says of itself.
    buffer: u32,
    forwarded: u32,
    /// What the device has said, and what was sent to it.
    room: u32,
    taken: u32,
    sent: u32,
}

impl Peer {
    fn new(host: u32, guest: u32) -> Self {
        Self {
            host,
            guest,
            buffer: 65_536,
            forwarded: 0,
            room: 0,
            taken: 0,
            sent: 0,
        }
    }

    fn header(&self, operation: Operation) -> Header {
        Header {
            source_cid: CID,
            destination_cid: HOST_CID,
            source_port: self.guest,
            destination_port: self.host,
            length: 0,
            kind: TYPE_STREAM,
            operation,
            flags: 0,
            buffer: self.buffer,
            forwarded: self.forwarded,
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(Operation::Shutdown)
        }
    }

    fn data(&mut self, length: usize) -> Header {
        self.sent = self.sent.wrapping_add(length as u32);
        Header {
            length: length as u32,
            ..self.header(Operation::Data)
        }
    }

    fn note(&mut self, header: &Header) {
        self.room = header.buffer;
        self.taken = header.forwarded;
    }

    fn credit(&self) -> u32 {
        self.room - self.sent.wrapping_sub(self.taken)
    }
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    all
}

fn is_at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

#[test]
fn the_guest_connects_where_it_may() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    assert_eq!(rig.driver.read_u32(rig.driver.device), CID as u32);
    let (_peer, mut stream) = rig.open(5000);
    assert_eq!(read_all(&mut stream), b"");
    for port in [0, 1, 1023, 1025, 1 << 30, u32::MAX] {
        let peer = Peer::new(port, 5001);
        rig.send(&peer.header(Operation::Request), &[]);
        let reset = rig.expect(Operation::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (port, 5001));
    }
    assert!(rig.opened.is_empty());
    assert_eq!(rig.streams(), 1);
    // The same ports a second time: the guest has lost track, and both are gone.
    rig.send(&Peer::new(PORT, 5000).header(Operation::Request), &[]);
    rig.expect(Operation::Reset);
    assert!(is_at_end(&mut stream));
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_host_connects_and_what_it_wrote_before_arrives_after() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut host, device) = UnixStream::pair().unwrap();
    host.write_all(b"early").unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    let request = rig.expect(Operation::Request);
    assert_eq!(request.destination_port, 9000);
    assert_eq!(request.buffer, BUFFER);
    rig.expect_nothing();

    let mut peer = Peer::new(request.source_port, 9000);
    rig.send(&peer.header(Operation::Response), &[]);
    let (header, payload) = rig.receive().unwrap();
    assert_eq!(
        (header.operation, &payload[..]),
        (Operation::Data, &b"early"[..])
    );
    let data = peer.data(4);
    rig.send(&data, b"late");
    let mut answer = [0; 4];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"late");
    rig.expect_nothing();
}

#[test]
fn the_host_connects_to_nobody() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    // The guest refuses.
    let (mut host, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    let request = rig.expect(Operation::Request);
    let peer = Peer::new(request.source_port, 9000);
    rig.send(&peer.header(Operation::Reset), &[]);
    assert!(is_at_end(&mut host));
    rig.expect_nothing();
    assert_eq!(rig.streams(), 0);
    // The host gives up before the guest has answered.
    let (host, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    let request = rig.expect(Operation::Request);
    drop(host);
    let reset = rig.expect(Operation::Reset);
    assert_eq!(reset.source_port, request.source_port);
    assert_eq!(rig.streams(), 0);
    // The host gives up before the guest has been asked.
    let (host, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    drop(host);
    rig.expect_nothing();
    assert_eq!(rig.streams(), 0);
    // The guest answers with something else.
    for operation in [
        Operation::Data,
        Operation::Shutdown,
        Operation::CreditUpdate,
    ] {
        let (mut host, device) = UnixStream::pair().unwrap();
        rig.vsock.connect(9000, device.into()).unwrap();
        let request = rig.expect(Operation::Request);
        let peer = Peer::new(request.source_port, 9000);
        rig.send(&peer.header(operation), &[]);
        rig.expect(Operation::Reset);
        assert!(is_at_end(&mut host));
    }
    // It is no socket at all.
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let error = rig.vsock.connect(9000, file.into()).unwrap_err();
    assert!(error.to_string().contains("EPERM"), "{error}");
    assert_eq!(rig.streams(), 0);
}

#[test]
fn connections_wait_for_the_driver_and_survive_its_reset_until_it_knows_them() {
    let machine = Machine::default();
    let vsock = Vsock::new(CID, vec![PORT]).unwrap();
    let (mut host, device) = UnixStream::pair().unwrap();
    host.write_all(b"early").unwrap();
    vsock.connect(9000, device.into()).unwrap();
    let driver = machine.attach(vsock.clone());
    let mut rig = Rig::start(driver, vsock, 0);
    rig.pump();
    rig.driver.set_status(0);
    let mut rig = Rig::start(rig.driver, rig.vsock, 4);
    rig.expect(Operation::Request);
    let (mut peer, mut opened) = rig.open(5000);
    let data = peer.data(5);
    rig.send(&data, b"hello");
    // Now the guest knows them, and with its driver they are gone.
    rig.driver.set_status(0);
    let error = host.read(&mut [0]).unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::ConnectionReset,
        "\"early\" was not read"
    );
    let mut received = Vec::new();
    opened.read_to_end(&mut received).unwrap();
    assert_eq!(received, b"hello");
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_host_half_closes() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    rig.pump();
    let (header, payload) = rig.receive().unwrap();
    assert_eq!(
        (header.operation, &payload[..]),
        (Operation::Data, &b"question"[..])
    );
    assert_eq!(rig.expect(Operation::Shutdown).flags, SEND);
    rig.expect_nothing();

    let data = peer.data(6);
    rig.send(&data, b"answer");
    assert_eq!(read_all(&mut host), b"answer");
    rig.send(&peer.shutdown(SEND), &[]);
    assert!(is_at_end(&mut host));
    // The host has nothing left to do with it; the guest hears of that and confirms.
    drop(host);
    assert_eq!(rig.expect(Operation::Shutdown).flags, SEND | RECEIVE);
    rig.send(&peer.header(Operation::Reset), &[]);
    rig.expect_nothing();
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_guest_half_closes() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    let data = peer.data(8);
    rig.send(&data, b"question");
    rig.send(&peer.shutdown(SEND), &[]);
    let mut question = Vec::new();
    host.read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");
    host.write_all(b"answer").unwrap();
    rig.pump();
    let (header, payload) = rig.receive().unwrap();
    assert_eq!(
        (header.operation, &payload[..]),
        (Operation::Data, &b"answer"[..])
    );
    // It may not send any more after that.
    let data = peer.data(1);
    rig.send(&data, b"x");
    rig.expect(Operation::Reset);
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_guest_stops_receiving() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    rig.send(&peer.shutdown(RECEIVE), &[]);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    let data = peer.data(4);
    rig.send(&data, b"more");
    assert_eq!(read_all(&mut host), b"more");
    rig.send(&peer.shutdown(SEND), &[]);
    rig.expect(Operation::Reset);
    assert!(is_at_end(&mut host));
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_host_closes() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    host.write_all(b"last words").unwrap();
    drop(host);
    rig.pump();
    let (header, payload) = rig.receive().unwrap();
    assert_eq!(
        (header.operation, &payload[..]),
        (Operation::Data, &b"last words"[..])
    );
    assert_eq!(rig.expect(Operation::Shutdown).flags, SEND | RECEIVE);
    // What the guest has sent meanwhile is taken and goes nowhere.
    let data = peer.data(3);
    rig.send(&data, b"oh?");
    rig.expect_nothing();
    assert_eq!(rig.streams(), 1);
    rig.send(&peer.header(Operation::Reset), &[]);
    rig.expect_nothing();
    assert_eq!(rig.streams(), 0);
    // With something left unread at the host's end, the system tells of a reset instead of an end.
    let (mut peer, host) = rig.open(5000);
    let data = peer.data(6);
    rig.send(&data, b"unread");
    drop(host);
    assert_eq!(rig.expect(Operation::Shutdown).flags, SEND | RECEIVE);
}

#[test]
fn the_guest_closes_and_the_host_gets_what_it_sent() {
    for last in [Operation::Shutdown, Operation::Reset] {
        let machine = Machine::default();
        let mut rig = Rig::new(&machine, 32);
        let (mut peer, mut host) = rig.open(5000);
        let mut random = Random(3);
        let mut sent = Vec::new();
        // More than the socket takes at once.
        while peer.credit() > 0 {
            let data = random.bytes(peer.credit().min(65_536) as usize);
            let header = peer.data(data.len());
            rig.send(&header, &data);
            while let Some((header, _)) = rig.receive() {
                peer.note(&header);
            }
            sent.extend(data);
        }
        assert!(sent.len() > BUFFER as usize);
        let mut header = peer.shutdown(SEND | RECEIVE);
        header.operation = last;
        rig.send(&header, &[]);
        if last == Operation::Shutdown {
            rig.expect(Operation::Reset);
        }
        // The guest can use its port again at once.
        let (_peer, _host) = rig.open(5000);
        let mut received = Vec::new();
        while received.len() < sent.len() {
            received.extend(read_all(&mut host));
            rig.pump();
        }
        assert!(received == sent);
        assert!(is_at_end(&mut host));
        assert_eq!(rig.streams(), 1);
    }
}

#[test]
fn credit_binds_the_guest() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    let mut sent = 0;
    while peer.credit() > 0 {
        let length = peer.credit().min(60_000) as usize;
        let header = peer.data(length);
        rig.send(&header, &vec![0x5a; length]);
        sent += length;
        while let Some((header, _)) = rig.receive() {
            assert_eq!(header.operation, Operation::CreditUpdate);
            peer.note(&header);
        }
    }
    // What the socket has not taken is exactly the buffer.
    rig.expect_nothing();
    // The guest is told when half of it is free again, without having to ask.
    let mut half = vec![0; BUFFER as usize];
    let mut read = 0;
    while read < 200_000 {
        read += host.read(&mut half[..50_000]).unwrap();
        rig.pump();
    }
    let update = rig.expect(Operation::CreditUpdate);
    peer.note(&update);
    assert!(peer.credit() >= BUFFER / 2);
    // It asks, and is answered.
    rig.send(&peer.header(Operation::CreditRequest), &[]);
    let answer = rig.expect(Operation::CreditUpdate);
    peer.note(&answer);
    // It sends one byte too many.
    let credit = peer.credit();
    while peer.credit() > 0 {
        let length = peer.credit().min(60_000) as usize;
        let header = peer.data(length);
        rig.send(&header, &vec![0x5a; length]);
    }
    assert!(rig.receive().is_none());
    let header = peer.data(1);
    rig.send(&header, &[0x5a]);
    rig.expect(Operation::Reset);
    // The host gets all that came before, and then the end.
    let all = sent + credit as usize;
    while read < all {
        read += read_all(&mut host).len();
        rig.pump();
    }
    assert_eq!(read, all);
    assert!(is_at_end(&mut host));
    assert_eq!(rig.streams(), 0);
}

#[test]
fn credit_binds_the_host() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 64);
    let (mut peer, mut host) = rig.open(5000);
    let message: Vec<u8> = Random(5).bytes(150_000);
    host.write_all(&message).unwrap();
    let mut received = Vec::new();
    let mut questions = 0;
    let mut drain = |rig: &mut Rig<'_>, received: &mut Vec<u8>| {
        rig.pump();
        while let Some((header, payload)) = rig.receive() {
            received.extend(payload);
            questions += u32::from(header.operation == Operation::CreditRequest);
            rig.pump();
        }
        std::mem::take(&mut questions)
    };
    // The guest's buffer is full, and it is asked once for more, however often it says that there is none.
    assert_eq!(drain(&mut rig, &mut received), 1);
    assert_eq!(received.len(), 65_536);
    rig.send(&peer.header(Operation::CreditUpdate), &[]);
    host.write_all(b"x").unwrap();
    assert_eq!(drain(&mut rig, &mut received), 0);
    assert_eq!(received.len(), 65_536);
    // Counters that make no sense are no credit: more taken than sent, and a buffer smaller than what is on its way.
    for (buffer, forwarded) in [
        (65_536, 65_537),
        (1000, 60_000),
        (0, 65_536),
        (u32::MAX, 65_537),
    ] {
        (peer.buffer, peer.forwarded) = (buffer, forwarded);
        rig.send(&peer.header(Operation::CreditUpdate), &[]);
        drain(&mut rig, &mut received);
        assert_eq!(received.len(), 65_536, "{buffer} {forwarded}");
    }
    // Credit byte by byte, and then for all.
    (peer.buffer, peer.forwarded) = (65_536, 1);
    rig.send(&peer.header(Operation::CreditUpdate), &[]);
    assert_eq!(drain(&mut rig, &mut received), 1);
    assert_eq!(received.len(), 65_537);
    (peer.buffer, peer.forwarded) = (1 << 20, 65_537);
    rig.send(&peer.header(Operation::CreditUpdate), &[]);
    assert_eq!(drain(&mut rig, &mut received), 0);
    assert_eq!(received.len(), 150_001);
    assert!(received[..150_000] == message);
}

#[test]
fn a_guest_without_room_is_not_waited_for_in_a_loop() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 1);
    let (_peer, mut host) = rig.open(5000);
    let message: Vec<u8> = Random(9).bytes(20_000);
    host.write_all(&message).unwrap();
    rig.pump();
    // One buffer was left, and now there is none. The device rests although the socket has more.
    let (_, first) = rig.receive_and_keep().unwrap();
    assert_eq!(first.len(), RX_BUFFER as usize - HEADER);
    assert!(!rig.is_busy());
    host.write_all(b"!").unwrap();
    rig.pump();
    assert!(rig.receive_and_keep().is_none());
    assert!(!rig.is_busy());
    // It wants to be told of new buffers.
    rig.give(1);
    assert!(rig.rx.wants_kick());
    rig.give(2);
    rig.pump();
    let mut received = first;
    while let Some((_, payload)) = rig.receive_and_keep() {
        received.extend(payload);
    }
    rig.give(8);
    rig.pump();
    while let Some((_, payload)) = rig.receive_and_keep() {
        received.extend(payload);
    }
    assert!(received[..20_000] == message);
    assert_eq!(&received[20_000..], b"!");
}

#[test]
fn resets_are_not_hoarded_without_end() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 0);
    let mut answered = 0;
    for round in 0..5 {
        for index in 0..100 {
            let peer = Peer::new(1, round * 100 + index);
            rig.send_pieces(&peer.header(Operation::Request), &[], &[]);
        }
        rig.pump();
        while rig.tx.take_used().is_some() {
            answered += 1;
        }
        if round == 2 {
            break;
        }
    }
    // Three hundred packets, for 256 of which an answer waits. The rest stay in the queue until the guest makes room.
    assert_eq!(answered, hub::MAX_RESETS);
    assert!(!rig.is_busy());
    rig.give(100);
    let mut ports = Vec::new();
    for _ in 0..300 {
        ports.push(rig.expect(Operation::Reset).destination_port);
    }
    rig.expect_nothing();
    assert_eq!(ports, (0..300).collect::<Vec<_>>());
}

#[test]
fn strange_packets_are_refused() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let peer = Peer::new(PORT, 5000);
    let base = peer.header(Operation::Request);
    let codes = [0, 8, 9, 100, u16::MAX];
    // Without a stream.
    for operation in [2, 4, 5, 6, 7].into_iter().chain(codes) {
        let operation = Operation::from(operation);
        rig.send(&Header { operation, ..base }, &[]);
        rig.expect(Operation::Reset);
    }
    rig.send(&peer.header(Operation::Reset), &[]);
    rig.expect_nothing();
    // Of another type: the answer has it too, or the guest would not know what it is for.
    for kind in [0, 2, 3, u16::MAX] {
        rig.send(&Header { kind, ..base }, &[]);
        assert_eq!(rig.expect(Operation::Reset).kind, kind);
        let operation = Operation::Reset;
        rig.send(
            &Header {
                kind,
                operation,
                ..base
            },
            &[],
        );
    }
    // From somebody else.
    for source_cid in [0, 1, 2, 4, u64::MAX] {
        rig.send(&Header { source_cid, ..base }, &[]);
    }
    rig.expect_nothing();
    // To somebody else.
    let destination_cid = 77;
    rig.send(
        &Header {
            destination_cid,
            ..base
        },
        &[],
    );
    rig.pump();
    let (head, _) = rig.rx.take_used().unwrap();
    let at = GuestAddress(RX_BUFFERS + u64::from(head) * 4096);
    assert_eq!(machine.ram.read_obj::<u64>(at).unwrap(), 77);
    assert!(rig.opened.is_empty());
    // Within a stream, they are its end.
    for operation in [1, 2].into_iter().chain(codes) {
        let (peer, mut host) = rig.open(5000);
        let operation = Operation::from(operation);
        rig.send(&peer.header(operation), &[]);
        rig.expect(Operation::Reset);
        assert!(is_at_end(&mut host), "{operation:?}");
    }
    // A payload that is not all there.
    let (mut peer, mut host) = rig.open(5000);
    let header = peer.data(11);
    rig.send(&header, &[0; 10]);
    rig.expect(Operation::Reset);
    assert!(is_at_end(&mut host));
    let (mut peer, _host) = rig.open(5000);
    let mut header = peer.data(11);
    header.length = u32::MAX;
    rig.send(&header, &[0; 10]);
    rig.expect(Operation::Reset);
    // Shutdown flags that do not exist mean nothing; a payload in other packets neither, nor bytes behind a payload.
    let (mut peer, mut host) = rig.open(5000);
    rig.send(&peer.shutdown(0xffff_fffc), b"ignored");
    let header = peer.data(2);
    rig.send(&header, b"ok, really");
    assert_eq!(read_all(&mut host), b"ok");
    rig.expect_nothing();
}

#[test]
fn packets_come_in_any_number_of_pieces() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    let message: Vec<u8> = Random(11).bytes(10_000);
    for pieces in [
        &[44][..],
        &[1, 43],
        &[40, 8],
        &[11, 11, 11, 11, 1],
        &[44, 1, 1, 1, 4000, 4000],
        &[50, 5000],
    ] {
        let header = peer.data(message.len());
        rig.send_pieces(&header, &message, pieces);
        rig.pump();
        assert!(read_all(&mut host) == message, "{pieces:?}");
        while rig.tx.take_used().is_some() {}
    }
    // Receive buffers in pieces, too.
    while rig.rx.take_used().is_some() {}
    let at = RX_BUFFERS + 0x10_0000;
    host.write_all(&message[..300]).unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut rig = {
        rig.driver.set_status(0);
        Rig::start(rig.driver, rig.vsock, 0)
    };
    let (mut host, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    rig.rx
        .add(&[(at, 10, WRITE), (at + 10, 30, WRITE), (at + 40, 60, WRITE)]);
    rig.driver.kick(0);
    rig.pump();
    let mut bytes = [0; HEADER];
    machine
        .ram
        .read_slice(&mut bytes, GuestAddress(at))
        .unwrap();
    let request = Header::from_bytes(&bytes);
    assert_eq!(request.operation, Operation::Request);
    rig.rx.take_used().unwrap();
    rig.rx
        .add(&[(at, 20, WRITE), (at + 20, 30, WRITE), (at + 50, 300, WRITE)]);
    host.write_all(&message[..300]).unwrap();
    let peer = Peer::new(request.source_port, 9000);
    rig.send(&peer.header(Operation::Response), &[]);
    assert_eq!(rig.rx.take_used().unwrap().1, 344);
    let mut payload = vec![0; 300];
    let after = GuestAddress(at + HEADER as u64);
    machine.ram.read_slice(&mut payload, after).unwrap();
    assert!(payload == message[..300]);
}

#[test]
fn broken_rings_need_a_reset_and_end_all_streams() {
    type Hostile = fn(&mut Rig<'_>);
    let machine = Machine::default();
    let vsock = Vsock::new(CID, vec![PORT]).unwrap();
    let mut driver = Some(machine.attach(vsock.clone()));
    let outside = 0x400_0000;
    assert!(outside == 64 << 20, "the end of guest memory");
    let cases: &[(&str, Hostile)] = &[
        ("a packet without a whole header", |rig| {
            rig.tx.add(&[(TX_BUFFERS, 43, 0)]);
        }),
        ("a packet to be written", |rig| {
            rig.tx.add(&[(TX_BUFFERS, 100, WRITE)]);
        }),
        ("a packet outside", |rig| {
            rig.tx.add(&[(0x400_0000, 100, 0)]);
        }),
        ("a payload outside", |rig| {
            rig.tx.add(&[(TX_BUFFERS, 44, 0), (0x400_0000 - 10, 11, 0)]);
        }),
        ("more packets than the queue has room for", |rig| {
            rig.tx.set_avail_index(1000);
        }),
        ("a receive buffer without room for a payload", |rig| {
            rig.rx.add(&[(RX_BUFFERS, 44, WRITE)]);
            let request = Peer::new(1, 1).header(Operation::Request);
            rig.send_pieces(&request, &[], &[]);
        }),
        ("a receive buffer to be read", |rig| {
            rig.rx.add(&[(RX_BUFFERS, 4096, 0)]);
            let request = Peer::new(1, 1).header(Operation::Request);
            rig.send_pieces(&request, &[], &[]);
        }),
        ("a receive buffer outside", |rig| {
            rig.rx.add(&[(0x400_0000 - 100, 101, WRITE)]);
            let request = Peer::new(1, 1).header(Operation::Request);
            rig.send_pieces(&request, &[], &[]);
        }),
    ];
    for (name, hostile) in cases {
        let mut rig = Rig::start(driver.take().unwrap(), vsock.clone(), 1);
        rig.receive();
        let mut peer = Peer::new(PORT, 5000);
        rig.send(&peer.header(Operation::Request), &[]);
        let mut host = UnixStream::from(rig.opened.pop().unwrap().stream);
        rig.receive_and_keep().unwrap();
        let data = peer.data(4);
        rig.send(&data, b"held");
        hostile(&mut rig);
        rig.driver.kick(0);
        rig.driver.kick(1);
        rig.pump();
        assert_eq!(rig.driver.status(), 15 | 0x40, "{name}");
        assert_eq!(rig.driver.interrupts(0), 1, "{name}");
        let mut held = Vec::new();
        host.read_to_end(&mut held).unwrap();
        assert_eq!(held, b"held", "{name}");
        rig.driver.set_status(0);
        driver = Some(rig.driver);
    }
    let mut rig = Rig::start(driver.take().unwrap(), vsock, 8);
    rig.open(5000);
}

#[test]
fn there_is_a_most_of_streams() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(4096)), hard).unwrap();
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let mut streams = Vec::new();
    for port in 0..MAX_FROM_GUEST as u32 {
        streams.push(rig.open(port).1);
    }
    let peer = Peer::new(PORT, 5000);
    rig.send(&peer.header(Operation::Request), &[]);
    rig.expect(Operation::Reset);
    drop(streams.pop());
    rig.expect(Operation::Shutdown);
    rig.send(&peer.header(Operation::Request), &[]);
    rig.expect(Operation::Reset);
    let last = Peer::new(PORT, MAX_FROM_GUEST as u32 - 1);
    rig.send(&last.header(Operation::Reset), &[]);
    streams.push(rig.open(5000).1);
    for _ in MAX_FROM_GUEST..MAX_STREAMS {
        let (host, device) = UnixStream::pair().unwrap();
        rig.vsock.connect(9000, device.into()).unwrap();
        rig.expect(Operation::Request);
        streams.push(host);
    }
    let (_other, device) = UnixStream::pair().unwrap();
    let error = rig.vsock.connect(9000, device.into()).unwrap_err();
    assert!(matches!(error, Error::TooManyStreams), "{error}");
    assert_eq!(rig.streams(), MAX_STREAMS);
    drop(streams.pop());
    rig.expect(Operation::Reset);
    let (_other, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    assert_eq!(rig.streams(), MAX_STREAMS);
}

#[test]
fn streams_of_a_guest_that_takes_no_answers_leave_nothing() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 0);
    for port in 0..100 {
        let peer = Peer::new(PORT, port);
        rig.send(&peer.header(Operation::Request), &[]);
        rig.send(&peer.header(Operation::Reset), &[]);
    }
    assert_eq!(rig.opened.len(), 100);
    assert_eq!(rig.streams(), 0);
    rig.give(1);
    rig.expect_nothing();
}

#[test]
fn streams_take_turns() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 128);
    let mut hosts = Vec::new();
    for port in 0..4 {
        let (mut peer, host) = rig.open(5000 + port);
        peer.buffer = 1 << 20;
        rig.send(&peer.header(Operation::CreditUpdate), &[]);
        hosts.push(host);
    }
    for host in &mut hosts {
        host.write_all(&[0x5a; 150_000]).unwrap();
    }
    rig.pump();
    let mut turns = Vec::new();
    while let Some((header, _)) = rig.receive() {
        if turns.last() != Some(&header.destination_port) {
            turns.push(header.destination_port);
        }
        rig.pump();
    }
    // One gets as much as another before it is its turn again.
    assert!(turns.len() >= 16, "{turns:?}");
    assert_eq!(turns[..8], [5000, 5001, 5002, 5003, 5000, 5001, 5002, 5003]);
}

/// Both directions of two streams at once, many megabytes, everything of random size, against the guest's slow and odd reading.
#[test]
fn bytes_arrive_as_they_were_sent() {
    const TOTAL: usize = 24 << 20;
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 100);
    let mut random = Random(42);
    let mut ends: Vec<_> = (0..2)
        .map(|port| {
            let (mut peer, host) = rig.open(5000 + port);
            peer.buffer = 200_000;
            rig.send(&peer.header(Operation::CreditUpdate), &[]);
            // To the guest and from it: sent and received so far, by two generators that agree.
            let seeds = [0; 4].map(|_| Random(77 + u64::from(port)));
            (peer, host, seeds, [0usize; 4])
        })
        .collect();
    let mut chunk = vec![0; 70_000];
    while ends
        .iter()
        .any(|(_, _, _, counts)| counts.iter().any(|&count| count < TOTAL))
    {
        for (peer, host, [to_guest, at_guest, to_host, at_host], counts) in &mut ends {
            // The host writes.
            let length = random.below(chunk.len() as u64) as usize;
            let length = length.min(TOTAL - counts[0]);
            let data = to_guest.clone().bytes(length);
            if let Ok(written) = host.write(&data) {
                to_guest.bytes(written);
                counts[0] += written;
            }
            // The guest writes.
            let length = random.below(66_000).min(peer.credit().into()) as usize;
            let length = length.min(TOTAL - counts[2]);
            if length > 0 {
                let data = to_host.bytes(length);
                let header = peer.data(length);
                rig.send_pieces(&header, &data, &[44, random.below(5000) as usize]);
                counts[2] += length;
            }
            rig.pump();
            while rig.tx.take_used().is_some() {}
            // The host reads.
            let limit = random.below(chunk.len() as u64) as usize;
            if let Ok(length) = host.read(&mut chunk[..limit]) {
                assert!(chunk[..length] == at_host.bytes(length));
                counts[3] += length;
            }
            rig.pump();
            let _ = at_guest;
        }
        // The guest reads.
        for _ in 0..random.below(100) {
            let Some((header, payload)) = rig.receive() else {
                break;
            };
            let index = header.destination_port as usize - 5000;
            let (peer, _, [_, at_guest, ..], counts) = &mut ends[index];
            peer.note(&header);
            assert!(payload == at_guest.bytes(payload.len()));
            counts[1] += payload.len();
            peer.forwarded = peer.forwarded.wrapping_add(payload.len() as u32);
            if random.below(4) == 0 || header.operation == Operation::CreditRequest {
                let header = peer.header(Operation::CreditUpdate);
                rig.send(&header, &[]);
            }
        }
    }
}
