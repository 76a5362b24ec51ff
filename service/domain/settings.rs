//! What a machine may use, by typed keys: CPU time and memory of the host, requests of a disk, what passes a network card. Set in what
//! runs, what is stored, or both; read from the kernel or the hypervisor while the machine runs.

use super::link;
use super::state::Guest;
use super::{Affect, Domain};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::verb::{self, Verb};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use virt_model::device::Disk;
use virt_model::device::disk::Iotune;
use virt_model::domain::DomainDef;
use virt_model::domain::part::Part;
use virt_model::driver::{Adjustment, DriverError};
use virt_model::setting::{self, BANDWIDTH, MEMORY, SCHEDULER, SettingKind, Settings, THROTTLE};
use virt_model::xml::shorten;

/// How long whoever asks waits for the kernel or the hypervisor.
const PATIENCE: Duration = Duration::from_secs(10);

/// Of what the settings are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SettingsOf {
    /// CPU time.
    Scheduler,
    /// Memory of the host.
    Memory,
    /// The disk of that target.
    Disk(String),
    /// The network card that is known by that: its hardware address, name on the host, or alias.
    Card(String),
}

impl SettingsOf {
    /// The keys that there are.
    pub fn keys(&self) -> Vec<(&'static str, SettingKind)> {
        match self {
            SettingsOf::Scheduler => setting::keys(SCHEDULER),
            SettingsOf::Memory => setting::keys(MEMORY),
            SettingsOf::Disk(_) => setting::keys(THROTTLE),
            SettingsOf::Card(_) => setting::keys(BANDWIDTH),
        }
    }

    /// The rows of what sets them, and of what reads them.
    fn verbs(&self) -> (&'static Verb, &'static Verb) {
        match self {
            SettingsOf::Scheduler => (&verb::SET_SCHEDULER, &verb::GET_SCHEDULER),
            SettingsOf::Memory => (&verb::SET_MEMORY_PARAMETERS, &verb::GET_MEMORY_PARAMETERS),
            SettingsOf::Disk(_) => (&verb::SET_BLOCK_THROTTLE, &verb::GET_BLOCK_THROTTLE),
            SettingsOf::Card(_) => (&verb::SET_BANDWIDTH, &verb::GET_BANDWIDTH),
        }
    }

    fn adjustment(&self) -> Adjustment {
        match self {
            SettingsOf::Scheduler | SettingsOf::Memory => Adjustment::Limits,
            SettingsOf::Disk(target) => Adjustment::Throttle(target.clone()),
            SettingsOf::Card(known) => Adjustment::Bandwidth(known.clone()),
        }
    }

    /// The same, as another configuration knows it.
    fn known_by(&self, running: Option<&DomainDef>) -> SettingsOf {
        match self {
            SettingsOf::Card(known) => SettingsOf::Card(link::known_by(known, running)),
            other => other.clone(),
        }
    }

    fn edit(&self, def: &mut DomainDef, given: &Settings) -> Result<()> {
        let name = def.name.clone();
        let said = |outcome: std::result::Result<(), String>| {
            outcome.map_err(|why| Error::InvalidArgument(format!("domain '{name}': {why}")))
        };
        match self {
            SettingsOf::Scheduler => said(edit(&mut def.cputune, "cputune", |to| setting::apply(SCHEDULER, to, given))),
            SettingsOf::Memory => said(edit(&mut def.memtune, "memtune", |to| setting::apply(MEMORY, to, given))),
            SettingsOf::Disk(target) => {
                let mut tune = find_disk(def, target)?.iotune.clone();
                if let Some(limits) = joined(def, target, given) {
                    tune.get_or_insert_default().copy_limits(&limits);
                }
                said(edit(&mut tune, "iotune", |to| setting::apply(THROTTLE, to, given)))?;
                share(def, target, tune);
                Ok(())
            }
            SettingsOf::Card(known) => {
                let card = link::find_mut(def, known)?;
                said(edit(&mut card.bandwidth, "bandwidth", |to| setting::apply_bandwidth(to, given)))
            }
        }
    }

    fn read(&self, def: &DomainDef) -> Result<Settings> {
        Ok(match self {
            SettingsOf::Scheduler => def.cputune.as_ref().map(|tune| setting::read(SCHEDULER, tune)),
            SettingsOf::Memory => def.memtune.as_ref().map(|tune| setting::read(MEMORY, tune)),
            SettingsOf::Disk(target) => {
                find_disk(def, target)?.iotune.as_ref().map(|tune| setting::read(THROTTLE, tune))
            }
            SettingsOf::Card(known) => {
                link::find(def, known)?.bandwidth.as_ref().map(|limits| setting::read(BANDWIDTH, limits))
            }
        }
        .unwrap_or_default())
    }
}

