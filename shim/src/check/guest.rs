//! A real guest of a few instructions, to find out whether KVM runs a guest's kernel or interprets it.
//!
//! A KVM without hardware virtualisation below it (`kvm_pvm`, for one) offers the same device and the same capabilities, but
//! interprets what a guest does in ring 0, and gives up at instructions that every kernel uses. No kernel boots on it.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

use super::Verdict;

/// Guest memory: all structures and the code lie in its first 64 KiB, which one page of 2 MiB maps.
const MEMORY: usize = 64 * 1024;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const HANDLER: u64 = 0x6000;
const CODE: u64 = 0x6800;
/// Where a program leaves [`MARK`] when it did what it should.
const MARK_ADDRESS: usize = 0x7000;
const MARK: u32 = 1;
const STACK: u64 = MEMORY as u64;

/// KVM wants three pages of guest addresses for itself on Intel processors without unrestricted guests; out of the way.
const TSS: usize = 0xfffb_d000;

const SET_MARK: [u8; 11] = [0xc7, 0x04, 0x25, 0x00, 0x70, 0x00, 0x00, 0x01, 0, 0, 0]; // mov dword [0x7000], 1

const CMPXCHG16B: &[u8] = &[
    0xbf, 0x00, 0x70, 0x00, 0x00, // mov edi, 0x7000
    0x31, 0xc0, // xor eax, eax
    0x31, 0xd2, // xor edx, edx
    0xbb, 0x01, 0x00, 0x00, 0x00, // mov ebx, 1
    0x31, 0xc9, // xor ecx, ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]: 0 is there, so 1 is stored
    0xf4, // hlt
];

const XRSTOR: &[u8] = &[
    0x31, 0xc9, // xor ecx, ecx
    0x31, 0xd2, // xor edx, edx
    0xb8, 0x03, 0x00, 0x00, 0x00, // mov eax, 3 (x87 and SSE)
    0x0f, 0x01, 0xd1, // xsetbv
    0xbf, 0x00, 0x80, 0x00, 0x00, // mov edi, 0x8000
    0x48, 0x0f, 0xae, 0x27, // xsave64 [rdi]
    0x48, 0x0f, 0xae, 0x2f, // xrstor64 [rdi]
    0xc7, 0x04, 0x25, 0x00, 0x70, 0x00, 0x00, 0x01, 0, 0, 0,    // mov dword [0x7000], 1
    0xf4, // hlt
];

/// The handler leaves the mark.
const INT3: &[u8] = &[
    0xcc, // int3
    0xf4, // hlt
];

const IRETQ: [u8; 2] = [0x48, 0xcf];

/// Rounds of the loop, of two instructions each.
const ROUNDS: u32 = 200_000;

const LOOP: &[u8] = &[
    0xb9, 0x40, 0x0d, 0x03, 0x00, // mov ecx, 200000
    0xff, 0xc9, // again: dec ecx
    0x75, 0xfc, // jnz again
    0xc7, 0x04, 0x25, 0x00, 0x70, 0x00, 0x00, 0x01, 0, 0, 0,    // mov dword [0x7000], 1
    0xf4, // hlt
];

/// How many times slower than on the host the loop may be in the guest. A processor, real or emulated, runs it equally
/// fast in both; an interpreter is a thousand times slower.
const MOST_SLOWDOWN: f64 = 50.0;

/// How often the loop is tried: one round may be interrupted by other work of the host.
const TRIES: usize = 3;

/// A guest that runs longer than this hangs.
const LIMIT: Duration = Duration::from_secs(10);

/// What went wrong with a program: an operation of KVM, or how the guest ended instead of by its `hlt`.
type Failure = String;

