//! The guest's root image: the same bytes from the same agent, and nothing in it but the agent and its mount points.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

const BUILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../rootfs/build");

const ELF_HEADER_SIZE: u16 = 64;
const PROGRAM_HEADER_SIZE: u16 = 56;
const MACHINE_X86_64: u16 = 62;
const MACHINE_AARCH64: u16 = 183;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_INTERPRETER: u32 = 3;

/// A 64-bit little-endian executable for `machine` with a single empty segment of type `segment`, and some content.
fn executable(machine: u16, segment: u32) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(2u16.to_le_bytes()); // e_type: ET_EXEC
    elf.extend(machine.to_le_bytes());
    elf.extend(1u32.to_le_bytes()); // e_version
    elf.extend(0u64.to_le_bytes()); // e_entry
    elf.extend(u64::from(ELF_HEADER_SIZE).to_le_bytes()); // e_phoff
    elf.extend(0u64.to_le_bytes()); // e_shoff
    elf.extend(0u32.to_le_bytes()); // e_flags
    for half in [ELF_HEADER_SIZE, PROGRAM_HEADER_SIZE, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(segment.to_le_bytes());
    elf.resize(usize::from(ELF_HEADER_SIZE + PROGRAM_HEADER_SIZE), 0);
    // More than a block, so that the image holds a file with blocks of its own and an inline tail.
    elf.extend((0..10_000u32).flat_map(u32::to_le_bytes));
    elf
}

fn build(agent: &Path, output: &Path) -> Output {
    Command::new(BUILD).args([agent, output]).output().unwrap()
}

fn assert_built(agent: &Path, output: &Path) {
    let result = build(agent, output);
    let said = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "{said}");
}

/// Writes a stand-in for the agent and returns its path.
fn stand_in(directory: &TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

#[test]
fn equal_agents_give_equal_images() {
    let directory = TempDir::new().unwrap();
    let content = executable(MACHINE_X86_64, SEGMENT_LOAD);
    let first = stand_in(&directory, "first", &content);
    let second = stand_in(&directory, "second", &content);
    fs::set_permissions(&second, Permissions::from_mode(0o700)).unwrap();
    let year = Duration::from_secs(365 * 24 * 3600);
    fs::File::options()
        .write(true)
        .open(&second)
        .unwrap()
        .set_modified(SystemTime::now() - year)
        .unwrap();
    let (one, two) = (directory.path().join("1"), directory.path().join("2"));
    assert_built(&first, &one);
    assert_built(&second, &two);
    let image = fs::read(one).unwrap();
    assert_eq!(image, fs::read(two).unwrap());
    // A disk has whole sectors.
    assert_eq!(image.len() % 512, 0);
    assert!(image.len() > content.len());
}

#[test]
fn different_agents_give_different_images() {
    let directory = TempDir::new().unwrap();
    let mut content = executable(MACHINE_X86_64, SEGMENT_LOAD);
    let first = stand_in(&directory, "first", &content);
    *content.last_mut().unwrap() ^= 1;
    let second = stand_in(&directory, "second", &content);
    let (one, two) = (directory.path().join("1"), directory.path().join("2"));
    assert_built(&first, &one);
    assert_built(&second, &two);
    assert_ne!(fs::read(one).unwrap(), fs::read(two).unwrap());
}

#[test]
fn the_image_holds_the_agent_and_its_mount_points() {
    let directory = TempDir::new().unwrap();
    let content = executable(MACHINE_X86_64, SEGMENT_LOAD);
    let agent = stand_in(&directory, "agent", &content);
    let image = directory.path().join("image");
    assert_built(&agent, &image);

    let tree = directory.path().join("tree");
    let extraction = Command::new("fsck.erofs")
        .arg(format!("--extract={}", tree.display()))
        .arg("--preserve-perms")
        .arg(&image)
        .output()
        .unwrap();
    assert!(
        extraction.status.success(),
        "{}",
        String::from_utf8_lossy(&extraction.stderr)
    );
    assert_eq!(list(&tree), ["dev", "proc", "run", "sbin", "sys"]);
    for name in list(&tree) {
        let path = tree.join(&name);
        let metadata = fs::symlink_metadata(&path).unwrap();
        assert!(metadata.is_dir(), "{name}");
        assert_eq!(metadata.mode() & 0o7777, 0o755, "{name}");
        assert_eq!(metadata.mtime(), 0, "{name}");
        let expected: &[&str] = if name == "sbin" { &["init"] } else { &[] };
        assert_eq!(list(&path), expected, "{name}");
    }
    let init = tree.join("sbin/init");
    let metadata = fs::symlink_metadata(&init).unwrap();
    assert!(metadata.is_file());
    assert_eq!(metadata.mode() & 0o7777, 0o755);
    assert_eq!(fs::read(init).unwrap(), content);
}

/// The names in `directory`, sorted.
fn list(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn an_agent_that_cannot_run_is_refused() {
    let directory = TempDir::new().unwrap();
    let output = directory.path().join("image");
    let cases = [
        (
            executable(MACHINE_X86_64, SEGMENT_INTERPRETER),
            "is linked dynamically",
        ),
        (
            executable(MACHINE_AARCH64, SEGMENT_LOAD),
            "is not for x86-64",
        ),
        (b"#!/bin/sh\n".to_vec(), "is not an ELF file"),
    ];
    for (content, complaint) in cases {
        let agent = stand_in(&directory, "agent", &content);
        let result = build(&agent, &output);
        let said = String::from_utf8(result.stderr).unwrap();
        assert_eq!(result.status.code(), Some(1), "{said}");
        assert!(
            said.starts_with("rootfs: ") && said.contains(complaint),
            "{said}"
        );
    }
    let result = build(&directory.path().join("absent"), &output);
    let said = String::from_utf8(result.stderr).unwrap();
    assert!(said.contains("there is no agent binary at"), "{said}");
    // Neither an image nor half of one is left behind.
    assert_eq!(list(directory.path()), ["agent"]);
}
