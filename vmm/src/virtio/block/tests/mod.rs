//! The device as a driver sees it, through the PCI bus.

mod hostile;
mod requests;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::control::Extent;
use crate::virtio::testing::*;

// Where the driver has its things in guest memory.
const QUEUE: u64 = 0x10_0000;
const HEADER: u64 = 0x20_0000;
const STATUS: u64 = 0x21_0000;
const TABLE: u64 = 0x22_0000;
const DATA: u64 = 0x40_0000;
/// Beyond the end of guest memory.
const OUTSIDE: u64 = 0x400_0000;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status byte holds before the device writes it.
const UNWRITTEN: u8 = 0xee;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn file(content: &[u8]) -> File {
    let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    file
}

fn extent(offset: u64, length: u64) -> Extent {
    Extent { offset, length }
}

fn disk(read_only: bool, extents: &[Extent]) -> Disk {
    Disk {
        id: "scratch".into(),
        read_only,
        queues: 1,
        extents: extents.to_vec(),
    }
}

fn block(read_only: bool, extents: &[Extent], files: &[&File]) -> Block {
    let files = files.iter().map(|file| file.try_clone().unwrap().into());
    Block::new(&disk(read_only, extents), files.collect()).unwrap()
}

/// A driver with one queue.
struct Rig<'a> {
    driver: Driver<'a>,
    queue: DriverQueue<'a>,
}

impl<'a> Rig<'a> {
    fn new(machine: &'a Machine, device: Block) -> Self {
        let driver = machine.attach(device);
        Self::start(driver, u64::MAX)
    }

    fn start(driver: Driver<'a>, features: u64) -> Self {
        let features = driver.negotiate(features);
        let queue = driver.set_up_queue(0, QUEUE, features);
        driver.set_status(15);
        assert_eq!(driver.status(), 15);
        Self { driver, queue }
    }

    /// Writes header and status, makes the chain available, and waits for it. Returns the status and the used length.
    fn submit(&mut self, kind: u32, sector: u64, buffers: &[Buffer]) -> (u8, u32) {
        self.prepare(kind, sector);
        let head = self.queue.add(buffers);
        self.complete(head)
    }

    fn prepare(&self, kind: u32, sector: u64) {
        let ram = &self.driver.machine.ram;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        ram.write_slice(&header, GuestAddress(HEADER)).unwrap();
        ram.write_obj(UNWRITTEN, GuestAddress(STATUS)).unwrap();
    }

    fn complete(&mut self, head: u16) -> (u8, u32) {
        self.driver.kick(0);
        self.driver.wait(1);
        let (used, length) = self.queue.take_used().unwrap();
        assert_eq!(used, head);
        let status = self.driver.machine.ram.read_obj(GuestAddress(STATUS));
        (status.unwrap(), length)
    }

    /// A request with one data buffer at `DATA`.
    fn request(&mut self, kind: u32, sector: u64, length: u32, flags: u16) -> (u8, u32) {
        let buffers = [(HEADER, 16, 0), (DATA, length, flags), (STATUS, 1, WRITE)];
        self.submit(kind, sector, &buffers)
    }

    fn put(&self, data: &[u8]) {
        let ram = &self.driver.machine.ram;
        ram.write_slice(data, GuestAddress(DATA)).unwrap();
    }

    fn get(&self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let ram = &self.driver.machine.ram;
        ram.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    /// Ranges for DISCARD and WRITE_ZEROES: (sector, sectors, flags).
    fn put_ranges(&self, ranges: &[(u64, u32, u32)]) -> u32 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.put(&bytes);
        bytes.len() as u32
    }
}
