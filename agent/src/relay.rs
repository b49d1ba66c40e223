//! Copies a process's standard streams between its pipes, or its terminal, and the host's streams.
//!
//! Pipes are spliced: the bytes do not pass through this process's memory, and nothing is buffered but what the pipe and the
//! socket hold, so a reader that stops reading stops only its own writer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};

use crate::socket::Socket;
use crate::sys::asynchronous;

/// The most bytes that one splice moves; a pipe holds no more than 64 KiB unless it was enlarged.
const SPLICE: usize = 1 << 20;

/// What a terminal moves at once: the line discipline never hands out more than 4 KiB.
const TERMINAL_BUFFER: usize = 8 << 10;

/// Copies what a process writes into its pipe to the host, until the last writer has closed it, and then ends the stream.
pub async fn output(pipe: OwnedFd, stream: Socket) -> io::Result<()> {
    let pipe = asynchronous(pipe, Interest::READABLE)?;
    splice(&pipe, stream.descriptor()).await?;
    stream.finish()
}

/// Copies what the host sends into a process's pipe, until the host ends the stream, and then closes the pipe.
pub async fn input(stream: Socket, pipe: OwnedFd) -> io::Result<()> {
    let pipe = asynchronous(pipe, Interest::WRITABLE)?;
    splice(stream.descriptor(), &pipe).await
}

/// Copies what is written to a terminal to the host, until its process has `ended` and nobody else has the terminal open, and then ends
/// the stream. As long as the process lives, it may close its terminal and open it again.
pub async fn terminal_output(
    terminal: OwnedFd,
    ended: impl Future<Output = ()>,
    stream: Socket,
) -> io::Result<()> {
    let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let peer = ioctl_tiocgptpeer(&terminal, peer)?;
    let terminal = asynchronous(terminal, Interest::READABLE)?;
    let open = async {
        ended.await;
        drop(peer);
        Ok(())
    };
    tokio::try_join!(open, copy_terminal(terminal, stream)).map(drop)
}

/// Copies what is written to a terminal until nobody has it open, and then ends the stream.
async fn copy_terminal(terminal: AsyncFd<OwnedFd>, mut stream: Socket) -> io::Result<()> {
    let mut buffer = vec![0; TERMINAL_BUFFER];
    loop {
        let read = terminal
            .async_io(Interest::READABLE, |terminal| {
                Ok(rustix::io::read(terminal, &mut buffer)?)
            })
            .await;
        match read {
            Ok(0) => break,
            Ok(length) => stream.write_all(&buffer[..length]).await?,
            // How a terminal says that nobody has it open any more.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
            Err(error) => return Err(error),
        }
    }
    stream.finish()
}

/// Copies what the host sends to a terminal. The end of the stream is no hang-up: the terminal stays.
pub async fn terminal_input(mut stream: Socket, terminal: OwnedFd) -> io::Result<()> {
    let terminal = asynchronous(terminal, Interest::WRITABLE)?;
    let mut buffer = vec![0; TERMINAL_BUFFER];
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let written = terminal
                .async_io(Interest::WRITABLE, |terminal| {
                    Ok(rustix::io::write(terminal, rest)?)
                })
                .await?;
            rest = &rest[written..];
        }
    }
}

/// Moves bytes from one descriptor to the other, one of which is a pipe, until the first has no more.
async fn splice(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        let mut writable = to.writable().await?;
        match rustix::pipe::splice(
            from,
            None,
            to,
            None,
            SPLICE,
            SpliceFlags::NONBLOCK | SpliceFlags::MOVE,
        ) {
            Ok(0) => return Ok(()),
            // Others must get their turn, however much there is to copy.
            Ok(_) | Err(Errno::INTR) => tokio::task::coop::consume_budget().await,
            // One of the two would block, and the error does not say which.
            Err(Errno::AGAIN) => {
                settle(from, PollFlags::IN, &mut readable)?;
                settle(to, PollFlags::OUT, &mut writable)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Lets the guard wait for the next event unless the descriptor is ready now.
fn settle(
    descriptor: &AsyncFd<OwnedFd>,
    wanted: PollFlags,
    guard: &mut AsyncFdReadyGuard<'_, OwnedFd>,
) -> io::Result<()> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut poll = [PollFd::from_borrowed_fd(descriptor.as_fd(), wanted)];
    // A signal, like that of a child that ended, interrupts it though it does not wait.
    if rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&now)))? == 0 {
        guard.clear_ready();
    }
    Ok(())
}
