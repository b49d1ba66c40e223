//! All containers of a sandbox, and how they come and go.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{Mode, OFlags, major, minor};
use rustix::process::Pid;

use crate::cgroup::{Cgroup, devices, limits};
use crate::container::Container;
use crate::disk;
use crate::error::{Context, Error};
use crate::oci::root::Root;
use crate::oom::Kills;
use crate::plan::{Creation, Plan};
use crate::process::{self, Exit, Process, Status};
use crate::programs::Programs;
use crate::protocol::{ROOT_DISK, SCRATCH_DISK};
use crate::scratch;
use crate::streams::Streams;

/// Where the agent keeps what it keeps.
#[derive(Debug, Clone)]
pub struct Paths {
    /// A writable directory; the scratch disk is mounted on `scratch` in it.
    pub run: PathBuf,
    /// The control group below which containers have theirs.
    pub cgroup: PathBuf,
}

/// The agent's state.
#[derive(Debug)]
pub struct Agent {
    /// Where it keeps things.
    pub paths: Paths,
    /// The streams that the host has opened.
    pub streams: Arc<Streams>,
    /// The out-of-memory kills that the host has not been told of.
    pub kills: Arc<Kills>,
    /// None for an identifier whose container is being made or removed.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    /// The children whose exits matter.
    children: Mutex<HashMap<u32, Owner>>,
    /// Held while limits of disks change: an update that fails puts back what it found, which must not be what another has set meanwhile.
    limiting: Mutex<()>,
    null: OwnedFd,
    pid_namespace: OwnedFd,
}

/// Whose process a child is.
#[derive(Debug)]
pub(crate) enum Owner {
    /// An init that is being made.
    Unborn(Arc<Process>),
    /// A container's.
    Member(Arc<Container>, Arc<Process>),
}

impl Agent {
    /// An agent without containers.
    pub fn new(paths: Paths) -> Result<Arc<Self>, Error> {
        let open = |path: &str, flags| {
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
                .context(|| format!("opening {path}"))
        };
        for directory in ["root", "scratch"] {
            let directory = paths.run.join(directory);
            fs::create_dir_all(&directory)
                .context(|| format!("making the directory {}", directory.display()))?;
        }
        Ok(Arc::new(Self {
            paths,
            streams: Arc::default(),
            kills: Arc::default(),
            containers: Mutex::default(),
            children: Mutex::default(),
            limiting: Mutex::default(),
            null: open("/dev/null", OFlags::RDWR)?,
            pid_namespace: open("/proc/self/ns/pid", OFlags::RDONLY)?,
        }))
    }

