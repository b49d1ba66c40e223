//! What containerd's list of mounts asks for.
//!
//! The mounts come from the snapshotter (or, for Docker and CRI-O, are one `bind` of a directory that they have mounted
//! themselves). Known are:
//!
//! | mounts | root file system |
//! |---|---|
//! | `overlay` | its lower directories, and above them its upper one if something is in it already |
//! | `bind` of a directory | that directory |
//! | several `erofs` and an `overlay` of them | those images |
//! | one `erofs` | that image, read-only |
//! | one `ext4` or `xfs` | that block device or file, as it is |
//!
//! A container that may write gets a directory of the pod's scratch disk above its layers. Nothing is written to the host's own
//! upper directory, nor to the `mkfs/ext4` file that containerd 2.2's erofs snapshotter would put in its place.
//!
//! What is not known is an error that names it: it could change what the container sees.

use std::mem;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;

/// Options of overlayfs that do in the guest what they do on the host, and the two by which a snapshotter asks for the layers of a
/// container with users of its own to be mapped to them.
const PASSED: [&str; 10] = [
    "gidmap",
    "index",
    "metacopy",
    "nfs_export",
    "redirect_dir",
    "uidmap",
    "userxattr",
    "uuid",
    "volatile",
    "xino",
];

/// Options that mean nothing to a guest: SELinux labels of the host, directories that containerd would make, and what holds anyway.
const IGNORED: [&str; 14] = [
    "X-containerd.mkdir.path",
    "bind",
    "context",
    "defcontext",
    "fscontext",
    "loop",
    "private",
    "rbind",
    "rootcontext",
    "rprivate",
    "rslave",
    "rw",
    "slave",
    "workdir",
];

/// What can be wrong with the mounts.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// They are of a kind that cannot be brought into a machine.
    #[error(
        "a root file system made of {0} cannot be brought into a microVM, only an overlay, a bind of a directory, erofs images with or without an overlay, and ext4 or xfs on a block device or file: use a snapshotter that hands over one of these, such as overlayfs, erofs, devmapper or blockfile"
    )]
    Unsupported(String),
    /// An option could change what the container sees.
    #[error(
        "the option {option:?} of a mount of type {kind} is not supported: configure the snapshotter not to use it"
    )]
    Option { kind: String, option: String },
    /// A part of a mount is missing or makes no sense.
    #[error("a mount of type {kind} has the {field} {value:?}, which is {problem}")]
    Invalid {
        kind: String,
        field: &'static str,
        value: String,
        problem: &'static str,
    },
}

/// What a root file system is made of.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan {
    /// Layers, the topmost first, joined and written to as the options of an overlay say. Without an overlay there is one layer, and
    /// nothing is written.
    Layers {
        layers: Vec<Layer>,
        overlay: Option<Vec<String>>,
    },
    /// A file system on a block device or in a file.
    Disk {
        kind: String,
        path: PathBuf,
        read_only: bool,
        options: Vec<String>,
    },
}

/// Where a layer comes from.
#[derive(Debug, PartialEq, Eq)]
pub enum Layer {
    /// A directory of a snapshot to which nothing is written any more.
    Lower(PathBuf),
    /// A directory that is written to, and is no layer as long as it is empty.
    Upper(PathBuf),
    /// A file with an EROFS file system.
    Image(PathBuf),
}

impl Layer {
    /// The directory or the file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Lower(path) | Self::Upper(path) | Self::Image(path) => path,
        }
    }
}

impl Plan {
    /// Reads the mounts of a `CreateTaskRequest`.
    pub fn of(mounts: &[Mount]) -> Result<Self, Error> {
        let unsupported = || {
            let kinds: Vec<_> = mounts.iter().map(|mount| mount.type_.as_str()).collect();
            Error::Unsupported(match kinds.as_slice() {
                [] => "no mounts".into(),
                kinds => format!("mounts of type {}", kinds.join(", ")),
            })
        };
        if let Some(mount) = mounts.iter().find(|mount| !mount.target.is_empty()) {
            return Err(invalid(mount, "target", &mount.target, "not the root"));
        }
        let (last, before) = mounts.split_last().ok_or_else(unsupported)?;
        // The file for what is written; the scratch disk takes its place.
        let images = match before {
            [first, rest @ ..] if first.type_ == "mkfs/ext4" => rest,
            all => all,
        };
        let first = before.len() - images.len();
        if images.iter().any(|mount| mount.type_ != "erofs") {
            return Err(unsupported());
        }
        let layers: Vec<_> = images.iter().map(image).collect::<Result<_, _>>()?;
        // Containerd 2.2 leaves the preparation of a mount to runtimes that say they can do it.
        let kind = last.type_.trim_start_matches("format/");
        match kind.trim_start_matches("mkdir/") {
            "overlay" => overlay(last, layers, first),
            "bind" => bind(last, layers, first),
            "erofs" if before.is_empty() => Ok(Self::Layers {
                layers: vec![image(last)?],
                overlay: None,
            }),
            "ext4" | "xfs" if before.is_empty() => disk(last),
            _ => Err(unsupported()),
        }
    }
}

