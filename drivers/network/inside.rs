//! What is done in the namespaces of a user's own network, and how virtd has it done: by its own program, which goes into them
//! before it has threads, as the kernel wants it, does one thing, and ends. It takes its request from a socket, answers by it, and
//! ends with virtd: what it was at then is undone by the next one, as after any other death.

use super::foreign::Ruleset;
use super::link;
use super::make::{Maker, Namespace};
use super::own::{HOLDER, IS_READY, READY};
use crate::host::apart;
use crate::host::filter::{self, FilterPlan};
use crate::host::neighbours;
use crate::host::tap::{self, Rate, TapPlan, VlanPlan};
use crate::host::wall;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Shutdown};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;
use uuid::Uuid;
use virt_model::driver::network::{NetworkError, PartlySeen, PluggedCard, Problem};
use virt_model::network::NetworkDef;
use virt_model::xml::Limits;

/// The argument by which virtd's program is such a helper.
const HELPER: &str = "network-helper";
/// The program that we are, whatever stands in its place by now.
pub(crate) const OURSELVES: &str = "/proc/self/exe";
/// How long it may take: each program that it runs has a limit of its own, far below that.
const PATIENCE: Duration = Duration::from_secs(180);
/// The most descriptors that it gives: a tap has 16 queues at most.
const MOST_ENDS: usize = 16;

/// Where networks are kept on disk: what a [`Maker`] is made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    /// As in [`Maker`].
    pub runtime: PathBuf,
    /// The same.
    pub leases: PathBuf,
    /// The same.
    pub teller: Option<PathBuf>,
}

/// What is to be done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// [`Maker::can_start`].
    CanStart { place: Place, xml: String },
    /// [`Maker::start`].
    Start { place: Place, xml: String, owner: u32 },
    /// [`Maker::stop`].
    Stop { place: Place, uuid: Uuid },
    /// [`Maker::find`].
    Find { place: Place },
    /// [`Maker::change`].
    Change { place: Place, xml: String },
    /// [`Maker::problems`].
    Problems { place: Place, xml: String },
    /// [`link::plug`].
    Plug { xml: String, cards: Vec<Card> },
    /// [`link::has_taps`].
    HasTaps,
    /// [`tap::open`].
    Tap(TapPlan),
    /// [`filter::sweep`].
    SweepFilters,
    /// [`tap::change_plug`].
    ChangePlug { device: String, plan: TapPlan },
    /// [`filter::change`].
    ChangeFilter { device: String, plan: Option<FilterPlan> },
    /// [`tap::change_limit`].
    ChangeLimit { device: String, rate: Option<Rate>, leaving: bool },
    /// [`tap::limit_of`].
    LimitOf { device: String, leaving: bool },
    /// [`neighbours::known`].
    Neighbours,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// It is done.
    Done,
    /// Whether it is so.
    Is(bool),
    /// Each network's document and owner.
    Found(Vec<(String, u32)>),
    /// What [`Maker::problems`] says.
    Problems(Result<Vec<Problem>, PartlySeen>),
    /// How a device is limited.
    Limit(Option<Rate>),
    /// Hardware address and address of each neighbour.
    Neighbours(Vec<([u8; 6], IpAddr)>),
    /// Why it was not done.
    Failed(String),
}

/// As [`PluggedCard`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Card {
    /// Its end on the host.
    pub end: String,
    /// It does not see others that are isolated.
    pub isolated: bool,
    /// The VLANs that it is in.
    pub vlans: Vec<VlanPlan>,
}

impl Card {
    /// The same card.
    pub fn of(card: &PluggedCard) -> Card {
        let vlans = card.vlan.as_ref().map(VlanPlan::all_of).unwrap_or_default();
        Card { end: card.end.clone(), isolated: card.isolated, vlans }
    }
}

/// Has something done in the namespaces of that process. Blocks.
pub(crate) fn ask(holder: &OwnedFd, request: &Request) -> Result<(Answer, Vec<OwnedFd>), NetworkError> {
    match exchange(holder, request) {
        Ok((Answer::Failed(why), _)) => Err(NetworkError::Failed(why)),
        Ok(answered) => Ok(answered),
        Err(error) => Err(NetworkError::Failed(format!("nothing can be done in this user's own network: {error}"))),
    }
}

fn exchange(holder: &OwnedFd, request: &Request) -> io::Result<(Answer, Vec<OwnedFd>)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(PATIENCE))?;
    let mut command = Command::new(OURSELVES);
    command.arg(HELPER).stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
    let holder = holder.as_raw_fd();
    // SAFETY: system calls only, on a descriptor that stays open until this returns.
    unsafe { command.pre_exec(move || enter(holder)) };
    let mut child = apart::start(&mut command)?;
    // With it goes our copy of its end.
    drop(command);
    let answered = converse(&ours, request);
    if answered.is_err() {
        child.kill()?;
    }
    child.wait()?;
    answered
}

fn converse(mut line: &UnixStream, request: &Request) -> io::Result<(Answer, Vec<OwnedFd>)> {
    line.write_all(&serde_json::to_vec(request)?)?;
    line.shutdown(Shutdown::Write)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_ENDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut first = [0; 1];
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(line, &mut [IoSliceMut::new(&mut first)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    });
    if received?.bytes == 0 {
        return Err(io::Error::other("its helper has ended early"));
    }
    let ends = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(ends) => Some(ends),
        _ => None,
    });
    let ends: Vec<OwnedFd> = ends.flatten().collect();
    let mut text = Vec::new();
    line.read_to_end(&mut text)?;
    Ok((serde_json::from_slice(&text)?, ends))
}

