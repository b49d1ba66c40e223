//! The actor that owns a VMM: it passes requests on, checks and distributes what the VMM says, and reaps it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_agent::protocol::AGENT_PORT;
use bulkhead_vmm::control::{self, Channel, Dropped, Event, Nic, Request, Sources, StopReason};
use bulkhead_vmm::launch::{Exit, Vmm};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::stream::{self, Liveness};
use super::{Agent, CONSOLE_LINES, Error, Reason, Stopped, describe};
use crate::console::{CAPACITY, Console, printable};
use crate::disk::DiskFiles;

/// The most characters of a text from the VMM that are shown.
const TEXT_LIMIT: usize = 1024;

/// The most events that are read from a VMM that has ended, in search of its reason: more than the socket's buffer holds.
const LAST_EVENTS: usize = 1024;

/// Bytes of the console that are read at once.
const CONSOLE_CHUNK: usize = 4096;

/// How long a VMM may take to end after it has closed the control socket, which a process that is killed does on its way out.
const END_PATIENCE: Duration = Duration::from_secs(2);

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What the handle asks of the worker.
pub(super) enum Command {
    Attach {
        disk: DiskFiles,
        reply: Reply<u8>,
    },
    AttachNic {
        nic: Nic,
        taps: Vec<OwnedFd>,
        reply: Reply<u8>,
    },
    UpdateNic {
        slot: u8,
        link: bool,
        sources: Sources,
        reply: Reply<Dropped>,
    },
    Detach {
        slot: u8,
        reply: Reply<()>,
    },
    Connect {
        port: u32,
        stream: OwnedFd,
        reply: Reply<()>,
    },
}

/// What the worker tells the handle.
#[derive(Default)]
pub(super) struct State {
    /// PCI device numbers of the disks present at boot.
    pub slots: Vec<u8>,
    /// The latest connection of the agent.
    pub agent: Option<Agent>,
    /// The end.
    pub stopped: Option<Arc<Stopped>>,
}

impl State {
    pub fn agent(&self) -> Result<Agent, Error> {
        match (&self.agent, &self.stopped) {
            (_, Some(stopped)) => Err(Error::Stopped(stopped.clone())),
            (Some(agent), None) => Ok(agent.clone()),
            (None, None) => Err(Error::Stopped(Arc::new(Stopped::unknown()))),
        }
    }
}

/// A request that the VMM has not answered.
enum Pending {
    Attach(Reply<u8>),
    UpdateNic(Reply<Dropped>),
    /// `None`: the worker asked, because nobody waits for the device any more.
    Detach(u8, Option<Reply<()>>),
}

