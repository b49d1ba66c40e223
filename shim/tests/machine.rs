//! Machines whose VMM is this executable: it runs in the real jail, speaks the real protocol, and does what the kernel
//! command line tells it, good or bad.

#![allow(
    clippy::unwrap_used,
    reason = "without a harness, clippy does not see that these are tests"
)]

use std::fs::{self, File};
use std::future::Future;
use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bulkhead_agent::protocol::AGENT_PORT;
use bulkhead_agent::protocol::sandbox::{SetupRequest, SetupResponse};
use bulkhead_agent::protocol::sandbox_ttrpc::{Sandbox, SandboxClient, create_sandbox};
use bulkhead_shim::disk::DiskFiles;
use bulkhead_shim::machine::{Error, Machine, MachineSpec, Reason, Stopped};
use bulkhead_vmm::control::{
    Channel, Dropped, Error as ControlError, Event, Extent, MAX_MESSAGE, Nic, Request, Sources,
    StopReason,
};
use bulkhead_vmm::launch::{DEFAULT_UID_BASE, Exit, unique_uid};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Server, TtrpcContext};

/// The program that runs as the VMM. Nobody sees it panic, but its exit code is then 101.
mod vmm {
    use super::*;

    pub fn main() {
        // SAFETY: the launcher put the control socket there, and this is the only place that takes it.
        let control = Channel::from(unsafe { OwnedFd::from_raw_fd(3) });
        let (request, descriptors) = control.receive().unwrap();
        let Request::Boot(boot) = request else {
            panic!("{request:?}");
        };
        let extents: usize = boot.disks.iter().map(|disk| disk.extents.len()).sum();
        assert_eq!(descriptors.len(), 3 + extents);
        let mut console = File::from(descriptors.into_iter().nth(2).unwrap());
        console
            .write_all(b"Linux version 6.12\r\n\x1b[31mVFS: no root\x1b[0m\n")
            .unwrap();
        let slots: Vec<u8> = (4..4 + boot.disks.len() as u8).collect();
        let started = Event::Started {
            slots: slots.clone(),
        };
        let say = |event: &Event, descriptors: &[BorrowedFd<'_>]| {
            control.send(event, descriptors).unwrap();
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Event::StreamOpened { port: AGENT_PORT };
        match boot.cmdline.as_str() {
            "agent" => return serve(&control, &started),
            "exit" => std::process::exit(7),
            "aborted" => std::process::abort(),
            "closed and exit" => {
                drop(control);
                std::process::exit(7);
            }
            "panicked" => say(
                &Event::Stopped {
                    reason: StopReason::Panic,
                },
                &[],
            ),
            "invalid" => say(
                &Event::Stopped {
                    reason: StopReason::Invalid("no\x1b[2J ELF\n".into()),
                },
                &[],
            ),
            "silent" => {}
            "closed" => {
                drop(control);
                thread::park();
                return;
            }
            "garbage" => raw(&control, &[0xff; 9], &[]),
            "empty" => raw(&control, &[], &[]),
            "long" => raw(&control, &vec![0; MAX_MESSAGE + 1], &[]),
            "few slots" => say(
                &Event::Started {
                    slots: slots[1..].to_vec(),
                },
                &[],
            ),
            "no such slot" => say(
                &Event::Started {
                    slots: vec![32; slots.len()],
                },
                &[],
            ),
            "same slot" => say(
                &Event::Started {
                    slots: vec![5; slots.len()],
                },
                &[],
            ),
            "started twice" => {
                say(&started, &[]);
                say(&started, &[]);
            }
            "early stream" => say(&agent, &[theirs.as_fd()]),
            "no descriptor" => {
                say(&started, &[]);
                say(&agent, &[]);
            }
            "two descriptors" => {
                say(&started, &[]);
                say(&agent, &[theirs.as_fd(), ours.as_fd()]);
            }
            "no stream" => {
                say(&started, &[]);
                say(&agent, &[console.as_fd()]);
            }
            "other port" => {
                say(&started, &[]);
                say(&Event::StreamOpened { port: 22 }, &[theirs.as_fd()]);
            }
            "unasked" => {
                say(&started, &[]);
                say(&Event::Attached { tag: 0, slot: 9 }, &[]);
            }
            other => panic!("{other}"),
        }
        // Until the shim closes the socket, or kills.
        while !matches!(control.receive::<Request>(), Err(ControlError::Closed)) {}
    }

    fn raw(control: &Channel, bytes: &[u8], control_messages: &[ControlMessage<'_>]) {
        sendmsg::<()>(
            control.as_raw_fd(),
            &[IoSlice::new(bytes)],
            control_messages,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }

    /// A VMM that behaves, with an agent.
    fn serve(control: &Channel, started: &Event) {
        control.send(started, &[]).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    agent(control);
                }
            });
            let mut next = 16;
            loop {
                let (request, mut descriptors) = match control.receive() {
                    Ok(received) => received,
                    Err(ControlError::Closed) => std::process::exit(0),
                    Err(error) => panic!("{error}"),
                };
                let answer = match request {
                    Request::AttachDisk { disk, .. } if disk.id == "exit" => std::process::exit(9),
                    Request::AttachDisk { tag, disk } if disk.id == "refuse" => Event::Refused {
                        tag,
                        error: "no \x07slot".into(),
                    },
                    Request::AttachDisk { tag, .. }
                    | Request::AttachNic { tag, .. }
                    | Request::AttachVsock { tag, .. } => {
                        next += 1;
                        Event::Attached {
                            tag,
                            slot: next - 1,
                        }
                    }
                    Request::UpdateNic { tag, slot: 99, .. } => Event::Refused {
                        tag,
                        error: "slot 99".into(),
                    },
                    Request::UpdateNic { tag, .. } => Event::NicUpdated {
                        tag,
                        dropped: Dropped {
                            spoofed: 7,
                            ..Dropped::default()
                        },
                    },
                    Request::Detach { tag, .. } => Event::Detached { tag },
                    Request::Connect { port } => {
                        let mut stream = UnixStream::from(descriptors.remove(0));
                        stream.set_nonblocking(false).unwrap();
                        if port == 7 {
                            scope.spawn(move || {
                                let mut text = Vec::new();
                                stream.read_to_end(&mut text).unwrap();
                                stream.write_all(&text).unwrap();
                            });
                        }
                        continue;
                    }
                    Request::Boot(_) => panic!("booted twice"),
                };
                control.send(&answer, &[]).unwrap();
            }
        });
    }

    /// Dials, and serves until it is told to hang up. Something else in the guest dials meanwhile, a thousand times.
    fn agent(control: &Channel) {
        let opened = Event::StreamOpened { port: AGENT_PORT };
        let (ours, theirs) = UnixStream::pair().unwrap();
        control.send(&opened, &[theirs.as_fd()]).unwrap();
        drop(theirs);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let hang_up = Arc::new(Notify::new());
            let connection = async move { Socket::try_from(ours) };
            let service = Arc::new(Guest(Arc::clone(&hang_up)));
            let mut server = Server::new()
                .add_listener(Listener::new(futures_util::stream::once(connection)))
                .register_service(create_sandbox(service));
            server.start().await.unwrap();
            for _ in 0..1000 {
                let (_ours, theirs) = UnixStream::pair().unwrap();
                control.send(&opened, &[theirs.as_fd()]).unwrap();
            }
            hang_up.notified().await;
        });
    }

    struct Guest(Arc<Notify>);

    #[async_trait::async_trait]
    impl Sandbox for Guest {
        async fn setup(
            &self,
            _context: &TtrpcContext,
            request: SetupRequest,
        ) -> ttrpc::Result<SetupResponse> {
            if request.hostname == "hang up" {
                self.0.notify_one();
                std::future::pending::<()>().await;
            }
            Ok(SetupResponse {
                agent_version: format!("for {}", request.hostname),
                ..Default::default()
            })
        }
    }
}

