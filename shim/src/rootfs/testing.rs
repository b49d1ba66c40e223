//! What the tests of this directory share: a tree with everything in it, images mounted by the kernel, trees compared.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use tempfile::TempDir;

use super::cache::Cache;
use crate::disk::DiskFiles;
use crate::testing::runs_alone;

/// Runs a program and returns what it printed; its failure is the test's.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let printed = |bytes| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        printed(&output.stdout),
        printed(&output.stderr)
    );
    printed(&output.stdout)
}

/// A containerd root directory and a cache.
pub struct Host {
    pub directory: TempDir,
    pub cache: Cache,
}

impl Host {
    pub fn new(limit_mib: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::new(&directory.path().join("cache"), limit_mib).unwrap();
        Self { directory, cache }
    }

    /// Makes a snapshot that holds one file of this size.
    pub fn snapshot(&self, number: u32, size: usize) -> PathBuf {
        let path = format!("containerd/snapshots/{number}/fs");
        let path = self.directory.path().join(path);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("file"), vec![number as u8; size]).unwrap();
        path
    }

    /// The names of the images in the cache.
    pub fn images(&self) -> Vec<String> {
        fs::read_dir(self.directory.path().join("cache"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

/// A file system that is mounted as long as this lives, and only for the calling thread.
pub struct Mounted {
    target: PathBuf,
    /// Where it is mounted, unless the caller chose the place.
    directory: Option<TempDir>,
}

impl Mounted {
    pub fn new(kind: &str, options: &str, source: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut mounted = Self::over(kind, options, source, directory.path());
        mounted.directory = Some(directory);
        mounted
    }

    pub fn over(kind: &str, options: &str, source: &str, target: &Path) -> Self {
        // A program that another test starts may have a copy of a file in it open until it is executed, and it could not be unmounted.
        assert!(runs_alone(), "a test that mounts runs alone");
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        run("mount", &["--make-rprivate", "/"]);
        let path = target.to_str().unwrap();
        run("mount", &["-t", kind, "-o", options, source, path]);
        Self {
            target: target.into(),
            directory: None,
        }
    }

    pub fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.target.to_str().unwrap()]);
    }
}

/// A loop device for a file, as long as this lives.
pub struct Loop(PathBuf);

impl Loop {
    pub fn new(file: &Path) -> Self {
        let device = run("losetup", &["--find", "--show", file.to_str().unwrap()]);
        Self(device.trim().into())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", self.0.to_str().unwrap()]);
    }
}

pub fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn make_node(path: &Path, kind: FileType, major: u32, minor: u32) {
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device).unwrap();
}

