//! More processes in a container that runs.

use bulkhead_tests::ctr::{Runtime, World};

#[test]
fn processes_join_a_container() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let running = container.start(&["sleep", "1000"]).unwrap();

    let outcome = running
        .exec(&["sh", "-c", "echo out; echo err >&2; exit 7"])
        .output()
        .unwrap();
    assert_eq!((outcome.code, outcome.text().as_str()), (7, "out\n"));
    assert_eq!(outcome.stderr, "err\n");

    let echoed = running.exec(&["cat"]).input("through\n").output().unwrap();
    assert_eq!(echoed.success().unwrap(), "through\n");

    // They share the container's processes and files.
    let processes = running.exec(&["cat", "/proc/1/cmdline"]).output().unwrap();
    assert_eq!(processes.success().unwrap(), "sleep\x001000\0");
    running
        .exec(&["sh", "-c", "echo kept >/tmp/file"])
        .output()
        .unwrap()
        .success()
        .unwrap();
    let read = running.exec(&["cat", "/tmp/file"]).output().unwrap();
    assert_eq!(read.success().unwrap(), "kept\n");

    running.kill("SIGKILL").unwrap();
    assert_eq!(running.wait().unwrap(), 137);
    world.finish().unwrap();
}

#[test]
fn a_program_that_is_not_there_fails_alone() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let running = container.start(&["sleep", "1000"]).unwrap();
    let outcome = running.exec(&["/no/such/program"]).output().unwrap();
    assert_ne!(outcome.code, 0);
    assert!(
        outcome.stderr.contains("/no/such/program"),
        "{}",
        outcome.stderr
    );
    // The container does not mind.
    running.exec(&["true"]).output().unwrap().success().unwrap();
    running.delete().unwrap();
    world.finish().unwrap();
}

#[test]
fn processes_run_side_by_side() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let running = container.start(&["sleep", "1000"]).unwrap();
    // Each waits for the next one's mark: one after the other, none would end.
    std::thread::scope(|scope| {
        let processes: Vec<_> = (0..4)
            .map(|number| {
                let next = (number + 1) % 4;
                let script = format!(
                    "mkfifo /tmp/{number} 2>/dev/null; mkfifo /tmp/{next} 2>/dev/null; \
                     echo {number} >/tmp/{number} & cat /tmp/{next}"
                );
                let call = running.exec(&["sh", "-c", &script]);
                scope.spawn(move || call.output().unwrap().success().unwrap())
            })
            .collect();
        for (number, process) in processes.into_iter().enumerate() {
            assert_eq!(
                process.join().unwrap().trim(),
                ((number + 1) % 4).to_string()
            );
        }
    });
    running.delete().unwrap();
    world.finish().unwrap();
}
