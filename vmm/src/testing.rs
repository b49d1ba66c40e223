//! For the tests of all modules.

use nix::sched::{CloneFlags, unshare};

/// Gives the calling thread, which is the test's own, and those that it starts from now on, a table of descriptors of their own.
///
/// Other tests' threads start processes at any time, each with a copy of its thread's table until it has executed its program. In a
/// table that is shared with them, what this test closes would stay open so long, and what it has written could not be executed.
pub fn own_descriptors() {
    unshare(CloneFlags::CLONE_FILES).unwrap();
}

/// Keeps the C library from looking at files when it allocates memory, as it may in a thread that is confined: at the number of
/// processors before a thread gets one more arena of its own, and at `/proc/sys/vm/overcommit_memory` before it gives a part of one
/// back. The VMM has a single arena.
pub fn allocate_without_files() {
    // SAFETY: numbers only, which the allocator knows.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}
