//! From the host to the guest: frames are read from the tap straight into the guest's buffers.
//!
//! How long a frame is shows only when it has been read, so there must be room for the longest first. Buffers that a frame has
//! left over are kept for the next one. When the guest has given less than the longest frame takes, a frame is read into the
//! host's memory instead: it may well be a short one. One that is too long for what is there waits for more, and is dropped
//! only when there cannot be more.
//!
//! Dozens of buffers in a read cost more than a short frame does. So after a short frame the next one is expected to be short, too,
//! and only as many are given for it as that takes; what is left of one that is not so short comes by way of the host's memory.

use std::collections::VecDeque;
use std::io::ErrorKind;

use libc::iovec;
use vm_memory::VolatileSlice;

use super::port::Port;
use super::tap::{Offloads, Tap, Vectors};
use super::{HEADER, LONGEST_FRAME};
use crate::memory::GuestRam;
use crate::virtio::{Broken, Ring};

/// Where the header says in how many buffers its frame is (section 5.1.6).
const NUM_BUFFERS: usize = 10;

/// An Ethernet header with two VLAN tags.
const LONGEST_ETHERNET_HEADER: usize = 22;

/// Pieces of guest memory in one read: all that the system takes, but for the header's place and the spill's.
const MAX_PIECES: usize = libc::UIO_MAXIOV as usize - 2;

/// Behind the longest frame: one that reaches into it did not fit.
const SPILL: usize = 16;

/// A frame of up to so many bytes, with its header, is a short one: most that are no part of a stream's data are.
const SHORT: usize = 2048;

/// How the receiving has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// The tap has no more. It tells when it has.
    All,
    /// The guest has no more buffers. It notifies when it has.
    Starved,
    /// There may be more, and room.
    Part,
}

/// The receive queue of a pair.
#[derive(Debug)]
pub struct Receiver {
    ring: Ring,
    mergeable: bool,
    /// The longest frame with its header, in bytes.
    longest: usize,
    room: Room,
    /// The last frame was a short one.
    short: bool,
    /// The host's memory for the longest frame, and the length of the frame with its header that waits in it for buffers; 0 if
    /// there is none.
    bounce: Vec<u8>,
    held: usize,
    /// What a frame has used, and the pieces of memory that it is read into; here only to be allocated once.
    used: Vec<(u16, u32)>,
    vectors: Vectors,
}

impl Receiver {
    /// Serves the ring of a driver that has agreed to these offloads.
    pub fn new(ring: Ring, mergeable: bool, offloads: Offloads, mtu: u16) -> Self {
        let frame = if offloads.has_segmentation() {
            LONGEST_FRAME
        } else {
            usize::from(mtu) + LONGEST_ETHERNET_HEADER
        };
        let longest = HEADER + frame;
        Self {
            ring,
            mergeable,
            longest,
            room: Room::default(),
            short: true,
            // Of which the kernel gives only those pages that are written to.
            bounce: vec![0; longest + SPILL],
            held: 0,
            used: Vec::new(),
            vectors: Vectors::default(),
        }
    }

    /// The ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Moves up to `limit` frames from the tap to the guest.
    pub fn run(
        &mut self,
        ram: &GuestRam,
        tap: &Tap,
        port: &Port,
        limit: usize,
    ) -> Result<Received, Broken> {
        self.ring.disable_kicks(ram)?;
        let mut taken = 0;
        let received = loop {
            if taken == limit {
                break Received::Part;
            }
            match self.step(ram, tap, port)? {
                Received::Part => taken += 1,
                Received::All => break Received::All,
                Received::Starved if self.ring.enable_kicks(ram)? => {}
                Received::Starved => break Received::Starved,
            }
        };
        if taken > 0 {
            self.ring.signal(ram)?;
        }
        Ok(received)
    }

