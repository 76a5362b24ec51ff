//! What a guest uses and does: asked of the kernel where that knows, else of QEMU; and how large the images of a machine are that is
//! off.

use super::block::{Node, Nodes};
use super::format::known_format;
use super::instance::Body;
use super::known::Holds;
use crate::host::chain;
use crate::host::files::{Seen, What};
use crate::host::perf::{self, Counters};
use crate::host::usage;
use crate::host::workers::{Errand, Workers, blocking};
use crate::network::OwnNetwork;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use virt_model::device::balloon::BalloonModel;
use virt_model::device::disk::DiskKind;
use virt_model::device::{Disk, Interface};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::stats::{
    DirtyRateStats, DiskStats, DiskTraffic, GroupStats, GuestMemory, InterfaceStats, IothreadStats, MemoryStats,
    PerfStats, StatGroup, StatQuestion, ThreadStats, Transfers, VcpuStats,
};

/// How long it is looked on how the guest writes its memory, or what its vCPUs do; and how often QEMU is asked whether it has looked
/// on, ten times in that.
const LOOKED_ON: Duration = Duration::from_secs(1);
const LOOKS: u32 = 50;
/// So many threads are few.
const FEW_THREADS: usize = 8;

/// A group of numbers of a running guest, whose definition is `def`. Errors: `TimedOut` where QEMU or a file system does not answer.
pub async fn of_guest(
    workers: &Workers,
    body: &Arc<Body>,
    def: &DomainDef,
    group: StatGroup,
) -> Result<GroupStats, DriverError> {
    match group {
        StatGroup::Cpu => Ok(GroupStats::Cpu(process(body)?.cpu)),
        StatGroup::Memory => memory(body, def).await.map(GroupStats::Memory),
        StatGroup::Vcpus => vcpus(body, def).await.map(GroupStats::Vcpus),
        StatGroup::Disks => disks(workers, body, def).await.map(GroupStats::Disks),
        StatGroup::Interfaces => Ok(GroupStats::Interfaces(interfaces(body, def))),
        StatGroup::Iothreads => iothreads(body, def).await.map(GroupStats::Iothreads),
        StatGroup::DirtyRate => dirty_rate(body).await.map(GroupStats::DirtyRate),
        StatGroup::Perf => events(body, def).await.map(GroupStats::Perf),
    }
}

/// The sizes of the disks of a machine that is off. Errors: `TimedOut` if a file system does not answer.
pub async fn at_rest(workers: &Workers, def: &DomainDef, asked: StatQuestion) -> Result<GroupStats, DriverError> {
    if asked.group != StatGroup::Disks {
        return Err(DriverError::Refused("only the sizes of its disks are known while it is off".to_owned()));
    }
    let images: Vec<_> = def.devices.disks.iter().map(|disk| (disk.target.dev.clone(), image_of(disk))).collect();
    let measure =
        move |_: &_| Ok(images.into_iter().map(|(target, image)| measured(target, image, asked.may_open)).collect());
    workers.run(Errand::new(def.uuid, "the images of the machine"), measure).await.map(GroupStats::Disks)
}

/// The file of a disk and its format, where it is one of this host.
fn image_of(disk: &Disk) -> Option<(PathBuf, String)> {
    let local = matches!(disk.kind(), DiskKind::File | DiskKind::Block);
    let path = disk.path().filter(|path| local && !path.is_empty())?;
    let format = disk.meant_format();
    Some((path.into(), known_format(format).unwrap_or(format).to_owned()))
}

/// The size of one image. `may_open`: so that its header is read. Blocks.
fn measured(target: String, image: Option<(PathBuf, String)>, may_open: bool) -> DiskStats {
    let none = DiskStats { target, ..DiskStats::default() };
    let Some((path, format)) = image else { return none };
    let seen = Seen::at(&path);
    // How long a device is only tells whoever opens it.
    if seen.what != What::Plain {
        return none;
    }
    let capacity = match format.as_str() {
        "raw" => Some(seen.length),
        _ if may_open => chain::virtual_size(&path, &format).unwrap_or_default(),
        _ => None,
    };
    DiskStats { capacity, allocation: Some(seen.allocated), physical: Some(seen.length), ..none }
}

/// The number of the guest's process. Its number is its own as long as it has not ended.
fn process_id(body: &Body) -> Result<i32, DriverError> {
    body.keeper.process_id().ok_or(DriverError::Gone)
}

