//! Mounts a container's root file system, in the mount namespace of the calling process.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::filesystem::Filesystem;
use super::{Container, identities};
use crate::disk;
use crate::error::{Context, Error};
use crate::oci::mount::Options;
use crate::oci::root::{Binds, Layer, Root, Source};
use crate::sys::{map_mount, mount_setattr};

/// Mounts the file system in which sources of the container's binds lie, if there is one.
pub fn mount_binds(container: &Container) -> Result<(), Error> {
    let Some(Binds { place, layer }) = &container.binds else {
        return Ok(());
    };
    let what = || format!("mounting what is bound at {}", place.display());
    std::fs::create_dir_all(place).context(what)?;
    attach(&mount_layer(layer, None, true)?, place).context(what)
}

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
    let identities = root.mappings().map(identities::namespace).transpose()?;
    let identities = identities.as_ref().map(AsFd::as_fd);
    match root {
        Root::Plain(layer) => mount_layer(layer, identities, false),
        Root::Empty => {
            let upper = scratch.join("upper");
            clone_tree(&upper).context(|| format!("opening {}", upper.display()))
        }
        Root::Overlay { layers, options } => overlay(layers, identities, options, scratch, place),
    }
}

fn overlay(
    layers: &[Layer],
    identities: Option<BorrowedFd<'_>>,
    options: &Options,
    scratch: &Path,
    place: &Path,
) -> Result<OwnedFd, Error> {
    let filesystem = Filesystem::open("overlay")?;
    // What is shown as mounted.
    filesystem.set("source", "overlay")?;
    let mut mounts = Vec::with_capacity(layers.len());
    for layer in layers {
        let mount = mount_layer(layer, identities, true)?;
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

/// Mounts a layer, with its identities as a user namespace has them, if one is given.
fn mount_layer(
    layer: &Layer,
    identities: Option<BorrowedFd<'_>>,
    read_only: bool,
) -> Result<OwnedFd, Error> {
    let mount = match &layer.source {
        Source::Directory(directory) => {
            let what = || format!("opening the root {}", directory.display());
            let tree = clone_tree(directory).context(what)?;
            mount_setattr(tree.as_fd(), layer.options.attributes, false).context(what)?;
            tree
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
            filesystem.mount(&options)?
        }
    };
    if let Some(identities) = identities {
        map_mount(mount.as_fd(), identities, false)
            .context(|| "mapping the identities of the root".into())?;
    }
    Ok(mount)
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
