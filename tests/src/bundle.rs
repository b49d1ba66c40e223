//! Containers that are described by a whole `config.json`, for what no option of `ctr` says.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

use crate::error::{Context, Result};
use crate::process;

/// A container's root file system and its `config.json`, which the test changes as it likes. They disappear with it.
#[derive(Debug)]
pub struct Bundle {
    directory: PathBuf,
    /// The `config.json`: busybox's shell with a script, confined much as container engines do it.
    pub config: Value,
    /// What `ctr run` gets besides.
    pub options: Vec<&'static str>,
}

impl Bundle {
    /// Makes a bundle below `parent` whose first process is a shell that runs `script`.
    pub fn new(parent: &Path, script: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("bundle-{}-{number}", std::process::id());
        let directory = parent.join(&name);
        let root = directory.join("rootfs");
        for path in ["bin", "dev", "etc", "proc", "sys", "tmp", "var"] {
            let path = root.join(path);
            fs::create_dir_all(&path).or_cannot(format!("create {}", path.display()))?;
        }
        let busybox = root.join("bin/busybox");
        fs::copy("/bin/busybox", &busybox).or_cannot("copy busybox")?;
        let names = process::output(Command::new(&busybox).arg("--list"))?;
        for name in names.lines().filter(|&name| name != "busybox") {
            symlink("busybox", root.join("bin").join(name)).or_cannot(format!("link {name}"))?;
        }
        let users = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
        fs::write(root.join("etc/passwd"), users).or_cannot("write etc/passwd")?;
        Ok(Self {
            config: config(&root, &format!("/{name}"), script),
            options: Vec::new(),
            directory,
        })
    }

    /// The directory that becomes the container's root.
    pub fn root(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    /// The directory itself, for whatever else a test needs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Adds to a list in the configuration, named by a JSON pointer.
    pub fn add(&mut self, list: &str, value: Value) {
        if let Some(Value::Array(list)) = self.config.pointer_mut(list) {
            list.push(value);
        }
    }

    /// Writes the configuration, and returns where it is.
    pub fn write(&self) -> Result<PathBuf> {
        let path = self.directory.join("config.json");
        fs::write(&path, self.config.to_string()).or_cannot(format!("write {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("removing {}: {error}", self.directory.display());
        }
    }
}

fn config(root: &Path, cgroup: &str, script: &str) -> Value {
    let capabilities = [
        "CAP_AUDIT_WRITE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    ];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": root},
        "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": cgroup,
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}, {"type": "cgroup"},
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
