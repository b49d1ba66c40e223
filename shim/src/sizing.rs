//! How large a machine is: what the pod's or the container's limits ask for, plus what the guest itself needs.

use std::collections::HashMap;

use nix::sys::sysinfo::sysinfo;
use nix::unistd::{SysconfVar, sysconf};
use oci_spec::runtime::LinuxResources;

use crate::config::{Config, MAX_VCPUS, MIN_MEMORY_MIB};

/// What the guest needs beside its containers whatever its size, in MiB: the kernel's image and its tables, the agent,
/// and the reserves below which the kernel starts to reclaim.
const GUEST_FIXED_MIB: u64 = 64;

/// The guest needs one part in this many of its memory for itself: 1/64 for page descriptors (64 bytes for each 4 KiB), and
/// as much again for page tables, slabs and the growth of the kernel's reserves.
const GUEST_SHARE: u64 = 32;

/// A processor's worth of CPU shares.
const SHARES_PER_CPU: u64 = 1024;

/// The period of a processor quota that comes without one, in microseconds: the kernel's.
const DEFAULT_PERIOD: u64 = 100_000;

const MIB: u64 = 1 << 20;

const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const SANDBOX_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// The size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Virtual processors, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Processors that are online.
    pub cpus: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// Why no size could be found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A limit is no number.
    #[error("annotation {key} is {value:?}, which is no number")]
    Annotation { key: &'static str, value: String },
    /// The host's size is unknown.
    #[error("cannot find out how many CPUs or how much memory the host has: {0}")]
    Host(nix::errno::Errno),
}

impl Host {
    /// Asks the kernel.
    pub fn read() -> Result<Self, Error> {
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN).map_err(Error::Host)?;
        let memory = sysinfo().map_err(Error::Host)?.ram_total();
        Ok(Self {
            cpus: cpus.and_then(|cpus| u64::try_from(cpus).ok()).unwrap_or(1),
            memory_mib: memory / MIB,
        })
    }
}

/// Limits as they were asked for: `None` where there is no limit. One may be above what the host has, as a limit promises nothing, and a
/// pod's are sums over its containers: the machine is cut down to the host, and the limit stays in the guest as it is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Limits {
    /// Quota and period, in microseconds.
    cpu: Option<(u64, u64)>,
    shares: Option<u64>,
    /// In bytes.
    memory: Option<u64>,
}

/// Finds the size of the machine for a sandbox or single container, from its annotations and its `linux.resources`.
pub fn size(
    annotations: &HashMap<String, String>,
    resources: Option<&LinuxResources>,
    config: &Config,
    host: Host,
) -> Result<Size, Error> {
    let limits = Limits::of(annotations, resources)?;
    Ok(Size {
        vcpus: vcpus(&limits, config, host),
        memory_mib: memory(&limits, config, host),
    })
}

impl Limits {
    /// The annotations that containerd's CRI plugin gives a sandbox take precedence over its own resources, which are
    /// those of the pause container.
    fn of(
        annotations: &HashMap<String, String>,
        resources: Option<&LinuxResources>,
    ) -> Result<Self, Error> {
        let number = |key: &'static str| match annotations.get(key) {
            None => Ok(None),
            // Zero and below mean that there is no limit.
            Some(value) => match value.parse::<i64>() {
                Ok(number) => Ok(u64::try_from(number).ok().filter(|&number| number > 0)),
                Err(_) => Err(Error::Annotation {
                    key,
                    value: value.clone(),
                }),
            },
        };
        let keys = [
            SANDBOX_QUOTA,
            SANDBOX_PERIOD,
            SANDBOX_SHARES,
            SANDBOX_MEMORY,
        ];
        if keys.iter().any(|&key| annotations.contains_key(key)) {
            return Ok(Self {
                cpu: quota_in(number(SANDBOX_QUOTA)?, number(SANDBOX_PERIOD)?),
                shares: number(SANDBOX_SHARES)?,
                memory: number(SANDBOX_MEMORY)?,
            });
        }
        let positive = |number: i64| u64::try_from(number).ok().filter(|&number| number > 0);
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let memory = resources.and_then(|resources| resources.memory().as_ref());
        Ok(Self {
            cpu: cpu.and_then(|cpu| {
                let period = cpu.period().filter(|&period| period > 0);
                quota_in(cpu.quota().and_then(positive), period)
            }),
            shares: cpu.and_then(|cpu| cpu.shares()),
            memory: memory.and_then(|memory| memory.limit()).and_then(positive),
        })
    }
}

