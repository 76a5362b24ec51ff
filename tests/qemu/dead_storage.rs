//! Storage that never answers, and tools that never end: they cost the machine that has them, and nobody else (W1, W3).

use crate::common::client::{Client, Domain, options};
use crate::common::dead::{Dead, Doomed, MEMBERS};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, PATIENCE, Setup};
use std::future::Future;
use std::time::Duration;
use tokio::time::timeout;

/// Calls at once, many more than this host has CPUs.
const MANY: usize = 12;

/// What is quick has an answer by then, however busy the host is.
async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), work).await.unwrap_or_else(|_| panic!("{what} waits for another's storage"))
}

/// A machine whose files are all in that folder.
fn machine(name: &str, dead: &Dead) -> String {
    let file = |what: &str| dead.file(&format!("{name}-{what}"));
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><os><type arch='x86_64' machine='q35'>hvm\
         </type><loader readonly='yes' type='pflash'>{}</loader><nvram>{}</nvram></os><features><acpi/></features><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/></disk></devices></domain>",
        file("code.fd"),
        file("vars.fd"),
        file("disk.qcow2")
    )
}

async fn ping(client: &Client) {
    soon("Ping", client.call("/org/virt", "org.freedesktop.DBus.Peer.Ping", &())).await.expect("a pong");
}

/// Every member that looks at files, of a machine whose files cannot be looked at, as many at once as there are names.
fn calls_to_the_dead(dead: &Dead, domains: &[Domain]) -> Vec<tokio::task::JoinHandle<()>> {
    let mut calls = Vec::new();
    for domain in domains {
        let snapshot = format!(
            "<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{}'/></disk></disks>\
             </domainsnapshot>",
            dead.file("overlay")
        );
        let bodies = [("CheckCreateSnapshot", "disk-only"), ("CreateSnapshot", "disk-only")];
        for (method, option) in bodies {
            let (domain, snapshot) = (domain.clone(), snapshot.clone());
            calls.push(tokio::spawn(async move {
                let _ = domain.call(method, &(snapshot.as_str(), with([(option, true)]))).await;
            }));
        }
        let one = domain.clone();
        calls.push(tokio::spawn(async move {
            let _ = one.run("Start").await;
        }));
        let one = domain.clone();
        calls.push(tokio::spawn(async move {
            let _ = one.call("Undefine", &(with([("nvram", true)]),)).await;
        }));
    }
    calls
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_never_answers_costs_its_machines_alone() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some(mut dead) = Dead::mount(&daemon) else { return };
    let Some(tick) = Tick::new(&daemon, "alive", "") else { return };
    let root = Client { connection: daemon.connect().await };
    let alive = root.define(&tick.xml).await.expect("defined");
    // They may be looked at when they are defined, and are defined all the same.
    let define = |n: usize| {
        let (root, xml) = (root.clone(), machine(&format!("dead-{n}"), &dead));
        tokio::spawn(async move { root.define(&xml).await.expect("defined") })
    };
    let defining: Vec<_> = (0..MANY).map(define).collect();
    let mut domains = Vec::new();
    for one in defining {
        domains.push(timeout(PATIENCE * 5, one).await.expect("an answer").unwrap());
    }
    let calls = calls_to_the_dead(&dead, &domains);
    let emulator = format!(
        "<domain type='qemu'><name>e</name><memory>65536</memory><os><type>hvm</type></os><devices><emulator>{}</emulator>\
         </devices></domain>",
        dead.file("qemu")
    );
    let named = root.clone();
    let validated = tokio::spawn(async move {
        named.call("/org/virt", "org.virt.Manager.ValidateDomain", &(emulator.as_str(), options([]))).await
    });
    for _ in 0..3 {
        ping(&root).await;
        soon("a read", alive.xml()).await;
        soon("a read of a machine on dead storage", domains[0].xml()).await;
        soon("Start", alive.run("Start")).await.expect("started");
        tick.counts_to(1).await;
        let check = ("<domainsnapshot/>", with([("disk-only", true)]));
        soon("CheckCreateSnapshot", alive.call("CheckCreateSnapshot", &check)).await.expect("checked");
        soon("Destroy", alive.run("Destroy")).await.expect("destroyed");
    }
    // Whoever named the dead is told so in the end, and not let wait for ever.
    for call in calls {
        timeout(PATIENCE * 5, call).await.expect("a call to the dead has an answer").unwrap();
    }
    let told = timeout(PATIENCE * 5, validated).await.expect("an answer").unwrap();
    told.expect("findings");
    dead.let_go();
    ping(&root).await;
}

