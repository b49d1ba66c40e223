//! When the guest gets the network of its pod: as late as it can be, so that nothing is missed that is put into the network namespace
//! between Create and Start.

use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};

use tokio::task::JoinHandle;

use super::Tasks;
use crate::annotations::Kind;
use crate::error::Error;
use crate::network;
use crate::process::Phase;

impl Tasks {
    /// Gives the guest what the network namespace of a container holds that is about to start, unless it is one of several in a pod,
    /// or something has started before.
    pub(super) async fn connect_network(self: &Arc<Self>, id: &str) -> Result<(), Error> {
        let found = self.with(id, |container| {
            let first = container.init.phase == Phase::Created && container.kind != Kind::Member;
            Ok(first.then(|| Arc::clone(&container.network)))
        })?;
        let Some(namespace) = found else {
            return Ok(());
        };
        let namespace = namespace.try_clone().map_err(Error::StandIn)?;
        if let Some(follower) = self.sandbox.connect(namespace, self.home()).await? {
            let tasks = Arc::clone(self);
            let following = tokio::spawn(async move { follower.run(&tasks.sandbox).await });
            *self.following() = Some(following);
        }
        Ok(())
    }

    /// Takes away what is left of the network on the host. The machine has ended.
    pub(super) async fn disconnect_network(&self) {
        let following = self.following().take();
        if let Some(following) = following {
            // It ends with the machine. If it has failed, there is nothing to wait for.
            let _ = following.await;
        }
        if let Err(error) = network::disconnect(&self.home()) {
            log::warn!("something of the network stays: {error}");
        }
    }

    fn following(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.following
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The bundle of the shim's first task.
    fn home(&self) -> PathBuf {
        let home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        home.bundle.clone()
    }
}
