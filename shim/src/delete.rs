//! `delete`: containerd cleans up after a task whose shim does not answer, or that it has deleted.
//!
//! It is called for every task of a pod, in parallel, also repeatedly, for tasks that were never made, and for each that the shim has deleted
//! on request. So the shim may well live, and have other tasks. What `delete` does not find is not there to be cleaned up.

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    ConnectRequest, DeleteRequest, DeleteResponse, KillRequest, ShutdownRequest, StateRequest,
    WaitRequest,
};
use containerd_shim_protos::shim_async::TaskClient;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::inotify::AddWatchFlags;
use protobuf::{Message, MessageField};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::Client;
use ttrpc::context::{Context, with_duration};

use crate::args::Args;
use crate::bootstrap::{self, ADDRESS, remove_dead_socket, wait_for_heirs};
use crate::cgroup;
use crate::network;
use crate::process::{Exit, KILLED};
use crate::readiness::Watch;
use crate::spec::Spec;
use crate::state::{ProcessId, State};

/// When a shim that lives has answered, of the time that `delete` has. This and the following are counted from its beginning, and together
/// leave something of the five seconds that containerd gives it: for its own start, and its exit.
const ANSWERED: Duration = Duration::from_millis(1500);

/// When a shim that lives has ended and deleted one of its containers.
const ASKED: Duration = Duration::from_millis(2500);

/// When a shim that ends of itself is gone. containerd calls `delete` as soon as it has the answer to Shutdown.
const ENDED: Duration = Duration::from_secs(3);

/// When a killed shim is gone, and the machine with it.
const KILLED_BY: Duration = Duration::from_secs(4);

/// When the hooks of a container whose shim could not run them are through.
const HOOKED: Duration = Duration::from_millis(4500);

/// How long a shim that ends may take to take its socket away, which is the first thing that it does.
const LEAVE_PATIENCE: Duration = Duration::from_millis(250);

/// How long containerd waits.
const LIMIT: Duration = Duration::from_secs(5);

// Each step has some time of its own, and all of them have less than containerd gives.
const _: () = assert!(
    ANSWERED.as_millis() < ASKED.as_millis()
        && ASKED.as_millis() < ENDED.as_millis()
        && ENDED.as_millis() + LEAVE_PATIENCE.as_millis() < KILLED_BY.as_millis()
        && KILLED_BY.as_millis() < HOOKED.as_millis()
        && HOOKED.as_millis() < LIMIT.as_millis()
);

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
    let clock = Clock::default();
    let mut response = None;
    let cleaned = match State::read(&bundle) {
        // The bundle of the shim's first task, which knows how to end the shim.
        Ok(Some(state)) => {
            let asked = ask_shim(&state.socket, &args.id, Some(state.shim), &clock);
            let standing = standing(&asked, &state.socket, &bundle);
            clock.note("shim asked");
            response = asked.response();
            end_shim(&state, standing, &bundle, &clock)
        }
        // One of the others, which a shim that lives still has.
        Ok(None) => match socket_of(&bundle) {
            Some(socket) => {
                response = ask_shim(&socket, &args.id, None, &clock).response();
                clock.note("shim asked");
                remove_dead_socket(&socket).map_err(failed("remove", socket))
            }
            None => Ok(()),
        },
        Err(source) => Err(failed("read the shim's state in", &bundle)(source)),
    };
    let unmounted = unmount(&bundle.join("rootfs"));
    clock.note("unmounted");
    if response.is_none() {
        run_hooks(&bundle, &args.id, clock.left(HOOKED));
        clock.note("hooks ended");
    }
    clock.complain();
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

/// The one clock of all steps.
#[derive(Debug)]
struct Clock {
    begin: Instant,
    /// What was done, and when.
    notes: RefCell<Vec<(&'static str, Duration)>>,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            begin: Instant::now(),
            notes: RefCell::default(),
        }
    }
}

impl Clock {
    /// How long it is until a moment that is counted from the beginning.
    fn left(&self, moment: Duration) -> Duration {
        moment.saturating_sub(self.begin.elapsed())
    }

    fn note(&self, what: &'static str) {
        self.notes.borrow_mut().push((what, self.begin.elapsed()));
    }

    /// Tells what took longer than containerd waits: the host's kernel, as all else is bounded.
    fn complain(&self) {
        let taken = self.begin.elapsed();
        if taken > LIMIT {
            // containerd logs it. Perhaps nobody listens any more.
            let notes = self.notes.borrow();
            let _ = writeln!(io::stderr(), "delete took {taken:?}: {notes:?}");
        }
    }
}

