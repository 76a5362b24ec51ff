//! What of the host's CPU time and memory a guest may use: held by its control group, as at a start.

use crate::host::cgroup::{Limits, Quota, Trees};
use crate::host::workers::blocking;
use crate::qemu::instance::Body;
use crate::qemu::tune::{Bounds, ThreadKind, Tuning, group_name, thread_group};
use virt_model::domain::DomainDef;
use virt_model::domain::size::Kib;
use virt_model::driver::DriverError;

/// Has the kernel hold the guest to what `def` says. `bounds`: to what it is held anyway.
pub async fn adjust(body: &Body, before: &DomainDef, def: &DomainDef, bounds: Bounds) -> Result<(), DriverError> {
    let shares = blocking(|| Trees::of_host().usual_shares()).await?;
    let tuning = Tuning::of(def).limits_alone().lifting(&Tuning::of(before).limits_alone(), bounds, shares);
    let before = Tuning::of(before).limits_alone().lifting(&tuning, bounds, shares);
    let pid = body.keeper.process_id().ok_or(DriverError::Gone)?;
    let monitor = body.monitor()?;
    let applied = tuning.apply(body.uuid, pid, &monitor).await;
    if applied.is_err()
        && let Err(error) = before.apply(body.uuid, pid, &monitor).await
    {
        tracing::warn!(uuid = %body.uuid, %error, "not all limits are again as they were");
    }
    applied
}

/// Writes into `def` to what the kernel holds the guest, of what is said there.
pub async fn look(body: &Body, def: &mut DomainDef) -> Result<(), DriverError> {
    let tuning = Tuning::of(def).limits_alone();
    if tuning.is_none() {
        return Ok(());
    }
    let guest = body.uuid;
    let said = tuning.clone();
    let read = blocking(move || {
        let group = Trees::of_host().group(&group_name(guest));
        let limits = group.read(&said.limits)?;
        let threads = said.threads.iter().map(|(kind, care)| {
            let quota = group.read_thread(&thread_group(*kind), care.quota)?;
            Ok((*kind, quota))
        });
        Ok::<_, std::io::Error>((limits, threads.filter_map(there).collect::<Result<Vec<_>, _>>()?))
    });
    let read = read.await?.map_err(|e| DriverError::Hypervisor(format!("its limits cannot be read: {e}")))?;
    let (limits, threads): (Limits, Vec<(ThreadKind, Quota)>) = read;
    let of = |wanted: fn(&ThreadKind) -> bool| threads.iter().find(|(kind, _)| wanted(kind)).map(|(_, quota)| *quota);
    if let Some(tune) = &mut def.cputune {
        tune.shares = limits.cpu_shares;
        (tune.global_period_us, tune.global_quota_us) = (limits.cpu.period_us, limits.cpu.quota_us);
        let vcpu = of(|kind| matches!(kind, ThreadKind::Vcpu(_))).unwrap_or_default();
        (tune.period_us, tune.quota_us) = (vcpu.period_us, vcpu.quota_us);
        let emulator = of(|kind| *kind == ThreadKind::Emulator).unwrap_or_default();
        (tune.emulator_period_us, tune.emulator_quota_us) = (emulator.period_us, emulator.quota_us);
        // Where there is no I/O thread, nothing is held, and what is said is for those that come.
        if let Some(io) = of(|kind| matches!(kind, ThreadKind::Iothread(_))) {
            (tune.iothread_period_us, tune.iothread_quota_us) = (io.period_us, io.quota_us);
        }
    }
    if let Some(tune) = &mut def.memtune {
        let kib = |bytes: Option<u64>| bytes.map(|bytes| Kib(bytes / 1024));
        (tune.hard, tune.soft) = (kib(limits.memory), kib(limits.memory_soft));
        tune.swap_hard = kib(limits.memory_and_swap);
    }
    Ok(())
}

/// Without the threads that there are not: a vCPU that is not plugged in has no group.
fn there<T>(read: std::io::Result<T>) -> Option<std::io::Result<T>> {
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        read => Some(read),
    }
}
