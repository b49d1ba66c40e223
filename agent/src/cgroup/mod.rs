//! Control groups, version 2: one for each container, with its limits, its devices and its statistics.

pub mod devices;
pub mod limits;
pub mod stats;

use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::LinuxResources;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::disk;
use crate::error::{Context, Error};
use crate::sys::{self, asynchronous};

/// Where the control groups are mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// The controllers that containers are given, as far as the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

/// Makes the controllers available to the groups below a directory.
pub fn delegate(directory: &Path) -> Result<(), Error> {
    let available = directory.join("cgroup.controllers");
    let available = fs::read_to_string(&available).context(|| available.display().to_string())?;
    let wanted: String = available
        .split_ascii_whitespace()
        .filter(|name| CONTROLLERS.contains(name))
        .map(|name| format!("+{name} "))
        .collect();
    let control = directory.join("cgroup.subtree_control");
    fs::write(&control, &wanted).context(|| format!("writing {wanted:?} to {}", control.display()))
}

/// A container's group. It is removed by [`Cgroup::remove`] only: until then processes may be in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    device_program: Mutex<Option<OwnedFd>>,
}

impl Cgroup {
    /// Where the group of a container is. The prefix keeps identifiers apart from the names of the kernel's files.
    pub fn path_of(parent: &Path, id: &str) -> PathBuf {
        parent.join(format!("container-{id}"))
    }

