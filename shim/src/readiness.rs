//! Waiting for a descriptor to become readable or writable.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Puts a non-blocking descriptor under the eyes of the running reactor.
pub fn register(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is an open descriptor until it is dropped, and no caller can replace it: `AsyncFd` keeps it until
    // it has taken it out of the reactor.
    let registered = unsafe { AsyncFd::register_with_interest(descriptor, interest) };
    registered.map_err(io::Error::from)
}
