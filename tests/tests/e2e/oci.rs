//! What a `config.json` says holds as it does under runc.
//!
//! Each test runs one configuration under both, and what its script prints, and how it ends, must be the same.

use std::os::unix::fs::MetadataExt;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::ctr::{Outcome, Runtime, World};
use serde_json::{Value, json};

/// Runs a script with a changed configuration under one runtime.
fn run(world: &World, runtime: Runtime, script: &str, change: &dyn Fn(&mut Bundle)) -> Outcome {
    let mut bundle = Bundle::new(&world.site().directory, script).unwrap();
    change(&mut bundle);
    world.run_bundle(runtime, &bundle).unwrap()
}

/// Runs a script with a changed configuration under both runtimes, and returns what both printed.
fn both(world: &World, script: &str, change: impl Fn(&mut Bundle)) -> String {
    let ours = run(world, Runtime::Bulkhead, script, &change);
    let runcs = run(world, Runtime::Runc, script, &change);
    let (text, errors) = (ours.text(), &ours.stderr);
    assert_eq!(text, runcs.text(), "{errors}\nrunc: {}", runcs.stderr);
    assert_eq!(ours.code, runcs.code, "{text}{errors}");
    text
}

/// Runs a script under Bulkhead alone, for what runc of the node's age does not know.
fn bulkhead(world: &World, script: &str, change: impl Fn(&mut Bundle)) -> String {
    let outcome = run(world, Runtime::Bulkhead, script, &change);
    outcome.success().unwrap()
}

fn set(bundle: &mut Bundle, pointer: &str, value: Value) {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    bundle.config.pointer_mut(parent).unwrap()[field] = value;
}

/// Mounts the control groups such that they can be written to.
fn let_groups_be_written(bundle: &mut Bundle) {
    let mut mounts = bundle.config["mounts"].as_array_mut().unwrap().iter_mut();
    let groups = mounts.find(|mount| mount["type"] == "cgroup").unwrap();
    groups["options"] = json!(["nosuid", "noexec", "nodev"]);
}

#[test]
fn a_process_has_its_user_and_its_limits() {
    let world = World::new().unwrap();
    let script =
        "id; umask; pwd; env | sort; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; hostname
        grep -E '^(Cap|NoNewPrivs|Groups)' /proc/self/status; echo $$; tty; echo $0 $1";
    let text = both(&world, script, |bundle| {
        let some = json!(["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]);
        set(
            bundle,
            "/process/user",
            json!({"uid": 1000, "gid": 1001, "additionalGids": [7, 8], "umask": 0o27}),
        );
        set(
            bundle,
            "/process/capabilities",
            json!({"bounding": ["CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_KILL"], "effective": some, "permitted": some, "inheritable": some, "ambient": some}),
        );
        set(bundle, "/process/cwd", json!("/made/for/it"));
        set(bundle, "/process/oomScoreAdj", json!(321));
        set(
            bundle,
            "/process/rlimits",
            json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}]),
        );
        set(bundle, "/process/noNewPrivileges", json!(false));
        set(
            bundle,
            "/process/env",
            json!(["PATH=/bin", "A=1", "B=two words", "A=3"]),
        );
        bundle.add("/process/args", json!("zero"));
        bundle.add("/process/args", json!("*"));
    });
    assert!(text.contains("uid=1000(user) gid=1001"), "{text}");
    world.finish().unwrap();
}

#[test]
fn a_program_begins_where_its_user_could_not_go() {
    let world = World::new().unwrap();
    let text = both(&world, "id -u; readlink /proc/self/cwd; ls", |bundle| {
        bundle.add("/mounts", json!({"destination": "/closed", "type": "tmpfs", "source": "tmpfs", "options": ["mode=0700"]}));
        set(bundle, "/process/cwd", json!("/closed"));
        set(bundle, "/process/user", json!({"uid": 1000, "gid": 1000}));
        set(bundle, "/process/capabilities", json!({}));
    });
    assert!(text.starts_with("1000\n/closed\n"), "{text}");
    world.finish().unwrap();
}

