//! Interrupt routes: the table by which KVM turns a global system interrupt number (GSI) into an interrupt.
//!
//! KVM replaces the table as a whole, so there is one owner of it. GSIs 0 to 23 are the pins of the interrupt controllers
//! that KVM emulates, of which the serial port's on the first 8259 is the only one in use; above them, each MSI-X vector of a
//! device has one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_PIC_MASTER, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

/// The serial port's pin on the first 8259, and its GSI: the PC's IRQ 4.
pub const SERIAL_GSI: u32 = 4;

/// The first GSI that is no pin: an I/O APIC has 24.
const FIRST_MSI_GSI: u32 = 24;

/// The end of the GSIs: 31 devices with at most 33 vectors (32 queues, configuration changes) need 1,023.
const END_OF_GSIS: u32 = FIRST_MSI_GSI + 1024;

/// What an MSI-X table entry says, and what a device would write where to raise its interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// The address of the write: it selects the processor.
    pub address: u64,
    /// The value written: it holds the vector.
    pub data: u32,
}

/// Why a route is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("all {} interrupt routes are in use: detach a device first", END_OF_GSIS - FIRST_MSI_GSI)]
    Exhausted,
    #[error("GSI {0} was not allocated")]
    Unknown(u32),
    #[error("KVM_SET_GSI_ROUTING with {routes} routes: {source}")]
    Kvm {
        routes: usize,
        source: kvm_ioctls::Error,
    },
}

/// The interrupt routes of a machine with KVM's own interrupt controllers.
#[derive(Debug)]
pub struct Routes {
    vm: Arc<VmFd>,
    /// The allocated GSIs, each with its message once the guest has written one.
    messages: Mutex<BTreeMap<u32, Option<Message>>>,
}

impl Routes {
    /// The routes of a machine whose interrupt controllers exist.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            messages: Mutex::default(),
        }
    }

    /// Takes a free GSI for one MSI-X vector. It has no route yet: raising it has no effect.
    ///
    /// # Errors
    ///
    /// None is free.
    pub fn allocate(&self) -> Result<u32, Error> {
        let mut messages = self.lock();
        let gsi = (FIRST_MSI_GSI..END_OF_GSIS)
            .find(|gsi| !messages.contains_key(gsi))
            .ok_or(Error::Exhausted)?;
        messages.insert(gsi, None);
        Ok(gsi)
    }

    /// Routes an allocated GSI to a message. KVM is told only if that is a change.
    ///
    /// # Errors
    ///
    /// The GSI is not allocated, or KVM refuses the message; then the route is as before.
    pub fn set(&self, gsi: u32, message: Message) -> Result<(), Error> {
        let mut messages = self.lock();
        let entry = messages.get_mut(&gsi).ok_or(Error::Unknown(gsi))?;
        if *entry == Some(message) {
            return Ok(());
        }
        let before = entry.replace(message);
        self.apply(&messages).inspect_err(|_| {
            messages.insert(gsi, before);
        })
    }

    /// Gives allocated GSIs back and forgets their routes.
    ///
    /// # Errors
    ///
    /// KVM refuses the rest of the table.
    pub fn free(&self, gsis: impl IntoIterator<Item = u32>) -> Result<(), Error> {
        let mut messages = self.lock();
        let mut routed = false;
        for gsi in gsis {
            routed |= messages.remove(&gsi).flatten().is_some();
        }
        if routed {
            self.apply(&messages)
        } else {
            Ok(())
        }
    }

    fn apply(&self, messages: &BTreeMap<u32, Option<Message>>) -> Result<(), Error> {
        let routes: Vec<_> = std::iter::once(pin(KVM_IRQCHIP_PIC_MASTER, SERIAL_GSI))
            .chain(
                messages
                    .iter()
                    .filter_map(|(&gsi, message)| message.map(|message| msi(gsi, message))),
            )
            .collect();
        let failed = |source| Error::Kvm {
            routes: routes.len(),
            source,
        };
        let table = KvmIrqRouting::from_entries(&routes)
            .map_err(|_| failed(kvm_ioctls::Error::new(libc::E2BIG)))?;
        self.vm.set_gsi_routing(&table).map_err(failed)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Option<Message>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pin(chip: u32, gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip {
        irqchip: chip,
        pin: gsi,
    };
    entry
}

fn msi(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    entry
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    const MESSAGE: Message = Message {
        address: 0xfee0_0000,
        data: 0x31,
    };

    fn routes() -> Routes {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        Routes::new(Arc::new(vm))
    }

    #[test]
    fn gsis_are_unique_until_they_are_freed() {
        let routes = routes();
        assert_eq!(routes.allocate().unwrap(), 24);
        assert_eq!(routes.allocate().unwrap(), 25);
        routes.free([24]).unwrap();
        assert_eq!(routes.allocate().unwrap(), 24);
        for _ in 26..END_OF_GSIS {
            routes.allocate().unwrap();
        }
        assert!(matches!(routes.allocate(), Err(Error::Exhausted)));
    }

    #[test]
    fn kvm_takes_the_routes() {
        let routes = routes();
        let gsi = routes.allocate().unwrap();
        routes.set(gsi, MESSAGE).unwrap();
        routes
            .set(
                gsi,
                Message {
                    data: 0x32,
                    ..MESSAGE
                },
            )
            .unwrap();
        assert!(matches!(
            routes.set(gsi + 1, MESSAGE),
            Err(Error::Unknown(25))
        ));
        routes.free([gsi]).unwrap();
        assert!(matches!(routes.set(gsi, MESSAGE), Err(Error::Unknown(24))));
    }
}
