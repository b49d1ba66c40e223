//! Moments in the life of a microVM, as files tell of them.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

pub use rustix::fs::inotify::WatchFlags;

use crate::error::{Context, Error, Result};

/// How long an occasion may take to come, on an emulated node.
const LIMIT: Duration = Duration::from_secs(120);

/// Something that is about to happen to a file, or to one in a directory.
#[derive(Debug)]
pub struct Occasion {
    names: OwnedFd,
    path: PathBuf,
}

impl Occasion {
    /// Watches a file or a directory from now on.
    pub fn watch(path: &Path, flags: WatchFlags) -> Result<Self> {
        let names = inotify::init(inotify::CreateFlags::CLOEXEC).or_cannot("watch a file")?;
        inotify::add_watch(&names, path, flags).or_cannot(format!("watch {}", path.display()))?;
        Ok(Self {
            names,
            path: path.to_owned(),
        })
    }

    /// Waits until it happens: to the file, or to one in the directory whose name begins with `name`.
    pub fn wait(self, name: &str) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left)
                .map_err(|_| Error::Unfit("a time limit that no clock can tell".into()))?;
            let mut waits = [PollFd::new(&self.names, PollFlags::IN)];
            if poll(&mut waits, Some(&left)).or_cannot("wait for a file")? == 0 {
                return Err(Error::Unfit(format!(
                    "nothing happened to {} {name:?} within {} s",
                    self.path.display(),
                    LIMIT.as_secs()
                )));
            }
            let mut reader = inotify::Reader::new(&self.names, &mut buffer);
            loop {
                let event = reader.next().or_cannot("read what happened to a file")?;
                let found = event.file_name().map_or(&b""[..], |name| name.to_bytes());
                if found.starts_with(name.as_bytes()) {
                    return Ok(());
                }
                if reader.is_buffer_empty() {
                    break;
                }
            }
        }
    }
}
