//! Takes the exits of all children: of containers' processes, and of orphans, which become children of PID 1.

use std::io;
use std::time::SystemTime;

use rustix::process::WaitOptions;
use tokio::io::Interest;

use crate::process::Exit;
use crate::sys::{asynchronous, child_signal};

/// Passes on each exit, as the number of the process and how it ended. Returns only on failure.
pub async fn reap(mut exited: impl FnMut(u32, Exit)) -> io::Error {
    match run(&mut exited).await {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn run(exited: &mut impl FnMut(u32, Exit)) -> io::Result<std::convert::Infallible> {
    let signal = asynchronous(child_signal()?, Interest::READABLE)?;
    loop {
        // One signal may stand for many exits, and may come before its descriptor was there.
        while let Some((pid, exit)) = next()? {
            exited(pid, exit);
        }
        signal
            .async_io(Interest::READABLE, |signal| {
                Ok(rustix::io::read(signal, &mut [0u8; SIGNAL_SIZE])?)
            })
            .await?;
    }
}

/// `sizeof(struct signalfd_siginfo)`.
const SIGNAL_SIZE: usize = 128;

fn next() -> io::Result<Option<(u32, Exit)>> {
    let (pid, status) = match rustix::process::wait(WaitOptions::NOHANG) {
        Err(rustix::io::Errno::CHILD) => return Ok(None),
        found => match found? {
            Some(found) => found,
            None => return Ok(None),
        },
    };
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code as u32,
        (None, Some(signal)) => 128 + signal as u32,
        (None, None) => return Err(io::Error::other("a child ended in no known way")),
    };
    let at = SystemTime::now();
    Ok(Some((
        pid.as_raw_nonzero().get() as u32,
        Exit { status: code, at },
    )))
}
