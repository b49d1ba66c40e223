//! One stream: a socket on the host's side, packets on the guest's, and what is between them.
//!
//! Credit (section 5.10.6.3) keeps either side from sending more than the other has room for. Each packet of a stream tells
//! how much room its sender has in all and how much of what it received it has passed on; the difference to what was sent is
//! what is still on its way. All counters run modulo 2^32.
//!
//! The host's socket is watched edge-triggered, and a stream remembers that there is something to read. So a stream that may
//! not send, because it has no credit or the guest no buffers, costs nothing until it may.

use std::io::{self, ErrorKind};
use std::num::Wrapping;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};

use super::packet::{HOST_CID, Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use crate::virtio::Buffers;

/// How many bytes from the guest a stream holds when the host does not take them. Linux never sends more than this (its own
/// default) ahead.
pub const BUFFER: u32 = 256 * 1024;

/// Both directions are done.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The two ports by which a stream is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host wants to connect; the guest does not know yet.
    New,
    /// The guest has been asked.
    Asked,
    /// Connected.
    Open,
    /// The guest is done with it. Only what it sent before is still given to the host.
    Draining,
}

/// The stream ends with a reset: the guest broke its protocol, or is done with it in both directions.
#[derive(Debug)]
pub struct Over;

/// A stream.
#[derive(Debug)]
pub struct Stream {
    pub ports: Ports,
    /// The guest has opened it.
    pub from_guest: bool,
    pub phase: Phase,
    /// Waits for its turn to send to the guest.
    pub queued: bool,
    /// The socket is watched for room.
    pub watched: bool,
    /// How many packets' worth of data are read at once.
    pub chains: usize,
    socket: OwnedFd,
    guest_cid: u64,

    // From the guest to the host.
    held: Held,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// The value of `forwarded` that the guest knows.
    told: Wrapping<u32>,
    /// What the guest has said in SHUTDOWN packets.
    guest_shutdown: u32,
    /// The host has been shown the end of what the guest sends.
    ended: bool,
    /// The host takes nothing any more.
    host_deaf: bool,

    // From the host to the guest.
    readable: bool,
    sent: Wrapping<u32>,
    room: u32,
    taken: Wrapping<u32>,
    /// The socket will never have anything to read again.
    host_done: bool,
    /// What we have said in SHUTDOWN packets.
    host_shutdown: u32,

    owes_response: bool,
    owes_credit: bool,
    /// The guest has been asked for credit and has not given any since.
    asked_credit: bool,
}

/// What a stream has to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A packet without payload.
    Control(Operation),
    /// Up to this many bytes from the socket, if there are any.
    Data(usize),
    /// Nothing for now.
    Nothing,
}

