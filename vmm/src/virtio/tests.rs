//! The transport as a driver sees it, with a device that records what happens to it.

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

    fn config(&self) -> &[u8] {
        b"configuration"
    }

    fn start(&self, activation: Activation) {
        assert!(self.active.lock().unwrap().replace(activation).is_none());
    }

    fn stop(&self) {
        self.active.lock().unwrap().take();
    }
}

#[test]
fn a_driver_goes_through_all_of_it() {
    let machine = Machine::default();
    let probe = Probe::new();
    let driver = machine.attach(probe.clone());
    assert_eq!(machine.config_u32(driver.slot, 0), 0x1044_1af4);
    assert_eq!(driver.read_u16(driver.common + 0x12), 2);
    let mut config = [0; 4];
    driver.read(driver.device + 9, &mut config);
    assert_eq!(&config, b"tion");
    driver.read(driver.device + 12, &mut config);
    assert_eq!(&config, b"n\0\0\0");

    let features = driver.negotiate(VERSION_1 | EVENT_IDX | 1 << 3);
    assert_eq!(features, VERSION_1 | EVENT_IDX | 1 << 3);
    driver.set_up_queue(0, QUEUES, features);
    driver.set_up_queue(1, QUEUES + 0x1_0000, features);
    driver.kick(0);
    assert_eq!(
        probe.kicks(0),
        0,
        "before the driver is ready, notifications mean nothing"
    );
    driver.set_status(15);
    {
        let mut active = probe.active.lock().unwrap();
        let activation = active.as_mut().unwrap();
        assert_eq!(activation.features, features);
        assert_eq!(activation.rings.len(), 2);
        assert!(activation.rings.iter().all(Option::is_some));
    }
    driver.kick(0);
    driver.kick(1);
    driver.kick(1);
    driver.kick(2);
    assert_eq!((probe.kicks(0), probe.kicks(1)), (1, 2));

    driver.set_status(0);
    assert!(!probe.is_active());
    assert_eq!(driver.status(), 0);
    driver.kick(0);
    assert_eq!(probe.kicks(0), 0);
    driver.select_queue(0);
    assert_eq!(driver.read_u16(driver.common + 0x1c), 0);
    assert_eq!(driver.read_u16(driver.common + 0x1a), 0xffff);
    assert_eq!(driver.read_u32(driver.common + 0x20), 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let machine = Machine::default();
    let driver = machine.attach(Probe::new());
    for (features, agreed) in [
        (0, false),
        (1 << 3, false),
        (VERSION_1 | 1 << 4, false),
        (VERSION_1 | 1 << 33, false),
        (u64::MAX, false),
        (VERSION_1, true),
        (VERSION_1 | 1 << 3 | 1 << 50, true),
    ] {
        driver.set_status(0);
        driver.set_status(1);
        driver.accept(features);
        assert_eq!(driver.read_u32(driver.common + 12), 0, "not before DRIVER");
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(11);
        assert_eq!(
            driver.status(),
            if agreed { 11 } else { 3 },
            "{features:#x}"
        );
        // A second try, as a driver makes that finds out what it can do without.
        driver.accept(VERSION_1);
        driver.set_status(11);
        assert_eq!(driver.status(), 11);
    }
    // There are no features beyond the 64.
    for select in [2u32, u32::MAX] {
        driver.write(driver.common, &select.to_le_bytes());
        assert_eq!(driver.read_u32(driver.common + 4), 0);
    }
}

/// What a device works with does not change under its hands: not after DRIVER_OK, nor before FEATURES_OK, nor once a queue is
/// enabled.
#[test]
fn queues_are_locked_when_the_driver_has_no_business_with_them() {
    let machine = Machine::default();
    let probe = Probe::new();
    let driver = machine.attach(probe.clone());
    let fields = [
        (0x18, 2),
        (0x1a, 2),
        (0x20, 4),
        (0x24, 4),
        (0x28, 4),
        (0x2c, 4),
        (0x30, 4),
        (0x34, 4),
    ];
    let try_all = |changes: bool| {
        for queue in 0..2 {
            driver.select_queue(queue);
            for (offset, length) in fields {
                let at = driver.common + offset;
                let mut before = [0; 4];
                driver.read(at, &mut before[..length]);
                let value = if before[0] == 2 {
                    [1, 0, 0, 0]
                } else {
                    [2, 0, 0, 0]
                };
                driver.write(at, &value[..length]);
                let mut after = [0; 4];
                driver.read(at, &mut after[..length]);
                assert_eq!(before != after, changes, "{offset:#x}");
            }
        }
    };
    for status in [0, 1, 3] {
        driver.set_status(status);
        try_all(false);
        driver.write(driver.common + 0x1c, &1u16.to_le_bytes());
        assert_eq!(driver.read_u16(driver.common + 0x1c), 0);
    }
    driver.accept(VERSION_1);
    driver.set_status(11);
    try_all(true);
    driver.set_status(0);
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, QUEUES, VERSION_1);
    driver.set_up_queue(1, QUEUES + 0x1_0000, VERSION_1);
    try_all(false);
    // A queue cannot be taken back, either.
    driver.write(driver.common + 0x1c, &0u16.to_le_bytes());
    assert_eq!(driver.read_u16(driver.common + 0x1c), 1);
    driver.set_status(15);
    try_all(false);
    let vector = driver.common + 0x10;
    driver.write(vector, &1u16.to_le_bytes());
    assert_eq!(driver.read_u16(vector), 0);
    driver.accept(VERSION_1 | 1 << 3);
    assert_eq!(driver.read_u32(driver.common + 12), 1, "VERSION_1, still");
    // DRIVER_OK a second time, or steps back, do not start it again.
    for status in [15, 11, 3, 1, 7, 0x1f] {
        driver.set_status(status);
        assert_eq!(driver.status(), 15);
    }
    driver.set_status(15 | 0x80);
    assert_eq!(driver.status(), 15 | 0x80);
    try_all(false);
    assert!(probe.is_active());
}

