//! One request (section 5.2.6): a header, data in one direction, and a status byte.
//!
//! The whole of a request is checked before anything is done for it.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::Content;
use super::{ID_LENGTH, MAX_RANGES, RANGE_SECTORS, SECTOR};
use crate::virtio::{Broken, Buffers, Chain};

/// Length of the header: type, a reserved word, sector.
const HEADER: usize = 16;
/// Length of a range to discard or to fill with zeroes: sector, number of sectors, flags.
const RANGE: usize = 16;

/// What all queues of a device work on.
#[derive(Debug)]
pub struct Backend {
    pub content: Content,
    pub id: [u8; ID_LENGTH],
}

/// Why a request was not carried out.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    /// It was not valid, or the host could not do it.
    Io,
    /// The device does not know it.
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

impl Backend {
    /// Carries a request out and writes its status. Returns the number of bytes written to the chain.
    pub fn execute(&self, chain: Chain<'_>, features: u64) -> Result<u32, Broken> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let short = |missing| Broken::Short { head, missing };
        let mut status = writable.take_last(1).ok_or_else(|| short("a status"))?;
        let mut header = [0; HEADER];
        if !readable.read(&mut header) {
            return Err(short("a header"));
        }
        let result = self.carry_out(&header, readable, writable, features);
        let (code, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        status.write(&[code as u8]);
        Ok(written + 1)
    }

    /// Returns the number of bytes written to `writable`.
    fn carry_out(
        &self,
        header: &[u8; HEADER],
        readable: Buffers<'_>,
        mut writable: Buffers<'_>,
        features: u64,
    ) -> Result<u32, Failure> {
        let kind = word(header, 0);
        let sector = u64::from(word(header, 8)) | u64::from(word(header, 12)) << 32;
        match kind {
            VIRTIO_BLK_T_IN => {
                let length = writable.len();
                let position = self.position(sector, length as u64)?;
                self.content.read(position, writable)?;
                Ok(length as u32)
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let position = self.position(sector, readable.len() as u64)?;
                self.content.write(position, readable)?;
                // Section 5.2.6.2: without the feature, a write is stable when it is completed.
                if features & 1 << VIRTIO_BLK_F_FLUSH == 0 {
                    self.content.flush()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                if !self.content.is_read_only() {
                    self.content.flush()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let length = writable.len().min(ID_LENGTH);
                writable.write(&self.id[..length]);
                Ok(length as u32)
            }
            VIRTIO_BLK_T_DISCARD => {
                self.check_writable()?;
                for range in self.ranges(readable, 0)? {
                    self.content.discard(range.position, range.length)?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                for range in self.ranges(readable, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)? {
                    let unmap = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                    self.content
                        .write_zeroes(range.position, range.length, unmap)?;
                }
                Ok(0)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Section 5.2.6.2: a read-only device fails what would change it, and changes nothing.
    fn check_writable(&self) -> Result<(), Failure> {
        if self.content.is_read_only() {
            Err(Failure::Io)
        } else {
            Ok(())
        }
    }

    /// Where whole sectors are in the disk, in bytes, if they are there.
    fn position(&self, sector: u64, length: u64) -> Result<u64, Failure> {
        let position = sector.checked_mul(SECTOR).ok_or(Failure::Io)?;
        let end = position.checked_add(length).ok_or(Failure::Io)?;
        if !length.is_multiple_of(SECTOR) || end > self.content.length() {
            return Err(Failure::Io);
        }
        Ok(position)
    }

    /// The ranges of a request, all of them checked. Flags other than `known` make it an unsupported one.
    fn ranges(&self, mut readable: Buffers<'_>, known: u32) -> Result<Vec<Range>, Failure> {
        let count = readable.len() / RANGE;
        if !readable.len().is_multiple_of(RANGE) || count == 0 || count > MAX_RANGES as usize {
            return Err(Failure::Io);
        }
        let mut ranges = Vec::with_capacity(count);
        let mut bytes = [0; RANGE];
        while readable.read(&mut bytes) {
            let sector = u64::from(word(&bytes, 0)) | u64::from(word(&bytes, 4)) << 32;
            let sectors = word(&bytes, 8);
            let flags = word(&bytes, 12);
            if flags & !known != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > RANGE_SECTORS {
                return Err(Failure::Io);
            }
            let length = u64::from(sectors) * SECTOR;
            ranges.push(Range {
                position: self.position(sector, length)?,
                length,
                flags,
            });
        }
        Ok(ranges)
    }
}

/// Bytes to discard or to fill with zeroes.
#[derive(Debug)]
struct Range {
    position: u64,
    length: u64,
    flags: u32,
}

/// A little-endian word at an offset.
fn word(bytes: &[u8; 16], offset: usize) -> u32 {
    let [a, b, c, d, ..] = bytes[offset..] else {
        return 0;
    };
    u32::from_le_bytes([a, b, c, d])
}
