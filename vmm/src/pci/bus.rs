//! The bus: which function sits in which slot, and which addresses it answers at.
//!
//! The guest may move a function's memory at any time, and Linux does: without ACPI it knows no window of the host bridge
//! and gives a device that was attached while it ran an address of its own choice. An address is honoured unless it
//! overlaps what the machine keeps for itself (memory, interrupt controllers) or another function's memory; then the
//! function answers nowhere until one of the two has been moved away.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Function;
use super::config::{self, Config, Identity};

/// Slots on the bus, the host bridge's included.
const SLOTS: usize = 32;

/// The ports of configuration mechanism 1.
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
/// `CONFIG_ADDRESS`: the data port reaches the configuration space.
const CONFIG_ENABLE: u32 = 1 << 31;

/// The host bridge in slot 0, without which Linux does not believe in configuration mechanism 1. (Red Hat's identification
/// for a bridge with nothing special to it.)
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x06_00_00,
    revision: 0,
};

/// The guest physical addresses below 4 GiB as the bus must know them.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Where the bus places the functions' memory before the guest moves it. Page-aligned.
    pub window: Range<u64>,
    /// Where it must never answer: guest memory, the interrupt controllers, KVM's own pages.
    pub occupied: Vec<Range<u64>>,
}

/// Why a function cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All slots are taken.
    #[error("all {SLOTS} slots of the PCI bus are taken; detach a device first")]
    NoSlot,
    /// No room for the function's memory.
    #[error("no room for {size:#x} bytes of device memory between {:#x} and {:#x}", .window.start, .window.end)]
    NoRoom {
        /// What the function needs, in bytes.
        size: u64,
        /// Where it was looked for.
        window: Range<u64>,
    },
    /// There is nothing to detach.
    #[error("PCI slot {0} holds no device that could be detached")]
    NoDevice(u8),
    /// The guest has not let go of it.
    #[error("the guest uses the device in PCI slot {0}; it must remove the device first")]
    InUse(u8),
}

/// The bus. All methods may be called from any thread.
#[derive(Debug)]
pub struct Bus {
    layout: Layout,
    /// The register behind `CONFIG_ADDRESS`.
    address: AtomicU32,
    slots: RwLock<Slots>,
}

type Slots = [Option<Slot>; SLOTS];

#[derive(Debug)]
struct Slot {
    function: Arc<dyn Function>,
    /// The addresses at which the function's memory answers.
    decoded: Option<Range<u64>>,
}

impl Bus {
    /// A bus with nothing but the host bridge on it.
    pub fn new(layout: Layout) -> Self {
        let mut slots = Slots::default();
        slots[0] = Some(Slot {
            function: Arc::new(HostBridge(Mutex::new(Config::new(&HOST_BRIDGE, 0)))),
            decoded: None,
        });
        Self {
            layout,
            address: AtomicU32::new(0),
            slots: RwLock::new(slots),
        }
    }

    /// Puts a function on the bus and returns its slot (the device number on bus 0; the function number is 0).
    ///
    /// # Errors
    ///
    /// There is no slot left, or no room for the function's memory.
    pub fn attach(&self, function: Arc<dyn Function>) -> Result<u8, Error> {
        let mut slots = self.write_slots();
        let number = slots
            .iter()
            .position(Option::is_none)
            .ok_or(Error::NoSlot)?;
        let size = config::lock(function.config()).memory_size();
        if size > 0 {
            let base = self.free_base(&slots, size).ok_or_else(|| Error::NoRoom {
                size,
                window: self.layout.window.clone(),
            })?;
            config::lock(function.config()).assign(base);
        }
        slots[number] = Some(Slot {
            function,
            decoded: None,
        });
        Ok(number as u8)
    }

    /// Takes the function off the bus and waits until it has stopped.
    ///
    /// # Errors
    ///
    /// There is none, it is the host bridge, or the guest uses it. Should the guest begin to use it at this very moment, it
    /// has to do with half a device.
    pub fn detach(&self, number: u8) -> Result<(), Error> {
        let index = match number {
            0 => return Err(Error::NoDevice(number)),
            number => usize::from(number),
        };
        let function = self.function(index).ok_or(Error::NoDevice(number))?;
        if function.is_in_use() {
            return Err(Error::InUse(number));
        }
        {
            let mut slots = self.write_slots();
            if let Some(Slot {
                decoded: Some(_), ..
            }) = slots[index].take()
            {
                function.moved(None);
            }
            self.settle(&mut slots);
        }
        function.removed();
        Ok(())
    }

