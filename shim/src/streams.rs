//! Standard input, output and error of a process: containerd's FIFOs on one side, streams to the guest on the other.
//!
//! The bytes move by splice(2), from kernel buffer to kernel buffer, and each direction of each process is a task of its own: a reader
//! that stops reading blocks its own container and nothing else. What bounds memory are the kernel's buffers.
//!
//! A FIFO is held open from both ends for as long as the guest's stream is open, so that a restart of containerd, or of whoever reads,
//! is neither the end of the data nor an error.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use crate::readiness::register;

/// How much one splice may move; a pipe's capacity is the real limit.
const MAX_SPLICE: usize = 1 << 20;

/// After so many splices in a row, other tasks get their turn.
const MAX_BURST: u32 = 16;

/// How much is copied at once where splice cannot be used.
const BUFFER: usize = 64 * 1024;

/// Where a process's standard streams are on the host, as containerd said it: paths of FIFOs or URIs; empty is `/dev/null`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// What the process reads.
    pub stdin: String,
    /// What the process writes; with a terminal, everything.
    pub stdout: String,
    /// What the process writes to standard error; with a terminal, empty.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// What can go wrong with a standard stream.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{stream} {path:?}: {source}")]
    Open {
        stream: &'static str,
        path: String,
        source: io::Error,
    },
    #[error("{stream} {path:?} is not a FIFO")]
    NotFifo { stream: &'static str, path: String },
    #[error("{stream} {path:?} is neither a FIFO nor a file that can be written to")]
    NotWritable { stream: &'static str, path: String },
    #[error(
        "{stream} {uri:?}: scheme {scheme:?} is not supported; use the path of a FIFO, or file:///path"
    )]
    Scheme {
        stream: &'static str,
        uri: String,
        scheme: String,
    },
    #[error("stream to the guest: {0}")]
    Guest(#[from] io::Error),
}

/// The host's ends, open; nothing is copied yet.
#[derive(Debug, Default)]
pub struct Ends {
    stdin: Option<Input>,
    stdout: Option<Arc<Output>>,
    stderr: Option<Arc<Output>>,
}

#[derive(Debug)]
struct Input {
    reader: AsyncFd<OwnedFd>,
    /// Keeps the reader from the end of the data while nobody else has the FIFO open for writing.
    writer: File,
}

#[derive(Debug)]
enum Output {
    Fifo(AsyncFd<OwnedFd>),
    File(File),
}

impl Ends {
    /// Opens the host's ends. Never waits for the other side.
    pub fn open(stdio: &Stdio) -> Result<Self, Error> {
        let stdout = Output::open("stdout", &stdio.stdout)?.map(Arc::new);
        let stderr = if stdio.terminal {
            None
        } else if stdio.stderr == stdio.stdout {
            stdout.clone()
        } else {
            Output::open("stderr", &stdio.stderr)?.map(Arc::new)
        };
        Ok(Self {
            stdin: Input::open(&stdio.stdin)?,
            stdout,
            stderr,
        })
    }

    /// Opens a stream to the guest for each end, and copies from now on. `connect` makes a stream; `number` gives each its name.
    pub async fn copy<E: From<io::Error>>(
        self,
        connect: impl AsyncFn() -> Result<UnixStream, E>,
        number: impl Fn() -> u64,
    ) -> Result<(Streams, Names), E> {
        let (open_outputs, watch) = watch::channel(0);
        let mut streams = Streams {
            tasks: JoinSet::new(),
            stdin: None,
            open_outputs: watch,
        };
        let mut names = Names::default();
        let dial = async || {
            let number = number();
            let mut stream = connect().await?;
            stream.write_all(&number.to_le_bytes()).await?;
            Ok::<_, E>((number.to_string(), stream))
        };
        if let Some(Input { reader, writer }) = self.stdin {
            let (name, stream) = dial().await?;
            let socket = into_async_fd(stream)?;
            names.stdin = name;
            let task = streams.tasks.spawn(feed(reader, socket));
            streams.stdin = Some((writer, task));
        }
        for (output, name_of) in [
            (self.stdout, &mut names.stdout),
            (self.stderr, &mut names.stderr),
        ] {
            if let Some(output) = output {
                let (name, stream) = dial().await?;
                *name_of = name;
                let guard = Open::new(open_outputs.clone());
                streams.tasks.spawn(drain(stream, output, guard));
            }
        }
        Ok((streams, names))
    }
}

