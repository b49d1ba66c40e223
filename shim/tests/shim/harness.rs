//! containerd, as far as a shim sees it: bundles, `start` and `delete`, the event service.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest,
    ForwardRequest, KillRequest, ShutdownRequest, StartRequest, StateRequest, StateResponse,
    Status, WaitRequest, WaitResponse,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::shim_async::{Events, TaskClient, create_events};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use ttrpc::asynchronous::{Client, Server, TtrpcContext};
use ttrpc::context::Context;

/// The shim's binary.
pub const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2");

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn context() -> Context {
    ttrpc::context::with_duration(PATIENCE)
}

/// A host with a containerd.
pub struct Host {
    pub dir: TempDir,
    server: Option<Server>,
    sender: mpsc::UnboundedSender<String>,
    events: mpsc::UnboundedReceiver<String>,
    config: Vec<String>,
}

struct Recorder(mpsc::UnboundedSender<String>);

#[async_trait]
impl Events for Recorder {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        assert_eq!(envelope.namespace, "test");
        let mut text = envelope.topic.trim_start_matches("/tasks/").to_owned();
        let bytes = &envelope.event.value;
        match text.as_str() {
            "exit" => {
                let exit = TaskExit::parse_from_bytes(bytes).unwrap();
                assert!(exit.pid > 0 && exit.exited_at.seconds > 0);
                text = format!("exit {} {}", exit.id, exit.exit_status);
            }
            "oom" => {
                let oom = TaskOOM::parse_from_bytes(bytes).unwrap();
                text = format!("oom {}", oom.container_id);
            }
            _ => {}
        }
        self.0.send(text).unwrap();
        Ok(Empty::new())
    }
}

impl Host {
    pub async fn new() -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let mut host = Self {
            dir: tempfile::tempdir().unwrap(),
            server: None,
            sender,
            events,
            config: Vec::new(),
        };
        for key in ["vmm", "kernel"] {
            let executable = std::env::current_exe().unwrap();
            host.configure(&format!("{key} = {executable:?}"));
        }
        let image = host.path("image");
        fs::write(&image, [0; 1024]).unwrap();
        host.configure(&format!("image = {image:?}"));
        for key in ["state_dir", "cache_dir", "scratch_dir"] {
            let directory = host.path(key);
            host.configure(&format!("{key} = {directory:?}"));
        }
        host.listen().await;
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Adds a line to the configuration.
    pub fn configure(&mut self, line: &str) {
        self.config.push(line.to_owned());
        fs::write(self.path("config.toml"), self.config.join("\n")).unwrap();
    }

