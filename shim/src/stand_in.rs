//! The process of the host that stands for a process of the guest.
//!
//! Tools take a task's number for that of a process: they look at its `/proc/PID/ns/net`, they send it a signal, they wait for its
//! end. A stand-in is there for them. It is in the network namespace of its container and in the control group of the pod, it lives exactly as
//! long as what it stands for, and it does nothing but tell the shim of the signals that it is sent. It sees no files: who takes
//! `/proc/PID/root` for the container's root, as `nerdctl cp` does, must not read and write the host's.
//!
//! It shares the shim's memory and descriptors, so that making one copies nothing, and no file that the shim closes stays open for
//! its sake. It dies with the shim.

use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{chdir, pivot_root};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{Signal, getppid, pidfd_send_signal, set_parent_process_death_signal};
use rustix::thread::{
    LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_name, unshare_unsafe,
};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::signal::unix::{self, SignalKind};

use crate::readiness::register;

/// The stack of a stand-in, in bytes: it makes system calls, and no more.
const STACK: usize = 16 << 10;

/// The longest name that a process has (`TASK_COMM_LEN`), in bytes.
const MAX_NAME: usize = 15;

/// The length of what a signalfd gives for one signal (`struct signalfd_siginfo`), in bytes. The signal's number comes first.
const SIGNAL_INFO: usize = 128;

/// Which network namespace a stand-in is in.
#[derive(Debug, Clone, Copy)]
pub enum Network<'fd> {
    /// A new one.
    New,
    /// This one.
    Join(BorrowedFd<'fd>),
}

/// The signals that the stand-ins of a shim are sent.
#[derive(Debug)]
pub struct Signals(pipe::Receiver);

/// How the stand-ins of a shim get their signals, where they tell of them, and where they are meanwhile.
#[derive(Debug)]
pub struct Mailbox {
    /// A mount namespace without files.
    nowhere: OwnedFd,
    /// Counts the stand-ins that have arrived there.
    arrived: OwnedFd,
    /// Shows whoever reads it the signals that are pending for itself.
    pending: SignalFd,
    writer: OwnedFd,
}

/// A way for signals from stand-ins to the shim. Needs the runtime of tokio.
pub fn signals() -> io::Result<(Mailbox, Signals)> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // A stand-in waits while the pipe is full; the shim does not wait while it is empty.
    nix::fcntl::fcntl(
        &reader,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
    )?;
    let pending = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC)?;
    let signals = Signals(pipe::Receiver::from_owned_fd_unchecked(reader)?);
    let mailbox = Mailbox {
        nowhere: nowhere()?,
        arrived: eventfd(0, EventfdFlags::CLOEXEC)?,
        pending,
        writer,
    };
    Ok((mailbox, signals))
}

/// Makes a mount namespace whose root is an empty directory that nobody can write to.
fn nowhere() -> io::Result<OwnedFd> {
    // A namespace is left only by entering another, which would take the thread's root and working directory, too.
    let thread = std::thread::spawn(|| {
        // SAFETY: of what the threads share, this one gets its own root and working directory, which it alone uses; descriptors stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        let namespace = File::open("/proc/thread-self/ns/mnt")?;
        let (none, strict) = (
            None::<&str>,
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        );
        // What is unmounted here stays where it is elsewhere.
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(
            Some("tmpfs"),
            "/proc",
            Some("tmpfs"),
            strict | MsFlags::MS_RDONLY,
            none,
        )?;
        chdir("/proc")?;
        pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        Ok(namespace.into())
    });
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")))
}

impl Signals {
    /// The number of a stand-in, and the signal that it was sent.
    pub async fn next(&mut self) -> io::Result<(u32, u32)> {
        // The two are written at once.
        Ok((self.0.read_u32_le().await?, self.0.read_u32_le().await?))
    }
}

/// The stand-ins that somebody stops. A signal that stops is none that a process is told of; its parent is.
#[derive(Debug)]
pub struct Stops(unix::Signal);

impl Stops {
    /// Listens. Needs the runtime of tokio.
    pub fn new() -> io::Result<Self> {
        unix::signal(SignalKind::child()).map(Self)
    }

    /// The number of the next one, or of another child of the shim's.
    pub async fn next(&mut self) -> u32 {
        // Only those that are stopped: whoever has made a child waits for its end.
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
        loop {
            if let Ok(WaitStatus::Stopped(pid, _)) = waitid(Id::All, flags) {
                return pid.as_raw().unsigned_abs();
            }
            // One may stand for several.
            self.0.recv().await;
        }
    }
}

/// A stand-in. Dropping it ends the process, and waits until it is gone.
pub struct StandIn {
    pid: u32,
    /// Can be read once the process has ended.
    process: OwnedFd,
    _own: Box<Own>,
}

/// What belongs to the process, in memory that stays where it is for as long as the process lives.
#[repr(C, align(16))]
struct Own {
    stack: [MaybeUninit<u8>; STACK],
    name: CString,
    shim: u32,
    mailbox: Arc<Mailbox>,
}

