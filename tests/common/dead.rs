//! File systems that never answer, as a server that has gone leaves them: whoever looks into one waits until it is let go.

use super::client::{Client, Domain, Refusal, options};
use super::snapshots::{Player, with};
use super::{Daemon, PATIENCE, skip};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use zbus::Message;

/// A mounted file system whose server reads no question. When it is dropped all who wait get an error.
pub struct Dead {
    /// Where it is, for virtd.
    pub folder: PathBuf,
    server: Option<File>,
}

impl Dead {
    /// Mounts one where `daemon` sees it, and nobody else. `None` if that cannot be had here (and says so).
    pub fn mount(daemon: &Daemon) -> Option<Dead> {
        let folder = daemon.folder().join("dead");
        std::fs::create_dir(&folder).unwrap();
        Dead::mount_over(daemon, folder)
    }

    /// The same over a folder that is there: what `daemon` had in it does not answer any more.
    pub fn mount_over(daemon: &Daemon, folder: PathBuf) -> Option<Dead> {
        let server = File::options().read(true).write(true).open("/dev/fuse");
        let server = server.inspect_err(|e| skip(&format!("/dev/fuse: {e}"))).ok()?;
        // The kernel's end is the server's descriptor, whoever hands it over.
        let mut mount = daemon.inside("mount");
        mount.args(["--internal-only", "-t", "fuse", "-o"]);
        mount.arg("fd=0,rootmode=40000,user_id=0,group_id=0,allow_other").arg("dead").arg(&folder);
        let done = mount.stdin(server.try_clone().unwrap()).output().unwrap();
        if !done.status.success() {
            skip(&format!("no FUSE here: {}", String::from_utf8_lossy(&done.stderr).trim()));
            return None;
        }
        Some(Dead { folder, server: Some(server) })
    }

    /// A path in it.
    pub fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// Whoever waits gets an error, as when an administrator forces it off.
    pub fn let_go(&mut self) {
        self.server = None;
    }
}

/// Members that are given the path of a file, alone or in a document, or imply the files of the machine or the snapshot whose
/// they are.
pub const MEMBERS: [&str; 30] = [
    "Manager.ValidateDomain",
    "Manager.DefineDomain",
    "Manager.CreateDomain",
    "Manager.RestoreDomain",
    "Manager.GetSavedXML",
    "Manager.SetSavedXML",
    "Manager.CompareDomains",
    "Manager.DomainToNative",
    "Domain.Start",
    "Domain.Save",
    "Domain.BackupBegin",
    "Domain.CoreDump",
    "Domain.ManagedSave",
    "Domain.GetStats",
    "Domain.BlockInfo",
    "Domain.CheckCreateSnapshot",
    "Domain.CreateSnapshot",
    "Domain.AttachDevice",
    "Domain.ChangeMedium",
    "Domain.BlockResize",
    "Domain.BlockPull",
    "Domain.BlockCommit",
    "Domain.BlockCopy",
    "Domain.UpdateDevice",
    "Domain.Undefine",
    "Domain.CheckUndefine",
    "Snapshot.CheckRevert",
    "Snapshot.Revert",
    "Snapshot.CheckDelete",
    "Snapshot.Delete",
];

/// A machine with a snapshot, all of whose files are in one folder, to be named by all members when that does not answer.
#[derive(Clone)]
pub struct Doomed {
    player: Player,
    folder: PathBuf,
    name: String,
    /// As it is stored.
    xml: String,
}

