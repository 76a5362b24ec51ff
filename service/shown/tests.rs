use super::*;

fn machine(inside: &str) -> Shown {
    let text = format!("<domain type='test'><name>d</name><memory>1</memory>{inside}</domain>");
    let mut def = DomainDef::parse(&text).expect("a machine");
    def.fill_defaults();
    Shown::of(&def)
}

fn devices(inside: &str) -> Shown {
    machine(&format!("<devices>{inside}</devices>"))
}

/// Each entry as `key=value` in one line.
fn said(shown: &Shown, section: Section) -> Vec<String> {
    let word = |(key, said)| match said {
        Said::Text(text) => format!("{key}={text}"),
        Said::Number(number) => format!("{key}={number}"),
        Said::Flag(flag) => format!("{key}={flag}"),
        Said::Texts(texts) => format!("{key}={texts:?}"),
    };
    shown.entries(section).map(|entry| entry.map(word).collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn disks_say_where_they_are_and_what_they_stand_on() {
    let shown = devices(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a.qcow2'/>\
           <backingStore type='file'><format type='raw'/><source file='/b.img'/><backingStore/></backingStore>\
           <target dev='vda' bus='virtio'/><serial>S1</serial><boot order='2'/><alias name='ua-a'/></disk>\
         <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>\
         <disk type='network' device='disk'><driver name='qemu' type='raw'/>\
           <source protocol='https' name='disk.img' query='token=s3cret'><host name='example.org' port='8443'/>\
             <cookies><cookie name='c'>s3cret</cookie></cookies></source>\
           <target dev='vdb' bus='virtio'/></disk>",
    );
    let expected = [
        "target=vda device=disk bus=virtio type=file source=/a.qcow2 format=qcow2 serial=S1 alias=ua-a readonly=false \
         shareable=false boot-order=2 backing=[\"/b.img\"]",
        "target=sda device=cdrom bus=sata type=file source= readonly=true shareable=false",
        "target=vdb device=disk bus=virtio type=network source=https://example.org:8443/disk.img format=raw readonly=false \
         shareable=false",
    ];
    assert_eq!(said(&shown, Section::Disks), expected);
    assert!(!String::from_utf8_lossy(&shown.0).contains("s3cret"));
}

#[test]
fn cards_say_what_they_are_plugged_into() {
    let shown = devices(
        "<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='vnet3'/>\
           <model type='virtio'/><link state='down'/><alias name='net0'/></interface>\
         <interface type='user'><mac address='52:54:00:00:00:02'/><boot order='1'/></interface>\
         <interface type='hostdev'><mac address='52:54:00:00:00:03'/>\
           <source><address type='pci' domain='0' bus='3' slot='0' function='1'/></source></interface>",
    );
    let said = said(&shown, Section::Interfaces);
    assert_eq!(said[0], "mac=52:54:00:00:00:01 type=bridge source=br0 model=virtio target=vnet3 alias=net0 link=false");
    assert!(said[1].ends_with("link=true boot-order=1") && !said[1].contains("source"), "{}", said[1]);
    assert!(said[2].contains("source=0000:03:00.1"), "{}", said[2]);
}

#[test]
fn displays_and_consoles_say_how_they_are_reached_and_no_password() {
    let shown = devices(
        "<graphics type='vnc' port='5901' passwd='s3cret' passwdValidTo='2030-01-01T00:00:00'>\
           <listen type='address' address='127.0.0.1'/></graphics>\
         <graphics type='spice'><listen type='socket' socket='/run/spice'/></graphics>\
         <graphics type='egl-headless'/>\
         <serial type='pty'><source path='/dev/pts/3'/><target port='0'/><alias name='serial0'/></serial>\
         <console type='file'><source path='/log'/><target type='virtio' port='1'/></console>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/><alias name='channel0'/></channel>",
    );
    let displays = [
        "type=vnc index=0 listen=127.0.0.1 port=5901 password=true openable=true",
        "type=spice index=1 socket=/run/spice password=false openable=true",
        "type=egl-headless index=2 password=false openable=false",
    ];
    assert_eq!(said(&shown, Section::Graphics), displays);
    assert!(!String::from_utf8_lossy(&shown.0).contains("s3cret"));
    let consoles = said(&shown, Section::Consoles);
    assert_eq!(consoles[0], "alias=serial0 type=pty path=/dev/pts/3 port=0 openable=true");
    assert_eq!(consoles[1], "type=file path=/log port=1 openable=false");
    assert_eq!(consoles.len(), 2, "a console that is a serial port is that");
    assert_eq!(said(&shown, Section::Channels), ["name=org.qemu.guest_agent.0 alias=channel0 type=unix"]);
}

#[test]
fn a_machine_says_what_it_boots_by_and_from() {
    let os = |inside: &str, devices: &str| {
        let acpi = "<features><acpi/><smm state='on'/></features>";
        machine(&format!("<os {inside}<type>hvm</type></os>{acpi}<devices>{devices}</devices>"))
    };
    let only = |shown: &Shown| [said(shown, Section::Firmware), said(shown, Section::Tpm)];
    let plain = os("><boot dev='cdrom'/><boot dev='hd'/>", "");
    assert_eq!(only(&plain), [vec!["type=bios".to_owned()], vec![]]);
    assert_eq!(plain.only(Section::BootOrder), Some(Said::Texts(vec!["cdrom", "hd"])));
    assert_eq!(plain.only(Section::OperatingSystem), None);
    let tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>";
    let named = os(
        "firmware='efi'><loader readonly='yes' secure='yes' type='pflash'>/code.fd</loader><nvram>/vars.fd</nvram>",
        tpm,
    );
    let told = only(&named);
    assert_eq!(told[0], ["type=efi nvram=/vars.fd secure-boot=true"]);
    assert_eq!(told[1], ["model=tpm-crb version=2.0"]);
    let ordered = os(
        ">",
        "<disk type='file'><source file='/a'/><target dev='vda'/><boot order='2'/></disk>\
         <interface type='user'><mac address='52:54:00:00:00:01'/><boot order='1'/></interface>\
         <hostdev mode='subsystem' type='pci'><source><address domain='0' bus='4' slot='0' function='0'/></source>\
           <boot order='3'/></hostdev>\
         <hostdev mode='subsystem' type='usb'><source><vendor id='0x046d'/><product id='0xc52b'/></source></hostdev>",
    );
    let order = ["52:54:00:00:00:01", "vda", "0000:04:00.0"];
    assert_eq!(ordered.only(Section::BootOrder), Some(Said::Texts(order.to_vec())));
    let host_devices = ["type=pci address=0000:04:00.0", "type=usb vendor=0x046d product=0xc52b"];
    assert_eq!(said(&ordered, Section::HostDevices), host_devices);
}

#[test]
fn the_system_is_what_a_tool_has_noted() {
    let noted = machine(
        "<metadata><libosinfo:libosinfo xmlns:libosinfo='http://libosinfo.org/xmlns/libvirt/domain/1.0'>\
         <libosinfo:os id='http://debian.org/debian/12'/></libosinfo:libosinfo></metadata>",
    );
    assert_eq!(noted.only(Section::OperatingSystem), Some(Said::Text("http://debian.org/debian/12")));
}

#[test]
fn what_is_kept_of_a_machine_is_little_however_much_it_has() {
    let usual = devices(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/var/lib/images/web.qcow2'/>\
           <target dev='vda' bus='virtio'/></disk>\
         <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><model type='virtio'/></interface>\
         <serial type='pty'/><graphics type='vnc'/>",
    );
    assert!(usual.0.len() < 400, "{} bytes", usual.0.len());
    let disk = |number: usize| {
        let (path, serial) = ("p".repeat(5000), "s".repeat(200));
        format!(
            "<disk type='file'><source file='/{path}{number}'/><target dev='vd{}' bus='virtio'/><serial>{serial}</serial></disk>",
            ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"][number]
        )
    };
    let many = devices(&(0..10).map(disk).chain(["<graphics type='vnc'/>".to_owned()]).collect::<String>());
    assert!(many.0.len() <= 32 << 10);
    let disks: Vec<_> = many.entries(Section::Disks).collect();
    assert_eq!(disks.len(), 7, "the first");
    assert!(disks[6].clone().any(|(key, said)| (key, said) == ("target", Said::Text("vdg"))));
    assert_eq!(said(&many, Section::Graphics).len(), 1, "what is small has room beside it");
    assert_eq!(many.entries(Section::BootOrder).count(), 1);
}
