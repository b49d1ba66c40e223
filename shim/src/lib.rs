//! The containerd shim of Bulkhead, as a library for its two binaries.

pub mod affinity;
pub mod annotations;
pub mod args;
pub mod backing;
pub mod bootstrap;
pub mod cgroup;
pub mod check;
pub mod config;
pub mod console;
pub mod container;
pub mod delete;
pub mod disk;
pub mod error;
pub mod events;
pub mod hooks;
pub mod info;
pub mod logger;
pub mod logging;
pub mod machine;
pub mod network;
pub mod options;
pub mod process;
pub mod readiness;
pub mod rootfs;
pub mod sandbox;
pub mod serve;
pub mod sizing;
pub mod spec;
pub mod stand_in;
pub mod state;
pub mod streams;
pub mod task;
#[cfg(test)]
mod testing;
