//! Wait: whoever asks, whenever, however often, hears of one end at one moment.

use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Paths, Shim, code};
use containerd_shim_protos::api::WaitResponse;
use containerd_shim_protos::ttrpc;

use super::{Notes, Pod, SIGKILL, background, compare};

/// More than containerd ever has for one task.
const MANY: usize = 50;

#[test]
fn everybody_who_waits_is_told_as_under_runc() {
    compare(&[("many_who_wait", many_who_wait)]);
}

type Answer = ttrpc::Result<WaitResponse>;

/// Waits for a process in the background.
fn waiter(shim: &Shim, id: &str, exec: &str) -> JoinHandle<Answer> {
    let (id, exec) = (id.to_owned(), exec.to_owned());
    let (ready, begun) = channel::<()>();
    let thread = background(shim, move |shim| {
        drop(ready);
        shim.wait(&id, &exec)
    });
    // Nothing is sent: it disconnects.
    begun.recv().unwrap_err();
    thread
}

/// One end of an exec and one of an init, each told at one moment by all that tells of it.
fn many_who_wait(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let (shim, nothing) = (&pod.shim, Paths::default());
    let bundle = pod.member(id, &["sleep", "1000"]);
    let pid = shim.create(&bundle, &nothing).unwrap();
    let other = pod.peer.find(&pod.sandbox).unwrap();
    let many = |exec: &str| -> Vec<_> {
        let shims = [shim, &other].into_iter().cycle();
        shims
            .take(MANY)
            .map(|shim| waiter(shim, id, exec))
            .collect()
    };
    // Before the start as well as after it.
    let mut inits = many("");
    shim.start(id, "").unwrap();
    shim.exec(id, "x", &["sleep", "1000"], &nothing).unwrap();
    let mut execs = many("x");
    let exec_pid = shim.start(id, "x").unwrap();
    inits.extend(many(""));
    execs.extend(many("x"));
    for (exec, own_id, pid, waiters) in [("x", "x", exec_pid, execs), ("", id, pid, inits)] {
        notes.push(format!("status: {}", shim.status(id, exec)));
        shim.kill(id, exec, SIGKILL, false).unwrap();
        let mut told: Vec<_> = waiters
            .into_iter()
            .map(|waiter| waiter.join().unwrap().unwrap())
            .collect();
        // And those who come late.
        told.push(shim.wait(id, exec).unwrap());
        told.push(other.wait(id, exec).unwrap());
        let first = &told[0];
        let at = (first.exited_at.seconds, first.exited_at.nanos);
        assert!(at.0 > 0, "{first:?}");
        assert!(told.iter().all(|answer| answer == first), "{told:?}");
        notes.push(format!("{}: {}", told.len(), first.exit_status));
        let state = shim.state(id, exec).unwrap();
        assert_eq!(
            (state.exit_status, &state.exited_at),
            (137, &first.exited_at)
        );
        let deleted = shim.delete(id, exec).unwrap();
        assert_eq!(
            (deleted.exit_status, &deleted.exited_at),
            (137, &first.exited_at)
        );
        let ended = pod
            .peer
            .events
            .until(id, &format!("exit {own_id}"))
            .unwrap();
        let event = ended.last().unwrap();
        assert_eq!((event.pid, event.exited_at), (pid, Some(at)), "{event:?}");
        notes.push(event.text.clone());
    }
    let deleted = pod.peer.events.until(id, "delete").unwrap();
    notes.push(deleted.last().unwrap().text.clone());
    notes
}

/// Nobody waits for ever for a container, or for a process in one, that is deleted before it is started. (With the shim of runc's age
/// they do.) Who comes too late finds nothing to wait for.
#[test]
fn who_waits_for_what_never_starts_is_told() {
    let world = World::new().unwrap();
    let pod = Pod::start(&world, Runtime::Bulkhead);
    let (shim, nothing) = (&pod.shim, Paths::default());
    let (id, exec) = ("never", "x");
    let many = |exec: &str| -> Vec<_> { (0..MANY).map(|_| waiter(shim, id, exec)).collect() };
    let bundle = pod.member(id, &["sleep", "1000"]);
    shim.create(&bundle, &nothing).unwrap();
    let waiters = many("");
    let deleted = shim.delete(id, "").unwrap();
    assert_eq!(deleted.exit_status, 0);
    let events = pod.peer.events.until(id, "delete").unwrap();
    let words: Vec<_> = events.iter().map(|event| event.text.as_str()).collect();
    assert_eq!(words, ["create", "exit never 137", "delete 0"]);
    let at = (deleted.exited_at.seconds, deleted.exited_at.nanos);
    for event in &events[1..] {
        assert_eq!(event.exited_at, Some(at), "{event:?}");
    }
    for waiter in waiters {
        match waiter.join().unwrap() {
            // It was there, and was killed, though nobody counts that.
            Ok(ended) => {
                assert_eq!(
                    (ended.exit_status, &ended.exited_at),
                    (137, &deleted.exited_at)
                );
            }
            late => assert_eq!(code(&late), "NOT_FOUND"),
        }
    }

    pod.run(id, &["sleep", "1000"]);
    shim.exec(id, exec, &["true"], &nothing).unwrap();
    let waiters = many(exec);
    shim.delete(id, exec).unwrap();
    for waiter in waiters {
        assert_eq!(code(&waiter.join().unwrap()), "NOT_FOUND");
    }
    pod.remove(id);
    pod.events(id, "delete");
    let [end] = &pod.end()[..] else {
        panic!("there are events of nobody");
    };
    assert!(end.ends_with("delete 137"), "{end}");
    world.finish().unwrap();
}
