//! Root file systems on disks that are there already, as the erofs, devmapper and blockfile snapshotters hand them over; and limits of disks.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Kind, Paths, mount};
use bulkhead_tests::process;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use serde_json::{Value, json};

use super::{Pod, line};

fn make(program: &str, arguments: &[&str]) -> String {
    process::output(Command::new(program).args(arguments)).unwrap()
}

/// A block device with the content of a file, as long as this lives.
struct Loop(String);

impl Loop {
    fn new(file: &str) -> Self {
        make("modprobe", &["loop"]);
        Self(make("losetup", &["--find", "--show", file]).trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        make("losetup", &["--detach", &self.0]);
    }
}

#[test]
fn disks_that_are_there_are_attached_as_they_are() {
    let world = World::new().unwrap();
    let pod = Pod::start(&world, Runtime::Bulkhead);
    let path = |name: &str| pod.peer.path(name).to_str().unwrap().to_owned();
    let base = pod.peer.image().to_str().unwrap();
    fs::create_dir_all(path("layer")).unwrap();
    fs::write(path("layer") + "/mark", "of the upper layer\n").unwrap();
    make("mkfs.erofs", &[&path("base.erofs"), base]);
    make("mkfs.erofs", &[&path("upper.erofs"), &path("layer")]);
    fs::create_dir(path("fs")).unwrap();
    fs::File::create(path("disk"))
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    make("mke2fs", &["-q", "-t", "ext4", "-d", base, &path("disk")]);
    let device = Loop::new(&path("disk"));
    let upper = format!("upperdir={}", path("fs"));
    let erofs = |name: &str| mount("erofs", &path(name), &["ro", "loop"]);
    let joined = ["workdir=/unused", &upper, "lowerdir={{ overlay 0 1 }}"];
    let roots = [
        vec![erofs("base.erofs")],
        vec![
            erofs("upper.erofs"),
            erofs("base.erofs"),
            mount("format/mkdir/overlay", "overlay", &joined),
        ],
        vec![mount::<&str>("ext4", &device.0, &[])],
    ];
    let script = "cat /mark; echo written >/written && cat /written; while read -r device place kind rest; do test $place = / && echo $kind; done </proc/mounts";
    let expected = [
        "erofs\n",
        "of the upper layer\nwritten\noverlay\n",
        "written\next4\n",
    ];
    for (number, (root, expected)) in roots.into_iter().zip(expected).enumerate() {
        let id = format!("disk{number}");
        let bundle = pod.member(&id, &["sh", "-c", script]);
        let streams = pod.peer.streams(&id, None).unwrap();
        pod.shim.create_of(&bundle, root, &streams.paths).unwrap();
        pod.shim.start(&id, "").unwrap();
        pod.shim.wait(&id, "").unwrap();
        pod.shim.delete(&id, "").unwrap();
        let errors = streams.stderr.text().unwrap();
        assert_eq!(streams.stdout.text().unwrap(), expected, "{errors}");
    }
    drop(device);
    // What was written is on the disk, and nowhere else of the host.
    let written = make("debugfs", &["-R", "cat /written", &path("disk")]);
    assert_eq!(written, "written\n");
    assert_eq!(fs::read_dir(path("fs")).unwrap().count(), 0);

    // Where a file is two machines' at once, the second is told.
    let other = Pod::start(&world, Runtime::Bulkhead);
    let holder = pod.member("holder", &["sleep", "1000"]);
    let disk = || vec![mount("ext4", &path("disk"), &["loop"])];
    let nothing = Paths::default();
    pod.shim.create_of(&holder, disk(), &nothing).unwrap();
    let second = other.member("second", &["true"]);
    let refused = other.shim.create_of(&second, disk(), &nothing).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains(&path("disk")) && text.contains("in use"),
        "{text}"
    );
    pod.shim.start("holder", "").unwrap();
    pod.remove("holder");
    other.end();
    pod.end();
    world.finish().unwrap();
}

