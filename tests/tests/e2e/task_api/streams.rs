//! Standard streams.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::images::noise;
use bulkhead_tests::peer::{Kind, PATIENCE, Paths, Peer, Stream, code};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use serde_json::Value;

use super::{Notes, Pod, SIGKILL, compare, wait_for_end};

#[test]
fn streams_are_those_of_runc() {
    compare(&[
        (
            "input_closed_before_the_start",
            input_closed_before_the_start,
        ),
        ("nothing_to_read", nothing_to_read),
        ("one_place_for_both", one_place_for_both),
        ("files", files),
        ("all_is_in_the_file", all_is_in_the_file),
        ("logger", logger),
        ("terminal", terminal),
        ("terminal_of_an_exec", terminal_of_an_exec),
        ("terminal_without_input", terminal_without_input),
        ("much_output", much_output),
        ("stuck_reader", stuck_reader),
    ]);
}

/// Nobody is there but a container and an exec in it, which ends with it, and is deleted before anybody reads what the container has said.
#[test]
fn the_last_output_waits_for_its_reader() {
    let world = World::new().unwrap();
    // As much as can be on its way: on Bulkhead's, which is longer, a part of it must still be in the guest.
    for (runtime, length) in [(Runtime::Runc, 120_000), (Runtime::Bulkhead, 400_000)] {
        let script = format!(
            "mkfifo /tmp/go 2>/dev/null; read go </tmp/go; exec head -c {length} /dev/zero"
        );
        let peer = Peer::new(world.site(), runtime).unwrap();
        let program = ["sh", "-c", &script];
        let bundle = peer.bundle("last", Kind::Single, &program, |_| {}).unwrap();
        let shim = peer.start(&bundle).unwrap();
        let (stdout, reader) = peer.unread("last").unwrap();
        let paths = Paths {
            stderr: stdout.clone(),
            stdout,
            ..Paths::default()
        };
        shim.create(&bundle, &paths).unwrap();
        let server = shim.server("last").unwrap().shim_pid;
        shim.start("last", "").unwrap();
        let script = "mkfifo /tmp/go 2>/dev/null; echo >/tmp/go; exec sleep 1000";
        let nothing = Paths::default();
        let program = ["sh", "-c", script];
        shim.exec("last", "x", &program, &nothing).unwrap();
        shim.start("last", "x").unwrap();
        assert_eq!(shim.wait("last", "x").unwrap().exit_status, 137);
        assert_eq!(shim.wait("last", "").unwrap().exit_status, 0);
        assert_eq!(shim.delete("last", "x").unwrap().exit_status, 137);
        let output = Stream::read(reader);
        shim.delete("last", "").unwrap();
        assert_eq!(output.bytes().unwrap().len(), length, "{runtime:?}");
        // It may end before it has answered.
        let _ = shim.shutdown("last");
        wait_for_end(server);
    }
    world.finish().unwrap();
}

/// What is written again and again: its length is no multiple of anything on the way, so what is lost, or comes twice, shows.
const BLOCK: usize = (8 << 20) + 9;

/// How often: more than 1 GiB in all.
const BLOCKS: usize = 128;

/// How often with runc's shim, which takes three times as long for each. It only shows that this test can pass.
const BLOCKS_OF_RUNC: usize = 2;

/// Reads so many blocks, and nothing else.
fn check(mut reader: File, block: &[u8], blocks: usize) {
    let mut received = vec![0; block.len()];
    for number in 0..blocks {
        reader.read_exact(&mut received).unwrap();
        // Not assert_eq!: nobody wants to read the difference.
        assert!(received == block, "block {number} differs");
    }
    assert_eq!(reader.read(&mut received).unwrap(), 0);
}

