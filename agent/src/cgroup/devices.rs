//! The devices that a container may use, as an eBPF program of its control group.
//!
//! Of the rules the last that fits decides, as if each had been applied after the other; without one, the answer is no. The program
//! therefore asks them from the last to the first.

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::child::devices::DEFAULT;
use crate::error::Error;

/// Access to devices, as the kernel's bits (`BPF_DEVCG_ACC_*`).
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ANY_ACCESS: u32 = MKNOD | READ | WRITE;

/// Kinds of devices, as the kernel's numbers (`BPF_DEVCG_DEV_*`).
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// One rule. What is none fits everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    pub allow: bool,
    pub kind: Option<u32>,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub access: u32,
}

impl TryFrom<&LinuxDeviceCgroup> for Rule {
    type Error = Error;

    fn try_from(rule: &LinuxDeviceCgroup) -> Result<Self, Error> {
        let number = |name: &str, value: Option<i64>| match value {
            None | Some(-1) => Ok(None),
            Some(value) => u32::try_from(value).map(Some).map_err(|_| {
                Error::InvalidArgument(format!("linux.resources.devices: {name} is {value}"))
            }),
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                other => {
                    return Err(Error::InvalidArgument(format!(
                        "linux.resources.devices: {other:?} in access: expected r, w or m"
                    )));
                }
            };
        }
        Ok(Self {
            allow: rule.allow(),
            kind: match rule.typ().unwrap_or(LinuxDeviceType::A) {
                LinuxDeviceType::A => None,
                LinuxDeviceType::B => Some(BLOCK),
                LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
                LinuxDeviceType::P => {
                    return Err(Error::InvalidArgument(
                        "linux.resources.devices: a rule for pipes has no meaning".into(),
                    ));
                }
            },
            major: number("major", rule.major())?,
            minor: number("minor", rule.minor())?,
            access,
        })
    }
}

/// The rules of a container: those that it asks for, and then what every container may do: make nodes, and use the default devices,
/// terminals and tunnels.
pub fn rules(asked: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, Error> {
    let mut rules: Vec<Rule> = asked.iter().map(Rule::try_from).collect::<Result<_, _>>()?;
    unite(&mut rules);
    let allow = |kind, major, minor, access| Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    };
    rules.push(allow(CHARACTER, None, None, MKNOD));
    rules.push(allow(BLOCK, None, None, MKNOD));
    let default = DEFAULT.iter();
    rules.extend(
        default.map(|&(_, major, minor)| allow(CHARACTER, Some(major), Some(minor), ANY_ACCESS)),
    );
    // /dev/pts/N, and /dev/ptmx.
    rules.push(allow(CHARACTER, Some(136), None, ANY_ACCESS));
    rules.push(allow(CHARACTER, Some(5), Some(2), ANY_ACCESS));
    // /dev/net/tun, for who makes a node of it: it needs CAP_NET_ADMIN besides.
    rules.push(allow(CHARACTER, Some(10), Some(200), ANY_ACCESS));
    Ok(rules)
}

/// Lets a rule allow what earlier ones for the same devices have allowed, too: who opens a device to read and to write asks for both at
/// once.
fn unite(rules: &mut [Rule]) {
    for later in 1..rules.len() {
        let (earlier, rest) = rules.split_at_mut(later);
        let rule = &mut rest[0];
        let last_denial = earlier
            .iter()
            .rposition(|other| !other.allow && other.overlaps(rule));
        let since = last_denial.map_or(0, |denial| denial + 1);
        for other in &earlier[since..] {
            if rule.allow && other.allow && other.devices() == rule.devices() {
                rule.access |= other.access;
            }
        }
    }
}

impl Rule {
    fn devices(&self) -> (Option<u32>, Option<u32>, Option<u32>) {
        (self.kind, self.major, self.minor)
    }

    /// Whether there may be a device for which both are.
    fn overlaps(&self, other: &Self) -> bool {
        let pairs = [
            (self.kind, other.kind),
            (self.major, other.major),
            (self.minor, other.minor),
        ];
        pairs
            .iter()
            .all(|(one, two)| one.is_none() || two.is_none() || one == two)
    }

    fn fits_everything(&self) -> bool {
        (self.kind, self.major, self.minor, self.access) == (None, None, None, ANY_ACCESS)
    }
}

// Registers, and offsets in `struct bpf_cgroup_dev_ctx`.
const RESULT: u64 = 0;
const CONTEXT: u64 = 1;
const KIND: u64 = 2;
const ACCESS: u64 = 3;
const MAJOR: u64 = 4;
const MINOR: u64 = 5;
const SCRATCH: u64 = 6;

fn instruction(code: u64, destination: u64, source: u64, offset: i16, value: u32) -> u64 {
    code | destination << 8 | source << 12 | u64::from(offset as u16) << 16 | u64::from(value) << 32
}

fn load(destination: u64, offset: i16) -> u64 {
    instruction(0x61, destination, CONTEXT, offset, 0)
}

fn exit_with(allow: bool) -> [u64; 2] {
    [
        instruction(0xb7, RESULT, 0, 0, allow.into()),
        instruction(0x95, 0, 0, 0, 0),
    ]
}

/// The program of rules; none if they allow everything.
pub fn program(rules: &[Rule]) -> Option<Vec<u64>> {
    // What stands before a rule that fits everything never decides.
    let start = rules.iter().rposition(Rule::fits_everything).unwrap_or(0);
    let rules = &rules[start..];
    if rules.first().is_some_and(Rule::fits_everything) && rules.iter().all(|rule| rule.allow) {
        return None;
    }
    let mut program = vec![
        load(KIND, 0),
        // The upper half of the first word is the access, the lower the kind.
        instruction(0xbf, ACCESS, KIND, 0, 0),
        instruction(0x77, ACCESS, 0, 0, 16),
        instruction(0x57, KIND, 0, 0, 0xffff),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        program.extend(rule_program(rule));
    }
    program.extend(exit_with(false));
    Some(program)
}

