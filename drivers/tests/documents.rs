//! What becomes of documents that others write: completed, held against a QEMU, and as arguments. Nothing is started.

mod qemu;

use qemu::{DIR, caps, message, parse, place};
use virt_drivers::qemu::capabilities::Capabilities;
use virt_drivers::qemu::check::{check, checked_command};
use virt_drivers::qemu::complete::complete;
use virt_drivers::qemu::plan::{Command, SecretContent};
use virt_drivers::test::TestDriver;
use virt_model::domain::{DomainDef, Form};
use virt_model::driver::Driver as _;
use virt_model::xml::FindingKind;

const STORED: Form = Form::STORED;

/// A small machine; `outside` stands before its devices.
fn text(machine: &str, outside: &str, devices: &str) -> String {
    let memory = if outside.contains("<memory") { "" } else { "<memory unit='MiB'>64</memory>" };
    format!(
        "<domain type='kvm'><name>a</name>{memory}<vcpu>2</vcpu>\
         <os><type arch='x86_64' machine='{machine}'>hvm</type></os><features><acpi/></features>\
         {outside}<devices>{devices}</devices></domain>"
    )
}

fn completed(machine: &str, outside: &str, devices: &str) -> DomainDef {
    let text = text(machine, outside, devices);
    let mut def = parse(&text);
    complete(&mut def, &caps()).unwrap_or_else(|findings| panic!("{}\n{text}", message(&findings)));
    def
}

fn built(def: &DomainDef, caps: &Capabilities) -> Command {
    checked_command(def, caps, &place(DIR))
        .unwrap_or_else(|findings| panic!("{}\n{}", message(&findings), def.write(STORED)))
}

/// The arguments in one line.
fn arguments(def: &DomainDef) -> String {
    built(def, &caps()).args.join(" ")
}

/// What keeps it from starting, in one text.
fn refusals(def: &DomainDef, caps: &Capabilities) -> String {
    let mut found = check(def, caps);
    found.retain(|finding| finding.kind != FindingKind::Warning);
    message(&found)
}

fn warnings(def: &DomainDef, caps: &Capabilities) -> String {
    let mut found = check(def, caps);
    found.retain(|finding| finding.kind == FindingKind::Warning);
    message(&found)
}

#[test]
fn x1_memory_is_rounded_up_to_mib_and_shown_so() {
    for (outside, size, shown) in [
        ("<memory unit='KiB'>66001</memory>", "size=66560k", "<memory unit='KiB'>66560</memory>"),
        ("<memory unit='KB'>66001</memory>", "size=64512k", "<memory unit='KiB'>64512</memory>"),
        ("<memory unit='b'>67108865</memory>", "size=66560k", "<currentMemory unit='KiB'>66560</currentMemory>"),
        (
            "<memory unit='KiB'>66001</memory><currentMemory unit='KiB'>66001</currentMemory>",
            "size=66560k",
            "<currentMemory unit='KiB'>66560</currentMemory>",
        ),
        (
            "<memory unit='KiB'>66001</memory><currentMemory unit='KiB'>33001</currentMemory>",
            "size=66560k",
            "<currentMemory unit='KiB'>33001</currentMemory>",
        ),
        ("<memory unit='MiB'>64</memory>", "size=65536k", "<memory unit='KiB'>65536</memory>"),
    ] {
        let def = completed("q35", outside, "");
        assert!(arguments(&def).contains(size), "{outside}: {}", arguments(&def));
        assert!(def.write(STORED).contains(shown), "{outside}: {}", def.write(STORED));
        let backend = format!("\"size\":{}", size[5..size.len() - 1].parse::<u64>().unwrap() * 1024);
        assert!(arguments(&def).contains(&backend), "{outside}: {}", arguments(&def));
    }
}

