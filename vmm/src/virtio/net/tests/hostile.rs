//! What a guest, or a request of the shim's, can have wrong.

use super::*;

#[test]
fn hostile_chains_need_a_reset_and_nothing_else() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut driver = machine.attach(net.clone());
    let sent_chains: &[(&str, &[Buffer])] = &[
        ("no header", &[(TX_BUFFERS, 0, 0)]),
        ("a short header", &[(TX_BUFFERS, 11, 0)]),
        ("only room", &[(TX_BUFFERS, 100, WRITE)]),
        ("outside", &[(OUTSIDE, 100, 0)]),
        ("ends outside", &[(OUTSIDE - 99, 100, 0)]),
        ("4 GiB", &[(TX_BUFFERS, u32::MAX, 0)]),
        ("wraps", &[(TX_BUFFERS, 12, 0), (u64::MAX - 7, 100, 0)]),
        ("order", &[(TX_BUFFERS, 12, WRITE), (TX_BUFFERS, 100, 0)]),
        ("a table outside", &[(OUTSIDE, 32, INDIRECT)]),
    ];
    for (name, buffers) in sent_chains {
        let mut rig = Rig::start(driver, ALL);
        rig.tx.add(buffers);
        driver = is_broken(rig, 1, name);
    }
    let received_chains: &[(&str, &[Buffer])] = &[
        ("no room", &[(RX_BUFFERS, 100, 0)]),
        ("no room for a header", &[(RX_BUFFERS, 11, WRITE)]),
        ("outside", &[(OUTSIDE, 100, WRITE)]),
        ("ends outside", &[(OUTSIDE - 99, 100, WRITE)]),
        ("4 GiB", &[(RX_BUFFERS, u32::MAX, WRITE)]),
        ("an empty table", &[(TABLE, 0, INDIRECT)]),
    ];
    for features in [ALL, !MRG_RXBUF] {
        for (name, buffers) in received_chains {
            let mut rig = Rig::start(driver, features);
            rig.rx.add(buffers);
            driver = is_broken(rig, 0, name);
        }
    }
    type Hostile = fn(&mut DriverQueue<'_>);
    let cases: &[(&str, Hostile)] = &[
        ("a head outside the table", |queue| queue.offer(256)),
        ("more than there is room for", |queue| {
            queue.set_avail_index(257);
        }),
        ("a loop", |queue| {
            queue.write_descriptor(queue.table, 0, RX_BUFFERS, 16, NEXT | WRITE, 0);
            queue.offer(0);
        }),
    ];
    for (name, hostile) in cases {
        let mut rig = Rig::start(driver, ALL);
        hostile(&mut rig.rx);
        driver = is_broken(rig, 0, name);
    }
    let mut rig = Rig::start(driver, ALL);
    let bytes = frame(MAC, 100, 1);
    rig.send(&bytes, &[]);
    assert_eq!(sent(&host).unwrap(), bytes);
    assert_eq!(sent(&host), None);
}

/// Kicks a queue of the device, which must ask for a reset; then it is reset.
fn is_broken<'a>(rig: Rig<'a>, queue: u16, name: &str) -> Driver<'a> {
    rig.driver.kick(queue);
    rig.driver.wait(0);
    assert_eq!(rig.driver.status(), 15 | 0x40, "{name}");
    rig.driver.set_status(0);
    rig.driver
}

/// A header in the smallest pieces, and buffers for one frame in many of them.
#[test]
fn strange_buffers_are_filled_all_the_same() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    for features in [ALL, !MRG_RXBUF] {
        let mut rig = Rig::new(&machine, &net, features);
        let mut buffers = Vec::new();
        let mut at = RX_BUFFERS;
        for index in 0..255u64 {
            let length = if index < 20 { 1 } else { index * 3 };
            buffers.push((at, length as u32, WRITE));
            buffers.push((at, 0, WRITE));
            at += length;
        }
        buffers.truncate(256);
        let total: u32 = buffers.iter().map(|(_, length, _)| length).sum();
        rig.rx.add_indirect(TABLE, &buffers);
        rig.driver.kick(0);
        let bytes = frame(OTHER_MAC, total as usize - HEADER, 1);
        host.send(&bytes).unwrap();
        assert!(rig.receive() == bytes);
        rig.driver.set_status(0);
        machine.bus.detach(rig.driver.slot).unwrap();
    }
}

/// Chains that are mostly right, with something wrong here and there: frames arrive as they were sent, or not at all, or the
/// device needs a reset.
#[test]
fn random_chains_harm_nobody() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut driver = Some(machine.attach(net.clone()));
    let mut random = Random(4711);
    let (mut broken, mut received, mut taken) = (0, 0, 0);
    while broken < 100 || received < 1000 || taken < 1000 {
        let features = [ALL, !MRG_RXBUF, !EVENT_IDX][random.below(3) as usize];
        let mut rig = Rig::start(driver.take().unwrap(), features);
        for _ in 0..100 {
            let mut buffers: Vec<Buffer> = Vec::new();
            let index = random.below(2) as u16;
            let (base, flags) = [(RX_BUFFERS, WRITE), (TX_BUFFERS, 0)][usize::from(index)];
            for _ in 0..1 + random.below(4) {
                buffers.push((
                    base + random.below(4) * 64,
                    random.below(3000) as u32,
                    flags,
                ));
            }
            buffers[0].1 += 12;
            if random.below(30) == 0 {
                let count = buffers.len() as u64;
                let (address, length, flags) = &mut buffers[random.below(count) as usize];
                match random.below(5) {
                    0 => *address = random.number(),
                    1 => *address = OUTSIDE - random.below(600),
                    2 => *length = random.number() as u32,
                    3 => *flags ^= WRITE,
                    _ => *length = 0,
                }
            }
            let start = frame(MAC, 60, random.number());
            let ram = &machine.ram;
            ram.write_slice(&start, GuestAddress(TX_BUFFERS)).unwrap();
            let queue = if index == 0 { &mut rig.rx } else { &mut rig.tx };
            if random.below(2) == 0 {
                queue.add(&buffers);
            } else {
                queue.add_indirect(TABLE + random.below(8) * 0x1000, &buffers);
            }
            // The other end may be full, and that is fine too.
            let _ = host.send(&frame(OTHER_MAC, random.below(3000) as usize, 1));
            rig.driver.kick(index);
            while sent(&host).is_some() {
                taken += 1;
            }
            while rig.rx.take_used().is_some() {
                received += 1;
            }
            while rig.tx.take_used().is_some() {}
            if rig.driver.status() != 15 {
                broken += 1;
                break;
            }
        }
        rig.driver.set_status(0);
        driver = Some(rig.driver);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |change: &dyn Fn(&mut Nic), files: usize, words: &[&str]| {
        let mut nic = nic(1);
        change(&mut nic);
        let files = (0..files).map(|_| UnixDatagram::pair().unwrap().0.into());
        let error = Net::new(&nic, files.collect()).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    };
    refused(
        &|nic| nic.mac = [0; 6],
        1,
        &["\"eth0\"", "hardware address"],
    );
    refused(
        &|nic| nic.mac = [1, 0, 0, 0, 0, 1],
        1,
        &["hardware address"],
    );
    refused(&|nic| nic.mtu = 67, 1, &["MTU is 67", "68"]);
    for pairs in [0, 9] {
        let words = [&format!("{pairs} pairs"), "1 to 8"];
        refused(&|nic| nic.pairs = pairs, 1, &words);
    }
    refused(&|nic| nic.pairs = 2, 1, &["2 pairs", "1 descriptors"]);
    refused(&|_| {}, 1, &["descriptor 0", "no tap"]);
}
