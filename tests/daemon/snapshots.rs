//! Snapshots through the bus, of guests in memory: the tree and its signals, names, records, refusals, risks.

use crate::common::client::{Client, Domain, Options, lifecycle_of, options};
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, Setup};
use std::collections::{BTreeMap, HashMap};
use zbus::{ObjectPath, OwnedVariant, Variant};

/// A machine with a disk that can hold snapshots.
const WEB: &str = "<domain type='test'><name>web</name><memory>65536</memory><vcpu>1</vcpu><os><type>hvm</type></os><devices>\
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/web.qcow2'/>\
    <target dev='vda' bus='virtio'/></disk></devices></domain>";

async fn player(daemon: &Daemon) -> Player {
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(WEB).await.expect("defined");
    Player { domain }
}

/// The members of all signals that wait, with the last step of their paths.
async fn told(watch: &mut crate::common::client::Watch, player: &Player) -> Vec<String> {
    // Behind all that came before.
    player.domain.call("SetTitle", &("mark", options([]))).await.expect("set");
    let mut seen = Vec::new();
    loop {
        let message = watch.next().await;
        let header = message.header();
        let (member, path) =
            (header.member().expect("a member").to_string(), header.path().expect("a path").to_string());
        if let Some(event) = lifecycle_of(&message, &player.domain.path) {
            if event == "defined updated" {
                return seen;
            }
            seen.push(event);
        } else if member == "InterfacesAdded" || member == "InterfacesRemoved" {
            let body = message.body();
            let path = match member.as_str() {
                "InterfacesAdded" => {
                    let (path, _): (ObjectPath<'_>, HashMap<String, HashMap<String, OwnedVariant>>) =
                        body.deserialize().expect("oa{sa{sv}}");
                    path.to_string()
                }
                _ => body.deserialize::<(ObjectPath<'_>, Vec<String>)>().expect("oas").0.to_string(),
            };
            if path.contains("/snapshot/") {
                seen.push(format!("{member} {}", path.rsplit('/').next().unwrap_or_default()));
            }
        } else if member == "PropertiesChanged" && (path.contains("/snapshot/") || path == player.domain.path) {
            let (_, values, _): (String, BTreeMap<String, OwnedVariant>, Vec<String>) =
                message.body().deserialize().expect("sa{sv}as");
            let mut names: Vec<_> = values.into_keys().filter(|name| name != "Title" && name != "StateSince").collect();
            names.retain(|name| name.contains("Snapshot") || path.contains("/snapshot/"));
            if !names.is_empty() {
                seen.push(format!("{} {}", path.rsplit('/').next().unwrap_or_default(), names.join(" ")));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tree_is_told_as_it_grows_and_shrinks() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let player = player(&daemon).await;
    let web = player.domain.path.rsplit('/').next().unwrap_or_default().to_owned();
    let mut watch = player.domain.client.watch().await;
    assert_eq!(player.take("before upgrade").await, player.path("before upgrade"));
    player.take("after").await;
    let signals = told(&mut watch, &player).await;
    let both = format!("{web} CurrentSnapshot SnapshotCount Snapshots");
    assert_eq!(
        signals,
        [
            "InterfacesAdded before_20upgrade",
            &both,
            "InterfacesAdded after",
            "before_20upgrade Children IsCurrent",
            &both
        ]
    );
    assert_eq!(player.current().await, player.path("after"));
    assert_eq!(player.domain.property::<u32>("SnapshotCount").await, 2);
    assert_eq!(player.get::<ObjectPath<'static>>("after", "Parent").await.as_str(), player.path("before upgrade"));
    assert_eq!(player.get::<ObjectPath<'static>>("before upgrade", "Parent").await.as_str(), "/");
    assert_eq!(player.get::<String>("after", "State").await, "shutoff");
    assert_eq!(player.get::<String>("after", "Memory").await, "no");
    let disks: Vec<(String, String, String)> = player.get("after", "Disks").await;
    assert_eq!(disks, [("vda".to_owned(), "internal".to_owned(), "/images/web.qcow2".to_owned())]);
    assert_eq!(player.list(with([("roots", true)])).await, [player.path("before upgrade")]);
    assert_eq!(player.list(with([("leaves", true)])).await, [player.path("after")]);
    let all = player.list(options([])).await;
    assert_eq!(all, [player.path("before upgrade"), player.path("after")]);

    player.call("before upgrade", "Delete", options([])).await.expect("deleted");
    let signals = told(&mut watch, &player).await;
    assert_eq!(
        signals,
        ["after Parent", &format!("{web} SnapshotCount Snapshots"), "InterfacesRemoved before_20upgrade"]
    );
    assert_eq!(player.get::<ObjectPath<'static>>("after", "Parent").await.as_str(), "/");
    let (name, why) = player.call("before upgrade", "GetXML", options([])).await.expect_err("gone");
    assert_eq!(name, "org.freedesktop.DBus.Error.UnknownObject", "{why}");
    let (name, _) = player.domain.call("GetSnapshot", &"before upgrade").await.expect_err("gone");
    assert_eq!(name, "org.virt.Error.NoSuchSnapshot");
}

/// What a dialog shows holds no name of an error; that stands beside it.
#[tokio::test]
async fn a_check_tells_the_error_and_its_text_apart() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let player = player(&daemon).await;
    let checked = player.domain.call("CheckCreateSnapshot", &("<domainsnapshot/>", with([("current", true)]))).await;
    let plan: HashMap<String, OwnedVariant> = checked.expect("told").body().deserialize().expect("a{sv}");
    let text = |key: &str| String::try_from(plan[key].try_clone().expect("no descriptor")).expect("s");
    assert_eq!(text("error"), "org.virt.Error.InvalidArgument");
    assert!(!text("reason").is_empty() && !text("reason").contains("org.virt.Error"), "{}", text("reason"));
    player.take("there").await;
    let plan = player.check("there", "CheckDelete", options([])).await;
    assert_eq!((&*plan["error"], &*plan["reason"]), (&Variant::from(""), &Variant::from("")), "it is possible");
}

#[tokio::test]
async fn work_that_is_not_counted_in_bytes_tells_none() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let player = player(&daemon).await;
    let taken = player.domain.call("CreateSnapshot", &("<domainsnapshot/>", options([]))).await.expect("taken");
    let (_, job): (zbus::OwnedObjectPath, zbus::OwnedObjectPath) = taken.body().deserialize().expect("oo");
    let (client, job) = (&player.domain.client, job.as_str());
    assert_eq!(client.property::<f64>(job, "org.virt.Job", "Progress").await, 1.0);
    for name in ["BytesDone", "BytesTotal"] {
        assert_eq!(client.property::<u64>(job, "org.virt.Job", name).await, 0, "{name}");
    }
}

#[tokio::test]
async fn a_snapshot_is_named_and_described_without_a_document() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let player = player(&daemon).await;
    let (name, description) = ("a <b> & \"c\"", "before 1 < 2");
    let told = || options([("name", name.into()), ("description", description.into())]);
    let checked = player.domain.call("CheckCreateSnapshot", &("", told())).await.expect("told");
    let plan: HashMap<String, OwnedVariant> = checked.body().deserialize().expect("a{sv}");
    let document = String::try_from(plan["xml"].try_clone().expect("no descriptor")).expect("s");
    assert!(document.contains("<name>a &lt;b&gt; &amp; "), "{document}");
    assert_eq!(player.create("", told()).await.expect("taken"), player.path(name));
    assert_eq!(player.get::<String>(name, "Description").await, description);
    player.create("", options([])).await.expect("taken with a name of its own");
    assert_eq!(player.domain.property::<u32>("SnapshotCount").await, 2);

    let (error, why) = player.create("<domainsnapshot><name>n</name></domainsnapshot>", told()).await.expect_err("two");
    assert_eq!(error, "org.virt.Error.InvalidArgument");
    assert!(why.contains("option 'name'"), "{why}");
    let (error, _) = player.create("", with([("redefine", true)])).await.expect_err("there is no record");
    assert_eq!(error, "org.virt.Error.ConfigInvalid");
    let (error, _) = player.create(" ", options([])).await.expect_err("that is no document");
    assert_eq!(error, "org.virt.Error.ConfigInvalid");
}

#[tokio::test]
async fn an_undefine_that_is_refused_names_all_that_stands_in_its_way() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let variables = daemon.folder().join("vars.fd");
    std::fs::write(&variables, "").expect("written");
    let os = format!(
        "<os><type>hvm</type><loader readonly='yes' type='pflash'>/code.fd</loader><nvram>{}</nvram></os>         <features><acpi/></features>",
        variables.display()
    );
    let client = Client { connection: daemon.connect().await };
    let domain = client.define(&WEB.replace("<os><type>hvm</type></os>", &os)).await.expect("defined");
    let player = Player { domain };
    player.create("", with([("disk-only", true)])).await.expect("taken");
    let (name, why) = player.domain.run("Undefine").await.expect_err("there is more than the definition");
    assert_eq!(name, "org.virt.Error.OperationInvalid");
    let told = check_undefine(&player, options([])).await;
    assert_eq!((told.possible, &told.error, &told.reason, told.removed.len()), (false, &name, &why, 0));
    assert!(why.contains("1 snapshot; pass snapshots-metadata to forget it (") && why.contains("pass nvram"), "{why}");
    player.create("", with([("disk-only", true)])).await.expect("taken");
    let (_, why) = player.domain.call("Undefine", &(with([("nvram", true)]),)).await.expect_err("snapshots");
    assert!(why.contains("2 snapshots; pass snapshots-metadata to forget them (") && !why.contains("nvram"), "{why}");
    let all = || with([("nvram", true), ("snapshots-metadata", true)]);
    let told = check_undefine(&player, all()).await;
    assert!(told.possible && told.error.is_empty() && told.reason.is_empty(), "{}", told.reason);
    assert_eq!(told.removed, [variables.display().to_string()]);
    assert!(variables.exists(), "nothing was changed");
    player.domain.call("Undefine", &(all(),)).await.expect("undefined");
    assert!(client.named("web").await.is_err(), "nothing is left of it");
}

/// What `CheckUndefine` says.
struct UndefineCheck {
    possible: bool,
    error: String,
    reason: String,
    removed: Vec<String>,
}

async fn check_undefine(player: &Player, options: Options<'_>) -> UndefineCheck {
    let reply = player.domain.call("CheckUndefine", &(options,)).await.expect("told");
    let mut told: HashMap<String, zbus::OwnedVariant> = reply.body().deserialize().expect("a{sv}");
    let mut take = |key: &str| told.remove(key).expect(key);
    UndefineCheck {
        possible: take("possible").try_into().expect("b"),
        error: take("error").try_into().expect("s"),
        reason: take("reason").try_into().expect("s"),
        removed: take("removed").try_into().expect("as"),
    }
}

/// Document, options, error, and a word of its text.
type Refused = (String, Vec<(&'static str, bool)>, &'static str, &'static str);

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_before_anything_changes() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let player = player(&daemon).await;
    let before: String = player.domain.xml().await;
    player.take("there").await;
    let named = |inner: &str| format!("<domainsnapshot><name>n</name>{inner}</domainsnapshot>");
    let long = format!("<domainsnapshot><name>{}</name></domainsnapshot>", "n".repeat(201));
    let none = "<domainsnapshot/>".to_owned();
    let is_off: Vec<Refused> = vec![
        (none.clone(), vec![("current", true)], "InvalidArgument", "redefine"),
        (none.clone(), vec![("quiesce", true)], "InvalidArgument", "disk-only"),
        (none.clone(), vec![("redefine", true), ("halt", true)], "InvalidArgument", "redefine"),
        (none.clone(), vec![("quiesce", true), ("disk-only", true)], "AgentUnavailable", "quiesce"),
        (none.clone(), vec![("live", true)], "OperationUnsupported", "'live'"),
        ("<domainsnapshot><name>there</name></domainsnapshot>".into(), vec![], "SnapshotExists", "there"),
        ("<domainsnapshot><name>a/b</name></domainsnapshot>".into(), vec![], "ConfigInvalid", "'/'"),
        ("<domainsnapshot><name>.a</name></domainsnapshot>".into(), vec![], "ConfigInvalid", "'.'"),
        ("<domainsnapshot><name>a\nb</name></domainsnapshot>".into(), vec![], "ConfigInvalid", "control"),
        (long, vec![], "ConfigInvalid", "200"),
        ("<domain/>".into(), vec![], "ConfigInvalid", "domainsnapshot"),
        (named("<colour/>"), vec![], "ConfigInvalid", "colour"),
        (named("<memory snapshot='internal'/>"), vec![], "ConfigInvalid", "shut off"),
        (named("<memory snapshot='manual'/>"), vec![], "ConfigInvalid", "by hand"),
        (named("<memory file='relative'/>"), vec![], "ConfigInvalid", "absolute"),
        (named("<disks><disk name='vdz'/></disks>"), vec![], "ConfigInvalid", "vdz"),
        (named("<disks><disk name='vda'/><disk name='/images/web.qcow2'/></disks>"), vec![], "ConfigInvalid", "twice"),
        (named("<disks><disk name='vda' snapshot='default'/></disks>"), vec![], "ConfigInvalid", "default"),
        (named("<disks><disk name='vda' snapshot='no'/></disks>"), vec![], "ConfigUnsupported", "nothing"),
        (
            named("<disks><disk name='vda'><driver type='raw'/><source file='/images/o'/></disk></disks>"),
            vec![("disk-only", true)],
            "ConfigUnsupported",
            "qcow2",
        ),
    ];
    for (xml, flags, error, word) in is_off {
        let (name, why) = player.create(&xml, with(flags.clone())).await.expect_err(&xml);
        assert_eq!(name, format!("org.virt.Error.{error}"), "{xml} {flags:?}: {why}");
        assert!(why.contains(word), "{xml} {flags:?}: {why}");
        let told = player.domain.call("CheckCreateSnapshot", &(&*xml, with(flags))).await.expect("told");
        let told: HashMap<String, OwnedVariant> = told.body().deserialize().expect("a{sv}");
        assert_eq!(*told["possible"], Variant::from(false), "{xml}");
        assert_eq!(told.len(), 6);
    }
    let odd = options([("leave-out", Variant::from(vec!["disk"]))]);
    let (name, why) = player.create(&none, odd).await.expect_err("odd");
    assert!(name.ends_with("InvalidArgument") && why.contains("disk"), "{why}");
    assert_eq!(player.domain.xml().await, before);
    assert_eq!(player.domain.property::<u32>("SnapshotCount").await, 1);

    for (flags, error, word) in [
        (with([("running", true), ("paused", true)]), "InvalidArgument", "exclude"),
        (with([("reset-nvram", true), ("running", true)]), "ConfigUnsupported", "firmware"),
        (options([("force", Variant::from(vec!["courage"]))]), "InvalidArgument", "courage"),
        (options([("force", Variant::from(1u32))]), "InvalidArgument", "force"),
    ] {
        let (name, why) = player.call("there", "Revert", flags).await.expect_err(word);
        assert!(name.ends_with(error) && why.contains(word), "{name}: {why}");
    }
    let both = with([("children", true), ("children-only", true)]);
    let (name, _) = player.call("there", "Delete", both).await.expect_err("both");
    assert_eq!(name, "org.virt.Error.InvalidArgument");
    let (name, why) = player.domain.run("Undefine").await.expect_err("has one");
    assert!(name.ends_with("OperationInvalid") && why.contains("it has 1 snapshot; "), "{why}");
    player.domain.call("Undefine", &(with([("snapshots-metadata", true)]),)).await.expect("undefined");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_outlive_virtd_and_can_be_restored() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let player = player(&daemon).await;
    player.take("one").await;
    player.take("two").await;
    let (one, two) = (player.xml("one").await, player.xml("two").await);
    let facts = (player.current().await, player.list(options([])).await);
    daemon.kill_virtd().await;
    let folder = std::fs::read_dir(daemon.root().join("var/lib/virt/snapshots")).expect("there");
    let folder = folder.map(|entry| entry.expect("an entry").path()).next().expect("the domain's");
    std::fs::write(folder.join("odd.xml"), "<domainsnapshot><name>odd</name>").expect("written");
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let player = Player { domain: Domain { client, path: player.domain.path } };
    assert_eq!(player.xml("two").await, two);
    assert_eq!(player.current().await, facts.0);
    assert_eq!(player.list(options([])).await[..2], facts.1);
    let broken: String = player.get("odd", "Broken").await;
    assert!(broken.contains("cannot be read"), "{broken}");
    let (name, why) = player.call("odd", "Revert", options([])).await.expect_err("broken");
    assert!(name.ends_with("SnapshotBroken") && why.contains("odd"), "{why}");
    player.call("odd", "Delete", with([("metadata-only", true)])).await.expect("forgotten");

    for name in ["one", "two"] {
        player.call(name, "Delete", with([("metadata-only", true)])).await.expect("forgotten");
    }
    let redefine = || with([("redefine", true)]);
    let (name, why) = player.create(&two, redefine()).await.expect_err("no parent");
    assert!(name.ends_with("InvalidArgument") && why.contains("'one'"), "{why}");
    player.create(&one, redefine()).await.expect("restored");
    player.create(&two, with([("redefine", true), ("current", true)])).await.expect("restored");
    assert_eq!(player.xml("two").await, two);
    assert_eq!(player.current().await, player.path("two"));
    let changed = two.replace("<memory unit='KiB'>65536", "<memory unit='KiB'>131072");
    assert_ne!(changed, two);
    let (name, why) = player.create(&changed, redefine()).await.expect_err("another machine");
    assert!(name.ends_with("AbiIncompatible") && why.contains("/memory"), "{why}");
    // What was stored beside what ran would be what is stored after a revert.
    let (from, to) = (two.find("<domain ").expect("there"), two.find("</domain>").expect("there"));
    let beside = format!("<inactiveDomain {}</inactiveDomain>", &two[from + "<domain ".len()..to]);
    let with_beside = |changed: &str| two.replacen("</domain>", &format!("</domain>{changed}"), 1);
    let uuid: String = player.domain.property("UUID").await;
    for (from, to, word) in
        [(&*uuid, "0c5a7c58-7df2-4a2e-9b0b-5a6c3f0e9d11", "0c5a7c58"), ("type='test'", "type='qemu'", "driver")]
    {
        let changed = beside.replacen(from, to, 1);
        assert_ne!(changed, beside);
        let (name, why) = player.create(&with_beside(&changed), redefine()).await.expect_err("not this domain's");
        assert!(why.contains(word), "{name}: {why}");
    }
    for (from, to, word) in [
        ("<state>shutoff</state>", "<state>running</state>", "shutoff"),
        ("<state>shutoff</state>", "<state>asleep</state>", "state"),
        ("<state>shutoff</state>", "", "<state>"),
        ("<name>one</name>\n  </parent>", "<name>two</name>\n  </parent>", "own parent"),
    ] {
        let text = two.replacen(from, to, 1);
        let (_, why) = player.create(&text, redefine()).await.expect_err(word);
        assert!(why.contains(word), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revert_names_its_risks_and_does_what_was_planned() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let player = player(&daemon).await;
    player.take("off").await;
    player.domain.run("Start").await.expect("started");
    player.take("on").await;
    let mut watch = player.domain.client.watch().await;
    player.call("on", "Revert", options([])).await.expect("in place");
    assert_eq!(told(&mut watch, &player).await, ["defined from-snapshot"]);

    let plan = player.check("off", "CheckRevert", with([("running", true)])).await;
    assert_eq!(*plan["needs-force"], Variant::from(true));
    assert_eq!(*plan["risks"], Variant::from(vec!["new-process"]));
    assert_eq!(plan.len(), 9);
    let (name, why) = player.call("off", "Revert", with([("running", true)])).await.expect_err("risky");
    assert!(name.ends_with("RevertRisky") && why.contains("new-process") && why.contains("force"), "{why}");
    let force = options([("running", Variant::from(true)), ("force", Variant::from(vec!["new-process"]))]);
    player.call("off", "Revert", force).await.expect("forced");
    let events = ["stopped from-snapshot", "started from-snapshot", "resumed from-snapshot", "defined from-snapshot"];
    let signals = told(&mut watch, &player).await;
    let lifecycle: Vec<&String> = signals.iter().filter(|told| told.ends_with("from-snapshot")).collect();
    assert_eq!(lifecycle, events);
    assert_eq!(player.domain.state().await, ("running".to_owned(), "from-snapshot".to_owned()));

    // An edit that the guest would notice.
    player.domain.run("Destroy").await.expect("destroyed");
    let uuid: String = player.domain.property("UUID").await;
    let larger = WEB.replace("65536", "131072").replace("<name>", &format!("<uuid>{uuid}</uuid><name>"));
    player.domain.client.define(&larger).await.expect("redefined");
    player.domain.run("Start").await.expect("started");
    let plan = player.check("on", "CheckRevert", options([])).await;
    assert_eq!(*plan["risks"], Variant::from(vec!["abi-changed", "new-process"]));
    let differences = Vec::<(String, String, String)>::try_from(plan["abi-differences"].clone()).expect("a(sss)");
    assert!(differences.iter().any(|found| found.0 == "/memory"), "{differences:?}");
    let half = options([("force", Variant::from(vec!["new-process"]))]);
    let (_, why) = player.call("on", "Revert", half).await.expect_err("half");
    assert!(why.contains("abi-changed") && why.contains("/memory") && !why.contains("new-process:"), "{why}");
    player.call("on", "Revert", with([("force", true)])).await.expect("forced");
    assert!(player.domain.xml().await.contains("<memory unit='KiB'>65536"));
    player.call("off", "Revert", options([])).await.expect("off");
    assert_eq!(player.domain.state().await, ("shutoff".to_owned(), "from-snapshot".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_in_one_tree_come_and_go_in_any_order() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    player(&daemon).await.grows_and_shrinks(200).await;
}
