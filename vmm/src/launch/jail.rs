//! What the child does between its creation and the execution of the VMM: it confines itself.
//!
//! The child shares its memory with the shim, whose calling thread is suspended until the child executes or exits
//! (`CLONE_VM | CLONE_VFORK`): no page table is copied and no page is faulted in again, and the child reports the step
//! that failed by writing it down. In return it may do nothing but system calls on data that the parent prepared: no
//! allocation, no lock, no panic.

use std::convert::Infallible;
use std::ffi::{CStr, c_int, c_long, c_void};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use crate::control::CONTROL_DESCRIPTOR;

/// The namespaces that the VMM has for itself. A user namespace is not among them: it would give the process no less
/// than it has without (its identifiers on the host are unprivileged either way, it holds no capability in any
/// namespace and its filters let it make none), it needs its maps written by the parent in a hand-shake that every
/// start would pay for, and many hosts switch user namespaces off.
pub(super) const NAMESPACES: c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// Resource limits, soft and hard. `RLIMIT_FSIZE` stays as it is: guest memory and scratch disks are large files.
pub(super) const LIMITS: [(libc::__rlimit_resource_t, u64); 5] = [
    // 1 and not 0: with 0 a crash is still piped to the host's core handler, guest memory included; 1 is the value
    // that the kernel refuses for pipes and that is too small for files.
    (libc::RLIMIT_CORE, 1),
    // Extents of disks, streams, and the event descriptors of 31 devices.
    (libc::RLIMIT_NOFILE, 8192),
    // 32 processors, and 4 queues of 31 disks with a thread each. Counted per user: the user is this machine's alone.
    (libc::RLIMIT_NPROC, 256),
    (libc::RLIMIT_MEMLOCK, 0),
    (libc::RLIMIT_MSGQUEUE, 0),
];

/// Highest signal number of the kernel.
const LAST_SIGNAL: c_int = 64;

/// A directory that every host has, to mount the new root on. Only the child's own mount namespace sees it.
const MOUNT_POINT: &CStr = c"/proc";

/// Content of the root file system: one inode (its root directory) and no data.
const ROOT_OPTIONS: &CStr = c"size=4k,nr_inodes=1,mode=0555";

/// Where the child was when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Empties the capability bounding set.
    BoundingSet,
    /// Cuts the child's mounts off from the host's.
    PrivateMounts,
    /// Mounts the empty root.
    MountRoot,
    /// Makes the empty root the root.
    PivotRoot,
    /// Detaches the host's file systems.
    DetachHost,
    /// Puts `/dev/null` and the control socket at their numbers and marks every other descriptor to be closed.
    Descriptors,
    /// Sets the resource limits.
    Limits,
    /// Starts a session.
    Session,
    /// Takes the machine's own user and group, and no other group.
    Identity,
    /// Gives up all capabilities.
    Capabilities,
    /// Sets `no_new_privs`.
    NoNewPrivileges,
    /// Asks to be killed when the shim's thread dies.
    ParentDeathSignal,
    /// Resets signal dispositions and the signal mask.
    Signals,
    /// Executes the VMM.
    Execute,
}

impl Step {
    pub(super) const ALL: [Self; 14] = [
        Self::BoundingSet,
        Self::PrivateMounts,
        Self::MountRoot,
        Self::PivotRoot,
        Self::DetachHost,
        Self::Descriptors,
        Self::Limits,
        Self::Session,
        Self::Identity,
        Self::Capabilities,
        Self::NoNewPrivileges,
        Self::ParentDeathSignal,
        Self::Signals,
        Self::Execute,
    ];

    /// What the step does, for error messages.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::BoundingSet => "emptying the capability bounding set",
            Self::PrivateMounts => "making its mounts private",
            Self::MountRoot => "mounting an empty root",
            Self::PivotRoot => "changing to the empty root",
            Self::DetachHost => "detaching the host's file systems",
            Self::Descriptors => "arranging its descriptors",
            Self::Limits => "setting resource limits",
            Self::Session => "starting a session",
            Self::Identity => "taking a user and group of its own",
            Self::Capabilities => "giving up capabilities",
            Self::NoNewPrivileges => "setting no_new_privs",
            Self::ParentDeathSignal => "setting the parent death signal",
            Self::Signals => "resetting signals",
            Self::Execute => "executing the VMM",
        }
    }

    /// What the operator can do about it.
    pub(super) fn remedy(self) -> &'static str {
        match self {
            Self::PrivateMounts | Self::MountRoot | Self::PivotRoot | Self::DetachHost => {
                "the shim must run as root of the host, with CAP_SYS_ADMIN, without a security profile that forbids mounts, and on a host whose root is not the initial RAM file system"
            }
            Self::BoundingSet | Self::Identity | Self::Limits | Self::Capabilities => {
                "the shim must run as root of the host with all capabilities"
            }
            Self::Descriptors => "Linux 5.11 or later is needed (close_range)",
            Self::Session | Self::NoNewPrivileges | Self::ParentDeathSignal | Self::Signals => {
                "`bulkhead check` tells whether this host is fit"
            }
            Self::Execute => {
                "the VMM must be a static executable for this machine, executable by everyone, on a file system mounted without noexec"
            }
        }
    }
}

