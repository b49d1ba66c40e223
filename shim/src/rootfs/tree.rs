//! Reads a directory tree of the host into an [`Image`].

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::erofs::{Chunks, Content, Image, Inode, Xattrs};

/// Smaller files are stored whole, with their holes.
const SPARSE: u64 = 1024 * 1024;

/// The kernel's limit (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`) for an attribute's value and for a file's list of names.
const XATTR_MAX: usize = 64 * 1024;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("{operation} {path}: {source}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// Another file system is mounted in the tree.
    #[error("{0} is a mount point: unmount it, or give it to the container as a volume")]
    MountPoint(PathBuf),
    /// A file through which processes would meet, or a device of the host, where only content is wanted.
    #[error("{0} is a device, a named pipe or a socket, which cannot be copied: remove it")]
    Special(PathBuf),
    /// There is more than is wanted.
    #[error("the tree is too large")]
    TooLarge,
    /// A file has an extended attribute that cannot be kept.
    #[error(
        "the extended attribute {name} of {path} cannot be kept: unknown name space or too long"
    )]
    Xattr { name: String, path: PathBuf },
}

/// Opens a file by its path relative to the root of its tree. Symbolic links are not followed, and mount points not crossed.
pub fn open(root: impl AsFd, path: &Path, flags: OFlags) -> io::Result<File> {
    let path = match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    };
    // Without blocking, so that nothing waits for the other end of a FIFO that has taken the file's place.
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let fd = rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?;
    Ok(File::from(fd))
}

/// Reads the tree below a directory. The paths in the image's content are relative to it.
///
/// Everything that the format can hold is kept: owners, modes, times, hard links, devices, whiteouts (character devices with the
/// number 0:0), extended attributes with overlayfs' own among them. Attributes in `btrfs.`, which tell the host's file system
/// how to store a file, stay behind.
pub fn read(root: BorrowedFd<'_>, limits: Option<&mut Limits>) -> Result<Image, Error> {
    let mut walk = Walk::new(root, limits);
    walk.add(root, c".", PathBuf::new(), 0)?;
    while let Some(directory) = walk.directories.pop_front() {
        walk.enter(directory)?;
    }
    Ok(Image {
        inodes: walk.inodes,
    })
}

/// Reads one file of a directory. Its path in the image's content is empty.
pub fn read_file(
    directory: BorrowedFd<'_>,
    name: &CStr,
    limits: &mut Limits,
) -> Result<Image, Error> {
    let mut walk = Walk::new(directory, Some(limits));
    walk.add(directory, name, PathBuf::new(), 0)?;
    // Other names of it are not there.
    for inode in &mut walk.inodes {
        inode.links = 1;
    }
    Ok(Image {
        inodes: walk.inodes,
    })
}

/// How much may be read. Where there is a limit, only content is wanted: neither devices nor pipes nor sockets.
#[derive(Debug)]
pub struct Limits {
    pub files: usize,
    /// The sizes of regular files together.
    pub bytes: u64,
}

impl Limits {
    /// Takes a file from what may be read.
    fn take(&mut self, kind: FileType, size: u64, path: &Path) -> Result<(), Error> {
        let bytes = match kind {
            FileType::RegularFile => size,
            FileType::Directory | FileType::Symlink => 0,
            FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Fifo
            | FileType::Socket
            | FileType::Unknown => return Err(Error::Special(path.into())),
        };
        self.files = self.files.checked_sub(1).ok_or(Error::TooLarge)?;
        self.bytes = self.bytes.checked_sub(bytes).ok_or(Error::TooLarge)?;
        Ok(())
    }
}

struct Walk<'a> {
    root: BorrowedFd<'a>,
    inodes: Vec<Inode>,
    /// The files that have several names, by device and inode number.
    links: HashMap<(u64, u64), usize>,
    /// What is still to be read.
    directories: VecDeque<Directory>,
    /// Space for a list of names and for a value.
    xattr: Vec<u8>,
    limits: Option<&'a mut Limits>,
}

