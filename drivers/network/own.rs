//! Networks without root: in a user namespace and a network namespace of the user's own, one of each for all of their networks. A
//! process that does nothing else holds them (the holder); the uplink, pasta, brings out what leaves them, with the user's rights.
//!
//! ```text
//!  virtd ─ record ─▶ holder: makes both namespaces, says so, sleeps     virtd ─ record ─▶ pasta: namespaces ◀─▶ the host's network
//!    └─ request ─▶ helper: virtd's own program, gone into the namespaces ─▶ bridge, rules, dnsmasq, taps (`inside`)
//! ```
//!
//! One holder for all, as the host has one network for all: bridges have names of their own, a machine may have cards in several
//! networks, and one uplink serves them. The holder knows nothing of networks, so that it goes on under the next virtd, whichever
//! version that is. Holder and uplink are recorded before they run, and found again by that record.

use super::inside::{self, Answer, Request};
use super::make::{self, Maker};
use super::server;
use crate::host::own_file::{self, replace_json};
use crate::host::process::{Identity, kill};
use crate::host::ready::ready_by;
use crate::host::spawn::{Plan, spawn};
use crate::host::wall;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;
use virt_model::device::Interface;
use virt_model::device::interface::InterfaceKind;
use virt_model::domain::value::Mac;
use virt_model::driver::network::{NetworkError, PartlySeen, PluggedCard, Problem, ProblemToken};
use virt_model::network::NetworkDef;
use virt_model::network::forward::Mode;

/// The argument by which virtd's program is the holder.
pub const HOLDER: &str = "network-holder";
/// Where the holder says that it is ready, or why not.
pub(super) const READY: i32 = 3;
/// What the holder says when it is.
pub(super) const IS_READY: &[u8] = b"ready";

/// Inside, what is asked for names at this address is asked by the uplink of the host's own resolver, which may listen to the host
/// alone.
pub const RESOLVER: &str = "169.254.1.53";

/// How long the holder and the uplink may take to come up: some milliseconds are usual.
const PATIENCE: Duration = Duration::from_secs(30);
/// More than a record has, and more of an uplink's words than are quoted.
const LONGEST: u64 = 4096;

/// What a user's networks are in. Only the folder says what there is: two of these are the same.
#[derive(Clone, Debug)]
pub struct OwnNetwork {
    /// Its records.
    folder: PathBuf,
    /// Those of networks: a [`Maker`]'s.
    networks: PathBuf,
    /// virtd's program.
    program: PathBuf,
}

/// Who holds the namespaces, on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    identity: Identity,
    /// It has said that it is ready.
    ready: bool,
}

/// A holder that lives.
pub struct Holder {
    /// Which process it is.
    pub identity: Identity,
    /// The same, held.
    pub process: OwnedFd,
}

/// Whoever makes or ends holder and uplink does so alone.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(what: &str, error: &io::Error) -> NetworkError {
    NetworkError::Failed(format!("{what}: {error}"))
}