/// What its process uses: one file of the kernel's, which answers in less time than another thread needs to begin.
fn process(body: &Body) -> Result<usage::ProcessUsage, DriverError> {
    let used = usage::of_process(process_id(body)?);
    if body.process.has_ended() {
        return Err(DriverError::Gone);
    }
    used.map_err(|error| DriverError::Internal(format!("its process cannot be looked at: {error}")))
}

/// What threads of the guest have run, by their number; without those that have ended. A few whose numbers are known are read in less
/// time than another thread needs to begin; all else where that may take its time.
async fn threads(body: &Arc<Body>, ids: Vec<i32>) -> Result<BTreeMap<i32, ThreadStats>, DriverError> {
    let pid = process_id(body)?;
    if ids.len() <= FEW_THREADS
        && let Some(used) = usage::of_known_threads(pid, &ids, &body.thread_numbers())
    {
        return if body.process.has_ended() { Err(DriverError::Gone) } else { Ok(used) };
    }
    let body = body.clone();
    let look = tokio::task::spawn_blocking(move || {
        let mut known = body.thread_numbers().clone();
        let used = usage::of_threads(pid, &ids, &mut known);
        *body.thread_numbers() = known;
        if body.process.has_ended() { Err(DriverError::Gone) } else { Ok(used) }
    });
    look.await.unwrap_or_else(|error| Err(DriverError::Internal(format!("the look at the guest was cut off: {error}"))))
}

/// The threads of its vCPUs as QEMU calls them, by the numbers of these.
async fn vcpu_threads(body: &Arc<Body>, def: &DomainDef) -> Result<Arc<BTreeMap<u32, i32>>, DriverError> {
    let read = |told: &Value| numbered(told, 0..def.maximum_vcpus(), |cpu| cpu["cpu-index"].as_u64()?.try_into().ok());
    body.known(("query-cpus-fast", json!({})), Holds::UntilAnyChange, read).await
}

async fn vcpus(body: &Arc<Body>, def: &DomainDef) -> Result<Vec<VcpuStats>, DriverError> {
    let by_number = vcpu_threads(body, def).await?;
    let used = threads(body, by_number.values().copied().collect()).await?;
    let thread = |number: u32| by_number.get(&number).and_then(|id| used.get(id)).copied();
    Ok((0..def.maximum_vcpus()).map(|number| VcpuStats { number, thread: thread(number) }).collect())
}

async fn iothreads(body: &Arc<Body>, def: &DomainDef) -> Result<Vec<IothreadStats>, DriverError> {
    let told = body.patiently("query-iothreads", json!({})).await?;
    let known = 1..def.iothreads.unwrap_or(0).saturating_add(1);
    let by_number = numbered(&told, known, |one| one["id"].as_str()?.strip_prefix("iothread")?.parse().ok());
    let used = threads(body, by_number.values().copied().collect()).await?;
    let stats = |(number, id): (u32, i32)| Some(IothreadStats { number, thread: *used.get(&id)? });
    Ok(by_number.into_iter().filter_map(stats).collect())
}

/// QEMU's threads of a kind, by the number that `number` finds in what is told of each. What the definition has none of (`known`)
/// is not listened to: a QEMU that was taken over may tell of any number.
fn numbered(told: &Value, known: Range<u32>, number: impl Fn(&Value) -> Option<u32>) -> BTreeMap<u32, i32> {
    let all = told.as_array().into_iter().flatten();
    let all = all.filter_map(|one| Some((number(one)?, i32::try_from(one["thread-id"].as_i64()?).ok()?)));
    all.filter(|(number, _)| known.contains(number)).collect()
}

/// Has QEMU look on how the guest writes its memory: it compares a sample of the pages. That it is done is told by nobody.
async fn dirty_rate(body: &Arc<Body>) -> Result<DirtyRateStats, DriverError> {
    let begun = body.patiently("calc-dirty-rate", json!({ "calc-time": LOOKED_ON.as_secs() })).await;
    let mut told = body.patiently("query-dirty-rate", json!({})).await?;
    // One that an earlier virtd has begun will do.
    if told["status"] != "measuring" {
        begun?;
    }
    for _ in 0..LOOKS {
        if let Some(measured) = measured_rate(&told) {
            return measured;
        }
        tokio::time::sleep(LOOKED_ON / 10).await;
        told = body.patiently("query-dirty-rate", json!({})).await?;
    }
    Err(DriverError::TimedOut("QEMU did not say in time how quickly the guest writes its memory".to_owned()))
}

