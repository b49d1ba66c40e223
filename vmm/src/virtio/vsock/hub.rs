//! All streams of a machine: who they are, whose turn it is, and what comes of a packet.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::packet::{self, HEADER, HOST_CID, Header, Operation, TYPE_STREAM};
use super::stream::{Next, Over, Phase, Ports, Stream};
use super::{Error, Opened};
use crate::memory::GuestRam;
use crate::virtio::{Broken, Buffers, Chain, Ring};

/// The most streams at a time, in whatever phase.
pub const MAX_STREAMS: usize = 1023;

/// The most of them that the guest has opened. It needs one, to the shim; each can hold [`super::stream::BUFFER`] bytes of the
/// host's memory, and as much again in its socket.
pub const MAX_FROM_GUEST: usize = 32;

/// Resets that wait for room in the guest. When there are more, nothing is taken from the guest until it makes room
/// (section 5.10.6.1.1 calls for such a limit).
pub const MAX_RESETS: usize = 256;

/// The host's ports of streams that the host opens.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// How much of a stream is sent to the guest before it is another's turn: bytes, and chains of the receive queue.
const BURST: usize = 128 * 1024;
const BURST_CHAINS: usize = 32;

/// How the sending to the guest has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Served {
    /// Nobody has anything to send.
    All,
    /// The guest has no room; it will notify when it has.
    Starved,
    /// There is more, and there is room.
    Part,
}

/// The streams.
#[derive(Debug)]
pub struct Hub {
    guest_cid: u64,
    /// The host's ports that the guest may connect to.
    allowed: Vec<u32>,
    epoll: Arc<Epoll>,
    /// By a number that is never used again, so that an event cannot be taken for another stream's.
    streams: HashMap<u64, Stream>,
    by_ports: HashMap<Ports, u64>,
    next_token: u64,
    next_port: u32,
    /// The streams that have something to send to the guest, in the order of their turns.
    queue: VecDeque<u64>,
    resets: VecDeque<Header>,
    opened: Vec<Opened>,
}

impl Hub {
    /// No streams yet. Those that come are watched by `epoll` with numbers from `first_token`.
    pub fn new(guest_cid: u64, allowed: Vec<u32>, epoll: Arc<Epoll>, first_token: u64) -> Self {
        Self {
            guest_cid,
            allowed,
            epoll,
            streams: HashMap::new(),
            by_ports: HashMap::new(),
            next_token: first_token,
            next_port: FIRST_PORT,
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            opened: Vec::new(),
        }
    }