impl Domain {
    /// Sets what is given; what is not given stays. Error: `InvalidArgument` for values that cannot be.
    pub async fn set_settings(
        self: &Arc<Self>,
        caller: &Caller,
        of: SettingsOf,
        given: Settings,
        affect: Affect,
    ) -> Result<()> {
        self.adjust(caller, of.verbs().0, affect, of.adjustment(), |def, runs| {
            let running = self.live().filter(|_| !runs);
            of.known_by(running.as_deref()).edit(def, &given)
        })
        .await
    }

    /// What is set: of what runs, as the kernel or the hypervisor says it, if the machine runs and `affect` does not say otherwise.
    pub async fn settings(self: &Arc<Self>, caller: &Caller, of: SettingsOf, affect: Affect) -> Result<Settings> {
        let verb = of.verbs().1;
        self.beside(caller, verb, async {
            if affect.live && affect.config {
                let text = "settings are read of one configuration: say 'live' or 'config'";
                return Err(Error::InvalidArgument(text.to_owned()));
            }
            match self.affected(verb, affect)? {
                (Some(live), _) => {
                    // A wrong name is refused before anything is asked.
                    of.read(&live)?;
                    let looked = self.looked_at(&self.guest()?, of.adjustment()).await;
                    of.read(&*looked.map_err(|error| self.driver_failed(verb.word, error))?)
                }
                (None, Some(stored)) => of.known_by(self.live().as_deref()).read(&stored),
                (None, None) => Err(self.vanished()),
            }
        })
        .await
    }
}

impl Domain {
    /// With what the guest runs, as it is in truth of what is named. One look at a time is under way, and whoever asks for the same
    /// has its answer: it may be a program that is run for it, and everybody may ask.
    async fn looked_at(&self, guest: &Guest, what: Adjustment) -> Result<Arc<DomainDef>, DriverError> {
        let until = Instant::now() + PATIENCE;
        loop {
            let (mut answer, is_ours) = self.begin_to_look(guest, &what);
            let wanted = timeout_at(until, answer.wait_for(Option::is_some)).await;
            let Ok(told) = wanted else {
                return Err(DriverError::TimedOut(format!("{what} cannot be read: nothing answers")));
            };
            if is_ours {
                let told = told.ok().and_then(|told| told.clone());
                return told.unwrap_or_else(|| Err(DriverError::Internal(format!("{what} cannot be read"))));
            }
        }
    }

    /// The look that is under way, or a new one; whether it is at what is wanted.
    fn begin_to_look(&self, guest: &Guest, what: &Adjustment) -> (watch::Receiver<Option<Looked>>, bool) {
        let mut looks = lock(&guest.looks.0);
        // Its end is told by an answer, or by nobody being left who could give one.
        let goes_on = |look: &&Look| look.answer.has_changed().is_ok() && look.answer.borrow().is_none();
        if let Some(look) = looks.as_ref().filter(goes_on) {
            let is_ours = look.what == *what && Arc::ptr_eq(&look.of, &guest.live);
            return (look.answer.clone(), is_ours);
        }
        let (tell, answer) = watch::channel(None);
        *looks = Some(Look { of: guest.live.clone(), what: what.clone(), answer: answer.clone() });
        let (driver, instance, what) = (self.driver.clone(), guest.instance.clone(), what.clone());
        let (mut def, all) = (DomainDef::clone(&guest.live), guest.looks.clone());
        tokio::spawn(async move {
            let looked = driver.look_at(instance.as_ref(), &mut def, &what).await;
            *lock(&all.0) = None;
            tell.send_replace(Some(looked.map(|()| Arc::new(def))));
        });
        (answer, true)
    }
}

/// The look at a guest that is under way.
#[derive(Default)]
pub(super) struct Looks(Mutex<Option<Look>>);

struct Look {
    /// With what the guest ran when it was begun: what it says of another configuration is nobody's answer.
    of: Arc<DomainDef>,
    what: Adjustment,
    answer: watch::Receiver<Option<Looked>>,
}

type Looked = Result<Arc<DomainDef>, DriverError>;

/// Changes a part of the definition, which is left out where it says nothing.
fn edit<T: Part + Default>(
    part: &mut Option<T>,
    name: &str,
    change: impl FnOnce(&mut T) -> std::result::Result<(), String>,
) -> std::result::Result<(), String> {
    let mut changed = part.take().unwrap_or_default();
    change(&mut changed)?;
    let written = changed.write(name);
    let says = !written.attributes.is_empty() || written.elements().next().is_some();
    *part = says.then_some(changed);
    Ok(())
}

