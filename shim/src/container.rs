//! A container and its execs: what containerd is told of them, and in which order.
//!
//! Nothing here waits. The events go to the publisher's queue under the same lock as the change that they tell of, so their order is
//! the order of the changes: the start of a process before its end, and the end of the init after the ends of all its execs.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use protobuf::MessageField;

use crate::annotations::Kind;
use crate::backing::Backing;
use crate::events::Publisher;
use crate::hooks::Hooks;
use crate::process::{Change, Exit, Phase, Process};
use crate::spec::Sysctls;

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its identifier, which is also its task's.
    pub id: String,
    /// The directory of its bundle, as containerd named it.
    pub bundle: String,
    /// What it is to the machine.
    pub kind: Kind,
    /// The network namespace on the host that its processes are in.
    pub network: Arc<OwnedFd>,
    /// Settings of interfaces that are there only when it starts.
    pub late_sysctls: Sysctls,
    /// The programs of the host that want to know of its start and its end.
    pub hooks: Hooks,
    /// Where its disks are on the host.
    pub backing: Backing,
    /// The PCI device numbers of its disks.
    pub slots: Vec<u8>,
    /// Its first process.
    pub init: Process,
    /// Its other processes, by their exec identifiers.
    pub execs: HashMap<String, Process>,
    /// The exec identifiers of processes that the guest was asked to add, and has not answered.
    pub adding: HashSet<String>,
    /// Whether all output of its processes, which have ended, is delivered or given up.
    pub drained: bool,
    /// Whether it was killed, and had not ended when the time for that was over.
    pub overdue: bool,
    /// Whether containerd's last word on it was `delete`, though it could not be deleted.
    pub given_up: bool,
    /// When containerd was last told that it wants memory.
    pub last_oom: Option<Instant>,
}

impl Container {
    /// The init (empty exec identifier) or an exec.
    pub fn process(&self, exec_id: &str) -> Option<&Process> {
        match exec_id {
            "" => Some(&self.init),
            _ => self.execs.get(exec_id),
        }
    }

    /// The init (empty exec identifier) or an exec.
    pub fn process_mut(&mut self, exec_id: &str) -> Option<&mut Process> {
        match exec_id {
            "" => Some(&mut self.init),
            _ => self.execs.get_mut(exec_id),
        }
    }

    /// Whether the init has ended, even if that is not told yet.
    pub fn init_has_ended(&self) -> bool {
        self.init.phase == Phase::Stopped || self.init.held.is_some()
    }

    /// The guest has started a process.
    pub fn started(&mut self, exec_id: &str, events: &Publisher) {
        let Some(process) = self.process_mut(exec_id) else {
            return;
        };
        if process.change(Change::Started).is_err() {
            return;
        }
        let pid = process.pid;
        if exec_id.is_empty() {
            events.publish(&TaskStart {
                container_id: self.id.clone(),
                pid,
                ..Default::default()
            });
        } else {
            events.publish(&TaskExecStarted {
                container_id: self.id.clone(),
                exec_id: exec_id.to_owned(),
                pid,
                ..Default::default()
            });
        }
        self.tell_ends(events);
    }

    /// The guest could not start a process. An exec never was; it can be deleted, and there is no event. An init can be tried again.
    pub fn start_failed(&mut self, exec_id: &str, events: &Publisher) {
        let Some(process) = self.process_mut(exec_id) else {
            return;
        };
        if process.change(Change::StartFailed).is_err() {
            return;
        }
        if !exec_id.is_empty() {
            // Its client waits for the end of its output before it deletes it.
            process.streams = None;
            process.stand_in = None;
            process.pid = 0;
            match process.held.take() {
                Some(exit) => process.end(exit),
                None => process.never_ran(),
            }
        }
        self.tell_ends(events);
    }

    /// A process has ended.
    pub fn exited(&mut self, exec_id: &str, exit: Exit, events: &Publisher) {
        if let Some(process) = self.process_mut(exec_id)
            && process.phase != Phase::Stopped
        {
            process.held.get_or_insert(exit);
            self.tell_ends(events);
        }
    }

