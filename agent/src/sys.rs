//! The system calls that no library wraps, each behind a safe function.

use std::ffi::{CStr, CString, c_int, c_void};
use std::io;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `clone(2)` flags that both `clone3` and `unshare` take.
pub use libc::{
    CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER,
    CLONE_NEWUTS,
};

/// Not among libc's constants for this target: `linux/sched.h`.
pub const CLONE_NEWTIME: c_int = 0x80;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a descriptor, which must be non-blocking, usable by asynchronous code.
pub fn asynchronous(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, and the same, until the AsyncFd that now owns it gives it back.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest) }?)
}

/// The two sides of a successful [`fork_into`].
#[derive(Debug)]
pub enum Fork {
    /// This is the new process.
    Child,
    /// This is the caller; the new process's number, and a descriptor for it.
    Parent(Pid, OwnedFd),
}

/// Starts a copy of this process in new namespaces (`CLONE_NEW*`) and, if given, in a cgroup; SIGCHLD tells its end.
///
/// The copy has everything that the caller has, so it may do whatever the caller could do, allocation included, but only because
/// no other thread exists whose locks it could have copied in their locked state: with a second thread this is an error.
pub fn fork_into(namespaces: c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    // A directory has a link for itself, one in its parent, and one for each subdirectory: here, each thread.
    let threads = rustix::fs::stat("/proc/self/task")?
        .st_nlink
        .saturating_sub(2);
    if threads != 1 {
        return Err(io::Error::other(format!(
            "a process with {threads} threads cannot be copied safely"
        )));
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is a C structure of integers, for which zero is a valid value that means "not used".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = namespaces as u32 as u64 | libc::CLONE_PIDFD as u64;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the copy has its own memory, so this is fork(2); that no other thread exists was checked
    // above; `arguments` and `pidfd` outlive the call.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    })?;
    match Pid::from_raw(pid as i32) {
        None => Ok(Fork::Child),
        Some(pid) => {
            // SAFETY: CLONE_PIDFD has made this descriptor for us.
            Ok(Fork::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
        }
    }
}

/// Starts a process that does what may take long and ends. Of the caller's descriptors it keeps only the standard streams, because
/// the other end of a stream waits until nobody has it.
pub fn start_helper(work: impl FnOnce()) -> io::Result<OwnedFd> {
    match fork_into(0, None)? {
        Fork::Parent(_, descriptor) => Ok(descriptor),
        Fork::Child => {
            // If it failed, others would wait until the work is done. That it is not done is worse.
            drop(close_copies(&[]));
            work();
            exit(0)
        }
    }
}

/// Closes, in a copy of a process, every descriptor from 3 on but these. For a copy that uses and drops none of the others any more: as
/// long as it has them, whoever is at their other ends waits.
pub fn close_copies(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let close = |first: RawFd, last: RawFd| {
        if first > last {
            return Ok(());
        }
        // SAFETY: no memory is involved. What owns these descriptors is a copy, too, in a process without another thread, which
        // uses and drops none of it: it executes a program or ends.
        let closed = unsafe { libc::close_range(first as libc::c_uint, last as libc::c_uint, 0) };
        check(closed.into()).map(drop)
    };
    let mut kept: Vec<RawFd> = kept.iter().map(|kept| kept.as_raw_fd()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for kept in kept.into_iter().filter(|&kept| kept >= 3) {
        close(first, kept - 1)?;
        first = kept + 1;
    }
    close(first, RawFd::MAX)
}

/// From `linux/sched.h`; libc has it with a type that overflows.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Ends the calling process, a copy of another, without running what belongs to the other's end.
pub fn exit(code: c_int) -> ! {
    // SAFETY: nothing is run and nothing is used after it.
    unsafe { libc::_exit(code) }
}

/// Moves the calling process into new namespaces (`CLONE_NEW*` only).
pub fn unshare(namespaces: c_int) -> io::Result<()> {
    // SAFETY: only namespaces are unshared, never the descriptor table or the memory.
    check(unsafe { libc::unshare(namespaces) }.into()).map(drop)
}

/// Moves the calling process into a namespace (`fd` of `/proc/PID/ns/*`), or into several of another process (`fd` a pidfd).
pub fn setns(fd: BorrowedFd<'_>, namespaces: c_int) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::setns(fd.as_raw_fd(), namespaces) }.into()).map(drop)
}

/// The attributes that [`mount_setattr`] sets and clears (`MOUNT_ATTR_*`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MountAttributes {
    pub set: u64,
    pub clear: u64,
}

/// `mount_setattr(2)` on the mount that `mount` refers to, and with `recursive` on all below it.
pub fn mount_setattr(
    mount: BorrowedFd<'_>,
    attributes: MountAttributes,
    recursive: bool,
) -> io::Result<()> {
    let arguments = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: 0,
        userns_fd: 0,
    };
    change_mount(mount, &arguments, recursive)
}

/// Maps the identities of a mount, and with `recursive` of all below it, as a user namespace does.
pub fn map_mount(
    mount: BorrowedFd<'_>,
    user_namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let arguments = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: user_namespace.as_raw_fd() as u64,
    };
    change_mount(mount, &arguments, recursive)
}

