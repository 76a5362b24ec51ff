//! `Can`: what a method would answer now, for a program that greys out its buttons.

use super::Domain;
use crate::authz::{Action, Answer, Caller};
use crate::error::{Error, Result};
use crate::job::lock;
use virt_model::state::DomainState;
use virt_model::xml::shorten;

/// When a method has a meaning.
#[derive(Clone, Copy)]
enum When {
    Always,
    Inactive,
    Active,
    Running,
    Paused,
    Persistent,
    InactivePersistent,
    Snapshots,
}

/// The methods of `org.virt.Domain` that change or reveal something, by their names on the bus.
const METHODS: &[(&str, Action, When)] = &[
    ("Start", Action::Start, When::Inactive),
    ("Shutdown", Action::Stop, When::Running),
    ("Reboot", Action::Stop, When::Running),
    ("Reset", Action::Stop, When::Active),
    ("Destroy", Action::Stop, When::Active),
    ("Suspend", Action::Suspend, When::Running),
    ("Resume", Action::Suspend, When::Paused),
    ("Undefine", Action::Delete, When::Persistent),
    ("Rename", Action::Define, When::InactivePersistent),
    ("SetTitle", Action::Define, When::Always),
    ("SetDescription", Action::Define, When::Always),
    ("SetMetadata", Action::Define, When::Always),
    ("UpdateDevice", Action::Device, When::Always),
    ("GetMetadata", Action::Read, When::Always),
    ("GetXML", Action::Read, When::Always),
    ("CreateSnapshot", Action::Snapshot, When::Snapshots),
    ("CheckCreateSnapshot", Action::Read, When::Snapshots),
];

/// Those that anybody may call who may talk to the service.
const OPEN: [&str; 3] = ["Can", "ListSnapshots", "GetSnapshot"];

impl Domain {
    /// `yes`, `no`, `challenge` (a person would be asked) or `na` (not in this state). Never prompts.
    /// Error: `InvalidArgument` for a name that is no method of a domain.
    pub async fn can(&self, caller: &Caller, method: &str) -> Result<&'static str> {
        let Some((_, action, when)) = METHODS.iter().find(|(name, ..)| *name == method) else {
            if OPEN.contains(&method) {
                return Ok("yes");
            }
            return Err(Error::InvalidArgument(format!("org.virt.Domain has no method '{}'", shorten(method))));
        };
        if !self.is(*when) || lock(&self.state).sound_for(*action).is_err() {
            return Ok("na");
        }
        Ok(match self.shared.authority.can(caller, *action, &self.subject()).await {
            Answer::Yes => "yes",
            Answer::No => "no",
            Answer::Challenge => "challenge",
        })
    }

    fn is(&self, when: When) -> bool {
        let state = lock(&self.state);
        let (active, persistent) = (state.state.is_active(), state.stored.is_some());
        match when {
            When::Always => true,
            When::Inactive => !active && state.starting.is_none(),
            When::Active => active,
            When::Running => matches!(state.state, DomainState::Running | DomainState::Idle),
            When::Paused => matches!(state.state, DomainState::Paused | DomainState::PmSuspended),
            When::Persistent => persistent,
            When::InactivePersistent => !active && persistent,
            When::Snapshots => self.driver.snapshots().is_some(),
        }
    }

    /// The methods `can` knows, for the test that holds them to the introspection data.
    pub fn methods_can_knows() -> impl Iterator<Item = &'static str> {
        METHODS.iter().map(|(name, ..)| *name).chain(OPEN)
    }
}
