//! What the node's processor executes, and in whose name.

use std::fs;
use std::ops::Add;
use std::time::{Duration, Instant};

use bulkhead_tests::error::{Context, Error, Result};
use bulkhead_tests::process;

use crate::VMM;

/// Where the kernel tells how long its processors have been idle, in nanoseconds.
const TIMERS: &str = "/proc/timer_list";

/// The unit of processes' times in `/proc`, which is part of the kernel's interface (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

/// Begins where the counting of instructions begins.
///
/// The clock also advances while the processor waits for its next timer, though nothing is executed then: that time is none of
/// anybody's instructions.
#[derive(Debug)]
pub struct Meter {
    start: Instant,
    idle: Duration,
}

impl Meter {
    pub fn start() -> Result<Self> {
        Ok(Self {
            idle: idle()?,
            start: Instant::now(),
        })
    }

    /// How long the processor has been executing instructions since then.
    pub fn busy(&self) -> Result<Duration> {
        let elapsed = self.start.elapsed();
        Ok(elapsed.saturating_sub(idle()? - self.idle))
    }
}

/// How long the processors have waited until now.
fn idle() -> Result<Duration> {
    let text = fs::read_to_string(TIMERS).or_cannot(format!("read {TIMERS}"))?;
    let mut waits = Vec::new();
    for line in text.lines() {
        let Some((".idle_sleeptime" | ".iowait_sleeptime", value)) = line
            .split_once(':')
            .map(|(key, value)| (key.trim(), value.trim()))
        else {
            continue;
        };
        let number = value
            .strip_suffix(" nsecs")
            .and_then(|text| text.parse().ok());
        waits.extend(number.map(Duration::from_nanos));
    }
    // Both for the one processor that the node has.
    match waits.as_slice() {
        &[idle, waiting] => Ok(idle + waiting),
        _ => Err(Error::Unfit(format!(
            "{TIMERS} tells {} times of idle processors instead of two",
            waits.len()
        ))),
    }
}

/// What a VMM has executed until now, as the kernel's timer has sampled it.
#[derive(Debug, Default, Clone, Copy)]
pub struct Shares {
    /// In the guest.
    pub guest: Duration,
    /// In the VMM, its system calls included.
    pub vmm: Duration,
}

impl Shares {
    /// Those of the process `vmm` (proc_pid_stat(5)).
    pub fn of(vmm: u32) -> Result<Self> {
        let path = format!("/proc/{vmm}/stat");
        let text = fs::read_to_string(&path).or_cannot(format!("read {path}"))?;
        // The name, in parentheses, may hold anything; behind it comes the third field.
        let fields: Vec<&str> = text
            .rsplit_once(')')
            .map(|(_, rest)| rest.split_whitespace().collect())
            .unwrap_or_default();
        let time = |number: usize| -> Result<Duration> {
            let field = fields.get(number - 3).and_then(|field| field.parse().ok());
            let ticks: u32 = field.ok_or_else(|| Error::Unfit(format!("{path} has {text:?}")))?;
            Ok(TICK * ticks)
        };
        let (user, system, guest) = (time(14)?, time(15)?, time(43)?);
        // The guest is a part of the user's.
        let vmm = (user + system).saturating_sub(guest);
        Ok(Self { guest, vmm })
    }

    /// What has come since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            guest: self.guest.saturating_sub(before.guest),
            vmm: self.vmm.saturating_sub(before.vmm),
        }
    }
}

impl Add for Shares {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            guest: self.guest + other.guest,
            vmm: self.vmm + other.vmm,
        }
    }
}

/// The process of the only VMM that there is.
pub fn vmm() -> Result<u32> {
    match process::named(VMM)?.as_slice() {
        [pid] => Ok(pid.as_raw_nonzero().get().unsigned_abs()),
        several => Err(Error::Unfit(format!(
            "there are {} processes of {VMM}, not one",
            several.len()
        ))),
    }
}