/// An overlay of `images`, of which the first has this index in the list of mounts, or of directories.
fn overlay(mount: &Mount, images: Vec<Layer>, first: usize) -> Result<Plan, Error> {
    let mut layers = Vec::new();
    let mut lower = None;
    let mut options = Vec::new();
    let mut read_only = true;
    for option in &mount.options {
        match option.split_once('=').unwrap_or((option, "")) {
            ("lowerdir", value) => lower = Some(value),
            ("upperdir", value) => {
                read_only = false;
                if !value.starts_with("{{") {
                    layers.push(Layer::Upper(absolute(mount, "upperdir", value)?));
                }
            }
            ("ro", _) => read_only = true,
            (key, _) if PASSED.contains(&key) => options.push(option.clone()),
            (key, _) if IGNORED.contains(&key) => (),
            _ => return Err(unknown(mount, option)),
        }
    }
    let lower = lower.unwrap_or_default();
    if images.is_empty() {
        for path in split(lower) {
            layers.push(Layer::Lower(absolute(mount, "lowerdir", &path)?));
        }
    } else if names_images(lower, first, images.len()) {
        layers.extend(images);
    } else {
        let problem = "not all of the erofs mounts before it";
        return Err(invalid(mount, "lowerdir", lower, problem));
    }
    if read_only {
        options.push("ro".into());
    }
    Ok(Plan::Layers {
        layers,
        overlay: Some(options),
    })
}

/// A bind of a directory, of the one image that there is, or of an empty directory in the file for what is written.
fn bind(mount: &Mount, mut layers: Vec<Layer>, first: usize) -> Result<Plan, Error> {
    let mut read_only = false;
    for option in &mount.options {
        match option.split_once('=').unwrap_or((option, "")) {
            ("ro", _) => read_only = true,
            (key, _) if IGNORED.contains(&key) => (),
            _ => return Err(unknown(mount, option)),
        }
    }
    let source = mount.source.as_str();
    let known = match layers.as_slice() {
        [_] => names_images(source, first, 1),
        [] if first > 0 => source.starts_with("{{ mount 0 }}/"),
        [] => {
            let path = absolute(mount, "source", source)?;
            layers.push(match read_only {
                true => Layer::Lower(path),
                false => Layer::Upper(path),
            });
            true
        }
        _ => false,
    };
    if !known {
        return Err(invalid(
            mount,
            "source",
            source,
            "not what the mounts before it make",
        ));
    }
    let overlay = match read_only {
        true if layers.is_empty() => Some(vec!["ro".into()]),
        true => None,
        false => Some(Vec::new()),
    };
    Ok(Plan::Layers { layers, overlay })
}

fn image(mount: &Mount) -> Result<Layer, Error> {
    match mount
        .options
        .iter()
        .find(|option| !["ro", "loop"].contains(&option.as_str()))
    {
        Some(option) => Err(unknown(mount, option)),
        None => Ok(Layer::Image(absolute(mount, "source", &mount.source)?)),
    }
}

fn disk(mount: &Mount) -> Result<Plan, Error> {
    let mut options = Vec::new();
    for option in &mount.options {
        match option.split_once('=').unwrap_or((option, "")) {
            ("loop" | "rw", _) => (),
            ("offset" | "sizelimit", _) => return Err(unknown(mount, option)),
            (key, _) if key.starts_with("X-") => return Err(unknown(mount, option)),
            // The guest's kernel knows what is left as well as the host's.
            _ => options.push(option.clone()),
        }
    }
    Ok(Plan::Disk {
        kind: mount.type_.clone(),
        path: absolute(mount, "source", &mount.source)?,
        read_only: options.iter().any(|option| option == "ro"),
        options,
    })
}

