//! When a verb has a meaning, and `Can`: what a method would answer now, for a program that greys out its buttons.

use super::Domain;
use super::state::State;
use crate::authz::{Caller, Subject};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::verb::{self, Verb, When};
use virt_model::state::DomainState;

impl Domain {
    /// Refuses a verb that has no meaning in the state in which the domain is, or that its driver does not have.
    pub(super) fn applies(&self, verb: &Verb) -> Result<()> {
        if verb.when == When::Snapshots {
            self.takes_snapshots()?;
        }
        if self.driver.lacks().contains(&verb.member) {
            let (name, driver) = (self.name(), self.driver.name());
            let text = format!("cannot {} domain '{name}': the driver '{driver}' has no way to do so", verb.word);
            return Err(Error::OperationUnsupported(text));
        }
        self.host_can(verb)?;
        lock(&self.state).applies(verb)
    }

    /// `yes`, `no`, `challenge` (a person would be asked) or `na` (not in this state, or not with this driver). Never prompts.
    /// Error: `InvalidArgument` for a name that is no method of a domain.
    pub async fn can(&self, caller: &Caller, member: &str) -> Result<&'static str> {
        let verb = verb::find("org.virt.Domain", verb::DOMAIN, member)?;
        self.can_do(caller, verb, self.subject(), true).await
    }

    /// The same for a method of the snapshot `name`.
    pub async fn can_with_snapshot(&self, caller: &Caller, name: &str, member: &str) -> Result<&'static str> {
        let verb = verb::find("org.virt.Snapshot", verb::SNAPSHOT, member)?;
        self.has_snapshot(name)?;
        // Of a domain whose own files cannot be read, a snapshot can be forgotten.
        self.can_do(caller, verb, self.snapshot_subject(name), *verb != verb::DELETE).await
    }

    /// The same for a method of the checkpoint `name`.
    pub async fn can_with_checkpoint(&self, caller: &Caller, name: &str, member: &str) -> Result<&'static str> {
        let verb = verb::find("org.virt.Checkpoint", verb::CHECKPOINT, member)?;
        self.checkpoint(name)?;
        self.can_do(caller, verb, self.subject(), true).await
    }

    /// `soundly`: only with a domain whose own files can be read.
    async fn can_do(&self, caller: &Caller, verb: &Verb, subject: Subject, soundly: bool) -> Result<&'static str> {
        let Some(action) = verb.action else { return Ok("yes") };
        if self.applies(verb).is_err() || soundly && lock(&self.state).sound_for(action).is_err() {
            return Ok("na");
        }
        Ok(self.shared.authority.can(caller, action, &subject).await.as_str())
    }
}

impl State {
    /// Refuses a verb that has no meaning now; says what to do first.
    pub(super) fn applies(&self, verb: &Verb) -> Result<()> {
        self.applies_in(verb, verb.when)
    }

    fn applies_in(&self, verb: &Verb, when: When) -> Result<()> {
        match when {
            When::Always | When::Snapshots | When::HasValue => Ok(()),
            When::NotDetached | When::Detached | When::Undriven | When::Made | When::Never => {
                Err(self.refusal(verb, "it is no device"))
            }
            When::Inactive => self.is_inactive().and_then(|()| match self.starting {
                None => Ok(()),
                Some(_) => Err(Error::OperationInvalid(format!("domain '{}' is being started already", self.name))),
            }),
            When::Active => self.running().map(drop),
            When::ActiveOrStarting if self.starting.is_some() || self.sought.is_some() => Ok(()),
            When::ActiveOrStarting => self.running().map(drop),
            When::Running => self.running().and_then(|_| match self.state {
                DomainState::Running | DomainState::Idle => Ok(()),
                DomainState::Paused => Err(self.refusal(verb, "resume it first, or destroy it")),
                DomainState::PmSuspended => Err(self.refusal(verb, "it sleeps; wake it first, or destroy it")),
                _ => Err(self.refusal(verb, "reset or destroy it")),
            }),
            When::Paused => self.running().and_then(|_| match self.state {
                DomainState::Paused | DomainState::PmSuspended => Ok(()),
                DomainState::Running | DomainState::Idle => Err(self.refusal(verb, "there is nothing to resume")),
                _ => Err(self.refusal(verb, "reset or destroy it")),
            }),
            When::Asleep => self.running().and_then(|_| match self.state {
                DomainState::PmSuspended => Ok(()),
                _ => Err(self.refusal(verb, "it does not sleep")),
            }),
            When::RunningOrPaused => self.running().and_then(|_| match self.state {
                DomainState::Running | DomainState::Idle | DomainState::Paused => Ok(()),
                DomainState::PmSuspended => Err(self.refusal(verb, "it sleeps; wake it first, or destroy it")),
                _ => Err(self.refusal(verb, "reset or destroy it")),
            }),
            When::RunningOrPausedPersistent => {
                self.applies_in(verb, When::RunningOrPaused)?;
                self.is_persistent(verb)
            }
            When::ManagedSaved => self.has_managed_save(),
            When::Persistent => self.is_persistent(verb),
            When::Pending => {
                self.applies_in(verb, When::Running)?;
                match self.pending.is_empty() {
                    false => Ok(()),
                    true => {
                        let text =
                            format!("nothing is pending for domain '{}': what is stored is what runs", self.name);
                        Err(Error::OperationInvalid(text))
                    }
                }
            }
            When::InactivePersistent => {
                self.is_persistent(verb)?;
                match self.live() {
                    None => Ok(()),
                    Some(_) => Err(self.refusal(verb, "shut it down first")),
                }
            }
        }
    }

    /// Refuses to begin another guest beside one that runs, or may run.
    pub(super) fn is_inactive(&self) -> Result<()> {
        if let Some(sought) = &self.sought {
            return Err(sought.refusal(&self.name));
        }
        match self.guest {
            None => Ok(()),
            Some(_) => {
                let text = format!("domain '{}' is active already ({})", self.name, self.state);
                Err(Error::OperationInvalid(text))
            }
        }
    }

    fn is_persistent(&self, verb: &Verb) -> Result<()> {
        match self.stored {
            Some(_) => Ok(()),
            None => {
                let text = format!("cannot {} domain '{}': it is transient; define it first", verb.word, self.name);
                Err(Error::OperationInvalid(text))
            }
        }
    }

    /// What the domain does now does not allow the verb.
    fn refusal(&self, verb: &Verb, remedy: &str) -> Error {
        let (name, state) = (&self.name, self.state);
        Error::OperationInvalid(format!("cannot {} domain '{name}' while it is {state}: {remedy}", verb.word))
    }
}
