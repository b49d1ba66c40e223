//! Starts the VMM in its jail. This is code of the shim: the VMM itself finds everything done.
//!
//! The process that comes out has
//! * mount, PID, network, IPC, UTS and cgroup namespaces of its own;
//! * an empty, read-only root without devices, set-user-ID files or executables;
//! * a user and a group that no other process has, no other group, and no capability in any set;
//! * `no_new_privs`, limits on descriptors and threads, no core dump, no environment;
//! * `/dev/null` as standard streams, the control socket ([`crate::control`]) as descriptor 3, and no other descriptor;
//! * a session of its own, the default signal dispositions, and no blocked signal.
//!
//! What it must do itself, because execution resets it: make itself not dumpable, and install its seccomp filters.
//!
//! It is in the cgroups of the thread that launches it from its first instruction on. Each step is fatal: a VMM with a
//! weaker jail is never executed. A start costs 12 system calls in the shim and about 130 in the child, most of which
//! reset signals and empty the bounding set.

mod jail;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

use crate::control::{self, Channel};
pub use jail::Step;
use jail::{NAMESPACES, Plan};

/// Default first user (and group) of the range that [`unique_uid`] chooses from: the start of the range that systemd's
/// allocation of user identifiers, and the usual subordinate ranges, leave unused.
pub const DEFAULT_UID_BASE: u32 = 0x7000_0000;

/// Number of identifiers in the range: the kernel's greatest `pid_max`.
pub const UID_RANGE: u32 = 1 << 22;

/// Bytes of stack for the child. It calls nothing deep.
const STACK: usize = 64 * 1024;

/// Why no VMM was started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The executable cannot be opened.
    #[error("cannot open the VMM {}: {source}; install it there, or set `vmm` in the configuration", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// The user identifier is none that the VMM may have.
    #[error(
        "the VMM cannot have user {uid}: it must be an unprivileged one; set `uid_base` in the configuration to a free range of {UID_RANGE}"
    )]
    Uid { uid: u32 },
    /// Something small failed in the shim.
    #[error("{operation} for the VMM failed: {source}")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
    /// The control socket could not be made.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// The process could not be created in its namespaces.
    #[error("cannot create a process with mount, PID, network, IPC, UTS and cgroup namespaces of its own: {source}; {}", clone_remedy(.source))]
    Namespaces { source: io::Error },
    /// The process could not confine itself, and the VMM was not executed.
    #[error("the VMM was not started, {} failed: {source}; {}", step.describe(), step.remedy())]
    Jail { step: Step, source: io::Error },
}

fn clone_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => {
            "the shim must run as root of the host, with CAP_SYS_ADMIN and without a security profile that forbids namespaces"
        }
        Some(libc::EINVAL) => "the kernel lacks one of them",
        Some(libc::ENOSPC) => "raise the limits in /proc/sys/user/max_*_namespaces",
        Some(libc::EAGAIN) => {
            "raise the limit on processes (pids.max of the cgroup, kernel.pid_max, kernel.threads-max)"
        }
        _ => "`bulkhead check` tells whether this host is fit",
    }
}

/// A user and group identifier for one machine: `base` plus this process's identifier.
///
/// Unique without a registry: no two live processes have the same process identifier, a shim runs one machine, and the
/// machine's processes end before their shim is reaped. (Shims in different PID namespaces of one host need different bases.)
pub fn unique_uid(base: u32) -> Result<u32, Error> {
    // Linux itself bounds process identifiers by UID_RANGE.
    let uid = base.saturating_add(std::process::id());
    check_uid(uid)
}

/// Refuses root, and the number that means "leave as it is" to setresuid(2).
fn check_uid(uid: u32) -> Result<u32, Error> {
    match uid {
        0 | u32::MAX => Err(Error::Uid { uid }),
        _ => Ok(uid),
    }
}

/// How a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(Signal),
    /// Something else in the shim reaped it.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exited with code {code}"),
            Self::Signal(signal) => write!(formatter, "was killed by {signal}"),
            Self::Unknown => write!(formatter, "ended"),
        }
    }
}

/// A running VMM process. Dropping it kills and reaps the process, and waits for that.
#[derive(Debug)]
pub struct Vmm {
    pid: u32,
    process: OwnedFd,
    exit: Option<Exit>,
}

