//! What the agent in a guest is asked. Whoever waits for one waits for it alone: nothing that is done to the machine does, but what
//! freezes and thaws file systems, which a snapshot may be about to do.
//!
//! ```text
//!  FreezeFilesystems ─▶ kept that it is frozen ─▶ frozen ─▶ ThawFilesystems, or its caller leaves, or virtd ends ─▶ thawed
//!                                                                            └─ the next virtd finds it kept ──────────┘
//! ```

use super::Domain;
use super::change::cancel_when_gone;
use super::found::departed;
use super::state::Guest;
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::frames::Changeable as _;
use crate::job::Ticket;
use crate::lock::lock;
use crate::verb::{self, Verb};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;
use virt_model::driver::agent::{CardAddresses, GuestAgent, GuestFacts, InfoGroup, Program, Sleep};
use virt_model::xml::shorten;

/// The longest command for an agent, in bytes.
const LONGEST_COMMAND: usize = 1 << 20;
/// How long an agent may take for a command, if nothing else is said.
const USUAL: Duration = Duration::from_secs(20);
/// How long it may take at most.
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// So many words a program is run with at most, its environment among it, and so many bytes.
const MOST_WORDS: usize = 1024;
const LONGEST_COMMAND_LINE: usize = 128 << 10;
/// So many mount points are named at most.
const MOST_MOUNTPOINTS: usize = 64;
/// The longest mount point, user's name or password, in bytes.
const LONGEST_TEXT: usize = 4096;
/// How long virtd waits, when it ends, until file systems are thawed.
const LAST_THAW: Duration = Duration::from_secs(5);

/// The network cards of a guest as somebody knows them: the guest's name of one, its hardware address, the host's end, addresses
/// with the lengths of their prefixes.
pub type InterfaceAddresses = Vec<(String, String, String, Vec<(String, u32)>)>;

impl Domain {
    /// Gives the agent a command in its own protocol, and returns what it answers.
    /// Errors: `InvalidArgument` for one that is none, or too long; `AgentFailed` with the agent's own error.
    pub async fn agent_command(&self, caller: &Caller, command: &str, timeout_usec: Option<u64>) -> Result<String> {
        let verb = &verb::AGENT_COMMAND;
        self.beside(caller, verb, async {
            if command.len() > LONGEST_COMMAND {
                let text = format!("a command for an agent has at most {LONGEST_COMMAND} bytes, not {}", command.len());
                return Err(Error::InvalidArgument(text));
            }
            let within = patience(timeout_usec)?;
            self.told(verb, self.agent(verb)?.command(command, within).await)
        })
        .await
    }

    /// The addresses of its cards, as its agent, the host's neighbours or a network's leases tell them.
    /// Error: `InvalidArgument` for another source.
    pub async fn interface_addresses(&self, caller: &Caller, source: &str) -> Result<InterfaceAddresses> {
        let verb = &verb::GET_ADDRESSES;
        self.beside(caller, verb, async {
            let guest = self.guest()?;
            let cards = match source {
                "agent" => {
                    let _place = guest.agent_readers.take(&caller.uid).await;
                    self.told(verb, self.agent(verb)?.addresses().await)?
                }
                "arp" => self.told(verb, guest.instance.neighbours(&guest.live).await)?,
                "lease" => self.leased(&guest.live),
                other => {
                    let text = format!("there is no source '{}'; there are agent, arp, lease", shorten(other));
                    return Err(Error::InvalidArgument(text));
                }
            };
            Ok(with_targets(&guest.live, cards))
        })
        .await
    }

    /// What the agent tells of its guest, by groups; of none named, all that it can.
    /// Error: `InvalidArgument` for a word that is no group's.
    pub async fn guest_info(&self, caller: &Caller, groups: &[String]) -> Result<GuestFacts> {
        let verb = &verb::GET_GUEST_INFO;
        self.beside(caller, verb, async {
            let groups = named(groups)?;
            let _place = self.guest()?.agent_readers.take(&caller.uid).await;
            self.told(verb, self.agent(verb)?.info(&groups).await)
        })
        .await
    }

