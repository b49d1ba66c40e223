//! Writing one of the image's two parts from its beginning to its end.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{BLOCK, Error, reading};

/// How much a [`Stream`] gathers before it writes. Larger files are copied by the kernel.
const GATHER: usize = 256 * 1024;

/// A part of the image that is written from its beginning to its end.
pub struct Stream<'a> {
    file: &'a File,
    /// Where the buffer goes.
    start: u64,
    buffer: Vec<u8>,
    /// Of what went through the buffer.
    pub sum: crc32fast::Hasher,
}

impl<'a> Stream<'a> {
    pub fn new(file: &'a File, start: u64) -> Self {
        Self {
            file,
            start,
            buffer: Vec::with_capacity(GATHER),
            sum: crc32fast::Hasher::new(),
        }
    }

    pub fn position(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.sum.update(&self.buffer);
        self.file.write_all_at(&self.buffer, self.start)?;
        self.start = self.position();
        self.buffer.clear();
        Ok(())
    }

    fn reserve(&mut self, length: usize) -> io::Result<()> {
        if self.buffer.len() + length > GATHER {
            self.flush()?;
        }
        Ok(())
    }

    pub fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reserve(bytes.len())?;
        self.buffer.extend(bytes);
        Ok(())
    }

    /// Leaves zeroes up to an offset, as a hole if they are many.
    pub fn skip_to(&mut self, offset: u64) -> io::Result<()> {
        if offset - self.position() < BLOCK {
            let gap = (offset - self.position()) as usize;
            self.reserve(gap)?;
            self.buffer.resize(self.buffer.len() + gap, 0);
        } else {
            self.flush()?;
            self.start = offset;
        }
        Ok(())
    }

    pub fn copy(&mut self, source: &File, path: &Path, range: Range<u64>) -> Result<(), Error> {
        let length = range.end - range.start;
        if length <= GATHER as u64 / 4 {
            self.reserve(length as usize)?;
            let old = self.buffer.len();
            self.buffer.resize(old + length as usize, 0);
            return match source.read_exact_at(&mut self.buffer[old..], range.start) {
                Ok(()) => Ok(()),
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    Err(Error::Changed(path.into()))
                }
                Err(error) => Err(reading(path)(error)),
            };
        }
        self.flush()?;
        let (mut source, mut target) = (source, self.file);
        source
            .seek(SeekFrom::Start(range.start))
            .map_err(reading(path))?;
        target.seek(SeekFrom::Start(self.start))?;
        // The kernel copies, and shares the blocks where the file system can.
        match io::copy(&mut source.take(length), &mut target) {
            Ok(copied) if copied == length => {
                self.start += length;
                Ok(())
            }
            Ok(_) => Err(Error::Changed(path.into())),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::StorageFull | ErrorKind::QuotaExceeded
                ) =>
            {
                Err(Error::Write(error))
            }
            Err(error) => Err(reading(path)(error)),
        }
    }
}
