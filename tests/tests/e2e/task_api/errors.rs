//! What fails, and how it is told.

use std::fs;

use bulkhead_tests::peer::{Kind, Paths, code};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use serde_json::{Value, json};

use super::processes::given;
use super::{Notes, Pod, SIGKILL, SIGUSR1, compare, wait_for_end};

#[test]
fn requests_fail_as_under_runc() {
    compare(&[
        ("missing_program", missing_program),
        ("wrong_working_directory", wrong_directory),
        ("same_container_twice", same_container_twice),
        ("nobody_there", nobody_there),
        ("block_devices", block_devices),
        ("checkpoint", checkpoint),
        ("shutdown_with_tasks", shutdown_with_tasks),
        ("the_sandbox_itself", the_sandbox_itself),
    ]);
}

fn missing_program(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let nothing = Paths::default();
    for program in ["/no/such/program", "no-such-program", "/etc/passwd", "/bin"] {
        let bundle = pod.member(id, &[program]);
        let created = pod.shim.create(&bundle, &nothing);
        assert!(
            format!("{created:?}").contains(program),
            "{program} is not named: {created:?}"
        );
        notes.push(format!("create {program}: {}", code(&created)));
        notes.push(format!("state: {}", pod.shim.status(id, "")));
    }
    let bundle = pod.member(id, &["true"]);
    notes.push(format!(
        "create: {}",
        code(&pod.shim.create(&bundle, &nothing))
    ));
    notes.push(format!("start: {}", code(&pod.shim.start(id, ""))));
    notes.push(format!(
        "wait: {}",
        pod.shim.wait(id, "").unwrap().exit_status
    ));
    pod.shim.delete(id, "").unwrap();
    notes.push(pod.events(id, "delete"));
    notes
}

fn wrong_directory(pod: &Pod, id: &str) -> Notes {
    let kind = Kind::Member(&pod.sandbox.id);
    let change = |config: &mut Value| {
        config["process"]["cwd"] = "/etc/passwd".into();
    };
    let bundle = pod.peer.bundle(id, kind, &["true"], change).unwrap();
    let created = pod.shim.create(&bundle, &Paths::default());
    vec![
        format!("create: {}", code(&created)),
        format!("state: {}", pod.shim.status(id, "")),
    ]
}

fn same_container_twice(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    let bundle = pod.member(id, &["sleep", "1000"]);
    let again = pod.shim.create(&bundle, &Paths::default());
    notes.push(format!("create: {}", code(&again)));
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    pod.remove(id);
    notes.push(pod.events(id, "delete"));
    notes
}

fn nobody_there(pod: &Pod, id: &str) -> Notes {
    let shim = &pod.shim;
    let nothing = Paths::default();
    let resources = json!({});
    vec![
        format!("state: {}", code(&shim.state(id, ""))),
        format!("start: {}", code(&shim.start(id, ""))),
        format!("wait: {}", code(&shim.wait(id, ""))),
        format!("kill: {}", code(&shim.kill(id, "", SIGKILL, false))),
        format!("delete: {}", code(&shim.delete(id, ""))),
        format!("exec: {}", code(&shim.exec(id, "x", &["true"], &nothing))),
        format!("pause: {}", code(&shim.pause(id))),
        format!("resume: {}", code(&shim.resume(id))),
        format!("pids: {}", code(&shim.pids(id))),
        format!("stats: {}", code(&shim.stats(id))),
        format!("update: {}", code(&shim.update(id, &resources))),
        format!("resize: {}", code(&shim.resize(id, "", (80, 25)))),
        format!("close: {}", code(&shim.close_stdin(id, ""))),
        format!("checkpoint: {}", code(&shim.checkpoint(id, "/nowhere"))),
        format!("connect: {}", code(&shim.server(id))),
        format!("no such method: {}", code(&shim.unknown())),
    ]
}