    /// Number of streams, in whatever phase.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        assert!(self.by_ports.len() <= self.streams.len());
        assert!(self.queue.len() <= self.streams.len());
        self.streams.len()
    }

    /// The streams that the guest has opened since the last call.
    pub fn take_opened(&mut self) -> Vec<Opened> {
        std::mem::take(&mut self.opened)
    }

    /// The host opens a stream to a port of the guest's.
    pub fn connect(&mut self, port: u32, socket: OwnedFd) -> Result<(), Error> {
        if self.streams.len() >= MAX_STREAMS {
            return Err(Error::TooManyStreams);
        }
        // There are more ports than streams, so one of them is free.
        let ports = loop {
            let host = self.next_port;
            self.next_port = if host == LAST_PORT {
                FIRST_PORT
            } else {
                host + 1
            };
            let ports = Ports { host, guest: port };
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        let stream = Stream::new(socket, self.guest_cid, ports, None);
        self.insert(stream).map_err(Error::Watch)
    }

    /// Something has happened to the socket of a stream. It may have ended meanwhile.
    pub fn handle_event(&mut self, token: u64, flags: EpollFlags) {
        let Some(stream) = self.streams.get_mut(&token) else {
            return;
        };
        if flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            let connecting = matches!(stream.phase, Phase::New | Phase::Asked);
            if connecting && !stream.has_unread() {
                // Nobody waits for the guest's answer, and there is nothing to deliver after it.
                if stream.phase == Phase::Asked {
                    let reset = stream.control(Operation::Reset);
                    self.resets.push_back(reset);
                }
                return self.close(token);
            }
            stream.set_deaf();
        }
        if flags.intersects(!EpollFlags::EPOLLOUT) {
            stream.set_readable();
        }
        if flags.contains(EpollFlags::EPOLLOUT) {
            stream.flush();
        }
        self.settle(token);
    }

    /// Whether packets can be taken from the guest, which takes room for answers.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes up to `limit` packets from the guest. `true` when there may be more; otherwise the guest will notify.
    pub fn transmit(
        &mut self,
        ram: &GuestRam,
        ring: &mut Ring,
        limit: usize,
    ) -> Result<bool, Broken> {
        let mut taken = 0;
        ring.disable_kicks(ram)?;
        let more = loop {
            if taken == limit || !self.takes_packets() {
                break true;
            }
            match ring.pop(ram)? {
                Some(mut chain) => {
                    let (header, payload) = packet::receive(&mut chain)?;
                    self.handle_packet(&header, payload);
                    ring.push(ram, chain.head, 0)?;
                    taken += 1;
                }
                None if ring.enable_kicks(ram)? => {}
                None => break false,
            }
        };
        if taken > 0 {
            ring.signal(ram)?;
        }
        Ok(more)
    }

    /// Sends to the guest what there is, each stream in its turn, `limit` turns at most.
    pub fn serve(
        &mut self,
        ram: &GuestRam,
        ring: &mut Ring,
        limit: usize,
    ) -> Result<Served, Broken> {
        let mut turns = 0;
        ring.disable_kicks(ram)?;
        let served = loop {
            if self.resets.is_empty() && self.queue.is_empty() {
                break Served::All;
            }
            if turns == limit {
                break Served::Part;
            }
            match ring.pop(ram)? {
                Some(chain) => {
                    self.take_turn(ram, ring, chain)?;
                    turns += 1;
                }
                None if ring.enable_kicks(ram)? => {}
                None => break Served::Starved,
            }
        };
        if turns > 0 {
            ring.signal(ram)?;
        }
        Ok(served)
    }

    /// The guest's driver is gone, and with it everything that the guest knew of.
    pub fn reset(&mut self) {
        self.resets.clear();
        let tokens: Vec<u64> = self.streams.keys().copied().collect();
        for token in tokens {
            if self.streams[&token].phase != Phase::New {
                self.close(token);
            }
        }
    }

    /// Sends one packet or, of a stream's data, one burst. `chain` was popped for it.
    fn take_turn<'m>(
        &mut self,
        ram: &'m GuestRam,
        ring: &mut Ring,
        mut chain: Chain<'m>,
    ) -> Result<(), Broken> {
        if let Some(header) = self.resets.pop_front() {
            return send(ram, ring, &mut chain, header);
        }
        let token = self.queue.pop_front();
        let Some((token, stream)) =
            token.and_then(|token| Some((token, self.streams.get_mut(&token)?)))
        else {
            ring.unpop(1);
            return Ok(());
        };
        stream.queued = false;
        match stream.next() {
            Next::Nothing => ring.unpop(1),
            Next::Control(operation) => {
                send(ram, ring, &mut chain, stream.control(operation))?;
            }
            Next::Data(credit) => burst(ram, ring, chain, stream, credit)?,
        }
        self.settle(token);
        Ok(())
    }

    /// A packet from the guest.
    fn handle_packet(&mut self, header: &Header, mut payload: Buffers<'_>) {
        // A guest that gives itself another identifier gets no answer: it would not know it for one.
        if header.source_cid != self.guest_cid {
            return;
        }
        let ports = Ports {
            host: header.destination_port,
            guest: header.source_port,
        };
        if header.destination_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        let Some(&token) = self.by_ports.get(&ports) else {
            return match header.operation {
                Operation::Request => self.accept(ports, header),
                _ => self.refuse(header),
            };
        };
        let Some(stream) = self.streams.get_mut(&token) else {
            return;
        };
        stream.note_credit(header);
        let open = stream.phase == Phase::Open;
        let result = match header.operation {
            Operation::Reset => return self.close(token),
            Operation::Response => stream.open(),
            Operation::Data => stream.take(&mut payload, header.length),
            Operation::Shutdown if open => {
                stream.shut_down_by_guest(header.flags);
                // Section 5.10.6.6: the end of both directions is confirmed by a reset.
                if stream.is_shut_down_by_guest() {
                    Err(Over)
                } else {
                    Ok(())
                }
            }
            Operation::CreditUpdate if open => Ok(()),
            Operation::CreditRequest if open => {
                stream.owe_credit();
                Ok(())
            }
            Operation::Request
            | Operation::Shutdown
            | Operation::CreditUpdate
            | Operation::CreditRequest
            | Operation::Unknown(_) => Err(Over),
        };
        match result {
            Ok(()) => self.settle(token),
            Err(Over) => {
                self.refuse(header);
                self.close(token);
            }
        }
    }

    /// The guest opens a stream.
    fn accept(&mut self, ports: Ports, header: &Header) {
        let from_guest = self.streams.values().filter(|stream| stream.from_guest);
        let pair = if self.allowed.contains(&ports.host)
            && self.streams.len() < MAX_STREAMS
            && from_guest.count() < MAX_FROM_GUEST
        {
            socketpair(
                AddressFamily::Unix,
                SockType::Stream,
                None,
                SockFlag::SOCK_CLOEXEC,
            )
            .ok()
        } else {
            None
        };
        let Some((ours, theirs)) = pair else {
            return self.refuse(header);
        };
        let stream = Stream::new(ours, self.guest_cid, ports, Some(header));
        match self.insert(stream) {
            Ok(()) => self.opened.push(Opened {
                port: ports.host,
                stream: theirs,
            }),
            Err(_) => self.refuse(header),
        }
    }

    /// Answers a packet by a reset, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.operation != Operation::Reset {
            self.resets.push_back(header.reset());
        }
    }

    fn insert(&mut self, stream: Stream) -> Result<(), Errno> {
        let token = self.next_token;
        self.epoll
            .add(stream.socket(), EpollEvent::new(interest(false), token))?;
        self.next_token += 1;
        self.by_ports.insert(stream.ports, token);
        self.streams.insert(token, stream);
        self.settle(token);
        Ok(())
    }

    /// The guest is done with a stream. The host still gets what is held for it.
    fn close(&mut self, token: u64) {
        if let Some(stream) = self.streams.get_mut(&token) {
            self.by_ports.remove(&stream.ports);
            stream.drain();
            self.settle(token);
        }
    }

    /// Makes everything around a stream follow what it is now: whether it is there at all, whether it waits for its turn, and
    /// what its socket is watched for.
    fn settle(&mut self, token: u64) {
        let Some(stream) = self.streams.get_mut(&token) else {
            return;
        };
        let blocked = stream.is_blocked();
        if stream.phase == Phase::Draining && !blocked {
            // A guest that gives no room to be answered in must not make this list longer and longer.
            if stream.queued {
                self.queue.retain(|&waiting| waiting != token);
            }
            if self.by_ports.get(&stream.ports) == Some(&token) {
                self.by_ports.remove(&stream.ports);
            }
            self.streams.remove(&token);
            return;
        }
        if stream.next() != Next::Nothing && !stream.queued {
            stream.queued = true;
            self.queue.push_back(token);
        }
        if blocked != stream.watched {
            let mut event = EpollEvent::new(interest(blocked), token);
            // The socket is being watched, so that there is nothing to refuse.
            if self.epoll.modify(stream.socket(), &mut event).is_ok() {
                stream.watched = blocked;
            }
        }
    }
}

