//! What a guest may use of the host.

use super::Check;
use std::collections::BTreeSet;
use virt_model::domain::tune::{Cputune, Policy};
use virt_model::domain::value::{CpuSet, Value};
use virt_model::xml::Place;

impl Check<'_> {
    pub(super) fn tuning(&mut self) {
        let def = self.def;
        def.cputune.iter().for_each(|tune| self.cpu_tuning(tune));
        self.host_cpus();
        if let Some(tune) = &def.memtune {
            let (hard, swap) = (tune.hard, tune.swap_hard);
            let less = swap.is_some_and(|swap| hard.is_none_or(|hard| swap < hard));
            let how = "<swap_hard_limit> counts memory in: it goes with a <hard_limit> and is not less";
            self.refuse_if(less, &tune.at.child("swap_hard_limit"), how);
            let small = hard.is_some_and(|hard| hard.0 < def.memory_kib());
            let how = "<hard_limit> is less than the guest's memory: the guest would be killed";
            self.refuse_if(small, &tune.at.child("hard_limit"), how);
        }
        if let Some(tune) = &def.blkiotune {
            let weight = |weight: Option<u32>| weight.is_some_and(|weight| !(1..=1000).contains(&weight));
            self.refuse_if(weight(tune.weight), &tune.at.child("weight"), "a weight is 1 to 1000");
            for device in &tune.devices {
                self.refuse_if(weight(device.weight), &device.at.child("weight"), "a weight is 1 to 1000");
                let path = device.path.as_deref().is_some_and(|path| path.starts_with('/'));
                self.refuse_if(!path, &device.at, "<device> needs an absolute <path>");
            }
        }
    }

    fn cpu_tuning(&mut self, tune: &Cputune) {
        let shares = tune.shares.is_some_and(|shares| !(2..=10_000).contains(&shares));
        self.refuse_if(shares, &tune.at.child("shares"), "shares are 2 to 10000");
        for (name, period) in [
            ("period", tune.period_us),
            ("global_period", tune.global_period_us),
            ("emulator_period", tune.emulator_period_us),
            ("iothread_period", tune.iothread_period_us),
        ] {
            let odd = period.is_some_and(|us| !(1000..=1_000_000).contains(&us));
            self.refuse_if(odd, &tune.at.child(name), "a period is 1000 to 1000000 microseconds");
        }
        for (name, quota) in [
            ("quota", tune.quota_us),
            ("global_quota", tune.global_quota_us),
            ("emulator_quota", tune.emulator_quota_us),
            ("iothread_quota", tune.iothread_quota_us),
        ] {
            let odd = quota.is_some_and(|us| (0..1000).contains(&us));
            self.refuse_if(odd, &tune.at.child(name), "a quota is at least 1000 microseconds, or negative: no limit");
        }
        for pin in &tune.vcpus {
            let lost = pin.vcpu >= self.def.maximum_vcpus();
            self.refuse_if(
                lost,
                &pin.at.attribute("vcpu"),
                &format!("the guest has no such vCPU, only {}", self.def.maximum_vcpus()),
            );
        }
        let threads = self.def.iothread_numbers();
        for pin in &tune.iothreads {
            let lost = !threads.contains(&pin.iothread);
            self.refuse_if(
                lost,
                &pin.at.attribute("iothread"),
                "there is no such I/O thread: <iothreads> or <iothreadids> make them",
            );
        }
        let vcpus = tune.vcpu_scheduling.iter().map(|s| (s.policy, s.priority, &s.at));
        let io = tune.iothread_scheduling.iter().map(|s| (s.policy, s.priority, &s.at));
        let emulator = tune.emulator_scheduling.iter().map(|s| (s.policy, s.priority, &s.at));
        vcpus.chain(io).chain(emulator).for_each(|(policy, priority, at)| self.scheduling(policy, priority, at));
    }

    /// CPUs may come and go while virtd runs, so this is told beforehand and decided at the start.
    fn host_cpus(&mut self) {
        let (def, online) = (self.def, &self.caps.host.online);
        let all = def.vcpu.iter().filter_map(|vcpu| Some((vcpu.cpus.as_ref()?, &vcpu.at)));
        let tune = def.cputune.as_ref();
        let vcpus = tune.iter().flat_map(|tune| &tune.vcpus).map(|pin| (&pin.cpus, &pin.at));
        let threads = tune.iter().flat_map(|tune| &tune.iothreads).map(|pin| (&pin.cpus, &pin.at));
        let emulator = tune.and_then(|tune| tune.emulator.as_ref()).map(|pin| (&pin.cpus, &pin.at));
        for (set, place) in all.chain(vcpus).chain(threads).chain(emulator) {
            let lost: BTreeSet<u32> = set.0.difference(online).copied().collect();
            if !online.is_empty() && !lost.is_empty() {
                let (lost, there) = (CpuSet(lost).to_text(), CpuSet(online.clone()).to_text());
                let how = format!("this host has no CPU {lost}, only {there}: the guest does not start until it has");
                self.warn_if(true, &place.attribute("cpuset"), &how);
            }
        }
    }

    fn scheduling(&mut self, policy: Policy, priority: Option<i32>, place: &Place) {
        let real_time = matches!(policy, Policy::Fifo | Policy::Rr);
        let fits = priority.is_some_and(|priority| (1..=99).contains(&priority));
        self.refuse_if(real_time && !fits, place, "'fifo' and 'rr' need a priority from 1 to 99");
        let idle = !real_time && priority.is_some_and(|priority| priority != 0);
        self.refuse_if(idle, &place.attribute("priority"), "only 'fifo' and 'rr' have a priority");
    }
}
