//! Devices that are made from a document, and ended: mediated devices and virtual ports. They are the kernel's: whoever is killed in
//! between, a device is there or is not, and which there are is found as of any other.

use super::{HostDevice, NodeDevices};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::frames::{self, take_turn};
use crate::object::ObjectKind;
use crate::verb;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use virt_model::nodedev::{About, NewDevice, NodeDevice, PortParent, ScsiHostAbout};
use virt_model::xml::shorten;

impl NodeDevices {
    /// Makes a device from its document. See [`crate::Service::create_node_device`].
    pub async fn create(self: &Arc<Self>, xml: &str) -> Result<Arc<HostDevice>> {
        let new = NewDevice::parse(xml).map_err(Error::ConfigInvalid)?;
        if let Some(why) = self.host.only_reads() {
            return Err(Error::OperationUnsupported(format!("cannot create a node device: {why}")));
        }
        let parent = self.parent_of(&new)?;
        let _turn = take_turn(&*parent, verb::CREATE_NODE_DEVICE.word, &CancellationToken::new()).await?;
        let device = parent.now().await?;
        self.is_not_there(&new)?;
        can_have(&device, &new)?;
        let made = self.host.make(&device, &new).await;
        let (name, news) = made.map_err(|error| parent.failed("make a device of", error))?;
        news.into_iter().for_each(|one| self.hears(one));
        self.get(&name)
    }

    fn parent_of(&self, new: &NewDevice) -> Result<Arc<HostDevice>> {
        let parent = match new {
            NewDevice::Mdev { parent, .. } => return self.get(parent),
            NewDevice::Port { parent, .. } => parent,
        };
        let fits = |host: &ScsiHostAbout| match parent {
            PortParent::OnFabric(fabric) => host.fibre.as_ref().is_some_and(|[_, _, own]| own == fabric),
            _ => true,
        };
        match parent {
            PortParent::Named(name) => self.get(name),
            PortParent::With(names) => self.by_wwn(&names.node, &names.port),
            PortParent::OnFabric(_) | PortParent::Any => {
                let has_room = |device: &Arc<HostDevice>| match &device.facts().device.about {
                    About::ScsiHost(host) => fits(host) && host.ports.is_some_and(|(most, has)| has < most),
                    _ => false,
                };
                self.find(has_room).ok_or_else(|| {
                    Error::NoSuchNodeDevice("of Fibre Channel that can have another virtual port".to_owned())
                })
            }
        }
    }

    /// Refuses what would be a second of its kind.
    fn is_not_there(&self, new: &NewDevice) -> Result<()> {
        let is_it = |there: &Arc<HostDevice>| {
            let facts = there.facts();
            match (new, &facts.device.about) {
                (NewDevice::Mdev { uuid, .. }, About::Mdev(own)) => own.uuid == uuid.to_string(),
                (NewDevice::Port { names, .. }, _) => facts.device.fibre() == Some((&*names.node, &*names.port)),
                _ => false,
            }
        };
        match self.find(is_it) {
            None => Ok(()),
            Some(there) => {
                let text = format!("{} is there already, with what is to tell the new one apart", named(there.name()));
                Err(Error::OperationInvalid(text))
            }
        }
    }
}

/// Refuses what cannot be made of a device, or not any more.
fn can_have(parent: &NodeDevice, new: &NewDevice) -> Result<()> {
    let name = named(&parent.name);
    match (new, &parent.about) {
        (NewDevice::Mdev { kind, .. }, about) => {
            let kinds = if let About::Pci(pci) = about { &pci.mdev_types[..] } else { &[] };
            match kinds.iter().find(|one| one.id == *kind) {
                Some(one) if one.available > 0 => Ok(()),
                Some(_) => Err(Error::OperationInvalid(format!(
                    "{name} can have no more devices of type '{kind}': end one first"
                ))),
                None => {
                    let known: Vec<&str> = kinds.iter().map(|one| &*one.id).collect();
                    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                    let kind = shorten(kind);
                    let text = format!("{name} makes no mediated devices of type '{kind}'; it has types: {known}");
                    Err(Error::OperationUnsupported(text))
                }
            }
        }
        (NewDevice::Port { .. }, About::ScsiHost(ScsiHostAbout { ports: Some((most, has)), .. })) => match has < most {
            true => Ok(()),
            false => {
                Err(Error::OperationInvalid(format!("{name} has all the {most} virtual ports that it can: end one")))
            }
        },
        (NewDevice::Port { .. }, _) => {
            let text = format!("{name} is no host of Fibre Channel that can have virtual ports (vport_ops)");
            Err(Error::OperationUnsupported(text))
        }
    }
}

fn named(device: &str) -> String {
    ObjectKind::NodeDevice.named(device)
}

impl HostDevice {
    /// Ends a device that was made, by whomever. Errors: `InUse` while a machine has it or what is below it, or the host would lose
    /// something; `OperationUnsupported` for devices that are not made.
    pub async fn destroy(self: &Arc<Self>, caller: &Caller) -> Result<()> {
        let deed = verb::DESTROY_DEVICE.word;
        frames::short(self, caller, &verb::DESTROY_DEVICE, async {
            let device = self.now().await?;
            self.applies_to(&device, &verb::DESTROY_DEVICE)?;
            let _taken = self.take_disks(&device, deed).await?;
            self.refuses_live(deed, &self.users_with(&device).await?)?;
            self.refuses_host_uses(deed, &self.host_uses(&device).await?)?;
            let devices = self.devices()?;
            let news = devices.host.end(&device).await.map_err(|error| self.failed(deed, error))?;
            news.into_iter().for_each(|one| devices.hears(one));
            Ok(())
        })
        .await
    }
}
