//! The common configuration structure (section 4.1.4.3): the registers by which a driver sets a device up.
//!
//! Each register can be written only while the specification has the driver write it, so that nothing a device has begun to
//! work with changes under its hands. Everything else that is written is ignored.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::Queue;
use super::ring::Place;
use super::status::{Action, NEEDS_RESET, Status};

/// Length of the structure in bytes, with what version 1.2 has added to it.
pub const LENGTH: u64 = 0x3c;

/// No MSI-X vector (section 4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// The features that concern the rings, which every device here has.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

// Offsets of the registers; 64-bit registers are written by halves.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

/// What the registers show besides what was written to them.
#[derive(Debug, Clone, Copy)]
pub struct Shown {
    /// The device needs a reset.
    pub broken: bool,
    /// Of the device's own configuration (section 2.5.1).
    pub generation: u8,
}

/// The registers.
#[derive(Debug)]
pub struct Common {
    offered: u64,
    /// What the driver has accepted.
    features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: Status,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

#[derive(Debug)]
struct QueueRegisters {
    max_size: u16,
    place: Place,
    vector: u16,
    enabled: bool,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            place: Place {
                size: max_size,
                ..Place::default()
            },
            vector: NO_VECTOR,
            enabled: false,
        }
    }
}

impl Common {
    /// The registers of a device with these features of its own and these queues, as they are after a reset.
    pub fn new(features: u64, queues: &[Queue]) -> Self {
        Self {
            offered: features | RING_FEATURES,
            features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: Status::default(),
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: queues
                .iter()
                .map(|queue| QueueRegisters::new(queue.size))
                .collect(),
        }
    }

    /// Puts all registers back to where they were at first.
    pub fn reset(&mut self) {
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        self.features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.status = Status::default();
        self.config_vector = NO_VECTOR;
        self.queue_select = 0;
    }

    /// Whether a driver has begun to use the device since it was reset.
    pub fn has_driver(&self) -> bool {
        self.status.has_driver()
    }

    /// The features that driver and device have agreed upon.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the driver wants the event index in its rings.
    pub fn has_event_idx(&self) -> bool {
        self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
    }

    /// The MSI-X vector for configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// For each queue where its ring is and its MSI-X vector, or `None` when the driver does not use the queue.
    pub fn queues(&self) -> impl Iterator<Item = Option<(Place, u16)>> + '_ {
        self.queues
            .iter()
            .map(|queue| queue.enabled.then_some((queue.place, queue.vector)))
    }

    /// The driver reads. Section 4.1.3.1 has it read each register as a whole, 64-bit registers by halves; anything else
    /// reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8], shown: Shown) {
        let queue = self.queues.get(usize::from(self.queue_select));
        let place = queue.map(|queue| queue.place).unwrap_or_default();
        let value = match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select,
            (DEVICE_FEATURE, 4) => half(self.offered, self.device_feature_select),
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select,
            (DRIVER_FEATURE, 4) => half(self.features, self.driver_feature_select),
            (CONFIG_VECTOR, 2) => self.config_vector.into(),
            (NUM_QUEUES, 2) => self.queues.len() as u32,
            (DEVICE_STATUS, 1) if shown.broken => (self.status.value() | NEEDS_RESET).into(),
            (DEVICE_STATUS, 1) => self.status.value().into(),
            (CONFIG_GENERATION, 1) => shown.generation.into(),
            (QUEUE_SELECT, 2) => self.queue_select.into(),
            // A queue that does not exist has size 0.
            (QUEUE_SIZE, 2) => place.size.into(),
            (QUEUE_VECTOR, 2) => queue.map_or(NO_VECTOR, |queue| queue.vector).into(),
            (QUEUE_ENABLE, 2) => queue.is_some_and(|queue| queue.enabled).into(),
            (QUEUE_NOTIFY_OFF, 2) => self.queue_select.into(),
            (QUEUE_DESC, 4) => half(place.descriptors, 0),
            (0x24, 4) => half(place.descriptors, 1),
            (QUEUE_DRIVER, 4) => half(place.driver, 0),
            (0x2c, 4) => half(place.driver, 1),
            (QUEUE_DEVICE, 4) => half(place.device, 0),
            (0x34, 4) => half(place.device, 1),
            // Neither queue_notify_data nor queue_reset, whose features are not offered, mean anything.
            _ => 0,
        };
        data.fill(0);
        let length = data.len().min(4);
        data[..length].copy_from_slice(&value.to_le_bytes()[..length]);
    }

    /// The driver writes. Tells what else must be done; [`Action::CheckFeatures`] has been done already.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut bytes = [0; 4];
        let Some(to) = bytes.get_mut(..data.len()) else {
            return Action::None;
        };
        to.copy_from_slice(data);
        let value = u32::from_le_bytes(bytes);
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value,
            (DRIVER_FEATURE, 4) if self.status.negotiates_features() => {
                set_half(&mut self.features, self.driver_feature_select, value);
            }
            (CONFIG_VECTOR, 2) if self.status.configures_queues() => {
                self.config_vector = self.valid_vector(value as u16);
            }
            (DEVICE_STATUS, 1) => return self.write_status(value as u8),
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_SIZE..LENGTH, _) if self.status.configures_queues() => {
                self.write_queue(offset, data.len(), value);
            }
            _ => {}
        }
        Action::None
    }

    fn write_status(&mut self, value: u8) -> Action {
        match self.status.write(value) {
            // Section 2.2.2: a device refuses features that it did not offer. VERSION_1 is not optional for a modern one.
            Action::CheckFeatures => {
                if self.features & !self.offered == 0
                    && self.features & 1 << VIRTIO_F_VERSION_1 != 0
                {
                    self.status.accept_features();
                }
                Action::None
            }
            action => action,
        }
    }

    /// Section 4.1.4.3.2: "The driver MUST configure the other virtqueue fields before enabling the virtqueue", so that an
    /// enabled queue does not change any more.
    fn write_queue(&mut self, offset: u64, length: usize, value: u32) {
        let vector = self.valid_vector(value as u16);
        let index = usize::from(self.queue_select);
        let Some(queue) = self.queues.get_mut(index).filter(|queue| !queue.enabled) else {
            return;
        };
        let place = &mut queue.place;
        match (offset, length) {
            (QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    place.size = size;
                }
            }
            (QUEUE_VECTOR, 2) => queue.vector = vector,
            (QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            (QUEUE_DESC, 4) => set_half(&mut place.descriptors, 0, value),
            (0x24, 4) => set_half(&mut place.descriptors, 1, value),
            (QUEUE_DRIVER, 4) => set_half(&mut place.driver, 0, value),
            (0x2c, 4) => set_half(&mut place.driver, 1, value),
            (QUEUE_DEVICE, 4) => set_half(&mut place.device, 0, value),
            (0x34, 4) => set_half(&mut place.device, 1, value),
            _ => {}
        }
    }

    /// A vector that does not exist cannot be used, which the driver sees by reading it back (section 4.1.5.1.2.1). There is
    /// one for each queue and one for the configuration.
    fn valid_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) <= self.queues.len() {
            vector
        } else {
            NO_VECTOR
        }
    }
}

/// The lower (0) or upper (1) half of a 64-bit register; there are no others.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(register: &mut u64, select: u32, value: u32) {
    match select {
        0 => *register = *register & !0xffff_ffff | u64::from(value),
        1 => *register = *register & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}
