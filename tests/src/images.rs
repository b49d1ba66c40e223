//! The test images, made on the spot from Debian packages.
//!
//! * `busybox`: one layer, which holds busybox-static.
//! * `debian`: a small Debian, and on top of it three layers that between them use all that layers can do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use tar::EntryType;

use crate::error::{Context, Result};
use crate::layer::{Attributes, LayerBuilder};
use crate::oci::{Image, Layer};
use crate::{cache, debian, process, step};

/// The packages of the `debian` image's lowest layer, apart from what they depend on.
const DEBIAN: &str =
    "attr,base-files,bash,coreutils,dash,findutils,grep,mount,passwd,sed,tar,util-linux";

/// `cap_net_raw+ep` as `security.capability` holds it (linux/capability.h, `struct vfs_cap_data`, revision 2).
const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// A directory, a file, a program of root's.
const DIRECTORY: Attributes = Attributes::mode(0o755);
const FILE: Attributes = Attributes::mode(0o644);
const PROGRAM: Attributes = Attributes::mode(0o755);

/// An EROFS image that holds the archives of all test images, built unless the cache has it.
pub fn all() -> Result<PathBuf> {
    set("images", &["busybox", "debian"])
}

/// The same with only the image that a demonstration needs.
pub fn small() -> Result<PathBuf> {
    set("image", &["busybox"])
}

/// The directory of a set: `NAME.tar` for each image, and `images.erofs` with all of them.
fn set(kind: &str, names: &[&str]) -> Result<PathBuf> {
    debian::install(&["erofs-utils"])?;
    let inputs = [
        debian::SUITE,
        include_str!("images.rs"),
        include_str!("layer.rs"),
        include_str!("oci.rs"),
    ];
    cache::entry(kind, &inputs, |directory| {
        let tree = directory.join("tree");
        fs::create_dir(&tree).or_cannot("create a directory in the cache")?;
        for name in names {
            let layers = match *name {
                "busybox" => vec![busybox()?],
                _ => debian_layers()?,
            };
            let image = Image {
                name: &format!("localhost/{name}:latest"),
                architecture: "amd64",
                command: &["sh"],
                layers: &layers,
            };
            image.write(&tree.join(name).with_extension("tar"))?;
        }
        erofs(&tree, &directory.join("images.erofs"))
    })
}

/// Packs a directory into an EROFS image.
pub fn erofs(directory: &Path, image: &Path) -> Result<()> {
    let mut mkfs = Command::new("mkfs.erofs");
    step::run(
        "pack",
        mkfs.args(["--quiet", "-T0"]).arg(image).arg(directory),
    )
    .map(drop)
}

/// A root file system in which every command is busybox.
fn busybox() -> Result<Layer> {
    let work = tempfile::tempdir().or_cannot("create a temporary directory")?;
    let package = debian::download("busybox-static", work.path())?;
    let mut unpack = Command::new("dpkg-deb");
    process::output(unpack.arg("--extract").arg(&package).arg(work.path()))?;
    // Where it is depends on the release.
    let [newer, older] = ["usr/bin/busybox", "bin/busybox"].map(|place| work.path().join(place));
    let program = if newer.exists() { newer } else { older };
    let commands = process::output(Command::new(&program).arg("--list"))?;
    let program = fs::read(&program).or_cannot(format!("read {}", program.display()))?;
    busybox_layer(&program, &commands).or_cannot("write the busybox layer")
}

fn busybox_layer(program: &[u8], commands: &str) -> io::Result<Layer> {
    let mut layer = LayerBuilder::default();
    for path in ["bin", "dev", "etc", "proc", "root", "run", "sys", "var"] {
        layer.directory(path, &DIRECTORY)?;
    }
    layer.directory("tmp", &Attributes::mode(0o1777))?;
    layer.file(
        "etc/passwd",
        &FILE,
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n",
    )?;
    layer.file("etc/group", &FILE, b"root:x:0:\nuser:x:1000:\n")?;
    layer.file("bin/busybox", &PROGRAM, program)?;
    for command in commands.lines().filter(|command| *command != "busybox") {
        layer.symlink(Path::new("bin").join(command), "busybox")?;
    }
    layer.finish()
}

/// Debian as mmdebstrap makes it, and the layers above.
fn debian_layers() -> Result<Vec<Layer>> {
    let work = tempfile::tempdir().or_cannot("create a temporary directory")?;
    let archive = work.path().join("root.tar");
    debian::install(&["mmdebstrap"])?;
    debian::mmdebstrap("debian image", "extract", DEBIAN, &[], &archive)?;
    let base = fs::read(&archive).or_cannot(format!("read {}", archive.display()))?;
    let make = |layer: fn() -> io::Result<Layer>| layer().or_cannot("write a layer");
    Ok(vec![
        base,
        make(everything)?,
        make(changes)?,
        make(more_changes)?,
    ])
}

