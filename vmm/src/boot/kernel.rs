//! The kernel image: an uncompressed ELF file, whose segments are placed where they ask to be.
//!
//! They are copied. Mapping them from the file would save that, but the kernel patches nearly each page of its code when it
//! starts (for the processor that it finds), and copying a page on a write costs several exits.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};

use libc::{Elf64_Ehdr, Elf64_Phdr};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::EXTENDED_START;
use super::registers::IDENTITY_MAPPED;
use crate::memory::GuestRam;

/// More program headers than any kernel has (Linux has 4 or 5).
const MAX_PROGRAM_HEADERS: u16 = 64;

/// Why a kernel image is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the kernel image is no regular file: give the path of a vmlinux")]
    NotAFile,
    #[error(
        "the kernel image is truncated: it has {size} bytes, and its {part} ends at byte {end}"
    )]
    Truncated {
        size: u64,
        part: &'static str,
        end: u64,
    },
    #[error(
        "the kernel image is no ELF file (it starts with {0:02x?}): give an uncompressed vmlinux, not a bzImage"
    )]
    NotElf([u8; 4]),
    #[error(
        "the kernel image is for another architecture: its ELF {field} is {found}, x86-64 has {wanted}"
    )]
    Architecture {
        field: &'static str,
        found: u16,
        wanted: u16,
    },
    #[error("the kernel image is no kernel: its ELF {field} is {value:#x}")]
    NotAKernel { field: &'static str, value: u64 },
    #[error(
        "segment {index} of the kernel image wants the guest's memory from {start:#x} to {end:#x}, and the kernel may \
         have it from {EXTENDED_START:#x} to {limit:#x}: use a kernel linked for these addresses, or give the machine more memory"
    )]
    Placement {
        index: u16,
        start: u64,
        end: u64,
        limit: u64,
    },
    #[error("cannot {operation} the kernel image: {source}")]
    System {
        operation: &'static str,
        source: io::Error,
    },
    #[error("cannot write the kernel to the guest's memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Places the kernel in fresh guest memory and returns the address at which it starts.
///
/// # Errors
///
/// The file is no x86-64 ELF executable, is shorter than its headers say, does not fit, or cannot be read.
pub fn load(ram: &GuestRam, file: &File) -> Result<u64, Error> {
    let metadata = file.metadata().map_err(system("look at"))?;
    if !metadata.file_type().is_file() {
        return Err(Error::NotAFile);
    }
    let image = Image {
        file,
        size: metadata.size(),
    };
    let header: Elf64_Ehdr = image.read(0, "ELF header")?;
    check_header(&header)?;

    let low_ram = ram.iter().next().map_or(0, GuestMemoryRegion::len);
    let limit = low_ram.min(IDENTITY_MAPPED);
    let mut entered = false;
    for index in 0..header.e_phnum {
        let at = u64::from(index) * size_of::<Elf64_Phdr>() as u64;
        let program: Elf64_Phdr =
            image.read(header.e_phoff.saturating_add(at), "program header table")?;
        if program.p_type != libc::PT_LOAD {
            continue;
        }
        let start = program.p_paddr;
        let end = start.saturating_add(program.p_memsz.max(program.p_filesz));
        if start < EXTENDED_START || end > limit {
            return Err(Error::Placement {
                index,
                start,
                end,
                limit,
            });
        }
        entered |= (start..end).contains(&header.e_entry);
        image.place(ram, &program)?;
    }
    if !entered {
        return Err(Error::NotAKernel {
            field: "entry point, which is in no segment,",
            value: header.e_entry,
        });
    }
    Ok(header.e_entry)
}

/// Checks what the ELF header says of the file as a whole.
fn check_header(header: &Elf64_Ehdr) -> Result<(), Error> {
    let [a, b, c, d, class, data, ..] = header.e_ident;
    if [a, b, c, d] != [libc::ELFMAG0, libc::ELFMAG1, libc::ELFMAG2, libc::ELFMAG3] {
        return Err(Error::NotElf([a, b, c, d]));
    }
    let architecture = [
        ("class", class.into(), libc::ELFCLASS64.into()),
        ("data encoding", data.into(), libc::ELFDATA2LSB.into()),
        ("machine", header.e_machine, libc::EM_X86_64),
    ];
    for (field, found, wanted) in architecture {
        if found != wanted {
            return Err(Error::Architecture {
                field,
                found,
                wanted,
            });
        }
    }
    let size = usize::from(header.e_phentsize) == size_of::<Elf64_Phdr>();
    let count = (1..=MAX_PROGRAM_HEADERS).contains(&header.e_phnum);
    let kernel = [
        ("type", header.e_type, header.e_type == libc::ET_EXEC),
        ("program header size", header.e_phentsize, size),
        ("program header count", header.e_phnum, count),
    ];
    for (field, value, valid) in kernel {
        if !valid {
            return Err(Error::NotAKernel {
                field,
                value: value.into(),
            });
        }
    }
    Ok(())
}

