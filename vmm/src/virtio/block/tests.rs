//! The device as a driver sees it, through the PCI bus.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::control::Extent;
use crate::virtio::testing::*;

// Where the driver has its things in guest memory.
const QUEUE: u64 = 0x10_0000;
const HEADER: u64 = 0x20_0000;
const STATUS: u64 = 0x21_0000;
const TABLE: u64 = 0x22_0000;
const DATA: u64 = 0x40_0000;
/// Beyond the end of guest memory.
const OUTSIDE: u64 = 0x400_0000;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status byte holds before the device writes it.
const UNWRITTEN: u8 = 0xee;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn file(content: &[u8]) -> File {
    let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    file
}

fn extent(offset: u64, length: u64) -> Extent {
    Extent { offset, length }
}

fn disk(read_only: bool, extents: &[Extent]) -> Disk {
    Disk {
        id: "scratch".into(),
        read_only,
        queues: 1,
        extents: extents.to_vec(),
    }
}

fn block(read_only: bool, extents: &[Extent], files: &[&File]) -> Block {
    let files = files.iter().map(|file| file.try_clone().unwrap().into());
    Block::new(&disk(read_only, extents), files.collect()).unwrap()
}

/// A driver with one queue.
struct Rig<'a> {
    driver: Driver<'a>,
    queue: DriverQueue<'a>,
}

impl<'a> Rig<'a> {
    fn new(machine: &'a Machine, device: Block) -> Self {
        let driver = machine.attach(device);
        Self::start(driver, u64::MAX)
    }

    fn start(driver: Driver<'a>, features: u64) -> Self {
        let features = driver.negotiate(features);
        let queue = driver.set_up_queue(0, QUEUE, features);
        driver.set_status(15);
        assert_eq!(driver.status(), 15);
        Self { driver, queue }
    }

    /// Writes header and status, makes the chain available, and waits for it. Returns the status and the used length.
    fn submit(&mut self, kind: u32, sector: u64, buffers: &[Buffer]) -> (u8, u32) {
        self.prepare(kind, sector);
        let head = self.queue.add(buffers);
        self.complete(head)
    }

    fn prepare(&self, kind: u32, sector: u64) {
        let ram = &self.driver.machine.ram;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        ram.write_slice(&header, GuestAddress(HEADER)).unwrap();
        ram.write_obj(UNWRITTEN, GuestAddress(STATUS)).unwrap();
    }

    fn complete(&mut self, head: u16) -> (u8, u32) {
        self.driver.kick(0);
        self.driver.wait(1);
        let (used, length) = self.queue.take_used().unwrap();
        assert_eq!(used, head);
        let status = self.driver.machine.ram.read_obj(GuestAddress(STATUS));
        (status.unwrap(), length)
    }

    /// A request with one data buffer at `DATA`.
    fn request(&mut self, kind: u32, sector: u64, length: u32, flags: u16) -> (u8, u32) {
        let buffers = [(HEADER, 16, 0), (DATA, length, flags), (STATUS, 1, WRITE)];
        self.submit(kind, sector, &buffers)
    }

    fn put(&self, data: &[u8]) {
        let ram = &self.driver.machine.ram;
        ram.write_slice(data, GuestAddress(DATA)).unwrap();
    }

    fn get(&self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        let ram = &self.driver.machine.ram;
        ram.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    /// Ranges for DISCARD and WRITE_ZEROES: (sector, sectors, flags).
    fn put_ranges(&self, ranges: &[(u64, u32, u32)]) -> u32 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.put(&bytes);
        bytes.len() as u32
    }
}

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

#[test]
fn the_event_index_is_optional() {
    let machine = Machine::default();
    let content = file(&[0x5a; 4096]);
    let driver = machine.attach(block(false, &[extent(0, 4096)], &[&content]));
    let mut rig = Rig::start(driver, !EVENT_IDX);
    assert_eq!(rig.request(IN, 0, 4096, WRITE), (OK, 4097));
    assert_eq!(rig.request(OUT, 0, 4096, 0), (OK, 1));
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