    /// The machine has ended, and every process with it.
    pub fn machine_ended(&mut self, exit: Exit, events: &Publisher) {
        for process in self.execs.values_mut().filter(|exec| exec.is_alive()) {
            process.held.get_or_insert(exit);
        }
        if self.init.phase != Phase::Stopped {
            self.init.held.get_or_insert(exit);
        }
        self.tell_ends(events);
    }

    /// Tells the ends that can be told: none before its start, and the init's last.
    fn tell_ends(&mut self, events: &Publisher) {
        for (exec_id, process) in &mut self.execs {
            tell_end(&self.id, exec_id, process, events);
        }
        if !self.execs.values().any(Process::is_alive) {
            tell_end(&self.id, &self.id, &mut self.init, events);
        }
    }

    /// Freezing is under way, done, or has failed.
    pub fn paused(&mut self, done: bool, events: &Publisher) {
        let change = if done {
            Change::Paused
        } else {
            Change::Resumed
        };
        if self.init.change(change).is_ok() && done {
            events.publish(&TaskPaused {
                container_id: self.id.clone(),
                ..Default::default()
            });
        }
    }

    /// The guest has thawed the container.
    pub fn resumed(&mut self, events: &Publisher) {
        if self.init.change(Change::Resumed).is_ok() {
            events.publish(&TaskResumed {
                container_id: self.id.clone(),
                ..Default::default()
            });
        }
    }

    /// The guest's kernel has killed a process of the container for want of memory.
    pub fn out_of_memory(&self, events: &Publisher) {
        if self.init.phase != Phase::Stopped {
            events.publish(&TaskOOM {
                container_id: self.id.clone(),
                ..Default::default()
            });
            // CRI-O does not listen to events, but looks for this file.
            if let Err(error) = std::fs::write(Path::new(&self.bundle).join("oom"), "") {
                log::warn!("{}: cannot be marked as out of memory: {error}", self.id);
            }
        }
    }

    /// What is told when the container is deleted.
    pub fn deleted(&self, exit: Exit) -> TaskDelete {
        TaskDelete {
            container_id: self.id.clone(),
            pid: self.init.pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.timestamp()),
            ..Default::default()
        }
    }
}

