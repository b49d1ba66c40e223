//! `linux.resources` as the files of a control group, version 2.

use std::io;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice, LinuxWeightDevice,
};

use crate::error::{Context, Error};
use crate::protocol::{ROOT_DISK, SCRATCH_DISK};

/// How the names of the files for input and output begin.
const DISKS: &str = "io.";

/// The file of weights, by which the scheduler BFQ shares a disk.
const WEIGHT: &str = "io.bfq.weight";

/// What stands in that file for the disks without a weight of their own.
pub const DEFAULT: &str = "default";

/// A value to write to a file of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub file: String,
    pub value: String,
}

impl Setting {
    /// Whether it is for input and output, and may name a disk.
    pub fn is_of_disks(&self) -> bool {
        self.file.starts_with(DISKS)
    }

    /// Whether it is a limit of pages of one size, whose file there is only if the machine has such pages.
    pub fn is_of_pages(&self) -> bool {
        let size = self.file.strip_prefix("hugetlb.");
        let size = size.and_then(|rest| rest.strip_suffix(".max"));
        size.is_some_and(|size| is_page_size(size.strip_suffix(".rsvd").unwrap_or(size)))
    }

    /// Whether it is a weight, which means nothing to a disk whose scheduler does not share by weights.
    pub fn is_weight(&self) -> bool {
        self.file == WEIGHT
    }

    /// The disks that must be shared by weights for it to mean something.
    pub fn weighed(&self) -> Vec<u32> {
        match self.disk() {
            _ if !self.is_weight() => Vec::new(),
            Some((disk, _)) => vec![disk],
            None => vec![SCRATCH_DISK, ROOT_DISK],
        }
    }

    /// The disk at the beginning of its value, as the host calls it, and what follows.
    pub fn disk(&self) -> Option<(u32, &str)> {
        let (disk, rest) = self.value.strip_prefix("0:")?.split_once(' ')?;
        Some((disk.parse().ok()?, rest))
    }
}

/// Whether limits may be those of disks.
pub fn have_disks(resources: &LinuxResources) -> bool {
    let mut unified = resources.unified().iter().flatten();
    resources.block_io().is_some() || unified.any(|(file, _)| file.starts_with(DISKS))
}

/// What to write to a file of disks with this content to have again what it says of one of them, or ([`DEFAULT`]) of all others.
pub fn in_force(file: &str, content: &str, number: &str) -> Option<String> {
    let mut lines = content.lines();
    let unlimited = match lines.find(|line| line.split(' ').next() == Some(number)) {
        Some(line) => return Some(line.to_owned()),
        // A disk without a limit has no line.
        None if file == WEIGHT => DEFAULT,
        None if file == "io.max" => "rbps=max wbps=max riops=max wiops=max",
        None if file == "io.latency" => "target=0",
        None => return None,
    };
    Some(format!("{number} {unlimited}"))
}

fn setting(file: &str, value: impl ToString) -> Setting {
    Setting {
        file: file.into(),
        value: value.to_string(),
    }
}

fn refused(field: &str) -> Error {
    Error::InvalidArgument(format!(
        "linux.resources.{field} cannot be set: the guest's control groups, of version 2, do not have it"
    ))
}

fn refuse(field: &str, present: bool) -> Result<(), Error> {
    if present { Err(refused(field)) } else { Ok(()) }
}

