//! Messages of rtnetlink: the kernel's own description of its network, with which shim and agent speak to their kernels.
//!
//! What the host's kernel says of an address or a route is what the guest's kernel is told, byte for byte but for the numbers of
//! the interfaces. So nothing is lost that neither side knows of, and a message is looked into only where it must be.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Lengths of a message's and an attribute's header, and what both are padded to, in bytes.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;
const PADDING: usize = 4;

/// More than the kernel puts into one datagram.
const DATAGRAM: usize = 64 * 1024;

/// How often a description is asked for again that has changed while it was given.
const ATTEMPTS: usize = 10;

// Types of messages that are no data (linux/netlink.h).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

// Flags of messages.
const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_DUMP_INTR: u16 = 0x010;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLM_F_DUMP: u16 = 0x300;
/// What exists already is replaced.
pub const NLM_F_REPLACE: u16 = 0x100;
/// What exists already is an error.
pub const NLM_F_EXCL: u16 = 0x200;
/// What does not exist is made.
pub const NLM_F_CREATE: u16 = 0x400;
/// It is put behind what exists already.
pub const NLM_F_APPEND: u16 = 0x800;

/// The attribute of an error that says in words what is wrong.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// An attribute that consists of attributes.
const NLA_F_NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are its type.
const NLA_TYPE_MASK: u16 = 0x3fff;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("{operation} a netlink socket: {source}")]
    Socket {
        operation: &'static str,
        source: Errno,
    },
    /// The kernel refused. With its own words, if it had any.
    #[error("{}{}{text}", io::Error::from(*errno), if text.is_empty() { "" } else { ": " })]
    Refused { errno: Errno, text: String },
    /// What the kernel describes changes all the time.
    #[error("what was asked for changed {ATTEMPTS} times while the kernel described it")]
    Changing,
    /// This cannot be a message.
    #[error("{0} bytes are no message of netlink")]
    Malformed(usize),
}

impl Error {
    /// What the kernel said, if it has refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            Self::Socket { .. } | Self::Changing | Self::Malformed(_) => None,
        }
    }
}

/// A message: a header, a structure that depends on its type, and attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message(Vec<u8>);

impl Message {
    /// A message without attributes.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend(body);
        Self(bytes).padded()
    }

    /// Exactly one message.
    ///
    /// # Errors
    ///
    /// It is none, or more.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, Error> {
        let length = number(&bytes, 0).map_or(0, |length| length as usize);
        if length < HEADER || length != bytes.len() {
            return Err(Error::Malformed(bytes.len()));
        }
        Ok(Self(bytes))
    }

    /// What [`Message::from_bytes`] reads.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Its type.
    pub fn kind(&self) -> u16 {
        u16::from_ne_bytes([self.0[4], self.0[5]])
    }

    /// Sets its type.
    pub fn set_kind(&mut self, kind: u16) {
        self.0[4..6].copy_from_slice(&kind.to_ne_bytes());
    }

    /// Sets what is asked for.
    pub fn set_flags(&mut self, flags: u16) {
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
    }

    /// The structure and the attributes.
    pub fn body(&self) -> &[u8] {
        &self.0[HEADER..]
    }

    /// The structure and the attributes.
    pub fn body_mut(&mut self) -> &mut [u8] {
        &mut self.0[HEADER..]
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (ATTRIBUTE + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.padded()
    }

    /// Adds an attribute with a text.
    #[must_use]
    pub fn with_text(self, kind: u16, value: &str) -> Self {
        self.with(kind, &[value.as_bytes(), &[0]].concat())
    }

    /// Adds an attribute that consists of the attributes that `add` adds.
    #[must_use]
    pub fn with_nested(mut self, kind: u16, add: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self = add(self.with(kind | NLA_F_NESTED, &[]));
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    fn padded(mut self) -> Self {
        self.0.resize(self.0.len().next_multiple_of(PADDING), 0);
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self
    }
}

/// The attributes in some bytes, each with its type and where its value is; what is no attribute ends them.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, std::ops::Range<usize>)> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let header = bytes.get(start..start + ATTRIBUTE)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & NLA_TYPE_MASK;
        let value = start + ATTRIBUTE..start + length;
        bytes.get(value.clone())?;
        start += length.next_multiple_of(PADDING);
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    let (_, value) = attributes(bytes).find(|(found, _)| *found == kind)?;
    bytes.get(value)
}

