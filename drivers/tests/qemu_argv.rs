//! Definitions and the command lines they become, as text beside each other: `tests/data/qemu/<case>.xml`, its completed
//! form `<case>.out.xml` and its arguments `<case>.args`, for the QEMU recorded in `qemu-7.2.json`. With `UPDATE=1` in
//! the environment the expectations are written anew, to be reviewed.

mod qemu;

use qemu::{DIR, caps, cases, completed, data, message, parse, place, text};

use serde_json::Value;
use std::collections::BTreeSet;
use virt_drivers::host::secret::file_of;
use virt_drivers::qemu::check::{check, checked_command};
use virt_drivers::qemu::command::{Step, keeps_its_place, one_device};
use virt_drivers::qemu::complete::{Chosen, complete, go_live};
use virt_drivers::qemu::plan::Command;
use virt_drivers::qemu::plan::{Companion, SecretContent};
use virt_model::domain::{DomainDef, Form};
use virt_model::xml::FindingKind;

const STORED: Form = Form::STORED;

fn expect(name: &str, actual: &str) {
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(data().join(name), actual).unwrap();
    }
    assert_eq!(actual, text(name), "{name}");
}

/// One option a line, then what goes with the arguments.
fn show(command: &Command) -> String {
    let mut lines = vec![command.program.display().to_string()];
    for argument in &command.args {
        match lines.last_mut() {
            Some(line) if !argument.starts_with('-') && line.starts_with('-') && !line.contains(' ') => {
                line.push(' ');
                line.push_str(argument);
            }
            _ => lines.push(argument.clone()),
        }
    }
    lines.extend(command.nodes.iter().map(|node| format!("# before {node}")));
    lines.extend(command.env.iter().map(|(name, value)| format!("# env {name}={value}")));
    for file in &command.files {
        lines.push(format!("# file {} {}", if file.write { "rw" } else { "r" }, file.path.display()));
    }
    lines.extend(
        command.nvram.iter().map(|n| format!("# nvram {} in {} from {:?}", n.path.display(), n.format, n.template)),
    );
    lines.extend(command.taps.iter().map(|tap| format!("# tap {:?} {:?} {:?}", tap.fds, tap.vhost_fds, tap.plan)));
    lines.extend(command.lock_limit.map(|bytes| format!("# locks {bytes}")));
    lines.extend(command.companions.iter().flat_map(beside));
    lines.extend(command.secrets.iter().map(|secret| match &secret.content {
        SecretContent::Kept(name) => format!("# secret {} Kept({:?})", secret.fd, file_of(name)),
        said => format!("# secret {} {said:?}", secret.fd),
    }));
    lines.extend(command.scratch.iter().map(|fd| format!("# scratch {fd}")));
    lines.extend(command.setup.iter().map(|(verb, arguments)| format!("# then {verb} {arguments}")));
    lines.join("\n") + "\n"
}

/// A companion, and what goes with it.
fn beside(companion: &Companion) -> Vec<String> {
    let Companion { name, program, args, links, files, folders, role, .. } = companion;
    let mut lines = vec![format!("# beside: {} {}", program.display(), args.join(" "))];
    lines.push(format!("#   {name}: {role:?}"));
    lines.extend(links.iter().map(|link| format!("#   {link:?}")));
    lines.extend(files.iter().map(|file| format!("#   file {}", file.path.display())));
    lines.extend(folders.iter().map(|folder| format!("#   folder {}", folder.display())));
    lines
}

#[test]
fn definitions_become_these_command_lines() {
    let caps = caps();
    for case in cases() {
        let def = completed(&case, DIR, &caps);
        expect(&format!("{case}.out.xml"), &def.write(STORED));
        let command = checked_command(&def, &caps, &place(DIR))
            .unwrap_or_else(|findings| panic!("{case}: {}", message(&findings)));
        expect(&format!("{case}.args"), &show(&command));
        assert_eq!(command, checked_command(&def, &caps, &place(DIR)).unwrap(), "{case}: the same again");
    }
}

