//! Domain documents as the tools write them: read, completed, written, and compared as text with what is expected.
//!
//! `tests/data/domain/<case>.xml` is what is read, `<case>.out.xml` what is written: stored (`defaults` filled in), with
//! secrets. With `UPDATE=1` in the environment the expectations are written anew, to be reviewed.

use std::path::PathBuf;
use virt_model::domain::{DomainDef, Form};

const FULL: Form = Form::LIVE;
const STORED: Form = Form::STORED;

fn data() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/domain")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(data().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn parse(text: &str) -> DomainDef {
    DomainDef::parse(text).unwrap_or_else(|findings| {
        panic!("{}", findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    })
}

fn cases() -> Vec<String> {
    let files = std::fs::read_dir(data()).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut cases: Vec<_> =
        names.filter(|n| !n.contains(".out.")).filter_map(|n| Some(n.strip_suffix(".xml")?.to_owned())).collect();
    cases.sort();
    cases
}

#[test]
fn tools_documents_come_back_canonical() {
    for case in cases() {
        let mut def = parse(&read(&format!("{case}.xml")));
        def.fill_defaults();
        let written = def.write(STORED);
        let expected = data().join(format!("{case}.out.xml"));
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&expected, &written).unwrap();
        }
        assert_eq!(written, read(&format!("{case}.out.xml")), "{case}");
    }
}

#[test]
fn what_is_written_reads_back_equal() {
    for case in cases() {
        let mut def = parse(&read(&format!("{case}.xml")));
        assert!(parse(&def.write(FULL)) == def, "{case} as read");
        def.fill_defaults();
        let filled = parse(&def.write(FULL));
        assert!(filled == def, "{case} completed");
        assert_eq!(filled.write(FULL), def.write(FULL), "{case}");
        let mut again = filled.clone();
        again.fill_defaults();
        assert!(again == def, "{case}: completing is idempotent");
        assert!(def.same_configuration(&parse(&def.write(STORED))), "{case}: stored form is the same configuration");
    }
}

/// A document with something in place of `<!-- here -->`, in `<devices>` or outside.
fn with(outside: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'>\n<name>a</name><memory>1</memory>\n{outside}\n<devices>\n{devices}\n</devices>\n</domain>"
    )
}

fn findings(text: &str) -> Vec<String> {
    DomainDef::parse(text).err().unwrap_or_default().iter().map(ToString::to_string).collect()
}

#[test]
fn all_that_is_wrong_is_said_at_once_with_its_place() {
    let text = with(
        "<vcpus>2</vcpus><vcpu foo='1'>x</vcpu><colour>red</colour><memmory/>",
        "<disk type='file' device='tape'><target dev='vda' bus='virtio'/></disk>\n<disk><source file='/x'/></disk>",
    );
    assert_eq!(
        findings(&text),
        [
            "line 3, column 1: /vcpus: <vcpus> has no text",
            "line 3, column 17: /vcpu: 'x' is not a whole number from 0 to 4294967295",
            "line 3, column 23: /vcpu/@foo: unknown attribute 'foo'; <vcpu> has placement, cpuset, current",
            "line 3, column 39: /colour: unknown element <colour>; <domain> has no such thing",
            "line 3, column 59: /memmory: unknown element <memmory>; was 'memory' meant?",
            "line 5, column 1: /devices/disk[1]: a disk needs <source file='…'/>",
            "line 5, column 19: /devices/disk[1]/@device: 'tape' is not one of disk, cdrom, floppy, lun",
            "line 6, column 1: /devices/disk[2]: <disk> needs a <target>",
        ]
        .map(str::to_owned)
        .as_slice()
    );
}

