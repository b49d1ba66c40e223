//! The device between a guest's driver, which sees it through the PCI bus, and sockets.

mod flow;
mod hostile;
mod streams;

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

    /// The next packet's length and header, whatever they say.
    fn take_header(&mut self) -> Option<(u32, Header)> {
        let (head, length) = self.rx.take_used()?;
        let at = RX_BUFFERS + u64::from(head) * 4096;
        let mut bytes = [0; HEADER];
        let ram = &self.driver.machine.ram;
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        Some((length, Header::from_bytes(&bytes)))
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
