//! How a driver sets a device up, and what it cannot do.

use super::*;

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