/// The devices that virtd looks for by their names where it finds a guest are those that a start gives these names, and those
/// that would be plugged in under them.
#[test]
fn a_device_that_can_go_is_there_by_its_name() {
    let caps = caps();
    let mut plugged = 0;
    for case in cases() {
        let mut def = completed(&case, DIR, &caps);
        go_live(&mut def, &mut Chosen { runtime_dir: DIR.as_ref(), encrypts: true, free_port: &mut |_, _| true })
            .unwrap();
        let command = checked_command(&def, &caps, &place(DIR)).unwrap_or_else(|f| panic!("{case}: {}", message(&f)));
        let words = command.args.iter().filter(|word| word.starts_with('{'));
        let named =
            words.filter_map(|word| serde_json::from_str::<Value>(word).ok()).filter(|one| one["driver"].is_string());
        let there: BTreeSet<String> = named.filter_map(|one| Some(one["id"].as_str()?.to_owned())).collect();
        for device in def.devices.all().into_iter().filter(|device| keeps_its_place(device).is_none()) {
            let alias = device.info().0.alias().unwrap_or_else(|| panic!("{case}: a device without a name"));
            assert!(there.contains(alias), "{case}: QEMU has no '{alias}'");
            if let Ok(one) = one_device(&def, &caps, &place(DIR), alias) {
                let plugs = |step: &Step| step.command == "device_add" && step.arguments["id"] == alias;
                assert!(one.steps.iter().any(plugs), "{case}: '{alias}' would not be plugged in");
                plugged += 1;
            }
        }
    }
    assert!(plugged > 50, "{plugged}");
}

/// A query of a server may be a token, and everybody on the host can read arguments.
#[test]
fn what_a_server_is_asked_with_is_in_no_argument() {
    let mut caps = caps();
    let xml = text("servers-kvm.xml");
    let command = |caps: &_| checked_command(&completed("servers-kvm", DIR, caps), caps, &place(DIR)).unwrap();
    assert!(xml.contains("query='a=1&amp;b=2'"), "the case has one");
    let built = command(&caps);
    assert!(!built.args.iter().any(|argument| argument.contains("a=1&b=2")), "{:?}", built.args);
    assert!(built.all_args().iter().any(|argument| argument.contains("cd.iso?a=1&b=2")));
    let names: Vec<&str> = built.nodes.iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["sda-storage", "sda-format"]);
    caps.version = (7, 1, 0);
    let older = command(&caps);
    assert!(older.nodes.is_empty() && !older.args.iter().any(|argument| argument == "-preconfig"));
}

#[test]
fn completing_is_idempotent_and_survives_storage() {
    let caps = caps();
    let mut documents: Vec<(String, String)> =
        cases().into_iter().map(|case| (text(&format!("{case}.xml")), case)).map(|(xml, case)| (case, xml)).collect();
    let tools = data().join("../domain");
    for file in std::fs::read_dir(&tools).into_iter().flatten() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|ext| ext == "xml") {
            documents.push((path.display().to_string(), std::fs::read_to_string(&path).unwrap()));
        }
    }
    assert!(documents.len() > 8, "the corpus of tools' documents is there");
    for (case, xml) in documents {
        let mut once = parse(&xml.replace("@DIR@", DIR));
        if !matches!(&*once.kind, "qemu" | "kvm") {
            continue;
        }
        complete(&mut once, &caps).unwrap_or_else(|findings| panic!("{case}: {}", message(&findings)));
        let mut twice = once.clone();
        complete(&mut twice, &caps).unwrap();
        assert_eq!(twice.write(STORED), once.write(STORED), "{case}: completing again changes nothing");
        let mut stored = parse(&once.write(STORED));
        complete(&mut stored, &caps).unwrap_or_else(|findings| panic!("{case}: stored: {}", message(&findings)));
        assert_eq!(stored.write(STORED), once.write(STORED), "{case}: nor after it was stored");
    }
}

/// What keeps documents that other tools wrote from running here, each finding a line.
#[test]
fn tools_documents_lack_only_this() {
    let caps = caps();
    let mut lines = String::new();
    let mut files: Vec<_> = std::fs::read_dir(data().join("../domain")).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    for path in files.iter().filter(|p| !p.display().to_string().contains(".out.")) {
        let mut def = parse(&std::fs::read_to_string(path).unwrap());
        if matches!(&*def.kind, "qemu" | "kvm") {
            complete(&mut def, &caps).unwrap_or_else(|findings| panic!("{}: {}", path.display(), message(&findings)));
            lines += &format!("{}\n", path.file_stem().unwrap().display());
            check(&def, &caps).iter().for_each(|finding| lines += &format!("  {finding}\n"));
        }
    }
    expect("tools.findings", &lines);
}

/// A document around some devices.
fn machine(board: &str, devices: &str) -> DomainDef {
    parse(&format!(
        "<domain type='qemu'>\n<name>m</name>\n<memory unit='MiB'>64</memory>\n<os><type arch='x86_64' machine='{board}'>hvm</type></os>\n\
         <devices>\n{devices}\n</devices>\n</domain>"
    ))
}

fn findings(board: &str, devices: &str) -> String {
    let caps = caps();
    let mut def = machine(board, devices);
    match complete(&mut def, &caps) {
        Err(findings) => message(&findings),
        Ok(()) => message(&check(&def, &caps)),
    }
}

