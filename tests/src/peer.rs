//! The part that containerd plays for a shim, so that the same test can ask any shim the same things and see all of its answers:
//! bundles, `start` and `delete`, the event service, the Task service's client.
//!
//! Nothing stands between: no client of containerd that hides an error's code, no daemon that repairs an order of events.

mod bundle;
mod events;
mod task;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

pub use bundle::{Bundle, Kind, Stream, Streams};
pub use events::Events;
pub use task::{Paths, Shim, V3, code, mount};

use crate::ctr::Runtime;
use crate::error::{Context, Error, Result};
use crate::oci;
use crate::site::Site;

/// Longer than any single thing takes, on an emulated node with other work to do.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The namespace of all tasks, the one that `ctr` uses too.
pub const NAMESPACE: &str = "default";

/// A containerd, as far as one shim and its tasks see it.
#[derive(Debug)]
pub struct Peer {
    runtime: Runtime,
    program: PathBuf,
    environment: Vec<(&'static str, std::ffi::OsString)>,
    directory: TempDir,
    /// By which name it calls the Task service.
    service: &'static str,
    /// Where shims are told that they find the event service.
    publisher: PathBuf,
    /// The files of the test image `busybox`.
    image: PathBuf,
    /// What the shim tells.
    pub events: Events,
}

impl Peer {
    /// Plays containerd 1.6 for the shim of `runtime`.
    pub fn new(site: &Site, runtime: Runtime) -> Result<Self> {
        let directory = TempDir::new_in(&site.directory).or_cannot(format!(
            "create a directory in {}",
            site.directory.display()
        ))?;
        let image = site.directory.join("busybox");
        if !image.exists() {
            let unpacked = directory.path().join("busybox");
            oci::unpack(&site.images.join("busybox.tar"), &unpacked)?;
            fs::rename(&unpacked, &image).or_cannot(format!("make {}", image.display()))?;
        }
        let program = match runtime {
            Runtime::Bulkhead => site.payload.join("bin/containerd-shim-bulkhead-v2"),
            Runtime::Runc => "/usr/bin/containerd-shim-runc-v2".into(),
        };
        let publisher = directory.path().join("containerd.sock.ttrpc");
        Ok(Self {
            events: Events::serve(&publisher)?,
            publisher,
            service: task::V2,
            environment: site.environment()?,
            runtime,
            program,
            directory,
            image,
        })
    }

    /// Calls the Task service by another name.
    pub fn speaking(self, service: &'static str) -> Self {
        Self { service, ..self }
    }

    /// Tells shims that the event service is elsewhere.
    pub fn misdirect(mut self, publisher: impl Into<PathBuf>) -> Self {
        self.publisher = publisher.into();
        self
    }

    /// Which shim it is.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// The directory with the files of the test image `busybox`.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// A path in a directory of its own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `start` in a bundle, in the words of containerd 1.6, and a connection to the shim that it names.
    pub fn start(&self, bundle: &Bundle) -> Result<Shim> {
        let output = self.call(bundle, &["start"])?;
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if !output.status.success() || !output.stderr.is_empty() {
            return Err(Error::Unfit(format!(
                "start: {}: {:?} {:?}",
                output.status,
                said(&output.stdout),
                said(&output.stderr)
            )));
        }
        Shim::connect(&said(&output.stdout), self.service)
    }

    /// Another connection to a shim, as a containerd makes it that has come back.
    pub fn find(&self, bundle: &Bundle) -> Result<Shim> {
        let path = bundle.path.join("address");
        let address = fs::read_to_string(&path).or_cannot(format!("read {}", path.display()))?;
        Shim::connect(&address, self.service)
    }

    /// Cleans up by `delete`, as containerd does after a shim that is gone: all containers of which there are bundles.
    pub fn delete_all(&self) -> Result<()> {
        let bundles = self.path("bundles");
        let reading = || format!("read {}", bundles.display());
        for entry in fs::read_dir(&bundles).or_cannot(reading())? {
            let id = entry.or_cannot(reading())?.file_name();
            let bundle = self.half_made_bundle(&id.to_string_lossy())?;
            let path = bundle.path.display().to_string();
            self.call(&bundle, &["-bundle", &path, "delete"])?;
        }
        Ok(())
    }

    /// Runs the shim's program as containerd does: flags, directory, environment, process group.
    pub fn call(&self, bundle: &Bundle, action: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        command
            .args(["-namespace", NAMESPACE, "-address"])
            .arg(self.path("containerd.sock"))
            .args(["-publish-binary", "/usr/bin/containerd"])
            .args(["-id", &bundle.id])
            .args(action)
            // One that is gone is no place to be.
            .current_dir(if bundle.path.exists() {
                &bundle.path
            } else {
                Path::new("/")
            })
            .envs(self.environment.iter().cloned())
            .env("TTRPC_ADDRESS", &self.publisher)
            .stdin(Stdio::null());
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command.output().or_cannot("run the shim's program")
    }
}

/// Reads to the end in the background.
fn collect(mut source: impl Read + Send + 'static) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read until a failure shows more than the failure.
        let _ = source.read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    receiver
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).or_cannot(format!("write {}", path.display()))
}
