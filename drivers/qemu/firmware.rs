//! The host's firmware: what its descriptors say (QEMU's `firmware.json` format), and which of it a definition gets.
//!
//! Descriptors are read in the order of their names, from the administrator's folder before the distributor's; the first
//! that fits is taken, once, and written into the definition, so that a machine keeps the firmware it was made with.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::domain::DomainDef;
use virt_model::domain::features::{Features, Smm};
use virt_model::domain::os::{FirmwareFeature, FirmwareFeatures, FirmwareKind, Loader, LoaderKind, Nvram, Os};

/// Where descriptors are; of two with one name the earlier folder's counts.
pub const FOLDERS: [&str; 2] = ["/etc/qemu/firmware", "/usr/share/qemu/firmware"];

/// Larger than any descriptor.
const MAX_DESCRIPTOR: u64 = 1 << 20;

/// The format of variable stores that we make: one that can hold snapshots.
const STORE_FORMAT: &str = "qcow2";

/// One firmware.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Firmware {
    /// What it is, for people.
    #[serde(default)]
    pub description: String,
    interface_types: BTreeSet<String>,
    mapping: Mapping,
    targets: Vec<Target>,
    #[serde(default)]
    features: BTreeSet<String>,
}

/// How it gets into the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "device", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
enum Mapping {
    Flash { executable: Image, nvram_template: Option<Image>, mode: Option<FlashMode> },
    Memory { filename: String },
    Kernel { filename: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FlashMode {
    Split,
    Combined,
    Stateless,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Image {
    filename: String,
    format: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Target {
    architecture: String,
    machines: Vec<String>,
}

/// All descriptors in `folders`, in the order in which they are tried. One that cannot be read is logged and passed over;
/// an empty one hides those of its name in later folders.
pub fn read_all(folders: &[&Path]) -> Vec<Firmware> {
    let mut files: BTreeMap<std::ffi::OsString, PathBuf> = BTreeMap::new();
    for folder in folders {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "json") {
                files.entry(entry.file_name()).or_insert_with(|| entry.path());
            }
        }
    }
    files.values().filter_map(|path| read(path)).collect()
}

fn read(path: &Path) -> Option<Firmware> {
    let size = std::fs::metadata(path).map_or(0, |meta| meta.len());
    if size == 0 {
        return None;
    }
    let read = if size > MAX_DESCRIPTOR { Err("it is too large".to_owned()) } else { parse(path) };
    read.inspect_err(|why| tracing::warn!("firmware descriptor {}: {why}", path.display())).ok()
}

fn parse(path: &Path) -> Result<Firmware, String> {
    let text = std::fs::read(path).map_err(|e| e.to_string())?;
    serde_json::from_slice(&text).map_err(|e| e.to_string())
}

impl Firmware {
    fn has(&self, feature: &str) -> bool {
        self.features.contains(feature)
    }

    fn code(&self) -> Option<&Image> {
        match &self.mapping {
            Mapping::Flash { executable, .. } => Some(executable),
            _ => None,
        }
    }

    fn template(&self) -> Option<&Image> {
        match &self.mapping {
            Mapping::Flash { nvram_template, .. } => nvram_template.as_ref(),
            _ => None,
        }
    }

    fn is_stateless(&self) -> bool {
        matches!(self.mapping, Mapping::Flash { mode: Some(FlashMode::Stateless), .. })
    }

    /// The file that a `<loader>` names to have it.
    pub fn loader(&self) -> Option<&str> {
        match &self.mapping {
            Mapping::Flash { executable, .. } => Some(&executable.filename),
            Mapping::Memory { filename } => Some(filename),
            Mapping::Kernel { .. } => None,
        }
    }

    /// Whether it is for that machine of an emulator of that architecture (in QEMU's words).
    pub fn runs_on(&self, arch: &str, machine: &str) -> bool {
        let fits = |pattern: &String| glob(pattern.as_bytes(), machine.as_bytes());
        self.targets.iter().any(|target| target.architecture == arch && target.machines.iter().any(fits))
    }

    /// Why a definition does not get it.
    fn objection(&self, wish: &Wish) -> Option<&'static str> {
        let interface = if wish.kind == FirmwareKind::Efi { "uefi" } else { "bios" };
        let lacks = |feature: &str, wanted: Option<bool>| wanted.is_some_and(|wanted| wanted != self.has(feature));
        if !self.interface_types.contains(interface) {
            return Some("it is of another kind");
        }
        if !self.runs_on(&wish.arch, &wish.machine) {
            return Some("it is for other machines");
        }
        if lacks("secure-boot", wish.secure_boot) {
            return Some("of its 'secure-boot'");
        }
        if lacks("enrolled-keys", wish.enrolled_keys) {
            return Some("of its 'enrolled-keys'");
        }
        if wish.secure.is_some_and(|secure| secure != self.has("requires-smm")) {
            return Some("of <loader secure=…>");
        }
        if wish.smm == Some(false) && self.has("requires-smm") {
            return Some("it needs <smm state='on'/>");
        }
        self.form_objection(wish)
    }

    fn form_objection(&self, wish: &Wish) -> Option<&'static str> {
        let Mapping::Flash { executable, mode, .. } = &self.mapping else {
            let rom = matches!(self.mapping, Mapping::Memory { .. }) && wish.loader != Some(LoaderKind::Pflash);
            return (!rom).then_some("it is no flash");
        };
        if wish.loader == Some(LoaderKind::Rom) {
            return Some("of <loader type='rom'>");
        }
        if wish.stateless.is_some_and(|stateless| stateless != self.is_stateless()) {
            return Some("of <loader stateless=…>");
        }
        if *mode == Some(FlashMode::Combined) {
            return Some("its code and variables are one image");
        }
        let format = wish.format.as_deref();
        format.is_some_and(|wanted| wanted != executable.format).then_some("of <loader format=…>")
    }
}

