//! Containers through `ctr`, containerd's own command line, which adds nothing of its own between a test and the shim.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::{Pid, Signal};

use crate::bundle::Bundle;
use crate::error::{Context, Error, Result};
use crate::leftovers::Snapshot;
use crate::process;
use crate::site::{self, Site};
use crate::step;

/// How long one call of ctr may take, on an emulated node with other work to do.
const CALL_LIMIT: Duration = Duration::from_secs(600);

/// How long it may take until nothing is left of what has ended.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// How much of containerd's log a failed test shows: what the shims say is in it, too.
const LOG_LINES: usize = 40;

/// Where ctr makes the FIFOs of containers' standard streams, in directories of their own.
const FIFOS: &str = "/run/containerd/fifo";

/// Who runs containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    Bulkhead,
    Runc,
}

impl Runtime {
    /// containerd's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bulkhead => site::RUNTIME,
            Self::Runc => "io.containerd.runc.v2",
        }
    }
}

/// The site as one test has it, alone: at its end nothing may be left that was not there before.
#[derive(Debug)]
pub struct World {
    site: Site,
    before: Snapshot,
    _alone: MutexGuard<'static, ()>,
}

impl World {
    /// Waits for the tests before, and looks at what is there.
    pub fn new() -> Result<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        // A test that failed before has cleaned up nevertheless.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let site = Site::current()?;
        Ok(Self {
            before: Snapshot::take(&site)?,
            site,
            _alone: alone,
        })
    }

    /// Takes what is there now for what a container may leave.
    pub fn keep(&mut self) -> Result<()> {
        self.before = Snapshot::take(&self.site)?;
        Ok(())
    }

    /// The site.
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// A container of the test image `image`.
    pub fn container(&self, runtime: Runtime, image: &str) -> Result<Container<'_>> {
        let name = next_name();
        let reference = format!("localhost/{image}:latest");
        let images = self
            .ctr(&["image", "list", "--quiet"])
            .output()?
            .success()?;
        if !images.lines().any(|line| line == reference) {
            self.site.import(image)?;
        }
        Ok(Container {
            world: self,
            name,
            options: vec!["--runtime".into(), runtime.name().into()],
            reference,
        })
    }

    /// Runs the container that a bundle describes to its end, and removes it.
    pub fn run_bundle(&self, runtime: Runtime, bundle: &Bundle) -> Result<Outcome> {
        let config = bundle.write()?;
        let config = config.to_string_lossy();
        let name = next_name();
        let runtime = ["--runtime", runtime.name(), "--config", &config];
        self.ctr(&[&["run", "--rm"], &runtime[..], &[&name]].concat())
            .output()
    }

    /// Starts the container that a bundle describes, and lets it run.
    pub fn start_bundle(&self, runtime: Runtime, bundle: &Bundle) -> Result<Running<'_>> {
        let config = bundle.write()?;
        let config = config.to_string_lossy();
        let name = next_name();
        let runtime = ["--runtime", runtime.name(), "--config", &config];
        let options = bundle.options.as_slice();
        let call = self.ctr(&[&["run", "--detach"], options, &runtime, &[&name]].concat());
        call.output()?.success()?;
        Ok(Running { world: self, name })
    }

    /// A call of ctr.
    pub fn ctr(&self, arguments: &[&str]) -> Call<'_> {
        Call {
            site: &self.site,
            arguments: arguments.iter().map(OsString::from).collect(),
            input: Vec::new(),
            begun: None,
        }
    }

    /// Writes a configuration of Bulkhead's with `changes` to `directory`, and returns the options by which a container uses
    /// it.
    pub fn configure(&self, directory: &Path, changes: &[(&str, &str)]) -> Result<[OsString; 2]> {
        let path = directory.join("bulkhead.toml");
        fs::write(&path, self.site.configuration(changes))
            .or_cannot(format!("write {}", path.display()))?;
        Ok(["--runtime-config-path".into(), path.into()])
    }

    /// Waits until nothing is left behind.
    pub fn settle(&self) -> Result<()> {
        self.before.settle(&self.site, SETTLE_LIMIT)
    }

    /// Checks that nothing is left behind. Every test ends with this.
    pub fn finish(self) -> Result<()> {
        let settled = self.settle();
        if settled.is_err() {
            self.show_log();
        }
        settled
    }

    fn show_log(&self) {
        let log = step::tail(&self.site.log(), LOG_LINES);
        eprintln!("containerd's last lines:\n{log}");
    }

    /// Removes every task and every container.
    fn clear(&self) -> Result<()> {
        if self.site.containerd().is_err() {
            self.site.start()?;
        }
        let list = |kind| -> Result<Vec<String>> {
            let text = self.ctr(&[kind, "list", "--quiet"]).output()?.success()?;
            Ok(text.lines().map(str::to_owned).collect())
        };
        for task in list("task")? {
            self.ctr(&["task", "delete", "--force", &task]).output()?;
        }
        for container in list("container")? {
            self.ctr(&["container", "delete", &container]).output()?;
        }
        self.settle()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A test that fails in the middle must not spoil those after it.
        if thread::panicking() {
            self.show_log();
            if let Err(error) = self.clear() {
                eprintln!("clearing up after the failed test: {error}");
            }
        }
    }
}

