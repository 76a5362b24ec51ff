//! Network devices of the host whose other end is a guest: made by us, plugged into a bridge, and gone with the last copy of
//! their descriptors. Needs the right to administer the host's network.

use super::filter::FilterPlan;
use super::net_tool::{number_of, output, run};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use virt_model::device::interface::{self, Bandwidth, NativeMode, Vlan, VlanTag};

/// A device to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapPlan {
    /// Its name; the next free `vnetN` if there is none.
    pub name: Option<String>,
    /// The bridge it is plugged into.
    pub bridge: Option<String>,
    /// How many descriptors, each a queue.
    pub queues: usize,
    /// The largest packet, in bytes.
    pub mtu: Option<u32>,
    /// It goes out by a device of the host's, without a bridge.
    #[serde(skip)]
    pub direct: Option<Direct>,
    /// Its bridge is a network's of virtd's.
    pub of_network: bool,
    /// It is there, and set up by others.
    pub existing: bool,
    /// It does not see other isolated ports of its bridge.
    pub isolated: bool,
    /// The bridge's VLANs that it is in; none: as the bridge has it.
    pub vlans: Vec<VlanPlan>,
    /// What may pass; none: all.
    pub filter: Option<FilterPlan>,
    /// Packets for the guest that are waited for, at most.
    pub coalesce: Option<u32>,
    /// To the guest, from the guest.
    pub rates: [Option<Rate>; 2],
}

/// One VLAN of a bridge's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VlanPlan {
    /// Its number.
    pub id: u16,
    /// Packets without a tag are in it.
    pub native: bool,
    /// Its packets reach the guest with their tag.
    pub tagged: bool,
}

impl VlanPlan {
    /// Those of a card, as its definition says them.
    pub fn all_of(vlan: &Vlan) -> Vec<VlanPlan> {
        let trunk = vlan.is_trunk();
        let plan = |tag: &VlanTag| VlanPlan {
            id: tag.id,
            native: !trunk || tag.native.is_some(),
            tagged: trunk && tag.native != Some(NativeMode::Untagged),
        };
        vlan.tags.iter().map(plan).collect()
    }
}

/// How a card goes out without a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Direct {
    /// The host's device.
    pub below: String,
    /// As in [`super::macvtap::Macvtap`].
    pub mode: &'static str,
    /// The card's hardware address.
    pub mac: String,
}

/// How much may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// In units of 1000 bytes a second.
    pub average: u64,
    /// The same, for a while.
    pub peak: Option<u64>,
    /// At peak speed at once, in units of 1024 bytes.
    pub burst: Option<u64>,
}

impl Rate {
    /// What a document says; none where it says no average.
    pub fn of(said: &interface::Rate) -> Option<Rate> {
        Some(Rate { average: said.average?, peak: said.peak, burst: said.burst })
    }

    /// What passes to the guest, or guests, and from there.
    pub fn both(limits: Option<&Bandwidth>) -> [Option<Rate>; 2] {
        let (inbound, outbound) =
            (limits.and_then(|limits| limits.inbound.as_ref()), limits.and_then(|limits| limits.outbound.as_ref()));
        [inbound, outbound].map(|rate| rate.and_then(Rate::of))
    }
}

/// `struct ifreq` as far as it is used here.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    value: [u8; 24],
}

