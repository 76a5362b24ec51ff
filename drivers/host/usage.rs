//! What processes, threads and network devices of the host have used, as the kernel counts it. All of these files answer at once.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use virt_model::driver::stats::{CpuStats, Packets, ThreadStats};

/// What a process takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessUsage {
    /// CPU time of all its threads, those included that have ended.
    pub cpu: CpuStats,
    /// Bytes of it that are in memory.
    pub resident: u64,
}

/// What a process takes. Whoever asks makes sure that it is still the same process afterwards.
pub fn of_process(pid: i32) -> io::Result<ProcessUsage> {
    let units = (rustix::param::clock_ticks_per_second(), rustix::param::page_size() as u64);
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    process_of(&String::from_utf8_lossy(&stat), units).ok_or_else(|| unexpected("/proc/PID/stat"))
}

/// Our numbers of a process' threads by its own, as they were when they were last needed.
pub type ThreadNumbers = BTreeMap<i32, i32>;

/// What threads of a process have run, and waited to run, by the numbers that the process itself calls them by; without those that
/// have ended. The same holds for its process.
pub fn of_threads(pid: i32, ids: &[i32], known: &mut ThreadNumbers) -> BTreeMap<i32, ThreadStats> {
    of_known_threads(pid, ids, known).unwrap_or_else(|| {
        *known = our_numbers(pid).unwrap_or_else(|| ids.iter().map(|id| (*id, *id)).collect());
        let threads = ids.iter().filter_map(|id| Some((*id, of_thread(pid, *known.get(id)?).ok()?)));
        threads.collect()
    })
}

/// The same, by what is known of their numbers alone: one file for each. `None` where that does not do any more.
pub fn of_known_threads(pid: i32, ids: &[i32], known: &ThreadNumbers) -> Option<BTreeMap<i32, ThreadStats>> {
    ids.iter().map(|id| Some((*id, of_thread(pid, *known.get(id)?).ok()?))).collect()
}

/// Our numbers of a process' threads by its own, where it lives in a namespace of its own; `None`: they are the same.
pub fn our_numbers(pid: i32) -> Option<BTreeMap<i32, i32>> {
    let own = |folder: &Path| own_number(&fs::read_to_string(folder.join("status")).ok()?);
    let process = PathBuf::from(format!("/proc/{pid}"));
    if own(&process).is_none_or(|number| number == pid) {
        return None;
    }
    let threads = fs::read_dir(process.join("task")).into_iter().flatten().flatten();
    let numbers = |thread: fs::DirEntry| Some((own(&thread.path())?, thread.file_name().to_str()?.parse().ok()?));
    Some(threads.filter_map(numbers).collect())
}

/// What a task is called in the innermost of its namespaces, by its `status`.
fn own_number(status: &str) -> Option<i32> {
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?.parse().ok()
}

fn of_thread(pid: i32, thread: i32) -> io::Result<ThreadStats> {
    let task = format!("/proc/{pid}/task/{thread}");
    let stat = fs::read(format!("{task}/stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    // Where the kernel does not count when it chooses who runs, it still counts ticks.
    let scheduled = fs::read_to_string(format!("{task}/schedstat")).unwrap_or_default();
    thread_of(&stat, &scheduled, rustix::param::clock_ticks_per_second())
        .ok_or_else(|| unexpected("/proc/PID/task/TID/stat"))
}

/// What went through a network device of the host's, as the guest at it sees that: received, sent. `None` if there is no such
/// device.
pub fn of_link(name: &str) -> Option<(Packets, Packets)> {
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return None;
    }
    link_at(&Path::new("/sys/class/net").join(name))
}

/// The same of a tap in the network of that process.
pub fn of_tap(name: &str, pid: i32) -> Option<(Packets, Packets)> {
    of_tap_in(&fs::read_to_string(format!("/proc/{pid}/net/dev")).ok()?, name)
}

/// The same, as the kernel's table of devices tells it.
fn of_tap_in(table: &str, name: &str) -> Option<(Packets, Packets)> {
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    let counts: Vec<u64> = line.split_ascii_whitespace().map_while(|count| count.parse().ok()).collect();
    let direction = |at: usize| match counts.get(at..at + 4)? {
        [bytes, packets, errors, drops] => {
            Some(Packets { bytes: *bytes, packets: *packets, errors: *errors, drops: *drops })
        }
        _ => None,
    };
    // What the host receives the guest has sent.
    Some((direction(8)?, direction(0)?))
}

fn link_at(device: &Path) -> Option<(Packets, Packets)> {
    let direction = |way: &str| {
        let counted = |what: &str| {
            fs::read_to_string(device.join("statistics").join(format!("{way}_{what}"))).ok()?.trim().parse().ok()
        };
        Some(Packets {
            bytes: counted("bytes")?,
            packets: counted("packets")?,
            errors: counted("errors")?,
            drops: counted("dropped")?,
        })
    };
    let (received, sent) = (direction("rx")?, direction("tx")?);
    // At a tap the host receives what the guest sends; a macvtap is a card, whose packets are the guest's.
    match device.join("tun_flags").exists() {
        true => Some((sent, received)),
        false => Some((received, sent)),
    }
}

/// The fields that follow a task's name, which may contain anything.
fn fields(stat: &str) -> Option<Vec<&str>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace().collect())
}