    /// What the guest's clock says, in microseconds since the epoch.
    pub async fn guest_time(&self, caller: &Caller) -> Result<u64> {
        let verb = &verb::GET_TIME;
        self.beside(caller, verb, async {
            let _place = self.guest()?.agent_readers.take(&caller.uid).await;
            self.told(verb, self.agent(verb)?.time().await)
        })
        .await
    }

    /// Sets the guest's clock, in microseconds since the epoch; `None`: to that of the machine.
    pub async fn set_guest_time(&self, caller: &Caller, usec: Option<u64>) -> Result<()> {
        let verb = &verb::SET_TIME;
        self.beside(caller, verb, async { self.told(verb, self.agent(verb)?.set_time(usec).await) }).await
    }

    /// Sets the password of one of the guest's users; `crypted`: what is given is its hash.
    pub async fn set_user_password(&self, caller: &Caller, user: &str, password: &str, crypted: bool) -> Result<()> {
        let verb = &verb::SET_USER_PASSWORD;
        self.beside(caller, verb, async {
            if user.is_empty() || user.len() > LONGEST_TEXT || password.len() > LONGEST_TEXT {
                let text =
                    format!("a user has a name, and neither that nor the password more than {LONGEST_TEXT} bytes");
                return Err(Error::InvalidArgument(text));
            }
            self.told(verb, self.agent(verb)?.set_password(user, password, crypted).await)
        })
        .await
    }

    /// Freezes the guest's file systems, those mounted there or all, until they are thawed or the caller leaves the bus; says how
    /// many. Error: `OperationInvalid` while some are frozen.
    pub async fn freeze(self: &Arc<Self>, caller: &Caller, mountpoints: Vec<String>) -> Result<u32> {
        let verb = &verb::FREEZE;
        self.short(caller, verb, async {
            if mountpoints.len() > MOST_MOUNTPOINTS || mountpoints.iter().any(|place| place.len() > LONGEST_TEXT) {
                let text = format!("{MOST_MOUNTPOINTS} mount points of {LONGEST_TEXT} bytes are named at most");
                return Err(Error::InvalidArgument(text));
            }
            let (domain, guest, until) = (self.clone(), self.guest()?, caller.departed.clone());
            // In a task: a caller that leaves meanwhile leaves nothing frozen.
            let freezing = tokio::spawn(async move { domain.freeze_until(guest, &mountpoints, until).await });
            freezing.await.unwrap_or_else(|error| Err(Error::Internal(error.to_string())))
        })
        .await
    }

    /// Thaws them; says how many.
    pub async fn thaw(self: &Arc<Self>, caller: &Caller) -> Result<u32> {
        let verb = &verb::THAW;
        self.short(caller, verb, async {
            let thawed = self.told(verb, self.agent(verb)?.thaw().await)?;
            self.is_thawed();
            Ok(thawed)
        })
        .await
    }

    /// Gives back to the storage what the guest's file systems do not use, in pieces of that many bytes at least; says of how many
    /// file systems.
    pub async fn trim(&self, caller: &Caller, minimum: u64) -> Result<u32> {
        let verb = &verb::TRIM;
        self.beside(caller, verb, async { self.told(verb, self.agent(verb)?.trim(minimum).await) }).await
    }

