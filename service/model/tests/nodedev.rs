//! `docs/NODE-DEVICE-XML.md`: what virtd tells of a device of the host, element by element of libvirt's format. With `UPDATE=1` in the
//! environment the page is written anew, to be reviewed.

use std::collections::BTreeMap;
use std::path::Path;
use virt_model::device::PciAddress;
use virt_model::nodedev::{
    About, IommuGroup, Maker, MdevAbout, MdevType, NetAbout, NodeDevice, PciAbout, ScsiHostAbout, StorageAbout,
    SystemAbout,
};
use virt_model::xml::{Element, read};

const HEAD: &str = "# What is told in node device XML

`GetXML` of a device of the host writes libvirt's document of it. This page says which elements and attributes of libvirt's format
that has (up to 11.x), and why it lacks the others. What the host does not say of a device is left out of its document.

`CreateNodeDevice` reads the document of a device that it is to make, which is there until `Destroy` or until the host boots:

- a mediated device: `<parent>`, its name; `[mdev]/type`, one of the parent's `[mdev_types]`; and `[mdev]/uuid`, chosen where there
  is none. `[mdev]/attr` is refused;
- a virtual port: `[scsi_host]/[fc_host]` with `<wwnn>` and `<wwpn>`; `<parent>`, the name of a host with `[vport_ops]`, or its `wwnn`
  and `wwpn`, or a `fabric_wwn`; without it any that has room.

What else `GetXML` tells of such a device is read and dropped; all other elements are refused, with line and column. None is stored:
`DefineNodeDevice` is refused. Both kinds are tested with folders that stand for a host, and with no such hardware.

A step in `[]` is a `<capability>` of that type: `[pci]/numa` is `<numa>` in `<capability type='pci'>`.

The page is generated from the list in `service/model/tests/nodedev.rs` (`UPDATE=1 cargo test -p virt-model --test nodedev`), and that
test holds it to the documents that are written.

| element | told | not told |
|---|---|---|
";

const OTHER_MACHINES: &str = "devices of IBM Z";

