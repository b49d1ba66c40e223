//! File systems that are configured step by step and mounted without a place yet.

use std::fmt::Display;
use std::os::fd::OwnedFd;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use crate::error::{Context, Error};
use crate::oci::mount::Options;

/// A file system that is being configured; errors carry what the kernel says of them.
#[derive(Debug)]
pub struct Filesystem<'a> {
    kind: &'a str,
    context: OwnedFd,
}

impl<'a> Filesystem<'a> {
    /// Begins with a file system of this kind.
    pub fn open(kind: &'a str) -> Result<Self, Error> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
            .context(|| format!("opening the file system {kind}"))?;
        Ok(Self { kind, context })
    }

    /// Gives an option.
    pub fn set(&self, key: &str, value: &str) -> Result<(), Error> {
        fsconfig_set_string(&self.context, key, value)
            .map_err(|errno| self.error(&format!("{key}={value}"), errno))
    }

    /// Configures what is left and mounts it.
    pub fn mount(&self, options: &Options) -> Result<OwnedFd, Error> {
        for option in &options.data {
            match option.split_once('=') {
                Some((key, value)) => self.set(key, value)?,
                None => fsconfig_set_flag(&self.context, option.as_str())
                    .map_err(|errno| self.error(option, errno))?,
            }
        }
        let mut attributes = MountAttrFlags::from_bits_retain(options.attributes.set as u32);
        if options.flags.contains(rustix::mount::MountFlags::RDONLY) {
            fsconfig_set_flag(&self.context, "ro").map_err(|errno| self.error("ro", errno))?;
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        fsconfig_create(&self.context).map_err(|errno| self.error("create", errno))?;
        fsmount(&self.context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|errno| self.error("mount", errno))
    }

    fn error(&self, step: &str, cause: impl Display) -> Error {
        let mut log = [0; 512];
        let said = match rustix::io::read(&self.context, &mut log) {
            Ok(length) => format!(" ({})", String::from_utf8_lossy(&log[..length]).trim()),
            Err(_) => String::new(),
        };
        Error::Failed(format!(
            "mounting a file system of type {}, {step}: {cause}{said}",
            self.kind
        ))
    }
}
