//! What the host's kernel says of a VMM that runs a machine: read in `/proc`, line by line.

#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_vmm::control::{Boot, Channel, Disk, Event, Extent, Request};
use bulkhead_vmm::launch::{DEFAULT_UID_BASE, Exit, Vmm, launch, unique_uid};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A kernel that only waits: `hlt` and a jump back to it, loaded at 1 MiB.
fn kernel() -> OwnedFd {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |elf: &mut Vec<u8>, values: &[u16]| {
        values
            .iter()
            .for_each(|value| elf.extend(value.to_le_bytes()));
    };
    let longs = |elf: &mut Vec<u8>, values: &[u64]| {
        values
            .iter()
            .for_each(|value| elf.extend(value.to_le_bytes()));
    };
    halves(&mut elf, &[2, 62, 1, 0]); // ET_EXEC, EM_X86_64, version
    longs(&mut elf, &[0x10_0000, 64, 0]); // entry, program headers, section headers
    halves(&mut elf, &[0, 0, 64, 56, 1, 0, 0, 0]);
    halves(&mut elf, &[1, 0, 5, 0]); // PT_LOAD, readable and executable
    longs(&mut elf, &[0x1000, 0x10_0000, 0x10_0000, 3, 3, 0x1000]);
    elf.resize(0x1000, 0);
    elf.extend([0xf4, 0xeb, 0xfd]);
    file(&elf)
}

fn file(content: &[u8]) -> OwnedFd {
    let mut file = File::from(memfd_create(c"given", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file.into()
}

/// A VMM that runs a machine with two processors and two disks, each with threads of its own.
fn running() -> (Vmm, Channel) {
    let executable = Path::new(env!("CARGO_BIN_EXE_bulkhead-vmm"));
    let (vmm, control) = launch(executable, unique_uid(DEFAULT_UID_BASE).unwrap()).unwrap();
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let (_console, console) = nix::unistd::pipe().unwrap();
    let disk = |id: &str, read_only| Disk {
        id: id.into(),
        read_only,
        queues: 2,
        extents: vec![Extent {
            offset: 0,
            length: 4096,
        }],
    };
    let boot = Boot {
        vcpus: 2,
        memory_mib: 128,
        cmdline: String::new(),
        ports: Some(vec![1024]),
        disks: vec![disk("root", true), disk("scratch", false)],
        nics: vec![],
    };
    let (kernel, root, scratch) = (kernel(), file(&[0; 4096]), file(&[0; 4096]));
    let descriptors = [
        kvm.as_fd(),
        kernel.as_fd(),
        console.as_fd(),
        root.as_fd(),
        scratch.as_fd(),
    ];
    control.send(&Request::Boot(boot), &descriptors).unwrap();
    match control.receive().unwrap() {
        (Event::Started { slots }, _) => assert_eq!(slots.len(), 2),
        (other, _) => panic!("{other:?}"),
    }
    (vmm, control)
}

fn proc(vmm: &Vmm, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{file}", vmm.pid()))
}

fn read(vmm: &Vmm, file: &str) -> String {
    fs::read_to_string(proc(vmm, file)).unwrap()
}

fn statuses(vmm: &Vmm) -> Vec<BTreeMap<String, String>> {
    fs::read_dir(proc(vmm, "task"))
        .unwrap()
        .map(|task| {
            fs::read_to_string(task.unwrap().path().join("status"))
                .unwrap()
                .lines()
                .filter_map(|line| line.split_once(':'))
                .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
                .collect()
        })
        .collect()
}

#[test]
fn no_thread_of_a_running_vmm_has_a_privilege() {
    let (vmm, _control) = running();
    let uid = DEFAULT_UID_BASE + std::process::id();
    let ids = format!("{uid}\t{uid}\t{uid}\t{uid}");
    let statuses = statuses(&vmm);
    assert!(statuses.len() > 2, "two processors and the main thread");
    for status in statuses {
        assert_eq!(status["Uid"], ids);
        assert_eq!(status["Gid"], ids);
        assert_eq!(status["Groups"], "");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(
                status[set], "0000000000000000",
                "{set} of {}",
                status["Name"]
            );
        }
        assert_eq!(status["NoNewPrivs"], "1");
        assert_eq!(status["Seccomp"], "2", "{}", status["Name"]);
    }
    // Not dumpable: what is in /proc belongs to root, and not to the VMM's user.
    assert_eq!(fs::metadata(proc(&vmm, "maps")).unwrap().uid(), 0);
    for line in read(&vmm, "maps").lines() {
        let access = line.split(' ').nth(1).unwrap();
        assert!(!(access.contains('w') && access.contains('x')), "{line}");
    }
}

#[test]
fn a_running_vmm_sees_nothing_of_the_host() {
    let (vmm, _control) = running();
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let theirs = fs::read_link(proc(&vmm, &format!("ns/{namespace}"))).unwrap();
        let ours = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
        assert_ne!(theirs, ours);
    }
    assert_eq!(fs::read_dir(proc(&vmm, "root")).unwrap().count(), 0);
    let written = fs::write(proc(&vmm, "root/file"), "").unwrap_err();
    assert_eq!(written.kind(), ErrorKind::ReadOnlyFilesystem);
    let mounts = read(&vmm, "mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let options = mounts.split(' ').nth(5).unwrap();
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(options.split(',').any(|o| o == option), "{mounts}");
    }
    assert_eq!(read(&vmm, "environ"), "");
    assert_eq!(read(&vmm, "net/dev").lines().skip(2).count(), 1);
    // The first and only process of its PID namespace.
    assert!(statuses(&vmm)[0]["NSpid"].ends_with("\t1"));
}

#[test]
fn a_running_vmm_has_the_descriptors_that_it_was_given_and_made() {
    let (vmm, _control) = running();
    for entry in fs::read_dir(proc(&vmm, "fd")).unwrap() {
        let entry = entry.unwrap();
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let target = fs::read_link(entry.path()).unwrap();
        let target = target.to_str().unwrap();
        let expected = match number {
            0..=2 => target == "/dev/null",
            3 => target.starts_with("socket:"),
            _ => {
                target == "/dev/kvm"
                    || ["anon_inode:", "pipe:", "/memfd:"]
                        .iter()
                        .any(|kind| target.starts_with(kind))
            }
        };
        assert!(expected, "{number} is {target}");
    }
    let limits = read(&vmm, "limits");
    for (name, value) in [
        ("Max core file size", "1"),
        ("Max open files", "8192"),
        ("Max processes", "256"),
    ] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let values: Vec<&str> = line[name.len()..].split_whitespace().collect();
        assert_eq!(values[..2], [value, value], "{line}");
    }
}

#[test]
fn a_running_vmm_ends_with_its_control_socket() {
    let (mut vmm, control) = running();
    drop(control);
    let mut ended = [PollFd::new(vmm.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut ended, PollTimeout::from(30_000u16)), Ok(1));
    assert!(matches!(vmm.try_wait().unwrap(), Some(Exit::Code(_))));
}
