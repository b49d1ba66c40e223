//! Sparse files: content in chunks, of which those without data are not stored.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom::Data;

use super::super::sparse::next;
use super::BLOCK;

/// How many chunks a sparse file has at most (256 KiB of table), unless that would need chunks larger than there can be.
const MAX_CHUNKS: u64 = 64 * 1024;

/// The smallest chunk of a sparse file, as a power of two.
const MIN_CHUNK_BITS: u32 = 16;

/// The largest, because the format keeps five bits for the number of doublings of a block.
const MAX_CHUNK_BITS: u32 = 12 + 31;

/// The parts of a sparse file that hold data.
#[derive(Debug)]
pub struct Chunks {
    /// Size of a chunk as a power of two.
    pub(super) bits: u32,
    /// The numbers of the chunks with data, in rising order.
    pub(super) present: Vec<u32>,
}

impl Chunks {
    /// Finds the data of a file of this size; `None` if most of its chunks hold data.
    pub fn of(file: &File, size: u64) -> io::Result<Option<Self>> {
        let mut bits = MIN_CHUNK_BITS;
        while bits < MAX_CHUNK_BITS && size.div_ceil(1 << bits) > MAX_CHUNKS {
            bits += 1;
        }
        let mut present = Vec::new();
        let mut position = 0;
        while let Some(data) = next(file, Data(position), size)? {
            present.push((data >> bits) as u32);
            position = ((data >> bits) + 1) << bits;
        }
        let total = size.div_ceil(1 << bits);
        Ok((present.len() as u64 <= total / 2).then_some(Self { bits, present }))
    }

    /// Where a chunk is in its file.
    pub(super) fn range(&self, chunk: u32, size: u64) -> Range<u64> {
        let start = u64::from(chunk) << self.bits;
        start..size.min(start + (1 << self.bits))
    }

    /// How much space a file's chunks take in the image.
    pub(super) fn stored(&self, size: u64) -> u64 {
        self.present
            .iter()
            .map(|&chunk| self.range(chunk, size))
            .map(|range| (range.end - range.start).next_multiple_of(BLOCK))
            .sum()
    }

    /// The length of the table in bytes.
    pub(super) fn table_length(&self, size: u64) -> u64 {
        4 * size.div_ceil(1 << self.bits)
    }

    /// Each chunk's first block; all ones for a hole.
    pub(super) fn table(&self, size: u64, first: u32) -> Vec<u8> {
        let mut table = vec![0xff; self.table_length(size) as usize];
        let mut block = first;
        for &chunk in &self.present {
            let range = self.range(chunk, size);
            table[4 * chunk as usize..][..4].copy_from_slice(&block.to_le_bytes());
            block += (range.end - range.start).div_ceil(BLOCK) as u32;
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn chunks_grow_with_the_file_and_hold_its_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::pow(2, 43)).unwrap();
        file.write_all_at(b"x", 1 << 42).unwrap();
        let size = (1 << 43) - 5;
        let chunks = Chunks::of(&file, size).unwrap().unwrap();
        assert_eq!(chunks.bits, 27);
        assert_eq!(chunks.present, [1 << 15]);
        assert_eq!(chunks.range(65_535, size).end, size);
        let table = chunks.table(size, 77);
        assert_eq!(table.len(), 4 * 65_536);
        assert_eq!(table[4 << 15..][..4], 77_u32.to_le_bytes());
        assert!(table[..4 << 15].iter().all(|&byte| byte == 0xff));
    }
}