#[test]
fn x1_cells_and_plugged_memory_are_rounded_too() {
    let cells = "<memory unit='KiB'>1</memory><maxMemory slots='2' unit='KiB'>1000001</maxMemory>\
                 <cpu><numa><cell id='0' cpus='0' memory='33001'/><cell id='1' cpus='1' memory='33001'/></numa></cpu>";
    let dimm = "<memory model='dimm'><target><size unit='KiB'>30001</size><node>0</node></target></memory>";
    let def = completed("q35", cells, dimm);
    let arguments = arguments(&def);
    for part in ["-m size=67584k,slots=2,maxmem=1000448k", "\"size\":34603008", "\"size\":31457280"] {
        assert!(arguments.contains(part), "{part}: {arguments}");
    }
    assert!(def.write(STORED).contains("<memory unit='KiB'>98304</memory>"), "{}", def.write(STORED));
}

#[test]
fn x3_a_floppys_turn_is_said_by_its_controller() {
    let floppy = |boot: &str| format!("<disk device='floppy'><source file='/a'/><target dev='fda'/>{boot}</disk>");
    for (machine, expected) in [("q35", "\"bootindexA\":3"), ("pc", "-global isa-fdc.bootindexA=3")] {
        let arguments = arguments(&completed(machine, "", &floppy("<boot order='3'/>")));
        assert!(arguments.contains(expected), "{machine}: {arguments}");
        let device = arguments.split("-device ").find(|device| device.contains("\"driver\":\"floppy\"")).unwrap();
        assert!(!device.contains("bootindex"), "{device}");
    }
    let mut def = parse(&text("pc", "", &floppy("")).replace("</os>", "<boot dev='fd'/></os>"));
    complete(&mut def, &caps()).unwrap();
    assert!(arguments(&def).contains("-global isa-fdc.bootindexA=1"), "{}", arguments(&def));
}

#[test]
fn x3_a_socket_of_vnc_may_have_any_path() {
    let screen = "<graphics type='vnc'><listen type='socket' socket='/run/a=b,c.sock'/></graphics>";
    let arguments = arguments(&completed("q35", "", screen));
    assert!(arguments.contains("-vnc vnc=unix:/run/a=b,,c.sock,"), "{arguments}");
}

#[test]
fn x3_features_that_qemu_has_not_do_not_reach_it() {
    let cpu = |policy: &str, name: &str| {
        let feature = format!("<feature policy='{policy}' name='{name}'/>");
        completed("q35", &format!("<cpu mode='custom'><model>qemu64</model>{feature}</cpu>"), "")
    };
    for policy in ["disable", "forbid", "optional"] {
        let def = cpu(policy, "pconfig");
        assert_eq!(refusals(&def, &caps()), "");
        assert!(!arguments(&def).contains("pconfig"), "{policy}");
    }
    for policy in ["require", "force"] {
        let found = refusals(&cpu(policy, "pconfig"), &caps());
        assert!(found.contains("has no CPU feature 'pconfig': leave it out, or say policy='optional'"), "{found}");
    }
    for name in ["osxsave", "ospke"] {
        let def = cpu("require", name);
        assert!(warnings(&def, &caps()).contains("the guest's system turns it on by itself"));
        assert!(!arguments(&def).contains(name));
    }
    for (name, word) in [("lahf_lm", "lahf-lm=on"), ("sse4_1", "sse4.1=on"), ("avx512vbmi", "avx512vbmi=on")] {
        assert!(arguments(&cpu("require", name)).contains(word), "{name}");
    }
    // A QEMU that does not list them is believed to have them.
    let silent = Capabilities { cpu_features: Default::default(), ..caps() };
    assert_eq!(refusals(&cpu("require", "pconfig"), &silent), "");
}

#[test]
fn x3_a_parallel_port_opens_one_of_the_hosts() {
    let devices = "<parallel type='dev'><source path='/dev/parport0'/></parallel>\
                   <serial type='dev'><source path='/dev/ttyS0'/></serial>";
    let arguments = arguments(&completed("q35", "", devices));
    assert!(arguments.contains("-chardev parallel,id=charparallel0,path=/dev/parport0"), "{arguments}");
    assert!(arguments.contains("-chardev serial,id=charserial0,path=/dev/ttyS0"), "{arguments}");
}

