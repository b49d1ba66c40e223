//! The Bulkhead virtual machine monitor: device models, machine, launcher and control protocol.

pub mod boot;
pub mod coalesced;
pub mod control;
pub mod cpuid;
pub mod irq;
pub mod launch;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod platform;
pub mod seccomp;
pub mod serial;
pub mod stop;
#[cfg(test)]
mod testing;
pub mod vcpu;
pub mod virtio;
