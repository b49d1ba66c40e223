//! A site: a containerd of its own, with Bulkhead, in one directory; whatever else runs on the host is left alone. The
//! same on the emulated node as on a host with good KVM.
//!
//! | below the site's directory | |
//! |---|---|
//! | `containerd.toml` | its configuration |
//! | `root/`, `state/` | containerd's directories |
//! | `containerd.sock` | where it listens |
//! | `containerd.pid`, `containerd.log` | its process, what it says |
//! | `layers/`, `scratch/` | Bulkhead's directories |
//!
//! Bulkhead's configuration is where it is expected: the host has a directory there that only this site sees.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal};

use crate::error::{Context, Error, Result};
use crate::{process, step};

/// The environment variable that names the site's directory to what runs in it.
const SITE: &str = "BULKHEAD_SITE";

/// The environment variable that names the directory with the build under test: `bin/`, `lib/`.
const PAYLOAD: &str = "BULKHEAD_PAYLOAD";

/// The environment variable that names the directory with the test images.
const IMAGES: &str = "BULKHEAD_IMAGES";

/// The containerd runtime type that leads to Bulkhead.
pub const RUNTIME: &str = "io.containerd.bulkhead.v2";

/// Where Bulkhead looks for its configuration.
const CONFIGURATION_DIRECTORY: &str = "/etc/bulkhead";

/// How long containerd may take until it serves: two seconds in emulation, more when the machine is busy.
const START_LIMIT: Duration = Duration::from_secs(120);

/// A site's places.
#[derive(Debug, Clone)]
pub struct Site {
    /// The site's own directory.
    pub directory: PathBuf,
    /// The build under test.
    pub payload: PathBuf,
    /// The test images, as OCI archives `NAME.tar`.
    pub images: PathBuf,
}

impl Site {
    /// The site that this process runs in.
    pub fn current() -> Result<Self> {
        let place = |name: &str| {
            env::var_os(name).map(PathBuf::from).ok_or_else(|| {
                Error::Unfit(format!(
                    "{name} is not set: this only runs on a node; see `make node` and `make test`"
                ))
            })
        };
        Ok(Self {
            directory: place(SITE)?,
            payload: place(PAYLOAD)?,
            images: place(IMAGES)?,
        })
    }