fn tell_end(container_id: &str, id: &str, process: &mut Process, events: &Publisher) {
    if process.phase == Phase::Starting {
        return;
    }
    let Some(exit) = process.held.take() else {
        return;
    };
    process.end(exit);
    events.publish(&TaskExit {
        container_id: container_id.to_owned(),
        id: id.to_owned(),
        pid: process.pid,
        exit_status: exit.status,
        exited_at: MessageField::some(exit.timestamp()),
        ..Default::default()
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use protobuf::Message;

    use super::*;
    use crate::process::End;
    use crate::streams::Stdio;

    /// A running container with execs in the phase `Running`, and its events so far taken.
    pub(crate) fn container(execs: &[&str]) -> (Container, Publisher) {
        let events = Publisher::to_nobody();
        let process = || {
            let mut process = Process::new(Stdio::default(), None);
            process.pid = 9;
            process
        };
        let mut container = Container {
            id: "c".into(),
            bundle: "/b".into(),
            kind: Kind::Single,
            network: Arc::new(std::fs::File::open("/dev/null").unwrap().into()),
            late_sysctls: HashMap::new(),
            hooks: Hooks::default(),
            backing: Backing::default(),
            slots: Vec::new(),
            init: process(),
            execs: HashMap::new(),
            adding: HashSet::new(),
            drained: false,
            overdue: false,
            given_up: false,
            last_oom: None,
        };
        for id in [""].iter().chain(execs) {
            if !id.is_empty() {
                container.execs.insert((*id).into(), process());
            }
            let process = container.process_mut(id).unwrap();
            process.change(Change::Start).unwrap();
            container.started(id, &events);
        }
        events.take();
        (container, events)
    }

    /// The events as words: the topic's last part, and the process of an exit with its status.
    fn told(events: &Publisher) -> Vec<String> {
        let words = events.take().into_iter().map(|(topic, message)| {
            let topic = topic.trim_start_matches("/tasks/").to_owned();
            match topic.as_str() {
                "exit" => {
                    let exit = TaskExit::parse_from_bytes(&message).unwrap();
                    assert_eq!(exit.container_id, "c");
                    assert!(exit.exited_at.seconds > 0);
                    format!("exit {} {}", exit.id, exit.exit_status)
                }
                _ => topic,
            }
        });
        words.collect()
    }

    #[test]
    fn an_end_before_the_answer_to_start_is_told_after_the_start() {
        let (mut container, events) = container(&[]);
        container.init = Process::new(Stdio::default(), None);
        container.init.change(Change::Start).unwrap();
        container.exited("", Exit::now(3), &events);
        assert!(told(&events).is_empty());
        assert!(container.init_has_ended());
        assert_eq!(container.init.exit(), None);
        container.started("", &events);
        assert_eq!(told(&events), ["start", "exit c 3"]);
    }

    #[test]
    fn the_end_of_the_init_is_told_last() {
        let (mut container, events) = container(&["x", "y"]);
        container.exited("x", Exit::now(1), &events);
        container.exited("", Exit::now(2), &events);
        assert_eq!(told(&events), ["exit x 1"]);
        assert_eq!(container.init.phase, Phase::Running);
        container.exited("y", Exit::now(3), &events);
        container.exited("y", Exit::now(4), &events);
        container.exited("", Exit::now(4), &events);
        assert_eq!(told(&events), ["exit y 3", "exit c 2"]);
    }

    #[tokio::test]
    async fn an_exec_that_could_not_start_ends_without_an_event() {
        let (mut container, events) = container(&["x"]);
        let mut exec = Process::new(Stdio::default(), None);
        exec.change(Change::Start).unwrap();
        container.execs.insert("x".into(), exec);
        container.exited("", Exit::now(2), &events);
        container.start_failed("x", &events);
        let exec = &container.execs["x"];
        assert_eq!((exec.phase, exec.exit()), (Phase::Created, None));
        assert_eq!(exec.ended().await, Some(End::NeverRan));
        assert_eq!(told(&events), ["exit c 2"]);
    }

    #[test]
    fn an_init_that_could_not_start_is_created_or_ended() {
        let (mut container, events) = container(&[]);
        container.init = Process::new(Stdio::default(), None);
        container.init.change(Change::Start).unwrap();
        container.start_failed("", &events);
        assert_eq!(container.init.phase, Phase::Created);
        container.init.change(Change::Start).unwrap();
        container.exited("", Exit::now(137), &events);
        container.start_failed("", &events);
        assert_eq!(told(&events), ["exit c 137"]);
    }

    #[test]
    fn a_machine_ends_all_that_runs() {
        let (mut container, events) = container(&["x", "done", "starting"]);
        container.exited("done", Exit::now(0), &events);
        let mut exec = Process::new(Stdio::default(), None);
        exec.change(Change::Start).unwrap();
        container.execs.insert("starting".into(), exec);
        let added = Process::new(Stdio::default(), None);
        container.execs.insert("added".into(), added);
        told(&events);
        container.machine_ended(Exit::now(137), &events);
        assert_eq!(told(&events), ["exit x 137"]);
        container.start_failed("starting", &events);
        assert_eq!(told(&events), ["exit c 137"]);
        assert_eq!(container.execs["added"].phase, Phase::Created);
        assert_eq!(container.execs["starting"].phase, Phase::Stopped);
    }

    #[test]
    fn pauses_are_told_when_they_are_done() {
        let (mut container, events) = container(&[]);
        container.init.change(Change::Pause).unwrap();
        container.paused(false, &events);
        assert_eq!(container.init.phase, Phase::Running);
        container.resumed(&events);
        assert!(told(&events).is_empty());
        container.init.change(Change::Pause).unwrap();
        container.paused(true, &events);
        container.resumed(&events);
        container.out_of_memory(&events);
        container.exited("", Exit::now(137), &events);
        container.out_of_memory(&events);
        assert_eq!(told(&events), ["paused", "resumed", "oom", "exit c 137"]);
    }
}