/// Members that name no file and touch none of a guest's, but where the machine runs that they are called on.
const OTHERS: [&str; 153] = [
    "Manager.GetDomain",
    "Manager.GetDomainByName",
    "Manager.GetDomainById",
    "Manager.ListDomains",
    "Manager.GetJobs",
    "Manager.GetCapabilities",
    "Manager.GetDomainCapabilities",
    "Manager.OpenMetrics",
    "Manager.SubscribeStats",
    "Manager.Can",
    "Domain.ApplyPending",
    "Domain.Shutdown",
    "Domain.Reboot",
    "Domain.Reset",
    "Domain.Destroy",
    "Domain.Suspend",
    "Domain.Resume",
    "Domain.InjectNMI",
    "Domain.Wakeup",
    "Domain.Screenshot",
    "Domain.OpenGraphics",
    "Domain.OpenChannel",
    "Domain.OpenConsole",
    "Domain.SendKey",
    "Domain.AgentCommand",
    "Domain.GetInterfaceAddresses",
    "Domain.GetGuestInfo",
    "Domain.GetTime",
    "Domain.SetTime",
    "Domain.SetUserPassword",
    "Domain.FreezeFilesystems",
    "Domain.ThawFilesystems",
    "Domain.TrimFilesystems",
    "Domain.GuestExec",
    "Domain.SuspendGuest",
    "Domain.DetachDevice",
    "Domain.SetLink",
    "Domain.SetVCPUs",
    "Domain.SetMemory",
    "Domain.SetMemoryStatsPeriod",
    "Domain.SetGraphicsPassword",
    "Domain.SetBlockThrottle",
    "Domain.GetBlockThrottle",
    "Domain.SetInterfaceBandwidth",
    "Domain.GetInterfaceBandwidth",
    "Domain.SetSchedulerParameters",
    "Domain.GetSchedulerParameters",
    "Domain.SetMemoryParameters",
    "Domain.GetMemoryParameters",
    "Domain.DetachDeviceAlias",
    "Domain.GetManagedSaveXML",
    "Domain.ManagedSaveRemove",
    "Domain.ListSnapshots",
    "Domain.GetSnapshot",
    "Domain.CreateCheckpoint",
    "Domain.OpenBackup",
    "Domain.ListCheckpoints",
    "Domain.GetCheckpoint",
    "Domain.GetXML",
    "Domain.Rename",
    "Domain.SetTitle",
    "Domain.SetDescription",
    "Domain.SetMetadata",
    "Domain.GetMetadata",
    "Domain.Can",
    "Domain.SetBlockThreshold",
    "Snapshot.GetXML",
    "Snapshot.Can",
    "Checkpoint.Delete",
    "Checkpoint.GetXML",
    "Checkpoint.Can",
    "Manager.Storage.DefineStoragePool",
    "Manager.Storage.CreateStoragePool",
    "Manager.Storage.GetStoragePool",
    "Manager.Storage.GetStoragePoolByName",
    "Manager.Storage.ListStoragePools",
    "Manager.Storage.ValidateStoragePool",
    "Manager.Storage.GetPoolCapabilities",
    "Manager.Storage.FindSources",
    "Manager.Storage.GetVolumeByPath",
    "Manager.Storage.GetVolumeByKey",
    "Manager.Storage.GetQuota",
    "StoragePool.Start",
    "StoragePool.Refresh",
    "StoragePool.Destroy",
    "StoragePool.Build",
    "StoragePool.Delete",
    "StoragePool.CheckDelete",
    "StoragePool.CreateVolume",
    "StoragePool.CheckCreateVolume",
    "StoragePool.AddVolume",
    "StoragePool.GetVolume",
    "StoragePool.ListVolumes",
    "StoragePool.GetXML",
    "StoragePool.Undefine",
    "StoragePool.CheckUndefine",
    "StoragePool.Can",
    "StorageVolume.Delete",
    "StorageVolume.CheckDelete",
    "StorageVolume.Clone",
    "StorageVolume.Resize",
    "StorageVolume.Wipe",
    "StorageVolume.Upload",
    "StorageVolume.Download",
    "StorageVolume.OpenNBD",
    "StorageVolume.GetXML",
    "StorageVolume.Can",
    "Manager.Secret.DefineSecret",
    "Manager.Secret.GetSecret",
    "Manager.Secret.GetSecretByUsage",
    "Manager.Secret.ListSecrets",
    "Secret.SetValue",
    "Secret.SetValueFromFD",
    "Secret.GetValue",
    "Secret.GetXML",
    "Secret.Undefine",
    "Secret.CheckUndefine",
    "Secret.Can",
    "Job.Cancel",
    "Job.Finish",
    "StatsSubscription.Close",
    "Manager.NodeDevice.ListNodeDevices",
    "Manager.NodeDevice.GetNodeDevice",
    "Manager.NodeDevice.GetNodeDeviceByWWN",
    "Manager.NodeDevice.CreateNodeDevice",
    "Manager.NodeDevice.DefineNodeDevice",
    "Host.Reconnect",
    "Host.Refresh",
    "NodeDevice.Detach",
    "NodeDevice.Reattach",
    "NodeDevice.Reset",
    "NodeDevice.CheckDetach",
    "NodeDevice.Destroy",
    "NodeDevice.GetXML",
    "NodeDevice.Can",
    "Manager.Network.CreateNetwork",
    "Manager.Network.DefineNetwork",
    "Manager.Network.GetNetwork",
    "Manager.Network.GetNetworkByName",
    "Manager.Network.ListNetworks",
    "Manager.Network.ValidateNetwork",
    "Network.Can",
    "Network.CheckDestroy",
    "Network.CheckStart",
    "Network.CheckUndefine",
    "Network.Destroy",
    "Network.GetLeases",
    "Network.GetXML",
    "Network.RemoveHost",
    "Network.SetHost",
    "Network.Start",
    "Network.Undefine",
    "Network.Update",
];