/// What the child needs, prepared by the parent, and what it says back.
#[derive(Debug)]
pub(super) struct Plan {
    /// The VMM's executable.
    pub executable: RawFd,
    /// `/dev/null`, open for reading and writing.
    pub null: RawFd,
    /// The VMM's end of the control socket.
    pub control: RawFd,
    /// User and group.
    pub uid: u32,
    step: AtomicU8,
    errno: AtomicI32,
}

impl Plan {
    pub fn new(executable: RawFd, null: RawFd, control: RawFd, uid: u32) -> Self {
        Self {
            executable,
            null,
            control,
            uid,
            step: AtomicU8::new(0),
            errno: AtomicI32::new(0),
        }
    }

    /// The step that failed and its error number, once the child has executed or exited; `None` if all went well.
    pub fn failure(&self) -> Option<(Step, i32)> {
        match self.errno.load(Ordering::Acquire) {
            0 => None,
            errno => Step::ALL
                .get(usize::from(self.step.load(Ordering::Acquire)))
                .map(|&step| (step, errno)),
        }
    }
}

/// The child's only function; returns only if a step failed.
///
/// `plan` points to a [`Plan`].
pub(super) extern "C" fn enter(plan: *mut c_void) -> c_int {
    // SAFETY: the parent passed a pointer to a `Plan` and stays suspended, with the plan on its stack, until this process
    // executes or exits.
    let plan = unsafe { &*plan.cast::<Plan>() };
    // SAFETY: this is the new process, and the plan's descriptors are open in its table.
    let Err((step, errno)) = unsafe { confine(plan) };
    plan.step.store(step as u8, Ordering::Release);
    plan.errno.store(errno, Ordering::Release);
    127
}

type Done<T> = Result<T, (Step, i32)>;

/// Goes through all steps; returns only a failure.
///
/// # Safety
/// Only in a new process that shares nothing with its parent but memory. The descriptors of the plan must be open.
unsafe fn confine(plan: &Plan) -> Done<Infallible> {
    // SAFETY: the caller vouches that this process may be changed, and for the descriptors.
    unsafe {
        empty_bounding_set()?;
        change_root()?;
        let executable = arrange_descriptors(plan)?;
        set_limits()?;
        call(Step::Session, libc::SYS_setsid, [])?;
        take_identity(plan.uid)?;
        give_up_privileges()?;
        reset_signals()?;
        execute(executable)
    }
}

/// One system call. Not the C library's wrappers: some of them (`setresuid`) act on all threads of the process that the
/// C library knows, which here are the parent's.
///
/// # Safety
/// As the system call's.
unsafe fn call<const N: usize>(step: Step, number: c_long, arguments: [usize; N]) -> Done<usize> {
    let mut all = [0; 5];
    let mut index = 0;
    while index < N && index < all.len() {
        all[index] = arguments[index];
        index += 1;
    }
    // SAFETY: the caller vouches for number and arguments.
    let result = unsafe { libc::syscall(number, all[0], all[1], all[2], all[3], all[4]) };
    if result < 0 {
        // SAFETY: the thread's `errno`, which it shares with the parent's suspended thread.
        return Err((step, unsafe { *libc::__errno_location() }));
    }
    Ok(result as usize)
}