impl fmt::Debug for StandIn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "StandIn({})", self.pid)
    }
}

impl StandIn {
    /// Makes a stand-in with a name. It dies with the calling thread, the only one that makes any: arrivals are not told apart.
    pub fn new(name: &str, network: Network<'_>, mailbox: &Arc<Mailbox>) -> io::Result<Self> {
        let name = name.bytes().filter(|byte| *byte != 0).take(MAX_NAME);
        let mut own = Box::new(Own {
            stack: [MaybeUninit::uninit(); STACK],
            name: CString::new(name.collect::<Vec<_>>())?,
            shim: std::process::id(),
            mailbox: Arc::clone(mailbox),
        });
        let mut clone = || clone(&mut own, matches!(network, Network::New));
        let (pid, process) = match network {
            Network::New => clone()?,
            Network::Join(target) => in_network(target, clone)??,
        };
        let stand_in = Self {
            pid,
            process,
            _own: own,
        };
        stand_in.wait_for_arrival(&mailbox.arrived)?;
        Ok(stand_in)
    }

    /// Waits until it has left the host's files, which is before anybody knows its number.
    fn wait_for_arrival(&self, arrived: &OwnedFd) -> io::Result<()> {
        let mut either = [arrived, &self.process].map(|file| PollFd::new(file, PollFlags::IN));
        rustix::io::retry_on_intr(|| poll(&mut either, None))?;
        if either[0].revents().is_empty() {
            return Err(io::Error::other("it cannot leave the host's files"));
        }
        rustix::io::read(arrived, &mut [0; 8])?;
        Ok(())
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its network namespace.
    pub fn network(&self) -> io::Result<OwnedFd> {
        Ok(File::open(format!("/proc/{}/ns/net", self.pid))?.into())
    }

    /// Waits until somebody has killed it, or it is dropped. Needs the runtime of tokio.
    pub fn ended(&self) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        let process = register(self.process.try_clone()?, Interest::READABLE)?;
        Ok(async move {
            // It fails when the runtime ends, and then so does everything.
            let _ = process.readable().await;
        })
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let process = self.process.as_raw_fd() as libc::id_t;
        loop {
            // SAFETY: nothing is written when there is no place for it (waitid(2)).
            let ended = unsafe {
                let options = libc::WEXITED | libc::__WALL;
                libc::waitid(libc::P_PIDFD, process, ptr::null_mut(), options)
            };
            match Errno::result(ended) {
                Ok(_) => return,
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    // It may still use the memory that would be freed now.
                    log::error!("process {} cannot be waited for: {errno}", self.pid);
                    std::process::abort();
                }
            }
        }
    }
}

/// Clones the calling process into a stand-in.
fn clone(own: &mut Own, new_network: bool) -> io::Result<(u32, OwnedFd)> {
    let mut flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_PIDFD;
    if new_network {
        flags |= libc::CLONE_NEWNET;
    }
    // It has the shim's handlers too, and must never run one: it begins, and stays, with all signals blocked.
    let mut before = SigSet::empty();
    pthread_sigmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut before),
    )?;
    let mut process = -1;
    // The x86-64 ABI wants a multiple of 16, as `Own` and its first field begin and end at.
    let stack = own.stack.as_mut_ptr_range().end;
    let orders: *const Own = own;
    // SAFETY: the process shares our memory. It writes to the stack only, which nobody else uses, and reads the rest of `own`, which
    // nobody changes; both outlive it, as `StandIn` does not let go of them before it has waited for the process. `run` neither touches
    // thread-local storage, which is our thread's, nor takes a lock.
    let pid = unsafe {
        libc::clone(
            run,
            stack.cast(),
            flags,
            orders.cast_mut().cast(),
            &raw mut process,
        )
    };
    let pid = Errno::result(pid);
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    let pid = pid?;
    // SAFETY: the kernel has made this descriptor for us.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    rustix::io::fcntl_setfd(&process, rustix::io::FdFlags::CLOEXEC)?;
    Ok((pid.unsigned_abs(), process))
}

/// What a stand-in does. It only makes system calls, by ways that leave `errno` alone.
extern "C" fn run(own: *mut c_void) -> c_int {
    // SAFETY: `clone` passes an `Own` that outlives this process, and is not changed.
    let own = unsafe { &*own.cast_const().cast::<Own>() };
    // The shim may have ended before it could take us with it.
    let shim = || getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    if set_parent_process_death_signal(Some(Signal::KILL)).is_err() || shim() != Some(own.shim) {
        return 1;
    }
    let kind = Some(LinkNameSpaceType::Mount);
    if move_into_link_name_space(own.mailbox.nowhere.as_fd(), kind).is_err()
        || rustix::io::write(&own.mailbox.arrived, &1u64.to_ne_bytes()).is_err()
    {
        return 1;
    }
    // A process without a name is as good.
    let _ = set_name(&own.name);
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    let mut info = [0; SIGNAL_INFO];
    loop {
        match rustix::io::read(&own.mailbox.pending, &mut info) {
            Ok(SIGNAL_INFO) => {
                let [a, b, c, d, ..] = info;
                let [e, f, g, h] = pid.to_le_bytes();
                // Without a reader there is no shim, and soon no stand-in.
                let _ = rustix::io::write(&own.mailbox.writer, &[e, f, g, h, a, b, c, d]);
            }
            Ok(_) => return 1,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return 1,
        }
    }
}

