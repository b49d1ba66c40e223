//! The guest's half of the network: interfaces of its machine, and what its kernel is told of them.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_agent::netlink::Message;
use bulkhead_agent::protocol::sandbox::{Interface as GuestInterface, SetNetworkRequest};
use bulkhead_agent::protocol::sandbox_ttrpc::SandboxClient;
use bulkhead_vmm::control::Nic;
use ttrpc::context::Context;

use super::follower::Follower;
use super::wiring::Wiring;
use super::{Interface, Network, connect};
use crate::error::Error;
use crate::machine::Machine;
use crate::sandbox::Sandbox;

/// The most pairs of queues of an interface: more than this many processors rarely wait for one interface at once.
const MAX_PAIRS: u8 = 4;

/// The longest packets that an interface of a guest could have. How long they are is the guest's kernel told.
const MAX_MTU: u16 = u16::MAX;

/// An interface that the guest has.
#[derive(Debug)]
pub struct Attached {
    /// As the host has it, without queues.
    pub interface: Interface,
    /// Its PCI device number.
    pub slot: u8,
}

/// Gives a guest what a network namespace holds. If that has a name, it is in `path`; `bundle` is that of the shim's first task.
/// Returns who can tell it of changes.
///
/// # Errors
///
/// An interface cannot go into a guest, or host or guest refuse. What is left is taken away by [`super::disconnect`].
pub async fn bring(
    sandbox: &Sandbox,
    namespace: OwnedFd,
    path: Option<PathBuf>,
    bundle: PathBuf,
) -> Result<Follower, Error> {
    let machine = sandbox.machine()?;
    let wiring = Wiring {
        path,
        bundle,
        pairs: machine.vcpus().clamp(1, MAX_PAIRS).into(),
    };
    let here = namespace.try_clone().map_err(super::Error::Enter)?;
    let Network {
        interfaces,
        messages,
        changes,
    } = connect(here, wiring.clone()).await?;
    let mut attached = Vec::new();
    for interface in interfaces {
        attached.push(attach(machine, interface).await?);
    }
    if !attached.is_empty() || !messages.is_empty() {
        let request = SetNetworkRequest {
            interfaces: attached.iter().map(for_guest).collect(),
            messages: messages.iter().cloned().map(Message::into_bytes).collect(),
            ..Default::default()
        };
        let set = |client| async move {
            SandboxClient::new(client)
                .set_network(Context::default(), &request)
                .await
        };
        sandbox.ask_agent(set).await?;
    }
    Ok(Follower::new(
        namespace, wiring, changes, attached, messages,
    )?)
}

/// Attaches an interface, from which the guest can send what it may.
pub async fn attach(machine: &Machine, mut interface: Interface) -> Result<Attached, Error> {
    let taps = std::mem::take(&mut interface.taps);
    let nic = Nic {
        name: interface.name.clone(),
        mac: interface.mac,
        mtu: MAX_MTU,
        pairs: taps.len() as u16,
        sources: machine.sources(interface.addresses.clone()),
    };
    let slot = machine.attach_nic(nic, taps).await?;
    let attached = Attached { interface, slot };
    if !attached.interface.carrier {
        attached.update(machine).await?;
    }
    Ok(attached)
}

impl Attached {
    /// Has the machine's interface do what it says.
    pub async fn update(&self, machine: &Machine) -> Result<(), Error> {
        let Interface {
            addresses, carrier, ..
        } = &self.interface;
        let sources = machine.sources(addresses.clone());
        let dropped = machine.update_nic(self.slot, *carrier, sources).await?;
        log::debug!("network interface {:?}: {dropped:?}", self.interface.name);
        Ok(())
    }
}

/// An interface as the guest is told of it.
pub fn for_guest(attached: &Attached) -> GuestInterface {
    let Interface {
        index,
        name,
        mtu,
        up,
        arp,
        ..
    } = &attached.interface;
    GuestInterface {
        slot: attached.slot.into(),
        index: *index,
        name: name.clone(),
        mtu: *mtu,
        up: *up,
        arp: *arp,
        ..Default::default()
    }
}
