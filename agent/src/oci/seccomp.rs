//! Compiles an OCI seccomp profile to a classic BPF program.
//!
//! The rules of all system calls of an architecture become ranges of numbers with one decision each, and the program finds the
//! range by binary search: a profile of 400 names costs a call about ten instructions, and the kernel, which evaluates the program once for
//! each system call when it is installed, little as well.
//!
//! A name that no architecture knows is skipped, as everywhere: profiles are written for many kernels.

use std::collections::HashMap;

use libc::sock_filter;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use crate::error::Error;

/// A compiled profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// The program.
    pub program: Vec<sock_filter>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: u32,
}

/// `linux/audit.h`.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// The bit in a system call's number that marks the x32 interface of x86_64.
const X32_BIT: u32 = 0x4000_0000;

const RETURN_KILL_THREAD: u32 = 0;
const RETURN_NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS as u32;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

impl Filter {
    /// Compiles a profile.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self, Error> {
        super::refuse(
            "linux.seccomp.listenerPath",
            profile.listener_path().is_some(),
        )?;
        super::refuse(
            "linux.seccomp.listenerMetadata",
            profile.listener_metadata().is_some(),
        )?;
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let rules = Rules::new(profile, default)?;
        let architectures = profile.architectures().as_deref().unwrap_or_default();
        let has = |architecture| architectures.contains(&architecture);
        // The guest's kernel has no x32 interface, so its calls fail whatever the profile says, if it lets them in at all.
        let x32 = if has(Arch::ScmpArchX32) {
            RETURN_NO_SUCH_CALL
        } else {
            RETURN_KILL_THREAD
        };

        let mut native_tree = search(&rules.ranges(native_calls(), &HashMap::new()))?;
        let mut body = vec![load(NUMBER), jump(libc::BPF_JGE, X32_BIT, 0, 1), give(x32)];
        body.append(&mut native_tree);

        let mut program = vec![load(ARCHITECTURE)];
        program.extend(unless(AUDIT_ARCH_X86_64, body.len())?);
        program.append(&mut body);
        if has(Arch::ScmpArchX86) {
            let ranges = rules.ranges(compatible_calls(), &multiplexed(&rules));
            let mut body = vec![load(NUMBER)];
            body.append(&mut search(&ranges)?);
            program.extend(unless(AUDIT_ARCH_I386, body.len())?);
            program.append(&mut body);
        }
        program.push(give(RETURN_KILL_THREAD));
        if program.len() > libc::BPF_MAXINSNS as usize {
            return Err(Error::InvalidArgument(format!(
                "linux.seccomp needs {} instructions: the kernel takes {}",
                program.len(),
                libc::BPF_MAXINSNS
            )));
        }

        let mut flags = 0;
        for flag in profile.flags().iter().flatten() {
            flags |= match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                    libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
                }
                LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                    return Err(super::refused(
                        "linux.seccomp.flags SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                    ));
                }
            } as u32;
        }
        Ok(Self { program, flags })
    }
}

/// What the filter returns for an action.
fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, Error> {
    // The low 16 bits carry the number; EPERM if the profile gives none.
    let data = errno.unwrap_or(libc::EPERM as u32);
    let data = u16::try_from(data).map_err(|_| {
        Error::InvalidArgument(format!("linux.seccomp: the errno {data} is too large"))
    })?;
    match action {
        LinuxSeccompAction::ScmpActNotify => {
            Err(super::refused("linux.seccomp action SCMP_ACT_NOTIFY"))
        }
        LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace => {
            Ok(action.as_u32(None) & 0xffff_0000 | u32::from(data))
        }
        LinuxSeccompAction::ScmpActKill
        | LinuxSeccompAction::ScmpActKillThread
        | LinuxSeccompAction::ScmpActKillProcess
        | LinuxSeccompAction::ScmpActTrap
        | LinuxSeccompAction::ScmpActLog
        | LinuxSeccompAction::ScmpActAllow => Ok(action.as_u32(None)),
    }
}

/// The system calls of x86_64 by number.
fn native_calls() -> impl Iterator<Item = (u32, &'static str)> {
    use syscalls::x86_64::Sysno;
    (0..=Sysno::last().id() as u32)
        .filter_map(|number| Some((number, Sysno::new(number as usize)?.name())))
}