/// Starts the VMM `executable` with `uid` as its user and group. Returns the process and the shim's end of its control
/// socket when the VMM has been executed; on failure nothing is left.
///
/// The process is killed when the calling *thread* ends: call this on a thread that lives as long as the machine (the
/// main thread or a runtime's worker, never a pool for blocking work). That is the second guard: the first is
/// the control socket, with whose end the VMM ends.
pub fn launch(executable: &Path, uid: u32) -> Result<(Vmm, Channel), Error> {
    check_uid(uid)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(executable)
        .map_err(|source| Error::Open {
            path: executable.to_owned(),
            source,
        })?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(io_error("opening /dev/null"))?;
    let (ours, theirs) = Channel::pair()?;
    let plan = Plan::new(file.as_raw_fd(), null.as_raw_fd(), theirs.as_raw_fd(), uid);
    let mut vmm = spawn(&plan)?;
    if let Some((step, errno)) = plan.failure() {
        return Err(Error::Jail {
            step,
            source: io::Error::from_raw_os_error(errno),
        });
    }
    vmm.reset_oom_score()?;
    Ok((vmm, ours))
}

/// Creates the child, and returns when it has executed or exited.
fn spawn(plan: &Plan) -> Result<Vmm, Error> {
    let mut stack = Box::<[u128]>::new_uninit_slice(STACK / size_of::<u128>());
    let top: *mut MaybeUninit<u128> = stack.as_mut_ptr_range().end;
    let mut process = -1;
    // No handler of the shim may run in the child, which shares the shim's memory.
    let before = SigSet::all()
        .thread_swap_mask(SigmaskHow::SIG_SETMASK)
        .map_err(|errno| io_error("blocking signals")(errno.into()))?;
    let flags = NAMESPACES | libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: the child runs `jail::enter` on a stack of its own, which like the plan outlives it in this process, because
    // CLONE_VFORK suspends this thread until then. `enter` reads the plan and changes it through atomics only.
    let pid = unsafe {
        libc::clone(
            jail::enter,
            top.cast(),
            flags,
            ptr::from_ref(plan).cast_mut().cast(),
            ptr::from_mut(&mut process),
        )
    };
    let created = Errno::result(pid).map(|pid| Vmm {
        pid: pid.unsigned_abs(),
        // SAFETY: the kernel has just made this descriptor (CLONE_PIDFD), close-on-exec, and nobody else knows it.
        process: unsafe { OwnedFd::from_raw_fd(process) },
        exit: None,
    });
    before
        .thread_set_mask()
        .map_err(|errno| io_error("unblocking signals")(errno.into()))?;
    created.map_err(|errno| Error::Namespaces {
        source: errno.into(),
    })
}

impl Vmm {
    /// Its process identifier, in the shim's PID namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills it with SIGKILL. It is not an error if it has ended.
    pub fn kill(&self) -> io::Result<()> {
        // SAFETY: numbers and a null pointer; the descriptor is open.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.process.as_raw_fd(),
                libc::SIGKILL,
                ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reaps it if it has ended, and says how it ended; `None` while it runs. Its descriptor ([`AsFd`]) is readable from
    /// the moment it has ended.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        self.wait_with(WaitPidFlag::WNOHANG)
    }

    fn wait_with(&mut self, flags: WaitPidFlag) -> io::Result<Option<Exit>> {
        if self.exit.is_none() {
            let status = loop {
                match waitid(
                    Id::PIDFd(self.process.as_fd()),
                    WaitPidFlag::WEXITED | flags,
                ) {
                    Err(Errno::EINTR) => continue,
                    result => break result,
                }
            };
            self.exit = match status {
                Ok(WaitStatus::Exited(_, code)) => Some(Exit::Code(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(Exit::Signal(signal)),
                Ok(WaitStatus::StillAlive) => None,
                Ok(_) | Err(Errno::ECHILD) => Some(Exit::Unknown),
                Err(errno) => return Err(errno.into()),
            };
        }
        Ok(self.exit)
    }

    /// containerd protects its shims from the kernel's out-of-memory killer; the machine is to be an ordinary process.
    fn reset_oom_score(&mut self) -> Result<(), Error> {
        let written = File::options()
            .write(true)
            .open(format!("/proc/{}/oom_score_adj", self.pid))
            .and_then(|mut file| file.write_all(b"0"));
        written.map_err(io_error("resetting the out-of-memory score"))
    }
}

impl AsFd for Vmm {
    /// The process descriptor (pidfd).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

impl AsRawFd for Vmm {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.process.as_raw_fd()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Neither can fail on a child of ours, and there is nobody to tell.
        if self.exit.is_none() && self.kill().is_ok() {
            let _ = self.wait_with(WaitPidFlag::empty());
        }
    }
}

fn io_error(operation: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { operation, source }
}
