//! What is done at the interfaces of a network namespace while a guest uses it: taps come, go, and get longer packets.

use std::path::{Path, PathBuf};

use bulkhead_agent::netlink::Socket;

use super::contents::Contents;
use super::{Error, Hook, Interface, Trace, link, new_socket, redirect};

/// How the taps of a pod are made.
#[derive(Debug, Clone)]
pub struct Wiring {
    /// The network namespace's name, if it has one.
    pub path: Option<PathBuf>,
    /// The bundle into which is written what is to be taken away by [`super::disconnect`].
    pub bundle: PathBuf,
    /// How many queues a tap has.
    pub pairs: u16,
}

/// What is known of an interface beside which there is a tap.
#[derive(Debug, Clone, Copy)]
pub struct Wired {
    pub index: u32,
    pub mac: [u8; 6],
    pub mtu: u32,
}

/// What was found and done.
#[derive(Debug)]
pub struct Look {
    /// All interfaces that have a tap, those with queues since now.
    pub contents: Contents,
    /// The taps that are gone.
    pub gone: Vec<u32>,
    /// The interfaces that cannot have one.
    pub failed: Vec<u32>,
}

impl From<&Interface> for Wired {
    fn from(interface: &Interface) -> Self {
        Self {
            index: interface.index,
            mac: interface.mac,
            mtu: interface.mtu,
        }
    }
}

impl Wiring {
    /// Looks at the calling thread's network namespace, in which there were taps beside these interfaces: takes away those that
    /// belong to nothing any more, and puts one beside each interface that has none, unless it is one of `without`.
    pub fn look(&self, wired: &[Wired], without: &[u32]) -> Result<Look, Error> {
        let mut socket = new_socket()?;
        let mut contents = Contents::read(&mut socket)?;
        let mut gone = Vec::new();
        for known in wired {
            let found = contents.interfaces.iter().find(|i| i.index == known.index);
            match found {
                // One with another hardware address is another interface to the guest. Without our queueing discipline it was
                // elsewhere in between.
                Some(found) if found.mac == known.mac && contents.qdiscs.contains(&found.index) => {
                    if found.mtu != known.mtu
                        && let Err(error) = link::set_mtu(&mut socket, found)
                    {
                        log::warn!("{error}");
                    }
                }
                Some(_) | None => gone.push(known.index),
            }
        }
        for &index in &gone {
            self.unplug(&mut socket, index)?;
        }
        if !gone.is_empty() {
            contents = Contents::read(&mut socket)?;
        }
        let stays =
            |i: &Interface| wired.iter().any(|w| w.index == i.index) && !gone.contains(&i.index);
        let hooks: Vec<_> = contents
            .interfaces
            .iter()
            .map(|i| contents.hook(i))
            .collect();
        let mut failed = Vec::new();
        for (interface, hook) in contents.interfaces.iter_mut().zip(hooks) {
            if stays(interface) {
                continue;
            }
            if without.contains(&interface.index) {
                failed.push(interface.index);
            } else if let Err(error) = self.plug(&mut socket, interface, hook) {
                log::error!("{error}; the guest does not get it");
                failed.push(interface.index);
            }
        }
        contents.interfaces.retain(|i| !failed.contains(&i.index));
        Ok(Look {
            contents,
            gone,
            failed,
        })
    }

    /// Puts a tap beside an interface. If that fails nothing is left of it.
    fn plug(
        &self,
        socket: &mut Socket,
        interface: &mut Interface,
        hook: Hook,
    ) -> Result<(), Error> {
        let tap = link::add_tap(socket, interface, self.pairs)?;
        let joined = self
            .note(|trace| trace.hooks.push(hook))
            .and_then(|()| redirect::join(socket, interface, tap, hook.had_qdisc));
        if joined.is_err() {
            interface.taps.clear();
            self.unplug(socket, hook.index)?;
        }
        joined
    }

    /// Takes the tap beside an interface away, whoever still has it open, and what is left at the interface if that is still there.
    pub fn unplug(&self, socket: &mut Socket, index: u32) -> Result<(), Error> {
        if let Err(error) = link::remove_tap(socket, index) {
            log::debug!("the tap beside network interface {index}: {error}");
        }
        self.note(|trace| {
            trace.hooks.retain(|hook| {
                if hook.index == index
                    && let Err(error) = redirect::leave(socket, hook)
                {
                    log::debug!("network interface {index}: {error}");
                }
                hook.index != index
            });
        })
    }

    /// Changes what is written down.
    fn note(&self, change: impl FnOnce(&mut Trace)) -> Result<(), Error> {
        let bundle: &Path = &self.bundle;
        let mut trace = Trace::read(bundle)?.unwrap_or_else(|| Trace {
            namespace: self.path.clone(),
            hooks: Vec::new(),
        });
        change(&mut trace);
        trace.write(bundle)
    }
}
