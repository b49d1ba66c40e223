//! From a request and its specification to what is needed to build a container: everything that can be refused is refused here, before
//! anything is made.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use oci_spec::runtime::{
    Hook, Linux, LinuxPersonalityDomain, LinuxResources, Process as ProcessSpec, Spec,
};

use crate::agent::Paths;
use crate::cgroup::devices::{self, Rule};
use crate::cgroup::limits;
use crate::child::Container;
use crate::error::{Context, Error};
use crate::oci::mapping::Mappings;
use crate::oci::mount::{self, Mount};
use crate::oci::program::Program;
use crate::oci::root::{Binds, Root};
use crate::oci::seccomp::Filter;
use crate::oci::{Join, Namespaces};
use crate::process::Streams;
use crate::sys;

/// A request to create a container.
#[derive(Debug)]
pub struct Creation {
    pub id: String,
    pub bundle: String,
    pub spec: Spec,
    pub root: Root,
    pub binds: Option<Binds>,
    pub terminal: bool,
    pub streams: Streams,
}

/// How a container is built.
#[derive(Debug)]
pub struct Plan {
    pub container: Container,
    pub program: Program,
    pub joins: Vec<Join>,
    pub resources: LinuxResources,
    pub devices: Vec<Rule>,
    pub mappings: Mappings,
    pub time_offsets: Vec<TimeOffset>,
    pub seccomp: Option<Filter>,
    pub process: ProcessSpec,
}

impl Plan {
    /// Plans a container; `cgroup` is where its control group will be.
    pub fn new(creation: &Creation, paths: &Paths, cgroup: PathBuf) -> Result<Self, Error> {
        let missing = |field: &str| Error::InvalidArgument(format!("{field} is missing"));
        let spec = &creation.spec;
        let linux = spec.linux().as_ref().ok_or_else(|| missing("linux"))?;
        let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
        let (namespaces, joins) = Namespaces::new(linux)?;
        let seccomp = linux.seccomp().as_ref().map(Filter::compile).transpose()?;
        let resources = linux.resources().clone().unwrap_or_default();
        limits::settings(&resources, String::new)?;
        let device_rules = resources.devices().as_deref().unwrap_or_default();
        let hooks = spec.hooks().clone().unwrap_or_default();
        let mappings = mappings(namespaces, linux)?;
        let has_names = namespaces.has(sys::CLONE_NEWUTS);
        let domainname = name("domainname", spec.domainname())?;
        if let (Some(name), false) = (&domainname, has_names) {
            return Err(Error::InvalidArgument(format!(
                "domainname is {name:?}: it needs a UTS namespace of the container's own"
            )));
        }
        let propagation = linux
            .rootfs_propagation()
            .as_deref()
            .filter(|name| !name.is_empty());
        let container = Container {
            id: creation.id.clone(),
            namespaces,
            root: creation.root.clone(),
            binds: creation.binds.clone(),
            scratch: paths.run.join("scratch").join(&creation.id),
            place: paths.run.join("root"),
            cgroup,
            mounts: spec
                .mounts()
                .iter()
                .flatten()
                .map(|entry| Mount::new(entry, &mappings))
                .collect::<Result<_, _>>()?,
            devices: linux.devices().clone().unwrap_or_default(),
            read_only: spec
                .root()
                .as_ref()
                .and_then(|root| root.readonly())
                .unwrap_or(false),
            propagation: propagation.map(mount::parse_propagation).transpose()?,
            // In the sandbox's namespace it would rename the sandbox, which has its host name already.
            hostname: name("hostname", spec.hostname())?.filter(|_| has_names),
            domainname,
            sysctls: sysctls(linux.sysctl().as_ref().unwrap_or(&HashMap::new()))?,
            masked: linux.masked_paths().clone().unwrap_or_default(),
            read_only_paths: linux.readonly_paths().clone().unwrap_or_default(),
            personality: linux.personality().as_ref().map(|personality| {
                match personality.domain() {
                    LinuxPersonalityDomain::PerLinux => 0,
                    LinuxPersonalityDomain::PerLinux32 => 8,
                }
            }),
            create_hooks: absolute("createContainer", hooks.create_container())?,
            start_hooks: absolute("startContainer", hooks.start_container())?,
            state: serde_json::json!({
                "ociVersion": spec.version(),
                "id": creation.id,
                "bundle": creation.bundle,
                "annotations": spec.annotations(),
            }),
        };
        Ok(Self {
            program: Program::new(process, creation.terminal, seccomp.clone())?,
            joins,
            devices: devices::rules(device_rules)?,
            resources,
            mappings,
            time_offsets: time_offsets(namespaces, linux)?,
            seccomp,
            process: process.clone(),
            container,
        })
    }
}

