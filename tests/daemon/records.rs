//! What virtd keeps can be read again; what cannot is on the bus all the same, and says so.

use crate::common::client::{Client, options};
use crate::common::snapshots::{Player, with};
use crate::common::{Daemon, Setup};
use std::fmt::Write as _;
use std::path::PathBuf;

fn machine(name: &str, uuid: &str, more: &str) -> String {
    format!(
        "<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>65536</memory>{more}\
         <os><type>hvm</type></os></domain>"
    )
}

fn uuid(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

fn stored(daemon: &Daemon, uuid: &str) -> PathBuf {
    daemon.root().join(format!("var/lib/virt/domains/{uuid}.xml"))
}

#[tokio::test(flavor = "multi_thread")]
async fn l1_what_is_accepted_at_the_limits_is_there_after_a_restart() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let mut many = String::new();
    for number in 0..49_980 {
        write!(many, "<a{number}/>").expect("a string");
    }
    let text = |length: usize| format!("<description>{}</description>", "x".repeat(length));
    let quotes = format!("<description>{}</description>", "'".repeat(2_000_000));
    let metadata = |inner: &str| format!("<metadata><n:m xmlns:n='urn:n'>{inner}</n:m></metadata>");
    let deep = |depth: usize| metadata(&format!("{}{}", "<d>".repeat(depth), "</d>".repeat(depth)));
    let mut accepted = Vec::new();
    let cases = [text(8_388_000), text(8_380_000), quotes, metadata(&many), deep(61), deep(60), deep(50)];
    for (number, more) in cases.iter().enumerate() {
        let name = format!("m{number}");
        match root.define(&machine(&name, &uuid(number as u32), more)).await {
            Ok(_) => accepted.push(name),
            Err((error, why)) => {
                assert_eq!(error, "org.virt.Error.ConfigInvalid", "{why}");
                let says = ["bytes", "elements", "deep"].iter().any(|limit| why.contains(limit));
                assert!(says && why.len() < 2000, "{why}");
            }
        }
    }
    assert!(accepted.len() >= 3, "{accepted:?}");
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    for name in &accepted {
        let domain = root.named(name).await.unwrap_or_else(|why| panic!("{name}: {why:?}"));
        assert_eq!(domain.property::<String>("Broken").await, "", "{name}");
        let shown = domain.xml().await;
        root.define(&shown).await.unwrap_or_else(|why| panic!("{name}, given back: {why:?}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn l1_a_configuration_that_cannot_be_read_leaves_a_domain_that_says_why() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    for number in 0..8 {
        root.define(&machine(&format!("m{number}"), &uuid(number), "")).await.expect("defined");
    }
    daemon.kill_virtd().await;
    let put = |number: u32, content: &[u8]| std::fs::write(stored(&daemon, &uuid(number)), content).expect("written");
    put(0, b"<domain");
    put(1, b"\xff\xfe");
    put(2, machine("m2", &uuid(2), "<colour/>").as_bytes());
    put(3, machine("m3", &uuid(99), "").as_bytes());
    put(4, machine("m4", &uuid(4), "").replace("type='test'", "type='vax'").as_bytes());
    put(5, machine("m7", &uuid(5), "").as_bytes());
    std::fs::remove_file(stored(&daemon, &uuid(6))).expect("removed");
    nix::unistd::mkfifo(&stored(&daemon, &uuid(6)), nix::sys::stat::Mode::S_IRUSR).expect("a fifo");
    daemon.start_virtd().await;

    for number in 0..7 {
        let reply = root.path_from("GetDomain", &(uuid(number),)).await;
        let domain = reply.unwrap_or_else(|why| panic!("{number}: {why:?}"));
        let broken: String = domain.property("Broken").await;
        assert!(!broken.is_empty(), "{number} is not as it was written");
        assert!(domain.property::<bool>("Persistent").await);
        assert_eq!(domain.state().await.0, "shutoff");
        for verb in ["Start", "GetXML"] {
            let (error, why) = domain.run(verb).await.err().unwrap_or_else(|| panic!("{verb} of {number} was done"));
            assert_eq!(error, "org.virt.Error.OperationInvalid");
            assert!(why.contains("is broken") && why.contains("define it anew"), "{verb} of {number}: {why}");
        }
        let can = domain.call("Can", &("Start",)).await.expect("told");
        assert_eq!(can.body().deserialize::<String>().expect("s"), "na");
    }
    let m7 = root.named("m7").await.expect("its name is its own");
    assert_eq!((m7.property::<String>("UUID").await, m7.property::<String>("Broken").await), (uuid(7), String::new()));

    // Defined anew under its own name, or given up.
    for number in 0..3 {
        let name = format!("m{number}");
        let domain = root.define(&machine(&name, &uuid(number), "")).await.expect("defined anew");
        assert_eq!(domain.property::<String>("Broken").await, "");
        domain.run("Start").await.expect("it starts");
    }
    for number in 3..7 {
        let domain = root.path_from("GetDomain", &(uuid(number),)).await.expect("there");
        domain.run("Undefine").await.unwrap_or_else(|why| panic!("{number}: {why:?}"));
        assert!(root.path_from("GetDomain", &(uuid(number),)).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn l1_snapshots_that_cannot_be_read_leave_a_domain_that_says_why() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let folder = |daemon: &Daemon, number: u32| daemon.root().join(format!("var/lib/virt/snapshots/{}", uuid(number)));
    for (number, file) in [(0, ".intent"), (1, ".current")] {
        let domain = root.define(&machine(&format!("m{number}"), &uuid(number), "")).await.expect("defined");
        std::fs::create_dir_all(folder(&daemon, number)).expect("a folder");
        std::fs::write(folder(&daemon, number).join(file), b"\xff{").expect("written");
        assert_eq!(domain.property::<String>("Broken").await, "");
    }
    daemon.kill_virtd().await;
    daemon.start_virtd().await;
    for number in 0..2 {
        let domain = root.named(&format!("m{number}")).await.expect("there");
        let broken: String = domain.property("Broken").await;
        assert!(broken.contains("snapshot"), "{broken}");
        let (error, why) = domain.run("Start").await.expect_err("its images may be half this and half that");
        assert_eq!(error, "org.virt.Error.OperationInvalid");
        assert!(why.contains("snapshots-metadata"), "{why}");
        domain.call("Undefine", &(options([("snapshots-metadata", true.into())]),)).await.expect("given up");
    }
}

/// What a document does not say of disks is what a new snapshot of that kind would have: a record that acts on nothing
/// would let a revert succeed that does nothing.
#[tokio::test(flavor = "multi_thread")]
async fn l10_a_restored_record_without_disks_acts_on_those_of_its_machine() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let disk = |format: &str, target: &str, more: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='/images/{target}.img'/>\
             <target dev='{target}' bus='virtio'/>{more}</disk>"
        )
    };
    let domain =
        |disks: &str| machine("web", &uuid(1), "").replace("</os>", &format!("</os><devices>{disks}</devices>"));
    let both = domain(&(disk("qcow2", "vda", "") + &disk("qcow2", "vdb", "<readonly/>")));
    let player = Player { domain: root.define(&both).await.expect("defined") };
    let doc = |name: &str, state: &str, disks: &str, domain: &str| {
        format!(
            "<domainsnapshot><name>{name}</name><state>{state}</state><creationTime>7</creationTime>{disks}{domain}\
             </domainsnapshot>"
        )
    };
    let redefine = || with([("redefine", true)]);
    type Disks = Vec<(String, String, String)>;
    let image = "/images/vda.img";
    for (name, state, disks, mode, file) in [
        ("off", "shutoff", "", "internal", image),
        ("on", "running", "", "internal", image),
        ("only", "disk-snapshot", "", "external", "/images/vda.only"),
        ("named", "disk-snapshot", "<disks><disk name='/images/vda.img'/></disks>", "external", "/images/vda.named"),
        ("asked", "shutoff", "<disks><disk name='vda' snapshot='external'/></disks>", "external", "/images/vda.asked"),
    ] {
        player
            .create(&doc(name, state, disks, &both), redefine())
            .await
            .unwrap_or_else(|why| panic!("{name}: {why:?}"));
        let shown: Disks = player.get(name, "Disks").await;
        let expected = [("vda", mode, file), ("vdb", "no", "")];
        let expected: Disks = expected.iter().map(|(a, b, c)| ((*a).into(), (*b).into(), (*c).into())).collect();
        assert_eq!(shown, expected, "{name}");
        player.create(&player.xml(name).await, redefine()).await.expect("its own document restores it");
    }
    let raw = domain(&disk("raw", "vda", ""));
    for (state, disks, machine) in [
        ("shutoff", "", raw.as_str()),
        ("shutoff", "<disks><disk name='vda' snapshot='no'/></disks>", raw.as_str()),
        ("disk-snapshot", "<disks><disk name='vda' snapshot='no'/></disks>", both.as_str()),
        ("shutoff", "", &domain("")),
    ] {
        let (name, why) = player.create(&doc("none", state, disks, machine), redefine()).await.expect_err(state);
        assert_eq!(name, "org.virt.Error.ConfigUnsupported", "{why}");
    }
}

/// A name that looks like another, or turns the words around it, is nobody's new name; an old one is shown as what it is.
#[tokio::test(flavor = "multi_thread")]
async fn s2_names_that_deceive_are_refused_when_new_and_written_out_when_old() {
    let Some(mut daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let web = root.define(&machine("web", &uuid(1), "")).await.expect("defined");
    for odd in ["we\u{202e}b", "we\u{200b}b", "w\u{2028}eb", "web ", "\u{a0}web", "w\u{ad}eb", "web\u{fe0f}"] {
        let (name, why) = root.define(&machine(odd, &uuid(2), "")).await.err().expect("no new name");
        assert!(
            name.ends_with("ConfigInvalid") && !why.contains(['\u{202e}', '\u{200b}', '\u{2028}']),
            "{name}: {why}"
        );
        let (_, why) = web.call("Rename", &(odd, options([]))).await.expect_err("no new name");
        assert!(!why.contains(['\u{202e}', '\u{200b}', '\u{2028}']), "{why}");
        let doc = format!("<domainsnapshot><name>{odd}</name></domainsnapshot>");
        let (name, why) = web.call("CreateSnapshot", &(doc, options([]))).await.expect_err("no new name");
        assert!(name.ends_with("InvalidArgument"), "{name}: {why}");
    }
    daemon.kill_virtd().await;
    let old = machine("o\u{202e}ld", &uuid(3), "");
    std::fs::write(stored(&daemon, &uuid(3)), old).expect("written");
    daemon.start_virtd().await;
    let domain = root.path_from("GetDomain", &(uuid(3),)).await.expect("it is there");
    assert_eq!(domain.property::<String>("Broken").await, "");
    let (_, why) = domain.bare("Suspend").await.expect_err("it does not run");
    assert!(why.contains("o\\u{202e}ld"), "{why}");
    domain.call("SetTitle", &("a title", options([]))).await.expect("it is used as ever");
    root.define(&machine("o\u{202e}ld", &uuid(3), "")).await.expect("and defined as ever");
    assert!(!daemon.log().contains('\u{202e}') && daemon.log().contains("\\u{202e}"), "the log writes it out");
}

/// Whoever edits what they were shown loses nothing of what they were not shown.
#[tokio::test(flavor = "multi_thread")]
async fn l7_an_edited_document_keeps_the_password() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let with_display =
        |display: &str| machine("web", &uuid(1), "").replace("</os>", &format!("</os><devices>{display}</devices>"));
    let web = root.define(&with_display("<graphics type='vnc' passwd='s3cretpw'/>")).await.expect("defined");
    let secure = async || -> String {
        let reply = web.call("GetXML", &(with([("secure", true)]),)).await.expect("shown");
        reply.body().deserialize().expect("s")
    };
    let shown = web.xml().await;
    assert!(!shown.contains("s3cretpw"));
    root.define(&shown.replace("65536", "131072")).await.expect("edited");
    assert!(secure().await.contains("s3cretpw") && secure().await.contains("131072"));
    root.define(&shown.replace("type='vnc'", "type='vnc' passwd=''")).await.expect("emptied");
    assert!(secure().await.contains("passwd=''"), "nobody gets in");
    let emptied = web.xml().await;
    assert!(emptied.contains("passwd=''"), "which is no secret");
    root.define(&shown).await.expect("and without any");
    assert!(!secure().await.contains("passwd"));
    let (name, why) = root.define(&with_native("[hidden 1]")).await.err().expect("nobody knows what that was");
    assert!(name.ends_with("ConfigInvalid") && why.contains("give the value itself"), "{name}: {why}");
}

fn with_native(value: &str) -> String {
    machine("raw", &uuid(9), "")
        .replace("<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ")
        .replace("</domain>", &format!("<qemu:commandline><qemu:arg value='{value}'/></qemu:commandline></domain>"))
}
