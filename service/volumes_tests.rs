use super::*;
use virt_model::domain::Form;

/// Where that volume is: one whose name begins so is a device.
fn place(name: &str) -> VolumePlace {
    let kind = if name.starts_with("dev") { VolumeKind::Block } else { VolumeKind::File };
    VolumePlace { path: Path::new("/pool").join(name), kind }
}

/// Has volume `v` of pool `p`, an overlay on `base`, which is encrypted; `idle` is inactive.
struct Fake;

fn image(name: &str, format: &str, secret: Option<&str>) -> VolumeImage {
    VolumeImage {
        place: place(name),
        format: format.to_owned(),
        encrypted: secret.is_some(),
        secret: secret.map(str::to_owned),
    }
}

impl VolumeKeeper for Fake {
    fn stands_on(&self, _: &Path, _: Option<&Path>) -> Result<()> {
        Ok(())
    }

    fn place(&self, pool: &str, volume: &str) -> Option<VolumePlace> {
        (pool == "p").then(|| place(volume))
    }

    fn find(&self, pool: &str, volume: &str, whole: bool) -> Result<Vec<VolumeImage>> {
        let mut images = match (pool, volume) {
            ("idle", _) => return Err(Error::OperationInvalid("pool 'idle' is inactive".to_owned())),
            ("p", "v") => vec![image("v", "qcow2", None), image("base", "luks", Some("key"))],
            ("p", "locked") => vec![VolumeImage { secret: None, ..image("locked", "qcow2", Some("")) }],
            ("p", "device") => vec![image("device", "raw", None)],
            ("p", "on-device") => vec![image("on-device", "qcow2", None), image("device", "raw", None)],
            ("p", "luks") => vec![image("luks", "luks", Some("0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f"))],
            ("p", _) => return Err(Error::NoSuchVolume("pool 'p' has no such volume".to_owned())),
            _ => return Err(Error::NoSuchPool { what: "name", value: pool.to_owned() }),
        };
        images.truncate(if whole { images.len() } else { 1 });
        Ok(images)
    }

    fn refuse_lost(&self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn start(&self, _: Caller, _: String) -> Answer<'_> {
        Box::pin(async { Ok(()) })
    }

    fn resizes<'a>(&'a self, _: PathBuf, _: u32, _: u64, work: Answer<'a>) -> Answer<'a> {
        work
    }

    fn settles(&self, _: String) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {})
    }
}

fn volumes() -> Volumes {
    let volumes = Volumes::default();
    volumes.kept_by(Box::new(Fake));
    volumes
}

fn machine(source: &str, more: &str) -> Arc<DomainDef> {
    let text = format!(
        "<domain type='test'><name>web</name><memory>1024</memory><devices><disk type='volume'>{more}<source {source}/>\
         <target dev='vda' bus='virtio'/></disk></devices></domain>"
    );
    let mut def = DomainDef::parse(&text).expect("a domain");
    def.fill_defaults();
    Arc::new(def)
}

fn plugged(source: &str, more: &str) -> Result<Disk> {
    let mut def = machine(source, more);
    volumes().plug(&mut def).map(|()| def.devices.disks[0].clone())
}

#[test]
fn a_volume_becomes_the_file_that_it_is_with_what_it_stands_on() {
    let disk = plugged("pool='p' volume='v' file='/etc/shadow'", "").expect("plugged");
    assert_eq!((disk.kind(), disk.path(), disk.format()), (DiskKind::File, Some("/pool/v"), Some("qcow2")));
    assert_eq!(disk.volume(), Some(("p", "v")), "it is that volume still");
    assert_eq!(disk.files(), [Path::new("/pool/v"), Path::new("/pool/base")]);
    let base = disk.backing.as_deref().expect("it stands on another");
    assert_eq!(base.format.as_ref().map(|format| &*format.name), Some("raw"));
    let key = base.source.as_ref().and_then(|source| source.encryption.as_ref()).expect("its key");
    assert_eq!(key.secrets[0].usage.as_deref(), Some("key"));
    assert!(base.backing.as_deref().is_some_and(BackingStore::is_end), "the chain is told to its end");
    let luks = plugged("pool='p' volume='luks'", "").expect("plugged");
    assert_eq!(luks.format(), Some("raw"));
    assert!(luks.encryption().expect("its key").secrets[0].uuid.is_some());
    // What the document says counts more.
    let said = plugged("pool='p' volume='luks'", "<driver type='qcow2'/><backingStore/>").expect("plugged");
    assert!(said.format() == Some("qcow2") && said.encryption().is_none());
    assert_eq!(said.files(), [Path::new("/pool/luks")]);
}

