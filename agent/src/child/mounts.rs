//! The mounts of a container, and what of them is hidden or read-only.
//!
//! What comes from the guest is opened before the container's root becomes the process's root, everything is mounted after that:
//! no path of a container, whatever symbolic links it has, can lead out of it. But those below `/proc` that stand for open files and for
//! the roots of processes can, as the kernel follows them. So a path on which something is made or mounted is followed by [`follow`].

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, OpenTreeFlags, fsconfig_create, fsmount,
    fsopen, mount, mount_change, open_tree,
};

use super::Container;
use super::filesystem::Filesystem;
use super::root::{attach, clone_tree};
use crate::error::{Context, Error};
use crate::oci::mount::{Kind, Mount};
use crate::sys::{CLONE_NEWCGROUP, MountAttributes, mount_setattr};

/// A mount whose source has been opened, if it has one that must be.
#[derive(Debug)]
pub struct Prepared<'a> {
    mount: &'a Mount,
    source: Option<OwnedFd>,
}

/// Opens what a mount takes from the guest, unless it has been opened outside (`from_outside`, in the order of the mounts).
pub fn prepare<'a>(
    mount: &'a Mount,
    container: &Container,
    from_outside: &mut VecDeque<OwnedFd>,
) -> Result<Prepared<'a>, Error> {
    let source = match &mount.kind {
        _ if container.is_prepared_outside(mount) => {
            let source = from_outside.pop_front();
            Some(source.ok_or_else(|| Error::Failed("a mount has not been prepared".into()))?)
        }
        Kind::Bind { .. } => Some(open(mount, container)?),
        // Without a cgroup namespace a container sees its own group only, as it would with one.
        Kind::Cgroup if !container.namespaces.has(CLONE_NEWCGROUP) => Some(open(mount, container)?),
        Kind::Cgroup | Kind::Filesystem { .. } => None,
    };
    Ok(Prepared { mount, source })
}

/// Opens what a mount takes from the guest.
pub fn open(mount: &Mount, container: &Container) -> Result<OwnedFd, Error> {
    let what = |source: &Path| {
        let (source, destination) = (source.display(), mount.destination.display());
        format!("opening {source} to mount it on {destination}")
    };
    match &mount.kind {
        Kind::Bind { source, recursive } => {
            let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            if *recursive {
                flags |= OpenTreeFlags::AT_RECURSIVE;
            }
            let copy = copy_of(source, mount, container).context(|| what(source))?;
            let source = copy.as_deref().unwrap_or(source);
            open_tree(CWD, source, flags).context(|| what(source))
        }
        Kind::Cgroup => clone_tree(&container.cgroup).context(|| what(&container.cgroup)),
        Kind::Filesystem { kind, source } => {
            let filesystem = Filesystem::open(kind)?;
            filesystem.set("source", source)?;
            filesystem.mount(&mount.options)
        }
    }
}

/// A copy of a file of the host, on the scratch disk, if it is bound writable: what was brought here of the host cannot be written to.
fn copy_of(source: &Path, mount: &Mount, container: &Container) -> io::Result<Option<PathBuf>> {
    let name = container.binds.as_ref();
    let name = name.and_then(|binds| source.strip_prefix(&binds.place).ok());
    let read_only = [mount.options.attributes, mount.options.recursive]
        .iter()
        .any(|attributes| attributes.set & libc::MOUNT_ATTR_RDONLY != 0);
    let Some(name) = name.filter(|_| !read_only) else {
        return Ok(None);
    };
    let directory = container.scratch.join("binds");
    fs::create_dir_all(&directory)?;
    let copy = directory.join(name);
    super::copy::file(source, &copy)?;
    Ok(Some(copy))
}

