//! The header that every packet starts with (section 5.10.6), and what the device reads and writes it by.

use crate::virtio::{Broken, Buffers, Chain};

/// Length of a header in bytes.
pub const HEADER: usize = 44;

/// The host's context identifier.
pub const HOST_CID: u64 = 2;

/// A byte stream with flow control, the only type of socket that the device offers.
pub const TYPE_STREAM: u16 = 1;

/// The sender of the packet will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// The sender of the packet will not send any more.
pub const SHUTDOWN_SEND: u32 = 1 << 1;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Connect to this port.
    Request,
    /// The connection is accepted.
    Response,
    /// The connection is refused or broken off.
    Reset,
    /// One or both directions are done, which `flags` tell.
    Shutdown,
    /// Payload.
    Data,
    /// Here is how much room there is.
    CreditUpdate,
    /// How much room is there?
    CreditRequest,
    /// None of these.
    Unknown(u16),
}

impl From<u16> for Operation {
    fn from(code: u16) -> Self {
        match code {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }
}

impl From<Operation> for u16 {
    fn from(operation: Operation) -> Self {
        match operation {
            Operation::Request => 1,
            Operation::Response => 2,
            Operation::Reset => 3,
            Operation::Shutdown => 4,
            Operation::Data => 5,
            Operation::CreditUpdate => 6,
            Operation::CreditRequest => 7,
            Operation::Unknown(other) => other,
        }
    }
}

/// A packet without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    /// Length of the payload in bytes.
    pub length: u32,
    pub kind: u16,
    pub operation: Operation,
    pub flags: u32,
    /// How many bytes the sender has room for in all.
    pub buffer: u32,
    /// How many bytes of what the sender received its user has taken, since the connection began, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// The header as it stands in memory.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&u16::from(self.operation).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// The header that stands in memory.
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            kind: half(28),
            operation: half(30).into(),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }

    /// The packet that refuses this one.
    pub fn reset(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            length: 0,
            kind: self.kind,
            operation: Operation::Reset,
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }
    }
}

/// Takes a packet out of a chain of the transmit queue. The payload is what follows the header, of whatever length.
pub fn receive<'m>(chain: &mut Chain<'m>) -> Result<(Header, Buffers<'m>), Broken> {
    let mut bytes = [0; HEADER];
    if !chain.readable.read(&mut bytes) {
        return Err(Broken::Short {
            head: chain.head,
            missing: "a packet's header",
        });
    }
    Ok((
        Header::from_bytes(&bytes),
        std::mem::take(&mut chain.readable),
    ))
}

/// Splits a chain of the receive queue into room for a header and room for a payload, of at least one byte.
pub fn room<'m>(chain: &mut Chain<'m>) -> Result<(Buffers<'m>, Buffers<'m>), Broken> {
    let mut header = std::mem::take(&mut chain.writable);
    match header.len().checked_sub(HEADER) {
        Some(length) if length > 0 => {
            let payload = header.take_last(length).unwrap_or_default();
            Ok((header, payload))
        }
        _ => Err(Broken::Short {
            head: chain.head,
            missing: "a packet with payload",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_memory() {
        let bytes: [u8; HEADER] = std::array::from_fn(|index| index as u8 * 5 + 1);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.source_cid, 0x241f_1a15_100b_0601);
        assert_eq!(header.kind, 0x928d);
        assert_eq!(header.operation, Operation::Unknown(0x9c97));
        assert_eq!(header.to_bytes(), bytes);
        for code in 0..=u16::MAX {
            assert_eq!(u16::from(Operation::from(code)), code);
        }
    }
}
