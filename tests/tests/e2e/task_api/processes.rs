//! More processes in a container, and what is told of them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use bulkhead_tests::ctr::Runtime;
use bulkhead_tests::peer::{Bundle, Kind, Paths, code};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::reflect::RuntimeFieldType;
use containerd_shim_protos::protobuf::{Message, MessageDyn};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Notes, Pod, SIGKILL, SIGTERM, background, compare, send};

#[test]
fn processes_join_containers_as_under_runc() {
    compare(&[
        ("exec_life", exec_life),
        ("short_lives", short_lives),
        ("two_at_once", two_at_once),
        ("exec_of_a_missing_program", exec_of_a_missing_program),
        ("exec_that_cannot_be_made", exec_that_cannot_be_made),
        ("exec_before_the_start", exec_before_the_start),
        ("exec_that_outlives_the_init", exec_that_outlives_the_init),
        ("exec_after_the_init", exec_after_the_init),
        ("pids_of_processes", pids_of_processes),
        ("limits_and_statistics", limits_and_statistics),
        ("out_of_memory", out_of_memory),
        ("slowly_out_of_memory", slowly_out_of_memory),
        ("processes_of_the_host", processes_of_the_host),
        ("network_by_path", network_by_path),
        ("propagation_of_the_root", propagation_of_the_root),
        ("bind_of_the_bundle", bind_of_the_bundle),
        ("hooks", hooks),
        ("hooks_that_fail", hooks_that_fail),
        (
            "hook_of_the_host_in_the_container",
            hook_of_the_host_in_the_container,
        ),
    ]);
}

fn exec_life(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    let (shim, nothing) = (&pod.shim, Paths::default());
    let streams = pod.peer.streams(id, None).unwrap();
    let program = ["sh", "-c", "echo out; exit 3"];
    notes.push(format!(
        "exec: {}",
        code(&shim.exec(id, "x", &program, &streams.paths))
    ));
    notes.push(format!(
        "exec: {}",
        code(&shim.exec(id, "x", &program, &nothing))
    ));
    notes.push(format!("status: {}", shim.status(id, "x")));
    notes.push(format!(
        "kill: {}",
        code(&shim.kill(id, "x", SIGKILL, false))
    ));
    let pid = shim.start(id, "x").unwrap();
    let exit = shim.wait(id, "x").unwrap();
    notes.push(format!("wait: {}", exit.exit_status));
    let state = shim.state(id, "x").unwrap();
    notes.push(format!("named {:?} {:?}", state.id, state.exec_id));
    notes.push(format!("status: {:?}", state.status));
    notes.push(format!("start: {}", code(&shim.start(id, "x"))));
    notes.push(format!(
        "kill: {}",
        code(&shim.kill(id, "x", SIGKILL, false))
    ));
    let deleted = shim.delete(id, "x").unwrap();
    notes.push(format!("delete: {}", deleted.exit_status));
    assert_eq!(deleted.pid, pid);
    assert_eq!(deleted.exited_at, exit.exited_at);
    notes.push(format!("stdout: {}", streams.stdout.text().unwrap()));
    notes.push(format!("delete: {}", code(&shim.delete(id, "x"))));
    notes.push(format!("wait: {}", code(&shim.wait(id, "x"))));
    notes.push(format!("status: {}", shim.status(id, "x")));

    shim.exec(id, "y", &["sleep", "1000"], &nothing).unwrap();
    shim.start(id, "y").unwrap();
    notes.push(format!("delete: {}", code(&shim.delete(id, "y"))));
    shim.kill(id, "y", SIGKILL, false).unwrap();
    notes.push(format!("wait: {}", shim.wait(id, "y").unwrap().exit_status));
    notes.push(format!("init: {}", shim.status(id, "")));
    shim.delete(id, "y").unwrap();
    // Never started.
    shim.exec(id, "z", &["true"], &nothing).unwrap();
    notes.push(format!("delete: {}", code(&shim.delete(id, "z"))));
    notes.push(format!("delete init: {}", code(&shim.delete(id, ""))));
    pod.remove(id);
    notes.push(pod.events(id, "delete"));
    notes
}

