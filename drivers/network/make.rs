//! Networks made, found again, changed and taken away: one step after the other, each of which may be the last one of this
//! virtd. What is to be made is on disk before; whoever finds a record goes on where it says.
//!
//! ```text
//!  record "making" ─▶ bridge ─▶ rules ─▶ server ─▶ forwarding ─▶ record "made"
//!  record "unmaking" ─▶ server, rules, bridge away ─▶ record away
//! ```

use super::devices;
use super::foreign::{self, Needs, Ruleset};
use super::inside::{Card, Place};
use super::link::{self, HostRoute};
use super::own::OwnNetwork;
use super::rules;
use super::serve::{self, Files, Rights, Served};
use super::server;
use super::zones;
use crate::host::SYSFS;
use crate::host::net_tool::output_within;
use crate::host::own_file::replace_json;
use crate::host::process::boot_id;
use crate::host::tap::default_vlan;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;
use virt_model::driver::network::{Lease, NetworkError, PartlySeen, PluggedCard, Problem, ProblemToken};
use virt_model::network::NetworkDef;
use virt_model::network::address::Net;
use virt_model::network::forward::{ForwardDevice, Mode};
use virt_model::network::standing;
use virt_model::xml::{Finding, Limits};

/// Everything here blocks for moments.
pub struct Maker {
    /// A folder for each network that is there, gone with the host's boot.
    pub runtime: PathBuf,
    /// Who had which address, which outlives it.
    pub leases: PathBuf,
    /// What dnsmasq runs when an address is given: virtd itself.
    pub teller: Option<PathBuf>,
    /// Where they are made.
    pub namespace: Namespace,
    /// For tests: so many steps are done, and then nothing any more.
    pub steps_left: Option<std::sync::atomic::AtomicUsize>,
}

/// Where networks are made.
#[derive(Clone, Debug)]
pub enum Namespace {
    /// On the host: we are root.
    Host,
    /// In namespaces of the user's own.
    Own(OwnNetwork),
    /// The same: we are in them.
    Inside,
    /// Nowhere: we are not root, and know no program of virtd's that could help.
    Nowhere,
}

/// In a network's folder: who holds the namespaces that it is in.
pub const HOLDER: &str = "holder.json";

/// What is on disk of a network that is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    boot_id: String,
    phase: Phase,
    /// Whose it is.
    owner: u32,
    /// The definition, as text.
    xml: String,
    /// The devices of the host's that it gives to guests' cards.
    #[serde(default)]
    devices: Vec<ForwardDevice>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    Making,
    Made,
    Unmaking,
}

/// Why it was not made.
enum Halt {
    /// Something failed: what is there is to be taken away.
    Failed(io::Error),
    /// As if virtd had been killed (`steps_left`).
    Cut,
}

impl From<io::Error> for Halt {
    fn from(error: io::Error) -> Halt {
        Halt::Failed(error)
    }
}

fn failed(def: &NetworkDef, error: &io::Error) -> NetworkError {
    NetworkError::Failed(format!("the network '{}': {error}", def.name))
}

impl Maker {
    /// What there is of a network.
    pub fn folder(&self, uuid: Uuid) -> PathBuf {
        self.runtime.join(uuid.to_string())
    }