    /// Makes a group.
    pub fn create(path: PathBuf) -> Result<Self, Error> {
        let what = || format!("making the control group {}", path.display());
        fs::create_dir(&path).context(what)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty()).context(what)?;
        Ok(Self {
            path,
            directory,
            device_program: Mutex::new(None),
        })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, to make processes in it.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The directory of the group, it or one below it, in which a process is. A container that gives controllers to groups of its own
    /// moves its processes into them, and then none can be made above (Linux, cgroup-v2.rst, "No Internal Process Constraint").
    pub fn directory_of(&self, pid: u32) -> io::Result<OwnedFd> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let group = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let group = group.map(|group| Path::new(MOUNT).join(group));
        match group {
            Some(group) if group.starts_with(&self.path) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Ok(rustix::fs::open(&group, flags, Mode::empty())?)
            }
            _ => Err(io::Error::other(format!(
                "process {pid} has left its container's control group"
            ))),
        }
    }

    /// Sets limits, but for those of disks. Those that are not mentioned stay as they are.
    pub fn limit(&self, resources: &LinuxResources) -> Result<(), Error> {
        limits::check_usage(resources, || self.read_number("memory.current"))?;
        for setting in limits::settings(resources, || self.quota())? {
            if setting.is_of_disks() {
                continue;
            }
            let limits::Setting { file, value } = &setting;
            match self.set(file, value) {
                // Pages of a size that the machine does not have cannot exceed a limit.
                Err(error) if error.kind() == io::ErrorKind::NotFound && setting.is_of_pages() => {}
                written => {
                    written.context(|| format!("setting the limit {file} to {value:?}"))?;
                }
            }
        }
        Ok(())
    }

    /// Sets limits, those of disks too, and which devices may be used if `devices` says so, while the container is there: if something
    /// cannot be set all stays as it is.
    pub fn change(
        &self,
        resources: &LinuxResources,
        devices: Option<&[devices::Rule]>,
        number: impl Fn(u32) -> Result<Option<String>, Error>,
    ) -> Result<(), Error> {
        let before = self.before(resources, &number)?;
        let changed = self
            .limit(resources)
            .and_then(|()| self.limit_disks(resources, number))
            .and_then(|()| devices.map_or(Ok(()), |rules| self.allow_devices(rules)));
        if changed.is_err() {
            for (path, value) in before.into_iter().rev() {
                // The error to tell is the first one.
                drop(fs::write(path, value));
            }
        }
        changed
    }

    /// What to write, from the last to the first, and to which files, to take back what setting these limits changes.
    fn before(
        &self,
        resources: &LinuxResources,
        number: impl Fn(u32) -> Result<Option<String>, Error>,
    ) -> Result<Vec<(PathBuf, String)>, Error> {
        let mut before = Vec::new();
        for setting in limits::settings(resources, || self.quota())? {
            for disk in setting.weighed() {
                if let Some(number) = number(disk)? {
                    let scheduler = disk::scheduler(&number);
                    before.extend(scheduler.context(|| format!("the scheduler of {number}"))?);
                }
            }
            // What is not there, or cannot be read, has nothing to go back to.
            let Ok(content) = self.read(&setting.file) else {
                continue;
            };
            let value = match setting.disk() {
                Some((disk, _)) => number(disk)?
                    .and_then(|number| limits::in_force(&setting.file, &content, &number)),
                None if setting.is_weight() => {
                    limits::in_force(&setting.file, &content, limits::DEFAULT)
                }
                None => Some(content),
            };
            before.extend(value.map(|value| (self.path.join(&setting.file), value)));
        }
        Ok(before)
    }

    /// The quota of processor time that is in force, as the kernel writes it.
    fn quota(&self) -> String {
        let text = self.read("cpu.max").unwrap_or_default();
        text.split(' ').next().unwrap_or_default().to_owned()
    }

    /// Sets the limits of disks, whose numbers (`MAJOR:MINOR`) `number` knows; none for a disk that the container does not have. The first
    /// weight for a disk has it shared by weights from then on.
    pub fn limit_disks(
        &self,
        resources: &LinuxResources,
        number: impl Fn(u32) -> Result<Option<String>, Error>,
    ) -> Result<(), Error> {
        let settings = limits::settings(resources, || self.quota())?.into_iter();
        for setting in settings.filter(limits::Setting::is_of_disks) {
            for disk in setting.weighed() {
                if let Some(number) = number(disk)? {
                    disk::share_by_weights(&number)?;
                }
            }
            let value = match setting.disk() {
                None => setting.value.clone(),
                Some((disk, rest)) => match number(disk)? {
                    Some(number) => format!("{number} {rest}"),
                    None => continue,
                },
            };
            self.set(&setting.file, &value)
                .context(|| format!("setting the limit {} to {value:?}", setting.file))?;
        }
        Ok(())
    }

    /// Sets which devices may be used, in place of what was set before.
    pub fn allow_devices(&self, rules: &[devices::Rule]) -> Result<(), Error> {
        let what = || "setting the devices that the container may use".to_owned();
        let mut attached = self
            .device_program
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let program = match (devices::program(rules), &*attached) {
            (None, None) => return Ok(()),
            // Rules that allow everything take the place of the earlier ones, too.
            (None, Some(_)) => devices::allow_everything(),
            (Some(program), _) => program,
        };
        let program = sys::load_device_program(&program).context(what)?;
        let previous = attached.as_ref().map(AsFd::as_fd);
        sys::attach_device_program(self.directory.as_fd(), program.as_fd(), previous)
            .context(what)?;
        *attached = Some(program);
        Ok(())
    }

    /// Lets a user make groups below it, and move processes between those (Linux, cgroup-v2.rst, "Delegation").
    pub fn give_to(&self, user: u32) -> Result<(), Error> {
        let what = || format!("giving {} to user {user}", self.path.display());
        let list = fs::read_to_string("/sys/kernel/cgroup/delegate").context(what)?;
        chown(&self.path, Some(user), None).context(what)?;
        for file in list.lines() {
            match chown(self.path.join(file), Some(user), None) {
                // It belongs to a controller that the group has not.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                given => given.context(what)?,
            }
        }
        Ok(())
    }

    /// Kills every process in it and in the groups below it.
    pub fn kill(&self) -> Result<(), Error> {
        self.write("cgroup.kill", "1")
    }

    /// The numbers of all processes in it and in the groups below it.
    pub fn processes(&self) -> Result<Vec<u32>, Error> {
        let what = || format!("listing the processes in {}", self.path.display());
        let mut numbers = Vec::new();
        collect(self.directory(), Path::new(""), &mut numbers).context(what)?;
        visit_below(self.directory(), |parent, name| {
            let name = OsStr::from_bytes(name.to_bytes());
            collect(parent, Path::new(name), &mut numbers)
        })
        .context(what)?;
        Ok(numbers)
    }

    /// Stops all its processes, or lets them go on, and waits until the kernel says that it is so.
    pub async fn freeze(&self, frozen: bool) -> Result<(), Error> {
        let events = Events::open(&self.path, "cgroup.events")?;
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        events.wait_for("frozen", frozen.into()).await
    }

    /// Waits until no process is left in it, and removes it with all groups below it.
    pub async fn remove(&self) -> Result<(), Error> {
        Events::open(&self.path, "cgroup.events")?
            .wait_for("populated", 0)
            .await?;
        remove_below(self.directory())
            .and_then(|()| fs::remove_dir(&self.path))
            .context(|| format!("removing {}", self.path.display()))
    }

    /// Watches a file of `name value` lines for changes.
    pub fn events(&self, file: &str) -> Result<Events, Error> {
        Events::open(&self.path, file)
    }

    /// Reads one of its files.
    pub fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path.join(file))
    }

    /// Reads a file that holds one number; none for `max`.
    pub fn read_number(&self, file: &str) -> io::Result<Option<u64>> {
        match self.read(file)?.trim_end() {
            "max" => Ok(None),
            number => number.parse().map(Some).map_err(io::Error::other),
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<(), Error> {
        let place = || format!("writing {value:?} to {}", self.path.join(file).display());
        self.set(file, value).context(place)
    }

    /// Writes to one of its files. The kernel says of one that is not there that it may not be made, unless nobody asks to make it.
    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).open(self.path.join(file))?;
        file.write_all(value.as_bytes())
    }
}

