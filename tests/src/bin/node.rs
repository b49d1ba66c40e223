//! `node`: runs things on the test node. The Makefile's targets are the usual way to call it.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use bulkhead_tests::demo;
use bulkhead_tests::error::{Context, Result};
use bulkhead_tests::images;
use bulkhead_tests::payload::Build;
use bulkhead_tests::place::{Job, Place, quoted};
use bulkhead_tests::process;
use bulkhead_tests::site::Site;
use clap::{Parser, Subcommand};

/// What runs when no command is given.
const SHELL: &str = r#"
if [ -t 0 ]; then
  echo "containerd and Bulkhead are ready; images: /images or: ctr image list. Try:"
  echo "  ctr run --rm -t --runtime io.containerd.bulkhead.v2 localhost/busybox:latest try sh"
  exec bash
fi
exec sh"#;

/// After how many seconds a run of tests is given up: a node that hangs must end before whoever waits for it loses
/// patience.
const TEST_LIMIT: u64 = 3600;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Runs a command, or a shell, with containerd and Bulkhead ready.
    Run {
        /// Where: by default on this host if its KVM is good, else on the emulated node.
        #[arg(long)]
        on: Option<Place>,
        /// A directory of this host to put at /share.
        #[arg(long)]
        share: Option<PathBuf>,
        /// Let the node's clock count instructions, 4 ns each, instead of time.
        #[arg(long)]
        counting: bool,
        /// Give the node up after so many seconds.
        #[arg(long)]
        limit: Option<u64>,
        /// For `sh -c`; a shell if there is none.
        command: Option<String>,
    },
    /// Shows a container in a microVM of its own.
    Demo {
        /// Where, as with `run`.
        #[arg(long)]
        on: Option<Place>,
    },
    /// Runs a test program of cargo's, with its arguments (cargo's `target.<triple>.runner`).
    Test {
        /// Where, as with `run`.
        #[arg(long)]
        on: Option<Place>,
        /// Run a benchmark, on the emulated node, whose clock counts instructions, 4 ns each.
        #[arg(long, conflicts_with = "on")]
        counting: bool,
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Builds Bulkhead and copies its files to `bin/` and `lib/` below a directory.
    Stage { directory: PathBuf },
    /// What `demo` does in its site, on a host that is called `host`.
    #[command(hide = true)]
    ShowContainer { host: String },
    /// Sets up a site in `directory` and runs a command in it: what the other verbs do on the node.
    #[command(hide = true)]
    Site {
        directory: PathBuf,
        payload: PathBuf,
        images: PathBuf,
        command: String,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(125)
        }
    }
}

fn run(verb: Verb) -> Result<u8> {
    match verb {
        Verb::Run {
            on,
            share,
            counting,
            limit,
            command,
        } => {
            let build = Build::new()?;
            let place = on.map_or_else(|| Place::choose(&build), Ok)?;
            let share = share
                .map(|path| {
                    path.canonicalize()
                        .or_cannot(format!("find {}", path.display()))
                })
                .transpose()?;
            let job = Job {
                build: &build,
                images: &images::all()?,
                file: None,
                command: command.as_deref().unwrap_or(SHELL),
                share: share.as_deref(),
                counting,
                limit: limit.map(Duration::from_secs),
            };
            job.run(place)
        }
        Verb::Demo { on } => {
            let build = Build::new()?;
            let place = on.map_or_else(|| Place::choose(&build), Ok)?;
            let host = match place {
                Place::Host => "this host",
                Place::Node => "the emulated node",
            };
            let job = Job {
                build: &build,
                images: &images::small()?,
                file: None,
                command: &format!("node show-container {}", quoted(host)),
                share: None,
                counting: false,
                limit: None,
            };
            job.run(place)
        }
        Verb::Stage { directory } => {
            Build::new()?.stage(&directory)?;
            Ok(0)
        }
        Verb::ShowContainer { host } => {
            demo::run(&Site::current()?, &host)?;
            Ok(0)
        }
        Verb::Test {
            on,
            counting,
            program,
            arguments,
        } => {
            if !counting && !selects(&program, &arguments)? {
                let status = Command::new(&program).args(&arguments).status();
                return Ok(code(status.or_cannot("run the tests")?));
            }
            let build = Build::new()?;
            let place = match on {
                Some(place) => place,
                None if counting => Place::Node,
                None => Place::choose(&build)?,
            };
            let mut command = String::from("exec \"$BULKHEAD_PAYLOAD/file\"");
            if !counting {
                command += " --test-threads=1";
            }
            for argument in &arguments {
                command += " ";
                command += &quoted(argument);
            }
            let job = Job {
                build: &build,
                images: &images::all()?,
                file: Some(&program),
                command: &command,
                share: None,
                counting,
                limit: Some(Duration::from_secs(TEST_LIMIT)),
            };
            job.run(place)
        }
        Verb::Site {
            directory,
            payload,
            images,
            command,
        } => {
            let site = Site {
                directory,
                payload,
                images,
            };
            site.set_up()?;
            let status = Command::new("sh")
                .args(["-c", &command])
                .envs(site.environment()?)
                .status()
                .or_cannot("run sh")?;
            site.tear_down()?;
            Ok(code(status))
        }
    }
}

/// Whether `arguments` select any of the program's tests: if not, there is no need for a node.
fn selects(program: &Path, arguments: &[String]) -> Result<bool> {
    let mut list = Command::new(program);
    list.args(arguments).args(["--list", "--format", "terse"]);
    Ok(!process::output(&mut list)?.is_empty())
}

/// A command's exit code, as a shell tells it.
fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(u8::MAX)
}
