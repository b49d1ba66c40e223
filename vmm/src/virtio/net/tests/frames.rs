//! Frames of every length, in chains of every shape.

use super::*;

/// Every length that is short, and those around the sizes that matter.
fn lengths() -> impl Iterator<Item = usize> {
    let around = |length: usize| length - 3..length + 4;
    (0..200)
        .chain(around(1514))
        .chain(around(4096))
        .chain(around(16 * 1514))
        .chain(around(65_535))
        .chain(LONGEST_FRAME - 3..LONGEST_FRAME + 1)
}

#[test]
fn an_interface_describes_itself() {
    let machine = Machine::default();
    let (net, _host) = on_socket();
    let driver = machine.attach(net);
    assert_eq!(machine.config_u32(driver.slot, 0), 0x1041_1af4);
    let usual = [0, 1, 3, 5, 7, 8, 9, 11, 12, 13, 15, 16, 54, 55, 56];
    let usual = usual.iter().fold(0, |all, bit| all | 1u64 << bit);
    assert_eq!(driver.offered(), usual | VERSION_1 | 1 << 28 | EVENT_IDX);
    let mut config = [0; 12];
    driver.read(driver.device, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0, 1, 0, 0xdc, 0x05]);
    assert_eq!(driver.read_u16(driver.common + 0x12), 2);
}

#[test]
fn frames_of_every_length_arrive_in_buffers_of_any_size() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    // As many buffers as there can be, so that the longest frame fits, and a size that the frames have no relation to.
    for length in [577, 1526, 4096, 65_700] {
        rig.give(256, length);
        let mut given = 256;
        for (seed, bytes) in (0..).zip(lengths()) {
            let bytes = frame(OTHER_MAC, bytes, seed);
            host.send(&bytes).unwrap();
            assert!(rig.receive() == bytes, "{} of {length}", bytes.len());
            let used = bytes.len().div_ceil(length as usize);
            rig.give(used, length);
            given += used;
        }
        assert!(given > 256);
        rig = rig.restart(ALL);
    }
    assert_eq!(net.dropped(), Dropped::default());
}

#[test]
fn without_mergeable_buffers_a_frame_has_one() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, !MRG_RXBUF);
    for (seed, length) in (0..).zip(lengths()) {
        let bytes = frame(OTHER_MAC, length, seed);
        rig.give(1, (HEADER + LONGEST_FRAME) as u32);
        host.send(&bytes).unwrap();
        assert!(rig.receive() == bytes, "{length}");
    }
    // One that does not fit is gone, and its buffer is the next one's.
    rig.give(1, 1526);
    host.send(&frame(OTHER_MAC, 1515, 1)).unwrap();
    let short = frame(OTHER_MAC, 1514, 2);
    host.send(&short).unwrap();
    assert!(rig.receive() == short);
    assert_eq!(net.dropped().oversized, 1);
}

#[test]
fn what_no_driver_can_take_is_dropped() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    rig.give(256, 4096);
    let short = frame(OTHER_MAC, 60, 2);
    host.send(&frame(OTHER_MAC, 70_000, 1)).unwrap();
    host.send(&[0; HEADER - 1]).unwrap();
    host.send(&short).unwrap();
    assert!(rig.receive() == short);
    assert_eq!(net.dropped().oversized, 2);
    // All descriptors there are, and yet no room.
    let mut rig = rig.restart(ALL);
    rig.give(256, 64);
    host.send(&frame(OTHER_MAC, 256 * 64 - HEADER + 1, 1))
        .unwrap();
    let longest = frame(OTHER_MAC, 256 * 64 - HEADER, 3);
    host.send(&longest).unwrap();
    assert!(rig.receive() == longest);
    assert_eq!(net.dropped().oversized, 3);
}

#[test]
fn without_segmentation_frames_are_as_long_as_the_link_allows() {
    let machine = Machine::default();
    let (host, device) = UnixDatagram::pair().unwrap();
    device.set_nonblocking(true).unwrap();
    let taps = vec![Tap::from_socket(device.into())];
    let offloads = Offloads::from_features(0);
    let net = Net::with_taps(&nic(1), taps, offloads).unwrap();
    // Without checksums there is nothing else.
    let mut rig = Rig::new(&machine, &net, ALL & !(1 << VIRTIO_NET_F_GUEST_CSUM));
    rig.give(3, 1526);
    for (length, seed) in [(1514, 1), (1522, 2), (60, 3)] {
        let bytes = frame(OTHER_MAC, length, seed);
        host.send(&bytes).unwrap();
        assert!(rig.receive() == bytes, "{length}");
        rig.give(2, 1526);
    }
    // No more buffers are held ready than the link's longest frame needs.
    host.send(&frame(OTHER_MAC, 3052, 4)).unwrap();
    let short = frame(OTHER_MAC, 60, 5);
    host.send(&short).unwrap();
    assert!(rig.receive() == short);
}

#[test]
fn frames_of_every_length_are_sent_in_pieces_of_any_size() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    let mut random = Random(5);
    for (seed, length) in (0..).zip(lengths().filter(|&length| length >= 12)) {
        let bytes = frame(MAC, length, seed);
        let mut shapes = vec![vec![], vec![HEADER], vec![1; 40], vec![0, 5, 0, 7, 0]];
        let count = 1 + random.below(200) as usize;
        let most = 1 + bytes.len() as u64 / 60;
        shapes.push((0..count).map(|_| random.below(most) as usize).collect());
        for shape in shapes {
            rig.send(&bytes, &shape);
            assert!(sent(&host).unwrap() == bytes, "{length} {shape:?}");
        }
    }
    assert_eq!(net.dropped(), Dropped::default());
    rig.send(&frame(MAC, LONGEST_FRAME + 1, 1), &[]);
    // Too short for a source.
    for length in 0..12 {
        rig.send(&frame(MAC, length, 1), &[]);
    }
    assert_eq!(sent(&host), None);
    assert_eq!((net.dropped().invalid, net.dropped().spoofed), (1, 12));
}

#[test]
fn only_headers_that_were_offered_reach_the_kernel() {
    let machine = Machine::default();
    let (net, host) = on_socket();
    let mut rig = Rig::new(&machine, &net, ALL);
    let mut expected = 0;
    for flags in 0..=255u8 {
        for gso in [0, 1, 2, 3, 4, 5, 6, 127, 128, 129, 131, 132, 133, 255] {
            let mut bytes = frame(MAC, 100, 1);
            bytes[0] = flags;
            bytes[1] = gso;
            rig.send(&bytes, &[]);
            bytes[0] &= 1;
            let segmented = bytes[0] == 1 && matches!(gso, 1 | 4 | 5 | 129 | 132);
            if gso == 0 || segmented {
                assert_eq!(sent(&host).unwrap(), bytes, "{flags} {gso}");
            } else {
                assert_eq!(sent(&host), None, "{flags} {gso}");
                expected += 1;
            }
        }
    }
    assert_eq!(net.dropped().invalid, expected);
}
