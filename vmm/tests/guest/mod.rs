//! Tiny guests: a few instructions as an ELF "kernel", run by the real VMM in its real jail.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use bulkhead_vmm::control::{Boot, Channel, Disk, Event, Extent, Request, StopReason};
use bulkhead_vmm::launch::{self, Exit, Vmm};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;

/// Where a guest's code is, and starts.
pub const ENTRY: u64 = 0x20_0000;

/// An address below the mapped GiB and above the memory of these guests, where nobody answers.
pub const NOWHERE: u32 = 0x1000_0000;

/// `out port, al` for each byte: what the serial port prints.
pub fn print(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code
}

/// `out 0x64, al` with the keyboard controller's reset command.
pub const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];

/// Waits for ever: `cli; hlt; jmp hlt`.
pub const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

/// An ELF executable with one segment of code at [`ENTRY`].
pub fn kernel(code: &[u8]) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    for half in [2u16, 62] {
        elf.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    elf.extend(1u32.to_le_bytes());
    for long in [ENTRY, 64, 0] {
        elf.extend(long.to_le_bytes()); // entry point, program headers, section headers
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [1u32, 7] {
        elf.extend(word.to_le_bytes()); // PT_LOAD, all permissions
    }
    let length = code.len() as u64;
    for long in [0x1000, ENTRY, ENTRY, length, length, 0x1000] {
        elf.extend(long.to_le_bytes());
    }
    elf.resize(0x1000, 0);
    elf.extend(code);
    elf
}

/// A file in memory.
pub fn file(content: &[u8]) -> OwnedFd {
    let mut file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file.into()
}

pub fn device(path: &str) -> OwnedFd {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
        .into()
}

/// A read-only disk of one extent.
pub fn disk(length: u64) -> Disk {
    Disk {
        id: "disk".into(),
        read_only: true,
        queues: 1,
        extents: vec![Extent { offset: 0, length }],
    }
}

/// A request for a small machine without disks.
pub fn small() -> Boot {
    Boot {
        vcpus: 1,
        memory_mib: 4,
        cmdline: String::new(),
        ports: Some(vec![]),
        disks: vec![],
        nics: vec![],
    }
}

/// Waits for the process's end.
pub fn wait(vmm: &mut Vmm) -> Exit {
    let mut process = [PollFd::new(vmm.as_fd(), PollFlags::POLLIN)];
    poll(&mut process, PollTimeout::NONE).unwrap();
    vmm.try_wait().unwrap().unwrap()
}

/// A VMM, the shim's end of its control socket, and the reader of the console.
pub struct Machine {
    pub vmm: Vmm,
    pub control: Channel,
    pub console: Option<File>,
}

impl Machine {
    /// Starts a VMM, without a machine.
    pub fn launch() -> Self {
        let uid = launch::unique_uid(launch::DEFAULT_UID_BASE).unwrap();
        let vmm = Path::new(env!("CARGO_BIN_EXE_bulkhead-vmm"));
        let (vmm, control) = launch::launch(vmm, uid).unwrap();
        Self {
            vmm,
            control,
            console: None,
        }
    }

    /// Starts a VMM and asks it to boot a kernel. `extra` are the descriptors of disks.
    pub fn boot(boot: Boot, kernel: OwnedFd, extra: &[OwnedFd]) -> Self {
        let mut machine = Self::launch();
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let descriptors = [device("/dev/kvm"), kernel, writer];
        machine.request(&Request::Boot(boot), descriptors.iter().chain(extra));
        machine.console = Some(reader.into());
        machine
    }

    /// Boots some code in a small machine.
    pub fn run(code: &[u8]) -> Self {
        Self::boot(small(), file(&kernel(code)), &[])
    }

    pub fn request<'a>(
        &self,
        request: &Request,
        descriptors: impl IntoIterator<Item = &'a OwnedFd>,
    ) {
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.into_iter().map(AsFd::as_fd).collect();
        self.control.send(request, &descriptors).unwrap();
    }

    pub fn event(&self) -> Event {
        self.control.receive().unwrap().0
    }

    /// The machine starts, without disks.
    pub fn started(self) -> Self {
        assert_eq!(self.event(), Event::Started { slots: vec![] });
        self
    }

    /// Waits for the machine's end and the process's, and returns the reason and what is on the console.
    pub fn end(mut self) -> (StopReason, String) {
        let Event::Stopped { reason } = self.event() else {
            panic!("the machine has not stopped");
        };
        assert_eq!(wait(&mut self.vmm), Exit::Code(0));
        let mut text = String::new();
        if let Some(mut console) = self.console {
            console.read_to_string(&mut text).unwrap();
        }
        (reason, text)
    }

    /// The machine is refused, for a reason in which all of the words are.
    pub fn refused(self, words: &[&str]) {
        match self.end().0 {
            StopReason::Invalid(error) => {
                for word in words {
                    assert!(error.contains(word), "{word:?} is not in {error:?}");
                }
            }
            reason => panic!("{reason:?}"),
        }
    }
}
