//! What a new process of a container does until its program runs.
//!
//! Each process begins as a copy of the agent (see [`crate::sys::fork_into`]) and runs the code of this module, so that everything slow
//! (disks, mounts) happens in it and the agent answers other requests meanwhile. It ends in the program's start or in a report of
//! the error; it never returns to the agent's code.
//!
//! Of the agent's descriptors it closes at once all that are not meant for it: the other ends of other containers' streams wait until
//! nobody has them. What it keeps is close-on-exec, and it is not dumpable, so no process of the container can reach into it or through it.

pub mod channel;
pub mod copy;
pub mod devices;
pub mod filesystem;
pub mod hooks;
pub mod identities;
pub mod mounts;
pub mod outside;
pub mod root;
pub mod search;
mod start;
pub mod terminal;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use oci_spec::runtime::{Hook, LinuxDevice};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::termios::Winsize;

use crate::error::{Context, Error};
use crate::oci::Namespaces;
use crate::oci::mount::Mount;
use crate::oci::program::Program;
use crate::oci::root::{Binds, Root};
use crate::sys;
use channel::Child;
use outside::Outside;

/// A container, in the terms in which it is built.
#[derive(Debug)]
pub struct Container {
    pub id: String,
    pub namespaces: Namespaces,
    pub root: Root,
    /// Where the sources of some of its binds are.
    pub binds: Option<Binds>,
    /// Where its writable layer lies.
    pub scratch: PathBuf,
    /// A directory of the guest that may be mounted on.
    pub place: PathBuf,
    /// The directory of its control group.
    pub cgroup: PathBuf,
    pub mounts: Vec<Mount>,
    pub devices: Vec<LinuxDevice>,
    pub read_only: bool,
    pub propagation: Option<MountPropagationFlags>,
    pub hostname: Option<String>,
    pub domainname: Option<String>,
    /// Below `/proc/sys`, with slashes.
    pub sysctls: Vec<(String, String)>,
    pub masked: Vec<String>,
    pub read_only_paths: Vec<String>,
    pub personality: Option<u32>,
    /// Run when the container is made, before its root becomes read-only.
    pub create_hooks: Vec<Hook>,
    /// Run when it is started.
    pub start_hooks: Vec<Hook>,
    /// What hooks are told of the container, but for its status and the process's number.
    pub state: serde_json::Value,
}

/// The standard streams of a process, or none of them for a terminal.
#[derive(Debug)]
pub struct Stdio {
    pub input: OwnedFd,
    pub output: OwnedFd,
    pub error: OwnedFd,
}

/// The init process of a container: enters the namespaces of other containers that it shares (`joined`), builds the container around
/// itself, waits for the order to start, and becomes the program.
pub fn init(
    container: &Container,
    program: &Program,
    joined: &[OwnedFd],
    outside: Option<Outside>,
    stdio: Option<Stdio>,
    channel: &Child,
) -> ! {
    let enter = || {
        let outside_descriptors = outside.iter().flat_map(Outside::descriptors);
        let kept = joined.iter().map(AsFd::as_fd).chain(outside_descriptors);
        begin(kept, stdio.as_ref(), channel)?;
        for namespace in joined {
            sys::setns(namespace.as_fd(), 0)
                .context(|| "entering a namespace of another container".into())?;
        }
        build(container, program, outside, stdio, channel)
    };
    end(enter(), channel)
}

/// A further process of a container whose init is `target` (a pidfd): joins its namespaces and becomes the program, in a terminal of
/// that size if it has one.
pub fn exec(
    container: &Container,
    program: &Program,
    size: Option<Winsize>,
    target: BorrowedFd<'_>,
    stdio: Option<Stdio>,
    channel: &Child,
) -> ! {
    end(
        join(container, program, size, target, stdio, channel),
        channel,
    )
}

fn end(result: Result<Infallible, Error>, channel: &Child) -> ! {
    let Err(error) = result;
    channel.failed(&error);
    sys::exit(1)
}

