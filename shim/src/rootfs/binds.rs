//! What a container binds of the host's files.
//!
//! The host serves no file to a guest. What is bound is small as a rule (`resolv.conf`, `hosts`, certificates, settings), so it is copied:
//! the sources of all binds of a container become one EROFS image in memory, a partition of its disk. The guest sees them as they were when
//! the container was made.
//!
//! A container may write to the files by which every engine tells it its name and its neighbours; what it writes stays in the container. What
//! else would have to be shared is refused.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bulkhead_agent::protocol::BINDS;
use rustix::fs::{CWD, FileType, Mode, OFlags, Stat};
use ttrpc::Code;

use super::composite;
use super::erofs::{self, Content, Image, Inode};
use super::tree::{self, Limits};

/// How much the files of a container's binds may hold together, in bytes: their copy is in memory.
const MAX_BYTES: u64 = 32 << 20;

/// How many files they may be.
const MAX_FILES: usize = 16 << 10;

/// The files that a container may write to, though what it writes is its own. The last is where Kubernetes looks for a last word, which
/// few containers leave, in a file that it binds into all of them.
const OWN: [&str; 4] = [
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/dev/termination-log",
];

/// The devices that every container has, as they are in every kernel: name, major and minor number.
const DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// File systems whose files are what the host's kernel says of itself.
const KERNEL: [libc::c_long; 9] = [
    libc::BPF_FS_MAGIC,
    libc::CGROUP_SUPER_MAGIC,
    libc::CGROUP2_SUPER_MAGIC,
    libc::DEBUGFS_MAGIC,
    libc::NSFS_MAGIC,
    libc::PROC_SUPER_MAGIC,
    libc::SECURITYFS_MAGIC,
    libc::SYSFS_MAGIC,
    libc::TRACEFS_MAGIC,
];

/// A bind, as `config.json` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub source: PathBuf,
    pub destination: PathBuf,
    pub read_only: bool,
}

/// Why a file of the host cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("mounts: {} at {}: {problem}", bind.source.display(), bind.destination.display())]
pub struct Error {
    bind: Bind,
    problem: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("no such file or directory")]
    Missing,
    #[error("{operation}: {source}")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
    #[error(
        "a {0} of the host cannot be shared with a microVM for writing: bind it read-only (option ro), which gives the container a copy, put it into the image, or use a tmpfs"
    )]
    Writable(&'static str),
    #[error("a {0} of the host cannot be reached from a microVM: remove the mount")]
    Kind(&'static str),
    #[error(
        "it is what the host's kernel says of itself, and a container in a microVM has a kernel of its own: mount a file system of that kind instead"
    )]
    Kernel,
    #[error(
        "a container's binds may have {MAX_FILES} files and {} MiB, as they are copied: put the files into the image", MAX_BYTES >> 20
    )]
    TooLarge,
    #[error(transparent)]
    Tree(tree::Error),
    #[error(transparent)]
    Image(erofs::Error),
}

impl Error {
    /// The gRPC code by which clients tell errors apart.
    pub fn code(&self) -> Code {
        match &self.problem {
            Problem::Missing => Code::INVALID_ARGUMENT,
            Problem::Writable(_) | Problem::Kind(_) | Problem::Kernel | Problem::TooLarge => {
                Code::UNIMPLEMENTED
            }
            Problem::Tree(tree::Error::MountPoint(_) | tree::Error::Special(_)) => {
                Code::UNIMPLEMENTED
            }
            Problem::Io { .. } | Problem::Tree(_) | Problem::Image(_) => Code::INTERNAL,
        }
    }
}

/// The binds of a container, their sources found and open.
#[derive(Debug, Default)]
pub struct Binds {
    sources: Vec<Source>,
}

#[derive(Debug)]
struct Source {
    bind: Bind,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A device of every kernel, by the guest's name.
    Device(&'static str),
    /// What is copied, opened without the right to read it.
    Copied { file: File, stat: Stat },
}

impl Binds {
    /// Finds the sources.
    ///
    /// # Errors
    ///
    /// What cannot be brought into a guest is refused.
    pub fn open(binds: Vec<Bind>) -> Result<Self, Error> {
        let open = |bind: Bind| match find(&bind) {
            Ok(kind) => Ok(Source { bind, kind }),
            Err(problem) => Err(Error { bind, problem }),
        };
        let sources = binds.into_iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { sources })
    }

    /// Where the guest finds the sources, in the order of the binds.
    pub fn in_guest(&self) -> Vec<PathBuf> {
        let sources = self.sources.iter().enumerate();
        sources
            .map(|(number, source)| match source.kind {
                Kind::Device(name) => name.into(),
                Kind::Copied { .. } => Path::new(BINDS).join(number.to_string()),
            })
            .collect()
    }

    /// Whether a tree has to be read.
    pub fn have_directories(&self) -> bool {
        let mut kinds = self.sources.iter().map(|source| &source.kind);
        kinds.any(|kind| matches!(kind, Kind::Copied { stat, .. } if is_directory(stat)))
    }

