//! The bus as a guest sees it, through its ports.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::*;

const RAM: u64 = 0x800_0000;
const WINDOW: u64 = 0xc000_0000;

const COMMAND: u8 = 0x04;
const BAR: u8 = 0x10;

/// A function with memory, which records what happens to it.
#[derive(Debug)]
struct Probe {
    config: Mutex<Config>,
    events: Mutex<Vec<Event>>,
}

#[derive(Debug, PartialEq, Eq)]
enum Event {
    Moved(Option<u64>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Removed,
}

impl Probe {
    fn new(memory: u32) -> Arc<Self> {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            subsystem_vendor: 0x1234,
            subsystem: 0x5678,
            class: 0x01_80_00,
            revision: 9,
        };
        let mut config = Config::new(&identity, memory);
        config.add_capability(0x09, &[8, 1, 2, 3, 4, 5], &[0, 0, 0xff, 0x0f, 0, 0]);
        config.add_capability(0x11, &[0xff; 10], &[0; 10]);
        Arc::new(Self {
            config: Mutex::new(config),
            events: Mutex::default(),
        })
    }

    fn events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

impl Function for Probe {
    fn config(&self) -> &Mutex<Config> {
        &self.config
    }

    fn moved(&self, base: Option<u64>) {
        self.record(Event::Moved(base));
    }

    fn memory_read(&self, offset: u64, data: &mut [u8]) {
        self.record(Event::Read(offset, data.len()));
        data.fill(0x5a);
    }

    fn memory_write(&self, offset: u64, data: &[u8]) {
        self.record(Event::Write(offset, data.to_vec()));
    }

    fn removed(&self) {
        self.record(Event::Removed);
    }
}

fn bus() -> Bus {
    Bus::new(Layout {
        window: WINDOW..0xfec0_0000,
        occupied: vec![0..RAM, 0xfec0_0000..1 << 32],
    })
}

fn address(slot: u8, register: u8) -> u32 {
    1 << 31 | u32::from(slot) << 11 | u32::from(register)
}

fn select(bus: &Bus, address: u32) {
    bus.io_write(0xcf8, &address.to_le_bytes());
}

fn read(bus: &Bus, slot: u8, register: u8) -> u32 {
    select(bus, address(slot, register));
    let mut data = [0; 4];
    bus.io_read(0xcfc, &mut data);
    u32::from_le_bytes(data)
}

fn write(bus: &Bus, slot: u8, register: u8, value: u32) {
    select(bus, address(slot, register));
    bus.io_write(0xcfc, &value.to_le_bytes());
}

/// Attaches a function and has it answer at an address of the guest's choice.
fn place(bus: &Bus, probe: &Arc<Probe>, base: u32) -> u8 {
    let slot = bus.attach(probe.clone()).unwrap();
    write(bus, slot, BAR, base);
    write(bus, slot, COMMAND, 2);
    slot
}

#[test]
fn the_guest_finds_what_there_is() {
    let bus = bus();
    let probe = Probe::new(0x4000);
    assert_eq!(bus.attach(probe).unwrap(), 1);
    assert_eq!(read(&bus, 0, 0x00), 0x0008_1b36);
    assert_eq!(read(&bus, 0, 0x08), 0x0600_0000);
    assert_eq!(read(&bus, 0, 0x0c), 0, "one function, type 0");
    assert_eq!(read(&bus, 1, 0x00), 0x1042_1af4);
    assert_eq!(
        read(&bus, 1, 0x04),
        0x0010_0000,
        "capabilities, nothing enabled"
    );
    assert_eq!(read(&bus, 1, 0x08), 0x0180_0009);
    assert_eq!(read(&bus, 1, 0x10), WINDOW as u32);
    for bar in [0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
        write(&bus, 1, bar, u32::MAX);
        assert_eq!(read(&bus, 1, bar), 0, "{bar:#x}");
    }
    assert_eq!(read(&bus, 1, 0x2c), 0x5678_1234);
    assert_eq!(read(&bus, 1, 0x34), 0x40);
    assert_eq!(read(&bus, 1, 0x3c), 0, "no interrupt pin");
    assert_eq!(read(&bus, 1, 0x40), 0x0108_4809);
    assert_eq!(read(&bus, 1, 0x48), 0xffff_0011);
    for slot in 2..32 {
        assert_eq!(read(&bus, slot, 0x00), u32::MAX);
    }
    // Neither other buses, other functions or reserved bits, and nothing while the data port is not enabled.
    for address in [
        address(1, 0) | 1 << 8,
        address(1, 0) | 7 << 8,
        address(1, 0) | 1 << 16,
        address(1, 0) | 0xff << 16,
        address(1, 0) | 1 << 24,
        address(1, 0) | 0x40 << 24,
        address(1, 0) & !(1 << 31),
    ] {
        select(&bus, address);
        let mut data = [0; 4];
        bus.io_read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4], "{address:#x}");
        bus.io_write(0xcfc, &[0; 4]);
    }
    assert_eq!(read(&bus, 1, 0x10), WINDOW as u32);
}

