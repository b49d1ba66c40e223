//! Writes EROFS images: uncompressed, of files in memory and of files on the host.
//!
//! `mkfs.erofs` would be the tool for this, but release 1.5, which Debian 12 has, drops every file whose name begins with
//! `lost+found`, stores the holes of a sparse file (a `lastlog` of 300 GB becomes an image of 300 GB), does not look at all of its
//! write errors, and gives equal output for equal input only if it may change modification times. The subset of the format that
//! an uncompressed, read-only copy needs is small.
//!
//! # Layout
//!
//! | where | what |
//! |---|---|
//! | 1024 | superblock |
//! | 1152 | inodes, the root first, each followed by its extended attributes and by what is kept beside it: the end of a directory, a symbolic link's target, a small file's content, or the table of a sparse file's chunks |
//! | next block | content of files and directories, each beginning at a block |
//!
//! The number of an inode is its offset in slots of 32 bytes. The image depends on its input alone, so that equal input gives an
//! equal image. See the kernel's `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h`.

mod chunks;
mod stream;
mod xattrs;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

pub use chunks::Chunks;
use stream::Stream;
pub use xattrs::Xattrs;

use super::sparse::each_data;

/// Size of a block in bytes: images are a whole number of them.
pub const BLOCK: u64 = 4096;

/// Content up to this size is kept beside its inode, where looking up the file has already read it.
const SMALL: u64 = 2048;

const SUPERBLOCK: u64 = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const FIRST_INODE: u64 = SUPERBLOCK + 128;
const INODE: u64 = 64;
const SLOT: u64 = 32;
const DIRENT: usize = 12;

