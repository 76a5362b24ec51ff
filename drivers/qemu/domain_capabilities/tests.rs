use super::*;
use crate::qemu::capabilities::Site;
use virt_model::xml::Element;

/// A recorded QEMU 7.2, on a host where KVM works.
fn caps() -> Capabilities {
    let recorded = include_str!("../../../tests/data/qemu/qemu-7.2.json");
    let mut caps: Capabilities = serde_json::from_str(recorded).unwrap();
    caps.kvm = Ok(());
    caps.firmware =
        super::super::firmware::read_all(&[&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/qemu/firmware")]);
    caps.site = Site {
        swtpm: Some("/usr/bin/swtpm".into()),
        swtpm_setup: Some("/usr/bin/swtpm_setup".into()),
        ..Site::default()
    };
    caps
}

fn document(caps: &Capabilities, kind: &str) -> Element {
    let text = Offer::new(caps, kind, "x86_64", Some("q35")).unwrap().document();
    virt_model::xml::read(&text, &[]).unwrap()
}

/// The words of an enumeration.
fn words(document: &Element, path: &[&str], name: &str) -> Vec<String> {
    let section =
        path.iter().fold(document, |element, step| element.child(step).unwrap_or_else(|| panic!("no {step}")));
    let choice = section.elements().find(|child| child.name == "enum" && child.attr("name") == Some(name));
    choice.into_iter().flat_map(Element::elements).map(Element::text).collect()
}

/// What libvirt says that is in it (formatdomaincaps), in this order: an element, its attributes, what is in it. Of an
/// enumeration the name is said too.
const SHAPE: &[(&str, &str, &str)] = &[
    ("domainCapabilities", "", "path domain machine arch vcpu iothreads os cpu memoryBacking devices features"),
    ("vcpu", "max", ""),
    ("iothreads", "supported", ""),
    ("os", "supported", "enum:firmware loader"),
    ("loader", "supported", "value enum:type enum:readonly enum:secure"),
    ("cpu", "", "mode"),
    ("mode", "name supported", "enum:hostPassthroughMigratable enum:maximumMigratable model blockers"),
    ("model", "usable deprecated vendor", ""),
    ("blockers", "model", "feature"),
    ("feature", "name", ""),
    ("memoryBacking", "supported", "enum:sourceType"),
    ("devices", "", "disk graphics video hostdev rng filesystem tpm redirdev channel crypto interface panic console"),
    ("disk", "supported", "enum:diskDevice enum:bus enum:model"),
    ("graphics", "supported", "enum:type"),
    ("video", "supported", "enum:modelType"),
    ("hostdev", "supported", "enum:mode enum:startupPolicy enum:subsysType enum:capsType enum:pciBackend"),
    ("rng", "supported", "enum:model enum:backendModel"),
    ("filesystem", "supported", "enum:driverType"),
    ("tpm", "supported", "enum:model enum:backendModel enum:backendVersion"),
    ("redirdev", "supported", "enum:bus"),
    ("channel", "supported", "enum:type"),
    ("crypto", "supported", "enum:model enum:type enum:backendModel"),
    ("interface", "supported", "enum:backendType"),
    ("panic", "supported", "enum:model"),
    ("console", "supported", "enum:type"),
    ("features", "", "gic vmcoreinfo genid backingStoreInput s390-pv sev sgx hyperv"),
    ("hyperv", "supported", "enum:features"),
    ("enum", "name", "value"),
];

fn holds(element: &Element) {
    let name = &*element.name;
    let shape = SHAPE.iter().find(|(known, ..)| *known == name);
    let (attributes, children) = shape.map_or(("supported", ""), |(_, attributes, children)| (*attributes, *children));
    let is_leaf = shape.is_none() && element.elements().next().is_none();
    assert!(shape.is_some() || is_leaf, "libvirt has no <{name}> with something in it");
    for attribute in &element.attributes {
        assert!(attributes.split(' ').any(|known| known == attribute.name), "<{name} {}>", attribute.name);
    }
    let known: Vec<&str> = children.split(' ').collect();
    let mut reached = 0;
    for child in element.elements() {
        let called = match child.attr("name").filter(|_| child.name == "enum") {
            Some(choice) => format!("enum:{choice}"),
            None => child.name.clone(),
        };
        let place = known.iter().position(|one| *one == called).unwrap_or_else(|| panic!("<{name}> has no <{called}>"));
        // Models and what blocks them take turns.
        assert!(place >= reached || name == "mode", "<{called}> stands too late in <{name}>");
        reached = place;
        holds(child);
    }
}

#[test]
fn x8_the_document_has_the_shape_of_libvirts() {
    for kind in ["kvm", "qemu"] {
        let document = document(&caps(), kind);
        holds(&document);
        let all: Vec<&str> = SHAPE[0].2.split(' ').collect();
        assert_eq!(document.elements().map(|child| &*child.name).collect::<Vec<_>>(), all);
        assert_eq!(document.child("domain").map(Element::text).as_deref(), Some(kind));
        assert_eq!(document.child("machine").map(Element::text).as_deref(), Some("pc-q35-7.2"));
        let devices = document.child("devices").unwrap();
        let devices: Vec<&str> = devices.elements().map(|child| &*child.name).collect();
        let known = SHAPE.iter().find(|(name, ..)| *name == "devices").unwrap().2;
        assert_eq!(devices.join(" "), known);
    }
}

#[test]
fn x8_what_is_in_it_is_what_this_emulator_has() {
    let mut caps = caps();
    let before = document(&caps, "kvm");
    let buses = words(&before, &["devices", "disk"], "bus");
    assert_eq!(buses, ["fdc", "scsi", "virtio", "usb", "sata"], "those of a q35 board");
    assert_eq!(
        words(&before, &["devices", "disk"], "diskDevice"),
        ["disk", "cdrom", "floppy"],
        "what is refused is not in it"
    );
    assert!(words(&before, &["devices", "graphics"], "type").contains(&"vnc".to_owned()));
    assert!(words(&before, &["devices", "tpm"], "backendModel").contains(&"emulator".to_owned()));
    let channels = words(&before, &["devices", "channel"], "type");
    for kind in ["pty", "unix", "tcp", "spicevmc", "qemu-vdagent"] {
        assert!(channels.contains(&kind.to_owned()), "{kind}: {channels:?}");
    }
    assert_eq!(words(&before, &["os"], "firmware"), ["efi", "bios"]);
    assert_eq!(words(&before, &["os", "loader"], "secure"), ["yes", "no"]);
    let values = before.child("os").and_then(|os| os.child("loader")).unwrap();
    assert!(values.elements().any(|child| child.name == "value"), "the firmware of this host");

    for device in ["usb-storage", "virtio-rng-pci", "virtio-vga", "qxl-vga", "qxl"] {
        assert!(caps.devices.remove(device), "{device}");
    }
    (caps.site.swtpm, caps.firmware) = (None, Vec::new());
    let after = document(&caps, "kvm");
    assert!(!words(&after, &["devices", "disk"], "bus").contains(&"usb".to_owned()));
    assert!(!words(&after, &["devices", "rng"], "model").contains(&"virtio".to_owned()));
    assert!(!words(&after, &["devices", "video"], "modelType").contains(&"qxl".to_owned()));
    assert!(!words(&after, &["devices", "tpm"], "backendModel").contains(&"emulator".to_owned()));
    assert_eq!(words(&after, &["os"], "firmware"), ["bios"]);
}

fn model<'a>(document: &'a Element, name: &str) -> &'a Element {
    let modes = document.child("cpu").unwrap().elements();
    let custom = modes.into_iter().find(|mode| mode.attr("name") == Some("custom")).unwrap();
    custom.elements().find(|child| child.name == "model" && child.text() == name).unwrap()
}