fn spec(cmdline: &str) -> MachineSpec {
    let executable = std::env::current_exe().unwrap();
    MachineSpec {
        vmm: executable.clone(),
        kernel: executable,
        image: image(),
        uid: unique_uid(DEFAULT_UID_BASE).unwrap(),
        vcpus: 2,
        memory_mib: 128,
        cmdline: cmdline.to_owned(),
        disks: vec![disk("scratch")],
        boot_timeout: Duration::from_secs(60),
        allow_foreign_sources: false,
    }
}

/// An image file that is good enough to be sent.
fn image() -> PathBuf {
    let path = std::env::temp_dir().join(format!("machine-{}.image", std::process::id()));
    fs::write(&path, [0; 1024]).unwrap();
    path
}

fn disk(id: &str) -> DiskFiles {
    let extent = Extent {
        offset: 0,
        length: 512,
    };
    DiskFiles {
        id: id.to_owned(),
        read_only: false,
        extents: vec![(File::open(image()).unwrap().into(), extent)],
    }
}

fn alive(pid: u32) -> bool {
    PathBuf::from(format!("/proc/{pid}")).exists()
}

async fn setup(client: &ttrpc::asynchronous::Client, hostname: &str) -> ttrpc::Result<String> {
    let request = SetupRequest {
        hostname: hostname.to_owned(),
        ..Default::default()
    };
    let response = SandboxClient::new(client.clone())
        .setup(
            ttrpc::context::with_duration(Duration::from_secs(60)),
            &request,
        )
        .await?;
    Ok(response.agent_version)
}

