//! Roots and mounts.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use containerd_shim_protos::types::mount::Mount;
use serde_json::json;

use crate::guest::{Guest, bind, spec, status};

fn overlay(options: &[&str]) -> Mount {
    Mount {
        type_: "overlay".into(),
        options: options.iter().map(|&option| option.into()).collect(),
        ..Default::default()
    }
}

/// Whether the kernel takes the layers of an overlay one by one, and maps the identities of a tmpfs, as the guest's does.
fn kernel_is_new() -> bool {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(8))
}

pub async fn layers_are_joined_and_written_above(guest: &Guest) {
    if !kernel_is_new() {
        return;
    }
    let base = guest.root();
    let mut roots = Vec::new();
    // More layers than their names would fit into one page of options.
    for number in 0..120 {
        let layer = guest.directory.join(format!("layer-{}", guest.number()));
        std::fs::create_dir_all(layer.join("tmp")).unwrap();
        std::fs::write(layer.join("tmp").join(number.to_string()), "").unwrap();
        roots.push(bind(&layer));
    }
    let top = guest.directory.join(&roots[0].source);
    std::fs::set_permissions(&top, PermissionsExt::from_mode(0o711)).unwrap();
    roots.push(bind(&base));
    roots.push(overlay(&["index=off"]));
    let command = "ls /tmp | wc -l; stat -c %a /; echo new >/bin/new && cat /bin/new; rm /tmp/7; ls /tmp | wc -l";
    let outcome = guest
        .run_in(&spec(&["sh", "-c", command]), &roots)
        .await
        .unwrap();
    assert_eq!(
        (outcome.output.as_str(), outcome.error.as_str()),
        ("120\n711\nnew\n119\n", "")
    );
    assert!(!base.join("bin/new").exists());
    // The next container of the same layers does not see it.
    let outcome = guest
        .run_in(&spec(&["ls", "/bin/new"]), &roots)
        .await
        .unwrap();
    assert_eq!(outcome.status, 1);

    let last = roots.len() - 1;
    roots[last] = overlay(&["ro"]);
    let outcome = guest
        .run_in(&spec(&["sh", "-c", "echo >/x || echo no"]), &roots)
        .await
        .unwrap();
    assert_eq!(outcome.output, "no\n");
}

