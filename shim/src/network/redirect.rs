//! Traffic control: what comes in at one interface goes out at another.

use bulkhead_agent::netlink::{self, Message, NLM_F_CREATE, NLM_F_EXCL, Socket};
use libc::{
    IFLA_TXQLEN, RTM_DELQDISC, RTM_DELTFILTER, RTM_NEWLINK, RTM_NEWQDISC, RTM_NEWTFILTER, TCA_KIND,
    TCA_OPTIONS,
};

use super::{Error, Hook, Interface};

/// Length of the structure of a message about an interface, `ifinfomsg`.
const IFINFOMSG: usize = 16;

/// The ingress queueing discipline's handle, and the place where it and nothing else is put (linux/pkt_sched.h).
const HANDLE: u32 = 0xffff_0000;
const TC_H_INGRESS: u32 = 0xffff_fff1;
/// Where a filter for what comes in is put, be the queueing discipline `ingress` or `clsact`.
const TC_H_CLSACT_INGRESS: u32 = 0xffff_fff2;

/// After all filters that others may have put there.
const PRIORITY: u32 = 0xfff0;
const ETH_P_ALL: u16 = 0x0003;

// The classifier `u32`, which every kernel has that has any (linux/pkt_cls.h): one key, which fits everything.
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TC_U32_TERMINAL: u8 = 1;

// The action `mirred` (linux/tc_act/tc_mirred.h).
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_EGRESS_REDIR: u32 = 1;
const TC_ACT_STOLEN: u32 = 4;

/// Joins an interface and the tap beside it, in both directions.
pub fn join(
    socket: &mut Socket,
    interface: &Interface,
    tap: u32,
    has_qdisc: bool,
) -> Result<(), Error> {
    let failed = |operation| {
        move |source| Error::Interface {
            name: interface.name.clone(),
            operation,
            source,
        }
    };
    let add_qdisc = "add an ingress queueing discipline";
    if !has_qdisc {
        socket
            .request(qdisc(RTM_NEWQDISC, interface.index))
            .map_err(failed(add_qdisc))?;
    }
    socket
        .request(qdisc(RTM_NEWQDISC, tap))
        .map_err(failed(add_qdisc))?;
    for (from, to) in [(interface.index, tap), (tap, interface.index)] {
        socket
            .request(redirection(from, to))
            .map_err(failed("redirect what comes in"))?;
    }
    Ok(())
}

/// Takes away what [`join`] has put at an interface.
pub fn leave(socket: &mut Socket, hook: &Hook) -> Result<(), netlink::Error> {
    let Hook {
        index,
        had_qdisc,
        queue_length,
    } = *hook;
    if had_qdisc {
        return socket.request(filter(RTM_DELTFILTER, 0, index).with_text(TCA_KIND, "u32"));
    }
    socket.request(qdisc(RTM_DELQDISC, index))?;
    let mut link = [0; IFINFOMSG];
    link[4..8].copy_from_slice(&index.to_ne_bytes());
    socket
        .request(Message::new(RTM_NEWLINK, 0, &link).with(IFLA_TXQLEN, &queue_length.to_ne_bytes()))
}

fn qdisc(kind: u16, index: u32) -> Message {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let flags = if kind == RTM_NEWQDISC { flags } else { 0 };
    Message::new(kind, flags, &tcmsg(index, HANDLE, TC_H_INGRESS, 0)).with_text(TCA_KIND, "ingress")
}

fn filter(kind: u16, flags: u16, index: u32) -> Message {
    let info = PRIORITY << 16 | u32::from(ETH_P_ALL.to_be());
    Message::new(kind, flags, &tcmsg(index, 0, TC_H_CLSACT_INGRESS, info))
}

/// `struct tcmsg`.
fn tcmsg(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    for (at, number) in [(4, index), (8, handle), (12, parent), (16, info)] {
        bytes[at..at + 4].copy_from_slice(&number.to_ne_bytes());
    }
    bytes
}

/// Whatever comes in at `from` goes out at `to`.
fn redirection(from: u32, to: u32) -> Message {
    // `struct tc_u32_sel` with a `struct tc_u32_key` without any bit to compare.
    let mut selector = [0; 32];
    selector[0] = TC_U32_TERMINAL;
    selector[2] = 1;
    // `struct tc_mirred`: index, capabilities, action, two counters, what to do, with which interface.
    let words = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to];
    let parameters: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    filter(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, from)
        .with_text(TCA_KIND, "u32")
        .with_nested(TCA_OPTIONS, |message| {
            message
                .with(TCA_U32_SEL, &selector)
                .with_nested(TCA_U32_ACT, |message| {
                    // The first action.
                    message.with_nested(1, |message| {
                        message
                            .with_text(TCA_ACT_KIND, "mirred")
                            .with_nested(TCA_ACT_OPTIONS, |message| {
                                message.with(TCA_MIRRED_PARMS, &parameters)
                            })
                    })
                })
        })
}