/// Whether a template of containerd's stands for exactly these of the mounts.
fn names_images(template: &str, first: usize, count: usize) -> bool {
    let last = first + count - 1;
    let words: Vec<_> = template.split_whitespace().collect();
    let is = |word: &str, number: usize| word.parse() == Ok(number);
    match words.as_slice() {
        ["{{", "overlay", from, to, "}}"] => is(from, first) && is(to, last),
        ["{{", "mount", one, "}}"] => is(one, first) && count == 1,
        _ => false,
    }
}

/// Splits a list of directories at its colons; a backslash takes the meaning from what follows.
fn split(list: &str) -> Vec<String> {
    let mut paths = Vec::new();
    let mut path = String::new();
    let mut characters = list.chars();
    while let Some(character) = characters.next() {
        match character {
            ':' => paths.push(mem::take(&mut path)),
            '\\' => path.extend(characters.next()),
            other => path.push(other),
        }
    }
    paths.push(path);
    paths
}

fn absolute(mount: &Mount, field: &'static str, path: &str) -> Result<PathBuf, Error> {
    match path.starts_with('/') {
        true => Ok(path.into()),
        false => Err(invalid(mount, field, path, "no absolute path")),
    }
}

fn unknown(mount: &Mount, option: &str) -> Error {
    Error::Option {
        kind: mount.type_.clone(),
        option: option.into(),
    }
}

