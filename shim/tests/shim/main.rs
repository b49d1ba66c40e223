//! The shim's binary, called as containerd calls it, with a VMM that is this executable: the real process, sockets, jail and
//! control protocol, and no machine.

#![allow(
    clippy::unwrap_used,
    reason = "what fails here fails the test; clippy sees tests only under the harness that this one does without"
)]

mod guest;
mod harness;

use std::fs;
use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, KillRequest, PauseRequest, PidsRequest, ResizePtyRequest,
    ResumeRequest, StatsRequest, Status, UpdateTaskRequest,
};
use nix::sys::signal::Signal;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::Code;

use harness::{Host, PATIENCE, SHIM, Shim, code, context, gone, kill, read_all, text};

const KILL: i32 = 9;
const TERM: i32 = 15;

async fn a_container_lives_and_ends() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["exit", "3"], json!({}));
    let shim = host.shim(&bundle).await;
    assert_eq!(
        code(&shim.state("c1", "").await.unwrap_err()),
        Code::NOT_FOUND
    );
    let request = host.create_request(&bundle);
    let pid = shim.task.create(context(), &request).await.unwrap().pid;
    assert!(pid > 0);
    let again = shim.task.create(context(), &request).await.unwrap_err();
    assert_eq!(code(&again), Code::ALREADY_EXISTS);
    let state = shim.state("c1", "").await.unwrap();
    assert_eq!((state.status.unwrap(), state.pid), (Status::CREATED, pid));
    assert_eq!(
        (state.id.as_str(), state.bundle.as_str()),
        ("c1", bundle.to_str().unwrap())
    );

    let waiters: Vec<_> = (0..20)
        .map(|_| {
            let shim = shim.clone();
            tokio::spawn(async move { shim.wait("c1", "").await.unwrap() })
        })
        .collect();
    assert_eq!(shim.start("c1", "").await.unwrap(), pid);
    let exit = shim.wait("c1", "").await.unwrap();
    assert_eq!(exit.exit_status, 3);
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), exit);
    }
    let state = shim.state("c1", "").await.unwrap();
    assert_eq!(
        (state.status.unwrap(), state.exit_status),
        (Status::STOPPED, 3)
    );
    assert_eq!(state.exited_at, exit.exited_at);
    assert_eq!(
        code(&shim.kill("c1", "", KILL).await.unwrap_err()),
        Code::NOT_FOUND
    );
    let all = KillRequest {
        id: "c1".into(),
        signal: KILL as u32,
        all: true,
        ..Default::default()
    };
    shim.task.kill(context(), &all).await.unwrap();
    assert_eq!(
        code(&shim.start("c1", "").await.unwrap_err()),
        Code::FAILED_PRECONDITION
    );
    // The machine is there for this container alone, and goes with it.
    gone(pid).await;
    let deleted = shim.delete("c1", "").await.unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (pid, 3));
    assert_eq!(deleted.exited_at, exit.exited_at);
    assert_eq!(
        code(&shim.delete("c1", "").await.unwrap_err()),
        Code::NOT_FOUND
    );
    host.expect(&["create", "start", "exit c1 3", "delete"])
        .await;
    shim.shut_down().await;
    host.expect_no_more();
    assert_eq!(host.remains(), [""; 0]);
}

async fn both_names_of_the_service_are_served() {
    let host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    // Of a container without a name, which is not there.
    let methods = [
        ("State", Code::NOT_FOUND),
        ("Create", Code::INVALID_ARGUMENT),
        ("Start", Code::NOT_FOUND),
        ("Delete", Code::NOT_FOUND),
        ("Pids", Code::NOT_FOUND),
        ("Pause", Code::NOT_FOUND),
        ("Resume", Code::NOT_FOUND),
        ("Checkpoint", Code::NOT_FOUND),
        ("Kill", Code::NOT_FOUND),
        ("Exec", Code::INVALID_ARGUMENT),
        ("ResizePty", Code::NOT_FOUND),
        ("CloseIO", Code::NOT_FOUND),
        ("Update", Code::NOT_FOUND),
        ("Wait", Code::NOT_FOUND),
        ("Stats", Code::NOT_FOUND),
        ("Connect", Code::OK),
        ("Dance", Code::UNIMPLEMENTED),
        ("Shutdown", Code::OK),
    ];
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let shim = host.shim(&bundle).await;
        let (pid, _) = shim.pids("").await;
        for (method, expected) in methods {
            let request = ttrpc::Request {
                service: service.into(),
                method: method.into(),
                timeout_nano: PATIENCE.as_nanos() as i64,
                ..Default::default()
            };
            let answer = shim.client.request(request).await;
            let found = answer.map_or_else(|error| code(&error), |_| Code::OK);
            assert_eq!(found, expected, "{service} {method}");
        }
        gone(pid).await;
    }
    assert_eq!(host.remains(), [""; 0]);
}

async fn streams_pass_through() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["cat"], json!({}));
    let shim = host.shim(&bundle).await;
    let mut request = host.create_request(&bundle);
    let (stdin, mut writer) = host.fifo("in");
    let (stdout, reader) = host.fifo("out");
    request.stdin = stdin.clone();
    request.stdout = stdout;
    shim.task.create(context(), &request).await.unwrap();
    assert_eq!(shim.state("c1", "").await.unwrap().stdin, stdin);
    // Whoever writes waits until the start; a client cannot tell of the end of its input before Create has been answered.
    assert_eq!(shim.open_fifos(&stdin).await, 0);
    shim.start("c1", "").await.unwrap();
    assert_eq!(shim.open_fifos(&stdin).await, 2);
    let data: Vec<u8> = (0..4u32 << 20).map(|n| (n / 3) as u8).collect();
    let sent = data.clone();
    let write = tokio::task::spawn_blocking(move || {
        nix::fcntl::fcntl(
            &writer,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
        )
        .unwrap();
        writer.write_all(&sent).unwrap();
    });
    let close = async {
        write.await.unwrap();
        let request = CloseIORequest {
            id: "c1".into(),
            stdin: true,
            ..Default::default()
        };
        shim.task.close_io(context(), &request).await.unwrap();
        shim.task.close_io(context(), &request).await.unwrap();
    };
    let ((), received) = tokio::join!(close, read_all(reader));
    assert!(received == data);
    assert_eq!(shim.wait("c1", "").await.unwrap().exit_status, 0);
    shim.delete("c1", "").await.unwrap();
    host.expect(&["create", "start", "exit c1 0", "delete"])
        .await;
    shim.shut_down().await;
}

