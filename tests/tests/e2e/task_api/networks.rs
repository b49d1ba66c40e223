//! Which network a container is in that is not the first of its pod or group.

use std::path::PathBuf;

use bulkhead_tests::cni;
use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::peer::{Kind, Paths, Peer, Shim, code};
use serde_json::{Value, json};

use super::{Notes, SIGKILL, differences, wait_for_end};
use crate::network::traffic::bridged;

/// A setting that each network namespace has for itself.
const SETTING: &str = "net.ipv4.ip_unprivileged_port_start";
/// What no namespace begins with.
const SET: &str = "7";

#[test]
fn containers_are_in_the_networks_that_they_ask_for() {
    let world = World::new().unwrap();
    let network = bridged("first", 95, 1500);
    let other = cni::Pod::new().unwrap();
    let [expected, found] = [Runtime::Runc, Runtime::Bulkhead].map(|runtime| {
        let peer = Peer::new(world.site(), runtime).unwrap();
        let mut notes = look_around(&peer, "pod", Kind::Sandbox, &network, &other);
        notes.extend(look_around(&peer, "group", Kind::Single, &network, &other));
        notes
    });
    assert_eq!(differences("networks", &expected, &found), [""; 0]);
    network.remove().unwrap();
    other.remove().unwrap();
    world.finish().unwrap();
}

/// What containers see that come to a first one, which is of this kind and in the first of these networks.
fn look_around(peer: &Peer, id: &str, kind: Kind, first: &cni::Pod, other: &cni::Pod) -> Notes {
    let change = |config: &mut Value| {
        config["linux"]["namespaces"][2]["path"] = json!(first.path());
        config["linux"]["sysctl"] = json!({"net.ipv4.conf.eth0.tag": "5"});
    };
    let bundle = peer.bundle(id, kind, &["sleep", "1000"], change).unwrap();
    let shim = peer.start(&bundle).unwrap();
    let pid = shim.create(&bundle, &Paths::default()).unwrap();
    let mut notes = Vec::new();
    if matches!(kind, Kind::Single) {
        notes.push(format!("before the start: {}", look_in(peer, &shim, id)));
    }
    shim.start(id, "").unwrap();
    let server = shim.server(id).unwrap().shim_pid;
    let later = match kind {
        Kind::Single => Kind::Single,
        Kind::Sandbox | Kind::Member(_) => Kind::Member(id),
    };
    let process = PathBuf::from(format!("/proc/{pid}/ns/net"));
    let all = [
        ("by its name", Some(first.path()), None),
        ("by a process", Some(process), None),
        ("of its own", None, Some(SET)),
        ("another of its own", None, None),
        ("by its name again", Some(first.path()), None),
        ("another's", Some(other.path()), None),
    ];
    notes.extend(all.into_iter().map(|(what, path, setting)| {
        let name = format!("{id}-{}", what.replace([' ', '\''], "-"));
        format!("{what}: {}", look(peer, &shim, &name, later, path, setting))
    }));
    shim.kill(id, "", SIGKILL, true).unwrap();
    shim.wait(id, "").unwrap();
    shim.delete(id, "").unwrap();
    // It may end before it has answered.
    drop(shim.shutdown(id));
    wait_for_end(server);
    notes
}

/// The interfaces that a process sees that joins a container.
fn look_in(peer: &Peer, shim: &Shim, id: &str) -> String {
    let streams = peer.streams(&format!("{id}-early"), None).unwrap();
    let program = ["ls", "/sys/class/net"];
    shim.exec(id, "early", &program, &streams.paths).unwrap();
    shim.start(id, "early").unwrap();
    shim.wait(id, "early").unwrap();
    shim.delete(id, "early").unwrap();
    streams.stdout.text().unwrap().trim_end().replace('\n', " ")
}

/// What a container sees of its network: the interfaces, their settings, whether the loopback is up, the setting. Or why there is none.
fn look(
    peer: &Peer,
    shim: &Shim,
    id: &str,
    kind: Kind,
    path: Option<PathBuf>,
    setting: Option<&str>,
) -> String {
    let change = |config: &mut Value| {
        if let Some(path) = path {
            config["linux"]["namespaces"][2]["path"] = json!(path);
        }
        if let Some(value) = setting {
            config["linux"]["sysctl"] = json!({SETTING: value});
        }
    };
    let script = format!(
        "ls /sys/class/net; cd /proc/sys; cat net/ipv4/conf/*/tag /sys/class/net/lo/flags {}",
        SETTING.replace('.', "/")
    );
    let bundle = peer.bundle(id, kind, &["sh", "-c", &script], change);
    let bundle = bundle.unwrap();
    let streams = peer.streams(id, None).unwrap();
    let created = shim.create(&bundle, &streams.paths);
    if created.is_err() {
        return code(&created);
    }
    shim.start(id, "").unwrap();
    shim.wait(id, "").unwrap();
    shim.delete(id, "").unwrap();
    assert_eq!(streams.stderr.text().unwrap(), "");
    streams.stdout.text().unwrap().trim_end().replace('\n', " ")
}
