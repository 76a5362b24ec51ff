//! What is secret is shown only to who asks for it, and what was not shown is not lost when the document comes back.

use virt_model::domain::{DomainDef, Form};

const SHOWN: Form = Form { inactive: true, secure: false, migratable: false };
const STORED: Form = Form::STORED;

/// One of every kind of secret, each with a word of its own.
const ALL: &str = "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>d</name>\
    <uuid>00000000-0000-4000-8000-000000000001</uuid><memory>1024</memory>\
    <sysinfo type='fwcfg'><entry name='opt/a'>s3cret-blob</entry><entry name='opt/b' file='/etc/blob'/></sysinfo>\
    <sysinfo type='smbios'><oemStrings><entry>s3cret-one</entry><entry>s3cret-two</entry></oemStrings></sysinfo>\
    <os><type>hvm</type></os><devices>\
    <disk type='network' device='cdrom'><driver name='qemu' type='raw'/>\
    <source protocol='https' name='/iso' query='token=s3cret-query&amp;a=b'><host name='h'/>\
    <cookies><cookie name='c'>s3cret-cookie</cookie></cookies></source><target dev='sda' bus='sata'/><readonly/></disk>\
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/top'/>\
    <backingStore type='network'><format type='raw'/><source protocol='https' name='/base' query='s3cret-base'>\
    <host name='h'/></source></backingStore><target dev='vda' bus='virtio'/></disk>\
    <graphics type='vnc' port='-1' passwd='s3cretpw' passwdValidTo='2099-01-01T00:00:00'/>\
    <graphics type='spice' passwd='s3cret-spice'/></devices>\
    <qemu:commandline><qemu:arg value='-object'/><qemu:arg value='secret,id=s,data=s3cret-arg'/>\
    <qemu:env name='TOKEN' value='s3cret-env'/></qemu:commandline></domain>";

fn parse(text: &str) -> DomainDef {
    DomainDef::parse(text).unwrap_or_else(|findings| panic!("{}", findings[0]))
}

#[test]
fn m6_nothing_secret_is_shown_without_secure() {
    let shown = parse(ALL).write(SHOWN);
    assert!(!shown.contains("s3cret"), "{shown}");
    assert!(parse(ALL).write(STORED).matches("s3cret").count() >= 10);
}

#[test]
fn l7_what_was_not_shown_comes_back_with_the_document() {
    let stored = parse(ALL);
    let mut again = parse(&stored.write(SHOWN).replace("<memory unit='KiB'>1024", "<memory unit='KiB'>2048"));
    again.keep_hidden(&[&stored]).expect("all is known");
    let expected = stored.write(STORED).replace("<memory unit='KiB'>1024", "<memory unit='KiB'>2048");
    assert_eq!(again.write(STORED), expected);
}

#[test]
fn l7_what_is_taken_out_or_emptied_goes() {
    let stored = parse(ALL);
    let edits = [
        ("<entry>[hidden 1]</entry>", "", "s3cret-one"),
        ("<qemu:arg value='[hidden 2]'/>", "", "s3cret-arg"),
        ("query='[hidden 1]'", "query=''", "s3cret-query"),
        ("<graphics type='vnc'", "<graphics passwd='' type='vnc'", "s3cretpw"),
        ("<graphics type='spice'", "<graphics passwd='anew' type='spice'", "s3cret-spice"),
        ("<source protocol='https' name='/iso'", "<source protocol='https' name='/other'", "s3cret-cookie"),
    ];
    for (from, to, gone) in edits {
        let shown = stored.write(SHOWN);
        assert!(shown.contains(from), "{from}: {shown}");
        let mut text = shown.replacen(from, to, 1);
        if to.contains("/other") {
            // What was for one server is not given to another.
            assert!(parse(&text).keep_hidden(&[&stored]).is_err());
            text = text.replacen(" query='[hidden 1]'", "", 1);
        }
        let mut again = parse(&text);
        again.keep_hidden(&[&stored]).unwrap_or_else(|why| panic!("{from}: {}", why[0]));
        let kept = again.write(STORED);
        assert!(!kept.contains(gone) && !kept.contains("[hidden"), "{from}: {kept}");
        assert!(kept.matches("s3cret").count() >= 8, "the others stay: {kept}");
    }
    let empty = stored.write(STORED).replace("passwd='s3cretpw' passwdValidTo='2099-01-01T00:00:00'", "passwd=''");
    assert!(parse(&empty).write(SHOWN).contains("passwd=''"), "that nobody gets in is no secret");
}

#[test]
fn l7_a_hidden_value_that_nobody_knows_is_refused() {
    let shown = parse(ALL).write(SHOWN);
    let findings = parse(&shown).keep_hidden(&[]).expect_err("another machine");
    assert!(findings[0].message.contains("give the value itself"), "{}", findings[0]);
    let changed = parse(&ALL.replace("s3cret-arg", "another-arg"));
    let findings = parse(&shown).keep_hidden(&[&parse(ALL), &changed]).expect_err("one of two");
    assert!(findings[0].message.contains("what runs"), "{}", findings[0]);
    let moved = shown.replace("name='TOKEN'", "name='OTHER'");
    assert!(parse(&moved).keep_hidden(&[&parse(ALL)]).is_err(), "it is not moved to where it can be seen");
}

#[test]
fn m6_secrets_are_blacked_out_of_what_is_said() {
    let said =
        "qemu: -object secret,,id=s,,data=s3cret-arg: no; https://h/iso?token=s3cret-query&a=b s3cret-env s3cretpw";
    let told = parse(ALL).black_out(said);
    assert!(!told.contains("s3cret") && told.contains("qemu: ") && told.contains(": no;"), "{told}");
}
