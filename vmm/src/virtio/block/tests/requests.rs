//! What the device is for.

use super::*;

#[test]
fn a_disk_describes_itself() {
    let machine = Machine::default();
    let content = file(&[0; 4096]);
    for (read_only, queues, features) in [
        (true, 1, 1u64 << 2 | 1 << 5),
        (false, 1, 1 << 2 | 1 << 9 | 1 << 13 | 1 << 14),
        (false, 3, 1 << 2 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14),
    ] {
        let mut disk = disk(read_only, &[extent(0, 4096)]);
        disk.queues = queues;
        let files = vec![content.try_clone().unwrap().into()];
        let driver = machine.attach(Block::new(&disk, files).unwrap());
        assert_eq!(machine.config_u32(driver.slot, 0), 0x1042_1af4);
        assert_eq!(driver.offered(), features | VERSION_1 | 1 << 28 | EVENT_IDX);
        assert_eq!(driver.read_u32(driver.device), 8);
        assert_eq!(driver.read_u32(driver.device + 4), 0);
        assert_eq!(driver.read_u32(driver.device + 12), 126);
        assert_eq!(driver.read_u16(driver.device + 34), queues);
        assert_eq!(driver.read_u16(driver.common + 0x12), queues);
        machine.bus.detach(driver.slot).unwrap();
    }
}

#[test]
fn what_is_written_is_read_across_extents() {
    let machine = Machine::default();
    // Extents that are no multiples of the sector, out of files with other things before and behind.
    let files = [
        file(&[0x11; 10_000]),
        file(&[0x22; 5_000]),
        file(&[0x33; 90_000]),
    ];
    let extents = [extent(1_000, 3_001), extent(7, 999), extent(4_096, 81_056)];
    let length = 85_056 - 85_056 % 512;
    let extents = [extents[0], extents[1], extent(4_096, length - 4_000)];
    let mut expected = vec![0x11; 3_001];
    expected.extend(vec![0x22; 999]);
    expected.extend(vec![0x33; length as usize - 4_000]);

    let device = block(false, &extents, &[&files[0], &files[1], &files[2]]);
    let mut rig = Rig::new(&machine, device);
    let mut random = Random(7);
    for round in 0..400 {
        let sectors = 1 + random.below(40);
        let sector = random.below(length / 512 - sectors);
        let bytes = sectors as usize * 512;
        let at = sector as usize * 512;
        // Buffers of odd sizes at odd places, header and status split or together with the data.
        let write = round % 2 == 0;
        let flags = if write { 0 } else { WRITE };
        let mut pieces = vec![(HEADER, 7, 0), (HEADER + 7, 9, 0)];
        let mut offset = 0;
        while offset < bytes {
            let piece = (1 + random.below(9_000) as usize).min(bytes - offset);
            pieces.push((DATA + offset as u64, piece as u32, flags));
            offset += piece;
        }
        pieces.push((STATUS, 1, WRITE));
        if write {
            let data = random.bytes(bytes);
            rig.put(&data);
            expected[at..at + bytes].copy_from_slice(&data);
        } else {
            rig.put(&vec![0xaa; bytes]);
        }
        rig.prepare(if write { OUT } else { IN }, sector);
        let head = if round % 3 == 0 {
            rig.queue.add_indirect(TABLE, &pieces)
        } else {
            rig.queue.add(&pieces)
        };
        let used = if write { 1 } else { bytes as u32 + 1 };
        assert_eq!(rig.complete(head), (OK, used), "round {round}");
        if !write {
            assert!(rig.get(bytes) == expected[at..at + bytes], "round {round}");
        }
    }
    assert_eq!(rig.request(FLUSH, 0, 0, 0), (OK, 1));
    let mut rest = vec![0; 1_000];
    files[0].read_exact_at(&mut rest, 0).unwrap();
    assert_eq!(rest, [0x11; 1_000]);
    files[1].read_exact_at(&mut rest[..7], 0).unwrap();
    assert_eq!(rest[..7], [0x22; 7]);
    let mut first = vec![0; 3_001];
    files[0].read_exact_at(&mut first, 1_000).unwrap();
    assert!(first == expected[..3_001]);
}

