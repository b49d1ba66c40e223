//! What a machine leaves of itself in the network namespace of its pod: nothing, however it ends.

use std::thread;

use bulkhead_tests::cni::Pod;
use bulkhead_tests::ctr::{Running, Runtime, World};
use bulkhead_tests::occasion::{Occasion, WatchFlags};
use bulkhead_tests::process;
use rustix::process::{Pid, Signal};

use super::start_in;
use super::traffic::bridge;

pub const VMM: &str = "bulkhead-vmm";
pub const SHIM: &str = "containerd-shim-bulkhead-v2";

/// All that is in the namespace, but for what only counts.
fn describe(pod: &Pod) -> String {
    let mut all = String::new();
    for command in [
        "ip -d address",
        "ip route show table all",
        "ip -6 route show table all",
        "tc qdisc",
        "tc filter show dev eth0 ingress",
        "tc filter show dev net1 ingress",
    ] {
        let words: Vec<_> = command.split(' ').collect();
        all += &pod.run(&words).unwrap();
    }
    all
}

fn same(pod: &Pod, before: &str, how: &str) {
    let after = describe(pod);
    for (after, before) in after.lines().zip(before.lines()) {
        assert_eq!(after, before, "{how}");
    }
    assert_eq!(after, before, "{how}");
}

/// Kills the shim when it has just written down what it is about to change.
fn killed_in_the_middle(world: &World, pod: &Pod) {
    let bundles = "state/io.containerd.runtime.v2.task/default";
    let bundles = world.site().directory.join(bundles);
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let container = container.options(pod.options());
    let bundle = bundles.join(container.name());
    let created = Occasion::watch(&bundles, WatchFlags::CREATE).unwrap();
    thread::scope(|scope| {
        let outcome = scope.spawn(|| container.run(&["true"]).output().unwrap());
        let name = bundle.file_name().unwrap().to_str().unwrap();
        created.wait(name).unwrap();
        let written = Occasion::watch(&bundle, WatchFlags::MOVED_TO).unwrap();
        written.wait("bulkhead-network.json").unwrap();
        process::kill(only(SHIM), Signal::KILL).unwrap();
        assert_ne!(outcome.join().unwrap().code, 0);
    });
    // containerd cleans up by itself.
    world.settle().unwrap();
}

pub fn only(program: &str) -> Pid {
    let processes = process::named(program).unwrap();
    assert_eq!(processes.len(), 1, "{program}");
    processes[0]
}

/// An end of a container.
type End = fn(Running<'_>);

#[test]
fn a_pods_network_is_as_it_was_however_its_machine_ends() {
    let mut world = World::new().unwrap();
    let mut pod = Pod::new().unwrap();
    for (interface, network) in [("eth0", 78), ("net1", 79)] {
        let bridge = bridge(&format!("remains{network}"), network, 1500);
        pod.attach(interface, interface, &[bridge]).unwrap();
    }
    // Somebody else's, which stays.
    for arguments in [
        "qdisc add dev net1 clsact",
        "filter add dev net1 ingress pref 7 protocol ip u32 match u32 0 0 action ok",
    ] {
        let words: Vec<_> = ["tc"].into_iter().chain(arguments.split(' ')).collect();
        pod.run(&words).unwrap();
    }
    let before = describe(&pod);
    world.keep().unwrap();
    let ends: [(&str, End); 3] = [
        ("deleted", |container| container.delete().unwrap()),
        ("without a VMM", |container| {
            process::kill(only(VMM), Signal::KILL).unwrap();
            assert_eq!(container.wait().unwrap(), 137);
        }),
        ("without a shim", |container| {
            let vmm = only(VMM);
            process::kill(only(SHIM), Signal::KILL).unwrap();
            process::wait(vmm).unwrap();
            container.forget().unwrap();
        }),
    ];
    for (how, end) in ends {
        let container = start_in(&world, Runtime::Bulkhead, &pod, &[]);
        assert_ne!(describe(&pod), before, "{how}");
        end(container);
        same(&pod, &before, how);
    }
    killed_in_the_middle(&world, &pod);
    same(&pod, &before, "in the middle");
    pod.remove().unwrap();
    world.finish().unwrap();
}
