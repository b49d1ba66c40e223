//! Limits that change while their container is there.

use std::fs::File;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Paths, code};
use bulkhead_tests::process;
use rustix::thread::{CpuSet, sched_getaffinity};
use serde_json::{Value, json};

use super::disks::limit;
use super::{Notes, Pod, SIGKILL, SIGUSR1, compare, line};

#[test]
fn limits_change_as_under_runc() {
    compare(&[
        ("updates", updates),
        ("wrong_updates", wrong_updates),
        ("updates_of_the_paused", updates_of_the_paused),
        ("updates_before_the_start", updates_before_the_start),
    ]);
}

/// Nothing of an update with something wrong that runc does not look at.
#[test]
fn a_refused_update_changes_nothing() {
    let world = World::new().unwrap();
    let pod = Pod::start(&world, Runtime::Bulkhead);
    pod.run("c", &["sleep", "1000"]);
    let machines = process::named("bulkhead-vmm").unwrap();
    assert_eq!(machines.len(), 1);
    let processors = || sched_getaffinity(Some(machines[0])).unwrap();
    let script = "cat /sys/block/vd*/queue/scheduler; cd /sys/fs/cgroup; cat memory.max cpu.max pids.max io.max io.bfq.weight";
    let state = || (pod.say("c", script), processors());
    let directory = &world.site().directory;
    let before = json!({
        "memory": {"limit": 96 << 20},
        "cpu": {"quota": 40_000, "period": 80_000},
        "pids": {"limit": 77},
        "blockIO": {"throttleWriteBpsDevice": [limit(directory, "rate", 1 << 20)]},
    });
    pod.shim.update("c", &before).unwrap();
    let before = state();
    let one = (0..CpuSet::MAX_CPU).find(|&cpu| before.1.is_set(cpu));
    let one = one.unwrap().to_string();
    let throttle = json!({"throttleReadBpsDevice": [limit(directory, "rate", 1 << 20)]});
    for (resources, words) in [
        (
            json!({"memory": {"limit": 64 << 20}, "devices": [{"allow": true, "access": "x"}]}),
            "access",
        ),
        (
            json!({"cpu": {"cpus": one}, "memory": {"kernel": 1}}),
            "memory.kernel",
        ),
        (json!({"blockIO": throttle, "cpu": {"quota": 1}}), "cpu.max"),
        // By the time that the last of it fails all else is set, and the disks have a scheduler for the weight.
        (
            json!({
                "memory": {"limit": 64 << 20},
                "cpu": {"cpus": one},
                "blockIO": {"weight": 500, "throttleReadBpsDevice": throttle["throttleReadBpsDevice"]},
                "unified": {"io.max": "many"},
            }),
            "io.max",
        ),
    ] {
        let answer = pod.shim.update("c", &resources);
        let refused = answer.unwrap_err().to_string();
        assert!(refused.contains(words), "{resources}: {refused}");
        assert_eq!(state(), before, "{resources}");
    }
    // One that is not refused does: processors by either name are the host's.
    let unified = json!({"unified": {"cpuset.cpus": one, "cpuset.mems": ""}});
    pod.shim.update("c", &unified).unwrap();
    assert_eq!(state().0, before.0);
    assert_eq!(processors().count(), 1);
    pod.remove("c");
    pod.end();
    world.finish().unwrap();
}

/// A container that says what its limits are whenever it is asked.
struct Limited<'a> {
    pod: &'a Pod,
    id: &'a str,
    output: File,
}

impl<'a> Limited<'a> {
    fn create(pod: &'a Pod, id: &'a str) -> Self {
        let (stdout, output) = pod.peer.unread(id).unwrap();
        let files = "memory.max memory.low memory.swap.max memory.high cpu.weight cpu.max pids.max";
        let script = format!(
            "trap 'echo $(cd /sys/fs/cgroup; cat {files})' USR1; echo ready; sleep 1000 & while :; do wait $!; done"
        );
        let bundle = pod.member(id, &["sh", "-c", &script]);
        let paths = Paths {
            stderr: stdout.clone(),
            stdout,
            ..Paths::default()
        };
        pod.shim.create(&bundle, &paths).unwrap();
        Self { pod, id, output }
    }

    fn start(&mut self) {
        self.pod.shim.start(self.id, "").unwrap();
        assert_eq!(line(&mut self.output), "ready");
    }

