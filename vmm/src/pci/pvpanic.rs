//! pvpanic: the guest's kernel tells that it panicked or powers itself off (QEMU's docs/specs/pvpanic; Linux's
//! drivers/misc/pvpanic). One byte of memory: reading it tells which events the device knows, writing it reports them.

use std::fmt;
use std::sync::Mutex;

use super::{Config, Function, Identity};
use crate::control::StopReason;

/// The kernel panicked, and that is the end.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked and goes on to its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;
/// The machine is to be powered off.
const SHUTDOWN: u8 = 1 << 2;

const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0011,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x08_80_00,
    revision: 1,
};

/// The device.
pub struct PvPanic {
    config: Mutex<Config>,
    report: Box<dyn Fn(StopReason) + Send + Sync>,
}

impl PvPanic {
    /// A device that calls `report`, on the thread of the virtual processor, each time the guest reports an event.
    pub fn new(report: impl Fn(StopReason) + Send + Sync + 'static) -> Self {
        Self {
            config: Mutex::new(Config::new(&IDENTITY, 1)),
            report: Box::new(report),
        }
    }
}

impl Function for PvPanic {
    fn config(&self) -> &Mutex<Config> {
        &self.config
    }

    fn memory_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(byte)) = (offset, data.first_mut()) {
            *byte = PANICKED | CRASH_LOADED | SHUTDOWN;
        }
    }

    /// A crash kernel is never loaded in these guests (and would have nowhere to write its dump), so that it makes no
    /// difference. Bits that were not offered mean nothing and are ignored.
    fn memory_write(&self, offset: u64, data: &[u8]) {
        let events = match (offset, data.first()) {
            (0, Some(&events)) => events,
            _ => return,
        };
        if events & (PANICKED | CRASH_LOADED) != 0 {
            (self.report)(StopReason::Panic);
        } else if events & SHUTDOWN != 0 {
            (self.report)(StopReason::PowerOff);
        }
    }
}

impl fmt::Debug for PvPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PvPanic")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn events_become_reasons() {
        let reasons = Arc::new(Mutex::new(Vec::new()));
        let seen = reasons.clone();
        let device = PvPanic::new(move |reason| seen.lock().unwrap().push(reason));

        let mut offered = [0];
        device.memory_read(0, &mut offered);
        assert_eq!(offered, [PANICKED | CRASH_LOADED | SHUTDOWN]);

        for (offset, written, reason) in [
            (0, &[PANICKED][..], Some(StopReason::Panic)),
            (0, &[CRASH_LOADED], Some(StopReason::Panic)),
            (0, &[SHUTDOWN], Some(StopReason::PowerOff)),
            (0, &[PANICKED | SHUTDOWN], Some(StopReason::Panic)),
            (0, &[SHUTDOWN, 0, 0, 0], Some(StopReason::PowerOff)),
            (0, &[0xf8], None),
            (0, &[0], None),
            (1, &[PANICKED], None),
            (4095, &[PANICKED], None),
        ] {
            device.memory_write(offset, written);
            assert_eq!(
                reasons.lock().unwrap().pop(),
                reason,
                "{written:?} at {offset}"
            );
        }
    }
}
