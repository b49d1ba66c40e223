//! Writes OCI images (image-spec 1.1) as archives that `ctr image import` reads, and unpacks them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Archive, Builder, EntryType, Header};

use crate::error::{Context, Result};

/// An image.
#[derive(Debug)]
pub struct Image<'a> {
    /// Its full name, such as `localhost/busybox:latest`.
    pub name: &'a str,
    /// Its processor architecture in Go's words, such as `amd64`.
    pub architecture: &'a str,
    /// The command that it runs unless told otherwise.
    pub command: &'a [&'a str],
    /// Its layers, from the lowest up, as tar archives.
    pub layers: &'a [Layer],
}

/// The content of a layer: an uncompressed tar archive.
pub type Layer = Vec<u8>;

/// A blob as the index and the manifest speak of it.
struct Descriptor {
    media_type: &'static str,
    digest: String,
    size: usize,
}

impl Descriptor {
    fn of(media_type: &'static str, content: &[u8]) -> Self {
        Self {
            media_type,
            digest: format!("sha256:{:x}", Sha256::digest(content)),
            size: content.len(),
        }
    }

    fn json(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.size })
    }
}

impl Image<'_> {
    /// Writes the image as an archive to `path`.
    pub fn write(&self, path: &Path) -> Result<()> {
        let writing = || format!("write {}", path.display());
        let file = File::create(path).or_cannot(writing())?;
        let mut archive = Builder::new(file);
        self.append(&mut archive).or_cannot(writing())?;
        archive.into_inner().map(drop).or_cannot(writing())
    }

    fn append(&self, archive: &mut Builder<impl Write>) -> std::io::Result<()> {
        let mut layers = Vec::new();
        for layer in self.layers {
            let descriptor = Descriptor::of("application/vnd.oci.image.layer.v1.tar", layer);
            blob(archive, &descriptor, layer)?;
            layers.push(descriptor);
        }
        let config = serde_json::to_vec(&json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": self.command,
            },
            // The layers are not compressed: their digests are those of their content.
            "rootfs": {
                "type": "layers",
                "diff_ids": layers.iter().map(|layer| &layer.digest).collect::<Vec<_>>(),
            },
        }))?;
        let config_descriptor = Descriptor::of("application/vnd.oci.image.config.v1+json", &config);
        blob(archive, &config_descriptor, &config)?;

        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": config_descriptor.json(),
            "layers": layers.iter().map(Descriptor::json).collect::<Vec<_>>(),
        }))?;
        let manifest_descriptor = Descriptor::of(media_type, &manifest);
        blob(archive, &manifest_descriptor, &manifest)?;

        let mut entry = manifest_descriptor.json();
        entry["platform"] = json!({ "architecture": self.architecture, "os": "linux" });
        entry["annotations"] = json!({ "io.containerd.image.name": self.name });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry],
        });
        file(archive, "index.json", &serde_json::to_vec(&index)?)?;
        file(archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
    }
}

fn blob(
    archive: &mut Builder<impl Write>,
    descriptor: &Descriptor,
    content: &[u8],
) -> std::io::Result<()> {
    file(
        archive,
        &format!("blobs/{}", descriptor.digest.replace(':', "/")),
        content,
    )
}

fn file(archive: &mut Builder<impl Write>, name: &str, content: &[u8]) -> std::io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, name, content)
}

/// Unpacks an image of one layer into a new directory.
pub fn unpack(archive: &Path, directory: &Path) -> Result<()> {
    let unpacking = || format!("unpack {}", archive.display());
    let mut files = HashMap::new();
    let mut read = |file: File| -> io::Result<()> {
        for entry in Archive::new(file).entries()? {
            let mut entry = entry?;
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            files.insert(entry.path()?.display().to_string(), content);
        }
        Ok(())
    };
    File::open(archive)
        .and_then(&mut read)
        .or_cannot(unpacking())?;
    let find = |name: &str| {
        let file = files.get(name);
        file.ok_or_else(|| io::Error::other(format!("it has no {name}")))
    };
    let follow = |json: &[u8], pointer: &str| {
        let json: Value = serde_json::from_slice(json)?;
        let digest = json.pointer(pointer).and_then(Value::as_str);
        let digest = digest.ok_or_else(|| io::Error::other(format!("it has no {pointer}")))?;
        find(&format!("blobs/{}", digest.replace(':', "/")))
    };
    let unpack = || -> io::Result<()> {
        let manifest = follow(find("index.json")?, "/manifests/0/digest")?;
        let layer = follow(manifest, "/layers/0/digest")?;
        let mut layer = Archive::new(&layer[..]);
        layer.set_preserve_permissions(true);
        layer.set_preserve_ownerships(true);
        layer.unpack(directory)
    };
    unpack().or_cannot(unpacking())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn an_archive_leads_from_its_index_to_its_layers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.tar");
        let image = Image {
            name: "localhost/x:latest",
            architecture: "amd64",
            command: &["sh"],
            layers: &[b"one".to_vec(), b"two".to_vec()],
        };
        image.write(&path).unwrap();

        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(File::open(&path).unwrap())
            .entries()
            .unwrap()
        {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(entry.path().unwrap().display().to_string(), content);
        }
        let follow = |descriptor: &Value| -> &[u8] {
            let digest = descriptor["digest"].as_str().unwrap();
            let content = &files[&format!("blobs/{}", digest.replace(':', "/"))];
            assert_eq!(descriptor["size"], content.len());
            content
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let manifest: Value = serde_json::from_slice(follow(&index["manifests"][0])).unwrap();
        let config: Value = serde_json::from_slice(follow(&manifest["config"])).unwrap();
        assert_eq!(
            config["rootfs"]["diff_ids"][1],
            manifest["layers"][1]["digest"]
        );
        assert_eq!(follow(&manifest["layers"][0]), b"one");
        assert_eq!(follow(&manifest["layers"][1]), b"two");
    }
}
