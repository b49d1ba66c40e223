//! What a processor reaches outside of its memory: the ports of a small PC, and the PCI bus.
//!
//! Everything that is not there reads as all ones and ignores writes, as on a bus where nobody answers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::coalesced::Ring;
use crate::control::StopReason;
use crate::pci;
use crate::serial;
use crate::stop::Stopper;

/// The first serial port: eight registers of a byte.
const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = SERIAL + 7;

/// The keyboard controller, of which only the reset line is there: data, and command and status.
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;

/// PCI configuration mechanism 1: the address's port, and the data's.
pub const PCI: u16 = 0xcf8;
/// Width of the address's port in bytes.
pub const PCI_ADDRESS_LENGTH: u32 = 4;
const PCI_END: u16 = 0xcff;

/// The devices, as all processors see them.
#[derive(Debug)]
pub struct Platform {
    serial: Mutex<serial::Port>,
    keyboard: Mutex<I8042Device<ResetLine>>,
    pci: Arc<pci::Bus>,
    /// Addresses that were written to [`PCI`], and that nothing was done with yet.
    addresses: Mutex<Ring>,
}

/// The line by which the keyboard controller resets a PC.
#[derive(Debug)]
struct ResetLine(Stopper);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.stop(StopReason::Reset);
        Ok(())
    }
}

impl Platform {
    /// Connects the devices.
    pub fn new(
        serial: serial::Port,
        pci: Arc<pci::Bus>,
        addresses: Ring,
        stopper: Stopper,
    ) -> Self {
        Self {
            serial: Mutex::new(serial),
            keyboard: Mutex::new(I8042Device::new(ResetLine(stopper))),
            pci,
            addresses: Mutex::new(addresses),
        }
    }

    /// The guest reads `data.len()` bytes from a port.
    ///
    /// The registers of the serial port and the keyboard controller are a byte wide; a wider read, or a string of them,
    /// which KVM delivers as one, finds nothing there.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match (port, &mut *data) {
            (SERIAL..=SERIAL_END, [byte]) => *byte = lock(&self.serial).read((port - SERIAL) as u8),
            (KEYBOARD_DATA | KEYBOARD_COMMAND, [byte]) => {
                *byte = lock(&self.keyboard).read((port - KEYBOARD_DATA) as u8);
            }
            (PCI..=PCI_END, data) => self.bus().io_read(port, data),
            (_, data) => data.fill(0xff),
        }
    }

    /// The guest writes `data.len()` bytes to a port.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        match (port, data) {
            (SERIAL..=SERIAL_END, [byte]) => {
                // The console never fails; the interrupt's event can only be full of interrupts that nobody took.
                let _ = lock(&self.serial).write((port - SERIAL) as u8, *byte);
            }
            (KEYBOARD_DATA | KEYBOARD_COMMAND, [byte]) => {
                let Ok(()) = lock(&self.keyboard).write((port - KEYBOARD_DATA) as u8, *byte);
            }
            (PCI..=PCI_END, data) => self.bus().io_write(port, data),
            // Nobody answers.
            _ => {}
        }
    }

    /// The bus, for an access to its ports: what was written to them before has been done.
    fn bus(&self) -> &pci::Bus {
        lock(&self.addresses).drain(|port, data| self.pci.io_write(port, data));
        &self.pci
    }

    /// The guest reads from a physical address that is no memory.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        if !self.pci.mmio_read(address, data) {
            data.fill(0xff);
        }
    }

    /// The guest writes to a physical address that is no memory.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        self.pci.mmio_write(address, data);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
