//! Standard input, output and error of a process: containerd's FIFOs on one side, streams to the guest on the other.
//!
//! The bytes move by splice(2), from kernel buffer to kernel buffer, and each direction of each process is a task of its own: a reader
//! that stops reading blocks its own container and nothing else. What bounds memory are the kernel's buffers.
//!
//! A FIFO is held open from both ends for as long as the guest's stream is open, so that a restart of containerd, or of whoever reads,
//! is neither the end of the data nor an error.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::PollFlags;
use nix::sys::inotify::AddWatchFlags;
use nix::sys::socket::{Shutdown, shutdown};
use rustix::io::ioctl_fionread;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};

use crate::logger::{self, Owner, Ready};
use crate::readiness::{Watch, happens, register};

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
        "{stream} {uri:?}: scheme {scheme:?} is not supported; use the path of a FIFO, file:///path, binary:///program, or binary-v2:///program"
    )]
    Scheme {
        stream: &'static str,
        uri: String,
        scheme: String,
    },
}

/// The host's ends, open; nothing is copied yet.
#[derive(Debug, Default)]
pub struct Ends {
    /// The path of a FIFO.
    stdin: Option<String>,
    stdout: Option<Arc<Output>>,
    stderr: Option<Arc<Output>>,
}

/// Standard input, once it is open.
#[derive(Debug)]
struct Input {
    reader: AsyncFd<OwnedFd>,
    /// Keeps the reader from the end of the data while nobody else has the FIFO open for writing.
    writer: File,
}

#[derive(Debug)]
enum Output {
    Pipe(Pipe),
    File(File),
}

/// A FIFO, or a pipe to a logging program.
#[derive(Debug)]
struct Pipe {
    writer: AsyncFd<OwnedFd>,
    /// The path of a FIFO and its other end, which keeps the writer from breaking while nobody else reads.
    held: Option<(PathBuf, File)>,
}

impl Ends {
    /// Opens the host's ends, but standard input only when it is wanted ([`Streams::open_stdin`]). Waits for logging
    /// programs to be ready, but never for the other side of a FIFO.
    pub async fn open(stdio: &Stdio, owner: &Owner) -> Result<Self, Error> {
        let stdin = Input::find(&stdio.stdin)?;
        let [stdout, mut stderr] = Output::open("stdout", &stdio.stdout, owner).await?;
        if stdio.terminal {
            stderr = None;
        } else if stdio.stderr != stdio.stdout {
            [_, stderr] = Output::open("stderr", &stdio.stderr, owner).await?;
        }
        Ok(Self {
            stdin,
            stdout,
            stderr,
        })
    }

    /// How many streams to the guest [`Ends::copy`] takes.
    pub fn count(&self) -> usize {
        usize::from(self.stdin.is_some())
            + usize::from(self.stdout.is_some())
            + usize::from(self.stderr.is_some())
    }

    /// Copies between these ends and streams to the guest, each with its name, from now on.
    pub fn copy(
        self,
        streams: impl IntoIterator<Item = (String, UnixStream)>,
    ) -> io::Result<(Streams, Names)> {
        let (open, watch) = watch::channel(0);
        let mut copying = Streams {
            tasks: JoinSet::new(),
            stdin: None,
            open_outputs: watch,
        };
        let mut names = Names::default();
        let mut streams = streams.into_iter();
        let mut next = || streams.next().ok_or(io::ErrorKind::UnexpectedEof);
        if let Some(path) = self.stdin {
            let (name, stream) = next()?;
            names.stdin = name;
            let socket = into_async_fd(stream)?;
            let (reader, opened) = oneshot::channel();
            let task = copying.tasks.spawn(feed(opened, socket));
            copying.stdin = Some(Stdin {
                path,
                reader: Some(reader),
                writer: None,
                closed: false,
                task,
            });
        }
        for (output, name_of) in [
            (self.stdout, &mut names.stdout),
            (self.stderr, &mut names.stderr),
        ] {
            if let Some(output) = output {
                let (name, stream) = next()?;
                *name_of = name;
                let open = Open::new(open.clone());
                copying.tasks.spawn(drain(stream, output, open));
            }
        }
        Ok((copying, names))
    }
}

