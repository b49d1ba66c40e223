//! Traffic between the node and a container, in which this same program is the other side.
//!
//! One connection, which the container opens, carries the node's orders and the streams. Each order ends with a byte from
//! whoever has received, so that all that belongs to it has been executed.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use bulkhead_tests::error::{Context, Error, Result};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::SILENCE;

/// The first argument of this program when it is the other side; the second is the node's address.
pub const VERB: &str = "traffic";

/// How much is written at once.
const BLOCK: usize = 128 << 10;

/// After so many datagrams the receiver says that it has them: more than one, and fewer than a socket holds.
const WINDOW: u64 = 32;

/// How long a container may take to connect after its start.
const START_LIMIT: Duration = Duration::from_secs(120);

/// What is to go over the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// So many bytes from the container.
    StreamOut(u64),
    /// So many bytes to the container.
    StreamIn(u64),
    /// So many bytes, one at a time, each of which is answered by another.
    Requests(u64),
    /// So many datagrams of a size, half of them in each direction.
    Datagrams(u64, u16),
}

impl Order {
    fn to_bytes(self) -> [u8; 11] {
        let (kind, count, size) = match self {
            Self::StreamOut(count) => (0, count, 0),
            Self::StreamIn(count) => (1, count, 0),
            Self::Requests(count) => (2, count, 0),
            Self::Datagrams(count, size) => (3, count, size),
        };
        let mut bytes = [0; 11];
        bytes[0] = kind;
        bytes[1..9].copy_from_slice(&count.to_le_bytes());
        bytes[9..].copy_from_slice(&size.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; 11]) -> Result<Self> {
        let [kind, count @ .., low, high] = bytes;
        let count = u64::from_le_bytes(count);
        match kind {
            0 => Ok(Self::StreamOut(count)),
            1 => Ok(Self::StreamIn(count)),
            2 => Ok(Self::Requests(count)),
            3 => Ok(Self::Datagrams(count, u16::from_le_bytes([low, high]))),
            _ => Err(Error::Unfit(format!("there is no traffic of kind {kind}"))),
        }
    }
}

/// Where the node waits for the container.
#[derive(Debug)]
pub struct Place {
    listener: TcpListener,
    port: u16,
}

impl Place {
    /// Takes a free port at all of the node's addresses.
    pub fn new() -> Result<Self> {
        let listener = TcpListener::bind("0.0.0.0:0").or_cannot("listen")?;
        set_socket_timeout(&listener, Timeout::Recv, Some(START_LIMIT))
            .or_cannot("limit a wait")?;
        let address = listener.local_addr().or_cannot("find a socket's address")?;
        let port = address.port();
        Ok(Self { listener, port })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Waits for the container's connection, and until it is ready for orders.
    pub fn accept(&self) -> Result<Side> {
        let (stream, from) = self
            .listener
            .accept()
            .or_cannot("accept the container's connection")?;
        // Each connection has a socket for datagrams beside it: the container's at the same port, ours at one that it is told.
        let datagrams = UdpSocket::bind("0.0.0.0:0").or_cannot("bind a socket")?;
        datagrams.connect(from).or_cannot("connect a socket")?;
        let own = datagrams
            .local_addr()
            .or_cannot("find a socket's address")?;
        let mut side = Side::new(stream, datagrams, Some(SILENCE))?;
        side.write(&own.port().to_le_bytes())?;
        side.read_byte()?;
        Ok(side)
    }
}

/// The other side: does what the node at `address` orders, until it ends.
pub fn serve(address: &str) -> Result<()> {
    let stream = TcpStream::connect(address).or_cannot(format!("connect to {address}"))?;
    let finding = "find a socket's address";
    let own = stream.local_addr().or_cannot(finding)?;
    let mut other = stream.peer_addr().or_cannot(finding)?;
    let datagrams = UdpSocket::bind(own).or_cannot("bind a socket")?;
    // The node ends this side.
    let mut side = Side::new(stream, datagrams, None)?;
    let mut port = [0; 2];
    let told = side.stream.read_exact(&mut port);
    told.or_cannot("read from the other side")?;
    other.set_port(u16::from_le_bytes(port));
    side.datagrams
        .connect(other)
        .or_cannot("connect a socket")?;
    side.write(&[0])?;
    loop {
        let mut bytes = [0; 11];
        if side.stream.read_exact(&mut bytes).is_err() {
            return Ok(());
        }
        match Order::from_bytes(bytes)? {
            Order::StreamOut(length) => side.send(length)?,
            Order::StreamIn(length) => side.receive(length)?,
            Order::Requests(count) => {
                for _ in 0..count {
                    side.read_byte()?;
                    side.write(&[0])?;
                }
            }
            Order::Datagrams(count, size) => {
                side.receive_datagrams(count / 2, size)?;
                side.send_datagrams(count / 2, size)?;
            }
        }
    }
}

/// One of the two sides.
#[derive(Debug)]
pub struct Side {
    stream: TcpStream,
    datagrams: UdpSocket,
    block: Vec<u8>,
}

impl Side {
    /// `limit` is how long the other side may be silent.
    fn new(stream: TcpStream, datagrams: UdpSocket, limit: Option<Duration>) -> Result<Self> {
        stream.set_nodelay(true).or_cannot("set up a socket")?;
        stream
            .set_read_timeout(limit)
            .and_then(|()| stream.set_write_timeout(limit))
            .and_then(|()| datagrams.set_read_timeout(limit))
            .or_cannot("limit a wait")?;
        Ok(Self {
            stream,
            datagrams,
            block: vec![0; BLOCK],
        })
    }