fn next_name() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    format!("c{}", NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// A container to be.
#[derive(Debug)]
pub struct Container<'a> {
    world: &'a World,
    name: String,
    reference: String,
    options: Vec<OsString>,
}

impl<'a> Container<'a> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds options of `ctr run`.
    pub fn options(mut self, options: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.options.extend(options.into_iter().map(Into::into));
        self
    }

    /// Runs `command` to its end, and removes the container.
    pub fn run(self, command: &[&str]) -> Call<'a> {
        self.call("--rm", command)
    }

    /// Starts `command`, and lets it run.
    pub fn start(self, command: &[&str]) -> Result<Running<'a>> {
        let (world, name) = (self.world, self.name.clone());
        self.call("--detach", command).output()?.success()?;
        Ok(Running { world, name })
    }

    fn call(self, how: &str, command: &[&str]) -> Call<'a> {
        let mut arguments = vec!["run".into(), how.into()];
        arguments.extend(self.options);
        arguments.extend([self.reference.into(), self.name.into()]);
        arguments.extend(command.iter().map(OsString::from));
        Call {
            site: &self.world.site,
            arguments,
            input: Vec::new(),
            begun: None,
        }
    }
}

/// A container that runs.
#[derive(Debug)]
pub struct Running<'a> {
    world: &'a World,
    name: String,
}

impl<'a> Running<'a> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs one more process in it, to its end.
    pub fn exec(&self, command: &[&str]) -> Call<'a> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let id = format!("e{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut arguments = vec!["task", "exec", "--exec-id", &id, &self.name];
        arguments.extend(command);
        self.world.ctr(&arguments)
    }

    /// Writes to its standard input, without containerd's help.
    pub fn write(&self, text: &str) -> Result<()> {
        let path = self.fifos()?.join(format!("{}-stdin", self.name));
        fs::write(&path, text).or_cannot(format!("write to {}", path.display()))
    }

    /// Its standard input, held open.
    pub fn stdin(&self) -> Result<File> {
        let path = self.fifos()?.join(format!("{}-stdin", self.name));
        let file = OpenOptions::new().write(true).open(&path);
        file.or_cannot(format!("open {}", path.display()))
    }

    /// Its standard output, without containerd's help.
    pub fn stdout(&self) -> Result<File> {
        let path = self.fifos()?.join(format!("{}-stdout", self.name));
        File::open(&path).or_cannot(format!("open {}", path.display()))
    }

    /// The directory with the FIFOs of its standard streams.
    fn fifos(&self) -> Result<PathBuf> {
        let listing = fs::read_dir(FIFOS).or_cannot(format!("read {FIFOS}"))?;
        let stdin = format!("{}-stdin", self.name);
        let mut directories = listing.flatten().map(|entry| entry.path());
        let found = directories.find(|directory| directory.join(&stdin).exists());
        found.ok_or_else(|| Error::Unfit(format!("no {stdin} below {FIFOS}")))
    }

    /// What containerd says of its task: `RUNNING`, `STOPPED` and so on.
    pub fn status(&self) -> Result<String> {
        self.task().map(|(_, status)| status)
    }

    /// The host's process that stands for its task.
    pub fn pid(&self) -> Result<u32> {
        self.task().map(|(pid, _)| pid)
    }

    /// The number of its task's process, and its status.
    fn task(&self) -> Result<(u32, String)> {
        let table = self.world.ctr(&["task", "list"]).output()?.success()?;
        let mut rows = table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = rows.find(|row| row.first() == Some(&self.name.as_str()));
        let task = row.as_deref().and_then(|row| match row {
            [_, pid, status] => Some((pid.parse().ok()?, (*status).to_owned())),
            _ => None,
        });
        match task {
            Some(task) => Ok(task),
            None => Err(Error::Unfit(format!("no task {} in:\n{table}", self.name))),
        }
    }

    /// Waits for its end, removes it, and returns its exit code.
    pub fn wait(self) -> Result<i32> {
        // Which deletes the task.
        let code = self
            .world
            .ctr(&["task", "attach", &self.name])
            .output()?
            .code;
        let container = self.world.ctr(&["container", "delete", &self.name]);
        container.output()?.success()?;
        Ok(code)
    }

    /// Sends a signal to its first process.
    pub fn kill(&self, signal: &str) -> Result<()> {
        let call = self
            .world
            .ctr(&["task", "kill", "--signal", signal, &self.name]);
        call.output()?.success().map(drop)
    }

    /// Waits until containerd has cleaned up after its dead shim, and removes what is left then: the FIFOs, which ctr removes only
    /// with a task, and the container.
    pub fn forget(self) -> Result<()> {
        let fifos = self.fifos()?;
        fs::remove_dir_all(&fifos).or_cannot(format!("remove {}", fifos.display()))?;
        self.world.settle()?;
        let call = self.world.ctr(&["container", "delete", &self.name]);
        call.output()?.success().map(drop)
    }

    /// Removes it, whatever it does.
    pub fn delete(self) -> Result<()> {
        let task = self
            .world
            .ctr(&["task", "delete", "--force", &self.name])
            .output()?;
        let container = self.world.ctr(&["container", "delete", &self.name]);
        container.output()?.success()?;
        task.success().map(drop)
    }
}