fn change_mount(
    mount: BorrowedFd<'_>,
    arguments: &libc::mount_attr,
    recursive: bool,
) -> io::Result<()> {
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, the structure is of the size that is passed, and both outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const *arguments,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// Gives the process the session keyring of this name, which is made if nobody of its user has; a kernel without keys has nothing to
/// separate.
pub fn join_session_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    const KEYCTL_SETPERM: c_int = 5;
    // The possessor may do everything; its user may view, read and link, as with any such keyring, and search, to join by name.
    const PERMISSIONS: u32 = 0x3f1b_0000;
    // SAFETY: the name is a C string that outlives the call.
    let result = check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr())
    });
    let keyring = match result {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return Ok(()),
        other => other?,
    };
    // SAFETY: no memory is involved.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, keyring, PERMISSIONS) })
        .map(drop)
}

/// Installs a seccomp filter with `SECCOMP_FILTER_FLAG_*` flags for the calling process.
pub fn load_seccomp(filter: &[libc::sock_filter], flags: u32) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program's length is the slice's, the kernel only reads it, and both outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })
    .map(drop)
}

/// Replaces the calling process's program. Returns only on failure.
pub fn execve(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        let terminated = strings.iter().map(|string| string.as_ptr());
        terminated.chain([std::ptr::null()]).collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both are arrays of C strings, terminated by a null pointer, and outlive the call.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Unblocks all signals and gives them their default actions, as a program expects to find them.
pub fn reset_signals() -> io::Result<()> {
    // SAFETY: an empty set is initialised before it is used; SIG_DFL is a valid action for SIGPIPE, the only signal that the
    // runtime library ignores; nothing in this process catches a signal.
    unsafe {
        let mut empty = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(empty.as_mut_ptr());
        check(libc::sigprocmask(libc::SIG_SETMASK, empty.as_ptr(), std::ptr::null_mut()).into())?;
        if libc::signal(libc::SIGPIPE, libc::SIG_DFL) == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Blocks SIGCHLD and returns a non-blocking descriptor that becomes readable when one is pending.
pub fn child_signal() -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: the set is initialised by sigemptyset before anything reads it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()).into())?;
        owned(libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into())
    }
}

/// Sends a signal, of whichever number, to the process that a pidfd refers to.
pub fn send_signal(process: BorrowedFd<'_>, signal: c_int) -> io::Result<()> {
    let information: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: no information is passed, so the kernel makes it up as kill(2) does.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            information,
            0,
        )
    })
    .map(drop)
}

/// Sends a signal, of whichever number, to a process.
pub fn send_signal_to(pid: u32, signal: c_int) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).ok().filter(|&pid| pid > 0);
    let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: no memory is involved.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Has the pages of a file that another process (a pidfd) maps at these addresses read, on the calling process's account.
pub fn read_ahead(process: BorrowedFd<'_>, addresses: Range<u64>) -> io::Result<()> {
    let range = libc::iovec {
        iov_base: addresses.start as *mut c_void,
        iov_len: addresses.end.saturating_sub(addresses.start) as usize,
    };
    // SAFETY: the addresses are the other process's, whose memory is not changed by this advice; the vector outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_raw_fd(),
            &raw const range,
            1,
            libc::MADV_WILLNEED,
            0,
        )
    })
    .map(drop)
}

