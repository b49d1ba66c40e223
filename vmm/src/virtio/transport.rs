//! The PCI transport (section 4.1): how a driver finds a device, agrees with it on features, sets its queues up and starts it.
//!
//! All of a device's registers are in one BAR:
//!
//! | offset | |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x0100 | ISR status |
//! | 0x0200 | the device's own configuration |
//! | 0x1000 | notifications, four bytes for each queue |
//! | 0x2000 | MSI-X table |
//! | 0x3000 | MSI-X pending bits |

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;

use super::common::{self, Common, Shown};
use super::notify::Notify;
use super::ring::{Broken, Ring};
use super::status::Action;
use super::{Activation, Device, Interrupt, Signals};
use crate::irq::Routes;
use crate::memory::GuestRam;
use crate::pci::msix::MsiX;
use crate::pci::{self, Config, Function, Identity};

/// The areas of the BAR.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x0100;
const DEVICE: u64 = 0x0200;
const NOTIFY: u64 = 0x1000;
const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x3000;
const END: u64 = 0x4000;

/// Distance of two queues' notification addresses in bytes.
const NOTIFY_MULTIPLIER: u32 = 4;

/// The vendor-specific capability by which virtio tells where its areas are (section 4.1.4).
const CAPABILITY: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// Offsets in the PCI configuration access capability (section 4.1.4.9).
const PCI_BAR: u8 = 4;
const PCI_OFFSET: u8 = 8;
const PCI_LENGTH: u8 = 12;
const PCI_DATA: u8 = 16;

/// A virtio device as a PCI function.
#[derive(Debug)]
pub struct Transport {
    device: Box<dyn Device>,
    ram: GuestRam,
    config: Mutex<Config>,
    /// Where the MSI-X message control register is in the configuration space, and the PCI access capability.
    msix_control: u8,
    pci_access: u8,
    msix: MsiX,
    common: Mutex<Common>,
    notify: Notify,
    signals: Arc<Signals>,
}

impl Transport {
    /// Makes `device` a PCI function that is ready to be attached to the bus.
    ///
    /// # Errors
    ///
    /// The machine has no interrupt route left, or the system no descriptor.
    pub fn new(
        device: impl Device + 'static,
        ram: GuestRam,
        vm: Arc<VmFd>,
        routes: Arc<Routes>,
    ) -> io::Result<Self> {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1040 + device.id(),
            subsystem_vendor: 0x1af4,
            subsystem: 0x1040 + device.id(),
            class: device.class(),
            revision: 1,
        };
        let queues = device.queues();
        let msix = MsiX::new(vm.clone(), routes, queues.len() as u16 + 1)?;
        let mut config = Config::new(&identity, END as u32);
        // Linux walks the list from its start for each capability that it looks for: MSI-X, which it looks for most, first.
        let msix_control = msix.add_capability(&mut config, TABLE as u32, PENDING as u32);
        add_area(&mut config, CAP_COMMON, COMMON, common::LENGTH, &[]);
        add_area(&mut config, CAP_ISR, ISR, 1, &[]);
        add_area(
            &mut config,
            CAP_NOTIFY,
            NOTIFY,
            u64::from(NOTIFY_MULTIPLIER) * queues.len() as u64,
            &NOTIFY_MULTIPLIER.to_le_bytes(),
        );
        if !device.config().is_empty() {
            let length = device.config().len() as u64;
            add_area(&mut config, CAP_DEVICE, DEVICE, length, &[]);
        }
        let pci_access = add_pci_access(&mut config);
        Ok(Self {
            common: Mutex::new(Common::new(device.features(), queues)),
            notify: Notify::new(vm),
            signals: Arc::default(),
            config: Mutex::new(config),
            device: Box::new(device),
            ram,
            msix_control,
            pci_access,
            msix,
        })
    }
}

impl Transport {
    /// What a device writes to interrupt.
    #[cfg(test)]
    pub fn event(&self, vector: u16) -> &Arc<vmm_sys_util::eventfd::EventFd> {
        self.msix.event(vector).unwrap()
    }