impl OwnNetwork {
    /// That of whoever we are, with its records below `runtime`; `program` is virtd's. Root has the host's networks and none of this.
    pub fn new(runtime: &Path, program: Option<&Path>) -> Option<OwnNetwork> {
        let program = program.filter(|_| !nix::unistd::geteuid().is_root())?.to_owned();
        Some(OwnNetwork { folder: runtime.join("own-network"), networks: runtime.join("networks"), program })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Who holds the namespaces, if somebody does.
    pub fn holder(&self) -> Option<Holder> {
        let record: Record = read(&self.at("holder.json"))?;
        let process = record.identity.open().ok()??;
        record.ready.then_some(Holder { identity: record.identity, process })
    }

    /// The same; there is one when this returns.
    fn hold(&self) -> io::Result<Holder> {
        if let Some(holder) = self.holder() {
            return Ok(holder);
        }
        self.end();
        fs::create_dir_all(&self.folder)?;
        let (ear, mouth) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (record, nowhere) = (self.at("holder.json"), File::options().write(true).open("/dev/null")?);
        let is =
            |identity: &Identity, ready| replace_json(&record, &Record { identity: identity.clone(), ready }, false);
        // Its program may have been replaced since we were started.
        let ours = if self.program.exists() { self.program.as_path() } else { Path::new(inside::OURSELVES) };
        let args = [HOLDER.to_owned()];
        let plan = Plan { gifts: vec![(READY, mouth)], ..Plan::new(ours, &args, &nowhere) };
        let spawned = spawn(plan, |identity| is(identity, false))?;
        let said = heard(&ear, &spawned.fd).and_then(|said| match said.as_slice() {
            IS_READY => Ok(()),
            [] => Err(io::Error::other("the process that is to hold them has ended")),
            why => Err(io::Error::other(String::from_utf8_lossy(why).into_owned())),
        });
        if let Err(error) = said.and_then(|()| is(&spawned.identity, true)) {
            self.end();
            return Err(io::Error::other(format!("namespaces of its own cannot be made: {error}")));
        }
        Ok(Holder { identity: spawned.identity, process: spawned.fd })
    }

    /// The uplink, if it is there.
    pub fn uplink(&self) -> Option<OwnedFd> {
        read::<Identity>(&self.at("uplink.json"))?.open().ok()?
    }

    /// The uplink has come up when this returns; the error ends with its own words.
    fn connect(&self, holder: &Holder) -> io::Result<()> {
        if self.uplink().is_some() {
            return Ok(());
        }
        self.disconnect();
        let none = || io::Error::other("this needs the program pasta (Debian has it in passt)");
        let pasta = pasta().ok_or_else(none)?;
        let (said, number) = (File::create(self.at("uplink.log"))?, self.at("uplink.pid"));
        drop(File::create(&number)?);
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, &number, WatchFlags::CLOSE_WRITE)?;
        let words = ["--foreground", "--quiet", "--stderr", "--config-net", "--no-map-gw", "--dns-forward", RESOLVER];
        // Nothing is let in: guests are reached by nobody but by what they have asked for.
        let closed = ["-t", "none", "-u", "none", "-T", "none", "-U", "none", "--pid"];
        let ends = [number.display().to_string(), holder.identity.pid.to_string()];
        let args: Vec<String> = words.into_iter().chain(closed).map(str::to_owned).chain(ends).collect();
        let record = |identity: &Identity| replace_json(&self.at("uplink.json"), identity, false);
        let spawned = spawn(Plan::new(&pasta, &args, &said), record)?;
        // It writes its number when all is done.
        match ready_by([watch.as_fd(), spawned.fd.as_fd()], Instant::now() + PATIENCE)? {
            [true, _] => return Ok(()),
            [false, true] => {}
            [false, false] => tracing::warn!("pasta does not come up; it is ended"),
        }
        let mut words = String::new();
        File::open(self.at("uplink.log"))?.take(LONGEST).read_to_string(&mut words)?;
        self.disconnect();
        Err(io::Error::other(format!("the uplink (pasta) does not come up: {}", words.trim())))
    }

    fn disconnect(&self) {
        end_recorded(read::<Identity>(&self.at("uplink.json")));
        for file in ["uplink.json", "uplink.pid", "uplink.log"] {
            let _ = fs::remove_file(self.at(file));
        }
    }

    /// Ends uplink and holder; with them goes what is in the namespaces, unless guests hold on to it.
    fn end(&self) {
        self.disconnect();
        end_recorded(read::<Record>(&self.at("holder.json")).map(|record| record.identity));
        let _ = (fs::remove_file(self.at("holder.json")), fs::remove_dir(&self.folder));
    }

    /// Has something done inside. Blocks.
    pub(crate) fn ask(&self, request: &Request) -> Result<(Answer, Vec<OwnedFd>), NetworkError> {
        let gone = || NetworkError::Failed("the process that holds this user's networks has ended".to_owned());
        let holder = self.holder().ok_or_else(gone)?;
        inside::ask(&holder.process, request)
    }

    fn done(&self, request: &Request) -> Result<(), NetworkError> {
        self.ask(request).map(drop)
    }

