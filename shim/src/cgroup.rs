//! The pod's cgroup on the host, in which shim and VMM live: what the machine uses is accounted to its pod and bounded by
//! the pod's limits. Nothing is limited here: a container's own limits hold inside the guest.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::ptr;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::readiness::happens;

/// How long a shim that leaves its cgroup waits for processes, or threads of its own, that are on their way out. Nobody waits for
/// it then, but nobody else would remove the cgroup either.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);

/// The extended attribute of the cgroups that Bulkhead made, so that whoever is the last to leave may remove them.
const MARK: &CStr = c"trusted.bulkhead";

/// How often a directory is made again that somebody else removed meanwhile.
const ATTEMPTS: usize = 16;

/// What can go wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `linux.cgroupsPath` is no path of a cgroup.
    #[error(
        "linux.cgroupsPath is {path:?}; it must be a path below the root, or slice:prefix:name for systemd"
    )]
    Path { path: String },
    /// The system refused.
    #[error("{operation} {} failed: {source}; the shim must run as root of the host with the cgroup file systems writable", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// There is nothing to join.
    #[error("no cgroup file system is mounted; mount cgroup2 on /sys/fs/cgroup")]
    NotMounted,
}

/// The directory below each hierarchy's root that `linux.cgroupsPath` names; `None` if it names none.
pub fn directory(cgroups_path: &str) -> Result<Option<PathBuf>, Error> {
    if cgroups_path.is_empty() {
        return Ok(None);
    }
    let error = || Error::Path {
        path: cgroups_path.to_owned(),
    };
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let path = match parts[..] {
        [path] => path.trim_start_matches('/').to_owned(),
        [slice, prefix, name] if !cgroups_path.starts_with('/') => {
            systemd_directory(slice, prefix, name).ok_or_else(error)?
        }
        _ => return Err(error()),
    };
    let path = PathBuf::from(path);
    let plain = |component| matches!(component, Component::Normal(_));
    if path.components().next().is_none() || !path.components().all(plain) {
        return Err(error());
    }
    Ok(Some(path))
}

/// Where systemd puts the unit `prefix-name.scope` of a slice: `a-b.slice` lies in `a.slice`.
fn systemd_directory(slice: &str, prefix: &str, name: &str) -> Option<String> {
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let stem = slice.strip_suffix(".slice")?;
    let mut path = String::new();
    // "-.slice" is the root.
    if stem != "-" {
        let mut parent = String::new();
        for part in stem.split('-') {
            if part.is_empty() || part.contains('/') {
                return None;
            }
            parent.push_str(part);
            path.push_str(&parent);
            path.push_str(".slice/");
            parent.push('-');
        }
    }
    let unit = match (name.ends_with(".slice"), prefix) {
        (true, _) => name.to_owned(),
        (false, "") => format!("{name}.scope"),
        (false, prefix) => format!("{prefix}-{name}.scope"),
    };
    if name.is_empty() || unit.contains('/') {
        return None;
    }
    Some(path + &unit)
}

/// A mounted hierarchy: the one of version 2, or one of version 1 with its controllers.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount_point: PathBuf,
    /// The controllers as `/proc/self/cgroup` names them; empty for version 2.
    controllers: String,
    /// The cgroup of this process, as a directory.
    current: PathBuf,
}

impl Hierarchy {
    /// All hierarchies that are mounted.
    fn all() -> Result<Vec<Self>, Error> {
        let read = |path: &str| fs::read_to_string(path).map_err(io_error("reading", path));
        let all = parse(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?);
        if all.is_empty() {
            return Err(Error::NotMounted);
        }
        Ok(all)
    }

    /// Makes the directory and its parents, and marks those that were not there.
    fn make(&self, directory: &Path) -> Result<(), Error> {
        // Whoever ends meanwhile may remove a parent again that has become empty.
        for _ in 0..ATTEMPTS {
            match self.try_to_make(directory) {
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                result => return result,
            }
        }
        let path = self.mount_point.join(directory);
        Err(io_error("making", &path)(io::ErrorKind::NotFound.into()))
    }

    fn try_to_make(&self, directory: &Path) -> Result<(), Error> {
        let mut path = self.mount_point.clone();
        for component in directory {
            let parent = path.clone();
            path.push(component);
            match fs::create_dir(&path) {
                Ok(()) => mark(&path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io_error("making", &path)(error)),
            }
            self.inherit(&parent, &path)?;
        }
        Ok(())
    }

