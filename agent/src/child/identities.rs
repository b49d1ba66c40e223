//! User namespaces for mounts whose identities are mapped: nobody runs in them.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitOptions, waitpid};

use crate::error::{Context, Error};
use crate::oci::mapping::Mappings;
use crate::sys::{self, Fork};

/// Makes a user namespace with these mappings. The caller's process numbers must be those of its /proc.
pub fn namespace(mappings: &Mappings) -> Result<OwnedFd, Error> {
    let what = || "making a user namespace for a mount".to_owned();
    let (wait, release) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
    // A namespace is made for a process, which must live until the namespace is held otherwise.
    match sys::fork_into(sys::CLONE_NEWUSER, None).context(what)? {
        Fork::Child => {
            drop(release);
            // Ends when the other does, or is done.
            let _ = rustix::io::read(&wait, &mut [0]);
            sys::exit(0)
        }
        Fork::Parent(pid, _) => {
            drop(wait);
            mappings.write(pid.as_raw_pid().unsigned_abs())?;
            let path = format!("/proc/{}/ns/user", pid.as_raw_pid());
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let namespace = rustix::fs::open(path, flags, Mode::empty()).context(what)?;
            drop(release);
            waitpid(Some(pid), WaitOptions::empty()).context(what)?;
            Ok(namespace)
        }
    }
}
