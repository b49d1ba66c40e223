//! The control protocol between the shim and the VMM: the whole of what a VMM can be asked, and all that it can say.
//!
//! One `AF_UNIX` `SOCK_SEQPACKET` pair connects the two processes. Each datagram is one [`Request`] (shim to VMM) or one
//! [`Event`] (VMM to shim), encoded by postcard, with the descriptors it speaks of attached by `SCM_RIGHTS`, in the order
//! that the variant's documentation gives. The VMM opens nothing by itself: every resource arrives here.
//!
//! When either end closes, the other ends: a VMM never outlives its shim.
//!
//! Neither side trusts the other's bytes: a datagram that is too long, does not decode or carries the wrong number of
//! descriptors is an error ([`Error`]), and descriptors that were received with it are closed.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest datagram, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// The most descriptors in one datagram: the kernel's `SCM_MAX_FD`.
pub const MAX_DESCRIPTORS: usize = 253;

/// The descriptor at which the VMM process finds its end of the control socket when it starts.
pub const CONTROL_DESCRIPTOR: RawFd = 3;

/// The guest's vsock context identifier. Every machine has the same: it is visible only inside.
pub const GUEST_CID: u64 = 3;

/// What the shim asks of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Builds the machine and starts it; always the first request, and only once. Answered by [`Event::Started`], or by
    /// [`Event::Stopped`] with the cause.
    ///
    /// Descriptors: `/dev/kvm`, the kernel image (ELF), the console (a pipe or socket for the serial port's output, which
    /// the VMM writes without blocking), then each disk's extents, then each network interface's tap queues.
    Boot(Boot),
    /// Attaches a disk to the running machine. Answered by [`Event::Attached`] or [`Event::Refused`] with the same tag.
    ///
    /// Descriptors: the disk's extents.
    AttachDisk { tag: u32, disk: Disk },
    /// Attaches a network interface to the running machine. Answered by [`Event::Attached`] or [`Event::Refused`] with the
    /// same tag.
    ///
    /// Descriptors: the queues of the interface's tap, one for each pair.
    AttachNic { tag: u32, nic: Nic },
    /// Attaches the vsock device to a running machine that has none. Answered by [`Event::Attached`] or [`Event::Refused`] with the
    /// same tag.
    AttachVsock {
        tag: u32,
        /// As [`Boot::ports`] has them.
        ports: Vec<u32>,
    },
    /// Changes a network interface while the guest uses it. Answered by [`Event::NicUpdated`] or [`Event::Refused`].
    UpdateNic {
        tag: u32,
        slot: u8,
        /// Whether its cable is plugged in. While it is not, what comes from either side is dropped.
        link: bool,
        /// What the guest may send from now on.
        sources: Sources,
    },
    /// Takes a device away that the guest has let go. Answered by [`Event::Detached`] or [`Event::Refused`].
    Detach { tag: u32, slot: u8 },
    /// Opens a vsock stream to a port in the guest. There is no answer: a refused stream is simply closed.
    ///
    /// Descriptors: the VMM's end of a stream socket pair; what is written to the other end before the guest accepts
    /// is delivered after it.
    Connect { port: u32 },
}

/// The machine to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Number of virtual processors, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The kernel command line.
    pub cmdline: String,
    /// The host's vsock ports to which the guest may connect; every other port is refused. `None` for a machine that has no vsock
    /// device until [`Request::AttachVsock`].
    pub ports: Option<Vec<u32>>,
    /// The disks that are present at boot, on PCI slots that [`Event::Started`] tells.
    pub disks: Vec<Disk>,
    /// The network interfaces that are present at boot.
    pub nics: Vec<Nic>,
}

/// A virtio-block device. Its content is the concatenation of its extents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The device identification that the guest reads (virtio 1.2, section 5.2.6.1, `VIRTIO_BLK_T_GET_ID`): at most
    /// 20 bytes of ASCII.
    pub id: String,
    /// Whether the device refuses writes. Enforced by the device, whatever the guest's driver does.
    pub read_only: bool,
    /// Number of request queues, 1 to the number of processors.
    pub queues: u16,
    /// One for each descriptor, in their order; at least one. The sum of their lengths is a multiple of 512.
    pub extents: Vec<Extent>,
}