/// A quota of processor time, and the period that it is for.
fn quota_in(quota: Option<u64>, period: Option<u64>) -> Option<(u64, u64)> {
    quota.map(|quota| (quota, period.unwrap_or(DEFAULT_PERIOD)))
}

fn vcpus(limits: &Limits, config: &Config, host: Host) -> u8 {
    let wanted = match (limits.cpu, limits.shares) {
        (Some((quota, period)), _) => quota.div_ceil(period),
        // Without a limit the shares are what the container may count on.
        (None, Some(shares)) => shares
            .div_ceil(SHARES_PER_CPU)
            .max(config.default_vcpus.into()),
        (None, None) => config.default_vcpus.into(),
    };
    let most = host.cpus.clamp(1, MAX_VCPUS.into());
    // At most MAX_VCPUS, which is a u8.
    u8::try_from(wanted.clamp(1, most)).unwrap_or(MAX_VCPUS)
}

fn memory(limits: &Limits, config: &Config, host: Host) -> u32 {
    let wanted = match limits.memory {
        None => config.default_memory_mib.into(),
        Some(bytes) => machine(bytes.div_ceil(MIB)),
    };
    let least = u64::from(MIN_MEMORY_MIB);
    let cut = wanted.min(host.memory_mib).max(least);
    u32::try_from(cut).unwrap_or(u32::MAX)
}

