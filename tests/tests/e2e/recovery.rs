//! Processes that die at any moment, and a containerd that comes and goes.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;

use bulkhead_tests::ctr::{Outcome, Running, Runtime, World};
use bulkhead_tests::occasion::{Occasion, WatchFlags};
use bulkhead_tests::process;
use rustix::process::{Pid, Signal};

const VMM: &str = "bulkhead-vmm";
const SHIM: &str = "containerd-shim-bulkhead-v2";

/// The one process of a program.
fn only(program: &str) -> Pid {
    let processes = process::named(program).unwrap();
    assert_eq!(processes.len(), 1, "{program}");
    processes[0]
}

/// A container that runs until it is killed.
fn patient(world: &World) -> Running<'_> {
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    container.start(&["tail", "-f", "/dev/null"]).unwrap()
}

/// Steps of a container's start, in their order.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// The shim makes the scratch disk. There is no VMM yet.
    Scratch,
    /// The VMM loads the kernel.
    Kernel,
    /// The guest mounts its root.
    Root,
    /// The guest looks at the container's layer.
    Layer,
    /// The container has written something.
    Output,
}

/// Runs a container that says something and goes on, and calls `act` in the middle of that.
fn interrupted(world: &World, step: Step, act: impl FnOnce()) -> Outcome {
    let site = world.site();
    let lib = site.payload.join("lib");
    let read = |path: PathBuf| Occasion::watch(&path, WatchFlags::ACCESS).unwrap();
    let layers = site.directory.join("layers");
    let (scratch, kernel) = (read(layers.clone()), read(lib.join("vmlinux")));
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let name = container.name().to_owned();
    let (began, beginning) = channel();
    thread::scope(|scope| {
        let call = container.run(&["sh", "-c", "echo begun; exec tail -f /dev/null"]);
        let outcome = scope.spawn(move || call.told_of(began).output().unwrap());
        let acted = catch_unwind(AssertUnwindSafe(|| {
            match step {
                Step::Scratch => scratch.wait("1-scratch-").unwrap(),
                Step::Kernel => kernel.wait("").unwrap(),
                Step::Root => {
                    kernel.wait("").unwrap();
                    read(lib.join("rootfs.erofs")).wait("").unwrap();
                }
                Step::Layer => {
                    kernel.wait("").unwrap();
                    read(layers).wait("").unwrap();
                }
                // Nothing is sent: it disconnects.
                Step::Output => drop(beginning.recv().unwrap_err()),
            }
            act();
        }));
        if let Err(panic) = acted {
            // Nothing else would end it.
            let kill = world.ctr(&["task", "kill", "--signal", "SIGKILL", &name]);
            let _ = kill.output();
            resume_unwind(panic);
        }
        outcome.join().unwrap()
    })
}

/// Sees to it that everything that outlives a container is there: the cached images, directories.
fn warm_up(world: &World) {
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    container
        .run(&["true"])
        .output()
        .unwrap()
        .success()
        .unwrap();
    world.settle().unwrap();
}

#[test]
fn a_vmm_that_dies_while_it_starts_is_told() {
    let world = World::new().unwrap();
    warm_up(&world);
    for step in [Step::Kernel, Step::Root, Step::Layer] {
        let outcome = interrupted(&world, step, || {
            process::kill(only(VMM), Signal::KILL).unwrap();
        });
        assert_ne!(outcome.code, 0, "{step:?}");
        assert_eq!(outcome.text(), "", "{step:?}");
        for words in ["the microVM ended", "SIGKILL"] {
            assert!(
                outcome.stderr.contains(words),
                "{step:?}: {}",
                outcome.stderr
            );
        }
        world.settle().unwrap();
    }
    world.finish().unwrap();
}

#[test]
fn a_vmm_that_dies_ends_its_container() {
    let world = World::new().unwrap();
    let outcome = interrupted(&world, Step::Output, || {
        process::kill(only(VMM), Signal::KILL).unwrap();
    });
    assert_eq!(outcome.code, 137, "{}", outcome.stderr);
    assert_eq!(outcome.text(), "begun\n");
    world.settle().unwrap();

    // With nobody there to see it, and with another process in the middle of its output.
    let running = patient(&world);
    thread::scope(|scope| {
        let call = running.exec(&["sh", "-c", "echo begun; exec tail -f /dev/null"]);
        let (began, beginning) = channel();
        let outcome = scope.spawn(move || call.told_of(began).output().unwrap());
        beginning.recv().unwrap_err();
        process::kill(only(VMM), Signal::KILL).unwrap();
        let outcome = outcome.join().unwrap();
        assert_eq!(outcome.code, 137, "{}", outcome.stderr);
        assert_eq!(outcome.text(), "begun\n");
    });
    assert_eq!(running.wait().unwrap(), 137);
    world.finish().unwrap();
}

