//! What a test left behind: processes, mounts, control groups, loop devices and files that were not there before it.
//!
//! A node, like a site on a host, has a PID and a mount name space of its own: whatever appears there is ours.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::{Context, Error, Result};
use crate::site::Site;

/// Where files that outlive what they are for would show up, apart from the site.
const DIRECTORIES: [&str; 3] = ["/run", "/tmp", "/var/tmp"];

/// Directories that the first container of all brings about, and that stay, below these and the site's.
const KEPT: [&str; 8] = [
    "/run/bulkhead",
    "/run/containerd",
    "/run/containerd/fifo",
    "/run/containerd/runc",
    "/run/containerd/runc/default",
    "/run/containerd/s",
    "/sys/fs/cgroup/default",
    "state/io.containerd.runtime.v2.task/default",
];

/// Where control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Something that can be left behind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Thing {
    Process {
        pid: i32,
        command: String,
    },
    Mount {
        id: String,
        target: PathBuf,
        kind: String,
    },
    Path(PathBuf),
    LoopDevice(PathBuf),
}

impl fmt::Display for Thing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, command } => write!(formatter, "process {pid}: {command}"),
            Self::Mount { target, kind, .. } => {
                write!(formatter, "mount of {kind} at {}", target.display())
            }
            Self::Path(path) => write!(formatter, "{}", path.display()),
            Self::LoopDevice(path) => write!(formatter, "loop device {}", path.display()),
        }
    }
}

/// All that is there at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    things: BTreeSet<Thing>,
}

impl Snapshot {
    /// Looks at everything. What containerd and the layer cache keep on purpose is left out.
    pub fn take(site: &Site) -> Result<Self> {
        let mut directories: Vec<PathBuf> = DIRECTORIES.iter().map(PathBuf::from).collect();
        directories.extend(["state", "scratch"].map(|name| site.directory.join(name)));
        let mut things = BTreeSet::new();
        processes(site, &mut things)?;
        mounts(&mut things)?;
        for entry in entries(Path::new("/sys/block"))? {
            if entry.join("loop").exists() {
                things.insert(Thing::LoopDevice(entry));
            }
        }
        for directory in &directories {
            paths(directory, &|_| true, &mut things)?;
        }
        paths(Path::new(CGROUPS), &Path::is_dir, &mut things)?;
        for path in KEPT {
            things.remove(&Thing::Path(site.directory.join(path)));
        }
        Ok(Self { things })
    }

    /// Waits until nothing is left that was not there when this snapshot was taken, but no longer than `limit`; the error
    /// lists what is left then.
    pub fn settle(&self, site: &Site, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let watch = Watch::on(&self.left(site)?)?;
            // Whatever went away before the watch was set up is seen here.
            let left = self.left(site)?;
            if left.is_empty() {
                return Ok(());
            }
            if !watch.wait(deadline.saturating_duration_since(Instant::now()))? {
                let list: Vec<String> = left.iter().map(|thing| format!("  {thing}")).collect();
                return Err(Error::Unfit(format!("left behind:\n{}", list.join("\n"))));
            }
        }
    }

    fn left(&self, site: &Site) -> Result<Vec<Thing>> {
        let now = Self::take(site)?;
        Ok(now.things.difference(&self.things).cloned().collect())
    }
}

/// An event for each way in which things can go away.
struct Watch {
    descriptors: Vec<(OwnedFd, PollFlags)>,
}