/// Hooks, whose programs are named by absolute paths.
fn absolute(kind: &str, hooks: &Option<Vec<Hook>>) -> Result<Vec<Hook>, Error> {
    for hook in hooks.iter().flatten() {
        if !hook.path().has_root() {
            return Err(Error::InvalidArgument(format!(
                "hooks.{kind}.path is {}: it must be absolute",
                hook.path().display()
            )));
        }
    }
    Ok(hooks.clone().unwrap_or_default())
}

/// A name of a UTS namespace, if one is given.
fn name(field: &str, name: &Option<String>) -> Result<Option<String>, Error> {
    match name.clone().filter(|name| !name.is_empty()) {
        Some(name) if name.len() > 64 => Err(Error::InvalidArgument(format!(
            "{field} is {name:?}: it may have 64 bytes"
        ))),
        name => Ok(name),
    }
}

/// Settings as paths below `/proc/sys` and values. Dots in a key separate unless it has slashes.
pub fn sysctls(asked: &HashMap<String, String>) -> Result<Vec<(String, String)>, Error> {
    asked
        .iter()
        .map(|(key, value)| {
            let path = if key.contains('/') {
                key.clone()
            } else {
                key.replace('.', "/")
            };
            let plain = |part: &str| !matches!(part, "" | "." | "..");
            if path.split('/').all(plain) {
                Ok((path, value.clone()))
            } else {
                Err(Error::InvalidArgument(format!(
                    "linux.sysctl: {key:?} is no setting"
                )))
            }
        })
        .collect()
}

/// The identities of the container's user namespace, if it has one.
fn mappings(namespaces: Namespaces, linux: &Linux) -> Result<Mappings, Error> {
    let mappings = Mappings::new(linux.uid_mappings(), linux.gid_mappings());
    let expected = match namespaces.has(sys::CLONE_NEWUSER) {
        true => (false, false),
        false => (true, true),
    };
    if mappings.are_empty() != expected {
        return Err(Error::InvalidArgument(
            "linux.uidMappings and linux.gidMappings go with a user namespace, and it with them"
                .into(),
        ));
    }
    Ok(mappings)
}

/// An offset of a clock in a time namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeOffset {
    clock: String,
    seconds: i64,
    nanoseconds: u32,
}

fn time_offsets(namespaces: Namespaces, linux: &Linux) -> Result<Vec<TimeOffset>, Error> {
    let asked = linux.time_offsets().iter().flatten();
    let offsets: Vec<_> = asked
        .map(|(clock, offset)| match clock.as_str() {
            "monotonic" | "boottime" => Ok(TimeOffset {
                clock: clock.clone(),
                seconds: offset.secs().unwrap_or(0),
                nanoseconds: offset.nanosecs().unwrap_or(0),
            }),
            _ => Err(Error::InvalidArgument(format!(
                "linux.timeOffsets: {clock:?} is neither monotonic nor boottime"
            ))),
        })
        .collect::<Result<_, _>>()?;
    if !offsets.is_empty() && !namespaces.has(sys::CLONE_NEWTIME) {
        return Err(Error::InvalidArgument(
            "linux.timeOffsets needs a time namespace".into(),
        ));
    }
    Ok(offsets)
}

