//! A container's files are those of its image, and what it writes.

use std::fs;

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::images::noise;
use bulkhead_tests::layer::{Attributes, LayerBuilder};
use bulkhead_tests::oci::{Image, Layer};
use tempfile::TempDir;

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

/// A layer with a shell.
fn base() -> Layer {
    let mut layer = LayerBuilder::default();
    for directory in ["bin", "dev", "etc", "proc", "run", "sys"] {
        let mode = Attributes::mode(0o755);
        layer.directory(directory, &mode).unwrap();
    }
    let busybox = fs::read("/bin/busybox").unwrap();
    let mode = Attributes::mode(0o755);
    layer.file("bin/busybox", &mode, &busybox).unwrap();
    layer.finish().unwrap()
}

/// The sizes of the images of layers in a cache, in MiB, in their order.
fn cached(cache: &std::path::Path) -> Vec<u64> {
    let images = fs::read_dir(cache).unwrap().flatten();
    let images = images.filter(|entry| !entry.file_name().to_string_lossy().contains("scratch"));
    let mut sizes: Vec<_> = images
        .map(|entry| entry.metadata().unwrap().len() >> 20)
        .collect();
    sizes.sort_unstable();
    sizes
}

#[test]
fn images_on_one_base_store_it_once() {
    let world = World::new().unwrap();
    let directory = TempDir::new_in("/root").unwrap();
    let cache = directory.path().join("cache");
    let base = base();
    let names = ["on-base-1", "on-base-2", "on-base-3"];
    for (number, name) in names.into_iter().enumerate() {
        // Of 5, 6 and 7 MiB.
        let mut own = LayerBuilder::default();
        let content = noise((5 + number) << 20);
        own.file("own", &Attributes::mode(0o644), &content).unwrap();
        let image = Image {
            name: &format!("localhost/{name}:latest"),
            architecture: "amd64",
            command: &["/bin/busybox", "true"],
            layers: &[base.clone(), own.finish().unwrap()],
        };
        let archive = directory.path().join("image.tar");
        image.write(&archive).unwrap();
        let import = world.ctr(&["image", "import", archive.to_str().unwrap()]);
        import.output().unwrap().success().unwrap();
    }
    let run = |name: &str, limit_mib: &str| {
        let place = format!("{cache:?}");
        let changes = [("cache_dir", place.as_str()), ("cache_size_mib", limit_mib)];
        let options = world.configure(directory.path(), &changes).unwrap();
        let container = world.container(Runtime::Bulkhead, name).unwrap();
        let call = container
            .options(options)
            .run(&["/bin/busybox", "wc", "-c", "/own"]);
        let text = call.output().unwrap().success().unwrap();
        // Its machine uses nothing any more.
        world.settle().unwrap();
        text
    };
    assert_eq!(run(names[0], "100"), format!("{} /own\n", 5 << 20));
    let base = cached(&cache)[0];
    assert_eq!(cached(&cache), [base, 5]);
    assert_eq!(run(names[1], "100"), format!("{} /own\n", 6 << 20));
    assert_eq!(cached(&cache), [base, 5, 6]);
    // What nothing has used for the longest time makes room for what is built, and what is in use stays.
    fs::write(cache.join("recent"), vec![1; 52 << 20]).unwrap();
    assert_eq!(run(names[2], "64"), format!("{} /own\n", 7 << 20));
    assert_eq!(cached(&cache), [base, 7, 52]);
    for name in names {
        let delete = world.ctr(&["image", "delete", &format!("localhost/{name}:latest")]);
        delete.output().unwrap().success().unwrap();
    }
    world.finish().unwrap();
}
