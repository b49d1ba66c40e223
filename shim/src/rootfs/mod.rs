//! From what containerd hands over as a container's root file system to disks and the guest's mounts.
//!
//! Nothing of the host's file system is served to a guest: read-only layers become EROFS images ([`layer`], [`erofs`]), which are
//! kept ([`cache`]) and joined to one disk ([`composite`]); what is a block device or an image already is attached as it is
//! ([`block`]); what containers bind of the host's files is copied ([`binds`]); what they write goes to a disk of their pod ([`scratch`]).

pub mod binds;
pub mod block;
pub mod cache;
pub mod composite;
pub mod erofs;
pub mod layer;
pub mod plan;
pub mod scratch;
mod sparse;
pub mod tree;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use bulkhead_agent::protocol::{BINDS, disk_source};
use containerd_shim_protos::api::Mount;
use tokio::task::JoinSet;
use ttrpc::Code;

use crate::config::Config;
use crate::disk::DiskFiles;
use binds::Binds;
use cache::Cache;
use layer::Layer;
use plan::Plan;

/// The longest identification of a disk (virtio 1.2, section 5.2.6.1).
const MAX_ID: usize = 20;

/// A container's root file system, ready to be attached.
#[derive(Debug)]
pub struct Rootfs {
    disks: Vec<DiskFiles>,
    mounts: Mounts,
}

impl Rootfs {
    /// The disks to attach, and what the guest shall do with them.
    pub fn into_parts(self) -> (Vec<DiskFiles>, Mounts) {
        (self.disks, self.mounts)
    }
}

/// The mounts that make the root file system in the guest, as the agent's protocol describes them.
#[derive(Debug, PartialEq, Eq)]
pub struct Mounts(Vec<Template>);

/// A mount whose disk has no place on the guest's bus yet.
#[derive(Debug, PartialEq, Eq)]
struct Template {
    kind: String,
    source: Source,
    /// Where it is mounted, if it is no part of the root.
    target: &'static str,
    options: Vec<String>,
}

/// Disks are counted from 0, partitions from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    None,
    Disk(usize),
    Partition(usize, u32),
}

impl Mounts {
    /// The mounts, once the disks are in these PCI slots.
    ///
    /// # Panics
    ///
    /// If there are fewer slots than disks.
    pub fn at(&self, slots: &[u8]) -> Vec<Mount> {
        let source = |source| match source {
            Source::None => "overlay".into(),
            Source::Disk(disk) => disk_source(slots[disk], None),
            Source::Partition(disk, number) => disk_source(slots[disk], Some(number)),
        };
        let mount = |template: &Template| Mount {
            type_: template.kind.clone(),
            source: source(template.source),
            target: template.target.into(),
            options: template.options.clone(),
            ..Default::default()
        };
        self.0.iter().map(mount).collect()
    }
}

/// Prepares the root file system that a `CreateTaskRequest` describes, and what its specification binds, for the container `id`.
///
/// Images of layers are built if the host does not have them yet, which takes about as long as copying the layers.
pub async fn prepare(
    config: &Config,
    id: &str,
    mounts: Vec<Mount>,
    binds: Binds,
) -> Result<Rootfs, Error> {
    let disk_id: String = id.chars().take(MAX_ID).collect();
    let cache = || Cache::new(&config.cache_dir, config.cache_size_mib);
    let bound = match binds.have_directories() {
        // A tree takes a while.
        true => cache()?.run(move |_| Ok(binds.image()?)).await?,
        false => binds.image()?,
    };
    let mut disks = Vec::new();
    let mut mounts = match Plan::of(&mounts)? {
        Plan::Layers { layers, overlay } => {
            let mut images = images(&cache()?, id, layers).await?;
            let layers = images.len();
            images.extend(bound);
            let source = |number| match images.len() {
                1 => Source::Disk(0),
                _ => Source::Partition(0, number as u32),
            };
            let erofs = |number| Template {
                kind: "erofs".into(),
                source: source(number),
                target: if number > layers { BINDS } else { "" },
                options: vec!["ro".into()],
            };
            let mut mounts: Vec<_> = (1..=layers).map(erofs).collect();
            mounts.extend(overlay.map(|options| Template {
                kind: "overlay".into(),
                source: Source::None,
                target: "",
                options,
            }));
            mounts.extend((layers + 1..=images.len()).map(erofs));
            if !images.is_empty() {
                disks.push(composite::disk(&disk_id, images)?);
            }
            return Ok(Rootfs {
                disks,
                mounts: Mounts(mounts),
            });
        }
        Plan::Disk {
            kind,
            path,
            read_only,
            options,
        } => {
            disks.push(block::disk(&disk_id, &path, read_only)?);
            vec![Template {
                kind,
                source: Source::Disk(0),
                target: "",
                options,
            }]
        }
    };
    if let Some(image) = bound {
        mounts.push(Template {
            kind: "erofs".into(),
            source: Source::Disk(disks.len()),
            target: BINDS,
            options: vec!["ro".into()],
        });
        disks.push(composite::disk("binds", vec![image])?);
    }
    Ok(Rootfs {
        disks,
        mounts: Mounts(mounts),
    })
}