/// libvirt's format: an element, the attributes that are told, and what is not told: why, after the attributes that this is about.
const FORMAT: &[(&str, &str, &str)] = &[
    ("name", "", ""),
    ("path", "", ""),
    ("devnode", "type", ""),
    ("parent", "", "`wwnn` `wwpn` `fabric_wwn`: they ask for a virtual port"),
    ("driver", "", ""),
    ("driver/name", "", ""),
    ("[system]", "", ""),
    ("[system]/product", "", ""),
    ("[system]/hardware", "", ""),
    ("[system]/hardware/vendor", "", ""),
    ("[system]/hardware/version", "", ""),
    ("[system]/hardware/serial", "-", "the host shows it to root alone, and the document is everybody's"),
    ("[system]/hardware/uuid", "-", "the host shows it to root alone, and the document is everybody's"),
    ("[system]/firmware", "", ""),
    ("[system]/firmware/vendor", "", ""),
    ("[system]/firmware/version", "", ""),
    ("[system]/firmware/release_date", "", ""),
    ("[pci]", "", ""),
    ("[pci]/class", "", ""),
    ("[pci]/domain", "", ""),
    ("[pci]/bus", "", ""),
    ("[pci]/slot", "", ""),
    ("[pci]/function", "", ""),
    ("[pci]/product", "id", ""),
    ("[pci]/vendor", "id", ""),
    ("[pci]/[phys_function]", "", ""),
    ("[pci]/[phys_function]/address", "domain bus slot function", ""),
    ("[pci]/[virt_functions]", "maxCount", ""),
    ("[pci]/[virt_functions]/address", "domain bus slot function", ""),
    ("[pci]/[pci-bridge]", "-", "`Assignable` is `bridge`"),
    ("[pci]/[cardbus-bridge]", "-", "`Assignable` is `bridge`"),
    ("[pci]/[mdev_types]", "", ""),
    ("[pci]/[mdev_types]/type", "id", ""),
    ("[pci]/[mdev_types]/type/name", "", ""),
    ("[pci]/[mdev_types]/type/deviceAPI", "", ""),
    ("[pci]/[mdev_types]/type/availableInstances", "", ""),
    ("[pci]/[vpd]", "-", "`Capabilities` has `vpd` where a card has such data, which is not read from it"),
    ("[pci]/iommuGroup", "number", ""),
    ("[pci]/iommuGroup/address", "domain bus slot function", ""),
    ("[pci]/numa", "node", ""),
    ("[pci]/pci-express", "-", "speeds of its link are not looked up"),
    ("[usb_device]", "", ""),
    ("[usb_device]/bus", "", ""),
    ("[usb_device]/device", "", ""),
    ("[usb_device]/product", "id", ""),
    ("[usb_device]/vendor", "id", ""),
    ("[usb]", "", ""),
    ("[usb]/number", "", ""),
    ("[usb]/class", "", ""),
    ("[usb]/subclass", "", ""),
    ("[usb]/protocol", "", ""),
    ("[usb]/description", "", ""),
    ("[net]", "", ""),
    ("[net]/interface", "", ""),
    ("[net]/address", "", ""),
    ("[net]/link", "speed state", ""),
    ("[net]/feature", "-", "what a card does for the kernel changes nothing for guests"),
    ("[net]/[80203]", "", ""),
    ("[net]/[80211]", "", ""),
    ("[scsi_host]", "", ""),
    ("[scsi_host]/host", "", ""),
    ("[scsi_host]/unique_id", "", ""),
    ("[scsi_host]/[fc_host]", "", ""),
    ("[scsi_host]/[fc_host]/wwnn", "", ""),
    ("[scsi_host]/[fc_host]/wwpn", "", ""),
    ("[scsi_host]/[fc_host]/fabric_wwn", "", ""),
    ("[scsi_host]/[vport_ops]", "", ""),
    ("[scsi_host]/[vport_ops]/max_vports", "", ""),
    ("[scsi_host]/[vport_ops]/vports", "", ""),
    ("[scsi_target]", "", ""),
    ("[scsi_target]/target", "", ""),
    ("[scsi_target]/[fc_remote_port]", "-", "ports of others are not looked up"),
    ("[scsi]", "", ""),
    ("[scsi]/host", "", ""),
    ("[scsi]/bus", "", ""),
    ("[scsi]/target", "", ""),
    ("[scsi]/lun", "", ""),
    ("[scsi]/type", "", ""),
    ("[scsi_generic]", "", ""),
    ("[scsi_generic]/char", "", ""),
    ("[storage]", "", ""),
    ("[storage]/block", "", ""),
    ("[storage]/bus", "", ""),
    ("[storage]/drive_type", "", ""),
    ("[storage]/model", "", ""),
    ("[storage]/vendor", "", ""),
    ("[storage]/serial", "", ""),
    ("[storage]/size", "", ""),
    ("[storage]/logical_block_size", "", ""),
    ("[storage]/num_blocks", "", ""),
    ("[storage]/[removable]", "", ""),
    ("[storage]/[removable]/media_available", "", ""),
    ("[storage]/[removable]/media_size", "", ""),
    ("[storage]/[removable]/media_label", "-", "nothing is read from media"),
    ("[storage]/[removable]/logical_block_size", "", ""),
    ("[storage]/[removable]/num_blocks", "", ""),
    ("[storage]/[hotpluggable]", "-", "the kernel does not say so of disks"),
    ("[drm]", "", ""),
    ("[drm]/type", "", ""),
    ("[mdev]", "", ""),
    ("[mdev]/type", "id", ""),
    ("[mdev]/iommuGroup", "number", ""),
    ("[mdev]/uuid", "", ""),
    ("[mdev]/parent_addr", "", ""),
    ("[mdev]/attr", "-", "they are for making one, and virtd sets none"),
    ("[vdpa]", "-", "there is no such class of devices here"),
    ("[ccw]", "-", OTHER_MACHINES),
    ("[css]", "-", OTHER_MACHINES),
    ("[ap_card]", "-", OTHER_MACHINES),
    ("[ap_queue]", "-", OTHER_MACHINES),
    ("[ap_matrix]", "-", OTHER_MACHINES),
];

fn page() -> String {
    let rows = FORMAT.iter().map(|(path, told, not)| {
        let told = match *told {
            "" => "yes".to_owned(),
            "-" => String::new(),
            names => names.split(' ').map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" "),
        };
        format!("| `{path}` | {told} | {not} |\n")
    });
    HEAD.to_owned() + &rows.collect::<String>()
}

