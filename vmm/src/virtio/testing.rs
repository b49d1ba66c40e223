//! For tests: a machine, the guest's side of a virtio device, which sees the device through the PCI bus
//! alone, as a driver does.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::poll::{PollFd, PollFlags, poll};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Device, Transport};
use crate::irq::Routes;
use crate::memory::{self, GuestRam};
use crate::pci::{Bus, Layout};

/// Where the BARs are before the guest moves them.
pub const WINDOW: u64 = 0xc000_0000;
/// Where the processor finds the few instructions that it runs.
const CODE: u64 = 0x1000;
/// MiB of guest memory.
const MEMORY: u32 = 64;

/// A buffer of a chain: address, length, flags.
pub type Buffer = (u64, u32, u16);

pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;

/// A machine with memory, a bus and KVM's interrupt controllers.
#[derive(Debug)]
pub struct Machine {
    pub vm: Arc<VmFd>,
    pub routes: Arc<Routes>,
    pub ram: GuestRam,
    pub bus: Bus,
    /// Its local APIC receives interrupts; it runs a few instructions when a test asks for it.
    vcpu: RefCell<VcpuFd>,
}

impl Default for Machine {
    fn default() -> Self {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        // Spurious interrupt vector register: software-enabled.
        lapic.regs[0xf1] = 1;
        vcpu.set_lapic(&lapic).unwrap();
        let occupied = vec![0..u64::from(MEMORY) << 20, 0xfec0_0000..1 << 32];
        let machine = Self {
            routes: Arc::new(Routes::new(vm.clone())),
            vm,
            ram: memory::create(MEMORY).unwrap(),
            bus: Bus::new(Layout {
                window: WINDOW..0xfec0_0000,
                occupied,
            }),
            vcpu: RefCell::new(vcpu),
        };
        for (slot, region) in (0..).zip(machine.ram.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped for as long as the machine exists, and nothing else is at its guest addresses.
            unsafe { machine.vm.set_user_memory_region(region) }.unwrap();
        }
        machine
    }
}

impl Machine {
    /// Puts a device on the bus and finds it there.
    pub fn attach(&self, device: impl Device + 'static) -> Driver<'_> {
        let (ram, vm, routes) = (self.ram.clone(), self.vm.clone(), self.routes.clone());
        let transport = Arc::new(Transport::new(device, ram, vm, routes).unwrap());
        let slot = self.bus.attach(transport.clone()).unwrap();
        Driver::probe(self, slot, transport)
    }

    /// Whether the processor has an interrupt waiting with this vector.
    pub fn is_requested(&self, vector: u8) -> bool {
        let lapic = self.vcpu.borrow().get_lapic().unwrap();
        let word = 0x200 + usize::from(vector / 32) * 0x10 + usize::from(vector % 32 / 8);
        lapic.regs[word] as u8 >> (vector % 8) & 1 == 1
    }

    /// Has the processor wait for an interrupt, and returns its vector. (KVM delivers what it finds pending when it is given
    /// an eventfd from another thread.)
    pub fn take_interrupt(&self) -> u8 {
        // sti; hlt; and again
        self.ram
            .write_slice(&[0xfb, 0xf4, 0xeb, 0xfc], GuestAddress(CODE))
            .unwrap();
        for vector in 0x40..0x80_u8 {
            // mov al, vector; out 0, al
            let handler = CODE + u64::from(vector) * 4;
            let code = GuestAddress(handler);
            self.ram
                .write_slice(&[0xb0, vector, 0xe6, 0], code)
                .unwrap();
            let entry = GuestAddress(u64::from(vector) * 4);
            self.ram.write_obj(handler as u32, entry).unwrap();
        }
        let vector = match self.run(0).as_slice() {
            [Exit::Out(vector)] => *vector,
            exits => panic!("{exits:?}"),
        };
        // Nobody else is going to acknowledge it.
        let vcpu = self.vcpu.borrow_mut();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0x100..0x180].fill(0);
        vcpu.set_lapic(&lapic).unwrap();
        vector
    }