struct Directory {
    path: PathBuf,
    inode: usize,
    parent: usize,
}

impl<'a> Walk<'a> {
    fn new(root: BorrowedFd<'a>, limits: Option<&'a mut Limits>) -> Self {
        Self {
            root,
            inodes: Vec::new(),
            links: HashMap::new(),
            directories: VecDeque::new(),
            xattr: vec![0; 2 * XATTR_MAX],
            limits,
        }
    }

    /// Reads a directory's entries.
    fn enter(&mut self, directory: Directory) -> Result<(), Error> {
        let Directory {
            path,
            inode,
            parent,
        } = directory;
        let fd =
            open(self.root, &path, OFlags::DIRECTORY).map_err(
                |error| match Errno::from_io_error(&error) {
                    Some(Errno::XDEV) => Error::MountPoint(path.clone()),
                    _ => failed("open", &path)(error),
                },
            )?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&fd).map_err(failed("list", &path))? {
            let entry = entry.map_err(failed("list", &path))?;
            names.push(entry.file_name().to_owned());
        }
        names.sort_unstable();
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            let number = match name.to_bytes() {
                b"." => inode,
                b".." => parent,
                bytes => {
                    let path = path.join(OsStr::from_bytes(bytes));
                    self.add(fd.as_fd(), &name, path, inode)?
                }
            };
            entries.push((name.to_bytes().into(), number));
        }
        self.inodes[inode].content = Content::Directory(entries);
        Ok(())
    }

    /// Adds what a name in a directory stands for, unless it is known by another name, and returns the number of its inode.
    fn add(
        &mut self,
        at: BorrowedFd<'_>,
        name: &CStr,
        path: PathBuf,
        parent: usize,
    ) -> Result<usize, Error> {
        let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("stat", &path))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if let Some(limits) = &mut self.limits {
            limits.take(kind, stat.st_size as u64, &path)?;
        }
        let number = self.inodes.len();
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let names = self.links.entry((stat.st_dev, stat.st_ino));
            let first = *names.or_insert(number);
            if first != number {
                self.inodes[first].links += 1;
                return Ok(first);
            }
        }
        let xattrs = self.xattrs(at, name, &path)?;
        let mut links = 1;
        let content = match kind {
            FileType::Directory => {
                links = 2;
                if number != parent {
                    self.inodes[parent].links += 1;
                }
                self.directories.push_back(Directory {
                    path,
                    inode: number,
                    parent,
                });
                Content::Directory(Vec::new())
            }
            FileType::RegularFile => {
                self.regular(path, stat.st_size as u64, stat.st_blocks as u64)?
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(at, name, Vec::new())
                    .map_err(failed("read the link", &path))?;
                Content::Bytes(target.to_bytes().into())
            }
            FileType::CharacterDevice | FileType::BlockDevice => Content::Device {
                major: rustix::fs::major(stat.st_rdev),
                minor: rustix::fs::minor(stat.st_rdev),
            },
            FileType::Fifo | FileType::Socket => Content::Device { major: 0, minor: 0 },
            FileType::Unknown => return Err(failed("tell the type of", &path)(Errno::NOTSUP)),
        };
        self.inodes.push(Inode {
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            links,
            mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
            xattrs,
            content,
        });
        Ok(number)
    }

    /// The content of a regular file, of which `blocks` units of 512 bytes are allocated.
    fn regular(&self, path: PathBuf, size: u64, blocks: u64) -> Result<Content, Error> {
        if size >= SPARSE && blocks < size / 512 {
            let chunks = open(self.root, &path, OFlags::empty())
                .and_then(|file| Chunks::of(&file, size))
                .map_err(failed("find the holes of", &path))?;
            if let Some(chunks) = chunks {
                return Ok(Content::Sparse { path, size, chunks });
            }
        }
        Ok(Content::File { path, size })
    }

    /// Reads a file's extended attributes.
    fn xattrs(&mut self, at: BorrowedFd<'_>, name: &CStr, path: &Path) -> Result<Box<[u8]>, Error> {
        // There is no call that takes a directory's descriptor and a name, and not every file can be opened.
        let mut link = format!("/proc/self/fd/{}/", at.as_raw_fd()).into_bytes();
        link.extend(name.to_bytes());
        let (names, value) = self.xattr.split_at_mut(XATTR_MAX);
        let length = match rustix::fs::llistxattr(&link[..], &mut *names) {
            Ok(length) => length,
            Err(Errno::NOTSUP) => 0,
            Err(errno) => return Err(failed("list the attributes of", path)(errno)),
        };
        let mut names: Vec<&[u8]> = names[..length].split(|&byte| byte == 0).collect();
        names.sort_unstable();
        let mut xattrs = Xattrs::default();
        for name in names {
            if name.is_empty() || name.starts_with(b"btrfs.") {
                continue;
            }
            let length = rustix::fs::lgetxattr(&link[..], name, &mut *value)
                .map_err(failed("read an attribute of", path))?;
            if !xattrs.add(name, &value[..length]) {
                return Err(Error::Xattr {
                    name: String::from_utf8_lossy(name).into(),
                    path: path.into(),
                });
            }
        }
        Ok(xattrs.finish())
    }
}