pub async fn mounts_have_their_options(guest: &Guest) {
    let outside = guest.directory.join("outside");
    std::fs::create_dir_all(outside.join("below")).unwrap();
    std::fs::write(outside.join("file"), "text\n").unwrap();
    let command = "cat /in/file /deep/er/file; touch /in/x 2>/dev/null || echo read-only; ls /in; \
        grep -E ' /(t|in|m) ' /proc/self/mountinfo | while read a b c d place options rest; do echo $place $options; done; stat -c %a:%u /t";
    let mut spec = spec(&["sh", "-c", command]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/in", "type": "bind", "source": outside, "options": ["rbind", "ro", "nosuid", "nodev"]}));
    mounts.push(json!({"destination": "/deep/er/file", "type": "bind", "source": outside.join("file"), "options": ["bind"]}));
    mounts.push(json!({"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["noexec", "mode=1770", "uid=7", "noatime"]}));
    let outcome = guest.run(&spec).await.unwrap();
    assert_eq!(
        outcome.output,
        "text\ntext\nread-only\nbelow\nfile\n/in ro,nosuid,nodev,relatime\n/t rw,noexec,noatime\n1770:7\n",
        "{}",
        outcome.error
    );
}

pub async fn a_tmpfs_has_the_mode_of_what_it_covers(guest: &Guest) {
    let root = guest.root();
    std::fs::set_permissions(root.join("etc"), PermissionsExt::from_mode(0o710)).unwrap();
    let mut spec = spec(&["stat", "-c", "%a", "/etc", "/tmp", "/new"]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    for (place, options) in [
        ("/etc", json!([])),
        ("/tmp", json!(["mode=700"])),
        ("/new", json!([])),
    ] {
        mounts.push(
            json!({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options}),
        );
    }
    let outcome = guest.run_in(&spec, &[bind(&root)]).await.unwrap();
    assert_eq!(outcome.output, "710\n700\n1777\n", "{}", outcome.error);
}

pub async fn a_tmpfs_may_begin_with_a_copy(guest: &Guest) {
    let root = guest.root();
    std::fs::write(root.join("etc/kept"), "kept\n").unwrap();
    let mut spec = spec(&[
        "sh",
        "-c",
        "cat /etc/kept; echo changed >/etc/kept; cat /etc/kept",
    ]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"]}));
    let outcome = guest.run_in(&spec, &[bind(&root)]).await.unwrap();
    assert_eq!(outcome.output, "kept\nchanged\n", "{}", outcome.error);
    assert_eq!(std::fs::read(root.join("etc/kept")).unwrap(), b"kept\n");

    let mut read_only = spec;
    read_only["mounts"]
        .as_array_mut()
        .unwrap()
        .last_mut()
        .unwrap()["options"] = json!(["tmpcopyup", "ro"]);
    let outcome = guest.run_in(&read_only, &[bind(&root)]).await.unwrap();
    assert_eq!(outcome.output, "kept\nkept\n");
}

pub async fn recursive_read_only_covers_what_is_below(guest: &Guest) {
    let outside = guest.directory.join("recursive");
    std::fs::create_dir_all(&outside).unwrap();
    let mut spec = spec(&[
        "sh",
        "-c",
        "touch /all/shm/x 2>/dev/null || echo no; touch /top/shm/x && echo yes; rm /top/shm/x",
    ]);
    // A tree with a mount below: the agent's own /dev.
    let mounts = spec["mounts"].as_array_mut().unwrap();
    for (place, option) in [("/all", "rro"), ("/top", "ro")] {
        mounts.push(json!({"destination": place, "type": "bind", "source": "/dev", "options": ["rbind", option]}));
    }
    let below =
        std::fs::metadata("/dev/shm").unwrap().dev() != std::fs::metadata("/dev").unwrap().dev();
    if below {
        let outcome = guest.run(&spec).await.unwrap();
        assert_eq!(outcome.output, "no\nyes\n", "{}", outcome.error);
    }
}

pub async fn links_of_an_image_do_not_lead_out(guest: &Guest) {
    let root = guest.root();
    let secret = guest.directory.join("secret");
    std::fs::create_dir_all(&secret).unwrap();
    std::os::unix::fs::symlink(&secret, root.join("mnt")).unwrap();
    // Above the root there is nothing else.
    let above = format!("../..{}", secret.display());
    std::os::unix::fs::symlink(above, root.join("srv")).unwrap();
    let script = "ls -d /mnt/made /srv/file; pwd; grep -c /made /proc/self/mountinfo; grep -c '/secret/ro ' /proc/self/mountinfo";
    let mut spec = spec(&["sh", "-c", script]);
    spec["process"]["cwd"] = json!("/srv/made/here");
    spec["linux"]["readonlyPaths"] = json!(["/srv/ro"]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/mnt/made", "type": "tmpfs", "source": "tmpfs"}));
    mounts.push(json!({"destination": "/srv/ro", "type": "tmpfs", "source": "tmpfs"}));
    mounts.push(json!({"destination": "/srv/file", "type": "bind", "source": "/dev/null", "options": ["bind"]}));
    let outcome = guest.run_in(&spec, &[bind(&root)]).await.unwrap();
    let place = format!("{}/made/here", secret.display());
    assert_eq!(
        outcome.output,
        format!("/mnt/made\n/srv/file\n{place}\n1\n2\n"),
        "{}",
        outcome.error
    );
    assert_eq!(std::fs::read_dir(&secret).unwrap().count(), 0);
    links_of_the_kernel_do_not_lead_out(guest, &secret).await;
}

/// Those below `/proc` lead to the file itself, not to what they say: to the root of the guest, where its first process is seen.
async fn links_of_the_kernel_do_not_lead_out(guest: &Guest, secret: &std::path::Path) {
    let root = guest.root();
    let target = format!("/proc/1/root{}", secret.display());
    std::os::unix::fs::symlink(target, root.join("mnt")).unwrap();
    let inside = root.join(secret.strip_prefix("/").unwrap());
    let shared = |mut spec: serde_json::Value| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
        spec
    };
    let script = format!(
        "ls {}; grep -c /secret/ /proc/self/mountinfo",
        secret.display()
    );
    let mut spec_of_mounts = shared(spec(&["sh", "-c", &script]));
    spec_of_mounts["linux"]["devices"] =
        json!([{"path": "/mnt/devices/zero", "type": "c", "major": 1, "minor": 5}]);
    spec_of_mounts["linux"]["maskedPaths"] = json!(["/mnt/made"]);
    let mounts = spec_of_mounts["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/mnt/made", "type": "tmpfs", "source": "tmpfs"}));
    mounts.push(json!({"destination": "/mnt/file", "type": "bind", "source": "/dev/null", "options": ["bind"]}));
    let outcome = guest.run_in(&spec_of_mounts, &[bind(&root)]).await.unwrap();
    assert_eq!(
        outcome.output, "devices\nfile\nmade\n3\n",
        "{}",
        outcome.error
    );
    assert!(inside.join("devices/zero").exists());

    let mut directory = shared(spec(&["pwd"]));
    directory["process"]["cwd"] = json!("/mnt/here");
    let (_, message) = status(guest.run_in(&directory, &[bind(&root)]).await);
    assert!(message.contains("/mnt/here"), "{message}");
    assert_eq!(std::fs::read_dir(secret).unwrap().count(), 0);
}

/// Gives a container users of its own, whose number 0 is the guest's `outside`.
fn add_users(spec: &mut serde_json::Value, outside: u32) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.push(json!({"type": "user", "path": "/proc/7/ns/user"}));
    for field in ["uidMappings", "gidMappings"] {
        spec["linux"][field] = mapping(outside);
    }
}

fn mapping(outside: u32) -> serde_json::Value {
    json!([{"containerID": 0, "hostID": outside, "size": 65536}])
}

pub async fn identities_of_mounts_are_mapped(guest: &Guest) {
    if !kernel_is_new() {
        return;
    }
    let outside = guest.directory.join(format!("mapped-{}", guest.number()));
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), "").unwrap();
    std::os::unix::fs::chown(outside.join("file"), Some(3), Some(4)).unwrap();
    // A container whose own users are mapped alike sees what is on the disk, and may not enter what is not mapped.
    // Mapped as its own users it sees all that is on the disk.
    for (users, given, expected) in [
        (false, true, "70003:80004\n"),
        (true, true, "3:10004\n"),
        (true, false, "3:4\n"),
    ] {
        let mut spec = spec(&["stat", "-c", "%u:%g", "/in/file"]);
        let mut mount = json!({"destination": "/in", "type": "bind", "source": outside, "options": ["bind", "idmap"]});
        if given {
            mount["uidMappings"] = mapping(70_000);
            mount["gidMappings"] = mapping(80_000);
        }
        spec["mounts"].as_array_mut().unwrap().push(mount);
        let root = guest.root();
        if users {
            add_users(&mut spec, 70_000);
            for path in ["", "dev", "proc", "sys"] {
                std::os::unix::fs::chown(root.join(path), Some(70_000), Some(70_000)).unwrap();
            }
        }
        let outcome = guest.run_in(&spec, &[bind(&root)]).await.unwrap();
        assert_eq!(outcome.output, expected, "{}", outcome.error);
    }
}

pub async fn identities_of_layers_are_mapped(guest: &Guest) {
    if !kernel_is_new() {
        return;
    }
    let base = guest.root();
    std::fs::set_permissions(base.join("home"), PermissionsExt::from_mode(0o700)).unwrap();
    let command = "stat -c %u:%g / /etc/passwd /home/user; touch /home/new; stat -c %u:%g /home /home/new; chown 5:6 /etc/passwd; stat -c %u:%g /etc/passwd";
    let mut users = spec(&["sh", "-c", command]);
    add_users(&mut users, 70_000);
    let top = overlay(&["index=off", "uidmap=0:70000:65536", "gidmap=0:70000:65536"]);
    let outcome = guest.run_in(&users, &[bind(&base), top]).await.unwrap();
    assert_eq!(
        (outcome.output.as_str(), outcome.error.as_str()),
        ("0:0\n0:0\n0:0\n0:0\n0:0\n5:6\n", "")
    );
}

pub async fn what_is_bound_writable_is_a_copy(guest: &Guest) {
    let outside = guest.directory.join(format!("bound-{}", guest.number()));
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("0"), "from the host\n").unwrap();
    std::fs::set_permissions(outside.join("0"), PermissionsExt::from_mode(0o640)).unwrap();
    let place = guest.directory.join("run/binds");
    let binds = Mount {
        target: place.to_str().unwrap().into(),
        ..bind(&outside)
    };
    for users in [false, true] {
        let command = "cat /etc/hosts; stat -c %a /etc/hosts; echo more >>/etc/hosts; cat /etc/hosts; echo >/kept || cat /kept";
        let mut spec = spec(&["sh", "-c", command]);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        for (destination, option) in [("/etc/hosts", "rw"), ("/kept", "ro")] {
            mounts.push(json!({"destination": destination, "type": "bind", "source": place.join("0"), "options": ["rbind", option]}));
        }
        let root = guest.root();
        if users {
            std::os::unix::fs::chown(outside.join("0"), Some(70_000), Some(70_000)).unwrap();
            add_users(&mut spec, 70_000);
            for path in ["", "dev", "proc", "sys", "etc"] {
                std::os::unix::fs::chown(root.join(path), Some(70_000), Some(70_000)).unwrap();
            }
        }
        let outcome = guest
            .run_in(&spec, &[bind(&root), binds.clone()])
            .await
            .unwrap();
        assert_eq!(
            outcome.output, "from the host\n640\nfrom the host\nmore\nfrom the host\n",
            "{}",
            outcome.error
        );
        assert!(outcome.error.contains("Read-only"), "{}", outcome.error);
    }
    // What one container binds no other sees.
    assert!(!place.join("0").exists());
}

pub async fn a_container_with_users_mounts_what_only_the_guest_may_open(guest: &Guest) {
    let secret = guest.directory.join(format!("closed-{}", guest.number()));
    std::fs::create_dir_all(secret.join("inner")).unwrap();
    std::fs::write(secret.join("inner/file"), "text\n").unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o700)).unwrap();
    let root = guest.root();
    for path in ["", "dev", "proc", "sys", "run"] {
        std::os::unix::fs::chown(root.join(path), Some(70_000), Some(70_000)).unwrap();
    }
    let mut spec = spec(&["sh", "-c", "cat /in/file; ls /devices/null /dev/mqueue"]);
    add_users(&mut spec, 70_000);
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .retain(|namespace| namespace["type"] != "ipc");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    // A directory in one that is closed to others, and one with mounts below it.
    mounts.push(json!({"destination": "/in", "type": "bind", "source": secret.join("inner"), "options": ["bind", "ro"]}));
    mounts.push(
        json!({"destination": "/devices", "type": "bind", "source": "/dev", "options": ["bind"]}),
    );
    let outcome = guest.run_in(&spec, &[bind(&root)]).await.unwrap();
    assert!(
        outcome.output.starts_with("text\n/devices/null\n"),
        "{outcome:?}"
    );
}