impl Watch {
    fn on(things: &[Thing]) -> Result<Self> {
        let mut descriptors = Vec::new();
        let names = inotify::init(inotify::CreateFlags::CLOEXEC).or_cannot("watch directories")?;
        let gone = inotify::WatchFlags::DELETE
            | inotify::WatchFlags::DELETE_SELF
            | inotify::WatchFlags::MOVED_FROM;
        for thing in things {
            match thing {
                Thing::Process { pid, .. } => {
                    // A process that is gone by now needs no watching.
                    let process =
                        Pid::from_raw(*pid).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
                    if let Some(Ok(process)) = process {
                        descriptors.push((process, PollFlags::IN));
                    }
                }
                // Mounts come and go with a priority event on the list of mounts.
                Thing::Mount { .. } => {
                    let list = File::open("/proc/self/mountinfo").or_cannot("list mounts")?;
                    descriptors.push((list.into(), PollFlags::PRI));
                }
                Thing::Path(path) | Thing::LoopDevice(path) => {
                    let parent = path.parent().unwrap_or(path);
                    // A directory that is gone by now needs no watching.
                    let _ = inotify::add_watch(&names, parent, gone);
                }
            }
        }
        descriptors.push((names, PollFlags::IN));
        Ok(Self { descriptors })
    }

    /// Whether something happened before `limit` was over.
    fn wait(&self, limit: Duration) -> Result<bool> {
        let limit = Timespec::try_from(limit)
            .map_err(|_| Error::Unfit("a time limit that no clock can tell".into()))?;
        let mut waits: Vec<PollFd<'_>> = self
            .descriptors
            .iter()
            .map(|(descriptor, flags)| PollFd::from_borrowed_fd(descriptor.as_fd(), *flags))
            .collect();
        Ok(poll(&mut waits, Some(&limit)).or_cannot("wait for what is left")? > 0)
    }
}

fn processes(site: &Site, things: &mut BTreeSet<Thing>) -> Result<()> {
    // A test may have started it again.
    let containerd = site.containerd()?.as_raw_pid();
    for entry in entries(Path::new("/proc"))? {
        let pid = entry
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        let Some(pid) = pid else { continue };
        // Gone by now, or a kernel thread or an ended process: these have no command line.
        let Ok(line) = fs::read(entry.join("cmdline")) else {
            continue;
        };
        let command = String::from_utf8_lossy(&line).replace('\0', " ");
        if !command.is_empty() && pid != containerd {
            things.insert(Thing::Process { pid, command });
        }
    }
    Ok(())
}

/// Reads the list of mounts (proc_pid_mountinfo(5)).
fn mounts(things: &mut BTreeSet<Thing>) -> Result<()> {
    let list = fs::read_to_string("/proc/self/mountinfo").or_cannot("list mounts")?;
    for line in list.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let separator = fields.iter().position(|field| *field == "-");
        let kind = separator.and_then(|index| fields.get(index + 1));
        let (Some(id), Some(target), Some(kind)) = (fields.first(), fields.get(4), kind) else {
            return Err(Error::Unfit(format!(
                "the list of mounts has the line {line:?}"
            )));
        };
        things.insert(Thing::Mount {
            id: (*id).to_owned(),
            target: PathBuf::from(target),
            kind: (*kind).to_owned(),
        });
    }
    Ok(())
}

/// All paths below `directory` that are `of_interest`. Mounted file systems are not entered: mounts are looked at by
/// themselves.
fn paths(
    directory: &Path,
    of_interest: &dyn Fn(&Path) -> bool,
    things: &mut BTreeSet<Thing>,
) -> Result<()> {
    let Some(device) = device(directory) else {
        return Ok(());
    };
    for path in entries(directory)? {
        let Ok(metadata) = path.symlink_metadata() else {
            continue;
        };
        if of_interest(&path) {
            things.insert(Thing::Path(path.clone()));
        }
        if metadata.is_dir() && self::device(&path) == Some(device) {
            paths(&path, of_interest, things)?;
        }
    }
    Ok(())
}

fn device(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    path.symlink_metadata().ok().map(|metadata| metadata.dev())
}

/// The paths in a directory; none if it is not there.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let reading = || format!("read {}", directory.display());
    match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        listing => listing
            .or_cannot(reading())?
            .map(|entry| Ok(entry.or_cannot(reading())?.path()))
            .collect(),
    }
}
