//! Checks of containerd.

use std::env;
use std::io;
use std::process::{Command, Output};

use super::files::find;
use super::{Finding, Verdict};

/// The oldest containerd that Bulkhead works with.
const LEAST: (u32, u32) = (1, 6);

/// The shim's name as containerd derives it from the runtime `io.containerd.bulkhead.v2`.
const SHIM: &str = "containerd-shim-bulkhead-v2";

/// All checks of containerd.
pub fn check() -> Vec<Finding> {
    let output = Command::new("containerd").arg("--version").output();
    let path = env::var_os("PATH").unwrap_or_default();
    let shim = match find(SHIM, &path) {
        Some(found) => Verdict::good(found.display().to_string()),
        None => Verdict::bad(
            format!("{SHIM} is not in PATH"),
            "install it in a directory of containerd's PATH, for example /usr/local/bin",
        ),
    };
    vec![
        Finding::new("containerd", containerd(output)),
        Finding::new("shim", shim),
    ]
}

fn containerd(output: io::Result<Output>) -> Verdict {
    let remedy = "install containerd 1.6 or later (on Debian: apt-get install containerd)";
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Verdict::bad("containerd is not in PATH", remedy);
        }
        Err(error) => {
            return Verdict::bad(format!("cannot run containerd --version: {error}"), remedy);
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    match version(&text) {
        Some((version, number)) if number >= LEAST => Verdict::good(version),
        Some((version, _)) => Verdict::bad(format!("containerd {version} is too old"), remedy),
        None => Verdict::bad(
            format!(
                "containerd --version says {:?}, which has no version",
                text.trim()
            ),
            remedy,
        ),
    }
}

/// Finds the version in a line such as `containerd github.com/containerd/containerd v1.6.20 2806fc1057397d`.
fn version(text: &str) -> Option<(String, (u32, u32))> {
    let version = text.split_whitespace().nth(2)?.trim_start_matches('v');
    let mut numbers = version
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let number = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((version.to_owned(), number))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn said(text: &str) -> Verdict {
        containerd(Ok(Output {
            status: ExitStatus::from_raw(0),
            stdout: text.into(),
            stderr: Vec::new(),
        }))
    }

    #[test]
    fn versions_since_1_6_are_supported() {
        for (line, seen) in [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u1",
                "1.6.20~ds1",
            ),
            (
                "containerd github.com/containerd/containerd v1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da\n",
                "1.7.27",
            ),
            (
                "containerd containerd.io 1.6.33 d2d58213f83a351ca8f528a95fbd145f5654e957",
                "1.6.33",
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.2.0 1c4457e00facac03ce1d75f7b6777a7a851e5c41",
                "2.2.0",
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.0.0-rc.1 x",
                "2.0.0-rc.1",
            ),
        ] {
            assert_eq!(said(line), Verdict::good(seen), "{line}");
        }
    }

    #[test]
    fn older_ones_and_what_is_none_are_told() {
        for (line, part) in [
            (
                "containerd github.com/containerd/containerd v1.5.11 3df54a8",
                "1.5.11 is too old",
            ),
            ("containerd containerd.io 0.2.3 x", "0.2.3 is too old"),
            ("containerd", "has no version"),
            ("", "has no version"),
            ("a b devel c", "has no version"),
        ] {
            let finding = Finding::new("containerd", said(line)).to_string();
            assert!(
                finding.contains(part) && finding.contains("1.6 or later"),
                "{finding}"
            );
        }
        let absent = containerd(Err(io::ErrorKind::NotFound.into()));
        assert!(
            Finding::new("x", absent)
                .to_string()
                .contains("not in PATH")
        );
        let refused = containerd(Err(io::ErrorKind::PermissionDenied.into()));
        assert!(
            Finding::new("x", refused)
                .to_string()
                .contains("cannot run")
        );
    }
}
