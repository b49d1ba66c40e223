//! Virtio devices (Virtual I/O Device version 1.2) behind the PCI transport, modern interface only.
//!
//! A [`Device`] knows what it is for; [`Transport`] makes it a function on the PCI bus; a [`Ring`] is a queue whose every
//! descriptor chain has been checked against the guest's memory before a device sees it.

pub mod block;
mod common;
mod interrupt;
pub mod net;
mod notify;
mod ring;
mod status;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod transport;
pub mod vsock;
mod worker;

pub use interrupt::{Interrupt, Signals};
pub use ring::{Broken, Buffers, Chain, Ring};
pub use transport::Transport;

use std::borrow::Cow;
use std::fmt::Debug;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;

/// A virtio device without its transport.
///
/// Its methods are called by the virtual processors' threads, one at a time except for the configuration space's.
pub trait Device: Debug + Send + Sync {
    /// The device type (section 5).
    fn id(&self) -> u16;

    /// The PCI class code, which drivers ignore and people read: `0x01_80_00`.
    fn class(&self) -> u32;

    /// The device's own feature bits (0 to 23 and 50 to 63).
    fn features(&self) -> u64;

    /// The queues that the device has.
    fn queues(&self) -> &[Queue];

    /// The device's configuration space, whose length never changes.
    fn config(&self) -> Cow<'_, [u8]>;

    /// Changes with the configuration (section 2.5.1).
    fn config_generation(&self) -> u8 {
        0
    }

    /// The driver is ready: the device serves its rings until it is stopped.
    fn start(&self, activation: Activation);

    /// Stops serving the rings. When it returns, nothing of the device touches guest memory any more.
    fn stop(&self);
}

/// A queue as the device offers it.
#[derive(Debug, Clone)]
pub struct Queue {
    /// The most descriptors that it can have, a power of two.
    pub size: u16,
    /// Written when the guest notifies the queue.
    pub kick: Arc<EventFd>,
}

impl Queue {
    /// The event's descriptor.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event is open for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.kick.as_raw_fd()) }
    }
}

/// What a device gets to work with once its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub ram: GuestRam,
    /// The features that driver and device agreed upon.
    pub features: u64,
    /// One for each queue; `None` for a queue that the driver does not use.
    pub rings: Vec<Option<Ring>>,
    /// By which the device tells that its configuration has changed.
    pub signals: Arc<Signals>,
}