#[test]
fn x6_the_first_function_of_a_slot_says_that_there_are_more() {
    let rng = |function: u8| {
        let address = format!("<address type='pci' domain='0' bus='0' slot='5' function='{function}'/>");
        format!("<rng model='virtio'><backend model='builtin'/>{address}</rng>")
    };
    let def = completed("q35", "", &(rng(0) + &rng(1)));
    assert_eq!(def.devices.rngs[0].info.pci().unwrap().multifunction, Some(true));
    assert_eq!(def.devices.rngs[1].info.pci().unwrap().multifunction, None);
    assert!(arguments(&def).contains("\"multifunction\":true,\"addr\":\"0x5\""), "{}", arguments(&def));
    let alone = completed("q35", "", &rng(0));
    assert_eq!(alone.devices.rngs[0].info.pci().unwrap().multifunction, None);
}

#[test]
fn x6_two_ways_to_one_lun_are_taken() {
    let disk = |target: &str, file: &str, serial: &str| {
        format!(
            "<disk type='block'><driver type='raw'/><source dev='{file}'/><target dev='{target}' bus='scsi'/>\
             <shareable/>{serial}<wwn>5000c50015ea71aa</wwn></disk>"
        )
    };
    let def = completed("q35", "", &(disk("sda", "/dev/a", "") + &disk("sdb", "/dev/a", "")));
    assert_eq!(arguments(&def).matches("\"wwn\":5764824127192592810").count(), 2, "{}", arguments(&def));
    let serial = "<serial>one</serial>";
    completed("q35", "", &(disk("sda", "/dev/a", serial) + &disk("sdb", "/dev/b", serial)));
    let two =
        DomainDef::parse(&text("q35", "", &(disk("sda", "/dev/a", "") + &disk("sdb", "/dev/b", "")))).unwrap_err();
    assert!(two[0].message.contains("only ways to one image or serial number share it"), "{}", two[0]);
}

#[test]
fn x6_cpus_that_the_host_has_not_are_told() {
    let outside = "<cputune><vcpupin vcpu='0' cpuset='0-3,^1'/><emulatorpin cpuset='1'/></cputune>";
    let mut host = caps();
    let def = completed("q35", outside, "");
    assert_eq!(warnings(&def, &host), "");
    host.host.online = [0, 1].into();
    let found = warnings(&def, &host);
    assert!(found.contains("/cputune/vcpupin/@cpuset: this host has no CPU 2-3, only 0-1"), "{found}");
    assert_eq!(found.lines().count(), 1, "{found}");
}

#[test]
fn x5_variables_may_be_said_as_an_image_is() {
    let mut def = parse(&text("q35", "", "").replace(
        "</os>",
        "<loader readonly='yes' type='pflash'>/fw/code.fd</loader>\
         <nvram template='/fw/vars.fd' type='file'><source file='/v/a.fd'/></nvram></os>",
    ));
    complete(&mut def, &caps()).unwrap();
    assert_eq!(refusals(&def, &caps()), "");
    assert!(def.write(STORED).contains("<nvram template='/fw/vars.fd'>/v/a.fd</nvram>"), "{}", def.write(STORED));
    assert!(arguments(&def).contains("/v/a.fd"));
    let network = "<nvram type='network'><source protocol='nbd'/></nvram></os>";
    let mut def = parse(&text("q35", "", "").replace("</os>", network));
    complete(&mut def, &caps()).unwrap();
    assert!(
        refusals(&def, &caps()).contains("is supported with type='file' and <source file='…'/>"),
        "{}",
        refusals(&def, &caps())
    );
}

