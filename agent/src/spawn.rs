//! Makes the processes of containers.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use crate::agent::{Agent, Owner};
use crate::cgroup::Cgroup;
use crate::child;
use crate::child::channel::{self, Parent, Report};
use crate::child::outside::Outside;
use crate::container::Container;
use crate::error::{Context, Error};
use crate::oci::Join;
use crate::oci::mapping::Mappings;
use crate::plan::{Plan, TimeOffset, write_time_offsets};
use crate::process::{Process, Status};
use crate::stdio;
use crate::sys::{self, Fork};

impl Agent {
    /// Makes the init of a container and waits until it is ready for its start.
    pub(crate) async fn make_init(
        &self,
        plan: &Plan,
        process: &Arc<Process>,
        cgroup: &Cgroup,
    ) -> Result<Parent, Error> {
        let container = &plan.container;
        let (pid_namespace, joined) = self.open_joined(&plan.joins)?;
        let outside = match container.needs_outside() {
            true => Some(self.prepare_outside(container).await?),
            false => None,
        };
        let (parent, end) = channel::pair()?;
        let owner = plan.mappings.user(process.program.uid.as_raw());
        let (stdio, relays) = stdio::prepare(process, owner, self.null())?;
        // The cgroup namespace is made by the process itself, when it is in its group.
        let new = container.namespaces.new & !(sys::CLONE_NEWCGROUP | sys::CLONE_NEWTIME);
        let time = container.namespaces.has(sys::CLONE_NEWTIME);
        let fork = self.in_new_time(time.then_some(plan.time_offsets.as_slice()), || {
            let pid_namespace = pid_namespace.as_ref().map(AsFd::as_fd);
            self.in_pid_namespace(pid_namespace, || {
                sys::fork_into(new, Some(cgroup.directory()))
            })
            .context(|| "making a process".into())
        })?;
        match fork {
            Fork::Child => child::init(container, &process.program, &joined, outside, stdio, &end),
            Fork::Parent(pid, descriptor) => {
                let owner = Owner::Unborn(process.clone());
                self.born(process, pid, descriptor, owner);
                relays.start(process, &self.streams);
            }
        }
        // Its end is the process's alone now: that it is closed means something.
        drop(end);
        adjust_oom_score(process)?;
        self.until_ready(&parent, process, &plan.mappings).await?;
        Ok(parent)
    }

    /// Opens namespaces of other containers: that of processes, which a process must be born in, and those that it enters by itself.
    fn open_joined(&self, joins: &[Join]) -> Result<(Option<OwnedFd>, Vec<OwnedFd>), Error> {
        let mut pid_namespace = None;
        let mut others = Vec::new();
        for Join { kind, container } in joins {
            let init = self.container(container)?.init.clone();
            if init.status() == Status::Stopped {
                return Err(Error::FailedPrecondition(format!(
                    "cannot join a namespace of container {container:?}: it is stopped"
                )));
            }
            let name = match *kind {
                sys::CLONE_NEWPID => "pid",
                sys::CLONE_NEWIPC => "ipc",
                sys::CLONE_NEWUTS => "uts",
                sys::CLONE_NEWCGROUP => "cgroup",
                kind => {
                    return Err(Error::InvalidArgument(format!(
                        "no container can share its namespace of type {kind:#x}"
                    )));
                }
            };
            // The agent has not waited for it yet, so the number is still its own.
            let path = format!("/proc/{}/ns/{name}", init.pid());
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let namespace = rustix::fs::open(&path, flags, Mode::empty());
            let namespace = namespace
                .context(|| format!("opening the {name} namespace of container {container:?}"))?;
            match *kind {
                sys::CLONE_NEWPID => pid_namespace = Some(namespace),
                _ => others.push(namespace),
            }
        }
        Ok((pid_namespace, others))
    }

    /// Prepares, in a process of its own that then ends, what the init of a container could not.
    async fn prepare_outside(&self, container: &child::Container) -> Result<Outside, Error> {
        let (parent, end) = channel::pair()?;
        let fork = sys::fork_into(sys::CLONE_NEWNS, None);
        match fork.context(|| "making a process to prepare a container".into())? {
            Fork::Child => child::outside::run(container, &end),
            Fork::Parent(..) => drop(end),
        }
        let mut prepared = VecDeque::new();
        loop {
            match parent.report().await? {
                Report::Descriptor(mount) => prepared.push_back(mount),
                Report::Failed(error) => return Err(error),
                Report::NeedsMappings | Report::Ready | Report::Gone => break,
            }
        }
        match prepared.pop_front() {
            Some(root) if prepared.len() == container.mounts_outside() => Ok(Outside {
                root,
                mounts: prepared,
            }),
            _ => Err(Error::Failed(
                "the process that prepares the container has ended without a result".into(),
            )),
        }
    }

