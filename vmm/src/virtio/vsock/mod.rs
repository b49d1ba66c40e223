//! The socket device (section 5.10), which carries descriptors instead of paths.
//!
//! A stream is a socket pair. The device has one end of it, and the other crosses the control socket: when the guest connects
//! to a port of the host's that it may connect to, the host's end comes out of [`Vsock::process`]; when the host connects to
//! the guest, it gives the device's end to [`Vsock::connect`]. So there is nothing to look up, and nothing to name.
//!
//! What goes in at one end comes out of the other, and each direction ends by itself:
//!
//! | on the host's end | on the guest's |
//! |---|---|
//! | `shutdown(SHUT_WR)` | reads what was written, then end of file; may go on to write |
//! | reads what was written, then end of file; may go on to write | `shutdown(SHUT_WR)` |
//! | `close` | reads what was written, then end of file; writing fails |
//! | reads what was written, then end of file; writing fails | `close`, or reset |
//!
//! As with any socket pair, the host's end reads a reset instead of the end of file when something that it wrote was not taken.
//!
//! The guest is not trusted with the host's memory: what the host's end does not take is held only as far as the credit goes
//! that the guest was given. A guest that sends more loses the stream.
//!
//! One thread drives the device, by events alone: packets from the guest, sockets, and room in the guest's receive queue. A
//! processor's thread comes in only to start and to stop it.

mod hub;
mod packet;
mod stream;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::hub::{Hub, MAX_STREAMS, Served};
use super::{Activation, Broken, Device, Queue, Ring};
use crate::memory::GuestRam;

/// The queues: packets to the guest, packets from the guest, events (of which there are none).
const RX: usize = 0;
const TX: usize = 1;
/// Descriptors in each queue. Linux fills the receive queue with buffers of a page each.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// How the events of the queues are told apart from those of the streams.
const TOKEN_RX: u64 = RX as u64;
const TOKEN_TX: u64 = TX as u64;
const FIRST_STREAM: u64 = 2;

/// Events that are taken at a time.
const EVENTS: usize = 64;
/// Packets from the guest, and turns of streams to the guest, before whoever drives the device can do something else.
const BATCH: usize = 64;

/// A stream that the guest has opened.
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
    #[error(
        "the machine has {MAX_STREAMS} vsock streams already, the most that it can have; close some"
    )]
    TooManyStreams,
    /// The descriptor cannot be watched: it is no socket, or the system has no room.
    #[error("cannot watch the descriptor of a vsock stream (EPOLL_CTL_ADD): {0}")]
    Watch(Errno),
}

/// The device and its streams, driven by one thread that waits for [`Vsock::descriptor`] to become readable and then calls
/// [`Vsock::process`]. Clones are the same device.
#[derive(Debug, Clone)]
pub struct Vsock(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: [u8; 8],
    queues: Vec<Queue>,
    epoll: Arc<Epoll>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    hub: Hub,
    link: Link,
}

/// The connection to the guest's driver.
#[derive(Debug)]
enum Link {
    /// There is no driver, or it broke its rings.
    Down,
    /// The driver is ready.
    Up(Box<Rings>),
}

#[derive(Debug)]
struct Rings {
    ram: GuestRam,
    rx: Ring,
    tx: Ring,
    /// The guest has not notified of new room since there was none.
    starved: bool,
    /// There may be packets from the guest.
    waiting: bool,
}

impl Vsock {
    /// A device for the guest with context identifier `cid`, which may connect to the host's `ports`.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn new(cid: u64, ports: Vec<u32>) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        let mut queues = Vec::new();
        for size in QUEUE_SIZES {
            let kick = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
            queues.push(Queue { size, kick });
        }
        for (token, queue) in [(TOKEN_RX, &queues[RX]), (TOKEN_TX, &queues[TX])] {
            // Edge-triggered: each notification is an event, and nothing has to be read to have it gone.
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
            epoll.add(queue.kick_fd(), EpollEvent::new(flags, token))?;
        }
        Ok(Self(Arc::new(Shared {
            config: cid.to_le_bytes(),
            queues,
            state: Mutex::new(State {
                hub: Hub::new(cid, ports, epoll.clone(), FIRST_STREAM),
                link: Link::Down,
            }),
            epoll,
        })))
    }

    /// Readable (level-triggered) when [`Vsock::process`] has something to do.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.epoll.0.as_fd()
    }

    /// Does what can be done without waiting. Returns the streams that the guest has opened meanwhile.
    ///
    /// # Errors
    ///
    /// The events cannot be had, which nothing that the guest does can bring about.
    pub fn process(&self) -> io::Result<Vec<Opened>> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = match self.0.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Err(Errno::EINTR) => 0,
            count => count?,
        };
        let mut state = self.0.lock();
        let State { hub, link } = &mut *state;
        for event in &events[..count] {
            match (event.data(), &mut *link) {
                (TOKEN_RX, Link::Up(rings)) => rings.starved = false,
                (TOKEN_TX, Link::Up(rings)) => rings.waiting = true,
                (TOKEN_RX | TOKEN_TX, Link::Down) => {}
                (token, _) => hub.handle_event(token, event.events()),
            }
        }
        if let Link::Up(rings) = link {
            match rings.run(hub) {
                Ok(false) => {}
                Ok(true) => self.0.wake(),
                Err(_) => {
                    rings.rx.set_broken();
                    state.disconnect();
                }
            }
        }
        Ok(state.hub.take_opened())
    }

    /// Opens a stream to a port in the guest, with `stream` as the device's end of it. When the guest refuses, `stream` is
    /// closed. A guest whose driver is not ready is asked when it is.
    ///
    /// # Errors
    ///
    /// There are too many streams, or the descriptor is of no use.
    pub fn connect(&self, port: u32, stream: OwnedFd) -> Result<(), Error> {
        self.0.lock().hub.connect(port, stream)?;
        self.0.wake();
        Ok(())
    }
}

impl Shared {
    /// Has [`Vsock::process`] called once more.
    fn wake(&self) {
        // Nobody reads the counter, and it has room for 2^64 - 2 notifications.
        let _ = self.queues[TX].kick.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn disconnect(&mut self) {
        self.link = Link::Down;
        self.hub.reset();
    }
}

impl Rings {
    /// Moves packets in both directions. `true` when there is more to do that no event will tell of.
    fn run(&mut self, hub: &mut Hub) -> Result<bool, Broken> {
        if self.waiting {
            self.waiting = hub.transmit(&self.ram, &mut self.tx, BATCH)?;
        }
        let mut served = Served::Starved;
        if !self.starved {
            served = hub.serve(&self.ram, &mut self.rx, BATCH)?;
            self.starved = served == Served::Starved;
        }
        // Packets that wait because the guest has no room for resets wait for the guest.
        Ok(served == Served::Part || self.waiting && hub.takes_packets())
    }
}

impl Device for Vsock {
    fn id(&self) -> u16 {
        VIRTIO_ID_VSOCK as u16
    }

    fn class(&self) -> u32 {
        0x07_80_00
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[Queue] {
        &self.0.queues
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.0.config)
    }

    /// Without one of the two queues that carry packets, there is nothing to start.
    fn start(&self, activation: Activation) {
        let mut rings = activation.rings.into_iter();
        if let (Some(Some(rx)), Some(Some(tx))) = (rings.next(), rings.next()) {
            self.0.lock().link = Link::Up(Box::new(Rings {
                ram: activation.ram,
                rx,
                tx,
                starved: false,
                waiting: true,
            }));
            self.0.wake();
        }
    }

    fn stop(&self) {
        self.0.lock().disconnect();
    }
}
