//! Copies a directory's contents, for a tmpfs that begins with what it covers, and files that become a container's own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, chownat, fchmod, mkdirat, mknodat, openat,
    readlinkat, statat, symlinkat,
};

/// Copies all below `from` to the directory `to`, with owners and modes.
pub fn contents(from: &OwnedFd, to: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let from = openat(from, ".", flags, Mode::empty())?;
    let to = rustix::fs::open(to, flags, Mode::empty())?;
    own(&to, &rustix::fs::fstat(&from)?)?;
    directory(&from, &to)
}

/// Copies a regular file, with owner and mode.
pub fn file(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    let mut copy = File::create_new(to)?;
    io::copy(&mut source, &mut copy)?;
    own(&copy, &rustix::fs::fstat(&source)?)
}

fn directory(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    const DIRECTORY: OFlags = OFlags::RDONLY
        .union(OFlags::DIRECTORY)
        .union(OFlags::NOFOLLOW)
        .union(OFlags::CLOEXEC);
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let found = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(found.st_mode);
        match kind {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let source = openat(from, name, DIRECTORY, Mode::empty())?;
                let copy = openat(to, name, DIRECTORY, Mode::empty())?;
                directory(&source, &copy)?;
                own(&copy, &found)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut source = File::from(openat(from, name, flags, Mode::empty())?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut copy = File::from(openat(to, name, flags, Mode::RUSR)?);
                io::copy(&mut source, &mut copy)?;
                own(&copy, &found)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(from, name, Vec::new())?.as_c_str(), to, name)?;
                let (uid, gid) = owner(&found);
                chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Fifo
            | FileType::Socket => {
                let mode = Mode::from_raw_mode(found.st_mode);
                mknodat(to, name, kind, mode, found.st_rdev)?;
                let (uid, gid) = owner(&found);
                chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            FileType::Unknown => {
                return Err(io::Error::other(format!("{name:?} is of no known type")));
            }
        }
    }
    Ok(())
}

fn owner(found: &Stat) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    (
        Some(rustix::fs::Uid::from_raw(found.st_uid)),
        Some(rustix::fs::Gid::from_raw(found.st_gid)),
    )
}

/// Owner before mode, because a change of owner clears the set-user-ID bit.
fn own(copy: impl AsFd, found: &Stat) -> io::Result<()> {
    let (uid, gid) = owner(found);
    rustix::fs::fchown(&copy, uid, gid)?;
    Ok(fchmod(&copy, Mode::from_raw_mode(found.st_mode))?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn contents_owners_and_modes_are_kept() {
        let base = std::env::temp_dir().join(format!("copy-{}", std::process::id()));
        let (from, to) = (base.join("from"), base.join("to"));
        fs::create_dir_all(from.join("d")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("d/f"), "text").unwrap();
        std::os::unix::fs::chown(from.join("d/f"), Some(7), Some(8)).unwrap();
        fs::set_permissions(from.join("d/f"), fs::Permissions::from_mode(0o4711)).unwrap();
        symlink("nowhere", from.join("l")).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o1777)).unwrap();

        contents(&File::open(&from).unwrap().into(), &to).unwrap();
        let copy = fs::metadata(to.join("d/f")).unwrap();
        assert_eq!(
            (copy.uid(), copy.gid(), copy.mode() & 0o7777),
            (7, 8, 0o4711)
        );
        assert_eq!(fs::read(to.join("d/f")).unwrap(), b"text");
        assert_eq!(
            fs::read_link(to.join("l")).unwrap().to_str(),
            Some("nowhere")
        );
        assert_eq!(fs::metadata(&to).unwrap().mode() & 0o7777, 0o1777);
        fs::remove_dir_all(base).unwrap();
    }
}
