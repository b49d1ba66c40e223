//! virtio-vsock (section 5.10), with descriptors instead of paths: every stream is a socket pair.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Device;

/// A stream that the guest opened.
#[derive(Debug)]
pub struct Opened {
    /// The host's port.
    pub port: u32,
    /// The host's end of the stream.
    pub stream: OwnedFd,
}

/// Why a stream cannot be opened to the guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There are too many.
    #[error("the machine has {0} vsock streams already, the most that it can have")]
    TooManyStreams(usize),
    /// The system refused.
    #[error("{operation} for a vsock stream: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// The device and its streams, driven by one thread that waits for [`Vsock::descriptor`] to become readable and then calls
/// [`Vsock::process`].
#[derive(Debug, Clone)]
pub struct Vsock(Arc<OwnedFd>);

impl Vsock {
    /// A device for the guest with context identifier `cid`, which may connect to the host's `ports`.
    pub fn new(cid: u64, ports: Vec<u32>) -> io::Result<Self> {
        Err(io::Error::other(format!("cid {cid} {ports:?}")))
    }

    /// Readable (epoll, level-triggered) when [`Vsock::process`] has something to do.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Does what can be done without waiting. Returns the streams that the guest has opened meanwhile.
    pub fn process(&self) -> io::Result<Vec<Opened>> {
        Ok(Vec::new())
    }

    /// Opens a stream to a port in the guest, with `stream` as the host's end of it. When the guest refuses, `stream` is
    /// closed.
    pub fn connect(&self, _port: u32, stream: OwnedFd) -> Result<(), Error> {
        drop(stream);
        Ok(())
    }
}

impl Device for Vsock {
    fn id(&self) -> u16 {
        19
    }
    fn class(&self) -> u32 {
        0
    }
    fn features(&self) -> u64 {
        0
    }
    fn queues(&self) -> &[super::Queue] {
        &[]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn start(&self, _: super::Activation) {}
    fn stop(&self) {}
}
