//! Two documents to be compared, read together: what readers make up where a document is silent, one uuid and one MAC
//! address for each interface, is made up once for both. Else no document without them would be compatible with itself.

use crate::device::interface::{Interface, InterfaceMac};
use crate::domain::DomainDef;
use crate::domain::value::Mac;
use crate::xml::{self, Element, Finding};
use std::collections::HashSet;

/// Which of two documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What the guest has.
    Source,
    /// What it would have.
    Target,
}

impl Side {
    /// `source` or `target`.
    pub fn as_str(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Target => "target",
        }
    }
}

/// Reads both. What the one does not say and a reader would make up is what the other says.
/// Errors: the first document that is not valid, with everything wrong in it.
pub fn read_pair(source: &str, target: &str) -> Result<(DomainDef, DomainDef), (Side, Vec<Finding>)> {
    let (mut source, source_says) = read(source).map_err(|findings| (Side::Source, findings))?;
    let (mut target, target_says) = read(target).map_err(|findings| (Side::Target, findings))?;
    match (source_says, target_says) {
        (false, _) => source.uuid = target.uuid,
        (true, false) => target.uuid = source.uuid,
        (true, true) => {}
    }
    share_macs(&mut source.devices.interfaces, &mut target.devices.interfaces);
    Ok((source, target))
}

/// The definition, and whether the document has a uuid.
fn read(text: &str) -> Result<(DomainDef, bool), Vec<Finding>> {
    let root = xml::read(text, &[("domain", "metadata")]).map_err(|finding| vec![finding])?;
    let says = root.child("uuid").is_some_and(Element::has_text);
    Ok((DomainDef::from_tree(root)?, says))
}

/// Interfaces are alike by position where one has no address.
fn share_macs(source: &mut [Interface], target: &mut [Interface]) {
    let known = |side: &[Interface]| -> HashSet<_> { side.iter().filter_map(Interface::mac).collect() };
    let (ours, theirs) = (known(source), known(target));
    for (source, target) in source.iter_mut().zip(target) {
        match (source.mac(), target.mac()) {
            (None, Some(mac)) if !ours.contains(&mac) => source.mac = target.mac.clone(),
            (Some(mac), None) if !theirs.contains(&mac) => target.mac = source.mac.clone(),
            (None, None) => {
                let mac = InterfaceMac { address: Mac::made_up(), ..InterfaceMac::default() };
                source.mac = Some(mac.clone());
                target.mac = Some(mac);
            }
            _ => {}
        }
    }
}
