//! What shim and agent agree on, beside the messages themselves.
//!
//! # Connection
//!
//! When the guest is ready, the agent connects to the host (vsock CID 2, port [`AGENT_PORT`]) and then *serves* ttrpc on that
//! stream: [`sandbox`]'s `Sandbox` service and containerd's own `containerd.task.v3.Task`. When the connection breaks it
//! connects again. The shim is the client.
//!
//! # Containers
//!
//! The Task requests pass through as containerd sent them, with these fields in the guest's terms:
//!
//! * `CreateTaskRequest.options` is an Any with type URL [`SPEC_TYPE_URL`] and the bundle's `config.json` as its value; `bundle`, the
//!   host's directory, goes into the state that hooks are told; `checkpoint` is empty.
//! * `CreateTaskRequest.rootfs` is a list of mounts with sources in the guest's terms, as [`disk_source`] writes them:
//!   file systems of type `erofs`, `ext4` or `xfs` on disks, and, if there is one of type `overlay`, it is the last: all mounts
//!   before it are its lower layers, the topmost first, and its upper directory is made on the scratch disk (unless its options contain
//!   `ro`). Its other options are those of the host's overlay that change what is seen, such as `userxattr` or `index=off`,
//!   and `uidmap=INSIDE:OUTSIDE:NUMBER` and `gidmap=` for layers whose identities appear mapped. An `overlay` with no mount before it is a plain empty directory of the scratch disk. Without an `overlay` the list has
//!   exactly one mount, the root itself. A mount whose `target` is [`BINDS`] is no part of the root: it is there for the container's own
//!   binds, whose sources may lie in it. What is bound from it writable, which can be a file only, is a copy on the scratch disk.
//! * `stdin`, `stdout` and `stderr`, of Create and of Exec, are empty (`/dev/null`) or a stream's name (see below). With a terminal `stderr` is
//!   empty.
//!
//! Fields of the specification that only the host can carry out are not read by the agent, and are the shim's: `root.path`,
//! `annotations`, `linux.cgroupsPath`, every kind of hook but `createContainer` and `startContainer` (whose programs are the container's), and the paths of namespaces: a network, IPC, UTS, PID or
//! cgroup namespace with a path, or without an entry, is the guest's own, but for a path that [`namespace_of`] wrote. `process.apparmorProfile`, `process.selinuxLabel`, `linux.mountLabel`,
//! `linux.resources.cpu.cpus` and `mems` and
//! whatever else the agent does not do it refuses: the shim removes what the host can answer for. Sources of bind mounts are paths
//! of the guest.
//!
//! Limits of single devices (`linux.resources.blockIO.*Device`, and the files of `unified` whose lines begin with a device) name
//! the machine's disks: the major number is 0, and the minor [`SCRATCH_DISK`] or [`ROOT_DISK`].
//!
//! # Streams
//!
//! The agent listens on vsock port [`STREAM_PORT`]. The shim connects once for each stream, and the first eight bytes it sends are the
//! stream's number, a little-endian `u64` that is used only once in the life of a sandbox. The name of a stream in a request is that
//! number in decimal. Stream and request may arrive in either order. What follows are the plain bytes of standard input, output or
//! error; the end of the data is the end (half-close) of the stream. That is how standard input is closed: CloseIO adds nothing to it.

#[allow(warnings, clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{sandbox, sandbox_ttrpc};

/// The port of the host (CID 2) that the agent connects to.
pub const AGENT_PORT: u32 = 1024;

/// The port of the guest on which the agent accepts streams.
pub const STREAM_PORT: u32 = 1025;

/// Where what a container binds of the host's files is mounted, seen by no other container.
pub const BINDS: &str = "/run/binds";

/// The disk for what all containers write, where a limit names a disk.
pub const SCRATCH_DISK: u32 = 0;

/// The disk of the container's own root; a limit for it means nothing to a container without one.
pub const ROOT_DISK: u32 = 1;

/// Type URL of `CreateTaskRequest.options`: an OCI runtime specification in JSON.
pub const SPEC_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// Type URL of `ExecProcessRequest.spec`: a process of an OCI runtime specification in JSON.
pub const PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// Type URL of `UpdateTaskRequest.resources`: Linux resources of an OCI runtime specification in JSON.
pub const RESOURCES_TYPE_URL: &str =
    "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Names a disk by its PCI device number (bus 0, function 0), or one of its partitions (counted from 1), as the source of a mount.
pub fn disk_source(slot: u8, partition: Option<u32>) -> String {
    match partition {
        Some(partition) => format!("pci:{slot}/{partition}"),
        None => format!("pci:{slot}"),
    }
}

/// How many device numbers a PCI bus has.
pub const PCI_SLOTS: u8 = 32;

/// Reads what [`disk_source`] wrote: PCI device number and partition.
pub fn parse_disk_source(source: &str) -> Option<(u8, Option<u32>)> {
    let rest = source.strip_prefix("pci:")?;
    let (slot, partition) = match rest.split_once('/') {
        Some((slot, partition)) => (slot, Some(partition.parse().ok().filter(|&p| p > 0)?)),
        None => (rest, None),
    };
    Some((slot.parse().ok().filter(|&s| s < PCI_SLOTS)?, partition))
}

/// Names the namespace of a container, as the path of a namespace that another container joins.
pub fn namespace_of(container: &str) -> String {
    format!("container:{container}")
}

/// Reads what [`namespace_of`] wrote: the container.
pub fn parse_namespace_of(path: &str) -> Option<&str> {
    path.strip_prefix("container:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_sources_are_read_as_written() {
        for (slot, partition) in [(0, None), (31, Some(1)), (4, Some(127))] {
            assert_eq!(
                parse_disk_source(&disk_source(slot, partition)),
                Some((slot, partition))
            );
        }
        for bad in [
            "",
            "pci:",
            "pci:32",
            "pci:4/",
            "pci:4/0",
            "pci:-1",
            "/dev/vda",
            "pci:4/1/2",
        ] {
            assert_eq!(parse_disk_source(bad), None, "{bad:?}");
        }
    }
}