    /// Runs a guest that writes four bytes to an address. Returns whether KVM dealt with that by itself.
    pub fn guest_write(&self, address: u64) -> bool {
        // mov [address], eax; out 0, al
        let mut code = vec![0xa3];
        code.extend((address as u32).to_le_bytes());
        code.extend([0xe6, 0]);
        self.ram.write_slice(&code, GuestAddress(CODE)).unwrap();
        match self.run(1).as_slice() {
            [Exit::Out(_)] => true,
            [Exit::Mmio(at), Exit::Out(_)] if *at == address => false,
            exits => panic!("{exits:?}"),
        }
    }

    /// Runs the processor from `CODE`, in 16-bit real or 32-bit protected mode, until it writes to port 0.
    fn run(&self, protected: u64) -> Vec<Exit> {
        let mut vcpu = self.vcpu.borrow_mut();
        let mut registers = vcpu.get_sregs().unwrap();
        registers.cr0 = registers.cr0 & !1 | protected;
        for segment in [&mut registers.cs, &mut registers.ds, &mut registers.ss] {
            segment.selector = 0;
            segment.base = 0;
            segment.limit = if protected == 1 { u32::MAX } else { 0xffff };
            segment.g = protected as u8;
            segment.db = protected as u8;
        }
        vcpu.set_sregs(&registers).unwrap();
        let mut registers = vcpu.get_regs().unwrap();
        registers.rip = CODE;
        registers.rsp = CODE;
        registers.rflags = 2;
        vcpu.set_regs(&registers).unwrap();
        let mut exits = Vec::new();
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0, data) => {
                    exits.push(Exit::Out(data[0]));
                    return exits;
                }
                VcpuExit::MmioWrite(address, _) => exits.push(Exit::Mmio(address)),
                exit => panic!("{exit:?}"),
            }
        }
    }

    pub fn config_read(&self, slot: u8, offset: u8, data: &mut [u8]) {
        self.bus.io_write(0xcf8, &config_address(slot, offset));
        self.bus.io_read(0xcfc + u16::from(offset & 3), data);
    }

    pub fn config_write(&self, slot: u8, offset: u8, data: &[u8]) {
        self.bus.io_write(0xcf8, &config_address(slot, offset));
        self.bus.io_write(0xcfc + u16::from(offset & 3), data);
    }

    pub fn config_u8(&self, slot: u8, offset: u8) -> u8 {
        let mut data = [0];
        self.config_read(slot, offset, &mut data);
        data[0]
    }

    pub fn config_u32(&self, slot: u8, offset: u8) -> u32 {
        let mut data = [0; 4];
        self.config_read(slot, offset, &mut data);
        u32::from_le_bytes(data)
    }
}

/// Why the processor has left the guest.
#[derive(Debug)]
enum Exit {
    /// It has written this to port 0.
    Out(u8),
    /// It has written to this address, which is no memory.
    Mmio(u64),
}

fn config_address(slot: u8, offset: u8) -> [u8; 4] {
    (1 << 31 | u32::from(slot) << 11 | u32::from(offset & 0xfc)).to_le_bytes()
}

/// A driver of one device.
#[derive(Debug)]
pub struct Driver<'a> {
    pub machine: &'a Machine,
    pub slot: u8,
    transport: Arc<Transport>,
    /// Addresses of the areas, from the capabilities.
    pub common: u64,
    pub notify: u64,
    pub isr: u64,
    pub device: u64,
    pub table: u64,
    pub pending: u64,
    pub msix: u8,
    pub pci: u8,
}

impl<'a> Driver<'a> {
    /// Finds the device's areas, enables its memory and resets it.
    fn probe(machine: &'a Machine, slot: u8, transport: Arc<Transport>) -> Self {
        let mut driver = Self {
            machine,
            slot,
            transport,
            common: 0,
            notify: 0,
            isr: 0,
            device: 0,
            table: 0,
            pending: 0,
            msix: 0,
            pci: 0,
        };
        machine.config_write(slot, 0x04, &6u16.to_le_bytes());
        let base = u64::from(machine.config_u32(slot, 0x10));
        let mut capability = machine.config_u8(slot, 0x34);
        while capability != 0 {
            let register = |offset| u64::from(machine.config_u32(slot, capability + offset));
            match (
                machine.config_u8(slot, capability),
                machine.config_u8(slot, capability + 3),
            ) {
                (0x11, _) => {
                    driver.msix = capability;
                    driver.table = base + register(4);
                    driver.pending = base + register(8);
                }
                (0x09, 1) => driver.common = base + register(8),
                (0x09, 2) => {
                    assert_eq!(register(16), 4);
                    driver.notify = base + register(8);
                }
                (0x09, 3) => driver.isr = base + register(8),
                (0x09, 4) => driver.device = base + register(8),
                (0x09, 5) => driver.pci = capability,
                other => panic!("unknown capability {other:?}"),
            }
            capability = machine.config_u8(slot, capability + 1);
        }
        driver.set_status(0);
        driver
    }

