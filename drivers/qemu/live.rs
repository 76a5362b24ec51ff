//! What a running guest has and its definition does not say: TCP ports, terminals.

use super::capabilities::VHOST_VSOCK;
use crate::host::files::Seen;
use crate::host::workers::{Errand, Workers};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use virt_model::device::chardev::{CharKind, CharSource};
use virt_model::device::disk::StartupPolicy;

use virt_model::device::source::DiskSource;
use virt_model::device::{CharSource as Source, DeviceInfo, Disk};
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

/// TCP ports that starting guests have been promised and have not opened yet.
#[derive(Clone, Default)]
pub struct Ports(Arc<Mutex<BTreeSet<u16>>>);

/// The ports of one start; free again when it is dropped, which is when QEMU has opened them, or has failed.
pub struct Reserved {
    ports: Ports,
    mine: Vec<u16>,
}

impl Ports {
    /// No port, for a start that will take some.
    pub fn reserve(&self) -> Reserved {
        Reserved { ports: self.clone(), mine: Vec::new() }
    }
}

impl Reserved {
    /// Takes a port if nobody has it on that address.
    pub fn take(&mut self, address: &str, port: u16) -> bool {
        let address = address.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let mut taken = self.ports.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = !taken.contains(&port) && TcpListener::bind((address, port)).is_ok();
        if free {
            taken.insert(port);
            self.mine.push(port);
        }
        free
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut taken = self.ports.0.lock().unwrap_or_else(PoisonError::into_inner);
        self.mine.iter().for_each(|port| _ = taken.remove(port));
    }
}

/// Takes the guest's number on the host's vsock, and writes it down; the kernel's half, which holds it. Blocks.
pub fn open_vsock(live: &mut DomainDef) -> Result<Option<OwnedFd>, DriverError> {
    let Some(vsock) = &mut live.devices.vsock else { return Ok(None) };
    let opened = crate::host::vsock::open(Path::new(VHOST_VSOCK), vsock.fixed_cid());
    let (fd, cid) = opened.map_err(|e| {
        let missing = e.kind() == std::io::ErrorKind::NotFound;
        let remedy = if missing { "; load the module (modprobe vhost_vsock)" } else { "" };
        DriverError::Unsupported(format!("<vsock>: {e}{remedy}"))
    })?;
    vsock.cid.get_or_insert_default().address = Some(cid);
    Ok(Some(fd))
}

/// Whether a medium may be missing: always, or where a machine goes on from what was saved of it.
fn may_be_missing(source: &DiskSource, restored: bool) -> bool {
    match source.startup_policy {
        Some(StartupPolicy::Optional) => true,
        Some(StartupPolicy::Requisite) => restored,
        _ => false,
    }
}

/// The media without which a start goes on; `restored`: from what was saved.
pub fn media_that_may_be_missing(def: &DomainDef, restored: bool) -> impl Iterator<Item = &Path> {
    let lenient = move |source: &DiskSource| may_be_missing(source, restored);
    let disks = def.devices.disks.iter().filter(move |disk| disk.source.as_ref().is_some_and(lenient));
    disks.filter_map(|disk| disk.path().map(Path::new))
}

/// Empties the drives whose medium may be missing, and is; `restored`: the machine goes on from what was saved.
pub async fn leave_out_missing_media(
    live: &mut DomainDef,
    restored: bool,
    workers: &Workers,
) -> Result<(), DriverError> {
    let lenient = |disk: &&mut Disk| disk.source.as_ref().is_some_and(|source| may_be_missing(source, restored));
    for disk in live.devices.disks.iter_mut().filter(lenient) {
        let Some(path) = disk.path().map(str::to_owned) else { continue };
        let (errand, looked_at) = (Errand::new(live.uuid, &path), path.clone());
        if !workers.run(errand, move |_| Ok(Seen::at(Path::new(&looked_at)).is_there())).await? {
            tracing::info!(uuid = %live.uuid, "{path} is missing; {} starts without a medium", disk.target.dev);
            disk.source = None;
        }
    }
    Ok(())
}