#[test]
fn mounts_have_their_options() {
    let world = World::new().unwrap();
    // Numbers of devices and peers differ, and what kernels add of their own.
    let script = "while read -r a b c d place options rest; do rest=${rest##*- }; test ${rest%% *} = tmpfs || rest=${rest%% *}
        case $place in /t*|/proc|/dev*|/sys*) echo $place $options $rest;; esac; done </proc/self/mountinfo | grep -v '^/sys/firmware' | sed -E 's/,(inode64|mode=[0-7]*)//g; s/ tmpfs r[ow]/ tmpfs/'
        stat -c '%n %a %u:%g' / /t* /t2/below /tmp /dev /dev/pts /dev/shm; cat /tkept/file; echo >/tkept/x || echo no
        for path in /x /t1/x /t2/x /t2/below/x /sys/x /proc/sys/kernel/domainname; do echo 2>/dev/null >$path && echo $path; done; echo '#!/bin/sh' >/t1/p; chmod 755 /t1/p; /t1/p; echo $?";
    both(&world, script, |bundle| {
        let root = bundle.root();
        std::fs::create_dir(root.join("tkept")).unwrap();
        std::fs::write(root.join("tkept/file"), "kept\n").unwrap();
        for (place, options) in [
            (
                "/t1",
                json!([
                    "noexec",
                    "nosuid",
                    "nodev",
                    "mode=1770",
                    "uid=7",
                    "gid=8",
                    "size=64k"
                ]),
            ),
            // Read-only when everything is in place, what is below it included.
            ("/t2", json!(["ro", "noatime"])),
            ("/t2/below", json!(["mode=755"])),
            ("/t3/deep/er", json!(["rw", "strictatime", "nr_inodes=100"])),
            ("/tmp", json!(["relatime"])),
            ("/tkept", json!(["tmpcopyup", "mode=711"])),
        ] {
            bundle.add("/mounts", json!({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options}));
        }
        set(bundle, "/root/readonly", json!(true));
    });
    world.finish().unwrap();
}

#[test]
fn paths_are_masked_and_read_only() {
    let world = World::new().unwrap();
    let script = "cat /secret/* /secret.txt; ls -a /secret; echo >/secret/x || echo no; echo >/kept/x || echo no; cat /kept/file; rm /kept/file || echo no
        test -e /proc/kcore && wc -c </proc/kcore | grep -v '^0'; echo >/not/there/x || echo no";
    both(&world, script, |bundle| {
        let root = bundle.root();
        for directory in ["secret", "kept"] {
            std::fs::create_dir(root.join(directory)).unwrap();
            std::fs::write(root.join(directory).join("file"), "text\n").unwrap();
        }
        std::fs::write(root.join("secret.txt"), "text\n").unwrap();
        for path in ["/secret", "/secret.txt", "/not/there"] {
            bundle.add("/linux/maskedPaths", json!(path));
        }
        bundle.add("/linux/readonlyPaths", json!("/kept"));
    });
    world.finish().unwrap();
}

#[test]
fn devices_are_those_asked_for() {
    let world = World::new().unwrap();
    let script = "cd /dev; for file in *; do test $file = core || stat -c '%n %F %a %u:%g %t:%T %N' $file; done; stat -c '%n %F %a %u:%g %t:%T' deep/er/zero fifo
        head -c 4 zero | wc -c; head -c 1 deep/er/zero | wc -c; echo >null && echo null; head -c 1 full | wc -c; echo >full || echo full
        mknod /tmp/kmsg c 1 11 && head -c 0 /tmp/kmsg || echo kmsg; mknod /tmp/loop b 7 0 && head -c 0 /tmp/loop || echo loop; mknod /tmp/port c 1 4 || echo port
        mknod /tmp/tun c 10 200; cat /tmp/tun 2>&1 | grep -o 'bad state'";
    both(&world, script, |bundle| {
        set(
            bundle,
            "/linux/devices",
            json!([
                {"path": "/dev/deep/er/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8},
                {"path": "/dev/fifo", "type": "p", "fileMode": 0o600},
                {"path": "/dev/my", "type": "u", "major": 1, "minor": 3},
            ]),
        );
        set(
            bundle,
            "/linux/resources/devices",
            json!([
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw"},
                {"allow": false, "type": "c", "major": 1, "minor": 11, "access": "r"},
            ]),
        );
    });
    world.finish().unwrap();
}

#[test]
fn limits_are_set() {
    let world = World::new().unwrap();
    let script = "cd /sys/fs/cgroup; grep . memory.max memory.low memory.high memory.swap.max pids.max cpu.max cpu.weight /proc/self/cgroup";
    let text = both(&world, script, |bundle| {
        set(
            bundle,
            "/linux/resources",
            json!({
                "memory": {"limit": 64 << 20, "reservation": 16 << 20, "swap": 96 << 20},
                "pids": {"limit": 50},
                "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
                "unified": {"memory.high": "61440000"},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
            }),
        );
    });
    assert!(text.contains("memory.max:67108864\n"), "{text}");
    let script = "cd /sys/fs/cgroup; grep . cpu.max cpu.max.burst cpu.idle hugetlb.2MB.max";
    let text = bulkhead(&world, script, |bundle| {
        set(
            bundle,
            "/linux/resources",
            json!({
                "cpu": {"quota": 50_000, "period": 100_000, "burst": 10_000, "idle": 1},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "1GB", "limit": 0}],
            }),
        );
    });
    assert_eq!(
        text,
        "cpu.max:50000 100000\ncpu.max.burst:10000\ncpu.idle:1\nhugetlb.2MB.max:4194304\n"
    );
    world.finish().unwrap();
}