/// A range of bytes of one descriptor (a regular file, a memfd or a block device).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Where the range starts in the file, in bytes.
    pub offset: u64,
    /// Length of the range in bytes. The file must be at least `offset + length` long.
    pub length: u64,
}

/// A virtio-net device on a tap of the host's.
///
/// The tap is made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with `IFF_MULTI_QUEUE` for more than one pair. Its
/// offloads are the device's to set, and so is the length of its header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// What messages call it: the interface's name on the host.
    pub name: String,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// The longest packet, without the Ethernet header, in bytes: at least 68.
    pub mtu: u16,
    /// Number of pairs of receive and transmit queues, 1 to the number of processors, at most 8.
    pub pairs: u16,
    /// What the guest may send.
    pub sources: Sources,
}

/// From which addresses a guest may send. What comes from others is dropped and counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sources {
    /// Any: the administrator wants it so.
    Any,
    /// Its own hardware address.
    Mac,
    /// Its own hardware address, and IP and ARP from one of these addresses, the link-local address made of the hardware
    /// address (RFC 4291, appendix A), or the unspecified one, from which a host looks whether an address is free. Nothing
    /// that is neither IP nor ARP, and no neighbour or router advertisement for another.
    Addresses(Vec<IpAddr>),
}

/// How many frames a network interface has dropped since it was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Dropped {
    /// From the guest: not from one of its [`Sources`].
    pub spoofed: u64,
    /// From the guest: of impossible length, or with a header that no driver may write.
    pub invalid: u64,
    /// From the guest: the host's tap did not take it.
    pub refused: u64,
    /// To the guest: longer than all of its buffers.
    pub oversized: u64,
    /// In either direction while the link was down.
    pub unlinked: u64,
}

/// What the VMM tells the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The processors run. `slots` are the PCI device numbers (bus 0, function 0) of the disks of [`Boot`] in their order,
    /// then of its network interfaces.
    Started { slots: Vec<u8> },
    /// A device is on the bus as PCI device `slot` (bus 0, function 0); the guest must rescan the bus.
    Attached { tag: u32, slot: u8 },
    /// A device is gone.
    Detached { tag: u32 },
    /// A network interface is as it was asked to be.
    NicUpdated { tag: u32, dropped: Dropped },
    /// The request with this tag was refused, and nothing has changed.
    Refused { tag: u32, error: String },
    /// The guest opened a stream to a port that [`Boot::ports`] or [`Request::AttachVsock`] allows.
    ///
    /// Descriptors: the host's end of the stream.
    StreamOpened { port: u32 },
    /// The machine has ended; always the last event.
    Stopped { reason: StopReason },
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel said that it panicked.
    Panic,
    /// A virtual processor shut down (triple fault).
    TripleFault,
    /// The machine could not be built: a request was invalid or a resource was missing or corrupt.
    Invalid(String),
    /// The machine failed while it ran, through KVM or a device model.
    Failed(String),
}

/// What can go wrong on the control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other end is gone.
    #[error("the control socket was closed by its other end")]
    Closed,
    /// The system refused.
    #[error("{operation} on the control socket: {source}")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
    /// A message does not fit in a datagram.
    #[error(
        "a control message of {bytes} bytes and {descriptors} descriptors exceeds {MAX_MESSAGE} bytes or {MAX_DESCRIPTORS} descriptors"
    )]
    TooLong { bytes: usize, descriptors: usize },
    /// A datagram was cut off by the receiver: it was longer than any valid message.
    #[error("a control message exceeds {MAX_MESSAGE} bytes or {MAX_DESCRIPTORS} descriptors")]
    Truncated,
    /// A datagram is no valid message.
    #[error("a control message does not decode: {0}")]
    Malformed(postcard::Error),
}

