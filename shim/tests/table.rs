//! Walks the host's rows of the table in docs/oci.md: the shim reads, removes or replaces each of these fields.

#![allow(clippy::unwrap_used, reason = "in a test a failure is told by a panic")]

use std::path::Path;

use bulkhead_shim::backing::Backing;
use bulkhead_shim::hooks::Stage;
use bulkhead_shim::spec::Spec;
use serde_json::{Value, json};

const TABLE: &str = include_str!("../../docs/oci.md");
const SAMPLE: &str = include_str!("../../agent/tests/oci/sample.json");

/// The fields that the table says are the host's.
fn host_rows() -> Vec<&'static str> {
    let lines = TABLE.lines().filter(|line| line.starts_with("| `"));
    let rows = lines.filter_map(|line| {
        let mut cells = line.split('|').map(str::trim).skip(1);
        let (field, place) = (cells.next()?, cells.next()?);
        (place == "host").then(|| field.trim_matches('`'))
    });
    rows.collect()
}

#[test]
fn what_is_the_hosts_is_done_there() {
    let mut sample: Value = serde_json::from_str(SAMPLE).unwrap();
    let linux = &mut sample["linux"];
    // Limits are those of devices that this host may not have.
    linux["resources"]["blockIO"].take();
    linux["namespaces"] = json!([
        {"type": "network", "path": "/run/netns/pod"}, {"type": "mount"}, {"type": "pid", "path": "/proc/7/ns/pid"},
    ]);
    let text = sample.to_string();
    let spec = Spec::parse(text.as_bytes()).unwrap();
    let owner = |path: &Path| Ok((path == Path::new("/proc/7/ns/pid")).then(|| "c7".to_owned()));
    let [sysctls, _] = spec.sysctls(false).unwrap();
    let places = vec!["/there".into()];
    let guest = spec.for_guest(places, owner, false, &sysctls, &Backing::default());
    let guest: Value = serde_json::from_slice(&guest.unwrap()).unwrap();
    let hooks = spec.hooks("c", "/bundle").unwrap();

    let rows = host_rows();
    assert!(rows.len() > 10, "{rows:?}");
    for row in rows {
        let pointer = format!("/{}", row.replace("[]", "/0").replace('.', "/"));
        let asked = || sample.pointer(&pointer).unwrap();
        match row {
            // Removed.
            "process.apparmorProfile"
            | "process.selinuxLabel"
            | "linux.mountLabel"
            | "linux.resources.cpu.cpus"
            | "linux.resources.cpu.mems" => {
                assert!(asked().is_string(), "{row}");
                assert_eq!(guest.pointer(&pointer), None, "{row}");
            }
            // Read.
            "root.path" => assert_eq!(
                spec.root().unwrap().path(),
                Path::new(asked().as_str().unwrap())
            ),
            "linux.cgroupsPath" => assert_eq!(spec.cgroups_path().unwrap(), *asked()),
            "annotations.*" => {
                assert_eq!(json!(spec.annotations().unwrap()), sample["annotations"])
            }
            "hooks.prestart[]"
            | "hooks.createRuntime[]"
            | "hooks.poststart[]"
            | "hooks.poststop[]" => {
                let name = row.trim_start_matches("hooks.").trim_end_matches("[]");
                let stage = Stage::ALL.into_iter().find(|stage| stage.name() == name);
                let found = &hooks.programs[stage.unwrap().name()];
                assert_eq!(json!(found[0]), *asked(), "{row}");
            }
            // Replaced.
            "mounts[].source" => {
                let binds = spec.binds(Path::new("/bundle")).unwrap();
                assert_eq!(json!(binds[0].source), *asked());
                assert_eq!(guest.pointer(&pointer), Some(&json!("/there")));
            }
            "linux.namespaces[].path" => {
                let network = spec.network().unwrap();
                assert_eq!(json!(network), *asked());
                let expected = json!([{"type": "mount"}, {"type": "pid", "path": "container:c7"}]);
                assert_eq!(guest["linux"]["namespaces"], expected);
            }
            // The request says the same.
            "process.terminal" => assert_eq!(guest.pointer(&pointer), Some(asked())),
            other => panic!("how is it seen that {other} is the host's?"),
        }
    }
}
