//! The document of a secret: `<secret>`, which says what it is for and never its value; and how machines name one.

use crate::device::source::{Auth, Protocol, SecretKind, SecretRef};
use crate::domain::DomainDef;
use crate::domain::format::Format;
use crate::domain::part::{Part as _, element};
use crate::domain::value::choices;
use crate::xml::{self, Finding, Limits};
use std::sync::LazyLock;
use uuid::Uuid;

static FORMAT: LazyLock<Format> = LazyLock::new(|| Format::read(include_str!("secret.txt")));

/// The longest text that says what a secret is for, in bytes.
const LONGEST_USAGE: usize = 1024;

choices! {
    /// What a secret is for.
    pub enum UsageKind { None = "none", Volume = "volume", Ceph = "ceph", Iscsi = "iscsi", Tls = "tls", Vtpm = "vtpm", }
}

element! {
    /// `<secret>`
    pub struct SecretDef {
        /// It ends with virtd, and is never on disk.
        yes_no "ephemeral" => ephemeral: Option<bool>,
        /// Its value is told to nobody.
        yes_no "private" => private: Option<bool>,
        /// `<uuid>`, made up when the document has none.
        own "uuid" => uuid: Uuid,
        /// `<description>`
        leaf "description" => description: Option<String>,
        /// `<usage>`
        child "usage" => usage: Option<SecretUsage>,
    }
}

element! {
    /// `<usage>`: one child says what it is for.
    pub struct SecretUsage {
        /// What it is for.
        need "type" => kind: UsageKind,
        /// The path of an encrypted volume.
        leaf "volume" => volume: Option<String>,
        /// The name of a ceph user, of certificates, of a TPM's state.
        leaf "name" => name: Option<String>,
        /// The name of an iSCSI target.
        leaf "target" => target: Option<String>,
    }
}

impl SecretUsage {
    /// What says what it is for, by its kind: the name of the child, and what that says.
    fn parts(&self) -> [(&'static str, &Option<String>); 3] {
        [("volume", &self.volume), ("name", &self.name), ("target", &self.target)]
    }
}

/// Every element of the format with its attributes, as [`crate::domain::vocabulary`] has it for machines.
pub fn vocabulary() -> Vec<(String, Vec<String>)> {
    FORMAT.vocabulary("secret")
}

impl UsageKind {
    /// The child of `<usage>` that says what a secret of this kind is for.
    pub fn element(self) -> Option<&'static str> {
        match self {
            UsageKind::None => None,
            UsageKind::Volume => Some("volume"),
            UsageKind::Ceph | UsageKind::Tls | UsageKind::Vtpm => Some("name"),
            UsageKind::Iscsi => Some("target"),
        }
    }
}

impl SecretDef {
    /// Reads a document; everything wrong is reported at once. What the format does not know is refused. One without a uuid is
    /// given one.
    pub fn parse(text: &str) -> Result<SecretDef, Vec<Finding>> {
        let mut root = xml::read_within(text, &[], Limits::ACCEPTED).map_err(|finding| vec![finding])?;
        if root.name != "secret" {
            let message = format!("the root is <{}>, and a secret's is <secret>", root.name);
            return Err(vec![Finding::invalid(&root.at, message)]);
        }
        let mut log = Vec::new();
        FORMAT.check_root(&mut root, "secret", &mut log);
        let mut def = SecretDef::read(root, &mut log);
        def.usage.iter().for_each(|usage| check_usage(usage, &mut log));
        if def.uuid.is_nil() {
            def.uuid = Uuid::new_v4();
        }
        log.sort_by_key(|finding| (finding.line, finding.column));
        if log.is_empty() { Ok(def) } else { Err(log) }
    }

    /// Writes it.
    pub fn to_xml(&self) -> String {
        let mut root = self.write("secret");
        // Both are said, whatever was given.
        root.set_attr("ephemeral", if self.is_ephemeral() { "yes" } else { "no" });
        root.set_attr("private", if self.is_private() { "yes" } else { "no" });
        root.write()
    }