/// The settings for limits, in the order in which they are to be written. `quota` is that of processor time that is in force.
pub fn settings(
    resources: &LinuxResources,
    quota: impl FnOnce() -> String,
) -> Result<Vec<Setting>, Error> {
    let mut settings = Vec::new();
    if let Some(memory) = resources.memory() {
        self::memory(memory, &mut settings)?;
    }
    if let Some(cpu) = resources.cpu() {
        self::cpu(cpu, quota, &mut settings)?;
    }
    // As everywhere, 0 says nothing, and a negative number that there is no limit.
    match resources.pids().as_ref().map(|pids| pids.limit()) {
        None | Some(0) => {}
        Some(limit) => settings.push(setting("pids.max", or_max(limit))),
    }
    if let Some(block) = resources.block_io() {
        self::block(block, &mut settings)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if !is_page_size(size) {
            return Err(Error::InvalidArgument(format!(
                "linux.resources.hugepageLimits: the page size {size:?} is not one like 2MB"
            )));
        }
        // What is in use, and what was promised to a mapping.
        for kind in ["", ".rsvd"] {
            let file = format!("hugetlb.{size}{kind}.max");
            settings.push(setting(&file, or_max(limit.limit())));
        }
    }
    if let Some(network) = resources.network() {
        refuse(
            "network.classID",
            network.class_id().is_some_and(|id| id != 0),
        )?;
        let priorities = network.priorities().as_ref();
        refuse(
            "network.priorities",
            priorities.is_some_and(|list| !list.is_empty()),
        )?;
    }
    let rdma = resources.rdma().as_ref();
    refuse("rdma", rdma.is_some_and(|devices| !devices.is_empty()))?;
    let unified = resources.unified().iter().flatten();
    let mut unified: Vec<_> = unified.collect();
    unified.sort_unstable();
    for (file, value) in unified {
        if file.contains('/') || !file.contains('.') {
            return Err(Error::InvalidArgument(format!(
                "linux.resources.unified: {file:?} is no file of a control group"
            )));
        }
        if file == "io.weight" {
            return Err(Error::InvalidArgument(format!(
                "linux.resources.unified: the guest's kernel has no {file}: it shares disks by {WEIGHT} (1 to 1000, 100 by default)"
            )));
        }
        settings.extend(value.lines().map(|line| setting(file, line)));
    }
    Ok(settings)
}

/// Whether a text is a size as the kernel's files are named after: 64KB, 2MB, 1GB.
fn is_page_size(text: &str) -> bool {
    let digits = ["KB", "MB", "GB"].iter();
    let mut digits = digits.filter_map(|unit| text.strip_suffix(unit));
    digits
        .next()
        .and_then(|digits| digits.parse().ok())
        .is_some_and(u32::is_power_of_two)
}

/// With `memory.checkBeforeUpdate`, refuses a limit below what is in use.
pub fn check_usage(
    resources: &LinuxResources,
    usage: impl FnOnce() -> io::Result<Option<u64>>,
) -> Result<(), Error> {
    let Some(memory) = resources.memory() else {
        return Ok(());
    };
    let limit = memory.limit().and_then(|limit| u64::try_from(limit).ok());
    if let (Some(true), Some(limit)) = (memory.check_before_update(), limit) {
        let usage = usage()
            .context(|| "reading the memory in use".into())?
            .unwrap_or(0);
        if usage > limit {
            return Err(Error::FailedPrecondition(format!(
                "linux.resources.memory.limit: {usage} bytes are in use, more than {limit}"
            )));
        }
    }
    Ok(())
}

fn or_max(limit: i64) -> String {
    if limit < 0 {
        "max".into()
    } else {
        limit.to_string()
    }
}

fn memory(memory: &LinuxMemory, settings: &mut Vec<Setting>) -> Result<(), Error> {
    let set = |limit: Option<i64>| limit.is_some_and(|limit| limit > 0);
    refuse("memory.kernel", set(memory.kernel()))?;
    refuse("memory.kernelTCP", set(memory.kernel_tcp()))?;
    refuse("memory.swappiness", memory.swappiness().is_some())?;
    refuse(
        "memory.disableOOMKiller",
        memory.disable_oom_killer() == Some(true),
    )?;
    refuse(
        "memory.useHierarchy=false",
        memory.use_hierarchy() == Some(false),
    )?;
    // 0 has always meant that nothing is said.
    let limit = memory.limit().filter(|&limit| limit != 0);
    if let Some(reservation) = memory.reservation().filter(|&value| value != 0) {
        settings.push(setting("memory.low", or_max(reservation)));
    }
    if let Some(limit) = limit {
        settings.push(setting("memory.max", or_max(limit)));
    }
    // Memory without a limit has swap without one, if nothing is said of it.
    let swap = memory.swap().filter(|&swap| swap != 0);
    if let Some(swap) = swap.or(limit.filter(|&limit| limit < 0)) {
        // The specification's limit is for memory and swap together.
        let value = match limit {
            _ if swap < 0 => "max".to_owned(),
            Some(limit) if limit >= 0 && swap >= limit => (swap - limit).to_string(),
            Some(limit) => {
                return Err(Error::InvalidArgument(format!(
                    "linux.resources.memory.swap is {swap}: it includes the memory limit, which is {limit}"
                )));
            }
            None => {
                return Err(Error::InvalidArgument(
                    "linux.resources.memory.swap needs memory.limit, which it includes".into(),
                ));
            }
        };
        settings.push(setting("memory.swap.max", value));
    }
    Ok(())
}

