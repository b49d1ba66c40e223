//! What a start, the network and the streams of a container cost, counted on the emulated node: `make bench` prints one table
//! and fails if a budget of `budgets.toml` is broken. An argument is what the names of the wanted rows begin with.

mod idle;
mod machine;
mod meter;
mod network;
mod run;
mod sizes;
mod streams;
mod traffic;

use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use bulkhead_tests::bench::{Budgets, Report, Row};
use bulkhead_tests::ctr::Running;
use bulkhead_tests::error::{Error, Result};
use bulkhead_tests::process;
use bulkhead_tests::site::Site;
use rustix::process::Signal;

/// How often each thing is measured.
const REPEATS: usize = 7;

/// The file name of the VMM's program.
const VMM: &str = "bulkhead-vmm";

/// How often a measurement is tried.
///
/// QEMU raises an interrupt that was injected into a guest a second time, if it has to look at its own timers before the guest
/// exits to its host or has an exception (`helper_vmrun` leaves the vector in `exception_index`, which a reached limit of `-icount`
/// makes an exception). The guest's handler is then interrupted by itself, and waits for a lock that it holds; a machine that works
/// for seconds is likely to be hit.
const ATTEMPTS: usize = 8;

/// How long a machine that was not hit takes at most to start and to end, on the node's clock.
const START_LIMIT: Duration = Duration::from_secs(3);

/// How long it takes at most if something passes through it between the two.
const STREAM_LIMIT: Duration = Duration::from_secs(15);

/// How long a machine may be silent until it is taken for one that was hit, on the node's clock.
const SILENCE: Duration = Duration::from_secs(1);

/// Rows that are measured together.
struct Group {
    names: &'static [&'static str],
    measure: fn(&Site) -> Result<Vec<Row>>,
}

const GROUPS: [Group; 8] = [
    Group {
        names: &["run", "run-runc", "run-ratio"],
        measure: run::compare,
    },
    Group {
        names: &["agent", "vmm-memory", "guest-memory"],
        measure: machine::start,
    },
    Group {
        names: &["pid-1"],
        measure: machine::first_process,
    },
    Group {
        names: &["shim-memory"],
        measure: run::shim_memory,
    },
    Group {
        names: &["idle", "idle-node"],
        measure: idle::idle,
    },
    Group {
        names: network::NAMES,
        measure: network::traffic,
    },
    Group {
        names: &["stdout", "stdout-runc", "stdout-ratio"],
        measure: streams::output,
    },
    Group {
        names: &["kernel-size", "agent-size", "vmm-size", "shim-size"],
        measure: sizes::sizes,
    },
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let only = arguments.next();
    // In a container, this program is the other side of its traffic.
    let result = match (only.as_deref(), arguments.next()) {
        (Some(traffic::VERB), Some(address)) => traffic::serve(&address).map(|()| true),
        (only, _) => bench(only),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Prints the table of some rows, or of all, and tells whether the budgets are kept.
fn bench(only: Option<&str>) -> Result<bool> {
    let names = GROUPS.map(|group| group.names).concat();
    let budgets = Budgets::parse(include_str!("../../budgets.toml"), &names)?;
    if let Some(name) = only
        && !names.iter().any(|row| row.starts_with(name))
    {
        return Err(Error::Unfit(format!(
            "there is no row that begins with {name:?}; rows: {}",
            names.join(", ")
        )));
    }
    let wanted = |name: &str| only.is_none_or(|only| name.starts_with(only));
    let site = Site::current()?;
    let mut rows = Vec::new();
    for group in GROUPS {
        if group.names.iter().any(|name| wanted(name)) {
            eprintln!("measuring {}", group.names.join(", "));
            rows.extend((group.measure)(&site)?);
        }
    }
    rows.retain(|row| wanted(row.name));
    let report = Report {
        rows: &rows,
        budgets: &budgets,
    };
    println!(
        "Medians of {REPEATS}. vms: milliseconds of a clock that advances 4 ns for each instruction of the whole machine.\n\n{report}"
    );
    let broken = report.broken();
    for line in &broken {
        println!("{line}");
    }
    Ok(broken.is_empty())
}

/// Measures with a machine of its own, and if that fails, tells why and does so again with a new one.
fn insist<T>(limit: Duration, mut measure: impl FnMut() -> Result<T>) -> Result<T> {
    let mut failures = 0;
    loop {
        match within(limit, &mut measure) {
            Err(error) if failures + 1 < ATTEMPTS => {
                eprintln!("once more, because of this: {error}");
                failures += 1;
            }
            result => return result,
        }
    }
}

/// Measures, and ends the machine if that takes longer than `limit`, so that nobody waits for it any more.
fn within<T>(limit: Duration, measure: impl FnOnce() -> Result<T>) -> Result<T> {
    let (measuring, measured) = mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        let mut late = false;
        // Again, if one was started since then.
        while measured.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            kill_machines()?;
            late = true;
        }
        Ok(late)
    });
    let result = measure();
    drop(measuring);
    let late = watch
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    match late {
        true => Err(Error::Unfit(format!(
            "a machine was not done after {} s",
            limit.as_secs()
        ))),
        false => result,
    }
}

/// Ends all machines, without asking them.
fn kill_machines() -> Result<()> {
    process::named(VMM)?
        .into_iter()
        .try_for_each(|vmm| process::kill(vmm, Signal::KILL))
}

/// Removes a container whose measurement has ended like this. A machine that is silent does not end because it is told to.
fn remove<T>(running: Running<'_>, result: &Result<T>) -> Result<()> {
    if result.is_err() {
        kill_machines()?;
    }
    running.delete()
}

/// Each of `ours` over that of `theirs`.
fn quotients(ours: &[f64], theirs: &[f64]) -> Vec<f64> {
    ours.iter()
        .zip(theirs)
        .map(|(our, their)| our / their)
        .collect()
}
