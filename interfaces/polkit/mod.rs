//! Who may do what on the system bus: what polkit says.
//!
//! ```text
//!  check ─▶ root? ─▶ remembered yes? ─▶ asked already? ─▶ turn (64 at once) ─▶ polkit ─▶ yes · no · would ask a person
//!                                                                                 │ if the caller may be prompted
//!                                                            polkit, with prompt ◀┘ (no turn held; cancelled with the caller)
//! ```
//!
//! polkit answers some three hundred questions a second, whoever asks. So a plain yes is remembered for a few seconds,
//! per caller, action and object; callers that ask the same at the same time share one question; and senders take turns.
//! Only a yes that polkit itself does not keep is remembered, and only until polkit says that its rules may have changed.
//! Every failure to find out is a no that says so.

mod ask;
mod memory;

pub use ask::{Ask, Bus, Question, Verdict};

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use memory::Memory;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virt_service::authz::{Action, Answer, Authority, Caller, Subject};
use virt_service::error::Error;
use virt_service::fair::FairPlaces;
use virt_service::object::ObjectKind;

/// How many questions without a prompt are with polkit at once. The bus allows 128 calls without an answer in all.
const AT_ONCE: usize = 64;
/// How many prompts may be open: in all, and of one user.
const PROMPTS: (usize, usize) = (48, 8);

/// What is asked: caller, action, object. With a prompt or without.
type Key = (String, Action, Subject, bool);
type Asked = Shared<BoxFuture<'static, Result<Verdict, String>>>;

/// Asks polkit.
pub struct Polkit {
    inner: Arc<Inner>,
}

struct Inner {
    ask: Arc<dyn Ask>,
    turns: Arc<FairPlaces<String>>,
    memory: Memory<(String, Action, Subject)>,
    asked: Mutex<HashMap<Key, Asked>>,
    prompts: Mutex<HashMap<u32, usize>>,
}

impl Polkit {
    /// An authority that asks through `ask`.
    pub fn new(ask: Arc<dyn Ask>) -> Polkit {
        let inner = Inner {
            ask,
            turns: FairPlaces::new(AT_ONCE, AT_ONCE),
            memory: Memory::default(),
            asked: Mutex::default(),
            prompts: Mutex::default(),
        };
        Polkit { inner: Arc::new(inner) }
    }

    /// polkit's rules, or what it goes by, may have changed: nothing is remembered.
    pub fn forget(&self) {
        self.inner.memory.forget();
    }

    /// What polkit says; without a prompt first, as that is what can be shared and bounded.
    async fn verdict(&self, caller: &Caller, action: Action, subject: &Subject) -> Result<Verdict, String> {
        let Some(name) = &caller.bus_name else {
            return Err("polkit knows callers by their name on the bus, and this one has none".to_owned());
        };
        let remembered = (name.clone(), action, subject.clone());
        if self.inner.memory.holds(&remembered) {
            return Ok(Verdict { yes: true, ..Verdict::default() });
        }
        self.inner.shared(caller, name, action, subject, false).await
    }
}

#[async_trait]
impl Authority for Polkit {
    async fn check(&self, caller: &Caller, action: Action, subject: &Subject) -> Result<(), Error> {
        if caller.uid == 0 {
            return Ok(());
        }
        let mut verdict = self.verdict(caller, action, subject).await;
        if let (Ok(said), Some(name)) = (&verdict, &caller.bus_name)
            && !said.yes
            && said.challenge
            && caller.interactive
        {
            let _place = self.inner.prompt_place(caller.uid)?;
            verdict = self.inner.shared(caller, name, action, subject, true).await;
        }
        judge(verdict, caller.interactive, action, subject)
    }

    async fn can(&self, caller: &Caller, action: Action, subject: &Subject) -> Answer {
        if caller.uid == 0 {
            return Answer::Yes;
        }
        match self.verdict(caller, action, subject).await {
            Ok(said) if said.yes => Answer::Yes,
            Ok(said) if said.challenge => Answer::Challenge,
            _ => Answer::No,
        }
    }
}

