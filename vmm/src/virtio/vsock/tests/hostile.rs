//! What a guest can do wrong, and that it harms only itself.

use super::*;

#[test]
fn resets_are_not_hoarded_without_end() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 0);
    let mut answered = 0;
    for round in 0..5 {
        for index in 0..100 {
            let peer = Peer::new(1, round * 100 + index);
            rig.send_pieces(&peer.header(Operation::Request), &[], &[]);
        }
        rig.pump();
        while rig.tx.take_used().is_some() {
            answered += 1;
        }
        if round == 2 {
            break;
        }
    }
    // Three hundred packets, for 256 of which an answer waits. The rest stay in the queue until the guest makes room.
    assert_eq!(answered, hub::MAX_RESETS);
    assert!(!rig.is_busy());
    rig.give(100);
    let mut ports = Vec::new();
    for _ in 0..300 {
        ports.push(rig.expect(Operation::Reset).destination_port);
    }
    rig.expect_nothing();
    assert_eq!(ports, (0..300).collect::<Vec<_>>());
}

#[test]
fn strange_packets_are_refused() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let peer = Peer::new(PORT, 5000);
    let base = peer.header(Operation::Request);
    let codes = [0, 8, 9, 100, u16::MAX];
    // Without a stream.
    for operation in [2, 4, 5, 6, 7].into_iter().chain(codes) {
        let operation = Operation::from(operation);
        rig.send(&Header { operation, ..base }, &[]);
        rig.expect(Operation::Reset);
    }
    rig.send(&peer.header(Operation::Reset), &[]);
    rig.expect_nothing();
    // Of another type: the answer has it too, or the guest would not know what it is for.
    for kind in [0, 2, 3, u16::MAX] {
        rig.send(&Header { kind, ..base }, &[]);
        assert_eq!(rig.expect(Operation::Reset).kind, kind);
        let operation = Operation::Reset;
        rig.send(
            &Header {
                kind,
                operation,
                ..base
            },
            &[],
        );
    }
    // From somebody else.
    for source_cid in [0, 1, 2, 4, u64::MAX] {
        rig.send(&Header { source_cid, ..base }, &[]);
    }
    rig.expect_nothing();
    // To somebody else.
    let destination_cid = 77;
    rig.send(
        &Header {
            destination_cid,
            ..base
        },
        &[],
    );
    rig.pump();
    let (head, _) = rig.rx.take_used().unwrap();
    let at = GuestAddress(RX_BUFFERS + u64::from(head) * 4096);
    assert_eq!(machine.ram.read_obj::<u64>(at).unwrap(), 77);
    assert!(rig.opened.is_empty());
    // Within a stream, they are its end.
    for operation in [1, 2].into_iter().chain(codes) {
        let (peer, mut host) = rig.open(5000);
        let operation = Operation::from(operation);
        rig.send(&peer.header(operation), &[]);
        rig.expect(Operation::Reset);
        assert!(is_at_end(&mut host), "{operation:?}");
    }
    // A payload that is not all there.
    let (mut peer, mut host) = rig.open(5000);
    let header = peer.data(11);
    rig.send(&header, &[0; 10]);
    rig.expect(Operation::Reset);
    assert!(is_at_end(&mut host));
    let (mut peer, _host) = rig.open(5000);
    let mut header = peer.data(11);
    header.length = u32::MAX;
    rig.send(&header, &[0; 10]);
    rig.expect(Operation::Reset);
    // Shutdown flags that do not exist mean nothing; a payload in other packets neither, nor bytes behind a payload.
    let (mut peer, mut host) = rig.open(5000);
    rig.send(&peer.shutdown(0xffff_fffc), b"ignored");
    let header = peer.data(2);
    rig.send(&header, b"ok, really");
    assert_eq!(read_all(&mut host), b"ok");
    rig.expect_nothing();
}

