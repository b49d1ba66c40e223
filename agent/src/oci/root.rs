//! A container's root file system, and the host's files that it binds, as the shim describes them in `CreateTaskRequest.rootfs`.

use std::path::PathBuf;

use containerd_shim_protos::types::mount::Mount as Entry;
use rustix::mount::MountFlags;

use super::mapping::Mappings;
use super::mount::Options;
use crate::error::Error;
use crate::protocol::parse_disk_source;

/// What a root is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// One file system, mounted as it is.
    Plain(Layer),
    /// Several layers, the topmost first, joined by overlayfs, with a writable directory above them unless it is read-only.
    Overlay {
        layers: Vec<Layer>,
        options: Options,
    },
    /// An empty, writable directory.
    Empty,
}

/// A file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub source: Source,
    pub options: Options,
    /// How the identities of its files appear, if not as they are; the same for all layers of a root. What is written above them is
    /// written as it appears.
    pub mappings: Option<Mappings>,
}

/// Where a layer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A disk on PCI bus 0, or a partition of it, with the type of its file system.
    Disk {
        slot: u8,
        partition: Option<u32>,
        kind: String,
    },
    /// A directory of the guest.
    Directory(PathBuf),
}

/// A file system in which sources of the container's binds lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binds {
    /// Where it is mounted.
    pub place: PathBuf,
    pub layer: Layer,
}

impl Binds {
    /// Takes it out of the list of mounts, if it is there.
    pub fn take(entries: &mut Vec<Entry>) -> Result<Option<Self>, Error> {
        let Some(index) = entries.iter().position(|entry| !entry.target.is_empty()) else {
            return Ok(None);
        };
        let entry = entries.remove(index);
        let place = PathBuf::from(&entry.target);
        if !place.has_root() || entries.iter().any(|entry| !entry.target.is_empty()) {
            return Err(Error::InvalidArgument(format!(
                "rootfs: the target {:?}: expected one at most, and an absolute path",
                entry.target
            )));
        }
        let layer = layer(&entry, None)?;
        Ok(Some(Self { place, layer }))
    }
}

impl Root {
    /// How the identities of its files appear, if not as they are.
    pub fn mappings(&self) -> Option<&Mappings> {
        match self {
            Self::Plain(layer) => layer.mappings.as_ref(),
            Self::Overlay { layers, .. } => layers.first()?.mappings.as_ref(),
            Self::Empty => None,
        }
    }

    /// The PCI device number of the disk that it is on, if it is on one.
    pub fn disk(&self) -> Option<u8> {
        let layer = match self {
            Self::Plain(layer) => layer,
            Self::Overlay { layers, .. } => layers.first()?,
            Self::Empty => return None,
        };
        match layer.source {
            Source::Disk { slot, .. } => Some(slot),
            Source::Directory(_) => None,
        }
    }

    /// Whether it needs a directory of its own on the scratch disk.
    pub fn is_writable(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Overlay { options, .. } => !options.flags.contains(MountFlags::RDONLY),
            Self::Empty => true,
        }
    }
}

impl TryFrom<&[Entry]> for Root {
    type Error = Error;

    fn try_from(entries: &[Entry]) -> Result<Self, Error> {
        match entries {
            [] => Err(Error::InvalidArgument(
                "rootfs is empty: a container needs a root file system".into(),
            )),
            [layers @ .., last] if last.type_ == "overlay" => {
                let mut options = options(last)?;
                let mappings = Mappings::from_options(&mut options.data);
                let mappings = mappings
                    .map_err(|option| super::refused(&format!("rootfs: option {option}")))?;
                let layer = |entry| layer(entry, mappings.clone());
                let layers: Vec<_> = layers.iter().map(layer).collect::<Result<_, _>>()?;
                let read_only = options.flags.contains(MountFlags::RDONLY);
                match <[Layer; 1]>::try_from(layers) {
                    // Overlayfs cannot have a single layer and nothing above it, and nothing is gained by it.
                    Ok([layer]) if read_only => Ok(Self::Plain(layer)),
                    Ok(layers) => Ok(Self::Overlay {
                        layers: layers.into(),
                        options,
                    }),
                    Err(layers) if layers.is_empty() && read_only => Err(Error::InvalidArgument(
                        "rootfs: a read-only overlay needs a layer".into(),
                    )),
                    Err(layers) if layers.is_empty() => Ok(Self::Empty),
                    Err(layers) => Ok(Self::Overlay { layers, options }),
                }
            }
            [one] => Ok(Self::Plain(layer(one, None)?)),
            [.., last] => Err(Error::InvalidArgument(format!(
                "rootfs: of several mounts the last must be of type overlay, not {:?}",
                last.type_
            ))),
        }
    }
}