/// What a socket is watched for: always for something to read and for its end; for room only while the stream waits for it,
/// because each byte that the host takes makes room.
fn interest(blocked: bool) -> EpollFlags {
    let always = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    if blocked {
        always | EpollFlags::EPOLLOUT
    } else {
        always
    }
}

/// Sends a packet without payload.
fn send(
    ram: &GuestRam,
    ring: &mut Ring,
    chain: &mut Chain<'_>,
    header: Header,
) -> Result<(), Broken> {
    let (mut room, _) = packet::room(chain)?;
    room.write(&header.to_bytes());
    ring.push(ram, chain.head, HEADER as u32)
}

/// Reads from a stream's socket straight into as many packets as that takes.
///
/// How much there is to read is not known before, and a chain that is looked at in vain costs as much as one that is used. So
/// a stream gets one chain, and twice as many each time that it has filled all that it got.
fn burst<'m>(
    ram: &'m GuestRam,
    ring: &mut Ring,
    first: Chain<'m>,
    stream: &mut Stream,
    credit: usize,
) -> Result<(), Broken> {
    let mut limit = credit.min(BURST);
    let mut packets = Vec::new();
    let mut vectors = Vec::new();
    let mut chain = Some(first);
    while let Some(mut popped) = chain.take() {
        let (header, payload) = packet::room(&mut popped)?;
        let length = payload.len().min(limit);
        payload.append_to(length, &mut vectors);
        packets.push((popped.head, header, length));
        limit -= length;
        if limit > 0 && packets.len() < stream.chains {
            chain = ring.pop(ram)?;
        }
    }
    let offered: usize = packets.iter().map(|(_, _, length)| length).sum();
    let mut left = stream.read(&mut vectors).unwrap_or(0);
    stream.chains = if left == offered {
        (stream.chains * 2).min(BURST_CHAINS)
    } else {
        1
    };
    let mut unused = 0;
    for (head, mut room, length) in packets {
        let length = length.min(left);
        if length == 0 {
            unused += 1;
            continue;
        }
        left -= length;
        let mut header = stream.control(Operation::Data);
        header.length = length as u32;
        room.write(&header.to_bytes());
        ring.push(ram, head, (HEADER + length) as u32)?;
    }
    ring.unpop(unused);
    Ok(())
}
