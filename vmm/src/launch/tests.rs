//! Launches a process and reads in `/proc` what the kernel says of it.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use super::*;
use crate::testing::own_descriptors;

/// A whole program: says on the control socket that it runs, reads from it until the other end closes, and exits with 0.
const CODE: [u8; 45] = [
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1 (write)
    0xbf, 0x03, 0x00, 0x00, 0x00, // mov edi, 3
    0x89, 0xc2, // mov edx, eax
    0x48, 0x89, 0xe6, // mov rsi, rsp
    0x0f, 0x05, // syscall
    0x31, 0xc0, // again: xor eax, eax (read)
    0xba, 0x40, 0x00, 0x00, 0x00, // mov edx, 64
    0x48, 0x8d, 0x74, 0x24, 0xc0, // lea rsi, [rsp - 64]
    0x0f, 0x05, // syscall
    0x85, 0xc0, // test eax, eax
    0x7f, 0xee, // jg again
    0xb8, 0xe7, 0x00, 0x00, 0x00, // mov eax, 231 (exit_group)
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
    0xf4, // hlt
];

const CODE_ADDRESS: u64 = 0x40_0000 + 120;

/// `CODE` as an ELF executable of one segment.
fn executable() -> Vec<u8> {
    let length = 120 + CODE.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2u16, 62] {
        elf.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    elf.extend(1u32.to_le_bytes());
    for long in [CODE_ADDRESS, 64, 0] {
        elf.extend(long.to_le_bytes()); // entry, program headers, section headers
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [1u32, 5] {
        elf.extend(word.to_le_bytes()); // PT_LOAD, readable and executable
    }
    for long in [0, 0x40_0000, 0x40_0000, length, length, 0x1000] {
        elf.extend(long.to_le_bytes());
    }
    elf.extend(CODE);
    elf
}

/// A file of its own for each test, removed with its directory. Nobody but the test's thread, and those that it starts afterwards,
/// has it open for writing, as it then could not be executed.
struct Program {
    directory: PathBuf,
}

impl Program {
    fn new(name: &str, content: &[u8], mode: u32) -> Self {
        own_descriptors();
        let directory = std::env::temp_dir().join(format!("launch-{}-{name}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let program = Self { directory };
        fs::write(program.path(), content).unwrap();
        fs::set_permissions(program.path(), Permissions::from_mode(mode)).unwrap();
        program
    }

    fn path(&self) -> PathBuf {
        self.directory.join("vmm")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

fn launched(name: &str) -> (Vmm, Channel, Program) {
    let program = Program::new(name, &executable(), 0o755);
    let (vmm, channel) = run(&program);
    (vmm, channel, program)
}

fn run(program: &Program) -> (Vmm, Channel) {
    let uid = unique_uid(DEFAULT_UID_BASE).unwrap();
    let (vmm, channel) = launch(&program.path(), uid).unwrap();
    // The kernel lets the parent go on when the execution cannot fail any more, which is before it is done.
    recv(channel.as_raw_fd(), &mut [0], MsgFlags::empty()).unwrap();
    (vmm, channel)
}

fn proc(vmm: &Vmm, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{file}", vmm.pid()))
}

fn status(vmm: &Vmm) -> BTreeMap<String, String> {
    fs::read_to_string(proc(vmm, "status"))
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

/// Waits until the process has ended.
fn ended(vmm: &mut Vmm) -> Exit {
    let mut descriptors = [PollFd::new(vmm.process.as_fd(), PollFlags::POLLIN)];
    poll(&mut descriptors, PollTimeout::from(30_000u16)).unwrap();
    vmm.try_wait().unwrap().expect("still runs after 30 s")
}

#[test]
fn it_has_a_user_of_its_own_and_no_privilege() {
    let (vmm, _channel, _program) = launched("status");
    let uid = DEFAULT_UID_BASE + std::process::id();
    let status = status(&vmm);
    let ids = format!("{uid}\t{uid}\t{uid}\t{uid}");
    assert_eq!(status["Uid"], ids);
    assert_eq!(status["Gid"], ids);
    assert_eq!(status["Groups"], "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["Threads"], "1");
}

#[test]
fn no_signal_is_blocked_ignored_or_handled() {
    let (vmm, _channel, _program) = launched("signals");
    let status = status(&vmm);
    for mask in ["SigBlk", "SigIgn", "SigCgt"] {
        assert_eq!(status[mask], "0000000000000000", "{mask}");
    }
    // The shim's own thread is as it was.
    let own = fs::read_to_string("/proc/thread-self/status").unwrap();
    assert!(own.contains("SigBlk:\t0000000000000000\n"), "{own}");
}

#[test]
fn its_namespaces_are_its_own() {
    let (vmm, _channel, _program) = launched("namespaces");
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let theirs = fs::read_link(proc(&vmm, &format!("ns/{namespace}"))).unwrap();
        let ours = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
        assert_ne!(theirs, ours);
    }
    assert!(status(&vmm)["NSpid"].ends_with("\t1"));
    // Only the loopback device, and that is down.
    let devices = fs::read_to_string(proc(&vmm, "net/dev")).unwrap();
    assert_eq!(devices.lines().skip(2).count(), 1, "{devices}");
    assert_eq!(fs::read_to_string(proc(&vmm, "net/fib_trie")).unwrap(), "");
}

#[test]
fn its_root_is_empty_and_read_only() {
    let (vmm, _channel, _program) = launched("root");
    assert_eq!(fs::read_dir(proc(&vmm, "root")).unwrap().count(), 0);
    assert_eq!(
        fs::read_link(proc(&vmm, "cwd")).unwrap(),
        PathBuf::from("/")
    );
    let mounts = fs::read_to_string(proc(&vmm, "mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let fields: Vec<&str> = mounts.split(' ').collect();
    assert_eq!(fields[3..5], ["/", "/"]);
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(fields[5].split(',').any(|o| o == option), "{mounts}");
    }
    // Even for root, from outside.
    let written = fs::write(proc(&vmm, "root/file"), "").unwrap_err();
    assert_eq!(written.kind(), ErrorKind::ReadOnlyFilesystem);
    // The host's mounts are as they were.
    assert!(PathBuf::from("/proc/self/mountinfo").exists());
}

#[test]
fn it_has_four_descriptors() {
    let (vmm, channel, _program) = launched("descriptors");
    let mut descriptors: Vec<(String, String)> = fs::read_dir(proc(&vmm, "fd"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let target = fs::read_link(entry.path()).unwrap();
            (
                entry.file_name().into_string().unwrap(),
                target.to_string_lossy().into_owned(),
            )
        })
        .collect();
    descriptors.sort();
    assert_eq!(descriptors.len(), 4, "{descriptors:?}");
    for (index, (number, target)) in descriptors.iter().enumerate() {
        assert_eq!(*number, index.to_string());
        match index {
            0..=2 => assert_eq!(target, "/dev/null"),
            _ => assert!(target.starts_with("socket:"), "{target}"),
        }
    }
    let ours = fs::read_link(format!("/proc/thread-self/fd/{}", channel.as_raw_fd())).unwrap();
    assert_ne!(ours, PathBuf::from(&descriptors[3].1));
}

#[test]
fn it_has_limits_a_session_and_no_environment() {
    let (vmm, _channel, _program) = launched("limits");
    assert_eq!(fs::read(proc(&vmm, "environ")).unwrap(), b"");
    assert_eq!(fs::read(proc(&vmm, "cmdline")).unwrap(), b"bulkhead-vmm\0");
    assert_eq!(fs::read(proc(&vmm, "oom_score_adj")).unwrap(), b"0\n");
    let limits = fs::read_to_string(proc(&vmm, "limits")).unwrap();
    for (name, value) in [
        ("Max core file size", "1"),
        ("Max open files", "8192"),
        ("Max processes", "256"),
        ("Max locked memory", "0"),
        ("Max msgqueue size", "0"),
        ("Max file size", "unlimited"),
    ] {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let values: Vec<&str> = line[name.len()..].split_whitespace().collect();
        assert_eq!(values[..2], [value, value], "{line}");
    }
    // Fields 5 and 6 of stat, counted from the pid: process group and session.
    let stat = fs::read_to_string(proc(&vmm, "stat")).unwrap();
    let after: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
    assert_eq!(after[2..4], [vmm.pid().to_string(), vmm.pid().to_string()]);
}

#[test]
fn it_ends_with_its_control_socket() {
    let (mut vmm, channel, _program) = launched("control");
    assert_eq!(vmm.try_wait().unwrap(), None);
    drop(channel);
    assert_eq!(ended(&mut vmm), Exit::Code(0));
    // Having ended, it can be neither killed nor reaped again.
    vmm.kill().unwrap();
    assert_eq!(vmm.try_wait().unwrap(), Some(Exit::Code(0)));
}

#[test]
fn dropping_the_handle_kills_and_reaps_it() {
    let (vmm, _channel, _program) = launched("drop");
    let directory = proc(&vmm, "");
    assert!(directory.exists());
    drop(vmm);
    assert!(!directory.exists());
}

#[test]
fn the_end_of_the_thread_that_launched_it_kills_it() {
    let program = Program::new("thread", &executable(), 0o755);
    let launched = thread::scope(|scope| scope.spawn(|| run(&program)).join());
    let (mut vmm, _channel) = launched.unwrap();
    assert_eq!(ended(&mut vmm), Exit::Signal(Signal::SIGKILL));
    assert_eq!(
        Exit::Signal(Signal::SIGKILL).to_string(),
        "was killed by SIGKILL"
    );
}

#[test]
fn what_cannot_be_executed_names_the_step_and_the_cause() {
    let uid = unique_uid(DEFAULT_UID_BASE).unwrap();
    for (name, content, mode, errno) in [
        ("garbage", b"#!/nonexistent".to_vec(), 0o755, libc::ENOENT),
        ("other", b"\x7fELF\x01".to_vec(), 0o755, libc::ENOEXEC),
        ("private", executable(), 0o700, libc::EACCES),
    ] {
        let program = Program::new(name, &content, mode);
        match launch(&program.path(), uid).unwrap_err() {
            Error::Jail { step, source } => {
                assert_eq!(step, Step::Execute, "{name}");
                assert_eq!(source.raw_os_error(), Some(errno), "{name}");
            }
            other => panic!("{name}: {other}"),
        }
    }
    let missing = launch(Path::new("/nonexistent/vmm"), uid).unwrap_err();
    assert!(
        missing
            .to_string()
            .starts_with("cannot open the VMM /nonexistent/vmm: No such file")
    );
}

#[test]
fn root_is_refused() {
    for uid in [0, u32::MAX] {
        assert!(matches!(
            launch(Path::new("/nonexistent/vmm"), uid),
            Err(Error::Uid { .. })
        ));
    }
    assert!(unique_uid(u32::MAX).is_err());
}

#[test]
fn a_shim_that_may_not_make_namespaces_starts_nothing() {
    let program = Program::new("unprivileged", &executable(), 0o755);
    let path = program.path();
    // In a thread, because capabilities are a thread's.
    let error = thread::spawn(move || {
        let header = [0x2008_0522u32, 0];
        let none = [0u32; 6];
        // SAFETY: header and sets are laid out as version 3 of capset(2) reads them.
        let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
        assert_eq!(result, 0);
        launch(&path, unique_uid(DEFAULT_UID_BASE).unwrap()).unwrap_err()
    })
    .join()
    .unwrap();
    assert!(matches!(error, Error::Namespaces { .. }), "{error}");
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
}

#[test]
fn a_step_that_fails_in_the_jail_is_told_by_name() {
    let program = Program::new("steps", &executable(), 0o755);
    let path = program.path();
    // CAP_SYS_ADMIN alone makes the namespaces; the bounding set needs CAP_SETPCAP.
    let error = thread::spawn(move || {
        let header = [0x2008_0522u32, 0];
        let sys_admin = 1u32 << 21;
        let sets = [sys_admin, sys_admin, 0, 0, 0, 0];
        // SAFETY: header and sets are laid out as version 3 of capset(2) reads them.
        let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
        assert_eq!(result, 0);
        launch(&path, unique_uid(DEFAULT_UID_BASE).unwrap()).unwrap_err()
    })
    .join()
    .unwrap();
    assert_eq!(
        error.to_string(),
        "the VMM was not started, emptying the capability bounding set failed: Operation not permitted (os error 1); \
         the shim must run as root of the host with all capabilities"
    );
}

#[test]
fn every_step_is_found_by_its_number() {
    for (index, step) in Step::ALL.into_iter().enumerate() {
        assert_eq!(step as usize, index);
        assert!(!step.describe().is_empty() && !step.remedy().is_empty());
    }
}
