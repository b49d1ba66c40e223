//! Machines with guests of a few instructions: what runs, how it ends, and what is refused.

mod guest;

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bulkhead_vmm::control::{Dropped, Event, Nic, Request, Sources, StopReason};
use bulkhead_vmm::launch::Exit;
use guest::{ENTRY, HALT, Machine, NOWHERE, RESET, device, disk, file, kernel, print, small, wait};

#[test]
fn a_guest_prints_and_resets() {
    let code = [print("hello").as_slice(), &RESET, &HALT].concat();
    let (reason, console) = Machine::run(&code).started().end();
    assert_eq!(reason, StopReason::Reset);
    assert_eq!(console, "hello");
}

#[test]
fn a_triple_fault_ends_the_machine() {
    // There is no interrupt table: the fault's handler is a fault, and so is that one's.
    let (reason, console) = Machine::run(&[0x0f, 0x0b]).started().end();
    assert_eq!((reason, console.as_str()), (StopReason::TripleFault, ""));
}

#[test]
fn where_nobody_answers_there_are_ones() {
    let [a, b, c, d] = NOWHERE.to_le_bytes();
    let code = [
        &[0xe5, 0x92, 0x89, 0xc3][..],   // in eax, 0x92; mov ebx, eax
        &[0x23, 0x1c, 0x25, a, b, c, d], // and ebx, [NOWHERE]
        &[0x89, 0x1c, 0x25, a, b, c, d], // mov [NOWHERE], ebx
        &[0x83, 0xc3, 0x01],             // add ebx, 1
        &[0x75, 0x07],                   // jnz over the print
        &print("1"),
        &RESET,
        &HALT,
    ]
    .concat();
    let (reason, console) = Machine::run(&code).started().end();
    assert_eq!((reason, console.as_str()), (StopReason::Reset, "1"));
}

#[test]
fn what_is_written_to_the_pci_address_port_arrives_in_order() {
    // More than KVM keeps, then the address of slot 1, where pvpanic is (1b36:0011).
    let code = [
        &[0xb9, 0x90, 0x01, 0x00, 0x00][..], // mov ecx, 400
        &[0x66, 0xba, 0xf8, 0x0c],           // mov dx, 0xcf8
        &[0xb8, 0x00, 0x00, 0x00, 0x80],     // mov eax, 0x80000000
        &[0xef, 0xff, 0xc9, 0x75, 0xfb],     // out dx, eax; dec ecx; jnz out
        &[0xb8, 0x00, 0x08, 0x00, 0x80],     // mov eax, 0x80000800
        &[0xef],                             // out dx, eax
        &[0x66, 0xba, 0xfc, 0x0c],           // mov dx, 0xcfc
        &[0xed],                             // in eax, dx
        &[0x3d, 0x36, 0x1b, 0x11, 0x00],     // cmp eax, 0x00111b36
        &[0x75, 0x07],                       // jnz over the print
        &print("1"),
        &[0x66, 0xba, 0xf8, 0x0c],       // mov dx, 0xcf8
        &[0xed],                         // in eax, dx
        &[0x3d, 0x00, 0x08, 0x00, 0x80], // cmp eax, 0x80000800
        &[0x75, 0x07],                   // jnz over the print
        &print("2"),
        &RESET,
        &HALT,
    ]
    .concat();
    let (reason, console) = Machine::run(&code).started().end();
    assert_eq!((reason, console.as_str()), (StopReason::Reset, "12"));
}

