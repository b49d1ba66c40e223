//! Which of the host's devices a machine's disks lie on.
//!
//! Limits of a container's input and output name devices by the host's numbers. A guest has other devices with other numbers, maybe the
//! same ones: a limit means every disk of the machine that the container uses and that lies on the device. A limit for a device that none of
//! them lies on is refused.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bulkhead_agent::protocol::{ROOT_DISK, SCRATCH_DISK};

/// A device's major and minor number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number {
    pub major: u64,
    pub minor: u64,
}

impl fmt::Display for Number {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.major, self.minor)
    }
}

impl Number {
    /// Reads `MAJOR:MINOR`.
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim_end().split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

/// Why a limit cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "linux.resources.{field}: the microVM has no disk on the device {number}, only on {}: name one of these", listed(.known)
    )]
    NotBacking {
        field: String,
        number: String,
        known: Vec<Number>,
    },
    #[error("find the device under {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

fn listed(numbers: &[Number]) -> String {
    let numbers: Vec<_> = numbers.iter().map(Number::to_string).collect();
    match numbers.is_empty() {
        true => "file systems without one".into(),
        false => numbers.join(", "),
    }
}

/// Where the content of a container's disks is on the host.
#[derive(Debug, Clone, Default)]
pub struct Backing {
    /// The directory of the pod's scratch disk.
    pub scratch: PathBuf,
    /// Files, directories or block devices that hold its root's layers.
    pub layers: Vec<PathBuf>,
}

impl Backing {
    /// The machine's disks on a device, as the agent calls them.
    pub fn disks_on(
        &self,
        field: &str,
        number: Option<Number>,
        text: &str,
    ) -> Result<Vec<u32>, Error> {
        let scratch = devices_under(&self.scratch)?;
        let mut layers = BTreeSet::new();
        for path in &self.layers {
            layers.extend(devices_under(path)?);
        }
        let on =
            |devices: &BTreeSet<Number>| number.is_some_and(|number| devices.contains(&number));
        let mut disks = Vec::new();
        disks.extend(on(&scratch).then_some(SCRATCH_DISK));
        disks.extend(on(&layers).then_some(ROOT_DISK));
        match disks.is_empty() {
            false => Ok(disks),
            true => Err(Error::NotBacking {
                field: field.to_owned(),
                number: text.to_owned(),
                known: scratch.union(&layers).copied().collect(),
            }),
        }
    }
}

/// The devices that a file lies on, or that a block device is: itself, the disk that it is a partition of, and what it is made of.
fn devices_under(path: &Path) -> Result<BTreeSet<Number>, Error> {
    let failed = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    // A directory that is yet to be made will lie where the one above it does.
    let mut there = path;
    let metadata = loop {
        match (fs::metadata(there), there.parent()) {
            (Err(error), Some(above)) if error.kind() == io::ErrorKind::NotFound => there = above,
            (found, _) => break found.map_err(failed)?,
        }
    };
    let device = match metadata.file_type().is_block_device() {
        true => metadata.rdev(),
        false => metadata.dev(),
    };
    let mut found = BTreeSet::new();
    let mut rest = vec![Number {
        major: rustix::fs::major(device).into(),
        minor: rustix::fs::minor(device).into(),
    }];
    while let Some(number) = rest.pop() {
        let directory = PathBuf::from(format!("/sys/dev/block/{number}"));
        // File systems that lie on no device, or on several, have numbers that are no device's.
        let directory = match fs::canonicalize(&directory) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        if !found.insert(number) {
            continue;
        }
        if directory.join("partition").exists() {
            let disk = directory.parent().unwrap_or(&directory);
            rest.extend(read(disk).map_err(failed)?);
        }
        match fs::read_dir(directory.join("slaves")) {
            Ok(slaves) => {
                for slave in slaves {
                    rest.extend(read(&slave.map_err(failed)?.path()).map_err(failed)?);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(found)
}

/// The number of a device, by its directory in sysfs.
fn read(directory: &Path) -> io::Result<Option<Number>> {
    Ok(Number::parse(&fs::read_to_string(directory.join("dev"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_written() {
        let number = Number {
            major: 8,
            minor: 17,
        };
        assert_eq!(Number::parse(&number.to_string()), Some(number));
        for bad in ["", "8", "8:", ":1", "8:-1", "x:1"] {
            assert_eq!(Number::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn disks_lie_on_the_devices_under_their_files() {
        // This host may have its files on anything; what is said must fit together.
        let directory = tempfile::tempdir().unwrap();
        let devices = devices_under(directory.path()).unwrap();
        let backing = Backing {
            scratch: directory.path().into(),
            layers: vec!["/proc".into()],
        };
        for number in &devices {
            let disks = backing.disks_on("x", Some(*number), "").unwrap();
            assert_eq!(disks, [SCRATCH_DISK]);
        }
        let other = Number { major: 1, minor: 3 };
        let error = backing
            .disks_on("blockIO.x", Some(other), "1:3")
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("blockIO.x") && text.contains("1:3"), "{text}");
        for number in devices {
            assert!(text.contains(&number.to_string()), "{text}");
        }
    }

    #[test]
    fn a_file_system_without_a_device_has_none() {
        assert!(devices_under(Path::new("/proc")).unwrap().is_empty());
    }

    #[test]
    fn a_directory_will_lie_where_the_one_above_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let absent = directory.path().join("absent/below");
        let there = devices_under(directory.path()).unwrap();
        assert_eq!(devices_under(&absent).unwrap(), there);
    }
}
