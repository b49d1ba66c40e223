//! Hooks that are programs of the host (runtime-spec, "POSIX-platform Hooks"): prestart, createRuntime, poststart, poststop.
//!
//! They run where the shim runs, in the container's bundle, and find the container's state on their standard input. A failure of those that come
//! before the container runs prevents it, one of poststart's ends it, and poststop's are logged. (createContainer and startContainer hooks are the guest's.)

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use oci_spec::runtime::Hook;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Serialize;
use tokio::process::Command;

use crate::state::claim_poststop;

/// How much of what a failed hook said is told, in bytes.
const MAX_WORDS: u64 = 4096;

/// When hooks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// After the runtime environment was made; deprecated for the next.
    Prestart,
    /// After the runtime environment was made.
    CreateRuntime,
    /// After the container's program was started.
    Poststart,
    /// After the container was deleted.
    Poststop,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Prestart,
        Self::CreateRuntime,
        Self::Poststart,
        Self::Poststop,
    ];

    /// The name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// What the container is doing, as the state says it.
    fn status(self) -> &'static str {
        match self {
            Self::Prestart | Self::CreateRuntime => "creating",
            Self::Poststart => "running",
            Self::Poststop => "stopped",
        }
    }
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
#[error("hooks.{stage}: {}: {problem}", path.display())]
pub struct Error {
    stage: &'static str,
    path: PathBuf,
    problem: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("it cannot be run: {0}")]
    Run(io::Error),
    #[error("it did not end within {0} s, which is its timeout")]
    Timeout(u64),
    #[error("{status}{words}")]
    Failed { status: ExitStatus, words: String },
}

/// The hooks of a container.
#[derive(Debug, Default, Clone)]
pub struct Hooks {
    /// Those of each stage.
    pub programs: HashMap<&'static str, Vec<Hook>>,
    /// What they are told of their container.
    pub subject: Subject,
}

/// What hooks are told of a container that does not change.
#[derive(Debug, Default, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Subject {
    /// The version of the specification that `config.json` follows.
    pub oci_version: String,
    /// The container's identifier.
    pub id: String,
    /// Its bundle's directory.
    pub bundle: String,
    /// Its annotations.
    pub annotations: HashMap<String, String>,
}

/// The state of a container (runtime-spec, "State").
#[derive(Serialize)]
struct State<'a> {
    #[serde(flatten)]
    subject: &'a Subject,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
}

impl Hooks {
    /// Runs the hooks of a stage, one after the other, until one fails. `pid` is the host's process that stands for the container.
    pub async fn run(&self, stage: Stage, pid: Option<u32>) -> Result<(), Error> {
        for hook in self.of(stage) {
            self.run_one(stage, hook, pid).await?;
        }
        Ok(())
    }

    /// Runs all hooks that come after the container's end, unless somebody else does or has. Nothing can be prevented any more:
    /// a failure is only logged (runtime-spec, "Lifecycle").
    pub async fn run_last(&self) {
        let stage = Stage::Poststop;
        if self.of(stage).is_empty() || !claim_poststop(Path::new(&self.subject.bundle)) {
            return;
        }
        for hook in self.of(stage) {
            if let Err(error) = self.run_one(stage, hook, None).await {
                log::warn!("{error}");
            }
        }
    }

    /// The hooks of a stage.
    pub fn of(&self, stage: Stage) -> &[Hook] {
        self.programs.get(stage.name()).map_or(&[], Vec::as_slice)
    }

    async fn run_one(&self, stage: Stage, hook: &Hook, pid: Option<u32>) -> Result<(), Error> {
        let state = State {
            subject: &self.subject,
            status: stage.status(),
            pid,
        };
        let ran = match serde_json::to_vec(&state) {
            Ok(state) => run(stage, hook, &self.subject.bundle, &state).await,
            Err(error) => Err(Problem::Run(error.into())),
        };
        ran.map_err(|problem| Error {
            stage: stage.name(),
            path: hook.path().clone(),
            problem,
        })
    }
}

async fn run(stage: Stage, hook: &Hook, bundle: &str, state: &[u8]) -> Result<(), Problem> {
    let mut words = file(&[]).map_err(Problem::Run)?;
    let mut child = command(hook, bundle, state, &words)
        // Who does not wait for the end of a hook that cleans up lets it go on: no other does its work.
        .and_then(|mut command| command.kill_on_drop(stage != Stage::Poststop).spawn())
        .map_err(Problem::Run)?;
    let limit = hook.timeout().and_then(|limit| u64::try_from(limit).ok());
    let status = match limit.filter(|limit| *limit > 0) {
        None => child.wait().await,
        Some(limit) => match tokio::time::timeout(Duration::from_secs(limit), child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                child.kill().await.map_err(Problem::Run)?;
                return Err(Problem::Timeout(limit));
            }
        },
    };
    let status = status.map_err(Problem::Run)?;
    if status.success() {
        return Ok(());
    }
    let words = last_words(&mut words).unwrap_or_default();
    Err(Problem::Failed { status, words })
}

