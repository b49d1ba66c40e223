//! The guest's physical address space: where things are, and the memory behind it.
//!
//! ```text
//! 0x0_0000_0000 ┬ RAM (below 1 MiB only what the boot module puts there and the kernel's own trampolines)
//!               ┆
//! 0x0_c000_0000 ┼ PCI memory window: base address registers before the guest moves them
//! 0x0_fec0_0000 ┼ I/O APIC, local APICs, the pages KVM needs for itself
//! 0x1_0000_0000 ┼ RAM beyond the first 3 GiB
//! ```

use std::io;
use std::ptr::null_mut;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap};

/// The guest's memory, as devices see it. Cloning it clones references.
pub type GuestRam = GuestMemoryMmap<()>;

/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;

/// The end of the RAM below 4 GiB: 3 GiB. The 1 GiB above it is left to devices.
pub const LOW_RAM_END: u64 = 3 << 30;

/// Where the PCI memory window starts: right behind the low RAM.
pub const PCI_WINDOW_START: u64 = LOW_RAM_END;

/// The end of the PCI memory window: the I/O APIC's registers, the lowest of the fixed addresses below 4 GiB.
pub const PCI_WINDOW_END: u64 = IO_APIC;

/// The registers of the I/O APIC that KVM emulates.
pub const IO_APIC: u64 = 0xfec0_0000;

/// The registers of each processor's local APIC.
pub const LOCAL_APIC: u64 = 0xfee0_0000;

/// A page for KVM's identity map on processors without unrestricted guest mode: the page below [`KVM_TSS`].
pub const KVM_IDENTITY_MAP: u64 = KVM_TSS - 0x1000;

/// Three pages for KVM's task state segment on such processors: 0xffff_c000 ends 16 KiB below 4 GiB.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Where the RAM beyond [`LOW_RAM_END`] continues: 4 GiB.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// The size of a large page, to which a range's place in the process is aligned like its place in the guest.
const LARGE_PAGE: usize = 2 << 20;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot map {mib} MiB of guest memory: {source}; lower memory_mib")]
    Map { mib: u32, source: io::Error },
    #[error("cannot describe the mapping of {mib} MiB of guest memory: {source}")]
    Region { mib: u32, source: MmapRegionError },
    #[error("cannot lay out {mib} MiB of guest memory: {source}")]
    Layout {
        mib: u32,
        source: GuestRegionCollectionError,
    },
}

/// Makes the guest's memory: private to the process, empty until it is used, and in large pages where the host has them.
///
/// Large pages are what counts: each page that the guest touches first is an exit, and a kernel touches most of what it
/// starts with. The kernel gives them to private memory by default, to files in memory (memfd) only where the
/// administrator has asked for that.
///
/// The mapping stays until the process ends, whoever still holds the result.
///
/// # Errors
///
/// The process has no room for the mapping.
pub fn create(mib: u32) -> Result<GuestRam, Error> {
    let regions = ranges(u64::from(mib) * MIB)
        .into_iter()
        .map(|(start, length)| {
            let length = length as usize;
            let address = map(length).map_err(|source| Error::Map { mib, source })?;
            let builder = MmapRegionBuilder::new(length)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(MAP_FLAGS);
            // SAFETY: the mapping is there, has this length, and is never unmapped.
            let region = unsafe { builder.with_raw_mmap_pointer(address) }
                .build()
                .map_err(|source| Error::Region { mib, source })?;
            GuestRegionMmap::new(region, start).ok_or(Error::Layout {
                mib,
                source: GuestRegionCollectionError::MemoryRegionOverlap,
            })
        })
        .collect::<Result<_, _>>()?;
    GuestRam::from_regions(regions).map_err(|source| Error::Layout { mib, source })
}

const MAP_FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Maps `length` bytes at a multiple of the large page's size.
fn map(length: usize) -> io::Result<*mut u8> {
    let room = length
        .checked_add(LARGE_PAGE)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
    let start = unsafe { libc::mmap(null_mut(), room, prot, MAP_FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = start.align_offset(LARGE_PAGE);
    let aligned = start.wrapping_byte_add(before);
    // SAFETY: before and behind the aligned part, and within the mapping just made, which nobody uses yet. Both
    // lengths are multiples of the page's size, and an empty one is an error without effect.
    unsafe {
        libc::munmap(start, before);
        libc::munmap(aligned.wrapping_byte_add(length), LARGE_PAGE - before);
    }
    // SAFETY: the call speaks of the mapping just made, and changes neither its content nor its place. A host without large
    // pages refuses, and everything works all the same.
    unsafe { libc::madvise(aligned, length, libc::MADV_HUGEPAGE) };
    Ok(aligned.cast())
}

/// Where `bytes` of RAM are in the guest's address space, as start and length: one range, or two around the devices'
/// 1 GiB below 4 GiB.
pub fn ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let mut ranges = vec![(GuestAddress(0), bytes.min(LOW_RAM_END))];
    if bytes > LOW_RAM_END {
        ranges.push((GuestAddress(HIGH_RAM_START), bytes - LOW_RAM_END));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn memory_ends_where_it_should_and_is_aligned() {
        let ram = create(3).unwrap();
        assert_eq!(ram.num_regions(), 1);
        assert_eq!(ram.last_addr(), GuestAddress(3 * MIB - 1));
        ram.write_obj(0x5au8, GuestAddress(3 * MIB - 1)).unwrap();
        assert!(ram.write_obj(0x5au8, GuestAddress(3 * MIB)).is_err());
        let host = ram.get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(host.align_offset(LARGE_PAGE), 0);
    }

    #[test]
    fn large_memory_leaves_the_devices_gap_free() {
        assert_eq!(ranges(LOW_RAM_END), [(GuestAddress(0), LOW_RAM_END)]);
        assert_eq!(
            ranges(LOW_RAM_END + MIB),
            [
                (GuestAddress(0), LOW_RAM_END),
                (GuestAddress(HIGH_RAM_START), MIB)
            ]
        );
        let ram = create(3 * 1024 + 1).unwrap();
        let high = GuestAddress(HIGH_RAM_START + MIB - 1);
        ram.write_obj(1u8, high).unwrap();
        assert!(ram.write_obj(1u8, GuestAddress(LOW_RAM_END)).is_err());
        assert_eq!(ram.read_obj::<u8>(high).unwrap(), 1);
    }
}
