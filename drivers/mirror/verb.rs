//! What is done to a machine. A verb has it to itself: what the task of the host sees meanwhile is not looked at. It ends when a
//! picture shows what it did, and that is told as ours; what else has happened is told as somebody else's.

use super::machines::Ours;
use super::picture::{Picture, Run};
use super::remote::{Deed, Remote, Which};
use super::{Contact, Inner};
use std::time::Duration;
use virt_model::driver::DriverError;
use virt_model::driver::inventory::Key;
use virt_model::lock::lock;

/// How long what was asked for may take to be seen.
const LONGEST: Duration = Duration::from_secs(600);

/// How long between two looks at a machine of which something was asked. A host need not tell when it has done that.
const LOOKS: Duration = Duration::from_millis(100);

/// Has a machine to itself until it is dropped.
struct Owned<'a, R: Remote>(&'a Inner<R>, &'a Key);

impl<R: Remote> Drop for Owned<'_, R> {
    fn drop(&mut self) {
        lock(&self.0.machines).end(self.1);
        // Whatever was not looked at meanwhile.
        self.0.wanted.notify_one();
    }
}

impl<R: Remote> Inner<R> {
    /// Asks for a deed, waits until a picture shows what is `wanted` of it, and tells what is otherwise by then; `ours`: what of that
    /// is explained by it. Errors: `Unreachable`, also if the host is lost on the way; `TimedOut`, and the outcome is told when it is
    /// seen; `Gone`; as the host says.
    pub(super) async fn does(
        &self,
        key: &Key,
        deed: Deed,
        ours: Ours,
        wanted: impl Fn(&Picture) -> bool + Send + Sync,
    ) -> Result<(), DriverError> {
        self.reachable()?;
        if !lock(&self.machines).begin(key) {
            return Err(DriverError::Gone);
        }
        let _owned = Owned(self, key);
        let mut contact = self.contact.subscribe();
        let work = async {
            let asked = self.in_time(self.remote.ask(key, deed)).await;
            if let Err(error) = asked {
                // It is refused in a state that nobody may have been told yet.
                let seen = self.in_time(self.remote.pictures(Which::One(key))).await;
                seen.into_iter().for_each(|mut seen| lock(&self.machines).is(key, seen.pop(), Ours::Nothing));
                return Err(error);
            }
            let picture = self.sees(key, wanted).await?;
            let there = picture.is_some();
            lock(&self.machines).is(key, picture, ours);
            if there { Ok(()) } else { Err(DriverError::Gone) }
        };
        tokio::select! {
            done = tokio::time::timeout(LONGEST, work) => done.unwrap_or_else(|_| {
                let (name, minutes) = (&self.profile.name, LONGEST.as_secs() / 60);
                Err(DriverError::TimedOut(format!("host '{name}' has not done it within {minutes} minutes; its outcome is told when seen")))
            }),
            _ = contact.wait_for(|contact| matches!(contact, Contact::Lost(..))) => {
                Err(self.reachable().err().unwrap_or(DriverError::Gone))
            }
        }
    }

    /// Waits until a machine is as wanted; `None` if it has gone.
    async fn sees(
        &self,
        key: &Key,
        wanted: impl Fn(&Picture) -> bool + Send + Sync,
    ) -> Result<Option<Picture>, DriverError> {
        loop {
            let seen = self.in_time(self.remote.pictures(Which::One(key))).await?.pop();
            match seen {
                Some(picture) if picture.run == Run::Between || !wanted(&picture) => tokio::time::sleep(LOOKS).await,
                seen => return Ok(seen),
            }
        }
    }
}