fn command(hook: &Hook, bundle: &str, state: &[u8], words: &File) -> io::Result<Command> {
    let mut command = Command::new(hook.path());
    if let Some([name, arguments @ ..]) = hook.args().as_deref() {
        command.arg0(name).args(arguments);
    }
    if let Some(environment) = hook.env() {
        command.env_clear();
        command.envs(environment.iter().filter_map(|pair| pair.split_once('=')));
    }
    // The shim itself stays in the bundle of its pod.
    command
        .current_dir(bundle)
        .stdin(file(state)?)
        .stdout(words.try_clone()?)
        .stderr(words.try_clone()?)
        .process_group(0);
    Ok(command)
}

/// A file without a name. Unlike a pipe it keeps nobody waiting, whoever has it open and does not read or write it.
fn file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// What a hook said last, as the end of a sentence.
fn last_words(words: &mut File) -> io::Result<String> {
    let length = words.seek(SeekFrom::End(0))?;
    words.seek(SeekFrom::Start(length.saturating_sub(MAX_WORDS)))?;
    let mut bytes = Vec::new();
    words.take(MAX_WORDS).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(match text.trim() {
        "" => String::new(),
        text => format!(": {text}"),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The hooks of a container whose bundle this is.
    fn hooks(bundle: &Path, stage: Stage, scripts: &[&str], timeout: Option<i64>) -> Hooks {
        let hook = |script: &&str| {
            let mut hook = Hook::default();
            hook.set_path("/bin/sh".into());
            hook.set_args(Some(vec!["hook".into(), "-c".into(), (*script).into()]));
            hook.set_env(Some(vec!["PATH=/usr/bin:/bin".into(), "A=b=c".into()]));
            hook.set_timeout(timeout);
            hook
        };
        Hooks {
            programs: HashMap::from([(stage.name(), scripts.iter().map(hook).collect())]),
            subject: Subject {
                oci_version: "1.0.2".into(),
                id: "c1".into(),
                bundle: bundle.to_str().unwrap().into(),
                annotations: HashMap::from([("key".into(), "value".into())]),
            },
        }
    }

    #[tokio::test]
    async fn a_hook_finds_the_state_on_its_input_and_runs_in_the_bundle() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().canonicalize().unwrap();
        // The path of the file is relative.
        let script = "cat >state; echo $0 $A $(pwd -P) >>state";
        let hooks = hooks(&bundle, Stage::CreateRuntime, &[script], None);
        hooks.run(Stage::CreateRuntime, Some(7)).await.unwrap();
        let text = std::fs::read_to_string(bundle.join("state")).unwrap();
        let (state, rest) = text.rsplit_once('}').unwrap();
        assert_eq!(rest, format!("hook b=c {}\n", bundle.display()));
        let state: serde_json::Value = serde_json::from_str(&format!("{state}}}")).unwrap();
        let expected = serde_json::json!({
            "ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 7, "bundle": bundle,
            "annotations": {"key": "value"},
        });
        assert_eq!(state, expected);
        // It is of this stage alone.
        std::fs::remove_file(bundle.join("state")).unwrap();
        hooks.run(Stage::Prestart, Some(7)).await.unwrap();
        assert_eq!(std::fs::read_dir(&bundle).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_failure_is_told_and_keeps_the_next_from_running() {
        let dir = tempfile::tempdir().unwrap();
        let mark = format!("echo >{}", dir.path().join("mark").display());
        let scripts = ["echo no such thing >&2; exit 3", &mark];
        let creating = hooks(dir.path(), Stage::Prestart, &scripts, None);
        let error = creating.run(Stage::Prestart, None).await.unwrap_err();
        let text = error.to_string();
        assert_eq!(
            text,
            "hooks.prestart: /bin/sh: exit status: 3: no such thing"
        );
        assert!(!dir.path().join("mark").exists());
        // Unless nothing can be prevented.
        let stopped = hooks(dir.path(), Stage::Poststop, &scripts, None);
        stopped.run_last().await;
        assert!(dir.path().join("mark").exists());
    }

    #[tokio::test]
    async fn a_hook_that_takes_too_long_is_killed() {
        let hooks = hooks(
            Path::new("/"),
            Stage::Poststart,
            &["exec cat <>/dev/ptmx"],
            Some(1),
        );
        let error = hooks.run(Stage::Poststart, Some(1)).await.unwrap_err();
        assert!(error.to_string().contains("within 1 s"), "{error}");
        let mut missing = Hook::default();
        missing.set_path("/no/such/hook".into());
        let hooks = Hooks {
            programs: HashMap::from([("poststart", vec![missing])]),
            ..Hooks::default()
        };
        let error = hooks.run(Stage::Poststart, Some(1)).await.unwrap_err();
        assert!(error.to_string().contains("/no/such/hook"), "{error}");
    }
}
