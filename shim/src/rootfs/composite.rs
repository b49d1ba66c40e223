//! Several images as the partitions of one read-only disk.
//!
//! The images stay the files that they are: the disk is a list of extents, and only the partition table (GPT; UEFI 2.10, section
//! 5.3) is made for it, in a memfd. Its array has as many entries as there are images, which is less for the guest to read and to
//! check at each start than the usual 128.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use bulkhead_vmm::control::{Extent, MAX_DESCRIPTORS};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{Error, failed};
use crate::disk::DiskFiles;

/// The most extents of one disk, with some descriptors of a control message left for what comes with it. That is enough for the
/// 127 layers at which Docker's images end.
const MAX_EXTENTS: usize = MAX_DESCRIPTORS - 13;

/// Partitions begin and end at multiples of this, as the guest's pages do.
const ALIGNMENT: u64 = 4096;

const SECTOR: u64 = 512;
const ENTRY: u64 = 128;

/// The type of the partitions, "Linux filesystem data": 0FC63DAF-8483-4772-8E79-3D69D8477DE4.
const TYPE: u128 = 0xe47d_47d8_693d_798e_4772_8483_0fc6_3daf;

/// The disk's identifier; the partitions' are those that follow.
const ID: u128 = 0x0000_6461_6568_6b80_8c75_6200_0000_0000;

/// Makes a disk of images. A single one is the whole disk; more are its partitions, in their order.
pub fn disk(id: &str, images: Vec<File>) -> Result<DiskFiles, Error> {
    let failed = |operation| failed(operation, Path::new(id));
    let mut lengths = Vec::with_capacity(images.len());
    for image in &images {
        lengths.push(image.metadata().map_err(failed("stat an image of"))?.len());
    }
    let table = Table::new(&lengths);
    let made = OnceCell::new();
    let part = |offset, length| -> Result<(OwnedFd, Extent), Error> {
        let file = match made.get() {
            Some(file) => file,
            None => {
                let write = |mut file: &File| file.write_all(&table.bytes());
                let file = memfd(write).map_err(failed("make a partition table for"))?;
                made.get_or_init(|| file)
            }
        };
        let file = file
            .try_clone()
            .map_err(failed("duplicate a descriptor of"))?;
        Ok((file.into(), Extent { offset, length }))
    };
    let partitioned = images.len() > 1;
    let mut extents = Vec::with_capacity(images.len() + 2);
    if partitioned {
        extents.push(part(0, table.head)?);
    }
    for (image, length) in images.into_iter().zip(lengths) {
        extents.push((image.into(), Extent { offset: 0, length }));
        let padding = length.next_multiple_of(ALIGNMENT) - length;
        if padding > 0 {
            extents.push(part(table.head + table.tail, padding)?);
        }
    }
    if partitioned {
        extents.push(part(table.head, table.tail)?);
    }
    if extents.len() > MAX_EXTENTS {
        return Err(Error::TooManyLayers {
            extents: extents.len(),
            most: MAX_EXTENTS,
        });
    }
    Ok(DiskFiles {
        id: id.into(),
        read_only: true,
        extents,
    })
}

/// A file in memory that nobody can change once it is written.
pub fn memfd<E: From<io::Error>>(write: impl FnOnce(&File) -> Result<(), E>) -> Result<File, E> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("disk", flags).map_err(io::Error::from)?;
    let file = File::from(file);
    write(&file)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(io::Error::from)?;
    Ok(file)
}

/// A partition table: a head before the partitions, and a tail behind them that ends with a copy.
struct Table {
    /// First sector and number of sectors of each partition.
    partitions: Vec<(u64, u64)>,
    /// Length of the head in bytes.
    head: u64,
    /// Length of the tail in bytes.
    tail: u64,
}

impl Table {
    fn new(lengths: &[u64]) -> Self {
        let entries = (lengths.len() as u64 * ENTRY).next_multiple_of(SECTOR);
        let head = (2 * SECTOR + entries).next_multiple_of(ALIGNMENT);
        let mut start = head;
        let mut partitions = Vec::with_capacity(lengths.len());
        for length in lengths {
            let length = length.next_multiple_of(ALIGNMENT);
            partitions.push((start / SECTOR, length / SECTOR));
            start += length;
        }
        let tail = (entries + SECTOR).next_multiple_of(ALIGNMENT);
        Self {
            partitions,
            head,
            tail,
        }
    }

    /// Head, tail, and as many zeroes as are ever needed behind an image.
    fn bytes(&self) -> Vec<u8> {
        let mut entries = Vec::new();
        for (id, &(start, sectors)) in (ID + 1..).zip(&self.partitions) {
            entries.extend(TYPE.to_le_bytes());
            entries.extend(id.to_le_bytes());
            entries.extend(start.to_le_bytes());
            entries.extend((start + sectors - 1).to_le_bytes());
            entries.resize(entries.len().next_multiple_of(ENTRY as usize), 0);
        }
        let used: u64 = self.partitions.iter().map(|(_, sectors)| sectors).sum();
        let total = self.head / SECTOR + used + self.tail / SECTOR;
        let entries_length = (entries.len() as u64).next_multiple_of(SECTOR);
        let copy = total - 1 - entries_length / SECTOR;

        let mut bytes = vec![0; (self.head + self.tail + ALIGNMENT) as usize];
        let mut put = |offset: u64, field: &[u8]| {
            bytes[offset as usize..][..field.len()].copy_from_slice(field);
        };
        put(0, &protective_mbr(total));
        put(SECTOR, &self.header(1, total - 1, 2, copy - 1, &entries));
        put(2 * SECTOR, &entries);
        let end = self.head + self.tail;
        put(end - SECTOR - entries_length, &entries);
        put(
            end - SECTOR,
            &self.header(total - 1, 1, copy, copy - 1, &entries),
        );
        bytes
    }

