//! The tasks of this shim: the table of its containers, and what is answered from it alone.
//!
//! The table is locked for moments, never while something is waited for. A request checks and notes in the table what is about to happen,
//! then asks the guest, then notes what has happened. Questions about state are answered from the table, whatever the machine is doing.

mod create;
mod network;
mod represent;
mod requests;
mod run;
mod service;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    ConnectResponse, ShutdownRequest, StateRequest, StateResponse, Status, WaitRequest,
    WaitResponse,
};
use protobuf::MessageField;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use network::MachineNetwork;
pub use service::services;

use crate::affinity::Affinity;
use crate::annotations::Kind;
use crate::cgroup;
use crate::container::Container;
use crate::error::Error;
use crate::events::Publisher;
use crate::logger::Owner;
use crate::process::{End, Exit, KILLED, Phase, Process};
use crate::sandbox::Sandbox;
use crate::stand_in::{self, Mailbox, Stops};

/// At most one event for want of memory in this time, for each container: a hostile guest can make up any number.
const OOM_INTERVAL: Duration = Duration::from_secs(1);

/// How long a shim that ends waits for a container that is being created to come to nothing: programs that make its disks may need some
/// seconds on a busy host, and would be left in the control group.
const CREATE_PATIENCE: Duration = Duration::from_secs(10);

/// The tasks of a shim.
#[derive(Debug)]
pub struct Tasks {
    namespace: String,
    events: Publisher,
    sandbox: Sandbox,
    affinity: Affinity,
    home: Mutex<Home>,
    /// What the machine has its network from.
    network: Mutex<MachineNetwork>,
    /// Who tells the guest of changes of its network.
    following: Mutex<Option<JoinHandle<()>>>,
    table: Mutex<Table>,
    /// Where the host's processes that stand for the guest's get their signals.
    mailbox: Arc<Mailbox>,
    /// A Create has ended.
    created: Notify,
    closed: Notify,
}

/// Where the shim lives on the host.
#[derive(Debug)]
struct Home {
    /// The bundle of its first task, where `delete` looks for what it has written down.
    bundle: PathBuf,
    /// Its listening socket.
    socket: PathBuf,
    /// Its control group, once it is in it.
    stay: Option<cgroup::Stay>,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<String, Entry>,
    /// A client wants the shim to end when what is being created now comes to nothing.
    end_wanted: bool,
    /// No container is created any more.
    closing: bool,
}

#[derive(Debug)]
enum Entry {
    /// A Create is under way.
    Creating,
    Ready(Box<Container>),
}

impl Entry {
    fn is_being_created(&self) -> bool {
        matches!(self, Self::Creating)
    }

    /// Whether nobody will ask for it any more.
    fn is_given_up(&self) -> bool {
        matches!(self, Self::Ready(container) if container.given_up)
    }

    /// Whether it has no use for the machine any more: nothing of it is to run, and nothing is still to be delivered.
    fn is_over(&self) -> bool {
        match self {
            Self::Creating => false,
            Self::Ready(container) => match container.init.phase {
                Phase::Stopped => container.drained,
                Phase::Created
                | Phase::Starting
                | Phase::Running
                | Phase::Pausing
                | Phase::Paused => container.overdue,
            },
        }
    }
}

/// The place of a container that is being created; it is free again if this is dropped.
#[derive(Debug)]
struct Reservation<'a> {
    tasks: &'a Arc<Tasks>,
    id: String,
}

impl Reservation<'_> {
    /// Puts the container into its place, and tells containerd, in one step.
    fn fill(self, container: Container, tell: impl FnOnce(&Publisher)) {
        let mut table = self.tasks.table();
        table
            .entries
            .insert(self.id.clone(), Entry::Ready(Box::new(container)));
        tell(&self.tasks.events);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let failed = matches!(
            self.tasks.table().entries.get(&self.id),
            Some(Entry::Creating)
        );
        if failed {
            self.tasks.remove(&self.id, |_| {});
        }
    }
}

impl Tasks {
    /// No tasks yet. `bundle` is that of the first, and `socket` where the shim listens. Needs the runtime of tokio.
    pub fn new(
        namespace: &str,
        events: Publisher,
        bundle: PathBuf,
        socket: PathBuf,
    ) -> io::Result<Arc<Self>> {
        let (mailbox, signals) = stand_in::signals()?;
        let stops = Stops::new()?;
        let tasks = Arc::new(Self {
            namespace: namespace.to_owned(),
            events,
            sandbox: Sandbox::default(),
            affinity: Affinity::default(),
            home: Mutex::new(Home {
                bundle,
                socket,
                stay: None,
            }),
            network: Mutex::default(),
            following: Mutex::default(),
            table: Mutex::default(),
            mailbox: Arc::new(mailbox),
            created: Notify::new(),
            closed: Notify::new(),
        });
        tasks.pass_signals_on(signals);
        tasks.pass_stops_on(stops);
        Ok(tasks)
    }

