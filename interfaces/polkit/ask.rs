//! The wire to polkit: one question, one answer.

use super::deed;
use async_trait::async_trait;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use virt_model::xml::plainly;
use virt_service::authz::{Action, Subject};
use zbus::proxy::CacheProperties;
use zbus::{Connection, Message, MessageStream};
use zbus_polkit::policykit1::{self, AuthorityProxy, CheckAuthorizationFlags};

/// How long polkit may take to answer when no person is asked.
const PATIENCE: Duration = Duration::from_secs(25);

/// What polkit says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Allowed.
    pub yes: bool,
    /// Allowed after authentication.
    pub challenge: bool,
    /// The yes is one that polkit keeps, and may take back, itself.
    pub temporary: bool,
}

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The caller's unique name on the bus.
    pub caller: String,
    /// The action.
    pub action: Action,
    /// What polkit's rules and prompts may look up. `owner_uid` is there already, `owner` is added when asked.
    pub details: HashMap<&'static str, String>,
    /// Whether a person may be asked.
    pub prompt: bool,
    /// Names an open prompt, to take it back.
    pub id: String,
}

impl Question {
    /// A question about a caller, an action and an object.
    pub fn new(caller: &str, action: Action, subject: &Subject, prompt: bool) -> Question {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed);
        Question {
            caller: caller.to_owned(),
            action,
            details: details(action, subject),
            prompt,
            id: if prompt { format!("virtd-{}-{id}", std::process::id()) } else { String::new() },
        }
    }
}

/// Asks polkit, whichever way.
#[async_trait]
pub trait Ask: Send + Sync {
    /// The answer; the error is a sentence's end that says why there is none.
    async fn ask(&self, question: &Question) -> Result<Verdict, String>;

    /// Takes an open prompt back.
    async fn cancel(&self, question: &Question);
}

/// polkit on the bus.
#[derive(Debug)]
pub struct Bus {
    proxy: Mutex<AuthorityProxy<'static>>,
}

impl Bus {
    /// polkit on this bus; nothing is sent yet.
    pub async fn new(connection: &Connection) -> zbus::Result<Bus> {
        Ok(Bus { proxy: Mutex::new(polkit_on(connection).await?) })
    }

    /// Asks by another connection from now on.
    pub async fn go_on_by(&self, connection: &Connection) -> zbus::Result<()> {
        let proxy = polkit_on(connection).await?;
        *self.proxy.lock().unwrap_or_else(PoisonError::into_inner) = proxy;
        Ok(())
    }

    fn proxy(&self) -> AuthorityProxy<'static> {
        self.proxy.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The signals that tell of changed rules, agents and sessions. To be read without pause.
    pub async fn changes(&self) -> zbus::Result<MessageStream> {
        let rule = zbus::MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.freedesktop.PolicyKit1")
            .interface("org.freedesktop.PolicyKit1.Authority")
            .member("Changed")
            .build();
        MessageStream::for_match_rule(rule?, self.proxy().inner().connection(), None).await
    }
}

async fn polkit_on(connection: &Connection) -> zbus::Result<AuthorityProxy<'static>> {
    AuthorityProxy::builder(connection).cache_properties(CacheProperties::No).build().await
}

#[async_trait]
impl Ask for Bus {
    async fn ask(&self, question: &Question) -> Result<Verdict, String> {
        let subject = subject(&question.caller)?;
        let owner = owner_of(question).await;
        let mut details: HashMap<&str, &str> = question.details.iter().map(|(key, value)| (*key, &**value)).collect();
        details.extend(owner.as_deref().map(|owner| ("owner", owner)));
        let mut flags = CheckAuthorizationFlags::empty();
        flags.set(CheckAuthorizationFlags::ALLOW_USER_INTERACTION, question.prompt);
        let id = question.action.id();
        let proxy = self.proxy();
        let asking = proxy.check_authorization(&subject, id, &details, flags, &question.id);
        let said = if question.prompt { Ok(asking.await) } else { tokio::time::timeout(PATIENCE, asking).await };
        let said = said.map_err(|_| "it does not answer".to_owned())?.map_err(|error| why(&error))?;
        let temporary = said.details.contains_key("polkit.temporary_authorization_id");
        Ok(Verdict { yes: said.is_authorized, challenge: said.is_challenge, temporary })
    }