    /// Copies what has to be copied into an image in memory; none if there is nothing.
    pub fn image(&self) -> Result<Option<File>, Error> {
        let mut limits = Limits {
            files: MAX_FILES,
            bytes: MAX_BYTES,
        };
        let mut image = Image {
            inodes: vec![empty_root()],
        };
        let mut names = vec![(b".".as_slice().into(), 0), (b"..".as_slice().into(), 0)];
        for (number, source) in self.sources.iter().enumerate() {
            let Kind::Copied { file, stat } = &source.kind else {
                continue;
            };
            let failed = |problem| Error {
                bind: source.bind.clone(),
                problem,
            };
            let tree = read(file, stat, &mut limits).map_err(failed)?;
            names.push((number.to_string().into_bytes().into(), image.inodes.len()));
            append(&mut image, number, tree);
        }
        if names.len() == 2 {
            return Ok(None);
        }
        names.sort_unstable();
        image.inodes[0].content = Content::Directory(names);
        let write = |file: &File| image.write(|path| self.reopen(path), file).map(drop);
        composite::memfd(write).map(Some).map_err(|error| {
            // The first stands for all of them.
            let bind = self.sources[0].bind.clone();
            let problem = Problem::Image(error);
            Error { bind, problem }
        })
    }

    /// Opens a file by its path in the image.
    fn reopen(&self, path: &Path) -> io::Result<File> {
        let mut parts = path.components();
        let number = match parts.next() {
            Some(Component::Normal(number)) => number.to_str().and_then(|name| name.parse().ok()),
            _ => None,
        };
        let source = number.and_then(|number: usize| self.sources.get(number));
        match source.map(|source| &source.kind) {
            Some(Kind::Copied { file, stat }) if is_directory(stat) => {
                tree::open(file, parts.as_path(), OFlags::empty())
            }
            Some(Kind::Copied { file, .. }) => File::open(link(file)),
            Some(Kind::Device(_)) | None => Err(ErrorKind::NotFound.into()),
        }
    }
}

/// Finds a bind's source, and what is to be done with it.
fn find(bind: &Bind) -> Result<Kind, Problem> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, &bind.source, flags, Mode::empty());
    let file = File::from(file.map_err(|errno| match io::Error::from(errno) {
        error if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Problem::Missing
        }
        error => failed("open")(error),
    })?);
    let stat = rustix::fs::fstat(&file).map_err(failed("stat"))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let name = match kind {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::CharacterDevice => {
            let (major, minor) = (
                rustix::fs::major(stat.st_rdev),
                rustix::fs::minor(stat.st_rdev),
            );
            let mut devices = DEVICES.into_iter();
            let device = devices.find(|&(_, x, y)| (x, y) == (major, minor));
            let (name, ..) = device.ok_or(Problem::Kind("device"))?;
            return Ok(Kind::Device(name));
        }
        FileType::BlockDevice => return Err(Problem::Kind("device")),
        FileType::Fifo => return Err(Problem::Kind("named pipe")),
        FileType::Socket => return Err(Problem::Kind("socket")),
        FileType::Symlink | FileType::Unknown => return Err(Problem::Kind("file of this type")),
    };
    let system = rustix::fs::fstatfs(&file).map_err(failed("find the file system of"))?;
    if KERNEL.contains(&(system.f_type as libc::c_long)) {
        return Err(Problem::Kernel);
    }
    let own = || OWN.iter().any(|path| bind.destination == Path::new(path));
    if !(bind.read_only || kind == FileType::RegularFile && own()) {
        return Err(Problem::Writable(name));
    }
    Ok(Kind::Copied { file, stat })
}

/// Reads a file, or a directory with all below it.
fn read(file: &File, stat: &Stat, limits: &mut Limits) -> Result<Image, Problem> {
    let read = match is_directory(stat) {
        true => tree::read(file.as_fd(), Some(limits)),
        false => {
            let path = fs::read_link(link(file)).map_err(failed("find the name of"))?;
            let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(Problem::Missing);
            };
            let directory = File::open(directory).map_err(failed("open the directory of"))?;
            let name = std::ffi::CString::new(name.as_bytes());
            let name = name.map_err(|error| failed("name")(io::Error::from(error)))?;
            tree::read_file(directory.as_fd(), &name, limits)
        }
    };
    read.map_err(|error| match error {
        tree::Error::TooLarge => Problem::TooLarge,
        error => Problem::Tree(error),
    })
}

/// Adds a tree to an image, below a directory entry that is a number.
fn append(image: &mut Image, number: usize, tree: Image) {
    let first = image.inodes.len();
    let place = PathBuf::from(number.to_string());
    for (index, mut inode) in tree.inodes.into_iter().enumerate() {
        match &mut inode.content {
            Content::Directory(entries) => {
                for (name, number) in entries {
                    let above = index == 0 && **name == *b"..";
                    *number = if above { 0 } else { *number + first };
                }
                if index == 0 {
                    image.inodes[0].links += 1;
                }
            }
            Content::File { path, .. } | Content::Sparse { path, .. } => *path = place.join(&*path),
            Content::Bytes(_) | Content::Device { .. } => {}
        }
        image.inodes.push(inode);
    }
}

