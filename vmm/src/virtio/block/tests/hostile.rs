//! What a guest, or a request of the shim's, can have wrong.

use super::*;

#[test]
fn a_read_only_disk_cannot_be_changed() {
    let machine = Machine::default();
    let content = file(&[0x5a; 8192]);
    let mut rig = Rig::new(&machine, block(true, &[extent(0, 8192)], &[&content]));
    rig.put(&[0xff; 4096]);
    assert_eq!(rig.request(OUT, 0, 4096, 0), (IOERR, 1));
    let ranges = rig.put_ranges(&[(0, 8, 0)]);
    assert_eq!(rig.request(DISCARD, 0, ranges, 0), (IOERR, 1));
    assert_eq!(rig.request(WRITE_ZEROES, 0, ranges, 0), (IOERR, 1));
    assert_eq!(rig.request(FLUSH, 0, 0, 0), (OK, 1));
    assert_eq!(rig.request(IN, 0, 8192, WRITE), (OK, 8193));
    assert!(rig.get(8192) == [0x5a; 8192]);
}

#[test]
fn requests_beyond_the_disk_or_across_sectors_do_nothing() {
    let machine = Machine::default();
    let content = file(&[0x5a; 16_384]);
    let mut rig = Rig::new(&machine, block(false, &[extent(4096, 8192)], &[&content]));
    rig.put(&[0xff; 16_384]);
    for (sector, length) in [
        (16, 512),
        (15, 1024),
        (0, 8704),
        (0, 100),
        (1, 513),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (1 << 55, 512),
        (i64::MAX as u64 / 512, 512),
    ] {
        assert_eq!(
            rig.request(OUT, sector, length, 0),
            (IOERR, 1),
            "{sector} {length}"
        );
        assert_eq!(
            rig.request(IN, sector, length, WRITE),
            (IOERR, 1),
            "{sector} {length}"
        );
    }
    assert_eq!(rig.request(IN, 15, 512, WRITE), (OK, 513));
    assert_eq!(rig.request(IN, 16, 0, WRITE), (OK, 1));
    let mut after = vec![0; 16_384];
    content.read_exact_at(&mut after, 0).unwrap();
    assert!(after == [0x5a; 16_384]);
}

#[test]
fn one_bad_range_spoils_the_request() {
    let machine = Machine::default();
    let content = file(&[0x5a; 1 << 20]);
    let mut rig = Rig::new(&machine, block(false, &[extent(0, 1 << 20)], &[&content]));
    let good = (0, 8, 0);
    for (kind, bad, status) in [
        (DISCARD, (2048, 1, 0), IOERR),
        (DISCARD, (2047, 2, 0), IOERR),
        (DISCARD, (u64::MAX, 1, 0), IOERR),
        (DISCARD, (0, u32::MAX, 0), IOERR),
        (DISCARD, (0, (1 << 21) + 1, 0), IOERR),
        (DISCARD, (8, 1, 1), UNSUPP),
        (DISCARD, (8, 1, 2), UNSUPP),
        (WRITE_ZEROES, (2048, 1, 0), IOERR),
        (WRITE_ZEROES, (1 << 55, 8, 0), IOERR),
        (WRITE_ZEROES, (8, 1, 2), UNSUPP),
        (WRITE_ZEROES, (8, 1, 1 << 31), UNSUPP),
    ] {
        let ranges = rig.put_ranges(&[good, bad]);
        assert_eq!(
            rig.request(kind, 0, ranges, 0),
            (status, 1),
            "{kind} {bad:?}"
        );
    }
    rig.put_ranges(&[good; 33]);
    for length in [0, 1, 15, 17, 33 * 16] {
        assert_eq!(rig.request(DISCARD, 0, length, 0), (IOERR, 1), "{length}");
        assert_eq!(
            rig.request(WRITE_ZEROES, 0, length, 0),
            (IOERR, 1),
            "{length}"
        );
    }
    let mut after = vec![0; 1 << 20];
    content.read_exact_at(&mut after, 0).unwrap();
    assert!(after.iter().all(|&byte| byte == 0x5a));
    rig.put_ranges(&[good; 32]);
    assert_eq!(rig.request(DISCARD, 0, 32 * 16, 0), (OK, 1));
}

