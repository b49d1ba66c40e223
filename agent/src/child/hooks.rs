//! Hooks that run in a container.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::{Context, Error};

/// How much of what a failed hook said is passed on, from the end.
const MAX_SAID: u64 = 1024;

/// Runs hooks one after the other, each with the container's state, whose status is `status`, on its standard input. Those that are given no
/// environment have this one. One that fails, or runs longer than it may, is an error, and those after it are not run.
pub fn run(
    kind: &str,
    hooks: &[Hook],
    environment: &[CString],
    state: &serde_json::Value,
    status: &str,
) -> Result<(), Error> {
    for hook in hooks {
        let mut state = state.clone();
        state["pid"] = std::process::id().into();
        state["status"] = status.into();
        let mut said = file("output").context(|| name(kind, hook))?;
        match run_one(hook, environment, &state, &said) {
            Ok(()) => {}
            Err(cause) => {
                let words = last_words(&mut said).unwrap_or_default();
                let separator = if words.is_empty() { "" } else { ": " };
                return Err(Error::Failed(format!(
                    "{} {cause}{separator}{words}",
                    name(kind, hook)
                )));
            }
        }
    }
    Ok(())
}

fn name(kind: &str, hook: &Hook) -> String {
    format!("hooks.{kind}: {}", hook.path().display())
}

/// Files in memory take the place of pipes: a hook that reads nothing, or leaves its output open to others, holds nobody up.
fn file(name: &str) -> io::Result<File> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?.into())
}

/// Runs a hook; the error says how it failed.
fn run_one(
    hook: &Hook,
    environment: &[CString],
    state: &serde_json::Value,
    said: &File,
) -> Result<(), String> {
    let start = || -> io::Result<_> {
        let mut input = file("state")?;
        input.write_all(state.to_string().as_bytes())?;
        input.rewind()?;
        let mut arguments = hook.args().iter().flatten();
        let mut command = Command::new(hook.path());
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        let own = hook.env().iter().flatten().map(String::as_str);
        let mut variables: Vec<&str> = own.collect();
        if variables.is_empty() {
            // Text, as it comes from a JSON document.
            variables = environment.iter().flat_map(|text| text.to_str()).collect();
        }
        let variables = variables.iter().filter_map(|text| text.split_once('='));
        command
            .args(arguments)
            .env_clear()
            .envs(variables)
            // At the start this process's own directory is the program's.
            .current_dir("/")
            .stdin(input)
            .stdout(Stdio::from(said.try_clone()?))
            .stderr(Stdio::from(said.try_clone()?));
        command.spawn()
    };
    let mut child = start().map_err(|error| format!("does not start: {error}"))?;
    let wait = |child: &mut std::process::Child| {
        let status = child.wait();
        status.map_err(|error| format!("cannot be waited for: {error}"))
    };
    if let Some(seconds) = hook.timeout().filter(|&seconds| seconds > 0) {
        let ended = ends_within(child.id(), Duration::from_secs(seconds as u64));
        if !ended.map_err(|error| format!("cannot be timed: {error}"))? {
            child
                .kill()
                .map_err(|error| format!("cannot be killed: {error}"))?;
            wait(&mut child)?;
            return Err(format!("ran longer than its timeout of {seconds} s"));
        }
    }
    let status = wait(&mut child)?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("failed: {status}"))
    }
}

/// Whether a child ends in time.
fn ends_within(child: u32, limit: Duration) -> io::Result<bool> {
    let pid = i32::try_from(child).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("it has no number"))?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut poll = [PollFd::new(&process, PollFlags::IN)];
    Ok(rustix::event::poll(&mut poll, Some(&limit))? != 0)
}

fn last_words(said: &mut File) -> io::Result<String> {
    let length = said.metadata()?.len();
    said.seek(SeekFrom::Start(length.saturating_sub(MAX_SAID)))?;
    let mut words = Vec::new();
    said.take(MAX_SAID).read_to_end(&mut words)?;
    Ok(String::from_utf8_lossy(&words).trim().to_owned())
}
