//! Compiles tables of allowed calls to the classic BPF program that the kernel runs before each system call.
//!
//! The calls are searched by halves, not one after the other. That is not for the sake of each call, most of which the kernel
//! answers from a cache, but for the start: to fill the cache, the kernel runs the program for every call that there is.

use std::collections::BTreeMap;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, sock_filter,
};

use super::rules::{Call, Check, Form};

/// The only architecture whose calls are allowed, as the kernel's audit names it: a 32-bit call's number means something else.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Offsets in what the program looks at (`struct seccomp_data`).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// A jump would be too long for its instruction, which has a byte for the distance. (With that, no program is too long for the
/// kernel, which takes 4,096 instructions.)
#[derive(Debug, thiserror::Error)]
#[error("a jump over {0} instructions is too long: there are too many calls or forms")]
pub struct TooLong(usize);

/// What becomes of a call.
#[derive(Debug)]
enum Verdict {
    Allow,
    /// It fails with this error.
    Fail(i32),
    /// It is allowed in any of these forms.
    AllowIf(Vec<Form>),
}

/// Makes a program that allows the calls of some tables and kills the process for any other.
///
/// A call that is in several tables is allowed in each of its forms. The C library starts threads by clone3, whose flags lie
/// in memory that no program can read; told that there is no such call, it falls back to clone, whose flags can be checked.
///
/// # Errors
///
/// The tables are too large.
pub fn program(tables: &[&[Call]]) -> Result<Vec<sock_filter>, TooLong> {
    let mut calls: BTreeMap<u32, Verdict> = BTreeMap::new();
    for &(number, forms) in tables.iter().copied().flatten() {
        let verdict = calls
            .entry(number as u32)
            .or_insert_with(|| Verdict::AllowIf(Vec::new()));
        match verdict {
            Verdict::AllowIf(known) if !forms.is_empty() => known.extend(forms),
            _ => *verdict = Verdict::Allow,
        }
        if number == libc::SYS_clone {
            calls.insert(libc::SYS_clone3 as u32, Verdict::Fail(libc::ENOSYS));
        }
    }
    let calls: Vec<_> = calls.into_iter().collect();
    let mut program = vec![
        load(ARCHITECTURE),
        jump(BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0),
        give(SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
    ];
    program.extend(search(&calls)?);
    Ok(program)
}

/// Finds the call whose number is loaded, and gives its verdict.
fn search(calls: &[(u32, Verdict)]) -> Result<Vec<sock_filter>, TooLong> {
    match calls {
        [] => Ok(vec![give(SECCOMP_RET_KILL_PROCESS)]),
        [(number, verdict)] => {
            let judgement = judge(verdict)?;
            let over = distance(judgement.len())?;
            let mut program = vec![jump(BPF_JEQ, *number, 0, over)];
            program.extend(judgement);
            program.push(give(SECCOMP_RET_KILL_PROCESS));
            Ok(program)
        }
        calls => {
            let (low, high) = calls.split_at(calls.len() / 2);
            let low = search(low)?;
            let mut program = vec![jump(BPF_JGE, high[0].0, distance(low.len())?, 0)];
            program.extend(low);
            program.extend(search(high)?);
            Ok(program)
        }
    }
}

/// Gives a verdict. Behind it lies the instruction that kills.
fn judge(verdict: &Verdict) -> Result<Vec<sock_filter>, TooLong> {
    match verdict {
        Verdict::Allow => Ok(vec![give(SECCOMP_RET_ALLOW)]),
        Verdict::Fail(error) => Ok(vec![give(SECCOMP_RET_ERRNO | *error as u32)]),
        Verdict::AllowIf(forms) => {
            let mut program = Vec::new();
            for form in forms {
                program.extend(allow_if(form)?);
            }
            Ok(program)
        }
    }
}

/// Allows a call in one form, or goes on behind itself.
fn allow_if(form: Form) -> Result<Vec<sock_filter>, TooLong> {
    let mut program = vec![give(SECCOMP_RET_ALLOW)];
    for check in form.iter().rev() {
        let (argument, mask, value) = match *check {
            Check::Is(argument, value) => (argument, u32::MAX, value),
            Check::Lacks(argument, bits) => (argument, bits, 0),
            Check::Has(argument, bits) => (argument, bits, bits),
        };
        let over = distance(program.len())?;
        let check = [
            // The lower half of the argument, which comes first.
            load(ARGUMENTS + 8 * u32::from(argument)),
            statement(BPF_ALU | BPF_AND | BPF_K, mask),
            jump(BPF_JEQ, value, 0, over),
        ];
        program.splice(..0, check);
    }
    Ok(program)
}

fn distance(instructions: usize) -> Result<u8, TooLong> {
    u8::try_from(instructions).map_err(|_| TooLong(instructions))
}

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn give(verdict: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, verdict)
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Jumps over `jt` instructions if the loaded value compares to `k`, else over `jf`.
fn jump(comparison: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter {
        code: (BPF_JMP | comparison | BPF_K) as u16,
        jt,
        jf,
        k,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: u32 = SECCOMP_RET_ALLOW;
    const KILLED: u32 = SECCOMP_RET_KILL_PROCESS;

    /// Runs a program as the kernel does, and counts its steps.
    fn run(
        program: &[sock_filter],
        architecture: u32,
        number: u32,
        arguments: [u32; 6],
    ) -> (u32, usize) {
        let (mut at, mut accumulator) = (0, 0);
        for steps in 1.. {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let taken = |condition| usize::from(if condition { jt } else { jf });
            match u32::from(code) {
                0x20 => {
                    accumulator = match k {
                        0 => number,
                        4 => architecture,
                        _ => arguments[(k as usize - 16) / 8],
                    }
                }
                0x15 => at += taken(accumulator == k),
                0x35 => at += taken(accumulator >= k),
                0x54 => accumulator &= k,
                0x06 => return (k, steps),
                code => panic!("unknown instruction {code:#x}"),
            }
        }
        unreachable!("a program ends")
    }

    fn verdict(tables: &[&[Call]], number: u32, arguments: [u32; 6]) -> u32 {
        run(
            &program(tables).unwrap(),
            AUDIT_ARCH_X86_64,
            number,
            arguments,
        )
        .0
    }

    #[test]
    fn every_call_gets_its_verdict_and_no_other_is_allowed() {
        for size in 0..40 {
            let table: Vec<Call> = (0..size)
                .map(|index| (3 + 7 * index, &[] as &[Form]))
                .collect();
            for number in (0..320).chain([0x4000_0003, u32::MAX]) {
                let listed = table.iter().any(|(call, _)| *call as u32 == number);
                let wanted = if listed { ALLOWED } else { KILLED };
                assert_eq!(
                    verdict(&[&table], number, [0; 6]),
                    wanted,
                    "{number} of {size}"
                );
            }
        }
    }

    #[test]
    fn forms_are_alternatives_of_conditions_that_all_hold() {
        const FORMS: &[Form] = &[
            &[Check::Is(0, 5), Check::Lacks(1, 0b100)],
            &[Check::Has(1, 0b11)],
        ];
        let table: &[Call] = &[(9, FORMS)];
        for (arguments, wanted) in [
            ([5, 0], ALLOWED),
            ([5, 0b001], ALLOWED),
            ([5, 0b100], KILLED),
            ([4, 0], KILLED),
            ([4, 0b11], ALLOWED),
            ([4, 0b111], ALLOWED),
            ([4, 0b10], KILLED),
        ] {
            let [a, b] = arguments;
            assert_eq!(
                verdict(&[table], 9, [a, b, 0, 0, 0, 0]),
                wanted,
                "{arguments:?}"
            );
        }
    }

    #[test]
    fn a_call_in_several_tables_has_all_its_forms() {
        const ONE: &[Call] = &[
            (1, &[&[Check::Is(0, 1)]]),
            (2, &[&[Check::Is(0, 1)]]),
            (3, &[]),
        ];
        const TWO: &[Call] = &[
            (1, &[&[Check::Is(0, 2)]]),
            (2, &[]),
            (3, &[&[Check::Is(0, 2)]]),
        ];
        let allowed =
            |number, argument| verdict(&[ONE, TWO], number, [argument, 0, 0, 0, 0, 0]) == ALLOWED;
        assert_eq!(
            [allowed(1, 1), allowed(1, 2), allowed(1, 3)],
            [true, true, false]
        );
        assert_eq!([allowed(2, 1), allowed(2, 2), allowed(2, 3)], [true; 3]);
        assert_eq!([allowed(3, 1), allowed(3, 2), allowed(3, 3)], [true; 3]);
    }

    #[test]
    fn calls_of_other_architectures_are_killed() {
        let program = program(&[&[(3, &[])]]).unwrap();
        const AUDIT_ARCH_I386: u32 = 0x4000_0003;
        assert_eq!(run(&program, AUDIT_ARCH_I386, 3, [0; 6]).0, KILLED);
    }

    #[test]
    fn no_search_is_long() {
        let table: Vec<Call> = (100..164).map(|number| (number, &[] as &[Form])).collect();
        let program = program(&[&table]).unwrap();
        for number in 0..500 {
            let (_, steps) = run(&program, AUDIT_ARCH_X86_64, number, [0; 6]);
            assert!(steps <= 3 + 6 + 2, "{number}: {steps}");
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let table: Vec<Call> = (0..3000).map(|number| (number, &[] as &[Form])).collect();
        assert!(program(&[&table]).is_err());
        let forms: Vec<Form> = vec![&[Check::Is(0, 1)]; 100];
        let table: &[Call] = &[(1, forms.leak())];
        assert!(program(&[table]).is_err());
    }
}