/// The value of a line in a file of `name value` lines.
pub fn value(text: &str, name: &str) -> Option<u64> {
    let mut pairs = stats::pairs(text);
    pairs.find(|&(key, _)| key == name).map(|(_, value)| value)
}

/// A file of a group whose changes the kernel tells.
#[derive(Debug)]
pub struct Events {
    file: AsyncFd<OwnedFd>,
}

impl Events {
    fn open(group: &Path, file: &str) -> Result<Self, Error> {
        let path = group.join(file);
        let what = || format!("watching {}", path.display());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, Mode::empty()).context(what)?;
        let file = asynchronous(file, Interest::PRIORITY).context(what)?;
        Ok(Self { file })
    }

    /// The value of a line now; 0 if there is no such line.
    pub fn value(&self, name: &str) -> Result<u64, Error> {
        let what = || format!("reading {name} of a control group");
        let mut text = [0; 1024];
        // Reading from the start is also what makes the next change an event.
        let length = rustix::io::pread(&self.file, &mut text, 0).context(what)?;
        let text = std::str::from_utf8(&text[..length]).context(what)?;
        Ok(value(text, name).unwrap_or(0))
    }

    /// Waits for the next change since the last [`Events::value`].
    pub async fn changed(&self) -> Result<(), Error> {
        let mut ready = self
            .file
            .ready(Interest::PRIORITY)
            .await
            .context(|| "waiting for a control group".into())?;
        ready.clear_ready();
        Ok(())
    }

    async fn wait_for(&self, name: &str, wanted: u64) -> Result<(), Error> {
        while self.value(name)? != wanted {
            self.changed().await?;
        }
        Ok(())
    }
}

/// Adds the numbers of the processes in a group. One that was removed meanwhile has none; those in a threaded one are told by the group above
/// that is not (Linux, cgroup-v2.rst, "Threads").
fn collect(at: impl AsFd, group: &Path, numbers: &mut Vec<u32>) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = openat(at, group.join("cgroup.procs"), flags, Mode::empty());
    let text = file
        .map_err(io::Error::from)
        .and_then(|file| io::read_to_string(fs::File::from(file)));
    let is_none = |errno| matches!(errno, Errno::NOENT | Errno::NODEV | Errno::OPNOTSUPP);
    let text = match text {
        Err(error) if Errno::from_io_error(&error).is_some_and(is_none) => return Ok(()),
        text => text?,
    };
    for line in text.lines() {
        numbers.push(line.parse().map_err(io::Error::other)?);
    }
    Ok(())
}

/// Removes all groups below one.
fn remove_below(top: BorrowedFd<'_>) -> io::Result<()> {
    visit_below(top, |parent, name| {
        Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
    })
}

