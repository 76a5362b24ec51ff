//! What is pending for a machine that runs, by paths.

use virt_model::domain::DomainDef;

fn machine(inside: &str) -> DomainDef {
    let text =
        format!("<domain type='qemu'><name>d</name><uuid>6f1c0d5e-6b1f-4c57-9c0e-0d0c3e6f9c01</uuid>{inside}</domain>");
    let mut def = DomainDef::parse(&text).expect("a machine");
    def.fill_defaults();
    def
}

/// Each difference as `path: running > stored`.
fn pending(running: &str, stored: &str) -> Vec<String> {
    let found = machine(running).pending_changes(&machine(stored));
    found.iter().map(|one| format!("{}: {} > {}", one.path, one.source, one.target)).collect()
}

fn devices(inside: &str) -> String {
    format!("<memory>1</memory><devices>{inside}</devices>")
}

const DISK: &str =
    "<disk type='file'><source file='/a'/><target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>";

#[test]
fn values_texts_and_flags_are_found_whether_the_guest_sees_them_or_not() {
    assert_eq!(pending("<memory>1024</memory>", "<memory>1024</memory>"), Vec::<String>::new());
    let all = pending(
        "<title>One</title><memory>2048</memory><vcpu>1</vcpu>",
        "<description>Two</description><memory>4096</memory><currentMemory>2048</currentMemory><vcpu current='1'>2</vcpu>",
    );
    let expected = [
        "/title: One > ",
        "/description:  > Two",
        "/memory: 2048 KiB > 4096 KiB",
        "/vcpu/current:  > 1",
        "/vcpu: 1 > 2",
    ];
    assert_eq!(all.iter().filter(|one| !expected.contains(&&***one)).collect::<Vec<_>>(), Vec::<&String>::new());
    assert_eq!(all.len(), expected.len());
    let readonly = DISK.replace("<target", "<readonly/><target").replace("'/a'", "'/b'");
    let found = pending(&devices(DISK), &devices(&readonly));
    assert_eq!(
        found,
        ["/devices/disk[target=vda]/source/file: /a > /b", "/devices/disk[target=vda]/readonly:  > present"]
    );
}

#[test]
fn a_device_of_one_side_is_one_difference_in_one_line_and_has_no_name() {
    let other = DISK.replace("vda", "vdb").replace("disk0", "disk1");
    let [one] = &pending(&devices(&[DISK, &other].concat()), &devices(DISK))[..] else { panic!("one difference") };
    assert!(
        one.starts_with("/devices/disk[target=vdb]: <disk type='file' device='disk'><driver type='raw'/>"),
        "{one}"
    );
    assert!(one.ends_with("</disk> > ") && !one.contains("alias") && !one.contains('\n'), "{one}");
    let [one] = &pending(&devices(DISK), &devices(&[DISK, &other].concat()))[..] else { panic!("one difference") };
    assert!(one.starts_with("/devices/disk[target=vdb]:  > <disk"), "{one}");
}

#[test]
fn the_order_of_what_boots_and_of_devices_counts() {
    let boots = |first: &str, second: &str| {
        format!("<memory>1</memory><os><type>hvm</type><boot dev='{first}'/><boot dev='{second}'/></os>")
    };
    let found = pending(&boots("hd", "cdrom"), &boots("cdrom", "hd"));
    assert_eq!(found, ["/os/boot[1]/dev: hd > cdrom", "/os/boot[2]/dev: cdrom > hd"]);
    let other = DISK.replace("vda", "vdb").replace("disk0", "disk1");
    let found = pending(&devices(&[DISK, &other].concat()), &devices(&[&other, DISK].concat()));
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("/devices: disk[target=vda] disk[target=vdb]"), "{found:?}");
}

#[test]
fn a_secret_is_only_said_to_be_another() {
    let display = |password: &str| devices(&format!("<graphics type='vnc' passwd='{password}'/>"));
    assert_eq!(pending(&display("abc"), &display("abc")), Vec::<String>::new());
    let found = pending(&display("abc"), &display("xyz"));
    assert_eq!(found, ["/devices/graphics/passwd: [hidden, 1] > [hidden, 2]"]);
    let found = pending(&devices(""), &display("abc"));
    assert!(found.len() == 1 && !found[0].contains("abc") && !found[0].contains("passwd"), "{found:?}");
    let disk = |query: &str, cookie: &str| {
        devices(&format!(
            "<disk type='network'><source protocol='https' name='x' query='{query}'><host name='h'/>\
             <cookies><cookie name='c'>{cookie}</cookie></cookies></source><target dev='vda' bus='virtio'/></disk>"
        ))
    };
    let found = pending(&disk("q=one", "s1"), &disk("q=two", "s2"));
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found.iter().all(|one| !one.contains("q=") && !one.contains("s1") && one.contains("[hidden, ")),
        "{found:?}"
    );
}

#[test]
fn what_others_wrote_and_what_is_only_kept_is_found() {
    let noted = |value: &str| format!("<metadata><a:b xmlns:a='urn:a'>{value}</a:b></metadata><memory>1</memory>");
    let found = pending(&noted("one"), &noted("two"));
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("/metadata: <a:b xmlns:a='urn:a'>one</a:b> > <a:b"), "{found:?}");
    let kept = |value: &str| format!("<memory>1</memory><idmap><uid start='0' target='{value}' count='10'/></idmap>");
    let found = pending(&kept("1000"), &kept("2000"));
    assert_eq!(found, ["/idmap/uid/target: 1000 > 2000"]);
}

#[test]
fn however_much_is_different_little_is_told() {
    let many = |letter: &str| {
        let metadata = letter.repeat(100_000);
        format!("<title>{metadata}</title><description>{metadata}</description><memory>1</memory>")
    };
    let found = machine(&many("a")).pending_changes(&machine(&many("b")));
    assert!(found.len() == 2 && found.iter().all(|one| one.source.len() == 4096 && one.target.len() == 4096));
    let disk = |number: usize| {
        let name = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"].map(str::to_owned);
        let target: String = [number / 100, number / 10 % 10, number % 10].iter().map(|digit| &*name[*digit]).collect();
        format!("<disk type='file'><source file='/a'/><target dev='vd{target}' bus='virtio'/></disk>")
    };
    let found = machine(&devices("")).pending_changes(&machine(&devices(&(0..900).map(disk).collect::<String>())));
    let bytes: usize = found.iter().map(|one| one.path.len() + one.source.len() + one.target.len()).sum();
    assert!(found.len() > 100 && bytes <= 64 << 10, "{} in {bytes} bytes", found.len());
}
