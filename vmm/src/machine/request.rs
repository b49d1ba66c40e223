//! What can be wrong with a request to boot, before anything is built.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use nix::errno::Errno;

use crate::boot::mptable::MAX_PROCESSORS;
use crate::boot::params;
use crate::control::{Boot, Disk, Nic, Request};
use crate::memory::MIB;

/// The least memory of a machine, in MiB: one for what the boot needs, one for a kernel.
const MIN_MEMORY_MIB: u32 = 2;

/// Why a request is refused: its field, the value, and what would be valid.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the first request must be to boot a machine, and it is {0:?}")]
    NotBoot(Box<Request>),
    #[error("vcpus is {0}: a machine has 1 to {MAX_PROCESSORS} virtual processors")]
    Vcpus(u8),
    #[error("memory_mib is {0}: a machine has at least {MIN_MEMORY_MIB} MiB of memory")]
    TooLittleMemory(u32),
    #[error(
        "memory_mib is {wanted}: the host has {available} MiB; ask for less, or use a larger host"
    )]
    TooMuchMemory { wanted: u32, available: u64 },
    #[error("cannot tell how much memory the host has: {0}")]
    HostMemory(Errno),
    #[error(transparent)]
    Cmdline(#[from] params::Error),
    #[error("disk {id:?}: queues is {queues}: it has 1 to {vcpus}, one for each virtual processor")]
    Queues { id: String, queues: u16, vcpus: u8 },
    #[error(
        "network interface {name:?}: pairs is {pairs}: it has 1 to {vcpus}, one for each virtual processor"
    )]
    Pairs { name: String, pairs: u16, vcpus: u8 },
    #[error("{found} descriptors came with the request, and it speaks of {wanted}: {of}")]
    Descriptors {
        found: usize,
        wanted: usize,
        of: &'static str,
    },
}

/// The descriptors of a request to boot.
#[derive(Debug)]
pub struct Descriptors {
    pub kvm: OwnedFd,
    pub kernel: OwnedFd,
    pub console: OwnedFd,
    /// The extents of each disk.
    pub disks: Vec<Vec<OwnedFd>>,
    /// The tap's queues of each network interface.
    pub nics: Vec<Vec<OwnedFd>>,
}

/// Checks a request to boot and sorts its descriptors.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn check(boot: &Boot, descriptors: Vec<OwnedFd>) -> Result<Descriptors, Error> {
    if !(1..=MAX_PROCESSORS).contains(&boot.vcpus) {
        return Err(Error::Vcpus(boot.vcpus));
    }
    if boot.memory_mib < MIN_MEMORY_MIB {
        return Err(Error::TooLittleMemory(boot.memory_mib));
    }
    let available = host_memory_mib().map_err(Error::HostMemory)?;
    if u64::from(boot.memory_mib) > available {
        return Err(Error::TooMuchMemory {
            wanted: boot.memory_mib,
            available,
        });
    }
    params::check(&boot.cmdline)?;
    for disk in &boot.disks {
        check_disk(disk, boot.vcpus)?;
    }

    for nic in &boot.nics {
        check_nic(nic, boot.vcpus)?;
    }

    let extents: usize = boot.disks.iter().map(|disk| disk.extents.len()).sum();
    let taps: usize = boot.nics.iter().map(|nic| usize::from(nic.pairs)).sum();
    let count = Error::Descriptors {
        found: descriptors.len(),
        wanted: 3 + extents + taps,
        of: "/dev/kvm, the kernel, the console, each disk's extents, and each network interface's pairs",
    };
    if descriptors.len() != 3 + extents + taps {
        return Err(count);
    }
    let mut descriptors = VecDeque::from(descriptors);
    let (Some(kvm), Some(kernel), Some(console)) = (
        descriptors.pop_front(),
        descriptors.pop_front(),
        descriptors.pop_front(),
    ) else {
        return Err(count);
    };
    let disks = boot
        .disks
        .iter()
        .map(|disk| descriptors.drain(..disk.extents.len()).collect())
        .collect();
    let nics = boot
        .nics
        .iter()
        .map(|nic| descriptors.drain(..usize::from(nic.pairs)).collect())
        .collect();
    Ok(Descriptors {
        kvm,
        kernel,
        console,
        disks,
        nics,
    })
}

