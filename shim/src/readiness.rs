//! Waiting for a descriptor to become readable or writable, or for something to happen to a file.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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

/// Blocks until something happens to a descriptor; whether it does before `patience` is over, or without any has happened already. Signals, like
/// those of children that end, are no reason to give up: they interrupt poll(2) even if it is not to wait.
pub fn happens(descriptor: impl AsFd, event: PollFlags, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(descriptor.as_fd(), event)], left) {
            Err(Errno::EINTR) => {}
            count => return Ok(count? > 0),
        }
    }
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::thread::JoinHandleExt;
    use std::sync::mpsc::{self, TryRecvError};

    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

    use super::*;

    extern "C" fn nothing(_: libc::c_int) {}

    #[test]
    fn signals_are_no_reason_to_give_up() {
        let action = SigAction::new(
            SigHandler::Handler(nothing),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        // SAFETY: the handler does nothing, and nobody else in these tests has one for this signal.
        unsafe { sigaction(Signal::SIGUSR2, &action) }.unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        let (looked, has_looked) = mpsc::channel();
        let interrupted = std::thread::spawn(move || {
            for _ in 0..10_000 {
                assert!(!happens(&reader, PollFlags::POLLIN, Duration::ZERO).unwrap());
            }
            looked.send(()).unwrap();
            happens(&reader, PollFlags::POLLIN, Duration::from_secs(600))
        });
        let interrupt = |_: u32| {
            // SAFETY: the thread is not joined yet, so its handle is good.
            unsafe { libc::pthread_kill(interrupted.as_pthread_t(), libc::SIGUSR2) };
        };
        while has_looked.try_recv() == Err(TryRecvError::Empty) {
            (0..1_000).for_each(interrupt);
        }
        (0..10_000).for_each(interrupt);
        writer.write_all(b"x").unwrap();
        assert!(interrupted.join().unwrap().unwrap());
    }

    #[test]
    fn patience_ends() {
        let (reader, _writer) = io::pipe().unwrap();
        assert!(!happens(reader, PollFlags::POLLIN, Duration::from_millis(1)).unwrap());
    }
}
