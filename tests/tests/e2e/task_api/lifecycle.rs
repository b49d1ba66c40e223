//! From Create to Delete.

use bulkhead_tests::ctr::Runtime;
use bulkhead_tests::peer::{Paths, V3, code};
use containerd_shim_protos::api::WaitResponse;

use super::{Behaviour, Notes, Pod, SIGKILL, SIGTERM, SIGUSR1, background, compare_for};

/// Bulkhead's shim is asked by the name of the service that containerd 2 calls, which a runc of the node's age does not know.
#[test]
fn containers_live_and_end_as_under_runc() {
    let behaviours: &[Behaviour] = &[
        ("one_life", one_life),
        ("never_started", never_started),
        ("killed_before_start", killed_before_start),
        ("frozen", frozen),
        ("killed_while_frozen", killed_while_frozen),
        ("signalled_while_frozen", signalled_while_frozen),
        ("killed_with_all_its_processes", killed_with_all),
        ("signals_and_their_codes", signals),
    ];
    compare_for(behaviours, |peer| peer.speaking(V3));
}

fn at(time: &WaitResponse) -> (i64, i32) {
    (time.exited_at.seconds, time.exited_at.nanos)
}

fn one_life(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let script = "echo out; echo err >&2; exit 7";
    let bundle = pod.member(id, &["sh", "-c", script]);
    // containerd has the shim started for each container, which leads to the same shim.
    let shim = pod.peer.start(&bundle).unwrap();
    let streams = pod.peer.streams(id, None).unwrap();
    let pid = shim.create(&bundle, &streams.paths).unwrap();
    let state = shim.state(id, "").unwrap();
    assert_eq!((state.pid, state.id.as_str()), (pid, id));
    assert_eq!(state.bundle, bundle.path.display().to_string());
    assert_eq!(state.stdout, streams.paths.stdout);
    notes.push(format!("created: {:?} {}", state.status, state.exit_status));
    let connected = shim.server(id).unwrap();
    assert_eq!(connected.task_pid, pid);

    let waits: Vec<_> = (0..3)
        .map(|_| {
            let id = id.to_owned();
            background(&shim, move |shim| shim.wait(&id, "").unwrap())
        })
        .collect();
    notes.push(format!("start: {}", code(&shim.start(id, ""))));
    let mut exits: Vec<_> = waits.into_iter().map(|wait| wait.join().unwrap()).collect();
    exits.push(shim.wait(id, "").unwrap());
    let exited_at = at(&exits[0]);
    assert!(exited_at.0 > 0);
    for exit in &exits {
        assert_eq!(at(exit), exited_at);
        notes.push(format!("wait: {}", exit.exit_status));
    }
    let state = shim.state(id, "").unwrap();
    notes.push(format!("ended: {:?} {}", state.status, state.exit_status));
    assert_eq!((state.exited_at.seconds, state.exited_at.nanos), exited_at);
    notes.push(format!("start again: {}", code(&shim.start(id, ""))));
    notes.push(format!(
        "kill: {}",
        code(&shim.kill(id, "", SIGTERM, false))
    ));
    notes.push(format!(
        "kill all: {}",
        code(&shim.kill(id, "", SIGKILL, true))
    ));
    let nothing = Paths::default();
    let exec = shim.exec(id, "late", &["true"], &nothing);
    notes.push(format!("exec: {}", code(&exec)));
    let deleted = shim.delete(id, "").unwrap();
    notes.push(format!("delete: {}", deleted.exit_status));
    assert_eq!(deleted.pid, pid);
    let deleted_at = (deleted.exited_at.seconds, deleted.exited_at.nanos);
    assert_eq!(deleted_at, exited_at);
    notes.push(format!("stdout: {}", streams.stdout.text().unwrap()));
    notes.push(format!("stderr: {}", streams.stderr.text().unwrap()));

    let events = pod.peer.events.until(id, "delete").unwrap();
    for event in events {
        assert_eq!(event.pid, pid, "{event:?}");
        assert!(
            event.exited_at.is_none_or(|at| at == exited_at),
            "{event:?}"
        );
        notes.push(event.text);
    }
    notes.push(format!("delete again: {}", code(&shim.delete(id, ""))));
    notes.push(format!("state: {}", code(&shim.state(id, ""))));
    notes.push(format!("wait: {}", code(&shim.wait(id, ""))));
    notes.push(format!("start: {}", code(&shim.start(id, ""))));
    notes.push(format!("kill: {}", code(&shim.kill(id, "", SIGKILL, true))));
    notes
}

fn never_started(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let bundle = pod.member(id, &["true"]);
    pod.shim.create(&bundle, &Paths::default()).unwrap();
    notes.push(format!("pause: {}", code(&pod.shim.pause(id))));
    let deleted = pod.shim.delete(id, "");
    notes.push(format!("delete: {}", code(&deleted)));
    notes.push(pod.events(id, "delete"));
    notes.push(format!("state: {}", pod.shim.status(id, "")));
    // Its name is free again.
    notes.push(format!(
        "again: {}",
        code(&pod.shim.create(&bundle, &Paths::default()))
    ));
    notes.push(format!("delete: {}", code(&pod.shim.delete(id, ""))));
    notes
}

fn killed_before_start(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let bundle = pod.member(id, &["true"]);
    pod.shim.create(&bundle, &Paths::default()).unwrap();
    notes.push(format!(
        "kill: {}",
        code(&pod.shim.kill(id, "", SIGKILL, false))
    ));
    let exit = pod.shim.wait(id, "").unwrap();
    notes.push(format!("wait: {}", exit.exit_status));
    notes.push(format!("start: {}", code(&pod.shim.start(id, ""))));
    notes.push(format!(
        "delete: {}",
        pod.shim.delete(id, "").unwrap().exit_status
    ));
    notes.push(pod.events(id, "delete"));
    notes
}

