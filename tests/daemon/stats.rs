//! Statistics as clients get them, of the test driver's machines.

use crate::common::client::{Client, Refusal, options};
use crate::common::stats::{SIZES, TRAFFIC, VCPU, shaped, stats_of, stats_with};
use crate::common::users::{ADMIN, BOB};
use crate::common::{Daemon, PATIENCE, Setup};
use std::io::Read as _;
use zbus::Variant;
use zbus::wire::OwnedFd;

const MACHINE: &str = "<domain type='test'><name>web</name><memory>65536</memory><vcpu current='1'>2</vcpu>\
     <os><type>hvm</type></os><devices><disk type='file'><source file='/web.img'/><target dev='vda'/></disk>\
     <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='card0'/></interface>\
     </devices></domain>";

#[tokio::test]
async fn each_group_has_its_keys_and_types_and_what_is_off_has_sizes_only() {
    let Some(daemon) = Daemon::on_session_bus().await else { return };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    let off = stats_with(&domain, &[], &["disks"]).await;
    assert_eq!(off.groups().into_iter().collect::<Vec<_>>(), ["disks", "state"]);
    assert_eq!(off.shape("disks", 0), shaped(SIZES));
    assert_eq!((off.word("state", 0, "state").as_str(), off.word("disks", 0, "target").as_str()), ("shutoff", "vda"));
    let nothing = stats_of(&domain, &["cpu", "iothreads"]).await.expect("told");
    assert!(nothing.groups().is_empty() && nothing.sampled_at() >= off.sampled_at(), "{nothing:?}");

    domain.run("Start").await.expect("started");
    let usual = ["cpu", "disks", "interfaces", "memory", "state", "vcpus"];
    let on = stats_with(&domain, &[], &usual).await;
    assert_eq!(on.groups().into_iter().collect::<Vec<_>>(), usual);
    assert_eq!(on.shape("state", 0), shaped("state s reason s"));
    assert_eq!(on.shape("cpu", 0), shaped("time-usec t user-usec t system-usec t"));
    assert_eq!(on.shape("memory", 0), shaped("actual t rss t"));
    assert_eq!(on.shape("vcpus", 0), shaped(VCPU));
    assert_eq!((on.count("vcpus"), on.shape("vcpus", 1)), (2, shaped("number u state s")));
    assert_eq!(on.shape("disks", 0), shaped(&format!("{SIZES} {TRAFFIC}")));
    let counted =
        "mac s target s rx-bytes t rx-packets t rx-errors t rx-drops t tx-bytes t tx-packets t tx-errors t tx-drops t";
    assert_eq!(on.shape("interfaces", 0), shaped(counted));
    assert_eq!(on.word("interfaces", 0, "mac"), "52:54:00:00:00:01");
    assert_eq!(on.number("memory", 0, "actual"), 65536 << 10);
    let words = ["state", "reason"].map(|key| on.word("state", 0, key));
    assert_eq!(words, ["running", "booted"]);
    assert_eq!(on.word("vcpus", 1, "state"), "offline");

    let perf = stats_with(&domain, &["perf"], &["perf"]).await;
    assert_eq!(perf.shape("perf", 0), shaped("period-usec t context-switches t"));
    let some = stats_with(&domain, &["iothreads", "state"], &["iothreads"]).await;
    assert_eq!(
        (some.groups().into_iter().collect::<Vec<_>>(), some.count("iothreads")),
        (vec!["iothreads", "state"], 0)
    );
}

#[tokio::test]
async fn what_is_no_group_or_option_is_refused_and_who_may_not_read_is_told_nothing() {
    let rules = "polkit.addRule(function(action, subject) { if (action.id == 'org.virt.domain.read' && \
                 subject.user == 'virt-bob') { return polkit.Result.NO; } });";
    let Some(daemon) = Daemon::on_system_bus(Setup { rules: rules.to_owned(), ..Setup::default() }).await else {
        return;
    };
    let domain = Client { connection: daemon.connect().await }.define(MACHINE).await.expect("defined");
    let (name, why) = stats_of(&domain, &["cpu", "gpu"]).await.expect_err("no such group");
    assert_eq!(name, "org.virt.Error.InvalidArgument");
    assert!(why.contains("'gpu'") && why.contains("vcpus"), "{why}");
    let unknown = domain.call("GetStats", &(options([("fresh", Variant::from(true))]),)).await;
    assert_eq!(unknown.expect_err("no such option").0, "org.virt.Error.InvalidArgument");

    let seen_by = async |user| {
        let client = Client { connection: daemon.connect_as(user).await };
        client.named("web").await.expect("it is there for all")
    };
    let (name, _) = stats_of(&seen_by(&BOB).await, &[]).await.expect_err("the rule says no");
    assert_eq!(name, "org.freedesktop.DBus.Error.AccessDenied");
    stats_of(&seen_by(&ADMIN).await, &[]).await.expect("everybody else may read");
}