async fn a_missing_program_fails_in_create_and_leaves_nothing() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["missing"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    let error = shim.task.create(context(), &request).await.unwrap_err();
    assert_eq!(code(&error), Code::NOT_FOUND);
    assert!(
        text(&error).contains("executable file not found"),
        "{error}"
    );
    assert_eq!(
        code(&shim.state("c1", "").await.unwrap_err()),
        Code::NOT_FOUND
    );
    shim.shut_down().await;
    host.expect_no_more();
    assert_eq!(host.remains(), [""; 0]);
}

async fn processes_of_the_host_stand_for_those_of_the_guest() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    let init = shim.task.create(context(), &request).await.unwrap().pid;
    assert_eq!(shim.start("c1", "").await.unwrap(), init);
    shim.exec("c1", "x", &["wait"]).await.unwrap();
    assert_eq!(shim.state("c1", "x").await.unwrap().pid, 0);
    let exec = shim.start("c1", "x").await.unwrap();
    let (own, task) = shim.pids("c1").await;
    assert_eq!(task, init);
    assert!(init != exec && init != own && exec != own);
    let link = |pid: u32, kind: &str| std::fs::read_link(format!("/proc/{pid}/{kind}")).unwrap();
    assert_eq!(link(exec, "ns/net"), link(init, "ns/net"));
    assert_ne!(link(init, "ns/net"), link(own, "ns/net"));
    let cgroup = |pid| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(cgroup(init), cgroup(own));
    assert!(cgroup(init).contains("/c1"), "{}", cgroup(init));

    kill(exec, Signal::SIGUSR1);
    let exit = shim.wait("c1", "x").await.unwrap();
    assert_eq!(exit.exit_status, 128 + Signal::SIGUSR1 as u32);
    assert!(!Path::new(&format!("/proc/{exec}")).exists());
    assert_eq!(shim.state("c1", "x").await.unwrap().pid, exec);
    kill(init, Signal::SIGKILL);
    assert_eq!(shim.wait("c1", "").await.unwrap().exit_status, 137);
    assert!(!Path::new(&format!("/proc/{init}")).exists());
    assert_eq!(shim.delete("c1", "").await.unwrap().pid, init);
    shim.shut_down().await;
    host.expect(&["create", "start", "exec-added", "exec-started"])
        .await;
    host.expect(&["exit x 138", "exit c1 137", "delete"]).await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn a_container_is_in_the_network_that_it_names() {
    let host = Host::new().await;
    let other = StandInNetwork::new();
    let bundle = |id, sees, network: Option<&str>| {
        let bundle = host.bundle(id, &["wait", sees], json!({}));
        let path = bundle.join("config.json");
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        if let Some(network) = network {
            config["linux"]["namespaces"][2]["path"] = json!(network);
        }
        std::fs::write(&path, config.to_string()).unwrap();
        bundle
    };
    let first = bundle("c1", "machine's-network", Some(&other.path()));
    let shim = host.shim(&first).await;
    let create = async |bundle: PathBuf| {
        let request = host.create_request(&bundle);
        let created = shim.task.create(context(), &request).await;
        created.map(|created| format!("/proc/{}/ns/net", created.pid))
    };
    let link = |path: &str| std::fs::read_link(path).unwrap();
    let process = create(first).await.unwrap();
    assert_eq!(link(&process), link(&other.path()));
    // Those who come later may be in it too, by another name, or in one of their own, but in no third.
    let same = bundle("c2", "machine's-network", Some(&process));
    assert_eq!(link(&create(same).await.unwrap()), link(&process));
    let own = create(bundle("c3", "own-network", None)).await.unwrap();
    assert_ne!(link(&own), link(&process));
    for third in [own, "/proc/self/ns/net".into()] {
        let error = create(bundle("c4", "", Some(&third))).await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        assert!(text(&error).contains(&third), "{error}");
    }
    let none = bundle("c4", "", Some("/no/such/network"));
    let error = create(none).await.unwrap_err();
    assert!(text(&error).contains("/no/such/network"), "{error}");
    for id in ["c1", "c2", "c3"] {
        shim.delete(id, "").await.unwrap();
    }
    shim.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
}

/// A network namespace: that of a process that waits.
struct StandInNetwork(std::process::Child);

impl StandInNetwork {
    fn new() -> Self {
        let mut command = std::process::Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo; exec cat"]);
        command.stdin(std::process::Stdio::piped());
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It is there once the shell says something.
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        Self(child)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }
}

