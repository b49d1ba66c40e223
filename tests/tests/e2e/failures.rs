//! Bad input: each ends in an error that says what and why, and leaves nothing behind.

use std::fs;
use std::path::PathBuf;

use bulkhead_tests::ctr::{Outcome, Runtime, World};
use bulkhead_tests::layer::{Attributes, LayerBuilder};
use bulkhead_tests::oci::Image;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

/// What is said when no container starts under a configuration with `changes`.
fn refused(world: &World, changes: &[(&str, &str)]) -> Outcome {
    let directory = TempDir::new_in("/root").unwrap();
    let options = world.configure(directory.path(), changes).unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let outcome = container.options(options).run(&["true"]).output().unwrap();
    assert_ne!(outcome.code, 0, "{changes:?}");
    outcome
}

/// Asserts that no container starts under a configuration with `changes`, that the error says all of `words`, and that nothing
/// is left.
fn assert_refused(world: &World, changes: &[(&str, &str)], words: &[&str]) {
    let outcome = refused(world, changes);
    for word in words {
        assert!(
            outcome.stderr.contains(word),
            "no {word:?} in: {}",
            outcome.stderr
        );
    }
    world.settle().unwrap();
}

/// A copy of a file of the build, changed.
struct Changed {
    directory: TempDir,
}

impl Changed {
    fn new(world: &World, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let directory = TempDir::new_in("/root").unwrap();
        let mut content = fs::read(world.site().payload.join("lib").join(name)).unwrap();
        change(&mut content);
        fs::write(directory.path().join("file"), content).unwrap();
        Self { directory }
    }

    /// The path as a value of the configuration.
    fn value(&self) -> String {
        format!("{:?}", self.directory.path().join("file"))
    }
}

/// A small file system of its own, for full disks.
struct Small {
    directory: TempDir,
}

impl Small {
    fn new(size: &str) -> Self {
        let directory = TempDir::new_in("/root").unwrap();
        let options = std::ffi::CString::new(format!("size={size},mode=755")).unwrap();
        mount(
            "none",
            directory.path(),
            "tmpfs",
            MountFlags::empty(),
            &*options,
        )
        .unwrap();
        Self { directory }
    }