    /// Runs a program in the guest. A job, which ends with the program, when what it printed has been written; it is not ended with the job, as agents have no way to do so.
    /// The ticket comes with its exit status, which is there when the job has succeeded.
    pub async fn guest_exec(
        self: &Arc<Self>,
        caller: &Caller,
        options: ExecOptions,
    ) -> Result<(Ticket, Arc<OnceLock<i32>>)> {
        let verb = &verb::GUEST_EXEC;
        self.accepted(caller, verb, async {
            self.allow(caller, verb.action).await?;
            self.applies(verb)?;
            options.check()?;
            let agent = self.agent(verb)?;
            let cancel = CancellationToken::new();
            let (job, ticket) = self.shared.jobs.open(caller, self.reference(), verb.word, cancel.clone())?;
            if options.cancel_on_disconnect {
                cancel_when_gone(caller, &cancel);
            }
            let status = Arc::new(OnceLock::new());
            let (domain, caller, ended) = (self.clone(), caller.clone(), status.clone());
            tokio::spawn(async move {
                let begun = Instant::now();
                job.running();
                let run = within(options.timeout_usec, agent.run(options.program));
                let cancelled = job.cancel_token().clone();
                let result = match cancelled.run_until_cancelled(run).await {
                    Some(status) => domain.told(verb, status).map(|status| _ = ended.set(status)),
                    None => Err(Error::Cancelled(
                        "nobody waits for the guest's program any more; if it runs it goes on".to_owned(),
                    )),
                };
                domain.log(&caller, verb, begun, result.as_ref().err());
                job.finish(result);
            });
            Ok((ticket, status))
        })
        .await
    }

    /// Asks the guest to sleep. Returns when it has been asked. Error: `InvalidArgument` for another target.
    pub async fn suspend_guest(&self, caller: &Caller, target: &str) -> Result<()> {
        let verb = &verb::SUSPEND_GUEST;
        self.beside(caller, verb, async {
            let how = match target {
                "mem" => Sleep::Memory,
                "disk" => Sleep::Disk,
                "hybrid" => Sleep::Hybrid,
                other => {
                    let text = format!("a guest sleeps in mem, disk or hybrid, not in '{}'", shorten(other));
                    return Err(Error::InvalidArgument(text));
                }
            };
            self.told(verb, self.agent(verb)?.sleep(how).await)?;
            // One that sleeps already is told to.
            self.all_told().await;
            Ok(())
        })
        .await
    }

    /// Refuses to freeze what is frozen, and to keep the memory of such a guest: nobody would thaw what goes on from that.
    pub(super) fn is_not_frozen(&self) -> Result<()> {
        let frozen =
            self.guest().ok().and_then(|guest| guest.instance.agent().ok()).is_some_and(|agent| agent.is_frozen());
        match frozen {
            true => Err(Error::OperationInvalid(format!(
                "file systems of domain '{}' are frozen: thaw them first (ThawFilesystems)",
                self.name()
            ))),
            false => Ok(()),
        }
    }

    /// Its hypervisor says that a channel was opened or closed, that of its agent perhaps.
    pub(super) fn ports_changed(&self) {
        self.commit_report(|_| Vec::new());
    }

    /// Thaws what is frozen of a guest that was found: whoever had it frozen is gone with the virtd that they asked.
    pub(super) fn thaws_as_found(self: &Arc<Self>, guest: &Guest) {
        if let Ok(agent) = guest.instance.agent()
            && agent.is_frozen()
        {
            self.thaws_when(guest.id, agent, departed());
        }
    }

    /// Thaws what is frozen, as virtd ends; the next one does, where that takes too long.
    pub(crate) async fn thaws_at_the_end(&self) {
        let frozen = lock(&self.state).thawed.is_some();
        if let Some(agent) = self.guest().ok().and_then(|guest| guest.instance.agent().ok()).filter(|_| frozen) {
            match tokio::time::timeout(LAST_THAW, agent.thaw()).await {
                Ok(Ok(_)) => self.is_thawed(),
                _ => tracing::warn!(uuid = %self.uuid, "its file systems stay frozen until virtd runs again"),
            }
        }
    }

    async fn freeze_until(
        self: Arc<Self>,
        guest: Guest,
        mountpoints: &[String],
        caller: CancellationToken,
    ) -> Result<u32> {
        let verb = &verb::FREEZE;
        let agent = self.told(verb, guest.instance.agent())?;
        let frozen = agent.freeze(mountpoints).await;
        let ours = !matches!(frozen, Err(DriverError::Refused(_))) && agent.is_frozen();
        if ours {
            // What was begun and did not come to its end is undone.
            let until = if frozen.is_ok() { caller } else { departed() };
            self.thaws_when(guest.id, agent, until);
        }
        self.told(verb, frozen)
    }