/// A call of ctr to be.
#[derive(Debug)]
pub struct Call<'a> {
    site: &'a Site,
    arguments: Vec<OsString>,
    input: Vec<u8>,
    begun: Option<Sender<()>>,
}

impl Call<'_> {
    /// What it gets on its standard input.
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Has `begun` disconnected when the first output comes, or the end.
    pub fn told_of(mut self, begun: Sender<()>) -> Self {
        self.begun = Some(begun);
        self
    }

    /// Makes the call and waits for its end.
    pub fn output(self) -> Result<Outcome> {
        let mut child = Command::new("ctr")
            .args(&self.arguments)
            .envs(self.site.environment()?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .or_cannot("run ctr")?;
        let pid = child.id();
        let (answered, answer) = channel();
        let stdin = child.stdin.take();
        thread::spawn(move || feed(stdin, &self.input, &answer));
        let stdout = child.stdout.take();
        let stdout = thread::spawn(move || collect(stdout, (Some(answered), self.begun)));
        let stderr = child.stderr.take();
        let stderr = thread::spawn(move || collect(stderr, ()));
        let (ended, end) = channel();
        thread::spawn(move || ended.send(child.wait()));
        let words: Vec<_> = self
            .arguments
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        let call = format!("ctr {}", words.join(" "));
        let Ok(status) = end.recv_timeout(CALL_LIMIT) else {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                process::kill(pid, Signal::KILL)?;
            }
            let seconds = CALL_LIMIT.as_secs();
            return Err(Error::Unfit(format!(
                "`{call}` did not end within {seconds} s"
            )));
        };
        let status = status.or_cannot("wait for ctr")?;
        let collected = |thread: JoinHandle<io::Result<Vec<u8>>>| {
            let died = || Error::Unfit("the reader of ctr's output died".into());
            thread
                .join()
                .map_err(|_| died())?
                .or_cannot("read ctr's output")
        };
        Ok(Outcome {
            call,
            code: status.code().unwrap_or(-1),
            stdout: collected(stdout)?,
            stderr: String::from_utf8_lossy(&collected(stderr)?).into_owned(),
        })
    }
}

/// Writes `input`, and closes the stream after the first answer: ctr does not pass on an end that comes before the
/// container is there.
fn feed(stdin: Option<impl Write>, input: &[u8], answer: &Receiver<()>) {
    if let Some(mut stdin) = stdin {
        // It fails if nobody reads it: then it was not wanted.
        let _ = stdin.write_all(input);
        let _ = answer.recv();
    }
}

/// Reads a stream to its end, and drops `begun` at its beginning.
fn collect<T>(stream: Option<impl Read>, begun: T) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        let mut first = [0; 4096];
        let length = stream.read(&mut first)?;
        bytes.extend_from_slice(&first[..length]);
        drop(begun);
        stream.read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// How a call of ctr ended.
#[derive(Debug)]
pub struct Outcome {
    call: String,
    /// Its exit code, which is that of the process in the container; -1 if a signal ended it.
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Outcome {
    /// The standard output as text, if the exit code is 0.
    pub fn success(self) -> Result<String> {
        if self.code == 0 {
            return Ok(self.text());
        }
        let Self {
            call, code, stderr, ..
        } = &self;
        Err(Error::Unfit(format!(
            "`{call}` ended with {code}: {}{}",
            self.text(),
            stderr.trim()
        )))
    }

    /// The standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}