impl Inner {
    /// Asks, or waits for whoever is asking the same.
    fn shared(self: &Arc<Self>, caller: &Caller, name: &str, action: Action, subject: &Subject, prompt: bool) -> Asked {
        let key = (name.to_owned(), action, subject.clone(), prompt);
        let mut asked = lock(&self.asked);
        if let Some(same) = asked.get(&key) {
            return same.clone();
        }
        let (inner, caller, question) = (self.clone(), caller.clone(), Question::new(name, action, subject, prompt));
        let asking = {
            let key = key.clone();
            tokio::spawn(async move {
                let said = inner.ask(&caller, &key, question).await;
                lock(&inner.asked).remove(&key);
                said
            })
        };
        let lost = |error| Err(format!("the question was lost: {error}"));
        let asking = asking.map(move |said| said.unwrap_or_else(lost)).boxed().shared();
        asked.insert(key, asking.clone());
        asking
    }

    async fn ask(&self, caller: &Caller, key: &Key, question: Question) -> Result<Verdict, String> {
        let (name, action, subject, prompt) = key;
        let since = self.memory.now();
        let said = if *prompt {
            self.ask_person(caller, question).await?
        } else {
            let _turn = self.turns.take(name).await;
            self.ask.ask(&question).await?
        };
        if said.yes && !said.temporary && !caller.departed.is_cancelled() {
            self.memory.keep((name.clone(), *action, subject.clone()), since);
        }
        Ok(said)
    }

    /// Waits for a person, as long as the caller does.
    async fn ask_person(&self, caller: &Caller, question: Question) -> Result<Verdict, String> {
        tokio::select! {
            said = self.ask.ask(&question) => said,
            () = caller.departed.cancelled() => {
                self.ask.cancel(&question).await;
                Err("the caller left while a person was asked".to_owned())
            }
        }
    }

    /// A prompt may be opened; its place is given back on drop.
    fn prompt_place(self: &Arc<Self>, uid: u32) -> Result<PromptPlace, Error> {
        let mut prompts = lock(&self.prompts);
        let (open, own) = (prompts.values().sum::<usize>(), prompts.entry(uid).or_default());
        if *own >= PROMPTS.1 || open >= PROMPTS.0 {
            return Err(Error::LimitsExceeded(
                "too many prompts for a password are open already; answer them first".into(),
            ));
        }
        *own += 1;
        Ok(PromptPlace { inner: self.clone(), uid })
    }
}

struct PromptPlace {
    inner: Arc<Inner>,
    uid: u32,
}

impl Drop for PromptPlace {
    fn drop(&mut self) {
        let mut prompts = lock(&self.inner.prompts);
        if let Some(own) = prompts.get_mut(&self.uid) {
            *own -= 1;
            if *own == 0 {
                prompts.remove(&self.uid);
            }
        }
    }
}

/// What a verdict means for the call. One that still asks for a person after a prompt was allowed has found none to ask.
fn judge(verdict: Result<Verdict, String>, prompted: bool, action: Action, subject: &Subject) -> Result<(), Error> {
    let (deed, id) = (deed(action, subject), action.id());
    match verdict {
        Ok(said) if said.yes => Ok(()),
        Ok(said) if said.challenge && prompted => Err(Error::InteractionRequired(format!(
            "to {deed}, polkit asks for a password ({id}), and no authentication agent runs that could ask the caller"
        ))),
        Ok(said) if said.challenge => Err(Error::InteractionRequired(format!(
            "to {deed}, polkit would ask for a password ({id}), and the call does not allow that"
        ))),
        Ok(_) => Err(Error::AccessDenied(format!("you may not {deed}: polkit denies {id}"))),
        Err(why) => Err(Error::AccessDenied(format!("you may not {deed}: polkit could not be asked for {id}: {why}"))),
    }
}

/// The deed and what it is done to, for people. A job may be one of any kind of object.
fn deed(action: Action, subject: &Subject) -> String {
    let kinds = [action.kind(), ObjectKind::Volume, ObjectKind::Pool, ObjectKind::Network];
    let named = kinds.iter().find(|kind| !subject.detail(kind.detail()).is_empty());
    match named {
        Some(kind) => format!("{} the {} \"{}\"", action.deed(), kind.shown(), subject.detail(kind.detail())),
        None => format!("{} a {}", action.deed(), action.kind().shown()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
