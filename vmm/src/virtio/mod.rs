//! Virtio devices (Virtual I/O Device version 1.2) behind the PCI transport, modern interface only.
//!
//! A [`Device`] knows what it is for; [`Transport`] makes it a function on the PCI bus; a [`Ring`] is a queue whose every
//! descriptor chain has been checked against the guest's memory before a device sees it.

pub mod block;
mod common;
mod interrupt;
mod notify;
mod ring;
mod status;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod transport;
pub mod vsock;

pub use interrupt::{Interrupt, Signals};
pub use ring::{Broken, Buffers, Chain, Ring};
pub use transport::Transport;

use std::fmt::Debug;
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

    /// The device's configuration space.
    fn config(&self) -> &[u8];

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

/// What a device gets to work with once its driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub ram: GuestRam,
    /// The features that driver and device agreed upon.
    pub features: u64,
    /// One for each queue; `None` for a queue that the driver does not use.
    pub rings: Vec<Option<Ring>>,
}