impl Doomed {
    /// Makes it while the folder still answers. `None` if tools are missing (and says so).
    pub async fn define(client: &Client, folder: &Path, name: &str) -> Option<Doomed> {
        let at = |what: &str| folder.join(format!("{name}.{what}"));
        std::fs::copy(super::guest::tick_image()?, at("qcow2")).unwrap();
        std::fs::write(at("iso"), [0; 4096]).unwrap();
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><os><type machine='q35'>hvm</type></os>\
             <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk><disk type='file' device='cdrom'><source file='{}'/>\
             <target dev='sda' bus='sata'/><readonly/></disk></devices></domain>",
            at("qcow2").display(),
            at("iso").display()
        );
        let player = Player { domain: client.define(&xml).await.expect("defined") };
        player.take("s").await;
        let xml = player.domain.xml().await;
        Some(Doomed { player, folder: folder.to_owned(), name: name.to_owned(), xml })
    }

    /// The same as another client sees it.
    pub fn seen_by(&self, client: &Client) -> Doomed {
        let domain = Domain { client: client.clone(), path: self.player.domain.path.clone() };
        Doomed { player: Player { domain }, ..self.clone() }
    }

    /// Calls one of [`MEMBERS`] so that it is about files in the folder.
    pub async fn call(&self, member: &str) -> Result<Message, Refusal> {
        match member.split_once('.').expect("interface.method") {
            ("Manager", method) => self.call_manager(method).await,
            ("Domain", method) => self.call_domain(method).await,
            ("Snapshot", method) => self.player.call("s", method, options([])).await,
            _ => panic!("{member} is not called here"),
        }
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    async fn call_manager(&self, method: &str) -> Result<Message, Refusal> {
        let (client, member) = (&self.player.domain.client, format!("org.virt.Manager.{method}"));
        let emulator = format!("<devices><emulator>{}</emulator>", self.file("qemu-system-x86_64"));
        let own_emulator = self.xml.lines().find(|line| line.contains("<emulator>")).unwrap_or_default();
        let elsewhere = self.xml.replace(own_emulator, "").replace("<devices>", &emulator);
        match method {
            "ValidateDomain" => client.call("/org/virt", &member, &(&elsewhere, options([]))).await,
            "DefineDomain" => client.call("/org/virt", &member, &(&self.xml, options([]))).await,
            "CreateDomain" => {
                let uuid = self.xml.lines().find(|line| line.contains("<uuid>")).expect("a uuid");
                let name = (format!("<name>{}<", self.name), format!("<name>{}-transient<", self.name));
                let xml = self.xml.replace(uuid, "").replace(&name.0, &name.1);
                client.call("/org/virt", &member, &(xml, options([]))).await
            }
            "CompareDomains" => client.call("/org/virt", &member, &(&self.xml, &elsewhere, options([]))).await,
            "DomainToNative" => client.call("/org/virt", &member, &(&elsewhere, "qemu-argv")).await,
            "RestoreDomain" | "GetSavedXML" => {
                client.call("/org/virt", &member, &(self.file("saved"), options([]))).await
            }
            "SetSavedXML" => client.call("/org/virt", &member, &(self.file("saved"), &self.xml, options([]))).await,
            _ => panic!("Manager.{method} is not called here"),
        }
    }

    async fn call_domain(&self, method: &str) -> Result<Message, Refusal> {
        let (domain, none, file) = (&self.player.domain, || options([]), |name: &str| self.file(name));
        match method {
            "CheckCreateSnapshot" | "CreateSnapshot" => {
                let overlay = format!(
                    "<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{}'/></disk></disks>\
                     </domainsnapshot>",
                    file("overlay")
                );
                domain.call(method, &(overlay, with([("disk-only", true)]))).await
            }
            "Save" => domain.call(method, &(file("saved"), none())).await,
            "ChangeMedium" => domain.call(method, &("sda", file("other.iso"), none())).await,
            "AttachDevice" => {
                let disk = format!(
                    "<disk type='file'><source file='{}'/><target dev='vdb' bus='virtio'/></disk>",
                    file("other.img")
                );
                domain.call(method, &(disk, none())).await
            }
            "BlockInfo" => domain.call(method, &"vda").await,
            "BlockResize" => domain.call(method, &("vda", 1u64 << 30, none())).await,
            "BlockPull" => domain.call(method, &("vda", "", none())).await,
            "BlockCommit" => domain.call(method, &("vda", "", "", none())).await,
            "BlockCopy" => {
                let copy = format!("<disk type='file'><source file='{}'/></disk>", file("copy.img"));
                domain.call(method, &("vda", copy, none())).await
            }
            "BackupBegin" => {
                let backup = format!(
                    "<domainbackup><disks><disk name='vda'><target file='{}'/></disk></disks></domainbackup>",
                    file("backup")
                );
                domain.call(method, &(backup, "", none())).await
            }
            "CoreDump" => domain.call(method, &(file("dumped"), none())).await,
            "UpdateDevice" => {
                let medium = format!(
                    "<disk type='file' device='cdrom'><source file='{}'/><target dev='sda' bus='sata'/><readonly/></disk>",
                    file("other.iso")
                );
                domain.call(method, &(medium, none())).await
            }
            "Undefine" | "CheckUndefine" => {
                domain.call(method, &(with([("nvram", true), ("snapshots-metadata", true)]),)).await
            }
            "Start" | "ManagedSave" | "GetStats" => domain.run(method).await,
            _ => panic!("Domain.{method} is not called here"),
        }
    }
}

/// A file system that answers until it is told not to, and again later. It keeps the names and lengths of files, and forgets what
/// is written to them.
pub struct Fading {
    /// Where it is, for virtd.
    pub folder: PathBuf,
    shared: Arc<(Mutex<Answering>, Condvar)>,
}

impl Drop for Fading {
    /// Nobody who waits for it could end.
    fn drop(&mut self) {
        self.answers();
    }
}

#[derive(Default)]
struct Answering {
    /// It answers nothing.
    stopped: bool,
    /// Somebody waits for an answer that does not come.
    waited_for: bool,
    /// Names, each with its number.
    names: BTreeMap<String, u64>,
    /// Lengths, by number.
    lengths: HashMap<u64, u64>,
    last: u64,
}

