//! What a machine executes in which nothing happens.

use std::time::Duration;

use bulkhead_tests::bench::{Row, Unit};
use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::site::Site;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::meter::{Meter, vmm};
use crate::{REPEATS, insist, remove};

/// How long nothing happens, on the node's clock.
const TIME: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// How long all repeats take at most, and the machine's start.
const LIMIT: Duration = Duration::from_secs(10 * (REPEATS as u64 + 2));

/// Compares the node with an idle machine and without one.
pub fn idle(_: &Site) -> Result<Vec<Row>> {
    let world = World::new()?;
    let alone = std::process::id();
    let mut without = Vec::new();
    for _ in 0..REPEATS {
        without.push(counted(alone)?);
    }
    let with = insist(LIMIT, || with_machine(&world))?;
    world.finish()?;
    let more = with
        .iter()
        .zip(&without)
        .map(|(with, without)| with - without);
    Ok(vec![
        Row {
            name: "idle",
            what: "what an idle machine adds to an idle node in 10 s",
            unit: Unit::Instructions,
            values: more.collect(),
        },
        Row {
            name: "idle-node",
            what: "an idle node in 10 s: its kernel, containerd",
            unit: Unit::Instructions,
            values: without,
        },
    ])
}

/// Millions of instructions of the node with an idle machine, in each repeat.
fn with_machine(world: &World) -> Result<Vec<f64>> {
    let container = world.container(Runtime::Bulkhead, "busybox")?;
    let running = container.start(&["tail", "-f", "/dev/null"])?;
    let with = vmm().and_then(|vmm| {
        // What a start leaves to be done later is done after this.
        counted(vmm)?;
        (0..REPEATS).map(|_| counted(vmm)).collect()
    });
    remove(running, &with)?;
    with
}

/// Millions of instructions while nothing happens. The process `pid` must live on.
fn counted(pid: u32) -> Result<f64> {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = process.ok_or_else(|| Error::Unfit(format!("{pid} is no process")))?;
    let process =
        pidfd_open(process, PidfdFlags::empty()).or_cannot(format!("watch process {pid}"))?;
    let mut watched = [PollFd::new(&process, PollFlags::IN)];
    let meter = Meter::start()?;
    let ended = poll(&mut watched, Some(&TIME)).or_cannot("wait")?;
    let busy = meter.busy()?;
    if ended != 0 {
        return Err(Error::Unfit(format!(
            "process {pid} ended, and was to be idle"
        )));
    }
    Ok(Unit::Instructions.of(busy))
}
