//! A container's files are those of its image, and what it writes.

use bulkhead_tests::ctr::{Runtime, World};

/// Runs a script in the `debian` image.
fn debian(world: &World, runtime: Runtime, script: &str) -> String {
    let container = world.container(runtime, "debian").unwrap();
    container
        .run(&["bash", "-O", "extglob", "-O", "dotglob", "-c", script])
        .output()
        .unwrap()
        .success()
        .unwrap()
}

/// Asserts that a script says the same under Bulkhead as under runc, and something at all.
fn assert_same(script: &str, least_lines: usize) {
    let world = World::new().unwrap();
    let expected = debian(&world, Runtime::Runc, script);
    let found = debian(&world, Runtime::Bulkhead, script);
    for (expected, found) in expected.lines().zip(found.lines()) {
        assert_eq!(found, expected);
    }
    assert_eq!(found.lines().count(), expected.lines().count());
    assert!(expected.lines().count() >= least_lines, "{expected}");
    world.finish().unwrap();
}

/// What is mounted over the image is no part of it.
const WITHOUT_MOUNTS: &str = "cd /; set -- !(dev|proc|sys|run|etc); ";

#[test]
fn listings_are_those_of_runc() {
    // How much room directories and files take up is no matter of the image, but of the file system under it.
    let list = format!(
        "{WITHOUT_MOUNTS} LC_ALL=C ls -lnR --full-time \"$@\" | \
         sed -E '/^total /d; s/^(d\\S+ +\\S+ +\\S+ +\\S+) +\\S+/\\1/; s/ +/ /g'"
    );
    assert_same(&list, 2000);
}

#[test]
fn extended_attributes_are_those_of_runc() {
    // Complaints (of a device that has none, say) are part of it.
    let list = format!(
        "{WITHOUT_MOUNTS} find \"$@\" -xdev -print0 | sort -z | \
         xargs -0 getfattr --no-dereference --dump --match=- 2>&1 || true"
    );
    assert_same(&list, 8);
}

#[test]
fn contents_are_those_of_runc() {
    let sum = format!(
        "{WITHOUT_MOUNTS} find \"$@\" -xdev -type f -print0 | sort -z | xargs -0 sha256sum"
    );
    assert_same(&sum, 1500);
}

#[test]
fn hard_links_are_one_file() {
    let script = "cd /everything/links; stat -c %h first; [ first -ef second ] && [ first -ef below/third ] && echo one; \
                  echo more >>second; cat below/third";
    let world = World::new().unwrap();
    let text = debian(&world, Runtime::Bulkhead, script);
    assert_eq!(text, debian(&world, Runtime::Runc, script));
    world.finish().unwrap();
}

#[test]
fn what_is_written_stays_in_the_container() {
    let world = World::new().unwrap();
    let change = "echo changed >/changes/replaced; rm -r /everything/many; mkdir /new; cat /changes/replaced; ls /everything/many 2>&1";
    let text = debian(&world, Runtime::Bulkhead, &format!("{change}; true"));
    assert!(text.starts_with("changed\n"), "{text}");
    let text = debian(
        &world,
        Runtime::Bulkhead,
        "cat /changes/replaced; ls /everything/many | wc -l; ls -d /new || true",
    );
    assert_eq!(text, "replaced\n1000\n");
    world.finish().unwrap();
}

#[test]
fn two_gigabytes_are_read_back_as_written() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    // 64 numbered copies of 32 MiB that do not repeat: four times what the guest's memory could hold.
    let script = "
        stream() { n=0; while [ $n -lt 64 ]; do echo $n; cat /pattern; n=$((n + 1)); done; }
        head -c 33554432 /dev/urandom >/pattern
        stream >/file && sync && stream | md5sum && md5sum </file && wc -c </file";
    let text = container
        .run(&["sh", "-c", script])
        .output()
        .unwrap()
        .success()
        .unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let [written, read, length] = lines[..] else {
        panic!("{text}")
    };
    assert_eq!(written, read);
    // The numbers and their line ends are 182 bytes.
    assert_eq!(length.trim(), ((2_u64 << 30) + 182).to_string());
    world.finish().unwrap();
}