/// Has the host count what the threads of its vCPUs do, for as long as it is looked on: nobody else has to wait for it.
async fn events(body: &Arc<Body>, def: &DomainDef) -> Result<PerfStats, DriverError> {
    let pid = process_id(body)?;
    // Without KVM several vCPUs may share one.
    let ids: BTreeSet<i32> = vcpu_threads(body, def).await?.values().copied().collect();
    let room = perf::room_for(ids.len()).await.map_err(|e| not_counted(&e))?;
    let looked_at = body.clone();
    let begin = move || {
        let ours = usage::our_numbers(pid);
        let number = |id: i32| ours.as_ref().map_or(Some(id), |ours| ours.get(&id).copied());
        let begun = Counters::of_threads(room, pid, &ids.into_iter().filter_map(number).collect::<Vec<_>>());
        if looked_at.process.has_ended() { Err(DriverError::Gone) } else { begun.map_err(|e| not_counted(&e)) }
    };
    let counters = blocking(begin).await??;
    tokio::time::sleep(LOOKED_ON).await;
    blocking(move || counters.read()).await?.map_err(|e| not_counted(&e))
}

fn not_counted(error: &std::io::Error) -> DriverError {
    let remedy = match error.kind() {
        ErrorKind::PermissionDenied => "; others than root may do that after 'sysctl kernel.perf_event_paranoid=1'",
        ErrorKind::QuotaExceeded => "; raise LimitNOFILE= of its unit, or 'ulimit -n'",
        _ => "",
    };
    DriverError::Unsupported(format!("the host counts no events of the guest's vCPUs: {error}{remedy}"))
}

/// What QEMU tells, if it has looked on. Error: it could not, as it takes no samples of little memory.
fn measured_rate(told: &Value) -> Option<Result<DirtyRateStats, DriverError>> {
    let rate = told["dirty-rate"].as_i64().filter(|_| told["status"] == "measured")?;
    let seconds = told["calc-time"].as_u64().unwrap_or_default();
    let Ok(rate) = u64::try_from(rate) else {
        let text = "QEMU tells of no memory below 128 MiB how quickly it is written".to_owned();
        return Some(Err(DriverError::Unsupported(text)));
    };
    Some(Ok(DirtyRateStats {
        bytes_per_second: rate.saturating_mul(1 << 20),
        period_usec: seconds.saturating_mul(1_000_000),
    }))
}

async fn memory(body: &Arc<Body>, def: &DomainDef) -> Result<MemoryStats, DriverError> {
    let rss = process(body)?.resident;
    let balloon = def.devices.memballoon.as_ref();
    let balloon = balloon.filter(|one| !matches!(one.model, BalloonModel::None | BalloonModel::Xen));
    let Some((balloon, alias)) = balloon.and_then(|balloon| Some((balloon, balloon.info.alias()?))) else {
        return Ok(MemoryStats { actual: def.memory_kib().saturating_mul(1024), rss, guest: None });
    };
    // Of changes QEMU tells; what the guest says it only says where it is asked to, every so often.
    let read = |now: &Value| now["actual"].as_u64().unwrap_or_default();
    let actual = *body.known(("query-balloon", json!({})), Holds::UntilAnyChange, read).await?;
    if balloon.stats.as_ref().is_none_or(|stats| stats.period == 0) {
        return Ok(MemoryStats { actual, rss, guest: None });
    }
    let asked = json!({ "path": format!("/machine/peripheral/{alias}"), "property": "guest-stats" });
    Ok(MemoryStats { actual, rss, guest: guest_memory(&body.patiently("qom-get", asked).await?) })
}

/// What a guest has said of its memory, if it has.
fn guest_memory(said: &Value) -> Option<GuestMemory> {
    let said_at_usec = said["last-update"].as_u64().filter(|at| *at > 0)?.saturating_mul(1_000_000);
    // What it does not say is as large as can be.
    let number = |key: &str| said["stats"][key].as_u64().filter(|number| *number != u64::MAX);
    Some(GuestMemory {
        said_at_usec,
        available: number("stat-total-memory"),
        unused: number("stat-free-memory"),
        usable: number("stat-available-memory"),
        swap_in: number("stat-swap-in"),
        swap_out: number("stat-swap-out"),
        major_faults: number("stat-major-faults"),
        minor_faults: number("stat-minor-faults"),
        disk_caches: number("stat-disk-caches"),
    })
}

