//! What happens when one end is faster than the other, or is not there.

use std::fs;
use std::time::Instant;

use nix::sys::socket::{setsockopt, sockopt};

use super::*;

#[test]
fn frames_wait_for_buffers_in_their_order() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    let frames: Vec<_> = (0..8).map(|seed| frame(OTHER_MAC, 2000, seed)).collect();
    for bytes in &frames {
        host.send(bytes).unwrap();
    }
    // Less than a frame, a bit more than one, and so on: 2,012 bytes of frame need two buffers each.
    for bytes in &frames {
        rig.give(1, 1500);
        assert_eq!(rig.rx.take_used(), None);
        rig.give(1, 1500);
        assert!(rig.receive() == *bytes);
    }
    assert_eq!(net.dropped(), Dropped::default());
}

#[test]
fn a_short_frame_takes_what_there_is() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    rig.give(3, 200);
    let frames = [60, 150, 60].map(|length| frame(OTHER_MAC, length, length as u64));
    for bytes in &frames {
        host.send(bytes).unwrap();
        assert!(rig.receive() == *bytes);
    }
    let long = frame(OTHER_MAC, 60_000, 9);
    host.send(&long).unwrap();
    rig.give(200, 200);
    host.send(&frames[0]).unwrap();
    assert_eq!(rig.rx.take_used(), None);
    rig.give(50, 1500);
    assert!(rig.receive() == long);
    assert!(rig.receive() == frames[0]);
}

#[test]
fn a_long_frame_after_a_short_one_arrives_whole() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    rig.give(60, 1500);
    for length in [60, 60_000, 60, 2_036, 2_037, 60, 9_000, 60_000] {
        let bytes = frame(OTHER_MAC, length, length as u64);
        host.send(&bytes).unwrap();
        assert!(rig.receive() == bytes, "{length} bytes");
        rig.give(length.div_ceil(1500), 1500);
    }
    assert_eq!(net.dropped(), Dropped::default());
}

#[test]
fn a_driver_without_the_event_index_is_served_too() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, !EVENT_IDX);
    for seed in 0..1000 {
        let bytes = frame(OTHER_MAC, 500, seed);
        host.send(&bytes).unwrap();
        rig.give(1, 1526);
        assert!(rig.receive() == bytes);
        let bytes = frame(MAC, 500, seed);
        rig.send(&bytes, &[]);
        assert!(sent(&host).unwrap() == bytes);
    }
}

#[test]
fn frames_wait_for_a_full_tap_in_their_order() {
    let machine = Machine::default();
    let (host, device) = UnixDatagram::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    setsockopt(&device, sockopt::SndBuf, &8192).unwrap();
    let taps = vec![Tap::from_socket(device.into())];
    let net = Net::with_taps(&nic(1), taps, Offloads::ALL).unwrap();
    let mut rig = Rig::new(&machine, &net, ALL);
    let frames: Vec<_> = (0..200).map(|seed| frame(MAC, 1000, seed)).collect();
    for bytes in &frames {
        rig.offer(bytes, &[]);
    }
    rig.driver.kick(1);
    // What was taken is seen, and that is not all.
    rig.complete();
    let mut taken = 1;
    for bytes in &frames {
        let mut received = vec![0; 2000];
        let length = host.recv(&mut received).unwrap();
        assert!(received[..length] == *bytes);
        while rig.tx.take_used().is_some() {
            taken += 1;
        }
    }
    while taken < 200 {
        rig.complete();
        taken += 1;
    }
    assert_eq!(net.dropped(), Dropped::default());
}

#[test]
fn both_directions_move_at_once() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    host.set_nonblocking(false).unwrap();
    let echo = std::thread::spawn({
        let host = host.try_clone().unwrap();
        move || {
            let mut bytes = vec![0; 1 << 17];
            for _ in 0..5000 {
                let length = host.recv(&mut bytes).unwrap();
                host.send(&bytes[..length]).unwrap();
            }
        }
    });
    let mut random = Random(77);
    let mut expected = std::collections::VecDeque::new();
    rig.give(64, 4096);
    let mut free = 128;
    let (mut offered, mut received) = (0, 0);
    while received < 5000 {
        while rig.tx.take_used().is_some() {
            free += 1;
        }
        if offered < 5000 && free > 0 && expected.len() < 40 {
            let bytes = frame(MAC, 14 + random.below(3000) as usize, offered);
            rig.offer(&bytes, &[]);
            expected.push_back(bytes);
            offered += 1;
            free -= 1;
            if rig.tx.wants_kick() {
                rig.driver.kick(1);
            }
            continue;
        }
        let bytes = rig.receive();
        assert!(expected.pop_front().unwrap() == bytes);
        received += 1;
        rig.give(1, 4096);
    }
    echo.join().unwrap();
    assert_eq!(net.dropped(), Dropped::default());
}

