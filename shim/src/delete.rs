//! `delete`: containerd cleans up after a task whose shim does not answer.
//!
//! It is called for every task of a pod, in parallel, also repeatedly, and for tasks that were never made; it has five seconds. What it does
//! not find is not there to be cleaned up.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse, KillRequest, WaitRequest};
use containerd_shim_protos::shim_async::TaskClient;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use protobuf::{Message, MessageField};
use tokio::net::UnixStream;
use ttrpc::asynchronous::Client;
use ttrpc::context::{Context, with_duration};

use crate::args::Args;
use crate::bootstrap::{ADDRESS, remove_dead_socket};
use crate::cgroup;
use crate::network;
use crate::process::{Exit, KILLED};
use crate::spec::Spec;
use crate::state::State;

/// How long a shim that ends of itself may take. containerd calls `delete` as soon as it has the answer to Shutdown.
const END_PATIENCE: Duration = Duration::from_millis(1500);

/// How long a killed shim may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(1);

/// How long a shim that lives may take to end and delete one of its containers.
const ASK_PATIENCE: Duration = Duration::from_secs(3);

/// How long the hooks of a container whose shim is dead may take, of the five seconds.
const HOOK_PATIENCE: Duration = Duration::from_secs(2);

/// Why something was left behind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{operation} {path}: {source}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("kill the shim: {0}")]
    Kill(io::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Network(network::Error),
    #[error("the reply cannot be encoded: {0}")]
    Reply(protobuf::Error),
}

/// Does what `delete` asks for, and returns what to print.
///
/// # Errors
///
/// Everything is tried; the first failure is the one that is returned.
pub fn delete(args: &Args) -> Result<Vec<u8>, Error> {
    let bundle = match &args.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().map_err(failed("find", "the current directory"))?,
    };
    let mut response = None;
    let cleaned = match State::read(&bundle) {
        // The bundle of the shim's first task: with it go the shim and the machine, and what joins it to its network.
        Ok(Some(state)) => {
            end_shim(&state).and(network::disconnect(&bundle).map_err(Error::Network))
        }
        // One of the others, which a shim that lives still has.
        Ok(None) => match socket_of(&bundle) {
            Some(socket) => {
                response = ask_shim(&socket, &args.id);
                remove_dead_socket(&socket).map_err(failed("remove", socket))
            }
            None => Ok(()),
        },
        Err(source) => Err(failed("read the shim's state in", &bundle)(source)),
    };
    let unmounted = unmount(&bundle.join("rootfs"));
    if response.is_none() {
        run_hooks(&bundle, &args.id);
    }
    cleaned.and(unmounted)?;
    let exit = Exit::now(KILLED);
    response
        .unwrap_or_else(|| DeleteResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.timestamp()),
            ..Default::default()
        })
        .write_to_bytes()
        .map_err(Error::Reply)
}

/// Ends a shim, and with it the machine, and removes what they leave.
fn end_shim(state: &State) -> Result<(), Error> {
    // It takes its socket away first: then it needs no help.
    if !state.socket.exists() {
        state.shim.wait(END_PATIENCE);
    }
    let killed = state.shim.kill(KILL_PATIENCE).map_err(Error::Kill);
    let removed = match &state.cgroup {
        Some(directory) => cgroup::remove(directory).map_err(Error::Cgroup),
        None => Ok(()),
    };
    let socket = remove_dead_socket(&state.socket).map_err(failed("remove", &state.socket));
    killed.and(removed).and(socket)
}

/// Runs the hooks that come after the end of a container, if the shim did not. A bundle may be half made: then there are none.
fn run_hooks(bundle: &Path, id: &str) {
    let Ok(json) = std::fs::read(bundle.join("config.json")) else {
        return;
    };
    let path = bundle.display().to_string();
    let hooks = Spec::parse(&json).and_then(|spec| spec.hooks(id, &path));
    let Ok(hooks) = hooks else { return };
    // What they say has no reader here.
    if let Ok(runtime) = runtime() {
        let run = hooks.run_last();
        let _ = runtime.block_on(async { tokio::time::timeout(HOOK_PATIENCE, run).await });
    }
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// The socket of the shim that `start` found or made for this bundle.
fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = std::fs::read_to_string(bundle.join(ADDRESS)).ok()?;
    Some(PathBuf::from(address.trim().strip_prefix("unix://")?))
}

