//! Checks of the files and programs that a machine is made of.

use std::env;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::{Finding, Verdict};
use crate::config::Config;

/// Where the superblock of an EROFS file system starts, and with what.
const EROFS_OFFSET: u64 = 1024;
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2u32.to_le_bytes();

/// The program that the shim runs, and Debian's package of it.
const MKE2FS: (&str, &str) = ("mke2fs", "e2fsprogs");

/// All checks of files.
pub fn check(config: &Config) -> Vec<Finding> {
    let path = env::var_os("PATH").unwrap_or_default();
    let (program, package) = MKE2FS;
    vec![
        Finding::new("VMM", vmm(&config.vmm)),
        Finding::new("guest kernel", kernel(&config.kernel)),
        Finding::new("guest root image", image(&config.image)),
        Finding::new("layer cache", directory(&config.cache_dir, "cache_dir")),
        Finding::new(
            "scratch disks",
            directory(&config.scratch_dir, "scratch_dir"),
        ),
        Finding::new(program, in_path(program, package, &path)),
    ]
}

/// Whether files without a name can be made in a directory, or where it is going to be made: nothing of a machine can be left
/// behind in them.
fn directory(path: &Path, key: &str) -> Verdict {
    let there = path.ancestors().find(|directory| directory.exists());
    let there = there.unwrap_or(Path::new("/"));
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::open(there, flags, Mode::RUSR | Mode::WUSR) {
        Ok(_) => Verdict::good(path.display().to_string()),
        Err(errno) => Verdict::bad(
            format!(
                "no file without a name (O_TMPFILE) can be made in {}: {errno}",
                there.display()
            ),
            format!("set `{key}` in the configuration to a directory on ext4, XFS, Btrfs or tmpfs"),
        ),
    }
}

/// Opens a file that the key `key` of the configuration names.
fn open(path: &Path, key: &str) -> Result<(File, Metadata), Verdict> {
    let bad = |problem: String| {
        Verdict::bad(
            problem,
            format!("install Bulkhead's files, or set `{key}` in the configuration"),
        )
    };
    let open = || -> io::Result<(File, Metadata)> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        Ok((file, metadata))
    };
    match open() {
        Err(error) => Err(bad(format!("{}: {error}", path.display()))),
        Ok((_, metadata)) if !metadata.is_file() => {
            Err(bad(format!("{} is no regular file", path.display())))
        }
        Ok(opened) => Ok(opened),
    }
}

/// Whether a file starts like an ELF executable for this machine (ELF 64, little-endian, `EM_X86_64`).
fn is_elf(file: &File) -> bool {
    let mut header = [0; 20];
    file.read_exact_at(&mut header, 0).is_ok()
        && header.starts_with(b"\x7fELF\x02\x01")
        && header[18..20] == 62u16.to_le_bytes()
}

fn vmm(path: &Path) -> Verdict {
    let (file, metadata) = match open(path, "vmm") {
        Ok(opened) => opened,
        Err(verdict) => return verdict,
    };
    if !is_elf(&file) {
        return Verdict::bad(
            format!("{} is no executable for x86-64", path.display()),
            "install it again",
        );
    }
    if metadata.permissions().mode() & 0o001 == 0 {
        return Verdict::bad(
            format!(
                "{} may not be executed by the VMM's own user",
                path.display()
            ),
            format!("chmod a+x {}", path.display()),
        );
    }
    Verdict::good(path.display().to_string())
}

fn kernel(path: &Path) -> Verdict {
    match open(path, "kernel") {
        Err(verdict) => verdict,
        Ok((file, _)) if is_elf(&file) => Verdict::good(path.display().to_string()),
        Ok(_) => Verdict::bad(
            format!(
                "{} is no uncompressed kernel (ELF) for x86-64",
                path.display()
            ),
            "install it again; a bzImage does not do",
        ),
    }
}