/// The system calls of 32-bit programs by number.
fn compatible_calls() -> impl Iterator<Item = (u32, &'static str)> {
    use syscalls::x86::Sysno;
    (0..=Sysno::last().id() as u32)
        .filter_map(|number| Some((number, Sysno::new(number as usize)?.name())))
}

/// A condition on one argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    index: usize,
    operator: LinuxSeccompOperator,
    value: u64,
    second_value: u64,
}

impl Condition {
    fn first_is(value: u64) -> Self {
        Self {
            index: 0,
            operator: LinuxSeccompOperator::ScmpCmpEq,
            value,
            second_value: 0,
        }
    }
}

impl From<&LinuxSeccompArg> for Condition {
    fn from(argument: &LinuxSeccompArg) -> Self {
        Self {
            index: argument.index(),
            operator: argument.op(),
            value: argument.value(),
            second_value: argument.value_two().unwrap_or(0),
        }
    }
}

/// What is decided about one system call.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Decision {
    Always(u32),
    /// The first alternative whose conditions all hold; otherwise the last value.
    ByArguments(Vec<(Vec<Condition>, u32)>, u32),
}

/// The rules for each name.
struct Rules<'a> {
    by_name: HashMap<&'a str, Decision>,
    default: u32,
    /// Whether a call that is newer than all those of the profile fails as unknown, rather than as forbidden: the C library then
    /// falls back to an older one.
    newer_is_unknown: bool,
}

impl<'a> Rules<'a> {
    fn new(profile: &'a LinuxSeccomp, default: u32) -> Result<Self, Error> {
        let mut by_name = HashMap::new();
        for rule in profile.syscalls().iter().flatten() {
            let action = action(rule.action(), rule.errno_ret())?;
            if action == default {
                continue;
            }
            let alternatives = alternatives(rule)?;
            for name in rule.names() {
                add(&mut by_name, name, &alternatives, action, default);
            }
        }
        Ok(Self {
            by_name,
            default,
            newer_is_unknown: !matches!(
                profile.default_action(),
                LinuxSeccompAction::ScmpActAllow
                    | LinuxSeccompAction::ScmpActLog
                    | LinuxSeccompAction::ScmpActTrace
            ),
        })
    }

    /// The decisions over all numbers: each holds from its number up to the next entry's.
    fn ranges(
        &self,
        calls: impl Iterator<Item = (u32, &'static str)>,
        extra: &HashMap<&str, Decision>,
    ) -> Vec<(u32, Decision)> {
        let default = Decision::Always(self.default);
        let calls = calls.filter_map(|(number, name)| {
            let decision = extra.get(name).or_else(|| self.by_name.get(name))?;
            Some((number, decision.clone()))
        });
        let mut ranges = vec![(0, default.clone())];
        let mut push = |number, decision| match ranges.last_mut() {
            Some((start, last)) if *start == number => *last = decision,
            Some((_, last)) if *last == decision => {}
            _ => ranges.push((number, decision)),
        };
        let mut end = 0;
        for (number, decision) in calls {
            if number > end {
                push(end, default.clone());
            }
            push(number, decision);
            end = number + 1;
        }
        let newer = if self.newer_is_unknown && end > 0 {
            Decision::Always(RETURN_NO_SUCH_CALL)
        } else {
            default
        };
        push(end, newer);
        ranges
    }
}

/// The conditions of a rule: all of one alternative must hold. Conditions on different arguments are one alternative; as soon as two are on the
/// same argument, each is an alternative of its own, which is how profiles have always been read.
fn alternatives(rule: &LinuxSyscall) -> Result<Vec<Vec<Condition>>, Error> {
    let arguments = rule.args().iter().flatten();
    let conditions: Vec<Condition> = arguments.map(Condition::from).collect();
    let mut used = [false; 6];
    let mut repeated = false;
    for condition in &conditions {
        match used.get_mut(condition.index) {
            Some(used) => repeated |= std::mem::replace(used, true),
            None => {
                return Err(Error::InvalidArgument(format!(
                    "linux.seccomp: an argument's index is {}: a system call has six",
                    condition.index
                )));
            }
        }
    }
    Ok(if repeated {
        conditions.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![conditions]
    })
}

/// Adds a rule. One without conditions decides alone; those with conditions are asked in their order.
fn add<'a>(
    rules: &mut HashMap<&'a str, Decision>,
    name: &'a str,
    alternatives: &[Vec<Condition>],
    action: u32,
    default: u32,
) {
    if alternatives.iter().any(Vec::is_empty) {
        // Of two rules without conditions the first holds.
        match rules.get(name) {
            Some(Decision::Always(_)) => {}
            _ => drop(rules.insert(name, Decision::Always(action))),
        }
        return;
    }
    let decision = rules
        .entry(name)
        .or_insert_with(|| Decision::ByArguments(Vec::new(), default));
    if let Decision::ByArguments(known, _) = decision {
        known.extend(
            alternatives
                .iter()
                .map(|conditions| (conditions.clone(), action)),
        );
    }
}

