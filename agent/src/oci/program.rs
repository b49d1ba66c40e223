//! The program that a process of a container runs, with everything that is set just before it starts.

use std::ffi::CString;
use std::fmt::Display;
use std::path::PathBuf;

use oci_spec::runtime::{
    IOPriorityClass, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimitType, Process, Scheduler,
};
use rustix::fs::{Gid, Uid};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use rustix::termios::Winsize;

use super::capability::Sets;
use super::seccomp::Filter;
use crate::error::{Context, Error};
use crate::sys::SchedulerAttributes;

/// A program and the state that its process has when it starts.
#[derive(Debug, Clone)]
pub struct Program {
    /// At least one.
    pub arguments: Vec<CString>,
    /// `NAME=value`, each name once.
    pub environment: Vec<CString>,
    /// Absolute.
    pub directory: PathBuf,
    pub uid: Uid,
    pub gid: Gid,
    pub groups: Vec<Gid>,
    pub umask: u32,
    pub capabilities: Sets,
    pub no_new_privileges: bool,
    pub seccomp: Option<Filter>,
    pub limits: Vec<(Resource, Rlimit)>,
    pub oom_score_adjustment: Option<i32>,
    pub scheduler: Option<SchedulerAttributes>,
    /// Class and level, as `sys::set_io_priority` takes them.
    pub io_priority: Option<(u8, u8)>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// The terminal's first size, if given.
    pub size: Option<Winsize>,
}

impl Program {
    /// Brings an OCI process into the kernel's terms; `terminal` comes from the request, which overrides the specification.
    pub fn new(process: &Process, terminal: bool, seccomp: Option<Filter>) -> Result<Self, Error> {
        let arguments = process.args().iter().flatten();
        let arguments: Vec<CString> = arguments
            .map(|argument| c_string("process.args", argument))
            .collect::<Result<_, _>>()?;
        if arguments.is_empty() {
            return Err(Error::InvalidArgument("process.args is empty".into()));
        }
        let directory = process.cwd().clone();
        if !directory.has_root() {
            return Err(Error::InvalidArgument(format!(
                "process.cwd is {}: it must be absolute",
                directory.display()
            )));
        }
        let user = process.user();
        let groups = user.additional_gids().iter().flatten();
        let limits = process.rlimits().iter().flatten();
        Ok(Self {
            arguments,
            environment: environment(process.env().iter().flatten())?,
            directory,
            uid: Uid::from_raw(user.uid()),
            gid: Gid::from_raw(user.gid()),
            groups: groups.map(|&gid| Gid::from_raw(gid)).collect(),
            umask: user.umask().unwrap_or(0o022),
            capabilities: process
                .capabilities()
                .as_ref()
                .map(Sets::from)
                .unwrap_or_default(),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            seccomp,
            limits: limits
                .map(|limit| {
                    let value = |value| (value != u64::MAX).then_some(value);
                    (
                        resource(limit.typ()),
                        Rlimit {
                            current: value(limit.soft()),
                            maximum: value(limit.hard()),
                        },
                    )
                })
                .collect(),
            oom_score_adjustment: match process.oom_score_adj() {
                Some(score) if !(-1000..=1000).contains(&score) => {
                    return Err(Error::InvalidArgument(format!(
                        "process.oomScoreAdj is {score}: expected -1000 to 1000"
                    )));
                }
                score => score,
            },
            scheduler: process.scheduler().as_ref().map(scheduler).transpose()?,
            io_priority: match process.io_priority() {
                None => None,
                Some(priority) => {
                    let class = match priority.class() {
                        IOPriorityClass::IoprioClassRt => 1,
                        IOPriorityClass::IoprioClassBe => 2,
                        IOPriorityClass::IoprioClassIdle => 3,
                    };
                    let level = u8::try_from(priority.priority())
                        .ok()
                        .filter(|&level| level < 8);
                    let level = level.ok_or_else(|| {
                        Error::InvalidArgument(format!(
                            "process.ioPriority.priority is {}: expected 0 to 7",
                            priority.priority()
                        ))
                    })?;
                    Some((class, level))
                }
            },
            terminal,
            size: match process.console_size() {
                Some(size) if terminal => Some(window(size.width(), size.height())?),
                _ => None,
            },
        })
    }
}

impl Program {
    /// Raises the hard limits of a process, or of the calling one, that are below the program's. A process in a user namespace of its own
    /// can only lower them. Until the caller changes its own, all processes have those that it has.
    pub fn raise_limits(&self, pid: Option<Pid>) -> Result<(), Error> {
        for &(resource, wanted) in &self.limits {
            let now = getrlimit(resource);
            if now
                .maximum
                .is_some_and(|now| wanted.maximum.is_none_or(|wanted| wanted > now))
            {
                let raised = Rlimit {
                    maximum: wanted.maximum,
                    ..now
                };
                prlimit(pid, resource, raised)
                    .context(|| format!("setting the limit {resource:?} to {wanted:?}"))?;
            }
        }
        Ok(())
    }
}

