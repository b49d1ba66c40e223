//! Serves the agent's services on connections that it opens itself.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use containerd_shim_protos::shim_async::create_task;
use futures::stream;
use tokio::sync::oneshot;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::agent::Agent;
use crate::protocol::sandbox_ttrpc::create_sandbox;
use crate::reaper;
use crate::sandbox::SandboxService;
use crate::socket::Socket;
use crate::task::TaskService;

/// Serves on one connection after the other: `dial` opens the first, and the next whenever one has ended. Returns only when it
/// fails.
pub async fn serve<F>(agent: Arc<Agent>, dial: impl Fn() -> F + Send + 'static) -> io::Error
where
    F: Future<Output = io::Result<OwnedFd>> + Send + 'static,
{
    let (failed, failure) = oneshot::channel();
    let connections = Connections {
        agent: agent.clone(),
        dial,
        current: None,
        failed,
    };
    let connections = stream::unfold(connections, Connections::next);
    let mut server = Server::new()
        .register_service(create_task(Arc::new(TaskService::new(agent.clone()))))
        .register_service(create_sandbox(Arc::new(SandboxService::new(agent.clone()))))
        .add_listener(Listener::new(connections));
    if let Err(error) = server.start().await {
        return io::Error::other(error);
    }
    tokio::select! {
        error = reaper::reap(|pid, exit| agent.exited(pid, exit)) => error,
        error = failure => error.unwrap_or_else(io::Error::other),
    }
}

/// The connections, one after the other.
struct Connections<D> {
    agent: Arc<Agent>,
    dial: D,
    current: Option<oneshot::Receiver<()>>,
    failed: oneshot::Sender<io::Error>,
}

impl<D, F> Connections<D>
where
    D: Fn() -> F,
    F: Future<Output = io::Result<OwnedFd>>,
{
    async fn next(mut self) -> Option<(io::Result<Socket>, Self)> {
        if let Some(current) = self.current.take() {
            // Nothing is ever sent: the other end is dropped when the connection ends.
            drop(current.await);
            self.agent.kills.disconnected();
        }
        match (self.dial)().await.and_then(Socket::watched) {
            Ok((socket, end)) => {
                self.current = Some(end);
                Some((Ok(socket), self))
            }
            Err(error) => {
                drop(self.failed.send(error));
                None
            }
        }
    }
}
