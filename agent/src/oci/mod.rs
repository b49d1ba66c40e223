//! The OCI runtime specification: read, checked, and brought into the terms of the kernel before a process is made.
//!
//! A field is either carried out here, or it is the host's business (listed at [`check_spec`]), or the request is refused with an error that
//! names it. Nothing is ignored silently, a field that the specification does not know included. Names of capabilities that nobody knows are
//! ignored with a warning, as the specification has it.

pub mod capability;
pub mod mapping;
pub mod mount;
pub mod program;
pub mod root;
pub mod seccomp;

use std::collections::BTreeSet;
use std::path::Path;

use oci_spec::runtime::{Capability, Linux, LinuxNamespaceType, LinuxResources, Process, Spec};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::Error;
use crate::protocol::parse_namespace_of;
use crate::sys;

/// Reads a container's `config.json`.
pub fn parse_spec(json: &[u8]) -> Result<Spec, Error> {
    let spec: Spec = parse("config.json", json)?;
    check_spec(&spec)?;
    Ok(spec)
}

/// Reads the process of an exec.
pub fn parse_process(json: &[u8]) -> Result<Process, Error> {
    let process: Process = parse("process", json)?;
    check_process(&process)?;
    Ok(process)
}

/// Reads the resources of an update.
pub fn parse_resources(json: &[u8]) -> Result<LinuxResources, Error> {
    parse("resources", json)
}

fn parse<T: DeserializeOwned>(what: &str, json: &[u8]) -> Result<T, Error> {
    let mut unknown = None;
    let parsed = read(json, &mut unknown).or_else(|error| {
        let mut document = serde_json::from_slice(json)?;
        let ignored = adapt(&mut document).ok_or(error)?;
        if !ignored.is_empty() {
            let names = Vec::from_iter(ignored).join(", ");
            eprintln!(
                "{what}: process.capabilities: ignored what is none to this version: {names}"
            );
        }
        read(document.to_string().as_bytes(), &mut unknown)
    });
    let parsed = parsed
        .map_err(|error| Error::InvalidArgument(format!("{what} does not parse: {error}")))?;
    match unknown {
        None => Ok(parsed),
        Some(path) => Err(refused(&format!("{what}: {path}"))),
    }
}

/// Parses a document, and notes the first of its fields that is not known.
fn read<T: DeserializeOwned>(
    json: &[u8],
    unknown: &mut Option<String>,
) -> Result<T, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let parsed = serde_ignored::deserialize(&mut deserializer, |path| {
        // An optional field shows as a step of its own, written as a question mark.
        unknown.get_or_insert_with(|| path.to_string().replace(".?", ""));
    })?;
    deserializer.end()?;
    Ok(parsed)
}

/// Flags of a scheduler as the specification names them, and as the library that reads them does.
const RENAMED: [(&str, &str); 2] = [
    ("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"),
    ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN"),
];

/// Brings a document, which is a container's or a process's, into the words that the library knows, and returns the names of capabilities
/// that it does not; none if there is nothing to do.
fn adapt(document: &mut Value) -> Option<BTreeSet<String>> {
    let process = match document.get("process") {
        Some(_) => &mut document["process"],
        None => document,
    };
    let mut renamed = false;
    if let Some(Value::Array(flags)) = process.pointer_mut("/scheduler/flags") {
        for flag in flags {
            if let Some((_, name)) = RENAMED.iter().find(|(name, _)| flag == name) {
                *flag = (*name).into();
                renamed = true;
            }
        }
    }
    let mut ignored = BTreeSet::new();
    if let Some(Value::Object(sets)) = process.get_mut("capabilities") {
        for names in sets.values_mut().filter_map(Value::as_array_mut) {
            names.retain(|name| match name {
                Value::String(text) if Capability::deserialize(name).is_err() => {
                    ignored.insert(text.clone());
                    false
                }
                _ => true,
            });
        }
    }
    (renamed || !ignored.is_empty()).then_some(ignored)
}

/// The error for a field that asks for what this runtime does not do.
fn refused(field: &str) -> Error {
    Error::InvalidArgument(format!(
        "{field} is not supported in a microVM: remove it from the container's specification"
    ))
}

fn refuse(field: &str, present: bool) -> Result<(), Error> {
    if present { Err(refused(field)) } else { Ok(()) }
}

