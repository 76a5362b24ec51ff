//! Which vCPUs there are at boot, and how that changes while the machine runs.

use super::DomainDef;
use super::memory::{Vcpu, VcpuState, Vcpus};
use std::collections::BTreeSet;

impl DomainDef {
    /// Makes it a machine with so many vCPUs at boot, at most [`DomainDef::maximum_vcpus`]: the first of those that are off are
    /// added, the last of those that can be plugged are taken away. `runs`: it is what runs, of which the board's vCPUs stay.
    /// Error: how many of those there are, if they are more than `count`.
    pub fn set_vcpus(&mut self, count: u32, runs: bool) -> Result<(), u32> {
        let (mut online, plugged) = self.vcpus_at_boot();
        let wanted = count as usize;
        let board = online.len() - plugged.len();
        if runs && wanted < board {
            return Err(u32::try_from(board).unwrap_or(u32::MAX));
        }
        let missing = wanted.saturating_sub(online.len());
        let off: Vec<u32> = (0..self.maximum_vcpus()).filter(|n| !online.contains(n)).take(missing).collect();
        online.extend(off);
        // Those that can be plugged go first, the last of them before the others.
        let mut going: Vec<u32> = online.iter().copied().collect();
        going.sort_by_key(|n| (plugged.contains(n), *n));
        online.retain(|n| !going[wanted.min(going.len())..].contains(n));
        match runs || self.vcpus_each.is_some() {
            true => self.set_online_vcpus(&online),
            false => self.say_online(count),
        }
        Ok(())
    }

    /// Makes just these the vCPUs at boot; what the board has of them stays the board's, and others are plugged in.
    pub fn set_online_vcpus(&mut self, online: &BTreeSet<u32>) {
        let (before, plugged) = self.vcpus_at_boot();
        let turn = |def: &DomainDef, id: u32| {
            let said = def.vcpus_each.iter().flat_map(|all| &all.vcpus).find(|vcpu| vcpu.id == id);
            said.and_then(|vcpu| vcpu.order)
        };
        let state = |id: u32| {
            let (there, was_there) = (online.contains(&id), before.contains(&id));
            let of_board = was_there && there && !plugged.contains(&id);
            let order = turn(self, id).filter(|_| there);
            VcpuState { id, enabled: Some(there), hotpluggable: Some(!of_board), order, ..VcpuState::default() }
        };
        let vcpus = (0..self.maximum_vcpus()).map(state).collect();
        self.vcpus_each = Some(Vcpus { vcpus, ..Vcpus::default() });
        self.say_online(u32::try_from(online.len()).unwrap_or(u32::MAX));
    }

    /// Leaves out what is said of each vCPU where it says no more than how many there are.
    pub fn forget_plain_vcpus(&mut self) {
        if self.vcpus_at_boot().1.is_empty() {
            self.vcpus_each = None;
        }
    }

    /// Makes it a machine that can have so many vCPUs; it has no more of them at boot than before.
    pub fn set_maximum_vcpus(&mut self, count: u32) {
        let online = self.vcpus().min(count);
        self.vcpu.get_or_insert_with(|| Vcpu { count: 1, ..Vcpu::default() }).count = count;
        let Some(all) = &mut self.vcpus_each else { return self.say_online(online) };
        all.vcpus.retain(|vcpu| vcpu.id < count);
        let listed = self.vcpus_at_boot().0.len();
        self.say_online(u32::try_from(listed).unwrap_or(u32::MAX));
    }

    fn say_online(&mut self, count: u32) {
        let vcpu = self.vcpu.get_or_insert_with(|| Vcpu { count: 1, ..Vcpu::default() });
        vcpu.current = (count != vcpu.count).then_some(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::MAX_VCPUS;

    fn machine(vcpus: &str) -> DomainDef {
        let text = format!("<domain type='test'><name>d</name><memory>1</memory>{vcpus}</domain>");
        DomainDef::parse(&text).expect("a machine")
    }

    fn numbers(def: &DomainDef) -> (Vec<u32>, Vec<u32>) {
        let (online, plugged) = def.vcpus_at_boot();
        (online.into_iter().collect(), plugged)
    }

    #[test]
    fn what_runs_gains_vcpus_that_can_go_again_and_keeps_those_of_its_board() {
        let mut def = machine("<vcpu current='2'>4</vcpu>");
        def.set_vcpus(4, true).expect("two more");
        assert_eq!(numbers(&def), (vec![0, 1, 2, 3], vec![2, 3]));
        assert_eq!((def.vcpus(), def.contradictions().len()), (4, 0));
        def.set_vcpus(3, true).expect("the last goes");
        assert_eq!(numbers(&def), (vec![0, 1, 2], vec![2]));
        assert_eq!(def.set_vcpus(1, true), Err(2));
        assert_eq!(numbers(&def), (vec![0, 1, 2], vec![2]), "a refusal changes nothing");
        def.forget_plain_vcpus();
        assert!(def.vcpus_each.is_some());
        def.set_vcpus(2, true).expect("as it was");
        def.forget_plain_vcpus();
        assert_eq!((def.vcpus_each.as_ref(), def.vcpus()), (None, 2));
    }

    #[test]
    fn what_is_stored_has_as_many_as_are_wanted() {
        let mut def = machine("<vcpu>4</vcpu>");
        def.set_vcpus(3, false).expect("less");
        assert_eq!((def.vcpus(), def.vcpus_each.is_none()), (3, true));
        def.set_vcpus(4, false).expect("all");
        assert_eq!(def.vcpu.as_ref().and_then(|vcpu| vcpu.current), None, "all needs no word");
        let each = "<vcpu current='2'>3</vcpu><vcpus><vcpu id='0' enabled='yes' hotpluggable='no'/>\
                    <vcpu id='1' enabled='no' hotpluggable='yes'/>\
                    <vcpu id='2' enabled='yes' hotpluggable='yes' order='2'/></vcpus>";
        let mut def = machine(each);
        def.set_vcpus(3, false).expect("one more");
        assert_eq!(numbers(&def), (vec![0, 1, 2], vec![2, 1]), "it has its turn after those that have one");
        def.set_vcpus(1, false).expect("two less");
        assert_eq!((numbers(&def), def.vcpus()), ((vec![0], vec![]), 1));
    }

    #[test]
    fn another_maximum_leaves_as_many_at_boot_as_there_can_be() {
        let mut def = machine("<vcpu>2</vcpu>");
        def.set_maximum_vcpus(4);
        assert_eq!((def.vcpus(), def.maximum_vcpus()), (2, 4));
        def.set_maximum_vcpus(1);
        assert_eq!((def.vcpus(), def.maximum_vcpus()), (1, 1));
        let mut def = machine("");
        def.set_maximum_vcpus(3);
        assert_eq!((def.vcpus(), def.maximum_vcpus()), (1, 3));
    }

    #[test]
    fn what_says_far_too_many_is_not_counted_out() {
        let mut def = machine("<vcpu>4</vcpu>");
        def.set_maximum_vcpus(u32::MAX);
        assert_eq!((def.vcpus(), def.vcpus_at_boot().0.len()), (4, 4));
        def.say_online(u32::MAX);
        assert_eq!(def.vcpus_at_boot().0.len(), MAX_VCPUS as usize);
    }
}
