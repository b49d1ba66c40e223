//! What PID 1 does before it serves: the guest's file systems, its loopback interface, its control groups.

use std::path::Path;

use rustix::fs::{Mode, symlink};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{DumpableBehavior, Resource, Rlimit};

use crate::agent::Paths;
use crate::error::{Context, Error};
use crate::{cgroup, child, sys};

/// Source or type, place, flags, data.
const FILE_SYSTEMS: [(&str, &str, MountFlags, &std::ffi::CStr); 8] = {
    const STRICT: MountFlags = MountFlags::NOSUID
        .union(MountFlags::NODEV)
        .union(MountFlags::NOEXEC);
    const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
    const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
    [
        ("devtmpfs", "/dev", DEVICES, c"mode=755"),
        ("proc", "/proc", STRICT, c""),
        ("sysfs", "/sys", STRICT, c""),
        ("tmpfs", "/run", PLAIN, c"mode=755"),
        ("cgroup2", cgroup::MOUNT, STRICT, c""),
        ("devpts", "/dev/pts", DEVICES, c"mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", PLAIN, c"mode=1777"),
        ("mqueue", "/dev/mqueue", STRICT, c""),
    ]
};

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Keeps containers' processes out of this one and of its copies.
pub fn protect() -> rustix::io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Allows this process, and containers that name no limits, what a container engine would: the kernel gives its first process few
/// descriptors, and users few processes on a small machine.
fn raise_limits() -> rustix::io::Result<()> {
    let at_most = |most| Rlimit {
        current: most,
        maximum: most,
    };
    rustix::process::setrlimit(Resource::Nofile, at_most(Some(MAX_DESCRIPTORS)))?;
    rustix::process::setrlimit(Resource::Nproc, at_most(None))?;
    rustix::process::setrlimit(Resource::Core, at_most(None))
}

/// The kernel's own default for what a process may ask for (`fs.nr_open`).
const MAX_DESCRIPTORS: u64 = 1 << 20;

/// Makes the guest ready for containers.
pub fn prepare() -> Result<Paths, Error> {
    for (kind, place, flags, data) in FILE_SYSTEMS {
        let what = || format!("mounting {kind} on {place}");
        if place.starts_with("/dev/") {
            unless(
                Errno::EXIST,
                rustix::fs::mkdir(place, Mode::from_raw_mode(0o755)),
            )
            .context(what)?;
        }
        // A kernel may have mounted /dev before it started this process.
        unless(Errno::BUSY, mount(kind, place, kind, flags, data)).context(what)?;
    }
    for (target, link) in LINKS {
        unless(Errno::EXIST, symlink(target, link)).context(|| format!("linking {link}"))?;
    }
    raise_limits().context(|| "raising the limits of processes".into())?;
    // A program that reserves more memory than it uses must not fail because its machine is small: what it may use is what its
    // container's limit says.
    child::outside::set("vm/overcommit_memory", "1")?;
    sys::loopback_up().context(|| "bringing the loopback interface up".into())?;
    cgroup::delegate(Path::new(cgroup::MOUNT))?;
    Ok(Paths {
        run: "/run".into(),
        cgroup: cgroup::MOUNT.into(),
    })
}

/// Takes one error for success.
fn unless(harmless: Errno, result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(error) if error == harmless => Ok(()),
        other => other,
    }
}
