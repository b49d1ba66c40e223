//! Virtio devices (Virtual I/O Device version 1.2), modern PCI transport only.

pub mod block;
mod transport;
pub mod vsock;

pub use transport::Transport;

use std::fmt::Debug;

/// A virtio device without its transport.
pub trait Device: Debug + Send + Sync {}
