//! The emulated node: a machine with AMD-V in software, in which microVMs run wherever QEMU runs.
//!
//! Its disk is built once, from Debian packages, and never written: each run starts from the same state. What is to be
//! tried comes in on a second disk. A run is one command, with the node's virtio-serial ports as its standard streams (or
//! the virtio console as its terminal); a port more tells how it ended. No network stands between, so it all works just
//! as well when the node's clock counts instructions instead of time.

use std::env;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write, stderr, stdin, stdout};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::error::{Context, Error, Result};
use crate::terminal::{self, Raw};
use crate::{cache, debian, step};

/// Packages that the host needs for the node.
const HOST_PACKAGES: [&str; 5] = [
    "e2fsprogs",
    "erofs-utils",
    "mmdebstrap",
    "qemu-system-x86",
    "xz-utils",
];

/// Size of the node's root file system: a sparse file, so that it costs only what is in it.
const ROOT_BYTES: u64 = 16 << 30;

/// How much of the console an error shows.
const CONSOLE_LINES: usize = 30;

/// What QEMU says of each of EPYC's features that it does not emulate: nothing that explains a failure.
const EMULATION: &str = "warning: TCG doesn't support requested feature";

/// What a run of the node is told.
#[derive(Debug)]
pub struct Run<'a> {
    /// An EROFS image with `init`, `command` and whatever the command needs, at /bulkhead in the node.
    pub payload: &'a Path,
    /// An EROFS image with the test images, at /images.
    pub images: &'a Path,
    /// A directory of the host for /share, writable from both sides.
    pub share: Option<&'a Path>,
    /// Whether the command gets our terminal instead of our standard streams.
    pub terminal: bool,
    /// Whether the node's clock counts instructions, 4 ns each, instead of time.
    pub counting: bool,
    /// After how long the node is given up.
    pub limit: Option<Duration>,
    /// Where the console's output goes.
    pub console: &'a Path,
}

/// Builds the node's files, unless the cache has them, and returns their directory.
pub fn build() -> Result<PathBuf> {
    debian::install(&HOST_PACKAGES)?;
    let packages = include_str!("../node/packages");
    let inputs = [
        debian::SUITE,
        packages,
        include_str!("../node/customize"),
        include_str!("../node/initrd-init"),
    ];
    cache::entry("node", &inputs, |directory| {
        let script = debian::source_directory().join("tests/node/customize");
        let mut hooks = vec![script.display().to_string()];
        for file in ["vmlinux", "initrd", "root.ext4"] {
            hooks.push(format!(
                "download /node/{file} {}/{file}",
                directory.display()
            ));
        }
        let include = packages.split_whitespace().collect::<Vec<_>>().join(",");
        let nowhere = Path::new("/dev/null");
        debian::mmdebstrap("node image", "essential", &include, &hooks, nowhere)?;
        let root = directory.join("root.ext4");
        OpenOptions::new()
            .write(true)
            .open(&root)
            .and_then(|file| file.set_len(ROOT_BYTES))
            .or_cannot(format!("extend {}", root.display()))?;
        step::run(
            "node disk",
            Command::new("fallocate").arg("--dig-holes").arg(&root),
        )?;
        step::run("node disk", Command::new("resize2fs").arg(&root)).map(drop)
    })
}

impl Run<'_> {
    /// Boots the node whose files are in `files`, runs the payload's command in it and returns its exit code.
    pub fn run(&self, files: &Path) -> Result<u8> {
        let mut machine = Machine::new(self, files);
        let mut control = BufReader::new(machine.port("control")?);
        control
            .get_ref()
            .set_read_timeout(self.limit)
            .or_cannot("set a time limit")?;
        let mut outputs = Vec::new();
        let input = if self.terminal {
            let (rows, columns) = terminal::size()?;
            let kind = env::var("TERM").unwrap_or_else(|_| "linux".into());
            machine.parameter(&format!(
                "node.rows={rows} node.columns={columns} node.term={kind}"
            ));
            let console = machine.console()?;
            let input = console.try_clone().or_cannot("duplicate a socket")?;
            outputs.push(thread::spawn(|| copy(console, stdout())));
            input
        } else {
            let (output, error) = (machine.port("stdout")?, machine.port("stderr")?);
            outputs.push(thread::spawn(|| copy(output, stdout())));
            outputs.push(thread::spawn(|| copy(error, stderr())));
            machine.port("stdin")?
        };
        let mut qemu = machine.start()?;
        let code = self.command(&mut qemu, &mut control, &input);
        // What the node has written by now lies in our sockets: the copying ends when it has been read.
        let stopped = qemu.kill().and_then(|()| qemu.wait());
        for output in outputs {
            let _ = output.join();
        }
        stopped.or_cannot("stop QEMU")?;
        code
    }

    /// Feeds the command, from its start to its end.
    fn command(
        &self,
        qemu: &mut Child,
        control: &mut impl BufRead,
        input: &UnixStream,
    ) -> Result<u8> {
        let line = self.line(qemu, control)?;
        if line != "ready" {
            return Err(self.broken(format!("it said {line:?} instead of being ready")));
        }
        let _raw = if self.terminal {
            Some(Raw::new()?)
        } else {
            None
        };
        let mut input = input.try_clone().or_cannot("duplicate a socket")?;
        // Ends with this process: nobody can take back what it waits for, our standard input.
        thread::spawn(move || {
            copy(stdin(), &mut input);
            let _ = input.shutdown(Shutdown::Write);
        });
        let line = self.line(qemu, control)?;
        let code = line
            .strip_prefix("exit ")
            .and_then(|code| code.parse().ok());
        code.ok_or_else(|| self.broken(format!("it said {line:?} instead of an exit code")))
    }

    /// The next thing that the node says.
    fn line(&self, qemu: &mut Child, control: &mut impl BufRead) -> Result<String> {
        let mut line = String::new();
        let cause = match control.read_line(&mut line) {
            Ok(0) => match qemu.wait() {
                Ok(status) => format!("QEMU ended with {status}"),
                Err(error) => format!("QEMU is lost: {error}"),
            },
            Ok(_) => return Ok(line.trim_end().to_owned()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let seconds = self.limit.unwrap_or_default().as_secs();
                format!("it took longer than {seconds} s")
            }
            Err(error) => format!("its control port failed: {error}"),
        };
        Err(self.broken(cause))
    }

    fn broken(&self, cause: String) -> Error {
        Error::Node {
            cause,
            console: step::tail(self.console, CONSOLE_LINES)
                .lines()
                .filter(|line| !line.contains(EMULATION))
                .map(|line| format!("  {line}\n"))
                .collect(),
        }
    }
}