/// Starts a machine that must fail, and returns why it ended.
async fn failed(cmdline: &str) -> Arc<Stopped> {
    match Machine::start(spec(cmdline)).await {
        Err(Error::Stopped(stopped)) => stopped,
        other => panic!("{cmdline}: {other:?}"),
    }
}

async fn a_machine_is_used_and_stopped() {
    let machine = Machine::start(spec("agent")).await.unwrap();
    assert_eq!(machine.disk_slots(), [5]);
    let agent = machine.agent().unwrap();
    assert_eq!(setup(&agent.client, "one").await.unwrap(), "for one");

    assert_eq!(machine.attach(disk("layers")).await.unwrap(), 16);
    assert_eq!(machine.attach(disk("layers")).await.unwrap(), 17);
    machine.detach(16).await.unwrap();
    let refused = machine.attach(disk("refuse")).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the VMM refused to attach a device: no \u{fffd}slot"
    );

    let nic = Nic {
        name: "eth0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        pairs: 1,
        sources: Sources::Mac,
    };
    assert_eq!(machine.attach_nic(nic, vec![]).await.unwrap(), 18);
    let dropped = machine.update_nic(18, false, Sources::Any).await.unwrap();
    assert_eq!(dropped.spoofed, 7);
    let refused = machine
        .update_nic(99, true, Sources::Any)
        .await
        .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the VMM refused to change a network interface: slot 99"
    );

    let mut stream = machine.connect(7).await.unwrap();
    stream.write_all(b"echo").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "echo");
    let mut closed = machine.connect(8).await.unwrap();
    assert_eq!(closed.read(&mut [0]).await.unwrap(), 0);

    assert_eq!(
        machine.console_tail(),
        ["Linux version 6.12", "VFS: no root"]
    );
    let waiters = [machine.stopped(), machine.stopped()];
    let pid = machine.pid();
    assert!(alive(pid));
    let stopped = machine.stop().await;
    assert!(!alive(pid));
    assert_eq!(stopped.reason, Reason::Requested);
    for waiter in waiters {
        assert_eq!(waiter.await, stopped);
    }
    assert_eq!(machine.stop().await, stopped);
    for error in [
        machine.attach(disk("late")).await.unwrap_err(),
        machine.connect(7).await.unwrap_err(),
        machine.agent().unwrap_err(),
        machine.agent_after(&agent).await.unwrap_err(),
    ] {
        assert!(matches!(error, Error::Stopped(_)), "{error}");
    }
    assert!(setup(&agent.client, "late").await.is_err());
}

