//! The multiprocessor table (Intel MultiProcessor Specification 1.4): which processors and interrupt controllers there are.
//!
//! It says in a few hundred bytes what ACPI needs several tables and an interpreter for. The only device with an interrupt pin
//! is the serial port: everything on PCI has MSI-X. So the table leaves the I/O APIC out, whose 24 pins cost Linux 900 exits to
//! set up, and the serial port's interrupt takes the PC's older way, over the 8259s to the first processor ([`super::params`] tells
//! Linux to leave that way open).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{MP_TABLE, MP_TABLE_SIZE};
use crate::irq::SERIAL_GSI;
use crate::memory::{GuestRam, LOCAL_APIC};

/// The most processors of a machine: their entries fit in the table's room.
pub const MAX_PROCESSORS: u8 = 32;

const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
const PROCESSOR_SIZE: usize = 20;
const OTHER_SIZE: usize = 8;

/// 16 + 44 + 32 × 20 + 4 × 8 (bus, serial port, two local pins) = 732 bytes at most.
const _: () = assert!(
    POINTER_SIZE + HEADER_SIZE + MAX_PROCESSORS as usize * PROCESSOR_SIZE + 4 * OTHER_SIZE
        <= MP_TABLE_SIZE as usize
);

/// The revision of the specification, as both structures encode it.
const REVISION: u8 = 4;

/// The version register of the local APICs that KVM emulates.
const LOCAL_APIC_VERSION: u8 = 0x14;

/// The identification of the only bus in the table, and its kind, whose interrupts are edge-triggered and active high.
const BUS: u8 = 0;
const BUS_KIND: &[u8; 6] = b"ISA   ";

/// "All of them", as the destination of an interrupt.
const EVERY_APIC: u8 = 0xff;

/// Interrupt types (section 4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Writes the table for a number of processors, whose APIC identifications count from 0.
///
/// # Errors
///
/// The guest's memory ends below the table.
pub fn write(ram: &GuestRam, processors: u8) -> Result<(), GuestMemoryError> {
    ram.write_slice(&table(processors), GuestAddress(MP_TABLE))
}

/// The floating pointer structure with the configuration table behind it.
fn table(processors: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for id in 0..processors {
        // Enabled; the first one is the bootstrap processor. The signature is left to CPUID.
        let flags = if id == 0 { 0b11 } else { 0b01 };
        entries.extend([0, id, LOCAL_APIC_VERSION, flags]);
        entries.extend([0; 16]);
    }
    entries.extend([1, BUS]);
    entries.extend(BUS_KIND);
    // For the form's sake: without such an entry Linux warns, and makes up sixteen.
    let pin = SERIAL_GSI as u8;
    entries.extend([3, INT, 0, 0, BUS, pin, EVERY_APIC, pin]);
    entries.extend([4, EXT_INT, 0, 0, BUS, 0, EVERY_APIC, 0]);
    entries.extend([4, NMI, 0, 0, BUS, 0, EVERY_APIC, 1]);

    let count = u16::from(processors) + 4;
    let length = (HEADER_SIZE + entries.len()) as u16;
    let mut configuration = Vec::new();
    configuration.extend(b"PCMP");
    configuration.extend(length.to_le_bytes());
    configuration.extend([REVISION, 0]);
    configuration.extend(b"BULKHEADmicroVM     ");
    configuration.extend([0; 6]);
    configuration.extend(count.to_le_bytes());
    configuration.extend((LOCAL_APIC as u32).to_le_bytes());
    configuration.extend([0; 4]);
    configuration.extend(entries);
    configuration[7] = checksum(&configuration);

    let mut pointer = Vec::new();
    pointer.extend(b"_MP_");
    pointer.extend((MP_TABLE as u32 + POINTER_SIZE as u32).to_le_bytes());
    pointer.extend([(POINTER_SIZE / 16) as u8, REVISION]);
    pointer.extend([0; 6]);
    pointer[10] = checksum(&pointer);
    pointer.extend(configuration);
    pointer
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_structures_add_up_to_zero_and_know_their_length() {
        for processors in 1..=MAX_PROCESSORS {
            let table = table(processors);
            assert!(table.len() as u64 <= MP_TABLE_SIZE);
            let (pointer, configuration) = table.split_at(POINTER_SIZE);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(configuration), 0);
            let length = u16::from_le_bytes([configuration[4], configuration[5]]);
            assert_eq!(usize::from(length), configuration.len());
        }
    }

    #[test]
    fn entries_have_their_specified_sizes() {
        let table = table(3);
        let mut rest = &table[POINTER_SIZE + HEADER_SIZE..];
        let mut kinds = Vec::new();
        while let Some(&kind) = rest.first() {
            kinds.push(kind);
            rest = &rest[if kind == 0 {
                PROCESSOR_SIZE
            } else {
                OTHER_SIZE
            }..];
        }
        assert_eq!(kinds, [0, 0, 0, 1, 3, 4, 4]);
        let count = u16::from_le_bytes([table[POINTER_SIZE + 34], table[POINTER_SIZE + 35]]);
        assert_eq!(usize::from(count), kinds.len());
    }

    #[test]
    fn it_is_where_kernels_look() {
        let ram = crate::memory::create(1).unwrap();
        write(&ram, 2).unwrap();
        let mut signature = [0; 4];
        ram.read_slice(&mut signature, GuestAddress(639 * 1024))
            .unwrap();
        assert_eq!(&signature, b"_MP_");
    }
}
