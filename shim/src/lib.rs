//! The containerd shim of Bulkhead, as a library for its two binaries.

pub mod disk;
