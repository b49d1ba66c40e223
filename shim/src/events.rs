//! Task events to containerd: in order, one at a time, each kept until containerd has it.
//!
//! The queue is the one place that fixes the order: whoever changes a task's state publishes the event while holding the task's
//! lock. When containerd goes away, the events wait; a restarted containerd makes its socket anew, which the directory's inotify tells.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::topics;
use nix::sys::inotify::AddWatchFlags;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};

use crate::readiness::Watch;

/// The most events that wait for containerd. A pod's tasks make a handful each.
const CAPACITY: usize = 2048;

/// How long containerd may take to accept one event, before it is asked again on a new connection.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// A message that tells of a task, its topic, and its name in protobuf.
pub trait Event: Message {
    /// The topic under which subscribers find it.
    const TOPIC: &'static str;
    /// Its full name: the type URL of the `Any` that carries it.
    const TYPE_URL: &'static str;
}

macro_rules! events {
    ($($message:ident: $topic:ident),* $(,)?) => {$(
        impl Event for $message {
            const TOPIC: &'static str = topics::$topic;
            const TYPE_URL: &'static str = concat!("containerd.events.", stringify!($message));
        }
    )*};
}

events! {
    TaskCreate: TASK_CREATE_EVENT_TOPIC,
    TaskStart: TASK_START_EVENT_TOPIC,
    TaskOOM: TASK_OOM_EVENT_TOPIC,
    TaskExit: TASK_EXIT_EVENT_TOPIC,
    TaskDelete: TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded: TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted: TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused: TASK_PAUSED_EVENT_TOPIC,
    TaskResumed: TASK_RESUMED_EVENT_TOPIC,
}

/// Where events go. Clones share one queue.
#[derive(Debug, Clone)]
pub struct Publisher {
    namespace: Arc<str>,
    /// `None` without a containerd to tell (CRI-O).
    queue: Option<Arc<Queue>>,
}

#[derive(Debug)]
struct Queue {
    envelopes: Mutex<VecDeque<Envelope>>,
    added: Notify,
    /// How many events containerd does not have yet, the one under way included.
    unsent: watch::Sender<usize>,
}

impl Publisher {
    /// Publishes to the ttrpc address that containerd gave; with an empty one, nowhere. Needs the runtime of tokio.
    pub fn new(namespace: &str, address: &str) -> Self {
        let queue = (!address.is_empty()).then(|| {
            let queue = Arc::new(Queue {
                envelopes: Mutex::default(),
                added: Notify::new(),
                unsent: watch::Sender::new(0),
            });
            let path = address.strip_prefix("unix://").unwrap_or(address);
            tokio::spawn(send_all(Arc::clone(&queue), path.into()));
            queue
        });
        Self {
            namespace: namespace.into(),
            queue,
        }
    }

