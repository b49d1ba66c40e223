//! A directory for one run, which disappears with it: at its end, or, if the process was killed, when the next one starts.

use std::fs::{self, File};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use crate::cache;
use crate::error::{Context, Result};

/// A directory of this process alone.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
    /// Held as long as the directory is in use.
    _lock: File,
}

impl Scratch {
    /// Makes a directory below the cache's `run`, and removes those whose owner is gone.
    pub fn new() -> Result<Self> {
        let parent = cache::subdirectory("run")?;
        let _alone = cache::lock(&parent.join("lock"))?;
        let reading = || format!("read {}", parent.display());
        for entry in fs::read_dir(&parent).or_cannot(reading())? {
            let path = entry.or_cannot(reading())?.path();
            if path.is_dir() && abandoned(&path) {
                fs::remove_dir_all(&path).or_cannot(format!("remove {}", path.display()))?;
            }
        }
        let directory = TempDir::new_in(&parent)
            .or_cannot(format!("create a directory in {}", parent.display()))?;
        let lock = cache::lock(&directory.path().join("lock"))?;
        Ok(Self {
            directory,
            _lock: lock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

fn abandoned(directory: &Path) -> bool {
    File::open(directory.join("lock"))
        .is_ok_and(|lock| flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok())
}