    /// The same, which is known to be read again. Error: what stands in the way of that, and what to do about it.
    pub fn write_readable(&self) -> Result<String, String> {
        let text = self.to_xml();
        let why = |findings: Vec<Finding>| findings.first().map(ToString::to_string).unwrap_or_default();
        match SecretDef::parse(&text).map_err(why) {
            Ok(read) if read.id() == self.id() => Ok(text),
            Ok(_) => Err("XML cannot hold the text that says what it is for; choose another".to_owned()),
            Err(why) => Err(format!("as it would be kept it could not be read again ({why}); shorten its texts")),
        }
    }

    /// A secret of that kind and use.
    pub fn of(uuid: Uuid, kind: UsageKind, id: &str) -> SecretDef {
        let mut usage = SecretUsage { kind, ..SecretUsage::default() };
        let text = Some(id.to_owned());
        match kind.element() {
            None => {}
            Some("volume") => usage.volume = text,
            Some("target") => usage.target = text,
            Some(_) => usage.name = text,
        }
        let usage = (kind != UsageKind::None).then_some(usage);
        SecretDef { uuid, usage, ..SecretDef::default() }
    }

    /// Whether it ends with virtd.
    pub fn is_ephemeral(&self) -> bool {
        self.ephemeral == Some(true)
    }

    /// Whether its value is told to nobody.
    pub fn is_private(&self) -> bool {
        self.private == Some(true)
    }

    /// What it is for.
    pub fn kind(&self) -> UsageKind {
        self.usage.as_ref().map(|usage| usage.kind).unwrap_or_default()
    }

    /// For which volume, user or target; empty if it is for none.
    pub fn id(&self) -> &str {
        let said = self.usage.iter().flat_map(SecretUsage::parts).find_map(|(_, said)| said.as_deref());
        said.unwrap_or_default()
    }
}

fn check_usage(usage: &SecretUsage, log: &mut Vec<Finding>) {
    let (kind, wanted) = (usage.kind, usage.kind.element());
    for (name, said) in usage.parts() {
        let place = usage.at.child(name);
        match said {
            Some(_) if Some(name) != wanted => {
                log.push(Finding::invalid(&place, format!("a secret of type '{kind}' has no <{name}>")));
            }
            Some(text) if text.is_empty() || text.len() > LONGEST_USAGE || text.chars().any(char::is_control) => {
                let message = format!("<{name}> is a text of 1 to {LONGEST_USAGE} bytes without control characters");
                log.push(Finding::invalid(&place, message));
            }
            None if Some(name) == wanted => {
                log.push(Finding::invalid(&usage.at, format!("a secret of type '{kind}' needs <{name}>")));
            }
            _ => {}
        }
    }
}

/// How a machine, or a volume, names a secret.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SecretName {
    /// By its uuid.
    Uuid(Uuid),
    /// By what it is for.
    Usage(UsageKind, Box<str>),
}

impl SecretName {
    /// What a reference means where a secret of that kind is wanted.
    pub fn of(reference: &SecretRef, wanted: UsageKind) -> Option<SecretName> {
        let kind = match reference.kind {
            Some(SecretKind::Ceph) => UsageKind::Ceph,
            Some(SecretKind::Iscsi) => UsageKind::Iscsi,
            Some(SecretKind::Volume) => UsageKind::Volume,
            Some(SecretKind::Passphrase) | None => wanted,
        };
        let usage = || reference.usage.as_deref().map(|usage| SecretName::Usage(kind, usage.into()));
        reference.uuid.map(SecretName::Uuid).or_else(usage)
    }

    /// What a word means by which a volume's secret is named: its uuid, or what it is for.
    pub fn of_volume(word: &str) -> SecretName {
        match Uuid::try_parse(word) {
            Ok(uuid) => SecretName::Uuid(uuid),
            Err(_) => SecretName::Usage(UsageKind::Volume, word.into()),
        }
    }

