//! Long commands, run so that whoever waits sees what happens, and reads what went wrong.

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write, stderr};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::cache;
use crate::error::{Context, Error, Result};

/// How often a terminal shows what a step does, and how often a log of ours says that it still does something.
const TERMINAL_PERIOD: Duration = Duration::from_secs(1);
const PLAIN_PERIOD: Duration = Duration::from_secs(60);

/// How much of a log's end is looked at, in bytes.
const TAIL: u64 = 4096;

/// Runs `command` as the step `name` and returns its standard output, without the line end. Its standard error goes to
/// the log `NAME.log` in the cache; while it runs, the time and the log's last line are shown on our standard error.
pub fn run(name: &str, command: &mut Command) -> Result<String> {
    run_into(name, command, Stdio::piped())
}

/// As [`run`], with the standard output going to `output`; what is returned is empty unless that is a pipe.
pub fn run_into(name: &str, command: &mut Command, output: Stdio) -> Result<String> {
    let log = cache::subdirectory("log")?.join(format!("{}.log", name.replace(' ', "-")));
    let file = File::create(&log).or_cannot(format!("create {}", log.display()))?;
    let failed = |cause: String| Error::Step {
        step: name.to_owned(),
        cause,
        log: log.clone(),
    };
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(file)
        .spawn()
        .map_err(|error| {
            failed(format!(
                "{}: {error}",
                command.get_program().to_string_lossy()
            ))
        })?;
    let stdout = child.stdout.take();
    let (ended, end) = channel();
    let waiter = thread::spawn(move || {
        let mut text = String::new();
        let read = stdout.map_or(Ok(0), |mut pipe| pipe.read_to_string(&mut text));
        let result = read.and_then(|_| child.wait()).map(|status| (status, text));
        // The receiver outlives this thread.
        let _ = ended.send(result);
    });
    let mut display = Display::new(name, &log);
    let result = loop {
        match end.recv_timeout(display.period()) {
            Ok(result) => break result,
            Err(RecvTimeoutError::Timeout) => display.update(began.elapsed()),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(failed("whoever waited for it died".into()));
            }
        }
    };
    display.clear();
    let _ = waiter.join();
    let (status, text) = result.or_cannot(format!("wait for {name}"))?;
    if !status.success() {
        return Err(failed(format!("{}\n{}", ending(status), tail(&log, 20))));
    }
    display.done(began.elapsed());
    Ok(text.trim_end().to_owned())
}

fn ending(status: ExitStatus) -> String {
    format!("the command ended with {status}; its last lines:")
}

/// The last lines of a file, at most `lines` of them.
pub fn tail(path: &Path, lines: usize) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = match read() {
        Ok(bytes) => bytes,
        Err(error) => return format!("(cannot read {}: {error})", path.display()),
    };
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// What a step shows of itself: one line that is rewritten on a terminal, a line now and then elsewhere.
struct Display<'a> {
    name: &'a str,
    log: &'a Path,
    terminal: bool,
    shown: bool,
}

impl<'a> Display<'a> {
    fn new(name: &'a str, log: &'a Path) -> Self {
        Self {
            name,
            log,
            terminal: stderr().is_terminal(),
            shown: false,
        }
    }

    fn period(&self) -> Duration {
        match (self.terminal, self.shown) {
            (true, _) => TERMINAL_PERIOD,
            // Silent for less than a second, and said at once if it takes longer.
            (false, false) => TERMINAL_PERIOD,
            (false, true) => PLAIN_PERIOD,
        }
    }

    fn update(&mut self, elapsed: Duration) {
        let last = tail(self.log, 1);
        let (start, end) = if self.terminal {
            ("\r\x1b[K", "")
        } else {
            ("", "\n")
        };
        let line: String = last.chars().filter(|c| !c.is_control()).take(60).collect();
        eprint!("{start}{}: {} s  {line}{end}", self.name, elapsed.as_secs());
        let _ = stderr().flush();
        self.shown = true;
    }

    fn clear(&self) {
        if self.terminal && self.shown {
            eprint!("\r\x1b[K");
        }
    }

    /// Says how long it took, if anybody had to wait.
    fn done(&self, elapsed: Duration) {
        if self.shown {
            eprintln!("{}: done in {} s", self.name, elapsed.as_secs());
        }
    }
}

/// Copies a file, keeping its permissions.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .map(drop)
        .or_cannot(format!("copy {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_file_is_its_last_lines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "a\nb\nc\n").unwrap();
        assert_eq!(tail(file.path(), 2), "b\nc");
        assert_eq!(tail(file.path(), 9), "a\nb\nc");
        fs::write(file.path(), "x".repeat(10_000)).unwrap();
        assert_eq!(tail(file.path(), 1).len() as u64, TAIL);
    }
}
