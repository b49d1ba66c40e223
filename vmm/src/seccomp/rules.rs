//! What each kind of thread may ask of the kernel.

use libc::c_long;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// A system call and the forms in which it is allowed; no form listed means any.
pub type Call = (c_long, &'static [Form]);

/// One allowed form of a call: all of its conditions hold.
pub type Form = &'static [Check];

/// A condition on an argument, counted from 0, of which the kernel looks at 32 bits.
#[derive(Debug, Clone, Copy)]
pub enum Check {
    /// The argument has this value.
    Is(u8, u32),
    /// The argument has none of these bits.
    Lacks(u8, u32),
    /// The argument has all of these bits.
    Has(u8, u32),
}

use Check::{Has, Is, Lacks};

/// Memory, locks, time, the end: what the allocator and the standard library do in any thread.
pub const COMMON: &[Call] = &[
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

/// The start of a thread, up to and with its own filter. ([`super::bpf`] answers clone3.)
pub const START: &[Call] = &[
    (libc::SYS_clone, &[&[Is(0, THREAD_FLAGS)]]),
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
pub const THREAD_FLAGS: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// The control socket, vsock streams, devices that are attached and detached.
pub const MAIN: &[Call] = &[
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
            &[Is(1, libc::TUNGETIFF as u32)],
            &[Is(1, libc::TUNSETVNETHDRSZ as u32)],
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
pub const VCPU: &[Call] = &[
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
pub const BLOCK: &[Call] = &[
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

/// Frames are read and written; the tap follows what the driver has agreed to.
pub const NET: &[Call] = &[
    (libc::SYS_epoll_pwait, &[]),
    (libc::SYS_epoll_wait, &[]),
    (
        libc::SYS_ioctl,
        &[
            &[Is(1, libc::TUNSETOFFLOAD as u32)],
            &[Is(1, libc::TUNSETQUEUE as u32)],
        ],
    ),
    (libc::SYS_readv, &[]),
    (libc::SYS_writev, &[]),
];

pub const KVM_RUN: u32 = kvm(_IOC_NONE, 0x80, 0);
const KVM_GET_REGS: u32 = kvm(_IOC_READ, 0x81, size_of::<kvm_bindings::kvm_regs>());
const KVM_IOEVENTFD: u32 = kvm(_IOC_WRITE, 0x79, size_of::<kvm_bindings::kvm_ioeventfd>());
const KVM_IRQFD: u32 = kvm(_IOC_WRITE, 0x76, size_of::<kvm_bindings::kvm_irqfd>());
const KVM_SET_GSI_ROUTING: u32 = kvm(_IOC_WRITE, 0x6a, size_of::<kvm_bindings::kvm_irq_routing>());

/// The number of one of KVM's ioctls.
const fn kvm(direction: u32, number: u32, size: usize) -> u32 {
    ioctl_expr(direction, kvm_bindings::KVMIO, number, size as u32) as u32
}