#[test]
fn broken_rings_need_a_reset_and_end_all_streams() {
    type Hostile = fn(&mut Rig<'_>);
    let machine = Machine::default();
    let vsock = Vsock::new(CID, vec![PORT]).unwrap();
    let mut driver = Some(machine.attach(vsock.clone()));
    let outside = 0x400_0000;
    assert!(outside == 64 << 20, "the end of guest memory");
    let cases: &[(&str, Hostile)] = &[
        ("a packet without a whole header", |rig| {
            rig.tx.add(&[(TX_BUFFERS, 43, 0)]);
        }),
        ("a packet to be written", |rig| {
            rig.tx.add(&[(TX_BUFFERS, 100, WRITE)]);
        }),
        ("a packet outside", |rig| {
            rig.tx.add(&[(0x400_0000, 100, 0)]);
        }),
        ("a payload outside", |rig| {
            rig.tx.add(&[(TX_BUFFERS, 44, 0), (0x400_0000 - 10, 11, 0)]);
        }),
        ("more packets than the queue has room for", |rig| {
            rig.tx.set_avail_index(1000);
        }),
        ("a receive buffer without room for a payload", |rig| {
            rig.rx.add(&[(RX_BUFFERS, 44, WRITE)]);
            let request = Peer::new(1, 1).header(Operation::Request);
            rig.send_pieces(&request, &[], &[]);
        }),
        ("a receive buffer to be read", |rig| {
            rig.rx.add(&[(RX_BUFFERS, 4096, 0)]);
            let request = Peer::new(1, 1).header(Operation::Request);
            rig.send_pieces(&request, &[], &[]);
        }),
        ("a receive buffer outside", |rig| {
            rig.rx.add(&[(0x400_0000 - 100, 101, WRITE)]);
            let request = Peer::new(1, 1).header(Operation::Request);
            rig.send_pieces(&request, &[], &[]);
        }),
    ];
    for (name, hostile) in cases {
        let mut rig = Rig::start(driver.take().unwrap(), vsock.clone(), 1);
        rig.receive();
        let mut peer = Peer::new(PORT, 5000);
        rig.send(&peer.header(Operation::Request), &[]);
        let mut host = UnixStream::from(rig.opened.pop().unwrap().stream);
        rig.receive_and_keep().unwrap();
        let data = peer.data(4);
        rig.send(&data, b"held");
        hostile(&mut rig);
        rig.driver.kick(0);
        rig.driver.kick(1);
        rig.pump();
        assert_eq!(rig.driver.status(), 15 | 0x40, "{name}");
        assert_eq!(rig.driver.interrupts(0), 1, "{name}");
        let mut held = Vec::new();
        host.read_to_end(&mut held).unwrap();
        assert_eq!(held, b"held", "{name}");
        rig.driver.set_status(0);
        driver = Some(rig.driver);
    }
    let mut rig = Rig::start(driver.take().unwrap(), vsock, 8);
    rig.open(5000);
}

#[test]
fn there_is_a_most_of_streams() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(4096)), hard).unwrap();
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let mut streams = Vec::new();
    for port in 0..MAX_FROM_GUEST as u32 {
        streams.push(rig.open(port).1);
    }
    let peer = Peer::new(PORT, 5000);
    rig.send(&peer.header(Operation::Request), &[]);
    rig.expect(Operation::Reset);
    drop(streams.pop());
    rig.expect(Operation::Shutdown);
    rig.send(&peer.header(Operation::Request), &[]);
    rig.expect(Operation::Reset);
    let last = Peer::new(PORT, MAX_FROM_GUEST as u32 - 1);
    rig.send(&last.header(Operation::Reset), &[]);
    streams.push(rig.open(5000).1);
    for _ in MAX_FROM_GUEST..MAX_STREAMS {
        let (host, device) = UnixStream::pair().unwrap();
        rig.vsock.connect(9000, device.into()).unwrap();
        rig.expect(Operation::Request);
        streams.push(host);
    }
    let (_other, device) = UnixStream::pair().unwrap();
    let error = rig.vsock.connect(9000, device.into()).unwrap_err();
    assert!(matches!(error, Error::TooManyStreams), "{error}");
    assert_eq!(rig.streams(), MAX_STREAMS);
    drop(streams.pop());
    rig.expect(Operation::Reset);
    let (_other, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    assert_eq!(rig.streams(), MAX_STREAMS);
}

