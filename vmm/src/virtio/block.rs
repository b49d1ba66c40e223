//! virtio-block (section 5.2).

use std::os::fd::OwnedFd;

use super::Device;
use crate::control::Disk;

/// What is wrong with a disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The disk has no extents.
    #[error("disk {id:?} has no extents")]
    Empty {
        /// The disk.
        id: String,
    },
}

/// A block device.
#[derive(Debug)]
pub struct Block {}

impl Block {
    /// A device with the content of `disk`, whose extents are ranges of `files`, in their order. Starts a thread for each
    /// queue.
    pub fn new(disk: &Disk, _files: Vec<OwnedFd>) -> Result<Self, Error> {
        Err(Error::Empty {
            id: disk.id.clone(),
        })
    }
}

impl Device for Block {}
