//! The first processor's state when it enters the kernel: 64-bit mode, with the first GiB mapped to itself.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{GDT, PAGE_TABLES, ZERO_PAGE};
use crate::memory::GuestRam;

/// How much of the guest's memory the page tables map to itself, in bytes: one level 2 table of 512 entries of 2 MiB.
pub const IDENTITY_MAPPED: u64 = 1 << 30;

const PAGE: u64 = 4096;
const LEVEL_4: u64 = PAGE_TABLES;
const LEVEL_3: u64 = PAGE_TABLES + PAGE;
const LEVEL_2: u64 = PAGE_TABLES + 2 * PAGE;

/// Page table entries (Intel SDM volume 3, section 4.5).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;

/// Control registers and the extended feature enable register.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// The flag that is always set in RFLAGS.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// The selectors that the boot protocol asks for (`__BOOT_CS` and `__BOOT_DS`), with the task segment behind them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Segment types (Intel SDM volume 3, sections 3.4.5.1 and 3.5): already accessed, so that nobody needs to write that.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TASK: u8 = 0xb;

/// Writes the descriptor table and the page tables.
///
/// # Errors
///
/// The guest's memory ends below them.
pub fn write_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let task = descriptor(&task_segment());
    let table = [
        0,
        0,
        descriptor(&code_segment()),
        descriptor(&data_segment()),
        task,
        0,
    ];
    ram.write_obj(table, GuestAddress(GDT))?;

    let table = |address| address | PRESENT | WRITABLE;
    ram.write_obj(table(LEVEL_3), GuestAddress(LEVEL_4))?;
    ram.write_obj(table(LEVEL_2), GuestAddress(LEVEL_3))?;
    let pages: Vec<u8> = (0..512u64)
        .flat_map(|page| (table(page << 21) | LARGE).to_le_bytes())
        .collect();
    ram.write_slice(&pages, GuestAddress(LEVEL_2))
}

/// Changes the system registers of a processor after reset to those with which the kernel is entered.
pub fn enter_long_mode(sregs: &mut kvm_sregs) {
    sregs.cs = code_segment();
    sregs.ds = data_segment();
    sregs.es = data_segment();
    sregs.fs = data_segment();
    sregs.gs = data_segment();
    sregs.ss = data_segment();
    sregs.tr = task_segment();
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 6 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = LEVEL_4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// The general registers: the entry point, and the address of the boot parameters.
pub fn general(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

fn code_segment() -> kvm_segment {
    kvm_segment {
        selector: CODE,
        type_: TYPE_CODE,
        s: 1,
        l: 1,
        ..flat()
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        selector: DATA,
        type_: TYPE_DATA,
        s: 1,
        db: 1,
        ..flat()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        selector: TASK,
        type_: TYPE_BUSY_TASK,
        ..flat()
    }
}

/// A present segment of 4 GiB at address 0.
fn flat() -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        present: 1,
        g: 1,
        ..Default::default()
    }
}

/// A segment (at address 0) as the descriptor table has it (Intel SDM volume 3, section 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit >> 12);
    let flag = |value: u8, bit: u32| u64::from(value) << bit;
    (limit & 0xffff)
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.dpl, 45)
        | flag(segment.present, 47)
        | (limit >> 16) << 48
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn descriptors_are_encoded_as_the_manual_says() {
        assert_eq!(descriptor(&code_segment()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task_segment()), 0x008f_8b00_0000_ffff);
    }

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let ram = memory::create(1).unwrap();
        write_tables(&ram).unwrap();
        let entry = |address| ram.read_obj::<u64>(GuestAddress(address)).unwrap();
        let next = |address| entry(address) & !0xfff;
        let level_2 = next(next(PAGE_TABLES));
        for page in [0u64, 1, 511] {
            let mapped = entry(level_2 + page * 8);
            assert_eq!(mapped, page << 21 | LARGE | WRITABLE | PRESENT);
        }
    }

    #[test]
    fn the_tables_do_not_overlap() {
        const { assert!(GDT + 6 * 8 <= ZERO_PAGE) }
        const { assert!(ZERO_PAGE + PAGE <= LEVEL_4) }
        const { assert!(LEVEL_2 + PAGE <= super::super::COMMAND_LINE) }
    }
}