impl Input {
    fn open(path: &str) -> Result<Option<Self>, Error> {
        if path.is_empty() {
            return Ok(None);
        }
        let error = |source| Error::Open {
            stream: "stdin",
            path: path.to_owned(),
            source,
        };
        let nonblocking = |options: &mut OpenOptions| {
            options
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .map_err(error)
        };
        let reader = nonblocking(OpenOptions::new().read(true))?;
        if !reader.metadata().map_err(error)?.file_type().is_fifo() {
            return Err(Error::NotFifo {
                stream: "stdin",
                path: path.to_owned(),
            });
        }
        let writer = nonblocking(OpenOptions::new().write(true))?;
        Ok(Some(Self {
            reader: register(reader.into(), Interest::READABLE).map_err(error)?,
            writer,
        }))
    }
}

impl Output {
    fn open(stream: &'static str, target: &str) -> Result<Option<Self>, Error> {
        if target.is_empty() {
            return Ok(None);
        }
        let (path, create) = match target.split_once("://") {
            None => (target, false),
            Some(("file", path)) => (path, true),
            Some((scheme, _)) => {
                return Err(Error::Scheme {
                    stream,
                    uri: target.to_owned(),
                    scheme: scheme.to_owned(),
                });
            }
        };
        let error = |source| Error::Open {
            stream,
            path: path.to_owned(),
            source,
        };
        if let (true, Some(directory)) = (create, Path::new(path).parent()) {
            std::fs::create_dir_all(directory).map_err(error)?;
        }
        // Reading is for the FIFO: one that is open for both never blocks, and never breaks when its reader goes away.
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(create)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(error)?;
        let kind = file.metadata().map_err(error)?.file_type();
        if kind.is_fifo() {
            let fifo = register(file.into(), Interest::WRITABLE).map_err(error)?;
            Ok(Some(Self::Fifo(fifo)))
        } else if kind.is_file() || kind.is_char_device() {
            // A thread of its own writes to it, and may wait.
            fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND)).map_err(|e| error(e.into()))?;
            Ok(Some(Self::File(file)))
        } else {
            Err(Error::NotWritable {
                stream,
                path: path.to_owned(),
            })
        }
    }
}

/// The names of a process's streams, as the guest is told them; empty where there is none.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Names {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// The streams of one process at work. Dropping this ends the copying and closes every end.
#[derive(Debug)]
pub struct Streams {
    tasks: JoinSet<()>,
    stdin: Option<(File, AbortHandle)>,
    open_outputs: watch::Receiver<usize>,
}

impl Streams {
    /// Lets standard input end once what was written to it is delivered and its other writers have closed it.
    pub fn close_stdin(&mut self) {
        if let Some((writer, _)) = self.stdin.take() {
            drop(writer);
        }
    }

    /// The process has ended: nobody will read its standard input any more.
    pub fn process_ended(&mut self) {
        if let Some((_, task)) = self.stdin.take() {
            task.abort();
        }
    }

    /// Waits until all that the process wrote is delivered and the FIFOs are closed.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut open_outputs = self.open_outputs.clone();
        async move {
            // An error means that every output has ended.
            let _ = open_outputs.wait_for(|&open| open == 0).await;
        }
    }
}

/// Counts an output that is open, until it is dropped.
#[derive(Debug)]
struct Open(watch::Sender<usize>);

