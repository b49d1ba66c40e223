//! containerd's event service, which writes down what it is told.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim_sync::create_events;
use containerd_shim_protos::ttrpc::{Server, TtrpcContext};

use super::{NAMESPACE, PATIENCE};
use crate::error::{Context, Error, Result};

/// What a shim has told.
pub struct Events {
    path: PathBuf,
    /// Where what comes goes, whichever server it comes to.
    sender: Sender<Received>,
    server: Mutex<Option<Server>>,
    received: Mutex<Inbox>,
}

/// An event, or why it is none.
type Received = std::result::Result<Event, String>;

struct Inbox {
    receiver: Receiver<Received>,
    /// Those that nobody has asked for yet, by container.
    waiting: BTreeMap<String, Vec<Event>>,
}

/// An event of a container.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    container: String,
    /// Its topic's last part; of an exec its identifier, of an end the status too.
    pub text: String,
    /// The process that it names.
    pub pid: u32,
    /// When an end was, in seconds and nanoseconds.
    pub exited_at: Option<(i64, i32)>,
}

impl fmt::Debug for Events {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Events")
    }
}

struct Recorder(Mutex<Sender<Received>>);

impl containerd_shim_protos::shim_sync::Events for Recorder {
    fn forward(
        &self,
        _: &TtrpcContext,
        request: ForwardRequest,
    ) -> containerd_shim_protos::ttrpc::Result<Empty> {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // If it fails, the test that wanted it is over.
        let _ = sender.send(parse(&request));
        Ok(Empty::new())
    }
}

impl Events {
    /// Serves at a path.
    pub(super) fn serve(path: &Path) -> Result<Self> {
        let (sender, receiver) = channel();
        let events = Self {
            path: path.to_owned(),
            sender,
            server: Mutex::new(None),
            received: Mutex::new(Inbox {
                receiver,
                waiting: BTreeMap::new(),
            }),
        };
        events.listen()?;
        Ok(events)
    }

    /// Serves, as containerd does when it comes back.
    pub fn listen(&self) -> Result<()> {
        let recorder = Recorder(Mutex::new(self.sender.clone()));
        let start = || {
            let mut server = Server::new()
                .bind(&format!("unix://{}", self.path.display()))?
                .register_service(create_events(Arc::new(recorder)));
            server.start()?;
            Ok(server)
        };
        let server = start().map_err(|error: containerd_shim_protos::ttrpc::Error| {
            Error::Unfit(format!("cannot serve events: {error}"))
        })?;
        // As containerd does, once it listens.
        fs::set_permissions(&self.path, Permissions::from_mode(0o660))
            .or_cannot(format!("change the mode of {}", self.path.display()))?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(())
    }

    /// Ends the service, and every connection to it.
    pub fn hang_up(&self) -> Result<()> {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = server.take() {
            server.shutdown();
        }
        fs::remove_file(&self.path).or_cannot(format!("remove {}", self.path.display()))
    }

    /// The events of a container, in their order, up to the one that begins with `last`.
    pub fn until(&self, container: &str, last: &str) -> Result<Vec<Event>> {
        let deadline = Instant::now() + PATIENCE;
        let mut inbox = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let Inbox { receiver, waiting } = &mut *inbox;
        let is_last = |event: &Event| event.text.starts_with(last);
        loop {
            let own = waiting.entry(container.to_owned()).or_default();
            if let Some(index) = own.iter().position(is_last) {
                return Ok(own.drain(..=index).collect());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match receiver.recv_timeout(left) {
                Ok(event) => {
                    let event = event.map_err(Error::Unfit)?;
                    let container = event.container.clone();
                    waiting.entry(container).or_default().push(event);
                }
                Err(_) => {
                    return Err(Error::Unfit(format!(
                        "container {container} has no event {last:?}, only {own:?}"
                    )));
                }
            }
        }
    }

    /// The events that nobody has asked for, as words: for each container one line.
    pub fn rest(&self) -> Result<Vec<String>> {
        let mut inbox = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let Inbox { receiver, waiting } = &mut *inbox;
        for event in receiver.try_iter() {
            let event = event.map_err(Error::Unfit)?;
            let container = event.container.clone();
            waiting.entry(container).or_default().push(event);
        }
        let left = std::mem::take(waiting).into_iter();
        let line = |(container, events): (String, Vec<Event>)| {
            let words: Vec<_> = events.into_iter().map(|event| event.text).collect();
            (!words.is_empty()).then(|| format!("{container}: {}", words.join(", ")))
        };
        Ok(left.filter_map(line).collect())
    }
}

fn parse(request: &ForwardRequest) -> Received {
    let envelope = &request.envelope;
    if envelope.namespace != NAMESPACE {
        return Err(format!("event for namespace {:?}", envelope.namespace));
    }
    let kind = envelope.topic.trim_start_matches("/tasks/");
    let bytes = &envelope.event.value;
    let mut event = Event {
        container: String::new(),
        text: kind.to_owned(),
        pid: 0,
        exited_at: None,
    };
    let wrong = |error| format!("event {kind:?}: {error}");
    macro_rules! decode {
        ($message:ident) => {{
            let expected = concat!("containerd.events.", stringify!($message));
            if envelope.event.type_url != expected {
                return Err(format!("event {kind:?} is a {}", envelope.event.type_url));
            }
            let message = $message::parse_from_bytes(bytes).map_err(wrong)?;
            event.container.clone_from(&message.container_id);
            message
        }};
    }
    match kind {
        "create" => event.pid = decode!(TaskCreate).pid,
        "start" => event.pid = decode!(TaskStart).pid,
        "oom" => drop(decode!(TaskOOM)),
        "exit" => {
            let exit = decode!(TaskExit);
            event.pid = exit.pid;
            event.text = format!("exit {} {}", exit.id, exit.exit_status);
            event.exited_at = Some((exit.exited_at.seconds, exit.exited_at.nanos));
        }
        "delete" => {
            let delete = decode!(TaskDelete);
            event.pid = delete.pid;
            event.text = format!("delete {}", delete.exit_status);
            event.exited_at = Some((delete.exited_at.seconds, delete.exited_at.nanos));
        }
        "exec-added" => event.text = format!("exec-added {}", decode!(TaskExecAdded).exec_id),
        "exec-started" => {
            let started = decode!(TaskExecStarted);
            event.pid = started.pid;
            event.text = format!("exec-started {}", started.exec_id);
        }
        "paused" => drop(decode!(TaskPaused)),
        "resumed" => drop(decode!(TaskResumed)),
        other => return Err(format!("event of unknown topic {other:?}")),
    }
    Ok(event)
}
