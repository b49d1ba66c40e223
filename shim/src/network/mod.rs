//! The network of a pod: what its network namespace holds goes into the guest.
//!
//! Beside each interface that is there the shim puts a tap, and joins the two by traffic control: what comes in at the one goes
//! out at the other, before the host's own network sees it. The guest has an interface of the same name, with the same addresses,
//! routes and neighbours, at the other end of the tap. The interface on the host stays what it is, and counts what passes.
//!
//! A tap is gone with the last descriptor of it, and with it all that hangs on it. What stays is a queueing discipline and a
//! filter at the interface: these are written down before they are made, and [`disconnect`] takes them away.

mod contents;
mod difference;
mod follower;
mod guest;
mod link;
mod redirect;
mod subscription;
#[cfg(test)]
mod tests;
mod wiring;

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;

use bulkhead_agent::netlink::{self, Message, Socket};
use nix::errno::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

pub use self::follower::Follower;
pub use self::guest::bring;

use self::contents::Contents;
use self::wiring::Wiring;
use crate::state::write_atomically;

/// The file's name in the bundle of the shim's first task.
const FILE: &str = "bulkhead-network.json";

/// What a tap is called: this, and the number of the interface that it is put beside.
const TAP_PREFIX: &str = "bulkhead";

/// Why a guest cannot have its pod's network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {operation} {}: {source}", path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot enter the pod's network namespace: {0}")]
    Enter(io::Error),
    #[error("cannot follow the changes in the pod's network namespace: {0}")]
    Follow(io::Error),
    #[error("cannot read {what} in the pod's network namespace: {source}")]
    Read {
        what: &'static str,
        source: netlink::Error,
    },
    #[error("the kernel's description of {0} in the pod's network namespace makes no sense")]
    Description(&'static str),
    #[error(
        "network interface {name:?} is of kind {kind:?}, which a microVM cannot have; use veth, macvlan, ipvlan or tap"
    )]
    Kind { name: String, kind: String },
    #[error("network interface {name:?}: cannot {operation}: {source}")]
    Interface {
        name: String,
        operation: &'static str,
        source: netlink::Error,
    },
    #[error("network interface {name:?}: cannot make a tap beside it ({operation}): {source}")]
    Tap {
        name: String,
        operation: &'static str,
        source: Errno,
    },
    #[error(
        "network interface {0:?} is another microVM's already; containers that are to share a network must be of one pod"
    )]
    Taken(String),
    #[error("the thread that sets the pod's network up has ended")]
    Thread,
}

/// What the guest is to have.
#[derive(Debug)]
pub struct Network {
    pub interfaces: Vec<Interface>,
    /// Addresses, neighbours and routes.
    pub messages: Vec<Message>,
    /// Where the kernel tells of changes since it was looked at.
    pub changes: OwnedFd,
}

/// One of its interfaces.
#[derive(Debug)]
pub struct Interface {
    /// Its number on the host.
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    /// How many packets the host may queue at it.
    pub queue_length: u32,
    pub up: bool,
    /// Nothing is known of a broken link.
    pub carrier: bool,
    pub arp: bool,
    pub addresses: Vec<IpAddr>,
    /// The queues of the tap beside it.
    pub taps: Vec<OwnedFd>,
}

/// What must be taken away again, even if the shim is killed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Trace {
    /// Where the network namespace can be found; without a name, it ends with its last process.
    namespace: Option<PathBuf>,
    hooks: Vec<Hook>,
}

/// What is changed at an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Hook {
    /// Its number.
    index: u32,
    /// It has an ingress queueing discipline of somebody else's, which stays.
    had_qdisc: bool,
    /// The length of its queue, which the kernel makes longer than 0 when there is the first queueing discipline.
    queue_length: u32,
}

impl Trace {
    fn write(&self, bundle: &Path) -> Result<(), Error> {
        let path = bundle.join(FILE);
        let text = serde_json::to_vec(self).map_err(io::Error::from);
        text.and_then(|text| write_atomically(&path, &text))
            .map_err(file("write", &path))
    }

