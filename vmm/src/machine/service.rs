//! The main thread: builds the machine that the first request describes, then serves the control socket, the vsock device
//! and the machine's end until one of these ends the process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Error, Machine, request};
use crate::control::{self, Channel, Event, Request, StopReason};
use crate::seccomp::{Filter, ThreadKind};
use crate::stop::Stopper;
use crate::virtio::vsock::Vsock;

/// Serves one machine on the control socket, from its first request to its end.
///
/// # Errors
///
/// The control socket was closed, which is the end of the machine too, or failed.
pub fn serve(control: Channel) -> Result<(), control::Error> {
    let control = Arc::new(control);
    let reason = match boot(&control) {
        Ok(machine) => machine.serve(&control)?,
        Err(End::Reason(reason)) => reason,
        Err(End::Control(error)) => return Err(error),
    };
    control.send(&Event::Stopped { reason }, &[])
}

/// Why there is no machine to serve.
enum End {
    /// That is to be reported.
    Reason(StopReason),
    /// There is nobody to report to.
    Control(control::Error),
}

impl From<control::Error> for End {
    fn from(error: control::Error) -> Self {
        match error {
            control::Error::Malformed(_) | control::Error::Truncated => {
                Self::Reason(StopReason::Invalid(error.to_string()))
            }
            control::Error::Closed | control::Error::Io { .. } | control::Error::TooLong { .. } => {
                Self::Control(error)
            }
        }
    }
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Reason(StopReason::Invalid(error.to_string()))
    }
}

/// Receives the first request, and builds and starts its machine.
///
/// The machine is never taken apart: its processors run in its memory until the process ends.
fn boot(control: &Arc<Channel>) -> Result<&'static mut Machine, End> {
    let (request, descriptors) = control.receive()?;
    let Request::Boot(boot) = request else {
        let error = request::Error::NotBoot(Box::new(request));
        return Err(Error::from(error).into());
    };
    let stopper = Stopper::new().map_err(Error::Stopper)?;
    report_panics(control.clone(), stopper.clone());
    let (machine, vcpus, platform) = Machine::build(&boot, descriptors, stopper)?;
    let nics = machine.nics.iter().map(|(slot, _)| *slot);
    let slots = machine.disks.iter().copied().chain(nics).collect();
    let machine = Box::leak(Box::new(machine));
    machine.start(vcpus, &platform)?;
    Filter::compile(ThreadKind::Main)
        .and_then(|filter| filter.install())
        .map_err(Error::from)?;
    control.send(&Event::Started { slots }, &[])?;
    Ok(machine)
}

/// Makes a panic in any thread the end of the machine, with its message as the reason.
fn report_panics(control: Arc<Channel>, stopper: Stopper) {
    let main = thread::current().id();
    std::panic::set_hook(Box::new(move |panic| {
        let reason = StopReason::Failed(format!("the VMM panicked: {panic}"));
        if thread::current().id() == main {
            // Nobody else speaks on the control socket. If nobody listens there either, that is the end all the same.
            let _ = control.send(&Event::Stopped { reason }, &[]);
            std::process::exit(1);
        }
        stopper.stop(reason);
        loop {
            thread::park();
        }
    }));
}

impl Machine {
    /// Serves events until the machine ends, and returns why it did.
    fn serve(&mut self, control: &Channel) -> Result<StopReason, control::Error> {
        loop {
            // Without a vsock device there is nothing to wait for in its place.
            let vsock = self.vsock.as_ref();
            let [requests, streams, stopped] = wait([
                control.as_fd(),
                vsock.map_or(control.as_fd(), Vsock::descriptor),
                self.stopper.as_fd(),
            ]);
            // Streams before the end: what the guest sent before it ended the machine is still delivered.
            if streams || stopped {
                self.serve_vsock(control)?;
            }
            if let Some(reason) = self.stopper.reason() {
                return Ok(reason.clone());
            }
            if requests {
                let (request, descriptors) = match control.receive() {
                    Ok(received) => received,
                    Err(error @ (control::Error::Malformed(_) | control::Error::Truncated)) => {
                        return Ok(StopReason::Failed(error.to_string()));
                    }
                    Err(error) => return Err(error),
                };
                self.answer(control, request, descriptors)?;
            }
        }
    }

    /// Does what can be done on vsock streams, and hands those over that the guest has opened.
    fn serve_vsock(&self, control: &Channel) -> Result<(), control::Error> {
        let Some(vsock) = &self.vsock else {
            return Ok(());
        };
        match vsock.process() {
            Ok(opened) => {
                for stream in opened {
                    let event = Event::StreamOpened { port: stream.port };
                    control.send(&event, &[stream.stream.as_fd()])?;
                }
            }
            Err(error) => self
                .stopper
                .stop(StopReason::Failed(format!("vsock device: {error}"))),
        }
        Ok(())
    }

    /// Serves one request.
    fn answer(
        &mut self,
        control: &Channel,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), control::Error> {
        let event = match request {
            Request::Boot(_) => {
                let error = "a second request to boot: a VMM runs one machine".to_owned();
                self.stopper.stop(StopReason::Failed(error));
                return Ok(());
            }
            Request::AttachDisk { tag, disk } => match self.attach_disk(&disk, descriptors) {
                Ok(slot) => Event::Attached { tag, slot },
                Err(error) => refused(tag, &error),
            },
            Request::AttachNic { tag, nic } => match self.attach_nic(&nic, descriptors) {
                Ok(slot) => Event::Attached { tag, slot },
                Err(error) => refused(tag, &error),
            },
            Request::AttachVsock { tag, ports } => match self.attach_vsock(ports) {
                Ok(slot) => Event::Attached { tag, slot },
                Err(error) => refused(tag, &error),
            },
            Request::UpdateNic {
                tag,
                slot,
                link,
                sources,
            } => match self.update_nic(slot, link, &sources) {
                Ok(dropped) => Event::NicUpdated { tag, dropped },
                Err(error) => refused(tag, &error),
            },
            Request::Detach { tag, slot } => match self.detach(slot) {
                Ok(()) => Event::Detached { tag },
                Err(error) => refused(tag, &error),
            },
            Request::Connect { port } => {
                // A stream that cannot be had is told by its end: the descriptor is closed.
                let mut descriptors = descriptors.into_iter();
                if let (Some(vsock), Some(stream), None) =
                    (&self.vsock, descriptors.next(), descriptors.next())
                {
                    let _ = vsock.connect(port, stream);
                }
                return Ok(());
            }
        };
        control.send(&event, &[])
    }
}

fn refused(tag: u32, error: &Error) -> Event {
    Event::Refused {
        tag,
        error: error.to_string(),
    }
}

/// Waits until at least one of the descriptors is readable, closed or broken, and tells which.
fn wait<const N: usize>(descriptors: [BorrowedFd<'_>; N]) -> [bool; N] {
    let mut polled = descriptors.map(|descriptor| PollFd::new(descriptor, PollFlags::POLLIN));
    loop {
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) => return polled.map(|descriptor| descriptor.any().unwrap_or(true)),
            Err(Errno::EINTR) => continue,
            // Without room for the kernel's copy of three descriptors nothing else would work either.
            Err(error) => panic!("poll: {error}"),
        }
    }
}
