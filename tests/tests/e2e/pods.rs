//! Several containers in one machine, as a Kubernetes runtime asks for them.

use bulkhead_tests::ctr::{Container, Runtime, World};

/// What containerd's CRI plugin writes into a container's specification.
fn annotated<'a>(world: &'a World, kind: &str, sandbox: Option<&str>) -> Container<'a> {
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let sandbox = sandbox.unwrap_or(container.name()).to_owned();
    container.options([
        "--annotation".to_owned(),
        format!("io.kubernetes.cri.container-type={kind}"),
        "--annotation".to_owned(),
        format!("io.kubernetes.cri.sandbox-id={sandbox}"),
    ])
}

#[test]
fn the_containers_of_a_pod_share_its_machine() {
    let world = World::new().unwrap();
    let sandbox = annotated(&world, "sandbox", None);
    let pod = sandbox.name().to_owned();
    let sandbox = sandbox.start(&["pause"]).unwrap();
    assert_eq!(sandbox.status().unwrap(), "RUNNING");
    let member = || annotated(&world, "container", Some(&pod));

    // Its layers and its room to write come to a machine that runs already.
    let script = "cat /proc/sys/kernel/random/boot_id; echo mine >/file; cat /file; \
                  while :; do sleep 1000; done";
    let first = member().start(&["sh", "-c", script]).unwrap();
    let ask = [
        "sh",
        "-c",
        "ls / | grep -c '^file$'; cat /proc/sys/kernel/random/boot_id",
    ];
    let inside = first.exec(&ask).output().unwrap().success().unwrap();
    let beside = member().run(&ask).output().unwrap();
    // The neighbour's file is not there, and `grep` found none.
    assert_eq!(beside.code, 0, "{}", beside.stderr);
    let boot_id = |text: &str| text.lines().nth(1).unwrap().to_owned();
    assert_eq!(boot_id(&inside), boot_id(&beside.text()));
    assert!(beside.text().starts_with("0\n"), "{}", beside.text());

    // The pod outlives its last container, and takes another.
    first.kill("SIGKILL").unwrap();
    assert_eq!(first.wait().unwrap(), 137);
    assert_eq!(sandbox.status().unwrap(), "RUNNING");
    let last = member().run(&ask).output().unwrap().success().unwrap();
    assert_eq!(boot_id(&last), boot_id(&inside));

    sandbox.kill("SIGKILL").unwrap();
    assert_eq!(sandbox.wait().unwrap(), 137);
    world.finish().unwrap();
}

#[test]
fn a_container_without_its_pod_is_refused() {
    let world = World::new().unwrap();
    let call = annotated(&world, "container", Some("no-such-pod")).run(&["true"]);
    let outcome = call.output().unwrap();
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("sandbox"), "{}", outcome.stderr);
    world.finish().unwrap();
}
