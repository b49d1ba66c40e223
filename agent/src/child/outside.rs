//! What of a container is prepared outside it.
//!
//! The init of a container with a user namespace may do little with what belongs to the guest: not mount its disks, not open its directories,
//! not show its network in a sysfs. And whoever maps the identities of a mount must be able to see the processes of the guest. A process in
//! the guest's own namespaces, but for that of mounts, does these things first, and hands the mounts over without a place.

use std::collections::VecDeque;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::mount::MountPropagationFlags;

use super::channel::Child;
use super::{Container, identities, keep_only, mounts, root};
use crate::error::{Context, Error};
use crate::oci::mount::{Kind, Mount};
use crate::sys::{self, map_mount};

/// What has been prepared.
#[derive(Debug)]
pub struct Outside {
    pub root: OwnedFd,
    /// For each mount of which [`Container::is_prepared_outside`], in their order.
    pub mounts: VecDeque<OwnedFd>,
}

impl Outside {
    /// All of it.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.root]
            .into_iter()
            .chain(&self.mounts)
            .map(AsFd::as_fd)
    }
}

/// Settings of a network that is shared by containers with users of their own: none of them has a privilege in it, and each could use
/// every port, and ping, in a network namespace of its own.
const OPEN_NETWORK: [(&str, &str); 2] = [
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
];

impl Container {
    fn is_in_user_namespace(&self) -> bool {
        self.namespaces.has(sys::CLONE_NEWUSER)
    }

    /// Whether part of it must be prepared outside.
    pub fn needs_outside(&self) -> bool {
        self.is_in_user_namespace()
            || self.root.mappings().is_some()
            || self.mounts.iter().any(|mount| mount.mappings.is_some())
    }

    /// How many of its mounts are prepared outside.
    pub fn mounts_outside(&self) -> usize {
        let mounts = self.mounts.iter();
        mounts
            .filter(|mount| self.is_prepared_outside(mount))
            .count()
    }

    /// Whether a mount is prepared outside.
    pub fn is_prepared_outside(&self, mount: &Mount) -> bool {
        // A file system shows a namespace of the guest, which only the guest's own users may mount.
        let shared = |namespace| !self.namespaces.has(namespace);
        match &mount.kind {
            Kind::Bind { .. } => self.is_in_user_namespace() || mount.mappings.is_some(),
            Kind::Cgroup => self.is_in_user_namespace() && shared(sys::CLONE_NEWCGROUP),
            Kind::Filesystem { kind, .. } => {
                self.is_in_user_namespace()
                    && match kind.as_str() {
                        "proc" => shared(sys::CLONE_NEWPID),
                        "sysfs" => shared(sys::CLONE_NEWNET),
                        "mqueue" => shared(sys::CLONE_NEWIPC),
                        _ => false,
                    }
            }
        }
    }

    /// Whether a setting is made outside.
    pub fn is_set_outside(&self, setting: &str) -> bool {
        self.is_in_user_namespace()
            && !self.namespaces.has(sys::CLONE_NEWNET)
            && setting.starts_with("net/")
    }
}

/// Prepares what a container needs from outside, hands it over (the root first, then the mounts) and ends.
pub fn run(container: &Container, channel: &Child) -> ! {
    let code = match prepare(container, channel) {
        Ok(()) => 0,
        Err(error) => {
            channel.failed(&error);
            1
        }
    };
    sys::exit(code)
}

fn prepare(container: &Container, channel: &Child) -> Result<(), Error> {
    keep_only(&[channel.as_fd()])?;
    if container.is_set_outside("net/") {
        let asked = container.sysctls.iter();
        let asked = asked.map(|(path, value)| (path.as_str(), value.as_str()));
        for (path, value) in OPEN_NETWORK.into_iter().chain(asked) {
            if container.is_set_outside(path) {
                set(path, value)?;
            }
        }
    }
    rustix::process::umask(rustix::fs::Mode::empty());
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context(|| "making mounts private".into())?;
    root::mount_binds(container)?;
    let root = root::mount(&container.root, &container.scratch, &container.place)?;
    channel.hand_over(root.as_fd())?;
    for mount in &container.mounts {
        if container.is_prepared_outside(mount) {
            let source = mounts::open(mount, container)?;
            if let Some(mappings) = &mount.mappings {
                let identities = identities::namespace(mappings)?;
                let recursive = mount.options.id_mapped == Some(true);
                map_mount(source.as_fd(), identities.as_fd(), recursive).context(|| {
                    let destination = mount.destination.display();
                    format!("mapping the identities of the mount on {destination}")
                })?;
            }
            channel.hand_over(source.as_fd())?;
        }
    }
    Ok(())
}

/// Makes a setting below `/proc/sys`.
pub fn set(path: &str, value: &str) -> Result<(), Error> {
    let path = Path::new("/proc/sys").join(path);
    fs::write(&path, value)
        .context(|| format!("linux.sysctl: setting {} to {value:?}", path.display()))
}
