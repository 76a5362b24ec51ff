//! Documents of storage pools and volumes: nothing of them is lost, and what is wrong is refused where it stands.

use std::path::{Path, PathBuf};
use virt_model::storage::pool::{PoolDef, PoolKind};
use virt_model::storage::volume::VolumeDef;
use virt_model::storage::{DOCUMENTS, check_volume_name, vocabulary};
use virt_model::xml::Finding;

/// The documents of a kind, each with its path.
fn documents(kind: &str) -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/storage").join(kind);
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// Reads a document of a kind and writes it again.
fn written(kind: &str, text: &str) -> Result<String, String> {
    let told = |findings: Vec<Finding>| findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    match kind {
        "pool" => PoolDef::parse(text).map(|def| def.write()).map_err(told),
        _ => VolumeDef::parse(text).map(|def| def.write()).map_err(told),
    }
}

fn refused(kind: &str, text: &str) -> String {
    written(kind, text).expect_err("a document that cannot be")
}

#[test]
fn every_document_is_written_as_it_was_read() {
    for kind in DOCUMENTS {
        for (path, text) in documents(kind) {
            assert_eq!(written(kind, &text).as_deref(), Ok(&*text), "{}", path.display());
        }
    }
}

#[test]
fn there_is_a_document_of_each_type_of_pool() {
    let read: Vec<PoolKind> = documents("pool").iter().map(|(_, text)| PoolDef::parse(text).unwrap().kind).collect();
    let missing: Vec<_> = PoolKind::ALL.iter().filter(|kind| !read.contains(kind)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// Each element and each attribute of the format, alone in a document, is written again, or refused by name.
#[test]
fn nothing_of_the_format_is_lost() {
    // What tells of a volume or pool that is there is forgotten.
    let forgotten = ["key", "allocation", "physical", "capacity", "available", "timestamps", "label"];
    let mut kept = 0;
    for kind in DOCUMENTS {
        for (path, attributes) in vocabulary(kind).into_iter().filter(|(path, _)| !path.is_empty()) {
            let steps: Vec<&str> = path.split('/').collect();
            let is_forgotten =
                steps.iter().any(|step| forgotten.contains(step)) || path.starts_with("backingStore/permissions");
            for attribute in attributes.iter().map(Some).chain([None]) {
                let Some(text) = lone(kind, &steps, attribute.map(|name| &**name)) else { continue };
                let last = steps[steps.len() - 1];
                match written(kind, &text) {
                    Ok(_) if is_forgotten => {}
                    Ok(back) => {
                        kept += 1;
                        assert!(back.contains(&format!("<{last}")), "{path}: {text}\n{back}");
                        let named = attribute.is_none_or(|name| back.contains(&format!("{name}='")));
                        assert!(named, "{path} {attribute:?}: {text}\n{back}");
                    }
                    Err(why) => assert!(why.contains("line ") && why.contains('/'), "{path}: {why}"),
                }
            }
        }
    }
    assert!(kept > 60, "most of the format is read, and not refused: {kept}");
}

/// A document that says one thing beside what every document says.
fn lone(kind: &str, steps: &[&str], attribute: Option<&str>) -> Option<String> {
    let (root, own) = match kind {
        "pool" => (
            "<pool type='dir' xmlns:fs='http://libvirt.org/schemas/storagepool/fs/1.0' xmlns:rbd='http://libvirt.org/schemas/storagepool/rbd/1.0'>",
            "<name>n</name><target><path>/p</path></target>",
        ),
        _ => ("<volume>", "<name>n</name>"),
    };
    if matches!(steps, ["name"] | ["target"] | ["target", "path"]) {
        return None;
    }
    let said = attribute.map(|name| format!(" {name}='1'")).unwrap_or_default();
    let inner = steps.iter().rev().fold(None, |inner: Option<String>, step| {
        let is_last = inner.is_none();
        let (said, below) = (if is_last { &*said } else { "" }, inner.unwrap_or_default());
        Some(format!("<{step}{said}>{below}</{step}>"))
    })?;
    let document = match (steps[0], kind) {
        ("target", "pool") => {
            let below = inner.strip_prefix("<target>")?.strip_suffix("</target>")?;
            own.replace("</target>", &format!("{below}</target>"))
        }
        _ => format!("{own}{inner}"),
    };
    Some(format!("{root}{document}</{kind}>"))
}

#[test]
fn what_is_wrong_is_told_where_it_stands() {
    let pool = |kind: &str, inner: &str| format!("<pool type='{kind}'>\n<name>p</name>\n{inner}\n</pool>");
    for (text, why) in [
        (pool("dir", ""), "/target: a pool of type 'dir' needs a <path> in its <target>"),
        (
            pool("dir", "<target><path>images</path></target>"),
            "line 3, column 1: /target/path: 'images' is no absolute path",
        ),
        (pool("dir", "<target><path>/a/../b</path></target>"), "goes up by '..'"),
        (pool("dir", "<target><path>//</path></target>"), "no place for a pool"),
        (
            pool("dir", "<target><path>/p</path><odd/></target>"),
            "line 3, column 24: /target/odd: unknown element <odd>",
        ),
        (pool("tape", "<target><path>/p</path></target>"), "/@type: 'tape' is not one of dir, fs, netfs"),
        (
            pool("fs", "<target><path>/p</path></target>"),
            "a pool of type 'fs' needs a <device path='…'/> in its <source>",
        ),
        (
            pool("fs", "<source><device path='/dev/a'/><format type='tar'/></source><target><path>/p</path></target>"),
            "line 3, column 32: /source/format/@type: 'tar' is not one of auto, ext2",
        ),
        (pool("netfs", "<source><host name='h'/></source><target><path>/p</path></target>"), "needs a <dir path='…'/>"),
        (pool("iscsi-direct", "<source><host name='h'/><device path='i'/></source>"), "needs a <initiator>"),
        (pool("dir", "<source><format type='ext4'/></source><target><path>/p</path></target>"), "has no <format>"),
        (
            pool("dir", "<target><path>/p</path><permissions><mode>888</mode></permissions></target>"),
            "'888' is not a mode in octal digits",
        ),
        ("<volume/>".to_owned(), "the root is <volume>, and a pool's is <pool>"),
    ] {
        let told = refused("pool", &text);
        assert!(told.contains(why), "{why}: {told}");
    }
    let volume = |inner: &str| format!("<volume>\n<name>v</name>\n{inner}\n</volume>");
    for (text, why) in [
        ("<volume><name>a/b</name></volume>".to_owned(), "'a/b' cannot be a name"),
        (volume("<capacity unit='ell'>1</capacity>"), "line 3, column 1: /capacity: 'ell' is not a unit of storage"),
        (volume("<capacity>-1</capacity>"), "'-1' is not an amount of storage"),
        (volume("<target><compat>2</compat></target>"), "one of 0.10, 1.1"),
        (volume("<target><clusterSize>1000</clusterSize></target>"), "a power of two"),
        (
            volume("<target><permissions><owner>-2</owner></permissions></target>"),
            "the number of a user or group, or -1",
        ),
        (volume("<target><permissions><mode>04755</mode></permissions></target>"), "at most 0777"),
    ] {
        let told = refused("volume", &text);
        assert!(told.contains(why), "{why}: {told}");
    }
}

#[test]
fn names_of_volumes() {
    for good in ["a", "web.qcow2", "ein Bild.iso", "日本.img", ".hidden", ".nfs0123"] {
        assert_eq!(check_volume_name(good), Ok(()), "{good}");
    }
    let left_by_nfs = ".nfs0123456789abcdef01234567";
    for bad in ["", "  ", ".", "..", "a/b", "a\nb", " a", "a\u{202e}b", ".virt-new-1", left_by_nfs, &"x".repeat(256)] {
        assert!(check_volume_name(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_pool_says_where_it_is_and_how_much_room_there_is() {
    let text = "<pool type='dir'><name>p</name><capacity>5</capacity><target><path>/a//b/./c/</path></target></pool>";
    let def = PoolDef::parse(text).unwrap();
    assert_eq!((def.target_path().as_deref(), def.capacity), (Some("/a/b/c"), None));
    assert!(!def.uuid.is_nil());
    let shown = def.with_room(10, 4, 6).write();
    assert!(shown.contains("<available unit='bytes'>6</available>"), "{shown}");
    assert_eq!(PoolDef::parse(&shown).unwrap(), def);
    let logical = PoolDef::parse("<pool type='logical'><name>vg</name></pool>").unwrap();
    assert_eq!(logical.target_path().as_deref(), Some("/dev/vg"));
}

/// Who stops such a pool asks for guests that run on it.
#[test]
fn what_is_mounted_for_a_pool_goes_from_the_host_when_it_is_stopped() {
    let pools = documents("pool").into_iter().map(|(_, text)| PoolDef::parse(&text).unwrap());
    let mounted: Vec<PoolKind> = pools.filter(|def| def.mounted_source().is_some()).map(|def| def.kind).collect();
    assert!(mounted.contains(&PoolKind::Fs) && mounted.contains(&PoolKind::Netfs), "{mounted:?}");
    assert!(mounted.iter().all(|kind| kind.is_attached()), "{mounted:?}");
    assert!(PoolKind::Logical.is_attached() && !PoolKind::Dir.is_attached());
}

/// What only tells of a volume that is there is no part of one that is to be made.
#[test]
fn facts_of_a_volume_are_forgotten() {
    let text = "<volume type='file'><name>v</name><key>/p/v</key><capacity unit='MiB'>1</capacity><allocation>7</allocation>\
                <physical>9</physical><target><format type='qcow2'/><permissions><mode>0644</mode><label>l</label></permissions>\
                <timestamps><mtime>1.5</mtime></timestamps></target></volume>";
    let def = VolumeDef::parse(text).unwrap();
    assert_eq!((def.capacity(), def.format()), (1 << 20, "qcow2"));
    let back = def.write();
    for gone in ["key", "allocation", "physical", "label", "timestamps"] {
        assert!(!back.contains(gone), "{gone}: {back}");
    }
    assert!(back.contains("<mode>0644</mode>"), "{back}");
}
