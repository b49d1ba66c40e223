//! Walks the table in docs/oci.md: every field of the specification has a row, and what the row says is true.
//!
//! `sample.json` has every field once, with a value that asks for something.

#![allow(clippy::unwrap_used, reason = "in a test a failure is told by a panic")]

mod fields;

use bulkhead_agent::agent::Paths;
use bulkhead_agent::error::Error;
use bulkhead_agent::oci;
use bulkhead_agent::oci::root::Root;
use bulkhead_agent::plan::{Creation, Plan};
use bulkhead_agent::process::Streams;
use fields::{get, leaves, remove, set};
use serde_json::Value;

const TABLE: &str = include_str!("../../../docs/oci.md");
const SAMPLE: &str = include_str!("sample.json");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    Guest,
    Host,
    Refused,
}

#[derive(Debug)]
struct Row<'a> {
    path: &'a str,
    /// If it speaks of one value only.
    value: Option<&'a str>,
    place: Where,
}

impl Row<'_> {
    /// Whether it speaks of a field: of its own, of one directly in it, and, if it refuses, of one anywhere below.
    fn covers(&self, path: &str) -> bool {
        let Some(rest) = path.strip_prefix(self.path) else {
            return false;
        };
        let below = rest.starts_with(['.', '[']);
        rest.is_empty() || below && (self.place == Where::Refused || rest.matches('.').count() <= 1)
    }
}

fn rows() -> Vec<Row<'static>> {
    let lines = TABLE.lines().filter(|line| line.starts_with("| `"));
    lines
        .map(|line| {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let mut words = cells[1].split('`').filter(|word| !word.trim().is_empty());
            let (path, equals, value) = (words.next(), words.next(), words.next());
            assert!(matches!(equals.map(str::trim), None | Some("=")), "{line}");
            Row {
                path: path.unwrap(),
                value,
                place: match cells[2] {
                    "guest" => Where::Guest,
                    "host" => Where::Host,
                    "refused" => Where::Refused,
                    _ => panic!("guest, host or refused is expected in: {line}"),
                },
            }
        })
        .collect()
}

fn sample() -> Value {
    serde_json::from_str(SAMPLE).unwrap()
}

/// The sample without what the table refuses, and without what the guest never sees because the host removes it.
fn accepted(rows: &[Row<'_>]) -> Value {
    let mut spec = sample();
    for row in rows.iter().filter(|row| row.value.is_none()) {
        if row.place == Where::Refused || REMOVED.contains(&row.path) {
            remove(&mut spec, row.path);
        }
    }
    spec
}

/// What the host removes: the guest would refuse it.
const REMOVED: [&str; 5] = [
    "process.apparmorProfile",
    "process.selinuxLabel",
    "linux.mountLabel",
    "linux.resources.cpu.cpus",
    "linux.resources.cpu.mems",
];

fn plan(spec: &Value) -> Result<Plan, Error> {
    let creation = Creation {
        id: "c".into(),
        bundle: "/b".into(),
        spec: oci::parse_spec(spec.to_string().as_bytes())?,
        root: Root::Empty,
        binds: None,
        terminal: true,
        streams: Streams::default(),
    };
    let paths = Paths {
        run: "/run".into(),
        cgroup: "/sys/fs/cgroup".into(),
    };
    Plan::new(&creation, &paths, "/sys/fs/cgroup/c".into())
}

#[test]
fn the_sample_has_every_field() {
    let rows = rows();
    let sample = sample();
    let missing = fields::missing(&sample);
    let unknown: Vec<_> = missing
        .iter()
        // Another element of the same list may have it.
        .filter(|path| get(&sample, path).is_empty())
        .filter(|path| {
            !rows
                .iter()
                .any(|row| row.place == Where::Refused && row.value.is_none() && row.covers(path))
        })
        .collect();
    assert!(
        unknown.is_empty(),
        "neither in the sample nor refused: {unknown:#?}"
    );
}

#[test]
fn every_field_has_a_row_and_every_row_a_field() {
    let rows = rows();
    let sample = sample();
    for leaf in leaves(&sample) {
        assert!(
            rows.iter().any(|row| row.covers(&leaf)),
            "no row for {leaf}"
        );
    }
    for row in &rows {
        assert!(
            !get(&sample, row.path).is_empty(),
            "no such field: {}",
            row.path
        );
        let same = rows
            .iter()
            .filter(|other| (other.path, other.value) == (row.path, row.value));
        assert_eq!(same.count(), 1, "two rows for {}", row.path);
    }
}

#[test]
fn what_is_not_refused_is_accepted() {
    let rows = rows();
    let spec = accepted(&rows);
    plan(&spec).unwrap();
    // The fields of the guest's rows are in it.
    for row in rows.iter().filter(|row| row.place == Where::Guest) {
        assert!(!get(&spec, row.path).is_empty(), "{}", row.path);
    }
}

#[test]
fn what_is_refused_is_named() {
    let rows = rows();
    let sample = sample();
    let removed = rows.iter().filter(|row| REMOVED.contains(&row.path));
    for row in rows
        .iter()
        .filter(|row| row.place == Where::Refused)
        .chain(removed)
    {
        let mut spec = accepted(&rows);
        let named = match row.value {
            Some(value) => {
                let parsed = serde_json::from_str(value).unwrap_or_else(|_| value.into());
                set(&mut spec, row.path, &parsed);
                value
            }
            None => {
                let value = get(&sample, row.path)[0].clone();
                set(&mut spec, row.path, &value);
                row.path.rsplit('.').next().unwrap()
            }
        };
        match plan(&spec) {
            Err(Error::InvalidArgument(message)) => {
                assert!(message.contains(named), "{}: {message}", row.path);
            }
            other => panic!("{} is not refused: {other:?}", row.path),
        }
    }
}

#[test]
fn a_capability_that_nobody_knows_is_ignored() {
    let rows = rows();
    let mut spec = accepted(&rows);
    let expected = plan(&spec).unwrap().program.capabilities;
    let sets = rows
        .iter()
        .filter(|row| row.path.starts_with("process.capabilities."));
    for row in sets {
        set(&mut spec, row.path, &"CAP_OF_TOMORROW".into());
        let names = get(&spec, row.path);
        assert_eq!(names[0].as_array().unwrap().len(), 2, "{}", row.path);
    }
    assert_eq!(plan(&spec).unwrap().program.capabilities, expected);
}

#[test]
fn what_nobody_knows_is_named() {
    for path in ["new", "process.new", "linux.new", "linux.resources.new"] {
        let mut spec = accepted(&rows());
        set(&mut spec, path, &Value::from(1));
        match plan(&spec) {
            Err(Error::InvalidArgument(message)) => {
                assert!(message.contains(path), "{message}");
            }
            other => panic!("{path} is not refused: {other:?}"),
        }
    }
    let mut spec = accepted(&rows());
    set(&mut spec, "ociVersion", &Value::from("2.0.0"));
    assert!(plan(&spec).unwrap_err().to_string().contains("ociVersion"));
}