    /// The guest reads 1, 2 or 4 bytes from a port in `0xcf8..=0xcff`.
    pub fn io_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == CONFIG_ADDRESS && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
        } else if let Some((number, offset)) = self.target(port, data.len())
            && let Some(function) = self.function(number)
        {
            function.config_read(offset, data);
        }
    }

    /// The guest writes 1, 2 or 4 bytes to a port in `0xcf8..=0xcff`.
    pub fn io_write(&self, port: u16, data: &[u8]) {
        if port == CONFIG_ADDRESS {
            if let Ok(bytes) = data.try_into() {
                self.address
                    .store(u32::from_le_bytes(bytes), Ordering::Relaxed);
            }
        } else if let Some((number, offset)) = self.target(port, data.len())
            && let Some(function) = self.function(number)
        {
            function.config_write(offset, data);
            if config::moves_memory(offset) {
                self.settle(&mut self.write_slots());
            }
        }
    }

    /// The guest reads from an address outside its memory. `false` when no function answers there.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.decode(address, data.len()) {
            Some((function, offset)) => {
                function.memory_read(offset, data);
                true
            }
            None => false,
        }
    }

    /// The guest writes to an address outside its memory. `false` when no function answers there.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        match self.decode(address, data.len()) {
            Some((function, offset)) => {
                function.memory_write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The slot and the offset in its configuration space that an access to the data port reaches. An access beyond the
    /// data port's four bytes reaches nothing, and neither do other buses and functions, nor addresses with reserved bits (by
    /// which AMD's processors address registers from 256 on; Linux looks for these, and seventeen times as long where it finds
    /// the first 256 again).
    fn target(&self, port: u16, length: usize) -> Option<(usize, u8)> {
        let address = self.address.load(Ordering::Relaxed);
        let byte = port.checked_sub(CONFIG_DATA)?;
        let reserved_bus_and_function = address & 0x7fff_0700;
        if address & CONFIG_ENABLE == 0
            || reserved_bus_and_function != 0
            || usize::from(byte) + length > 4
            || !matches!(length, 1 | 2 | 4)
        {
            return None;
        }
        let offset = (address & 0xfc) as u8 + byte as u8;
        Some(((address >> 11 & 0x1f) as usize, offset))
    }

    fn function(&self, number: usize) -> Option<Arc<dyn Function>> {
        let slots = self.read_slots();
        let slot = slots.get(number)?.as_ref()?;
        Some(slot.function.clone())
    }

    /// The function that answers at an address, and the offset in its memory.
    fn decode(&self, address: u64, length: usize) -> Option<(Arc<dyn Function>, u64)> {
        let end = address.checked_add(length as u64)?;
        self.read_slots().iter().flatten().find_map(|slot| {
            let range = slot.decoded.as_ref()?;
            (range.start <= address && end <= range.end)
                .then(|| (slot.function.clone(), address - range.start))
        })
    }

    /// Makes what is decoded follow what the guest wrote: first everything that has moved lets go, then whatever wants an
    /// address that is free gets it, so that a function whose address was taken answers as soon as it is free.
    fn settle(&self, slots: &mut Slots) {
        for slot in slots.iter_mut().flatten() {
            let wanted = config::lock(slot.function.config()).decoded();
            if slot.decoded.is_some() && slot.decoded != wanted {
                slot.decoded = None;
                slot.function.moved(None);
            }
        }
        for number in 0..SLOTS {
            let Some(slot) = &slots[number] else { continue };
            let wanted = config::lock(slot.function.config()).decoded();
            let (None, Some(wanted)) = (&slot.decoded, wanted) else {
                continue;
            };
            let taken = slots
                .iter()
                .flatten()
                .filter_map(|slot| slot.decoded.as_ref());
            if self
                .layout
                .occupied
                .iter()
                .chain(taken)
                .any(|range| overlap(range, &wanted))
            {
                continue;
            }
            if let Some(slot) = &mut slots[number] {
                slot.function.moved(Some(wanted.start));
                slot.decoded = Some(wanted);
            }
        }
    }

    /// The lowest address in the window that nobody has, aligned to the size as base addresses must be.
    fn free_base(&self, slots: &Slots, size: u64) -> Option<u32> {
        let assigned: Vec<_> = slots
            .iter()
            .flatten()
            .map(|slot| config::lock(slot.function.config()).assigned())
            .collect();
        let mut base = self.layout.window.start.next_multiple_of(size);
        while base + size <= self.layout.window.end {
            let range = base..base + size;
            let mut taken = self.layout.occupied.iter().chain(&assigned);
            match taken.find(|taken| overlap(taken, &range)) {
                Some(taken) => base = taken.end.next_multiple_of(size),
                None => return u32::try_from(base).ok(),
            }
        }
        None
    }

    fn read_slots(&self) -> RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_slots(&self) -> RwLockWriteGuard<'_, Slots> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Slot 0: there to be found.
#[derive(Debug)]
struct HostBridge(Mutex<Config>);

impl Function for HostBridge {
    fn config(&self) -> &Mutex<Config> {
        &self.0
    }

    fn memory_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn memory_write(&self, _offset: u64, _data: &[u8]) {}
}
