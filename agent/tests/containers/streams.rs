//! Standard streams and terminals.

use std::fs::OpenOptions;
use std::io::{Read, Write};

use containerd_shim_protos::api::ResizePtyRequest;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;
use tokio::net::unix::pipe;

use crate::guest::{Guest, all, bind, context, process, spec};

pub async fn a_hundred_mebibytes_pass_through_intact(guest: &Guest) {
    const SIZE: usize = 100 << 20;
    let mut streams = guest.streams(false);
    guest
        .create(
            "pass",
            &spec(&["cat"]),
            &[bind(&guest.root())],
            &streams,
            false,
        )
        .await
        .unwrap();
    guest.start("pass", "").await.unwrap();
    let mut input = streams.input.take().unwrap();
    let mut output = streams.output.take().unwrap();
    let byte = |index: usize| (index.wrapping_mul(2_654_435_761) >> 13) as u8;
    let writer = std::thread::spawn(move || {
        let data: Vec<u8> = (0..SIZE).map(byte).collect();
        input.write_all(&data).unwrap();
    });
    let mut data = Vec::with_capacity(SIZE);
    output.read_to_end(&mut data).unwrap();
    writer.join().unwrap();
    assert_eq!(data.len(), SIZE);
    assert!(
        data.iter()
            .enumerate()
            .all(|(index, &found)| found == byte(index))
    );
    assert_eq!(guest.wait("pass", "").await.unwrap(), 0);
    guest.delete("pass", "").await.unwrap();
}

pub async fn an_input_ends_while_another_container_waits_for_its_start(guest: &Guest) {
    let root = [bind(&guest.root())];
    let mut streams = guest.streams(false);
    let cat = spec(&["cat"]);
    guest
        .create("reads", &cat, &root, &streams, false)
        .await
        .unwrap();
    guest.start("reads", "").await.unwrap();
    let others = guest.streams(false);
    guest
        .create("waits", &cat, &root, &others, false)
        .await
        .unwrap();
    drop(streams.input.take());
    assert_eq!(guest.wait("reads", "").await.unwrap(), 0);
    guest.delete("reads", "").await.unwrap();
    guest.delete("waits", "").await.unwrap();
}

pub async fn an_input_ends_while_another_containers_hook_runs(guest: &Guest) {
    let root = guest.root();
    for name in ["begun", "go"] {
        mknodat(CWD, root.join(name), FileType::Fifo, Mode::RWXU, 0).unwrap();
    }
    let mut streams = guest.streams(false);
    let cat = spec(&["cat"]);
    guest
        .create("reads", &cat, &[bind(&guest.root())], &streams, false)
        .await
        .unwrap();
    guest.start("reads", "").await.unwrap();
    let script = "echo >/begun; read word </go";
    let mut hooked = spec(&["true"]);
    hooked["hooks"] = json!({
        "createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], "timeout": 30}],
    });
    let (others, bound) = (guest.streams(false), [bind(&root)]);
    let create = guest.create("hooked", &hooked, &bound, &others, false);
    let mut go = OpenOptions::new();
    let mut go = go.read(true).write(true).open(root.join("go")).unwrap();
    let mut begun = pipe::OpenOptions::new();
    let begun = begun.read_write(true).open_receiver(root.join("begun"));
    let begun = begun.unwrap();
    let meanwhile = async {
        begun.readable().await.unwrap();
        drop(streams.input.take());
        assert_eq!(guest.wait("reads", "").await.unwrap(), 0);
        go.write_all(b"\n").unwrap();
        Ok(())
    };
    // If the input does not end, the hook takes too long.
    tokio::try_join!(create, meanwhile).unwrap();
    guest.delete("reads", "").await.unwrap();
    guest.delete("hooked", "").await.unwrap();
}

pub async fn all_output_arrives_before_the_stream_ends(guest: &Guest) {
    // More than the pipe and the socket hold, read only after the exit of all that wrote it is under way.
    let outcome = guest
        .shell("dd if=/dev/zero bs=1000 count=3000 2>/dev/null; echo end >&2")
        .await;
    assert_eq!(
        (outcome.output.len(), outcome.error.as_str()),
        (3_000_000, "end\n")
    );
}