/// QEMU before its start.
struct Machine<'a> {
    command: Command,
    console: &'a Path,
    parameters: String,
    /// QEMU's ends of the ports, open until it runs.
    ends: Vec<UnixStream>,
}

impl<'a> Machine<'a> {
    fn new(run: &Run<'a>, files: &Path) -> Self {
        // The node's processor dies with us, whatever happens to us.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"]);
        command.args(["-accel", "tcg,thread=single", "-machine", "q35"]);
        // One processor: with more, the emulation of nested virtualization is not stable.
        command.args(["-cpu", "EPYC,+svm,+npt", "-smp", "1", "-m", "4096"]);
        command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        let mut parameters = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable \
                              no_timer_check"
            .to_owned();
        command.arg("-kernel").arg(files.join("vmlinux"));
        command.arg("-initrd").arg(files.join("initrd"));
        command.arg("-drive").arg(format!(
            "file={},if=virtio,format=raw,snapshot=on",
            option(&files.join("root.ext4"))
        ));
        for image in [run.payload, run.images] {
            command.arg("-drive").arg(format!(
                "file={},if=virtio,format=raw,readonly=on",
                option(image)
            ));
        }
        command.args(["-device", "virtio-serial-pci"]);
        command.arg("-chardev").arg(format!(
            "file,id=kernel,append=on,path={}",
            option(run.console)
        ));
        command.args(["-serial", "chardev:kernel"]);
        if run.counting {
            command.args(["-icount", "shift=2,sleep=off"]);
            parameters += " node.counting";
        } else {
            command.args(["-nic", "user,model=virtio-net-pci"]);
            parameters += " node.network";
            // QEMU 7.2 computes the flags that cmpxchg16b leaves alone from others than the last ones, so that a kernel which is
            // interrupted there goes on with flags that no processor has, once in some hundred boots under load. Counting is one
            // boot at a time, and of what real processors do.
            parameters += " clearcpuid=cx16";
        }
        if let Some(share) = run.share {
            command.arg("-virtfs").arg(format!(
                "local,path={},mount_tag=share,security_model=none",
                option(share)
            ));
            parameters += " node.share";
        }
        Self {
            command,
            console: run.console,
            parameters,
            ends: Vec::new(),
        }
    }

    /// Adds to the kernel's command line.
    fn parameter(&mut self, parameter: &str) {
        self.parameters += " ";
        self.parameters += parameter;
    }

    /// Adds a port that the node finds at /dev/virtio-ports/NAME, and returns our end of it.
    fn port(&mut self, name: &str) -> Result<UnixStream> {
        self.channel(name, &format!("virtserialport,name={name}"))
    }

    /// Adds a console, and returns our end of it.
    fn console(&mut self) -> Result<UnixStream> {
        self.channel("terminal", "virtconsole")
    }

    fn channel(&mut self, name: &str, device: &str) -> Result<UnixStream> {
        let (ours, qemus) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::empty(),
            None,
        )
        .or_cannot("create a socket pair")?;
        fcntl_setfd(&ours, FdFlags::CLOEXEC).or_cannot("set up a socket pair")?;
        let qemus = UnixStream::from(qemus);
        let descriptor = qemus.as_raw_fd();
        self.command
            .arg("-chardev")
            .arg(format!("socket,id={name},fd={descriptor}"))
            .arg("-device")
            .arg(format!("{device},chardev={name}"));
        self.ends.push(qemus);
        Ok(UnixStream::from(ours))
    }

    fn start(mut self) -> Result<Child> {
        // QEMU's complaints (a feature that the emulation lacks, a file that is not there) stand before the console's.
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.console)
            .or_cannot(format!("create {}", self.console.display()))?;
        self.command
            .arg("-append")
            .arg(&self.parameters)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .or_cannot("start QEMU")
    }
}

/// A path as QEMU's options want it.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Copies until either side ends; what is written is seen at once.
fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                if to
                    .write_all(&buffer[..length])
                    .and_then(|()| to.flush())
                    .is_err()
                {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
