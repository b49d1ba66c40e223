//! `bulkhead`: the command-line tool.

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_shim::check::{self, Group};
use clap::{Parser, Subcommand};

/// Runs containers in microVMs, through containerd.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Tells whether this host can run microVMs, and otherwise why not and what helps. The exit code is 0 if it can.
    Check {
        /// Look at these only.
        groups: Vec<Group>,
        /// The configuration, if it is not /etc/bulkhead/config.toml.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Say only what is wrong.
        #[arg(long)]
        quiet: bool,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().verb {
        Verb::Check {
            groups,
            config,
            quiet,
        } => {
            let groups = if groups.is_empty() {
                Group::ALL.to_vec()
            } else {
                groups
            };
            let findings = check::run(&groups, config.as_deref());
            let mut fit = true;
            for finding in &findings {
                fit &= finding.verdict.is_good();
                if !(quiet && finding.verdict.is_good()) {
                    println!("{finding}");
                }
            }
            if fit {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