/// What a definition asks of its firmware.
struct Wish {
    kind: FirmwareKind,
    arch: String,
    machine: String,
    secure_boot: Option<bool>,
    enrolled_keys: Option<bool>,
    secure: Option<bool>,
    smm: Option<bool>,
    loader: Option<LoaderKind>,
    stateless: Option<bool>,
    format: Option<String>,
}

impl Wish {
    fn of(def: &DomainDef, kind: FirmwareKind) -> Wish {
        let os = &def.os;
        let features = os.features.as_ref().map(|f| f.features.as_slice()).unwrap_or_default();
        let feature = |name: &str| features.iter().find(|f| f.name == name).map(|f| f.enabled.unwrap_or(true));
        let loader = os.loader.as_ref();
        Wish {
            kind,
            arch: os.kind.arch.clone().unwrap_or_default(),
            machine: os.kind.machine.clone().unwrap_or_default(),
            secure_boot: feature("secure-boot"),
            enrolled_keys: feature("enrolled-keys"),
            secure: loader.and_then(|l| l.secure),
            smm: def.features.as_ref().and_then(|f| f.smm.as_ref()).map(Smm::is_on),
            loader: loader.and_then(|l| l.kind),
            stateless: loader.and_then(|l| l.stateless),
            format: loader.and_then(|l| l.format.clone()),
        }
    }
}

/// Picks the firmware where the definition leaves that to us, and the variables' template where it names only the code.
/// Where nothing fits, the definition stays as it is, and [`missing`] says why.
pub fn choose(def: &mut DomainDef, known: &[Firmware]) {
    let named = def.os.loader.as_ref().and_then(|loader| loader.path.clone());
    match (def.os.firmware, named) {
        (Some(kind), None) => {
            let wish = Wish::of(def, kind);
            if let Some(firmware) = known.iter().find(|firmware| firmware.objection(&wish).is_none()) {
                apply(def, firmware);
            }
        }
        (_, Some(path)) => {
            let of_flash = |f: &&Firmware| f.code().is_some_and(|image| image.filename == path);
            if let Some(firmware) = known.iter().find(of_flash) {
                find_template(&mut def.os, firmware);
            }
        }
        (None, None) => {}
    }
}

/// Why no firmware was picked for a definition that asks for one; names each candidate's objection.
pub fn missing(def: &DomainDef, known: &[Firmware]) -> Option<String> {
    let kind = def.os.firmware.filter(|_| def.os.loader.as_ref().is_none_or(|loader| loader.path.is_none()))?;
    // QEMU brings a BIOS of its own.
    (kind != FirmwareKind::Bios).then(|| {
        let why = objections(known, &Wish::of(def, kind));
        format!("no firmware of this host fits firmware='{kind}': {why}; define the domain again when there is one")
    })
}