    /// Removes the directory, and then its parents as far as Bulkhead made them and nobody uses them.
    fn remove(&self, directory: &Path) -> Result<(), Error> {
        let path = self.mount_point.join(directory);
        match fs::remove_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("removing", &path)(error));
            }
            _ => {}
        }
        for parent in path.ancestors().skip(1) {
            if parent == self.mount_point || !is_marked(parent) || fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// A cpuset of version 1 takes no process until it was told its processors and memory nodes.
    fn inherit(&self, parent: &Path, path: &Path) -> Result<(), Error> {
        if !self.controllers.split(',').any(|name| name == "cpuset") {
            return Ok(());
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let own = path.join(file);
            let value = fs::read_to_string(&own).map_err(io_error("reading", &own))?;
            if value.trim().is_empty() {
                let inherited = fs::read_to_string(parent.join(file))
                    .map_err(io_error("reading", &parent.join(file)))?;
                fs::write(&own, inherited.trim()).map_err(io_error("writing", &own))?;
            }
        }
        Ok(())
    }
}

/// Joins `/proc/self/cgroup` and `/proc/self/mountinfo` (both in proc(5)). A hierarchy that is not mounted is left out.
fn parse(cgroups: &str, mounts: &str) -> Vec<Hierarchy> {
    let find = |controllers: &str| {
        mounts.lines().find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(3);
            let (root, mount_point) = (mount.next()?, mount.next()?);
            let mut file_system = file_system.split(' ');
            let (kind, options) = (file_system.next()?, file_system.nth(1)?);
            let matches = match controllers {
                "" => kind == "cgroup2",
                _ => {
                    kind == "cgroup"
                        && controllers
                            .split(',')
                            .all(|name| options.split(',').any(|option| option == name))
                }
            };
            matches.then(|| (PathBuf::from(root), PathBuf::from(mount_point)))
        })
    };
    let mut hierarchies: Vec<Hierarchy> = cgroups
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, Path::new(fields.next()?));
            let (root, mount_point) = find(controllers)?;
            let below = path.strip_prefix(&root).or_else(|_| path.strip_prefix("/"));
            Some(Hierarchy {
                current: mount_point.join(below.ok()?),
                mount_point,
                controllers: controllers.to_owned(),
            })
        })
        .collect();
    // Several controllers may be mounted together, at one place.
    hierarchies.dedup_by(|a, b| a.mount_point == b.mount_point);
    hierarchies
}

/// This process's stay in a cgroup; see [`enter`].
#[derive(Debug)]
pub struct Stay {
    directory: PathBuf,
    /// As they were before.
    hierarchies: Vec<Hierarchy>,
}

/// Moves this process, with all its threads, into a cgroup of every hierarchy, which is made if it is not there. What it
/// starts from now on is there, too. On failure everything is as it was.
pub fn enter(directory: &Path) -> Result<Stay, Error> {
    let mut stay = Stay {
        directory: directory.to_owned(),
        hierarchies: Vec::new(),
    };
    for hierarchy in Hierarchy::all()? {
        let joined = hierarchy
            .make(directory)
            .and_then(|()| join(&hierarchy.mount_point.join(directory)));
        stay.hierarchies.push(hierarchy);
        if let Err(error) = joined {
            // The first failure is the one to tell.
            let _ = stay.leave();
            return Err(error);
        }
    }
    Ok(stay)
}

impl Stay {
    /// Moves this process back to where it was, and removes the cgroup, and its parents as far as Bulkhead made them and
    /// nobody else uses them.
    pub fn leave(self) -> Result<(), Error> {
        let moved = self
            .hierarchies
            .iter()
            .rev()
            .map(|hierarchy| join(&hierarchy.current));
        // Every one is tried; the first failure is the one to tell.
        let moved = moved.fold(Ok(()), Result::and);
        moved.and(remove_from(
            &self.hierarchies,
            &self.directory,
            LEAVE_PATIENCE,
        ))
    }
}

/// Removes the cgroup of a shim that is dead, and its parents like [`Stay::leave`]. Waits until the processes in it, which
/// are ending, are gone, at most for `patience`.
pub fn remove(directory: &Path, patience: Duration) -> Result<(), Error> {
    remove_from(&Hierarchy::all()?, directory, patience)
}

fn remove_from(
    hierarchies: &[Hierarchy],
    directory: &Path,
    patience: Duration,
) -> Result<(), Error> {
    let deadline = Instant::now() + patience;
    // What leaves one hierarchy leaves all, and only version 2 tells when.
    match hierarchies
        .iter()
        .find(|hierarchy| hierarchy.controllers.is_empty())
    {
        Some(hierarchy) => wait_until_empty(&hierarchy.mount_point.join(directory), deadline),
        None => hierarchies.iter().for_each(|hierarchy| {
            wait_for_threads(&hierarchy.mount_point.join(directory), deadline);
        }),
    }
    let removed = hierarchies
        .iter()
        .map(|hierarchy| hierarchy.remove(directory));
    removed.fold(Ok(()), Result::and)
}

