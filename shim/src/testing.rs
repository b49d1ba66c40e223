//! For the tests of all modules.

use std::process::Command;

/// In the environment of a process that runs one test only.
const ALONE: &str = "BULKHEAD_TEST_ALONE";

/// Whether this process runs the calling test only. If not, it is run here in a process that does, and is the caller's no more.
///
/// Other tests' threads start programs at any time, each in a process that has copies of all descriptors until the program is
/// executed. What the test has closed stays open or locked so long, and what it has written cannot be executed.
pub fn alone() -> bool {
    if runs_alone() {
        return true;
    }
    let thread = std::thread::current();
    let test = thread.name().expect("a test's thread has its name");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let printed = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (results, errors) = (printed(&output.stdout), printed(&output.stderr));
    assert!(results.contains("1 passed"), "{results}{errors}");
    false
}

/// Whether this process was started by [`alone`], to run one test only.
pub fn runs_alone() -> bool {
    std::env::var_os(ALONE).is_some()
}