/// Refuses what cannot be carried out.
///
/// These fields belong to the host and pass unread: `root.path`, `annotations`, `linux.cgroupsPath`, and of `hooks`
/// those that run in the host's namespaces, which is every kind but `createContainer` and `startContainer`.
fn check_spec(spec: &Spec) -> Result<(), Error> {
    if spec.version().split('.').next() != Some("1") {
        return Err(Error::InvalidArgument(format!(
            "ociVersion is {:?}: expected a version 1",
            spec.version()
        )));
    }
    refuse("solaris", spec.solaris().is_some())?;
    refuse("windows", spec.windows().is_some())?;
    refuse("vm", spec.vm().is_some())?;
    refuse("zos", spec.zos().is_some())?;
    refuse("uidMappings", spec.uid_mappings().is_some())?;
    refuse("gidMappings", spec.gid_mappings().is_some())?;
    match spec.process() {
        Some(process) => check_process(process)?,
        None => return Err(Error::InvalidArgument("process is missing".into())),
    }
    match spec.linux() {
        Some(linux) => check_linux(linux),
        None => Err(Error::InvalidArgument("linux is missing".into())),
    }
}

fn check_linux(linux: &Linux) -> Result<(), Error> {
    refuse("linux.netDevices", linux.net_devices().is_some())?;
    refuse("linux.intelRdt", linux.intel_rdt().is_some())?;
    refuse("linux.memoryPolicy", linux.memory_policy().is_some())?;
    refuse("linux.mountLabel", is_set(linux.mount_label()))?;
    if let Some(personality) = linux.personality() {
        let flags = personality.flags().as_ref();
        refuse(
            "linux.personality.flags",
            flags.is_some_and(|f| !f.is_empty()),
        )?;
    }
    Ok(())
}

fn check_process(process: &Process) -> Result<(), Error> {
    refuse("process.commandLine", process.command_line().is_some())?;
    refuse(
        "process.execCPUAffinity",
        process.exec_cpu_affinity().is_some(),
    )?;
    refuse("process.selinuxLabel", is_set(process.selinux_label()))?;
    refuse("process.user.username", is_set(process.user().username()))?;
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    refuse(
        "process.apparmorProfile",
        !matches!(profile, "" | "unconfined"),
    )
}

fn is_set(text: &Option<String>) -> bool {
    text.as_deref().is_some_and(|text| !text.is_empty())
}

/// The namespaces of a container, as `CLONE_NEW*`: those in `new` are its own, those in `joined` another container's, all others are
/// the sandbox's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Namespaces {
    pub new: i32,
    pub joined: i32,
}

/// A namespace that a container shares with another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// `CLONE_NEW*`.
    pub kind: i32,
    /// Whose it is.
    pub container: String,
}

impl Namespaces {
    /// Reads `linux.namespaces`. An entry without a path is a namespace of the container's own. A network, IPC, UTS, PID or cgroup
    /// namespace that has a path (a file of the host, which stands for the pod's) or no entry is the sandbox's, unless the path names another
    /// container's. A user namespace is always the container's own: the sandbox has none, and containers of a pod that share one on the
    /// host have equal mappings here.
    pub fn new(linux: &Linux) -> Result<(Self, Vec<Join>), Error> {
        let mut new = 0;
        let mut joined = 0;
        let mut joins = Vec::new();
        for namespace in linux.namespaces().iter().flatten() {
            let (name, flag) = match namespace.typ() {
                LinuxNamespaceType::Mount => ("mount", sys::CLONE_NEWNS),
                LinuxNamespaceType::Cgroup => ("cgroup", sys::CLONE_NEWCGROUP),
                LinuxNamespaceType::Uts => ("uts", sys::CLONE_NEWUTS),
                LinuxNamespaceType::Ipc => ("ipc", sys::CLONE_NEWIPC),
                LinuxNamespaceType::User => ("user", sys::CLONE_NEWUSER),
                LinuxNamespaceType::Pid => ("pid", sys::CLONE_NEWPID),
                LinuxNamespaceType::Network => ("network", sys::CLONE_NEWNET),
                LinuxNamespaceType::Time => ("time", sys::CLONE_NEWTIME),
            };
            if (new | joined) & flag != 0 {
                return Err(Error::InvalidArgument(format!(
                    "linux.namespaces has two entries of type {name}"
                )));
            }
            let path = namespace.path().as_deref();
            let path = path.filter(|path| !path.as_os_str().is_empty());
            if path.is_none() || flag == sys::CLONE_NEWUSER {
                new |= flag;
            } else if flag & (sys::CLONE_NEWNS | sys::CLONE_NEWTIME) != 0 {
                return Err(refused(&format!(
                    "linux.namespaces: the path of a {name} namespace"
                )));
            } else if let Some(container) = path.and_then(Path::to_str).and_then(parse_namespace_of)
            {
                joined |= flag;
                joins.push(Join {
                    kind: flag,
                    container: container.to_owned(),
                });
            }
        }
        if new & sys::CLONE_NEWNS == 0 {
            return Err(Error::InvalidArgument(
                "linux.namespaces has no entry of type mount: a container needs a mount namespace"
                    .into(),
            ));
        }
        if joined != 0 && new & sys::CLONE_NEWUSER != 0 {
            return Err(refused(
                "linux.namespaces: a namespace of another container together with a user namespace",
            ));
        }
        Ok((Self { new, joined }, joins))
    }

