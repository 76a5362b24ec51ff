//! The same work by libvirt, through libvirt-dbus, on the same bus in the same run: rounds alternate.
//!
//! Where libvirt is not to be installed, `LIBVIRT_ROOT` can name a folder with its programs as they would be below `/`:
//! packages unpacked there by `dpkg -x` (libvirt-daemon, libvirt-daemon-driver-qemu, libvirt-daemon-system, libvirt-dbus,
//! libvirt-glib-1.0-0, libvirt0, python3-libvirt, iptables, and what `ldd` misses). It is laid over `/` for libvirt's processes alone.

use crate::bus::{Bench, Result, undefine};
use crate::common::client::{Domain, options};
use crate::common::memory_of;
use crate::{beside, line, percentile};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use zbus::message::Message;

const ROUNDS: usize = 15;
/// Domains in the inventory that is listed.
const MANY: usize = 1000;

/// What runs libvirtd and libvirt-dbus, with folders of their own: what they keep where virtd keeps it, all else in memory. KVM is hidden from all in
/// the namespace: where /dev/kvm is there and cannot be used, libvirtd hangs on it, or asks QEMU anew at each call.
const SCRIPT: &str = r#"
mkdir -p "$1"
if [ -n "$2" ]; then
    for folder in usr etc var; do
        mkdir -p "$1/over/$folder" "$1/work/$folder"
        mount -t overlay -o "lowerdir=$2/$folder:/$folder,upperdir=$1/over/$folder,workdir=$1/work/$folder" none "/$folder"
    done
    echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin' >> /etc/passwd
    echo 'libvirt-qemu:x:64055:' >> /etc/group
    for tables in iptables ip6tables; do
        [ -e "/usr/sbin/$tables" ] || ln -s xtables-nft-multi "/usr/sbin/$tables"
    done
fi
if [ -e /dev/kvm ]; then
    mkdir "$1/dev"
    mount -t tmpfs -o mode=755 none "$1/dev"
    mkdir "$1/dev/pts" "$1/dev/shm"
    for node in null zero full random urandom tty; do cp -a "/dev/$node" "$1/dev/"; done
    for folder in pts shm; do mount --bind "/dev/$folder" "$1/dev/$folder"; done
    ln -s pts/ptmx "$1/dev/ptmx"
    mount --move "$1/dev" /dev
fi
mkdir -p /run/libvirt
for folder in /run/libvirt /var/cache/libvirt /var/log/libvirt; do mount -t tmpfs none "$folder"; done
for folder in /etc/libvirt/qemu /var/lib/libvirt; do mkdir -p "$1$folder"; mount --bind "$1$folder" "$folder"; done
printf '%s\n' 'stdio_handler = "file"' 'user = "root"' 'group = "root"' 'namespaces = []' 'cgroup_controllers = []' \
    'security_driver = "none"' > "$1/qemu.conf"
mount --bind "$1/qemu.conf" /etc/libvirt/qemu.conf
printf '%s\n' 'auth_unix_ro = "none"' 'auth_unix_rw = "none"' > "$1/libvirtd.conf"
libvirtd --daemon --config "$1/libvirtd.conf" --pid-file "$1/libvirtd.pid"
exec libvirt-dbus "--$3"
"#;

/// A libvirt-dbus on the bus of `bench`; it ends with the bus.
pub struct Libvirt<'a> {
    bench: &'a Bench,
    dbus: std::process::Child,
    folder: PathBuf,
}

