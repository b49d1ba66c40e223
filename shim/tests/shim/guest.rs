//! The program that runs as the VMM: it has no machine, but speaks for one, and for the agent in it. Containers "run" the few programs
//! that [`Guest::run`] knows. Nobody sees this process panic, but its exit code is then 101.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::pin::pin;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bulkhead_agent::protocol::sandbox::{
    NextOomRequest, NextOomResponse, SetupRequest, SetupResponse,
};
use bulkhead_agent::protocol::sandbox_ttrpc::{Sandbox, create_sandbox};
use bulkhead_agent::protocol::{AGENT_PORT, SPEC_TYPE_URL, STREAM_PORT};
use bulkhead_vmm::control::{Channel, Dropped, Event, Request, StopReason};
use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo,
    ResumeRequest, StartRequest, StartResponse, StatsRequest, StatsResponse, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::well_known_types::any::Any;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, watch};
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::error::get_rpc_status;
use ttrpc::{Code, Result};

/// The first slot of a disk.
const FIRST_SLOT: u8 = 4;

pub fn main() {
    // SAFETY: the launcher put the control socket there, and this is the only place that takes it.
    let control = Arc::new(Channel::from(unsafe { OwnedFd::from_raw_fd(3) }));
    let (request, descriptors) = control.receive().unwrap();
    let Request::Boot(boot) = request else {
        panic!("{request:?}");
    };
    let mut console = File::from(descriptors.into_iter().nth(2).unwrap());
    console.write_all(b"guest: up\n").unwrap();
    let slots = (FIRST_SLOT..).take(boot.disks.len()).collect();
    control.send(&Event::Started { slots }, &[]).unwrap();
    if boot.cmdline.ends_with("test.panic") {
        console.write_all(b"Kernel panic - not syncing\n").unwrap();
        return stop(&control, StopReason::Panic);
    }
    let (opened, streams) = mpsc::unbounded_channel();
    let requests = Arc::clone(&control);
    let next = FIRST_SLOT + boot.disks.len() as u8;
    std::thread::spawn(move || serve_control(&requests, &opened, next));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    if boot.cmdline.ends_with("test.hang") {
        return runtime.block_on(std::future::pending());
    }
    runtime.block_on(serve_agent(control, streams));
}

fn stop(control: &Channel, reason: StopReason) {
    control.send(&Event::Stopped { reason }, &[]).unwrap();
    std::process::exit(0);
}

/// Answers the shim as a VMM.
fn serve_control(control: &Channel, opened: &mpsc::UnboundedSender<StdStream>, mut next: u8) {
    // Of those, none is to be there any more when the next disk comes.
    let mut refused = HashSet::new();
    while let Ok((request, descriptors)) = control.receive() {
        if matches!(request, Request::AttachDisk { .. }) {
            assert_eq!(refused, HashSet::new());
        }
        let answer = match request {
            Request::Detach { tag, slot } if refused.insert(slot) => Event::Refused {
                tag,
                error: "the guest has taken it up again".into(),
            },
            Request::Detach { tag, slot } => {
                refused.remove(&slot);
                Event::Detached { tag }
            }
            Request::AttachDisk { tag, .. }
            | Request::AttachNic { tag, .. }
            | Request::AttachVsock { tag, .. } => {
                next += 1;
                Event::Attached {
                    tag,
                    slot: next - 1,
                }
            }
            Request::UpdateNic { tag, .. } => Event::NicUpdated {
                tag,
                dropped: Dropped::default(),
            },
            Request::Connect { port } => {
                assert_eq!(port, STREAM_PORT);
                for descriptor in descriptors {
                    opened.send(descriptor.into()).unwrap();
                }
                continue;
            }
            Request::Boot(_) => panic!("booted twice"),
        };
        control.send(&answer, &[]).unwrap();
    }
    std::process::exit(0);
}