#[test]
fn all_processors_start_and_run_at_once() {
    // In real mode at 0x1000:0: print "A", count, halt.
    let secondary = [
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'A', 0xee, // mov al, 'A'; out dx, al
        0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
        0xf0, 0xfe, 0x06, 0x00, 0x06, // lock inc byte [0x600]
        0xfa, 0xf4, 0xeb, 0xfd, // cli; hlt; jmp hlt
    ];
    for vcpus in [1, 2, 32] {
        let wrmsr = |msr: u32, value: u32| {
            let mut code = vec![0xb9]; // mov ecx, msr
            code.extend(msr.to_le_bytes());
            code.push(0xb8); // mov eax, value
            code.extend(value.to_le_bytes());
            code.extend([0x31, 0xd2, 0x0f, 0x30]); // xor edx, edx; wrmsr
            code
        };
        let mut code = Vec::new();
        for (at, byte) in (0x1_0000u32..).zip(secondary) {
            code.extend([0xc6, 0x04, 0x25]); // mov byte [at], byte
            code.extend(at.to_le_bytes());
            code.push(byte);
        }
        code.extend(wrmsr(0x1b, 0xfee0_0d00)); // enable the local APIC as an x2APIC
        code.extend(wrmsr(0x830, 0x000c_4500)); // INIT to all others
        code.extend(wrmsr(0x830, 0x000c_4610)); // start at 0x10 pages, to all others
        code.extend([
            0x80,
            0x3c,
            0x25,
            0x00,
            0x06,
            0x00,
            0x00,
            vcpus - 1, // cmp byte [0x600], vcpus - 1
            0x75,
            0xf6, // jne cmp
        ]);
        code.extend(RESET);
        code.extend(HALT);
        let mut boot = small();
        boot.vcpus = vcpus;
        let machine = Machine::boot(boot, file(&kernel(&code)), &[]).started();
        let (reason, console) = machine.end();
        assert_eq!(reason, StopReason::Reset, "{vcpus} processors");
        assert_eq!(console, "A".repeat(usize::from(vcpus) - 1));
    }
}

#[test]
fn a_console_that_nobody_reads_holds_nobody_up() {
    // 70,000 bytes, of which a pipe takes 65,536.
    let code = [
        &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x'][..], // mov dx, 0x3f8; mov al, 'x'
        &[0xb9, 0x70, 0x11, 0x01, 0x00],           // mov ecx, 70000
        &[0xee, 0xe2, 0xfd],                       // again: out dx, al; loop again
        &RESET,
        &HALT,
    ]
    .concat();
    let (reason, console) = Machine::run(&code).started().end();
    assert_eq!(reason, StopReason::Reset);
    assert_eq!(console.len(), 65_536);
}

#[test]
fn what_kvm_cannot_do_is_told_with_its_place() {
    // Instructions are not fetched from where there is no memory.
    let [a, b, c, d] = NOWHERE.to_le_bytes();
    let code = [0xb8, a, b, c, d, 0xff, 0xe0]; // mov eax, NOWHERE; jmp rax
    match Machine::run(&code).started().end().0 {
        StopReason::Failed(error) => {
            assert!(
                error.contains("virtual processor 0: KVM internal error"),
                "{error}"
            );
            assert!(error.contains("at rip 0x10000000"), "{error}");
        }
        reason => panic!("{reason:?}"),
    }
}

#[test]
fn a_machine_ends_with_its_control_socket() {
    let machine = Machine::run(&HALT).started();
    let Machine {
        mut vmm, control, ..
    } = machine;
    drop(control);
    assert_eq!(wait(&mut vmm), Exit::Code(1));

    let Machine {
        mut vmm, control, ..
    } = Machine::launch();
    drop(control);
    assert_eq!(wait(&mut vmm), Exit::Code(1));
}

#[test]
fn every_thread_is_confined() {
    let mut boot = small();
    boot.vcpus = 3;
    boot.disks = vec![disk(512)];
    let machine = Machine::boot(boot, file(&kernel(&HALT)), &[file(&[0; 512])]);
    assert!(matches!(machine.event(), Event::Started { slots } if slots.len() == 1));
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", machine.vmm.pid())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().trim().to_owned()
        };
        let name = field("Name:");
        if name.starts_with("kvm-") {
            // KVM's own, which never leaves the kernel.
            continue;
        }
        assert_eq!(field("Seccomp:"), "2", "{status}");
        assert_eq!(field("NoNewPrivs:"), "1");
        assert_eq!(field("CapPrm:"), "0000000000000000");
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["bulkhead-vmm", "disk:0", "vcpu0", "vcpu1", "vcpu2"]);
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let refused = |content: &[u8], words: &[&str]| {
        Machine::boot(small(), file(content), &[]).refused(words);
    };
    refused(b"", &["kernel image is truncated", "0 bytes"]);
    refused(&[0; 4096], &["no ELF file", "vmlinux"]);
    let whole = kernel(&HALT);
    refused(&whole[..whole.len() - 1], &["truncated", "segment"]);
    let mut other = whole.clone();
    other[18] = 183;
    refused(&other, &["another architecture", "machine is 183"]);
    let mut large = whole;
    large[104..112].copy_from_slice(&(8u64 << 20).to_le_bytes());
    refused(
        &large,
        &[
            "segment 0",
            "0x200000 to 0xa00000",
            "to 0x400000",
            "more memory",
        ],
    );
}

