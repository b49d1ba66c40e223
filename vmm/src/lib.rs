//! The Bulkhead virtual machine monitor: device models, machine, launcher and control protocol.

pub mod boot;
pub mod control;
pub mod irq;
pub mod launch;
pub mod memory;
pub mod pci;
pub mod seccomp;
pub mod stop;
pub mod virtio;
