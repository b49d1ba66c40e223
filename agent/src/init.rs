//! What PID 1 does before it serves: the guest's file systems, its loopback interface, its control groups.

use std::path::Path;

use rustix::fs::symlink;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::agent::Paths;
use crate::error::{Context, Error};
use crate::{cgroup, sys};

/// Where the control groups are mounted.
const CGROUP: &str = "/sys/fs/cgroup";

/// Source or type, place, flags, data.
const FILE_SYSTEMS: [(&str, &str, MountFlags, &std::ffi::CStr); 8] = {
    const STRICT: MountFlags = MountFlags::NOSUID
        .union(MountFlags::NODEV)
        .union(MountFlags::NOEXEC);
    const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
    const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
    [
        ("proc", "/proc", STRICT, c""),
        ("sysfs", "/sys", STRICT, c""),
        // The kernel does not mount it by itself: the root is already a read-only disk when it would.
        ("devtmpfs", "/dev", DEVICES, c"mode=755"),
        ("tmpfs", "/run", PLAIN, c"mode=755"),
        ("cgroup2", CGROUP, STRICT, c""),
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

/// Makes the guest ready for containers.
pub fn prepare() -> Result<Paths, Error> {
    for (kind, place, flags, data) in FILE_SYSTEMS {
        let what = || format!("mounting {kind} on {place}");
        if Path::new(place).starts_with("/dev") && place != "/dev" {
            match rustix::fs::mkdir(place, rustix::fs::Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).context(what),
            }
        }
        mount(kind, place, kind, flags, data).context(what)?;
    }
    for (target, link) in LINKS {
        symlink(target, link).context(|| format!("linking {link}"))?;
    }
    sys::loopback_up().context(|| "bringing the loopback interface up".into())?;
    cgroup::delegate(Path::new(CGROUP))?;
    Ok(Paths {
        run: "/run".into(),
        cgroup: CGROUP.into(),
    })
}
