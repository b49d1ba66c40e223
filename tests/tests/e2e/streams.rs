//! Standard streams.

use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::images::noise;

/// Does not fit into any pipe, ring or window on the way.
const MUCH: usize = 32 << 20;

#[test]
fn much_goes_in_and_comes_out_intact() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let input = noise(MUCH);
    let outcome = container
        .run(&["cat"])
        .input(input.clone())
        .output()
        .unwrap();
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert_eq!(outcome.stdout.len(), input.len());
    // Not assert_eq!: nobody wants to read the difference.
    assert!(outcome.stdout == input, "the bytes differ");
    world.finish().unwrap();
}

#[test]
fn streams_are_kept_apart_and_end() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let script = "echo out; cat >/tmp/in; echo err >&2; wc -c </tmp/in";
    let outcome = container
        .run(&["sh", "-c", script])
        .input("12345")
        .output()
        .unwrap();
    assert_eq!(outcome.code, 0);
    assert_eq!(outcome.text(), "out\n5\n");
    assert_eq!(outcome.stderr, "err\n");
    world.finish().unwrap();
}

#[test]
fn the_last_words_of_a_container_arrive() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    // More than a pipe holds, written just before the end.
    let script = "head -c 1000000 /dev/zero; echo end; exit 9";
    let outcome = container.run(&["sh", "-c", script]).output().unwrap();
    assert_eq!(outcome.code, 9);
    assert_eq!(outcome.stdout.len(), 1_000_004);
    assert!(outcome.stdout.ends_with(b"end\n"));
    world.finish().unwrap();
}

#[test]
fn a_container_that_reads_nothing_ends_nevertheless() {
    let world = World::new().unwrap();
    let container = world.container(Runtime::Bulkhead, "busybox").unwrap();
    let outcome = container
        .run(&["echo", "done"])
        .input(noise(1 << 20))
        .output()
        .unwrap();
    assert_eq!(outcome.success().unwrap(), "done\n");
    world.finish().unwrap();
}
