//! How streams begin and end, from either side and in either direction.

use super::*;

#[test]
fn the_guest_connects_where_it_may() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    assert_eq!(rig.driver.read_u32(rig.driver.device), CID as u32);
    let (_peer, mut stream) = rig.open(5000);
    assert_eq!(read_all(&mut stream), b"");
    for port in [0, 1, 1023, 1025, 1 << 30, u32::MAX] {
        let peer = Peer::new(port, 5001);
        rig.send(&peer.header(Operation::Request), &[]);
        let reset = rig.expect(Operation::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (port, 5001));
    }
    assert!(rig.opened.is_empty());
    assert_eq!(rig.streams(), 1);
    // The same ports a second time: the guest has lost track, and both are gone.
    rig.send(&Peer::new(PORT, 5000).header(Operation::Request), &[]);
    rig.expect(Operation::Reset);
    assert!(is_at_end(&mut stream));
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_host_connects_and_what_it_wrote_before_arrives_after() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut host, device) = UnixStream::pair().unwrap();
    host.write_all(b"early").unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    let request = rig.expect(Operation::Request);
    assert_eq!(request.destination_port, 9000);
    assert_eq!(request.buffer, BUFFER);
    rig.expect_nothing();

    let mut peer = Peer::new(request.source_port, 9000);
    rig.send(&peer.header(Operation::Response), &[]);
    let (header, payload) = rig.receive().unwrap();
    assert_eq!(
        (header.operation, &payload[..]),
        (Operation::Data, &b"early"[..])
    );
    let data = peer.data(4);
    rig.send(&data, b"late");
    let mut answer = [0; 4];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"late");
    rig.expect_nothing();
}

