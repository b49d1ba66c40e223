//! The terminal of a process: a pair in the container's own devpts.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::Winsize;

use super::channel::Child;
use super::mounts::{clone_of, follow};
use super::root::attach;
use crate::error::{Context, Error};
use crate::oci::program::Program;

/// The magic number of devpts in `linux/magic.h`.
const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;

/// Opens a terminal for a program, makes it the process's controlling one, hands its other end to the agent and returns this one. With `console`
/// it appears at `/dev/console` too.
pub fn open(
    program: &Program,
    size: Option<Winsize>,
    console: bool,
    channel: &Child,
) -> Result<OwnedFd, Error> {
    let what = || "opening a terminal in the container's /dev/pts".to_owned();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    // Not through the links below /proc that lead to the guest's files.
    let resolve = ResolveFlags::NO_MAGICLINKS;
    let controller = openat2(CWD, "/dev/pts/ptmx", flags, Mode::empty(), resolve).context(what)?;
    // An image could have put something else there.
    let found = rustix::fs::fstatfs(&controller).context(what)?.f_type as u64;
    if found != DEVPTS_SUPER_MAGIC {
        return Err(Error::FailedPrecondition(
            "a terminal needs a mount of type devpts at /dev/pts".into(),
        ));
    }
    unlockpt(&controller).context(what)?;
    let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = ioctl_tiocgptpeer(&controller, peer).context(what)?;
    if let Some(size) = size {
        rustix::termios::tcsetwinsize(&terminal, size)
            .context(|| "setting the terminal's size".into())?;
    }
    rustix::fs::fchown(&terminal, Some(program.uid), None)
        .context(|| "giving the terminal to the process's user".into())?;
    rustix::process::ioctl_tiocsctty(&terminal)
        .context(|| "making the terminal the controlling one".into())?;
    if console {
        show(&terminal).context(|| "mounting the terminal on /dev/console".into())?;
    }
    channel.hand_over(controller.as_fd())?;
    Ok(terminal)
}

fn show(terminal: &OwnedFd) -> std::io::Result<()> {
    let path = &follow(Path::new("/dev/console"))?;
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map(drop)
        .or_else(|error| if path.exists() { Ok(()) } else { Err(error) })?;
    Ok(attach(&clone_of(terminal)?, path)?)
}