    /// Moves one frame. [`Received::Part`] when it has left the tap for good.
    fn step(&mut self, ram: &GuestRam, tap: &Tap, port: &Port) -> Result<Received, Broken> {
        if !port.is_up() {
            return Ok(self.discard(tap, port));
        }
        if self.held == 0 {
            if !self.mergeable {
                self.fill(ram, 1, 1)?;
            } else {
                self.fill(ram, self.longest, MAX_PIECES)?;
            }
            if self.room.chains.is_empty() {
                return Ok(Received::Starved);
            }
            let fits = !self.mergeable || self.room.length >= self.longest;
            if fits && self.room.pieces.len() <= MAX_PIECES {
                return self.read(ram, tap, port);
            }
            let vector = iovec {
                iov_base: self.bounce.as_mut_ptr().cast(),
                iov_len: self.bounce.len(),
            };
            match tap.read(&[vector]) {
                Ok(length) if (HEADER..=self.longest).contains(&length) => self.held = length,
                other => return Ok(lost(other, port)),
            }
        }
        self.deliver_held(ram, port)
    }

    /// Reads a frame straight into the guest's buffers, the end of an unexpectedly long one by way of the host's memory.
    fn read(&mut self, ram: &GuestRam, tap: &Tap, port: &Port) -> Result<Received, Broken> {
        let mut header = [0; HEADER];
        let Vectors(vectors) = &mut self.vectors;
        vectors.clear();
        vectors.push(iovec {
            iov_base: header.as_mut_ptr().cast(),
            iov_len: HEADER,
        });
        let room = self.room.length;
        let limit = if self.short { SHORT } else { room };
        let direct = self.room.append_frame(limit, vectors);
        let rest = (room - direct).min(self.longest) + SPILL;
        vectors.push(iovec {
            iov_base: self.bounce.as_mut_ptr().cast(),
            iov_len: rest.min(self.bounce.len()),
        });
        match tap.read(vectors) {
            Ok(length) if (HEADER..=room).contains(&length) => {
                self.short = length <= SHORT;
                if let Some(rest) = length.checked_sub(direct) {
                    self.room.write(direct, &self.bounce[..rest]);
                }
                self.give(ram, header, length)?;
                Ok(Received::Part)
            }
            other => Ok(lost(other, port)),
        }
    }

    /// Copies the held frame into the guest's buffers, if there are enough of them.
    fn deliver_held(&mut self, ram: &GuestRam, port: &Port) -> Result<Received, Broken> {
        let length = self.held;
        self.fill(ram, length, usize::MAX)?;
        if self.room.length >= length {
            let mut header = [0; HEADER];
            header.copy_from_slice(&self.bounce[..HEADER]);
            self.room.write(HEADER, &self.bounce[HEADER..length]);
            self.held = 0;
            self.give(ram, header, length)?;
            return Ok(Received::Part);
        }
        if self.room.pieces.len() >= usize::from(self.ring.size()) {
            // The driver has no descriptor left to give more room with.
            self.held = 0;
            port.count(|dropped| &dropped.oversized);
            return Ok(Received::Part);
        }
        Ok(Received::Starved)
    }

    /// Hands the first `length` bytes of the room to the driver, with the header before them.
    fn give(
        &mut self,
        ram: &GuestRam,
        mut header: [u8; HEADER],
        length: usize,
    ) -> Result<(), Broken> {
        let count = self.room.chains_for(length) as u16;
        header[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
        self.room.write(0, &header);
        self.used.clear();
        self.room.take(length, &mut self.used);
        self.ring.push_all(ram, &self.used)
    }

    /// The link is down: what comes is for nobody.
    fn discard(&mut self, tap: &Tap, port: &Port) -> Received {
        self.held = 0;
        let mut byte = [0u8; 1];
        let vector = iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: 1,
        };
        match tap.read(&[vector]) {
            Ok(_) => {
                port.count(|dropped| &dropped.unlinked);
                Received::Part
            }
            Err(_) => Received::All,
        }
    }