impl Request {
    fn named(name: &str) -> io::Result<Request> {
        let mut request = Request { name: [0; libc::IFNAMSIZ], value: [0; 24] };
        if name.len() >= libc::IFNAMSIZ || name.contains('/') {
            let why = format!("'{name}' is no name of a network device: it has at most 15 bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn with<const N: usize>(mut self, bytes: [u8; N]) -> Request {
        self.value[..N].copy_from_slice(&bytes);
        self
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(self.name.len());
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }
}

/// Makes the device; its descriptors, one for each queue. On error nothing is left of it but what [`super::filter::sweep`] takes
/// away. Blocks.
pub fn open(plan: &TapPlan) -> io::Result<Vec<OwnedFd>> {
    let first = queue(plan.name.as_deref().unwrap_or("vnet%d"), plan)?;
    let name = first.1;
    let mut fds = vec![first.0];
    for _ in 1..plan.queues {
        fds.push(queue(&name, plan)?.0);
    }
    if !plan.existing {
        set_up(&name, plan)?;
    }
    if let Some(frames) = plan.coalesce {
        coalesce(&name, frames)?;
    }
    for (rate, to_guest) in plan.rates.iter().zip([true, false]) {
        if let Some(rate) = rate {
            limit(&name, *rate, to_guest)?;
        }
    }
    Ok(fds)
}

fn queue(name: &str, plan: &TapPlan) -> io::Result<(OwnedFd, String)> {
    let device = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty());
    let device = device.map_err(|e| io::Error::new(io::Error::from(e).kind(), format!("/dev/net/tun: {e}")))?;
    let name = to_tap(&device, name, plan.queues > 1)?;
    Ok((device, name))
}

/// Makes an open device one that a guest's packets go through, whole frames with virtio's header; its name.
pub(super) fn to_tap(device: &OwnedFd, name: &str, several: bool) -> io::Result<String> {
    let several = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several) as u16;
    let mut request = Request::named(name)?.with(flags.to_ne_bytes());
    ioctl(device.as_raw_fd(), libc::TUNSETIFF as libc::c_ulong, &mut request)?;
    Ok(request.name())
}

/// The name of the network device whose other end that is; nothing if it is no such end.
pub fn name_of(end: &OwnedFd) -> Option<String> {
    let mut request = Request::named("").ok()?;
    ioctl(end.as_raw_fd(), libc::TUNGETIFF as libc::c_ulong, &mut request).ok()?;
    Some(request.name())
}

/// Whether a process has the other end of the network device open: a device that nobody has any more goes, and its name may be the
/// next one's. Blocks.
pub fn is_held(name: &str, pid: i32) -> io::Result<bool> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // Where it is told it is told at once; of other files the process makes it as long as it likes.
        let (mut told, file) = (Vec::new(), std::fs::File::open(entry?.path()));
        if file.and_then(|file| file.take(1024).read_to_end(&mut told)).is_err() {
            continue;
        }
        if String::from_utf8_lossy(&told).lines().any(|line| line.strip_prefix("iff:").map(str::trim) == Some(name)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn set_up(name: &str, plan: &TapPlan) -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    let socket = socket.as_raw_fd();
    if let Some(mtu) = plan.mtu {
        let mut request = Request::named(name)?.with(i32::try_from(mtu).unwrap_or(i32::MAX).to_ne_bytes());
        ioctl(socket, libc::SIOCSIFMTU as libc::c_ulong, &mut request)?;
    }
    if let Some(filter) = &plan.filter {
        filter.put(number_of(name)?)?;
    }
    plug_in(name, plan, socket)?;
    let mut request = Request::named(name)?;
    ioctl(socket, libc::SIOCGIFFLAGS as libc::c_ulong, &mut request)?;
    let flags = i16::from_ne_bytes([request.value[0], request.value[1]]) | libc::IFF_UP as i16;
    ioctl(socket, libc::SIOCSIFFLAGS as libc::c_ulong, &mut request.with(flags.to_ne_bytes()))
}

/// Plugs a device into another bridge than the one that it is in, as a start does.
pub fn change_plug(name: &str, plan: &TapPlan) -> io::Result<()> {
    run("ip", &["link", "set", "dev", name, "nomaster"])?;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    plug_in(name, plan, socket.as_raw_fd())
}

/// Plugs a device whose bridge has gone into one again, as a start does: it is down until the bridge has all that it is to have
/// for it, so that nothing passes before. One that is in a bridge goes out of it first.
pub fn plug_again(name: &str, plan: &TapPlan) -> io::Result<()> {
    run("ip", &["link", "set", "dev", name, "down", "nomaster"])?;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    let plugged = plug_in(name, plan, socket.as_raw_fd());
    if plugged.is_err() {
        run("ip", &["link", "set", "dev", name, "nomaster"])?;
    }
    run("ip", &["link", "set", "dev", name, "up"])?;
    plugged
}

