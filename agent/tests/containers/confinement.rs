//! What a process in a container is, sees and may do.

use bulkhead_agent::protocol::sandbox::SetRequest;
use serde_json::json;
use ttrpc::Code;

use crate::guest::{Guest, Outcome, bind, context, process, spec, status};

/// Runs a shell command with a changed specification.
async fn with(
    guest: &Guest,
    command: &str,
    change: impl FnOnce(&mut serde_json::Value),
) -> Outcome {
    let mut spec = spec(&["sh", "-c", command]);
    change(&mut spec);
    guest.run(&spec).await.unwrap()
}

pub async fn the_user_is_as_asked(guest: &Guest) {
    let outcome = with(guest, "id; echo $HOME; umask; pwd", |spec| {
        spec["process"]["user"] =
            json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o27});
        spec["process"]["cwd"] = json!("/made/for/it");
    })
    .await;
    assert_eq!(outcome.error, "");
    assert_eq!(
        outcome.output,
        "uid=1000(user) gid=1001 groups=5,6\n/home/user\n0027\n/made/for/it\n"
    );
}

pub async fn capabilities_are_as_asked(guest: &Guest) {
    let sets = |guest| {
        with(
            guest,
            "grep -E 'Cap|NoNew|Seccomp:' /proc/self/status",
            |spec| {
                let kill = json!(["CAP_KILL"]);
                spec["process"]["capabilities"] = json!({
                    "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": kill, "permitted": kill, "inheritable": kill, "ambient": kill,
                });
                spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            },
        )
    };
    let kill = 1u64 << 5;
    let expected = format!(
        "CapInh:\t{kill:016x}\nCapPrm:\t{kill:016x}\nCapEff:\t{kill:016x}\nCapBnd:\t{:016x}\nCapAmb:\t{kill:016x}\nNoNewPrivs:\t1\nSeccomp:\t0\n",
        kill | 1
    );
    assert_eq!(sets(guest).await.output, expected);
}

pub async fn descriptors_of_the_agent_do_not_reach_the_program(guest: &Guest) {
    let outcome = guest.shell("ls /proc/self/fd").await;
    // 3 is the directory that ls reads.
    assert_eq!(outcome.output, "0\n1\n2\n3\n");
}

pub async fn paths_are_masked_and_read_only(guest: &Guest) {
    let outcome = guest
        .shell("head -c 1 /proc/kcore | wc -c; ls /sys/firmware | wc -l; echo x 2>/dev/null >/proc/sys/kernel/domainname || echo read-only")
        .await;
    assert_eq!(outcome.output, "0\n0\nread-only\n", "{}", outcome.error);
}

pub async fn devices_and_links_are_there(guest: &Guest) {
    let outcome = guest
        .shell("cd /dev; stat -c '%n %t:%T %a' null zero full random urandom tty; readlink fd; readlink stdin; readlink ptmx; echo ok >/dev/null; echo ok >/dev/stdout")
        .await;
    let expected = "null 1:3 666\nzero 1:5 666\nfull 1:7 666\nrandom 1:8 666\nurandom 1:9 666\ntty 5:0 666\n/proc/self/fd\n/proc/self/fd/0\npts/ptmx\nok\n";
    assert_eq!(
        (outcome.output.as_str(), outcome.error.as_str()),
        (expected, "")
    );
}

pub async fn a_user_may_open_its_own_streams(guest: &Guest) {
    let outcome = with(
        guest,
        "echo out >/dev/stdout; echo err >/dev/stderr",
        |spec| {
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        },
    )
    .await;
    assert_eq!(
        (outcome.output.as_str(), outcome.error.as_str()),
        ("out\n", "err\n")
    );
}

pub async fn a_read_only_root_is_read_only_but_not_its_mounts(guest: &Guest) {
    let outcome = with(
        guest,
        "touch /x 2>/dev/null || echo no; touch /run/x && echo yes",
        |spec| {
            spec["root"]["readonly"] = json!(true);
        },
    )
    .await;
    assert_eq!(outcome.output, "no\nyes\n");
}