#[test]
fn hostile_chains_need_a_reset_and_nothing_else() {
    let machine = Machine::default();
    let content = file(&[0x5a; 4096]);
    let mut driver = machine.attach(block(false, &[extent(0, 4096)], &[&content]));
    let last = u64::MAX - 7;
    let header = (HEADER, 16, 0);
    let status = (STATUS, 1, WRITE);
    let cases: &[(&str, &[Buffer])] = &[
        ("no status", &[header]),
        ("an empty status", &[header, (STATUS, 0, WRITE)]),
        ("no header", &[status]),
        ("a short header", &[(HEADER, 15, 0), status]),
        ("data outside", &[header, (OUTSIDE, 512, WRITE), status]),
        (
            "data that ends outside",
            &[header, (OUTSIDE - 511, 512, WRITE), status],
        ),
        ("data that wraps", &[header, (last, 512, WRITE), status]),
        ("data of 4 GiB", &[header, (DATA, u32::MAX, WRITE), status]),
        ("a status outside", &[header, (OUTSIDE, 1, WRITE)]),
        ("a header outside", &[(OUTSIDE, 16, 0), status]),
        ("readable after writable", &[header, status, (DATA, 512, 0)]),
        ("an indirect table outside", &[(OUTSIDE, 32, INDIRECT)]),
        ("an indirect table of odd length", &[(TABLE, 17, INDIRECT)]),
        ("an empty indirect table", &[(TABLE, 0, INDIRECT)]),
        ("a table in the header's place", &[(HEADER, 16, INDIRECT)]),
    ];
    for (name, buffers) in cases {
        let mut rig = Rig::start(driver, u64::MAX);
        rig.prepare(IN, 0);
        rig.queue.add(buffers);
        driver = is_broken(rig, name);
    }
    type Hostile = fn(&mut DriverQueue<'_>);
    let cases: &[(&str, Hostile)] = &[
        ("a loop", |queue| {
            queue.write_descriptor(queue.table, 0, HEADER, 16, NEXT, 1);
            queue.write_descriptor(queue.table, 1, DATA, 512, NEXT, 0);
            queue.offer(0);
        }),
        ("a next outside the table", |queue| {
            queue.write_descriptor(queue.table, 0, HEADER, 16, NEXT, 128);
            queue.offer(0);
        }),
        ("a head outside the table", |queue| queue.offer(128)),
        ("a head far outside the table", |queue| {
            queue.offer(u16::MAX)
        }),
        ("an indirect table in an indirect table", |queue| {
            queue.add_indirect(TABLE, &[(TABLE + 64, 16, INDIRECT)]);
        }),
        ("an indirect table with a loop", |queue| {
            queue.write_descriptor(TABLE, 0, HEADER, 16, NEXT, 0);
            queue.add(&[(TABLE, 16, INDIRECT)]);
        }),
        ("a chain that is longer than the queue", |queue| {
            let mut buffers = vec![(HEADER, 16, 0)];
            buffers.extend([(DATA, 4, WRITE); 127]);
            buffers.push((STATUS, 1, WRITE));
            queue.add_indirect(TABLE, &buffers);
        }),
        ("more chains than the queue has room for", |queue| {
            queue.set_avail_index(129);
        }),
        ("an index that went back", |queue| {
            queue.set_avail_index(u16::MAX)
        }),
    ];
    for (name, hostile) in cases {
        let mut rig = Rig::start(driver, u64::MAX);
        rig.prepare(IN, 0);
        hostile(&mut rig.queue);
        driver = is_broken(rig, name);
    }
    let mut rig = Rig::start(driver, u64::MAX);
    assert_eq!(rig.request(IN, 0, 4096, WRITE), (OK, 4097));
    assert!(rig.get(4096) == [0x5a; 4096]);
}

/// Kicks the device, which must ask for a reset; then it is reset.
fn is_broken<'a>(mut rig: Rig<'a>, name: &str) -> Driver<'a> {
    rig.driver.kick(0);
    rig.driver.wait(0);
    assert_eq!(rig.driver.status(), 15 | 0x40, "{name}");
    assert_eq!(rig.queue.take_used(), None, "{name}");
    let mut isr = [0];
    rig.driver.read(rig.driver.isr, &mut isr);
    assert_eq!(isr, [2], "{name}");
    rig.driver.set_status(0);
    assert_eq!(rig.driver.status(), 0, "{name}");
    rig.driver
}

