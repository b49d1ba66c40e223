//! The disk of a pod for what its containers write: an ext4 file system in a sparse file without a name.
//!
//! The file (`O_TMPFILE`) exists as long as a descriptor of it: no end of a machine or of a shim can leave it behind. Making the
//! file system anew for each pod would be slow, so `mke2fs` makes one of each size, which stays in the cache, and a pod gets a
//! copy of its data, about 100 KiB. It has no journal and no check sums: nothing of it outlives a crash of the machine.

use std::fs::{DirBuilder, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::Path;
use std::process::{Command, Stdio};

use bulkhead_vmm::control::Extent;
use rustix::fs::{CWD, Mode, OFlags};

use super::cache::Cache;

use super::sparse::each_data;
use super::{Error, failed, full, is_full};
use crate::disk::DiskFiles;

/// Changes when the template is made in another way.
const VERSION: u32 = 1;

/// What the configuration calls the directory.
const SETTING: &str = "scratch_dir";

/// A pod is not started with less free space than this in the host's file system, in MiB.
const RESERVE_MIB: u64 = 64;

const COPY_AT_ONCE: usize = 1 << 20;

const MKE2FS: &str = "mke2fs";

/// Features are named one by one, so that the host's configuration does not matter. Groups of 4096 keep what is written at the
/// file's beginning. `discard` makes use of the file being full of holes: nothing is left for the guest to initialise.
const OPTIONS: [&str; 15] = [
    "-q",
    "-F",
    "-b",
    "4096",
    "-I",
    "256",
    "-i",
    "16384",
    "-G",
    "4096",
    "-m",
    "0",
    "-O",
    "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,sparse_super2,uninit_bg",
    "-Enum_backup_sb=0,lazy_itable_init=1,discard",
];

/// Makes a scratch disk of this size in a directory of the host, which is made if need be.
pub async fn disk(cache: &Cache, directory: &Path, size_mib: u64) -> Result<DiskFiles, Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(failed("make the directory", directory))?;
    check_space(directory)?;
    let size = size_mib << 20;
    let template = template(cache, size).await?;
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR)
        .map_err(failed("make a file without a name in", directory))?;
    let file = File::from(file);
    copy(&template, &file, size).map_err(|error| match is_full(&error) {
        true => full("make a scratch disk", directory, SETTING),
        false => failed("write the scratch disk in", directory)(error),
    })?;
    Ok(DiskFiles {
        id: "scratch".into(),
        read_only: false,
        extents: vec![(
            file.into(),
            Extent {
                offset: 0,
                length: size,
            },
        )],
    })
}

/// Refuses to go on when the host's file system is nearly full.
fn check_space(directory: &Path) -> Result<(), Error> {
    let space = rustix::fs::statvfs(directory).map_err(failed("statvfs", directory))?;
    let free_mib = space.f_bavail.saturating_mul(space.f_frsize) >> 20;
    if free_mib < RESERVE_MIB {
        return Err(Error::NearlyFull {
            directory: directory.into(),
            free_mib,
            needed_mib: RESERVE_MIB,
        });
    }
    Ok(())
}

/// The file system that scratch disks of this size in bytes begin with.
async fn template(cache: &Cache, size: u64) -> Result<File, Error> {
    let name = format!("{VERSION}-scratch-{size}");
    if let Some(template) = cache.open(&name)? {
        let path = || cache.path().join(&name);
        let metadata = template
            .metadata()
            .map_err(|error| failed("stat", &path())(error))?;
        return match metadata.len() == size {
            true => Ok(template),
            false => Err(Error::Damaged {
                path: path(),
                length: metadata.len(),
                needed: size,
            }),
        };
    }
    let build = move |cache: &Cache| {
        let lock = File::open(cache.path()).map_err(failed("open", cache.path()))?;
        cache.get(&name, &lock, Path::new("the scratch disk"), |file| {
            make(file, size)
        })
    };
    cache.run(build).await
}

