//! `start`: containerd asks for a shim that serves a task, and for its address.
//!
//! The tasks of a pod share one shim, so `start` first looks whether one listens already. If not, it makes the listening socket itself and
//! hands it to a new process, as that process's standard input: whoever connects from then on is served, and nothing waits for the
//! process to come up.
//!
//! containerd takes everything that `start` prints, standard error included, for the address. So nothing is printed but the answer,
//! and, when the exit code is not zero, the reason.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use nix::fcntl::{Flock, FlockArg};
use nix::poll::PollFlags;
use nix::sys::stat::{Mode, umask};
use protobuf::Message;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::process::getpid;
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::args::{Args, is_identifier};
use crate::readiness::happens;
use crate::state::write_atomically;

/// Where containerd's shims have their sockets.
const SOCKET_DIRECTORY: &str = "/run/containerd/s";

/// The container's specification, in its bundle.
const CONFIG: &str = "config.json";

/// Where a bundle says which socket serves its task.
pub const ADDRESS: &str = "address";

/// The most that is read from standard input, in bytes.
const MAX_INPUT: u64 = 10 << 20;

/// The version of the shim's parameters in a [`BootstrapResult`]: with 2 (and not 3) containerd calls `start` and `delete` for every
/// container of a pod, as all its releases from 1.6 on can.
const BOOTSTRAP_VERSION: i32 = 2;

/// Annotations that name the group of a task, in order of precedence: containerd's own, CRI's, CRI-O's.
const GROUPS: [&str; 3] = [
    "io.containerd.runc.v2.group",
    crate::annotations::CRI_SANDBOX_ID,
    crate::annotations::CRIO_SANDBOX_ID,
];

/// Why no shim could be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{operation} {path}: {source}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("config.json in the bundle is no OCI runtime specification: {0}")]
    Spec(serde_json::Error),
    #[error("annotation {key} is {value:?}, which is no identifier")]
    Group { key: &'static str, value: String },
    #[error(
        "core scheduling was asked for (SCHED_CORE), but the kernel refuses it: {0}; needs CONFIG_SCHED_CORE, and simultaneous multithreading"
    )]
    CoreScheduling(io::Error),
    #[error("the reply cannot be encoded: {0}")]
    Reply(protobuf::Error),
}

/// Does what `start` asks for, in the bundle, which is the current directory, and returns what to print.
pub fn start(args: &Args) -> Result<Vec<u8>, Error> {
    let mut input = Vec::new();
    io::stdin()
        .lock()
        .take(MAX_INPUT)
        .read_to_end(&mut input)
        .map_err(at("read", "standard input"))?;
    let params = parse_params(&input, args);
    let config = fs::read(CONFIG).map_err(at("read", CONFIG))?;
    let group = group(&config)?;
    let directory = params
        .as_ref()
        .and_then(|p| p.socket_dir.as_deref())
        .filter(|directory| !directory.is_empty())
        .unwrap_or(SOCKET_DIRECTORY);
    let socket = socket_path(
        Path::new(directory),
        &args.address,
        &args.namespace,
        group.as_deref().unwrap_or(&args.id),
    );
    let address = format!("unix://{}", socket.display());
    let listener = listen(&socket)?;
    let written = write_atomically(Path::new(ADDRESS), address.as_bytes());
    let written = written.map_err(at("write", ADDRESS));
    if let Some(listener) = listener {
        written
            .and_then(|()| spawn(args, params.as_ref(), listener))
            .inspect_err(|_| drop(fs::remove_file(&socket)))?;
    } else {
        written?;
    }
    reply(address, params.is_some())
}

/// Reads standard input. Before version 2.3 containerd sends the runtime's options there, an `Any`, or nothing; since then
/// the parameters. Bytes of the one also decode as the other, so parameters are only believed if they speak of this task.
fn parse_params(input: &[u8], args: &Args) -> Option<BootstrapParams> {
    BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == args.id && params.namespace == args.namespace)
}

fn reply(address: String, with_params: bool) -> Result<Vec<u8>, Error> {
    if !with_params {
        return Ok(address.into_bytes());
    }
    BootstrapResult {
        version: BOOTSTRAP_VERSION,
        address,
        protocol: "ttrpc".into(),
        ..Default::default()
    }
    .write_to_bytes()
    .map_err(Error::Reply)
}

