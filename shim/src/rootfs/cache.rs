//! Images that are built once on a host and shared by all machines: those of read-only layers, and the scratch disk's template.
//!
//! There is no daemon and no registry. The cache is a directory, and the kernel's file locks say what happens in it:
//!
//! * **A build** writes to a file without a name (`O_TMPFILE`), brings it to the disk, and then gives it its name: a build that
//!   is killed at any moment, or interrupted by a power failure, leaves nothing behind. It holds an exclusive lock on the layer's
//!   own directory meanwhile, so that two builds of one layer are one; other layers are built at the same time.
//! * **Use** is a shared lock on the image. It belongs to the open file description, which the machine's VMM gets a descriptor of,
//!   so the lock ends exactly when the last user does, however it ends.
//! * **Eviction**, after each build, removes the images that were not used for the longest time until the cache keeps to its
//!   limit. It passes over those whose exclusive lock it does not get at once.
//!
use std::ffi::CStr;
use std::fs::{DirBuilder, File};
use std::io::{self, ErrorKind};
use std::num::NonZero;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW,
    flock,
};
use rustix::io::Errno;
use tokio::sync::Semaphore;

use super::{Error, failed, full, is_full};

/// The shim builds as many images at the same time as the host has processors.
static BUILDS: LazyLock<Semaphore> = LazyLock::new(|| {
    let processors = std::thread::available_parallelism();
    Semaphore::new(processors.map_or(1, NonZero::get))
});

/// A directory of images.
#[derive(Debug, Clone)]
pub struct Cache {
    path: Arc<Path>,
    directory: Arc<File>,
    /// In bytes.
    limit: u64,
}

impl Cache {
    /// Opens the cache, and makes its directory if need be. `limit_mib` is how much of it may stay when nothing uses it.
    pub fn new(path: &Path, limit_mib: u64) -> Result<Self, Error> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(failed("make the directory", path))?;
        let directory = File::open(path).map_err(failed("open", path))?;
        let metadata = directory.metadata().map_err(failed("stat", path))?;
        if metadata.uid() != 0 || metadata.mode() & 0o022 != 0 {
            return Err(Error::Writable(path.into()));
        }
        Ok(Self {
            path: path.into(),
            directory: Arc::new(directory),
            limit: limit_mib << 20,
        })
    }

    /// The cache's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a build in a thread of its own, when it is its turn.
    pub async fn run<T: Send + 'static>(
        &self,
        build: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        // The semaphore is never closed; without a permit the work would merely be done at once.
        let _permit = BUILDS.acquire().await.ok();
        let cache = self.clone();
        match tokio::task::spawn_blocking(move || build(&cache)).await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(failed("build an image in", &self.path)(
                    ErrorKind::Interrupted,
                )),
            },
        }
    }

    /// The image of this name, read-only; if there is none, what `write` makes of an empty file.
    ///
    /// `lock` is opened anew by each builder of this image. `source` is what it is an image of, for messages.
    pub fn get(
        &self,
        name: &str,
        lock: &File,
        source: &Path,
        write: impl FnOnce(&File) -> Result<(), Error>,
    ) -> Result<File, Error> {
        flock(lock, FlockOperation::LockExclusive).map_err(failed("lock", source))?;
        if let Some(image) = self.open(name)? {
            return Ok(image);
        }
        let start = Instant::now();
        let file = self.unnamed(write)?;
        file.sync_data()
            .map_err(|error| self.not_written(source, error))?;
        let image = self.reopen(&file)?;
        // Locked before it has a name, so that there is no moment at which it could be evicted.
        flock(&image, FlockOperation::LockShared).map_err(failed("lock", &self.path))?;
        rustix::fs::linkat(
            CWD,
            link(&file),
            &self.directory,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )
        .map_err(failed("give a name to an image in", &self.path))?;
        let size = image.metadata().map_err(failed("stat", &self.path))?.len();
        log::info!(
            "built an image of {}: {} MiB in {} ms",
            source.display(),
            size >> 20,
            start.elapsed().as_millis()
        );
        if let Err(error) = self.evict() {
            log::warn!("{error}");
        }
        Ok(image)
    }

    /// Opens an image for use, if it is there.
    pub fn open(&self, name: &str) -> Result<Option<File>, Error> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let image = match rustix::fs::openat(&self.directory, name, flags, Mode::empty()) {
            Ok(image) => File::from(image),
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed("open an image in", &self.path)(errno)),
        };
        flock(&image, FlockOperation::LockShared).map_err(failed("lock", &self.path))?;
        let metadata = image.metadata().map_err(failed("stat", &self.path))?;
        // Evicted between the two calls: what has no name any more is nobody else's to find, and soon gone.
        if metadata.nlink() == 0 {
            return Ok(None);
        }
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        };
        let times = Timestamps {
            last_access: now,
            last_modification: now,
        };
        rustix::fs::futimens(&image, &times).map_err(failed("touch an image in", &self.path))?;
        Ok(Some(image))
    }

    /// Makes a file without a name, which vanishes with its last descriptor.
    pub fn unnamed(&self, write: impl FnOnce(&File) -> Result<(), Error>) -> Result<File, Error> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, c".", flags, Mode::RUSR)
            .map_err(failed("make a file without a name in", &self.path))?;
        let file = File::from(file);
        write(&file)?;
        Ok(file)
    }

    /// Why an image could not be written.
    pub fn not_written(&self, source: &Path, error: io::Error) -> Error {
        if is_full(&error) {
            let operation = format!("build an image of {}", source.display());
            return full(operation, &self.path, "cache_dir");
        }
        failed("write an image in", &self.path)(error)
    }

    /// Opens a file of the cache again, read-only: what a machine gets cannot be written to.
    pub fn reopen(&self, file: &File) -> Result<File, Error> {
        File::open(link(file)).map_err(failed("open an image in", &self.path))
    }

    /// Removes unused images, the least recently used first, until the cache keeps to its limit.
    fn evict(&self) -> Result<(), Error> {
        let failed = |operation| failed(operation, &self.path);
        let mut images = Vec::new();
        let mut total = 0;
        for entry in Dir::read_from(&self.directory).map_err(failed("list"))? {
            let entry = entry.map_err(failed("list"))?;
            let name = entry.file_name().to_owned();
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            let stat = match rustix::fs::statat(&self.directory, &name, flags) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(failed("stat an image in")(errno)),
            };
            if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                let size = stat.st_blocks as u64 * 512;
                total += size;
                images.push(((stat.st_mtime, stat.st_mtime_nsec), size, name));
            }
        }
        images.sort();
        for (_, size, name) in images {
            if total <= self.limit {
                break;
            }
            if self.remove(&name).map_err(failed("evict an image from"))? {
                log::info!(
                    "evicted {} from the cache: {} MiB",
                    name.to_string_lossy(),
                    size >> 20
                );
                total -= size;
            }
        }
        Ok(())
    }

    /// Removes an image that nothing uses; false if something does.
    fn remove(&self, name: &CStr) -> Result<bool, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let image = match rustix::fs::openat(&self.directory, name, flags, Mode::empty()) {
            Ok(image) => image,
            Err(Errno::NOENT) => return Ok(true),
            Err(errno) => return Err(errno),
        };
        match flock(&image, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => (),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(errno) => return Err(errno),
        }
        // Another process may have evicted this image, and built one that now has its name.
        if rustix::fs::fstat(&image)?.st_nlink > 0 {
            rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?;
        }
        Ok(true)
    }
}

