//! containerd's Task service, `containerd.task.v3.Task`, for the containers of a sandbox.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status as TaskStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, Message, MessageField};
use ttrpc::r#async::TtrpcContext;

use crate::agent::Agent;
use crate::cgroup::{devices, stats};
use crate::container::Freezer;
use crate::error::{Context, Error};
use crate::oci::program::{Program, window};
use crate::oci::root::{Binds, Root};
use crate::plan::Creation;
use crate::process::{Process, Status, Streams};
use crate::protocol::{PROCESS_TYPE_URL, RESOURCES_TYPE_URL, SPEC_TYPE_URL};
use crate::streams::parse_name;
use crate::{oci, sys};

/// The service.
#[derive(Debug, Clone)]
pub struct TaskService {
    agent: Arc<Agent>,
}

impl TaskService {
    /// The service for an agent's containers.
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    /// Runs a request to its end, even if the connection ends or the client's patience does: half of it must not remain.
    async fn complete<T: Send + 'static>(
        &self,
        request: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        tokio::spawn(request)
            .await
            .context(|| "serving a request".into())?
    }

    fn creation(request: CreateTaskRequest) -> Result<Creation, Error> {
        check_id(&request.id)?;
        if !request.checkpoint.is_empty() {
            return Err(Error::Unimplemented("checkpoints are not supported".into()));
        }
        let streams = streams(
            request.terminal,
            &request.stdin,
            &request.stdout,
            &request.stderr,
        )?;
        let spec = value("options", &request.options, SPEC_TYPE_URL)?;
        let mut rootfs = request.rootfs;
        Ok(Creation {
            spec: oci::parse_spec(spec)?,
            binds: Binds::take(&mut rootfs)?,
            root: Root::try_from(rootfs.as_slice())?,
            terminal: request.terminal,
            streams,
            id: request.id,
            bundle: request.bundle,
        })
    }

    fn add_exec(&self, request: &ExecProcessRequest) -> Result<(), Error> {
        let container = self.agent.container(&request.id)?;
        check_id(&request.exec_id)?;
        let streams = streams(
            request.terminal,
            &request.stdin,
            &request.stdout,
            &request.stderr,
        )?;
        let spec = oci::parse_process(value("spec", &request.spec, PROCESS_TYPE_URL)?)?;
        let mut program = Program::new(&spec, request.terminal, container.seccomp.clone())?;
        // What it is not given it has as the init has it.
        let init = &container.init.program;
        if spec.capabilities().is_none() {
            program.capabilities = init.capabilities;
        }
        if program.limits.is_empty() {
            program.limits.clone_from(&init.limits);
        }
        if spec.user().umask().is_none() {
            program.umask = init.umask;
        }
        program.oom_score_adjustment = program.oom_score_adjustment.or(init.oom_score_adjustment);
        program.scheduler = program.scheduler.or(init.scheduler);
        program.io_priority = program.io_priority.or(init.io_priority);
        container.add(Process::new(&request.exec_id, program, streams))
    }

    /// Closes the streams, by their names, of what could not be made.
    fn refuse(&self, names: &[String]) {
        for number in names.iter().filter_map(|name| name.parse().ok()) {
            self.agent.streams.refuse(number);
        }
    }

    fn kill_processes(&self, request: &KillRequest) -> Result<(), Error> {
        let container = self.agent.container(&request.id)?;
        // None at all asks whether there is somebody who could get one.
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (0..=64).contains(signal));
        let signal = signal.ok_or_else(|| {
            Error::InvalidArgument(format!("there is no signal {}", request.signal))
        })?;
        let process = container.process(&request.exec_id)?;
        if !request.all || !request.exec_id.is_empty() {
            return process.kill(signal);
        }
        if process.status() == Status::Stopped {
            return Err(Error::NotFound("process already finished".into()));
        }
        if signal == libc::SIGKILL {
            return container.cgroup.kill();
        }
        for pid in container.cgroup.processes()? {
            match sys::send_signal_to(pid, signal) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                sent => sent.context(|| format!("sending signal {signal} to {pid}"))?,
            }
        }
        Ok(())
    }

    fn update_limits(&self, request: &UpdateTaskRequest) -> Result<(), Error> {
        let container = self.agent.container(&request.id)?;
        if container.init.status() == Status::Stopped {
            return Err(Error::FailedPrecondition(format!(
                "cannot update container {:?}: it is stopped",
                request.id
            )));
        }
        let resources = value("resources", &request.resources, RESOURCES_TYPE_URL)?;
        let resources = oci::parse_resources(resources)?;
        let rules = match resources.devices().as_deref() {
            None | Some([]) => None,
            Some(asked) => Some(devices::rules(asked)?),
        };
        self.agent
            .change_limits(&container, &resources, rules.as_deref())
    }

    fn list(&self, request: &PidsRequest) -> Result<PidsResponse, Error> {
        let container = self.agent.container(&request.id)?;
        let execs = container.execs();
        let mut response = PidsResponse::new();
        for pid in container.cgroup.processes()? {
            let mut info = ProcessInfo::new();
            info.pid = pid;
            if let Some(exec) = execs.iter().find(|exec| exec.pid() == pid) {
                let mut details = ProcessDetails::new();
                details.exec_id = exec.exec_id.clone();
                info.info = MessageField::some(any("containerd.runc.v1.ProcessDetails", &details)?);
            }
            response.processes.push(info);
        }
        Ok(response)
    }

    fn describe(&self, request: &StateRequest) -> Result<StateResponse, Error> {
        let container = self.agent.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let status = match (process.status(), container.freezer()) {
            (Status::Stopped, _) => TaskStatus::STOPPED,
            (Status::Added | Status::Created, _) => TaskStatus::CREATED,
            (Status::Running, Freezer::Thawed) => TaskStatus::RUNNING,
            (Status::Running, Freezer::Freezing) => TaskStatus::PAUSING,
            (Status::Running, Freezer::Frozen) => TaskStatus::PAUSED,
        };
        let name =
            |stream: Option<u64>| stream.map(|number| number.to_string()).unwrap_or_default();
        let mut response = StateResponse::new();
        response.id = request.id.clone();
        response.exec_id = request.exec_id.clone();
        response.pid = process.pid();
        response.status = EnumOrUnknown::new(status);
        response.stdin = name(process.streams.input);
        response.stdout = name(process.streams.output);
        response.stderr = name(process.streams.error);
        response.terminal = process.program.terminal;
        if let Some(exit) = process.exit() {
            response.exit_status = exit.status;
            response.exited_at = MessageField::some(timestamp(exit.at));
        }
        Ok(response)
    }
}