fn cpu(
    cpu: &LinuxCpu,
    in_force: impl FnOnce() -> String,
    settings: &mut Vec<Setting>,
) -> Result<(), Error> {
    // The host's numbers, which the host takes care of.
    for (field, list) in [("cpu.cpus", cpu.cpus()), ("cpu.mems", cpu.mems())] {
        let named = list.as_deref().is_some_and(|list| !list.is_empty());
        refuse(field, named)?;
    }
    refuse(
        "cpu.realtimeRuntime",
        cpu.realtime_runtime().is_some_and(|runtime| runtime != 0),
    )?;
    refuse(
        "cpu.realtimePeriod",
        cpu.realtime_period().is_some_and(|period| period != 0),
    )?;
    if let Some(idle) = cpu.idle() {
        settings.push(setting("cpu.idle", idle));
    }
    if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
        settings.push(setting("cpu.weight", weight(shares)));
    }
    let quota = cpu.quota().filter(|&quota| quota != 0);
    let period = cpu.period().filter(|&period| period != 0);
    // A burst may not exceed the quota: it must not stand in the way of a smaller one.
    if cpu.burst().is_some() && (quota, period) != (None, None) {
        settings.push(setting("cpu.max.burst", 0));
    }
    match (quota.map(or_max), period) {
        (None, None) => {}
        (Some(quota), None) => settings.push(setting("cpu.max", quota)),
        (quota, Some(period)) => {
            let quota = quota.unwrap_or_else(in_force);
            settings.push(setting("cpu.max", format!("{quota} {period}")));
        }
    }
    if let Some(burst) = cpu.burst() {
        settings.push(setting("cpu.max.burst", burst));
    }
    Ok(())
}

/// Shares (2 to 262144, 1024 by default) as a weight (1 to 10000, 100 by default), by the mapping of runc before 1.3.2 and crun before 1.23.
/// Theirs since is a curve on which the two defaults meet. Here a container competes with those of its pod only, so what counts is how their
/// weights compare, and this one keeps that as it is among their shares.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

fn block(block: &LinuxBlockIo, settings: &mut Vec<Setting>) -> Result<(), Error> {
    refuse(
        "blockIO.leafWeight",
        block.leaf_weight().is_some_and(|weight| weight != 0),
    )?;
    if let Some(weight) = block.weight().filter(|&weight| weight != 0) {
        settings.push(setting(WEIGHT, disk_weight("weight", weight)?));
    }
    for device in block.weight_device().iter().flatten() {
        settings.extend(device_weight(device)?);
    }
    for (name, devices) in [
        ("rbps", block.throttle_read_bps_device()),
        ("wbps", block.throttle_write_bps_device()),
        ("riops", block.throttle_read_iops_device()),
        ("wiops", block.throttle_write_iops_device()),
    ] {
        for device in devices.iter().flatten() {
            settings.push(throttle(name, device));
        }
    }
    Ok(())
}

/// Checks a weight of disks. The specification's are BFQ's, but that BFQ knows smaller ones.
fn disk_weight(field: &str, weight: u16) -> Result<u16, Error> {
    match weight {
        10..=1000 => Ok(weight),
        _ => Err(Error::InvalidArgument(format!(
            "linux.resources.blockIO.{field} is {weight}: a weight is from 10 to 1000"
        ))),
    }
}

fn device_weight(device: &LinuxWeightDevice) -> Result<Option<Setting>, Error> {
    refuse(
        "blockIO.weightDevice.leafWeight",
        device.leaf_weight().is_some_and(|weight| weight != 0),
    )?;
    let (major, minor) = (device.major(), device.minor());
    let Some(weight) = device.weight().filter(|&weight| weight != 0) else {
        return Ok(None);
    };
    let weight = disk_weight("weightDevice.weight", weight)?;
    Ok(Some(setting(WEIGHT, format!("{major}:{minor} {weight}"))))
}

