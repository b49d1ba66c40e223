//! Waiting for a descriptor to become readable or writable, or for something to happen to a file.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Puts a non-blocking descriptor under the eyes of the running reactor.
pub fn register(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is an open descriptor until it is dropped, and no caller can replace it: `AsyncFd` keeps it until
    // it has taken it out of the reactor.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    registered.map_err(io::Error::from)
}

/// An inotify watch on one file or directory.
#[derive(Debug)]
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Watches for these events from now on.
    pub fn new(path: &Path, events: AddWatchFlags) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(path, events)?;
        Ok(Self(register(inotify.into(), Interest::READABLE)?))
    }

    /// Waits until there were events since the last time.
    pub async fn changed(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        let read = |fd: &OwnedFd| Ok(nix::unistd::read(fd.as_fd(), &mut buffer)?);
        self.0.async_io(Interest::READABLE, read).await.map(drop)
    }
}
