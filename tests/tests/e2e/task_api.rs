//! The Task service: what a client of it sees is what runc's shim shows it.
//!
//! Each behaviour is played once with runc's shim and once with Bulkhead's, by a stand-in for containerd, and writes down what it
//! sees: outcomes, exit codes, output, events. The two must be the same but for [`DIFFERENCES`].

mod deletion;
mod differences;
mod disks;
mod errors;
mod lifecycle;
mod networks;
mod processes;
mod promptness;
mod publisher;
mod statistics;
mod streams;
mod updates;
mod waiting;

use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Bundle, Kind, PATIENCE, Paths, Peer, Shim, Stream};
use containerd_shim_protos::ttrpc;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;

use differences::{Difference, differ_in_code};

const SIGUSR1: u32 = 10;
const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// A pod of one of the two runtimes.
struct Pod {
    peer: Peer,
    shim: Shim,
    sandbox: Bundle,
}

/// What a behaviour has seen.
type Notes = Vec<String>;

type Behaviour = (&'static str, fn(&Pod, &str) -> Notes);

impl Pod {
    fn start(world: &World, runtime: Runtime) -> Self {
        Self::start_for(Peer::new(world.site(), runtime).unwrap())
    }

    fn start_for(peer: Peer) -> Self {
        let runtime = peer.runtime();
        // What a pod that failed has left must not harm the next.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let id = format!("pod{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let program = ["sleep", "1000000"];
        let sandbox = peer.bundle(&id, Kind::Sandbox, &program, |_| {}).unwrap();
        let shim = peer.start(&sandbox).unwrap();
        let early = thread::scope(|scope| {
            let create = scope.spawn(|| shim.create(&sandbox, &Paths::default()).unwrap());
            // An answer that waited for the machine to boot would be another one. runc's shim has it wait for Create.
            let early = shim.status(&id, "");
            create.join().unwrap();
            early
        });
        assert!(runtime == Runtime::Runc || early == "NOT_FOUND", "{early}");
        shim.start(&id, "").unwrap();
        Self {
            peer,
            shim,
            sandbox,
        }
    }

    /// A bundle in the pod.
    fn member(&self, id: &str, args: &[&str]) -> Bundle {
        let kind = Kind::Member(&self.sandbox.id);
        self.peer.bundle(id, kind, args, |_| {}).unwrap()
    }

    /// A container that runs, without standard streams.
    fn run(&self, id: &str, args: &[&str]) -> u32 {
        let bundle = self.member(id, args);
        let pid = self.shim.create(&bundle, &Paths::default()).unwrap();
        assert_eq!(self.shim.start(id, "").unwrap(), pid);
        pid
    }

    /// A place for a process's output, and what waits for the first byte of it.
    fn first_word(&self, name: &str) -> (Paths, impl FnOnce() + use<>) {
        let (stdout, mut reader) = self.peer.unread(name).unwrap();
        let paths = Paths {
            stderr: stdout.clone(),
            stdout,
            ..Paths::default()
        };
        let wait = move || {
            reader.read_exact(&mut [0]).unwrap();
            // The rest is of no interest, but must not stay in the FIFO.
            drop(Stream::read(reader));
        };
        (paths, wait)
    }

    /// What a shell says that is run in a container.
    fn say(&self, id: &str, script: &str) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let exec = format!("say{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let streams = self.peer.streams(&exec, None).unwrap();
        let program = ["sh", "-c", script];
        self.shim.exec(id, &exec, &program, &streams.paths).unwrap();
        self.shim.start(id, &exec).unwrap();
        self.shim.wait(id, &exec).unwrap();
        self.shim.delete(id, &exec).unwrap();
        let errors = streams.stderr.text().unwrap();
        assert_eq!(errors, "");
        streams.stdout.text().unwrap()
    }

    /// Kills a container and deletes it.
    fn remove(&self, id: &str) {
        self.shim.kill(id, "", SIGKILL, true).unwrap();
        self.shim.wait(id, "").unwrap();
        self.shim.delete(id, "").unwrap();
    }

    /// The words of a container's events so far, up to the one that begins with `last`.
    fn events(&self, id: &str, last: &str) -> String {
        let events = self.peer.events.until(id, last).unwrap();
        let words: Vec<_> = events.into_iter().map(|event| event.text).collect();
        words.join(", ")
    }

    /// Ends it all, and tells what events there were that no behaviour has asked for.
    fn end(self) -> Notes {
        let id = &self.sandbox.id;
        let shim = self.shim.server(id).unwrap().shim_pid;
        self.remove(id);
        let own = self.events(id, "delete").replace(id, "pod");
        // It may end before it has answered.
        let _ = self.shim.shutdown(id);
        wait_for_end(shim);
        let mut notes = vec![own];
        notes.extend(self.peer.events.rest().unwrap());
        notes
    }

    /// What a container of such a configuration writes until it ends; an error is that of Create.
    fn said(
        &self,
        id: &str,
        program: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> ttrpc::Result<String> {
        let kind = Kind::Member(&self.sandbox.id);
        let bundle = self.peer.bundle(id, kind, program, change).unwrap();
        let streams = self.peer.streams(id, None).unwrap();
        self.shim.create(&bundle, &streams.paths)?;
        self.shim.start(id, "").unwrap();
        self.shim.wait(id, "").unwrap();
        self.shim.delete(id, "").unwrap();
        self.events(id, "delete");
        assert_eq!(streams.stderr.text().unwrap(), "");
        Ok(streams.stdout.text().unwrap().trim_end().into())
    }

    /// Ends what a failure has left.
    fn abandon(self) {
        let shim = self.shim.server(&self.sandbox.id);
        if let Ok(Some(pid)) = shim.map(|shim| Pid::from_raw(shim.shim_pid as i32)) {
            // It is gone already if this fails.
            let _ = kill_process(pid, Signal::KILL);
            wait_for_end(pid.as_raw_nonzero().get() as u32);
        }
        self.peer.delete_all().unwrap();
    }
}

fn send(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// The next line that a container writes.
fn line(output: &mut File) -> String {
    // What it does before may be much.
    let limit = (PATIENCE * 5).try_into().unwrap();
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut waits = [PollFd::new(output, PollFlags::IN)];
        assert_eq!(poll(&mut waits, Some(&limit)), Ok(1), "{line:?}");
        let mut byte = [0];
        output.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    String::from_utf8(line).unwrap().trim_end().into()
}

/// Waits until a process is gone.
fn wait_for_end(pid: u32) {
    let pid = Pid::from_raw(pid as i32).unwrap();
    if let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) {
        let mut waits = [PollFd::new(&process, PollFlags::IN)];
        let limit = PATIENCE.try_into().unwrap();
        assert_eq!(poll(&mut waits, Some(&limit)), Ok(1));
    }
}

/// Plays the behaviours in a pod of each runtime, and compares what they saw.
fn compare(behaviours: &[Behaviour]) {
    compare_for(behaviours, |peer| peer);
}

/// The same, with another containerd for Bulkhead.
fn compare_for(behaviours: &[Behaviour], change: impl Fn(Peer) -> Peer) {
    let world = World::new().unwrap();
    let mut wrong = Vec::new();
    let mut play = |runtime| {
        let mut peer = Peer::new(world.site(), runtime).unwrap();
        if runtime == Runtime::Bulkhead {
            peer = change(peer);
        }
        let pod = Pod::start_for(peer);
        let mut play = |(name, behave): &Behaviour| {
            eprintln!("{runtime:?}: {name}");
            let id = name.replace('_', "-");
            // One that fails does not keep the others from showing what they see.
            let played = catch_unwind(AssertUnwindSafe(|| behave(&pod, &id)));
            played.unwrap_or_else(|_| {
                wrong.push(format!("{runtime:?}: {name} failed"));
                vec!["failed".into()]
            })
        };
        let mut notes: Vec<Notes> = behaviours.iter().map(&mut play).collect();
        if wrong.is_empty() {
            notes.push(pod.end());
        } else {
            pod.abandon();
        }
        notes
    };
    let expected = play(Runtime::Runc);
    let found = play(Runtime::Bulkhead);
    let names = behaviours.iter().map(|(name, _)| *name).chain(["end"]);
    for ((name, expected), found) in names.zip(expected).zip(found) {
        wrong.extend(differences(name, &expected, &found));
    }
    assert!(wrong.is_empty(), "not as under runc:\n{}", wrong.join("\n"));
    world.finish().unwrap();
}

/// Where two plays differ, apart from what is known to differ, and what is said to differ and does not.
fn differences(name: &str, expected: &[String], found: &[String]) -> Vec<String> {
    assert!(!expected.is_empty(), "{name} saw nothing");
    let missing = "(nothing)".to_owned();
    let at = |notes: &[String], line: usize| notes.get(line).unwrap_or(&missing).clone();
    let differ: Vec<_> = (0..expected.len().max(found.len()))
        .map(|line| (at(expected, line), at(found, line)))
        .filter(|(runc, bulkhead)| runc != bulkhead && !differ_in_code(runc, bulkhead))
        .collect();
    let explained = |runc: &str, bulkhead: &str| {
        Difference::of(name).any(|known| known.explains(name, runc, bulkhead))
    };
    let unknown = differ
        .iter()
        .filter(|(runc, bulkhead)| !explained(runc, bulkhead))
        .map(|(runc, bulkhead)| format!("{name}\n  runc:     {runc}\n  Bulkhead: {bulkhead}"));
    let stale = Difference::of(name)
        .filter(|known| !differ.iter().any(|(a, b)| known.explains(name, a, b)))
        .map(|known| format!("{name} does not differ, though {}", known.reason));
    unknown.chain(stale).collect()
}

/// Asks something in the background.
fn background<T: Send + 'static>(
    shim: &Shim,
    ask: impl FnOnce(Shim) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let shim = shim.clone();
    thread::spawn(move || ask(shim))
}
