//! The standard streams of a process: pipes or a terminal on its side, the host's streams on the other.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::Uid;
use rustix::pipe::PipeFlags;

use crate::child::Stdio;
use crate::error::{Context, Error};
use crate::process::Process;
use crate::relay;
use crate::socket::Socket;
use crate::streams::Streams;

/// The agent's ends of a process's pipes, with the streams that they belong to.
#[derive(Debug, Default)]
pub struct Relays {
    input: Option<(u64, OwnedFd)>,
    outputs: Vec<(u64, OwnedFd)>,
}

/// Makes the pipes of a process that has no terminal; `null` stands for a stream that has no name. `owner` is the process's user, who may then open
/// its streams by their paths in `/proc`.
pub fn prepare(
    process: &Process,
    owner: u32,
    null: &OwnedFd,
) -> Result<(Option<Stdio>, Relays), Error> {
    if process.program.terminal {
        return Ok((None, Relays::default()));
    }
    let what = || "making the pipes of a process".to_owned();
    let mut relays = Relays::default();
    let input = match process.streams.input {
        None => null.try_clone().context(what)?,
        Some(name) => {
            let (input, ours) = pipe(owner).context(what)?;
            rustix::io::ioctl_fionbio(&ours, true).context(what)?;
            relays.input = Some((name, ours));
            input
        }
    };
    let mut output = |name: Option<u64>| match name {
        None => null.try_clone().context(what),
        Some(name) => {
            let (ours, output) = pipe(owner).context(what)?;
            rustix::io::ioctl_fionbio(&ours, true).context(what)?;
            relays.outputs.push((name, ours));
            Ok(output)
        }
    };
    let streams = &process.streams;
    let standard_output = output(streams.output)?;
    let error = if streams.error.is_some() && streams.error == streams.output {
        standard_output.try_clone().context(what)?
    } else {
        output(streams.error)?
    };
    let stdio = Stdio {
        input,
        output: standard_output,
        error,
    };
    Ok((Some(stdio), relays))
}

/// A pipe's reading and writing end.
fn pipe(owner: u32) -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    if owner != 0 {
        rustix::fs::fchown(&read, Some(Uid::from_raw(owner)), None)?;
    }
    Ok((read, write))
}

impl Relays {
    /// Copies between the pipes and the streams, each as soon as the host has opened it.
    pub fn start(self, process: &Process, streams: &Arc<Streams>) {
        for (name, pipe) in self.outputs {
            spawn(streams, name, |stream| relay::output(pipe, stream));
        }
        if let Some((name, pipe)) = self.input {
            let copying = spawn(streams, name, |stream| relay::input(stream, pipe));
            process.has_input(copying);
        }
    }
}

/// Copies between a process's terminal and its streams.
pub fn connect_terminal(
    process: &Arc<Process>,
    terminal: OwnedFd,
    streams: &Arc<Streams>,
) -> Result<(), Error> {
    let what = || "connecting a terminal".to_owned();
    rustix::io::ioctl_fionbio(&terminal, true).context(what)?;
    let again = |terminal: &OwnedFd| terminal.as_fd().try_clone_to_owned().context(what);
    if let Some(name) = process.streams.output {
        let terminal = again(&terminal)?;
        let process = process.clone();
        let ended = async move {
            process.wait().await;
        };
        spawn(streams, name, |stream| {
            relay::terminal_output(terminal, ended, stream)
        });
    }
    if let Some(name) = process.streams.input {
        let terminal = again(&terminal)?;
        let copying = spawn(streams, name, |stream| {
            relay::terminal_input(stream, terminal)
        });
        process.has_input(copying);
    }
    process.has_terminal(terminal)
}

/// Starts to copy when the stream is there. A copy that fails has lost the other side, and so has nothing to tell: its end closes this one.
fn spawn<F>(
    streams: &Arc<Streams>,
    name: u64,
    copy: impl FnOnce(Socket) -> F + Send + 'static,
) -> tokio::task::AbortHandle
where
    F: Future<Output = std::io::Result<()>> + Send,
{
    let streams = streams.clone();
    let copying = tokio::spawn(async move {
        if let Some(stream) = streams.take(name).await {
            drop(copy(stream).await);
        }
    });
    copying.abort_handle()
}
