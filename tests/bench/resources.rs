//! Networks, pools and volumes beside libvirt's, on a system bus in a network namespace of its own.

use crate::bus::{Bench, Result};
use crate::common::client::{Options, options};
use crate::libvirt::{Libvirt, Pair, timed};
use std::path::Path;
use zbus::OwnedObjectPath;
use zbus::message::Message;

const ROUNDS: usize = 10;
const VOLUMES: usize = 2000;
/// Of what is cloned; full of what is no zeros.
const CLONED: usize = 64 << 20;

/// Starts, refreshes, lists, makes and copies, in turns.
pub async fn compare(libvirt: &Libvirt<'_>) -> Result<()> {
    networks(libvirt).await?;
    volumes(libvirt).await
}

/// An object that a call made.
fn made(reply: &Message) -> Result<String> {
    Ok(reply.body().deserialize::<OwnedObjectPath>()?.to_string())
}

/// Calls a method of virtd.
async fn ours<B>(bench: &Bench, path: &str, member: &str, body: &B) -> Result<Message>
where
    B: serde::Serialize + zbus::wire::DynamicType,
{
    bench.client.call(path, member, body).await.map_err(|(name, text)| format!("{member}: {name}: {text}").into())
}

fn network_xml(name: &str, net: u8) -> String {
    format!(
        "<network><name>{name}</name><forward mode='nat'/><bridge name='{name}0'/>\
         <ip address='192.168.{net}.1' netmask='255.255.255.0'><dhcp>\
         <range start='192.168.{net}.2' end='192.168.{net}.254'/></dhcp></ip></network>"
    )
}

async fn networks(libvirt: &Libvirt<'_>) -> Result<()> {
    let bench = libvirt.bench();
    let define = "org.virt.Manager.Network.DefineNetwork";
    let reply = ours(bench, "/org/virt", define, &(network_xml("ours", 201), options([]))).await?;
    let network = made(&reply)?;
    let connect = ("/org/libvirt/QEMU", "org.libvirt.Connect");
    let reply = libvirt.call(connect.0, connect.1, "NetworkDefineXML", &(network_xml("theirs", 202),)).await?;
    let other = made(&reply)?;
    let [mut start, mut destroy] = [const { Pair::new() }; 2];
    for _ in 0..ROUNDS {
        for (pair, member, method) in [(&mut start, "Start", "Create"), (&mut destroy, "Destroy", "Destroy")] {
            let member = format!("org.virt.Network.{member}");
            let (time, done) = timed(ours(bench, &network, &member, &(options([]),))).await;
            done?;
            pair.0.push(time);
            let (time, done) = timed(libvirt.call(&other, "org.libvirt.Network", method, &())).await;
            done?;
            pair.1.push(time);
        }
    }
    start.show("Network with NAT and DHCP: start");
    destroy.show("the same: destroy");
    ours(bench, &network, "org.virt.Network.Undefine", &(options([]),)).await?;
    libvirt.call(&other, "org.libvirt.Network", "Undefine", &()).await?;
    Ok(())
}

/// As many images, each second one qcow2, and one that is full.
fn fill(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let qcow2 = folder.join("0.qcow2");
    let done =
        std::process::Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&qcow2).arg("1G").status()?;
    if !done.success() {
        return Err("qemu-img cannot make an image".into());
    }
    for number in 1..VOLUMES - 1 {
        if number % 2 == 0 {
            std::fs::copy(&qcow2, folder.join(format!("{number}.qcow2")))?;
        } else {
            std::fs::File::create(folder.join(format!("{number}.img")))?.set_len(1 << 30)?;
        }
    }
    let full: Vec<u8> = (0..CLONED).map(|at| (at * 31 + at / 4096) as u8 | 1).collect();
    Ok(std::fs::write(folder.join("full.img"), full)?)
}

fn pool_xml(name: &str, folder: &Path) -> String {
    format!("<pool type='dir'><name>{name}</name><target><path>{}</path></target></pool>", folder.display())
}

fn volume_xml(name: &str, bytes: usize, format: &str) -> String {
    format!(
        "<volume><name>{name}</name><capacity>{bytes}</capacity><allocation>0</allocation>\
         <target><format type='{format}'/></target></volume>"
    )
}

async fn volumes(libvirt: &Libvirt<'_>) -> Result<()> {
    let bench = libvirt.bench();
    // In memory, for both: it is not the disk that is to be measured.
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let folders = ["pool-ours", "pool-theirs"].map(|name| folder.path().join(name));
    for folder in &folders {
        fill(folder)?;
    }
    let before = bench.daemon.memory_kib();
    let define = "org.virt.Manager.Storage.DefineStoragePool";
    let reply = ours(bench, "/org/virt", define, &(pool_xml("ours", &folders[0]), options([]))).await?;
    let connect = ("/org/libvirt/QEMU", "org.libvirt.Connect");
    let document = (pool_xml("theirs", &folders[1]), 0_u32);
    let other = made(&libvirt.call(connect.0, connect.1, "StoragePoolDefineXML", &document).await?)?;
    let pools = Pools { libvirt, ours: made(&reply)?, theirs: other, their_folder: &folders[1] };
    let [mut start, mut refresh, mut list, mut create, mut delete, mut clone] = [const { Pair::new() }; 6];
    pools.both(&mut start, "Start", "Create").await?;
    for round in 0..ROUNDS {
        pools.both(&mut refresh, "Refresh", "Refresh").await?;
        pools.list(&mut list).await?;
        pools.create_and_delete(&mut create, &mut delete, &format!("made-{round}.qcow2")).await?;
        pools.clone_full(&mut clone, &format!("copy-{round}.img")).await?;
    }
    start.show(&format!("Pool with {VOLUMES} volumes: start (once)"));
    refresh.show("the same: refresh");
    list.show("the same: names, formats and sizes of all");
    create.show("Volume: create, qcow2");
    delete.show("the same: delete");
    clone.show("Volume of 64 MiB: clone");
    crate::line(
        "memory of a volume: virtd",
        format!("{:.1} KiB", (bench.daemon.memory_kib().saturating_sub(before)) as f64 / VOLUMES as f64),
    );
    pools.on_ours("Destroy").await?;
    pools.on_ours("Undefine").await?;
    libvirt.call(&pools.theirs, "org.libvirt.StoragePool", "Destroy", &()).await?;
    libvirt.call(&pools.theirs, "org.libvirt.StoragePool", "Undefine", &()).await?;
    Ok(())
}

