//! libvirt's document of a device of the host, `<device>`.

use super::{
    About, IommuGroup, Maker, MdevAbout, NetAbout, NodeDevice, PciAbout, ScsiHostAbout, StorageAbout, SystemAbout,
};
use crate::device::{PciAddress, hex};
use crate::xml::Element;

impl NodeDevice {
    /// Its document.
    pub fn document(&self) -> String {
        let mut device = Element::new("device");
        text(&mut device, "name", &*self.name);
        said(&mut device, "path", &self.sys_path);
        for (number, node) in self.nodes.iter().enumerate() {
            let kind = if number == 0 { "dev" } else { "link" };
            device.push(Element::new("devnode").with_attr("type", kind).with_text(node));
        }
        said(&mut device, "parent", self.parent.as_deref().unwrap_or_default());
        if let Some(driver) = &self.driver {
            let mut element = Element::new("driver");
            text(&mut element, "name", driver);
            device.push(element);
        }
        let mut about = capability(self.class());
        self.put(&mut about);
        device.push(about);
        device.write()
    }

    fn put(&self, to: &mut Element) {
        match &self.about {
            About::System(system) => put_system(to, system),
            About::Pci(pci) => self.put_pci(to, pci),
            About::UsbDevice { bus, device, .. } => {
                text(to, "bus", bus.to_string());
                text(to, "device", device.to_string());
                self.put_makers(to);
            }
            About::Usb { number, class: [class, subclass, protocol], description } => {
                for (name, value) in
                    [("number", number), ("class", class), ("subclass", subclass), ("protocol", protocol)]
                {
                    text(to, name, value.to_string());
                }
                said(to, "description", description);
            }
            About::Net(net) => put_net(to, net),
            About::ScsiHost(host) => put_scsi_host(to, host),
            About::ScsiTarget(target) => text(to, "target", target),
            About::Scsi { place, kind } => {
                for (name, value) in ["host", "bus", "target", "lun"].into_iter().zip(place) {
                    text(to, name, value.to_string());
                }
                said(to, "type", kind);
            }
            About::ScsiGeneric => said(to, "char", self.nodes.first().map_or("", |node| node)),
            About::Storage(disk) => self.put_storage(to, disk),
            About::Drm(kind) => text(to, "type", *kind),
            About::Mdev(mdev) => put_mdev(to, mdev),
        }
    }

    fn put_makers(&self, to: &mut Element) {
        for (name, maker) in [("product", &self.product), ("vendor", &self.vendor)] {
            let Maker { id: Some(id), name: words } = maker else { continue };
            let element = Element::new(name).with_attr("id", hex(*id, 4));
            to.push(if words.is_empty() { element } else { element.with_text(words) });
        }
    }

    fn put_pci(&self, to: &mut Element, pci: &PciAbout) {
        text(to, "class", hex(pci.class, 6));
        let (domain, bus, slot, function) = pci.address.place();
        let numbers =
            [("domain", u32::from(domain)), ("bus", bus.into()), ("slot", slot.into()), ("function", function.into())];
        numbers.into_iter().for_each(|(name, number)| text(to, name, number.to_string()));
        self.put_makers(to);
        if let Some(card) = pci.physical {
            let mut part = capability("phys_function");
            part.push(address(card));
            to.push(part);
        }
        let (functions, most) = &pci.functions;
        if *most > 0 {
            let mut part = capability("virt_functions").with_attr("maxCount", most.to_string());
            functions.iter().for_each(|function| part.push(address(*function)));
            to.push(part);
        }
        if !pci.mdev_types.is_empty() {
            let mut part = capability("mdev_types");
            for kind in &pci.mdev_types {
                let mut element = Element::new("type").with_attr("id", &*kind.id);
                said(&mut element, "name", &kind.name);
                text(&mut element, "deviceAPI", &*kind.api);
                text(&mut element, "availableInstances", kind.available.to_string());
                part.push(element);
            }
            to.push(part);
        }
        pci.group.iter().for_each(|IommuGroup { number, members }| to.push(group(*number, members)));
        if let Some(node) = pci.node {
            to.push(Element::new("numa").with_attr("node", node.to_string()));
        }
    }

    fn put_storage(&self, to: &mut Element, disk: &StorageAbout) {
        said(to, "block", self.nodes.first().map_or("", |node| node));
        said(to, "bus", &disk.bus);
        text(to, "drive_type", disk.kind);
        said(to, "model", &self.product.name);
        said(to, "vendor", &self.vendor.name);
        said(to, "serial", &disk.serial);
        let put_size = |to: &mut Element, sizes: [&str; 2]| {
            text(to, sizes[0], disk.size.to_string());
            text(to, "logical_block_size", disk.sector.to_string());
            text(to, sizes[1], (disk.size / u64::from(disk.sector.max(1))).to_string());
        };
        match disk.removable {
            None => put_size(to, ["size", "num_blocks"]),
            Some(available) => {
                let mut part = capability("removable");
                text(&mut part, "media_available", u8::from(available).to_string());
                put_size(&mut part, ["media_size", "num_blocks"]);
                to.push(part);
            }
        }
    }
}