/// The calls that 32-bit programs may also make through `socketcall` and `ipc`, whose first argument says which: a rule for one
/// of them must hold there too. (Conditions on arguments cannot: those lie behind a pointer.)
fn multiplexed(rules: &Rules<'_>) -> HashMap<&'static str, Decision> {
    const SOCKET: [&str; 20] = [
        "socket",
        "bind",
        "connect",
        "listen",
        "accept",
        "getsockname",
        "getpeername",
        "socketpair",
        "send",
        "recv",
        "sendto",
        "recvfrom",
        "shutdown",
        "setsockopt",
        "getsockopt",
        "sendmsg",
        "recvmsg",
        "accept4",
        "recvmmsg",
        "sendmmsg",
    ];
    const IPC: [(u64, &str); 12] = [
        (1, "semop"),
        (2, "semget"),
        (3, "semctl"),
        (4, "semtimedop"),
        (11, "msgsnd"),
        (12, "msgrcv"),
        (13, "msgget"),
        (14, "msgctl"),
        (21, "shmat"),
        (22, "shmdt"),
        (23, "shmget"),
        (24, "shmctl"),
    ];
    let socket = (1..).zip(SOCKET);
    let mut decisions = HashMap::new();
    for (multiplexer, calls) in [
        ("socketcall", socket.collect::<Vec<_>>()),
        ("ipc", IPC.to_vec()),
    ] {
        // What is said of the multiplexer itself is what holds for all calls that have no rule of their own.
        let otherwise = match rules.by_name.get(multiplexer) {
            Some(Decision::Always(action)) => *action,
            Some(Decision::ByArguments(..)) => continue,
            None => rules.default,
        };
        let alternatives: Vec<_> = calls
            .into_iter()
            .filter_map(|(number, name)| match rules.by_name.get(name)? {
                Decision::Always(action) if *action != otherwise => {
                    Some((vec![Condition::first_is(number)], *action))
                }
                Decision::Always(_) | Decision::ByArguments(..) => None,
            })
            .collect();
        if !alternatives.is_empty() {
            decisions.insert(multiplexer, Decision::ByArguments(alternatives, otherwise));
        }
    }
    decisions
}

fn statement(code: u32, value: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k: value,
    }
}

fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn give(value: u32) -> sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, value)
}

fn jump(comparison: u32, value: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter {
        code: (libc::BPF_JMP | comparison | libc::BPF_K) as u16,
        jt: yes,
        jf: no,
        k: value,
    }
}

fn far(distance: usize) -> Result<sock_filter, Error> {
    let distance = u32::try_from(distance)
        .map_err(|_| Error::InvalidArgument("linux.seccomp is too long".into()))?;
    Ok(statement(libc::BPF_JMP | libc::BPF_JA, distance))
}

/// Skips the next instructions unless the loaded value is this one.
fn unless(value: u32, skipped: usize) -> Result<[sock_filter; 2], Error> {
    Ok([jump(libc::BPF_JEQ, value, 1, 0), far(skipped)?])
}

/// Finds the loaded number's range and returns what is decided for it.
fn search(ranges: &[(u32, Decision)]) -> Result<Vec<sock_filter>, Error> {
    match ranges {
        [] => Ok(Vec::new()),
        [(_, decision)] => decide(decision),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let low = search(low)?;
            let mut program = match u8::try_from(low.len()) {
                Ok(length) => vec![jump(libc::BPF_JGE, high[0].0, length, 0)],
                // A conditional jump reaches 255 instructions.
                Err(_) => vec![jump(libc::BPF_JGE, high[0].0, 0, 1), far(low.len())?],
            };
            program.extend(low);
            program.extend(search(high)?);
            Ok(program)
        }
    }
}