/// Plugs a device into its bridge, if it is for one, and sets what the bridge has for it.
fn plug_in(name: &str, plan: &TapPlan, socket: RawFd) -> io::Result<()> {
    if let Some(bridge) = &plan.bridge {
        let mut request = Request::named(bridge)?.with(number_of(name)?.to_ne_bytes());
        let plugged = ioctl(socket, SIOCBRADDIF, &mut request);
        plugged
            .map_err(|e| io::Error::new(e.kind(), format!("it cannot be plugged into the bridge '{bridge}': {e}")))?;
        if plan.isolated {
            run("ip", &["link", "set", "dev", name, "type", "bridge_slave", "isolated", "on"])?;
        }
        if !plan.vlans.is_empty() {
            join_vlans(name, bridge, &plan.vlans)?;
        }
    }
    Ok(())
}

/// Adds a device to a bridge; not among libc's constants.
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// Leaves the VLAN that the bridge puts every port in, and joins those that are wanted. Until the device is up nothing passes.
fn join_vlans(name: &str, bridge: &str, vlans: &[VlanPlan]) -> io::Result<()> {
    let had = default_vlan(bridge)?;
    if had != 0 {
        run("bridge", &["vlan", "del", "dev", name, "vid", &had.to_string()])?;
    }
    for vlan in vlans {
        let id = vlan.id.to_string();
        let native = vlan.native.then_some("pvid");
        let plain = (!vlan.tagged).then_some("untagged");
        let words = ["vlan", "add", "dev", name, "vid", &id].into_iter().chain(native).chain(plain);
        run("bridge", &words.collect::<Vec<_>>())?;
    }
    Ok(())
}

/// The VLAN that a bridge puts every port in; 0: none. Error: it looks at no VLANs. Blocks.
pub fn default_vlan(bridge: &str) -> io::Result<u64> {
    // By no file below /sys: that shows the host's network, and these may be in another.
    let told: serde_json::Value =
        serde_json::from_slice(&output("ip", &["-json", "-details", "link", "show", "dev", bridge])?)?;
    let bridge_is = &told[0]["linkinfo"]["info_data"];
    // A kernel that knows no VLANs says that the bridge does not look at them, and nothing of which one its ports are in.
    let Some(had) = bridge_is["vlan_default_pvid"].as_u64() else {
        return Err(io::Error::other("bridges of this host's kernel know no VLANs"));
    };
    if bridge_is["vlan_filtering"].as_u64() != Some(1) {
        let how = format!("ip link set {bridge} type bridge vlan_filtering 1");
        return Err(io::Error::other(format!("the bridge '{bridge}' does not look at VLAN tags: {how}")));
    }
    Ok(had)
}

/// `struct ethtool_coalesce`: a command and 22 numbers, of which one is used here.
const COALESCE_WORDS: usize = 23;
const MOST_RX_FRAMES: usize = 2;
const ETHTOOL_GCOALESCE: u32 = 0x0e;
const ETHTOOL_SCOALESCE: u32 = 0x0f;
const SIOCETHTOOL: libc::c_ulong = 0x8946;

/// Asks, sets, and asks again: the kernel takes what it can.
fn coalesce(name: &str, frames: u32) -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    let mut words = [0_u32; COALESCE_WORDS];
    for command in [ETHTOOL_GCOALESCE, ETHTOOL_SCOALESCE, ETHTOOL_GCOALESCE] {
        words[0] = command;
        if command == ETHTOOL_SCOALESCE {
            words[MOST_RX_FRAMES] = frames;
        }
        // The kernel reads and writes them through the pointer, which is good until the call returns.
        let mut request = Request::named(name)?.with((words.as_mut_ptr() as usize).to_ne_bytes());
        ioctl(socket.as_raw_fd(), SIOCETHTOOL, &mut request)?;
    }
    match words[MOST_RX_FRAMES] {
        taken if taken == frames => Ok(()),
        taken => Err(io::Error::other(format!("it waits for {taken} packets at most, not for {frames}"))),
    }
}