#[test]
fn limits_of_devices_are_those_of_the_disks_on_them() {
    let world = World::new().unwrap();
    // Limits are for whole disks.
    let device = std::fs::metadata(&world.site().directory).unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let path = format!("/sys/dev/block/{major}:{minor}");
    let path = std::fs::canonicalize(path).unwrap();
    let disk = match path.join("partition").exists() {
        true => path.parent().unwrap(),
        false => &path,
    };
    let number = std::fs::read_to_string(disk.join("dev")).unwrap();
    let (major, minor) = number.trim().split_once(':').unwrap();
    let throttled = |major: &str, minor: &str, rate| json!([{"major": major.parse::<u32>().unwrap(), "minor": minor.parse::<u32>().unwrap(), "rate": rate}]);
    let script = "cut -d ' ' -f 2- /sys/fs/cgroup/io.max | sort -u; now() { sed 's/[.].*//' /proc/uptime; }
        start=$(now); dd if=/dev/zero of=/tmp/file bs=1M count=4 conv=fsync 2>/dev/null; test $(($(now) - start)) -ge 2 && echo slow";
    let text = both(&world, script, |bundle| {
        set(
            bundle,
            "/linux/resources/blockIO",
            json!({"throttleWriteBpsDevice": throttled(major, minor, 1 << 20)}),
        );
        set(
            bundle,
            "/linux/resources/unified",
            json!({"io.max": format!("{major}:{minor} riops=1000")}),
        );
    });
    assert_eq!(text, "rbps=max wbps=1048576 riops=1000 wiops=max\nslow\n");
    let outcome = run(&world, Runtime::Bulkhead, "echo started", &|bundle| {
        let throttle = json!({"throttleReadIOPSDevice": throttled("1", "3", 5)});
        set(bundle, "/linux/resources/blockIO", throttle);
    });
    assert_eq!((outcome.code, outcome.text().as_str()), (1, ""));
    for word in ["throttleReadIOPSDevice", "1:3", number.trim()] {
        assert!(outcome.stderr.contains(word), "{}", outcome.stderr);
    }
    world.finish().unwrap();
}

#[test]
fn a_limit_of_processes_holds() {
    let world = World::new().unwrap();
    // Fewer could be too few for the threads that runc has before it is the container's program.
    let limit = 30;
    let script = "n=0; while test $n -lt 40; do tail -f /dev/null & n=$((n + 1)); done; echo reached; kill %1";
    both(
        &world,
        &format!("({script}) 2>/dev/null; echo $?"),
        |bundle| {
            set(bundle, "/linux/resources/pids", json!({"limit": limit}));
        },
    );
    world.finish().unwrap();
}