/// How long an image is, in bytes, as its superblock says; `None` if the file holds none.
///
/// # Errors
///
/// The file cannot be read.
pub fn length(image: &File) -> io::Result<Option<u64>> {
    let mut superblock = [0; 40];
    match image.read_exact_at(&mut superblock, SUPERBLOCK) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let magic = superblock.starts_with(&MAGIC.to_le_bytes());
    let block = 1_u64.checked_shl(superblock[12].into());
    let blocks = superblock[36..].iter().rev();
    let blocks = blocks.fold(0, |number, &byte| number << 8 | u64::from(byte));
    Ok(block
        .filter(|_| magic)
        .and_then(|block| block.checked_mul(blocks)))
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file that is being copied could not be read.
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    /// A file became shorter while it was copied.
    #[error("{0} changed while it was copied: nothing may write to it")]
    Changed(PathBuf),
    /// The image could not be written.
    #[error("write the image: {0}")]
    Write(#[from] io::Error),
    /// More content than the format can address.
    #[error("the content exceeds 16 TiB")]
    TooLarge,
}

/// A file of any kind.
#[derive(Debug)]
pub struct Inode {
    /// Type and permissions, as in `stat`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// How many names the file has in the image.
    pub links: u32,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
    /// As [`Xattrs`] encodes them; usually empty.
    pub xattrs: Box<[u8]>,
    pub content: Content,
}

/// What is in a file.
#[derive(Debug)]
pub enum Content {
    /// Names with their indices in [`Image::inodes`], sorted by name, with `.` and `..`.
    Directory(Vec<(Box<[u8]>, usize)>),
    /// A symbolic link's target or the content of a regular file.
    Bytes(Box<[u8]>),
    /// Content of a regular file on the host, at a path that the caller of [`Image::write`] can open.
    File { path: PathBuf, size: u64 },
    /// A regular file on the host with holes worth keeping.
    Sparse {
        path: PathBuf,
        size: u64,
        chunks: Chunks,
    },
    /// A device, as major and minor number; zeroes for a FIFO or a socket.
    Device { major: u32, minor: u32 },
}

/// A file system to be written. The first inode is the root.
#[derive(Debug)]
pub struct Image {
    pub inodes: Vec<Inode>,
}

/// Where an inode and its content go.
#[derive(Debug)]
struct Place {
    /// Offset of the inode in the image.
    offset: u64,
    /// Size of the content.
    size: u64,
    /// How much of it, at its end, is beside the inode.
    beside: u64,
    /// The first of its blocks.
    block: u32,
}

impl Image {
    /// Writes the image to an empty file and returns its size in bytes. `open` opens the paths of the content for reading.
    pub fn write(
        &self,
        open: impl Fn(&Path) -> io::Result<File>,
        file: &File,
    ) -> Result<u64, Error> {
        let (places, first_block, end) = self.layout()?;
        let mut metadata = Stream::new(file, FIRST_INODE);
        let mut data = Stream::new(file, first_block * BLOCK);
        for (index, (inode, place)) in self.inodes.iter().zip(&places).enumerate() {
            metadata.skip_to(place.offset)?;
            metadata.put(&inode.header(place, index))?;
            metadata.put(&inode.xattrs)?;
            data.skip_to(data.position().next_multiple_of(BLOCK))?;
            let content = if place.beside > 0 {
                &mut metadata
            } else {
                &mut data
            };
            match &inode.content {
                Content::Directory(entries) => {
                    let bytes = self.directory(entries, &places);
                    let (blocks, rest) = bytes.split_at(bytes.len() - place.beside as usize);
                    data.put(blocks)?;
                    metadata.put(rest)?;
                }
                Content::Bytes(bytes) => content.put(bytes)?,
                Content::File { path, size } => {
                    let source = open(path).map_err(reading(path))?;
                    content.copy(&source, path, 0..*size)?;
                }
                Content::Sparse { path, size, chunks } => {
                    metadata.put(&chunks.table(*size, place.block))?;
                    let source = open(path).map_err(reading(path))?;
                    for &chunk in &chunks.present {
                        let range = chunks.range(chunk, *size);
                        let base = data.position().next_multiple_of(BLOCK);
                        let copy = |part: Range<u64>| {
                            data.skip_to(base + (part.start - range.start))?;
                            data.copy(&source, path, part)
                        };
                        each_data(&source, range.clone(), copy, reading(path))?;
                        data.skip_to(base + (range.end - range.start))?;
                    }
                }
                Content::Device { .. } => (),
            }
        }
        metadata.flush()?;
        data.flush()?;
        let sums = [metadata.sum.finalize(), data.sum.finalize()];
        file.write_all_at(&self.superblock(sums, end), SUPERBLOCK)?;
        file.set_len(end * BLOCK)?;
        Ok(end * BLOCK)
    }

    /// The places of all inodes, the first block of content and the number of blocks.
    fn layout(&self) -> Result<(Vec<Place>, u64, u64), Error> {
        let mut offset = FIRST_INODE;
        let mut places = Vec::with_capacity(self.inodes.len());
        for inode in &self.inodes {
            let head = INODE + inode.xattrs.len() as u64;
            let size = inode.size();
            let beside = Some(inode.wanted_beside(size))
                .filter(|beside| head + beside <= BLOCK)
                .unwrap_or(0);
            offset = offset.next_multiple_of(SLOT);
            // An inode, and what is beside it, must not cross the end of a block; attributes and tables may.
            let together = if beside > 0 { head + beside } else { INODE };
            if offset % BLOCK + together > BLOCK {
                offset = offset.next_multiple_of(BLOCK);
            }
            places.push(Place {
                offset,
                size,
                beside,
                block: 0,
            });
            offset += head + beside;
            if let Content::Sparse { chunks, .. } = &inode.content {
                offset += chunks.table_length(size);
            }
        }
        let first = offset.div_ceil(BLOCK);
        let mut end = first;
        for (inode, place) in self.inodes.iter().zip(&mut places) {
            place.block = u32::try_from(end).map_err(|_| Error::TooLarge)?;
            end += match &inode.content {
                Content::Sparse { chunks, .. } => chunks.stored(place.size) / BLOCK,
                Content::Directory(_) | Content::Bytes(_) | Content::File { .. } => {
                    (place.size - place.beside).div_ceil(BLOCK)
                }
                Content::Device { .. } => 0,
            };
        }
        // The largest number stands for a hole.
        if end >= u64::from(u32::MAX) {
            return Err(Error::TooLarge);
        }
        Ok((places, first, end))
    }

    /// A directory's content: blocks, each of which begins with fixed-size entries, followed by their names.
    fn directory(&self, entries: &[(Box<[u8]>, usize)], places: &[Place]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for block in directory_blocks(entries) {
            bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
            let mut name_offset = block.len() * DIRENT;
            for (name, inode) in block {
                bytes.extend((places[*inode].offset / SLOT).to_le_bytes());
                bytes.extend((name_offset as u16).to_le_bytes());
                bytes.extend([file_type(self.inodes[*inode].mode), 0]);
                name_offset += name.len();
            }
            for (name, _) in block {
                bytes.extend(name);
            }
        }
        bytes
    }

    fn superblock(&self, sums: [u32; 2], blocks: u64) -> [u8; 128] {
        const COMPATIBLE_MTIME: u32 = 2;
        const INCOMPATIBLE_CHUNKS: u32 = 4;
        // Overlayfs tells its layers apart by these. It is a fingerprint, so that it depends on the content alone.
        let mut uuid = [0; 16];
        let numbers = [sums[0], sums[1], blocks as u32, self.inodes.len() as u32];
        for (field, number) in uuid.chunks_exact_mut(4).zip(numbers) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;

        let mut bytes = [0; 128];
        let mut put =
            |offset: usize, field: &[u8]| bytes[offset..][..field.len()].copy_from_slice(field);
        put(0, &MAGIC.to_le_bytes());
        put(8, &COMPATIBLE_MTIME.to_le_bytes());
        put(12, &[BLOCK.trailing_zeros() as u8]);
        put(14, &((FIRST_INODE / SLOT) as u16).to_le_bytes());
        put(16, &(self.inodes.len() as u64).to_le_bytes());
        put(36, &(blocks as u32).to_le_bytes());
        put(48, &uuid);
        let sparse = |inode: &Inode| matches!(inode.content, Content::Sparse { .. });
        if self.inodes.iter().any(sparse) {
            put(80, &INCOMPATIBLE_CHUNKS.to_le_bytes());
        }
        bytes
    }
}

impl Inode {
    fn size(&self) -> u64 {
        match &self.content {
            Content::Directory(entries) => directory_size(entries),
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::File { size, .. } | Content::Sparse { size, .. } => *size,
            Content::Device { .. } => 0,
        }
    }

    /// How much of the content would best be beside the inode.
    fn wanted_beside(&self, size: u64) -> u64 {
        match &self.content {
            Content::Directory(_) => size % BLOCK,
            Content::Bytes(_) | Content::File { .. } if size <= SMALL => size,
            Content::Bytes(_) | Content::File { .. } => 0,
            Content::Sparse { .. } | Content::Device { .. } => 0,
        }
    }

    /// The extended form of an inode.
    fn header(&self, place: &Place, index: usize) -> [u8; INODE as usize] {
        const EXTENDED: u16 = 1;
        const PLAIN: u16 = 0;
        const INLINE: u16 = 2;
        const CHUNKS: u16 = 4;
        let (layout, location) = match &self.content {
            Content::Sparse { chunks, .. } => (CHUNKS, chunks.bits - BLOCK.trailing_zeros()),
            Content::Device { major, minor } => (
                PLAIN,
                (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
            ),
            Content::Directory(_) | Content::Bytes(_) | Content::File { .. } => {
                (if place.beside > 0 { INLINE } else { PLAIN }, place.block)
            }
        };
        let mut bytes = [0; INODE as usize];
        let mut put =
            |offset: usize, field: &[u8]| bytes[offset..][..field.len()].copy_from_slice(field);
        put(0, &(EXTENDED | (layout << 1)).to_le_bytes());
        put(
            2,
            &(xattrs::encoded_count(&self.xattrs) as u16).to_le_bytes(),
        );
        put(4, &(self.mode as u16).to_le_bytes());
        put(8, &place.size.to_le_bytes());
        put(16, &location.to_le_bytes());
        put(20, &(index as u32 + 1).to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.mtime.0.to_le_bytes());
        put(40, &self.mtime.1.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        bytes
    }
}

/// Splits a directory's entries into those that fit in a block.
fn directory_blocks(entries: &[(Box<[u8]>, usize)]) -> impl Iterator<Item = &[(Box<[u8]>, usize)]> {
    let mut used = 0;
    let mut starts = vec![0];
    for (index, (name, _)) in entries.iter().enumerate() {
        let length = DIRENT + name.len();
        if used + length > BLOCK as usize {
            starts.push(index);
            used = 0;
        }
        used += length;
    }
    starts.push(entries.len());
    (1..starts.len()).map(move |block| &entries[starts[block - 1]..starts[block]])
}

fn directory_size(entries: &[(Box<[u8]>, usize)]) -> u64 {
    directory_blocks(entries).fold(0, |size, block| {
        let used: usize = block.iter().map(|(name, _)| DIRENT + name.len()).sum();
        size.next_multiple_of(BLOCK) + used as u64
    })
}

/// A directory entry's type.
fn file_type(mode: u32) -> u8 {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => 1,
        FileType::Directory => 2,
        FileType::CharacterDevice => 3,
        FileType::BlockDevice => 4,
        FileType::Fifo => 5,
        FileType::Socket => 6,
        FileType::Symlink => 7,
        FileType::Unknown => 0,
    }
}

fn reading(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::Read {
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<(Box<[u8]>, usize)> {
        names
            .iter()
            .map(|name| (name.as_bytes().into(), 0))
            .collect()
    }

    #[test]
    fn a_directory_is_split_where_a_block_is_full() {
        // 16 entries of 256 bytes fill a block exactly.
        let name = "n".repeat(244);
        let full = names(&[name.as_str(); 16]);
        assert_eq!(directory_size(&full), BLOCK);
        assert_eq!(directory_blocks(&full).count(), 1);
        let more = names(&[name.as_str(); 17]);
        assert_eq!(directory_size(&more), BLOCK + 256);
        let lengths: Vec<usize> = directory_blocks(&more).map(<[_]>::len).collect();
        assert_eq!(lengths, [16, 1]);
    }

    #[test]
    fn a_file_that_shrinks_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for size in [100, 100_000] {
            std::fs::write(&path, vec![1; size - 1]).unwrap();
            let root = Inode {
                mode: 0o100_644,
                uid: 0,
                gid: 0,
                links: 1,
                mtime: (0, 0),
                xattrs: Box::default(),
                content: Content::File {
                    path: path.clone(),
                    size: size as u64,
                },
            };
            let image = Image { inodes: vec![root] };
            let error = image.write(|path| File::open(path), &tempfile::tempfile().unwrap());
            assert!(matches!(error, Err(Error::Changed(_))), "{error:?}");
        }
    }
}