    /// The limits, as the container finds them.
    fn limits(&mut self) -> String {
        self.pod.shim.kill(self.id, "", SIGUSR1, false).unwrap();
        line(&mut self.output)
    }

    /// Asks for other limits, and notes the answer.
    fn update(&self, resources: &Value) -> String {
        let answer = self.pod.shim.update(self.id, resources);
        format!("{resources}: {}", code(&answer))
    }

    fn end(self) {
        self.pod.shim.kill(self.id, "", SIGKILL, true).unwrap();
        self.pod.shim.wait(self.id, "").unwrap();
        self.pod.shim.delete(self.id, "").unwrap();
    }
}

fn updates(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let mut limited = Limited::create(pod, id);
    limited.start();
    notes.push(limited.limits());
    for resources in [
        json!({"memory": {"limit": 96 << 20, "reservation": 16 << 20, "swap": 128 << 20}}),
        // What is not mentioned stays.
        json!({"memory": {"limit": 64 << 20}}),
        json!({"memory": {"reservation": 8 << 20}}),
        json!({"memory": {"limit": -1}}),
        json!({"memory": {"limit": 96 << 20, "swap": -1}}),
        json!({"cpu": {"shares": 512, "quota": 40_000, "period": 80_000}}),
        json!({"cpu": {"quota": 20_000}}),
        json!({"cpu": {"period": 50_000}}),
        json!({"cpu": {"quota": -1}}),
        json!({"cpu": {"shares": 2}}),
        json!({"pids": {"limit": 77}}),
        json!({"pids": {"limit": 0}}),
        json!({"pids": {"limit": -1}}),
        json!({"unified": {"memory.high": "61440000", "cpu.weight": "300"}}),
        json!({"unified": {"memory.high": "max"}, "pids": {"limit": 30}, "cpu": {"shares": 1024}}),
        json!({}),
        json!({"cpu": {"quota": 30_000}}),
    ] {
        notes.push(limited.update(&resources));
        notes.push(limited.limits());
    }
    limited.end();
    notes
}

/// None of what is asked for together with something wrong comes true.
fn wrong_updates(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let mut limited = Limited::create(pod, id);
    limited.start();
    let before = json!({
        "memory": {"limit": 96 << 20, "reservation": 16 << 20, "swap": 128 << 20},
        "cpu": {"shares": 512, "quota": 40_000, "period": 80_000},
        "pids": {"limit": 77},
    });
    notes.push(limited.update(&before));
    for resources in [
        json!({"cpu": {"quota": 1}}),
        json!({"cpu": {"quota": 40_000, "period": 10}}),
        json!({"memory": {"limit": 64 << 20, "swap": 32 << 20}}),
        json!({"memory": {"swap": 128 << 20}}),
        json!({"unified": {"no.such": "1"}}),
        json!({"unified": {"memory.high": "many"}}),
        json!({"unified": {"../memory.high": "1"}}),
        json!({"pids": {"limit": "many"}}),
        json!({"memory": {"limit": 48 << 20}, "pids": {"limit": 33}, "cpu": {"quota": 1}}),
        json!({"memory": {"limit": 48 << 20}, "pids": {"limit": 33}, "unified": {"memory.high": "many"}}),
    ] {
        notes.push(limited.update(&resources));
        notes.push(limited.limits());
    }
    limited.end();
    notes
}

fn updates_of_the_paused(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let mut limited = Limited::create(pod, id);
    limited.start();
    pod.shim.pause(id).unwrap();
    let resources = json!({"memory": {"limit": 96 << 20}, "pids": {"limit": 77}, "cpu": {"shares": 512, "quota": 40_000, "period": 80_000}});
    notes.push(limited.update(&resources));
    notes.push(limited.update(&json!({"cpu": {"quota": 1}})));
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    pod.shim.resume(id).unwrap();
    notes.push(limited.limits());
    limited.end();
    notes
}

fn updates_before_the_start(pod: &Pod, id: &str) -> Notes {
    let mut notes = Notes::new();
    let mut limited = Limited::create(pod, id);
    let resources = json!({"memory": {"limit": 96 << 20}, "pids": {"limit": 77}, "cpu": {"shares": 512, "quota": 40_000, "period": 80_000}});
    notes.push(limited.update(&resources));
    notes.push(limited.update(&json!({"cpu": {"quota": 1}})));
    notes.push(format!("status: {}", pod.shim.status(id, "")));
    limited.start();
    notes.push(limited.limits());
    limited.end();
    notes
}