/// Processes that end before anybody can ask for them: each start is told before its end, and a kill that comes too late is told so.
fn short_lives(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    let (shim, nothing) = (&pod.shim, Paths::default());
    for exec in ["a", "b", "c", "d"] {
        shim.exec(id, exec, &["true"], &nothing).unwrap();
        let pid = shim.start(id, exec).unwrap();
        // What becomes of the signal is chance.
        let killed = code(&shim.kill(id, exec, SIGTERM, false));
        assert!(["OK", "NOT_FOUND"].contains(&killed.as_str()), "{killed}");
        if killed == "NOT_FOUND" && pod.peer.runtime() == Runtime::Bulkhead {
            assert_eq!(shim.status(id, exec), "STOPPED");
        }
        let exit = shim.wait(id, exec).unwrap();
        assert!([0, 143].contains(&exit.exit_status), "{exit:?}");
        assert_eq!(shim.status(id, exec), "STOPPED");
        assert_eq!(shim.delete(id, exec).unwrap().exited_at, exit.exited_at);
        let events = pod.peer.events.until(id, &format!("exit {exec}")).unwrap();
        let [.., started, ended] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!((started.pid, ended.pid), (pid, pid));
        notes.push(started.text.clone());
    }
    pod.remove(id);
    notes.push(pod.events(id, "delete"));
    notes
}

/// Requests that come at the same time, of which one can be granted.
fn two_at_once(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let bundle = pod.member(id, &["sleep", "1000"]);
    let (shim, nothing) = (&pod.shim, Paths::default());
    let mut twice = |what: &str, ask: &(dyn Fn() -> String + Sync)| {
        let (one, other) = thread::scope(|scope| {
            let other = scope.spawn(ask);
            (ask(), other.join().unwrap())
        });
        let granted = [&one, &other].iter().filter(|code| **code == "OK").count();
        assert_eq!(granted, 1, "{what}: {one}, {other}");
        let refused = if one == "OK" { other } else { one };
        notes.push(format!("{what}: {refused}"));
    };
    twice("create", &|| code(&shim.create(&bundle, &nothing)));
    twice("start", &|| code(&shim.start(id, "")));
    twice("exec", &|| {
        code(&shim.exec(id, "x", &["sleep", "1000"], &nothing))
    });
    twice("start x", &|| code(&shim.start(id, "x")));
    shim.kill(id, "x", SIGKILL, false).unwrap();
    shim.wait(id, "x").unwrap();
    twice("delete x", &|| code(&shim.delete(id, "x")));
    shim.kill(id, "", SIGKILL, false).unwrap();
    shim.wait(id, "").unwrap();
    twice("delete", &|| code(&shim.delete(id, "")));
    notes.push(pod.events(id, "delete"));
    notes
}

fn exec_of_a_missing_program(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    let shim = &pod.shim;
    let program = ["/no/such/program"];
    let exec = shim.exec(id, "x", &program, &Paths::default());
    notes.push(format!("exec: {}", code(&exec)));
    let own = id.to_owned();
    let early = background(shim, move |shim| shim.wait(&own, "x"));
    let started = shim.start(id, "x");
    assert!(format!("{started:?}").contains(program[0]), "{started:?}");
    notes.push(format!("start: {}", code(&started)));
    for waited in [early.join().unwrap(), shim.wait(id, "x")] {
        let waited = waited.unwrap();
        // That of runc's shim is long before all others.
        let at = waited.exited_at.seconds > 0;
        notes.push(format!("wait: {}, at a time: {at}", waited.exit_status));
    }
    notes.push(format!("status: {}", shim.status(id, "x")));
    notes.push(format!("delete: {}", code(&shim.delete(id, "x"))));
    notes.push(format!("init: {}", shim.status(id, "")));
    pod.remove(id);
    notes.push(pod.events(id, "delete"));
    notes
}