    /// The secret by which a client proves itself to a server.
    pub fn of_auth(auth: &Auth, protocol: Option<Protocol>) -> Option<SecretName> {
        let wanted = if protocol == Some(Protocol::Rbd) { UsageKind::Ceph } else { UsageKind::Iscsi };
        SecretName::of(auth.secret.as_ref()?, wanted)
    }
}

impl std::fmt::Display for SecretName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SecretName::Uuid(uuid) => write!(f, "with uuid '{uuid}'"),
            SecretName::Usage(_, usage) => write!(f, "for '{}'", xml::shorten(usage)),
        }
    }
}

/// The device of a machine that needs a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretUser {
    /// The disk of that target.
    Disk(Box<str>),
    /// The TPM.
    Tpm,
}

impl SecretUser {
    /// What is said of it among the users of the secret.
    pub fn place(&self) -> &str {
        match self {
            SecretUser::Disk(target) => target,
            SecretUser::Tpm => "tpm",
        }
    }

    /// Where it stands in a machine's document.
    pub fn path(&self) -> &'static str {
        match self {
            SecretUser::Disk(_) => "/devices/disk",
            SecretUser::Tpm => "/devices/tpm/backend/encryption",
        }
    }

    /// The only kind of secret that it takes, besides those that are for nothing in particular. `None`: it takes any.
    pub fn only_takes(&self) -> Option<UsageKind> {
        match self {
            SecretUser::Disk(_) => None,
            SecretUser::Tpm => Some(UsageKind::Vtpm),
        }
    }
}

impl std::fmt::Display for SecretUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SecretUser::Disk(target) => write!(f, "disk '{target}'"),
            SecretUser::Tpm => f.write_str("the TPM"),
        }
    }
}

