//! Devices of the host's that guests' cards in a network are given: which there are, and what stands in the way of giving them.

use crate::host::macvtap;
use crate::host::pci::{Pci, name_of_link};
use std::io;
use std::path::Path;
use virt_model::network::NetworkDef;
use virt_model::network::forward::{Forward, ForwardDevice, Mode};

/// Those of a network, in the definition's order, each once: of `known` ones, which a guest may have, what was found before counts.
/// Error: one is not there, or is none that can be given. Blocks.
pub fn find(def: &NetworkDef, sysfs: &Path, known: &[ForwardDevice]) -> io::Result<Vec<ForwardDevice>> {
    let mut found: Vec<ForwardDevice> = Vec::new();
    let Some(forward) = def.forward.as_ref().filter(|_| def.mode().has_no_bridge()) else { return Ok(found) };
    let mut add = |device: ForwardDevice| {
        if !found.iter().any(|other| other.is(&device)) {
            found.push(device);
        }
    };
    let is_hostdev = def.mode() == Mode::Hostdev;
    for name in def.forward_devices() {
        let before = known.iter().find(|device| device.link.as_deref() == Some(name));
        match before {
            Some(before) => add(before.clone()),
            None if is_hostdev => add(card(name, sysfs)?),
            None => add(link(name, sysfs)?),
        }
    }
    forward.addresses.iter().filter_map(|address| address.pci()).for_each(|pci| add(ForwardDevice::pci(pci)));
    for function in functions(forward, sysfs)? {
        if is_hostdev {
            add(ForwardDevice::pci(function));
            continue;
        }
        let link = links_of(&function, sysfs).into_iter().next();
        let none = || format!("the virtual function {function} has no network device: its driver is not loaded");
        add(ForwardDevice::link(&link.ok_or_else(|| io::Error::other(none()))?));
    }
    Ok(found)
}

/// What keeps the network from giving these to guests now. Blocks.
pub fn obstacle(def: &NetworkDef, sysfs: &Path, devices: &[ForwardDevice]) -> Option<String> {
    if def.mode() == Mode::Macvtap {
        let bridged = devices.iter().filter_map(|device| device.link.as_deref()).find_map(|link| {
            let bridge = name_of_link(&sysfs.join("class/net").join(link).join("brport/bridge"))?;
            Some(format!(
                "the device '{link}' is in the bridge '{bridge}': name that (<forward mode='bridge'/><bridge name='{bridge}'/>)"
            ))
        });
        return bridged.or_else(|| macvtap::missing().map(|why| why.to_string()));
    }
    let pci = Pci::below(sysfs);
    let all: Vec<String> = devices.iter().filter_map(|device| device.pci.clone()).collect();
    let managed = def.forward.as_ref().and_then(|forward| forward.managed) == Some(true);
    let in_the_way = |address: &String| {
        let none = || {
            pci.function_of(address).is_none().then(|| {
                format!(
                    "PCI device {address} is no virtual function of a network card, whose address the host could set"
                )
            })
        };
        pci.objection(address, managed, &all).or_else(none)
    };
    all.iter().find_map(in_the_way)
}

/// The network device of that name.
fn link(name: &str, sysfs: &Path) -> io::Result<ForwardDevice> {
    let there = sysfs.join("class/net").join(name).exists();
    let missing = || io::Error::other(format!("the host has no device '{name}', by which packets are to leave"));
    there.then(|| ForwardDevice::link(name)).ok_or_else(missing)
}

/// The PCI device that has the network device of that name.
fn card(name: &str, sysfs: &Path) -> io::Result<ForwardDevice> {
    let device = link(name, sysfs)?;
    let pci = name_of_link(&sysfs.join("class/net").join(name).join("device"));
    let known = pci.filter(|address| sysfs.join("bus/pci/devices").join(address).exists());
    let missing = || io::Error::other(format!("the device '{name}' is no PCI device, which could be handed over"));
    Ok(ForwardDevice { pci: Some(known.ok_or_else(missing)?), ..device })
}

/// The virtual functions of all cards that are named, in the order of their numbers.
fn functions(forward: &Forward, sysfs: &Path) -> io::Result<Vec<String>> {
    let mut all = Vec::new();
    for card in &forward.functions {
        link(&card.dev, sysfs)?;
        let device = sysfs.join("class/net").join(&card.dev).join("device");
        let own = (0..).map_while(|number| name_of_link(&device.join(format!("virtfn{number}"))));
        let before = all.len();
        all.extend(own);
        if all.len() == before {
            return Err(io::Error::other(format!(
                "the card '{0}' has no virtual functions: make some (echo 4 > /sys/class/net/{0}/device/sriov_numvfs)",
                card.dev
            )));
        }
    }
    Ok(all)
}