#[test]
fn other_requests() {
    let machine = Machine::default();
    let content = file(&[0; 512]);
    let mut rig = Rig::new(&machine, block(false, &[extent(0, 512)], &[&content]));
    rig.put(&[0xff; 32]);
    assert_eq!(rig.request(GET_ID, 0, 20, WRITE), (OK, 21));
    assert_eq!(&rig.get(21), b"scratch\0\0\0\0\0\0\0\0\0\0\0\0\0\xff");
    rig.put(&[0xff; 32]);
    assert_eq!(rig.request(GET_ID, 0, 4, WRITE), (OK, 5));
    assert_eq!(&rig.get(5), b"scra\xff");
    for kind in [
        2,
        3,
        5,
        6,
        7,
        9,
        10,
        12,
        14,
        15,
        16,
        0x100,
        0x8000_0000,
        u32::MAX,
    ] {
        assert_eq!(rig.request(kind, 0, 512, WRITE), (UNSUPP, 1), "{kind}");
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let machine = Machine::default();
    let content = file(&[0x5a; 1 << 20]);
    let blocks = || content.metadata().unwrap().len();
    let extents = [extent(0, 500_000), extent(500_000, (1 << 20) - 500_000)];
    let mut rig = Rig::new(&machine, block(false, &extents, &[&content, &content]));

    let ranges = rig.put_ranges(&[(0, 8, 0), (970, 20, 0), (2047, 1, 0)]);
    assert_eq!(rig.request(WRITE_ZEROES, 0, ranges, 0), (OK, 1));
    let mut after = vec![0; 1 << 20];
    content.read_exact_at(&mut after, 0).unwrap();
    for (sector, bytes) in after.chunks(512).enumerate() {
        let zeroed = matches!(sector, 0..8 | 970..990 | 2047);
        let expected = if zeroed { 0 } else { 0x5a };
        assert!(
            bytes.iter().all(|&byte| byte == expected),
            "sector {sector}"
        );
    }
    let ranges = rig.put_ranges(&[(100, 800, 1)]);
    assert_eq!(rig.request(WRITE_ZEROES, 0, ranges, 0), (OK, 1));
    let ranges = rig.put_ranges(&[(1000, 1000, 0)]);
    assert_eq!(rig.request(DISCARD, 0, ranges, 0), (OK, 1));
    content.read_exact_at(&mut after, 0).unwrap();
    assert!(after[100 * 512..900 * 512].iter().all(|&byte| byte == 0));
    assert!(after[1000 * 512..2000 * 512].iter().all(|&byte| byte == 0));
    assert!(
        after[2000 * 512..2047 * 512]
            .iter()
            .all(|&byte| byte == 0x5a)
    );
    assert_eq!(blocks(), 1 << 20, "the file keeps its size");
}

#[test]
fn the_event_index_is_optional() {
    let machine = Machine::default();
    let content = file(&[0x5a; 4096]);
    let driver = machine.attach(block(false, &[extent(0, 4096)], &[&content]));
    let mut rig = Rig::start(driver, !EVENT_IDX);
    assert_eq!(rig.request(IN, 0, 4096, WRITE), (OK, 4097));
    assert_eq!(rig.request(OUT, 0, 4096, 0), (OK, 1));
}

#[test]
fn queues_are_served_at_the_same_time_and_stop_together() {
    let machine = Machine::default();
    let content = file(&[0x5a; 1 << 20]);
    let mut four = disk(false, &[extent(0, 1 << 20)]);
    four.queues = 4;
    let device = Block::new(&four, vec![content.into()]).unwrap();
    let driver = machine.attach(device);
    for _ in 0..20 {
        let features = driver.negotiate(u64::MAX);
        // The third queue is not used.
        let mut queues: Vec<_> = [0, 1, 3]
            .into_iter()
            .map(|index| {
                let at = QUEUE + u64::from(index) * 0x1_0000;
                (index, driver.set_up_queue(index, at, features))
            })
            .collect();
        driver.set_status(15);
        for (index, queue) in &mut queues {
            let header = HEADER + u64::from(*index) * 16;
            machine
                .ram
                .write_slice(&[0; 16], GuestAddress(header))
                .unwrap();
            for request in 0..16u64 {
                let data = DATA + (u64::from(*index) * 16 + request) * 0x1_0000;
                let status = STATUS + u64::from(*index);
                queue.add(&[(header, 16, 0), (data, 0x1_0000, WRITE), (status, 1, WRITE)]);
            }
            driver.kick(*index);
        }
        driver.kick(2);
        driver.wait(2);
        driver.set_status(0);
        // It has stopped: no request is completed after that.
        let used = |queue: &DriverQueue<'_>| -> u16 {
            machine.ram.read_obj(GuestAddress(queue.used + 2)).unwrap()
        };
        let before: Vec<_> = queues.iter().map(|(_, queue)| used(queue)).collect();
        assert!(before[1] > 0);
        for (index, _) in &queues {
            driver.kick(*index);
        }
        let after: Vec<_> = queues.iter().map(|(_, queue)| used(queue)).collect();
        assert_eq!(before, after);
        for vector in 0..5 {
            driver.interrupts(vector);
        }
    }
}
