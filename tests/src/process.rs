//! Other processes: their output, their end.

use std::fs;
use std::process::Command;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::error::{Context, Error, Result};

/// How long a process may take to end.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Runs `command` and returns its standard output; an error holds its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().or_cannot(format!("run {program}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let arguments: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy())
        .collect();
    let cause = String::from_utf8_lossy(&output.stderr);
    Err(Error::Unfit(format!(
        "`{program} {}` failed: {}",
        arguments.join(" "),
        cause.trim()
    )))
}

/// The processes whose program has the file name `program`, without those that such a process made to stand for others: they run
/// the program of their parent.
pub fn named(program: &str) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").or_cannot("read /proc")? {
        let path = entry.or_cannot("read /proc")?.path();
        let pid = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        // What has ended by now, or has no program, has no link.
        let (Some(pid), Ok(file)) = (pid.and_then(Pid::from_raw), fs::read_link(path.join("exe")))
        else {
            continue;
        };
        if file.file_name().is_some_and(|name| name == program) {
            found.push(pid);
        }
    }
    let all = found.clone();
    found.retain(|pid| parent(*pid).is_none_or(|parent| !all.contains(&parent)));
    Ok(found)
}

/// The parent of a process that has not ended.
fn parent(pid: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    Pid::from_raw(line.trim().parse().ok()?)
}

/// Sends `signal`, which must end the process, and returns when it has ended.
pub fn kill(pid: Pid, signal: Signal) -> Result<()> {
    end(pid, Some(signal))
}

/// Returns when the process has ended.
pub fn wait(pid: Pid) -> Result<()> {
    end(pid, None)
}

fn end(pid: Pid, signal: Option<Signal>) -> Result<()> {
    let name = pid.as_raw_pid();
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        // EINVAL: its threads are gone, but its number is still being given back.
        Err(Errno::SRCH | Errno::INVAL) => return Ok(()),
        other => other.or_cannot(format!("find process {name}"))?,
    };
    if let Some(signal) = signal {
        match pidfd_send_signal(&process, signal) {
            Err(Errno::SRCH) => return Ok(()),
            other => other.or_cannot(format!("send a signal to process {name}"))?,
        }
    }
    let limit = Timespec::try_from(END_LIMIT)
        .map_err(|_| Error::Unfit("a time limit that no clock can tell".into()))?;
    let mut waits = [PollFd::new(&process, PollFlags::IN)];
    let ended = poll(&mut waits, Some(&limit)).or_cannot(format!("wait for process {name}"))?;
    if ended == 0 {
        let seconds = END_LIMIT.as_secs();
        return Err(Error::Unfit(format!(
            "process {name} still runs after {seconds} s"
        )));
    }
    Ok(())
}