    /// Negotiates features: all that are offered of those that are wanted. Returns what was agreed upon. Configuration changes
    /// get MSI-X vector 0.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        self.set_status(1);
        self.set_status(3);
        let features = self.offered() & wanted;
        self.accept(features);
        self.set_status(11);
        assert_eq!(self.status(), 11);
        self.write(self.common + 0x10, &0u16.to_le_bytes());
        features
    }

    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(self.common, &select.to_le_bytes());
            u64::from(self.read_u32(self.common + 4))
        };
        half(0) | half(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for select in 0..2u32 {
            self.write(self.common + 8, &select.to_le_bytes());
            let half = (features >> (32 * select)) as u32;
            self.write(self.common + 12, &half.to_le_bytes());
        }
    }

    /// Sets a queue up at an address of guest memory (64 KiB of it), with its MSI-X vector.
    pub fn set_up_queue(&self, index: u16, at: u64, features: u64) -> DriverQueue<'a> {
        self.select_queue(index);
        self.write(self.common + 0x1a, &(index + 1).to_le_bytes());
        assert_eq!(self.read_u16(self.common + 0x1a), index + 1);
        self.set_up_queue_without_vector(index, at, features)
    }

    /// Sets a queue up without an MSI-X vector.
    pub fn set_up_queue_without_vector(
        &self,
        index: u16,
        at: u64,
        features: u64,
    ) -> DriverQueue<'a> {
        self.select_queue(index);
        let size = self.read_u16(self.common + 0x18);
        let queue = DriverQueue::new(&self.machine.ram, at, size, features & EVENT_IDX != 0);
        for (offset, address) in [(0x20, queue.table), (0x28, queue.avail), (0x30, queue.used)] {
            self.write(self.common + offset, &(address as u32).to_le_bytes());
            let high = (address >> 32) as u32;
            self.write(self.common + offset + 4, &high.to_le_bytes());
        }
        self.write(self.common + 0x1c, &1u16.to_le_bytes());
        assert_eq!(self.read_u16(self.common + 0x1c), 1);
        queue
    }

    /// Enables MSI-X, with processor vector `0x40 + i` for each MSI-X vector `i` below `count`.
    pub fn enable_interrupts(&self, count: u64) {
        for vector in 0..count {
            let entry = self.table + vector * 16;
            self.write(entry, &0xfee0_0000u32.to_le_bytes());
            self.write(entry + 4, &0u32.to_le_bytes());
            self.write(entry + 8, &(0x40 + vector as u32).to_le_bytes());
            self.write(entry + 12, &0u32.to_le_bytes());
        }
        let control = self.machine.config_u32(self.slot, self.msix) >> 16 | 1 << 15;
        self.machine
            .config_write(self.slot, self.msix + 2, &(control as u16).to_le_bytes());
    }

    pub fn select_queue(&self, index: u16) {
        self.write(self.common + 0x16, &index.to_le_bytes());
    }

    /// Waits until the device has interrupted with an MSI-X vector, while MSI-X is not enabled and KVM does not take the
    /// event away. Returns how often.
    pub fn wait(&self, vector: u16) -> u64 {
        let event = self.transport.event(vector);
        // SAFETY: the descriptor is open for as long as the event is borrowed.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
        let ready = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], 20_000u16).unwrap();
        assert_eq!(ready, 1, "no interrupt for vector {vector}");
        event.read().unwrap()
    }

    /// How often the device has interrupted with an MSI-X vector.
    pub fn interrupts(&self, vector: u16) -> u64 {
        self.transport.event(vector).read().unwrap_or(0)
    }

    /// Tells the device of new buffers, as when KVM does not know the address.
    pub fn kick(&self, index: u16) {
        self.write(self.notify + u64::from(index) * 4, &index.to_le_bytes());
    }

    pub fn set_status(&self, status: u8) {
        self.write(self.common + 0x14, &[status]);
    }

    pub fn status(&self) -> u8 {
        let mut data = [0];
        self.read(self.common + 0x14, &mut data);
        data[0]
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        assert!(self.machine.bus.mmio_read(address, data), "{address:#x}");
    }

    pub fn read_u16(&self, address: u64) -> u16 {
        let mut data = [0; 2];
        self.read(address, &mut data);
        u16::from_le_bytes(data)
    }

    pub fn read_u32(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        assert!(self.machine.bus.mmio_write(address, data), "{address:#x}");
    }
}