/// Runs all programs.
pub fn check(kvm: Kvm) -> Verdict {
    let (sender, receiver) = mpsc::channel();
    // A thread of its own, because a guest that hangs cannot be waited for. It ends with the process.
    thread::spawn(move || {
        let programs = [
            ("cmpxchg16b", CMPXCHG16B),
            ("xrstor", XRSTOR),
            ("int3", INT3),
        ];
        let failures = programs
            .into_iter()
            .filter_map(|(name, code)| Some((name, run(&kvm, code).err()?)))
            .collect();
        let guest = best(|| run(&kvm, LOOP));
        // Nobody listens any more only if the guest took too long.
        let _ = sender.send((failures, guest, best(on_the_host)));
    });
    match receiver.recv_timeout(LIMIT) {
        Ok((failures, guest, host)) => judge(failures, guest, host),
        Err(error) => {
            let failure = match error {
                RecvTimeoutError::Timeout => format!("still runs after {} s", LIMIT.as_secs()),
                RecvTimeoutError::Disconnected => "the check itself failed".to_owned(),
            };
            judge(Vec::new(), Err(failure), Ok(Duration::ZERO))
        }
    }
}

/// The shortest of some times.
fn best(time: impl Fn() -> Result<Duration, Failure>) -> Result<Duration, Failure> {
    (1..TRIES).try_fold(time()?, |best, _| Ok(best.min(time()?)))
}

/// Decides by the instructions that failed, and by the times that the loop took in the guest and on the host.
fn judge(
    failures: Vec<(&str, Failure)>,
    guest: Result<Duration, Failure>,
    host: Result<Duration, Failure>,
) -> Verdict {
    let mut problems: Vec<String> = failures
        .into_iter()
        .map(|(name, failure)| format!("{name}: {failure}"))
        .collect();
    match (guest, host) {
        (Ok(guest), Ok(host)) => {
            let slowdown = guest.as_secs_f64() / host.as_secs_f64().max(1e-9);
            if slowdown > MOST_SLOWDOWN {
                problems.push(format!(
                    "a loop is {slowdown:.0} times slower than on the host"
                ));
            }
        }
        (Err(failure), _) | (_, Err(failure)) => problems.push(format!("loop: {failure}")),
    }
    if problems.is_empty() {
        return Verdict::good("a guest's kernel code runs as fast as the host's");
    }
    Verdict::bad(
        format!(
            "this KVM interprets a guest's kernel code, so no kernel boots ({})",
            problems.join("; ")
        ),
        "take a host with VT-x or AMD-V, or, in a virtual machine, with nested virtualisation; kvm_pvm and the like do not do",
    )
}

#[repr(C, align(4096))]
struct Memory([u8; MEMORY]);

impl Memory {
    /// Page tables, descriptor tables, an interrupt handler, and the program.
    fn with(code: &[u8]) -> Box<Self> {
        let mut memory = Box::new(Self([0; MEMORY]));
        let mut put = |address: u64, bytes: &[u8]| {
            let start = address as usize;
            memory.0[start..start + bytes.len()].copy_from_slice(bytes);
        };
        // Intel SDM volume 3, section 4.5: present and writable; the last level is one page of 2 MiB.
        put(PML4, &(PDPT | 0b11).to_le_bytes());
        put(PDPT, &(PD | 0b11).to_le_bytes());
        put(PD, &0b1000_0011u64.to_le_bytes());
        // Section 3.4.5: 64-bit code and flat data, both of ring 0.
        put(GDT + 8, &0x00af_9b00_0000_ffffu64.to_le_bytes());
        put(GDT + 16, &0x00cf_9300_0000_ffffu64.to_le_bytes());
        // Section 6.14.1: vector 3, an interrupt gate.
        put(
            IDT + 3 * 16,
            &(HANDLER | 0x8 << 16 | 0x8e00 << 32).to_le_bytes(),
        );
        put(HANDLER, &SET_MARK);
        put(HANDLER + SET_MARK.len() as u64, &IRETQ);
        put(CODE, code);
        memory
    }
}

