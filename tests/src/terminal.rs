//! The terminal of whoever types into the node.

use std::io::{IsTerminal, stdin, stdout};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::error::{Context, Result};

/// Our terminal in raw mode, as long as this lives: each key goes to the node, Ctrl-C too.
#[derive(Debug)]
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Whether somebody sits there: standard input and output are terminals.
    pub fn possible() -> bool {
        stdin().is_terminal() && stdout().is_terminal()
    }

    /// Switches the terminal over.
    pub fn new() -> Result<Self> {
        let before = tcgetattr(stdin()).or_cannot("read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Drain, &raw)
            .or_cannot("change the terminal's settings")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing better can be done if it fails.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}

/// The terminal's rows and columns.
pub fn size() -> Result<(u16, u16)> {
    let size = tcgetwinsize(stdout()).or_cannot("read the terminal's size")?;
    Ok((size.ws_row, size.ws_col))
}
