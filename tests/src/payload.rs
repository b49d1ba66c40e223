//! The build under test: what is copied to a node before a run.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::source_directory;
use crate::error::{Context, Result};
use crate::{debian, step};

/// What `cargo build` makes for a host.
const BINARIES: [&str; 3] = ["bulkhead", "bulkhead-vmm", "containerd-shim-bulkhead-v2"];

/// What the builds need from Debian.
const PACKAGES: [&str; 11] = [
    "bc",
    "bison",
    "erofs-utils",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "linux-source-6.12",
    "make",
    "xz-utils",
];

/// The finished parts of Bulkhead.
#[derive(Debug)]
pub struct Build {
    /// Where cargo puts release builds.
    release: PathBuf,
    /// The guest kernel.
    kernel: PathBuf,
}

impl Build {
    /// Builds what is not built yet.
    pub fn new() -> Result<Self> {
        debian::install(&PACKAGES)?;
        let source = source_directory();
        let mut kernel = Command::new(source.join("guest-kernel/build"));
        let kernel = step::run("guest kernel", &mut kernel)?;
        let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build.args(["build", "--release", "--locked"]);
        for package in ["bulkhead-agent", "bulkhead-shim", "bulkhead-vmm"] {
            build.args(["--package", package]);
        }
        step::run("binaries", build.current_dir(source))?;
        let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
        Ok(Self {
            release: source.join(target).join("x86_64-unknown-linux-gnu/release"),
            kernel: kernel.lines().last().unwrap_or_default().into(),
        })
    }

    /// The path of a binary.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.release.join(name)
    }

    /// Copies the build to `directory`: `bin/`, with this program too, and `lib/`.
    pub fn stage(&self, directory: &Path) -> Result<()> {
        let (bin, lib) = (directory.join("bin"), directory.join("lib"));
        for path in [&bin, &lib] {
            fs::create_dir_all(path).or_cannot(format!("create {}", path.display()))?;
        }
        for name in BINARIES {
            step::copy(&self.binary(name), &bin.join(name))?;
        }
        let this = env::current_exe().or_cannot("find this program's file")?;
        step::copy(&this, &bin.join("node"))?;
        step::copy(&self.kernel, &lib.join("vmlinux"))?;
        let mut image = Command::new(source_directory().join("rootfs/build"));
        image
            .arg(self.binary("bulkhead-agent"))
            .arg(lib.join("rootfs.erofs"));
        step::run("guest root image", &mut image).map(drop)
    }
}
