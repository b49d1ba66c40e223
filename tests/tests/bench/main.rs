//! What a start costs, counted on the emulated node: `make bench` prints one table and fails if a budget of `budgets.toml`
//! is broken. An argument is the name of the only row that is wanted.

mod machine;
mod run;
mod sizes;

use std::process::ExitCode;

use bulkhead_tests::bench::{Budgets, Report, Row};
use bulkhead_tests::error::{Error, Result};
use bulkhead_tests::site::Site;

/// How often each thing is measured.
const REPEATS: usize = 5;

/// Rows that are measured together.
struct Group {
    names: &'static [&'static str],
    measure: fn(&Site) -> Result<Vec<Row>>,
}

const GROUPS: [Group; 5] = [
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
        names: &["kernel-size", "agent-size", "vmm-size", "shim-size"],
        measure: sizes::sizes,
    },
];

fn main() -> ExitCode {
    match bench(std::env::args().nth(1).as_deref()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Prints the table of one row, or of all, and tells whether the budgets are kept.
fn bench(only: Option<&str>) -> Result<bool> {
    let names = GROUPS.map(|group| group.names).concat();
    let budgets = Budgets::parse(include_str!("../../budgets.toml"), &names)?;
    if let Some(name) = only {
        if !names.contains(&name) {
            return Err(Error::Unfit(format!(
                "there is no row {name:?}; rows: {}",
                names.join(", ")
            )));
        }
    }
    let wanted = |name: &str| only.is_none_or(|only| only == name);
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