fn build(
    container: &Container,
    program: &Program,
    outside: Option<Outside>,
    stdio: Option<Stdio>,
    channel: &Child,
) -> Result<Infallible, Error> {
    let has = |flag| container.namespaces.has(flag);
    let in_user_namespace = has(sys::CLONE_NEWUSER);
    if in_user_namespace {
        channel.ask_for_mappings()?;
        become_root()?;
    }
    join_session(container)?;
    if has(sys::CLONE_NEWCGROUP) {
        // Only now, inside its group, because the namespace begins where its maker is.
        sys::unshare(sys::CLONE_NEWCGROUP).context(|| "making a cgroup namespace".into())?;
    }
    if has(sys::CLONE_NEWNET) {
        sys::loopback_up().context(|| "bringing the loopback interface up".into())?;
    }
    set_names(container)?;
    for (path, value) in &container.sysctls {
        if !container.is_set_outside(path) {
            outside::set(path, value)?;
        }
    }

    rustix::process::umask(Mode::empty());
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context(|| "making mounts private".into())?;
    // With a user namespace all that needs them is prepared outside.
    if !in_user_namespace {
        root::mount_binds(container)?;
    }
    let Outside { root, mut mounts } = match outside {
        Some(outside) => outside,
        None => Outside {
            root: root::mount(&container.root, &container.scratch, &container.place)?,
            mounts: VecDeque::new(),
        },
    };
    let prepare = |mount| mounts::prepare(mount, container, &mut mounts);
    let mounts = container.mounts.iter().map(prepare);
    let mounts: Vec<_> = mounts.collect::<Result<_, _>>()?;
    let devices = if container.own_devices() {
        devices::prepare(&container.devices, in_user_namespace)?
    } else {
        Vec::new()
    };
    let null = null_device()?;

    let guest = enter(&root, container)?;
    let mut unfinished = Vec::new();
    for mount in mounts {
        unfinished.extend(mount.mount()?);
    }
    if container.own_devices() {
        devices::make(&devices)?;
    }
    let terminal = match program.terminal {
        true => Some(terminal::open(program, program.size, true, channel)?),
        false => None,
    };
    if !program.directory.exists() {
        mounts::follow(&program.directory)
            .and_then(|directory| mounts::make_directories(&directory))
            .context(|| format!("making the directory {}", program.directory.display()))?;
    }
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    hooks::run(
        "createContainer",
        &container.create_hooks,
        &program.environment,
        &container.state,
        "creating",
    )?;
    for mount in unfinished {
        sys::mount_setattr(mount.as_fd(), mounts::READ_ONLY, false)
            .context(|| "making a mount read-only".into())?;
    }
    if container.read_only {
        sys::mount_setattr(root.as_fd(), mounts::READ_ONLY, false)
            .context(|| "making the root read-only".into())?;
    }
    mounts::make_read_only(&container.read_only_paths)?;
    mounts::mask(&container.masked, &null)?;
    // Not earlier: a user namespace may mount /proc only where another can be seen, and masks are copies of the guest's null device.
    leave(&guest, &root)?;
    // Not earlier: no root is changed for one whose mounts spread.
    if let Some(propagation) = container.propagation {
        rustix::mount::mount_change("/", propagation)
            .context(|| "setting the root's propagation".into())?;
    }
    if let Some(personality) = container.personality {
        sys::personality(personality).context(|| "setting the personality".into())?;
    }
    connect(terminal, stdio)?;
    start::start(
        program,
        &container.start_hooks,
        &container.state,
        Some(channel),
    )
}

fn join(
    container: &Container,
    program: &Program,
    size: Option<Winsize>,
    target: BorrowedFd<'_>,
    stdio: Option<Stdio>,
    channel: &Child,
) -> Result<Infallible, Error> {
    begin([target].into_iter(), stdio.as_ref(), channel)?;
    // The agent has arranged that this process was born in the container's PID namespace.
    let namespaces = container.namespaces.entered() & !sys::CLONE_NEWPID;
    if container.namespaces.has(sys::CLONE_NEWUSER) {
        program.raise_limits(None)?;
    }
    sys::setns(target, namespaces).context(|| "entering the container's namespaces".into())?;
    if container.namespaces.has(sys::CLONE_NEWUSER) {
        become_root()?;
    }
    // Only now: a user namespace has names of its own.
    join_session(container)?;
    if let Some(personality) = container.personality {
        sys::personality(personality).context(|| "setting the personality".into())?;
    }
    let terminal = match program.terminal {
        true => Some(terminal::open(program, size, false, channel)?),
        false => None,
    };
    connect(terminal, stdio)?;
    start::start(program, &[], &container.state, None)
}

/// What every process begins with. Of the agent's descriptors it keeps these, its streams and its channel.
fn begin<'fd>(
    kept: impl Iterator<Item = BorrowedFd<'fd>>,
    stdio: Option<&'fd Stdio>,
    channel: &'fd Child,
) -> Result<(), Error> {
    let stdio = stdio.map(|stdio| [&stdio.input, &stdio.output, &stdio.error]);
    let stdio = stdio.into_iter().flatten().map(AsFd::as_fd);
    let kept: Vec<_> = kept.chain(stdio).chain([channel.as_fd()]).collect();
    keep_only(&kept)?;
    sys::reset_signals().context(|| "resetting signals".into())?;
    rustix::process::setsid()
        .context(|| "beginning a session".into())
        .map(drop)
}

