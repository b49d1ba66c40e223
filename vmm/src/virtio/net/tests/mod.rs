//! The device between a guest's driver, which sees it through the PCI bus, and a tap, or a socket in its place.

mod flow;
mod frames;
mod guard;
mod hostile;
mod taps;

use std::os::unix::net::UnixDatagram;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 8];

// Where the driver has its things in guest memory.
const QUEUES: u64 = 0x10_0000;
const TABLE: u64 = 0x40_0000;
const COMMAND: u64 = 0x41_0000;
const RX_BUFFERS: u64 = 0x100_0000;
const TX_BUFFERS: u64 = 0x220_0000;
/// Room for the longest frame.
const STRIDE: u64 = 0x1_1000;
/// Beyond the end of guest memory.
const OUTSIDE: u64 = 0x400_0000;

const MRG_RXBUF: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
const ALL: u64 = u64::MAX;

fn nic(pairs: u16) -> Nic {
    Nic {
        name: "eth0".into(),
        mac: MAC,
        mtu: 1500,
        pairs,
        sources: Sources::Mac,
    }
}

/// A device on a socket, and the other end of that.
fn on_socket() -> (Net, UnixDatagram) {
    let (host, device) = UnixDatagram::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    let taps = vec![Tap::from_socket(device.into())];
    let net = Net::with_taps(&nic(1), taps, Offloads::ALL).unwrap();
    (net, host)
}

/// A frame of some length with its header, from a source.
fn frame(source: [u8; 6], length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.extend(Random(seed + 1).bytes(length));
    let end = bytes.len().min(HEADER + 12);
    bytes[HEADER.min(end)..end].copy_from_slice(&[[0xff; 6], source].concat()[..end - HEADER]);
    bytes
}

/// A driver of one pair.
struct Rig<'a> {
    driver: Driver<'a>,
    rx: DriverQueue<'a>,
    tx: DriverQueue<'a>,
    /// The number of the pair's receive queue.
    index: u16,
}

impl<'a> Rig<'a> {
    fn new(machine: &'a Machine, net: &Net, features: u64) -> Self {
        Self::start(machine.attach(net.clone()), features)
    }

    fn start(driver: Driver<'a>, features: u64) -> Self {
        let features = driver.negotiate(features);
        let rx = driver.set_up_queue(0, QUEUES, features);
        let tx = driver.set_up_queue(1, QUEUES + 0x1_0000, features);
        driver.set_status(15);
        Self {
            driver,
            rx,
            tx,
            index: 0,
        }
    }

    /// Gives the device buffers of some length.
    fn give(&mut self, count: usize, length: u32) {
        for _ in 0..count {
            let at = RX_BUFFERS + u64::from(self.rx.next_descriptor()) * STRIDE;
            self.rx.add(&[(at, length, WRITE)]);
        }
        self.driver.kick(self.index);
    }

    /// The next frame with its header.
    #[track_caller]
    fn receive(&mut self) -> Vec<u8> {
        let first = loop {
            match self.rx.take_used() {
                Some(used) => break used,
                None => drop(self.driver.wait(self.index + 1)),
            }
        };
        let mut bytes = self.read(first);
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..buffers {
            let used = self.rx.take_used().expect("the rest of the frame");
            bytes.extend(self.read(used));
        }
        bytes[10..12].fill(0);
        bytes
    }

    fn read(&self, (head, length): (u16, u32)) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        let at = GuestAddress(RX_BUFFERS + u64::from(head) * STRIDE);
        self.driver.machine.ram.read_slice(&mut bytes, at).unwrap();
        bytes
    }

    /// Offers a frame with its header in pieces of some lengths, the last one as long as the rest.
    fn offer(&mut self, bytes: &[u8], pieces: &[usize]) {
        let at = TX_BUFFERS + u64::from(self.tx.next_descriptor()) * STRIDE;
        let ram = &self.driver.machine.ram;
        ram.write_slice(bytes, GuestAddress(at)).unwrap();
        let mut buffers = Vec::new();
        let mut start = 0;
        for &piece in pieces.iter().chain([&usize::MAX]) {
            let length = piece.min(bytes.len() - start);
            buffers.push((at + start as u64, length as u32, 0));
            start += length;
        }
        if buffers.len() > 1 {
            self.tx.add_indirect(TABLE, &buffers);
        } else {
            self.tx.add(&buffers);
        }
    }

    /// Sends a frame with its header, and waits until the device is done with it.
    #[track_caller]
    fn send(&mut self, bytes: &[u8], pieces: &[usize]) {
        self.offer(bytes, pieces);
        self.driver.kick(self.index + 1);
        self.complete();
    }

    /// Waits until the device is done with one frame.
    #[track_caller]
    fn complete(&mut self) {
        while self.tx.take_used().is_none() {
            self.driver.wait(self.index + 2);
        }
    }

    /// Resets the device and starts it again.
    fn restart(self, features: u64) -> Self {
        self.driver.set_status(0);
        Self::start(self.driver, features)
    }
}

/// What the device has sent, if there is anything.
fn sent(host: &UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 17];
    let length = host.recv(&mut bytes).ok()?;
    bytes.truncate(length);
    Some(bytes)
}
