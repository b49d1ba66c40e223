//! Machines by themselves, without shim and agent.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_tests::ctr::World;
use bulkhead_vmm::control::{Boot, Event, Request, StopReason};
use bulkhead_vmm::launch;
use rustix::pipe::{PipeFlags, pipe_with};

/// What the guest's kernel says until it panics, because there is no root file system.
fn console(world: &World, vcpus: u8) -> String {
    let payload = &world.site().payload;
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let kernel = File::open(payload.join("lib/vmlinux")).unwrap();
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let descriptors: [OwnedFd; 3] = [kvm.unwrap().into(), kernel.into(), writer];
    let boot = Boot {
        vcpus,
        memory_mib: 512,
        cmdline: "console=ttyS0 panic=-1".into(),
        ports: None,
        disks: Vec::new(),
        nics: Vec::new(),
    };
    let uid = launch::unique_uid(launch::DEFAULT_UID_BASE).unwrap();
    let (_vmm, control) = launch::launch(&payload.join("bin/bulkhead-vmm"), uid).unwrap();
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    control.send(&Request::Boot(boot), &borrowed).unwrap();
    // The VMM's is then the only one.
    drop(descriptors);
    let mut text = String::new();
    File::from(reader).read_to_string(&mut text).unwrap();
    let (started, _) = control.receive::<Event>().unwrap();
    assert!(
        matches!(started, Event::Started { .. }),
        "{started:?}: {text}"
    );
    let (stopped, _) = control.receive::<Event>().unwrap();
    let reason = StopReason::Panic;
    assert_eq!(stopped, Event::Stopped { reason }, "{text}");
    text
}

#[test]
fn a_kernel_finds_all_its_processors() {
    let world = World::new().unwrap();
    for vcpus in [1, 3, 32] {
        let text = console(&world, vcpus);
        let found = format!("Brought up 1 node, {vcpus} CPU");
        assert!(text.contains(&found), "{text}");
    }
    world.finish().unwrap();
}