#[test]
fn only_what_can_be_written_changes() {
    let bus = bus();
    bus.attach(Probe::new(0x4000)).unwrap();
    // The base address register stays where it is, and the function is not enabled.
    for register in (0..=0xfc).step_by(4).filter(|&register| register != BAR) {
        let before = read(&bus, 1, register);
        write(&bus, 1, register, u32::MAX);
        let after = read(&bus, 1, register);
        let writable = match register {
            COMMAND => 0x0406,
            0x0c => 0xffff,
            0x3c => 0xff,
            0x44 => 0x0f_ff,
            _ => 0,
        };
        assert_eq!(after, before | writable, "{register:#x}");
        write(&bus, 1, register, 0);
        assert_eq!(read(&bus, 1, register), before & !writable, "{register:#x}");
    }
}

#[test]
fn all_widths_and_ports_are_safe() {
    let bus = bus();
    bus.attach(Probe::new(0x4000)).unwrap();
    select(&bus, address(1, 0));
    for port in 0xcf8..=0xcff_u16 {
        for length in [1, 2, 4, 8] {
            let mut data = vec![0; length];
            bus.io_read(port, &mut data);
            let mut expected = vec![0xff; length];
            let byte = usize::from(port).checked_sub(0xcfc);
            if port == 0xcf8 && length == 4 {
                expected = address(1, 0).to_le_bytes().to_vec();
            } else if let Some(byte) = byte.filter(|byte| byte + length <= 4) {
                expected = 0x1042_1af4_u32.to_le_bytes()[byte..byte + length].to_vec();
            }
            assert_eq!(data, expected, "{port:#x} {length}");
        }
    }
    // The address is only written as a whole; the port between is the reset register of some chipsets.
    for (port, data) in [
        (0xcf8, &[0u8][..]),
        (0xcf8, &[0, 0]),
        (0xcf9, &[6]),
        (0xcfa, &[0, 0]),
        (0xcfb, &[1]),
    ] {
        bus.io_write(port, data);
    }
    let mut data = [0; 4];
    bus.io_read(0xcf8, &mut data);
    assert_eq!(data, address(1, 0).to_le_bytes());
    // A byte and a word at a time.
    select(&bus, address(1, 0x3c));
    bus.io_write(0xcfc, &[11]);
    select(&bus, address(1, 0x0c));
    bus.io_write(0xcfd, &[64]);
    bus.io_write(0xcfe, &[1, 2, 3, 4]);
    assert_eq!(read(&bus, 1, 0x3c), 11);
    assert_eq!(read(&bus, 1, 0x0c), 64 << 8);
    // The last register, and an odd address.
    assert_eq!(read(&bus, 1, 0xff), 0);
    assert_eq!(read(&bus, 1, 0x03), 0x1042_1af4);
}