/// The network devices of a PCI device, sorted.
fn links_of(address: &str, sysfs: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(sysfs.join("bus/pci/devices").join(address).join("net"));
    let mut names: Vec<String> =
        entries.into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pci::tests::host;
    use crate::network::tests::{House, complete, is_inside, refused, run};
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;
    use virt_model::driver::network::NetworkDriver as _;
    use virt_model::network::update::{Change, Command, Section};

    /// Functions 1 and 2 of the card 'ens1f0', of which the second has a network device.
    fn card_with_functions() -> tempfile::TempDir {
        let card = "0000:05:00.0";
        let functions = ["0000:05:00.1", "0000:05:00.2"];
        let (dir, _) =
            host(&[(card, "5", Some("e1000e")), (functions[0], "6", None), (functions[1], "7", Some("e1000e"))]);
        let at = |address: &str| -> PathBuf { dir.path().join("bus/pci/devices").join(address) };
        for (number, function) in functions.iter().enumerate() {
            symlink(at(function), at(card).join(format!("virtfn{number}"))).unwrap();
            symlink(at(card), at(function).join("physfn")).unwrap();
        }
        for (link, address) in [("ens1f0", card), ("ens1f0v1", functions[1])] {
            std::fs::create_dir_all(at(address).join("net").join(link)).unwrap();
            let shown = dir.path().join("class/net").join(link);
            std::fs::create_dir_all(&shown).unwrap();
            symlink(at(address), shown.join("device")).unwrap();
        }
        dir
    }

    fn network(forward: &str) -> NetworkDef {
        NetworkDef::parse(&format!("<network><name>n</name>{forward}</network>")).unwrap()
    }

    #[test]
    fn cards_functions_and_addresses_are_found_each_once() {
        let dir = card_with_functions();
        let def = network(
            "<forward mode='hostdev'><pf dev='ens1f0'/><interface dev='ens1f0v1'/><address bus='5' function='1'/></forward>",
        );
        let found = find(&def, dir.path(), &[]).unwrap();
        let told: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["'ens1f0v1' (0000:05:00.2)", "0000:05:00.1"]);
        // A guest has it: the host shows no network device of it any more.
        std::fs::remove_file(dir.path().join("class/net/ens1f0v1/device")).unwrap();
        assert_eq!(find(&def, dir.path(), &found).unwrap(), found);
        let why = find(&def, dir.path(), &[]).unwrap_err().to_string();
        assert_eq!(why, "the device 'ens1f0v1' is no PCI device, which could be handed over");
    }

    #[test]
    fn what_cannot_be_given_is_named() {
        let dir = card_with_functions();
        let is = |forward: &str, why: &str| {
            let def = network(forward);
            let said = match find(&def, dir.path(), &[]) {
                Ok(found) => obstacle(&def, dir.path(), &found),
                Err(error) => Some(error.to_string()),
            };
            assert!(said.as_ref().is_some_and(|said| said.contains(why)), "{said:?}");
        };
        is("<forward mode='passthrough'><pf dev='ens1f0'/></forward>", "0000:05:00.1 has no network device");
        is(
            "<forward mode='passthrough'><pf dev='ens1f0v1'/></forward>",
            "has no virtual functions: make some (echo 4 >",
        );
        is("<forward mode='hostdev'><pf dev='ens9'/></forward>", "no device 'ens9'");
        is("<forward mode='hostdev'><pf dev='ens1f0'/></forward>", "0000:05:00.1 has no driver: use managed='yes'");
        is("<forward mode='hostdev' managed='yes'><interface dev='ens1f0'/></forward>", "0000:05:00.0 is no virtual");
        is("<forward mode='hostdev' managed='yes'><address bus='9'/></forward>", "no PCI device 0000:09:00.0");
        let def = network("<forward mode='hostdev' managed='yes'><pf dev='ens1f0'/></forward>");
        let found = find(&def, dir.path(), &[]).unwrap();
        assert_eq!(obstacle(&def, dir.path(), &found), None);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn devices_that_guests_are_given_are_recorded_and_found_again() {
        if !is_inside("network::devices::tests::devices_that_guests_are_given_are_recorded_and_found_again") {
            return;
        }
        let house = House::new();
        let networks = house.networks();
        let direct = |devices: &str| {
            format!("<network><name>direct</name><forward mode='private'>{devices}</forward></network>")
        };
        let def = complete(&direct("<interface dev='up0'/>"), &networks).await;
        let why = refused(&house, def.clone()).await;
        assert!(why.contains("the host has no device 'up0'"), "{why}");
        run("ip link add up0 type veth peer name up1");
        run("ip link add br7 type bridge");
        run("ip link set up0 master br7");
        let why = refused(&house, def.clone()).await;
        assert!(why.contains("'up0' is in the bridge 'br7': name that"), "{why}");
        run("ip link set up0 nomaster");
        assert!(macvtap::missing_kind("nosuchkind").is_some());
        assert!(macvtap::missing_kind("bridge").is_none(), "the kernel has these");
        assert!(!run("ip -o link").contains("01:00:00:00:00:01"), "none was made");
        if let Some(missing) = macvtap::missing() {
            let why = refused(&house, def).await;
            return assert!(why.contains(&missing.to_string()), "{why}");
        }
        networks.start(&def, 7).await.unwrap();
        assert_eq!(networks.forward_devices(def.uuid).await, [ForwardDevice::link("up0")]);
        let change = Change::read(Command::AddLast, Section::ForwardInterface, None, "<interface dev='up1'/>").unwrap();
        let more = def.changed(&change).unwrap();
        networks.change(&more).await.unwrap();
        let both = ["up0", "up1"].map(ForwardDevice::link);
        assert_eq!(networks.forward_devices(def.uuid).await, both);
        let wrong = Change::read(Command::AddLast, Section::ForwardInterface, None, "<interface dev='up9'/>").unwrap();
        let why = networks.change(&more.changed(&wrong).unwrap()).await.unwrap_err().to_string();
        assert!(why.contains("no device 'up9'"), "{why}");
        let next = house.networks();
        assert_eq!(next.find().await.len(), 1, "virtd was killed");
        assert_eq!(next.forward_devices(def.uuid).await, both);
        next.stop(def.uuid).await.unwrap();
        assert_eq!(next.forward_devices(def.uuid).await, []);
    }
}
