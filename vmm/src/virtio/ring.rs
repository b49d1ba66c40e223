//! A split virtqueue (section 2.7) with every descriptor chain checked before a device sees it.
//!
//! virtio-queue walks the available ring. What it leaves to its user is here: the used ring, and the checks. A chain that ends
//! where it should not is an error (virtio-queue just ends it), and all of a chain's buffers are looked up in guest memory as
//! whole ranges, once, so that no device ever holds an address of the guest's.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::Interrupt;
use crate::memory::GuestRam;

/// Offsets in the used ring (section 2.7.8): its index, its elements and their length.
const USED_INDEX: u64 = 2;
const USED_ELEMENTS: u64 = 4;
const USED_ELEMENT: u64 = 8;
/// Offsets in the available ring (section 2.7.6): its flags and its elements, behind which is the event index.
const AVAIL_FLAGS: u64 = 0;
const AVAIL_RING: u64 = 4;

/// How a driver broke a ring. The device that finds it stops serving the ring and asks for a reset.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The ring itself is unusable.
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain does not end with a descriptor that ends it: it loops, leaves the table, or its table cannot be read.
    #[error("descriptor chain {0} has no end")]
    Endless(u16),
    /// Longer than the queue, which section 2.7.5.3.1 forbids.
    #[error("descriptor chain {0} is longer than its queue")]
    Long(u16),
    /// Section 2.7.4.2: what the device writes comes after what it reads.
    #[error("descriptor chain {0} has a readable descriptor after a writable one")]
    Order(u16),
    /// Not in guest memory as a whole.
    #[error("descriptor chain {head}: {length:#x} bytes at {address:#x} are not in guest memory")]
    Outside {
        /// The chain.
        head: u16,
        /// Where its buffer starts.
        address: u64,
        /// How long its buffer is, in bytes.
        length: u32,
    },
    /// Too short for what the device has to read or write in any case.
    #[error("descriptor chain {head} has no room for {missing}")]
    Short {
        /// The chain.
        head: u16,
        /// What does not fit.
        missing: &'static str,
    },
}

/// A queue that the driver has set up.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    /// How many chains have been pushed (modulo 2^16), and how many of them the driver was signalled for.
    used: Wrapping<u16>,
    signalled: Wrapping<u16>,
    interrupt: Interrupt,
}

/// Where the driver put a ring.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    /// Number of descriptors.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring, which the driver writes.
    pub driver: u64,
    /// The used ring, which the device writes.
    pub device: u64,
}

