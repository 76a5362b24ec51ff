//! Folders of the host: by 9p, which QEMU serves itself, or by virtiofs, which a companion does.

use super::args::Props;
use super::{Builder, generation, id, list, virtio};
use crate::qemu::plan::{Companion, Link, Loss, Role};
use virt_model::device::Filesystem;
use virt_model::device::filesystem::{AccessMode, FilesystemBinary, Multidevs};

/// Where the companion finds its listening socket.
const SOCKET: i32 = 3;

impl Builder<'_> {
    pub(super) fn filesystems(&mut self) {
        let def = self.def;
        for filesystem in &def.devices.filesystems {
            if filesystem.is_virtiofs() { self.virtiofs(filesystem) } else { self.plan9(filesystem) }
        }
    }

    fn plan9(&mut self, filesystem: &Filesystem) {
        let name = id(&filesystem.info);
        let device = format!("fsdev-{name}");
        let access = match filesystem.access.unwrap_or_default() {
            AccessMode::Passthrough => "passthrough",
            AccessMode::Mapped => "mapped",
            AccessMode::Squash => "none",
        };
        let octal = |mode: &Option<String>| mode.as_ref().map(|mode| format!("{:0>4}", mode.trim_start_matches("0o")));
        let policy = filesystem.driver.as_ref().and_then(|driver| driver.write_policy);
        let several = filesystem.multidevs.filter(|word| *word != Multidevs::Default);
        let fsdev = list("local").set("id", &device).set("path", filesystem.folder().unwrap_or_default());
        let fsdev = fsdev
            .set("security_model", access)
            .maybe("multidevs", several)
            .maybe("fmode", octal(&filesystem.fmode))
            .maybe("dmode", octal(&filesystem.dmode))
            .maybe("writeout", policy)
            .maybe("readonly", filesystem.readonly.then_some("on"));
        self.args.pair("-fsdev", fsdev);
        let model = format!("virtio-9p-pci{}", generation(filesystem.model.unwrap_or_default()));
        let props = Props::device(&model).set("id", name).set("fsdev", device);
        self.front(filesystem, props.set("mount_tag", &*filesystem.target.tag));
    }

    pub(super) fn virtiofs(&mut self, filesystem: &Filesystem) {
        let name = id(&filesystem.info);
        let back_end = format!("chr-vu-{name}");
        let given = filesystem.source.as_ref().and_then(|source| source.socket.clone());
        let path = match given {
            Some(path) => {
                self.open(&path, true);
                path
            }
            None => self.share(filesystem, name),
        };
        self.args.pair("-chardev", list("socket").set("id", &back_end).set("path", path));
        let driver = filesystem.driver.as_ref();
        let props = Props::device("vhost-user-fs-pci").set("id", name).set("chardev", back_end);
        let props = props.maybe("queue-size", driver.and_then(|driver| driver.queue));
        let turn = self.boot_index(&filesystem.info);
        self.front(filesystem, props.set("tag", &*filesystem.target.tag).maybe("bootindex", turn));
    }

    fn front(&mut self, filesystem: &Filesystem, props: Props) {
        let shared = filesystem.driver.as_ref().map(|driver| virtio(&driver.virtio)).unwrap_or_default();
        self.args.device(props.extend(shared).extend(self.pci(&filesystem.info)));
    }

    /// Has the folder shared by a companion; gives the socket at which QEMU finds it.
    fn share(&mut self, filesystem: &Filesystem, name: &str) -> String {
        let path = self.place.runtime_dir.join(format!("{name}.sock"));
        let shown = path.to_string_lossy().into_owned();
        let Some(program) = self.caps.site.virtiofsd.clone() else { return shown };
        let binary = filesystem.binary.clone().unwrap_or_default();
        let source = filesystem.folder().unwrap_or_default().replace(',', ",,");
        let mut args = vec![format!("--fd={SOCKET}"), "-o".to_owned(), format!("source={source}{}", options(&binary))];
        args.extend(binary.thread_pool.as_ref().map(|pool| format!("--thread-pool-size={}", pool.size)));
        args.extend(binary.open_files.as_ref().map(|files| format!("--rlimit-nofile={}", files.max)));
        let link = Link::Listening { its: SOCKET, path };
        // A guest that has lost a folder can still be shut down in order.
        let role = Role::Beside(Loss::Bear);
        let companion = Companion { program, args, links: vec![link], ..Companion::new("virtiofsd", role) };
        // It shuts itself in, for which it must be root.
        self.companions.push(Companion { name: format!("virtiofsd of {name}"), privileged: true, ..companion });
        shown
    }
}

fn options(binary: &FilesystemBinary) -> String {
    let mut options = String::new();
    let mut add = |option: String| options += &format!(",{option}");
    let switch = |name: &str, on: bool| if on { name.to_owned() } else { format!("no_{name}") };
    if let Some(cache) = &binary.cache {
        add(format!("cache={}", cache.mode));
    }
    if let Some(xattr) = binary.xattr {
        add(switch("xattr", xattr));
    }
    if let Some(sandbox) = &binary.sandbox {
        add(format!("sandbox={}", sandbox.mode));
    }
    if let Some(lock) = &binary.lock {
        lock.flock.iter().for_each(|on| add(switch("flock", *on)));
        lock.posix.iter().for_each(|on| add(switch("posix_lock", *on)));
    }
    options
}