    /// The one that the host's end of a card is in, if that is not on the host.
    pub fn of_card<'a>(own: Option<&'a OwnNetwork>, card: &Interface) -> Option<&'a OwnNetwork> {
        own.filter(|_| card.kind == InterfaceKind::Network)
    }

    /// Its neighbours, as [`crate::host::neighbours::known`] tells those of the host. Blocks.
    pub fn neighbours(&self) -> Result<Vec<(Mac, IpAddr)>, NetworkError> {
        match self.ask(&Request::Neighbours)? {
            (Answer::Neighbours(known), _) => Ok(known.into_iter().map(|(mac, address)| (Mac(mac), address)).collect()),
            (other, _) => Err(NetworkError::Failed(format!("the answer is {other:?}"))),
        }
    }

    /// As [`Maker::can_start`], when what holds of any host has been looked at.
    pub fn can_start(&self, maker: &Maker, def: &NetworkDef) -> Result<(), NetworkError> {
        match self.holder() {
            Some(_) => self.done(&Request::CanStart { place: maker.place(), xml: def.write() }),
            // What is not there yet will have the host's routes, if it leads out.
            None if def.mode() == Mode::Nat => {
                let unrouted = maker.is_unrouted(def).map(drop);
                unrouted.map_err(|error| failed(&format!("the network '{}'", def.name), &error))
            }
            None => Ok(()),
        }
    }

    /// As [`Maker::start`].
    pub fn start(&self, maker: &Maker, def: &NetworkDef, owner: u32) -> Result<(), NetworkError> {
        let findings = maker.check(def);
        if !findings.is_empty() {
            return Err(NetworkError::Config(findings));
        }
        let _turn = turn();
        let what = format!("the network '{}'", def.name);
        let started = self.come_up(maker, def).map_err(|error| failed(&what, &error));
        let request = Request::Start { place: maker.place(), xml: def.write(), owner };
        let started = started.and_then(|()| self.done(&request));
        if started.is_err() {
            self.rest(maker, Some(def.uuid));
        }
        started
    }

    fn come_up(&self, maker: &Maker, def: &NetworkDef) -> io::Result<()> {
        let holder = self.hold()?;
        if def.mode() == Mode::Nat {
            self.connect(&holder)?;
        }
        let folder = maker.folder(def.uuid);
        fs::create_dir_all(&folder)?;
        replace_json(&folder.join(make::HOLDER), &holder.identity, false)
    }

    /// As [`Maker::stop`].
    pub fn stop(&self, maker: &Maker, uuid: Uuid) -> Result<(), NetworkError> {
        let _turn = turn();
        let stopped = match self.holds(maker, uuid) {
            true => self.done(&Request::Stop { place: maker.place(), uuid }),
            false => Ok(()),
        };
        if stopped.is_ok() {
            self.rest(maker, Some(uuid));
        }
        stopped
    }

    /// Whether who holds the namespaces is who held them when the network was made.
    pub fn holds(&self, maker: &Maker, uuid: Uuid) -> bool {
        self.holder_of(maker, uuid).is_some()
    }

    /// The process that holds what that network is in, if it lives.
    pub fn holder_of(&self, maker: &Maker, uuid: Uuid) -> Option<OwnedFd> {
        let then: Identity = read(&maker.folder(uuid).join(make::HOLDER))?;
        self.holder().filter(|now| now.identity == then).map(|holder| holder.process)
    }

    /// Forgets one that has gone, and ends what no network needs any more. A guest that is in one still keeps the holder: the
    /// next start plugs it in again.
    fn rest(&self, maker: &Maker, gone: Option<Uuid>) {
        gone.iter().for_each(|uuid| forget(&maker.folder(*uuid)));
        let there = maker.there();
        if !there.iter().any(|def| def.mode() == Mode::Nat) {
            self.disconnect();
        }
        if there.is_empty() {
            self.end_unless_held();
        }
    }

    /// A guest that was in a network has ended: it may have been the last that held on to what is no network's any more.
    pub fn is_left(&self) {
        let _turn = turn();
        let is_empty = || fs::read_dir(&self.networks).is_ok_and(|mut all| all.next().is_none());
        if self.holder().is_some() && is_empty() {
            self.end_unless_held();
        }
    }

    /// Ends all, unless a guest is there. Where that cannot be told it is left alone.
    fn end_unless_held(&self) {
        let is_held = || !matches!(self.ask(&Request::HasTaps), Ok((Answer::Is(false), _)));
        if self.holder().is_none() || !is_held() {
            self.end();
        }
    }

    /// As [`Maker::find`].
    pub fn find(&self, maker: &Maker) -> Vec<(NetworkDef, u32)> {
        let _turn = turn();
        for uuid in maker.recorded() {
            if !self.holds(maker, uuid) {
                forget(&maker.folder(uuid));
            }
        }
        let found = match self.holder() {
            None => Vec::new(),
            Some(_) => match self.ask(&Request::Find { place: maker.place() }) {
                Ok((Answer::Found(found), _)) => {
                    found.iter().filter_map(|(xml, owner)| Some((parse(xml)?, *owner))).collect()
                }
                Ok(_) => Vec::new(),
                Err(why) => {
                    tracing::warn!(%why, "the networks that are there cannot be found");
                    return Vec::new();
                }
            },
        };
        self.rest(maker, None);
        if found.iter().any(|(def, _)| def.mode() == Mode::Nat)
            && let Some(holder) = self.holder()
            && let Err(why) = self.connect(&holder)
        {
            tracing::warn!(%why, "guests do not reach the world");
        }
        found
    }

    /// As [`Maker::change`].
    pub fn change(&self, maker: &Maker, def: &NetworkDef) -> Result<(), NetworkError> {
        self.done(&Request::Change { place: maker.place(), xml: def.write() })
    }

    /// As [`Maker::plug`].
    pub fn plug(&self, def: &NetworkDef, cards: &[PluggedCard]) {
        let cards = cards.iter().map(inside::Card::of).collect();
        if let Err(why) = self.done(&Request::Plug { xml: def.write(), cards }) {
            tracing::warn!(network = %def.name, %why, "guests are not plugged in again");
        }
    }

    /// As [`Maker::problems`].
    pub fn problems(&self, maker: &Maker, def: &NetworkDef) -> Result<Vec<Problem>, PartlySeen> {
        let asked = self.ask(&Request::Problems { place: maker.place(), xml: def.write() });
        let mut looked = match asked {
            Ok((Answer::Problems(looked), _)) => looked,
            Ok((other, _)) => Err(PartlySeen::nothing(format!("the answer is {other:?}"))),
            Err(why) => Err(PartlySeen::nothing(why)),
        };
        let (token, is_down) = (ProblemToken::UplinkDown, def.mode() == Mode::Nat && self.uplink().is_none());
        let sentence =
            "pasta, the uplink, has ended: guests do not reach the world; destroy the network and start it again";
        PartlySeen::add(&mut looked, token, is_down.then(|| Problem { token, sentence: sentence.to_owned() }));
        looked
    }

    /// Why there can be none on this host, if so, for a network of that mode.
    pub fn obstacle(mode: Mode) -> Option<String> {
        let remedy = "use <interface type='user'>, or the system bus";
        if !matches!(mode, Mode::Nat | Mode::Isolated) {
            let why = "a network of this mode is the host's, and needs root: of those without root there are 'nat' and isolated ones";
            return Some(format!("{why}; {remedy}"));
        }
        if let Some(why) = wall::obstacle() {
            return Some(format!(
                "networks without root need user namespaces, which this host does not let have: {why}; {remedy}"
            ));
        }
        if let Err(why) = File::options().read(true).write(true).open("/dev/net/tun") {
            return Some(format!("networks need /dev/net/tun, which cannot be opened: {why}; {remedy}"));
        }
        let missing = mode == Mode::Nat && pasta().is_none();
        missing.then(|| {
            format!("networks of mode 'nat' without root need the program pasta (Debian has it in passt); {remedy}")
        })
    }
}

