//! Guest kernels made by hand.

/// Where the kernel is loaded and entered: 16 MiB, as Linux.
const ADDRESS: u64 = 16 << 20;

/// Length of the ELF header and of one program header, in bytes.
const ELF: usize = 64;
const PROGRAM: usize = 56;

/// An ELF executable for x86-64 that halts its processor for ever (`cli; 1: hlt; jmp 1b`).
pub fn idle() -> Vec<u8> {
    let code = [0xfa, 0xf4, 0xeb, 0xfd];
    let offset = (ELF + PROGRAM) as u64;
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    let half = |file: &mut Vec<u8>, value: u16| file.extend_from_slice(&value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend_from_slice(&value.to_le_bytes());
    let long = |file: &mut Vec<u8>, value: u64| file.extend_from_slice(&value.to_le_bytes());
    half(&mut file, 2); // e_type: ET_EXEC
    half(&mut file, 62); // e_machine: EM_X86_64
    word(&mut file, 1); // e_version
    long(&mut file, ADDRESS); // e_entry
    long(&mut file, ELF as u64); // e_phoff
    long(&mut file, 0); // e_shoff
    word(&mut file, 0); // e_flags
    half(&mut file, ELF as u16); // e_ehsize
    half(&mut file, PROGRAM as u16); // e_phentsize
    half(&mut file, 1); // e_phnum
    half(&mut file, 64); // e_shentsize
    half(&mut file, 0); // e_shnum
    half(&mut file, 0); // e_shstrndx
    word(&mut file, 1); // p_type: PT_LOAD
    word(&mut file, 5); // p_flags: readable and executable
    long(&mut file, offset); // p_offset
    long(&mut file, ADDRESS); // p_vaddr
    long(&mut file, ADDRESS); // p_paddr
    long(&mut file, code.len() as u64); // p_filesz
    long(&mut file, code.len() as u64); // p_memsz
    long(&mut file, 4096); // p_align
    file.extend_from_slice(&code);
    file
}
