//! A thread of a device: it rests until a driver is ready, and then serves until it is asked to rest.
//!
//! It is started with the device, not with its driver: threads are started by the main thread alone, whose system call filter
//! allows that.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::seccomp::{self, ThreadKind};

/// A handle to the thread, which serves an `S` at a time. Dropping it ends the thread.
#[derive(Debug)]
pub struct Worker<S> {
    shared: Arc<Shared<S>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared<S> {
    duty: Mutex<Duty<S>>,
    changed: Condvar,
    rest: Rest,
    kick: Arc<EventFd>,
}

/// What the thread does.
#[derive(Debug)]
enum Duty<S> {
    /// Nothing, until told.
    Rest,
    /// It is to serve this.
    Begin(Box<S>),
    /// It serves.
    Serve,
    /// It is to end.
    End,
}

/// Whether the thread is to stop serving.
#[derive(Debug, Default)]
pub struct Rest(AtomicBool);

impl Rest {
    /// To be looked at before each piece of work, and after each wait.
    pub fn is_due(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl<S: Send + 'static> Worker<S> {
    /// Starts a thread, resting. `serve` returns when it sees that [`Rest::is_due`]; should it be waiting then, `kick` is
    /// written.
    pub fn start(
        kind: ThreadKind,
        name: String,
        kick: Arc<EventFd>,
        mut serve: impl FnMut(Box<S>, &Rest) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            duty: Mutex::new(Duty::Rest),
            changed: Condvar::new(),
            rest: Rest::default(),
            kick,
        });
        let its = shared.clone();
        let thread = seccomp::spawn(kind, name, move || {
            while let Some(service) = its.next() {
                serve(service, &its.rest);
                its.set(Duty::Rest);
            }
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl<S> Worker<S> {
    /// Has the resting thread serve.
    pub fn serve(&self, service: S) {
        self.shared.set(Duty::Begin(Box::new(service)));
    }

    /// Asks the thread to rest after what it is at.
    pub fn ask_to_rest(&self) {
        self.shared.rest.0.store(true, Ordering::Release);
        // The counter cannot be full: nobody writes it 2^64 - 2 times.
        let _ = self.shared.kick.write(1);
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
        self.shared.rest.0.store(false, Ordering::Release);
    }
}

impl<S> Drop for Worker<S> {
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

impl<S> Shared<S> {
    /// Rests until there is something to serve; `None` when the thread is to end.
    fn next(&self) -> Option<Box<S>> {
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

    fn set(&self, duty: Duty<S>) {
        *self.lock() = duty;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Duty<S>> {
        self.duty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