/// Each kind of objection once, with the firmware it is about.
fn objections(known: &[Firmware], wish: &Wish) -> String {
    if known.is_empty() {
        return format!("there is none described in {} (Debian has it in the package ovmf)", FOLDERS.join(" or "));
    }
    let reasons = known.iter().filter_map(|f| Some(format!("not '{}', because {}", f.description, f.objection(wish)?)));
    reasons.collect::<Vec<_>>().join("; ")
}

/// Writes the choice down.
fn apply(def: &mut DomainDef, firmware: &Firmware) {
    let os = &mut def.os;
    let loader = os.loader.get_or_insert_with(Loader::default);
    match &firmware.mapping {
        Mapping::Flash { executable, .. } => {
            loader.kind = Some(LoaderKind::Pflash);
            loader.readonly.get_or_insert(true);
            loader.path = Some(executable.filename.clone());
            if executable.format != "raw" {
                loader.format = Some(executable.format.clone());
            }
            if firmware.is_stateless() {
                loader.stateless = Some(true);
            }
        }
        Mapping::Memory { filename } | Mapping::Kernel { filename } => {
            loader.kind = Some(LoaderKind::Rom);
            loader.path = Some(filename.clone());
        }
    }
    if firmware.has("requires-smm") {
        loader.secure = Some(true);
    }
    find_template(os, firmware);
    let listed = ["enrolled-keys", "secure-boot"];
    let feature = |name: &&str| FirmwareFeature {
        enabled: Some(firmware.has(name)),
        name: (*name).to_owned(),
        ..FirmwareFeature::default()
    };
    if os.firmware == Some(FirmwareKind::Efi) {
        let features = os.features.get_or_insert_with(FirmwareFeatures::default);
        features.features = listed.iter().map(feature).collect();
    }
    if firmware.has("requires-smm") {
        let features = def.features.get_or_insert_with(Features::default);
        features.smm.get_or_insert_with(|| Smm { state: Some(true), ..Smm::default() });
    }
}

/// Says what the variables are made from, if the guest is to have any.
fn find_template(os: &mut Os, firmware: &Firmware) {
    let stateless = os.loader.as_ref().is_some_and(|l| l.stateless == Some(true) || l.kind == Some(LoaderKind::Rom));
    let Some(template) = firmware.template().filter(|_| !stateless) else { return };
    let nvram = os.nvram.get_or_insert_with(Nvram::default);
    if nvram.template.is_none() {
        nvram.template = Some(template.filename.clone());
        // Of a store that is named, the format is as it says, and raw if it does not.
        let store = match (&nvram.path, &nvram.format) {
            (None, None) => STORE_FORMAT.to_owned(),
            (_, format) => format.clone().unwrap_or_else(|| "raw".to_owned()),
        };
        if store != template.format {
            nvram.template_format.get_or_insert_with(|| template.format.clone());
        }
    }
}

/// Says where the variables are kept that no file is named for, below `state_dir`: by the domain's uuid, which a new name
/// does not change.
pub fn place_variables(def: &mut DomainDef, state_dir: &Path) {
    let [qcow2, raw] = variables_below(state_dir, def.uuid);
    let Some(nvram) = def.os.nvram.as_mut().filter(|nvram| nvram.path.is_none()) else { return };
    if nvram.template.is_none() {
        return;
    }
    let format = nvram.format.get_or_insert_with(|| STORE_FORMAT.to_owned());
    let path = if format == "qcow2" { qcow2 } else { raw };
    nvram.path = Some(path.to_string_lossy().into_owned());
}

/// Where a guest's variables may be that no file was named for: in qcow2, and raw.
pub fn variables_below(state_dir: &Path, guest: Uuid) -> [PathBuf; 2] {
    ["qcow2", "fd"].map(|suffix| state_dir.join("nvram").join(format!("{guest}_VARS.{suffix}")))
}