fn empty_root() -> Inode {
    Inode {
        mode: libc::S_IFDIR | 0o755,
        uid: 0,
        gid: 0,
        links: 2,
        mtime: (0, 0),
        xattrs: Box::default(),
        content: Content::Directory(Vec::new()),
    }
}

fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode).is_dir()
}

/// The path of an open file, whatever its names are.
fn link(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> Problem {
    move |error| Problem::Io {
        operation,
        source: error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use tempfile::TempDir;

    use super::super::testing::{Mounted, assert_same, run};
    use super::*;
    use crate::testing::alone;

    fn bind(source: &Path, destination: &str, read_only: bool) -> Bind {
        Bind {
            source: source.into(),
            destination: destination.into(),
            read_only,
        }
    }

    /// What is said of a bind that cannot be.
    fn refusal(source: &Path, destination: &str, read_only: bool) -> String {
        let opened = Binds::open(vec![bind(source, destination, read_only)]);
        let error = match opened {
            Ok(binds) => binds.image().unwrap_err(),
            Err(error) => error,
        };
        let text = error.to_string();
        assert!(text.contains(source.to_str().unwrap()), "{text}");
        assert!(text.contains(destination), "{text}");
        text
    }

    #[test]
    fn files_and_trees_are_copied_as_they_are() {
        if !alone() {
            return;
        }
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("hosts"), "127.0.0.1 localhost\n").unwrap();
        symlink("hosts", at("link")).unwrap();
        fs::create_dir(at("tree")).unwrap();
        fs::create_dir(at("tree/below")).unwrap();
        fs::write(at("tree/below/large"), vec![7; 100_000]).unwrap();
        symlink("below/large", at("tree/current")).unwrap();
        let mut list = vec![
            bind(&at("link"), "/etc/hosts", false),
            bind(Path::new("/dev/null"), "/masked", false),
            bind(&at("tree"), "/tree", true),
        ];
        // With more than ten, the order of numbers is not that of names.
        list.extend((0..10).map(|_| bind(&at("hosts"), "/x", true)));
        let binds = Binds::open(list).unwrap();
        let in_guest = binds.in_guest();
        assert_eq!(in_guest[0], Path::new(BINDS).join("0"));
        assert_eq!(in_guest[1], Path::new("/dev/null"));
        assert!(binds.have_directories());

        let mut image = binds.image().unwrap().unwrap();
        image.rewind().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        io::copy(&mut image, &mut file.as_file()).unwrap();
        let name = file.path().to_str().unwrap();
        run("fsck.erofs", &[name]);
        let mounted = Mounted::new("erofs", "loop,ro", name);
        let text = |name: &str| fs::read_to_string(mounted.path().join(name)).unwrap();
        assert_eq!(text("0"), "127.0.0.1 localhost\n");
        assert_eq!(text("12"), text("0"));
        assert!(!mounted.path().join("1").exists());
        assert_same(&at("tree"), &mounted.path().join("2"));
        assert!(image.set_len(0).is_err(), "it could be changed");
    }

    #[test]
    fn without_files_there_is_no_image() {
        assert!(Binds::default().image().unwrap().is_none());
        let device = bind(Path::new("/dev/zero"), "/zero", true);
        assert!(
            Binds::open(vec![device])
                .unwrap()
                .image()
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn what_cannot_be_shared_is_refused_by_name() {
        let directory = TempDir::new().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "content").unwrap();
        fs::create_dir(at("tree")).unwrap();
        let said = |name: &str, read_only| refusal(&at(name), "/there", read_only);
        assert!(said("absent", true).contains("no such file"));
        assert!(said("file/below", true).contains("no such file"));
        assert!(said("file", false).contains("read-only"));
        assert!(said("tree", false).contains("a directory of the host"));
        assert!(refusal(&at("tree"), "/etc/hosts", false).contains("directory"));
        let _socket = UnixListener::bind(at("socket")).unwrap();
        run("mkfifo", &[at("fifo").to_str().unwrap()]);
        assert!(said("socket", true).contains("a socket"));
        assert!(said("fifo", true).contains("a named pipe"));
        assert!(refusal(Path::new("/dev/kmsg"), "/there", true).contains("a device"));
        assert!(refusal(Path::new("/proc/self"), "/there", true).contains("kernel of its own"));
        fs::rename(at("socket"), at("tree/socket")).unwrap();
        assert!(said("tree", true).contains("socket"));
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_copied() {
        let directory = TempDir::new().unwrap();
        let large = directory.path().join("large");
        File::create(&large)
            .unwrap()
            .set_len(MAX_BYTES + 1)
            .unwrap();
        for path in [large.as_path(), directory.path()] {
            assert!(refusal(path, "/there", true).contains("32 MiB"));
        }
    }

    #[test]
    fn a_tree_with_other_mounts_is_refused() {
        if !alone() {
            return;
        }
        let directory = TempDir::new().unwrap();
        fs::create_dir(directory.path().join("below")).unwrap();
        let _mounted = Mounted::over("tmpfs", "", "none", &directory.path().join("below"));
        assert!(refusal(directory.path(), "/there", true).contains("mount point"));
    }
}