#[test]
fn sizing_tells_the_size() {
    let bus = bus();
    for (memory, size) in [
        (0, 0),
        (1, 0x1000),
        (0x1001, 0x2000),
        (0x4000, 0x4000),
        (1 << 20, 1 << 20),
    ] {
        let probe = Probe::new(memory);
        let slot = bus.attach(probe.clone()).unwrap();
        let base = read(&bus, slot, BAR);
        write(&bus, slot, BAR, u32::MAX);
        let answer = read(&bus, slot, BAR);
        assert_eq!(answer, if size == 0 { 0 } else { !(size - 1) });
        write(&bus, slot, BAR, base);
        assert_eq!(read(&bus, slot, BAR), base);
        // Also with the memory enabled: it is nowhere for that time.
        write(&bus, slot, COMMAND, 2);
        write(&bus, slot, BAR, u32::MAX);
        write(&bus, slot, BAR, base);
        let base = u64::from(base);
        let expected = [Some(base), None, Some(base)].map(Event::Moved);
        let expected = if size == 0 { &[][..] } else { &expected };
        assert_eq!(probe.events(), expected, "{memory:#x}");
    }
}

#[test]
fn memory_is_placed_without_overlap() {
    let layout = Layout {
        window: WINDOW..WINDOW + 0x10_0000,
        occupied: vec![0..RAM, WINDOW + 0x4000..WINDOW + 0x4001],
    };
    let bus = Bus::new(layout);
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for memory in [0x1000, 0x4000, 0x1000, 0x8_0000, 0x2000] {
        let slot = bus.attach(Probe::new(memory)).unwrap();
        let base = u64::from(read(&bus, slot, BAR));
        assert_eq!(base % u64::from(memory), 0);
        ranges.push(base..base + u64::from(memory));
    }
    ranges.push(WINDOW + 0x4000..WINDOW + 0x4001);
    ranges.sort_by_key(|range| range.start);
    assert!(
        ranges.windows(2).all(|pair| pair[0].end <= pair[1].start),
        "{ranges:x?}"
    );
    let error = bus.attach(Probe::new(0x8_0000)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no room for 0x80000 bytes of device memory between 0xc0000000 and 0xc0100000"
    );
}

/// Where a function of 16 KiB answers when the guest puts it at an address, while another is at 0xd0000000.
#[test]
fn what_harms_nobody_is_honoured() {
    let yes = |base: u32| Some(u64::from(base));
    for (base, answers) in [
        // Guest memory ends at 0x8000000.
        (0x0000_0000, None),
        (0x07ff_c000, None),
        (0x0800_0000, yes(0x0800_0000)),
        (0x8000_0000, yes(0x8000_0000)),
        // The other function.
        (0xcfff_c000, yes(0xcfff_c000)),
        (0xd000_0000, None),
        (0xd000_4000, yes(0xd000_4000)),
        // The interrupt controllers, and the end of the address space.
        (0xfebf_c000, yes(0xfebf_c000)),
        (0xfec0_0000, None),
        (0xfee0_0000, None),
        (0xffff_8000, None),
        (0xffff_c000, None),
        // Bits that the size does not leave.
        (0x8000_3fff, yes(0x8000_0000)),
        (0xffff_ffff, None),
    ] {
        let bus = bus();
        let other = Probe::new(0x4000);
        place(&bus, &other, 0xd000_0000);
        let probe = Probe::new(0x4000);
        place(&bus, &probe, base);
        let moved = answers.map(|base| Event::Moved(Some(base)));
        assert_eq!(probe.events(), Vec::from_iter(moved), "{base:#x}");
        let address = u64::from(base & !0x3fff) + 0x10;
        let mut data = [0; 4];
        let read = bus.mmio_read(address, &mut data);
        match answers {
            Some(_) => assert_eq!(probe.events(), [Event::Read(0x10, 4)]),
            None => assert_eq!(probe.events(), []),
        }
        assert_eq!(read, answers.is_some() || base == 0xd000_0000);
        assert!(bus.mmio_write(0xd000_0000, &[1]));
    }
}

