//! Folders of the host that are shown to the guest.

use super::Check;
use std::collections::BTreeSet;
use virt_model::device::filesystem::{AccessMode, FilesystemDriverKind, FilesystemKind};
use virt_model::device::{Filesystem, VirtioModel};
use virt_model::domain::memory::Sharing;

/// The longest tag that virtiofs and 9p both take.
const TAG: usize = 31;

impl Check<'_> {
    pub(super) fn filesystems(&mut self) {
        let def = self.def;
        let mut tags = BTreeSet::new();
        for filesystem in &def.devices.filesystems {
            let tag = &filesystem.target.tag;
            let place = filesystem.target.at.attribute("dir");
            self.refuse_if(tag.is_empty() || tag.len() > TAG, &place, "a tag has 1 to 31 bytes");
            self.refuse_if(!tags.insert(tag), &place, "there are two file systems with this tag");
            self.filesystem(filesystem);
        }
    }

    fn filesystem(&mut self, filesystem: &Filesystem) {
        let place = &filesystem.at;
        let kind = filesystem.kind.unwrap_or_default();
        let mount = kind == FilesystemKind::Mount;
        let how = format!("QEMU shows folders (type='mount'), not type='{kind}'");
        self.refuse_if(!mount, &place.attribute("type"), &how);
        let socket = filesystem.source.as_ref().is_some_and(|source| source.socket.is_some());
        let absolute = filesystem.folder().is_some_and(|dir| dir.starts_with('/'));
        self.refuse_if(!absolute && !socket && mount, place, "<source dir='…'/> with an absolute path is needed");
        match filesystem.driver.as_ref().and_then(|driver| driver.kind) {
            None | Some(FilesystemDriverKind::Path) => self.plan9(filesystem),
            Some(FilesystemDriverKind::Virtiofs) => self.virtiofs(filesystem, socket),
            Some(kind) => {
                let how = format!("folders are shared by type='path' (9p) or type='virtiofs', not by '{kind}'");
                self.refuse(&place.child("driver").attribute("type"), how);
            }
        }
        self.seated(&filesystem.info, place);
    }

    fn plan9(&mut self, filesystem: &Filesystem) {
        let place = &filesystem.at;
        self.need_device(place, "virtio-9p-pci");
        let how = "<binary>, <source socket=…> and queue are for <driver type='virtiofs'/>";
        let queue = filesystem.driver.as_ref().is_some_and(|driver| driver.queue.is_some());
        let socket = filesystem.source.as_ref().is_some_and(|source| source.socket.is_some());
        self.refuse_if(filesystem.binary.is_some() || queue || socket, place, how);
        let modes = [("fmode", &filesystem.fmode), ("dmode", &filesystem.dmode)];
        for (name, mode) in modes.into_iter().filter_map(|(name, mode)| Some((name, mode.as_ref()?))) {
            let octal = u32::from_str_radix(mode, 8).is_ok_and(|bits| bits <= 0o777);
            self.refuse_if(!octal, &place.attribute(name), "a mode is three octal digits");
            let mapped = filesystem.access == Some(AccessMode::Mapped);
            self.refuse_if(!mapped, &place.attribute(name), "modes are for accessmode='mapped'");
        }
    }

    fn virtiofs(&mut self, filesystem: &Filesystem, socket: bool) {
        let place = &filesystem.at;
        self.need_device(place, "vhost-user-fs-pci");
        let passes = filesystem.access.unwrap_or_default() == AccessMode::Passthrough;
        self.refuse_if(!passes, &place.attribute("accessmode"), "virtiofs has accessmode='passthrough' only");
        self.refuse_if(filesystem.readonly, &place.child("readonly"), "this virtiofsd cannot share read-only; 9p can");
        let older = filesystem.model == Some(VirtioModel::Transitional);
        self.refuse_if(older, &place.attribute("model"), "virtiofs has no transitional model");
        let modes = filesystem.fmode.is_some() || filesystem.dmode.is_some() || filesystem.multidevs.is_some();
        self.refuse_if(modes, place, "fmode, dmode and multidevs are for 9p (<driver type='path'/>)");
        let missing = self.caps.site.virtiofsd.is_none() && !socket;
        self.refuse_if(missing, place, "virtiofsd is not installed (Debian 12: qemu-system-common, later: virtiofsd)");
        let own = filesystem.binary.as_ref().and_then(|binary| binary.path.as_deref());
        let other = own.is_some_and(|path| self.caps.site.virtiofsd.as_deref() != Some(path.as_ref()));
        let how = "it would run as root: only the host's own virtiofsd is run; leave out the path";
        self.refuse_if(other, &place.child("binary").attribute("path"), how);
        let how = "virtiofs needs memory that it can see: <memoryBacking> with <access mode='shared'/>";
        self.refuse_if(!self.memory_is_shared(), place, how);
    }

    /// Whether other processes can see all of the guest's memory.
    pub(super) fn memory_is_shared(&self) -> bool {
        let backing = self.def.memory_backing.as_ref();
        let all = backing.and_then(|b| b.access.as_ref()).is_some_and(|access| access.mode == Sharing::Shared);
        let cells = self.def.numa_cells();
        let each = |shared: bool| cells.iter().all(|cell| cell.access.map_or(shared, |a| a == Sharing::Shared));
        each(all) && (all || !cells.is_empty())
    }
}
