//! What needs control groups of version 2 with their controllers.

use bulkhead_agent::protocol::RESOURCES_TYPE_URL;
use bulkhead_agent::protocol::sandbox::NextOomRequest;
use containerd_shim_protos::api::{
    PauseRequest, PidsRequest, ResumeRequest, StatsRequest, Status, UpdateTaskRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use protobuf::Message;
use serde_json::json;
use ttrpc::Code;

use crate::guest::{Guest, any, bind, context, process, spec, status};

/// Starts a container that sleeps.
async fn sleeper(guest: &Guest, id: &str, resources: serde_json::Value) {
    let mut spec = spec(&["sleep", "1000"]);
    spec["linux"]["resources"] = resources;
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "cgroup"}));
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
    let streams = guest.streams(false);
    guest
        .create(id, &spec, &[bind(&guest.root())], &streams, false)
        .await
        .unwrap();
    guest.start(id, "").await.unwrap();
}

async fn end(guest: &Guest, id: &str) {
    guest.kill(id, "", libc::SIGKILL, true).await.unwrap();
    guest.wait(id, "").await.unwrap();
    guest.delete(id, "").await.unwrap();
}

async fn run(guest: &Guest, id: &str, command: &str) -> String {
    let mut streams = guest.streams(false);
    guest
        .exec(id, "e", &process(&["sh", "-c", command]), &streams, false)
        .await
        .unwrap();
    guest.start(id, "e").await.unwrap();
    guest.wait(id, "e").await.unwrap();
    guest.delete(id, "e").await.unwrap();
    crate::guest::all(streams.output.take())
}

async fn stats(guest: &Guest, id: &str) -> Metrics {
    let request = StatsRequest {
        id: id.into(),
        ..Default::default()
    };
    let response = guest.task.stats(context(), &request).await.unwrap();
    let stats = response.stats.unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    Metrics::parse_from_bytes(&stats.value).unwrap()
}

pub async fn limits_are_set_changed_and_counted(guest: &Guest) {
    let limits = json!({
        "memory": {"limit": 64 << 20, "reservation": 16 << 20}, "pids": {"limit": 50},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000}, "unified": {"memory.high": "60000000"},
    });
    sleeper(guest, "limited", limits).await;
    let read = "cd /sys/fs/cgroup; cat memory.max memory.low pids.max cpu.weight cpu.max memory.high /proc/self/cgroup";
    let expected = "67108864\n16777216\n50\n20\n50000 100000\n59998208\n0::/\n";
    assert_eq!(run(guest, "limited", read).await, expected);

    let change =
        json!({"memory": {"limit": 32 << 20}, "pids": {"limit": -1}, "cpu": {"quota": -1}});
    let request = UpdateTaskRequest {
        id: "limited".into(),
        resources: any(RESOURCES_TYPE_URL, &change),
        ..Default::default()
    };
    guest.task.update(context(), &request).await.unwrap();
    assert_eq!(
        run(
            guest,
            "limited",
            "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max"
        )
        .await,
        "33554432\nmax\nmax 100000\n"
    );

    run(
        guest,
        "limited",
        "i=0; while test $i -lt 3000; do i=$((i+1)); done",
    )
    .await;
    let metrics = stats(guest, "limited").await;
    assert_eq!(
        (
            metrics.memory.usage_limit,
            metrics.pids.current,
            metrics.pids.limit
        ),
        (32 << 20, 1, 0)
    );
    assert!(metrics.memory.usage > 0 && metrics.memory.usage < 32 << 20);
    assert!(metrics.cpu.usage_usec > 0 && metrics.cpu.usage_usec >= metrics.cpu.user_usec);
    end(guest, "limited").await;
    assert_eq!(
        status(guest.task.update(context(), &request).await).0,
        Code::NOT_FOUND
    );
}

pub async fn running_out_of_memory_kills_in_the_container_and_is_told_before_the_exit(
    guest: &Guest,
) {
    let mut hungry = spec(&[
        "sh",
        "-c",
        "dd if=/dev/zero of=/dev/null bs=60000000 count=1",
    ]);
    hungry["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    hungry["process"]["args"] = json!([
        "dd",
        "if=/dev/zero",
        "of=/dev/null",
        "bs=60000000",
        "count=1"
    ]);
    let streams = guest.streams(false);
    guest
        .create("hungry", &hungry, &[bind(&guest.root())], &streams, false)
        .await
        .unwrap();
    guest.start("hungry", "").await.unwrap();
    // As the host asks when the kill has happened already: its exit must not have overtaken it.
    let kill = guest
        .sandbox
        .next_oom(context(), &NextOomRequest::new())
        .await
        .unwrap();
    assert_eq!(kill.container_id, "hungry");
    assert_eq!(guest.wait("hungry", "").await.unwrap(), 137);
    assert_eq!(stats(guest, "hungry").await.memory_events.oom_kill, 1);
    guest.delete("hungry", "").await.unwrap();
}