/// Identifiers become names of directories.
fn check_id(id: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=200).contains(&id.len()) && id.bytes().all(plain) && !id.starts_with('.') {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!(
            "the identifier {id:?} is not made of letters, digits, '-', '_' and '.'"
        )))
    }
}

fn streams(terminal: bool, input: &str, output: &str, error: &str) -> Result<Streams, Error> {
    let streams = Streams {
        input: parse_name("stdin", input)?,
        output: parse_name("stdout", output)?,
        error: parse_name("stderr", error)?,
    };
    if terminal && streams.error.is_some() {
        return Err(Error::InvalidArgument(
            "stderr is given for a process with a terminal, which has only one output".into(),
        ));
    }
    Ok(streams)
}

/// The JSON in a field that must be of a certain type.
fn value<'a>(field: &str, any: &'a MessageField<Any>, url: &str) -> Result<&'a [u8], Error> {
    match any.as_ref() {
        Some(any) if any.type_url == url => Ok(&any.value),
        Some(any) => Err(Error::InvalidArgument(format!(
            "{field} is of type {:?}: expected {url}",
            any.type_url
        ))),
        None => Err(Error::InvalidArgument(format!("{field} is missing"))),
    }
}

fn any(url: &str, message: &impl Message) -> Result<Any, Error> {
    Ok(Any {
        type_url: url.into(),
        value: message
            .write_to_bytes()
            .context(|| format!("encoding {url}"))?,
        ..Default::default()
    })
}

fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since.as_secs() as i64,
        nanos: since.subsec_nanos() as i32,
        ..Default::default()
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let names = [&request.stdin, &request.stdout, &request.stderr].map(String::clone);
        let agent = self.agent.clone();
        let creation = Self::creation(request).inspect_err(|_| self.refuse(&names))?;
        let container = self
            .complete(async move { agent.create(creation).await })
            .await?;
        let mut response = CreateTaskResponse::new();
        response.pid = container.init.pid();
        Ok(response)
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        // Not apart from this call, so that its answer is on its way before that of a call that waits for the exit.
        let process = self.agent.start(&request.id, &request.exec_id).await?;
        let mut response = StartResponse::new();
        response.pid = process.pid();
        Ok(response)
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let process = if request.exec_id.is_empty() {
            let agent = self.agent.clone();
            self.complete(async move { agent.delete(&request.id).await })
                .await?
        } else {
            let container = self.agent.container(&request.id)?;
            let process = container.remove_exec(&request.exec_id)?;
            self.agent.forget_streams(&process);
            process
        };
        let mut response = DeleteResponse::new();
        response.pid = process.pid();
        let exit = process.exit();
        response.exit_status = exit.map_or(0, |exit| exit.status);
        let at = exit.map_or_else(SystemTime::now, |exit| exit.at);
        response.exited_at = MessageField::some(timestamp(at));
        Ok(response)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let names = [&request.stdin, &request.stdout, &request.stderr].map(String::clone);
        self.add_exec(&request)
            .inspect_err(|_| self.refuse(&names))?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.agent.container(&request.id)?;
        let exit = container.process(&request.exec_id)?.wait().await;
        let mut response = WaitResponse::new();
        response.exit_status = exit.status;
        response.exited_at = MessageField::some(timestamp(exit.at));
        Ok(response)
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(self.describe(&request)?)
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.kill_processes(&request)?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        Ok(self.list(&request)?)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.agent.container(&request.id)?;
        self.complete(async move { container.freeze(true).await })
            .await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.agent.container(&request.id)?;
        self.complete(async move { container.freeze(false).await })
            .await?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.agent.container(&request.id)?;
        let size = window(request.width.into(), request.height.into())?;
        container.process(&request.exec_id)?.resize(size)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        // The input ends where its stream ends; there is nothing else to close.
        let container = self.agent.container(&request.id)?;
        container.process(&request.exec_id)?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.update_limits(&request)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.agent.container(&request.id)?;
        let mut metrics = container.cgroup.statistics()?;
        metrics.network = stats::network(container.init.pid())?;
        let mut response = StatsResponse::new();
        response.stats = MessageField::some(any("io.containerd.cgroups.v2.Metrics", &metrics)?);
        Ok(response)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let mut response = ConnectResponse::new();
        response.shim_pid = std::process::id();
        response.task_pid = match self.agent.container(&request.id) {
            Ok(container) => container.init.pid(),
            Err(_) => 0,
        };
        response.version = env!("CARGO_PKG_VERSION").into();
        Ok(response)
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Error::Unimplemented("checkpoints are not supported".into()).into())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        Err(Error::Unimplemented("a guest ends with its machine".into()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_names_of_directories() {
        for good in ["a", "A-b_c.9", &"x".repeat(200)] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".a", "a/b", "a b", "ä", &"x".repeat(201)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_terminal_has_one_output() {
        assert!(streams(true, "1", "2", "").is_ok());
        assert!(streams(true, "1", "2", "3").is_err());
        assert!(streams(false, "1", "2", "x").is_err());
    }
}
