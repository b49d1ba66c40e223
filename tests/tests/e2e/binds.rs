//! Files of the host in a container, as its user binds them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use bulkhead_tests::ctr::{Outcome, Runtime, World};
use tempfile::TempDir;

/// Runs a script in a container with binds: source, destination and options.
fn run(world: &World, runtime: Runtime, binds: &[(&Path, &str, &str)], script: &str) -> Outcome {
    let options = binds.iter().flat_map(|(source, destination, options)| {
        let source = source.display();
        let bind = format!("type=bind,src={source},dst={destination},options={options}");
        ["--mount".to_owned(), bind]
    });
    let container = world.container(runtime, "busybox").unwrap();
    let call = container.options(options).run(&["sh", "-c", script]);
    call.output().unwrap()
}

#[test]
fn files_and_trees_of_the_host_are_there() {
    let world = World::new().unwrap();
    let directory = TempDir::new_in("/root").unwrap();
    let at = |name: &str| directory.path().join(name);
    // As the kubelet lays out a ConfigMap.
    fs::create_dir_all(at("tree/..one/below")).unwrap();
    fs::write(at("tree/..one/below/key"), "value\n").unwrap();
    fs::write(at("tree/..one/large"), vec![b'x'; 1 << 20]).unwrap();
    symlink("..one", at("tree/..data")).unwrap();
    symlink("..data/large", at("tree/large")).unwrap();
    fs::set_permissions(at("tree/..one/below"), PermissionsExt::from_mode(0o2750)).unwrap();
    std::os::unix::fs::chown(at("tree/..one/below/key"), Some(7), Some(8)).unwrap();
    fs::write(at("resolv"), "nameserver 192.0.2.1\n").unwrap();
    symlink("resolv", at("resolv.link")).unwrap();
    let script = "cat /etc/resolv.conf /etc/hosts; cd /tree; find . | sort | xargs stat -c '%n %F %a %u:%g %h %Y'; cat ..data/below/key; md5sum large
        for file in /tree/new /tree/large /etc/resolv.conf /etc/hosts /dev/termination-log /masked; do echo more >>$file && echo $file; done; cat /etc/hosts; wc -c </masked; mv /etc/hosts /x || echo busy";
    let (tree, resolv, hosts) = (at("tree"), at("resolv.link"), at("hosts"));
    let words = at("words");
    fs::write(&words, "").unwrap();
    let binds = [
        (tree.as_path(), "/tree", "rbind:rro"),
        (&resolv, "/etc/resolv.conf", "rbind:ro"),
        (&hosts, "/etc/hosts", "rbind:rprivate:rw"),
        (&words, "/dev/termination-log", "rbind:rprivate:rw"),
        (Path::new("/dev/null"), "/masked", "bind"),
    ];
    let [ours, runcs] = [Runtime::Bulkhead, Runtime::Runc].map(|runtime| {
        fs::write(&hosts, "192.0.2.2 neighbour\n").unwrap();
        let outcome = run(&world, runtime, &binds, script);
        (outcome, fs::read_to_string(&hosts).unwrap())
    });
    assert_eq!(ours.0.text(), runcs.0.text(), "{}", ours.0.stderr);
    assert_eq!(ours.0.code, runcs.0.code);
    assert!(
        ours.0.text().contains("192.0.2.2 neighbour\nmore\n0\nbusy"),
        "{}",
        ours.0.text()
    );
    // What a container writes to its own copy stays in its machine.
    assert_eq!(ours.1, "192.0.2.2 neighbour\n");
    assert_eq!(runcs.1, "192.0.2.2 neighbour\nmore\n");
    world.finish().unwrap();
}

#[test]
fn what_cannot_be_shared_is_refused_by_name() {
    let world = World::new().unwrap();
    let directory = TempDir::new_in("/root").unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("tree")).unwrap();
    fs::write(at("file"), "").unwrap();
    fs::File::create(at("large"))
        .unwrap()
        .set_len(100 << 20)
        .unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    for (source, option, words) in [
        (at("absent"), "ro", ["no such file", "/there"]),
        (at("tree"), "rw", ["a directory of the host", "read-only"]),
        (at("file"), "rw", ["a file of the host", "read-only"]),
        (
            at("socket"),
            "ro",
            ["a socket of the host", "remove the mount"],
        ),
        (at("large"), "ro", ["32 MiB", "into the image"]),
        (
            "/dev/kmsg".into(),
            "rw",
            ["a device of the host", "remove the mount"],
        ),
        (
            "/sys/fs/cgroup".into(),
            "ro",
            ["kernel of its own", "/there"],
        ),
    ] {
        let option = format!("rbind:{option}");
        let outcome = run(
            &world,
            Runtime::Bulkhead,
            &[(&source, "/there", &option)],
            "true",
        );
        assert_ne!(outcome.code, 0, "{source:?}");
        for word in words.into_iter().chain(source.to_str()) {
            assert!(
                outcome.stderr.contains(word),
                "no {word:?} in: {}",
                outcome.stderr
            );
        }
    }
    world.finish().unwrap();
}
