use super::*;

/// What a program returns for a call: an interpreter of the instructions that the compiler uses.
fn run(filter: &Filter, architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(architecture.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    for argument in arguments {
        data.extend(argument.to_le_bytes());
    }
    let (mut accumulator, mut next) = (0, 0);
    loop {
        let instruction = filter.program[next];
        next += 1;
        let code = u32::from(instruction.code);
        let k = instruction.k;
        let class = code & 7;
        let taken = |yes| usize::from(if yes { instruction.jt } else { instruction.jf });
        match (class, code & 0xf0) {
            (libc::BPF_RET, _) => return k,
            (libc::BPF_LD, _) => {
                let at = k as usize;
                accumulator = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            }
            (libc::BPF_ALU, libc::BPF_AND) => accumulator &= k,
            (libc::BPF_JMP, libc::BPF_JA) => next += k as usize,
            (libc::BPF_JMP, libc::BPF_JEQ) => next += taken(accumulator == k),
            (libc::BPF_JMP, libc::BPF_JGT) => next += taken(accumulator > k),
            (libc::BPF_JMP, libc::BPF_JGE) => next += taken(accumulator >= k),
            _ => panic!("instruction {code:#x}"),
        }
    }
}

fn compile(json: &str) -> Filter {
    Filter::compile(&serde_json::from_str(json).unwrap()).unwrap()
}

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;

#[test]
fn every_call_gets_its_decision() {
    // Every third name is allowed, so that the tree has as many leaves as it ever will.
    let names: Vec<_> = native_calls().step_by(3).map(|(_, name)| name).collect();
    let json = serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
    });
    let filter = compile(&json.to_string());
    for (architecture, calls) in [
        (AUDIT_ARCH_X86_64, native_calls().collect::<Vec<_>>()),
        (AUDIT_ARCH_I386, compatible_calls().collect()),
    ] {
        let known = calls.iter().filter(|(_, name)| names.contains(name));
        let last = known.map(|&(number, _)| number).max().unwrap();
        for (number, name) in calls {
            let expected = if names.contains(&name) {
                ALLOW
            } else if number > last {
                RETURN_NO_SUCH_CALL
            } else {
                EPERM
            };
            if matches!(name, "socketcall" | "ipc") && expected != ALLOW {
                continue;
            }
            assert_eq!(
                run(&filter, architecture, number, [0; 6]),
                expected,
                "{name}"
            );
        }
        assert_eq!(
            run(&filter, architecture, 100_000, [0; 6]),
            RETURN_NO_SUCH_CALL
        );
    }
    assert_eq!(run(&filter, 0xc000_00b7, 0, [0; 6]), RETURN_KILL_THREAD);
    assert_eq!(
        run(&filter, AUDIT_ARCH_X86_64, X32_BIT, [0; 6]),
        RETURN_KILL_THREAD
    );
}

#[test]
fn architectures_that_are_not_listed_are_closed() {
    let filter = compile(r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X32"]}"#);
    assert_eq!(run(&filter, AUDIT_ARCH_X86_64, 1, [0; 6]), ALLOW);
    assert_eq!(run(&filter, AUDIT_ARCH_X86_64, 100_000, [0; 6]), ALLOW);
    assert_eq!(run(&filter, AUDIT_ARCH_I386, 1, [0; 6]), RETURN_KILL_THREAD);
    assert_eq!(
        run(&filter, AUDIT_ARCH_X86_64, X32_BIT | 1, [0; 6]),
        RETURN_NO_SUCH_CALL
    );
}

#[test]
fn every_comparison_works_on_all_64_bits() {
    let edges = [
        0,
        1,
        5,
        6,
        7,
        0xffff_ffff,
        1 << 32,
        (1 << 32) + 5,
        (1 << 32) + 6,
        (1 << 32) + 7,
        2 << 32,
        u64::MAX,
    ];
    type Holds = fn(u64, u64) -> bool;
    let comparisons: [(&str, Holds); 6] = [
        ("SCMP_CMP_EQ", |a, b| a == b),
        ("SCMP_CMP_NE", |a, b| a != b),
        ("SCMP_CMP_LT", |a, b| a < b),
        ("SCMP_CMP_LE", |a, b| a <= b),
        ("SCMP_CMP_GE", |a, b| a >= b),
        ("SCMP_CMP_GT", |a, b| a > b),
    ];
    for (name, holds) in comparisons {
        for value in edges {
            let json = serde_json::json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [{"names": ["write"], "action": "SCMP_ACT_ALLOW",
                              "args": [{"index": 3, "value": value, "op": name}]}],
            });
            let filter = compile(&json.to_string());
            for argument in edges {
                let arguments = [9, 9, 9, argument, 9, 9];
                let expected = if holds(argument, value) { ALLOW } else { EPERM };
                let given = run(&filter, AUDIT_ARCH_X86_64, 1, arguments);
                assert_eq!(given, expected, "{argument:#x} {name} {value:#x}");
            }
        }
    }
}