    fn value(&self) -> String {
        format!("{:?}", self.directory.path())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        unmount(self.directory.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_file_that_is_missing_is_named() {
    let world = World::new().unwrap();
    for key in ["vmm", "kernel", "image"] {
        assert_refused(
            &world,
            &[(key, "\"/no/such/file\"")],
            &["/no/such/file", "No such file"],
        );
    }
    world.finish().unwrap();
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let world = World::new().unwrap();
    let noise = Changed::new(&world, "vmlinux", |content| content[..4096].fill(b'x'));
    assert_refused(&world, &[("kernel", &noise.value())], &["kernel image"]);
    let half = Changed::new(&world, "vmlinux", |content| {
        content.truncate(content.len() / 2)
    });
    assert_refused(&world, &[("kernel", &half.value())], &["kernel image"]);
    // An ELF file's e_machine.
    let foreign = Changed::new(&world, "vmlinux", |content| content[18] = 183);
    let words = ["for another architecture", "183"];
    assert_refused(&world, &[("kernel", &foreign.value())], &words);
    let empty = Changed::new(&world, "vmlinux", Vec::clear);
    assert_refused(&world, &[("kernel", &empty.value())], &["kernel image"]);
    world.finish().unwrap();
}

#[test]
fn a_root_image_of_an_impossible_length_is_refused() {
    let world = World::new().unwrap();
    let longer = Changed::new(&world, "rootfs.erofs", |content| content.push(0));
    assert_refused(
        &world,
        &[("image", &longer.value())],
        &["no multiple of 512"],
    );
    world.finish().unwrap();
}

#[test]
fn a_layer_that_lost_its_end_is_refused() {
    let world = World::new().unwrap();
    let directory = TempDir::new_in("/root").unwrap();
    let changes = [("cache_dir", &*format!("{:?}", directory.path()))];
    let options = world.configure(directory.path(), &changes).unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let call = container.options(options).run(&["true"]);
    call.output().unwrap().success().unwrap();
    // Beside the scratch disks' template and the configuration.
    let images = fs::read_dir(directory.path()).unwrap().flatten();
    let mut images = images.map(|entry| entry.path());
    let is_layer = |path: &PathBuf| {
        let path = path.to_string_lossy();
        !path.contains("scratch") && !path.ends_with(".toml")
    };
    let layer = images.find(is_layer).unwrap();
    let length = fs::metadata(&layer).unwrap().len();
    let file = fs::File::options().write(true).open(&layer).unwrap();
    file.set_len(length / 2).unwrap();
    let (layer, length) = (layer.to_str().unwrap(), length.to_string());
    assert_refused(&world, &changes, &[layer, &length, "remove it"]);
    world.finish().unwrap();
}

#[test]
fn a_guest_that_cannot_come_up_says_why() {
    let world = World::new().unwrap();
    let zeros = Changed::new(&world, "rootfs.erofs", |content| content.fill(0));
    assert_refused(
        &world,
        &[("image", &zeros.value())],
        &["Kernel panic", "Unable to mount root"],
    );
    let half = Changed::new(&world, "rootfs.erofs", |content| {
        content.truncate(content.len() / 1024 * 512)
    });
    assert_refused(&world, &[("image", &half.value())], &["Kernel panic"]);
    let parameters = [("kernel_params", "\"init=/no/such/init\"")];
    assert_refused(&world, &parameters, &["Kernel panic", "/no/such/init"]);
    world.finish().unwrap();
}

#[test]
fn a_guest_that_hangs_is_given_up() {
    let world = World::new().unwrap();
    let directory = TempDir::new_in("/root").unwrap();
    let kernel = directory.path().join("kernel");
    fs::write(&kernel, crate::kernels::idle()).unwrap();
    let kernel = format!("{kernel:?}");
    let changes = [("kernel", kernel.as_str()), ("boot_timeout_seconds", "1")];
    assert_refused(
        &world,
        &changes,
        &["did not answer within 1 s", "boot_timeout_seconds"],
    );
    world.finish().unwrap();
}

#[test]
fn a_configuration_that_is_not_understood_is_refused() {
    let world = World::new().unwrap();
    assert_refused(
        &world,
        &[("kernal", "\"/vmlinux\"")],
        &["bulkhead.toml", "kernal"],
    );
    assert_refused(
        &world,
        &[("default_vcpus", "33")],
        &["default_vcpus", "1 to 32"],
    );
    assert_refused(
        &world,
        &[("default_memory_mib", "\"much\"")],
        &["default_memory_mib"],
    );
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let options = ["--runtime-config-path", "/no/such/config.toml"];
    let outcome = container.options(options).run(&["true"]).output().unwrap();
    assert_ne!(outcome.code, 0);
    assert!(
        outcome.stderr.contains("/no/such/config.toml"),
        "{}",
        outcome.stderr
    );
    world.finish().unwrap();
}

#[test]
fn a_full_disk_is_told() {
    let world = World::new().unwrap();
    // Nothing fits; the scratch disk's template does, but no layer.
    for (key, size) in [
        ("scratch_dir", "64k"),
        ("cache_dir", "64k"),
        ("cache_dir", "512k"),
    ] {
        let small = Small::new(size);
        let path = small.value();
        let outcome = refused(&world, &[(key, &path)]);
        for word in [path.trim_matches('"'), key] {
            assert!(outcome.stderr.contains(word), "{size}: {}", outcome.stderr);
        }
        drop(small);
        world.settle().unwrap();
    }
    world.finish().unwrap();
}

#[test]
fn a_container_lives_on_when_the_host_has_no_room_for_what_it_writes() {
    let world = World::new().unwrap();
    let small = Small::new("70m");
    let directory = TempDir::new_in("/root").unwrap();
    let options = world
        .configure(directory.path(), &[("scratch_dir", &small.value())])
        .unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let script = "dd if=/dev/zero of=/file bs=1M count=100 conv=fsync && exit 1; echo alive";
    let outcome = container
        .options(options)
        .run(&["sh", "-c", script])
        .output()
        .unwrap();
    assert!(outcome.stderr.contains("/file"), "{}", outcome.stderr);
    assert_eq!(outcome.success().unwrap(), "alive\n");
    drop(small);
    world.finish().unwrap();
}

#[test]
fn a_container_that_fills_its_disk_is_told() {
    let world = World::new().unwrap();
    let directory = TempDir::new_in("/root").unwrap();
    let options = world
        .configure(directory.path(), &[("scratch_size_mib", "64")])
        .unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let script = "dd if=/dev/zero of=/file bs=1M count=100 && exit 1; rm /file && echo small >/file && cat /file";
    let outcome = container
        .options(options)
        .run(&["sh", "-c", script])
        .output()
        .unwrap();
    assert!(
        outcome.stderr.contains("No space left on device"),
        "{}",
        outcome.stderr
    );
    assert_eq!(outcome.success().unwrap(), "small\n");
    world.finish().unwrap();
}

#[test]
fn a_program_that_cannot_run_is_named() {
    let world = World::new().unwrap();
    for program in ["/no/such/program", "no-such-program", "/etc/passwd", "/etc"] {
        let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
        let outcome = container.run(&[program]).output().unwrap();
        assert_ne!(outcome.code, 0, "{program}");
        assert!(outcome.stderr.contains(program), "{}", outcome.stderr);
        world.settle().unwrap();
    }
    world.finish().unwrap();
}

#[test]
fn a_program_for_another_architecture_is_refused() {
    let world = World::new().unwrap();
    // The headers of an ELF executable for aarch64 (e_machine 183), which is all that is looked at.
    let mut program = fs::read(world.site().payload.join("bin/bulkhead-vmm")).unwrap();
    program.truncate(4096);
    program[18..20].copy_from_slice(&183_u16.to_le_bytes());
    let mut layer = LayerBuilder::default();
    for directory in ["dev", "proc", "sys", "run"] {
        layer
            .directory(directory, &Attributes::mode(0o755))
            .unwrap();
    }
    layer
        .file("program", &Attributes::mode(0o755), &program)
        .unwrap();
    let image = Image {
        name: "localhost/foreign:latest",
        architecture: "amd64",
        command: &["/program"],
        layers: &[layer.finish().unwrap()],
    };
    let directory = TempDir::new_in("/root").unwrap();
    let archive = directory.path().join("foreign.tar");
    image.write(&archive).unwrap();
    let archive = archive.to_str().unwrap();
    world
        .ctr(&["image", "import", archive])
        .output()
        .unwrap()
        .success()
        .unwrap();

    let container = world.container(Runtime::Bulkhead, "foreign").unwrap();
    let outcome = container.run(&[]).output().unwrap();
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("/program"), "{}", outcome.stderr);
    assert!(
        outcome.stderr.to_lowercase().contains("exec format error"),
        "{}",
        outcome.stderr
    );
    world
        .ctr(&["image", "delete", "localhost/foreign:latest"])
        .output()
        .unwrap()
        .success()
        .unwrap();
    world.finish().unwrap();
}
