//! Statistics: numbers of a machine at a moment, which cost whoever asks a moment only.
//!
//! ```text
//!  ask ─▶ each group: is it being sampled? ──no──▶ a task asks the driver ─▶ what is last known
//!                            └─ yes: wait for that one      (as long as it takes)      ▲
//!  ask ◀── what is last known, after PATIENCE at the latest ───────────────────────────┘
//! ```
//!
//! A group of a guest is sampled by one task at a time, whoever asks, and nothing is sampled when nobody does. A hypervisor that
//! does not answer keeps the one task, and who asks gets what it last answered with the time of that.

use super::Domain;
use crate::authz::{Action, Answer, Caller};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::stored::StoredDef;
use crate::time::now_usec;
use crate::verb::{self, Verb};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use virt_model::domain::DomainDef;
use virt_model::driver::stats::{DiskStats, GroupStats, StatGroup, StatQuestion};
use virt_model::driver::{DriverError, Instance};
use virt_model::state::{DomainState, StateReason};
use virt_model::xml::shorten;

/// How long an answer is waited for, from when it was first asked for; a healthy hypervisor needs some milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// The word of the one group that no driver is asked for.
const STATE: &str = "state";
/// How much longer than others a group is waited for whose numbers take as long as it is looked on.
const LOOKED_ON: Duration = Duration::from_secs(2);
/// How old such numbers may always be: whoever may read asks for them, and looking on costs the guest time.
const LOOKED_ON_LATELY: Duration = Duration::from_secs(10);

/// The groups that are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatsOptions {
    state: bool,
    groups: Vec<StatGroup>,
    /// They were not named: what cannot be had is left out.
    usual: bool,
    /// Sizes of the disks of a machine that is off are wanted, too.
    at_rest: bool,
    /// Numbers that are no older will do.
    recent: Duration,
    /// How long an answer is waited for.
    patience: Duration,
}

impl Default for StatsOptions {
    /// Those that cost next to nothing.
    fn default() -> StatsOptions {
        let costly = |group: &StatGroup| *group == StatGroup::Iothreads || group.is_looked_on();
        let groups = StatGroup::ALL.iter().copied().filter(|group| !costly(group)).collect();
        StatsOptions { groups, ..StatsOptions::NONE }
    }
}

impl StatsOptions {
    const NONE: StatsOptions = StatsOptions {
        state: true,
        groups: Vec::new(),
        usual: true,
        at_rest: true,
        recent: Duration::ZERO,
        patience: PATIENCE,
    };

    /// The same of a guest; of a machine that is off its state alone. What cannot be had is left out.
    pub(crate) fn while_it_runs(self) -> StatsOptions {
        StatsOptions { at_rest: false, usual: true, ..self }
    }

    /// The same, asked for again and again: what was sampled lately for somebody else will do, and what is not answered by the
    /// next time is not waited for.
    pub(crate) fn each(self, interval: Duration) -> StatsOptions {
        StatsOptions { recent: interval / 4, patience: PATIENCE.min(interval / 2), ..self }
    }

    /// Those of these words; of none, what is usual. Error: `InvalidArgument` for a word that is no group's.
    pub fn named(words: &[String]) -> Result<StatsOptions> {
        if words.is_empty() {
            return Ok(StatsOptions::default());
        }
        let mut wanted = StatsOptions { state: false, usual: false, ..StatsOptions::NONE };
        for word in words {
            match StatGroup::ALL.iter().find(|group| group.as_str() == word) {
                Some(group) if wanted.groups.contains(group) => {}
                Some(group) => wanted.groups.push(*group),
                None if word == STATE => wanted.state = true,
                None => {
                    let known: Vec<&str> =
                        [STATE].into_iter().chain(StatGroup::ALL.iter().map(|group| group.as_str())).collect();
                    let text = format!("there is no group '{}'; there are {}", shorten(word), known.join(", "));
                    return Err(Error::InvalidArgument(text));
                }
            }
        }
        Ok(wanted)
    }
}

/// Numbers of a machine. A group that is not known, or that a machine does not have while it is off, is not there.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Nothing in it is older than this, in microseconds since the epoch.
    pub sampled_at_usec: u64,
    /// What it does, and why.
    pub state: Option<(DomainState, StateReason)>,
    /// The groups.
    pub groups: Vec<Arc<GroupStats>>,
}

/// Whose numbers are asked for.
struct Sampled {
    def: Arc<DomainDef>,
    instance: Option<Arc<dyn Instance>>,
    sampler: Arc<Sampler>,
}

impl Domain {
    /// Numbers of the machine. Never waits for a hypervisor or a storage that does not answer: of what that would tell, the last is
    /// told that is known. Errors: those of the driver, where it answers that it cannot.
    pub async fn stats(&self, caller: &Caller, wanted: &StatsOptions) -> Result<Stats> {
        self.numbers(caller, &verb::GET_STATS, wanted).await
    }

