//! What is done to a machine. A verb has it to itself: what the task of the host sees meanwhile is not looked at. It ends when a
//! picture shows what it did, and that is told as ours; what else has happened is told as somebody else's.

use super::machines::{Asked, Ours};
use super::picture::Picture;
use super::remote::{Deed, Remote, Which};
use super::{Contact, Inner};
use std::time::Duration;
use virt_model::driver::DriverError;
use virt_model::driver::inventory::Key;
use virt_model::lock::lock;

/// How long what was asked for may take to be seen.
fn longest(deed: Deed) -> Duration {
    Duration::from_secs(match deed {
        Deed::Start | Deed::Destroy => 600,
        Deed::Shutdown | Deed::Reboot | Deed::Reset | Deed::Suspend | Deed::Resume => return MOMENT,
    })
}

/// How long what is done in a moment, or only asked for, may take to be seen.
const MOMENT: Duration = Duration::from_secs(20);

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
        self.has_done(key, self.remote.ask(key, deed), longest(deed), ours, wanted).await
    }

    /// Gives a machine another name, and waits until a picture shows it. Errors: as of [`does`](Inner::does).
    pub(super) async fn renames(&self, key: &Key, name: &str) -> Result<(), DriverError> {
        let has_it = |picture: &Picture| picture.seen.name == name;
        self.has_done(key, self.remote.rename(key, name), MOMENT, Ours::Nothing, has_it).await
    }

    /// What a verb does with its `request`, which may take this long to be seen.
    async fn has_done(
        &self,
        key: &Key,
        request: impl Future<Output = Result<(), DriverError>> + Send,
        longest: Duration,
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
            let asked = self.in_time(request).await;
            if let Err(error) = asked {
                // It is refused in a state that nobody may have been told yet.
                let seen = self.takes_picture(key).await;
                seen.into_iter().for_each(|(asked, seen)| lock(&self.machines).is(key, asked, seen, Ours::Nothing));
                return Err(error);
            }
            let seen = tokio::time::timeout(longest, self.sees(key, wanted)).await;
            let (asked, picture) = seen.unwrap_or_else(|_| Err(self.not_done(longest)))?;
            let there = picture.is_some();
            lock(&self.machines).is(key, asked, picture, ours);
            if there { Ok(()) } else { Err(DriverError::Gone) }
        };
        // What it answers with locks the contact, and is put away before that is asked again.
        let lost = async { contact.wait_for(|contact| matches!(contact, Contact::Lost(..))).await.map(drop) };
        tokio::select! {
            done = work => done,
            _ = lost => Err(self.reachable().err().unwrap_or_else(|| self.was_lost())),
        }
    }

    fn not_done(&self, longest: Duration) -> DriverError {
        let (name, seconds) = (&self.profile.name, longest.as_secs());
        DriverError::TimedOut(format!(
            "host '{name}' has not done it within {seconds} s; its outcome is told when seen"
        ))
    }

    fn was_lost(&self) -> DriverError {
        let name = &self.profile.name;
        let text =
            format!("host '{name}' was lost meanwhile, and is back; look what it has done, and ask again if need be");
        DriverError::Unreachable(text)
    }

    /// What a machine is now.
    async fn takes_picture(&self, key: &Key) -> Result<(Asked, Option<Picture>), DriverError> {
        let asked = lock(&self.machines).asking();
        let mut seen = self.in_time(self.remote.pictures(Which::One(key))).await?;
        Ok((asked, seen.pop()))
    }

    /// Waits until a machine is as wanted; `None` if it has gone.
    async fn sees(
        &self,
        key: &Key,
        wanted: impl Fn(&Picture) -> bool + Send + Sync,
    ) -> Result<(Asked, Option<Picture>), DriverError> {
        loop {
            match self.takes_picture(key).await? {
                (_, Some(picture)) if !wanted(&picture) => tokio::time::sleep(LOOKS).await,
                seen => return Ok(seen),
            }
        }
    }
}