#[test]
fn seccomp_decides_as_it_is_told() {
    let world = World::new().unwrap();
    let script = "mkdir /tmp/d; echo $?; (chmod 1 /tmp); echo $?; (sync); echo $?; rmdir /tmp 2>/dev/null; hostname x; echo $?; ln -s a /tmp/l; echo $?
        renice -n 1 -p $$; echo $?; renice -n 2 -p $$; echo $?; (nproc); echo $?; mkfifo /tmp/f 2>/dev/null; echo $?; grep Seccomp: /proc/self/status";
    for no_new_privileges in [true, false] {
        both(&world, script, |bundle| {
            set(bundle, "/process/noNewPrivileges", json!(no_new_privileges));
            set(
                bundle,
                "/linux/seccomp",
                json!({
                    "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                    "syscalls": [
                        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                        {"names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_KILL_PROCESS"},
                        {"names": ["sync"], "action": "SCMP_ACT_TRAP"},
                        {"names": ["rmdir"], "action": "SCMP_ACT_LOG"},
                        {"names": ["sched_getaffinity"], "action": "SCMP_ACT_KILL_THREAD"},
                        {"names": ["mknod", "mknodat"], "action": "SCMP_ACT_TRACE"},
                        {"names": ["symlink", "symlinkat", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
                        {"names": ["setpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [{"index": 2, "value": 2, "op": "SCMP_CMP_EQ"}]},
                    ],
                }),
            );
        });
    }
    world.finish().unwrap();
}

#[test]
fn hooks_run_in_the_container() {
    let world = World::new().unwrap();
    let script = "cat /proc/sys/kernel/domainname; sed -e 's/\"bundle\":\"[^\"]*\"/BUNDLE/' -e 's/\"id\":\"[^\"]*\"/ID/' -e 's/[{},]/\\n/g' /tmp/state | grep -v ociVersion | sort; cat /tmp/env";
    let text = both(&world, script, |bundle| {
        set(bundle, "/annotations", json!({"a": "b"}));
        let hook = |script| json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "X=y"], "timeout": 60}]);
        let mut start = hook("cat >/tmp/state; env >/tmp/env; id -u >>/tmp/env; echo unseen");
        // Without variables of its own it has those of the process.
        let plain = ["sh", "-c", "echo plain $Z >>/tmp/env"];
        let hooks = start.as_array_mut().unwrap();
        hooks.push(json!({"path": "/bin/sh", "args": plain}));
        set(bundle, "/process/env", json!(["PATH=/bin", "Z=z"]));
        set(
            bundle,
            "/hooks",
            json!({"createContainer": hook("echo hooked >/proc/sys/kernel/domainname"), "startContainer": start}),
        );
        set(bundle, "/process/capabilities/bounding", json!([]));
    });
    let ends = text.starts_with("hooked\n") && text.ends_with("plain z\n");
    assert!(ends, "{text}");
    for kind in ["createContainer", "startContainer"] {
        let fail = |bundle: &mut Bundle| {
            set(
                bundle,
                "/hooks",
                json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", "exit 3"]}]}),
            );
        };
        let outcomes = [Runtime::Runc, Runtime::Bulkhead];
        let [runc, ours] = outcomes.map(|runtime| run(&world, runtime, "echo started", &fail));
        assert_eq!((ours.text(), ours.code), (runc.text(), runc.code));
        assert!(ours.stderr.contains(kind), "{}", ours.stderr);
    }
    world.finish().unwrap();
}

#[test]
fn a_user_namespace_has_its_users() {
    let world = World::new().unwrap();
    let script = "id -u; cat /proc/self/uid_map /proc/self/gid_map; touch /tmp/x; stat -c '%n %u:%g' / /tmp/x /etc/passwd /dev/null /sys /proc
        echo >/dev/null && head -c 3 /dev/zero | wc -c; hostname; cat /proc/self/cgroup; httpd -p 80 && echo bound; ls /dev/mqueue /sys/class/net; su user -c 'id -u'; ulimit -l; ulimit -Hl";
    let with_users = |bundle: &mut Bundle| {
        let all = std::process::Command::new("chown")
            .args(["-R", "-h", "100000:200000"])
            .arg(bundle.root())
            .status();
        assert!(all.unwrap().success());
        // Where runc's own process, by then the container's root, must get through.
        for directory in bundle.directory().ancestors().take(4) {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(directory, mode).unwrap();
        }
        bundle.add("/linux/namespaces", json!({"type": "user"}));
        let mapping = |outside| json!([{"containerID": 0, "hostID": outside, "size": 65536}]);
        set(bundle, "/linux/uidMappings", mapping(100_000));
        set(bundle, "/linux/gidMappings", mapping(200_000));
        // More than the user namespace's root may give itself.
        bundle.add(
            "/process/rlimits",
            json!({"type": "RLIMIT_MEMLOCK", "soft": u64::MAX, "hard": u64::MAX}),
        );
    };
    both(&world, script, with_users);
    // runc does so only where systemd has made the group.
    let script = "mkdir /sys/fs/cgroup/below; cd /sys/fs/cgroup; stat -c '%n %u:%g' . cgroup.procs cgroup.max.depth";
    let text = bulkhead(&world, script, |bundle| {
        with_users(bundle);
        let_groups_be_written(bundle);
    });
    assert_eq!(
        text,
        ". 0:65534\ncgroup.procs 0:65534\ncgroup.max.depth 65534:65534\n"
    );
    world.finish().unwrap();
}

