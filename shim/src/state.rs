//! What a shim writes down early, so that `delete` finds what a dead shim left behind.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::PollFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::readiness::happens;

/// The file's name in the bundle of the shim's first task.
const FILE: &str = "bulkhead.json";

/// The file's name in the bundle of a container whose poststop hooks somebody runs, or has run.
const POSTSTOP: &str = "bulkhead-poststop";

/// The resources of a sandbox that outlive its shim's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The shim. Its machine ends when it ends.
    pub shim: ProcessId,
    /// The shim's listening socket.
    pub socket: PathBuf,
    /// The control group that the shim and the machine are in, below the root of each hierarchy.
    pub cgroup: Option<PathBuf>,
}

impl State {
    /// Writes the state into a bundle, in place of an older one, all or nothing.
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        write_atomically(&bundle.join(FILE), &serde_json::to_vec(self)?)
    }

    /// Reads the state from a bundle; `None` if no shim was ever started there.
    pub fn read(bundle: &Path) -> io::Result<Option<Self>> {
        match fs::read(bundle.join(FILE)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Notes in a container's bundle that its poststop hooks are about to run; whether nobody did before. The shim runs them when it deletes the
/// container, and `delete` comes afterwards all the same, perhaps more than once.
pub fn claim_poststop(bundle: &Path) -> bool {
    match File::create_new(bundle.join(POSTSTOP)) {
        // Where it cannot be noted, hooks that run twice are better than hooks that never run.
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::AlreadyExists,
    }
}

/// Forgets what [`claim_poststop`] noted: a container is made in the bundle, perhaps again.
pub fn release_poststop(bundle: &Path) {
    // It is rarely there.
    let _ = fs::remove_file(bundle.join(POSTSTOP));
}

/// Writes a file that is never seen half-written.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    fs::write(&temporary, content)?;
    fs::rename(&temporary, path)
}

/// A process, told apart from a later one with the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process's number.
    pub pid: i32,
    /// When it started, in clock ticks since the host's boot (`starttime` of proc(5)).
    pub start: u64,
}

impl ProcessId {
    /// Identifies a running process.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The command's name, in parentheses, may hold anything; `starttime` is field 22, the twentieth after it.
        let start = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(19))
            .and_then(|field| field.parse().ok())
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))?;
        Ok(Self { pid, start })
    }

    /// Kills the process and waits until it is gone, at most for `patience`. A process that is gone already is fine.
    pub fn kill(&self, patience: Duration) -> io::Result<()> {
        let Some(pidfd) = self.open()? else {
            return Ok(());
        };
        match pidfd_send_signal(&pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
        if happens(&pidfd, PollFlags::POLLIN, patience)? {
            return Ok(());
        }
        let process = self.pid;
        let text = format!("process {process} is still there {patience:?} after SIGKILL");
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    }

    /// Waits until the process is gone, at most for `patience`. Whether it is, [`kill`](Self::kill) tells.
    pub fn wait(&self, patience: Duration) {
        if let Ok(Some(pidfd)) = self.open() {
            let _ = happens(&pidfd, PollFlags::POLLIN, patience);
        }
    }

    /// Opens the process, if it still is this one.
    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // EINVAL: its threads are gone, but its number is still being given back.
            Err(Errno::SRCH | Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        match Self::of(self.pid) {
            Ok(now) if now == *self => Ok(Some(pidfd)),
            Ok(_) => Ok(None),
            Err(error) if is_of_no_process(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Whether a file of `/proc/PID` could not be opened, or not read, because the process has ended.
fn is_of_no_process(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_state_is_read_as_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(State::read(dir.path()).unwrap(), None);
        let mut state = State {
            shim: ProcessId { pid: 2, start: 3 },
            socket: "/run/containerd/s/0".into(),
            cgroup: None,
        };
        state.write(dir.path()).unwrap();
        state.cgroup = Some("default/c1".into());
        state.write(dir.path()).unwrap();
        assert_eq!(State::read(dir.path()).unwrap(), Some(state));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(State::read(dir.path()).is_err());
    }

    #[test]
    fn who_comes_first_runs_the_hooks() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            assert!(claim_poststop(dir.path()));
            assert!(!claim_poststop(dir.path()));
            release_poststop(dir.path());
        }
        assert!(claim_poststop(&dir.path().join("missing")));
    }

    #[test]
    fn only_the_very_process_is_killed() {
        let mut child = Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        let other = ProcessId {
            start: id.start + 1,
            ..id
        };
        other.kill(Duration::from_secs(5)).unwrap();
        assert!(
            child.try_wait().unwrap().is_none(),
            "it has another start time"
        );
        id.kill(Duration::from_secs(5)).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9)
        );
        id.kill(Duration::from_secs(5)).unwrap();
    }
}