impl Input {
    /// Checks that there is a FIFO to open.
    fn find(path: &str) -> Result<Option<String>, Error> {
        if path.is_empty() {
            return Ok(None);
        }
        let path = path.to_owned();
        let stream = "stdin";
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.file_type().is_fifo() => Ok(Some(path)),
            Ok(_) => Err(Error::NotFifo { stream, path }),
            Err(source) => Err(Error::Open {
                stream,
                path,
                source,
            }),
        }
    }

    fn open(path: &str) -> io::Result<Self> {
        let nonblocking =
            |options: &mut OpenOptions| options.custom_flags(libc::O_NONBLOCK).open(path);
        let reader = nonblocking(OpenOptions::new().read(true))?;
        let writer = nonblocking(OpenOptions::new().write(true))?;
        Ok(Self {
            reader: register(reader.into(), Interest::READABLE)?,
            writer,
        })
    }
}

impl Output {
    /// Opens what standard output and standard error go to, if both go to the same.
    async fn open(
        stream: &'static str,
        target: &str,
        owner: &Owner,
    ) -> Result<[Option<Arc<Self>>; 2], Error> {
        let opened = match target.split_once("://") {
            None if target.is_empty() => return Ok([None, None]),
            None => Self::open_path(target).map(Self::for_both),
            Some(("file", path)) => Self::create_file(path).map(Self::for_both),
            Some(("binary", program)) => Self::start_program(program, owner, Ready::Closes).await,
            Some(("binary-v2", program)) => {
                Self::start_program(program, owner, Ready::Writes).await
            }
            Some((scheme, _)) => {
                return Err(Error::Scheme {
                    stream,
                    uri: target.to_owned(),
                    scheme: scheme.to_owned(),
                });
            }
        };
        opened.map_err(|source| match source.kind() {
            io::ErrorKind::Unsupported => Error::NotWritable {
                stream,
                path: target.to_owned(),
            },
            _ => Error::Open {
                stream,
                path: target.to_owned(),
                source,
            },
        })
    }

    fn for_both(self) -> [Option<Arc<Self>>; 2] {
        let output = Arc::new(self);
        [Some(output.clone()), Some(output)]
    }

    async fn start_program(
        program: &str,
        owner: &Owner,
        ready: Ready,
    ) -> io::Result<[Option<Arc<Self>>; 2]> {
        let pipe = |writer| {
            let writer = register(writer, Interest::WRITABLE)?;
            let held = None;
            Ok::<_, io::Error>(Some(Arc::new(Self::Pipe(Pipe { writer, held }))))
        };
        let (out, error) = logger::start(program, owner, ready).await?;
        Ok([pipe(out)?, pipe(error)?])
    }

    /// Opens a FIFO, or a file that is there.
    fn open_path(path: &str) -> io::Result<Self> {
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        // A FIFO can be opened for writing only after it is for reading.
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)?;
        let kind = reader.metadata()?.file_type();
        if kind.is_fifo() {
            let writer = OpenOptions::new()
                .write(true)
                .custom_flags(flags)
                .open(path)?;
            let writer = register(writer.into(), Interest::WRITABLE)?;
            let held = Some((path.into(), reader));
            Ok(Self::Pipe(Pipe { writer, held }))
        } else if kind.is_file() || kind.is_char_device() {
            Ok(Self::File(OpenOptions::new().append(true).open(path)?))
        } else {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// Opens what is there, or makes a file, with its directories.
    fn create_file(path: &str) -> io::Result<Self> {
        let path = &logger::decode(path)?;
        if let Some(directory) = Path::new(path).parent() {
            std::fs::create_dir_all(directory)?;
        }
        match OpenOptions::new().append(true).create_new(true).open(path) {
            // Perhaps a FIFO without a reader, for which nothing here may wait.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match Self::open_path(path) {
                    // There is a link, and not yet what it leads to.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        let file = OpenOptions::new().append(true).create(true).open(path);
                        file.map(Self::File)
                    }
                    opened => opened,
                }
            }
            file => file.map(Self::File),
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

/// A standard input, before and after it is opened.
#[derive(Debug)]
struct Stdin {
    path: String,
    /// Takes the open FIFO to the copying task, once.
    reader: Option<oneshot::Sender<AsyncFd<OwnedFd>>>,
    /// Keeps the reader from the end of the data until the input is closed.
    writer: Option<File>,
    closed: bool,
    task: AbortHandle,
}

/// The streams of one process at work. Dropping this ends the copying and closes every end.
#[derive(Debug)]
pub struct Streams {
    tasks: JoinSet<()>,
    stdin: Option<Stdin>,
    open_outputs: watch::Receiver<usize>,
}

impl Streams {
    /// Opens standard input on the host, for a process that is to start. That lets clients go on that wait for a reader, and they may
    /// come to the end of their input before they are ready to tell, which they are once Create or Exec has been answered.
    pub fn open_stdin(&mut self) -> io::Result<()> {
        let Some(stdin) = &mut self.stdin else {
            return Ok(());
        };
        if let Some(sender) = stdin.reader.take() {
            let Input { reader, writer } = Input::open(&stdin.path)?;
            // A task that has ended has no use for it.
            let _ = sender.send(reader);
            stdin.writer = Some(writer).filter(|_| !stdin.closed);
        }
        Ok(())
    }