fn ticks(fields: &[&str], at: usize, per_second: u64) -> Option<u64> {
    Some(fields.get(at)?.parse::<u64>().ok()?.saturating_mul(1_000_000) / per_second.max(1))
}

/// `units`: ticks a second, bytes a page.
fn process_of(stat: &str, units: (u64, u64)) -> Option<ProcessUsage> {
    let fields = fields(stat)?;
    let cpu = CpuStats { user_usec: ticks(&fields, 11, units.0)?, system_usec: ticks(&fields, 12, units.0)? };
    Some(ProcessUsage { cpu, resident: fields.get(21)?.parse::<u64>().ok()?.saturating_mul(units.1) })
}

fn thread_of(stat: &str, scheduled: &str, ticks_per_second: u64) -> Option<ThreadStats> {
    let fields = fields(stat)?;
    let mut nanoseconds = scheduled.split_ascii_whitespace().map_while(|number| number.parse::<u64>().ok());
    let (time_usec, wait_usec) = match (nanoseconds.next(), nanoseconds.next()) {
        (Some(run), Some(waited)) => (run / 1000, waited / 1000),
        _ => (ticks(&fields, 11, ticks_per_second)? + ticks(&fields, 12, ticks_per_second)?, 0),
    };
    Some(ThreadStats { time_usec, wait_usec, sleeps: fields.first().is_some_and(|state| *state == "S") })
}

fn unexpected(file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("unexpected form of {file}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "7 (a) b (c)) S 1 2 3 0 -1 4 5 6 7 8 250 50 0 0 20 0 4 0 99 1000000 300 18446744073709551615 0";

    #[test]
    fn a_process_is_counted_whatever_its_name() {
        let usage = process_of(STAT, (100, 4096)).unwrap();
        let cpu = CpuStats { user_usec: 2_500_000, system_usec: 500_000 };
        assert_eq!(usage, ProcessUsage { cpu, resident: 300 * 4096 });
        assert_eq!(process_of("7 (a) S 1", (100, 4096)), None);
    }

    #[test]
    fn a_tap_is_counted_as_its_guest_sees_it() {
        let table = "Inter-|   Receive        |  Transmit\n face |bytes packets errs drop ...\n\
            vnet12: 9 9 9 9 0 0 0 0 9 9 9 9 0 0 0 0\n vnet1:  100 7 1 2 0 0 0 0   300 8 3 4 0 0 0 0\n";
        let packets = |bytes, packets, errors, drops| Packets { bytes, packets, errors, drops };
        assert_eq!(of_tap_in(table, "vnet1"), Some((packets(300, 8, 3, 4), packets(100, 7, 1, 2))));
        assert_eq!((of_tap_in(table, "vnet"), of_tap_in(table, "")), (None, None));
    }

    #[test]
    fn a_thread_is_counted_finely_where_the_kernel_does() {
        let fine = ThreadStats { time_usec: 1234, wait_usec: 5, sleeps: true };
        assert_eq!(thread_of(STAT, "1234567 5678 9\n", 100), Some(fine));
        let coarse = ThreadStats { time_usec: 3_000_000, wait_usec: 0, sleeps: true };
        assert_eq!(thread_of(STAT, "", 100), Some(coarse));
    }

    #[test]
    fn our_own_process_and_threads_are_there() {
        let pid = std::process::id().try_into().unwrap();
        assert!(of_process(pid).unwrap().resident > 0);
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let found = of_threads(pid, &[thread, 0], &mut ThreadNumbers::new());
        assert!(found.len() == 1 && !found[&thread].sleeps, "it runs this: {found:?}");
    }

    #[test]
    fn a_task_is_known_by_its_own_number_wherever_it_lives() {
        assert_eq!(own_number("Name:\ta\nNSpid:\t22326\t7\nNSpgid:\t1\n"), Some(7));
        assert_eq!(own_number("Name:\ta\nNSpid:\t22326\n"), Some(22326));
    }

    #[test]
    fn a_tap_is_seen_from_the_guests_side_and_a_macvtap_as_it_is() {
        let device = tempfile::tempdir().unwrap();
        let counters = device.path().join("statistics");
        fs::create_dir(&counters).unwrap();
        for (n, what) in ["bytes", "packets", "errors", "dropped"].iter().enumerate() {
            fs::write(counters.join(format!("rx_{what}")), format!("{}\n", n + 1)).unwrap();
            fs::write(counters.join(format!("tx_{what}")), format!("{}\n", n + 11)).unwrap();
        }
        let (rx, tx) = ([1, 2, 3, 4], [11, 12, 13, 14]);
        let packets = |[bytes, packets, errors, drops]: [u64; 4]| Packets { bytes, packets, errors, drops };
        assert_eq!(link_at(device.path()), Some((packets(rx), packets(tx))));
        fs::write(device.path().join("tun_flags"), "0x1002\n").unwrap();
        assert_eq!(link_at(device.path()), Some((packets(tx), packets(rx))));
    }

    #[test]
    fn a_name_that_is_a_path_is_no_device() {
        for name in ["", "..", "../net/lo", "nobody0"] {
            assert_eq!(of_link(name), None, "{name}");
        }
        assert!(of_link("lo").is_some());
    }
}
