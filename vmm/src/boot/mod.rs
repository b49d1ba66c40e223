//! The boot of a Linux kernel by its 64-bit entry point (the kernel's Documentation/arch/x86/boot.rst, "64-bit Boot
//! Protocol"): what lies in memory and in the first processor's registers when it starts.
//!
//! Everything that the kernel reads once and then forgets is in the first MiB, which it keeps to itself anyway:
//!
//! ```text
//! 0x00500 ┬ global descriptor table          6 entries of 8 bytes
//! 0x07000 ┼ boot parameters ("zero page")    1 page
//! 0x09000 ┼ page tables                      3 pages: one each of levels 4, 3 and 2
//! 0x20000 ┼ command line                     at most 2,048 bytes
//! 0x9fc00 ┼ multiprocessor table             1 KiB, reserved
//! 0xa0000 ┴ end of conventional memory
//! ```

pub mod kernel;
pub mod mptable;
pub mod params;
pub mod registers;

/// The global descriptor table.
const GDT: u64 = 0x500;

/// The boot parameters.
const ZERO_PAGE: u64 = 0x7000;

/// The page tables: level 4, then level 3, then level 2.
const PAGE_TABLES: u64 = 0x9000;

/// The command line.
const COMMAND_LINE: u64 = 0x2_0000;

/// The multiprocessor table: the last KiB of conventional memory, where kernels look for it.
const MP_TABLE: u64 = CONVENTIONAL_END - MP_TABLE_SIZE;

/// The room for the multiprocessor table, of which 32 processors need 732 bytes (see [`mptable`]).
const MP_TABLE_SIZE: u64 = 0x400;

/// The end of conventional memory: above it a PC has its video memory and firmware.
const CONVENTIONAL_END: u64 = 0xa_0000;

/// The end of the first MiB.
const EXTENDED_START: u64 = 0x10_0000;