/// What stands beside the devices, the devices, and what is said of it.
const CANNOT_BE: &[(&str, &str, &str)] = &[
    ("<vcpu>0</vcpu>", "", "0 vCPUs"),
    ("<vcpu current='3'>2</vcpu>", "", "3 vCPUs at first"),
    ("<vcpu>4</vcpu><cpu><topology sockets='1' cores='1' threads='1'/></cpu>", "", "makes 1 vCPUs"),
    ("<cpu><feature name='vmx'/><feature name='vmx'/></cpu>", "", "'vmx' is there twice"),
    ("<name>b</name>", "", "a second <name>"),
    ("<on_reboot>coredump-restart</on_reboot>", "", "only for <on_crash>"),
    ("<on_crash>explode</on_crash>", "", "not one of destroy, restart"),
    ("<os firmware='efi'><type>hvm</type></os>", "", "needs <acpi/>"),
    ("<os><loader secure='yes'>/x</loader></os>", "", "needs <smm"),
    ("<os><type machine='pc'>hvm</type><loader secure='yes'>/x</loader></os>", "", "q35"),
    ("<os><type/></os>", "", "<type> needs a text"),
    ("<features><hyperv><spinlocks state='on' retries='9'/></hyperv></features>", "", "at least 4095"),
    ("<features><acpi>yes</acpi></features>", "", "has no text"),
    ("<features><vmport state='yes'/></features>", "", "neither 'on' nor 'off'"),
    ("<x:y xmlns:x='urn:x'/>", "", "only <metadata>"),
    ("<title>a\nb</title>", "", "one line"),
    ("<currentMemory unit='parsec'>1</currentMemory>", "", "not a unit"),
    ("<clock offset='lunar'/>", "", "not one of utc"),
    (
        "",
        "<disk><source file='/x'/><target dev='vda'/></disk><disk><source file='/y'/><target dev='vda'/></disk>",
        "twice",
    ),
    ("", "<disk device='cdrom'><target dev='vda' bus='virtio'/></disk>", "cannot be on the bus"),
    ("", "<disk device='floppy'><target dev='fda' bus='ide'/></disk>", "bus 'fdc'"),
    ("", "<disk device='floppy'><target dev='vda'/></disk>", "called fda"),
    ("", "<disk type='block'><target dev='vda'/></disk>", "needs <source dev="),
    ("", "<disk><source file='/x'/><target dev='vda' bus='virtio'/><address type='drive'/></disk>", "kind of address"),
    ("", "<disk><source file='/x'/><target dev='vda'/><address type='pci' slot='32'/></disk>", "at most 31"),
    ("", "<disk><source file='/x'/><target dev='vda'/><address type='pci' slot='1' function='8'/></disk>", "at most 7"),
    ("", "<disk><source file='/x'/><target dev='vda'/><address type='moon'/></disk>", "not one of pci"),
    ("", "<interface type='bridge'/>", "needs <source bridge="),
    ("", "<interface type='network'><source network=''/></interface>", "needs <source network="),
    ("", "<interface type='user'><mac address='01:00:00:00:00:00'/></interface>", "multicast"),
    ("", "<interface type='user'><mac address='zz'/></interface>", "MAC address"),
    ("", "<interface/>", "needs the attribute 'type'"),
    (
        "",
        "<input type='mouse'><alias name='ua-x'/></input><input type='tablet'><alias name='ua-x'/></input>",
        "alias 'ua-x'",
    ),
    ("", "<channel type='spicevmc'><target type='virtio'/></channel>", "graphics type='spice'"),
    ("", "<redirdev bus='usb' type='spicevmc'/>", "graphics type='spice'"),
    ("", "<serial type='file'/>", "<source path="),
    ("", "<serial type='tcp'><source mode='bind'/></serial>", "<source host="),
    (
        "",
        "<graphics type='vnc' listen='1.2.3.4'><listen type='address' address='::1'/></graphics>",
        "listens on '1.2.3.4'",
    ),
    ("", "<graphics type='vnc' port='70000'/>", "at most 65535"),
    ("", "<controller type='usb' index='0'/><controller type='usb' index='0'/>", "the usb controller 0"),
    ("", "<memballoon model='virtio'/><memballoon model='none'/>", "a second <memballoon>"),
    ("", "<vsock/><vsock/>", "a second <vsock>"),
    (
        "",
        "<disk><source file='/a'/><target dev='vda'/><iotune><total_iops_sec>1</total_iops_sec>\
             <read_iops_sec>1</read_iops_sec></iotune></disk>",
        "not for both",
    ),
    ("", "<hostdev/>", "needs the attribute 'type'"),
    ("", "<hostdev type='usb'><source><vendor id='0x10000'/></source></hostdev>", "from 0 to 65535"),
    ("", "<hostdev type='pci'><source><address bus='6' slot='32'/></source></hostdev>", "a PCI slot is at most 31"),
    ("", "<input type='mouse' bus='usb'><address type='usb' bus='0' port='1.'/></input>", "a USB port"),
    (
        "<os><boot dev='hd'/></os>",
        "<interface type='user'><boot order='1'/></interface>",
        "either in <os> or in the devices",
    ),
    (
        "",
        "<interface type='user'><boot order='1'/></interface><hostdev><boot order='1'/></hostdev>",
        "boot order 1 is there twice",
    ),
    (
        "",
        "<rng model='virtio'><backend model='random'/><address type='pci' slot='2'/></rng><panic><address type='pci' slot='0x2'/></panic>",
        "0000:00:02.0 is there twice",
    ),
];

#[test]
fn what_cannot_be_is_refused_by_name() {
    for (outside, devices, expected) in CANNOT_BE {
        let found = findings(&with(outside, devices));
        assert!(found.iter().any(|finding| finding.contains(expected)), "{outside}{devices}: {expected}: {found:#?}");
    }
}

#[test]
fn a_number_that_was_chosen_is_not_stored() {
    for (cid, stored) in [
        ("<cid auto='yes' address='5'/>", "<cid auto='yes'/>"),
        ("<cid auto='no' address='5'/>", "<cid auto='no' address='5'/>"),
        ("<cid address='5'/>", "<cid auto='no' address='5'/>"),
        ("", "<cid auto='yes'/>"),
    ] {
        let mut def = parse(&with("", &format!("<vsock>{cid}</vsock>")));
        def.fill_defaults();
        assert!(def.write(STORED).contains(stored), "{cid}");
    }
}