    /// Has an order carried out.
    pub fn order(&mut self, order: Order) -> Result<()> {
        self.write(&order.to_bytes())?;
        match order {
            Order::StreamOut(length) => self.receive(length),
            Order::StreamIn(length) => self.send(length),
            Order::Requests(count) => {
                for _ in 0..count {
                    self.write(&[0])?;
                    self.read_byte()?;
                }
                Ok(())
            }
            Order::Datagrams(count, size) => {
                self.send_datagrams(count / 2, size)?;
                self.receive_datagrams(count / 2, size)
            }
        }
    }

    fn send(&mut self, mut length: u64) -> Result<()> {
        while length > 0 {
            let now = BLOCK.min(usize::try_from(length).unwrap_or(BLOCK));
            self.stream
                .write_all(&self.block[..now])
                .or_cannot("send a stream")?;
            length -= now as u64;
        }
        self.read_byte()
    }

    fn receive(&mut self, mut length: u64) -> Result<()> {
        while length > 0 {
            let most = BLOCK.min(usize::try_from(length).unwrap_or(BLOCK));
            let block = &mut self.block[..most];
            let now = self.stream.read(block).or_cannot("receive a stream")?;
            if now == 0 {
                return Err(Error::Unfit(format!("a stream lacks {length} bytes")));
            }
            length -= now as u64;
        }
        self.write(&[0])
    }

    fn send_datagrams(&mut self, count: u64, size: u16) -> Result<()> {
        for number in 1..=count {
            self.datagrams
                .send(&self.block[..usize::from(size)])
                .or_cannot("send a datagram")?;
            if number % WINDOW == 0 || number == count {
                self.read_byte()?;
            }
        }
        Ok(())
    }

    fn receive_datagrams(&mut self, count: u64, size: u16) -> Result<()> {
        for number in 1..=count {
            let length = self
                .datagrams
                .recv(&mut self.block)
                .or_cannot("receive a datagram")?;
            if length != usize::from(size) {
                return Err(Error::Unfit(format!(
                    "a datagram of {size} bytes has arrived with {length}"
                )));
            }
            if number % WINDOW == 0 || number == count {
                self.write(&[0])?;
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .or_cannot("write to the other side")
    }

    fn read_byte(&mut self) -> Result<()> {
        self.stream
            .read_exact(&mut [0])
            .or_cannot("read from the other side")
    }
}
