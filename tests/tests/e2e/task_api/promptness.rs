//! State is told at once, whatever the machine does or does not do.

use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::occasion::{Occasion, WatchFlags};
use bulkhead_tests::peer::{Kind, PATIENCE, Paths, Peer, Shim, Stream, code};
use bulkhead_tests::process;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};

use super::{SIGKILL, background, wait_for_end};

/// How long containerd waits for a state (`io.containerd.timeout.task.state`).
const LIMIT: Duration = Duration::from_secs(2);

/// What the container writes: more than there is room for on the way to a reader who does not read.
const OUTPUT: usize = 4_000_000;

/// A machine that stands still.
struct Stopped(Pid);

impl Stopped {
    /// Stops the one that there is.
    fn now() -> Self {
        let machines = process::named("bulkhead-vmm").unwrap();
        assert_eq!(machines.len(), 1);
        kill_process(machines[0], Signal::STOP).unwrap();
        Self(machines[0])
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // One that has ended does not go on.
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// The status of a process, or the error's code, which must not take long. Neither may the question who serves the task.
fn prompt(shim: &Shim, exec: &str) -> String {
    let begun = Instant::now();
    let status = shim.status("prompt", exec);
    let taken = begun.elapsed();
    assert!(taken < LIMIT, "{status} after {taken:?}");
    let begun = Instant::now();
    assert!(shim.server("").unwrap().shim_pid > 0);
    let taken = begun.elapsed();
    assert!(taken < LIMIT, "Connect after {taken:?}");
    status
}

#[test]
fn state_is_told_whatever_the_machine_does() {
    let world = World::new().unwrap();
    let peer = Peer::new(world.site(), Runtime::Bulkhead).unwrap();
    let script = format!("head -c {OUTPUT} /dev/zero");
    let bundle = peer
        .bundle("prompt", Kind::Single, &["sh", "-c", &script], |_| {})
        .unwrap();
    let shim = peer.start(&bundle).unwrap();
    let (stdout, reader) = peer.unread("prompt").unwrap();
    let paths = Paths {
        stdout,
        ..Paths::default()
    };
    let id = "prompt";

    // A machine that boots, and stands still in the middle of it.
    let kernel = world.site().payload.join("lib/vmlinux");
    let kernel = Occasion::watch(&kernel, WatchFlags::ACCESS).unwrap();
    thread::scope(|scope| {
        let create = scope.spawn(|| shim.create(&bundle, &paths).unwrap());
        kernel.wait("").unwrap();
        let machine = Stopped::now();
        assert_eq!(prompt(&shim, ""), "NOT_FOUND");
        assert_eq!(prompt(&peer.find(&bundle).unwrap(), ""), "NOT_FOUND");
        assert!(!create.is_finished());
        drop(machine);
        create.join().unwrap();
    });
    assert_eq!(prompt(&shim, ""), "CREATED");

    // One that does not answer to a start, and output that nobody reads.
    let machine = Stopped::now();
    let start = background(&shim, move |shim| code(&shim.start(id, "")));
    assert_eq!(prompt(&shim, ""), "CREATED");
    drop(machine);
    assert_eq!(start.join().unwrap(), "OK");
    let limit = PATIENCE.try_into().unwrap();
    let mut waits = [PollFd::new(&reader, PollFlags::IN)];
    assert_eq!(poll(&mut waits, Some(&limit)), Ok(1));
    assert_eq!(prompt(&shim, ""), "RUNNING");

    // A process that hangs where it begins, and one that runs.
    let nothing = Paths::default();
    for exec in ["runs", "hangs"] {
        shim.exec(id, exec, &["sleep", "1000"], &nothing).unwrap();
    }
    shim.start(id, "runs").unwrap();
    let machine = Stopped::now();
    let start = background(&shim, move |shim| code(&shim.start(id, "hangs")));
    assert_eq!(prompt(&shim, "hangs"), "CREATED");
    assert_eq!(prompt(&shim, "runs"), "RUNNING");
    assert_eq!(prompt(&shim, ""), "RUNNING");
    drop(machine);
    assert_eq!(start.join().unwrap(), "OK");

    // One that is frozen, or about to be.
    shim.pause(id).unwrap();
    assert_eq!(prompt(&shim, ""), "PAUSED");
    let machine = Stopped::now();
    assert_eq!(prompt(&shim, ""), "PAUSED");
    let resume = background(&shim, move |shim| code(&shim.resume(id)));
    assert_eq!(prompt(&shim, "runs"), "PAUSED");
    drop(machine);
    assert_eq!(resume.join().unwrap(), "OK");
    assert_eq!(prompt(&shim, ""), "RUNNING");

    // And one that is asked to end, with everybody who waits for it.
    let machine = Stopped::now();
    let wait = background(&shim, move |shim| shim.wait(id, "hangs").unwrap());
    let kill = background(&shim, move |shim| {
        code(&shim.kill(id, "hangs", SIGKILL, false))
    });
    assert_eq!(prompt(&shim, "hangs"), "RUNNING");
    drop(machine);
    assert_eq!(kill.join().unwrap(), "OK");
    assert_eq!(wait.join().unwrap().exit_status, 137);
    assert_eq!(prompt(&shim, "hangs"), "STOPPED");

    // Now somebody reads.
    let output = Stream::read(reader);
    shim.kill(id, "runs", SIGKILL, false).unwrap();
    assert_eq!(shim.wait(id, "").unwrap().exit_status, 0);
    assert_eq!(prompt(&shim, ""), "STOPPED");
    let server = shim.server(id).unwrap().shim_pid;
    shim.delete(id, "").unwrap();
    assert_eq!(output.bytes().unwrap().len(), OUTPUT);
    assert_eq!(prompt(&shim, ""), "NOT_FOUND");
    // It may end before it has answered.
    let _ = shim.shutdown(id);
    wait_for_end(server);
    world.finish().unwrap();
}