#[test]
fn a_masked_comparison_takes_mask_then_value() {
    // As container engines allow clone: without any of the bits that make namespaces.
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["clone"],"action":"SCMP_ACT_ALLOW",
        "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
    );
    let clone = |flags| run(&filter, AUDIT_ARCH_X86_64, 56, [flags, 0, 0, 0, 0, 0]);
    assert_eq!(clone(17), ALLOW);
    assert_eq!(clone(0x1000_0000), EPERM);
}

#[test]
fn conditions_on_one_argument_are_alternatives_and_on_several_are_not() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
        {"names":["personality"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
        {"names":["socket"],"action":"SCMP_ACT_ERRNO","errnoRet":97,"args":[{"index":0,"value":16,"op":"SCMP_CMP_EQ"},{"index":2,"value":9,"op":"SCMP_CMP_EQ"}]},
        {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":40,"op":"SCMP_CMP_NE"}]}]}"#,
    );
    let call = |number, a, c| run(&filter, AUDIT_ARCH_X86_64, number, [a, 0, c, 0, 0, 0]);
    assert_eq!(call(135, 0, 0), ALLOW);
    assert_eq!(call(135, 8, 0), ALLOW);
    assert_eq!(call(135, 9, 0), EPERM);
    assert_eq!(call(41, 16, 9), 0x0005_0000 | 97);
    assert_eq!(call(41, 16, 8), ALLOW);
    assert_eq!(call(41, 40, 0), EPERM);
}

#[test]
fn a_rule_without_conditions_beats_those_with() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
        {"names":["clone"],"action":"SCMP_ACT_ERRNO","errnoRet":38,"args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
        {"names":["clone"],"action":"SCMP_ACT_ALLOW"}]}"#,
    );
    assert_eq!(
        run(&filter, AUDIT_ARCH_X86_64, 56, [1, 0, 0, 0, 0, 0]),
        ALLOW
    );
}

#[test]
fn multiplexed_calls_follow_the_rule_of_the_call() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"syscalls":[
        {"names":["bind","shmat"],"action":"SCMP_ACT_ERRNO"}]}"#,
    );
    let call = |number, which| run(&filter, AUDIT_ARCH_I386, number, [which, 0, 0, 0, 0, 0]);
    assert_eq!(call(102, 2), EPERM, "socketcall(SYS_BIND)");
    assert_eq!(call(102, 3), ALLOW, "socketcall(SYS_CONNECT)");
    assert_eq!(call(117, 21), EPERM, "ipc(SHMAT)");
    assert_eq!(call(117, 23), ALLOW, "ipc(SHMGET)");
}

#[test]
fn what_cannot_be_done_is_refused() {
    for bad in [
        r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_KILL","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":65536}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#,
    ] {
        let profile = serde_json::from_str(bad).unwrap();
        assert!(
            matches!(Filter::compile(&profile), Err(Error::InvalidArgument(_))),
            "{bad}"
        );
    }
}