async fn disks(workers: &Workers, body: &Arc<Body>, def: &DomainDef) -> Result<Vec<DiskStats>, DriverError> {
    let seen = seen(workers, def).await?;
    let (told, nodes) = tokio::join!(body.patiently("query-blockstats", json!({})), Nodes::known(body));
    let (told, nodes, disks) = (told?, nodes?, &def.devices.disks);
    let of_all = |nodes| disks.iter().map(|disk| Told::of(disk, &told, nodes)).collect::<Vec<_>>();
    let stats = |of_all: Vec<Told<'_>>| disks.iter().zip(of_all).map(|(disk, one)| one.stats(disk, &seen)).collect();
    let known = of_all(&nodes);
    match known.iter().any(|one| one.is_to_be_asked(&seen)) {
        true => Ok(stats(of_all(&Nodes::of(body).await?))),
        false => Ok(stats(known)),
    }
}

/// The files of all images, which also tells whether their storage answers. QEMU looks at each of them when it is asked for their
/// sizes, and its guest would stand as long as one does not answer. Errors: `TimedOut`.
async fn seen(workers: &Workers, def: &DomainDef) -> Result<BTreeMap<PathBuf, Seen>, DriverError> {
    let local = def.devices.disks.iter().filter(|disk| matches!(disk.kind(), DiskKind::File | DiskKind::Block));
    let files: Vec<PathBuf> = local.flat_map(|disk| disk.files()).collect();
    if files.is_empty() {
        return Ok(BTreeMap::new());
    }
    let look = move |_: &_| Ok(files.into_iter().map(|file| (file.clone(), Seen::at(&file))).collect());
    workers.run(Errand::new(def.uuid, "the images of the machine"), look).await
}

/// What QEMU tells of one disk.
#[derive(Default)]
struct Told<'a> {
    /// It is there.
    stats: Option<&'a Value>,
    /// The node that its device reads by name, and that node.
    name: Option<&'a str>,
    top: Option<&'a Node>,
    /// The node that has the image's file open; above it are its format and filters, which name the same file.
    storage: Option<&'a Node>,
}

impl<'a> Told<'a> {
    fn of(disk: &Disk, told: &'a Value, nodes: &'a Nodes) -> Told<'a> {
        let alias = disk.info.alias().unwrap_or_default();
        // Of what is virtio the path is told of the device's inner part.
        let is_it =
            |one: &&Value| one["qdev"].as_str().is_some_and(|device| device.split('/').any(|part| part == alias));
        let Some(device) = told.as_array().into_iter().flatten().find(is_it) else { return Told::default() };
        let name = device["node-name"].as_str();
        let top = name.and_then(|name| nodes.0.iter().find(|node| node.name == name));
        let storage = top.and_then(|top| {
            let is_storage = |driver: &str| matches!(driver, "file" | "host_device" | "host_cdrom");
            nodes.0.iter().find(|node| is_storage(&node.driver) && node.file == top.file)
        });
        Told { stats: Some(&device["stats"]), name, top, storage }
    }

    /// Its file, where the kernel tells of that what QEMU would. A path with links in it may lead elsewhere by now.
    fn seen<'s>(&self, seen: &'s BTreeMap<PathBuf, Seen>) -> Option<&'s Seen> {
        let storage = self.storage.filter(|storage| storage.driver == "file")?;
        seen.get(&storage.file).filter(|seen| seen.what == What::Plain && seen.real == storage.file)
    }

    /// How large it is only QEMU knows, and not by what it said before.
    fn is_to_be_asked(&self, seen: &BTreeMap<PathBuf, Seen>) -> bool {
        self.name.is_some() && self.seen(seen).is_none()
    }

    fn stats(self, disk: &Disk, seen: &BTreeMap<PathBuf, Seen>) -> DiskStats {
        let threshold = [self.top, self.storage].into_iter().flatten().map(|node| node.write_threshold).max();
        let file = self.seen(seen);
        DiskStats {
            target: disk.target.dev.clone(),
            traffic: self.stats.map(|stats| traffic(stats, threshold.unwrap_or(0))),
            capacity: self.top.map(|top| top.virtual_size),
            allocation: file.map(|file| file.allocated).or(self.top.and_then(|top| top.allocated)),
            physical: file.map(|file| file.length).or(self.storage.map(|storage| storage.virtual_size)),
        }
    }
}