impl Pending {
    /// Tells whoever asked that it has failed.
    fn fail(self, error: impl FnOnce(&'static str) -> Error) {
        match self {
            Self::Attach(reply) => drop(reply.send(Err(error("attach a device")))),
            Self::UpdateNic(reply) => drop(reply.send(Err(error("change a network interface")))),
            Self::Detach(_, Some(reply)) => drop(reply.send(Err(error("detach a device")))),
            Self::Detach(_, None) => {}
        }
    }
}

/// A datagram to send.
struct Outgoing {
    request: Request,
    descriptors: Vec<OwnedFd>,
    /// Whom to tell that it was sent, if there is no answer to wait for.
    sent: Option<Reply<()>>,
}

/// What the worker wakes up for.
enum Wake {
    Ended,
    Stop,
    Received(Result<(Event, Vec<OwnedFd>), control::Error>),
    Sent(Result<(), control::Error>),
    Command(Option<Command>),
    Console(io::Result<usize>),
}

pub(super) struct Worker {
    vmm: AsyncFd<Vmm>,
    control: AsyncFd<Channel>,
    commands: mpsc::Receiver<Command>,
    state: watch::Sender<State>,
    vcpus: u8,
    boot_disks: usize,
    started: bool,
    agent: Option<Liveness>,
    connections: u32,
    /// One bit for each PCI device number in use.
    slots: u32,
    tag: u32,
    pending: HashMap<u32, Pending>,
    /// At most one command's, and the worker's own.
    outgoing: VecDeque<Outgoing>,
}

impl Worker {
    pub fn new(
        vmm: Vmm,
        control: Channel,
        (vcpus, boot_disks): (u8, usize),
        commands: mpsc::Receiver<Command>,
        state: watch::Sender<State>,
    ) -> io::Result<Self> {
        fcntl(&control, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        // SAFETY: process handle and channel each own one descriptor, which they keep and never exchange.
        let (vmm, control) = unsafe {
            (
                AsyncFd::register_with_interest(vmm, Interest::READABLE)?,
                AsyncFd::register(control)?,
            )
        };
        Ok(Self {
            vmm,
            control,
            commands,
            state,
            vcpus,
            boot_disks,
            started: false,
            agent: None,
            connections: 0,
            slots: 0,
            tag: 0,
            pending: HashMap::new(),
            outgoing: VecDeque::new(),
        })
    }

    /// Runs until the VMM is gone. Dropped before, it kills the VMM.
    pub async fn run(
        mut self,
        mut pipe: pipe::Receiver,
        console: Arc<Mutex<Console>>,
        stop: Arc<Notify>,
    ) {
        let told = self.serve(&mut pipe, &console, &stop).await;
        // Whoever waits for an answer learns of the end as soon as it is published.
        self.pending.clear();
        self.outgoing.clear();
        let exit = self.reap().await;
        let reason = told.or_else(|| self.last_words()).unwrap_or(Reason::Died);
        // What is left in the pipe is at most its capacity, which is also the console's.
        let mut left = vec![0; CAPACITY];
        let mut console = console.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(length @ 1..) = pipe.try_read(&mut left) {
            console.push(&left[..length]);
        }
        let stopped = Arc::new(Stopped {
            reason,
            exit,
            console: console.tail(CONSOLE_LINES),
        });
        drop(console);
        self.state.send_modify(|state| {
            state.agent = None;
            state.stopped = Some(stopped);
        });
    }

    /// Serves until the machine is to end or has ended; `None` if the VMM did not say why.
    async fn serve(
        &mut self,
        pipe: &mut pipe::Receiver,
        console: &Mutex<Console>,
        stop: &Notify,
    ) -> Option<Reason> {
        let mut chunk = [0; CONSOLE_CHUNK];
        let mut console_open = true;
        loop {
            let idle = self.outgoing.is_empty();
            let wake = tokio::select! {
                _ = self.vmm.readable() => Wake::Ended,
                () = stop.notified() => Wake::Stop,
                received = receive(&self.control) => Wake::Received(received),
                sent = send(&self.control, self.outgoing.front()), if !idle => Wake::Sent(sent),
                command = self.commands.recv(), if idle => Wake::Command(command),
                read = pipe.read(&mut chunk), if console_open => Wake::Console(read),
            };
            match wake {
                Wake::Ended => return None,
                Wake::Received(Err(control::Error::Closed)) => return self.closed(stop).await,
                Wake::Received(Err(error)) => return Some(Reason::Violation(error.to_string())),
                Wake::Received(Ok((event, descriptors))) => {
                    if let Err(reason) = self.handle(event, descriptors) {
                        return Some(reason);
                    }
                }
                Wake::Sent(result) => self.sent(result),
                Wake::Stop | Wake::Command(None) => return Some(Reason::Requested),
                Wake::Command(Some(command)) => self.accept(command),
                Wake::Console(Ok(length @ 1..)) => console
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(&chunk[..length]),
                // The VMM closed it; that is its loss.
                Wake::Console(Ok(0) | Err(_)) => console_open = false,
            }
        }
    }

    /// The control socket was closed: waits for the VMM to end by itself, for only then does its exit code say why it did.
    async fn closed(&self, stop: &Notify) -> Option<Reason> {
        let ended = async {
            tokio::select! {
                _ = self.vmm.readable() => None,
                () = stop.notified() => Some(Reason::Requested),
            }
        };
        let how = "it closed the control socket and did not end".to_owned();
        tokio::time::timeout(END_PATIENCE, ended)
            .await
            .unwrap_or(Some(Reason::Violation(how)))
    }

    /// Turns a command into a datagram.
    fn accept(&mut self, command: Command) {
        match command {
            Command::Attach { disk, reply } => {
                let tag = self.pend(Pending::Attach(reply));
                let description = describe(&disk, self.vcpus);
                let descriptors = disk.extents.into_iter().map(|(file, _)| file).collect();
                let disk = description;
                self.queue(Request::AttachDisk { tag, disk }, descriptors, None);
            }
            Command::AttachNic { nic, taps, reply } => {
                let tag = self.pend(Pending::Attach(reply));
                self.queue(Request::AttachNic { tag, nic }, taps, None);
            }
            Command::UpdateNic {
                slot,
                link,
                sources,
                reply,
            } => {
                let tag = self.pend(Pending::UpdateNic(reply));
                let request = Request::UpdateNic {
                    tag,
                    slot,
                    link,
                    sources,
                };
                self.queue(request, Vec::new(), None);
            }
            Command::Detach { slot, reply } => self.detach(slot, Some(reply)),
            Command::Connect {
                port,
                stream,
                reply,
            } => self.queue(Request::Connect { port }, vec![stream], Some(reply)),
        }
    }

    fn detach(&mut self, slot: u8, reply: Option<Reply<()>>) {
        let tag = self.pend(Pending::Detach(slot, reply));
        self.queue(Request::Detach { tag, slot }, Vec::new(), None);
    }

    /// Notes that an answer is awaited, under a tag that no other request has.
    fn pend(&mut self, pending: Pending) -> u32 {
        while self.pending.contains_key(&self.tag) {
            self.tag = self.tag.wrapping_add(1);
        }
        let tag = self.tag;
        self.tag = tag.wrapping_add(1);
        self.pending.insert(tag, pending);
        tag
    }

    fn queue(&mut self, request: Request, descriptors: Vec<OwnedFd>, sent: Option<Reply<()>>) {
        self.outgoing.push_back(Outgoing {
            request,
            descriptors,
            sent,
        });
    }

    /// The first datagram of the queue was sent, or cannot be. A reply that nobody waits for is dropped.
    fn sent(&mut self, result: Result<(), control::Error>) {
        let Some(outgoing) = self.outgoing.pop_front() else {
            return;
        };
        let result = result.map_err(Error::Control);
        match (outgoing.sent, outgoing.request, result) {
            (Some(reply), _, result) => drop(reply.send(result)),
            (
                None,
                Request::AttachDisk { tag, .. }
                | Request::AttachNic { tag, .. }
                | Request::UpdateNic { tag, .. }
                | Request::Detach { tag, .. },
                Err(error),
            ) => {
                if let Some(pending) = self.pending.remove(&tag) {
                    pending.fail(|_| error);
                }
            }
            (None, _, _) => {}
        }
    }

    /// Checks an event and acts on it; an error ends the machine.
    fn handle(&mut self, event: Event, descriptors: Vec<OwnedFd>) -> Result<(), Reason> {
        let expected = usize::from(matches!(event, Event::StreamOpened { .. }));
        if descriptors.len() != expected {
            return violation(format!(
                "{event:?} came with {} descriptors instead of {expected}",
                descriptors.len()
            ));
        }
        match event {
            Event::Started { slots } => self.on_started(slots),
            Event::Attached { tag, slot } => match self.pending.remove(&tag) {
                Some(Pending::Attach(reply)) => {
                    self.occupy(slot)?;
                    if reply.send(Ok(slot)).is_err() {
                        self.detach(slot, None);
                    }
                    Ok(())
                }
                _ => violation(format!("tag {tag} is of no device to attach")),
            },
            Event::Detached { tag } => match self.pending.remove(&tag) {
                Some(Pending::Detach(slot, reply)) => {
                    self.slots &= !bit(slot);
                    reply.map(|reply| reply.send(Ok(())));
                    Ok(())
                }
                _ => violation(format!("tag {tag} is of no device to detach")),
            },
            Event::NicUpdated { tag, dropped } => match self.pending.remove(&tag) {
                Some(Pending::UpdateNic(reply)) => {
                    // Whoever asked may not wait any more.
                    let _ = reply.send(Ok(dropped));
                    Ok(())
                }
                _ => violation(format!("tag {tag} is of no network interface to change")),
            },
            Event::Refused { tag, error } => self.on_refused(tag, &error),
            Event::StreamOpened { port: AGENT_PORT } => self.on_agent(descriptors),
            Event::StreamOpened { port } => violation(format!("the guest may not use port {port}")),
            Event::Stopped { reason } => Err(Reason::Vmm(shown(reason))),
        }
    }

    fn on_started(&mut self, slots: Vec<u8>) -> Result<(), Reason> {
        if self.started || slots.len() != self.boot_disks {
            return violation(format!("it started {} disks", slots.len()));
        }
        self.started = true;
        for &slot in &slots {
            self.occupy(slot)?;
        }
        self.state.send_modify(|state| state.slots = slots);
        Ok(())
    }

    fn on_refused(&mut self, tag: u32, error: &str) -> Result<(), Reason> {
        let reason = printable(error.as_bytes(), TEXT_LIMIT);
        match self.pending.remove(&tag) {
            Some(pending) => {
                pending.fail(|operation| Error::Refused { operation, reason });
                Ok(())
            }
            None => violation(format!("it refused tag {tag}, which nobody asked for")),
        }
    }

    /// The agent dialled, or something else in the guest that wants to be taken for it: while there is an agent, a second
    /// stream is closed.
    fn on_agent(&mut self, descriptors: Vec<OwnedFd>) -> Result<(), Reason> {
        if !self.started {
            return violation("a stream was opened before the machine started".to_owned());
        }
        if self.agent.as_ref().is_some_and(Liveness::alive) {
            return Ok(());
        }
        for descriptor in descriptors {
            let (client, liveness) = stream::client(descriptor)
                .map_err(|error| Reason::Violation(format!("the agent's stream: {error}")))?;
            self.agent = Some(liveness);
            self.connections = self.connections.wrapping_add(1);
            let connection = self.connections;
            self.state
                .send_modify(|state| state.agent = Some(Agent { client, connection }));
        }
        Ok(())
    }

    /// Notes that a PCI device number is in use.
    fn occupy(&mut self, slot: u8) -> Result<(), Reason> {
        let bit = bit(slot);
        if bit == 0 || self.slots & bit != 0 {
            return violation(format!("slot {slot} does not exist or is in use"));
        }
        self.slots |= bit;
        Ok(())
    }

    /// Kills the VMM, and waits until it is gone.
    async fn reap(&mut self) -> Exit {
        if self.vmm.get_ref().kill().is_err() {
            return Exit::Unknown;
        }
        loop {
            let Ok(mut ended) = self.vmm.readable_mut().await else {
                return Exit::Unknown;
            };
            match ended.get_inner_mut().try_wait() {
                Ok(Some(exit)) => return exit,
                Ok(None) => ended.clear_ready(),
                Err(_) => return Exit::Unknown,
            }
        }
    }

    /// Why the VMM ended, from the events that it left in the socket.
    fn last_words(&self) -> Option<Reason> {
        for _ in 0..LAST_EVENTS {
            match self.control.get_ref().receive::<Event>() {
                Ok((Event::Stopped { reason }, _)) => return Some(Reason::Vmm(shown(reason))),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
        None
    }
}

/// The bit of a PCI device number; 0 if there is no such number.
fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

fn violation(how: String) -> Result<(), Reason> {
    Err(Reason::Violation(printable(how.as_bytes(), TEXT_LIMIT)))
}

/// A reason whose texts are printable.
fn shown(reason: StopReason) -> StopReason {
    match reason {
        StopReason::Invalid(cause) => StopReason::Invalid(printable(cause.as_bytes(), TEXT_LIMIT)),
        StopReason::Failed(cause) => StopReason::Failed(printable(cause.as_bytes(), TEXT_LIMIT)),
        StopReason::PowerOff | StopReason::Reset | StopReason::Panic | StopReason::TripleFault => {
            reason
        }
    }
}

/// Waits for one event. Cancel-safe: nothing is lost if the future is dropped.
async fn receive(control: &AsyncFd<Channel>) -> Result<(Event, Vec<OwnedFd>), control::Error> {
    loop {
        let mut ready = control.readable().await.map_err(io_error("waiting"))?;
        match control.get_ref().receive() {
            Err(control::Error::Io { source, .. })
                if source.kind() == io::ErrorKind::WouldBlock =>
            {
                ready.clear_ready();
            }
            result => return result,
        }
    }
}

/// Sends one datagram as soon as there is room for it. Cancel-safe: it is sent whole or not at all.
async fn send(
    control: &AsyncFd<Channel>,
    outgoing: Option<&Outgoing>,
) -> Result<(), control::Error> {
    let Some(outgoing) = outgoing else {
        return std::future::pending().await;
    };
    let descriptors: Vec<_> = outgoing.descriptors.iter().map(AsFd::as_fd).collect();
    loop {
        let mut ready = control.writable().await.map_err(io_error("waiting"))?;
        match control.get_ref().send(&outgoing.request, &descriptors) {
            Err(control::Error::Io { source, .. })
                if source.kind() == io::ErrorKind::WouldBlock =>
            {
                ready.clear_ready();
            }
            result => return result,
        }
    }
}

fn io_error(operation: &'static str) -> impl Fn(io::Error) -> control::Error {
    move |source| control::Error::Io { operation, source }
}