    /// Whose output it is, for logging programs.
    fn owner(&self, id: &str) -> Owner {
        Owner {
            namespace: self.namespace.clone(),
            id: id.to_owned(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reserve(self: &Arc<Self>, id: &str) -> Result<Reservation<'_>, Error> {
        let mut table = self.table();
        if table.closing {
            return Err(Error::ShuttingDown);
        }
        if table.entries.contains_key(id) {
            return Err(Error::ContainerExists(id.to_owned()));
        }
        table.entries.insert(id.to_owned(), Entry::Creating);
        Ok(Reservation {
            tasks: self,
            id: id.to_owned(),
        })
    }

    /// Removes a container from the table and tells containerd, in one step: whoever hears of it finds its name free. With the last
    /// one goes what was there for them.
    fn remove(self: &Arc<Self>, id: &str, tell: impl FnOnce(&Publisher)) {
        self.affinity.forget(id);
        let mut table = self.table();
        table.entries.remove(id);
        tell(&self.events);
        if table.end_wanted && table.entries.values().all(Entry::is_given_up) {
            self.close(&mut table);
        }
        drop(table);
        self.end_if_idle();
    }

    /// Looks at a container, or changes it, under the table's lock.
    fn with<T>(
        &self,
        id: &str,
        act: impl FnOnce(&mut Container) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.table().entries.get_mut(id) {
            Some(Entry::Ready(container)) => act(container),
            Some(Entry::Creating) | None => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// Where a process is.
    fn state(&self, request: &StateRequest) -> Result<StateResponse, Error> {
        self.with(&request.id, |container| {
            let process = process(container, &request.exec_id)?;
            let exit = process.exit();
            // In a paused container that is what every process is, whatever else it is.
            let phase = match container.init.phase {
                paused @ (Phase::Pausing | Phase::Paused) => paused,
                _ => process.phase,
            };
            let id = match request.exec_id.as_str() {
                "" => &container.id,
                exec_id => exec_id,
            };
            Ok(StateResponse {
                // As runc's shim has it: the process's own, and no exec_id.
                id: id.to_owned(),
                bundle: container.bundle.clone(),
                pid: process.pid,
                status: status(phase).into(),
                stdin: process.stdio.stdin.clone(),
                stdout: process.stdio.stdout.clone(),
                stderr: process.stdio.stderr.clone(),
                terminal: process.stdio.terminal,
                exit_status: exit.map_or(0, |exit| exit.status),
                exited_at: exit.map(|exit| exit.timestamp()).into(),
                ..Default::default()
            })
        })
    }

    /// Waits for a process to end.
    async fn wait(&self, request: &WaitRequest) -> Result<WaitResponse, Error> {
        let ended = self.with(&request.id, |container| {
            Ok(process(container, &request.exec_id)?.ended())
        })?;
        let end = ended.await;
        // Deleted meanwhile, without an end.
        let end = end.ok_or_else(|| match request.exec_id.as_str() {
            "" => Error::NoContainer(request.id.clone()),
            exec_id => no_process(&request.id, exec_id),
        })?;
        Ok(match end {
            End::Exit(exit) => WaitResponse {
                exit_status: exit.status,
                exited_at: MessageField::some(exit.timestamp()),
                ..Default::default()
            },
            End::NeverRan => WaitResponse::default(),
        })
    }

    /// Who serves a task. A containerd that has come back asks this for each task that it finds on the disk; one that was not made
    /// before the last containerd died, nobody waits for any more, and the error has this one call `delete`.
    fn connect(&self, id: &str) -> Result<ConnectResponse, Error> {
        let task_pid = match id {
            "" => 0,
            id => self.with(id, |container| Ok(container.init.pid))?,
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    /// The machine has ended, and every process in it.
    fn machine_ended(&self) {
        let exit = Exit::now(KILLED);
        let mut table = self.table();
        // The sandbox of a pod comes last, as its end is the end of the others.
        for last in [false, true] {
            for entry in table.entries.values_mut() {
                match entry {
                    Entry::Ready(container) if (container.kind == Kind::Sandbox) == last => {
                        container.machine_ended(exit, &self.events);
                    }
                    Entry::Ready(_) | Entry::Creating => {}
                }
            }
        }
    }

    /// The guest's kernel has killed a process for want of memory.
    fn out_of_memory(&self, id: &str) {
        let told = self.with(id, |container| {
            let now = Instant::now();
            let recent = |last| now.duration_since(last) < OOM_INTERVAL;
            if !container.last_oom.is_some_and(recent) {
                container.last_oom = Some(now);
                container.out_of_memory(&self.events);
            }
            Ok(())
        });
        if let Err(error) = told {
            log::debug!("the guest is out of memory: {error}");
        }
    }

    /// Notes that a container which has ended has no more output, and that the machine may go if it was the last.
    fn drained(self: &Arc<Self>, id: &str) {
        let noted = self.with(id, |container| {
            // It may be another that has the name now.
            container.drained |= container.init.phase == Phase::Stopped;
            Ok(())
        });
        log::debug!("the output of {id:?} is delivered: {}", noted.is_ok());
        self.end_if_idle();
    }

    /// Ends the machine when nobody has a use for it. A pod's sandbox has until it is killed.
    fn end_if_idle(self: &Arc<Self>) {
        if !self.sandbox.exists() {
            return;
        }
        let idle = self.table().entries.values().all(Entry::is_over);
        if idle {
            self.end_machine();
        }
    }

    fn end_machine(self: &Arc<Self>) {
        let tasks = Arc::clone(self);
        tokio::spawn(async move { tasks.sandbox.stop().await });
    }

    /// Ends the shim, unless it still has tasks. containerd never asks for that `now`. Our own `delete` does if it could not delete the
    /// task that it names, whether that still runs or not: nobody will ask for it any more, so it is none to stay for, and is deleted as
    /// soon as the guest lets it go.
    fn shutdown(self: &Arc<Self>, request: &ShutdownRequest) {
        let mut table = self.table();
        let mut given_up = false;
        if request.now
            && let Some(Entry::Ready(container)) = table.entries.get_mut(&request.id)
        {
            container.given_up = true;
            given_up = true;
        }
        let may_be_none = |entry: &Entry| entry.is_given_up() || entry.is_being_created();
        if table.entries.values().all(Entry::is_given_up) {
            self.close(&mut table);
        } else if table.entries.values().all(may_be_none) {
            // Its client may have lost patience, and nobody will ask again.
            table.end_wanted = true;
        }
        let pursue = given_up && !table.closing;
        drop(table);
        if pursue {
            let (tasks, id) = (Arc::clone(self), request.id.clone());
            tokio::spawn(async move {
                if let Err(error) = tasks.discard(&id).await {
                    log::error!("container {id:?} stays until the machine ends: {error}");
                }
            });
        }
    }

    fn close(&self, table: &mut Table) {
        table.closing = true;
        self.closed.notify_one();
    }

    /// Waits until a client has asked for the end of the shim.
    pub async fn closed(&self) {
        self.closed.notified().await;
    }

    /// Waits until no container is being created. What is created keeps processes of the host in the control group.
    async fn settled(&self) {
        loop {
            let mut created = pin!(self.created.notified());
            created.as_mut().enable();
            if !self.table().entries.values().any(Entry::is_being_created) {
                return;
            }
            created.await;
        }
    }

    /// Ends the machine, tells of the ends of all that ran in it, and gives back what it had of the host.
    pub async fn finish(&self) {
        self.sandbox.stop().await;
        let settled = tokio::time::timeout(CREATE_PATIENCE, self.settled());
        if settled.await.is_err() {
            log::warn!("a container is still being created after {CREATE_PATIENCE:?}");
        }
        self.disconnect_network().await;
        self.machine_ended();
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = home.stay.take().map(cgroup::Stay::leave) {
            log::warn!("the control group stays: {error}");
        }
    }
}

fn process<'c>(container: &'c Container, exec_id: &str) -> Result<&'c Process, Error> {
    container
        .process(exec_id)
        .ok_or_else(|| no_process(&container.id, exec_id))
}

fn process_mut<'c>(container: &'c mut Container, exec_id: &str) -> Result<&'c mut Process, Error> {
    let id = container.id.clone();
    container
        .process_mut(exec_id)
        .ok_or_else(|| no_process(&id, exec_id))
}

fn no_process(container: &str, exec: &str) -> Error {
    Error::NoProcess {
        container: container.to_owned(),
        exec: exec.to_owned(),
    }
}

fn status(phase: Phase) -> Status {
    match phase {
        Phase::Created | Phase::Starting => Status::CREATED,
        Phase::Running => Status::RUNNING,
        Phase::Pausing => Status::PAUSING,
        Phase::Paused => Status::PAUSED,
        Phase::Stopped => Status::STOPPED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::tests::container;

    #[test]
    fn a_machine_is_of_use_until_its_containers_have_ended_or_should_have() {
        let entry = |change: fn(&mut Container)| {
            let (mut container, _) = container(&[]);
            change(&mut container);
            Entry::Ready(Box::new(container))
        };
        assert!(!Entry::Creating.is_over());
        assert!(!entry(|_| {}).is_over());
        assert!(entry(|container| container.overdue = true).is_over());
        let stopped = entry(|container| {
            container.init.phase = Phase::Stopped;
            // What it has written is worth waiting for, however late it has ended.
            container.overdue = true;
        });
        assert!(!stopped.is_over());
        let over = entry(|container| {
            container.init.phase = Phase::Stopped;
            container.drained = true;
        });
        assert!(over.is_over());
    }
}
