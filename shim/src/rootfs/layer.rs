//! Images of layers.
//!
//! # What an image's name must guarantee
//!
//! An image that was built of one layer must never be taken for another's: it would run foreign code. A path does not identify a
//! layer: when containerd's root directory is wiped, its snapshot numbers begin again. An image is therefore named after device,
//! inode number, time of birth and time of last change of the layer's directory. The kernel sets both times, and no image can
//! choose them, if the directory is in the snapshotter's own file system. Inside of a mounted image (as some snapshotters mount
//! them) the image's author chooses all of it, so a directory is a *snapshot*, and cached, only when
//!
//! * its path ends in `snapshots/NUMBER/fs`, as containerd's snapshotters lay them out,
//! * it is on the same mount as `snapshots`,
//! * and its file system records times of birth (ext4, xfs, btrfs, tmpfs do).
//!
//! Of any other directory an image is built for one container alone, without a name.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags};
use rustix::io::Errno;

use super::cache::Cache;
use super::{Error, erofs, failed, tree, whole};

/// Changes when images are laid out in another way, so that old ones are not used any more.
const VERSION: u32 = 1;

/// What `statfs` tells of a mounted EROFS image.
const EROFS: i64 = 0xe0f5_e1e2;

/// A layer's directory.
#[derive(Debug)]
pub struct Layer {
    path: PathBuf,
    directory: File,
    /// The name of its image, if that may be cached.
    name: Option<String>,
}

impl Cache {
    /// A layer's image, if it is there.
    pub fn find(&self, layer: &Layer) -> Result<Option<File>, Error> {
        let Some(name) = &layer.name else {
            return Ok(None);
        };
        let Some(image) = self.open(name)? else {
            return Ok(None);
        };
        let path = || self.path().join(name);
        let metadata = image
            .metadata()
            .map_err(|error| failed("stat", &path())(error))?;
        whole(image, metadata.len(), path).map(Some)
    }

    /// Builds a layer's image, unless another process is just doing so: then it waits.
    pub async fn build(&self, layer: Layer) -> Result<File, Error> {
        self.run(move |cache| {
            let write = |file: &File| cache.write(&layer, file);
            match &layer.name {
                Some(name) => cache.get(name, &layer.directory, &layer.path, write),
                None => {
                    let path = layer.path.display();
                    log::info!("{path} is no snapshot: building an image for this container alone");
                    cache.reopen(&cache.unnamed(write)?)
                }
            }
        })
        .await
    }

    /// Writes a layer's image.
    fn write(&self, layer: &Layer, file: &File) -> Result<(), Error> {
        let open = |path: &Path| tree::open(&layer.directory, path, OFlags::empty());
        match tree::read(layer.directory.as_fd(), None)?.write(open, file) {
            Ok(_) => Ok(()),
            Err(erofs::Error::Write(error)) => Err(self.not_written(&layer.path, error)),
            Err(source) => Err(Error::Image {
                layer: layer.path.clone(),
                source,
            }),
        }
    }
}

impl Layer {
    /// Opens a layer's directory. `immutable` says that nothing writes to it any more: only then is its image cached.
    pub fn open(path: &Path, immutable: bool) -> Result<Self, Error> {
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32)
            .open(path)
            .map_err(|error| match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => Error::Missing(path.into()),
                _ => failed("open", path)(error),
            })?;
        let name = match immutable {
            true => Self::name(path, &directory).map_err(failed("stat", path))?,
            false => None,
        };
        Ok(Self {
            path: path.into(),
            directory,
            name,
        })
    }

    /// The name of a snapshot's image, or `None` if the directory is no snapshot.
    fn name(path: &Path, directory: &File) -> Result<Option<String>, Errno> {
        let Some(snapshots) = snapshots(path) else {
            return Ok(None);
        };
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
        let own = rustix::fs::statx(directory, c"", AtFlags::EMPTY_PATH, wanted)?;
        let above = rustix::fs::statx(CWD, snapshots, AtFlags::empty(), wanted)?;
        let told = StatxFlags::from_bits_retain(own.stx_mask & above.stx_mask);
        if !told.contains(wanted) || own.stx_mnt_id != above.stx_mnt_id {
            return Ok(None);
        }
        Ok(Some(format!(
            "{VERSION}-{:x}:{:x}-{:x}-{}.{:09}-{}.{:09}",
            own.stx_dev_major,
            own.stx_dev_minor,
            own.stx_ino,
            own.stx_btime.tv_sec,
            own.stx_btime.tv_nsec,
            own.stx_ctime.tv_sec,
            own.stx_ctime.tv_nsec,
        )))
    }
}