fn invalid(mount: &Mount, field: &'static str, value: &str, problem: &'static str) -> Error {
    Error::Invalid {
        kind: mount.type_.clone(),
        field,
        value: value.into(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|&option| option.into()).collect(),
            ..Default::default()
        }
    }

    fn lower(path: &str) -> Layer {
        Layer::Lower(path.into())
    }

    fn image(path: &str) -> Layer {
        Layer::Image(path.into())
    }

    fn layers(layers: Vec<Layer>, overlay: Option<&[&str]>) -> Result<Plan, Error> {
        let overlay = overlay.map(|options| options.iter().map(|&option| option.into()).collect());
        Ok(Plan::Layers { layers, overlay })
    }

    #[test]
    fn what_the_overlay_snapshotter_hands_over() {
        let active = mount(
            "overlay",
            "overlay",
            &[
                "index=off",
                "uidmap=0:1000:65536",
                "gidmap=0:1000:65536",
                "workdir=/s/9/work",
                "upperdir=/s/9/fs",
                "lowerdir=/s/3/fs:/s/1/fs",
            ],
        );
        let upper = Layer::Upper("/s/9/fs".into());
        assert_eq!(
            Plan::of(&[active]),
            layers(
                vec![upper, lower("/s/3/fs"), lower("/s/1/fs")],
                Some(&["index=off", "uidmap=0:1000:65536", "gidmap=0:1000:65536"])
            )
        );
        let view = mount(
            "overlay",
            "overlay",
            &["userxattr", "lowerdir=/s/3/fs:/s/1\\:\\\\/fs"],
        );
        assert_eq!(
            Plan::of(&[view]),
            layers(
                vec![lower("/s/3/fs"), lower("/s/1:\\/fs")],
                Some(&["userxattr", "ro"])
            )
        );
        let one = mount("bind", "/s/3/fs", &["ro", "rbind"]);
        assert_eq!(Plan::of(&[one]), layers(vec![lower("/s/3/fs")], None));
        let none = mount("bind", "/s/9/fs", &["rw", "rbind"]);
        let upper = Layer::Upper("/s/9/fs".into());
        assert_eq!(Plan::of(&[none]), layers(vec![upper], Some(&[])));
    }

    #[test]
    fn what_the_erofs_snapshotter_hands_over() {
        let erofs = |path| mount("erofs", path, &["ro", "loop"]);
        let writable = mount(
            "mkfs/ext4",
            "/s/9/rwlayer.img",
            &["X-containerd.mkfs.size=9", "loop"],
        );
        let over = |kind, options: &[&str]| mount(kind, "overlay", options);
        let two = vec![image("/s/3/layer.erofs"), image("/s/1/layer.erofs")];

        let active = [
            "workdir=/s/9/work",
            "upperdir=/s/9/fs",
            "lowerdir={{ overlay 0 1 }}",
        ];
        let list = [
            erofs("/s/3/layer.erofs"),
            erofs("/s/1/layer.erofs"),
            over("format/mkdir/overlay", &active),
        ];
        let mut expected = vec![Layer::Upper("/s/9/fs".into())];
        expected.extend(two);
        assert_eq!(Plan::of(&list), layers(expected, Some(&[])));

        let options = [
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "upperdir={{ mount 0 }}/upper",
            "workdir={{ mount 0 }}/work",
            "lowerdir={{ mount 1 }}",
        ];
        let list = [
            writable.clone(),
            erofs("/s/1/layer.erofs"),
            over("format/mkdir/overlay", &options),
        ];
        assert_eq!(
            Plan::of(&list),
            layers(vec![image("/s/1/layer.erofs")], Some(&[]))
        );

        let empty = mount("format/mkdir/bind", "{{ mount 0 }}/upper", &["rw", "rbind"]);
        assert_eq!(Plan::of(&[writable, empty]), layers(vec![], Some(&[])));
        let view = [
            erofs("/s/1/layer.erofs"),
            mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]),
        ];
        assert_eq!(
            Plan::of(&view),
            layers(vec![image("/s/1/layer.erofs")], None)
        );
        assert_eq!(
            Plan::of(&view[..1]),
            layers(vec![image("/s/1/layer.erofs")], None)
        );

        for wrong in [
            "{{ overlay 0 0 }}",
            "{{ overlay 1 2 }}",
            "{{ mount 0 }}",
            "/elsewhere",
            "",
        ] {
            let lower = format!("lowerdir={wrong}");
            let list = [erofs("/a"), erofs("/b"), over("format/overlay", &[&lower])];
            assert!(
                matches!(
                    Plan::of(&list),
                    Err(Error::Invalid {
                        field: "lowerdir",
                        ..
                    })
                ),
                "{wrong}"
            );
        }
    }

    #[test]
    fn what_block_snapshotters_hand_over() {
        let thin = mount("ext4", "/dev/mapper/pool-snap-1", &["discard"]);
        assert_eq!(
            Plan::of(&[thin]),
            Ok(Plan::Disk {
                kind: "ext4".into(),
                path: "/dev/mapper/pool-snap-1".into(),
                read_only: false,
                options: vec!["discard".into()],
            })
        );
        let file = mount("xfs", "/s/1/file", &["ro", "loop", "nouuid"]);
        assert_eq!(
            Plan::of(&[file]),
            Ok(Plan::Disk {
                kind: "xfs".into(),
                path: "/s/1/file".into(),
                read_only: true,
                options: vec!["ro".into(), "nouuid".into()],
            })
        );
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let lists: [(&[Mount], &str); 12] = [
            (&[], "no mounts"),
            (
                &[mount("fuse.nydus-overlayfs", "x", &[])],
                "fuse.nydus-overlayfs",
            ),
            (&[mount("btrfs", "/dev/sda", &[])], "btrfs"),
            (
                &[
                    mount("ext4", "/a", &[]),
                    mount("overlay", "", &["lowerdir=/b"]),
                ],
                "ext4, overlay",
            ),
            (
                &[mount("overlay", "", &["lowerdir=/a", "shiny=1"])],
                "shiny=1",
            ),
            (&[mount("overlay", "", &["lowerdir+=/a"])], "lowerdir+"),
            (
                &[mount("overlay", "", &["lowerdir=/a::/b"])],
                "no absolute path",
            ),
            (&[mount("overlay", "", &["upperdir=/a"])], "lowerdir"),
            (&[mount("erofs", "/a", &["ro", "device=/b"])], "device=/b"),
            (&[mount("bind", "relative", &["rw"])], "relative"),
            (&[mount("bind", "/a", &["nosuid"])], "nosuid"),
            (
                &[mount("ext4", "/a", &["loop", "offset=512"])],
                "offset=512",
            ),
        ];
        for (list, name) in lists {
            let error = Plan::of(list).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
        let elsewhere = Mount {
            target: "/sub".into(),
            ..mount("bind", "/a", &[])
        };
        assert!(
            Plan::of(&[elsewhere])
                .unwrap_err()
                .to_string()
                .contains("/sub")
        );
    }
}