impl Stream {
    /// A stream between a socket of the host's and the guest with this context identifier. `Phase::New` for one that the host
    /// opens; `Phase::Open` for one that the guest has asked for by `request`, to which it owes the response.
    pub fn new(socket: OwnedFd, guest_cid: u64, ports: Ports, request: Option<&Header>) -> Self {
        let mut stream = Self {
            ports,
            from_guest: request.is_some(),
            phase: Phase::New,
            queued: false,
            watched: false,
            chains: 1,
            socket,
            guest_cid,
            held: Held::default(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            guest_shutdown: 0,
            ended: false,
            host_deaf: false,
            readable: false,
            sent: Wrapping(0),
            room: 0,
            taken: Wrapping(0),
            host_done: false,
            host_shutdown: 0,
            owes_response: false,
            owes_credit: false,
            asked_credit: false,
        };
        if let Some(header) = request {
            stream.phase = Phase::Open;
            stream.owes_response = true;
            stream.note_credit(header);
        }
        stream
    }

    /// The host's socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The socket has something to read, or its end.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Whether there are bytes to be read.
    pub fn has_unread(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        matches!(recv(self.socket.as_raw_fd(), &mut [0], flags), Ok(1..))
    }

    /// Every packet of the guest's tells of its room.
    pub fn note_credit(&mut self, header: &Header) {
        self.room = header.buffer;
        self.taken = Wrapping(header.forwarded);
        if self.credit() > 0 {
            self.asked_credit = false;
        }
    }

    /// How many bytes the guest has room for. A guest whose counters make no sense has none.
    fn credit(&self) -> u32 {
        self.room.saturating_sub((self.sent - self.taken).0)
    }

    /// The guest asks how much room there is.
    pub fn owe_credit(&mut self) {
        self.owes_credit = true;
    }

    /// The guest accepts the connection.
    pub fn open(&mut self) -> Result<(), Over> {
        if self.phase != Phase::Asked {
            return Err(Over);
        }
        self.phase = Phase::Open;
        Ok(())
    }

    /// The guest sends a payload of `length` bytes, the first of `payload`.
    pub fn take(&mut self, payload: &mut Buffers<'_>, length: u32) -> Result<(), Over> {
        let pending = (self.received - self.forwarded).0;
        if self.phase != Phase::Open
            || self.guest_shutdown & SHUTDOWN_SEND != 0
            || payload.len() < length as usize
            || length > BUFFER - pending
        {
            return Err(Over);
        }
        self.received += length;
        let mut left = length as usize;
        if self.host_deaf {
            self.forward(left);
            return Ok(());
        }
        if self.held.is_empty() {
            let mut vectors = Vec::new();
            while left > 0 {
                vectors.clear();
                payload.append_to(left, &mut vectors);
                let Some(written) = self.send(&vectors) else {
                    break;
                };
                payload.advance(written);
                left -= written;
                self.forward(written);
            }
        }
        if self.host_deaf {
            self.forward(left);
        } else if left > 0 {
            self.held.push(payload, left);
        }
        Ok(())
    }

    /// Gives the host what is held for it. Afterwards [`Stream::is_blocked`] tells whether it has taken everything.
    pub fn flush(&mut self) {
        while !self.held.is_empty() {
            let bytes = self.held.bytes();
            let vector = libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            };
            let Some(written) = self.send(&[vector]) else {
                break;
            };
            self.held.advance(written);
            self.forward(written);
        }
        self.finish_writing();
    }

    /// Whether bytes are held that the host does not take at present.
    pub fn is_blocked(&self) -> bool {
        !self.held.is_empty()
    }