fn traffic(told: &Value, threshold: u64) -> DiskTraffic {
    let number = |key: &str| told[key].as_u64().unwrap_or_default();
    let transfers = |way: &str| Transfers {
        requests: number(&format!("{way}_operations")),
        bytes: number(&format!("{way}_bytes")),
        time_usec: number(&format!("{way}_total_time_ns")) / 1000,
    };
    let failed = ["rd", "wr", "flush", "unmap"].map(|way| number(&format!("failed_{way}_operations")));
    DiskTraffic {
        read: transfers("rd"),
        write: transfers("wr"),
        flush_requests: number("flush_operations"),
        flush_usec: number("flush_total_time_ns") / 1000,
        errors: failed.iter().sum(),
        threshold,
    }
}

fn interfaces(body: &Body, def: &DomainDef) -> Vec<InterfaceStats> {
    let counted = |card: &Interface| {
        let target = card.target.as_ref().and_then(|target| target.dev.clone());
        let own = OwnNetwork::of_card(body.leavings.own_network.as_ref(), card);
        let traffic = target.as_deref().and_then(|name| match own {
            None => usage::of_link(name),
            Some(own) => usage::of_tap(name, own.holder()?.identity.pid),
        });
        InterfaceStats { mac: card.mac(), target, traffic }
    };
    def.devices.interfaces.iter().map(counted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;

    fn disk(alias: &str, target: &str, file: &str) -> Disk {
        let xml = format!(
            "<domain type='qemu'><name>n</name><memory>1</memory><os><type>hvm</type></os><devices><disk type='file'>\
             <source file='{file}'/><target dev='{target}'/><alias name='{alias}'/></disk></devices></domain>"
        );
        DomainDef::parse(&xml).unwrap().devices.disks.remove(0)
    }

    fn node(name: &str, driver: &str, sizes: (u64, u64), write_threshold: u64) -> Node {
        Node {
            name: name.into(),
            driver: driver.into(),
            file: "/a".into(),
            virtual_size: sizes.0,
            allocated: Some(sizes.1),
            write_threshold,
            snapshots: Vec::new(),
            bitmaps: Default::default(),
        }
    }

    fn told_of(disk: &Disk, told: &Value, nodes: &Nodes, seen: &BTreeMap<PathBuf, Seen>) -> DiskStats {
        Told::of(disk, told, nodes).stats(disk, seen)
    }

    #[test]
    fn a_disk_is_found_by_its_device_and_its_sizes_by_its_nodes() {
        let told = json!([
            { "qdev": "/machine/peripheral/virtio-disk10/virtio-backend", "node-name": "b", "stats": {} },
            { "qdev": "/machine/peripheral/virtio-disk1/virtio-backend", "node-name": "vda-format", "stats": {
                "rd_operations": 1, "rd_bytes": 2, "rd_total_time_ns": 3000, "wr_operations": 4, "wr_bytes": 5,
                "wr_total_time_ns": 6000, "flush_operations": 7, "flush_total_time_ns": 8000,
                "failed_rd_operations": 9, "failed_wr_operations": 10, "failed_flush_operations": 11,
                "failed_unmap_operations": 12,
            } },
            { "qdev": "sata0-0-0", "stats": {} },
        ]);
        let nodes = Nodes(vec![
            node("vda-storage", "file", (100, 90), 50),
            node("vda-format", "qcow2", (1000, 80), 0),
            node("b", "raw", (3, 3), 0),
        ]);
        let traffic = DiskTraffic {
            read: Transfers { requests: 1, bytes: 2, time_usec: 3 },
            write: Transfers { requests: 4, bytes: 5, time_usec: 6 },
            flush_requests: 7,
            flush_usec: 8,
            errors: 42,
            threshold: 50,
        };
        let whole = DiskStats {
            target: "vda".into(),
            traffic: Some(traffic),
            capacity: Some(1000),
            allocation: Some(80),
            physical: Some(100),
        };
        assert_eq!(told_of(&disk("virtio-disk1", "vda", "/a"), &told, &nodes, &BTreeMap::new()), whole);
        let empty = DiskStats { target: "sda".into(), traffic: Some(DiskTraffic::default()), ..DiskStats::default() };
        assert_eq!(told_of(&disk("sata0-0-0", "sda", "/b"), &told, &nodes, &BTreeMap::new()), empty);
        let unknown = DiskStats { target: "vdb".into(), ..DiskStats::default() };
        assert_eq!(told_of(&disk("virtio-disk2", "vdb", "/c"), &told, &nodes, &BTreeMap::new()), unknown);
    }

    #[test]
    fn qemu_is_asked_again_of_those_disks_only_whose_size_the_kernel_does_not_tell() {
        let told = json!([{ "qdev": "d", "node-name": "top", "stats": {} }, { "qdev": "empty", "stats": {} }]);
        let nodes = |storage: &str| Nodes(vec![node("top", "qcow2", (9, 9), 0), node("below", storage, (8, 8), 0)]);
        let file = Seen { what: What::Plain, length: 20, allocated: 10, ..Seen::nothing(Path::new("/a")) };
        let (seen, unseen) = (BTreeMap::from([(PathBuf::from("/a"), file)]), BTreeMap::new());
        let asked =
            |alias: &str, nodes: &Nodes, seen| Told::of(&disk(alias, "vda", "/a"), &told, nodes).is_to_be_asked(seen);
        assert!(!asked("d", &nodes("file"), &seen) && !asked("empty", &nodes("file"), &seen));
        assert!(asked("d", &nodes("host_device"), &seen) && asked("d", &nodes("file"), &unseen));
        assert!(asked("d", &Nodes::default(), &seen), "what was put in since");
        let linked =
            seen.clone().into_iter().map(|(path, file)| (path, Seen { real: PathBuf::from("/root/b"), ..file }));
        let linked = linked.collect();
        assert!(asked("d", &nodes("file"), &linked), "what a link leads to now");
        let stats = told_of(&disk("d", "vda", "/a"), &told, &nodes("file"), &seen);
        assert_eq!((stats.capacity, stats.allocation, stats.physical), (Some(9), Some(10), Some(20)));
    }

    #[test]
    fn threads_that_the_definition_does_not_have_are_not_listened_to() {
        let told =
            json!([{ "n": 1, "thread-id": 11 }, { "n": 0, "thread-id": 10 }, { "n": 2, "thread-id": 12 }, { "n": 1 }]);
        let number = |one: &Value| u32::try_from(one["n"].as_u64()?).ok();
        assert_eq!(numbered(&told, 0..2, number), BTreeMap::from([(0, 10), (1, 11)]));
        assert_eq!(numbered(&told, 1..1, number), BTreeMap::new());
    }

    #[test]
    fn what_a_guest_does_not_say_of_its_memory_is_not_told() {
        let nothing = json!({ "last-update": 0, "stats": { "stat-free-memory": u64::MAX } });
        assert_eq!(guest_memory(&nothing), None);
        let some = json!({ "last-update": 2, "stats": { "stat-free-memory": 7, "stat-swap-in": u64::MAX } });
        let known = GuestMemory { said_at_usec: 2_000_000, unused: Some(7), ..GuestMemory::default() };
        assert_eq!(guest_memory(&some), Some(known));
    }

    #[test]
    fn a_rate_is_told_when_it_is_measured() {
        let told = |status: &str, rate: i64| {
            measured_rate(&json!({ "status": status, "start-time": 5, "calc-time": 1, "dirty-rate": rate }))
        };
        let rate = DirtyRateStats { bytes_per_second: 3 << 20, period_usec: 1_000_000 };
        assert_eq!(told("measured", 3).and_then(Result::ok), Some(rate));
        assert!(matches!(told("measured", -1), Some(Err(DriverError::Unsupported(_)))));
        assert!(told("measuring", 3).is_none());
        assert!(measured_rate(&json!({ "status": "unstarted", "start-time": 0, "calc-time": 0 })).is_none());
    }

    #[test]
    fn an_image_at_rest_is_measured_and_opened_for_those_only_who_may_have_that() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
        header.resize(24, 0);
        header.extend(7_340_032u64.to_be_bytes());
        std::fs::write(&file, &header).unwrap();
        let allocation = Some(std::fs::metadata(&file).unwrap().blocks() * 512);
        let image = |format: &str| Some((file.path().to_owned(), format.to_owned()));
        let known = DiskStats { target: "vda".into(), allocation, physical: Some(32), ..DiskStats::default() };
        let with = |capacity| DiskStats { capacity, ..known.clone() };
        assert_eq!(measured("vda".into(), image("qcow2"), true), with(Some(7_340_032)));
        assert_eq!(measured("vda".into(), image("qcow2"), false), with(None));
        assert_eq!(measured("vda".into(), image("raw"), false), with(Some(32)));
        let missing = Some((Path::new("/nowhere/at all").to_owned(), "raw".to_owned()));
        assert_eq!(measured("vda".into(), missing, true), DiskStats { target: "vda".into(), ..DiskStats::default() });
    }
}
