//! The guest's half of the network: interfaces of its machine, and what its kernel is told of them.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_agent::netlink::Message;
use bulkhead_agent::protocol::sandbox::{Interface as GuestInterface, SetNetworkRequest};
use bulkhead_agent::protocol::sandbox_ttrpc::SandboxClient;
use bulkhead_vmm::control::Nic;
use ttrpc::context::Context;

use super::{Interface, Network, connect};
use crate::error::Error;
use crate::machine::Machine;
use crate::sandbox::Sandbox;

/// The most pairs of queues of an interface: more than this many processors rarely wait for one interface at once.
const MAX_PAIRS: u8 = 4;

/// Gives a guest what a network namespace holds. If that has a name, it is in `path`; `bundle` is that of the shim's first task.
///
/// # Errors
///
/// An interface cannot go into a guest, or host or guest refuse. What is left is taken away by [`super::disconnect`].
pub async fn bring(
    sandbox: &Sandbox,
    namespace: OwnedFd,
    path: Option<PathBuf>,
    bundle: PathBuf,
) -> Result<(), Error> {
    let machine = sandbox.machine()?;
    let pairs = machine.vcpus().clamp(1, MAX_PAIRS).into();
    let Network {
        interfaces,
        messages,
    } = connect(namespace, path, bundle, pairs).await?;
    if interfaces.is_empty() {
        return Ok(());
    }
    let mut request = SetNetworkRequest {
        messages: messages.into_iter().map(Message::into_bytes).collect(),
        ..Default::default()
    };
    for interface in interfaces {
        request.interfaces.push(attach(machine, interface).await?);
    }
    let set = |client| async move {
        SandboxClient::new(client)
            .set_network(Context::default(), &request)
            .await
    };
    sandbox.ask_agent(set).await.map(drop)
}

/// Attaches an interface, from which the guest can send from its own addresses only.
async fn attach(machine: &Machine, interface: Interface) -> Result<GuestInterface, Error> {
    let Interface {
        index,
        name,
        mac,
        mtu,
        up,
        arp,
        addresses,
        taps,
        queue_length: _,
    } = interface;
    let nic = Nic {
        name: name.clone(),
        mac,
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        pairs: taps.len() as u16,
        sources: machine.sources(addresses),
    };
    let slot = machine.attach_nic(nic, taps).await?;
    Ok(GuestInterface {
        slot: slot.into(),
        index,
        name,
        mtu,
        up,
        arp,
        ..Default::default()
    })
}