fn exec_that_cannot_be_made(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    let shim = &pod.shim;
    let missing = pod.peer.path("no-fifo").display().to_string();
    let nowhere = Paths {
        stderr: missing.clone(),
        stdout: missing,
        ..Paths::default()
    };
    for (exec, directory, paths) in [
        ("directory", "tmp", Paths::default()),
        ("fifo", "/", nowhere),
    ] {
        let added = shim.exec_changed(id, exec, &["true"], &paths, |process| {
            process["cwd"] = directory.into();
        });
        notes.push(format!(
            "exec {}, start {}, state {}, delete {}",
            code(&added),
            code(&shim.start(id, exec)),
            shim.status(id, exec),
            code(&shim.delete(id, exec))
        ));
    }
    pod.remove(id);
    notes.push(pod.events(id, "delete"));
    notes
}

/// The container is there before its program is.
fn exec_before_the_start(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let shim = &pod.shim;
    let bundle = pod.member(id, &["sleep", "1000"]);
    shim.create(&bundle, &Paths::default()).unwrap();
    let streams = pod.peer.streams(id, None).unwrap();
    let program = ["sh", "-c", "ls -d /proc/1 /etc/passwd; exit 3"];
    let exec = shim.exec(id, "x", &program, &streams.paths);
    notes.push(format!("exec: {}", code(&exec)));
    notes.push(format!("start: {}", code(&shim.start(id, "x"))));
    notes.push(format!("wait: {}", shim.wait(id, "x").unwrap().exit_status));
    notes.push(format!("init: {}", shim.status(id, "")));
    notes.push(format!("delete: {}", code(&shim.delete(id, "x"))));
    notes.push(streams.stdout.text().unwrap());
    let nothing = Paths::default();
    shim.exec(id, "y", &["sleep", "1000"], &nothing).unwrap();
    shim.start(id, "y").unwrap();
    notes.push(format!("start init: {}", code(&shim.start(id, ""))));
    notes.push(format!("y: {}", shim.status(id, "y")));
    shim.kill(id, "y", SIGKILL, false).unwrap();
    notes.push(format!("wait: {}", shim.wait(id, "y").unwrap().exit_status));
    shim.delete(id, "y").unwrap();
    pod.remove(id);
    notes.push(pod.events(id, "delete"));
    notes
}

fn exec_that_outlives_the_init(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    let shim = &pod.shim;
    for exec in ["x", "y"] {
        shim.exec(id, exec, &["sleep", "1000"], &Paths::default())
            .unwrap();
        shim.start(id, exec).unwrap();
    }
    shim.kill(id, "", SIGKILL, false).unwrap();
    notes.push(format!("init: {}", shim.wait(id, "").unwrap().exit_status));
    for exec in ["x", "y"] {
        notes.push(format!(
            "{exec}: {}",
            shim.wait(id, exec).unwrap().exit_status
        ));
    }
    shim.delete(id, "").unwrap();
    let events = pod.events(id, "delete");
    // Those of the execs come in either order.
    let mut words: Vec<&str> = events.split(", ").collect();
    if let Some(first) = words.iter().position(|word| word.starts_with("exit")) {
        let length = words.len();
        words[first..length.saturating_sub(2)].sort_unstable();
    }
    notes.push(words.join(", "));
    notes
}

fn exec_after_the_init(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    let (shim, nothing) = (&pod.shim, Paths::default());
    shim.exec(id, "x", &["true"], &nothing).unwrap();
    shim.kill(id, "", SIGKILL, false).unwrap();
    shim.wait(id, "").unwrap();
    notes.push(format!("start: {}", code(&shim.start(id, "x"))));
    notes.push(format!("wait: {}", shim.wait(id, "x").unwrap().exit_status));
    notes.push(format!(
        "exec: {}",
        code(&shim.exec(id, "y", &["true"], &nothing))
    ));
    notes.push(format!("delete: {}", code(&shim.delete(id, "x"))));
    shim.delete(id, "").unwrap();
    notes.push(pod.events(id, "delete"));
    notes
}