    /// The guest reads from the BAR; `data` is within it.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => {
                let common = self.lock_common();
                let shown = Shown {
                    broken: self.signals.is_broken(),
                    generation: self.device.config_generation(),
                };
                common.read(offset - COMMON, data, shown);
            }
            ISR if data.len() == 1 => data[0] = self.signals.take_isr(),
            DEVICE..NOTIFY => {
                let config = self.device.config();
                let config = config.iter().skip((offset - DEVICE) as usize);
                for (to, from) in data.iter_mut().zip(config) {
                    *to = *from;
                }
            }
            TABLE..PENDING => self.msix.read_table(offset - TABLE, data),
            PENDING..END => self.msix.read_pending(offset - PENDING, data),
            _ => {}
        }
    }

    /// The guest writes to the BAR; `data` is within it. What cannot be written is ignored.
    fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => {
                let mut common = self.lock_common();
                match common.write(offset - COMMON, data) {
                    Action::Start => self.start(&common),
                    Action::Reset => self.reset(&mut common),
                    Action::None | Action::CheckFeatures => {}
                }
            }
            NOTIFY..TABLE => self.notify.notify(offset - NOTIFY),
            TABLE..PENDING => self.msix.write_table(offset - TABLE, data),
            _ => {}
        }
    }

    /// The driver is ready. When one of its rings is unusable, the device is not started but asks for a reset.
    fn start(&self, common: &Common) {
        let vector = |vector| self.msix.event(vector).cloned();
        self.signals.set_vector(vector(common.config_vector()));
        let rings = common.queues().map(|queue| {
            let Some((place, number)) = queue else {
                return Ok(None);
            };
            let interrupt = Interrupt::new(vector(number), self.signals.clone());
            Ring::new(&place, common.has_event_idx(), &self.ram, interrupt).map(Some)
        });
        let rings: Result<Vec<_>, Broken> = rings.collect();
        let Ok(rings) = rings else {
            self.signals.set_broken();
            return;
        };
        let kicks = rings.iter().zip(self.device.queues()).zip(0u64..);
        let used = kicks.filter(|((ring, _), _)| ring.is_some());
        self.notify.start(
            used.map(|((_, queue), index)| {
                (index * u64::from(NOTIFY_MULTIPLIER), queue.kick.clone())
            }),
        );
        self.device.start(Activation {
            ram: self.ram.clone(),
            features: common.features(),
            rings,
            signals: self.signals.clone(),
        });
    }

    /// Back to the beginning. Other accesses to the device's registers wait until it has stopped.
    fn reset(&self, common: &mut Common) {
        self.notify.stop();
        self.device.stop();
        self.signals.reset();
        common.reset();
    }

    /// The offset in the BAR and the length of the access that the PCI configuration access capability is set to, when it is
    /// one that the capability allows: aligned, of 1, 2 or 4 bytes, and within the BAR.
    fn pci_access(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        let (mut offset, mut length) = ([0; 4], [0; 4]);
        {
            let config = pci::lock(&self.config);
            config.read(self.pci_access + PCI_BAR, &mut bar);
            config.read(self.pci_access + PCI_OFFSET, &mut offset);
            config.read(self.pci_access + PCI_LENGTH, &mut length);
        }
        let (offset, length) = (u32::from_le_bytes(offset), u32::from_le_bytes(length));
        let valid = bar == [0]
            && matches!(length, 1 | 2 | 4)
            && offset % length == 0
            && u64::from(offset) < END;
        valid.then_some((offset.into(), length as usize))
    }

    /// Where in the capability's data register an access to the configuration space starts, if it is one to it.
    fn pci_data(&self, offset: u8) -> Option<usize> {
        let offset = offset.checked_sub(self.pci_access + PCI_DATA)?;
        (offset < 4).then_some(offset.into())
    }

    fn lock_common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function for Transport {
    fn config(&self) -> &Mutex<Config> {
        &self.config
    }

    fn config_read(&self, offset: u8, data: &mut [u8]) {
        if let Some(start) = self.pci_data(offset) {
            let mut register = [0; 4];
            if let Some((offset, length)) = self.pci_access() {
                self.read(offset, &mut register[..length]);
            }
            for (to, from) in data.iter_mut().zip(&register[start..]) {
                *to = *from;
            }
        } else {
            pci::lock(&self.config).read(offset, data);
        }
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        if let Some(start) = self.pci_data(offset) {
            // The access takes the first bytes of the register, so it is made when they are written.
            if let (0, Some((offset, length))) = (start, self.pci_access())
                && let Some(data) = data.get(..length)
            {
                self.write(offset, data);
            }
            return;
        }
        let mut config = pci::lock(&self.config);
        config.write(offset, data);
        // All of its register; a write to another one leaves it as it was.
        let mut control = [0; 2];
        config.read(self.msix_control, &mut control);
        self.msix.set_control(u16::from_le_bytes(control));
    }

    fn moved(&self, base: Option<u64>) {
        self.notify.place(base.map(|base| base + NOTIFY));
    }

    fn memory_read(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }

    fn memory_write(&self, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }

    /// Between a driver's first step and its reset.
    fn is_in_use(&self) -> bool {
        self.lock_common().has_driver()
    }

    fn removed(&self) {
        self.reset(&mut self.lock_common());
    }
}

/// Adds the capability for one area of BAR 0 (section 4.1.4), with what follows the common part of it.
fn add_area(config: &mut Config, kind: u8, offset: u64, length: u64, more: &[u8]) {
    let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(more);
    config.add_capability(CAPABILITY, &body, &vec![0; body.len()]);
}

/// Adds the capability by which the BAR can be accessed through the configuration space (section 4.1.4.9). Its bar, offset
/// and length are the driver's to write; its data register is not memory ([`Transport::pci_data`]).
fn add_pci_access(config: &mut Config) -> u8 {
    let body = [20, CAP_PCI, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    writable[14..].fill(0);
    config.add_capability(CAPABILITY, &body, &writable)
}
