//! `-info` and `-v`: what this runtime is.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

/// The runtime's name in containerd's configuration.
const NAME: &str = "io.containerd.bulkhead.v2";

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
        ..Default::default()
    }
    .write_to_bytes()
}