/// Makes the disk of a pod for what its containers write.
pub async fn scratch(config: &Config) -> Result<DiskFiles, Error> {
    let cache = Cache::new(&config.cache_dir, config.cache_size_mib)?;
    scratch::disk(&cache, &config.scratch_dir, config.scratch_size_mib).await
}

/// The images of layers, those that are missing built at the same time.
async fn images(cache: &Cache, id: &str, layers: Vec<plan::Layer>) -> Result<Vec<File>, Error> {
    let mut images = Vec::with_capacity(layers.len());
    let mut missing = Vec::new();
    for layer in layers {
        let ready = match &layer {
            plan::Layer::Upper(path) if is_empty(path)? => continue,
            plan::Layer::Upper(_) => None,
            plan::Layer::Lower(path) => layer::mounted_image(path)?,
            plan::Layer::Image(path) => Some(path.clone()),
        };
        if let Some(path) = ready {
            let (image, length) = block::open(&path, true)?;
            images.push(Some(whole(image, length, || path)?));
            continue;
        }
        let immutable = !matches!(layer, plan::Layer::Upper(_));
        let layer = Layer::open(layer.path(), immutable)?;
        let image = cache.find(&layer)?;
        if image.is_none() {
            missing.push((images.len(), layer));
        }
        images.push(image);
    }
    if !missing.is_empty() {
        log::info!(
            "container {id}: building images of {} of {} layers",
            missing.len(),
            images.len()
        );
    }
    let mut builds = JoinSet::new();
    for (index, layer) in missing {
        let cache = cache.clone();
        builds.spawn(async move { (index, cache.build(layer).await) });
    }
    while let Some(built) = builds.join_next().await {
        let (index, image) = built
            .map_err(|error| failed("build an image in", cache.path())(io::Error::other(error)))?;
        images[index] = Some(image?);
    }
    Ok(images.into_iter().flatten().collect())
}

/// Refuses an image that has lost its end: its files would be there, and fail when they are read.
fn whole(image: File, length: u64, path: impl FnOnce() -> PathBuf) -> Result<File, Error> {
    match erofs::length(&image) {
        Ok(Some(needed)) if needed <= length => Ok(image),
        Ok(needed) => Err(Error::Damaged {
            path: path(),
            length,
            needed: needed.unwrap_or(erofs::BLOCK),
        }),
        Err(error) => Err(failed("read the superblock of", &path())(error)),
    }
}

fn is_empty(directory: &Path) -> Result<bool, Error> {
    let mut entries = fs::read_dir(directory).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => Error::Missing(directory.into()),
        _ => failed("list", directory)(error),
    })?;
    Ok(entries.next().is_none())
}

/// What can go wrong with a container's files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that containerd named is not there.
    #[error("{0} does not exist, or is no directory: the snapshot that containerd named is gone")]
    Missing(PathBuf),
    /// Something other than the machine uses a disk.
    #[error("{0} is in use: it is mounted on the host, or another machine has it")]
    InUse(PathBuf),
    /// What should be a disk is none.
    #[error("{0} is neither a block device nor a file")]
    NoDisk(PathBuf),
    /// A disk has a length that no disk can have.
    #[error("{path} has {length} bytes: a disk has a multiple of 512, and at least that")]
    Length { path: PathBuf, length: u64 },
    /// An image has lost its end, or never was one.
    #[error(
        "{path} is damaged: it has {length} bytes, but must have {needed}; remove it, so that it is made again"
    )]
    Damaged {
        path: PathBuf,
        length: u64,
        needed: u64,
    },
    /// The mounts are not known.
    #[error(transparent)]
    Plan(#[from] plan::Error),
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
    /// A file of the host cannot be bound.
    #[error(transparent)]
    Bind(#[from] binds::Error),
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

impl Error {
    /// The gRPC code by which clients tell errors apart.
    pub fn code(&self) -> Code {
        match self {
            Self::Missing(_) => Code::NOT_FOUND,
            Self::InUse(_) | Self::Writable(_) | Self::Tool { .. } => Code::FAILED_PRECONDITION,
            Self::NoDisk(_) | Self::Length { .. } | Self::TooManyLayers { .. } => {
                Code::INVALID_ARGUMENT
            }
            Self::Plan(plan::Error::Invalid { .. }) => Code::INVALID_ARGUMENT,
            Self::Plan(plan::Error::Unsupported(_) | plan::Error::Option { .. }) => {
                Code::UNIMPLEMENTED
            }
            Self::Damaged { .. } => Code::DATA_LOSS,
            Self::Full { .. } | Self::NearlyFull { .. } => Code::RESOURCE_EXHAUSTED,
            Self::Bind(error) => error.code(),
            Self::Tree(
                tree::Error::MountPoint(_)
                | tree::Error::Xattr { .. }
                | tree::Error::Special(_)
                | tree::Error::TooLarge,
            ) => Code::UNIMPLEMENTED,
            Self::Tree(tree::Error::Io { .. }) | Self::Image { .. } | Self::Io { .. } => {
                Code::INTERNAL
            }
        }
    }
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
