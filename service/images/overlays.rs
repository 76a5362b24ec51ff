//! What snapshots have recorded that their overlays were laid on: it completes documents that say less.

use super::chain::parts;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use virt_model::device::Disk;
use virt_model::device::disk::{BackingStore, StoreFormat};
use virt_model::domain::DomainDef;
use virt_model::driver::snapshots::DiskMode;
use virt_model::snapshot::SnapshotDef;

/// An overlay that was made for a snapshot, and what it was laid on.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    file: PathBuf,
    on: BackingStore,
}

/// The same as [`Images::declare`] where the records have been gathered.
pub(crate) fn declare_in(def: &mut Arc<DomainDef>, recorded: &[Overlay]) {
    for index in 0..def.devices.disks.len() {
        let disk = &def.devices.disks[index];
        if !is_open_ended(disk) {
            continue;
        }
        let mut declared = disk.clone();
        declare(&mut declared, recorded);
        // Only then is it another definition than the one that others share.
        if declared.backing != disk.backing {
            Arc::make_mut(def).devices.disks[index] = declared;
        }
    }
}

/// Whether nothing says where the chain of a disk ends.
pub(super) fn is_open_ended(disk: &Disk) -> bool {
    if disk.is_empty() {
        return false;
    }
    let mut layer = disk.backing.as_deref();
    while let Some(store) = layer {
        if store.is_end() {
            return false;
        }
        layer = store.backing.as_deref();
    }
    true
}

/// Adds to a disk's chain what is recorded below its last layer, and below that.
fn declare(disk: &mut Disk, recorded: &[Overlay]) {
    let Some(mut last) = disk.path().map(PathBuf::from) else { return };
    let mut seen = HashSet::new();
    let mut end = &mut disk.backing;
    loop {
        if end.is_none() {
            let found = recorded.iter().find(|overlay| overlay.file == last && seen.insert(last.clone()));
            let Some(found) = found else { return };
            *end = Some(Box::new(found.on.clone()));
        }
        let Some(store) = end else { return };
        let Some(path) = store.path() else { return };
        last = path.into();
        end = &mut store.backing;
    }
}

/// The overlays that a snapshot laid on its disks.
pub(crate) fn overlays_of(def: &SnapshotDef, into: &mut Vec<Overlay>) {
    for (disk, mode) in parts(def) {
        let DiskMode::External { path, .. } = mode else { continue };
        let format = disk.meant_format().to_owned();
        let on = BackingStore {
            kind: Some(disk.kind()),
            format: Some(StoreFormat { name: format, ..StoreFormat::default() }),
            source: disk.frozen_source(),
            backing: disk.backing.clone(),
            ..BackingStore::default()
        };
        into.push(Overlay { file: path.clone(), on });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn disk(xml: &str) -> Disk {
        let xml = format!(
            "<domain type='test'><name>a</name><uuid>6f1c0d5e-6b1f-4c57-9c0e-0d0c3e6f9c01</uuid><memory>1</memory>\
             <os><type>hvm</type></os><devices><disk>{xml}<target dev='vda'/></disk></devices></domain>"
        );
        DomainDef::parse(&xml).unwrap().devices.disks.remove(0)
    }

    fn overlay(file: &str, on: &str) -> Overlay {
        let mut laid = disk(&format!("<driver type='qcow2'/><source file='{on}'/>"));
        laid.stand_on(Path::new(file), false, "qcow2");
        let mut on = *laid.backing.unwrap();
        on.backing = None;
        Overlay { file: file.into(), on }
    }

    #[test]
    fn what_was_recorded_of_overlays_completes_a_document_that_ends_sooner() {
        let recorded = [overlay("/c", "/b"), overlay("/b", "/a"), overlay("/x", "/y"), overlay("/y", "/x")];
        let declared = |xml: &str| {
            let mut disk = disk(xml);
            declare(&mut disk, &recorded);
            disk.files().iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(declared("<source file='/c'/>"), "/c /b /a");
        assert_eq!(declared("<source file='/c'/><backingStore/>"), "/c", "what is said counts");
        let below = "<backingStore type='file'><format type='qcow2'/><source file='/b'/></backingStore>";
        assert_eq!(declared(&format!("<source file='/other'/>{below}")), "/other /b /a");
        assert_eq!(declared("<source file='/a'/>"), "/a");
        assert_eq!(declared("<source file='/x'/>"), "/x /y /x", "no loop");
    }
}
