//! From a created process to a deleted one.

use std::future::Future;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{
    DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::events::task::TaskExecAdded;
use protobuf::MessageField;
use ttrpc::Code;
use ttrpc::context::Context;

use super::{Tasks, process, process_mut};
use crate::annotations::Kind;
use crate::args::is_identifier;
use crate::container::Container;
use crate::error::Error;
use crate::hooks::Stage;
use crate::process::{Change, End, Exit, KILLED, Phase, Process};
use crate::spec;
use crate::stand_in::Network;
use crate::streams::{Ends, Stdio};

/// How long Delete waits for the last output to be read. containerd gives Delete ten seconds in all.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// How long a guest may take to end a killed container; then the machine ends, unless others are in it.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Waits until the end of a process is noted. Who is told that it has finished, or could not start, looks at it next, and must find it
/// stopped: ctr deletes nothing else.
async fn noted(ended: impl Future<Output = Option<End>>) {
    if tokio::time::timeout(KILL_PATIENCE, ended).await.is_err() {
        log::warn!("the guest says that a process has finished, but not how");
    }
}

impl Tasks {
    /// Starts a process, and returns the number of the host's process that stands for it.
    pub(super) async fn start(self: &Arc<Self>, request: StartRequest) -> Result<u32, Error> {
        let (id, exec_id) = (request.id.clone(), request.exec_id.clone());
        let started = self.try_to_start(request).await;
        if started.is_err() && !exec_id.is_empty() {
            let told = self.with(&id, |container| {
                process_mut(container, &exec_id)?.never_ran();
                Ok(())
            });
            log::debug!("{id:?} {exec_id:?} is not waited for: {}", told.is_ok());
        }
        started
    }

    async fn try_to_start(self: &Arc<Self>, request: StartRequest) -> Result<u32, Error> {
        let (id, exec_id) = (request.id.clone(), request.exec_id.clone());
        self.connect_network(&id).await?;
        let kind = self.with(&id, |container| {
            let refused = |phase| Error::Phase {
                operation: "start",
                phase,
            };
            if !exec_id.is_empty() && container.init_has_ended() {
                process(container, &exec_id)?;
                return Err(refused(Phase::Stopped));
            }
            let network = Arc::clone(&container.network);
            let process = process_mut(container, &exec_id)?;
            if process.is_being_deleted() {
                return Err(Error::Finished);
            }
            let started = process.phase.after(Change::Start);
            started.ok_or(refused(process.phase))?;
            if let Some(streams) = &mut process.streams {
                streams.open_stdin().map_err(Error::Stream)?;
            }
            if process.stand_in.is_none() {
                // An exec's is made now, as its number is told now.
                let network = Network::Join(network.as_fd());
                process.represent(self.stand_in(&exec_id, network)?);
            }
            process.change(Change::Start).map_err(refused)?;
            if container.kind == Kind::Sandbox {
                container.started(&exec_id, &self.events);
            }
            Ok(container.kind)
        })?;
        if kind == Kind::Sandbox {
            return self.poststart(&id).await;
        }
        let started = self
            .sandbox
            .ask(|agent| async move { agent.start(Context::default(), &request).await })
            .await;
        let ended = self.with(&id, |container| {
            match &started {
                Ok(_) => container.started(&exec_id, &self.events),
                Err(_) => container.start_failed(&exec_id, &self.events),
            }
            Ok(container.init.ended())
        })?;
        if let (Err(_), "") = (&started, exec_id.as_str()) {
            // A container that could not start has ended.
            noted(ended).await;
        }
        started?;
        if exec_id.is_empty() {
            return self.poststart(&id).await;
        }
        self.watch(&id, &exec_id);
        self.watch_stand_in(&id, &exec_id);
        self.with(&id, |container| Ok(process(container, &exec_id)?.pid))
    }

    /// Runs the hooks that come after the start of a container, and returns the number of the process that stands for it. A
    /// container with a hook that fails is stopped (runtime-spec, "Lifecycle").
    async fn poststart(self: &Arc<Self>, id: &str) -> Result<u32, Error> {
        let (hooks, pid) = self.with(id, |container| {
            Ok((container.hooks.clone(), container.init.pid))
        })?;
        if let Err(failure) = hooks.run(Stage::Poststart, Some(pid)).await {
            if let Err(error) = self.end(id).await {
                log::error!("{id:?} does not end after its hook failed: {error}");
            }
            return Err(failure.into());
        }
        Ok(pid)
    }

    /// Waits for a process to end in the guest, and notes it.
    pub(super) fn watch(self: &Arc<Self>, id: &str, exec_id: &str) {
        let tasks = Arc::clone(self);
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        tokio::spawn(async move {
            let Some(exit) = tasks.end_in_guest(&request).await else {
                return;
            };
            let drained = tasks.with(&request.id, |container| {
                container.exited(&request.exec_id, exit, &tasks.events);
                let ended = container.init.phase == Phase::Stopped;
                Ok(ended.then(|| drained(container)))
            });
            if let Ok(Some(drained)) = drained {
                drained.await;
                tasks.drained(&request.id);
            }
        });
    }

    /// How a process ended in the guest; `None` if the machine has ended, which is noted for all its processes at once.
    async fn end_in_guest(&self, request: &WaitRequest) -> Option<Exit> {
        loop {
            let request = request.clone();
            let (id, exec_id) = (request.id.clone(), request.exec_id.clone());
            let ended = self
                .sandbox
                .ask(|agent| async move { agent.wait(Context::default(), &request).await })
                .await;
            match ended {
                Ok(response) => return Some(Exit::now(response.exit_status)),
                Err(Error::Disconnected(_)) => {}
                Err(Error::Machine(_)) => return None,
                Err(error) => {
                    log::error!("how {id:?} {exec_id:?} ended is not known: {error}");
                    return Some(Exit::now(KILLED));
                }
            }
        }
    }

    /// Sends a signal to a process, or to all of a container. That a container has none any more is no error if all were meant.
    pub(super) async fn kill(self: &Arc<Self>, request: KillRequest) -> Result<(), Error> {
        let all = request.all && request.exec_id.is_empty();
        let finished = |error| if all { Ok(()) } else { Err(error) };
        let (kind, ended) = self.with(&request.id, |container| {
            let process = process(container, &request.exec_id)?;
            let kind = match process.phase {
                _ if process.held.is_some() || process.phase == Phase::Stopped => None,
                Phase::Created if !request.exec_id.is_empty() => {
                    return Err(Error::Phase {
                        operation: "kill",
                        phase: Phase::Created,
                    });
                }
                _ => Some(container.kind),
            };
            Ok((kind, process.ended()))
        })?;
        let Some(kind) = kind else {
            noted(ended).await;
            return finished(Error::Finished);
        };
        let is_final = request.signal == libc::SIGKILL as u32 && request.exec_id.is_empty();
        match kind {
            Kind::Sandbox => return self.kill_sandbox(&request),
            Kind::Single if is_final => self.insist(&request.id)?,
            Kind::Single | Kind::Member => {}
        }
        let killed = self
            .sandbox
            .ask(|agent| async move { agent.kill(Context::default(), &request).await })
            .await;
        match killed {
            // The signal's target has ended, and the machine with it, before the answer was on its way.
            Err(Error::Machine(_)) => Ok(()),
            Err(error) if error.code() == Code::NOT_FOUND => {
                noted(ended).await;
                finished(error)
            }
            killed => killed.map(drop),
        }
    }

    /// The pause process of a pod exists in name only. It ends at the signals at which it does elsewhere, and the machine with it.
    fn kill_sandbox(self: &Arc<Self>, request: &KillRequest) -> Result<(), Error> {
        let status = match i32::try_from(request.signal) {
            Ok(libc::SIGKILL) => KILLED,
            Ok(libc::SIGTERM | libc::SIGINT) => 0,
            _ => return Ok(()),
        };
        self.with(&request.id, |container| {
            container.init.held = Some(Exit::now(status));
            Ok(())
        })?;
        self.end_machine();
        Ok(())
    }

    /// Sees to it that a killed container with a machine to itself ends, whatever the guest does: with the machine, as soon as nobody
    /// else has a use for that.
    fn insist(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let ended = self.with(id, |container| Ok(container.init.ended()))?;
        let (tasks, id) = (Arc::clone(self), id.to_owned());
        tokio::spawn(async move {
            if tokio::time::timeout(KILL_PATIENCE, ended).await.is_ok() {
                return;
            }
            let noted = tasks.with(&id, |container| {
                container.overdue = true;
                Ok(())
            });
            if noted.is_ok() {
                log::error!(
                    "container {id:?}, which was killed, is still there after {KILL_PATIENCE:?}: its machine ends unless others are in it"
                );
                tasks.end_if_idle();
            }
        });
        Ok(())
    }

    /// Kills a container and waits for its end.
    async fn end(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let kill = KillRequest {
            id: id.to_owned(),
            signal: libc::SIGKILL as u32,
            all: true,
            ..Default::default()
        };
        let ended = self.with(id, |container| Ok(container.init.ended()))?;
        match self.kill(kill).await {
            Err(error) if error.code() != Code::NOT_FOUND => return Err(error),
            _ => ended.await,
        };
        Ok(())
    }

    /// Ends and deletes a container that nobody will ask for.
    pub(super) async fn discard(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        self.end(id).await?;
        let delete = DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        self.delete(&delete).await.map(drop)
    }

    /// Adds a process to a container; Start starts it.
    pub(super) async fn exec(&self, request: ExecProcessRequest) -> Result<(), Error> {
        let (id, exec_id) = (request.id.clone(), request.exec_id.clone());
        if !is_identifier(&exec_id) {
            return Err(Error::Invalid {
                field: "exec_id",
                value: exec_id,
                problem: "no identifier",
            });
        }
        self.with(&id, |container| {
            if container.kind == Kind::Sandbox {
                return Err(Error::Unsupported(
                    "a process in the sandbox of a pod, which has no files,",
                ));
            }
            let phase = match container.init_has_ended() {
                true => Phase::Stopped,
                false => container.init.phase,
            };
            if let Phase::Pausing | Phase::Paused | Phase::Stopped = phase {
                return Err(Error::Phase {
                    operation: "add a process next to",
                    phase,
                });
            }
            if container.execs.contains_key(&exec_id) || !container.adding.insert(exec_id.clone()) {
                return Err(Error::ProcessExists {
                    container: id.clone(),
                    exec: exec_id.clone(),
                });
            }
            Ok(())
        })?;
        let added = self.exec_in_guest(request).await;
        self.with(&id, |container| {
            container.adding.remove(&exec_id);
            container.execs.insert(exec_id.clone(), added?);
            self.events.publish(&TaskExecAdded {
                container_id: id.clone(),
                exec_id: exec_id.clone(),
                ..Default::default()
            });
            Ok(())
        })
    }

    async fn exec_in_guest(&self, mut request: ExecProcessRequest) -> Result<Process, Error> {
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let ends = Ends::open(&stdio, &self.owner(&request.id)).await?;
        if let Some(spec) = request.spec.as_mut() {
            spec.value = spec::process_for_guest(&spec.value)?;
        }
        let (streams, names) = self.sandbox.copy(ends).await?;
        request.stdin = names.stdin;
        request.stdout = names.stdout;
        request.stderr = names.stderr;
        self.sandbox
            .ask(|agent| async move { agent.exec(Context::default(), &request).await })
            .await?;
        Ok(Process::new(stdio, Some(streams)))
    }

    /// Forgets a process that does not run; with the init, the container. Of several clients that ask for it at once, one is served; the others
    /// are told that it is gone when it is, or served if it is not.
    pub(super) async fn delete(
        self: &Arc<Self>,
        request: &DeleteRequest,
    ) -> Result<DeleteResponse, Error> {
        let (id, exec_id) = (&request.id, &request.exec_id);
        let deletion = self.with(id, |container| {
            Ok(Arc::clone(&process(container, exec_id)?.deletion))
        })?;
        let _deletion = deletion.lock().await;
        let (kind, phase, mut drained, ended) = self.with(id, |container| {
            let drained = match exec_id.as_str() {
                "" => Box::pin(drained(container)) as Drained,
                _ => Box::pin(drained_process(process(container, exec_id)?)),
            };
            let process = process_mut(container, exec_id)?;
            match process.phase {
                // It is another that has the name now.
                _ if !Arc::ptr_eq(&deletion, &process.deletion) => return Err(Error::Finished),
                Phase::Created | Phase::Stopped => {}
                phase => {
                    return Err(Error::Phase {
                        operation: "delete",
                        phase,
                    });
                }
            }
            let (phase, ended) = (process.phase, process.ended());
            Ok((container.kind, phase, drained, ended))
        })?;
        // A process that was never started has no output, though its streams are open.
        if phase == Phase::Stopped {
            if tokio::time::timeout(DRAIN_PATIENCE, &mut drained)
                .await
                .is_err()
            {
                log::warn!(
                    "output of {id:?} {exec_id:?} is lost: for {DRAIN_PATIENCE:?} nobody read it"
                );
            }
            if exec_id.is_empty() {
                self.drained(id);
            }
        }
        if kind != Kind::Sandbox {
            self.delete_in_guest(request).await?;
        }
        // What was never started has ended well, but its first process was there, and its end is told before the deletion.
        let never_started = phase == Phase::Created;
        if never_started && exec_id.is_empty() && kind != Kind::Sandbox {
            let told = async {
                ended.await;
                // What has run beside it may have said something.
                drained.await;
            };
            let told = tokio::time::timeout(DRAIN_PATIENCE, told).await;
            log::debug!("the end of {id:?} is known: {}", told.is_ok());
        }
        if exec_id.is_empty() {
            let (hooks, given_up) = self.with(id, |container| {
                container.init.stand_in = None;
                Ok((container.hooks.clone(), container.given_up))
            })?;
            // `delete` has run them then, and the bundle in which that is noted may be gone.
            if !given_up {
                hooks.run_last().await;
            }
        }
        let (exit, pid, deleted) = self.with(id, |container| {
            let process = process(container, exec_id)?;
            let pid = process.pid;
            let mut exit = process.exit().unwrap_or_else(|| Exit::now(0));
            if never_started {
                exit.status = 0;
            }
            let deleted = exec_id.is_empty().then(|| container.deleted(exit));
            container.execs.remove(exec_id);
            Ok((exit, pid, deleted))
        })?;
        if let Some(deleted) = deleted {
            self.remove(id, |events| events.publish(&deleted));
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.timestamp()),
            ..Default::default()
        })
    }

    /// Has the guest let go of a process, and of a container's disks, unless they go with the machine.
    async fn delete_in_guest(&self, request: &DeleteRequest) -> Result<(), Error> {
        if self.sandbox.is_ending() {
            return Ok(());
        }
        let asked = request.clone();
        let deleted = self
            .sandbox
            .ask_briefly(|agent| async move { agent.delete(Context::default(), &asked).await })
            .await;
        match deleted {
            Ok(_) => {}
            Err(error) if error.code() == Code::NOT_FOUND => {}
            Err(Error::Machine(_)) => return Ok(()),
            Err(error) => return Err(error),
        }
        if request.exec_id.is_empty() {
            let slots = self.with(&request.id, |container| Ok(container.slots.clone()))?;
            self.sandbox.detach(&slots).await;
        }
        Ok(())
    }
}

type Drained = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Waits until all output of a container's processes is delivered, but for those that have not run.
fn drained(container: &Container) -> impl Future<Output = ()> + Send + use<> {
    let processes = std::iter::once(&container.init).chain(container.execs.values());
    let have_run = processes.filter(|process| process.phase != Phase::Created);
    let drained: Vec<_> = have_run.map(drained_process).collect();
    async move {
        for process in drained {
            process.await;
        }
    }
}

/// Waits until all output of a process is delivered.
fn drained_process(process: &Process) -> impl Future<Output = ()> + Send + use<> {
    let drained = process.streams.as_ref().map(|streams| streams.drained());
    async move {
        if let Some(drained) = drained {
            drained.await;
        }
    }
}
