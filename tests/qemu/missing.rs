//! What a machine needs of the host is looked at before it is started, and before anything is ended for it.

use crate::common::client::Client;
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use crate::common::users::ALICE;
use crate::common::{Daemon, Setup};

/// A machine with a CD, a log and a ROM of its own.
struct Trial {
    daemon: Daemon,
    player: Player,
    tick: Tick,
}

impl Trial {
    async fn begin() -> Option<Trial> {
        let daemon = Daemon::on_session_bus().await?;
        let mut tick = Tick::new(&daemon, "web", "")?;
        for folder in ["cd", "log", "rom"] {
            std::fs::create_dir(daemon.folder().join(folder)).expect("made");
        }
        let at = |name: &str| daemon.folder().join(name).display().to_string();
        std::fs::write(at("cd/cd.iso"), vec![0; 4096]).expect("written");
        std::fs::write(at("rom/rom"), [0x55, 0xaa, 1]).expect("written");
        let more = format!(
            "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='sda' bus='sata'/><readonly/></disk>\
             <interface type='user'><model type='virtio'/><rom file='{}'/></interface>\
             <console type='file'><source path='{}'/><target type='virtio'/></console></devices>",
            at("cd/cd.iso"),
            at("rom/rom"),
            at("log/console")
        );
        tick.xml = tick.xml.replace("</devices>", &more);
        let client = Client { connection: daemon.connect().await };
        let player = Player { domain: client.define(&tick.xml).await.expect("defined") };
        player.domain.run("Start").await.expect("started");
        tick.counts_to(2).await;
        Some(Trial { daemon, player, tick })
    }
}

#[tokio::test]
async fn a_revert_that_could_not_be_started_is_refused_before_anything_is_ended() {
    let Some(trial) = Trial::begin().await else { return };
    let (player, tick) = (&trial.player, &trial.tick);
    let memory = tick.disk.with_extension("memory");
    let xml = format!(
        "<domainsnapshot><name>one</name><memory snapshot='external' file='{}'/></domainsnapshot>",
        memory.display()
    );
    player.create(&xml, with([])).await.expect("taken");
    let id: u32 = player.domain.property("Id").await;
    for (what, named) in
        [("cd", "cd/cd.iso"), ("log", "log is not there"), ("rom", "rom/rom"), ("web.qcow2", "web.qcow2")]
    {
        let (there, away) = (trial.daemon.folder().join(what), trial.daemon.folder().join("away"));
        std::fs::rename(&there, &away).expect("gone");
        let plan = player.check("one", "CheckRevert", with([("force", true)])).await;
        let reason = String::try_from(plan["reason"].clone()).expect("s");
        assert!(!bool::try_from(plan["possible"].clone()).expect("b") && reason.contains(named), "{what}: {reason}");
        let (name, why) = player.call("one", "Revert", with([("force", true)])).await.expect_err("it could not start");
        assert!(name.ends_with("StorageFailed") && why.contains(named), "{what}: {name}: {why}");
        assert_eq!((player.domain.state().await.0, player.domain.property::<u32>("Id").await), ("running".into(), id));
        std::fs::rename(&away, &there).expect("there again");
    }
    tick.goes_on().await;
    player.call("one", "Revert", with([("force", true)])).await.expect("now it can be done");
    player.domain.run("Destroy").await.expect("destroyed");
}

/// QEMU would wait for the other end of a pipe until its start is given up.
#[tokio::test]
async fn a_pipe_as_a_kernel_table_or_rom_is_refused_before_anything_begins() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let pipe = daemon.folder().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o666.into(), 0).expect("made");
    let pipe = pipe.display().to_string();
    let (plain, at) = (daemon.folder().join("plain"), |path: &str| format!("<kernel>{path}</kernel>"));
    std::fs::write(&plain, "").expect("written");
    let plain = plain.display().to_string();
    for (what, os, devices) in [
        ("kernel", at(&pipe), String::new()),
        ("initrd", at(&plain) + &format!("<initrd>{pipe}</initrd>"), String::new()),
        ("table", format!("<acpi><table type='raw'>{pipe}</table></acpi>"), String::new()),
        (
            "rom",
            String::new(),
            format!("<interface type='user'><model type='virtio'/><rom file='{pipe}'/></interface>"),
        ),
        ("disk", String::new(), format!("<disk><source file='{pipe}'/><target dev='vda' bus='virtio'/></disk>")),
    ] {
        let xml = format!(
            "<domain type='qemu'><name>{what}</name><memory unit='MiB'>16</memory><os><type machine='q35'>hvm</type>{os}</os>\
             <features><acpi/></features><devices>{devices}</devices></domain>"
        );
        let domain = client.define(&xml).await.unwrap_or_else(|(name, why)| panic!("{what}: {name}: {why}"));
        let (name, why) = domain.run("Start").await.expect_err("a pipe is none");
        assert!(name.ends_with("StorageFailed") && why.contains(&format!("{pipe} is n")), "{what}: {name}: {why}");
        assert!(daemon.qemu_of(what).is_none(), "{what}");
    }
}