    /// Takes buffers from the ring until there is room for `length` bytes in at most `pieces` pieces, or no more buffer.
    fn fill(&mut self, ram: &GuestRam, length: usize, pieces: usize) -> Result<(), Broken> {
        while self.room.length < length && self.room.pieces.len() < pieces {
            let Some(chain) = self.ring.pop(ram)? else {
                return Ok(());
            };
            if chain.writable.len() < HEADER {
                return Err(Broken::Short {
                    head: chain.head,
                    missing: "a header",
                });
            }
            self.room.push(
                chain.head,
                chain.writable.len(),
                chain.writable.into_slices(),
            );
        }
        Ok(())
    }
}

/// A read that has brought nothing that the guest could have: nothing to read, or too much.
fn lost(read: std::io::Result<usize>, port: &Port) -> Received {
    match read {
        Ok(_) => {
            port.count(|dropped| &dropped.oversized);
            Received::Part
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Received::All,
        // The tap is gone or down; should it come back, it tells.
        Err(_) => Received::All,
    }
}

/// The guest's buffers that nothing has been written to yet, in the order in which they must be used.
#[derive(Debug, Default)]
struct Room {
    chains: VecDeque<Buffer>,
    /// The memory of all of them.
    pieces: VecDeque<Piece>,
    /// How many bytes that is.
    length: usize,
}

/// One chain of descriptors.
#[derive(Debug)]
struct Buffer {
    head: u16,
    length: usize,
    pieces: usize,
}

/// A piece of guest memory.
#[derive(Debug)]
struct Piece {
    start: *mut u8,
    length: usize,
}

// SAFETY: guest memory is mapped for as long as the process lives (see `crate::memory::create`), and every thread may write it.
unsafe impl Send for Piece {}

impl Piece {
    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: the piece was a checked slice of guest memory, which is never unmapped.
        unsafe { VolatileSlice::new(self.start, self.length) }
    }
}

impl Room {
    fn push<'m>(
        &mut self,
        head: u16,
        length: usize,
        slices: impl Iterator<Item = VolatileSlice<'m>>,
    ) {
        let before = self.pieces.len();
        self.pieces.extend(slices.map(|slice| Piece {
            start: slice.ptr_guard_mut().as_ptr(),
            length: slice.len(),
        }));
        self.chains.push_back(Buffer {
            head,
            length,
            pieces: self.pieces.len() - before,
        });
        self.length += length;
    }

    /// The memory for a frame, behind the header's place: as many pieces as `limit` bytes take with the header, or all. Returns how
    /// many bytes they are, the header's included.
    fn append_frame(&self, limit: usize, vectors: &mut Vec<iovec>) -> usize {
        let mut length = 0;
        for piece in &self.pieces {
            if length >= limit.max(HEADER) {
                break;
            }
            let skipped = HEADER.saturating_sub(length).min(piece.length);
            length += piece.length;
            if piece.length > skipped {
                vectors.push(iovec {
                    iov_base: piece.start.wrapping_add(skipped).cast(),
                    iov_len: piece.length - skipped,
                });
            }
        }
        length
    }

    /// Copies `data` to an offset; there must be room for it.
    fn write(&self, mut offset: usize, mut data: &[u8]) {
        for piece in &self.pieces {
            if data.is_empty() {
                break;
            }
            match piece.slice().offset(offset) {
                Ok(rest) => {
                    let (now, later) = data.split_at(data.len().min(rest.len()));
                    rest.copy_from(now);
                    data = later;
                    offset = 0;
                }
                Err(_) => offset -= piece.length,
            }
        }
    }

    /// How many chains the first `length` bytes are in.
    fn chains_for(&self, length: usize) -> usize {
        let mut before = 0;
        self.chains
            .iter()
            .take_while(|chain| {
                let begins = before < length;
                before += chain.length;
                begins
            })
            .count()
    }

    /// Takes the chains away that the first `length` bytes are in, and appends them with how much of each that is.
    fn take(&mut self, mut length: usize, used: &mut Vec<(u16, u32)>) {
        while length > 0 {
            let Some(chain) = self.chains.pop_front() else {
                return;
            };
            let written = chain.length.min(length);
            length -= written;
            self.length -= chain.length;
            self.pieces.drain(..chain.pieces);
            used.push((chain.head, written as u32));
        }
    }
}
