//! Whether images are what the definition says they are: what an image stands on is the definition's to say, and a header
//! that says otherwise is refused, for whoever wrote it (a guest, who made the image) would choose files of the host.

use super::format::known_format;
use crate::host::chain::{Header, is_same_path, place};
use crate::host::workers::{Errand, Workers};
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::device::disk::BackingStore;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::xml::{Finding, Place, escape_attribute};

/// An image, and what it is to stand on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// What it is to the machine: `disk 'vda'`.
    pub whose: String,
    pub path: PathBuf,
    pub format: String,
    pub below: Below,
    /// Where the definition says so.
    pub at: Place,
}

/// What an image is to stand on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Below {
    Nothing,
    /// A file or block device, and its format.
    File(PathBuf, String),
    /// Something on a server that speaks this.
    Server(String),
}

/// All images of a machine whose headers could say something, each layer of its disks among them.
pub fn images(def: &DomainDef) -> Vec<Image> {
    let mut images = Vec::new();
    for disk in &def.devices.disks {
        let whose = format!("disk '{}'", disk.target.dev);
        let layers = disk.chain().filter_map(|layer| Some((layer.path?, layer)));
        images.extend(layers.map(|(path, layer)| image(&whose, path, layer.format, layer.below, layer.at)));
    }
    if let Some(loader) = &def.os.loader
        && let Some(path) = &loader.path
    {
        images.push(image("the firmware", path, loader.format.as_deref(), None, &loader.at));
    }
    if let Some(nvram) = &def.os.nvram {
        let format = nvram.format.as_deref();
        let from = nvram.template_format.as_deref().or(format);
        let own = nvram.path.iter().map(|path| image("the firmware's variables", path, format, None, &nvram.at));
        images.extend(own);
        let template = nvram.template.iter().map(|path| image("the variables' template", path, from, None, &nvram.at));
        images.extend(template);
    }
    images
}

fn image(whose: &str, path: &str, format: Option<&str>, below: Option<&BackingStore>, at: &Place) -> Image {
    let below = match below {
        None => Below::Nothing,
        Some(store) => match (store.path(), store.source.as_ref().and_then(|source| source.protocol)) {
            (Some(path), _) => Below::File(path.into(), plain_format(store.format.as_ref().map(|f| &*f.name))),
            (None, Some(protocol)) => Below::Server(protocol.as_str().to_owned()),
            (None, None) => Below::Nothing,
        },
    };
    Image { whose: whose.to_owned(), path: path.into(), format: plain_format(format), below, at: at.clone() }
}

/// QEMU's name of a format; without one an image is raw.
fn plain_format(format: Option<&str>) -> String {
    let format = format.unwrap_or("raw");
    known_format(format).unwrap_or(format).to_owned()
}

/// What the headers of a machine's images say against its definition. A file that is not there says nothing.
/// Errors: `TimedOut` if a file system does not answer.
pub async fn objections(workers: &Workers, def: &DomainDef) -> Result<Vec<Finding>, DriverError> {
    objections_to(workers, def.uuid, images(def)).await
}

async fn objections_to(workers: &Workers, guest: Uuid, images: Vec<Image>) -> Result<Vec<Finding>, DriverError> {
    let Some(first) = images.first() else { return Ok(Vec::new()) };
    let errand = Errand::new(guest, first.path.display().to_string());
    workers.run(errand, move |_| Ok(images.iter().filter_map(objection).collect())).await
}

/// Refuses a machine whose images are not what its definition says.
pub async fn hold(workers: &Workers, def: &DomainDef) -> Result<(), DriverError> {
    hold_images(workers, def.uuid, images(def)).await
}

/// The same for some images of a machine.
pub async fn hold_images(workers: &Workers, guest: Uuid, images: Vec<Image>) -> Result<(), DriverError> {
    let findings = objections_to(workers, guest, images).await?;
    if findings.is_empty() { Ok(()) } else { Err(DriverError::Config(findings)) }
}