/// Every method there is, as `Interface.Method`.
fn all_methods() -> Vec<String> {
    let mut all = Vec::new();
    for xml in virtd::bus::table::FILES {
        let named = xml.split("<interface name=\"org.virt.").nth(1).and_then(|rest| rest.split('"').next());
        let interface = named.expect("an interface");
        let methods = xml.split("<method name=\"").skip(1).filter_map(|rest| rest.split('"').next().map(str::to_owned));
        all.extend(methods.map(|method| format!("{interface}.{method}")));
    }
    all
}

/// Whoever adds a member says here whether it has to do with files.
#[test]
fn every_member_is_known_to_name_files_or_not_to() {
    let mut known: Vec<&str> = MEMBERS.into_iter().chain(OTHERS).collect();
    let mut all = all_methods();
    known.sort_unstable();
    all.sort_unstable();
    assert_eq!(known, all);
}

/// Each member of each of many machines, all at once, on files that do not answer.
#[tokio::test(flavor = "multi_thread")]
async fn every_member_that_names_dead_files_leaves_the_others_answered() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some(tick) = Tick::new(&daemon, "alive", "") else { return };
    let root = Client { connection: daemon.connect().await };
    let alive = root.define(&tick.xml).await.expect("defined");
    let storage = daemon.folder().join("storage");
    std::fs::create_dir(&storage).unwrap();
    let mut machines = Vec::new();
    for member in MEMBERS {
        let name = member.replace('.', "-").to_lowercase();
        let Some(one) = Doomed::define(&root, &storage, &name).await else { return };
        machines.push(one);
    }
    let Some(mut dead) = Dead::mount_over(&daemon, storage) else { return };
    let mut calls = tokio::task::JoinSet::new();
    // On a machine of its own nothing but the files can keep it waiting; on one, they keep each other.
    let each = machines.iter().zip(MEMBERS);
    for (machine, member) in each.chain(MEMBERS.iter().map(|member| (&machines[0], *member))) {
        let machine = machine.clone();
        calls.spawn(async move { (member, machine.call(member).await) });
    }
    for _ in 0..3 {
        ping(&root).await;
        soon("a read", alive.xml()).await;
        soon("Start", alive.run("Start")).await.expect("started");
        tick.counts_to(1).await;
        for method in ["Suspend", "Resume"] {
            soon(method, alive.bare(method)).await.expect(method);
        }
        let check = ("<domainsnapshot/>", with([("disk-only", true)]));
        soon("CheckCreateSnapshot", alive.call("CheckCreateSnapshot", &check)).await.expect("checked");
        soon("Destroy", alive.run("Destroy")).await.expect("destroyed");
    }
    let mut answered = std::collections::BTreeSet::new();
    while let Some(call) = timeout(PATIENCE * 5, calls.join_next()).await.expect("every call has an answer in the end")
    {
        let (member, told) = call.unwrap();
        if let Err((name, why)) = told {
            assert!(!name.ends_with("Internal") && !why.is_empty(), "{member}: {name}: {why}");
        }
        answered.insert(member);
    }
    assert_eq!(answered.len(), MEMBERS.len());
    dead.let_go();
}

