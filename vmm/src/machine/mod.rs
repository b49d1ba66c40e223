//! A machine: how it is built and what runs in it.

mod request;
mod service;

pub use service::serve;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::boot::{kernel, mptable, params, registers};
use crate::control::{Boot, Disk, Dropped, GUEST_CID, Nic, Sources};
use crate::cpuid;
use crate::irq::Routes;
use crate::memory::{
    self, GuestRam, HIGH_RAM_START, KVM_IDENTITY_MAP, KVM_TSS, PCI_WINDOW_END, PCI_WINDOW_START,
};
use crate::pci;
use crate::pci::pvpanic::PvPanic;
use crate::platform::{self, Platform};
use crate::seccomp::{self, ThreadKind};
use crate::serial;
use crate::stop::Stopper;
use crate::vcpu::{self, Vcpu};
use crate::virtio::net::Net;
use crate::virtio::vsock::Vsock;
use crate::virtio::{self, Transport};

/// Why a machine cannot be built, or a device not attached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Request(#[from] request::Error),
    #[error("cannot make the event of the machine's end: {0}")]
    Stopper(io::Error),
    #[error(
        "the first descriptor is not KVM: its API version is {0}, and that is {KVM_API_VERSION} since Linux 2.6.22; pass /dev/kvm"
    )]
    NotKvm(i32),
    #[error("{operation}: {source}")]
    Kvm {
        operation: &'static str,
        source: kvm_ioctls::Error,
    },
    #[error("vcpus is {wanted}: KVM on this host has at most {most}")]
    TooManyVcpus { wanted: u8, most: usize },
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    #[error(transparent)]
    Params(#[from] params::Error),
    #[error("cannot write the boot tables to the guest's memory: {0}")]
    Tables(#[from] vm_memory::GuestMemoryError),
    #[error(transparent)]
    Serial(#[from] serial::Error),
    #[error(transparent)]
    Cpuid(#[from] cpuid::Error),
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    #[error(transparent)]
    Bus(#[from] pci::Error),
    #[error(transparent)]
    Disk(#[from] virtio::block::Error),
    #[error(transparent)]
    Nic(#[from] virtio::net::Error),
    #[error("cannot make the {device} device: {source}")]
    Device {
        device: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Confinement(#[from] seccomp::Error),
    #[error("cannot start the thread of virtual processor {id}: {source}")]
    Thread { id: u8, source: io::Error },
    #[error("slot {0} holds no disk and no network interface")]
    NotDetachable(u8),
    #[error("slot {0} holds no network interface")]
    NoNic(u8),
    #[error("the machine has a vsock device already")]
    SecondVsock,
}

/// A machine, from the main thread's point of view.
#[derive(Debug)]
struct Machine {
    vm: Arc<VmFd>,
    ram: GuestRam,
    routes: Arc<Routes>,
    bus: Arc<pci::Bus>,
    vsock: Option<Vsock>,
    stopper: Stopper,
    vcpus: u8,
    /// The slots that hold disks, and those that hold network interfaces: these can be detached.
    disks: Vec<u8>,
    nics: Vec<(u8, Net)>,
}

impl Machine {
    /// Builds the machine that a request describes, up to the first instruction. Returns it with its processors.
    fn build(
        boot: &Boot,
        descriptors: Vec<OwnedFd>,
        stopper: Stopper,
    ) -> Result<(Self, Vec<Vcpu>, Arc<Platform>), Error> {
        let descriptors = request::check(boot, descriptors)?;

        // 1. An empty machine with interrupt controllers.
        let (kvm, vm) = create_vm(descriptors.kvm, boot.vcpus)?;
        let routes = Arc::new(Routes::new(vm.clone()));

        // 2. Memory, with everything in it that the kernel finds when it starts.
        let ram = memory::create(boot.memory_mib)?;
        let entry = kernel::load(&ram, &File::from(descriptors.kernel))?;
        params::write(&ram, &boot.cmdline)?;
        mptable::write(&ram, boot.vcpus)?;
        registers::write_tables(&ram)?;
        register_memory(&vm, &ram)?;

        // 3. Devices. The bus gives out slots in this order.
        let serial = serial::port(&vm, descriptors.console)?;
        let bus = Arc::new(pci::Bus::new(layout(&ram)));
        let pvpanic = {
            let stopper = stopper.clone();
            PvPanic::new(move |reason| stopper.stop(reason))
        };
        bus.attach(Arc::new(pvpanic))?;
        let mut machine = Self {
            vm,
            ram,
            routes,
            bus,
            vsock: None,
            stopper,
            vcpus: boot.vcpus,
            disks: Vec::new(),
            nics: Vec::new(),
        };
        if let Some(ports) = &boot.ports {
            machine.attach_vsock(ports.clone())?;
        }
        for (disk, files) in boot.disks.iter().zip(descriptors.disks) {
            machine.attach_disk(disk, files)?;
        }
        for (nic, taps) in boot.nics.iter().zip(descriptors.nics) {
            machine.attach_nic(nic, taps)?;
        }

        // 4. Processors, and what they reach.
        let template = cpuid::Template::new(&kvm, boot.vcpus)?;
        let first = Vcpu::new(&machine.vm, 0, &template, entry)?;
        let addresses = first.coalesce(&machine.vm, platform::PCI, platform::PCI_ADDRESS_LENGTH)?;
        let others = (1..boot.vcpus).map(|id| Vcpu::new(&machine.vm, id, &template, entry));
        let vcpus = std::iter::once(Ok(first))
            .chain(others)
            .collect::<Result<_, _>>()?;
        let bus = machine.bus.clone();
        let platform = Platform::new(serial, bus, addresses, machine.stopper.clone());
        Ok((machine, vcpus, Arc::new(platform)))
    }

    /// Lets the processors run, each in its own thread, and confines the calling thread.
    fn start(&self, vcpus: Vec<Vcpu>, platform: &Arc<Platform>) -> Result<(), Error> {
        for (id, vcpu) in (0..).zip(vcpus) {
            let platform = platform.clone();
            let stopper = self.stopper.clone();
            seccomp::spawn(ThreadKind::Vcpu, format!("vcpu{id}"), move || {
                vcpu.run(&platform, &stopper);
            })
            .map_err(|source| Error::Thread { id, source })?;
        }
        Ok(())
    }

    /// Puts the vsock device on the bus and returns its slot.
    fn attach_vsock(&mut self, ports: Vec<u32>) -> Result<u8, Error> {
        if self.vsock.is_some() {
            return Err(Error::SecondVsock);
        }
        let vsock = Vsock::new(GUEST_CID, ports).map_err(device("vsock"))?;
        let slot = self.attach("vsock", vsock.clone())?;
        self.vsock = Some(vsock);
        Ok(slot)
    }

    /// Puts a disk on the bus and returns its slot.
    fn attach_disk(&mut self, disk: &Disk, files: Vec<OwnedFd>) -> Result<u8, Error> {
        request::check_disk(disk, self.vcpus)?;
        let slot = self.attach("block", virtio::block::Block::new(disk, files)?)?;
        self.disks.push(slot);
        Ok(slot)
    }

    /// Puts a network interface on the bus and returns its slot.
    fn attach_nic(&mut self, nic: &Nic, taps: Vec<OwnedFd>) -> Result<u8, Error> {
        request::check_nic(nic, self.vcpus)?;
        let net = Net::new(nic, taps)?;
        let slot = self.attach("net", net.clone())?;
        self.nics.push((slot, net));
        Ok(slot)
    }

    /// Changes a network interface. Returns what it has dropped until now.
    fn update_nic(&self, slot: u8, link: bool, sources: &Sources) -> Result<Dropped, Error> {
        let nic = self.nics.iter().find(|(place, _)| *place == slot);
        let (_, net) = nic.ok_or(Error::NoNic(slot))?;
        net.update(link, sources);
        Ok(net.dropped())
    }

    /// Takes a disk or network interface off the bus.
    fn detach(&mut self, slot: u8) -> Result<(), Error> {
        if !self.disks.contains(&slot) && !self.nics.iter().any(|(place, _)| *place == slot) {
            return Err(Error::NotDetachable(slot));
        }
        self.bus.detach(slot)?;
        self.disks.retain(|place| *place != slot);
        self.nics.retain(|(place, _)| *place != slot);
        Ok(())
    }

    /// Puts a virtio device on the bus and returns its slot.
    fn attach(
        &self,
        name: &'static str,
        virtio: impl virtio::Device + 'static,
    ) -> Result<u8, Error> {
        let transport = Transport::new(
            virtio,
            self.ram.clone(),
            self.vm.clone(),
            self.routes.clone(),
        )
        .map_err(device(name))?;
        Ok(self.bus.attach(Arc::new(transport))?)
    }
}

/// An empty machine with KVM's 8259s, I/O APIC and local APICs. There is no interval timer: the kernel has the local APICs'.
fn create_vm(kvm: OwnedFd, vcpus: u8) -> Result<(Kvm, Arc<VmFd>), Error> {
    let failed = |operation| move |source| Error::Kvm { operation, source };
    // SAFETY: the descriptor is given away, and nobody else owns it.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(Error::NotKvm(version));
    }
    let most = kvm.get_max_vcpus();
    if usize::from(vcpus) > most {
        return Err(Error::TooManyVcpus {
            wanted: vcpus,
            most,
        });
    }
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP)
        .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(KVM_TSS as usize)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    Ok((kvm, Arc::new(vm)))
}

/// Makes the guest's memory the machine's.
fn register_memory(vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
    for (slot, region) in (0..).zip(ram.iter()) {
        let description = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is the region's whole mapping, which lives as long as the guest's memory does, and so until the
        // process ends: each of its threads holds it. The ranges of two regions do not overlap.
        unsafe { vm.set_user_memory_region(description) }.map_err(|source| Error::Kvm {
            operation: "KVM_SET_USER_MEMORY_REGION",
            source,
        })?;
    }
    Ok(())
}

/// What the PCI bus must know of the guest's physical addresses.
fn layout(ram: &GuestRam) -> pci::Layout {
    let mut occupied: Vec<Range<u64>> = ram
        .iter()
        .map(|region| region.start_addr().0..region.start_addr().0 + region.len())
        .collect();
    occupied.push(PCI_WINDOW_END..HIGH_RAM_START);
    pci::Layout {
        window: PCI_WINDOW_START..PCI_WINDOW_END,
        occupied,
    }
}

fn device(device: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Device { device, source }
}
