//! The thread of a pair of queues: it sleeps until the guest or the tap has something to say.
//!
//! All its events are edges: each kick and each frame is one, and nothing has to be read to have it gone. So what is ready is
//! remembered here, and an end that can do nothing for now (a ring without buffers beside a tap full of frames, say) wakes
//! nobody until it can.

use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::command;
use super::port::Port;
use super::receive::{Received, Receiver};
use super::tap::Offloads;
use super::transmit::{Sent, Transmitter};
use crate::memory::GuestRam;
use crate::virtio::worker::Rest;
use crate::virtio::{Broken, Queue, Ring};

/// How the events are told apart.
const TOKEN_RX: u64 = 0;
const TOKEN_TX: u64 = 1;
const TOKEN_COMMAND: u64 = 2;
const TOKEN_TAP: u64 = 3;
const EVENTS: usize = 4;

/// Frames in one direction before it is the other one's turn.
const BATCH: usize = 64;

/// What the thread has while there is no driver.
#[derive(Debug)]
pub struct Pair {
    index: usize,
    epoll: Epoll,
    port: Arc<Port>,
}

/// What a driver has set up for the pair.
#[derive(Debug)]
pub struct Service {
    pub ram: GuestRam,
    pub receiver: Receiver,
    pub transmitter: Transmitter,
    /// The control queue, with the first pair.
    pub commands: Option<Ring>,
    /// What the driver has agreed to.
    pub offloads: Offloads,
    /// The driver tells how many pairs it uses; otherwise that is one.
    pub several: bool,
}

/// What can be gone on with.
#[derive(Debug)]
struct Ready {
    /// The tap has frames.
    arrived: bool,
    /// The guest has given buffers for them.
    room: bool,
    /// The guest has frames.
    waiting: bool,
    /// The tap takes them.
    writable: bool,
    /// The control queue has commands.
    commands: bool,
}

impl Pair {
    /// Watches the pair's queues, the control queue if it is the first pair's, and the tap.
    pub fn new(
        index: usize,
        port: Arc<Port>,
        rx: &Queue,
        tx: &Queue,
        commands: Option<&Queue>,
    ) -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let kicks = [
            (TOKEN_RX, Some(rx)),
            (TOKEN_TX, Some(tx)),
            (TOKEN_COMMAND, commands),
        ];
        for (token, queue) in kicks {
            if let Some(queue) = queue {
                let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
                epoll.add(queue.kick_fd(), EpollEvent::new(flags, token))?;
            }
        }
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll.add(&port.taps[index], EpollEvent::new(flags, TOKEN_TAP))?;
        Ok(Self { index, epoll, port })
    }

    /// Serves the rings until the thread is asked to rest, or the driver breaks them, or the tap cannot do what the driver was
    /// promised.
    pub fn run(&self, service: &mut Service, rest: &Rest) {
        let ready = self.prepare(service);
        if ready.is_err() || self.serve(service, rest).is_err() {
            service.receiver.ring().set_broken();
        }
    }

    /// Every pair does this before it reads a frame, and the first one that comes does it for all.
    fn prepare(&self, service: &Service) -> Result<(), Errno> {
        self.port.set_offloads(service.offloads)?;
        // A driver that is going to say how many pairs it uses is not waited for: Linux does so before it uses any.
        if service.several {
            Ok(())
        } else {
            self.port.set_pairs(1)
        }
    }

    fn serve(&self, service: &mut Service, rest: &Rest) -> Result<(), Broken> {
        let mut ready = Ready {
            arrived: true,
            room: true,
            waiting: true,
            writable: true,
            commands: true,
        };
        loop {
            while !rest.is_due() && self.work(service, &mut ready)? {}
            if rest.is_due() {
                return Ok(());
            }
            self.wait(&mut ready);
        }
    }

    /// Does what can be done, up to a limit. `true` when there is more.
    fn work(&self, service: &mut Service, ready: &mut Ready) -> Result<bool, Broken> {
        let (ram, port, tap) = (&service.ram, &self.port, &self.port.taps[self.index]);
        if std::mem::take(&mut ready.commands)
            && let Some(ring) = &mut service.commands
        {
            command::run(ram, ring, port)?;
        }
        let mut more = false;
        if ready.waiting && ready.writable {
            match service.transmitter.run(ram, tap, port, BATCH)? {
                Sent::All => ready.waiting = false,
                Sent::Full => ready.writable = false,
                Sent::Part => more = true,
            }
        }
        // While the link is down, nobody needs buffers.
        if ready.arrived && (ready.room || !port.is_up()) {
            let received = service.receiver.run(ram, tap, port, BATCH)?;
            ready.room = received != Received::Starved;
            match received {
                Received::All => ready.arrived = false,
                Received::Starved => {}
                Received::Part => more = true,
            }
        }
        Ok(more)
    }

    /// Sleeps until something happens.
    fn wait(&self, ready: &mut Ready) {
        let mut events = [EpollEvent::empty(); EVENTS];
        // Should the wait be interrupted, there is no harm in looking once too often.
        let count = self.epoll.wait(&mut events, EpollTimeout::NONE);
        for event in &events[..count.unwrap_or(0)] {
            match event.data() {
                TOKEN_RX => ready.room = true,
                TOKEN_TX => ready.waiting = true,
                TOKEN_COMMAND => ready.commands = true,
                _ => {
                    let flags = event.events();
                    ready.arrived |= flags.intersects(!EpollFlags::EPOLLOUT);
                    ready.writable |= flags.intersects(!EpollFlags::EPOLLIN);
                }
            }
        }
    }
}
