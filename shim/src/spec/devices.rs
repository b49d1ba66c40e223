//! Nodes of devices: the guest makes them, with the numbers that they have on the host.
//!
//! As a rule the numbers of a character device are fixed, and mean the same in every kernel. Those of disks are given as they come: a node
//! for one of the host's would be a disk of the machine's, and perhaps the one that the container's files are on.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::{Error, Object, object, part};

/// The major number of loop devices, which hold nothing of the host's: whoever makes a node for one fills it.
const LOOP: i64 = 7;

/// Refuses block devices of the host, unless the container may use every device: whoever asks for that gets nodes for the machine's.
pub(super) fn check(linux: &Object<'_>) -> Result<(), Error> {
    let devices: Option<Vec<LinuxDevice>> = part(linux, "devices")?.flatten();
    let of_host =
        |device: &&LinuxDevice| device.typ() == LinuxDeviceType::B && device.major() != LOOP;
    let devices = devices.unwrap_or_default();
    match devices.iter().find(of_host) {
        Some(device) if !may_use_all(linux)? => Err(Error::BlockDevice {
            path: device.path().clone(),
            major: device.major(),
            minor: device.minor(),
        }),
        _ => Ok(()),
    }
}

/// Whether the last rule that is for all devices allows them, as clients ask for privileged containers.
fn may_use_all(linux: &Object<'_>) -> Result<bool, Error> {
    let Some(resources) = linux.get("resources") else {
        return Ok(false);
    };
    let resources = object("resources", resources.get().as_bytes())?;
    let rules: Option<Vec<LinuxDeviceCgroup>> = part(&resources, "devices")?.flatten();
    let is_for_all = |rule: &&LinuxDeviceCgroup| {
        let any = |number: Option<i64>| matches!(number, None | Some(-1));
        let access = rule.access().as_deref().unwrap_or("rwm");
        matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && any(rule.major())
            && any(rule.minor())
            && "rwm".chars().all(|letter| access.contains(letter))
    };
    let rules = rules.unwrap_or_default();
    let last = rules.iter().rfind(is_for_all);
    Ok(last.is_some_and(LinuxDeviceCgroup::allow))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn checked(devices: Value, rules: Value) -> Result<(), Error> {
        let linux = json!({"devices": devices, "resources": {"devices": rules}}).to_string();
        check(&object("linux", linux.as_bytes()).unwrap())
    }

    fn disk() -> Value {
        json!({"path": "/dev/disk", "type": "b", "major": 254, "minor": 16})
    }

    #[test]
    fn disks_of_the_host_are_refused_by_name() {
        let of_guest = json!([
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            {"path": "/dev/loop0", "type": "b", "major": 7, "minor": 0},
            {"path": "/dev/fifo", "type": "p"},
        ]);
        assert!(checked(of_guest.clone(), json!(null)).is_ok());
        assert!(checked(json!(null), json!([])).is_ok());
        let mut devices = of_guest;
        devices.as_array_mut().unwrap().push(disk());
        let error = checked(devices, json!([])).unwrap_err().to_string();
        for word in ["linux.devices", "/dev/disk", "254:16", "--privileged"] {
            assert!(error.contains(word), "{error}");
        }
        let alone = json!({"devices": [disk()]}).to_string();
        assert!(check(&object("linux", alone.as_bytes()).unwrap()).is_err());
    }

    #[test]
    fn who_may_use_all_devices_gets_those_of_the_machine() {
        let (yes, no) = (
            json!({"allow": true, "access": "rwm"}),
            json!({"allow": false, "access": "rwm"}),
        );
        let its = json!({"allow": true, "type": "b", "major": 254, "minor": 16, "access": "rwm"});
        for (rules, may) in [
            (json!([yes]), true),
            (json!([{"allow": true, "type": "a"}]), true),
            (json!([{"allow": true, "major": -1, "minor": -1}]), true),
            (json!([no, yes, its]), true),
            (json!([no]), false),
            (json!([yes, no, its]), false),
            (json!([no, its]), false),
            (json!([no, {"allow": true, "access": "rw"}]), false),
            (json!([{"allow": true, "type": "b"}]), false),
            (json!([{"allow": true, "major": 254}]), false),
            (json!([{"allow": true, "minor": 16}]), false),
        ] {
            let checked = checked(json!([disk()]), rules.clone());
            assert_eq!(checked.is_ok(), may, "{rules}");
        }
    }
}
