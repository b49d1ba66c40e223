//! A containerd that comes and goes, and none at all.

use std::fs::File;
use std::io::Read;
use std::thread;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Bundle, Kind, Paths, Peer, Shim, Stream};

use rustix::process::Signal;

use super::{SIGKILL, send, wait_for_end};

/// Lines of output, more than there is room for on the way to a reader who is not there.
const LINES: usize = 200_000;

/// Ends a shim that has no tasks any more.
fn shut_down(shim: &Shim, id: &str) {
    let server = shim.server("").unwrap().shim_pid;
    // It may end before it has answered.
    let _ = shim.shutdown(id);
    wait_for_end(server);
}

/// A container that writes numbers, then waits.
fn counter(peer: &Peer, id: &str) -> Bundle {
    let script = format!("seq {LINES}; exec sleep 1000");
    let program = ["sh", "-c", &script];
    peer.bundle(id, Kind::Single, &program, |_| {}).unwrap()
}

#[test]
fn a_restart_of_containerd_loses_no_byte_and_no_event() {
    let world = World::new().unwrap();
    let peer = Peer::new(world.site(), Runtime::Bulkhead).unwrap();
    let (id, nothing) = ("counter", Paths::default());
    let bundle = counter(&peer, id);
    let shim = peer.start(&bundle).unwrap();
    let (stdout, mut reader) = peer.unread(id).unwrap();
    let paths = Paths {
        stdout: stdout.clone(),
        ..Paths::default()
    };
    let pid = shim.create(&bundle, &paths).unwrap();
    shim.start(id, "").unwrap();
    let mut pids = Vec::new();
    for exec in ["x", "y"] {
        shim.exec(id, exec, &["sleep", "1000"], &nothing).unwrap();
        pids.push(shim.start(id, exec).unwrap());
    }
    // An event that containerd has and has not answered for comes again. The answer to this one leaves at once, long before the output is
    // here, which is more than a FIFO holds.
    let mut events = peer.events.until(id, "exec-started y").unwrap();
    let mut output = vec![0; 100_000];
    reader.read_exact(&mut output).unwrap();

    // containerd dies, and with it everything that it has open. Meanwhile processes end.
    drop(reader);
    drop(shim);
    peer.events.hang_up().unwrap();
    for (pid, signal) in pids.into_iter().zip([Signal::TERM, Signal::KILL]) {
        send(pid, signal);
        wait_for_end(pid);
    }

    // It comes back.
    let shim = peer.find(&bundle).unwrap();
    assert_eq!(shim.server(id).unwrap().task_pid, pid);
    assert_eq!(shim.status(id, ""), "RUNNING");
    assert_eq!(shim.wait(id, "x").unwrap().exit_status, 143);
    assert_eq!(shim.wait(id, "y").unwrap().exit_status, 137);
    let mut reader = File::open(&stdout).unwrap();
    let numbers: String = (1..=LINES).map(|number| format!("{number}\n")).collect();
    let rest = numbers.len() - output.len();
    let rest = thread::spawn(move || {
        let mut bytes = vec![0; rest];
        reader.read_exact(&mut bytes).unwrap();
        (bytes, reader)
    });
    // What happens before its event service is there is not forgotten either.
    for exec in ["x", "y"] {
        shim.delete(id, exec).unwrap();
    }
    let streams = peer.streams("after", None).unwrap();
    let echo = ["echo", "through"];
    shim.exec(id, "z", &echo, &streams.paths).unwrap();
    shim.start(id, "z").unwrap();
    assert_eq!(shim.wait(id, "z").unwrap().exit_status, 0);
    shim.delete(id, "z").unwrap();
    assert_eq!(streams.stdout.text().unwrap(), "through\n");
    peer.events.listen().unwrap();
    let (rest, reader) = rest.join().unwrap();
    output.extend(rest);
    // Not assert_eq!: nobody wants to read the difference.
    assert!(output == numbers.as_bytes(), "the bytes differ");
    shim.kill(id, "", SIGKILL, false).unwrap();
    assert_eq!(shim.wait(id, "").unwrap().exit_status, 137);
    shim.delete(id, "").unwrap();

    events.extend(peer.events.until(id, "delete").unwrap());
    let words: Vec<_> = events.iter().map(|event| event.text.as_str()).collect();
    let expected = [
        "create",
        "start",
        "exec-added x",
        "exec-started x",
        "exec-added y",
        "exec-started y",
        "exit x 143",
        "exit y 137",
        "exec-added z",
        "exec-started z",
        "exit z 0",
        "exit counter 137",
        "delete 137",
    ];
    assert_eq!(words, expected);
    shut_down(&shim, id);
    assert_eq!(peer.events.rest().unwrap(), [""; 0]);
    // Nothing came twice.
    assert_eq!(Stream::read(reader).bytes().unwrap(), [0; 0]);
    world.finish().unwrap();
}

/// CRI-O takes no events; and there may be nobody where they should go.
#[test]
fn a_shim_needs_nobody_to_tell() {
    let world = World::new().unwrap();
    for publisher in ["", "/nowhere/containerd.sock.ttrpc"] {
        let peer = Peer::new(world.site(), Runtime::Bulkhead).unwrap();
        let peer = peer.misdirect(publisher);
        let program = ["sh", "-c", "read word; echo $word; exit 7"];
        let bundle = peer
            .bundle("alone", Kind::Single, &program, |_| {})
            .unwrap();
        let shim = peer.start(&bundle).unwrap();
        let streams = peer.streams("alone", Some(b"word\n")).unwrap();
        shim.create(&bundle, &streams.paths).unwrap();
        shim.start("alone", "").unwrap();
        assert_eq!(shim.wait("alone", "").unwrap().exit_status, 7);
        assert_eq!(shim.delete("alone", "").unwrap().exit_status, 7);
        assert_eq!(streams.stdout.text().unwrap(), "word\n");
        shut_down(&shim, "alone");
        assert_eq!(peer.events.rest().unwrap(), [""; 0]);
    }
    world.finish().unwrap();
}