    /// Thaws the guest `id` when its caller has departed, if nobody does before.
    fn thaws_when(self: &Arc<Self>, id: u32, agent: Arc<dyn GuestAgent>, departed: CancellationToken) {
        let thawed = CancellationToken::new();
        lock(&self.state).thawed = Some(thawed.clone());
        let domain = self.clone();
        tokio::spawn(async move {
            let left = async {
                departed.cancelled().await;
                match agent.thaw_at_last().await {
                    Ok(()) => {
                        domain.is_thawed();
                        tracing::info!(uuid = %domain.uuid, name = domain.name(), "its file systems are thawed, as nobody is left who would");
                    }
                    Err(error) => tracing::debug!(uuid = %domain.uuid, %error, "nothing is thawed any more"),
                }
            };
            tokio::select! {
                _ = thawed.run_until_cancelled(left) => {}
                () = domain.until(|state| !state.runs(id)) => {}
            }
        });
    }

    fn is_thawed(&self) {
        if let Some(thawed) = lock(&self.state).thawed.take() {
            thawed.cancel();
        }
    }

    /// What the networks that it is in have leased to its cards.
    fn leased(&self, live: &DomainDef) -> Vec<CardAddresses> {
        let mut cards = Vec::new();
        for card in &live.devices.interfaces {
            let (Some(mac), Some(named)) = (card.mac(), card.network()) else { continue };
            let leases = self.shared.plugs.leases(named);
            let own = leases.iter().filter(|lease| lease.mac == Some(mac));
            let addresses: Vec<_> = own.map(|lease| (lease.address.to_string(), u32::from(lease.prefix))).collect();
            if !addresses.is_empty() {
                cards.push(CardAddresses { name: String::new(), mac: mac.to_string(), addresses });
            }
        }
        cards
    }

    fn agent(&self, verb: &Verb) -> Result<Arc<dyn GuestAgent>> {
        self.told(verb, self.guest()?.instance.agent())
    }

    fn told<T>(&self, verb: &Verb, told: std::result::Result<T, DriverError>) -> Result<T> {
        told.map_err(|error| Error::from_driver(&self.name(), verb.word, error))
    }
}

/// Each card with the host's end of it, by its hardware address.
fn with_targets(live: &DomainDef, cards: Vec<CardAddresses>) -> InterfaceAddresses {
    let target = |mac: &str| {
        let card = live.devices.interfaces.iter().find(|card| card.mac().is_some_and(|own| own.to_string() == mac))?;
        card.target.as_ref()?.dev.clone()
    };
    let each = cards.into_iter().map(|card| {
        let target = target(&card.mac).unwrap_or_default();
        (card.name, card.mac, target, card.addresses)
    });
    each.collect()
}

/// What is to be run in a guest, and how.
#[derive(Debug, Default)]
pub struct ExecOptions {
    /// The program.
    pub program: Program,
    /// How long it is waited for; not given: as long as it takes.
    pub timeout_usec: Option<u64>,
    /// It is not waited for any more when the caller leaves the bus.
    pub cancel_on_disconnect: bool,
}

impl ExecOptions {
    fn check(&self) -> Result<()> {
        let refuse = |why: String| Err(Error::InvalidArgument(why));
        let Program { argv, env, .. } = &self.program;
        if argv.first().is_none_or(String::is_empty) {
            return refuse("there is no program to be run".to_owned());
        }
        if let Some(word) = env.iter().find(|word| word.find('=').is_none_or(|at| at == 0)) {
            return refuse(format!("env has a NAME=value each, not '{}'", shorten(word)));
        }
        let words = || argv.iter().chain(env);
        if words().count() > MOST_WORDS || words().map(String::len).sum::<usize>() > LONGEST_COMMAND_LINE {
            let most = format!("{MOST_WORDS} words and {LONGEST_COMMAND_LINE} bytes");
            return refuse(format!("a program is run with at most {most}, its environment among it"));
        }
        if self.timeout_usec == Some(0) {
            return refuse("timeout-usec is at least 1".to_owned());
        }
        Ok(())
    }
}