#[test]
fn places_that_clash_are_refused() {
    let disk = |name: &str, address: &str| {
        format!("<disk type='file'><source file='/{name}'/><target dev='{name}'/>{address}</disk>")
    };
    let board = disk("vda", "<address type='pci' bus='0' slot='0'/>");
    assert!(findings("q35", &board).contains("bus 0 has no slot 0"), "{}", findings("q35", &board));
    let chip = disk("vda", "<address type='pci' bus='0' slot='0x1f'/>");
    assert!(findings("q35", &chip).contains("taken by another device or by the board"), "{}", findings("q35", &chip));
    let sata = "<controller type='sata' index='0'><address type='pci' bus='0' slot='5'/></controller>";
    assert!(findings("q35", sata).contains("always at slot 31, function 2"), "{}", findings("q35", sata));
    let usb = "<controller type='usb' model='none'/><input type='tablet' bus='usb'/>";
    assert!(findings("q35", usb).contains("USB is turned off"), "{}", findings("q35", usb));
}

#[test]
fn full_buses_grow() {
    let caps = caps();
    for board in ["q35", "pc"] {
        let letters = |n: u8| format!("vd{}{}", char::from(b'a' + n / 26), char::from(b'a' + n % 26));
        let disks =
            (0..120).map(|n| format!("<disk type='file'><source file='/d{n}'/><target dev='{}'/></disk>", letters(n)));
        let nics = (0..40).map(|_| "<interface type='user'><model type='rtl8139'/></interface>".to_owned());
        let inputs = (0..20).map(|_| "<input type='tablet' bus='usb'/>".to_owned());
        let mut def = machine(board, &disks.chain(nics).chain(inputs).collect::<String>());
        complete(&mut def, &caps).unwrap_or_else(|findings| panic!("{board}: {}", message(&findings)));
        let mut seen = std::collections::HashSet::new();
        for (info, _) in def.devices.infos() {
            assert!(info.pci().is_none_or(|pci| seen.insert(pci.place())), "{board}: {:?} is unique", info.pci());
        }
        assert!(seen.len() > 160, "{board}: {}", seen.len());
        let mut again = def.clone();
        complete(&mut again, &caps).unwrap();
        assert!(again == def, "{board}");
    }
}

#[test]
fn what_cannot_act_is_refused_by_name() {
    let cases = [
        (
            "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/></source></hostdev>",
            "<source> needs <vendor> and <product>",
        ),
        ("<hostdev type='scsi'><source/></hostdev>", "type='scsi' are not supported by the QEMU driver yet"),
        (
            "<hostdev type='pci' rawio='yes'><source><address bus='6'/></source></hostdev>",
            "'rawio' is for host devices of other types",
        ),
        (
            "<disk type='file'><driver iothread='1'/><source file='/x'/><target dev='vda'/></disk>",
            "there is no I/O thread 1",
        ),
        (
            "<disk type='file'><driver io='native'/><source file='/x'/><target dev='vda'/></disk>",
            "io='native' needs cache=",
        ),
        ("<disk type='file'><source file='/x'/><target dev='hda' bus='ide'/></disk>", "use bus='sata'"),
        ("<graphics type='sdl'/>", "use vnc, spice or dbus"),
        ("<interface type='user'><model type='usb-bot'/></interface>", "network card 'usb-bot' is not known"),
        ("<controller type='scsi' model='buslogic'/>", "SCSI controllers are virtio-scsi, lsilogic"),
    ];
    for (devices, expected) in cases {
        let found = findings("q35", devices);
        assert!(found.contains(expected), "{devices}: {found}");
        assert!(found.starts_with("line 6, column "), "{devices}: {found}");
    }
}

/// Findings for a document of which more than the devices is said.
fn findings_of(inner: &str) -> String {
    let caps = caps();
    let xml = format!(
        "<domain type='qemu'><name>m</name><memory unit='MiB'>64</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>{inner}</domain>"
    );
    let mut def = match DomainDef::parse(&xml) {
        Ok(def) => def,
        Err(findings) => return message(&findings),
    };
    match complete(&mut def, &caps) {
        Err(findings) => message(&findings),
        Ok(()) => message(&check(&def, &caps)),
    }
}