fn pids_of_processes(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let (paths, wait) = pod.first_word(id);
    let shim = &pod.shim;
    let bundle = pod.member(id, &["sh", "-c", "sleep 1000 & echo .; wait"]);
    let pid = shim.create(&bundle, &paths).unwrap();
    // A containerd that comes back forgets a task without processes.
    let pids = shim.pids(id).unwrap().processes;
    let pids: Vec<_> = pids.iter().map(|process| process.pid == pid).collect();
    notes.push(format!("created: {pids:?}"));
    shim.start(id, "").unwrap();
    wait();
    shim.exec(id, "x", &["sleep", "1000"], &Paths::default())
        .unwrap();
    let exec = shim.start(id, "x").unwrap();
    let pids = shim.pids(id).unwrap().processes;
    notes.push(format!("count: {}", pids.len()));
    let listed = |pid| pids.iter().filter(|process| process.pid == pid).count();
    notes.push(format!("init: {}, exec: {}", listed(pid), listed(exec)));
    notes.push(format!("apart: {}", pid != exec));
    let details = pids.iter().filter(|process| process.info.is_some());
    let details: Vec<_> = details.map(|process| process.pid == exec).collect();
    notes.push(format!("details: {details:?}"));
    pod.remove(id);
    notes
}

fn limits_and_statistics(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let shim = &pod.shim;
    let (paths, wait) = pod.first_word(id);
    let bundle = pod.member(id, &["sh", "-c", "echo .; exec sleep 1000"]);
    shim.create(&bundle, &paths).unwrap();
    shim.start(id, "").unwrap();
    // Until then there may be threads of runc.
    wait();
    let stats = shim.stats(id).unwrap().stats;
    notes.push(stats.type_url.clone());
    let stats = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert!(
        stats.cpu.usage_usec > 0 && stats.memory.usage > 0,
        "{stats}"
    );
    notes.push(format!("processes: {}", stats.pids.current));
    notes.push(format!("given: {:?}", given(&stats)));
    let resources = json!({
        "memory": {"limit": 64 << 20}, "pids": {"limit": 50}, "cpu": {"shares": 512},
    });
    notes.push(format!("update: {}", code(&shim.update(id, &resources))));
    let streams = pod.peer.streams(id, None).unwrap();
    let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.weight";
    shim.exec(id, "x", &["sh", "-c", script], &streams.paths)
        .unwrap();
    shim.start(id, "x").unwrap();
    shim.wait(id, "x").unwrap();
    shim.delete(id, "x").unwrap();
    notes.push(format!("limits: {}", streams.stdout.text().unwrap()));
    // More than any machine has: it is a limit, and no promise.
    let resources = json!({"memory": {"limit": 1_u64 << 40}});
    notes.push(format!("update: {}", code(&shim.update(id, &resources))));
    shim.kill(id, "", SIGKILL, false).unwrap();
    shim.wait(id, "").unwrap();
    notes.push(format!("update: {}", code(&shim.update(id, &resources))));
    notes.push(format!("stats: {}", code(&shim.stats(id))));
    notes.push(format!("pids: {}", code(&shim.pids(id))));
    shim.delete(id, "").unwrap();
    notes
}

/// What statistics tell of, but for lists.
pub fn given(stats: &Metrics) -> Vec<String> {
    let fields = stats.descriptor_dyn().fields().collect::<Vec<_>>();
    let given = fields
        .iter()
        .filter(|field| match field.runtime_field_type() {
            RuntimeFieldType::Singular(_) => field.has_field(stats),
            RuntimeFieldType::Repeated(_) | RuntimeFieldType::Map(..) => false,
        });
    given.map(|field| field.name().to_owned()).collect()
}

/// A container that wants more memory than it may have ends, and no other.
fn out_of_memory(pod: &Pod, id: &str) -> Notes {
    // It keeps the last line, which has no end.
    exceed_memory(pod, id, &["tail", "/dev/zero"])
}

/// What can be taken from such a container before there is no memory is its programs at last. That they are read again, page by page, must
/// not keep it from its end. With several of them there is always one whose page can be taken.
fn slowly_out_of_memory(pod: &Pod, id: &str) -> Notes {
    let script = "for i in 1 2; do while :; do read stat </proc/self/stat; done & done; \
                  x=$(dd if=/dev/zero bs=1M count=100 2>/dev/null | tr '\\0' x)";
    exceed_memory(pod, id, &["sh", "-c", script])
}

