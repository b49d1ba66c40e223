//! Finds a virtio device by its place on the PCI bus, most of all a disk.
//!
//! A device may have been attached a moment ago: if the kernel does not know it yet the bus is scanned again, and if its driver is still at work
//! the kernel's events are waited for. This blocks, so it runs in a container's own process.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};

use crate::error::{Context, Error};
use crate::protocol::PCI_SLOTS;

/// The device node of the disk in a slot of bus 0, or of one of its partitions.
pub fn node(slot: u8, partition: Option<u32>) -> Result<PathBuf, Error> {
    let name = || match partition {
        Some(partition) => format!("partition {partition} of the disk in PCI slot {slot}"),
        None => format!("the disk in PCI slot {slot}"),
    };
    wait_for(slot, name, |virtio| find(virtio, partition))
}

/// What `find` finds in the directory of the virtio device in a slot of bus 0, as soon as it does.
pub fn wait_for<T>(
    slot: u8,
    name: impl Fn() -> String,
    find: impl Fn(&Path) -> io::Result<Option<T>>,
) -> Result<T, Error> {
    let device = place(slot);
    let find = || look_for(slot, &find);
    if let Some(found) = find().context(&name)? {
        return Ok(found);
    }
    // Events are listened to before the second look, so that none is missed.
    let events = kernel_events().context(|| "listening to the kernel's device events".into())?;
    if !device.exists() {
        fs::write("/sys/bus/pci/rescan", "1").context(|| "scanning the PCI bus".into())?;
    }
    loop {
        if let Some(found) = find().context(&name)? {
            return Ok(found);
        }
        if !device.exists() {
            return Err(Error::NotFound(format!(
                "{}: there is no device in that slot",
                name()
            )));
        }
        rustix::net::recv(&events, &mut [0u8; 4096], RecvFlags::empty())
            .context(|| format!("waiting for {}", name()))?;
    }
}

/// What `find` finds in the directory of the virtio device in a slot of bus 0, if it does now.
pub fn look_for<T>(
    slot: u8,
    find: impl Fn(&Path) -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    match child(&place(slot), |name| name.starts_with("virtio"))? {
        Some(virtio) => find(&virtio),
        None => Ok(None),
    }
}

/// The slot that a request names.
pub fn slot(number: u32) -> Result<u8, Error> {
    let slot = u8::try_from(number).ok().filter(|&slot| slot < PCI_SLOTS);
    slot.ok_or_else(|| Error::InvalidArgument(format!("no PCI slot {number}")))
}

/// Whether the kernel knows a device in a slot of bus 0.
pub fn is_known(slot: u8) -> bool {
    place(slot).exists()
}

/// Has the kernel let a device go, if it knows one in that slot.
///
/// # Errors
///
/// It is a disk, and something is mounted from it, or the kernel refuses.
pub fn let_go(slot: u8) -> Result<(), Error> {
    let what = || format!("letting the device in PCI slot {slot} go");
    if let Some(node) = look_for(slot, |virtio| find(virtio, None)).context(what)? {
        // What is mounted, be it a partition only, has the disk for itself.
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        match rustix::fs::open(node, flags, Mode::empty()) {
            Err(Errno::BUSY) => {
                return Err(Error::FailedPrecondition(format!(
                    "{}: it is in use",
                    what()
                )));
            }
            result => drop(result.context(what)?),
        }
    }
    match fs::write(place(slot).join("remove"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.context(what),
    }
}

/// Where the kernel tells of the device in a slot of bus 0.
fn place(slot: u8) -> PathBuf {
    format!("/sys/bus/pci/devices/0000:00:{slot:02x}.0").into()
}

/// The node, as soon as the kernel has made the disk; a partition that the disk does not have is an error, because the
/// partitions are read before the disk appears.
fn find(virtio: &Path, partition: Option<u32>) -> io::Result<Option<PathBuf>> {
    let Some(disk) = child(&virtio.join("block"), |_| true)? else {
        return Ok(None);
    };
    let Some(disk_name) = disk.file_name() else {
        return Ok(None);
    };
    let node = Path::new("/dev").join(disk_name);
    let Some(partition) = partition else {
        return Ok(Some(node));
    };
    let mut part = node.into_os_string();
    part.push(partition.to_string());
    let part = PathBuf::from(part);
    if part.exists() {
        Ok(Some(part))
    } else {
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the disk has no such partition",
        ))
    }
}

/// The first entry of a directory whose name is wanted; none if there is no such directory.
pub fn child(directory: &Path, wanted: impl Fn(&str) -> bool) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&wanted) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Has the disk of this number (`MAJOR:MINOR`) shared between control groups by their weights. Until then it has no scheduler, which costs least.
pub fn share_by_weights(number: &str) -> Result<(), Error> {
    let queue = queue(number);
    // BFQ's own ideas of what is interactive would override the weights.
    for (file, value) in [("scheduler", "bfq"), ("iosched/low_latency", "0")] {
        let path = queue.join(file);
        fs::write(&path, value).context(|| format!("writing {value:?} to {}", path.display()))?;
    }
    Ok(())
}

/// The file with the scheduler of the disk of this number, and what to write to it to have the one that it has now.
pub fn scheduler(number: &str) -> io::Result<Option<(PathBuf, String)>> {
    let path = queue(number).join("scheduler");
    let text = fs::read_to_string(&path)?;
    Ok(chosen(&text).map(|name| (path, name.to_owned())))
}

fn queue(number: &str) -> PathBuf {
    format!("/sys/dev/block/{number}/queue").into()
}

/// The name in brackets, which is that of the scheduler in use.
fn chosen(schedulers: &str) -> Option<&str> {
    let mut names = schedulers.split_ascii_whitespace();
    names.find_map(|name| name.strip_prefix('[')?.strip_suffix(']'))
}

fn kernel_events() -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::KOBJECT_UEVENT),
    )?;
    // Group 1 is the kernel's.
    rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, 1))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheduler_in_use_is_in_brackets() {
        assert_eq!(chosen("[none] bfq \n"), Some("none"));
        assert_eq!(chosen("none [bfq] \n"), Some("bfq"));
        assert_eq!(chosen("none\n"), None);
    }
}