#[test]
fn settings_are_the_containers_own() {
    let world = World::new().unwrap();
    let script = "cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range kernel/msgmax kernel/shmmni fs/mqueue/msg_max";
    both(&world, script, |bundle| {
        set(
            bundle,
            "/linux/sysctl",
            json!({
                "net.ipv4.ip_unprivileged_port_start": "77", "net.ipv4.ping_group_range": "5 6", "kernel.msgmax": "4242",
                "kernel.shmmni": "99", "fs.mqueue.msg_max": "11",
            }),
        );
    });
    world.finish().unwrap();
}

#[test]
fn what_runc_of_the_nodes_age_does_not_know_holds_too() {
    let world = World::new().unwrap();
    let script = "uname -m; cat /proc/sys/kernel/domainname; test $(readlink /proc/self/ns/time) = $(readlink /proc/1/ns/time) && echo same; mkdir /tmp/d; echo $?";
    let text = bulkhead(&world, script, |bundle| {
        bundle.add("/linux/namespaces", json!({"type": "time"}));
        set(bundle, "/domainname", json!("domain"));
        set(bundle, "/linux/personality", json!({"domain": "LINUX32"}));
        set(
            bundle,
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}],
            }),
        );
    });
    assert_eq!(text, "i686\ndomain\nsame\n1\n");
    world.finish().unwrap();
}

#[test]
fn what_cannot_be_run_fails_alike() {
    let world = World::new().unwrap();
    for (pointer, value) in [
        ("/process/args", json!(["/bin/none"])),
        ("/process/args", json!(["none"])),
        ("/process/args", json!([])),
        ("/process/args", json!(["/etc/passwd"])),
        ("/process/args", json!(["/etc"])),
        ("/process/cwd", json!("relative")),
        ("/process/cwd", json!("/etc/passwd")),
        ("/linux/sysctl", json!({"no.such.setting": "1"})),
        ("/linux/rootfsPropagation", json!("sideways")),
        (
            "/linux/resources/memory",
            json!({"limit": 64 << 20, "swap": 32 << 20}),
        ),
        ("/linux/resources/unified", json!({"no.such.file": "1"})),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_SOMETHING"}),
        ),
    ] {
        let outcomes = [Runtime::Bulkhead, Runtime::Runc].map(|runtime| {
            run(&world, runtime, "echo started", &|bundle| {
                set(bundle, pointer, value.clone());
            })
        });
        for outcome in outcomes {
            assert_eq!(
                (outcome.code, outcome.text().as_str()),
                (1, ""),
                "{pointer} {value}: {}",
                outcome.stderr
            );
        }
    }
    world.finish().unwrap();
}

#[test]
fn running_out_of_memory_ends_the_container_alone() {
    let world = World::new().unwrap();
    for runtime in [Runtime::Bulkhead, Runtime::Runc] {
        // The shell's child is killed, the shell is not; then the first process itself.
        let child = "dd if=/dev/zero of=/dev/null bs=100M count=1 2>/dev/null; echo $?; exec dd if=/dev/zero of=/dev/null bs=100M count=1";
        let outcome = run(&world, runtime, child, &|bundle| {
            set(
                bundle,
                "/linux/resources/memory",
                json!({"limit": 32 << 20, "swap": 32 << 20}),
            );
        });
        assert_eq!(
            (outcome.code, outcome.text().as_str()),
            (137, "137\n"),
            "{runtime:?}: {}",
            outcome.stderr
        );
    }
    world.finish().unwrap();
}