impl<'a> Libvirt<'a> {
    /// Starts it; `None`, and says so, where it is not installed.
    pub async fn start(bench: &'a Bench) -> Result<Option<Libvirt<'a>>> {
        let folder = bench.daemon.folder().join("libvirt");
        let root = std::env::var("LIBVIRT_ROOT").unwrap_or_default();
        let installed =
            ["libvirt-dbus", "libvirtd"].iter().all(|p| Path::new(&format!("{root}/usr/sbin/{p}")).exists());
        if !installed {
            println!(
                "libvirt-dbus and libvirt-daemon-driver-qemu are not installed, nor below LIBVIRT_ROOT: nothing is compared with them"
            );
            return Ok(None);
        }
        let mut command = bench.daemon.inside("unshare");
        let log = std::fs::File::create(bench.daemon.folder().join("libvirt-dbus.log"))?;
        command.args(["--mount", "sh", "-euc", SCRIPT, "sh"]).arg(&folder).arg(&root).arg(bench.daemon.kind());
        let dbus = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
        let libvirt = Libvirt { bench, dbus, folder };
        if let Err(error) = libvirt.appears().await {
            let said = std::fs::read_to_string(bench.daemon.folder().join("libvirt-dbus.log"))?;
            return Err(format!("libvirt-dbus does not come up: {error}: {said}").into());
        }
        Ok(Some(libvirt))
    }

    async fn appears(&self) -> Result<()> {
        use futures_util::StreamExt as _;
        let bus = zbus::fdo::DBusProxy::new(&self.bench.client.connection).await?;
        let mut changes = bus.receive_name_owner_changed_with_args(&[(0, "org.libvirt")]).await?;
        if !bus.name_has_owner("org.libvirt".try_into()?).await? {
            tokio::time::timeout(Duration::from_secs(30), changes.next()).await?;
        }
        Ok(())
    }

    /// What libvirtd and libvirt-dbus have in memory, in KiB.
    fn memory_kib(&self) -> Result<[u64; 2]> {
        let libvirtd = std::fs::read_to_string(self.folder.join("libvirtd.pid"))?.trim().parse()?;
        Ok([libvirtd, self.dbus.id()].map(|pid| memory_of(pid, "VmRSS:")))
    }

    /// The bench that it stands beside.
    pub fn bench(&self) -> &Bench {
        self.bench
    }

    /// A command that sees its sockets and, where it is unpacked, its programs.
    pub fn inside(&self, program: &str) -> std::process::Command {
        let mut command = self.bench.daemon.inside("nsenter");
        command.args(["--mount", "--target", &self.dbus.id().to_string(), "--", program]);
        command
    }

    /// Calls a method of any of its objects.
    pub async fn call<B>(&self, path: &str, interface: &str, method: &str, body: &B) -> Result<Message>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let connection = &self.bench.client.connection;
        Ok(connection.call_method(Some("org.libvirt"), path, Some(interface), method, body).await?)
    }

    /// Defines a domain; its path.
    pub async fn define(&self, xml: &str) -> Result<String> {
        let reply = self.call("/org/libvirt/QEMU", "org.libvirt.Connect", "DomainDefineXML", &(xml,)).await?;
        Ok(reply.body().deserialize::<zbus::ObjectPath<'_>>()?.to_string())
    }

    /// Calls a method of a domain.
    pub async fn domain<B>(&self, path: &str, method: &str, body: &B) -> Result<Message>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        self.call(path, "org.libvirt.Domain", method, body).await
    }
}

/// Compares what both can do.
pub async fn compare(bench: &Bench) -> Result<()> {
    let Some(libvirt) = Libvirt::start(bench).await? else { return Ok(()) };
    heading();
    let ours = bench.define(&guest_xml("ours")).await;
    // The first call waits until libvirt knows what QEMU can do.
    let theirs = libvirt.define(&guest_xml("theirs")).await?;
    lifecycle(&libvirt, &ours, &theirs).await?;
    libvirt.domain(&theirs, "Undefine", &(0_u32,)).await?;
    undefine(&ours).await;
    crate::snapshots::compare(&libvirt).await?;
    crate::running::compare(&libvirt).await?;
    inventory(&libvirt).await
}

/// Compares what is done with guests that run.
pub async fn compare_running(bench: &Bench) -> Result<()> {
    let Some(libvirt) = Libvirt::start(bench).await? else { return Ok(()) };
    heading();
    crate::running::compare(&libvirt).await
}

/// Compares networks, pools and volumes.
pub async fn compare_resources(bench: &Bench) -> Result<()> {
    let Some(libvirt) = Libvirt::start(bench).await? else { return Ok(()) };
    heading();
    crate::resources::compare(&libvirt).await
}

fn heading() {
    println!("\n{:<58} {:>12} {:>12} {:>7}", "the same by libvirt-dbus (median)", "virtd", "libvirt-dbus", "ratio");
}

fn guest_xml(name: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator><serial type='null'/></devices></domain>"
    )
}

/// A machine as people have them, with a disk, a card and a display.
fn machine_xml(name: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>2048</memory><vcpu>2</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os><features><acpi/><apic/></features>\
         <cpu mode='host-model'/><clock offset='utc'/><on_crash>destroy</on_crash><devices>\
         <emulator>/usr/bin/qemu-system-x86_64</emulator>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/var/lib/machines/{name}.qcow2'/>\
         <target dev='vda' bus='virtio'/></disk>\
         <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>\
         <interface type='user'><model type='virtio'/></interface><console type='pty'/>\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
         <input type='tablet' bus='usb'/><graphics type='vnc'/><video><model type='virtio'/></video>\
         <memballoon model='virtio'/><rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>\
         </devices></domain>"
    )
}