#[test]
fn a_gibibyte_of_output_arrives() {
    let world = World::new().unwrap();
    for (runtime, blocks) in [(Runtime::Runc, BLOCKS_OF_RUNC), (Runtime::Bulkhead, BLOCKS)] {
        let pod = Pod::start(&world, runtime);
        let block = noise(BLOCK);
        let mut paths = pod.peer.streams("much", Some(&block)).unwrap().paths;
        let (stdout, reader) = pod.peer.unread("much").unwrap();
        paths.stdout = stdout;
        let script = format!(
            "cat >/block; n=0; while [ $n -lt {blocks} ]; do cat /block; n=$((n + 1)); done"
        );
        let bundle = pod.member("much", &["sh", "-c", &script]);
        pod.shim.create(&bundle, &paths).unwrap();
        pod.shim.close_stdin("much", "").unwrap();
        pod.shim.start("much", "").unwrap();
        // However long it takes.
        check(reader, &block, blocks);
        assert_eq!(pod.shim.wait("much", "").unwrap().exit_status, 0);
        pod.shim.delete("much", "").unwrap();
        pod.end();
    }
    world.finish().unwrap();
}

/// Runs a program to its end with these standard streams.
fn run(pod: &Pod, id: &str, args: &[&str], paths: &Paths) -> Notes {
    let bundle = pod.member(id, args);
    let created = pod.shim.create(&bundle, paths);
    let mut notes = vec![format!("create: {}", code(&created))];
    if created.is_ok() {
        notes.push(format!("close: {}", code(&pod.shim.close_stdin(id, ""))));
        notes.push(format!("start: {}", code(&pod.shim.start(id, ""))));
        let exit = pod.shim.wait(id, "").unwrap();
        notes.push(format!("wait: {}", exit.exit_status));
        notes.push(format!("delete: {}", code(&pod.shim.delete(id, ""))));
    }
    notes
}

fn input_closed_before_the_start(pod: &Pod, id: &str) -> Notes {
    let streams = pod.peer.streams(id, Some(b"one line\n")).unwrap();
    let mut notes = run(pod, id, &["cat"], &streams.paths);
    notes.push(streams.stdout.text().unwrap());
    notes
}

fn nothing_to_read(pod: &Pod, id: &str) -> Notes {
    let streams = pod.peer.streams(id, None).unwrap();
    let script = "cat; readlink /proc/self/fd/0";
    let mut notes = run(pod, id, &["sh", "-c", script], &streams.paths);
    notes.push(streams.stdout.text().unwrap());
    notes
}

fn one_place_for_both(pod: &Pod, id: &str) -> Notes {
    let mut streams = pod.peer.streams(id, None).unwrap();
    streams.paths.stderr.clone_from(&streams.paths.stdout);
    let script = "for n in 1 2 3; do echo out $n; echo err $n >&2; done";
    let mut notes = run(pod, id, &["sh", "-c", script], &streams.paths);
    let text = streams.stdout.text().unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    notes.push(lines.join(", "));
    notes
}

fn files(pod: &Pod, id: &str) -> Notes {
    let path = pod.peer.path("below/output");
    let uri = format!("file://{}", path.display());
    let paths = Paths {
        stdout: uri.clone(),
        stderr: uri,
        ..Paths::default()
    };
    let mut notes = run(pod, id, &["sh", "-c", "echo out; echo err >&2"], &paths);
    // Again: it is not overwritten.
    let again = format!("{id}-again");
    notes.extend(run(pod, &again, &["echo", "more"], &paths));
    let text = fs::read_to_string(path).unwrap_or_default();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    notes.push(lines.join(", "));
    notes
}

/// What was written before the end is there once the container is deleted.
fn all_is_in_the_file(pod: &Pod, id: &str) -> Notes {
    let path = pod.peer.path(id);
    let uri = format!("file://{}", path.display());
    let paths = Paths {
        stdout: uri.clone(),
        // Without it, runc's shim dies.
        stderr: uri,
        ..Paths::default()
    };
    let script = "head -c 4000000 /dev/zero; echo end";
    let mut notes = run(pod, id, &["sh", "-c", script], &paths);
    let bytes = fs::read(path).unwrap();
    notes.push(format!("{} {}", bytes.len(), bytes.ends_with(b"end\n")));
    notes
}