/// Waits for a program, for so long at most.
async fn within<T>(
    usec: Option<u64>,
    run: impl Future<Output = std::result::Result<T, DriverError>>,
) -> std::result::Result<T, DriverError> {
    let Some(usec) = usec else { return run.await };
    let late =
        |_| Err(DriverError::TimedOut("the program has not come to its end in time; if it runs it goes on".to_owned()));
    tokio::time::timeout(Duration::from_micros(usec), run).await.unwrap_or_else(late)
}

/// How long an agent may take.
fn patience(usec: Option<u64>) -> Result<Duration> {
    let within = usec.map_or(USUAL, Duration::from_micros);
    if within.is_zero() || within > LONGEST_WAIT {
        let most = LONGEST_WAIT.as_micros();
        return Err(Error::InvalidArgument(format!("timeout-usec is 1 to {most}, not {}", within.as_micros())));
    }
    Ok(within)
}

/// The groups of these words.
fn named(words: &[String]) -> Result<Vec<InfoGroup>> {
    let mut groups = Vec::new();
    for word in words {
        match InfoGroup::ALL.iter().find(|group| group.as_str() == word) {
            Some(group) if groups.contains(group) => {}
            Some(group) => groups.push(*group),
            None => {
                let known: Vec<_> = InfoGroup::ALL.iter().map(|group| group.as_str()).collect();
                let text = format!("there is no group '{}'; there are {}", shorten(word), known.join(", "));
                return Err(Error::InvalidArgument(text));
            }
        }
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_times_are_what_they_can_be() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        assert_eq!(named(&words(&["time-zone", "os", "os"])).unwrap(), [InfoGroup::TimeZone, InfoGroup::Os]);
        let why = named(&words(&["os", "colour"])).unwrap_err().to_string();
        let known = "os, hostname, users, time-zone, file-systems, disks, interfaces, load";
        assert_eq!(why, format!("there is no group 'colour'; there are {known}"));
        assert_eq!((patience(None).unwrap(), patience(Some(7)).unwrap()), (USUAL, Duration::from_micros(7)));
        assert!(patience(Some(0)).is_err() && patience(Some(600_000_001)).is_err());
    }

    #[test]
    fn a_program_is_run_with_what_it_can_be() {
        let options = |argv: &[&str], env: &[&str]| {
            let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
            let program = Program { argv: words(argv), env: words(env), ..Program::default() };
            ExecOptions { program, ..ExecOptions::default() }
        };
        options(&["/bin/true", ""], &["A=", "B=c=d"]).check().expect("it can");
        let long = "x".repeat(LONGEST_COMMAND_LINE);
        for (options, word) in [
            (options(&[], &[]), "no program"),
            (options(&[""], &[]), "no program"),
            (options(&["a"], &["=b"]), "'=b'"),
            (options(&["a"], &["b"]), "'b'"),
            (options(&["a", &long], &[]), "131072"),
            (options(&["a"; MOST_WORDS + 1], &[]), "1024"),
            (ExecOptions { timeout_usec: Some(0), ..options(&["a"], &[]) }, "timeout-usec"),
        ] {
            let why = options.check().expect_err(word).to_string();
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn a_card_is_known_by_its_hardware_address() {
        let text = "<domain type='test'><name>d</name><memory>1</memory><devices><interface type='bridge'>\
                    <mac address='52:54:00:00:00:01'/><source bridge='b'/><target dev='tap0'/></interface></devices></domain>";
        let live = DomainDef::parse(text).expect("a machine");
        let card = |mac: &str| CardAddresses { mac: mac.to_owned(), ..CardAddresses::default() };
        let told = with_targets(&live, vec![card("52:54:00:00:00:01"), card("52:54:00:00:00:02"), card("")]);
        assert_eq!(told.iter().map(|one| one.2.as_str()).collect::<Vec<_>>(), ["tap0", "", ""]);
    }
}
