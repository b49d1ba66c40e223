//! Containers, run by the agent on the machine of the tests: as root, in namespaces of their own.
//!
//! This is a program of its own, not one of threads, because the agent copies its process and so must be alone in it. An argument
//! runs only the tests whose name contains it. What needs limits runs where the system has control groups of version 2.

// In a test a failure is told by a panic.
#![allow(clippy::unwrap_used)]

mod guest;
mod lifecycle;

use std::os::unix::net::UnixListener;

use guest::Guest;

/// A test: its name, and what runs it.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        async fn run_all(guest: &Guest, wanted: impl Fn(&str) -> bool) -> usize {
            let mut count = 0;
            $($({
                let name = concat!(stringify!($module), "::", stringify!($name));
                if wanted(name) {
                    println!("test {name} ...");
                    $module::$name(guest).await;
                    println!("test {name} ... ok");
                    count += 1;
                }
            })*)*
            count
        }
    };
}

tests! {
    lifecycle: a_container_runs_and_its_output_and_exit_code_arrive
        a_missing_program_fails_create_in_the_expected_words
        input_reaches_the_program_and_ends
        a_container_is_killed
        an_exec_runs_beside_the_init_and_ends_before_it
        the_agent_connects_again;
}

fn main() {
    if !rustix::process::geteuid().is_root() {
        println!("these tests make containers, which needs root: skipped");
        return;
    }
    let mut arguments = std::env::args().skip(1);
    let filter = arguments.find(|argument| !argument.starts_with("--"));
    let wanted = |name: &str| filter.as_deref().is_none_or(|filter| name.contains(filter));
    let name = format!("bulkhead-agent-test-{}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    std::fs::create_dir(&directory).unwrap();
    let busybox = ["/bin/busybox", "/usr/bin/busybox", "/busybox"];
    let busybox = busybox
        .iter()
        .find(|path| std::path::Path::new(path).exists());
    std::fs::copy(
        busybox.expect("busybox-static is installed"),
        directory.join("busybox"),
    )
    .unwrap();
    let host = UnixListener::bind(directory.join("host")).unwrap();
    let group = guest::group();
    let agent = guest::start(&directory, group.clone());
    let tests = std::panic::AssertUnwindSafe(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let guest = Guest::connect(&directory, host).await;
            run_all(&guest, wanted).await
        })
    });
    let result = std::panic::catch_unwind(tests);
    // Its containers end with it; the kernel has reaped them before its own end is told.
    rustix::process::kill_process(agent, rustix::process::Signal::KILL).unwrap();
    rustix::process::waitpid(Some(agent), rustix::process::WaitOptions::empty()).unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    for container in std::fs::read_dir(&group).unwrap().map(Result::unwrap) {
        if container.file_type().unwrap().is_dir() {
            std::fs::remove_dir(container.path()).unwrap();
        }
    }
    std::fs::remove_dir(&group).unwrap();
    match result {
        Ok(count) => println!("{count} tests passed"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