fn image(path: &Path) -> Verdict {
    let (file, metadata) = match open(path, "image") {
        Ok(opened) => opened,
        Err(verdict) => return verdict,
    };
    let mut magic = [0; 4];
    let read = file.read_exact_at(&mut magic, EROFS_OFFSET);
    if read.is_err() || magic != EROFS_MAGIC {
        return Verdict::bad(
            format!("{} is no EROFS image", path.display()),
            "install it again",
        );
    }
    if metadata.len() % 512 != 0 {
        return Verdict::bad(
            format!(
                "{} has {} bytes, which is no multiple of 512",
                path.display(),
                metadata.len()
            ),
            "install it again",
        );
    }
    Verdict::good(path.display().to_string())
}

/// Finds a program in the directories of `path`.
pub(super) fn find(program: &str, path: &OsStr) -> Option<PathBuf> {
    env::split_paths(path)
        .map(|directory| directory.join(program))
        .find(|candidate| {
            candidate.metadata().is_ok_and(|metadata| {
                metadata.is_file() && metadata.permissions().mode() & 0o111 != 0
            })
        })
}

fn in_path(program: &str, package: &str, path: &OsStr) -> Verdict {
    match find(program, path) {
        Some(found) => Verdict::good(found.display().to_string()),
        None => Verdict::bad(
            format!("{program} is not in PATH"),
            format!("install it (on Debian: apt-get install {package})"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;

    fn problem(verdict: Verdict) -> String {
        match verdict {
            Verdict::Bad { problem, remedy } => format!("{problem}; {}", remedy.unwrap()),
            Verdict::Good(seen) => panic!("good: {seen}"),
        }
    }

    #[test]
    fn good_files_are_good() {
        let directory = tempfile::tempdir().unwrap();
        let this = env::current_exe().unwrap();
        assert!(vmm(&this).is_good());
        assert!(kernel(&this).is_good());
        let path = directory.path().join("image");
        let mut content = vec![0; 4096];
        content[1024..1028].copy_from_slice(&EROFS_MAGIC);
        fs::write(&path, &content).unwrap();
        assert!(image(&path).is_good());
        content.pop();
        fs::write(&path, &content).unwrap();
        assert!(problem(image(&path)).contains("has 4095 bytes"));
    }

    #[test]
    fn bad_files_are_named_with_key_and_cause() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let checks: [fn(&Path) -> Verdict; 3] = [vmm, kernel, image];
        let texts = [
            ("`vmm`", "no executable"),
            ("`kernel`", "bzImage"),
            ("`image`", "no EROFS image"),
        ];
        for (check, (key, cause)) in checks.into_iter().zip(texts) {
            let missing = problem(check(Path::new("/nonexistent/file")));
            assert!(
                missing.contains("/nonexistent/file: No such file") && missing.contains(key),
                "{missing}"
            );
            assert!(problem(check(directory.path())).contains("no regular file"));
            for content in [&b""[..], b"\x7fELF\x01\x01", &[0; 4096]] {
                fs::write(&path, content).unwrap();
                let text = problem(check(&path));
                assert!(text.contains(cause), "{text}");
            }
        }
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(64, 0);
        elf[18] = 62;
        fs::write(&path, elf).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o750)).unwrap();
        assert!(problem(vmm(&path)).contains("chmod a+x"));
    }

    #[test]
    fn a_directory_need_not_be_there_but_its_file_system_must_do() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("not/yet");
        assert!(directory(&path, "cache_dir").is_good());
        assert!(!path.exists());
        let text = problem(directory(Path::new("/proc/layers"), "cache_dir"));
        assert!(
            text.contains("in /proc: ") && text.contains("`cache_dir`"),
            "{text}"
        );
    }

    #[test]
    fn programs_are_found_or_their_package_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = env::join_paths(["/nonexistent".as_ref(), directory.path()]).unwrap();
        let program = directory.path().join("mke2fs");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o644)).unwrap();
        assert!(problem(in_path("mke2fs", "e2fsprogs", &path)).contains("install e2fsprogs"));
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        assert!(in_path("mke2fs", "e2fsprogs", &path).is_good());
        assert!(find("mke2fs", OsStr::new("")).is_none());
    }
}
