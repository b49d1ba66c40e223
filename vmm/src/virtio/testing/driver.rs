//! The guest's side of a device, and of its queues.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::poll::{PollFd, PollFlags, poll};
use vm_memory::{Bytes, GuestAddress};

use super::{Buffer, EVENT_IDX, INDIRECT, Machine, NEXT};
use crate::memory::GuestRam;
use crate::virtio::Transport;

/// A driver of one device.
#[derive(Debug)]
pub struct Driver<'a> {
    pub machine: &'a Machine,
    pub slot: u8,
    transport: Arc<Transport>,
    /// Addresses of the areas, from the capabilities.
    pub common: u64,
    pub notify: u64,
    pub isr: u64,
    pub device: u64,
    pub table: u64,
    pub pending: u64,
    pub msix: u8,
    pub pci: u8,
}

impl<'a> Driver<'a> {
    /// Finds the device's areas, enables its memory and resets it.
    pub(super) fn probe(machine: &'a Machine, slot: u8, transport: Arc<Transport>) -> Self {
        let mut driver = Self {
            machine,
            slot,
            transport,
            common: 0,
            notify: 0,
            isr: 0,
            device: 0,
            table: 0,
            pending: 0,
            msix: 0,
            pci: 0,
        };
        machine.config_write(slot, 0x04, &6u16.to_le_bytes());
        let base = u64::from(machine.config_u32(slot, 0x10));
        let mut capability = machine.config_u8(slot, 0x34);
        while capability != 0 {
            let register = |offset| u64::from(machine.config_u32(slot, capability + offset));
            match (
                machine.config_u8(slot, capability),
                machine.config_u8(slot, capability + 3),
            ) {
                (0x11, _) => {
                    driver.msix = capability;
                    driver.table = base + register(4);
                    driver.pending = base + register(8);
                }
                (0x09, 1) => driver.common = base + register(8),
                (0x09, 2) => {
                    assert_eq!(register(16), 4);
                    driver.notify = base + register(8);
                }
                (0x09, 3) => driver.isr = base + register(8),
                (0x09, 4) => driver.device = base + register(8),
                (0x09, 5) => driver.pci = capability,
                other => panic!("unknown capability {other:?}"),
            }
            capability = machine.config_u8(slot, capability + 1);
        }
        driver.set_status(0);
        driver
    }

    /// Negotiates features: all that are offered of those that are wanted. Returns what was agreed upon. Configuration changes
    /// get MSI-X vector 0.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        self.set_status(1);
        self.set_status(3);
        let features = self.offered() & wanted;
        self.accept(features);
        self.set_status(11);
        assert_eq!(self.status(), 11);
        self.write(self.common + 0x10, &0u16.to_le_bytes());
        features
    }

    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(self.common, &select.to_le_bytes());
            u64::from(self.read_u32(self.common + 4))
        };
        half(0) | half(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for select in 0..2u32 {
            self.write(self.common + 8, &select.to_le_bytes());
            let half = (features >> (32 * select)) as u32;
            self.write(self.common + 12, &half.to_le_bytes());
        }
    }

    /// Sets a queue up at an address of guest memory (64 KiB of it), with its MSI-X vector.
    pub fn set_up_queue(&self, index: u16, at: u64, features: u64) -> DriverQueue<'a> {
        self.select_queue(index);
        self.write(self.common + 0x1a, &(index + 1).to_le_bytes());
        assert_eq!(self.read_u16(self.common + 0x1a), index + 1);
        self.set_up_queue_without_vector(index, at, features)
    }

    /// Sets a queue up without an MSI-X vector.
    pub fn set_up_queue_without_vector(
        &self,
        index: u16,
        at: u64,
        features: u64,
    ) -> DriverQueue<'a> {
        self.select_queue(index);
        let size = self.read_u16(self.common + 0x18);
        let queue = DriverQueue::new(&self.machine.ram, at, size, features & EVENT_IDX != 0);
        for (offset, address) in [(0x20, queue.table), (0x28, queue.avail), (0x30, queue.used)] {
            self.write(self.common + offset, &(address as u32).to_le_bytes());
            let high = (address >> 32) as u32;
            self.write(self.common + offset + 4, &high.to_le_bytes());
        }
        self.write(self.common + 0x1c, &1u16.to_le_bytes());
        assert_eq!(self.read_u16(self.common + 0x1c), 1);
        queue
    }

    /// Enables MSI-X, with processor vector `0x40 + i` for each MSI-X vector `i` below `count`.
    pub fn enable_interrupts(&self, count: u64) {
        for vector in 0..count {
            let entry = self.table + vector * 16;
            self.write(entry, &0xfee0_0000u32.to_le_bytes());
            self.write(entry + 4, &0u32.to_le_bytes());
            self.write(entry + 8, &(0x40 + vector as u32).to_le_bytes());
            self.write(entry + 12, &0u32.to_le_bytes());
        }
        let control = self.machine.config_u32(self.slot, self.msix) >> 16 | 1 << 15;
        self.machine
            .config_write(self.slot, self.msix + 2, &(control as u16).to_le_bytes());
    }

    pub fn select_queue(&self, index: u16) {
        self.write(self.common + 0x16, &index.to_le_bytes());
    }

    /// Waits until the device has interrupted with an MSI-X vector, while MSI-X is not enabled and KVM does not take the
    /// event away. Returns how often.
    pub fn wait(&self, vector: u16) -> u64 {
        assert_eq!(self.wait_for_any(&[vector]), vector);
        self.interrupts(vector)
    }

    /// Waits until the device has interrupted with one of these MSI-X vectors, and returns the first that it was.
    pub fn wait_for_any(&self, vectors: &[u16]) -> u16 {
        let mut events: Vec<_> = vectors
            .iter()
            .map(|&vector| {
                let event = self.transport.event(vector).as_raw_fd();
                // SAFETY: the descriptor is open for as long as the transport is borrowed.
                PollFd::new(unsafe { BorrowedFd::borrow_raw(event) }, PollFlags::POLLIN)
            })
            .collect();
        let ready = poll(&mut events, 60_000u16).unwrap();
        assert!(ready > 0, "no interrupt for any of {vectors:?}");
        let is_ready = |event: &PollFd<'_>| event.any() == Some(true);
        vectors[events.iter().position(is_ready).unwrap()]
    }

    /// How often the device has interrupted with an MSI-X vector.
    pub fn interrupts(&self, vector: u16) -> u64 {
        self.transport.event(vector).read().unwrap_or(0)
    }

    /// Tells the device of new buffers, as when KVM does not know the address.
    pub fn kick(&self, index: u16) {
        self.write(self.notify + u64::from(index) * 4, &index.to_le_bytes());
    }

    pub fn set_status(&self, status: u8) {
        self.write(self.common + 0x14, &[status]);
    }

    pub fn status(&self) -> u8 {
        let mut data = [0];
        self.read(self.common + 0x14, &mut data);
        data[0]
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        assert!(self.machine.bus.mmio_read(address, data), "{address:#x}");
    }

    pub fn read_u16(&self, address: u64) -> u16 {
        let mut data = [0; 2];
        self.read(address, &mut data);
        u16::from_le_bytes(data)
    }

    pub fn read_u32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        assert!(self.machine.bus.mmio_write(address, data), "{address:#x}");
    }
}

