//! The network of a container, under Bulkhead and under runc: the same bridge and the same kind of veth, made by CNI.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use bulkhead_tests::bench::{Row, Unit};
use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::ctr::{Runtime, World};
use bulkhead_tests::error::{Context, Result};
use bulkhead_tests::site::Site;
use serde_json::json;

use crate::meter::{Meter, Shares, vmm};
use crate::traffic::{self, Order, Place, Side};
use crate::{REPEATS, STREAM_LIMIT, insist, quotients, remove};

/// Where containerd looks for networks and their plugins, and where Debian puts the plugins.
const NETWORKS: &str = "/etc/cni/net.d";
const PLUGINS: &str = "/opt/cni/bin";
const DEBIAN_PLUGINS: &str = "/usr/lib/cni";

/// A bridge on which the node has the first address.
const BRIDGE: &str = r#"{
  "cniVersion": "0.4.0",
  "name": "bench",
  "plugins": [{
    "type": "bridge",
    "bridge": "bench",
    "isGateway": true,
    "ipam": {"type": "host-local", "subnet": "10.90.0.0/24"}
  }]
}"#;
const NODE: &str = "10.90.0.1";

const MIB: u64 = 1 << 20;

/// Something that goes over the network.
struct Kind {
    /// Its rows: under Bulkhead, under runc, the quotient.
    names: [&'static str; 3],
    /// And where Bulkhead's instructions go: the guest, the VMM, the rest of the node.
    shares: Option<[&'static str; 3]>,
    what: &'static str,
    order: Order,
    /// How many of what is counted are in the order.
    count: u64,
}

const KINDS: [Kind; 5] = [
    Kind {
        names: ["tcp-out", "tcp-out-runc", "tcp-out-ratio"],
        shares: Some(["tcp-out-guest", "tcp-out-vmm", "tcp-out-host"]),
        what: "a MiB by TCP from the container to the node, under Bulkhead",
        order: Order::StreamOut(16 * MIB),
        count: 16,
    },
    Kind {
        names: ["tcp-in", "tcp-in-runc", "tcp-in-ratio"],
        shares: Some(["tcp-in-guest", "tcp-in-vmm", "tcp-in-host"]),
        what: "a MiB by TCP from the node to the container, under Bulkhead",
        order: Order::StreamIn(16 * MIB),
        count: 16,
    },
    Kind {
        names: ["tcp-request", "tcp-request-runc", "tcp-request-ratio"],
        shares: None,
        what: "a request of a byte and its answer by TCP, under Bulkhead",
        order: Order::Requests(300),
        count: 300,
    },
    Kind {
        names: ["udp-64", "udp-64-runc", "udp-64-ratio"],
        shares: None,
        what: "a UDP datagram of 64 bytes, half of them each way, under Bulkhead",
        order: Order::Datagrams(1024, 64),
        count: 1024,
    },
    Kind {
        names: ["udp-1400", "udp-1400-runc", "udp-1400-ratio"],
        shares: None,
        what: "a UDP datagram of 1,400 bytes, half of them each way, under Bulkhead",
        order: Order::Datagrams(1024, 1400),
        count: 1024,
    },
];

/// The rows' names.
pub const NAMES: &[&str] = &[
    "tcp-out",
    "tcp-out-runc",
    "tcp-out-ratio",
    "tcp-out-guest",
    "tcp-out-vmm",
    "tcp-out-host",
    "tcp-in",
    "tcp-in-runc",
    "tcp-in-ratio",
    "tcp-in-guest",
    "tcp-in-vmm",
    "tcp-in-host",
    "tcp-request",
    "tcp-request-runc",
    "tcp-request-ratio",
    "udp-64",
    "udp-64-runc",
    "udp-64-ratio",
    "udp-1400",
    "udp-1400-runc",
    "udp-1400-ratio",
];

/// Sends everything under both runtimes in turn.
pub fn traffic(_: &Site) -> Result<Vec<Row>> {
    let world = World::new()?;
    fs::create_dir_all(NETWORKS).or_cannot(format!("create {NETWORKS}"))?;
    let network = Path::new(NETWORKS).join("10-bench.conflist");
    fs::write(&network, BRIDGE).or_cannot(format!("write {}", network.display()))?;
    if !Path::new(PLUGINS).exists() {
        let parent = Path::new(PLUGINS).parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).or_cannot(format!("create {}", parent.display()))?;
        symlink(DEBIAN_PLUGINS, PLUGINS).or_cannot(format!("link {PLUGINS}"))?;
    }
    let place = Place::new()?;
    // Each in a control group of its own: runc ends all that is in its container's.
    let bundles = [bundle(&world, place.port())?, bundle(&world, place.port())?];
    let mut rows = Vec::new();
    for kind in &KINDS {
        let Measured {
            our,
            their,
            shares,
            total,
        } = insist(STREAM_LIMIT, || measure(&world, &bundles, &place, kind))?;
        let row = |name, what, unit, values| Row {
            name,
            what,
            unit,
            values,
        };
        let [name, runc, ratio] = kind.names;
        let quotients = quotients(&our, &their);
        rows.push(row(name, kind.what, Unit::Thousands, our));
        rows.push(row(runc, "the same under runc", Unit::Thousands, their));
        rows.push(row(
            ratio,
            "the quotient of the two",
            Unit::Ratio,
            quotients,
        ));
        if let Some([guest, vmm, host]) = kind.shares {
            let share = |time: Duration| vec![kind.of_each(time) / REPEATS as f64];
            let rest = total.saturating_sub(shares.guest + shares.vmm);
            let share = |name, what, time| row(name, what, Unit::Thousands, share(time));
            rows.push(share(
                guest,
                "of these, in the guest (sampled)",
                shares.guest,
            ));
            rows.push(share(
                vmm,
                "in the VMM and its system calls (sampled)",
                shares.vmm,
            ));
            rows.push(share(
                host,
                "in the rest of the node: its kernel, the other side",
                rest,
            ));
        }
    }
    drop(bundles);
    world.finish()?;
    Ok(rows)
}

/// What was measured of one kind.
struct Measured {
    /// Thousands of instructions for each of what is counted, in each repeat.
    our: Vec<f64>,
    their: Vec<f64>,
    /// Of all repeats of ours.
    shares: Shares,
    total: Duration,
}

/// Sends one kind to a new container of each runtime.
fn measure(world: &World, bundles: &[Bundle; 2], place: &Place, kind: &Kind) -> Result<Measured> {
    let ours = world.start_bundle(Runtime::Bulkhead, &bundles[0])?;
    let our_side = place.accept();
    let theirs = world.start_bundle(Runtime::Runc, &bundles[1])?;
    let their_side = place.accept();
    // The containers would end with their sides.
    let (result, _sides) = match (our_side, their_side) {
        (Ok(mut our), Ok(mut their)) => (compare(&mut our, &mut their, kind), Some((our, their))),
        (Err(error), _) | (_, Err(error)) => (Err(error), None),
    };
    theirs.delete()?;
    remove(ours, &result)?;
    result
}

/// Sends one kind to both in turn.
fn compare(our_side: &mut Side, their_side: &mut Side, kind: &Kind) -> Result<Measured> {
    let vmm = vmm()?;
    // Once before what counts: windows and caches have grown then.
    our_side.order(kind.order)?;
    their_side.order(kind.order)?;
    let mut measured = Measured {
        our: Vec::new(),
        their: Vec::new(),
        shares: Shares::default(),
        total: Duration::ZERO,
    };
    for _ in 0..REPEATS {
        let before = Shares::of(vmm)?;
        let busy = counted(our_side, kind.order)?;
        measured.shares = measured.shares + Shares::of(vmm)?.since(before);
        measured.total += busy;
        measured.our.push(kind.of_each(busy));
        measured
            .their
            .push(kind.of_each(counted(their_side, kind.order)?));
    }
    Ok(measured)
}

impl Kind {
    /// Thousands of instructions for each of what is counted.
    fn of_each(&self, busy: Duration) -> f64 {
        Unit::Thousands.of(busy) / self.count as f64
    }
}

/// How long the node's processor is busy with an order.
fn counted(side: &mut Side, order: Order) -> Result<Duration> {
    let meter = Meter::start()?;
    side.order(order)?;
    meter.busy()
}

/// A container that holds this program, and in which it is the other side.
fn bundle(world: &World, port: u16) -> Result<Bundle> {
    let mut bundle = Bundle::new(&world.site().directory, "")?;
    bundle.options.push("--cni");
    let program = bundle.root().join("bin/bench");
    let this = std::env::current_exe().or_cannot("find this program's file")?;
    fs::copy(this, &program).or_cannot(format!("write {}", program.display()))?;
    bundle.config["process"]["args"] =
        json!(["/bin/bench", traffic::VERB, format!("{NODE}:{port}")]);
    Ok(bundle)
}