fn logger(pod: &Pod, id: &str) -> Notes {
    let program = pod.peer.path("logger");
    let log = pod.peer.path("log");
    // runc's shim ends its loggers by a signal, whether they have read everything or not.
    let script = "#!/bin/sh\ntrap '' TERM\nexec >>\"$2\"\necho $CONTAINER_NAMESPACE/$CONTAINER_ID $1\n\
                  exec 5>&-\ncat <&3\nwhile read line; do echo error: $line; done <&4\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    let uri = format!("binary://{}?key={}", program.display(), log.display());
    let paths = Paths {
        stdout: uri.clone(),
        stderr: uri,
        ..Paths::default()
    };
    let mut notes = run(pod, id, &["sh", "-c", "echo out; echo err >&2"], &paths);
    notes.push(read_when_written(&log, 3));
    notes
}

/// The content of a file once it has so many lines.
fn read_when_written(path: &Path, lines: usize) -> String {
    let changes = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    let directory = path.parent().unwrap();
    inotify::add_watch(&changes, directory, inotify::WatchFlags::MODIFY).unwrap();
    let limit = PATIENCE.try_into().unwrap();
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        if text.lines().count() >= lines {
            return text;
        }
        let mut waits = [PollFd::new(&changes, PollFlags::IN)];
        let seen = poll(&mut waits, Some(&limit)).unwrap();
        assert!(seen > 0, "{} holds {text:?}", path.display());
        let mut events = [0; 4096];
        rustix::io::read(&changes, &mut events).unwrap();
    }
}

fn terminal(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let streams = pod.peer.terminal(id, b"typed\n").unwrap();
    let kind = Kind::Member(&pod.sandbox.id);
    let script =
        "read line; stty size; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo terminal $line >&2";
    let change = |config: &mut Value| config["process"]["terminal"] = true.into();
    let bundle = pod
        .peer
        .bundle(id, kind, &["sh", "-c", script], change)
        .unwrap();
    pod.shim.create(&bundle, &streams.paths).unwrap();
    let state = pod.shim.state(id, "").unwrap();
    notes.push(format!("{} {:?}", state.terminal, state.stderr));
    notes.push(format!(
        "resize: {}",
        code(&pod.shim.resize(id, "", (101, 42)))
    ));
    notes.push(format!("start: {}", code(&pod.shim.start(id, ""))));
    notes.push(format!(
        "wait: {}",
        pod.shim.wait(id, "").unwrap().exit_status
    ));
    notes.push(format!("delete: {}", code(&pod.shim.delete(id, ""))));
    notes.push(streams.stdout.text().unwrap());
    notes
}

/// A process that joins a container with a terminal of its own, which changes its size while it runs; and one whose input is closed
/// before it starts.
fn terminal_of_an_exec(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let shim = &pod.shim;
    pod.run(id, &["sleep", "1000"]);
    let (mut paths, wait) = pod.first_word(id);
    paths.terminal = true;
    paths.stderr = String::new();
    // The terminal says that it has another size.
    let script = "trap 'exit $(stty size | cut -d \" \" -f 1)' WINCH; echo .; sleep 1000 >/dev/null 2>&1 & wait";
    shim.exec(id, "x", &["sh", "-c", script], &paths).unwrap();
    shim.start(id, "x").unwrap();
    wait();
    let resized = shim.resize(id, "x", (101, 42));
    notes.push(format!("resize: {}", code(&resized)));
    notes.push(format!("rows: {}", shim.wait(id, "x").unwrap().exit_status));
    let resized = shim.resize(id, "x", (80, 25));
    notes.push(format!("resize after the end: {}", code(&resized)));
    notes.push(format!("delete: {}", code(&shim.delete(id, "x"))));

    let streams = pod.peer.streams(&format!("{id}-y"), Some(b"in")).unwrap();
    shim.exec(id, "y", &["cat"], &streams.paths).unwrap();
    notes.push(format!("close: {}", code(&shim.close_stdin(id, "y"))));
    notes.push(format!("close: {}", code(&shim.close_stdin(id, "y"))));
    shim.start(id, "y").unwrap();
    let mut enough = "before the start";
    if pod.peer.runtime() == Runtime::Runc {
        shim.close_stdin(id, "y").unwrap();
        enough = "after the start";
    }
    notes.push(format!("closed {enough}"));
    notes.push(format!("wait: {}", shim.wait(id, "y").unwrap().exit_status));
    notes.push(format!("delete: {}", code(&shim.delete(id, "y"))));
    notes.push(streams.stdout.text().unwrap());
    let resized = shim.resize(id, "", (80, 25));
    notes.push(format!("no terminal: {}", code(&resized)));
    pod.remove(id);
    notes
}

