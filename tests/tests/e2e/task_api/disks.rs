//! Root file systems on disks that are there already, as the erofs, devmapper and blockfile snapshotters hand them over; and limits of disks.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Paths, mount};
use bulkhead_tests::process;
use serde_json::json;

use super::{Pod, SIGKILL};

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
    update(json!({
        "memory": {"limit": 96 << 20, "reservation": 16 << 20, "swap": 128 << 20},
        "cpu": {"shares": 512, "quota": 40_000, "period": 80_000, "burst": 10_000},
        "pids": {"limit": 77},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
        "unified": {"memory.high": "61440000"},
        "blockIO": {"throttleWriteBpsDevice": [throttle(&world.site().directory, 1 << 20)]},
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
    let streams = pod.peer.streams("x", None).unwrap();
    let files = "memory.max memory.low memory.swap.max memory.high cpu.weight cpu.max cpu.max.burst pids.max hugetlb.2MB.max";
    let script = format!("cd /sys/fs/cgroup; cat {files}; cut -d ' ' -f 2- io.max | uniq -c");
    let program = ["sh", "-c", &script];
    pod.shim.exec("c", "x", &program, &streams.paths).unwrap();
    pod.shim.start("c", "x").unwrap();
    pod.shim.wait("c", "x").unwrap();
    pod.shim.delete("c", "x").unwrap();
    let text = streams.stdout.text().unwrap();
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
    ];
    assert_eq!(lines, expected, "{}", streams.stderr.text().unwrap());
    pod.shim.kill("c", "", SIGKILL, true).unwrap();
    pod.shim.wait("c", "").unwrap();
    pod.shim.delete("c", "").unwrap();
    pod.end();
    world.finish().unwrap();
}

/// A limit of the device that a directory lies on.
fn throttle(directory: &Path, rate: u64) -> serde_json::Value {
    let device = fs::metadata(directory).unwrap().dev();
    json!({"major": rustix::fs::major(device), "minor": rustix::fs::minor(device), "rate": rate})
}