impl Drop for StandInNetwork {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// Has a container's hooks write down their names and what they are told; the one of this name fails.
fn add_hooks(bundle: &Path, log: &Path, fails: &str) {
    let path = bundle.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for name in ["prestart", "createRuntime", "poststart", "poststop"] {
        let end = if name == fails {
            "echo broken >&2; exit 3"
        } else {
            ""
        };
        let script = format!(
            "{{ printf '{name} '; grep -o '\"status\":\"[a-z]*\"'; }} >>{}; {end}",
            log.display()
        );
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
        config["hooks"][name] = json!([hook]);
    }
    std::fs::write(&path, config.to_string()).unwrap();
}

async fn hooks_run_on_the_host() {
    let host = Host::new().await;
    let bundle = host.bundle("c1", &["exit", "0"], json!({}));
    let log = host.path("hooks");
    // What comes too late is only logged.
    add_hooks(&bundle, &log, "poststop");
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    let lines = || {
        let text = std::fs::read_to_string(&log).unwrap();
        let lines = text.lines().map(|line| line.replace("\"status\":", ""));
        lines.map(|line| line.replace('"', "")).collect::<Vec<_>>()
    };
    let creating = ["prestart creating", "createRuntime creating"];
    assert_eq!(lines(), creating);
    shim.start("c1", "").await.unwrap();
    assert_eq!(lines().last().unwrap(), "poststart running");
    shim.wait("c1", "").await.unwrap();
    shim.delete("c1", "").await.unwrap();
    assert_eq!(lines().last().unwrap(), "poststop stopped");
    assert_eq!(lines().len(), 4);

    // A container that a hook does not want is stopped,
    let (count, bundle) = (lines().len(), host.bundle("c2", &["wait"], json!({})));
    add_hooks(&bundle, &log, "poststart");
    let second = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    second.task.create(context(), &request).await.unwrap();
    let error = second.start("c2", "").await.unwrap_err();
    assert!(
        text(&error).contains("hooks.poststart: /bin/sh: exit status: 3: broken"),
        "{error}"
    );
    assert_eq!(second.wait("c2", "").await.unwrap().exit_status, 137);
    second.delete("c2", "").await.unwrap();
    assert_eq!(lines().last().unwrap(), "poststop stopped");
    assert_eq!(lines().len(), count + 4);
    second.shut_down().await;

    // or is not made, and its end is told.
    for (fails, expected) in [("prestart", 2), ("createRuntime", 3)] {
        std::fs::remove_file(&log).unwrap();
        let id = fails.to_lowercase();
        let bundle = host.bundle(&id, &["exit", "0"], json!({}));
        add_hooks(&bundle, &log, fails);
        let request = host.create_request(&bundle);
        let error = shim.task.create(context(), &request).await.unwrap_err();
        assert!(
            text(&error).contains(&format!("hooks.{fails}: /bin/sh")),
            "{error}"
        );
        assert!(text(&error).contains("broken"), "{error}");
        assert_eq!(lines().last().unwrap(), "poststop stopped");
        assert_eq!(lines().len(), expected);
    }
    shim.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn the_last_hooks_run_once() {
    let host = Host::new().await;
    let log = host.path("hooks");
    let count = || {
        let text = std::fs::read_to_string(&log).unwrap();
        let count = text.lines().filter(|line| line.starts_with("poststop"));
        count.count()
    };
    // One that ends, one that a hook does not want, one whose shim dies.
    for (expected, id) in [(1, "c1"), (2, "c2"), (3, "c3")] {
        let bundle = host.bundle(id, &["wait"], json!({}));
        add_hooks(&bundle, &log, if id == "c2" { "prestart" } else { "" });
        let shim = host.shim(&bundle).await;
        let (pid, _) = shim.pids("").await;
        let request = host.create_request(&bundle);
        let created = shim.task.create(context(), &request).await;
        assert_eq!(created.is_ok(), id != "c2");
        if id == "c1" {
            shim.kill(id, "", KILL).await.unwrap();
            shim.wait(id, "").await.unwrap();
            shim.delete(id, "").await.unwrap();
        }
        if id == "c3" {
            kill(pid, Signal::SIGKILL);
            gone(pid).await;
        } else {
            assert_eq!(count(), expected);
            shim.shut_down().await;
        }
        // containerd calls it after every Delete.
        for _ in 0..2 {
            host.delete(&bundle);
            assert_eq!(count(), expected);
        }
    }
    // The bundle may be used again.
    let bundle = host.path("c1");
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    shim.kill("c1", "", KILL).await.unwrap();
    shim.wait("c1", "").await.unwrap();
    shim.delete("c1", "").await.unwrap();
    assert_eq!(count(), 4);
    shim.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn execs_have_lives_of_their_own() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    // The container is there before its program runs.
    shim.exec("c1", "early", &["exit", "0"]).await.unwrap();
    shim.start("c1", "early").await.unwrap();
    assert_eq!(shim.wait("c1", "early").await.unwrap().exit_status, 0);
    assert_eq!(shim.status("c1", "").await, Status::CREATED);
    shim.delete("c1", "early").await.unwrap();
    shim.start("c1", "").await.unwrap();
    shim.exec("c1", "x", &["exit", "7"]).await.unwrap();
    let twice = shim.exec("c1", "x", &["exit", "7"]).await.unwrap_err();
    assert_eq!(code(&twice), Code::ALREADY_EXISTS);
    assert_eq!(
        code(&shim.exec("c1", "../x", &["exit"]).await.unwrap_err()),
        Code::INVALID_ARGUMENT
    );
    assert_eq!(
        code(&shim.kill("c1", "x", KILL).await.unwrap_err()),
        Code::FAILED_PRECONDITION
    );
    shim.start("c1", "x").await.unwrap();
    assert_eq!(shim.wait("c1", "x").await.unwrap().exit_status, 7);
    assert_eq!(shim.delete("c1", "x").await.unwrap().exit_status, 7);
    assert_eq!(
        code(&shim.wait("c1", "x").await.unwrap_err()),
        Code::NOT_FOUND
    );

    shim.exec("c1", "bad", &["missing"]).await.unwrap();
    assert_eq!(
        code(&shim.start("c1", "bad").await.unwrap_err()),
        Code::NOT_FOUND
    );
    let waited = shim.wait("c1", "bad").await.unwrap();
    assert_eq!((waited.exit_status, waited.exited_at.is_some()), (0, false));
    assert_eq!(shim.delete("c1", "bad").await.unwrap().exit_status, 0);

    shim.exec("c1", "y", &["wait"]).await.unwrap();
    shim.exec("c1", "never", &["wait"]).await.unwrap();
    shim.start("c1", "y").await.unwrap();
    assert_eq!(
        code(&shim.delete("c1", "y").await.unwrap_err()),
        Code::FAILED_PRECONDITION
    );
    let pids = PidsRequest {
        id: "c1".into(),
        ..Default::default()
    };
    assert_eq!(
        shim.task
            .pids(context(), &pids)
            .await
            .unwrap()
            .processes
            .len(),
        3
    );
    // The init ends first, but is told last.
    shim.kill("c1", "", TERM).await.unwrap();
    while shim.start("c1", "never").await.map_err(|e| code(&e)) != Err(Code::FAILED_PRECONDITION) {}
    assert_eq!(shim.status("c1", "").await, Status::RUNNING);
    shim.kill("c1", "y", KILL).await.unwrap();
    assert_eq!(shim.wait("c1", "").await.unwrap().exit_status, 143);
    shim.delete("c1", "").await.unwrap();
    host.expect(&["create", "exec-added", "exec-started", "exit early 0"])
        .await;
    host.expect(&["start", "exec-added", "exec-started", "exit x 7"])
        .await;
    host.expect(&["exec-added", "exec-added", "exec-added", "exec-started"])
        .await;
    host.expect(&["exit y 137", "exit c1 143", "delete"]).await;
    shim.shut_down().await;
    host.expect_no_more();
}

async fn a_start_is_told_before_its_end() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["quick"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    shim.start("c1", "").await.unwrap();
    assert_eq!(shim.wait("c1", "").await.unwrap().exit_status, 5);
    host.expect(&["create", "start", "exit c1 5"]).await;
    shim.delete("c1", "").await.unwrap();
    shim.shut_down().await;
}

async fn want_of_memory_is_told_before_the_end() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["eat"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    shim.start("c1", "").await.unwrap();
    host.expect(&["create", "start", "oom c1", "exit c1 137"])
        .await;
    shim.delete("c1", "").await.unwrap();
    shim.shut_down().await;
}

async fn requests_reach_the_guest_and_its_refusals_the_client() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    shim.start("c1", "").await.unwrap();
    let id = "c1".to_owned();
    let pause = PauseRequest {
        id: id.clone(),
        ..Default::default()
    };
    let resume = ResumeRequest {
        id: id.clone(),
        ..Default::default()
    };
    let error = shim.task.resume(context(), &resume).await.unwrap_err();
    assert_eq!(code(&error), Code::FAILED_PRECONDITION);
    shim.task.pause(context(), &pause).await.unwrap();
    assert_eq!(shim.status("c1", "").await, Status::PAUSED);
    assert_eq!(
        code(&shim.exec("c1", "x", &["wait"]).await.unwrap_err()),
        Code::FAILED_PRECONDITION
    );
    shim.task.resume(context(), &resume).await.unwrap();
    assert_eq!(shim.status("c1", "").await, Status::RUNNING);

    let stats = StatsRequest {
        id: id.clone(),
        ..Default::default()
    };
    let stats = shim
        .task
        .stats(context(), &stats)
        .await
        .unwrap()
        .stats
        .unwrap();
    assert_eq!(stats.value, b"c1");
    let update = |resources: &str| UpdateTaskRequest {
        id: id.clone(),
        resources: Some(Any {
            value: resources.into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    shim.task.update(context(), &update("{}")).await.unwrap();
    let error = shim
        .task
        .update(context(), &update(r#"{"memory":{"limit":1}}"#))
        .await
        .unwrap_err();
    assert_eq!(
        (code(&error), text(&error).as_str()),
        (Code::OUT_OF_RANGE, "too much")
    );
    // Without a terminal there is nothing to resize.
    let resize = ResizePtyRequest {
        id: id.clone(),
        width: 80,
        ..Default::default()
    };
    shim.task.resize_pty(context(), &resize).await.unwrap();

    // A frozen container can be killed.
    shim.task.pause(context(), &pause).await.unwrap();
    shim.kill("c1", "", KILL).await.unwrap();
    assert_eq!(shim.wait("c1", "").await.unwrap().exit_status, 137);
    host.expect(&[
        "create",
        "start",
        "paused",
        "resumed",
        "paused",
        "exit c1 137",
    ])
    .await;
    shim.delete("c1", "").await.unwrap();
    shim.shut_down().await;
}

async fn what_was_never_started_can_be_killed_and_deleted() {
    let mut host = Host::new().await;
    for (id, kill) in [("c1", true), ("c2", false)] {
        let bundle = host.bundle(id, &["wait"], json!({}));
        let shim = host.shim(&bundle).await;
        let request = host.create_request(&bundle);
        let pid = shim.task.create(context(), &request).await.unwrap().pid;
        host.expect(&["create"]).await;
        if kill {
            shim.kill(id, "", KILL).await.unwrap();
            assert_eq!(shim.wait(id, "").await.unwrap().exit_status, 137);
            host.expect(&["exit c1 137"]).await;
        }
        let deleted = shim.delete(id, "").await.unwrap();
        assert_eq!(deleted.exit_status, if kill { 137 } else { 0 });
        assert!(deleted.exited_at.seconds > 0);
        host.expect(&["delete"]).await;
        gone(pid).await;
        shim.shut_down().await;
        host.expect_no_more();
    }
}

async fn what_is_being_deleted_does_not_start_any_more() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let path = bundle.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    // The deletion is under way as long as this hook waits.
    let fifo = host.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = format!("read line <{}", fifo.display());
    let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
    config["hooks"]["poststop"] = json!([hook]);
    std::fs::write(&path, config.to_string()).unwrap();
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    let deletion = tokio::spawn({
        let shim = shim.clone();
        async move { shim.delete("c1", "").await.unwrap() }
    });
    let open = move || std::fs::OpenOptions::new().write(true).open(fifo);
    let mut line = tokio::task::spawn_blocking(open).await.unwrap().unwrap();
    let refused = shim.start("c1", "").await.unwrap_err();
    assert_eq!(code(&refused), Code::NOT_FOUND);
    // Who comes second is answered when it is over.
    let second = tokio::spawn({
        let shim = shim.clone();
        async move { shim.delete("c1", "").await }
    });
    tokio::task::yield_now().await;
    shim.state("c1", "").await.unwrap();
    assert!(!second.is_finished());
    writeln!(line).unwrap();
    deletion.await.unwrap();
    let refused = second.await.unwrap().unwrap_err();
    assert_eq!(code(&refused), Code::NOT_FOUND);
    host.expect(&["create", "delete"]).await;
    shim.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn what_has_finished_by_an_answer_is_stopped_then() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["refused"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    let start = shim.start("c1", "");
    let kill = shim.kill("c1", "", KILL);
    let (mut start, mut kill) = (std::pin::pin!(start), std::pin::pin!(kill));
    for _ in 0..100 {
        tokio::select! {
            biased;
            answer = &mut start => panic!("{answer:?}, before its end is known"),
            answer = &mut kill => panic!("{answer:?}, before its end is known"),
            state = shim.state("c1", "") => assert_eq!(state.unwrap().status.unwrap(), Status::CREATED),
        }
    }
    let request = PidsRequest {
        id: "c1".into(),
        ..Default::default()
    };
    shim.task.pids(context(), &request).await.unwrap();
    let error = start.await.unwrap_err();
    assert!(text(&error).contains("a hook failed"), "{error:?}");
    assert_eq!(code(&kill.await.unwrap_err()), Code::NOT_FOUND);
    let state = shim.state("c1", "").await.unwrap();
    assert_eq!(state.status.unwrap(), Status::STOPPED);
    shim.delete("c1", "").await.unwrap();
    host.expect(&["create", "exit c1 1", "delete"]).await;
    shim.shut_down().await;
}

async fn a_machine_may_be_gone_before_it_answers_a_kill() {
    let host = Host::new().await;
    let bundle = host.bundle("c1", &["mute"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    shim.task.create(context(), &request).await.unwrap();
    shim.start("c1", "").await.unwrap();
    shim.kill("c1", "", KILL).await.unwrap();
    assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 137);
    shim.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn a_machine_that_ends_ends_all_and_says_why() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    let pid = shim.task.create(context(), &request).await.unwrap().pid;
    shim.start("c1", "").await.unwrap();
    shim.exec("c1", "x", &["wait"]).await.unwrap();
    let exec = shim.start("c1", "x").await.unwrap();
    let vmm = shim.vmm(&[pid, exec]).await;
    shim.exec("c1", "s", &["stuck"]).await.unwrap();
    let stuck = tokio::spawn({
        let shim = shim.clone();
        async move { shim.start("c1", "s").await.unwrap_err() }
    });
    host.expect(&[
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exec-added",
    ])
    .await;
    // Whatever hangs, state is known.
    while shim.state("c1", "s").await.unwrap().status.unwrap() != Status::CREATED {}
    kill(vmm, Signal::SIGKILL);
    let error = stuck.await.unwrap();
    assert_eq!(code(&error), Code::UNAVAILABLE);
    assert!(
        text(&error).contains("killed by SIGKILL") && text(&error).contains("guest: up"),
        "{error}"
    );
    assert_eq!(shim.wait("c1", "x").await.unwrap().exit_status, 137);
    assert_eq!(shim.wait("c1", "").await.unwrap().exit_status, 137);
    host.expect(&["exit x 137", "exit c1 137"]).await;
    assert_eq!(
        code(&shim.kill("c1", "", KILL).await.unwrap_err()),
        Code::NOT_FOUND
    );
    assert_eq!(shim.delete("c1", "").await.unwrap().exit_status, 137);
    host.expect(&["delete"]).await;
    shim.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn a_machine_that_does_not_come_up_says_why() {
    let mut host = Host::new().await;
    host.configure("kernel_params = \"test.panic\"");
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    let error = shim.task.create(context(), &request).await.unwrap_err();
    assert_eq!(code(&error), Code::UNAVAILABLE);
    assert!(
        text(&error).contains("Kernel panic - not syncing"),
        "{error}"
    );
    shim.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn a_wrong_configuration_is_named() {
    for (line, expected) in [
        ("kernal = 1", "unknown field `kernal`"),
        ("kernel = \"/nonexistent/vmlinux\"", "duplicate key"),
        ("default_vcpus = 33", "it must be 1 to 32"),
    ] {
        let mut host = Host::new().await;
        host.configure(line);
        let bundle = host.bundle("c1", &["wait"], json!({}));
        let shim = host.shim(&bundle).await;
        let request = host.create_request(&bundle);
        let error = shim.task.create(context(), &request).await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        assert!(text(&error).contains(expected), "{error}");
        shim.shut_down().await;
    }
}

async fn what_a_guest_cannot_do_is_refused_before_it_boots() {
    let mut host = Host::new().await;
    host.configure("kernel_params = \"test.hang\"");
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let path = bundle.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let shim = host.shim(&bundle).await;
    for (instead, expected) in [
        (r#""uts""#, "network namespace of the host"),
        (
            r#""network"},{"type":"network""#,
            "two entries of type network",
        ),
    ] {
        std::fs::write(&path, config.replace(r#""network""#, instead)).unwrap();
        let error = shim
            .task
            .create(context(), &host.create_request(&bundle))
            .await
            .unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        assert!(text(&error).contains(expected), "{error}");
    }
    shim.shut_down().await;
    host.expect_no_more();
    assert_eq!(host.remains(), [""; 0]);
}

async fn nothing_waits_for_a_machine_that_boots() {
    let mut host = Host::new().await;
    host.configure("kernel_params = \"test.hang\"");
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let shim = host.shim(&bundle).await;
    let request = host.create_request(&bundle);
    let (pid, _) = shim.pids("").await;
    let create = tokio::spawn({
        let shim = shim.clone();
        async move { shim.task.create(context(), &request).await }
    });
    for _ in 0..100 {
        let asked = Instant::now();
        assert_eq!(
            code(&shim.state("c1", "").await.unwrap_err()),
            Code::NOT_FOUND
        );
        assert!(asked.elapsed() < Duration::from_secs(2));
    }
    assert!(!create.is_finished());
    // Shutdown does not end a shim that is making a container; a signal does, and with it the machine.
    shim.task
        .shutdown(context(), &Default::default())
        .await
        .unwrap();
    // For a containerd that has come back meanwhile, and has forgotten it, this is nothing to keep.
    let connect = ConnectRequest {
        id: "c1".into(),
        ..Default::default()
    };
    let error = shim.task.connect(context(), &connect).await.unwrap_err();
    assert_eq!(code(&error), Code::NOT_FOUND);
    kill(pid, Signal::SIGTERM);
    gone(pid).await;
    assert!(create.await.unwrap().is_err());
    assert_eq!(host.remains(), [""; 0]);
}

async fn what_a_client_does_not_wait_for_is_deleted() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["slow"], json!({}));
    let shim = host.shim(&bundle).await;
    let (pid, _) = shim.pids("").await;
    let (stdout, reader) = host.fifo("out");
    let mut request = host.create_request(&bundle);
    request.stdout = stdout;
    let impatient = ttrpc::context::with_duration(Duration::from_millis(500));
    assert!(shim.task.create(impatient, &request).await.is_err());
    // What containerd does then; nobody asks again.
    assert_eq!(
        code(&shim.delete("c1", "").await.unwrap_err()),
        Code::NOT_FOUND
    );
    shim.task
        .shutdown(context(), &Default::default())
        .await
        .unwrap();
    drop(shim);
    read_all(reader).await;
    host.expect(&["create", "exit c1 137", "delete"]).await;
    gone(pid).await;
    assert_eq!(host.remains(), [""; 0]);

    host.configure("kernel_params = \"test.hang\"\nboot_timeout_seconds = 1");
    let bundle = host.bundle("c2", &["wait"], json!({}));
    let shim = host.shim(&bundle).await;
    let (pid, _) = shim.pids("").await;
    let impatient = ttrpc::context::with_duration(Duration::from_millis(500));
    assert!(
        shim.task
            .create(impatient, &host.create_request(&bundle))
            .await
            .is_err()
    );
    shim.task
        .shutdown(context(), &Default::default())
        .await
        .unwrap();
    gone(pid).await;
    host.expect_no_more();
    assert_eq!(host.remains(), [""; 0]);
}

async fn a_pod_outlives_its_containers() {
    let mut host = Host::new().await;
    let annotations = |kind: &str| {
        json!({
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": "pod",
        })
    };
    let early = host.bundle("early", &["wait"], annotations("container"));
    let shim = host.shim(&early).await;
    let error = shim
        .task
        .create(context(), &host.create_request(&early))
        .await
        .unwrap_err();
    assert_eq!(code(&error), Code::FAILED_PRECONDITION);
    shim.shut_down().await;

    let bundle = host.bundle("pod", &["/pause"], annotations("sandbox"));
    let address = host.start(&bundle).unwrap();
    let pod = Shim::connect(&address).await;
    let pid = pod
        .task
        .create(context(), &host.create_request(&bundle))
        .await
        .unwrap()
        .pid;
    pod.start("pod", "").await.unwrap();
    host.expect(&["create", "start"]).await;
    assert_eq!(
        code(&pod.exec("pod", "x", &["sh"]).await.unwrap_err()),
        Code::UNIMPLEMENTED
    );
    // A container may come, end and come again; the machine stays.
    for round in ["1", "2", "3"] {
        let bundle = host.bundle("c1", &["exit", round], annotations("container"));
        assert_eq!(
            host.start(&bundle).unwrap(),
            address,
            "one shim for the pod"
        );
        let shim = Shim::connect(&address).await;
        shim.task
            .create(context(), &host.create_request(&bundle))
            .await
            .unwrap();
        shim.start("c1", "").await.unwrap();
        assert_eq!(
            shim.wait("c1", "").await.unwrap().exit_status.to_string(),
            round
        );
        shim.delete("c1", "").await.unwrap();
        shim.task
            .shutdown(context(), &Default::default())
            .await
            .unwrap();
        host.expect(&["create", "start", &format!("exit c1 {round}"), "delete"])
            .await;
    }
    let bundle = host.bundle("c3", &["sticky", "0"], annotations("container"));
    pod.task
        .create(context(), &host.create_request(&bundle))
        .await
        .unwrap();
    pod.start("c3", "").await.unwrap();
    pod.wait("c3", "").await.unwrap();
    let error = pod.delete("c3", "").await.unwrap_err();
    assert_eq!(code(&error), Code::DEADLINE_EXCEEDED, "{error}");
    pod.delete("c3", "").await.unwrap();
    host.expect(&["create", "start", "exit c3 0", "delete"])
        .await;
    let bundle = host.bundle("c2", &["wait"], annotations("container"));
    pod.task
        .create(context(), &host.create_request(&bundle))
        .await
        .unwrap();
    pod.start("c2", "").await.unwrap();
    assert_eq!(pod.pids("pod").await.1, pid);
    pod.kill("pod", "", KILL).await.unwrap();
    assert_eq!(pod.wait("pod", "").await.unwrap().exit_status, 137);
    host.expect(&["create", "start", "exit c2 137", "exit pod 137"])
        .await;
    gone(pid).await;
    pod.delete("c2", "").await.unwrap();
    pod.delete("pod", "").await.unwrap();
    host.expect(&["delete", "delete"]).await;
    pod.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn delete_cleans_up_after_a_dead_shim() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    // Before anything was made.
    assert_eq!(host.delete(&bundle).exit_status, 137);
    let shim = host.shim(&bundle).await;
    let pid = shim
        .task
        .create(context(), &host.create_request(&bundle))
        .await
        .unwrap()
        .pid;
    shim.start("c1", "").await.unwrap();
    let (shim_pid, _) = shim.pids("c1").await;
    // What ps shows is what containerd called.
    let shown = |file| fs::read_to_string(format!("/proc/{shim_pid}/{file}")).unwrap();
    let (line, name) = (shown("cmdline"), shown("comm"));
    assert!(line.starts_with(SHIM), "{line:?}");
    assert_eq!(name, "containerd-shim\n");
    kill(shim_pid, Signal::SIGKILL);
    gone(shim_pid).await;
    for _ in 0..2 {
        let asked = Instant::now();
        let response = host.delete(&bundle);
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.seconds > 0 && asked.elapsed() < Duration::from_secs(5));
    }
    gone(pid).await;
    assert_eq!(host.remains(), [""; 0]);
    // And there can be another.
    let shim = host.shim(&bundle).await;
    shim.task
        .create(context(), &host.create_request(&bundle))
        .await
        .unwrap();
    shim.kill("c1", "", KILL).await.unwrap();
    shim.wait("c1", "").await.unwrap();
    shim.delete("c1", "").await.unwrap();
    shim.shut_down().await;
    assert_eq!(host.remains(), [""; 0]);
    host.hang_up().await;
}

async fn delete_leaves_a_shim_to_its_other_tasks() {
    let mut host = Host::new().await;
    let create = async |id: &str| {
        let bundle = host.bundle(
            id,
            &["wait"],
            json!({"io.containerd.runc.v2.group": "group"}),
        );
        let shim = host.shim(&bundle).await;
        let request = host.create_request(&bundle);
        let pid = shim.task.create(context(), &request).await.unwrap().pid;
        shim.start(id, "").await.unwrap();
        (bundle, shim, pid)
    };
    let (first, shim, _) = create("c1").await;
    let (second, ..) = create("c2").await;
    let (third, _, pid) = create("c3").await;
    let (shim_pid, _) = shim.pids("c3").await;
    // containerd deletes the first task, and then calls the binary.
    shim.kill("c1", "", KILL).await.unwrap();
    shim.wait("c1", "").await.unwrap();
    shim.delete("c1", "").await.unwrap();
    let request = Default::default();
    shim.task.shutdown(context(), &request).await.unwrap();
    for _ in 0..2 {
        assert_eq!(host.delete(&first).exit_status, 137);
    }
    std::fs::remove_dir_all(&first).unwrap();
    for id in ["c2", "c3"] {
        assert_eq!(shim.status(id, "").await, Status::RUNNING);
    }
    // Another it has the binary delete.
    assert_eq!(host.delete(&second).exit_status, 137);
    let error = shim.state("c2", "").await.unwrap_err();
    assert_eq!(code(&error), Code::NOT_FOUND);
    assert_eq!(shim.pids("c3").await, (shim_pid, pid));
    shim.kill("c3", "", TERM).await.unwrap();
    assert_eq!(shim.wait("c3", "").await.unwrap().exit_status, 143);
    shim.delete("c3", "").await.unwrap();
    shim.shut_down().await;
    host.delete(&third);
    assert_eq!(host.remains(), [""; 0]);

    // The last one of the first task's bundle takes the shim along, even if it runs.
    let (first, shim, pid) = create("c4").await;
    let (shim_pid, _) = shim.pids("c4").await;
    let (second, ..) = create("c5").await;
    assert_eq!(host.delete(&second).exit_status, 137);
    assert_eq!(shim.pids("c4").await, (shim_pid, pid));
    let asked = Instant::now();
    assert_eq!(host.delete(&first).exit_status, 137);
    assert!(asked.elapsed() < Duration::from_secs(5));
    gone(shim_pid).await;
    assert_eq!(host.remains(), [""; 0]);
    host.hang_up().await;
}

async fn delete_leaves_a_shim_that_cannot_delete_a_task_to_its_others() {
    // The guest does not answer, or refuses; for the shim's first task, or another.
    for (program, of_first) in [("mute", true), ("kept", true), ("kept", false)] {
        let mut host = Host::new().await;
        let create = async |host: &Host, id: &str, args: &[&str], annotations| {
            let bundle = host.bundle(id, args, annotations);
            let shim = host.shim(&bundle).await;
            let request = host.create_request(&bundle);
            shim.task.create(context(), &request).await.unwrap();
            shim.start(id, "").await.unwrap();
            (bundle, shim)
        };
        let delete = |host: &Host, bundle| {
            let asked = Instant::now();
            assert_eq!(host.delete(bundle).exit_status, 137);
            assert!(asked.elapsed() < Duration::from_secs(5));
        };
        let group = json!({"io.containerd.runc.v2.group": "group"});
        let (first, second) = match of_first {
            true => (program, "wait"),
            false => ("wait", program),
        };
        let (first, shim) = create(&host, "c1", &[first], group.clone()).await;
        let (second, _) = create(&host, "c2", &[second], group).await;
        let (stuck, other, id) = match of_first {
            true => (first, second, "c2"),
            false => (second, first, "c1"),
        };
        let pids = shim.pids(id).await;
        delete(&host, &stuck);
        if program == "mute" {
            // The shim goes on, and this guest has let it go.
            while host.event().await != "delete" {}
            let state = shim.state("c1", "").await.unwrap_err();
            assert_eq!(code(&state), Code::NOT_FOUND);
        }
        assert_eq!(shim.pids(id).await, pids, "{program}");
        assert_eq!(shim.status(id, "").await, Status::RUNNING);
        // Then the other is the last.
        shim.kill(id, "", KILL).await.unwrap();
        shim.wait(id, "").await.unwrap();
        shim.delete(id, "").await.unwrap();
        shim.shut_down().await;
        delete(&host, &other);
        assert_eq!(host.remains(), [""; 0]);

        // Nobody needs a shim for what it alone had.
        let (alone, shim) = create(&host, "c3", &[program], json!({})).await;
        let (shim_pid, _) = shim.pids("c3").await;
        delete(&host, &alone);
        gone(shim_pid).await;
        assert_eq!(host.remains(), [""; 0]);
    }
}

async fn delete_ends_a_shim_that_hangs() {
    let host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let path = bundle.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    // With a hook that hangs too.
    config["hooks"]["poststop"] = json!([{"path": "/bin/sleep", "args": ["sleep", "60"]}]);
    std::fs::write(&path, config.to_string()).unwrap();
    let shim = host.shim(&bundle).await;
    let pid = shim
        .task
        .create(context(), &host.create_request(&bundle))
        .await
        .unwrap()
        .pid;
    let (shim_pid, _) = shim.pids("c1").await;
    kill(shim_pid, Signal::SIGSTOP);
    let asked = Instant::now();
    assert_eq!(host.delete(&bundle).exit_status, 137);
    assert!(asked.elapsed() < Duration::from_secs(5));
    gone(shim_pid).await;
    gone(pid).await;
    assert_eq!(host.remains(), [""; 0]);
}

async fn a_restart_of_containerd_loses_nothing() {
    let mut host = Host::new().await;
    let bundle = host.bundle("c1", &["cat"], json!({}));
    let address = host.start(&bundle).unwrap();
    let shim = Shim::connect(&address).await;
    let mut request = host.create_request(&bundle);
    let (stdin, mut writer) = host.fifo("in");
    let (stdout, reader) = host.fifo("out");
    request.stdin = stdin;
    request.stdout = stdout.clone();
    shim.task.create(context(), &request).await.unwrap();
    shim.start("c1", "").await.unwrap();
    host.expect(&["create", "start"]).await;
    host.hang_up().await;
    drop((shim, reader));
    writer.write_all(b"meanwhile").unwrap();
    let shim = Shim::connect(&address).await;
    assert_eq!(shim.status("c1", "").await, Status::RUNNING);
    let close = CloseIORequest {
        id: "c1".into(),
        stdin: true,
        ..Default::default()
    };
    shim.task.close_io(context(), &close).await.unwrap();
    drop(writer);
    let reader = tokio::net::unix::pipe::OpenOptions::new()
        .open_receiver(&stdout)
        .unwrap();
    let reader = reader.into_nonblocking_fd().unwrap().into();
    assert_eq!(read_all(reader).await, b"meanwhile");
    assert_eq!(shim.wait("c1", "").await.unwrap().exit_status, 0);
    host.listen().await;
    host.expect(&["exit c1 0"]).await;
    shim.delete("c1", "").await.unwrap();
    host.expect(&["delete"]).await;
    shim.shut_down().await;
}

async fn the_answer_of_old_is_a_plain_address() {
    let host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let address = host.start_plainly(&bundle).unwrap();
    assert!(
        address.starts_with("unix:///run/containerd/s/"),
        "{address}"
    );
    assert_eq!(host.start_plainly(&bundle).unwrap(), address);
    let shim = Shim::connect(&address).await;
    shim.shut_down().await;
    assert!(!shim.socket.exists());
    std::fs::remove_file(bundle.join("config.json")).unwrap();
    let error = host.start_plainly(&bundle).unwrap_err();
    assert!(error.contains("config.json: No such file"), "{error}");
    assert_eq!(host.remains(), [""; 0]);
}

async fn each_containerd_is_answered_in_its_words() {
    let host = Host::new().await;
    let bundle = host.bundle("c1", &["wait"], json!({}));
    let address = host.start_plainly(&bundle).unwrap();
    let written = || std::fs::read_to_string(bundle.join("address")).unwrap();
    // containerd 1.6 to 2.2 take the address as it is, and CRI-O takes nothing else.
    for start in [Host::start_with_options, Host::start_in_new_environment] {
        std::fs::remove_file(bundle.join("address")).unwrap();
        assert_eq!(start(&host, &bundle).unwrap(), address);
        assert_eq!(written(), address);
    }
    Shim::connect(&address).await.shut_down().await;
    // That of containerd 2.3 is checked where it is read. It is another shim's: the socket is where it was asked for.
    let other = host.start(&bundle).unwrap();
    assert_ne!(other, address);
    let directory = host.path("s").display().to_string();
    assert!(other.contains(&directory), "{other}");
    Shim::connect(&other).await.shut_down().await;

    let info = host.info(&bundle);
    assert_eq!(info.name, "io.containerd.bulkhead.v2");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    assert!(host.version(&bundle).contains(env!("CARGO_PKG_VERSION")));
    assert_eq!(host.remains(), [""; 0]);
}

macro_rules! run {
    ($($test:ident),* $(,)?) => { $(run(stringify!($test), $test);)* };
}

fn run<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F) {
    if std::env::args()
        .nth(1)
        .is_some_and(|filter| !name.contains(&filter))
    {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    println!("test {name} ...");
    let ended = runtime.block_on(async { tokio::time::timeout(2 * PATIENCE, test()).await });
    assert!(ended.is_ok(), "{name} hangs");
}

fn main() -> ExitCode {
    if std::env::args().next().as_deref() == Some("bulkhead-vmm") {
        guest::main();
        return ExitCode::SUCCESS;
    }
    run![
        a_container_lives_and_ends,
        both_names_of_the_service_are_served,
        streams_pass_through,
        a_missing_program_fails_in_create_and_leaves_nothing,
        execs_have_lives_of_their_own,
        processes_of_the_host_stand_for_those_of_the_guest,
        a_container_is_in_the_network_that_it_names,
        hooks_run_on_the_host,
        the_last_hooks_run_once,
        a_start_is_told_before_its_end,
        want_of_memory_is_told_before_the_end,
        requests_reach_the_guest_and_its_refusals_the_client,
        what_was_never_started_can_be_killed_and_deleted,
        what_is_being_deleted_does_not_start_any_more,
        what_has_finished_by_an_answer_is_stopped_then,
        a_machine_may_be_gone_before_it_answers_a_kill,
        a_machine_that_ends_ends_all_and_says_why,
        a_machine_that_does_not_come_up_says_why,
        a_wrong_configuration_is_named,
        what_a_guest_cannot_do_is_refused_before_it_boots,
        nothing_waits_for_a_machine_that_boots,
        what_a_client_does_not_wait_for_is_deleted,
        a_pod_outlives_its_containers,
        delete_cleans_up_after_a_dead_shim,
        delete_leaves_a_shim_to_its_other_tasks,
        delete_leaves_a_shim_that_cannot_delete_a_task_to_its_others,
        delete_ends_a_shim_that_hangs,
        a_restart_of_containerd_loses_nothing,
        the_answer_of_old_is_a_plain_address,
        each_containerd_is_answered_in_its_words,
    ];
    ExitCode::SUCCESS
}
