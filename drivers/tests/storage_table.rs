//! `docs/STORAGE-XML.md`: what becomes of every element and attribute of the documents of pools and volumes, written from the list
//! that decides it. With `UPDATE=1` in the environment the page is written anew, to be reviewed.

use std::path::Path;
use std::sync::Arc;
use virt_drivers::host::lender::Lender;
use virt_drivers::storage::HostStorage;
use virt_drivers::storage::table::{Standing, refused_of_pool, refused_of_volume, standing};
use virt_model::storage::pool::PoolDef;
use virt_model::storage::volume::VolumeDef;
use virt_model::storage::{DOCUMENTS, vocabulary};

const HEAD: &str = "# What becomes of storage XML

Every element and attribute of libvirt's documents of storage pools and volumes is known. Of a pool all is stored and shown again;
what is not in the format is refused when the pool is defined, with line and column, and so is what its type cannot have. This page
says what is done with each: it *acts*; it is *told* of what is there, and forgotten when it is read; it is *kept*, and asks for
nothing; or it is *refused*, by name and with the reason, when a pool is started or a volume is made.

The page is generated from the list in `drivers/storage/table.rs` (`UPDATE=1 cargo test -p virt-drivers --test storage_table`), and a
test holds it to it. An element in brackets stands for itself and all below it.

Pools of type `fs` are file systems of this host, which root's virtd alone mounts, that of the system bus: on a session bus they are
kept and shown. They have one `<device>`; `<format type='auto'/>`, or none, is what is on it.

Pools of type `netfs` are folders that other hosts share, mounted by root's virtd, too. They have one `<host>`, without a port, and a
`<dir>`, which is a path of the host's or, for `cifs`, a share and folders below it. `<format type='auto'/>`, or none, is NFS; `glusterfs`
is refused. `<protocol ver='…'/>` is the version that is asked for, or else the tool chooses one. A server of `cifs` is told a name
and a password where there is an `<auth type='chap' username='…'>` with a `<secret uuid='…'/>`, and nobody's else. `nfs` needs `mount.nfs`
(Debian has it in `nfs-common`), `cifs` needs `mount.cifs` (`cifs-utils`); virtd looks for both when it starts.

virtd's pools of type `nfs` are mounted from real servers in its tests. Those of `cifs` never were: only what `mount.cifs` is told is
tested. They are mounted with `nobrl`, so that locks of images are this host's alone: see to it yourself that no other host has a
machine on the same image. A `cifs` folder's name has no comma and no blanks at its ends, a user's name no `,` `%` `/` or backslash.

They are mounted `hard`, which nothing changes: what reads or writes waits for a server that is away, as long as it takes, and so does
a guest; no write that it was told of is lost, and no error reaches its file system. (With `soft` it would be told of errors after
some minutes, and what it had written could be lost.) virtd's own looks at such a pool have a time limit, and other pools go on;
`Refresh` of a pool that does not answer fails, and the pool is `inaccessible` from then on. A server that will not come back is given up by hand, with `umount -f -l` on the folder. Who wants
other options mounts the folder by other means, and defines a pool of type `dir` on it.

virtd makes volumes as root, with the owner that their documents say: a server that takes root for nobody (`root_squash`, which
NFS does unasked) refuses that, and with it all volumes. What other hosts do there is not told: `Refresh` looks. What virtd noted of a
volume (its owner, format and secret) is noted of the file: by its number and birth, or on NFS, where that is not told, its handle.
Where neither is told it is forgotten when the file is found to be gone, so that no new file with its number inherits it; one that
another host put in its place meanwhile, before virtd looked, would.

No volume is called `.virt-new-…`, or `.nfs` and 24 hexadecimal digits, which is what NFS calls a file that was removed while it is
open: such files are not listed, in pools of no type.

Pools of type `logical` are volume groups of LVM, which root's virtd alone activates. Their `<name>` in `<source>`, or else that of the
pool, is the group's; `<device>`s are what it is made of, once; `<target>` says nothing that is not so already, and its
`<permissions>` ask for nothing: whose devices are udev says. A volume has a name and a capacity there, and its type is `block`.
Its name and its group's have at most 126 bytes together, each `-` counted twice. It is resized while no guest has it.