/// What stands around a part of a document, that part, which cannot be, and what is said of it.
const REFUSED: &[(&str, &[(&str, &str)])] = &[
    (
        "<devices>{}</devices>",
        &[
            ("<hostdev type='pci' managed='yes'/>", "with the <address> of a PCI device is needed"),
            ("<hostdev mode='capabilities' type='misc'/>", "mode='capabilities' is for containers"),
            ("<hostdev type='pci'><source><vendor id='1'/><address bus='6'/></source></hostdev>", "are for type='usb'"),
            (
                "<hostdev type='pci'><driver name='xen'/><source><address bus='6'/></source></hostdev>",
                "only vfio hands devices",
            ),
            ("<hostdev type='pci'><source><address type='usb' bus='6'/></source></hostdev>", "not one of type='pci'"),
            (
                "<hostdev type='pci'><source><address bus='6'/></source><rom file='x'/></hostdev>",
                "the path must be absolute",
            ),
            (
                "<iommu model='intel'/><hostdev type='pci'><source><address bus='6'/></source></hostdev>",
                "<driver caching_mode='on'/>",
            ),
            (
                "<hostdev type='usb'><source><address bus='1' device='4'/></source></hostdev>\
                 <hostdev type='usb'><source><address bus='1' device='4'/></source></hostdev>",
                "has this device twice",
            ),
            (
                "<hostdev type='usb'><source><address bus='1' device='4'/></source><rom bar='on'/></hostdev>",
                "only PCI devices have a ROM",
            ),
            ("<vsock><cid auto='no'/></vsock>", "a number is needed, or auto='yes'"),
            ("<vsock><cid auto='no' address='2'/></vsock>", "numbers of guests are 3 to"),
            ("<panic model='s390'/>", "no panic device 's390'"),
            ("<shmem name='a/b'/>", "it may hold no '/'"),
            ("<shmem name='a'><size unit='M'>3</size></shmem>", "a power of two"),
            ("<shmem name='a'><model type='ivshmem-doorbell'/></shmem>", "needs a <server>"),
            ("<iommu model='smmuv3'/>", "no IOMMU of model 'smmuv3'"),
            ("<iommu model='intel'><driver eim='on'/></iommu>", "needs intremap='on'"),
            ("<iommu model='intel'/><iommu model='intel'/>", "one IOMMU"),
            ("<hub type='scsi'/>", "USB hubs only"),
            ("<filesystem><source dir='x'/><target dir='t'/></filesystem>", "an absolute path is needed"),
            ("<filesystem type='block'><source dir='/x'/><target dir='t'/></filesystem>", "not type='block'"),
            (
                "<filesystem fmode='644'><source dir='/x'/><target dir='t'/></filesystem>",
                "modes are for accessmode='mapped'",
            ),
            (
                "<filesystem><driver type='virtiofs'/><source dir='/x'/><target dir='t'/></filesystem>",
                "<access mode='shared'/>",
            ),
            ("<filesystem><driver type='loop'/><source dir='/x'/><target dir='t'/></filesystem>", "not by 'loop'"),
            (
                "<disk type='file' model='virtio'><source file='/x'/><target dev='sda' bus='sata'/></disk>",
                "only virtio disks have a model",
            ),
            (
                "<disk type='file'><driver type='qcow2'/><source file='/x'/><target dev='vda'/><backingStore type='volume'>\
                 <source pool='p' volume='v'/><backingStore type='file'><format type='raw'/><source file='relative'/>\
                 </backingStore></backingStore></disk>",
                "the path must be absolute",
            ),
            (
                "<disk type='file'><driver type='qcow2'/><source file='/x'/><target dev='vda'/><backingStore type='volume'>\
                 <source pool='p' volume='v'/><backingStore type='file'><source file='/y'/></backingStore></backingStore></disk>",
                "a layer needs a <format>",
            ),
            (
                "<disk type='file'><driver type='qcow2'/><source file='/x'/><target dev='vda'/><backingStore type='volume'>\
                 <format type='raw'/><source pool='p' volume='v'/><backingStore type='file'><format type='raw'/>\
                 <source file='/y'/></backingStore></backingStore></disk>",
                "an image of format 'raw' does not stand on another",
            ),
            (
                "<disk type='file'><source file='/x'/><target dev='vda' dpofua='on'/></disk>",
                "only scsi disks have dpofua",
            ),
            ("<input type='tablet' bus='usb'><rom bar='off'/></input>", "only PCI devices have a ROM"),
            (
                "<controller type='pci' index='9' model='pcie-to-pci-bridge'><target memReserve='4'/></controller>",
                "only a pcie-root-port",
            ),
            ("<serial type='stdio'/>", "needs a window or terminal"),
            ("<serial type='pty'><source tls='yes'/></serial>", "only type='tcp' can be encrypted"),
            ("<channel type='qemu-vdagent'><target type='virtio' name='x'/></channel>", "com.redhat.spice.0"),
            (
                "<channel type='qemu-vdagent'><target type='virtio' name='com.redhat.spice.0'/></channel>",
                "needs graphics of type='vnc' or 'dbus'",
            ),
            (
                "<channel type='dbus'><source channel='x'/><target type='virtio' name='x'/></channel>",
                "needs <graphics type='dbus'>",
            ),
            (
                "<channel type='pty'><source><mouse mode='client'/></source><target type='virtio' name='x'/></channel>",
                "are for type='qemu-vdagent'",
            ),
            ("<parallel/><parallel/><parallel/><parallel/>", "at most three parallel ports"),
            ("<redirfilter><usbdev allow='no'/></redirfilter>", "no <redirdev>"),
            ("<rng model='virtio'><backend model='egd'/></rng>", "is reached by type="),
            ("<rng model='virtio'><backend model='builtin' type='tcp'/></rng>", "are for an entropy daemon"),
            ("<graphics type='vnc'><jpeg compression='auto'/></graphics>", "<jpeg> is for graphics of type='spice'"),
            ("<graphics type='vnc' tlsPort='5901'/>", "'tlsPort' is for graphics of type='spice'"),
            ("<graphics type='spice' powerControl='yes'/>", "'powerControl' is for graphics of type='vnc'"),
            ("<serial type='pty'><source append='on'/></serial>", "only type='file' keeps"),
            ("<serial type='pty'><protocol type='telnet'/></serial>", "telnet is for type='tcp'"),
            (
                "<serial type='tcp'><source mode='bind' host='::' service='1' tls='yes'/><protocol type='telnet'/></serial>",
                "telnet cannot be encrypted",
            ),
            (
                "<serial type='unix'><source mode='bind' path='/x'><reconnect enabled='yes' timeout='1'/></source></serial>",
                "only who connects",
            ),
            ("<graphics type='spice' port='5900' defaultMode='secure'/>", "goes by a tlsPort"),
            (
                "<graphics type='spice' autoport='yes'><listen type='socket'/><channel name='main' mode='secure'/></graphics>",
                "goes by a tlsPort",
            ),
            (
                "<graphics type='spice' autoport='yes'><channel name='main' mode='any'/><channel name='main' mode='any'/></graphics>",
                "two <channel> of this name",
            ),
            ("<sound model='ac97' multichannel='yes'/>", "multichannel is for model='usb'"),
            ("<audio id='1' type='none' tryMMap='yes'/>", "are for type='oss'"),
            ("<audio id='1' type='none'><input clientName='x'/></audio>", "are for type='jack'"),
            ("<audio id='1' type='none'><input bufferCount='1'/></audio>", "bufferCount is for"),
            ("<audio id='1' type='none'><output tryPoll='yes'/></audio>", "tryPoll is for"),
            ("<interface type='user'><vlan><tag id='1'/></vlan></interface>", "VLANs are for type='network'"),
            ("<interface type='user'><coalesce/></interface>", "<coalesce> is for"),
            (
                "<disk type='file' device='floppy'><source file='/x'/><target dev='fda'/><transient/></disk>",
                "only a disk that is written",
            ),
            (
                "<interface type='direct'><source dev='eth0'/><vlan><tag id='1'/></vlan></interface>",
                "VLANs are for type='network' and 'hostdev', and for 'bridge' on the system bus",
            ),
            ("<interface type='direct'><source dev='eth0'/><coalesce/></interface>", "<coalesce> is for"),
            ("<interface type='direct'/>", "needs <source dev='…'/>"),
            ("<interface type='direct'><source dev='a/b'/></interface>", "no name of a network device"),
            ("<interface type='vdpa'><source dev='/dev/x'/></interface>", "type='vdpa' are not supported"),
            ("<interface type='bridge'><source bridge='b' mode='vepa'/></interface>", "a mode is for type='direct'"),
            ("<interface type='user' managed='yes'/>", "managed='yes' is for type='hostdev'"),
            ("<interface type='user'><driver name='vfio'/></interface>", "vfio is for type='hostdev'"),
            ("<interface type='hostdev'/>", "with the <address> of a PCI device"),
            (
                "<interface type='hostdev'><source><address bus='6'/></source><mtu size='9000'/></interface>",
                "a card of the host's has no <mtu>",
            ),
            (
                "<interface type='hostdev'><source><address bus='6'/></source><driver queues='2'/></interface>",
                "<driver name='vfio'/> and no settings",
            ),
            (
                "<interface type='hostdev'><source><address bus='6'/></source><vlan><tag id='4095'/></vlan></interface>",
                "one VLAN tag, from 1 to 4094",
            ),
            ("<interface type='udp'><source address='1.2.3.4' port='1'/></interface>", "needs <local> with a port"),
            ("<interface type='user'><ip address='1.2.3'/></interface>", "no address of the family"),
            ("<interface type='user'><portForward proto='tcp'/></interface>", "<backend type='passt'/>"),
            (
                "<interface type='user'><driver queues='2'/></interface>",
                "several queues are for virtio cards of type='vhostuser'",
            ),
            ("<interface type='user'><target dev='mine'/></interface>", "a name of its own only on the system bus"),
            (
                "<interface type='bridge'><source bridge='b'/><bandwidth><inbound/></bandwidth></interface>",
                "an average above 0",
            ),
            ("<interface type='user'><filterref filter='allow-arp'/></interface>", "filters are for type='network'"),
            (
                "<interface type='network'><source network='n'/><filterref filter='clean-traffic'/></interface>",
                "the filter 'clean-traffic' needs <parameter name='IP' value='…'/>",
            ),
            (
                "<interface type='network'><source network='n'/><filterref filter='no-ipv6-spoofing'/></interface>",
                "the filter 'no-ipv6-spoofing' needs <parameter name='IPV6' value='…'/>",
            ),
            (
                "<interface type='network'><source network='n'/><filterref filter='allow-dhcp-server'>\
                 <parameter name='DHCPSERVER' value='fd00::1'/></filterref></interface>",
                "the filter 'allow-dhcp-server' is of the other family than fd00::1",
            ),
            ("<input type='mouse' bus='usb' model='virtio'/>", "only inputs on bus='virtio'"),
            ("<input type='mouse' bus='virtio' model='virtio-transitional'/>", "model='virtio' only"),
            (
                "<memory model='dimm'><source><pmem/></source><target><size>1024</size></target></memory>",
                "are for model='nvdimm'",
            ),
            ("<input type='evdev'/>", "the path of the host's device"),
            ("<graphics type='dbus'/>", "need p2p='yes'"),
            ("<graphics type='vnc' passwd='x' passwdValidTo='soon'/>", "a time in UTC such as"),
            ("<memory model='dimm'><target><size unit='MiB'>32</size></target></memory>", "need <maxMemory>"),
            ("<memory model='nvdimm'><target><size>1024</size></target></memory>", "needs <source> with a <path>"),
            ("<memory model='sgx-epc'><target><size>1024</size></target></memory>", "SGX"),
        ],
    ),
    (
        "<devices><disk type='network'>{}<target dev='vda'/></disk></devices>",
        &[
            ("<source protocol='nfs' name='x'><host name='h'/></source>", "protocol='nfs' is not supported"),
            ("<source protocol='ssh' name='x'><host name='h'/></source>", "qemu-block-extra"),
            ("<source protocol='ssh' name='x' tls='yes'><host name='h'/></source>", "does not speak TLS"),
            ("<source protocol='nbd' tlsHostname='x'><host name='h'/></source>", "with tls='yes'"),
            ("<source protocol='nbd'/>", "needs a <host>"),
            ("<source protocol='http' name='x'><host name='h'/><auth username='u'/></source>", "needs a <secret>"),
            ("<source protocol='rbd' name='image'/>", "pool/image"),
            ("<source protocol='nbd'><host name='h'/><timeout seconds='1'/></source>", "is not for protocol='nbd'"),
            ("<source/>", "with a protocol"),
            ("<source protocol='nbd'><host name='h'/></source><transient/>", "only disks of type='file'"),
        ],
    ),
    (
        "<devices><disk type='file'><source file='/x'/><target dev='vda'/>{}</disk></devices>",
        &[
            ("<encryption format='qcow'><secret type='passphrase' usage='x'/></encryption>", "format='luks'"),
            ("<encryption format='luks'/>", "needs one <secret>"),
            ("<encryption format='luks'><secret usage=''/></encryption>", "makes a file's name"),
            ("<blockio logical_block_size='1000'/>", "a power of two from 512"),
            ("<vendor>ACME</vendor>", "only scsi disks"),
            ("<transient/><readonly/>", "only a disk that is written"),
            ("<transient/><shareable/>", "other guests would not see"),
            ("<transient shareBacking='yes'/>", "'shareBacking'"),
            (
                "<transient/><encryption format='luks'><secret usage='x'/></encryption>",
                "would lie on the host in the open",
            ),
            ("<acpi index='1'/>", "needs <acpi/>"),
            ("<rom file='x'/>", "the path must be absolute"),
            ("<rom enabled='no' bar='on'/>", "has neither bar nor file"),
            ("<throttlefilters><throttlefilter group='x'/></throttlefilters>", "no <throttlegroup> of this name"),
        ],
    ),
    (
        "{}",
        &[
            ("<throttlegroups><throttlegroup/></throttlegroups>", "needs a <group_name>"),
            ("<genid>x</genid>", "'x' is not"),
            ("<sysinfo type='smbios'><bios><entry name='x'>y</entry></bios></sysinfo>", "no such field"),
            ("<sysinfo type='fwcfg'><entry name='etc/x'>y</entry></sysinfo>", "begin with 'opt/'"),
            ("<sysinfo type='fwcfg'><entry name='opt/a/x'/></sysinfo>", "either a text or a file"),
            ("<numatune><memory mode='restrictive' nodeset='0'/></numatune>", "'restrictive' is not supported"),
            ("<numatune><memnode cellid='1' mode='strict' nodeset='0'/></numatune>", "no such NUMA cell"),
            ("<maxMemory slots='2' unit='GiB'>1</maxMemory>", "needs <acpi/>"),
            ("<iothreadids><iothread id='0'/></iothreadids>", "count from 1"),
            ("<cputune><shares>1</shares></cputune>", "shares are 2 to 10000"),
            ("<cputune><quota>5</quota></cputune>", "at least 1000 microseconds"),
            ("<cputune><vcpupin vcpu='4' cpuset='0'/></cputune>", "no such vCPU"),
            ("<cputune><emulatorsched scheduler='fifo'/></cputune>", "need a priority"),
            ("<memtune><hard_limit unit='MiB'>1</hard_limit></memtune>", "the guest would be killed"),
            ("<blkiotune><weight>0</weight></blkiotune>", "a weight is 1 to 1000"),
            ("<cputune><cachetune vcpus='0'/></cputune>", "<cachetune>"),
            ("<iothreads>5000</iothreads>", "at most 4096"),
            ("<vcpus><vcpu id='0' enabled='no'/></vcpus>", "vCPU 0 is always there"),
            ("<cpu><cache mode='passthrough'/></cpu>", "type='kvm' only"),
            ("<cpu><maxphysaddr mode='emulate'/></cpu>", "needs bits"),
            ("<cpu><model vendor_id='short'>qemu64</model></cpu>", "twelve ASCII characters"),
            ("<cpu><numa><cell cpus='3' memory='1024'/></numa></cpu>", "there is no vCPU 3, only 1"),
            (
                "<cpu><numa><cell id='0' memory='1'/><cell id='0' memory='1'/></numa></cpu>",
                "NUMA cell 0 is there twice",
            ),
            ("<features><smm state='off'><tseg>8</tseg></smm></features>", "needs <smm state='on'>"),
            ("<clock offset='utc' adjustment='5'/>", "are for offset='variable'"),
            ("<clock offset='timezone'/>", "goes with a timezone"),
            ("<clock offset='absolute'/>", "goes with a start"),
            ("<clock><timer name='hpet' track='guest'/></clock>", "only the timer 'rtc' follows"),
            ("<clock><timer name='armvtimer'/></clock>", "no timer 'armvtimer'"),
        ],
    ),
    (
        "<features><acpi/></features><devices>{}</devices>",
        &[
            ("<controller type='sata' index='0'><acpi index='1'/></controller>", "none of the board's own"),
            ("<video><model type='vga'/><acpi index='20000'/></video>", "1 to 16383"),
            (
                "<video><model type='vga'/><acpi index='3'/></video><rng model='virtio'><backend model='random'/><acpi index='3'/></rng>",
                "two devices with this number",
            ),
        ],
    ),
    (
        "<devices><graphics type='spice'/><redirdev bus='usb' type='spicevmc'/><redirfilter><usbdev {}/></redirfilter></devices>",
        &[
            ("class='0x1234' allow='no'", "a hexadecimal number such as 0x08"),
            ("version='1' vendor='0x1'", "allow='yes' or allow='no'"),
            ("version='x' allow='no'", "a version is like 1.10"),
        ],
    ),
    (
        "<devices><interface type='bridge'><source bridge='b'/>{}</interface></devices>",
        &[
            ("<vlan></vlan>", "needs a <tag>"),
            ("<vlan><tag id='4095'/></vlan>", "VLANs are 1 to 4094"),
            ("<vlan trunk='no'><tag id='1'/><tag id='2'/></vlan>", "is a trunk"),
            ("<vlan><tag id='1' nativeMode='tagged'/></vlan>", "is for trunk='yes'"),
        ],
    ),
    (
        "<devices><interface type='hostdev'><source><address bus='6'/></source>{}</interface></devices>",
        &[
            ("<vlan trunk='yes'><tag id='4'/></vlan>", "a trunk is for type='bridge'"),
            ("<vlan><tag id='4' nativeMode='tagged'/></vlan>", "a nativeMode is for type='bridge'"),
            ("<vlan><tag id='4'/><tag id='5'/></vlan>", "one VLAN tag, from 1 to 4094"),
            ("<coalesce/>", "a card of the host's has no <coalesce>"),
            ("<filterref filter='allow-arp'/>", "a card of the host's has no <filterref>"),
        ],
    ),
    (
        "<memoryBacking>{}</memoryBacking>",
        &[
            ("<hugepages/><source type='file'/>", "leave out <source type='file'/>"),
            ("<allocation threads='2'/>", "threads are for mode='immediate'"),
            ("<hugepages><page unit='M'/></hugepages>", "a size is needed"),
        ],
    ),
];

