//! One device of a machine as an element: put in, found again, taken out.

use super::{DomainDef, Form};
use crate::device::{Device, Disk};
use crate::xml::{Element, Finding, Node, shorten};

/// Where a device stands: the how-manieth of those whose elements have that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpot {
    /// E.g. `disk`.
    pub element: String,
    /// From 0.
    pub nth: usize,
}

impl DomainDef {
    /// The definition with one device more, the last of its kind; memory among the devices is counted in `<memory>`. Everything
    /// wrong is reported, what contradicts the rest of the machine among it.
    pub fn with_device(&self, device: Element) -> Result<DomainDef, Vec<Finding>> {
        let mut tree = self.tree();
        let devices = tree.elements_mut().find(|element| element.name == "devices");
        match devices {
            Some(devices) => devices.push(device),
            None => {
                let mut devices = Element::new("devices");
                devices.push(device);
                tree.push(devices);
            }
        }
        let mut def = DomainDef::from_tree(tree)?;
        def.fill_defaults();
        def.counts_memory_devices_of(self);
        Ok(def)
    }

    /// The definition without devices that `goes` is true of, and the memory among them.
    /// Errors: the rest is none that can be read.
    pub fn without_devices(&self, goes: impl Fn(&DeviceSpot, &Element) -> bool) -> Result<DomainDef, Vec<Finding>> {
        let mut tree = self.tree();
        for devices in tree.elements_mut().filter(|element| element.name == "devices") {
            let spots = spots(devices);
            let mut spots = spots.into_iter();
            devices.nodes.retain(|node| match node {
                Node::Element(element) => !spots.next().is_some_and(|spot| goes(&spot, element)),
                _ => true,
            });
        }
        let mut def = DomainDef::from_kept_tree(tree)?;
        def.counts_memory_devices_of(self);
        Ok(def)
    }

    /// What boots stays as it was `before`, whatever memory has come or gone with devices.
    fn counts_memory_devices_of(&mut self, before: &DomainDef) {
        let (had, has) = (before.memory_devices_kib(), self.memory_devices_kib());
        let counted = |kib: u64| kib.saturating_sub(had).saturating_add(has);
        let counted_in = [self.memory.as_mut().map(|memory| &mut memory.size), self.current_memory.as_mut()];
        counted_in.into_iter().flatten().for_each(|size| size.0 = counted(size.0));
    }

    /// The device that stands there, as an element in that form.
    pub fn device_at(&self, spot: &DeviceSpot, form: Form) -> Option<Element> {
        let tree = self.tree_in(form);
        let devices = tree.child("devices")?;
        devices.elements().filter(|element| element.name == spot.element).nth(spot.nth).cloned()
    }

    /// The device of that name.
    pub fn device_named(&self, alias: &str) -> Option<Device<'_>> {
        self.devices.all().into_iter().find(|device| device.info().0.alias() == Some(alias))
    }

    /// The same, if it is a disk.
    pub fn disk_named(&self, alias: &str) -> Option<&Disk> {
        match self.device_named(alias)? {
            Device::Disk(disk) => Some(disk),
            _ => None,
        }
    }

    /// Where the device of that name stands.
    pub fn spot_of(&self, alias: &str) -> Option<DeviceSpot> {
        let tree = self.tree();
        let devices = tree.child("devices")?;
        let found = devices.elements().zip(spots(devices)).find(|(element, _)| alias_of(element) == Some(alias));
        found.map(|(_, spot)| spot)
    }

    /// Where the device stands that `wanted` means: by its alias, a disk by its target, a card by its hardware address if it
    /// has one, else the one that has all that `wanted` says. Error: how many there are.
    pub fn device_like(&self, wanted: &Element) -> Result<DeviceSpot, usize> {
        let tree = self.tree();
        let Some(devices) = tree.child("devices") else { return Err(0) };
        let is_it = is_like(wanted);
        let found =
            devices.elements().zip(spots(devices)).filter(|(there, _)| there.name == wanted.name && is_it(there));
        let mut found: Vec<DeviceSpot> = found.map(|(_, spot)| spot).collect();
        match found.len() {
            1 => Ok(found.remove(0)),
            several => Err(several),
        }
    }
}

/// The device's name within the hypervisor, if the element says it.
pub fn alias_of(device: &Element) -> Option<&str> {
    device.child("alias")?.attr("name")
}

fn is_like(wanted: &Element) -> impl Fn(&Element) -> bool {
    let key = |element: &Element, child: &str, attribute: &str| {
        element.child(child).and_then(|child| child.attr(attribute)).map(str::to_ascii_lowercase)
    };
    let main = match &*wanted.name {
        "disk" => Some(("target", "dev")),
        "interface" => Some(("mac", "address")),
        _ => None,
    };
    let main = main.and_then(|(child, attribute)| Some((child, attribute, key(wanted, child, attribute)?)));
    move |there| match (alias_of(wanted), &main) {
        (Some(alias), _) if alias_of(there).is_some() => alias_of(there) == Some(alias),
        (_, Some((child, attribute, value))) => key(there, child, attribute).as_ref() == Some(value),
        _ => {
            let mut wanted = wanted.clone();
            wanted.take_child("alias");
            first_not_in(&wanted, there).is_none()
        }
    }
}

