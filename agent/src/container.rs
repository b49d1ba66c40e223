//! A container: its processes, its control group, and what may be asked of it when.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oci_spec::runtime::Process as ProcessSpec;

use crate::cgroup::{self, Cgroup};
use crate::child;
use crate::error::Error;
use crate::oci::mapping::Mappings;
use crate::oci::seccomp::Filter;
use crate::oom::Kills;
use crate::plan::Plan;
use crate::process::{Exit, Process, Status};
use crate::sys;

/// A container. Nothing in it is locked for longer than a moment, so no request waits for another.
#[derive(Debug)]
pub struct Container {
    /// What it was built from.
    pub built: child::Container,
    /// Its init.
    pub init: Arc<Process>,
    /// Its seccomp filter, which its execs get too.
    pub seccomp: Option<Filter>,
    /// The capabilities of its init, for execs that name none.
    pub process: ProcessSpec,
    /// The users and groups of its user namespace.
    pub mappings: Mappings,
    /// Its control group.
    pub cgroup: Cgroup,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    execs: HashMap<String, Arc<Process>>,
    /// Whether its init has exited, though that may not have been told yet.
    ended: bool,
    freezer: Freezer,
    oom_kills: u64,
}

/// Whether a container's processes are stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Freezer {
    #[default]
    Thawed,
    Freezing,
    Frozen,
}

impl Container {
    /// A container whose init waits for its start.
    pub fn new(plan: Plan, init: Arc<Process>, cgroup: Cgroup) -> Self {
        Self {
            built: plan.container,
            init,
            seccomp: plan.seccomp,
            process: plan.process,
            mappings: plan.mappings,
            cgroup,
            state: Mutex::default(),
        }
    }

    /// One of its processes: an exec, or its init for an empty identifier.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.state().execs.get(exec_id).cloned().ok_or_else(|| {
            Error::NotFound(format!(
                "process {exec_id:?} does not exist in container {:?}",
                self.built.id
            ))
        })
    }

    /// Its execs.
    pub fn execs(&self) -> Vec<Arc<Process>> {
        self.state().execs.values().cloned().collect()
    }

    /// Adds an exec.
    pub fn add(&self, process: Arc<Process>) -> Result<(), Error> {
        let mut state = self.state();
        self.check_admits(&state)?;
        match state.execs.entry(process.exec_id.clone()) {
            std::collections::hash_map::Entry::Occupied(_) => Err(Error::AlreadyExists(format!(
                "process {:?} exists already in container {:?}",
                process.exec_id, self.built.id
            ))),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(process);
                Ok(())
            }
        }
    }

    /// Fails unless its init, whose namespaces an exec joins, waits for its start or runs, and is not paused.
    pub fn admits_execs(&self) -> Result<(), Error> {
        self.check_admits(&self.state())
    }

    fn check_admits(&self, state: &State) -> Result<(), Error> {
        let is = match (self.init.status(), state.freezer) {
            (Status::Stopped, _) => "stopped",
            _ if state.ended => "stopped",
            (Status::Added, _) => "not created",
            (Status::Created | Status::Running, Freezer::Thawed) => return Ok(()),
            (_, Freezer::Freezing | Freezer::Frozen) => "paused",
        };
        Err(Error::FailedPrecondition(format!(
            "cannot exec in container {:?}: it is {is}",
            self.built.id
        )))
    }

    /// Forgets an exec that has exited or was never started, and returns it.
    pub fn remove_exec(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        let process = self.process(exec_id)?;
        match process.status() {
            Status::Added | Status::Stopped => {
                self.state().execs.remove(exec_id);
                Ok(process)
            }
            Status::Created | Status::Running => Err(Error::FailedPrecondition(format!(
                "cannot delete a running process {exec_id:?}"
            ))),
        }
    }

    /// Whether its processes are stopped.
    pub fn freezer(&self) -> Freezer {
        self.state().freezer
    }

    /// Stops its processes, or lets them go on.
    pub async fn freeze(&self, frozen: bool) -> Result<(), Error> {
        {
            let mut state = self.state();
            let (to, is_not) = match frozen {
                true => ("pause", "running"),
                false => ("resume", "paused"),
            };
            let from = if frozen {
                Freezer::Thawed
            } else {
                Freezer::Frozen
            };
            if self.init.status() != Status::Running || state.freezer != from {
                return Err(Error::FailedPrecondition(format!(
                    "cannot {to} container {:?}: it is not {is_not}",
                    self.built.id
                )));
            }
            state.freezer = Freezer::Freezing;
        }
        let changed = self.cgroup.freeze(frozen).await;
        self.state().freezer = if changed.is_ok() == frozen {
            Freezer::Frozen
        } else {
            Freezer::Thawed
        };
        changed
    }

    /// Notes the exit of one of its processes. The init's is told last: when no exec is left, and the host knows of a kill for lack
    /// of memory.
    pub fn exited(self: &Arc<Self>, process: &Arc<Process>, exit: Exit, kills: &Arc<Kills>) {
        self.check_memory(kills);
        if !process.exec_id.is_empty() {
            process.exited(exit);
            return;
        }
        self.state().ended = true;
        // Without a PID namespace of its own nothing ends a container's other processes with its init.
        if !self.built.namespaces.has(sys::CLONE_NEWPID)
            && let Err(error) = self.cgroup.kill()
        {
            eprintln!("container {}: {error}", self.built.id);
        }
        let (container, kills) = (self.clone(), kills.clone());
        tokio::spawn(async move {
            for exec in container.execs() {
                if exec.status() != Status::Added {
                    exec.wait().await;
                }
            }
            kills.told().await;
            container.init.exited(exit);
        });
    }

    /// Tells of processes that were killed for lack of memory since the last look.
    pub fn check_memory(&self, kills: &Kills) {
        let Ok(events) = self.cgroup.read("memory.events") else {
            return;
        };
        let count = cgroup::value(&events, "oom_kill").unwrap_or(0);
        let mut state = self.state();
        if count > state.oom_kills {
            state.oom_kills = count;
            kills.add(&self.built.id);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