/// Dials, and serves as the agent.
async fn serve_agent(control: Arc<Channel>, mut opened: mpsc::UnboundedReceiver<StdStream>) {
    let agent = Arc::new(Agent(Arc::new(Guest {
        control,
        processes: Mutex::default(),
        streams: Mutex::default(),
        opened: Notify::new(),
        oom: Mutex::default(),
        killed_for_memory: Notify::new(),
        told: Notify::new(),
        refused: Notify::new(),
    })));
    let guest = Arc::clone(&agent.0);
    let (ours, theirs) = StdStream::pair().unwrap();
    let dialled = Event::StreamOpened { port: AGENT_PORT };
    guest.control.send(&dialled, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let connection = async move { Socket::try_from(ours) };
    let mut server = Server::new()
        .add_listener(Listener::new(futures_util::stream::once(connection)))
        .register_service(create_sandbox(agent.clone()))
        .register_service(create_task(agent));
    server.start().await.unwrap();
    while let Some(mut stream) = opened.recv().await {
        let mut number = [0; 8];
        stream.set_nonblocking(false).unwrap();
        stream.read_exact(&mut number).unwrap();
        stream.set_nonblocking(true).unwrap();
        let stream = UnixStream::from_std(stream).unwrap();
        let name = u64::from_le_bytes(number).to_string();
        guest.streams.lock().unwrap().insert(name, stream);
        guest.opened.notify_waiters();
    }
}

type Key = (String, String);

struct Guest {
    control: Arc<Channel>,
    processes: Mutex<HashMap<Key, Process>>,
    streams: Mutex<HashMap<String, UnixStream>>,
    /// There is one more of them.
    opened: Notify,
    oom: Mutex<Vec<String>>,
    killed_for_memory: Notify,
    /// Some process's end was told to the shim.
    told: Notify,
    /// The start of "refused" was refused.
    refused: Notify,
}

struct Agent(Arc<Guest>);

struct Process {
    program: Vec<String>,
    stdin: String,
    stdout: String,
    exit: watch::Sender<Option<u32>>,
}

fn not_found(what: &str) -> ttrpc::Error {
    get_rpc_status(Code::NOT_FOUND, what)
}

impl Guest {
    fn add(&self, key: Key, args: &serde_json::Value, stdin: String, stdout: String) {
        let program: Vec<String> = serde_json::from_value(args.clone()).unwrap();
        let process = Process {
            program,
            stdin,
            stdout,
            exit: watch::Sender::new(None),
        };
        self.processes.lock().unwrap().insert(key, process);
    }

    fn with<T>(&self, id: &str, exec_id: &str, act: impl FnOnce(&Process) -> T) -> Result<T> {
        let key = (id.to_owned(), exec_id.to_owned());
        let processes = self.processes.lock().unwrap();
        let process = processes.get(&key).ok_or_else(|| not_found("no process"))?;
        Ok(act(process))
    }

    fn end(&self, id: &str, exec_id: &str, status: u32) -> Result<()> {
        self.with(id, exec_id, |process| {
            process.exit.send_if_modified(|exit| {
                let first = exit.is_none();
                exit.get_or_insert(status);
                first
            });
        })
    }

    async fn stream(&self, name: &str) -> Option<UnixStream> {
        if name.is_empty() {
            return None;
        }
        loop {
            let mut opened = pin!(self.opened.notified());
            opened.as_mut().enable();
            if let Some(stream) = self.streams.lock().unwrap().remove(name) {
                return Some(stream);
            }
            opened.await;
        }
    }

    /// "Runs" a program to its end.
    async fn run(self: Arc<Self>, id: String, exec_id: String) {
        let (program, stdin, stdout) = self
            .with(&id, &exec_id, |p| {
                (p.program.clone(), p.stdin.clone(), p.stdout.clone())
            })
            .unwrap();
        let (mut stdin, mut stdout) = (self.stream(&stdin).await, self.stream(&stdout).await);
        let argument = program.get(1).map(String::as_str).unwrap_or_default();
        let status = match program[0].as_str() {
            // Nobody hears that "sticky" was deleted.
            "exit" | "sticky" => argument.parse().unwrap(),
            "echo" => {
                let text = format!("{argument}\n");
                stdout
                    .as_mut()
                    .unwrap()
                    .write_all(text.as_bytes())
                    .await
                    .unwrap();
                0
            }
            "cat" => {
                let (input, output) = (stdin.as_mut().unwrap(), stdout.as_mut().unwrap());
                tokio::io::copy(input, output).await.unwrap();
                0
            }
            "eat" => {
                self.oom.lock().unwrap().push(id.clone());
                self.killed_for_memory.notify_one();
                137
            }
            "crash" => return stop(&self.control, StopReason::Failed("crash".into())),
            // After "mute" was killed, there is no answer; "kept" is never deleted.
            "wait" | "mute" | "kept" => {
                let mut exit = self.with(&id, &exec_id, |p| p.exit.subscribe()).unwrap();
                exit.wait_for(Option::is_some).await.unwrap().unwrap()
            }
            other => panic!("program {other:?}"),
        };
        drop((stdin, stdout));
        self.end(&id, &exec_id, status).unwrap();
    }
}

#[async_trait]
impl Sandbox for Agent {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> Result<SetupResponse> {
        assert_eq!(request.scratch_slot, u32::from(FIRST_SLOT) + 1);
        assert!(request.unix_nanos > 0 && request.entropy.iter().any(|&byte| byte != 0));
        Ok(SetupResponse::new())
    }

    async fn next_oom(&self, _: &TtrpcContext, _: NextOomRequest) -> Result<NextOomResponse> {
        loop {
            let killed = self.0.oom.lock().unwrap().pop();
            if let Some(container_id) = killed {
                return Ok(NextOomResponse {
                    container_id,
                    ..Default::default()
                });
            }
            self.0.killed_for_memory.notified().await;
        }
    }
}

#[async_trait]
impl Task for Agent {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Result<CreateTaskResponse> {
        assert_eq!(request.options.type_url, SPEC_TYPE_URL);
        let spec: serde_json::Value = serde_json::from_slice(&request.options.value).unwrap();
        let args = &spec["process"]["args"];
        if args[0] == "missing" {
            return Err(not_found(
                "exec: \"missing\": executable file not found in $PATH",
            ));
        }
        // Whether it is in the network that its arguments say.
        let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
        let own = namespaces.iter().any(|entry| entry["type"] == "network");
        if own && args[1] == "machine's-network" || !own && args[1] == "own-network" {
            return Err(not_found("it is in another network"));
        }
        if args[0] == "slow" {
            // Not before the host has read it.
            let mut stdout = self.0.stream(&request.stdout).await.unwrap();
            stdout.write_all(&[0; 1 << 20]).await.unwrap();
        }
        self.0.add(
            (request.id, String::new()),
            args,
            request.stdin,
            request.stdout,
        );
        Ok(CreateTaskResponse::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let spec: serde_json::Value = serde_json::from_slice(&request.spec.value).unwrap();
        let key = (request.id, request.exec_id);
        self.0
            .add(key, &spec["args"], request.stdin, request.stdout);
        Ok(Empty::new())
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let (id, exec_id) = (request.id, request.exec_id);
        let program = self
            .0
            .with(&id, &exec_id, |process| process.program.clone())?;
        match program[0].as_str() {
            "missing" => return Err(not_found("exec: \"missing\": executable file not found")),
            "refused" => {
                self.0.refused.notify_one();
                return Err(get_rpc_status(Code::UNKNOWN, "a hook failed"));
            }
            "stuck" => std::future::pending::<()>().await,
            // Its end is told before its start.
            "quick" => {
                self.0.end(&id, &exec_id, 5)?;
                self.0.told.notified().await;
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
            }
            _ => drop(tokio::spawn(Arc::clone(&self.0).run(id, exec_id))),
        }
        Ok(StartResponse::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let mut exit = self
            .0
            .with(&request.id, &request.exec_id, |p| p.exit.subscribe())?;
        let exit_status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        self.0.told.notify_one();
        Ok(WaitResponse {
            exit_status,
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let (id, exec_id) = (&request.id, &request.exec_id);
        let program = self.0.with(id, exec_id, |p| p.program[0].clone())?;
        if program == "refused" {
            // Its end is told when somebody asks for its processes.
            return Err(not_found("process already finished"));
        }
        self.0.end(id, exec_id, 128 + request.signal)?;
        if program == "mute" {
            std::future::pending::<()>().await;
        }
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let key = (request.id, request.exec_id);
        if self.0.with(&key.0, &key.1, |p| p.program[0] == "kept")? {
            return Err(get_rpc_status(Code::INTERNAL, "it is busy"));
        }
        let process = self.0.processes.lock().unwrap().remove(&key);
        if process.is_some_and(|p| p.program[0] == "sticky") {
            std::future::pending::<()>().await;
        }
        Ok(DeleteResponse::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        if self
            .0
            .with(&request.id, "", |p| p.program[0] == "refused")?
        {
            self.0.refused.notified().await;
            self.0.end(&request.id, "", 1)?;
        }
        let processes = self.0.processes.lock().unwrap();
        let processes = processes.keys().filter(|(id, _)| *id == request.id);
        Ok(PidsResponse {
            processes: processes.map(|_| ProcessInfo::new()).collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> Result<Empty> {
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> Result<Empty> {
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        match request.resources.value.as_slice() {
            b"{}" => Ok(Empty::new()),
            _ => Err(get_rpc_status(Code::OUT_OF_RANGE, "too much")),
        }
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let stats = Any {
            type_url: "io.containerd.cgroups.v2.Metrics".into(),
            value: request.id.into_bytes(),
            ..Default::default()
        };
        Ok(StatsResponse {
            stats: Some(stats).into(),
            ..Default::default()
        })
    }
}
