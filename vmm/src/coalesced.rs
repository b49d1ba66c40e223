//! Writes that KVM keeps instead of leaving the guest for each of them.
//!
//! Before every access to a configuration register of PCI, a guest writes that register's number to a port, and nothing comes
//! of this write by itself. KVM puts such writes into a ring (KVM's API documentation, section 4.117), which is emptied when the
//! guest is left for the access itself: a kernel that looks for devices is left half as often.

use std::fmt;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{IoEventAddress, VcpuFd, VmFd};

/// The page's size, in bytes.
const PAGE: usize = 4096;

/// Entries in the ring.
const ENTRIES: usize =
    (PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>();

/// The ring of a machine, which all of its processors write to.
pub struct Ring {
    /// The page that KVM writes, and this process reads.
    page: NonNull<kvm_coalesced_mmio_ring>,
}

// SAFETY: the page belongs to the whole process, and whoever has the ring is alone with this end of it.
unsafe impl Send for Ring {}

impl fmt::Debug for Ring {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    /// Has KVM keep what is written to `length` ports from `port` on. Any of the machine's processors gives access to the ring. There
    /// may be one ring for a machine.
    ///
    /// # Errors
    ///
    /// KVM refuses, or the process has no room for a page.
    pub fn new(
        vm: &VmFd,
        vcpu: &VcpuFd,
        port: u16,
        length: u32,
    ) -> Result<Self, kvm_ioctls::Error> {
        let offset = PAGE * KVM_COALESCED_MMIO_PAGE_OFFSET as usize;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        let page = match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => page.cast(),
            _ => return Err(kvm_ioctls::Error::last()),
        };
        let ring = Self { page };
        vm.register_coalesced_mmio(IoEventAddress::Pio(port.into()), length)?;
        Ok(ring)
    }

    /// Takes out all writes, oldest first, and gives each one's port and bytes to `write`.
    pub fn drain(&mut self, mut write: impl FnMut(u16, &[u8])) {
        let page = self.page.as_ptr();
        // SAFETY: both are aligned words of the page, which is mapped as long as this value lives; whoever else touches them,
        // the kernel, does so by whole words.
        let (first, last) = unsafe {
            (
                AtomicU32::from_ptr(&raw mut (*page).first),
                AtomicU32::from_ptr(&raw mut (*page).last),
            )
        };
        loop {
            let index = first.load(Ordering::Relaxed) as usize;
            // The kernel counts an entry after it has written it.
            if index == last.load(Ordering::Acquire) as usize || index >= ENTRIES {
                return;
            }
            // SAFETY: the entries begin behind the header, and this is one of them, within the page. Between `first` and `last`
            // the kernel does not write.
            let entry = unsafe {
                let entries = page.add(1).cast::<kvm_coalesced_mmio>();
                entries.add(index).read()
            };
            let length = entry.data.len().min(entry.len as usize);
            // Only ports are kept, and they have 16 bits.
            write(entry.phys_addr as u16, &entry.data[..length]);
            first.store(((index + 1) % ENTRIES) as u32, Ordering::Release);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and nobody has a reference into it.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}