impl DomainDef {
    /// The secrets that it names, each with the device that needs it.
    pub fn secret_names(&self) -> Vec<(SecretUser, SecretName)> {
        let mut named = Vec::new();
        for disk in &self.devices.disks {
            let user = || SecretUser::Disk(disk.target.dev.as_str().into());
            let mut add = |name: Option<SecretName>| named.extend(name.map(|name| (user(), name)));
            let mut layer = disk.backing.as_deref();
            let mut sources: Vec<_> = disk.source.iter().collect();
            while let Some(store) = layer {
                sources.extend(store.source.as_ref());
                layer = store.backing.as_deref();
            }
            let protocol = disk.source.as_ref().and_then(|source| source.protocol);
            disk.auth.iter().for_each(|auth| add(SecretName::of_auth(auth, protocol)));
            let outer = disk.encryption.iter().flat_map(|encryption| &encryption.secrets);
            outer.for_each(|secret| add(SecretName::of(secret, UsageKind::Volume)));
            for source in sources {
                source.auth.iter().for_each(|auth| add(SecretName::of_auth(auth, source.protocol)));
                let inner = source.encryption.iter().flat_map(|encryption| &encryption.secrets);
                inner.for_each(|secret| add(SecretName::of(secret, UsageKind::Volume)));
            }
        }
        let encrypted = self.devices.tpms.iter().filter_map(|tpm| tpm.backend.encryption.as_ref());
        named.extend(encrypted.map(|encryption| (SecretUser::Tpm, SecretName::Uuid(encryption.secret))));
        named
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f";

    #[test]
    fn documents_come_back_as_they_were() {
        for (kind, child, id) in [
            ("volume", "volume", "/var/lib/libvirt/images/puppyname.img"),
            ("ceph", "name", "client.libvirt secret"),
            ("iscsi", "target", "iqn.2013-07.com.example:iscsi-pool"),
            ("tls", "name", "TLS_example"),
            ("vtpm", "name", "VTPM_example"),
        ] {
            let text = format!(
                "<secret ephemeral=\"no\" private=\"yes\">\n  <uuid>{UUID}</uuid>\n  <description>for &lt;{id}&gt;</description>\n  \
                 <usage type=\"{kind}\">\n    <{child}>{id}</{child}>\n  </usage>\n</secret>\n"
            );
            let def = SecretDef::parse(&text).unwrap();
            assert_eq!((def.kind().as_str(), def.id(), def.is_private(), def.is_ephemeral()), (kind, id, true, false));
            let written = def.to_xml();
            assert_eq!(written.replace('\'', "\""), text);
            assert_eq!(SecretDef::parse(&written).unwrap().to_xml(), written);
            assert_eq!(SecretDef::of(def.uuid, def.kind(), id).id(), id);
        }
        let short = SecretDef::parse("<secret/>").unwrap();
        assert!(!short.uuid.is_nil() && short.id().is_empty() && short.kind() == UsageKind::None);
        assert!(short.to_xml().contains("ephemeral='no' private='no'"), "{}", short.to_xml());
    }

    #[test]
    fn what_is_not_understood_is_refused_where_it_stands() {
        for (text, line, words) in [
            ("<domain/>", 1, "a secret's is <secret>"),
            ("<secret>\n<value>x</value></secret>", 2, "unknown element <value>"),
            ("<secret\nlength='5'/>", 2, "unknown attribute 'length'"),
            ("<secret>\n<uuid>x</uuid></secret>", 2, "UUID"),
            ("<secret ephemeral='maybe'/>", 1, "yes"),
            ("<secret>\nhush</secret>", 1, "<secret> has no text"),
            ("<secret>\n<usage type='tls'>hush<name>a</name></usage></secret>", 2, "<usage> has no text"),
            (
                "<secret>\n<description>a</description>\n<description>b</description></secret>",
                3,
                "a second <description>",
            ),
            ("<secret>\n<usage type='disk'/></secret>", 2, "one of none, volume, ceph"),
            ("<secret>\n<usage type='volume'/></secret>", 2, "needs <volume>"),
            ("<secret>\n<usage type='ceph'>\n<target>x</target></usage></secret>", 2, "needs <name>"),
            ("<secret>\n<usage type='none'><name>x</name></usage></secret>", 2, "has no <name>"),
            ("<secret>\n<usage type='tls'><name></name></usage></secret>", 2, "1 to 1024 bytes"),
        ] {
            let findings = SecretDef::parse(text).unwrap_err();
            let found = findings.iter().any(|one| one.message.contains(words) && one.line >= line);
            assert!(found, "{text}: {findings:?}");
        }
    }

    #[test]
    fn what_would_not_be_read_again_is_not_written() {
        let of = |usage: &str| SecretDef::of(Uuid::from_u128(1), UsageKind::Volume, usage);
        assert!(of("/srv/a.img").write_readable().is_ok());
        for usage in ["", "a\nb", "a\0b", &"x".repeat(LONGEST_USAGE + 1)] {
            assert!(of(usage).write_readable().is_err(), "{usage:?}");
        }
        // It grows as it is written.
        let text = format!("<secret><description>{}</description></secret>", ">".repeat(Limits::ACCEPTED.size / 3));
        let def = SecretDef::parse(&text).expect("it is short enough as it is");
        let why = def.write_readable().expect_err("too long");
        assert!(why.contains("shorten its texts"), "{why}");
    }

    #[test]
    fn a_machine_names_its_secrets() {
        let xml = format!(
            "<domain type='test'><name>a</name><memory>65536</memory><os><type>hvm</type></os><devices>\
             <disk type='file'><source file='/a'><encryption format='luks'><secret type='passphrase' uuid='{UUID}'/></encryption>\
             </source><target dev='vda'/></disk>\
             <disk type='network'><source protocol='rbd' name='p/i'><auth username='u'><secret type='ceph' usage='x'/></auth></source>\
             <target dev='vdb'/></disk>\
             <tpm><backend type='emulator'><encryption secret='{UUID}'/></backend></tpm></devices></domain>"
        );
        let def = DomainDef::parse(&xml).unwrap();
        let uuid = SecretName::Uuid(Uuid::try_parse(UUID).unwrap());
        let disk = |target: &str| SecretUser::Disk(target.into());
        let ceph = SecretName::Usage(UsageKind::Ceph, "x".into());
        assert_eq!(def.secret_names(), [(disk("vda"), uuid.clone()), (disk("vdb"), ceph), (SecretUser::Tpm, uuid)]);
    }
}
