//! A machine by itself, started as the shim starts it.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use bulkhead_agent::protocol::AGENT_PORT;
use bulkhead_shim::machine::CMDLINE;
use bulkhead_tests::bench::{Row, Unit};
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::site::Site;
use bulkhead_vmm::control::{Boot, Channel, Disk, Event, Extent, Request, StopReason};
use bulkhead_vmm::launch::{self, Vmm};

use crate::{REPEATS, START_LIMIT, insist};

/// The machine's memory in MiB.
const MEMORY: u32 = 128;

/// From the VMM's execution to the agent's stream, and what is in memory then.
pub fn start(site: &Site) -> Result<Vec<Row>> {
    let (mut times, mut vmm, mut guest) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        let started = insist(START_LIMIT, || until_agent(site))?;
        times.push(Unit::VirtualMs.of(started.time));
        vmm.push(Mapping::mib(started.vmm));
        guest.push(Mapping::mib(started.guest));
    }
    Ok(vec![
        Row {
            name: "agent",
            what: "from the VMM's execution to the agent's stream (1 vCPU, 128 MiB)",
            unit: Unit::VirtualMs,
            values: times,
        },
        Row {
            name: "vmm-memory",
            what: "PSS of the VMM then, outside of the guest's memory",
            unit: Unit::Mib,
            values: vmm,
        },
        Row {
            name: "guest-memory",
            what: "the guest's memory that it has touched then",
            unit: Unit::Mib,
            values: guest,
        },
    ])
}

/// A machine whose agent is there.
struct Started {
    time: Duration,
    /// What the VMM has in memory outside of the guest's, in KiB.
    vmm: u64,
    /// What the guest has touched, in KiB.
    guest: u64,
}

fn until_agent(site: &Site) -> Result<Started> {
    let machine = Machine::launch(site, CMDLINE)?;
    let (event, _stream) = machine.after_start()?;
    let time = machine.start.elapsed();
    if event != (Event::StreamOpened { port: AGENT_PORT }) {
        return Err(Error::Unfit(format!(
            "the agent was not there, but: {event:?}"
        )));
    }
    let mappings = mappings(machine.vmm.pid())?;
    // The guest's memory is one mapping, by far the largest.
    let is_guest = |mapping: &&Mapping| mapping.size >= u64::from(MEMORY) << 10;
    let (ram, other): (Vec<&Mapping>, Vec<&Mapping>) = mappings.iter().partition(is_guest);
    let &[ram] = ram.as_slice() else {
        return Err(Error::Unfit(format!(
            "{} mappings of the VMM have {MEMORY} MiB or more, and not the guest's memory alone",
            ram.len()
        )));
    };
    Ok(Started {
        time,
        vmm: other.iter().map(|mapping| mapping.pss).sum(),
        guest: ram.rss,
    })
}

/// From the VMM's execution to the execution of the guest's first process: one that is not there, so that the kernel panics
/// at this point, without a console that it would tell of it.
pub fn first_process(site: &Site) -> Result<Vec<Row>> {
    let mut values = Vec::new();
    for _ in 0..REPEATS {
        values.push(Unit::Instructions.of(insist(START_LIMIT, || until_panic(site))?));
    }
    Ok(vec![Row {
        name: "pid-1",
        what: "instructions from the VMM's execution to the guest's first process",
        unit: Unit::Instructions,
        values,
    }])
}

fn until_panic(site: &Site) -> Result<Duration> {
    let cmdline = CMDLINE.replace("console=ttyS0", "console=null") + " init=/nothing";
    let machine = Machine::launch(site, &cmdline)?;
    let (event, _) = machine.after_start()?;
    let time = machine.start.elapsed();
    let reason = StopReason::Panic;
    if event != (Event::Stopped { reason }) {
        return Err(Error::Unfit(format!(
            "the guest did not look for its first process, but: {event:?}"
        )));
    }
    Ok(time)
}

/// A VMM with the guest's root image as its only disk. Dropping it ends it.
struct Machine {
    vmm: Vmm,
    control: Channel,
    start: Instant,
}

impl Machine {
    fn launch(site: &Site, cmdline: &str) -> Result<Self> {
        let open = |path: &str| -> Result<File> {
            let path = site.payload.join(path);
            File::open(&path).or_cannot(format!("open {}", path.display()))
        };
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let image = open("lib/rootfs.erofs")?;
        let length = image
            .metadata()
            .or_cannot("examine the guest's root image")?
            .len();
        let console = OpenOptions::new().write(true).open("/dev/null");
        let descriptors = [
            kvm.or_cannot("open /dev/kvm")?,
            open("lib/vmlinux")?,
            console.or_cannot("open /dev/null")?,
            image,
        ];
        let boot = Boot {
            vcpus: 1,
            memory_mib: MEMORY,
            cmdline: cmdline.to_owned(),
            ports: Some(vec![AGENT_PORT]),
            nics: Vec::new(),
            disks: vec![Disk {
                id: "root".into(),
                read_only: true,
                queues: 1,
                extents: vec![Extent { offset: 0, length }],
            }],
        };
        let unfit = |error: &dyn std::error::Error| Error::Unfit(error.to_string());
        let uid = launch::unique_uid(launch::DEFAULT_UID_BASE).map_err(|error| unfit(&error))?;
        let program = site.payload.join("bin/bulkhead-vmm");
        let start = Instant::now();
        let (vmm, control) = launch::launch(&program, uid).map_err(|error| unfit(&error))?;
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        control
            .send(&Request::Boot(boot), &descriptors)
            .map_err(|error| unfit(&error))?;
        Ok(Self {
            vmm,
            control,
            start,
        })
    }

    /// What the VMM tells after [`Event::Started`], with its descriptors.
    fn after_start(&self) -> Result<(Event, Vec<OwnedFd>)> {
        loop {
            let received = self.control.receive();
            let (event, descriptors) =
                received.map_err(|error| Error::Unfit(format!("the VMM is gone: {error}")))?;
            if !matches!(event, Event::Started { .. }) {
                return Ok((event, descriptors));
            }
        }
    }
}

/// A mapping of a process, in KiB.
#[derive(Debug, Default, Clone, Copy)]
pub struct Mapping {
    pub size: u64,
    pub rss: u64,
    pub pss: u64,
}

impl Mapping {
    /// KiB in MiB.
    pub fn mib(kib: u64) -> f64 {
        kib as f64 / 1024.0
    }
}

/// The mappings of a process, from its smaps (proc_pid_smaps(5)): a block for each, which begins with its size.
pub fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).or_cannot(format!("read {path}"))?;
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let kib = || {
            let number = value.trim().strip_suffix(" kB").map(str::parse);
            let Some(Ok(number)) = number else {
                return Err(Error::Unfit(format!("{path} has {line:?}")));
            };
            Ok(number)
        };
        if key == "Size" {
            mappings.push(Mapping {
                size: kib()?,
                ..Mapping::default()
            });
        } else if let Some(mapping) = mappings.last_mut() {
            match key {
                "Rss" => mapping.rss = kib()?,
                "Pss" => mapping.pss = kib()?,
                // Many more figures.
                _ => {}
            }
        }
    }
    if mappings.is_empty() {
        return Err(Error::Unfit(format!("{path} has no mapping")));
    }
    Ok(mappings)
}
