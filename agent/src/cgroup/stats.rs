//! The statistics of a control group, as containerd's `io.containerd.cgroups.v2.Metrics`.

use std::io;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PSIData,
    PSIStats, PidsStat,
};
use protobuf::MessageField;

use super::Cgroup;
use crate::error::{Context, Error};

impl Cgroup {
    /// Reads all statistics. What the kernel does not count, because it lacks a controller or an option, is left out.
    pub fn statistics(&self) -> Result<Metrics, Error> {
        self.read_statistics()
            .context(|| format!("reading the statistics of {}", self.path().display()))
    }

    fn read_statistics(&self) -> io::Result<Metrics> {
        let mut metrics = Metrics::new();
        if let Some(text) = self.optional("cpu.stat")? {
            let mut cpu = cpu(&text);
            cpu.psi = self.pressure("cpu.pressure")?;
            metrics.cpu = MessageField::some(cpu);
        }
        if let Some(text) = self.optional("memory.stat")? {
            let mut memory = memory(&text);
            memory.usage = self.number("memory.current")?;
            memory.usage_limit = self.number("memory.max")?;
            memory.max_usage = self.number("memory.peak")?;
            memory.swap_usage = self.number("memory.swap.current")?;
            memory.swap_limit = self.number("memory.swap.max")?;
            memory.swap_max_usage = self.number("memory.swap.peak")?;
            memory.psi = self.pressure("memory.pressure")?;
            metrics.memory = MessageField::some(memory);
        }
        if let Some(text) = self.optional("memory.events")? {
            metrics.memory_events = MessageField::some(memory_events(&text));
        }
        if self.optional("pids.current")?.is_some() {
            let mut pids = PidsStat::new();
            pids.current = self.number("pids.current")?;
            // Here, unlike for memory, 0 is what stands for no limit.
            pids.limit = self.maximum("pids.max")?.unwrap_or(0);
            metrics.pids = MessageField::some(pids);
        }
        if let Some(text) = self.optional("io.stat")? {
            let mut stat = IOStat::new();
            stat.usage = text.lines().filter_map(io_entry).collect();
            stat.psi = self.pressure("io.pressure")?;
            metrics.io = MessageField::some(stat);
        }
        metrics.hugetlb = self.huge_pages()?;
        Ok(metrics)
    }

    fn optional(&self, file: &str) -> io::Result<Option<String>> {
        match self.read(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // How pressure reads where it is switched off at boot.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            text => text.map(Some),
        }
    }

    /// A file's number; none for `max`, or if there is no such file.
    fn maximum(&self, file: &str) -> io::Result<Option<u64>> {
        Ok(self
            .optional(file)?
            .and_then(|text| text.trim_end().parse().ok()))
    }

    /// A file's number; `max` is the largest, and 0 stands for a file that does not exist.
    fn number(&self, file: &str) -> io::Result<u64> {
        Ok(match self.optional(file)?.as_deref().map(str::trim_end) {
            None => 0,
            Some("max") => u64::MAX,
            Some(number) => number.parse().map_err(io::Error::other)?,
        })
    }

    fn pressure(&self, file: &str) -> io::Result<MessageField<PSIStats>> {
        Ok(match self.optional(file)? {
            None => MessageField::none(),
            Some(text) => MessageField::some(pressure(&text)),
        })
    }

    fn huge_pages(&self) -> io::Result<Vec<HugeTlbStat>> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(self.path())? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            let size = name.strip_prefix("hugetlb.");
            let Some(size) = size.and_then(|name| name.strip_suffix(".current")) else {
                continue;
            };
            // "2MB.rsvd" counts reservations.
            if size.contains('.') {
                continue;
            }
            let mut stat = HugeTlbStat::new();
            stat.current = self.number(&name)?;
            stat.max = self.number(&format!("hugetlb.{size}.max"))?;
            let events = self.optional(&format!("hugetlb.{size}.events"))?;
            let events = events.unwrap_or_default();
            stat.failcnt = pairs(&events)
                .find(|&(name, _)| name == "max")
                .map_or(0, |(_, n)| n);
            stat.pagesize = size.to_owned();
            all.push(stat);
        }
        all.sort_by(|a, b| a.pagesize.cmp(&b.pagesize));
        Ok(all)
    }
}

/// The counters of the interfaces that a process sees, but for the loopback; none if it has ended.
pub fn network(pid: u32) -> Result<Vec<NetworkStat>, Error> {
    let path = format!("/proc/{pid}/net/dev");
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.lines().filter_map(interface).collect()),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ESRCH | libc::EINVAL)
            ) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error).context(|| format!("reading {path}")),
    }
}