impl Ring {
    /// Takes a ring over, which must be in guest memory as a whole.
    pub fn new(
        place: &Place,
        event_idx: bool,
        ram: &GuestRam,
        interrupt: Interrupt,
    ) -> Result<Self, Broken> {
        let mut queue = Queue::new(place.size)?;
        queue.try_set_desc_table_address(GuestAddress(place.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(place.driver))?;
        queue.try_set_used_ring_address(GuestAddress(place.device))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if queue.is_valid(ram) {
            Ok(Self {
                queue,
                used: Wrapping(0),
                signalled: Wrapping(0),
                interrupt,
            })
        } else {
            Err(virtio_queue::Error::FindMemoryRegion.into())
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain that the driver has made available.
    pub fn pop<'m>(&mut self, ram: &'m GuestRam) -> Result<Option<Chain<'m>>, Broken> {
        let size = self.queue.size();
        match self.queue.iter(ram)?.next() {
            Some(descriptors) => Chain::collect(descriptors, ram, size).map(Some),
            None => Ok(None),
        }
    }

    /// Puts the `count` chains that were popped last back, as if they had never been popped.
    pub fn unpop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Gives a chain back to the driver, with the number of bytes that were written to it.
    pub fn push(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<(), Broken> {
        self.push_all(ram, &[(head, written)])
    }

    /// Gives chains back to the driver, each with the number of bytes that were written to it. The driver sees all of them
    /// or none, which it must be able to rely on when one packet is in several (and which virtio-queue cannot do).
    pub fn push_all(&mut self, ram: &GuestRam, chains: &[(u16, u32)]) -> Result<(), Broken> {
        let failed = virtio_queue::Error::GuestMemory;
        let ring = GuestAddress(self.queue.used_ring());
        for &(head, written) in chains {
            let index = u64::from(self.used.0 % self.queue.size());
            let element = u64::from(written) << 32 | u64::from(head);
            let place = ring.unchecked_add(USED_ELEMENTS + index * USED_ELEMENT);
            ram.write_obj(element.to_le(), place).map_err(failed)?;
            self.used += 1;
        }
        let index = ring.unchecked_add(USED_INDEX);
        ram.store(self.used.0.to_le(), index, Ordering::Release)
            .map_err(failed)?;
        Ok(())
    }

    /// Interrupts the driver if it wants to hear of the chains pushed since the last call.
    pub fn signal(&mut self, ram: &GuestRam) -> Result<(), Broken> {
        // The index is written before it is read what the driver wants.
        fence(Ordering::SeqCst);
        let area = GuestAddress(self.queue.avail_ring());
        let read = |offset| {
            ram.load(area.unchecked_add(offset), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(virtio_queue::Error::GuestMemory)
        };
        let wanted = if self.queue.event_idx_enabled() {
            // Section 2.7.7.2, for several chains at once: the driver wants to hear of the one with this index.
            let event = Wrapping(read(AVAIL_RING + u64::from(self.queue.size()) * 2)?);
            self.used - event - Wrapping(1) < self.used - self.signalled
        } else {
            read(AVAIL_FLAGS)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        };
        self.signalled = self.used;
        if wanted {
            self.interrupt.trigger();
        }
        Ok(())
    }

    /// Asks the driver not to notify while chains are being popped anyway.
    pub fn disable_kicks(&mut self, ram: &GuestRam) -> Result<(), Broken> {
        Ok(self.queue.disable_notification(ram)?)
    }

    /// Asks the driver to notify. `true` when there are chains already, of which it will not.
    pub fn enable_kicks(&mut self, ram: &GuestRam) -> Result<bool, Broken> {
        Ok(self.queue.enable_notification(ram)?)
    }

    /// The driver broke the ring: nothing more can be done with the device until it has been reset.
    pub fn set_broken(&self) {
        self.interrupt.signals().set_broken();
    }
}

/// A descriptor chain, all of whose buffers are in guest memory.
#[derive(Debug)]
pub struct Chain<'m> {
    /// The index by which the driver knows the chain.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers<'m>,
    /// What the device writes.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    fn collect(
        descriptors: virtio_queue::DescriptorChain<&'m GuestRam>,
        ram: &'m GuestRam,
        limit: u16,
    ) -> Result<Self, Broken> {
        let head = descriptors.head_index();
        let mut chain = Self {
            head,
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let mut count = 0;
        let mut ended = false;
        for descriptor in descriptors {
            count += 1;
            if count > limit {
                return Err(Broken::Long(head));
            }
            ended = !descriptor.has_next();
            let (buffers, access) = if descriptor.is_write_only() {
                (&mut chain.writable, Permissions::Write)
            } else if chain.writable.slices.is_empty() {
                (&mut chain.readable, Permissions::Read)
            } else {
                return Err(Broken::Order(head));
            };
            let outside = |_| Broken::Outside {
                head,
                address: descriptor.addr().0,
                length: descriptor.len(),
            };
            for slice in ram
                .get_slices(descriptor.addr(), descriptor.len() as usize, access)
                .map_err(outside)?
            {
                buffers.push(slice.map_err(outside)?);
            }
        }
        if ended {
            Ok(chain)
        } else {
            Err(Broken::Endless(head))
        }
    }
}

/// A sequence of pieces of guest memory that is consumed from its front.
///
/// The guest may change the content at any time, so that everything is read once.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    /// None of them is empty.
    slices: Vec<VolatileSlice<'m>>,
    /// How many of `slices` have been consumed as a whole.
    first: usize,
    length: usize,
}

impl<'m> Buffers<'m> {
    /// Number of bytes left.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Copies `data.len()` bytes out of the front, or nothing and returns `false` if there are fewer.
    pub fn read(&mut self, mut data: &mut [u8]) -> bool {
        if data.len() > self.length {
            return false;
        }
        while !data.is_empty() {
            let copied = self.slices[self.first].copy_to(data);
            self.advance(copied);
            data = &mut data[copied..];
        }
        true
    }

    /// Copies `data` to the front, or nothing and returns `false` if there is no room for it.
    pub fn write(&mut self, mut data: &[u8]) -> bool {
        if data.len() > self.length {
            return false;
        }
        while !data.is_empty() {
            let slice = &self.slices[self.first];
            let (now, later) = data.split_at(data.len().min(slice.len()));
            slice.copy_from(now);
            self.advance(now.len());
            data = later;
        }
        true
    }

    /// The pieces that are left.
    pub fn into_slices(self) -> impl Iterator<Item = VolatileSlice<'m>> {
        self.slices.into_iter().skip(self.first)
    }

    /// Consumes `count` bytes.
    ///
    /// # Panics
    ///
    /// When there are fewer.
    pub fn advance(&mut self, mut count: usize) {
        self.length -= count;
        while count > 0 {
            let slice = &mut self.slices[self.first];
            match slice.offset(count) {
                Ok(rest) if !rest.is_empty() => {
                    *slice = rest;
                    return;
                }
                _ => {
                    count -= slice.len();
                    self.first += 1;
                }
            }
        }
    }

    /// Takes the last `count` bytes away, or `None` if there are fewer.
    pub fn take_last(&mut self, count: usize) -> Option<Self> {
        let keep = self.length.checked_sub(count)?;
        let mut tail = Self {
            slices: self.slices.clone(),
            first: self.first,
            length: self.length,
        };
        tail.advance(keep);
        self.length = keep;
        Some(tail)
    }

    /// The pieces that the next `limit` bytes consist of, as the system takes them: at most [`libc::UIO_MAXIOV`].
    ///
    /// They stay valid for as long as the guest's memory, whatever is consumed meanwhile.
    pub fn append_to(&self, limit: usize, vectors: &mut Vec<libc::iovec>) {
        let mut left = limit.min(self.length);
        for slice in &self.slices[self.first..] {
            if left == 0 || vectors.len() == libc::UIO_MAXIOV as usize {
                break;
            }
            let length = slice.len().min(left);
            vectors.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: length,
            });
            left -= length;
        }
    }

    fn push(&mut self, slice: VolatileSlice<'m>) {
        if !slice.is_empty() {
            self.length += slice.len();
            self.slices.push(slice);
        }
    }
}
