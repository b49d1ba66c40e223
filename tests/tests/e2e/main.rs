//! What users see of Bulkhead: containers on a node, through containerd. `make test` runs these tests where they can run.
//!
//! Each test begins with a [`World`](bulkhead_tests::ctr::World) and ends with its `finish`, which fails if anything is left
//! behind.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod binds;
mod confinement;
mod exec;
mod failures;
mod files;
mod kernels;
mod machines;
mod network;
mod oci;
mod pods;
mod recovery;
mod run;
mod streams;
mod task_api;