/// M7: what is no file is not to be written as one, and said when it can still be mended.
#[tokio::test]
async fn a_folder_as_firmware_variables_is_refused_when_it_is_defined() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let folder = daemon.folder().join("vars");
    std::fs::create_dir(&folder).expect("made");
    let xml = format!(
        "<domain type='qemu'><name>uefi</name><memory unit='MiB'>16</memory><os><type machine='q35'>hvm</type>\
         <loader readonly='yes' type='pflash'>/usr/share/code.fd</loader><nvram>{}</nvram></os><features><acpi/></features>\
         </domain>",
        folder.display()
    );
    let says_so = |text: &str| text.contains("this is a folder; name a file");
    let told = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(&*xml, with([]))).await;
    let told: Vec<(String, u32, u32, String)> = told.expect("told").body().deserialize().expect("findings");
    assert!(told.iter().any(|one| one.0 == "error" && one.1 == 1 && says_so(&one.3)), "{told:?}");
    let (name, why) = client.define(&xml).await.map(|_| ()).expect_err("refused");
    assert!(name.ends_with("ConfigInvalid") && says_so(&why), "{name}: {why}");
}

#[tokio::test]
async fn a_start_without_one_of_its_files_is_refused_by_name_before_anything_begins() {
    let Some(trial) = Trial::begin().await else { return };
    let domain = &trial.player.domain;
    domain.run("Destroy").await.expect("destroyed");
    let mut watch = domain.client.watch().await;
    for (what, named) in
        [("cd", "cd/cd.iso"), ("log", "log is not there"), ("rom", "rom/rom"), ("web.qcow2", "web.qcow2")]
    {
        let (there, away) = (trial.daemon.folder().join(what), trial.daemon.folder().join("away"));
        std::fs::rename(&there, &away).expect("gone");
        let (name, why) = domain.run("Start").await.expect_err("it could not start");
        assert!(name.ends_with("StorageFailed") && why.contains(named), "{what}: {name}: {why}");
        std::fs::rename(&away, &there).expect("there again");
    }
    domain.run("Start").await.expect("now it can be done");
    let first = watch.next().await;
    let added: String = first.header().path().expect("an object").to_string();
    assert!(first.header().member().is_none_or(|m| m != "Finished"), "no job had been begun: {added}");
    domain.run("Destroy").await.expect("destroyed");
}

/// Severity, line, column and message.
type Told = Vec<(String, u32, u32, String)>;

async fn validated(client: &Client, xml: &str) -> Told {
    let told = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(xml, with([]))).await;
    told.expect("told").body().deserialize().expect("findings")
}

/// A machine with these devices, on a line each.
fn with_devices(name: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory><os><type machine='q35'>hvm</type></os>\n\
         <devices>\n{devices}\n</devices></domain>"
    )
}

fn disk(kind: &str, format: &str, path: &std::path::Path, target: &str) -> String {
    let (path, device) = (path.display(), if kind == "cdrom" { "<readonly/>" } else { "" });
    format!(
        "<disk type='file' device='{kind}'><driver name='qemu' type='{format}'/><source file='{path}'/>\
         <target dev='{target}' bus='sata'/>{device}</disk>"
    )
}

/// A serial port to which others come.
fn listening(port: u16) -> String {
    format!("<serial type='tcp'><source mode='bind' host='127.0.0.1' service='{port}'/><protocol type='raw'/></serial>")
}