impl Fading {
    /// Mounts one where `daemon` sees it, and nobody else. `None` if that cannot be had here (and says so).
    pub fn mount(daemon: &Daemon, name: &str) -> Option<Fading> {
        let folder = daemon.folder().join(name);
        std::fs::create_dir(&folder).unwrap();
        let mut served = Dead::mount_over(daemon, folder)?;
        let mut server = served.server.take().expect("it is mounted");
        let shared = Arc::new((Mutex::new(Answering { last: 1, ..Answering::default() }), Condvar::new()));
        let state = shared.clone();
        // It ends with the daemon's mounts, or with the test.
        std::thread::spawn(move || {
            let mut request = vec![0; 256 << 10];
            while let Ok(length) = server.read(&mut request) {
                let (lock, changed) = &*state;
                let mut answering = lock.lock().unwrap();
                while answering.stopped {
                    answering.waited_for = true;
                    changed.notify_all();
                    answering = changed.wait(answering).unwrap();
                }
                if let Some(reply) = answering.reply(&request[..length]) {
                    // Nobody may want it any more.
                    let _ = server.write_all(&reply);
                }
            }
        });
        Some(Fading { folder: served.folder.clone(), shared })
    }

    /// From now on it answers nothing.
    pub fn stops(&self) {
        let mut answering = self.shared.0.lock().unwrap();
        (answering.stopped, answering.waited_for) = (true, false);
    }

    /// Waits until somebody waits for it.
    pub fn is_waited_for(&self) {
        let (lock, changed) = &*self.shared;
        let waited = changed.wait_timeout_while(lock.lock().unwrap(), PATIENCE, |answering| !answering.waited_for);
        assert!(!waited.unwrap().1.timed_out(), "nobody asks it for anything");
    }

    /// It answers again, first of all who waits.
    pub fn answers(&self) {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).stopped = false;
        self.shared.1.notify_all();
    }

    /// What is in it.
    pub fn names(&self) -> Vec<String> {
        self.shared.0.lock().unwrap().names.keys().cloned().collect()
    }
}

impl Answering {
    /// What is told of a question in the kernel's protocol; nothing where it wants no answer.
    fn reply(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        let number = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
        let half = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
        let text = |at: usize| {
            let bytes = request[at..].split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        let node = number(16);
        let told = match half(4) {
            // FORGET, INTERRUPT, BATCH_FORGET
            2 | 36 | 42 => return None,
            // INIT: 7.31, writes of at most 128 KiB.
            26 => Ok([words(&[7, 31, 65536, 0, 0, 128 << 10, 1, 0]), vec![0; 32]].concat()),
            // LOOKUP
            1 => self.names.get(&text(40)).copied().map(|found| self.entry(found)).ok_or(2),
            // GETATTR, SETATTR
            3 | 4 => Ok([words(&[0; 4]), self.about(node)].concat()),
            // OPEN, OPENDIR
            14 | 27 => Ok(vec![0; 16]),
            // CREATE
            35 => {
                self.last += 1;
                self.names.insert(text(56), self.last);
                Ok([self.entry(self.last), vec![0; 16]].concat())
            }
            // WRITE
            16 => {
                let length = self.lengths.entry(node).or_default();
                *length = (*length).max(number(48) + u64::from(half(56)));
                Ok(words(&[half(56), 0]))
            }
            // STATFS: as much room as anybody wants.
            17 => {
                Ok([numbers(&[1 << 30, 1 << 30, 1 << 30, 1 << 20, 1 << 20]), words(&[4096, 255, 4096, 0]), vec![0; 24]]
                    .concat())
            }
            // UNLINK
            10 => self.names.remove(&text(40)).map(|_| Vec::new()).ok_or(2),
            // RENAME, RENAME2
            code @ (12 | 45) => {
                let at = if code == 12 { 48 } else { 56 };
                let (from, to) = (text(at), text(at + text(at).len() + 1));
                let moved = self.names.remove(&from);
                moved.map(|found| self.names.insert(to, found)).map(|_| Vec::new()).ok_or(2)
            }
            // RELEASE, FSYNC, FLUSH, RELEASEDIR, FSYNCDIR, ACCESS
            18 | 20 | 25 | 29 | 30 | 34 => Ok(Vec::new()),
            // Nothing else is known here.
            _ => Err(38),
        };
        let (error, told) = told.map_or_else(|error: i32| (-error, Vec::new()), |told| (0, told));
        let length = u32::try_from(16 + told.len()).unwrap();
        let head = [&length.to_le_bytes()[..], &error.to_le_bytes(), &request[8..16]].concat();
        Some([head, told].concat())
    }

    fn entry(&self, node: u64) -> Vec<u8> {
        [numbers(&[node, 0, 0, 0]), words(&[0, 0]), self.about(node)].concat()
    }

    fn about(&self, node: u64) -> Vec<u8> {
        let length = self.lengths.get(&node).copied().unwrap_or(0);
        let mode = if node == 1 { 0o40755 } else { 0o100_600 };
        [numbers(&[node, length, length / 512, 0, 0, 0]), words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
    }
}

fn numbers(all: &[u64]) -> Vec<u8> {
    all.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn words(all: &[u32]) -> Vec<u8> {
    all.iter().flat_map(|number| number.to_le_bytes()).collect()
}
