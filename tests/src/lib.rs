//! The test node, the images, and what the end-to-end tests and benchmarks share.

pub mod bench;
pub mod bundle;
pub mod cache;
pub mod cni;
pub mod ctr;
pub mod debian;
pub mod demo;
pub mod error;
pub mod images;
pub mod layer;
pub mod leftovers;
pub mod node;
pub mod occasion;
pub mod oci;
pub mod payload;
pub mod peer;
pub mod place;
pub mod process;
pub mod scratch;
pub mod site;
pub mod step;
pub mod terminal;