/// A pool of each, with the same volumes.
struct Pools<'a> {
    libvirt: &'a Libvirt<'a>,
    ours: String,
    theirs: String,
    their_folder: &'a Path,
}

impl Pools<'_> {
    async fn on_ours(&self, member: &str) -> Result<Message> {
        let member = format!("org.virt.StoragePool.{member}");
        ours(self.libvirt.bench(), &self.ours, &member, &(options([]),)).await
    }

    /// Calls a method of each pool that takes nothing.
    async fn both(&self, pair: &mut Pair, member: &str, method: &str) -> Result<()> {
        let (time, done) = timed(self.on_ours(member)).await;
        done?;
        pair.0.push(time);
        let (time, done) = timed(self.libvirt.call(&self.theirs, "org.libvirt.StoragePool", method, &(0_u32,))).await;
        done?;
        pair.1.push(time);
        Ok(())
    }

    async fn list(&self, pair: &mut Pair) -> Result<()> {
        let (time, listed) = timed(self.on_ours("ListVolumes")).await;
        let rows: Vec<(OwnedObjectPath, String, String, u64, u64)> = listed?.body().deserialize()?;
        assert_eq!(rows.len(), VOLUMES);
        pair.0.push(time);
        let (time, listed) = timed(listed_by_libvirt(self.libvirt, &self.theirs)).await;
        assert_eq!(listed?, VOLUMES);
        pair.1.push(time);
        Ok(())
    }

    async fn create_and_delete(&self, create: &mut Pair, delete: &mut Pair, name: &str) -> Result<()> {
        let bench = self.libvirt.bench();
        let body = (volume_xml(name, 1 << 30, "qcow2"), options([]));
        let (time, done) = timed(ours(bench, &self.ours, "org.virt.StoragePool.CreateVolume", &body)).await;
        let (volume, _job): (OwnedObjectPath, OwnedObjectPath) = done?.body().deserialize()?;
        create.0.push(time);
        let document = (volume_xml(name, 1 << 30, "qcow2"), 0_u32);
        let making = self.libvirt.call(&self.theirs, "org.libvirt.StoragePool", "StorageVolCreateXML", &document);
        let (time, done) = timed(making).await;
        let other = made(&done?)?;
        create.1.push(time);

        let empty: Options<'_> = options([]);
        let (time, done) = timed(ours(bench, volume.as_str(), "org.virt.StorageVolume.Delete", &(empty,))).await;
        done?;
        delete.0.push(time);
        let (time, done) = timed(self.libvirt.call(&other, "org.libvirt.StorageVol", "Delete", &(0_u32,))).await;
        done?;
        delete.1.push(time);
        Ok(())
    }

    /// Copies the volume that is full; the copies are deleted again.
    async fn clone_full(&self, pair: &mut Pair, name: &str) -> Result<()> {
        let bench = self.libvirt.bench();
        let full = made(&ours(bench, &self.ours, "org.virt.StoragePool.GetVolume", &("full.img",)).await?)?;
        let body = (name, options([]));
        let (time, done) = timed(ours(bench, &full, "org.virt.StorageVolume.Clone", &body)).await;
        let (volume, _job): (OwnedObjectPath, OwnedObjectPath) = done?.body().deserialize()?;
        pair.0.push(time);
        let key = self.their_folder.join("full.img");
        let document = (volume_xml(name, CLONED, "raw"), key.to_str().unwrap_or_default(), 0_u32);
        let copying = self.libvirt.call(&self.theirs, "org.libvirt.StoragePool", "StorageVolCreateXMLFrom", &document);
        let (time, done) = timed(copying).await;
        let other = made(&done?)?;
        pair.1.push(time);
        ours(bench, volume.as_str(), "org.virt.StorageVolume.Delete", &(options([]),)).await?;
        self.libvirt.call(&other, "org.libvirt.StorageVol", "Delete", &(0_u32,)).await?;
        Ok(())
    }
}

/// What a client of libvirt-dbus asks to show a pool: the volumes, then each one's name and sizes.
async fn listed_by_libvirt(libvirt: &Libvirt<'_>, pool: &str) -> Result<usize> {
    let reply = libvirt.call(pool, "org.libvirt.StoragePool", "ListStorageVolumes", &(0_u32,)).await?;
    let volumes: Vec<OwnedObjectPath> = reply.body().deserialize()?;
    for volume in &volumes {
        let get = ("org.libvirt.StorageVol", "Name");
        libvirt.call(volume.as_str(), "org.freedesktop.DBus.Properties", "Get", &get).await?;
        libvirt.call(volume.as_str(), "org.libvirt.StorageVol", "GetInfo", &(0_u32,)).await?;
    }
    Ok(volumes.len())
}
