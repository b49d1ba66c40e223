//! The agent of a Bulkhead guest, and the protocol between it and the shim.
//!
//! The shim uses [`protocol`] and [`netlink`] only. The rest is the agent, a library so that tests can run it elsewhere than as PID 1 of a guest.

pub mod agent;
pub mod cgroup;
pub mod child;
pub mod container;
pub mod disk;
pub mod error;
pub mod init;
pub mod netlink;
pub mod network;
pub mod oci;
pub mod oom;
pub mod plan;
pub mod process;
pub mod programs;
pub mod protocol;
pub mod reaper;
pub mod relay;
pub mod sandbox;
pub mod scratch;
pub mod serve;
pub mod socket;
mod spawn;
pub mod stdio;
pub mod streams;
pub mod sys;
pub mod task;