fn exceed_memory(pod: &Pod, id: &str, program: &[&str]) -> Notes {
    let mut notes = Notes::new();
    let neighbour = format!("{id}-neighbour");
    pod.run(&neighbour, &["sleep", "1000"]);
    let change = |config: &mut Value| {
        let limit = 16 << 20;
        config["linux"]["resources"]["memory"] = json!({"limit": limit, "swap": limit});
    };
    let kind = Kind::Member(&pod.sandbox.id);
    let bundle = pod.peer.bundle(id, kind, program, change).unwrap();
    let shim = &pod.shim;
    shim.create(&bundle, &Paths::default()).unwrap();
    shim.start(id, "").unwrap();
    notes.push(format!("wait: {}", shim.wait(id, "").unwrap().exit_status));
    notes.push(format!("neighbour: {}", shim.status(&neighbour, "")));
    shim.delete(id, "").unwrap();
    pod.remove(&neighbour);
    let events = pod.events(id, "delete");
    let told = events.split(", ").position(|word| word == "oom");
    if pod.peer.runtime() == Runtime::Bulkhead {
        // Kubernetes believes what was told before the end; runc's shim tells when it comes to it.
        assert_eq!(told, Some(2), "{events}");
    }
    notes.push(events.replace("oom, ", ""));
    notes
}

/// A link of a process in /proc.
fn link(pid: u32, name: &str) -> String {
    let target = fs::read_link(format!("/proc/{pid}/{name}"));
    target.map_or_else(|error| error.to_string(), |path| path.display().to_string())
}

/// Whether there is a process.
fn there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn processes_of_the_host(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let (shim, nothing) = (&pod.shim, Paths::default());
    // What it sees of a signal that it handles.
    let handler = format!("{id}-handler");
    let (paths, wait) = pod.first_word(&handler);
    let script = "trap 'exit 9' TERM; echo .; sleep 1000 >/dev/null 2>&1 & wait";
    let bundle = pod.member(&handler, &["sh", "-c", script]);
    let init = shim.create(&bundle, &paths).unwrap();
    notes.push(format!("created: {}", there(init)));
    shim.start(&handler, "").unwrap();
    wait();
    send(init, Signal::TERM);
    let exit = shim.wait(&handler, "").unwrap();
    notes.push(format!("handler: {}", exit.exit_status));
    shim.delete(&handler, "").unwrap();

    let init = pod.run(id, &["sleep", "1000"]);
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];
    let own = kinds.map(|kind| format!("ns/{kind}"));
    let own = own
        .iter()
        .filter(|kind| link(init, kind) != link(std::process::id(), kind));
    notes.push(format!("own: {:?}", own.collect::<Vec<_>>()));
    let program = format!("/proc/{init}/root/bin/busybox");
    notes.push(format!("its files: {}", Path::new(&program).exists()));
    // The host's would be the worst.
    let sites = format!("/proc/{init}/root{}", pod.peer.path("").display());
    notes.push(format!("the host's: {}", Path::new(&sites).exists()));
    let cgroup = fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap();
    notes.push(format!("below default: {}", cgroup.contains("::/default/")));
    for (exec, signal) in [("term", Signal::TERM), ("kill", Signal::KILL)] {
        shim.exec(id, exec, &["sleep", "1000"], &nothing).unwrap();
        notes.push(format!("before: {}", shim.state(id, exec).unwrap().pid));
        let pid = shim.start(id, exec).unwrap();
        notes.push(format!(
            "joins: {}",
            link(pid, "ns/net") == link(init, "ns/net")
        ));
        send(pid, signal);
        notes.push(format!(
            "{exec}: {}",
            shim.wait(id, exec).unwrap().exit_status
        ));
        notes.push(format!("there: {}", there(pid)));
        let state = shim.state(id, exec).unwrap();
        notes.push(format!("number: {}", state.pid == pid));
        shim.delete(id, exec).unwrap();
    }
    for (signal, state) in [(Signal::STOP, "T"), (Signal::CONT, "S")] {
        send(init, signal);
        let script = format!("until grep -q '^State:.{state}' /proc/1/status; do :; done");
        shim.exec(id, state, &["sh", "-c", &script], &nothing)
            .unwrap();
        shim.start(id, state).unwrap();
        let seen = shim.wait(id, state).unwrap().exit_status;
        notes.push(format!("{state}: {seen}"));
        shim.delete(id, state).unwrap();
    }
    send(init, Signal::KILL);
    notes.push(format!("init: {}", shim.wait(id, "").unwrap().exit_status));
    notes.push(format!("there: {}", there(init)));
    shim.delete(id, "").unwrap();
    notes.push(pod.events(id, "delete"));
    notes
}

