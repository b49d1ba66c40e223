//! Requests about a container as it is: its processes, limits and use, freezing, terminals, standard input.

use std::collections::HashMap;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResizePtyRequest, ResumeRequest, StatsRequest, StatsResponse, UpdateTaskRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};
use containerd_shim_protos::shim::oci::ProcessDetails;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::Code;
use ttrpc::context::Context;

use super::{Tasks, process, process_mut};
use crate::annotations::Kind;
use crate::error::Error;
use crate::process::{Change, Phase};
use crate::spec;

/// The type of the statistics that Stats answers.
const METRICS_TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The type of the details of a process that Pids answers.
const DETAILS_TYPE_URL: &str = "containerd.runc.v1.ProcessDetails";

impl Tasks {
    /// The processes of a container. Init and execs have the numbers of the host's processes that stand for them. The others, which they have
    /// started, have the init's: the guest's mean nothing here.
    pub(super) async fn pids(&self, request: PidsRequest) -> Result<PidsResponse, Error> {
        let (kind, phase, pid, execs) = self.with(&request.id, |container| {
            let execs = container.execs.iter();
            let execs: HashMap<_, _> = execs.map(|(id, exec)| (id.clone(), exec.pid)).collect();
            let init = &container.init;
            Ok((container.kind, init.phase, init.pid, execs))
        })?;
        let processes = match (kind, phase) {
            (_, Phase::Stopped) => Vec::new(),
            (Kind::Sandbox, _) => vec![ProcessInfo::new()],
            (Kind::Member | Kind::Single, _) => {
                self.sandbox
                    .ask_briefly(
                        |agent| async move { agent.pids(Context::default(), &request).await },
                    )
                    .await?
                    .processes
            }
        };
        let on_host = |process: ProcessInfo| {
            let info = process.info.into_option();
            let info = info.filter(|info| info.type_url == DETAILS_TYPE_URL);
            let details = info
                .as_ref()
                .map(|i| ProcessDetails::parse_from_bytes(&i.value));
            let exec = details.and_then(|details| execs.get(&details.ok()?.exec_id).copied());
            ProcessInfo {
                pid: exec.unwrap_or(pid),
                // A process that is no exec of ours is none that the guest may give details of.
                info: info.filter(|_| exec.is_some()).into(),
                ..Default::default()
            }
        };
        Ok(PidsResponse {
            processes: processes.into_iter().map(on_host).collect(),
            ..Default::default()
        })
    }

    /// Freezes a container.
    pub(super) async fn pause(&self, request: PauseRequest) -> Result<(), Error> {
        let id = request.id.clone();
        self.with(&id, |container| {
            if container.kind == Kind::Sandbox {
                return Err(Error::Unsupported("pausing the sandbox of a pod"));
            }
            let refused = |phase| Error::Phase {
                operation: "pause",
                phase,
            };
            container.init.change(Change::Pause).map_err(refused)
        })?;
        let paused = self
            .sandbox
            .ask(|agent| async move { agent.pause(Context::default(), &request).await })
            .await;
        self.with(&id, |container| {
            container.paused(paused.is_ok(), &self.events);
            Ok(())
        })?;
        paused.map(drop)
    }

    /// Thaws a container.
    pub(super) async fn resume(&self, request: ResumeRequest) -> Result<(), Error> {
        let id = request.id.clone();
        self.with(&id, |container| match container.init.phase {
            Phase::Paused => Ok(()),
            phase => Err(Error::Phase {
                operation: "resume",
                phase,
            }),
        })?;
        self.sandbox
            .ask(|agent| async move { agent.resume(Context::default(), &request).await })
            .await?;
        self.with(&id, |container| {
            container.resumed(&self.events);
            Ok(())
        })
    }

    /// Refuses to write down the state of a container's processes: only the guest's kernel has it.
    pub(super) fn checkpoint(&self, request: &CheckpointTaskRequest) -> Result<(), Error> {
        self.with(&request.id, |_| {
            Err(Error::Unsupported("checkpointing a microVM's container"))
        })
    }