/// Sets the offsets of the time namespace that the calling process's next child will be in.
pub fn write_time_offsets(offsets: &[TimeOffset]) -> Result<(), Error> {
    let lines = offsets.iter();
    let lines: String = lines
        .map(|offset| {
            format!(
                "{} {} {}\n",
                offset.clock, offset.seconds, offset.nanoseconds
            )
        })
        .collect();
    if lines.is_empty() {
        return Ok(());
    }
    fs::write("/proc/self/timens_offsets", &lines)
        .context(|| format!("setting clocks to {lines:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(linux: &str) -> Result<Plan, Error> {
        let spec = format!(
            r#"{{"ociVersion":"1.0.2","hostname":"h","process":{{"user":{{}},"cwd":"/","args":["x"]}},"linux":{linux}}}"#
        );
        plan_of(&spec)
    }

    fn plan_of(spec: &str) -> Result<Plan, Error> {
        let creation = Creation {
            id: "c".into(),
            bundle: String::new(),
            spec: crate::oci::parse_spec(spec.as_bytes())?,
            root: Root::Empty,
            binds: None,
            terminal: false,
            streams: Streams::default(),
        };
        let paths = Paths {
            run: "/run".into(),
            cgroup: "/sys/fs/cgroup".into(),
        };
        Plan::new(&creation, &paths, PathBuf::new())
    }

    #[test]
    fn users_are_mapped() {
        let plan = plan(
            r#"{"namespaces":[{"type":"mount"},{"type":"user"}],
            "uidMappings":[{"containerID":0,"hostID":1000,"size":10},{"containerID":20,"hostID":5,"size":1}],
            "gidMappings":[{"containerID":0,"hostID":1000,"size":10}]}"#,
        )
        .unwrap();
        let mapped = [0, 9, 20, 10].map(|uid| plan.mappings.user(uid));
        assert_eq!(mapped, [1000, 1009, 5, 10]);
    }

    #[test]
    fn a_name_needs_a_namespace_of_its_own() {
        let own = plan(r#"{"namespaces":[{"type":"mount"},{"type":"uts"}]}"#).unwrap();
        assert_eq!(own.container.hostname.as_deref(), Some("h"));
        let shared =
            plan(r#"{"namespaces":[{"type":"mount"},{"type":"uts","path":"/proc/9/ns/uts"}]}"#);
        assert_eq!(shared.unwrap().container.hostname, None);
        let spec = |namespaces: &str| {
            let spec = format!(
                r#"{{"ociVersion":"1.0.2","domainname":"d","process":{{"user":{{}},"cwd":"/","args":["x"]}},"linux":{{"namespaces":[{namespaces}]}}}}"#
            );
            plan_of(&spec)
        };
        let own = spec(r#"{"type":"mount"},{"type":"uts"}"#).unwrap();
        assert_eq!(own.container.domainname.as_deref(), Some("d"));
        let shared = spec(r#"{"type":"mount"}"#).unwrap_err();
        assert!(shared.to_string().contains("domainname"), "{shared}");
    }

    #[test]
    fn settings_have_dots_or_slashes() {
        let plan = plan(
            r#"{"namespaces":[{"type":"mount"}],"sysctl":{"net.ipv4.ip_forward":"1","net/ipv4/conf/eth0.1/x":"2"}}"#,
        );
        let mut sysctls = plan.unwrap().container.sysctls;
        sysctls.sort();
        let paths: Vec<_> = sysctls.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(paths, ["net/ipv4/conf/eth0.1/x", "net/ipv4/ip_forward"]);
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for bad in [
            r#"{"namespaces":[{"type":"mount"},{"type":"user"}]}"#,
            r#"{"namespaces":[{"type":"mount"}],"uidMappings":[{"containerID":0,"hostID":1,"size":1}],"gidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#,
            r#"{"namespaces":[{"type":"mount"}],"uidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#,
            r#"{"namespaces":[{"type":"mount"}],"timeOffsets":{"monotonic":{"secs":1}}}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"time"}],"timeOffsets":{"realtime":{"secs":1}}}"#,
            r#"{"namespaces":[{"type":"mount"}],"sysctl":{"a/../b":"1"}}"#,
            r#"{"namespaces":[{"type":"mount"}],"rootfsPropagation":"sideways"}"#,
        ] {
            assert!(matches!(plan(bad), Err(Error::InvalidArgument(_))), "{bad}");
        }
    }
}