#[test]
fn every_limit_can_be_changed() {
    let world = World::new().unwrap();
    let pod = Pod::start(&world, Runtime::Bulkhead);
    pod.run("c", &["sleep", "1000"]);
    let update = |resources| pod.shim.update("c", &resources);
    let throttle = limit(&world.site().directory, "rate", 1 << 20);
    let latency = format!("{}:{} target=75000", throttle["major"], throttle["minor"]);
    update(json!({
        "memory": {"limit": 96 << 20, "reservation": 16 << 20, "swap": 128 << 20},
        "cpu": {"shares": 512, "quota": 40_000, "period": 80_000, "burst": 10_000},
        "pids": {"limit": 77},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
        "unified": {"memory.high": "61440000", "io.latency": latency},
        "blockIO": {
            "throttleWriteBpsDevice": [throttle],
            "weight": 500,
            "weightDevice": [limit(&world.site().directory, "weight", 700)],
        },
    }))
    .unwrap();
    let refused = update(
        json!({"blockIO": {"throttleReadBpsDevice": [{"major": 1, "minor": 3, "rate": 1}]}}),
    );
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("blockIO.throttleReadBpsDevice") && refused.contains("1:3"),
        "{refused}"
    );
    for (resources, words) in [
        (
            json!({"blockIO": {"weight": 1001}}),
            ["blockIO.weight", "1001"],
        ),
        (
            json!({"blockIO": {"weightDevice": [{"major": 1, "minor": 3, "weight": 10}]}}),
            ["blockIO.weightDevice", "1:3"],
        ),
        (
            json!({"blockIO": {"weightDevice": [limit(&world.site().directory, "leafWeight", 10)]}}),
            ["blockIO.weightDevice", "leafWeight"],
        ),
        (
            json!({"unified": {"io.weight": "200"}}),
            ["io.weight", "io.bfq.weight"],
        ),
    ] {
        let refused = update(resources).unwrap_err().to_string();
        assert!(words.iter().all(|word| refused.contains(word)), "{refused}");
    }
    let files = "memory.max memory.low memory.swap.max memory.high cpu.weight cpu.max cpu.max.burst pids.max hugetlb.2MB.max";
    let script = format!(
        "cd /sys/fs/cgroup; cat {files}; cut -d ' ' -f 2- io.max | uniq -c; cut -d ' ' -f 2- io.latency | uniq -c; sed 's/.*:.* /disk /' io.bfq.weight"
    );
    let text = pod.say("c", &script);
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let expected = [
        "100663296",
        "16777216",
        "33554432",
        "61440000",
        "20",
        "40000 80000",
        "10000",
        "77",
        "4194304",
        // Of the scratch disk, and of the root's.
        "2 rbps=max wbps=1048576 riops=max wiops=max",
        "2 target=75000",
        "default 500",
        "disk 700",
        "disk 700",
    ];
    assert_eq!(lines, expected);
    pod.remove("c");
    pod.end();
    world.finish().unwrap();
}

/// A disk has a scheduler from the first weight on, which serves containers by their weights.
#[test]
fn disks_are_shared_by_weights() {
    let world = World::new().unwrap();
    let pod = Pod::start(&world, Runtime::Bulkhead);
    let create = |id: &str, weight: u64, count: u64, then: &str| {
        let change = |config: &mut Value| {
            config["linux"]["resources"]["blockIO"] = json!({"weight": weight});
        };
        let write = format!(
            "dd if=/dev/zero of=/file bs=4M count={count} conv=notrunc oflag=direct 2>/dev/null"
        );
        let script = format!("{write}; echo written; {then} {write}; do :; done");
        let kind = Kind::Member(&pod.sandbox.id);
        let bundle = pod.peer.bundle(id, kind, &["sh", "-c", &script], change);
        let (stdout, output) = pod.peer.unread(id).unwrap();
        let paths = Paths {
            stdout,
            ..Paths::default()
        };
        let created = pod.shim.create(&bundle.unwrap(), &paths);
        created.map(|_| output)
    };
    let refused = create("lightest", 9, 1, "until").unwrap_err().to_string();
    assert!(refused.contains("blockIO.weight is 9"), "{refused}");
    pod.run("idle", &["sleep", "1000"]);
    let script = "cat /sys/fs/cgroup/io.bfq.weight /sys/block/vd*/queue/scheduler";
    let disks = "[none] bfq \n".repeat(3);
    assert_eq!(pod.say("idle", script), format!("default 100\n{disks}"));
    // One goes on writing while the other writes so much.
    let mut light = create("light", 100, 1, "while").unwrap();
    let mut heavy = create("heavy", 1000, 32, "until").unwrap();
    // The guest's root, and that of the container without a weight, stay as they were.
    let disks = "[none] bfq \nnone [bfq] \n[none] bfq \nnone [bfq] \nnone [bfq] \n";
    assert_eq!(pod.say("idle", script), format!("default 100\n{disks}"));
    let written = |id: &str| {
        let stats = pod.shim.stats(id).unwrap().stats;
        let stats = Metrics::parse_from_bytes(&stats.value).unwrap();
        stats.io.usage.iter().map(|disk| disk.wbytes).sum::<u64>()
    };
    pod.shim.start("light", "").unwrap();
    assert_eq!(line(&mut light), "written");
    pod.shim.start("heavy", "").unwrap();
    let before = (written("heavy"), written("light"));
    assert_eq!(line(&mut heavy), "written");
    let after = (written("heavy"), written("light"));
    let (heavy, light) = (after.0 - before.0, after.1 - before.1);
    eprintln!("with a weight of 1000: {heavy} bytes, of 100: {light} bytes");
    assert!(light > 0 && heavy > 2 * light, "{heavy} {light}");
    for id in ["idle", "heavy", "light"] {
        pod.remove(id);
    }
    pod.end();
    world.finish().unwrap();
}

/// A limit of the device that a directory lies on.
pub fn limit(directory: &Path, name: &str, value: u64) -> Value {
    let device = fs::metadata(directory).unwrap().dev();
    json!({"major": rustix::fs::major(device), "minor": rustix::fs::minor(device), name: value})
}
