//! Other processes: their output, their end.

use std::process::Command;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::error::{Context, Error, Result};

/// How long a killed process may take to be gone.
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

/// Sends `signal`, which must end the process, and returns when it has ended.
pub fn kill(pid: Pid, signal: Signal) -> Result<()> {
    let name = pid.as_raw_pid();
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(()),
        other => other.or_cannot(format!("find process {name}"))?,
    };
    match pidfd_send_signal(&process, signal) {
        Err(Errno::SRCH) => return Ok(()),
        other => other.or_cannot(format!("send a signal to process {name}"))?,
    }
    let limit = Timespec::try_from(END_LIMIT)
        .map_err(|_| Error::Unfit("a time limit that no clock can tell".into()))?;
    let mut waits = [PollFd::new(&process, PollFlags::IN)];
    let ended = poll(&mut waits, Some(&limit)).or_cannot(format!("wait for process {name}"))?;
    if ended == 0 {
        let seconds = END_LIMIT.as_secs();
        return Err(Error::Unfit(format!(
            "process {name} still runs {seconds} s after signal {}",
            signal.as_raw()
        )));
    }
    Ok(())
}