fn failed<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl Fn(E) -> Error {
    move |error| Error::Io {
        operation,
        path: path.into(),
        source: error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::testing::{Mounted, assert_same, fill, mark_root, run};
    use super::*;
    use crate::testing::alone;

    fn image(root: &Path, to: &Path) -> u64 {
        let root = File::open(root).unwrap();
        let image = read(root.as_fd(), None).unwrap();
        let file = File::create_new(to).unwrap();
        let open = |path: &Path| open(&root, path, OFlags::empty());
        let size = image.write(open, &file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), size);
        size
    }

    #[test]
    fn a_tree_comes_back_from_the_kernel_as_it_was() {
        if !alone() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let (tree, file) = (
            directory.path().join("tree"),
            directory.path().join("image"),
        );
        fs::create_dir(&tree).unwrap();
        fill(&tree);
        let size = image(&tree, &file);
        assert!(
            size < 64 << 20,
            "a sparse file of 1 TiB makes an image of {size} bytes"
        );
        run("fsck.erofs", &[file.to_str().unwrap()]);
        let mounted = Mounted::new("erofs", "loop,ro", file.to_str().unwrap());
        assert_same(&tree, mounted.path());
    }

    #[test]
    fn equal_trees_give_equal_images() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let path = |name: &str| at(name).to_str().unwrap().to_owned();
        fs::create_dir(at("one")).unwrap();
        fill(&at("one"));
        // Copied in the reverse order, so that the host's directory lists the names in another one.
        fs::create_dir(at("two")).unwrap();
        let mut names: Vec<_> = fs::read_dir(at("one"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        names.sort_by(|a, b| b.cmp(a));
        let mut copy = std::process::Command::new("cp");
        copy.arg("-a").args(names).arg(at("two"));
        assert!(copy.status().unwrap().success());
        mark_root(&at("two"));
        assert_same(&at("one"), &at("two"));
        image(&at("one"), &at("image-one"));
        image(&at("two"), &at("image-two"));
        run("cmp", &[&path("image-one"), &path("image-two")]);
    }

    #[test]
    fn nothing_is_read_through_a_symbolic_link_or_a_mount() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", directory.path().join("link")).unwrap();
        let root = File::open(directory.path()).unwrap();
        for path in ["link/passwd", "../escape", "/etc/passwd", "link"] {
            assert!(
                open(&root, Path::new(path), OFlags::empty()).is_err(),
                "{path}"
            );
        }
        let error = read(File::open("/").unwrap().as_fd(), None);
        assert!(matches!(error, Err(Error::MountPoint(_))), "{error:?}");
    }
}
