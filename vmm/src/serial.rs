//! The serial port: what the guest writes to it goes to the console descriptor, and nothing holds the guest up.
//!
//! The console's reader may be slow or gone, and the guest may write as fast as it can. What does not fit in the pipe is
//! dropped and counted; when there is room again, a line tells how much is missing.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};

use kvm_ioctls::VmFd;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::irq::SERIAL_GSI;

/// Why there is no serial port.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot make the console descriptor non-blocking: {0}; give a pipe, a socket or a file"
    )]
    Console(io::Error),
    #[error("cannot make the serial port's interrupt event: {0}")]
    Event(io::Error),
    #[error("KVM_IRQFD for the serial port (GSI {SERIAL_GSI}): {0}")]
    Interrupt(kvm_ioctls::Error),
}

/// A 16550 on the PC's first serial port, whose interrupt KVM injects.
pub type Port = Serial<Interrupt, NoEvents, Console>;

/// Makes the serial port of a machine whose interrupt controllers exist.
///
/// # Errors
///
/// The console descriptor is none, or KVM takes no interrupt.
pub fn port(vm: &VmFd, console: OwnedFd) -> Result<Port, Error> {
    let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::Event)?;
    vm.register_irqfd(&event, SERIAL_GSI)
        .map_err(Error::Interrupt)?;
    let console = Console::new(console).map_err(Error::Console)?;
    Ok(Serial::new(Interrupt(event), console))
}

/// The serial port's interrupt.
#[derive(Debug)]
pub struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The console descriptor, to which writing never waits and never fails.
#[derive(Debug)]
pub struct Console {
    file: File,
    /// Bytes that were dropped since the last that was not.
    lost: u64,
}

impl Console {
    /// Makes the descriptor non-blocking: what is open behind it should belong to the console alone.
    fn new(console: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(console.as_fd(), FcntlArg::F_GETFL)?);
        fcntl(
            console.as_fd(),
            FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK),
        )?;
        Ok(Self {
            file: File::from(console),
            lost: 0,
        })
    }

    /// Writes what fits, and returns how much that was.
    fn offer(&mut self, bytes: &[u8]) -> usize {
        loop {
            match self.file.write(bytes) {
                Ok(written) => return written,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // Full, or the reader is gone: either way the bytes are lost and the guest does not wait.
                Err(_) => return 0,
            }
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.lost > 0 {
            let notice = format!("\n[{} bytes of console output lost]\n", self.lost);
            if self.offer(notice.as_bytes()) > 0 {
                self.lost = 0;
            }
        }
        let written = if self.lost == 0 { self.offer(bytes) } else { 0 };
        self.lost += (bytes.len() - written) as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::testing::own_descriptors;

    fn console() -> (Console, File) {
        own_descriptors();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        (Console::new(writer).unwrap(), reader.into())
    }

    #[test]
    fn output_arrives_byte_by_byte() {
        let (mut console, mut reader) = console();
        for byte in b"Linux version" {
            console.write_all(&[*byte]).unwrap();
        }
        drop(console);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "Linux version");
    }

    #[test]
    fn a_full_console_drops_and_says_how_much() {
        let (mut console, mut reader) = console();
        let mut capacity = 0;
        while console.lost == 0 {
            console.write_all(b"x").unwrap();
            capacity += 1;
        }
        console.write_all(&[b'y'; 41]).unwrap();
        assert_eq!(console.lost, 42);
        let mut filled = vec![0; capacity - 1];
        reader.read_exact(&mut filled).unwrap();
        assert!(filled.iter().all(|byte| *byte == b'x'));
        console.write_all(b"z").unwrap();
        drop(console);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "\n[42 bytes of console output lost]\nz");
    }

    #[test]
    fn a_reader_that_is_gone_stops_nobody() {
        let (mut console, reader) = console();
        drop(reader);
        console.write_all(b"to nobody").unwrap();
        assert_eq!(console.lost, 9);
    }
}
