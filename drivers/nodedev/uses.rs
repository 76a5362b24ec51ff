//! What of the host would go with a device: file systems that are mounted from it, swap on it, routes over it, and network devices
//! that stand on it.

use super::Host;
use super::attribute::bounded;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use virt_model::nodedev::{About, NodeDevice};

/// The longest table of the kernel's that is read, in bytes.
const LONGEST: u64 = 4 << 20;

/// As many block devices are looked at that stand on others, and as many uses told.
const MOST: usize = 1024;

/// Devices, each with its folder below sysfs.
type Placed = [(PathBuf, Arc<NodeDevice>)];

/// All uses of these devices.
pub fn host_uses(host: &Host, devices: &Placed) -> Vec<(&'static str, String)> {
    let (blocks, mut cards) = (blocks(host, devices), Cards::default());
    for (folder, device) in devices {
        if let About::Net(_) = &device.about {
            carry(host, &host.below_sys(folder), &mut cards);
        }
    }
    let mounts = mounts(host, &blocks).into_iter().map(|place| ("mount", place));
    let swaps = swaps(host, &blocks).into_iter().map(|place| ("swap", place));
    let routes = routes(host, &cards.names).into_iter().map(|route| ("route", route));
    let links = cards.links.into_iter().map(|link| ("link", link));
    mounts.chain(swaps).chain(routes).chain(links).take(MOST).collect()
}

/// The files in `/dev` of all block devices among these devices, and of what stands on those.
pub fn disks(host: &Host, devices: &Placed) -> Vec<PathBuf> {
    blocks(host, devices).into_iter().flat_map(|block| block.nodes).map(PathBuf::from).collect()
}

fn blocks(host: &Host, devices: &Placed) -> BTreeSet<Block> {
    let mut found = BTreeSet::new();
    for (folder, device) in devices {
        let About::Storage(disk) = &device.about else { continue };
        stand_on(host, &host.below_sys(folder), &mut found);
        let whole = whole_of(&disk.block).map(|whole| host.sys.join("class/block").join(whole));
        if let Some(Ok(whole)) = whole.map(std::fs::canonicalize) {
            stand_on(host, &whole, &mut found);
        }
    }
    found
}

/// Network devices, and which of them stands on which other.
#[derive(Debug, Default)]
struct Cards {
    names: BTreeSet<String>,
    links: BTreeSet<String>,
}

/// The network device in `folder`, and those that stand on it: the bridge or bond that it is a port of, its VLANs, macvtaps.
fn carry(host: &Host, folder: &Path, found: &mut Cards) {
    let name_of = |folder: &Path| folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = name_of(folder);
    if found.names.len() >= MOST || !found.names.insert(name.clone()) {
        return;
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for link in entries.filter(|entry| entry.file_name().as_bytes().starts_with(b"upper_")) {
        if let Ok(upper) = std::fs::canonicalize(link.path())
            && upper.starts_with(&host.sys)
        {
            found.links.insert(format!("{} on {name}", name_of(&upper)));
            carry(host, &upper, found);
        }
    }
}

/// The disk that a path to it stands for: `nvme0c1n2` for `nvme0n2`, which is below no controller.
fn whole_of(path: &str) -> Option<String> {
    let (subsystem, rest) = path.strip_prefix("nvme")?.split_once('c')?;
    let (controller, number) = rest.split_once('n')?;
    let numbers = [subsystem, controller, number];
    let sound = numbers.iter().all(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
    sound.then(|| format!("nvme{subsystem}n{number}"))
}

/// A block device, by each name that it is known by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Block {
    /// As in `8:1`.
    number: String,
    /// As in `/dev/sda1`, and `/dev/mapper/…`.
    nodes: Vec<String>,
}

/// The block device in `folder`, its partitions, and what is made of them.
fn stand_on(host: &Host, folder: &Path, found: &mut BTreeSet<Block>) {
    if found.len() >= MOST {
        return;
    }
    let Some(number) = bounded(&folder.join("dev"), 64) else { return };
    let name = folder.file_name().map(|name| name.to_string_lossy().replace('!', "/")).unwrap_or_default();
    let mapped = bounded(&folder.join("dm/name"), 256).map(|name| format!("/dev/mapper/{}", name.trim()));
    let nodes = [format!("/dev/{name}")].into_iter().chain(mapped).collect();
    if !found.insert(Block { number: number.trim().to_owned(), nodes }) {
        return;
    }
    let entries =
        |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().take(MOST).map(|e| e.path());
    for part in entries(folder).filter(|part| part.join("partition").exists()) {
        stand_on(host, &part, found);
    }
    for holder in entries(&folder.join("holders")) {
        if let Ok(holder) = std::fs::canonicalize(holder)
            && holder.starts_with(&host.sys)
        {
            stand_on(host, &holder, found);
        }
    }
}

/// Where these are mounted: by their numbers, or by their names where a file system has a number of its own (btrfs).
fn mounts(host: &Host, blocks: &BTreeSet<Block>) -> BTreeSet<String> {
    let own = ["1/mountinfo", "self/mountinfo"].iter().find_map(|table| bounded(&host.proc.join(table), LONGEST));
    let text = own.unwrap_or_default();
    let used = text.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (number, place) = (fields.nth(2)?, fields.nth(1)?);
        let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
        let is_it = |block: &Block| block.number == number || block.nodes.iter().any(|node| node == source);
        blocks.iter().any(is_it).then(|| unescaped(place))
    });
    used.collect()
}

fn swaps(host: &Host, blocks: &BTreeSet<Block>) -> BTreeSet<String> {
    let text = bounded(&host.proc.join("swaps"), LONGEST).unwrap_or_default();
    let used = text.lines().skip(1).filter_map(|line| {
        let place = unescaped(line.split_whitespace().next()?);
        blocks.iter().any(|block| block.nodes.contains(&place)).then_some(place)
    });
    used.collect()
}

/// Blanks and the like are written as `\040`.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, letter)| text.replace(code, letter))
}

/// The routes over these network devices; those that each device that is up has by itself are none.
fn routes(host: &Host, cards: &BTreeSet<String>) -> BTreeSet<String> {
    let table = |name: &str| bounded(&host.proc.join("self/net").join(name), LONGEST).unwrap_or_default();
    let (four, six) = (table("route"), table("ipv6_route"));
    let four = four.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace();
        let card = fields.next().filter(|card| cards.contains(*card))?;
        let number = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::from_be);
        let (to, mask) = (number(fields.next()?)?, number(fields.nth(5)?)?);
        let to = std::net::Ipv4Addr::from(to);
        Some(route(to.is_unspecified(), to.to_string(), mask.leading_ones(), card))
    });
    let six = six.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let card = fields.get(9).filter(|card| cards.contains(**card))?;
        let to = std::net::Ipv6Addr::from(u128::from_str_radix(fields.first()?, 16).ok()?);
        let length = u32::from_str_radix(fields.get(1)?, 16).ok()?;
        // The kernel's own refusals, local and multicast addresses.
        let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
        let local = to.is_multicast() || to.segments()[0] & 0xffc0 == 0xfe80 || flags & 0x8000_0200 != 0;
        (!local).then(|| route(to.is_unspecified() && length == 0, to.to_string(), length, card))
    });
    four.chain(six).collect()
}

fn route(default: bool, to: String, length: u32, card: &str) -> String {
    if default { format!("default via {card}") } else { format!("{to}/{length} via {card}") }
}
