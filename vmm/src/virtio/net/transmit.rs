//! From the guest to the host: frames are written to the tap straight from the guest's buffers, but for their first bytes,
//! which are copied so that the guest cannot change them after they have been looked at.

use std::io::ErrorKind;

use libc::iovec;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::guard::{Guard, LOOKED_AT};
use super::port::Port;
use super::tap::{Tap, Vectors};
use super::{HEADER, LONGEST_FRAME, QUEUE_SIZE};
use crate::memory::GuestRam;
use crate::virtio::{Broken, Chain, Ring};

/// The header's bytes that are looked at (section 5.1.6).
const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;

// All pieces of a chain are taken in one write: it has as many as the queue at most, and one more where memory has its gap.
const _: () = assert!((QUEUE_SIZE as i32) + 2 <= libc::UIO_MAXIOV);

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
const GSO_UDP_L4: u8 = VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
const GSO_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// How the sending has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Sent {
    /// The guest has nothing more. It notifies when it has.
    All,
    /// The tap takes no more. It tells when it does.
    Full,
    /// There may be more.
    Part,
}

/// The transmit queue of a pair.
#[derive(Debug)]
pub struct Transmitter {
    ring: Ring,
    /// The kernel knows the segmentation of UDP.
    udp: bool,
    /// Here only to be allocated once.
    vectors: Vectors,
}

impl Transmitter {
    /// Serves a ring.
    pub fn new(ring: Ring, udp: bool) -> Self {
        Self {
            ring,
            udp,
            vectors: Vectors::default(),
        }
    }

    /// Moves up to `limit` frames from the guest to the tap.
    pub fn run(
        &mut self,
        ram: &GuestRam,
        tap: &Tap,
        port: &Port,
        limit: usize,
    ) -> Result<Sent, Broken> {
        let guard = port.guard();
        self.ring.disable_kicks(ram)?;
        let mut taken = 0;
        let sent = loop {
            if taken == limit {
                break Sent::Part;
            }
            match self.ring.pop(ram)? {
                Some(chain) => {
                    let head = chain.head;
                    if !self.send(chain, tap, port, &guard)? {
                        self.ring.unpop(1);
                        break Sent::Full;
                    }
                    self.ring.push(ram, head, 0)?;
                    taken += 1;
                }
                None if self.ring.enable_kicks(ram)? => {}
                None => break Sent::All,
            }
        };
        if taken > 0 {
            self.ring.signal(ram)?;
        }
        Ok(sent)
    }

    /// Sends a frame, or drops one that must not be sent. `false` when the tap does not take it for now.
    fn send(
        &mut self,
        chain: Chain<'_>,
        tap: &Tap,
        port: &Port,
        guard: &Guard,
    ) -> Result<bool, Broken> {
        let mut data = chain.readable;
        let length = data.len();
        if length < HEADER {
            return Err(Broken::Short {
                head: chain.head,
                missing: "a header",
            });
        }
        if !port.is_up() {
            port.count(|dropped| &dropped.unlinked);
            return Ok(true);
        }
        let mut start = [0; HEADER + LOOKED_AT];
        let copied = length.min(start.len());
        data.read(&mut start[..copied]);
        let (header, frame) = start.split_at_mut(HEADER);
        if length > HEADER + LONGEST_FRAME || !self.sanitise(header) {
            port.count(|dropped| &dropped.invalid);
            return Ok(true);
        }
        if !guard.permits(&frame[..copied - HEADER]) {
            port.count(|dropped| &dropped.spoofed);
            return Ok(true);
        }

        let Vectors(vectors) = &mut self.vectors;
        vectors.clear();
        vectors.push(iovec {
            iov_base: start.as_mut_ptr().cast(),
            iov_len: copied,
        });
        data.append_to(usize::MAX, vectors);
        match tap.write(vectors) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            // The kernel does not like the frame, or the tap is down or gone.
            Err(_) => {
                port.count(|dropped| &dropped.refused);
                Ok(true)
            }
        }
    }

    /// Makes the header one that the kernel should see, or tells that there is none: only checksums and segmentation that the
    /// device has offered, though the kernel knows more; flags that are not known are ignored (section 5.1.6.2.2).
    fn sanitise(&self, header: &mut [u8]) -> bool {
        header[FLAGS] &= NEEDS_CSUM;
        let gso = header[GSO_TYPE];
        match gso & !GSO_ECN {
            GSO_NONE => gso == GSO_NONE,
            GSO_TCPV4 | GSO_TCPV6 => header[FLAGS] == NEEDS_CSUM,
            GSO_UDP_L4 => self.udp && gso == GSO_UDP_L4 && header[FLAGS] == NEEDS_CSUM,
            _ => false,
        }
    }
}
