//! How much is on its way, and that it arrives.

use super::*;

#[test]
fn credit_binds_the_guest() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    let mut sent = 0;
    while peer.credit() > 0 {
        let length = peer.credit().min(60_000) as usize;
        let header = peer.data(length);
        rig.send(&header, &vec![0x5a; length]);
        sent += length;
        while let Some((header, _)) = rig.receive() {
            assert_eq!(header.operation, Operation::CreditUpdate);
            peer.note(&header);
        }
    }
    // What the socket has not taken is exactly the buffer.
    rig.expect_nothing();
    // The guest is told when half of it is free again, without having to ask.
    let mut half = vec![0; BUFFER as usize];
    let mut read = 0;
    while read < 200_000 {
        read += host.read(&mut half[..50_000]).unwrap();
        rig.pump();
    }
    let update = rig.expect(Operation::CreditUpdate);
    peer.note(&update);
    assert!(peer.credit() >= BUFFER / 2);
    // It asks, and is answered.
    rig.send(&peer.header(Operation::CreditRequest), &[]);
    let answer = rig.expect(Operation::CreditUpdate);
    peer.note(&answer);
    // It sends one byte too many.
    let credit = peer.credit();
    while peer.credit() > 0 {
        let length = peer.credit().min(60_000) as usize;
        let header = peer.data(length);
        rig.send(&header, &vec![0x5a; length]);
    }
    assert!(rig.receive().is_none());
    let header = peer.data(1);
    rig.send(&header, &[0x5a]);
    rig.expect(Operation::Reset);
    // The host gets all that came before, and then the end.
    let all = sent + credit as usize;
    while read < all {
        read += read_all(&mut host).len();
        rig.pump();
    }
    assert_eq!(read, all);
    assert!(is_at_end(&mut host));
    assert_eq!(rig.streams(), 0);
}

#[test]
fn credit_binds_the_host() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 64);
    let (mut peer, mut host) = rig.open(5000);
    let message: Vec<u8> = Random(5).bytes(150_000);
    host.write_all(&message).unwrap();
    let mut received = Vec::new();
    let mut questions = 0;
    let mut drain = |rig: &mut Rig<'_>, received: &mut Vec<u8>| {
        rig.pump();
        while let Some((header, payload)) = rig.receive() {
            received.extend(payload);
            questions += u32::from(header.operation == Operation::CreditRequest);
            rig.pump();
        }
        std::mem::take(&mut questions)
    };
    // The guest's buffer is full, and it is asked once for more, however often it says that there is none.
    assert_eq!(drain(&mut rig, &mut received), 1);
    assert_eq!(received.len(), 65_536);
    rig.send(&peer.header(Operation::CreditUpdate), &[]);
    host.write_all(b"x").unwrap();
    assert_eq!(drain(&mut rig, &mut received), 0);
    assert_eq!(received.len(), 65_536);
    // Counters that make no sense are no credit: more taken than sent, and a buffer smaller than what is on its way.
    for (buffer, forwarded) in [
        (65_536, 65_537),
        (1000, 60_000),
        (0, 65_536),
        (u32::MAX, 65_537),
    ] {
        (peer.buffer, peer.forwarded) = (buffer, forwarded);
        rig.send(&peer.header(Operation::CreditUpdate), &[]);
        drain(&mut rig, &mut received);
        assert_eq!(received.len(), 65_536, "{buffer} {forwarded}");
    }
    // Credit byte by byte, and then for all.
    (peer.buffer, peer.forwarded) = (65_536, 1);
    rig.send(&peer.header(Operation::CreditUpdate), &[]);
    assert_eq!(drain(&mut rig, &mut received), 1);
    assert_eq!(received.len(), 65_537);
    (peer.buffer, peer.forwarded) = (1 << 20, 65_537);
    rig.send(&peer.header(Operation::CreditUpdate), &[]);
    assert_eq!(drain(&mut rig, &mut received), 0);
    assert_eq!(received.len(), 150_001);
    assert!(received[..150_000] == message);
}

#[test]
fn a_guest_without_room_is_not_waited_for_in_a_loop() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 1);
    let (_peer, mut host) = rig.open(5000);
    let message: Vec<u8> = Random(9).bytes(20_000);
    host.write_all(&message).unwrap();
    rig.pump();
    // One buffer was left, and now there is none. The device rests although the socket has more.
    let (_, first) = rig.receive_and_keep().unwrap();
    assert_eq!(first.len(), RX_BUFFER as usize - HEADER);
    assert!(!rig.is_busy());
    host.write_all(b"!").unwrap();
    rig.pump();
    assert!(rig.receive_and_keep().is_none());
    assert!(!rig.is_busy());
    // It wants to be told of new buffers.
    rig.give(1);
    assert!(rig.rx.wants_kick());
    rig.give(2);
    rig.pump();
    let mut received = first;
    while let Some((_, payload)) = rig.receive_and_keep() {
        received.extend(payload);
    }
    rig.give(8);
    rig.pump();
    while let Some((_, payload)) = rig.receive_and_keep() {
        received.extend(payload);
    }
    assert!(received[..20_000] == message);
    assert_eq!(&received[20_000..], b"!");
}

