//! Numbers of all machines at once, for whoever collects them.
//!
//! One that hangs keeps nobody waiting longer than its own moment (`domain/stats.rs`), and many are looked at together. What was
//! collected stays as long as it takes to hand it over; so only few do that at a time.

use crate::Service;
use crate::authz::Caller;
use crate::domain::{Domain, Stats, StatsOptions};
use crate::error::{Error, Result};
use crate::fair::FairPlace;
use std::sync::Arc;
use tokio::task::JoinSet;
use uuid::Uuid;

/// Scrapes that are there at once: in all, and of one user.
pub(crate) const SCRAPES: (usize, usize) = (16, 2);
/// Machines that are looked at together.
const TOGETHER: usize = 64;

/// Numbers of one machine.
#[derive(Clone, Debug)]
pub struct MachineStats {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The numbers.
    pub stats: Stats,
}

/// Numbers of many. While it is there, it counts as one of its user's.
#[derive(Debug)]
pub struct Scrape {
    /// By name.
    pub machines: Vec<MachineStats>,
    _place: FairPlace<u32>,
}

impl Service {
    /// Numbers of all machines that `caller` may read; nobody is asked for a password, and no file of the host is looked at: of a
    /// machine that is off its state is told. Error: `LimitsExceeded` if the user has too many that are not handed over.
    pub async fn scrape(&self, caller: &Caller) -> Result<Scrape> {
        let place = self.shared.scrapes.take_now(&caller.uid).ok_or_else(|| {
            let text = format!("{} scrapes of yours, or {} of all users, are not read yet", SCRAPES.1, SCRAPES.0);
            Error::LimitsExceeded(format!("{text}: read them first"))
        })?;
        let wanted = StatsOptions::default().while_it_runs();
        let mut machines = numbers_of_many(self.domains.all(), caller, &wanted).await;
        machines.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(Scrape { machines, _place: place })
    }
}

/// Numbers of machines, many at a time; nobody is asked for a password. One that the caller may not read, or that has just gone,
/// is left out.
pub(crate) async fn numbers_of_many(
    domains: Vec<Arc<Domain>>,
    caller: &Caller,
    wanted: &StatsOptions,
) -> Vec<MachineStats> {
    let caller = Caller { interactive: false, ..caller.clone() };
    let mut domains = domains.into_iter();
    let (mut under_way, mut machines) = (JoinSet::new(), Vec::new());
    loop {
        while under_way.len() < TOGETHER
            && let Some(domain) = domains.next()
        {
            under_way.spawn(numbers_of(domain, caller.clone(), wanted.clone()));
        }
        let Some(done) = under_way.join_next().await else { return machines };
        machines.extend(done.ok().flatten());
    }
}

async fn numbers_of(domain: Arc<Domain>, caller: Caller, wanted: StatsOptions) -> Option<MachineStats> {
    let stats = domain.stats(&caller, &wanted).await.ok()?;
    Some(MachineStats { name: domain.name(), uuid: domain.uuid(), stats })
}
