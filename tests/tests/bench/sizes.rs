//! How large the parts are.

use std::fs;

use bulkhead_tests::bench::{Row, Unit};
use bulkhead_tests::error::{Context, Result};
use bulkhead_tests::site::Site;

const MIB: f64 = 1024.0 * 1024.0;

/// The parts that are installed, stripped as they are installed.
pub fn sizes(site: &Site) -> Result<Vec<Row>> {
    let parts = [
        ("kernel-size", "the guest kernel", "lib/vmlinux"),
        (
            "agent-size",
            "the guest's root image: the agent",
            "lib/rootfs.erofs",
        ),
        ("vmm-size", "the VMM", "bin/bulkhead-vmm"),
        ("shim-size", "the shim", "bin/containerd-shim-bulkhead-v2"),
    ];
    let rows = parts.map(|(name, what, file)| {
        let path = site.payload.join(file);
        let metadata = fs::metadata(&path).or_cannot(format!("examine {}", path.display()))?;
        Ok(Row {
            name,
            what,
            unit: Unit::Mib,
            values: vec![metadata.len() as f64 / MIB],
        })
    });
    rows.into_iter().collect()
}
