//! An agent in namespaces of its own, as PID 1, reached through Unix sockets instead of vsock; and a client like the shim.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_agent::agent::{Agent, Paths};
use bulkhead_agent::protocol::sandbox::SetupRequest;
use bulkhead_agent::protocol::sandbox_ttrpc::SandboxClient;
use bulkhead_agent::protocol::{PROCESS_TYPE_URL, SPEC_TYPE_URL};
use bulkhead_agent::socket::Socket;
use bulkhead_agent::sys::{self, Fork};
use bulkhead_agent::{cgroup, serve};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest,
    StartRequest, StateRequest, StateResponse, WaitRequest,
};
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_protos::types::mount::Mount;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use ttrpc::Code;
use ttrpc::asynchronous::Client;

/// The clients of a running agent.
pub struct Guest {
    pub task: TaskClient,
    pub sandbox: SandboxClient,
    pub directory: PathBuf,
    /// The control group in which those of the containers are.
    pub group: PathBuf,
    pub host: UnixListener,
    connection: UnixStream,
    next: AtomicU64,
}

/// Makes the control group of the agent's containers.
pub fn group() -> PathBuf {
    let root = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        "/sys/fs/cgroup"
    } else {
        "/sys/fs/cgroup/unified"
    };
    let group = Path::new(root).join(format!("bulkhead-agent-test-{}", std::process::id()));
    std::fs::create_dir_all(&group).unwrap();
    cgroup::delegate(Path::new(root)).unwrap();
    cgroup::delegate(&group).unwrap();
    group
}

/// Starts an agent; the caller must have one thread only. Returns the number of its process.
pub fn start(directory: &Path, group: PathBuf) -> rustix::process::Pid {
    let own = sys::CLONE_NEWPID | sys::CLONE_NEWNS | sys::CLONE_NEWUTS | sys::CLONE_NEWIPC;
    match sys::fork_into(own, None).unwrap() {
        Fork::Parent(pid, _) => pid,
        Fork::Child => {
            // Whatever becomes of the tests, nothing is left of the guest.
            let signal = Some(rustix::process::Signal::KILL);
            rustix::process::set_parent_process_death_signal(signal).unwrap();
            run(directory, group);
            sys::exit(1)
        }
    }
}

fn run(directory: &Path, group: PathBuf) {
    bulkhead_agent::init::protect().unwrap();
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .unwrap();
    // A root that another can take the place of, which an initramfs is not.
    let root = bulkhead_agent::child::root::clone_tree(Path::new("/")).unwrap();
    bulkhead_agent::child::root::attach(&root, Path::new("/")).unwrap();
    rustix::process::fchdir(&root).unwrap();
    rustix::process::chroot(".").unwrap();
    mount("proc", "/proc", "proc", MountFlags::empty(), None).unwrap();
    let run = directory.join("run");
    std::fs::create_dir(&run).unwrap();
    mount("tmpfs", &run, "tmpfs", MountFlags::empty(), None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let directory = directory.to_owned();
    runtime.block_on(async {
        let agent = Agent::new(Paths { run, cgroup: group }).unwrap();
        let listener = tokio::net::UnixListener::bind(directory.join("streams")).unwrap();
        let streams = agent.streams.clone();
        tokio::spawn(async move {
            loop {
                let stream = listener.accept().await.unwrap().0.into_std().unwrap();
                let stream = Socket::new(OwnedFd::from(stream)).unwrap();
                tokio::spawn(streams.clone().offer(stream));
            }
        });
        let dial = move || {
            let socket = UnixStream::connect(directory.join("host"));
            async { socket.and_then(|socket| socket.set_nonblocking(true).map(|()| socket.into())) }
        };
        let error = serve::serve(agent, dial).await;
        eprintln!("agent: {error}");
    });
}

/// A process with its streams, on this side.
pub struct Streams {
    pub input: Option<UnixStream>,
    pub output: Option<UnixStream>,
    pub error: Option<UnixStream>,
    pub names: [String; 3],
}

/// What a container printed and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub status: u32,
    pub output: String,
    pub error: String,
}

impl Guest {
    /// Waits for the agent's connection.
    pub async fn connect(directory: &Path, group: &Path, host: UnixListener) -> Self {
        let socket = host.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        let connection = socket.try_clone().unwrap();
        let socket = tokio::net::UnixStream::from_std(socket).unwrap();
        let client = Client::new(ttrpc::asynchronous::transport::Socket::new(socket));
        let sandbox = SandboxClient::new(client.clone());
        sandbox
            .setup(context(), &SetupRequest::new())
            .await
            .unwrap();
        Self {
            task: TaskClient::new(client),
            sandbox,
            directory: directory.to_owned(),
            group: group.to_owned(),
            host,
            connection,
            next: AtomicU64::new(1),
        }
    }

