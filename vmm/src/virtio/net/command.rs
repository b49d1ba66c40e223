//! The control queue (section 5.1.6.5), on which the driver says how many pairs it uses. It has nothing else to say: the
//! features for other commands are not offered.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::port::Port;
use crate::memory::GuestRam;
use crate::virtio::{Broken, Buffers, Ring};

/// Class and command.
const SET_PAIRS: [u8; 2] = [
    VIRTIO_NET_CTRL_MQ as u8,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8,
];

/// Carries out what is in the ring.
pub fn run(ram: &GuestRam, ring: &mut Ring, port: &Port) -> Result<(), Broken> {
    ring.disable_kicks(ram)?;
    loop {
        match ring.pop(ram)? {
            Some(mut chain) => {
                let acknowledgement = match carry_out(&mut chain.readable, port) {
                    Some(()) => VIRTIO_NET_OK,
                    None => VIRTIO_NET_ERR,
                };
                if !chain.writable.write(&[acknowledgement as u8]) {
                    return Err(Broken::Short {
                        head: chain.head,
                        missing: "an acknowledgement",
                    });
                }
                ring.push(ram, chain.head, 1)?;
                ring.signal(ram)?;
            }
            None if ring.enable_kicks(ram)? => {}
            None => return Ok(()),
        }
    }
}

/// `None` when that is not possible.
fn carry_out(command: &mut Buffers<'_>, port: &Port) -> Option<()> {
    let mut kind = [0; 2];
    let mut pairs = [0; 2];
    if !command.read(&mut kind) || kind != SET_PAIRS || !command.read(&mut pairs) {
        return None;
    }
    let pairs = usize::from(u16::from_le_bytes(pairs));
    if (1..=port.taps.len()).contains(&pairs) {
        port.set_pairs(pairs).ok()
    } else {
        None
    }
}