    /// Those that are not the sandbox's.
    pub fn entered(self) -> i32 {
        self.new | self.joined
    }

    /// Whether the container has a namespace of its own of this kind.
    pub fn has(self, flag: i32) -> bool {
        self.new & flag != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(json: &str) -> String {
        parse_spec(json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn an_unknown_field_is_named() {
        let json = r#"{"ociVersion":"1.0.2","process":{"user":{},"cwd":"/","shiny":1},"linux":{}}"#;
        assert!(error(json).contains("process.shiny"), "{}", error(json));
    }

    #[test]
    fn schedulers_flags_have_the_names_of_the_specification() {
        let flags = [
            "SCHED_FLAG_RESET_ON_FORK",
            "SCHED_FLAG_DL_OVERRUN",
            "SCHED_FLAG_RECLAIM",
        ];
        let json = serde_json::json!({"user": {}, "cwd": "/", "args": ["x"], "scheduler": {"policy": "SCHED_OTHER", "flags": flags}});
        let process = parse_process(json.to_string().as_bytes()).unwrap();
        let program = program::Program::new(&process, false, None).unwrap();
        assert_eq!(program.scheduler.unwrap().flags, 0x01 | 0x04 | 0x02);
    }

    #[test]
    fn capabilities_that_nobody_knows_are_left_out_and_named() {
        let names = serde_json::json!(["CAP_KILL", "CAP_B", "CAP_A"]);
        let sets = serde_json::json!({"bounding": names, "ambient": ["CAP_A"], "permitted": null, "effective": ["CAP_KILL"]});
        let mut process = serde_json::json!({"user": {}, "cwd": "/", "capabilities": sets});
        let parsed = parse_process(process.to_string().as_bytes()).unwrap();
        let sets = parsed.capabilities().as_ref().map(capability::Sets::from);
        let kill = rustix::thread::CapabilitySet::KILL;
        let expected = capability::Sets {
            bounding: kill,
            effective: kill,
            ..Default::default()
        };
        assert_eq!(sets, Some(expected));
        let ignored = adapt(&mut process).unwrap();
        assert_eq!(Vec::from_iter(ignored), ["CAP_A", "CAP_B"]);
        assert_eq!(adapt(&mut process), None);
        process["capabilities"]["bounding"] = serde_json::json!([1]);
        assert!(parse_process(process.to_string().as_bytes()).is_err());
    }

    #[test]
    fn an_unsupported_field_is_named() {
        let json = r#"{"ociVersion":"1.0.2","process":{"user":{},"cwd":"/","selinuxLabel":"x"},"linux":{}}"#;
        assert!(error(json).contains("process.selinuxLabel"));
        let json = r#"{"ociVersion":"1.0.2","process":{"user":{},"cwd":"/"},"linux":{"memoryPolicy":{"mode":"MPOL_BIND"}}}"#;
        assert!(error(json).contains("linux.memoryPolicy"));
    }

    #[test]
    fn namespaces_are_new_or_the_sandboxes() {
        let linux: Linux = serde_json::from_str(
            r#"{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"network","path":"/proc/1/ns/net"}]}"#,
        )
        .unwrap();
        let (namespaces, joins) = Namespaces::new(&linux).unwrap();
        assert_eq!(namespaces.new, sys::CLONE_NEWNS | sys::CLONE_NEWPID);
        assert!(namespaces.joined == 0 && joins.is_empty());
        let linux: Linux = serde_json::from_str(
            r#"{"namespaces":[{"type":"mount"},{"type":"pid","path":"container:c1"},{"type":"uts"}]}"#,
        )
        .unwrap();
        let (namespaces, joins) = Namespaces::new(&linux).unwrap();
        assert_eq!(namespaces.joined, sys::CLONE_NEWPID);
        assert!(!namespaces.has(sys::CLONE_NEWPID) && namespaces.has(sys::CLONE_NEWUTS));
        let container = "c1".to_owned();
        let kind = sys::CLONE_NEWPID;
        assert_eq!(joins, [Join { kind, container }]);
        for bad in [
            r#"{"namespaces":[{"type":"pid"}]}"#,
            r#"{"namespaces":[{"type":"mount","path":"/x"}]}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"time","path":"/x"}]}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"mount"}]}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"ipc","path":"container:a"},{"type":"ipc"}]}"#,
            r#"{"namespaces":[{"type":"mount"},{"type":"ipc","path":"container:a"},{"type":"user"}]}"#,
            r#"{"namespaces":[{"type":"mount","path":"container:a"}]}"#,
        ] {
            let linux: Linux = serde_json::from_str(bad).unwrap();
            assert!(Namespaces::new(&linux).is_err(), "{bad}");
        }
    }
}