#[test]
fn a_machine_that_cannot_be_is_refused() {
    let refused =
        |boot, words: &[&str]| Machine::boot(boot, file(&kernel(&HALT)), &[]).refused(words);
    for vcpus in [0, 33] {
        let mut boot = small();
        boot.vcpus = vcpus;
        refused(boot, &["vcpus", &vcpus.to_string(), "1 to 32"]);
    }
    let mut boot = small();
    boot.memory_mib = u32::MAX;
    refused(boot, &["memory_mib", "the host has"]);
    let mut boot = small();
    boot.cmdline = "x".repeat(3000);
    refused(boot, &["cmdline has 3000 bytes"]);
    let mut boot = small();
    boot.disks = vec![disk(512)];
    refused(boot, &["3 descriptors", "speaks of 4"]);
}

#[test]
fn a_disk_that_cannot_be_is_refused() {
    let refused = |length, content: &[u8], words: &[&str]| {
        let mut boot = small();
        boot.disks = vec![disk(length)];
        Machine::boot(boot, file(&kernel(&HALT)), &[file(content)]).refused(words);
    };
    refused(513, &[0; 1024], &["\"disk\"", "513", "512"]);
    refused(1024, &[0; 1023], &["\"disk\"", "1023", "1024"]);
}

#[test]
fn something_else_than_kvm_is_refused() {
    let machine = Machine::launch();
    let descriptors = [
        device("/dev/null"),
        file(&kernel(&HALT)),
        device("/dev/null"),
    ];
    machine.request(&Request::Boot(small()), &descriptors);
    machine.refused(&["not KVM", "/dev/kvm"]);
}

#[test]
fn requests_out_of_turn_end_the_machine() {
    let machine = Machine::launch();
    machine.request(&Request::Connect { port: 1024 }, []);
    machine.refused(&["first request", "Connect { port: 1024 }"]);

    let machine = Machine::launch();
    machine.control.send(&(99u32, "what"), &[]).unwrap();
    machine.refused(&["does not decode"]);

    let machine = Machine::run(&HALT).started();
    machine.request(&Request::Boot(small()), []);
    assert!(
        matches!(machine.end().0, StopReason::Failed(error) if error.contains("second request"))
    );

    let machine = Machine::run(&HALT).started();
    machine.control.send(&(99u32, "what"), &[]).unwrap();
    assert!(
        matches!(machine.end().0, StopReason::Failed(error) if error.contains("does not decode"))
    );
}

#[test]
fn disks_come_and_go_while_the_machine_runs() {
    let machine = Machine::run(&HALT).started();
    let attach = |tag, disk| Request::AttachDisk { tag, disk };
    let refusal = |words: &[&str], wanted| match machine.event() {
        Event::Refused { tag, error } => {
            assert_eq!(tag, wanted);
            for word in words {
                assert!(error.contains(word), "{word:?} is not in {error:?}");
            }
        }
        event => panic!("{event:?}"),
    };
    machine.request(&attach(1, disk(512)), []);
    refusal(&["disk"], 1);
    machine.request(&attach(2, disk(513)), &[file(&[0; 1024])]);
    refusal(&["513"], 2);
    let mut wide = disk(512);
    wide.queues = 2;
    machine.request(&attach(3, wide), &[file(&[0; 512])]);
    refusal(&["queues is 2"], 3);
    machine.request(&Request::Detach { tag: 4, slot: 1 }, []);
    refusal(&["slot 1 holds no disk and no network interface"], 4);

    machine.request(&attach(5, disk(512)), &[file(&[0; 512])]);
    let Event::Attached { tag: 5, slot } = machine.event() else {
        panic!("not attached");
    };
    machine.request(&Request::Detach { tag: 6, slot }, []);
    assert_eq!(machine.event(), Event::Detached { tag: 6 });
    machine.request(&Request::Detach { tag: 7, slot }, []);
    refusal(&["holds no disk"], 7);
}

