//! Notifications from the driver (section 4.1.4.4): a write to a queue's address that KVM turns into an event, without the
//! processor leaving the guest for longer than that takes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// The notification addresses of a device. Its lock is taken while the bus is locked, so nothing is waited for inside.
#[derive(Debug)]
pub struct Notify {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The guest physical address of the first notification address, while the BAR is decoded.
    base: Option<u64>,
    /// Offset and event of each queue in use, while the device is started.
    kicks: Vec<Kick>,
}

#[derive(Debug)]
struct Kick {
    offset: u64,
    event: Arc<EventFd>,
    /// Where KVM listens for it.
    bound: Option<u64>,
}

impl Notify {
    /// Notification addresses that are nowhere yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            state: Mutex::default(),
        }
    }

    /// The addresses start at `base` now, or are nowhere.
    pub fn place(&self, base: Option<u64>) {
        let mut state = self.lock();
        state.base = base;
        self.bind(&mut state);
    }

    /// The queues with these offsets and events are in use from now on.
    pub fn start(&self, kicks: impl Iterator<Item = (u64, Arc<EventFd>)>) {
        let mut state = self.lock();
        state.kicks = kicks
            .map(|(offset, event)| Kick {
                offset,
                event,
                bound: None,
            })
            .collect();
        self.bind(&mut state);
    }

    /// No queue is in use any more.
    pub fn stop(&self) {
        let mut state = self.lock();
        let base = state.base.take();
        self.bind(&mut state);
        *state = State {
            base,
            kicks: Vec::new(),
        };
    }

    /// A notification that came the long way, through the device's memory.
    pub fn notify(&self, offset: u64) {
        if let Some(kick) = self.lock().kicks.iter().find(|kick| kick.offset == offset) {
            // It fails only when the counter is full, and then the device is about to look anyway.
            let _ = kick.event.write(1);
        }
    }

    /// Makes KVM listen where the addresses are. Should it refuse, the notifications come the long way.
    fn bind(&self, state: &mut State) {
        for kick in &mut state.kicks {
            let wanted = state.base.map(|base| base + kick.offset);
            if kick.bound == wanted {
                continue;
            }
            if let Some(address) = kick.bound.take() {
                let address = IoEventAddress::Mmio(address);
                // KVM knows it, so it has no reason to refuse.
                let _ = self
                    .vm
                    .unregister_ioevent(&kick.event, &address, NoDatamatch);
            }
            kick.bound = wanted.filter(|&address| {
                let address = IoEventAddress::Mmio(address);
                let bound = self.vm.register_ioevent(&kick.event, &address, NoDatamatch);
                bound.is_ok()
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Notify {
    fn drop(&mut self) {
        self.stop();
    }
}