/// The driver's side of a split virtqueue.
#[derive(Debug)]
pub struct DriverQueue<'a> {
    ram: &'a GuestRam,
    pub size: u16,
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    event_idx: bool,
    next: u16,
    avail_index: u16,
    used_index: u16,
}

impl<'a> DriverQueue<'a> {
    /// Takes 64 KiB at `at`.
    pub fn new(ram: &'a GuestRam, at: u64, size: u16, event_idx: bool) -> Self {
        ram.write_slice(&[0; 0x1_0000], GuestAddress(at)).unwrap();
        Self {
            ram,
            size,
            table: at,
            avail: at + 0x8000,
            used: at + 0xc000,
            event_idx,
            next: 0,
            avail_index: 0,
            used_index: 0,
        }
    }

    /// The descriptor that the next chain starts with.
    pub fn next_descriptor(&self) -> u16 {
        self.next
    }

    /// Makes a chain of (address, length, flags) available; `NEXT` is added where it belongs. Returns its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next;
        for (index, &(address, length, flags)) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            let this = self.next;
            self.next = (self.next + 1) % self.size;
            let flags = if last { flags } else { flags | NEXT };
            self.write_descriptor(self.table, this, address, length, flags, self.next);
        }
        self.offer(head);
        head
    }

    /// Makes a chain available whose descriptors are in a table of their own at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (index, &(address, length, flags)) in buffers.iter().enumerate() {
            let index = index as u16;
            let last = usize::from(index) + 1 == buffers.len();
            let flags = if last { flags } else { flags | NEXT };
            self.write_descriptor(table, index, address, length, flags, index + 1);
        }
        self.add(&[(table, buffers.len() as u32 * 16, INDIRECT)])
    }

    pub fn write_descriptor(
        &self,
        table: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(table + u64::from(index) * 16);
        self.ram.write_slice(&bytes, at).unwrap();
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail + 4 + u64::from(self.avail_index % self.size) * 2;
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail_index = self.avail_index.wrapping_add(1);
        self.set_avail_index(self.avail_index);
    }

    pub fn set_avail_index(&self, index: u16) {
        let at = GuestAddress(self.avail + 2);
        self.ram.store(index, at, Ordering::Release).unwrap();
    }

    /// Whether the device wants to be told of the chain that was added last.
    pub fn wants_kick(&self) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.used + 4 + u64::from(self.size) * 8;
            let event: u16 = self.ram.load(GuestAddress(at), Ordering::Relaxed).unwrap();
            event == self.avail_index.wrapping_sub(1)
        } else {
            let flags: u16 = self
                .ram
                .load(GuestAddress(self.used), Ordering::Relaxed)
                .unwrap();
            flags & 1 == 0
        }
    }

    /// The next used chain, as head and number of bytes written to it.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let at = GuestAddress(self.used + 2);
        let index: u16 = self.ram.load(at, Ordering::Acquire).unwrap();
        if index == self.used_index {
            return None;
        }
        let at = self.used + 4 + u64::from(self.used_index % self.size) * 8;
        let element: u64 = self.ram.read_obj(GuestAddress(at)).unwrap();
        self.used_index = self.used_index.wrapping_add(1);
        // The next one is to interrupt.
        let at = self.avail + 4 + u64::from(self.size) * 2;
        self.ram
            .write_obj(self.used_index, GuestAddress(at))
            .unwrap();
        Some((element as u16, (element >> 32) as u32))
    }
}

/// Numbers that look random and are the same in each run (Marsaglia's xorshift).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.number() as u8).collect()
    }
}