    /// How large a disk is; what is not known is 0, as all is of an empty drive. Errors: `NoSuchDevice` if it has no such disk,
    /// `TimedOut` if its storage or its hypervisor does not answer, and nothing is known from before.
    pub async fn block_info(&self, caller: &Caller, target: &str) -> Result<DiskStats> {
        let wanted = StatsOptions { state: false, groups: vec![StatGroup::Disks], usual: false, ..StatsOptions::NONE };
        let told = self.numbers(caller, &verb::BLOCK_INFO, &wanted).await?;
        let (live, stored) = self.configurations()?;
        let there = live.or(stored).is_some_and(|def| def.devices.disks.iter().any(|disk| disk.target.dev == target));
        if !there {
            let text = format!("domain '{}' has no disk '{}'", self.name(), shorten(target));
            return Err(Error::NoSuchDevice(text));
        }
        let disks = told.groups.iter().find_map(|group| match &**group {
            GroupStats::Disks(disks) => Some(disks),
            _ => None,
        });
        let disk = disks.and_then(|disks| disks.iter().find(|disk| disk.target == target));
        disk.cloned().ok_or_else(|| {
            let text = format!("the storage of disk '{target}' of domain '{}' does not answer", self.name());
            Error::TimedOut(text)
        })
    }

    async fn numbers(&self, caller: &Caller, verb: &Verb, wanted: &StatsOptions) -> Result<Stats> {
        self.allow(caller, verb.action).await?;
        self.applies(verb)?;
        let now = now_usec();
        let (state, active) = {
            let state = lock(&self.state);
            ((state.state, state.reason), state.live().is_some())
        };
        let mut stats = Stats { sampled_at_usec: now, state: wanted.state.then_some(state), groups: Vec::new() };
        let (sampled, groups) = match active {
            true => (self.sampled_guest(), wanted.groups.clone()),
            false if wanted.at_rest && wanted.groups.contains(&StatGroup::Disks) => {
                (self.sampled_at_rest()?, vec![StatGroup::Disks])
            }
            false => (None, Vec::new()),
        };
        let Some(sampled) = sampled else { return Ok(stats) };
        let may_open = sampled.instance.is_none()
            && has_headers(&sampled.def)
            && self.shared.authority.can(caller, Action::Define, &self.subject()).await == Answer::Yes;
        let asked: Vec<_> = groups
            .into_iter()
            .map(|group| {
                let lately = if group.is_looked_on() { LOOKED_ON_LATELY } else { Duration::ZERO };
                let recent = wanted.recent.max(lately);
                self.begin_sampling(&sampled, StatQuestion { group, may_open }, now, recent)
            })
            .collect();
        for running in asked {
            let looked_on = running.0.group.is_looked_on() && wanted.patience == PATIENCE;
            let patience = wanted.patience + if looked_on { LOOKED_ON } else { Duration::ZERO };
            let told = sampled.sampler.told(running, patience).await;
            let told = match told {
                Err(error) if wanted.usual => {
                    tracing::debug!(uuid = %self.uuid, %error, "a group of numbers is left out");
                    continue;
                }
                told => told.map_err(|error| Error::from_driver(&self.name(), verb.word, error))?,
            };
            let Some(sample) = told else { continue };
            stats.sampled_at_usec = stats.sampled_at_usec.min(sample.at_usec);
            stats.groups.push(sample.numbers);
        }
        Ok(stats)
    }

    /// Its guest; one that is still sought has no numbers.
    fn sampled_guest(&self) -> Option<Sampled> {
        let state = lock(&self.state);
        let guest = state.guest.as_ref()?;
        let (def, instance, sampler) = (guest.live.clone(), guest.instance.clone(), guest.sampler.clone());
        Some(Sampled { def, instance: Some(instance), sampler })
    }

    /// The machine that is stored, if its configuration can be read.
    fn sampled_at_rest(&self) -> Result<Option<Sampled>> {
        let (stored, sampler) = {
            let mut state = lock(&self.state);
            let (Some(stored), None) = (state.stored.clone(), &state.broken) else { return Ok(None) };
            let of_this = |measured: &&Measured| Arc::ptr_eq(&measured.of, &stored);
            let known = state.measured.as_ref().filter(of_this).map(|measured| measured.sampler.clone());
            let sampler = known.unwrap_or_default();
            state.measured = Some(Measured { of: stored.clone(), sampler: sampler.clone() });
            (stored, sampler)
        };
        let mut def = self.shared.readings.of(&stored)?;
        self.shared.volumes.plug_what_is_there(&mut def);
        Ok(Some(Sampled { def, instance: None, sampler }))
    }

