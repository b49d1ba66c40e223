//! The host's processes that stand for the guest's: making them, and doing what is done to them.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use containerd_shim_protos::api::KillRequest;

use super::network::Placement;
use super::{Entry, Tasks, process};
use crate::annotations::Kind;
use crate::error::Error;
use crate::spec;
use crate::stand_in::{Network, Signals, StandIn, Stops};

impl Tasks {
    /// A stand-in for a container's first process, and the network namespace that it is in.
    pub(super) fn stand_in_for_init(
        &self,
        id: &str,
        network: &Placement<'_>,
    ) -> Result<(StandIn, Arc<OwnedFd>), Error> {
        if let Some(namespace) = &network.namespace {
            let stand_in = self.stand_in(id, Network::Join(namespace.as_fd()))?;
            return Ok((stand_in, Arc::clone(namespace)));
        }
        let stand_in = self.stand_in(id, Network::New)?;
        let namespace = Arc::new(stand_in.network().map_err(Error::StandIn)?);
        network.made(&namespace);
        Ok((stand_in, namespace))
    }

    /// A stand-in.
    pub(super) fn stand_in(&self, name: &str, network: Network<'_>) -> Result<StandIn, Error> {
        StandIn::new(name, network, &self.mailbox).map_err(Error::StandIn)
    }

    /// Kills a process if the one that stands for it is killed.
    pub(super) fn watch_stand_in(self: &Arc<Self>, id: &str, exec_id: &str) {
        let ended = self.with(id, |container| {
            let stand_in = process(container, exec_id)?.stand_in.as_ref();
            Ok(stand_in.map(StandIn::ended))
        });
        let ended = match ended {
            Ok(Some(Ok(ended))) => ended,
            Ok(Some(Err(error))) => {
                return log::warn!("{id:?} {exec_id:?} is not watched: {error}");
            }
            // It has ended by now.
            Ok(None) | Err(_) => return,
        };
        let tasks = Arc::clone(self);
        let kill = KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal: libc::SIGKILL as u32,
            ..Default::default()
        };
        tokio::spawn(async move {
            ended.await;
            let lives = tasks.with(&kill.id, |container| {
                Ok(process(container, &kill.exec_id)?.stand_in.is_some())
            });
            if let Ok(true) = lives {
                tasks.send_on(kill).await;
            }
        });
    }

    /// Sends to the guest's processes what the host's that stand for them are sent.
    pub(super) fn pass_signals_on(self: &Arc<Self>, mut signals: Signals) {
        let tasks = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                let (pid, signal) = match signals.next().await {
                    Ok(signal) => signal,
                    Err(error) => return log::error!("signals are not passed on: {error}"),
                };
                let Some(tasks) = tasks.upgrade() else { return };
                tasks.pass_on(pid, signal).await;
            }
        });
    }

    /// Stops the guest's processes when the host's that stand for them are stopped.
    pub(super) fn pass_stops_on(self: &Arc<Self>, mut stops: Stops) {
        let tasks = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                let pid = stops.next().await;
                let Some(tasks) = tasks.upgrade() else { return };
                tasks.pass_on(pid, libc::SIGSTOP as u32).await;
            }
        });
    }

    /// Sends a signal to what a host's process stands for, if it stands for anything.
    async fn pass_on(self: &Arc<Self>, pid: u32, signal: u32) {
        if let Some((id, exec_id)) = self.represented_by(pid) {
            let kill = KillRequest {
                id,
                exec_id,
                signal,
                ..Default::default()
            };
            self.send_on(kill).await;
        }
    }

    async fn send_on(self: &Arc<Self>, kill: KillRequest) {
        let (id, exec_id, signal) = (kill.id.clone(), kill.exec_id.clone(), kill.signal);
        if let Err(error) = self.kill(kill).await {
            log::warn!("signal {signal} is not passed on to {id:?} {exec_id:?}: {error}");
        }
    }

    /// The container that a namespace belongs to, by the path of the host that stands for it; none if it is the machine's: that of the
    /// sandbox, which has no process in the guest, or of a file that somebody keeps for the pod.
    pub(super) fn owner_of_namespace(&self, path: &Path) -> Result<Option<String>, spec::Error> {
        let Some(pid) = process_of(path) else {
            return Ok(None);
        };
        let foreign = || spec::Error::ForeignNamespace(path.to_owned());
        let (id, _) = self.represented_by(pid).ok_or_else(foreign)?;
        let kind = self.with(&id, |container| Ok(container.kind));
        match kind.map_err(|_| foreign())? {
            Kind::Sandbox => Ok(None),
            Kind::Member | Kind::Single => Ok(Some(id)),
        }
    }

    /// The container and the exec that a host's process stands for.
    fn represented_by(&self, pid: u32) -> Option<(String, String)> {
        self.table().entries.values().find_map(|entry| match entry {
            Entry::Ready(container) => {
                let execs = container.execs.iter().map(|(id, exec)| (id.as_str(), exec));
                let mut processes = execs.chain([("", &container.init)]);
                let (exec_id, _) = processes.find(|(_, process)| {
                    process
                        .stand_in
                        .as_ref()
                        .is_some_and(|own| own.pid() == pid)
                })?;
                Some((container.id.clone(), exec_id.to_owned()))
            }
            Entry::Creating => None,
        })
    }
}

/// The process in a path of the form `/proc/PID/ns/TYPE`.
fn process_of(path: &Path) -> Option<u32> {
    let mut parts = path.strip_prefix("/proc").ok()?.iter();
    let pid = parts.next()?.to_str()?.parse().ok()?;
    (parts.next()? == "ns").then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_namespaces_have_processes() {
        let process = |path: &str| process_of(Path::new(path));
        assert_eq!(process("/proc/12/ns/pid"), Some(12));
        for other in [
            "/run/netns/12",
            "/proc/self/ns/pid",
            "/proc/12",
            "/proc/12/fd/3",
        ] {
            assert_eq!(process(other), None, "{other}");
        }
    }
}
