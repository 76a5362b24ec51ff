//! Where a guest's threads run and what they may use: set between the monitor's hello and the first instruction.

use super::qmp::Qmp;
use crate::host::cgroup::{Group, IoLimits, Limits, Quota, Trees, UNLIMITED};
use crate::host::usage;
use crate::host::workers::blocking;
use nix::sched::{CpuSet as Mask, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::domain::tune::Policy;
use virt_model::domain::value::CpuSet;
use virt_model::driver::DriverError;

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuning {
    /// Of the whole guest.
    pub limits: Limits,
    /// Of threads, by kind and number; all but vCPUs and I/O threads together are the emulator.
    pub threads: BTreeMap<ThreadKind, Care>,
}

/// A kind of thread, with its number; `None` is said for those that have nothing of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadKind {
    /// All that is neither of the others.
    Emulator,
    /// A vCPU.
    Vcpu(u32),
    /// An I/O thread.
    Iothread(u32),
}

/// What is asked for one thread.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Care {
    /// The host's CPUs.
    pub cpus: Option<CpuSet>,
    /// Policy and priority.
    pub scheduling: Option<(Policy, i32)>,
    /// CPU time.
    pub quota: Quota,
}

impl Care {
    fn set(&self, group: &Group, kind: ThreadKind, id: i32) -> Result<(), DriverError> {
        if let Some(cpus) = &self.cpus {
            pin(id, cpus)?;
        }
        if let Some((policy, priority)) = self.scheduling {
            schedule(id, policy, priority)?;
        }
        if !self.quota.is_none() {
            let limited = group.hold_thread(&thread_group(kind), id, self.quota);
            limited.map_err(|e| failed("the CPU time of a thread cannot be limited", &e))?;
        }
        Ok(())
    }
}

impl Tuning {
    /// What the definition asks for.
    pub fn of(def: &DomainDef) -> Tuning {
        let mut threads = BTreeMap::new();
        let vcpus = (0..def.maximum_vcpus()).map(ThreadKind::Vcpu);
        let all =
            vcpus.chain(def.iothread_numbers().into_iter().map(ThreadKind::Iothread)).chain([ThreadKind::Emulator]);
        for kind in all {
            let care = care(def, kind);
            if care != Care::default() {
                threads.insert(kind, care);
            }
        }
        Tuning { limits: limits(def), threads }
    }

    /// Whether nothing is asked for.
    pub fn is_none(&self) -> bool {
        *self == Tuning::default()
    }

    /// What of it limits what is used, without where threads run and how.
    pub fn limits_alone(mut self) -> Tuning {
        self.threads.values_mut().for_each(|care| *care = Care { quota: care.quota, ..Care::default() });
        self.threads.retain(|_, care| !care.quota.is_none());
        (self.limits.io_weight, self.limits.io) = (None, Vec::new());
        self
    }

    /// The same, where what `before` limits and this does not is lifted: of memory to what the guest is held to anyway.
    /// `shares`: the weight of groups of which nothing is said.
    pub fn lifting(mut self, before: &Tuning, bounds: Bounds, shares: u64) -> Tuning {
        let (now, then) = (&mut self.limits, &before.limits);
        let lifted = |now: &mut Option<u64>, then: Option<u64>, usual: u64| *now = now.or(then.map(|_| usual));
        lifted(&mut now.cpu_shares, then.cpu_shares, shares);
        lifted(&mut now.memory, then.memory, bounds.memory);
        lifted(&mut now.memory_soft, then.memory_soft, UNLIMITED);
        lifted(&mut now.memory_and_swap, then.memory_and_swap, UNLIMITED);
        now.cpu = now.cpu.lifting(then.cpu);
        for (kind, care) in &before.threads {
            let own = self.threads.entry(*kind).or_default();
            own.quota = own.quota.lifting(care.quota);
        }
        self
    }

    fn needs_group(&self) -> bool {
        self.limits != Limits::default() || self.threads.values().any(|care| !care.quota.is_none())
    }

    /// Sets all of it for the guest whose QEMU is `pid`. Errors name what could not be set, and the remedy.
    pub async fn apply(&self, guest: Uuid, pid: i32, monitor: &Qmp) -> Result<(), DriverError> {
        let vcpus =
            threads_of(monitor, "query-cpus-fast", |cpu| Some(ThreadKind::Vcpu(number(cpu, "cpu-index")?))).await?;
        let io = threads_of(monitor, "query-iothreads", |thread| {
            let id = thread.get("id")?.as_str()?.strip_prefix("iothread")?;
            Some(ThreadKind::Iothread(id.parse().ok()?))
        });
        let known: Vec<(ThreadKind, i32)> = vcpus.into_iter().chain(io.await?).collect();
        let tuning = self.clone();
        blocking(move || tuning.set(guest, pid, known)).await?
    }