/// Runs a program in ring 0 of 64-bit mode, and returns the processor time that it took.
fn run(kvm: &Kvm, code: &[u8]) -> Result<Duration, Failure> {
    let mut memory = Memory::with(code);
    let address = memory.0.as_mut_ptr();
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    vm.set_tss_address(TSS)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: the memory is as long as the region says, and outlives the virtual machine, which is made after it.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    sregs.cr0 = 0x8000_0033; // PG, NE, ET, MP, PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x0004_0620; // OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
    sregs.efer = 0x500; // LMA, LME
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 3 * 8 - 1;
    sregs.idt.base = IDT;
    sregs.idt.limit = 4 * 16 - 1;
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 16,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.ss,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        *segment = data;
    }
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    vcpu.set_regs(&kvm_regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..Default::default()
    })
    .map_err(failed("KVM_SET_REGS"))?;
    let before = processor_time()?;
    let end = loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => break Ok(()),
            Ok(VcpuExit::InternalError) => {
                break Err("KVM cannot execute it (internal error)".to_owned());
            }
            Ok(other) => break Err(format!("the guest ended with {other:?}")),
            // A signal, which says nothing of the guest.
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(failed("KVM_RUN")(error)),
        }
    };
    let time = processor_time()?.saturating_sub(before);
    end?;
    // SAFETY: the address is within the memory, and aligned. Volatile, because the guest wrote there behind the compiler's back.
    let mark = unsafe { address.add(MARK_ADDRESS).cast::<u32>().read_volatile() };
    if mark == MARK {
        Ok(time)
    } else {
        Err("it did nothing".to_owned())
    }
}

/// Runs the loop of [`LOOP`] here, and returns the processor time that it took.
fn on_the_host() -> Result<Duration, Failure> {
    let before = processor_time()?;
    // SAFETY: changes one register, which is declared, and the flags.
    unsafe {
        std::arch::asm!("2: dec {rounds:e}", "jnz 2b", rounds = inout(reg) ROUNDS => _, options(nomem, nostack));
    }
    Ok(processor_time()?.saturating_sub(before))
}

/// The processor time of this thread: unlike the clock on the wall it does not pass while others run.
fn processor_time() -> Result<Duration, Failure> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map(Duration::from)
        .map_err(|errno: Errno| format!("clock_gettime: {errno}"))
}

fn failed(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Failure {
    move |error| format!("{operation}: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(verdict: Verdict) -> String {
        match verdict {
            Verdict::Good(seen) => panic!("good: {seen}"),
            Verdict::Bad { problem, .. } => problem,
        }
    }

    #[test]
    fn full_speed_and_all_instructions_are_good() {
        let host = Duration::from_micros(100);
        for micros in [0, 100, 4000] {
            let guest = Ok(Duration::from_micros(micros));
            assert!(judge(Vec::new(), guest, Ok(host)).is_good());
        }
    }

    #[test]
    fn a_slow_loop_or_a_failed_instruction_is_an_interpreter() {
        let host = Duration::from_micros(100);
        let slow = judge(Vec::new(), Ok(Duration::from_millis(330)), Ok(host));
        assert!(text(slow).contains("(a loop is 3300 times slower than on the host)"));
        let failed = judge(vec![("xrstor", "no".into())], Ok(host), Ok(host));
        assert!(text(failed).contains("(xrstor: no)"));
        let hangs = judge(Vec::new(), Err("still runs".into()), Ok(Duration::ZERO));
        assert!(text(hangs).contains("(loop: still runs)"));
    }

    #[test]
    fn the_loop_is_as_long_as_it_is_counted() {
        assert_eq!(LOOP[1..5], ROUNDS.to_le_bytes());
        assert!(LOOP.ends_with(&[&SET_MARK[..], &[0xf4]].concat()));
        assert!(XRSTOR.ends_with(&[&SET_MARK[..], &[0xf4]].concat()));
    }

    /// Whatever this host's KVM is, a plain loop ends, and says so.
    #[test]
    fn a_guest_runs_here() {
        let kvm = Kvm::new().unwrap();
        assert!(run(&kvm, LOOP).unwrap() > Duration::ZERO);
        assert!(on_the_host().unwrap() > Duration::ZERO);
        // A program that does not leave the mark has not run.
        assert_eq!(run(&kvm, &[0xf4]).unwrap_err(), "it did nothing");
        // An access beyond memory is no end as it should be.
        let beyond = [0xa1, 0, 0, 0x10, 0, 0, 0, 0, 0, 0xf4]; // mov eax, [0x100000]
        assert!(run(&kvm, &beyond).unwrap_err().contains("MmioRead"));
    }
}