/// The image behind a directory that containerd 2.1's erofs snapshotter has mounted: `layer.erofs`, beside the directory.
pub fn mounted_image(path: &Path) -> Result<Option<PathBuf>, Error> {
    let Some(snapshot) = path.parent().filter(|_| snapshots(path).is_some()) else {
        return Ok(None);
    };
    let mounted = match rustix::fs::statfs(path) {
        Ok(told) => told.f_type == EROFS,
        // Told when the directory is opened.
        Err(_) => false,
    };
    let image = snapshot.join("layer.erofs");
    Ok(Some(image).filter(|image| mounted && image.is_file()))
}

/// The directory of snapshots that a path of the form `.../snapshots/NUMBER/fs` is in.
fn snapshots(path: &Path) -> Option<&Path> {
    let snapshot = path.parent().filter(|_| path.ends_with("fs"))?;
    let number = snapshot.file_name()?.as_encoded_bytes();
    let snapshots = snapshot.parent()?;
    (number.iter().all(u8::is_ascii_digit) && snapshots.ends_with("snapshots")).then_some(snapshots)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::super::testing::{Host, Mounted, assert_same, fill};
    use super::*;
    use crate::testing::alone;

    async fn image(cache: &Cache, path: &Path, immutable: bool) -> Result<File, Error> {
        let layer = Layer::open(path, immutable)?;
        match cache.find(&layer)? {
            Some(image) => Ok(image),
            None => cache.build(layer).await,
        }
    }

    fn inode(file: &File) -> u64 {
        file.metadata().unwrap().ino()
    }

    #[tokio::test]
    async fn a_layer_is_built_once_and_as_it_is() {
        if !alone() {
            return;
        }
        let host = Host::new(1000);
        let layer = host.snapshot(1, 0);
        fill(&layer);
        // Two shims, each of which takes the cache for its own.
        let other = Cache::new(&host.directory.path().join("cache"), 1000).unwrap();
        let (one, two) = tokio::join!(
            image(&host.cache, &layer, true),
            image(&other, &layer, true)
        );
        let (one, two) = (one.unwrap(), two.unwrap());
        assert_eq!(inode(&one), inode(&two));
        assert_eq!(host.images().len(), 1);
        let again = image(&host.cache, &layer, true).await.unwrap();
        assert_eq!(inode(&one), inode(&again));
        assert!(
            (&one).write_all(b"x").is_err(),
            "a machine could write to the image"
        );
        let image = host.directory.path().join("cache").join(&host.images()[0]);
        let mounted = Mounted::new("erofs", "loop,ro", image.to_str().unwrap());
        assert_same(&layer, mounted.path());
    }

    #[tokio::test]
    async fn an_image_that_lost_its_end_is_named() {
        let host = Host::new(1000);
        let layer = host.snapshot(1, 0);
        fill(&layer);
        drop(image(&host.cache, &layer, true).await.unwrap());
        let path = host.directory.path().join("cache").join(&host.images()[0]);
        let length = fs::metadata(&path).unwrap().len();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        for cut in [length - 1, length / 2, 1000, 0] {
            file.set_len(cut).unwrap();
            let error = image(&host.cache, &layer, true).await.unwrap_err();
            let text = error.to_string();
            assert!(
                matches!(&error, Error::Damaged { path: named, length, .. } if *named == path && *length == cut),
                "{text}"
            );
            assert!(text.contains("remove it"), "{text}");
        }
        // Long enough, but nothing but zeroes.
        file.set_len(length).unwrap();
        assert!(image(&host.cache, &layer, true).await.is_err());
        fs::remove_file(&path).unwrap();
        image(&host.cache, &layer, true).await.unwrap();
    }

    #[tokio::test]
    async fn a_snapshot_that_takes_over_a_number_gets_an_image_of_its_own() {
        let host = Host::new(1000);
        let layer = host.snapshot(1, 10_000);
        let first = image(&host.cache, &layer, true).await.unwrap();
        fs::remove_dir_all(host.directory.path().join("containerd")).unwrap();
        let layer = host.snapshot(1, 10_000);
        let second = image(&host.cache, &layer, true).await.unwrap();
        assert_ne!(inode(&first), inode(&second));
        // Even where the inode is the same one. The clock of files may be one that ticks every few milliseconds.
        let change = || {
            let metadata = fs::metadata(&layer).unwrap();
            (metadata.ctime(), metadata.ctime_nsec())
        };
        let before = change();
        while change() == before {
            fs::set_permissions(&layer, fs::Permissions::from_mode(0o711)).unwrap();
        }
        let third = image(&host.cache, &layer, true).await.unwrap();
        assert_ne!(inode(&second), inode(&third));
    }

    #[tokio::test]
    async fn only_snapshots_that_do_not_change_are_cached() {
        if !alone() {
            return;
        }
        let host = Host::new(1000);
        let snapshot = host.snapshot(1, 10);
        let elsewhere = host.directory.path().join("rootfs");
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join("file"), "content").unwrap();
        let mounted = host.snapshot(2, 10);
        for (path, immutable) in [(&snapshot, false), (&elsewhere, true)] {
            let one = image(&host.cache, path, immutable).await.unwrap();
            let two = image(&host.cache, path, immutable).await.unwrap();
            assert_ne!(inode(&one), inode(&two), "{path:?}");
            assert_eq!(one.metadata().unwrap().nlink(), 0);
            assert_ne!(one.metadata().unwrap().len(), 0);
        }
        assert!(host.images().is_empty());
        let name = |path: &Path| Layer::open(path, true).unwrap().name;
        assert!(name(&mounted).is_some());
        let _mounts = Mounted::over("tmpfs", "", "none", &mounted);
        assert_eq!(
            name(&mounted),
            None,
            "an image's author could choose what identifies it"
        );
    }

    #[tokio::test]
    async fn what_is_no_directory_is_missing() {
        let host = Host::new(1000);
        let snapshot = host.snapshot(1, 10);
        let link = host.directory.path().join("link");
        std::os::unix::fs::symlink(&snapshot, &link).unwrap();
        for path in [link, snapshot.join("file"), snapshot.join("absent")] {
            let error = image(&host.cache, &path, true).await.unwrap_err();
            assert!(
                matches!(&error, Error::Missing(missing) if *missing == path),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn a_cache_on_a_full_disk_says_so_and_keeps_nothing() {
        if !alone() {
            return;
        }
        let host = Host::new(1000);
        let layer = host.snapshot(1, 4 << 20);
        let small = Mounted::new("tmpfs", "size=1m", "none");
        let cache = Cache::new(&small.path().join("cache"), 1000).unwrap();
        let error = image(&cache, &layer, true).await.unwrap_err();
        assert!(matches!(error, Error::Full { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(small.path().join("cache").to_str().unwrap())
                && text.contains("cache_dir"),
            "{text}"
        );
        let left = rustix::fs::statfs(small.path()).unwrap();
        assert_eq!(left.f_bfree, left.f_blocks);
    }
}
