//! The containers' writable layers on the scratch disk.
//!
//! A layer may hold any number of files, so it is never removed by the agent itself, or while anyone waits: it is moved aside, and a process of
//! its own removes it when another container may need the room.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::agent::Paths;
use crate::error::{Context, Error};
use crate::sys;

/// What is moved aside; no container's identifier begins with a dot.
const ASIDE: &str = ".removed-";

/// Moves a container's layer aside, if it has one.
pub fn discard(paths: &Paths, id: &str) -> Result<(), Error> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let scratch = paths.run.join("scratch");
    let aside = scratch.join(format!("{ASIDE}{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    match fs::rename(scratch.join(id), aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        moved => moved.context(|| format!("moving the writable layer of {id:?} aside")),
    }
}

/// Starts a process that removes what was moved aside, if there is anything.
pub fn clean(paths: &Paths) -> Result<(), Error> {
    let scratch = paths.run.join("scratch");
    let what = || format!("cleaning {}", scratch.display());
    let aside = list(&scratch).context(what)?;
    if aside.is_empty() {
        return Ok(());
    }
    let removed = sys::start_helper(|| {
        for directory in aside {
            // Two cleaners may meet at one directory.
            drop(fs::remove_dir_all(directory));
        }
    });
    removed.context(what).map(drop)
}

fn list(scratch: &Path) -> io::Result<Vec<std::path::PathBuf>> {
    let mut aside = Vec::new();
    for entry in fs::read_dir(scratch)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(ASIDE) {
            aside.push(entry.path());
        }
    }
    Ok(aside)
}
