//! A connected stream socket of any family, for asynchronous use.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::{RecvFlags, SendFlags, Shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::oneshot;

use crate::sys::asynchronous;

/// A connected, non-blocking stream socket.
#[derive(Debug)]
pub struct Socket {
    descriptor: AsyncFd<OwnedFd>,
    broken: Option<oneshot::Sender<()>>,
}

impl Socket {
    /// Takes a connected socket, which must be non-blocking.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            descriptor: asynchronous(socket, Interest::READABLE | Interest::WRITABLE)?,
            broken: None,
        })
    }

    /// The same, and a receiver that is woken when the connection ends in whichever way.
    pub fn watched(socket: OwnedFd) -> io::Result<(Self, oneshot::Receiver<()>)> {
        let (broken, end) = oneshot::channel();
        let mut socket = Self::new(socket)?;
        socket.broken = Some(broken);
        Ok((socket, end))
    }

    /// The descriptor, for readiness and for system calls on it.
    pub fn descriptor(&self) -> &AsyncFd<OwnedFd> {
        &self.descriptor
    }

    /// Ends the data that goes out; the peer reads an end of file after it.
    pub fn finish(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.descriptor, Shutdown::Write)?)
    }

    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.broken.take();
        }
        result
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }
}

/// Connects to a vsock port of the host from a privileged port of this machine, so that the host's listener can tell this
/// process from an unprivileged one.
pub async fn dial(cid: u32, port: u32) -> io::Result<OwnedFd> {
    const LAST_PRIVILEGED: u32 = 1023;
    let mut source = LAST_PRIVILEGED;
    let socket = loop {
        match crate::sys::vsock_bound(source) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && source > 1 => source -= 1,
            other => break other?,
        }
    };
    crate::sys::vsock_connect(socket.as_fd(), cid, port)?;
    let socket = asynchronous(socket, Interest::WRITABLE)?;
    // The guard is not kept: readiness says only that the attempt has ended.
    drop(socket.writable().await?);
    rustix::net::sockopt::socket_error(&socket)?.map_err(io::Error::from)?;
    Ok(socket.into_inner())
}

/// Listens on a vsock port of this machine.
pub fn listen(port: u32) -> io::Result<AsyncFd<OwnedFd>> {
    let socket = crate::sys::vsock_bound(port)?;
    rustix::net::listen(&socket, 128)?;
    asynchronous(socket, Interest::READABLE)
}

/// The next connection from the host. Connections from elsewhere (this machine itself) are closed.
pub async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    loop {
        let accepted = listener
            .async_io(Interest::READABLE, |listener| {
                crate::sys::vsock_accept(listener.as_fd())
            })
            .await;
        match accepted {
            Ok((socket, libc::VMADDR_CID_HOST)) => return Ok(socket),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.descriptor.poll_read_ready(context))?;
            let received = ready.try_io(|socket| {
                Ok(rustix::net::recv(socket, buffer.initialize_unfilled(), RecvFlags::empty())?.0)
            });
            match received {
                Ok(Ok(0)) => {
                    self.broken.take();
                    return Poll::Ready(Ok(()));
                }
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(self.note(Err(error))),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.descriptor.poll_write_ready(context))?;
            let sent =
                ready.try_io(|socket| Ok(rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)?));
            if let Ok(result) = sent {
                return Poll::Ready(self.note(result));
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}