/// A structure of an ELF file.
///
/// # Safety
///
/// Every value of its bytes is a value of the type.
unsafe trait Plain: Copy {}

// SAFETY: all fields are integers or arrays of integers.
unsafe impl Plain for Elf64_Ehdr {}

// SAFETY: all fields are integers.
unsafe impl Plain for Elf64_Phdr {}

/// The file and its size.
struct Image<'a> {
    file: &'a File,
    size: u64,
}

impl Image<'_> {
    /// Reads a structure, which is in the named part of the file.
    fn read<T: Plain>(&self, offset: u64, part: &'static str) -> Result<T, Error> {
        let mut bytes = vec![0; size_of::<T>()];
        self.check(offset, bytes.len() as u64, part)?;
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(system("read"))?;
        // SAFETY: there are as many bytes as T has, and any bytes are a T.
        Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    /// Checks that the file holds a range.
    fn check(&self, offset: u64, length: u64, part: &'static str) -> Result<(), Error> {
        let end = offset.saturating_add(length);
        if end > self.size {
            return Err(Error::Truncated {
                size: self.size,
                part,
                end,
            });
        }
        Ok(())
    }

    /// Copies a segment, whose addresses are in the guest's memory, to where it belongs.
    fn place(&self, ram: &GuestRam, segment: &Elf64_Phdr) -> Result<(), Error> {
        self.check(segment.p_offset, segment.p_filesz, "segment")?;
        let mut file = self.file;
        file.seek(SeekFrom::Start(segment.p_offset))
            .map_err(system("read"))?;
        let start = GuestAddress(segment.p_paddr);
        Ok(ram.read_exact_volatile_from(start, &mut file, segment.p_filesz as usize)?)
    }
}

