//! What can go wrong around the node.

use std::fmt::Display;
use std::io;
use std::path::PathBuf;

/// A failure, told so that its reader knows what to look at.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something.
    #[error("cannot {operation}: {source}")]
    Io {
        operation: String,
        source: io::Error,
    },
    /// A step's command failed.
    #[error("{step} failed: {cause}\nits log: {}", log.display())]
    Step {
        step: String,
        cause: String,
        log: PathBuf,
    },
    /// The emulated node ended before its command did.
    #[error(
        "the node ended before its command did: {cause}; the last lines of its console:\n{console}"
    )]
    Node { cause: String, console: String },
    /// Something is not as it must be.
    #[error("{0}")]
    Unfit(String),
}

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what was being done when the system refused.
pub trait Context<T> {
    /// Wraps the error into "cannot OPERATION: cause".
    fn or_cannot(self, operation: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn or_cannot(self, operation: impl Display) -> Result<T> {
        self.map_err(|error| Error::Io {
            operation: operation.to_string(),
            source: error.into(),
        })
    }
}
