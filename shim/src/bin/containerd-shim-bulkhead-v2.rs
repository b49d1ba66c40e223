//! `containerd-shim-bulkhead-v2`: the shim that containerd starts, one per pod.

fn main() {}
