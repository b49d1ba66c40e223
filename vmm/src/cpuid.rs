//! What the guest's CPUID instruction says.
//!
//! The base is what KVM supports on this host. Three kinds of things are changed: the topology, which is that of the machine
//! (one package, one thread a core) and not of the host; features of which the guest gets nothing (nested virtualization,
//! performance counters, enclaves, tracing, resource control), so that their code in KVM is out of its reach; and the
//! processor's name, which only tells where the machine runs.

use std::arch::x86_64::{__cpuid, CpuidResult};

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

/// Why there is no CPUID table.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("KVM_GET_SUPPORTED_CPUID: {0}")]
    Kvm(kvm_ioctls::Error),
    #[error("KVM supports {0} CPUID entries, more than its own limit of {KVM_MAX_CPUID_ENTRIES}")]
    TooMany(usize),
}

/// Leaf 1.
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;

/// Leaf 7, subleaf 0.
const EBX_SGX: u32 = 1 << 2;
const EBX_RDT_MONITORING: u32 = 1 << 12;
const EBX_RDT_ALLOCATION: u32 = 1 << 15;
const EBX_PROCESSOR_TRACE: u32 = 1 << 25;
const ECX_SGX_LAUNCH: u32 = 1 << 30;

/// Leaf 0x8000_0001.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_IBS: u32 = 1 << 10;
const ECX_PERFORMANCE_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Leaf 6: the local APIC's timer runs in every power state, which it does for a guest.
const EAX_ARAT: u32 = 1 << 2;

/// The leaves of the hypervisor below: its name, and KVM's features.
const HYPERVISOR: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const EAX_PV_EOI: u32 = 1 << 6;

/// The name of every processor: 48 bytes in leaves 0x8000_0002 to 0x8000_0004.
const NAME: &[u8; 48] = b"Bulkhead virtual processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Levels of the topology leaf 0xb.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What all processors of a machine have in common.
#[derive(Debug, Clone)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    intel: bool,
}

/// What the changes depend on.
#[derive(Debug, Clone, Copy)]
struct Shape {
    processors: u8,
    /// Whether KVM has the local APIC's deadline timer, which KVM_GET_SUPPORTED_CPUID does not tell.
    deadline: bool,
    /// Whether the processors are Intel's, as opposed to AMD's and what is made after them.
    intel: bool,
}

impl Template {
    /// Asks KVM what it supports, and makes of it what a machine with that many processors has.
    ///
    /// # Errors
    ///
    /// KVM does not answer.
    pub fn new(kvm: &Kvm, processors: u8) -> Result<Self, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::Kvm)?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let mut template = Self::normalise(supported.as_slice(), processors, deadline);
        if is_interpreted() {
            template.withhold_paravirtual_eoi();
        }
        Ok(template)
    }

    /// Has the guest tell of the end of an interrupt by an exit.
    ///
    /// QEMU's interpreter of AMD-V remembers an interrupt that KVM has injected until the guest's next exit, and delivers it once more
    /// if it is itself interrupted before: into the interrupt's own handler, whatever lock that holds. The end of an interrupt comes
    /// first in a handler, so with an exit there is hardly time for that.
    fn withhold_paravirtual_eoi(&mut self) {
        let mut entries = self.entries.iter_mut();
        if let Some(features) = entries.find(|entry| entry.function == KVM_FEATURES) {
            features.eax &= !EAX_PV_EOI;
        }
    }

    fn normalise(supported: &[kvm_cpuid_entry2], processors: u8, deadline: bool) -> Self {
        let shape = Shape {
            processors,
            deadline,
            intel: supported
                .iter()
                .any(|entry| entry.function == 0 && entry.ebx.to_le_bytes() == *b"Genu"),
        };
        let mut entries: Vec<_> = supported
            .iter()
            .filter(|entry| !is_withheld(entry.function))
            .copied()
            .collect();
        for entry in &mut entries {
            normalise(entry, shape);
        }
        if supported.iter().any(|entry| entry.function == 0xb) {
            entries.extend(topology(processors));
        }
        Self {
            entries,
            intel: shape.intel,
        }
    }

    /// The table of the processor with an APIC identification.
    ///
    /// # Errors
    ///
    /// There are more entries than KVM takes.
    pub fn processor(&self, id: u8) -> Result<CpuId, Error> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(id) << 24,
                0xb => entry.edx = id.into(),
                // A core of its own, of one thread, on the only node.
                0x8000_001e => {
                    entry.eax = id.into();
                    entry.ebx = id.into();
                    entry.ecx = 0;
                }
                // Every other leaf is the same on all processors.
                _ => {}
            }
        }
        CpuId::from_entries(&entries).map_err(|_| Error::TooMany(entries.len()))
    }

    /// The extended state components that the processors have, as register XCR0 takes them; `None` without XSAVE.
    pub fn extended_state(&self) -> Option<u64> {
        self.entries
            .iter()
            .find(|entry| (entry.function, entry.index) == (0xd, 0))
            .map(|entry| u64::from(entry.edx) << 32 | u64::from(entry.eax))
            .filter(|components| *components != 0)
    }

    /// Whether the processors are Intel's.
    pub fn is_intel(&self) -> bool {
        self.intel
    }
}