/// One of everything, below /everything, and what the next layers change, below /changes.
fn everything() -> io::Result<Layer> {
    let mut layer = LayerBuilder::default();
    layer.directory("everything", &DIRECTORY)?;

    layer.directory("everything/links", &DIRECTORY)?;
    layer.directory("everything/links/below", &DIRECTORY)?;
    layer.file("everything/links/first", &FILE, b"three names\n")?;
    layer.hard_link("everything/links/second", "everything/links/first")?;
    layer.hard_link("everything/links/below/third", "everything/links/first")?;
    layer.symlink("everything/links/relative", "below/third")?;
    layer.symlink("everything/links/absolute", "/everything/links/first")?;
    layer.symlink("everything/links/dangling", "nowhere")?;
    layer.symlink("everything/links/long", &"d/".repeat(500))?;

    layer.directory("everything/attributes", &DIRECTORY)?;
    let big = [b'v'; 1000];
    let some: [(&str, &[u8]); 3] = [
        ("user.text", b"a value"),
        ("user.empty", b""),
        ("user.big", &big),
    ];
    layer.file(
        "everything/attributes/user",
        &Attributes {
            xattrs: &some,
            ..FILE
        },
        b"user.*\n",
    )?;
    layer.directory(
        "everything/attributes/directory",
        &Attributes {
            xattrs: &some[..1],
            ..DIRECTORY
        },
    )?;
    layer.file(
        "everything/attributes/capability",
        &Attributes {
            xattrs: &[("security.capability", &CAPABILITY)],
            ..PROGRAM
        },
        b"#!/bin/true\n",
    )?;

    layer.directory("everything/modes", &DIRECTORY)?;
    for mode in [0o0, 0o200, 0o400, 0o644, 0o2755, 0o4755, 0o6711] {
        layer.file(
            format!("everything/modes/{mode:o}"),
            &Attributes::mode(mode),
            b"",
        )?;
    }
    layer.directory("everything/modes/sticky", &Attributes::mode(0o1777))?;
    layer.directory("everything/modes/group", &Attributes::mode(0o2770))?;

    layer.directory("everything/owners", &DIRECTORY)?;
    for id in [1, 1000, 65_534, 65_536, 3_000_000, u64::from(u32::MAX) - 1] {
        let owner = Attributes {
            owner: (id, id - 1),
            ..Attributes::mode(0o4711)
        };
        layer.file(format!("everything/owners/{id}"), &owner, b"")?;
    }

    layer.directory("everything/times", &DIRECTORY)?;
    for (name, time) in [
        ("epoch", (0, 0)),
        ("nanoseconds", (1_600_000_000, 123_456_789)),
        ("2100", (4_102_444_800, 0)),
    ] {
        layer.file(
            format!("everything/times/{name}"),
            &Attributes { time, ..FILE },
            b"",
        )?;
    }
    layer.directory(
        "everything/times/directory",
        &Attributes {
            time: (1_000_000_000, 1),
            ..DIRECTORY
        },
    )?;

    layer.directory("everything/nodes", &DIRECTORY)?;
    layer.fifo("everything/nodes/fifo")?;
    layer.device("everything/nodes/null", EntryType::Char, 1, 3)?;
    layer.device("everything/nodes/block", EntryType::Block, 7, 200)?;

    layer.directory("everything/names", &DIRECTORY)?;
    let longest = "n".repeat(255);
    for name in [
        "a b",
        "-rf",
        "ünï-ç0dé-\u{1f6a2}",
        "new\nline",
        "back\\slash",
        "...",
        &longest,
    ] {
        layer.file(format!("everything/names/{name}"), &FILE, name.as_bytes())?;
    }
    let mut deep = String::from("everything/names");
    for _ in 0..12 {
        deep += "/";
        deep += &"d".repeat(200);
        layer.directory(&deep, &DIRECTORY)?;
    }
    layer.file(format!("{deep}/bottom"), &FILE, b"deep\n")?;

    layer.directory("everything/sizes", &DIRECTORY)?;
    for size in [0, 1, 511, 512, 513, 4095, 4096, 4097, 65_536, 8 << 20] {
        layer.file(format!("everything/sizes/{size}"), &FILE, &noise(size))?;
    }
    layer.sparse("everything/sizes/sparse", 16 << 20, b"the end")?;

    layer.directory("everything/many", &DIRECTORY)?;
    for number in 0..1000 {
        layer.file(format!("everything/many/file-{number}"), &FILE, b"")?;
    }

    layer.directory("changes", &DIRECTORY)?;
    for name in [
        "replaced",
        "deleted",
        "returning",
        "becomes-directory",
        "mode",
        "owner",
    ] {
        layer.file(format!("changes/{name}"), &FILE, b"as it was\n")?;
    }
    layer.file("changes/name", &FILE, b"two names\n")?;
    layer.hard_link("changes/other-name", "changes/name")?;
    for directory in [
        "deleted-directory",
        "becomes-file",
        "opaque",
        "merged",
        "opaque-twice",
    ] {
        layer.directory(format!("changes/{directory}"), &DIRECTORY)?;
        for name in ["one", "two"] {
            layer.file(format!("changes/{directory}/{name}"), &FILE, b"as it was\n")?;
        }
        layer.directory(format!("changes/{directory}/below"), &DIRECTORY)?;
        layer.file(
            format!("changes/{directory}/below/three"),
            &FILE,
            b"as it was\n",
        )?;
    }
    layer.finish()
}