/// Ends the server of a network whose namespaces have gone, and removes what is known of it.
fn forget(folder: &Path) {
    server::stop(folder);
    let _ = fs::remove_dir_all(folder);
}

fn parse(xml: &str) -> Option<NetworkDef> {
    NetworkDef::parse_within(xml, virt_model::xml::Limits::STORED).ok()
}

fn read<T: for<'a> Deserialize<'a>>(file: &Path) -> Option<T> {
    serde_json::from_slice(&own_file::read(file, LONGEST).ok()?).ok()
}

fn end_recorded(identity: Option<Identity>) {
    if let Some(Ok(Some(process))) = identity.map(|identity| identity.open()) {
        kill(&process);
    }
}

/// Where pasta is.
fn pasta() -> Option<PathBuf> {
    ["/usr/bin/pasta", "/usr/local/bin/pasta", "/bin/pasta"].map(PathBuf::from).into_iter().find(|file| file.is_file())
}

/// All that a process says until it ends or closes its end.
fn heard(ear: &OwnedFd, process: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut ear = File::from(ear.try_clone()?);
    let (mut said, until) = (Vec::new(), Instant::now() + PATIENCE);
    loop {
        let mut some = [0; 512];
        match ready_by([ear.as_fd(), process.as_fd()], until)? {
            [false, false] => return Err(io::Error::other("it says nothing")),
            [false, true] => return Ok(said),
            [true, _] => match ear.read(&mut some)? {
                0 => return Ok(said),
                read => said.extend_from_slice(&some[..read]),
            },
        }
    }
}