#[test]
fn a_running_machine_gets_its_vsock_device() {
    // Looks at slot 2 of the bus until a vsock device is there.
    let code = [
        &[0xb8, 0x00, 0x10, 0x00, 0x80][..], // look: mov eax, 0x80001000
        &[0x66, 0xba, 0xf8, 0x0c, 0xef],     // mov dx, 0xcf8; out dx, eax
        &[0x66, 0xba, 0xfc, 0x0c, 0xed],     // mov dx, 0xcfc; in eax, dx
        &[0x3d, 0xf4, 0x1a, 0x53, 0x10, 0x75, 0xea], // cmp eax, 0x10531af4; jne look
        &RESET,
        &HALT,
    ]
    .concat();
    let mut boot = small();
    boot.ports = None;
    let machine = Machine::boot(boot, file(&kernel(&code)), &[]).started();
    // Nobody is there whom a stream could reach.
    let (ours, theirs) = UnixStream::pair().unwrap();
    machine.request(&Request::Connect { port: 1024 }, [&theirs.into()]);
    assert_eq!((&ours).read(&mut [0]).unwrap(), 0);

    let attach = |tag| Request::AttachVsock {
        tag,
        ports: vec![1024],
    };
    machine.request(&attach(1), []);
    assert_eq!(machine.event(), Event::Attached { tag: 1, slot: 2 });
    assert_eq!(machine.end().0, StopReason::Reset);

    let machine = Machine::run(&HALT).started();
    machine.request(&attach(1), []);
    assert!(
        matches!(machine.event(), Event::Refused { tag: 1, error } if error.contains("has a vsock device already"))
    );
}

#[test]
fn network_interfaces_come_and_go_while_the_machine_runs() {
    let nic = |name: &str| Nic {
        name: name.into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        pairs: 1,
        sources: Sources::Mac,
    };
    let mut boot = small();
    boot.nics = vec![nic("first")];
    let machine = Machine::boot(boot, file(&kernel(&HALT)), &[tap()]);
    let Event::Started { slots } = machine.event() else {
        panic!("not started");
    };
    let [first] = slots[..] else {
        panic!("{slots:?}");
    };
    let attach = |tag| Request::AttachNic {
        tag,
        nic: nic("second"),
    };
    machine.request(&attach(1), [&tap()]);
    let Event::Attached { tag: 1, slot } = machine.event() else {
        panic!("not attached");
    };
    assert_ne!(slot, first);
    let update = |tag, slot| Request::UpdateNic {
        tag,
        slot,
        link: false,
        sources: Sources::Any,
    };
    for (tag, slot) in [(2, first), (3, slot)] {
        machine.request(&update(tag, slot), []);
        let dropped = Dropped::default();
        assert_eq!(machine.event(), Event::NicUpdated { tag, dropped });
        machine.request(&Request::Detach { tag, slot }, []);
        assert_eq!(machine.event(), Event::Detached { tag });
    }
    let refused = |wanted, word: &str| match machine.event() {
        Event::Refused { tag, error } if tag == wanted => assert!(error.contains(word), "{error}"),
        event => panic!("{event:?}"),
    };
    machine.request(&update(4, slot), []);
    refused(4, "holds no network interface");
    machine.request(&attach(5), [&file(b"")]);
    refused(5, "no tap");
    machine.request(&attach(6), []);
    refused(6, "0 descriptors");
}

/// A tap of the kernel's, which goes away with its descriptor.
fn tap() -> OwnedFd {
    let mut options = fs::OpenOptions::new();
    let file = options.read(true).write(true).open("/dev/net/tun");
    let file = file.expect("open /dev/net/tun");
    // SAFETY: an all-zero request is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the request takes this argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0);
    file.into()
}

#[test]
fn a_stream_to_a_guest_that_does_not_listen_is_closed() {
    let machine = Machine::run(&HALT).started();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    machine.request(
        &Request::Connect { port: 1024 },
        &[theirs.into(), file(b"")],
    );
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn started_by_hand_it_says_what_it_is() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("containerd-shim-bulkhead-v2"), "{text}");
}

#[test]
fn the_kernel_is_entered_as_the_boot_protocol_says() {
    // Prints the byte of the command line behind "noapic ", which it finds through the boot parameters.
    let code = [
        &[0x8b, 0x86, 0x28, 0x02, 0x00, 0x00][..], // mov eax, [rsi + 0x228] (cmd_line_ptr)
        &[0x8a, 0x40, 0x07],                       // mov al, [rax + 7]
        &[0x66, 0xba, 0xf8, 0x03, 0xee],           // mov dx, 0x3f8; out dx, al
        &RESET,
        &HALT,
    ]
    .concat();
    let mut boot = small();
    boot.cmdline = "quiet".into();
    let machine = Machine::boot(boot, file(&kernel(&code)), &[]).started();
    assert_eq!(machine.end(), (StopReason::Reset, "q".into()));
    const { assert!(ENTRY == 2 << 20) }
}
