//! The guest's physical address space: where things are, and the memory behind it.
//!
//! ```text
//! 0x0_0000_0000 ┬ RAM (below 1 MiB only what the boot module puts there and the kernel's own trampolines)
//!               ┆
//! 0x0_c000_0000 ┼ PCI memory window: base address registers before the guest moves them
//! 0x0_fec0_0000 ┼ I/O APIC, local APICs, the pages KVM needs for itself
//! 0x1_0000_0000 ┼ RAM beyond the first 3 GiB
//! ```

use std::fs::File;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use vm_memory::mmap::FromRangesError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

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

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {operation} a memfd for {mib} MiB of guest memory: {source}")]
    System {
        operation: &'static str,
        mib: u32,
        source: Errno,
    },
    #[error("cannot map {mib} MiB of guest memory: {source}")]
    Map { mib: u32, source: FromRangesError },
}

/// Makes the guest's memory: a memfd whose size is sealed, so that no holder of the descriptor can turn an access into
/// a bus error by shrinking it.
///
/// # Errors
///
/// The host refuses the file or its mapping.
pub fn create(mib: u32) -> Result<GuestRam, Error> {
    let system = |operation| {
        move |source| Error::System {
            operation,
            mib,
            source,
        }
    };
    let bytes = u64::from(mib) * MIB;
    let file = File::from(
        memfd_create(
            c"guest memory",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )
        .map_err(system("make"))?,
    );
    ftruncate(
        &file,
        bytes
            .try_into()
            .map_err(|_| Errno::EFBIG)
            .map_err(system("size"))?,
    )
    .map_err(system("size"))?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(system("seal"))?;

    let low = FileOffset::new(file, 0);
    let high = FileOffset::from_arc(low.arc().clone(), LOW_RAM_END);
    let ranges = ranges(bytes);
    let files = [low, high];
    GuestRam::from_ranges_with_files(
        ranges
            .iter()
            .zip(files)
            .map(|(&(start, length), file)| (start, length as usize, Some(file))),
    )
    .map_err(|source| Error::Map { mib, source })
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
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    #[test]
    fn small_memory_is_one_range_and_sealed() {
        let ram = create(3).unwrap();
        assert_eq!(ram.num_regions(), 1);
        assert_eq!(ram.last_addr(), GuestAddress(3 * MIB - 1));
        ram.write_obj(0x5au8, GuestAddress(3 * MIB - 1)).unwrap();
        assert!(ram.write_obj(0x5au8, GuestAddress(3 * MIB)).is_err());
        let file = ram.iter().next().unwrap().file_offset().unwrap();
        assert_eq!(ftruncate(file.file(), 0), Err(Errno::EPERM));
        assert_eq!(ftruncate(file.file(), 4 << 20), Err(Errno::EPERM));
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
        // The high range is the part of the file behind the low range, not the same part again.
        assert_eq!(ram.read_obj::<u8>(GuestAddress(MIB - 1)).unwrap(), 0);
    }
}
