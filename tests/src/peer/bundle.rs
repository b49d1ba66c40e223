//! Bundles, as containerd makes them, and the other ends of their containers' standard streams.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::thread;

use rustix::fs::{FileType, Mode, mknodat};
use serde_json::{Value, json};

use super::{NAMESPACE, PATIENCE, Paths, Peer, collect, write};
use crate::error::{Context, Error, Result};

/// What a container is to its pod.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a> {
    /// It has none.
    Single,
    /// It is the sandbox of the pod that has its name.
    Sandbox,
    /// It is in the pod of this name.
    Member(&'a str),
}

/// A bundle.
#[derive(Debug)]
pub struct Bundle {
    /// The container's identifier.
    pub id: String,
    /// Its directory.
    pub path: PathBuf,
    /// The options of the overlay that is its root file system.
    pub overlay: Vec<String>,
    /// Keeps writers from waiting for a reader, as containerd does.
    _log: File,
}

/// The process of a specification.
pub(super) fn process(args: &[&str]) -> Value {
    let capabilities = ["CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETUID"];
    json!({
        "args": args,
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/bin"],
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        },
    })
}

impl Peer {
    /// A bundle whose container runs a program; `change` may change its specification.
    pub fn bundle(
        &self,
        id: &str,
        kind: Kind,
        args: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Result<Bundle> {
        let bundle = self.half_made_bundle(id)?;
        let annotations = match kind {
            Kind::Single => json!({}),
            Kind::Sandbox => json!({
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": id,
            }),
            Kind::Member(pod) => json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": pod,
            }),
        };
        let mut config = json!({
            "ociVersion": "1.0.2",
            "hostname": "peer",
            "root": {"path": "rootfs"},
            "process": process(args),
            "annotations": annotations,
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{NAMESPACE}/{id}"),
                "namespaces": [
                    {"type": "mount"}, {"type": "pid"}, {"type": "network"}, {"type": "ipc"},
                    {"type": "uts"}, {"type": "cgroup"},
                ],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        });
        change(&mut config);
        write(
            &bundle.path.join("config.json"),
            config.to_string().as_bytes(),
        )?;
        Ok(bundle)
    }

    /// A bundle that containerd has only begun to make: there is no specification yet.
    pub fn half_made_bundle(&self, id: &str) -> Result<Bundle> {
        let path = self.path("bundles").join(id);
        let create =
            |path: &Path| fs::create_dir_all(path).or_cannot(format!("create {}", path.display()));
        create(&path.join("rootfs"))?;
        let layer = |name| {
            let path = self.path("layers").join(id).join(name);
            create(&path).map(|()| path)
        };
        let overlay = vec![
            "index=off".into(),
            format!("workdir={}", layer("work")?.display()),
            format!("upperdir={}", layer("fs")?.display()),
            format!("lowerdir={}", self.image.display()),
        ];
        let log = path.join("log");
        if !log.exists() {
            fifo(&log)?;
        }
        let _log = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&log)
            .or_cannot(format!("open {}", log.display()))?;
        let reader = _log.try_clone().or_cannot("duplicate a descriptor")?;
        thread::spawn(move || show_log(reader));
        Ok(Bundle {
            id: id.into(),
            path,
            overlay,
            _log,
        })
    }

    /// New FIFOs for standard output and error, and for standard input if there is some.
    pub fn streams(&self, name: &str, input: Option<&[u8]>) -> Result<Streams> {
        let make = |kind: &str| -> Result<PathBuf> {
            let path = self.path(&format!("{name}-{kind}"));
            fifo(&path)?;
            Ok(path)
        };
        let mut paths = Paths::default();
        if let Some(input) = input {
            let path = make("stdin")?;
            paths.stdin = path.display().to_string();
            let input = input.to_owned();
            thread::spawn(move || feed(&path, &input));
        }
        let output = |kind, place: &mut String| -> Result<Stream> {
            let path = make(kind)?;
            *place = path.display().to_string();
            Ok(Stream::read(Lazy {
                path: Some(path),
                file: None,
            }))
        };
        let stdout = output("stdout", &mut paths.stdout)?;
        let stderr = output("stderr", &mut paths.stderr)?;
        Ok(Streams {
            paths,
            stdout,
            stderr,
        })
    }

    /// A new FIFO for output, open for reading, which nobody reads.
    pub fn unread(&self, name: &str) -> Result<(String, File)> {
        let path = self.path(&format!("{name}-unread"));
        fifo(&path)?;
        // Writable too, so that it opens at once and blocks when it is read; a second descriptor is the one to read.
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let both = opened.or_cannot(format!("open {}", path.display()))?;
        let reader = File::open(&path).or_cannot(format!("open {}", path.display()))?;
        drop(both);
        Ok((path.display().to_string(), reader))
    }

    /// A new FIFO for a terminal's output, and one for its input.
    pub fn terminal(&self, name: &str, input: &[u8]) -> Result<Streams> {
        let mut streams = self.streams(name, Some(input))?;
        streams.paths.terminal = true;
        streams.paths.stderr = String::new();
        Ok(streams)
    }
}

/// FIFOs at work: what their reader and their writer are.
#[derive(Debug)]
pub struct Streams {
    /// Where they are.
    pub paths: Paths,
    /// Standard output's reader.
    pub stdout: Stream,
    /// Standard error's reader.
    pub stderr: Stream,
}

/// A FIFO that is read to its end.
#[derive(Debug)]
pub struct Stream(Receiver<Vec<u8>>);

impl Stream {
    /// Reads from now on.
    pub fn read(source: impl Read + Send + 'static) -> Self {
        Self(collect(source))
    }

    /// All that came, once it has ended.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        self.0
            .recv_timeout(PATIENCE)
            .map_err(|_| Error::Unfit("a standard stream does not end".into()))
    }

    /// The same as text.
    pub fn text(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned())
    }
}

/// Opens the FIFO when it is read: opening waits for the other side.
struct Lazy {
    path: Option<PathBuf>,
    file: Option<File>,
}

impl Read for Lazy {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if let Some(path) = self.path.take() {
            self.file = Some(File::open(path)?);
        }
        self.file.as_mut().map_or(Ok(0), |file| file.read(buffer))
    }
}

fn feed(path: &Path, input: &[u8]) {
    let opened = OpenOptions::new().write(true).open(path);
    // A process that does not read it to the end breaks it, which is its right.
    let _ = opened.and_then(|mut file| file.write_all(input));
}

fn fifo(path: &Path) -> Result<()> {
    mknodat(
        rustix::fs::CWD,
        path,
        FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .or_cannot(format!("make {}", path.display()))
}

/// Passes on what a shim logs, for whoever reads of a failed test.
fn show_log(log: File) {
    for line in BufReader::new(log).lines().map_while(Result::ok) {
        eprintln!("shim: {line}");
    }
}