/// The memory of a machine, in MiB, in which containers can use `containers` MiB; even, for the sake of huge pages.
fn machine(containers: u64) -> u64 {
    let containers = containers.saturating_add(GUEST_FIXED_MIB);
    // The guest's share is of the whole: whole = containers + whole / GUEST_SHARE.
    let own = containers.div_ceil(GUEST_SHARE - 1);
    containers.saturating_add(own).saturating_add(1) & !1
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Spec;

    use super::*;

    const HOST: Host = Host {
        cpus: 8,
        memory_mib: 16 * 1024,
    };

    fn sized(json: &str) -> Result<Size, Error> {
        let spec: Spec = serde_json::from_str(json).unwrap();
        let linux = spec.linux().as_ref();
        size(
            spec.annotations().as_ref().unwrap_or(&HashMap::new()),
            linux.and_then(|linux| linux.resources().as_ref()),
            &Config::default(),
            HOST,
        )
    }

    fn single(resources: &str) -> Result<Size, Error> {
        sized(&format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}}}"#
        ))
    }

    fn pod(annotations: &str) -> Result<Size, Error> {
        sized(&format!(
            r#"{{"ociVersion":"1.0.2","annotations":{annotations},
                "linux":{{"resources":{{"cpu":{{"shares":2}},"memory":{{"limit":1}}}}}}}}"#
        ))
    }

    #[test]
    fn without_limits_the_configuration_decides() {
        let default = Size {
            vcpus: 1,
            memory_mib: 512,
        };
        for resources in [
            "{}",
            r#"{"cpu":{},"memory":{}}"#,
            r#"{"cpu":{"quota":-1,"period":100000,"shares":1024},"memory":{"limit":-1}}"#,
            r#"{"cpu":{"quota":0,"period":0,"shares":2},"memory":{"limit":0}}"#,
        ] {
            assert_eq!(single(resources).unwrap(), default, "{resources}");
        }
        assert_eq!(sized(r#"{"ociVersion":"1.0.2"}"#).unwrap(), default);
    }

    #[test]
    fn processors_are_the_limit_rounded_up() {
        for (quota, period, vcpus) in [
            (50_000, 100_000, 1),
            (100_000, 100_000, 1),
            (150_000, 100_000, 2),
            (800_000, 100_000, 8),
        ] {
            let size = single(&format!(
                r#"{{"cpu":{{"quota":{quota},"period":{period}}}}}"#
            ));
            assert_eq!(size.unwrap().vcpus, vcpus, "{quota}/{period}");
        }
        for cpu in [r#"{"quota":200001}"#, r#"{"quota":200001,"period":0}"#] {
            let size = single(&format!(r#"{{"cpu":{cpu}}}"#));
            assert_eq!(size.unwrap().vcpus, 3, "{cpu}");
        }
        assert_eq!(single(r#"{"cpu":{"shares":2049}}"#).unwrap().vcpus, 3);
        assert_eq!(single(r#"{"cpu":{"shares":1048576}}"#).unwrap().vcpus, 8);
    }

    #[test]
    fn memory_is_the_limit_and_what_the_guest_needs() {
        for (limit, least, most) in [
            (1, 66, 70),
            (128 << 20, 198, 200),
            (512 << 20, 594, 596),
            (8192 << 20, 8520, 8530),
        ] {
            let size = single(&format!(r#"{{"memory":{{"limit":{limit}}}}}"#)).unwrap();
            assert!(
                (least..=most).contains(&size.memory_mib),
                "{limit}: {size:?}"
            );
            // What the guest keeps for itself leaves the limit to the container.
            let own = u64::from(size.memory_mib) / GUEST_SHARE + GUEST_FIXED_MIB;
            assert!(
                u64::from(size.memory_mib) * MIB >= limit + own * MIB,
                "{limit}"
            );
        }
    }

    #[test]
    fn a_pods_limits_come_from_its_annotations() {
        let size = pod(
            r#"{"io.kubernetes.cri.sandbox-cpu-quota":"250000","io.kubernetes.cri.sandbox-cpu-period":"100000",
                "io.kubernetes.cri.sandbox-cpu-shares":"102","io.kubernetes.cri.sandbox-memory":"134217728"}"#,
        )
        .unwrap();
        assert_eq!((size.vcpus, size.memory_mib), (3, 200));
        // No limits: not those of the pause container either.
        let size = pod(
            r#"{"io.kubernetes.cri.sandbox-cpu-quota":"0","io.kubernetes.cri.sandbox-memory":"0"}"#,
        );
        assert_eq!(size.unwrap().memory_mib, 512);
        let size = pod(r#"{"io.kubernetes.cri.sandbox-cpu-shares":"4096"}"#);
        assert_eq!(size.unwrap().vcpus, 4);
        let size = pod(r#"{"io.kubernetes.cri.sandbox-cpu-quota":"200001"}"#);
        assert_eq!(size.unwrap().vcpus, 3);
    }

    #[test]
    fn more_may_be_allowed_than_the_host_has() {
        let whole = Size {
            vcpus: 8,
            memory_mib: 16 * 1024,
        };
        let size = pod(
            r#"{"io.kubernetes.cri.sandbox-cpu-quota":"6400000","io.kubernetes.cri.sandbox-cpu-period":"100000",
                "io.kubernetes.cri.sandbox-memory":"1099511627776"}"#,
        );
        assert_eq!(size.unwrap(), whole);
        // The last needs more than the host has with what the guest needs for itself only.
        for limit in [i64::MAX, 1 << 40, 16 << 30] {
            let size = single(&format!(
                r#"{{"cpu":{{"quota":{},"period":1}},"memory":{{"limit":{limit}}}}}"#,
                i64::MAX
            ));
            assert_eq!(size.unwrap(), whole, "{limit}");
        }
        let large = Host { cpus: 64, ..HOST };
        let limits = Limits {
            cpu: Some((33, 1)),
            ..Limits::default()
        };
        assert_eq!(vcpus(&limits, &Config::default(), large), MAX_VCPUS);
    }

    #[test]
    fn what_is_no_number_is_told() {
        let error = pod(r#"{"io.kubernetes.cri.sandbox-memory":"512Mi"}"#).unwrap_err();
        assert_eq!(
            error.to_string(),
            "annotation io.kubernetes.cri.sandbox-memory is \"512Mi\", which is no number"
        );
    }

    #[test]
    fn this_host_has_a_size() {
        let host = Host::read().unwrap();
        assert!(host.cpus >= 1 && host.memory_mib > 64, "{host:?}");
    }
}