/// Whether this host is a machine that QEMU interprets.
fn is_interpreted() -> bool {
    let leaf = |number| -> CpuidResult {
        // SAFETY: every 64-bit processor has the instruction; it reads registers that anybody may read.
        #[allow(unused_unsafe, reason = "newer compilers take it for safe")]
        unsafe {
            __cpuid(number)
        }
    };
    let CpuidResult { ebx, ecx, edx, .. } = leaf(HYPERVISOR);
    let name = [ebx, ecx, edx].map(u32::to_le_bytes);
    leaf(1).ecx & ECX_HYPERVISOR != 0 && name.as_flattened() == b"TCGTCGTCGTCG"
}

/// Leaves that the guest reads as zero (those beyond the highest leaf of their range, as on a processor without them).
fn is_withheld(function: u32) -> bool {
    matches!(
        function,
        // Serial number; performance counters; the host's topology (leaf 0xb is made anew); resource control; enclaves;
        // processor trace; performance counters again.
        0x3 | 0xa | 0xb | 0xf | 0x10 | 0x12 | 0x14 | 0x1f | 0x23
        // SVM, instruction sampling, encrypted memory, performance counters, the host's topology.
        | 0x8000_000a | 0x8000_001b | 0x8000_001f | 0x8000_0020 | 0x8000_0022 | 0x8000_0026
    )
}

fn normalise(entry: &mut kvm_cpuid_entry2, shape: Shape) {
    let Shape {
        processors,
        deadline,
        intel,
    } = shape;
    let several = processors > 1;
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ebx = entry.ebx & 0x0000_ffff | u32::from(processors) << 16;
            entry.ecx &= !(ECX_VMX | ECX_PDCM);
            entry.ecx |= ECX_HYPERVISOR;
            set(&mut entry.ecx, ECX_TSC_DEADLINE, deadline);
            set(&mut entry.edx, EDX_HTT, several);
        }
        // Caches: Intel's leaf, which also has the number of cores, and AMD's.
        (0x4, _) if cache_level(entry) > 0 => {
            share_cache(entry, processors);
            let cores = u32::from(processors).next_power_of_two() - 1;
            entry.eax = entry.eax & 0x03ff_ffff | cores << 26;
        }
        (0x8000_001d, _) if cache_level(entry) > 0 => share_cache(entry, processors),
        (0x6, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (EAX_ARAT, 0, 0, 0),
        (0x7, 0) => {
            entry.ebx &= !(EBX_SGX | EBX_RDT_MONITORING | EBX_RDT_ALLOCATION | EBX_PROCESSOR_TRACE);
            entry.ecx &= !ECX_SGX_LAUNCH;
        }
        (0x8000_0001, _) => {
            entry.ecx &= !(ECX_SVM | ECX_IBS | ECX_PERFORMANCE_COUNTERS);
            set(&mut entry.ecx, ECX_CMP_LEGACY, several && !intel);
        }
        (0x8000_0002..=0x8000_0004, _) => {
            let at = 16 * (entry.function - 0x8000_0002) as usize;
            let word = |word: usize| {
                let at = at + 4 * word;
                u32::from_le_bytes([NAME[at], NAME[at + 1], NAME[at + 2], NAME[at + 3]])
            };
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word(0), word(1), word(2), word(3));
        }
        // AMD's number of cores, and the width of the APIC identification that counts them.
        (0x8000_0008, _) if !intel => {
            entry.ecx = core_bits(processors) << 12 | (u32::from(processors) - 1);
        }
        // What KVM supports, the guest has.
        _ => {}
    }
}