    async fn cancel(&self, question: &Question) {
        let proxy = self.proxy();
        let cancelled = tokio::time::timeout(PATIENCE, proxy.cancel_check_authorization(&question.id)).await;
        tracing::debug!(id = question.id, ?cancelled, "a prompt was taken back");
    }
}

/// The caller in polkit's terms: it resolves process and user itself, so there is nothing to race.
fn subject(name: &str) -> Result<policykit1::Subject, String> {
    // The crate makes such a subject of a message's header alone.
    let message = Message::method_call("/", "Call").sender(name).build(&()).map_err(|error| error.to_string())?;
    policykit1::Subject::new_for_message_header(&message.header()).map_err(|error| error.to_string())
}

/// What polkit's rules may look up, and the words of a prompt.
fn details(action: Action, subject: &Subject) -> HashMap<&'static str, String> {
    let mut details = HashMap::from([
        (action.kind().detail(), String::new()),
        ("polkit.message", plainly(&format!("Authentication is required to {}", deed(action, subject))).into_owned()),
        ("polkit.gettext_domain", "virtd".to_owned()),
    ]);
    details.extend(subject.details().iter().cloned());
    details.extend(subject.owner.map(|uid| ("owner_uid", uid.to_string())));
    details
}

/// The name of the user who owns the object. Asking the system for it may take a while.
async fn owner_of(question: &Question) -> Option<String> {
    let uid: u32 = question.details.get("owner_uid")?.parse().ok()?;
    let look = move || nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid));
    let user = tokio::task::spawn_blocking(look).await.ok()?.ok()??;
    Some(user.name)
}

fn why(error: &zbus::Error) -> String {
    match error {
        zbus::Error::FDO(fdo) if matches!(**fdo, zbus::fdo::Error::ServiceUnknown(_)) => {
            "it is not there; install polkitd and see that it runs".to_owned()
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn details_are_what_rules_look_up() {
        let subject = Subject::default().with("driver", "test").with("domain_name", "web");
        let subject = subject.with("domain_uuid", Uuid::nil().to_string()).owned_by(1000);
        let asked = Question::new(":1.7", Action::Start, &subject, true).details;
        assert_eq!(asked["domain_name"], "web");
        assert_eq!(asked["domain_uuid"], Uuid::nil().to_string());
        assert_eq!(asked["owner_uid"], "1000");
        assert_eq!(asked["polkit.message"], "Authentication is required to start the virtual machine \"web\"");
        assert!(!asked.contains_key("snapshot_name"));
    }

    #[test]
    fn a_prompt_names_the_kind_of_object() {
        let message = |action, subject: &Subject| details(action, subject)["polkit.message"].clone();
        let volume = Subject::default().with("pool_name", "fast").with("volume_name", "web.qcow2");
        let told = message(Action::VolumeDelete, &volume);
        assert_eq!(told, "Authentication is required to delete the storage volume \"web.qcow2\"");
        let told = message(Action::NetworkStart, &Subject::default());
        assert_eq!(told, "Authentication is required to start a network");
        let told = message(Action::Job, &Subject::default().with("pool_name", "fast"));
        assert_eq!(told, "Authentication is required to cancel or finish a job of the storage pool \"fast\"");
    }

    #[test]
    fn each_prompt_has_its_own_name() {
        let ask = |prompt| Question::new(":1.7", Action::Start, &Subject::default(), prompt).id;
        assert_ne!(ask(true), ask(true));
        assert_eq!(ask(false), "");
    }
}
