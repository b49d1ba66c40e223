//! Logging programs of the host: `binary:///path?key=value`, as nerdctl uses them.
//!
//! The program gets the read end of a process's standard output as descriptor 3 and of its standard error as descriptor 4; by closing
//! descriptor 5, or writing to it, it says that it is ready. The keys and values of the URI are its arguments. With `binary-v2`, of containerd
//! 2.2, it has to write: one that crashes closes its descriptors, too.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// How long a program may take to be ready.
const READY_PATIENCE: Duration = Duration::from_secs(10);

/// The descriptors that the program finds: standard output, standard error, ready.
const DESCRIPTORS: [RawFd; 3] = [3, 4, 5];

/// Descriptors from here on are none of those.
const ABOVE: RawFd = 10;

/// Whose output it is.
#[derive(Debug, Clone, Default)]
pub struct Owner {
    /// The namespace of containerd.
    pub namespace: String,
    /// The container's identifier.
    pub id: String,
}

/// How a program says that it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// It closes the descriptor, or writes to it.
    Closes,
    /// It writes to the descriptor.
    Writes,
}

/// Starts the program that the rest of a URI names, after `binary://`, and returns the write ends of its pipes.
///
/// # Errors
///
/// It cannot be executed, ends before it is ready, or takes too long.
pub async fn start(rest: &str, owner: &Owner, ready: Ready) -> io::Result<(OwnedFd, OwnedFd)> {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut command = Command::new(decode(path)?);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        for word in [key, value] {
            command.arg(decode(&word.replace('+', " "))?);
        }
    }
    let (out_reader, out) = pipe()?;
    let (error_reader, error) = pipe()?;
    let (readiness, ready_writer) = pipe()?;
    let ends = [
        above(out_reader)?,
        above(error_reader)?,
        above(ready_writer)?,
    ];
    let sources = [
        ends[0].as_raw_fd(),
        ends[1].as_raw_fd(),
        ends[2].as_raw_fd(),
    ];
    command
        .env_clear()
        .env("CONTAINER_ID", &owner.id)
        .env("CONTAINER_NAMESPACE", &owner.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    let give = move || {
        for (source, target) in sources.into_iter().zip(DESCRIPTORS) {
            // SAFETY: dup2 takes numbers, and may be called between fork and exec. The sources are open, and none of the targets.
            if unsafe { libc::dup2(source, target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only, and neither allocates nor takes locks.
    unsafe { command.pre_exec(give) };
    let mut child = tokio::process::Command::from(command).spawn()?;
    drop(ends);
    let mut readiness = pipe::Receiver::from_owned_fd_unchecked(nonblocking(readiness)?)?;
    let mut byte = [0];
    let refused = match tokio::time::timeout(READY_PATIENCE, readiness.read(&mut byte)).await {
        Ok(Ok(0)) if ready == Ready::Writes => Some(io::Error::other(
            "the logging program did not say that it is ready",
        )),
        Ok(read) => read.err(),
        Err(_) => Some(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the logging program was not ready after {READY_PATIENCE:?}"),
        )),
    };
    if let Some(error) = refused {
        // It does not matter whether it ends by itself just now.
        let _ = child.start_kill();
        return Err(error);
    }
    if let Some(status) = child.try_wait()? {
        return Err(io::Error::other(format!(
            "the logging program ended: {status}"
        )));
    }
    // It ends when it has read everything; somebody has to wait for it.
    tokio::spawn(async move { child.wait().await });
    Ok((nonblocking(out)?, nonblocking(error)?))
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(OFlag::O_CLOEXEC)?)
}

/// Moves a descriptor out of the way of those that the program is given.
fn above(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let moved = fcntl(&descriptor, FcntlArg::F_DUPFD_CLOEXEC(ABOVE))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(moved) })
}

fn nonblocking(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    fcntl(&descriptor, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(descriptor)
}

/// Undoes the percent-encoding of a URI.
pub fn decode(text: &str) -> io::Result<String> {
    let invalid = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{text:?} is no part of a URI"),
        )
    };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => {
                let digits = [rest.next(), rest.next()];
                let digit = |digit: Option<u8>| (digit? as char).to_digit(16);
                let [Some(high), Some(low)] = digits.map(digit) else {
                    return Err(invalid());
                };
                (high * 16 + low) as u8
            }
            byte => byte,
        };
        bytes.push(byte);
    }
    String::from_utf8(bytes).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::testing::alone;

    fn owner() -> Owner {
        Owner {
            namespace: "n".into(),
            id: "c1".into(),
        }
    }

    /// A URI, without its scheme, for a program that writes what it is given into `log`.
    fn program(dir: &tempfile::TempDir, script: &str) -> String {
        let path = dir.path().join("a logger");
        std::fs::write(
            &path,
            format!("#!/bin/sh\ncd '{}'\n{script}\n", dir.path().display()),
        )
        .unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string().replace(' ', "%20")
    }

    #[tokio::test]
    async fn a_program_gets_output_arguments_and_names() {
        if !alone() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let script = r#"
            echo "$1=$2 $CONTAINER_NAMESPACE/$CONTAINER_ID" > log
            exec 5>&-
            cat <&3 >> log
            cat <&4 >> log
            mv log done"#;
        let uri = program(&dir, script) + "?key=a%2Fb+c";
        let done =
            crate::readiness::Watch::new(dir.path(), nix::sys::inotify::AddWatchFlags::IN_MOVED_TO)
                .unwrap();
        let (out, error) = start(&uri, &owner(), Ready::Closes).await.unwrap();
        io::Write::write_all(&mut File::from(out), b"out\n").unwrap();
        io::Write::write_all(&mut File::from(error), b"error\n").unwrap();
        done.changed().await.unwrap();
        let log = std::fs::read_to_string(dir.path().join("done")).unwrap();
        assert_eq!(log, "key=a/b c n/c1\nout\nerror\n");
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_executed_is_an_error() {
        for uri in ["/nonexistent", "%zz"] {
            assert!(start(uri, &owner(), Ready::Closes).await.is_err());
        }
    }

    #[tokio::test]
    async fn a_program_that_has_to_say_that_it_is_ready_does() {
        if !alone() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for (script, is_ready) in [
            ("exec 5>&-; cat <&3", false),
            ("echo >&5; exec cat <&3", true),
        ] {
            let started = start(&program(&dir, script), &owner(), Ready::Writes).await;
            assert_eq!(started.is_ok(), is_ready, "{script}");
        }
    }

    #[test]
    fn uris_are_decoded() {
        assert_eq!(decode("/a%20b%2f+").unwrap(), "/a b/+");
        for bad in ["%", "%2", "%g0", "%ff"] {
            assert!(decode(bad).is_err(), "{bad}");
        }
    }
}