    /// Starts containerd's event service.
    pub async fn listen(&mut self) {
        let path = self.path("containerd.sock.ttrpc");
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Recorder(self.sender.clone()))));
        server.start().await.unwrap();
        // As containerd does, once it listens.
        fs::set_permissions(&path, Permissions::from_mode(0o660)).unwrap();
        self.server = Some(server);
    }

    /// Ends it.
    pub async fn hang_up(&mut self) {
        self.server.take().unwrap().shutdown().await.unwrap();
        fs::remove_file(self.path("containerd.sock.ttrpc")).unwrap();
    }

    /// The next event.
    pub async fn event(&mut self) -> String {
        tokio::time::timeout(PATIENCE, self.events.recv())
            .await
            .expect("an event")
            .unwrap()
    }

    /// Checks the next events.
    pub async fn expect(&mut self, expected: &[&str]) {
        for expected in expected {
            assert_eq!(self.event().await, *expected);
        }
    }

    /// Checks that no event is left to come, once the shim has ended.
    pub fn expect_no_more(&mut self) {
        let left = self.events.try_recv();
        assert!(left.is_err(), "{left:?}");
    }

    /// A bundle whose container runs a program.
    pub fn bundle(&self, id: &str, args: &[&str], annotations: Value) -> PathBuf {
        let bundle = self.path(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("rootfs/file"), "content").unwrap();
        let config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "annotations": annotations,
            "linux": {
                "cgroupsPath": format!("/bulkhead-test-{}/{id}", std::process::id()),
                "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network"}],
            },
        });
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        bundle
    }

    /// Runs the shim's binary as containerd does.
    fn call(&self, bundle: &Path, args: &[&str], input: &[u8]) -> Result<Vec<u8>, String> {
        self.call_in(bundle, args, input, &[])
    }

    /// The same, with variables of a later containerd in the environment.
    fn call_in(
        &self,
        bundle: &Path,
        args: &[&str],
        input: &[u8],
        environment: &[(&str, &str)],
    ) -> Result<Vec<u8>, String> {
        let mut child = Command::new(SHIM)
            .args(["-namespace", "test"])
            .arg("-address")
            .arg(self.path("containerd.sock"))
            .args(["-publish-binary", "containerd", "-id"])
            .arg(bundle.file_name().unwrap())
            .args(args)
            .env("TTRPC_ADDRESS", self.path("containerd.sock.ttrpc"))
            .envs(environment.iter().copied())
            .current_dir(bundle)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        if output.status.success() {
            assert_eq!(errors, "");
            Ok(output.stdout)
        } else {
            Err(String::from_utf8(output.stdout).unwrap() + &errors)
        }
    }

    /// `start`, in the words of containerd 2.3, which can say where the socket is to be.
    pub fn start(&self, bundle: &Path) -> Result<String, String> {
        let params = BootstrapParams {
            instance_id: bundle.file_name().unwrap().to_str().unwrap().into(),
            namespace: "test".into(),
            containerd_ttrpc_address: self.path("containerd.sock.ttrpc").display().to_string(),
            socket_dir: Some(self.path("s").display().to_string()),
            ..Default::default()
        };
        let reply = self.call(bundle, &["start"], &params.write_to_bytes().unwrap())?;
        let result = BootstrapResult::parse_from_bytes(&reply).unwrap();
        assert_eq!((result.version, result.protocol.as_str()), (2, "ttrpc"));
        assert_eq!(
            fs::read_to_string(bundle.join("address")).unwrap(),
            result.address
        );
        Ok(result.address)
    }

    /// `start`, in the words of containerd 1.6.
    pub fn start_plainly(&self, bundle: &Path) -> Result<String, String> {
        let reply = self.call(bundle, &["start"], b"")?;
        Ok(String::from_utf8(reply).unwrap())
    }

    /// The same with a runtime's options, which containerd 1.6 to 2.2 send if there are some.
    pub fn start_with_options(&self, bundle: &Path) -> Result<String, String> {
        let reply = self.call(bundle, &["start"], &self.options())?;
        Ok(String::from_utf8(reply).unwrap())
    }

    /// The same in the words of containerd 1.7 to 2.2.
    pub fn start_in_new_environment(&self, bundle: &Path) -> Result<String, String> {
        let address = self.path("containerd.sock").display().to_string();
        let environment = [
            ("MAX_SHIM_VERSION", "2"),
            ("GRPC_ADDRESS", &address),
            ("NAMESPACE", "test"),
        ];
        let reply = self.call_in(bundle, &["start"], &self.options(), &environment)?;
        Ok(String::from_utf8(reply).unwrap())
    }

    /// `-info`, which containerd 2 asks for with a runtime's options.
    pub fn info(&self, bundle: &Path) -> RuntimeInfo {
        let reply = self.call(bundle, &["-info"], &self.options()).unwrap();
        RuntimeInfo::parse_from_bytes(&reply).unwrap()
    }

    /// `-v`.
    pub fn version(&self, bundle: &Path) -> String {
        String::from_utf8(self.call(bundle, &["-v"], b"").unwrap()).unwrap()
    }

    /// A runtime's options on standard input.
    fn options(&self) -> Vec<u8> {
        self.runtime_options().write_to_bytes().unwrap()
    }

    /// A runtime's options, which name a configuration.
    fn runtime_options(&self) -> Any {
        let path = self.path("config.toml").display().to_string();
        let mut options = vec![0x12, path.len() as u8];
        options.extend(path.into_bytes());
        Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: options,
            ..Default::default()
        }
    }

    /// `delete`.
    pub fn delete(&self, bundle: &Path) -> DeleteResponse {
        let args = ["-bundle", bundle.to_str().unwrap(), "delete"];
        let reply = self.call(bundle, &args, b"").unwrap();
        DeleteResponse::parse_from_bytes(&reply).unwrap()
    }

    /// A shim for a bundle, and a connection to it.
    pub async fn shim(&self, bundle: &Path) -> Shim {
        Shim::connect(&self.start(bundle).unwrap()).await
    }

    /// What Create is asked for.
    pub fn create_request(&self, bundle: &Path) -> CreateTaskRequest {
        CreateTaskRequest {
            id: bundle.file_name().unwrap().to_str().unwrap().into(),
            bundle: bundle.to_str().unwrap().into(),
            options: Some(self.runtime_options()).into(),
            ..Default::default()
        }
    }

    /// A FIFO, open at this end.
    pub fn fifo(&self, name: &str) -> (String, File) {
        let path = self.path(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let file = fs::OpenOptions::new()
            .read(true)
            .write(name.ends_with("in"))
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        (path.display().to_string(), file)
    }

    /// What is left of a shim: its socket, its scratch disk, its control groups, a process that mentions this host.
    pub fn remains(&self) -> Vec<String> {
        let mut remains = Vec::new();
        let cgroups = self.cgroups();
        for directory in cgroups
            .iter()
            .chain([&self.path("s"), &self.path("scratch_dir")])
        {
            for entry in fs::read_dir(directory).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() || !cgroups.contains(directory) {
                    remains.push(path.display().to_string());
                }
            }
        }
        remains.extend(self.processes().into_iter().map(|(_, line)| line));
        remains
    }

    /// The control group, in each hierarchy, in which are those of this program's containers.
    fn cgroups(&self) -> Vec<PathBuf> {
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(root).unwrap();
        let mut directories: Vec<_> = hierarchies.map(|entry| entry.unwrap().path()).collect();
        directories.push(root.to_owned());
        for directory in &mut directories {
            directory.push(format!("bulkhead-test-{}", std::process::id()));
        }
        directories
    }

    /// The processes that mention this host, with their command lines.
    fn processes(&self) -> Vec<(i32, String)> {
        let mut processes = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let line = fs::read(path.join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if let Ok(pid) = name.parse()
                && line.contains(self.dir.path().to_str().unwrap())
            {
                processes.push((pid, line));
            }
        }
        processes
    }
}

