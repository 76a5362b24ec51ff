//! `<filesystem>`: a folder of the host, shown to the guest.

use super::{DeviceInfo, VirtioDriver, VirtioModel};
use crate::domain::part::element;
use crate::domain::value::choices;

choices! {
    /// What is shown.
    pub enum FilesystemKind {
        Mount = "mount", Template = "template", File = "file", Block = "block", Ram = "ram", Bind = "bind",
        Volume = "volume",
    }
}

choices! {
    /// Whose rights count, and where the guest's are kept.
    pub enum AccessMode { Passthrough = "passthrough", Mapped = "mapped", Squash = "squash", }
}

choices! {
    /// What becomes of files on several of the host's file systems.
    pub enum Multidevs { Default = "default", Remap = "remap", Forbid = "forbid", Warn = "warn", }
}

element! {
    /// `<filesystem>`
    pub struct Filesystem {
        /// What is shown; `mount` if absent.
        attr "type" => kind: Option<FilesystemKind>,
        /// Whose rights count; `passthrough` if absent.
        attr "accessmode" => access: Option<AccessMode>,
        /// What becomes of files on several of the host's file systems.
        attr "multidevs" => multidevs: Option<Multidevs>,
        /// Generation of virtio.
        attr "model" => model: Option<VirtioModel>,
        /// Mode of files that are made, in octal.
        attr "fmode" => fmode: Option<String>,
        /// Mode of folders that are made, in octal.
        attr "dmode" => dmode: Option<String>,
        /// `<driver>`
        child "driver" => driver: Option<FilesystemDriver>,
        /// `<binary>`: the program that shares it out.
        child "binary" => binary: Option<FilesystemBinary>,
        /// `<source>`
        child "source" => source: Option<FilesystemSource>,
        /// `<target>`
        must "target" => target: FilesystemTarget,
        /// The guest cannot write to it.
        flag "readonly" => readonly: bool,
        /// Name and place.
        flat => info: DeviceInfo,
    }
}

impl Filesystem {
    /// Whether it is shared by virtiofs, else by 9p.
    pub fn is_virtiofs(&self) -> bool {
        self.driver.as_ref().and_then(|driver| driver.kind) == Some(FilesystemDriverKind::Virtiofs)
    }

    /// The folder on the host.
    pub fn folder(&self) -> Option<&str> {
        self.source.as_ref()?.dir.as_deref()
    }
}

choices! {
    /// How it is shared.
    pub enum FilesystemDriverKind {
        Path = "path", Handle = "handle", Loop = "loop", Nbd = "nbd", Ploop = "ploop", Virtiofs = "virtiofs",
        Mtp = "mtp",
    }
}

choices! {
    /// When what the guest writes reaches the disk.
    pub enum WritePolicy { Immediate = "immediate", }
}

element! {
    /// `<filesystem><driver>`
    pub struct FilesystemDriver {
        /// How it is shared; `path` (9p) if absent.
        attr "type" => kind: Option<FilesystemDriverKind>,
        /// When what the guest writes reaches the disk.
        attr "wrpolicy" => write_policy: Option<WritePolicy>,
        /// Entries of the queue, of virtiofs.
        attr "queue" => queue: Option<u32>,
        /// What virtio devices share.
        flat => virtio: VirtioDriver,
    }
}

element! {
    /// `<filesystem><binary>`
    pub struct FilesystemBinary {
        /// The program; the host's if absent.
        attr "path" => path: Option<String>,
        /// Extended attributes.
        on_off "xattr" => xattr: Option<bool>,
        /// `<cache>`
        child "cache" => cache: Option<FilesystemCache>,
        /// `<sandbox>`
        child "sandbox" => sandbox: Option<FilesystemSandbox>,
        /// `<lock>`
        child "lock" => lock: Option<FilesystemLock>,
        /// `<thread_pool>`
        child "thread_pool" => thread_pool: Option<ThreadPool>,
        /// `<openfiles>`
        child "openfiles" => open_files: Option<OpenFiles>,
    }
}

choices! {
    /// What the guest may remember.
    pub enum CacheMode { None = "none", Always = "always", }
}

element! {
    /// `<binary><cache>`
    pub struct FilesystemCache {
        /// What the guest may remember.
        need "mode" => mode: CacheMode,
    }
}

choices! {
    /// How the program is shut in.
    pub enum SandboxMode { Namespace = "namespace", Chroot = "chroot", }
}

element! {
    /// `<binary><sandbox>`
    pub struct FilesystemSandbox {
        /// How.
        need "mode" => mode: SandboxMode,
    }
}

element! {
    /// `<binary><lock>`: locks that the host sees too.
    pub struct FilesystemLock {
        /// Those of POSIX.
        on_off "posix" => posix: Option<bool>,
        /// Those of flock.
        on_off "flock" => flock: Option<bool>,
    }
}

element! {
    /// `<binary><thread_pool>`
    pub struct ThreadPool {
        /// How many threads; 0: none beside the queue's.
        need "size" => size: u32,
    }
}

element! {
    /// `<binary><openfiles>`
    pub struct OpenFiles {
        /// At the most.
        need "max" => max: u32,
    }
}

element! {
    /// `<filesystem><source>`
    pub struct FilesystemSource {
        /// The folder on the host.
        attr "dir" => dir: Option<String>,
        /// The socket of a virtiofsd that somebody else runs.
        attr "socket" => socket: Option<String>,
    }
}

element! {
    /// `<filesystem><target>`
    pub struct FilesystemTarget {
        /// The tag by which the guest mounts it.
        need "dir" => tag: String,
    }
}
