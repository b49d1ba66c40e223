//! Where a sparse file has data.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The next offset of data or of a hole that lies before `end`, if there is one.
pub fn next(file: &File, from: SeekFrom, end: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, from) {
        Ok(offset) => Ok(Some(offset).filter(|&offset| offset < end)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Calls `copy` with each part of a file's range that holds data.
pub fn each_data<E>(
    file: &File,
    range: Range<u64>,
    mut copy: impl FnMut(Range<u64>) -> Result<(), E>,
    failed: impl Fn(io::Error) -> E,
) -> Result<(), E> {
    let mut position = range.start;
    while let Some(start) = next(file, SeekFrom::Data(position), range.end).map_err(&failed)? {
        let hole = next(file, SeekFrom::Hole(start), range.end).map_err(&failed)?;
        position = hole.unwrap_or(range.end);
        copy(start..position)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn data_is_found_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 20).unwrap();
        for start in [1 << 20, 4 << 20, 6 << 20] {
            file.write_all_at(&[1; 1 << 20], start).unwrap();
        }
        let found = |range| {
            let mut parts = Vec::new();
            let add = |part: Range<u64>| {
                parts.push((part.start, part.end));
                Ok::<_, io::Error>(())
            };
            each_data(&file, range, add, |error| error).unwrap();
            parts
        };
        const MIB: u64 = 1 << 20;
        assert_eq!(
            found(0..10 * MIB),
            [(MIB, 2 * MIB), (4 * MIB, 5 * MIB), (6 * MIB, 7 * MIB)]
        );
        assert_eq!(
            found(MIB + 7..4 * MIB + 1),
            [(MIB + 7, 2 * MIB), (4 * MIB, 4 * MIB + 1)]
        );
        assert_eq!(found(7 * MIB..10 * MIB), []);
        assert_eq!(found(0..0), []);
    }
}
