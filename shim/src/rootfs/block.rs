//! Block devices and image files that are attached as they are.
//!
//! A block device is opened exclusively (`O_EXCL`): the kernel refuses one that the host uses in any way (mounted, swapped to,
//! part of another device) or that another machine has, also if that is true of one of its partitions only, and nothing on the
//! host can mount it as long as the machine has it. Files are locked instead (`flock`), which keeps machines apart.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use bulkhead_vmm::control::Extent;
use rustix::fs::{FlockOperation, OFlags, flock};

use super::{Error, failed};
use crate::disk::DiskFiles;

/// Opens a device or a file as a disk.
pub fn disk(id: &str, path: &Path, read_only: bool) -> Result<DiskFiles, Error> {
    let (file, length) = open(path, read_only)?;
    Ok(DiskFiles {
        id: id.into(),
        read_only,
        extents: vec![(file.into(), Extent { offset: 0, length })],
    })
}

/// Opens a device or a file, and returns its length in bytes.
pub fn open(path: &Path, read_only: bool) -> Result<(File, u64), Error> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags((OFlags::EXCL | OFlags::NONBLOCK).bits() as i32)
        .open(path)
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::Missing(path.into()),
            ErrorKind::ResourceBusy => Error::InUse(path.into()),
            _ => failed("open", path)(error),
        })?;
    let kind = file.metadata().map_err(failed("stat", path))?.file_type();
    if kind.is_file() {
        let lock = match read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        flock(&file, lock).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => Error::InUse(path.into()),
            _ => failed("lock", path)(errno),
        })?;
    } else if !kind.is_block_device() {
        return Err(Error::NoDisk(path.into()));
    }
    let length = file
        .seek(SeekFrom::End(0))
        .map_err(failed("seek in", path))?;
    match length > 0 && length % 512 == 0 {
        true => Ok((file, length)),
        false => Err(Error::Length {
            path: path.into(),
            length,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::testing::{Loop, Mounted, run};
    use super::*;
    use crate::testing::alone;

    #[test]
    fn a_device_that_the_host_uses_is_refused() {
        if !alone() {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        run("mke2fs", &["-q", file.path().to_str().unwrap()]);
        let device = Loop::new(file.path());
        let (_, length) = open(device.path(), false).unwrap();
        assert_eq!(length, 8 << 20);
        let mounted = Mounted::new("ext4", "ro", device.path().to_str().unwrap());
        for read_only in [false, true] {
            let error = open(device.path(), read_only).unwrap_err();
            assert!(
                matches!(&error, Error::InUse(path) if path == device.path()),
                "{error}"
            );
        }
        drop(mounted);
        let first = disk("x", device.path(), true).unwrap();
        assert!(matches!(open(device.path(), true), Err(Error::InUse(_))));
        drop(first);
        assert!(open(device.path(), true).is_ok());
    }

    #[test]
    fn a_file_is_written_to_by_one_machine() {
        if !alone() {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let readers = (
            open(file.path(), true).unwrap(),
            open(file.path(), true).unwrap(),
        );
        assert!(matches!(open(file.path(), false), Err(Error::InUse(_))));
        drop(readers);
        let _writer = open(file.path(), false).unwrap();
        assert!(matches!(open(file.path(), true), Err(Error::InUse(_))));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("odd"), [0; 1000]).unwrap();
        fs::write(at("empty"), "").unwrap();
        run("mkfifo", &[at("fifo").to_str().unwrap()]);
        let error = |name: &str| open(&at(name), true).unwrap_err();
        assert!(matches!(error("odd"), Error::Length { length: 1000, .. }));
        assert!(matches!(error("empty"), Error::Length { length: 0, .. }));
        assert!(matches!(error("fifo"), Error::NoDisk(_)));
        assert!(matches!(error("absent"), Error::Missing(_)));
        assert!(matches!(error("."), Error::NoDisk(_)));
    }
}
