//! What a container can reach.

use bulkhead_tests::ctr::{Runtime, World};

#[test]
fn a_container_sees_nothing_of_the_host() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let script = "
        mount -t sysfs none /sys 2>/dev/null; mount -t proc none /proc 2>/dev/null
        for path in /bulkhead /images /var/lib/site /dev/kvm /dev/vdd; do [ -e $path ] && echo $path; done
        cat /proc/mounts";
    let text = container
        .options(["--privileged"])
        .run(&["sh", "-c", script])
        .output()
        .unwrap()
        .success()
        .unwrap();
    for line in text.lines() {
        assert!(
            !line.contains("containerd") && !line.contains("9p"),
            "{line}"
        );
    }
    assert!(
        !text.contains("/bulkhead\n") && !text.contains("/images\n"),
        "{text}"
    );
    world.finish().unwrap();
}

#[test]
fn what_a_privileged_container_does_to_its_kernel_stays_there() {
    let world = World::new().unwrap();
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let script = "mount -t proc none /tmp && echo guest >/tmp/sys/kernel/core_pattern && cat /tmp/sys/kernel/core_pattern";
    let text = container
        .options(["--privileged"])
        .run(&["sh", "-c", script])
        .output()
        .unwrap()
        .success()
        .unwrap();
    assert_eq!(text, "guest\n");
    assert_eq!(
        std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(),
        pattern
    );
    world.finish().unwrap();
}

#[test]
fn a_panic_of_the_guest_ends_its_container_alone() {
    let world = World::new().unwrap();
    let neighbour = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let neighbour = neighbour.start(&["sleep", "1000"]).unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    // With 2 the kernel panics instead of killing the process that outgrows the container's limit.
    let script = "echo 2 >/proc/sys/vm/panic_on_oom || exit 1; dd if=/dev/zero of=/dev/null bs=64M count=1; exit 2";
    let outcome = container
        .options(["--privileged", "--memory-limit", "33554432"])
        .run(&["sh", "-c", script])
        .output()
        .unwrap();
    assert_eq!(outcome.code, 137, "{}", outcome.stderr);
    let log = std::fs::read_to_string(world.site().log()).unwrap();
    for words in ["the guest's kernel panicked", "panic_on_oom"] {
        assert!(log.contains(words), "no {words:?} in:\n{log}");
    }
    neighbour
        .exec(&["true"])
        .output()
        .unwrap()
        .success()
        .unwrap();
    neighbour.delete().unwrap();
    world.finish().unwrap();
}