/// Each is told where the document says it, and a start is refused before there is a QEMU.
#[tokio::test]
async fn x9_what_is_missing_is_told_by_validate_and_before_a_start() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let Some(tick) = Tick::new(&daemon, "there", "") else { return };
    let client = Client { connection: daemon.connect().await };
    let at = |name: &str| daemon.folder().join(name);
    std::fs::write(at("text"), "this is no image of that format").expect("written");
    let vnc =
        |port: u16| format!("<graphics type='vnc' port='{port}' autoport='no'><listen type='address'/></graphics>");
    let there = disk("disk", "qcow2", &tick.disk, "sda");
    let of = |more: &str| format!("{there}\n{more}");
    let cases = [
        ("disk", of(&disk("disk", "qcow2", &at("gone.qcow2"), "sdb")), "/source/@file", "gone.qcow2 is not there"),
        ("iso", of(&disk("cdrom", "raw", &at("gone.iso"), "sdb")), "/source/@file", "gone.iso is not there"),
        ("format", of(&disk("disk", "qcow2", &at("text"), "sdb")), "/source/@file", "text is no qcow2 image"),
        (
            "bridge",
            of("<interface type='bridge'><source bridge='no-such-br'/></interface>"),
            "/source/@bridge",
            "no network device 'no-such-br'",
        ),
        (
            "ports",
            of(&(vnc(15_977) + &listening(15_977))),
            "/source/@service",
            "TCP port 15977 is what graphics 'vnc' of this machine listens on",
        ),
        (
            "log",
            of("<serial type='file'><source path='/no/such/folder/log'/></serial>"),
            "/source/@path",
            "/no/such/folder is not there",
        ),
    ];
    for (name, devices, place, why) in cases {
        let xml = with_devices(name, &devices);
        let told = validated(&client, &xml).await;
        let is_it = |one: &&(String, u32, u32, String)| {
            one.0 == "error" && one.1 == 4 && one.3.contains(place) && one.3.contains(why)
        };
        assert!(told.iter().any(|one| is_it(&one)), "{name}: {told:?}");
        let refused = client.path_from("DefineDomain", &(&*xml, with([("validate", true)]))).await;
        let (error, text) = refused.map(|_| ()).expect_err("validate refuses what ValidateDomain reports");
        assert!(error.ends_with("ConfigUnsupported") && text.contains(why), "{name}: {error}: {text}");
        let domain = client.define(&xml).await.expect("stored all the same");
        let (error, text) = domain.run("Start").await.expect_err("it cannot run");
        assert!(text.contains(why) && !error.ends_with("HypervisorFailed"), "{name}: {error}: {text}");
        assert_eq!(daemon.qemu_of(name), None);
    }
    let told = validated(&client, &with_devices("fine", &of(&vnc(15_978)))).await;
    assert_eq!(told, []);
}

#[tokio::test]
async fn x9_a_port_that_somebody_has_is_a_warning_and_refused_by_a_start() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let xml = with_devices("port", &listening(port));
    let told = validated(&client, &xml).await;
    let says = |text: &str| text.contains(&format!("TCP port {port} of 127.0.0.1 is in use"));
    assert!(told.len() == 1 && told[0].0 == "warning" && says(&told[0].3), "{told:?}");
    let domain = client.define(&xml).await.expect("defined");
    let (name, text) = domain.run("Start").await.expect_err("somebody has it");
    assert!(name.ends_with("OperationInvalid") && says(&text), "{name}: {text}");
    drop(taken);
    assert_eq!(validated(&client, &domain.xml().await).await, []);
    domain.run("Start").await.expect("it is free now");
    domain.run("Destroy").await.expect("destroyed");
}

/// M5: whoever may not define machines is told the same whatever is there.
#[tokio::test]
async fn x9_validate_is_no_oracle_about_files() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let stranger = Client { connection: daemon.connect_as(&ALICE).await };
    let root = Client { connection: daemon.connect().await };
    std::fs::write(daemon.folder().join("there"), "a text").expect("written");
    let of = |file: &str| {
        let path = daemon.folder().join(file);
        let log = format!("<serial type='file'><source path='{}/log'/></serial>", path.display());
        with_devices("m", &(disk("disk", "qcow2", &path, "sda") + &disk("cdrom", "raw", &path, "sdb") + &log))
    };
    assert_eq!(validated(&stranger, &of("there")).await, validated(&stranger, &of("gone!")).await);
    let told = validated(&root, &of("gone!")).await;
    assert!(told.iter().any(|one| one.3.contains("gone! is not there")), "{told:?}");
}