/// The program that allows everything.
pub fn allow_everything() -> Vec<u64> {
    exit_with(true).to_vec()
}

fn rule_program(rule: &Rule) -> Vec<u64> {
    // Each test is a comparison that leaves the rule; where to is known when its length is.
    let mut tests: Vec<u64> = Vec::new();
    let mut jumps = Vec::new();
    for (register, wanted) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(wanted) = wanted {
            jumps.push(tests.len());
            tests.push(instruction(0x56, register, 0, 0, wanted));
        }
    }
    if rule.access != ANY_ACCESS || !rule.allow {
        tests.push(instruction(0xbf, SCRATCH, ACCESS, 0, 0));
        // Allowed is what asks for nothing else; forbidden is what asks for any of it.
        let (mask, jump) = if rule.allow {
            (ANY_ACCESS & !rule.access, 0x55)
        } else {
            (rule.access, 0x15)
        };
        tests.push(instruction(0x57, SCRATCH, 0, 0, mask));
        jumps.push(tests.len());
        tests.push(instruction(jump, SCRATCH, 0, 0, 0));
    }
    let end = exit_with(rule.allow);
    let length = tests.len() + end.len();
    for jump in jumps {
        tests[jump] |= ((length - jump - 1) as u64) << 16;
    }
    tests.extend(end);
    tests
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program answers, by an interpreter of the instructions that it is made of.
    fn run(program: &Option<Vec<u64>>, kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let Some(program) = program else { return true };
        let context = [kind | access << 16, major, minor];
        let mut registers = [0u64; 11];
        let mut next = 0;
        loop {
            let word = program[next];
            next += 1;
            let (destination, source) = ((word >> 8 & 15) as usize, (word >> 12 & 15) as usize);
            let offset = (word >> 16) as u16 as usize;
            let value = word >> 32;
            match word & 0xff {
                0x61 => registers[destination] = context[offset / 4].into(),
                0xbf => registers[destination] = registers[source],
                0x77 => registers[destination] >>= value,
                0x57 => registers[destination] &= value,
                0xb7 => registers[destination] = value,
                0x56 | 0x55 if registers[destination] != value => next += offset,
                0x15 if registers[destination] == value => next += offset,
                0x56 | 0x55 | 0x15 => {}
                0x95 => return registers[0] != 0,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    /// What rules mean: applied one after the other.
    fn meant(rules: &[Rule], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let fits = |rule: &&Rule| {
            rule.kind.is_none_or(|k| k == kind)
                && rule.major.is_none_or(|m| m == major)
                && rule.minor.is_none_or(|m| m == minor)
                && match rule.allow {
                    true => access & !rule.access == 0,
                    false => access & rule.access != 0,
                }
        };
        rules.iter().rev().find(fits).is_some_and(|rule| rule.allow)
    }

    fn asked(json: &str) -> Vec<Rule> {
        rules(&serde_json::from_str::<Vec<_>>(json).unwrap()).unwrap()
    }

    #[test]
    fn what_is_allowed_in_two_rules_may_be_done_at_once() {
        let read = r#"{"allow":true,"type":"c","major":42,"minor":0,"access":"r"}"#;
        let write = r#"{"allow":true,"type":"c","major":42,"minor":0,"access":"w"}"#;
        let denial = r#"{"allow":false,"access":"rwm"}"#;
        let both = READ | WRITE;
        for (rules, expected) in [
            (format!("[{denial},{read},{write}]"), true),
            (format!("[{read},{denial},{write}]"), false),
            (format!("[{denial},{read}]"), false),
        ] {
            let program = program(&asked(&rules));
            assert_eq!(run(&program, CHARACTER, 42, 0, both), expected, "{rules}");
        }
    }

    #[test]
    fn the_program_means_what_the_rules_mean() {
        for rules in [
            asked("[]"),
            asked(r#"[{"allow":false,"access":"rwm"}]"#),
            asked(
                r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":8,"access":"w"}]"#,
            ),
            asked(
                r#"[{"allow":false},{"allow":true,"type":"c","major":10,"minor":200,"access":"rw"}]"#,
            ),
        ] {
            let program = program(&rules);
            for kind in [BLOCK, CHARACTER] {
                for (major, minor) in [(1, 3), (5, 2), (8, 0), (10, 200), (10, 229), (136, 9)] {
                    for access in 1..8 {
                        assert_eq!(
                            run(&program, kind, major, minor, access),
                            meant(&rules, kind, major, minor, access),
                            "{rules:?}: {kind} {major}:{minor} {access}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn allowing_everything_needs_no_program() {
        assert_eq!(
            program(&asked(r#"[{"allow":false},{"allow":true,"access":"rwm"}]"#)),
            None
        );
        assert!(run(&Some(allow_everything()), BLOCK, 8, 0, ANY_ACCESS));
    }

    #[test]
    fn bad_rules_are_refused() {
        for bad in [
            r#"[{"allow":true,"access":"x"}]"#,
            r#"[{"allow":true,"type":"p"}]"#,
            r#"[{"allow":true,"major":-2}]"#,
        ] {
            assert!(
                rules(&serde_json::from_str::<Vec<_>>(bad).unwrap()).is_err(),
                "{bad}"
            );
        }
    }
}