pub async fn a_seccomp_profile_holds(guest: &Guest) {
    for no_new_privileges in [true, false] {
        let outcome = with(guest, "mkdir /tmp/d; echo $?; grep Seccomp: /proc/self/status", |spec| {
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
            });
        })
        .await;
        assert_eq!(outcome.output, "1\nSeccomp:\t2\n");
        assert!(outcome.error.contains("No space left"), "{}", outcome.error);
    }
}

pub async fn seccomp_actions_and_flags_are_the_kernels(guest: &Guest) {
    // Who asks for a tracer that is not there is told that there is no such call; one thread that is killed is the whole program.
    for (action, status, error) in [
        ("SCMP_ACT_TRACE", 1, "Function not implemented"),
        ("SCMP_ACT_KILL_THREAD", 128 + libc::SIGSYS as u32, ""),
    ] {
        let mut spec = spec(&["mkdir", "/tmp/d"]);
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_TSYNC"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": action}],
        });
        let outcome = guest.run(&spec).await.unwrap();
        assert_eq!(outcome.status, status, "{action}: {outcome:?}");
        assert!(outcome.error.contains(error), "{action}: {outcome:?}");
    }
}

pub async fn namespaces_are_its_own(guest: &Guest) {
    let outcome = guest
        .shell("echo $$; hostname; ls /sys/class/net; ps >/tmp/list; wc -l </tmp/list")
        .await;
    // ps: a header, the shell and ps.
    assert_eq!(outcome.output, "1\ninside\nlo\n3\n");
    let up = guest
        .shell("cat /sys/class/net/lo/operstate /sys/class/net/lo/flags")
        .await;
    assert_eq!(up.output, "unknown\n0x9\n");
}

pub async fn a_user_namespace_maps_its_users(guest: &Guest) {
    let root = guest.root();
    for path in ["", "tmp", "dev", "proc", "sys"] {
        std::os::unix::fs::chown(root.join(path), Some(100_000), Some(100_000)).unwrap();
    }
    let mut spec = spec(&[
        "sh",
        "-c",
        "id -u; cat /proc/self/uid_map; touch /tmp/x && ls -ln /tmp; echo ok >/dev/null; touch /proc/sys/kernel/x; hostname",
    ]);
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    let outcome = guest.run_in(&spec, &[bind(&root)]).await.unwrap();
    let words: Vec<_> = outcome.output.split_whitespace().collect();
    assert_eq!(words[..4], ["0", "0", "100000", "65536"], "{outcome:?}");
    assert!(
        outcome.output.contains(" 0        0 "),
        "{}",
        outcome.output
    );
    assert!(outcome.output.ends_with("inside\n"), "{outcome:?}");
    let file = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(root.join("tmp/x")).unwrap());
    assert_eq!(file, 100_000);
}

pub async fn a_time_namespace_has_its_offsets(guest: &Guest) {
    let outcome = with(
        guest,
        "cat /proc/uptime /proc/self/timens_offsets",
        |spec| {
            spec["linux"]["namespaces"]
                .as_array_mut()
                .unwrap()
                .push(json!({"type": "time"}));
            spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}});
        },
    )
    .await;
    let uptime: f64 = outcome.output.split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1_000_000.0, "{outcome:?}");
    // The agent's own clock is what it was.
    let plain = guest.shell("cat /proc/uptime").await;
    let uptime: f64 = plain.output.split(' ').next().unwrap().parse().unwrap();
    assert!(uptime < 1_000_000.0, "{plain:?}");
}

pub async fn settings_and_names_are_the_containers(guest: &Guest) {
    let outcome = with(guest, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax /proc/sys/kernel/domainname", |spec| {
        spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "77", "kernel.msgmax": "4242"});
        spec["domainname"] = json!("domain");
    })
    .await;
    assert_eq!(outcome.output, "77\n4242\ndomain\n");
}