#[test]
fn machines_that_cannot_be_are_refused_with_the_remedy() {
    for (around, cases) in REFUSED {
        for (part, expected) in *cases {
            let inner = around.replace("{}", part);
            let found = findings_of(&inner);
            assert!(found.contains(expected), "{inner}: {found}");
        }
    }
}

#[test]
fn a_card_of_the_hosts_that_its_network_gives_may_have_a_model() {
    let caps = caps();
    let said = |source: &str| {
        let card = format!(
            "<interface type='hostdev' managed='yes'><source{source}><address bus='6'/></source><model type='virtio'/></interface>"
        );
        let mut def = machine("q35", &card);
        complete(&mut def, &caps).unwrap();
        message(&check(&def, &caps))
    };
    assert_eq!(said(" network='cards'"), "");
    assert!(said("").contains("a card of the host's has no <model>"), "{}", said(""));
}

#[test]
fn what_the_host_lacks_for_its_devices_is_said() {
    let mut caps = caps();
    let devices = "<vsock/><hostdev type='pci' managed='yes'><source><address bus='6'/></source></hostdev>\
                   <interface type='direct'><source dev='eth0'/></interface>";
    let mut def = machine("q35", devices);
    complete(&mut def, &caps).unwrap();
    assert_eq!(message(&check(&def, &caps)), "");
    caps.site.vhost_vsock = false;
    caps.site.makes_taps = false;
    let found = message(&check(&def, &caps));
    assert!(found.contains("no /dev/vhost-vsock: load the module (modprobe vhost_vsock)"), "{found}");
    assert!(found.contains("managed='yes' needs root: use the system bus"), "{found}");
    assert!(found.contains("type='direct' needs root: use the system bus, or type='bridge'"), "{found}");
}

