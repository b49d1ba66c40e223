//! The thread of one queue: it rests until a driver is ready, and then serves the queue's ring until it is asked to rest.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::request::Backend;
use crate::memory::GuestRam;
use crate::seccomp::{self, ThreadKind};
use crate::virtio::{Broken, Ring};

/// A handle to the thread. Dropping it ends the thread.
#[derive(Debug)]
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    duty: Mutex<Duty>,
    changed: Condvar,
    /// The thread is to stop serving. Read before each request.
    rest: AtomicBool,
    kick: Arc<EventFd>,
}

/// What the thread does.
#[derive(Debug)]
enum Duty {
    /// Nothing, until told.
    Rest,
    /// It is to serve this.
    Begin(Box<Service>),
    /// It serves.
    Serve,
    /// It is to end.
    End,
}

/// A ring to be served.
#[derive(Debug)]
struct Service {
    ram: GuestRam,
    ring: Ring,
    features: u64,
}

impl Worker {
    /// Starts the thread of a disk's queue, resting.
    pub fn start(
        disk: &str,
        queue: u16,
        kick: Arc<EventFd>,
        backend: Arc<Backend>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            duty: Mutex::new(Duty::Rest),
            changed: Condvar::new(),
            rest: AtomicBool::new(false),
            kick,
        });
        let its = shared.clone();
        let thread = seccomp::spawn(ThreadKind::Block, format!("{disk}:{queue}"), move || {
            its.run(&backend);
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Has the resting thread serve a ring.
    pub fn serve(&self, ram: GuestRam, ring: Ring, features: u64) {
        self.shared.set(Duty::Begin(Box::new(Service {
            ram,
            ring,
            features,
        })));
    }

    /// Asks the thread to rest after the request that it is at.
    pub fn ask_to_rest(&self) {
        self.shared.rest.store(true, Ordering::Release);
        self.shared.wake();
    }

    /// Waits until the thread rests. It must have been asked to.
    pub fn wait_for_rest(&self) {
        let mut duty = self.shared.lock();
        while !matches!(*duty, Duty::Rest) {
            duty = self
                .shared
                .changed
                .wait(duty)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.shared.rest.store(false, Ordering::Release);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.ask_to_rest();
        self.wait_for_rest();
        self.shared.set(Duty::End);
        if let Some(thread) = self.thread.take() {
            // It can only have panicked, which ends the process before it comes here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The thread.
    fn run(&self, backend: &Backend) {
        while let Some(mut service) = self.next() {
            if service.serve(self, backend).is_err() {
                service.ring.set_broken();
            }
            self.set(Duty::Rest);
        }
    }

    /// Rests until there is something to serve; `None` when the thread is to end.
    fn next(&self) -> Option<Box<Service>> {
        let mut duty = self.lock();
        loop {
            match std::mem::replace(&mut *duty, Duty::Serve) {
                Duty::Begin(service) => return Some(service),
                Duty::End => return None,
                resting => *duty = resting,
            }
            duty = self
                .changed
                .wait(duty)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn set(&self, duty: Duty) {
        *self.lock() = duty;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Duty> {
        self.duty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // The counter cannot be full: the thread that reads it is the only other end.
        let _ = self.kick.write(1);
    }

    fn is_asked_to_rest(&self) -> bool {
        self.rest.load(Ordering::Acquire)
    }
}

impl Service {
    /// Serves the ring until the thread is asked to rest. An error is the driver's.
    fn serve(&mut self, thread: &Shared, backend: &Backend) -> Result<(), Broken> {
        loop {
            self.drain(thread, backend)?;
            if thread.is_asked_to_rest() {
                return Ok(());
            }
            // Should the wait be interrupted, there is no harm in looking once too often.
            let _ = thread.kick.read();
        }
    }

    /// Carries out what is in the ring, one interrupt for all that was there at once.
    fn drain(&mut self, thread: &Shared, backend: &Backend) -> Result<(), Broken> {
        let ram = &self.ram;
        self.ring.disable_kicks(ram)?;
        loop {
            let mut served = 0;
            while let Some(chain) = self.ring.pop(ram)? {
                let head = chain.head;
                let written = backend.execute(chain, self.features)?;
                self.ring.push(ram, head, written)?;
                served += 1;
                if thread.is_asked_to_rest() || served == super::QUEUE_SIZE {
                    break;
                }
            }
            if served > 0 {
                self.ring.signal(ram)?;
            } else if !self.ring.enable_kicks(ram)? {
                return Ok(());
            }
            if thread.is_asked_to_rest() {
                return Ok(());
            }
        }
    }
}