/// What a shim does that has been asked to delete a task, and to end if that was the last.
#[derive(Debug, Clone, Copy)]
enum Standing {
    /// It serves other tasks.
    Needed,
    /// It is on its way out.
    Ending,
    /// It has left its place, where another may be now.
    Left,
    /// Nothing.
    Silent,
}

/// Tells it from its answers, and from its socket, which a shim that ends takes away first.
fn standing(asked: &Asked, socket: &Path, bundle: &Path) -> Standing {
    match asked {
        Asked::Nobody if socket.exists() => Standing::Silent,
        Asked::Nobody | Asked::Another => Standing::Left,
        Asked::Refused | Asked::Answered(_) if is_alone(bundle) => Standing::Ending,
        Asked::Refused | Asked::Answered(_) if disappears(socket) => Standing::Left,
        Asked::Refused | Asked::Answered(_) => Standing::Needed,
    }
}

/// Whether a task is known to have a shim to itself. Then nothing is left to serve, not even if the task is still being created.
fn is_alone(bundle: &Path) -> bool {
    let config = std::fs::read(bundle.join("config.json"));
    config.is_ok_and(|config| matches!(bootstrap::group(&config), Ok(None)))
}

/// Whether a shim's socket goes away.
fn disappears(socket: &Path) -> bool {
    let gone = async {
        // It loses its only name, which is an attribute.
        let watch = Watch::new(socket, AddWatchFlags::IN_ATTRIB)?;
        while socket.exists() {
            watch.changed().await?;
        }
        io::Result::Ok(())
    };
    // How it went is seen at the socket.
    let waited =
        runtime().map(|runtime| runtime.block_on(async { timeout(LEAVE_PATIENCE, gone).await }));
    drop(waited);
    !socket.exists()
}

/// Ends a shim that nobody needs, and with it the machine, and removes what they leave, also of what joined it to its network.
fn end_shim(state: &State, standing: Standing, bundle: &Path, clock: &Clock) -> Result<(), Error> {
    match standing {
        Standing::Needed => return Ok(()),
        Standing::Ending | Standing::Left => state.shim.wait(clock.left(ENDED)),
        Standing::Silent => {}
    }
    let killed = state.shim.kill(clock.left(KILLED_BY)).map_err(Error::Kill);
    clock.note("shim killed");
    let removed = match &state.cgroup {
        Some(directory) => cgroup::remove(directory, clock.left(KILLED_BY)).map_err(Error::Cgroup),
        None => Ok(()),
    };
    clock.note("control group removed");
    let heirs = match standing {
        Standing::Left => Ok(()),
        _ => wait_for_heirs(&state.socket, clock.left(KILLED_BY)),
    };
    let socket = heirs.and_then(|()| remove_dead_socket(&state.socket));
    let socket = socket.map_err(failed("remove", &state.socket));
    clock.note("socket removed");
    let disconnected = network::disconnect(bundle).map_err(Error::Network);
    clock.note("network disconnected");
    killed.and(removed).and(socket).and(disconnected)
}

