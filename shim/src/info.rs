//! `-info` and `-v`: what this runtime is.

use std::collections::HashMap;

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::json;

/// The runtime's name in containerd's configuration.
const NAME: &str = "io.containerd.bulkhead.v2";

/// The annotation by which containerd 2.2 learns which mounts of a root file system it shall hand over as they are, and not make itself.
const ALLOWED_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// Those that [`crate::rootfs::plan`] knows: images become disks, and what containerd would format, make or join, the guest does.
const MOUNTS: &str = "erofs,loop,format/*,mkdir/*,mkfs/*";

/// The type of the features.
const FEATURES_TYPE_URL: &str =
    "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The options of mounts that the guest knows, but for those that file systems have of their own.
const MOUNT_OPTIONS: &str = "acl async atime bind defaults dev diratime dirsync exec idmap iversion lazytime loud mand noacl noatime nodev \
    nodiratime noexec noiversion nolazytime nomand norelatime nostrictatime nosuid nosymfollow private ratime rbind rdev rdiratime relatime \
    rexec ridmap rnoatime rnodev rnodiratime rnoexec rnorelatime rnostrictatime rnosuid rnosymfollow ro rprivate rrelatime rro rrw \
    rshared rslave rstrictatime rsuid rsymfollow runbindable rw shared silent slave strictatime suid symfollow sync tmpcopyup unbindable";

/// What `-v` prints.
pub fn version() -> String {
    format!(
        "containerd-shim-bulkhead-v2:\n  Version:  {}\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// What `-info` prints.
pub fn runtime_info() -> Result<Vec<u8>, protobuf::Error> {
    RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        features: MessageField::some(features()),
        annotations: HashMap::from([(ALLOWED_MOUNTS.into(), MOUNTS.into())]),
        ..Default::default()
    }
    .write_to_bytes()
}

/// What of the specification there is in the guest (runtime-spec, "Linux Features Structure"). Without it containerd neither takes mounts with
/// identities of their own, nor tells Kubernetes of user namespaces and of mounts that are read-only with all below them.
fn features() -> Any {
    let disabled = json!({"enabled": false});
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS.split(' ').collect::<Vec<_>>(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {"enabled": true},
            "apparmor": disabled,
            "selinux": disabled,
            "intelRdt": disabled,
            "mountExtensions": {"idmap": {"enabled": true}},
        },
    });
    Any {
        type_url: FEATURES_TYPE_URL.into(),
        value: features.to_string().into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Features, LinuxNamespaceType};

    use super::*;

    #[test]
    fn containerd_learns_what_it_may_ask_for() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info().unwrap()).unwrap();
        assert_eq!(info.features.type_url, FEATURES_TYPE_URL);
        let features: Features = serde_json::from_slice(&info.features.value).unwrap();
        let options = features.mount_options().as_ref().unwrap();
        assert!(
            ["rro", "ridmap", "nosuid"]
                .iter()
                .all(|option| options.contains(&(*option).to_owned()))
        );
        let linux = features.linux().as_ref().unwrap();
        assert!(
            linux
                .namespaces()
                .as_ref()
                .unwrap()
                .contains(&LinuxNamespaceType::User)
        );
        let extensions = linux.mount_extensions().as_ref().unwrap();
        assert_eq!(*extensions.idmap().as_ref().unwrap().enabled(), Some(true));
    }

    #[test]
    fn containerd_learns_the_name_the_version_and_the_mounts() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info().unwrap()).unwrap();
        assert_eq!(info.name, NAME);
        assert!(version().contains(&info.version.version));
        assert!(
            info.annotations[ALLOWED_MOUNTS]
                .split(',')
                .any(|mount| mount == "erofs")
        );
    }
}