/// A machine whose disk is in a folder of its own below the daemon's.
fn stored_in(daemon: &Daemon, name: &str, folder: &str) -> Option<Tick> {
    let mut tick = Tick::new(daemon, name, "")?;
    let folder = daemon.folder().join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    let disk = folder.join(format!("{name}.qcow2"));
    std::fs::rename(&tick.disk, &disk).unwrap();
    tick.xml = tick.xml.replace(&tick.disk.display().to_string(), &disk.display().to_string());
    tick.disk = disk;
    Some(tick)
}

/// The storage of a running guest dies: what others are lent, and give back, does not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn files_lent_on_storage_that_died_keep_no_others_from_being_lent_and_given_back() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let (Some(lost), Some(alive)) = (stored_in(&daemon, "lost", "storage"), Tick::new(&daemon, "alive", "")) else {
        return;
    };
    let root = Client { connection: daemon.connect().await };
    let [lost_one, alive_one] = [root.define(&lost.xml).await, root.define(&alive.xml).await].map(|one| one.unwrap());
    lost_one.run("Start").await.expect("started");
    lost.counts_to(1).await;
    let Some(mut dead) = Dead::mount_over(&daemon, daemon.folder().join("storage")) else { return };
    for _ in 0..3 {
        soon("Start", alive_one.run("Start")).await.expect("started");
        alive.counts_to(1).await;
        soon("Destroy", alive_one.run("Destroy")).await.expect("destroyed");
    }
    // Its own files are given back in the background, as soon as they answer.
    soon("Destroy of a guest on dead storage", lost_one.run("Destroy")).await.expect("destroyed");
    soon("Start", alive_one.run("Start")).await.expect("started");
    soon("Destroy", alive_one.run("Destroy")).await.expect("destroyed");
    dead.let_go();
}

/// Which paths are one file is found out where storage answers, however many files there are that do not.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_others_stand_on_are_recognised_beside_many_that_do_not_answer() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some(mut dead) = Dead::mount(&daemon) else { return };
    let (Some(base), Some(alive)) = (stored_in(&daemon, "base", "golden"), Tick::new(&daemon, "alive", "")) else {
        return;
    };
    let root = Client { connection: daemon.connect().await };
    let alive = root.define(&alive.xml).await.expect("defined");
    for number in 0..MANY {
        let file = dead.file(&format!("{number}.raw"));
        let xml = format!(
            "<domain type='qemu'><name>dead-{number}</name><memory>16384</memory><os><type>hvm</type></os><devices>\
             <disk><source file='{file}'/><target dev='vda'/></disk></devices></domain>"
        );
        // Its image is raw: what is in it is nobody's business, and nobody looks.
        soon("DefineDomain", root.define(&xml)).await.expect("defined");
        soon("Start", alive.run("Start")).await.expect("started");
        soon("Destroy", alive.run("Destroy")).await.expect("destroyed");
    }
    let top = daemon.folder().join("top.qcow2");
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([&base.disk, &top])
        .status();
    assert!(made.expect("qemu-img").success());
    let stands = base.xml.replace("<name>base<", "<name>stands<").replace(
        &format!("<source file='{}'/>", base.disk.display()),
        &format!(
            "<source file='{}'/><backingStore type='file'><format type='qcow2'/><source file='{}'/><backingStore/></backingStore>",
            top.display(),
            base.disk.display()
        ),
    );
    root.define(&stands).await.expect("defined");
    let link = daemon.folder().join("link.qcow2");
    std::os::unix::fs::symlink(&base.disk, &link).expect("linked");
    let writes = base.xml.replace(&base.disk.display().to_string(), &link.display().to_string());
    let writes = root.define(&writes).await.expect("defined");
    let (name, why) = soon("Start", writes.run("Start")).await.expect_err("another machine stands on it");
    assert!(name.ends_with("InUse") && why.contains("domain 'stands'"), "{name}: {why}");
    dead.let_go();
}