    /// Breaks the connection.
    pub fn disconnect(&self) {
        self.connection.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// A number that nothing had yet.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Opens a stream with a new number.
    pub fn stream(&self) -> (UnixStream, String) {
        let number = self.number();
        let mut stream = UnixStream::connect(self.directory.join("streams")).unwrap();
        stream.write_all(&number.to_le_bytes()).unwrap();
        (stream, number.to_string())
    }

    /// Opens all streams of a process.
    pub fn streams(&self, terminal: bool) -> Streams {
        let ((input, a), (output, b)) = (self.stream(), self.stream());
        let (error, c) = match terminal {
            true => (None, String::new()),
            false => {
                let (error, name) = self.stream();
                (Some(error), name)
            }
        };
        Streams {
            input: Some(input),
            output: Some(output),
            error,
            names: [a, b, c],
        }
    }

    /// A new root with busybox.
    pub fn root(&self) -> PathBuf {
        let root = self.directory.join(format!("root-{}", self.number()));
        for directory in [
            "bin",
            "etc",
            "tmp",
            "dev",
            "proc",
            "sys",
            "run",
            "home/user",
        ] {
            std::fs::create_dir_all(root.join(directory)).unwrap();
        }
        let busybox = self.directory.join("busybox");
        std::fs::hard_link(&busybox, root.join("bin/busybox")).unwrap();
        for name in BUSYBOX {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        let users = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
        std::fs::write(root.join("etc/passwd"), users).unwrap();
        root
    }

    /// Creates a container.
    pub async fn create(
        &self,
        id: &str,
        spec: &Value,
        root: &[Mount],
        streams: &Streams,
        terminal: bool,
    ) -> ttrpc::Result<u32> {
        let request = CreateTaskRequest {
            id: id.into(),
            rootfs: root.to_vec(),
            terminal,
            stdin: streams.names[0].clone(),
            stdout: streams.names[1].clone(),
            stderr: streams.names[2].clone(),
            options: any(SPEC_TYPE_URL, spec),
            ..Default::default()
        };
        Ok(self.task.create(context(), &request).await?.pid)
    }

    /// Starts a process.
    pub async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        Ok(self.task.start(context(), &request).await?.pid)
    }

    /// Waits for a process's exit.
    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        Ok(self.task.wait(context(), &request).await?.exit_status)
    }

    /// Deletes a process.
    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.delete(context(), &request).await
    }

    /// Sends a signal.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.task.kill(context(), &request).await.map(drop)
    }

    /// The state of a process.
    pub async fn state(&self, id: &str, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.state(context(), &request).await
    }

    /// Adds an exec.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        streams: &Streams,
        terminal: bool,
    ) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            terminal,
            stdin: streams.names[0].clone(),
            stdout: streams.names[1].clone(),
            stderr: streams.names[2].clone(),
            spec: any(PROCESS_TYPE_URL, process),
            ..Default::default()
        };
        self.task.exec(context(), &request).await.map(drop)
    }

    /// Runs a container to its end, without input.
    pub async fn run(&self, spec: &Value) -> ttrpc::Result<Outcome> {
        let root = [bind(&self.root())];
        self.run_in(spec, &root).await
    }

    /// The same with a certain root.
    pub async fn run_in(&self, spec: &Value, root: &[Mount]) -> ttrpc::Result<Outcome> {
        let id = format!("c{}", self.number());
        let mut streams = self.streams(false);
        self.create(&id, spec, root, &streams, false).await?;
        self.start(&id, "").await?;
        drop(streams.input.take());
        let (output, error) = (streams.output.take(), streams.error.take());
        let output = std::thread::spawn(|| all(output));
        let error = std::thread::spawn(|| all(error));
        let status = self.wait(&id, "").await?;
        let (output, error) = (output.join().unwrap(), error.join().unwrap());
        self.delete(&id, "").await?;
        Ok(Outcome {
            status,
            output,
            error,
        })
    }

    /// Runs a shell command in a container with the plain specification.
    pub async fn shell(&self, command: &str) -> Outcome {
        self.run(&spec(&["sh", "-c", command])).await.unwrap()
    }
}

/// What the tests use of busybox.
const BUSYBOX: [&str; 32] = [
    "sh", "true", "false", "echo", "cat", "ls", "id", "sleep", "kill", "mount", "stat", "hostname",
    "touch", "mkdir", "ps", "grep", "head", "tty", "stty", "env", "pwd", "wc", "dd", "mknod",
    "readlink", "ln", "rm", "umask", "nice", "find", "md5sum", "test",
];

/// All that comes out of a stream.
pub fn all(stream: Option<UnixStream>) -> String {
    let mut text = Vec::new();
    if let Some(mut stream) = stream {
        stream.read_to_end(&mut text).unwrap();
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// A root that is a directory.
pub fn bind(root: &Path) -> Mount {
    Mount {
        type_: "bind".into(),
        source: root.to_str().unwrap().into(),
        ..Default::default()
    }
}

/// The specification of a container that runs a command, much as container engines write it.
pub fn spec(arguments: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": process(arguments),
        "root": {"path": "rootfs"},
        "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": "/default/x",
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// The specification of a process.
pub fn process(arguments: &[&str]) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ];
    json!({
        "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
        "args": arguments,
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": true,
    })
}

pub fn any(url: &str, value: &Value) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: url.into(),
        value: value.to_string().into_bytes(),
        ..Default::default()
    })
}

pub fn context() -> ttrpc::context::Context {
    ttrpc::context::Context::default()
}

/// The code and text of an error.
pub fn status<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("expected an error, got {other:?}"),
    }
}