unsafe fn empty_bounding_set() -> Done<()> {
    // The kernel refuses the first number beyond the capabilities that it knows; there are at most 64.
    for capability in 0..64 {
        // SAFETY: numbers only.
        match unsafe {
            call(
                Step::BoundingSet,
                libc::SYS_prctl,
                [libc::PR_CAPBSET_DROP as usize, capability, 0, 0, 0],
            )
        } {
            Ok(_) => {}
            Err((_, libc::EINVAL)) if capability > 0 => break,
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}

unsafe fn change_root() -> Done<()> {
    let private = (libc::MS_REC | libc::MS_PRIVATE) as usize;
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let tmpfs = c"tmpfs".as_ptr() as usize;
    let here = c".".as_ptr() as usize;
    // SAFETY: the pointers are to constant strings.
    unsafe {
        call(
            Step::PrivateMounts,
            libc::SYS_mount,
            [0, c"/".as_ptr() as usize, 0, private, 0],
        )?;
        call(
            Step::MountRoot,
            libc::SYS_mount,
            [
                tmpfs,
                MOUNT_POINT.as_ptr() as usize,
                tmpfs,
                flags as usize,
                ROOT_OPTIONS.as_ptr() as usize,
            ],
        )?;
        call(
            Step::PivotRoot,
            libc::SYS_chdir,
            [MOUNT_POINT.as_ptr() as usize],
        )?;
        // With both arguments the same, the old root ends up on top of the new one, from where it is detached.
        call(Step::PivotRoot, libc::SYS_pivot_root, [here, here])?;
        call(
            Step::DetachHost,
            libc::SYS_umount2,
            [here, libc::MNT_DETACH as usize],
        )?;
    }
    Ok(())
}

/// Returns the number that the executable has now.
unsafe fn arrange_descriptors(plan: &Plan) -> Done<usize> {
    let step = Step::Descriptors;
    let control = CONTROL_DESCRIPTOR as usize;
    // SAFETY: numbers only; the descriptors are this process's own copies.
    unsafe {
        // First out of the way of the numbers that are to be filled, whichever numbers the shim happened to get.
        let above = |descriptor| {
            call(
                step,
                libc::SYS_fcntl,
                [descriptor as usize, libc::F_DUPFD as usize, control + 1],
            )
        };
        let executable = above(plan.executable)?;
        let null = above(plan.null)?;
        let socket = above(plan.control)?;
        for standard in 0..3 {
            call(step, libc::SYS_dup2, [null, standard])?;
        }
        call(step, libc::SYS_dup2, [socket, control])?;
        // Closed by the execution.
        call(
            step,
            libc::SYS_close_range,
            [
                control + 1,
                u32::MAX as usize,
                libc::CLOSE_RANGE_CLOEXEC as usize,
            ],
        )?;
        Ok(executable)
    }
}

unsafe fn set_limits() -> Done<()> {
    for (resource, value) in LIMITS {
        let limit = libc::rlimit64 {
            rlim_cur: value,
            rlim_max: value,
        };
        // SAFETY: `limit` is what the call reads, and it writes nothing.
        unsafe {
            call(
                Step::Limits,
                libc::SYS_prlimit64,
                [0, resource as usize, ptr::from_ref(&limit) as usize, 0],
            )?;
        }
    }
    Ok(())
}

unsafe fn take_identity(uid: u32) -> Done<()> {
    let id = uid as usize;
    // SAFETY: numbers only, and an empty list.
    unsafe {
        call(Step::Identity, libc::SYS_setgroups, [0, 0])?;
        call(Step::Identity, libc::SYS_setresgid, [id, id, id])?;
        call(Step::Identity, libc::SYS_setresuid, [id, id, id])?;
    }
    Ok(())
}

/// The kernel's `struct __user_cap_header_struct`.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 capabilities in each of three sets.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

unsafe fn give_up_privileges() -> Done<()> {
    let header = CapabilityHeader {
        version: CAPABILITY_VERSION,
        pid: 0,
    };
    let none = [0u32; 6];
    let prctl = libc::SYS_prctl;
    // SAFETY: header and sets are laid out as version 3 of the call reads them.
    unsafe {
        // The change of user emptied permitted, effective and ambient set; the inheritable set it left.
        call(
            Step::Capabilities,
            libc::SYS_capset,
            [ptr::from_ref(&header) as usize, none.as_ptr() as usize],
        )?;
        call(
            Step::NoNewPrivileges,
            prctl,
            [libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0, 0, 0],
        )?;
        // After the change of user, which would have cleared it.
        call(
            Step::ParentDeathSignal,
            prctl,
            [libc::PR_SET_PDEATHSIG as usize, libc::SIGKILL as usize],
        )?;
    }
    Ok(())
}

/// The kernel's `struct sigaction`, which is not the C library's.
#[repr(C)]
struct KernelSigaction {
    handler: usize,
    flags: usize,
    restorer: usize,
    mask: u64,
}

unsafe fn reset_signals() -> Done<()> {
    let default = KernelSigaction {
        handler: libc::SIG_DFL,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
    let size = size_of::<u64>();
    let unblocked = 0u64;
    // SAFETY: both structures are laid out as the kernel reads them. The handlers are this process's own copy
    // (no CLONE_SIGHAND), and none of the parent's is left when signals are unblocked.
    unsafe {
        // All of them: execution resets handlers, but ignored signals stay ignored.
        for signal in 1..=LAST_SIGNAL {
            if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                call(
                    Step::Signals,
                    libc::SYS_rt_sigaction,
                    [signal as usize, ptr::from_ref(&default) as usize, 0, size],
                )?;
            }
        }
        call(
            Step::Signals,
            libc::SYS_rt_sigprocmask,
            [
                libc::SIG_SETMASK as usize,
                ptr::from_ref(&unblocked) as usize,
                0,
                size,
            ],
        )?;
    }
    Ok(())
}

unsafe fn execute(executable: usize) -> Done<Infallible> {
    let arguments = [c"bulkhead-vmm".as_ptr(), ptr::null()];
    let environment: [*const i8; 1] = [ptr::null()];
    // SAFETY: both lists end with a null pointer and hold constant strings.
    unsafe {
        call(
            Step::Execute,
            libc::SYS_execveat,
            [
                executable,
                c"".as_ptr() as usize,
                arguments.as_ptr() as usize,
                environment.as_ptr() as usize,
                libc::AT_EMPTY_PATH as usize,
            ],
        )?;
    }
    Err((Step::Execute, libc::EINVAL))
}
