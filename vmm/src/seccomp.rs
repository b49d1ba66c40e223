//! System call filters: what each kind of thread may still ask of the host's kernel once the guest runs.
//!
//! A filter lists what its threads need, with the arguments that matter; anything else kills the process. None may open,
//! connect, execute, or map memory executable. A filter that cannot be made or installed ends the machine.
//!
//! A thread inherits the filter of the thread that starts it and then adds its own. Threads are started by the main
//! thread alone, so the main thread's filter allows what every other kind of thread needs to start and to run.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// The kinds of threads, each with a filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The event loop: control socket, vsock, start of further threads.
    Main,
    /// A virtual processor: KVM_RUN, and the device accesses that leave it.
    Vcpu,
    /// A block device's worker: reads and writes of its disk.
    Block,
}

/// Why a thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot compile the seccomp filter of {kind:?} threads: {source}")]
    Compile {
        kind: ThreadKind,
        source: seccompiler::BackendError,
    },
    #[error("cannot install the seccomp filter of {kind:?} threads: {source}")]
    Install {
        kind: ThreadKind,
        source: seccompiler::Error,
    },
}

/// Starts a thread that confines itself before it runs `body`, and waits until it is confined.
///
/// # Errors
///
/// The filter does not compile or is not accepted, or the system has no room for a thread. Then `body` does not run.
pub fn spawn(
    kind: ThreadKind,
    name: String,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let filter = Filter::compile(kind).map_err(io::Error::other)?;
    let (report, confined) = mpsc::sync_channel(1);
    let thread = Builder::new().name(name).spawn(move || {
        let installed = filter.install();
        let confined = installed.is_ok();
        // The other end waits for exactly this.
        let _ = report.send(installed);
        if confined {
            body();
        }
    })?;
    match confined.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(io::Error::other(error)),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// A compiled filter.
#[derive(Debug)]
pub struct Filter {
    kind: ThreadKind,
    programs: Vec<BpfProgram>,
}

impl Filter {
    /// Compiles the filter of one kind of thread.
    ///
    /// # Errors
    ///
    /// The tables below contradict themselves.
    pub fn compile(kind: ThreadKind) -> Result<Self, Error> {
        let tables: &[&[Call]] = match kind {
            ThreadKind::Main => &[COMMON, START, BLOCK, MAIN],
            ThreadKind::Vcpu => &[COMMON, VCPU],
            ThreadKind::Block => &[COMMON, BLOCK],
        };
        let mut programs = vec![program(
            tables,
            SeccompAction::KillProcess,
            SeccompAction::Allow,
        )];
        if kind == ThreadKind::Main {
            // The C library starts threads by clone3, whose flags lie in memory that a filter cannot read. Told that the
            // call does not exist, it falls back to clone, whose flags are checked.
            programs.push(program(
                &[CLONE3],
                SeccompAction::Allow,
                SeccompAction::Errno(libc::ENOSYS as u32),
            ));
        }
        programs
            .into_iter()
            .collect::<Result<_, _>>()
            .map(|programs| Self { kind, programs })
            .map_err(|source| Error::Compile { kind, source })
    }

    /// Confines the calling thread, and the threads that it starts from now on.
    ///
    /// # Errors
    ///
    /// The kernel refuses the filter.
    pub fn install(&self) -> Result<(), Error> {
        // The last program first: installing is itself a call that the first one need not allow.
        for program in self.programs.iter().rev() {
            seccompiler::apply_filter(program).map_err(|source| Error::Install {
                kind: self.kind,
                source,
            })?;
        }
        Ok(())
    }
}

/// A system call and the forms in which it is allowed; no form listed means any.
type Call = (libc::c_long, &'static [Form]);

/// One allowed form of a call: all of its conditions hold.
type Form = &'static [Check];

/// A condition on an argument, counted from 0, of which the kernel looks at 32 bits.
#[derive(Debug, Clone, Copy)]
enum Check {
    /// The argument has this value.
    Is(u8, u32),
    /// The argument has none of these bits.
    Lacks(u8, u32),
    /// The argument has all of these bits.
    Has(u8, u32),
}

use Check::{Has, Is, Lacks};

/// Memory, locks, time, the end: what the allocator and the standard library do in any thread.
const COMMON: &[Call] = &[
    (libc::SYS_brk, &[]),
    (libc::SYS_clock_gettime, &[]),
    (libc::SYS_close, &[]),
    (libc::SYS_exit, &[]),
    (libc::SYS_exit_group, &[]),
    // With debug assertions, the standard library looks whether a descriptor is open before it closes it.
    #[cfg(debug_assertions)]
    (libc::SYS_fcntl, &[&[Is(1, libc::F_GETFD as u32)]]),
    (libc::SYS_futex, &[]),
    (libc::SYS_getpid, &[]),
    (libc::SYS_getrandom, &[]),
    (libc::SYS_gettid, &[]),
    (libc::SYS_madvise, &[]),
    (
        libc::SYS_mmap,
        &[&[
            Lacks(2, libc::PROT_EXEC as u32),
            Has(3, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32),
        ]],
    ),
    (libc::SYS_mprotect, &[&[Lacks(2, libc::PROT_EXEC as u32)]]),
    (libc::SYS_mremap, &[]),
    (libc::SYS_munmap, &[]),
    (libc::SYS_read, &[]),
    (libc::SYS_restart_syscall, &[]),
    (libc::SYS_rt_sigprocmask, &[]),
    (libc::SYS_sched_yield, &[]),
    (libc::SYS_sigaltstack, &[]),
    (libc::SYS_tgkill, &[&[Is(2, libc::SIGABRT as u32)]]),
    (libc::SYS_write, &[]),
];

/// The start of a thread, up to and with its own filter.
const START: &[Call] = &[
    (libc::SYS_clone, &[&[Is(0, THREAD_FLAGS)]]),
    (libc::SYS_clone3, &[]),
    (
        libc::SYS_prctl,
        &[
            &[Is(0, libc::PR_SET_NAME as u32)],
            &[Is(0, libc::PR_SET_NO_NEW_PRIVS as u32)],
        ],
    ),
    (libc::SYS_rseq, &[]),
    (libc::SYS_sched_getaffinity, &[]),
    (
        libc::SYS_seccomp,
        &[&[Is(0, libc::SECCOMP_SET_MODE_FILTER), Is(1, 0)]],
    ),
    (libc::SYS_set_robust_list, &[]),
];

/// The flags of a thread of this process, as the C library sets them: no new process, no namespace, no tracing.
const THREAD_FLAGS: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

const CLONE3: &[Call] = &[(libc::SYS_clone3, &[])];

/// The control socket, vsock streams, devices that are attached and detached.
const MAIN: &[Call] = &[
    (libc::SYS_epoll_create1, &[]),
    (libc::SYS_epoll_ctl, &[]),
    (libc::SYS_epoll_pwait, &[]),
    (libc::SYS_epoll_wait, &[]),
    (libc::SYS_eventfd2, &[]),
    (
        libc::SYS_fcntl,
        &[
            &[Is(1, libc::F_GETFL as u32)],
            &[Is(1, libc::F_SETFL as u32)],
            &[Is(1, libc::F_DUPFD_CLOEXEC as u32)],
        ],
    ),
    (
        libc::SYS_ioctl,
        &[
            &[Is(1, KVM_IOEVENTFD)],
            &[Is(1, KVM_IRQFD)],
            &[Is(1, KVM_SET_GSI_ROUTING)],
            &[Is(1, libc::FIONBIO as u32)],
        ],
    ),
    (libc::SYS_lseek, &[]),
    (libc::SYS_poll, &[]),
    (libc::SYS_readv, &[]),
    (libc::SYS_recvfrom, &[]),
    (libc::SYS_recvmsg, &[]),
    (libc::SYS_sendmsg, &[]),
    (libc::SYS_sendto, &[&[Is(4, 0)]]),
    (libc::SYS_shutdown, &[]),
    (libc::SYS_socketpair, &[&[Is(0, libc::AF_UNIX as u32)]]),
    // Of an open descriptor. (A path beside it would be looked up in an empty root.)
    (libc::SYS_statx, &[&[Has(2, libc::AT_EMPTY_PATH as u32)]]),
    (libc::SYS_writev, &[]),
];

/// A processor runs; its device accesses change interrupt routes and signal events.
const VCPU: &[Call] = &[
    (libc::SYS_epoll_ctl, &[]),
    (
        libc::SYS_ioctl,
        &[
            &[Is(1, KVM_RUN)],
            &[Is(1, KVM_GET_REGS)],
            &[Is(1, KVM_IOEVENTFD)],
            &[Is(1, KVM_IRQFD)],
            &[Is(1, KVM_SET_GSI_ROUTING)],
        ],
    ),
];

/// A disk is read, written, flushed and punched.
const BLOCK: &[Call] = &[
    (libc::SYS_epoll_pwait, &[]),
    (libc::SYS_epoll_wait, &[]),
    (libc::SYS_fallocate, &[]),
    (libc::SYS_fdatasync, &[]),
    (libc::SYS_poll, &[]),
    (libc::SYS_pread64, &[]),
    (libc::SYS_preadv, &[]),
    (libc::SYS_pwrite64, &[]),
    (libc::SYS_pwritev, &[]),
];

const KVM_RUN: u32 = kvm(_IOC_NONE, 0x80, 0);
const KVM_GET_REGS: u32 = kvm(_IOC_READ, 0x81, size_of::<kvm_bindings::kvm_regs>());
const KVM_IOEVENTFD: u32 = kvm(_IOC_WRITE, 0x79, size_of::<kvm_bindings::kvm_ioeventfd>());
const KVM_IRQFD: u32 = kvm(_IOC_WRITE, 0x76, size_of::<kvm_bindings::kvm_irqfd>());
const KVM_SET_GSI_ROUTING: u32 = kvm(_IOC_WRITE, 0x6a, size_of::<kvm_bindings::kvm_irq_routing>());

/// The number of one of KVM's ioctls.
const fn kvm(direction: u32, number: u32, size: usize) -> u32 {
    ioctl_expr(direction, kvm_bindings::KVMIO, number, size as u32) as u32
}

/// One BPF program for several tables; a call that is in more than one is allowed in each of its forms.
fn program(
    tables: &[&[Call]],
    mismatch: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = BTreeMap::new();
    for (call, forms) in tables.iter().copied().flatten() {
        let known = rules.entry(*call).or_default();
        for form in *forms {
            known.push(SeccompRule::new(
                form.iter().map(condition).collect::<Result<_, _>>()?,
            )?);
        }
    }
    SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64)?.try_into()
}

fn condition(check: &Check) -> Result<SeccompCondition, seccompiler::BackendError> {
    let (argument, operator, value) = match *check {
        Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
        Lacks(argument, bits) => (argument, SeccompCmpOp::MaskedEq(bits.into()), 0),
        Has(argument, bits) => (argument, SeccompCmpOp::MaskedEq(bits.into()), bits),
    };
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::*;

    /// Makes one system call in a confined child and tells how the child ended.
    fn confined(kind: ThreadKind, call: libc::c_long, arguments: [u64; 6]) -> WaitStatus {
        let filter = Filter::compile(kind).unwrap();
        // SAFETY: between fork and _exit the child makes system calls only, it takes no lock and allocates nothing.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let [a, b, c, d, e, f] = arguments;
                let confined = filter.install().is_ok();
                // SAFETY: the tests call what is refused, or what is harmless with invalid arguments.
                unsafe {
                    libc::syscall(call, a, b, c, d, e, f);
                    libc::syscall(libc::SYS_exit_group, if confined { 0 } else { 1 });
                }
                unreachable!("exit_group returns to nobody");
            }
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        }
    }

    fn is_killed(status: WaitStatus) -> bool {
        matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
    }

    const KINDS: [ThreadKind; 3] = [ThreadKind::Main, ThreadKind::Vcpu, ThreadKind::Block];

    #[test]
    fn every_kind_is_killed_for_what_none_needs() {
        let refused: &[(libc::c_long, [u64; 6])] = &[
            (libc::SYS_open, [0; 6]),
            (libc::SYS_openat, [0; 6]),
            (libc::SYS_socket, [libc::AF_UNIX as u64, 1, 0, 0, 0, 0]),
            (libc::SYS_connect, [3, 0, 0, 0, 0, 0]),
            (libc::SYS_execve, [0; 6]),
            (libc::SYS_execveat, [0; 6]),
            (libc::SYS_fork, [0; 6]),
            (libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]),
            (
                libc::SYS_clone,
                [
                    u64::from(THREAD_FLAGS) | libc::CLONE_NEWUSER as u64,
                    0,
                    0,
                    0,
                    0,
                    0,
                ],
            ),
            (libc::SYS_ptrace, [0; 6]),
            (libc::SYS_process_vm_writev, [0; 6]),
            (libc::SYS_kill, [0; 6]),
            (libc::SYS_tgkill, [1, 1, libc::SIGKILL as u64, 0, 0, 0]),
            (libc::SYS_io_uring_setup, [0; 6]),
            (
                libc::SYS_prctl,
                [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0],
            ),
            (libc::SYS_ioctl, [0, libc::TIOCSTI, 0, 0, 0, 0]),
            (
                libc::SYS_mmap,
                [0, 4096, libc::PROT_EXEC as u64, 0x22, u64::MAX, 0],
            ),
            (libc::SYS_mmap, [0, 4096, libc::PROT_READ as u64, 0x2, 3, 0]),
            (
                libc::SYS_mprotect,
                [0, 4096, (libc::PROT_EXEC | libc::PROT_READ) as u64, 0, 0, 0],
            ),
        ];
        for kind in KINDS {
            for &(call, arguments) in refused {
                let status = confined(kind, call, arguments);
                assert!(is_killed(status), "{kind:?}: call {call}: {status:?}");
            }
        }
    }

    #[test]
    fn only_a_processor_runs_the_guest_and_only_main_starts_threads() {
        let run = (libc::SYS_ioctl, [u64::MAX, KVM_RUN.into(), 0, 0, 0, 0]);
        let start = (libc::SYS_clone3, [0; 6]);
        for kind in KINDS {
            let status = confined(kind, run.0, run.1);
            assert_eq!(
                is_killed(status),
                kind != ThreadKind::Vcpu,
                "{kind:?}: {status:?}"
            );
            let status = confined(kind, start.0, start.1);
            assert_eq!(
                is_killed(status),
                kind != ThreadKind::Main,
                "{kind:?}: {status:?}"
            );
        }
    }

    #[test]
    fn a_confined_main_thread_starts_confined_workers() {
        let (sender, receiver) = mpsc::channel();
        let main = std::thread::spawn(|| {
            Filter::compile(ThreadKind::Main)
                .unwrap()
                .install()
                .unwrap();
            let body = move || sender.send(vec![1u8; 1 << 20].len()).unwrap();
            spawn(ThreadKind::Block, "disk0".into(), body)
                .unwrap()
                .join()
                .unwrap();
        });
        main.join().unwrap();
        assert_eq!(receiver.recv().unwrap(), 1 << 20);
    }
}