Pools of type `disk` are the partitions of one whole disk, which is partitioned by root's virtd alone. They have one `<device>`, which is
no partition itself and not made by the device mapper, and a `<format>`: `gpt`, or `dos` with its four partitions; `<target>` is
`/dev`. All partitions are volumes, whoever made them, and are called as their devices are (`sda1`): a new one has a name whose number is
free. They begin and end at whole MiB, so that a capacity is rounded up, and a new one gets the first free area in which it has room. The
type, the name and the attributes of a partition stay as they are; new ones are data of Linux. One grows into what is free behind it,
while no guest has it.

A disk on which anything else is recognised, and a table that is a hybrid, overlaps, has an extended partition or is not at the end of
its disk, is refused with the reason. One of the two tables of GPT that is torn is made whole from the other when the pool starts.
While a file system is mounted from a partition of the disk, or anything else of the host's has one for itself, nothing in the table is
changed and its pool is not started (`InUse` says who). When the pool is stopped, partitions stay as they are. Disks with sectors of
4096 bytes were not tried.
";

/// The types of pool.
fn types() -> String {
    let storage = HostStorage::new(Arc::new(|| Ok(Lender::Ours)), Arc::new(|_| Ok(Vec::new())), Path::new("/"), true);
    let mut page =
        "\n## Types of pool\n\n| type | is started | formats that are made | comes from |\n|---|---|---|---|\n"
            .to_owned();
    for ability in storage.kinds_with_tools() {
        let list = |words: &[&str]| words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(" ");
        let started = if ability.lacks.is_none() { "yes" } else { "no: kept and shown" };
        let (formats, sources) = (list(ability.volume_formats), list(ability.source_formats));
        page += &format!("| `{}` | {started} | {formats} | {sources} |\n", ability.kind);
    }
    page
}

fn rows(kind: &str) -> String {
    let mut page = format!("\n## `<{kind}>`\n\n| element | acts | told, kept, refused |\n|---|---|---|\n");
    let mut whole: Vec<String> = Vec::new();
    for (path, attributes) in vocabulary(kind) {
        if whole.iter().any(|above| path.strip_prefix(&**above).is_some_and(|rest| rest.starts_with('/'))) {
            continue;
        }
        let name = if path.is_empty() { kind } else { &*path };
        let other = |standing| match standing {
            Standing::Acts => None,
            Standing::Told => Some("told".to_owned()),
            Standing::Kept(why) => Some(format!("kept: {why}")),
            Standing::Refused(why) => Some(format!("refused: {why}")),
        };
        if let Some(why) = other(standing(kind, &path)) {
            page += &format!("| [`{name}`] | | {why} |\n");
            whole.push(path);
            continue;
        }
        let at = |attribute: &String| standing(kind, &format!("{path}/@{attribute}"));
        let (acts, rest): (Vec<_>, Vec<_>) = attributes.iter().partition(|attribute| at(attribute) == Standing::Acts);
        let acts = acts.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" ");
        let acts = if acts.is_empty() { "yes".to_owned() } else { acts };
        let rest = rest.iter().map(|name| format!("`{name}`: {}", other(at(name)).unwrap_or_default()));
        page += &format!("| `{name}` | {acts} | {} |\n", rest.collect::<Vec<_>>().join("; "));
    }
    page
}

#[test]
fn the_page_says_what_the_list_says() {
    let page = DOCUMENTS.iter().fold(HEAD.to_owned() + &types(), |page, kind| page + &rows(kind));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/STORAGE-XML.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    assert!(std::fs::read_to_string(&path).unwrap() == page, "docs/STORAGE-XML.md is not what the list says: UPDATE=1");
}

#[test]
fn what_is_refused_is_named_where_it_stands() {
    let pool = "<pool type='dir'>\n<name>p</name>\n<target><path>/p</path></target>\n<refresh/>\n</pool>";
    let found = refused_of_pool(&PoolDef::parse(pool).unwrap());
    assert_eq!((found.len(), found[0].line, &*found[0].path), (1, 4, "/refresh"));
    let volume = "<volume>\n<name>v</name>\n<source/>\n<target><encryption format='luks'>\n<cipher name='aes'/></encryption></target>\n</volume>";
    let found = refused_of_volume(&VolumeDef::parse(volume).unwrap());
    let places: Vec<_> = found.iter().map(|finding| &*finding.path).collect();
    assert!(places.contains(&"/source") && places.contains(&"/target/encryption/cipher"), "{places:?}");
    assert_eq!(places.len(), 2);
}
