//! The Task service on the wire: one set of handlers under the names that containerd's releases call it by.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use ttrpc::Result;
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::Tasks;
use crate::error::Error;

/// What containerd 2 calls the service, and the crate that its messages come from.
const V3: &str = "containerd.task.v3.Task";

/// What containerd 1.6 and 1.7 and CRI-O call it. The two differ in the name only.
const V2: &str = "containerd.task.v2.Task";

/// The services that a shim's socket offers.
pub fn services(tasks: Arc<Tasks>) -> HashMap<String, Service> {
    let handlers = Arc::new(Handlers(tasks));
    let mut services = create_task(handlers.clone());
    if let Some(service) = create_task(handlers).remove(V3) {
        services.insert(V2.to_owned(), service);
    }
    services
}

struct Handlers(Arc<Tasks>);

/// Runs a request to its end, even if its client goes away or loses patience: nothing is left half done.
async fn to_the_end<T: Send + 'static>(
    request: impl Future<Output = std::result::Result<T, Error>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(request).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Error::ShuttingDown.into()),
    }
}

#[async_trait]
impl Task for Handlers {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        Ok(self.0.state(&request)?)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Result<CreateTaskResponse> {
        let tasks = Arc::clone(&self.0);
        // Dropped with this future when the client goes away or loses patience.
        let client = Arc::new(());
        let watched = Arc::downgrade(&client);
        let pid = to_the_end(async move { tasks.create(request, watched).await }).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let tasks = Arc::clone(&self.0);
        let pid = to_the_end(async move { tasks.start(request).await }).await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let tasks = Arc::clone(&self.0);
        to_the_end(async move { tasks.delete(&request).await }).await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        Ok(self.0.pids(request).await?)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        let tasks = Arc::clone(&self.0);
        to_the_end(async move { tasks.pause(request).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        let tasks = Arc::clone(&self.0);
        to_the_end(async move { tasks.resume(request).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> Result<Empty> {
        self.0.checkpoint(&request)?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        self.0.kill(request).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let tasks = Arc::clone(&self.0);
        to_the_end(async move { tasks.exec(request).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        self.0.resize_pty(request).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        self.0.close_io(&request)?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        self.0.update(request).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        Ok(self.0.wait(&request).await?)
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        Ok(self.0.stats(request).await?)
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        Ok(self.0.connect(&request.id)?)
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Result<Empty> {
        self.0.shutdown(&request);
        Ok(Empty::new())
    }
}