#[test]
fn x5_labels_of_other_hosts_are_kept_with_a_warning() {
    let outside = "<seclabel type='static' model='selinux'><label>system_u:object_r:svirt_t:s0</label></seclabel>";
    let disk = "<disk><source file='/a'><seclabel model='apparmor' relabel='no'/></source><target dev='vda'/></disk>";
    let def = completed("q35", outside, disk);
    assert_eq!(refusals(&def, &caps()), "");
    assert_eq!(warnings(&def, &caps()).matches("are kept for hosts that have it, and not set here").count(), 2);
    assert!(def.write(STORED).contains("svirt_t"));
    let dac = "<seclabel type='static' model='dac'><label>+107:+107</label></seclabel>";
    assert!(refusals(&completed("q35", dac, ""), &caps()).contains("is decided for all guests alike"));
}

#[test]
fn x5_sound_in_a_file_without_a_folder_goes_where_libvirt_puts_it() {
    let def = completed("q35", "", "<audio id='1' type='file' path='sound.wav'/>");
    assert_eq!(def.devices.audios[0].path.as_deref(), Some("/sound.wav"));
    assert!(arguments(&def).contains("\"path\":\"/sound.wav\""), "{}", arguments(&def));
}

#[test]
fn x5_a_strict_cpu_is_that_one_or_none() {
    let def = completed("q35", "<cpu mode='custom' match='strict'><model>Haswell</model></cpu>", "");
    assert_eq!(refusals(&def, &caps()), "");
    assert!(arguments(&def).contains("-cpu Haswell,enforce=on"), "{}", arguments(&def));
    assert!(warnings(&def, &caps()).contains("gets this CPU and no other, or does not start"));
}

#[test]
fn x5_a_secrets_usage_may_be_any_text() {
    let disk = |usage: &str| {
        format!(
            "<disk><driver type='qcow2'/><source file='/a'/><target dev='vda'/>\
             <encryption format='luks'><secret type='passphrase' usage='{usage}'/></encryption></disk>"
        )
    };
    for (usage, file) in [("/srv/a b.img", "%2Fsrv%2Fa b.img"), ("..", "%2E."), ("50%", "50%25"), ("plain", "plain")] {
        let def = completed("q35", "", &disk(usage));
        assert_eq!(refusals(&def, &caps()), "", "{usage}");
        let command = built(&def, &caps());
        let SecretContent::Kept(name) = &command.secrets[0].content else { panic!("{:?}", command.secrets) };
        assert_eq!(virt_drivers::host::secret::file_of(name), file, "{usage}");
    }
}

#[test]
fn x5_scsi_controllers_of_other_makers_are_had() {
    for (model, device, place) in [
        ("lsilogic", "lsi53c895a", "\"scsi-id\":2,\"lun\":0"),
        ("lsisas1068", "mptsas1068", "\"scsi-id\":2,\"lun\":0"),
        ("lsisas1078", "megasas", "\"scsi-id\":0,\"lun\":2"),
        ("vmpvscsi", "pvscsi", "\"scsi-id\":2,\"lun\":0"),
        ("dc390", "dc390", "\"scsi-id\":2,\"lun\":0"),
        ("am53c974", "am53c974", "\"scsi-id\":2,\"lun\":0"),
    ] {
        let devices = format!(
            "<controller type='scsi' index='0' model='{model}'/>\
             <disk><source file='/a'/><target dev='sdc' bus='scsi'/></disk>"
        );
        let arguments = arguments(&completed("q35", "", &devices));
        for part in [format!("\"driver\":\"{device}\""), place.to_owned()] {
            assert!(arguments.contains(&part), "{model}: {part}: {arguments}");
        }
    }
    let queues = "<controller type='scsi' index='0' model='lsilogic'><driver queues='4'/></controller>";
    let found = refusals(&completed("q35", "", queues), &caps());
    assert!(found.contains("<driver> is for model='virtio-scsi'"), "{found}");
}