fn spots(devices: &Element) -> Vec<DeviceSpot> {
    let mut spots: Vec<DeviceSpot> = Vec::new();
    for element in devices.elements() {
        let nth = spots.iter().filter(|spot| spot.element == element.name).count();
        spots.push(DeviceSpot { element: element.name.clone(), nth });
    }
    spots
}

/// What the first says and the second does not: the first such element or attribute.
pub fn first_not_in(asked: &Element, there: &Element) -> Option<String> {
    let attribute = asked.attributes.iter().find(|asked| there.attr(&asked.name) != Some(&*asked.value));
    if let Some(attribute) = attribute {
        return Some(format!("{}='{}' of <{}>", attribute.name, shorten(&attribute.value), asked.name));
    }
    if asked.elements().next().is_none() && asked.text() != there.text() {
        return Some(format!("'{}' in <{}>", shorten(&asked.text()), asked.name));
    }
    asked.elements().find_map(|child| {
        let same = there.elements().filter(|there| there.name == child.name);
        let found: Vec<_> = same.map(|there| first_not_in(child, there)).collect();
        match &found[..] {
            [] => Some(format!("<{}>", child.name)),
            differences if differences.iter().any(Option::is_none) => None,
            [first, ..] => first.clone(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml;

    fn machine() -> DomainDef {
        let devices = "<disk type='file'><source file='/a'/><target dev='vda'/><alias name='virtio-disk0'/></disk>\
             <interface type='user'><mac address='52:54:00:00:00:01'/><alias name='net0'/></interface>\
             <interface type='user'><mac address='52:54:00:00:00:02'/><alias name='net1'/></interface>\
             <rng model='virtio'><backend model='random'>/dev/urandom</backend><alias name='rng0'/></rng>";
        let text = format!("<domain type='test'><name>d</name><memory>1</memory><devices>{devices}</devices></domain>");
        DomainDef::parse(&text).expect("a machine")
    }

    fn like(device: &str) -> Result<DeviceSpot, usize> {
        machine().device_like(&xml::read(device, &[]).expect("a device"))
    }

    fn spot(element: &str, nth: usize) -> DeviceSpot {
        DeviceSpot { element: element.to_owned(), nth }
    }

    #[test]
    fn a_device_is_found_by_what_it_is_known_by() {
        assert_eq!(like("<disk><source file='/other'/><target dev='vda'/></disk>"), Ok(spot("disk", 0)));
        assert_eq!(
            like("<interface type='bridge'><mac address='52:54:00:00:00:02'/></interface>"),
            Ok(spot("interface", 1))
        );
        assert_eq!(like("<interface><alias name='net0'/></interface>"), Ok(spot("interface", 0)));
        assert_eq!(like("<interface type='user'/>"), Err(2));
        assert_eq!(like("<rng model='virtio'/>"), Ok(spot("rng", 0)));
        assert_eq!(like("<rng model='virtio-transitional'/>"), Err(0));
        assert_eq!(like("<disk><target dev='vdb'/></disk>"), Err(0));
    }

    #[test]
    fn what_is_put_in_can_be_taken_out_again() {
        let def = machine();
        let rng =
            xml::read("<rng model='virtio'><backend model='random'/><alias name='rng1'/></rng>", &[]).expect("one");
        let mut before = def.clone();
        before.fill_defaults();
        let with = def.with_device(rng).expect("no contradiction");
        assert_eq!(with.spot_of("rng1"), Some(spot("rng", 1)));
        let without = with.without_devices(|spot, _| *spot == self::spot("rng", 1)).expect("the rest");
        assert_eq!(without.write(Form::LIVE), before.write(Form::LIVE));
        let dimm =
            xml::read("<memory model='dimm'><target><size unit='KiB'>4096</size></target></memory>", &[]).expect("one");
        let more = def.with_device(dimm).expect("no contradiction");
        assert_eq!((more.memory_kib(), more.initial_memory_kib()), (before.memory_kib() + 4096, before.memory_kib()));
        let less = more.without_devices(|spot, _| spot.element == "memory").expect("the rest");
        assert_eq!(less.write(Form::LIVE), before.write(Form::LIVE));
        let twice = xml::read("<disk type='file'><source file='/b'/><target dev='vda'/></disk>", &[]).expect("one");
        assert!(def.with_device(twice).is_err(), "two disks of one name");
    }
}
