//! The PCI bus of the machine: one bus, thirty-two slots with one function each, found through configuration
//! mechanism 1 (PCI Local Bus 3.0, section 3.2.2.3.2), interrupts by MSI-X alone.
//!
//! A device can come and go while the guest runs. Nothing tells the guest: it rescans the bus when it is asked to, gives
//! the new device an address of its own choice, and that choice is honoured as long as it harms nobody ([`Bus`]).
//!
//! Everything here is called from the virtual processors' threads with values that the guest made up.

mod bus;
mod config;
pub mod msix;
pub mod pvpanic;
#[cfg(test)]
mod tests;

pub use bus::{Bus, Error, Layout};
pub(crate) use config::lock;
pub use config::{Config, Identity};

use std::fmt::Debug;
use std::sync::Mutex;

/// A device on the bus.
///
/// Its methods are called from several threads at once. No lock of the bus is held when they are, except for
/// [`Function::moved`], which therefore must not wait for anything.
pub trait Function: Debug + Send + Sync {
    /// The function's configuration space. The lock is held only for the copying of a few bytes.
    fn config(&self) -> &Mutex<Config>;

    /// The guest reads `data.len()` (1, 2 or 4) bytes of the configuration space, all within one 32-bit register.
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        lock(self.config()).read(offset, data);
    }

    /// The guest writes 1, 2 or 4 bytes of the configuration space, all within one 32-bit register.
    fn config_write(&self, offset: u8, data: &[u8]) {
        lock(self.config()).write(offset, data);
    }

    /// The function's memory answers at the guest physical address `base` from now on, or nowhere.
    fn moved(&self, _base: Option<u64>) {}

    /// The guest reads from the function's memory. `offset + data.len()` is within it.
    fn memory_read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes to the function's memory. `offset + data.len()` is within it.
    fn memory_write(&self, offset: u64, data: &[u8]);

    /// Whether a driver in the guest uses the function, so that taking it away would hang what waits for it there.
    fn is_in_use(&self) -> bool {
        false
    }

    /// The function was taken off the bus: it stops what it does and lets go of what it holds. Accesses that were
    /// under way may still arrive afterwards.
    fn removed(&self) {}
}
