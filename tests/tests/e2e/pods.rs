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
                  exec tail -f /dev/null";
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

    // A container may share what another has, found by the host's process that stands for it; that of the pod stands for the machine.
    let look = [
        "sh",
        "-c",
        "for kind in pid ipc uts; do readlink /proc/self/ns/$kind; done; tr '\\0' ' ' </proc/1/cmdline",
    ];
    let own = first.exec(&look).output().unwrap().success().unwrap();
    let sharing = |pid: u32| {
        let shared = ["pid", "ipc", "uts"].into_iter();
        let options = shared.flat_map(|kind| {
            [
                "--with-ns".to_owned(),
                format!("{kind}:/proc/{pid}/ns/{kind}"),
            ]
        });
        member().options(options)
    };
    let debugger = sharing(first.pid().unwrap())
        .start(&["tail", "-f", "/dev/null"])
        .unwrap();
    let shared = debugger.exec(&look).output().unwrap().success().unwrap();
    assert_eq!(shared, own);
    debugger.kill("SIGKILL").unwrap();
    assert_eq!(debugger.wait().unwrap(), 137);
    let machines = sharing(sandbox.pid().unwrap()).run(&look).output().unwrap();
    let machines = machines.success().unwrap();
    assert!(!machines.contains("/dev/null"), "{machines}");
    for line in own.lines().take(3) {
        assert!(
            line.contains(":[") && !machines.contains(line),
            "{own}{machines}"
        );
    }
    let foreign = sharing(1).run(&look).output().unwrap();
    assert!(
        foreign
            .stderr
            .contains("/proc/1/ns/pid is no namespace of this microVM"),
        "{}",
        foreign.stderr
    );

    // The pod outlives its last container, and takes another.
    first.kill("SIGKILL").unwrap();
    assert_eq!(first.wait().unwrap(), 137);
    assert_eq!(sandbox.status().unwrap(), "RUNNING");
    let last = member().run(&ask).output().unwrap().success().unwrap();
    assert_eq!(boot_id(&last), boot_id(&inside));

    // Its disk is gone with it: there is room for no more than 30 at once.
    let devices = || {
        let call = member().run(&["ls", "/sys/bus/pci/devices"]);
        call.output().unwrap().success().unwrap()
    };
    let before = devices();
    assert_eq!(devices(), before);

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
