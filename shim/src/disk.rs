//! A disk as the host knows it: open files, not paths.

use std::os::fd::OwnedFd;

use bulkhead_vmm::control::Extent;

/// The files that make up one virtual disk, ready to be attached to a machine.
#[derive(Debug)]
pub struct DiskFiles {
    /// The identification that the guest reads; at most 20 bytes of ASCII.
    pub id: String,
    /// Whether the device refuses writes.
    pub read_only: bool,
    /// The disk's content: ranges of open files, one after the other.
    pub extents: Vec<(OwnedFd, Extent)>,
}