/// Whether a name fits a shell pattern; descriptors use `*` only, and `?` costs nothing.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=name.len()).any(|n| glob(rest, &name[n..])),
        (Some((b'?', rest)), Some((_, tail))) => glob(rest, tail),
        (Some((a, rest)), Some((b, tail))) => a == b && glob(rest, tail),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(machine: &str, os: &str, features: &str) -> DomainDef {
        DomainDef::parse(&format!(
            "<domain type='qemu'><name>f</name><memory>65536</memory><os firmware='efi'><type arch='x86_64' \
             machine='{machine}'>hvm</type>{os}</os><features><acpi/>{features}</features></domain>"
        ))
        .unwrap()
    }

    /// As Debian 12's package ovmf describes its firmware.
    fn debian() -> Vec<Firmware> {
        let one = |name: &str, vars: &str, machines: &[&str], features: &[&str]| {
            serde_json::from_value(serde_json::json!({
                "description": name, "interface-types": ["uefi"], "tags": [], "features": features,
                "mapping": {"device": "flash", "executable": {"filename": format!("/fw/{name}"), "format": "raw"},
                            "nvram-template": {"filename": format!("/fw/{vars}"), "format": "raw"}},
                "targets": [{"architecture": "x86_64", "machines": machines}],
            }))
            .unwrap()
        };
        vec![
            one("enrolled", "vars.ms", &["pc-q35-*"], &["enrolled-keys", "requires-smm", "secure-boot"]),
            one("secure", "vars", &["pc-q35-*"], &["requires-smm", "secure-boot"]),
            one("plain", "vars", &["pc-i440fx-*", "pc-q35-*"], &["acpi-s3"]),
        ]
    }

    fn chosen(def: &mut DomainDef) -> String {
        choose(def, &debian());
        def.os.loader.as_ref().unwrap().path.clone().unwrap()
    }

    #[test]
    fn the_first_that_fits_is_taken_and_written_down() {
        let mut def = domain("pc-q35-7.2", "", "");
        assert_eq!(chosen(&mut def), "/fw/enrolled");
        place_variables(&mut def, Path::new("/state"));
        let loader = def.os.loader.clone().unwrap();
        assert_eq!((loader.secure, loader.readonly), (Some(true), Some(true)));
        assert!(def.features.as_ref().unwrap().smm.as_ref().unwrap().is_on());
        let nvram = def.os.nvram.clone().unwrap();
        assert_eq!(nvram.path.unwrap(), format!("/state/nvram/{}_VARS.qcow2", def.uuid));
        assert_eq!(nvram.template_format.as_deref(), Some("raw"));
        let before = def.clone();
        choose(&mut def, &[]);
        assert_eq!(def, before, "what was chosen once stays, whatever the host has later");
    }

    #[test]
    fn what_is_asked_for_decides() {
        let secure = |enabled| format!("<firmware><feature enabled='{enabled}' name='secure-boot'/></firmware>");
        assert_eq!(chosen(&mut domain("pc-q35-7.2", &secure("no"), "")), "/fw/plain");
        let keys = "<firmware><feature enabled='yes' name='secure-boot'/><feature enabled='no' name='enrolled-keys'/></firmware>";
        assert_eq!(chosen(&mut domain("pc-q35-7.2", keys, "")), "/fw/secure");
        assert_eq!(chosen(&mut domain("pc-i440fx-7.2", "", "")), "/fw/plain");
        assert_eq!(chosen(&mut domain("pc-q35-7.2", "<loader secure='no'/>", "")), "/fw/plain");
        assert_eq!(chosen(&mut domain("pc-q35-7.2", "", "<smm state='off'/>")), "/fw/plain");
        let mut def = domain("pc-i440fx-7.2", &secure("yes"), "");
        choose(&mut def, &debian());
        let message = missing(&def, &debian()).unwrap();
        assert!(message.contains("'secure', because it is for other machines"), "{message}");
        assert!(message.contains("'plain', because of its 'secure-boot'"), "{message}");
        assert!(missing(&domain("pc-q35-7.2", "", ""), &[]).unwrap().contains("package ovmf"));
    }

    #[test]
    fn code_that_is_named_finds_its_template() {
        let mut def = domain("pc-q35-7.2", "<loader type='pflash'>/fw/plain</loader><nvram>/mine</nvram>", "");
        def.os.firmware = None;
        choose(&mut def, &debian());
        let nvram = def.os.nvram.unwrap();
        assert_eq!((nvram.template.as_deref(), nvram.format.as_deref()), (Some("/fw/vars"), None));
        assert_eq!(nvram.path.as_deref(), Some("/mine"));
    }

    #[test]
    fn an_empty_descriptor_hides_one_of_its_name() {
        let (admin, vendor) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let text = serde_json::to_string(&debian()[2]).unwrap();
        std::fs::write(vendor.path().join("60.json"), &text).unwrap();
        std::fs::write(vendor.path().join("50.json"), "{ broken").unwrap();
        assert_eq!(read_all(&[admin.path(), vendor.path()]).len(), 1);
        std::fs::write(admin.path().join("60.json"), "").unwrap();
        assert!(read_all(&[admin.path(), vendor.path()]).is_empty());
    }
}
