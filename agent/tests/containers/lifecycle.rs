//! How containers come and go.

use std::io::Write;

use bulkhead_agent::protocol::sandbox::SetupRequest;
use containerd_shim_protos::api::PidsRequest;
use rustix::fs::{Mode, OFlags};
use ttrpc::Code;

use crate::guest::{Guest, all, bind, context, process, spec, status};

pub async fn a_container_runs_and_its_output_and_exit_code_arrive(guest: &Guest) {
    let outcome = guest.shell("echo out; echo err >&2; exit 7").await;
    assert_eq!(
        (
            outcome.status,
            outcome.output.as_str(),
            outcome.error.as_str()
        ),
        (7, "out\n", "err\n")
    );
}

pub async fn a_missing_program_fails_create_in_the_expected_words(guest: &Guest) {
    for (name, words) in [
        (
            "none",
            r#"exec: "none": executable file not found in $PATH"#,
        ),
        (
            "/none",
            r#"exec: "/none": stat /none: no such file or directory"#,
        ),
        ("/etc/passwd", r#"exec: "/etc/passwd": permission denied"#),
    ] {
        let streams = guest.streams(false);
        let root = [bind(&guest.root())];
        let created = guest
            .create("missing", &spec(&[name]), &root, &streams, false)
            .await;
        let (code, message) = status(created);
        assert_eq!(code, Code::UNKNOWN);
        assert!(message.ends_with(words), "{message}");
        // Nothing is left of it, so the name is free.
        assert_eq!(status(guest.state("missing", "").await).0, Code::NOT_FOUND);
    }
}

pub async fn input_reaches_the_program_and_ends(guest: &Guest) {
    let mut streams = guest.streams(false);
    let root = [bind(&guest.root())];
    guest
        .create("cat", &spec(&["cat"]), &root, &streams, false)
        .await
        .unwrap();
    // Before the start already.
    streams
        .input
        .as_mut()
        .unwrap()
        .write_all(b"hello ")
        .unwrap();
    guest.start("cat", "").await.unwrap();
    streams.input.take().unwrap().write_all(b"world").unwrap();
    assert_eq!(guest.wait("cat", "").await.unwrap(), 0);
    assert_eq!(all(streams.output.take()), "hello world");
    guest.delete("cat", "").await.unwrap();
}

pub async fn a_container_is_killed(guest: &Guest) {
    let streams = guest.streams(false);
    let root = [bind(&guest.root())];
    guest
        .create("killed", &spec(&["sleep", "1000"]), &root, &streams, false)
        .await
        .unwrap();
    guest.start("killed", "").await.unwrap();
    for all in [false, true] {
        guest.kill("killed", "", 0, all).await.unwrap();
        let unknown = guest.kill("killed", "", 65, all).await;
        assert_eq!(status(unknown).0, Code::INVALID_ARGUMENT);
    }
    assert_eq!(
        status(guest.delete("killed", "").await).0,
        Code::FAILED_PRECONDITION
    );
    guest
        .kill("killed", "", libc::SIGKILL, false)
        .await
        .unwrap();
    assert_eq!(guest.wait("killed", "").await.unwrap(), 137);
    let (code, message) = status(guest.kill("killed", "", libc::SIGKILL, true).await);
    assert_eq!(
        (code, message.as_str()),
        (Code::NOT_FOUND, "process already finished")
    );
    assert_eq!(guest.delete("killed", "").await.unwrap().exit_status, 137);
    assert_eq!(status(guest.wait("killed", "").await).0, Code::NOT_FOUND);
}

pub async fn groups_that_a_container_makes_hinder_nobody(guest: &Guest) {
    let streams = guest.streams(false);
    let root = [bind(&guest.root())];
    guest
        .create("divided", &spec(&["sleep", "1000"]), &root, &streams, false)
        .await
        .unwrap();
    let init = guest.start("divided", "").await.unwrap();
    let group = bulkhead_agent::cgroup::Cgroup::path_of(&guest.group, "divided");
    // One of threads, with the container's only one, and others whose path is longer than the kernel takes it.
    let threaded = group.join("threaded");
    std::fs::create_dir(&threaded).unwrap();
    std::fs::write(threaded.join("cgroup.type"), "threaded").unwrap();
    let thread = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
    std::fs::write(threaded.join("cgroup.threads"), thread).unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut nested = rustix::fs::open(&group, flags, Mode::empty()).unwrap();
    for _ in 0..20 {
        let name = "n".repeat(250);
        rustix::fs::mkdirat(&nested, &name, Mode::RWXU).unwrap();
        nested = rustix::fs::openat(&nested, &name, flags, Mode::empty()).unwrap();
    }

    let request = PidsRequest {
        id: "divided".into(),
        ..Default::default()
    };
    let listed = guest.task.pids(context(), &request).await.unwrap();
    let listed: Vec<_> = listed.processes.iter().map(|listed| listed.pid).collect();
    assert_eq!(listed, [init]);
    guest
        .kill("divided", "", libc::SIGTERM, true)
        .await
        .unwrap();
    guest
        .kill("divided", "", libc::SIGKILL, true)
        .await
        .unwrap();
    assert_eq!(guest.wait("divided", "").await.unwrap(), 137);
    guest.delete("divided", "").await.unwrap();
    assert!(!group.exists());
}

pub async fn an_exec_runs_beside_the_init_and_ends_before_it(guest: &Guest) {
    let streams = guest.streams(false);
    let root = [bind(&guest.root())];
    let sleep = spec(&["sleep", "1000"]);
    guest
        .create("beside", &sleep, &root, &streams, false)
        .await
        .unwrap();
    let mut exec = guest.streams(false);
    let echo = process(&["sh", "-c", "echo $$ $(hostname); exit 3"]);
    // The init waits for its start, but its namespaces are there.
    let mut early = guest.streams(false);
    guest
        .exec("beside", "e", &echo, &early, false)
        .await
        .unwrap();
    guest.start("beside", "e").await.unwrap();
    assert_eq!(guest.wait("beside", "e").await.unwrap(), 3);
    assert_eq!(all(early.output.take()), "2 inside\n");
    guest.delete("beside", "e").await.unwrap();
    guest.start("beside", "").await.unwrap();
    guest
        .exec("beside", "e", &echo, &exec, false)
        .await
        .unwrap();
    let mut refused = guest.streams(false);
    let twice = guest.exec("beside", "e", &echo, &refused, false).await;
    assert_eq!(status(twice).0, Code::ALREADY_EXISTS);
    // Nothing keeps them open.
    assert_eq!(all(refused.output.take()), "");
    let unstarted = guest.kill("beside", "e", libc::SIGTERM, false).await;
    assert_eq!(status(unstarted).0, Code::FAILED_PRECONDITION);
    guest.start("beside", "e").await.unwrap();
    assert_eq!(guest.wait("beside", "e").await.unwrap(), 3);
    // The early one had two.
    assert_eq!(all(exec.output.take()), "4 inside\n");
    assert_eq!(guest.delete("beside", "e").await.unwrap().exit_status, 3);

    let missing = guest.streams(false);
    guest
        .exec("beside", "m", &process(&["none"]), &missing, false)
        .await
        .unwrap();
    let (code, message) = status(guest.start("beside", "m").await);
    assert_eq!(code, Code::UNKNOWN);
    assert!(
        message.ends_with(r#"exec: "none": executable file not found in $PATH"#),
        "{message}"
    );
    guest.delete("beside", "m").await.unwrap();

    let last = guest.streams(false);
    guest
        .exec("beside", "l", &process(&["sleep", "1000"]), &last, false)
        .await
        .unwrap();
    guest.start("beside", "l").await.unwrap();
    guest
        .kill("beside", "", libc::SIGKILL, false)
        .await
        .unwrap();
    let (first, then) = tokio::join!(guest.wait("beside", "l"), async {
        let init = guest.wait("beside", "").await;
        // The exec's exit was told before.
        (init, guest.state("beside", "l").await.unwrap().exit_status)
    });
    assert_eq!((first.unwrap(), then.0.unwrap(), then.1), (137, 137, 137));
    guest.delete("beside", "").await.unwrap();
}

pub async fn execs_end_with_an_init_that_was_never_started(guest: &Guest) {
    let root = [bind(&guest.root())];
    let sleep = spec(&["sleep", "1000"]);
    for kill in [false, true] {
        let streams = guest.streams(false);
        guest
            .create("waiting", &sleep, &root, &streams, false)
            .await
            .unwrap();
        let streams = guest.streams(false);
        guest
            .exec(
                "waiting",
                "e",
                &process(&["sleep", "1000"]),
                &streams,
                false,
            )
            .await
            .unwrap();
        guest.start("waiting", "e").await.unwrap();
        if kill {
            guest
                .kill("waiting", "", libc::SIGKILL, false)
                .await
                .unwrap();
            assert_eq!(guest.wait("waiting", "").await.unwrap(), 137);
            let exec = guest.state("waiting", "e").await.unwrap();
            assert_eq!(exec.exit_status, 137);
            let late = guest.streams(false);
            let late = guest
                .exec("waiting", "l", &process(&["true"]), &late, false)
                .await;
            assert_eq!(status(late).0, Code::FAILED_PRECONDITION);
        }
        // Its control group could not go if anything of it were left.
        guest.delete("waiting", "").await.unwrap();
    }
}

/// The last test: the connection of the others is gone after it.
pub async fn the_agent_connects_again(guest: &Guest) {
    let again = guest.host.try_clone().unwrap();
    guest.disconnect();
    let guest = Guest::connect(&guest.directory, &guest.group, again).await;
    let response = guest
        .sandbox
        .setup(context(), &SetupRequest::new())
        .await
        .unwrap();
    assert_eq!(response.agent_version, env!("CARGO_PKG_VERSION"));
}