fn throttle(name: &str, device: &LinuxThrottleDevice) -> Setting {
    let (major, minor) = (device.major(), device.minor());
    let rate = match device.rate() {
        0 => "max".to_owned(),
        rate => rate.to_string(),
    };
    setting("io.max", format!("{major}:{minor} {name}={rate}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(json: &str) -> Result<Vec<(String, String)>, Error> {
        let settings = settings(&serde_json::from_str(json).unwrap(), || "70".into())?;
        Ok(settings.into_iter().map(|s| (s.file, s.value)).collect())
    }

    fn is(json: &str, expected: &[(&str, &str)]) {
        let settled = settled(json).unwrap();
        let settled: Vec<_> = settled
            .iter()
            .map(|(f, v)| (f.as_str(), v.as_str()))
            .collect();
        assert_eq!(settled, expected, "{json}");
    }

    #[test]
    fn limits_become_files() {
        is(
            r#"{"memory":{"limit":100,"swap":150,"reservation":50}}"#,
            &[
                ("memory.low", "50"),
                ("memory.max", "100"),
                ("memory.swap.max", "50"),
            ],
        );
        is(
            r#"{"memory":{"limit":-1,"swap":-1,"disableOOMKiller":false}}"#,
            &[("memory.max", "max"), ("memory.swap.max", "max")],
        );
        is(
            r#"{"cpu":{"shares":1024,"quota":50000,"period":100000,"burst":10,"idle":0,"cpus":"","mems":""}}"#,
            &[
                ("cpu.idle", "0"),
                ("cpu.weight", "39"),
                ("cpu.max.burst", "0"),
                ("cpu.max", "50000 100000"),
                ("cpu.max.burst", "10"),
            ],
        );
        is(
            r#"{"memory":{"limit":-1}}"#,
            &[("memory.max", "max"), ("memory.swap.max", "max")],
        );
        is(r#"{"cpu":{"burst":7}}"#, &[("cpu.max.burst", "7")]);
        is(r#"{"cpu":{"quota":-1}}"#, &[("cpu.max", "max")]);
        is(r#"{"cpu":{"period":80}}"#, &[("cpu.max", "70 80")]);
        is(r#"{"cpu":{"shares":2}}"#, &[("cpu.weight", "1")]);
        is(r#"{"cpu":{"shares":262144}}"#, &[("cpu.weight", "10000")]);
        is(r#"{"pids":{"limit":7}}"#, &[("pids.max", "7")]);
        is(r#"{"pids":{"limit":-1}}"#, &[("pids.max", "max")]);
        is(r#"{"pids":{"limit":0}}"#, &[]);
        is(
            r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#,
            &[
                ("hugetlb.2MB.max", "4194304"),
                ("hugetlb.2MB.rsvd.max", "4194304"),
            ],
        );
        is(
            r#"{"blockIO":{"throttleReadBpsDevice":[{"major":253,"minor":0,"rate":9}]}}"#,
            &[("io.max", "253:0 rbps=9")],
        );
        is(
            r#"{"blockIO":{"weight":10,"weightDevice":[{"major":0,"minor":1,"weight":1000},{"major":0,"minor":0}]}}"#,
            &[("io.bfq.weight", "10"), ("io.bfq.weight", "0:1 1000")],
        );
        is(r#"{"blockIO":{"weight":0,"leafWeight":0}}"#, &[]);
        is(
            r#"{"unified":{"memory.high":"5","io.max":"1:2 rbps=3\n1:3 rbps=4","io.latency":"0:1 target=9"}}"#,
            &[
                ("io.latency", "0:1 target=9"),
                ("io.max", "1:2 rbps=3"),
                ("io.max", "1:3 rbps=4"),
                ("memory.high", "5"),
            ],
        );
    }

    #[test]
    fn a_setting_may_name_a_disk() {
        let disk = |file, value| setting(file, value).disk().map(|(n, s)| (n, s.to_owned()));
        assert_eq!(disk("io.max", "0:1 rbps=9"), Some((1, "rbps=9".into())));
        assert_eq!(disk("io.weight", "default 5"), None);
        assert_eq!(disk("io.max", "8:0 rbps=9"), None);
        assert!(setting("io.max", "").is_of_disks() && !setting("pids.max", "").is_of_disks());
        assert!(setting("io.bfq.weight", "").is_weight() && !setting("io.max", "").is_weight());
    }

    #[test]
    fn limits_of_pages_have_the_files_of_a_size() {
        for (file, is_one) in [
            ("hugetlb.2MB.max", true),
            ("hugetlb.1GB.rsvd.max", true),
            ("hugetlb.2M.max", false),
            ("hugetlb.3MB.max", false),
            ("hugetlb.2MB.limit", false),
            ("hugetlb.2MB.rsvd.rsvd.max", false),
            ("hugetlb.max", false),
            ("memory.max", false),
        ] {
            assert_eq!(setting(file, 1).is_of_pages(), is_one, "{file}");
        }
    }

    #[test]
    fn limits_of_disks_are_known_as_such() {
        let have = |json: &str| have_disks(&serde_json::from_str(json).unwrap());
        assert!(have(r#"{"blockIO":{"weight":10}}"#));
        assert!(have(
            r#"{"unified":{"memory.high":"5","io.max":"1:2 rbps=3"}}"#
        ));
        assert!(!have(
            r#"{"memory":{"limit":5},"unified":{"memory.high":"5"}}"#
        ));
    }

    #[test]
    fn what_is_said_of_a_disk_can_be_said_again() {
        let max = "254:0 rbps=9 wbps=max riops=max wiops=max\n";
        let of = |file, content, number| in_force(file, content, number).unwrap();
        assert_eq!(of("io.max", max, "254:0"), max.trim_end());
        assert_eq!(
            of("io.max", max, "254:1"),
            "254:1 rbps=max wbps=max riops=max wiops=max"
        );
        let weights = "default 100\n254:16 700\n";
        assert_eq!(of("io.bfq.weight", weights, "default"), "default 100");
        assert_eq!(of("io.bfq.weight", weights, "254:16"), "254:16 700");
        assert_eq!(of("io.bfq.weight", weights, "254:1"), "254:1 default");
        let latency = "254:0 target=9\n";
        assert_eq!(of("io.latency", latency, "254:0"), "254:0 target=9");
        assert_eq!(of("io.latency", latency, "254:1"), "254:1 target=0");
        assert_eq!(in_force("io.prio.class", "no-change\n", "254:0"), None);
    }

    #[test]
    fn what_cannot_be_set_is_named() {
        for (json, named) in [
            (r#"{"memory":{"swap":150}}"#, "memory.swap"),
            (r#"{"memory":{"limit":200,"swap":150}}"#, "memory.swap"),
            (r#"{"memory":{"kernel":1}}"#, "memory.kernel"),
            (r#"{"memory":{"swappiness":0}}"#, "memory.swappiness"),
            (
                r#"{"memory":{"disableOOMKiller":true}}"#,
                "memory.disableOOMKiller",
            ),
            (r#"{"cpu":{"realtimeRuntime":1}}"#, "cpu.realtimeRuntime"),
            (r#"{"blockIO":{"weight":9}}"#, "blockIO.weight is 9"),
            (r#"{"blockIO":{"weight":1001}}"#, "blockIO.weight is 1001"),
            (
                r#"{"blockIO":{"weightDevice":[{"major":0,"minor":0,"weight":1001}]}}"#,
                "blockIO.weightDevice.weight is 1001",
            ),
            (
                r#"{"blockIO":{"weightDevice":[{"major":0,"minor":0,"leafWeight":10}]}}"#,
                "blockIO.weightDevice.leafWeight",
            ),
            (r#"{"blockIO":{"leafWeight":10}}"#, "blockIO.leafWeight"),
            (r#"{"unified":{"io.weight":"200"}}"#, "io.bfq.weight"),
            (r#"{"network":{"classID":1}}"#, "network.classID"),
            (r#"{"cpu":{"cpus":"0-1"}}"#, "cpu.cpus"),
            (r#"{"rdma":{"mlx5":{"hcaHandles":1}}}"#, "rdma"),
            (r#"{"unified":{"../x.y":"1"}}"#, "unified"),
            (
                r#"{"hugepageLimits":[{"pageSize":"2/MB","limit":1}]}"#,
                "hugepageLimits",
            ),
            (
                r#"{"hugepageLimits":[{"pageSize":"2M","limit":1}]}"#,
                "hugepageLimits",
            ),
        ] {
            let error = settled(json).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn a_limit_below_the_usage_is_refused_if_asked() {
        let checked =
            |json: &str| check_usage(&serde_json::from_str(json).unwrap(), || Ok(Some(1000)));
        assert!(checked(r#"{"memory":{"limit":10}}"#).is_ok());
        assert!(checked(r#"{"memory":{"limit":1000,"checkBeforeUpdate":true}}"#).is_ok());
        assert!(checked(r#"{"memory":{"limit":999,"checkBeforeUpdate":true}}"#).is_err());
    }
}