    /// Tells a terminal its size. A process without one, or that has ended, needs none.
    pub(super) async fn resize_pty(&self, request: ResizePtyRequest) -> Result<(), Error> {
        let has_terminal = self.with(&request.id, |container| {
            let process = process(container, &request.exec_id)?;
            Ok(process.stdio.terminal && process.phase != Phase::Stopped)
        })?;
        if !has_terminal {
            return Ok(());
        }
        self.sandbox
            .ask_briefly(
                |agent| async move { agent.resize_pty(Context::default(), &request).await },
            )
            .await
            .map(drop)
    }

    /// Ends a process's standard input, after what was written to it.
    pub(super) fn close_io(&self, request: &CloseIORequest) -> Result<(), Error> {
        self.with(&request.id, |container| {
            let process = process_mut(container, &request.exec_id)?;
            if let (true, Some(streams)) = (request.stdin, &mut process.streams) {
                streams.close_stdin();
            }
            Ok(())
        })
    }

    /// Changes the limits of a container: all that are asked for, or none.
    pub(super) async fn update(&self, mut request: UpdateTaskRequest) -> Result<(), Error> {
        let backing = self.with(&request.id, |container| match container.init.phase {
            _ if container.kind == Kind::Sandbox => Err(Error::Unsupported(
                "changing the limits of the sandbox of a pod",
            )),
            Phase::Stopped => Err(Error::Phase {
                operation: "change the limits of",
                phase: Phase::Stopped,
            }),
            _ => Ok(container.backing.clone()),
        })?;
        let id = request.id.clone();
        let mut moved = None;
        if let Some(resources) = request.resources.as_mut() {
            let asked = spec::resources(&resources.value)?;
            resources.value = spec::resources_for_guest(&resources.value, &backing)?;
            let machine = self.sandbox.machine()?.pid();
            let before = self.affinity.update(&id, machine, &asked)?;
            moved = before.map(|before| (machine, before));
        }
        let updated = self
            .sandbox
            .ask(|agent| async move { agent.update(Context::default(), &request).await })
            .await;
        // The guest changes everything or nothing.
        if let (Err(_), Some((machine, before))) = (&updated, moved) {
            self.affinity.put_back(&id, machine, before);
        }
        updated.map(drop)
    }

    /// What a container uses.
    pub(super) async fn stats(&self, request: StatsRequest) -> Result<StatsResponse, Error> {
        let kind = self.with(&request.id, |container| match container.init.phase {
            Phase::Stopped => Err(Error::Finished),
            _ => Ok(container.kind),
        })?;
        let stats = match kind {
            Kind::Sandbox => idle()?,
            Kind::Member | Kind::Single => {
                let asked = |agent: containerd_shim_protos::shim_async::TaskClient| async move {
                    agent.stats(Context::default(), &request).await
                };
                let stats = self.sandbox.ask_briefly(asked).await?.stats.into_option();
                stats
                    .filter(|stats| stats.type_url == METRICS_TYPE_URL)
                    .ok_or(Error::Agent {
                        code: Code::INTERNAL,
                        text: format!("the agent's statistics are no {METRICS_TYPE_URL}"),
                    })?
            }
        };
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }
}

/// The statistics of the pause process, which is there in name only.
fn idle() -> Result<Any, Error> {
    let metrics = Metrics {
        pids: MessageField::some(PidsStat::new()),
        cpu: MessageField::some(CPUStat::new()),
        memory: MessageField::some(MemoryStat::new()),
        ..Default::default()
    };
    let value = metrics.write_to_bytes().map_err(|error| Error::Agent {
        code: Code::INTERNAL,
        text: error.to_string(),
    })?;
    Ok(Any {
        type_url: METRICS_TYPE_URL.into(),
        value,
        ..Default::default()
    })
}
