//! One microVM, for the rest of the shim: started, watched, asked for devices and streams, and ended.
//!
//! A [`Machine`] is the handle of an actor (`worker`) that owns the VMM process and its control socket. The VMM is not
//! trusted: what it sends is checked, and a VMM that breaks the protocol is killed. Nothing here polls or waits for a
//! fixed time: the actor sleeps until the VMM speaks, ends, writes to the console, or is asked for something.

mod stream;
mod worker;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_agent::protocol::AGENT_PORT;
use bulkhead_vmm::control::{self, Boot, Disk, Dropped, Extent, Nic, Request, Sources, StopReason};
use bulkhead_vmm::launch::{self, Exit};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use ttrpc::asynchronous::Client;

use crate::console::Console;
use crate::disk::DiskFiles;
use worker::{Command, State, Worker};

/// What every guest kernel is told: where its console and its root are, to end the machine when it fails, and what spares it
/// work at its boot. `guest-kernel/README.md` has the reason for each.
pub const CMDLINE: &str = concat!(
    "console=ttyS0 quiet root=/dev/vda rootfstype=erofs ro reboot=k panic=-1",
    " noreplace-smp percpu_alloc=page pci=conf1,noearly tsc=reliable swiotlb=noforce",
    " rcupdate.rcu_expedited=1 spec_rstack_overflow=off initcall_blacklist=slab_late_init,slab_sysfs_init",
    " dummy.numdummies=0 ifb.numifbs=0 fb_tunnels=none",
);

/// How many lines of the console go into errors.
const CONSOLE_LINES: usize = 20;

/// The identification of the disk that holds the guest's root image.
const IMAGE_ID: &str = "root";

/// The most request queues of a disk: more than this many processors rarely wait for one disk at once.
const MAX_QUEUES: u8 = 4;

/// What a machine is made of.
#[derive(Debug)]
pub struct MachineSpec {
    /// The VMM's executable.
    pub vmm: PathBuf,
    /// The guest kernel, an ELF image.
    pub kernel: PathBuf,
    /// The guest's root image, which becomes the first disk, read-only.
    pub image: PathBuf,
    /// The VMM's user and group on the host; see [`launch::unique_uid`].
    pub uid: u32,
    /// Virtual processors, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The kernel's command line.
    pub cmdline: String,
    /// The disks after the first.
    pub disks: Vec<DiskFiles>,
    /// How long the guest may take until its agent answers.
    pub boot_timeout: Duration,
    /// Whether the guest may send from others' addresses.
    pub allow_foreign_sources: bool,
}

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VMM process was not started.
    #[error(transparent)]
    Launch(#[from] launch::Error),
    /// A file that the machine needs cannot be opened.
    #[error("cannot open the {what} {}: {source}; {remedy}", path.display())]
    Open {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
        remedy: &'static str,
    },
    /// The guest's root image is no image.
    #[error("the guest's root image {} has {length} bytes, which is no multiple of 512; install it again", path.display())]
    Image { path: PathBuf, length: u64 },
    /// The system refused something small.
    #[error("{operation} for the machine failed: {source}")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
    /// A request could not be sent.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// The machine ended before its agent was there, or before it did what it was asked for.
    #[error("the microVM ended: {0}")]
    Stopped(Arc<Stopped>),
    /// The agent did not answer in time.
    #[error("the microVM's agent did not answer within {} s (`boot_timeout_seconds` in the configuration){}", timeout.as_secs_f32(), console_text(console))]
    Timeout {
        timeout: Duration,
        console: Vec<String>,
    },
    /// The VMM refused a request, and nothing changed.
    #[error("the VMM refused to {operation}: {reason}")]
    Refused {
        operation: &'static str,
        reason: String,
    },
}

/// Why a machine ended, and what its console said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// Why.
    pub reason: Reason,
    /// How the VMM process ended.
    pub exit: Exit,
    /// The last lines of the console, printable.
    pub console: Vec<String>,
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The VMM said so.
    Vmm(StopReason),
    /// It was stopped from here.
    Requested,
    /// The VMM broke the protocol and was killed; the text says how.
    Violation(String),
    /// The VMM process ended and did not say why.
    Died,
}