/// The driver's side of a split virtqueue.
#[derive(Debug)]
pub struct DriverQueue<'a> {
    ram: &'a GuestRam,
    pub size: u16,
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    event_idx: bool,
    next: u16,
    avail_index: u16,
    used_index: u16,
}

impl<'a> DriverQueue<'a> {
    /// Takes 64 KiB at `at`.
    pub fn new(ram: &'a GuestRam, at: u64, size: u16, event_idx: bool) -> Self {
        ram.write_slice(&[0; 0x1_0000], GuestAddress(at)).unwrap();
        Self {
            ram,
            size,
            table: at,
            avail: at + 0x8000,
            used: at + 0xc000,
            event_idx,
            next: 0,
            avail_index: 0,
            used_index: 0,
        }
    }

    /// The descriptor that the next chain starts with.
    pub fn next_descriptor(&self) -> u16 {
        self.next
    }

    /// Makes a chain of (address, length, flags) available; `NEXT` is added where it belongs. Returns its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next;
        for (index, &(address, length, flags)) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            let this = self.next;
            self.next = (self.next + 1) % self.size;
            let flags = if last { flags } else { flags | NEXT };
            self.write_descriptor(self.table, this, address, length, flags, self.next);
        }
        self.offer(head);
        head
    }

    /// Makes a chain available whose descriptors are in a table of their own at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (index, &(address, length, flags)) in buffers.iter().enumerate() {
            let index = index as u16;
            let last = usize::from(index) + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            self.write_descriptor(table, index, address, length, flags, index + 1);
        }
        self.add(&[(table, buffers.len() as u32 * 16, INDIRECT)])
    }

    pub fn write_descriptor(
        &self,
        table: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(table + u64::from(index) * 16);
        self.ram.write_slice(&bytes, at).unwrap();
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail + 4 + u64::from(self.avail_index % self.size) * 2;
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail_index = self.avail_index.wrapping_add(1);
        self.set_avail_index(self.avail_index);
    }

    pub fn set_avail_index(&self, index: u16) {
        let at = GuestAddress(self.avail + 2);
        self.ram.store(index, at, Ordering::Release).unwrap();
    }

    /// Whether the device wants to be told of the chain that was added last.
    pub fn wants_kick(&self) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.used + 4 + u64::from(self.size) * 8;
            let event: u16 = self.ram.load(GuestAddress(at), Ordering::Relaxed).unwrap();
            event == self.avail_index.wrapping_sub(1)
        } else {
            let flags: u16 = self
                .ram
                .load(GuestAddress(self.used), Ordering::Relaxed)
                .unwrap();
            flags & 1 == 0
        }
    }

    /// The next used chain, as head and number of bytes written to it.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let at = GuestAddress(self.used + 2);
        let index: u16 = self.ram.load(at, Ordering::Acquire).unwrap();
        if index == self.used_index {
            return None;
        }
        let at = self.used + 4 + u64::from(self.used_index % self.size) * 8;
        let element: u64 = self.ram.read_obj(GuestAddress(at)).unwrap();
        self.used_index = self.used_index.wrapping_add(1);
        // The next one is to interrupt.
        let at = self.avail + 4 + u64::from(self.size) * 2;
        self.ram
            .write_obj(self.used_index, GuestAddress(at))
            .unwrap();
        Some((element as u16, (element >> 32) as u32))
    }
}