/// Closes all descriptors but the standard streams and these.
fn keep_only(kept: &[BorrowedFd<'_>]) -> Result<(), Error> {
    sys::close_copies(kept).context(|| "closing the agent's descriptors".into())
}

/// Joins the keyring that the processes of a container share.
fn join_session(container: &Container) -> Result<(), Error> {
    let keyring = std::ffi::CString::new(format!("_ses.{}", container.id));
    let keyring = keyring.context(|| "naming the session keyring".into())?;
    sys::join_session_keyring(&keyring).context(|| "joining a session keyring".into())
}

/// Takes the identity of root in a user namespace.
fn become_root() -> Result<(), Error> {
    let what = || "becoming root in the user namespace".to_owned();
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).context(what)?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).context(what)?;
    match rustix::thread::set_thread_groups(&[]) {
        // The mapping may forbid setgroups; then no groups can be taken either.
        Err(rustix::io::Errno::PERM) => Ok(()),
        other => other.context(what),
    }
}

fn set_names(container: &Container) -> Result<(), Error> {
    if let Some(name) = &container.hostname {
        rustix::system::sethostname(name.as_bytes())
            .context(|| format!("setting the host name {name:?}"))?;
    }
    if let Some(name) = &container.domainname {
        rustix::system::setdomainname(name.as_bytes())
            .context(|| format!("setting the domain name {name:?}"))?;
    }
    Ok(())
}

/// The guest's own null device: whatever a container's image has at `/dev/null` is not trusted.
fn null_device() -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open("/dev/null", flags, Mode::empty()).context(|| "opening /dev/null".into())
}

/// Makes the mounted root the process's root, out of which no path leads, and returns the guest's.
fn enter(root: &OwnedFd, container: &Container) -> Result<OwnedFd, Error> {
    let what = || "entering the container's root".to_owned();
    root::attach(root, &container.place).context(what)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let guest = rustix::fs::open("/", flags, Mode::empty()).context(what)?;
    rustix::process::fchdir(root).context(what)?;
    rustix::process::chroot(".").context(what)?;
    Ok(guest)
}

/// Lets the guest's root go: the container's becomes that of its mount namespace.
fn leave(guest: &OwnedFd, root: &OwnedFd) -> Result<(), Error> {
    let what = || "letting the guest's root go".to_owned();
    rustix::process::fchdir(guest).context(what)?;
    rustix::process::chroot(".").context(what)?;
    rustix::process::fchdir(root).context(what)?;
    rustix::process::pivot_root(".", ".").context(what)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context(what)
}

/// Puts a terminal, or the standard streams, at descriptors 0, 1 and 2.
fn connect(terminal: Option<OwnedFd>, stdio: Option<Stdio>) -> Result<(), Error> {
    let what = || "connecting the standard streams".to_owned();
    let (input, output, error) = match (&terminal, &stdio) {
        (Some(terminal), _) => (terminal, terminal, terminal),
        (None, Some(stdio)) => (&stdio.input, &stdio.output, &stdio.error),
        (None, None) => return Err(Error::Failed("a process has no standard streams".into())),
    };
    rustix::stdio::dup2_stdin(input).context(what)?;
    rustix::stdio::dup2_stdout(output).context(what)?;
    rustix::stdio::dup2_stderr(error).context(what)
}

impl Container {
    /// Whether it has users of its own who see its control group alone, and may write there.
    pub fn may_divide_its_group(&self) -> bool {
        use crate::oci::mount::Kind;
        let own = [sys::CLONE_NEWUSER, sys::CLONE_NEWCGROUP];
        let writable = |mount: &Mount| {
            matches!(mount.kind, Kind::Cgroup) && !mount.options.flags.contains(MountFlags::RDONLY)
        };
        own.iter().all(|&kind| self.namespaces.has(kind)) && self.mounts.iter().any(writable)
    }

    /// Whether `/dev` is the container's own: a bind mount there brings its own devices.
    fn own_devices(&self) -> bool {
        use crate::oci::mount::Kind;
        !self
            .mounts
            .iter()
            .any(|mount| matches!(mount.kind, Kind::Bind { .. }) && mount.destination == *"/dev")
    }
}

/// Reads a small file of the container; none if it does not exist.
fn read_limited(path: &str, limit: u64) -> std::io::Result<Option<Vec<u8>>> {
    use std::io::Read;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        file => fs::File::from(file?),
    };
    let mut content = Vec::new();
    file.take(limit).read_to_end(&mut content)?;
    Ok(Some(content))
}