/// Those of the host, a loop device, and those of the host for who may use every device.
fn block_devices(pod: &Pod, id: &str) -> Notes {
    let numbers = fs::read_dir("/sys/class/block").unwrap().map(|entry| {
        let number = fs::read_to_string(entry.unwrap().path().join("dev")).unwrap();
        let (major, minor) = number.trim().split_once(':').unwrap();
        (major.parse().unwrap(), minor.parse().unwrap())
    });
    let mut numbers = numbers.filter(|&(major, _): &(u32, u32)| major != 7);
    let hosts = numbers.next().unwrap();
    let made = |what: &str, (major, minor): (u32, u32), rule: Value| {
        let id = format!("{id}-{what}");
        let script = format!("test $(stat -c %t:%T /dev/disk) = {major:x}:{minor:x} && echo made");
        let change = |config: &mut Value| {
            config["linux"]["devices"] =
                json!([{"path": "/dev/disk", "type": "b", "major": major, "minor": minor}]);
            let rules = &mut config["linux"]["resources"]["devices"];
            rules.as_array_mut().unwrap().push(rule);
        };
        let program = ["sh", "-c", &script];
        let said = pod.said(&id, &program, change);
        if let Err(error) = &said {
            let error = error.to_string();
            assert!(error.contains("linux.devices: /dev/disk"), "{error}");
        }
        let code = code(&said);
        format!("{what}: {}", said.unwrap_or(code))
    };
    let this =
        json!({"allow": true, "type": "b", "major": hosts.0, "minor": hosts.1, "access": "rwm"});
    vec![
        made("hosts", hosts, this),
        made("loop", (7, 0), json!({"allow": false, "access": "rwm"})),
        made("all", hosts, json!({"allow": true, "access": "rwm"})),
    ]
}

fn checkpoint(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    pod.run(id, &["sleep", "1000"]);
    let path = pod.peer.path("checkpoint").display().to_string();
    let checkpoint = pod.shim.checkpoint(id, &path);
    notes.push(format!("checkpoint: {}", code(&checkpoint)));
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    pod.remove(id);
    notes
}

fn shutdown_with_tasks(pod: &Pod, id: &str) -> Notes {
    pod.run(id, &["sleep", "1000"]);
    let mut notes = vec![format!("shutdown: {}", code(&pod.shim.shutdown(id)))];
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    pod.remove(id);
    notes
}

fn the_sandbox_itself(pod: &Pod, id: &str) -> Notes {
    let program = ["sleep", "1000"];
    let sandbox = pod
        .peer
        .bundle(id, Kind::Sandbox, &program, |_| {})
        .unwrap();
    let shim = pod.peer.start(&sandbox).unwrap();
    let nothing = Paths::default();
    let pid = shim.create(&sandbox, &nothing).unwrap();
    assert_eq!(shim.start(id, "").unwrap(), pid);
    let stats = shim.stats(id).unwrap().stats;
    let stats = Metrics::parse_from_bytes(&stats.value).unwrap();
    let mut notes = vec![
        format!("start: {}", code(&shim.start(id, ""))),
        format!("uses {:?}: {}", given(&stats), stats.memory.usage > 0),
        format!("pids: {}", shim.pids(id).unwrap().processes.len()),
        format!("resize: {}", code(&shim.resize(id, "", (80, 25)))),
        format!("close: {}", code(&shim.close_stdin(id, ""))),
        format!(
            "exec {}, pause {}, resume {}, update {}",
            code(&shim.exec(id, "x", &["true"], &nothing)),
            code(&shim.pause(id)),
            code(&shim.resume(id)),
            code(&shim.update(id, &json!({}))),
        ),
        format!("kill: {}", code(&shim.kill(id, "", SIGUSR1, false))),
        format!("status: {}", shim.status(id, "")),
    ];
    shim.kill(id, "", SIGKILL, true).unwrap();
    notes.push(format!("wait: {}", shim.wait(id, "").unwrap().exit_status));
    let server = shim.server(id).unwrap().shim_pid;
    shim.delete(id, "").unwrap();
    notes.push(pod.events(id, "delete"));
    // It may end before it has answered.
    drop(shim.shutdown(id));
    wait_for_end(server);
    notes
}