/// A line of `/proc/net/dev`: a name and sixteen numbers. The lines above the table have none.
fn interface(line: &str) -> Option<NetworkStat> {
    let (name, numbers) = line.split_once(':')?;
    let name = name.trim();
    let numbers: Vec<u64> = numbers
        .split_ascii_whitespace()
        .map(|number| number.parse().ok())
        .collect::<Option<_>>()?;
    let [received, sent] = [numbers.get(..4)?, numbers.get(8..12)?];
    (name != "lo").then(|| NetworkStat {
        name: name.into(),
        rx_bytes: received[0],
        rx_packets: received[1],
        rx_errors: received[2],
        rx_dropped: received[3],
        tx_bytes: sent[0],
        tx_packets: sent[1],
        tx_errors: sent[2],
        tx_dropped: sent[3],
        ..Default::default()
    })
}

/// The lines of a file of names and numbers.
pub(super) fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (name, number) = line.split_once(' ')?;
        Some((name, number.parse().ok()?))
    })
}

/// Fills the fields of a message that are named as the lines of a file.
macro_rules! fill {
    ($message:ident from $text:expr; $($field:ident)*) => {{
        let mut message = $message::new();
        for (name, number) in pairs($text) {
            match name {
                $(stringify!($field) => message.$field = number,)*
                // The kernel counts more than the message holds.
                _ => {}
            }
        }
        message
    }};
}

fn cpu(text: &str) -> CPUStat {
    fill!(CPUStat from text; usage_usec user_usec system_usec nr_periods nr_throttled
        throttled_usec nr_bursts burst_usec)
}

fn memory(text: &str) -> MemoryStat {
    fill!(MemoryStat from text; anon file kernel_stack slab sock shmem file_mapped file_dirty
        file_writeback anon_thp inactive_anon active_anon inactive_file active_file unevictable
        slab_reclaimable slab_unreclaimable pgfault pgmajfault workingset_refault
        workingset_activate workingset_nodereclaim pgrefill pgscan pgsteal pgactivate
        pgdeactivate pglazyfree pglazyfreed thp_fault_alloc thp_collapse_alloc)
}

fn memory_events(text: &str) -> MemoryEvents {
    fill!(MemoryEvents from text; low high max oom oom_kill oom_group_kill)
}

/// A line of `io.stat`: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
fn io_entry(line: &str) -> Option<IOEntry> {
    let mut words = line.split(' ');
    let (major, minor) = words.next()?.split_once(':')?;
    let mut entry = IOEntry::new();
    entry.major = major.parse().ok()?;
    entry.minor = minor.parse().ok()?;
    for (name, number) in words.filter_map(|word| word.split_once('=')) {
        let number = number.parse().ok()?;
        match name {
            "rbytes" => entry.rbytes = number,
            "wbytes" => entry.wbytes = number,
            "rios" => entry.rios = number,
            "wios" => entry.wios = number,
            // Discards and what controllers add.
            _ => {}
        }
    }
    Some(entry)
}

/// Two lines: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`.
fn pressure(text: &str) -> PSIStats {
    let mut stats = PSIStats::new();
    for line in text.lines() {
        let mut data = PSIData::new();
        for (name, value) in line.split(' ').filter_map(|word| word.split_once('=')) {
            match name {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                "total" => data.total = value.parse().unwrap_or(0),
                // Nothing else is there today.
                _ => {}
            }
        }
        if line.starts_with("some ") {
            stats.some = MessageField::some(data);
        } else if line.starts_with("full ") {
            stats.full = MessageField::some(data);
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_become_messages() {
        let cpu = cpu("usage_usec 5\nuser_usec 3\nsystem_usec 2\ncore_sched.force_idle_usec 0\n");
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (5, 3, 2));
        let memory = memory("anon 4096\ninactive_file 7\nsomething_new 9\n");
        assert_eq!((memory.anon, memory.inactive_file), (4096, 7));
        assert_eq!(memory_events("oom 1\noom_kill 2\n").oom_kill, 2);
        let entry = io_entry("253:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0").unwrap();
        assert_eq!((entry.major, entry.wbytes, entry.wios), (253, 2, 4));
        assert!(io_entry("").is_none());
        let psi = pressure(
            "some avg10=1.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=3\n",
        );
        assert_eq!(
            (psi.some.avg10, psi.some.total, psi.full.avg10),
            (1.5, 7, 0.25)
        );
    }

    #[test]
    fn interfaces_have_counters() {
        let text = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     184       2    0    0    0     0          0         0      184       2    0    0    0     0       0          0
  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
";
        let found: Vec<_> = text.lines().filter_map(interface).collect();
        assert_eq!(found.len(), 1);
        let eth0 = &found[0];
        assert_eq!(eth0.name, "eth0");
        assert_eq!(
            [
                eth0.rx_bytes,
                eth0.rx_packets,
                eth0.rx_errors,
                eth0.rx_dropped
            ],
            [1, 2, 3, 4]
        );
        assert_eq!(
            [
                eth0.tx_bytes,
                eth0.tx_packets,
                eth0.tx_errors,
                eth0.tx_dropped
            ],
            [9, 10, 11, 12]
        );
        assert_eq!(network(u32::MAX).unwrap(), []);
    }
}