/// Leaf 0xb: one thread a core; all cores in one package. The identification is each processor's own.
fn topology(processors: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, core_bits(processors), processors.into(), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

/// How many bits of the APIC identification count the cores of the package.
fn core_bits(processors: u8) -> u32 {
    u32::from(processors).next_power_of_two().ilog2()
}

/// The level of the cache that an entry speaks of; 0 if it speaks of none.
fn cache_level(entry: &kvm_cpuid_entry2) -> u32 {
    if entry.eax & 0x1f == 0 {
        0
    } else {
        entry.eax >> 5 & 0b111
    }
}

/// Caches of the third level are shared by all processors, the others belong to one.
fn share_cache(entry: &mut kvm_cpuid_entry2, processors: u8) {
    let sharing = if cache_level(entry) >= 3 {
        u32::from(processors) - 1
    } else {
        0
    };
    entry.eax = entry.eax & !0x03ff_c000 | sharing << 14;
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !bit | if on { bit } else { 0 };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn leaf(template: &Template, id: u8, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        let table = template.processor(id).unwrap();
        let mut found = table
            .as_slice()
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index));
        let first = found.next().copied();
        assert!(
            found.next().is_none(),
            "leaf {function:#x}.{index} is there twice"
        );
        first
    }

    #[test]
    fn the_end_of_an_interrupt_can_be_an_exit() {
        let supported = [
            entry(HYPERVISOR, 0, [KVM_FEATURES, 1, 2, 3]),
            entry(KVM_FEATURES, 0, [0xffff, 1, 2, 3]),
        ];
        let mut template = Template::normalise(&supported, 1, true);
        template.withhold_paravirtual_eoi();
        let features = &template.entries[1];
        assert_eq!((features.eax, features.ebx), (0xffbf, 1));
        assert_eq!(template.entries[0].eax, KVM_FEATURES);
    }

    #[test]
    fn each_processor_has_its_identification_everywhere() {
        let all = u32::MAX;
        let supported = [
            entry(0x1, 0, [all, all, all, all]),
            entry(0xb, 0, [5, 6, 7, 8]),
            entry(0x8000_001e, 0, [all, all, all, all]),
        ];
        let template = Template::normalise(&supported, 6, true);
        for id in 0..6 {
            assert_eq!(leaf(&template, id, 1, 0).unwrap().ebx >> 24, u32::from(id));
            for level in 0..3 {
                assert_eq!(leaf(&template, id, 0xb, level).unwrap().edx, u32::from(id));
            }
            let core = leaf(&template, id, 0x8000_001e, 0).unwrap();
            assert_eq!((core.eax, core.ebx, core.ecx), (id.into(), id.into(), 0));
        }
        assert_eq!(leaf(&template, 0, 1, 0).unwrap().ebx >> 16 & 0xff, 6);
        let cores = leaf(&template, 0, 0xb, 1).unwrap();
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 6, 0x201));
    }

    #[test]
    fn caches_are_shared_as_in_the_machine() {
        let cache = |function, index, level: u32| {
            entry(function, index, [0xffff_c000 | level << 5 | 1, 9, 9, 9])
        };
        let supported = [
            cache(4, 0, 1),
            cache(4, 3, 3),
            entry(4, 4, [0, 0, 0, 0]),
            cache(0x8000_001d, 3, 3),
        ];
        let template = Template::normalise(&supported, 5, true);
        let sharing =
            |function, index| leaf(&template, 0, function, index).unwrap().eax >> 14 & 0xfff;
        assert_eq!(sharing(4, 0), 0);
        assert_eq!(sharing(4, 3), 4);
        assert_eq!(sharing(0x8000_001d, 3), 4);
        assert_eq!(leaf(&template, 0, 4, 0).unwrap().eax >> 26, 7);
        assert_eq!(leaf(&template, 0, 4, 4).unwrap().eax, 0);
    }

    #[test]
    fn what_the_guest_gets_nothing_of_is_withheld() {
        let all = u32::MAX;
        let supported: Vec<_> = [
            0x1,
            0x6,
            0x7,
            0xa,
            0xf,
            0x12,
            0x14,
            0x1f,
            0x8000_0001,
            0x8000_000a,
        ]
        .map(|function| entry(function, 0, [all, all, all, all]))
        .into();
        let template = Template::normalise(&supported, 1, false);
        for function in [0xa, 0xf, 0x12, 0x14, 0x1f, 0x8000_000a] {
            assert!(leaf(&template, 0, function, 0).is_none(), "{function:#x}");
        }
        let features = leaf(&template, 0, 1, 0).unwrap();
        assert_eq!(features.ecx & (ECX_VMX | ECX_TSC_DEADLINE), 0);
        assert_eq!(features.ecx & ECX_HYPERVISOR, ECX_HYPERVISOR);
        assert_eq!(features.edx & EDX_HTT, 0);
        assert_eq!(leaf(&template, 0, 6, 0).unwrap().eax, EAX_ARAT);
        assert_eq!(leaf(&template, 0, 7, 0).unwrap().ebx & EBX_SGX, 0);
        assert_eq!(leaf(&template, 0, 0x8000_0001, 0).unwrap().ecx & ECX_SVM, 0);
    }

    #[test]
    fn the_name_is_the_same_on_every_host() {
        let supported = [0x8000_0002, 0x8000_0003, 0x8000_0004]
            .map(|function| entry(function, 0, [1, 2, 3, 4]));
        let template = Template::normalise(&supported, 1, true);
        let mut name = Vec::new();
        for function in 0x8000_0002..=0x8000_0004 {
            let leaf = leaf(&template, 0, function, 0).unwrap();
            for register in [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] {
                name.extend(register.to_le_bytes());
            }
        }
        assert_eq!(name, NAME);
    }

    #[test]
    fn kvm_takes_the_tables_of_the_largest_machine() {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let template = Template::new(&kvm, 32).unwrap();
        let vcpu = vm.create_vcpu(31).unwrap();
        vcpu.set_cpuid2(&template.processor(31).unwrap()).unwrap();
        assert_eq!(template.extended_state().unwrap() & 0b11, 0b11);
    }
}