#[test]
fn the_link_goes_down_and_up() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    let generation = |rig: &Rig<'_>| {
        let mut byte = [0];
        rig.driver.read(rig.driver.common + 0x15, &mut byte);
        byte[0]
    };
    let (status, before) = (rig.driver.device + 6, generation(&rig));
    assert_eq!(rig.driver.read_u16(status), 1);
    // A frame waits for buffers while the link goes down. It is for nobody then.
    host.send(&frame(OTHER_MAC, 100, 1)).unwrap();
    net.update(false, &Sources::Mac);
    rig.driver.wait(0);
    assert_eq!(rig.driver.read_u16(status), 0);
    assert_ne!(generation(&rig), before);
    rig.send(&frame(MAC, 100, 2), &[]);
    assert_eq!(sent(&host), None);
    host.send(&frame(OTHER_MAC, 100, 3)).unwrap();
    // No change, no interrupt.
    net.update(false, &Sources::Mac);
    assert_eq!(rig.driver.interrupts(0), 0);
    let start = Instant::now();
    while net.dropped().unlinked < 3 {
        assert!(start.elapsed().as_secs() < 60);
        std::thread::yield_now();
    }

    net.update(true, &Sources::Mac);
    rig.driver.wait(0);
    assert_eq!(rig.driver.read_u16(status), 1);
    let bytes = frame(OTHER_MAC, 100, 4);
    host.send(&bytes).unwrap();
    rig.give(1, 1526);
    assert!(rig.receive() == bytes);
    let bytes = frame(MAC, 100, 5);
    rig.send(&bytes, &[]);
    assert!(sent(&host).unwrap() == bytes);
    assert_eq!(net.dropped().unlinked, 3);
}

/// Whether the device's thread sleeps, and how often it has given way by itself.
fn sleeps(name: &str) -> (bool, u64) {
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else {
            continue;
        };
        if status.starts_with(&format!("Name:\t{name}\n")) {
            let value = |field: &str| {
                let mut lines = status.lines();
                let value = lines.find_map(|line| line.strip_prefix(field)).unwrap();
                value.trim()
            };
            let switches = value("voluntary_ctxt_switches:").parse().unwrap();
            return (value("State:").starts_with('S'), switches);
        }
    }
    panic!("no thread {name}");
}

/// A thread that spins would go to sleep again and again, or never; this one sleeps once and stays asleep.
#[test]
fn nobody_spins_while_a_frame_waits_for_buffers() {
    let (machine, other_machine) = (Machine::default(), Machine::default());
    let (host, device) = UnixDatagram::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    let taps = vec![Tap::from_socket(device.into())];
    let mut idle = nic(1);
    idle.name = "idle".into();
    let net = Net::with_taps(&idle, taps, Offloads::ALL).unwrap();
    let mut rig = Rig::new(&machine, &net, ALL);
    // Served, and a second frame without buffers.
    rig.give(1, 200);
    host.send(&frame(OTHER_MAC, 60, 1)).unwrap();
    rig.receive();
    host.send(&frame(OTHER_MAC, 600, 2)).unwrap();

    let (other, other_host) = on_socket();
    let mut busy = Rig::new(&other_machine, &other, ALL);
    let mut work = || {
        for seed in 0..500 {
            busy.send(&frame(MAC, 60, seed), &[]);
            sent(&other_host).unwrap();
        }
    };
    // It may be a while until it falls asleep.
    let start = Instant::now();
    let asleep = loop {
        let before = sleeps("idle:0");
        work();
        let after = sleeps("idle:0");
        if after == before && after.0 {
            break after;
        }
        assert!(start.elapsed().as_secs() < 60, "{before:?} {after:?}");
    };
    work();
    assert_eq!(sleeps("idle:0"), asleep);
    rig.give(4, 200);
    rig.receive();
}

#[test]
fn a_driver_comes_and_goes() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    for seed in 0..20 {
        let bytes = frame(OTHER_MAC, 100, seed);
        // What comes while nobody is there is for whoever comes next.
        rig.driver.set_status(0);
        host.send(&bytes).unwrap();
        rig = Rig::start(rig.driver, ALL);
        rig.give(2, 1526);
        assert!(rig.receive() == bytes);
    }
    rig.driver.set_status(0);
    machine.bus.detach(rig.driver.slot).unwrap();
}
