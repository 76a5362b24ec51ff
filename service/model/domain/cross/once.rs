//! What is there no second time under one name.

use super::rows::{Row, select};
use crate::domain::value::complain;
use crate::xml::{Element, Finding, Place, shorten};
use std::collections::HashSet;

/// A row: of all `item`s in one of those elements, no two have the same at `key`.
pub(super) struct Once {
    of: &'static str,
    item: &'static str,
    key: &'static str,
    what: &'static str,
}

const fn once(of: &'static str, item: &'static str, key: &'static str, what: &'static str) -> Once {
    Once { of, item, key, what }
}

pub(super) const ROWS: &[Once] = &[
    once("clock", "timer", "@name", "the timer"),
    once("cputune", "vcpupin", "@vcpu", "a pin of vCPU"),
    once("cputune", "iothreadpin", "@iothread", "a pin of I/O thread"),
    once("numatune", "memnode", "@cellid", "a rule for NUMA cell"),
    once("cpu/numa/cell/distances", "sibling", "@id", "a distance to NUMA cell"),
    once("blkiotune", "device", "path", "the device"),
    once("throttlegroups", "throttlegroup", "group_name", "the group"),
    once("os/firmware", "feature", "@name", "the feature"),
    once("vcpus", "vcpu", "@order", "the turn"),
    once("sysinfo/bios|system|baseBoard|chassis", "entry", "@name", "the field"),
    once("devices/interface/vlan", "tag", "@id", "VLAN"),
    once("devices/disk/throttlefilters", "throttlefilter", "@group", "the group"),
    once("devices", "interface", "target/@dev", "the network device"),
    once("devices", "shmem", "@name", "the shared memory"),
    once("devices", "filesystem", "target/@dir", "the tag"),
];

impl Row for Once {
    fn of(&self) -> &'static str {
        self.of
    }

    fn look(&self, element: &Element, at: &Place, log: &mut Vec<Finding>) {
        let mut seen = HashSet::new();
        for item in element.elements().filter(|child| child.name == self.item) {
            for (place, key) in select(item, &item.place_below(at), self.key) {
                if !key.is_empty() && !seen.insert(key.clone()) {
                    complain(log, &place, format!("{} '{}' is there twice: leave one out", self.what, shorten(&key)));
                }
            }
        }
    }
}
