//! The device status (section 2.1) and the only ways in which a driver may change it.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
const DRIVER: u8 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER as u8;
const FEATURES_OK: u8 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
/// The bit that the device sets, never the driver.
pub const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// The status register, without [`NEEDS_RESET`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status(u8);

/// What the transport has to do about a write to the status register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing: the register has its new value, or the write was not allowed and is ignored.
    None,
    /// Back to the beginning; the register is 0 once it is done.
    Reset,
    /// Look at the driver's features; only if they are acceptable, the register becomes as written.
    CheckFeatures,
    /// Start the device; the register has its new value.
    Start,
}

/// "The driver MUST follow this sequence to initialize a device" (section 3.1.1), each step adding one bit.
const TRANSITIONS: [(u8, u8, Action); 4] = [
    (0, ACKNOWLEDGE, Action::None),
    (ACKNOWLEDGE, DRIVER, Action::None),
    (DRIVER, FEATURES_OK, Action::CheckFeatures),
    (FEATURES_OK, DRIVER_OK, Action::Start),
];

impl Status {
    /// The driver writes the register.
    pub fn write(&mut self, value: u8) -> Action {
        // A driver that adds a bit writes back what it has read, NEEDS_RESET included.
        let value = value & !NEEDS_RESET;
        if value == 0 {
            return Action::Reset;
        }
        if value == self.0 | FAILED {
            self.0 = value;
            return Action::None;
        }
        let transition = TRANSITIONS
            .iter()
            .find(|(from, to, _)| (*from, *to) == (self.0, value));
        match transition {
            None => Action::None,
            Some((_, _, Action::CheckFeatures)) => Action::CheckFeatures,
            Some((_, to, action)) => {
                self.0 = *to;
                *action
            }
        }
    }

    /// The features were acceptable.
    pub fn accept_features(&mut self) {
        self.0 = FEATURES_OK;
    }

    /// The register's value.
    pub fn value(self) -> u8 {
        self.0
    }

    /// Whether a driver drives the device. It may be known and have none: that is how Linux leaves it when its driver lets go.
    pub fn has_driver(self) -> bool {
        self.0 & DRIVER == DRIVER
    }

    /// Whether the driver may write its features: after DRIVER, before FEATURES_OK.
    pub fn negotiates_features(self) -> bool {
        self.0 == DRIVER
    }

    /// Whether the driver may set up queues: after FEATURES_OK, before DRIVER_OK. What the device works with is taken over
    /// at DRIVER_OK, and nothing the driver writes later may change it.
    pub fn configures_queues(self) -> bool {
        self.0 == FEATURES_OK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All 65,536 combinations of a register value and a write: what is not in the table does nothing.
    #[test]
    fn only_the_table_changes_the_status() {
        for from in 0..=u8::MAX {
            for written in 0..=u8::MAX {
                let mut status = Status(from);
                let action = status.write(written);
                let value = written & !NEEDS_RESET;
                let (expected, changed) = match (from, value) {
                    (_, 0) => (Action::Reset, from),
                    (0, 1) => (Action::None, 1),
                    (1, 3) => (Action::None, 3),
                    (3, 11) => (Action::CheckFeatures, 3),
                    (11, 15) => (Action::Start, 15),
                    (from, value) if value == from | 128 => (Action::None, value),
                    (from, _) => (Action::None, from),
                };
                assert_eq!((action, status.0), (expected, changed), "{from} {written}");
            }
        }
    }

    #[test]
    fn queues_are_locked_outside_features_ok() {
        for value in 0..=u8::MAX {
            assert_eq!(Status(value).configures_queues(), value == 11);
            assert_eq!(Status(value).negotiates_features(), value == 3);
        }
    }

    #[test]
    fn a_device_that_is_only_known_has_no_driver() {
        for (value, expected) in [(0, false), (1, false), (0x81, false), (3, true), (15, true)] {
            assert_eq!(Status(value).has_driver(), expected, "{value:#x}");
        }
        assert!(Status(15 | FAILED).has_driver());
    }
}
