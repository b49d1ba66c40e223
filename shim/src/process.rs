//! One process of a container, as containerd knows it: the init of a task, or an exec.

use std::sync::Arc;
use std::time::SystemTime;

use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{Mutex, watch};

use crate::stand_in::StandIn;
use crate::streams::{Stdio, Streams};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It is there, but its program does not run yet.
    Created,
    /// The guest was asked to start it, and has not answered.
    Starting,
    /// Its program runs.
    Running,
    /// The guest was asked to freeze it, and has not answered. Only an init.
    Pausing,
    /// It is frozen. Only an init.
    Paused,
    /// It has ended.
    Stopped,
}

/// What is to happen to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A client wants it to start.
    Start,
    /// The guest has started it.
    Started,
    /// The guest could not start it.
    StartFailed,
    /// A client wants it to freeze.
    Pause,
    /// The guest has frozen it.
    Paused,
    /// The guest could not freeze it, or has thawed it.
    Resumed,
    /// It has ended.
    Exit,
}

impl Phase {
    /// The phase after a change; `None` if the change is impossible in this phase.
    pub fn after(self, change: Change) -> Option<Self> {
        use Phase::{Created, Paused, Pausing, Running, Starting, Stopped};
        match (self, change) {
            (Created, Change::Start) => Some(Starting),
            (Starting, Change::Started) => Some(Running),
            (Starting, Change::StartFailed) => Some(Created),
            (Running, Change::Pause) => Some(Pausing),
            (Pausing, Change::Paused) => Some(Paused),
            (Pausing | Paused, Change::Resumed) => Some(Running),
            // While it starts, the end is held back until the guest has answered.
            (Created | Running | Pausing | Paused, Change::Exit) => Some(Stopped),
            _ => None,
        }
    }

    /// The name of the phase, in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// How and when a process ended: the same for everybody who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code; 128 plus the signal's number for a process that a signal ended.
    pub status: u32,
    /// When the shim learned of it, by the host's clock.
    pub at: SystemTime,
}

/// What becomes of a wait for a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It has ended.
    Exit(Exit),
    /// It could not be started: there is no end to wait for.
    NeverRan,
}

/// The status of a process that ended because its machine did, as if by SIGKILL.
pub const KILLED: u32 = 128 + libc::SIGKILL as u32;

impl Exit {
    /// An end at this moment.
    pub fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }

    /// When it was, for a message.
    pub fn timestamp(&self) -> Timestamp {
        Timestamp::from(self.at)
    }
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Where it is in its life.
    pub phase: Phase,
    /// An end that is not to be told yet.
    pub held: Option<Exit>,
    /// The number of the host's process that stands for it; 0 before there is one.
    pub pid: u32,
    /// That process, until this one ends.
    pub stand_in: Option<StandIn>,
    /// Its streams, as containerd named them.
    pub stdio: Stdio,
    /// Its streams at work.
    pub streams: Option<Streams>,
    /// Held by the Delete that is under way.
    pub deletion: Arc<Mutex<()>>,
    end: watch::Sender<Option<End>>,
}

impl Process {
    /// A process that is created.
    pub fn new(stdio: Stdio, streams: Option<Streams>) -> Self {
        Self {
            phase: Phase::Created,
            held: None,
            pid: 0,
            stand_in: None,
            stdio,
            streams,
            deletion: Arc::default(),
            end: watch::Sender::new(None),
        }
    }

    /// Has a process of the host stand for it, until it ends.
    pub fn represent(&mut self, stand_in: StandIn) {
        self.pid = stand_in.pid();
        self.stand_in = Some(stand_in);
    }

    /// Changes the phase; an error is the phase that does not allow it.
    pub fn change(&mut self, change: Change) -> Result<(), Phase> {
        self.phase = self.phase.after(change).ok_or(self.phase)?;
        if change == Change::Start {
            // It may have failed before.
            self.end.send_replace(None);
        }
        Ok(())
    }

    /// Ends the process, and wakes who waits for it.
    pub fn end(&mut self, exit: Exit) {
        if self.change(Change::Exit).is_ok() {
            if let Some(streams) = &mut self.streams {
                streams.process_ended();
            }
            self.stand_in = None;
            self.end.send_replace(Some(End::Exit(exit)));
        }
    }

    /// Has nobody wait for a process that could not be started.
    pub fn never_ran(&mut self) {
        if self.phase == Phase::Created {
            self.end.send_replace(Some(End::NeverRan));
        }
    }

    /// How it ended, once it has.
    pub fn exit(&self) -> Option<Exit> {
        match *self.end.borrow() {
            Some(End::Exit(exit)) => Some(exit),
            Some(End::NeverRan) | None => None,
        }
    }

    /// Waits for its end; `None` if it is deleted without one.
    pub fn ended(&self) -> impl Future<Output = Option<End>> + Send + use<> {
        let mut end = self.end.subscribe();
        async move {
            let ended = end.wait_for(Option::is_some).await;
            ended.ok().and_then(|end| *end)
        }
    }

    /// Whether a Delete is under way.
    pub fn is_being_deleted(&self) -> bool {
        self.deletion.try_lock().is_err()
    }

    /// Whether its program runs, or is about to.
    pub fn is_alive(&self) -> bool {
        !matches!(self.phase, Phase::Created | Phase::Stopped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 6] = [
        Phase::Created,
        Phase::Starting,
        Phase::Running,
        Phase::Pausing,
        Phase::Paused,
        Phase::Stopped,
    ];

    /// For each change, the phase that each of [`PHASES`] becomes: `.` where the change is impossible.
    const TABLE: [(Change, &str); 7] = [
        (Change::Start, "S....."),
        (Change::Started, ".R...."),
        (Change::StartFailed, ".C...."),
        (Change::Pause, "..p..."),
        (Change::Paused, "...P.."),
        (Change::Resumed, "...RR."),
        (Change::Exit, "E.EEE."),
    ];

    #[test]
    fn the_table_of_changes() {
        for (change, row) in TABLE {
            for (phase, after) in PHASES.into_iter().zip(row.chars()) {
                let expected = "CSRpPE".find(after).map(|index| PHASES[index]);
                assert_eq!(phase.after(change), expected, "{phase:?} {change:?}");
            }
        }
    }

    #[tokio::test]
    async fn everybody_who_waits_is_told_the_same_end_once() {
        let mut process = Process::new(Stdio::default(), None);
        let early = process.ended();
        process.change(Change::Start).unwrap();
        process.change(Change::Started).unwrap();
        assert_eq!(process.change(Change::Start), Err(Phase::Running));
        let exit = Exit::now(7);
        process.end(exit);
        process.end(Exit::now(8));
        assert_eq!(early.await, Some(End::Exit(exit)));
        assert_eq!(process.ended().await, Some(End::Exit(exit)));
        assert_eq!(process.exit(), Some(exit));
        process.never_ran();
        assert_eq!(process.exit(), Some(exit));
        let deleted = Process::new(Stdio::default(), None).ended();
        assert_eq!(deleted.await, None);
    }

    #[tokio::test]
    async fn nobody_waits_for_what_could_not_start_unless_it_is_tried_again() {
        let mut process = Process::new(Stdio::default(), None);
        let early = process.ended();
        process.never_ran();
        assert_eq!(early.await, Some(End::NeverRan));
        assert_eq!(process.ended().await, Some(End::NeverRan));
        assert_eq!(process.exit(), None);
        process.change(Change::Start).unwrap();
        let late = process.ended();
        process.change(Change::Started).unwrap();
        let exit = Exit::now(0);
        process.end(exit);
        assert_eq!(late.await, Some(End::Exit(exit)));
    }
}
