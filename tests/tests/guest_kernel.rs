//! The guest kernel's build refuses a configuration that is not what the fragments ask for.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

const BUILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest-kernel/build");

/// Compares the finished configuration `result` with one fragment.
fn check(result: &str, fragment: &str) -> Output {
    let directory = TempDir::new().unwrap();
    let write = |name, text| {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let (result, fragment) = (write("result", result), write("theme.config", fragment));
    Command::new(BUILD)
        .arg("--check-config")
        .args([result, fragment])
        .output()
        .unwrap()
}

/// Asserts that the check fails and says so in exactly the lines that end in `complaints`, and a last one.
fn assert_refused(result: &str, fragment: &str, complaints: &[&str]) {
    let output = check(result, fragment);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let (verdict, lines) = {
        let mut lines: Vec<_> = said.lines().collect();
        (lines.pop().unwrap(), lines)
    };
    assert!(verdict.contains("not what the fragments ask for"), "{said}");
    assert_eq!(lines.len(), complaints.len(), "{said}");
    for (line, complaint) in lines.iter().zip(complaints) {
        assert!(line.contains("theme.config:"), "{said}");
        assert!(line.ends_with(complaint), "{said}");
    }
}

const RESULT: &str = "\
#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_SMP=y
CONFIG_NR_CPUS=32
CONFIG_LSM=\"landlock\"
# CONFIG_MODULES is not set
";

#[test]
fn accepts_what_came_true() {
    let output = check(
        RESULT,
        "# A comment.\n\nCONFIG_SMP=y\nCONFIG_NR_CPUS=32\nCONFIG_LSM=\"landlock\"\n\
         # CONFIG_MODULES is not set\n# CONFIG_ABSENT is not set\n",
    );
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.stderr.is_empty());
}

#[test]
fn lists_every_symbol_that_is_missing() {
    assert_refused(
        RESULT,
        "CONFIG_FLYING_CARS=y\nCONFIG_SMP=y\nCONFIG_MODULES=y\nCONFIG_SMP_TELEPATHY=y\n",
        &[
            "theme.config:1: CONFIG_FLYING_CARS=y is missing: no such symbol, or something that it depends on is off",
            "theme.config:3: CONFIG_MODULES=y became n",
            "theme.config:4: CONFIG_SMP_TELEPATHY=y is missing: no such symbol, or something that it depends on is off",
        ],
    );
}

#[test]
fn lists_every_value_that_differs() {
    assert_refused(
        RESULT,
        "CONFIG_NR_CPUS=64\nCONFIG_LSM=\"landlock,bpf\"\n# CONFIG_SMP is not set\n",
        &[
            "CONFIG_NR_CPUS=64 became 32",
            "CONFIG_LSM=\"landlock,bpf\" became \"landlock\"",
            "CONFIG_SMP=n became y",
        ],
    );
}

#[test]
fn refuses_what_asks_for_nothing() {
    assert_refused(
        RESULT,
        "CONFIG_SMP = y\nSMP=y\nCONFIG_NR_CPUS=32\nCONFIG_NR_CPUS=32\n",
        &[
            "neither a symbol nor a comment: CONFIG_SMP = y",
            "neither a symbol nor a comment: SMP=y",
            "theme.config:3",
        ],
    );
}

#[test]
fn refuses_an_empty_result() {
    assert_refused(
        "",
        "CONFIG_SMP=y\n",
        &["something that it depends on is off"],
    );
}

#[test]
fn names_a_file_that_is_not_there() {
    let output = Command::new(BUILD)
        .args(["--check-config", "/nonexistent/config", BUILD])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "guest-kernel: cannot read /nonexistent/config\n");
}

/// Neither a contradiction nor a repetition between fragments waits for a kernel to be built to be found.
#[test]
fn fragments_ask_for_each_symbol_once() {
    let directory = Path::new(BUILD).parent().unwrap().join("config");
    let fragments: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(!fragments.is_empty());
    // A result made of the fragments themselves satisfies them, unless they contradict or repeat each other.
    let result: String = fragments
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), result).unwrap();
    let output = Command::new(BUILD)
        .arg("--check-config")
        .arg(file.path())
        .args(fragments)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