fn terminal_without_input(pod: &Pod, id: &str) -> Notes {
    let shim = &pod.shim;
    pod.run(id, &["sleep", "1000"]);
    let streams = pod.peer.terminal(&format!("{id}-x"), b"").unwrap();
    shim.exec(id, "x", &["sleep", "1000"], &streams.paths)
        .unwrap();
    shim.start(id, "x").unwrap();
    let mut notes = vec![format!("close: {}", code(&shim.close_stdin(id, "x")))];
    if pod.peer.runtime() == Runtime::Bulkhead {
        shim.kill(id, "x", SIGKILL, false).unwrap();
    }
    notes.push(format!("wait: {}", shim.wait(id, "x").unwrap().exit_status));
    shim.delete(id, "x").unwrap();
    assert_eq!(streams.stdout.text().unwrap(), "");
    pod.remove(id);
    pod.events(id, "delete");
    notes
}

fn much_output(pod: &Pod, id: &str) -> Notes {
    let streams = pod.peer.streams(id, None).unwrap();
    // More than any pipe holds, at the end of the container's life.
    let program = ["sh", "-c", "head -c 4000000 /dev/zero; echo end"];
    let mut notes = run(pod, id, &program, &streams.paths);
    let bytes = streams.stdout.bytes().unwrap();
    notes.push(format!("{} {}", bytes.len(), bytes.ends_with(b"end\n")));
    notes
}

fn stuck_reader(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let (stdout, reader) = pod.peer.unread(id).unwrap();
    let (stderr, _unread) = pod.peer.unread(&format!("{id}-error")).unwrap();
    let paths = Paths {
        stdout,
        stderr,
        ..Paths::default()
    };
    let bundle = pod.member(id, &["head", "-c", "4000000", "/dev/zero"]);
    pod.shim.create(&bundle, &paths).unwrap();
    pod.shim.start(id, "").unwrap();
    // Others do not mind, one in the same container included.
    let streams = pod.peer.streams(&format!("{id}-x"), None).unwrap();
    let echo = ["echo", "through"];
    pod.shim.exec(id, "x", &echo, &streams.paths).unwrap();
    pod.shim.start(id, "x").unwrap();
    notes.push(format!(
        "exec: {}",
        pod.shim.wait(id, "x").unwrap().exit_status
    ));
    pod.shim.delete(id, "x").unwrap();
    notes.push(streams.stdout.text().unwrap());
    let other = format!("{id}-other");
    let streams = pod.peer.streams(&other, None).unwrap();
    notes.extend(run(pod, &other, &echo, &streams.paths));
    notes.push(streams.stdout.text().unwrap());
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    // Now somebody reads.
    let output = Stream::read(reader);
    notes.push(format!(
        "wait: {}",
        pod.shim.wait(id, "").unwrap().exit_status
    ));
    notes.push(format!("delete: {}", code(&pod.shim.delete(id, ""))));
    notes.push(format!("{} bytes", output.bytes().unwrap().len()));
    notes
}
