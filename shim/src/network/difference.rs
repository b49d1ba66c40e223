//! What a guest is told after a change: what is no more, and what is new.

use std::collections::HashMap;

use bulkhead_agent::netlink::{Message, attribute, attributes, number};
use libc::{
    IFA_CACHEINFO, IFA_FLAGS, NDA_CACHEINFO, NDA_PROBES, RTA_CACHEINFO, RTM_NEWADDR, RTM_NEWROUTE,
};

// Lengths of the structures that messages begin with (linux/rtnetlink.h).
const IFADDRMSG: usize = 8;
const RTMSG: usize = 12;
const NDMSG: usize = 12;

/// Flags of an address (linux/if_addr.h) that say what has become of it: it is not the first of its network (or temporary), not
/// yet known to be free, deprecated, without an end.
const PASSING: u32 = 0x01 | 0x04 | 0x20 | 0x80;
/// Where `ifaddrmsg` has the first eight of them.
const FLAGS: usize = 2;

/// What is to be removed, and what is to be added.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    pub removed: Vec<Message>,
    pub added: Vec<Message>,
}

impl Difference {
    /// What leads from what was said to what is said now.
    pub fn new(before: &[Message], after: &[Message]) -> Self {
        let index = |messages: &[Message]| -> HashMap<_, _> {
            let entry = |message| (identity(message), life(message));
            messages.iter().map(entry).collect()
        };
        let (old, new) = (index(before), index(after));
        let is_gone = |message: &&Message| !new.contains_key(&identity(message));
        let removed: Vec<_> = before.iter().filter(is_gone).cloned().collect();
        // With an address go others of its network, and routes: what is to stay is said again.
        let all = removed.iter().any(|message| message.kind() == RTM_NEWADDR);
        let is_new = |message: &&Message| match old.get(&identity(message)) {
            None => true,
            Some(old) => all || life(message).iter().zip(old).any(|(now, then)| now > then),
        };
        let added = after.iter().filter(is_new).cloned().collect();
        Self { removed, added }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }
}

/// What makes a message differ from others: all of it, but for what comes with time.
fn identity(message: &Message) -> Vec<u8> {
    let (length, passing): (_, &[u16]) = match message.kind() {
        RTM_NEWADDR => (IFADDRMSG, &[IFA_CACHEINFO]),
        RTM_NEWROUTE => (RTMSG, &[RTA_CACHEINFO]),
        _ => (NDMSG, &[NDA_CACHEINFO, NDA_PROBES]),
    };
    let body = message.body();
    let (head, rest) = body.split_at(length.min(body.len()));
    let mut identity = message.kind().to_ne_bytes().to_vec();
    identity.extend(head);
    let is_address = message.kind() == RTM_NEWADDR;
    if is_address {
        identity[2 + FLAGS] &= !(PASSING as u8);
    }
    for (kind, value) in attributes(rest) {
        if passing.contains(&kind) {
            continue;
        }
        let value = &rest[value];
        identity.extend(kind.to_ne_bytes());
        identity.extend((value.len() as u16).to_ne_bytes());
        match number(value, 0) {
            Some(flags) if is_address && kind == IFA_FLAGS => {
                identity.extend((flags & !PASSING).to_ne_bytes());
            }
            _ => identity.extend(value),
        }
    }
    identity
}

/// For how many seconds from now an address is preferred and valid. It gets less by itself, and more when somebody wants it so.
fn life(message: &Message) -> [u32; 2] {
    let rest = match message.kind() {
        RTM_NEWADDR => message.body().get(IFADDRMSG..),
        _ => None,
    };
    let life = rest.and_then(|rest| attribute(rest, IFA_CACHEINFO));
    let of = |offset| {
        life.and_then(|life| number(life, offset))
            .unwrap_or_default()
    };
    [of(0), of(4)]
}