impl fmt::Display for Stopped {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::Vmm(StopReason::PowerOff) => write!(formatter, "the guest powered itself off"),
            Reason::Vmm(StopReason::Reset) => write!(formatter, "the guest asked for a reset"),
            Reason::Vmm(StopReason::Panic) => write!(formatter, "the guest's kernel panicked"),
            Reason::Vmm(StopReason::TripleFault) => {
                write!(formatter, "a virtual processor shut down (triple fault)")
            }
            Reason::Vmm(StopReason::Invalid(cause)) => {
                write!(formatter, "it could not be built: {cause}")
            }
            Reason::Vmm(StopReason::Failed(cause)) => write!(formatter, "it failed: {cause}"),
            Reason::Requested => write!(formatter, "it was stopped"),
            Reason::Violation(how) => {
                write!(formatter, "the VMM broke the control protocol: {how}")
            }
            Reason::Died if self.exit == Exit::Signal(Signal::SIGKILL) => write!(
                formatter,
                "the VMM was killed by SIGKILL; if nobody did, the kernel did for want of memory and its log says so"
            ),
            Reason::Died => write!(formatter, "the VMM {} and did not say why", self.exit),
        }?;
        formatter.write_str(&console_text(&self.console))
    }
}

fn console_text(lines: &[String]) -> String {
    match lines {
        [] => "; its console is empty".to_owned(),
        lines => format!("; its console's last lines:\n  {}", lines.join("\n  ")),
    }
}

/// One connection of the agent.
#[derive(Clone)]
pub struct Agent {
    /// Where to send requests. They fail when the connection breaks.
    pub client: Client,
    connection: u32,
}

impl fmt::Debug for Agent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Agent({})", self.connection)
    }
}

/// A running machine. Dropping it ends the machine.
pub struct Machine {
    pid: u32,
    vcpus: u8,
    boot_timeout: Duration,
    allow_foreign_sources: bool,
    commands: mpsc::Sender<Command>,
    /// Apart from the commands, because those wait when the VMM does not read.
    stop: Arc<Notify>,
    state: watch::Receiver<State>,
    console: Arc<Mutex<Console>>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Machine")
            .field("pid", &self.pid)
            .field("disk_slots", &self.disk_slots())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Launches a machine and waits for its agent. Dropping the future ends the machine.
    ///
    /// # Errors
    ///
    /// Those of [`Machine::launch`] and [`Machine::ready`]. Nothing is left of the machine.
    pub async fn start(spec: MachineSpec) -> Result<Self, Error> {
        let machine = Self::launch(spec)?;
        machine.ready().await?;
        Ok(machine)
    }

    /// Waits for the agent of a machine that was launched.
    ///
    /// # Errors
    ///
    /// [`Error::Stopped`] and [`Error::Timeout`] hold the last lines of the console. After a timeout the machine still runs.
    pub async fn ready(&self) -> Result<(), Error> {
        let mut state = self.state.clone();
        let ready = state.wait_for(|state| state.agent.is_some() || state.stopped.is_some());
        match tokio::time::timeout(self.boot_timeout, ready).await {
            Ok(Ok(state)) => match &state.stopped {
                Some(stopped) => Err(Error::Stopped(stopped.clone())),
                None => Ok(()),
            },
            Ok(Err(_)) => Err(Error::Stopped(Arc::new(Stopped::unknown()))),
            Err(_) => Err(Error::Timeout {
                timeout: self.boot_timeout,
                console: self.console_tail(),
            }),
        }
    }

