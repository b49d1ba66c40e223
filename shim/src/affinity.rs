//! The processors of the host that a machine may run on: those that its containers' `linux.resources.cpu.cpus` name, or `cpuset.cpus` in
//! their `linux.resources.unified`.
//!
//! A guest numbers its processors for itself, so a container that may use the host's processors 4 and 5 is not told so: the
//! threads of its machine stay there. The machine of a pod may run wherever one of its containers may.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use oci_spec::runtime::LinuxResources;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The host's memory nodes.
const NODES: &str = "/sys/devices/system/node/online";

/// Why a container's processors or memory nodes cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "linux.resources.cpu.{field} (or cpuset.{field} in unified) is {list:?}: expected numbers and ranges like 0-3,6"
    )]
    List { field: &'static str, list: String },
    #[error(
        "linux.resources.cpu.cpus (or cpuset.cpus in unified) is {list:?}: the machine's threads cannot run there: {source}; name processors that the host has"
    )]
    Pin { list: String, source: io::Error },
    #[error(
        "linux.resources.cpu.mems (or cpuset.mems in unified) is {0:?}: a microVM's memory cannot be kept to some of the host's nodes; leave it out, or name all of them"
    )]
    Nodes(String),
}

/// The processors that a container asks for; none if it may run anywhere.
type Cpus = Option<Vec<usize>>;

/// What the containers of a machine have asked for, by their identifiers.
#[derive(Debug, Default)]
pub struct Affinity {
    wanted: Mutex<HashMap<String, Cpus>>,
}

/// What a container had asked for before it asked for something else; none if it was not there.
#[derive(Debug)]
pub struct Before(Option<Cpus>);

impl Affinity {
    /// Notes what a container asks for, and moves the machine, whose process is `machine`, there. If that fails all stays as it is.
    pub fn set(
        &self,
        id: &str,
        machine: u32,
        resources: Option<&LinuxResources>,
    ) -> Result<Before, Error> {
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let text = |list: Option<&String>| list.filter(|list| !list.is_empty()).cloned();
        if let Some(nodes) = text(cpu.and_then(|cpu| cpu.mems().as_ref())) {
            check_nodes(&nodes, Path::new(NODES))?;
        }
        let cpus = text(cpu.and_then(|cpu| cpu.cpus().as_ref()));
        let list = cpus.as_ref().map(|list| parse("cpus", list)).transpose()?;
        let mut wanted = self.wanted();
        let before = wanted.insert(id.to_owned(), list);
        if wanted.values().all(Option::is_none) && before.iter().all(Option::is_none) {
            // As it was born.
            return Ok(Before(before));
        }
        match pin(machine, union(wanted.values())) {
            Ok(()) => Ok(Before(before)),
            Err(source) => {
                // Some of its threads may have been moved.
                restore(&mut wanted, id, machine, Before(before));
                let list = cpus.unwrap_or_default();
                Err(Error::Pin { list, source })
            }
        }
    }

