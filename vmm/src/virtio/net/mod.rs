//! The network device (section 5.1), on a tap of the host's.
//!
//! Each pair of queues has a thread and a queue of the tap. Frames are moved by `readv` and `writev` between the tap and the
//! guest's buffers, with the header that virtio and the tap share: checksums and segmentation are left to whoever is last in
//! the way, which may be nobody.
//!
//! The guest is an honest neighbour, whatever it does: the device drops what it must not send ([`guard`]).

mod command;
mod guard;
mod pair;
mod port;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::pair::{Pair, Service};
use self::port::Port;
use self::receive::Receiver;
use self::tap::{Offloads, Tap};
use self::transmit::Transmitter;
use super::worker::Worker;
use super::{Activation, Device, Queue, Signals};
use crate::control::{Dropped, Nic, Sources};
use crate::seccomp::ThreadKind;

/// Length of the header before each frame (section 5.1.6), in bytes.
const HEADER: usize = 12;

/// The longest frame: an IP packet of 64 KiB and an Ethernet header with two VLAN tags.
const LONGEST_FRAME: usize = 65_536 + 22;

/// The least MTU that IPv4 allows (RFC 791).
const MIN_MTU: u16 = 68;

/// The most pairs.
const MAX_PAIRS: u16 = 8;

/// Descriptors in a queue that carries frames, and in the control queue, which has one command at a time.
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;

/// Features of every interface.
const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS;

/// What is wrong with a network interface.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hardware address.
    #[error(
        "network interface {name:?}: its hardware address {mac:02x?} is no station's: it must not be zero, nor a group's"
    )]
    Mac {
        /// The interface.
        name: String,
        /// What was asked for.
        mac: [u8; 6],
    },
    /// The longest packet.
    #[error("network interface {name:?}: its MTU is {mtu}; it must be at least {MIN_MTU}")]
    Mtu {
        /// The interface.
        name: String,
        /// What was asked for.
        mtu: u16,
    },
    /// Number of pairs.
    #[error(
        "network interface {name:?} asks for {pairs} pairs of queues; it can have 1 to {MAX_PAIRS}"
    )]
    Pairs {
        /// The interface.
        name: String,
        /// What was asked for.
        pairs: u16,
    },
    /// Pairs and descriptors do not belong together.
    #[error(
        "network interface {name:?} has {pairs} pairs of queues, but {files} descriptors came with it; it needs one for each"
    )]
    Count {
        /// The interface.
        name: String,
        /// Number of pairs.
        pairs: u16,
        /// Number of descriptors.
        files: usize,
    },
    /// A descriptor cannot be used.
    #[error("network interface {name:?}, descriptor {index}: {problem}")]
    Tap {
        /// The interface.
        name: String,
        /// The descriptor, counted from 0.
        index: usize,
        /// What is wrong with it.
        problem: tap::Problem,
    },
    /// The tap cannot do what a guest is promised.
    #[error("network interface {name:?}: cannot set the tap's offloads (TUNSETOFFLOAD): {source}")]
    Offloads {
        /// The interface.
        name: String,
        /// What the system said.
        source: Errno,
    },
    /// The system refused.
    #[error("network interface {name:?}, pair {pair}: cannot start its thread: {source}")]
    Thread {
        /// The interface.
        name: String,
        /// The pair.
        pair: usize,
        /// What it said.
        source: io::Error,
    },
}

/// A network device. Clones are the same device.
#[derive(Debug, Clone)]
pub struct Net(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    features: u64,
    mac: [u8; 6],
    mtu: u16,
    port: Arc<Port>,
    queues: Vec<Queue>,
    workers: Vec<Worker<Service>>,
    /// Counts the changes of the link.
    generation: AtomicU8,
    /// There while there is a driver.
    signals: Mutex<Option<Arc<Signals>>>,
}

impl Net {
    /// An interface on the tap whose queues are `files`, with its link up. Starts a thread for each pair.
    ///
    /// # Errors
    ///
    /// What is asked for is not possible, the descriptors are not what they should be, or the system has no room for the
    /// threads.
    pub fn new(nic: &Nic, files: Vec<OwnedFd>) -> Result<Self, Error> {
        let name = || nic.name.clone();
        if nic.mac == [0; 6] || nic.mac[0] & 1 == 1 {
            return Err(Error::Mac {
                name: name(),
                mac: nic.mac,
            });
        }
        if nic.mtu < MIN_MTU {
            return Err(Error::Mtu {
                name: name(),
                mtu: nic.mtu,
            });
        }
        if !(1..=MAX_PAIRS).contains(&nic.pairs) {
            return Err(Error::Pairs {
                name: name(),
                pairs: nic.pairs,
            });
        }
        if files.len() != usize::from(nic.pairs) {
            return Err(Error::Count {
                name: name(),
                pairs: nic.pairs,
                files: files.len(),
            });
        }
        let taps = Tap::adopt(files).map_err(|(index, problem)| Error::Tap {
            name: name(),
            index,
            problem,
        })?;
        // What the kernel knows is what it takes; most drivers agree to everything, so that it is asked only once.
        let offloads = match taps[0].set_offloads(Offloads::ALL) {
            Ok(()) => Ok(Offloads::ALL),
            Err(Errno::EINVAL) => taps[0]
                .set_offloads(Offloads::USUAL)
                .map(|()| Offloads::USUAL),
            Err(error) => Err(error),
        };
        let offloads = offloads.map_err(|source| Error::Offloads {
            name: name(),
            source,
        })?;
        Self::with_taps(nic, taps, offloads)
    }

