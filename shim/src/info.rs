//! `-info` and `-v`: what this runtime is.

use std::collections::HashMap;

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

/// The runtime's name in containerd's configuration.
const NAME: &str = "io.containerd.bulkhead.v2";

/// The annotation by which containerd 2.2 learns which mounts of a root file system it shall hand over as they are, and not make itself.
const ALLOWED_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// Those that [`crate::rootfs::plan`] knows: images become disks, and what containerd would format, make or join, the guest does.
const MOUNTS: &str = "erofs,loop,format/*,mkdir/*,mkfs/*";

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
        annotations: HashMap::from([(ALLOWED_MOUNTS.into(), MOUNTS.into())]),
        ..Default::default()
    }
    .write_to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

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