#[test]
fn a_vmm_that_dies_while_its_container_is_deleted_is_no_matter() {
    let world = World::new().unwrap();
    let running = patient(&world);
    let vmm = only(VMM);
    thread::scope(|scope| {
        let deleted = scope.spawn(|| running.delete().unwrap());
        process::kill(vmm, Signal::KILL).unwrap();
        deleted.join().unwrap();
    });
    world.finish().unwrap();
}

#[test]
fn a_shim_that_dies_while_it_starts_is_told() {
    let world = World::new().unwrap();
    warm_up(&world);
    for step in [Step::Scratch, Step::Kernel, Step::Root, Step::Layer] {
        let outcome = interrupted(&world, step, || {
            let vmms = process::named(VMM).unwrap();
            process::kill(only(SHIM), Signal::KILL).unwrap();
            for vmm in vmms {
                process::wait(vmm).unwrap();
            }
        });
        assert_ne!(outcome.code, 0, "{step:?}");
        assert_ne!(outcome.stderr, "", "{step:?}");
        // containerd cleans up by itself.
        world.settle().unwrap();
    }
    world.finish().unwrap();
}

#[test]
fn a_shim_that_dies_takes_its_machine_along() {
    let world = World::new().unwrap();
    let running = patient(&world);
    let vmm = only(VMM);
    process::kill(only(SHIM), Signal::KILL).unwrap();
    process::wait(vmm).unwrap();
    // containerd cleans up by itself.
    running.forget().unwrap();
    world.finish().unwrap();
}

#[test]
fn a_shim_that_dies_while_its_container_is_deleted_leaves_nothing() {
    let world = World::new().unwrap();
    let sockets = PathBuf::from("/run/containerd/s");
    for moment in ["the machine ends", "the socket goes"] {
        let running = patient(&world);
        let (vmm, shim) = (only(VMM), only(SHIM));
        let removed = Occasion::watch(&sockets, WatchFlags::DELETE).unwrap();
        let deleted = thread::scope(|scope| {
            let delete = world.ctr(&["task", "delete", "--force", running.name()]);
            let deleted = scope.spawn(|| delete.output().unwrap());
            match moment {
                "the machine ends" => process::wait(vmm).unwrap(),
                _ => removed.wait("").unwrap(),
            }
            process::kill(shim, Signal::KILL).unwrap();
            deleted.join().unwrap()
        });
        // Whatever it says: its shim died in the middle of it.
        match deleted.success() {
            Ok(_) => {
                let container = world.ctr(&["container", "delete", running.name()]);
                container.output().unwrap().success().unwrap();
            }
            Err(error) => {
                println!("{moment}: {error}");
                running.forget().unwrap();
            }
        }
        world.settle().unwrap();
    }
    world.finish().unwrap();
}

#[test]
fn containers_outlive_containerd() {
    let world = World::new().unwrap();
    let running = patient(&world);
    let write = running.exec(&["sh", "-c", "echo kept >/tmp/file"]);
    write.output().unwrap().success().unwrap();
    for signal in [Signal::TERM, Signal::KILL] {
        world.site().stop(signal).unwrap();
        world.site().start().unwrap();
        assert_eq!(running.status().unwrap(), "RUNNING");
        let read = running.exec(&["cat", "/tmp/file"]).output().unwrap();
        assert_eq!(read.success().unwrap(), "kept\n");
    }
    running.kill("SIGKILL").unwrap();
    assert_eq!(running.wait().unwrap(), 137);
    world.finish().unwrap();
}

#[test]
fn a_container_that_ends_while_containerd_is_away_is_not_forgotten() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let running = container
        .start(&["sh", "-c", "read code; exit $code"])
        .unwrap();
    let vmm = only(VMM);
    world.site().stop(Signal::TERM).unwrap();
    running.write("42\n").unwrap();
    // A container's machine ends with it.
    process::wait(vmm).unwrap();
    world.site().start().unwrap();
    assert_eq!(running.status().unwrap(), "STOPPED");
    assert_eq!(running.wait().unwrap(), 42);
    world.finish().unwrap();
}

#[test]
fn what_dies_while_containerd_is_away_is_cleaned_up() {
    let world = World::new().unwrap();
    let running = patient(&world);
    let vmm = only(VMM);
    world.site().stop(Signal::KILL).unwrap();
    process::kill(only(SHIM), Signal::KILL).unwrap();
    process::wait(vmm).unwrap();
    world.site().start().unwrap();
    running.forget().unwrap();
    world.finish().unwrap();
}

#[test]
fn a_containerd_that_dies_while_a_container_starts_finds_nothing_left_of_it() {
    let world = World::new().unwrap();
    warm_up(&world);
    let outcome = interrupted(&world, Step::Kernel, || {
        world.site().stop(Signal::KILL).unwrap();
        world.site().start().unwrap();
    });
    assert_ne!(outcome.code, 0);
    world.settle().unwrap();
    world.finish().unwrap();
}
