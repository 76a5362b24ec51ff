//! Network devices of the host: made by us on the system bus, and by QEMU's own setuid helper for everybody else. Those of cards
//! in a network of virtd's are made where that network is.
//!
//! QEMU could run the helper itself (`-netdev bridge`), but not behind its seccomp fence: that forbids new processes and
//! new privileges, and we do not open the fence for it. So the helper is run beforehand; it hands the open device over a
//! socket, and QEMU inherits it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use super::capabilities::bridge_helper;
use super::companion::Gifts;
use super::plan::Tap;
use super::record::Keeper;
use crate::host::macvtap::Macvtap;
use crate::host::tap::TapPlan;
use crate::host::tool::{Tool, ear};
use crate::host::workers::blocking;
use crate::network::OwnNetwork;
use crate::network::inside::Request;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::AsyncReadExt;
use virt_model::device::Interface;
use virt_model::device::interface::InterfaceKind;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::xml::Finding;

/// The helper has nothing to wait for.
const PATIENCE: Duration = Duration::from_secs(10);

/// The bridges and other network devices of the host that a definition names and that are not there. Everybody may know
/// which there are. `own`: networks are not on the host, but in the user's own network. Blocks.
pub fn findings(def: &DomainDef, sysfs: &Path, own: bool) -> Vec<Finding> {
    let missing = |card: &Interface| {
        let source = card.source.as_ref()?;
        let (attribute, name) = match card.kind {
            InterfaceKind::Network if own => return None,
            // Of a network, whoever starts the machine knows the bridge.
            InterfaceKind::Bridge | InterfaceKind::Network => ("bridge", source.bridge.as_deref()?),
            InterfaceKind::Direct => ("dev", source.dev.as_deref()?),
            _ => return None,
        };
        let device = sysfs.join("class/net").join(name);
        let why = if name.contains('/') || name.is_empty() || name.starts_with('.') {
            format!("'{name}' is no name of a network device")
        } else if !device.exists() {
            let remedy = if attribute == "bridge" {
                format!("; make it (ip link add {name} type bridge)")
            } else {
                String::new()
            };
            format!("this host has no network device '{name}'{remedy}")
        } else if attribute == "bridge" && !device.join("bridge").exists() {
            format!(
                "the network device '{name}' is no bridge; use type='direct', or put it into a bridge and name that"
            )
        } else {
            return None;
        };
        Some(Finding::unsupported(&source.at.attribute(attribute), why))
    };
    def.devices.interfaces.iter().filter_map(missing).collect()
}

/// Opens what the guest's network card is plugged into; each descriptor with its number in QEMU. It disappears when the last
/// copies of the descriptors are closed. We make it ourselves where we may; else QEMU's helper does. One that is on a device
/// of the host's is `made` already, and does not disappear.
pub async fn open(tap: &Tap, made: Option<&Macvtap>, own: Option<&OwnNetwork>) -> Result<Gifts, DriverError> {
    let by_helper = !nix::unistd::geteuid().is_root();
    let own = own.filter(|_| tap.plan.of_network);
    let opened = match (&tap.plan.bridge, made) {
        (_, Some(link)) => open_direct(tap.plan.clone(), link.clone()).await?,
        (Some(_), None) if own.is_some() => make(tap.plan.clone(), own.cloned()).await?,
        (Some(bridge), None) if by_helper => {
            let helper = bridge_helper();
            let helper =
                helper.ok_or_else(|| DriverError::Unsupported("qemu-bridge-helper is not installed".to_owned()))?;
            vec![open_with(&helper, bridge).await?]
        }
        _ => make(tap.plan.clone(), None).await?,
    };
    let mut gifts: Gifts = tap.fds.iter().copied().zip(opened).collect();
    for fd in &tap.vhost_fds {
        let opened = std::fs::File::options().read(true).write(true).open("/dev/vhost-net");
        let opened = opened.map_err(|e| {
            DriverError::Unsupported(format!(
                "/dev/vhost-net: {e}; load the module vhost_net, or use <driver name='qemu'/>"
            ))
        })?;
        gifts.push((*fd, opened.into()));
    }
    Ok(gifts)
}

/// Has it on record that filters of devices are to be taken away, if one of these has one: before it is made.
pub async fn note_filters(keeper: &Arc<Keeper>, taps: &[Tap]) -> Result<(), DriverError> {
    if taps.iter().all(|tap| tap.plan.filter.is_none()) {
        return Ok(());
    }
    keeper.change(|record| record.filtered = true).await
}

async fn open_direct(plan: TapPlan, link: Macvtap) -> Result<Vec<OwnedFd>, DriverError> {
    let what = format!("the network device '{}' cannot be used", link.name);
    let opened = blocking(move || link.open(plan.queues).and_then(|fds| link.shape(&plan.rates).map(|()| fds)));
    opened.await?.map_err(|e| DriverError::Hypervisor(format!("{what}: {e}")))
}

