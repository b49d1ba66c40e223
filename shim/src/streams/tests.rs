use std::path::PathBuf;

use nix::sys::stat::Mode;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use super::*;
use crate::testing::alone;

struct Host {
    dir: TempDir,
    stdio: Stdio,
}

impl Host {
    fn new(names: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fifo = |name: &str| {
            let path = dir.path().join(name);
            if names.contains(&name) {
                nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
                path.display().to_string()
            } else {
                String::new()
            }
        };
        let stdio = Stdio {
            stdin: fifo("stdin"),
            stdout: fifo("stdout"),
            stderr: fifo("stderr"),
            terminal: false,
        };
        Self { dir, stdio }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn reader(&self, name: &str) -> pipe::Receiver {
        pipe::OpenOptions::new()
            .open_receiver(self.path(name))
            .unwrap()
    }

    /// Starts the copying, and returns the guest's ends in the order stdin, stdout, stderr.
    async fn copy(&self) -> (Streams, Vec<UnixStream>) {
        let ends = Ends::open(&self.stdio, &Owner::default()).await.unwrap();
        let mut guests = Vec::new();
        let mut streams = Vec::new();
        for number in 0..ends.count() {
            let (host, guest) = UnixStream::pair().unwrap();
            streams.push((number.to_string(), host));
            guests.push(guest);
        }
        let (mut copying, names) = ends.copy(streams).unwrap();
        copying.open_stdin().unwrap();
        let names = [names.stdin, names.stdout, names.stderr];
        let names: Vec<_> = names.into_iter().filter(|n| !n.is_empty()).collect();
        assert!(
            names
                .iter()
                .map(String::as_str)
                .eq(["0", "1", "2"][..guests.len()].iter().copied())
        );
        (copying, guests)
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 7 / 3) as u8).collect()
}

async fn read_all(reader: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).await.unwrap();
    bytes
}

#[tokio::test]
async fn output_arrives_whole_and_the_fifos_close() {
    let host = Host::new(&["stdout", "stderr"]);
    let (mut stdout, mut stderr) = (host.reader("stdout"), host.reader("stderr"));
    let (streams, mut guests) = host.copy().await;
    let (out, err) = (pattern(3 << 20), pattern(100));
    let guest = async {
        guests[1].write_all(&err).await.unwrap();
        guests[0].write_all(&out).await.unwrap();
        guests.clear();
    };
    let (read_out, read_err, ()) =
        tokio::join!(read_all(&mut stdout), read_all(&mut stderr), guest);
    assert!(read_out == out && read_err == err);
    streams.drained().await;
}

#[tokio::test]
async fn a_reader_that_stops_blocks_only_its_own_stream_and_a_new_one_gets_the_rest() {
    let host = Host::new(&["stdout", "stderr"]);
    let (mut stdout, mut stderr) = (host.reader("stdout"), host.reader("stderr"));
    let (streams, mut guests) = host.copy().await;
    let out = pattern(1 << 20);
    let mut errors = guests.pop().unwrap();
    let mut outputs = guests.pop().unwrap();
    let written = out.clone();
    let writer = tokio::spawn(async move { outputs.write_all(&written).await.unwrap() });
    let mut first = vec![0; 1000];
    stdout.read_exact(&mut first).await.unwrap();
    drop(stdout);
    errors.write_all(b"free").await.unwrap();
    drop(errors);
    assert_eq!(read_all(&mut stderr).await, b"free");
    assert!(!writer.is_finished());
    let mut stdout = host.reader("stdout");
    first.extend(read_all(&mut stdout).await);
    assert!(first == out);
    writer.await.unwrap();
    streams.drained().await;
}

#[tokio::test]
async fn what_nobody_has_read_at_the_end_waits_for_a_reader() {
    let host = Host::new(&["stdout", "stderr"]);
    let (mut streams, mut guests) = host.copy().await;
    guests[0].write_all(b"last words").await.unwrap();
    guests.clear();
    // An empty FIFO needs no reader.
    while *streams.open_outputs.borrow_and_update() > 1 {
        streams.open_outputs.changed().await.unwrap();
    }
    assert_eq!(*streams.open_outputs.borrow(), 1);
    let mut stdout = host.reader("stdout");
    assert_eq!(read_all(&mut stdout).await, b"last words");
    streams.drained().await;
}

#[tokio::test]
async fn input_ends_when_it_is_closed_and_all_writers_are_gone() {
    let host = Host::new(&["stdin"]);
    let (mut streams, mut guests) = host.copy().await;
    let open = || {
        pipe::OpenOptions::new()
            .open_sender(host.path("stdin"))
            .unwrap()
    };
    let mut writer = open();
    writer.write_all(b"one").await.unwrap();
    let mut bytes = [0; 3];
    guests[0].read_exact(&mut bytes).await.unwrap();
    // Whoever writes may go away and come back.
    drop(writer);
    let mut writer = open();
    streams.close_stdin();
    streams.close_stdin();
    let data = pattern(1 << 20);
    let write = async {
        writer.write_all(&data).await.unwrap();
        drop(writer);
    };
    let ((), received) = tokio::join!(write, read_all(&mut guests[0]));
    assert!(received == data);
}

