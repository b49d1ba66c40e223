//! Checks of the KVM device.

use std::fs;
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use super::{Finding, Verdict, guest};

/// The interface version, which has not changed since 2007.
const API_VERSION: i32 = 12;

/// What the VMM uses of KVM, and what for.
const CAPABILITIES: [(Cap, &str); 14] = [
    (Cap::UserMemory, "guest memory"),
    (Cap::SetTssAddr, "processors without unrestricted guests"),
    (Cap::ExtCpuid, "the processor's identification"),
    (Cap::Irqchip, "the interrupt controllers"),
    (Cap::IrqRouting, "message-signalled interrupts"),
    (Cap::SignalMsi, "message-signalled interrupts"),
    (Cap::Irqfd, "interrupts from device threads"),
    (Cap::Ioeventfd, "notifications to device threads"),
    (Cap::IoeventfdNoLength, "notifications of PCI devices"),
    (Cap::ImmediateExit, "stopping processors"),
    (Cap::MpState, "starting processors"),
    (Cap::Xcrs, "the state of extended registers"),
    (Cap::TscDeadlineTimer, "the guest's timer"),
    (Cap::AdjustClock, "the guest's clock"),
];

/// One slot for low memory, one for high memory, and some for what a machine may be given later.
const MEMORY_SLOTS: usize = 32;

/// The device, and if it is there, what it can do.
pub fn check() -> Vec<Finding> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
            let verdict = absent(
                error.errno(),
                &cpuinfo,
                loaded("kvm_intel") || loaded("kvm_amd"),
            );
            return vec![Finding::new("KVM device", verdict)];
        }
    };
    let mut findings = vec![
        Finding::new("KVM device", version(kvm.get_api_version())),
        Finding::new("KVM capabilities", {
            let missing = CAPABILITIES
                .into_iter()
                .filter(|&(capability, _)| !kvm.check_extension(capability));
            capabilities(missing.collect(), kvm.get_nr_memslots())
        }),
    ];
    findings.push(Finding::new("ring 0", guest::check(kvm)));
    findings
}

/// Why the device cannot be opened.
fn absent(errno: i32, cpuinfo: &str, module_loaded: bool) -> Verdict {
    let flags = |flag: &str| {
        cpuinfo
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_whitespace().any(|word| word == flag))
    };
    let module = match (flags("vmx"), flags("svm")) {
        (true, _) => Some("kvm_intel"),
        (_, true) => Some("kvm_amd"),
        (false, false) => None,
    };
    match (errno, module) {
        (libc::EACCES | libc::EPERM, _) => Verdict::bad(
            "no permission to open /dev/kvm",
            "run as root; in a container, allow the device (docker run --device /dev/kvm)",
        ),
        (libc::ENOENT | libc::ENODEV | libc::ENXIO, Some(_)) if module_loaded => Verdict::bad(
            "KVM is loaded, but /dev/kvm is not here",
            "in a container, pass the device in; on a host: mknod /dev/kvm c 10 232",
        ),
        (libc::ENOENT | libc::ENODEV | libc::ENXIO, Some(module)) => Verdict::bad(
            format!(
                "no /dev/kvm: the processor can virtualise, but the module {module} is not loaded"
            ),
            format!(
                "modprobe {module}; if that fails, the kernel log says why (often: switched off in the firmware)"
            ),
        ),
        (libc::ENOENT | libc::ENODEV | libc::ENXIO, None) if flags("hypervisor") => Verdict::bad(
            "no /dev/kvm: this host is a virtual machine whose processor shows neither VT-x nor AMD-V",
            "switch nested virtualisation on in the hypervisor below, or take a bare-metal host",
        ),
        (libc::ENOENT | libc::ENODEV | libc::ENXIO, None) => Verdict::bad(
            "no /dev/kvm: the processor shows neither VT-x (vmx) nor AMD-V (svm)",
            "switch virtualisation on in the firmware (VT-x, SVM mode)",
        ),
        (errno, _) => Verdict::bad(
            format!(
                "cannot open /dev/kvm: {}",
                std::io::Error::from_raw_os_error(errno)
            ),
            "the kernel log may say more",
        ),
    }
}

fn version(version: i32) -> Verdict {
    if version == API_VERSION {
        Verdict::good(format!("/dev/kvm answers, interface version {version}"))
    } else {
        Verdict::bad(
            format!("/dev/kvm has interface version {version}, not {API_VERSION}"),
            "use Linux's own KVM",
        )
    }
}

fn capabilities(missing: Vec<(Cap, &str)>, slots: usize) -> Verdict {
    let mut problems: Vec<String> = missing
        .iter()
        .map(|(capability, purpose)| format!("{capability:?} ({purpose})"))
        .collect();
    if slots < MEMORY_SLOTS {
        problems.push(format!("{MEMORY_SLOTS} memory slots (there are {slots})"));
    }
    if problems.is_empty() {
        Verdict::good(format!("all {} that are needed", CAPABILITIES.len()))
    } else {
        Verdict::bad(
            format!("missing: {}", problems.join(", ")),
            "use Linux 5.11 or later, and its own KVM",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(verdict: Verdict) -> (String, String) {
        match verdict {
            Verdict::Bad { problem, remedy } => (problem, remedy.unwrap()),
            Verdict::Good(seen) => panic!("good: {seen}"),
        }
    }

    #[test]
    fn each_reason_for_an_absent_device_has_its_remedy() {
        let intel = "processor\t: 0\nflags\t\t: fpu vmx sse\n";
        let amd = "flags\t\t: fpu svm hypervisor\n";
        let virtual_machine = "flags\t\t: fpu hypervisor sse\n";
        let off = "model name\t: vmx svm\nflags\t\t: fpu sse\n";
        for (errno, cpuinfo, loaded, part, remedy) in [
            (libc::EACCES, intel, true, "permission", "root"),
            (
                libc::ENOENT,
                intel,
                false,
                "kvm_intel is not loaded",
                "modprobe kvm_intel",
            ),
            (
                libc::ENOENT,
                amd,
                false,
                "kvm_amd is not loaded",
                "modprobe kvm_amd",
            ),
            (libc::ENODEV, amd, true, "is not here", "mknod"),
            (
                libc::ENOENT,
                virtual_machine,
                false,
                "virtual machine",
                "nested",
            ),
            (libc::ENOENT, off, false, "neither VT-x", "firmware"),
            (libc::EIO, intel, true, "Input/output error", "kernel log"),
        ] {
            let (seen, help) = problem(absent(errno, cpuinfo, loaded));
            assert!(seen.contains(part), "{seen}");
            assert!(help.contains(remedy), "{help}");
        }
    }

    #[test]
    fn what_kvm_lacks_is_listed() {
        assert!(version(12).is_good());
        assert!(!version(11).is_good());
        assert!(capabilities(Vec::new(), 32).is_good());
        let (seen, _) = problem(capabilities(vec![(Cap::Irqfd, "interrupts")], 8));
        assert_eq!(
            seen,
            "missing: Irqfd (interrupts), 32 memory slots (there are 8)"
        );
    }
}