#[test]
fn the_host_connects_to_nobody() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    // The guest refuses.
    let (mut host, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    let request = rig.expect(Operation::Request);
    let peer = Peer::new(request.source_port, 9000);
    rig.send(&peer.header(Operation::Reset), &[]);
    assert!(is_at_end(&mut host));
    rig.expect_nothing();
    assert_eq!(rig.streams(), 0);
    // The host gives up before the guest has answered.
    let (host, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    let request = rig.expect(Operation::Request);
    drop(host);
    let reset = rig.expect(Operation::Reset);
    assert_eq!(reset.source_port, request.source_port);
    assert_eq!(rig.streams(), 0);
    // The host gives up before the guest has been asked.
    let (host, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    drop(host);
    rig.expect_nothing();
    assert_eq!(rig.streams(), 0);
    // The guest answers with something else.
    for operation in [
        Operation::Data,
        Operation::Shutdown,
        Operation::CreditUpdate,
    ] {
        let (mut host, device) = UnixStream::pair().unwrap();
        rig.vsock.connect(9000, device.into()).unwrap();
        let request = rig.expect(Operation::Request);
        let peer = Peer::new(request.source_port, 9000);
        rig.send(&peer.header(operation), &[]);
        rig.expect(Operation::Reset);
        assert!(is_at_end(&mut host));
    }
    // It is no socket at all.
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let error = rig.vsock.connect(9000, file.into()).unwrap_err();
    assert!(error.to_string().contains("EPERM"), "{error}");
    assert_eq!(rig.streams(), 0);
}

/// As on a socket that is listened to: what was written is not lost because its writer did not wait.
#[test]
fn the_host_closes_before_the_guest_has_accepted() {
    let machine = Machine::default();
    for asked in [false, true] {
        let mut rig = Rig::new(&machine, 32);
        let (mut host, device) = UnixStream::pair().unwrap();
        host.write_all(b"hello and goodbye").unwrap();
        rig.vsock.connect(9000, device.into()).unwrap();
        if asked {
            rig.pump();
        }
        drop(host);
        let request = rig.expect(Operation::Request);
        rig.expect_nothing();
        let peer = Peer::new(request.source_port, 9000);
        rig.send(&peer.header(Operation::Response), &[]);
        let (header, payload) = rig.receive().unwrap();
        assert_eq!(header.operation, Operation::Data);
        assert_eq!(payload, b"hello and goodbye");
        assert_eq!(rig.expect(Operation::Shutdown).flags, SEND | RECEIVE);
        rig.send(&peer.header(Operation::Reset), &[]);
        assert_eq!(rig.streams(), 0);
        let slot = rig.driver.slot;
        rig.driver.set_status(0);
        machine.bus.detach(slot).unwrap();
    }
}

#[test]
fn connections_wait_for_the_driver_and_survive_its_reset_until_it_knows_them() {
    let machine = Machine::default();
    let vsock = Vsock::new(CID, vec![PORT]).unwrap();
    let (mut host, device) = UnixStream::pair().unwrap();
    host.write_all(b"early").unwrap();
    vsock.connect(9000, device.into()).unwrap();
    let driver = machine.attach(vsock.clone());
    let mut rig = Rig::start(driver, vsock, 0);
    rig.pump();
    rig.driver.set_status(0);
    let mut rig = Rig::start(rig.driver, rig.vsock, 4);
    rig.expect(Operation::Request);
    let (mut peer, mut opened) = rig.open(5000);
    let data = peer.data(5);
    rig.send(&data, b"hello");
    // Now the guest knows them, and with its driver they are gone.
    rig.driver.set_status(0);
    let error = host.read(&mut [0]).unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::ConnectionReset,
        "\"early\" was not read"
    );
    let mut received = Vec::new();
    opened.read_to_end(&mut received).unwrap();
    assert_eq!(received, b"hello");
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_host_half_closes() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    rig.pump();
    let (header, payload) = rig.receive().unwrap();
    assert_eq!(
        (header.operation, &payload[..]),
        (Operation::Data, &b"question"[..])
    );
    assert_eq!(rig.expect(Operation::Shutdown).flags, SEND);
    rig.expect_nothing();

    let data = peer.data(6);
    rig.send(&data, b"answer");
    assert_eq!(read_all(&mut host), b"answer");
    rig.send(&peer.shutdown(SEND), &[]);
    assert!(is_at_end(&mut host));
    // The host has nothing left to do with it; the guest hears of that and confirms.
    drop(host);
    assert_eq!(rig.expect(Operation::Shutdown).flags, SEND | RECEIVE);
    rig.send(&peer.header(Operation::Reset), &[]);
    rig.expect_nothing();
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_guest_half_closes() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    let data = peer.data(8);
    rig.send(&data, b"question");
    rig.send(&peer.shutdown(SEND), &[]);
    let mut question = Vec::new();
    host.read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");
    host.write_all(b"answer").unwrap();
    rig.pump();
    let (header, payload) = rig.receive().unwrap();
    assert_eq!(
        (header.operation, &payload[..]),
        (Operation::Data, &b"answer"[..])
    );
    // It may not send any more after that.
    let data = peer.data(1);
    rig.send(&data, b"x");
    rig.expect(Operation::Reset);
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_guest_stops_receiving() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    rig.send(&peer.shutdown(RECEIVE), &[]);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    let data = peer.data(4);
    rig.send(&data, b"more");
    assert_eq!(read_all(&mut host), b"more");
    rig.send(&peer.shutdown(SEND), &[]);
    rig.expect(Operation::Reset);
    assert!(is_at_end(&mut host));
    assert_eq!(rig.streams(), 0);
}

#[test]
fn the_host_closes() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    host.write_all(b"last words").unwrap();
    drop(host);
    rig.pump();
    let (header, payload) = rig.receive().unwrap();
    assert_eq!(
        (header.operation, &payload[..]),
        (Operation::Data, &b"last words"[..])
    );
    assert_eq!(rig.expect(Operation::Shutdown).flags, SEND | RECEIVE);
    // What the guest has sent meanwhile is taken and goes nowhere.
    let data = peer.data(3);
    rig.send(&data, b"oh?");
    rig.expect_nothing();
    assert_eq!(rig.streams(), 1);
    rig.send(&peer.header(Operation::Reset), &[]);
    rig.expect_nothing();
    assert_eq!(rig.streams(), 0);
    // With something left unread at the host's end, the system tells of a reset instead of an end.
    let (mut peer, host) = rig.open(5000);
    let data = peer.data(6);
    rig.send(&data, b"unread");
    drop(host);
    assert_eq!(rig.expect(Operation::Shutdown).flags, SEND | RECEIVE);
}

#[test]
fn the_guest_closes_and_the_host_gets_what_it_sent() {
    for last in [Operation::Shutdown, Operation::Reset] {
        let machine = Machine::default();
        let mut rig = Rig::new(&machine, 32);
        let (mut peer, mut host) = rig.open(5000);
        let mut random = Random(3);
        let mut sent = Vec::new();
        // More than the socket takes at once.
        while peer.credit() > 0 {
            let data = random.bytes(peer.credit().min(65_536) as usize);
            let header = peer.data(data.len());
            rig.send(&header, &data);
            while let Some((header, _)) = rig.receive() {
                peer.note(&header);
            }
            sent.extend(data);
        }
        assert!(sent.len() > BUFFER as usize);
        let mut header = peer.shutdown(SEND | RECEIVE);
        header.operation = last;
        rig.send(&header, &[]);
        if last == Operation::Shutdown {
            rig.expect(Operation::Reset);
        }
        // The guest can use its port again at once.
        let (_peer, _host) = rig.open(5000);
        let mut received = Vec::new();
        while received.len() < sent.len() {
            received.extend(read_all(&mut host));
            rig.pump();
        }
        assert!(received == sent);
        assert!(is_at_end(&mut host));
        assert_eq!(rig.streams(), 1);
    }
}
