//! The device nodes of a container and the links beside them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;

use super::mounts::{follow, follow_parent, make_directories};
use super::root::{attach, clone_tree};
use crate::error::{Context, Error};

/// The devices that every container has: path, major and minor number. All are character devices that anyone may use.
pub const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// A device to be made.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    kind: FileType,
    number: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    /// The guest's node, which stands for a new one where none may be made.
    node: Option<OwnedFd>,
}

/// The devices of a container: the default ones and those of its specification. In a user namespace nodes cannot be made, so the
/// guest's own are opened.
pub fn prepare(devices: &[LinuxDevice], in_user_namespace: bool) -> Result<Vec<Device>, Error> {
    let default = DEFAULT.iter().map(|&(path, major, minor)| Device {
        path: path.into(),
        kind: FileType::CharacterDevice,
        number: makedev(major, minor),
        mode: 0o666,
        uid: 0,
        gid: 0,
        node: None,
    });
    let mut all: Vec<Device> = default.collect();
    for device in devices {
        // The last of two descriptions of one path holds.
        all.retain(|known| known.path != *device.path());
        all.push(Device::try_from(device)?);
    }
    if in_user_namespace {
        for device in &mut all {
            let node = clone_tree(&device.path)
                .context(|| format!("opening the guest's {}", device.path.display()))?;
            device.node = Some(node);
        }
    }
    Ok(all)
}

impl TryFrom<&LinuxDevice> for Device {
    type Error = Error;

    fn try_from(device: &LinuxDevice) -> Result<Self, Error> {
        let path = device.path().clone();
        let kind = match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::A => {
                return Err(Error::InvalidArgument(format!(
                    "linux.devices: {} is of type a: expected c, b, u or p",
                    path.display()
                )));
            }
        };
        let number = |name, value| {
            u32::try_from(value).map_err(|_| {
                let path = path.display();
                Error::InvalidArgument(format!(
                    "linux.devices: {path} has the {name} number {value}"
                ))
            })
        };
        if !path.has_root() {
            return Err(Error::InvalidArgument(format!(
                "linux.devices: the path {} is not absolute",
                path.display()
            )));
        }
        Ok(Self {
            kind,
            number: makedev(
                number("major", device.major())?,
                number("minor", device.minor())?,
            ),
            // A mode as a client writes it may carry the file's type.
            mode: device.file_mode().unwrap_or(0o666) & 0o7777,
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
            node: None,
            path,
        })
    }
}

/// Makes the devices and links, in the container's root and with a umask of zero.
pub fn make(devices: &[Device]) -> Result<(), Error> {
    for device in devices {
        device
            .make()
            .context(|| format!("making {}", device.path.display()))?;
    }
    let kcore = Path::new("/proc/kcore")
        .exists()
        .then_some(("/proc/kcore", "/dev/core"));
    for (target, link) in LINKS.into_iter().chain(kcore) {
        let what = || format!("linking {link} to {target}");
        let place = follow_parent(Path::new(link)).context(what)?;
        if link == "/dev/ptmx" {
            remove(&place).context(what)?;
        }
        keep_existing(symlink(target, place)).context(what)?;
    }
    Ok(())
}

impl Device {
    fn make(&self) -> io::Result<()> {
        let path = follow_parent(&self.path)?;
        if let Some(parent) = path.parent() {
            make_directories(parent)?;
        }
        if let Some(node) = &self.node {
            let path = follow(&path)?;
            std::fs::File::create(&path)?;
            return Ok(attach(node, &path)?);
        }
        let mode = Mode::from_raw_mode(self.mode);
        match mknodat(CWD, &path, self.kind, mode, self.number) {
            // What a mount or the image brought stays.
            Err(Errno::EXIST) => return Ok(()),
            made => made?,
        }
        if (self.uid, self.gid) != (0, 0) {
            chown(&path, Some(self.uid), Some(self.gid))?;
        }
        Ok(())
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn keep_existing(made: io::Result<()>) -> io::Result<()> {
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_the_specification_replaces_the_default() {
        let device: LinuxDevice = serde_json::from_str(
            r#"{"path":"/dev/null","type":"c","major":1,"minor":3,"fileMode":8576,"uid":5}"#,
        )
        .unwrap();
        let devices = prepare(&[device], false).unwrap();
        assert_eq!(devices.len(), DEFAULT.len());
        let null = devices.last().unwrap();
        assert_eq!(
            (null.mode, null.uid, null.number),
            (0o600, 5, makedev(1, 3))
        );
    }

    #[test]
    fn bad_devices_are_refused() {
        for bad in [
            r#"{"path":"/dev/x","type":"a","major":1,"minor":3}"#,
            r#"{"path":"dev/x","type":"c","major":1,"minor":3}"#,
            r#"{"path":"/dev/x","type":"c","major":-1,"minor":3}"#,
        ] {
            let device = serde_json::from_str(bad).unwrap();
            assert!(prepare(&[device], false).is_err(), "{bad}");
        }
    }
}
