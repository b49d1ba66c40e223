//! A client of the Task service.

use std::fmt;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    Mount, PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::proto::Request;
use containerd_shim_protos::ttrpc::{self, Client};
use serde_json::{Value, json};

use super::{Bundle, PATIENCE};
use crate::error::{Error, Result};

/// The service's name to containerd 1.6 and 1.7.
pub(super) const V2: &str = "containerd.task.v2.Task";

/// Its name to containerd 2.
pub const V3: &str = "containerd.task.v3.Task";

/// Where standard streams are; empty is nowhere.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// A mount of a root file system.
pub fn mount<T: AsRef<str>>(kind: &str, source: &str, options: &[T]) -> Mount {
    let options = options.iter().map(|option| option.as_ref().to_owned());
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.collect(),
        ..Default::default()
    }
}

/// A connection to a shim.
#[derive(Clone)]
pub struct Shim {
    client: Client,
    service: &'static str,
}

impl fmt::Debug for Shim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Shim")
    }
}

/// The outcome of a request: `OK`, or the error's code.
pub fn code<T>(result: &ttrpc::Result<T>) -> String {
    match result {
        Ok(_) => "OK".into(),
        Err(ttrpc::Error::RpcStatus(status)) => format!("{:?}", status.code()),
        Err(error) => error.to_string(),
    }
}

impl Shim {
    pub(super) fn connect(address: &str, service: &'static str) -> Result<Self> {
        let client = Client::connect(address)
            .map_err(|error| Error::Unfit(format!("cannot connect to {address:?}: {error}")))?;
        Ok(Self { client, service })
    }

    fn call<T: Message>(&self, method: &str, request: &impl Message) -> ttrpc::Result<T> {
        let mut call = Request::new();
        call.service = self.service.into();
        call.method = method.into();
        call.timeout_nano = PATIENCE.as_nanos() as i64;
        let broken = |error| ttrpc::Error::Others(format!("{method}: {error}"));
        call.payload = request.write_to_bytes().map_err(broken)?;
        let response = self.client.request(call)?;
        T::parse_from_bytes(&response.payload).map_err(broken)
    }

    /// Create, with the bundle's root file system as a mount.
    pub fn create(&self, bundle: &Bundle, stdio: &Paths) -> ttrpc::Result<u32> {
        self.create_of(
            bundle,
            vec![mount("overlay", "overlay", &bundle.overlay)],
            stdio,
        )
    }

    /// Create, with a root file system made of these mounts.
    pub fn create_of(
        &self,
        bundle: &Bundle,
        rootfs: Vec<Mount>,
        stdio: &Paths,
    ) -> ttrpc::Result<u32> {
        let request = CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.path.display().to_string(),
            rootfs,
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            ..Default::default()
        };
        let response: CreateTaskResponse = self.call("Create", &request)?;
        Ok(response.pid)
    }

    /// Start of an init (empty exec identifier) or an exec, like all that follow.
    pub fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let response: StartResponse = self.call("Start", &request)?;
        Ok(response.pid)
    }

    /// Exec of a program as root.
    pub fn exec(
        &self,
        id: &str,
        exec_id: &str,
        args: &[&str],
        stdio: &Paths,
    ) -> ttrpc::Result<Empty> {
        self.exec_changed(id, exec_id, args, stdio, |_| {})
    }

    /// The same, with a process that is described otherwise.
    pub fn exec_changed(
        &self,
        id: &str,
        exec_id: &str,
        args: &[&str],
        stdio: &Paths,
        change: impl FnOnce(&mut Value),
    ) -> ttrpc::Result<Empty> {
        let mut process = super::bundle::process(args);
        change(&mut process);
        process["terminal"] = json!(stdio.terminal);
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            spec: json_any("Process", &process),
            ..Default::default()
        };
        self.call("Exec", &request)
    }

    /// State.
    pub fn state(&self, id: &str, exec_id: &str) -> ttrpc::Result<StateResponse> {
        let request = StateRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.call("State", &request)
    }

    /// The status alone, or the error's code.
    pub fn status(&self, id: &str, exec_id: &str) -> String {
        match self.state(id, exec_id) {
            Ok(state) => format!("{:?}", state.status),
            error => code(&error),
        }
    }

    pub fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<WaitResponse> {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.call("Wait", &request)
    }

    pub fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> ttrpc::Result<Empty> {
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal,
            all,
            ..Default::default()
        };
        self.call("Kill", &request)
    }

    pub fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.call("Delete", &request)
    }

    pub fn pause(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = PauseRequest {
            id: id.into(),
            ..Default::default()
        };
        self.call("Pause", &request)
    }

    pub fn resume(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = ResumeRequest {
            id: id.into(),
            ..Default::default()
        };
        self.call("Resume", &request)
    }

    pub fn close_stdin(&self, id: &str, exec_id: &str) -> ttrpc::Result<Empty> {
        let request = CloseIORequest {
            id: id.into(),
            exec_id: exec_id.into(),
            stdin: true,
            ..Default::default()
        };
        self.call("CloseIO", &request)
    }

    pub fn resize(&self, id: &str, exec_id: &str, size: (u32, u32)) -> ttrpc::Result<Empty> {
        let request = ResizePtyRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            width: size.0,
            height: size.1,
            ..Default::default()
        };
        self.call("ResizePty", &request)
    }

    pub fn pids(&self, id: &str) -> ttrpc::Result<PidsResponse> {
        let request = PidsRequest {
            id: id.into(),
            ..Default::default()
        };
        self.call("Pids", &request)
    }

    pub fn update(&self, id: &str, resources: &Value) -> ttrpc::Result<Empty> {
        let request = UpdateTaskRequest {
            id: id.into(),
            resources: json_any("LinuxResources", resources),
            ..Default::default()
        };
        self.call("Update", &request)
    }

    pub fn stats(&self, id: &str) -> ttrpc::Result<StatsResponse> {
        let request = StatsRequest {
            id: id.into(),
            ..Default::default()
        };
        self.call("Stats", &request)
    }

    pub fn server(&self, id: &str) -> ttrpc::Result<ConnectResponse> {
        let request = ConnectRequest {
            id: id.into(),
            ..Default::default()
        };
        self.call("Connect", &request)
    }

    pub fn checkpoint(&self, id: &str, path: &str) -> ttrpc::Result<Empty> {
        let request = CheckpointTaskRequest {
            id: id.into(),
            path: path.into(),
            ..Default::default()
        };
        self.call("Checkpoint", &request)
    }

    /// Shutdown. A shim that ends at once may not answer.
    pub fn shutdown(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = ShutdownRequest {
            id: id.into(),
            ..Default::default()
        };
        self.call("Shutdown", &request)
    }

    /// A method that no shim has.
    pub fn unknown(&self) -> ttrpc::Result<Empty> {
        self.call("NoSuchMethod", &Empty::new())
    }
}

fn json_any(kind: &str, value: &Value) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}"),
        value: value.to_string().into_bytes(),
        ..Default::default()
    })
}