async fn make(plan: TapPlan, own: Option<OwnNetwork>) -> Result<Vec<OwnedFd>, DriverError> {
    let what = match (&plan.bridge, &plan.name) {
        (Some(bridge), _) => format!("on bridge '{bridge}'"),
        (None, Some(name)) => format!("'{name}'"),
        (None, None) => "for the guest".to_owned(),
    };
    let make = move || match own {
        None => crate::host::tap::open(&plan).map_err(|e| e.to_string()),
        Some(own) => own.ask(&Request::Tap(plan)).map(|(_, ends)| ends).map_err(|e| e.to_string()),
    };
    let made = blocking(make).await?;
    made.map_err(|e| DriverError::Hypervisor(format!("no network device {what}: {e}")))
}

async fn open_with(helper: &Path, bridge: &str) -> Result<OwnedFd, DriverError> {
    let failed = |why: String| DriverError::Hypervisor(format!("no network device on bridge '{bridge}': {why}"));
    let (ours, theirs) = UnixStream::pair().map_err(|e| failed(e.to_string()))?;
    // Inherited under the number that is its own: only the mark to close it at exec has to go.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).map_err(|e| failed(e.to_string()))?;
    let mut command = Command::new(helper);
    command.arg("--use-vnet").arg(format!("--fd={}", theirs.as_raw_fd())).arg(format!("--br={bridge}"));
    let (mut errors, stderr) = ear().map_err(|e| failed(e.to_string()))?;
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let tool = Tool::start(command).map_err(|e| failed(format!("{}: {e}", helper.display())))?;
    drop(theirs);
    let said = async {
        let mut words = Vec::new();
        errors.read_to_end(&mut words).await?;
        Ok::<_, std::io::Error>((tool.succeeds().await, words))
    };
    let said = tokio::time::timeout(PATIENCE, said).await;
    let said = said.map_err(|_| failed("its helper did not answer in time".to_owned()))?;
    let (succeeded, words) = said.map_err(|e| failed(e.to_string()))?;
    if !succeeded {
        let words = String::from_utf8_lossy(&words);
        let words = words.trim();
        let hint = if words.contains("acl") { " (allow the bridge in /etc/qemu/bridge.conf)" } else { "" };
        return Err(failed(format!("{words}{hint}")));
    }
    receive(&ours).map_err(failed)
}

fn receive(socket: &UnixStream) -> Result<OwnedFd, String> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags).map_err(|e| e.to_string())?;
    let received = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    received.ok_or_else(|| "its helper gave no device".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x9_bridges_that_are_none_are_known_beforehand() {
        let sysfs = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(sysfs.path().join("class/net/br0/bridge")).unwrap();
        std::fs::create_dir_all(sysfs.path().join("class/net/eth0")).unwrap();
        let card = |kind: &str, attribute: &str, name: &str| {
            format!("<interface type='{kind}'><source {attribute}='{name}'/></interface>")
        };
        let cards = [
            card("bridge", "bridge", "br0"),
            card("bridge", "bridge", "br1"),
            card("bridge", "bridge", "eth0"),
            card("bridge", "bridge", "../net/br0"),
            card("direct", "dev", "eth0"),
            card("direct", "dev", "eth1"),
        ];
        let cards = cards.concat();
        let text = format!("<domain type='qemu'><name>n</name><memory>1</memory><devices>{cards}</devices></domain>");
        let found = findings(&DomainDef::parse(&text).unwrap(), sysfs.path(), false);
        let told: Vec<String> = found.iter().map(|one| format!("{}: {}", one.path, one.message)).collect();
        let is = |n: usize, attribute: &str, why: &str| {
            let path = format!("/devices/interface[{n}]/source/@{attribute}: ");
            assert!(told.iter().any(|one| one.starts_with(&path) && one.contains(why)), "{n}: {told:?}");
        };
        is(2, "bridge", "no network device 'br1'; make it (ip link add br1 type bridge)");
        is(3, "bridge", "'eth0' is no bridge");
        is(4, "bridge", "is no name of a network device");
        is(6, "dev", "no network device 'eth1'");
        assert_eq!(told.len(), 4, "{told:?}");
    }

    #[tokio::test]
    async fn a_helper_that_refuses_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let helper = dir.path().join("helper");
        crate::host::test_program::script(&helper, "echo 'access denied by acl file' >&2; exit 1");
        let error = open_with(&helper, "br0").await.unwrap_err().to_string();
        assert!(error.contains("'br0': access denied by acl file (allow the bridge"), "{error}");
    }
}
