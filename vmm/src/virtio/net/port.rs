//! What all pairs of a network interface share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use libc::iovec;
use nix::errno::Errno;

use super::guard::Guard;
use super::tap::{Offloads, Tap};
use crate::control::{Dropped, Sources};

/// The most frames that are thrown away when the driver's offloads change: no tap's queue is longer.
const MOST_STALE: usize = 1 << 16;

/// The host's side of the interface.
#[derive(Debug)]
pub struct Port {
    mac: [u8; 6],
    /// The queues of the tap, one for each pair.
    pub taps: Vec<Tap>,
    up: AtomicBool,
    guard: Mutex<Arc<Guard>>,
    dropped: Counters,
    state: Mutex<State>,
}

/// What the tap was told.
#[derive(Debug)]
struct State {
    offloads: Offloads,
    /// How many of its queues frames are put into.
    pairs: usize,
}

/// [`Dropped`], counted by several threads.
#[derive(Debug, Default)]
pub struct Counters {
    pub spoofed: AtomicU64,
    pub invalid: AtomicU64,
    pub refused: AtomicU64,
    pub oversized: AtomicU64,
    pub unlinked: AtomicU64,
}

impl Port {
    /// An interface whose link is up. All queues of the tap are in use, with these offloads.
    pub fn new(mac: [u8; 6], sources: &Sources, taps: Vec<Tap>, offloads: Offloads) -> Self {
        let pairs = taps.len();
        Self {
            mac,
            taps,
            up: AtomicBool::new(true),
            guard: Mutex::new(Arc::new(Guard::new(mac, sources))),
            dropped: Counters::default(),
            state: Mutex::new(State { offloads, pairs }),
        }
    }

    /// Whether the link is up.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Plugs the cable in or out. Tells whether that is a change.
    pub fn set_up(&self, up: bool) -> bool {
        self.up.swap(up, Ordering::AcqRel) != up
    }

    /// What the guest may send.
    pub fn guard(&self) -> Arc<Guard> {
        self.guard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Changes what the guest may send.
    pub fn set_sources(&self, sources: &Sources) {
        let guard = Arc::new(Guard::new(self.mac, sources));
        *self.guard.lock().unwrap_or_else(PoisonError::into_inner) = guard;
    }

    /// A frame was dropped.
    pub fn count(&self, reason: impl FnOnce(&Counters) -> &AtomicU64) {
        reason(&self.dropped).fetch_add(1, Ordering::Relaxed);
    }

    /// How many frames were dropped until now.
    pub fn dropped(&self) -> Dropped {
        let Counters {
            spoofed,
            invalid,
            refused,
            oversized,
            unlinked,
        } = &self.dropped;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Dropped {
            spoofed: read(spoofed),
            invalid: read(invalid),
            refused: read(refused),
            oversized: read(oversized),
            unlinked: read(unlinked),
        }
    }

    /// Makes the tap follow a driver that has agreed to these offloads. Frames that were made for another driver are gone.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.offloads != offloads {
            // One queue tells for all of them.
            if let Some(tap) = self.taps.first() {
                tap.set_offloads(offloads)?;
            }
            state.offloads = offloads;
            self.taps.iter().for_each(empty);
        }
        Ok(())
    }

    /// Has the kernel put frames into the first `pairs` queues only.
    pub fn set_pairs(&self, pairs: usize) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.pairs > pairs {
            self.taps[state.pairs - 1].set_attached(false)?;
            state.pairs -= 1;
        }
        while state.pairs < pairs {
            self.taps[state.pairs].set_attached(true)?;
            state.pairs += 1;
        }
        Ok(())
    }
}

/// Throws away what is in a queue.
fn empty(tap: &Tap) {
    let mut byte = [0u8; 1];
    let vector = iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    let mut left = MOST_STALE;
    while left > 0 && tap.read(&[vector]).is_ok() {
        left -= 1;
    }
}