/// A pod whose network has no name but that of its first process.
fn network_by_path(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let call = |command: &mut Command| assert!(command.status().unwrap().success());
    let sandbox = pod.shim.state(&pod.sandbox.id, "").unwrap().pid;
    let process = format!("/proc/{sandbox}/ns/net");
    let path = pod.peer.path("network");
    fs::write(&path, "").unwrap();
    call(Command::new("mount").args(["--bind", &process]).arg(&path));
    let kind = Kind::Member(&pod.sandbox.id);
    let in_network = |id: &str, path: Option<&Path>, setting: Option<&str>| {
        let change = |config: &mut Value| {
            if let Some(path) = path {
                config["linux"]["namespaces"][2]["path"] = json!(path);
            }
            if let Some(value) = setting {
                config["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": value});
            }
        };
        let bundle = pod.peer.bundle(id, kind, &["sleep", "1000"], change);
        bundle.unwrap()
    };
    let bundle = in_network(id, Some(&path), Some("7"));
    let pid = pod.shim.create(&bundle, &Paths::default()).unwrap();
    pod.shim.start(id, "").unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    notes.push(format!(
        "joins: {}",
        link(pid, "ns/net") == format!("net:[{inode}]")
    ));
    // The setting is the pod's now, and not that of one who has a network of its own.
    for path in [Some(Path::new(&process)), None] {
        let id = format!("{id}-beside");
        let bundle = in_network(&id, path, None);
        let pid = pod.shim.create(&bundle, &Paths::default()).unwrap();
        pod.shim.start(&id, "").unwrap();
        notes.push(format!(
            "joins: {}, sees {}",
            link(pid, "ns/net") == format!("net:[{inode}]"),
            pod.say(
                &id,
                "echo $(ls /sys/class/net) $(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)"
            )
            .trim_end()
        ));
        pod.remove(&id);
        pod.events(&id, "delete");
    }
    pod.remove(id);
    call(Command::new("umount").arg(&path));
    // A file is no network.
    notes.push(format!(
        "create: {}",
        code(&pod.shim.create(&bundle, &Paths::default()))
    ));
    if pod.peer.runtime() == Runtime::Runc {
        // runc may leave what it has made of it by then.
        let _ = fs::remove_dir(format!("/sys/fs/cgroup/default/{id}"));
    }
    notes
}

fn propagation_of_the_root(pod: &Pod, id: &str) -> Notes {
    // Whether it has peers; whose slave it is depends on what is mounted around it.
    let script = "while read -r a b c d place options rest; do test $place = / && case $rest in
        *shared:*) echo shared;; *unbindable*) echo unbindable;; *) echo private;; esac; done </proc/self/mountinfo";
    let program = ["sh", "-c", script];
    let found = |propagation: &&str| {
        let id = format!("{id}-{propagation}");
        let change = |config: &mut Value| {
            config["linux"]["rootfsPropagation"] = json!(propagation);
        };
        let said = pod.said(&id, &program, change);
        let code = code(&said);
        format!("{propagation}: {}", said.unwrap_or(code))
    };
    let all = [
        "private",
        "rprivate",
        "slave",
        "rslave",
        "shared",
        "rshared",
        "unbindable",
        "runbindable",
    ];
    all.iter().map(found).collect()
}

/// A source that is no absolute path is in the container's bundle, and not in the one that the shim was started for.
fn bind_of_the_bundle(pod: &Pod, id: &str) -> Notes {
    let change = |config: &mut Value| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/data", "type": "bind", "source": "data", "options": ["bind", "ro"]}));
    };
    let kind = Kind::Member(&pod.sandbox.id);
    let bundle = pod.peer.bundle(id, kind, &["cat", "/data"], change);
    let bundle = bundle.unwrap();
    fs::write(bundle.path.join("data"), "of the bundle").unwrap();
    let streams = pod.peer.streams(id, None).unwrap();
    pod.shim.create(&bundle, &streams.paths).unwrap();
    pod.shim.start(id, "").unwrap();
    pod.shim.wait(id, "").unwrap();
    pod.shim.delete(id, "").unwrap();
    vec![
        pod.events(id, "delete"),
        streams.stdout.text().unwrap(),
        streams.stderr.text().unwrap(),
    ]
}