    /// Lets standard input end once what was written to it is delivered and its other writers have closed it.
    pub fn close_stdin(&mut self) {
        if let Some(stdin) = &mut self.stdin {
            stdin.closed = true;
            stdin.writer = None;
        }
    }

    /// The process has ended: nobody will read its standard input any more.
    pub fn process_ended(&mut self) {
        if let Some(stdin) = self.stdin.take() {
            stdin.task.abort();
        }
    }

    /// Waits until all that the process wrote is delivered and the FIFOs are closed.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + use<> {
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
async fn feed(opened: oneshot::Receiver<AsyncFd<OwnedFd>>, socket: AsyncFd<OwnedFd>) {
    // An error means that nobody wants it any more.
    let Ok(reader) = opened.await else { return };
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
        Output::Pipe(pipe) => match into_async_fd(stream) {
            Ok(socket) => splice_all(&socket, &pipe.writer).await,
            Err(error) => Err(error),
        },
        Output::File(_) => copy_to_file(stream, &output).await,
    };
    if let Err(error) = result {
        log::warn!("output of a process is cut off: {error}");
    }
    // The last of the streams that share a FIFO closes it.
    if let Some(Output::Pipe(pipe)) = Arc::into_inner(output)
        && let Err(error) = pipe.close().await
    {
        log::warn!("output of a process may be lost: {error}");
    }
}

impl Pipe {
    /// Closes a FIFO as soon as what is in it cannot be lost: somebody else has it open for reading, or nothing is in it.
    async fn close(self) -> io::Result<()> {
        let Some((path, reader)) = self.held else {
            return Ok(());
        };
        drop(reader);
        let mut watch = None;
        while !has_reader(&self.writer)? && ioctl_fionread(&self.writer)? > 0 {
            match &watch {
                None => watch = Some(Watch::new(&path, AddWatchFlags::IN_OPEN)?),
                Some(watch) => watch.changed().await?,
            }
        }
        Ok(())
    }
}

fn has_reader(writer: &AsyncFd<OwnedFd>) -> io::Result<bool> {
    // Without a reader there is an error, which need not be asked for.
    let broken = happens(writer.get_ref(), PollFlags::empty(), Duration::ZERO)?;
    Ok(!broken)
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
    fd.async_io(interest, |fd| match happens(fd, events, Duration::ZERO)? {
        true => Ok(()),
        false => Err(io::ErrorKind::WouldBlock.into()),
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
            Output::Pipe(_) => Err(io::ErrorKind::InvalidInput.into()),
        })
        .await??;
    }
}

fn into_async_fd(stream: UnixStream) -> io::Result<AsyncFd<OwnedFd>> {
    let interest = Interest::READABLE | Interest::WRITABLE;
    register(stream.into_std()?.into(), interest)
}

#[cfg(test)]
mod tests;
