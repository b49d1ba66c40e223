//! For the tests of all modules.

use nix::sched::{CloneFlags, unshare};

/// Gives the calling thread, which is the test's own, and those that it starts from now on, a table of descriptors of their own.
///
/// Other tests' threads start processes at any time, each with a copy of its thread's table until it has executed its program. In a
/// table that is shared with them, what this test closes would stay open so long, and what it has written could not be executed.
pub fn own_descriptors() {
    unshare(CloneFlags::CLONE_FILES).unwrap();
}