impl Prepared<'_> {
    /// Mounts it, now that the container's root is the process's root. Returns what is to be made read-only when everything is in place: a
    /// tmpfs, and what is at `/dev`, are filled by later mounts.
    pub fn mount(self) -> Result<Option<OwnedFd>, Error> {
        let mut unfinished = None;
        let named = self.mount.destination.as_path();
        let what = || format!("mounting {}", named.display());
        let options = &self.mount.options;
        if let Kind::Filesystem { kind, .. } = &self.mount.kind
            && matches!(kind.as_str(), "proc" | "sysfs")
        {
            require_plain_directory(named)?;
        }
        let destination = &follow(named).context(what)?;
        match (&self.mount.kind, self.source) {
            (_, Some(source)) => {
                make_target(destination, is_directory(&source).context(what)?).context(what)?;
                if options.attributes != MountAttributes::default() {
                    mount_setattr(source.as_fd(), options.attributes, false).context(what)?;
                }
                attach(&source, destination).context(what)?;
            }
            (Kind::Filesystem { kind, source }, None) => {
                // A tmpfs has the mode of the directory that it covers, if it is given none.
                let covered = match kind.as_str() {
                    "tmpfs" => fs::metadata(destination).ok(),
                    _ => None,
                };
                let mode = covered.map(|found| format!("mode={:o}", found.mode() & 0o7777));
                make_target(destination, true).context(what)?;
                let kept = options.copy_up.then(|| clone_tree(destination));
                let kept = kept.transpose().context(what)?;
                let late = match kind == "tmpfs" || named == Path::new("/dev") {
                    true => options.flags & MountFlags::RDONLY,
                    false => MountFlags::empty(),
                };
                new(kind, source, destination, self.mount, mode, late)?;
                if let Some(kept) = kept {
                    super::copy::contents(&kept, destination).context(|| {
                        format!("copying what was at {} into its tmpfs", named.display())
                    })?;
                }
                if !late.is_empty() {
                    let mounted = open_tree(CWD, destination, OpenTreeFlags::OPEN_TREE_CLOEXEC);
                    unfinished = Some(mounted.context(what)?);
                }
            }
            (Kind::Cgroup, None) => {
                make_target(destination, true).context(what)?;
                let none = MountFlags::empty();
                new("cgroup2", "cgroup", destination, self.mount, None, none)?;
            }
            // prepare() opened it.
            (Kind::Bind { .. }, None) => {}
        }
        if options.recursive != MountAttributes::default() {
            set_attributes(destination, options.recursive, true).context(what)?;
        }
        for &propagation in &options.propagation {
            mount_change(destination, propagation).context(what)?;
        }
        Ok(unfinished)
    }
}

/// What makes a mount read-only.
pub const READ_ONLY: MountAttributes = MountAttributes {
    set: libc::MOUNT_ATTR_RDONLY,
    clear: 0,
};

/// Changes the attributes of what is mounted at a path.
fn set_attributes(path: &Path, attributes: MountAttributes, recursive: bool) -> io::Result<()> {
    let mounted = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    mount_setattr(mounted.as_fd(), attributes, recursive)
}

/// Mounts a file system where the destination of its entry leads, with an option before those of the entry, and without the flags `late`.
fn new(
    kind: &str,
    source: &str,
    destination: &Path,
    entry: &Mount,
    first: Option<String>,
    late: MountFlags,
) -> Result<(), Error> {
    let what = || format!("mounting {kind} on {}", entry.destination.display());
    let options = first.iter().chain(&entry.options.data);
    let options: Vec<&str> = options.map(String::as_str).collect();
    let data = std::ffi::CString::new(options.join(",")).context(what)?;
    let flags = entry.options.flags & !late;
    mount(source, destination, kind, flags, data.as_c_str()).context(what)
}

/// A link at `/proc` or `/sys` would let an image choose where the kernel's files appear, and where not.
fn require_plain_directory(path: &Path) -> Result<(), Error> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_dir() => Err(Error::InvalidArgument(format!(
            "{} must be a directory in the image, and no link: the kernel's files are mounted on it",
            path.display()
        ))),
        // Not there yet, or whatever the mount itself will say.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Makes the directory or file that is mounted on, unless it is there. No part of its path may be a link.
