//! The protocol between the shim and the agent in the guest. The agent itself is the binary of this crate.

pub mod protocol;
