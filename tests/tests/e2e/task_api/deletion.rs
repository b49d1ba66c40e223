//! `delete`: what containerd calls when a shim does not answer.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Bundle, Kind, Paths, Peer};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use rustix::process::{Pid, Signal, kill_process};

use super::{Notes, differences, wait_for_end};

/// How long `delete` may take (containerd's `io.containerd.timeout.shim.cleanup`).
const LIMIT: Duration = Duration::from_secs(5);

#[test]
fn what_dead_shims_leave_is_deleted_as_under_runc() {
    let world = World::new().unwrap();
    let play = |runtime| {
        let peer = Peer::new(world.site(), runtime).unwrap();
        (half_made(&peer), killed(&peer))
    };
    let (expected, found) = (play(Runtime::Runc), play(Runtime::Bulkhead));
    let mut wrong = differences("half_made_bundles", &expected.0, &found.0);
    wrong.extend(differences("dead_shims", &expected.1, &found.1));
    assert!(wrong.is_empty(), "not as under runc:\n{}", wrong.join("\n"));
    world.finish().unwrap();
}

/// Calls `delete`, which must not take long, and says how it went.
fn delete(peer: &Peer, bundle: &Bundle) -> String {
    let path = bundle.path.display().to_string();
    let before = Instant::now();
    let output = peer.call(bundle, &["-bundle", &path, "delete"]).unwrap();
    let taken = before.elapsed();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(taken < LIMIT, "{}: {taken:?}: {words}", bundle.id);
    if !output.status.success() {
        return "delete: fails".into();
    }
    let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert!(response.exited_at.seconds > 0);
    format!("delete: {}", response.exit_status)
}

/// A bundle's name, and what happens to one that is whole.
type Half = (&'static str, fn(&Path));

/// What containerd has made of a bundle so far, or has left of it.
const HALVES: [Half; 6] = [
    ("whole", |_| {}),
    ("begun", |bundle| {
        fs::write(bundle.join("config.json"), r#"{"ociVersion": "1."#).unwrap();
    }),
    ("unspecified", |bundle| {
        fs::remove_file(bundle.join("config.json")).unwrap();
    }),
    ("rootless", |bundle| {
        fs::remove_dir(bundle.join("rootfs")).unwrap();
    }),
    ("empty", |bundle| {
        fs::remove_dir_all(bundle).unwrap();
        fs::create_dir(bundle).unwrap();
    }),
    ("gone", |bundle| fs::remove_dir_all(bundle).unwrap()),
];

/// Bundles that containerd has only begun to make, or to remove, again and again.
fn half_made(peer: &Peer) -> Notes {
    let mut notes = Notes::new();
    for (id, spoil) in HALVES {
        let bundle = peer.bundle(id, Kind::Single, &["true"], |_| {}).unwrap();
        spoil(&bundle.path);
        for _ in 0..3 {
            notes.push(delete(peer, &bundle));
        }
    }
    notes
}

/// A container whose shim is killed while it runs.
fn killed(peer: &Peer) -> Notes {
    let program = ["sleep", "1000"];
    let bundle = peer
        .bundle("killed", Kind::Single, &program, |_| {})
        .unwrap();
    let shim = peer.start(&bundle).unwrap();
    let pid = shim.create(&bundle, &Paths::default()).unwrap();
    shim.start("killed", "").unwrap();
    let server = shim.server("killed").unwrap().shim_pid;
    let process = Pid::from_raw(server as i32).unwrap();
    kill_process(process, Signal::KILL).unwrap();
    wait_for_end(server);
    let mut notes = vec![delete(peer, &bundle)];
    let process = format!("/proc/{pid}");
    wait_for_end(pid);
    notes.push(format!("there: {}", Path::new(&process).exists()));
    notes.push(delete(peer, &bundle));
    let socket = std::fs::read_to_string(bundle.path.join("address")).unwrap();
    // runc's shim leaves its socket to whoever comes next.
    drop(std::fs::remove_file(socket.trim_start_matches("unix://")));
    notes
}