    fn set(&self, guest: Uuid, pid: i32, mut threads: Vec<(ThreadKind, i32)>) -> Result<(), DriverError> {
        let group = Trees::of_host().group(&group_name(guest));
        if self.needs_group() {
            group.hold(pid, &self.limits).map_err(|e| failed("limits cannot be set", &e))?;
        }
        // QEMU tells them by the numbers that they have behind its wall.
        if let Some(ours) = usage::our_numbers(pid) {
            for (_, id) in &mut threads {
                let gone =
                    || DriverError::Hypervisor(format!("QEMU names a thread that it does not have, number {id}"));
                *id = *ours.get(id).ok_or_else(gone)?;
            }
        }
        let named: BTreeSet<i32> = threads.iter().map(|(_, id)| *id).collect();
        let others = all_threads(pid).into_iter().filter(|id| !named.contains(id));
        threads.extend(others.map(|id| (ThreadKind::Emulator, id)));
        for (kind, id) in threads {
            let Some(care) = self.threads.get(&kind) else { continue };
            match care.set(&group, kind, id) {
                // QEMU's pool has threads that end when they have nothing to do.
                Err(_) if kind == ThreadKind::Emulator && !all_threads(pid).contains(&id) => {}
                set => set?,
            }
        }
        Ok(())
    }
}

/// What a guest may take of the host where its definition does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Threads, of QEMU and what runs beside it.
    pub threads: u64,
    /// Bytes of memory, of all of them.
    pub memory: u64,
}

impl Bounds {
    /// Those of that machine: `threads` beside its vCPUs, for disks (64 for each thread that does I/O), displays, sound,
    /// companions; `overhead` bytes beyond its memory and a quarter of it, for screens, caches, translated code, companions.
    pub fn of(def: &DomainDef, threads: u64, overhead: u64) -> Bounds {
        let vcpus = u64::from(def.maximum_vcpus());
        let devices = def.devices.memories.iter().map(|memory| memory.target.size.0).sum::<u64>();
        let memory = def.memory_kib().saturating_add(devices).saturating_mul(1024);
        Bounds {
            threads: threads.saturating_add(vcpus),
            memory: memory.saturating_add(memory / 4).saturating_add(overhead),
        }
    }

    /// Holds the calling thread, and the processes that it makes from now on, to them; whether it is: where groups take whole
    /// processes only, that is for [`Bounds::hold`]. Where it cannot be at all, that is said and goes on. Blocks.
    pub fn enter(self, guest: Uuid) -> bool {
        let entered = Trees::of_host().group(&group_name(guest)).bound_thread(self.threads, self.memory);
        entered.unwrap_or_else(|error| {
            unbounded(guest, &error);
            true
        })
    }

    /// Holds those to them that are held already: the machine has got more. Blocks.
    pub fn hold_anew(self, guest: Uuid) {
        if let Err(error) = Trees::of_host().group(&group_name(guest)).bound_anew(self.threads, self.memory) {
            unbounded(guest, &error);
        }
    }

    /// Holds a process of the guest to them; where that cannot be, it is said and goes on. Blocks.
    pub fn hold(self, guest: Uuid, pid: i32) {
        if let Err(error) = Trees::of_host().group(&group_name(guest)).bound(pid, self.threads, self.memory) {
            unbounded(guest, &error);
        }
    }
}

fn unbounded(guest: Uuid, error: &std::io::Error) {
    tracing::warn!(uuid = %guest, %error, "the guest is not bounded in all that it may take of the host");
}

/// Removes what a guest that has gone had. Blocks.
pub fn clear(guest: Uuid) {
    Trees::of_host().group(&group_name(guest)).remove();
}

/// The name of a guest's control group.
pub fn group_name(guest: Uuid) -> String {
    format!("virt-{guest}")
}

/// The name of a thread's group in that of its guest.
pub fn thread_group(kind: ThreadKind) -> String {
    match kind {
        ThreadKind::Emulator => "emulator".to_owned(),
        ThreadKind::Vcpu(n) => format!("vcpu{n}"),
        ThreadKind::Iothread(n) => format!("iothread{n}"),
    }
}

fn limits(def: &DomainDef) -> Limits {
    let (cpu, memory, io) = (def.cputune.as_ref(), def.memtune.as_ref(), def.blkiotune.as_ref());
    let bytes = |size: Option<virt_model::domain::size::Kib>| size.map(|size| size.0.saturating_mul(1024));
    let devices = io.iter().flat_map(|io| &io.devices).map(|device| IoLimits {
        path: PathBuf::from(device.path.as_deref().unwrap_or_default()),
        weight: device.weight,
        rates: [device.reads, device.writes, device.bytes_read, device.bytes_written],
    });
    Limits {
        cpu_shares: cpu.and_then(|cpu| cpu.shares),
        cpu: Quota {
            period_us: cpu.and_then(|cpu| cpu.global_period_us),
            quota_us: cpu.and_then(|cpu| cpu.global_quota_us),
        },
        memory: bytes(memory.and_then(|memory| memory.hard)),
        memory_soft: bytes(memory.and_then(|memory| memory.soft)),
        memory_and_swap: bytes(memory.and_then(|memory| memory.swap_hard)),
        io_weight: io.and_then(|io| io.weight),
        io: devices.collect(),
    }
}