#[test]
fn names_that_cannot_be() {
    for name in ["", " ", "a/b", "a\nb", "..", &"x".repeat(300)] {
        let found = findings(&format!("<domain type='test'><name>{name}</name><memory>1</memory></domain>"));
        assert_eq!(found.len(), 1, "{name}: {found:#?}");
        assert!(found[0].contains("/name"), "{found:#?}");
    }
    assert!(findings("<domain type='test'><name>a</name></domain>")[0].contains("needs memory"));
    assert!(findings("<domain><name>a</name><memory>1</memory></domain>")[0].contains("needs the attribute 'type'"));
    assert!(findings("<network/>")[0].contains("not a domain"));
    assert!(findings("<domain xmlns='u' type='test'/>").join(" ").contains("must be in none"));
}

#[test]
fn what_is_only_kept_is_listed_with_its_place() {
    let def = parse(&with("", "<pstore backend='acpi-erst'/>"));
    let kept: Vec<_> = def.unhandled().iter().map(|kept| format!("{:?} {}", kept.at, kept.name)).collect();
    assert_eq!(kept, ["5:1 /devices/pstore pstore"]);
    let def = parse(&with("", "<interface type='user' trustGuestRxFilters='yes'><script path='x'/></interface>"));
    let found: Vec<_> = def.unhandled().iter().map(|kept| kept.unsupported("is not supported").to_string()).collect();
    assert_eq!(
        found,
        [
            "line 5, column 24: /devices/interface/@trustGuestRxFilters: 'trustGuestRxFilters' is not supported",
            "line 5, column 50: /devices/interface/script: <script> is not supported",
        ]
    );
    for case in ["virt-install", "gnome-boxes", "vagrant", "tiny-test"] {
        let kept: Vec<_> = parse(&read(&format!("{case}.xml"))).unhandled().into_iter().map(|kept| kept.name).collect();
        let expected: &[&str] = if case == "gnome-boxes" { &["smartcard"] } else { &[] };
        assert_eq!(kept, expected, "{case}");
    }
}

#[test]
fn forms_leave_out_what_they_should() {
    let def = parse(&read("virt-manager-live.xml"));
    let live = def.write(FULL);
    for word in
        ["id='7'", "/dev/pts/3", "vnet6", "port='5900'", "pssst", "virtio-disk0", "index='2'", "state='connected'"]
    {
        assert!(live.contains(word), "{word}");
        assert_eq!(def.write(STORED).contains(word), word == "pssst", "{word}");
    }
    assert!(!def.write(Form { secure: false, ..FULL }).contains("pssst"));
    assert!(!def.write(Form { migratable: true, ..FULL }).contains("'pcie-root'"));
    assert!(!def.write(STORED).contains("imagelabel"));
    let mut changed = def.clone();
    changed.id = None;
    assert!(changed.same_configuration(&def));
    changed.on_crash = virt_model::domain::LifecycleAction::Preserve;
    assert!(!changed.same_configuration(&def));
}

#[test]
fn what_was_made_up_stays() {
    let mut def = parse(&with("", "<interface type='user'/>"));
    def.fill_defaults();
    let mac = def.devices.interfaces[0].mac().unwrap().to_string();
    assert!(mac.starts_with("52:54:00:"), "{mac}");
    assert!(!def.uuid.is_nil());
    let mut again = parse(&def.write(STORED));
    again.fill_defaults();
    assert!(again == def);
}

#[test]
fn memory_follows_numa_cells_and_devices() {
    let mut def = parse(&read("kept.xml"));
    def.fill_defaults();
    assert_eq!(def.memory_kib(), 262_144 + 262_144 + 131_072);
    assert_eq!((def.vcpus(), def.maximum_vcpus()), (1, 2));
    assert!(def.has_native_arguments());
}

#[test]
fn a_crowded_document_is_answered_in_bounded_time() {
    let crowd = |device: &str| with("", &device.repeat(500));
    assert_eq!(
        findings(&crowd("<serial type='pty'><target port='0x'/></serial><serial foo='1' bar='1'/>")).len(),
        1000
    );
    let mut def = parse(&crowd(
        "<serial type='pty'><target type='usb-serial' port='7'/></serial><serial><target type='usb-serial'/></serial>",
    ));
    def.fill_defaults();
    assert_eq!(def.devices.serials.len(), 1000);
    assert!(parse(&def.write(FULL)) == def);
}

#[test]
fn devices_are_bounded() {
    let controllers = "<controller type='usb'/>".repeat(20_000);
    let text = format!(
        "<domain type='qemu'><name>q</name><memory>1</memory><os><type>hvm</type></os><devices>{controllers}</devices></domain>"
    );
    let findings = DomainDef::parse(&text).unwrap_err();
    assert_eq!(findings.len(), 1);
    assert!(findings[0].message.contains("1024 devices"), "{}", findings[0]);
}
