//! Lists that overlap, leave gaps, or name what is not there.

use super::{Log, never_if};
use crate::domain::DomainDef;
use crate::domain::value::{CpuSet, Value, complain};
use crate::xml::{Finding, Place};
use std::collections::BTreeSet;

pub(super) fn check(def: &DomainDef, log: &mut Log) {
    scheduling(def, log);
    huge_pages(def, log);
    cells(def, log);
    each_vcpu(def, log);
}

/// Reports what is in two of several sets.
fn disjoint<'a>(sets: impl Iterator<Item = (&'a CpuSet, Place)>, what: &str, log: &mut Log) {
    let mut seen = BTreeSet::new();
    for (set, place) in sets {
        let again: BTreeSet<u32> = set.0.iter().copied().filter(|n| !seen.insert(*n)).collect();
        if !again.is_empty() {
            let again = CpuSet(again).to_text();
            complain(log, &place, format!("{what} {again} is in two of these lists: leave it out of one"));
        }
    }
}

fn scheduling(def: &DomainDef, log: &mut Log) {
    let Some(tune) = &def.cputune else { return };
    let vcpus = || tune.vcpu_scheduling.iter().map(|s| (&s.vcpus, s.at.attribute("vcpus")));
    disjoint(vcpus(), "vCPU", log);
    for (set, place) in vcpus() {
        if let Some(lost) = set.0.iter().find(|n| **n >= def.maximum_vcpus()) {
            let message = format!("there is no vCPU {lost}, only {}: leave it out", def.maximum_vcpus());
            log.push(Finding::unsupported(&place, message));
        }
    }
    let threads = def.iothread_numbers();
    let sets = || tune.iothread_scheduling.iter().map(|s| (&s.iothreads, s.at.attribute("iothreads")));
    disjoint(sets(), "I/O thread", log);
    for (set, place) in sets() {
        if let Some(lost) = set.0.iter().find(|n| !threads.contains(n)) {
            complain(log, &place, format!("there is no I/O thread {lost}: <iothreads> or <iothreadids> make them"));
        }
    }
}

fn huge_pages(def: &DomainDef, log: &mut Log) {
    let pages = def.memory_backing.iter().filter_map(|backing| backing.hugepages.as_ref()).flat_map(|all| &all.pages);
    let sets = || pages.clone().filter_map(|page| Some((page.nodeset.as_ref()?, page.at.attribute("nodeset"))));
    disjoint(sets(), "NUMA cell", log);
    let mut for_all = pages.clone().filter(|page| page.nodeset.is_none());
    if let Some(second) = for_all.nth(1) {
        complain(log, &second.at, "two sizes are for all cells without one of their own: give one of them a nodeset");
    }
    let cells = numbers(def);
    for (set, place) in sets() {
        let known = |n: &u32| cells.contains(n) || cells.is_empty() && *n == 0;
        if let Some(lost) = set.0.iter().find(|n| !known(n)) {
            let message = format!("there is no NUMA cell {lost}: <cpu> with <numa> makes them");
            log.push(Finding::unsupported(&place, message));
        }
    }
}

/// The numbers of the NUMA cells.
fn numbers(def: &DomainDef) -> BTreeSet<u32> {
    (0..).zip(def.numa_cells()).map(|(n, cell)| cell.id.unwrap_or(n)).collect()
}

fn cells(def: &DomainDef, log: &mut Log) {
    let cells = def.numa_cells();
    let known = numbers(def);
    for (n, cell) in (0..).zip(cells) {
        let id = cell.id.unwrap_or(n);
        let beyond = id as usize >= cells.len();
        let message =
            format!("{} cells are numbered 0 to {}, without gaps", cells.len(), cells.len().saturating_sub(1));
        never_if(beyond, &cell.at.attribute("id"), &message, log);
        for sibling in cell.distances.iter().flat_map(|distances| &distances.siblings) {
            if !known.contains(&sibling.id) {
                let message = format!("there is no NUMA cell {}: leave the distance out", sibling.id);
                log.push(Finding::unsupported(&sibling.at.attribute("id"), message));
            }
        }
    }
    for memory in &def.devices.memories {
        let nowhere = !cells.is_empty() && memory.target.node.is_none();
        let message = "<target> needs a <node>, the NUMA cell that the memory is added to";
        never_if(nowhere, &memory.target.at, message, log);
    }
}

fn each_vcpu(def: &DomainDef, log: &mut Log) {
    for vcpu in def.vcpus_each.iter().flat_map(|all| &all.vcpus) {
        let first = vcpu.id == 0 && vcpu.enabled == Some(false);
        never_if(first, &vcpu.at.attribute("enabled"), "vCPU 0 is always there: say enabled='yes'", log);
        let turn = vcpu.order.is_some_and(|order| order > def.maximum_vcpus());
        let message = format!("turns are 1 to {}, one for each vCPU", def.maximum_vcpus());
        never_if(turn, &vcpu.at.attribute("order"), &message, log);
    }
}
