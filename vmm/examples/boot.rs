//! Boots a machine in its jail, without shim and agent, with its console on standard output and its events on standard
//! error. Needs root, as the shim does.
//!
//! ```text
//! boot --kernel vmlinux --disk root.erofs --cmdline 'console=ttyS0 root=/dev/vda ro'
//! ```
//!
//! Each event has the milliseconds since the VMM was started before it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use bulkhead_vmm::control::{Boot, Disk, Event, Extent, Request, StopReason};
use bulkhead_vmm::launch::{self, Exit, Vmm};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const USAGE: &str = "boot --kernel FILE [--cmdline TEXT] [--disk FILE]... [--vcpus N] [--memory MIB] \
     [--port VSOCK_PORT]... [--vmm FILE]";

struct Arguments {
    vmm: PathBuf,
    kernel: PathBuf,
    disks: Vec<PathBuf>,
    boot: Boot,
}

fn main() -> ExitCode {
    match parse().and_then(run) {
        Ok(StopReason::PowerOff | StopReason::Reset) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("boot: {error}\nusage: {USAGE}");
            ExitCode::from(2)
        }
    }
}

type Error = Box<dyn std::error::Error>;

fn parse() -> Result<Arguments, Error> {
    // Cargo puts examples into a directory beside the binaries.
    let beside = std::env::current_exe()?;
    let built = beside.parent().and_then(|examples| examples.parent());
    let mut vmm = built
        .map(|built| built.join("bulkhead-vmm"))
        .unwrap_or_default();
    let mut kernel = None;
    let mut disks = Vec::new();
    let mut boot = Boot {
        vcpus: 1,
        memory_mib: 128,
        cmdline: "console=ttyS0 reboot=k panic=-1".into(),
        ports: Some(Vec::new()),
        disks: Vec::new(),
        nics: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or(format!("{name} has no value"))?;
        match name.as_str() {
            "--vmm" => vmm = value.into(),
            "--kernel" => kernel = Some(value.into()),
            "--disk" => disks.push(value.into()),
            "--cmdline" => boot.cmdline = value,
            "--vcpus" => boot.vcpus = value.parse()?,
            "--memory" => boot.memory_mib = value.parse()?,
            "--port" => boot.ports.get_or_insert_default().push(value.parse()?),
            unknown => return Err(format!("unknown argument {unknown}").into()),
        }
    }
    Ok(Arguments {
        vmm,
        kernel: kernel.ok_or("no --kernel")?,
        disks,
        boot,
    })
}

fn run(arguments: Arguments) -> Result<StopReason, Error> {
    let Arguments {
        vmm,
        kernel,
        disks,
        mut boot,
    } = arguments;
    let mut descriptors: Vec<OwnedFd> = vec![
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")?
            .into(),
        File::open(kernel)?.into(),
        io::stdout().as_fd().try_clone_to_owned()?,
    ];
    for (index, path) in disks.iter().enumerate() {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        boot.disks.push(Disk {
            id: format!("disk{index}"),
            read_only: true,
            queues: 1,
            extents: vec![Extent { offset: 0, length }],
        });
        descriptors.push(file.into());
    }

    let start = Instant::now();
    let uid = launch::unique_uid(launch::DEFAULT_UID_BASE)?;
    let (mut vmm, control) = launch::launch(&vmm, uid)?;
    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    control.send(&Request::Boot(boot), &descriptors)?;
    let mut streams = Vec::new();
    loop {
        let (event, opened) = match control.receive::<Event>() {
            Ok(received) => received,
            Err(error) => {
                return Err(format!("{error}; the VMM {}", end(&mut vmm)?).into());
            }
        };
        streams.extend(opened);
        eprintln!("{:>6} ms  {event:?}", start.elapsed().as_millis());
        if let Event::Stopped { reason } = event {
            end(&mut vmm)?;
            return Ok(reason);
        }
    }
}

/// Waits for the VMM's end.
fn end(vmm: &mut Vmm) -> Result<Exit, Error> {
    poll(
        &mut [PollFd::new(vmm.as_fd(), PollFlags::POLLIN)],
        PollTimeout::NONE,
    )?;
    Ok(vmm.try_wait()?.unwrap_or(Exit::Unknown))
}
