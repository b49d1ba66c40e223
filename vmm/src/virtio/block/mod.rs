//! The block device (section 5.2): raw only, so that no byte the guest writes means anything to the host.
//!
//! Each queue has a thread of its own.

mod disk;
mod request;
#[cfg(test)]
mod tests;
mod worker;

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use self::disk::Content;
use self::request::Backend;
use self::worker::Service;
use super::worker::Worker;
use super::{Activation, Device, Queue};
use crate::control::Disk;
use crate::seccomp::ThreadKind;

/// The unit of addresses and lengths in requests, in bytes.
const SECTOR: u64 = 512;

/// Descriptors in a queue.
const QUEUE_SIZE: u16 = 128;
/// Data segments in a request: a chain has a header and a status besides, and may not be longer than the queue.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// The most queues, as many as a machine can have processors.
const MAX_QUEUES: u16 = 32;

/// The most sectors of one range that a request discards or fills with zeroes (1 GiB), and the most ranges in a request.
const RANGE_SECTORS: u32 = 1 << 21;
const MAX_RANGES: u32 = 32;

/// Length of the device identification, padded with zeroes (section 5.2.6.1).
const ID_LENGTH: usize = 20;

/// What is wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No identification, or one that does not fit.
    #[error("disk id {0:?} is not 1 to {ID_LENGTH} characters of printable ASCII")]
    Id(String),
    /// Number of queues.
    #[error("disk {id:?} asks for {queues} queues; it can have 1 to {MAX_QUEUES}")]
    Queues {
        /// The disk.
        id: String,
        /// What was asked for.
        queues: u16,
    },
    /// Extents and descriptors do not belong together.
    #[error(
        "disk {id:?} has {extents} extents, but {files} descriptors came with it; it needs one for each, and at least one"
    )]
    Count {
        /// The disk.
        id: String,
        /// Number of extents.
        extents: usize,
        /// Number of descriptors.
        files: usize,
    },
    /// An extent cannot be used.
    #[error("disk {id:?}, extent {index}: {problem}")]
    Extent {
        /// The disk.
        id: String,
        /// The extent, counted from 0.
        index: usize,
        /// What is wrong with it.
        problem: disk::Problem,
    },
    /// The length.
    #[error("disk {id:?} is {length} bytes long, which is no multiple of {SECTOR}")]
    Length {
        /// The disk.
        id: String,
        /// Its length in bytes.
        length: u64,
    },
    /// The system refused.
    #[error("disk {id:?}, queue {queue}: cannot start its thread: {source}")]
    Thread {
        /// The disk.
        id: String,
        /// The queue.
        queue: u16,
        /// What it said.
        source: io::Error,
    },
}

/// A block device.
#[derive(Debug)]
pub struct Block {
    features: u64,
    config: Vec<u8>,
    queues: Vec<Queue>,
    workers: Vec<Worker<Service>>,
}

impl Block {
    /// A device with the content of `disk`, whose extents are ranges of `files`, in their order. Starts a thread for each
    /// queue.
    ///
    /// # Errors
    ///
    /// What the disk asks for is not possible, a file is shorter than its extent or cannot be used for what is asked, or the
    /// system has no room for the threads.
    pub fn new(disk: &Disk, files: Vec<OwnedFd>) -> Result<Self, Error> {
        let name = || disk.id.clone();
        let printable = disk.id.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        if disk.id.is_empty() || disk.id.len() > ID_LENGTH || !printable {
            return Err(Error::Id(name()));
        }
        if !(1..=MAX_QUEUES).contains(&disk.queues) {
            return Err(Error::Queues {
                id: name(),
                queues: disk.queues,
            });
        }
        if disk.extents.len() != files.len() || files.is_empty() {
            return Err(Error::Count {
                id: name(),
                extents: disk.extents.len(),
                files: files.len(),
            });
        }
        let content =
            Content::new(&disk.extents, files, disk.read_only).map_err(|(index, problem)| {
                Error::Extent {
                    id: name(),
                    index,
                    problem,
                }
            })?;
        if content.length() % SECTOR != 0 {
            return Err(Error::Length {
                id: name(),
                length: content.length(),
            });
        }

        let features = features(disk);
        let config = config(content.length() / SECTOR, disk.queues);
        let mut id = [0; ID_LENGTH];
        id[..disk.id.len()].copy_from_slice(disk.id.as_bytes());
        let backend = Arc::new(Backend { content, id });
        let mut device = Self {
            features,
            config,
            queues: Vec::new(),
            workers: Vec::new(),
        };
        for queue in 0..disk.queues {
            let thread = |source| Error::Thread {
                id: name(),
                queue,
                source,
            };
            // Blocking, because its thread waits by reading it.
            let kick = Arc::new(EventFd::new(EFD_CLOEXEC).map_err(thread)?);
            let serve = {
                let (kick, backend) = (kick.clone(), backend.clone());
                move |mut service: Box<Service>, rest: &_| service.run(rest, &kick, &backend)
            };
            let label = format!("{}:{queue}", disk.id);
            let worker = Worker::start(ThreadKind::Block, label, kick.clone(), serve);
            device.workers.push(worker.map_err(thread)?);
            device.queues.push(Queue {
                size: QUEUE_SIZE,
                kick,
            });
        }
        Ok(device)
    }
}

impl Device for Block {
    fn id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn class(&self) -> u32 {
        0x01_80_00
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn config(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.config)
    }

    fn start(&self, activation: Activation) {
        let Activation {
            ram,
            features,
            rings,
            ..
        } = activation;
        for (worker, ring) in self.workers.iter().zip(rings) {
            if let Some(ring) = ring {
                worker.serve(Service {
                    ram: ram.clone(),
                    ring,
                    features,
                });
            }
        }
    }

    fn stop(&self) {
        for worker in &self.workers {
            worker.ask_to_rest();
        }
        for worker in &self.workers {
            worker.wait_for_rest();
        }
    }
}

/// The features of a disk. What cannot be written cannot be flushed or discarded either.
fn features(disk: &Disk) -> u64 {
    let mut features = 1 << VIRTIO_BLK_F_SEG_MAX;
    if disk.read_only {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        features |=
            1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    }
    if disk.queues > 1 {
        features |= 1 << VIRTIO_BLK_F_MQ;
    }
    features
}

/// `struct virtio_blk_config` (section 5.2.4). Fields without their feature read as zero or as what they would be.
fn config(sectors: u64, queues: u16) -> Vec<u8> {
    let mut config = vec![0; 60];
    let mut set = |offset: usize, bytes: &[u8]| {
        config[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    set(0, &sectors.to_le_bytes()); // capacity
    set(12, &SEG_MAX.to_le_bytes()); // seg_max
    set(34, &queues.to_le_bytes()); // num_queues
    set(36, &RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    set(40, &MAX_RANGES.to_le_bytes()); // max_discard_seg
    set(44, &1u32.to_le_bytes()); // discard_sector_alignment
    set(48, &RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    set(52, &MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
    set(56, &[1]); // write_zeroes_may_unmap
    config
}
