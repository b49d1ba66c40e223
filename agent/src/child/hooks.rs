//! Hooks that run in a container.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::error::{Context, Error};

/// Runs hooks one after the other, each with the container's state on its standard input. One that fails, or runs longer than it may,
/// is an error.
pub fn run(kind: &str, hooks: &[Hook], state: &serde_json::Value) -> Result<(), Error> {
    for hook in hooks {
        let mut state = state.clone();
        state["pid"] = std::process::id().into();
        let name = || format!("hooks.{kind}: {}", hook.path().display());
        let mut arguments = hook.args().iter().flatten();
        let mut command = Command::new(hook.path());
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        command.args(arguments).env_clear().stdin(Stdio::piped());
        for variable in hook.env().iter().flatten() {
            if let Some((name, value)) = variable.split_once('=') {
                command.env(name, value);
            }
        }
        let mut child = command.spawn().context(name)?;
        if let Some(mut input) = child.stdin.take() {
            // A hook need not read it.
            drop(input.write_all(state.to_string().as_bytes()));
        }
        if let Some(seconds) = hook.timeout().filter(|&seconds| seconds > 0) {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or_else(|| Error::Failed(format!("{}: no process", name())))?;
            let process = pidfd_open(pid, PidfdFlags::empty()).context(name)?;
            let limit = Duration::from_secs(seconds as u64);
            let limit = Timespec::try_from(limit).context(name)?;
            let mut poll = [PollFd::new(&process, PollFlags::IN)];
            if rustix::event::poll(&mut poll, Some(&limit)).context(name)? == 0 {
                pidfd_send_signal(&process, Signal::KILL).context(name)?;
                child.wait().context(name)?;
                return Err(Error::Failed(format!(
                    "{} ran longer than its timeout of {seconds} s",
                    name()
                )));
            }
        }
        let status = child.wait().context(name)?;
        if !status.success() {
            return Err(Error::Failed(format!("{} failed: {status}", name())));
        }
    }
    Ok(())
}
