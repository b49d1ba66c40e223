//! What a container has done is what its statistics say, to a few percent.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use bulkhead_tests::cni;
use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Kind, Paths, Peer};
use containerd_shim_protos::cgroups_v2::metrics::{IOEntry, Metrics};
use containerd_shim_protos::protobuf::Message;
use serde_json::{Value, json};

use super::{SIGKILL, differences, line};
use crate::network::traffic::bridged;

const MIB: u64 = 1 << 20;

/// What the container writes to a tmpfs, keeps in its memory, writes to its root, sends and receives, in MiB.
const SHARED: u64 = 24;
const ANONYMOUS: u64 = 32;
const WRITTEN: u64 = 24;
const SENT: u64 = 8;
const RECEIVED: u64 = 4;

/// How long it computes, in clock ticks of 10 ms.
const COMPUTED: u64 = 400;

/// The headers of a packet of TCP over IPv4, with time stamps.
const HEADERS: u64 = 66;

/// Asserts that a number is the expected one, but for some percent of it.
#[track_caller]
fn close(what: &str, percent: u64, found: u64, expected: u64) {
    let off = found.abs_diff(expected);
    let bound = expected * percent / 100;
    assert!(off <= bound, "{what}: {found} is not {expected}");
}

/// Has a container of a runtime work, and returns the ticks that it says all of its processes have used, and its statistics.
fn work(world: &World, runtime: Runtime, network: &cni::Pod) -> (u64, Metrics) {
    let listener = TcpListener::bind("10.81.0.1:7020").unwrap();
    let served = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut sent = Vec::new();
        stream.read_to_end(&mut sent).unwrap();
        let answer = vec![7; (RECEIVED * MIB) as usize];
        stream.write_all(&answer).unwrap();
        sent.len() as u64
    });
    // A pipe that nobody reads keeps what dd has read in dd's memory, once its first byte says that it is there.
    let script = format!(
        "dd if=/dev/zero of=/tmp/file bs=1M count={SHARED} 2>/dev/null
        dd if=/dev/zero of=/file bs=1M count={WRITTEN} conv=fsync 2>/dev/null
        head -c {sent} /dev/zero | nc 10.81.0.1 7020 >/dev/null
        ticks() {{ read -r line <$1; set -- ${{line##*) }}; used=$((used + ${{12}} + ${{13}} + ${{14}} + ${{15}})); }}
        until used=0; ticks /proc/$$/stat; test $used -ge {COMPUTED}; do :; done
        dd if=/dev/zero bs={ANONYMOUS}M count=1 2>/dev/null | {{
            head -c 1 >/dev/null
            used=0; for process in /proc/[0-9]*; do ticks $process/stat; done; echo $used
            exec sleep 1000
        }}",
        sent = SENT * MIB,
    );
    let peer = Peer::new(world.site(), runtime).unwrap();
    let id = "works";
    let program = ["sh", "-c", &script];
    let change = |config: &mut Value| {
        config["linux"]["namespaces"][2]["path"] = json!(network.path());
        config["linux"]["resources"]["memory"] = json!({"limit": 256 * MIB});
        let tmp = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"});
        config["mounts"].as_array_mut().unwrap().push(tmp);
    };
    let bundle = peer.bundle(id, Kind::Single, &program, change).unwrap();
    let shim = peer.start(&bundle).unwrap();
    let (stdout, mut output) = peer.unread(id).unwrap();
    let paths = Paths {
        stderr: stdout.clone(),
        stdout,
        ..Paths::default()
    };
    shim.create(&bundle, &paths).unwrap();
    shim.start(id, "").unwrap();
    let ticks = line(&mut output).parse().unwrap();
    let stats = shim.stats(id).unwrap().stats;
    assert_eq!(served.join().unwrap(), SENT * MIB);
    shim.kill(id, "", SIGKILL, true).unwrap();
    shim.wait(id, "").unwrap();
    shim.delete(id, "").unwrap();
    // It may end before it has answered.
    drop(shim.shutdown(id));
    (ticks, Metrics::parse_from_bytes(&stats.value).unwrap())
}

#[test]
fn statistics_are_what_was_done() {
    let world = World::new().unwrap();
    let network = bridged("counted", 81, 9000);
    let [expected, found] = [Runtime::Runc, Runtime::Bulkhead].map(|runtime| {
        let (ticks, stats) = work(&world, runtime, &network);
        eprintln!("{runtime:?}: {ticks} ticks, {stats}");
        let (cpu, memory) = (&stats.cpu, &stats.memory);
        // What runc does in the control group before there is the container's process is none of its processes'.
        let percent = match runtime {
            Runtime::Runc => 10,
            Runtime::Bulkhead => 5,
        };
        let ticks = ticks * 10_000;
        close("processor time", percent, cpu.usage_usec, ticks);
        let parts = cpu.user_usec + cpu.system_usec;
        close("user's and system's", 1, parts, cpu.usage_usec);
        assert_eq!(memory.shmem, SHARED * MIB);
        close("anonymous memory", 5, memory.anon, ANONYMOUS * MIB);
        let sum = |count: fn(&IOEntry) -> u64| stats.io.usage.iter().map(count).sum::<u64>();
        close("written", 5, sum(|disk| disk.wbytes), WRITTEN * MIB);
        // A guest reads its programs for the first time, and has them in the memory of its files.
        let files = (SHARED + WRITTEN) * MIB + sum(|disk| disk.rbytes);
        close("files", 5, memory.file, files);
        let kernel = memory.kernel_stack + memory.slab + memory.sock;
        let parts = memory.anon + memory.file + kernel;
        close("memory", 5, memory.usage, parts);
        for interface in &stats.network {
            let sent = interface.tx_bytes - interface.tx_packets * HEADERS;
            close("sent", 2, sent, SENT * MIB);
            let received = interface.rx_bytes - interface.rx_packets * HEADERS;
            close("received", 2, received, RECEIVED * MIB);
        }
        let interfaces = stats.network.iter().map(|interface| &interface.name);
        vec![format!("interfaces: {:?}", interfaces.collect::<Vec<_>>())]
    });
    assert_eq!(differences("statistics", &expected, &found), [""; 0]);
    network.remove().unwrap();
    world.finish().unwrap();
}
