//! What the thread of one queue does while a driver is ready.

use vmm_sys_util::eventfd::EventFd;

use super::request::Backend;
use crate::memory::GuestRam;
use crate::virtio::worker::Rest;
use crate::virtio::{Broken, Ring};

/// A ring to be served.
#[derive(Debug)]
pub struct Service {
    pub ram: GuestRam,
    pub ring: Ring,
    pub features: u64,
}

impl Service {
    /// Serves the ring until the thread is asked to rest, or the driver breaks the ring.
    pub fn run(&mut self, rest: &Rest, kick: &EventFd, backend: &Backend) {
        if self.serve(rest, kick, backend).is_err() {
            self.ring.set_broken();
        }
    }

    fn serve(&mut self, rest: &Rest, kick: &EventFd, backend: &Backend) -> Result<(), Broken> {
        loop {
            self.drain(rest, backend)?;
            if rest.is_due() {
                return Ok(());
            }
            // Should the wait be interrupted, there is no harm in looking once too often.
            let _ = kick.read();
        }
    }

    /// Carries out what is in the ring, one interrupt for all that was there at once.
    fn drain(&mut self, rest: &Rest, backend: &Backend) -> Result<(), Broken> {
        let ram = &self.ram;
        self.ring.disable_kicks(ram)?;
        loop {
            let mut served = 0;
            while let Some(chain) = self.ring.pop(ram)? {
                let head = chain.head;
                let written = backend.execute(chain, self.features)?;
                self.ring.push(ram, head, written)?;
                served += 1;
                if rest.is_due() || served == super::QUEUE_SIZE {
                    break;
                }
            }
            if served > 0 {
                self.ring.signal(ram)?;
            } else if !self.ring.enable_kicks(ram)? {
                return Ok(());
            }
            if rest.is_due() {
                return Ok(());
            }
        }
    }
}
