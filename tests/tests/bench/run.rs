//! A container through containerd, under Bulkhead and under runc.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_tests::bench::{Row, Unit};
use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::leftovers::Snapshot;
use bulkhead_tests::site::Site;

use crate::machine::{Mapping, mappings};
use crate::{REPEATS, START_LIMIT, insist, remove};

/// How long it may take until nothing is left of a container.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);

/// Runs `true` under both runtimes in turn, each time from a machine that is not there yet to one that is gone.
pub fn compare(site: &Site) -> Result<Vec<Row>> {
    // The first run of each also makes what all later ones share: cached layers, directories.
    for runtime in [Runtime::Bulkhead, Runtime::Runc] {
        insist(START_LIMIT, || timed(site, runtime))?;
    }
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        let our = insist(START_LIMIT, || timed(site, Runtime::Bulkhead))?.as_secs_f64();
        let their = timed(site, Runtime::Runc)?.as_secs_f64();
        ours.push(our * 1e3);
        theirs.push(their * 1e3);
        ratios.push(our / their);
    }
    Ok(vec![
        Row {
            name: "run",
            what: "ctr run --rm of busybox true, under Bulkhead",
            unit: Unit::VirtualMs,
            values: ours,
        },
        Row {
            name: "run-runc",
            what: "the same under runc",
            unit: Unit::VirtualMs,
            values: theirs,
        },
        Row {
            name: "run-ratio",
            what: "the quotient of the two",
            unit: Unit::Ratio,
            values: ratios,
        },
    ])
}

/// How long one `ctr run` takes. What it leaves to others to finish is finished before this returns, and not counted.
fn timed(site: &Site, runtime: Runtime) -> Result<Duration> {
    let before = Snapshot::take(site)?;
    let mut ctr = Command::new("ctr");
    ctr.args(["run", "--rm", "--runtime", runtime.name()])
        .args(["localhost/busybox:latest", "bench", "true"])
        .envs(site.environment()?)
        .stdin(Stdio::null());
    let start = Instant::now();
    let status = ctr.status().or_cannot("run ctr")?;
    let time = start.elapsed();
    if !status.success() {
        let runtime = runtime.name();
        return Err(Error::Unfit(format!(
            "`ctr run` with {runtime} ended with {status}"
        )));
    }
    before.settle(site, SETTLE_LIMIT)?;
    Ok(time)
}

/// What the shim of a running container has in memory.
pub fn shim_memory(_: &Site) -> Result<Vec<Row>> {
    let world = World::new()?;
    let mut values = Vec::new();
    for _ in 0..REPEATS {
        values.push(insist(START_LIMIT, || one_shim(&world))?);
    }
    world.finish()?;
    Ok(vec![Row {
        name: "shim-memory",
        what: "PSS of the shim of a running container",
        unit: Unit::Mib,
        values,
    }])
}

/// That of one container, in MiB.
fn one_shim(world: &World) -> Result<f64> {
    let container = world.container(Runtime::Bulkhead, "busybox")?;
    let running = container.start(&["tail", "-f", "/dev/null"])?;
    let pss = running.pid().and_then(parent).and_then(pss);
    remove(running, &pss)?;
    pss
}

/// What a process has in memory, in MiB.
fn pss(pid: u32) -> Result<f64> {
    let pss = mappings(pid)?.iter().map(|mapping| mapping.pss).sum();
    Ok(Mapping::mib(pss))
}

/// A task's process is the VMM; its parent is the shim.
fn parent(pid: u32) -> Result<u32> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).or_cannot(format!("read {path}"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| Error::Unfit(format!("{path} tells no parent")))
}