#[test]
fn packets_come_in_any_number_of_pieces() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 32);
    let (mut peer, mut host) = rig.open(5000);
    let message: Vec<u8> = Random(11).bytes(10_000);
    for pieces in [
        &[44][..],
        &[1, 43],
        &[40, 8],
        &[11, 11, 11, 11, 1],
        &[44, 1, 1, 1, 4000, 4000],
        &[50, 5000],
    ] {
        let header = peer.data(message.len());
        rig.send_pieces(&header, &message, pieces);
        rig.pump();
        assert!(read_all(&mut host) == message, "{pieces:?}");
        while rig.tx.take_used().is_some() {}
    }
    // Receive buffers in pieces, too.
    while rig.rx.take_used().is_some() {}
    let at = RX_BUFFERS + 0x10_0000;
    host.write_all(&message[..300]).unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut rig = {
        rig.driver.set_status(0);
        Rig::start(rig.driver, rig.vsock, 0)
    };
    let (mut host, device) = UnixStream::pair().unwrap();
    rig.vsock.connect(9000, device.into()).unwrap();
    rig.rx
        .add(&[(at, 10, WRITE), (at + 10, 30, WRITE), (at + 40, 60, WRITE)]);
    rig.driver.kick(0);
    rig.pump();
    let mut bytes = [0; HEADER];
    machine
        .ram
        .read_slice(&mut bytes, GuestAddress(at))
        .unwrap();
    let request = Header::from_bytes(&bytes);
    assert_eq!(request.operation, Operation::Request);
    rig.rx.take_used().unwrap();
    rig.rx
        .add(&[(at, 20, WRITE), (at + 20, 30, WRITE), (at + 50, 300, WRITE)]);
    host.write_all(&message[..300]).unwrap();
    let peer = Peer::new(request.source_port, 9000);
    rig.send(&peer.header(Operation::Response), &[]);
    assert_eq!(rig.rx.take_used().unwrap().1, 344);
    let mut payload = vec![0; 300];
    let after = GuestAddress(at + HEADER as u64);
    machine.ram.read_slice(&mut payload, after).unwrap();
    assert!(payload == message[..300]);
}

#[test]
fn streams_take_turns() {
    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 128);
    let mut hosts = Vec::new();
    for port in 0..4 {
        let (mut peer, host) = rig.open(5000 + port);
        peer.buffer = 1 << 20;
        rig.send(&peer.header(Operation::CreditUpdate), &[]);
        hosts.push(host);
    }
    for host in &mut hosts {
        host.write_all(&[0x5a; 150_000]).unwrap();
    }
    rig.pump();
    let mut turns = Vec::new();
    while let Some((header, _)) = rig.receive() {
        if turns.last() != Some(&header.destination_port) {
            turns.push(header.destination_port);
        }
        rig.pump();
    }
    // One gets as much as another before it is its turn again.
    assert!(turns.len() >= 16, "{turns:?}");
    assert_eq!(turns[..8], [5000, 5001, 5002, 5003, 5000, 5001, 5002, 5003]);
}

/// Both directions of two streams at once, many megabytes, everything of random size, against the guest's slow and odd reading.
#[test]
fn bytes_arrive_as_they_were_sent() {
    const TOTAL: usize = 24 << 20;
    /// No multiple of anything, so that bytes in the wrong place are other bytes.
    const PERIOD: usize = 65_521;
    const LARGEST: usize = 65_000;
    let pattern = Random(77).bytes(PERIOD).repeat(2);
    let bytes = |start: usize, length: usize| &pattern[start % PERIOD..][..length];

    let machine = Machine::default();
    let mut rig = Rig::new(&machine, 100);
    let mut random = Random(42);
    let mut ends: Vec<_> = (0..2)
        .map(|port| {
            let (mut peer, host) = rig.open(5000 + port);
            peer.buffer = 200_000;
            rig.send(&peer.header(Operation::CreditUpdate), &[]);
            (peer, host, Counts::default())
        })
        .collect();
    let mut chunk = vec![0; LARGEST];
    while ends.iter().any(|(_, _, counts)| !counts.reached(TOTAL)) {
        for (peer, host, counts) in &mut ends {
            let mut size = |end: usize, done: usize| {
                (random.below(LARGEST as u64) as usize)
                    .min(end)
                    .min(TOTAL - done)
            };
            let length = size(LARGEST, counts.host_wrote);
            if let Ok(written) = host.write(bytes(counts.host_wrote, length)) {
                counts.host_wrote += written;
            }
            let length = size(peer.credit() as usize, counts.guest_wrote);
            if length > 0 {
                let header = peer.data(length);
                let pieces = [44, size(5000, 0)];
                rig.send_pieces(&header, bytes(counts.guest_wrote, length), &pieces);
                counts.guest_wrote += length;
            }
            rig.pump();
            while rig.tx.take_used().is_some() {}
            let length = size(LARGEST, 0);
            if let Ok(length) = host.read(&mut chunk[..length]) {
                assert!(&chunk[..length] == bytes(counts.host_read, length));
                counts.host_read += length;
            }
            rig.pump();
        }
        for _ in 0..random.below(100) {
            let Some((header, payload)) = rig.receive() else {
                break;
            };
            let index = header.destination_port as usize - 5000;
            let (peer, _, counts) = &mut ends[index];
            peer.note(&header);
            assert!(payload == bytes(counts.guest_read, payload.len()));
            counts.guest_read += payload.len();
            peer.forwarded = peer.forwarded.wrapping_add(payload.len() as u32);
            if random.below(4) == 0 || header.operation == Operation::CreditRequest {
                let header = peer.header(Operation::CreditUpdate);
                rig.send(&header, &[]);
            }
        }
    }
}

/// How far the four ends of a stream's two directions are.
#[derive(Debug, Default)]
struct Counts {
    host_wrote: usize,
    guest_read: usize,
    guest_wrote: usize,
    host_read: usize,
}

impl Counts {
    fn reached(&self, total: usize) -> bool {
        let Self {
            host_wrote,
            guest_read,
            guest_wrote,
            host_read,
        } = self;
        [host_wrote, guest_read, guest_wrote, host_read]
            .iter()
            .all(|&&count| count == total)
    }
}