async fn a_guest_may_send_what_the_administrator_wants() {
    let own = vec!["10.0.0.1".parse().unwrap()];
    let usual = spec("agent");
    let other = MachineSpec {
        allow_foreign_sources: true,
        ..spec("agent")
    };
    let expected = [Sources::Addresses(own.clone()), Sources::Any];
    for (spec, expected) in [usual, other].into_iter().zip(expected) {
        let machine = Machine::start(spec).await.unwrap();
        assert_eq!(machine.sources(own.clone()), expected);
        machine.stop().await;
    }
}

async fn an_agent_that_dials_again_is_found() {
    let machine = Machine::start(spec("agent")).await.unwrap();
    let mut agent = machine.agent().unwrap();
    for _ in 0..3 {
        assert_eq!(setup(&agent.client, "it").await.unwrap(), "for it");
        assert!(setup(&agent.client, "hang up").await.is_err());
        agent = machine.agent_after(&agent).await.unwrap();
    }
    // The thousand others were closed.
    let descriptors = fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(descriptors < 40, "{descriptors}");
}

async fn requests_fail_when_the_vmm_ends() {
    let machine = Machine::start(spec("agent")).await.unwrap();
    let stopped = machine.stopped();
    match machine.attach(disk("exit")).await {
        Err(Error::Stopped(stopped)) => {
            assert_eq!(
                (&stopped.reason, stopped.exit),
                (&Reason::Died, Exit::Code(9))
            );
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(stopped.await.exit, Exit::Code(9));

    let machine = Machine::start(spec("agent")).await.unwrap();
    let pid = nix::unistd::Pid::from_raw(machine.pid() as i32);
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    let stopped = machine.stopped().await;
    assert_eq!(
        (&stopped.reason, stopped.exit),
        (&Reason::Died, Exit::Signal(Signal::SIGKILL))
    );
}

async fn a_failed_start_says_why_with_the_console() {
    for (cmdline, text) in [
        ("exit", "the VMM exited with code 7 and did not say why"),
        (
            "closed and exit",
            "the VMM exited with code 7 and did not say why",
        ),
        ("panicked", "the guest's kernel panicked"),
        ("invalid", "it could not be built: no ELF"),
        (
            "aborted",
            "the VMM was killed by SIGSEGV and did not say why",
        ),
    ] {
        let error = Error::Stopped(failed(cmdline).await);
        assert_eq!(
            error.to_string(),
            format!(
                "the microVM ended: {text}; its console's last lines:\n  Linux version 6.12\n  VFS: no root"
            )
        );
    }
}

async fn a_vmm_that_breaks_the_protocol_is_killed() {
    for (cmdline, text) in [
        ("garbage", "does not decode"),
        ("long", "exceeds"),
        ("few slots", "it started 1 disks"),
        ("no such slot", "slot 32 does not exist or is in use"),
        ("same slot", "slot 5 does not exist or is in use"),
        ("started twice", "it started 2 disks"),
        ("early stream", "before the machine started"),
        ("no descriptor", "came with 0 descriptors instead of 1"),
        ("two descriptors", "came with 2 descriptors instead of 1"),
        ("no stream", "the agent's stream"),
        ("other port", "may not use port 22"),
        ("unasked", "tag 0 is of no device to attach"),
        ("closed", "closed the control socket and did not end"),
        // An empty datagram looks like the end of the socket.
        ("empty", "closed the control socket and did not end"),
    ] {
        let stopped = failed(cmdline).await;
        assert_eq!(stopped.exit, Exit::Signal(Signal::SIGKILL), "{cmdline}");
        match &stopped.reason {
            Reason::Violation(how) => assert!(how.contains(text), "{cmdline}: {how}"),
            other => panic!("{cmdline}: {other:?}"),
        }
    }
}

async fn a_guest_that_hangs_is_given_up_with_its_console() {
    let mut spec = spec("silent");
    // The time that a busy host may need to execute the VMM, which then writes to its console.
    spec.boot_timeout = Duration::from_secs(3);
    let error = Machine::start(spec).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the microVM's agent did not answer within 3 s (`boot_timeout_seconds` in the configuration); \
         its console's last lines:\n  Linux version 6.12\n  VFS: no root"
    );
}

async fn dropping_ends_the_machine() {
    let machine = Machine::start(spec("agent")).await.unwrap();
    let (pid, stopped) = (machine.pid(), machine.stopped());
    drop(machine);
    assert_eq!(stopped.await.reason, Reason::Requested);
    assert!(!alive(pid));

    let start = Machine::start(spec("silent"));
    tokio::pin!(start);
    // Polled once, it has launched the VMM.
    let pending = std::future::poll_fn(|context| {
        std::task::Poll::Ready(start.as_mut().poll(context).is_pending())
    });
    assert!(pending.await);
    assert_eq!(children().len(), 1);
}

async fn what_is_missing_is_named() {
    let missing = || PathBuf::from("/nonexistent/file");
    let mut specs = [spec("silent"), spec("silent"), spec("silent")];
    specs[0].vmm = missing();
    specs[1].kernel = missing();
    specs[2].image = missing();
    for (spec, what) in specs
        .into_iter()
        .zip(["VMM", "guest kernel", "guest's root image"])
    {
        let error = Machine::start(spec).await.unwrap_err().to_string();
        assert!(
            error.starts_with(&format!(
                "cannot open the {what} /nonexistent/file: No such file"
            )) && error.contains("in the configuration"),
            "{error}"
        );
    }
    let mut spec = spec("silent");
    spec.image = std::env::temp_dir().join(format!("machine-{}.odd", std::process::id()));
    for length in [0, 700] {
        fs::write(&spec.image, vec![0; length]).unwrap();
        let copy = MachineSpec {
            image: spec.image.clone(),
            ..self::spec("silent")
        };
        let error = Machine::start(copy).await.unwrap_err().to_string();
        assert!(error.contains(&format!("has {length} bytes")), "{error}");
    }
    fs::remove_file(&spec.image).unwrap();
}

fn children() -> Vec<String> {
    let task = format!("/proc/self/task/{}/children", std::process::id());
    let children = fs::read_to_string(task).unwrap();
    children.split_whitespace().map(str::to_owned).collect()
}

/// Runs a test on a runtime of its own, and checks that it leaves no process.
fn run<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F) {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    if !name.contains(&wanted) && !wanted.starts_with('-') {
        return;
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test());
    assert!(children().is_empty(), "{name} leaves {:?}", children());
    println!("test {name} ... ok");
}

macro_rules! run {
    ($($test:ident),* $(,)?) => { $(run(stringify!($test), $test);)* };
}

fn main() -> ExitCode {
    if std::env::args().next().as_deref() == Some("bulkhead-vmm") {
        vmm::main();
        return ExitCode::SUCCESS;
    }
    run![
        a_machine_is_used_and_stopped,
        a_guest_may_send_what_the_administrator_wants,
        an_agent_that_dials_again_is_found,
        requests_fail_when_the_vmm_ends,
        a_failed_start_says_why_with_the_console,
        a_vmm_that_breaks_the_protocol_is_killed,
        a_guest_that_hangs_is_given_up_with_its_console,
        dropping_ends_the_machine,
        what_is_missing_is_named,
    ];
    fs::remove_file(image()).unwrap();
    ExitCode::SUCCESS
}