#[test]
fn x5_switches_and_bridges_that_are_said_are_had() {
    let controllers = "<controller type='pci' index='1' model='pcie-root-port'/>\
                       <controller type='pci' index='2' model='pcie-switch-upstream-port'/>\
                       <controller type='pci' index='3' model='pcie-switch-downstream-port'/>\
                       <controller type='pci' index='4' model='pcie-switch-downstream-port'/>\
                       <controller type='pci' index='5' model='dmi-to-pci-bridge'/>";
    let def = completed("q35", "", controllers);
    assert_eq!(refusals(&def, &caps()), "");
    let arguments = arguments(&def);
    for part in [
        "{\"driver\":\"x3130-upstream\",\"id\":\"pci.2\",\"bus\":\"pci.1\",\"addr\":\"0x0\"}",
        "{\"driver\":\"xio3130-downstream\",\"port\":0,\"chassis\":3,\"id\":\"pci.3\",\"bus\":\"pci.2\",\"addr\":\"0x0\"}",
        "\"chassis\":4,\"id\":\"pci.4\",\"bus\":\"pci.2\",\"addr\":\"0x1\"}",
        "{\"driver\":\"i82801b11-bridge\",\"id\":\"pci.5\",\"bus\":\"pcie.0\"",
    ] {
        assert!(arguments.contains(part), "{part}: {arguments}");
    }
    let alone = "<controller type='pci' index='1' model='pcie-switch-downstream-port'/>";
    let mut def = parse(&text("q35", "", alone));
    let found = match complete(&mut def, &caps()) {
        Ok(()) => refusals(&def, &caps()),
        Err(findings) => message(&findings),
    };
    assert!(!found.is_empty(), "a port of no switch");
}

#[test]
fn x5_a_second_usb_2_controller_has_companions_of_its_own() {
    let set = |index: u32| {
        let uhci = |n: u32, port: u32| {
            format!(
                "<controller type='usb' index='{index}' model='ich9-uhci{n}'><master startport='{port}'/></controller>"
            )
        };
        format!("<controller type='usb' index='{index}' model='ich9-ehci1'/>{}{}{}", uhci(1, 0), uhci(2, 2), uhci(3, 4))
    };
    let arguments = arguments(&completed("q35", "", &(set(0) + &set(1))));
    for part in ["\"masterbus\":\"usb.0\",\"firstport\":4", "\"masterbus\":\"usb1.0\",\"firstport\":4"] {
        assert!(arguments.contains(part), "{part}: {arguments}");
    }
}

#[test]
fn x5_a_spice_port_needs_no_certificates() {
    let mut host = caps();
    host.site.certificates.clear();
    let devices = "<graphics type='spice'/><serial type='spiceport'><source channel='org.a.b.0'/></serial>";
    let def = completed("q35", "", devices);
    assert_eq!(refusals(&def, &host), "");
    assert!(built(&def, &host).args.join(" ").contains("-chardev spiceport,id=charserial0,name=org.a.b.0"));
}

/// Whoever asks a driver need not look for contradictions, too: each driver tells of them, whatever else there is to tell.
#[tokio::test]
async fn what_contradicts_itself_is_among_what_cannot_run() {
    let both = "<iotune><total_iops_sec>7</total_iops_sec><read_iops_sec>7</read_iops_sec></iotune>";
    let disk = format!("<disk type='file'><source file='/a.img'/><target dev='vda' bus='virtio'/>{both}</disk>");
    let mut def =
        completed("q35", "", "<disk type='file'><source file='/a.img'/><target dev='vda' bus='virtio'/></disk>");
    def.devices.disks = DomainDef::parse_leniently(&text("q35", "", &disk)).0.expect("it can be read").devices.disks;
    let contradictions = def.contradictions();
    assert_eq!(contradictions.len(), 1, "{contradictions:?}");
    let absent = Capabilities { absent: Some("it is gone".to_owned()), ..caps() };
    let told = [check(&def, &caps()), check(&def, &absent), TestDriver::default().check(&def).await];
    for findings in told {
        let count = findings.iter().filter(|finding| finding.message == contradictions[0].message).count();
        assert_eq!(count, 1, "{findings:?}");
    }
}
