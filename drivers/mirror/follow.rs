//! The task of one host: connects, takes pictures whenever something may have changed, loses the host and comes back.

use super::machines::Asked;
use super::picture::Picture;
use super::remote::{Remote, Which};
use super::{Contact, Inner};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;
use virt_model::driver::DriverError;
use virt_model::driver::inventory::HostReport;
use virt_model::lock::lock;

/// How long a host may take to be connected to.
const CONNECT: Duration = Duration::from_secs(5);

/// The least time from one look at all machines to the next: a host on which something always changes is not asked without a pause.
const PACE: Duration = Duration::from_millis(200);

/// How long a host that is lost is left alone, at first and at most. One that has stayed for the longest is lost for the first time.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

impl<R: Remote> Inner<R> {
    /// Follows the host until nobody listens any more.
    pub(super) async fn follow(self: Arc<Self>, to: UnboundedSender<HostReport>) {
        lock(&self.machines).tell_to(to.clone());
        let mut pause = AGAIN.0;
        let follows = async {
            loop {
                let why = match self.comes_back().await {
                    Ok(()) => {
                        let since = Instant::now();
                        let why = self.stays().await;
                        if since.elapsed() >= AGAIN.1 {
                            pause = AGAIN.0;
                        }
                        why
                    }
                    Err(why) => why,
                };
                self.is_lost(why);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.wanted.notified() => {}
                }
                pause = (pause * 2).min(AGAIN.1);
            }
        };
        tokio::select! {
            () = follows => {}
            () = to.closed() => {}
        }
    }

    /// Connects, and tells all that the host has.
    async fn comes_back(&self) -> Result<(), DriverError> {
        let version = self.connects().await?;
        let (asked, pictures) = self.takes_pictures().await?;
        let mut machines = lock(&self.machines);
        self.contact.send_replace(Contact::Connected);
        machines.tell(HostReport::Connected { version });
        machines.are(asked, pictures);
        machines.tell_anew();
        machines.tell(HostReport::Complete);
        Ok(())
    }

    async fn connects(&self) -> Result<String, DriverError> {
        let connected = tokio::time::timeout(CONNECT.min(self.profile.timeout), self.remote.connect()).await;
        connected.unwrap_or_else(|_| Err(DriverError::TimedOut("it does not answer".to_owned())))
    }

    async fn takes_pictures(&self) -> Result<(Asked, Vec<Picture>), DriverError> {
        let asked = lock(&self.machines).asking();
        let mut pictures = self.in_time(self.remote.pictures(Which::All)).await?;
        let mut keys = BTreeSet::new();
        pictures.retain(|Picture { seen, .. }| {
            let first = keys.insert(seen.key.clone());
            if !first {
                let (host, key) = (&self.profile.name, &seen.key);
                tracing::warn!(%host, %key, "the host says that it has two machines of this key: the second is left out");
            }
            first
        });
        Ok((asked, pictures))
    }

    /// Tells what changes on a host that answers; why it does not any more.
    async fn stays(&self) -> DriverError {
        let mut looked_at = tokio::time::Instant::now();
        loop {
            let changed = tokio::select! {
                changed = self.remote.changed(self.profile.poll) => changed,
                () = self.wanted.notified() => Ok(()),
            };
            tokio::time::sleep_until(looked_at + PACE).await;
            looked_at = tokio::time::Instant::now();
            let looked = match changed {
                Ok(()) => self.looks().await,
                Err(error) => Err(error),
            };
            // One request that fails may be an accident: the host is lost if it does not answer the next one either.
            if looked.is_err()
                && let Err(error) = self.looks_after_all().await
            {
                return error;
            }
        }
    }

    /// Looks at all machines, and tells what is otherwise. One look is enough for all who want one before it begins.
    pub(super) async fn looks(&self) -> Result<(), DriverError> {
        let wanted = lock(&self.machines).asking();
        let mut last = self.looking.lock().await;
        // Whoever looked before may have found that it hangs.
        self.reachable()?;
        if *last > wanted {
            return Ok(());
        }
        let (asked, pictures) = self.takes_pictures().await?;
        lock(&self.machines).are(asked, pictures);
        *last = asked;
        Ok(())
    }

    async fn looks_after_all(&self) -> Result<(), DriverError> {
        self.connects().await?;
        self.looks().await
    }

    fn is_lost(&self, why: DriverError) {
        let machines = lock(&self.machines);
        self.contact.send_modify(|contact| match contact {
            Contact::Lost(_, known) => *known = why.to_string(),
            Contact::Connected => *contact = Contact::Lost(Instant::now(), why.to_string()),
        });
        machines.tell(HostReport::Lost(why));
    }
}