fn decide(decision: &Decision) -> Result<Vec<sock_filter>, Error> {
    match decision {
        Decision::Always(value) => Ok(vec![give(*value)]),
        Decision::ByArguments(alternatives, otherwise) => {
            let mut program = Vec::new();
            for (conditions, value) in alternatives {
                let tests: Vec<_> = conditions.iter().map(test).collect();
                let mut left = tests.iter().map(Vec::len).sum::<usize>();
                for mut test in tests {
                    left -= test.len();
                    // A test ends in a jump that is taken when it fails, beyond the tests that follow and the return.
                    let length = test.len();
                    for (index, instruction) in test.iter_mut().enumerate() {
                        let fail = u8::try_from(length - index - 1 + left + 1).map_err(|_| {
                            Error::InvalidArgument("linux.seccomp: a rule has too many args".into())
                        })?;
                        for target in [&mut instruction.jt, &mut instruction.jf] {
                            if *target == FAIL {
                                *target = fail;
                            }
                        }
                    }
                    program.extend(test);
                }
                program.push(give(*value));
            }
            program.push(give(*otherwise));
            Ok(program)
        }
    }
}

/// Stands for the distance to the next alternative in a [`test`].
const FAIL: u8 = u8::MAX;

/// The instructions that go on behind themselves if a condition holds, and to [`FAIL`] if not.
fn test(condition: &Condition) -> Vec<sock_filter> {
    let low = ARGUMENTS + 8 * condition.index as u32;
    let high = low + 4;
    let value = condition.value;
    let (value_low, value_high) = (value as u32, (value >> 32) as u32);
    match condition.operator {
        LinuxSeccompOperator::ScmpCmpEq => vec![
            load(high),
            jump(libc::BPF_JEQ, value_high, 0, FAIL),
            load(low),
            jump(libc::BPF_JEQ, value_low, 0, FAIL),
        ],
        LinuxSeccompOperator::ScmpCmpNe => vec![
            load(high),
            jump(libc::BPF_JEQ, value_high, 0, 2),
            load(low),
            jump(libc::BPF_JEQ, value_low, FAIL, 0),
        ],
        // The mask is the first value, what must be left of the argument the second.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let wanted = condition.second_value;
            let and = |mask| statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask);
            vec![
                load(high),
                and(value_high),
                jump(libc::BPF_JEQ, (wanted >> 32) as u32, 0, FAIL),
                load(low),
                and(value_low),
                jump(libc::BPF_JEQ, wanted as u32, 0, FAIL),
            ]
        }
        // The high halves decide unless they are equal.
        LinuxSeccompOperator::ScmpCmpGt => vec![
            load(high),
            jump(libc::BPF_JGT, value_high, 3, 0),
            jump(libc::BPF_JEQ, value_high, 0, FAIL),
            load(low),
            jump(libc::BPF_JGT, value_low, 0, FAIL),
        ],
        LinuxSeccompOperator::ScmpCmpGe => vec![
            load(high),
            jump(libc::BPF_JGT, value_high, 3, 0),
            jump(libc::BPF_JEQ, value_high, 0, FAIL),
            load(low),
            jump(libc::BPF_JGE, value_low, 0, FAIL),
        ],
        LinuxSeccompOperator::ScmpCmpLt => vec![
            load(high),
            jump(libc::BPF_JGT, value_high, FAIL, 0),
            jump(libc::BPF_JEQ, value_high, 0, 2),
            load(low),
            jump(libc::BPF_JGE, value_low, FAIL, 0),
        ],
        LinuxSeccompOperator::ScmpCmpLe => vec![
            load(high),
            jump(libc::BPF_JGT, value_high, FAIL, 0),
            jump(libc::BPF_JEQ, value_high, 0, 2),
            load(low),
            jump(libc::BPF_JGT, value_low, FAIL, 0),
        ],
    }
}

#[cfg(test)]
mod tests;
