//! Finds the program of a process and tells beforehand why it could not run, in the words that container tools look for.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, stat};
use rustix::io::Errno;

use crate::error::Error;

/// How many interpreters may stand behind each other, as in the kernel.
const MAX_INTERPRETERS: usize = 4;

/// The path of a program, from its name and the environment that it will have.
pub fn find(name: &CStr, environment: &[CString]) -> Result<CString, Error> {
    let failed =
        |cause: &str| Error::Failed(format!("exec: {:?}: {cause}", name.to_string_lossy()));
    let path = Path::new(OsStr::from_bytes(name.to_bytes()));
    if name.to_bytes().contains(&b'/') {
        return match check(path) {
            Ok(()) => Ok(name.to_owned()),
            Err(Errno::ACCESS) => Err(failed("permission denied")),
            Err(errno) => Err(failed(&format!(
                "stat {}: {}",
                path.display(),
                words(errno)
            ))),
        };
    }
    let directories = environment
        .iter()
        .find_map(|variable| variable.to_bytes().strip_prefix(b"PATH="))
        .unwrap_or_default();
    for directory in directories.split(|&byte| byte == b':') {
        let directory = if directory.is_empty() {
            b"."
        } else {
            directory
        };
        let candidate = Path::new(OsStr::from_bytes(directory)).join(path);
        if !path.as_os_str().is_empty()
            && check(&candidate).is_ok()
            && let Ok(found) = CString::new(candidate.into_os_string().as_bytes())
        {
            return Ok(found);
        }
    }
    Err(failed("executable file not found in $PATH"))
}

/// Whether a file may be run by this process.
fn check(path: &Path) -> Result<(), Errno> {
    let mode = stat(path)?.st_mode;
    if FileType::from_raw_mode(mode) != FileType::RegularFile || mode & 0o111 == 0 {
        return Err(Errno::ACCESS);
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

fn words(errno: Errno) -> String {
    match errno {
        Errno::NOENT => "no such file or directory".into(),
        Errno::NOTDIR => "not a directory".into(),
        other => other.to_string(),
    }
}

/// Refuses a program that this machine cannot run, following a script to its interpreter. A file that may be run but not be read
/// is left to the kernel.
pub fn check_format(program: &CStr) -> Result<(), Error> {
    let mut path = PathBuf::from(OsStr::from_bytes(program.to_bytes()));
    for _ in 0..=MAX_INTERPRETERS {
        let mut head = Vec::new();
        let Ok(file) = File::open(&path) else {
            return Ok(());
        };
        if file.take(256).read_to_end(&mut head).is_err() {
            return Ok(());
        }
        match Format::of(&head) {
            Format::Native | Format::Unknown => return Ok(()),
            Format::Foreign(machine) => {
                return Err(Error::Failed(format!(
                    "exec {}: exec format error: it is a program for {machine}, and this machine runs x86_64: use the image for linux/amd64",
                    path.display()
                )));
            }
            Format::Script(interpreter) => {
                if let Err(errno) = check(&interpreter) {
                    return Err(Error::Failed(format!(
                        "exec {}: its interpreter {}: {}",
                        path.display(),
                        interpreter.display(),
                        words(errno)
                    )));
                }
                path = interpreter;
            }
        }
    }
    Ok(())
}

/// What the first bytes of a file tell.
#[derive(Debug, PartialEq, Eq)]
enum Format {
    Native,
    Foreign(String),
    Script(PathBuf),
    Unknown,
}

impl Format {
    fn of(head: &[u8]) -> Self {
        if let Some(line) = head.strip_prefix(b"#!") {
            let line = line.split(|&byte| byte == b'\n').next().unwrap_or_default();
            let line = line.trim_ascii_start();
            let end = line.iter().position(|&byte| byte == b' ' || byte == b'\t');
            let interpreter = &line[..end.unwrap_or(line.len())];
            return Self::Script(OsStr::from_bytes(interpreter).into());
        }
        // ELF: magic number, at 5 the byte order, at 18 the machine.
        let Some(machine) = head.strip_prefix(b"\x7fELF").and(head.get(18..20)) else {
            return Self::Unknown;
        };
        let machine = match head[5] {
            2 => u16::from_be_bytes([machine[0], machine[1]]),
            _ => u16::from_le_bytes([machine[0], machine[1]]),
        };
        match machine {
            3 | 62 => Self::Native,
            8 => Self::Foreign("mips".into()),
            20 => Self::Foreign("ppc".into()),
            21 => Self::Foreign("ppc64".into()),
            22 => Self::Foreign("s390x".into()),
            40 => Self::Foreign("arm".into()),
            183 => Self::Foreign("aarch64".into()),
            243 => Self::Foreign("riscv".into()),
            258 => Self::Foreign("loongarch".into()),
            other => Self::Foreign(format!("ELF machine {other}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(order: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut head = b"\x7fELF\x02\x00".to_vec();
        head[5] = order;
        head.resize(18, 0);
        head.extend(machine);
        head
    }

    #[test]
    fn formats_are_told_apart() {
        assert_eq!(Format::of(&elf(1, [62, 0])), Format::Native);
        assert_eq!(Format::of(&elf(1, [3, 0])), Format::Native);
        assert_eq!(
            Format::of(&elf(1, [183, 0])),
            Format::Foreign("aarch64".into())
        );
        assert_eq!(
            Format::of(&elf(2, [0, 22])),
            Format::Foreign("s390x".into())
        );
        assert_eq!(
            Format::of(b"#! /bin/sh -e\n"),
            Format::Script("/bin/sh".into())
        );
        assert_eq!(Format::of(b"\x7fELF"), Format::Unknown);
        assert_eq!(Format::of(b""), Format::Unknown);
    }

    #[test]
    fn a_program_is_found_as_container_tools_expect() {
        let path = [c"PATH=/nowhere:/bin".to_owned()];
        assert_eq!(find(c"sh", &path), Ok(c"/bin/sh".to_owned()));
        let cases = [
            (
                c"no-such-program",
                r#"exec: "no-such-program": executable file not found in $PATH"#,
            ),
            (c"", r#"exec: "": executable file not found in $PATH"#),
            (
                c"/none",
                r#"exec: "/none": stat /none: no such file or directory"#,
            ),
            (c"/etc/passwd", r#"exec: "/etc/passwd": permission denied"#),
            (c"/etc", r#"exec: "/etc": permission denied"#),
        ];
        for (name, message) in cases {
            assert_eq!(find(name, &path), Err(Error::Failed(message.into())));
        }
    }

    #[test]
    fn a_script_without_its_interpreter_is_refused() {
        let path = std::env::temp_dir().join(format!("script-{}", std::process::id()));
        std::fs::write(&path, "#!/no/such/interpreter -x\n").unwrap();
        let program = CString::new(path.as_os_str().as_bytes()).unwrap();
        let error = check_format(&program).unwrap_err().to_string();
        assert!(
            error.contains("/no/such/interpreter: no such file"),
            "{error}"
        );
        std::fs::remove_file(path).unwrap();
    }
}
