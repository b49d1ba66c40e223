//! The limits of a container in the guest's terms: without the numbers of the host's processors and memory nodes, and with the machine's
//! disks in place of the host's devices that they lie on.

use std::borrow::Cow;
use std::collections::BTreeMap;

use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Error, Object, json_error, object, part, to_text};
use crate::backing::{Backing, Number};

/// Fields of `linux.resources.blockIO` that limit devices of the host.
const DEVICE_LIMITS: [&str; 5] = [
    "weightDevice",
    "throttleReadBpsDevice",
    "throttleWriteBpsDevice",
    "throttleReadIOPSDevice",
    "throttleWriteIOPSDevice",
];

/// Files of `linux.resources.unified` whose lines begin with the number of a device.
const PER_DEVICE: [&str; 3] = ["io.bfq.weight", "io.latency", "io.max"];

/// Fields of `linux.resources.cpu` that the machine's affinity takes care of.
const HOST_NUMBERS: [&str; 2] = ["cpus", "mems"];

/// The files of `linux.resources.unified` that mean the same as these fields.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// A limit of one device.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct DeviceLimit {
    major: i64,
    minor: i64,
    /// What the limit is.
    #[serde(flatten)]
    limit: BTreeMap<String, Value>,
}

/// The resources of an update, as the host reads them.
pub fn resources(json: &[u8]) -> Result<LinuxResources, Error> {
    serde_json::from_slice(json)
        .map(for_host)
        .map_err(json_error("resources"))
}

/// Resources as the host reads them: what `unified` says of the machine's size and place is in the fields that mean the same. It has the
/// last word, as it is written last. What cannot be read is left to the guest's kernel, which refuses it.
pub(super) fn for_host(mut resources: LinuxResources) -> LinuxResources {
    let Some(unified) = resources.unified_mut().take() else {
        return resources;
    };
    let said = |file: &str| {
        let value = unified.get(file).map(|value| value.trim());
        value.filter(|value| !value.is_empty())
    };
    if let Some(limit) = said("memory.max").and_then(amount) {
        let memory = resources.memory_mut().get_or_insert_default();
        memory.set_limit(Some(limit));
    }
    let cpu = resources.cpu_mut().get_or_insert_default();
    let mut max = said("cpu.max").into_iter().flat_map(str::split_whitespace);
    if let Some(quota) = max.next().and_then(amount) {
        cpu.set_quota(Some(quota));
    }
    if let Some(period) = max.next().and_then(|period| period.parse().ok()) {
        cpu.set_period(Some(period));
    }
    let [cpus, mems] = CPUSET.map(|file| said(file).map(str::to_owned));
    if cpus.is_some() {
        cpu.set_cpus(cpus);
    }
    if mems.is_some() {
        cpu.set_mems(mems);
    }
    resources
}

/// What a file of a control group is told: a number, perhaps with a unit, or that there is no limit, for which the fields have -1.
fn amount(text: &str) -> Option<i64> {
    if text == "max" {
        return Some(-1);
    }
    let mut found = "KMGTPE".chars().zip(1..).filter_map(|(unit, power)| {
        let digits = text.strip_suffix([unit, unit.to_ascii_lowercase()])?;
        Some((digits, power))
    });
    let (digits, power) = found.next().unwrap_or((text, 0));
    let number: i64 = digits.parse().ok()?;
    Some(number.saturating_mul(1 << (10 * power)))
}

/// The text of an update's resources for the guest.
pub fn resources_for_guest(json: &[u8], backing: &Backing) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(&guest_resources(json, backing)?).map_err(json_error("resources"))
}

/// Resources without the numbers of the host's processors, memory nodes and devices, which mean nothing to the guest.
pub(super) fn guest_resources<'a>(
    resources: &'a [u8],
    backing: &Backing,
) -> Result<Object<'a>, Error> {
    let mut resources = object("resources", resources)?;
    if let Some(Cow::Borrowed(cpu)) = resources.get("cpu").filter(|cpu| cpu.get() != "null") {
        let mut cpu = object("cpu", cpu.get().as_bytes())?;
        for field in HOST_NUMBERS {
            cpu.remove(field);
        }
        resources.insert("cpu".into(), to_text("cpu", &cpu)?);
    }
    let block = resources.get("blockIO");
    if let Some(Cow::Borrowed(block)) = block.filter(|block| block.get() != "null") {
        let mut block = object("blockIO", block.get().as_bytes())?;
        for field in DEVICE_LIMITS {
            let devices: Option<Vec<DeviceLimit>> = part(&block, field)?.flatten();
            let mut there = Vec::new();
            for device in devices.iter().flatten() {
                let text = format!("{}:{}", device.major, device.minor);
                for disk in disks_on(backing, &format!("blockIO.{field}"), &text)? {
                    there.push(DeviceLimit {
                        major: 0,
                        minor: disk.into(),
                        ..device.clone()
                    });
                }
            }
            if !there.is_empty() {
                block.insert(field.into(), to_text(field, &there)?);
            }
        }
        resources.insert("blockIO".into(), to_text("blockIO", &block)?);
    }
    let unified: Option<BTreeMap<String, String>> = part(&resources, "unified")?.flatten();
    if let Some(mut unified) = unified {
        for file in CPUSET {
            unified.remove(file);
        }
        for (file, value) in &mut unified {
            if PER_DEVICE.contains(&file.as_str()) {
                *value = guest_lines(file, value, backing)?;
            }
        }
        resources.insert("unified".into(), to_text("unified", &unified)?);
    }
    Ok(resources)
}