    fn begin_sampling(
        &self,
        sampled: &Sampled,
        question: StatQuestion,
        now: u64,
        recent: Duration,
    ) -> (StatQuestion, Running) {
        let (driver, def, instance) = (self.driver.clone(), sampled.def.clone(), sampled.instance.clone());
        let ask = || async move { driver.stats(&def, instance.as_deref(), question).await };
        (question, sampled.sampler.begin(question, now, recent, ask))
    }
}

/// An image has its capacity in its header.
fn has_headers(def: &DomainDef) -> bool {
    def.devices.disks.iter().any(|disk| disk.meant_format() != "raw")
}

/// What was last known of a machine that is off.
pub(super) struct Measured {
    /// The configuration that it is about.
    of: Arc<StoredDef>,
    sampler: Arc<Sampler>,
}

/// What is last known of a guest, and what is being asked.
#[derive(Default)]
pub(super) struct Sampler(Mutex<HashMap<StatQuestion, Slot>>);

#[derive(Default)]
struct Slot {
    last: Option<Sample>,
    /// Why the last attempt brought nothing.
    failure: Option<DriverError>,
    running: Option<Running>,
}

/// Numbers with the time at which they were asked for.
#[derive(Clone)]
struct Sample {
    at_usec: u64,
    numbers: Arc<GroupStats>,
}

/// An attempt.
#[derive(Clone)]
struct Running {
    since: Instant,
    /// Closed when it has ended.
    ended: watch::Receiver<()>,
}

impl Sampler {
    /// The attempt that is under way, one that has brought numbers which are recent enough, or a new one. At most one is under
    /// way, however many ask.
    fn begin<F>(
        self: &Arc<Self>,
        question: StatQuestion,
        at_usec: u64,
        recent: Duration,
        ask: impl FnOnce() -> F,
    ) -> Running
    where
        F: Future<Output = Result<GroupStats, DriverError>> + Send + 'static,
    {
        let mut slots = lock(&self.0);
        let slot = slots.entry(question).or_default();
        let age = slot.last.as_ref().and_then(|last| at_usec.checked_sub(last.at_usec)).map(Duration::from_micros);
        if slot.running.is_none() && slot.failure.is_none() && age.is_some_and(|age| age < recent) {
            return Running { since: Instant::now(), ended: watch::channel(()).1 };
        }
        if let Some(running) = slot.running.as_ref().filter(|running| running.ended.has_changed().is_ok()) {
            return running.clone();
        }
        let (ending, ended) = watch::channel(());
        let running = Running { since: Instant::now(), ended };
        slot.running = Some(running.clone());
        // What is told meanwhile is what was last known.
        slot.failure = None;
        let (sampler, asking) = (self.clone(), ask());
        tokio::spawn(async move {
            let told = asking.await;
            let mut slots = lock(&sampler.0);
            let slot = slots.entry(question).or_default();
            match told {
                Ok(numbers) => slot.last = Some(Sample { at_usec, numbers: Arc::new(numbers) }),
                Err(error) => slot.failure = Some(error),
            }
            slot.running = None;
            drop(ending);
        });
        running
    }

