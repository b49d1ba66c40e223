//! `bulkhead-vmm`: one process, one virtual machine. The shim starts it, jailed, with a control socket as descriptor 3.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use bulkhead_vmm::control::{CONTROL_DESCRIPTOR, Channel};
use bulkhead_vmm::machine;
use nix::sys::socket::{SockType, getsockopt, sockopt};

fn main() -> ExitCode {
    let Some(control) = control_socket() else {
        eprintln!(
            "bulkhead-vmm: descriptor {CONTROL_DESCRIPTOR} is not the control socket; this program is started by \
             containerd-shim-bulkhead-v2, not by hand"
        );
        return ExitCode::from(2);
    };
    // Execution has made the process dumpable again: nobody shall read guest memory through /proc or a core file.
    if nix::sys::prctl::set_dumpable(false).is_err() {
        return ExitCode::FAILURE;
    }
    use_one_arena();
    match machine::serve(control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Has all threads allocate from one arena. The C library gives back memory of further ones only after it has read
/// `/proc/sys/vm/overcommit_memory`, and a device's thread may not open a file.
fn use_one_arena() {
    // SAFETY: numbers only, before there is a second thread. It fails for numbers that do not exist.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Takes the control socket, if that is what the descriptor is.
fn control_socket() -> Option<Channel> {
    // SAFETY: this call only looks, and says so if the descriptor is not open.
    if unsafe { libc::fcntl(CONTROL_DESCRIPTOR, libc::F_GETFD) } == -1 {
        return None;
    }
    // SAFETY: the descriptor is open, and this, at the start of the process, is the only place that takes it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(CONTROL_DESCRIPTOR) };
    let kind = getsockopt(&descriptor, sockopt::SockType);
    (kind == Ok(SockType::SeqPacket)).then(|| descriptor.into())
}