#[test]
fn kvm_that_is_not_usable_is_said_with_a_remedy() {
    let mut caps = caps();
    let mut def = completed("windows-kvm", DIR, &caps);
    caps.kvm = Err("there is no /dev/kvm".to_owned());
    let found = message(&check(&def, &caps));
    assert!(
        found.contains("/@type: type='kvm' cannot be run: there is no /dev/kvm; use type='qemu' for emulation"),
        "{found}"
    );
    def.kind = "qemu".to_owned();
    let warnings = check(&def, &caps);
    assert!(warnings.iter().all(|f| f.kind == FindingKind::Warning) && warnings.len() > 3, "{}", message(&warnings));
}

#[test]
fn a_missing_emulator_keeps_nothing_from_being_stored() {
    let why = "emulator /nowhere/qemu: No such file or directory".to_owned();
    let caps = virt_drivers::qemu::capabilities::Capabilities::absent("/nowhere/qemu".as_ref(), why);
    let def = completed("desktop", DIR, &caps);
    assert_eq!(def.os.kind.machine.as_deref(), Some("q35"), "an alias that nobody can resolve stays");
    assert!(def.devices.disks[0].info.pci().is_some());
    let found = message(&check(&def, &caps));
    assert!(found.contains("this emulator cannot be used: emulator /nowhere/qemu"), "{found}");
}