/// Sets the calling process's execution domain and flags, `personality(2)`.
pub fn personality(persona: u32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::personality(persona.into()) }.into()).map(drop)
}

/// Sets the calling process's I/O priority: `class` as in `linux/ioprio.h`, `level` 0 to 7.
pub fn set_io_priority(class: u8, level: u8) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    let priority = c_int::from(class) << 13 | c_int::from(level);
    // SAFETY: no memory is involved.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) }).map(drop)
}

/// The arguments of `sched_setattr(2)`, times in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedulerAttributes {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// Sets the calling process's scheduling policy.
pub fn set_scheduler(mut attributes: SchedulerAttributes) -> io::Result<()> {
    attributes.size = size_of::<SchedulerAttributes>() as u32;
    // SAFETY: the structure is of the size that it names (SCHED_ATTR_SIZE_VER0) and outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) }).map(drop)
}

/// Brings the loopback interface of the calling process's network namespace up.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: ifreq is a C structure of integers and arrays, for which zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq whose name is terminated; it outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())
        .map(drop)
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is a C structure of integers and arrays, for which zero is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const VSOCK_ADDRESS_SIZE: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// A non-blocking vsock stream socket bound to a port of this machine.
pub fn vsock_bound(port: u32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is involved.
    let socket = owned(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) }.into())?;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    check(
        // SAFETY: the address is of the size that is passed and outlives the call.
        unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                VSOCK_ADDRESS_SIZE,
            )
        }
        .into(),
    )?;
    Ok(socket)
}

/// Begins to connect a vsock socket; `EINPROGRESS` is success.
pub fn vsock_connect(socket: BorrowedFd<'_>, cid: u32, port: u32) -> io::Result<()> {
    let address = vsock_address(cid, port);
    let result = check(
        // SAFETY: the address is of the size that is passed and outlives the call.
        unsafe {
            libc::connect(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                VSOCK_ADDRESS_SIZE,
            )
        }
        .into(),
    );
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        other => other.map(drop),
    }
}

/// Accepts a connection (non-blocking, close-on-exec) on a listening vsock socket, with its peer's context identifier.
pub fn vsock_accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)> {
    let mut address = vsock_address(0, 0);
    let mut size = VSOCK_ADDRESS_SIZE;
    let socket = owned(
        // SAFETY: the address is of the size that is passed, and both outlive the call.
        unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                (&raw mut address).cast(),
                &raw mut size,
                libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            )
        }
        .into(),
    )?;
    Ok((socket, address.svm_cid))
}

/// Loads an eBPF program of type `BPF_PROG_TYPE_CGROUP_DEVICE`, given as its instructions' encoding.
pub fn load_device_program(instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        program_type: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
    }
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let load = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the structure is a prefix of bpf_attr of the size that is passed; the instructions, whose number it holds, and the
    // licence's C string outlive the call.
    owned(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of::<Load>(),
        )
    })
}

/// Attaches a device program to a cgroup, in place of `previous` if given.
pub fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    previous: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
        replaced: u32,
    }
    const BPF_PROG_ATTACH: c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 1 << 1;
    const BPF_F_REPLACE: u32 = 1 << 2;
    let attach = Attach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI | previous.map_or(0, |_| BPF_F_REPLACE),
        replaced: previous.map_or(0, |previous| previous.as_raw_fd() as u32),
    };
    // SAFETY: the structure is a prefix of bpf_attr of the size that is passed and outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    })
    .map(drop)
}

/// Adds bytes to the kernel's entropy pool and credits them in full.
pub fn add_entropy(random: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut pool = Vec::with_capacity(bytes.len() + 8);
    pool.extend_from_slice(&length.saturating_mul(8).to_ne_bytes());
    pool.extend_from_slice(&length.to_ne_bytes());
    pool.extend_from_slice(bytes);
    // SAFETY: rand_pool_info is two integers, the number of bits and of bytes, and then as many bytes; the vector outlives the call.
    check(unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RNDADDENTROPY, pool.as_ptr()) }.into())
        .map(drop)
}
