//! How a device speaks up: by an interrupt for a queue, or by one for itself.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// ISR status (section 4.1.4.5): a queue has used buffers.
const ISR_QUEUE: u8 = 1 << 0;
/// ISR status: the device's configuration or status has changed.
const ISR_CONFIG: u8 = 1 << 1;

/// What a device has to say apart from its queues; shared with the transport, which shows it to the driver.
#[derive(Debug, Default)]
pub struct Signals {
    isr: AtomicU8,
    broken: AtomicBool,
    /// The MSI-X vector for configuration changes, if the driver has chosen one.
    vector: Mutex<Option<Arc<EventFd>>>,
}

impl Signals {
    /// The device cannot go on because the driver broke the protocol: it shows `DEVICE_NEEDS_RESET` (section 2.1.2).
    pub fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
        self.tell_of_change();
    }

    /// The device's configuration or status has changed.
    pub fn tell_of_change(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        if let Some(event) = &*self.vector.lock().unwrap_or_else(PoisonError::into_inner) {
            write(event);
        }
    }

    /// Whether the device needs a reset.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Reads the ISR status, which clears it.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// Sets the vector for configuration changes.
    pub fn set_vector(&self, event: Option<Arc<EventFd>>) {
        *self.vector.lock().unwrap_or_else(PoisonError::into_inner) = event;
    }

    /// The state after a reset.
    pub fn reset(&self) {
        self.isr.store(0, Ordering::Release);
        self.broken.store(false, Ordering::Release);
        self.set_vector(None);
    }
}

/// The interrupt of one queue.
#[derive(Debug, Clone)]
pub struct Interrupt {
    vector: Option<Arc<EventFd>>,
    signals: Arc<Signals>,
}

impl Interrupt {
    /// The interrupt of a queue with the MSI-X vector that the driver has chosen for it, if any.
    pub fn new(vector: Option<Arc<EventFd>>, signals: Arc<Signals>) -> Self {
        Self { vector, signals }
    }

    /// Interrupts the driver. Without a vector it can only be told in the ISR status: there is no INTx.
    pub fn trigger(&self) {
        match &self.vector {
            Some(event) => write(event),
            None => {
                self.signals.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
            }
        }
    }

    /// What the device has to say apart from this queue.
    pub fn signals(&self) -> &Signals {
        &self.signals
    }
}

fn write(event: &EventFd) {
    // It fails only when 2^64 - 2 interrupts are pending, and then one more makes no difference.
    let _ = event.write(1);
}
