//! Snapshot documents as others write them: read, kept, and what of them is refused, with its own place.

use virt_model::domain::DomainDef;
use virt_model::driver::snapshots::{DiskMode, MemoryMode};
use virt_model::snapshot::{Alignment, Request, SnapshotDef, SnapshotDoc};
use virt_model::xml::Finding;

fn record(inner: &str) -> String {
    format!("<domainsnapshot>\n<name>one</name>\n<creationTime>5</creationTime>\n{inner}\n</domainsnapshot>")
}

fn read(text: &str) -> Result<SnapshotDef, Vec<Finding>> {
    SnapshotDoc::parse(text).and_then(SnapshotDoc::record).map(|(def, _)| def)
}

fn refused(text: &str) -> String {
    read(text).expect_err("a record that cannot be").iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// A machine with a disk in a file and one on a device.
fn machine() -> DomainDef {
    let disk = |target: &str, kind: &str, attribute: &str, path: &str| {
        format!(
            "<disk type='{kind}'><driver type='qcow2'/><source {attribute}='{path}'/><target dev='{target}'/></disk>"
        )
    };
    let disks = disk("vda", "file", "file", "/i/a.qcow2") + &disk("vdb", "block", "dev", "/dev/b");
    DomainDef::parse(&format!(
        "<domain type='qemu'><name>d</name><memory>1</memory><devices>{disks}</devices></domain>"
    ))
    .expect("a machine")
}

/// What a snapshot of the disks alone of a running machine would be.
fn aligned(disks: &str) -> Result<Alignment, Vec<Finding>> {
    let doc = SnapshotDoc::parse(&format!("<domainsnapshot><disks>{disks}</disks></domainsnapshot>"))?;
    let request = Request { active: true, disk_only: true, live: false, restored: false };
    Alignment::of(&doc, "one", &machine(), request)
}

#[test]
fn x10_what_is_said_of_an_overlay_is_kept() {
    let text = record(
        "<state>disk-snapshot</state>\n<disks><disk name='vda' snapshot='external' type='file'>\
         <driver type='qcow2'><metadata_cache><max_size unit='bytes'>4096</max_size></metadata_cache></driver>\
         <source file='/i/a.one'><seclabel model='selinux' relabel='no'/></source></disk></disks>",
    );
    let def = read(&text).expect("a record");
    let written = def.write(false, false);
    for part in [
        "<max_size unit='bytes'>4096</max_size>",
        "<seclabel model='selinux' relabel='no'/>",
        "<source file='/i/a.one'>",
    ] {
        assert!(written.contains(part), "{part}: {written}");
    }
    assert_eq!(read(&written).expect("it is read again"), def);
    assert!(matches!(def.disks[0].mode, DiskMode::External { .. }));
    // One that is to be taken does it.
    let made = |disk: &str| {
        aligned(&format!(
            "<disk name='vda'><driver type='qcow2'>{disk}</driver></disk><disk name='vdb' snapshot='no'/>"
        ))
    };
    let cache = "<metadata_cache><max_size unit='KiB'>64</max_size></metadata_cache>";
    assert_eq!(made(cache).expect("a cache").caches, [("vda".to_owned(), 65_536)].into());
    for (wrong, why) in [
        ("<metadata_cache/>", "a <max_size> is needed"),
        ("<metadata_cache><max_size unit='ell'>1</max_size></metadata_cache>", "ell"),
    ] {
        let found = made(wrong).expect_err(wrong);
        assert!(found[0].message.contains(why) && found[0].path.contains("metadata_cache"), "{}", found[0]);
    }
}

#[test]
fn x10_an_overlay_on_a_server_is_kept_in_a_record_and_refused_where_it_would_be_made() {
    let disks = "<disks><disk name='vda' snapshot='external' type='network'><driver type='qcow2'/>\
                 <source protocol='gluster' name='v/one'><host name='h' port='24007'/></source></disk></disks>";
    let text = record(&format!("<state>disk-snapshot</state>\n{disks}"));
    let def = read(&text).expect("a record");
    assert_eq!(def.disks[0].mode, DiskMode::Remote { shown: "gluster:v/one".to_owned() });
    let written = def.write(false, false);
    for part in ["type='network'", "protocol='gluster'", "name='v/one'", "<host name='h' port='24007'/>"] {
        assert!(written.contains(part), "{part}: {written}");
    }
    assert_eq!(read(&written).expect("it is read again"), def);
    let found = aligned(disks.trim_start_matches("<disks>").trim_end_matches("</disks>")).expect_err("none is made");
    assert!(found[0].message.contains("overlays on servers are not made here: name a file"), "{}", found[0]);
    assert_eq!(found[0].path, "/disks/disk/@type");
    let nowhere = record(
        "<state>disk-snapshot</state>\n<disks><disk name='vda' snapshot='external' type='network'><source name='v'/>\
         </disk></disks>",
    );
    assert!(refused(&nowhere).contains("needs a protocol"), "{}", refused(&nowhere));
}

#[test]
fn x10_a_record_of_old_shows_whose_it_is() {
    let of = "<domain>\n    <uuid>0f3a1d0e-6c51-4b2b-8d7c-0f0a2f6c7f11</uuid>\n  </domain>";
    let def = read(&record(&format!("<state>shutoff</state>{of}"))).expect("a record");
    assert_eq!(def.domain, None);
    let written = def.write(false, false);
    assert!(written.contains(of), "{written}");
    assert_eq!(read(&written).expect("it is read again"), def);
}

#[test]
fn x10_names_states_and_times_are_refused_where_they_stand() {
    let text = "<domainsnapshot>\n<name>a/b</name>\n<state>asleep</state>\n<creationTime>soon</creationTime>\n\
                </domainsnapshot>";
    let found = refused(text);
    for part in [
        "line 2, column 1: /name: snapshot name 'a/b'",
        "line 3, column 1: /state: the state of a snapshot is one of running",
        "line 4, column 1: /creationTime: a snapshot that is restored needs its <creationTime>",
    ] {
        assert!(found.contains(part), "{part}: {found}");
    }
    let doc = SnapshotDoc::parse("<domainsnapshot>\n<name>.a</name>\n</domainsnapshot>").expect("a document");
    let found = Alignment::of(&doc, ".a", &machine(), Request::default()).expect_err("no name");
    assert_eq!((found[0].line, &*found[0].path), (2, "/name"));
}

#[test]
fn x12_a_snapshot_that_is_all_copied_by_hand_is_refused() {
    let manual = "<disk name='vda' snapshot='manual'/><disk name='vdb' snapshot='manual'/>";
    let found = aligned(manual).expect_err("nothing would be done, and the guest left paused");
    assert!(found[0].message.contains("disk-only needs at least one external disk"), "{}", found[0]);
    let one = "<disk name='vda'><source file='/i/a.one'/></disk><disk name='vdb' snapshot='manual'/>";
    assert_eq!(aligned(one).expect("one is external").disks[1].mode, DiskMode::Manual);
}

#[test]
fn x12_a_block_device_is_never_made_up() {
    let none = "<disk name='vda' snapshot='external' type='block'/><disk name='vdb' snapshot='no'/>";
    let found = aligned(none).expect_err("no device is named");
    assert_eq!(found[0].path, "/disks/disk[1]/@type");
    assert!(found[0].message.contains("name one that is there, with <source dev='…'/>"), "{}", found[0]);
    let named = "<disk name='vda' type='block'><source dev='/dev/c'/></disk><disk name='vdb' snapshot='no'/>";
    let made = aligned(named).expect("a device of the caller's");
    assert!(matches!(&made.disks[0].mode, DiskMode::External { block: true, .. }));
}

#[test]
fn x12_a_record_of_one_that_had_ended_may_have_its_memory() {
    for state in ["crashed", "shutdown"] {
        let inner = format!("<state>{state}</state>\n<memory snapshot='internal'/>");
        let def = read(&record(&inner)).expect("as libvirt writes it");
        assert_eq!(def.memory, MemoryMode::Internal);
        assert!(!def.has_memory(), "a revert to it starts it anew");
        assert!(def.write(false, false).contains("<memory snapshot='internal'/>"));
    }
    assert!(refused(&record("<state>shutoff</state>\n<memory snapshot='internal'/>")).contains("has no memory"));
    assert!(refused(&record("<state>crashed</state>\n<memory file='/m'/>")).contains("has no memory"));
}

#[test]
fn x11_the_cpu_in_a_cookie_is_read_and_what_stands_beside_it_is_kept() {
    let cookie = "<cookie>\n<cpu mode='custom' match='exact' check='full'>\n<model fallback='forbid'>Skylake-Client</model>\n\
                  <vendor>Intel</vendor>\n<feature policy='disable' name='hle'/>\n</cpu>\n<slirpHelper/>\n</cookie>";
    let def = read(&record(&format!("<state>running</state>\n{cookie}"))).expect("libvirt's own");
    let cpu = def.cpu.as_ref().expect("a CPU");
    assert_eq!(cpu.model.as_ref().and_then(|model| model.name.as_deref()), Some("Skylake-Client"));
    assert_eq!(cpu.features.len(), 1);
    let written = def.write(false, true);
    for part in ["<slirpHelper/>", "<vendor>Intel</vendor>", "<feature policy='disable' name='hle'/>"] {
        assert!(written.contains(part), "{part}: {written}");
    }
    assert_eq!(read(&written).expect("it is read again"), def);
    assert!(!def.write(false, false).contains("cookie"), "it is no part of what a check shows");
    let wrong = record("<state>running</state>\n<cookie><cpu mode='odd'/></cookie>");
    assert!(refused(&wrong).contains("line 5, column 14: /cookie/cpu/@mode"), "{}", refused(&wrong));
}
