//! A process moves between cgroups, with all its threads: a test program of its own, because nothing else may start children
//! meanwhile.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_shim::cgroup::{directory, enter, remove};

/// How long a cgroup's last processes may take.
const PATIENCE: Duration = Duration::from_secs(2);

#[test]
fn a_process_enters_its_children_too_and_leaves_nothing() {
    let cgroups = || fs::read_to_string("/proc/self/cgroup").unwrap();
    let parent = format!("bulkhead-test-{}", std::process::id());
    // proc_pid_mountinfo(5)
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut mount_points: Vec<PathBuf> = mounts
        .lines()
        .filter(|line| line.contains(" - cgroup ") || line.contains(" - cgroup2 "))
        .map(|line| PathBuf::from(line.split(' ').nth(4).unwrap()))
        .collect();
    assert!(!mount_points.is_empty());
    // One may be mounted in several places.
    let device = |path: &PathBuf| fs::metadata(path).unwrap().dev();
    mount_points.sort_by_key(device);
    mount_points.dedup_by_key(|path| device(path));
    let is_clean = || {
        !mount_points
            .iter()
            .any(|point| point.join(&parent).exists())
    };
    let before = cgroups();
    let directory = directory(&format!("/{parent}/pod/sandbox"))
        .unwrap()
        .unwrap();

    enter(&directory).unwrap().leave().unwrap();
    assert!(is_clean());

    let stay = enter(&directory).unwrap();
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    for process in ["self".to_owned(), child.id().to_string()] {
        let now = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
        for line in now.lines() {
            assert!(line.ends_with("/pod/sandbox"), "{now}");
        }
    }
    // Still in use by the child.
    assert!(stay.leave().is_err());
    assert_eq!(cgroups(), before);

    // Meanwhile another container of the pod lives beside it, and is the last to leave.
    let neighbour = Path::new(&parent).join("pod/neighbour");
    let stay = enter(&neighbour).unwrap();
    drop(child.stdin.take());
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    remove(&directory, PATIENCE).unwrap();
    reaper.join().unwrap();
    remove(&directory, PATIENCE).unwrap();
    assert!(!is_clean());
    stay.leave().unwrap();
    assert!(is_clean());

    // What others made stays.
    for point in &mount_points {
        fs::create_dir(point.join(&parent)).unwrap();
    }
    enter(&directory).unwrap().leave().unwrap();
    for point in &mount_points {
        fs::remove_dir(point.join(&parent)).unwrap();
    }

    // A file of the CPU controller, so that other hierarchies have been joined when it is in the way.
    let error = enter(Path::new("cpu.stat/x")).unwrap_err();
    assert!(error.to_string().contains("cpu.stat"), "{error}");
    assert!(error.to_string().contains("as root of the host"), "{error}");
    for point in &mount_points {
        assert!(!point.join("cpu.stat/x").exists());
    }
    assert_eq!(cgroups(), before);
    assert!(is_clean());
}
