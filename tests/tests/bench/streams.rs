//! A container's standard output, under Bulkhead and under runc.

use std::fs::File;
use std::io::{Read, Write};

use bulkhead_tests::bench::{Row, Unit};
use bulkhead_tests::ctr::{Running, Runtime, World};
use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::site::Site;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::meter::Meter;
use crate::{REPEATS, SILENCE, STREAM_LIMIT, insist, quotients, remove};

/// How much each repeat writes, in MiB.
const LENGTH: u64 = 16;

/// What the reader of the FIFO reads at once.
const BUFFER: usize = 64 << 10;

/// Writes so many MiB as it reads numbers.
const SCRIPT: &str = "while read n; do dd if=/dev/zero bs=64k count=$((n * 16)) 2>/dev/null; done";

/// Has both runtimes in turn write to a FIFO.
pub fn output(_: &Site) -> Result<Vec<Row>> {
    let world = World::new()?;
    let (our, their) = insist(STREAM_LIMIT, || measure(&world))?;
    world.finish()?;
    let quotients = quotients(&our, &their);
    Ok(vec![
        Row {
            name: "stdout",
            what: "a MiB of a container's output to a FIFO's reader, under Bulkhead",
            unit: Unit::Thousands,
            values: our,
        },
        Row {
            name: "stdout-runc",
            what: "the same under runc",
            unit: Unit::Thousands,
            values: their,
        },
        Row {
            name: "stdout-ratio",
            what: "the quotient of the two",
            unit: Unit::Ratio,
            values: quotients,
        },
    ])
}

/// Measures both, with a new container of each.
fn measure(world: &World) -> Result<(Vec<f64>, Vec<f64>)> {
    let start = |runtime| -> Result<Running<'_>> {
        let container = world.container(runtime, "busybox")?;
        container.start(&["sh", "-c", SCRIPT])
    };
    let ours = start(Runtime::Bulkhead)?;
    let theirs = start(Runtime::Runc)?;
    let result = compare(&ours, &theirs);
    theirs.delete()?;
    remove(ours, &result)?;
    result
}

/// Has both write in turn.
fn compare(ours: &Running<'_>, theirs: &Running<'_>) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut our_input, mut our_output) = (ours.stdin()?, ours.stdout()?);
    let (mut their_input, mut their_output) = (theirs.stdin()?, theirs.stdout()?);
    // Once before what counts: the program is in memory then.
    counted(&mut our_input, &mut our_output, 1)?;
    counted(&mut their_input, &mut their_output, 1)?;
    let (mut our, mut their) = (Vec::new(), Vec::new());
    for _ in 0..REPEATS {
        our.push(counted(&mut our_input, &mut our_output, LENGTH)?);
        their.push(counted(&mut their_input, &mut their_output, LENGTH)?);
    }
    Ok((our, their))
}

/// Thousands of instructions for each of `length` MiB.
fn counted(input: &mut File, output: &mut File, length: u64) -> Result<f64> {
    let mut buffer = vec![0; BUFFER];
    let mut missing = length << 20;
    let limit = Timespec {
        tv_sec: SILENCE.as_secs() as i64,
        tv_nsec: 0,
    };
    let meter = Meter::start()?;
    writeln!(input, "{length}").or_cannot("write to a container")?;
    while missing > 0 {
        let mut watched = [PollFd::new(output, PollFlags::IN)];
        if poll(&mut watched, Some(&limit)).or_cannot("wait for a container")? == 0 {
            return Err(Error::Unfit(format!(
                "a container is silent that has {missing} bytes to write"
            )));
        }
        let read = output
            .read(&mut buffer)
            .or_cannot("read from a container")? as u64;
        if read == 0 || read > missing {
            return Err(Error::Unfit(format!(
                "a container's output ended {missing} bytes before its end, or goes on after it"
            )));
        }
        missing -= read;
    }
    Ok(Unit::Thousands.of(meter.busy()?) / length as f64)
}