    fn read(bundle: &Path) -> Result<Option<Self>, Error> {
        let path = bundle.join(FILE);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|error| file("read", &path)(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file("read", &path)(error)),
        }
    }
}

/// Puts a tap beside each interface of a network namespace.
///
/// # Errors
///
/// An interface is of a kind that cannot go into a guest, or the kernel refuses. Then nothing is left of it.
async fn connect(namespace: OwnedFd, wiring: Wiring) -> Result<Network, Error> {
    in_namespace(namespace, move || {
        // What changes from here on is seen now, or told.
        let changes = subscription::open().map_err(Error::Follow)?;
        let mut socket = new_socket()?;
        let mut contents = Contents::read(&mut socket)?;
        if let Some(error) = contents.refused.pop() {
            return Err(error);
        }
        let has = |index| contents.interfaces.iter().any(|i| i.index == index);
        let messages = contents.messages(has);
        let hooks = contents.interfaces.iter().map(|i| contents.hook(i));
        let trace = Trace {
            namespace: wiring.path,
            hooks: hooks.collect(),
        };
        let mut interfaces = contents.interfaces;
        if trace.hooks.is_empty() {
            return Ok(Network {
                interfaces,
                messages,
                changes,
            });
        }
        // Who has all taps is alone at these interfaces: only then anything is written down that will be taken away.
        let taps = interfaces
            .iter_mut()
            .map(|interface| link::add_tap(&mut socket, interface, wiring.pairs))
            .collect::<Result<Vec<_>, _>>()?;
        trace.write(&wiring.bundle)?;
        for ((interface, hook), tap) in interfaces.iter().zip(&trace.hooks).zip(taps) {
            if let Err(error) = redirect::join(&mut socket, interface, tap, hook.had_qdisc) {
                remove(&mut socket, &trace);
                return Err(error);
            }
        }
        Ok(Network {
            interfaces,
            messages,
            changes,
        })
    })
    .await
}

/// Takes away what is left at the interfaces of a bundle's pod. What is not there any more is as good as taken away.
///
/// # Errors
///
/// What was written down cannot be read.
pub fn disconnect(bundle: &Path) -> Result<(), Error> {
    let Some(trace) = Trace::read(bundle)? else {
        return Ok(());
    };
    let removed = match trace.namespace.as_deref().map(File::open) {
        Some(Ok(namespace)) => {
            // A thread of its own, because this one is to stay where it is.
            let thread = thread::spawn(move || {
                enter(&namespace.into())?;
                remove(&mut new_socket()?, &trace);
                Ok(())
            });
            thread.join().unwrap_or(Err(Error::Thread))
        }
        // Without its namespace, an interface is gone, or somebody else's.
        Some(Err(_)) | None => Ok(()),
    };
    let path = bundle.join(FILE);
    removed.and(std::fs::remove_file(&path).map_err(file("remove", &path)))
}

fn remove(socket: &mut Socket, trace: &Trace) {
    for hook in &trace.hooks {
        if let Err(error) = redirect::leave(socket, hook) {
            log::debug!("network interface {}: {error}", hook.index);
        }
    }
}

/// Does something in a network namespace, in a thread of its own.
async fn in_namespace<T: Send + 'static>(
    namespace: OwnedFd,
    act: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (sender, done) = oneshot::channel();
    thread::Builder::new()
        .name("network".into())
        .spawn(move || {
            let result = enter(&namespace).and_then(|()| act());
            // Whoever waited may have gone.
            let _ = sender.send(result);
        })
        .map_err(Error::Enter)?;
    done.await.unwrap_or(Err(Error::Thread))
}

/// Moves the calling thread.
fn enter(namespace: &OwnedFd) -> Result<(), Error> {
    use std::os::fd::AsFd;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| Error::Enter(errno.into()))
}

fn new_socket() -> Result<Socket, Error> {
    Socket::new().map_err(|source| Error::Read {
        what: "what is",
        source,
    })
}

fn file(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File {
        operation,
        path,
        source,
    }
}
