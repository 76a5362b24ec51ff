//! Numbers that another number bounds.

use super::{Log, never_if};
use crate::device::disk::Iotune;
use crate::device::memory::MemoryModel;
use crate::device::{AddressKind, MemoryDevice};
use crate::domain::DomainDef;
use crate::domain::value::complain;

pub(super) fn check(def: &DomainDef, log: &mut Log) {
    thread_pools(def, log);
    let groups = def.throttle_groups.iter().flat_map(|groups| &groups.groups);
    let tunes = groups.chain(def.devices.disks.iter().filter_map(|disk| disk.iotune.as_ref()));
    tunes.for_each(|tune| {
        bursts(tune, log);
        of_all_or_parts(tune, log);
    });
    blocks(def, log);
    memory(def, log);
    forwarded_ports(def, log);
}

fn thread_pools(def: &DomainDef, log: &mut Log) {
    let threads = def.iothread_ids.iter().flat_map(|ids| &ids.threads).map(|t| (t.pool_min, t.pool_max, &t.at));
    let main = def.default_iothread.iter().map(|t| (t.pool_min, t.pool_max, &t.at));
    for (least, most, at) in threads.chain(main) {
        let less = least.zip(most).is_some_and(|(least, most)| most < least);
        never_if(less, &at.attribute("thread_pool_max"), "it is less than thread_pool_min: give at least as many", log);
    }
}

/// A burst is more than the limit that it goes beyond, and lasts no longer than there is one.
fn bursts(tune: &Iotune, log: &mut Log) {
    let all = [
        ("total_bytes_sec", tune.bytes, tune.bytes_max, tune.bytes_max_s),
        ("read_bytes_sec", tune.bytes_read, tune.bytes_read_max, tune.bytes_read_max_s),
        ("write_bytes_sec", tune.bytes_written, tune.bytes_written_max, tune.bytes_written_max_s),
        ("total_iops_sec", tune.ops, tune.ops_max, tune.ops_max_s),
        ("read_iops_sec", tune.ops_read, tune.ops_read_max, tune.ops_read_max_s),
        ("write_iops_sec", tune.ops_written, tune.ops_written_max, tune.ops_written_max_s),
    ];
    let set = |limit: Option<u64>| limit.filter(|limit| *limit > 0);
    for (name, limit, burst, length) in all {
        let (place, place_of_length) = (format!("{name}_max"), format!("{name}_max_length"));
        match (set(limit), set(burst)) {
            (None, Some(_)) => {
                complain(log, &tune.at.child(&place), format!("a burst goes beyond a limit: add <{name}>"));
            }
            (Some(limit), Some(burst)) if burst < limit => {
                complain(
                    log,
                    &tune.at.child(&place),
                    format!("a burst is no less than <{name}>: give at least {limit}"),
                );
            }
            _ => {}
        }
        let message = format!("it is the length of a burst: add <{place}>, or leave it out");
        never_if(set(length).is_some() && set(burst).is_none(), &tune.at.child(&place_of_length), &message, log);
    }
    let counted = [tune.ops, tune.ops_read, tune.ops_written].into_iter().any(|limit| set(limit).is_some());
    let message = "it says how operations are counted: add <total_iops_sec>, or leave it out";
    never_if(set(tune.ops_size).is_some() && !counted, &tune.at.child("size_iops_sec"), message, log);
}

/// A limit is for all, or for reads and for writes.
fn of_all_or_parts(tune: &Iotune, log: &mut Log) {
    for (name, whole, parts) in [
        ("bytes", tune.bytes, [tune.bytes_read, tune.bytes_written]),
        ("iops", tune.ops, [tune.ops_read, tune.ops_written]),
        ("bytes_max", tune.bytes_max, [tune.bytes_read_max, tune.bytes_written_max]),
        ("iops_max", tune.ops_max, [tune.ops_read_max, tune.ops_written_max]),
    ] {
        let set = |limit: Option<u64>| limit.is_some_and(|limit| limit > 0);
        let both = set(whole) && parts.into_iter().any(set);
        let how = format!("a limit of {name} is for all or for reads and writes, not for both");
        never_if(both, &tune.at, &how, log);
    }
}

fn blocks(def: &DomainDef, log: &mut Log) {
    for io in def.devices.disks.iter().filter_map(|disk| disk.blockio.as_ref()) {
        let logical = io.logical.unwrap_or(512);
        let less = io.physical.is_some_and(|physical| physical < logical);
        let message = format!("it is less than the logical size: give at least {logical}");
        never_if(less, &io.at.attribute("physical_block_size"), &message, log);
        let odd = io.discard.is_some_and(|size| logical > 0 && !size.is_multiple_of(logical));
        let message = format!("whole blocks are discarded: give a multiple of {logical}");
        never_if(odd, &io.at.attribute("discard_granularity"), &message, log);
    }
}

fn memory(def: &DomainDef, log: &mut Log) {
    let plugged = |device: &&MemoryDevice| matches!(device.model, MemoryModel::Dimm | MemoryModel::Nvdimm);
    let slots = def.max_memory.as_ref().map(|most| most.slots);
    for (n, device) in (0u32..).zip(def.devices.memories.iter().filter(plugged)) {
        let Some(slots) = slots else { break };
        let message = format!("<maxMemory> has {slots} slots, and this would be one more: add slots");
        never_if(n >= slots, &device.at, &message, log);
        if let (Some(AddressKind::Dimm(dimm)), Some(address)) =
            (device.info.address.as_ref().map(|a| &a.kind), &device.info.address)
        {
            let message = format!("<maxMemory> has {slots} slots, numbered from 0: use one of these");
            let beyond = address.at.is_known() && dimm.slot.is_some_and(|slot| slot >= slots);
            never_if(beyond, &address.at.attribute("slot"), &message, log);
        }
    }
    for device in &def.devices.memories {
        let target = &device.target;
        never_if(target.size.0 == 0, &target.at.child("size"), "memory of no size: give one", log);
        let label = target.label.as_ref().is_some_and(|label| label.size.0 >= target.size.0);
        never_if(label, &target.at.child("label"), "the label takes up all of the memory: make it smaller", log);
        let Some(block) = target.block else { continue };
        never_if(!block.0.is_power_of_two(), &target.at.child("block"), "the size of a block is a power of two", log);
        let odd = |size: u64| block.0 > 0 && !size.is_multiple_of(block.0);
        let message = format!("it is handed out in blocks: give a multiple of {} KiB", block.0);
        never_if(odd(target.size.0), &target.at.child("size"), &message, log);
        let asked = target.requested.is_some_and(|asked| odd(asked.0));
        never_if(asked, &target.at.child("requested"), &message, log);
    }
}

fn forwarded_ports(def: &DomainDef, log: &mut Log) {
    let forwards = def.devices.interfaces.iter().flat_map(|interface| &interface.forwards);
    for range in forwards.flat_map(|forward| &forward.ranges) {
        let count = range.end.unwrap_or(range.start).saturating_sub(range.start);
        let beyond = range.to.is_some_and(|to| to.checked_add(count).is_none());
        never_if(beyond, &range.at.attribute("to"), "the last port would be above 65535: begin lower", log);
    }
}