/// The number of four bytes at an offset.
pub fn number(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

/// The text of an attribute.
pub fn text(value: &[u8]) -> String {
    let text = CStr::from_bytes_until_nul(value).map_or(value, CStr::to_bytes);
    String::from_utf8_lossy(text).into_owned()
}

/// A socket to the kernel, for the network namespace in which it was made. The kernel answers within the request.
#[derive(Debug)]
pub struct Socket {
    descriptor: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// A socket for the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The system has none.
    pub fn new() -> Result<Self, Error> {
        let failed = |operation| move |source| Error::Socket { operation, source };
        let descriptor = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is number 0.
            None,
        )
        .map_err(failed("making"))?;
        let on: libc::c_int = 1;
        // SAFETY: the option is an integer. A kernel that does not know it leaves the words out.
        unsafe {
            libc::setsockopt(
                descriptor.as_raw_fd(),
                libc::SOL_NETLINK,
                libc::NETLINK_EXT_ACK,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as u32,
            );
        }
        Ok(Self {
            descriptor,
            sequence: 0,
            buffer: vec![0; DATAGRAM],
        })
    }

    /// The name of the interface with this number, if there is one.
    pub fn name_of(&self, index: u32) -> Option<String> {
        rustix::net::netdevice::index_to_name(&self.descriptor, index).ok()
    }

    /// Asks for a change.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn request(&mut self, message: Message) -> Result<(), Error> {
        self.converse(message, NLM_F_ACK).map(drop)
    }

    /// Asks for all of a kind, each in a message.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or cannot say because it changes all the time.
    pub fn dump(&mut self, message: &Message) -> Result<Vec<Message>, Error> {
        for _ in 0..ATTEMPTS {
            if let Some(messages) = self.converse(message.clone(), NLM_F_DUMP)? {
                return Ok(messages);
            }
        }
        Err(Error::Changing)
    }

    /// Sends a message and collects the answers; `None` if they do not belong together.
    fn converse(
        &mut self,
        Message(mut bytes): Message,
        flags: u16,
    ) -> Result<Option<Vec<Message>>, Error> {
        let failed = |operation| move |source| Error::Socket { operation, source };
        self.sequence = self.sequence.wrapping_add(1);
        let flags = u16::from_ne_bytes([bytes[6], bytes[7]]) | flags | NLM_F_REQUEST;
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        rustix::net::send(&self.descriptor, &bytes, SendFlags::empty())
            .map_err(failed("writing to"))?;
        let mut answers = Vec::new();
        let mut consistent = true;
        loop {
            let (length, _) =
                rustix::net::recv(&self.descriptor, &mut self.buffer[..], RecvFlags::empty())
                    .map_err(failed("reading from"))?;
            let mut datagram = &self.buffer[..length];
            while let Some(length) = number(datagram, 0) {
                let length = length as usize;
                let Some(bytes) = datagram.get(..length).filter(|bytes| bytes.len() >= HEADER)
                else {
                    return Err(Error::Malformed(datagram.len()));
                };
                datagram = datagram
                    .get(length.next_multiple_of(PADDING)..)
                    .unwrap_or_default();
                let message = Message(bytes.to_vec());
                if number(bytes, 8) != Some(self.sequence) {
                    continue;
                }
                let flags = u16::from_ne_bytes([bytes[6], bytes[7]]);
                consistent &= flags & NLM_F_DUMP_INTR == 0 || message.kind() == NLMSG_ERROR;
                match message.kind() {
                    NLMSG_ERROR | NLMSG_DONE => {
                        return result(&message, flags).map(|()| consistent.then_some(answers));
                    }
                    _ => answers.push(message),
                }
            }
        }
    }
}

/// What the last message says: success, or an error number with the request and perhaps some words behind it.
fn result(message: &Message, flags: u16) -> Result<(), Error> {
    let body = message.body();
    let code = number(body, 0).map_or(0, |code| code as i32);
    if code == 0 {
        return Ok(());
    }
    let behind = if message.kind() == NLMSG_DONE {
        4
    } else if flags & NLM_F_CAPPED != 0 {
        4 + HEADER
    } else {
        4 + number(body, 4).map_or(0, |length| length as usize)
    };
    let words = body.get(behind.next_multiple_of(PADDING)..);
    let words = words.filter(|_| flags & NLM_F_ACK_TLVS != 0);
    let words = words.and_then(|words| attribute(words, NLMSGERR_ATTR_MSG));
    Err(Error::Refused {
        errno: Errno::from_raw_os_error(-code),
        text: words.map(text).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use libc::{IFLA_IFNAME, IFLA_MTU, RTM_GETLINK, RTM_NEWLINK};

    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_made() {
        let message = Message::new(RTM_NEWLINK, NLM_F_CREATE, &[1; 16])
            .with_text(IFLA_IFNAME, "eth0")
            .with_nested(18, |message| {
                message
                    .with_text(1, "veth")
                    .with_nested(2, |message| message.with(1, &[7; 5]))
            })
            .with(IFLA_MTU, &1500u32.to_ne_bytes());
        let message = Message::from_bytes(message.into_bytes()).unwrap();
        assert_eq!(message.kind(), RTM_NEWLINK);
        let attributes = &message.body()[16..];
        assert_eq!(text(attribute(attributes, IFLA_IFNAME).unwrap()), "eth0");
        assert_eq!(
            number(attribute(attributes, IFLA_MTU).unwrap(), 0),
            Some(1500)
        );
        let nested = attribute(attributes, 18).unwrap();
        let inner = attribute(nested, 2).unwrap();
        assert_eq!(attribute(inner, 1), Some(&[7; 5][..]));
        assert_eq!(attribute(attributes, 99), None);
    }

    #[test]
    fn what_is_no_message_is_none() {
        let whole = Message::new(1, 0, &[0; 8]).with(1, &[2; 6]).into_bytes();
        for length in 0..whole.len() {
            assert!(Message::from_bytes(whole[..length].to_vec()).is_err());
            // Attributes that are cut off, or say that they are longer or shorter than they can be.
            assert!(attributes(&whole[24..length.max(24)]).count() <= 1);
        }
        for length in [0u16, 3, 4, 11, 0xffff] {
            let mut bytes = whole[24..].to_vec();
            bytes[..2].copy_from_slice(&length.to_ne_bytes());
            assert!(attributes(&bytes).count() <= 2, "{length}");
        }
    }

    #[test]
    fn the_kernel_answers_and_refuses_in_words() {
        let mut socket = Socket::new().unwrap();
        let links = socket
            .dump(&Message::new(RTM_GETLINK, 0, &[0; 16]))
            .unwrap();
        let names: Vec<_> = links
            .iter()
            .map(|link| text(attribute(&link.body()[16..], IFLA_IFNAME).unwrap()))
            .collect();
        assert!(names.contains(&"lo".to_owned()), "{names:?}");
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&0x7fff_ffff_u32.to_ne_bytes());
        let error = socket
            .request(Message::new(RTM_NEWLINK, 0, &body))
            .unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NODEV), "{error}");
        assert!(error.to_string().contains("No such device"), "{error}");
    }
}