pub async fn pausing_stops_and_resuming_goes_on(guest: &Guest) {
    sleeper(guest, "paused", json!({})).await;
    let pause = PauseRequest {
        id: "paused".into(),
        ..Default::default()
    };
    let resume = ResumeRequest {
        id: "paused".into(),
        ..Default::default()
    };
    assert_eq!(
        status(guest.task.resume(context(), &resume).await).0,
        Code::FAILED_PRECONDITION
    );
    guest.task.pause(context(), &pause).await.unwrap();
    assert_eq!(
        guest.state("paused", "").await.unwrap().status.enum_value(),
        Ok(Status::PAUSED)
    );
    let streams = guest.streams(false);
    let added = guest
        .exec("paused", "e", &process(&["true"]), &streams, false)
        .await;
    assert_eq!(status(added).0, Code::FAILED_PRECONDITION);
    assert_eq!(
        status(guest.task.pause(context(), &pause).await).0,
        Code::FAILED_PRECONDITION
    );
    guest.task.resume(context(), &resume).await.unwrap();
    assert_eq!(
        guest.state("paused", "").await.unwrap().status.enum_value(),
        Ok(Status::RUNNING)
    );
    // A paused container can be killed.
    guest.task.pause(context(), &pause).await.unwrap();
    end(guest, "paused").await;
}

pub async fn processes_are_listed(guest: &Guest) {
    sleeper(guest, "listed", json!({})).await;
    let streams = guest.streams(false);
    guest
        .exec("listed", "e", &process(&["sleep", "1000"]), &streams, false)
        .await
        .unwrap();
    let exec = guest.start("listed", "e").await.unwrap();
    let request = PidsRequest {
        id: "listed".into(),
        ..Default::default()
    };
    let processes = guest
        .task
        .pids(context(), &request)
        .await
        .unwrap()
        .processes;
    let init = guest.state("listed", "").await.unwrap().pid;
    let mut pids: Vec<_> = processes.iter().map(|process| process.pid).collect();
    pids.sort_unstable();
    assert_eq!(pids, [init, exec]);
    let named: Vec<_> = processes
        .iter()
        .filter(|process| process.info.is_some())
        .collect();
    assert_eq!((named.len(), named[0].pid), (1, exec));
    end(guest, "listed").await;
}

pub async fn devices_are_those_allowed(guest: &Guest) {
    let deny = json!({"devices": [{"allow": false, "access": "rwm"}]});
    sleeper(guest, "devices", deny).await;
    // A loop device, which the default rules do not name: a node may be made, but not be opened.
    let open = "rm -f /dev/l; mknod /dev/l b 7 0 && (head -c 0 /dev/l 2>&1 && echo opened) | grep -o -e permitted -e opened -e 'No such device'";
    assert_eq!(run(guest, "devices", open).await, "permitted\n");
    assert_eq!(
        run(guest, "devices", "head -c 1 /dev/zero | wc -c").await,
        "1\n"
    );
    let allow = json!({"devices": [{"allow": true, "type": "b", "major": 7, "access": "rwm"}]});
    let request = UpdateTaskRequest {
        id: "devices".into(),
        resources: any(RESOURCES_TYPE_URL, &allow),
        ..Default::default()
    };
    guest.task.update(context(), &request).await.unwrap();
    assert_ne!(run(guest, "devices", open).await, "permitted\n");
    end(guest, "devices").await;
}

pub async fn a_shared_process_namespace_leaves_nothing_behind(guest: &Guest) {
    let script = "mkfifo never; cat never & cat never & echo started; exit 5";
    let mut shared = spec(&["sh", "-c", script]);
    let namespaces = shared["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "pid");
    let outcome = guest.run(&shared).await.unwrap();
    assert_eq!((outcome.status, outcome.output.as_str()), (5, "started\n"));
}