    async fn until_ready(
        &self,
        channel: &Parent,
        process: &Arc<Process>,
        mappings: &Mappings,
    ) -> Result<(), Error> {
        loop {
            match channel.report().await? {
                Report::NeedsMappings => {
                    mappings.write(process.pid())?;
                    let pid = i32::try_from(process.pid()).ok().and_then(Pid::from_raw);
                    process.program.raise_limits(pid)?;
                    channel.go_on()?;
                }
                Report::Descriptor(terminal) => {
                    stdio::connect_terminal(process, terminal, &self.streams)?;
                }
                Report::Ready => return Ok(()),
                Report::Failed(error) => return Err(cannot_run(error)),
                Report::Gone => {
                    return Err(cannot_run(Error::Failed(
                        "it was killed before it could start, as happens when the memory limit is too small".into(),
                    )));
                }
            }
        }
    }

    /// Waits until a process has started its program.
    pub(crate) async fn until_started(
        &self,
        channel: &Parent,
        process: &Arc<Process>,
    ) -> Result<(), Error> {
        loop {
            match channel.report().await? {
                Report::Descriptor(terminal) => {
                    stdio::connect_terminal(process, terminal, &self.streams)?;
                }
                // The start of its program has closed its end, as its death would have.
                Report::Gone => return Ok(()),
                Report::Failed(error) => return Err(cannot_run(error)),
                Report::NeedsMappings | Report::Ready => {
                    return Err(Error::Failed(
                        "a process reports what has no meaning now".into(),
                    ));
                }
            }
        }
    }

    /// Makes a further process of a container, which starts its program without further order.
    pub(crate) fn make_exec(
        &self,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<Parent, Error> {
        let id = &container.built.id;
        let target = container.init.descriptor().ok_or_else(|| {
            Error::FailedPrecondition(format!("container {id:?} has no first process"))
        })?;
        let (parent, end) = channel::pair()?;
        let owner = container.mappings.user(process.program.uid.as_raw());
        let (stdio, relays) = stdio::prepare(process, owner, self.null())?;
        // Perhaps asked for since it was described: its program must not find another.
        let size = process.size();
        let own = container.built.namespaces.entered() & sys::CLONE_NEWPID != 0;
        let cgroup = &container.cgroup;
        let fork = self.in_pid_namespace(own.then_some(target.as_fd()), || {
            match sys::fork_into(0, Some(cgroup.directory())) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    let group = cgroup.directory_of(container.init.pid())?;
                    sys::fork_into(0, Some(group.as_fd()))
                }
                made => made,
            }
        });
        match fork.context(|| format!("making a process in container {id:?}"))? {
            Fork::Child => {
                let target = target.as_fd();
                child::exec(
                    &container.built,
                    &process.program,
                    size,
                    target,
                    stdio,
                    &end,
                )
            }
            Fork::Parent(pid, descriptor) => {
                let owner = Owner::Member(container.clone(), process.clone());
                self.born(process, pid, descriptor, owner);
                relays.start(process, &self.streams);
            }
        }
        drop(end);
        adjust_oom_score(process)?;
        Ok(parent)
    }

    /// Runs `make` so that the child it makes is born in the PID namespace of `target`.
    fn in_pid_namespace(
        &self,
        target: Option<BorrowedFd<'_>>,
        make: impl FnOnce() -> std::io::Result<Fork>,
    ) -> std::io::Result<Fork> {
        let Some(target) = target else { return make() };
        sys::setns(target, sys::CLONE_NEWPID)?;
        let made = make();
        if !matches!(made, Ok(Fork::Child)) {
            sys::setns(self.pid_namespace(), sys::CLONE_NEWPID)?;
        }
        made
    }

    /// Runs `make` so that the child it makes is born in a new time namespace, if offsets are given, with these.
    fn in_new_time(
        &self,
        offsets: Option<&[TimeOffset]>,
        make: impl FnOnce() -> Result<Fork, Error>,
    ) -> Result<Fork, Error> {
        let what = || "making a time namespace".to_owned();
        let Some(offsets) = offsets else {
            return make();
        };
        let own = rustix::fs::open(
            "/proc/self/ns/time",
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        );
        let own = own.context(what)?;
        sys::unshare(sys::CLONE_NEWTIME).context(what)?;
        let made = write_time_offsets(offsets).and_then(|()| make());
        if !matches!(made, Ok(Fork::Child)) {
            sys::setns(own.as_fd(), sys::CLONE_NEWTIME).context(what)?;
        }
        made
    }
}

fn adjust_oom_score(process: &Process) -> Result<(), Error> {
    match process.program.oom_score_adjustment {
        None => Ok(()),
        Some(score) => {
            let path = format!("/proc/{}/oom_score_adj", process.pid());
            std::fs::write(&path, score.to_string())
                .context(|| format!("setting process.oomScoreAdj to {score}"))
        }
    }
}

/// Says what an error of a process's own means for the request, in the words that container tools look for.
fn cannot_run(error: Error) -> Error {
    Error::Failed(format!("unable to start container process: {error}"))
}