/// Runs the hooks that come after the end of a container, if the shim did not. A bundle may be half made: then there are none.
fn run_hooks(bundle: &Path, id: &str, patience: Duration) {
    let Ok(json) = std::fs::read(bundle.join("config.json")) else {
        return;
    };
    let path = bundle.display().to_string();
    let hooks = Spec::parse(&json).and_then(|spec| spec.hooks(id, &path));
    let Ok(hooks) = hooks else { return };
    // What they say has no reader here.
    if let Ok(runtime) = runtime() {
        let run = hooks.run_last();
        let _ = runtime.block_on(async { timeout(patience, run).await });
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

/// What came of asking a shim.
#[derive(Debug)]
enum Asked {
    /// Nobody answers in time.
    Nobody,
    /// It is not the shim that was meant: that one has left the place.
    Another,
    /// It lives, but has the container still: its guest does not let go of it, or not in time.
    Refused,
    /// It does not have the container any more; with what it said of its end, if it deleted it now.
    Answered(Option<DeleteResponse>),
}

impl Asked {
    fn response(self) -> Option<DeleteResponse> {
        match self {
            Self::Answered(response) => response,
            Self::Nobody | Self::Another | Self::Refused => None,
        }
    }
}

/// Has a shim that lives, and is the one that is `meant`, end and delete one of its containers; and itself, if that was the last.
fn ask_shim(socket: &Path, id: &str, meant: Option<ProcessId>, clock: &Clock) -> Asked {
    let ask = async {
        let connect = async {
            let stream = UnixStream::connect(socket).await.ok()?;
            let shim = TaskClient::new(Client::new(stream.into()));
            let answer = shim.connect(context(), &ConnectRequest::new()).await.ok()?;
            Some((shim, answer.shim_pid))
        };
        let connected = timeout(clock.left(ANSWERED), connect).await;
        let Some((shim, pid)) = connected.ok().flatten() else {
            return Asked::Nobody;
        };
        if meant.is_some_and(|meant| i64::from(meant.pid) != i64::from(pid)) {
            return Asked::Another;
        }
        let asked = timeout(clock.left(ASKED), end_task(&shim, id)).await;
        let asked = asked.unwrap_or(Asked::Refused);
        let request = ShutdownRequest {
            id: id.to_owned(),
            // Nobody will ask for this container any more, so it alone is nothing to stay for.
            now: matches!(asked, Asked::Refused),
            ..Default::default()
        };
        // One that is not known to have had this task may be about to get its first.
        if matches!(&asked, Asked::Answered(None) if meant.is_none()) {
            return asked;
        }
        let shutdown = timeout(clock.left(ENDED), shim.shutdown(context(), &request)).await;
        match (asked, shutdown) {
            // This waits for nothing in the guest: who has no answer to it has hung, or died.
            (Asked::Refused, Err(_) | Ok(Err(_))) => Asked::Nobody,
            // What it does tells more than the answer, which may get lost.
            (asked, _) => asked,
        }
    };
    runtime().map_or(Asked::Nobody, |runtime| runtime.block_on(ask))
}

/// Has a shim end and delete a container. If somebody else is deleting it, the shim answers when that is done.
async fn end_task(shim: &TaskClient, id: &str) -> Asked {
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
    let state = StateRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    // It may have ended before, or never have been made; what counts is that it is not there.
    let _ = shim.kill(context(), &kill).await;
    let _ = shim.wait(context(), &wait).await;
    if let Ok(response) = shim.delete(context(), &delete).await {
        return Asked::Answered(Some(response));
    }
    match shim.state(context(), &state).await {
        Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => {
            Asked::Answered(None)
        }
        _ => Asked::Refused,
    }
}

fn context() -> Context {
    with_duration(HOOKED)
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
    use crate::testing::alone;

    fn call(bundle: &Path) -> Result<DeleteResponse, Error> {
        let args = Args {
            id: "c1".into(),
            bundle: Some(bundle.to_owned()),
            ..Args::default()
        };
        delete(&args).map(|bytes| DeleteResponse::parse_from_bytes(&bytes).unwrap())
    }

    /// A process that a bundle names as its shim. It ends when its input does.
    fn shim(bundle: &Path, socket: &Path) -> std::process::Child {
        let shim = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let state = State {
            shim: ProcessId::of(shim.id() as i32).unwrap(),
            socket: socket.into(),
            cgroup: None,
        };
        state.write(bundle).unwrap();
        shim
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
        if !alone() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let mut hung = shim(dir.path(), &socket);
        // Waiting would close it, and end the program.
        let _input = hung.stdin.take();
        // It is this test's child, which is gone when the test has waited for it.
        let waiting = std::thread::spawn(move || hung.wait().unwrap());
        call(dir.path()).unwrap();
        assert!(!waiting.join().unwrap().success());
        assert!(!socket.exists());
        call(dir.path()).unwrap();
    }

    #[test]
    fn a_socket_that_outlives_its_shim_for_a_moment_goes() {
        if !alone() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let mut shim = shim(dir.path(), &socket);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // Nobody answers.
                drop(listener.accept().unwrap());
                let input = shim.stdin.take();
                assert!(!shim.wait().unwrap().success());
                // Who has the socket then has it until somebody has looked for it.
                let looking = listener.accept().unwrap();
                drop((listener, looking, input));
            });
            let called = call(dir.path());
            // If it did not look, somebody has to.
            drop(std::os::unix::net::UnixStream::connect(&socket));
            called.unwrap();
        });
        assert!(!socket.exists());
    }

    #[test]
    fn a_shim_that_is_ending_is_left_in_peace() {
        if !alone() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut ending = shim(dir.path(), &dir.path().join("socket"));
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
