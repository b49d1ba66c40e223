//! From what containerd hands over as a container's root file system to disks and the guest's mounts.

pub mod cache;
pub mod composite;
pub mod erofs;
pub mod layer;
pub mod scratch;
mod sparse;
pub mod tree;

#[cfg(test)]
mod testing;

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// What can go wrong with a container's files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that containerd named is not there.
    #[error("{0} does not exist, or is no directory: the snapshot that containerd named is gone")]
    Missing(PathBuf),
    /// There is no space left on the host.
    #[error(
        "no space left in {directory} to {operation}: free some there, or set {setting} to a directory on a larger file system"
    )]
    Full {
        operation: String,
        directory: PathBuf,
        /// The configuration's name for the directory.
        setting: &'static str,
    },
    /// There is little space left on the host.
    #[error(
        "only {free_mib} MiB are free in {directory}, but a scratch disk needs {needed_mib} MiB: free some there, or set scratch_dir to a directory on a larger file system"
    )]
    NearlyFull {
        directory: PathBuf,
        free_mib: u64,
        needed_mib: u64,
    },
    /// A program of the host did not do its work.
    #[error("{tool} failed: {problem}; is the package e2fsprogs installed?")]
    Tool { tool: &'static str, problem: String },
    /// Others than root could put images of their own into the cache.
    #[error("{0} must belong to root, and no one else may write to it: correct its owner and mode")]
    Writable(PathBuf),
    /// A container has more layers than a disk can hold.
    #[error(
        "the container's layers need a disk of {extents} parts, but there can be {most}: squash some layers of its image"
    )]
    TooManyLayers { extents: usize, most: usize },
    /// A layer's files could not be read.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// A layer's image could not be built.
    #[error("build an image of {layer}: {source}")]
    Image {
        layer: PathBuf,
        source: erofs::Error,
    },
    /// The system refused.
    #[error("{operation} {path}: {source}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// Makes an [`Error::Io`] of a system call's failure.
fn failed<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl Fn(E) -> Error {
    move |error| Error::Io {
        operation,
        path: path.into(),
        source: error.into(),
    }
}

/// Makes an [`Error::Full`].
fn full(operation: impl Into<String>, directory: &Path, setting: &'static str) -> Error {
    Error::Full {
        operation: operation.into(),
        directory: directory.into(),
        setting,
    }
}

/// Whether a failure means that a file system or a quota is full.
fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}
