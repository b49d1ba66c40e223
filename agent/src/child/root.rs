//! Mounts a container's root file system, in the mount namespace of the calling process.

use std::fmt::Display;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::disk;
use crate::error::{Context, Error};
use crate::oci::mount::Options;
use crate::oci::root::{Layer, Root, Source};
use crate::sys::mount_setattr;

/// Mounts a root and returns it unattached.
///
/// `scratch` is the container's own directory for what it writes, made here if the root needs it; `place` is any directory: layers are
/// attached there, one above the other, because overlayfs accepts only mounts of this namespace.
pub fn mount(root: &Root, scratch: &Path, place: &Path) -> Result<OwnedFd, Error> {
    if root.is_writable() {
        for directory in ["upper", "work"] {
            let directory = scratch.join(directory);
            std::fs::create_dir_all(&directory)
                .context(|| format!("making {}", directory.display()))?;
        }
    }
    match root {
        Root::Plain(layer) => mount_layer(layer, false),
        Root::Empty => {
            let upper = scratch.join("upper");
            clone_tree(&upper).context(|| format!("opening {}", upper.display()))
        }
        Root::Overlay { layers, options } => overlay(layers, options, scratch, place),
    }
}

fn overlay(
    layers: &[Layer],
    options: &Options,
    scratch: &Path,
    place: &Path,
) -> Result<OwnedFd, Error> {
    let filesystem = Filesystem::open("overlay")?;
    // What is shown as mounted.
    filesystem.set("source", "overlay")?;
    let mut mounts = Vec::with_capacity(layers.len());
    for layer in layers {
        let mount = mount_layer(layer, true)?;
        attach(&mount, place).context(|| format!("attaching a layer to {}", place.display()))?;
        // A path that leads to the mount itself, however many are attached above it.
        filesystem.set("lowerdir+", &format!("/proc/self/fd/{}", mount.as_raw_fd()))?;
        mounts.push(mount);
    }
    if !options.flags.contains(rustix::mount::MountFlags::RDONLY) {
        let (upper, work) = (scratch.join("upper"), scratch.join("work"));
        if let Some(top) = mounts.first() {
            imitate(top, &upper)?;
        }
        filesystem.set("upperdir", path(&upper)?)?;
        filesystem.set("workdir", path(&work)?)?;
    }
    filesystem.mount(options)
}

/// The root directory's owner and mode are those of the topmost directory: that must not show.
fn imitate(layer: &OwnedFd, upper: &Path) -> Result<(), Error> {
    let what = || format!("giving {} its layer's owner and mode", upper.display());
    let wanted = rustix::fs::fstat(layer).context(what)?;
    let given = rustix::fs::stat(upper).context(what)?;
    if (wanted.st_uid, wanted.st_gid) != (given.st_uid, given.st_gid) {
        std::os::unix::fs::chown(upper, Some(wanted.st_uid), Some(wanted.st_gid)).context(what)?;
    }
    if wanted.st_mode != given.st_mode {
        rustix::fs::chmod(upper, Mode::from_raw_mode(wanted.st_mode)).context(what)?;
    }
    Ok(())
}

fn mount_layer(layer: &Layer, read_only: bool) -> Result<OwnedFd, Error> {
    match &layer.source {
        Source::Directory(directory) => {
            let what = || format!("opening the root {}", directory.display());
            let tree = clone_tree(directory).context(what)?;
            mount_setattr(tree.as_fd(), layer.options.attributes, false).context(what)?;
            Ok(tree)
        }
        Source::Disk {
            slot,
            partition,
            kind,
        } => {
            let filesystem = Filesystem::open(kind)?;
            filesystem.set("source", path(&disk::node(*slot, *partition)?)?)?;
            let mut options = layer.options.clone();
            if read_only {
                options.flags |= rustix::mount::MountFlags::RDONLY;
            }
            filesystem.mount(&options)
        }
    }
}

/// Attaches a mount to a directory, or to a file if it is a file.
pub fn attach(mount: &OwnedFd, target: &Path) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(mount, "", CWD, target, flags)
}

/// A copy of the mounts at and below a path, unattached.
pub fn clone_tree(path: &Path) -> rustix::io::Result<OwnedFd> {
    open_tree(
        CWD,
        path,
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE,
    )
}

fn path(path: &Path) -> Result<&str, Error> {
    path.to_str()
        .ok_or_else(|| Error::Failed(format!("the path {} is not UTF-8", path.display())))
}

/// A file system that is being configured; errors carry what the kernel says of them.
struct Filesystem<'a> {
    kind: &'a str,
    context: OwnedFd,
}

impl<'a> Filesystem<'a> {
    fn open(kind: &'a str) -> Result<Self, Error> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
            .context(|| format!("opening the file system {kind}"))?;
        Ok(Self { kind, context })
    }

    fn set(&self, key: &str, value: &str) -> Result<(), Error> {
        fsconfig_set_string(&self.context, key, value)
            .map_err(|errno| self.error(&format!("{key}={value}"), errno))
    }

    /// Configures what is left and mounts it.
    fn mount(&self, options: &Options) -> Result<OwnedFd, Error> {
        for option in &options.data {
            match option.split_once('=') {
                Some((key, value)) => self.set(key, value)?,
                None => fsconfig_set_flag(&self.context, option.as_str())
                    .map_err(|errno| self.error(option, errno))?,
            }
        }
        let mut attributes = MountAttrFlags::from_bits_retain(options.attributes.set as u32);
        if options.flags.contains(rustix::mount::MountFlags::RDONLY) {
            fsconfig_set_flag(&self.context, "ro").map_err(|errno| self.error("ro", errno))?;
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        fsconfig_create(&self.context).map_err(|errno| self.error("create", errno))?;
        fsmount(&self.context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|errno| self.error("mount", errno))
    }

    fn error(&self, step: &str, cause: impl Display) -> Error {
        let mut log = [0; 512];
        let said = match rustix::io::read(&self.context, &mut log) {
            Ok(length) => format!(" ({})", String::from_utf8_lossy(&log[..length]).trim()),
            Err(_) => String::new(),
        };
        Error::Failed(format!(
            "mounting the root file system, {}, {step}: {cause}{said}",
            self.kind
        ))
    }
}