#[test]
fn encryption_needs_the_hosts_certificates() {
    let encrypted = [
        "<graphics type='spice' tlsPort='5901'/>",
        "<graphics type='spice' autoport='yes' defaultMode='secure'/>",
        "<serial type='tcp'><source mode='bind' host='::' service='1' tls='yes'/></serial>",
        "<disk type='network'><source protocol='nbd' tls='yes'><host name='h'/></source><target dev='vda'/></disk>",
    ];
    let lacks = |files: &[&str], devices: &str| {
        let mut caps = caps();
        caps.site.certificates.retain(|name| files.iter().any(|file| name.starts_with(file)));
        let mut def = machine("q35", devices);
        complete(&mut def, &caps).unwrap();
        message(&check(&def, &caps))
    };
    for devices in encrypted {
        let found = lacks(&[], devices);
        assert!(found.contains("there is no /etc/virt/tls/ca-cert.pem"), "{devices}: {found}");
        assert_eq!(lacks(&["ca", "server", "client"], devices), "");
    }
    let found = lacks(&["ca", "client"], encrypted[0]);
    assert!(found.contains("there is no /etc/virt/tls/server-cert.pem"), "{found}");
    assert_eq!(lacks(&["ca"], encrypted[3]), "", "who only goes to others can do without a name");
    let open = "<graphics type='spice' autoport='yes' tlsPort='-1'/>";
    assert_eq!(lacks(&[], open), "", "what may be encrypted and need not be is not");
}
