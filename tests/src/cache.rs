//! What is built once and kept: directories below `${BULKHEAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bulkhead}`, each
//! named by a hash of everything that it was made from.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};

/// How many versions of one thing are kept: enough to switch between branches.
const VERSIONS: usize = 3;

/// The cache directory; it exists.
pub fn root() -> Result<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let root = if let Some(cache) = set("BULKHEAD_CACHE") {
        PathBuf::from(cache)
    } else if let Some(cache) = set("XDG_CACHE_HOME") {
        Path::new(&cache).join("bulkhead")
    } else if let Some(home) = set("HOME") {
        Path::new(&home).join(".cache/bulkhead")
    } else {
        return Err(Error::Unfit(
            "no cache directory: set BULKHEAD_CACHE, XDG_CACHE_HOME or HOME".into(),
        ));
    };
    directory(root)
}

/// A directory of the cache that is not named by a hash, such as `log`; it exists.
pub fn subdirectory(name: &str) -> Result<PathBuf> {
    directory(root()?.join(name))
}

fn directory(path: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&path).or_cannot(format!("create {}", path.display()))?;
    Ok(path)
}

/// Takes the lock file `path`, waiting for whoever has it. The lock lasts as long as the file is open.
pub fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).or_cannot(format!("create {}", path.display()))?;
    let mut locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
    if locked == Err(Errno::WOULDBLOCK) {
        eprintln!("waiting for whoever holds {}", path.display());
        locked = flock(&file, FlockOperation::LockExclusive);
    }
    locked.or_cannot(format!("lock {}", path.display()))?;
    Ok(file)
}

/// Returns the entry of `kind` that `inputs` lead to. If it is not there yet, `build` makes it in a directory that gets
/// its name only when it is complete: a build that was killed leaves nothing that could be taken for a result.
pub fn entry(
    kind: &str,
    inputs: &[&str],
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let directory = subdirectory(kind)?;
    let entry = directory.join(key(inputs));
    if entry.exists() {
        return Ok(entry);
    }
    let _lock = lock(&directory.join("lock"))?;
    if entry.exists() {
        return Ok(entry);
    }
    let building = directory.join("building");
    if building.exists() {
        fs::remove_dir_all(&building).or_cannot(format!("remove {}", building.display()))?;
    }
    fs::create_dir(&building).or_cannot(format!("create {}", building.display()))?;
    build(&building)?;
    fs::rename(&building, &entry).or_cannot(format!("rename to {}", entry.display()))?;
    evict(&directory)?;
    Ok(entry)
}

/// The name of the entry that is made from `inputs`.
fn key(inputs: &[&str]) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update((input.len() as u64).to_le_bytes());
        hash.update(input);
    }
    let hex = format!("{:x}", hash.finalize());
    hex[..16].to_owned()
}

/// Removes all but the newest entries. Whoever uses an older one has its files open.
fn evict(directory: &Path) -> Result<()> {
    let reading = || format!("read {}", directory.display());
    let mut entries: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(directory).or_cannot(reading())? {
        let entry = entry.or_cannot(reading())?;
        let metadata = entry.metadata().or_cannot(reading())?;
        if metadata.is_dir() {
            entries.push((metadata.modified().or_cannot(reading())?, entry.path()));
        }
    }
    entries.sort();
    let surplus = entries.len().saturating_sub(VERSIONS);
    for (_, path) in &entries[..surplus] {
        fs::remove_dir_all(path).or_cannot(format!("remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_do_not_run_into_each_other() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_eq!(key(&[]).len(), 16);
    }

    #[test]
    fn only_the_newest_versions_stay() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c", "d", "e"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        fs::write(directory.path().join("lock"), "").unwrap();
        evict(directory.path()).unwrap();
        let left = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, VERSIONS + 1);
    }
}