/// The host has booted, and a server that files were lent on has not.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_lent_before_the_host_booted_keeps_no_virtd_from_starting() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let (Some(lost), Some(alive)) = (stored_in(&daemon, "lost", "storage"), Tick::new(&daemon, "alive", "")) else {
        return;
    };
    let root = Client { connection: daemon.connect().await };
    for tick in [&lost, &alive] {
        root.define(&tick.xml).await.expect("defined").run("Start").await.expect("started");
        tick.counts_to(1).await;
    }
    daemon.kill_virtd().await;
    for tick in [&lost, &alive] {
        nix::sys::signal::kill(daemon.qemu_of(&tick.name).unwrap(), nix::sys::signal::Signal::SIGKILL).unwrap();
        daemon.qemu_gone(&tick.name).await;
    }
    let books = daemon.root().join("var/lib/virt/access.json");
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let text = std::fs::read_to_string(&books).unwrap();
    assert!(text.contains("lost.qcow2") && text.contains("alive.qcow2") && text.contains(boot_id.trim()), "{text}");
    std::fs::write(&books, text.replace(boot_id.trim(), "4d0e7a7e-0000-4000-8000-000000000000")).unwrap();
    let Some(mut dead) = Dead::mount_over(&daemon, daemon.folder().join("storage")) else { return };

    daemon.start_virtd_with(&[]).await;
    let root = Client { connection: daemon.connect().await };
    ping(&root).await;
    let (lost_one, alive_one) = (root.named("lost").await.unwrap(), root.named("alive").await.unwrap());
    soon("a read of a machine on dead storage", lost_one.xml()).await;
    soon("looking after another machine", alive_one.is_looked_after()).await;
    soon("Start", alive_one.run("Start")).await.expect("started");
    alive.counts_to(1).await;
    soon("Destroy", alive_one.run("Destroy")).await.expect("destroyed");
    let text = std::fs::read_to_string(&books).unwrap();
    assert!(text.contains("lost.qcow2") && !text.contains("alive.qcow2"), "what answers is given back: {text}");
    dead.let_go();
}

/// W3: a pipe as a disk keeps qemu-img waiting for its other end.
#[tokio::test(flavor = "multi_thread")]
async fn a_tool_that_never_ends_has_a_limit() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let Some(tick) = Tick::new(&daemon, "stuck", "") else { return };
    let root = Client { connection: daemon.connect().await };
    let domain = root.define(&tick.xml).await.expect("defined");
    let player = Player { domain: domain.clone() };
    std::fs::remove_file(&tick.disk).unwrap();
    let pipe = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &tick.disk, pipe, rustix::fs::Mode::from_raw_mode(0o666), 0).unwrap();
    let refused = timeout(PATIENCE * 3, player.create("<domainsnapshot/>", options([])));
    let refused = refused.await.expect("an answer").expect_err("nothing answers");
    assert!(refused.1.contains(&tick.disk.display().to_string()), "{refused:?}");
    // What it kept waiting is free again.
    std::fs::remove_file(&tick.disk).unwrap();
    std::fs::copy(crate::common::guest::tick_image().unwrap(), &tick.disk).unwrap();
    player.take("fine").await;
}