#[test]
fn a_queue_that_is_unusable_is_not_used() {
    let machine = Machine::default();
    let probe = Probe::new();
    let driver = machine.attach(probe.clone());
    let end = 64u64 << 20;
    // Of 256 descriptors: the table takes 4096 bytes, the driver's ring 518, the device's 2054.
    let (table, avail, used) = (0x20, 0x28, 0x30);
    let good = [(table, 0x1000), (avail, 0x3000), (used, 0x4000)];
    for (field, address, works) in [
        (table, 0x1000, true),
        (table, 0x1008, false),
        (table, end - 4096, true),
        (table, end - 4080, false),
        (table, end, false),
        (table, u64::MAX - 15, false),
        (avail, end - 518, true),
        (avail, end - 516, false),
        (avail, 0x3001, false),
        (avail, 1 << 63, false),
        (used, end - 2056, true),
        (used, end - 2052, false),
        (used, 0x4002, false),
        (used, 0xc000_0000, false),
        (used, 0xffff_ffff_ffff_fffc, false),
    ] {
        driver.set_status(0);
        driver.negotiate(VERSION_1 | EVENT_IDX);
        driver.select_queue(0);
        for (field, address) in good.into_iter().chain([(field, address)]) {
            let at = driver.common + field;
            driver.write(at, &(address as u32).to_le_bytes());
            driver.write(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
        driver.write(driver.common + 0x1c, &1u16.to_le_bytes());
        driver.set_status(15);
        let status = if works { 15 } else { 15 | 0x40 };
        assert_eq!(driver.status(), status, "{field:#x} {address:#x}");
        assert_eq!(probe.is_active(), works);
        assert_eq!(driver.interrupts(0), u64::from(!works));
    }
    // A size that is no power of two, or more than there is, does not count.
    driver.set_status(0);
    driver.negotiate(VERSION_1);
    driver.select_queue(1);
    for (written, size) in [
        (0u16, 16),
        (3, 16),
        (17, 16),
        (32, 16),
        (u16::MAX, 16),
        (8, 8),
        (0x8000, 8),
    ] {
        driver.write(driver.common + 0x18, &written.to_le_bytes());
        assert_eq!(driver.read_u16(driver.common + 0x18), size);
    }
    // A queue that does not exist.
    for index in [2, 3, 255, u16::MAX] {
        driver.select_queue(index);
        assert_eq!(driver.read_u16(driver.common + 0x18), 0);
        assert_eq!(driver.read_u16(driver.common + 0x1a), 0xffff);
        driver.write(driver.common + 0x18, &8u16.to_le_bytes());
        driver.write(driver.common + 0x1c, &1u16.to_le_bytes());
        assert_eq!(driver.read_u16(driver.common + 0x18), 0);
        assert_eq!(driver.read_u16(driver.common + 0x1c), 0);
    }
    // A vector that does not exist.
    driver.select_queue(0);
    for (written, vector) in [(2u16, 2), (3, 0xffff), (1, 1), (0xfffe, 0xffff)] {
        driver.write(driver.common + 0x1a, &written.to_le_bytes());
        assert_eq!(driver.read_u16(driver.common + 0x1a), vector);
        driver.write(driver.common + 0x10, &written.to_le_bytes());
        assert_eq!(driver.read_u16(driver.common + 0x10), vector);
    }
}

/// Every access to every byte of the BAR, in each width: none does harm, and none reaches beyond what it names.
#[test]
fn all_accesses_are_safe() {
    let machine = Machine::default();
    let driver = machine.attach(Probe::new());
    let base = driver.common;
    let mut random = Random(1);
    for _ in 0..2 {
        for offset in 0..0x4000 {
            for length in 1..=8.min(0x4000 - offset) {
                let mut data = vec![0xcc; length as usize];
                driver.read(base + offset, &mut data);
                driver.write(base + offset, &random.bytes(length as usize));
            }
        }
        let features = {
            driver.set_status(0);
            driver.negotiate(VERSION_1)
        };
        driver.set_up_queue(0, QUEUES, features);
        driver.set_status(15);
    }
    for _ in 0..100_000 {
        let offset = random.below(0x300);
        let length = 1 + random.below(8) as usize;
        let mut data = random.bytes(length);
        if random.below(2) == 0 {
            driver.write(base + offset, &data);
        } else {
            driver.read(base + offset, &mut data);
        }
    }
}

#[test]
fn interrupts_arrive_unless_they_are_masked_and_then_later() {
    let machine = Machine::default();
    let probe = Probe::new();
    let driver = machine.attach(probe.clone());
    let features = driver.negotiate(VERSION_1);
    let mut queue = driver.set_up_queue(0, QUEUES, features);
    driver.set_status(15);
    queue.add(&[(0x20_0000, 16, WRITE)]);
    queue.add(&[(0x20_0000, 16, WRITE)]);
    let interrupt = || probe.interrupt();
    let pending = || driver.read_u32(driver.pending);
    let control =
        |bits: u16| machine.config_write(driver.slot, driver.msix + 2, &bits.to_le_bytes());
    let mask = |bit: u32| driver.write(driver.table + 16 + 12, &bit.to_le_bytes());

    // MSI-X is not enabled yet: the interrupt waits.
    interrupt();
    assert_eq!(pending(), 1 << 1);
    assert!(!machine.is_requested(0x41));
    driver.enable_interrupts(3);
    assert_eq!(machine.take_interrupt(), 0x41);
    assert_eq!(pending(), 0);
    interrupt();
    assert_eq!(machine.take_interrupt(), 0x41);
    // The vector is masked, and another one is not.
    mask(1);
    interrupt();
    interrupt();
    assert!(!machine.is_requested(0x41));
    assert_eq!(pending(), 1 << 1);
    mask(0);
    assert_eq!(machine.take_interrupt(), 0x41);
    assert_eq!(pending(), 0);
    // Masked again, without the pending bit being looked at.
    mask(1);
    interrupt();
    mask(0);
    assert_eq!(machine.take_interrupt(), 0x41);
    // The function is masked.
    control(0xc000);
    interrupt();
    assert!(!machine.is_requested(0x41));
    assert_eq!(pending(), 1 << 1);
    control(0x8000);
    assert_eq!(machine.take_interrupt(), 0x41);
    // Another message, under the mask and without it.
    for (masked, vector) in [(true, 0x55u32), (false, 0x66)] {
        mask(masked.into());
        driver.write(driver.table + 16 + 8, &vector.to_le_bytes());
        mask(0);
        interrupt();
        assert_eq!(machine.take_interrupt(), vector as u8);
        assert!(!machine.is_requested(0x41));
    }
    // The table can be read as it was written; it has no more entries than there are vectors.
    assert_eq!(driver.read_u32(driver.table + 16), 0xfee0_0000);
    assert_eq!(driver.read_u32(driver.table + 16 + 8), 0x66);
    driver.write(driver.table + 48, &1u32.to_le_bytes());
    assert_eq!(driver.read_u32(driver.table + 48), 0);
    let mut both = [0; 8];
    driver.read(driver.table + 16 + 8, &mut both);
    assert_eq!(both, [0x66, 0, 0, 0, 0, 0, 0, 0]);
    driver.write(driver.table + 16 + 8, &[0x67, 0, 0, 0, 1, 0, 0, 0]);
    interrupt();
    assert_eq!(pending(), 1 << 1);
    // Not while the guest uses it.
    let error = machine.bus.detach(driver.slot).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the guest uses the device in PCI slot 1; it must remove the device first"
    );
    driver.set_status(0);
    machine.bus.detach(driver.slot).unwrap();
    // Gone, its routes can be had again.
    drop(driver);
    assert_eq!(machine.routes.allocate().unwrap(), 24);
}

/// KVM listens where the BAR is: a write of the guest's that never comes to the bus signals the queue.
#[test]
fn notifications_follow_the_bar() {
    let machine = Machine::default();
    let probe = Probe::new();
    let driver = machine.attach(probe.clone());
    let features = driver.negotiate(VERSION_1);
    driver.set_up_queue(0, QUEUES, features);
    driver.set_up_queue(1, QUEUES + 0x1_0000, features);
    driver.set_status(15);
    let bar = |value: u32| machine.config_write(driver.slot, 0x10, &value.to_le_bytes());
    let hears = |address: u64| machine.guest_write(address);
    let old = driver.notify;
    assert!(hears(old + 4));
    assert_eq!((probe.kicks(0), probe.kicks(1)), (0, 1));
    assert!(!hears(old + 8), "there is no third queue");
    bar(0xd000_0000);
    assert!(!hears(old));
    assert!(hears(0xd000_1000));
    assert_eq!((probe.kicks(0), probe.kicks(1)), (1, 0));
    // Into guest memory: it is nowhere.
    bar(0x0010_0000);
    assert!(!hears(0xd000_1000));
    bar(0xe000_0000);
    assert!(hears(0xe000_1000));
    assert_eq!(probe.kicks(0), 1);
    // Stopped, it does not listen; started again, it does.
    machine.bus.mmio_write(0xe000_0014, &[0]);
    assert!(!hears(0xe000_1000));
    assert_eq!(probe.kicks(0), 0);
    machine.bus.detach(driver.slot).unwrap();
    assert!(!hears(0xe000_1000));
}

/// The way into the BAR for a driver that cannot map it (section 4.1.4.9).
#[test]
fn the_bar_can_be_accessed_through_the_configuration_space() {
    let machine = Machine::default();
    let driver = machine.attach(Probe::new());
    let (slot, pci) = (driver.slot, driver.pci);
    let aim = |bar: u8, offset: u32, length: u32| {
        machine.config_write(slot, pci + 4, &[bar]);
        machine.config_write(slot, pci + 8, &offset.to_le_bytes());
        machine.config_write(slot, pci + 12, &length.to_le_bytes());
    };
    let data = pci + 16;
    aim(0, 0x12, 2);
    assert_eq!(machine.config_u32(slot, data), 2, "two queues");
    aim(0, 0x14, 1);
    machine.config_write(slot, data, &[1]);
    assert_eq!(driver.status(), 1);
    assert_eq!(machine.config_u8(slot, data), 1);
    aim(0, 0, 4);
    machine.config_write(slot, data, &1u32.to_le_bytes());
    assert_eq!(driver.read_u32(driver.common), 1);
    aim(0, 0x200, 4);
    assert_eq!(machine.config_u32(slot, data), u32::from_le_bytes(*b"conf"));
    assert_eq!(machine.config_u8(slot, data + 2), b'n');
    // Accesses that the capability does not allow read zero and write nothing.
    for (bar, offset, length) in [
        (1, 0x200, 4),
        (0, 0x201, 4),
        (0, 0x202, 4),
        (0, 0x4000, 4),
        (0, 0x3fff, 2),
        (0, u32::MAX, 1),
        (0, u32::MAX - 3, 4),
        (0, 0x200, 0),
        (0, 0x200, 3),
        (0, 0x200, 8),
        (0, 0x200, u32::MAX),
    ] {
        aim(bar, offset, length);
        assert_eq!(
            machine.config_u32(slot, data),
            0,
            "{bar} {offset:#x} {length}"
        );
        machine.config_write(slot, data, &u32::MAX.to_le_bytes());
    }
    // Too little data, or not from its start.
    aim(0, 0, 4);
    machine.config_write(slot, data, &[9]);
    machine.config_write(slot, data + 1, &[9]);
    assert_eq!(driver.read_u32(driver.common), 1);
}

#[test]
fn the_interrupt_status_is_cleared_by_reading_it() {
    let machine = Machine::default();
    let probe = Probe::new();
    let driver = machine.attach(probe.clone());
    driver.set_status(0);
    driver.negotiate(VERSION_1);
    driver.set_up_queue_without_vector(0, QUEUES, VERSION_1);
    driver.set_status(15);
    probe.interrupt();
    probe.break_ring();
    let isr = || {
        let mut isr = [0];
        driver.read(driver.isr, &mut isr);
        isr[0]
    };
    assert_eq!(isr(), 3);
    assert_eq!(isr(), 0);
    assert_eq!(driver.status(), 15 | 0x40);
}

/// Section 2.7.7: what the driver asks for with and without the event index.
#[test]
fn a_driver_is_interrupted_as_often_as_it_wants() {
    let machine = Machine::default();
    let probe = Probe::new();
    let driver = machine.attach(probe.clone());
    driver.negotiate(VERSION_1);
    let queue = driver.set_up_queue(0, QUEUES, VERSION_1);
    driver.set_status(15);
    for (flags, interrupts) in [(0u16, 1), (1, 0), (0, 1), (0xfffe, 1), (0xffff, 0)] {
        machine
            .ram
            .write_obj(flags, GuestAddress(queue.avail))
            .unwrap();
        probe.interrupt();
        assert_eq!(driver.interrupts(1), interrupts, "{flags:#x}");
    }
    driver.set_status(0);
    driver.negotiate(VERSION_1 | EVENT_IDX);
    let queue = driver.set_up_queue(0, QUEUES, VERSION_1 | EVENT_IDX);
    driver.set_status(15);
    let event = GuestAddress(queue.avail + 4 + u64::from(queue.size) * 2);
    // The interrupt is for the used buffer with this number, and the first one has number 0.
    for (wanted, interrupts) in [
        (0u16, 1),
        (0, 0),
        (2, 1),
        (5, 0),
        (5, 0),
        (5, 1),
        (5, 0),
        (0xffff, 0),
    ] {
        machine.ram.write_obj(wanted, event).unwrap();
        machine
            .ram
            .write_obj(1u16, GuestAddress(queue.avail))
            .unwrap();
        probe.interrupt();
        assert_eq!(driver.interrupts(1), interrupts, "{wanted}");
    }
}
