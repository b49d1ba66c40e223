//! Keeps a container that has reached its memory limit from reading its programs again and again.
//!
//! The kernel charges the page of a file to the group that reads it first. On a host that is often whoever unpacked the image, in a guest
//! always the container. At its limit the kernel takes away what it can, at last the pages of the running programs, whose next instruction
//! reads them again. While that succeeds the kernel does not call its out-of-memory killer, and the container neither goes on nor ends.
//! So the agent reads them: then they are charged to the machine, and the limit is for what the container itself needs.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cgroup::{self, Cgroup};
use crate::error::{Context, Error};
use crate::sys;

/// How many page faults must have read from a disk before the programs are read for the first time. Each later time takes as many
/// more, so that programs which do not fit into the machine's memory either are soon left alone.
const FAULTS: u64 = 64;

/// What has been done for a container.
#[derive(Debug, Default)]
pub struct Programs {
    reads: u64,
    next: Option<u64>,
}

impl Programs {
    /// Reads a container's programs, if page faults have read much since the last time. To be called when it has come up against its limit.
    pub async fn keep(&mut self, cgroup: &Cgroup) -> Result<(), Error> {
        let statistics = cgroup.read("memory.stat");
        let statistics = statistics.context(|| "reading what a container's memory is".into())?;
        let faults = cgroup::value(&statistics, "pgmajfault").unwrap_or(0);
        if faults < *self.next.get_or_insert(faults + FAULTS) {
            return Ok(());
        }
        self.reads += 1;
        self.next = Some(faults + FAULTS * (self.reads + 1));
        read(&cgroup.processes()?).await
    }
}

/// Reads the programs of these processes. Whatever they do with their memory, only a helper waits for them.
async fn read(processes: &[u32]) -> Result<(), Error> {
    let what = || "reading the programs of a container".to_owned();
    let helper = sys::start_helper(|| {
        // Before anything of a container's.
        drop(fs::write("/proc/self/oom_score_adj", "1000"));
        let mut reader = Reader::new(room());
        for &pid in processes {
            // A process that has ended meanwhile does not need its program.
            drop(reader.read(pid));
        }
    });
    let helper = helper.and_then(|helper| sys::asynchronous(helper, Interest::READABLE));
    let helper = Helper(helper.context(what)?);
    helper.0.readable().await.context(what).map(drop)
}

/// A helper that is of no use when nobody waits for it.
struct Helper(AsyncFd<OwnedFd>);

impl Drop for Helper {
    fn drop(&mut self) {
        // Mostly it has ended.
        drop(sys::send_signal(self.0.as_fd(), libc::SIGKILL));
    }
}

/// How many bytes may be read: half of what the machine can spare.
fn room() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut available = text
        .lines()
        .filter_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = available
        .next()
        .and_then(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024 / 2
}

/// Reads programs of processes.
struct Reader {
    known: HashSet<File>,
    /// How many bytes of programs may still be read.
    room: u64,
    /// How many bytes of the processes' lists of mappings may still be read: they can be as long as the processes like.
    text: u64,
}

/// As much of a list of mappings as is looked at; 100 libraries have a tenth.
const MAX_MAPS: u64 = 1 << 20;

impl Reader {
    fn new(room: u64) -> Self {
        Self {
            known: HashSet::new(),
            room,
            text: 16 * MAX_MAPS,
        }
    }

    fn read(&mut self, pid: u32) -> io::Result<()> {
        let mut maps = Vec::new();
        let file = fs::File::open(format!("/proc/{pid}/maps"))?;
        self.text -= file.take(MAX_MAPS.min(self.text)).read_to_end(&mut maps)? as u64;
        let maps = String::from_utf8_lossy(&maps);
        let maps: Vec<_> = maps.lines().filter_map(Mapping::parse).collect();
        let programs = maps.iter().filter(|mapping| mapping.executable);
        let programs: HashSet<_> = programs.map(|mapping| mapping.file).collect();
        let new = &programs - &self.known;
        if new.is_empty() {
            return Ok(());
        }
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        // With their constants and what their data was at first, which are mapped beside their code.
        for Mapping { range, file, .. } in maps {
            let length = range.end.saturating_sub(range.start).min(self.room);
            if length > 0 && new.contains(&file) {
                self.room -= length;
                sys::read_ahead(process.as_fd(), range.start..range.start + length)?;
            }
        }
        self.known.extend(new);
        Ok(())
    }
}

/// A file: the device of its file system, as /proc writes it, and its number there.
type File = (u32, u32, u64);

/// A part of a process's memory that is a file.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    range: Range<u64>,
    executable: bool,
    file: File,
}

impl Mapping {
    /// Reads a line of `/proc/PID/maps`: `5581c000-5582d000 r-xp 00003000 fe:01 4711    /bin/sh`.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let executable = words.next()?.contains('x');
        let (major, minor) = words.nth(1)?.split_once(':')?;
        let inode = words.next()?.parse().ok().filter(|&inode| inode != 0)?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        let address = |text| u64::from_str_radix(text, 16).ok();
        Some(Self {
            range: address(start)?..address(end)?,
            executable,
            file: (number(major)?, number(minor)?, inode),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_files_are_found() {
        let line = "7f01000-7f03000 r-xp 00003000 fe:1f 4711                   /lib/a b (deleted)";
        let expected = Mapping {
            range: 0x7f0_1000..0x7f0_3000,
            executable: true,
            file: (0xfe, 0x1f, 4711),
        };
        assert_eq!(Mapping::parse(line), Some(expected));
        let data = "7f03000-7f04000 rw-p 00005000 fe:1f 4711 /lib/a";
        assert!(!Mapping::parse(data).unwrap().executable);
        for other in [
            "7ffd000-7ffe000 rw-p 00000000 00:00 0                          [stack]",
            "7ffd000 r-xp 0 0:0 1",
            "",
        ] {
            assert_eq!(Mapping::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_program_is_read_once() {
        let room = room();
        let mut reader = Reader::new(room);
        reader.read(std::process::id()).unwrap();
        let left = reader.room;
        assert!(left < room, "{left} of {room}");
        reader.read(std::process::id()).unwrap();
        assert_eq!(reader.room, left);
        assert!(reader.read(u32::MAX).is_err());
    }
}