/// The group that a task's `config.json` puts it into: the tasks that share a shim. Without one, a task has a shim to itself.
pub fn group(config: &[u8]) -> Result<Option<String>, Error> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: HashMap<String, String>,
    }
    let mut spec: Annotated = serde_json::from_slice(config).map_err(Error::Spec)?;
    for key in GROUPS {
        if let Some(value) = spec.annotations.remove(key) {
            return if is_identifier(&value) {
                Ok(Some(value))
            } else {
                Err(Error::Group { key, value })
            };
        }
    }
    Ok(None)
}

/// The socket of a group: the same for all its tasks, another for another containerd or namespace.
fn socket_path(directory: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    let name = Path::new(address).join(namespace).join(group);
    let digest = Sha256::digest(name.as_os_str().as_encoded_bytes());
    directory.join(format!("{digest:x}"))
}

/// Listens on the socket, or finds that a shim does already (`None`).
fn listen(socket: &Path) -> Result<Option<UnixListener>, Error> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(directory)
        .map_err(at("create", directory))?;
    let _lock = lock(directory).map_err(at("lock", directory))?;
    match bind(socket) {
        Ok(listener) => return Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        Err(source) => return Err(at("listen on", socket)(source)),
    }
    if has_listener(socket) {
        return Ok(None);
    }
    let is_socket = fs::symlink_metadata(socket)
        .map_err(at("examine", socket))?
        .file_type()
        .is_socket();
    if !is_socket {
        let error = io::Error::other("there is a file in its place that is no socket; remove it");
        return Err(at("listen on", socket)(error));
    }
    fs::remove_file(socket).map_err(at("remove", socket))?;
    bind(socket).map(Some).map_err(at("listen on", socket))
}

