//! The microVM of this shim's containers, and the agent in it.

use std::collections::HashMap;
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use bulkhead_agent::protocol::STREAM_PORT;
use bulkhead_agent::protocol::sandbox::{LetGoRequest, NextOomRequest, SetRequest, SetupRequest};
use bulkhead_agent::protocol::sandbox_ttrpc::SandboxClient;
use containerd_shim_protos::shim_async::TaskClient;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::io::AsyncWriteExt;
use tokio::sync::OnceCell;
use ttrpc::asynchronous::Client;

use crate::disk::DiskFiles;
use crate::error::Error;
use crate::machine::{self, Agent, Machine, MachineSpec, Reason};
use crate::network::{self, Follower};
use crate::streams::{Ends, Names, Streams};

/// Random bytes for the guest's entropy pool: what its kernel needs to be ready at once.
const ENTROPY: usize = 64;

/// How long a guest may take for what waits for nothing in it.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// How often a guest is asked to let devices go. One that looks for the disk of another container meanwhile finds these too, and takes
/// them up again.
const DETACH_ATTEMPTS: u32 = 3;

/// The machine, before, while and after it runs.
#[derive(Debug, Default)]
pub struct Sandbox {
    /// Set as soon as there is one that could be stopped.
    machine: OnceLock<Machine>,
    /// Set once the guest is ready for containers.
    ready: OnceCell<()>,
    /// Set once the guest has the network of its pod.
    connected: OnceCell<()>,
    /// A connection of the agent that broke.
    broken: Mutex<Option<Agent>>,
    /// The number of the next stream to the guest.
    stream: AtomicU64,
    ending: AtomicBool,
}

impl Sandbox {
    /// Starts the machine that `spec` describes and makes the guest ready for containers, unless that is done already; then `spec` is
    /// not asked. Its first disk is the scratch disk.
    pub async fn boot(
        &self,
        spec: impl Future<Output = Result<MachineSpec, Error>>,
        hostname: String,
    ) -> Result<&Machine, Error> {
        self.ready
            .get_or_try_init(|| self.bring_up(spec, hostname))
            .await?;
        self.machine()
    }

    async fn bring_up(
        &self,
        spec: impl Future<Output = Result<MachineSpec, Error>>,
        hostname: String,
    ) -> Result<(), Error> {
        if let Some(machine) = self.machine.get() {
            // It did not come up, and has ended; there is no second one.
            return Ok(machine.ready().await?);
        }
        let spec = spec.await?;
        if self.is_ending() {
            return Err(Error::ShuttingDown);
        }
        let patience = spec.boot_timeout;
        let launched = Machine::launch(spec)?;
        let machine = self.machine.get_or_init(|| launched);
        let ready = async {
            machine.ready().await?;
            setup(machine, hostname, patience).await
        };
        let ready = ready.await;
        if ready.is_err() {
            self.stop().await;
        }
        ready
    }

    /// Gives the guest what a network namespace holds, unless it has a network already. `bundle` is that of the shim's first task.
    /// Returns who is to tell the guest of changes, once.
    pub async fn connect(
        &self,
        namespace: OwnedFd,
        bundle: PathBuf,
    ) -> Result<Option<Follower>, Error> {
        // The name that the namespace was found by, if it has one that lasts.
        let path = std::fs::read_link(format!("/proc/self/fd/{}", namespace.as_raw_fd()));
        let path = path.ok().filter(|path| path.is_absolute());
        let mut follower = None;
        let bring = async {
            follower = Some(network::bring(self, namespace, path, bundle).await?);
            Ok::<_, Error>(())
        };
        self.connected.get_or_try_init(|| bring).await?;
        Ok(follower)
    }

    /// The machine, running or not, if one ever was ready for containers.
    pub fn machine(&self) -> Result<&Machine, Error> {
        match (self.machine.get(), self.ready.get()) {
            (Some(machine), Some(())) => Ok(machine),
            _ => Err(Error::NoMachine),
        }
    }