/// The pipe of a scrape.
async fn scrape(client: &Client) -> Result<std::fs::File, Refusal> {
    let reply = client.call("/org/virt", "org.virt.Manager.OpenMetrics", &(options([]),)).await?;
    let pipe: OwnedFd = reply.body().deserialize().expect("h");
    Ok(std::fs::File::from(std::os::fd::OwnedFd::from(pipe)))
}

/// What is read from it.
async fn read(mut pipe: std::fs::File) -> String {
    let read = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).map(|_| text)
    });
    tokio::time::timeout(PATIENCE, read).await.expect("an end").expect("read").expect("a text")
}

#[tokio::test]
async fn a_scrape_has_the_machines_that_its_reader_may_read() {
    let rules = "polkit.addRule(function(action, subject) { if (action.id == 'org.virt.domain.read' && \
                 action.lookup('domain_name') == 'web' && subject.user == 'virt-bob') { return polkit.Result.NO; } });";
    let Some(daemon) = Daemon::on_system_bus(Setup { rules: rules.to_owned(), ..Setup::default() }).await else {
        return;
    };
    let root = Client { connection: daemon.connect().await };
    let web = root.define(MACHINE).await.expect("defined");
    root.define(&MACHINE.replace("<name>web<", "<name>mail<").replace(":01'", ":02'")).await.expect("defined");
    web.run("Start").await.expect("started");
    let text = read(scrape(&root).await.expect("a pipe")).await;
    assert!(text.ends_with("\n# EOF\n"), "{text}");
    let uuid = web.property::<String>("UUID").await;
    let labels = format!("{{name=\"web\",uuid=\"{uuid}\"");
    for line in [
        format!("\nvirt_domain_state{labels},state=\"running\"}} 1\n"),
        format!("\nvirt_domain_cpu_seconds_total{labels}}} "),
        format!("\nvirt_domain_memory_rss_bytes{labels}}} {}\n", 32 << 20),
        format!("\nvirt_domain_disk_read_bytes_total{labels},target=\"vda\"}} "),
        format!("\nvirt_domain_disk_written_bytes_total{labels},target=\"vda\"}} "),
        format!("\nvirt_domain_interface_received_bytes_total{labels},target=\"card0\"}} "),
    ] {
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
    let off = text.lines().filter(|line| line.contains("name=\"mail\""));
    assert_eq!(
        off.map(|line| line.split('{').next().unwrap_or_default()).collect::<Vec<_>>(),
        ["virt_domain_state", "virt_domain_sampled_timestamp_seconds"]
    );

    let bob = Client { connection: daemon.connect_as(&BOB).await };
    let text = read(scrape(&bob).await.expect("a pipe")).await;
    assert!(text.contains("name=\"mail\"") && !text.contains("web") && text.ends_with("# EOF\n"), "{text}");
    let unknown = options([("all", Variant::from(true))]);
    let unknown = root.call("/org/virt", "org.virt.Manager.OpenMetrics", &(unknown,)).await;
    assert_eq!(unknown.expect_err("no such option").0, "org.virt.Error.InvalidArgument");
}

#[tokio::test]
async fn who_does_not_read_has_few_pipes_and_keeps_nobody_else_from_any() {
    let Some(daemon) = Daemon::on_system_bus(Setup::default()).await else { return };
    let root = Client { connection: daemon.connect().await };
    // More of them than a pipe holds.
    for number in 0..40 {
        let xml = MACHINE.replace("<name>web<", &format!("<name>web{number}<"));
        root.define(&xml).await.expect("defined").run("Start").await.expect("started");
    }
    let bob = Client { connection: daemon.connect_as(&BOB).await };
    // At once: one that is not read is given up after a while.
    let three = futures_util::future::join_all((0..3).map(|_| scrape(&bob))).await;
    let (unread, refused): (Vec<_>, Vec<_>) = three.into_iter().partition(Result::is_ok);
    let refused: Vec<_> = refused.into_iter().filter_map(Result::err).collect();
    let [(name, why)] = &refused[..] else { panic!("two are there at once: {refused:?}") };
    assert_eq!(name, "org.freedesktop.DBus.Error.LimitsExceeded", "{why}");
    let text = read(scrape(&root).await.expect("another user's")).await;
    assert!(text.len() > 64 << 10 && text.ends_with("# EOF\n"), "{}", text.len());
    drop(unread);
    let freed = async {
        loop {
            match scrape(&bob).await {
                Ok(pipe) => return pipe,
                // Whoever writes is told of the reader's end by the kernel.
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
            }
        }
    };
    let freed = tokio::time::timeout(PATIENCE, freed).await.expect("they are given back");
    assert!(read(freed).await.ends_with("# EOF\n"));
}