/// What one image says against the definition. Blocks.
fn objection(image: &Image) -> Option<Finding> {
    let why = match Header::read(&image.path, &image.format) {
        Ok(header) => disagreement(image, &header?)?,
        Err(e) => format!("cannot be read: {e}"),
    };
    let (whose, path) = (&image.whose, shown(&image.path.to_string_lossy()));
    Some(Finding::invalid(&image.at, format!("{whose}: {path} {why}")))
}

/// Why a header is not what the definition says, and what to do about it.
fn disagreement(image: &Image, header: &Header) -> Option<String> {
    let (path, format) = (shown(&image.path.to_string_lossy()), &image.format);
    let whole = format!("'qemu-img convert -O {format} {path} NEW' makes an image that is whole");
    if let Some(data) = &header.data {
        let named = if data.is_empty() { String::new() } else { format!(" in '{}'", shown(data)) };
        return Some(format!("keeps its data{named}, a file of its own, which is not supported: {whole}"));
    }
    let Some(name) = &header.backing else {
        return match &image.below {
            Below::File(below, _) => Some(format!(
                "stands on nothing, and the definition says that it stands on {}: leave out that <backingStore>",
                shown(&below.to_string_lossy())
            )),
            _ => None,
        };
    };
    let named = shown(name);
    let Some(backing) = place(name, &image.path) else {
        let scheme = name.split(':').next().unwrap_or_default();
        let is_declared = |protocol: &str| scheme == protocol || scheme.split('+').next() == Some(protocol);
        return match &image.below {
            Below::Server(protocol) if is_declared(protocol) => None,
            _ => {
                Some(format!("names '{named}' as its backing file, and only files that are named are opened: {whole}"))
            }
        };
    };
    let backing_path = shown(&backing.to_string_lossy());
    let known = header.backing_format.as_deref();
    let rebase = |on: &str, on_format: &str| format!("'qemu-img rebase -u -f {format} -F {on_format} -b {on} {path}'");
    let (below, below_format) = match &image.below {
        Below::File(below, below_format) => (below, below_format),
        _ => {
            let its = known.unwrap_or(if header.tells_format { "raw" } else { "FORMAT" });
            return Some(format!(
                "stands on {backing_path}, and the definition does not say so: declare it with {}, or make the image \
                 whole with 'qemu-img rebase -f {format} -b \"\" {path}'",
                element(&backing, its)
            ));
        }
    };
    let declared = shown(&below.to_string_lossy());
    if !is_same_path(&backing, below) {
        return Some(format!(
            "stands on {backing_path}, and the definition says {declared}: correct the <backingStore>, or the image with {}",
            rebase(&declared, below_format)
        ));
    }
    match known {
        None if header.tells_format || format == "qed" && below_format == "raw" => Some(format!(
            "does not say of which format {declared} is, and a format that is guessed can be forged by the guest: {}",
            rebase(&declared, below_format)
        )),
        Some(known) if plain_format(Some(known)) != *below_format => Some(format!(
            "says that {declared} is {}, and the definition says {below_format}: correct the <backingStore>, or the image \
             with {}",
            shown(known),
            rebase(&declared, below_format)
        )),
        _ => None,
    }
}

/// The element that declares what an image stands on.
fn element(backing: &Path, format: &str) -> String {
    let text = |text: &str| escape_attribute(&shown(text));
    format!(
        "<backingStore type='file'><format type='{}'/><source file='{}'/><backingStore/></backingStore>",
        text(format),
        text(&backing.to_string_lossy())
    )
}