    /// Asks the agent's Task service. Fails when the machine ends before the answer is there, and says why it ended.
    pub async fn ask<T, F>(&self, request: impl FnOnce(TaskClient) -> F) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.ask_agent(|client| request(TaskClient::new(client)))
            .await
    }

    /// Like [`ask`](Self::ask), for what waits for nothing in the guest: one that does not answer in time is not waited for.
    pub async fn ask_briefly<T, F>(&self, request: impl FnOnce(TaskClient) -> F) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        tokio::time::timeout(ANSWER_PATIENCE, self.ask(request))
            .await
            .unwrap_or(Err(Error::Silent(ANSWER_PATIENCE)))
    }

    /// Makes settings of the guest's kernel (`linux.sysctl`).
    pub async fn set(&self, sysctls: HashMap<String, String>) -> Result<(), Error> {
        if sysctls.is_empty() {
            return Ok(());
        }
        let request = SetRequest {
            sysctls,
            ..Default::default()
        };
        let request = |client| async move {
            SandboxClient::new(client)
                .set(ttrpc::context::Context::default(), &request)
                .await
        };
        self.ask_agent(request).await.map(drop)
    }

    /// Waits for the guest's kernel to kill a process for want of memory, and returns its container's identifier.
    pub async fn next_oom(&self) -> Result<String, Error> {
        let request = |client| async move {
            SandboxClient::new(client)
                .next_oom(ttrpc::context::Context::default(), &NextOomRequest::new())
                .await
        };
        Ok(self.ask_agent(request).await?.container_id)
    }

    /// Asks the agent. Fails when the machine ends before the answer is there, and says why it ended.
    pub async fn ask_agent<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let machine = self.machine()?;
        let agent = self.agent(machine).await?;
        match request(agent.client.clone()).await {
            Ok(answer) => Ok(answer),
            Err(ttrpc::Error::RpcStatus(status)) => Err(Error::from_agent(&status)),
            Err(error) => {
                *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent);
                // Either the machine has ended, which is then the error, or the agent dials again.
                self.agent(machine).await?;
                Err(Error::Disconnected(error))
            }
        }
    }

    /// The agent's latest connection that is not known to be broken.
    async fn agent(&self, machine: &Machine) -> Result<Agent, Error> {
        let broken = self
            .broken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match broken {
            None => Ok(machine.agent()?),
            Some(broken) => Ok(machine.agent_after(&broken).await?),
        }
    }

    /// Starts copying between the host's ends of a process's streams and the guest.
    pub async fn copy(&self, ends: Ends) -> Result<(Streams, Names), Error> {
        let machine = self.machine()?;
        let mut streams = Vec::with_capacity(ends.count());
        for _ in 0..ends.count() {
            let number = self.stream.fetch_add(1, Ordering::Relaxed);
            let mut stream = machine.connect(STREAM_PORT).await?;
            stream
                .write_all(&number.to_le_bytes())
                .await
                .map_err(Error::Stream)?;
            streams.push((number.to_string(), stream));
        }
        ends.copy(streams).map_err(Error::Stream)
    }

    /// Attaches disks, and returns their PCI device numbers. If one cannot be, none is.
    pub async fn attach(&self, disks: Vec<DiskFiles>) -> Result<Vec<u8>, Error> {
        let machine = self.machine()?;
        let mut slots = Vec::with_capacity(disks.len());
        for disk in disks {
            match machine.attach(disk).await {
                Ok(slot) => slots.push(slot),
                Err(error) => {
                    self.detach(&slots).await;
                    return Err(error.into());
                }
            }
        }
        Ok(slots)
    }

    /// Has the guest let devices go, and takes them away. A machine that has ended has none. What the guest does not let go in time, or
    /// takes up again every time, stays attached.
    pub async fn detach(&self, slots: &[u8]) {
        let mut attached = slots.to_vec();
        let detached = async {
            for _ in 0..DETACH_ATTEMPTS {
                self.try_to_detach(&mut attached).await;
            }
        };
        let in_time = tokio::time::timeout(ANSWER_PATIENCE, detached).await;
        if in_time.is_err() || !attached.is_empty() {
            log::warn!("the guest has not let its devices {attached:?} go");
        }
    }

    /// Takes out of `attached` what could be taken away.
    async fn try_to_detach(&self, attached: &mut Vec<u8>) {
        let Ok(machine) = self.machine() else {
            return attached.clear();
        };
        if attached.is_empty() {
            return;
        }
        let request = LetGoRequest {
            slots: attached.iter().copied().map(u32::from).collect(),
            ..Default::default()
        };
        let let_go = |client| async move {
            SandboxClient::new(client)
                .let_go(ttrpc::context::Context::default(), &request)
                .await
        };
        if let Err(error) = self.ask_agent(let_go).await {
            log::warn!("the guest does not let its devices {attached:?} go: {error}");
        }
        for slot in attached.clone() {
            match machine.detach(slot).await {
                Ok(()) | Err(machine::Error::Stopped(_)) => attached.retain(|&place| place != slot),
                Err(error) => log::warn!("device {slot} cannot be detached: {error}"),
            }
        }
    }

    /// Ends the machine, if there is one, and waits until it is gone. None is started any more.
    pub async fn stop(&self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(machine) = self.machine.get() {
            machine.stop().await;
        }
    }

    /// Whether there is a machine, ready or not, running or not.
    pub fn exists(&self) -> bool {
        self.machine.get().is_some()
    }

    /// Whether the machine was told to end.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }
}

/// Makes the guest ready for containers.
async fn setup(machine: &Machine, hostname: String, patience: Duration) -> Result<(), Error> {
    let mut entropy = vec![0; ENTROPY];
    // So few bytes come at once, all of them.
    getrandom(&mut entropy[..], GetRandomFlags::empty())
        .map_err(|errno| Error::Entropy(errno.into()))?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let request = SetupRequest {
        hostname,
        unix_nanos: now.map_or(0, |now| now.as_nanos() as i64),
        entropy,
        scratch_slot: machine
            .disk_slots()
            .first()
            .copied()
            .unwrap_or_default()
            .into(),
        ..Default::default()
    };
    let client = SandboxClient::new(machine.agent()?.client);
    let context = ttrpc::context::with_duration(patience);
    match client.setup(context, &request).await {
        Ok(response) => {
            log::debug!("agent {:?} is ready", response.agent_version);
            Ok(())
        }
        Err(ttrpc::Error::RpcStatus(status)) => Err(Error::from_agent(&status)),
        Err(error) => {
            // An agent that does not get this far has no second chance; if the machine has ended, its reason is the better one.
            let stopped = machine.stop().await;
            match stopped.reason {
                Reason::Requested => Err(Error::Disconnected(error)),
                _ => Err(machine::Error::Stopped(stopped).into()),
            }
        }
    }
}
