//! The demonstration: one container, and what its kernel says of itself beside what the host's says.

use std::fs;
use std::process::Command;
use std::time::Instant;

use crate::error::{Context, Error, Result};
use crate::process;
use crate::site::{RUNTIME, Site};

/// The image that is shown.
const IMAGE: &str = "localhost/busybox:latest";

/// Where a kernel tells of itself.
const RELEASE: &str = "/proc/sys/kernel/osrelease";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const MEMORY: &str = "/proc/meminfo";

/// What one kernel says of itself.
struct Kernel {
    release: String,
    boot_id: String,
    /// In MiB.
    memory: u64,
}

impl Kernel {
    /// From the content of [`RELEASE`], [`BOOT_ID`] and [`MEMORY`], one after the other.
    fn parse(text: &str) -> Result<Self> {
        let unexpected = || Error::Unfit(format!("a kernel says of itself:\n{text}"));
        let mut lines = text.lines();
        let mut next = || lines.next().map(str::to_owned).ok_or_else(unexpected);
        let (release, boot_id) = (next()?, next()?);
        let memory = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib: u64 = memory
            .and_then(|memory| memory.trim().strip_suffix(" kB")?.parse().ok())
            .ok_or_else(unexpected)?;
        Ok(Self {
            release,
            boot_id,
            memory: kib / 1024,
        })
    }
}

/// Runs the demonstration in a site, whose host is called `host`.
pub fn run(site: &Site, host: &str) -> Result<()> {
    let files = [RELEASE, BOOT_ID, MEMORY];
    let mut text = String::new();
    for file in files {
        text += &fs::read_to_string(file).or_cannot(format!("read {file}"))?;
    }
    let ours = Kernel::parse(&text)?;

    let words = ["run", "--rm", "--runtime", RUNTIME, IMAGE, "demo"];
    println!("$ ctr {} cat {}", words.join(" "), files.join(" "));
    let mut ctr = Command::new("ctr");
    ctr.args(words)
        .arg("cat")
        .args(files)
        .envs(site.environment()?);
    let start = Instant::now();
    let text = process::output(&mut ctr)?;
    let time = start.elapsed();
    let theirs = Kernel::parse(&text)?;

    let row = |what: &str, ours: &str, theirs: &str| println!("{what:<16}{ours:<40}{theirs}");
    println!();
    row("", host, "the container");
    row("kernel release", &ours.release, &theirs.release);
    row("boot id", &ours.boot_id, &theirs.boot_id);
    row(
        "memory",
        &format!("{} MiB", ours.memory),
        &format!("{} MiB", theirs.memory),
    );
    println!();
    println!(
        "A machine started, ran the container and was gone after {:.1} s.",
        time.as_secs_f32()
    );
    println!("Try next, in the shell that `make node` gives:");
    println!("  ctr run --rm -t --runtime {RUNTIME} {IMAGE} try sh");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_tells_of_itself() {
        let text = "6.12.1\n0f8f-1\nMemTotal:         501234 kB\nMemFree:  1 kB\n";
        let kernel = Kernel::parse(text).unwrap();
        assert_eq!(kernel.release, "6.12.1");
        assert_eq!(kernel.boot_id, "0f8f-1");
        assert_eq!(kernel.memory, 489);
        assert!(Kernel::parse("6.12.1\n").is_err());
        assert!(Kernel::parse("6.12.1\nx\nMemTotal: many kB\n").is_err());
    }
}
