//! A virtual processor: how it is set up, and the loop that runs it and answers its exits.

use std::sync::Arc;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_msr_entry,
    kvm_xcrs,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use crate::boot::registers;
use crate::coalesced::Ring;
use crate::control::StopReason;
use crate::cpuid;
use crate::platform::Platform;
use crate::stop::Stopper;

/// `IA32_MISC_ENABLE`, whose bit 0 firmware sets: without it Linux believes that string instructions are slow.
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1 << 0;

/// `IA32_MTRR_DEF_TYPE`: memory type ranges enabled (bit 11), and everything write-back (type 6), as firmware leaves it.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const ALL_WRITE_BACK: u64 = 1 << 11 | 6;

/// Why a processor cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{operation} for virtual processor {id}: {source}")]
    Kvm {
        operation: &'static str,
        id: u8,
        source: kvm_ioctls::Error,
    },
    #[error("KVM took {taken} of the {given} model-specific registers of virtual processor {id}")]
    Msrs { id: u8, taken: usize, given: usize },
    #[error(transparent)]
    Cpuid(#[from] cpuid::Error),
}

/// A processor that is ready to run.
#[derive(Debug)]
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
}

impl Vcpu {
    /// Makes the processor with an APIC identification. The first one, 0, starts at `entry` in 64-bit mode; the others wait
    /// until it wakes them.
    ///
    /// What KVM's reset already leaves as a kernel needs it is left alone: floating point, the local APIC (its first pin
    /// takes the interrupts of the 8259), the time stamp counters, which KVM keeps together.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn new(vm: &VmFd, id: u8, template: &cpuid::Template, entry: u64) -> Result<Self, Error> {
        let failed = |operation| {
            move |source| Error::Kvm {
                operation,
                id,
                source,
            }
        };
        let fd = vm
            .create_vcpu(id.into())
            .map_err(failed("KVM_CREATE_VCPU"))?;
        // Before the registers: which of them exist depends on it.
        fd.set_cpuid2(&template.processor(id)?)
            .map_err(failed("KVM_SET_CPUID2"))?;

        // Linux enables all of this first thing, and KVM sees it do so, unless KVM's own processor is an emulated one that
        // cannot intercept XSETBV: then KVM would go on to load the reset value, and the guest lose its vector registers.
        if let Some(value) = template.extended_state() {
            let mut xcrs = kvm_xcrs {
                nr_xcrs: 1,
                ..Default::default()
            };
            xcrs.xcrs[0].value = value;
            fd.set_xcrs(&xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }

        let mut registers = vec![(MTRR_DEF_TYPE, ALL_WRITE_BACK)];
        if template.is_intel() {
            registers.push((MISC_ENABLE, FAST_STRINGS));
        }
        let entries: Vec<_> = registers
            .into_iter()
            .map(|(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let given = entries.len();
        let refused = |taken| Error::Msrs { id, taken, given };
        let msrs = Msrs::from_entries(&entries).map_err(|_| refused(0))?;
        let taken = fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
        if taken != given {
            return Err(refused(taken));
        }

        if id == 0 {
            let mut sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
            registers::enter_long_mode(&mut sregs);
            fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
            fd.set_regs(&registers::general(entry))
                .map_err(failed("KVM_SET_REGS"))?;
        }
        Ok(Self { id, fd })
    }

    /// Has KVM keep what any processor of the machine writes to these ports.
    ///
    /// # Errors
    ///
    /// KVM refuses.
    pub fn coalesce(&self, vm: &VmFd, port: u16, length: u32) -> Result<Ring, Error> {
        Ring::new(vm, &self.fd, port, length).map_err(|source| Error::Kvm {
            operation: "KVM_REGISTER_COALESCED_MMIO",
            id: self.id,
            source,
        })
    }

    /// Runs the processor until it ends the machine.
    pub fn run(mut self, platform: &Arc<Platform>, stopper: &Stopper) {
        stopper.stop(loop {
            if let Some(reason) = self.step(platform) {
                break reason;
            }
        });
    }

    /// Runs to the next exit and answers it. Returns the reason if that is the machine's end.
    fn step(&mut self, platform: &Platform) -> Option<StopReason> {
        let failure = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                platform.port_read(port, data);
                return None;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                platform.port_write(port, data);
                return None;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                platform.memory_read(address, data);
                return None;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                platform.memory_write(address, data);
                return None;
            }
            // A signal, or the end of the wait of a processor that another one has woken.
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => return None,
            Ok(VcpuExit::Shutdown) => return Some(StopReason::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                return Some(StopReason::PowerOff);
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Some(StopReason::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => return Some(StopReason::Panic),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!(
                    "the processor (host CPU {cpu}) refuses the guest's state, reason {reason:#x}"
                )
            }
            Ok(VcpuExit::InternalError) => "KVM internal error".to_owned(),
            Ok(exit) => format!("unexpected KVM exit {exit:?}"),
            Err(error) => format!("KVM_RUN: {error}"),
        };
        let whereabouts = self.whereabouts();
        let id = self.id;
        Some(StopReason::Failed(format!(
            "virtual processor {id}: {failure}{whereabouts}"
        )))
    }

    /// Where the guest was and what KVM says about it, for an error message.
    fn whereabouts(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        let detail = if run.exit_reason == kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: the exit reason says that this member of the union is the one that KVM wrote; it is integers.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let kind = match internal.suberror {
                kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => {
                    ", an instruction that it cannot emulate"
                }
                _ => "",
            };
            format!(", suberror {}{kind}", internal.suberror)
        } else {
            String::new()
        };
        match self.fd.get_regs() {
            Ok(registers) => format!("{detail}, at rip {:#x}", registers.rip),
            Err(_) => detail,
        }
    }
}