    /// The container with this identifier.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.containers().get(id) {
            Some(Some(container)) => Ok(container.clone()),
            Some(None) | None => Err(Error::NotFound(format!("container {id:?} does not exist"))),
        }
    }

    /// Takes note of a child's exit.
    pub fn exited(&self, pid: u32, exit: Exit) {
        let owner = self.children().remove(&pid);
        match owner {
            // A helper, or an orphan of some container.
            None => {}
            Some(Owner::Unborn(process)) => process.exited(exit),
            Some(Owner::Member(container, process)) => {
                container.exited(&process, exit, &self.kills);
            }
        }
    }

    /// Makes a container, whose init then waits for its start.
    pub async fn create(&self, creation: Creation) -> Result<Arc<Container>, Error> {
        let id = creation.id.clone();
        {
            let mut containers = self.containers();
            if containers.contains_key(&id) {
                self.refuse_streams(&creation.streams);
                return Err(Error::AlreadyExists(format!(
                    "container {id:?} exists already"
                )));
            }
            containers.insert(id.clone(), None);
        }
        let made = self.make(creation).await;
        let mut containers = self.containers();
        match &made {
            Ok(container) => containers.insert(id, Some(container.clone())),
            Err(_) => containers.remove(&id),
        };
        made
    }

    async fn make(&self, creation: Creation) -> Result<Arc<Container>, Error> {
        let group = Cgroup::path_of(&self.paths.cgroup, &creation.id);
        let planned = Plan::new(&creation, &self.paths, group.clone())
            .and_then(|plan| Ok((plan, Cgroup::create(group)?)));
        let (plan, cgroup) = planned.inspect_err(|_| self.refuse_streams(&creation.streams))?;
        let process = Process::new("", plan.program.clone(), creation.streams);
        let made = async {
            cgroup.limit(&plan.resources)?;
            let channel = self.make_init(&plan, &process, &cgroup).await?;
            // Not earlier: the process has found the disks, and mounts some that the container itself may not use.
            self.limit_disks(&plan.container.root, &cgroup, &plan.resources)?;
            cgroup.allow_devices(&plan.devices)?;
            if plan.container.may_divide_its_group() {
                cgroup.give_to(plan.mappings.user(0))?;
            }
            Ok(channel)
        };
        match made.await {
            Ok(channel) => {
                process.is_ready(channel);
                let container = Arc::new(Container::new(plan, process.clone(), cgroup));
                if let Some(owner) = self.children().get_mut(&process.pid()) {
                    *owner = Owner::Member(container.clone(), process);
                }
                tokio::spawn(watch_memory(container.clone(), self.kills.clone()));
                Ok(container)
            }
            Err(error) => {
                // Nothing of it must outlive the request.
                self.forget_streams(&process);
                cgroup.kill()?;
                cgroup.remove().await?;
                scratch::discard(&self.paths, &creation.id)?;
                Err(error)
            }
        }
    }

    /// Sets the limits of the disks that a container with this root uses.
    fn limit_disks(
        &self,
        root: &Root,
        cgroup: &Cgroup,
        resources: &LinuxResources,
    ) -> Result<(), Error> {
        let _limiting = self.limiting(resources);
        cgroup.limit_disks(resources, |disk| self.disk_number(root, disk))
    }

    /// Changes the limits of a container, and which devices it may use if `devices` says so: all of it or, if something fails, nothing.
    pub fn change_limits(
        &self,
        container: &Container,
        resources: &LinuxResources,
        devices: Option<&[devices::Rule]>,
    ) -> Result<(), Error> {
        let root = &container.built.root;
        let _limiting = self.limiting(resources);
        let number = |disk| self.disk_number(root, disk);
        container.cgroup.change(resources, devices, number)
    }

    /// Keeps others from changing limits of disks, if these limits are such. Others need not wait: to lower a limit of memory may take long.
    fn limiting(&self, resources: &LinuxResources) -> Option<MutexGuard<'_, ()>> {
        let lock = || self.limiting.lock().unwrap_or_else(PoisonError::into_inner);
        limits::have_disks(resources).then(lock)
    }

    /// The number (`MAJOR:MINOR`) of a disk that a limit names; none if a container with this root has no such disk.
    fn disk_number(&self, root: &Root, disk: u32) -> Result<Option<String>, Error> {
        let what = || format!("finding the disk {disk} for a limit");
        let number = |device| format!("{}:{}", major(device), minor(device));
        match (disk, root.disk()) {
            (SCRATCH_DISK, _) => {
                let scratch = rustix::fs::stat(self.paths.run.join("scratch")).context(what)?;
                Ok(Some(number(scratch.st_dev)))
            }
            (ROOT_DISK, None) => Ok(None),
            (ROOT_DISK, Some(slot)) => {
                let node = rustix::fs::stat(disk::node(slot, None)?).context(what)?;
                Ok(Some(number(node.st_rdev)))
            }
            _ => Err(Error::InvalidArgument(format!(
                "linux.resources: there is no disk {disk}"
            ))),
        }
    }

    /// Starts a container's init, or an exec.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let (channel, starting) = if exec_id.is_empty() {
            let (channel, starting) = process.start()?;
            channel.go_on()?;
            (channel, starting)
        } else {
            container.admits_execs()?;
            let starting = process.start_added()?;
            let made = self.make_exec(&container, &process);
            (made.inspect_err(|_| process.never_was())?, starting)
        };
        let started = self.until_started(&channel, &process).await;
        drop(starting);
        if started.is_err() {
            // It is about to end; after this answer it has ended, and may be deleted.
            process.wait().await;
            self.forget_streams(&process);
        }
        started.map(|()| process)
    }

    /// Removes a stopped container, or one that was never started, and returns its init.
    pub async fn delete(&self, id: &str) -> Result<Arc<Process>, Error> {
        let container = self.container(id)?;
        let init = container.init.clone();
        match init.status() {
            Status::Running => {
                return Err(Error::FailedPrecondition(format!(
                    "cannot delete a running process: container {id:?} has not been stopped"
                )));
            }
            Status::Added | Status::Created => match init.kill(libc::SIGKILL) {
                // It has ended by itself, which is about to be noted.
                Ok(()) | Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            },
            Status::Stopped => {}
        }
        self.containers().insert(id.into(), None);
        let removed = async {
            init.wait().await;
            container.cgroup.remove().await
        };
        if let Err(error) = removed.await {
            self.containers().insert(id.into(), Some(container));
            return Err(error);
        }
        for process in container.execs().iter().chain([&init]) {
            self.forget_streams(process);
        }
        self.containers().remove(id);
        scratch::discard(&self.paths, id)?;
        // With nobody left the machine is about to end, and its disk with it.
        if !self.containers().is_empty() {
            scratch::clean(&self.paths)?;
        }
        Ok(init)
    }

    /// Ends the wait for streams that never came.
    pub fn forget_streams(&self, process: &Process) {
        for name in process.streams.names() {
            self.streams.forget(name);
        }
    }

    /// Closes the streams of what was not made.
    fn refuse_streams(&self, streams: &process::Streams) {
        for name in streams.names() {
            self.streams.refuse(name);
        }
    }

    /// Notes a process that was just made.
    pub(crate) fn born(&self, process: &Process, pid: Pid, descriptor: OwnedFd, owner: Owner) {
        process.made(pid, descriptor);
        self.children().insert(process.pid(), owner);
    }

    pub(crate) fn null(&self) -> &OwnedFd {
        &self.null
    }

    pub(crate) fn pid_namespace(&self) -> BorrowedFd<'_> {
        self.pid_namespace.as_fd()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn children(&self) -> MutexGuard<'_, HashMap<u32, Owner>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has a container's programs kept in memory, and tells of out-of-memory kills while they happen, until its init ends.
async fn watch_memory(container: Arc<Container>, kills: Arc<Kills>) {
    // A kernel without the memory controller has no such file, and no such kills.
    let Ok(events) = container.cgroup.events("memory.events") else {
        return;
    };
    let watch = async {
        let mut programs = Programs::default();
        loop {
            if events.changed().await.is_err() {
                return;
            }
            container.check_memory(&kills);
            let mut kept = pin!(programs.keep(&container.cgroup));
            let kept = loop {
                // Kills are told meanwhile.
                tokio::select! {
                    kept = &mut kept => break kept,
                    changed = events.changed() => match changed {
                        Ok(()) => container.check_memory(&kills),
                        Err(_) => return,
                    },
                }
            };
            if let Err(error) = kept {
                eprintln!("container {}: {error}", container.built.id);
            }
        }
    };
    tokio::select! {
        () = watch => {}
        _ = container.init.wait() => {}
    }
}
