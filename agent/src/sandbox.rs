//! The Sandbox service: what the shim asks of the guest as a whole.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::time::{ClockId, Timespec, clock_settime};
use ttrpc::r#async::TtrpcContext;

use crate::agent::Agent;
use crate::child::outside;
use crate::error::{Context, Error};
use crate::protocol::sandbox::{
    ChangeNetworkRequest, ChangeNetworkResponse, LetGoRequest, LetGoResponse, NextOomRequest,
    NextOomResponse, SetNetworkRequest, SetNetworkResponse, SetRequest, SetResponse, SetupRequest,
    SetupResponse,
};
use crate::protocol::sandbox_ttrpc::Sandbox;
use crate::{disk, network, plan, sys};

/// The service.
#[derive(Debug, Clone)]
pub struct SandboxService {
    agent: Arc<Agent>,
}

impl SandboxService {
    /// The service for a sandbox.
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    fn set_up(&self, request: &SetupRequest) -> Result<(), Error> {
        if !request.hostname.is_empty() {
            rustix::system::sethostname(request.hostname.as_bytes())
                .context(|| format!("setting the host name {:?}", request.hostname))?;
        }
        if request.unix_nanos > 0 {
            let time = Timespec {
                tv_sec: request.unix_nanos / 1_000_000_000,
                tv_nsec: request.unix_nanos % 1_000_000_000,
            };
            clock_settime(ClockId::Realtime, time).context(|| "setting the clock".into())?;
        }
        if !request.entropy.is_empty() {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let random = rustix::fs::open("/dev/urandom", flags, Mode::empty());
            let random = random.context(|| "opening /dev/urandom".into())?;
            sys::add_entropy(random, &request.entropy).context(|| "adding entropy".into())?;
        }
        if request.scratch_slot > 0 {
            mount_scratch(request.scratch_slot, &self.agent.paths.run.join("scratch"))?;
        }
        Ok(())
    }
}

/// Mounts the scratch disk, unless an earlier call has.
fn mount_scratch(slot: u32, place: &Path) -> Result<(), Error> {
    let what = || format!("mounting the scratch disk in PCI slot {slot}");
    let slot = disk::slot(slot)?;
    let device = |path: &Path| rustix::fs::stat(path).map(|found| found.st_dev);
    let above = place.parent().unwrap_or(place);
    if device(place).context(what)? != device(above).context(what)? {
        return Ok(());
    }
    let node = disk::node(slot, None)?;
    rustix::mount::mount(&node, place, "ext4", MountFlags::NOATIME, None).context(what)
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        self.set_up(&request)?;
        let mut response = SetupResponse::new();
        response.agent_version = env!("CARGO_PKG_VERSION").into();
        Ok(response)
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: SetNetworkRequest,
    ) -> ttrpc::Result<SetNetworkResponse> {
        network::set(&request)?;
        Ok(SetNetworkResponse::new())
    }

    async fn change_network(
        &self,
        _: &TtrpcContext,
        request: ChangeNetworkRequest,
    ) -> ttrpc::Result<ChangeNetworkResponse> {
        network::change(&request)?;
        Ok(ChangeNetworkResponse::new())
    }

    async fn let_go(
        &self,
        _: &TtrpcContext,
        request: LetGoRequest,
    ) -> ttrpc::Result<LetGoResponse> {
        let mut result = Ok(());
        for slot in request.slots {
            result = result.and(disk::slot(slot).and_then(disk::let_go));
        }
        result?;
        Ok(LetGoResponse::new())
    }

    async fn set(&self, _: &TtrpcContext, request: SetRequest) -> ttrpc::Result<SetResponse> {
        for (path, value) in plan::sysctls(&request.sysctls)? {
            outside::set(&path, &value)?;
        }
        Ok(SetResponse::new())
    }

    async fn next_oom(
        &self,
        _: &TtrpcContext,
        _: NextOomRequest,
    ) -> ttrpc::Result<NextOomResponse> {
        let mut response = NextOomResponse::new();
        response.container_id = self.agent.kills.next().await?;
        Ok(response)
    }
}
