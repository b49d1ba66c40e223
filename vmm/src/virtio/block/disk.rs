//! What a disk consists of: ranges of files, one after the other. A request may cross from one into the next anywhere.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::uio::pwrite;

use crate::control::Extent;
use crate::virtio::Buffers;

/// What is wrong with an extent.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// It has no bytes.
    #[error("its length is 0")]
    Empty,
    /// Its end, or the disk's, is beyond what a file can have.
    #[error("offset {offset} and length {length} make the disk larger than a file can be")]
    Overflow {
        /// Where it starts in its file.
        offset: u64,
        /// How long it is.
        length: u64,
    },
    /// The file ends before it.
    #[error("the file has {size} bytes, but the extent ends at {end}")]
    Short {
        /// Size of the file in bytes.
        size: u64,
        /// Where the extent ends in it.
        end: u64,
    },
    /// Neither a regular file nor a block device.
    #[error("the descriptor is neither a regular file nor a block device")]
    Kind,
    /// The descriptor's access mode.
    #[error("the descriptor is not open for {0}")]
    Mode(&'static str),
    /// The system refused.
    #[error("{operation}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// The content of a disk.
#[derive(Debug)]
pub struct Content {
    /// In the order of their `start`, without gaps.
    pieces: Vec<Piece>,
    length: u64,
    read_only: bool,
}

#[derive(Debug)]
struct Piece {
    file: File,
    /// Where it starts in the file.
    offset: u64,
    /// Where it starts in the disk.
    start: u64,
    length: u64,
}

impl Content {
    /// Puts extents together, each with its file. An error comes with the extent's index.
    pub fn new(
        extents: &[Extent],
        files: Vec<OwnedFd>,
        read_only: bool,
    ) -> Result<Self, (usize, Problem)> {
        let mut content = Self {
            pieces: Vec::with_capacity(files.len()),
            length: 0,
            read_only,
        };
        for (index, (extent, file)) in extents.iter().zip(files).enumerate() {
            content
                .append(extent, File::from(file))
                .map_err(|problem| (index, problem))?;
        }
        Ok(content)
    }

    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Whether it cannot be changed.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn append(&mut self, extent: &Extent, mut file: File) -> Result<(), Problem> {
        let &Extent { offset, length } = extent;
        if length == 0 {
            return Err(Problem::Empty);
        }
        let fits = |end: &u64| i64::try_from(*end).is_ok();
        let overflow = Problem::Overflow { offset, length };
        let end = offset.checked_add(length).filter(fits);
        let total = self.length.checked_add(length).filter(fits);
        let (Some(end), Some(total)) = (end, total) else {
            return Err(overflow);
        };
        let kind = file.metadata().map_err(problem("fstat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Problem::Kind);
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(io::Error::from);
        let flags = OFlag::from_bits_retain(flags.map_err(problem("F_GETFL"))?);
        let mode = flags & OFlag::O_ACCMODE;
        if flags.contains(OFlag::O_PATH) || mode == OFlag::O_WRONLY {
            return Err(Problem::Mode("reading"));
        }
        if !self.read_only && mode != OFlag::O_RDWR {
            return Err(Problem::Mode("writing"));
        }
        // The end is the size of a block device too, of which the metadata do not speak.
        let size = file.seek(SeekFrom::End(0)).map_err(problem("lseek"))?;
        if size < end {
            return Err(Problem::Short { size, end });
        }
        self.pieces.push(Piece {
            file,
            offset,
            start: self.length,
            length,
        });
        self.length = total;
        Ok(())
    }

    /// Fills `buffers` with what is at `position`. The range must be within the disk.
    pub fn read(&self, position: u64, buffers: Buffers<'_>) -> io::Result<()> {
        self.transfer(position, buffers, |file, offset, vectors| {
            // SAFETY: the vectors describe guest memory, which stays mapped as long as the buffers that they are made from.
            unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as i32,
                    offset,
                )
            }
        })
    }

    /// Writes `buffers` to `position`. The range must be within the disk.
    pub fn write(&self, position: u64, buffers: Buffers<'_>) -> io::Result<()> {
        self.transfer(position, buffers, |file, offset, vectors| {
            // SAFETY: the vectors describe guest memory, which stays mapped as long as the buffers that they are made from.
            unsafe {
                libc::pwritev(
                    file.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as i32,
                    offset,
                )
            }
        })
    }

    /// Makes what was written last a power failure.
    pub fn flush(&self) -> io::Result<()> {
        self.pieces
            .iter()
            .try_for_each(|piece| piece.file.sync_data())
    }

    /// Tells the files that the content of a range is not needed any more. A file system that cannot make use of that
    /// ignores it.
    pub fn discard(&self, position: u64, length: u64) -> io::Result<()> {
        self.for_each(position, length, |file, offset, length| {
            match allocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length) {
                Err(Errno::EOPNOTSUPP) => Ok(()),
                result => result.map_err(Into::into),
            }
        })
    }

    /// Fills a range with zeroes; with `unmap`, the files may give its space up.
    pub fn write_zeroes(&self, position: u64, length: u64, unmap: bool) -> io::Result<()> {
        let flag = if unmap {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        };
        self.for_each(position, length, |file, offset, length| {
            match allocate(file, flag, offset, length) {
                Err(Errno::EOPNOTSUPP) => fill(file, offset, length),
                result => result.map_err(Into::into),
            }
        })
    }

    /// Moves bytes between `buffers` and the files. A transfer that stops short is taken up where it stopped; one that does
    /// not get on at all is at the end of a file that has become shorter.
    fn transfer(
        &self,
        position: u64,
        mut buffers: Buffers<'_>,
        call: impl Fn(&File, i64, &[libc::iovec]) -> isize,
    ) -> io::Result<()> {
        let mut vectors = Vec::new();
        self.for_each(
            position,
            buffers.len() as u64,
            |file, mut offset, length| {
                let mut left = length as usize;
                while left > 0 {
                    vectors.clear();
                    buffers.append_to(left, &mut vectors);
                    let moved = match call(file, offset, &vectors) {
                        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                        moved if moved > 0 => moved as usize,
                        _ => match io::Error::last_os_error() {
                            error if error.kind() == io::ErrorKind::Interrupted => continue,
                            error => return Err(error),
                        },
                    };
                    buffers.advance(moved);
                    offset += moved as i64;
                    left -= moved;
                }
                Ok(())
            },
        )
    }

    /// Calls `action` with each file that has a part of the range, and where in the file the part is.
    fn for_each(
        &self,
        mut position: u64,
        mut length: u64,
        mut action: impl FnMut(&File, i64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let first = self
            .pieces
            .partition_point(|piece| piece.start + piece.length <= position);
        for piece in &self.pieces[first..] {
            if length == 0 {
                break;
            }
            let within = position - piece.start;
            let part = length.min(piece.length - within);
            action(&piece.file, (piece.offset + within) as i64, part)?;
            position += part;
            length -= part;
        }
        Ok(())
    }
}

fn allocate(file: &File, flag: FallocateFlags, offset: i64, length: u64) -> Result<(), Errno> {
    let flags = flag | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    loop {
        match fallocate(file, flags, offset, length as i64) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Writes zeroes where the file system has no shorter way.
fn fill(file: &File, mut offset: i64, mut length: u64) -> io::Result<()> {
    static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
    while length > 0 {
        let part = length.min(ZEROES.len() as u64) as usize;
        match pwrite(file, &ZEROES[..part], offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as i64;
                length -= written as u64;
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn problem(operation: &'static str) -> impl Fn(io::Error) -> Problem {
    move |source| Problem::Io { operation, source }
}
