//! The configuration space of a function: a type 0 header (PCI Local Bus 3.0, section 6.1) and its capabilities.
//!
//! The space is 256 bytes, and 256 more that say which bits the guest can change. Base address sizing (section 6.2.5.1)
//! needs no code: of a base address register only the bits above the size can be changed, so what the guest reads back
//! after it has written all ones is the size.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Length of the configuration space in bytes.
const LENGTH: usize = 256;

/// Registers of the type 0 header.
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE_SIZE: usize = 0x0c;
const LATENCY_TIMER: usize = 0x0d;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The header's end: where capabilities start.
const HEADER_END: usize = 0x40;

/// Command register: the function answers in memory space.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may master the bus. Kept for the guest to read back; the devices do not look at it.
const COMMAND_MASTER: u16 = 1 << 2;
/// Command register: no INTx, which no device here has.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// The registers by which a driver knows a function.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor and device identification.
    pub vendor: u16,
    /// See `vendor`.
    pub device: u16,
    /// Subsystem vendor and subsystem identification.
    pub subsystem_vendor: u16,
    /// See `subsystem_vendor`.
    pub subsystem: u16,
    /// Base class, sub-class and programming interface, in the order in which they are usually written: `0x01_80_00`.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// A function's configuration space with at most one base address register (BAR 0, 32 bits, not prefetchable).
#[derive(Debug)]
pub struct Config {
    bytes: [u8; LENGTH],
    /// Which bits the guest can change.
    writable: [u8; LENGTH],
    /// Size of the memory behind BAR 0, a power of two; 0 when there is none.
    memory: u32,
    /// Where the next capability goes, and the pointer that will lead to it.
    end: usize,
    link: usize,
}

impl Config {
    /// A function with `memory` bytes behind BAR 0 (rounded up to a power of two of at least one page, so that no two
    /// functions share a page; 0 for no memory at all), and no capability yet.
    pub fn new(identity: &Identity, memory: u32) -> Self {
        let mut config = Self {
            bytes: [0; LENGTH],
            writable: [0; LENGTH],
            memory: match memory {
                0 => 0,
                size => size.next_power_of_two().max(4096),
            },
            end: HEADER_END,
            link: CAPABILITIES_POINTER,
        };
        config.set(0x00, &identity.vendor.to_le_bytes());
        config.set(0x02, &identity.device.to_le_bytes());
        config.set(
            0x08,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        config.set(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        config.set(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        config.allow(
            COMMAND,
            &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE).to_le_bytes(),
        );
        config.allow(CACHE_LINE_SIZE, &[0xff]);
        config.allow(LATENCY_TIMER, &[0xff]);
        config.allow(INTERRUPT_LINE, &[0xff]);
        if config.memory > 0 {
            config.allow(BAR0, &(!(config.memory - 1)).to_le_bytes());
        }
        config
    }

    /// Appends a capability: its identification, what follows the two bytes that every capability starts with, and
    /// which bits of that the guest can change (as long as `body`). Returns its offset.
    ///
    /// # Panics
    ///
    /// When the space is full: what a function has is decided when it is written, not when it runs.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let offset = self.end;
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.bytes[self.link] = offset as u8;
        self.link = offset + 1;
        self.bytes[offset] = id;
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        self.end = (offset + 2 + body.len()).next_multiple_of(4);
        offset as u8
    }

    /// Copies from the space. What lies beyond its end reads as zero.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        for (offset, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(offset).copied().unwrap_or(0);
        }
    }

    /// Changes those bits that can be changed.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        for (offset, byte) in (usize::from(offset)..LENGTH).zip(data) {
            let writable = self.writable[offset];
            self.bytes[offset] = self.bytes[offset] & !writable | byte & writable;
        }
    }

    /// Size of the function's memory in bytes, 0 when it has none.
    pub fn memory_size(&self) -> u64 {
        u64::from(self.memory)
    }

    /// The addresses in the base address register, whether they are decoded or not.
    pub fn assigned(&self) -> Range<u64> {
        let mut bar = [0; 4];
        self.read(BAR0 as u8, &mut bar);
        let base = u64::from(u32::from_le_bytes(bar));
        base..base + self.memory_size()
    }

    /// The addresses at which the guest wants the function's memory to answer: `None` without memory, with the command
    /// register's memory bit clear, or with all ones in the base address register, which is a question for the size.
    pub fn decoded(&self) -> Option<Range<u64>> {
        let enabled = self.bytes[COMMAND] & COMMAND_MEMORY as u8 != 0;
        let range = self.assigned();
        (enabled && self.memory > 0 && range.end <= u64::from(u32::MAX)).then_some(range)
    }

    /// Puts an address into the base address register, as firmware does.
    pub fn assign(&mut self, base: u32) {
        self.write(BAR0 as u8, &base.to_le_bytes());
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, offset: usize, bits: &[u8]) {
        self.writable[offset..offset + bits.len()].copy_from_slice(bits);
    }
}

/// Whether a write at this offset may change where the function's memory answers.
pub(super) fn moves_memory(offset: u8) -> bool {
    matches!(usize::from(offset), COMMAND..STATUS | BAR0..0x14)
}

/// Locks a configuration space. A thread that panicked left nothing half-written that could harm: each write is whole.
pub(crate) fn lock(config: &Mutex<Config>) -> MutexGuard<'_, Config> {
    config.lock().unwrap_or_else(PoisonError::into_inner)
}
