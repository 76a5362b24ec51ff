//! Events of threads, which the host's CPUs and its kernel count for whoever may ask (`perf_event_open`).

use super::apart;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::LazyLock;
use std::time::Instant;
use tokio::sync::{Semaphore, SemaphorePermit};
use virt_model::driver::stats::{PerfEvent, PerfStats};

/// What a CPU counts, what the kernel does, and what its tracepoints do, by their numbers in the kernel's interface.
const HARDWARE: u32 = 0;
const SOFTWARE: u32 = 1;
const TRACEPOINT: u32 = 2;
/// Those that have numbers there.
const NUMBERED: [(PerfEvent, u32, u64); 9] = [
    (PerfEvent::Cycles, HARDWARE, 0),
    (PerfEvent::Instructions, HARDWARE, 1),
    (PerfEvent::CacheReferences, HARDWARE, 2),
    (PerfEvent::CacheMisses, HARDWARE, 3),
    (PerfEvent::Branches, HARDWARE, 4),
    (PerfEvent::BranchMisses, HARDWARE, 5),
    (PerfEvent::PageFaults, SOFTWARE, 2),
    (PerfEvent::ContextSwitches, SOFTWARE, 3),
    (PerfEvent::CpuMigrations, SOFTWARE, 4),
];
/// Where the number of another stands that is a tracepoint.
const KVM_EXIT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit/id";
/// All of them: each takes a descriptor for each thread.
const EVENTS: usize = NUMBERED.len() + 1;
/// Descriptors for the counters of all guests.
static ROOM: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(most()));
/// Told with a count: for how long it was wanted, and for how long there was room for it in the CPU.
const TIMES: u64 = 1 | 2;

/// The first version of `struct perf_event_attr`, which every kernel reads.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    address: u64,
}

/// So many descriptors counters may have together: a quarter of our own.
fn most() -> usize {
    usize::try_from(apart::first() / 4).unwrap_or_default()
}

/// Descriptors for the counters of so many threads. Waits until others have counted; who has some waits for no more. Error: they
/// would need more than there are for all.
pub async fn room_for(threads: usize) -> io::Result<SemaphorePermit<'static>> {
    let (wanted, most) = (threads.saturating_mul(EVENTS), most());
    let permits = u32::try_from(wanted).ok().filter(|_| wanted <= most);
    let permits = permits.ok_or_else(|| {
        let text = format!("{threads} threads need {wanted} descriptors, and virtd has {most} for that");
        io::Error::new(ErrorKind::QuotaExceeded, text)
    })?;
    ROOM.acquire_many(permits).await.map_err(io::Error::other)
}

/// Counters of threads, which begin when they are made and go on until they are dropped.
pub struct Counters {
    since: Instant,
    open: Vec<(PerfEvent, Vec<File>)>,
    /// Given back after they are closed.
    _room: SemaphorePermit<'static>,
}

impl Counters {
    /// Those of these threads of a process, for which there is room, as far as the host counts such events; of a thread that has
    /// ended there are none. Errors: the kernel does not let us count anything, or has nothing to count. Blocks.
    pub fn of_threads(room: SemaphorePermit<'static>, pid: i32, threads: &[i32]) -> io::Result<Counters> {
        let since = Instant::now();
        let mut open = Vec::new();
        for (event, kind, config) in NUMBERED.into_iter().chain(exits()) {
            match of_all(pid, threads, |thread| counter(kind, config, thread)) {
                Ok(counting) if counting.is_empty() => {}
                Ok(counting) => open.push((event, counting)),
                Err(e) if is_not_counted(&e) => {}
                Err(e) => return Err(e),
            }
        }
        match open.is_empty() {
            true => Err(io::Error::new(ErrorKind::Unsupported, "it counts none")),
            false => Ok(Counters { since, open, _room: room }),
        }
    }

    /// What they have counted so far. What there was no room for all the time is estimated, and left out where there was none at all.
    /// Blocks.
    pub fn read(&self) -> io::Result<PerfStats> {
        let mut events = Vec::new();
        for (event, counting) in &self.open {
            let mut all = Some(0_u64);
            for mut counter in counting {
                let mut told = [0; 24];
                counter.read_exact(&mut told)?;
                all = all.zip(counted(&told)).map(|(all, count)| all.saturating_add(count));
            }
            events.extend(all.map(|all| (*event, all)));
        }
        let period_usec = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(PerfStats { period_usec, events })
    }
}