    /// Launches the VMM, sends it the machine to build, and leaves both to a worker.
    ///
    /// The VMM inherits the cgroups of the calling thread, and is killed if that thread ends: call this from a runtime
    /// whose threads live as long as the machine.
    pub fn launch(spec: MachineSpec) -> Result<Self, Error> {
        let kvm = open(
            "KVM device",
            Path::new("/dev/kvm"),
            true,
            "`bulkhead check` tells whether this host can run microVMs",
        )?;
        let kernel = open(
            "guest kernel",
            &spec.kernel,
            false,
            "install it there, or set `kernel` in the configuration",
        )?;
        let image = open_image(&spec.image)?;
        let (console_reader, console_writer) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .map_err(io_error("making the console's pipe"))?;

        let disks: Vec<&DiskFiles> = std::iter::once(&image).chain(&spec.disks).collect();
        let boot = Request::Boot(Boot {
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            cmdline: spec.cmdline,
            ports: Some(vec![AGENT_PORT]),
            disks: disks
                .iter()
                .map(|disk| describe(disk, spec.vcpus))
                .collect(),
            nics: Vec::new(),
        });
        let mut descriptors = vec![kvm.as_fd(), kernel.as_fd(), console_writer.as_fd()];
        descriptors.extend(disks.iter().flat_map(|disk| extents(disk)));

        let (vmm, control) = launch::launch(&spec.vmm, spec.uid)?;
        control.send(&boot, &descriptors)?;
        let pid = vmm.pid();
        let console_reader = pipe::Receiver::from_owned_fd_unchecked(console_reader)
            .map_err(io_error("watching the console's pipe"))?;
        let console = Arc::default();
        let (commands, queue) = mpsc::channel(1);
        let (sender, state) = watch::channel(State::default());
        let worker = Worker::new(vmm, control, (spec.vcpus, disks.len()), queue, sender)
            .map_err(io_error("watching the VMM"))?;
        let stop = Arc::new(Notify::new());
        tokio::spawn(worker.run(console_reader, Arc::clone(&console), Arc::clone(&stop)));
        Ok(Self {
            pid,
            vcpus: spec.vcpus,
            boot_timeout: spec.boot_timeout,
            allow_foreign_sources: spec.allow_foreign_sources,
            commands,
            stop,
            state,
            console,
        })
    }

    /// The VMM's process identifier.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The number of its virtual processors.
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// What the guest may send through an interface that has these addresses.
    pub fn sources(&self, addresses: Vec<IpAddr>) -> Sources {
        if self.allow_foreign_sources {
            Sources::Any
        } else {
            Sources::Addresses(addresses)
        }
    }

    /// The PCI device numbers of [`MachineSpec::disks`], in their order, once the machine is ready.
    pub fn disk_slots(&self) -> Vec<u8> {
        // The first slot is the guest's root.
        self.state.borrow().slots.iter().skip(1).copied().collect()
    }

    /// The agent's latest connection.
    pub fn agent(&self) -> Result<Agent, Error> {
        self.state.borrow().agent()
    }

    /// The agent's next connection after one that broke: the agent dials again.
    pub async fn agent_after(&self, broken: &Agent) -> Result<Agent, Error> {
        let mut state = self.state.clone();
        let newer = |state: &State| {
            let agent = state.agent.as_ref();
            state.stopped.is_some() || agent.is_some_and(|a| a.connection != broken.connection)
        };
        match state.wait_for(newer).await {
            Ok(state) => state.agent(),
            Err(_) => Err(Error::Stopped(Arc::new(Stopped::unknown()))),
        }
    }

    /// Attaches a disk, and returns its PCI device number. The agent must rescan the bus. If the future is dropped, the
    /// disk is taken away again.
    pub async fn attach(&self, disk: DiskFiles) -> Result<u8, Error> {
        self.ask(|reply| Command::Attach { disk, reply }).await
    }

    /// Attaches a network interface to its tap's queues, and returns its PCI device number. The agent must rescan the bus. If
    /// the future is dropped, the interface is taken away again.
    pub async fn attach_nic(&self, nic: Nic, taps: Vec<OwnedFd>) -> Result<u8, Error> {
        self.ask(|reply| Command::AttachNic { nic, taps, reply })
            .await
    }

