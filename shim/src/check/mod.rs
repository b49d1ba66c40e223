//! `bulkhead check`: can this host run microVMs, and if not, exactly why, and what helps.
//!
//! Each check is a function that looks at one thing and returns a [`Verdict`]. What it reads from the host it passes to a
//! function that decides, so that the decisions are tested on hosts that nobody has at hand.

mod containerd;
mod files;
mod guest;
mod kernel;
mod kvm;

use std::fmt;
use std::path::Path;

use crate::config::Config;

/// What can be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Group {
    /// The KVM device, its capabilities, and whether guests' kernels run at full speed.
    Kvm,
    /// What the host's kernel must offer besides.
    Kernel,
    /// The configuration, the files that it names, and the programs that are needed.
    Files,
    /// containerd and its shim.
    Containerd,
}

impl Group {
    /// All of them, in the order in which they are worth knowing.
    pub const ALL: [Self; 4] = [Self::Kvm, Self::Kernel, Self::Files, Self::Containerd];
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All is well; the text says what was seen.
    Good(String),
    /// Something is missing or wrong.
    Bad {
        /// What.
        problem: String,
        /// What helps; `None` if the problem says it.
        remedy: Option<String>,
    },
}

impl Verdict {
    fn good(seen: impl Into<String>) -> Self {
        Self::Good(seen.into())
    }

    fn bad(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Bad {
            problem: problem.into(),
            remedy: Some(remedy.into()),
        }
    }

    /// An error that names its remedy itself.
    fn error(error: impl fmt::Display) -> Self {
        Self::Bad {
            problem: error.to_string(),
            remedy: None,
        }
    }

    /// Whether all is well.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Good(_))
    }
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// What was found.
    pub verdict: Verdict,
}

impl Finding {
    fn new(what: &'static str, verdict: Verdict) -> Self {
        Self { what, verdict }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Good(seen) => write!(formatter, "ok    {:<18} {seen}", self.what),
            Verdict::Bad { problem, remedy } => {
                write!(formatter, "FAIL  {:<18} {problem}", self.what)?;
                match remedy {
                    Some(remedy) => write!(formatter, "\n{:<24} remedy: {remedy}", ""),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Looks at everything in `groups`, with the configuration that is named or the default one.
pub fn run(groups: &[Group], config: Option<&Path>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for group in groups {
        match group {
            Group::Kvm => findings.extend(kvm::check()),
            Group::Kernel => findings.extend(kernel::check()),
            Group::Files => {
                let (verdict, config) = match Config::load(config) {
                    Ok(config) => (Verdict::good("valid"), config),
                    Err(error) => (Verdict::error(error), Config::default()),
                };
                findings.push(Finding::new("configuration", verdict));
                findings.extend(files::check(&config));
            }
            Group::Containerd => findings.extend(containerd::check()),
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_and_a_failure_has_a_second_one() {
        let good = Finding::new("KVM device", Verdict::good("answers"));
        assert_eq!(good.to_string(), "ok    KVM device         answers");
        let bad = Finding::new("KVM device", Verdict::bad("absent", "load it"));
        assert_eq!(
            bad.to_string(),
            "FAIL  KVM device         absent\n                         remedy: load it"
        );
    }

    #[test]
    fn a_bad_configuration_is_a_finding() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        std::fs::write(&path, "kernal = 1").unwrap();
        let findings = run(&[Group::Files], Some(&path));
        assert_eq!(findings[0].what, "configuration");
        let text = findings[0].to_string();
        assert!(text.contains("unknown field `kernal`"), "{text}");
    }
}
