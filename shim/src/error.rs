//! The errors of the Task service, and the one place that gives them their gRPC codes.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use ttrpc::{Code, get_status};

use crate::annotations::UnknownKind;
use crate::logging::truncate;
use crate::process::Phase;
use crate::{
    affinity, cgroup, config, hooks, machine, network, options, rootfs, sizing, spec, streams,
};

/// The longest text of an error from the guest that is passed on, in bytes.
const MAX_GUEST_TEXT: usize = 4096;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    #[error("container {container:?} has no process {exec:?}")]
    NoProcess { container: String, exec: String },
    /// The text is one that containerd's clients look for.
    #[error("process already finished")]
    Finished,
    #[error("container {0:?} exists already")]
    ContainerExists(String),
    #[error("container {container:?} has a process {exec:?} already")]
    ProcessExists { container: String, exec: String },
    #[error("cannot {operation} a process that is {}", phase.name())]
    Phase {
        operation: &'static str,
        phase: Phase,
    },
    #[error(
        "no microVM runs for the pod of this container: its sandbox was not created, or has ended"
    )]
    NoMachine,
    #[error("{field} is {value:?}: {problem}")]
    Invalid {
        field: &'static str,
        value: String,
        problem: &'static str,
    },
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("{operation} {}: {source}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("open a stream to the guest: {0}")]
    Stream(io::Error),
    #[error("take random bytes for the guest: {0}")]
    Entropy(io::Error),
    #[error(transparent)]
    Kind(#[from] UnknownKind),
    #[error(transparent)]
    Options(#[from] options::Error),
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Sizing(#[from] sizing::Error),
    #[error(transparent)]
    Affinity(#[from] affinity::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error("start the host's process that stands for one of the guest: {0}")]
    StandIn(io::Error),
    #[error(transparent)]
    Streams(#[from] streams::Error),
    #[error(transparent)]
    Network(#[from] network::Error),
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The guest's agent refused. Its code and text are passed on, as far as they make sense.
    #[error("{text}")]
    Agent { code: Code, text: String },
    #[error(
        "the connection to the microVM's agent broke ({0}); what became of the request is not known"
    )]
    Disconnected(ttrpc::Error),
    #[error("the guest has not answered for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the shim is shutting down")]
    ShuttingDown,
}

impl Error {
    /// Takes over an error that the agent answered. The guest may be hostile: an unknown code, or one that says that all is well, becomes
    /// `UNKNOWN`, and the text is bounded and printable.
    pub fn from_agent(status: &ttrpc::Status) -> Self {
        let code = match status.code.enum_value() {
            Ok(code) if code != Code::OK => code,
            _ => Code::UNKNOWN,
        };
        let mut text: String = status
            .message
            .chars()
            .map(|c| {
                if c.is_control() && c != '\n' {
                    '\u{fffd}'
                } else {
                    c
                }
            })
            .collect();
        truncate(&mut text, MAX_GUEST_TEXT);
        Self::Agent { code, text }
    }

    /// The gRPC code by which clients tell errors apart.
    pub fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Finished => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ProcessExists { .. } => Code::ALREADY_EXISTS,
            Self::Phase { .. } | Self::NoMachine => Code::FAILED_PRECONDITION,
            Self::Invalid { .. } | Self::Kind(_) | Self::Options(_) | Self::Config(_) => {
                Code::INVALID_ARGUMENT
            }
            Self::Sizing(error) => match error {
                sizing::Error::Annotation { .. } => Code::INVALID_ARGUMENT,
                sizing::Error::Host(_) => Code::INTERNAL,
            },
            Self::Cgroup(error) => match error {
                cgroup::Error::Path { .. } => Code::INVALID_ARGUMENT,
                cgroup::Error::Io { .. } | cgroup::Error::NotMounted => Code::INTERNAL,
            },
            Self::Affinity(_) => Code::INVALID_ARGUMENT,
            Self::Rootfs(error) => error.code(),
            Self::Unsupported(_) | Self::Spec(spec::Error::BlockDevice { .. }) => {
                Code::UNIMPLEMENTED
            }
            Self::Io { .. }
            | Self::Stream(_)
            | Self::Entropy(_)
            | Self::Hook(_)
            | Self::StandIn(_) => Code::INTERNAL,
            Self::Spec(
                spec::Error::Json { .. }
                | spec::Error::HostNetwork
                | spec::Error::TwoNamespaces(_)
                | spec::Error::ForeignNamespace(_)
                | spec::Error::ForeignNetwork(_)
                | spec::Error::SandboxDomain(_)
                | spec::Error::Backing(_),
            )
            | Self::Streams(_) => Code::INVALID_ARGUMENT,
            Self::Network(error) => match error {
                network::Error::Kind { .. } => Code::UNIMPLEMENTED,
                _ => Code::INTERNAL,
            },
            Self::Machine(error) => match error {
                machine::Error::Stopped(_) | machine::Error::Timeout { .. } => Code::UNAVAILABLE,
                machine::Error::Launch(_)
                | machine::Error::Open { .. }
                | machine::Error::Image { .. }
                | machine::Error::Io { .. }
                | machine::Error::Control(_)
                | machine::Error::Refused { .. } => Code::INTERNAL,
            },
            Self::Agent { code, .. } => *code,
            Self::Silent(_) => Code::DEADLINE_EXCEEDED,
            Self::Disconnected(_) | Self::ShuttingDown => Code::UNAVAILABLE,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(get_status(error.code(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_code_and_text_are_passed_on_but_not_believed() {
        let agent = |code: i32, text: &str| {
            let mut status = ttrpc::Status::new();
            status.code = protobuf::EnumOrUnknown::from_i32(code);
            status.message = text.into();
            let error = Error::from_agent(&status);
            (error.code(), error.to_string())
        };
        assert_eq!(
            agent(5, "no such process"),
            (Code::NOT_FOUND, "no such process".into())
        );
        assert_eq!(agent(0, "fine"), (Code::UNKNOWN, "fine".into()));
        assert_eq!(
            agent(99, "\x1b[2J\nx"),
            (Code::UNKNOWN, "\u{fffd}[2J\nx".into())
        );
        assert!(agent(2, &"x".repeat(1 << 20)).1.len() <= MAX_GUEST_TEXT);
    }

    #[test]
    fn errors_travel_with_their_code() {
        let error = Error::Phase {
            operation: "start",
            phase: Phase::Running,
        };
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
            panic!("no status");
        };
        assert_eq!(status.code(), Code::FAILED_PRECONDITION);
        assert_eq!(status.message, "cannot start a process that is running");
    }
}