/// A test leaves no shim behind, however it ends.
impl Drop for Host {
    fn drop(&mut self) {
        let mut pids: Vec<i32> = self.processes().into_iter().map(|(pid, _)| pid).collect();
        for directory in self.cgroups() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                let list = fs::read_to_string(entry.path().join("cgroup.procs"));
                let list = list.unwrap_or_default();
                pids.extend(list.lines().filter_map(|pid| pid.parse::<i32>().ok()));
            }
        }
        // Each may have ended meanwhile, by itself or with another.
        for pid in pids.into_iter().filter_map(Pid::from_raw) {
            if let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) {
                let _ = pidfd_send_signal(&process, Signal::KILL);
                let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], None);
            }
        }
        for directory in self.cgroups() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                // It fails for the files in it, which go with it.
                let _ = fs::remove_dir(entry.path());
            }
            let _ = fs::remove_dir(directory);
        }
    }
}

/// A connection to a shim.
#[derive(Clone)]
pub struct Shim {
    pub client: Client,
    pub task: TaskClient,
    pub socket: PathBuf,
}

impl Shim {
    pub async fn connect(address: &str) -> Self {
        let socket = PathBuf::from(address.strip_prefix("unix://").unwrap());
        let stream = UnixStream::connect(&socket).await.unwrap();
        let client = Client::new(stream.into());
        Self {
            task: TaskClient::new(client.clone()),
            client,
            socket,
        }
    }

    pub async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        Ok(self.task.start(context(), &request).await?.pid)
    }

    pub async fn exec(&self, id: &str, exec_id: &str, args: &[&str]) -> ttrpc::Result<()> {
        let spec = json!({"args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}});
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: spec.to_string().into_bytes(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.task.exec(context(), &request).await.map(drop)
    }

    pub async fn state(&self, id: &str, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.state(context(), &request).await
    }

    pub async fn status(&self, id: &str, exec_id: &str) -> Status {
        self.state(id, exec_id).await.unwrap().status.unwrap()
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<WaitResponse> {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.wait(context(), &request).await
    }

    pub async fn kill(&self, id: &str, exec_id: &str, signal: i32) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            ..Default::default()
        };
        self.task.kill(context(), &request).await.map(drop)
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.task.delete(context(), &request).await
    }

    /// The shim's process and the one that stands for a task.
    pub async fn pids(&self, id: &str) -> (u32, u32) {
        let request = ConnectRequest {
            id: id.into(),
            ..Default::default()
        };
        let response = self.task.connect(context(), &request).await.unwrap();
        (response.shim_pid, response.task_pid)
    }

    /// The VMM: of the shim's processes the one that stands for nothing in the guest.
    pub async fn vmm(&self, stand_ins: &[u32]) -> u32 {
        let (pid, _) = self.pids("").await;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let mut children = children.split_whitespace().map(|pid| pid.parse().unwrap());
        children.find(|pid| !stand_ins.contains(pid)).unwrap()
    }

    /// How often the shim has a file open.
    pub async fn open_fifos(&self, path: &str) -> usize {
        let (pid, _) = self.pids("").await;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        targets.filter(|target| target == Path::new(path)).count()
    }

    /// Ends a shim without tasks, and waits until its process is gone.
    pub async fn shut_down(&self) {
        let (pid, _) = self.pids("").await;
        let request = ShutdownRequest::new();
        self.task.shutdown(context(), &request).await.unwrap();
        gone(pid).await;
    }
}

/// Waits until a process is gone.
pub async fn gone(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    let wait = move || {
        if let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
            let mut fds = [nix::poll::PollFd::new(
                pidfd.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            assert_eq!(nix::poll::poll(&mut fds, 60_000u16), Ok(1));
        }
    };
    tokio::task::spawn_blocking(wait).await.unwrap();
}

/// Kills a process.
pub fn kill(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

/// What a request's error says.
pub fn code(error: &ttrpc::Error) -> ttrpc::Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other:?}"),
    }
}

pub fn text(error: &ttrpc::Error) -> String {
    match error {
        ttrpc::Error::RpcStatus(status) => status.message.clone(),
        other => panic!("{other:?}"),
    }
}

/// Reads a FIFO to its end.
pub async fn read_all(file: File) -> Vec<u8> {
    let mut reader = tokio::net::unix::pipe::Receiver::from_file(file).unwrap();
    let mut bytes = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut reader, &mut bytes)
        .await
        .unwrap();
    bytes
}