fn frozen(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    notes.push(format!("resume: {}", code(&pod.shim.resume(id))));
    let nothing = Paths::default();
    let added = pod.shim.exec(id, "before", &["true"], &nothing);
    notes.push(format!("exec: {}", code(&added)));
    notes.push(format!("pause: {}", code(&pod.shim.pause(id))));
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    notes.push(format!("exec: {}", pod.shim.status(id, "before")));
    let started = pod.shim.start(id, "before");
    notes.push(format!("start: {}", code(&started)));
    notes.push(format!("exec: {}", pod.shim.status(id, "before")));
    notes.push(format!("pause: {}", code(&pod.shim.pause(id))));
    let exec = pod.shim.exec(id, "x", &["true"], &nothing);
    notes.push(format!("exec: {}", code(&exec)));
    notes.push(format!("delete: {}", code(&pod.shim.delete(id, ""))));
    notes.push(format!("stats: {}", code(&pod.shim.stats(id))));
    notes.push(format!("resume: {}", code(&pod.shim.resume(id))));
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    notes.push(format!("exec: {}", pod.shim.status(id, "before")));
    pod.remove(id);
    notes.push(pod.events(id, "delete"));
    notes
}

fn killed_while_frozen(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    pod.shim.pause(id).unwrap();
    notes.push(format!(
        "kill: {}",
        code(&pod.shim.kill(id, "", SIGKILL, false))
    ));
    notes.push(format!(
        "wait: {}",
        pod.shim.wait(id, "").unwrap().exit_status
    ));
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    notes.push(format!(
        "delete: {}",
        pod.shim.delete(id, "").unwrap().exit_status
    ));
    notes.push(pod.events(id, "delete"));
    notes
}

fn signalled_while_frozen(pod: &Pod, id: &str) -> Notes {
    let (paths, wait) = pod.first_word(id);
    let script = "trap 'exit 7' TERM; echo .; sleep 1000 >/dev/null 2>&1 & wait";
    let bundle = pod.member(id, &["sh", "-c", script]);
    pod.shim.create(&bundle, &paths).unwrap();
    pod.shim.start(id, "").unwrap();
    wait();
    pod.shim.pause(id).unwrap();
    let killed = code(&pod.shim.kill(id, "", SIGTERM, true));
    let mut ends = "ends at once";
    if pod.peer.runtime() == Runtime::Bulkhead {
        assert_eq!(pod.shim.status(id, ""), "PAUSED");
        pod.shim.resume(id).unwrap();
        ends = "ends when it is resumed";
    }
    let status = pod.shim.wait(id, "").unwrap().exit_status;
    pod.shim.delete(id, "").unwrap();
    pod.events(id, "delete");
    vec![format!("kill: {killed}"), format!("{ends}: {status}")]
}

fn killed_with_all(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    // The first process holds out: its end is that of the others.
    let script = "trap '' TERM; sleep 1000 & sleep 1000 & wait; exit 5";
    pod.run(id, &["sh", "-c", script]);
    let nothing = Paths::default();
    pod.shim
        .exec(id, "x", &["sleep", "1000"], &nothing)
        .unwrap();
    pod.shim.start(id, "x").unwrap();
    notes.push(format!(
        "kill: {}",
        code(&pod.shim.kill(id, "", SIGKILL, true))
    ));
    notes.push(format!(
        "exec: {}",
        pod.shim.wait(id, "x").unwrap().exit_status
    ));
    notes.push(format!(
        "init: {}",
        pod.shim.wait(id, "").unwrap().exit_status
    ));
    notes.push(format!("delete x: {}", code(&pod.shim.delete(id, "x"))));
    notes.push(format!("delete: {}", code(&pod.shim.delete(id, ""))));
    notes.push(pod.events(id, "delete"));
    notes
}

fn signals(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    // The first process of a PID namespace does not die of what it does not handle.
    notes.push(format!(
        "kill: {}",
        code(&pod.shim.kill(id, "", SIGTERM, false))
    ));
    notes.push(format!(
        "no signal: {}",
        code(&pod.shim.kill(id, "", 1000, false))
    ));
    notes.push(format!(
        "no signal to all: {}",
        code(&pod.shim.kill(id, "", 1000, true))
    ));
    // It reaches nobody, and tells whether there is somebody.
    notes.push(format!(
        "signal 0: {}, to all: {}",
        code(&pod.shim.kill(id, "", 0, false)),
        code(&pod.shim.kill(id, "", 0, true))
    ));
    for (exec, script, signal) in [
        ("term", "", SIGTERM),
        ("kill", "trap '' TERM; ", SIGKILL),
        ("usr1", "trap 'exit 9' USR1; ", SIGUSR1),
    ] {
        // runc itself may get a signal that comes before the program runs.
        let (paths, wait) = pod.first_word(exec);
        let script = format!("{script} echo .; sleep 1000 >/dev/null 2>&1 & wait");
        let args = ["sh", "-c", &script];
        pod.shim.exec(id, exec, &args, &paths).unwrap();
        pod.shim.start(id, exec).unwrap();
        wait();
        pod.shim.kill(id, exec, 0, false).unwrap();
        pod.shim.kill(id, exec, signal, false).unwrap();
        let exit = pod.shim.wait(id, exec).expect(exec);
        notes.push(format!("{exec}: {}", exit.exit_status));
        let late = pod.shim.kill(id, exec, 0, false);
        notes.push(format!("signal 0: {}", code(&late)));
        pod.shim.delete(id, exec).unwrap();
    }
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    pod.remove(id);
    notes.push(pod.events(id, "delete"));
    notes
}