pub async fn settings_of_the_guest_are_its_containers(guest: &Guest) {
    let set = |name: &str| {
        let mut request = SetRequest::new();
        request.sysctls.insert(name.into(), "pod".into());
        request
    };
    let request = set("kernel.domainname");
    guest.sandbox.set(context(), &request).await.unwrap();
    let outcome = with(guest, "cat /proc/sys/kernel/domainname", |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "uts");
    })
    .await;
    assert_eq!(outcome.output, "pod\n");
    let outside = set("kernel/../../self/comm");
    let (code, message) = status(guest.sandbox.set(context(), &outside).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    let (_, message) = status(guest.sandbox.set(context(), &set("no.such")).await);
    assert!(message.contains("/proc/sys/no/such"), "{message}");
}

pub async fn limits_and_priorities_are_set(guest: &Guest) {
    let outcome = with(guest, "grep -E 'open files|core file' /proc/self/limits; cat /proc/self/stat /proc/self/oom_score_adj; ionice -p $$", |spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]);
        spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
        spec["process"]["oomScoreAdj"] = json!(321);
    })
    .await;
    let lines: Vec<Vec<_>> = outcome
        .output
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), 5, "{outcome:?}");
    assert_eq!(lines[0][4..6], ["0", "0"]);
    assert_eq!(lines[1][3..5], ["77", "88"]);
    // The 19th field is the nice value, the 41st the policy, of which SCHED_BATCH is number 3.
    assert_eq!((lines[2][18], lines[2][40], lines[3][0]), ("5", "3", "321"));
    assert_eq!(lines[4], ["best-effort:", "prio", "6"]);
}

pub async fn an_exec_is_confined_as_its_container(guest: &Guest) {
    let mut init = spec(&["sleep", "1000"]);
    // Where the keyrings are.
    init["linux"]["maskedPaths"] = json!([]);
    init["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
    });
    let streams = guest.streams(false);
    guest
        .create("confined", &init, &[bind(&guest.root())], &streams, false)
        .await
        .unwrap();
    guest.start("confined", "").await.unwrap();
    let mut exec = guest.streams(false);
    let command = "for n in mnt pid net ipc uts; do test $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) || echo $n; done; \
        mkdir /x 2>/dev/null || echo no; grep CapEff /proc/self/status; ls /proc/self/fd | wc -l; \
        grep -c '_ses.confined: ' /proc/keys";
    guest
        .exec(
            "confined",
            "e",
            &process(&["sh", "-c", command]),
            &exec,
            false,
        )
        .await
        .unwrap();
    guest.start("confined", "e").await.unwrap();
    guest.wait("confined", "e").await.unwrap();
    let output = crate::guest::all(exec.output.take());
    assert_eq!(
        output,
        "no\nCapEff:\t00000000a80425fb\n4\n1\n",
        "{}",
        crate::guest::all(exec.error.take())
    );
    guest
        .kill("confined", "", libc::SIGKILL, true)
        .await
        .unwrap();
    guest.wait("confined", "").await.unwrap();
    guest.delete("confined", "").await.unwrap();
}

pub async fn a_foreign_program_and_a_missing_interpreter_say_what_they_are(guest: &Guest) {
    let root = guest.root();
    let mut head = std::fs::read(guest.directory.join("busybox")).unwrap()[..64].to_vec();
    head[18] = 183;
    std::fs::write(root.join("bin/arm"), head).unwrap();
    std::fs::write(root.join("bin/script"), "#!/none\n").unwrap();
    for (name, words) in [
        ("arm", "it is a program for aarch64"),
        ("script", "its interpreter /none: no such file"),
    ] {
        let path = root.join("bin").join(name);
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let (code, message) = status(guest.run_in(&spec(&[name]), &[bind(&root)]).await);
        assert_eq!(code, Code::UNKNOWN);
        assert!(message.contains(words), "{message}");
    }
}

pub async fn a_link_in_place_of_proc_is_refused(guest: &Guest) {
    let root = guest.root();
    std::fs::remove_dir(root.join("proc")).unwrap();
    std::os::unix::fs::symlink("tmp", root.join("proc")).unwrap();
    let (_, message) = status(guest.run_in(&spec(&["true"]), &[bind(&root)]).await);
    assert!(message.contains("/proc must be a directory"), "{message}");
}