    /// The guest will not send, or not receive any more.
    pub fn shut_down_by_guest(&mut self, flags: u32) {
        let new = flags & !self.guest_shutdown & SHUTDOWN_BOTH;
        self.guest_shutdown |= new;
        if new & SHUTDOWN_RECEIVE != 0 {
            // It fails only when the host's end is gone, and then nobody notices.
            let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Read);
        }
        self.finish_writing();
    }

    /// Whether the guest has said that it is done in both directions.
    pub fn is_shut_down_by_guest(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    /// The host's end takes nothing any more.
    pub fn set_deaf(&mut self) {
        self.host_deaf = true;
        let held = self.held.bytes().len();
        self.held = Held::default();
        self.forward(held);
    }

    /// The guest is done with the stream, in whatever way.
    pub fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.guest_shutdown = SHUTDOWN_BOTH;
    }

    /// What is to be sent to the guest next.
    pub fn next(&self) -> Next {
        match self.phase {
            Phase::New => return Next::Control(Operation::Request),
            Phase::Asked | Phase::Draining => return Next::Nothing,
            Phase::Open if self.owes_response => return Next::Control(Operation::Response),
            Phase::Open => {}
        }
        let has_data =
            self.readable && !self.host_done && self.guest_shutdown & SHUTDOWN_RECEIVE == 0;
        if has_data && self.credit() > 0 {
            Next::Data(self.credit() as usize)
        } else if self.shutdown_flags() != self.host_shutdown {
            Next::Control(Operation::Shutdown)
        } else if has_data && !self.asked_credit {
            Next::Control(Operation::CreditRequest)
        } else if self.owes_credit {
            Next::Control(Operation::CreditUpdate)
        } else {
            Next::Nothing
        }
    }

    /// Makes the packet of a [`Next::Control`], which is sent with that.
    pub fn control(&mut self, operation: Operation) -> Header {
        let mut header = self.header(operation);
        match operation {
            Operation::Request => self.phase = Phase::Asked,
            Operation::Response => self.owes_response = false,
            Operation::Shutdown => {
                self.host_shutdown = self.shutdown_flags();
                header.flags = self.host_shutdown;
            }
            Operation::CreditRequest => self.asked_credit = true,
            Operation::Reset
            | Operation::Data
            | Operation::CreditUpdate
            | Operation::Unknown(_) => {}
        }
        header
    }

    /// Which directions the host is done with.
    fn shutdown_flags(&self) -> u32 {
        let send = if self.host_done { SHUTDOWN_SEND } else { 0 };
        let receive = if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 };
        send | receive
    }

    /// Reads from the socket into guest memory, as many bytes as there are and `vectors` have room for. `None` when there is
    /// nothing for now, or never again.
    pub fn read(&mut self, vectors: &mut [libc::iovec]) -> Option<usize> {
        // SAFETY: an all-zero message header is a valid one that names nothing.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len();
        let received = retry(|| {
            // SAFETY: the vectors describe guest memory, which stays mapped for as long as the machine exists.
            unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        });
        match received {
            Ok(0) => self.host_done = true,
            Ok(length) => {
                self.sent += length as u32;
                return Some(length);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            // The other end was closed with something unread. What it sent has been read before this is told.
            Err(_) => self.host_done = true,
        }
        None
    }

    /// A packet from the host to the guest, which also tells of the room here.
    pub fn header(&mut self, operation: Operation) -> Header {
        self.told = self.forwarded;
        self.owes_credit = false;
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: self.ports.host,
            destination_port: self.ports.guest,
            length: 0,
            kind: TYPE_STREAM,
            operation,
            flags: 0,
            buffer: BUFFER,
            forwarded: self.forwarded.0,
        }
    }

    /// Writes to the socket. `None` when it does not take anything for now, or never again.
    fn send(&mut self, vectors: &[libc::iovec]) -> Option<usize> {
        // SAFETY: an all-zero message header is a valid one that names nothing.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_ptr().cast_mut();
        message.msg_iovlen = vectors.len();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let sent = retry(|| {
            // SAFETY: the vectors describe held bytes, or guest memory, which stays mapped for as long as the machine exists.
            unsafe { libc::sendmsg(self.socket.as_raw_fd(), &message, flags) }
        });
        match sent {
            Ok(length) => Some(length),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(_) => {
                self.set_deaf();
                None
            }
        }
    }

    /// Bytes of the guest's have left. When it is worth a packet, the guest is told: often enough that it never waits for room
    /// that there is.
    fn forward(&mut self, count: usize) {
        self.forwarded += count as u32;
        if (self.forwarded - self.told).0 >= BUFFER / 2 {
            self.owes_credit = true;
        }
    }

    /// Once everything that the guest sent has been given to the host, the host sees the end of it.
    fn finish_writing(&mut self) {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.held.is_empty() && !self.ended {
            self.ended = true;
            // It fails only when the host's end is gone, and then nobody notices.
            let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
        }
    }
}

/// Bytes from the guest that the host has not taken yet, at most [`BUFFER`].
#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    /// How many of `bytes` the host has taken.
    start: usize,
}

impl Held {
    fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn push(&mut self, payload: &mut Buffers<'_>, length: usize) {
        if self.start >= self.bytes.len() - self.start {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let end = self.bytes.len();
        self.bytes.resize(end + length, 0);
        payload.read(&mut self.bytes[end..]);
    }

    fn advance(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

/// Makes a system call again for as long as signals interrupt it.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(value) => return Ok(value),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
