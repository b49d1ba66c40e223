//! Interrupts and notifications, through KVM.

use super::*;

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
    // As Linux leaves a device that it has let go.
    driver.set_status(1);
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