    /// Notes what an update asks for, and tells what was before: nothing, if it does not speak of processors.
    pub fn update(
        &self,
        id: &str,
        machine: u32,
        resources: &LinuxResources,
    ) -> Result<Option<Before>, Error> {
        let list = |list: &Option<String>| list.as_ref().is_some_and(|list| !list.is_empty());
        match resources.cpu() {
            Some(cpu) if list(cpu.cpus()) || list(cpu.mems()) => {
                self.set(id, machine, Some(resources)).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Takes back what an update has changed, unless the container has been forgotten meanwhile.
    pub fn put_back(&self, id: &str, machine: u32, before: Before) {
        let mut wanted = self.wanted();
        if wanted.contains_key(id) {
            restore(&mut wanted, id, machine, before);
        }
    }

    /// Forgets a container. The machine stays where it is until another container says something.
    pub fn forget(&self, id: &str) {
        self.wanted().remove(id);
    }

    fn wanted(&self) -> MutexGuard<'_, HashMap<String, Cpus>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes again what a container had asked for, and moves the machine back.
fn restore(wanted: &mut HashMap<String, Cpus>, id: &str, machine: u32, before: Before) {
    match before.0 {
        Some(cpus) => wanted.insert(id.to_owned(), cpus),
        None => wanted.remove(id),
    };
    if let Err(error) = pin(machine, union(wanted.values())) {
        // The error to tell is the first one.
        log::warn!("moving the machine back to its processors: {error}");
    }
}

/// Where a machine may run whose containers ask for this; none for anywhere.
fn union<'a>(lists: impl Iterator<Item = &'a Cpus>) -> Option<CpuSet> {
    let mut lists = lists.peekable();
    lists.peek()?;
    let mut all = CpuSet::new();
    for list in lists {
        list.as_ref()?.iter().for_each(|&cpu| all.set(cpu));
    }
    Some(all)
}

/// Moves all threads of a process. Threads that it makes meanwhile are those of threads that were moved or are seen in the next round.
fn pin(process: u32, cpus: Option<CpuSet>) -> io::Result<()> {
    let cpus = match cpus {
        Some(cpus) => cpus,
        None => sched_getaffinity(None)?,
    };
    let directory = format!("/proc/{process}/task");
    let mut moved = Vec::new();
    loop {
        let before = moved.len();
        for entry in fs::read_dir(&directory)? {
            let thread: Option<i32> = entry?.file_name().to_str().and_then(|n| n.parse().ok());
            let Some(thread) = thread.and_then(Pid::from_raw) else {
                continue;
            };
            if !moved.contains(&thread) {
                match sched_setaffinity(Some(thread), &cpus) {
                    // It has just ended.
                    Err(rustix::io::Errno::SRCH) => {}
                    other => other?,
                }
                moved.push(thread);
            }
        }
        if moved.len() == before {
            return Ok(());
        }
    }
}

/// A list of numbers and ranges.
fn parse(field: &'static str, list: &str) -> Result<Vec<usize>, Error> {
    let bad = || Error::List {
        field,
        list: list.to_owned(),
    };
    let number = |text: &str| -> Result<usize, Error> {
        let number = text.trim().parse().ok();
        number
            .filter(|&number| number < CpuSet::MAX_CPU)
            .ok_or_else(bad)
    };
    let mut numbers = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(bad());
        }
        numbers.extend(first..=last);
    }
    Ok(numbers)
}

/// Memory nodes say nothing if they are all that the host has.
fn check_nodes(list: &str, online: &Path) -> Result<(), Error> {
    let wanted = parse("mems", list)?;
    // A kernel without such nodes has one.
    let online = fs::read_to_string(online).unwrap_or_else(|_| "0".into());
    let online = parse("mems", &online)?;
    if online.iter().all(|node| wanted.contains(node)) {
        Ok(())
    } else {
        Err(Error::Nodes(list.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn lists_are_numbers_and_ranges() {
        assert_eq!(parse("cpus", "0-2,5,7-7\n").unwrap(), [0, 1, 2, 5, 7]);
        for bad in ["", "x", "3-1", "1-", "-1", "1,,2", "1024", "0-99999999999"] {
            assert!(parse("cpus", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_machine_runs_where_one_of_its_containers_may() {
        let lists = [Some(vec![1, 2]), Some(vec![5])];
        let all = union(lists.iter()).unwrap();
        assert!(all.is_set(1) && all.is_set(2) && all.is_set(5));
        assert_eq!(all.count(), 3);
        assert!(union([Some(vec![1]), None].iter()).is_none());
        assert!(union([].iter()).is_none());
    }

    #[test]
    fn nodes_must_be_all_nodes() {
        let directory = tempfile::tempdir().unwrap();
        let online = directory.path().join("online");
        fs::write(&online, "0-1\n").unwrap();
        assert!(check_nodes("0-1", &online).is_ok());
        assert!(matches!(check_nodes("0", &online), Err(Error::Nodes(_))));
        assert!(check_nodes("0", Path::new("/none")).is_ok());
    }

    #[test]
    fn a_process_is_moved_and_moved_back() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let own = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|&cpu| own.is_set(cpu)).unwrap();
        let asked = |cpus: &str| -> LinuxResources {
            serde_json::from_value(serde_json::json!({"cpu": {"cpus": cpus}})).unwrap()
        };
        let affinity = Affinity::default();
        affinity
            .set("a", child.id(), Some(&asked(&first.to_string())))
            .unwrap();
        assert_eq!(sched_getaffinity(pid).unwrap().count(), 1);
        // Another container may run anywhere.
        affinity.set("b", child.id(), None).unwrap();
        assert_eq!(sched_getaffinity(pid).unwrap(), own);
        affinity.forget("b");
        affinity.update("a", child.id(), &asked("")).unwrap();
        let moved = affinity
            .update("a", child.id(), &asked(&first.to_string()))
            .unwrap();
        assert_eq!(sched_getaffinity(pid).unwrap().count(), 1);
        // What was there before is there again.
        let before = affinity.set("b", child.id(), None).unwrap();
        assert_eq!(sched_getaffinity(pid).unwrap(), own);
        affinity.put_back("b", child.id(), before);
        assert_eq!(sched_getaffinity(pid).unwrap().count(), 1);
        // Not for a container that is gone.
        affinity.put_back("b", child.id(), moved.unwrap());
        assert_eq!(affinity.wanted().len(), 1);
        let error = affinity
            .update("a", child.id(), &asked("1023"))
            .unwrap_err();
        assert!(
            error.to_string().contains("linux.resources.cpu.cpus"),
            "{error}"
        );
        // The same if moving fails.
        assert_eq!(affinity.wanted()["a"], Some(vec![first]));
        assert_eq!(sched_getaffinity(pid).unwrap().count(), 1);
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