    /// Adds an event to the queue. Never blocks.
    pub fn publish<E: Event>(&self, event: &E) {
        let Some(queue) = &self.queue else {
            return;
        };
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return log::error!("event {} does not encode: {error}", E::TOPIC),
        };
        let envelope = Envelope {
            timestamp: Some(Timestamp::from(SystemTime::now())).into(),
            namespace: self.namespace.to_string(),
            topic: E::TOPIC.into(),
            event: Some(Any {
                type_url: E::TYPE_URL.into(),
                value,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let mut envelopes = queue
            .envelopes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let lost = if envelopes.len() < CAPACITY {
            queue.unsent.send_modify(|unsent| *unsent += 1);
            None
        } else {
            // A containerd that is away for so long asks for the state of every task when it returns: the newest events tell it more.
            envelopes.pop_front()
        };
        envelopes.push_back(envelope);
        drop(envelopes);
        queue.added.notify_one();
        if let Some(lost) = lost {
            log::error!("containerd takes no events; {} is lost", lost.topic);
        }
    }

    /// A publisher whose events stay in its queue.
    #[cfg(test)]
    pub fn to_nobody() -> Self {
        let queue = Queue {
            envelopes: Mutex::default(),
            added: Notify::new(),
            unsent: watch::Sender::new(0),
        };
        Self {
            namespace: "test".into(),
            queue: Some(Arc::new(queue)),
        }
    }

    /// Takes what [`Publisher::to_nobody`] holds, each event as its topic and its message.
    #[cfg(test)]
    pub fn take(&self) -> Vec<(String, Vec<u8>)> {
        let queue = self.queue.as_ref().unwrap();
        let envelopes = std::mem::take(&mut *queue.envelopes.lock().unwrap());
        envelopes
            .into_iter()
            .map(|envelope| (envelope.topic, envelope.event.unwrap().value))
            .collect()
    }

    /// Waits until containerd has every event.
    pub async fn flushed(&self) {
        if let Some(queue) = &self.queue {
            // An error means that the sender is gone, and it is held by the queue itself.
            let _ = queue
                .unsent
                .subscribe()
                .wait_for(|&unsent| unsent == 0)
                .await;
        }
    }
}

impl Queue {
    async fn next(&self) -> Envelope {
        loop {
            let first = self
                .envelopes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            match first {
                Some(envelope) => return envelope,
                None => self.added.notified().await,
            }
        }
    }
}

async fn send_all(queue: Arc<Queue>, path: PathBuf) {
    let mut client = None;
    loop {
        let request = ForwardRequest {
            envelope: Some(queue.next().await).into(),
            ..Default::default()
        };
        client = Some(deliver(client, &request, &queue, &path).await);
        queue.unsent.send_modify(|unsent| *unsent -= 1);
    }
}

/// Sends one event, over the connection that there is, or over the first that works.
async fn deliver(
    client: Option<EventsClient>,
    request: &ForwardRequest,
    queue: &Queue,
    path: &Path,
) -> EventsClient {
    if let Some(client) = client {
        match forward(&client, request).await {
            Ok(()) => return client,
            Err(error) => log::warn!("the connection for events is lost: {error}"),
        }
    }
    let mut watch = None;
    loop {
        let error = match UnixStream::connect(path).await {
            Ok(stream) => {
                let client = EventsClient::new(ttrpc::r#async::Client::new(stream.into()));
                match forward(&client, request).await {
                    Ok(()) => return client,
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        let Some(changes) = &watch else {
            log::warn!("events wait for {}: {error}", path.display());
            // The socket may be made between the attempt and this, so there is another attempt before the first wait.
            watch = Some(watch_directory_of(path));
            continue;
        };
        let changed = async {
            match changes {
                Ok(changes) => changes.changed().await,
                Err(error) => Err(io::Error::from(error.kind())),
            }
        };
        tokio::select! {
            Ok(()) = changed => {}
            () = queue.added.notified() => {}
        }
    }
}

/// Sends one event over a connection; an error means that the connection is of no use. What containerd refuses, it would refuse again.
async fn forward(client: &EventsClient, request: &ForwardRequest) -> ttrpc::Result<()> {
    let context = ttrpc::context::with_duration(FORWARD_TIMEOUT);
    match client.forward(context, request).await {
        Ok(_) => Ok(()),
        Err(ttrpc::Error::RpcStatus(status)) => {
            let topic = &request.envelope.topic;
            log::error!("containerd refuses event {topic}: {}", status.message);
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Watches for things in a directory that are made, or change their mode or owner, as containerd's socket does once it listens.
fn watch_directory_of(path: &Path) -> io::Result<Watch> {
    let events = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ATTRIB;
    Watch::new(path.parent().unwrap_or(Path::new("/")), events)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use tokio::sync::mpsc;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// containerd's event service: hands over what it gets, and refuses what the test says.
    struct Recorder {
        received: mpsc::UnboundedSender<Envelope>,
        refusals: AtomicUsize,
    }

    #[async_trait]
    impl Events for Recorder {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.into_option().unwrap_or_default();
            self.received.send(envelope).unwrap();
            let left = self.refusals.load(Ordering::Relaxed);
            if left > 0 {
                self.refusals.store(left - 1, Ordering::Relaxed);
                return Err(ttrpc::error::get_rpc_status(
                    ttrpc::Code::INVALID_ARGUMENT,
                    "no",
                ));
            }
            Ok(Empty::new())
        }
    }

    async fn listen(path: &Path, refusals: usize) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (sender, received) = mpsc::unbounded_channel();
        let recorder = Recorder {
            received: sender,
            refusals: AtomicUsize::new(refusals),
        };
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(recorder)));
        server.start().await.unwrap();
        (server, received)
    }

    fn exit(pid: u32) -> TaskExit {
        TaskExit {
            container_id: "c".into(),
            pid,
            ..Default::default()
        }
    }

    fn pid(envelope: &Envelope) -> u32 {
        let event = TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
        event.pid
    }

    #[tokio::test]
    async fn events_arrive_in_order_with_topic_type_and_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock.ttrpc");
        let (_server, mut received) = listen(&path, 1).await;
        let publisher = Publisher::new("k8s.io", &format!("unix://{}", path.display()));
        // A refused event is not sent again, and does not hold up the others.
        publisher.publish(&TaskStart::new());
        for n in 1..=50 {
            publisher.publish(&exit(n));
        }
        publisher.flushed().await;
        let start = received.recv().await.unwrap();
        assert_eq!(start.topic, "/tasks/start");
        assert_eq!(start.event.type_url, "containerd.events.TaskStart");
        assert_eq!(start.namespace, "k8s.io");
        assert!(start.timestamp.seconds > 0);
        for n in 1..=50 {
            assert_eq!(pid(&received.recv().await.unwrap()), n);
        }
        assert!(received.try_recv().is_err());
    }

    #[tokio::test]
    async fn events_survive_a_restart_of_containerd() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock.ttrpc");
        let publisher = Publisher::new("n", &path.display().to_string());
        publisher.publish(&exit(1));
        for round in 0..3 {
            let (mut server, mut received) = listen(&path, 0).await;
            publisher.flushed().await;
            publisher.publish(&exit(2 * round + 2));
            assert_eq!(pid(&received.recv().await.unwrap()), 2 * round + 1);
            assert_eq!(pid(&received.recv().await.unwrap()), 2 * round + 2);
            publisher.flushed().await;
            server.shutdown().await.unwrap();
            drop(server);
            std::fs::remove_file(&path).unwrap();
            publisher.publish(&exit(2 * round + 3));
        }
    }

    #[tokio::test]
    async fn a_connection_that_closes_is_tried_again_when_something_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock.ttrpc");
        let closing = tokio::net::UnixListener::bind(&path).unwrap();
        let publisher = Publisher::new("n", &path.display().to_string());
        publisher.publish(&exit(1));
        // One attempt before the watch, one after it; nothing more until something happens.
        for _ in 0..2 {
            drop(closing.accept().await.unwrap());
        }
        publisher.publish(&exit(2));
        drop(closing.accept().await.unwrap());
        drop(closing);
        std::fs::remove_file(&path).unwrap();
        let (_server, mut received) = listen(&path, 0).await;
        publisher.flushed().await;
        assert_eq!(pid(&received.recv().await.unwrap()), 1);
        assert_eq!(pid(&received.recv().await.unwrap()), 2);
    }

    #[tokio::test]
    async fn the_queue_is_bounded_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock.ttrpc");
        let publisher = Publisher::new("n", &path.display().to_string());
        for n in 0..CAPACITY as u32 + 10 {
            publisher.publish(&exit(n));
        }
        let (_server, mut received) = listen(&path, 0).await;
        publisher.flushed().await;
        assert_eq!(pid(&received.recv().await.unwrap()), 10);
        assert_eq!(received.len(), CAPACITY - 1);
    }

    #[tokio::test]
    async fn without_an_address_nothing_is_sent_and_nothing_waits() {
        let publisher = Publisher::new("n", "");
        publisher.publish(&exit(1));
        publisher.flushed().await;
    }
}
