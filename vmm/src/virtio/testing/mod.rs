//! For tests: a machine, and a guest in it that sees a device through the PCI bus alone, as a driver does.

mod driver;

use std::cell::RefCell;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub use self::driver::{Driver, DriverQueue};
use super::{Device, Transport};
use crate::irq::Routes;
use crate::memory::{self, GuestRam};
use crate::pci::{Bus, Layout};
use crate::testing::{allocate_without_files, own_descriptors};

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
        own_descriptors();
        allocate_without_files();
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