/// Checks what a disk must fit the machine in; the rest is checked by its device.
///
/// # Errors
///
/// It has no queue, or more queues than there are processors.
pub fn check_disk(disk: &Disk, vcpus: u8) -> Result<(), Error> {
    if !(1..=u16::from(vcpus)).contains(&disk.queues) {
        return Err(Error::Queues {
            id: disk.id.clone(),
            queues: disk.queues,
            vcpus,
        });
    }
    Ok(())
}

/// Checks what a network interface must fit the machine in; the rest is checked by its device.
///
/// # Errors
///
/// It has no pair of queues, or more pairs than there are processors.
pub fn check_nic(nic: &Nic, vcpus: u8) -> Result<(), Error> {
    if !(1..=u16::from(vcpus)).contains(&nic.pairs) {
        return Err(Error::Pairs {
            name: nic.name.clone(),
            pairs: nic.pairs,
            vcpus,
        });
    }
    Ok(())
}

/// The host's memory in MiB, without swap.
fn host_memory_mib() -> Result<u64, Errno> {
    let info = nix::sys::sysinfo::sysinfo()?;
    Ok(info.ram_total() / MIB)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Extent, Sources};

    fn disk(extents: usize) -> Disk {
        Disk {
            id: "root".into(),
            read_only: true,
            queues: 1,
            extents: vec![
                Extent {
                    offset: 0,
                    length: 512
                };
                extents
            ],
        }
    }

    fn boot(disks: Vec<Disk>) -> Boot {
        Boot {
            vcpus: 2,
            memory_mib: 64,
            cmdline: "quiet".into(),
            ports: None,
            disks,
            nics: vec![],
        }
    }

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| nix::unistd::pipe().unwrap().0).collect()
    }

    fn refusal(change: impl FnOnce(&mut Boot)) -> String {
        let mut boot = boot(vec![]);
        change(&mut boot);
        check(&boot, descriptors(3)).unwrap_err().to_string()
    }

    fn nic(pairs: u16) -> Nic {
        Nic {
            name: "eth0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            pairs,
            sources: Sources::Mac,
        }
    }

    #[test]
    fn descriptors_go_to_disks_and_interfaces_in_order() {
        use std::os::fd::AsRawFd;
        let descriptors = descriptors(9);
        let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let mut boot = boot(vec![disk(2), disk(1)]);
        boot.nics = vec![nic(1), nic(2)];
        let sorted = check(&boot, descriptors).unwrap();
        assert_eq!(sorted.kvm.as_raw_fd(), numbers[0]);
        assert_eq!(sorted.console.as_raw_fd(), numbers[2]);
        let groups = sorted.disks.iter().chain(&sorted.nics);
        let groups: Vec<Vec<_>> = groups
            .map(|group| group.iter().map(AsRawFd::as_raw_fd).collect())
            .collect();
        let expected = [3..5, 5..6, 6..7, 7..9].map(|range| &numbers[range]);
        assert_eq!(groups, expected);
    }

    #[test]
    fn a_refusal_names_field_value_and_remedy() {
        for vcpus in [0, 33, 255] {
            let text = refusal(|boot| boot.vcpus = vcpus);
            assert!(text.starts_with(&format!("vcpus is {vcpus}: ")), "{text}");
            assert!(text.contains("1 to 32"), "{text}");
        }
        let text = refusal(|boot| boot.memory_mib = 1);
        assert!(
            text.contains("memory_mib is 1: ") && text.contains("at least 2 MiB"),
            "{text}"
        );
        let text = refusal(|boot| boot.memory_mib = u32::MAX);
        assert!(
            text.contains("memory_mib is 4294967295: the host has "),
            "{text}"
        );
        let text = refusal(|boot| boot.cmdline = "x".repeat(2048));
        assert!(text.contains("cmdline has 2048 bytes"), "{text}");
        let mut too_many = disk(1);
        too_many.queues = 3;
        let text = refusal(|boot| boot.disks = vec![too_many]);
        assert!(
            text.contains(r#"disk "root": queues is 3: it has 1 to 2"#),
            "{text}"
        );
        let text = refusal(|boot| boot.nics = vec![nic(3)]);
        assert!(
            text.contains(r#"interface "eth0": pairs is 3: it has 1 to 2"#),
            "{text}"
        );
        let text = refusal(|boot| boot.disks = vec![disk(2)]);
        assert!(
            text.contains("3 descriptors") && text.contains("speaks of 5"),
            "{text}"
        );
    }
}