fn make_target(path: &Path, directory: bool) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    if directory {
        return make_directories(path);
    }
    if let Some(parent) = path.parent() {
        make_directories(parent)?;
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).mode(0o755);
    options.open(path).map(drop)
}

/// Makes a directory that everybody may enter, and those above it, unless they are there. (The umask is zero here.)
pub fn make_directories(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
}

/// Where a path leads in the process's root, with no link in it: links may lead to what does not exist yet. What they say is all that counts,
/// also of those below `/proc` that the kernel follows to the file itself, wherever it is.
pub fn follow(path: &Path) -> io::Result<PathBuf> {
    const MAX_LINKS: usize = 40;
    let mut followed = PathBuf::from("/");
    let mut rest: Vec<PathBuf> = reversed(path);
    let mut links = 0;
    while let Some(part) = rest.pop() {
        match part.components().next() {
            Some(Component::RootDir) => followed = part,
            Some(Component::ParentDir) => drop(followed.pop()),
            Some(Component::Normal(_)) => match fs::read_link(followed.join(&part)) {
                Ok(_) if links == MAX_LINKS => return Err(Errno::LOOP.into()),
                Ok(target) => {
                    links += 1;
                    rest.extend(reversed(&target));
                }
                // No link, or whatever those will say who use the path.
                Err(_) => followed.push(part),
            },
            Some(Component::CurDir | Component::Prefix(_)) | None => {}
        }
    }
    Ok(followed)
}

/// Where what a path names is, or would be: a link that is there itself, and not what it leads to.
pub fn follow_parent(path: &Path) -> io::Result<PathBuf> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(follow(parent)?.join(name)),
        _ => follow(path),
    }
}

fn reversed(path: &Path) -> Vec<PathBuf> {
    path.iter().rev().map(PathBuf::from).collect()
}

fn is_directory(file: impl AsFd) -> rustix::io::Result<bool> {
    let mode = rustix::fs::fstat(file)?.st_mode;
    Ok(rustix::fs::FileType::from_raw_mode(mode).is_dir())
}

/// Covers paths so that nothing of them can be read: a file by `null`, a directory by an empty, read-only one. A path that does not
/// exist needs no cover. `null` must lie in a mount of this namespace.
pub fn mask(paths: &[String], null: &OwnedFd) -> Result<(), Error> {
    let mut empty = None;
    for path in paths.iter().map(Path::new) {
        let what = || format!("masking {}", path.display());
        let path = &follow(path).context(what)?;
        let Some(directory) = exists(path).context(what)? else {
            continue;
        };
        let cover = match (directory, &empty) {
            (false, _) => clone_of(null).context(what)?,
            (true, Some(empty)) => clone_of(empty).context(what)?,
            (true, None) => empty_directory().context(what)?,
        };
        attach(&cover, path).context(what)?;
        // Once attached it can be copied for others.
        if directory && empty.is_none() {
            empty = Some(cover);
        }
    }
    Ok(())
}

/// Makes paths, with all that is mounted below them, read-only.
pub fn make_read_only(paths: &[String]) -> Result<(), Error> {
    for path in paths.iter().map(Path::new) {
        let what = || format!("making {} read-only", path.display());
        let path = &follow(path).context(what)?;
        if exists(path).context(what)?.is_none() {
            continue;
        }
        let tree = clone_tree(path).context(what)?;
        mount_setattr(tree.as_fd(), READ_ONLY, true).context(what)?;
        attach(&tree, path).context(what)?;
    }
    Ok(())
}

/// Whether a path is a directory; none if there is nothing.
fn exists(path: &Path) -> rustix::io::Result<Option<bool>> {
    match rustix::fs::stat(path) {
        Ok(found) => {
            let kind = rustix::fs::FileType::from_raw_mode(found.st_mode);
            Ok(Some(kind.is_dir()))
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A copy of what a descriptor refers to, which must lie in a mount of this namespace, to be attached elsewhere.
pub fn clone_of(mount: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(mount, "", flags)
}

fn empty_directory() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}