/// Devices of every class, of which all is known that there is to know; those of which there are two kinds, twice.
fn devices() -> Vec<NodeDevice> {
    let at = |text: &str| PciAddress::read(text).unwrap();
    let mdev_types = vec![MdevType { id: "t".into(), name: "T".into(), api: "vfio-pci".into(), available: 2 }];
    let pci = PciAbout {
        group: Some(IommuGroup { number: 12, members: vec![at("0000:02:10.7")] }),
        node: Some(0),
        physical: Some(at("0000:02:00.1")),
        functions: (vec![at("0000:02:11.0")], 7),
        mdev_types,
        ..PciAbout::default()
    };
    let texts = || ["a".to_owned(), "b".to_owned(), "c".to_owned()];
    let net = NetAbout { interface: "eth0".into(), mac: "52:54:00:00:00:01".into(), ..NetAbout::default() };
    let net = NetAbout { state: "up".into(), speed: Some(1000), ethernet: true, ..net };
    let disk =
        StorageAbout { bus: "ata".into(), serial: "s".into(), size: 512, sector: 512, ..StorageAbout::default() };
    let mdev = MdevAbout { kind: "t".into(), uuid: "u".into(), parent: "p".into(), group: Some(3) };
    let fibre = ScsiHostAbout { host: 0, unique_id: Some(1), fibre: Some(texts()), ports: Some((2, 1)) };
    let all = [
        About::System(SystemAbout { hardware: texts(), firmware: texts() }),
        About::Pci(Box::new(pci)),
        About::UsbDevice { bus: 1, device: 2, hub: false },
        About::Usb { number: 0, class: [1, 2, 3], description: "d".into() },
        About::Net(NetAbout { wireless: true, ..net.clone() }),
        About::Net(net),
        About::ScsiHost(fibre),
        About::ScsiTarget("target0:0:0".into()),
        About::Scsi { place: [0, 0, 0, 1], kind: "disk" },
        About::ScsiGeneric,
        About::Storage(Box::new(StorageAbout { removable: Some(true), ..disk.clone() })),
        About::Storage(Box::new(disk)),
        About::Drm("render"),
        About::Mdev(mdev),
    ];
    let maker = || Maker { id: Some(0x8086), name: "M".into() };
    let device = |about| NodeDevice {
        name: "d".into(),
        parent: Some("computer".into()),
        sys_path: "/sys/d".into(),
        nodes: vec!["/dev/d".into(), "/dev/by/d".into()],
        driver: Some("drives".into()),
        vendor: maker(),
        product: maker(),
        about,
    };
    all.map(device).into()
}

/// The elements of a document, each with its attributes in their order.
fn told(element: &Element, path: &str, into: &mut BTreeMap<String, Vec<String>>) {
    for child in element.elements() {
        let kind = child.attr("type").filter(|_| child.name == "capability");
        let step = kind.map_or_else(|| child.name.clone(), |kind| format!("[{kind}]"));
        let at = if path.is_empty() { step } else { format!("{path}/{step}") };
        let names = child.attributes.iter().map(|attribute| attribute.name.clone());
        let names: Vec<_> = names.filter(|name| kind.is_none() || name != "type").collect();
        // Of one with several, not all of which every device has, it is all.
        let known = into.entry(at.clone()).or_default();
        known.extend(names.into_iter().filter(|name| !known.contains(name)).collect::<Vec<_>>());
        told(child, &at, into);
    }
}

#[test]
fn the_page_says_what_documents_have() {
    let mut found = BTreeMap::new();
    for device in devices() {
        told(&read(&device.document(), &[]).unwrap(), "", &mut found);
    }
    let said = FORMAT.iter().filter(|(_, told, _)| *told != "-").map(|(path, told, _)| {
        let names = told.split_whitespace().map(str::to_owned).collect();
        ((*path).to_owned(), names)
    });
    assert_eq!(found, said.collect());
    let silent = FORMAT.iter().filter(|(_, told, why)| *told == "-" && why.is_empty());
    assert_eq!(silent.count(), 0, "what is not told has a reason");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/NODE-DEVICE-XML.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, page()).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page(), "docs/NODE-DEVICE-XML.md is not what the list says: UPDATE=1 writes it anew");
}