/// The path of an open file that may have no other.
fn link(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::process::{Command, Stdio};

    use super::super::testing::{Host, set_time};
    use super::*;
    use crate::testing::alone;

    #[test]
    fn eviction_takes_the_least_recently_used_and_nothing_in_use() {
        if !alone() {
            return;
        }
        let host = Host::new(3);
        let lock = File::open(host.directory.path()).unwrap();
        let get = |name: &str| {
            let write = |file: &File| {
                file.write_all_at(&[1; (1 << 20) - 8192], 0).unwrap();
                Ok(())
            };
            host.cache.get(name, &lock, Path::new(name), write).unwrap()
        };
        let cached = |expected: [&str; 3]| {
            let mut images = host.images();
            images.sort();
            assert_eq!(images, expected);
        };
        let used = get("a");
        // What the VMM has is a duplicate, or a descriptor that arrived over a socket: it holds the same lock.
        let used_by_vmm = used.try_clone().unwrap();
        drop(used);
        get("b");
        get("c");
        for (seconds, name) in ["a", "b", "c"].into_iter().enumerate() {
            set_time(&host.cache.path.join(name), seconds as i64, 0);
        }
        get("b");
        get("d");
        cached(["a", "b", "d"]);
        drop(used_by_vmm);
        get("c");
        cached(["b", "c", "d"]);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_no_cache() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o770)).unwrap();
        assert!(matches!(
            Cache::new(directory.path(), 1),
            Err(Error::Writable(_))
        ));
    }

    #[test]
    fn a_build_that_is_killed_leaves_nothing_and_holds_nobody_up() {
        const CHILD: &str = "BULKHEAD_TEST_BUILDS_IN";
        let build = |directory: &Path, write: &dyn Fn(&File)| {
            let cache = Cache::new(&directory.join("cache"), 1000).unwrap();
            let lock = File::open(directory).unwrap();
            let write = |file: &File| {
                write(file);
                Ok(())
            };
            cache.get("image", &lock, directory, write).unwrap();
            cache
        };
        if let Some(directory) = std::env::var_os(CHILD) {
            build(Path::new(&directory), &|mut file| {
                file.write_all(b"half an image").unwrap();
                println!("building");
                let _ = std::io::stdin().read(&mut [0]);
            });
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let name =
            "rootfs::cache::tests::a_build_that_is_killed_leaves_nothing_and_holds_nobody_up";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let building = |line: io::Result<String>| line.unwrap().contains("building");
        assert!(lines.any(building));
        child.kill().unwrap();
        child.wait().unwrap();
        let images = || {
            fs::read_dir(directory.path().join("cache"))
                .unwrap()
                .count()
        };
        assert_eq!(images(), 0);
        build(directory.path(), &|mut file| {
            file.write_all(b"an image").unwrap()
        });
        assert_eq!(images(), 1);
    }
}
