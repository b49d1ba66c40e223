//! The last steps of a process: its user, its privileges, its program.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use oci_spec::runtime::Hook;
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::channel::Child;
use super::{hooks, keep_only, read_limited, search};
use crate::error::{Context, Error};
use crate::oci::program::Program;
use crate::sys;

/// The longest `/etc/passwd` that is searched for a home directory.
const MAX_PASSWD: u64 = 1 << 20;

/// Becomes the program. With a channel, waits before that for the order to start, after everything that could fail has been done.
pub fn start(
    program: &Program,
    hooks: &[Hook],
    state: &serde_json::Value,
    channel: Option<&Child>,
) -> Result<Infallible, Error> {
    let environment = with_home(program)?;
    for &(resource, limit) in &program.limits {
        rustix::process::setrlimit(resource, limit)
            .context(|| format!("setting the limit {resource:?} to {limit:?}"))?;
    }
    if let Some(scheduler) = program.scheduler {
        sys::set_scheduler(scheduler).context(|| "setting the scheduler".into())?;
    }
    if let Some((class, level)) = program.io_priority {
        sys::set_io_priority(class, level).context(|| "setting the I/O priority".into())?;
    }
    if program.no_new_privileges {
        rustix::thread::set_no_new_privs(true).context(|| "setting no_new_privs".into())?;
    }
    // A program may begin where its user could not go by itself, or where nobody but its user can.
    let entered = enter_directory(&program.directory);
    drop_bounding_set(program)?;
    rustix::thread::set_keep_capabilities(true).context(|| "keeping capabilities".into())?;
    become_user(program)?;
    let what = || format!("changing to the directory {}", program.directory.display());
    match entered {
        Err(Errno::ACCESS | Errno::PERM) => enter_directory(&program.directory).context(what)?,
        entered => entered.context(what)?,
    }
    rustix::process::umask(Mode::from_raw_mode(program.umask & 0o777));
    // A filter may be installed without no_new_privs only by who has CAP_SYS_ADMIN, so that is kept, though not in effect.
    let needs_admin = program.seccomp.is_some() && !program.no_new_privileges;
    set_capabilities(program, needs_admin)?;
    let name = program.arguments.first();
    let name = name.ok_or_else(|| Error::InvalidArgument("process.args is empty".into()))?;
    let path = search::find(name, &environment)?;
    search::check_format(&path)?;
    let become_it = || {
        if let Some(channel) = channel {
            channel.ready()?;
        }
        let variables = &program.environment;
        hooks::run("startContainer", hooks, variables, state, "created")?;
        // The filter may forbid it, and they stay while they are permitted and inheritable.
        raise_ambient(program)?;
        if let Some(filter) = &program.seccomp {
            if needs_admin {
                raise(CapabilitySet::SYS_ADMIN)?;
            }
            sys::load_seccomp(&filter.program, filter.flags)
                .context(|| "installing the seccomp filter".into())?;
            if needs_admin {
                set_capabilities(program, false)?;
            }
        }
        Err(cannot_run(
            &path,
            &sys::execve(&path, &program.arguments, &environment),
        ))
    };
    match channel {
        // It may wait for long, and has what it was built from open: the guest's root, other containers' namespaces.
        Some(channel) => {
            let closed = keep_only(&[channel.as_fd()]);
            super::end(closed.and_then(|()| become_it()), channel)
        }
        None => become_it(),
    }
}

fn cannot_run(path: &CStr, error: &io::Error) -> Error {
    let cause = match error.raw_os_error() {
        Some(libc::ENOEXEC) => "exec format error".to_owned(),
        Some(libc::ENOENT) => "no such file or directory".to_owned(),
        _ => error.to_string(),
    };
    Error::Failed(format!("exec {}: {cause}", path.to_string_lossy()))
}