#[test]
fn x8_models_say_what_blocks_them_and_the_check_says_so_too() {
    let mut caps = caps();
    caps.kvm_blockers = [("Nehalem".to_owned(), ["sse4.2".to_owned()].into())].into();
    let with_kvm = document(&caps, "kvm");
    assert_eq!(model(&with_kvm, "Nehalem").attr("usable"), Some("no"));
    assert_eq!(model(&with_kvm, "qemu64").attr("usable"), Some("yes"));
    assert_eq!(model(&document(&caps, "qemu"), "Nehalem").attr("usable"), Some("yes"));
    let modes = with_kvm.child("cpu").unwrap().elements().flat_map(Element::elements);
    let blockers = modes.into_iter().find(|child| child.name == "blockers").unwrap();
    assert_eq!(blockers.attr("model"), Some("Nehalem"));
    assert_eq!(blockers.child("feature").and_then(|feature| feature.attr("name")), Some("sse4.2"));

    let offer = Offer::new(&caps, "kvm", "x86_64", None).unwrap();
    let said = |more: &str, features: &str| {
        let text = format!("<cpu mode='custom'{more}><model>Nehalem</model>{features}</cpu>");
        let (_, findings) = offer.tried(&choices::cpu(&text)).unwrap();
        let about = findings.into_iter().filter(|finding| finding.message.contains("sse4.2"));
        about.map(|finding| finding.kind).collect::<Vec<_>>()
    };
    use virt_model::xml::FindingKind::{Unsupported, Warning};
    assert_eq!(said("", ""), [Warning]);
    assert_eq!(said(" check='full'", ""), [Unsupported]);
    assert_eq!(said(" check='full'", "<feature policy='disable' name='sse4.2'/>"), []);
}

#[test]
fn x8_of_hyperv_is_told_what_kvm_can() {
    let mut caps = caps();
    caps.kvm_hyperv = Some(["hv-relaxed", "hv-vapic"].map(String::from).into());
    let told = words(&document(&caps, "kvm"), &["features", "hyperv"], "features");
    assert_eq!(told, ["relaxed", "vapic", "spinlocks", "vendor_id"]);
    caps.kvm_hyperv = Some(BTreeSet::new());
    let supported = |kind: &str| {
        let document = document(&caps, kind);
        let hyperv = document.child("features").and_then(|features| features.child("hyperv")).unwrap();
        hyperv.attr("supported").map(str::to_owned)
    };
    assert_eq!((supported("kvm").as_deref(), supported("qemu").as_deref()), (Some("no"), Some("no")));
}

#[test]
fn x8_what_cannot_run_has_no_document_but_a_reason() {
    let mut caps = caps();
    caps.kvm = Err("there is no /dev/kvm".to_owned());
    let why = |kind: &str, machine: &str| match Offer::new(&caps, kind, "x86_64", Some(machine)) {
        Err(DriverError::NotPossible(why)) => why,
        other => panic!("{kind} {machine}: {:?}", other.map(|offer| offer.machine)),
    };
    assert!(why("kvm", "q35").contains("there is no /dev/kvm"));
    assert!(why("qemu", "microvm").contains("machine 'microvm' is not supported yet"));
    assert!(why("qemu", "a'><b").contains("has no machine"));
    assert_eq!(Offer::new(&caps, "qemu", "x86_64", Some("pc")).unwrap().machine(), "pc-i440fx-7.2");
}
