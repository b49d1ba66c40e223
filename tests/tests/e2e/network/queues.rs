//! Several pairs of queues: one for each processor.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::thread::available_parallelism;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::process;
use tempfile::TempDir;

use super::traffic::bridged;
use super::{each_of, exec, start_in};

/// The processors of the container's machine.
const PROCESSORS: usize = 2;

/// What a process learns from how many processors the host has.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Connections in each direction from each processor, and bytes on each.
const CONNECTIONS: usize = 16;
const LENGTH: usize = 100_000;

/// A host with more processors than the emulated node has: a shim gives no machine more than the host has.
struct Host(Option<TempDir>);

impl Host {
    fn with(processors: usize) -> Self {
        if available_parallelism().unwrap().get() >= processors {
            return Self(None);
        }
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("online");
        std::fs::write(&file, format!("0-{}\n", processors - 1)).unwrap();
        let mut mount = Command::new("mount");
        process::output(mount.arg("--bind").arg(&file).arg(ONLINE)).unwrap();
        Self(Some(directory))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.0.is_some() {
            process::output(Command::new("umount").arg(ONLINE)).unwrap();
        }
    }
}

/// How often each queue of a network interface has interrupted its processor, from the text of /proc/interrupts.
fn interrupts(text: &str) -> BTreeMap<String, u64> {
    let lines = text.lines().filter_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (_, queue) = words.last()?.split_once('-')?;
        let counted = words
            .iter()
            .skip(1)
            .map_while(|word| word.parse::<u64>().ok());
        (queue.starts_with("input") || queue.starts_with("output"))
            .then(|| (queue.to_owned(), counted.sum()))
    });
    lines.collect()
}

#[test]
fn each_processor_has_queues_of_its_own() {
    let world = World::new().unwrap();
    let host = Host::with(PROCESSORS);
    let pod = bridged("queues", 74, 1500);
    let options = ["--cpus".to_owned(), PROCESSORS.to_string()];
    let container = start_in(&world, Runtime::Bulkhead, &pod, &options);
    assert_eq!(exec(&container, "nproc"), format!("{PROCESSORS}\n"));
    let queues = exec(&container, "echo $(ls /sys/class/net/eth0/queues)");
    assert_eq!(queues, "rx-0 rx-1 tx-0 tx-1\n");

    let listener = TcpListener::bind("10.74.0.1:7030").unwrap();
    let count = PROCESSORS * CONNECTIONS;
    let served = each_of(&listener, count, |mut stream, _| {
        stream.write_all(&[1; LENGTH]).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), LENGTH);
    });
    let before = interrupts(&exec(&container, "cat /proc/interrupts"));
    // A processor sends by its own queues.
    let script = format!(
        "for cpu in 1 2; do n=0; while [ $n -lt {CONNECTIONS} ]; do \
         head -c {LENGTH} /dev/zero | taskset $cpu nc 10.74.0.1 7030 | wc -c; n=$((n + 1)); done; done | sort | uniq -c"
    );
    let said = exec(&container, &script);
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(words, [count.to_string(), LENGTH.to_string()]);
    served.join().unwrap();
    let after = interrupts(&exec(&container, "cat /proc/interrupts"));
    let grown = |queue: &str| after[queue] - before[queue];
    for queue in ["input.0", "output.0", "input.1", "output.1"] {
        assert!(
            grown(queue) > 0,
            "{queue} is not used: {before:?} {after:?}"
        );
    }
    container.delete().unwrap();
    pod.remove().unwrap();
    drop(host);
    world.finish().unwrap();
}