const LAYER: &str =
    "<driver name='qemu' type='qcow2'/><backingStore type='volume'><source pool='p' volume='v'/></backingStore>";

#[test]
fn a_layer_that_is_a_volume_becomes_its_file_and_is_known_by_its_name() {
    let text = format!(
        "<domain type='test'><name>web</name><memory>1024</memory><devices><disk type='file'>{LAYER}<source file='/a'/>\
         <target dev='vda' bus='virtio'/></disk></devices></domain>"
    );
    let mut def = DomainDef::parse(&text).expect("a domain");
    def.fill_defaults();
    let stored = Arc::new(def);
    let mut live = stored.clone();
    volumes().plug(&mut live).expect("plugged");
    let disk = &live.devices.disks[0];
    assert_eq!(disk.files(), [Path::new("/a"), Path::new("/pool/v"), Path::new("/pool/base")]);
    let below = disk.backing.as_deref().expect("a layer");
    assert_eq!((below.kind(), below.volume()), (DiskKind::File, Some(("p", "v"))));
    assert_eq!(below.format.as_ref().map(|format| &*format.name), Some("qcow2"));
    assert_eq!(live.pending_changes(&stored), [], "what is stored is no other");
    let (kept, _) =
        crate::stored::StoredDef::write(&live, virt_model::xml::Limits::STORED).expect("it can be read again");
    assert!(!kept.text().contains("/pool/v'"), "{}", kept.text());
    let images: Vec<PathBuf> = kept.disks.iter().flat_map(|disk| disk.files.to_vec()).collect();
    assert_eq!(images[..2], [PathBuf::from("/a"), by_name("p", "v")]);
    let mut placed = stored.clone();
    volumes().place(&mut placed);
    assert_eq!(placed.devices.disks[0].files()[1], Path::new("/pool/v"));
    let other = Arc::new(DomainDef::parse(&text.replace("volume='v'", "volume='none'")).expect("a domain"));
    let missing = volumes().missing_in(&other);
    assert!(missing[0].message.contains("disk 'vda': pool 'p' has no such volume"), "{missing:?}");
    assert!(pools_of(&other) == ["p"] && !live.pending_changes(&other).is_empty());
    assert!(
        DomainDef::parse(&text.replace(" volume='v'", "")).unwrap_err()[0].message.contains("a layer of type='volume'")
    );
}

#[test]
fn a_volume_that_is_a_device_is_told_as_one() {
    let disk = plugged("pool='p' volume='device' file='/etc/shadow'", "").expect("plugged");
    assert_eq!((disk.kind(), disk.path(), disk.format()), (DiskKind::Block, Some("/pool/device"), Some("raw")));
    let disk = plugged("pool='p' volume='on-device'", "").expect("plugged");
    let base = disk.backing.as_deref().expect("it stands on the device");
    assert_eq!((base.kind, base.path()), (Some(DiskKind::Block), Some("/pool/device")));
    let stored = machine("pool='p' volume='device'", "");
    let mut live = stored.clone();
    volumes().plug(&mut live).expect("plugged");
    assert!(live.write(Form::LIVE).contains("dev='/pool/device'"));
    assert_eq!(live.pending_changes(&stored), []);
    let mut placed = stored.clone();
    volumes().place(&mut placed);
    assert_eq!(placed.devices.disks[0].kind(), DiskKind::Block);
}

