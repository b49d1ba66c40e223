//! Checks of what the host's kernel offers beside KVM.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use bulkhead_vmm::launch::{DEFAULT_UID_BASE, launch, unique_uid};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Finding, Verdict};

const LINUX: &str = "use Linux 5.11 or later";

/// All checks of the kernel.
pub fn check() -> Vec<Finding> {
    vec![
        Finding::new("user", user(nix::unistd::geteuid().is_root())),
        Finding::new("memfd", memfd()),
        Finding::new("pidfd", pidfd()),
        Finding::new("close_range", close_range()),
        Finding::new(
            "seccomp",
            seccomp(
                &fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default(),
            ),
        ),
        Finding::new("jail", jail()),
        Finding::new(
            "cgroups",
            cgroups(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()),
        ),
        Finding::new(
            "tun",
            tun(OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .err()),
        ),
    ]
}

fn user(root: bool) -> Verdict {
    if root {
        Verdict::good("root")
    } else {
        Verdict::bad(
            "not root: what only root can see was not seen",
            "run it as root, as containerd runs the shim",
        )
    }
}

fn memfd() -> Verdict {
    match memfd_create(c"bulkhead-check", MFdFlags::MFD_CLOEXEC) {
        Ok(_) => Verdict::good("guest memory can be made"),
        Err(errno) => Verdict::bad(format!("memfd_create: {errno}"), LINUX),
    }
}

fn pidfd() -> Verdict {
    // SAFETY: numbers only.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    match (Errno::result(descriptor), i32::try_from(descriptor)) {
        (Ok(_), Ok(descriptor)) => {
            // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
            drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
            Verdict::good("the end of a VMM can be waited for")
        }
        (Err(errno), _) => Verdict::bad(format!("pidfd_open: {errno}"), LINUX),
        (Ok(_), Err(_)) => Verdict::bad("pidfd_open returned no descriptor", LINUX),
    }
}

fn close_range() -> Verdict {
    let none = u32::MAX;
    // SAFETY: numbers only; there is no descriptor of that number.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, none, none, libc::CLOSE_RANGE_CLOEXEC) };
    match Errno::result(result) {
        Ok(_) => Verdict::good("a VMM inherits no descriptor"),
        Err(errno) => Verdict::bad(format!("close_range: {errno}"), LINUX),
    }
}

fn seccomp(actions: &str) -> Verdict {
    if actions
        .split_whitespace()
        .any(|action| action == "kill_process")
    {
        Verdict::good("system calls can be filtered")
    } else {
        Verdict::bad(
            "the kernel cannot filter system calls",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        )
    }
}

/// Starts this very program in the jail of a VMM, and kills it.
fn jail() -> Verdict {
    let launched =
        unique_uid(DEFAULT_UID_BASE).and_then(|uid| launch(Path::new("/proc/self/exe"), uid));
    match launched {
        Ok(_) => Verdict::good("a process without privilege starts in namespaces of its own"),
        Err(error) => Verdict::error(error),
    }
}

fn cgroups(mountinfo: &str) -> Verdict {
    let is = |kind: &str| {
        mountinfo
            .lines()
            .any(|line| line.contains(&format!(" - {kind} ")))
    };
    match (is("cgroup2"), is("cgroup")) {
        (true, false) => Verdict::good("version 2"),
        (_, true) => Verdict::good("version 1"),
        (false, false) => Verdict::bad(
            "no cgroup file system is mounted",
            "mount -t cgroup2 none /sys/fs/cgroup",
        ),
    }
}

fn tun(error: Option<io::Error>) -> Verdict {
    match error {
        None => Verdict::good("network devices can be made"),
        Some(error) => Verdict::bad(
            format!("cannot open /dev/net/tun: {error}"),
            "modprobe tun; in a container, pass the device in",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rest depends on how the host is set up.
    #[test]
    fn this_host_has_what_tests_need_too() {
        let findings = check();
        assert_eq!(findings.len(), 8);
        for finding in findings {
            let depends = ["cgroups", "tun"].contains(&finding.what);
            assert!(depends || finding.verdict.is_good(), "{finding}");
        }
    }

    #[test]
    fn what_is_missing_is_told() {
        for (verdict, part) in [
            (user(false), "run it as root"),
            (seccomp("trap errno log allow"), "CONFIG_SECCOMP_FILTER"),
            (seccomp(""), "CONFIG_SECCOMP_FILTER"),
            (
                cgroups("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw"),
                "mount -t cgroup2",
            ),
            (tun(Some(io::ErrorKind::NotFound.into())), "modprobe tun"),
        ] {
            assert!(!verdict.is_good());
            assert!(
                Finding::new("x", verdict).to_string().contains(part),
                "{part}"
            );
        }
    }

    #[test]
    fn both_versions_of_cgroups_are_known() {
        let one = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let two = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroups(two), Verdict::good("version 2"));
        assert_eq!(cgroups(&format!("{one}{two}")), Verdict::good("version 1"));
    }
}
