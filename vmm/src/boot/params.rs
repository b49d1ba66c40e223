//! The boot parameters: where memory is and where the command line is.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
};

use super::{COMMAND_LINE, CONVENTIONAL_END, EXTENDED_START, MP_TABLE, ZERO_PAGE};
use crate::memory::GuestRam;

/// What Linux must know of this machine, before what it is asked for: there is no I/O APIC, and the 8259s are wired to the first
/// processor. (Linux would otherwise cut that wire, and the console's terminal would never get its interrupt.)
const PLATFORM: &str = "noapic ";

/// The most bytes of a command line: Linux has room for 2,048 with the closing NUL (`COMMAND_LINE_SIZE`).
pub const MAX_COMMAND_LINE: usize = 2047 - PLATFORM.len();

/// A loader without a number of its own.
const LOADER_OTHER: u8 = 0xff;

/// What the header of a boot sector has at its two magic places.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;

/// Kinds of memory in the map.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why there are no boot parameters.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cmdline has {0} bytes, and Linux has room for {MAX_COMMAND_LINE}: shorten it")]
    TooLong(usize),
    #[error("cmdline has a NUL at byte {0}, where Linux would stop reading: remove it")]
    Nul(usize),
    #[error("cannot write the boot parameters to the guest's memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Checks a command line.
///
/// # Errors
///
/// The kernel would not see all of it.
pub fn check(cmdline: &str) -> Result<(), Error> {
    if cmdline.len() > MAX_COMMAND_LINE {
        return Err(Error::TooLong(cmdline.len()));
    }
    match cmdline.bytes().position(|byte| byte == 0) {
        Some(at) => Err(Error::Nul(at)),
        None => Ok(()),
    }
}

/// Writes the boot parameters and the command line.
///
/// # Errors
///
/// The command line is invalid, or the guest's memory too small.
pub fn write(ram: &GuestRam, cmdline: &str) -> Result<(), Error> {
    check(cmdline)?;
    let cmdline = format!("{PLATFORM}{cmdline}\0");
    ram.write_slice(cmdline.as_bytes(), GuestAddress(COMMAND_LINE))?;

    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32 - 1;
    let map = memory_map(ram);
    for (entry, (start, end, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *start,
            size: end - start,
            r#type: *kind,
        };
    }
    params.e820_entries = map.len() as u8;
    Ok(ram.write_slice(params.as_slice(), GuestAddress(ZERO_PAGE))?)
}

/// The memory map, as start, end and kind: the RAM, without the part of the first MiB that is no RAM in a PC.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, MP_TABLE, E820_RAM),
        (MP_TABLE, CONVENTIONAL_END, E820_RESERVED),
    ];
    map.extend(ram.iter().map(|region| {
        let start = region.start_addr().0;
        (start.max(EXTENDED_START), start + region.len(), E820_RAM)
    }));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, MIB};

    #[test]
    fn the_map_covers_the_ram_and_keeps_the_table() {
        let ram = memory::create(3 * 1024 + 5).unwrap();
        assert_eq!(
            memory_map(&ram),
            [
                (0, 0x9_fc00, E820_RAM),
                (0x9_fc00, 0xa_0000, E820_RESERVED),
                (MIB, 3 << 30, E820_RAM),
                (4 << 30, (4 << 30) + 5 * MIB, E820_RAM),
            ]
        );
    }

    #[test]
    fn the_kernel_finds_its_command_line() {
        let ram = memory::create(2).unwrap();
        ram.write_slice(&[0xff; 64], GuestAddress(COMMAND_LINE))
            .unwrap();
        write(&ram, "quiet root=/dev/vda").unwrap();
        let params: boot_params = ram.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        assert_eq!(params.e820_entries, 3);
        let mut bytes = [0; 27];
        ram.read_slice(&mut bytes, GuestAddress(params.hdr.cmd_line_ptr.into()))
            .unwrap();
        assert_eq!(&bytes, b"noapic quiet root=/dev/vda\0");
    }

    #[test]
    fn a_command_line_that_linux_would_cut_is_refused() {
        let longest = "x".repeat(MAX_COMMAND_LINE);
        check(&longest).unwrap();
        assert!(matches!(check(&(longest + "x")), Err(Error::TooLong(2041))));
        assert!(matches!(check("quiet\0init=/bin/sh"), Err(Error::Nul(5))));
    }
}
