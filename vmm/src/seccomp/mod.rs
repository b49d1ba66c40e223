//! System call filters: what each kind of thread may still ask of the host's kernel once the guest runs.
//!
//! A filter lists what its threads need, with the arguments that matter; anything else kills the process. None may open,
//! connect, execute, or map memory executable. A filter that cannot be made or installed ends the machine.
//!
//! A thread inherits the filter of the thread that starts it and then adds its own. Threads are started by the main
//! thread alone, so the main thread's filter allows what every other kind of thread needs to start and to run.

mod bpf;
mod rules;

use std::io;
use std::ptr;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use libc::{sock_filter, sock_fprog};
use nix::errno::Errno;

use rules::{BLOCK, COMMON, Call, MAIN, NET, START, VCPU};

/// The stack of a thread, in bytes. None calls deep; and a stack of 2 MiB may by chance be one large page, which costs as much
/// as the rest of the process.
const STACK: usize = 256 << 10;

/// The kinds of threads, each with a filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// The event loop: control socket, vsock, start of further threads.
    Main,
    /// A virtual processor: KVM_RUN, and the device accesses that leave it.
    Vcpu,
    /// A block device's worker: reads and writes of its disk.
    Block,
    /// A network device's worker: reads and writes of its tap.
    Net,
}

/// Why a thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot compile the seccomp filter of {kind:?} threads: {source}")]
    Compile {
        kind: ThreadKind,
        source: bpf::TooLong,
    },
    #[error("cannot install the seccomp filter of {kind:?} threads: {source}")]
    Install { kind: ThreadKind, source: Errno },
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
    let thread = Builder::new().name(name).stack_size(STACK).spawn(move || {
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
    program: Vec<sock_filter>,
}

impl Filter {
    /// Compiles the filter of one kind of thread.
    ///
    /// # Errors
    ///
    /// The tables in [`rules`] make it too long.
    pub fn compile(kind: ThreadKind) -> Result<Self, Error> {
        let tables: &[&[Call]] = match kind {
            ThreadKind::Main => &[COMMON, START, BLOCK, NET, MAIN],
            ThreadKind::Vcpu => &[COMMON, VCPU],
            ThreadKind::Block => &[COMMON, BLOCK],
            ThreadKind::Net => &[COMMON, NET],
        };
        let program = bpf::program(tables).map_err(|source| Error::Compile { kind, source })?;
        Ok(Self { kind, program })
    }

    /// Confines the calling thread, and the threads that it starts from now on.
    ///
    /// # Errors
    ///
    /// The kernel refuses the filter.
    pub fn install(&self) -> Result<(), Error> {
        let kind = self.kind;
        let refused = |source| Error::Install { kind, source };
        nix::sys::prctl::set_no_new_privs().map_err(refused)?;
        let program = sock_fprog {
            // No program is that long: `bpf::TooLong` tells why.
            len: self.program.len() as u16,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the program and its length belong together, and the kernel copies it before the call returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                0,
                ptr::from_ref(&program),
            )
        };
        Errno::result(result).map(drop).map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::rules::{KVM_RUN, THREAD_FLAGS};
    use super::*;
    use crate::testing::allocate_without_files;

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

    const KINDS: [ThreadKind; 4] = [
        ThreadKind::Main,
        ThreadKind::Vcpu,
        ThreadKind::Block,
        ThreadKind::Net,
    ];

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
            (libc::SYS_ioctl, [0, libc::TUNSETIFF, 0, 0, 0, 0]),
            (libc::SYS_ioctl, [0, libc::TUNSETPERSIST, 0, 0, 0, 0]),
            (libc::SYS_ioctl, [0, libc::TUNATTACHFILTER, 0, 0, 0, 0]),
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
    fn only_network_threads_and_main_change_a_tap() {
        for request in [libc::TUNSETOFFLOAD, libc::TUNSETQUEUE] {
            for kind in KINDS {
                let arguments = [u64::MAX, request, 0, 0, 0, 0];
                let status = confined(kind, libc::SYS_ioctl, arguments);
                let refused = !matches!(kind, ThreadKind::Main | ThreadKind::Net);
                assert_eq!(is_killed(status), refused, "{kind:?}: {status:?}");
            }
        }
    }

    #[test]
    fn a_confined_main_thread_starts_confined_workers() {
        allocate_without_files();
        let (sender, receiver) = mpsc::channel();
        let main = std::thread::spawn(|| {
            Filter::compile(ThreadKind::Main)
                .unwrap()
                .install()
                .unwrap();
            let body = move || sender.send(vec![1u8; 1 << 20].len()).unwrap();
            for kind in [ThreadKind::Block, ThreadKind::Net] {
                let body = body.clone();
                spawn(kind, "worker".into(), body).unwrap().join().unwrap();
            }
        });
        main.join().unwrap();
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [1 << 20; 2]);
    }
}