/// A terminal's size in the kernel's terms.
pub fn window(width: u64, height: u64) -> Result<Winsize, Error> {
    let side = |name, value| {
        u16::try_from(value).map_err(|_| {
            Error::InvalidArgument(format!("a terminal's {name} of {value} is too large"))
        })
    };
    Ok(Winsize {
        ws_row: side("height", height)?,
        ws_col: side("width", width)?,
        ws_xpixel: 0,
        ws_ypixel: 0,
    })
}

fn c_string(field: &str, text: &str) -> Result<CString, Error> {
    CString::new(text)
        .map_err(|_| Error::InvalidArgument(format!("{field}: {text:?} contains a null byte")))
}

/// Keeps each variable once, in the place of its first and with the value of its last occurrence.
fn environment<'a>(variables: impl Iterator<Item = &'a String>) -> Result<Vec<CString>, Error> {
    let mut kept: Vec<&str> = Vec::new();
    for variable in variables {
        let Some((name, _)) = variable
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
        else {
            return Err(Error::InvalidArgument(format!(
                "process.env: {variable:?} is not NAME=value"
            )));
        };
        let name = &variable[..=name.len()];
        match kept.iter_mut().find(|kept| kept.starts_with(name)) {
            Some(earlier) => *earlier = variable,
            None => kept.push(variable),
        }
    }
    kept.into_iter()
        .map(|variable| c_string("process.env", variable))
        .collect()
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

/// The kernel's number of `SCHED_DEADLINE`.
const DEADLINE: u32 = 6;

fn wrong_scheduler(field: &str, value: impl Display, problem: &str) -> Error {
    Error::InvalidArgument(format!("process.scheduler.{field} is {value}: {problem}"))
}

fn scheduler(scheduler: &Scheduler) -> Result<SchedulerAttributes, Error> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(super::refused("process.scheduler.policy SCHED_ISO"));
        }
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => DEADLINE,
    };
    let flags = scheduler.flags().iter().flatten().map(|flag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    });
    let priority = scheduler.priority().unwrap_or(0);
    let attributes = SchedulerAttributes {
        size: 0,
        policy,
        flags: flags.fold(0, |all, flag| all | flag),
        nice: scheduler.nice().unwrap_or(0),
        priority: u32::try_from(priority)
            .map_err(|_| wrong_scheduler("priority", priority, "it is negative"))?,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    };
    // The kernel would take the nearest.
    if !(-20..=19).contains(&attributes.nice) {
        return Err(wrong_scheduler(
            "nice",
            attributes.nice,
            "expected -20 to 19",
        ));
    }
    // These it would ignore.
    let times = [
        ("runtime", attributes.runtime),
        ("deadline", attributes.deadline),
        ("period", attributes.period),
    ];
    match times.into_iter().find(|&(_, time)| time != 0) {
        Some((field, time)) if policy != DEADLINE => {
            Err(wrong_scheduler(field, time, "only SCHED_DEADLINE has one"))
        }
        _ => Ok(attributes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(json: &str) -> Result<Program, Error> {
        Program::new(&serde_json::from_str(json).unwrap(), false, None)
    }

    #[test]
    fn the_last_value_of_a_variable_wins_in_the_first_place() {
        let program =
            program(r#"{"user":{},"cwd":"/","args":["x"],"env":["A=1","AB=2","A=3"]}"#).unwrap();
        assert_eq!(program.environment, [c"A=3".to_owned(), c"AB=2".to_owned()]);
    }

    #[test]
    fn bad_values_are_named() {
        for (json, named) in [
            (r#"{"user":{},"cwd":"/","args":[]}"#, "process.args"),
            (r#"{"user":{},"cwd":"x","args":["x"]}"#, "process.cwd"),
            (
                r#"{"user":{},"cwd":"/","args":["x\u0000"]}"#,
                "process.args",
            ),
            (
                r#"{"user":{},"cwd":"/","args":["x"],"env":["=1"]}"#,
                "process.env",
            ),
            (
                r#"{"user":{},"cwd":"/","args":["x"],"ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}}"#,
                "process.ioPriority",
            ),
            (
                r#"{"user":{},"cwd":"/","args":["x"],"scheduler":{"policy":"SCHED_OTHER","nice":20}}"#,
                "process.scheduler.nice is 20",
            ),
            (
                r#"{"user":{},"cwd":"/","args":["x"],"scheduler":{"policy":"SCHED_FIFO","priority":1,"deadline":7}}"#,
                "process.scheduler.deadline is 7",
            ),
        ] {
            let error = program(json).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn infinite_limits_are_infinite() {
        let program = program(
            r#"{"user":{},"cwd":"/","args":["x"],"rlimits":[{"type":"RLIMIT_CORE","soft":0,"hard":18446744073709551615}]}"#,
        )
        .unwrap();
        assert_eq!(
            program.limits,
            [(
                Resource::Core,
                Rlimit {
                    current: Some(0),
                    maximum: None
                }
            )]
        );
    }
}
