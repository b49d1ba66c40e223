//! From what containerd hands over as a container's root file system to disks and the guest's mounts.

pub mod erofs;
pub mod tree;

#[cfg(test)]
mod testing;