pub(super) fn find_disk<'a>(def: &'a DomainDef, target: &str) -> Result<&'a Disk> {
    let disk = def.devices.disks.iter().find(|disk| disk.target.dev == target);
    disk.ok_or_else(|| Error::NoSuchDevice(format!("domain '{}' has no disk '{}'", def.name, shorten(target))))
}

/// The limits of the group that a disk is to join, if others are in it.
fn joined(def: &DomainDef, target: &str, given: &Settings) -> Option<Iotune> {
    let wanted = given.get("group").and_then(|group| match group {
        setting::SettingValue::Text(group) => Some(group),
        _ => None,
    })?;
    let named = def.throttle_groups.iter().flat_map(|groups| &groups.groups);
    let others = def.devices.disks.iter().filter(|disk| disk.target.dev != target);
    let mut all = named.chain(others.filter_map(|disk| disk.iotune.as_ref()));
    all.find(|tune| tune.group.as_ref() == Some(wanted)).cloned()
}

/// Those are the limits of a disk from now on, and of all that share them with it.
pub(super) fn share(def: &mut DomainDef, target: &str, tune: Option<Iotune>) {
    let group = tune.as_ref().and_then(|tune| tune.group.clone());
    if let (Some(tune), Some(group)) = (&tune, &group) {
        let named = def.throttle_groups.iter_mut().flat_map(|groups| &mut groups.groups);
        let others = def.devices.disks.iter_mut().filter_map(|disk| disk.iotune.as_mut());
        let same = named.chain(others).filter(|other| other.group.as_ref() == Some(group));
        same.for_each(|other| other.copy_limits(tune));
    }
    def.devices
        .disks
        .iter_mut()
        .filter(|disk| disk.target.dev == target)
        .for_each(|disk| disk.iotune.clone_from(&tune));
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt_model::setting::SettingValue::{Number, Text};

    fn machine() -> DomainDef {
        let disk = |target: &str, tune: &str| {
            format!("<disk type='file'><source file='/{target}'/><target dev='{target}'/>{tune}</disk>")
        };
        let slow = "<iotune><total_iops_sec>9</total_iops_sec><group_name>slow</group_name></iotune>";
        let disks = disk("vda", slow) + &disk("vdb", slow) + &disk("vdc", "");
        let text = format!("<domain type='test'><name>d</name><memory>1</memory><devices>{disks}</devices></domain>");
        DomainDef::parse(&text).expect("a machine")
    }

    fn limits(def: &DomainDef) -> Vec<(Option<u64>, Option<&str>)> {
        let of = |disk: &'_ Disk| disk.iotune.as_ref().map(|tune| (tune.ops, tune.group.is_some()));
        let all = def.devices.disks.iter().map(|disk| {
            let (ops, grouped) = of(disk).unwrap_or_default();
            (ops, grouped.then_some("slow"))
        });
        all.collect()
    }

    #[test]
    fn disks_of_a_group_have_the_same_limits_whichever_is_set() {
        let (mut def, of) = (machine(), |target: &str| SettingsOf::Disk(target.to_owned()));
        of("vda").edit(&mut def, &Settings::from([("total-requests-per-second", Number(7))])).expect("both");
        let slow = Some("slow");
        assert_eq!(limits(&def), [(Some(7), slow), (Some(7), slow), (None, None)]);
        of("vdc").edit(&mut def, &Settings::from([("group", Text("slow".to_owned()))])).expect("it joins");
        assert_eq!(limits(&def), [(Some(7), slow); 3]);
        let alone = Settings::from([("group", Text(String::new())), ("total-requests-per-second", Number(5))]);
        of("vda").edit(&mut def, &alone).expect("it leaves");
        assert_eq!(limits(&def), [(Some(5), None), (Some(7), slow), (Some(7), slow)]);
        assert!(def.contradictions().is_empty());
        let error = of("vdz").edit(&mut def, &Settings::new()).expect_err("no such disk");
        assert!(matches!(error, Error::NoSuchDevice(_)), "{error}");
    }

    #[test]
    fn what_says_nothing_is_left_out() {
        let mut def = machine();
        let given = |shares: u64| Settings::from([("cpu-shares", Number(shares))]);
        SettingsOf::Scheduler.edit(&mut def, &given(512)).expect("set");
        assert_eq!(SettingsOf::Scheduler.read(&def).expect("read"), given(512));
        SettingsOf::Scheduler.edit(&mut def, &given(0)).expect("lifted");
        assert_eq!((def.cputune.as_ref(), SettingsOf::Scheduler.read(&def).expect("read").len()), (None, 0));
    }
}
