//! Numbers of many machines at an interval, for whoever listens.
//!
//! All that have one interval are told at the same moments, and what was sampled for one is told to the others
//! ([`StatsOptions::each`]); nothing is sampled for nobody. Who does not read in time misses a moment, and nothing is kept for it.

use crate::Service;
use crate::authz::{Action, Caller};
use crate::domain::StatsOptions;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::fair::FairPlace;
use crate::lock::lock;
use crate::scrape::{MachineStats, numbers_of_many};
use crate::time::now_usec;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Subscriptions that there are at once: in all, and of one user.
pub(crate) const SUBSCRIPTIONS: (usize, usize) = (128, 16);
/// The shortest interval.
const SHORTEST: Duration = Duration::from_millis(200);
/// The longest: nobody sees a longer one end.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// Machines that one subscription names at most.
const MOST_NAMED: usize = 10_000;

/// What is wanted, and how often.
#[derive(Clone, Debug)]
pub struct SubscribeOptions {
    /// From one moment to the next.
    pub interval: Duration,
    /// Of these machines; of all that can be read, if there are none.
    pub domains: Vec<Uuid>,
    /// These numbers.
    pub groups: StatsOptions,
}

impl Default for SubscribeOptions {
    fn default() -> SubscribeOptions {
        SubscribeOptions { interval: Duration::from_secs(1), domains: Vec::new(), groups: StatsOptions::default() }
    }
}

/// The subscriptions that there are.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    last: u64,
    by_number: HashMap<u64, (Caller, CancellationToken)>,
}

/// Who listens. It ends when this is dropped.
pub struct Subscription {
    number: u64,
    caller: Caller,
    options: SubscribeOptions,
    moments: Interval,
    closed: CancellationToken,
    service: Arc<Service>,
    _place: FairPlace<u32>,
}

impl Service {
    /// Begins to listen.
    /// Errors: `InvalidArgument` for an interval below 200 ms or over a day, `NoSuchDomain` and `AccessDenied` for a machine that is
    /// named, `LimitsExceeded` if the user has too many.
    pub async fn subscribe(self: &Arc<Self>, caller: &Caller, options: SubscribeOptions) -> Result<Subscription> {
        if !(SHORTEST..=LONGEST).contains(&options.interval) {
            let (given, least, most) = (options.interval.as_micros(), SHORTEST.as_micros(), LONGEST.as_micros());
            let text = format!("the interval is {least} to {most} microseconds, not {given}");
            return Err(Error::InvalidArgument(text));
        }
        if options.domains.len() > MOST_NAMED {
            return Err(Error::InvalidArgument(format!(
                "more than {MOST_NAMED} domains are named; without any it is all"
            )));
        }
        let place = self.shared.subscription_places.take_now(&caller.uid).ok_or_else(|| {
            let (all, own) = SUBSCRIPTIONS;
            Error::LimitsExceeded(format!(
                "{own} subscriptions of yours, or {all} of all users, are open; close some first"
            ))
        })?;
        for uuid in &options.domains {
            let domain =
                self.get(*uuid).ok_or_else(|| Error::NoSuchDomain { what: "uuid", value: uuid.to_string() })?;
            domain.allow(caller, Some(Action::Read)).await?;
        }
        let domains: BTreeSet<Uuid> = options.domains.iter().copied().collect();
        let groups = options.groups.while_it_runs().each(options.interval);
        let options = SubscribeOptions { groups, domains: domains.into_iter().collect(), ..options };
        let closed = caller.departed.child_token();
        let number = {
            let mut open = lock(&self.shared.subscriptions.0);
            open.last += 1;
            let number = open.last;
            open.by_number.insert(number, (caller.clone(), closed.clone()));
            number
        };
        let moments = moments(options.interval);
        let (service, caller) = (self.clone(), caller.clone());
        let subscription = Subscription { number, caller, options, moments, closed, service, _place: place };
        self.events().send(Event::Subscription(number));
        Ok(subscription)
    }

    /// Ends a subscription.
    /// Errors: `OperationInvalid` if there is none of that number, `AccessDenied` if it is another's.
    pub fn unsubscribe(&self, caller: &Caller, number: u64) -> Result<()> {
        let open = lock(&self.shared.subscriptions.0);
        let Some((owner, closed)) = open.by_number.get(&number) else {
            return Err(Error::OperationInvalid(format!("the subscription {number} has ended")));
        };
        if (&owner.bus_name, owner.uid) != (&caller.bus_name, caller.uid) {
            return Err(Error::AccessDenied("a subscription is closed by the client that has it".to_owned()));
        }
        closed.cancel();
        Ok(())
    }
}

impl Subscription {
    /// Its number; none has it again.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Waits for the next moment. When that was, in microseconds since the epoch, and the numbers of then; `None` when it has been
    /// closed, or its owner has left. To be dropped then.
    pub async fn next(&mut self) -> Option<(u64, Vec<MachineStats>)> {
        let closed = self.closed.clone();
        let told = async {
            self.moments.tick().await;
            let when = now_usec();
            let domains = match self.options.domains.is_empty() {
                true => self.service.domains.all(),
                false => self.options.domains.iter().filter_map(|uuid| self.service.get(*uuid)).collect(),
            };
            (when, numbers_of_many(domains, &self.caller, &self.options.groups).await)
        };
        closed.run_until_cancelled(told).await
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock(&self.service.shared.subscriptions.0).by_number.remove(&self.number);
        self.service.events().send(Event::SubscriptionGone(self.number));
    }
}

/// The moments of an interval, the same ones for all who have it; the first is not at once.
fn moments(interval: Duration) -> Interval {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let now = Instant::now();
    let since = now.duration_since(*FIRST.get_or_init(Instant::now)).as_nanos();
    let past = since % interval.as_nanos();
    let left = interval.as_nanos() - past;
    let left = if left < interval.as_nanos() / 2 { left + interval.as_nanos() } else { left };
    let mut moments = interval_at(now + Duration::from_nanos(u64::try_from(left).unwrap_or(u64::MAX)), interval);
    moments.set_missed_tick_behavior(MissedTickBehavior::Skip);
    moments
}