fn system(operation: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { operation, source }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::memory;

    const PAGE: u64 = 4096;

    const ENTRY: u64 = 0x20_0000;

    /// Where the segments' bytes start in the test's files, congruent to their addresses.
    const CONTENT: u64 = PAGE;

    fn header(segments: u16) -> Elf64_Ehdr {
        // SAFETY: zero is a value of each of its integers.
        let mut header: Elf64_Ehdr = unsafe { std::mem::zeroed() };
        header.e_ident[..6].copy_from_slice(&[
            libc::ELFMAG0,
            libc::ELFMAG1,
            libc::ELFMAG2,
            libc::ELFMAG3,
            libc::ELFCLASS64,
            libc::ELFDATA2LSB,
        ]);
        header.e_type = libc::ET_EXEC;
        header.e_machine = libc::EM_X86_64;
        header.e_entry = ENTRY;
        header.e_phoff = size_of::<Elf64_Ehdr>() as u64;
        header.e_phentsize = size_of::<Elf64_Phdr>() as u16;
        header.e_phnum = segments;
        header
    }

    fn segment(address: u64, in_file: u64, in_memory: u64) -> Elf64_Phdr {
        Elf64_Phdr {
            p_type: libc::PT_LOAD,
            p_flags: 0,
            p_offset: CONTENT + address % PAGE,
            p_vaddr: address,
            p_paddr: address,
            p_filesz: in_file,
            p_memsz: in_memory,
            p_align: PAGE,
        }
    }

    /// A file whose byte at each offset behind the headers is the page's number plus one.
    fn file(header: &Elf64_Ehdr, segments: &[Elf64_Phdr], pages: u8) -> File {
        fn bytes<T: Plain>(value: &T) -> &[u8] {
            // SAFETY: the structures have no padding, so that each of their bytes is initialised.
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
        }
        let mut content = bytes(header).to_vec();
        for segment in segments {
            content.extend(bytes(segment));
        }
        content.resize(CONTENT as usize, 0);
        for page in 1..=pages {
            content.extend([page; PAGE as usize]);
        }
        let mut file = File::from(memfd_create(c"kernel", MFdFlags::empty()).unwrap());
        file.write_all(&content).unwrap();
        file
    }

    fn byte(ram: &GuestRam, address: u64) -> u8 {
        ram.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn segments_are_where_they_belong_and_nothing_else_is() {
        let ram = memory::create(4).unwrap();
        let start = ENTRY + 0x800;
        // Half a page, a page, half a page; then a page that is memory only.
        let segment = segment(start, 2 * PAGE, 3 * PAGE);
        let mut header = header(1);
        header.e_entry = start;
        assert_eq!(load(&ram, &file(&header, &[segment], 4)).unwrap(), start);
        assert_eq!(byte(&ram, start - 1), 0);
        assert_eq!(byte(&ram, start), 1);
        assert_eq!(byte(&ram, ENTRY + PAGE), 2);
        assert_eq!(byte(&ram, start + 2 * PAGE - 1), 3);
        assert_eq!(byte(&ram, start + 2 * PAGE), 0);
    }

    #[test]
    fn an_image_that_is_no_kernel_is_refused_by_name() {
        let ram = memory::create(4).unwrap();
        let whole = [segment(ENTRY, PAGE, PAGE)];
        let refused = |header: Elf64_Ehdr, segments: &[Elf64_Phdr]| {
            load(&ram, &file(&header, segments, 1))
                .unwrap_err()
                .to_string()
        };
        let mut other = header(1);
        other.e_ident[..4].copy_from_slice(b"MZ\x90\0");
        assert!(refused(other, &whole).contains("[4d, 5a, 90, 00]"));
        let mut other = header(1);
        other.e_machine = libc::EM_AARCH64;
        assert!(refused(other, &whole).contains("ELF machine is 183, x86-64 has 62"));
        let mut other = header(1);
        other.e_ident[4] = libc::ELFCLASS32;
        assert!(refused(other, &whole).contains("ELF class is 1"));
        let mut other = header(1);
        other.e_type = libc::ET_REL;
        assert!(refused(other, &whole).contains("ELF type is 0x1"));
        assert!(refused(header(0), &[]).contains("program header count is 0x0"));
        assert!(refused(header(u16::MAX), &whole).contains("program header count is 0xffff"));
        let mut other = header(1);
        other.e_entry = ENTRY + PAGE;
        assert!(refused(other, &whole).contains("in no segment, is 0x201000"));
    }

    #[test]
    fn a_truncated_image_is_refused_with_the_part_that_is_missing() {
        let ram = memory::create(4).unwrap();
        let parts = [
            (0, "ELF header"),
            (63, "ELF header"),
            (64, "program header"),
            (8191, "segment"),
        ];
        for (size, part) in parts {
            let file = file(&header(1), &[segment(ENTRY, PAGE, PAGE)], 1);
            load(&ram, &file).unwrap();
            file.set_len(size).unwrap();
            let error = load(&ram, &file).unwrap_err().to_string();
            assert!(
                error.contains("truncated") && error.contains(part),
                "{size}: {error}"
            );
        }
        let mut far = segment(ENTRY, PAGE, PAGE);
        far.p_offset = u64::MAX;
        assert!(matches!(
            load(&ram, &file(&header(1), &[far], 1)),
            Err(Error::Truncated { .. })
        ));
        let mut far = header(1);
        far.e_phoff = u64::MAX;
        assert!(matches!(
            load(&ram, &file(&far, &[], 1)),
            Err(Error::Truncated { .. })
        ));
    }

    #[test]
    fn a_segment_outside_its_room_is_refused() {
        let ram = memory::create(4).unwrap();
        for (address, size) in [
            (0, PAGE),
            (0xf_f000, PAGE),
            (4 << 20, 1),
            (3 << 20, 2 << 20),
            (ENTRY, u64::MAX),
        ] {
            let file = file(&header(1), &[segment(address, 16, size)], 1);
            let error = load(&ram, &file).unwrap_err();
            assert!(
                matches!(
                    error,
                    Error::Placement {
                        limit: 0x40_0000,
                        ..
                    }
                ),
                "{error}"
            );
        }
    }

    #[test]
    fn only_a_regular_file_is_a_kernel() {
        let ram = memory::create(4).unwrap();
        let device = File::open("/dev/zero").unwrap();
        assert!(matches!(load(&ram, &device), Err(Error::NotAFile)));
    }
}
