//! What happens in the pod's network namespace while a guest uses it happens in the guest.

use std::os::fd::OwnedFd;
use std::pin::pin;
use std::time::Duration;

use bulkhead_agent::netlink::Message;
use bulkhead_agent::protocol::sandbox::ChangeNetworkRequest;
use bulkhead_agent::protocol::sandbox_ttrpc::SandboxClient;
use ttrpc::context::Context;

use super::difference::Difference;
use super::guest::{Attached, attach, for_guest};
use super::subscription::Subscription;
use super::wiring::{Look, Wired, Wiring};
use super::{Interface, in_namespace, new_socket};
use crate::error::Error;
use crate::machine::{self, Machine};
use crate::sandbox::Sandbox;

/// How long a guest may take for a change, before the next one is looked at all the same. A hostile one would take for ever.
const PATIENCE: Duration = Duration::from_secs(60);

/// Carries changes over.
#[derive(Debug)]
pub struct Follower {
    namespace: OwnedFd,
    wiring: Wiring,
    subscription: Subscription,
    /// What the guest has, and what it was told.
    attached: Vec<Attached>,
    messages: Vec<Message>,
    /// Interfaces that it cannot have. They are not tried again while they are there.
    failed: Vec<u32>,
    /// What was said of those that no guest can have.
    refused: Vec<String>,
}

impl Follower {
    /// Of a guest that has these interfaces and was told this. Needs the runtime of tokio.
    pub(super) fn new(
        namespace: OwnedFd,
        wiring: Wiring,
        changes: OwnedFd,
        attached: Vec<Attached>,
        messages: Vec<Message>,
    ) -> Result<Self, super::Error> {
        Ok(Self {
            namespace,
            wiring,
            subscription: Subscription::new(changes).map_err(super::Error::Follow)?,
            attached,
            messages,
            failed: Vec::new(),
            refused: Vec::new(),
        })
    }

    /// Carries changes over until the machine ends. What it does is never left half done: it must not be dropped before.
    pub async fn run(mut self, sandbox: &Sandbox) {
        let Ok(machine) = sandbox.machine() else {
            return;
        };
        let mut stopped = pin!(machine.stopped());
        loop {
            tokio::select! {
                biased;
                _ = &mut stopped => return,
                changed = self.subscription.changed() => {
                    if let Err(error) = changed {
                        return log::error!("the pod's network is not followed any more: {error}");
                    }
                }
            }
            complain(self.update(sandbox, machine).await);
        }
    }

    /// Looks at the namespace, and makes the guest's network what it is there. What cannot be done keeps nothing else from being done.
    async fn update(&mut self, sandbox: &Sandbox, machine: &Machine) -> Result<(), Error> {
        let Look {
            mut contents,
            gone,
            failed,
        } = self.look().await?;
        self.failed = failed;
        let refused: Vec<_> = contents.refused.iter().map(ToString::to_string).collect();
        for text in refused.iter().filter(|text| !self.refused.contains(text)) {
            log::error!("{text}; the guest does not get it");
        }
        self.refused = refused;

        let attached = std::mem::take(&mut self.attached).into_iter();
        let is_gone = |attached: &Attached| gone.contains(&attached.interface.index);
        let (mut leaving, staying): (Vec<_>, _) = attached.partition(is_gone);
        self.attached = staying;
        for attached in &mut leaving {
            attached.interface.carrier = false;
            attached.interface.addresses.clear();
            complain(attached.update(machine).await);
        }
        let staying: Vec<_> = self.attached.iter().map(for_guest).collect();
        let mut request = ChangeNetworkRequest::default();
        let mut anew = !leaving.is_empty();
        for interface in std::mem::take(&mut contents.interfaces) {
            let index = interface.index;
            let known = self.attached.iter_mut();
            if let Some(known) = known
                .into_iter()
                .find(|known| known.interface.index == index)
            {
                let before = for_guest(known);
                let sends = |i: &Interface| (i.carrier, i.addresses.clone());
                let sent = sends(&known.interface);
                known.interface = interface;
                if sends(&known.interface) != sent {
                    complain(known.update(machine).await);
                }
                let after = for_guest(known);
                if after == before {
                    request.kept.push(after);
                } else {
                    request.changed.push(after);
                }
                continue;
            }
            match attach(machine, interface).await {
                Ok(attached) => {
                    anew = true;
                    request.changed.push(for_guest(&attached));
                    self.attached.push(attached);
                }
                Err(error) => {
                    complain(Err(error));
                    self.failed.push(index);
                    complain(self.unplug(index).await.map_err(Error::from));
                }
            }
        }

        let has = |index| {
            self.attached
                .iter()
                .any(|attached| attached.interface.index == index)
        };
        let messages = contents.messages(has);
        let mut difference = Difference::new(&self.messages, &messages);
        if anew {
            // With an interface goes much that may stay on the host, and with a new one much may come that was not possible before.
            difference.added.clone_from(&messages);
        }
        self.messages = messages;
        if !anew && request.changed.is_empty() && difference.is_empty() {
            return Ok(());
        }
        let bytes =
            |messages: Vec<Message>| messages.into_iter().map(Message::into_bytes).collect();
        request.removed = bytes(difference.removed);
        request.messages = bytes(difference.added);
        if !leaving.is_empty() {
            // Before the guest looks for what is new, and would find these again.
            let farewell = ChangeNetworkRequest {
                gone: leaving.iter().map(for_guest).collect(),
                kept: staying,
                removed: std::mem::take(&mut request.removed),
                ..Default::default()
            };
            tell(sandbox, farewell).await;
            let slots: Vec<_> = leaving.iter().map(|attached| attached.slot).collect();
            sandbox.detach(&slots).await;
        }
        tell(sandbox, request).await;
        Ok(())
    }

    /// Looks at the namespace, and makes its taps fit.
    async fn look(&self) -> Result<Look, super::Error> {
        let wired: Vec<_> = self
            .attached
            .iter()
            .map(|a| Wired::from(&a.interface))
            .collect();
        let (wiring, failed) = (self.wiring.clone(), self.failed.clone());
        self.act(move || wiring.look(&wired, &failed)).await
    }

    /// Takes the tap beside an interface away.
    async fn unplug(&self, index: u32) -> Result<(), super::Error> {
        let wiring = self.wiring.clone();
        self.act(move || wiring.unplug(&mut new_socket()?, index))
            .await
    }

    /// Does something in the namespace.
    async fn act<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> Result<T, super::Error> + Send + 'static,
    ) -> Result<T, super::Error> {
        let namespace = self.namespace.try_clone().map_err(super::Error::Enter)?;
        in_namespace(namespace, act).await
    }
}

/// Tells the guest of a change.
async fn tell(sandbox: &Sandbox, request: ChangeNetworkRequest) {
    let change = |client| async move {
        SandboxClient::new(client)
            .change_network(Context::default(), &request)
            .await
    };
    match tokio::time::timeout(PATIENCE, sandbox.ask_agent(change)).await {
        Ok(result) => complain(result.map(drop)),
        Err(_) => {
            log::error!("the guest has not followed a change of its network within {PATIENCE:?}");
        }
    }
}

/// Tells of a failure, unless it is the end of the machine.
fn complain(result: Result<(), Error>) {
    match result {
        Ok(()) | Err(Error::Machine(machine::Error::Stopped(_))) => {}
        Err(error) => log::error!("a change of the pod's network is not carried over: {error}"),
    }
}