#[test]
fn streams_of_a_guest_that_takes_no_answers_leave_nothing() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 0);
    for port in 0..100 {
        let peer = Peer::new(PORT, port);
        rig.send(&peer.header(Operation::Request), &[]);
        rig.send(&peer.header(Operation::Reset), &[]);
    }
    assert_eq!(rig.opened.len(), 100);
    assert_eq!(rig.streams(), 0);
    rig.give(1);
    rig.expect_nothing();
}

/// Packets that are mostly right, with something wrong here and there, and a guest that gives buffers as it likes.
#[test]
fn random_packets_harm_nobody() {
    let machine = Machine::default();
    let vsock = Vsock::new(CID, vec![PORT]).unwrap();
    let mut driver = Some(machine.attach(vsock.clone()));
    let mut random = Random(2025);
    let mut hosts: Vec<UnixStream> = Vec::new();
    let (mut sent, mut broken) = (0, 0);
    while sent < 20_000 {
        let mut rig = Rig::start(driver.take().unwrap(), vsock.clone(), 8);
        // The ports of the streams that the host opens.
        let mut ports = vec![PORT];
        while rig.driver.status() == 15 {
            sent += 1;
            let host = ports[random.below(ports.len() as u64) as usize];
            let peer = Peer::new(host, 5000 + random.below(6) as u32);
            // Enough requests, and payloads in between.
            let codes = [1, 1, 1, 2, 3, 4, 5, 5, 5, 5, 5, 6, 7];
            let operation = codes[random.below(codes.len() as u64) as usize];
            let mut header = peer.header(Operation::from(operation));
            let payload = random.bytes(random.clone().below(600) as usize);
            header.length = payload.len() as u32;
            header.forwarded = random.below(100) as u32;
            header.flags = random.below(4) as u32;
            match random.below(60) {
                0 => header.length = random.number() as u32,
                1 => header.buffer = random.number() as u32,
                2 => header.forwarded = random.number() as u32,
                3 => header.kind = random.number() as u16,
                4 => header.operation = Operation::from(random.number() as u16),
                5 => header.source_cid = random.number(),
                6 => header.destination_cid = random.number(),
                _ => {}
            }
            match random.below(400) {
                0 => {
                    rig.tx.add(&[(TX_BUFFERS, random.below(44) as u32, 0)]);
                }
                1 => {
                    rig.rx.add(&[(random.number(), 4096, WRITE)]);
                }
                _ => rig.send_pieces(&header, &payload, &[random.below(60) as usize]),
            }
            rig.pump();
            while rig.tx.take_used().is_some() {}
            // The host does something, too.
            let opened = rig.opened.drain(..);
            hosts.extend(opened.map(|opened| UnixStream::from(opened.stream)));
            if hosts.len() > 12 || random.below(8) == 0 && !hosts.is_empty() {
                let host = random.below(hosts.len() as u64) as usize;
                drop(hosts.swap_remove(host));
            }
            if random.below(4) == 0 {
                let (host, device) = UnixStream::pair().unwrap();
                let port = 5000 + random.below(6) as u32;
                rig.vsock.connect(port, device.into()).unwrap();
                hosts.push(host);
            }
            if let Some(host) = hosts.last_mut() {
                host.set_nonblocking(true).unwrap();
                // The other end may be gone.
                let _ = host.read_to_end(&mut Vec::new());
                let length = random.below(5000) as usize;
                let _ = host.write(&random.bytes(length));
            }
            rig.pump();
            if random.below(3) > 0 {
                while let Some((_, head)) = rig.take_header() {
                    if head.operation == Operation::Request {
                        ports.push(head.source_port);
                        ports.truncate(20);
                    }
                    rig.give(1);
                }
            }
            rig.streams();
        }
        broken += 1;
        rig.driver.set_status(0);
        driver = Some(rig.driver);
    }
    drop(hosts);
    assert!(broken > 20, "{broken}");
    let mut rig = Rig::start(driver.take().unwrap(), vsock, 8);
    rig.pump();
    rig.driver.set_status(0);
    assert_eq!(rig.streams(), 0);
}