/// Whether the guest has terminals that only `query-chardev` tells.
pub fn has_terminals(def: &DomainDef) -> bool {
    let devices = &def.devices;
    let serials = devices.serials.iter().map(|device| &device.source);
    let channels = devices.channels.iter().map(|device| &device.source);
    let consoles = devices.consoles.iter().map(|device| &device.source);
    serials.chain(channels).chain(consoles).any(|source| source.kind == CharKind::Pty)
}

/// Puts the terminals that `query-chardev` tells into the definition.
pub fn set_terminals(live: &mut DomainDef, devices: &Value) {
    let terminals = terminals(devices);
    let set = |source: &mut Source, info: &DeviceInfo| {
        let terminal = info.alias().and_then(|alias| terminals.get(alias));
        if let (CharKind::Pty, Some(path)) = (source.kind, terminal) {
            source.set_path(Some(path.clone()));
        }
    };
    let devices = &mut live.devices;
    devices.serials.iter_mut().for_each(|device| set(&mut device.source, &device.info));
    devices.channels.iter_mut().for_each(|device| set(&mut device.source, &device.info));
    for console in &mut devices.consoles {
        set(&mut console.source, &console.info);
        console.source.tty = terminal(&console.source);
    }
}

/// Writes down the names of the network devices that are cards' ends on the host, in the order of the cards that have one.
pub fn name_links(live: &mut DomainDef, links: Vec<String>) {
    let cards = live.devices.interfaces.iter_mut().filter(|card| card.has_host_end());
    for (card, link) in cards.zip(links).filter(|(_, link)| !link.is_empty()) {
        card.target.get_or_insert_default().dev = Some(link);
    }
}

fn terminal(source: &CharSource) -> Option<String> {
    (source.kind == CharKind::Pty).then(|| source.path().map(str::to_owned)).flatten()
}

/// Terminals by the alias of their device, as QEMU names its back ends `char` and the alias.
fn terminals(devices: &Value) -> HashMap<String, String> {
    let devices = devices.as_array().into_iter().flatten();
    let text = |device: &Value, key: &str| device.get(key).and_then(Value::as_str).map(str::to_owned);
    let pair = |device: &Value| {
        let alias = text(device, "label")?.strip_prefix("char")?.to_owned();
        Some((alias, text(device, "filename")?.strip_prefix("pty:")?.to_owned()))
    };
    devices.filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_known_by_their_device() {
        let devices = serde_json::json!([
            {"label": "charserial0", "filename": "pty:/dev/pts/7", "frontend-open": true},
            {"label": "mon", "filename": "unix:/run/x,server=on"},
            {"label": "charchannel0"},
        ]);
        assert_eq!(terminals(&devices), HashMap::from([("serial0".to_owned(), "/dev/pts/7".to_owned())]));
        assert_eq!(terminals(&Value::Null), HashMap::new());
    }

    #[test]
    fn two_starts_get_two_ports() {
        let ports = Ports::default();
        let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).unwrap().port();
        let (mut one, mut two) = (ports.reserve(), ports.reserve());
        assert!(one.take("127.0.0.1", free) && !two.take("127.0.0.1", free));
        drop(one);
        assert!(two.take("127.0.0.1", free));
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(!two.take("127.0.0.1", held.local_addr().unwrap().port()));
    }

    #[test]
    fn x6_a_medium_that_is_requisite_may_be_missing_only_where_a_machine_goes_on() {
        let drive = |target: &str, policy: &str| {
            format!(
                "<disk device='cdrom'><source file='/{policy}' startupPolicy='{policy}'/>\
                 <target dev='{target}' bus='sata'/></disk>"
            )
        };
        let drives = [drive("sda", "mandatory"), drive("sdb", "requisite"), drive("sdc", "optional")].concat();
        let text = format!("<domain type='qemu'><name>d</name><memory>1</memory><devices>{drives}</devices></domain>");
        let def = DomainDef::parse(&text).expect("a document");
        let lenient = |restored| media_that_may_be_missing(&def, restored).map(Path::to_owned).collect::<Vec<_>>();
        assert_eq!(lenient(false), [Path::new("/optional")]);
        assert_eq!(lenient(true), [Path::new("/requisite"), Path::new("/optional")]);
    }
}
