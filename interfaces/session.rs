//! Who may do what on a session bus: its owner everything, nobody else anything.

use async_trait::async_trait;
use virt_service::authz::{Action, Answer, Authority, Caller, Subject};
use virt_service::error::Error;

/// Allows one user, and root.
#[derive(Clone, Copy, Debug)]
pub struct OwnerOnly {
    /// The user.
    pub uid: u32,
}

#[async_trait]
impl Authority for OwnerOnly {
    async fn check(&self, caller: &Caller, action: Action, subject: &Subject) -> Result<(), Error> {
        match self.can(caller, action, subject).await {
            Answer::Yes => Ok(()),
            _ => Err(Error::AccessDenied(format!(
                "{} is denied: this virtd serves user {} alone, and the caller is user {}",
                action.id(),
                self.uid,
                caller.uid
            ))),
        }
    }

    async fn can(&self, caller: &Caller, _: Action, _: &Subject) -> Answer {
        if caller.uid == self.uid || caller.uid == 0 { Answer::Yes } else { Answer::No }
    }
}