#[test]
fn statistics_are_those_of_the_container() {
    let world = World::new().unwrap();
    let [ours, runcs] = [Runtime::Bulkhead, Runtime::Runc].map(|runtime| {
        let script = "dd if=/dev/zero of=/tmp/file bs=1M count=8 2>/dev/null; i=0; while test $i -lt 20000; do i=$((i+1)); done; mkfifo /tmp/done 2>/dev/null; echo >/tmp/done; exec tail -f /dev/null";
        let mut bundle = Bundle::new(&world.site().directory, script).unwrap();
        set(
            &mut bundle,
            "/linux/resources",
            json!({"memory": {"limit": 64 << 20, "swap": 96 << 20}, "pids": {"limit": 50}}),
        );
        bundle.add("/mounts", json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
        let running = world.start_bundle(runtime, &bundle).unwrap();
        // It writes once the work is done, and is the only process then. Whoever comes first makes the FIFO.
        let done = "mkfifo /tmp/done 2>/dev/null; cat /tmp/done";
        running.exec(&["sh", "-c", done]).output().unwrap().success().unwrap();
        let metrics = world
            .ctr(&["task", "metrics", "--format", "json", running.name()])
            .output()
            .unwrap()
            .success()
            .unwrap();
        running.delete().unwrap();
        serde_json::from_str::<Value>(&metrics).unwrap()
    });
    for name in [
        "/pids/current",
        "/pids/limit",
        "/memory/usage_limit",
        "/memory/swap_limit",
        "/memory_events",
    ] {
        assert_eq!(
            ours.pointer(name),
            runcs.pointer(name),
            "{name}: {ours} {runcs}"
        );
    }
    // The same work in the same files. (All memory in use is more: a guest reads even the programs for the first time.)
    let shared = |metrics: &Value| metrics.pointer("/memory/shmem").and_then(Value::as_u64);
    assert_eq!(
        (shared(&ours), shared(&runcs)),
        (Some(8 << 20), Some(8 << 20))
    );
    for field in ["anon", "file", "inactive_anon", "pgfault", "slab", "usage"] {
        for metrics in [&ours, &runcs] {
            let value = metrics["memory"][field].as_u64();
            assert!(value > Some(0), "memory.{field}: {metrics}");
        }
    }
    let [ours, runcs] = [&ours, &runcs].map(|metrics| {
        metrics
            .pointer("/cpu/usage_usec")
            .and_then(Value::as_u64)
            .unwrap()
    });
    assert!(ours > 0 && ours < 100 * runcs, "{ours} {runcs}");
    world.finish().unwrap();
}

#[test]
fn an_exec_joins_a_container_that_has_groups_of_its_own() {
    let world = World::new().unwrap();
    let [ours, runcs] = [Runtime::Bulkhead, Runtime::Runc].map(|runtime| {
        let mut bundle = Bundle::new(&world.site().directory, "exec tail -f /dev/null").unwrap();
        let_groups_be_written(&mut bundle);
        let running = world.start_bundle(runtime, &bundle).unwrap();
        // As systemd does: no process stays where the controllers are given away. (cat is gone by then.)
        let divide = "cd /sys/fs/cgroup; mkdir init; for p in $(cat cgroup.procs); do echo $p >init/cgroup.procs; done 2>/dev/null; \
            echo +pids >cgroup.subtree_control; cat cgroup.subtree_control; cat /proc/self/cgroup";
        let texts = [divide, "cat /proc/self/cgroup"].map(|script| {
            let output = running.exec(&["sh", "-c", script]).output().unwrap();
            output.success().unwrap()
        });
        running.delete().unwrap();
        texts
    });
    assert_eq!(ours, runcs);
    assert_eq!(ours, ["pids\n0::/init\n", "0::/init\n"]);
    world.finish().unwrap();
}

#[test]
fn an_exec_is_confined_as_its_container() {
    let world = World::new().unwrap();
    let [ours, runcs] = [Runtime::Bulkhead, Runtime::Runc].map(|runtime| {
        let mut bundle = Bundle::new(&world.site().directory, "exec tail -f /dev/null").unwrap();
        set(
            &mut bundle,
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}),
        );
        let running = world.start_bundle(runtime, &bundle).unwrap();
        let script = "for n in mnt pid net ipc uts cgroup; do test $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) || echo $n; done; id; pwd; umask
            mkdir /tmp/x; echo $?; grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status; cat /proc/self/cgroup; ulimit -n; env | sort; exit 7";
        let arguments = ["task", "exec", "--exec-id", "e", "--user", "1000", "--cwd", "/tmp", running.name(), "sh", "-c", script];
        let outcome = world.ctr(&arguments).output().unwrap();
        running.delete().unwrap();
        (outcome.code, outcome.text())
    });
    assert_eq!(ours, runcs);
    assert_eq!(ours.0, 7, "{}", ours.1);
    world.finish().unwrap();
}
