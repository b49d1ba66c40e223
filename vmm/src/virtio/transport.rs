//! The PCI transport (section 4.1).

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;

use super::Device;
use crate::irq::Routes;
use crate::memory::GuestRam;
use crate::pci::{Config, Function};

/// A virtio device as a PCI function.
#[derive(Debug)]
pub struct Transport {
    config: Mutex<Config>,
}

impl Transport {
    /// Makes `device` a PCI function that is ready to be attached to the bus.
    pub fn new(
        device: impl Device + 'static,
        _ram: GuestRam,
        _vm: Arc<VmFd>,
        _routes: Arc<Routes>,
    ) -> io::Result<Self> {
        Err(io::Error::other(format!("{device:?} is not there yet")))
    }
}

impl Function for Transport {
    fn config(&self) -> &Mutex<Config> {
        &self.config
    }

    fn memory_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn memory_write(&self, _offset: u64, _data: &[u8]) {}
}