fn options(entry: &Entry) -> Result<Options, Error> {
    Options::parse(entry.options.iter().map(String::as_str))
        .map_err(|option| super::refused(&format!("rootfs: option {option}")))
}

fn layer(entry: &Entry, mappings: Option<Mappings>) -> Result<Layer, Error> {
    let source = match entry.type_.as_str() {
        "erofs" | "ext4" | "xfs" => match parse_disk_source(&entry.source) {
            Some((slot, partition)) => Source::Disk {
                slot,
                partition,
                kind: entry.type_.clone(),
            },
            None => {
                return Err(Error::InvalidArgument(format!(
                    "rootfs: the source {:?} is no disk: expected pci:SLOT or pci:SLOT/PARTITION",
                    entry.source
                )));
            }
        },
        "bind" if entry.source.starts_with('/') => Source::Directory(entry.source.clone().into()),
        other => {
            return Err(Error::InvalidArgument(format!(
                "rootfs: a mount of type {other:?} from {:?}: expected erofs, ext4 or xfs on a disk",
                entry.source
            )));
        }
    };
    Ok(Layer {
        source,
        options: options(entry)?,
        mappings,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(entries: &[(&str, &str, &[&str])]) -> Result<Root, Error> {
        let entries: Vec<Entry> = entries
            .iter()
            .map(|&(kind, source, options)| Entry {
                type_: kind.into(),
                source: source.into(),
                options: options.iter().map(|&option| option.into()).collect(),
                ..Default::default()
            })
            .collect();
        Root::try_from(entries.as_slice())
    }

    #[test]
    fn the_shapes_of_a_root() {
        let layer = ("erofs", "pci:4/1", ["ro"].as_slice());
        let over = ("overlay", "", [].as_slice());
        let read_only = ("overlay", "", ["ro"].as_slice());
        assert!(matches!(root(&[layer]), Ok(Root::Plain(_))));
        assert!(matches!(root(&[layer, read_only]), Ok(Root::Plain(_))));
        assert!(matches!(root(&[over]), Ok(Root::Empty)));
        for entries in [[layer, layer, over].as_slice(), &[layer, over]] {
            let parsed = root(entries).unwrap();
            assert!(parsed.is_writable());
            assert!(
                matches!(parsed, Root::Overlay { layers, .. } if layers.len() == entries.len() - 1)
            );
        }
        assert!(!root(&[layer, layer, read_only]).unwrap().is_writable());
    }

    #[test]
    fn what_is_bound_is_no_part_of_the_root() {
        let entry = |target: &str| Entry {
            type_: "erofs".into(),
            source: "pci:4/2".into(),
            target: target.into(),
            ..Default::default()
        };
        let mut entries = vec![entry(""), entry("/run/binds")];
        let binds = Binds::take(&mut entries).unwrap().unwrap();
        assert_eq!(binds.place, PathBuf::from("/run/binds"));
        assert_eq!(entries, [entry("")]);
        assert_eq!(Binds::take(&mut entries), Ok(None));
        for bad in [vec![entry("relative")], vec![entry("/a"), entry("/b")]] {
            assert!(Binds::take(&mut bad.clone()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_no_root_is_refused() {
        let layer = ("erofs", "pci:4", [].as_slice());
        let with = |kind, source| vec![(kind, source, [].as_slice())];
        for bad in [
            vec![],
            vec![("overlay", "", ["ro"].as_slice())],
            vec![layer, layer],
            with("erofs", "/dev/vda"),
            with("nfs", "pci:4"),
            with("bind", "relative"),
        ] {
            assert!(
                matches!(root(&bad), Err(Error::InvalidArgument(_))),
                "{bad:?}"
            );
        }
    }
}
