//! Writes image layers: tar archives with everything that a file system can hold.

use std::fmt;
use std::io;
use std::path::Path;

use tar::{Builder, EntryType, Header};

use crate::oci::Layer;

/// When files were last changed unless said otherwise, in seconds of Unix time.
const TIME: u64 = 1_700_000_000;

/// The names by which layers delete (image-spec 1.1, layer.md, "Whiteouts").
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// What a file is apart from its content.
#[derive(Debug, Clone)]
pub struct Attributes<'a> {
    pub mode: u32,
    pub owner: (u64, u64),
    /// Extended attributes: name and value.
    pub xattrs: &'a [(&'a str, &'a [u8])],
    /// Time of the last change: seconds and nanoseconds of Unix time.
    pub time: (u64, u32),
}

impl Attributes<'_> {
    /// Attributes of root's files.
    pub const fn mode(mode: u32) -> Self {
        Self {
            mode,
            owner: (0, 0),
            xattrs: &[],
            time: (TIME, 0),
        }
    }
}

/// A layer in the making. Parents come before their children, as in every layer that tools make.
pub struct LayerBuilder {
    archive: Builder<Vec<u8>>,
}

impl fmt::Debug for LayerBuilder {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = self.archive.get_ref().len();
        formatter
            .debug_struct("LayerBuilder")
            .field("length", &length)
            .finish()
    }
}

impl Default for LayerBuilder {
    fn default() -> Self {
        Self {
            archive: Builder::new(Vec::new()),
        }
    }
}

impl LayerBuilder {
    /// The finished layer.
    pub fn finish(self) -> io::Result<Layer> {
        self.archive.into_inner()
    }

    /// A directory.
    pub fn directory(&mut self, path: impl AsRef<Path>, attributes: &Attributes) -> io::Result<()> {
        self.append(EntryType::Directory, path.as_ref(), attributes, &[])
    }

    /// A regular file.
    pub fn file(
        &mut self,
        path: impl AsRef<Path>,
        attributes: &Attributes,
        content: &[u8],
    ) -> io::Result<()> {
        self.append(EntryType::Regular, path.as_ref(), attributes, content)
    }

    /// A regular file of `length` zero bytes but for `end`, its last ones, stored as a sparse one (GNU tar manual,
    /// "PAX Format, Version 1.0").
    pub fn sparse(&mut self, path: &str, length: u64, end: &[u8]) -> io::Result<()> {
        let mut content = format!("1\n{}\n{}\n", length - end.len() as u64, end.len()).into_bytes();
        content.resize(512, 0);
        content.extend_from_slice(end);
        let length = length.to_string();
        self.archive.append_pax_extensions([
            ("GNU.sparse.major", b"1".as_slice()),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", path.as_bytes()),
            ("GNU.sparse.realsize", length.as_bytes()),
        ])?;
        self.append(
            EntryType::Regular,
            Path::new(path),
            &Attributes::mode(0o644),
            &content,
        )
    }

    /// One more name of the file at `target`, a path from the root of this layer.
    pub fn hard_link(&mut self, path: &str, target: &str) -> io::Result<()> {
        let mut header = header(EntryType::Link, &Attributes::mode(0o644));
        self.archive.append_link(&mut header, path, target)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: impl AsRef<Path>, target: &str) -> io::Result<()> {
        let mut header = header(EntryType::Symlink, &Attributes::mode(0o777));
        self.archive.append_link(&mut header, path, target)
    }

    /// A named pipe.
    pub fn fifo(&mut self, path: &str) -> io::Result<()> {
        self.append(
            EntryType::Fifo,
            Path::new(path),
            &Attributes::mode(0o640),
            &[],
        )
    }

    /// A character or block device.
    pub fn device(
        &mut self,
        path: &str,
        kind: EntryType,
        major: u32,
        minor: u32,
    ) -> io::Result<()> {
        let mut header = header(kind, &Attributes::mode(0o660));
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        self.archive.append_data(&mut header, path, io::empty())
    }

    /// Deletes what lower layers have at `path`.
    pub fn delete(&mut self, path: &str) -> io::Result<()> {
        let path = Path::new(path);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let whiteout = path.with_file_name(format!("{WHITEOUT}{name}"));
        self.file(whiteout, &Attributes::mode(0o644), &[])
    }

    /// A directory that shows nothing of what lower layers have in it.
    pub fn opaque(&mut self, path: &str, attributes: &Attributes) -> io::Result<()> {
        self.directory(path, attributes)?;
        self.file(Path::new(path).join(OPAQUE), &Attributes::mode(0o644), &[])
    }

    fn append(
        &mut self,
        kind: EntryType,
        path: &Path,
        attributes: &Attributes,
        content: &[u8],
    ) -> io::Result<()> {
        let (seconds, nanoseconds) = attributes.time;
        let mut extensions: Vec<(String, Vec<u8>)> = attributes
            .xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.to_vec()))
            .collect();
        if nanoseconds != 0 {
            extensions.push(("mtime".into(), format!("{seconds}.{nanoseconds:09}").into()));
        }
        if !extensions.is_empty() {
            let pairs = extensions
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_slice()));
            self.archive.append_pax_extensions(pairs)?;
        }
        let mut header = header(kind, attributes);
        header.set_size(content.len() as u64);
        self.archive.append_data(&mut header, path, content)
    }
}

fn header(kind: EntryType, attributes: &Attributes) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(attributes.mode);
    header.set_uid(attributes.owner.0);
    header.set_gid(attributes.owner.1);
    header.set_mtime(attributes.time.0);
    header.set_size(0);
    header
}