/// Makes a file system in an empty file.
fn make(file: &File, size: u64) -> Result<(), Error> {
    let tool = |problem: String| Error::Tool {
        tool: MKE2FS,
        problem,
    };
    let name = Path::new("the scratch disk");
    file.set_len(size)
        .map_err(failed("set the size of", name))?;
    let input = file
        .try_clone()
        .map_err(failed("duplicate a descriptor of", name))?;
    // The file has no name: the program finds it as its standard input.
    let output = Command::new(MKE2FS)
        .args(OPTIONS)
        .arg("/proc/self/fd/0")
        .env("MKE2FS_CONFIG", "/dev/null")
        .stdin(Stdio::from(input))
        .output()
        .map_err(|error| tool(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(tool(String::from_utf8_lossy(&output.stderr).trim().into())),
    }
}

/// Copies a file's data and leaves its holes.
fn copy(from: &File, to: &File, size: u64) -> io::Result<()> {
    to.set_len(size)?;
    let mut buffer = Vec::new();
    let copy = |part: Range<u64>| {
        for start in part.clone().step_by(COPY_AT_ONCE) {
            buffer.resize(COPY_AT_ONCE.min((part.end - start) as usize), 0);
            from.read_exact_at(&mut buffer, start)?;
            to.write_all_at(&buffer, start)?;
        }
        Ok(())
    };
    each_data(from, 0..size, copy, |error| error)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::super::testing::{Host, Mounted, run};
    use super::*;
    use crate::testing::alone;

    #[tokio::test]
    async fn a_scratch_disk_is_an_empty_file_system_without_a_name() {
        if !alone() {
            return;
        }
        let host = Host::new(1000);
        let directory = host.directory.path().join("scratch");
        let one = disk(&host.cache, &directory, 20_000).await.unwrap();
        let other = disk(&host.cache, &directory, 20_000).await.unwrap();
        assert_eq!(host.images().len(), 1);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        let (file, extent) = one.extents.into_iter().next().unwrap();
        let file = File::from(file);
        assert_eq!((extent.offset, extent.length), (0, 20_000 << 20));
        let metadata = file.metadata().unwrap();
        assert!(
            metadata.blocks() * 512 < 1 << 20,
            "{} blocks",
            metadata.blocks()
        );
        assert_eq!(metadata.nlink(), 0);

        let path = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            std::os::fd::AsRawFd::as_raw_fd(&file)
        );
        run("e2fsck", &["-fn", &path]);
        let mounted = Mounted::new("ext4", "loop,discard", &path);
        fs::write(mounted.path().join("file"), vec![1; 10 << 20]).unwrap();
        run("sync", &["-f", mounted.path().to_str().unwrap()]);
        assert!(file.metadata().unwrap().blocks() * 512 > 10 << 20);
        drop(mounted);
        run("e2fsck", &["-fn", &path]);
        let template = host.directory.path().join("cache").join(&host.images()[0]);
        let cut = fs::OpenOptions::new().write(true).open(&template).unwrap();
        cut.set_len(1 << 20).unwrap();
        let error = disk(&host.cache, &directory, 20_000).await.unwrap_err();
        assert!(
            matches!(&error, Error::Damaged { path, .. } if *path == template),
            "{error}"
        );
        // What one pod writes is not in another's.
        let (other, _) = other.extents.into_iter().next().unwrap();
        assert!(File::from(other).metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[tokio::test]
    async fn a_nearly_full_file_system_is_refused() {
        if !alone() {
            return;
        }
        let host = Host::new(1000);
        let small = Mounted::new("tmpfs", "size=60m", "none");
        let error = disk(&host.cache, small.path(), 1000).await.unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::NearlyFull { free_mib: 60, .. }),
            "{text}"
        );
        assert!(
            text.contains(small.path().to_str().unwrap()) && text.contains(SETTING),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_size_that_mke2fs_refuses_is_explained() {
        let host = Host::new(1000);
        let error = disk(&host.cache, host.directory.path(), 0)
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Tool { tool: MKE2FS, problem } if !problem.is_empty()),
            "{error}"
        );
        assert!(host.images().is_empty());
    }
}