/// One end of the control socket.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Makes a connected pair, close-on-exec at both ends.
    pub fn pair() -> Result<(Self, Self), Error> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(io_error("socketpair"))?;
        Ok((Self::from(a), Self::from(b)))
    }

    /// Sends one message with its descriptors, which the caller keeps open or closes as it likes.
    pub fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let bytes = postcard::to_allocvec(message).map_err(Error::Malformed)?;
        if bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(Error::TooLong {
                bytes: bytes.len(),
                descriptors: descriptors.len(),
            });
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            let sent = sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            return match sent {
                Ok(_) => Ok(()),
                Err(Errno::EINTR) => continue,
                Err(Errno::EPIPE | Errno::ECONNRESET) => Err(Error::Closed),
                Err(errno) => Err(io_error("sendmsg")(errno)),
            };
        }
    }

    /// Receives one message and its descriptors (close-on-exec). Blocks unless the socket is non-blocking; then
    /// "nothing there" is `Error::Io` with [`io::ErrorKind::WouldBlock`].
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), Error> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let received = loop {
            match recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut buffers,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Ok(received) => break received,
                Err(Errno::EINTR) => continue,
                Err(Errno::ECONNRESET) => return Err(Error::Closed),
                Err(errno) => return Err(io_error("recvmsg")(errno)),
            }
        };
        let mut descriptors = Vec::new();
        for message in received.cmsgs().map_err(|_| Error::Truncated)? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has just made these descriptors for us, and nobody else knows their numbers.
                descriptors.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        if received
            .flags
            .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC)
        {
            return Err(Error::Truncated);
        }
        let length = received.bytes;
        if length == 0 {
            return Err(Error::Closed);
        }
        let message = postcard::from_bytes(&bytes[..length]).map_err(Error::Malformed)?;
        Ok((message, descriptors))
    }
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn io_error(operation: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Io {
        operation,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;
    use crate::testing::own_descriptors;

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (shim, vmm) = Channel::pair().unwrap();
        let mut file = File::from(
            nix::sys::memfd::memfd_create(c"x", nix::sys::memfd::MFdFlags::empty()).unwrap(),
        );
        file.write_all(b"disk").unwrap();
        let request = Request::AttachDisk {
            tag: 7,
            disk: Disk {
                id: "layers".into(),
                read_only: true,
                queues: 1,
                extents: vec![Extent {
                    offset: 0,
                    length: 4,
                }],
            },
        };
        shim.send(&request, &[file.as_fd()]).unwrap();
        let (received, descriptors) = vmm.receive::<Request>().unwrap();
        assert_eq!(received, request);
        let mut received = File::from(descriptors.into_iter().next().unwrap());
        received.rewind().unwrap();
        let mut content = String::new();
        received.read_to_string(&mut content).unwrap();
        assert_eq!(content, "disk");
    }

    #[test]
    fn a_closed_end_is_told_apart_from_a_failure() {
        own_descriptors();
        let (shim, vmm) = Channel::pair().unwrap();
        drop(shim);
        assert!(matches!(vmm.receive::<Request>(), Err(Error::Closed)));
        assert!(matches!(
            vmm.send(&Event::Detached { tag: 1 }, &[]),
            Err(Error::Closed)
        ));
    }

    #[test]
    fn garbage_and_oversize_are_errors() {
        let (shim, vmm) = Channel::pair().unwrap();
        nix::sys::socket::send(shim.as_raw_fd(), &[0xff; 9], MsgFlags::empty()).unwrap();
        assert!(matches!(vmm.receive::<Request>(), Err(Error::Malformed(_))));
        nix::sys::socket::send(
            shim.as_raw_fd(),
            &vec![0; MAX_MESSAGE + 1],
            MsgFlags::empty(),
        )
        .unwrap();
        assert!(matches!(vmm.receive::<Request>(), Err(Error::Truncated)));
        let long = Event::Refused {
            tag: 0,
            error: "x".repeat(MAX_MESSAGE),
        };
        assert!(matches!(vmm.send(&long, &[]), Err(Error::TooLong { .. })));
    }
}
