//! MSI-X (PCI Local Bus 3.0, section 6.8.2): a table of messages in a function's memory, one for each interrupt.
//!
//! A device signals an interrupt by writing an eventfd, whatever state the interrupt is in. While the guest wants to have
//! it, the eventfd is bound to a KVM route with the table entry's message, and KVM delivers it. While it is masked, the
//! eventfd is not bound, and its counter *is* the pending bit: KVM delivers at once when an eventfd is bound that has been
//! written before.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::Config;
use crate::irq::{Message, Routes};

/// Capability identification.
const CAPABILITY: u8 = 0x11;
/// Message control: MSI-X is in use.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;

/// Length of a table entry in bytes: address (low, high), data, vector control.
const ENTRY: u64 = 16;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;

/// The interrupt vectors of a function.
#[derive(Debug)]
pub struct MsiX {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    lines: Vec<Line>,
    state: Mutex<State>,
}

/// What a vector is made of on the host's side.
#[derive(Debug)]
struct Line {
    event: Arc<EventFd>,
    gsi: u32,
}

#[derive(Debug)]
struct State {
    control: u16,
    vectors: Vec<Vector>,
}

#[derive(Debug, Clone, Copy)]
struct Vector {
    /// The four registers of the table entry.
    entry: [u32; 4],
    /// The eventfd is bound to the GSI.
    bound: bool,
    /// Signalled while masked, and the eventfd has been read since.
    pending: bool,
}

impl MsiX {
    /// Makes `count` (1 to 2048) vectors, all masked.
    ///
    /// # Errors
    ///
    /// The machine has no interrupt route left, or the system no descriptor.
    pub fn new(vm: Arc<VmFd>, routes: Arc<Routes>, count: u16) -> io::Result<Self> {
        let mut msix = Self {
            vm,
            routes,
            lines: Vec::with_capacity(count.into()),
            state: Mutex::new(State {
                control: 0,
                vectors: vec![
                    Vector {
                        entry: [0, 0, 0, MASKED],
                        bound: false,
                        pending: false,
                    };
                    count.into()
                ],
            }),
        };
        for _ in 0..count {
            // Non-blocking, so that the pending bit can be looked at.
            let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
            let gsi = msix.routes.allocate().map_err(io::Error::other)?;
            msix.lines.push(Line {
                event: Arc::new(event),
                gsi,
            });
        }
        Ok(msix)
    }

    /// Adds the capability to a function's configuration space, with the table and the pending bits at the given offsets of
    /// BAR 0. Returns the offset of the message control register.
    pub fn add_capability(&self, config: &mut Config, table: u32, pending: u32) -> u8 {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.lines.len() as u16 - 1).to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pending.to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(ENABLE | FUNCTION_MASK).to_le_bytes());
        config.add_capability(CAPABILITY, &body, &writable) + 2
    }

    /// The eventfd of a vector, if there is one with that number.
    pub fn event(&self, vector: u16) -> Option<&Arc<EventFd>> {
        self.lines.get(usize::from(vector)).map(|line| &line.event)
    }

    /// The guest has written the message control register.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        if state.control != control {
            state.control = control;
            for vector in 0..self.lines.len() {
                self.settle(&mut state, vector, false);
            }
        }
    }

    /// The guest reads the table: one or two registers. Anything else is undefined by the specification, and zero here.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.lock();
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(4) {
            return;
        }
        for (offset, bytes) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            if let Some(vector) = state.vectors.get((offset / ENTRY) as usize) {
                bytes.copy_from_slice(&vector.entry[(offset % ENTRY / 4) as usize].to_le_bytes());
            }
        }
    }

    /// The guest writes the table: one or two registers. Anything else is undefined, and ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(4) {
            return;
        }
        let mut state = self.lock();
        for (offset, bytes) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let index = (offset / ENTRY) as usize;
            let (Some(vector), Ok(bytes)) = (state.vectors.get_mut(index), bytes.try_into()) else {
                continue;
            };
            let register = (offset % ENTRY / 4) as usize;
            vector.entry[register] = u32::from_le_bytes(bytes);
            self.settle(&mut state, index, register < 3);
        }
    }

    /// The guest reads the pending bits, one for each vector.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        for (offset, byte) in (offset..).zip(data) {
            *byte = 0;
            for bit in 0..8 {
                let index = offset as usize * 8 + bit;
                if let (Some(vector), Some(line)) =
                    (state.vectors.get_mut(index), self.lines.get(index))
                {
                    vector.pending |= !vector.bound && line.event.read().is_ok();
                    *byte |= u8::from(vector.pending) << bit;
                }
            }
        }
    }

    /// Binds a vector's eventfd if and only if the guest wants to have the interrupt.
    ///
    /// A message that KVM refuses is the guest's own doing; its interrupt does not arrive then.
    fn settle(&self, state: &mut State, index: usize, message_changed: bool) {
        let wanted = state.control & (ENABLE | FUNCTION_MASK) == ENABLE
            && state.vectors[index].entry[3] & MASKED == 0;
        let vector = &mut state.vectors[index];
        let line = &self.lines[index];
        if wanted && (!vector.bound || message_changed) {
            let [low, high, data, _] = vector.entry;
            let message = Message {
                address: u64::from(high) << 32 | u64::from(low),
                data,
            };
            let routed = self.routes.set(line.gsi, message).is_ok();
            if routed && !vector.bound {
                vector.bound = self.vm.register_irqfd(&line.event, line.gsi).is_ok();
                if vector.bound && std::mem::take(&mut vector.pending) {
                    // It fails only when as many interrupts are pending as the counter can hold.
                    let _ = line.event.write(1);
                }
            }
        } else if !wanted && vector.bound {
            // KVM knows the pair, so it has no reason to refuse.
            vector.bound = self.vm.unregister_irqfd(&line.event, line.gsi).is_err();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MsiX {
    fn drop(&mut self) {
        let mut state = self.lock();
        state.control = 0;
        for vector in 0..self.lines.len() {
            self.settle(&mut state, vector, false);
        }
        // The table only shrinks; should KVM refuse that, the routes stay without anything that uses them.
        let _ = self.routes.free(self.lines.iter().map(|line| line.gsi));
    }
}