/// Calls `act` with the parent and the name of each group below one, after those below that. A container may nest its groups deeper than
/// a path can tell: it goes from one to the next, and has one of them open.
fn visit_below(
    top: BorrowedFd<'_>,
    mut act: impl FnMut(&OwnedFd, &CStr) -> io::Result<()>,
) -> io::Result<()> {
    const DIRECTORY: OFlags = OFlags::RDONLY
        .union(OFlags::DIRECTORY)
        .union(OFlags::NOFOLLOW)
        .union(OFlags::CLOEXEC);
    let mut group = openat(top, ".", DIRECTORY, Mode::empty())?;
    // What is left to visit in the first group, in the last of those, and so on: the last names are the way to where it is.
    let mut levels = vec![groups_in(&group)?];
    while let Some(level) = levels.last_mut() {
        match level.last() {
            Some(name) => match openat(&group, name.as_c_str(), DIRECTORY, Mode::empty()) {
                Ok(below) => {
                    levels.push(groups_in(&below)?);
                    group = below;
                }
                // It was removed meanwhile.
                Err(Errno::NOENT) => drop(level.pop()),
                Err(error) => return Err(error.into()),
            },
            None => {
                levels.pop();
                if let Some(name) = levels.last_mut().and_then(Vec::pop) {
                    group = openat(&group, "..", DIRECTORY, Mode::empty())?;
                    act(&group, &name)?;
                }
            }
        }
    }
    Ok(())
}

/// The names of the groups in one; none if it was removed meanwhile.
fn groups_in(group: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(group)? {
        let entry = match entry {
            Err(Errno::NOENT) => break,
            entry => entry?,
        };
        let name = entry.file_name();
        if entry.file_type() == FileType::Directory && !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_limits_of_pages_that_the_machine_has_not_are_ignored() {
        let path = std::env::temp_dir().join(format!("group-{}", std::process::id()));
        let group = Cgroup::create(path.clone()).unwrap();
        fs::write(path.join("memory.high"), "").unwrap();
        let limit = |file: &str| {
            let resources = serde_json::json!({
                "hugepageLimits": [{"pageSize": "64KB", "limit": 1}],
                "unified": {file: "1", "memory.high": "5"},
            });
            group.limit(&serde_json::from_value(resources).unwrap())
        };
        limit("hugetlb.16GB.rsvd.max").unwrap();
        assert_eq!(group.read("memory.high").unwrap(), "5");
        for file in ["hugetlb.16G.max", "hugetlb.2MB.limit", "memory.hihg"] {
            let error = limit(file).unwrap_err().to_string();
            let named = error.contains(file) && error.contains("No such file");
            assert!(named, "{error}");
        }
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn groups_are_visited_however_deep_they_are() {
        let base = std::env::temp_dir().join(format!("groups-{}", std::process::id()));
        fs::create_dir(&base).unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let top = rustix::fs::open(&base, flags, Mode::empty()).unwrap();
        let mut group = top.try_clone().unwrap();
        // More than a path can have, and more than descriptors may be open.
        let names: Vec<_> = ["a", "b"].map(|letter| letter.repeat(250)).into();
        for _ in 0..1100 {
            for name in &names {
                rustix::fs::mkdirat(&group, name, Mode::RWXU).unwrap();
            }
            group = openat(&group, &names[0], flags, Mode::empty()).unwrap();
        }
        let mut visited = 0;
        let mut numbers = Vec::new();
        visit_below(top.as_fd(), |parent, name| {
            visited += 1;
            let name = OsStr::from_bytes(name.to_bytes());
            collect(parent, Path::new(name), &mut numbers)
        })
        .unwrap();
        assert_eq!((visited, numbers.len()), (2200, 0));
        let procs = openat(
            &group,
            "cgroup.procs",
            OFlags::CREATE | OFlags::WRONLY,
            Mode::RUSR,
        );
        rustix::io::write(procs.unwrap(), b"7\n8\n").unwrap();
        collect(&group, Path::new(""), &mut numbers).unwrap();
        assert_eq!(numbers, [7, 8]);
        unlinkat(&group, "cgroup.procs", AtFlags::empty()).unwrap();

        remove_below(top.as_fd()).unwrap();
        fs::remove_dir(base).unwrap();
    }
}
