//! Every cell of the table of reverts, with a real guest: what is risky, what is told in which order, and what then runs.

use crate::common::Daemon;
use crate::common::client::{Client, Watch, options};
use crate::common::guest::Tick;
use crate::common::snapshots::{Player, with};
use zbus::Variant;

/// Now, snapshot, options, risks, events (the last `defined` apart), and whether the process stays.
type Cell = (&'static str, &'static str, &'static str, &'static [&'static str], &'static str, bool);

const NEW: &[&str] = &["new-process"];
const NONE: &[&str] = &[];

/// Snapshots inside the image: `running` and `paused` with memory, `off` without.
const INSIDE: &[Cell] = &[
    ("shutoff", "off", "", NONE, "", false),
    ("shutoff", "off", "running", NONE, "started resumed", false),
    ("shutoff", "off", "paused", NONE, "started suspended", false),
    ("shutoff", "running", "", NONE, "started resumed", false),
    ("shutoff", "running", "paused", NONE, "started suspended", false),
    ("shutoff", "paused", "", NONE, "started suspended", false),
    ("shutoff", "paused", "running", NONE, "started resumed", false),
    ("running", "running", "", NONE, "", true),
    ("running", "running", "paused", NONE, "suspended", true),
    ("running", "paused", "", NONE, "suspended", true),
    ("running", "paused", "running", NONE, "", true),
    ("running", "running", "respawn", NONE, "stopped started resumed", false),
    ("running", "paused", "respawn", NONE, "stopped started suspended", false),
    ("running", "off", "", NONE, "stopped", false),
    ("running", "off", "running", NEW, "stopped started resumed", false),
    ("running", "off", "paused", NEW, "stopped started suspended", false),
    ("paused", "running", "", NONE, "resumed", true),
    ("paused", "running", "paused", NONE, "", true),
    ("paused", "paused", "", NONE, "", true),
    ("paused", "paused", "running", NONE, "resumed", true),
    ("paused", "running", "respawn", NONE, "stopped started resumed", false),
    ("paused", "paused", "respawn", NONE, "stopped started suspended", false),
    ("paused", "off", "", NONE, "stopped", false),
    ("paused", "off", "running", NEW, "stopped started resumed", false),
    ("paused", "off", "paused", NEW, "stopped started suspended", false),
];

/// Overlays: `full` with memory in a file, `disks` without, both taken while it ran.
const OUTSIDE: &[Cell] = &[
    ("shutoff", "disks", "", NONE, "", false),
    ("shutoff", "disks", "running", NONE, "started resumed", false),
    ("shutoff", "disks", "paused", NONE, "started suspended", false),
    ("shutoff", "full", "", NONE, "started resumed", false),
    ("shutoff", "full", "paused", NONE, "started suspended", false),
    ("running", "disks", "", NONE, "stopped", false),
    ("running", "disks", "running", NEW, "stopped started resumed", false),
    ("running", "disks", "paused", NEW, "stopped started suspended", false),
    ("running", "full", "", NEW, "stopped started resumed", false),
    ("running", "full", "paused", NEW, "stopped started suspended", false),
    ("running", "full", "respawn", NONE, "stopped started resumed", false),
    ("paused", "disks", "", NONE, "stopped", false),
    ("paused", "disks", "running", NEW, "stopped started resumed", false),
    ("paused", "full", "", NEW, "stopped started resumed", false),
    ("paused", "full", "paused", NEW, "stopped started suspended", false),
];

struct Table {
    daemon: Daemon,
    player: Player,
    tick: Tick,
    /// The counter when the snapshots were taken.
    taken: u32,
}

impl Table {
    async fn new(name: &str) -> Option<Table> {
        let daemon = Daemon::on_session_bus().await?;
        let tick = Tick::new(&daemon, name, "")?;
        let client = Client { connection: daemon.connect().await };
        let domain = client.define(&tick.xml).await.expect("defined");
        Some(Table { daemon, player: Player { domain }, tick, taken: 0 })
    }

    /// Brings the domain where a cell begins, from wherever it is.
    async fn bring(&self, now: &str) {
        let domain = &self.player.domain;
        let state = domain.state().await.0;
        if now == "shutoff" {
            if state != "shutoff" {
                domain.run("Destroy").await.expect("destroyed");
            }
            return;
        }
        if state == "shutoff" {
            domain.run("Start").await.expect("started");
        }
        match (domain.state().await.0.as_str(), now) {
            ("paused", "running") => domain.bare("Resume").await.map(drop).expect("resumed"),
            ("running", "paused") => domain.bare("Suspend").await.map(drop).expect("suspended"),
            _ => {}
        }
    }

    async fn hold(&self, cell: &Cell) {
        let (now, snapshot, flag, risks, events, stays) = *cell;
        self.bring(now).await;
        let process = self.daemon.qemu_of(&self.tick.name);
        let flags = || with((!flag.is_empty()).then_some((flag, true)));
        let plan = self.player.check(snapshot, "CheckRevert", flags()).await;
        let reason = String::try_from(plan["reason"].clone()).expect("s");
        assert_eq!(*plan["possible"], Variant::from(true), "{cell:?}: {reason}");
        assert_eq!(*plan["risks"], Variant::from(risks.to_vec()), "{cell:?}");
        let planned = Vec::<(String, String)>::try_from(plan["events"].clone()).expect("a(ss)");
        let planned: Vec<String> = planned.iter().map(|(event, detail)| format!("{event} {detail}")).collect();
        let words = events.split_whitespace().chain(["defined"]);
        let expected: Vec<String> = words.map(|event| format!("{event} from-snapshot")).collect();
        assert_eq!(planned, expected, "{cell:?}");

        let mut watch = self.player.domain.client.watch().await;
        let mut options = flags();
        if !risks.is_empty() {
            let (name, why) = self.player.call(snapshot, "Revert", flags()).await.expect_err("risky");
            assert_eq!(name, "org.virt.Error.RevertRisky", "{cell:?}: {why}");
            assert_eq!(self.daemon.qemu_of(&self.tick.name), process, "nothing has happened");
            options.insert("force", Variant::from(risks.to_vec()));
        }
        self.player.call(snapshot, "Revert", options).await.unwrap_or_else(|why| panic!("{cell:?}: {why:?}"));
        assert_eq!(told(&mut watch, &self.player).await, expected, "{cell:?}");
        self.stands(cell).await;
        assert_eq!(stays, process.is_some() && self.daemon.qemu_of(&self.tick.name) == process, "{cell:?}");
    }

    /// State, reason, current snapshot, and the guest itself.
    async fn stands(&self, cell: &Cell) {
        let (_, snapshot, flag, ..) = *cell;
        let own = match snapshot {
            "running" | "full" => "running",
            "paused" => "paused",
            _ => "shutoff",
        };
        let state = if matches!(flag, "running" | "paused") { flag } else { own };
        let domain = &self.player.domain;
        assert_eq!(domain.state().await, (state.to_owned(), "from-snapshot".to_owned()), "{cell:?}");
        assert_eq!(self.player.current().await, self.player.path(snapshot), "{cell:?}");
        if state == "shutoff" {
            return;
        }
        if state == "paused" {
            domain.bare("Resume").await.expect("resumed");
        }
        self.tick.goes_on().await;
        let counted = self.tick.counted().expect("it counts").0;
        let memory = (self.taken..self.taken + 20).contains(&counted);
        assert_eq!(memory, !matches!(snapshot, "off" | "disks"), "{cell:?}: it has counted to {counted}");
    }
}

/// The lifecycle events that have been told.
async fn told(watch: &mut Watch, player: &Player) -> Vec<String> {
    player.domain.call("SetTitle", &("mark", options([("config", Variant::from(true))]))).await.expect("set");
    let mut events = watch.until(&player.domain.path, "defined updated").await;
    events.pop();
    events
}

#[tokio::test]
async fn snapshots_inside_the_image() {
    let Some(mut table) = Table::new("inside").await else { return };
    table.player.take("off").await;
    table.player.domain.run("Start").await.expect("started");
    table.tick.counts_to(12).await;
    table.player.domain.bare("Suspend").await.expect("suspended");
    table.player.take("paused").await;
    table.taken = table.tick.counted().expect("it counted").0;
    table.player.domain.bare("Resume").await.expect("resumed");
    table.player.take("running").await;
    for cell in INSIDE {
        table.hold(cell).await;
    }
}

#[tokio::test]
async fn overlays() {
    let Some(mut table) = Table::new("overlays").await else { return };
    table.player.domain.run("Start").await.expect("started");
    table.tick.counts_to(12).await;
    let memory = table.tick.disk.with_extension("memory");
    let full = format!(
        "<domainsnapshot><name>full</name><memory snapshot='external' file='{}'/></domainsnapshot>",
        memory.display()
    );
    table.player.create(&full, options([])).await.expect("taken");
    table.taken = table.tick.counted().expect("it counted").0;
    let disks = "<domainsnapshot><name>disks</name></domainsnapshot>";
    table.player.create(disks, with([("disk-only", true)])).await.expect("taken");
    for cell in OUTSIDE {
        table.hold(cell).await;
    }
    // However often it went back: only what is needed is there.
    table.bring("shutoff").await;
    let folder = std::fs::read_dir(table.tick.disk.parent().expect("a folder")).expect("a folder");
    let overlays = folder.filter(|entry| {
        let name = entry.as_ref().expect("an entry").file_name().to_string_lossy().into_owned();
        name.starts_with("overlays.") && !name.ends_with("serial")
    });
    // The image, its two overlays, the memory, and the overlay of the last revert.
    let count = overlays.count();
    assert!(count <= 5, "{count} files");
}