impl Open {
    fn new(count: watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Carries standard input to the guest; its end is a half-close.
async fn feed(reader: AsyncFd<OwnedFd>, socket: AsyncFd<OwnedFd>) {
    match splice_all(&reader, &socket).await {
        Ok(()) => {
            // A guest that is gone needs no half-close.
            let _ = shutdown(socket.get_ref().as_raw_fd(), Shutdown::Write);
            // Closing at once would also end what is still on its way.
            let _ = is_ready(&socket, Interest::READABLE, PollFlags::POLLIN).await;
        }
        Err(error) => log::debug!("standard input ends: {error}"),
    }
}

/// Carries output from the guest; its end closes the host's end.
async fn drain(stream: UnixStream, output: Arc<Output>, _open: Open) {
    let result = match &*output {
        Output::Fifo(fifo) => match into_async_fd(stream) {
            Ok(socket) => splice_all(&socket, fifo).await,
            Err(error) => Err(error),
        },
        Output::File(_) => copy_to_file(stream, &output).await,
    };
    if let Err(error) = result {
        log::warn!("output of a process is cut off: {error}");
    }
    // The FIFO is closed before it counts as drained.
    drop(output);
}

/// Moves bytes until the end of the data. One side is a pipe, the other a socket.
async fn splice_all(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    let mut burst = 0;
    loop {
        match splice(from.get_ref(), None, to.get_ref(), None, MAX_SPLICE, flags) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                burst += 1;
                if burst == MAX_BURST {
                    burst = 0;
                    tokio::task::yield_now().await;
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                burst = 0;
                is_ready(from, Interest::READABLE, PollFlags::POLLIN).await?;
                is_ready(to, Interest::WRITABLE, PollFlags::POLLOUT).await?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits until poll(2) says that a descriptor is ready: splice does not tell which of its two it had to wait for.
async fn is_ready(fd: &AsyncFd<OwnedFd>, interest: Interest, events: PollFlags) -> io::Result<()> {
    fd.async_io(interest, |fd| {
        match poll(&mut [PollFd::new(fd.as_fd(), events)], PollTimeout::ZERO)? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    })
    .await
}

async fn copy_to_file(mut stream: UnixStream, output: &Arc<Output>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        let output = Arc::clone(output);
        buffer = tokio::task::spawn_blocking(move || match &*output {
            Output::File(file) => (&mut &*file).write_all(&buffer[..length]).map(|()| buffer),
            Output::Fifo(_) => Err(io::ErrorKind::InvalidInput.into()),
        })
        .await??;
    }
}

fn into_async_fd(stream: UnixStream) -> io::Result<AsyncFd<OwnedFd>> {
    let interest = Interest::READABLE | Interest::WRITABLE;
    register(stream.into_std()?.into(), interest)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::path::PathBuf;
    use std::sync::Mutex;

    use nix::sys::stat::Mode;
    use tempfile::TempDir;
    use tokio::net::unix::pipe;

    use super::*;

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
            let guests = Mutex::new(Vec::new());
            let next = Cell::new(40);
            let connect = async || {
                let (host, guest) = UnixStream::pair()?;
                guests.lock().unwrap().push(guest);
                Ok::<_, Error>(host)
            };
            let number = || {
                next.set(next.get() + 1);
                next.get()
            };
            let ends = Ends::open(&self.stdio).unwrap();
            let (streams, names) = ends.copy(connect, number).await.unwrap();
            let mut guests = guests.into_inner().unwrap();
            let mut expected = Vec::new();
            for guest in &mut guests {
                expected.push(guest.read_u64_le().await.unwrap().to_string());
            }
            let names = [names.stdin, names.stdout, names.stderr];
            let names: Vec<_> = names.into_iter().filter(|n| !n.is_empty()).collect();
            assert_eq!(names, expected);
            (streams, guests)
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
    async fn nobody_holds_the_input_of_a_process_that_has_ended() {
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
    async fn a_terminal_has_one_output() {
        let mut host = Host::new(&["stdin", "stdout", "stderr"]);
        host.stdio.terminal = true;
        let (_streams, guests) = host.copy().await;
        assert_eq!(guests.len(), 2);
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_named() {
        let host = Host::new(&[]);
        let open = |stdin: &str, stdout: &str| {
            let stdio = Stdio {
                stdin: stdin.into(),
                stdout: stdout.into(),
                ..Stdio::default()
            };
            Ends::open(&stdio).unwrap_err()
        };
        let dir = host.dir.path().display().to_string();
        assert!(
            matches!(open("", "binary:///bin/x"), Error::Scheme { scheme, .. } if scheme == "binary")
        );
        assert!(matches!(open("/dev/null", ""), Error::NotFifo { .. }));
        assert!(matches!(
            open("", &format!("{dir}/missing")),
            Error::Open {
                stream: "stdout",
                ..
            }
        ));
        assert!(matches!(open("", &dir), Error::Open { .. }));
    }
}
