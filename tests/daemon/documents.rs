//! Documents as they come: long lines, large ones, deep ones, tricks; and all that is wrong with one told at once.

use crate::common::client::{Client, options};
use crate::common::{Daemon, Setup};
use std::fmt::Write;

type Findings = Vec<(String, u32, u32, String)>;

async fn findings(client: &Client, xml: &str) -> Findings {
    let reply = client.call("/org/virt", "org.virt.Manager.ValidateDomain", &(xml, options([]))).await.expect("told");
    reply.body().deserialize().expect("a(suus)")
}

/// A machine with something beside its memory.
fn machine(kind: &str, more: &str) -> String {
    format!("<domain type='{kind}'><name>m</name><memory>65536</memory>{more}<os><type>hvm</type></os></domain>")
}

#[tokio::test(flavor = "multi_thread")]
async fn long_large_deep_and_tricky_ones_are_answered() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    let before = daemon.memory_kib();

    let line = "x".repeat(64 << 10);
    let domain = root.define(&machine("test", &format!("<metadata><n:a xmlns:n='u'>{line}</n:a></metadata>"))).await;
    assert!(domain.expect("a long line is fine").xml().await.contains(&line));

    let deep = format!("{}{}", "<a>".repeat(100_000), "</a>".repeat(100_000));
    let entities = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]><domain>&b;</domain>";
    let mut crowd = String::new();
    for number in 0..200_000 {
        write!(crowd, "<disk><target dev='vd{number}'/></disk>").expect("a string");
    }
    let large = machine("test", &format!("<title>{}</title>", "y".repeat(10 << 20)));
    for (what, text) in [
        ("deep", machine("test", &deep)),
        ("entities", entities.to_owned()),
        ("a crowd", machine("test", &format!("<devices>{crowd}</devices>"))),
        ("10 MiB", large.clone()),
        ("not closed", "<domain><name>".to_owned()),
        ("empty", String::new()),
    ] {
        let found = findings(&root, &text).await;
        assert!(found.iter().any(|finding| finding.0 == "error"), "{what}: {found:?}");
        assert!(found.len() <= 100 && found.iter().all(|finding| finding.3.len() < 2000), "{what}: {}", found.len());
        let (name, why) = root.define(&text).await.err().expect("refused");
        assert_eq!(name, "org.virt.Error.ConfigInvalid", "{what}: {why}");
    }
    let grown = daemon.memory_kib().saturating_sub(before);
    assert!(grown < 128 << 10, "{grown} KiB more than before");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_findings_are_told_at_once() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    // Not in the format, not a number, and not to be had with this driver.
    let xml =
        machine("qemu", "<colour>red</colour><vcpu>many</vcpu><idmap><uid start='0' target='1' count='1'/></idmap>");
    let found = findings(&root, &xml).await;
    for word in ["colour", "vcpu", "idmap"] {
        assert!(found.iter().any(|finding| finding.3.contains(word)), "{word}: {found:?}");
    }
}

#[tokio::test]
async fn a_list_of_an_unknown_driver_or_state_names_those_there_are() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let client = Client { connection: daemon.connect().await };
    let list = async |key: &'static str, word: &'static str| {
        client.call("/org/virt", "org.virt.Manager.ListDomains", &(options([(key, word.into())]),)).await
    };
    assert!(list("driver", "test").await.is_ok());
    let (name, why) = list("driver", "qemo").await.expect_err("there is no such driver");
    assert_eq!(name, "org.virt.Error.InvalidArgument");
    assert!(why.contains("qemu") && why.contains("test") && why.ends_with("not 'qemo'"), "{why}");
    let (name, why) = list("state", "runing").await.expect_err("there is no such state");
    assert_eq!(name, "org.virt.Error.InvalidArgument");
    assert!(why.contains("running"), "{why}");
}