pub async fn a_reader_that_stops_holds_only_its_own_writer(guest: &Guest) {
    let held = guest.streams(false);
    let endless = spec(&[
        "sh",
        "-c",
        "while echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; do :; done",
    ]);
    guest
        .create("held", &endless, &[bind(&guest.root())], &held, false)
        .await
        .unwrap();
    guest.start("held", "").await.unwrap();
    assert_eq!(guest.shell("echo free").await.output, "free\n");
    guest.kill("held", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(guest.wait("held", "").await.unwrap(), 137);
    guest.delete("held", "").await.unwrap();
}

pub async fn streams_may_come_after_the_request(guest: &Guest) {
    let number = guest.number();
    let mut streams = guest.streams(false);
    streams.names[1] = number.to_string();
    guest
        .create(
            "late",
            &spec(&["echo", "late"]),
            &[bind(&guest.root())],
            &streams,
            false,
        )
        .await
        .unwrap();
    guest.start("late", "").await.unwrap();
    let mut stream =
        std::os::unix::net::UnixStream::connect(guest.directory.join("streams")).unwrap();
    stream.write_all(&number.to_le_bytes()).unwrap();
    assert_eq!(all(Some(stream)), "late\n");
    guest.wait("late", "").await.unwrap();
    guest.delete("late", "").await.unwrap();
}

pub async fn no_streams_are_the_null_device(guest: &Guest) {
    let mut streams = guest.streams(false);
    streams.names = Default::default();
    let command = spec(&[
        "sh",
        "-c",
        "test -c /proc/self/fd/0 && test $(wc -c) = 0 && echo gone && readlink /proc/self/fd/1 >&2",
    ]);
    guest
        .create("null", &command, &[bind(&guest.root())], &streams, false)
        .await
        .unwrap();
    guest.start("null", "").await.unwrap();
    assert_eq!(guest.wait("null", "").await.unwrap(), 0);
    guest.delete("null", "").await.unwrap();
}

pub async fn a_terminal_is_one(guest: &Guest) {
    let mut streams = guest.streams(true);
    let mut shell = spec(&[
        "sh",
        "-c",
        "tty; stty size; test -c /dev/console && echo console; read line; echo got $line; stty size",
    ]);
    shell["process"]["terminal"] = json!(true);
    shell["process"]["consoleSize"] = json!({"width": 81, "height": 25});
    shell["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    guest
        .create("tty", &shell, &[bind(&guest.root())], &streams, true)
        .await
        .unwrap();
    guest.start("tty", "").await.unwrap();
    let mut output = streams.output.take().unwrap();
    let mut text = String::new();
    while !text.contains("console\r\n") {
        let mut buffer = [0; 256];
        let length = output.read(&mut buffer).unwrap();
        assert_ne!(length, 0, "{text}");
        text.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
    }
    assert_eq!(text.replace('\r', ""), "/dev/pts/0\n25 81\nconsole\n");
    let size = ResizePtyRequest {
        id: "tty".into(),
        width: 100,
        height: 40,
        ..Default::default()
    };
    guest.task.resize_pty(context(), &size).await.unwrap();
    streams
        .input
        .as_mut()
        .unwrap()
        .write_all(b"hello\n")
        .unwrap();
    assert_eq!(
        all(Some(output)).replace('\r', ""),
        "hello\ngot hello\n40 100\n"
    );
    assert_eq!(guest.wait("tty", "").await.unwrap(), 0);
    guest.delete("tty", "").await.unwrap();
}

pub async fn a_terminal_may_be_closed_and_opened_again(guest: &Guest) {
    let mut streams = guest.streams(true);
    let root = guest.root();
    for name in ["closed", "go"] {
        let path = root.join(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    }
    let mut shell = spec(&[
        "sh",
        "-c",
        "exec </dev/null >/dev/null 2>&1; echo >/closed; read word </go; exec >/dev/console; echo $word",
    ]);
    shell["process"]["terminal"] = json!(true);
    guest
        .create("again", &shell, &[bind(&root)], &streams, true)
        .await
        .unwrap();
    guest.start("again", "").await.unwrap();
    std::fs::read(root.join("closed")).unwrap();
    // The agent does one thing after the other: with this answer it has seen that nobody had the terminal open.
    guest.state("again", "").await.unwrap();
    std::fs::write(root.join("go"), "found\n").unwrap();
    assert_eq!(all(streams.output.take()), "found\r\n");
    assert_eq!(guest.wait("again", "").await.unwrap(), 0);
    guest.delete("again", "").await.unwrap();
}

pub async fn an_exec_may_have_a_terminal(guest: &Guest) {
    let init = guest.streams(false);
    guest
        .create(
            "etty",
            &spec(&["sleep", "1000"]),
            &[bind(&guest.root())],
            &init,
            false,
        )
        .await
        .unwrap();
    guest.start("etty", "").await.unwrap();
    let mut streams = guest.streams(true);
    guest
        .exec(
            "etty",
            "e",
            &process(&["sh", "-c", "tty; stty size"]),
            &streams,
            true,
        )
        .await
        .unwrap();
    let size = ResizePtyRequest {
        id: "etty".into(),
        exec_id: "e".into(),
        width: 7,
        height: 8,
        ..Default::default()
    };
    guest.task.resize_pty(context(), &size).await.unwrap();
    guest.start("etty", "e").await.unwrap();
    assert_eq!(
        all(streams.output.take()).replace('\r', ""),
        "/dev/pts/0\n8 7\n"
    );
    assert_eq!(guest.wait("etty", "e").await.unwrap(), 0);
    guest.kill("etty", "", libc::SIGKILL, true).await.unwrap();
    guest.wait("etty", "").await.unwrap();
    guest.delete("etty", "").await.unwrap();
}