/// Times of one kind of work on both sides.
pub struct Pair(pub Vec<Duration>, pub Vec<Duration>);

impl Pair {
    /// No rounds yet.
    pub const fn new() -> Pair {
        Pair(Vec::new(), Vec::new())
    }

    /// Prints the medians.
    pub fn show(mut self, what: &str) {
        beside(what, percentile(&mut self.0, 50), percentile(&mut self.1, 50));
    }
}

/// How long it takes.
pub async fn timed<T>(work: impl Future<Output = T>) -> (Duration, T) {
    let begun = Instant::now();
    let done = work.await;
    (begun.elapsed(), done)
}

async fn lifecycle(libvirt: &Libvirt<'_>, ours: &Domain, theirs: &str) -> Result<()> {
    let [mut start, mut read, mut xml, mut pause, mut end] = [const { Pair::new() }; 5];
    for _ in 0..ROUNDS {
        start.0.push(timed(ours.run("Start")).await.0);
        start.1.push(theirs_timed(libvirt, theirs, "Create", &(0_u32,)).await?);
        for _ in 0..20 {
            read.0.push(timed(ours.state()).await.0 / 2);
            read.1.push(theirs_timed(libvirt, theirs, "GetState", &(0_u32,)).await?);
            xml.0.push(timed(ours.xml()).await.0);
            xml.1.push(theirs_timed(libvirt, theirs, "GetXMLDesc", &(0_u32,)).await?);
        }
        let both = async {
            ours.bare("Suspend").await.expect("Suspend");
            ours.bare("Resume").await.expect("Resume");
        };
        pause.0.push(timed(both).await.0);
        let suspended = theirs_timed(libvirt, theirs, "Suspend", &()).await?;
        pause.1.push(suspended + theirs_timed(libvirt, theirs, "Resume", &()).await?);
        end.0.push(timed(ours.run("Destroy")).await.0);
        end.1.push(theirs_timed(libvirt, theirs, "Destroy", &(0_u32,)).await?);
    }
    start.show("Start");
    read.show("State of a domain");
    xml.show("GetXML");
    pause.show("Suspend + Resume");
    end.show("Destroy");
    Ok(())
}

async fn theirs_timed<B>(libvirt: &Libvirt<'_>, path: &str, method: &str, body: &B) -> Result<Duration>
where
    B: serde::Serialize + zbus::wire::DynamicType,
{
    let (time, done) = timed(libvirt.domain(path, method, body)).await;
    done.map(|_| time)
}

/// What a list of machines on a screen needs: name and state of each.
async fn inventory(libvirt: &Libvirt<'_>) -> Result<()> {
    let [mut define, mut list] = [const { Pair::new() }; 2];
    let before = (libvirt.bench.daemon.memory_kib(), libvirt.memory_kib()?);
    for number in 0..MANY {
        let xml = machine_xml(&format!("many-{number}"));
        define.0.push(timed(libvirt.bench.define(&xml)).await.0);
        let (time, defined) = timed(libvirt.define(&xml)).await;
        defined?;
        define.1.push(time);
    }
    for _ in 0..5 {
        let all = (options([]),);
        let ours = libvirt.bench.client.call("/org/virt", "org.virt.Manager.ListDomains", &all);
        list.0.push(timed(ours).await.0);
        let (time, listed) = timed(list_theirs(libvirt)).await;
        listed?;
        list.1.push(time);
    }
    define.show("Define");
    list.show(&format!("name and state of {MANY} domains"));
    let after = (libvirt.bench.daemon.memory_kib(), libvirt.memory_kib()?);
    let each = |before: u64, after: u64| format!("{:.1} KiB", after.saturating_sub(before) as f64 / MANY as f64);
    line("memory of each of them: virtd", each(before.0, after.0));
    line("the same: libvirtd", each(before.1[0], after.1[0]));
    line("the same: libvirt-dbus", each(before.1[1], after.1[1]));
    Ok(())
}

/// There is no call for all: paths, then each domain's properties.
async fn list_theirs(libvirt: &Libvirt<'_>) -> Result<()> {
    let reply = libvirt.call("/org/libvirt/QEMU", "org.libvirt.Connect", "ListDomains", &(0_u32,)).await?;
    let paths: Vec<zbus::OwnedObjectPath> = reply.body().deserialize()?;
    for path in paths {
        libvirt.domain(&path, "GetState", &(0_u32,)).await?;
        let name = ("org.libvirt.Domain", "Name");
        libvirt.call(&path, "org.freedesktop.DBus.Properties", "Get", &name).await?;
    }
    Ok(())
}