/// Does something in another network namespace, and comes back.
fn in_network<T>(network: BorrowedFd<'_>, act: impl FnOnce() -> T) -> io::Result<T> {
    let kind = Some(LinkNameSpaceType::Network);
    let own = File::open("/proc/thread-self/ns/net")?;
    move_into_link_name_space(network, kind)?;
    let result = act();
    if let Err(error) = move_into_link_name_space(own.as_fd(), kind) {
        // What the shim does next is not meant for the pod's network.
        log::error!("the shim cannot return to its own network namespace: {error}");
        std::process::abort();
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    fn link(pid: u32) -> String {
        let link = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        link.display().to_string()
    }

    #[tokio::test]
    async fn a_stand_in_lives_until_it_is_dropped_and_not_longer() {
        let (mailbox, _signals) = signals().unwrap();
        let mailbox = Arc::new(mailbox);
        let first = StandIn::new("a-name-that-is-too-long", Network::New, &mailbox).unwrap();
        let network = first.network().unwrap();
        let second = StandIn::new("c1", Network::Join(network.as_fd()), &mailbox).unwrap();
        let own = link(std::process::id());
        assert_ne!(link(first.pid()), own);
        assert_eq!(link(second.pid()), link(first.pid()));
        for pid in [first.pid(), second.pid()] {
            for place in ["root", "cwd"] {
                let files = fs::read_dir(format!("/proc/{pid}/{place}")).unwrap();
                assert_eq!(files.count(), 0, "{place}");
                let new = fs::write(format!("/proc/{pid}/{place}/file"), "");
                assert_eq!(new.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
            }
            let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
            assert_eq!(mounts.lines().count(), 1, "{mounts}");
        }
        // The caller stays where it was.
        let thread = fs::read_link("/proc/thread-self/ns/net").unwrap();
        assert_eq!(thread.display().to_string(), own);
        let ended = second.ended().unwrap();
        let pid = second.pid();
        drop(second);
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
        tokio::time::timeout(Duration::from_secs(60), ended)
            .await
            .unwrap();
        assert!(fs::exists(format!("/proc/{}", first.pid())).unwrap());
    }

    #[tokio::test]
    async fn signals_are_told_and_a_kill_is_seen() {
        let (mailbox, mut signals) = signals().unwrap();
        let stand_in = StandIn::new("c1", Network::New, &Arc::new(mailbox)).unwrap();
        let send = |signal| {
            let pid = nix::unistd::Pid::from_raw(stand_in.pid() as i32);
            nix::sys::signal::kill(pid, signal).unwrap();
        };
        use nix::sys::signal::Signal::{SIGABRT, SIGHUP, SIGKILL, SIGTERM};
        for signal in [SIGTERM, SIGABRT, SIGHUP] {
            send(signal);
            assert_eq!(
                signals.next().await.unwrap(),
                (stand_in.pid(), signal as u32)
            );
        }
        let name = fs::read_to_string(format!("/proc/{}/comm", stand_in.pid())).unwrap();
        assert_eq!(name, "c1\n");
        send(SIGKILL);
        stand_in.ended().unwrap().await;
    }

    #[tokio::test]
    async fn a_stop_is_seen_and_its_end_is_told() {
        let (mailbox, mut signals) = signals().unwrap();
        let mut stops = Stops::new().unwrap();
        let stand_in = StandIn::new("c1", Network::New, &Arc::new(mailbox)).unwrap();
        let send = |signal| {
            let pid = nix::unistd::Pid::from_raw(stand_in.pid() as i32);
            nix::sys::signal::kill(pid, signal).unwrap();
        };
        use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
        for _ in 0..2 {
            send(SIGSTOP);
            assert_eq!(stops.next().await, stand_in.pid());
            send(SIGCONT);
            let told = signals.next().await.unwrap();
            assert_eq!(told, (stand_in.pid(), SIGCONT as u32));
        }
        send(SIGSTOP);
        drop(stand_in);
    }

    #[tokio::test]
    async fn a_network_that_is_none_is_told() {
        let (mailbox, _signals) = signals().unwrap();
        let file = File::open("/dev/null").unwrap();
        let network = Network::Join(file.as_fd());
        assert!(StandIn::new("c1", network, &Arc::new(mailbox)).is_err());
    }
}