/// The lines of a file with the guest's disks in place of the host's devices.
fn guest_lines(file: &str, value: &str, backing: &Backing) -> Result<String, Error> {
    let mut lines = Vec::new();
    for line in value.lines() {
        match line.split_once(' ') {
            Some((device, rest)) if device.contains(':') => {
                for disk in disks_on(backing, &format!("unified: {file}"), device)? {
                    lines.push(format!("0:{disk} {rest}"));
                }
            }
            // What holds for all devices.
            _ => lines.push(line.to_owned()),
        }
    }
    Ok(lines.join("\n"))
}

fn disks_on(backing: &Backing, field: &str, device: &str) -> Result<Vec<u32>, Error> {
    Ok(backing.disks_on(field, Number::parse(device), device)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    #[test]
    fn limits_of_devices_are_those_of_the_disks_on_them() {
        let directory = tempfile::tempdir().unwrap();
        let backing = Backing {
            scratch: directory.path().into(),
            layers: Vec::new(),
        };
        let asked = |device: &str| {
            let (major, minor) = device.split_once(':').unwrap();
            let number = |text: &str| text.parse::<i64>().unwrap();
            json!({
                "blockIO": {
                    "throttleReadBpsDevice": [{"major": number(major), "minor": number(minor), "rate": 9}],
                    "weight": null,
                    "weightDevice": [{"major": number(major), "minor": number(minor), "weight": 10, "leafWeight": 0}],
                },
                "unified": {
                    "io.max": format!("{device} wiops=5\n"), "io.latency": format!("{device} target=5"), "memory.high": "1",
                },
            })
            .to_string()
        };
        let error = resources_for_guest(asked("1:3").as_bytes(), &backing).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("weightDevice") && text.contains("1:3"),
            "{text}"
        );
        // What this directory lies on, if that is a device.
        let device = std::os::unix::fs::MetadataExt::dev(&directory.path().metadata().unwrap());
        let device = format!(
            "{}:{}",
            rustix::fs::major(device),
            rustix::fs::minor(device)
        );
        if Path::new("/sys/dev/block").join(&device).exists() {
            let guest = resources_for_guest(asked(&device).as_bytes(), &backing).unwrap();
            let guest: Value = serde_json::from_slice(&guest).unwrap();
            let throttle = &guest["blockIO"]["throttleReadBpsDevice"];
            assert_eq!(*throttle, json!([{"major": 0, "minor": 0, "rate": 9}]));
            assert_eq!(
                guest["blockIO"]["weightDevice"],
                json!([{"major": 0, "minor": 0, "weight": 10, "leafWeight": 0}])
            );
            assert_eq!(
                guest["unified"],
                json!({"io.max": "0:0 wiops=5", "io.latency": "0:0 target=5", "memory.high": "1"})
            );
        }
    }

    #[test]
    fn the_host_reads_what_is_unified() {
        let read = |json: Value| resources(json.to_string().as_bytes()).unwrap();
        for (unified, fields) in [
            (
                json!({"memory.max": "64M\n", "cpu.max": "250000 50000"}),
                json!({"memory": {"limit": 64 << 20}, "cpu": {"quota": 250_000, "period": 50_000}}),
            ),
            (
                json!({"memory.max": "max", "cpu.max": "max"}),
                json!({"memory": {"limit": -1}, "cpu": {"quota": -1}}),
            ),
            (
                json!({"memory.max": "9e", "cpu.max": "7"}),
                json!({"memory": {"limit": i64::MAX}, "cpu": {"quota": 7}}),
            ),
            (
                json!({"cpuset.cpus": "4-7", "cpuset.mems": "0"}),
                json!({"cpu": {"cpus": "4-7", "mems": "0"}}),
            ),
            (
                json!({"memory.max": "many", "cpu.max": "", "cpuset.cpus": "", "memory.high": "5"}),
                json!({"cpu": {}}),
            ),
        ] {
            let found = read(json!({"unified": unified}));
            assert_eq!(found, read(fields), "{unified}");
        }
        // What it does not say is said elsewhere.
        let both = json!({
            "cpu": {"shares": 3, "quota": 1, "period": 2, "cpus": "1"}, "memory": {"limit": 1, "swap": 2},
            "unified": {"cpu.max": "5", "memory.max": "6", "cpuset.cpus": "7"},
        });
        let expected = json!({
            "cpu": {"shares": 3, "quota": 5, "period": 2, "cpus": "7"}, "memory": {"limit": 6, "swap": 2},
        });
        assert_eq!(read(both), read(expected));
    }

    #[test]
    fn the_guest_gets_no_numbers_of_the_hosts_processors() {
        let limited = json!({
            "cpu": {"cpus": "4-7", "mems": "0", "quota": 5}, "pids": {"limit": 3},
            "unified": {"cpuset.cpus": "4-7", "cpuset.mems": "0", "memory.max": "5"},
        });
        let expected =
            json!({"cpu": {"quota": 5}, "pids": {"limit": 3}, "unified": {"memory.max": "5"}});
        let text = limited.to_string();
        let update = resources_for_guest(text.as_bytes(), &Backing::default()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&update).unwrap(), expected);
        for plain in [json!({"cpu": null}), json!({})] {
            let update =
                resources_for_guest(plain.to_string().as_bytes(), &Backing::default()).unwrap();
            assert_eq!(serde_json::from_slice::<Value>(&update).unwrap(), plain);
        }
    }
}