/// Requests that are mostly right, with something wrong here and there: each is answered or needs a reset, and what is not the
/// disk's stays as it was.
#[test]
fn random_requests_harm_nothing_else() {
    let machine = Machine::default();
    let files = [file(&[0x11; 1 << 16]), file(&[0x22; 1 << 16])];
    let extents = [extent(1000, 20_000), extent(4096, 12_768)];
    let device = block(false, &extents, &[&files[0], &files[1]]);
    let mut driver = Some(machine.attach(device));
    let mut random = Random(2024);
    let (mut answered, mut broken) = (0, 0);
    while answered + broken < 3000 {
        let mut rig = Rig::start(driver.take().unwrap(), !EVENT_IDX);
        loop {
            let kinds = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99];
            let kind = kinds[random.below(7) as usize];
            let direction = if matches!(kind, IN | GET_ID) {
                WRITE
            } else {
                0
            };
            let sectors = random.below(70);
            rig.put(&random.bytes(4096));
            if kind >= DISCARD {
                rig.put_ranges(&[(random.below(64), random.below(20) as u32, 0); 8]);
            }
            rig.prepare(kind, random.below(70));
            let mut buffers = vec![(HEADER, 16, 0)];
            for _ in 0..random.below(4) {
                let at = DATA + random.below(4) * 16;
                let length = 16 * random.below(33 * (1 + sectors)) as u32;
                buffers.push((at, length, direction));
            }
            buffers.push((STATUS, 1, WRITE));
            if random.below(3) == 0 {
                let index = random.below(buffers.len() as u64) as usize;
                let (address, length, flags) = &mut buffers[index];
                match random.below(6) {
                    0 => *address = random.number(),
                    1 => *address = OUTSIDE - random.below(600),
                    2 => *length = random.number() as u32,
                    3 => *length = 0,
                    4 => *flags = random.number() as u16,
                    _ => *flags ^= WRITE,
                }
            }
            if random.below(2) == 0 {
                rig.queue.add(&buffers);
            } else {
                rig.queue.add_indirect(TABLE, &buffers);
            }
            rig.driver.kick(0);
            if rig.driver.wait_for_any(&[0, 1]) == 0 {
                break;
            }
            rig.driver.interrupts(1);
            rig.queue.take_used().unwrap();
            answered += 1;
        }
        broken += 1;
        rig.driver.set_status(0);
        rig.driver.interrupts(0);
        rig.driver.interrupts(1);
        driver = Some(rig.driver);
    }
    assert!(answered > 1000 && broken > 200, "{answered} {broken}");
    for (file, extent, byte) in [(&files[0], extents[0], 0x11), (&files[1], extents[1], 0x22)] {
        let mut content = vec![0; file.metadata().unwrap().len() as usize];
        assert_eq!(content.len(), 1 << 16);
        file.read_exact_at(&mut content, 0).unwrap();
        content.drain(extent.offset as usize..(extent.offset + extent.length) as usize);
        assert!(content.iter().all(|&other| other == byte));
    }
}

/// A file that has become shorter than the disk: the part that is gone cannot be read, and is not made up.
#[test]
fn a_file_that_shrank_is_an_error() {
    let machine = Machine::default();
    let content = file(&[0x5a; 8192]);
    let mut rig = Rig::new(&machine, block(false, &[extent(0, 8192)], &[&content]));
    content.set_len(4096).unwrap();
    assert_eq!(rig.request(IN, 0, 8192, WRITE), (IOERR, 1));
    assert_eq!(rig.request(IN, 0, 4096, WRITE), (OK, 4097));
}

#[test]
fn a_wrong_disk_is_refused_by_name() {
    let error = |change: &dyn Fn(&mut Disk), files: Vec<OwnedFd>| {
        let mut disk = disk(false, &[extent(512, 4096)]);
        change(&mut disk);
        Block::new(&disk, files).unwrap_err().to_string()
    };
    let content = || vec![OwnedFd::from(file(&[0; 8192]))];
    let same = |_: &mut Disk| {};
    let read_only = || vec![OwnedFd::from(File::open("/proc/self/exe").unwrap())];
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    let path = nix::fcntl::open(
        "/proc/self/exe",
        OFlag::O_PATH,
        nix::sys::stat::Mode::empty(),
    );
    for (message, expected) in [
        (
            error(&|disk| disk.id = "x".repeat(21), content()),
            "disk id \"xxxxxxxxxxxxxxxxxxxxx\" is not 1 to 20",
        ),
        (
            error(&|disk| disk.id.clear(), content()),
            "disk id \"\" is not 1 to 20",
        ),
        (
            error(&|disk| disk.id = "a\0".into(), content()),
            "disk id \"a\\0\"",
        ),
        (
            error(&|disk| disk.queues = 0, content()),
            "disk \"scratch\" asks for 0 queues; it can have 1 to 32",
        ),
        (
            error(&|disk| disk.queues = 33, content()),
            "asks for 33 queues",
        ),
        (
            error(&|disk| disk.extents.clear(), vec![]),
            "has 0 extents, but 0 descriptors",
        ),
        (error(&same, vec![]), "has 1 extents, but 0 descriptors"),
        (
            error(&|disk| disk.extents[0].length = 0, content()),
            "extent 0: its length is 0",
        ),
        (
            error(&|disk| disk.extents[0].length = 1000, content()),
            "is 1000 bytes long, which is no multiple of 512",
        ),
        (
            error(&|disk| disk.extents[0].length = 8192, content()),
            "extent 0: the file has 8192 bytes, but the extent ends at 8704",
        ),
        (
            error(&|disk| disk.extents[0].offset = u64::MAX, content()),
            "extent 0: offset 18446744073709551615 and length 4096",
        ),
        (
            error(&|disk| disk.extents[0].length = i64::MAX as u64, content()),
            "larger than a file can be",
        ),
        (
            error(&same, vec![pipe]),
            "extent 0: the descriptor is neither a regular file nor a block device",
        ),
        (
            error(&same, read_only()),
            "extent 0: the descriptor is not open for writing",
        ),
        (
            error(&same, vec![path.unwrap()]),
            "extent 0: the descriptor is not open for reading",
        ),
    ] {
        assert!(message.contains(expected), "{message}");
    }
}