/// A counter of each thread that the process has. Error: what making one says.
fn of_all(pid: i32, threads: &[i32], counter: impl Fn(i32) -> io::Result<File>) -> io::Result<Vec<File>> {
    let mut counting = Vec::new();
    for thread in threads {
        match counter(*thread) {
            // Its number is its own as long as the process has it.
            Ok(file) if Path::new(&format!("/proc/{pid}/task/{thread}")).exists() => counting.push(file),
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(counting)
}

/// What the kernel tells of a counter: a count, and its two times. `None`: it was wanted, and there was never room for it.
fn counted(told: &[u8; 24]) -> Option<u64> {
    let (numbers, _) = told.as_chunks::<8>();
    let [count, wanted, had] = [0, 1, 2].map(|at| u64::from_ne_bytes(numbers[at]));
    match had {
        had if had >= wanted => Some(count),
        0 => None,
        had => Some(u64::try_from(u128::from(count) * u128::from(wanted) / u128::from(had)).unwrap_or(u64::MAX)),
    }
}

/// Whether the host has no such event, or has none to spare.
fn is_not_counted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP | libc::EINVAL | libc::EBUSY))
}

/// How often a guest leaves its CPU for the kernel, where KVM tells that.
fn exits() -> Option<(PerfEvent, u32, u64)> {
    let id = std::fs::read_to_string(KVM_EXIT).ok()?;
    Some((PerfEvent::KvmExits, TRACEPOINT, id.trim().parse().ok()?))
}

fn counter(kind: u32, config: u64, thread: i32) -> io::Result<File> {
    let size = size_of::<Attributes>() as u32;
    let attributes = Attributes { kind, size, config, read_format: TIMES, ..Attributes::default() };
    // No process that is made here inherits it.
    let cloexec: libc::c_ulong = 8;
    // SAFETY: the attributes are as long as they say, and are read before it returns.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, thread, -1, -1, cloexec) };
    match i32::try_from(fd) {
        // SAFETY: it has just been made, and is nobody else's.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_had_room_for_half_the_time_is_counted_twice_and_what_had_none_is_not_known() {
        let told = |numbers: [u64; 3]| {
            let mut told = [0; 24];
            for (to, number) in told.chunks_mut(8).zip(numbers) {
                to.copy_from_slice(&number.to_ne_bytes());
            }
            counted(&told)
        };
        assert_eq!(told([7, 100, 100]), Some(7));
        assert_eq!(told([7, 100, 50]), Some(14));
        assert_eq!(told([0, 0, 0]), Some(0), "the thread has not run");
        assert_eq!(told([0, 100, 0]), None);
        assert_eq!(told([u64::MAX, 100, 1]), Some(u64::MAX));
    }

    #[tokio::test]
    async fn what_a_thread_does_is_counted_while_it_is_looked_on() {
        let pid = std::process::id().cast_signed();
        // SAFETY: it takes nothing.
        let thread = unsafe { libc::gettid() };
        let counters = match Counters::of_threads(room_for(1).await.unwrap(), pid, &[thread]) {
            Ok(counters) => counters,
            Err(e) => return eprintln!("SKIPPED: this host lets nobody count events: {e}"),
        };
        let memory = vec![1_u8; 8 << 20];
        assert_eq!(std::hint::black_box(&memory).iter().map(|byte| u64::from(*byte)).sum::<u64>(), 8 << 20);
        let told = counters.read().unwrap();
        let faults = told.events.iter().find(|(event, _)| *event == PerfEvent::PageFaults).map(|(_, count)| *count);
        assert!(faults.is_some_and(|faults| faults > 0), "{told:?}");
        drop(counters);
        let none = Counters::of_threads(room_for(1).await.unwrap(), pid, &[i32::MAX]).err().map(|e| e.to_string());
        assert_eq!(none.as_deref(), Some("it counts none"), "a thread that is not there");
    }

    #[tokio::test]
    async fn counters_never_take_all_descriptors() {
        let all = most() / EVENTS;
        let why = room_for(all + 1).await.unwrap_err().to_string();
        assert!(why.starts_with(&format!("{} threads need {} descriptors", all + 1, (all + 1) * EVENTS)), "{why}");
        let room = room_for(all).await.unwrap();
        let mut next = std::pin::pin!(room_for(all));
        assert!(futures_util::poll!(next.as_mut()).is_pending(), "it waits until these are given back");
        drop(room);
        drop(next.await.unwrap());
    }

    #[test]
    fn an_event_is_counted_of_all_threads_or_of_none() {
        let pid = std::process::id().cast_signed();
        let counter = |thread| match thread == pid {
            true => File::open("/dev/null"),
            false => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        };
        assert_eq!(of_all(pid, &[pid], counter).unwrap().len(), 1);
        assert!(is_not_counted(&of_all(pid, &[pid, i32::MAX], counter).unwrap_err()));
    }
}