    fn step(&self) -> Result<(), Halt> {
        use std::sync::atomic::Ordering::SeqCst;
        let Some(left) = &self.steps_left else { return Ok(()) };
        match left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Ok(()),
            Err(_) => Err(Halt::Cut),
        }
    }

    fn record(&self, def: &NetworkDef, owner: u32, phase: Phase) -> io::Result<()> {
        self.record_with(def, owner, phase, Vec::new())
    }

    fn record_with(&self, def: &NetworkDef, owner: u32, phase: Phase, devices: Vec<ForwardDevice>) -> io::Result<()> {
        let record = Record { boot_id: boot_id()?, phase, owner, xml: def.write(), devices };
        replace_json(&self.folder(def.uuid).join("record.json"), &record, false)
    }

    /// What keeps a definition from being started here.
    pub fn check(&self, def: &NetworkDef) -> Vec<Finding> {
        let mut findings = standing::check(def);
        let obstacle = match &self.namespace {
            Namespace::Host | Namespace::Inside => None,
            Namespace::Own(_) => OwnNetwork::obstacle(def.mode()),
            Namespace::Nowhere => Some("networks need root: use the system bus, or <interface type='user'>".to_owned()),
        };
        findings.extend(obstacle.map(|why| Finding::unsupported(&def.at, why)));
        findings
    }

    /// What a start would be refused for.
    pub fn can_start(&self, def: &NetworkDef) -> Result<(), NetworkError> {
        let findings = self.check(def);
        if !findings.is_empty() {
            return Err(NetworkError::Config(findings));
        }
        match &self.namespace {
            Namespace::Own(own) => own.can_start(self, def),
            _ => self.is_free(def).and_then(|()| self.can_hear(def)).map_err(|error| failed(def, &error)),
        }
    }

    fn is_free(&self, def: &NetworkDef) -> io::Result<()> {
        if def.mode().has_no_bridge() {
            let found = devices::find(def, Path::new(SYSFS), &[])?;
            let obstacle = devices::obstacle(def, Path::new(SYSFS), &found);
            return obstacle.map_or(Ok(()), |why| Err(io::Error::other(why)));
        }
        let Some(bridge) = def.bridge_name() else { return Err(io::Error::other("it has no name of a bridge")) };
        if def.mode() == Mode::Bridge {
            return match link::is_bridge(bridge)? {
                true if def.vlan.is_some() => default_vlan(bridge).map(drop),
                true => Ok(()),
                false => Err(io::Error::other(format!("there is no bridge '{bridge}' on this host: make it first"))),
            };
        }
        if link::card(bridge)?.is_some() {
            let why = format!("the host has a device '{bridge}' already: choose another <bridge name=…>, or remove it");
            return Err(io::Error::other(why));
        }
        let routes = self.is_unrouted(def)?;
        let leads_out = matches!(def.mode(), Mode::Nat | Mode::Route | Mode::Open);
        let passes = leads_out && def.addresses().iter().any(|(address, _)| address.is_ipv6());
        if let Some(dev) = link::would_lose_router(&routes).filter(|_| passes) {
            let why = format!(
                "the host would not hear its router on '{dev}' any more if it passed on IPv6: \
                 sysctl -w net.ipv6.conf.{dev}.accept_ra=2"
            );
            return Err(io::Error::other(why));
        }
        let devices = def.forward_devices();
        let known = link::names()?;
        match devices.into_iter().find(|dev| !known.iter().any(|name| name == dev)) {
            Some(dev) => {
                Err(io::Error::other(format!("the host has no device '{dev}', by which packets are to leave")))
            }
            None => Ok(()),
        }
    }

    /// What its server is to run when it has given an address can be run by the server's user.
    fn can_hear(&self, def: &NetworkDef) -> io::Result<()> {
        match &self.teller {
            Some(teller) if self.is_host() && def.mode().is_ours() && def.has_dhcp() => server::can_run(teller),
            _ => Ok(()),
        }
    }

    /// The host's routes, which leave room for its nets.
    pub fn is_unrouted(&self, def: &NetworkDef) -> io::Result<Vec<HostRoute>> {
        let routes = link::routes()?;
        for (_, net) in def.addresses() {
            if let Some(route) = taken(&routes, &net) {
                let why =
                    format!("the host's route to {} by the device '{}' overlaps with {net}", route.net, route.dev);
                return Err(io::Error::other(why));
            }
        }
        Ok(routes)
    }

    /// Makes it, all or nothing.
    pub fn start(&self, def: &NetworkDef, owner: u32) -> Result<(), NetworkError> {
        if let Namespace::Own(own) = &self.namespace {
            return own.start(self, def, owner);
        }
        self.can_start(def)?;
        match self.make(def, owner) {
            Ok(()) => Ok(()),
            Err(Halt::Cut) => Err(NetworkError::Failed("cut off".to_owned())),
            Err(Halt::Failed(error)) => {
                let undone = self.unmake(def, owner);
                let and = undone.err().map_or(String::new(), |why| format!(" (and it could not be undone: {why})"));
                Err(NetworkError::Failed(format!("the network '{}': {error}{and}", def.name)))
            }
        }
    }

    fn make(&self, def: &NetworkDef, owner: u32) -> Result<(), Halt> {
        self.make_folders(def.uuid)?;
        self.record(def, owner, Phase::Making)?;
        self.step()?;
        let Some(bridge) = def.bridge_name().filter(|_| def.mode().is_ours()) else {
            let devices = devices::find(def, Path::new(SYSFS), &[])?;
            self.record_with(def, owner, Phase::Made, devices)?;
            return Ok(());
        };
        link::make(def, bridge)?;
        self.step()?;
        self.put_rules(def, bridge)?;
        self.step()?;
        if let Some(served) = self.served(def, bridge) {
            self.serve(def.uuid, &served)?;
            self.step()?;
        }
        link::forward(def)?;
        self.step()?;
        self.record(def, owner, Phase::Made)?;
        self.step()
    }

    /// dnsmasq, which is not root, goes through these.
    fn make_folders(&self, uuid: Uuid) -> io::Result<()> {
        for folder in [&self.runtime, &self.leases, &self.folder(uuid)] {
            fs::create_dir_all(folder)?;
            fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    fn lease_file(&self, uuid: Uuid) -> PathBuf {
        self.leases.join(format!("{uuid}.leases"))
    }

    fn served(&self, def: &NetworkDef, bridge: &str) -> Option<Served> {
        let (folder, leases) = (self.folder(def.uuid), self.lease_file(def.uuid));
        let files = Files { folder: &folder, leases: &leases, teller: self.teller.as_deref() };
        let rights = if self.is_host() { Rights::Host } else { Rights::Own };
        serve::served(def, bridge, &files, rights)
    }

    fn is_host(&self) -> bool {
        matches!(self.namespace, Namespace::Host)
    }

    /// For who does the same elsewhere.
    pub(crate) fn place(&self) -> Place {
        Place { runtime: self.runtime.clone(), leases: self.leases.clone(), teller: self.teller.clone() }
    }

    /// Of which networks something is on disk.
    pub fn recorded(&self) -> Vec<Uuid> {
        let entries = fs::read_dir(&self.runtime).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// What is on disk of networks that are there, or are being made or taken away.
    pub fn there(&self) -> Vec<NetworkDef> {
        let found = self.recorded().into_iter().filter_map(|uuid| read(&self.folder(uuid)).ok()?);
        found.map(|(_, def)| def).collect()
    }

    fn serve(&self, uuid: Uuid, served: &Served) -> io::Result<()> {
        let folder = self.folder(uuid);
        write_read_again(&folder, served)?;
        server::write(&folder.join("dnsmasq.conf"), &served.config)?;
        server::start(&folder, self.is_host())
    }

    fn put_rules(&self, def: &NetworkDef, bridge: &str) -> io::Result<()> {
        match rules::replacing(def, bridge) {
            Some(all) => self.run_rules(def.uuid, &all),
            None => Ok(()),
        }
    }

    fn run_rules(&self, uuid: Uuid, all: &Value) -> io::Result<()> {
        let file = self.folder(uuid).join("rules.json");
        server::write(&file, &all.to_string())?;
        output_within("nft", &["-j", "-f", &file.display().to_string()], &[]).map(drop)
    }

    /// Takes away what there is of it.
    fn unmake(&self, def: &NetworkDef, owner: u32) -> io::Result<()> {
        let folder = self.folder(def.uuid);
        if !folder.join("record.json").exists() {
            let _ = fs::remove_dir_all(&folder);
            return Ok(());
        }
        self.record(def, owner, Phase::Unmaking)?;
        if let Some(bridge) = def.bridge_name().filter(|_| def.mode().is_ours()) {
            server::stop(&folder);
            if rules::replacing(def, bridge).is_some() {
                self.run_rules(def.uuid, &rules::removing(def.uuid))?;
            }
            link::remove(def, bridge)?;
        }
        // The record goes last of all that is in there.
        let files = [
            "server.json",
            "pid",
            "told",
            "reservations",
            "names",
            "dnsmasq.conf",
            "rules.json",
            HOLDER,
            "record.json",
        ];
        for file in files {
            let _ = fs::remove_file(folder.join(file));
        }
        let _ = fs::remove_dir(&folder);
        Ok(())
    }

    /// The same for who knows its number alone.
    pub fn stop(&self, uuid: Uuid) -> Result<(), NetworkError> {
        if let Namespace::Own(own) = &self.namespace {
            return own.stop(self, uuid);
        }
        let folder = self.folder(uuid);
        match read(&folder) {
            Ok(None) => Ok(()),
            Ok(Some((record, def))) => self.unmake(&def, record.owner).map_err(|error| failed(&def, &error)),
            Err(why) => Err(NetworkError::Failed(format!("{}: {why}", folder.display()))),
        }
    }

    /// Everything that is there and whole, after what was cut off has been undone and what is missing made again.
    pub fn find(&self) -> Vec<(NetworkDef, u32)> {
        if let Namespace::Own(own) = &self.namespace {
            return own.find(self);
        }
        let folders = fs::read_dir(&self.runtime).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut found: Vec<(NetworkDef, u32)> = folders.filter_map(|folder| self.find_one(&folder)).collect();
        found.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        found
    }

    fn find_one(&self, folder: &Path) -> Option<(NetworkDef, u32)> {
        let (record, def) = match read(folder) {
            Ok(Some(read)) => read,
            Ok(None) => {
                let _ = fs::remove_dir_all(folder);
                return None;
            }
            Err(why) => {
                tracing::warn!(folder = %folder.display(), %why, "a network that was there cannot be read; it is left alone");
                return None;
            }
        };
        if boot_id().is_ok_and(|now| now != record.boot_id) {
            let _ = fs::remove_dir_all(folder);
            return None;
        }
        if record.phase != Phase::Made {
            match self.unmake(&def, record.owner) {
                Ok(()) => tracing::info!(network = %def.name, "what was cut off of it has been undone"),
                Err(why) => tracing::warn!(network = %def.name, %why, "what was cut off of it cannot be undone"),
            }
            return None;
        }
        if let Err(why) = self.mend(&def) {
            tracing::warn!(network = %def.name, %why, "what is missing of it cannot be made again");
        }
        Some((def, record.owner))
    }

    /// Makes again what somebody else took away meanwhile, but for the bridge: who was in it is not known.
    fn mend(&self, def: &NetworkDef) -> io::Result<()> {
        let Some(bridge) = def.bridge_name().filter(|_| def.mode().is_ours()) else { return Ok(()) };
        if link::card(bridge)?.is_none() {
            return Ok(());
        }
        self.put_rules(def, bridge)?;
        match self.served(def, bridge) {
            Some(served) if server::find(&self.folder(def.uuid)).is_none() => {
                // Guests in it have their addresses all the same.
                if let Err(why) = self.can_hear(def) {
                    tracing::warn!(network = %def.name, %why, "its leases are not told");
                }
                self.serve(def.uuid, &served)
            }
            _ => Ok(()),
        }
    }

    /// Makes of one that is there what `def` says; on failure it is as it was.
    pub fn change(&self, def: &NetworkDef) -> Result<(), NetworkError> {
        if let Namespace::Own(own) = &self.namespace {
            return own.change(self, def);
        }
        let folder = self.folder(def.uuid);
        let (record, before) = match read(&folder) {
            Ok(Some(read)) => read,
            _ => return Err(NetworkError::Failed(format!("the network '{}' is not there", def.name))),
        };
        let done = devices::find(def, Path::new(SYSFS), &record.devices).and_then(|devices| {
            self.bring(&before, def)?;
            self.record_with(def, record.owner, Phase::Made, devices)
        });
        done.map_err(|error| {
            if let Err(why) = self.bring(def, &before) {
                tracing::warn!(network = %def.name, %why, "it cannot be brought back to what it was");
            }
            failed(def, &error)
        })
    }

    fn bring(&self, from: &NetworkDef, to: &NetworkDef) -> io::Result<()> {
        let Some(bridge) = to.bridge_name().filter(|_| to.mode().is_ours()) else { return Ok(()) };
        let folder = self.folder(to.uuid);
        if rules::replacing(from, bridge) != rules::replacing(to, bridge) {
            self.put_rules(to, bridge)?;
        }
        let Some(served) = self.served(to, bridge) else {
            server::stop(&folder);
            return Ok(());
        };
        let same = fs::read_to_string(folder.join("dnsmasq.conf")).is_ok_and(|config| config == served.config);
        if !same || server::find(&folder).is_none() {
            if !from.has_dhcp() {
                self.can_hear(to)?;
            }
            server::stop(&folder);
            return self.serve(to.uuid, &served);
        }
        write_read_again(&folder, &served)?;
        let names = to.has_dns().then_some("names");
        let reservations = to.has_dhcp().then_some("reservations");
        server::reload(&folder, &names.into_iter().chain(reservations).collect::<Vec<_>>())
    }

    /// The devices of the host's that it gives to guests' cards.
    pub fn forward_devices(&self, uuid: Uuid) -> Vec<ForwardDevice> {
        read(&self.folder(uuid)).ok().flatten().map(|(record, _)| record.devices).unwrap_or_default()
    }

    /// Who has which address.
    pub fn leases(&self, def: &NetworkDef) -> io::Result<Vec<Lease>> {
        let text = super::leases::text(&self.lease_file(def.uuid))?;
        let nets = def.addresses();
        let prefix = |address: IpAddr| {
            let net = nets.iter().find(|(_, net)| net.contains(address));
            net.map_or(if address.is_ipv4() { 32 } else { 128 }, |(_, net)| net.prefix)
        };
        Ok(super::leases::read(&text, serve::most_leases(def), prefix))
    }

    /// Why it cannot do its work, with the host's rules as they are or were listed for others after the same change.
    pub fn problems(&self, def: &NetworkDef, rules: &Ruleset) -> Result<Vec<Problem>, PartlySeen> {
        if let Namespace::Own(own) = &self.namespace {
            return own.problems(self, def);
        }
        let Some(bridge) = def.bridge_name() else { return Ok(Vec::new()) };
        let card = link::card(bridge).map_err(PartlySeen::nothing)?;
        if card.is_none() {
            let sentence =
                format!("the bridge '{bridge}' was removed by somebody else: destroy the network and start it again");
            return Ok(vec![Problem { token: ProblemToken::BridgeGone, sentence }]);
        }
        if !def.mode().is_ours() {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        let serving = self.served(def, bridge).is_some();
        if serving && server::find(&self.folder(def.uuid)).is_none() {
            let sentence =
                "dnsmasq has ended: nobody is given addresses or told names; destroy the network and start it again";
            found.push(Problem { token: ProblemToken::DhcpDown, sentence: sentence.to_owned() });
        }
        let passing = matches!(def.mode(), Mode::Nat | Mode::Route | Mode::Open);
        match rules.listed() {
            Ok(ruleset) => {
                let zone = zones::place(def).map(|(_, zone)| zone);
                found.extend(foreign::problems(ruleset, Needs { bridge, zone, passing, serving }));
                Ok(found)
            }
            Err(error) => {
                let seen = vec![ProblemToken::BridgeGone, ProblemToken::DhcpDown];
                Err(PartlySeen { found, seen, why: format!("others' rules cannot be listed: {error}") })
            }
        }
    }

    /// The first /24 from 192.168.122.0 that no route leads to.
    pub fn free_net(&self, others: &[Net]) -> Result<Net, NetworkError> {
        let routes = link::routes().map_err(|error| NetworkError::Failed(error.to_string()))?;
        let is_taken = |net: &Net| taken(&routes, net).is_some() || others.iter().any(|other| other.overlaps(net));
        let none =
            || NetworkError::Failed("no net from 192.168.122.0/24 to 192.168.255.0/24 is free: say <ip>".to_owned());
        Net::first_free(is_taken).ok_or_else(none)
    }

    /// Plugs cards of guests that are in no bridge into this one.
    pub fn plug(&self, def: &NetworkDef, cards: &[PluggedCard]) {
        match &self.namespace {
            Namespace::Own(own) => own.plug(def, cards),
            _ => link::plug(def, &cards.iter().map(Card::of).collect::<Vec<_>>()),
        }
    }

    /// What is watched of a network; nothing of one that is not there.
    pub fn watched(&self, uuid: Uuid) -> Option<WatchedParts> {
        let folder = self.folder(uuid);
        let (_, def) = read(&folder).ok()??;
        let (mut parts, holder) = (
            vec![server::find(&folder)],
            match &self.namespace {
                Namespace::Own(own) => Some(own.holder_of(self, uuid)),
                _ => None,
            },
        );
        if let Namespace::Own(own) = &self.namespace
            && def.mode() == Mode::Nat
        {
            parts.push(own.uplink());
        }
        Some(WatchedParts { told: folder.join("told"), parts, holder })
    }
}

/// What is watched of a network.
pub struct WatchedParts {
    /// The file that is touched when an address was given.
    pub told: PathBuf,
    /// Processes that work for it, each if it is there.
    pub parts: Vec<Option<OwnedFd>>,
    /// Of one in the user's own namespaces: who holds them, if they live.
    pub holder: Option<Option<OwnedFd>>,
}

/// Writes what the server reads when it is told to, if it takes all of it as it is meant.
fn write_read_again(folder: &Path, served: &Served) -> io::Result<()> {
    served.is_read_as_written()?;
    server::write(&folder.join("reservations"), &served.reservations)?;
    server::write(&folder.join("names"), &served.names)
}

/// The route that overlaps with a net; the one to everywhere does not count.
fn taken<'a>(routes: &'a [HostRoute], net: &Net) -> Option<&'a HostRoute> {
    routes.iter().find(|route| route.net.prefix > 0 && route.net.overlaps(net))
}

/// The record in a folder, if there is one. Error: it cannot be read.
fn read(folder: &Path) -> Result<Option<(Record, NetworkDef)>, String> {
    let text = match fs::read(folder.join("record.json")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let record: Record = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let def = NetworkDef::parse_within(&record.xml, Limits::STORED);
    let first = |findings: Vec<Finding>| findings.first().map_or(String::new(), ToString::to_string);
    def.map(|def| Some((record, def))).map_err(first)
}