    /// Plugs a network interface's cable in or out, and sets what the guest may send. Returns what it has dropped until now.
    pub async fn update_nic(
        &self,
        slot: u8,
        link: bool,
        sources: Sources,
    ) -> Result<Dropped, Error> {
        self.ask(|reply| Command::UpdateNic {
            slot,
            link,
            sources,
            reply,
        })
        .await
    }

    /// Takes a disk or network interface away that the guest has let go.
    pub async fn detach(&self, slot: u8) -> Result<(), Error> {
        self.ask(|reply| Command::Detach { slot, reply }).await
    }

    /// Opens a stream to a vsock port of the guest. If nobody listens there, the stream ends at once.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, Error> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)
            .map_err(io_error("making a stream"))?;
        let ours = UnixStream::from_std(ours.into()).map_err(|source| Error::Io {
            operation: "watching a stream",
            source,
        })?;
        self.ask(|reply| Command::Connect {
            port,
            stream: theirs,
            reply,
        })
        .await?;
        Ok(ours)
    }

    /// Waits until the machine has ended, and says why. Any number of callers may wait; dropping the future is safe.
    pub fn stopped(&self) -> impl Future<Output = Arc<Stopped>> + Send + 'static {
        let mut state = self.state.clone();
        async move {
            match state.wait_for(|state| state.stopped.is_some()).await {
                Ok(state) => state.stopped.clone(),
                Err(_) => None,
            }
            .unwrap_or_else(|| Arc::new(Stopped::unknown()))
        }
    }

    /// The last lines that the guest wrote to its console, printable.
    pub fn console_tail(&self) -> Vec<String> {
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        console.tail(CONSOLE_LINES)
    }

    /// Ends the machine, and waits until its process is gone. It is not an error if it has ended before.
    pub async fn stop(&self) -> Arc<Stopped> {
        self.stop.notify_one();
        self.stopped().await
    }

    /// Sends a command to the worker and waits for its reply. The worker drops the reply's sender when the machine ends.
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Command,
    ) -> Result<T, Error> {
        let (sender, reply) = oneshot::channel();
        if self.commands.send(command(sender)).await.is_ok()
            && let Ok(reply) = reply.await
        {
            return reply;
        }
        Err(Error::Stopped(self.stopped().await))
    }
}

impl Stopped {
    /// Nobody is there any more who could tell: the runtime was shut down.
    fn unknown() -> Self {
        Self {
            reason: Reason::Requested,
            exit: Exit::Unknown,
            console: Vec::new(),
        }
    }
}

/// A disk as the VMM is told of it.
fn describe(disk: &DiskFiles, vcpus: u8) -> Disk {
    Disk {
        id: disk.id.clone(),
        read_only: disk.read_only,
        queues: vcpus.clamp(1, MAX_QUEUES).into(),
        extents: disk.extents.iter().map(|(_, extent)| *extent).collect(),
    }
}

/// The descriptors that go with [`describe`].
fn extents(disk: &DiskFiles) -> impl Iterator<Item = BorrowedFd<'_>> {
    disk.extents.iter().map(|(file, _)| file.as_fd())
}

fn open(what: &'static str, path: &Path, write: bool, remedy: &'static str) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .map_err(|source| Error::Open {
            what,
            path: path.to_owned(),
            source,
            remedy,
        })
}

fn open_image(path: &Path) -> Result<DiskFiles, Error> {
    let file = open(
        "guest's root image",
        path,
        false,
        "install it there, or set `image` in the configuration",
    )?;
    let length = file
        .metadata()
        .map_err(|source| Error::Io {
            operation: "reading the length of the guest's root image",
            source,
        })?
        .len();
    if length == 0 || length % 512 != 0 {
        return Err(Error::Image {
            path: path.to_owned(),
            length,
        });
    }
    Ok(DiskFiles {
        id: IMAGE_ID.to_owned(),
        read_only: true,
        extents: vec![(OwnedFd::from(file), Extent { offset: 0, length })],
    })
}

fn io_error<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> Error {
    move |source| Error::Io {
        operation,
        source: source.into(),
    }
}