pub async fn what_is_not_supported_is_refused_by_name(guest: &Guest) {
    for (pointer, value, named) in [
        (
            "/process/apparmorProfile",
            json!("x"),
            "process.apparmorProfile",
        ),
        ("/process/selinuxLabel", json!("x"), "process.selinuxLabel"),
        ("/linux/mountLabel", json!("x"), "linux.mountLabel"),
        ("/linux/intelRdt", json!({}), "linux.intelRdt"),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "SCMP_ACT_NOTIFY",
        ),
        (
            "/linux/resources/memory",
            json!({"kernel": 1}),
            "memory.kernel",
        ),
        ("/vm", json!({"kernel": {"path": "/x"}}), "vm"),
        ("/shiny", json!(1), "shiny"),
        ("/process/shiny", json!(1), "process.shiny"),
    ] {
        let mut spec = spec(&["true"]);
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[field] = value;
        let (code, message) = status(guest.run(&spec).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(message.contains(named), "{message}");
    }
}

pub async fn hooks_run_in_the_container_with_its_state(guest: &Guest) {
    let outcome = with(
        guest,
        "cat /tmp/creating /tmp/created; hostname; cat /etc/made /tmp/plain; echo >/x || echo no",
        |spec| {
            let hook = |file: &str, more: &str| {
                json!([{
                    "path": "/bin/sh", "args": ["sh", "-c", format!("cat >/tmp/{file}; echo $X >>/tmp/{file}; pwd; {more}")],
                    "env": ["X=y"], "timeout": 60,
                }, {
                    // Without variables of its own it has those of the program.
                    "path": "/bin/sh", "args": ["sh", "-c", "pwd >>/tmp/plain; echo $X $Z >>/tmp/plain"],
                }])
            };
            let variables = spec["process"]["env"].as_array_mut().unwrap();
            variables.push(json!("Z=a=b"));
            spec["process"]["cwd"] = json!("/etc");
            spec["annotations"] = json!({"a": "b"});
            spec["root"]["readonly"] = json!(true);
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
            spec["hooks"] = json!({
                "createRuntime": [{"path": "/a/program/of/the/host"}],
                "createContainer": hook("creating", "hostname hooked; pwd >/etc/made"),
                "startContainer": hook("created", "true"),
            });
        },
    )
    .await;
    let mut lines = outcome.output.lines();
    for status in ["creating", "created"] {
        let state = lines.next().unwrap_or_default().trim_end_matches('y');
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(
            (
                &state["status"],
                &state["pid"],
                &state["annotations"]["a"],
                &state["ociVersion"]
            ),
            (&json!(status), &json!(1), &json!("b"), &json!("1.1.0"))
        );
    }
    // What hooks print is not the container's output.
    let rest: Vec<_> = lines.collect();
    let expected = ["hooked", "/", "/", "a=b", "/", "a=b", "no"];
    assert_eq!(rest, expected, "{}", outcome.error);
}

pub async fn a_failed_hook_fails_the_request(guest: &Guest) {
    for kind in ["createContainer", "startContainer"] {
        for (hook, words) in [
            (
                json!({"path": "/bin/sh", "args": ["sh", "-c", "echo not today >&2; exit 3"]}),
                "failed: exit status: 3: not today",
            ),
            (
                json!({"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}),
                "ran longer than its timeout of 1 s",
            ),
            (json!({"path": "/bin/none"}), "does not start: No such file"),
        ] {
            let mut spec = spec(&["true"]);
            spec["hooks"] = json!({kind: [hook]});
            let streams = guest.streams(false);
            let created = guest
                .create("hooked", &spec, &[bind(&guest.root())], &streams, false)
                .await;
            let (_, message) = match created {
                Ok(_) => {
                    assert_eq!(kind, "startContainer");
                    let failed = status(guest.start("hooked", "").await);
                    guest.delete("hooked", "").await.unwrap();
                    failed
                }
                Err(error) => status::<()>(Err(error)),
            };
            assert!(message.contains(words), "{message}");
            assert!(
                message.contains(&format!("hooks.{kind}: /bin/")),
                "{message}"
            );
        }
    }
}