    /// What is known when an attempt has ended, or has been waited for long enough. Errors: what the driver says that is neither
    /// that the guest has ended nor that nothing answers.
    async fn told(
        &self,
        (question, running): (StatQuestion, Running),
        patience: Duration,
    ) -> Result<Option<Sample>, DriverError> {
        let Running { since, mut ended } = running;
        // Its end is the only news there is. One that is overdue is not waited for: who asks next is told what it brings.
        let _ = timeout_at(since + patience, ended.changed()).await;
        let slots = lock(&self.0);
        let Some(slot) = slots.get(&question) else { return Ok(None) };
        match &slot.failure {
            None | Some(DriverError::TimedOut(_) | DriverError::Gone) => Ok(slot.last.clone()),
            Some(failure) => Err(failure.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::sync::Notify;
    use virt_model::driver::stats::CpuStats;

    const CPU: StatQuestion = StatQuestion { group: StatGroup::Cpu, may_open: false };

    fn numbers(user_usec: u64) -> GroupStats {
        GroupStats::Cpu(CpuStats { user_usec, system_usec: 0 })
    }

    async fn told(sampler: &Sampler, running: Running) -> Option<(u64, GroupStats)> {
        sampler.told((CPU, running), PATIENCE).await.unwrap().map(|sample| (sample.at_usec, (*sample.numbers).clone()))
    }

    #[test]
    fn groups_are_known_by_their_words() {
        assert_eq!(StatsOptions::named(&[]).unwrap(), StatsOptions::default());
        let named =
            |words: &[&str]| StatsOptions::named(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let groups = vec![StatGroup::Disks, StatGroup::Cpu];
        let some = StatsOptions { groups, usual: false, ..StatsOptions::NONE };
        assert_eq!(named(&["disks", "state", "cpu", "disks"]).unwrap(), some);
        let why = named(&["cpu", "gpu"]).unwrap_err().to_string();
        let known = "state, cpu, memory, vcpus, disks, interfaces, iothreads, dirty-rate, perf";
        assert_eq!(why, format!("there is no group 'gpu'; there are {known}"));
    }

    #[tokio::test(start_paused = true)]
    async fn one_attempt_serves_all_and_the_last_answer_stands_while_none_comes() {
        let (sampler, go, begun) = (Arc::new(Sampler::default()), Arc::new(Notify::new()), Arc::new(AtomicU32::new(0)));
        let ask = |at| {
            let (go, begun) = (go.clone(), begun.clone());
            let asking = || async move {
                begun.fetch_add(1, Ordering::Relaxed);
                go.notified().await;
                Ok(numbers(at))
            };
            sampler.begin(CPU, at, Duration::ZERO, asking)
        };
        let (one, two) = (ask(1), ask(2));
        go.notify_one();
        let both = tokio::join!(told(&sampler, one), told(&sampler, two));
        assert_eq!(both, (Some((1, numbers(1))), Some((1, numbers(1)))), "both have the first one's");
        assert_eq!(begun.load(Ordering::Relaxed), 1);

        let before = Instant::now();
        let hung = ask(3);
        assert_eq!(told(&sampler, hung).await, Some((1, numbers(1))));
        assert_eq!(before.elapsed().as_secs(), PATIENCE.as_secs());
        assert_eq!(told(&sampler, ask(4)).await, Some((1, numbers(1))), "nobody waits that long again");
        assert_eq!(before.elapsed().as_secs(), PATIENCE.as_secs());
        assert_eq!(begun.load(Ordering::Relaxed), 2);

        let waits = ask(5);
        go.notify_one();
        waits.clone().ended.changed().await.unwrap_err();
        assert_eq!(told(&sampler, waits).await, Some((3, numbers(3))), "when it was asked for");
    }

    #[tokio::test]
    async fn what_is_recent_is_told_again_and_what_failed_is_asked_again() {
        let sampler = Arc::new(Sampler::default());
        let recent = Duration::from_micros(10);
        let begun = AtomicU32::new(0);
        let ask = |at: u64, answer: Result<GroupStats, DriverError>| {
            let counted = || {
                begun.fetch_add(1, Ordering::Relaxed);
                async move { answer }
            };
            sampler.begin(CPU, at, recent, counted)
        };
        assert_eq!(told(&sampler, ask(100, Ok(numbers(1)))).await, Some((100, numbers(1))));
        assert_eq!(told(&sampler, ask(109, Ok(numbers(2)))).await, Some((100, numbers(1))));
        assert_eq!(begun.load(Ordering::Relaxed), 1);
        assert_eq!(told(&sampler, ask(110, Err(DriverError::Gone))).await, Some((100, numbers(1))));
        assert_eq!(told(&sampler, ask(105, Ok(numbers(3)))).await, Some((105, numbers(3))), "the last attempt failed");
        assert_eq!(told(&sampler, ask(90, Ok(numbers(4)))).await, Some((90, numbers(4))), "the clock was set back");
        assert_eq!(begun.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn an_attempt_that_fails_is_told_and_one_that_is_cut_off_keeps_nobody_waiting() {
        let sampler = Arc::new(Sampler::default());
        let fails = |error: DriverError| sampler.begin(CPU, 1, Duration::ZERO, || async move { Err(error) });
        let refused = sampler.told((CPU, fails(DriverError::Refused("no".into()))), PATIENCE).await.map(drop);
        assert!(matches!(refused, Err(DriverError::Refused(_))));
        assert_eq!(told(&sampler, fails(DriverError::Gone)).await, None);
        let known = sampler.begin(CPU, 1, Duration::ZERO, || async { Ok(numbers(1)) });
        assert_eq!(told(&sampler, known).await, Some((1, numbers(1))));
        let again = sampler.told((CPU, fails(DriverError::Refused("no".into()))), PATIENCE).await.map(drop);
        assert!(again.is_err(), "it is told though there are older numbers");
        tokio::time::pause();
        let hung = sampler.begin(CPU, 2, Duration::ZERO, std::future::pending);
        assert_eq!(told(&sampler, hung).await, Some((1, numbers(1))), "an old failure is not");
        tokio::time::resume();
        let sampler = Arc::new(Sampler::default());
        let panics = sampler.begin(CPU, 1, Duration::ZERO, || async { panic!("as a driver must not") });
        assert_eq!(told(&sampler, panics).await, None);
        let next = sampler.begin(CPU, 2, Duration::ZERO, || async { Ok(numbers(2)) });
        assert_eq!(told(&sampler, next).await, Some((2, numbers(2))));
    }
}
