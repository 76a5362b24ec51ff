//! What is kept must be read again: snapshot records hold whole domain documents, and what a guest runs with is a document
//! too.

use virt_model::domain::{DomainDef, Form};
use virt_model::snapshot::SnapshotDoc;
use virt_model::xml::Limits;

const FULL: Form = Form::LIVE;
const STORED: Form = Form::STORED;

fn record(head: &str, domain: &str) -> String {
    format!(
        "<domainsnapshot{head}><name>one</name><state>shutoff</state><creationTime>5</creationTime>{domain}\
         </domainsnapshot>"
    )
}

/// A domain whose disk has a chain of `depth` images below it.
fn chained(depth: usize) -> DomainDef {
    let layer = "<backingStore type='file'><format type='qcow2'/><source file='/i/below'/>";
    let chain = format!("{}{}", layer.repeat(depth), "</backingStore>".repeat(depth));
    DomainDef::parse_within(
        &format!(
            "<domain type='qemu'><name>d</name><memory>1024</memory><os><type>hvm</type></os><devices>\
             <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/i/top'/>{chain}\
             <target dev='vda' bus='virtio'/></disk></devices></domain>"
        ),
        Limits::STORED,
    )
    .expect("a domain")
}

/// Every document of the tools, as a machine in a record: what DefineDomain takes, a record holds.
#[test]
fn l9_what_is_defined_is_read_in_a_record() {
    let folder = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/domain");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).expect("cases") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("a document");
        let Ok(def) = DomainDef::parse(&text) else { continue };
        let text = record("", &def.write(STORED));
        let (read, _) = SnapshotDoc::parse(&text).and_then(SnapshotDoc::record).unwrap_or_else(|findings| {
            panic!("{}: {}", path.display(), findings[0]);
        });
        assert_eq!(read.domain.expect("a machine").write(STORED), def.write(STORED), "{}", path.display());
        seen += 1;
    }
    assert!(seen > 10, "{seen}");
}

#[test]
fn l9_prefixes_hold_in_a_record_wherever_they_are_declared() {
    let domain = |head: &str| {
        format!(
            "<domain type='qemu'{head}><name>d</name><memory>1024</memory><metadata><mine:a/></metadata>\
             <os><type>hvm</type></os><qemu:commandline><qemu:arg value='-x'/></qemu:commandline></domain>"
        )
    };
    let declared = " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' xmlns:mine='urn:mine'";
    for text in [record("", &domain(declared)), record(declared, &domain(""))] {
        let (read, _) = SnapshotDoc::parse(&text).and_then(SnapshotDoc::record).expect("a record");
        let machine = read.domain.as_ref().expect("a machine");
        assert!(machine.has_native_arguments());
        let alone = DomainDef::parse(&machine.write(STORED)).expect("it stands alone");
        assert_eq!(alone.metadata("urn:mine").as_deref(), Some("<mine:a xmlns:mine='urn:mine'/>"));
        read.write_readable(Limits::ACCEPTED).expect("it is read again");
    }
    let findings = SnapshotDoc::parse(&record(" colour='red'", "")).expect_err("no attribute of the format");
    assert!(findings[0].message.contains("colour"), "{}", findings[0]);
}

/// libvirt gives USB 2 companions the alias of their master, and so do we.
#[test]
fn l2_companions_share_an_alias_and_nobody_else_does() {
    let domain = |third: &str| {
        format!(
            "<domain type='qemu' id='1'><name>d</name><memory>1024</memory><os><type>hvm</type></os><devices>\
             <controller type='usb' index='0' model='ich9-ehci1'><alias name='usb'/></controller>\
             <controller type='usb' index='0' model='ich9-uhci1'><master startport='0'/><alias name='usb'/></controller>\
             <controller type='usb' index='0' model='ich9-uhci2'><master startport='2'/><alias name='usb'/></controller>\
             <controller type='sata' index='0'><alias name='{third}'/></controller></devices></domain>"
        )
    };
    let def = DomainDef::parse(&domain("ide")).expect("as libvirt writes it");
    def.write_readable(FULL, Limits::ACCEPTED).expect("it is read again");
    assert!(DomainDef::parse(&domain("usb")).is_err(), "two devices of one name");
}

#[test]
fn l1_what_could_not_be_read_again_is_said_with_limit_and_remedy() {
    assert!(chained(60).write_readable(STORED, Limits::ACCEPTED).is_ok());
    let why = chained(70).write_readable(STORED, Limits::ACCEPTED).expect_err("too deep");
    assert!(why.contains("64 deep") && why.contains("delete snapshots"), "{why}");
    assert!(chained(90).write_readable(STORED, Limits::STORED).is_ok(), "there is room for what is added");
    let mut long = chained(0);
    // Five bytes for each, as it is written.
    long.description = Some("&".repeat(2 << 20));
    let why = long.write_readable(STORED, Limits::ACCEPTED).expect_err("too long");
    assert!(why.contains("bytes, more than the 8388608") && why.contains("shorten"), "{why}");
}

/// A rule that came later than a document keeps it neither from being read again nor from being told of.
#[test]
fn x4_what_was_stored_once_is_read_and_reported() {
    let text = "<domain type='qemu'><name>d</name><memory>1024</memory><os><type>hvm</type>\
                <bootmenu enable='yes' timeout='70000'/></os></domain>";
    let refused = DomainDef::parse(text).expect_err("a new document is refused");
    let def = DomainDef::parse_within(text, Limits::STORED).expect("a stored one is read");
    assert_eq!(def.contradictions(), refused);
    assert_eq!(refused[0].path, "/os/bootmenu/@timeout");
    let (record, _) = SnapshotDoc::parse(&record("", text)).and_then(SnapshotDoc::record).expect("a record is read");
    assert!(record.domain.is_some());
}
