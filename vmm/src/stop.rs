//! How a part of the machine ends it: the first reason given, from whatever thread, is the one that is reported.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::control::StopReason;

/// A handle with which any thread ends the machine. Clones speak of the same machine.
#[derive(Debug, Clone)]
pub struct Stopper {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    reason: OnceLock<StopReason>,
    wake: EventFd,
}

impl Stopper {
    /// Makes the handle of a machine that has not ended.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left for the event.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                reason: OnceLock::new(),
                wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            }),
        })
    }

    /// Ends the machine, unless it has ended already: then the earlier reason stands.
    pub fn stop(&self, reason: StopReason) {
        if self.shared.reason.set(reason).is_ok() {
            // The counter can only be full after 2^64 - 2 stops, and only the first one comes here.
            let _ = self.shared.wake.write(1);
        }
    }

    /// Why the machine ended, if it has.
    pub fn reason(&self) -> Option<&StopReason> {
        self.shared.reason.get()
    }
}

/// The descriptor that becomes readable when the machine ends, and stays so.
impl AsFd for Stopper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the event is open as long as this handle, from which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.shared.wake.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stands_and_wakes_once() {
        let stopper = Stopper::new().unwrap();
        assert_eq!(stopper.reason(), None);
        assert!(stopper.shared.wake.read().is_err());
        stopper.clone().stop(StopReason::Panic);
        stopper.stop(StopReason::Reset);
        assert_eq!(stopper.reason(), Some(&StopReason::Panic));
        assert_eq!(stopper.shared.wake.read().unwrap(), 1);
    }
}