/// A name from a header as it can stand in a message.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(below: Below) -> Image {
        Image {
            whose: "disk 'vda'".to_owned(),
            path: "/images/top".into(),
            format: "qcow2".to_owned(),
            below,
            at: Place::default(),
        }
    }

    fn header(backing: &str, format: Option<&str>) -> Header {
        let backing_format = format.map(str::to_owned);
        Header { backing: Some(backing.to_owned()), backing_format, tells_format: true, data: None }
    }

    fn on(path: &str, format: &str) -> Image {
        image(Below::File(path.into(), format.to_owned()))
    }

    #[test]
    fn a_chain_as_it_is_declared_is_taken() {
        let alone = Header { tells_format: true, ..Header::default() };
        assert_eq!(disagreement(&image(Below::Nothing), &alone), None);
        for name in ["base", "/images/base", "file:/images/./base", "../images/base"] {
            assert_eq!(disagreement(&on("/images/base", "qcow2"), &header(name, Some("qcow2"))), None, "{name}");
        }
        let server = image(Below::Server("nbd".to_owned()));
        assert_eq!(disagreement(&server, &header("nbd+unix:///export?socket=/s", Some("raw"))), None);
        // Formats that have no place for it.
        let old = Header { tells_format: false, ..header("base", None) };
        assert_eq!(disagreement(&on("/images/base", "qcow2"), &old), None);
    }

    #[test]
    fn every_other_header_is_refused_with_a_remedy() {
        let data = Header { data: Some("/etc/shadow".to_owned()), tells_format: true, ..Header::default() };
        let cases = [
            (image(Below::Nothing), header("/etc/shadow", Some("raw")), "<source file='/etc/shadow'/><backingStore/>"),
            (image(Below::Nothing), header("base", None), "<format type='raw'/><source file='/images/base'/>"),
            (image(Below::Nothing), data, "keeps its data in '/etc/shadow', a file of its own"),
            (image(Below::Nothing), header("json:{\"driver\":\"file\"}", Some("raw")), "names 'json:{"),
            (image(Below::Nothing), header("nbd://host/x", Some("raw")), "qemu-img convert -O qcow2 /images/top NEW"),
            (image(Below::Server("rbd".to_owned())), header("nbd://host/x", Some("raw")), "names 'nbd:"),
            (on("/images/base", "raw"), header("/etc/shadow", Some("raw")), "-b /images/base /images/top"),
            (on("/images/base", "raw"), header("base", None), "rebase -u -f qcow2 -F raw -b /images/base"),
            (on("/images/base", "raw"), header("base", Some("qcow2")), "says that /images/base is qcow2"),
            (on("/images/base", "raw"), Header::default(), "leave out that <backingStore>"),
        ];
        for (image, header, remedy) in cases {
            let why = disagreement(&image, &header).unwrap_or_default();
            assert!(why.contains(remedy), "{header:?}: {why}");
        }
    }

    #[test]
    fn all_layers_of_all_disks_are_images_and_raw_is_what_nothing_is_said_of() {
        let xml = "<domain type='qemu'><name>a</name><uuid>6f1c0d5e-6b1f-4c57-9c0e-0d0c3e6f9c01</uuid>\
            <memory>1</memory><os><type>hvm</type></os><devices>\
            <disk><source file='/top'/><driver type='qcow2'/><target dev='vda'/>\
            <backingStore type='file'><format type='qcow2'/><source file='/middle'/>\
            <backingStore type='file'><format type='raw'/><source file='/base'/></backingStore></backingStore></disk>\
            <disk><source file='/plain'/><target dev='vdb'/></disk></devices></domain>";
        let def = DomainDef::parse(xml).unwrap();
        let told: Vec<_> = images(&def).into_iter().map(|one| (one.path, one.format, one.below)).collect();
        let file = |path: &str, format: &str| Below::File(path.into(), format.to_owned());
        let image = |path: &str, format: &str, below| (PathBuf::from(path), format.to_owned(), below);
        let all = [
            image("/top", "qcow2", file("/middle", "qcow2")),
            image("/middle", "qcow2", file("/base", "raw")),
            image("/base", "raw", Below::Nothing),
            image("/plain", "raw", Below::Nothing),
        ];
        assert_eq!(told, all);
    }
}