/// Has a shim that lives end and delete one of its containers; `None` if it does not live, or cannot.
fn ask_shim(socket: &Path, id: &str) -> Option<DeleteResponse> {
    let runtime = runtime().ok()?;
    let ask = async {
        let stream = UnixStream::connect(socket).await.ok()?;
        let shim = TaskClient::new(Client::new(stream.into()));
        let kill = KillRequest {
            id: id.to_owned(),
            signal: libc::SIGKILL as u32,
            all: true,
            ..Default::default()
        };
        let wait = WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let delete = DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        // It may have ended before, or never have been made; the answer to the last request is the one that counts.
        let _ = shim.kill(context(), &kill).await;
        let _ = shim.wait(context(), &wait).await;
        shim.delete(context(), &delete).await.ok()
    };
    runtime.block_on(async { tokio::time::timeout(ASK_PATIENCE, ask).await.ok()? })
}

fn context() -> Context {
    with_duration(ASK_PATIENCE)
}

/// Takes every mount off a directory.
fn unmount(directory: &Path) -> Result<(), Error> {
    loop {
        match umount2(directory, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // It is no mount point, or not there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(failed("unmount", directory)(errno.into())),
        }
    }
}

fn failed(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::ProcessId;

    fn call(bundle: &Path) -> Result<DeleteResponse, Error> {
        let args = Args {
            id: "c1".into(),
            bundle: Some(bundle.to_owned()),
            ..Args::default()
        };
        delete(&args).map(|bytes| DeleteResponse::parse_from_bytes(&bytes).unwrap())
    }

    #[test]
    fn a_half_made_bundle_is_as_good_as_deleted_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        for prepare in [
            |_: &Path| {},
            |bundle: &Path| std::fs::create_dir(bundle.join("rootfs")).unwrap(),
            |bundle: &Path| {
                let address = format!("unix://{}/s/socket", bundle.display());
                std::fs::write(bundle.join(ADDRESS), address).unwrap();
            },
        ] {
            prepare(dir.path());
            for _ in 0..2 {
                let response = call(dir.path()).unwrap();
                assert_eq!(response.exit_status, 137);
                assert!(response.exited_at.seconds > 0);
            }
        }
    }

    #[test]
    fn a_dead_shims_socket_goes_and_a_hung_shim_dies() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let mut hung = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let state = State {
            shim: ProcessId::of(hung.id() as i32).unwrap(),
            socket: socket.clone(),
            cgroup: None,
        };
        state.write(dir.path()).unwrap();
        // It is this test's child, which is gone when the test has waited for it.
        let waiting = std::thread::spawn(move || hung.wait().unwrap());
        call(dir.path()).unwrap();
        assert!(!waiting.join().unwrap().success());
        assert!(!socket.exists());
        call(dir.path()).unwrap();
    }

    #[test]
    fn a_shim_that_is_ending_is_left_in_peace() {
        let dir = tempfile::tempdir().unwrap();
        let mut ending = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let state = State {
            shim: ProcessId::of(ending.id() as i32).unwrap(),
            socket: dir.path().join("socket"),
            cgroup: None,
        };
        state.write(dir.path()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| call(dir.path()).unwrap());
            assert!(ending.wait().unwrap().success());
        });
    }

    #[test]
    fn hooks_that_the_shim_did_not_live_to_run_are_run() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let config = serde_json::json!({
            "hooks": {"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", format!("cat >{}", mark.display())]}]},
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        call(dir.path()).unwrap();
        let state = std::fs::read_to_string(&mark).unwrap();
        assert!(
            state.contains(r#""status":"stopped""#) && state.contains(r#""id":"c1""#),
            "{state}"
        );
        // Once.
        std::fs::remove_file(&mark).unwrap();
        call(dir.path()).unwrap();
        assert!(!mark.exists());
    }

    #[test]
    fn state_that_cannot_be_read_is_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("bulkhead.json"), "?").unwrap();
        assert!(call(dir.path()).unwrap_err().to_string().contains("state"));
    }
}