#[test]
fn a_layer_that_is_a_volume_in_a_group_becomes_its_device() {
    let layer = |volume: &str| LAYER.replace("volume='v'", &format!("volume='{volume}' file='/etc/shadow'"));
    let stored = machine("pool='p' volume='v'", &layer("device"));
    let (mut live, mut placed) = (stored.clone(), stored.clone());
    volumes().plug(&mut live).expect("plugged");
    volumes().place(&mut placed);
    for def in [&live, &placed] {
        let below = def.devices.disks[0].backing.as_deref().expect("a layer");
        assert_eq!((below.kind(), below.path()), (DiskKind::Block, Some("/pool/device")));
        assert!(below.source.as_ref().is_some_and(|source| source.file.is_none()), "nothing else is said of it");
    }
    let below = live.devices.disks[0].backing.as_deref().expect("a layer");
    assert_eq!(below.format.as_ref().map(|format| &*format.name), Some("raw"));
    let (kept, _) =
        crate::stored::StoredDef::write(&live, virt_model::xml::Limits::STORED).expect("it can be read again");
    assert!(!kept.text().contains("/pool/device"), "{}", kept.text());
    // Nobody knows such a pool: what the document said of its place is not believed.
    let mut elsewhere = machine("pool='p' volume='v'", &layer("device").replace("pool='p'", "pool='other'"));
    volumes().place(&mut elsewhere);
    let below = elsewhere.devices.disks[0].backing.as_deref().expect("a layer");
    assert_eq!((below.kind(), below.path()), (DiskKind::Volume, None));
}

#[test]
fn what_is_missing_is_told_with_machine_and_disk() {
    for (source, why) in [
        ("pool='p' volume='none'", "domain 'web', disk 'vda': pool 'p' has no such volume"),
        ("pool='idle' volume='v'", "domain 'web', disk 'vda': pool 'idle' is inactive"),
        ("pool='q' volume='v'", "'q'"),
        ("pool='p' volume='locked'", "is encrypted"),
    ] {
        let error = plugged(source, "").expect_err(source).to_string();
        assert!(error.contains(why), "{error}");
        let def = machine(source, "");
        let findings = volumes().missing_in(&def);
        assert!(matches!(&findings[..], [finding] if finding.message.contains(why)), "{findings:?}");
        assert_eq!(def, machine(source, "").with_uuid_of(&def), "it is only looked at");
    }
}

trait WithUuid {
    fn with_uuid_of(self, other: &DomainDef) -> Self;
}

impl WithUuid for Arc<DomainDef> {
    fn with_uuid_of(mut self, other: &DomainDef) -> Self {
        Arc::make_mut(&mut self).uuid = other.uuid;
        self
    }
}

#[test]
fn what_is_stored_names_a_volume_and_is_no_other_than_what_runs() {
    let stored = machine("pool='p' volume='v'", "");
    let mut live = stored.clone();
    volumes().plug(&mut live).expect("plugged");
    assert!(live.write(Form::LIVE).contains("file='/pool/v'"));
    assert_eq!(live.pending_changes(&stored), []);
    let (kept, read) =
        crate::stored::StoredDef::write(&live, virt_model::xml::Limits::STORED).expect("it can be read again");
    assert!(!kept.text().contains("/pool/v'"), "{}", kept.text());
    assert_eq!(read.devices.disks[0].kind(), DiskKind::Volume);
    // Its image is known by its name, which leads to its place.
    let images: Vec<PathBuf> = kept.disks.iter().flat_map(|disk| disk.files.to_vec()).collect();
    assert_eq!(images[0], by_name("p", "v"));
    assert_eq!(volumes().path_of(&images[0]).as_deref(), Some(Path::new("/pool/v")));
    assert_eq!(volumes().path_of(Path::new("/a")).as_deref(), Some(Path::new("/a")));
    let other = machine("pool='p' volume='luks'", "");
    assert!(!live.pending_changes(&other).is_empty(), "another volume is another disk");
}

#[test]
fn a_layer_that_is_frozen_is_a_file() {
    let mut disk = plugged("pool='p' volume='v'", "").expect("plugged");
    disk.stand_on(Path::new("/pool/v.s"), false, "qcow2");
    assert_eq!((disk.kind, disk.volume()), (Some(DiskKind::File), None));
    let below = disk.backing.as_deref().expect("a layer");
    assert_eq!((below.kind, below.path()), (Some(DiskKind::File), Some("/pool/v")));
    assert_eq!(below.source.as_ref().and_then(DiskSource::volume), None);
}