    /// A header in the sector `own`, with the other one at `other`, entries from `entries_at`, and nothing used after `last`.
    fn header(&self, own: u64, other: u64, entries_at: u64, last: u64, entries: &[u8]) -> Vec<u8> {
        let build = |own_sum: u32| {
            let mut header = Vec::with_capacity(92);
            header.extend(b"EFI PART");
            header.extend(0x0001_0000_u32.to_le_bytes());
            header.extend(92_u32.to_le_bytes());
            header.extend(own_sum.to_le_bytes());
            header.extend([0; 4]);
            for sector in [own, other, self.head / SECTOR, last] {
                header.extend(sector.to_le_bytes());
            }
            header.extend(ID.to_le_bytes());
            header.extend(entries_at.to_le_bytes());
            header.extend((self.partitions.len() as u32).to_le_bytes());
            header.extend((ENTRY as u32).to_le_bytes());
            header.extend(crc32fast::hash(entries).to_le_bytes());
            header
        };
        build(crc32fast::hash(&build(0)))
    }
}

/// The first sector: it says, to whoever does not know GPT, that the whole disk is in use.
fn protective_mbr(total: u64) -> [u8; SECTOR as usize] {
    let mut sector = [0; SECTOR as usize];
    sector[446..454].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    sector[454..458].copy_from_slice(&1_u32.to_le_bytes());
    let length = u32::try_from(total - 1).unwrap_or(u32::MAX);
    sector[458..462].copy_from_slice(&length.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::testing::{content, run};
    use super::*;

    fn image(seed: u8, length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file.write_all_at(&[seed; 100], 0).unwrap();
        file.write_all_at(&[seed], length - 1).unwrap();
        file
    }

    /// What `partx`, which checks all sums, says of a disk's content: first sector and number of sectors of each partition.
    fn partitions(bytes: &[u8]) -> Vec<(u64, u64)> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let path = file.path().to_str().unwrap();
        run(
            "partx",
            &["--raw", "--noheadings", "--output", "START,SECTORS", path],
        )
        .lines()
        .map(|line| {
            let (start, sectors) = line.split_once(' ').unwrap();
            (start.parse().unwrap(), sectors.parse().unwrap())
        })
        .collect()
    }

    #[test]
    fn images_are_partitions() {
        for count in [2, 3, 29, 30, 127] {
            // Every seventh is no multiple of a page, or not even of a sector.
            let length = |n: usize| 4096 * (n as u64 + 1) + if n % 7 == 2 { n as u64 } else { 0 };
            let images: Vec<_> = (0..count).map(|n| image(n as u8 + 1, length(n))).collect();
            let disk = disk("layers", images).unwrap();
            assert!(disk.read_only && disk.extents.len() <= MAX_EXTENTS);
            let mut bytes = content(&disk);
            for attempt in ["head", "tail"] {
                let partitions = partitions(&bytes);
                assert_eq!(partitions.len(), count, "by the {attempt}");
                for (n, (start, sectors)) in partitions.into_iter().enumerate() {
                    assert_eq!(start % 8, 0);
                    assert_eq!(sectors, length(n).div_ceil(4096) * 8);
                    let part = &bytes[(start * 512) as usize..][..(sectors * 512) as usize];
                    let (image, padding) = part.split_at(length(n) as usize);
                    assert!(
                        image[..100] == [n as u8 + 1; 100] && image[image.len() - 1] == n as u8 + 1
                    );
                    assert!(padding.iter().all(|&byte| byte == 0));
                }
                // The second time without the first header.
                bytes[512..1024].fill(0);
            }
        }
    }

    #[test]
    fn a_single_image_is_the_disk() {
        let disk = disk("layers", vec![image(9, 5000)]).unwrap();
        let bytes = content(&disk);
        assert_eq!(bytes.len(), 8192);
        assert!(bytes[..100] == [9; 100] && bytes[4999] == 9);
    }

    #[test]
    fn too_many_layers_are_refused() {
        let images = (0..MAX_EXTENTS).map(|n| image(n as u8, 4096)).collect();
        let error = disk("layers", images).unwrap_err();
        assert!(
            matches!(
                error,
                Error::TooManyLayers {
                    extents: 242,
                    most: 240
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn the_table_cannot_be_changed() {
        let disk = disk("layers", vec![image(1, 4096), image(2, 4096)]).unwrap();
        let table = File::from(disk.extents.into_iter().next().unwrap().0);
        assert!(table.write_all_at(b"x", 0).is_err());
        assert!(table.set_len(0).is_err());
    }
}