    /// An interface on queues of a tap that does these offloads.
    fn with_taps(nic: &Nic, taps: Vec<Tap>, offloads: Offloads) -> Result<Self, Error> {
        let mut features = FEATURES;
        if offloads == Offloads::ALL {
            features |= 1 << VIRTIO_NET_F_GUEST_USO4
                | 1 << VIRTIO_NET_F_GUEST_USO6
                | 1 << VIRTIO_NET_F_HOST_USO;
        }
        let several = taps.len() > 1;
        if several {
            features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
        }
        let mut sizes = vec![QUEUE_SIZE; taps.len() * 2];
        sizes.extend(several.then_some(CONTROL_QUEUE_SIZE));

        let thread = |pair, source| Error::Thread {
            name: nic.name.clone(),
            pair,
            source,
        };
        let mut queues = Vec::new();
        for size in sizes {
            let kick = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(|e| thread(0, e))?;
            let kick = Arc::new(kick);
            queues.push(Queue { size, kick });
        }
        let count = taps.len();
        let port = Arc::new(Port::new(nic.mac, &nic.sources, taps, offloads));
        let mut workers = Vec::new();
        for index in 0..count {
            let (rx, tx) = (&queues[2 * index], &queues[2 * index + 1]);
            let commands = queues.get(2 * count).filter(|_| index == 0);
            let pair = Pair::new(index, port.clone(), rx, tx, commands)
                .map_err(|errno| thread(index, errno.into()))?;
            let worker = Worker::start(
                ThreadKind::Net,
                format!("{}:{index}", nic.name),
                tx.kick.clone(),
                move |mut service: Box<Service>, rest: &_| pair.run(&mut service, rest),
            );
            workers.push(worker.map_err(|source| thread(index, source))?);
        }
        Ok(Self(Arc::new(Shared {
            features,
            mac: nic.mac,
            mtu: nic.mtu,
            port,
            queues,
            workers,
            generation: AtomicU8::new(0),
            signals: Mutex::new(None),
        })))
    }

    /// Plugs the cable in or out, and sets what the guest may send. The guest is told of the cable.
    pub fn update(&self, link: bool, sources: &Sources) {
        let Shared {
            port,
            generation,
            queues,
            ..
        } = &*self.0;
        port.set_sources(sources);
        if port.set_up(link) {
            generation.fetch_add(1, Ordering::AcqRel);
            if let Some(signals) = &*self.0.signals() {
                signals.tell_of_change();
            }
            // What waits in a tap while the guest has no buffers is for nobody now.
            for queue in queues {
                let _ = queue.kick.write(1);
            }
        }
    }

    /// How many frames were dropped until now.
    pub fn dropped(&self) -> Dropped {
        self.0.port.dropped()
    }
}

impl Shared {
    fn signals(&self) -> MutexGuard<'_, Option<Arc<Signals>>> {
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Net {
    fn id(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn class(&self) -> u32 {
        0x02_00_00
    }

    fn features(&self) -> u64 {
        self.0.features
    }

    fn queues(&self) -> &[Queue] {
        &self.0.queues
    }

    /// `struct virtio_net_config` (section 5.1.4): mac, status, max_virtqueue_pairs, mtu.
    fn config(&self) -> Cow<'_, [u8]> {
        let Shared {
            mac,
            mtu,
            port,
            workers,
            ..
        } = &*self.0;
        let status = if port.is_up() {
            VIRTIO_NET_S_LINK_UP as u16
        } else {
            0
        };
        let mut config = mac.to_vec();
        config.extend(status.to_le_bytes());
        config.extend((workers.len() as u16).to_le_bytes());
        config.extend(mtu.to_le_bytes());
        config.into()
    }

    fn config_generation(&self) -> u8 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// A pair without one of its queues is not served.
    fn start(&self, activation: Activation) {
        let Activation {
            ram,
            features,
            rings,
            signals,
        } = activation;
        let has = |feature: u32| features & 1 << feature != 0;
        let several = has(VIRTIO_NET_F_MQ);
        *self.0.signals() = Some(signals.clone());
        // The control queue's place would be that of the second pair's receive queue. Nobody needs it there.
        if has(VIRTIO_NET_F_CTRL_VQ) && !several {
            signals.set_broken();
            return;
        }
        let offloads = Offloads::from_features(features);
        let mut rings = rings;
        let mut commands = rings
            .get_mut(2 * self.0.workers.len())
            .and_then(Option::take);
        let mut rings = rings.into_iter();
        let used = if several { usize::MAX } else { 1 };
        for worker in self.0.workers.iter().take(used) {
            let (Some(Some(rx)), Some(Some(tx))) = (rings.next(), rings.next()) else {
                continue;
            };
            worker.serve(Service {
                ram: ram.clone(),
                receiver: Receiver::new(rx, has(VIRTIO_NET_F_MRG_RXBUF), offloads, self.0.mtu),
                transmitter: Transmitter::new(tx, has(VIRTIO_NET_F_HOST_USO)),
                commands: commands.take(),
                offloads,
                several,
            });
        }
    }

    fn stop(&self) {
        *self.0.signals() = None;
        for worker in &self.0.workers {
            worker.ask_to_rest();
        }
        for worker in &self.0.workers {
            worker.wait_for_rest();
        }
    }
}
