//! The transport as a driver sees it, with a device that records what happens to it.

mod set_up;
mod signals;

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::testing::*;
use super::{Activation, Device, Queue};

const QUEUES: u64 = 0x10_0000;

/// A device with two queues that serves nothing.
#[derive(Debug, Clone)]
struct Probe {
    queues: Vec<Queue>,
    active: Arc<Mutex<Option<Activation>>>,
}

impl Probe {
    fn new() -> Self {
        let queue = |size| Queue {
            size,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        };
        Self {
            queues: vec![queue(256), queue(16)],
            active: Arc::default(),
        }
    }

    fn is_active(&self) -> bool {
        self.active.lock().unwrap().is_some()
    }

    /// Uses a buffer of the first queue.
    fn interrupt(&self) {
        let mut active = self.active.lock().unwrap();
        let activation = active.as_mut().unwrap();
        let ring = activation.rings[0].as_mut().unwrap();
        ring.push(&activation.ram, 0, 0).unwrap();
        ring.signal(&activation.ram).unwrap();
    }

    fn break_ring(&self) {
        let active = self.active.lock().unwrap();
        active.as_ref().unwrap().rings[0]
            .as_ref()
            .unwrap()
            .set_broken();
    }

    fn kicks(&self, queue: usize) -> u64 {
        self.queues[queue].kick.read().unwrap_or(0)
    }
}

impl Device for Probe {
    fn id(&self) -> u16 {
        4
    }

    fn class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        1 << 3 | 1 << 50
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(b"configuration")
    }

    fn start(&self, activation: Activation) {
        assert!(self.active.lock().unwrap().replace(activation).is_none());
    }

    fn stop(&self) {
        self.active.lock().unwrap().take();
    }
}
