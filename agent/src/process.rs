//! A process of a container, from its creation to its exit.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::Pid;
use rustix::termios::Winsize;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::child::channel::Parent;
use crate::error::{Context, Error};
use crate::oci::program::Program;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code, or 128 and the number of the signal that killed it.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// The streams of a process, as the request named them.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    pub input: Option<u64>,
    pub output: Option<u64>,
    pub error: Option<u64>,
}

impl Streams {
    /// Their numbers.
    pub fn names(&self) -> impl Iterator<Item = u64> {
        [self.input, self.output, self.error].into_iter().flatten()
    }
}

/// A process. Its state is locked for moments only.
#[derive(Debug)]
pub struct Process {
    /// The identifier of an exec; empty for a container's init.
    pub exec_id: String,
    /// What it runs.
    pub program: Program,
    /// Its streams.
    pub streams: Streams,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    pid: Option<Pid>,
    descriptor: Option<Arc<OwnedFd>>,
    terminal: Option<OwnedFd>,
    size: Option<Winsize>,
    input: Option<AbortHandle>,
    /// The exit of a process whose start is not answered yet.
    early_exit: Option<Exit>,
}

/// What is to happen next to a process.
#[derive(Debug)]
enum Phase {
    /// It is to be made (execs only).
    Added,
    /// It waits for the order to start its program.
    Created(Parent),
    /// It is starting its program.
    Starting,
    /// It runs its program.
    Running,
    /// It has exited.
    Stopped,
}

/// The phase of a process, as others see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is to be made (execs only).
    Added,
    /// It waits for the order to start.
    Created,
    /// It runs.
    Running,
    /// It has exited.
    Stopped,
}

impl Process {
    /// A process that does not exist yet.
    pub fn new(exec_id: &str, program: Program, streams: Streams) -> Arc<Self> {
        let state = State {
            phase: Phase::Added,
            pid: None,
            descriptor: None,
            terminal: None,
            size: program.size,
            input: None,
            early_exit: None,
        };
        Arc::new(Self {
            exec_id: exec_id.into(),
            program,
            streams,
            state: Mutex::new(state),
            exit: watch::Sender::new(None),
        })
    }

    /// Its number in the guest; 0 as long as it does not exist.
    pub fn pid(&self) -> u32 {
        let pid = self.state().pid;
        pid.map_or(0, |pid| pid.as_raw_nonzero().get() as u32)
    }

    /// Where it stands.
    pub fn status(&self) -> Status {
        match self.state().phase {
            Phase::Added => Status::Added,
            Phase::Created(_) => Status::Created,
            Phase::Starting | Phase::Running => Status::Running,
            Phase::Stopped => Status::Stopped,
        }
    }

    /// Its exit, if it has exited.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its exit.
    pub async fn wait(&self) -> Exit {
        let mut exits = self.exit.subscribe();
        loop {
            if let Some(exit) = *exits.borrow_and_update() {
                return exit;
            }
            // The sender lives as long as this process, which the caller holds.
            if exits.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// A descriptor for it, to enter its namespaces.
    pub fn descriptor(&self) -> Option<Arc<OwnedFd>> {
        self.state().descriptor.clone()
    }

    /// Notes that it exists now.
    pub fn made(&self, pid: Pid, descriptor: OwnedFd) {
        let mut state = self.state();
        state.pid = Some(pid);
        state.descriptor = Some(Arc::new(descriptor));
    }

    /// The size that its terminal is to begin with, if one was asked for.
    pub fn size(&self) -> Option<Winsize> {
        self.state().size
    }

    /// Notes the controlling end of its terminal.
    pub fn has_terminal(&self, terminal: OwnedFd) -> Result<(), Error> {
        let mut state = self.state();
        // A size that was asked for after the process had been made.
        if let Some(size) = state.size {
            rustix::termios::tcsetwinsize(&terminal, size)
                .context(|| "setting the terminal's size".into())?;
        }
        state.terminal = Some(terminal);
        Ok(())
    }

    /// Notes the task that feeds its standard input, which ends with it.
    pub fn has_input(&self, input: AbortHandle) {
        let mut state = self.state();
        match state.phase {
            Phase::Stopped => input.abort(),
            _ => state.input = Some(input),
        }
    }

    /// Notes that it waits for the order to start.
    pub fn is_ready(&self, channel: Parent) {
        let mut state = self.state();
        if !matches!(state.phase, Phase::Stopped) {
            state.phase = Phase::Created(channel);
        }
    }

    /// Begins to start a process that was created: its exit is not told until [`Starting`] is dropped.
    pub fn start(self: &Arc<Self>) -> Result<(Parent, Starting), Error> {
        let mut state = self.state();
        match std::mem::replace(&mut state.phase, Phase::Starting) {
            Phase::Created(channel) => Ok((channel, Starting(self.clone()))),
            other => {
                state.phase = other;
                Err(self.cannot_start(&state))
            }
        }
    }

    /// Begins to make and start a process that was added.
    pub fn start_added(self: &Arc<Self>) -> Result<Starting, Error> {
        let mut state = self.state();
        match state.phase {
            Phase::Added => {
                state.phase = Phase::Starting;
                Ok(Starting(self.clone()))
            }
            _ => Err(self.cannot_start(&state)),
        }
    }

    fn cannot_start(&self, state: &State) -> Error {
        let is = match state.phase {
            Phase::Added | Phase::Created(_) => "is not ready",
            Phase::Starting | Phase::Running => "is running already",
            Phase::Stopped => "has exited",
        };
        Error::FailedPrecondition(format!("cannot start process {:?}: it {is}", self.exec_id))
    }

    /// Ends a process that could not be made.
    pub fn never_was(&self) {
        let at = SystemTime::now();
        self.exited(Exit { status: 255, at });
    }

    /// Notes its exit, and tells it to those who wait unless its start is not answered yet.
    pub fn exited(&self, exit: Exit) {
        {
            let mut state = self.state();
            if let Some(input) = state.input.take() {
                input.abort();
            }
            if matches!(state.phase, Phase::Starting) {
                state.early_exit = Some(exit);
                return;
            }
            state.phase = Phase::Stopped;
        }
        self.exit.send_replace(Some(exit));
    }

    /// Sends it a signal.
    pub fn kill(&self, signal: i32) -> Result<(), Error> {
        let state = self.state();
        match (&state.phase, &state.descriptor) {
            (Phase::Stopped, _) => Err(Error::NotFound("process already finished".into())),
            (_, None) => Err(Error::FailedPrecondition(format!(
                "process {:?} is not created: it has not been started",
                self.exec_id
            ))),
            (_, Some(descriptor)) => match crate::sys::send_signal(descriptor.as_fd(), signal) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    Err(Error::NotFound("process already finished".into()))
                }
                other => other.context(|| format!("sending signal {signal}")),
            },
        }
    }

    /// Changes its terminal's size, now or when it has one. Without a terminal there is nothing to change.
    pub fn resize(&self, size: Winsize) -> Result<(), Error> {
        let mut state = self.state();
        state.size = Some(size);
        match &state.terminal {
            Some(terminal) => rustix::termios::tcsetwinsize(terminal.as_fd(), size)
                .context(|| "setting the terminal's size".into()),
            None => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process whose start is being answered.
#[derive(Debug)]
pub struct Starting(Arc<Process>);

impl Drop for Starting {
    fn drop(&mut self) {
        let exit = {
            let mut state = self.0.state();
            state.phase = Phase::Running;
            state.early_exit.take()
        };
        if let Some(exit) = exit {
            self.0.exited(exit);
        }
    }
}
