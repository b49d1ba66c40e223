//! One command in one container.

use std::fs;

use bulkhead_tests::ctr::{Runtime, World};

#[test]
fn a_container_has_a_kernel_of_its_own() {
    let world = World::new().unwrap();
    let read = [
        "cat",
        "/proc/sys/kernel/osrelease",
        "/proc/sys/kernel/random/boot_id",
        "/proc/version",
    ];
    let hosts: Vec<String> = read[1..]
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let text = container.run(&read).output().unwrap().success().unwrap();
    let guests: Vec<&str> = text.split_inclusive('\n').collect();
    assert_eq!(guests.len(), hosts.len(), "{text}");
    for (guest, host) in guests.iter().zip(&hosts) {
        assert_ne!(guest, host);
    }
    world.finish().unwrap();
}

#[test]
fn each_container_has_a_kernel_of_its_own() {
    let world = World::new().unwrap();
    let boot_id = || {
        let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
        container
            .run(&["cat", "/proc/sys/kernel/random/boot_id"])
            .output()
            .unwrap()
            .success()
            .unwrap()
    };
    assert_ne!(boot_id(), boot_id());
    world.finish().unwrap();
}

#[test]
fn exit_codes_come_back() {
    let world = World::new().unwrap();
    let table = [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 42", 42),
        ("exit 255", 255),
        // What a shell makes of a child that was killed.
        ("sh -c 'kill -KILL $$'; exit $?", 137),
        // The first process of a PID name space is safe from its own signals.
        ("kill -KILL $$; exit 3", 3),
    ];
    for (command, code) in table {
        let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
        let outcome = container.run(&["sh", "-c", command]).output().unwrap();
        assert_eq!(outcome.code, code, "{command}: {}", outcome.stderr);
    }
    world.finish().unwrap();
}

#[test]
fn the_process_is_what_was_asked_for() {
    let world = World::new().unwrap();
    let options = ["--env", "COLOUR=green", "--cwd", "/var"];
    let command = [
        "sh",
        "-c",
        "echo $COLOUR; pwd; id -u; echo \"$0\" \"$1\"",
        "one word",
        "*",
    ];
    let run = |runtime| {
        let container = world
            .container(runtime, "busybox")
            .unwrap()
            .options(options);
        container.run(&command).output().unwrap().success().unwrap()
    };
    assert_eq!(run(Runtime::Bulkhead), "green\n/var\n0\none word *\n");
    assert_eq!(run(Runtime::Bulkhead), run(Runtime::Runc));
    world.finish().unwrap();
}

#[test]
fn a_container_gets_the_memory_that_it_was_promised() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let call = container
        .options(["--memory-limit", "268435456"])
        // 200 MiB of 256 in one file of a tmpfs.
        .run(&[
            "sh",
            "-c",
            "mount -t tmpfs none /tmp; dd if=/dev/zero of=/tmp/x bs=1M count=200; wc -c </tmp/x",
        ]);
    let text = call.output().unwrap().success().unwrap();
    assert_eq!(text.trim(), (200 << 20).to_string());
    world.finish().unwrap();
}

#[test]
fn limits_may_be_above_what_the_host_has() {
    let world = World::new().unwrap();
    // Without a cgroup namespace, all groups of the host are there under runc.
    let script = "cd /sys/fs/cgroup; test -e memory.max || cd .$(cut -d : -f 3 /proc/self/cgroup); cat memory.max cpu.max";
    for runtime in [Runtime::Runc, Runtime::Bulkhead] {
        let container = world.container(runtime, "busybox").unwrap();
        let text = container
            .options(["--memory-limit", "1099511627776", "--cpus", "64"])
            .options([
                "--mount",
                "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro",
            ])
            .run(&["sh", "-c", script])
            .output()
            .unwrap()
            .success()
            .unwrap();
        assert_eq!(text, "1099511627776\n6400000 100000\n", "{runtime:?}");
    }
    world.finish().unwrap();
}

#[test]
fn a_killed_container_is_gone() {
    let world = World::new().unwrap();
    for (signal, code) in [("SIGKILL", 137), ("SIGUSR1", 138)] {
        let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
        let running = container.start(&[
            "sh",
            "-c",
            "trap 'exit 138' USR1; mkfifo /tmp/set 2>/dev/null; echo >/tmp/set; while :; do tail -f /dev/null & wait; done",
        ]);
        let running = running.unwrap();
        assert_eq!(running.status().unwrap(), "RUNNING");
        // It writes once the trap is set. Whoever comes first makes the FIFO.
        let set = "mkfifo /tmp/set 2>/dev/null; cat /tmp/set";
        let told = running.exec(&["sh", "-c", set]).output().unwrap();
        assert_eq!(told.success().unwrap(), "\n");
        running.kill(signal).unwrap();
        assert_eq!(running.wait().unwrap(), code, "{signal}");
    }
    world.finish().unwrap();
}

#[test]
fn twenty_containers_start_at_once() {
    let world = World::new().unwrap();
    // Imported once, before the race.
    drop(world.container(Runtime::Bulkhead, "busybox").unwrap());
    // The last of them shares an emulated processor with nineteen others.
    let directory = tempfile::tempdir().unwrap();
    let patience = world
        .configure(directory.path(), &[("boot_timeout_seconds", "600")])
        .unwrap();
    std::thread::scope(|scope| {
        let containers: Vec<_> = (0..20)
            .map(|number| {
                let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
                let container = container.options(&patience);
                let answer = number.to_string();
                scope.spawn(move || {
                    let outcome = container.run(&["echo", &answer]).output().unwrap();
                    assert_eq!(outcome.success().unwrap().trim(), answer);
                })
            })
            .collect();
        for container in containers {
            container.join().unwrap();
        }
    });
    drop(directory);
    world.finish().unwrap();
}