/// Goes into the namespaces of that process, with the rights there that networks need, also for what is run then: who is no root
/// there would lose them all. System calls only.
fn enter(holder: RawFd) -> io::Result<()> {
    let wanted = CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW | CapabilitySet::NET_BIND_SERVICE;
    let both = libc::CLONE_NEWUSER | libc::CLONE_NEWNET;
    // SAFETY: changes the namespaces of this process, which has one thread.
    if unsafe { libc::setns(holder, both) } != 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: wanted, permitted: wanted, inheritable: wanted },
    )?;
    for right in [CapabilitySet::NET_ADMIN, CapabilitySet::NET_RAW, CapabilitySet::NET_BIND_SERVICE] {
        rustix::thread::configure_capability_in_ambient_set(right, true)?;
    }
    Ok(())
}

/// What virtd's program does where it is a holder or a helper; nothing if it is virtd. To be called before there are threads.
pub fn run() -> Option<ExitCode> {
    match std::env::args_os().nth(1)?.to_str()? {
        HOLDER => Some(hold()),
        HELPER => Some(serve()),
        _ => None,
    }
}

/// Makes the namespaces, says so, and sleeps until it is killed.
fn hold() -> ExitCode {
    // SAFETY: virtd gave that descriptor, which is nobody else's.
    let mut virtd = unsafe { File::from_raw_fd(READY) };
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    let made = wall::own_network().and_then(|()| Ok(rustix::thread::set_capabilities(None, none)?));
    let said = match &made {
        Ok(()) => virtd.write_all(IS_READY),
        Err(why) => virtd.write_all(why.to_string().as_bytes()),
    };
    drop(virtd);
    if made.is_err() || said.is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        // SAFETY: sleeps until there is a signal.
        unsafe { libc::pause() };
    }
}

fn serve() -> ExitCode {
    match serve_one() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("virtd: a helper of the user's own network: {why}");
            ExitCode::FAILURE
        }
    }
}

fn serve_one() -> io::Result<()> {
    let line = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut text = Vec::new();
    (&line).read_to_end(&mut text)?;
    let request: Request = serde_json::from_slice(&text)?;
    let watched = line.try_clone()?;
    std::thread::Builder::new().name("watch".into()).spawn(move || end_with(&watched))?;
    let (answer, ends) = match perform(request) {
        Ok(done) => done,
        Err(why) => (Answer::Failed(why.to_string()), Vec::new()),
    };
    let held: Vec<BorrowedFd<'_>> = ends.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_ENDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !held.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&held)) {
        return Err(io::Error::other("too many descriptors"));
    }
    sendmsg(&line, &[IoSlice::new(b"!")], &mut ancillary, SendFlags::NOSIGNAL)?;
    (&line).write_all(&serde_json::to_vec(&answer)?)
}

/// Waits for virtd's end, and ends us then: nobody is to be at work here but who works for the virtd that there is.
fn end_with(line: &UnixStream) {
    let hung_up = |line: &UnixStream| {
        let mut end = [PollFd::new(line, PollFlags::empty())];
        matches!(poll(&mut end, None), Ok(1..)) && end[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    };
    while !hung_up(line) {}
    // SAFETY: ends this process at once.
    unsafe { libc::_exit(1) }
}

type Performed = Result<(Answer, Vec<OwnedFd>), NetworkError>;

fn perform(request: Request) -> Performed {
    let done = |()| (Answer::Done, Vec::new());
    let only = |answer: Answer| (answer, Vec::new());
    let failed = |error: io::Error| NetworkError::Failed(error.to_string());
    match request {
        Request::CanStart { place, xml } => maker(place).can_start(&parse(&xml)?).map(done),
        Request::Start { place, xml, owner } => maker(place).start(&parse(&xml)?, owner).map(done),
        Request::Stop { place, uuid } => maker(place).stop(uuid).map(done),
        Request::Find { place } => {
            let found = maker(place).find().into_iter().map(|(def, owner)| (def.write(), owner));
            Ok(only(Answer::Found(found.collect())))
        }
        Request::Change { place, xml } => maker(place).change(&parse(&xml)?).map(done),
        Request::Problems { place, xml } => {
            let looked = maker(place).problems(&parse(&xml)?, &Ruleset::default());
            Ok(only(Answer::Problems(looked)))
        }
        Request::Plug { xml, cards } => {
            link::plug(&parse(&xml)?, &cards);
            Ok(done(()))
        }
        Request::HasTaps => link::has_taps().map(|is| only(Answer::Is(is))).map_err(failed),
        Request::Tap(plan) => tap::open(&plan).map(|ends| (Answer::Done, ends)).map_err(failed),
        Request::SweepFilters => filter::sweep().map(done).map_err(failed),
        Request::ChangePlug { device, plan } => tap::change_plug(&device, &plan).map(done).map_err(failed),
        Request::ChangeFilter { device, plan } => filter::change(&device, plan.as_ref()).map(done).map_err(failed),
        Request::ChangeLimit { device, rate, leaving } => {
            tap::change_limit(&device, rate, leaving).map(done).map_err(failed)
        }
        Request::LimitOf { device, leaving } => {
            tap::limit_of(&device, leaving).map(|held| only(Answer::Limit(held))).map_err(failed)
        }
        Request::Neighbours => {
            let known = neighbours::known().map_err(failed)?;
            Ok(only(Answer::Neighbours(known.into_iter().map(|(mac, address)| (mac.0, address)).collect())))
        }
    }
}

fn maker(place: Place) -> Maker {
    let Place { runtime, leases, teller } = place;
    Maker { runtime, leases, teller, namespace: Namespace::Inside, steps_left: None }
}

fn parse(xml: &str) -> Result<NetworkDef, NetworkError> {
    NetworkDef::parse_within(xml, Limits::STORED).map_err(NetworkError::Config)
}
