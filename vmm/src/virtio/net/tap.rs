//! A queue of the host's tap: frames with a header before them, one for each read or write.

use std::ffi::CStr;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{
    IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4,
    TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6, c_short, ifreq, iovec,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::HEADER;

/// What is wrong with a descriptor.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The system does not know it for one.
    #[error("it is no tap that is attached to an interface (TUNGETIFF: {0})")]
    NoTap(Errno),
    /// It was made in another way.
    #[error(
        "its flags are {found:#x}; it must be made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, and with IFF_MULTI_QUEUE for several pairs"
    )]
    Flags {
        /// What it was made with.
        found: c_short,
    },
    /// It belongs to another interface than the first.
    #[error("it is a queue of {0:?}, not of the same tap as the first one")]
    Other(String),
    /// The system refused.
    #[error("{operation}: {source}")]
    System {
        /// What was asked.
        operation: &'static str,
        /// What it said.
        source: Errno,
    },
}

/// Pieces of memory for one read or write.
#[derive(Debug, Default)]
pub struct Vectors(pub Vec<iovec>);

// SAFETY: between two calls of the system, the pieces mean nothing to anybody: they are here only to be allocated once.
unsafe impl Send for Vectors {}

/// A queue of a tap.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
}

/// What the guest's driver takes of the work that the host's kernel otherwise does for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads(u32);

impl Offloads {
    /// Everything but the segmentation of UDP, which kernels before 6.2 do not know.
    pub const USUAL: Self = Self(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN);

    /// Everything.
    pub const ALL: Self = Self(Self::USUAL.0 | TUN_F_USO4 | TUN_F_USO6);

    /// What follows from the features of a driver. Without checksums, there is nothing else (section 5.1.3.1); the kernel
    /// knows the segmentation of UDP for both families or for none.
    pub fn from_features(features: u64) -> Self {
        let has = |feature: u32| features & 1 << feature != 0;
        if !has(VIRTIO_NET_F_GUEST_CSUM) {
            return Self(0);
        }
        let mut flags = TUN_F_CSUM;
        if has(VIRTIO_NET_F_GUEST_TSO4) {
            flags |= TUN_F_TSO4;
        }
        if has(VIRTIO_NET_F_GUEST_TSO6) {
            flags |= TUN_F_TSO6;
        }
        if flags != TUN_F_CSUM && has(VIRTIO_NET_F_GUEST_ECN) {
            flags |= TUN_F_TSO_ECN;
        }
        if has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6) {
            flags |= TUN_F_USO4 | TUN_F_USO6;
        }
        Self(flags)
    }

    /// Whether the guest may be given packets that are longer than the link allows.
    pub fn has_segmentation(self) -> bool {
        self.0 & !TUN_F_CSUM != 0
    }
}

impl Tap {
    /// Takes the queues of one tap over: they must all be of the same, and made as they should be.
    pub fn adopt(files: Vec<OwnedFd>) -> Result<Vec<Self>, (usize, Problem)> {
        let several = files.len() > 1;
        let mut first = None;
        let mut taps = Vec::new();
        for (index, file) in files.into_iter().enumerate() {
            let tap = Self { file };
            let name = tap.prepare(several).map_err(|problem| (index, problem))?;
            if *first.get_or_insert_with(|| name.clone()) != name {
                return Err((index, Problem::Other(name)));
            }
            taps.push(tap);
        }
        Ok(taps)
    }

    /// For tests: the end of a socket pair, of which nothing but frames can be had.
    #[cfg(test)]
    pub fn from_socket(file: OwnedFd) -> Self {
        Self { file }
    }

    /// Checks how the queue was made and makes it what the device needs. Returns the name of its interface.
    fn prepare(&self, several: bool) -> Result<String, Problem> {
        // SAFETY: an all-zero request is a valid one.
        let mut request: ifreq = unsafe { std::mem::zeroed() };
        self.ioctl(libc::TUNGETIFF, &raw mut request)
            .map_err(Problem::NoTap)?;
        // SAFETY: the kernel has filled the flags in.
        let found = unsafe { request.ifr_ifru.ifru_flags };
        let mut wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if several {
            wanted |= IFF_MULTI_QUEUE;
        }
        if i32::from(found) & wanted != wanted {
            return Err(Problem::Flags { found });
        }

        let system = |operation| move |source| Problem::System { operation, source };
        let mut length = HEADER as i32;
        self.ioctl(libc::TUNSETVNETHDRSZ, &raw mut length)
            .map_err(system("TUNSETVNETHDRSZ"))?;
        let flags = fcntl(&self.file, FcntlArg::F_GETFL).map_err(system("F_GETFL"))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&self.file, FcntlArg::F_SETFL(flags)).map_err(system("F_SETFL"))?;

        // SAFETY: the kernel ends the name by a zero byte, and all characters are of the same size.
        let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
        Ok(name.to_string_lossy().into_owned())
    }

    /// Has the kernel do what the guest does not, for all queues of the tap.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<(), Errno> {
        // SAFETY: the argument is a number.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads.0) };
        Errno::result(result).map(drop)
    }

    /// Has the kernel put frames into this queue, or not.
    pub fn set_attached(&self, attached: bool) -> Result<(), Errno> {
        // SAFETY: an all-zero request is a valid one.
        let mut request: ifreq = unsafe { std::mem::zeroed() };
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = flag as c_short;
        self.ioctl(libc::TUNSETQUEUE, &raw mut request)
    }

    /// Reads a frame with its header. What there is no room for is lost, of which the kernel does not tell.
    pub fn read(&self, vectors: &[iovec]) -> io::Result<usize> {
        // SAFETY: the vectors describe buffers of this process's, or guest memory, which is never unmapped.
        let call = || unsafe {
            libc::readv(
                self.file.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as i32,
            )
        };
        retry(call)
    }

    /// Writes a frame with its header.
    pub fn write(&self, vectors: &[iovec]) -> io::Result<usize> {
        // SAFETY: the vectors describe buffers of this process's, or guest memory, which is never unmapped.
        let call = || unsafe {
            libc::writev(
                self.file.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as i32,
            )
        };
        retry(call)
    }

    /// Makes a request whose argument is read, or written, by the kernel.
    fn ioctl<T>(&self, number: libc::Ioctl, argument: *mut T) -> Result<(), Errno> {
        // SAFETY: the callers' arguments are of the types that their requests take.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), number, argument) };
        Errno::result(result).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Makes a system call again for as long as signals interrupt it.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(value) => return Ok(value),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
