//! The agent's stream: a descriptor that the VMM sent, in the hands of the ttrpc client, with a way to ask from outside
//! whether it is still alive.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockType, SockaddrLike, SockaddrStorage, getsockname,
    getsockopt, recv, send, shutdown, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use crate::readiness::happens;

/// Remembers a stream without keeping it open.
#[derive(Debug)]
pub(super) struct Liveness(Weak<AsyncFd<OwnedFd>>);

impl Liveness {
    /// Whether the client still uses the stream and the other end has not closed it.
    pub(super) fn alive(&self) -> bool {
        self.0.upgrade().is_some_and(|stream| {
            let hang_up = PollFlags::from_bits_retain(libc::POLLRDHUP);
            // Any event, also an error or a hang-up, is an end. A poll that fails says nothing, so the stream stands.
            !happens(stream.get_ref(), hang_up, Duration::ZERO).unwrap_or(false)
        })
    }
}

/// Makes a ttrpc client of a descriptor that the VMM sent.
///
/// # Errors
///
/// It is no `AF_UNIX` stream socket, or it cannot be waited for.
pub(super) fn client(descriptor: OwnedFd) -> io::Result<(Client, Liveness)> {
    let family = getsockname::<SockaddrStorage>(descriptor.as_raw_fd())?.family();
    let kind = getsockopt(&descriptor, sockopt::SockType)?;
    if (family, kind) != (Some(AddressFamily::Unix), SockType::Stream) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a socket of family {family:?} and type {kind:?} instead of a Unix stream"),
        ));
    }
    // SAFETY: an owned descriptor is open, and the same, as long as it lives.
    let stream = Arc::new(unsafe { AsyncFd::register(descriptor) }?);
    let liveness = Liveness(Arc::downgrade(&stream));
    Ok((Client::new(Socket::new(Stream(stream))), liveness))
}

/// Each call asks not to be blocked, because `O_NONBLOCK` belongs to the open file, which the VMM may share.
struct Stream(Arc<AsyncFd<OwnedFd>>);

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(context))?;
            let received = ready.try_io(|stream| {
                let unfilled = buffer.initialize_unfilled();
                Ok(recv(stream.as_raw_fd(), unfilled, MsgFlags::MSG_DONTWAIT)?)
            });
            match received {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            let mut ready = ready!(self.0.poll_write_ready(context))?;
            match ready.try_io(|stream| Ok(send(stream.as_raw_fd(), data, flags)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(shutdown(self.0.as_raw_fd(), Shutdown::Write)?))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;
    use crate::testing::alone;

    #[tokio::test]
    async fn a_stream_lives_until_either_end_closes() {
        if !alone() {
            return;
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_client, liveness) = client(ours.into()).unwrap();
        assert!(liveness.alive());
        drop(theirs);
        assert!(!liveness.alive());

        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (client, liveness) = client(ours.into()).unwrap();
        assert!(liveness.alive());
        drop(client);
        // The client's tasks end, and with them the stream.
        while liveness.0.strong_count() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(!liveness.alive());
    }

    #[tokio::test]
    async fn only_a_unix_stream_is_taken() {
        let (datagram, _other) = UnixDatagram::pair().unwrap();
        assert!(client(datagram.into()).is_err());
        assert!(client(File::open("/dev/null").unwrap().into()).is_err());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(client(tcp.into()).is_err());
    }
}