fn put_system(to: &mut Element, system: &SystemAbout) {
    let [product, vendor, version] = &system.hardware;
    said(to, "product", product);
    let parts = [
        ("hardware", vec![("vendor", vendor), ("version", version)]),
        ("firmware", ["vendor", "version", "release_date"].into_iter().zip(&system.firmware).collect()),
    ];
    for (name, texts) in parts {
        let mut part = Element::new(name);
        texts.into_iter().for_each(|(name, value)| said(&mut part, name, value));
        to.push(part);
    }
}

fn put_net(to: &mut Element, net: &NetAbout) {
    text(to, "interface", &*net.interface);
    said(to, "address", &net.mac);
    let mut link = Element::new("link");
    if let Some(speed) = net.speed {
        link.set_attr("speed", speed.to_string());
    }
    if !net.state.is_empty() {
        link.set_attr("state", &*net.state);
    }
    if !link.attributes.is_empty() {
        to.push(link);
    }
    if net.wireless || net.ethernet {
        to.push(capability(if net.wireless { "80211" } else { "80203" }));
    }
}

fn put_scsi_host(to: &mut Element, host: &ScsiHostAbout) {
    text(to, "host", host.host.to_string());
    if let Some(id) = host.unique_id {
        text(to, "unique_id", id.to_string());
    }
    if let Some(names) = &host.fibre {
        let mut part = capability("fc_host");
        ["wwnn", "wwpn", "fabric_wwn"].into_iter().zip(names).for_each(|(name, value)| said(&mut part, name, value));
        to.push(part);
    }
    if let Some((most, now)) = host.ports {
        let mut part = capability("vport_ops");
        text(&mut part, "max_vports", most.to_string());
        text(&mut part, "vports", now.to_string());
        to.push(part);
    }
}

fn put_mdev(to: &mut Element, mdev: &MdevAbout) {
    to.push(Element::new("type").with_attr("id", &*mdev.kind));
    text(to, "uuid", &*mdev.uuid);
    text(to, "parent_addr", &*mdev.parent);
    mdev.group.iter().for_each(|number| to.push(group(*number, &[])));
}

fn group(number: u32, members: &[PciAddress]) -> Element {
    let mut group = Element::new("iommuGroup").with_attr("number", number.to_string());
    members.iter().for_each(|member| group.push(address(*member)));
    group
}

fn address(pci: PciAddress) -> Element {
    let (domain, bus, slot, function) = pci.place();
    let element = Element::new("address").with_attr("domain", hex(domain, 4)).with_attr("bus", hex(bus, 2));
    element.with_attr("slot", hex(slot, 2)).with_attr("function", hex(function, 1))
}

fn capability(kind: &str) -> Element {
    Element::new("capability").with_attr("type", kind)
}

fn text(to: &mut Element, name: &str, value: impl Into<String>) {
    to.push(Element::new(name).with_text(value));
}

/// The same unless there is nothing to say.
fn said(to: &mut Element, name: &str, value: &str) {
    if !value.is_empty() {
        text(to, name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MdevType, pci_name};
    use super::*;

    #[test]
    fn a_card_is_told_as_libvirt_tells_it() {
        let at = |text: &str| PciAddress::read(text).unwrap();
        let pci = PciAbout {
            address: at("0000:02:10.7"),
            class: 0x02_0000,
            group: Some(IommuGroup { number: 12, members: vec![at("0000:02:10.7")] }),
            node: Some(0),
            physical: Some(at("0000:02:00.1")),
            functions: (vec![at("0000:02:11.0")], 7),
            mdev_types: vec![MdevType { id: "t".into(), name: "T".into(), api: "vfio-pci".into(), available: 2 }],
            ..PciAbout::default()
        };
        let device = NodeDevice {
            name: pci_name(pci.address),
            parent: Some("computer".into()),
            sys_path: "/sys/devices/pci0000:00/0000:02:10.7".into(),
            nodes: Vec::new(),
            driver: Some("igbvf".into()),
            vendor: Maker { id: Some(0x8086), name: "Intel & sons".into() },
            product: Maker { id: Some(0x10ca), name: String::new() },
            about: About::Pci(Box::new(pci)),
        };
        let expected = "<device>
  <name>pci_0000_02_10_7</name>
  <path>/sys/devices/pci0000:00/0000:02:10.7</path>
  <parent>computer</parent>
  <driver>
    <name>igbvf</name>
  </driver>
  <capability type='pci'>
    <class>0x020000</class>
    <domain>0</domain>
    <bus>2</bus>
    <slot>16</slot>
    <function>7</function>
    <product id='0x10ca'/>
    <vendor id='0x8086'>Intel &amp; sons</vendor>
    <capability type='phys_function'>
      <address domain='0x0000' bus='0x02' slot='0x00' function='0x1'/>
    </capability>
    <capability type='virt_functions' maxCount='7'>
      <address domain='0x0000' bus='0x02' slot='0x11' function='0x0'/>
    </capability>
    <capability type='mdev_types'>
      <type id='t'>
        <name>T</name>
        <deviceAPI>vfio-pci</deviceAPI>
        <availableInstances>2</availableInstances>
      </type>
    </capability>
    <iommuGroup number='12'>
      <address domain='0x0000' bus='0x02' slot='0x10' function='0x7'/>
    </iommuGroup>
    <numa node='0'/>
  </capability>
</device>
";
        assert_eq!(device.document(), expected);
        assert_eq!(device.capabilities(), ["sriov", "phys_function", "mdev_types"]);
    }
}