/// The bundle of a container that runs until it is killed, with hooks that write down what they see; the one of this name
/// fails.
fn hooked(pod: &Pod, id: &str, fails: &str) -> (Bundle, PathBuf) {
    let log = pod.peer.path(&format!("{id}-log"));
    let change = |config: &mut Value| {
        for name in ["prestart", "createRuntime", "poststart", "poststop"] {
            let code = if name == fails { 3 } else { 0 };
            // Words of the state that say something, and whether there is a process.
            let script = format!(
                "exec >>{}; echo {name} $0 $WORD; tr ',' '\\n' | tr -d '{{}}\"' | grep -E '^(id|status):'; exit {code}",
                log.display()
            );
            config["hooks"][name] = json!([{
                "path": "/bin/sh",
                "args": ["hook", "-c", script],
                "env": ["PATH=/usr/bin:/bin", "WORD=word"],
                "timeout": 60,
            }]);
        }
    };
    let kind = Kind::Member(&pod.sandbox.id);
    let bundle = pod.peer.bundle(id, kind, &["sleep", "1000"], change);
    (bundle.unwrap(), log)
}

fn hooks(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let (bundle, log) = hooked(pod, id, "");
    let step = |notes: &mut Notes, what: String| {
        let text = fs::read_to_string(&log).unwrap_or_default();
        notes.push(format!("{what}: {}", text.replace('\n', " ")));
        drop(fs::write(&log, ""));
    };
    let created = pod.shim.create(&bundle, &Paths::default());
    step(&mut notes, format!("create {}", code(&created)));
    let started = pod.shim.start(id, "");
    step(&mut notes, format!("start {}", code(&started)));
    pod.shim.kill(id, "", SIGKILL, true).unwrap();
    pod.shim.wait(id, "").unwrap();
    let deleted = pod.shim.delete(id, "");
    step(&mut notes, format!("delete {}", code(&deleted)));
    notes
}

/// A hook that runs in the container's namespaces, whose program only the host has.
fn hook_of_the_host_in_the_container(pod: &Pod, id: &str) -> Notes {
    let program = pod.peer.path(&format!("{id}-hook"));
    fs::write(&program, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let change = |config: &mut Value| {
        config["hooks"]["createContainer"] = json!([{"path": program}]);
    };
    let kind = Kind::Member(&pod.sandbox.id);
    let bundle = pod.peer.bundle(id, kind, &["true"], change).unwrap();
    let created = pod.shim.create(&bundle, &Paths::default());
    if created.is_ok() {
        pod.shim.delete(id, "").unwrap();
        pod.events(id, "delete");
    }
    vec![format!("create: {}", code(&created))]
}

fn hooks_that_fail(pod: &Pod, id: &str) -> Notes {
    let outcome = |fails: &&str| {
        let id = format!("{id}-{}", fails.to_lowercase());
        let (bundle, log) = hooked(pod, &id, fails);
        let created = pod.shim.create(&bundle, &Paths::default());
        let mut outcome = format!("{fails}: ");
        if created.is_ok() {
            let started = pod.shim.start(&id, "");
            if started.is_ok() {
                pod.shim.kill(&id, "", SIGKILL, true).unwrap();
            }
            pod.shim.wait(&id, "").unwrap();
            let deleted = code(&pod.shim.delete(&id, ""));
            let events = pod.events(&id, "delete").replace(&id, "-");
            outcome += &format!("start {}, delete {deleted}, {events}, ", code(&started));
        }
        let text = fs::read_to_string(&log).unwrap_or_default();
        for name in text
            .lines()
            .filter_map(|line| line.strip_suffix(" hook word"))
        {
            outcome += &format!("{name}, ");
        }
        outcome
            + &format!(
                "then {}, create: {}",
                pod.shim.status(&id, ""),
                code(&created)
            )
    };
    let stages = ["prestart", "createRuntime", "poststart", "poststop"];
    stages.iter().map(outcome).collect()
}