/// The environment, with HOME from the container's own user list if it is not given.
fn with_home(program: &Program) -> Result<Vec<CString>, Error> {
    let mut environment = program.environment.clone();
    let given = |variable: &CString| {
        let value = variable.to_bytes().strip_prefix(b"HOME=");
        value.is_some_and(|value| !value.is_empty())
    };
    if !environment.iter().any(given) {
        let list = read_limited("/etc/passwd", MAX_PASSWD);
        let list = list
            .context(|| "reading /etc/passwd".into())?
            .unwrap_or_default();
        let home = home(&list, program.uid.as_raw()).unwrap_or(b"/");
        let variable = CString::new([b"HOME=", home].concat());
        environment.retain(|variable| !variable.to_bytes().starts_with(b"HOME="));
        environment.push(variable.context(|| "setting HOME".into())?);
    }
    Ok(environment)
}

/// The home directory of a user in the text of a `passwd(5)`.
fn home(list: &[u8], uid: u32) -> Option<&[u8]> {
    list.split(|&byte| byte == b'\n').find_map(|line| {
        let mut fields = line.split(|&byte| byte == b':');
        let found: u32 = std::str::from_utf8(fields.nth(2)?).ok()?.parse().ok()?;
        let home = fields.nth(2)?;
        (found == uid && !home.is_empty()).then_some(home)
    })
}

fn drop_bounding_set(program: &Program) -> Result<(), Error> {
    for capability in CapabilitySet::all().iter() {
        if !program.capabilities.bounding.contains(capability) {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // A capability that this kernel does not know.
                Err(rustix::io::Errno::INVAL) => {}
                other => other.context(|| format!("dropping {capability:?}"))?,
            }
        }
    }
    Ok(())
}

fn become_user(program: &Program) -> Result<(), Error> {
    let (uid, gid): (Uid, Gid) = (program.uid, program.gid);
    let what = || format!("becoming user {} and group {}", uid.as_raw(), gid.as_raw());
    match rustix::thread::set_thread_groups(&program.groups) {
        Err(rustix::io::Errno::PERM) if program.groups.is_empty() => {}
        other => other.context(|| format!("taking the groups {:?}", program.groups))?,
    }
    rustix::thread::set_thread_res_gid(gid, gid, gid).context(what)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).context(what)
}

fn set_capabilities(program: &Program, keep_admin: bool) -> Result<(), Error> {
    let sets = &program.capabilities;
    let kept = if keep_admin {
        CapabilitySet::SYS_ADMIN
    } else {
        CapabilitySet::empty()
    };
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: sets.effective,
            permitted: sets.permitted | kept,
            inheritable: sets.inheritable,
        },
    )
    .context(|| "setting capabilities".into())
}

/// Brings a capability that was kept into effect.
fn raise(capability: CapabilitySet) -> Result<(), Error> {
    let what = || "raising a capability".to_owned();
    let mut sets = rustix::thread::capabilities(None).context(what)?;
    sets.effective |= capability;
    rustix::thread::set_capabilities(None, sets).context(what)
}

fn raise_ambient(program: &Program) -> Result<(), Error> {
    for capability in program.capabilities.ambient.iter() {
        rustix::thread::configure_capability_in_ambient_set(capability, true)
            .context(|| format!("making {capability:?} ambient"))?;
    }
    Ok(())
}

/// Changes to the working directory, and makes sure that it lies within the container's root.
fn enter_directory(directory: &Path) -> rustix::io::Result<()> {
    rustix::process::chdir(directory)?;
    // A directory outside the root (through a leaked descriptor) has no path, or one in parentheses.
    let now = rustix::process::getcwd(Vec::new())?;
    if now.to_bytes().starts_with(b"/") {
        Ok(())
    } else {
        Err(Errno::XDEV)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_directory_is_found_by_number() {
        let list = b"root:x:0:0:root:/root:/bin/sh\n# comment\nbad:x:12\nu:x:12:12::/home/u:\nn:x:13:13:::\n";
        assert_eq!(home(list, 0), Some(b"/root".as_slice()));
        assert_eq!(home(list, 12), Some(b"/home/u".as_slice()));
        assert_eq!(home(list, 13), None);
        assert_eq!(home(list, 14), None);
        assert_eq!(home(b"", 0), None);
    }
}