#[tokio::test]
async fn input_that_is_closed_first_is_still_delivered() {
    let host = Host::new(&["stdin"]);
    let mut writer = OpenOptions::new()
        .read(true)
        .write(true)
        .open(host.path("stdin"))
        .unwrap();
    writer.write_all(b"early").unwrap();
    let (mut streams, mut guests) = host.copy().await;
    drop(writer);
    streams.close_stdin();
    assert_eq!(read_all(&mut guests[0]).await, b"early");
}

#[tokio::test]
async fn input_that_is_closed_before_it_is_opened_is_still_delivered() {
    let host = Host::new(&["stdin"]);
    let ends = Ends::open(&host.stdio, &Owner::default()).await.unwrap();
    let (end, mut guest) = UnixStream::pair().unwrap();
    let (mut streams, _) = ends.copy([("0".to_owned(), end)]).unwrap();
    let sender = pipe::OpenOptions::new().open_sender(host.path("stdin"));
    assert_eq!(
        sender.unwrap_err().raw_os_error(),
        Some(libc::ENXIO),
        "a client must wait for the start"
    );
    let mut writer = OpenOptions::new()
        .read(true)
        .write(true)
        .open(host.path("stdin"))
        .unwrap();
    writer.write_all(b"early").unwrap();
    streams.close_stdin();
    streams.open_stdin().unwrap();
    drop(writer);
    assert_eq!(read_all(&mut guest).await, b"early");
}

#[tokio::test]
async fn nobody_holds_the_input_of_a_process_that_has_ended() {
    if !alone() {
        return;
    }
    let host = Host::new(&["stdin"]);
    let (mut streams, mut guests) = host.copy().await;
    streams.process_ended();
    assert_eq!(read_all(&mut guests[0]).await, b"");
    let error = pipe::OpenOptions::new()
        .open_sender(host.path("stdin"))
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENXIO));
}

#[tokio::test]
async fn two_outputs_may_share_a_file() {
    let mut host = Host::new(&[]);
    let uri = format!("file://{}/logs/c.log", host.dir.path().display());
    host.stdio.stdout.clone_from(&uri);
    host.stdio.stderr = uri;
    for round in 1..=2 {
        let (streams, mut guests) = host.copy().await;
        guests[0].write_all(b"out\n").await.unwrap();
        guests[1].write_all(b"err\n").await.unwrap();
        guests.clear();
        streams.drained().await;
        let text = std::fs::read_to_string(host.path("logs/c.log")).unwrap();
        assert_eq!(text.len(), 8 * round, "appended: {text:?}");
        assert!(text.contains("out\n") && text.contains("err\n"));
    }
}

#[tokio::test]
async fn a_link_to_a_file_that_is_not_there_yet_makes_it() {
    let mut host = Host::new(&[]);
    std::os::unix::fs::symlink("target", host.path("link")).unwrap();
    host.stdio.stdout = format!("file://{}", host.path("link").display());
    let (streams, mut guests) = host.copy().await;
    guests[0].write_all(b"out\n").await.unwrap();
    guests.clear();
    streams.drained().await;
    let text = std::fs::read_to_string(host.path("target")).unwrap();
    assert_eq!(text, "out\n");
}

#[tokio::test]
async fn what_is_called_a_file_may_be_a_fifo_that_nobody_reads_yet() {
    let mut host = Host::new(&["stdout"]);
    let uri = format!("file://{}", host.path("stdout").display());
    host.stdio.stdout = uri;
    let (streams, mut guests) = host.copy().await;
    let mut reader = pipe::OpenOptions::new()
        .open_receiver(host.path("stdout"))
        .unwrap();
    guests[0].write_all(b"out\n").await.unwrap();
    guests.clear();
    streams.drained().await;
    drop(streams);
    assert_eq!(read_all(&mut reader).await, b"out\n");
}

#[tokio::test]
async fn a_terminal_has_one_output() {
    let mut host = Host::new(&["stdin", "stdout", "stderr"]);
    host.stdio.terminal = true;
    let (_streams, guests) = host.copy().await;
    assert_eq!(guests.len(), 2);
}

#[tokio::test]
async fn what_cannot_be_opened_is_named() {
    let host = Host::new(&[]);
    let open = async |stdin: &str, stdout: &str| {
        let stdio = Stdio {
            stdin: stdin.into(),
            stdout: stdout.into(),
            ..Stdio::default()
        };
        Ends::open(&stdio, &Owner::default()).await.unwrap_err()
    };
    let dir = host.dir.path().display().to_string();
    assert!(
        matches!(open("", "pigeon:///bin/x").await, Error::Scheme { scheme, .. } if scheme == "pigeon")
    );
    assert!(matches!(open("/dev/null", "").await, Error::NotFifo { .. }));
    assert!(matches!(
        open("", &format!("{dir}/missing")).await,
        Error::Open {
            stream: "stdout",
            ..
        }
    ));
    assert!(matches!(open("", &dir).await, Error::NotWritable { .. }));
}