#[test]
fn memory_moves_at_any_time() {
    let bus = bus();
    let (one, two) = (Probe::new(0x4000), Probe::new(0x4000));
    let first = place(&bus, &one, 0x9000_0000);
    let second = place(&bus, &two, 0x9000_0000);
    assert_eq!(one.events(), [Event::Moved(Some(0x9000_0000))]);
    assert_eq!(two.events(), [], "the address is taken");
    // The first one goes away, and the second one has the address at once.
    write(&bus, first, BAR, 0xa000_0000);
    assert_eq!(
        one.events(),
        [Event::Moved(None), Event::Moved(Some(0xa000_0000))]
    );
    assert_eq!(two.events(), [Event::Moved(Some(0x9000_0000))]);
    // They change places, by way of a clash.
    write(&bus, second, BAR, 0xa000_0000);
    assert_eq!(two.events(), [Event::Moved(None)]);
    write(&bus, first, BAR, 0x9000_0000);
    assert_eq!(
        one.events(),
        [Event::Moved(None), Event::Moved(Some(0x9000_0000))]
    );
    assert_eq!(two.events(), [Event::Moved(Some(0xa000_0000))]);
    // Disabled, it answers nowhere and frees its address.
    write(&bus, second, COMMAND, 0);
    assert!(!bus.mmio_read(0xa000_0000, &mut [0]));
    write(&bus, first, BAR, 0xa000_0000);
    write(&bus, second, COMMAND, 2);
    one.events();
    assert_eq!(two.events(), [Event::Moved(None)]);
    // Gone, it frees its address, too.
    bus.detach(first).unwrap();
    assert_eq!(one.events(), [Event::Moved(None), Event::Removed]);
    assert_eq!(two.events(), [Event::Moved(Some(0xa000_0000))]);
    assert!(bus.mmio_write(0xa000_3fff, &[7]));
    assert_eq!(two.events(), [Event::Write(0x3fff, vec![7])]);
    // Writing the same again, or other registers, is no move.
    write(&bus, second, BAR, 0xa000_0000);
    write(&bus, second, COMMAND, 6);
    write(&bus, second, 0x3c, 0);
    assert_eq!(two.events(), []);
}

#[test]
fn an_access_is_within_one_function_or_nowhere() {
    let bus = bus();
    let probe = Probe::new(0x1000);
    place(&bus, &probe, 0x9000_0000);
    probe.events();
    for (address, length, answers) in [
        (0x9000_0000, 8, true),
        (0x9000_0ff8, 8, true),
        (0x9000_0ff9, 8, false),
        (0x8fff_ffff, 2, false),
        (0x9000_1000, 1, false),
        (u64::MAX, 8, false),
        (u64::MAX - 7, 8, false),
        (0x1_9000_0000, 4, false),
    ] {
        let mut data = vec![0; length];
        assert_eq!(bus.mmio_read(address, &mut data), answers, "{address:#x}");
        assert_eq!(bus.mmio_write(address, &data), answers, "{address:#x}");
        assert_eq!(probe.events().is_empty(), !answers);
    }
}

#[test]
fn slots_are_used_again() {
    let bus = bus();
    for slot in 1..32 {
        assert_eq!(bus.attach(Probe::new(0x1000)).unwrap(), slot);
    }
    assert_eq!(
        bus.attach(Probe::new(0)).unwrap_err().to_string(),
        "all 32 slots of the PCI bus are taken; detach a device first"
    );
    bus.detach(7).unwrap();
    assert_eq!(read(&bus, 7, 0), u32::MAX);
    for slot in [0, 7, 32, 255] {
        let error = bus.detach(slot).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("PCI slot {slot} holds no device that could be detached")
        );
    }
    assert_eq!(bus.attach(Probe::new(0x1000)).unwrap(), 7);
    assert_eq!(read(&bus, 7, BAR), WINDOW as u32 + 6 * 0x1000);
}