fn ioctl(fd: RawFd, number: libc::c_ulong, request: &mut Request) -> io::Result<()> {
    // SAFETY: every number used here takes a `struct ifreq`, which Request is laid out as and not shorter than.
    match unsafe { libc::ioctl(fd, number, std::ptr::from_mut(request)) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Limits what leaves the host by the device (with `leaving`), or what comes in.
pub(super) fn limit(name: &str, rate: Rate, leaving: bool) -> io::Result<()> {
    if leaving {
        run("tc", &["qdisc", "replace", "dev", name, "root", "handle", "1:", "htb", "default", "1"])?;
        return limit_class(name, rate);
    }
    let (average, burst) = words(rate);
    run("tc", &["qdisc", "add", "dev", name, "ingress"])?;
    let filter = ["filter", "add", "dev", name, "parent", "ffff:", "protocol", "all", "u32", "match", "u32", "0", "0"];
    run(
        "tc",
        &[&filter[..], &["police", "rate", &average, "burst", &burst, "mtu", "64kb", "drop", "flowid", ":1"]].concat(),
    )
}

fn limit_class(name: &str, rate: Rate) -> io::Result<()> {
    let (average, burst) = words(rate);
    let peak = format!("{}kbps", rate.peak.unwrap_or(rate.average));
    let class = ["class", "replace", "dev", name, "parent", "1:", "classid", "1:1", "htb"];
    run("tc", &[&class[..], &["rate", &average, "ceil", &peak, "burst", &burst]].concat())
}

/// Average and burst as tc reads them.
fn words(rate: Rate) -> (String, String) {
    (format!("{}kbps", rate.average), format!("{}kb", rate.burst.unwrap_or(rate.average.max(64))))
}

/// Has a device that may be limited already be limited so, or not at all.
pub fn change_limit(name: &str, rate: Option<Rate>, leaving: bool) -> io::Result<()> {
    let (discipline, at) = if leaving { ("htb", "root") } else { ("ingress", "ingress") };
    let is_there = said(&["qdisc", "show", "dev", name])?.split_whitespace().any(|word| word == discipline);
    match rate {
        Some(rate) if leaving && is_there => limit_class(name, rate),
        rate => {
            if is_there {
                run("tc", &["qdisc", "del", "dev", name, at])?;
            }
            rate.map_or(Ok(()), |rate| limit(name, rate, leaving))
        }
    }
}

/// How a device is limited, as the kernel says it: peak and burst have values, too, where nothing was said of them.
pub fn limit_of(name: &str, leaving: bool) -> io::Result<Option<Rate>> {
    let told = match leaving {
        true => said(&["class", "show", "dev", name])?,
        false => said(&["filter", "show", "dev", name, "parent", "ffff:"])?,
    };
    let after = |word: &str| told.split_whitespace().skip_while(|one| *one != word).nth(1);
    let speed =
        |word: &str| after(word).and_then(|text| scaled(text.strip_suffix("bit")?, 1000)).map(|bits| bits / 8000);
    let size = |word: &str| {
        after(word).and_then(|text| scaled(text.strip_suffix('b')?, 1024)).map(|bytes| bytes.div_ceil(1024))
    };
    Ok(speed("rate").map(|average| Rate { average, peak: speed("ceil"), burst: size("burst") }))
}

/// A number with a unit of `kilo`, as tc writes it.
fn scaled(text: &str, kilo: u64) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = ["", "K", "M", "G", "T"].iter().position(|unit| *unit == &text[digits.len()..])?;
    digits.parse::<u64>().ok()?.checked_mul(kilo.checked_pow(power.try_into().ok()?)?)
}

fn said(args: &[&str]) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&output("tc", args)?).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_tc_writes_them() {
        assert_eq!(
            (scaled("8008K", 1000), scaled("16M", 1000), scaled("640", 1000)),
            (Some(8_008_000), Some(16_000_000), Some(640))
        );
        assert_eq!((scaled("65K", 1024), scaled("x", 1024), scaled("1Q", 1024)), (Some(65 * 1024), None, None));
    }
}