/// Fills a directory with one of everything that an image's layer can have.
pub fn fill(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::create_dir_all(at("etc/deep/deeper")).unwrap();
    fs::write(at("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(at("etc/empty"), "").unwrap();
    for size in [
        1, 2047, 2048, 2049, 4095, 4096, 4097, 65_536, 65_537, 3_000_001,
    ] {
        let content: Vec<u8> = (0..size).map(|i| (i * 7 + i / 251) as u8).collect();
        fs::write(at(&format!("size-{size}")), content).unwrap();
    }
    fs::write(at("-before-dot"), "sorted before . and ..").unwrap();
    fs::write(at("lost+found-notes"), "kept").unwrap();
    fs::write(at(&"n".repeat(255)), "long name").unwrap();
    fs::write(root.join("odd \n\u{fffd}\\ name"), "odd").unwrap();

    // A directory of several blocks, with hard links in it and to it from elsewhere.
    fs::create_dir(at("many")).unwrap();
    for number in 0..1000 {
        let name = format!("many/{number:04}-{}", "x".repeat(number % 90));
        fs::write(at(&name), number.to_string()).unwrap();
    }
    fs::hard_link(at("size-4097"), at("many/linked")).unwrap();
    fs::hard_link(at("size-4097"), at("etc/deep/deeper/linked")).unwrap();

    symlink("etc/passwd", at("link")).unwrap();
    symlink("/".repeat(4000), at("long-link")).unwrap();
    make_node(&at("null"), FileType::CharacterDevice, 1, 3);
    make_node(&at("large-numbers"), FileType::BlockDevice, 259, 0xa1234);
    make_node(&at("whiteout"), FileType::CharacterDevice, 0, 0);
    make_node(&at("fifo"), FileType::Fifo, 0, 0);
    make_node(&at("socket"), FileType::Socket, 0, 0);

    let setuid = at("size-65536");
    std::os::unix::fs::chown(&setuid, Some(3_000_000_000), Some(70_000)).unwrap();
    fs::set_permissions(
        &setuid,
        std::os::unix::fs::PermissionsExt::from_mode(0o6755),
    )
    .unwrap();
    set_xattr(
        &setuid,
        "security.capability",
        &[
            1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ],
    );
    set_xattr(&at("etc/passwd"), "user.long", &[b'v'; 2000]);
    set_xattr(&at("etc/passwd"), "user.empty", b"");
    set_xattr(&at("etc/deep"), "trusted.overlay.opaque", b"y");
    set_xattr(&at("link"), "trusted.of-a-link", b"1");
    run("chmod", &["1777", at("etc/deep").to_str().unwrap()]);

    // 1 TiB with a little at the beginning, at an odd place, and at the end; and 5 MiB with a hole at the end.
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    for offset in [0, (1 << 39) + 12_345, (1 << 40) - 10] {
        sparse.write_all_at(b"0123456789", offset).unwrap();
    }
    let sparse = File::create(at("sparse-end")).unwrap();
    sparse.write_all_at(&[7; 100_000], 70_000).unwrap();
    sparse.set_len((5 << 20) + 1).unwrap();
    let dense = File::create(at("mostly-dense")).unwrap();
    dense.write_all_at(&[8; 1 << 20], 1 << 20).unwrap();
    dense.write_all_at(&[9; 1 << 20], 3 << 20).unwrap();
    dense.write_all_at(&[9; 1 << 20], 2 << 20).unwrap();

    set_time(&at("etc/passwd"), 1_234_567_890, 987_654_321);
    set_time(&at("link"), 1, 1);
    set_time(&at("etc/empty"), -86_400, 5);
    set_time(&at("fifo"), 4_294_967_296, 999_999_999);
    set_time(&at("many"), 1_000_000_000, 1);
    mark_root(root);
}

/// Gives a tree's root the attributes that [`fill`] gives it.
pub fn mark_root(root: &Path) {
    set_xattr(root, "user.of-the-root", b"2");
    set_time(root, 1_600_000_000, 123_456_789);
}

/// All that can be seen of a file without its name.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    mode: u32,
    owner: (u32, u32),
    size: u64,
    time: (i64, i64),
    device: u64,
    links: u64,
    /// The first name of a file that has several.
    first: Option<PathBuf>,
    xattrs: BTreeMap<String, Vec<u8>>,
    content: Vec<u8>,
}

/// Looks at every file below a directory.
pub fn see(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut names = BTreeMap::new();
    let mut paths = vec![PathBuf::new()];
    let mut all = BTreeMap::new();
    while let Some(path) = paths.pop() {
        let full = root.join(&path);
        if fs::symlink_metadata(&full).unwrap().is_dir() {
            for entry in fs::read_dir(&full).unwrap() {
                paths.push(path.join(entry.unwrap().file_name()));
            }
        }
        all.insert(path, full);
    }
    all.into_iter()
        .map(|(path, full)| {
            let metadata = fs::symlink_metadata(&full).unwrap();
            let several = !metadata.is_dir() && metadata.nlink() > 1;
            let first =
                several.then(|| names.entry(metadata.ino()).or_insert(path.clone()).clone());
            let seen = Seen {
                mode: metadata.mode(),
                owner: (metadata.uid(), metadata.gid()),
                size: if metadata.is_dir() { 0 } else { metadata.len() },
                time: (metadata.mtime(), metadata.mtime_nsec()),
                device: metadata.rdev(),
                links: metadata.nlink(),
                first,
                xattrs: xattrs(&full),
                content: file_content(&full, &metadata),
            };
            (path, seen)
        })
        .collect()
}

/// Fails with the first difference of two trees.
pub fn assert_same(one: &Path, other: &Path) {
    let (one, other) = (see(one), see(other));
    let names = |seen: &BTreeMap<PathBuf, Seen>| seen.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&one), names(&other));
    for (path, seen) in &one {
        assert!(
            seen == &other[path],
            "{path:?}: {seen:?}\n{:?}",
            other[path]
        );
    }
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = [0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    names[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65_536];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            value.truncate(length);
            (String::from_utf8(name.to_vec()).unwrap(), value)
        })
        .collect()
}

/// A file's content, or of a very large one its beginning, a part at an odd place, and its end.
fn file_content(path: &Path, metadata: &Metadata) -> Vec<u8> {
    let mut content = Vec::new();
    if metadata.is_symlink() {
        content.extend(fs::read_link(path).unwrap().as_os_str().as_encoded_bytes());
    } else if metadata.is_file() {
        let file = File::open(path).unwrap();
        if metadata.len() < 1 << 30 {
            (&file).read_to_end(&mut content).unwrap();
        } else {
            for offset in [0, (1 << 38) + 5, (1 << 39) - 4096, (1 << 40) - 32_768] {
                let mut part = [0; 32_768];
                file.read_exact_at(&mut part, offset).unwrap();
                content.extend(part);
            }
        }
    }
    content
}

/// Reads a whole disk.
pub fn content(disk: &DiskFiles) -> Vec<u8> {
    let mut content = Vec::new();
    for (file, extent) in &disk.extents {
        let file = File::from(file.try_clone().unwrap());
        let mut bytes = vec![0; extent.length as usize];
        file.read_exact_at(&mut bytes, extent.offset).unwrap();
        content.extend(bytes);
    }
    content
}