/// Keeps other calls from looking for dead sockets at the same time: who finds one removes it, and makes its own, under this lock.
fn lock(directory: &Path) -> io::Result<Flock<File>> {
    Flock::lock(File::open(directory)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

/// Whether somebody listens on a socket, even if it is a shim that hangs, and takes no connection any more: nobody waits for that one with the
/// lock of all.
fn has_listener(socket: &Path) -> bool {
    matches!(connect(socket, None), Ok(_) | Err(Errno::AGAIN))
}

/// Connects to a socket. `EAGAIN` means that too many wait for it already, and that nobody was let in for so long.
fn connect(socket: &Path, patience: Option<Duration>) -> rustix::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(socket)?;
    let mut flags = SocketFlags::CLOEXEC;
    flags.set(SocketFlags::NONBLOCK, patience.is_none());
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // No time at all would be for ever.
    let patience = patience.map(|patience| patience.max(Duration::from_millis(1)));
    set_socket_timeout(&stream, Timeout::Send, patience)?;
    rustix::net::connect(&stream, &address)?;
    Ok(stream)
}

/// Waits until nobody has the socket of a dead shim any more, at most for `patience`. Its descriptors stay open as long as a process of its own
/// making has them: those that stand for the guest's share them, and die only after it. (A socket that stays is replaced by the next shim's.)
pub fn wait_for_heirs(socket: &Path, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    // One who hung may have left so many connections that this one waits, too.
    match connect(socket, Some(patience)) {
        // The kernel hangs up when it closes the socket.
        Ok(stream) => {
            let left = deadline.saturating_duration_since(Instant::now());
            happens(stream, PollFlags::POLLHUP, left).map(drop)
        }
        Err(_) => Ok(()),
    }
}

/// Removes a socket that nobody listens on any more.
pub fn remove_dead_socket(socket: &Path) -> io::Result<()> {
    let removed = lock(socket.parent().unwrap_or(Path::new("/"))).and_then(|_lock| {
        match has_listener(socket) {
            true => Ok(()),
            false => fs::remove_file(socket),
        }
    });
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Makes a socket that only the superuser can connect to, from the first moment.
fn bind(socket: &Path) -> io::Result<UnixListener> {
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(socket);
    umask(before);
    listener
}

/// Starts this program again, as the shim that serves the socket.
fn spawn(
    args: &Args,
    params: Option<&BootstrapParams>,
    listener: UnixListener,
) -> Result<(), Error> {
    if std::env::var_os("SCHED_CORE").is_some_and(|value| !value.is_empty()) {
        // This process, and so the shim and the machine that come from it, get cores that no other pod runs on at the same time.
        create_core_scheduling_cookie(getpid(), CoreSchedulingScope::ThreadGroup)
            .map_err(|errno| Error::CoreScheduling(errno.into()))?;
    }
    let program = "/proc/self/exe";
    let mut command = Command::new(program);
    // What is run is this very file; what ps shows is its name.
    if let Some(name) = std::env::args_os().next() {
        command.arg0(name);
    }
    command
        .args(["-namespace", &args.namespace, "-address", &args.address])
        .args(["-publish-binary", &args.publish_binary, "-id", &args.id])
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if args.debug || params.is_some_and(|params| params.log_level.value() < 0) {
        command.arg("-debug");
    }
    if let Some(params) = params {
        command.env("TTRPC_ADDRESS", &params.containerd_ttrpc_address);
    }
    command
        .arg("serve")
        .spawn()
        .map(drop)
        .map_err(at("execute", program))
}

fn at(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Io {
        operation,
        path,
        source,
    }
}

/// The socket that [`start`] made, from the other side: takes it off standard input, which is /dev/null from then on.
pub fn inherited_listener() -> io::Result<(UnixListener, PathBuf)> {
    let null = File::open("/dev/null")?;
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    nix::unistd::dup2_stdin(&null)?;
    let path = listener
        .local_addr()?
        .as_pathname()
        .map(Path::to_owned)
        .ok_or_else(|| io::Error::other("standard input is no socket with a name"))?;
    Ok((listener, path))
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;
    use crate::testing::alone;

    fn args() -> Args {
        Args {
            namespace: "k8s.io".into(),
            address: "/run/containerd/containerd.sock".into(),
            id: "c1".into(),
            ..Args::default()
        }
    }

    #[test]
    fn parameters_are_told_from_runtime_options() {
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/run/containerd/containerd.sock.ttrpc".into(),
            ..Default::default()
        };
        let bytes = params.write_to_bytes().unwrap();
        assert_eq!(parse_params(&bytes, &args()), Some(params));
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"plain text, so that it decodes as a string".into(),
            ..Default::default()
        };
        let bytes = options.write_to_bytes().unwrap();
        assert!(BootstrapParams::parse_from_bytes(&bytes).is_ok());
        for input in [&bytes[..], b"", b"\xff"] {
            assert_eq!(parse_params(input, &args()), None);
        }
    }

    #[test]
    fn the_reply_is_in_the_language_of_the_question() {
        let address = "unix:///run/containerd/s/0".to_owned();
        assert_eq!(reply(address.clone(), false).unwrap(), address.as_bytes());
        let bytes = reply(address.clone(), true).unwrap();
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!(
            (result.version, result.address, result.protocol.as_str()),
            (2, address, "ttrpc")
        );
    }

    #[test]
    fn the_group_comes_from_the_annotations() {
        for (config, expected) in [
            ("{}", None),
            (
                r#"{"annotations":{"a":"b"},"process":{"args":["x"]}}"#,
                None,
            ),
            (
                r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"s1"}}"#,
                Some("s1"),
            ),
            (
                r#"{"annotations":{"io.kubernetes.cri-o.SandboxID":"s2"}}"#,
                Some("s2"),
            ),
            (
                r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"s1","io.containerd.runc.v2.group":"g"}}"#,
                Some("g"),
            ),
        ] {
            assert_eq!(group(config.as_bytes()).unwrap().as_deref(), expected);
        }
        assert!(matches!(group(b"["), Err(Error::Spec(_))));
        let hostile = br#"{"annotations":{"io.kubernetes.cri.sandbox-id":"../x"}}"#;
        assert!(matches!(group(hostile), Err(Error::Group { value, .. }) if value == "../x"));
    }

    #[test]
    fn a_group_has_one_socket_and_a_dead_one_is_replaced() {
        if !alone() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("s");
        let path = |ns: &str, group: &str| socket_path(&directory, "/run/c.sock", ns, group);
        assert_ne!(path("a", "b"), path("b", "a"));
        let socket = path("k8s.io", "s1");
        let first = listen(&socket).unwrap().unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::symlink_metadata(&socket).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        assert!(listen(&socket).unwrap().is_none(), "it is alive");
        drop(first);
        assert!(listen(&socket).unwrap().is_some(), "it is dead");
        fs::remove_file(&socket).unwrap();
        fs::write(&socket, "precious").unwrap();
        assert!(matches!(listen(&socket), Err(Error::Io { .. })));
        assert!(socket.exists());
    }
}
