//! Containers, run by the agent on the machine of the tests: as root, in namespaces of their own.
//!
//! This is a program of its own, not one of threads, because the agent copies its process and so must be alone in it. An argument
//! runs only the tests whose name contains it. What needs limits runs where the system has control groups of version 2.

// In a test a failure is told by a panic.
#![allow(clippy::unwrap_used)]

mod confinement;
mod files;
mod guest;
mod lifecycle;
mod limits;
mod streams;

use std::os::unix::net::UnixListener;

use futures::FutureExt;
use guest::Guest;

/// A test: its name, and what runs it.
macro_rules! tests {
    ($($module:ident: $($name:ident)*;)*) => {
        async fn run_all(guest: &Guest, wanted: impl Fn(&str) -> bool) -> (usize, usize) {
            let (mut passed, mut failed) = (0, 0);
            $($({
                let name = concat!(stringify!($module), "::", stringify!($name));
                if wanted(name) {
                    let test = std::panic::AssertUnwindSafe($module::$name(guest));
                    match test.catch_unwind().await {
                        Ok(()) => passed += 1,
                        Err(_) => failed += 1,
                    }
                    println!("test {name} ... {passed} passed, {failed} failed");
                }
            })*)*
            (passed, failed)
        }
    };
}

tests! {
    confinement:
        the_user_is_as_asked
        capabilities_are_as_asked
        descriptors_of_the_agent_do_not_reach_the_program
        paths_are_masked_and_read_only
        devices_and_links_are_there
        a_user_may_open_its_own_streams
        a_read_only_root_is_read_only_but_not_its_mounts
        a_seccomp_profile_holds
        seccomp_actions_and_flags_are_the_kernels
        namespaces_are_its_own
        a_user_namespace_maps_its_users
        a_time_namespace_has_its_offsets
        settings_and_names_are_the_containers
        settings_of_the_guest_are_its_containers
        limits_and_priorities_are_set
        an_exec_is_confined_as_its_container
        a_foreign_program_and_a_missing_interpreter_say_what_they_are
        a_link_in_place_of_proc_is_refused
        what_is_not_supported_is_refused_by_name
        hooks_run_in_the_container_with_its_state
        a_failed_hook_fails_the_request;
    files:
        layers_are_joined_and_written_above
        mounts_have_their_options
        a_tmpfs_has_the_mode_of_what_it_covers
        a_tmpfs_may_begin_with_a_copy
        recursive_read_only_covers_what_is_below
        links_of_an_image_do_not_lead_out
        identities_of_mounts_are_mapped
        identities_of_layers_are_mapped
        what_is_bound_writable_is_a_copy
        a_container_with_users_mounts_what_only_the_guest_may_open;
    limits:
        limits_are_set_changed_and_counted
        running_out_of_memory_kills_in_the_container_and_is_told_before_the_exit
        pausing_stops_and_resuming_goes_on
        processes_are_listed
        devices_are_those_allowed
        a_shared_process_namespace_leaves_nothing_behind;
    streams:
        a_hundred_mebibytes_pass_through_intact
        an_input_ends_while_another_container_waits_for_its_start
        an_input_ends_while_another_containers_hook_runs
        all_output_arrives_before_the_stream_ends
        a_reader_that_stops_holds_only_its_own_writer
        streams_may_come_after_the_request
        no_streams_are_the_null_device
        a_terminal_is_one
        a_terminal_may_be_closed_and_opened_again
        an_exec_may_have_a_terminal;
    lifecycle:
        a_container_runs_and_its_output_and_exit_code_arrive
        a_missing_program_fails_create_in_the_expected_words
        input_reaches_the_program_and_ends
        a_container_is_killed
        groups_that_a_container_makes_hinder_nobody
        an_exec_runs_beside_the_init_and_ends_before_it
        execs_end_with_an_init_that_was_never_started
        the_agent_connects_again;
}

fn main() {
    if !rustix::process::geteuid().is_root() {
        println!("these tests make containers, which needs root: skipped");
        return;
    }
    let mut arguments = std::env::args().skip(1);
    let filter = arguments.find(|argument| !argument.starts_with("--"));
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    let limited = controllers.is_ok_and(|controllers| controllers.contains("memory"));
    let wanted = |name: &str| {
        if name.starts_with("limits::") && !limited {
            println!("test {name} ... skipped: no control groups of version 2");
            return false;
        }
        filter.as_deref().is_none_or(|filter| name.contains(filter))
    };
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
            let guest = Guest::connect(&directory, &group, host).await;
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
        Ok((passed, 0)) => println!("{passed} tests passed"),
        Ok((passed, failed)) => panic!("{passed} tests passed, {failed} failed"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