    /// Where containerd listens.
    pub fn address(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// What containerd said.
    pub fn log(&self) -> PathBuf {
        self.directory.join("containerd.log")
    }

    /// The environment of what runs in the site, containerd included.
    pub fn environment(&self) -> Result<Vec<(&'static str, OsString)>> {
        let mut path = vec![self.payload.join("bin")];
        path.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
        let path = env::join_paths(path)
            .map_err(|error| Error::Unfit(format!("PATH cannot hold {error}")))?;
        Ok(vec![
            ("PATH", path),
            (
                "BULKHEAD_CONFIG",
                self.directory.join("bulkhead.toml").into(),
            ),
            ("CONTAINERD_ADDRESS", self.address().into()),
            (SITE, self.directory.clone().into()),
            (PAYLOAD, self.payload.clone().into()),
            (IMAGES, self.images.clone().into()),
        ])
    }

    /// Makes the site: containerd serves, and has the image `localhost/busybox:latest`.
    pub fn set_up(&self) -> Result<()> {
        create(&self.directory)?;
        self.configure()?;
        self.start()?;
        self.import("busybox")
    }

    /// Ends every task, and containerd.
    pub fn tear_down(&self) -> Result<()> {
        self.end_tasks()?;
        self.stop(Signal::TERM)
    }

    fn configure(&self) -> Result<()> {
        let directory = self.directory.display();
        let containerd = format!(
            r#"version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.restart",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{directory}/containerd.sock"
"#
        );
        write(&self.directory.join("containerd.toml"), &containerd)?;
        create(Path::new(CONFIGURATION_DIRECTORY))?;
        let bulkhead = self.configuration(&[]);
        write(
            &Path::new(CONFIGURATION_DIRECTORY).join("config.toml"),
            &bulkhead,
        )
    }

    /// The text of Bulkhead's configuration for this site, but for `changes`: keys, and values as TOML has them.
    pub fn configuration(&self, changes: &[(&str, &str)]) -> String {
        let file = |directory: &Path, name| format!("{:?}", directory.join(name));
        let mut settings = BTreeMap::from([
            ("vmm", file(&self.payload, "bin/bulkhead-vmm")),
            ("kernel", file(&self.payload, "lib/vmlinux")),
            ("image", file(&self.payload, "lib/rootfs.erofs")),
            ("cache_dir", file(&self.directory, "layers")),
            ("scratch_dir", file(&self.directory, "scratch")),
        ]);
        for (key, value) in changes {
            settings.insert(key, (*value).to_owned());
        }
        let lines = settings
            .iter()
            .map(|(key, value)| format!("{key} = {value}\n"));
        lines.collect()
    }

    /// Starts containerd and returns when it serves.
    pub fn start(&self) -> Result<()> {
        let notify = self.directory.join("notify.sock");
        // The last start's, if there was one.
        let _ = fs::remove_file(&notify);
        let socket =
            UnixDatagram::bind(&notify).or_cannot(format!("listen at {}", notify.display()))?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())
            .or_cannot(format!("open {}", self.log().display()))?;
        let errors = log.try_clone().or_cannot("duplicate a descriptor")?;
        let mut child = Command::new("containerd")
            .arg("--config")
            .arg(self.directory.join("containerd.toml"))
            .envs(self.environment()?)
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            // The terminal's Ctrl-C is not for it.
            .process_group(0)
            .spawn()
            .or_cannot("start containerd")?;
        write(&self.pid_file(), &child.id().to_string())?;

        let (ended, events) = channel();
        let ready = ended.clone();
        thread::spawn(move || {
            let _ = child.wait();
            let _ = ended.send(false);
        });
        thread::spawn(move || {
            let mut message = [0; 4096];
            while let Ok(length) = socket.recv(&mut message) {
                if message[..length].starts_with(b"READY=1") {
                    let _ = ready.send(true);
                }
            }
        });
        let how = match events.recv_timeout(START_LIMIT) {
            Ok(true) => return Ok(()),
            Ok(false) => "ended before it served",
            Err(_) => "did not come up in time",
        };
        Err(Error::Step {
            step: "containerd".into(),
            cause: format!("it {how}; its last lines:\n{}", step::tail(&self.log(), 20)),
            log: self.log(),
        })
    }

    /// Ends containerd by `signal` and returns when it is gone. Containers go on.
    pub fn stop(&self, signal: Signal) -> Result<()> {
        process::kill(self.containerd()?, signal)?;
        let path = self.pid_file();
        fs::remove_file(&path).or_cannot(format!("remove {}", path.display()))
    }

    /// The process of the containerd that runs.
    pub fn containerd(&self) -> Result<Pid> {
        let path = self.pid_file();
        let text = fs::read_to_string(&path).or_cannot(format!("read {}", path.display()))?;
        text.parse()
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| Error::Unfit(format!("{} holds {text:?}, no process", path.display())))
    }

    fn pid_file(&self) -> PathBuf {
        self.directory.join("containerd.pid")
    }

    /// Imports the test image `name` into the current namespace, as `localhost/NAME:latest`.
    pub fn import(&self, name: &str) -> Result<()> {
        let archive = self.images.join(name).with_extension("tar");
        let mut command = Command::new("ctr");
        command
            .args(["image", "import"])
            .arg(archive)
            .envs(self.environment()?);
        process::output(&mut command).map(drop)
    }

    fn end_tasks(&self) -> Result<()> {
        let environment = self.environment()?;
        let ctr = |arguments: &[&str]| {
            let mut command = Command::new("ctr");
            process::output(command.args(arguments).envs(environment.iter().cloned()))
        };
        for namespace in ctr(&["namespace", "list", "--quiet"])?.lines() {
            for task in ctr(&["-n", namespace, "task", "list", "--quiet"])?.lines() {
                ctr(&["-n", namespace, "task", "delete", "--force", task])?;
            }
        }
        Ok(())
    }
}

fn create(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).or_cannot(format!("create {}", directory.display()))
}

fn write(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).or_cannot(format!("write {}", path.display()))
}
