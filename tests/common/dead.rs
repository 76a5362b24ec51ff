//! A file system that never answers, as a server that has gone leaves it: whoever looks into it waits until it is let go.

use super::client::{Client, Domain, Refusal, options};
use super::snapshots::{Player, with};
use super::{Daemon, skip};
use std::fs::File;
use std::path::{Path, PathBuf};
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
pub const MEMBERS: [&str; 17] = [
    "Manager.ValidateDomain",
    "Manager.DefineDomain",
    "Manager.CreateDomain",
    "Manager.RestoreDomain",
    "Manager.CompareDomains",
    "Manager.DomainToNative",
    "Domain.Start",
    "Domain.Save",
    "Domain.CheckCreateSnapshot",
    "Domain.CreateSnapshot",
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
        let (interface, method) = member.split_once('.').expect("interface.method");
        let (domain, none) = (&self.player.domain, || options([]));
        let file = |what: &str| self.folder.join(what).display().to_string();
        let emulator = format!("<devices><emulator>{}</emulator>", file("qemu-system-x86_64"));
        let own_emulator = self.xml.lines().find(|line| line.contains("<emulator>")).unwrap_or_default();
        let elsewhere = self.xml.replace(own_emulator, "").replace("<devices>", &emulator);
        match member {
            "Manager.ValidateDomain" | "Manager.DefineDomain" => {
                let xml = if method == "ValidateDomain" { &elsewhere } else { &self.xml };
                domain.client.call("/org/virt", &format!("org.virt.{member}"), &(xml, none())).await
            }
            "Manager.CreateDomain" => {
                let uuid = self.xml.lines().find(|line| line.contains("<uuid>")).expect("a uuid");
                let name = (format!("<name>{}<", self.name), format!("<name>{}-transient<", self.name));
                let xml = self.xml.replace(uuid, "").replace(&name.0, &name.1);
                domain.client.call("/org/virt", "org.virt.Manager.CreateDomain", &(xml, none())).await
            }
            "Manager.CompareDomains" => {
                let both = (&self.xml, &elsewhere, none());
                domain.client.call("/org/virt", "org.virt.Manager.CompareDomains", &both).await
            }
            "Manager.DomainToNative" => {
                let asked = (&elsewhere, "qemu-argv");
                domain.client.call("/org/virt", "org.virt.Manager.DomainToNative", &asked).await
            }
            "Domain.CheckCreateSnapshot" | "Domain.CreateSnapshot" => {
                let overlay = format!(
                    "<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{}'/></disk></disks>\
                     </domainsnapshot>",
                    file("overlay")
                );
                domain.call(method, &(overlay, with([("disk-only", true)]))).await
            }
            "Manager.RestoreDomain" => {
                domain.client.call("/org/virt", "org.virt.Manager.RestoreDomain", &(file("saved"), none())).await
            }
            "Domain.Save" => domain.call(method, &(file("saved"), none())).await,
            "Domain.UpdateDevice" => {
                let medium = format!(
                    "<disk type='file' device='cdrom'><source file='{}'/><target dev='sda' bus='sata'/><readonly/></disk>",
                    file("other.iso")
                );
                domain.call(method, &(medium, none())).await
            }
            "Domain.Undefine" | "Domain.CheckUndefine" => {
                domain.call(method, &(with([("nvram", true), ("snapshots-metadata", true)]),)).await
            }
            "Domain.Start" => domain.run(method).await,
            _ if interface == "Snapshot" => self.player.call("s", method, none()).await,
            _ => panic!("{member} is not called here"),
        }
    }
}