/// Notes that Bulkhead made a cgroup. Where that cannot be noted, the cgroup stays when it is empty.
fn mark(path: &Path) {
    if let Ok(path) = CString::new(path.as_os_str().as_bytes()) {
        // SAFETY: both strings end with a zero, and an empty value is read from nowhere.
        unsafe { libc::setxattr(path.as_ptr(), MARK.as_ptr(), ptr::null(), 0, 0) };
    }
}

/// Whether Bulkhead made a cgroup.
fn is_marked(path: &Path) -> bool {
    CString::new(path.as_os_str().as_bytes()).is_ok_and(|path| {
        // SAFETY: both strings end with a zero, and of no value's length nothing is written.
        unsafe { libc::getxattr(path.as_ptr(), MARK.as_ptr(), ptr::null_mut(), 0) >= 0 }
    })
}

/// Waits until a cgroup of version 2 is empty, or until `deadline`. Whether it is, is seen when it is removed.
///
/// Its list of processes does not tell: one that ends is off it as soon as its first thread is gone, while the others still
/// close its files, which for a machine takes long.
fn wait_until_empty(directory: &Path, deadline: Instant) {
    let Ok(mut events) = File::open(directory.join("cgroup.events")) else {
        return;
    };
    loop {
        let mut text = String::new();
        let read = events
            .rewind()
            .and_then(|()| events.read_to_string(&mut text));
        let left = deadline.saturating_duration_since(Instant::now());
        if read.is_err()
            || !text.contains("populated 1")
            || !happens(&events, PollFlags::POLLPRI, left).unwrap_or(false)
        {
            return;
        }
    }
}

/// Waits until no thread is left in a cgroup of version 1, or until `deadline`.
fn wait_for_threads(directory: &Path, deadline: Instant) {
    let first = || {
        fs::read_to_string(directory.join("tasks"))
            .ok()?
            .lines()
            .next()?
            .parse()
            .ok()
    };
    while let Some(thread) = first() {
        let left = deadline.saturating_duration_since(Instant::now());
        let ended = match process_of(thread).map(|process| pidfd_open(process, PidfdFlags::empty()))
        {
            Some(Ok(process)) => happens(process, PollFlags::POLLIN, left).unwrap_or(false),
            // EINVAL: its threads are gone, but its number is still being given back.
            Some(Err(errno)) => matches!(errno, Errno::SRCH | Errno::INVAL),
            None => true,
        };
        if !ended || left.is_zero() {
            return;
        }
    }
}

/// The process of a thread; `None` if that is gone.
fn process_of(thread: i32) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    Pid::from_raw(process.trim().parse().ok()?)
}

/// Moves this process into a cgroup.
fn join(directory: &Path) -> Result<(), Error> {
    let path = directory.join("cgroup.procs");
    fs::write(&path, "0").map_err(io_error("moving the shim by", &path))
}

fn io_error<P: AsRef<Path> + ?Sized>(
    operation: &'static str,
    path: &P,
) -> impl FnOnce(io::Error) -> Error + use<P> {
    let path = path.as_ref().to_owned();
    move |source| Error::Io {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_cgroupfs_or_systemd() {
        for (path, expected) in [
            ("", None),
            ("/default/test", Some("default/test")),
            ("kubepods/pod1/c", Some("kubepods/pod1/c")),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                Some(
                    "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
                ),
            ),
            (":docker:abc", Some("system.slice/docker-abc.scope")),
            ("-.slice:x:abc", Some("x-abc.scope")),
            ("user.slice::abc", Some("user.slice/abc.scope")),
            ("a.slice:x:b.slice", Some("a.slice/b.slice")),
        ] {
            assert_eq!(
                directory(path).unwrap(),
                expected.map(PathBuf::from),
                "{path}"
            );
        }
        for path in [
            "/",
            "/a/../b",
            "..",
            "a:b",
            "a:b:c",
            "a.slice:b:",
            "a.slice:b:c:d",
            "a--b.slice:c:d",
            "../x.slice:c:d",
            "a.slice:b:../../c",
            "/a.slice:b:c",
        ] {
            assert!(matches!(directory(path), Err(Error::Path { .. })), "{path}");
        }
    }

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
            32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            33 31 0:30 /docker/1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let cgroups =
            "7:cpu,cpuacct:/a\n6:memory:/docker/1/b\n5:pids:/c\n1:name=systemd:/\n0::/u:x\n";
        let found: Vec<(String, PathBuf)> = parse(cgroups, mounts)
            .into_iter()
            .map(|hierarchy| (hierarchy.controllers, hierarchy.current))
            .collect();
        let expected = [
            ("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct/a"),
            ("memory", "/sys/fs/cgroup/memory/b"),
            ("name=systemd", "/sys/fs/cgroup/systemd"),
            ("", "/sys/fs/cgroup/unified/u:x"),
        ];
        assert_eq!(
            found,
            expected.map(|(name, path)| (name.to_owned(), PathBuf::from(path)))
        );
        assert!(parse("", "").is_empty());
    }
}
