//! Why a request was refused or failed, as gRPC tells errors apart.

use ttrpc::{Code, get_status};

/// The error of a request. Each variant is a gRPC code; its text names the operation, the value and the cause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such container, process or stream.
    #[error("{0}")]
    NotFound(String),
    /// The identifier is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The container or process is not in a state that allows this.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request asks for something that is malformed or that this runtime does not do.
    #[error("{0}")]
    InvalidArgument(String),
    /// This runtime does not implement the call.
    #[error("{0}")]
    Unimplemented(String),
    /// The system refused.
    #[error("{0}")]
    Failed(String),
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Error::Unimplemented(_) => Code::UNIMPLEMENTED,
            Error::Failed(_) => Code::UNKNOWN,
        };
        Self::RpcStatus(get_status(code, error))
    }
}

/// Says which operation a system error ended.
pub trait Context<T> {
    /// Turns the error into [`Error::Failed`], "`operation`: cause".
    fn context(self, operation: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: std::fmt::Display> Context<T> for Result<T, E> {
    fn context(self, operation: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::Failed(format!("{}: {error}", operation())))
    }
}