/// Replaces, deletes, hides and changes what the layer below has.
fn changes() -> io::Result<Layer> {
    let mut layer = LayerBuilder::default();
    layer.directory("changes", &DIRECTORY)?;
    layer.file("changes/replaced", &Attributes::mode(0o600), b"replaced\n")?;
    layer.delete("changes/deleted")?;
    layer.delete("changes/returning")?;
    layer.delete("changes/deleted-directory")?;
    layer.directory("changes/becomes-directory", &DIRECTORY)?;
    layer.file("changes/becomes-directory/new", &FILE, b"new\n")?;
    layer.delete("changes/becomes-file")?;
    layer.file("changes/becomes-file", &FILE, b"a file now\n")?;
    layer.file("changes/mode", &Attributes::mode(0o4755), b"as it was\n")?;
    layer.file(
        "changes/owner",
        &Attributes {
            owner: (1000, 1000),
            ..FILE
        },
        b"as it was\n",
    )?;
    // One of two names gets a file of its own; the other keeps the old one.
    layer.file("changes/name", &FILE, b"a file of its own\n")?;
    for directory in ["opaque", "opaque-twice"] {
        layer.opaque(&format!("changes/{directory}"), &Attributes::mode(0o700))?;
        layer.file(format!("changes/{directory}/two"), &FILE, b"the only one\n")?;
    }
    layer.directory(
        "changes/merged",
        &Attributes {
            xattrs: &[("user.merged", b"yes")],
            ..Attributes::mode(0o711)
        },
    )?;
    layer.delete("changes/merged/one")?;
    layer.file("changes/merged/four", &FILE, b"new\n")?;
    layer.directory("changes/merged/below", &DIRECTORY)?;
    layer.file("changes/merged/below/five", &FILE, b"new\n")?;
    // What Debian brought is changed as well.
    layer.delete("etc/issue")?;
    layer.file("etc/debian_version", &FILE, b"bulkhead\n")?;
    layer.finish()
}

/// Changes what was changed.
fn more_changes() -> io::Result<Layer> {
    let mut layer = LayerBuilder::default();
    layer.directory("changes", &DIRECTORY)?;
    layer.file("changes/returning", &FILE, b"back again\n")?;
    layer.directory("changes/deleted-directory", &Attributes::mode(0o750))?;
    layer.file("changes/deleted-directory/four", &FILE, b"nothing else\n")?;
    layer.opaque("changes/opaque-twice", &DIRECTORY)?;
    layer.file("changes/opaque-twice/three", &FILE, b"the only one\n")?;
    layer.directory("changes/merged", &Attributes::mode(0o711))?;
    layer.delete("changes/merged/four")?;
    layer.delete("changes/merged/below")?;
    layer.finish()
}

/// Bytes that do not repeat, always the same (xorshift64, Marsaglia 2003).
pub fn noise(length: usize) -> Vec<u8> {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The paths of a layer, as tar readers see them.
    fn paths(layer: &[u8]) -> HashSet<PathBuf> {
        let mut archive = tar::Archive::new(layer);
        archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().into_owned())
            .collect()
    }

    #[test]
    fn what_the_upper_layers_change_is_in_the_layers_below() {
        let lower = paths(&everything().unwrap());
        let middle = paths(&changes().unwrap());
        for layer in [changes().unwrap(), more_changes().unwrap()] {
            for path in paths(&layer)
                .iter()
                .filter(|path| path.starts_with("changes"))
            {
                let name = path.file_name().unwrap().to_str().unwrap();
                if let Some(deleted) = name.strip_prefix(".wh.") {
                    let deleted = path.with_file_name(deleted);
                    assert!(
                        name.ends_with("opq")
                            || lower.contains(&deleted)
                            || middle.contains(&deleted),
                        "{} deletes nothing",
                        path.display()
                    );
                }
            }
        }
    }

    #[test]
    fn noise_is_the_same_each_time_and_does_not_repeat() {
        let noise = noise(10_000);
        assert_eq!(noise.len(), 10_000);
        let blocks: HashSet<&[u8]> = noise.chunks(16).collect();
        assert_eq!(blocks.len(), 625);
    }
}
