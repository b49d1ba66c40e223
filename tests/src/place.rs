//! Where a command runs: on the emulated node, or, where KVM is good, on the host itself, each time with a fresh site.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::node::{self, Run};
use crate::payload::Build;
use crate::scratch::Scratch;
use crate::terminal::Raw;
use crate::{debian, images, step};

/// What a site on the host needs from Debian.
const HOST_PACKAGES: [&str; 6] = [
    "busybox-static",
    "containerd",
    "containernetworking-plugins",
    "iproute2",
    "iptables",
    "runc",
];

/// Where a command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Place {
    /// On the host itself.
    Host,
    /// On the emulated node.
    Node,
}

/// A command for a site.
#[derive(Debug)]
pub struct Job<'a> {
    /// The build under test.
    pub build: &'a Build,
    /// The directory of the test images.
    pub images: &'a Path,
    /// A file of the host to take along; the command finds it as `$BULKHEAD_PAYLOAD/file`.
    pub file: Option<&'a Path>,
    /// For `sh -c`.
    pub command: &'a str,
    /// A directory of the host for /share.
    pub share: Option<&'a Path>,
    /// Whether the node's clock counts instructions.
    pub counting: bool,
    /// After how long the node is given up.
    pub limit: Option<Duration>,
}

impl Place {
    /// The host itself if `bulkhead check` finds that it can run microVMs, and else the node. Says so on standard error.
    pub fn choose(build: &Build) -> Result<Self> {
        let check = Command::new(build.binary("bulkhead"))
            .args(["check", "--quiet", "kvm", "kernel"])
            .output()
            .or_cannot("run bulkhead check")?;
        if check.status.success() {
            return Ok(Self::Host);
        }
        eprintln!(
            "This host cannot run microVMs by itself, so an emulated node takes its place, which is slower. \
             Why (bulkhead check):"
        );
        for line in String::from_utf8_lossy(&check.stdout).lines() {
            eprintln!("  {line}");
        }
        Ok(Self::Node)
    }
}

impl Job<'_> {
    /// Runs the command and returns its exit code.
    pub fn run(&self, place: Place) -> Result<u8> {
        let scratch = Scratch::new()?;
        let payload = scratch.path().join("payload");
        self.build.stage(&payload)?;
        if let Some(file) = self.file {
            step::copy(file, &payload.join("file"))?;
        }
        match place {
            Place::Node => self.on_node(&scratch, &payload),
            Place::Host => self.on_host(&scratch, &payload),
        }
    }

    fn on_node(&self, scratch: &Scratch, payload: &Path) -> Result<u8> {
        let files = node::build()?;
        step::copy(
            &debian::source_directory().join("tests/node/init"),
            &payload.join("init"),
        )?;
        // While the node waits for its disk its clock counts on, though nothing is executed: when instructions count, the site is
        // in memory.
        let directory = if self.counting {
            "/dev/shm/site"
        } else {
            "/var/lib/site"
        };
        let site = format!("/bulkhead/bin/node site {directory} /bulkhead /images");
        let command = format!("exec {site} {}\n", quoted(self.command));
        fs::write(payload.join("command"), command).or_cannot("write the node's command")?;
        let image = scratch.path().join("payload.erofs");
        images::erofs(payload, &image)?;
        let run = Run {
            payload: &image,
            images: &self.images.join("images.erofs"),
            share: self.share,
            terminal: Raw::possible(),
            counting: self.counting,
            limit: self.limit,
            console: &scratch.path().join("console"),
        };
        run.run(&files)
    }

    fn on_host(&self, scratch: &Scratch, payload: &Path) -> Result<u8> {
        debian::install(&HOST_PACKAGES)?;
        let status = Command::new("unshare")
            .args(["--mount", "--propagation", "slave", "--pid", "--mount-proc"])
            .args(["--fork", "--kill-child", "--"])
            .arg(debian::source_directory().join("tests/node/host-init"))
            .arg(scratch.path())
            .arg(self.share.unwrap_or(Path::new("")))
            .arg(payload.join("bin/node"))
            .arg("site")
            .arg(scratch.path().join("site"))
            .arg(payload)
            .arg(self.images.join("tree"))
            .arg(self.command)
            .stdin(Stdio::inherit())
            .status()
            .or_cannot("run unshare")?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        code.ok_or_else(|| Error::Unfit(format!("the site on this host ended with {status}")))
    }
}

/// `text` as one word of a shell.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_text_is_one_word() {
        let text = "it's $HOME\n\"*\"";
        let output = Command::new("sh")
            .args(["-c", &format!("printf %s {}", quoted(text))])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
    }
}