fn care(def: &DomainDef, kind: ThreadKind) -> Care {
    let all = def.vcpu.as_ref().and_then(|vcpu| vcpu.cpus.clone());
    let Some(tune) = &def.cputune else { return Care { cpus: all, ..Care::default() } };
    let policy = |policy: Policy, priority: Option<i32>| (policy, priority.unwrap_or(0));
    let (own, scheduling, period_us, quota_us) = match kind {
        ThreadKind::Emulator => (
            tune.emulator.as_ref().map(|pin| &pin.cpus),
            tune.emulator_scheduling.as_ref().map(|s| policy(s.policy, s.priority)),
            tune.emulator_period_us,
            tune.emulator_quota_us,
        ),
        ThreadKind::Vcpu(n) => (
            tune.vcpus.iter().find(|pin| pin.vcpu == n).map(|pin| &pin.cpus),
            tune.vcpu_scheduling.iter().find(|s| s.vcpus.0.contains(&n)).map(|s| policy(s.policy, s.priority)),
            tune.period_us,
            tune.quota_us,
        ),
        ThreadKind::Iothread(n) => (
            tune.iothreads.iter().find(|pin| pin.iothread == n).map(|pin| &pin.cpus),
            tune.iothread_scheduling.iter().find(|s| s.iothreads.0.contains(&n)).map(|s| policy(s.policy, s.priority)),
            tune.iothread_period_us,
            tune.iothread_quota_us,
        ),
    };
    Care { cpus: own.cloned().or(all), scheduling, quota: Quota { period_us, quota_us } }
}

async fn threads_of(
    monitor: &Qmp,
    command: &str,
    kind: impl Fn(&Value) -> Option<ThreadKind>,
) -> Result<Vec<(ThreadKind, i32)>, DriverError> {
    let answer = monitor.execute(command, json!({})).await?;
    let thread = |entry: &Value| Some((kind(entry)?, i32::try_from(number(entry, "thread-id")?).ok()?));
    Ok(answer.as_array().into_iter().flatten().filter_map(thread).collect())
}

fn number(entry: &Value, key: &str) -> Option<u32> {
    entry.get(key)?.as_u64()?.try_into().ok()
}

fn all_threads(pid: i32) -> Vec<i32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn pin(thread: i32, cpus: &CpuSet) -> Result<(), DriverError> {
    let mut mask = Mask::new();
    for cpu in &cpus.0 {
        let beyond =
            |_| DriverError::Unsupported(format!("threads cannot be bound to CPU {cpu}: there is no such CPU"));
        mask.set(*cpu as usize).map_err(beyond)?;
    }
    use virt_model::domain::value::Value as _;
    let thread = Pid::from_raw(thread);
    let failed = |why: String| {
        DriverError::Unsupported(format!("threads cannot be bound to the CPUs {}: {why}", cpus.to_text()))
    };
    sched_setaffinity(thread, &mask).map_err(|e| failed(e.to_string()))?;
    // The kernel leaves out what is not there, and is content with the rest.
    let got = sched_getaffinity(thread).map_err(|e| failed(e.to_string()))?;
    let lost = cpus.0.iter().copied().filter(|cpu| !got.is_set(*cpu as usize).unwrap_or(false));
    let lost = CpuSet(lost.collect());
    match lost.0.is_empty() {
        true => Ok(()),
        false => Err(failed(format!("there is no CPU {} here that may be used: leave it out", lost.to_text()))),
    }
}

fn schedule(thread: i32, policy: Policy, priority: i32) -> Result<(), DriverError> {
    let number = match policy {
        Policy::Batch => libc::SCHED_BATCH,
        Policy::Idle => libc::SCHED_IDLE,
        Policy::Fifo => libc::SCHED_FIFO,
        Policy::Rr => libc::SCHED_RR,
    };
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: reads a value on this stack.
    if unsafe { libc::sched_setscheduler(thread, number, &parameters) } == 0 {
        return Ok(());
    }
    let e = std::io::Error::last_os_error();
    Err(DriverError::Unsupported(format!("threads cannot be scheduled by '{policy}': {e}")))
}

fn failed(what: &str, error: &std::io::Error) -> DriverError {
    let remedy = "virtd needs the right to make control groups (the system bus, and Delegate=yes in its unit)";
    DriverError::Unsupported(format!("{what}: {error}; {remedy}"))
}
